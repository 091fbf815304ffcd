"""What paths say: quantiles at every step, which of two barriers is touched first, drawdown; other couplings.

Distances are log returns from the reference. Between its steps a path is a Brownian bridge, see `Paths`.
"""

from collections.abc import Sequence
from math import erfc, floor, isfinite, sqrt
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from barcast.models.errors import ConfigError
from barcast.models.forecast import Forecast, Paths

Array = NDArray[np.float64]

MOST_PAIRS = 8
"""Pairs of barriers that may be asked for at once."""

NEAREST, FARTHEST = 0.1, 10.0
"""How near and how far a barrier that is asked for may be, in standard deviations."""

NEGLIGIBLE = 40.0
"""Terms of a series below exp(-40) are left out."""

STILL = 1e-15
"""The least standard deviation that is divided by."""

LONG = 3.0
"""From this standard deviation on, in distances between two barriers, one is touched, but for exp(-44)."""

WIDE = 30.0
"""A bridge that is wider, in the same distances, is taken as so wide: its end does not matter any more."""


class Touch(NamedTuple):
    """The probability that the upper barrier is touched before the lower one, and the other way round.

    The rest is that neither is touched.
    """

    up: Array
    down: Array


class Outlook(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What the paths of one forecast say of its longest horizon.

    `pairs` are the barriers (K, 2) as asked for: how far up and down, in standard deviations of the forecast
    over that horizon, `std`, a log return. `touch` holds two probabilities (K,). `drawdown` is a log return.
    """

    pairs: tuple[tuple[float, float], ...]
    std: float
    touch: Touch
    drawdown: float


def outlook(forecast: Forecast, pairs: Sequence[tuple[float, float]]) -> Outlook:
    """What a forecast with paths says of pairs of barriers. Raise ValueError for one without paths."""
    if forecast.paths is None:
        raise ValueError(f"the forecast of {forecast.symbol} has no paths")
    std = forecast.std.item(-1)
    up, down = std * np.array(pairs).T
    return Outlook(tuple(pairs), std, touch(forecast.paths, up, down), drawdown(forecast.paths))


def check_pairs(pairs: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The pairs of barriers. Raise ConfigError for too many, one twice, or a barrier that cannot be."""
    if len(pairs) > MOST_PAIRS:
        raise ConfigError(f"{len(pairs)} pairs of barriers are more than {MOST_PAIRS}: leave some out")
    for pair in pairs:
        if not all(isfinite(x) and NEAREST <= x <= FARTHEST for x in pair):
            raise ConfigError(
                f"the barriers {pair[0]:g}, {pair[1]:g} cannot be: write how far up and how far down, each "
                f"from {NEAREST:g} to {FARTHEST:g} standard deviations"
            )
    if len({f"{up:g} {down:g}" for up, down in pairs}) < len(pairs):  # as columns are called
        raise ConfigError("a pair of barriers repeats: name each once")
    return tuple(pairs)


def path_quantiles(paths: Paths, levels: Sequence[float]) -> Array:
    """The quantiles (G, Q) at each step; the k-th of S rising values is the one at level (k - 1/2) / S."""
    return np.quantile(paths.returns, levels, axis=0, method="hazen").T


def drawdown(paths: Paths) -> float:
    """The expected maximum drawdown: the farthest fall from the highest price so far, as a log return.

    Of the reference and the closes at the steps: extremes between them do not count.
    """
    closes = np.concatenate((np.zeros((len(paths.returns), 1)), paths.returns), 1)
    return float((np.maximum.accumulate(closes, 1) - closes).max(1).mean())


def touch(paths: Paths, up: ArrayLike, down: ArrayLike) -> Touch:
    """Which of two barriers is touched first in the paths: `up` above the reference or `down` below, (K,).

    Both are 0 or more; a barrier of width 0 is touched at once, and of two such each half of the time. Each
    probability is the mean over the paths of the exact one given the closes, and so smooth in all of them.
    Within an interval it is the series of Anderson (1960) for a Brownian bridge between two barriers, which
    counts the crossings of one, of the other and then this one, and so on in turn; see `_first`.
    """
    U = np.atleast_1d(np.asarray(up, float))
    L = -np.atleast_1d(np.asarray(down, float))
    b = paths.returns[:, :, None]  # (S, G, 1)
    a = np.concatenate((np.zeros_like(b[:, :1]), b[:, :-1]), 1)
    w = U - L
    s = np.minimum(paths.bridge[:, None], WIDE * w)  # (G, K)
    variance = np.square(np.maximum(s, STILL))
    a = np.clip(a, L, U)  # beyond a barrier all is decided
    first_up = _first(U - a, U - b, w, variance)
    first_down = _first(a - L, b - L, w, variance)
    first_up = np.where(b >= U, 1 - first_down, first_up)
    first_down = np.where(b <= L, 1 - first_up, first_down)
    neither = np.maximum(1 - first_up - first_down, 0)
    alive = np.cumprod(neither, 1)
    alive = np.concatenate((np.ones_like(alive[:, :1]), alive[:, :-1]), 1)
    found = [(alive * first).sum(1).mean(0) for first in (first_up, first_down)]
    return _at_once(Touch(*found), U, -L)


def first_passage(up: ArrayLike, down: ArrayLike, sd: ArrayLike) -> Touch:
    """Which barrier a Brownian motion without drift touches first until it has the standard deviation `sd`.

    The same series as in `touch`, with a free end: P(up) is the sum over k of 2 N(-(up + 2kw) / sd), k >= 0,
    less 2 N(-(2kw - up) / sd), k >= 1, w = up + down. All are broadcast against each other.
    """
    u, d, s = np.broadcast_arrays(*(np.asarray(x, float) for x in (up, down, sd)))
    w = u + d
    s = np.maximum(np.minimum(s, LONG * w), STILL)
    terms = _terms(w, w, s)

    def side(near: Array) -> Array:
        total = _tails(near / s)
        for k in range(1, terms + 1):
            total = total + _tails((near + 2 * k * w) / s) - _tails((2 * k * w - near) / s)
        return np.clip(total, 0, 1)

    return _at_once(Touch(side(u), side(d)), u, d)


def first_touched(high: Array, low: Array, up: Array, down: Array) -> Touch:
    """Which barrier bars touched first: 1, or 0, or 1/2 each where one bar touches both, (n, K).

    `high` and `low` (n, T) are log returns from the reference to the extremes of the bars, in order; barriers
    (n, K) as in `touch`.
    """
    T = high.shape[1]
    times = []
    for extreme, barrier in ((high, up), (-low, down)):
        over = extreme[:, :, None] >= barrier[:, None]
        times.append(np.where(over.any(1), over.argmax(1), T))  # (n, K)
    first, second = times
    both = 0.5 * ((first == second) & (first < T))
    return Touch((first < second) + both, (second < first) + both)


def _first(near: Array, end: Array, w: Array, variance: Array) -> Array:
    """The probability that a bridge touches one barrier before the other one, which lies `w` behind it.

    `near` and `end` are the distances of its ends from the barrier. A bridge that crosses in turn n times, or
    more, has its end reflected n times, see Anderson (1960); those that begin with the barrier
    and end at it are counted, those that begin with the other one, and cross this one after it, taken out.
    """
    end = np.maximum(end, 0)
    terms = _terms(w, (near - end).max(0), np.sqrt(variance))
    total = np.exp(-2 * near * end / variance)
    for k in range(1, terms + 1):
        kw = k * w
        total += np.exp(-2 * (end + kw) * (near + kw) / variance)
        total -= np.exp(-2 * kw * (kw - near + end) / variance)
    first: Array = np.clip(total, 0, 1)
    return first


def _terms(w: Array, nearer: Array, s: Array) -> int:
    """The last k whose terms count: kw (kw - nearer) <= NEGLIGIBLE s^2 / 2 for some w above 0.

    With s up to `WIDE` w and no end farther away than w, that are 134 at most.
    """
    reach = np.maximum(nearer, 0) / 2
    last = (reach + np.sqrt(reach * reach + NEGLIGIBLE * s * s / 2)) / np.where(w > 0, w, np.inf)
    return floor(float(last.max(initial=0)))


def _at_once(found: Touch, up: Array, down: Array) -> Touch:
    """What was found, but for barriers of no width."""
    now = np.where(up > 0, 0.0, np.where(down > 0, 1.0, 0.5))
    then = np.where(down > 0, 0.0, np.where(up > 0, 1.0, 0.5))
    met = (up <= 0) | (down <= 0)
    return Touch(np.where(met, now, found.up), np.where(met, then, found.down))


def _tails(x: Array) -> Array:
    """2 N(-x) of each number."""
    tails = [erfc(value) for value in (np.ravel(x) / sqrt(2)).tolist()]
    return np.array(tails).reshape(np.shape(x))
