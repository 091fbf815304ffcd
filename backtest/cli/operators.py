"""Commands of those who run a daemon."""

import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from barcast.backtest.cli.terminal import (
    LIVE,
    ConfigFile,
    Files,
    OtherCalendars,
    Parent,
    Since,
    Stamped,
    Symbols,
    Until,
    app,
    in_folder,
    moment,
    now_and_then,
    others_of,
    out,
    progressing,
    tell,
)
from barcast.backtest.cli.training import epochs, tell_model
from barcast.models import BASELINES, ConfigError, DataError

if TYPE_CHECKING:
    from barcast.daemon.config import Config
    from barcast.daemon.control import Order
    from barcast.models import Window

REST_SECONDS = 0.005
"""How long a compaction leaves the journal to the daemon after each of its commits."""


@app.command(rich_help_panel=LIVE)
def run(config: ConfigFile) -> None:
    """Run the daemon: bars from the broker in, signals out, until SIGTERM or Ctrl-C."""
    from barcast.daemon import log
    from barcast.daemon.app import serve
    from barcast.daemon.config import load

    settings = load(config)
    log.configure(settings.log_level, os.environ.get("JOURNAL_STREAM"))
    parent = ["--parent", str(os.getpid())]
    serve(settings, {verb: [*command, *parent] for verb, command in _children(settings.in_force).items()})


@app.command(rich_help_panel=LIVE)
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
    work(listener, {verb: _children(config)[verb] for verb in ("train", "gate", "choices")})


@app.command(rich_help_panel=LIVE)
def check(config: ConfigFile) -> None:
    """Check a configuration file and say what it means. Starts nothing and loads no model."""
    from barcast.daemon.config import load

    settings = load(config)
    settings.mqtt.address("check")
    if settings.http:
        settings.http.check()
    place = settings.journal_place
    if settings.model.touch:
        _check_paths(settings)
    others = "".join(f"; {name}: {', '.join(own)}" for name, own in settings.calendars.items())
    table = Table(title=f"{config} is in order", show_header=False, box=None)
    for name, value in (
        ("instance", settings.instance),
        ("state directory", settings.state_dir),
        *([("journal", place)] if settings.journal else []),
        ("broker", f"{settings.mqtt.host}:{settings.mqtt.port}, root {settings.mqtt.root}"),
        ("bars", f"{settings.timeframe} on calendar {settings.calendar}{others}"),
        ("symbols", ", ".join(settings.symbols) or "those that come"),
        ("model", f"{settings.model.name}, at first {settings.model.first}"),
        *_sampling(settings),
        ("strategies", ", ".join(s.name for s in settings.strategies()) or "none"),
        ("retraining", _occasions(settings)),
        ("verification", _verified(settings)),
        ("page, metrics", _page(settings)),
    ):
        table.add_row(name, str(value))
    out.print(table)


def _check_paths(settings: "Config") -> None:
    """Raise ConfigError where the model that a start would let serve knows no paths. Loads no model."""
    from barcast.daemon.events import Champion
    from barcast.daemon.journal import Journal, Kind, exists
    from barcast.models.catalog import header

    model, place, served = settings.model, settings.journal_place, None
    if model.name == "champion" and exists(place):
        journal = Journal(place, readonly=True)
        try:
            served = journal.last(Kind.ACTIVATION)
        finally:
            journal.close()
    key, name = ("first", model.first) if model.name == "champion" else ("name", model.name)
    remedy = f"put a checkpoint directory of an SSSD or LDM4TS into model.{key}, or leave model.touch out"
    if served is not None:
        key, name = "name", Champion.decode(served.payload).model
        remedy = (
            "let an SSSD or LDM4TS serve, by `barcast ctl CONFIG rollback --to` or model.name, or leave "
            "model.touch out"
        )
    kind = "baseline"
    if name not in BASELINES:
        store = settings.state_dir / "models" / name
        about = header(store if store.is_dir() else Path(name))
        kind = str(about.get("kind"))
        if (timeframe := about.get("timeframe")) != settings.timeframe:
            raise ConfigError(
                f"model.{key}: {name} was trained on {timeframe!r} bars, not on {settings.timeframe!r}; name "
                "another model or train one"
            )
    if kind not in ("sssd", "ldm4ts"):
        raise ConfigError(
            f"model.{key}: {name}, which is to serve, is of kind {kind} and forecasts no paths, which "
            f"model.touch needs; {remedy}"
        )


def _sampling(settings: "Config") -> list[tuple[str, str]]:
    """What the configuration has of sampler and touch, as rows."""
    model, rows = settings.model, []
    if model.sampler or model.steps:
        steps = f"{model.steps} steps" if model.steps else "the model's own steps"
        rows.append(("sampler", f"{model.sampler or 'the default'}, {steps}"))
    if model.touch:
        pairs = ", ".join(f"{up:g} up / {down:g} down" for up, down in model.touch)
        rows.append(("touch", f"{pairs}, in deviations over the longest horizon"))
    return rows


def _occasions(settings: "Config") -> str:
    """When a training is wanted."""
    asked = settings.retrain
    if asked is None:
        return "never"
    when = [f"{asked.cron} UTC"] if asked.cron else []
    when += [f"at an age of {asked.max_age / 86_400e9:g} days"] if asked.max_age else []
    when += ["at drift"] if asked.drift else []
    return ", ".join([*when, "on demand"])


def _verified(settings: "Config") -> str:
    """When the journal is verified, and how much of it."""
    asked = settings.verify
    return f"{asked.cron} UTC, of the last {asked.since / 3600e9:g} hours" if asked else "never"


@app.command(rich_help_panel=LIVE)
def contract(
    root: Annotated[str, typer.Option(help="Root topic.")] = "barcast/v1",
) -> None:
    """Print what feeds and readers can rely on: an AsyncAPI 3.0 document of all topics and messages."""
    from barcast.daemon.config import root_topic
    from barcast.daemon.contract import text

    sys.stdout.write(text(root_topic(root)))


@app.command(rich_help_panel=LIVE)
def publish(
    files: Files,
    stamp: Stamped,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Take broker, timeframe, calendar and clock from this TOML file, not from options."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Broker. \\[default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Its port. \\[default: 1883]", min=1, max=65535)] = None,
    root: Annotated[str | None, typer.Option(help="Root topic. \\[default: barcast/v1]")] = None,
    timeframe: Annotated[
        str | None, typer.Option(help="Length of a bar: {n}{s|m|h|d}, or session. Needed without --config.")
    ] = None,
    calendar: Annotated[
        str | None, typer.Option(help="24x7, fx, or a name of exchange_calendars. \\[default: 24x7]")
    ] = None,
    symbol_calendar: OtherCalendars = None,
    speed: Annotated[
        float | None,
        typer.Option(help="Times real time; the first bar is sent at once. \\[default: 1]", min=0.001),
    ] = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Feed bars from files to a broker, each when its close comes on the clock."""
    import asyncio

    from barcast.backtest.replay import found_timeframe
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
    for name, hours in others_of(symbol_calendar).items():
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
    frame = scan(files, stamp.value, settings.bar_calendars(), symbol, moment(since), moment(until))
    found = list(bars(frame))
    if len(found) > len({bar.symbol for bar in found}):  # one bar alone does not tell how long it is
        text, how = found_timeframe(files, stamp.value, settings.calendar, symbol)
        if text != settings.timeframe:
            raise ConfigError(
                f"timeframe: {settings.timeframe!r} is configured, and the files hold {text!r} bars ({how}); "
                "name that timeframe, or write the true one into a column `timeframe` of the files"
            )
    if settings.rehearsal is None:
        first = datetime.fromtimestamp(found[0].close_time / 1e9, UTC)
        settings = settings.model_copy(update={"rehearsal": rehearsal(first, speed or 1.0)})
    address = settings.mqtt.address(f"barcast-publish-{settings.instance}")
    with progressing("publishing", len(found)) as advance:

        def sent(count: int, close_time: int) -> None:
            advance(count, to_text(close_time))

        def waits(close_time: int, seconds: float) -> None:
            left = timedelta(seconds=round(seconds))
            tell(f"the next bar closes at {to_text(close_time)} on the clock, {left} from now")

        clock = WallClock(settings)
        asyncio.run(send(found, address, settings.mqtt.root, settings.timeframe, clock, sent, waits))
    out.print(f"published {len(found)} bars")


@app.command(rich_help_panel=LIVE)
def ctl(
    config: ConfigFile,
    verb: Annotated[str, typer.Argument(help="state, retrain, stop, reload, pause, resume or rollback.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Of retrain and reload: follow it, and say what came of it.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Of rollback: a model id of the store, or a baseline."),
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the journal.")] = None,
    mqtt: Annotated[
        bool,
        typer.Option("--mqtt", help="Order over the broker, as the user of \\[mqtt] in the configuration."),
    ] = False,
) -> None:
    """Order something of the running daemon: on its machine as its user, or with --mqtt from anywhere.

    `state` says how it is; `retrain` wants a training and `stop` ends the one under way; `pause` and `resume`
    are of forecasts, `reload` of the configuration.
    A rollback lets the model that served before serve again, within a bar; twice goes back two models.
    Without a running daemon the next start does.
    """
    from barcast.daemon.config import load, state_dir
    from barcast.daemon.control import VERBS, Order, ask

    if verb not in VERBS:
        raise typer.BadParameter(f"{verb!r} is none of {', '.join(VERBS)}")
    try:
        order = Order(verb, wait, to, reason)
    except ValueError as error:
        raise typer.BadParameter(str(error).replace("`", "")) from error
    # A running daemon is reached also when its file has become wrong: by what is needed of it alone.
    done = _by_broker(load(config), order) if mqtt else ask(state_dir(config), order, tell)
    if done is None and verb == "rollback":
        done = _at_rest(load(config), order)
    if done is None:
        if not mqtt and load(config).journal:
            raise ConfigError(
                f"no daemon serves on {state_dir(config)}: a standby takes no orders; ask where one serves, "
                "or with --mqtt, or start one"
            )
        raise ConfigError(f"no daemon runs on {state_dir(config)}: start `barcast run {config}`")
    out.print(done, highlight=False, markup=False, soft_wrap=True)


def _by_broker(settings: "Config", order: "Order") -> str:
    """Give an order over the broker; return what came of it."""
    import asyncio
    import getpass

    from barcast.daemon import log
    from barcast.daemon.client import order as give

    log.configure("error")
    address = settings.mqtt.address("")
    return asyncio.run(
        give(
            address.host,
            address.port,
            instance=settings.instance,
            root=settings.mqtt.root,
            verb=order.verb,
            wait=order.wait,
            to=order.to,
            reason=order.reason,
            operator=address.username or getpass.getuser(),
            username=address.username,
            password=address.password,
            tls=address.tls,
            on_line=tell,
        )
    )


def _at_rest(settings: "Config", order: "Order") -> str:
    """Roll back an instance that does not run."""
    import os

    from barcast.daemon import log
    from barcast.daemon.app import WallClock
    from barcast.daemon.events import Ordered
    from barcast.daemon.succession import rollback_journal

    log.configure("warning")
    ordered = Ordered(f"uid {os.getuid()}", order.verb, to=order.to, reason=order.reason)
    return rollback_journal(settings, WallClock(settings).now(), ordered)


@app.command(hidden=True)
def train_challenger(
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory to write the challenger into.")],
    champion: Annotated[str, typer.Option(help="Model id in the instance's store, or a baseline.")],
    wanted: Annotated[
        str | None,
        typer.Option("--settings", help="JSON of `daemon.panel.TrainingSettings`."),
    ] = None,
    parent: Parent = None,
) -> None:
    """Train a challenger on all bars that an instance knows. The daemon runs this.

    It has the champion's horizons, so that the gate can compare them.
    """
    from barcast.daemon import challenger
    from barcast.daemon.panel import TrainingSettings
    from barcast.daemon.store import ModelStore

    settings, histories = _known(config, parent)
    store = ModelStore(settings.state_dir / "models", settings.timeframe)
    card = store.open(champion, None, None).card
    steps = settings.retrain.steps if settings.retrain else None
    with epochs() as stand:
        model, trained = challenger.train_challenger(
            histories,
            out_dir,
            settings.timeframe,
            card,
            store.path(champion),
            steps,
            stand,
            None if wanted is None else TrainingSettings.decode(wanted),
        )
    tell_model(model, trained, out_dir)


@app.command(hidden=True)
def train_choices(config: ConfigFile, parent: Parent = None) -> None:
    """Say as JSON what can be chosen of a training here, and what that takes. The daemon runs this."""
    import json

    from barcast.models.choices import choices

    print(json.dumps(choices(_giving_way(config, parent).timeframe, _memory())))


@app.command(hidden=True)
def reckon(
    config: ConfigFile,
    model: Annotated[str, typer.Option(help="Model id in the signals.")],
    parent: Parent = None,
) -> None:
    """Say as JSON how a model's newest signals held what they promised. The daemon runs this.

    There are none where the newest signal is another model's.
    """
    import msgspec

    from barcast.daemon.app import WallClock
    from barcast.daemon.bars import known_bars
    from barcast.daemon.config import load
    from barcast.daemon.drift import chosen
    from barcast.daemon.journal import Journal
    from barcast.daemon.lookout import ROWS, reign
    from barcast.daemon.reckoning import BARS, TIMES
    from barcast.daemon.reckoning import reckon as do
    from barcast.daemon.trainer import give_way

    settings = load(config)
    give_way(19, parent)
    place = settings.journal_place
    now = WallClock(settings).now()
    histories = known_bars(settings.state_dir, settings.bar_calendars(), now, journal=place, length=BARS)
    own = {symbol: histories[symbol] for symbol in chosen(histories)}
    journal = Journal(place, readonly=True)
    try:
        topics = f"{settings.mqtt.root}/signals/{settings.timeframe}/"
        found = do(reign(journal.sent(topics, ROWS), model, own, TIMES), own, settings.timeframe)
    finally:
        journal.close()
    print(msgspec.json.encode(found).decode())


@app.command(rich_help_panel=LIVE)
def gate(
    config: ConfigFile,
    challenger: Annotated[Path, typer.Argument(help="Checkpoint directory of the challenger.")],
    champion: Annotated[str, typer.Option(help="Model id in the instance's store, or a baseline.")],
    margin: Annotated[
        float | None,
        typer.Option(help="Share of CRPS that must be gained; default: \\[retrain].", min=0, max=1),
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
    say = now_and_then()
    verdict = judge(
        challenger,
        ModelStore(settings.state_dir / "models", settings.timeframe).path(champion),
        histories,
        settings.timeframe,
        margin,
        settings.model.sampler,
        settings.model.steps,
        bool(settings.model.touch),
        lambda done, count, window: say(f"judging: {done} of {count} forecasts, {window.symbol}"),
    )
    print(msgspec.json.encode(verdict).decode())


@app.command(rich_help_panel=LIVE)
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
        settings.journal_place,
    )
    print(done.sentence())


@app.command(rich_help_panel=LIVE)
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
    bars, _ = every_bar(
        settings.state_dir,
        settings.bar_calendars(),
        WallClock(settings).now(),
        journal=settings.journal_place,
    )
    close = pl.col("close_time").to_physical()
    for end, keeps in ((moment(since), close.ge), (moment(until), close.lt)):
        bars = bars if end is None else bars.filter(keeps(end))
    if bars.is_empty():
        raise DataError(f"{settings.state_dir}: no bar closes in that time: widen it")
    with in_folder("--out", out_dir):
        changed = write_days(bars, out_dir, settings.timeframe)
    days = bars["close_time"].dt.date().n_unique()
    out.print(f"{bars.height} bars in {days} files, {changed} of them written: {out_dir.absolute()}")


@app.command(rich_help_panel=LIVE)
def verify(
    instance: Annotated[
        Path, typer.Argument(help="TOML file of an instance, or the journal.db of a state directory.")
    ],
    since: Since = None,
    capture: Annotated[
        Path | None,
        typer.Option(
            help="What a subscriber wrote down, one a line: TOPIC PAYLOAD, as mosquitto_sub -v prints it, or "
            '\\["topic", "payload"]. Compare with that, not with the journal\'s outbox.'
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    parent: Parent = None,
) -> None:
    """Compute what an instance said again, from its journal and the models beside it, and compare.

    It is compared byte by byte: exit status 1 on a difference. Of what was recorded under another
    fingerprint, another processor or torch, it says how far the figures are apart. The daemon may run; it
    does so by itself where its configuration has a table `verify`.
    """
    import msgspec

    from barcast.backtest.verify import read_capture
    from barcast.backtest.verify import verify as do
    from barcast.daemon.config import load
    from barcast.daemon.trainer import give_way
    from barcast.daemon.verification import Report

    settings = load(instance) if instance.suffix in (".toml", ".json") else None
    place, state_dir = (settings.journal_place, settings.state_dir) if settings else (instance, None)
    if parent is not None:
        give_way(19, parent)
    began = time.monotonic()
    found = do(place, moment(since) or 0, read_capture(capture) if capture else None, state_dir)
    seconds = round(time.monotonic() - began, 3)
    if json:
        report = msgspec.to_builtins(found) | {"agrees": found.agrees, "seconds": seconds}
        print(msgspec.json.encode(msgspec.convert(report, Report)).decode())
    else:
        out.print(f"{found.sentence()}\n{seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)
    if not found.agrees:
        raise typer.Exit(1)


def _known(config: Path, parent: int | None) -> "tuple[Config, dict[str, Window]]":
    """The settings of an instance and all bars that it knows, in a process that gives way to all others."""
    from barcast.daemon.app import WallClock
    from barcast.daemon.bars import known_bars

    settings = _giving_way(config, parent)
    say = now_and_then()
    histories = known_bars(
        settings.state_dir,
        settings.bar_calendars(),
        WallClock(settings).now(),
        lambda count: say(f"reading the bars: {count} of the journal"),
        settings.journal_place,
    )
    return settings, histories


def _giving_way(config: Path, parent: int | None) -> "Config":
    """The settings of an instance, in a process that gives way to all others."""
    from barcast.daemon.config import Retrain, load
    from barcast.daemon.trainer import give_way

    settings = load(config)
    give_way((settings.retrain or Retrain()).nice, parent)
    return settings


def _page(settings: "Config") -> str:
    """Where the page and the metrics are served, and what for."""
    http = settings.http
    if http is None:
        return "not served"
    orders = "orders by the token" if http.token_file else "no orders"
    reports = f"reports in {http.reports}" if http.reports else "no reports"
    return f"http://{http.host}:{http.port}, {orders}, {reports}"


def _memory() -> int:
    """Bytes that this process may take: those of the machine, or of the tightest control group, version 2."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), "")
    group = Path("/sys/fs/cgroup") / own
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.is_file() and (said := limit.read_text().strip()).isdigit():
            least = min(least, int(said))
    return least


def _children(config: Path) -> dict[str, list[str]]:
    """Verbs of the daemon's processes about an instance, and the argument list that begins each."""
    names = {verb: verb for verb in ("gate", "compact", "verify", "reckon")}
    names |= {"train": "train-challenger", "choices": "train-choices"}
    me = [sys.executable, "-m", "barcast.backtest.cli"]
    return {verb: [*me, name, str(config)] for verb, name in names.items()}
