"""How forecasts held what they promised over time: coverage, where outcomes fell, and what they gain."""

from collections.abc import Iterable, Mapping
from math import isfinite

import msgspec
import numpy as np
from numpy.typing import NDArray

from barcast.daemon.calendar import iso
from barcast.daemon.drift import LEAST, Matched, Said, matched, share
from barcast.models import BASELINES, Window, even_stride
from barcast.models.evaluation import every
from barcast.models.quantiles import central
from barcast.models.scores import crps, gain, lag, pit

TIMES = 2000
"""Closes of the newest signals that are looked at."""
BARS = 4096
"""Newest bars of a symbol that are needed for that: the closes, and what baselines look back over."""
SPANS = 12
"""Parts that the closes are shown in, equally many in each."""
NOMINAL = (0.5, 0.8, 0.9)
"""Central intervals whose coverage is shown, where the levels bound them."""
AGAINST = ("hs", "fhs")
"""The baselines that are forecast beside."""
ORIGINS = 200
"""About so many signals are held against the baselines."""
DAY = 86_400 * 10**9
"""Before the newest close: what the last day is, in nanoseconds."""


class Share(msgspec.Struct, frozen=True):
    """The share of so many outcomes that was inside an interval, and its standard error."""

    inside: float
    error: float
    outcomes: int


class Coverage(msgspec.Struct, frozen=True):
    """How often a central interval held, in all and in each span; None in one without an outcome."""

    nominal: float
    whole: Share
    spans: list[Share | None]


class Skill(msgspec.Struct, frozen=True):
    """By what share the CRPS is below that of a baseline on the same origins, and its standard error."""

    gain: float
    error: float
    origins: int


class Horizon(msgspec.Struct, frozen=True):
    """How the signals of so many bars ahead did, those whose own outcome is known, of so many closes.

    `pit` (Q + 1,) counts outcomes between the levels, `lately` those of the last day. There is no coverage
    and nothing counted below `LEAST` closes, and no skill against a baseline below `LEAST` origins.
    """

    bars: int
    closes: int
    coverage: list[Coverage]
    pit: list[int]
    lately: list[int]
    skill: dict[str, Skill | None]


class Reckoning(msgspec.Struct, frozen=True):
    """How the newest signals of one model held what they promised.

    `spans` are the first and the last close of each, `expected` (Q + 1,) the shares of outcomes that belong
    between the levels (Q,); both are empty without an outcome.
    """

    least: int
    closes: int
    signals: int
    symbols: int
    levels: list[float]
    expected: list[float]
    spans: list[tuple[str, str]]
    horizons: list[Horizon]


def reckon(said: Iterable[Said], histories: Mapping[str, Window], timeframe: str) -> Reckoning:
    """Hold one model's signals against the bars of their symbols, see `matched`: the newest `TIMES` closes.

    Each horizon counts the signals whose own outcome is known. The baselines see at each origin the bars up
    to its close.
    """
    held = matched(said, histories)
    if held is not None:
        held = held.only(np.isfinite(held.y).any(1))
        held = held.only(np.argsort(held.times, kind="stable"))
    if held is None or not len(held.times):
        return Reckoning(LEAST, 0, 0, 0, [], [], [], [])
    moments = np.unique(held.times)[-TIMES:]
    held = held.only(held.times >= moments[0])
    of = np.searchsorted(moments, held.times)
    # Which span a close is in, (T,): as numpy's array_split cuts them.
    span = np.repeat(np.arange(SPANS), [len(part) for part in np.array_split(moments, SPANS)])
    parts = [moments[span == k] for k in range(SPANS)]
    skills = _skills(held, of, len(moments), histories, timeframe)
    return Reckoning(
        LEAST,
        len(moments),
        len(held.times),
        len(np.unique(held.symbols)),
        held.levels,
        pit(held.levels).round(12).tolist(),
        [(iso(part[0].item()), iso(part[-1].item())) for part in parts if len(part)],
        [_horizon(held, k, moments, span, skills[k]) for k in range(len(held.horizons))],
    )


def _horizon(
    held: Matched,
    k: int,
    moments: NDArray[np.int64],
    span: NDArray[np.int64],
    skill: dict[str, Skill | None],
) -> Horizon:
    bars, levels = held.horizons[k], held.levels
    held = held.only(np.isfinite(held.y[:, k]))
    y, q, times = held.y[:, k], held.q[:, k], held.times
    known = np.unique(times)
    if len(known) < LEAST:
        return Horizon(bars, len(known), [], [], [], skill)
    part = span[np.searchsorted(moments, times)]

    def inside(low: int, high: int, own: NDArray[np.bool_]) -> Share | None:
        if not own.any():
            return None
        closes, of = np.unique(times[own], return_inverse=True)
        hits = (y[own] >= q[own, low]) & (y[own] <= q[own, high])
        found = share(hits, of, len(closes), levels[high] - levels[low], bars)
        return Share(found.value, found.error, len(of))

    coverage = []
    for low, high in reversed(central(levels)):
        nominal = round(levels[high] - levels[low], 12)
        whole = inside(low, high, np.full(len(y), True))
        if nominal in NOMINAL and whole is not None:
            spans = [inside(low, high, part == n) for n in np.unique(span)]
            coverage.append(Coverage(nominal, whole, spans))
    bins = (y[:, None] > q).sum(1)
    counts = [np.bincount(own, minlength=len(levels) + 1) for own in (bins, bins[times > times[-1] - DAY])]
    return Horizon(bars, len(known), coverage, counts[0].tolist(), counts[1].tolist(), skill)


def _skills(
    held: Matched, of: NDArray[np.int64], times: int, histories: Mapping[str, Window], timeframe: str
) -> list[dict[str, Skill | None]]:
    """What is gained over each baseline, for each horizon; on about `ORIGINS` signals, evenly thinned."""
    rivals = {name: BASELINES[name](timeframe, held.horizons, held.levels) for name in AGAINST}
    least = max(rival.card.min_window for rival in rivals.values())
    able = np.flatnonzero(held.places + 1 >= least)
    able = able[every(len(able), even_stride(len(able), ORIGINS))]
    held, of = held.only(able), np.unique(of[able], return_inverse=True)[1]
    apart = max(1, times // max(1, len(able)))  # closes from one origin to the next, about
    told: list[dict[str, Skill | None]] = [{} for _ in held.horizons]
    for name, rival in rivals.items():
        windows = [
            histories[symbol].part(max(0, at + 1 - rival.card.window), at + 1)
            for symbol, at in zip(held.symbols.tolist(), held.places.tolist(), strict=True)
        ]
        theirs = np.array([forecast.quantiles for forecast in rival.forecast(windows)])
        for k, bars in enumerate(held.horizons):
            own = np.isfinite(held.y[:, k])
            told[k][name] = None
            if own.sum() >= LEAST:
                y, count = held.y[own, k], int(of.max()) + 1
                mine, other = (crps(y, q[own, k], held.levels) for q in (held.q, theirs))
                found = gain(mine, other, of[own], count, lag(bars, apart, count))
                if isfinite(found.value) and isfinite(found.error):
                    told[k][name] = Skill(found.value, found.error, len(y))
    return told
