"""What the commands share: the options they take, how they say where they stand, how they read bars."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from math import floor, log10
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from barcast.models import SAMPLERS, ConfigError

if TYPE_CHECKING:
    from barcast.daemon.calendar import Calendars
    from barcast.models import Window

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)
LIVE, HISTORY, BOOKS, WORKERS = "Live", "History", "Books", "Workers"
"""Where commands, and options of theirs, stand in the help."""

LINE_SECONDS = 5.0
"""How often long work says where it stands when nobody watches a terminal."""
WIDE = 100
"""Columns that the tables of an evaluation take where there is no terminal."""


class Stamp(StrEnum):
    """Which end of a bar its time names."""

    open = "open"
    close = "close"


class Fill(StrEnum):
    """Where orders are filled."""

    next_open = "next-open"
    next_close = "next-close"
    limit = "limit"


class Backend(StrEnum):
    """Where the jobs of a command run."""

    loky = "loky"
    ray = "ray"
    dask = "dask"


FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]
Parent = Annotated[int | None, typer.Option(hidden=True, help="The process to end with.")]
Files = Annotated[list[Path], typer.Argument(help="Parquet or CSV files with bars, or folders of them.")]
ConfigFile = Annotated[Path, typer.Argument(help="TOML file of the instance.")]
Stamped = Annotated[
    Stamp, typer.Option(help="Whether times in the files are the open or the close of the bar.")
]
Timeframe = Annotated[
    str | None,
    typer.Option(
        help="Length of a bar: {n}{s|m|h|d}, or session for exchange days; default: found in the files."
    ),
]
CalendarName = Annotated[str, typer.Option(help="24x7, fx, or a name of exchange_calendars such as XNYS.")]
OtherCalendars = Annotated[
    list[str] | None,
    typer.Option(
        "--symbol-calendar",
        metavar="SYMBOL=NAME",
        help="A symbol that keeps other hours than --calendar, such as EURUSD=fx; may be repeated.",
    ),
]
Adjustments = Annotated[
    Path | None,
    typer.Option(
        help="Parquet or CSV file of splits and rolls: symbol, time, factor (new over old price), kind."
    ),
]
Symbols = Annotated[
    list[str] | None, typer.Option("--symbol", help="Take this symbol only; may be repeated.")
]
Since = Annotated[
    datetime | None,
    typer.Option(help="First close: 2025-01-31 or 2025-01-31T16:00:00Z.", metavar="TIME", formats=FORMATS),
]
Until = Annotated[
    datetime | None,
    typer.Option(
        help="Take closes before this moment only: 2025-01-31 or 2025-01-31T16:00:00Z.",
        metavar="TIME",
        formats=FORMATS,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        help="A checkpoint directory, or a baseline, which needs no training: hs, fhs, ewma, har or garch; "
        "of bars shorter than a day also with a time-of-week factor: hs-s, fhs-s, ewma-s, har-s or garch-s."
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(help=f"Of a diffusion model: {', '.join(SAMPLERS)}; default: the model's own."),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Of a diffusion model: the steps of its sampler; default: the model's own.", min=1),
]
Touch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="UP,DOWN",
        help="Also the probability of touching the one barrier before the other within the longest horizon, "
        "and the expected drawdown; in the forecast's standard deviations, such as 2,1. Of a model with "
        "paths; may be repeated.",
    ),
]

FillAt = Annotated[
    Fill, typer.Option(help="Where targets are filled: see the README.", rich_help_panel=BOOKS)
]
LimitLevel = Annotated[
    float,
    typer.Option(help="With limit: buy at this quantile, sell at 1 less it.", rich_help_panel=BOOKS),
]
Commission = Annotated[float, typer.Option(help="Basis points of the traded value.", rich_help_panel=BOOKS)]
Spread = Annotated[
    float, typer.Option(help="Basis points; a fill at the market pays half.", rich_help_panel=BOOKS)
]
Slippage = Annotated[float, typer.Option(help="Basis points of the traded value.", rich_help_panel=BOOKS)]
Impact = Annotated[
    float,
    typer.Option(help="Share of the price that a bar's whole volume would cost.", rich_help_panel=BOOKS),
]
VolumeShare = Annotated[
    float | None, typer.Option(help="Most of a bar's volume that a fill takes.", rich_help_panel=BOOKS)
]
Borrow = Annotated[
    float,
    typer.Option(help="A year, on shorts and on borrowed cash: .02 is 2 %.", rich_help_panel=BOOKS),
]
Funding = Annotated[float, typer.Option(help="A year, longs pay and shorts receive.", rich_help_panel=BOOKS)]
Leverage = Annotated[
    float, typer.Option(help="What may be held in all, times the equity.", rich_help_panel=BOOKS)
]
Capital = Annotated[float, typer.Option(help="Cash that each book begins with.", rich_help_panel=BOOKS)]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps forecasts by what their windows held: what is known there is not forecast "
        "again, the result is the same."
    ),
]
BackendName = Annotated[
    Backend,
    typer.Option(help="Processes here, or ray or dask of the extra cluster.", rich_help_panel=WORKERS),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Of a running ray or dask, whose machines see files and folder at the same paths.",
        rich_help_panel=WORKERS,
    ),
]
ConfigOf = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Take timeframe, calendars, symbols, model, strategies and \\[retrain] from the TOML file "
        "of an instance, not from options.",
    ),
]
Tested = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A checkpoint directory, or a baseline, which needs no training. \\[default: fhs]",
    ),
]
CalendarOf = Annotated[
    str | None,
    typer.Option("--calendar", help="24x7, fx, or a name of exchange_calendars. \\[default: 24x7]"),
]
Strategies = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        help="KIND, or KIND:PARAMETER=VALUE,... of a built-in strategy, an installed one or a file "
        "mine.py:Mine; may be repeated. \\[default: quantile-band and median-drift]",
    ),
]
Retraining = Annotated[
    str | None,
    typer.Option(
        "--retrain", metavar="CRON", help="Train a challenger at these times, in UTC: '17 3 * * sun'."
    ),
]
RetrainSteps = Annotated[
    int | None,
    typer.Option(
        "--retrain-steps",
        help="Optimiser steps of each phase of these trainings; default: from the data.",
        min=1,
    ),
]
TrainingTime = Annotated[
    str | None,
    typer.Option(
        "--training-time",
        help="After how long a challenger is judged and may take over: 90s, 2h. \\[default: 30m]",
    ),
]


def pairs_of(given: list[str] | None) -> tuple[tuple[float, float], ...]:
    """Pairs of barriers, from UP,DOWN."""
    from barcast.models.joint import check_pairs

    try:
        pairs = [(float(up), float(down)) for up, down in (text.split(",") for text in given or ())]
    except ValueError as error:
        raise typer.BadParameter("write UP,DOWN, such as 2,1", param_hint="--touch") from error
    with _of_option("--touch"):
        return check_pairs(pairs)


def others_of(given: list[str] | None) -> dict[str, str]:
    """Symbol -> calendar, from SYMBOL=NAME."""
    pairs = [text.partition("=") for text in given or ()]
    for symbol, equals, name in pairs:
        if not (symbol and equals and name):
            raise typer.BadParameter("write SYMBOL=NAME, such as EURUSD=fx", param_hint="--symbol-calendar")
    return {symbol: name for symbol, _, name in pairs}


def found_timeframe(files: list[Path], stamp: Stamp, calendar: str, symbols: list[str] | None) -> str:
    """The timeframe of the files, and say so; days of an exchange are its sessions."""
    from barcast.backtest.replay import found_timeframe as found

    text, how = found(files, stamp.value, calendar, symbols)
    err.print(f"timeframe {text}: {how}", highlight=False, markup=False, soft_wrap=True)
    return text


def calendars_of(calendar: str, others: list[str] | None, timeframe: str) -> "Calendars":
    """The bar closes of each symbol."""
    from barcast.daemon.calendar import Calendars
    from barcast.daemon.timeframe import Timeframe as Parsed

    return Calendars(calendar, Parsed.parse(timeframe), others_of(others))


@contextmanager
def histories_of(
    files: list[Path],
    stamp: Stamp,
    calendars: "Calendars",
    symbols: list[str] | None,
    until: datetime | None,
    adjustments: Path | None,
    scratch: Path | None = None,
) -> "Iterator[Mapping[str, Window]]":
    """The whole history of each symbol, on the price basis of its newest bar.

    It is mapped from files in `scratch`, or in the folder for temporary files, and ends with the context.
    """
    from barcast.backtest.caveats import of_calendars
    from barcast.backtest.tables import scratch_in
    from barcast.backtest.workers import writing_in
    from barcast.daemon.adjustments import adjusted, read_adjustments
    from barcast.daemon.history import History

    with scratch_in(scratch) as folder:
        with writing_in(scratch):
            history = History(files, stamp.value, calendars, symbols, moment(until), folder)
        for sentence in of_calendars(history, {} if symbols else calendars.others):
            raise typer.BadParameter(sentence, param_hint="--symbol-calendar")
        yield adjusted(history, read_adjustments(adjustments)) if adjustments else history


def moment(time: datetime | None) -> int | None:
    """A time given on the command line, which is UTC, in nanoseconds."""
    from barcast.daemon.wire import to_ns

    return None if time is None else to_ns(time.replace(tzinfo=UTC))


def tell(line: str) -> None:
    """Say a line beside what the command prints."""
    err.print(line, highlight=False, markup=False, soft_wrap=True)


def now_and_then() -> Callable[[str], None]:
    """Says a line every few seconds: whoever listens takes silence for a fault."""
    said = time.monotonic()

    def say(line: str) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            tell(line)

    return say


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Say what is left of the work when a person ends it."""
    try:
        yield
    except KeyboardInterrupt:
        tell(f"interrupted: {left()}")
        raise


@contextmanager
def resumable(folder: Path, address: str | None) -> Iterator[None]:
    """Say whom it may take a while to reach, and where what is done lies when a person ends it."""
    if address is not None:
        tell(f"connecting to {address}")
    with interruptible(lambda: f"what is done is in {folder}, and the same command goes on from there"):
        yield


def price(price: float) -> str:
    """Five digits that say something, all before the point, and no exponent."""
    return f"{price:.{max(0, 4 - floor(log10(price)))}f}"


def wide() -> Console:
    """The terminal, or where there is none room enough for any table."""
    return out if out.is_terminal else Console(width=max(out.width, WIDE))


def check_output(option: str, path: Path, others: Iterable[Path], what: str = "file") -> None:
    """Try whether a file can be written, before work is spent on what goes in; leave it as it is.

    It must be none of the `others`, which are read or written, too. `what` the option names is a file, or the
    folder of it.
    """
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory: name a file", param_hint=option)
    for other in others:
        if path.resolve() == other.resolve():
            raise typer.BadParameter(
                f"{path} is in use by this very command: name another file", param_hint=option
            )
    with writing(option, path, what):
        try:
            with path.open("ab") if path.exists() else TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def in_folder(option: str, path: Path) -> Iterator[None]:
    """Make what forbids writing into a folder the option's fault."""
    try:
        yield
    except OSError as error:
        reason = f"{option}: {path}: {error}"
        raise ConfigError(f"{reason}; name a folder that you may write, with room in it") from error


def check_result_folder(path: Path, others: Iterable[Path]) -> None:
    """Try whether a backtest can be written into a folder, before work is spent on it; leave it as it is.

    One that is there must be empty or hold a backtest, and none of the `others`, which are read.
    """
    from barcast.backtest.result import check_folder

    with _of_option("--out"):
        check_folder(path)
    _check_folder(path, others)


def check_sweep_folder(path: Path, others: Iterable[Path]) -> None:
    """The same of a sweep: one that is there holds nothing but what sweeps write."""
    from barcast.backtest.sweep import check_folder

    with _of_option("--out"):
        check_folder(path)
    _check_folder(path, others)


def check_stress_folder(path: Path, others: Iterable[Path]) -> None:
    """The same of backtests over scenarios."""
    from barcast.backtest.stress import check_folder

    with _of_option("--out"):
        check_folder(path)
    _check_folder(path, others)


def there(path: Path) -> Path:
    """The folder, or where there is none yet the nearest above it."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


@contextmanager
def _of_option(option: str) -> Iterator[None]:
    """Make what is wrong with a value the option's fault."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _check_folder(path: Path, others: Iterable[Path]) -> None:
    for other in others:
        if path.resolve() in (other.resolve(), *other.resolve().parents):
            raise typer.BadParameter(
                f"{path} holds {other.name}, which is read: name another folder", param_hint="--out"
            )
    with in_folder("--out", path), TemporaryFile(dir=there(path)):
        pass


@contextmanager
def writing(option: str, path: Path, what: str = "file") -> Iterator[None]:
    """Make the folder of a file that is about to be written; what forbids writing is the option's fault."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{option}: {error}; name a {what} that you may write") from error


@contextmanager
def progressing(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal, a log line every few seconds elsewhere.

    Gives a function (done since the last call, what is at hand).
    """
    if err.is_terminal:
        columns = (
            TextColumn(what),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda count, text: bar.update(task, advance=count, description=text)
        return
    import structlog

    from barcast.daemon import log

    log.configure()
    logger = structlog.get_logger()
    done, last = 0, time.monotonic()

    def line(count: int, text: str) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            logger.info(what, at=text, **({"done": done, "of": total} if total else {}))

    yield line
