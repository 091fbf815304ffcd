"""Training: bars -> scaling -> quantile map -> denoiser. A function of (bars, configuration, seed).

Phase A fits encoder and map by the pinball loss of the knots. Phase B keeps both, turns outcomes into
whitened normal scores and trains the denoiser on them. Both keep the state that validation likes best, the
first one included. Randomness comes from one generator; the number of steps is fixed before the first.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from math import inf
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from barcast.models import samplers
from barcast.models.diffusion import SAMPLER, STEPS, Distribution, fingerprint, use_one_thread
from barcast.models.errors import ConfigError
from barcast.models.optimiser import Budget, Phase, Progress, Share, StateFile, fit, processes
from barcast.models.origins import Origins, Split, Table, split
from barcast.models.scaling import CHANNELS, INTRADAY, SIGNED_CHANNELS, Scaling, signed_features
from barcast.models.sssd import PROBABILITIES, SSSD, Architecture, Dropout, knot_scores, piecewise
from barcast.models.trained import Record, Trained, check_outputs
from barcast.models.window import Window

SAMPLES = 256
MAP_RATE, DENOISER_RATE = 1e-3, 5e-4  # of learning
BATCH, DRAWS = 256, 8  # origins of a batch, and noise levels for each
LOOK_ORIGINS = 1500  # of validation, thinned evenly
LOOK_SAMPLES = 64  # of the noise, when the denoiser is validated
LOG_SNR = (-5.0, 6.0)  # where the denoiser learns
SCORE_LIMIT = 5.0  # scores beyond are the fault of linear tails
INPUT_DROP, HIDDEN_DROP = 0.3, 0.4
BLOCK = 4096  # origins that are encoded at once


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
    precision: str = "fp32",
    accumulate: int = 1,
    state: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train a model on whole histories, one window for each symbol.

    `until` (nanoseconds) is the last close that may be used, the newest if None. `steps` is the number of
    optimiser steps in each phase; by default it follows from the number of origins. `seconds` on the
    monotonic `clock` caps the training, half for each phase, and the record says if it did. `init_from`, a
    model's id and the model, gives the starting weights. `precision` is fp32 or bf16, of the losses only;
    `accumulate` is the number of parts in which a process computes a batch.

    `state` is a file that is written at the end of each epoch. Where it is already there, of the same bars
    and options, the training goes on from it, to the bits of one that was not interrupted; whoever keeps the
    result removes it. Tables of all origins lie on the same disk; without a file they lie in memory.

    Raises `DataError` for bars that cannot be learnt from, `ConfigError` for options that cannot be used and
    for a cap that leaves no time for a step.
    """
    if seconds is not None and clock is None:
        raise ValueError("a cap on seconds needs a clock")
    check_outputs(horizons, levels)
    accelerator = processes(precision, accumulate, BATCH)
    use_one_thread()
    data = split(histories, timeframe, tuple(horizons), until, None if state is None else state.parent)
    training = _Training(data, tuple(levels), seed, steps, state)
    cap = inf if seconds is None else seconds / 2
    trained = training.run(accelerator, cap, None if seconds is None else clock, init_from, progress)
    accelerator.end_training()
    return trained


class _Training:
    """One training. The state is the network, the generator, and what the second phase learns from."""

    def __init__(
        self, data: Split, levels: tuple[float, ...], seed: int, steps: int | None, state: Path | None
    ) -> None:
        self.data, self.seed, self.state = data, seed, state
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self.learn, self.look = data.learn, data.validation.thin(LOOK_ORIGINS)
        self.steps = steps or min(max(len(self.learn) // 60, 200), 1500)
        self.mirror = data.scaling.layout is INTRADAY
        self.signed = torch.from_numpy(signed_features(data.scaling.timeframe, data.scaling.horizons))
        self.generator = Generator().manual_seed(seed)
        architecture = Architecture(
            features=self.learn.features.shape[1],
            channels=CHANNELS,
            context=data.scaling.layout.context,
            horizons=len(data.scaling.horizons),
            samples=SAMPLES,
        )
        self.net = SSSD(architecture, self.generator)

    def run(
        self,
        accelerator: Accelerator,
        seconds: float,
        clock: Callable[[], float] | None,
        init_from: tuple[str, Trained] | None,
        progress: Callable[[Progress], None],
    ) -> Trained:
        net, data = self.net, self.data
        if init_from is not None:
            _start_from(net, data.scaling, init_from[1])
        options = {
            "seed": self.seed,
            "init_from": None if init_from is None else init_from[0],
            "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "accumulate": accelerator.gradient_accumulation_steps,
            "fingerprint": fingerprint(SAMPLES),
        }
        file = None if self.state is None else StateFile(self.state, self._key(options, seconds))
        phases = [
            Phase(
                name="map",
                modules=[net.encoder, net.map],
                rate=MAP_RATE,
                loss=self._map_loss,
                look=self._map_crps,
                prepare=self._prepare_map,
            ),
            Phase(
                name="denoiser",
                modules=[net.denoiser],
                rate=DENOISER_RATE,
                loss=self._denoiser_loss,
                look=self._denoiser_crps,
                prepare=self._prepare_denoiser,
            ),
        ]
        budget = Budget(self.steps, seconds, clock)
        fitted = fit(net, phases, budget, self.generator, accelerator, file, progress)
        record = Record(
            data=data.digest,
            symbols=tuple(w.symbol for w in data.histories),
            left_out=data.left_out,
            bars=sum(len(w) for w in data.histories),
            origins=len(self.learn),
            until=data.until,
            train_end=data.train_end,
            validation_end=data.validation_end,
            map_steps=self.steps,
            denoiser_steps=self.steps,
            capped=fitted.capped,
            candidates=fitted.candidates,
            map_step=fitted.chosen["map"],
            denoiser_step=fitted.chosen["denoiser"],
            stopped=fitted.stopped,
            **options,
        )
        return Trained(net.eval(), data.scaling, tuple(self.levels.tolist()), record)

    def _key(self, options: dict[str, object], seconds: float) -> str:
        """All that the bits of the result depend on, as a hash."""
        data = self.data
        scope = (data.digest, data.until, data.scaling.timeframe, data.scaling.horizons, self.levels.tolist())
        program = (asdict(self.net.architecture), self.steps, seconds)
        return sha256(json.dumps([scope, program, options], sort_keys=True).encode()).hexdigest()

    def _prepare_map(self) -> None:
        self.net.map.static.copy_(_static_knots(self.learn.z, self.mirror))

    def _prepare_denoiser(self) -> None:
        """Contexts of all origins, and their scores, whitened."""
        net = self.net.eval()
        with torch.no_grad():
            self.context, scores = self._encoded_scores(self.learn)
            H = scores.shape[1]
            W = torch.linalg.cholesky(torch.corrcoef(scores.T).reshape(H, H))
            net.whiten.copy_(W)
            self.w = torch.linalg.solve_triangular(W, scores.T, upper=False).T.float().contiguous()
            self.look_context, self.look_knots = self._encoded(self.look)
        a = samplers.alphas_cumprod()
        self.alpha, self.sigma, self.lam = a**0.5, (1 - a) ** 0.5, samplers.lambdas().float()

    def _map_loss(self, share: Share) -> Tensor:
        """Pinball loss of the knots on a random batch; intraday bars are mirrored half the time."""
        part, g = self.learn, share.generator
        at = share.rows(torch.randint(len(part), (BATCH,), generator=g))
        x, s, z = part.features[at], part.sequence(at, self.data.scaling.layout.context), part.z[at].float()
        if self.mirror:
            sign = share.rows(1 - 2 * torch.randint(2, (BATCH, 1), generator=g).float())
            x = torch.where(self.signed, sign * x, x)
            s = torch.where(torch.tensor(SIGNED_CHANNELS), sign[..., None] * s, s)
            z = sign * z
        knots = self.net.map(self.net.encoder(x, s, _dropout(share)))  # (B, H, K)
        miss = z[..., None] - knots
        p = torch.tensor(PROBABILITIES)
        return torch.maximum(p * miss, (p - 1) * miss).mean()

    def _map_crps(self) -> float:
        """CRPS of the map alone, with exact normal scores."""
        _, knots = self._encoded(self.look)
        u = torch.special.ndtri(self.levels).expand(*knots.shape[:2], -1).contiguous()
        return self._crps(self.look, piecewise(u, knot_scores().expand(knots.shape), knots))

    def _denoiser_loss(self, share: Share) -> Tensor:
        """v-prediction loss at stratified noise levels, weighted so that the error of eps counts evenly."""
        g, n = share.generator, BATCH * DRAWS
        at = share.rows(torch.randint(len(self.w), (BATCH,), generator=g))
        w = self.w[at][:, None]  # (B, 1, H)
        low, high = LOG_SNR
        position = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
        wanted = share.rows(low + (high - low) * position.reshape(BATCH, DRAWS)) / 2
        t = torch.searchsorted(-self.lam, -wanted).clamp(max=samplers.TIMESTEPS - 1)
        half = share.rows(torch.randn(BATCH, DRAWS // 2, w.shape[-1], generator=g))
        eps = torch.cat([half, -half], 1)  # antithetic
        alpha, sigma, lam = self.alpha[t][..., None], self.sigma[t][..., None], self.lam[t]
        c = self.context[at][:, None].expand(-1, DRAWS, -1)
        denoiser = self.net.denoiser
        v: Tensor = denoiser(alpha * w + sigma * eps, denoiser.modulation(c, lam, _dropout(share)))
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
        c = torch.cat([self._contexts(part, b) for b in _blocks(len(part), BLOCK)])
        return c, self.net.map(c).double()

    def _encoded_scores(self, part: Origins) -> tuple[Tensor, Tensor]:
        """Contexts (n, code) of all origins of a part, and the normal scores (n, H) of their outcomes."""
        folder = None if self.state is None else self.state.parent
        contexts, scores = Table(self.net.architecture.code, np.float32, folder), []
        for b in _blocks(len(part), BLOCK):
            c = self._contexts(part, b)
            knots = self.net.map(c).double()
            u = piecewise(part.z[b][..., None], knots, knot_scores().expand(knots.shape))[..., 0]
            scores.append(u.clamp(-SCORE_LIMIT, SCORE_LIMIT))
            contexts.add(c.numpy())
        return contexts.tensor(), torch.cat(scores)

    def _contexts(self, part: Origins, block: slice) -> Tensor:
        at = torch.arange(block.start, block.stop)
        c: Tensor = self.net.encoder(part.features[at], part.sequence(at, self.data.scaling.layout.context))
        return c


class _Dropout(Dropout):
    """Dropout in the rows of a share."""

    share: Share

    def __call__(self, x: Tensor, p: float) -> Tensor:
        whole = torch.rand((self.share.of * len(x), *x.shape[1:]), generator=self.generator)
        return x * (self.share.rows(whole) >= p) / (1 - p)


def _dropout(share: Share) -> Dropout:
    drop = _Dropout(INPUT_DROP, HIDDEN_DROP, share.generator)
    drop.share = share
    return drop


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
    with torch.no_grad():
        for p, value in zip(net.parameters(), trained.net.parameters(), strict=True):
            p.copy_(value)
