"""The command line. It is the top layer: the one place that knows the live and the replay side."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from barcast.models import LEVELS, BarcastError, ConfigError, DataError, DiskFullError, default_horizons

if TYPE_CHECKING:
    from barcast.backtest.evaluate import Evaluation
    from barcast.backtest.result import BacktestResult
    from barcast.daemon.calendar import Calendars
    from barcast.daemon.config import Config
    from barcast.models import Window
    from barcast.models.optimiser import Progress as Stand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

EX_CONFIG = 78
"""Exit status for a fault that a person must mend: systemd does not restart on it."""

EX_IOERR = 74
"""Exit status for a full disk: it is worth trying again."""

HELD_OUT_SHARE = 0.1
"""Of the newest bars, which a challenger does not learn from: the gate judges on them."""

HELD_OUT = 1000
"""How many forecasts a new model is shown beside the baselines on, about."""

WIDE = 100
"""Columns that the tables of an evaluation take where there is no terminal."""

REST_SECONDS = 0.005
"""How long a compaction leaves the journal to the daemon after each of its commits."""

LINE_SECONDS = 5.0
"""How often long work says where it stands when nobody watches a terminal."""


class Stamp(StrEnum):
    """Which end of a bar its time names."""

    open = "open"
    close = "close"


class Kind(StrEnum):
    """What is trained."""

    sssd = "sssd"
    lgbm = "lgbm"
    ensemble = "ensemble"


class Precision(StrEnum):
    """In which numbers the losses of a training are computed."""

    fp32 = "fp32"
    bf16 = "bf16"


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
    str | None, typer.Option(help="Of a diffusion model: dpmpp (fast) or ddim; default: the model's own.")
]
Steps = Annotated[
    int | None,
    typer.Option(help="Of a diffusion model: its evaluations per sample; default: the model's own.", min=2),
]


def _version(asked: bool) -> None:
    if asked:
        out.print(version("barcast"))
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Calibrated quantile forecasts of OHLCV bars: live over MQTT, and in backtests on the same path."""


def main() -> None:
    """Run a command; a fault that a person can mend ends in one sentence and exit status 78."""
    faults: list[BaseException] = []
    try:
        app()
    except* BarcastError as group:
        faults = _leaves(group)
    for fault in faults:
        err.print("error: ", style="bold red", end="")
        err.print(str(fault), highlight=False, markup=False, soft_wrap=True)
    if faults:
        again = all(isinstance(fault, DiskFullError) for fault in faults)
        sys.exit(EX_IOERR if again else EX_CONFIG)


@app.command()
def run(config: ConfigFile) -> None:
    """Run the daemon: bars from the broker in, signals out, until SIGTERM or Ctrl-C."""
    from barcast.daemon import log
    from barcast.daemon.app import serve
    from barcast.daemon.config import load

    settings = load(config)
    log.configure(settings.log_level, os.environ.get("JOURNAL_STREAM"))
    parent = ["--parent", str(os.getpid())]
    serve(settings, {verb: [*command, *parent] for verb, command in _children(config).items()})


@app.command()
def worker(config: ConfigFile) -> None:
    """Train or judge for a daemon: once, as it asks for on the listening socket in standard input.

    systemd starts this when the daemon connects, in a unit with limits of its own.
    """
    import socket

    from barcast.daemon import log
    from barcast.daemon.config import load
    from barcast.daemon.worker import work

    settings = load(config)
    log.configure(settings.log_level, os.environ.get("JOURNAL_STREAM"))
    try:
        listener = socket.socket(fileno=sys.stdin.fileno())
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listening = 0
    if not listening:
        raise ConfigError("standard input is no listening socket; let systemd start barcast-retrain@.socket")
    work(listener, {verb: _children(config)[verb] for verb in ("train", "gate")})


@app.command()
def check(config: ConfigFile) -> None:
    """Check a configuration file and say what it means. Starts nothing and loads no model."""
    from barcast.daemon.config import load

    settings = load(config)
    settings.mqtt.address("check")
    others = "".join(f"; {name}: {', '.join(own)}" for name, own in settings.calendars.items())
    table = Table(title=f"{config} is in order", show_header=False, box=None)
    for name, value in (
        ("instance", settings.instance),
        ("state directory", settings.state_dir),
        ("broker", f"{settings.mqtt.host}:{settings.mqtt.port}, root {settings.mqtt.root}"),
        ("bars", f"{settings.timeframe} on calendar {settings.calendar}{others}"),
        ("symbols", ", ".join(settings.symbols) or "those that come"),
        ("model", f"{settings.model.name}, at first {settings.model.first}"),
        ("strategies", ", ".join(s.name for s in settings.strategies()) or "none"),
        ("retraining", _occasions(settings)),
        ("metrics", f"http://{settings.http.host}:{settings.http.port}" if settings.http else "not served"),
    ):
        table.add_row(name, str(value))
    out.print(table)


def _occasions(settings: "Config") -> str:
    """When a training is wanted."""
    asked = settings.retrain
    if asked is None:
        return "never"
    when = [f"{asked.cron} UTC"] if asked.cron else []
    when += [f"at an age of {asked.max_age / 86_400e9:g} days"] if asked.max_age else []
    when += ["at drift"] if asked.drift else []
    return ", ".join([*when, "on demand"])


@app.command()
def contract(
    root: Annotated[str, typer.Option(help="Root topic.")] = "barcast/v1",
) -> None:
    """Print what feeds and readers can rely on: an AsyncAPI 3.0 document of all topics and messages."""
    from barcast.daemon.contract import text

    sys.stdout.write(text(root))


@app.command()
def publish(
    files: Files,
    stamp: Stamped,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Take broker, timeframe, calendar and clock from this TOML file, not from options."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Broker. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Its port. [default: 1883]", min=1, max=65535)] = None,
    root: Annotated[str | None, typer.Option(help="Root topic. [default: barcast/v1]")] = None,
    timeframe: Annotated[
        str | None, typer.Option(help="Length of a bar: {n}{s|m|h|d}, or session. Needed without --config.")
    ] = None,
    calendar: Annotated[
        str | None, typer.Option(help="24x7, fx, or a name of exchange_calendars. [default: 24x7]")
    ] = None,
    symbol_calendar: OtherCalendars = None,
    speed: Annotated[
        float | None,
        typer.Option(help="Times real time; the first bar is sent at once. [default: 1]", min=0.001),
    ] = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Feed bars from files to a broker, each when its close comes on the clock."""
    import asyncio

    from barcast.daemon import log
    from barcast.daemon.app import WallClock, rehearsal
    from barcast.daemon.config import load, parse
    from barcast.daemon.history import bars, scan
    from barcast.daemon.publish import publish as send
    from barcast.daemon.wire import to_text

    log.configure("warning")
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "root": root,
        "timeframe": timeframe,
        "calendar": calendar,
    }
    for name, hours in _others(symbol_calendar).items():
        given.setdefault("calendars", {}).setdefault(hours, []).append(name)
    given = {name: value for name, value in given.items() if value is not None}
    if config is None:
        mqtt = {name: given.pop(name) for name in ("host", "port", "root") if name in given}
        values = {"instance": "publish", "state_dir": Path(), "mqtt": mqtt, **given}
        settings = parse(values, "the command line")
    elif given:
        raise typer.BadParameter(f"--{next(iter(given))} is taken from --config: give one of the two")
    else:
        settings = load(config)
    if settings.rehearsal and speed is not None:
        raise typer.BadParameter("--speed is taken from [rehearsal] in --config: give one of the two")
    frame = scan(files, stamp.value, settings.bar_calendars(), symbol, _ns(since), _ns(until))
    found = list(bars(frame))
    if settings.rehearsal is None:
        first = datetime.fromtimestamp(found[0].close_time / 1e9, UTC)
        settings = settings.model_copy(update={"rehearsal": rehearsal(first, speed or 1.0)})
    address = settings.mqtt.address(f"barcast-publish-{settings.instance}")
    with _progress("publishing", len(found)) as advance:

        def sent(count: int, close_time: int) -> None:
            advance(count, to_text(close_time))

        asyncio.run(send(found, address, settings.mqtt.root, settings.timeframe, WallClock(settings), sent))
    out.print(f"published {len(found)} bars")


@app.command()
def train(
    files: Files,
    stamp: Stamped,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Directory for the checkpoint; one that is there must be a checkpoint."),
    ],
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    until: Until = None,
    horizon: Annotated[
        list[int] | None,
        typer.Option(
            help="Bars ahead; may be repeated. Default: 1, 5, 20 from a day on, else 1, 4, 16; of an "
            "ensemble, those of its first checkpoint."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of each phase; default: from the data.", min=1)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Cap on the training, half for each phase; that it was hit is recorded.", min=0),
    ] = None,
    init_from: Annotated[Path | None, typer.Option(help="Begin from this checkpoint's weights.")] = None,
    hold_out: Annotated[
        float,
        typer.Option(help="Share of the newest bars that are not learnt from, to judge on.", min=0, max=0.5),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers of sssd and lgbm.")] = 0,
    kind: Annotated[
        Kind,
        typer.Option(
            help="sssd, the diffusion model; lgbm, boosted trees (needs the extra baselines); or ensemble."
        ),
    ] = Kind.sssd,
    member: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL", help="Of an ensemble: a baseline or a checkpoint directory; to be repeated."
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Numbers of the losses; bf16 pays only where the processor is built for it."),
    ] = Precision.fp32,
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a batch is computed, one after another.", min=1)
    ] = 1,
) -> None:
    """Train a model on bars closed before --until and write a checkpoint.

    An ensemble averages the quantiles of its members, with weights for each horizon that the validation part
    of the bars chose; it holds copies of members that are checkpoints. --steps, --minutes, --init-from,
    --precision and --accumulate go with sssd alone.

    The same command again goes on with a training that was interrupted. Several processes share a training
    under `torchrun --standalone --nproc_per_node N -m barcast.backtest.cli train ...`.
    """
    wrong: dict[str, object] = {"--seed": seed} if kind == Kind.ensemble else {"--member": member}
    if kind != Kind.sssd:
        wrong |= {"--steps": steps, "--minutes": minutes, "--init-from": init_from}
        wrong |= {"--precision": precision != Precision.fp32, "--accumulate": accumulate > 1}
    for option, given in wrong.items():
        if given:
            raise typer.BadParameter(f"{option} does not go with --kind {kind}: leave it out")
    timeframe = timeframe or _found(files, stamp, calendar, symbol)
    closes = _calendars(calendar, symbol_calendar, timeframe)
    histories = _histories(files, stamp, closes, symbol, until, adjustments)
    _train(
        histories,
        out_dir,
        timeframe,
        kind=kind,
        members=member or (),
        horizons=tuple(horizon) if horizon else None,
        steps=steps,
        minutes=minutes,
        init_from=init_from,
        hold_out=hold_out,
        seed=seed,
        precision=precision,
        accumulate=accumulate,
    )
    if hold_out:
        _print_held_out(histories, out_dir, timeframe)
    if kind == Kind.sssd:
        from barcast.models import optimiser

        optimiser.leave()


@app.command()
def retrain(
    config: ConfigFile,
    now: Annotated[bool, typer.Option("--now", help="Ask the running daemon for a training.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --now: follow it, and say what came of it.")
    ] = False,
) -> None:
    """Say which model serves and how trainings went, or ask the running daemon for one with --now."""
    from barcast.daemon.config import load
    from barcast.daemon.control import Order, ask

    if wait and not now:
        raise typer.BadParameter("--wait goes with --now")
    settings = load(config)
    done = ask(settings.state_dir, Order("retrain" if now else "state", wait=wait), _say)
    if done is None:
        raise ConfigError(f"no daemon runs on {settings.state_dir}: start `barcast run {config}`")
    out.print(done, highlight=False, markup=False, soft_wrap=True)


@app.command()
def rollback(
    config: ConfigFile,
    to: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model id of the store, or a baseline.")
    ] = None,
) -> None:
    """Let the model that served before serve again, or the one of --to. Twice goes back two models.

    A running daemon changes within a bar; without one the next start does.
    """
    from barcast.daemon.app import WallClock
    from barcast.daemon.config import load
    from barcast.daemon.control import Order, ask

    settings = load(config)
    done = ask(settings.state_dir, Order("rollback", to=to), _say)
    if done is None:
        from barcast.daemon import log
        from barcast.daemon.succession import rollback_journal

        log.configure("warning")
        done = rollback_journal(settings, WallClock(settings).now(), to)
    out.print(done, highlight=False, markup=False, soft_wrap=True)


@app.command(hidden=True)
def train_challenger(
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory to write the challenger into.")],
    champion: Annotated[str, typer.Option(help="Model id in the instance's store, or a baseline.")],
    parent: Parent = None,
) -> None:
    """Train a challenger on all bars that an instance knows. The daemon runs this.

    It has the champion's horizons, so that the gate can compare them.
    """
    from barcast.daemon.store import ModelStore

    settings, histories = _known(config, parent)
    card = ModelStore(settings.state_dir / "models", settings.timeframe).open(champion, None, None).card
    _train(
        histories,
        out_dir,
        settings.timeframe,
        horizons=card.horizons,
        levels=card.levels,
        steps=settings.retrain.steps if settings.retrain else None,
        hold_out=HELD_OUT_SHARE,
    )


@app.command()
def gate(
    config: ConfigFile,
    challenger: Annotated[Path, typer.Argument(help="Checkpoint directory of the challenger.")],
    champion: Annotated[str, typer.Option(help="Model id in the instance's store, or a baseline.")],
    margin: Annotated[
        float | None,
        typer.Option(help="Share of CRPS that must be gained; default: [retrain].", min=0, max=1),
    ] = None,
    parent: Parent = None,
) -> None:
    """Judge a challenger against the champion and the baselines on bars it has not learnt from.

    Prints the verdict as JSON; a refusal is a verdict, not a failure: exit status 0.
    """
    import msgspec

    from barcast.daemon.config import Retrain
    from barcast.daemon.gate import judge
    from barcast.daemon.store import ModelStore

    settings, histories = _known(config, parent)
    if margin is None:
        margin = (settings.retrain or Retrain()).margin
    say = _now_and_then()
    verdict = judge(
        challenger,
        ModelStore(settings.state_dir / "models", settings.timeframe).path(champion),
        histories,
        settings.timeframe,
        margin,
        settings.model.sampler,
        settings.model.steps,
        lambda done, count, window: say(f"judging: {done} of {count} forecasts, {window.symbol}"),
    )
    print(msgspec.json.encode(verdict).decode())


@app.command()
def compact(config: ConfigFile, parent: Parent = None) -> None:
    """Let leave what is older than `keep`: bars into the archive, messages and models that nothing needs.

    The daemon does so once a day; by hand it may be done while the daemon runs. It takes no more than idle
    processor time.
    """
    from barcast.daemon.app import WallClock
    from barcast.daemon.config import load
    from barcast.daemon.retention import compact as do
    from barcast.daemon.trainer import give_way

    settings = load(config)
    give_way(19, parent)
    model = settings.model
    done = do(
        settings.state_dir,
        WallClock(settings).now(),
        settings.keep,
        (model.name, model.first),
        lambda: time.sleep(REST_SECONDS),
    )
    print(done.sentence())


@app.command()
def export(
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the files, one a UTC day.")],
    since: Since = None,
    until: Until = None,
) -> None:
    """Write all bars that an instance knows as Parquet files, which other commands read with --stamp close.

    Prices are as they were received: what was declared of splits and rolls is not applied. Files of the same
    days are brought up to date; the daemon may run.
    """
    import polars as pl

    from barcast.daemon.app import WallClock
    from barcast.daemon.bars import every_bar, write_days
    from barcast.daemon.config import load

    settings = load(config)
    bars, _ = every_bar(settings.state_dir, settings.bar_calendars(), WallClock(settings).now())
    close = pl.col("close_time").to_physical()
    for moment, keeps in ((_ns(since), close.ge), (_ns(until), close.lt)):
        bars = bars if moment is None else bars.filter(keeps(moment))
    if bars.is_empty():
        raise DataError(f"{settings.state_dir}: no bar closes in that time: widen it")
    with _folder("--out", out_dir):
        changed = write_days(bars, out_dir, settings.timeframe)
    days = bars["close_time"].dt.date().n_unique()
    out.print(f"{bars.height} bars in {days} files, {changed} of them written: {out_dir.absolute()}")


@app.command()
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
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a symbol, with all levels, for scripts.")
    ] = False,
) -> None:
    """Forecast every symbol from its last bar and print the quantiles, in prices."""
    import numpy as np

    from barcast.daemon.wire import to_text
    from barcast.models import Window, check_sampled, open_model, usable

    timeframe = timeframe or _found(files, stamp, calendar, symbol)
    closes = _calendars(calendar, symbol_calendar, timeframe)
    forecaster = open_model(model, timeframe, sampler, steps)
    card = forecaster.card
    check_sampled(model, card, sampler, steps)
    histories = _histories(files, stamp, closes, symbol, until, adjustments)
    windows = []
    for name, h in histories.items():
        if len(h) < card.min_window:
            err.print(f"{name}: {len(h)} bars, {card.min_window} are needed: left out")
        else:
            windows.append(Window(name, h.close_times[-card.window :], h.values[-card.window :]))
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
                "rise": f.rise.tolist(),
                "warming": f.warming,
                "model": card.model,
            }
            print(json.dumps(line))
        return
    table = Table(title=f"model {card.model}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shown = [p for p in (0.05, 0.25, 0.5, 0.75, 0.95) if p in card.levels] or list(card.levels)
    for column in ("symbol", "close", "until", *(f"q{round(100 * p):02d}" for p in shown)):
        table.add_column(column, justify="left" if column == "symbol" else "right", no_wrap=True)
    for f in forecasts:
        ends = closes.of(f.symbol).closes_after(f.close_time, max(f.horizons))
        table.add_row(f.symbol, f"{f.reference:.5g}", to_text(f.close_time)[:16])
        for bars, row in zip(f.horizons, f.reference * np.exp(f.quantiles), strict=True):
            prices = [f"{row[card.levels.index(p)]:.5g}" for p in shown]
            table.add_row("", f"+{bars}", to_text(ends[bars - 1])[:16], *prices)
    _wide().print(table)


@app.command()
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
) -> None:
    """Forecast from many bars of the past, each seen without what came after it.

    Writes a row for each different origin and horizon (bars): symbol, ts, horizon, and the quantiles as log
    returns from the origin's close: q05, q10 and so on.
    """
    _check_output("--out", out_file, [*files, origins, *([adjustments] if adjustments else [])])
    if out_file.suffix == ".csv":
        raise typer.BadParameter(f"{out_file} is to hold Parquet: name it so", param_hint="--out")
    from barcast.backtest.predict import predict as quantiles
    from barcast.daemon.adjustments import read_adjustments
    from barcast.daemon.history import read_origins, read_windows, scan
    from barcast.models import check_sampled, open_model

    timeframe = timeframe or _found(files, stamp, calendar, None)
    closes = _calendars(calendar, symbol_calendar, timeframe)
    forecaster = open_model(model, timeframe, sampler, steps)
    check_sampled(model, forecaster.card, sampler, steps)
    wanted = read_origins(origins, stamp.value, closes)
    histories = read_windows(scan(files, stamp.value, closes))
    declared = read_adjustments(adjustments) if adjustments else []
    with _progress("forecasting", wanted.height) as advance:
        made = quantiles(forecaster, histories, wanted, str(origins), declared, advance)
    with _writing("--out", out_file):
        made.write_parquet(out_file)
    out.print(f"{wanted.height} origins, {made.height} rows: {out_file.absolute()}", soft_wrap=True)


@app.command()
def backtest(
    files: Files,
    stamp: Stamped,
    model: ModelName = "fhs",
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="quantile-band, median-drift; may be repeated. Default: both.")
    ] = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
    sampler: Sampler = None,
    steps: Steps = None,
    commission: Annotated[
        float, typer.Option(help="Commission in basis points of the traded value.", min=0)
    ] = 1.0,
    slippage: Annotated[float, typer.Option(help="Slippage in basis points of the price.", min=0)] = 2.0,
    report: Annotated[Path, typer.Option(help="HTML file to write the report to.")] = Path("report.html"),
) -> None:
    """Replay bars from files through the live path: scores, fills and an HTML report.

    Bars before --since only warm the windows up. A target is filled at the next bar's open.
    """
    _check_output("--report", report, [*files, *([adjustments] if adjustments else [])])
    from barcast.backtest.replay import run_backtest
    from barcast.backtest.report import write_report
    from barcast.daemon.adjustments import read_adjustments

    timeframe = timeframe or _found(files, stamp, calendar, symbol)
    with _progress("replaying", None) as advance:
        result = run_backtest(
            files,
            stamp=stamp.value,
            model=model,
            timeframe=timeframe,
            calendar=calendar,
            calendars=_others(symbol_calendar),
            adjustments=read_adjustments(adjustments) if adjustments else (),
            strategies=strategy or ["quantile-band", "median-drift"],
            symbols=symbol,
            since=_ns(since),
            until=_ns(until),
            sampler=sampler,
            steps=steps,
            commission_bp=commission,
            slippage_bp=slippage,
            progress=advance,
        )
    _print_result(result)
    if result.meta["warning"]:
        err.print(str(result.meta["warning"]), style="yellow")
    with _writing("--report", report):
        write_report(result, report)
    out.print(f"report: {report.absolute()}")


@app.command()
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
            _check_output(option, path, used)
            used.append(path)
    from barcast.backtest.evaluate import evaluate as compare
    from barcast.backtest.evaluate import open_field
    from barcast.backtest.report import write_evaluation
    from barcast.daemon.history import digest

    timeframe = timeframe or _found(files, stamp, calendar, symbol)
    closes = _calendars(calendar, symbol_calendar, timeframe)
    field = open_field(model or [], timeframe)
    for name, reason in field.left_out.items():
        err.print(f"{name} left out: {reason}", highlight=False, markup=False, soft_wrap=True)
    histories = _histories(files, stamp, closes, symbol, until, adjustments)
    with _progress("forecasting", None) as advance:
        result = compare(
            field,
            list(histories.values()),
            closes.timeframe,
            since=_ns(since),
            until=_ns(until),
            folds=folds,
            stride=stride,
            progress=advance,
        )
    result.meta.update(calendar=calendar, files=[f.name for f in files], files_sha256=digest(files))
    _print_evaluation(result)
    if result.meta["warning"]:
        err.print(str(result.meta["warning"]), style="yellow", markup=False)
    if report is not None:
        with _writing("--report", report):
            write_evaluation(result, report)
        out.print(f"report: {report.absolute()}", soft_wrap=True)
    if json_file is not None:
        with _writing("--json", json_file):
            json_file.write_text(result.json())
        out.print(f"numbers: {json_file.absolute()}", soft_wrap=True)


@app.command()
def replay(
    journal: Annotated[Path, typer.Argument(help="journal.db of an instance's state directory.")],
    capture: Annotated[
        Path | None,
        typer.Option(
            help='What a subscriber wrote down, one ["topic", "payload"] a line: compare byte by byte, '
            "exit 1 on a difference."
        ),
    ] = None,
) -> None:
    """Compute every message of a recorded live run again, from its journal and the models beside it."""
    from barcast.backtest.replay import compare, left_until, read_capture, replay_journal

    captured = read_capture(capture) if capture else None
    messages = replay_journal(journal)
    signals = sum("/signals/" in m.topic for m in messages)
    out.print(f"{len(messages)} messages replayed, {signals} of them signals")
    if captured is not None:
        difference = compare(messages, captured, left_until(journal))
        out.print(difference.sentence())
        if difference.differing or not difference.signals:
            raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Working folder; made anew.")] = Path("demo-run"),
    broker: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a broker of your own, such as Debian's mosquitto; default: an embedded one."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long the bars are fed.", min=5)] = 60.0,
) -> None:
    """Show it all on real bars: broker, daemon, signals, a retraining, a replay, a backtest."""
    from barcast.backtest.demo import Demo

    Demo(folder, broker, seconds, out).run()


def _known(config: Path, parent: int | None) -> "tuple[Config, dict[str, Window]]":
    """The settings of an instance and all bars that it knows, in a process that gives way to all others."""
    from barcast.daemon.app import WallClock
    from barcast.daemon.bars import known_bars
    from barcast.daemon.config import Retrain, load
    from barcast.daemon.trainer import give_way

    settings = load(config)
    give_way((settings.retrain or Retrain()).nice, parent)
    say = _now_and_then()
    histories = known_bars(
        settings.state_dir,
        settings.bar_calendars(),
        WallClock(settings).now(),
        lambda count: say(f"reading the bars: {count} of the journal"),
    )
    return settings, histories


def _say(line: str) -> None:
    err.print(line, highlight=False, markup=False, soft_wrap=True)


def _now_and_then() -> Callable[[str], None]:
    """Says a line every few seconds: whoever listens takes silence for a fault."""
    said = time.monotonic()

    def say(line: str) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            _say(line)

    return say


def _train(
    histories: Any,
    out_dir: Path,
    timeframe: str,
    *,
    kind: Kind = Kind.sssd,
    members: Sequence[str] = (),
    horizons: tuple[int, ...] | None = None,
    levels: tuple[float, ...] = LEVELS,
    steps: int | None = None,
    minutes: float | None = None,
    init_from: Path | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    precision: str = "fp32",
    accumulate: int = 1,
) -> None:
    """Train, or go on with what was interrupted, and write the model; helping processes end here."""
    from barcast.models import ensemble, gbm, optimiser, training
    from barcast.models.checkpoint import check_target, load, open_member, save
    from barcast.models.trained import Model, Trained

    try:
        out_dir = check_target(out_dir)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {error}; name a directory that you may write") from error
    start = None
    if init_from:
        first = load(init_from)
        if not isinstance(first.trained, Trained):
            raise ConfigError(f"--init-from: {init_from} is no sssd; name one, or train from scratch")
        start = first.model, first.trained
    bars = list(histories.values())
    outputs: dict[str, Any] = {"timeframe": timeframe, "horizons": horizons or default_horizons(timeframe)}
    outputs |= {"levels": levels, "hold_out": hold_out}
    trained: Model
    state = out_dir.with_name(f".{out_dir.name}.training")
    if kind == Kind.sssd:
        with _epochs() as stand:
            trained = training.train(
                bars,
                **outputs,
                steps=steps,
                seconds=None if minutes is None else 60 * minutes,
                clock=time.monotonic,
                init_from=start,
                seed=seed,
                precision=precision,
                accumulate=accumulate,
                state=state,
                progress=stand,
            )
        if not optimiser.is_main():
            optimiser.leave()
    else:
        with _progress("training", None) as advance:

            def say(text: str) -> None:
                advance(0, text)

            if kind == Kind.ensemble:
                opened = [open_member(name) for name in members]
                known = next((m.trained for m in opened if m.trained is not None), None)
                if horizons is None and known is not None:
                    outputs["horizons"] = known.forecaster("", None, None).card.horizons
                trained = ensemble.train(bars, opened, **outputs, progress=say)
            else:
                trained = gbm.train(bars, **outputs, seed=seed, progress=say)
    model = save(trained, out_dir)
    state.unlink(missing_ok=True)
    if left_out := ", ".join(trained.record.left_out):
        err.print(f"left out, as too short or standing still: {left_out}", markup=False, soft_wrap=True)
    if isinstance(trained, ensemble.Ensemble):
        for line in trained.sentences():
            err.print(line, markup=False, soft_wrap=True)
    if isinstance(trained, Trained):
        step = trained.record.denoiser_step
        said = (
            f"the diffusion of step {step}, on top of the map"
            if step
            else "the map alone, step 0 of diffusion"
        )
        err.print(f"chosen by validation: {said}", markup=False, soft_wrap=True)
    err.print(f"model {model} written to {out_dir}", markup=False, soft_wrap=True)


@contextmanager
def _epochs() -> "Iterator[Callable[[Stand], None]]":
    """Show a training: a bar with the time left on a terminal, a log line for each epoch elsewhere."""
    if err.is_terminal:
        columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=err, transient=True) as bar:
            task, crps = bar.add_task("training", total=None), ""

            def show(p: "Stand") -> None:
                nonlocal crps
                if p.note:
                    err.print(p.note, markup=False, soft_wrap=True)
                crps = crps if p.crps is None else f" crps {p.crps:.4f}"
                loss = "" if p.loss is None else f" loss {p.loss:.4f}"
                text = f"{p.phase} {p.step}/{p.steps}{loss}{crps}"
                bar.update(task, total=p.total, completed=p.done, description=text)

            yield show
        return
    import structlog

    from barcast.daemon import log

    log.configure()
    logger = structlog.get_logger()

    def line(p: "Stand") -> None:
        if p.note:
            logger.info("resume", note=p.note)
        if p.crps is not None:
            logger.info("epoch", phase=p.phase, step=p.step, steps=p.steps, loss=p.loss, crps=p.crps)

    yield line


def _print_held_out(histories: dict[str, "Window"], model: Path, timeframe: str) -> None:
    """Show how a new model does beside the baselines on the bars that its training left for the gate."""
    from barcast.daemon.wire import to_text
    from barcast.models import BASELINES, compare, even_stride
    from barcast.models.checkpoint import load

    checkpoint = load(model)
    mine, record = checkpoint.forecaster(), checkpoint.trained.record
    others = [BASELINES[name](timeframe, mine.card.horizons, mine.card.levels) for name in ("hs", "fhs")]
    held_out = sum(int((w.close_times >= record.validation_end).sum()) for w in histories.values())
    try:
        scores = compare(
            [mine, *others],
            list(histories.values()),
            since=record.validation_end,
            until=record.until,
            stride=even_stride(held_out, HELD_OUT),
        )
    except DataError as error:
        err.print(f"no score on held-out bars: {error}")
        return
    period = f"{to_text(record.validation_end)[:10]} to {to_text(record.until)[:10]}"
    table = Table(
        title=f"CRPS in bp on {scores[0].n} held-out forecasts, {period}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("model")
    for h in mine.card.horizons:
        table.add_column(f"+{h}", justify="right")
        table.add_column("in 90 %", justify="right")
    for score in scores:
        cells = []
        for h in range(len(score.horizons)):
            inside = score.coverage[h, score.intervals.index(0.9)] if 0.9 in score.intervals else float("nan")
            cells += [f"{1e4 * score.crps[h]:.2f}", f"{100 * inside:.1f} %"]
        table.add_row(score.model, *cells)
    err.print(table)


def _children(config: Path) -> dict[str, list[str]]:
    """Verbs of the daemon's processes about an instance, and the argument list that begins each."""
    names = {"train": "train-challenger", "gate": "gate", "compact": "compact"}
    me = [sys.executable, "-m", "barcast.backtest.cli"]
    return {verb: [*me, name, str(config)] for verb, name in names.items()}


def _others(given: list[str] | None) -> dict[str, str]:
    """Symbol -> calendar, from SYMBOL=NAME."""
    pairs = [text.partition("=") for text in given or ()]
    for symbol, equals, name in pairs:
        if not (symbol and equals and name):
            raise typer.BadParameter("write SYMBOL=NAME, such as EURUSD=fx", param_hint="--symbol-calendar")
    return {symbol: name for symbol, _, name in pairs}


def _found(files: list[Path], stamp: Stamp, calendar: str, symbols: list[str] | None) -> str:
    """The timeframe of the files, and say so; days of an exchange are its sessions."""
    from barcast.daemon.history import find_timeframe

    found, how = find_timeframe(files, stamp.value, symbols)
    text = "session" if found.text == "1d" and calendar not in ("24x7", "fx") else found.text
    err.print(f"timeframe {text}: {how}", highlight=False, markup=False, soft_wrap=True)
    return text


def _calendars(calendar: str, others: list[str] | None, timeframe: str) -> "Calendars":
    from barcast.daemon.calendar import Calendars
    from barcast.daemon.timeframe import Timeframe as Parsed

    return Calendars(calendar, Parsed.parse(timeframe), _others(others))


def _histories(
    files: list[Path],
    stamp: Stamp,
    calendars: "Calendars",
    symbols: list[str] | None,
    until: datetime | None,
    adjustments: Path | None,
) -> "dict[str, Window]":
    """The whole history of each symbol, on the price basis of its newest bar."""
    from barcast.daemon.adjustments import adjusted, read_adjustments
    from barcast.daemon.history import read_windows, scan

    windows = read_windows(scan(files, stamp.value, calendars, symbols, None, _ns(until)))
    return adjusted(windows, read_adjustments(adjustments)) if adjustments else windows


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _print_result(result: "BacktestResult") -> None:
    pooled = result.scores.filter(symbol="all")
    scores = Table(title=f"forecasts of {result.meta['model']}, all symbols pooled", title_justify="left")
    for column in ("horizon, bars", "forecasts", "CRPS, bp", "in 50 %", "in 80 %", "in 90 %"):
        scores.add_column(column, justify="right")
    for row in pooled.iter_rows(named=True):
        inside = (f"{100 * row[f'coverage_{nominal}']:.1f} %" for nominal in (50, 80, 90))
        scores.add_row(str(row["horizon"]), str(row["n"]), f"{1e4 * row['crps']:.2f}", *inside)
    books = Table(title="books, after costs", title_justify="left")
    for column in ("strategy", "return", "Sharpe", "drawdown", "fills"):
        books.add_column(column, justify="left" if column == "strategy" else "right")
    for row in result.portfolio.iter_rows(named=True):
        sharpe = "-" if row["sharpe"] is None else f"{row['sharpe']:.2f}"
        percent = (f"{100 * row[name]:.2f} %" for name in ("total_return", "max_drawdown"))
        total, drawdown = percent
        books.add_row(row["strategy"], total, sharpe, drawdown, str(row["fills"]))
    out.print(scores, books)


def _print_evaluation(result: "Evaluation") -> None:
    """A table for each horizon, the best model first; bold is what beats the best baseline."""
    console = _wide()
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
        for name in ("CRPS, bp", *names, "in 50 %", "in 80 %", "in 90 %", "worst"):
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
            table.add_row(
                row["model"], f"{1e4 * row['crps']:.2f}", *over, *inside, f"{row['worst']:.3f}", style=style
            )
        console.print(table)
    folds = result.meta["folds"]
    console.print(
        f"{folds[0]['since'][:10]} to {folds[-1]['until'][:10]}, {len(folds)} fold(s). ± is one standard "
        "error, * a difference of more than two from the best baseline; worst is the largest distance of the "
        "share of outcomes below a quantile from its level.",
        highlight=False,
    )
    for model, count in result.meta["withheld"].items():
        out.print(f"{count} origins left out for all, as {model} makes nothing usable of them", markup=False)


def _share(value: float | None, error: float | None) -> str:
    return "-" if value is None or error is None else f"{100 * value:.1f} ±{100 * error:.1f}"


def _ns(moment: datetime | None) -> int | None:
    from barcast.daemon.wire import to_ns

    return None if moment is None else to_ns(moment.replace(tzinfo=UTC))


def _wide() -> Console:
    """The terminal, or where there is none room enough for any table."""
    return out if out.is_terminal else Console(width=max(out.width, WIDE))


def _check_output(option: str, path: Path, others: Iterable[Path]) -> None:
    """Try whether a file can be written, before work is spent on what goes in; leave it as it is.

    It must be none of the `others`, which are read or written, too.
    """
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory: name a file", param_hint=option)
    for other in others:
        if path.resolve() == other.resolve():
            raise typer.BadParameter(
                f"{path} is in use by this very command: name another file", param_hint=option
            )
    with _writing(option, path):
        try:
            with path.open("ab") if path.exists() else TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _folder(option: str, path: Path) -> Iterator[None]:
    """Make what forbids writing into a folder the option's fault."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}: {error}; name a folder that you may write, with room in it") from error


@contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """Make the folder of a file that is about to be written; what forbids writing is the option's fault."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{option}: {error}; name a file that you may write") from error


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
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


if __name__ == "__main__":
    main()
