"""Training: bars -> scaling -> quantile map -> denoiser. A function of (bars, configuration, seed).

Phase A fits encoder and map by the pinball loss of the knots. Phase B keeps both, turns outcomes into
whitened normal scores and trains the denoiser on them. Both keep the state that validation likes best, the
first one included. Randomness comes from one generator; the number of steps is fixed before the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import cos, pi
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from barcast.models import samplers
from barcast.models.diffusion import (
    SAMPLER,
    STEPS,
    Candidate,
    Distribution,
    Record,
    Trained,
    fingerprint,
    use_one_thread,
)
from barcast.models.errors import ConfigError, DataError
from barcast.models.scaling import (
    CHANNELS,
    INTRADAY,
    SIGNED_CHANNELS,
    Scaling,
    bars_to_learn,
    fit,
    signed_features,
)
from barcast.models.sssd import PROBABILITIES, SSSD, Architecture, Dropout, knot_scores, piecewise
from barcast.models.window import Window

SAMPLES = 256
TRAIN, VALIDATION = 0.75, 0.15  # of the bars, by calendar; the rest is held out for the promotion gate
MAP_RATE, DENOISER_RATE = 1e-3, 5e-4  # of learning
BATCH, DRAWS = 256, 8  # origins of a batch, and noise levels for each
LEAST = 100  # origins to learn from, and to validate on
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


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Origins of one calendar part: n origins, H horizons, T rows of channels of all symbols."""

    features: Tensor  # (n, F)
    channels: Tensor  # (T, C)
    row: Tensor  # (n,): the channel row of the origin's bar
    z: Tensor  # (n, H) outcome over scale, float64
    scale: Tensor  # (n, H)

    def __len__(self) -> int:
        return len(self.row)

    def thin(self, n: int) -> "_Part":
        keep = torch.arange(0, len(self), max(1, -(-len(self) // n)))
        return _Part(self.features[keep], self.channels, self.row[keep], self.z[keep], self.scale[keep])

    def sequence(self, at: Tensor, context: int) -> Tensor:
        """(b,) origins -> (b, L, C)."""
        return self.channels[self.row[at][:, None] + torch.arange(1 - context, 1)]


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
    if not horizons or list(horizons) != sorted({h for h in horizons if h > 0}):
        raise ConfigError(f"horizons {tuple(horizons)} cannot be used: give rising counts of bars")
    if not levels or list(levels) != sorted({p for p in levels if 0 < p < 1}):
        raise ConfigError(f"levels {tuple(levels)} cannot be used: give rising probabilities between 0 and 1")
    cap = float("inf") if seconds is None else seconds
    use_one_thread()
    return _Training(
        histories, timeframe, tuple(horizons), tuple(levels), until, seed, steps, cap, clock, progress
    ).run(init_from)


class _Training:
    """One training. The state is the network, the generator and the candidates."""

    def __init__(
        self,
        histories: Sequence[Window],
        timeframe: str,
        horizons: tuple[int, ...],
        levels: tuple[float, ...],
        until: int | None,
        seed: int,
        steps: int | None,
        seconds: float,
        clock: Callable[[], float] | None,
        progress: Callable[[Progress], None],
    ) -> None:
        if not histories or not all(len(w) for w in histories):
            raise DataError("there are no bars to learn from: check symbols and dates of the history")
        until = max(w.close_time for w in histories) if until is None else until
        histories = [_cut(w, until) for w in histories]
        times = np.sort(np.concatenate([w.close_times for w in histories]))
        if not len(times):
            raise DataError(f"there are no bars closed by {until} to learn from: choose a later date")
        self.until = until
        self.train_end = int(times[int(TRAIN * (len(times) - 1))])
        self.validation_end = int(times[int((TRAIN + VALIDATION) * (len(times) - 1))])
        need = bars_to_learn(timeframe, horizons)
        self.histories = [w for w in histories if len(_cut(w, self.train_end)) >= need]
        self.left_out = tuple(w.symbol for w in histories if len(_cut(w, self.train_end)) < need)
        if not self.histories:
            longest = max(len(_cut(w, self.train_end)) for w in histories)
            raise DataError(f"the longest history has {longest} bars to learn from: give at least {need}")
        self.scaling = fit([_cut(w, self.train_end) for w in self.histories], timeframe, horizons)
        self.levels, self.seed = levels, seed
        self.seconds, self.clock, self.progress = seconds, clock, progress

        self.learn, validation = self._parts()
        self.look = validation.thin(LOOK_ORIGINS)
        self.steps = steps or min(max(len(self.learn) // 60, 200), 1500)
        self.mirror = self.scaling.layout is INTRADAY
        self.generator = Generator().manual_seed(seed)
        self.candidates: list[Candidate] = []
        self.capped = False
        architecture = Architecture(
            features=self.learn.features.shape[1],
            channels=CHANNELS,
            context=self.scaling.layout.context,
            horizons=len(horizons),
            samples=SAMPLES,
        )
        self.net = SSSD(architecture, self.generator)

    def run(self, init_from: tuple[str, Trained] | None) -> Trained:
        net = self.net
        if init_from is not None:
            _start_from(net, self.scaling, init_from[1])
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
            data=_digest(self.histories),
            symbols=tuple(w.symbol for w in self.histories),
            left_out=self.left_out,
            bars=sum(len(w) for w in self.histories),
            origins=len(self.learn),
            until=self.until,
            train_end=self.train_end,
            validation_end=self.validation_end,
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
        return Trained(net.eval(), self.scaling, self.levels, record)

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
        best, best_step, chosen = float("inf"), 0, averaged
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
        x, s, z = part.features[at], part.sequence(at, self.scaling.layout.context), part.z[at].float()
        if self.mirror:
            sign = 1 - 2 * torch.randint(2, (BATCH, 1), generator=g).float()
            odd = torch.from_numpy(signed_features(self.scaling.timeframe, self.scaling.horizons))
            x = torch.where(odd, sign * x, x)
            s = torch.where(torch.tensor(SIGNED_CHANNELS), sign[..., None] * s, s)
            z = sign * z
        knots = self.net.map(self.net.encoder(x, s, Dropout(INPUT_DROP, HIDDEN_DROP, g)))  # (B, H, K)
        miss = z[..., None] - knots
        p = torch.tensor(PROBABILITIES)
        return torch.maximum(p * miss, (p - 1) * miss).mean()

    def _map_crps(self) -> float:
        """CRPS of the map alone, with exact normal scores."""
        _, knots = self._encoded(self.look)
        levels = torch.tensor(self.levels, dtype=torch.float64)
        u = torch.special.ndtri(levels).expand(*knots.shape[:2], -1).contiguous()
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
        levels = torch.tensor(self.levels, dtype=torch.float64)
        batches = _blocks(len(self.look_context), BATCH)
        parts = [distribution.quantiles(distribution.sample(self.look_context[b]), levels) for b in batches]
        knots = self.look_knots
        z = piecewise(torch.cat(parts).contiguous(), knot_scores().expand(knots.shape), knots)
        return self._crps(self.look, z)

    def _crps(self, part: _Part, z: Tensor) -> float:
        """CRPS over the mean absolute outcome, averaged over the horizons, of quantiles z (n, H, Q)."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        miss = part.z[..., None] - z
        loss = 2 * torch.maximum(levels * miss, (levels - 1) * miss).mean(-1) * part.scale  # (n, H)
        return float((loss.mean(0) / (part.z.abs() * part.scale).mean(0)).mean())

    def _encoded(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Contexts (n, code) and knots (n, H, K) float64 of every origin of a part."""
        c = self._contexts(part)
        return c, self.net.map(c).double()

    def _contexts(self, part: _Part) -> Tensor:
        L = self.scaling.layout.context
        batches = [torch.arange(b.start, b.stop) for b in _blocks(len(part), 4096)]
        return torch.cat([self.net.encoder(part.features[i], part.sequence(i, L)) for i in batches])

    def _scores(self, part: _Part) -> Tensor:
        """Normal scores of the outcomes under the map, (n, H) float64."""
        knots = self.net.map(self.context).double()
        u = piecewise(part.z[..., None], knots, knot_scores().expand(knots.shape))[..., 0]
        return u.clamp(-SCORE_LIMIT, SCORE_LIMIT)

    def _parts(self) -> tuple[_Part, _Part]:
        """The training and the validation part; outcomes are realised before their part ends."""
        H = max(self.scaling.horizons)
        first = self.scaling.layout.har[-1] + 1
        rows = 0
        channels: list[NDArray[np.float64]] = []
        found: tuple[_Pieces, _Pieces] = ([], [])
        for w in self.histories:
            frame = self.scaling.frame(w.close_times, w.values, first)
            price = np.log(w.values[:, 3])
            k = np.arange(first, len(w) - H)
            z = np.stack([price[k + h] - price[k] for h in self.scaling.horizons], 1)
            opened, closed = w.close_times[k], w.close_times[k + H]
            learn = closed <= self.train_end
            look = (opened > self.train_end) & (closed <= self.validation_end)
            for pieces, chosen in zip(found, (learn, look), strict=True):
                i = k[chosen] - first
                scale = frame.scale[i]
                pieces.append((frame.features[i], rows + k[chosen] - 1, z[chosen] / scale, scale))
            channels.append(frame.channels)
            rows += len(frame.channels)
        table = torch.from_numpy(np.concatenate(channels)).float()
        learn_part, look_part = (_part(table, pieces) for pieces in found)
        for part, what in ((learn_part, "learn from"), (look_part, "validate on")):
            if len(part) < LEAST:
                raise DataError(f"only {len(part)} forecast origins to {what}, not {LEAST}: give more bars")
        return learn_part, look_part


_Pieces = list[tuple[NDArray[Any], ...]]  # of each symbol: features, row, z and scale


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _part(channels: Tensor, pieces: _Pieces) -> _Part:
    features, row, z, scale = (
        torch.from_numpy(np.concatenate(column)) for column in zip(*pieces, strict=True)
    )
    return _Part(features.float(), channels, row, z, scale)


def _cut(w: Window, until: int) -> Window:
    n = int(np.searchsorted(w.close_times, until, "right"))
    return Window(w.symbol, w.close_times[:n], w.values[:n])


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


def _digest(histories: Sequence[Window]) -> str:
    h = sha256()
    for w in histories:
        h.update(f"{w.symbol} {len(w)}\n".encode())
        h.update(np.ascontiguousarray(w.close_times).tobytes())
        h.update(np.ascontiguousarray(w.values).tobytes())
    return h.hexdigest()
