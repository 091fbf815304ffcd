"""The command that shows what a strategy would have come to, had the market been another."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from barcast.backtest.cli.terminal import (
    HISTORY,
    WORKERS,
    Adjustments,
    Borrow,
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
    Sampler,
    Since,
    Slippage,
    Spread,
    Stamped,
    Steps,
    Strategies,
    Symbols,
    Tested,
    Timeframe,
    Until,
    VolumeShare,
    app,
    check_stress_folder,
    err,
    found_timeframe,
    in_folder,
    interruptible,
    moment,
    others_of,
    out,
    progressing,
    wide,
)
from barcast.backtest.workers import ONE_THREAD, check_jobs
from barcast.models import BASELINES

if TYPE_CHECKING:
    from barcast.backtest.stress import StressResult


@app.command(rich_help_panel=HISTORY)
def stress(
    files: Files,
    stamp: Stamped,
    generator: Annotated[Path, typer.Option(help="Directory that train-stress has written.")],
    regime: Annotated[
        list[str] | None,
        typer.Option(
            help="calm, trend, volatile or crisis; may be repeated. Default: volatile and crisis.",
            metavar="NAME",
        ),
    ] = None,
    scenarios: Annotated[int, typer.Option(help="Of each regime.", min=1, max=1000)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.", min=0)] = 0,
    severity: Annotated[
        float | None,
        typer.Option(
            help="How far into the regime: 0 not at all, 2 nearly all the way, 3 all of it, above beyond it; "
            "default: the generator's cfg_scale.",
            min=0,
            max=6,
        ),
    ] = None,
    model: Tested = None,
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    strategy: Strategies = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
    sampler: Sampler = None,
    steps: Steps = None,
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
    jobs: Annotated[
        int, typer.Option(help="Scenarios at a time; -1: one a core.", min=-1, rich_help_panel=WORKERS)
    ] = -1,
    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder for report.html, and for tables as Parquet and JSON.")
    ] = Path("stress-result"),
) -> None:
    """Backtest over many scenarios of other regimes: what books and intervals would have come to.

    A scenario is not a forecast: bars from --since on get the texture of the regime, and go the way that they
    went. The same seed gives the same bytes.
    """
    os.environ.update(ONE_THREAD)
    check_jobs(jobs)
    read = [*files, generator, *([adjustments] if adjustments else [])]
    check_stress_folder(out_dir, [*read, *([Path(model)] if model and model not in BASELINES else [])])
    from barcast.backtest.ledger import Execution
    from barcast.backtest.report import write_stress
    from barcast.backtest.stress import REGIMES, REPORT, run_stress
    from barcast.daemon.adjustments import read_adjustments

    regimes = regime or list(REGIMES)
    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    total = scenarios * len(regimes) + 1
    with interruptible(lambda: "nothing is written"), progressing("scenarios", total) as advance:
        result = run_stress(
            files,
            stamp=stamp.value,
            generator=generator,
            regimes=regimes,
            n=scenarios,
            seed=seed,
            cfg_scale=severity,
            since=moment(since),
            until=moment(until),
            timeframe=timeframe,
            calendar=calendar,
            calendars=others_of(symbol_calendar),
            adjustments=read_adjustments(adjustments) if adjustments else (),
            symbols=symbol,
            model=model or "fhs",
            strategies=strategy or ["quantile-band", "median-drift"],
            sampler=sampler,
            steps=steps,
            execution=Execution(
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
            ),
            jobs=jobs,
            progress=advance,
        )
    _print(result)
    if result.meta["warning"]:
        err.print(result.meta["warning"], style="yellow", markup=False)
    with in_folder("--out", out_dir):
        result.save(out_dir)
        write_stress(result, out_dir / REPORT)
    out.print(f"report: {(out_dir / REPORT).absolute()}", soft_wrap=True)


def _print(result: "StressResult") -> None:
    """Books by regime, and the intervals; the report has the rest."""
    from barcast.backtest.stress import NOTE

    title = f"books over {result.meta['scenarios']} scenarios of each regime, in % ({NOTE})"
    books = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns = {
        "return": "median_return",
        "worst 5 %": "worst_return",
        "shortfall": "shortfall",
        "drawdown": "median_drawdown",
        "deepest 5 %": "worst_drawdown",
        "losing": "losing",
    }
    for name in ("regime", "strategy"):
        books.add_column(name, overflow="fold")
    for name in columns:
        books.add_column(name, justify="right")
    for row in result.summary.iter_rows(named=True):
        values = (row[name] for name in columns.values())
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        books.add_row(row["regime"], row["strategy"], *cells)
    inside = Table(title="outcomes inside intervals, median, in %", title_justify="left", box=SIMPLE_HEAD)
    inside.add_column("regime")
    shares = [f"coverage_{nominal}" for nominal in (50, 80, 90)]
    for name in ("+bars", "50 %", "80 %", "90 %"):
        inside.add_column(name, justify="right")
    rows = result.scores.group_by("regime", "horizon", maintain_order=True).median()
    for row in rows.iter_rows(named=True):
        cells = ["-" if row[name] is None else f"{100 * row[name]:.1f}" for name in shares]
        inside.add_row(row["regime"], str(row["horizon"]), *cells)
    wide().print(books, inside)
