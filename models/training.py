"""Training: bars -> scaling -> quantile map -> denoiser. A function of (bars, configuration, seed).

Phase A fits the members of the map by the pinball loss of their knots. Each leaves out one of the blocks of
the bars, by calendar, and is stopped where it forecasts that block best: every bar is learnt from, and every
choice between weights is made on bars that these were not fitted to. The scaling is fitted once, to all
blocks: scores on a block are not quite out of sample, those on held-out bars are. Half of the members see up
and down as exchangeable: bars are mirrored at random. Phase B turns the returns to all steps of a path into
whitened normal scores, by the members that have not learnt from them, and trains encoder and denoiser on all
blocks but the newest, on which paths are judged by their energy score: the quantiles at each step are the
map's, whatever the denoiser says of how steps go together. Both phases keep the state that unseen bars like
best, the first one included. Randomness comes from one generator; the number of steps is fixed before the
first.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from hashlib import sha256
from math import gcd, inf, pi, sqrt
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Generator, Tensor
from torch.nn import functional

from barcast.models import samplers
from barcast.models.catalog import SAMPLER, STEPS
from barcast.models.diffusion import Distribution, fingerprint, use_one_thread
from barcast.models.errors import ConfigError, DataError
from barcast.models.optimiser import Budget, Phase, Progress, Share, StateFile, fit, processes
from barcast.models.origins import BLOCKS, LEAST, Origins, Split, Table, split, thinned, to_text
from barcast.models.paths import between, path_steps
from barcast.models.scaling import CHANNELS, feature_names, layout_of, signed_features
from barcast.models.sssd.layers import PRESET, Architecture
from barcast.models.sssd.marginal import PROBABILITIES, knot_scores, piecewise
from barcast.models.sssd.network import SSSD
from barcast.models.trained import Record, Trained, check_outputs
from barcast.models.window import Window

SAMPLES = 256
MAP_RATE, DENOISER_RATE = 2e-3, 1e-3  # of learning
MAP_BATCH = 384  # origins of a batch of each member, of which it may learn three quarters
BATCH, DRAWS = 256, 8  # origins of a batch, and noise levels for each
LEAST_STEPS, MOST_STEPS = 400, 1200  # of each phase
LOOK_ORIGINS = 1500  # of what was not learnt from, thinned evenly, for each member
MARGIN = 0.001  # of a Gaussian copula's energy score: what the denoiser must gain on one block
LOOK_PATHS = 750  # origins of the newest block whose paths are judged, thinned evenly
LOOK_SAMPLES = 128  # of the noise, when paths are judged: with 64 their own arrangement decides
PAIRED = 50_000  # origins behind the correlation of the steps and the bridge, about
RIDGE = 1e-4  # of independence: keeps the correlation of prices that rest from being singular
SIGNED_CHANNELS = torch.tensor([True, False, True, False])  # of the sequence: return and close location
LOG_SNR = (-5.0, 6.0)  # where the denoiser learns
SCORE_LIMIT = 5.0  # scores beyond are the fault of linear tails
INPUT_DROP, HIDDEN_DROP = 0.3, 0.4
PIECE = 4096  # origins that are mapped at once
SOURCES = Path(__file__).parent  # of what a training runs through: a state is of one version


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
    init_from: tuple[str, Trained] | None = None,
    preset: str | None = None,
    precision: str = "fp32",
    accumulate: int = 1,
    rate: float | None = None,
    state: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train a model on whole histories, one window for each symbol.

    `until` (nanoseconds) is the last close that may be used, the newest if None; `hold_out` the share of the
    newest bars that are left alone, for the gate. `steps` is the number of optimiser steps in each phase; by
    default it follows from the number of origins. `seconds` on the monotonic `clock` caps the training, half
    for each phase, and the record says if it did. `init_from`, a model's id and the model, gives the starting
    weights; what that model has learnt from, the record counts as learnt from. Each member then begins with
    weights that have seen the block it leaves out, so that its CRPS there flatters it. `preset` names the
    sizes of the network, by default those of the starting model. `precision` is fp32 or bf16, of the losses
    only; `accumulate` is the number of parts in which a process computes a batch. `rate` is the denoiser's
    highest rate of learning.

    `state` is a file that is written at the end of each epoch. Where it is already there, of the same bars,
    options and version, the training goes on from it, to the bits of one that was not interrupted; whoever
    keeps the result removes it. Tables of all origins lie on the same disk, or in memory without a file.

    Raises `DataError` for bars that cannot be learnt from, `ConfigError` for options that cannot be used, for
    a starting model that knows bars to be held out, and for a cap that leaves no time for a step.
    """
    if seconds is not None and clock is None:
        raise ValueError("a cap on seconds needs a clock")
    check_outputs(horizons, levels)
    accelerator = processes(precision, accumulate, gcd(BATCH, MAP_BATCH))
    use_one_thread()
    folder = None if state is None else state.parent
    data = split(histories, timeframe, tuple(horizons), until, folder, validation=0.0, hold_out=hold_out)
    if preset is None:
        preset = (init_from and init_from[1].net.architecture.preset) or PRESET
    training = _Training(data, tuple(levels), seed, steps, state, preset, rate)
    cap = inf if seconds is None else seconds / 2
    trained = training.run(accelerator, cap, None if seconds is None else clock, init_from, progress)
    accelerator.end_training()
    return trained


def architecture(preset: str, timeframe: str, horizons: tuple[int, ...]) -> Architecture:
    """The architecture that a preset means for these bars and horizons."""
    return Architecture.of(
        preset,
        features=len(feature_names(timeframe, horizons)),
        channels=CHANNELS,
        context=layout_of(timeframe).context,
        horizons=len(horizons),
        path=len(path_steps(horizons)),
        samples=SAMPLES,
    )


class _Training:
    """One training. The state is the network, the generator, and what the second phase learns from."""

    def __init__(
        self,
        data: Split,
        levels: tuple[float, ...],
        seed: int,
        steps: int | None,
        state: Path | None,
        preset: str = PRESET,
        rate: float | None = None,
    ) -> None:
        self.data, self.seed, self.state, self.rate = data, seed, state, rate
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self.learn = data.learn
        self.steps = steps or min(max(len(self.learn) // 60, LEAST_STEPS), MOST_STEPS)
        self.signed = torch.from_numpy(signed_features(data.scaling.timeframe, data.scaling.horizons))
        self.generator = Generator().manual_seed(seed)
        a = architecture(preset, data.scaling.timeframe, data.scaling.horizons)
        self.net = SSSD(a, self.generator)
        members = torch.arange(a.members)
        self.alike = not data.scaling.layout.falls  # up and down are exchangeable
        self.unseen = members % BLOCKS  # (M,): the block that a member does not learn from
        self.mirrored = members >= len(members) // 2  # (M,)
        blocks = self.learn.block
        within = [(blocks == b).all(1).nonzero()[:, 0] for b in range(BLOCKS)]  # with all their outcomes
        self.apart = [thinned(at, LOOK_ORIGINS) for at in within]
        if int(self._learns(torch.arange(len(blocks))[:, None]).sum(0).min()) < LEAST // BLOCKS:
            raise DataError(
                f"outcomes over {max(data.scaling.horizons)} bars reach too far for {len(blocks)} forecast "
                "origins: give more bars, or shorter horizons"
            )

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
            _start_from(net, data, init_from[1])
        options = {
            "seed": self.seed,
            "init_from": None if init_from is None else init_from[0],
            "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "accumulate": accelerator.gradient_accumulation_steps,
            "rate": self.rate,
        }
        file = None if self.state is None else StateFile(self.state, self._key(options, seconds))
        phases = [
            Phase(
                name="map",
                modules=[net.map],
                rate=MAP_RATE,
                loss=self._map_loss,
                look=self._map_crps,
                prepare=self._prepare_map,
                members=net.architecture.members,
            ),
            Phase(
                name="denoiser",
                modules=[net.encoder, net.denoiser],
                rate=DENOISER_RATE if self.rate is None else self.rate,
                loss=self._denoiser_loss,
                look=self._denoiser_energy,
                prepare=self._prepare_denoiser,
                margin=MARGIN,
            ),
        ]
        budget = Budget(self.steps, seconds, clock)
        fitted = fit(net, phases, budget, self.generator, accelerator, file, progress)
        past = data.past(len(self.learn), fingerprint(SAMPLES))
        if init_from is not None:
            learnt = init_from[1].record.validation_end
            past |= {name: max(past[name], learnt) for name in ("until", "train_end", "validation_end")}
        record = Record(
            **past,
            steps=self.steps,
            capped=fitted.capped,
            candidates=fitted.candidates,
            map_step=fitted.chosen["map"],
            denoiser_step=fitted.chosen["denoiser"][0],
            stopped=fitted.stopped,
            **options,
        )
        return Trained(net.eval(), data.scaling, tuple(self.levels.tolist()), record)

    def _key(self, options: dict[str, object], seconds: float) -> str:
        """All that the bits of the result depend on, as a hash."""
        data = self.data
        s, times = data.scaling, (data.train_end, data.validation_end, data.until)
        scope = (data.digest, times, s.timeframe, s.horizons, self.levels.tolist())
        sources = [path.read_bytes() for path in sorted(SOURCES.rglob("*.py"))]
        code = sha256(b"".join(sources)).hexdigest()
        program = (code, fingerprint(SAMPLES), asdict(self.net.architecture), self.steps, seconds)
        return sha256(json.dumps([scope, program, options], sort_keys=True).encode()).hexdigest()

    def _learns(self, at: Tensor) -> Tensor:
        """Which origins (n, M), or (n, 1), each member may learn from, (n, M): no outcome is in its block."""
        first, last = self.learn.block[at].unbind(-1)
        return (self.unseen < first) | (self.unseen > last)

    def _prepare_map(self) -> None:
        """The static knots of each member, from the outcomes that it may learn from."""
        learns = self._learns(torch.arange(len(self.learn))[:, None])  # (n, M)
        for m, mirrored in enumerate(self.mirrored.tolist()):
            self.net.map.static[m] = static_knots(self.learn.z[learns[:, m]], mirrored)

    def _map_loss(self, share: Share) -> Tensor:
        """Pinball loss of the members' knots, on random origins of each; some see them mirrored."""
        part, g, M = self.learn, share.generator, len(self.unseen)
        drawn = torch.randint(len(part), (MAP_BATCH, M), generator=g)
        learns = self._learns(drawn)  # of the whole batch, (MAP_BATCH, M)
        at = share.rows(drawn)  # (B, M)
        sign = share.rows(1 - 2 * torch.randint(2, (MAP_BATCH, M, 1), generator=g).float())
        sign = torch.where(self.mirrored[:, None], sign, 1.0)
        x, z = part.features[at], sign * part.z[at].float()
        x = torch.where(self.signed, sign * x, x)
        knots = self.net.map(x, _Dropout(share))  # (B, M, H, K)
        miss = z[..., None] - knots
        p = torch.tensor(PROBABILITIES)
        loss = torch.maximum(p * miss, (p - 1) * miss).mean((-1, -2))  # (B, M)
        mean: Tensor = (loss * share.rows(learns)).sum() * share.of / learns.sum()
        return mean

    def _map_crps(self) -> list[float]:
        """CRPS of each member alone, with exact normal scores, on the block that it has not learnt from."""
        found = [0.0] * len(self.unseen)
        for b, at in enumerate(self.apart):
            part = self.learn.only(at)
            every = self.net.map.of_members(part.features).double()  # (n, M, H, K)
            for m in (self.unseen == b).nonzero()[:, 0].tolist():
                knots = every[:, m]
                u = torch.special.ndtri(self.levels).expand(*knots.shape[:2], -1).contiguous()
                found[m] = self._crps(part, piecewise(u, knot_scores().expand(knots.shape), knots))
        return found

    def _prepare_denoiser(self) -> None:
        """The scores of all paths, whitened; the newest block is left to judge by."""
        net, part, steps = self.net.eval(), self.learn, path_steps(self.data.scaling.horizons)
        self.older = (part.block[:, 1] < BLOCKS - 1).nonzero()[:, 0]
        self.newest = part.only(thinned(self.apart[-1], LOOK_PATHS))
        table = Table(len(steps), np.float32, None if self.state is None else self.state.parent)
        for at in _pieces(len(self.older), PIECE):
            table.add(self._scores(part.only(self.older[at])).numpy())
        self.scores = table.tensor()  # (n, G) of the older ones
        quantiles = self._path_quantiles(self.newest)  # (n, G, K)
        p = (torch.arange(LOOK_SAMPLES, dtype=torch.float64) + 0.5) / LOOK_SAMPLES
        u = torch.special.ndtri(p).expand(*quantiles.shape[:2], -1).contiguous()
        values = piecewise(u, knot_scores().expand(quantiles.shape), quantiles)  # (n, G, S)
        size = self._size(self.newest)  # (n, 1)
        moving = (size[:, 0] > 0).nonzero()[:, 0]
        self.newest, size = self.newest.only(moving), size[moving]
        self.look_values = (values[moving] / size[..., None]).transpose(1, 2).float()  # (n, S, G)
        self.look_moves = _moves((self.newest.path(steps) / size).float())  # (n, G)
        few = thinned(torch.arange(len(self.older)), PAIRED)
        G = len(steps)
        correlation = torch.corrcoef(self.scores[few].double().T).reshape(G, G)
        net.whiten.copy_(torch.linalg.cholesky(torch.lerp(correlation, torch.eye(G).double(), RIDGE)))
        net.bridge.copy_(self._bridge(part.only(self.older[few])))
        a = samplers.alphas_cumprod()
        self.alpha, self.sigma, self.lam = a**0.5, (1 - a) ** 0.5, samplers.lambdas().float()

    def _denoiser_loss(self, share: Share) -> Tensor:
        """v-prediction loss at stratified noise levels, weighted so that the error of eps counts evenly."""
        g, n = share.generator, BATCH * DRAWS
        drawn = share.rows(torch.randint(len(self.older), (BATCH,), generator=g))
        at = self.older[drawn]
        sign = share.rows(1 - 2 * torch.randint(2, (BATCH, 1), generator=g).float())
        sign = sign if self.alike else torch.ones_like(sign)
        scores = (sign * self.scores[drawn]).T
        w = torch.linalg.solve_triangular(self.net.whiten, scores, upper=False).T[:, None]  # (B, 1, G)
        low, high = LOG_SNR
        position = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
        wanted = share.rows(low + (high - low) * position.reshape(BATCH, DRAWS)) / 2
        t = torch.searchsorted(-self.lam, -wanted).clamp(max=samplers.TIMESTEPS - 1)
        half = share.rows(torch.randn(BATCH, DRAWS // 2, w.shape[-1], generator=g))
        eps = torch.cat([half, -half], 1)  # antithetic
        alpha, sigma, lam = self.alpha[t][..., None], self.sigma[t][..., None], self.lam[t]
        drop, part, denoiser = _Dropout(share), self.learn, self.net.denoiser
        features, sequence = part.features[at], part.sequence(at, self.net.architecture.context)
        features = torch.where(self.signed, sign * features, features)
        sequence = torch.where(SIGNED_CHANNELS, sign[..., None] * sequence, sequence)
        c = self.net.encoder(features, sequence, drop)[:, None].expand(-1, DRAWS, -1)
        v: Tensor = denoiser(alpha * w + sigma * eps, denoiser.modulation(c, lam, drop))
        error = ((v - (alpha * eps - sigma * w)) ** 2).mean(-1)
        loss: Tensor = (torch.sigmoid(2 * lam) * error).mean()
        return loss

    def _denoiser_energy(self) -> list[float]:
        """Energy score of paths on the newest block, sampled in full from the first rows of the noise.

        It is that of the moves from step to step over the path's size, and over the moves' mean norm.
        """
        net, part = self.net, self.newest
        distribution = Distribution(net, SAMPLER, STEPS, LOOK_SAMPLES)
        total = 0.0
        for at in _pieces(len(part), BATCH):
            c = net.encoder(part.features[at], part.sequence(at, net.architecture.context))
            ranks = distribution.joint(c).argsort(stable=True, dim=1).argsort(1)  # (b, S, G)
            x, y = _moves(self.look_values[at].gather(1, ranks)), self.look_moves[at]
            miss = (x - y[:, None]).norm(dim=-1).mean(1)  # (b,)
            apart = torch.cdist(x, x).sum((1, 2)) / (LOOK_SAMPLES * (LOOK_SAMPLES - 1))
            total += float((miss - apart / 2).sum())
        return [total / float(self.look_moves.norm(dim=-1).sum())]

    def _crps(self, part: Origins, z: Tensor) -> float:
        """CRPS over the mean absolute outcome, averaged over the horizons, of quantiles z (n, H, Q)."""
        levels = self.levels
        miss = part.z[..., None] - z
        loss = 2 * torch.maximum(levels * miss, (levels - 1) * miss).mean(-1) * part.scale  # (n, H)
        return float((loss.mean(0) / (part.z.abs() * part.scale).mean(0)).mean())

    def _unseen_knots(self, part: Origins) -> Tensor:
        """Knots (n, H, K) float64 of origins by the members that have not learnt from their block."""
        found = []
        for at in _pieces(len(part), PIECE):  # the knots of all members take a hundred times as much memory
            with torch.no_grad():
                knots = self.net.map.of_members(part.features[at]).double()  # (PIECE, M, H, K)
            apart = (self.unseen == part.block[at, :1]).double()  # (PIECE, M)
            found.append((knots * apart[..., None, None]).sum(1) / apart.sum(1)[:, None, None])
        return torch.cat(found)

    def _path_quantiles(self, part: Origins) -> Tensor:
        """Quantiles (n, G, K) float64 of the returns to all steps, by those that have not seen them."""
        s = self.data.scaling
        with torch.no_grad():
            knots = (self._unseen_knots(part) * part.scale[..., None]).numpy()
        return torch.from_numpy(between(knots, PROBABILITIES, s.horizons, path_steps(s.horizons)))

    def _scores(self, part: Origins) -> Tensor:
        """Normal scores (n, G) of the returns to the steps of the path."""
        quantiles, y = self._path_quantiles(part), part.path(path_steps(self.data.scaling.horizons))
        u = piecewise(y[..., None], quantiles, knot_scores().expand(quantiles.shape))[..., 0]
        return u.clamp(-SCORE_LIMIT, SCORE_LIMIT).float()

    def _bridge(self, part: Origins) -> Tensor:
        """The bridge (G,) of a `Coupling`: how far highs and lows go beyond the ends of their interval.

        A Brownian bridge from a to b of variance s^2 has a highest point M for which 2 (M - a)(M - b) / s^2
        is exponentially distributed with mean 1, and its root has the mean sqrt(pi) / 2; so has the lowest.
        All is measured in sizes of the whole path, and the spread of the moves is that of all origins.
        """
        steps, size = path_steps(self.data.scaling.horizons), self._size(part)
        moves = size[:, 0] > 0
        to, reach = part.path(steps)[moves], part.reach(steps)[moves]
        since, size = functional.pad(to, (1, 0))[:, :-1], size[moves]
        beyond = (reach - since[..., None]) * (reach - to[..., None])  # (n, G, 2)
        root = (2 * beyond.clamp(min=0)).sqrt().mean(-1) / size
        spread = (((to - since) / size) ** 2).mean(0).sqrt()
        bridge: Tensor = root.mean(0) / (sqrt(pi) / 2) / spread.clamp(min=1e-6)
        return bridge.float()

    def _size(self, part: Origins) -> Tensor:
        """The distance (n, 1) between the quantiles of 10 and 90 % at the end of each path."""
        knots = self._unseen_knots(part)[:, -1] * part.scale[:, -1:]
        i = PROBABILITIES.index(0.1)
        return (knots[:, -1 - i] - knots[:, i])[:, None].detach()


class _Dropout:
    """Random zeros in the rows of a share."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def inputs(self, x: Tensor) -> Tensor:
        return self._some(x, INPUT_DROP)

    def hidden(self, x: Tensor) -> Tensor:
        return self._some(x, HIDDEN_DROP)

    def _some(self, x: Tensor, p: float) -> Tensor:
        share = self.share
        whole = torch.rand((share.of * len(x), *x.shape[1:]), generator=share.generator)
        return x * (share.rows(whole) >= p) / (1 - p)


def _moves(returns: Tensor) -> Tensor:
    """Returns from step to step of returns from the start, (..., G)."""
    return torch.diff(functional.pad(returns, (1, 0)), dim=-1)


def _pieces(n: int, size: int) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.split(torch.arange(n), size)
    return pieces


def static_knots(z: Tensor, mirror: bool) -> Tensor:
    """Quantiles of outcomes at the map's knots, (H, K); symmetric if up and down are exchangeable."""
    q = torch.from_numpy(np.quantile(z.numpy(), PROBABILITIES, axis=0).T.copy())
    if mirror:
        q = (q - q.flip(-1)) / 2
    steps = torch.diff(q, dim=-1).clamp(min=1e-4)
    return torch.cat([q[:, :1], q[:, :1] + torch.cumsum(steps, -1)], -1).float()


def _start_from(net: SSSD, data: Split, trained: Trained) -> None:
    scaling, old = data.scaling, trained.scaling
    for field in ("timeframe", "horizons"):
        mine, theirs = getattr(scaling, field), getattr(old, field)
        if mine != theirs:
            raise ConfigError(f"{field} {mine} cannot start from a model of {theirs}: train from scratch")
    if net.architecture != trained.net.architecture:
        raise ConfigError(
            f"{net.architecture} cannot start from {trained.net.architecture}: train from scratch"
        )
    learnt = trained.record.validation_end
    if data.validation_end < min(data.until, learnt):
        raise ConfigError(
            f"the model to start from has learnt from bars up to {to_text(learnt)}, and those after "
            f"{to_text(data.validation_end)} are to be held out: hold out less, or train from scratch"
        )
    with torch.no_grad():
        for p, value in zip(net.parameters(), trained.net.parameters(), strict=True):
            p.copy_(value)
