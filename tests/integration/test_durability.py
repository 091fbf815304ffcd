"""Nothing is lost: kill -9 of daemon and broker, absences, refusals, and a broker that delivers nothing."""

import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import polars as pl
import pytest

from barcast.backtest.verify import verify
from barcast.daemon.bars import read_archive
from barcast.daemon.events import events
from barcast.daemon.journal import Journal, State
from barcast.daemon.mqtt import HEAR_SECONDS
from barcast.daemon.ports import Arrival
from barcast.daemon.wire import encode_bars, to_text
from barcast.models import Bar
from tests.garch import simulate
from tests.integration.broker import SHIPPED, SHIPPED_ACL, Mosquitto
from tests.integration.instance import BARCAST, Instance, Subscriber, client, until, write_history
from tests.replayed import replay_journal

MINUTE = 60 * 10**9
HISTORY = 150
"""Bars before the live ones: historical simulation forecasts from 117 on."""
SECONDS_A_BAR = 1.5
"""Real time that a bar of a minute takes: the two bars that a signal is valid outlast a restart."""
RATE = 1000
"""Bars a second."""
Brokers = Callable[..., Mosquitto]
KINDS = ("signals", "targets", "groups")
HASTY = (sys.executable, str(Path(__file__).with_name("hasty.py")))


class Feed(threading.Thread):
    """Publishes bars at a steady rate, whatever happens, and notes which of them the broker acknowledged.

    What is current goes out when it closes on the instance's clock; bars of other symbols, too old to be
    forecast, fill the rest.
    """

    def __init__(self, instance: Instance, current: list[Bar], rate: int, user: str | None = None) -> None:
        super().__init__(name="feed", daemon=True)
        self.instance, self.current, self.rate = instance, sorted(current, key=lambda b: b.close_time), rate
        self.sent: list[tuple[int, Bar]] = []
        self.answers: list[tuple[int, bool]] = []
        self.enough = threading.Event()
        self.client = client("feed", instance.port, user)
        self.client.on_publish = lambda _c, _u, mid, code, _p: self.answers.append((mid, code.is_failure))
        self.client.loop_start()

    def run(self) -> None:
        current, old = iter(self.current), old_bars(self.instance.start)
        ahead, began = next(current), time.monotonic()
        while not self.enough.is_set():
            while self.instance.real(ahead.close_time) <= time.time():
                self.send(ahead)
                ahead = next(current)
            behind = int((time.monotonic() - began) * self.rate) - len(self.sent)
            for bar in itertools.islice(old, max(0, min(behind, 100))):
                self.send(bar)
            time.sleep(0.005)

    def send(self, *bars: Bar) -> None:
        """Publish, or keep to be published once there is a connection."""
        for bar in bars:
            info = self.client.publish(f"barcast/v1/bars/1m/{bar.symbol}", encode_bars([bar]), 1)
            assert info.rc in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN)
            self.sent.append((info.mid, bar))

    def acknowledged(self) -> list[Bar]:
        """The bars that the broker has taken: the n-th answer with an id is for the n-th bar with it."""
        answers = Counter(mid for mid, _ in list(self.answers))
        assert not any(failed for _, failed in self.answers)
        nth: Counter[int] = Counter()
        bars = []
        for mid, bar in self.sent:
            nth[mid] += 1
            if nth[mid] <= answers[mid]:
                bars.append(bar)
        return bars

    def finish(self) -> None:
        """Stop, and wait until the broker has everything."""
        self.enough.set()
        if self.is_alive():
            self.join()
        until(lambda: len(self.answers) == len(self.sent), "the broker has every bar")

    def close(self) -> None:
        """Leave the broker."""
        self.enough.set()
        self.client.disconnect()
        self.client.loop_stop()


def old_bars(start: int) -> Iterator[Bar]:
    """Bars of two hundred symbols, all closed hours before `start`: they only warm windows."""
    for minute in itertools.count(1):
        for i in range(200):
            price = 50.0 + i + minute % 7
            time_ = start - 600 * MINUTE + minute % 500 * MINUTE
            yield Bar(f"OLD{i:03d}", time_, price, price + 1, price - 1, price, float(minute))


class Stage:
    """Makes instances, feeds and subscribers of one test, and ends what it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instances: list[Instance] = []
        self.clients: list[Feed | Subscriber] = []

    def instance(
        self,
        broker: Mosquitto,
        symbols: int,
        *,
        seconds_a_bar: float = SECONDS_A_BAR,
        user: str | None = None,
    ) -> tuple[Instance, list[Bar]]:
        """An instance with some history, and the bars of its symbols that come after that."""
        folder = self.folder / f"instance{len(self.instances)}"
        windows = [simulate(f"S{i:02d}", HISTORY + 400, seed=8, step=MINUTE).window for i in range(symbols)]
        start, names = int(windows[0].close_times[HISTORY - 1]), [w.symbol for w in windows]
        instance = Instance(folder, broker.port, names, "hs", start, speed=60 / seconds_a_bar, user=user)
        write_history(windows, HISTORY, instance.state / "history")
        self.instances.append(instance)
        return instance, [
            Bar(w.symbol, time_, *values)
            for w in windows
            for time_, values in zip(
                w.close_times[HISTORY:].tolist(), w.values[HISTORY:].tolist(), strict=True
            )
        ]

    def feed(self, instance: Instance, current: list[Bar], rate: int, user: str | None = None) -> "Feed":
        """A feed that has not begun."""
        self.clients.append(feed := Feed(instance, current, rate, user))
        return feed

    def subscriber(self, broker: Mosquitto, user: str | None = None) -> Subscriber:
        """A subscriber that is there before anything is published."""
        self.clients.append(subscriber := Subscriber(broker.port, user))
        return subscriber

    def end(self) -> None:
        """Kill what still runs."""
        for instance in self.instances:
            if instance.process is not None and instance.process.poll() is None:
                instance.kill()
        for each in self.clients:
            each.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """What a test plays with."""
    made = Stage(tmp_path)
    yield made
    made.end()


def begin(instance: Instance) -> None:
    """Let the instance's clock run from soon on, and start the daemon."""
    instance.at = datetime.now(UTC) + timedelta(seconds=1)
    instance.launch()
    instance.wait_for("broker_connected")


def settle(instance: Instance, feed: Feed) -> None:
    """Stop the feed, wait until the daemon has taken what the broker has for it, and stop the daemon.

    The broker delivers in order: with a last bar, all that it had before were delivered.
    """
    feed.finish()
    feed.send(Bar("END", instance.start - 600 * MINUTE, 1.0, 1.0, 1.0, 1.0, 1.0))
    feed.finish()
    until(
        lambda: ask(instance, "SELECT 1 FROM record WHERE topic LIKE '%/END'") != [], "the last bar is taken"
    )
    until(lambda: ask(instance, "SELECT 1 FROM outbox WHERE state = 0") == [], "the outbox is empty")
    assert instance.stop() == 0


def ask(instance: Instance, question: str) -> list[tuple[Any, ...]]:
    """Look into the journal, also while the daemon writes it."""
    with closing(Journal(instance.place, readonly=True)) as journal:
        return journal._db.execute(question).fetchall()


def stored(instance: Instance) -> list[Bar]:
    """Every bar of the journal, as recovery and replays decode it."""
    journal = Journal(instance.place, readonly=True)
    bars = [bar for _, event in events(journal.records()) if isinstance(event, Arrival) for bar in event.bars]
    journal.close()
    return bars


@dataclass(frozen=True)
class Kept:
    """What became of the bars: how many the broker acknowledged, are lost of these, and were taken again."""

    acknowledged: int
    lost: int
    again: int


def bars_kept(instance: Instance, feed: Feed) -> Kept:
    """Hold what the broker acknowledged against the journal."""
    acknowledged, kept = set(feed.acknowledged()), stored(instance)
    return Kept(len(acknowledged), len(acknowledged - set(kept)), len(kept) - len(set(kept)))


@dataclass(frozen=True)
class Delivered:
    """What became of the messages that a replay of the journal computes."""

    signals: int
    expired: int
    again: int


def signals_delivered(instance: Instance, subscriber: Subscriber) -> Delivered:
    """Hold what a subscriber saw against a replay: each message there or expired, one id, in order."""
    replayed = {m.id: m for m in replay_journal(instance.place, instance.state).messages}
    rows = ask(instance, "SELECT id, topic, payload, state FROM outbox ORDER BY n")
    outbox = {i: (t, p, State(s)) for i, t, p, s in rows if t.split("/")[2] in KINDS}
    captured = [pair for kind in KINDS for pair in subscriber.of(kind)]
    seen = dict.fromkeys((json.loads(payload)["id"], topic, payload) for topic, payload in captured)
    ids = {i for i, _, _ in seen}

    assert set(outbox) == set(replayed)
    assert all((m.topic, m.payload) == outbox[i][:2] for i, m in replayed.items())
    assert all(outbox.get(i, ())[:2] == (topic, payload) for i, topic, payload in seen)
    assert {i for i, (_, _, state) in outbox.items() if state != State.EXPIRED} <= ids

    closes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for i, topic, payload in seen:
        if "/signals/" in topic:
            closes[topic, json.loads(payload)["close_time"]].add(i)
    assert all(len(given) == 1 for given in closes.values())

    place = {i: n for n, i in enumerate(outbox)}
    orders: dict[str, list[int]] = defaultdict(list)
    for i, topic, _ in seen:
        orders[topic].append(place[i])
    assert all(order == sorted(order) for order in orders.values())
    return Delivered(
        signals=len(closes),
        expired=sum(state == State.EXPIRED for _, _, state in outbox.values()),
        again=len(captured) - len(seen),
    )


def under_fire(
    stage: Stage, instance: Instance, current: list[Bar], kills: int, enough: Callable[[Feed], bool]
) -> Feed:
    """Feed a daemon until it is enough, kill it at random moments and start it again."""
    dice = random.Random(3)
    begin(instance)
    feed = stage.feed(instance, current, RATE)
    feed.start()
    for n in range(kills):
        time.sleep(dice.uniform(0.3, 1.0))
        instance.kill()
        instance.launch()
        instance.wait_for("broker_connected", count=n + 2)
    until(lambda: enough(feed), "there is enough to look at")
    settle(instance, feed)
    return feed


def test_daemon_killed_ten_times_loses_nothing(broker: Mosquitto, stage: Stage) -> None:
    """Each bar that the broker took is in the journal, and each due signal is delivered, under one id."""
    instance, current = stage.instance(broker, 24)
    subscriber = stage.subscriber(broker)

    def enough(feed: Feed) -> bool:
        return len(feed.sent) >= 8000 and len(subscriber.of("signals")) >= 150

    feed = under_fire(stage, instance, current, 10, enough)
    until(lambda: subscriber.states()[-1:] == ["stopped"], "the subscriber has everything")
    kept, delivered = bars_kept(instance, feed), signals_delivered(instance, subscriber)
    print(f"\n10 kills of the daemon: {kept}, {delivered}")
    assert kept.acknowledged >= 8000
    assert kept.lost == 0
    assert delivered.signals >= 100


def test_bars_acknowledged_on_receipt_are_lost(broker: Mosquitto, stage: Stage) -> None:
    """The control: the same with a daemon that lets the library acknowledge does lose bars."""
    instance, current = stage.instance(broker, 24)
    instance.command = HASTY
    feed = under_fire(stage, instance, current, 4, lambda feed: len(feed.sent) >= 3000)
    kept = bars_kept(instance, feed)
    print(f"\n4 kills of a daemon that acknowledges on receipt: {kept}")
    assert kept.lost > 0


def test_broker_killed_loses_nothing_that_a_live_daemon_could_take(broker: Mosquitto, stage: Stage) -> None:
    """What the broker took before a kill -9 is with the daemon, and each due signal with a subscriber.

    A broker forgets what it took within the last second. So bars are in flight when it is killed, as the
    daemon must have what was sent to it: they have left the broker, and may not have been read. Signals are
    not, as no daemon can answer for a subscriber.
    """
    instance, current = stage.instance(broker, 24)
    subscriber = stage.subscriber(broker)
    dice = random.Random(4)

    begin(instance)
    feed = stage.feed(instance, current, RATE)
    feed.start()

    def between_groups() -> bool:
        bars = (time.time() - instance.real(instance.start)) / SECONDS_A_BAR
        last = to_text(instance.start + int(bars) * MINUTE)
        seen = [json.loads(payload)["close_time"] for _, payload in subscriber.of("groups")[-1:]]
        return seen == [last] and bars % 1 < 0.7

    def keeps_up() -> bool:
        [(newest,)] = ask(instance, "SELECT payload FROM record ORDER BY seq DESC LIMIT 1")
        return newest in [encode_bars([bar]) for _, bar in feed.sent[-50:]]

    def killed() -> bool:
        if between_groups() and keeps_up():
            broker.freeze()
            if keeps_up() and not broker.undelivered():
                broker.kill()
                return True
            broker.thaw()
        return False

    for n in range(4):
        time.sleep(dice.uniform(1.0, 2.0))
        until(killed, "daemon and subscriber are at the newest bar")
        time.sleep(dice.uniform(0.0, 0.6))
        broker.start()
        instance.wait_for("broker_connected", count=n + 2)
    until(
        lambda: len(feed.sent) >= 5000 and len(subscriber.of("signals")) >= 100, "there is enough to look at"
    )
    settle(instance, feed)
    until(lambda: subscriber.states()[-1:] == ["stopped"], "the subscriber has everything")
    kept, delivered = bars_kept(instance, feed), signals_delivered(instance, subscriber)
    print(f"\n4 kills of the broker: {kept}, {delivered}")
    assert kept.acknowledged >= 5000
    assert kept.lost == 0
    assert delivered.signals >= 100


def while_away(stage: Stage, broker: Mosquitto) -> Kept:
    """3,000 bars that are published while the daemon is not there."""
    instance, current = stage.instance(broker, 2)
    begin(instance)
    assert instance.stop() == 0
    feed = stage.feed(instance, current, rate=0)
    feed.send(*itertools.islice(old_bars(instance.start), 3000))
    feed.finish()
    instance.launch()
    # In the control the queue is full; it has room for the last bar once some of it was taken.
    until(lambda: ask(instance, "SELECT COUNT(*) FROM record WHERE topic LIKE '%/OLD%'")[0][0] >= 500, "some")
    settle(instance, feed)
    return bars_kept(instance, feed)


def test_bars_wait_for_a_daemon_that_is_away(broker: Mosquitto, stage: Stage) -> None:
    """The broker as it is shipped keeps at least 100,000 messages for a daemon that is away."""
    [limit] = [int(x.split()[1]) for x in SHIPPED.read_text().splitlines() if x.startswith("max_queued_m")]
    kept = while_away(stage, broker)
    print(f"\n3,000 bars while the daemon was away: {kept}")
    assert limit >= 100_000
    assert kept.lost == 0


def test_default_broker_drops_what_waits(brokers: Brokers, stage: Stage) -> None:
    """The control: with mosquitto's own limit, bars that it has acknowledged are gone."""
    kept = while_away(stage, brokers(without=("max_queued_messages",)))
    print(f"\n3,000 bars while the daemon was away, the broker's default: {kept}")
    assert kept.lost > 0


def access_list(without: str = "") -> str:
    """The access list as it is shipped, or less of it."""
    shipped = SHIPPED_ACL.read_text()
    assert not without or shipped.count(f"{without}\n") == 1
    return shipped.replace(f"{without}\n", "") if without else shipped


def test_refused_signals_wait_and_hold_up_nothing_else(brokers: Brokers, stage: Stage) -> None:
    """What the broker refuses is named with the reason, waits or expires, and goes out once it is allowed."""
    broker = brokers(acl=access_list(without="topic write barcast/v1/signals/#"))
    instance, current = stage.instance(broker, 2, seconds_a_bar=2, user="barcast")
    subscriber = stage.subscriber(broker, "reader")
    begin(instance)
    feed = stage.feed(instance, current, rate=0, user="feed")
    feed.start()
    refused = instance.wait_for("publish_failed")
    signals = "SELECT COUNT(*) FROM outbox WHERE topic LIKE '%/signals/%' AND state = "
    until(lambda: len(subscriber.of("targets")) >= 4, "other topics go on")
    until(lambda: ask(instance, f"{signals} {State.EXPIRED:d}") >= [(2,)], "a signal expires")
    until(lambda: ask(instance, f"{signals} {State.PENDING:d}") >= [(2,)], "a signal waits")
    before = len(subscriber.of("signals"))
    broker.allow(access_list())
    until(lambda: len(subscriber.of("signals")) >= 4, "what waited is delivered")
    settle(instance, feed)
    until(lambda: subscriber.states()[-1:] == ["stopped"], "the subscriber has everything")
    delivered = signals_delivered(instance, subscriber)
    print(f"\nsignals refused at first: {delivered}")
    assert str(refused["topic"]).startswith("barcast/v1/signals/1m/S0")
    assert "Not authorized" in str(refused["reason"])
    assert "0x87" in str(refused["reason"])
    assert before == 0
    assert delivered.expired >= 2


def test_deaf_daemon_says_so_and_recovers(brokers: Brokers, stage: Stage) -> None:
    """A broker that grants a subscription and delivers nothing is found out; bars come once they may."""
    broker = brokers(acl=access_list(without="topic read barcast/v1/bars/#"))
    instance, current = stage.instance(broker, 2, user="barcast")
    subscriber = stage.subscriber(broker, "reader")
    begin(instance)
    denied = instance.wait_for("subscription_denied", seconds=HEAR_SECONDS + 30)
    until(lambda: subscriber.states() == ["deaf"], "the status says it")
    broker.allow(access_list())
    until(lambda: subscriber.states() == ["deaf", "ready"], "the daemon hears")
    feed = stage.feed(instance, current, rate=0, user="feed")
    feed.send(*itertools.islice(old_bars(instance.start), 10))
    settle(instance, feed)
    assert denied["level"] == "error"
    assert "barcast/v1/bars/#" in str(denied["remedy"])
    assert bars_kept(instance, feed) == Kept(acknowledged=11, lost=0, again=0)
    assert ask(instance, "SELECT topic FROM outbox WHERE topic LIKE '%/deadletter/%'") == []


def test_daemon_that_may_not_check_goes_on(brokers: Brokers, stage: Stage) -> None:
    """Without the right to send itself a message the daemon says what it would need, and is ready."""
    broker = brokers(acl=access_list(without="topic write barcast/v1/bars/+"))
    instance, _ = stage.instance(broker, 2, user="barcast")
    subscriber = stage.subscriber(broker, "reader")
    begin(instance)
    refused = instance.wait_for("canary_refused")
    until(lambda: subscriber.states() == ["ready"], "the daemon is ready")
    assert instance.stop() == 0
    assert refused["level"] == "info"
    assert "barcast/v1/bars/1m" in str(refused["remedy"])


def test_shipped_access_list_gives_each_what_it_needs(brokers: Brokers, stage: Stage) -> None:
    """Daemon, feed and reader do their work under it; a feed cannot signal, a reader sees no bars."""
    broker = brokers(acl=access_list())
    instance, current = stage.instance(broker, 2, user="barcast")
    subscriber = stage.subscriber(broker, "reader")
    begin(instance)
    feed = stage.feed(instance, current, rate=20, user="feed")
    feed.start()
    for kind in (*KINDS, "models", "status"):
        until(lambda kind=kind: subscriber.of(kind) != [], f"the reader sees {kind}")
    feed.client.publish("barcast/v1/bars/1m/S00", b"{", 1)
    letter = "SELECT state FROM outbox WHERE topic LIKE '%/deadletter/%'"
    until(lambda: ask(instance, letter) == [(State.DELIVERED,)], "a dead letter is delivered")
    until(lambda: subscriber.states() == ["ready"], "the daemon hears itself")
    feed.enough.set()
    feed.join()
    answered = len(feed.answers)
    feed.client.publish("barcast/v1/signals/1m/S00", b"{}", 1)
    until(lambda: len(feed.answers) == len(feed.sent) + 2 > answered, "the broker has answered")
    assert instance.stop() == 0
    assert [failed for _, failed in feed.answers].count(True) == 1
    assert {topic.split("/")[2] for topic, _ in subscriber.seen} == {*KINDS, "models", "status"}
    assert not [line for line in instance.log() if line["level"] in ("warning", "error")][1:]


def test_two_daemons_of_one_name_are_told(broker: Mosquitto, stage: Stage) -> None:
    """Who is evicted by a namesake again and again says so once, with the remedy, and works when it is alone.

    mosquitto from 2.0 on closes the older connection; some versions do not say why.
    """
    first, current = stage.instance(broker, 2)
    second, _ = stage.instance(broker, 2)
    events = ("session_taken_over", "connections_cut_short")

    def said() -> list[dict[str, object]]:
        return [line for line in first.log() if line["event"] in events]

    begin(first)
    begin(second)
    until(lambda: said() != [], "the first names the cause")
    evicted = [line["event"] for line in first.log()].count("broker_lost")
    first.wait_for("broker_lost", count=evicted + 1)
    assert second.stop() == 0
    feed = stage.feed(first, current, rate=0)
    feed.send(*itertools.islice(old_bars(first.start), 10))
    settle(first, feed)
    assert len({line["event"] for line in said()}) == len(said())
    assert {(line["level"], line["client_id"]) for line in said()} == {("warning", "barcast-test")}
    assert all("another `instance`" in str(line["remedy"]) for line in said())


HALF_AN_HOUR = 200 * 30
"""Messages of half an hour: a bar a minute of two hundred symbols."""


def test_half_an_hour_of_absence_loses_nothing(broker: Mosquitto, stage: Stage) -> None:
    """The daemon is away for as many messages as 200 symbols send in 30 minutes, the broker restarts amid it.

    Half of the bars are sent before the restart, half after it; what the broker acknowledged is all taken.
    """
    instance, current = stage.instance(broker, 2)
    begin(instance)
    assert instance.stop() == 0
    feed = stage.feed(instance, current, rate=0)
    bars = list(itertools.islice(old_bars(instance.start), HALF_AN_HOUR))
    feed.send(*bars[: HALF_AN_HOUR // 2])
    feed.finish()
    broker.stop()
    broker.start()
    feed.send(*bars[HALF_AN_HOUR // 2 :])
    feed.finish()
    began = time.monotonic()
    instance.launch()
    settle(instance, feed)
    kept = bars_kept(instance, feed)
    print(
        f"\n{HALF_AN_HOUR} bars while the daemon was away: {kept}, {time.monotonic() - began:.1f} s to take"
    )
    assert kept == Kept(acknowledged=HALF_AN_HOUR + 1, lost=0, again=0)


def test_compaction_beside_a_daemon_changes_nothing(broker: Mosquitto, stage: Stage) -> None:
    """Compacted by hand under load, and killed amid it, the journal loses no bar; what is left replays."""
    instance, current = stage.instance(broker, 24)
    subscriber = stage.subscriber(broker)
    begin(instance)
    feed = stage.feed(instance, current, RATE)
    feed.start()
    until(lambda: len(feed.sent) >= 4000 and len(subscriber.of("groups")) >= 3, "there is something to leave")
    config = instance.write()
    config.write_text(f'keep = "2m"\n{config.read_text()}')
    command = [sys.executable, "-m", "barcast.backtest.cli", "compact", str(config)]
    killed = subprocess.Popen(command)
    time.sleep(1.5)
    killed.kill()
    killed.wait()
    before = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instance.kill()
    instance.launch()
    instance.wait_for("broker_connected", count=2)
    snapshot = instance.wait_for("recovered", count=2)["snapshot"]
    until(lambda: len(subscriber.of("groups")) >= 6, "it goes on")
    after = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settle(instance, feed)
    until(lambda: subscriber.states()[-1:] == ["stopped"], "the subscriber has everything")
    print(f"\n{before}{after}")
    assert isinstance(snapshot, int)
    assert snapshot > 0
    taken = set(stored(instance)) | archived(instance)
    assert set(feed.acknowledged()) <= taken
    kept = replay_journal(instance.state / "journal.db")
    assert verify(instance.state / "journal.db").agrees
    replayed = {(m.topic, m.payload) for m in kept.messages}
    seen = {pair for kind in KINDS for pair in subscriber.of(kind)}
    assert len(replayed & seen) > 20
    gone = seen - replayed
    first = min(json.loads(payload)["close_time"] for _, payload in replayed if b'"group"' in payload)
    assert all(json.loads(payload)["close_time"] <= first for _, payload in gone)


def archived(instance: Instance) -> set[Bar]:
    """The bars that left the journal."""
    frame = read_archive(instance.state / "archive")
    return {
        Bar(symbol, time_, *values)
        for symbol, time_, *values in frame.with_columns(pl.col("close_time").to_physical()).iter_rows()
    }


@dataclass(frozen=True)
class Disk:
    """A small disk, mounted where only this process and who enters its namespace see it."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def enter(self) -> tuple[str, ...]:
        """What begins a command that sees the disk."""
        return ("nsenter", "-m", "-t", str(self.process.pid), "--")

    def fill(self) -> None:
        """Write until there is no room."""
        with suppress(OSError), (self.seen / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        """Make room again."""
        (self.seen / "filler").unlink()

    @property
    def seen(self) -> Path:
        """The disk as others may look at it."""
        return Path(f"/proc/{self.process.pid}/root{self.folder}")

    def ask(self, question: str) -> Any:
        """Look into the journal on it: SQLite follows links, and would not find it."""
        code = (
            "import json, sqlite3, sys; db = sqlite3.connect(sys.argv[1]); "
            "print(json.dumps(db.execute(sys.argv[2]).fetchall()))"
        )
        command = [*self.enter, sys.executable, "-c", code, str(self.folder / "journal.db"), question]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.fixture
def disks(stage: Stage) -> Iterator[Callable[[Instance], Disk]]:
    """Puts the state of an instance on a disk of 24 MB. It takes root."""
    made = []

    def small(instance: Instance) -> Disk:
        mount = f'mount -t tmpfs -o size=24m tmpfs "{instance.state}"'
        if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("no disk can be mounted here: it takes root")
        saved = shutil.copytree(instance.state / "history", instance.folder / "saved")
        stay = f'{mount} && cp -r "{saved}" "{instance.state}/history" && exec sleep 300'
        made.append(Disk(subprocess.Popen(["unshare", "-m", "sh", "-c", stay]), instance.state))
        until(lambda: (made[-1].seen / "history" / "from0.parquet").is_file(), "the disk is there")
        return made[-1]

    yield small
    stage.end()
    for disk in made:
        disk.process.kill()
        disk.process.wait()


def test_daemon_outlives_a_full_disk(
    broker: Mosquitto, stage: Stage, disks: Callable[[Instance], Disk]
) -> None:
    """On a full disk nothing is taken, as the status says, and with room all is; a start may be retried."""
    instance, current = stage.instance(broker, 2)
    subscriber = stage.subscriber(broker)
    disk = disks(instance)
    instance.command = (*disk.enter, *BARCAST)
    begin(instance)
    feed = stage.feed(instance, current, RATE)
    feed.start()
    until(lambda: len(subscriber.of("groups")) >= 1, "it works")
    disk.fill()
    full = instance.wait_for("disk_full")
    until(lambda: subscriber.states()[-1:] == ["full"], "the status says it")
    records = disk.ask("SELECT COUNT(*) FROM record")
    time.sleep(2)
    assert disk.ask("SELECT COUNT(*) FROM record") == records
    disk.empty()
    instance.wait_for("disk_has_room")
    until(lambda: subscriber.states()[-1:] == ["ready"], "the status says it")
    disk.fill()
    instance.wait_for("disk_full", count=2)
    instance.kill()
    disk.fill()
    command = [*instance.command, "run", str(instance.write())]
    refused = subprocess.run(command, capture_output=True, timeout=60)
    disk.empty()
    instance.launch()
    instance.wait_for("broker_connected", count=2)
    until(lambda: len(feed.sent) >= 4000, "there is enough to look at")
    feed.finish()
    feed.send(Bar("END", instance.start - 600 * MINUTE, 1.0, 1.0, 1.0, 1.0, 1.0))
    feed.finish()
    until(lambda: disk.ask("SELECT 1 FROM record WHERE topic LIKE '%/END'") != [], "the last is taken")
    assert instance.stop() == 0
    shutil.copy(disk.seen / "journal.db", instance.state)
    kept = bars_kept(instance, feed)
    print(f"\na disk that was full twice: {kept}")
    assert refused.returncode == 74, refused.stderr.decode()
    assert b"make room on its disk" in refused.stderr
    assert full["level"] == "error"
    assert int(str(full["free_bytes"])) < 100_000
    assert kept.acknowledged >= 4000
    assert kept.lost == 0
