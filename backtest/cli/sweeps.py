"""The command that tries many strategies and samplers, and judges the choice among them."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from barcast.backtest.cli.terminal import (
    HISTORY,
    WORKERS,
    Address,
    Adjustments,
    Backend,
    BackendName,
    Borrow,
    Cache,
    CalendarName,
    Capital,
    Commission,
    Files,
    Fill,
    FillAt,
    Funding,
    Impact,
    Leverage,
    LimitLevel,
    OtherCalendars,
    Since,
    Slippage,
    Spread,
    Stamped,
    Symbols,
    Timeframe,
    Until,
    VolumeShare,
    app,
    check_sweep_folder,
    err,
    found_timeframe,
    in_folder,
    moment,
    others_of,
    out,
    progressing,
    resumable,
    tell,
    wide,
)
from barcast.backtest.workers import ONE_THREAD
from barcast.models import BASELINES, SAMPLERS

if TYPE_CHECKING:
    from barcast.backtest.sweep import SweepResult

SHOWN = 20
"""Cells that the table has."""


class Criterion(StrEnum):
    """By what cells are ranked and chosen."""

    sharpe = "sharpe"
    sortino = "sortino"
    calmar = "calmar"
    total_return = "total_return"


@app.command(rich_help_panel=HISTORY)
def sweep(
    files: Files,
    stamp: Stamped,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND:PARAMETER=VALUE|VALUE,...: every combination is tried; with --trials also ranges, "
            "PARAMETER=LOW..HIGH. May be repeated; put it in quotes. \\[default: quantile-band, median-drift]"
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint directory or a baseline; may be repeated. \\[default: fhs]"),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(help=f"Of diffusion models: {', '.join(SAMPLERS)}; may be repeated."),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Of the samplers; may be repeated.", min=1)] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Search the ranges with so many cells, by Optuna; default: the grid.", min=1),
    ] = None,
    folds: Annotated[int, typer.Option(help="Parts of equal time, one after the other.", min=2)] = 4,
    by: Annotated[Criterion, typer.Option(help="What the best cell has the most of.")] = Criterion.sharpe,
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
    fill: FillAt = Fill.next_open,
    limit_level: LimitLevel = 0.25,
    commission: Commission = 1.0,
    spread: Spread = 0.0,
    slippage: Slippage = 2.0,
    impact: Impact = 0.0,
    volume_share: VolumeShare = None,
    borrow: Borrow = 0.0,
    funding: Funding = 0.0,
    leverage: Leverage = 1.0,
    capital: Capital = 1e6,
    cache: Cache = None,
    backend: BackendName = Backend.loky,
    jobs: Annotated[
        int, typer.Option(help="Backtests at a time; -1: one a core.", min=-1, rich_help_panel=WORKERS)
    ] = -1,
    address: Address = None,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Folder for tables as Parquet and JSON, and for what was found so far."),
    ] = Path("sweep-result"),
) -> None:
    """Try strategies, parameters, models and samplers, fold by fold, and judge the choice among them.

    For each fold but the first, the cell that was best in the folds before it is what a walk-forward would
    have chosen. Killed? Give the same command again: what is in --out is not computed again.
    """
    os.environ.update(ONE_THREAD)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it reports to its makers
    read = [*files, *([adjustments] if adjustments else [])]
    read += [Path(name) for name in model or [] if name not in BASELINES]
    from barcast.backtest.ledger import Execution
    from barcast.backtest.sweep import sweep as run
    from barcast.daemon.adjustments import read_adjustments

    check_sweep_folder(out_dir, read)
    execution = Execution(
        fill=fill.value,
        limit_level=limit_level,
        commission_bp=commission,
        spread_bp=spread,
        slippage_bp=slippage,
        impact=impact,
        volume_share=volume_share,
        borrow=borrow,
        funding=funding,
        leverage=leverage,
        capital=capital,
    )
    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    with resumable(out_dir, address), progressing("sweeping", None) as advance:
        result = run(
            files,
            stamp=stamp.value,
            out=out_dir,
            strategies=strategy or ["quantile-band", "median-drift"],
            models=model or ["fhs"],
            samplers=sampler or (),
            steps=steps or (),
            trials=trials,
            folds=folds,
            by=by.value,
            timeframe=timeframe,
            calendar=calendar,
            calendars=others_of(symbol_calendar),
            adjustments=read_adjustments(adjustments) if adjustments else (),
            symbols=symbol,
            since=moment(since),
            until=moment(until),
            execution=execution,
            backend=backend.value,
            jobs=jobs,
            address=address,
            cache=cache,
            progress=advance,
        )
    with in_folder("--out", out_dir):
        result.save(out_dir)
    for name in result.again:
        tell(f"{name} was damaged, and was computed again")
    _print_sweep(result, by.value)
    if result.meta["warning"]:
        err.print(str(result.meta["warning"]), style="yellow", markup=False)
    out.print(f"tables: {out_dir.absolute()}", soft_wrap=True)


def _print_sweep(result: "SweepResult", by: str) -> None:
    """The best cells, what a walk-forward would have chosen, and what that made."""
    console, meta = wide(), result.meta
    cells = Table(
        title=f"cells, by {by} over all folds", title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    cells.add_column("strategy", overflow="fold")
    cells.add_column("model", overflow="fold")
    heads = {
        "CRPS, bp": ("crps", 1e4, ""),
        "return": ("total_return", 100, " %"),
        "Sharpe": ("sharpe", 1, ""),
        "deflated": ("dsr", 1, ""),
        "drawdown": ("max_drawdown", 100, " %"),
        "turnover": ("turnover", 1, ""),
    }
    if by in ("sortino", "calmar"):
        heads[by.capitalize()] = (by, 1, "")
    for head in (*heads, "chosen"):
        cells.add_column(head, justify="right")
    for row in result.cells.head(SHOWN).iter_rows(named=True):
        numbers = [_number(row[name], scale, unit) for name, scale, unit in heads.values()]
        cells.add_row(row["said"], _model(row), *numbers, f"{row['chosen']}x" if row["chosen"] else "")
    console.print(cells)
    if result.cells.height > SHOWN:
        console.print(f"and {result.cells.height - SHOWN} more, in cells.parquet", highlight=False)
    path = Table(
        title="the best of the folds before, in each fold",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for head in ("fold", "from"):
        path.add_column(head)
    path.add_column("strategy", overflow="fold")
    path.add_column("model", overflow="fold")
    for head in (f"{by} before", "in it", "best in it", "return", "drawdown"):
        path.add_column(head, justify="right")
    for row in result.path.iter_rows(named=True):
        scores = [_number(row[name], 1, "") for name in ("before", by, "best")]
        more = [_number(row[name], 100, " %") for name in ("total_return", "max_drawdown")]
        fold, since = str(row["fold"]), f"{row['since']:%Y-%m-%d}"
        path.add_row(fold, since, row["said"], _model(row), *scores, *more)
    console.print(path)
    judged = "fold 2" if result.path.height == 1 else f"folds 2 to {1 + result.path.height}"
    for name, key in (("walk-forward", "walk_forward"), ("buy-and-hold", "buy_and_hold")):
        found = meta[key]
        console.print(
            f"{name}, {judged}: return {_number(found['total_return'], 100, ' %')}, "
            f"Sharpe {_number(found['sharpe'], 1, '')}, drawdown {_number(found['max_drawdown'], 100, ' %')}",
            highlight=False,
        )
    console.print(
        f"{meta['trials']} trials in this folder; {result.ran} of {result.folds.height} backtests of a cell "
        f"and fold were run, the others were there. checksum {meta['checksum']}",
        highlight=False,
        soft_wrap=True,
    )


def _model(row: dict[str, Any]) -> str:
    """The model of a row, with what is asked of its sampler."""
    asked = [row["sampler"], None if row["steps"] is None else f"{row['steps']} steps"]
    return " ".join([row["model"], *filter(None, asked)])


def _number(value: float | None, scale: float, unit: str) -> str:
    return "-" if value is None else f"{scale * value:.2f}{unit}"
