"""Forecasts that were made before, kept in a folder by what their windows held: asked again, no model works.

A folder of the cache is of one forecaster, by all that identifies it. Its files are Parquet, each of the
closes of a thousand bars, and named after its own digest; several processes may write beside one
another. A forecaster that is calibrated is kept twice: before calibration, for other windows and other
calibrations, and after it.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from io import BytesIO
from itertools import product
from operator import attrgetter
from pathlib import Path
from threading import get_native_id
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.result import level_column
from barcast.backtest.workers import open_workers, remove_partials, run_jobs, write_whole, writing_in
from barcast.daemon.adjustments import by_symbol
from barcast.daemon.calendar import iso
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import (
    BASELINES,
    Adjustment,
    Calibrated,
    Card,
    ConfigError,
    Coverage,
    DataError,
    Forecast,
    Forecaster,
    Window,
    open_model,
)
from barcast.models.evaluation import windows_at
from barcast.models.quantiles import central
from barcast.models.window import hashed, window_at

BARS = 1024
"""Closes of a symbol in one file, at most."""
PENDING = 50_000
"""Forecasts that are held until they are written, at most."""
SPAN = 2000
"""Bars of a symbol that a process forecasts at once."""
ROWS = 300_000
"""Forecasts of a shelf that are held beside those of the span of closes that is at hand, at most."""
CARD = "card.json"
_Array = NDArray[np.float64]


class ForecastCache:
    """Opens the shelves of a folder.

    The state is the forecaster that was asked for last, with its shelves: one that serves no more is not
    held. `kept` counts the forecasts that were found, and `made` the windows that a model itself was asked
    about. Raise ConfigError for a folder that cannot be.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        with writing_in(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.kept = self.made = 0
        self._last: tuple[Forecaster, Forecaster] | None = None
        self._shelves: list[_Shelf] = []

    def of(self, forecaster: Forecaster) -> Forecaster:
        """The same forecaster, that asks the folder first. Paths are not kept: they are sampled anew."""
        if self._last is None or self._last[0] is not forecaster:
            self._flush()
            self._shelves = []
            if isinstance(forecaster, Calibrated):
                model: Forecaster = _Asked(self, forecaster.inner)
                asked: Forecaster = forecaster.over(self._kept(model))
            else:
                asked = _Asked(self, forecaster)
            self._last = forecaster, self._kept(asked)
        return self._last[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is not written yet. Raise ConfigError where that cannot be done."""
        self._flush()

    def _flush(self) -> None:
        for shelf in self._shelves:
            shelf.flush()

    def _kept(self, forecaster: Forecaster) -> Forecaster:
        if forecaster.card.path:
            return forecaster
        shelf = _Shelf(self.folder, forecaster.card)
        self._shelves.append(shelf)
        return _Kept(self, shelf, forecaster)


class Remembered:
    """What models said of windows that close before a moment, where these hold the same in all runs.

    The state is what they have said, by model, symbol and close.
    """

    def __init__(self, before: int) -> None:
        self._before = before
        self._said: dict[tuple[str, str, int], Forecast] = {}

    def of(self, forecaster: Forecaster) -> Forecaster:
        """The same forecaster, whose model is asked once about each of them."""
        if isinstance(forecaster, Calibrated):
            return forecaster.over(_Recalled(forecaster.inner, self._before, self._said))
        return _Recalled(forecaster, self._before, self._said)


class _Recalled:
    """A model that is asked once about each window before a moment."""

    def __init__(self, model: Forecaster, before: int, said: dict[tuple[str, str, int], Forecast]) -> None:
        self.card = model.card
        self._model, self._before, self._said = model, before, said

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """See `Forecaster.forecast`."""
        keys = [(self.card.model, w.symbol, w.close_times.item(-1)) for w in windows]
        found = [self._said.get(key) for key in keys]
        new = [w for w, forecast in zip(windows, found, strict=True) if forecast is None]
        made = iter(self._model.forecast(new) if new else ())
        all_of = [next(made) if forecast is None else forecast for forecast in found]
        self._said |= {key: f for key, f in zip(keys, all_of, strict=True) if key[2] < self._before}
        return all_of


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose forecasts a folder is to be filled with: how the model is opened, and the closes (ns)."""

    folder: Path
    model: str
    timeframe: str
    sampler: str | None
    steps: int | None
    since: int
    until: int

    def there(self) -> "Wanted":
        """The same for a worker, whose working directory may be another one."""
        model = self.model if self.model in BASELINES else str(Path(self.model).absolute())
        return replace(self, folder=self.folder.absolute(), model=model)


@dataclass(frozen=True, slots=True)
class _Part:
    """Windows of a history that a process forecasts, by the places where they end; or `inner`: what a
    calibrated forecaster asks its own. `card` is the forecaster's, where the parts are made.
    """

    wanted: Wanted
    card: Card
    inner: bool
    history: Window
    ends: range
    adjustments: tuple[Adjustment, ...]


def prefill(
    wanted: Wanted,
    histories: Mapping[str, Window],
    adjustments: Iterable[Adjustment] = (),
    *,
    backend: str = "loky",
    jobs: int = -1,
    address: str | None = None,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> int:
    """Fill a cache with all forecasts of histories, on the workers of a backend; return how many there are.

    First what the model says of each bar, in parts of symbols and time that know nothing of one another;
    then, of a calibrated one, what is published, symbol by symbol. Each window goes to the model alone, in
    the shape of the live service, so that all bits are those of a replay. `progress` is told of windows.

    For `backend`, `jobs` and `address` see `workers.open_workers`; the model and the folder must be at the
    same paths for every worker. Raise as `open_model` does; ConfigError for a folder that cannot be written,
    and for a worker that computes under another fingerprint; DataError where nothing is to be forecast, and
    where what workers wrote is not here.
    """
    wanted, own = wanted.there(), by_symbol(adjustments)
    forecaster = open_model(wanted.model, wanted.timeframe, wanted.sampler, wanted.steps)
    stages = (True, False) if isinstance(forecaster, Calibrated) else (False,)
    with open_workers(backend, jobs, address):
        for inner in stages:
            parts = [
                (symbol, *part)
                for symbol, history in histories.items()
                for part in _parts(wanted, inner, forecaster, history)
            ]
            if not parts:
                raise DataError(
                    f"Nothing is to be forecast from {iso(wanted.since)} to {iso(wanted.until)}, where the "
                    f"bars end: no symbol has a close between them with {forecaster.card.min_window} bars, "
                    f"which {forecaster.card.model} needs, up to it; give more history before it, or another "
                    "span."
                )
            over = 0

            def done(
                count: int, parts: Sequence[tuple[str, int, range]] = parts, inner: bool = inner
            ) -> None:
                nonlocal over
                what = "before calibration" if inner else "as published"
                for symbol, _, ends in parts[over:count]:
                    progress(len(ends), f"{symbol}, {what}")
                over = max(over, count)

            jobs_of = (
                _Part(
                    wanted,
                    forecaster.card,
                    inner,
                    histories[symbol].part(first, first + ends.stop),
                    ends,
                    tuple(own.get(symbol, ())),
                )
                for symbol, first, ends in parts
            )
            try:
                run_jobs(_fill, jobs_of, done)
            finally:
                _opened.cache_clear()  # of one that worked here itself
    shelf, length = _Shelf(wanted.folder, forecaster.card), forecaster.card.window
    newest: list[Window] = []
    for symbol, first, ends in parts:  # of each part, what was forecast last
        part = hashed(histories[symbol].part(max(0, first + ends.stop - length), first + ends.stop))
        newest.append(window_at(part, len(part) - 1, length, own.get(symbol, ())))
    if None in shelf.find(sorted(newest, key=attrgetter("close_time"))):
        raise DataError(
            f"{shelf.folder}: workers have written there, and it is not here: the folder must be one that "
            "all workers share"
        )
    return sum(len(ends) for _, _, ends in parts)


def _parts(
    wanted: Wanted, inner: bool, forecaster: Forecaster, history: Window
) -> Iterator[tuple[int, range]]:
    """The first bar of each part of a history, and the places from there where its windows end."""
    card, reach = forecaster.card, SPAN
    places = np.arange(*np.searchsorted(history.close_times, (wanted.since, wanted.until + 1)))
    if isinstance(forecaster, Calibrated):
        if inner and len(places):  # calibration asks of the bars before, too
            places = np.arange(max(0, int(places[0]) - card.window), int(places[-1]) + 1)
            card = forecaster.inner.card
        elif not inner:
            reach = max(1, len(places))  # it goes on from bar to bar
    places = places[places + 1 >= card.min_window]
    for k in range(0, len(places), reach):
        ends = places[k : k + reach]
        first = max(0, int(ends[0]) + 1 - card.window)
        yield first, range(int(ends[0]) - first, int(ends[-1]) + 1 - first)


@lru_cache(4)  # as many threads as a worker of a cluster may have
def _opened(wanted: Wanted, card: Card, _thread: int) -> Forecaster:
    """The forecaster, which a worker has many parts of, if it is that of the card; no threads share one."""
    forecaster = open_model(wanted.model, wanted.timeframe, wanted.sampler, wanted.steps)
    if forecaster.card != card:
        raise ConfigError(
            f"{wanted.model}: a worker has {forecaster.card.model} under the fingerprint "
            f"{forecaster.card.fingerprint!r}, this machine {card.model} under {card.fingerprint!r}: take "
            "workers with the same model, packages and processor"
        )
    return forecaster


def _fill(part: _Part) -> None:
    forecaster = _opened(part.wanted, part.card, get_native_id())
    if part.inner and isinstance(forecaster, Calibrated):
        forecaster = forecaster.inner
    with ForecastCache(part.wanted.folder) as cache:
        known = cache.of(forecaster)
        for windows in windows_at(hashed(part.history), part.ends, known.card.window, part.adjustments):
            known.forecast(windows)


class _Asked:
    """A model itself: counts what it is asked."""

    def __init__(self, cache: ForecastCache, model: Forecaster) -> None:
        self._cache, self._model = cache, model
        self.card = model.card

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """See `Forecaster.forecast`."""
        self._cache.made += len(windows)
        return self._model.forecast(windows)


class _Kept:
    """A forecaster in front of which there is a shelf."""

    def __init__(self, cache: ForecastCache, shelf: "_Shelf", inner: Forecaster) -> None:
        self._cache, self._shelf, self._inner = cache, shelf, inner
        self.card = inner.card

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """See `Forecaster.forecast`; what a window without a digest gets is not kept."""
        found = self._shelf.find(windows)
        if lacking := [k for k, forecast in enumerate(found) if forecast is None]:
            asked = [windows[k] for k in lacking]
            for k, window, forecast in zip(lacking, asked, self._inner.forecast(asked), strict=True):
                found[k] = forecast
                self._shelf.put(window.digest, forecast)
        self._cache.kept += len(windows) - len(lacking)
        return [forecast for forecast in found if forecast is not None]


class _Span:
    """The forecasts of a span of closes: arrays of one row each, and the row by the window's digest."""

    __slots__ = ("covered", "mean", "outcomes", "quantiles", "rise", "rows", "std", "warming")

    def __init__(self, frame: pl.DataFrame, layout: "_Layout") -> None:
        H, Q = len(layout.horizons), len(layout.levels)
        names, coverage = [*layout.quantiles, *layout.mean, *layout.std, *layout.rise], []
        self.outcomes: list[tuple[int, ...]] = []
        if (frame[layout.outcomes[0]] != 0).any():
            self.outcomes, coverage = frame.select(layout.outcomes).rows(), layout.covered
        figures = frame.select(*names, *coverage).to_numpy(order="c")  # (n, H Q + 3 H + I H)
        figures.flags.writeable = False
        n = len(frame)
        first, second, third, last = (H * Q + k * H for k in range(4))
        self.rows: dict[bytes, int] = dict(zip(frame["window"].to_list(), range(n), strict=True))
        self.quantiles = figures[:, :first].reshape(n, H, Q)
        self.mean, self.std = figures[:, first:second], figures[:, second:third]
        self.rise = figures[:, third:last]
        self.warming: list[bool] = frame["warming"].to_list()
        self.covered = figures[:, last:].reshape(n, len(coverage) // H, H)


class _Layout:
    """The columns of the figures of one card's forecasts."""

    def __init__(self, card: Card) -> None:
        self.horizons, self.levels = card.horizons, card.levels
        self.intervals = tuple(round(card.levels[j] - card.levels[i], 12) for i, j in central(card.levels))
        self.quantiles = [f"{level_column(q)}_{h}" for h, q in product(card.horizons, card.levels)]
        self.mean, self.std, self.rise, self.outcomes = (
            [f"{name}_{h}" for h in card.horizons] for name in ("mean", "std", "rise", "outcomes")
        )
        self.covered = [f"covered{100 * p:g}_{h}" for p, h in product(self.intervals, card.horizons)]
        figures = [*self.quantiles, *self.mean, *self.std, *self.rise, *self.covered]
        self.schema = pl.Schema(
            {
                "window": pl.Binary(),
                "symbol": pl.String(),
                "close_time": pl.Datetime("ns", "UTC"),
                "warming": pl.Boolean(),
                **dict.fromkeys(figures, pl.Float64()),
                **dict.fromkeys(self.outcomes, pl.Int32()),
            }
        )


class _Shelf:
    """The files of one card.

    The state is what is not written yet, by the digest of its window; the spans that are held, the one that
    was asked for last at the end; and the number of that, which most windows have again.
    """

    def __init__(self, folder: Path, card: Card) -> None:
        told = json.dumps(asdict(card) | {"barcast": version("barcast")}, sort_keys=True, indent=1)
        self.folder = folder / f"{card.model[:40]}-{blake2b(told.encode(), digest_size=8).hexdigest()}"
        self.card = card
        self._told = told
        self._layout = _Layout(card)
        self._length = BARS * (Timeframe.parse(card.timeframe).duration or DAY)
        self._pending: dict[bytes, Forecast] = {}
        self._spans: OrderedDict[int, _Span] = OrderedDict()
        self._last: int | None = None

    def find(self, windows: Sequence[Window]) -> list[Forecast | None]:
        """What was said of windows, where that is known."""
        found: list[Forecast | None] = []
        horizons, levels, length = self.card.horizons, self.card.levels, self._length
        for window in windows:
            digest, close_time = window.digest, window.close_times.item(-1)
            if digest is None:
                found.append(None)
                continue
            if (number := close_time // length) != self._last:
                self._turn_to(number)
            span = self._spans[number]
            row = span.rows.get(digest)
            if row is None:
                found.append(self._pending.get(digest))
                continue
            coverage = None
            if span.outcomes and span.outcomes[row][0]:
                coverage = Coverage(self._layout.intervals, span.covered[row], span.outcomes[row])
            found.append(
                Forecast(
                    window.symbol,
                    close_time,
                    window.values.item(-1, 3),
                    horizons,
                    levels,
                    span.quantiles[row],
                    span.mean[row],
                    span.std[row],
                    span.rise[row],
                    span.warming[row],
                    coverage,
                )
            )
        return found

    def put(self, digest: bytes | None, forecast: Forecast) -> None:
        """Keep what was said of a window."""
        if digest is None:
            return
        self._pending[digest] = forecast
        if len(self._pending) >= PENDING:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet, a file for each span."""
        self._last = None
        spans: dict[int, list[tuple[bytes, Forecast]]] = {}
        for digest, forecast in self._pending.items():
            spans.setdefault(forecast.close_time // self._length, []).append((digest, forecast))
        if spans:
            remove_partials(self.folder)
        for number, rows in spans.items():
            self._write(number, self._frame(rows))
            self._spans.pop(number, None)
        self._pending = {}

    def _frame(self, rows: Sequence[tuple[bytes, Forecast]]) -> pl.DataFrame:
        layout, H = self._layout, len(self.card.horizons)
        nothing = Coverage((), np.full((len(layout.intervals), H), np.nan), (0,) * H)
        said = [(forecast, forecast.coverage or nothing) for _, forecast in rows]
        figures = np.array(
            [np.concatenate([f.quantiles.ravel(), f.mean, f.std, f.rise, c.share.ravel()]) for f, c in said]
        )
        names = [*layout.quantiles, *layout.mean, *layout.std, *layout.rise, *layout.covered]
        frame = pl.DataFrame(
            {
                "window": [digest for digest, _ in rows],
                "symbol": [f.symbol for f, _ in said],
                "close_time": [f.close_time for f, _ in said],
                "warming": [f.warming for f, _ in said],
                **dict(zip(names, figures.T, strict=True)),
                **dict(zip(layout.outcomes, zip(*(c.outcomes for _, c in said), strict=True), strict=True)),
            }
        )
        return frame.cast(layout.schema).sort("close_time", "symbol", "window")

    def _write(self, number: int, frame: pl.DataFrame) -> None:
        if not (self.folder / CARD).exists():
            write_whole(self.folder / CARD, self._told.encode())
        content = BytesIO()
        frame.write_parquet(content, compression="lz4")  # read in half the time of zstd
        told = content.getvalue()
        write_whole(self.folder / f"{number}-{_digest(told)}.parquet", told)

    def _turn_to(self, number: int) -> None:
        """Have the span at hand; those that were longest not asked for make room first."""
        self._last = None  # as long as there is none: what is read may be damaged
        if number not in self._spans:
            while sum(len(span.rows) for span in self._spans.values()) > ROWS:
                self._spans.popitem(last=False)
            self._spans[number] = self._load(number)
        self._spans.move_to_end(number)
        self._last = number

    def _load(self, number: int) -> _Span:
        frames = [pl.DataFrame(schema=self._layout.schema)]
        for path in sorted(self.folder.glob(f"{number}-*.parquet")):
            try:
                told = path.read_bytes()
            except FileNotFoundError:  # they may be removed at any time: what is lacking is forecast again
                continue
            except OSError as error:
                raise ConfigError(f"{path}: {error}; let the user of this program read it") from error
            if path.stem.rpartition("-")[2] != _digest(told):
                raise DataError(f"{path}: is damaged; remove it: what is lacking is forecast again")
            frames.append(pl.read_parquet(told))
        return _Span(pl.concat(frames), self._layout)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
