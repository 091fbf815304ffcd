"""Rows of a backtest that may be more than memory holds: frames while they are few, else Parquet files."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Literal
from weakref import finalize

import polars as pl

from barcast.backtest.workers import writing_in

Rows = pl.DataFrame | pl.LazyFrame
"""A frame, or what is read from files: its rows are then in order of their close."""

ROOM = 64 * 2**20
"""Bytes that the tables of a store hold in memory, in all."""

SPAN = 2**18
"""Rows that are read from files at once: sums over more are sums of sums, which shows in their last bits."""

PREFIX = ".barcast-"
"""How the names of folders begin in which a run keeps what memory does not hold."""


@contextmanager
def scratch_in(parent: Path | None) -> Iterator[Path]:
    """A folder for what memory does not hold, that goes with the context.

    It is made in `parent`, by default among the system's temporary files. Raise ConfigError where it cannot
    be.
    """
    with ExitStack() as stack:
        with writing_in(parent):
            folder = stack.enter_context(TemporaryDirectory(prefix=PREFIX, dir=parent))
        yield Path(folder)


class Store:
    """Tables that share a room in memory; what it does not hold lies in a folder that goes with them.

    `parent` is where that folder is made once it is needed, by default among the system's temporary files.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._folder = _Folder(parent)
        self._tables: list[Table] = []

    def table(self, schema: pl.Schema) -> "Table":
        """A table without rows; `schema` is what it has as long as there are none."""
        table = Table(self._folder, schema)
        self._tables.append(table)
        return table

    def settle(self) -> None:
        """Write what all tables hold, if that is more than the room. Raise ConfigError where it cannot be."""
        if sum(table.size for table in self._tables) > ROOM:
            for table in self._tables:
                table.write()


class _Folder:
    """Where the files of tables are; it refers to none of them, so that it goes as soon as they do."""

    def __init__(self, parent: Path | None) -> None:
        self.parent = parent
        self._path: Path | None = None
        self._count = 0

    def file(self) -> Path:
        """Where the next file of a table is to be. Raise OSError where the folder cannot be made."""
        if self._path is None:
            self._path = Path(mkdtemp(prefix=PREFIX, dir=self.parent))
            finalize(self, shutil.rmtree, self._path, ignore_errors=True)
        self._count += 1
        return self._path / f"{self._count:07}.parquet"


class Table:
    """Rows in the order in which they were added. The state is the frames in memory, and the files."""

    def __init__(self, folder: _Folder, schema: pl.Schema) -> None:
        self._folder, self.schema = folder, schema
        self._held: list[pl.DataFrame] = []
        self._files: list[Path] = []
        self.size = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Add rows."""
        if frame.height:
            self._held.append(frame)
            self.size += int(frame.estimated_size())

    def write(self) -> None:
        """Put what is in memory into a file. Raise ConfigError where that cannot be done."""
        if self._held:
            with writing_in(self._folder.parent):
                path = self._folder.file()
                write_rows(pl.concat(self._held, how="diagonal"), path, "lz4")
            self._files.append(path)
            self._held, self.size = [], 0

    def parts(self) -> list[Rows]:
        """The rows as a frame, or as files one after another; nothing where there is no row."""
        if self._files:
            self.write()
            return [pl.scan_parquet(path, glob=False) for path in self._files]
        if len(self._held) > 1:
            self._held = [pl.concat(self._held, how="diagonal", rechunk=True)]
        return [*self._held]

    def rows(self) -> Rows:
        """All rows."""
        return joined([self])


def joined(tables: Sequence[Table]) -> Rows:
    """The rows of tables with one schema, one table after another: a frame, unless some lie in files."""
    parts = [part for table in tables for part in table.parts()]
    if len(parts) == 1:
        return parts[0]
    frames = [part for part in parts if isinstance(part, pl.DataFrame)]
    if len(frames) < len(parts):
        return pl.concat([part.lazy() for part in parts], how="diagonal")
    return pl.concat(frames, rechunk=True) if frames else pl.DataFrame(schema=tables[0].schema)


def write_rows(rows: Rows, path: Path, compression: Literal["lz4", "zstd"] = "zstd") -> None:
    """Write rows into a Parquet file. Raise OSError where that cannot be done."""
    write = rows.sink_parquet if isinstance(rows, pl.LazyFrame) else rows.write_parquet
    try:
        write(path, compression=compression)
    except pl.exceptions.ComputeError as error:  # such as a full disk
        raise OSError(str(error)) from error


def collected(rows: Rows) -> pl.DataFrame:
    """All rows in memory."""
    return rows if isinstance(rows, pl.DataFrame) else rows.collect().rechunk()


def spans(rows: Rows) -> Iterator[pl.DataFrame]:
    """The rows by whole closes, about `SPAN` of those that lie in files at once; a frame is one span.

    Raise ValueError for files whose rows are not in order of their close.
    """
    if isinstance(rows, pl.DataFrame):
        yield rows
        return
    rest, newest = pl.DataFrame(), None
    for found in _cut(rows):
        closes = found["close_time"]
        if not closes.is_sorted() or (newest is not None and closes[0] < newest):
            raise ValueError(f"rows are not in order of their closes: {closes[0]} comes after {newest}")
        newest = closes[-1]
        whole = pl.concat([rest, found]) if rest.height else found
        done = whole["close_time"] < newest
        rest = whole.filter(~done)
        if done.any():
            yield whole.filter(done).rechunk()
    if rest.height:
        yield rest.rechunk()


def _cut(rows: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """The rows in pieces of `SPAN`, which polars hands out as it reads them."""
    held = pl.DataFrame()
    for found in rows.collect_batches(chunk_size=SPAN):
        held = pl.concat([held, found]) if held.height else found
        while held.height >= SPAN:
            yield held.head(SPAN)
            held = held.slice(SPAN)
    if held.height:
        yield held


def between(rows: Rows, others: pl.DataFrame) -> pl.DataFrame:
    """Those of the rows that are of the closes that a span of others has; all of a frame."""
    if isinstance(rows, pl.DataFrame):
        return rows
    closes = others["close_time"]
    return collected(rows.filter(pl.col("close_time").is_between(closes[0], closes[-1])))
