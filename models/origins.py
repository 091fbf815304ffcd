"""Forecast origins to learn from: what the network would have seen at each, and what then happened."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barcast.models.errors import ConfigError, DataError
from barcast.models.evaluation import even_stride, every
from barcast.models.scaling import CHANNELS, Scaling, check, check_to_learn, fit
from barcast.models.window import Window

BLOCKS = 4  # equal parts of the origins, by calendar, for cross-validation
LEAST = 100  # origins to learn from, and to validate on
MOST = 500_000  # origins of a part that are kept: a phase draws no more than 460,800 for each member
OUTLIER = 50.0  # outcomes count as at most this many scales


@dataclass(frozen=True, slots=True, eq=False)
class Origins:
    """n forecast origins over H horizons, with the T rows of channels and prices of all symbols."""

    features: Tensor  # (n, F)
    channels: Tensor  # (T, C)
    prices: Tensor  # (T, 3) log of close, high and low, float64
    row: Tensor  # (n,): the row of the origin's bar
    z: Tensor  # (n, H) outcome over scale, float64
    scale: Tensor  # (n, H)
    block: Tensor  # (n, 2): the block of the origin's bar, and that of its last outcome
    closes: Tensor  # (n, 2): the close of the origin's bar, and that of its last outcome, in nanoseconds

    def __len__(self) -> int:
        return len(self.row)

    def thin(self, n: int) -> "Origins":
        """About n of the origins, see `thinned`."""
        return self.only(thinned(torch.arange(len(self)), n))

    def only(self, keep: Tensor) -> "Origins":
        """Some of the origins, by index."""
        return Origins(
            self.features[keep],
            self.channels,
            self.prices,
            self.row[keep],
            self.z[keep],
            self.scale[keep],
            self.block[keep],
            self.closes[keep],
        )

    def sequence(self, at: Tensor, context: int) -> Tensor:
        """The sequences (b, L, C) of some origins (b,), L = context."""
        return self.channels[self.row[at][:, None] + torch.arange(1 - context, 1)]

    def path(self, steps: Sequence[int]) -> Tensor:
        """The log returns (n, G) float64 from each origin's close to those so many steps ahead."""
        start = self.prices[self.row, :1]
        return self.prices[self.row[:, None] + torch.tensor(steps), 0] - start

    def reach(self, steps: Sequence[int]) -> Tensor:
        """The highest high and lowest low (n, G, 2) of the bars up to each step, after the one before it.

        They are log returns from the origin's close, as float64.
        """
        start = self.prices[self.row, :1]
        found = []
        for first, last in pairwise((0, *steps)):
            bars = self.prices[self.row[:, None] + torch.arange(first + 1, last + 1)]  # (n, bars, 3)
            found.append(torch.stack([bars[..., 1].amax(1), bars[..., 2].amin(1)], -1) - start)
        return torch.stack(found, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Histories(Collection[Window]):
    """Some of the histories of a collection, up to a close; each is cut anew whenever it is asked for.

    Where that maps them from files, memory holds no more than what is being read.
    """

    whole: Collection[Window]
    symbols: tuple[str, ...]  # in the order of `whole`
    until: int

    def __iter__(self) -> Iterator[Window]:
        return (_cut(w, self.until) for w in self.whole if w.symbol in self.symbols)

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self.symbols


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Histories up to `until`, and where they are cut into calendar parts, the same for every symbol.

    Learning ends at `train_end`, validation at `validation_end`; what follows up to `until` is held out.
    Without a validation part the two ends are one. `left_out` are the symbols that cannot be used.
    """

    histories: "Histories"
    left_out: tuple[str, ...]
    until: int
    train_end: int
    validation_end: int

    def only(self, symbols: Collection[str]) -> "Parts":
        """The same with some of the symbols; the others are left out."""
        kept = replace(self.histories, symbols=tuple(s for s in self.histories.symbols if s in symbols))
        others = (s for s in self.histories.symbols if s not in symbols)
        return Parts(kept, (*self.left_out, *others), self.until, self.train_end, self.validation_end)

    def past(self, origins: int, fingerprint: str) -> dict[str, Any]:
        """The fields of a `Past` that has learnt from these bars and so many origins."""
        return {
            "data": self.digest,
            "symbols": self.histories.symbols,
            "left_out": self.left_out,
            "bars": sum(len(w) for w in self.histories),
            "origins": origins,
            "until": self.until,
            "train_end": self.train_end,
            "validation_end": self.validation_end,
            "fingerprint": fingerprint,
        }

    @property
    def digest(self) -> str:
        """sha256 of all bars up to `until`."""
        h = sha256()
        for w in self.histories:
            h.update(f"{w.symbol} {len(w)}\n".encode())
            h.update(np.ascontiguousarray(w.close_times).data)
            h.update(np.ascontiguousarray(w.values).data)
        return h.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Split(Parts):
    """Parts whose origins are collected, of the symbols that are long enough to learn from and move.

    The outcomes of a part are realised before it ends. Without a validation part `validation` is None.
    """

    scaling: Scaling
    learn: Origins
    validation: Origins | None


def thinned(at: Tensor, n: int) -> Tensor:
    """About n of some origins (k,), evenly spread over bars, hours and weekdays."""
    return at[torch.from_numpy(every(len(at), even_stride(len(at), n)))]


class Table:
    """Rows of one width that are added piece by piece and then become one tensor (n, width).

    In a folder they lie in a file without a name, mapped into memory: it is gone with the tensor, however the
    process ends. Without one they lie in memory. The numbers are the same.
    """

    def __init__(self, width: int, dtype: type[np.generic], folder: Path | None) -> None:
        self._width, self._dtype, self._folder = width, np.dtype(dtype), folder
        self._rows = 0
        try:
            self._file = BytesIO() if folder is None else TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}; name a directory that you may write") from error

    def __len__(self) -> int:
        return self._rows

    def add(self, rows: NDArray[Any]) -> None:
        """Add rows (k, width), or (k,) where the width is 1; raise `ConfigError` when the disk is full."""
        with self._room():
            self._file.write(rows.astype(self._dtype).tobytes())
        self._rows += len(rows)

    def tensor(self) -> Tensor:
        """All rows; the table is closed by it and must hold one at least. Raises as `add`."""
        shape = (self._rows, self._width)
        if isinstance(self._file, BytesIO):
            return torch.frombuffer(self._file.getbuffer(), dtype=_TORCH[self._dtype.type]).reshape(shape)
        with self._room(), self._file:
            self._file.flush()
            return torch.from_numpy(np.memmap(self._file, self._dtype, "c", shape=shape))

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self._folder}: {error.strerror}; make room, or train fewer bars") from error


_TORCH = {np.float32: torch.float32, np.float64: torch.float64, np.int64: torch.int64}


def parts(histories: Collection[Window], until: int | None, *, validation: float, hold_out: float) -> Parts:
    """Cut whole histories; no bar after `until`, by default the newest, is looked at.

    `hold_out` is the share of the newest bars that are left alone, `validation` that of the rest. Raises
    `DataError` for histories without a bar, or with an unusable one, and for what is no history of bars.
    """
    for w in histories:
        if not isinstance(w, Window):
            raise DataError(f"{type(w).__name__} is no history of bars: what is made up is not learnt from")
    said = "" if until is None else f" closed by {to_text(until)}"
    if until is None:
        until = max((w.close_time for w in histories if len(w)), default=0)
    begun = {w.symbol: len(_cut(w, until)) > 0 for w in histories}
    cut = Histories(histories, tuple(s for s, some in begun.items() if some), until)
    if not cut:
        raise DataError(f"there are no bars{said} to learn from: check the symbols and the date")
    for w in cut:
        check(w)
    times = [w.close_times for w in cut]
    last = sum(map(len, times)) - 1
    shares = (1 - hold_out) * (1 - validation), 1 - hold_out
    train_end, validation_end = (_nth(times, int(x * last)) for x in shares)
    empty = tuple(s for s, some in begun.items() if not some)
    return Parts(cut, empty, until, train_end, validation_end)


def split(
    histories: Collection[Window],
    timeframe: str,
    horizons: tuple[int, ...],
    until: int | None,
    folder: Path | None = None,
    *,
    validation: float,
    hold_out: float,
) -> Split:
    """Cut whole histories as `parts` does, learn the scaling and collect the origins.

    Of more than `MOST` origins of a part so many are kept, evenly thinned. What the network sees lies on the
    disk of `folder`, or in memory without one. Raises `DataError` for histories that cannot be learnt from.
    """
    whole = parts(histories, until, validation=validation, hold_out=hold_out)
    train_end, validation_end = whole.train_end, whole.validation_end
    used, faults = [], []
    for w in whole.histories:
        try:
            check_to_learn(_cut(w, train_end), timeframe, horizons)
        except DataError as error:  # one symbol that was halted or listed lately must not stop the others
            faults.append(str(error))
        else:
            used.append(w.symbol)
    if not used:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DataError(f"no symbol is left to learn from; {'; '.join(faults[:3])}{more}")
    kept = whole.only(used)
    scaling = fit(replace(kept.histories, until=train_end), timeframe, horizons)
    learn, validated = _collect(kept, scaling, folder)
    return Split(
        kept.histories, kept.left_out, kept.until, train_end, validation_end, scaling, learn, validated
    )


class _Part:
    """The origins of a part while they are collected, as the tables of `Origins`."""

    def __init__(self, features: int, horizons: int, folder: Path | None) -> None:
        self.features = Table(features, np.float32, folder)
        self.row = Table(1, np.int64, folder)
        self.z = Table(horizons, np.float64, folder)
        self.scale = Table(horizons, np.float64, folder)
        self.block = Table(2, np.int64, folder)
        self.closes = Table(2, np.int64, folder)

    def origins(self, channels: Tensor, prices: Tensor) -> Origins:
        tables = (self.features, self.row, self.z, self.scale, self.block, self.closes)
        features, row, z, scale, block, closes = (t.tensor() for t in tables)
        return Origins(features, channels, prices, row[:, 0], z, scale, block, closes)


def _collect(data: Parts, scaling: Scaling, folder: Path | None) -> tuple[Origins, Origins | None]:
    """Some bars of a symbol after the other, so that memory holds the numbers of these alone."""
    reach, horizons = max(scaling.horizons), scaling.horizons
    first = scaling.layout.har[-1] + 1
    learnt, validated = _spans(data, first, reach)
    edges = _edges(data.histories, learnt)
    channels, prices = Table(CHANNELS, np.float32, folder), Table(3, np.float64, folder)
    F, H = len(scaling.mean), len(horizons)
    parts = [(_Part(F, H, folder), spans, _kept(spans)) for spans in (learnt, validated)]
    for number, w in enumerate(data.histories):
        row = len(channels)
        price = np.log(w.values[:, 3])
        for frame in scaling.frames(w.symbol, w.close_times, w.values, first):
            end = frame.first + len(frame.features)
            for part, spans, kept in parts:
                before = sum(map(len, spans[:number]))
                own = spans[number]
                low, high = max(own.start, frame.first), min(own.stop, end)
                k = own.start + _between(kept, before + low - own.start, before + high - own.start) - before
                i, ahead = k - frame.first, k[:, None] + np.array(horizons)
                scale = frame.scale[i]
                part.features.add(frame.features[i])
                part.row.add(row + k - 1)
                part.z.add(np.clip((price[ahead] - price[k][:, None]) / scale, -OUTLIER, OUTLIER))
                part.scale.add(scale)
                closes = w.close_times[np.stack([k, k + reach], 1)]
                part.block.add(np.searchsorted(edges, closes))
                part.closes.add(closes)
            channels.add(frame.channels)
        prices.add(np.log(w.values[1:, [3, 1, 2]]))
    apart = data.validation_end > data.train_end
    for (part, _, _), what in list(zip(parts, ("learn from", "validate on"), strict=True))[: 1 + apart]:
        if len(part.row) < LEAST:
            raise DataError(f"only {len(part.row)} forecast origins to {what}, not {LEAST}: give more bars")
    bars = channels.tensor(), prices.tensor()
    learn, look = (part for part, _, _ in parts)
    return learn.origins(*bars), look.origins(*bars) if apart else None


def _spans(data: Parts, first: int, reach: int) -> tuple[list[range], list[range]]:
    """The bars of each symbol that are origins to learn from, and to validate on.

    They lie in the part, and so does the bar `reach` after them.
    """
    learnt, validated = [], []
    for w in data.histories:
        ends = (data.train_end, data.validation_end)
        trained, known = (int(np.searchsorted(w.close_times, end, "right")) for end in ends)
        learnt.append(range(first, max(first, trained - reach)))
        since = max(first, trained)
        validated.append(range(since, max(since, known - reach)))
    return learnt, validated


def _kept(spans: Sequence[range]) -> NDArray[np.int64]:
    """Which origins of a part are kept, counted through its symbols."""
    count = sum(map(len, spans))
    return every(count, even_stride(count, MOST))


def _between(places: NDArray[np.int64], low: int, high: int) -> NDArray[np.int64]:
    """Those of ascending places with low <= place < high."""
    a, b = np.searchsorted(places, [low, high])
    return places[a : max(a, b)]


def _edges(histories: Collection[Window], learnt: Sequence[range]) -> NDArray[np.int64]:
    """The last origin (nanoseconds) of each block but the newest, (BLOCKS - 1,); blocks have equal counts."""
    opened = [w.close_times[own.start : own.stop] for w, own in zip(histories, learnt, strict=True)]
    count = sum(map(len, opened))
    if count < BLOCKS:
        return np.zeros(BLOCKS - 1, np.int64)
    return np.array([_nth(opened, count * (b + 1) // BLOCKS - 1) for b in range(BLOCKS - 1)], np.int64)


def _nth(times: Sequence[NDArray[np.int64]], n: int) -> int:
    """The n-th, from 0, of all of several ascending times, found by bisection: it reads a few of them."""
    some = [t for t in times if len(t)]
    low, high = min(int(t[0]) for t in some), max(int(t[-1]) for t in some)
    while low < high:
        middle = (low + high) // 2
        if sum(int(np.searchsorted(t, middle, "right")) for t in some) > n:
            high = middle
        else:
            low = middle + 1
    return low


def to_text(time: int) -> str:
    """A time in nanoseconds as people read it, to the second."""
    return f"{np.datetime_as_string(np.datetime64(time, 'ns'), 's')}Z"


def _cut(w: Window, until: int) -> Window:
    n = int(np.searchsorted(w.close_times, until, "right"))
    return Window(w.symbol, w.close_times[:n], w.values[:n])
