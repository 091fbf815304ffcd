"""Rolling-origin scores: what a forecaster said at every bar of a period, against what then happened."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

from barcast.models.bar import Adjustment
from barcast.models.errors import ConfigError, DataError
from barcast.models.forecast import Card, Forecast, Forecaster, usable
from barcast.models.quantiles import central
from barcast.models.scores import crps as crps_of
from barcast.models.window import Window, window_at

Array = NDArray[np.float64]

CHUNK = 256  # windows handed over at once
COSTLY_BARS = 2000
"""How many bars models are judged on that take tenths of a second for each, origin or not: calibration asks
them of all bars between two origins, and of some before the first."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores of one forecaster over n origins.

    `crps` (H,) is the mean CRPS of each horizon in log return; `normalised` is its mean over the horizons,
    each divided by the mean absolute outcome. `coverage` (H, I) is the share of outcomes inside the central
    intervals of nominal coverage `intervals` (I,). `losses` (n, H) is the CRPS of each origin, whose symbol
    and close time are in `symbols` and `close_times` (n,), for paired comparisons.
    """

    model: str
    horizons: tuple[int, ...]
    n: int
    crps: Array
    normalised: float
    intervals: tuple[float, ...]
    coverage: Array
    losses: Array
    symbols: tuple[str, ...]
    close_times: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Forecasts:
    """What several forecasters said at the same n origins, and what then happened.

    `outcomes` is (n, H), `quantiles` one (n, H, Q) for each forecaster, all log returns; `symbols` and
    `close_times` (n,) are those of the origins.
    """

    outcomes: Array
    quantiles: list[Array]
    symbols: tuple[str, ...]
    close_times: NDArray[np.int64]


def newest(histories: Collection[Window], bars: int, reach: int) -> int:
    """The close from which on so many bars of all symbols have outcomes, or the first of fewer.

    `reach` is the longest horizon, in bars.
    """
    bars += len(histories) * reach
    closes = np.sort(np.concatenate([w.close_times[-bars:] for w in histories]))
    return int(closes[-bars:][0])


def even_stride(n: int, most: int) -> float:
    """From one of n bars or origins to the next, so that about `most` of them are left.

    A whole number could be one of days, and all that is left of one hour: the golden ratio's part makes it
    walk evenly through hours and weekdays.
    """
    return 1 if n <= most else n // most + (sqrt(5) - 1) / 2


def every(n: int, stride: float) -> NDArray[np.int64]:
    """The places of every `stride`-th of n, rounded down."""
    places: NDArray[np.int64] = (np.arange(ceil(n / stride)) * stride).astype(np.int64)
    return places


def score(
    forecaster: Forecaster,
    histories: Collection[Window],
    *,
    since: int,
    until: int,
    stride: float = 1,
) -> Scores:
    """Score forecasts made at every `stride`-th bar with since <= close, all targets realised by `until`."""
    return compare([forecaster], histories, since=since, until=until, stride=stride)[0]


def compare(
    forecasters: Sequence[Forecaster],
    histories: Collection[Window],
    *,
    since: int,
    until: int,
    stride: float = 1,
) -> list[Scores]:
    """Score several forecasters on identical origins; arguments and errors are those of `collect`."""
    found = collect(forecasters, histories, since=since, until=until, stride=stride)
    return [_scores(f.card, found, q) for f, q in zip(forecasters, found.quantiles, strict=True)]


def collect(
    forecasters: Sequence[Forecaster],
    histories: Collection[Window],
    *,
    since: int,
    until: int,
    stride: float = 1,
    slot: int | None = None,
    progress: Callable[[int, int, Window], None] = lambda _done, _all, _window: None,
    watch: Callable[[int, Window, Sequence[int], Sequence[Forecast]], None] | None = None,
) -> Forecasts:
    """Forecast by all of them at every `stride`-th bar, rounded down, that all can forecast, from `since` on.

    With a `slot`, the length of a bar in nanoseconds, it is every `stride`-th slot since 1970, the same for
    all symbols, and the bars that began in these. A target counts the symbol's own bars and is realised by
    `until`. Times are nanoseconds. Raises `ConfigError` if horizons or levels differ, and `DataError` if no
    origin is left. `progress` is told the forecasts made, those to make, and the window at hand. `watch` is
    told of every forecast, in the order of what is returned: whose it is (the place of the forecaster), of
    which history, and from which of its bars.
    """
    cards = [f.card for f in forecasters]
    for card in cards[1:]:
        for field in ("timeframe", "horizons", "levels"):
            mine, theirs = getattr(cards[0], field), getattr(card, field)
            if mine != theirs:
                raise ConfigError(
                    f"{field} of {card.model} is {theirs}, of {cards[0].model} {mine}: "
                    "only models that forecast the same can be compared"
                )
    least = max(card.min_window for card in cards)
    horizons = cards[0].horizons
    places = [_origins(h, least, max(horizons), since, until, stride, slot) for h in histories]
    count = len(forecasters) * sum(map(len, places))
    if not count:
        raise DataError(
            f"no forecast origin between {_date(since)} and {_date(until)} has {least} bars up to it and a "
            "target: give more bars or a longer time"
        )
    done = 0
    outcomes: list[Array] = []
    quantiles: list[list[Array]] = [[] for _ in forecasters]
    symbols: list[str] = []
    close_times: list[int] = []
    for history, origins in zip(histories, places, strict=True):
        price = np.log(history.values[:, 3])
        outcomes += [np.array([price[k + h] - price[k] for h in horizons]) for k in origins]
        symbols += [history.symbol] * len(origins)
        close_times += [int(history.close_times[k]) for k in origins]
        for k, (found, forecaster) in enumerate(zip(quantiles, forecasters, strict=True)):
            before = len(found)
            for windows in windows_at(history, origins, forecaster.card.window):
                made = forecaster.forecast(windows)
                usable(made, forecaster.card)
                found += [f.quantiles for f in made]
                if watch is not None:
                    seen = len(found) - before
                    watch(k, history, origins[seen - len(made) : seen], made)
                done += len(made)
                progress(done, count, windows[-1])
    return Forecasts(
        np.array(outcomes), [np.array(q) for q in quantiles], tuple(symbols), np.array(close_times, np.int64)
    )


def windows_at(
    history: Window, places: Sequence[int], length: int, adjustments: Sequence[Adjustment] = ()
) -> Iterator[list[Window]]:
    """The windows that end at these places of a history, some at once; see `window_at`."""
    for i in range(0, len(places), CHUNK):
        yield [window_at(history, k, length, adjustments) for k in places[i : i + CHUNK]]


def _origins(
    history: Window, least: int, reach: int, since: int, until: int, stride: float, slot: int | None
) -> list[int]:
    first = max(least - 1, int(np.searchsorted(history.close_times, since)))
    stop = int(np.searchsorted(history.close_times, until, "right")) - reach
    if slot is None:
        return [first + int(k) for k in every(stop - first, stride)]
    began = history.close_times[first : max(first, stop)] - slot
    return [first + int(k) for k in np.flatnonzero(began // slot % stride == 0)]


def _date(time: int) -> str:
    return str(np.datetime64(time, "ns").astype("datetime64[D]"))


def _scores(card: Card, found: Forecasts, q: Array) -> Scores:
    y, levels = found.outcomes, card.levels
    losses = crps_of(y, q, levels)  # (n, H)
    mean = losses.mean(0)
    size = np.abs(y).mean(0)
    normalised = float((mean / np.where(size > 0, size, 1.0)).mean())
    pairs = central(levels)
    covered = [((y >= q[..., i]) & (y <= q[..., j])).mean(0) for i, j in pairs]
    return Scores(
        model=card.model,
        horizons=card.horizons,
        n=len(y),
        crps=mean,
        normalised=normalised,
        intervals=tuple(round(levels[j] - levels[i], 12) for i, j in pairs),
        coverage=np.stack(covered, 1) if covered else np.empty((len(card.horizons), 0)),
        losses=losses,
        symbols=found.symbols,
        close_times=found.close_times,
    )
