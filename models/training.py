"""Training: bars -> scaling -> quantile map -> denoiser. A function of (bars, configuration, seed).

Phase A fits encoder and map by the pinball loss of the knots. Phase B keeps both, turns outcomes into
whitened normal scores and trains the denoiser on them. Both keep the state that validation likes best, the
first one included. Randomness comes from one generator; the number of steps is fixed before the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch
from torch import Generator, Tensor, nn

from barcast.models import samplers
from barcast.models.diffusion import SAMPLER, STEPS, Distribution, fingerprint, use_one_thread
from barcast.models.errors import ConfigError
from barcast.models.origins import Origins, Split, split
from barcast.models.scaling import CHANNELS, INTRADAY, SIGNED_CHANNELS, Scaling, signed_features
from barcast.models.sssd import PROBABILITIES, SSSD, Architecture, Dropout, knot_scores, piecewise
from barcast.models.trained import Candidate, Record, Trained, check_outputs
from barcast.models.window import Window

SAMPLES = 256
MAP_RATE, DENOISER_RATE = 1e-3, 5e-4  # of learning
BATCH, DRAWS = 256, 8  # origins of a batch, and noise levels for each
VALIDATIONS = 12  # looks at the validation part in each phase
LOOK_ORIGINS = 1500  # of validation, thinned evenly
LOOK_SAMPLES = 64  # of the noise, when the denoiser is validated
LOG_SNR = (-5.0, 6.0)  # where the denoiser learns
SCORE_LIMIT = 5.0  # scores beyond are the fault of linear tails
INPUT_DROP, HIDDEN_DROP = 0.3, 0.4


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the training stands.

    `loss` is the fast loss of the last step, NaN before the first; `crps` is the score of forecasts sampled
    in full on the validation part, None where there was no look at it.
    """

    phase: str  # "map" or "denoiser"
    step: int
    steps: int
    loss: float
    crps: float | None


def train(
    histories: Sequence[Window],
    *,
    timeframe: str,
    horizons: Sequence[int],
    levels: Sequence[float],
    until: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] | None = None,
    init_from: tuple[str, Trained] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train a model on whole histories, one window for each symbol.

    `until` (nanoseconds) is the last close that may be used, the newest if None. `steps` is the number of
    optimiser steps in each phase; by default it follows from the number of origins. `seconds` on the
    monotonic `clock` caps the training, half for each phase, and the record says if it did. `init_from`, a
    model's id and the model, gives the starting weights. Raises `DataError` for bars that cannot be learnt
    from, `ConfigError` for horizons, levels or a first model that cannot be used.
    """
    if seconds is not None and clock is None:
        raise ValueError("a cap on seconds needs a clock")
    check_outputs(horizons, levels)
    cap = float("inf") if seconds is None else seconds
    use_one_thread()
    data = split(histories, timeframe, tuple(horizons), until)
    return _Training(data, tuple(levels), seed, steps, cap, clock, progress).run(init_from)


class _Training:
    """One training. The state is the network, the generator and the candidates."""

    def __init__(
        self,
        data: Split,
        levels: tuple[float, ...],
        seed: int,
        steps: int | None,
        seconds: float,
        clock: Callable[[], float] | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self.data, self.seed = data, seed
        self.seconds, self.clock, self.progress = seconds, clock, progress
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self.learn, self.look = data.learn, data.validation.thin(LOOK_ORIGINS)
        self.steps = steps or min(max(len(self.learn) // 60, 200), 1500)
        self.mirror = data.scaling.layout is INTRADAY
        self.signed = torch.from_numpy(signed_features(data.scaling.timeframe, data.scaling.horizons))
        self.generator = Generator().manual_seed(seed)
        self.candidates: list[Candidate] = []
        self.capped = False
        architecture = Architecture(
            features=self.learn.features.shape[1],
            channels=CHANNELS,
            context=data.scaling.layout.context,
            horizons=len(data.scaling.horizons),
            samples=SAMPLES,
        )
        self.net = SSSD(architecture, self.generator)

    def run(self, init_from: tuple[str, Trained] | None) -> Trained:
        net, data = self.net, self.data
        if init_from is not None:
            _start_from(net, data.scaling, init_from[1])
        net.map.static.copy_(_static_knots(self.learn.z, self.mirror))
        map_step = self._phase("map", [net.encoder, net.map], MAP_RATE, self._map_loss, self._map_crps)

        net.eval()
        with torch.no_grad():
            self.context = self._contexts(self.learn)
            scores = self._scores(self.learn)
            H = scores.shape[1]
            W = torch.linalg.cholesky(torch.corrcoef(scores.T).reshape(H, H))
            net.whiten.copy_(W)
            self.w = torch.linalg.solve_triangular(W, scores.T, upper=False).T.float().contiguous()
            self.look_context, self.look_knots = self._encoded(self.look)
        a = samplers.alphas_cumprod()
        self.alpha, self.sigma, self.lam = a**0.5, (1 - a) ** 0.5, samplers.lambdas().float()
        denoiser_step = self._phase(
            "denoiser", [net.denoiser], DENOISER_RATE, self._denoiser_loss, self._denoiser_crps
        )

        record = Record(
            data=data.digest,
            symbols=tuple(w.symbol for w in data.histories),
            left_out=data.left_out,
            bars=sum(len(w) for w in data.histories),
            origins=len(self.learn),
            until=data.until,
            train_end=data.train_end,
            validation_end=data.validation_end,
            seed=self.seed,
            map_steps=self.steps,
            denoiser_steps=self.steps,
            capped=self.capped,
            init_from=None if init_from is None else init_from[0],
            candidates=tuple(self.candidates),
            map_step=map_step,
            denoiser_step=denoiser_step,
            fingerprint=fingerprint(SAMPLES),
        )
        return Trained(net.eval(), data.scaling, tuple(self.levels.tolist()), record)

    def _phase(
        self,
        name: str,
        modules: list[nn.Module],
        lr: float,
        loss_of: Callable[[], Tensor],
        crps_of: Callable[[], float],
    ) -> int:
        """AdamW with warm-up and cosine; returns the step whose averaged weights validation liked best."""
        parameters = [p for m in modules for p in m.parameters()]
        averaged = [p.detach().clone() for p in parameters]
        optimiser = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
        every = max(1, self.steps // VALIDATIONS)
        warm = max(1, self.steps // 20)
        start = 0.0 if self.clock is None else self.clock()
        best, best_step, chosen = float("inf"), 0, [p.clone() for p in averaged]
        last = float("nan")
        for step in range(self.steps + 1):
            late = self.clock is not None and self.clock() - start > self.seconds / 2
            self.capped |= late
            crps = None
            if step % every == 0 or step == self.steps or late:
                crps = self._judge(parameters, averaged, modules, crps_of)
                self.candidates.append(Candidate(name, step, crps))
                if crps < best:
                    best, best_step, chosen = crps, step, [p.clone() for p in averaged]
            self.progress(Progress(name, step, self.steps, last, crps))
            if step == self.steps or late:
                break
            rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + cos(pi * step / self.steps))
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            loss = loss_of()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            decay = min(0.998, (step + 1) / (step + 10))
            with torch.no_grad():
                for average, p in zip(averaged, parameters, strict=True):
                    average.lerp_(p, 1 - decay)
            last = float(loss.detach())
        _assign(parameters, chosen)
        return best_step

    def _judge(
        self,
        parameters: list[nn.Parameter],
        averaged: list[Tensor],
        modules: list[nn.Module],
        crps_of: Callable[[], float],
    ) -> float:
        """The validation score of the averaged weights."""
        own = [p.detach().clone() for p in parameters]
        _assign(parameters, averaged)
        for m in modules:
            m.eval()
        with torch.no_grad():
            crps = crps_of()
        _assign(parameters, own)
        for m in modules:
            m.train()
        return crps

    def _map_loss(self) -> Tensor:
        """Pinball loss of the knots on a random batch; intraday bars are mirrored half the time."""
        part, g = self.learn, self.generator
        at = torch.randint(len(part), (BATCH,), generator=g)
        x, s, z = part.features[at], part.sequence(at, self.data.scaling.layout.context), part.z[at].float()
        if self.mirror:
            sign = 1 - 2 * torch.randint(2, (BATCH, 1), generator=g).float()
            x = torch.where(self.signed, sign * x, x)
            s = torch.where(torch.tensor(SIGNED_CHANNELS), sign[..., None] * s, s)
            z = sign * z
        knots = self.net.map(self.net.encoder(x, s, Dropout(INPUT_DROP, HIDDEN_DROP, g)))  # (B, H, K)
        miss = z[..., None] - knots
        p = torch.tensor(PROBABILITIES)
        return torch.maximum(p * miss, (p - 1) * miss).mean()

    def _map_crps(self) -> float:
        """CRPS of the map alone, with exact normal scores."""
        _, knots = self._encoded(self.look)
        u = torch.special.ndtri(self.levels).expand(*knots.shape[:2], -1).contiguous()
        return self._crps(self.look, piecewise(u, knot_scores().expand(knots.shape), knots))

    def _denoiser_loss(self) -> Tensor:
        """v-prediction loss at stratified noise levels, weighted so that the error of eps counts evenly."""
        g, n = self.generator, BATCH * DRAWS
        at = torch.randint(len(self.w), (BATCH,), generator=g)
        w = self.w[at][:, None]  # (B, 1, H)
        low, high = LOG_SNR
        position = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
        wanted = (low + (high - low) * position.reshape(BATCH, DRAWS)) / 2
        t = torch.searchsorted(-self.lam, -wanted).clamp(max=samplers.TIMESTEPS - 1)
        half = torch.randn(BATCH, DRAWS // 2, w.shape[-1], generator=g)
        eps = torch.cat([half, -half], 1)  # antithetic
        alpha, sigma, lam = self.alpha[t][..., None], self.sigma[t][..., None], self.lam[t]
        drop = Dropout(INPUT_DROP, HIDDEN_DROP, g)
        c = self.context[at][:, None].expand(-1, DRAWS, -1)
        denoiser = self.net.denoiser
        v: Tensor = denoiser(alpha * w + sigma * eps, denoiser.modulation(c, lam, drop))
        error = ((v - (alpha * eps - sigma * w)) ** 2).mean(-1)
        loss: Tensor = (torch.sigmoid(2 * lam) * error).mean()
        return loss

    def _denoiser_crps(self) -> float:
        """CRPS of forecasts sampled in full, on the first rows of the fixed noise."""
        distribution = Distribution(self.net, SAMPLER, STEPS, LOOK_SAMPLES)
        batches = _blocks(len(self.look_context), BATCH)
        parts = [
            distribution.quantiles(distribution.sample(self.look_context[b]), self.levels) for b in batches
        ]
        knots = self.look_knots
        z = piecewise(torch.cat(parts).contiguous(), knot_scores().expand(knots.shape), knots)
        return self._crps(self.look, z)

    def _crps(self, part: Origins, z: Tensor) -> float:
        """CRPS over the mean absolute outcome, averaged over the horizons, of quantiles z (n, H, Q)."""
        levels = self.levels
        miss = part.z[..., None] - z
        loss = 2 * torch.maximum(levels * miss, (levels - 1) * miss).mean(-1) * part.scale  # (n, H)
        return float((loss.mean(0) / (part.z.abs() * part.scale).mean(0)).mean())

    def _encoded(self, part: Origins) -> tuple[Tensor, Tensor]:
        """Contexts (n, code) and knots (n, H, K) float64 of every origin of a part."""
        c = self._contexts(part)
        return c, self.net.map(c).double()

    def _contexts(self, part: Origins) -> Tensor:
        L = self.data.scaling.layout.context
        batches = [torch.arange(b.start, b.stop) for b in _blocks(len(part), 4096)]
        return torch.cat([self.net.encoder(part.features[i], part.sequence(i, L)) for i in batches])

    def _scores(self, part: Origins) -> Tensor:
        """Normal scores of the outcomes under the map, (n, H) float64."""
        knots = self.net.map(self.context).double()
        u = piecewise(part.z[..., None], knots, knot_scores().expand(knots.shape))[..., 0]
        return u.clamp(-SCORE_LIMIT, SCORE_LIMIT)


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _static_knots(z: Tensor, mirror: bool) -> Tensor:
    """Quantiles of all outcomes at the map's knots, (H, K); symmetric if up and down are exchangeable."""
    q = torch.from_numpy(np.quantile(z.numpy(), PROBABILITIES, axis=0).T.copy())
    if mirror:
        q = (q - q.flip(-1)) / 2
    steps = torch.diff(q, dim=-1).clamp(min=1e-4)
    return torch.cat([q[:, :1], q[:, :1] + torch.cumsum(steps, -1)], -1).float()


def _start_from(net: SSSD, scaling: Scaling, trained: Trained) -> None:
    old = trained.scaling
    for field in ("timeframe", "horizons"):
        mine, theirs = getattr(scaling, field), getattr(old, field)
        if mine != theirs:
            raise ConfigError(f"{field} {mine} cannot start from a model of {theirs}: train from scratch")
    if net.architecture != trained.net.architecture:
        raise ConfigError(
            f"{net.architecture} cannot start from {trained.net.architecture}: train from scratch"
        )
    _assign(list(net.parameters()), list(trained.net.parameters()))


def _assign(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
