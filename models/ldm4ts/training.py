"""Training an LDM4TS: bars -> scaling -> map, autoencoder, U-Net, gate. A function of (bars, options, seed).

The newest block of the bars is learnt from by none of the first three phases: it chooses their weights, and
its first half is what the gate learns from, the second what chooses the gate's weights. A step of the third
phase calls the U-Net once: noise of a random timestep is added to the latents to come, and the error of the
velocity is weighted by the smaller of signal to noise and `GAMMA` (Hang et al. 2023); what the estimate of
the latents says of the way to come is compared with it, too. Where the memory does not suffice, the training
goes on from its last look by a plan that takes less, see `with_ladder`: parts of a batch add up to the same
gradient, and images of another size are another training.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from math import gcd, inf
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models import samplers
from barcast.models.diffusion import fingerprint, use_one_thread
from barcast.models.errors import DataError
from barcast.models.ldm4ts.attention import (
    Backend,
    choose,
    head_dims,
    set_gradient_checkpointing,
    use_backend,
)
from barcast.models.ldm4ts.autoencoder import open_autoencoder, sizes_of
from barcast.models.ldm4ts.forecaster import SAMPLER, STEPS, Sampling, quantiles_of
from barcast.models.ldm4ts.language import Language, open_language
from barcast.models.ldm4ts.losses import estimate, fused, image_loss, noise_levels, pinball
from barcast.models.ldm4ts.memory import Plan, with_ladder
from barcast.models.ldm4ts.network import LDM4TS, PARTS, PRESET, LatentArchitecture
from barcast.models.ldm4ts.trained import LatentRecord, LatentTrained
from barcast.models.optimiser import (
    Budget,
    Phase,
    Progress,
    Share,
    StateFile,
    StateMemory,
    fit,
    processes,
)
from barcast.models.origins import BLOCKS, LEAST, Origins, Split, split, thinned
from barcast.models.paths import path_steps
from barcast.models.scaling import CHANNELS, feature_names, layout_of, signed_features
from barcast.models.sssd.marginal import PROBABILITIES, knot_scores, piecewise
from barcast.models.trained import check_outputs
from barcast.models.training import LEAST_STEPS, MARGIN, MOST_STEPS, SIGNED_CHANNELS, static_knots
from barcast.models.window import Window

Array = NDArray[np.float64]

SAMPLES = 32
IMAGE = 64
"""Pixels of an image's side by default."""
RATES = {"map": 2e-3, "autoencoder": 2e-3, "diffusion": 1e-3, "gate": 5e-3}
BATCHES = {"map": 192, "autoencoder": 32, "diffusion": 64, "gate": 64}
LEARNT = 10_000  # origins whose latents the U-Net learns from, about: it draws few more
LOOK_ORIGINS = {"map": 1500, "autoencoder": 256, "diffusion": 96, "gate": 400}
LOOK_SAMPLES = 16  # of the noise, when the U-Net is judged
FAR = 6.0  # deviations: no step of a way counts as farther
PIECE = 256  # origins encoded, or sampled, at once: fewer of larger images, or where a batch has parts
DROP = 0.3  # of what map and gate see
SOURCES = Path(__file__).parents[1]  # of what a training runs through: a state is of one version

_Loss: TypeAlias = Callable[[Share], Tensor]
_Look: TypeAlias = Callable[[], list[float]]


def train(
    histories: Collection[Window],
    *,
    timeframe: str,
    horizons: Sequence[int],
    levels: Sequence[float],
    until: int | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    steps: int | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] | None = None,
    preset: str | None = None,
    image: int | None = None,
    parts: Collection[str] = PARTS,
    vae: Path | nn.Module | None = None,
    text: Path | None = None,
    attention: str = Backend.default,
    checkpoint_gradients: bool = False,
    precision: str = "fp32",
    accumulate: int = 1,
    rate: float | None = None,
    state: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> LatentTrained:
    """Train a model on whole histories, one window for each symbol; options are those of `training.train`.

    `preset` names the sizes of the network, `image` are the pixels of a side, and `parts` what the U-Net is
    told. `vae` is an autoencoder to use as it is, or the folder of one, see `open_autoencoder`: `read` alone
    is then learnt in the second phase. `text` is the folder of a language model to which a sentence on the
    history is told, see `open_language`; what it makes of it is kept for the third phase. `attention`
    computes the attention of what learns, see `choose`, and `checkpoint_gradients` keeps the inputs of blocks
    alone. `seconds` is shared by the four phases.

    One process that runs out of memory goes on by the next plan of `with_ladder`; `progress` hears of it in
    a note. Several that share batches do not: they would wait for each other.
    """
    if seconds is not None and clock is None:
        raise ValueError("a cap on seconds needs a clock")
    check_outputs(horizons, levels)
    batch = gcd(*BATCHES.values())
    accelerator = processes(precision, accumulate, batch)
    use_one_thread()
    given = open_autoencoder(vae) if isinstance(vae, Path) else vae
    language = None if text is None else open_language(text, timeframe)
    folder = None if state is None else state.parent
    data = split(histories, timeframe, tuple(horizons), until, folder, validation=0.0, hold_out=hold_out)
    asked = LatentArchitecture.of(
        preset or PRESET,
        features=len(feature_names(timeframe, horizons)),
        channels=CHANNELS,
        context=layout_of(timeframe).context,
        horizons=len(horizons),
        path=len(path_steps(horizons)),
        samples=SAMPLES,
        image=IMAGE if image is None else image,
        given=given is not None,
        text=0 if language is None else language.width,
        **({} if given is None else sizes_of(given)),
        **{part: part in parts for part in PARTS},
    )
    stand = Progress("map", 0, 0, None, None, 0, 0)

    def say(p: Progress) -> None:
        nonlocal stand
        stand = p
        progress(p)

    def tell(line: str) -> None:
        progress(replace(stand, crps=None, note=line))

    count = accelerator.num_processes

    def begin(size: int) -> _Training:
        a = replace(asked, image=size)
        return _Training(data, tuple(levels), seed, steps, state, a, given, language, rate)

    training = begin(asked.image)

    def run(plan: Plan) -> LatentTrained:
        nonlocal training
        if training.net.architecture.image != plan.image_size:
            training = begin(plan.image_size)
        if stand.steps:
            accelerator.free_memory()  # it holds on to what was tried before
        accelerator.gradient_accumulation_steps = batch // count // plan.batch_size
        cap = inf if seconds is None else seconds / len(RATES)
        return training.run(accelerator, plan, cap, None if seconds is None else clock, say)

    heads = {size for module in training.attending for size in head_dims(module)}
    backend = choose(attention, True, heads, tell, accelerator.device.type)
    plan = Plan(batch // count // accumulate, asked.image, backend, checkpoint_gradients)
    if count > 1:
        trained = run(plan)
    else:
        trained, _ = with_ladder(run, plan, tell, device=accelerator.device.type)
    accelerator.end_training()
    return trained


class _Training:
    """One training. The state is the network, the generator, and what the later phases learn from."""

    def __init__(
        self,
        data: Split,
        levels: tuple[float, ...],
        seed: int,
        steps: int | None,
        state: Path | None,
        a: LatentArchitecture,
        given: nn.Module | None = None,
        language: Language | None = None,
        rate: float | None = None,
    ) -> None:
        self.data, self.seed, self.state = data, seed, state
        self.rates = RATES if rate is None else RATES | {"diffusion": rate}
        self.rate = rate
        self.memory, self.key = StateMemory(), ""
        self.piece = PIECE
        self.learn = data.learn
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self.normal = torch.special.ndtri(self.levels)
        self.steps = steps or min(max(len(self.learn) // 60, LEAST_STEPS), MOST_STEPS)
        self.signed = torch.from_numpy(signed_features(data.scaling.timeframe, data.scaling.horizons))
        self.generator = Generator().manual_seed(seed)
        self.net = LDM4TS(a, self.generator)
        self.net.language = language
        self.given = ""  # sha256 of the autoencoder that is used as it is
        if given is not None:
            self.net.vae.load_state_dict(given.state_dict())
            self.net.vae.requires_grad_(False)
            weights = {name: x.contiguous() for name, x in self.net.vae.state_dict().items()}
            self.given = sha256(save_tensors(weights)).hexdigest()
        self.attending: list[nn.Module] = [self.net.unet]  # what learns and attends
        if not self.given:
            self.attending.append(self.net.vae)
        self.drawn = torch.empty(0, dtype=torch.long)
        self.path = path_steps(data.scaling.horizons)
        self.places = [self.path.index(h) for h in data.scaling.horizons]
        self.alike = not data.scaling.layout.falls
        block = self.learn.block
        self.older = (block[:, 1] < BLOCKS - 1).nonzero()[:, 0]
        newest = (block == BLOCKS - 1).all(1).nonzero()[:, 0]
        few = DataError(
            f"outcomes over {max(data.scaling.horizons)} bars reach too far for {len(block)} forecast "
            "origins: give more bars, or shorter horizons"
        )
        if min(len(self.older), len(newest)) < LEAST // BLOCKS:
            raise few
        by_time = newest[self.learn.closes[newest, 0].argsort(stable=True)]
        self.apart = {phase: thinned(newest, n) for phase, n in LOOK_ORIGINS.items() if phase != "gate"}
        self.judged = thinned(by_time, LOOK_ORIGINS["gate"])
        begun, known = self.learn.closes[self.judged].unbind(1)
        cut = begun[len(begun) // 2]
        self.first = (known <= cut).nonzero()[:, 0]  # what the gate learns from
        self.second = (begun >= cut).nonzero()[:, 0]  # what chooses its weights
        if not len(self.first):
            raise few
        self.noise = noise_levels()

    def run(
        self,
        accelerator: Accelerator,
        plan: Plan,
        seconds: float,
        clock: Callable[[], float] | None,
        progress: Callable[[Progress], None],
    ) -> LatentTrained:
        """Train by a plan, from the last look of a run before where there was one."""
        net, data = self.net, self.data
        for module in self.attending:
            use_backend(module, plan.backend, training=True)
            set_gradient_checkpointing(module, plan.gradient_checkpointing)
        net.zero_grad(set_to_none=True)  # of a run that failed
        pieces = accelerator.gradient_accumulation_steps * (plan.image_size // IMAGE) ** 2
        self.piece = max(1, PIECE // pieces)
        options = {
            "seed": self.seed,
            "init_from": None,
            "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "accumulate": accelerator.gradient_accumulation_steps,
            "attention": str(plan.backend),
            "checkpointed": plan.gradient_checkpointing,
            "rate": self.rate,
        }
        self.key = self.key or self._key(options, seconds)  # by what was asked for, wherever it leads
        file: StateFile | StateMemory = self.memory
        if self.state is not None:
            file = StateFile(self.state, self.key)
        drawn = [net.unet, net.statistics, net.frequency, *filter(None, [net.said])]
        of: dict[str, tuple[list[nn.Module], _Loss, _Look, Callable[[], None]]] = {
            "map": ([net.temporal, net.map], self._map_loss, self._map_crps, self._prepare_map),
            "autoencoder": ([net.vae, net.read], self._image_loss, self._image_error, lambda: None),
            "diffusion": (drawn, self._velocity_loss, self._velocity_crps, self._prepare_latents),
            "gate": ([net.gate], self._gate_loss, self._gate_crps, self._prepare_gate),
        }
        if self.given:
            of["autoencoder"] = [net.read], self._read_loss, self._image_error, self._prepare_latents
        phases = [
            Phase(
                name, modules, self.rates[name], loss, look, prepare, margin=MARGIN if name == "gate" else 0.0
            )
            for name, (modules, loss, look, prepare) in of.items()
        ]
        budget = Budget(self.steps, seconds, clock)
        fitted = fit(net, phases, budget, self.generator, accelerator, file, progress)
        for module in self.attending:
            use_backend(module, Backend.sdpa, training=False)
            set_gradient_checkpointing(module, False)
        record = LatentRecord(
            **data.past(len(self.learn), fingerprint(SAMPLES)),
            steps=self.steps,
            capped=fitted.capped,
            candidates=fitted.candidates,
            map_step=fitted.chosen["map"],
            denoiser_step=fitted.chosen["diffusion"][0],
            stopped=fitted.stopped,
            **options,
        )
        return LatentTrained(net.eval(), data.scaling, tuple(self.levels.tolist()), record)

    def _key(self, options: dict[str, object], seconds: float) -> str:
        data, s = self.data, self.data.scaling
        scope = (data.digest, data.train_end, data.validation_end, data.until, s.timeframe, s.horizons)
        code = sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.py")))).hexdigest()
        said = None if self.net.language is None else self.net.language.sha256
        program = (
            code,
            fingerprint(SAMPLES),
            asdict(self.net.architecture),
            self.given,
            said,
            self.steps,
            seconds,
        )
        told = json.dumps([scope, self.levels.tolist(), program, options], sort_keys=True)
        return sha256(told.encode()).hexdigest()

    def _sequence(self, at: Tensor) -> Tensor:
        return self.learn.sequence(at, self.net.architecture.context)

    def _coming(self, part: Origins) -> Tensor:
        """The ways (n, G) of origins, each step in deviations of its own."""
        sizes = deviations(part.scale.numpy(), self.data.scaling.horizons, self.path)
        return (part.path(self.path) / torch.from_numpy(sizes)).clamp(-FAR, FAR).float()

    # The map.

    def _prepare_map(self) -> None:
        z = self.learn.z[self.older]
        for m in range(self.net.architecture.members):
            self.net.map.static[m] = static_knots(z, self.alike and m % 2 == 1)

    def _map_loss(self, share: Share) -> Tensor:
        """Pinball loss of the members' knots, on random origins; some see them mirrored."""
        part, g, M, B = self.learn, share.generator, self.net.architecture.members, BATCHES["map"]
        at = self.older[share.rows(torch.randint(len(self.older), (B, M), generator=g))]  # (b, M)
        sign = share.rows(1 - 2 * torch.randint(2, (B, M, 1), generator=g).float())
        sign = torch.where((torch.arange(M)[:, None] % 2 == 1) & self.alike, sign, 1.0)
        x = torch.where(self.signed, sign * part.features[at], part.features[at])
        sequence = self._sequence(at.flatten())
        sequence = torch.where(SIGNED_CHANNELS, sign.reshape(-1, 1, 1) * sequence, sequence)
        told = self.net.told(x.flatten(0, 1), sequence).reshape(*at.shape, -1)
        told = told * (share.rows(torch.rand(B, M, told.shape[-1], generator=g)) >= DROP) / (1 - DROP)
        knots = self.net.map(told)  # (b, M, H, K)
        miss = (sign * part.z[at].float())[..., None] - knots
        p = torch.tensor(PROBABILITIES)
        return pinball(miss, p).mean()

    def _map_crps(self) -> list[float]:
        part = self.learn.only(self.apart["map"])
        return [self._crps(part, self._mapped(self.apart["map"]))]

    def _mapped(self, at: Tensor) -> Tensor:
        """The map's quantiles (n, H, Q) of some origins."""
        found = []
        for some in torch.split(at, 4 * PIECE):
            told = self.net.told(self.learn.features[some], self._sequence(some))
            knots = self.net.map.average(told)
            u = self.normal.expand(*knots.shape[:2], -1).contiguous()
            found.append(piecewise(u, knot_scores().expand(knots.shape), knots))
        return torch.cat(found)

    # The autoencoder.

    def _image_loss(self, share: Share) -> Tensor:
        """See `image_loss`: half of the images are without what is to come."""
        g, B, net = share.generator, BATCHES["autoencoder"], self.net
        at = self.older[share.rows(torch.randint(len(self.older), (B,), generator=g))]
        sequence, way = self._sequence(at), self._coming(self.learn.only(at))
        half = torch.rand(B, generator=g) < 0.5
        shown = max(1, int((~half).sum())) / share.of  # of a share, were they spread evenly
        half = share.rows(half)
        return image_loss(net, sequence, way, half, shown)

    def _read_loss(self, share: Share) -> Tensor:
        """Error of the ways that are read from the latents of an autoencoder that was given."""
        B = BATCHES["autoencoder"]
        i = share.rows(torch.randint(len(self.drawn), (B,), generator=share.generator))
        return functional.smooth_l1_loss(self.net.way(self.latents[i]), self.ways[i])

    def _image_error(self) -> list[float]:
        """How far the way that is read from an image's latents is from it, in deviations."""
        at = self.apart["autoencoder"]
        way = self._coming(self.learn.only(at))
        latent = self._encoded(at, way)
        return [float((self.net.read(latent.flatten(1)) - way).abs().mean())]

    def _encoded(self, at: Tensor, way: Tensor) -> Tensor:
        """Latents of what is to come, as the encoder gives them, (n, 4, p, f)."""
        a, found = self.net.architecture, []
        for i in range(0, len(at), self.piece):
            image = self.net.images(self._sequence(at[i : i + self.piece]), way[i : i + self.piece])
            with torch.no_grad():
                found.append(self.net.vae.encode(image).latent_dist.mean[..., -a.ahead :])
        return torch.cat(found)

    # The U-Net.

    def _prepare_latents(self) -> None:
        """Latents of what was and what came, of the origins that the U-Net learns from."""
        if self.given and len(self.drawn):
            return  # they are the same in two phases
        net = self.net.eval()
        drawn = thinned(self.older, LEARNT)
        self.ways = self._coming(self.learn.only(drawn))
        raw = self._encoded(drawn, self.ways)
        net.measure(raw)
        self.latents = (raw - net.centre) / net.spread
        with torch.no_grad():
            parts = torch.split(drawn, self.piece)
            self.known = torch.cat([net.known(self._sequence(some)) for some in parts])
            if net.said is not None:
                self.states = torch.cat([net.states(self._sequence(some)) for some in parts])
        self.drawn = drawn  # the last: memory may end before

    def _velocity_loss(self, share: Share) -> Tensor:
        """One call of the U-Net, see `estimate`."""
        g, B, net = share.generator, BATCHES["diffusion"], self.net
        i = share.rows(torch.randint(len(self.drawn), (B,), generator=g))
        t = share.rows(torch.randint(samplers.TIMESTEPS, (B,), generator=g))
        x0 = self.latents[i]
        eps = share.rows(torch.randn(B, *x0.shape[1:], generator=g))
        at = self.drawn[i]
        states = None if net.said is None else self.states[i]
        tokens = net.tokens(self.learn.features[at], self._sequence(at), states)
        found = estimate(net, self.noise, t, x0, eps, self.ways[i], self.known[i], tokens)
        return (found.velocity + found.direct).mean()

    def _velocity_crps(self) -> list[float]:
        """CRPS of what is sampled alone, on the newest block."""
        at = self.apart["diffusion"]
        return [self._crps(self.learn.only(at), self._sampled(at, LOOK_SAMPLES))]

    def _sampled(self, at: Tensor, samples: int) -> Tensor:
        """Quantiles (n, H, Q) of what is sampled from some origins."""
        net, sampling, found = self.net, Sampling(self.net, SAMPLER, STEPS, samples), []
        for some in torch.split(at, max(1, self.piece // samples)):
            sequence = self._sequence(some)
            with torch.no_grad():
                ways = sampling.ways(net.known(sequence), net.tokens(self.learn.features[some], sequence))
            found.append(quantiles_of(ways[..., self.places].transpose(1, 2), self.normal))
        return torch.cat(found)

    # The gate.

    def _prepare_gate(self) -> None:
        """What is sampled, and what the map says, on the newest block."""
        net = self.net.eval()
        at = self.judged
        with torch.no_grad():
            self.sampled, self.mapped = self._sampled(at, SAMPLES), self._mapped(at)
            self.told = net.told(self.learn.features[at], self._sequence(at))

    def _gate_loss(self, share: Share) -> Tensor:
        g, B = share.generator, BATCHES["gate"]
        i = self.first[share.rows(torch.randint(len(self.first), (B,), generator=g))]
        kept = share.rows(torch.rand(B, self.told.shape[1], generator=g)) >= DROP
        z = self._fused(i, self.told[i] * kept / (1 - DROP))
        miss = self.learn.z[self.judged[i]][..., None] - z
        return pinball(miss, self.levels).mean().float()

    def _gate_crps(self) -> list[float]:
        i = self.second
        return [self._crps(self.learn.only(self.judged[i]), self._fused(i, self.told[i]))]

    def _fused(self, i: Tensor, told: Tensor) -> Tensor:
        return fused(self.net, told, self.sampled[i], self.mapped[i])

    def _crps(self, part: Origins, z: Tensor) -> float:
        """CRPS over the mean absolute outcome, averaged over the horizons, of quantiles z (n, H, Q)."""
        levels = self.levels
        miss = part.z[..., None] - z
        loss = 2 * pinball(miss, levels).mean(-1) * part.scale
        return float((loss.mean(0) / (part.z.abs() * part.scale).mean(0)).mean())


def deviations(scale: Array, horizons: Sequence[int], steps: Sequence[int]) -> Array:
    """Deviations (n, G) of returns to steps, of scales (n, H) of horizons: squares grow evenly between."""
    known = np.concatenate([np.zeros((len(scale), 1)), scale**2], 1)
    h = np.array([0, *horizons], float)
    at = np.clip(np.searchsorted(h, steps), 1, len(h) - 1)
    share = (np.array(steps) - h[at - 1]) / (h[at] - h[at - 1])
    found: Array = np.sqrt(known[:, at - 1] * (1 - share) + known[:, at] * share)
    return found
