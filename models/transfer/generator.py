"""Stress scenarios: bars as they would have been, had the market had another regime's texture.

A scenario is made up. It is no `Window`, and nothing that learns, calibrates or keeps a journal takes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Generator, Tensor

from barcast.models.bar import LEAST, MOST
from barcast.models.diffusion import use_one_thread
from barcast.models.errors import ConfigError, DataError
from barcast.models.origins import to_text
from barcast.models.transfer.latent import around, dithered
from barcast.models.transfer.network import FULL, guided, strength, travel
from barcast.models.transfer.regimes import BARS, Ints, Measures, first_end, measured, regime_id, usable
from barcast.models.transfer.trained import PROBABILITIES, Transfer
from barcast.models.window import Window

Array = NDArray[np.float64]

FRESH = (0.1, 0.1, 0.1, 0.3)
"""The share of each channel's noise that is a scenario's own, not its source's; squared, of the variance."""
SHARED = 0.5
"""How much of its ease all windows of a scenario have in common, of the variance."""
MOST_SCENARIOS, MOST_GUIDANCE = 1_000, 6.0
PIECE = 48  # windows that are brought into a regime at once
RIDGE = 1e-3  # of independence: keeps the correlation of two equal symbols from being singular


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """A symbol's bars in one scenario: made up from `since` on, and as they were before.

    `times` (T,) int64 nanoseconds are closes, `rows` (T, 5) float64 open, high, low, close and volume.
    `model` names the generator; `seed` and `number`, with the bars, say all that was drawn.
    """

    symbol: str
    times: Ints
    rows: Array
    since: int
    regime: str
    model: str
    seed: int
    number: int
    cfg_scale: float

    @property
    def mark(self) -> str:
        """What a file says of it in every row."""
        return (
            f"scenario, not forecast: {self.regime} by {self.model}, seed {self.seed}, number {self.number}, "
            f"cfg_scale {self.cfg_scale:g}"
        )


class StressScenarioGenerator:
    """Brings bars into the texture of a regime. It has no state that a scenario changes."""

    def __init__(self, trained: Transfer, model: str) -> None:
        self.trained, self.model = trained, model
        self._net = trained.net.eval()

    def generate(
        self,
        bars: Window | Sequence[Window],
        target_regime: str,
        n: int = 1,
        seed: int = 0,
        *,
        since: int | None = None,
        cfg_scale: float | None = None,
    ) -> list[list[Scenario]]:
        """`n` scenarios of the symbols of a portfolio; see `scenarios`."""
        numbers = range(check_count(n))
        return list(self.scenarios(bars, target_regime, numbers, seed, since=since, cfg_scale=cfg_scale))

    def scenarios(
        self,
        bars: Window | Sequence[Window],
        target_regime: str,
        numbers: Sequence[int],
        seed: int = 0,
        *,
        since: int | None = None,
        cfg_scale: float | None = None,
    ) -> Iterator[list[Scenario]]:
        """The scenarios of some numbers, one at a time, each a list of as many as there are histories.

        They are made up from the first close at or after `since` (nanoseconds), by default from the first
        that has enough bars before it; the price goes on from the close before. `cfg_scale` is the severity,
        see `guided`; by default the training's. All symbols of a scenario share their noise in the measure in
        which their sources resemble each other, and stand at the same quantile of the regime's volatility.
        The same bars, model, arguments, number and torch give the same bits, whatever other numbers are asked
        for.

        Raises `ConfigError` for an unknown regime, or numbers that cannot be; `DataError` for histories that
        are too short or stand still.
        """
        use_one_thread()
        regime, scale = regime_id(target_regime), self._severity(cfg_scale)
        seed, numbers = check_seed(seed), [_whole(number, "number") for number in numbers]
        histories = [bars] if isinstance(bars, Window) else list(bars)
        if not histories:
            raise DataError("there is no history to make scenarios of: give one at least")
        if empty := [w.symbol for w in histories if not len(w)]:
            raise DataError(f"{empty[0]} has no bars to make scenarios of: leave the symbol out")
        if since is None:
            since = max(int(w.close_times[min(_first(w, None), len(w) - 1)]) for w in histories)
        sources = [_Source.of(w, since) for w in histories]
        noise = [self._noise(w, source, seed) for w, source in zip(histories, sources, strict=True)]
        for number in numbers:
            own = [_stream(seed, number, w.symbol) for w in histories]
            mixed = self._mixed(noise, own)
            ease = _ease(max(map(len, noise)), _stream(seed, number))
            yield [
                Scenario(
                    symbol=w.symbol,
                    times=w.close_times,
                    rows=self._bars(w, source, z, ease[: len(z)], regime, scale),
                    since=int(w.close_times[source.first]),
                    regime=target_regime,
                    model=self.model,
                    seed=seed,
                    number=number,
                    cfg_scale=float(scale),
                )
                for w, source, z in zip(histories, sources, mixed, strict=True)
            ]

    def transfer(
        self, returns: Tensor, own: Tensor, target: Tensor, seed: int, cfg_scale: float | None = None
    ) -> Tensor:
        """Windows of the regimes (B,) in the target regimes (B,): returns over what is usual, (B, BARS)."""
        use_one_thread()
        scale = self._severity(cfg_scale)
        seed = check_seed(seed)
        r = self.made(self.noise(returns, own, seed), target, scale)
        z = torch.randn(len(returns), generator=_stream(seed, "levels"))
        level = self._wanted(_level(returns).numpy(), target.numpy(), z, scale)
        return r * torch.exp(torch.from_numpy(level) - _level(r))[:, None]

    def noise(self, returns: Tensor, own: Tensor, seed: int) -> Tensor:
        """The noise (B, 4, H, W) of one scenario for windows (B, BARS) of the regimes (B,)."""
        generator = Generator().manual_seed(check_seed(seed))
        [z] = self._mixed([self._inverted(returns, own, generator)], [generator])
        return z

    def made(self, noise: Tensor, target: Tensor, cfg_scale: float) -> Tensor:
        """The windows that noise (B, 4, H, W) is in the target regimes (B,), as volatile as they come."""
        return self.trained.scale.decode(self._from_noise(noise, target, cfg_scale))

    def _severity(self, cfg_scale: float | None) -> float:
        scale = self.trained.config.cfg_scale if cfg_scale is None else cfg_scale
        if not 0 <= scale <= MOST_GUIDANCE:
            raise ConfigError(f"cfg_scale = {scale} cannot be: take 0 to {MOST_GUIDANCE:g}")
        return scale

    def _inverted(self, returns: Tensor, own: Tensor, generator: Generator) -> Tensor:
        """The noise (B, 4, H, W) that windows (B, BARS) of the regimes (B,) come from."""
        c, found = self.trained.config, []
        with torch.inference_mode():
            for r, regime in zip(torch.split(returns, PIECE), torch.split(own, PIECE), strict=True):
                x = dithered(self.trained.scale.encode(r), generator)
                found.append(travel(guided(self._net, regime, FULL), x, 1.0, 0.0, c.sample_steps, c.solver))
        return torch.cat(found)

    def _noise(self, w: Window, source: "_Source", seed: int) -> Tensor:
        return self._inverted(source.returns, self._regimes(source), _stream(seed, w.symbol))

    def _regimes(self, source: "_Source") -> Tensor:
        return torch.from_numpy(self.trained.rule.labels(source.measures))

    def _mixed(self, noise: Sequence[Tensor], generators: Sequence[Generator]) -> list[Tensor]:
        """The noise of each symbol's windows, in part a scenario's own, which is as much alike as it is."""
        count = max(map(len, noise))
        fresh = torch.tensor(FRESH)[:, None, None]
        own = torch.stack([torch.randn((count, *noise[0].shape[1:]), generator=g) for g in generators])
        own = torch.einsum("st,tbchw->sbchw", _alike(noise), own)
        kept = torch.sqrt(1 - fresh**2)
        return [kept * z + fresh * e[: len(z)] for z, e in zip(noise, own, strict=True)]

    def _from_noise(self, z: Tensor, target: Tensor, cfg_scale: float) -> Tensor:
        c, found = self.trained.config, []
        with torch.inference_mode():
            for some, regime in zip(torch.split(z, PIECE), torch.split(target, PIECE), strict=True):
                to = guided(self._net, regime, cfg_scale)
                found.append(travel(to, some, 0.0, 1.0, c.sample_steps, c.solver))
        return torch.cat(found)

    def _wanted(self, own: Array, target: Ints, z: Tensor, cfg_scale: float) -> Array:
        """The levels (B,) of windows whose sources have the levels `own` (B,), by normal scores z (B,).

        They go the `strength` of the severity towards that of a real window of the regime, at the quantile of
        the score among the middle nine in ten.
        """
        low, high = PROBABILITIES[0], PROBABILITIES[-1]
        p = low + (high - low) * torch.special.ndtr(z.double()).numpy()
        pairs = zip(p, self.trained.levels[target], strict=True)
        there = np.array([np.interp(x, PROBABILITIES, quantiles) for x, quantiles in pairs])
        return np.asarray(own + strength(cfg_scale) * (there - own))

    def _bars(
        self, w: Window, source: "_Source", z: Tensor, ease: Tensor, regime: int, cfg_scale: float
    ) -> Array:
        target = torch.full((len(z),), regime)
        shape, level = self.trained.scale.parts(self._from_noise(z, target, cfg_scale))
        r = shape * level
        wanted = self._wanted(source.measures.level, target.numpy(), ease, cfg_scale)
        factor = torch.exp(torch.from_numpy(wanted) - _level(r))[:, None]
        gain = factor * level / around(source.returns.double())  # of the volatility around each bar
        r = factor * r * torch.from_numpy(source.measures.usual)[:, None]
        return source.built(w, r.numpy(), gain.numpy(), self.trained.elasticity)


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """The m windows that the bars of a history from `first` on are cut into; the last two may overlap.

    `returns` (m, BARS) are over what was usual; `fresh` are the bars of the last window that no other has.
    """

    first: int
    fresh: int
    returns: Tensor
    measures: Measures

    @classmethod
    def of(cls, w: Window, since: int | None) -> "_Source":
        """Cut a history; raise `DataError` where it is too short, or stands still."""
        first = _first(w, since)
        if (made := len(w) - first) < BARS:
            raise DataError(
                f"{w.symbol} has {made} bars to make up, and a regime is one of {BARS} at least: give more "
                "bars"
            )
        ends = np.arange(first + BARS - 1, len(w), BARS)
        if fresh := made % BARS:
            ends = np.append(ends, len(w) - 1)
        measures = measured(w, ends)
        if not usable(measures).all():
            k = int(np.argmin(usable(measures)))
            raise DataError(
                f"{w.symbol} stands still in the {BARS} bars up to {_text(w, int(ends[k]))}, or before them: "
                "leave the symbol out, or begin later"
            )
        r = np.diff(np.log(w.values[:, 3]), prepend=np.log(w.values[0, 3]))
        returns = sliding_window_view(r, BARS)[ends - BARS + 1] / measures.usual[:, None]
        return cls(first, fresh or BARS, torch.from_numpy(returns), measures)

    def built(self, w: Window, r: Array, gain: Array, elasticity: float) -> Array:
        """Bars (T, 5) of a history with other returns (m, BARS), and volatilities `gain` times as large.

        Gaps and wicks grow with the volatility around their bar, the volume with its power of `elasticity`.
        """
        r, gain = (np.concatenate([*x[:-1], x[-1, -self.fresh :]]) for x in (r, gain))
        rows, k = w.values.copy(), self.first
        open_, high, low, close = np.log(w.values[k:, :4]).T
        before = np.log(w.values[k - 1 : -1, 3])
        made = before[0] + np.cumsum(r)
        start = np.concatenate([before[:1], made[:-1]]) + (open_ - before) * gain
        above = (high - np.maximum(open_, close)) * gain
        below = (np.minimum(open_, close) - low) * gain
        prices = np.exp(
            np.stack([start, np.maximum(start, made) + above, np.minimum(start, made) - below, made])
        )
        rows[k:, :4] = prices.T
        rows[k:, 1] = prices[[0, 1, 3]].max(0)  # what exp rounds must not turn round
        rows[k:, 2] = prices[[0, 2, 3]].min(0)
        rows[k:, 4] *= gain**elasticity
        if not (np.isfinite(rows).all() and (rows[:, :4] > LEAST).all() and (rows < MOST).all()):
            raise DataError(
                f"{w.symbol} comes to prices that no market has: take a smaller cfg_scale, or fewer bars"
            )
        rows.flags.writeable = False
        return rows


LEAST_BEFORE = first_end() - BARS + 1
"""Bars before a scenario, at least."""


def check_count(n: int) -> int:
    """A number of scenarios; raise `ConfigError` for one that cannot be."""
    n = _whole(n, "n")
    if not 1 <= n <= MOST_SCENARIOS:
        raise ConfigError(f"n = {n} scenarios cannot be: take 1 to {MOST_SCENARIOS}")
    return n


def check_seed(seed: int) -> int:
    """A seed as Python's own whole number, by which streams are keyed; raise `ConfigError` for any other."""
    seed = _whole(seed, "seed")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed} cannot be: take a number from 0 on")
    return seed


def spans(w: Window) -> tuple[int, int] | None:
    """The first and the last close that a scenario may begin with; None for a history that is too short."""
    if len(w) < LEAST_BEFORE + BARS:
        return None
    return int(w.close_times[LEAST_BEFORE]), int(w.close_times[-BARS])


def _first(w: Window, since: int | None) -> int:
    """The first bar that is made up."""
    least = LEAST_BEFORE
    first = least if since is None else int(np.searchsorted(w.close_times, since))
    if first < least:
        raise DataError(
            f"{w.symbol} has {first} bars before {to_text(since or 0)}, and {least} are needed to know what "
            "is usual: begin later, or give a longer history"
        )
    return first


def _whole(value: object, name: str) -> int:
    """Python's own whole number, also of numpy's; raise `ConfigError` for what is none."""
    try:
        return int(index(value))  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"{name} = {value!r} is no whole number: write one") from error


def _text(w: Window, k: int) -> str:
    return to_text(int(w.close_times[k]))


def _ease(count: int, generator: Generator) -> Tensor:
    """Normal scores (count,) of how volatile the windows of a scenario are among those of the regime."""
    own, common = torch.randn(count, generator=generator), torch.randn(1, generator=generator)
    ease: Tensor = SHARED**0.5 * common + (1 - SHARED) ** 0.5 * own
    return ease


def _level(r: Tensor) -> Tensor:
    """The level (B,) of returns (B, N) over what is usual, float64; see `Transfer`."""
    return r.double().square().mean(1).sqrt().log()


def _alike(noise: Sequence[Tensor]) -> Tensor:
    """A root (S, S) of the correlation of the noise of S symbols, over the windows that all have."""
    if len(noise) == 1:
        return torch.ones(1, 1)
    count = min(map(len, noise))
    correlation = torch.corrcoef(torch.stack([z[:count].flatten() for z in noise]).double())
    ridged = torch.lerp(correlation, torch.eye(len(noise), dtype=torch.float64), RIDGE)
    root: Tensor = torch.linalg.cholesky(ridged)
    return root.float()


def _stream(*key: object) -> Generator:
    """The generator of a key."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest) >> 1)
