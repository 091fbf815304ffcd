"""`barcast doctor`: what an operator asks when it does not work, in the order in which one asks."""

import asyncio
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from barcast.backtest.cli.terminal import LIVE, ConfigFile, app, out, tell, wide
from barcast.models import BarcastError

if TYPE_CHECKING:
    from barcast.daemon.config import Config
    from barcast.daemon.events import Champion
    from barcast.models import Forecaster

State = Literal["ok", "warn", "fail"]
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
LITTLE_ROOM, FEW_FILES = 1_000_000_000, 1_000
"""Free bytes, and files that a disk still takes, below which it is worth a word."""
MANY_PENDING = 10_000
"""Messages in an outbox that are worth a word."""
CLOCK_SECONDS = 0.2
"""How long the clock is held against one that cannot be set, and how far they may part meanwhile."""
CLOCK_APART = 0.05
BARS = 3_000
"""Bars of the trial forecast, at most: what a model looks back over."""


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it; nothing where it is ok."""

    check: str
    state: State
    said: str
    remedy: str = ""


@dataclass
class Case:
    """What is examined, and what the checks so far have learnt of it."""

    path: Path
    settings: "Config"
    champion: "Champion | None" = None
    stamped: int = 0
    forecaster: "Forecaster | None" = None
    running: bool = False


Found = Iterator[tuple[State, str, str]]
"""State, what was found, remedy."""


# --- what is examined, in order


def packages() -> Found:
    """Python and what the package asks for."""
    from packaging.requirements import Requirement

    wrong = 0
    for text in requires("barcast") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not needed.specifier.contains(found, prereleases=True):
            wrong += 1
            yield (
                "fail",
                f"{needed.name} {found} is installed, not {needed.specifier}",
                f"pip install '{needed.name}{needed.specifier}' with {sys.executable}",
            )
    if not wrong:
        yield (
            "ok",
            f"Python {sys.version.split()[0]}, barcast {version('barcast')}, torch {version('torch')}",
            "",
        )


def state_directory(case: Case) -> Found:
    """Owner, mode, room, and a disk that keeps what it was given and knows locks."""
    from barcast.daemon.room import LEAST_FREE, free_bytes

    folder = case.settings.state_dir
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        yield "fail", f"{there} is no directory", "move it away, or name another state_dir"
        return
    if there != folder.absolute():
        if os.access(there, os.W_OK | os.X_OK):
            yield "ok", f"{folder} is not there yet: the first start makes it", ""
        else:
            said = f"{folder} is not there, and this user may not make it in {there}"
            yield "warn", said, "make it for the daemon's user, or run doctor as the user of the daemon"
    else:
        found = folder.stat()
        if found.st_uid != os.geteuid():
            yield (
                "warn",
                f"{folder} belongs to user {found.st_uid}, not {os.geteuid()}",
                "run doctor as the user of the daemon: root sees what the daemon may not",
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            yield "warn", f"{folder} has mode {stat.S_IMODE(found.st_mode):o}", f"chmod 700 {folder}"
        if not os.access(folder, os.W_OK | os.X_OK):
            said = f"this user may not write into {folder}"
            yield "fail", said, "let this user do that, or ask as the daemon's"
            return
        with TemporaryFile(dir=folder) as file:  # an OSError is a finding
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    free = free_bytes(folder)
    disk = os.statvfs(there)
    state: State = "fail" if free < LEAST_FREE else "warn" if free < LITTLE_ROOM else "ok"
    remedy = "" if state == "ok" else f"make room on the disk of {folder}, or lower `keep`"
    yield state, f"{free / 1e9:.1f} GB free", remedy
    if disk.f_files and disk.f_favail < FEW_FILES:
        yield "warn", f"the disk takes {disk.f_favail} files more", "remove files: it has no inodes left"


def passwords(case: Case) -> Found:
    """Their files are for those alone who need them."""
    settings, found = case.settings, False
    if settings.http:
        settings.http.check()
    files = {"mqtt.password_file": settings.mqtt.password_file}
    if settings.journal:
        files["journal.password_file"] = settings.journal.password_file
    if settings.http:
        files["http.token_file"] = settings.http.token_file
    for key, file in files.items():
        if file is None:
            continue
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & stat.S_IROTH:
            found = True
            said = f"{key}: {file} has mode {mode:o}: every user may read it"
            yield "warn", said, f"chmod o= {file}"
    if not found:
        yield "ok", "none that every user may read", ""


def journal(case: Case, proceed: Callable[[], bool]) -> Found:
    """Version, soundness, age, what is waiting."""
    from barcast.daemon.events import Champion
    from barcast.daemon.journal import VERSION, Journal, Kind, checked, exists
    from barcast.daemon.postgres import Postgres, Server
    from barcast.daemon.wire import to_text

    place = case.settings.journal_place
    if not exists(place):
        if isinstance(place, Server) and (kept_out := Postgres.fault(place)):
            yield "fail", kept_out, f"GRANT CREATE ON DATABASE {place.database} TO {place.user}"
        else:
            yield "ok", "there is none yet: the first start makes it", ""
        return
    number, faults = VERSION, ["ok"]
    if isinstance(place, Path):
        number, faults = checked(place, proceed)
    if faults not in ([], ["ok"]):
        yield "fail", f"damaged: {'; '.join(faults)}", "stop the daemon and restore a copy"
        return
    if not faults:
        yield "warn", "it is too long to be checked in time", f"sqlite3 {place} 'PRAGMA quick_check'"
    with closing(Journal(place, readonly=True)) as found:
        activation = found.last(Kind.ACTIVATION)
        case.champion = Champion.decode(activation.payload) if activation else None
        case.stamped, waiting = found.last_time(), found.waiting()
    age = f"the newest record is of {to_text(case.stamped)}" if case.stamped else "it is empty"
    yield "ok", f"version {number}; {age}", ""
    if number != VERSION:
        remedy = f"none is needed: the next start makes {VERSION} of it, and leaves a copy"
        yield "warn", f"version {number} is that of an older Barcast", remedy
    state: State = "warn" if waiting > MANY_PENDING else "ok"
    remedy = "see the broker below: they expire, or wait for it" if state == "warn" else ""
    yield state, f"{waiting} messages wait to be delivered", remedy


def model(case: Case) -> Found:
    """Who would serve loads, and forecasts once; its fingerprint is that of the last activation."""
    import numpy as np

    from barcast.daemon.store import ModelStore
    from barcast.models import Window, open_model
    from barcast.models.catalog import check_sampled

    settings = case.settings
    store = ModelStore(settings.state_dir / "models", settings.timeframe)
    name = settings.model.name
    if name == "champion":
        name = case.champion.model if case.champion else settings.model.first
    where = store.path(name) if store.has(name) else name
    options = settings.model.sampler, settings.model.steps
    forecaster = open_model(where, settings.timeframe, *options, bool(settings.model.touch))
    check_sampled(name, forecaster.card, *options)
    card = forecaster.card
    count = max(card.min_window, min(card.window, BARS))
    symbol = settings.symbols[0] if settings.symbols else "TRIAL"
    calendar = settings.bar_calendars().of(symbol)
    first = calendar.close_at_or_after(1_577_836_800 * 10**9)  # 2020
    times = np.array([first, *calendar.closes_after(first, count - 1)], np.int64)
    prices = 100 * np.exp(0.01 * np.cumsum(np.sin(np.arange(count) ** 1.5)))
    values = np.column_stack((prices, prices * 1.005, prices * 0.995, prices, 1 + np.arange(count) % 7))
    [forecast] = forecaster.forecast([Window(symbol, times, values.astype(np.float64))])
    if np.isfinite(forecast.quantiles).all():
        yield "ok", f"{card.model} ({card.kind}) loads and forecasts, looking back {card.window} bars", ""
    else:
        yield "fail", f"{card.model} forecasts no numbers", "roll back, or train again"
    case.forecaster = forecaster
    known = case.champion
    if known and known.model == card.model and known.fingerprint != card.fingerprint:
        yield (
            "warn",
            f"the fingerprint is {card.fingerprint}, and that of the last activation {known.fingerprint}",
            "none is needed: replays across the change compare figures, not bytes",
        )


def history(case: Case) -> Found:
    """Every file of `history/` can be read."""
    import polars as pl

    from barcast.daemon.history import history_files, scan

    files = history_files(case.settings.state_dir / "history")
    if not files:
        yield "ok", "no files", ""
        return
    frame = scan(files, "close", case.settings.bar_calendars(), until=time.time_ns())
    bars, symbols = frame.select(pl.len(), pl.col("symbol").n_unique()).collect().row(0)
    yield "ok", f"{bars} bars of {symbols} symbols in {len(files)} files", ""


def strategies(case: Case) -> Found:
    """Each strategy can be made, and answers a forecast of the model's shape."""
    from barcast.daemon.start import try_all

    settings = case.settings.settings()
    if case.forecaster is None:
        yield (
            "warn",
            f"{len(settings.build())} are built, and there is no model to try them with",
            "see the model above",
        )
        return
    try_all(settings, case.forecaster, time.time_ns())
    yield "ok", ", ".join(each.name for each in settings.strategies) or "none", ""


def clock(case: Case) -> Found:
    """It runs evenly, and not before what is in the journal."""
    from barcast.daemon.app import WallClock
    from barcast.daemon.start import CLOCK_BACK
    from barcast.daemon.wire import to_text

    now = WallClock(case.settings).now()
    before = time.time_ns(), time.monotonic_ns()
    time.sleep(CLOCK_SECONDS)
    apart = abs((time.time_ns() - before[0]) - (time.monotonic_ns() - before[1])) / 1e9
    if apart > CLOCK_APART:
        yield "warn", f"it was set by {apart:.3f} s just now", "let one service alone keep the time, evenly"
    if case.stamped > now:
        state: State = "fail" if case.stamped > now + CLOCK_BACK else "warn"
        behind = f"{(case.stamped - now) / 1e9:.0f} s behind the newest record"
        yield state, f"{to_text(now)} is {behind}", "set it right: bars are stamped by it, never backwards"
    else:
        yield "ok", to_text(now), ""


def daemon(case: Case) -> Found:
    """Who holds the state directory, and what it says of itself."""
    from barcast.daemon.control import Order, ask
    from barcast.daemon.journal import exists
    from barcast.daemon.postgres import Postgres, Server

    folder = case.settings.state_dir
    holder = _holder(folder / "lock")
    if case.settings.journal:  # it may be a standby, or have left the directory to one on another machine
        said = ask(folder, Order("state"), lambda _line: None)
        case.running = said is not None
        place = case.settings.journal_place
        assert isinstance(place, Server)
        if said is None and (not exists(place) or Postgres.leader(place) is None):
            yield "warn", "none serves, here or elsewhere", f"barcast run {case.path}, or systemctl start it"
        elif said is None:
            yield "ok", "one serves elsewhere: a standby may wait here", ""
        else:
            yield from _said(case, "it serves here", said)
        return
    case.running = holder is not None
    if holder is None:
        yield "warn", "none runs", f"barcast run {case.path}, or systemctl start barcast@NAME"
        return
    said = ask(folder, Order("state"), lambda _line: None)
    if said is None:
        remedy = "it may be starting; else its log says more, and systemctl restart helps"
        yield "warn", f"process {holder} holds the directory and takes no orders", remedy
    else:
        yield from _said(case, f"process {holder}", said)


def _said(case: Case, who: str, state: str) -> Found:
    """What a running daemon says of itself."""
    first, *more = state.splitlines()
    yield "ok", f"{who}: {first}", ""
    for line in more:
        if line.startswith("paused"):
            yield "warn", line, f"barcast ctl {case.path} resume"


def _holder(path: Path) -> int | None:
    """The process that has the lock; asked of the kernel, as trying it could be in the way of a start."""
    if not path.exists():
        return None
    found = path.stat()
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1:2] == ["FLOCK"] and words[5:6] == [place]:
            return int(words[4])
    return None


def worker(case: Case) -> Found:
    """Where trainings are asked for. It is not asked, as that would start one."""
    retrain = case.settings.retrain
    if retrain is None or retrain.socket is None:
        yield "ok", "none: what is trained is trained by the daemon", ""
    elif retrain.socket.is_socket():
        yield "ok", f"{retrain.socket} is there", ""
    else:
        remedy = "systemctl enable --now barcast-retrain@NAME.socket, or drop retrain.socket"
        yield "fail", f"there is no socket {retrain.socket}", remedy


def broker(case: Case) -> Found:
    """It is reached, is who it should be, lets us in, and what is published comes back."""
    from barcast.daemon.config import is_loopback
    from barcast.daemon.mqtt import Canary, Link

    mqtt, topics = case.settings.mqtt, case.settings.topics
    address = mqtt.address(f"barcast-{case.settings.instance}-doctor")
    canary = Canary(f"{mqtt.root}/bars/{case.settings.timeframe}", "doctor")
    # No session: one would go on queueing bars for a doctor that never comes back.
    link = Link(address, [topics.bars, topics.adjustments], None, canary, session=0)

    async def visit() -> bool | None:
        """Whether it delivers; None where it cannot be reached."""
        heard: list[bool] = []

        async def note() -> None:
            heard.append(not link.deaf)

        task = asyncio.create_task(link.run(note))
        until = time.monotonic() + BROKER_SECONDS
        while not (heard or task.done() or link.fault != "connecting" or time.monotonic() > until):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        link.leave()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return heard[0] if heard else None

    delivers, where = asyncio.run(visit()), f"{mqtt.host}:{mqtt.port}"
    if delivers:
        yield "ok", f"{where} delivers what is published", ""
    elif delivers is None:
        remedy = "start it, or correct mqtt.host, mqtt.port, mqtt.tls, mqtt.ca_file and the password"
        yield "fail", f"{where}: {link.fault}", remedy
    else:
        remedy = f"let its access list allow this user to read {topics.bars}"
        yield "fail", f"{where} grants {topics.bars} and delivers nothing", remedy
    if address.tls is None and not is_loopback(mqtt.host):
        yield "warn", "bars and signals go over the network in the clear", "mqtt.tls = true"


def http(case: Case) -> Found:
    """The page of metrics answers, or its port is free for a start."""
    from barcast.daemon.http import listen

    asked = case.settings.http
    if asked is None:
        yield "ok", "not served", ""
        return
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    url = f"http://{host}:{asked.port}/readyz"
    # A standby has the page, and nothing else by which it could be known to run.
    if case.running or case.settings.journal:
        page = HTTPConnection(asked.host, asked.port, timeout=5)
        try:
            page.request("GET", "/readyz")
            answer = page.getresponse()
            body = answer.read(200).decode(errors="replace").strip()
        except ConnectionRefusedError:
            if case.running:
                raise  # an OSError is a finding
        except HTTPException as error:
            yield (
                "fail",
                f"{url} is no page of metrics: {error!r}",
                "end what listens there, or change http.port",
            )
            return
        else:
            good = answer.status == HTTPStatus.OK
            said = f"{url} says {answer.status}" + ("" if good else f": {body}")
            yield ("ok", said, "") if good else ("warn", said, "see above")
            return
        finally:
            page.close()
    listen(asked.host, asked.port).close()  # a ConfigError is a finding
    yield "ok", f"port {asked.port} is free", ""


def unit(case: Case) -> Found:
    """What systemd thinks of the instance."""
    name = f"barcast@{case.settings.instance}"
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        yield "ok", "there is no systemd here", ""
        return
    keys = ("LoadState", "ActiveState", "Result", "NRestarts")
    command = ["systemctl", "show", name, f"--property={','.join(keys)}"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    is_ = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if is_.get("LoadState") != "loaded":
        yield "ok", f"there is no unit {name}", ""
        return
    bad, again = is_.get("ActiveState") == "failed", int(is_.get("NRestarts") or 0)
    remedy = f"journalctl -u {name} says why" if bad or again else ""
    state: State = "fail" if bad else "warn" if again else "ok"
    yield state, f"{name} is {is_.get('ActiveState')} ({is_.get('Result')}), {again} restarts", remedy


# --- how it is examined

BROKER_SECONDS = 25.0
CHECKS: tuple[tuple[str, float, Callable[..., Found]], ...] = (
    ("packages", 10, packages),
    ("state directory", 10, state_directory),
    ("passwords", 5, passwords),
    ("journal", 30, journal),
    ("model", 120, model),
    ("history", 120, history),
    ("strategies", 20, strategies),
    ("clock", 5, clock),
    ("daemon", 15, daemon),
    ("worker", 5, worker),
    ("broker", BROKER_SECONDS + 5, broker),
    ("http", 10, http),
    ("systemd", 15, unit),
)
"""The checks after that of the configuration, the seconds that each may take, and what it does."""


def fault(check: str, error: Exception) -> Finding:
    """A fault that a sentence tells of, which ends with the remedy, behind a semicolon or a colon.

    One that ends with the words of the operating system has none.
    """
    from barcast.daemon.room import is_full

    text, cause = str(error), _of_the_system(error)
    if cause is None or not text.endswith((str(cause), str(cause.strerror))):
        said, _, remedy = text.rpartition("; " if "; " in text else ": ")
        return Finding(check, "fail", said or text, remedy if said else "see what was found")
    remedy = "let this user do that, or ask as the daemon's"
    if is_full(cause):
        remedy = f"make room on the disk of {cause.filename or 'the state directory'}"
    return Finding(check, "fail", text, remedy)


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The fault of the operating system that an error is, or was made of."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error


@dataclass
class _Check(threading.Thread):
    """A check in a thread of its own, so that one that hangs holds up no other."""

    check: str
    seconds: float
    examine: Callable[[], Found]
    findings: list[Finding] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        super().__init__(name=self.check, daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Note what it finds; what is no fault of the operator's ends the thread with a traceback."""
        try:
            for state, said, remedy in self.examine():
                self.findings.append(Finding(self.check, state, said, remedy))
        except (BarcastError, OSError) as error:
            self.findings.append(fault(self.check, error))
        self.ended = True

    def result(self) -> list[Finding]:
        """What it found in its time."""
        self.start()
        self.join(self.seconds)
        if self.is_alive():
            late = f"no answer within {self.seconds:g} s"
            return [*self.findings, Finding(self.check, "fail", late, "see what it waits for, and ask again")]
        if not self.ended:
            broke = "it broke: the traceback above says where"
            return [*self.findings, Finding(self.check, "fail", broke, "report it")]
        return self.findings


def examined(config: Path) -> Iterator[Finding]:
    """Every finding about an instance, as it is found."""
    from barcast.daemon.config import load

    name = "configuration"
    try:
        settings = load(config)
        settings.mqtt.address("doctor")
    except (BarcastError, OSError) as error:
        yield Finding(name, "fail", str(error), "correct it: nothing else can be examined before")
        return
    yield Finding(name, "ok", f"{config} is in order")
    case = Case(config, settings)
    for check, seconds, examine in CHECKS:
        until = time.monotonic() + seconds - 2
        bound: Callable[[], Found]
        if examine is packages:
            bound = examine
        elif examine is journal:
            bound = partial(examine, case, lambda until=until: time.monotonic() < until)
        else:
            bound = partial(examine, case)
        yield from _Check(check, seconds, bound).result()


@app.command(rich_help_panel=LIVE)
def doctor(
    config: ConfigFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine an instance, running or not, and say what is wrong and what to do. Exit 1 on a fault."""
    from barcast.daemon import log

    log.configure("critical")  # what parts of the daemon would say is in the findings
    findings = []
    for finding in examined(config):
        findings.append(finding)
        if not out.is_terminal and not as_json:
            tell(f"{finding.check}: {finding.state}")
    if as_json:
        sys.stdout.write(msgspec.json.encode([asdict(each) for each in findings]).decode() + "\n")
    else:
        table = Table(box=None)
        for title in ("check", "state", "found", "what to do"):
            table.add_column(title, overflow="fold")
        for each in findings:
            state = Text(each.state, COLOURS[each.state])
            table.add_row(each.check, state, Text(each.said), Text(each.remedy))
        wide().print(table, highlight=False)
    if any(each.state == "fail" for each in findings):
        raise typer.Exit(1)
