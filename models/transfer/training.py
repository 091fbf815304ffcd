"""Training a stress generator: bars -> latents -> flow, energies. A function of (bars, config, seed).

The flow learns the velocity from noise to real windows of each regime (flow matching), with the label dropped
from some rows. A window is brought into another regime by following the flow of its own regime back to noise,
and that of the other one from there. The second phase follows such whole ways from sources: what comes out is
compared with real windows of the target regime by its patches, and with its source by its self-similarity,
while the flow is learnt on. Both phases keep the state that windows like best which were not learnt from. How
volatile the windows of each regime are is kept beside it: scenarios are made as volatile as these.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from hashlib import sha256
from math import inf
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from barcast.models.diffusion import fingerprint, use_one_thread
from barcast.models.errors import DataError
from barcast.models.optimiser import Budget, Phase, Progress, Share, StateFile, fit, processes
from barcast.models.origins import parts
from barcast.models.transfer.config import TransferConfig
from barcast.models.transfer.dataset import FEWEST, References, RegimeLatentDataset, collected
from barcast.models.transfer.latent import dithered
from barcast.models.transfer.losses import divergence, self_similarity, texture_distance
from barcast.models.transfer.network import FULL, NULL, TransferArchitecture, VelocityNetwork, guided, travel
from barcast.models.transfer.regimes import REGIMES, RegimeRule
from barcast.models.transfer.trained import PROBABILITIES, Transfer, TransferRecord
from barcast.models.window import Window

VALIDATION, VALIDATION_BARS, MOST_VALIDATION = 0.1, 480, 0.3
"""Share of the bars, the newest, that choose between weights; so many of the longest history at least, which
are more of short ones, up to the last share."""
LOOK_WINDOWS = 256  # of them, thinned evenly, whose velocity is judged
LOOK_WAYS = 48  # and that are brought into another regime
LOOK_TIMES = 4  # at which a velocity is judged
ELASTIC = 2.0  # by which volume follows volatility, at most
SOURCES = Path(__file__).parents[1]  # of what a training runs through: a state is of one version


def train(
    histories: Collection[Window],
    *,
    timeframe: str,
    config: TransferConfig | None = None,
    until: int | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    seconds: float | None = None,
    clock: Callable[[], float] | None = None,
    state: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Transfer:
    """Train a stress generator on whole histories, one window for each symbol.

    `until` (nanoseconds) is the last close that may be used, the newest if None; `hold_out` the share of the
    newest bars that are left alone. `seconds` on the monotonic `clock` caps the training, half for each
    phase. `state` is a file from which an interrupted training goes on, see `barcast.models.training.train`.
    Memory holds one history's numbers at a time and `dataset.MOST` windows.

    Raises `DataError` for bars that cannot be learnt from.
    """
    if seconds is not None and clock is None:
        raise ValueError("a cap on seconds needs a clock")
    config = config or TransferConfig()
    accelerator = processes("fp32", 1, 1)
    use_one_thread()
    training = _Training(histories, timeframe, config, until, hold_out, seed)
    options = (asdict(config), seed, seconds)
    file = None if state is None else StateFile(state, training.key(options))
    budget = Budget(config.steps, inf if seconds is None else seconds / 2, None if seconds is None else clock)
    fitted = fit(training.net, training.phases(), budget, training.generator, accelerator, file, progress)
    accelerator.end_training()
    best = {name: min(c.crps for c in fitted.candidates if c.phase == name) for name in fitted.chosen}
    record = TransferRecord(
        **training.data.past(len(training.learn), fingerprint(config.batch)),
        timeframe=timeframe,
        seed=seed,
        windows=tuple(int((training.learn.regimes == k).sum()) for k in range(len(REGIMES))),
        flow_step=fitted.chosen["flow"][0],
        energy_step=fitted.chosen["energy"][0],
        flow_error=best["flow"],
        distance=best["energy"],
        capped=fitted.capped,
    )
    learn, net = training.learn, training.net.eval()
    return Transfer(net, learn.scale, training.rule, training.elasticity, _levels(learn), config, record)


def _levels(learn: RegimeLatentDataset) -> NDArray[np.float64]:
    """Quantiles (R, K) of the levels of windows of each regime."""
    found = []
    for k in range(len(REGIMES)):
        r = learn.scale.decode(learn.latents[learn.regimes == k])
        found.append(np.quantile(r.square().mean(1).sqrt().log().numpy(), PROBABILITIES))
    return np.array(found)


class _Training:
    """One training. The state is the network, the generator, and the windows that are learnt from."""

    def __init__(
        self,
        histories: Collection[Window],
        timeframe: str,
        config: TransferConfig,
        until: int | None,
        hold_out: float,
        seed: int,
    ) -> None:
        self.config, self.timeframe = config, timeframe
        whole = parts(histories, until, validation=VALIDATION, hold_out=hold_out)
        longest = (1 - hold_out) * max(map(len, whole.histories))
        share = min(max(VALIDATION, VALIDATION_BARS / longest), MOST_VALIDATION)
        self.data = parts(histories, until, validation=share, hold_out=hold_out)
        windows = collected(self.data.histories)
        older = windows.close <= self.data.train_end
        begun = windows.begun(self.data.histories)
        apart = (begun >= self.data.train_end) & (windows.close <= self.data.validation_end)
        learnt = windows.only(older)
        self.rule = RegimeRule.fit([learnt.measures])
        self.learn = RegimeLatentDataset.of(learnt, self.rule)
        self.apart = RegimeLatentDataset.of(windows.only(apart), self.rule, self.learn.scale)
        self.elasticity = _elasticity(learnt.measures.level, learnt.volume)
        for k, name in enumerate(REGIMES):
            if (n := int((self.learn.regimes == k).sum())) < FEWEST:
                raise DataError(
                    f"only {n} windows of the regime {name} to learn from, not {FEWEST}: give longer "
                    "histories, or more symbols"
                )
        if len(self.apart) < FEWEST:
            raise DataError(
                f"only {len(self.apart)} windows to judge on, not {FEWEST}: give longer histories, or more "
                "symbols"
            )
        self.judged = [k for k in range(len(REGIMES)) if bool((self.apart.regimes == k).any())]
        self.references = References(self.learn)
        self.generator = Generator().manual_seed(seed)
        self.net = VelocityNetwork(TransferArchitecture(config.width, config.code), self.generator)
        self._look_seed = int(torch.randint(2**31, (), generator=self.generator))

    def key(self, options: object) -> str:
        """All that the bits of the result depend on, as a hash."""
        data = self.data
        scope = (data.digest, data.train_end, data.validation_end, data.until, self.timeframe)
        code = sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.py")))).hexdigest()
        told = json.dumps([scope, code, fingerprint(self.config.batch), options], sort_keys=True)
        return sha256(told.encode()).hexdigest()

    def phases(self) -> list[Phase]:
        """The flow, and the energies."""
        c, nothing = self.config, lambda: None
        return [
            Phase("flow", [self.net], c.rate, self._flow_loss, self._flow_error, nothing),
            Phase(
                "energy",
                [self.net],
                c.energy_rate,
                self._energy_loss,
                self._energy_distance,
                nothing,
                steps=c.energy_steps,
            ),
        ]

    # The flow.

    def _flow_loss(self, share: Share) -> Tensor:
        """Error of the velocity towards real windows, as many of each regime, at stratified times."""
        g, B = share.generator, self.config.batch
        regimes = torch.randint(len(REGIMES), (B,), generator=g)
        at = self.references.draw(regimes, g)
        told = dropped(regimes, self.config.label_drop_prob, g)
        t = (torch.randperm(B, generator=g) + torch.rand(B, generator=g)) / B
        x = dithered(self.learn.latents[at], g)
        error = flow_error(self.net, x, t, told, g)
        return error.mean()

    def _flow_error(self) -> list[float]:
        """The same on windows that were not learnt from, of each regime alike, at fixed times and noise."""
        g = Generator().manual_seed(self._look_seed)
        total = 0.0
        for k in self.judged:
            at = _some((self.apart.regimes == k).nonzero()[:, 0], LOOK_WINDOWS // len(REGIMES))
            x = dithered(self.apart.latents[at], g)
            for i in range(LOOK_TIMES):
                t = torch.full((len(x),), (i + 0.5) / LOOK_TIMES)
                total += float(flow_error(self.net, x, t, torch.full_like(at, k), g).mean())
        return [total / LOOK_TIMES / len(self.judged)]

    # The energies.

    def _energy_loss(self, share: Share) -> Tensor:
        """Texture and content of whole ways from sources to other regimes, beside the flow's own loss."""
        g, c, B = share.generator, self.config, self.config.batch
        own = torch.randint(len(REGIMES), (B,), generator=g)
        target = (own + torch.randint(1, len(REGIMES), (B,), generator=g)) % len(REGIMES)
        at = self.references.draw(own, g)
        reference = self.references.sample_style_batch(target, g, at)
        source = self.learn.latents[at]
        found, speed = self._way(source, own, target, g, keep=not c.use_gradient_checkpointing)
        loss = self.energy(found, source, reference, target, g) + c.anchor * self._flow_loss(share)
        if c.use_velocity_reg:
            loss = loss + c.velocity * speed
        if c.use_divergence_reg:
            t = torch.rand(B, generator=g)
            field = guided(self.net, target, c.cfg_scale)
            loss = loss + c.divergence * divergence(field, dithered(source, g), t, g)
        return loss

    def energy(
        self, found: Tensor, source: Tensor, reference: Tensor, target: Tensor, generator: Generator
    ) -> Tensor:
        """How far what was found (B, 4, H, W) is from references in texture, and from its sources in content.

        Raises `ValueError` where a reference is its source: what is learnt from it is to change nothing.
        """
        if bool((reference == source).flatten(1).all(1).any()):
            raise ValueError("a reference is its own source: references are drawn from the target regime")
        c = self.config
        texture = texture_distance(found, reference, target, generator, c.max_samples)
        content = self_similarity(found, source, generator, c.max_spatial_samples)
        return c.texture * texture + c.content * content

    def _energy_distance(self) -> list[float]:
        """The energies of windows that were not learnt from, brought into each other regime."""
        g = Generator().manual_seed(self._look_seed)
        own, target = [], []
        for k in self.judged:
            at = _some((self.apart.regimes == k).nonzero()[:, 0], LOOK_WAYS // len(REGIMES))
            own.append(at)
            target.append((k + 1 + torch.arange(len(at)) % (len(REGIMES) - 1)) % len(REGIMES))
        at, to = torch.cat(own), torch.cat(target)
        source = self.apart.latents[at]
        reference = self.references.sample_style_batch(to, g)
        found, _ = self._way(source, self.apart.regimes[at], to, g, keep=True)
        return [float(self.energy(found, source, reference, to, g))]

    def _way(
        self, source: Tensor, own: Tensor, target: Tensor, g: Generator, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """Sources in the target regimes, and the mean square of the velocity on the way there."""
        c = self.config
        with torch.no_grad():
            noise = travel(guided(self.net, own, FULL), dithered(source, g), 1.0, 0.0, c.ode_steps, c.solver)
        found = travel(guided(self.net, target, c.cfg_scale), noise, 0.0, 1.0, c.ode_steps, c.solver, keep)
        return self.learn.scale.consistent(found), (found - noise).square().mean()


def flow_error(net: VelocityNetwork, x: Tensor, t: Tensor, told: Tensor, generator: Generator) -> Tensor:
    """The squared error (B,) of the velocity at times (B,) on the way from noise to latents (B, 4, H, W)."""
    noise = torch.randn(x.shape, generator=generator)
    at = t[:, None, None, None]
    apart: Tensor = net((1 - at) * noise + at * x, t, told) - (x - noise)
    return apart.square().mean((1, 2, 3))


def dropped(regimes: Tensor, share: float, generator: Generator) -> Tensor:
    """Regimes (B,) of which each is `NULL` by that chance, row by row."""
    return torch.where(torch.rand(len(regimes), generator=generator) < share, NULL, regimes)


def _some(at: Tensor, n: int) -> Tensor:
    """At most n of some windows, evenly spread."""
    return at[torch.linspace(0, len(at) - 1, min(n, len(at))).round().long()]


def _elasticity(level: np.ndarray, volume: np.ndarray) -> float:
    """The slope of the logarithm of volume on that of volatility; 0 where volumes are not known."""
    known = np.isfinite(volume)
    if known.sum() < FEWEST:
        return 0.0
    x, y = level[known] - level[known].mean(), volume[known] - volume[known].mean()
    return float(np.clip((x @ y) / (x @ x), 0.0, ELASTIC))
