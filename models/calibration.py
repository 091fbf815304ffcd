"""Online calibration: a forecaster's quantiles, spread by how its own last forecasts turned out.

Each forecast of the past and its outcome give a normal score: where in the forecast the outcome fell, on the
scale of the standard normal distribution. Scores of a calibrated forecaster are N(0, 1). What they were
instead corrects the newest forecast (the recalibration of Kuleshov, Fenner and Ermon 2018; up and down are
corrected alike, and shrunk).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import inf, log, nan
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barcast.models.errors import ConfigError
from barcast.models.forecast import Card, Coverage, Forecast, Forecaster, forecast_from, usable
from barcast.models.paths import Coupler, with_paths
from barcast.models.quantiles import central, forecast_of, moments
from barcast.models.window import Window, check_long_enough, joined, runs

Array = NDArray[np.float64]

OUTCOMES = 2000  # of each horizon that a forecast is corrected by
JUDGED = 250  # outcomes of each horizon that the coverage is counted over
PRIOR = 50  # independent outcomes that a scale of 1 counts as
LIMIT = 4.0  # no score is farther out
GENTLE = 0.1  # of the slope between the outermost levels: the least slope beyond them
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: multiples spread evenly
CHUNK = 256  # windows handed to the inner forecaster at once
ASKED = 4096  # bars whose inner forecasts are held at once, about: a new symbol has thousands
VERSION = 1  # of the arithmetic: fingerprints differ where bits may


@lru_cache(64)
def normal(levels: tuple[float, ...]) -> Array:
    """The normal scores of levels between 0 and 1, (Q,)."""
    z = np.array([NormalDist().inv_cdf(level) for level in levels])
    z.flags.writeable = False
    return z


def recalibrated(size: Array, h: int, levels: tuple[float, ...]) -> Array:
    """The normal scores (Q,), rising, at which to read a forecast over h bars, to get its levels right.

    `size` (n,) are the absolute scores of past outcomes, in order of size. The levels' own give way to the
    quantiles of the scores and of their mirror images. Outcomes over h bars overlap, n of them are worth
    n / h; `PRIOR` independent ones say that the levels' own are right.
    """
    z = normal(levels)
    if not len(size):
        return z
    share = len(size) / (len(size) + PRIOR * h)
    found = mirrored_quantiles(size, levels)
    rising: Array = np.maximum.accumulate(z + share * (found - z))
    return rising


def mirrored_quantiles(size: Array, levels: tuple[float, ...]) -> Array:
    """The quantiles (Q,) of scores and their mirror images together, of the scores' sizes (n,) in order.

    They have the bits of `np.quantile`, which finds its order statistics in five times as long as it takes to
    sort.
    """
    low, high, sides, shares, near = _mirrored(len(size), levels)
    a, b = sides[0] * size[low], sides[1] * size[high]
    apart = b - a
    found: Array = np.where(near, b - apart * (1 - shares), a + apart * shares)
    return found


def sliding(scores: Array, spans: Iterable[tuple[int, int]]) -> Iterator[Array]:
    """The sizes in order of scores[a:b] for each span (a, b), without those that are not a number.

    Where a span is the one before moved on by a place, the one score gives way to the other.
    """
    size, before = np.empty(0), (0, 0)
    for a, b in spans:
        if (a, b) == (before[0] + 1, before[1] + 1) and a < b:
            out, new = np.abs(scores[[a - 1, b - 1]])
            if out == out:
                k = int(size.searchsorted(out))
                size = np.concatenate((size[:k], size[k + 1 :]))
            if new == new:
                k = int(size.searchsorted(new))
                size = np.concatenate((size[:k], [new], size[k:]))
        else:
            own = np.abs(scores[a:b])
            size = np.sort(own[~np.isnan(own)])
        before = a, b
        yield size


@lru_cache(64)
def _mirrored(n: int, levels: tuple[float, ...]) -> tuple[NDArray[Any], ...]:
    """Of n sizes in order and their mirror images, how the quantiles at each level are made.

    Places of the sizes below and above it (Q,), their signs (2, Q), the share of the way between them, and
    whether it is counted from above.
    """
    rank = (2 * n - 1) * np.array(levels)
    below = np.floor(rank)
    places = np.stack([below, np.minimum(below + 1, 2 * n - 1)]).astype(np.intp) - n  # below 0 a mirror image
    at = np.where(places < 0, -1 - places, places)
    share = rank - below
    return at[0], at[1], np.where(places < 0, -1.0, 1.0), share, share >= 0.5


def normal_scores(outcomes: Array, quantiles: Array, levels: tuple[float, ...], dice: Array) -> Array:
    """Where outcomes (n,) fell in forecasts (n, Q): normal scores (n,), at most `LIMIT` from 0.

    An outcome that several quantiles equal is somewhere between their scores: `dice` (n,), from 0 to 1, say
    where (randomised PIT; Czado, Gneiting and Held 2009). NaN where anything is not a number, or where the
    forecast has no width.
    """
    z = normal(levels)
    below = (quantiles < outcomes[:, None]).sum(1)
    upto = (quantiles <= outcomes[:, None]).sum(1)
    row, base = np.arange(len(outcomes)), np.maximum(upto - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = z[base] + (outcomes - quantiles[row, base]) / _slopes(quantiles, z)[row, upto]
    first = z[np.minimum(below, len(z) - 1)]
    found = np.where(below < upto, first + dice * (z[base] - first), between)
    found[~(quantiles[:, -1] > quantiles[:, 0])] = np.nan
    within: Array = np.clip(found, -LIMIT, LIMIT)
    return within


def read_at(scores: Array, quantiles: Array, levels: tuple[float, ...]) -> Array:
    """The quantile functions of forecasts (H, Q) at normal scores (H, Q), rising along the levels.

    Between the levels they are linear in the normal score; beyond, they go on with the outermost slope. At
    the levels' own scores they are the quantiles, to the bit.
    """
    z = normal(levels)
    segment = np.searchsorted(z, scores, "right")
    base, row = np.maximum(segment - 1, 0), np.arange(len(quantiles))[:, None]
    found = quantiles[row, base] + _slopes(quantiles, z)[row, segment] * (scores - z[base])
    rising: Array = np.maximum.accumulate(found, -1)  # whatever is rounded
    return rising


def _slopes(quantiles: Array, z: Array) -> Array:
    """How fast quantiles (n, Q) rise with the score: before, between and after the levels, (n, Q + 1)."""
    slopes = np.empty((len(quantiles), len(z) + 1))
    slopes[:, 1:-1] = (quantiles[:, 1:] - quantiles[:, :-1]) / (z[1:] - z[:-1])
    least = GENTLE * (quantiles[:, -1] - quantiles[:, 0]) / (z[-1] - z[0])
    slopes[:, 0] = np.maximum(slopes[:, 1], least)
    slopes[:, -1] = np.maximum(slopes[:, -2], least)
    return slopes


class Calibrated:
    """The quantiles of another forecaster, recalibrated by the outcomes of its last forecasts in the window.

    It is a pure function of the window, which is longer than the inner forecaster's: what that said of a past
    bar is asked again, with the bars of then. A forecast is corrected by the last `outcomes` outcomes of each
    horizon, one without any is the inner one. Mean, spread and probability of a rise follow from the
    recalibrated quantiles, see `quantiles.moments`. The coverage is that of the recalibrated intervals of
    the last `judged` outcomes, each made from the bars up to its own; forecasts that had fewer than
    `outcomes` to learn from are not counted.

    The state is the `_Past` of each symbol's last window. It saves work and changes no bit: of a window with
    the same bars, all but what the bars since then say is taken from there; what follows a changed bar is
    worked out again.

    With `couple`, which is asked about the newest bar alone, the forecasts carry paths.

    Raises `ConfigError` for an inner forecaster of fewer than two levels, or of levels 0 or 1.
    """

    def __init__(
        self,
        inner: Forecaster,
        outcomes: int = OUTCOMES,
        judged: int = JUDGED,
        couple: Coupler | None = None,
    ) -> None:
        card = inner.card
        if len(card.levels) < 2 or not 0 < card.levels[0] < card.levels[-1] < 1:
            raise ConfigError(
                f"levels {card.levels} of {card.model} cannot be recalibrated: give two or more, rising "
                "between 0 and 1"
            )
        self.inner, self._outcomes, self._judged, self._couple = inner, outcomes, judged, couple
        self._reach = max(card.horizons)
        self._first = card.window - 1  # place in the window of the first bar with all the bars it needs
        self._full = self._first + outcomes + self._reach - 1  # of the first that is corrected by them all
        self._central = central(card.levels)
        self._card = Card(
            model=card.model,
            kind=card.kind,
            timeframe=card.timeframe,
            horizons=card.horizons,
            levels=card.levels,
            window=self._full + self._reach + judged,
            min_window=card.min_window,
            sampler=card.sampler,
            steps=card.steps,
            samples=card.samples,
            fingerprint=f"{card.fingerprint}; calibration={VERSION} outcomes={outcomes} judged={judged}",
            path=() if couple is None else couple.path,
        )
        self._pasts: dict[str, _Past] = {}

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        return self._card

    def over(self, inner: Forecaster) -> "Calibrated":
        """The same over another inner forecaster, which says the same."""
        return Calibrated(inner, self._outcomes, self._judged, self._couple)

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        for window in windows:
            check_long_enough(window, self.card.min_window)
        made: list[Forecast] = []
        while len(made) < len(windows):
            made += self._forecast(windows[len(made) :])
        return made

    def _forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast the first windows: all, or up to those with which `ASKED` bars are asked about.

        Windows that are cut one behind the other from one history are worked out as a longer one.
        """
        card = self.card
        plans, asked = list[tuple[list[Window], _Past | None]](), list[Window]()
        latest: dict[str, _Past] = {}
        cuts = [_cut(window, len(window), card.window) for window in windows[:ASKED]]
        for run in self._runs(cuts):
            whole, past = joined(run), None
            if len(whole) > self._first:
                before = latest.get(whole.symbol, self._pasts.get(whole.symbol))
                past = latest[whole.symbol] = _Past(whole, before, self._first, self._reach)
                asked += [_cut(whole, k + 1, self.inner.card.window) for k in range(past.start, len(whole))]
            else:
                asked.append(whole)
            plans.append((run, past))
            if len(asked) >= ASKED:
                break

        said = self._ask(asked)
        made, at = list[Forecast](), 0
        for run, past in plans:
            if past is None:
                made.append(forecast_of(card, run[0], said[at], None, True))
                at += 1
                continue
            count = len(past.times) - past.start
            made += self._published(run, past, self._work_out(past, said[at : at + count]))
            at += count
        for symbol, past in latest.items():
            past.keep()
            self._pasts[symbol] = past
        if self._couple is None:
            return made
        return with_paths(self._couple, [window for run, _ in plans for window in run], made)

    def _runs(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Windows in order, those together that follow one another, and all that is known of their symbol."""
        ends = {symbol: int(past.times[-1]) for symbol, past in self._pasts.items()}
        for run in runs(windows, self.card.window, 1):
            new = run[0].close_time > ends.get(run[0].symbol, 0)
            yield from [run] if new else ([window] for window in run)
            ends[run[0].symbol] = run[-1].close_time

    def _published(self, run: Sequence[Window], past: "_Past", quantiles: Array) -> list[Forecast]:
        """The forecasts of windows that end with the last bars of a past, by quantiles (n, H, Q) up to it."""
        card, H, n = self.card, len(self.card.horizons), len(run)
        quantiles = quantiles[-n:]
        figures = moments(quantiles.reshape(n * H, -1), card.levels)
        mean, std, rise = (x.reshape(n, H) for x in figures)
        found = []
        for k, window in enumerate(run):
            told = quantiles[k], mean[k], std[k], rise[k]
            coverage = self._coverage(past, len(past.times) - n + k)
            found.append(forecast_from(card, window, *told, coverage, len(window) <= self._first))
        return found

    def _ask(self, windows: Sequence[Window]) -> Array:
        """What the inner forecaster says, (n, H, Q); NaN where that can be no price."""
        card = self.inner.card
        said = np.empty((len(windows), len(card.horizons), len(card.levels)))
        for i in range(0, len(windows), CHUNK):
            made = self.inner.forecast(windows[i : i + CHUNK])
            good = usable(made, card)
            for row, forecast, fine in zip(said[i:], made, good, strict=False):
                row[:] = forecast.quantiles if fine else np.nan
        return said

    def _work_out(self, past: "_Past", news: Array) -> Array:
        """Fill in what the new bars of a window say, from the inner forecasts (n, H, Q) of its last bars.

        Return what is published of the last bars, (n, H, Q).
        """
        H, levels = self.card.horizons, self.card.levels
        L, first, since = len(past.times), self._first, max(past.same, self._first)
        before = past.take()
        past.said = news
        past.published = np.full_like(news, np.nan)
        if before is not None and past.goes_on:
            past.said = np.concatenate((before.said, news))
            past.published = np.concatenate((before.published, past.published))
        past.scores = np.full((len(H), L - first), np.nan)
        past.depths = np.full((len(H), L - first), -1, np.int8)
        if before is not None and since > first:
            kept = slice(past.gone, past.gone + since - first)
            past.scores[:, : since - first] = before.scores[:, kept]
            past.depths[:, : since - first] = before.depths[:, kept]

        head = L - len(past.said)  # place of the first bar whose forecast is at hand
        early = max(0, since - self._reach)
        # logarithms one by one: those of an array may depend on its length in the last bit
        price = np.array([log(x) if 0 < x < inf else nan for x in past.values[early:, 3].tolist()])
        dice = (past.times[since:].view(np.uint64) * GOLDEN >> np.uint64(11)) / 2.0**53
        ends = [(row, h, L - max(since, first + h)) for row, h in enumerate(H)]  # new bars that end outcomes
        ends = [(row, h, n) for row, h, n in ends if n > 0]

        def at_begin(forecasts: Array) -> Array:
            """Of each outcome, horizon by horizon, its row (Q,) of the forecasts at hand."""
            return np.concatenate([forecasts[L - h - head - n : L - h - head, row] for row, h, n in ends])

        if ends:
            y = np.concatenate([price[-n:] - price[-n - h : len(price) - h] for _, h, n in ends])
            dice = np.concatenate([dice[-n:] for _, _, n in ends])
            _put(past.scores, ends, normal_scores(y, at_begin(past.said), levels, dice))
        since = min(max(past.start, self._full), L - 1)
        past.published[since - head :] = self._recalibrated(past, since, past.said[since - head :])
        if ends:
            _put(past.depths, ends, self._depth(y, at_begin(past.published)))
        published = past.published
        past.said, past.published = past.said[-self._reach :], published[-self._reach :]
        return published

    def _recalibrated(self, past: "_Past", since: int, quantiles: Array) -> Array:
        """The quantiles (n, H, Q) said at the bars of a window from `since` on, each corrected by the
        outcomes up to then.
        """
        levels, first, (n, H, Q) = self.card.levels, self._first, quantiles.shape
        z = np.empty((n, H, Q))
        for row, h in enumerate(self.card.horizons):
            ends = range(since + 1 - first, since + 1 - first + n)
            spans = ((max(end - self._outcomes, h), end) for end in ends)
            for k, size in enumerate(sliding(past.scores[row], spans)):
                z[k, row] = recalibrated(size, h, levels)
        read: Array = read_at(z.reshape(n * H, Q), quantiles.reshape(n * H, Q), levels)
        return read.reshape(n, H, Q)

    def _depth(self, outcomes: Array, quantiles: Array) -> NDArray[np.int8]:
        """How many central intervals of forecasts (n, Q) hold the outcome (n,); -1 where it is not known."""
        depth = np.zeros(len(outcomes), np.int8)
        for i, j in self._central:
            depth += (outcomes >= quantiles[:, i]) & (outcomes <= quantiles[:, j])
        depth[np.isnan(outcomes) | np.isnan(quantiles[:, 0])] = -1
        return depth

    def _coverage(self, past: "_Past", k: int) -> Coverage | None:
        """The coverage of the last intervals before the k-th bar, if there is one for each horizon."""
        known = []
        end = k + 1 - self._first
        for depths, h in zip(past.depths, self.card.horizons, strict=True):
            last = depths[max(end - self._judged, self._full + h - self._first) : max(end, 0)]
            known.append(last[last >= 0])
        if not self._central or not all(map(len, known)):
            return None
        levels, deepest = self.card.levels, len(self._central)
        counts = [np.bincount(d, minlength=deepest + 1)[::-1].cumsum()[::-1] for d in known]
        return Coverage(
            intervals=tuple(round(levels[j] - levels[i], 12) for i, j in self._central),
            share=np.array([deeper[1:] / deeper[0] for deeper in counts]).T,
            outcomes=tuple(map(len, known)),
        )


class _Past:
    """What the bars of a window have shown. The first bar that could be forecast is at the place `first`.

    `scores` and `depths` are (H, N - first): of the outcome that ended with each bar, the normal score in the
    inner forecast, and how many intervals of the published one held it. `said` and `published` are the
    quantiles (n, H, Q) of the last bars, whose outcomes are still to come. Entries depend on nothing after
    their bar. Those that depend on bars before the window are never looked at.
    """

    __slots__ = (
        "_before",
        "depths",
        "goes_on",
        "gone",
        "published",
        "said",
        "same",
        "scores",
        "start",
        "times",
        "values",
    )

    scores: Array
    depths: NDArray[np.int8]
    said: Array
    published: Array

    def __init__(self, window: Window, before: "_Past | None", first: int, reach: int) -> None:
        self.times: NDArray[np.int64] = np.ascontiguousarray(window.close_times)
        self.values: Array = np.ascontiguousarray(window.values)
        self._before = before
        self.gone = self.same = 0
        self.goes_on = False  # all bars that were known are still there
        if before is not None:
            self.gone = int(np.searchsorted(before.times, self.times[0]))
            self.same = self._shared(before)
            self.goes_on = self.gone + self.same == len(before.times)
        # the first bar to ask the inner forecaster of
        self.start = max(first, self.same if self.goes_on else self.same - reach)

    def _shared(self, before: "_Past") -> int:
        """How many bars from the beginning are, to the bit, those that the window before had."""
        n = min(len(before.times) - self.gone, len(self.times))
        there = slice(self.gone, self.gone + n)
        times = before.times[there] == self.times[:n]
        values = before.values[there].view(np.int64) == self.values[:n].view(np.int64)
        if times.all() and values.all():
            return n
        return int(np.argmin(times & values.all(1)))

    def take(self) -> "_Past | None":
        """The past of the window before, which is needed once."""
        before, self._before = self._before, None
        return before

    def keep(self) -> None:
        """Copy the bars: those of a window are valid until the next one of its symbol."""
        self.times, self.values = self.times.copy(), self.values.copy()
        self.said, self.published = self.said.copy(), self.published.copy()


def _put(rows: NDArray[Any], ends: Sequence[tuple[int, int, int]], values: NDArray[Any]) -> None:
    """Set the last n entries of each row, as `ends` counts them, to the values in turn."""
    at = 0
    for row, _, n in ends:
        rows[row, -n:] = values[at : at + n]
        at += n


def _cut(window: Window, stop: int, length: int) -> Window:
    """The last `length` bars before the place `stop`."""
    return window.part(max(0, stop - length), stop)
