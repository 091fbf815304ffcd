"""Sweeps: every cell of strategy, model and sampler on folds of time, and what a choice among them made.

A job is the cells of one variant on one fold: a backtest of its own, a function of files and settings alone.
What it finds of a cell is a file in the folder, named by the digest of all that it depends on, so that a
sweep goes on where it was ended, and neither backend, number of workers nor order changes a byte of it. A
cell does not depend on those that share its backtest.

The walk-forward choice of a fold is the cell that was best in the folds before it; the first fold is only
looked back at. So whatever happens in a fold changes nothing that was chosen for it.
"""

import fcntl
import hashlib
import json
import re
import shutil
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from io import BytesIO
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest import metrics
from barcast.backtest.arguments import (
    Moment,
    check_adjustments,
    check_execution,
    listed,
    nanoseconds,
    paths_of,
)
from barcast.backtest.cache import ForecastCache
from barcast.backtest.caveats import few
from barcast.backtest.grid import (
    BATCH,
    Cell,
    First,
    Search,
    Template,
    Variant,
    digest_of,
    grid,
    spelt,
    variants,
)
from barcast.backtest.ledger import BENCHMARK, EQUITY, FILLS, TIME, Execution
from barcast.backtest.metrics import portfolio
from barcast.backtest.replay import found_timeframe, learnt_until, run_backtest
from barcast.backtest.result import json_rows
from barcast.backtest.scoring import POOLED
from barcast.backtest.tables import PREFIX
from barcast.backtest.workers import is_partial, open_workers, run_jobs, write_whole, writing_in
from barcast.daemon.calendar import Calendars, iso
from barcast.daemon.history import Stamp, digest, read_windows, scan
from barcast.daemon.pipeline import StrategySettings, first_asked
from barcast.daemon.timeframe import Timeframe
from barcast.models import Adjustment, BarcastError, ConfigError, DataError

CRITERIA = ("sharpe", "sortino", "calmar", "total_return")
"""By which cells can be ranked, see `metrics.DEFINITIONS`; more is better."""

FOLDS = 4
TOGETHER = 32
"""Cells that share a backtest at most: a constant, so that jobs are the same wherever they run."""

INDEX = "sweep.json"
"""The file with all tables and what identifies the sweep: it is written last."""
FORMAT = 1
JOBS = "jobs"
"""The folder of what was found of each cell and fold."""

LOCK = ".lock"
MAGIC = b"barcast-sweep-1\n"
_NAME = re.compile(r"[0-9a-f]{64}\.job")

CHAINED = (
    "periods",
    "total_return",
    "cagr",
    "volatility",
    "sharpe",
    "sortino",
    "calmar",
    "max_drawdown",
    "psr",
    "dsr",
)
"""What is computed of several folds in a row."""
TRADING = ("turnover", "costs", "exposure", "fills")

DEFINITIONS = {
    "strategy": "the cell: the kind and a digest of all its parameters; `said` has them in words",
    "crps": "of the forecasts: the mean over the model's horizons of what a backtest's scores have for all "
    "symbols, by forecasts over the folds",
    "turnover": "the mean of the folds', weighted by their periods",
    "exposure": "the mean of the folds', weighted by their periods",
    "costs": "the sum of the folds', each a share of the fold's first equity",
    "fills": "the sum of the folds'",
    "dsr": "as in a backtest, with all cells ever tried in this folder as trials. The walk-forward choice "
    "counts as one trial, as it never saw what it is judged on",
    "known": "the fold after which a search asked for the cell, which may be chosen for those after it; 0 in "
    "a grid",
    "chosen": "folds for which the walk-forward choice was this cell",
    "before": "the criterion over all folds before, by which the cell was chosen",
    "best": "the criterion of the cell that was best in the fold itself: nobody could know it",
    **{name: metrics.DEFINITIONS[name] for name in CHAINED if name != "dsr"},
}
"""Folds begin with cash alone and are put in a row by their returns; what is held at the end of one is worth
its last close, and is not sold."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of a cell on a fold: the same bytes wherever, and beside whatever, it was computed.

    `key` is the digest of all that it depends on; `trial` that of the cell alone, without bars, time and
    version. `crps` has (horizon, forecasts, CRPS), `figures` the cell's row of `BacktestResult.portfolio`
    without the deflated Sharpe ratio. Times (int64 nanoseconds) and equities (float64) are the bytes of
    little-endian arrays, of the cell's book and of buy-and-hold.
    """

    key: str
    trial: str
    crps: list[tuple[int, int, float]]
    figures: dict[str, float | int | None]
    times: bytes
    equity: bytes
    held_times: bytes
    held_equity: bytes
    periods_per_year: int
    warning: str

    def encode(self) -> bytes:
        """The content of its file, which ends in a record and begins with the digest of it."""
        body = msgspec.msgpack.encode(self)
        return MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record of a file; None where it is damaged, or was written under another name."""
        content = path.read_bytes()
        head = len(MAGIC) + 32
        if (
            hashlib.sha256(content[head:]).digest() != content[len(MAGIC) : head]
            or content[: len(MAGIC)] != MAGIC
        ):
            return None
        try:
            record = msgspec.msgpack.decode(content[head:], type=cls)
        except msgspec.DecodeError:
            return None
        return record if path.name == f"{record.key}.job" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all cells of a sweep have in common."""

    files: tuple[Path, ...]
    stamp: Stamp
    timeframe: str
    calendar: str
    calendars: dict[str, str]
    adjustments: tuple[Adjustment, ...]
    symbols: tuple[str, ...] | None
    execution: Execution
    cache: Path | None

    def told(self) -> dict[str, object]:
        """What a result depends on, beside the files' contents."""
        told = {name: getattr(self, name) for name in ("stamp", "timeframe", "calendar", "calendars")}
        declared = [msgspec.to_builtins(adjustment) for adjustment in self.adjustments]
        symbols = None if self.symbols is None else sorted(self.symbols)
        return told | {"adjustments": declared, "symbols": symbols, "execution": asdict(self.execution)}


@dataclass(frozen=True, slots=True)
class Job:
    """Cells of one variant on one fold; `cells` has the key, the trial and the strategy of each.

    `said` is what an error calls it; `since` and `until` (excluded) are nanoseconds.
    """

    ground: Ground
    files_sha256: str
    variant: Variant
    since: int
    until: int
    cells: tuple[tuple[str, str, StrategySettings], ...]
    folder: Path
    said: str


def work(job: Job) -> None:
    """Replay the fold with all cells of the job, and write what was found of each.

    Raise as `run_backtest` does, naming the job; DataError for files that have changed since the sweep began,
    and ConfigError on a machine whose model has another fingerprint.
    """
    ground, variant = job.ground, job.variant
    try:
        result = run_backtest(
            ground.files,
            stamp=ground.stamp,
            model=variant.model,
            timeframe=ground.timeframe,
            calendar=ground.calendar,
            calendars=ground.calendars,
            adjustments=ground.adjustments,
            strategies=[settings for _, _, settings in job.cells],
            symbols=ground.symbols,
            since=job.since,
            until=job.until,
            sampler=variant.sampler,
            steps=variant.steps,
            execution=ground.execution,
            baselines=False,
            cache=None if ground.cache is None else ForecastCache(ground.cache),
            scratch=job.folder,
        )
    except BarcastError as error:
        text = str(error)
        for _, _, settings in job.cells:
            text = spelt(text, settings)
        raise type(error)(f"{job.said}: {text}") from error
    if result.meta["files_sha256"] != job.files_sha256:
        raise DataError(f"{job.said}: the files have changed since the sweep began: begin it again")
    if (found := result.meta["fingerprint"]) != variant.card.fingerprint:
        raise ConfigError(
            f"{job.said}: a worker computes under the fingerprint {found!r}, this machine under "
            f"{variant.card.fingerprint!r}: take workers with the same packages and processor"
        )
    books = {str(name): book for (name,), book in result.equity.group_by("strategy")}
    pooled = result.scores.filter(symbol=POOLED).select("horizon", "n", "crps").sort("horizon").rows()
    own = {
        f"{settings.name} never traded." for _, _, settings in job.cells
    }  # as the figures of each cell say
    warning = "\n".join(line for line in str(result.meta["warning"]).splitlines() if line not in own)
    for key, trial, settings in job.cells:
        if settings.name not in books:
            raise DataError(f"{job.said}: no group of symbols was due: give more bars")
        [row] = result.portfolio.filter(strategy=settings.name).drop("strategy", "dsr").to_dicts()
        times, equity = _book(books[settings.name])
        held_times, held_equity = _book(books[BENCHMARK])
        record = Record(
            key=key,
            trial=trial,
            crps=pooled,
            figures=row,
            times=times,
            equity=equity,
            held_times=held_times,
            held_equity=held_equity,
            periods_per_year=result.meta["periods_per_year"],
            warning=warning,
        )
        write_whole(job.folder / f"{key}.job", record.encode())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder of the records: what another sweep writes looks like what a killed one left behind."""
    with writing_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another sweep is at work there; name another folder") from error
        yield


def _book(book: pl.DataFrame) -> tuple[bytes, bytes]:
    """Close times and equities of a book, as `Record` holds them."""
    book = book.sort("close_time")
    times = book["close_time"].to_physical().to_numpy().astype("<i8")
    return times.tobytes(), book["equity"].to_numpy().astype("<f8").tobytes()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SweepResult:
    """What a sweep found. Times are datetime[ns, UTC]; `DEFINITIONS` says what the numbers are.

    - `cells`: a row for each cell, the best by the criterion first: strategy, said, model, sampler, steps,
      known, chosen, crps, those of `CHAINED` over all folds, and of `TRADING`.
    - `folds`: a row for each cell and fold: fold, since, until (excluded), strategy, model, sampler, steps,
      crps and the cell's row of `BacktestResult.portfolio` without the deflated Sharpe ratio.
    - `path`: the walk-forward choice of each fold but the first: fold, since, until, strategy, said, model,
      sampler, steps, before, best, and figures in the fold.
    - `equity`: fold, close_time, walk_forward and buy_and_hold, from 1 on.
    - `meta`: what identifies the sweep and its checksum, the criterion, the trials, figures of the
      walk-forward choice and of buy-and-hold over the same folds, and a warning.
    - `ran`: how many cells of folds were computed, the others were there. `again`: files that were damaged,
      and are computed again. Neither is saved: a sweep that was ended and goes on saves the same bytes.
    """

    cells: pl.DataFrame
    folds: pl.DataFrame
    path: pl.DataFrame
    equity: pl.DataFrame
    meta: dict[str, Any]
    ran: int
    again: list[str]

    def save(self, folder: Path | str) -> None:
        """Write each frame to NAME.parquet of the folder, and all but the equity to `sweep.json`.

        A sweep that was in the folder is replaced. Raise ConfigError for a folder with anything that no sweep
        has written, and where it cannot be written.
        """
        folder = Path(folder)
        check_folder(folder)
        frames = {name: getattr(self, name) for name in TABLES}
        told = {"barcast_sweep": FORMAT, "meta": self.meta}
        told |= {name: json_rows(frame) for name, frame in frames.items() if name != "equity"}
        text = json.dumps(told | {"definitions": DEFINITIONS}, indent=1, allow_nan=False, ensure_ascii=False)
        with writing_in(folder):
            (folder / INDEX).unlink(missing_ok=True)  # until all is there, the folder holds no whole sweep
        for name, frame in frames.items():
            rows = BytesIO()
            frame.write_parquet(rows)
            write_whole(folder / f"{name}.parquet", rows.getvalue())
        write_whole(folder / INDEX, f"{text}\n".encode())


TABLES = ("cells", "folds", "path", "equity")
OWN = {JOBS, INDEX, *(f"{name}.parquet" for name in TABLES)}
"""What a sweep writes into its folder."""


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder in which anything lies that no sweep has written."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder")
    found = folder.iterdir() if folder.is_dir() else ()
    if foreign := {each.name for each in found if not is_partial(each)} - OWN:
        raise ConfigError(f"{folder} holds {min(foreign)}, which no sweep has written: name another folder")


def sweep(
    files: Sequence[Path | str] | Path | str,
    *,
    stamp: Stamp,
    out: Path | str,
    strategies: Sequence[str] | str = ("quantile-band", "median-drift"),
    models: Sequence[Path | str] | Path | str = ("fhs",),
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    trials: int | None = None,
    folds: int = FOLDS,
    by: str = "sharpe",
    timeframe: str | None = None,
    calendar: str = "24x7",
    calendars: Mapping[str, str] = MappingProxyType({}),
    adjustments: Sequence[Adjustment] = (),
    symbols: Sequence[str] | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    execution: Execution | None = None,
    backend: str = "loky",
    jobs: int = -1,
    address: str | None = None,
    cache: Path | str | None = None,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> SweepResult:
    """Backtest every cell on every fold, on the workers of a backend, and judge the choice among them.

    A strategy is a text such as `quantile-band:band=0.05|0.1,horizon=1|5`, of which every combination is
    tried on every model with every sampler and number of steps (models that are not sampled once). With
    `trials`, about so many cells are asked for in ranges such as `band=0.05..0.3`, in equal parts after each
    fold but the last, by what cells made of `by` until then.

    `folds` are parts of equal time from `since` on; without it, from where every model can forecast a symbol
    and none has learnt from. Files, calendars, execution and moments are those of `run_backtest`, whose
    defaults hold.

    `out` is a folder, in which `jobs/` keeps what was found of each cell and fold; what is there is not
    computed again. All cells found there, also those of earlier sweeps, count as trials for the deflated
    Sharpe ratio. `progress` is told how many cells of folds are done. For `backend`, `jobs` and `address` see
    `workers.open_workers`; files and folders must be at the same paths for every worker. With a `cache`, a
    folder, nothing is forecast again that a backtest, a sweep or `cache.prefill` has kept there.

    Raise as `run_backtest` does, naming fold and model; ConfigError for a grid that cannot be; DataError for
    a folder with files that no sweep has written, or that are damaged and cannot be computed again.
    """
    strategies = listed(strategies, "strategies", (str,), "a text such as 'rank:share=0.2|0.4'")
    named = [str(each) for each in listed(models, "models", (Path, str), "a directory or a baseline's name")]
    samplers = [samplers] if isinstance(samplers, str) else samplers
    symbols = [symbols] if isinstance(symbols, str) else symbols
    if by not in CRITERIA:
        raise ConfigError(f"by = {by!r}: take one of {', '.join(CRITERIA)}")
    if folds < 2:
        raise ConfigError(f"folds = {folds}: take 2 or more: a choice is judged after what it is made by")
    if trials is not None and trials < folds - 1:
        raise ConfigError(
            f"trials = {trials}: take {folds - 1} or more, as some are asked for after each fold"
        )
    paths = tuple(path.absolute() for path in paths_of(files))
    timeframe = timeframe or found_timeframe(paths, stamp, calendar, symbols)[0]
    ground = Ground(
        files=paths,
        stamp=stamp,
        timeframe=timeframe,
        calendar=calendar,
        calendars=dict(calendars),
        adjustments=tuple(check_adjustments(adjustments)),
        symbols=None if symbols is None else tuple(symbols),
        execution=check_execution(execution),
        cache=None if cache is None else Path(cache).absolute(),
    )
    over = variants(named, samplers, steps, timeframe)
    templates = [Template.parse(text) for text in strategies]
    edges, first = _edges(ground, over, nanoseconds(since, "since"), nanoseconds(until, "until"), folds)
    if trials is None:
        search, cells = None, grid(over, templates, first)
    else:
        search, cells = Search(over, templates, first), []
    folder = Path(out).absolute() / JOBS
    with _alone(folder), open_workers(backend, jobs, address):
        bench = _Bench(ground, digest(paths), edges, folder, progress)
        if search is None:
            bench.check(cells)
        if search is not None and trials is not None:
            for known in range(1, folds):
                most = trials * known // (folds - 1)
                asked = trials * (known - 1) // (folds - 1)
                bench.need(cells, known)
                while asked < most:
                    count = min(BATCH, most - asked)
                    cells += search.ask(count, known, bench.scores(cells, known, by))
                    asked += count
                    bench.need(cells, known)
        bench.need(cells, folds)
    return _result(bench, cells, by)


def _edges(
    ground: Ground, over: Sequence[Variant], since: int | None, until: int | None, folds: int
) -> tuple[list[int], First]:
    """Where the folds begin, and where the last one ends (nanoseconds); and what is asked about first."""
    closes = Calendars(ground.calendar, Timeframe.parse(ground.timeframe), ground.calendars)
    histories = read_windows(scan(ground.files, ground.stamp, closes, ground.symbols, None, until))
    last = max(window.close_time for window in histories.values())
    need = max(variant.card.min_window for variant in over)
    if since is None:
        able = [int(w.close_times[need - 1]) for w in histories.values() if len(w) >= need]
        if not able:
            raise DataError(
                f"No symbol has the {need} bars after which every model forecasts: give more history."
            )
        since = max(min(able), *(learnt_until(variant.model) for variant in over))
    end = last + 1 if until is None else min(last + 1, until)
    if since >= end:
        raise DataError(
            f"since is {iso(since)}, and the last bar closes at {iso(last)}: give an earlier one, or bars "
            "that no model has learnt from"
        )
    edges = [since + (end - since) * k // folds for k in range(folds + 1)]
    return edges, first_asked(histories, need, since)


@dataclass(slots=True)
class _Bench:
    """Where cells are tried: `edges` are those of `_edges`, and folds are counted from 1.

    The state is the record of each cell and fold; the trial of each record of the folder by its name, empty
    where it is damaged; and how many were computed here, and which of them as they were damaged.
    """

    ground: Ground
    files_sha256: str
    edges: list[int]
    folder: Path
    progress: Callable[[int, str], None]
    records: dict[tuple[object, int], Record] = field(default_factory=dict)
    trials: dict[str, str] = field(default_factory=dict)
    ran: int = 0
    again: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Look at what the folder has from before."""
        for path in sorted(self.folder.iterdir()):
            if is_partial(path):  # of one that was killed
                with writing_in(self.folder):
                    path.unlink(missing_ok=True)
            elif path.name.startswith(PREFIX):  # of another
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK and not _NAME.fullmatch(path.name):
                raise DataError(f"{path}: no sweep has written it; remove it, or name another folder")
            elif path.name != LOCK:
                record = Record.read(path)
                self.trials[path.stem] = "" if record is None else record.trial

    @property
    def folds(self) -> int:
        """How many folds there are."""
        return len(self.edges) - 1

    def fold(self, k: int) -> str:
        """What fold k is called in errors."""
        return f"fold {k} of {self.folds}, {iso(self.edges[k - 1])[:10]} to {iso(self.edges[k])[:10]}"

    def need(self, cells: Sequence[Cell], folds: int) -> None:
        """Know the cells on the first `folds` folds: read what there is, compute the rest."""
        missing: list[tuple[Cell, int, str]] = []
        found = 0
        for k in range(1, folds + 1):
            for cell in cells:
                if (cell.id, k) in self.records:
                    continue
                key = self._key(cell, k)
                record = None
                if key in self.trials:
                    record = Record.read(self.folder / f"{key}.job")
                    if record is None:
                        self.again.append(f"{key}.job")
                if record is None:
                    missing.append((cell, k, key))
                else:
                    self.records[cell.id, k] = record
                    found += 1
        if found:
            self.progress(found, "found")
        self._compute(missing)

    def _compute(self, missing: Sequence[tuple[Cell, int, str]]) -> None:
        jobs = []
        order = sorted(missing, key=lambda one: (one[1], repr(one[0].id[:3])))
        for _, group in groupby(order, key=lambda one: (one[1], one[0].id[:3])):
            own = [*group]
            jobs += [self._job(own[n : n + TOGETHER]) for n in range(0, len(own), TOGETHER)]
        if not jobs:
            return
        done = 0

        def over(count: int) -> None:
            nonlocal done
            cells = sum(len(job.cells) for job in jobs[done:count])
            done = max(done, count)
            self.progress(cells, f"{done} of {len(jobs)} backtests")

        try:
            run_jobs(work, jobs, over)
        except BarcastError as error:
            kept = f"What was found until then is in {self.folder}"
            raise type(error)(f"{error}. {kept}: a sweep without what failed goes on from there.") from error
        for cell, k, key in missing:
            path = self.folder / f"{key}.job"
            record = Record.read(path) if path.is_file() else None
            if record is None:
                raise DataError(
                    f"{path}: a worker has written it, and it cannot be read here: the folder must be one "
                    "that all workers share"
                )
            self.records[cell.id, k] = record
            self.trials[key] = record.trial
        self.ran += len(missing)

    def _job(self, own: Sequence[tuple[Cell, int, str]]) -> Job:
        first, k, _ = own[0]
        cells = tuple((key, self._trial(cell), cell.strategy) for cell, _, key in own)
        said = f"{self.fold(k)}, model {first.variant.model}"
        since, until = self.edges[k - 1], self.edges[k]
        variant = first.variant.there()
        return Job(self.ground, self.files_sha256, variant, since, until, cells, self.folder, said)

    def _cell(self, cell: Cell) -> dict[str, object]:
        card = cell.variant.card
        own = {"model": card.model, "sampler": cell.variant.sampler, "steps": cell.variant.steps}
        return own | {"strategy": cell.strategy_id, "ground": self.ground.told()}

    def _trial(self, cell: Cell) -> str:
        return digest_of(self._cell(cell))

    def _key(self, cell: Cell, k: int) -> str:
        at = {"since": self.edges[k - 1], "until": self.edges[k], "files": self.files_sha256}
        by = {"format": FORMAT, "version": version("barcast"), "fingerprint": cell.variant.card.fingerprint}
        return digest_of(self._cell(cell) | at | by)

    def chain(self, cell: Cell, folds: Sequence[int]) -> tuple[Ints, Array]:
        """Times and equity of a cell over folds in a row, from 1 on, up to where nothing is left."""
        return chained([self.records[cell.id, k] for k in folds])

    def scores(self, cells: Sequence[Cell], folds: int, by: str) -> dict[object, float | None]:
        """The criterion of each cell over the first `folds` folds."""
        chains = {cell.id: self.chain(cell, range(1, folds + 1)) for cell in cells}
        found = figures(chains, self.per_year(folds), 1) if chains else {}
        return {name: row[by] for name, row in found.items()}

    def per_year(self, folds: int) -> int:
        """Periods: the calendar's; where symbols keep different hours, the fewest of the first `folds`."""
        return min(record.periods_per_year for (_, k), record in self.records.items() if k <= folds)

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise DataError for a damaged record that these cells do not compute again."""
        own = {self._key(cell, k) for cell in cells for k in range(1, self.folds + 1)}
        for name, trial in self.trials.items():
            if not trial and name not in own:
                raise DataError(
                    f"{self.folder / name}.job: is damaged, so that the cells tried cannot be counted: put "
                    "it back, or remove it"
                )


def chained(records: Sequence[Record], held: bool = False) -> tuple[Ints, Array]:
    """Times (ns) and equity of folds in a row, from 1 on; with `held`, that of buy-and-hold.

    Each fold goes on from the value that the one before ended with; none does from a value that is not
    positive.
    """
    times, values, level = [], [], 1.0
    for record in records:
        moments, book = (record.held_times, record.held_equity) if held else (record.times, record.equity)
        equity = np.frombuffer(book, "<f8")
        times.append(np.frombuffer(moments, "<i8"))
        values.append(level * (equity / equity[0]))
        level = float(values[-1][-1])
        if level <= 0:
            break
    return np.concatenate(times), np.concatenate(values)


def figures(
    chains: Mapping[Any, tuple[Ints, Array]], periods_per_year: int, trials: int
) -> dict[Any, dict[str, float | None]]:
    """Those of `CHAINED` for each of some equities, see `metrics.portfolio`."""
    frames = [
        pl.DataFrame({"close_time": times, "equity": equity}).select(
            strategy=pl.lit(str(n)),
            close_time=pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC"),
            cash=pl.lit(0.0),
            equity="equity",
            gross=pl.lit(0.0),
            net=pl.lit(0.0),
            carry=pl.lit(0.0),
        )
        for n, (times, equity) in enumerate(chains.values())
    ]
    rows = portfolio(
        pl.concat(frames) if frames else pl.DataFrame(schema=EQUITY),
        pl.DataFrame(schema=FILLS),
        periods_per_year,
        trials,
    )
    found = {row["strategy"]: {name: row[name] for name in CHAINED} for row in rows.iter_rows(named=True)}
    return {name: found[str(n)] for n, name in enumerate(chains)}


def best(cells: Sequence[Cell], scores: Mapping[Any, float | None]) -> Cell:
    """The cell with the highest score, of equal ones the first; one without a score is below all others."""

    def score(cell: Cell) -> float:
        found = scores[cell.id]
        return -np.inf if found is None else found

    return max(cells, key=score)


CELLS = pl.Schema(
    {
        **dict.fromkeys(("strategy", "said", "model", "sampler"), pl.String()),
        **dict.fromkeys(("steps", "known", "chosen"), pl.Int64()),
        "crps": pl.Float64(),
        **{name: metrics.SCHEMA[name] for name in (*CHAINED, *TRADING)},
    }
)
SPAN = {"fold": pl.Int64(), "since": TIME, "until": TIME}
FOLDS_OF_CELLS = pl.Schema(
    {
        **SPAN,
        **{name: CELLS[name] for name in ("strategy", "model", "sampler", "steps", "crps")},
        **{name: dtype for name, dtype in metrics.SCHEMA.items() if name not in ("strategy", "dsr")},
    }
)
PATH = pl.Schema(
    {
        **SPAN,
        **{name: CELLS[name] for name in ("strategy", "said", "model", "sampler", "steps")},
        **dict.fromkeys(("before", "best"), pl.Float64()),
        **{name: dtype for name, dtype in metrics.SCHEMA.items() if name not in ("strategy", "dsr")},
    }
)


def _result(bench: _Bench, cells: Sequence[Cell], by: str) -> SweepResult:
    every = range(1, bench.folds + 1)
    bench.check(cells)
    trials, P = len(set(bench.trials.values())), bench.per_year(bench.folds)
    path, chosen = [], []
    for k in every[1:]:
        candidates = [cell for cell in cells if cell.known < k]
        scores = bench.scores(candidates, k - 1, by)
        cell = best(candidates, scores)
        inside = {other.id: bench.records[other.id, k].figures[by] for other in candidates}
        most = inside[best(candidates, inside).id]
        found = {"before": scores[cell.id], "best": most} | bench.records[cell.id, k].figures
        path.append(_span(bench, k) | _named(cell) | {"said": cell.said} | found)
        chosen.append(cell)
    taken = [bench.records[cell.id, k] for cell, k in zip(chosen, every[1:], strict=True)]
    walk, held = chained(taken), chained(taken, held=True)
    over = figures({cell.id: bench.chain(cell, every) for cell in cells}, P, trials)
    rows = [
        _named(cell)
        | {"said": cell.said, "known": cell.known, "chosen": [one.id for one in chosen].count(cell.id)}
        | over[cell.id]
        | _pooled([bench.records[cell.id, k] for k in every])
        for cell in cells
    ]
    folds = [
        _span(bench, k) | _named(cell) | {"crps": _crps([record])} | record.figures
        for k in every
        for cell in cells
        for record in [bench.records[cell.id, k]]
    ]
    ground, ids = bench.ground, {cell.variant.model: cell.variant.card.model for cell in cells}
    digests = sorted(hashlib.sha256(record.encode()).hexdigest() for record in bench.records.values())
    outcome = figures({"walk_forward": walk, "buy_and_hold": held}, P, 1)
    outcome["buy_and_hold"].pop("dsr")
    return SweepResult(
        cells=pl.DataFrame(rows, schema=CELLS).sort(
            by, descending=True, nulls_last=True, maintain_order=True
        ),
        folds=_utc(folds, FOLDS_OF_CELLS),
        path=_utc(path, PATH),
        equity=_equity(walk, held, bench.edges),
        meta={
            "warning": "\n".join(filter(None, _warnings(bench, cells))),
            "checksum": hashlib.sha256("\n".join(digests).encode()).hexdigest(),
            "by": by,
            "trials": trials,
            "models": ids,
            "folds": [_times(bench, k) for k in every],
            "periods_per_year": P,
            **outcome,
            **ground.told(),
            "files": [path.name for path in ground.files],
            "files_sha256": bench.files_sha256,
        },
        ran=bench.ran,
        again=bench.again,
    )


def _warnings(bench: _Bench, cells: Sequence[Cell]) -> list[str]:
    """What is to be known before the numbers are believed."""
    found = list(dict.fromkeys(line for one in bench.records.values() for line in one.warning.splitlines()))
    idle = sum(
        not any(bench.records[c.id, k].figures["fills"] for k in range(1, bench.folds + 1)) for c in cells
    )
    said = [few(found, "\n")]
    if idle:
        said.append(f"{idle} of {len(cells)} cells never traded.")
    for k in range(1, bench.folds + 1):
        periods = [int(bench.records[cell.id, k].figures["periods"] or 0) for cell in cells]
        if min(periods) < max(periods):
            said.append(
                f"In {bench.fold(k)}, cells have from {min(periods)} to {max(periods)} periods, as some "
                "models need more bars before their first forecast: give a later since."
            )
    return said


def _named(cell: Cell) -> dict[str, object]:
    model, sampler, steps, strategy = cell.id
    return {"strategy": strategy, "model": model, "sampler": sampler, "steps": steps}


def _span(bench: _Bench, k: int) -> dict[str, object]:
    return {"fold": k, "since": bench.edges[k - 1], "until": bench.edges[k]}


def _times(bench: _Bench, k: int) -> dict[str, object]:
    return {"fold": k, "since": iso(bench.edges[k - 1]), "until": iso(bench.edges[k])}


def _utc(rows: Sequence[Mapping[str, object]], schema: pl.Schema) -> pl.DataFrame:
    """Rows whose times are nanoseconds."""
    whole = {name: pl.Int64() if dtype == TIME else dtype for name, dtype in schema.items()}
    times = [name for name, dtype in schema.items() if dtype == TIME]
    return pl.DataFrame(list(rows), schema=whole).with_columns(
        pl.from_epoch(name, "ns").dt.replace_time_zone("UTC") for name in times
    )


def _crps(records: Sequence[Record]) -> float | None:
    """The mean over the horizons of the CRPS of all forecasts."""
    counts: dict[int, int] = {}
    sums: dict[int, float] = {}
    for record in records:
        for horizon, n, crps in record.crps:
            counts[horizon] = counts.get(horizon, 0) + n
            sums[horizon] = sums.get(horizon, 0.0) + n * crps
    return float(np.mean([sums[h] / counts[h] for h in counts])) if counts else None


def _pooled(records: Sequence[Record]) -> dict[str, float | int | None]:
    """CRPS, and what follows from the fills, over several folds."""
    rows = [record.figures for record in records]
    found: dict[str, float | int | None] = {"crps": _crps(records)}
    for name in ("turnover", "exposure"):
        known = [(row["periods"] or 0, value) for row in rows if (value := row[name]) is not None]
        weight = sum(periods for periods, _ in known)
        found[name] = sum(periods * value for periods, value in known) / weight if weight else None
    return found | {name: sum(row[name] or 0 for row in rows) for name in ("costs", "fills")}


def _equity(walk: tuple[Ints, Array], held: tuple[Ints, Array], edges: Sequence[int]) -> pl.DataFrame:
    times, values = walk
    beside = pl.DataFrame({"close_time": held[0], "buy_and_hold": held[1]})
    frame = pl.DataFrame(
        {
            "fold": [bisect(edges, time) for time in times.tolist()],
            "close_time": times,
            "walk_forward": values,
        }
    ).join(beside, on="close_time", how="left", maintain_order="left")
    return frame.with_columns(pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC"))
