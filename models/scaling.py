"""The only way from bars to what the network sees: a causal scale for every horizon, rolling features and a
short sequence. Training, live and replay call the same functions.

Every number at a bar is a function of that bar and at most `Scaling.window - 1` bars before it, so a forecast
is a function of its window alone. Windows shorter than that are warming: the rolling windows clip to what is
there. All is float64 and free of BLAS, whose sums may change with the shape.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import log, pi

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from barcast.models.errors import ConfigError, DataError
from barcast.models.fitted import solve
from barcast.models.season import HOUR, OUTLIER, ZONES, choose_zone, clipped, slots
from barcast.models.window import Window, check_long_enough, joined, runs

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

THURSDAY = 3  # the weekday of 1970-01-01, Monday being 0
FLOOR = 1e-3  # of the reference variance: keeps the logarithm of a quiet bar finite
TINY = 1e-12  # variance per bar below which a symbol counts as standing still: (0.01 bp)²
SLOT_PRIOR = 30.0  # bars of evidence for "no seasonality" in every slot; as many bars ahead, as often
OWN_PRIOR = 60.0  # the same, for "as the other symbols" in every slot of a symbol
LEVEL_PRIOR = 25.0  # realised residuals of evidence for "the scale is right", for each bar of the horizon
SHORT_LEVEL, BIAS = 100, 250  # realised residuals behind the fast level and the drift feature
APART = 8  # bars between windows that share the work of their history, at most
CHUNK = 32  # entries that are summed at once
PIECE = 32_768  # bars whose features are in memory at once
DEEPEST = 8.0  # a fall counts as at most this in the regression
TAIL = 6.0  # a residual counts as at most this in the features of the tails
CLIP = 5.0  # standardised features end here
CHANNELS = 4  # of the sequence: return, log range, close location, log volume


@dataclass(frozen=True, slots=True)
class Layout:
    """How far the rolling windows reach, in bars."""

    har: tuple[int, ...]  # HAR cascade; the longest is the reference level
    fast: tuple[int, ...]  # windows of the range and return features, ascending
    residuals: int  # realised residuals that set the level of the scale
    context: int  # length of the sequence
    slots: int  # seasonal slots: hours of the week, or weekdays
    tails: tuple[int, ...]  # realised residuals behind the features of the tails' weight and side
    regime: int  # bars of the longest mean of the range, none if 0
    far: int  # bars of the mean that the regression's volatility reverts to, none if 0
    falls: tuple[int, ...]  # windows of the regression's mean falls: none where up and down are alike
    calibration: int  # outcomes of its own that a forecast is corrected by

    @property
    def terms(self) -> int:
        """Coefficients of the regression."""
        return len(self.har) + (self.far > 0) + len(self.falls)


INTRADAY = Layout(
    har=(1, 4, 16, 96, 480),
    fast=(1, 2, 4, 8, 16, 32, 64, 128),
    residuals=1000,
    context=64,
    slots=168,
    tails=(100, 500),
    regime=1920,
    far=0,
    falls=(),
    calibration=2000,
)
DAILY = Layout(
    har=(1, 5, 22, 66),
    fast=(1, 2, 5, 10, 22, 44, 66),
    residuals=250,
    context=64,
    slots=7,
    tails=(),
    regime=0,
    far=1000,
    falls=(1, 5, 22, 66),
    calibration=1000,
)


def layout_of(timeframe: str) -> Layout:
    """The layout for a timeframe such as `15m`, `1h`, `1d` or `session`."""
    if timeframe == "session":
        return DAILY
    if not re.fullmatch(r"[1-9]\d*[smhd]", timeframe):
        raise ConfigError(f"timeframe {timeframe!r} is unknown: write a count and s, m, h or d, or 'session'")
    return DAILY if timeframe.endswith("d") else INTRADAY


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """What the network sees of one symbol, for the n bars from `first` on of N.

    `scale` (n, H) is the log return expected in absolute value over each horizon; `features` (n, F) is
    standardised and clipped; `channels` (N - 1, 4) is the normalised series, one row for every bar but the
    first: the sequence of bar k is rows k - context to k - 1, included.
    """

    first: int
    scale: Array
    features: Array
    channels: Array


@dataclass(frozen=True, slots=True, eq=False)
class Season:
    """What is typical of each slot for one symbol: see `Scaling`, without the first axis."""

    factor: Array
    volume: Array
    gain: Array


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Statistics of the training bars, and the functions that apply them to any bars.

    Slots are the hours of the week by the clock of `zone`, or weekdays. `factor` (1 + S, slots) is the
    seasonal factor of absolute returns, `volume` (1 + S, slots) that of log volume, `gain` (1 + S, H, slots)
    turns the forecast of the HAR regression into an expected absolute return. Their first row is that of all
    symbols together, which serves symbols that were not there; those of the S `symbols` follow (none for
    daily bars, which are too few). `har` (H, J) are the regression's coefficients; `mean` and `std` (F,)
    standardise the features.
    """

    timeframe: str
    horizons: tuple[int, ...]
    zone: str
    symbols: tuple[str, ...]
    factor: Array
    volume: Array
    har: Array
    gain: Array
    mean: Array
    std: Array

    @property
    def layout(self) -> Layout:
        """The reach of the rolling windows."""
        return layout_of(self.timeframe)

    @property
    def window(self) -> int:
        """Bars from which on more history changes nothing."""
        layout = self.layout
        reach = max(layout.har[-1], layout.far) + layout.residuals + max(self.horizons)
        return max(reach, layout.regime + 1)

    @property
    def min_window(self) -> int:
        """Bars below which nothing is forecast: a full sequence and a realised residual of each horizon."""
        return self.layout.context + max(self.horizons) + 1

    def season(self, symbol: str) -> Season:
        """The season of a symbol, or that of all together."""
        row = self.symbols.index(symbol) + 1 if symbol in self.symbols else 0
        return Season(self.factor[row], self.volume[row], self.gain[row])

    def frame(self, symbol: str, close_times: Ints, values: Array, first: int) -> Frame:
        """Scale, features and channels of bars `first` to N - 1; each depends on no later bar.

        `close_times` is (N,) nanoseconds, `values` (N, 5); `first` is at least 1.
        """
        s, season = _Series.of(close_times, values, self.layout, self.zone), self.season(symbol)
        flat = _Flat.of(s, season, self.layout)
        raw = _raw_scales(s, flat, self, season)  # (N-1, H)
        residuals = _residuals(s, raw, self.horizons)
        w, pairs = self.layout.residuals, zip(residuals, self.horizons, strict=True)
        level = np.stack([_level(e, w, h, first) for e, h in pairs], 1)
        x = np.stack(list(_columns(s, flat, self, season, residuals, level, first).values()), 1)
        features = np.clip((x - self.mean) / self.std, -CLIP, CLIP)
        return Frame(first, raw[first - 1 :] * level, features, _channels(s, flat, season))

    def frames(self, symbol: str, close_times: Ints, values: Array, first: int) -> Iterator[Frame]:
        """What `frame` gives, to the bit, some bars at a time: memory holds the features of these alone.

        `first` of each says which bars of the history they are. Its channels begin with the row that follows
        those of the frame before.
        """
        for start in range(first, len(close_times), PIECE):
            since = max(0, start - self.window + 1) if start > first else 0
            end = min(start + PIECE, len(close_times))
            some = self.frame(symbol, close_times[since:end], values[since:end], start - since)
            new = end - start if start > first else end - 1
            yield replace(some, first=start, channels=some.channels[len(some.channels) - new :])

    def of_windows(self, windows: Sequence[Window]) -> list[Frame]:
        """The frame of each window's newest bar: as `of_window` gives it, to the bit.

        Windows that are cut one behind the other from one full history share the work of its bars.
        """
        frames: list[Frame] = []
        for run in runs(windows, self.window, APART):
            if len(run) == 1:
                frames.append(self.of_window(run[0]))
                continue
            whole = joined(run)
            times, values = whole.close_times, whole.values
            last = len(times) - 1
            ends = np.searchsorted(times, [window.close_time for window in run])
            frame = self.frame(whole.symbol, times, values, int(ends[0]))
            for k in ends.tolist():
                at = slice(k - int(ends[0]), k - int(ends[0]) + 1)
                channels = frame.channels[: len(frame.channels) - (last - k)]
                frames.append(Frame(k, frame.scale[at], frame.features[at], channels))
        return frames

    def of_window(self, window: Window) -> Frame:
        """The frame of a window's newest bar, n = 1, from its last `self.window` bars."""
        check_long_enough(window, self.min_window)
        times, values = window.close_times[-self.window :], window.values[-self.window :]
        return self.frame(window.symbol, times, values, len(times) - 1)


def signed_features(timeframe: str, horizons: Sequence[int]) -> NDArray[np.bool_]:
    """(F,) which features change sign when prices are mirrored."""
    signed = ("return", "semivariance", "location", "trend", "bias", "skew", "gap")
    return np.array([name.startswith(signed) for name in feature_names(timeframe, horizons)])


def feature_names(timeframe: str, horizons: Sequence[int]) -> list[str]:
    """The F names of the features, in order."""
    layout, h = layout_of(timeframe), tuple(horizons)
    blank = _blank(timeframe, h)
    n = blank.min_window
    ones = np.ones((n, 5))
    s = _Series.of(np.arange(n, dtype=np.int64) * HOUR, ones, layout, blank.zone)
    season, none = blank.season(""), [np.zeros(1)] * len(h)
    flat = _Flat.of(s, season, layout)
    return list(_columns(s, flat, blank, season, none, np.ones((1, len(h))), n - 1))


def check(w: Window) -> None:
    """Raise `DataError` for a history with prices or volumes that are not finite, or prices not positive."""
    good = np.isfinite(w.values).all(1) & (w.values[:, :4] > 0).all(1)
    if not good.all():
        k = int(np.argmin(good))
        raise DataError(
            f"{w.symbol} has an unusable bar at row {k}, {w.values[k].tolist()}: mend or remove it"
        )


def bars_to_learn(timeframe: str, horizons: Sequence[int]) -> int:
    """Bars of a symbol below which `fit` refuses it."""
    layout = layout_of(timeframe)
    return 2 * layout.har[-1] + layout.context + max(horizons)


def check_to_learn(w: Window, timeframe: str, horizons: Sequence[int]) -> None:
    """Raise `DataError` for a history that `fit` refuses."""
    _checked(w, _blank(timeframe, tuple(horizons)))


def fit(histories: Collection[Window], timeframe: str, horizons: Sequence[int]) -> Scaling:
    """Learn the statistics from whole histories that end where the training part ends.

    Everything is pooled over symbols, each normalised by its own level, so that the result also serves
    symbols that were not there. The histories are gone through several times, and memory holds the numbers of
    one at a time. Raises `DataError` for a symbol that is too short or stands still.
    """
    layout, part = layout_of(timeframe), _blank(timeframe, tuple(horizons))
    for w in histories:
        _checked(w, part)
    own = layout is INTRADAY
    if own:
        zone = choose_zone(_moves(w) for w in histories)
        part = replace(part, zone=zone, symbols=tuple(w.symbol for w in histories))

    sizes, busy = [], []
    for w in histories:
        s = _Series.of(w.close_times, w.values, layout, part.zone)
        sizes.append(_tally(s.slot, _typical(np.abs(s.r)), layout))
        busy.append(_tally(s.slot, s.volume, layout))
    factor = _seasons(np.stack(sizes), 1.0, own, 1)
    factor /= factor.mean(-1, keepdims=True)
    volume = np.stack(busy)
    volume[:, 0] -= _means(volume, own) * volume[:, 1]
    gain_of_one = np.ones((len(factor), len(part.horizons), layout.slots))
    part = replace(part, factor=factor, volume=_seasons(volume, 0.0, own, 1), gain=gain_of_one)

    def each() -> Iterator[tuple[_Series, _Flat]]:
        for w in histories:
            s = _Series.of(w.close_times, w.values, layout, part.zone)
            yield s, _Flat.of(s, part.season(w.symbol), layout)

    warm, J = layout.har[-1], layout.terms
    gram, moment = (np.zeros((len(part.horizons), J, *more)) for more in ((J,), ()))
    for _, flat in each():
        for j, h in enumerate(part.horizons):
            ahead = sliding_window_view(flat.p[1:], h).mean(-1)  # row k: bars k+1 .. k+h
            n = len(ahead)
            X = np.column_stack([np.ones(n), flat.ratios[:n]])[warm:]
            squares, products = _normal(X, np.log(ahead / flat.reference[:n] + FLOOR)[warm:])
            gram[j] += squares
            moment[j] += products
    try:
        coefficients = [solve(squares, products) for squares, products in zip(gram, moment, strict=True)]
    except np.linalg.LinAlgError as error:
        names = ", ".join(islice((w.symbol for w in histories), 3))
        raise DataError(
            f"the bars of {names} are too uniform to learn from, such as prices that never fall: give "
            "more symbols or other ones"
        ) from error
    part = replace(part, har=np.array(coefficients))

    outcomes: list[list[Array]] = [[] for _ in part.horizons]
    for w, (s, flat) in zip(histories, each(), strict=True):
        raw = _raw_scales(s, flat, part, part.season(w.symbol))
        for j, h in enumerate(part.horizons):
            z = np.minimum(np.abs(s.price[h:] - s.price[:-h]) / raw[:-h, j], OUTLIER)
            outcomes[j].append(_tally(s.slot[:-h][warm:], z[warm:], layout))
    gain = []
    for h, found in zip(part.horizons, outcomes, strict=True):
        tallies = np.stack(found)
        typical = float(_means(tallies, own=False)[0, 0])
        tallies[:, 0] /= _means(tallies, own)
        gain.append(_seasons(tallies, 1.0, own, h) * typical)
    part = replace(part, gain=np.stack(gain, 1))

    count, mean, square = 0, np.zeros(()), np.zeros(())
    for w in histories:
        for frame in part.frames(w.symbol, w.close_times, w.values, warm + 1):  # Chan et al. (1979)
            n, x = len(frame.features), frame.features
            middle = x.mean(0)
            square = square + ((x - middle) ** 2).sum(0) + (middle - mean) ** 2 * count * n / (count + n)
            mean = mean + (middle - mean) * n / (count + n)
            count += n
    signed = signed_features(timeframe, horizons)
    std = np.sqrt(square / count + np.where(signed, mean**2, 0.0))
    return replace(part, mean=np.where(signed, 0.0, mean), std=np.where(std > 1e-9, std, 1.0))


@dataclass(frozen=True, slots=True, eq=False)
class _Series:
    """What each bar says with the close before it: an entry for every bar but the first, (N - 1,)."""

    slot: Ints
    price: Array  # log close
    r: Array  # log return
    gap: Array  # log of the open over the close before
    parkinson: Array  # variance by Parkinson (1980), plus the squared opening gap
    garman: Array  # variance by Garman and Klass (1980), plus the squared opening gap
    location: Array  # the close within the bar's range, -1 .. 1
    volume: Array  # log of volume over its rolling mean

    @classmethod
    def of(cls, close_times: Ints, values: Array, layout: Layout, zone: str) -> "_Series":
        o, h, low, c, v = values.T
        price = np.log(c)
        if layout.slots == 168:
            slot = slots(close_times[1:], zone)
        else:
            slot = ((close_times[1:] - 1) // (24 * HOUR) + THURSDAY) % 7  # the day in which the bar ends
        gap = np.log(o[1:] / c[:-1])
        rng = np.log(h / low)[1:]
        body2 = np.log(c / o)[1:] ** 2
        width = (h - low)[1:]
        location = np.where(width > 0, 2 * (c - low)[1:] / np.where(width > 0, width, 1.0) - 1, 0.0)
        typical = trailing_mean(v[1:], layout.har[-1])
        busy = typical > 0
        volume = np.where(busy, np.log(v[1:] / np.where(busy, typical, 1.0) + 0.01), 0.0)
        return cls(
            slot=slot,
            price=price[1:],
            r=np.diff(price),
            gap=gap,
            parkinson=rng**2 / (4 * log(2)) + gap**2,
            garman=np.maximum(0.5 * rng**2 - (2 * log(2) - 1) * body2, 0) + gap**2,
            location=location,
            volume=volume,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """The same without the season, and what the regression sees of it: HAR (Corsi 2009), with falls.

    `ratios` (N - 1, J - 1) are logs of each other mean of `p` over the reference, and the mean falls among
    `x` in units of its volatility: after a fall equities move more than after a rise (Corsi and Reno 2012).
    """

    p: Array  # variance by Parkinson
    x: Array  # log return
    reference: Array  # the longest mean of the cascade
    ratios: Array

    @classmethod
    def of(cls, s: _Series, season: Season, layout: Layout) -> "_Flat":
        factor = season.factor[s.slot]
        p, x = s.parkinson / factor**2, s.r / factor
        reference = np.maximum(trailing_mean(p, layout.har[-1]), TINY)
        ratios = [np.log(trailing_mean(p, w) / reference + FLOOR) for w in layout.har[:-1]]
        if layout.far:
            ratios.append(np.log(np.maximum(trailing_mean(p, layout.far), TINY) / reference))
        for w in layout.falls:
            fall = trailing_mean(np.minimum(x, 0), w) * np.sqrt(w / reference)
            ratios.append(np.maximum(fall, -DEEPEST))
        return cls(p, x, reference, np.stack(ratios, 1))


def trailing_mean(x: Array, w: int, first: int = 0) -> Array:
    """Mean of the last `w` entries, or of as many as there are, at entries `first` to N - 1 of x (N,)."""
    if w <= len(x) == first + 1:  # a forecast asks for the newest entry alone
        return np.array([_last_sum(x[-w:]) / w])
    short = np.cumsum(x[: w - 1]) / np.arange(1, min(w, len(x) + 1))
    if len(x) < w:
        return short[first:]
    at = max(first - (w - 1), 0)
    return np.concatenate([short[first:], _sums(x[at:], w) / w])


def _sums(x: Array, w: int) -> Array:
    """Sums of w entries, ending at entries w - 1 to N - 1 of x (N,): chunks of 32, the newest first.

    They cost w / 32 additions each. The order of the additions is the same in each, and in `_last_sum`.
    """
    if w <= CHUNK:
        few: Array = np.add.reduce(sliding_window_view(x, w), -1)
        return few
    m, rest = divmod(w, CHUNK)
    n = len(x) - w + 1
    chunks = np.add.reduce(sliding_window_view(x, CHUNK), -1)  # entry i: x[i] to x[i + 31]
    total: Array = chunks[w - CHUNK :].copy()
    for j in range(2, m + 1):
        total += chunks[w - j * CHUNK :][:n]
    if rest:
        total += np.add.reduce(sliding_window_view(x[: n + rest - 1], rest), -1)
    return total


def _last_sum(x: Array) -> float:
    """The sum of all of x (w,), to the bits of `_sums`."""
    m, rest = divmod(len(x), CHUNK)
    if len(x) <= CHUNK:
        return float(np.add.reduce(x))
    chunks = np.add.reduce(x[rest:].reshape(m, CHUNK), -1).tolist()
    total: float = chunks.pop()
    while chunks:
        total += chunks.pop()
    return total + float(np.add.reduce(x[:rest])) if rest else total


def _moves(w: Window) -> tuple[Ints, Array]:
    """Closes and absolute returns over their mean, (N - 1,) each."""
    size = np.abs(np.diff(np.log(w.values[:, 3])))
    return w.close_times[1:], size / size.mean()


def _normal(X: Array, y: Array) -> tuple[Array, Array]:
    """The sums (J, J) and (J,) of the normal equations of y (n,) on X (n, J).

    No number of threads can change them.
    """
    J = range(X.shape[1])
    gram = np.array([[(X[:, i] * X[:, j]).sum() for j in J] for i in J])
    return gram, np.array([(X[:, i] * y).sum() for i in J])


def _typical(a: Array) -> Array:
    """Absolute returns over their mean, none counting more than 20 times their ninth decile."""
    a = clipped(a)
    return a / float(a.mean())


def _tally(slot: Ints, x: Array, layout: Layout) -> Array:
    """The sum of x (n,) in each slot, and how many they are, (2, slots)."""
    return np.stack([np.bincount(slot, x, minlength=layout.slots), np.bincount(slot, minlength=layout.slots)])


def _means(tallies: Array, own: bool) -> Array:
    """The mean of each symbol of tallies (S, 2, slots) if they are to have their `own`, or of all; (S, 1)."""
    whole = tallies.sum(-1) if own else tallies.sum((0, -1))[None]
    means: Array = np.broadcast_to((whole[:, 0] / whole[:, 1])[:, None], (len(tallies), 1))
    return means


def _seasons(tallies: Array, prior: float, own: bool, overlap: int) -> Array:
    """Means by slot of all S symbols together, then of each if they are to have their `own`, (1 + S, slots).

    `tallies` are (S, 2, slots). The former are shrunk to `prior`, the latter to the former. `overlap` values
    tell as much as one.
    """
    total, n = tallies.sum(0)
    together = (total + SLOT_PRIOR * overlap * prior) / (n + SLOT_PRIOR * overlap)
    if not own:
        return np.stack([together])
    evidence = OWN_PRIOR * overlap
    return np.stack([together, *((total + evidence * together) / (n + evidence) for total, n in tallies)])


def _raw_scales(s: _Series, flat: _Flat, scaling: Scaling, season: Season) -> Array:
    """The scale before its level is set: log-HAR on deseasonalised ranges, times the slot's gain, (N, H)."""
    columns, ratios = [], flat.ratios
    for h, b, g in zip(scaling.horizons, scaling.har, season.gain, strict=True):
        logv = b[0] + sum(b[j + 1] * ratios[:, j] for j in range(ratios.shape[1]))
        columns.append(np.sqrt(flat.reference * np.exp(logv) * h) * g[s.slot])
    return np.stack(columns, 1)


def _residuals(s: _Series, raw: Array, horizons: Sequence[int]) -> list[Array]:
    """For each horizon the outcomes over their raw scale, in the order of their realisation, (N - h,)."""
    outcomes = [(s.price[h:] - s.price[:-h]) / raw[:-h, j] for j, h in enumerate(horizons)]
    return [np.clip(z, -OUTLIER, OUTLIER) for z in outcomes]


def _realised(x: Array, w: int, h: int, first: int) -> tuple[Array, Ints]:
    """Mean of the last `w` of a residual series at bars `first` on, and how many they are; both (n,)."""
    start = first - 1 - h  # entry i of x is realised at bar i + h + 1
    count = np.clip(np.arange(start + 1, len(x) + 1), 0, w)
    if start >= 0:
        return trailing_mean(x, w, start), count
    return np.concatenate([np.zeros(min(-start, len(count))), trailing_mean(x, w)])[: len(count)], count


def _level(e: Array, w: int, h: int, first: int) -> Array:
    """How large the last `w` realised residuals were against their scale, shrunk to 1, (n,)."""
    mean, n = _realised(np.abs(e), w, h, first)
    prior = LEVEL_PRIOR * h
    level: Array = (n * mean + prior) / (n + prior)
    return level


def _columns(
    s: _Series,
    flat: _Flat,
    scaling: Scaling,
    season: Season,
    residuals: list[Array],
    level: Array,
    first: int,
) -> dict[str, Array]:
    """The features by name, each (n,), before they are standardised; none has a unit."""
    layout, f = scaling.layout, season.factor[s.slot]
    p, x = flat.p, flat.x
    at = first - 1  # the first row of the series

    def mean(x: Array, w: int) -> Array:
        return trailing_mean(x, w, at)

    v = flat.reference[at:]
    sigma = np.sqrt(v)
    fast, middle = layout.fast, layout.fast[len(layout.fast) // 2]
    slow = fast[-1]
    out: dict[str, Array] = {}
    for w in fast:
        out[f"range {w}"] = 0.5 * np.log(mean(p, w) / v + FLOOR)
        out[f"return {w}"] = mean(x, w) * np.sqrt(w) / sigma
    for w in fast[1::2]:
        out[f"absolute {w}"] = np.log(mean(np.abs(x), w) / sigma + FLOOR)
        out[f"semivariance {w}"] = mean(x * np.abs(x), w) / (mean(x * x, w) + FLOOR * v)
    out["bodies"] = 0.5 * np.log((mean(s.garman / f**2, middle) / v + FLOOR) / (mean(p, middle) / v + FLOOR))
    quiet = 0.5 * np.log(p / flat.reference + FLOOR)
    for w in (middle, slow):
        out[f"roughness {w}"] = np.sqrt(np.maximum(mean(quiet**2, w) - mean(quiet, w) ** 2, 0))
        out[f"trend {w}"] = (s.price[at:] - mean(s.price, w)) / (sigma * np.sqrt(w))
    for w in (1, middle):
        out[f"location {w}"] = mean(s.location, w)
    volume = s.volume - season.volume[s.slot]
    for w in (1, *fast[2::2]):
        out[f"volume {w}"] = mean(volume, w)
    slot = s.slot[at:]
    for j, h in enumerate(scaling.horizons):
        out[f"level {h}"] = np.log(level[:, j])
        out[f"recent level {h}"] = np.log(_level(residuals[j], SHORT_LEVEL, h, first))
        out[f"gain {h}"] = np.log(season.gain[j][slot])
    h, e = scaling.horizons[0], residuals[0]
    out["bias"] = _realised(e, BIAS, h, first)[0]
    out["season"] = np.log(season.factor[slot])
    short = np.clip(e, -TAIL, TAIL)
    for w in layout.tails:
        square, size = _realised(short**2, w, h, first)[0], _realised(np.abs(e), w, h, first)[0]
        out[f"tails {w}"] = np.log((square + 1) / (size**2 + 0.7))
        out[f"skew {w}"] = _realised(short * np.abs(short), w, h, first)[0]
    if layout.far:
        out["reversion"] = 0.5 * np.log(np.maximum(mean(p, layout.far), TINY) / v)
    if layout.regime:
        out["regime"] = 0.5 * np.log(v / np.maximum(mean(p, layout.regime), TINY))
        out[f"range {layout.har[-2]}"] = 0.5 * np.log(mean(p, layout.har[-2]) / v + FLOOR)
        out["gap"] = (s.gap / f)[at:] / sigma
        out["still"] = mean((s.r == 0).astype(float), layout.har[-2])
        product = np.concatenate([np.zeros(1), x[1:] * x[:-1]])
        out[f"autocovariance {slow}"] = mean(product, slow) / v
    if layout.slots == 168:
        for hour in range(24):
            out[f"hour {hour}"] = (slot % 24 == hour).astype(float)
        out["week sin"], out["week cos"] = np.sin(2 * pi * slot / 168), np.cos(2 * pi * slot / 168)
    else:
        for day in range(7):
            out[f"weekday {day}"] = (slot == day).astype(float)
    return out


def _channels(s: _Series, flat: _Flat, season: Season) -> Array:
    """The normalised series, (N - 1, 4): each bar against the reference level of its own time."""
    columns = (
        flat.x / np.sqrt(flat.reference),
        0.5 * np.log(flat.p / flat.reference + FLOOR) + 0.5,
        s.location,
        s.volume - season.volume[s.slot],
    )
    return np.clip(np.stack(columns, 1), -CLIP, CLIP)


def _blank(timeframe: str, horizons: tuple[int, ...]) -> Scaling:
    layout, H = layout_of(timeframe), len(horizons)
    return Scaling(
        timeframe=timeframe,
        horizons=horizons,
        zone=ZONES[0],
        symbols=(),
        factor=np.ones((1, layout.slots)),
        volume=np.zeros((1, layout.slots)),
        har=np.zeros((H, layout.terms)),
        gain=np.ones((1, H, layout.slots)),
        mean=np.zeros(()),
        std=np.ones(()),
    )


def _checked(w: Window, scaling: Scaling) -> _Series:
    need = bars_to_learn(scaling.timeframe, scaling.horizons)
    if len(w) < need:
        raise DataError(f"{w.symbol} has {len(w)} bars to learn from: give at least {need}, or leave it out")
    check(w)
    s = _Series.of(w.close_times, w.values, scaling.layout, scaling.zone)
    if np.quantile(np.abs(s.r), 0.9) == 0:
        still = float((s.r == 0).mean())
        raise DataError(
            f"{w.symbol} closes unchanged in {still:.0%} of its bars: leave it out of the training"
        )
    return s
