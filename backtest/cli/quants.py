"""Commands of those who look for forecasts and strategies that hold."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from barcast.backtest.cli.terminal import (
    FORMATS,
    HISTORY,
    WORKERS,
    Address,
    Adjustments,
    Backend,
    BackendName,
    Borrow,
    Cache,
    CalendarName,
    CalendarOf,
    Capital,
    Commission,
    ConfigOf,
    Files,
    Fill,
    FillAt,
    Funding,
    Impact,
    Leverage,
    LimitLevel,
    ModelName,
    OtherCalendars,
    Retraining,
    RetrainSteps,
    Sampler,
    Since,
    Slippage,
    Spread,
    Stamp,
    Stamped,
    Steps,
    Strategies,
    Symbols,
    Tested,
    Timeframe,
    Touch,
    TrainingTime,
    Until,
    VolumeShare,
    app,
    calendars_of,
    check_output,
    check_result_folder,
    err,
    found_timeframe,
    histories_of,
    in_folder,
    interruptible,
    moment,
    others_of,
    out,
    pairs_of,
    price,
    progressing,
    resumable,
    there,
    wide,
    writing,
)
from barcast.models import BASELINES, MOST_STEPS, DataError

if TYPE_CHECKING:
    import polars as pl

    from barcast.backtest.evaluate import Evaluation
    from barcast.backtest.result import BacktestResult
    from barcast.backtest.schedulers import Comparison


@app.command(rich_help_panel=HISTORY)
def forecast(
    files: Files,
    stamp: Stamped,
    model: ModelName,
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    until: Until = None,
    sampler: Sampler = None,
    steps: Steps = None,
    touch: Touch = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a symbol, with all levels, for scripts.")
    ] = False,
) -> None:
    """Forecast every symbol from its last bar and print the quantiles, in prices."""
    import msgspec
    import numpy as np

    from barcast.daemon.wire import TouchOfSignal, to_text
    from barcast.models import Window, check_sampled, open_model, usable
    from barcast.models.joint import outlook, path_quantiles

    pairs = pairs_of(touch)
    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    forecaster = open_model(model, timeframe, sampler, steps, bool(pairs))
    card = forecaster.card
    check_sampled(model, card, sampler, steps)
    windows = []
    with histories_of(files, stamp, closes, symbol, until, adjustments) as histories:
        for name, h in histories.items():
            if len(h) < card.min_window:
                err.print(f"{name}: {len(h)} bars, {card.min_window} are needed: left out")
            else:
                newest = h.part(max(0, len(h) - card.window), len(h))
                windows.append(Window(name, newest.close_times.copy(), newest.values.copy()))
    if not windows:
        raise DataError(
            f"No symbol has the {card.min_window} bars that {card.model} needs: give more history."
        )
    forecasts = []
    made = forecaster.forecast(windows)
    for f, good in zip(made, usable(made, card), strict=True):
        if good:
            forecasts.append(f)
        else:
            err.print(f"{f.symbol}: the model gave no forecast that can be a price: left out")
    if not forecasts:
        raise DataError(
            f"{card.model} gave no forecast that can be a price: check the bars for wild prices and "
            "undeclared splits."
        )
    if as_json:
        for f in forecasts:
            ends = closes.of(f.symbol).closes_after(f.close_time, max(f.horizons))
            prices = (f.reference * np.exp(f.quantiles)).tolist()
            line = {
                "symbol": f.symbol,
                "close_time": to_text(f.close_time),
                "reference": f.reference,
                "levels": f.levels,
                "horizons": [{"bars": h, "end_time": to_text(ends[h - 1])} for h in f.horizons],
                "quantiles": prices,
                "std": f.std.tolist(),
                "rise": f.rise.tolist(),
                "warming": f.warming,
                "model": card.model,
            }
            if pairs and f.paths:
                said = outlook(f, pairs)
                line["touch"] = msgspec.to_builtins(TouchOfSignal.of(said, f.reference))
                line["drawdown"] = said.drawdown
                steps_of = (f.reference * np.exp(path_quantiles(f.paths, f.levels))).tolist()
                line["path"] = {"bars": f.paths.steps, "quantiles": steps_of}
            print(json.dumps(line))
        return
    table = Table(title=f"model {card.model}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shown = [p for p in (0.05, 0.25, 0.5, 0.75, 0.95) if p in card.levels] or list(card.levels)
    for column in ("symbol", "close", "until", *(f"q{round(100 * p):02d}" for p in shown)):
        table.add_column(column, justify="left" if column == "symbol" else "right", no_wrap=True)
    for f in forecasts:
        ends = closes.of(f.symbol).closes_after(f.close_time, max(f.horizons))
        table.add_row(f.symbol, price(f.reference), to_text(f.close_time)[:16])
        for bars, row in zip(f.horizons, f.reference * np.exp(f.quantiles), strict=True):
            prices = [price(row[card.levels.index(p)]) for p in shown]
            table.add_row("", f"+{bars}", to_text(ends[bars - 1])[:16], *prices)
    wide().print(table)
    if pairs:
        title = f"which barrier is touched first within +{max(card.horizons)}, and the expected drawdown"
        firsts = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
        firsts.add_column("symbol")
        for column in ("up", "down", "up first", "down first", "neither", "drawdown"):
            firsts.add_column(column, justify="right", no_wrap=True)
        for f in forecasts:
            said = outlook(f, pairs)
            for pair in TouchOfSignal.of(said, f.reference):
                chances = (pair.up_first, pair.down_first, 1 - pair.up_first - pair.down_first)
                shares = [f"{100 * share:.1f} %" for share in (*chances, said.drawdown)]
                firsts.add_row(f.symbol, price(pair.up_price), price(pair.down_price), *shares)
        wide().print(firsts)
        wide().print(
            "Up and down are prices; touches include highs and lows. The drawdown is the expected maximum "
            "fall on closes from the highest so far, a log return.",
            highlight=False,
        )


@app.command(rich_help_panel=HISTORY)
def predict(
    files: Files,
    stamp: Stamped,
    model: ModelName,
    origins: Annotated[
        Path,
        typer.Option(
            help="Parquet or CSV file with the columns symbol and ts, the time of a bar in the files."
        ),
    ],
    out_file: Annotated[Path, typer.Option("--out", help="Parquet file to write the quantiles to.")],
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    sampler: Sampler = None,
    steps: Steps = None,
    touch: Touch = None,
) -> None:
    """Forecast from many bars of the past, each seen without what came after it.

    Writes a row for each different origin and horizon (bars): symbol, ts, horizon, and the quantiles as log
    returns from the origin's close: q05, q10 and so on. With --touch 2,1 also touch_up_2_1, touch_down_2_1
    and drawdown (a log return), of the longest horizon and the same in all rows of an origin.
    """
    pairs = pairs_of(touch)
    check_output("--out", out_file, [*files, origins, *([adjustments] if adjustments else [])])
    if out_file.suffix == ".csv":
        raise typer.BadParameter(f"{out_file} is to hold Parquet: name it so", param_hint="--out")
    from barcast.backtest.predict import predict as quantiles
    from barcast.backtest.tables import write_rows
    from barcast.daemon.adjustments import read_adjustments
    from barcast.daemon.history import read_origins, read_windows, scan
    from barcast.models import check_sampled, open_model

    timeframe = timeframe or found_timeframe(files, stamp, calendar, None)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    forecaster = open_model(model, timeframe, sampler, steps, bool(pairs))
    check_sampled(model, forecaster.card, sampler, steps)
    wanted = read_origins(origins, stamp.value, closes)
    histories = read_windows(scan(files, stamp.value, closes))
    declared = read_adjustments(adjustments) if adjustments else []
    with progressing("forecasting", wanted.height) as advance:
        made = quantiles(forecaster, histories, wanted, str(origins), declared, pairs, advance)
    with writing("--out", out_file):
        write_rows(made, out_file)
    out.print(f"{wanted.height} origins, {made.height} rows: {out_file.absolute()}", soft_wrap=True)


@app.command(rich_help_panel=HISTORY)
def prefill(
    files: Files,
    stamp: Stamped,
    model: ModelName,
    cache: Annotated[
        Path, typer.Option(help="Folder for the forecasts, where `backtest --cache` finds them.")
    ],
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
    sampler: Sampler = None,
    steps: Steps = None,
    backend: BackendName = Backend.loky,
    jobs: Annotated[
        int, typer.Option(help="Parts at a time; -1: one a core.", min=-1, rich_help_panel=WORKERS)
    ] = -1,
    address: Address = None,
) -> None:
    """Forecast a whole history into a cache, on all cores: no backtest of these bars asks the model then."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it reports to its makers
    from barcast.backtest.cache import Wanted, prefill
    from barcast.backtest.tables import scratch_in
    from barcast.backtest.workers import writing_in
    from barcast.daemon.adjustments import read_adjustments
    from barcast.daemon.history import History
    from barcast.models import check_sampled, open_model

    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    check_sampled(model, open_model(model, timeframe, sampler, steps).card, sampler, steps)
    declared = read_adjustments(adjustments) if adjustments else []
    began = time.monotonic()
    with in_folder("--cache", cache):
        cache.mkdir(parents=True, exist_ok=True)
    with scratch_in(cache) as folder:
        with writing_in(cache):
            histories = History(files, stamp.value, closes, symbol, moment(until), folder)
        wanted = Wanted(cache, model, timeframe, sampler, steps, moment(since) or 0, histories.last)
        with resumable(cache, address), progressing("forecasting", None) as advance:
            made = prefill(
                wanted,
                histories,
                declared,
                backend=backend.value,
                jobs=jobs,
                address=address,
                progress=advance,
            )
    seconds = time.monotonic() - began
    said = f"{made:,} forecasts of {len(histories)} symbols are there after {seconds:,.0f} s"
    out.print(f"{said}: {cache.absolute()}", soft_wrap=True)


@app.command(rich_help_panel=HISTORY)
def backtest(
    files: Files,
    stamp: Stamped,
    config: ConfigOf = None,
    model: Tested = None,
    timeframe: Timeframe = None,
    calendar: CalendarOf = None,
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    strategy: Strategies = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
    sampler: Sampler = None,
    steps: Steps = None,
    touch: Touch = None,
    retrain: Retraining = None,
    retrain_steps: RetrainSteps = None,
    training_time: TrainingTime = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Strategies and settings that were tried in all, for the deflated Sharpe ratio; default: "
            "those of this run.",
            min=1,
        ),
    ] = None,
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
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Folder for report.html, the tables as Parquet and JSON, and the models."),
    ] = Path("backtest-result"),
) -> None:
    """Replay bars through the live path: forecasts, trainings, books, and a report beside the baselines.

    Bars before --since only warm the windows up. With --touch 2,1 the table of signals also has touch_up_2_1,
    touch_down_2_1 and drawdown (a log return).
    """
    given = {
        "model": model,
        "timeframe": timeframe,
        "calendar": calendar,
        "symbol-calendar": symbol_calendar,
        "strategy": strategy,
        "symbol": symbol,
        "sampler": sampler,
        "steps": steps,
        "touch": touch,
        "retrain": retrain,
        "retrain-steps": retrain_steps,
        "training-time": training_time,
    }
    check_given(config, given)
    read = [*files, *([adjustments] if adjustments else [])]
    check_result_folder(out_dir, [*read, *([Path(model)] if model and model not in BASELINES else [])])
    from barcast.backtest.cache import ForecastCache
    from barcast.backtest.ledger import Execution
    from barcast.backtest.replay import run_backtest
    from barcast.backtest.report import write_report
    from barcast.daemon.adjustments import read_adjustments

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
    settings = settings_of(files, stamp, config, given)
    if settings["model"] not in BASELINES:
        check_result_folder(out_dir, [Path(settings["model"])])
    shutil.rmtree(out_dir / "models", ignore_errors=True)
    known = None
    if cache is not None:
        with in_folder("--cache", cache):
            cache.mkdir(parents=True, exist_ok=True)
        known = ForecastCache(cache)
    kept = "nothing is written" if cache is None else f"the forecasts that were made are in {cache}"
    with interruptible(lambda: kept), progressing("replaying", None) as advance:
        result = run_backtest(
            files,
            stamp=stamp.value,
            **settings,
            adjustments=read_adjustments(adjustments) if adjustments else (),
            since=moment(since),
            until=moment(until),
            execution=execution,
            models=out_dir / "models" if settings["retrain"] else None,
            trials=trials,
            cache=known,
            scratch=there(out_dir),
            progress=advance,
        )
    _print_result(result)
    if known is not None:
        behind = " behind the calibration; paths are not kept" if settings["touch"] else ""
        asked = f"the model was asked {known.made:,} times"
        out.print(f"{known.kept:,} forecasts were known in {cache}, {asked}{behind}")
    if result.meta["warning"]:
        err.print(str(result.meta["warning"]), style="yellow", markup=False)
    with in_folder("--out", out_dir):
        result.save(out_dir)
        write_report(result, out_dir / "report.html")
    out.print(f"report: {(out_dir / 'report.html').absolute()}", soft_wrap=True)


def check_given(config: Path | None, given: Mapping[str, Any]) -> None:
    """Raise BadParameter for options (name -> value) of a tested path that do not go with one another."""
    others_of(given["symbol-calendar"])
    named = [option for option, value in given.items() if value is not None and option != "training-time"]
    if config is not None and named:
        raise typer.BadParameter(f"--{named[0]} is taken from --config: give one of the two")
    if given["retrain-steps"] is not None and given["retrain"] is None:
        raise typer.BadParameter("--retrain-steps goes with --retrain")
    if given["training-time"] is not None and given["retrain"] is None and config is None:
        raise typer.BadParameter("--training-time goes with --retrain or --config")


def settings_of(
    files: list[Path], stamp: Stamp, config: Path | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What `run_backtest` is told of a path: from an instance's configuration, or as the options say."""
    from barcast.daemon.config import cron_schedule

    waits = {"training_time": given["training-time"] or "30m"}
    if config is not None:
        return _of_instance(config) | waits
    calendar, retrain = given["calendar"] or "24x7", given["retrain"]
    return {
        "model": given["model"] or "fhs",
        "timeframe": given["timeframe"] or found_timeframe(files, stamp, calendar, given["symbol"]),
        "calendar": calendar,
        "calendars": others_of(given["symbol-calendar"]),
        "symbols": given["symbol"],
        "sampler": given["sampler"],
        "steps": given["steps"],
        "touch": pairs_of(given["touch"]),
        "strategies": given["strategy"] or ["quantile-band", "median-drift"],
        "retrain": None if retrain is None else cron_schedule(retrain, given["retrain-steps"]),
    } | waits


def _of_instance(config: Path) -> dict[str, Any]:
    """What an instance forecasts, and how: as its settings say, from the model that serves at first."""
    from barcast.daemon.config import load

    settings = load(config)
    model, path, asked = settings.model, settings.settings(), settings.retrain
    return {
        "model": model.first if model.name == "champion" else model.name,
        "timeframe": path.timeframe,
        "calendar": path.calendar,
        "calendars": path.calendars,
        "symbols": path.symbols or None,
        "sampler": path.sampler,
        "steps": path.steps,
        "touch": path.touch,
        "max_jump": path.max_jump,
        "strategies": path.strategies,
        "retrain": asked if asked and (asked.cron or asked.max_age or asked.drift) else None,
    }


@app.command(rich_help_panel=HISTORY)
def evaluate(
    files: Files,
    stamp: Stamped,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A checkpoint directory, or a baseline such as fhs; may be repeated. hs, which skill is "
            "measured against, is always there, and all other baselines as long as none is named."
        ),
    ] = None,
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            help="First close of an origin, as --until; default: where no model has learnt from.",
            metavar="TIME",
            formats=FORMATS,
        ),
    ] = None,
    until: Until = None,
    folds: Annotated[int, typer.Option(help="Parts of equal time, one after the other.", min=1)] = 4,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Bars from one origin to the next, on a grid common to all symbols. Default: 1 from a day "
            "on, else 5.",
            min=1,
        ),
    ] = None,
    paths: Annotated[
        bool,
        typer.Option(
            "--paths",
            help="Also judge paths, of models that forecast them: energy and variogram score, and which of "
            "two barriers is touched first, beside other couplings and a Brownian motion.",
        ),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="HTML file to write a report to.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write all numbers to.")
    ] = None,
) -> None:
    """Compare models on identical rolling origins: CRPS, skill, coverage, each with its error.

    Bars before --since only fill the windows.
    """
    used = [*files, *([adjustments] if adjustments else [])]
    for option, path in (("--report", report), ("--json", json_file)):
        if path is not None:
            check_output(option, path, used)
            used.append(path)
    from barcast.backtest.evaluate import evaluate as compare
    from barcast.backtest.evaluate import open_field
    from barcast.backtest.report import write_evaluation
    from barcast.daemon.history import digest

    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    field = open_field(model or [], timeframe, paths)
    for name, reason in field.left_out.items():
        err.print(f"{name} left out: {reason}", highlight=False, markup=False, soft_wrap=True)
    with (
        histories_of(files, stamp, closes, symbol, until, adjustments) as histories,
        progressing("forecasting", None) as advance,
    ):
        result = compare(
            field,
            histories.values(),
            closes.timeframe,
            since=moment(since),
            until=moment(until),
            folds=folds,
            stride=stride,
            progress=advance,
        )
    result.meta.update(calendar=calendar, files=[f.name for f in files], files_sha256=digest(files))
    _print_evaluation(result)
    if result.meta["warning"]:
        err.print(str(result.meta["warning"]), style="yellow", markup=False)
    if report is not None:
        with writing("--report", report):
            write_evaluation(result, report)
        out.print(f"report: {report.absolute()}", soft_wrap=True)
    if json_file is not None:
        with writing("--json", json_file):
            json_file.write_text(result.json())
        out.print(f"numbers: {json_file.absolute()}", soft_wrap=True)


@app.command(rich_help_panel=HISTORY)
def schedulers(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory of a diffusion model.")],
    files: Files,
    stamp: Stamped,
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    until: Until = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps to try; may be repeated. Default: 1, 2, 4, 8 and 20.", min=1, max=MOST_STEPS
        ),
    ] = None,
    origins: Annotated[int, typer.Option(help="Bars to forecast from, about.", min=10)] = 300,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write all numbers to.")
    ] = None,
) -> None:
    """Compare the samplers of a diffusion model, and choose one: the cheapest that is as good.

    Forecasts are made where the model has not learnt from; the choice is made by the older half of them, and
    the newer half shows whether it holds.
    """
    if json_file is not None:
        check_output("--json", json_file, [*files, *([adjustments] if adjustments else [])])
    from barcast.backtest.schedulers import STEPS, compare, diffuses

    if not diffuses(model):
        out.print(
            "Training found that the diffusion adds nothing to this model: its denoiser is off, all samplers "
            "are the same, and there is nothing to compare or to configure.",
            highlight=False,
        )
        return
    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    with (
        histories_of(files, stamp, closes, symbol, until, adjustments) as histories,
        progressing("forecasting", None) as advance,
    ):
        result = compare(
            model,
            histories.values(),
            closes.timeframe,
            steps=steps or STEPS,
            origins=origins,
            clock=time.process_time,
            progress=advance,
        )
    _print_schedulers(result)
    if json_file is not None:
        with writing("--json", json_file):
            json_file.write_text(result.json())
        out.print(f"numbers: {json_file.absolute()}", soft_wrap=True)


class Shipped(StrEnum):
    """The models that come with the sample bars: the kinds of `barcast.backtest.sample.CHECKPOINTS`."""

    sssd = "sssd"
    ldm4ts = "ldm4ts"


@app.command(rich_help_panel=HISTORY)
def demo(
    folder: Annotated[Path, typer.Option(help="Working folder; made anew.")] = Path("demo-run"),
    broker: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a broker of your own, such as Debian's mosquitto; default: an embedded one."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long the bars are fed.", min=5)] = 60.0,
    model: Annotated[
        Shipped, typer.Option(help="The shipped model that serves; ldm4ts needs the extra hub.")
    ] = Shipped.sssd,
) -> None:
    """Show it all on real bars: broker, daemon, signals, a retraining, a replay, a backtest."""
    from barcast.backtest.demo import Demo

    Demo(folder, broker, seconds, out, model).run()


def _print_result(result: "BacktestResult") -> None:
    """Forecasts beside the baselines, and the books; the report has the rest, and what the numbers are."""
    scores = Table(title="forecasts, all symbols pooled", title_justify="left", box=SIMPLE_HEAD)
    others = result.skill["other"].unique(maintain_order=True).to_list()
    pooled = result.skill.filter(symbol="all", regime="all").sort("skill", descending=True)
    best = {row["horizon"]: row["other"] for row in pooled.iter_rows(named=True)}
    head = ["+bars", "forecasts", "CRPS, bp", "in 50 %", "in 80 %", "in 90 %"]
    for column in (*head, *(["% over best"] if others else [])):
        scores.add_column(column, justify="right")
    for row in result.scores.filter(symbol="all").iter_rows(named=True):
        shares = (row[f"coverage_{nominal}"] for nominal in (50, 80, 90))
        inside = ("-" if share is None else f"{100 * share:.1f} %" for share in shares)
        cells = [str(row["horizon"]), str(row["n"]), f"{1e4 * row['crps']:.2f}", *inside]
        if others:
            other = best.get(row["horizon"])
            own = pooled.filter(horizon=row["horizon"], other=other).drop_nulls("error")
            cells.append(f"{own['skill'][0]:z.2f} ±{own['error'][0]:.2f} {other}" if own.height else "-")
        scores.add_row(*cells)
    books = Table(title="books, after costs", title_justify="left", box=SIMPLE_HEAD)
    columns = {
        "return": ("total_return", 100, " %"),
        "a year": ("cagr", 100, " %"),
        "Sharpe": ("sharpe", 1, ""),
        "deflated": ("dsr", 1, ""),
        "drawdown": ("max_drawdown", 100, " %"),
        "turnover": ("turnover", 1, ""),
        "costs": ("costs", 100, " %"),
    }
    books.add_column("strategy")
    for column in (*columns, "fills"):
        books.add_column(column, justify="right")
    for row in result.portfolio.iter_rows(named=True):
        cells = [
            "-" if row[name] is None else f"{scale * row[name]:.2f}{unit}"
            for name, scale, unit in columns.values()
        ]
        books.add_row(row["strategy"], *cells, str(row["fills"]))
    wide().print(scores, books)
    if result.trainings.height:
        served = int(result.trainings["accepted"].sum())
        why = "" if served else f": {result.trainings['reason'][-1]}"
        count = result.trainings.height
        out.print(f"{count} training{'s' * (count > 1)}, {served} took over{why}", soft_wrap=True)


def _print_evaluation(result: "Evaluation") -> None:
    """A table for each horizon, the best model first; bold is what beats the best baseline."""
    from barcast.backtest.paths import gaussian

    console = wide()
    for horizon in result.meta["horizons"]:
        pooled = result.scores.filter(fold="all", horizon=horizon).sort("crps")
        n, times = pooled.row(0, named=True)["n"], pooled.row(0, named=True)["times"]
        best = result.best_baseline(horizon)
        table = Table(
            title=f"+{horizon}: {n} forecasts at {times} times",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
        )
        table.add_column("model", overflow="fold")
        others = dict.fromkeys(["hs", best])
        names = (f"% over {other}" for other in others)
        for name in ("CRPS, bp", *names, "in 50 %", "in 80 %", "in 90 %", "worst", "direction"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in pooled.iter_rows(named=True):
            gains = [result.gain(horizon, row["model"], other) for other in others]
            over = ["-" if gain is None else f"{gain.value:z.2f} ±{gain.error:.2f} " for gain in gains]
            last = gains[-1]
            style = None
            if last is not None and abs(last.value) > 2 * last.error:
                over[-1] = f"{over[-1][:-1]}*"
                style = "bold" if last.value > 0 else None
            inside = [_share(row[f"coverage_{p}"], row[f"coverage_{p}_error"]) for p in (50, 80, 90)]
            said = [f"{row['worst']:.3f}", _share(row["direction"], row["direction_error"])]
            table.add_row(row["model"], f"{1e4 * row['crps']:.2f}", *over, *inside, *said, style=style)
        console.print(table)
    if result.paths is not None and result.touch is not None:
        console.print(_paths_table(result.paths, result.touch))
        console.print("The other barriers are on the page (--report).", highlight=False)
        for model in gaussian(result.paths):
            out.print(f"{model}: its own paths are those of the Gaussian copula", markup=False)
    folds = result.meta["folds"]
    console.print(
        f"{folds[0]['since'][:10]} to {folds[-1]['until'][:10]}, {len(folds)} fold(s). ± is one standard "
        "error, * a difference of more than two from the best baseline. worst: the largest distance of the "
        "share of outcomes below a quantile from its level. direction: the share of outcomes on the side of "
        "zero where the median is.",
        highlight=False,
    )
    for model, count in result.meta["withheld"].items():
        out.print(f"{count} origins left out for all, as {model} makes nothing usable of them", markup=False)


def _print_schedulers(result: "Comparison") -> None:
    """A row for each sampler and steps, the chosen one bold, and what to write into a configuration."""
    meta, chosen = result.meta, result.chosen
    table = Table(
        title="scores over those of {sampler}, {steps} steps, in %".format(**meta["reference"]),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("sampler")
    heads = (f"{score}, {half} half" for score in ("paths", "CRPS") for half in ("1st", "2nd"))
    for column in ("steps", "asks", "CPU ms", *heads):
        table.add_column(column, justify="right", no_wrap=True)
    for trial in result.trials:
        over = [f"{e.value:+z.2f} ±{e.error:.2f}" for score in (trial.energy, trial.crps) for e in score[1:]]
        cells = (str(trial.steps), str(trial.evaluations), f"{trial.cpu_ms:.1f}", *over)
        table.add_row(trial.sampler, *cells, style="bold" if trial is chosen else None)
    console = wide()
    console.print(table)
    counts = meta["origins"]
    console.print(
        f"{counts['validation']} forecasts from {meta['since'][:10]} on, and {counts['confirmation']} from "
        f"{meta['cut'][:10]} to {meta['until'][:10]}, before calibration; paths by their energy score. The "
        f"first half chooses: fewest asks within {100 * meta['tolerance']:g} % in both scores.",
        highlight=False,
    )
    print(f'sampler = "{chosen.sampler}"\nsteps = {chosen.steps}')
    default = "With these lines the quantiles are sampled, too; without them they are those of the map."
    if meta["default"]["sampler"] != "none":
        default = "Without these lines it is {sampler} in {steps} steps.".format(**meta["default"])
    console.print(default, highlight=False)


def _paths_table(paths: "pl.DataFrame", touch: "pl.DataFrame") -> Table:
    """How much better each model's own paths are than others, and Brier scores of the first barriers."""
    from barcast.backtest.paths import JOINT

    up, down = touch.row(0, named=True)["up"], touch.row(0, named=True)["down"]
    table = Table(
        title="paths: by how much the model's own are better, in %",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("model", overflow="fold")
    table.add_column("coupling")
    brier = f"Brier {up:g} up, {down:g} down"
    for name in (*(f"{score}, %" for score in JOINT), brier, "% over brownian"):
        table.add_column(name, justify="right")
    for row in touch.filter(up=up, down=down).iter_rows(named=True):
        cells = [row["model"], row["coupling"]]
        for score in JOINT:
            found = paths.filter(model=row["model"], coupling=row["coupling"], score=score).to_dicts()
            cells += [_gained(one, "own_gain") for one in found] or ["-"]
        table.add_row(*cells, f"{row['brier']:.4f}", _gained(row, "over_har"))
    return table


def _gained(row: dict[str, Any], name: str) -> str:
    return "-" if row[name] is None else f"{row[name]:z.2f} ±{row[f'{name}_error']:.2f}"


def _share(value: float | None, error: float | None) -> str:
    return "-" if value is None or error is None else f"{100 * value:.1f} ±{100 * error:.1f}"
