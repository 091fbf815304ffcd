"""The live rim: commit before acknowledging and before acting, and deliver in order until it is done."""

import asyncio
import json
import sqlite3

import pytest
from pg8000.exceptions import DatabaseError
from structlog.testing import capture_logs

from barcast.daemon import live
from barcast.daemon.journal import Journal, Kind, Progress, State
from barcast.daemon.live import Courier, Decision, LiveSink, Scribe
from barcast.daemon.mqtt import NOT_CONNECTED, Delivery
from barcast.daemon.pipeline import Pipeline, run
from barcast.daemon.ports import Activation, Arrival, EndOfSource, Revision
from barcast.daemon.wire import Outgoing
from tests import checks
from tests.fakes import START, Spread, bar, settings
from tests.rim import SECOND, Message, Silent, World, outbox, play, source, taken

A, B = (Message.of(bar(symbol, 1)) for symbol in "AB")
BAD = Message("t/bars/1m/A", b'{"close_time": "yesterday"}')


@pytest.fixture
def scribe(tmp_path, each_journal):
    """A journal and its thread."""
    opened = Scribe(Journal(tmp_path / "journal.db"))
    yield opened
    opened.close()


def symbols(found):
    """The symbols of arrivals, in order."""
    return [b.symbol for event in found for b in event.bars]


def test_acknowledged_after_the_commit_in_order(tmp_path):
    """The broker is told that a message is ours only once it is in the journal, oldest first."""
    checks.acknowledged_after_the_commit(tmp_path)


def test_failed_commit_acknowledges_nothing(scribe, monkeypatch):
    """What could not be written stays the broker's, and no event of it acts."""

    def fails(_records, _outgoing):
        raise sqlite3.OperationalError("database or disk is full")

    world = World()
    monkeypatch.setattr(scribe.journal, "append", fails)
    world.deliver(A)
    with pytest.raises(sqlite3.OperationalError):
        play(source(world, scribe).next(None))
    assert world.acked == []


def test_large_inbox_is_taken_in_bounded_commits(scribe, monkeypatch):
    """However much waits, a commit takes a bounded part of it, and acknowledges that part."""
    monkeypatch.setattr(live, "TAKE", 4)
    world = World(time=START + 10 * 60 * SECOND)
    world.deliver(*(Message.of(bar("A", minute)) for minute in range(1, 11)))
    src, acked = source(world, scribe), []

    async def take():
        for _ in range(10):
            await src.next(None)
            acked.append(len(world.acked))

    play(take())
    assert acked == [4] * 4 + [8] * 4 + [10] * 2
    assert [r.seq for r in scribe.journal.records()] == list(range(1, 11))


def test_bad_message_becomes_a_dead_letter(scribe):
    """What cannot be read is acknowledged, put into the outbox with the reason, and the loop goes on."""
    world, queued = World(), []
    world.deliver(A, BAD, B)
    found = play(taken(source(world, scribe, queued=lambda: queued.append(True))))
    assert symbols(found) == ["A", "B"]
    assert world.acked == [1, 2, 3]
    assert queued == [True]
    [letter] = outbox(scribe.journal)
    body = json.loads(letter.payload)
    assert (letter.topic, body["topic"], body["payload"]) == (
        "t/deadletter/me",
        BAD.topic,
        BAD.payload.decode(),
    )
    assert "close_time" in body["reason"]
    assert [r.payload for r in scribe.journal.records()] == [A.payload, B.payload]


def test_array_with_a_bad_bar_keeps_the_good_ones(scribe):
    """One bad bar of an array becomes a dead letter of its own; the others are taken."""
    pieces = json.loads(Message.of(bar("A", 1), bar("B", 1), bar("C", 1)).payload)
    pieces[1]["low"] = 1e9
    world = World()
    world.deliver(Message("t/bars/1m", json.dumps(pieces).encode()))
    [arrival] = play(taken(source(world, scribe)))
    assert [b.symbol for b in arrival.bars] == ["A", "C"]
    [letter] = outbox(scribe.journal)
    assert json.loads(json.loads(letter.payload)["payload"])["symbol"] == "B"
    [record] = scribe.journal.records()
    assert json.loads(record.payload) == pieces


@pytest.mark.parametrize("topic", ["t/bars/1m", "t/bars/5m"])
def test_canary_is_acknowledged_and_nothing_comes_of_it(scribe, topic):
    """A daemon's message to itself, of any timeframe, is neither journalled nor a dead letter."""
    world = World()
    world.deliver(A)
    world.inbox.append(Delivery(topic, b"[]", 7, 1, 1, canary=True))
    world.deliver(B)
    assert symbols(play(taken(source(world, scribe)))) == ["A", "B"]
    assert world.acked == [1, 7, 2]
    assert [r.payload for r in scribe.journal.records()] == [A.payload, B.payload]
    assert outbox(scribe.journal) == []


def test_canary_of_who_does_not_mark_it_is_harmless(scribe):
    """An array without bars has neither a bar nor a fault in it."""
    world = World()
    world.deliver(Message("t/bars/1m", b"[]"), A)
    assert symbols(play(taken(source(world, scribe)))) == ["A"]
    assert world.acked == [1, 2]
    assert outbox(scribe.journal) == []


def test_message_of_quality_0_is_kept_too(scribe):
    """A feed that sends without wanting an answer has its bars journalled like any other."""
    world = World()
    world.deliver(A, qos=0)
    assert symbols(play(taken(source(world, scribe)))) == ["A"]
    assert len(list(scribe.journal.records())) == 1


def swap(model):
    """The decision that a model takes over, told of in the outbox."""
    return Decision(
        Kind.ACTIVATION,
        json.dumps({"model": model, "fingerprint": "numpy", "reason": "test"}).encode(),
        lambda time: Activation(time, model, "numpy", 8),
        lambda time: [Outgoing(f"notice {model}", "t/models/me", str(time).encode(), True, None)],
    )


def test_decision_is_journalled_before_what_waits_and_before_it_acts(tmp_path):
    """A decision takes its place before the messages that wait, and is in the journal by then."""
    checks.decision_is_journalled_before_it_acts(tmp_path)


def test_notices_of_decisions_are_told(scribe):
    """What a decision has to say is put into the outbox with it, in order."""
    src = source(World(), scribe)

    async def decides():
        src.decide(swap("x"))
        src.decide(swap("y"))
        return await taken(src)

    assert [type(e) for e in play(decides())] == [Activation, Activation]
    assert [m.id for m in outbox(scribe.journal)] == ["notice x", "notice y"]


def test_decision_does_not_overtake_what_is_committed(scribe):
    """Events that are in the journal already act before a decision made later."""
    world = World()
    src = source(world, scribe, backlog=[(7, Arrival(5, (bar("A", 1),)))], position=6)

    async def decides():
        src.decide(swap("x"))
        first = await src.next(None)
        return first, src.position, await src.next(None)

    first, position, second = play(decides())
    assert (type(first), position, type(second)) == (Arrival, 7, Activation)


def test_decision_wakes_a_source_that_waits(tmp_path, scribe):
    """A decision acts at once, also while no bar comes."""

    class Link:
        inbox, arrived = World().inbox, asyncio.Event()

        def ack(self, deliveries):
            assert deliveries == []

    class Still:
        def now(self):
            return START

        def seconds_until(self, moment):
            return 30.0

    src = live.LiveSource(
        Link(),
        scribe,
        Still(),
        root="t",
        calendars=None,
        deadletters="",
        queued=lambda: None,
        backlog=(),
        position=0,
        stamped=0,
        shed=(),
    )

    async def decides():
        waiting = asyncio.create_task(src.next(START + SECOND))
        await asyncio.sleep(0.05)
        assert src.waiting
        src.decide(swap("x"))
        event = await waiting
        assert not src.waiting
        return event

    assert play(decides()) == Activation(START, "x", "numpy", 8)


def test_stamps_never_go_backwards(scribe):
    """When the host's clock is set back, arrivals are stamped with the newest time seen."""
    world = World(time=START + 100)
    src = source(world, scribe, stamped=START + 50)

    async def comes():
        stamps = []
        for time in (START + 100, START + 40, START + 100, START + 101):
            world.time = time
            world.deliver(A)
            event = await src.next(None)
            stamps += [event.time, src.now()]
        return stamps

    assert play(comes()) == [START + 100] * 6 + [START + 101] * 2
    assert [r.time for r in scribe.journal.records()] == [START + 100] * 3 + [START + 101]


def test_stamps_begin_where_the_journal_ended(scribe):
    """After a restart on a host whose clock is behind, nothing is stamped before what is in the journal."""
    world = World(time=START)
    world.deliver(A)
    [event] = play(taken(source(world, scribe, stamped=START + 9)))
    assert event.time == START + 9


def test_deadline_passes_only_with_nothing_left_that_came_before(scribe):
    """None means: the deadline is over, and everything that arrived by then was handed out."""
    world = World(time=START + 10 * SECOND)
    src = source(world, scribe, backlog=[(1, Arrival(START, (bar("A", 1),)))])

    async def asks():
        world.deliver(B)
        past = START + SECOND
        return [await src.next(past), await src.next(past), await src.next(past)]

    first, second, third = play(asks())
    assert symbols([first, second]) == ["A", "B"]
    assert third is None


def test_deadline_that_is_not_over_waits(scribe):
    """A message that comes before the deadline is handed out first; a late timer says the late time."""
    world = World(late=3 * SECOND)
    world.script.append((START + SECOND, [A]))
    src = source(world, scribe)
    deadline = START + 5 * SECOND

    async def asks():
        event = await src.next(deadline)
        return event, await src.next(deadline), src.now()

    event, none, now = play(asks())
    assert event.time == START + SECOND
    assert none is None
    assert now == START + 8 * SECOND


class Sent(Silent):
    """A courier that only notes that it was woken."""

    woken = 0

    def wake(self):
        self.woken += 1


def opened(scribe, script, sent):
    """A source with its settings and model decided, and the sink behind it."""
    world = World()
    world.script.extend(script)
    src = source(world, scribe)
    revision = settings().encode()
    first = Decision(Kind.REVISION, revision, lambda time: Revision(time, revision))
    return world, src, LiveSink(scribe, src, sent), [first, swap("spread")]


def test_settle_commits_messages_and_progress_together(scribe, monkeypatch):
    """The outbox and how far the path has come change in one commit, after each group and not without one."""
    commits, sent = [], Sent()
    settle = scribe.journal.settle

    def spy(progress, outgoing):
        settle(progress, outgoing)
        commits.append((progress, [m.topic.split("/")[1] for m in outgoing]))

    monkeypatch.setattr(scribe.journal, "settle", spy)
    script = [
        (START + (60 * m + i) * SECOND, [Message.of(bar(symbol, m))])
        for m in range(1, 4)
        for i, symbol in enumerate("AB")
    ]
    script.append((START + 240 * SECOND, [Message.of(bar("A", 4))]))
    _, src, sink, decisions = opened(scribe, script, sent)

    async def runs():
        for decision in decisions:
            src.decide(decision)
        await run(src, Pipeline(lambda *_: Spread()), sink)

    play(runs())
    group = ["signals", "signals", "targets", "targets", "groups"]
    assert commits == [
        (Progress(4, START + 61 * SECOND), ["groups"]),
        (Progress(6, START + 121 * SECOND), ["groups"]),
        (Progress(8, START + 181 * SECOND), group),
        (Progress(9, START + 250 * SECOND), ["signals", "targets", "groups"]),
    ]
    assert sent.woken == 4
    assert scribe.journal.progress() == Progress(9, START + 250 * SECOND)


def test_settle_that_fails_leaves_neither(scribe):
    """When the commit fails, neither messages nor progress are there."""
    scribe.journal.settle(Progress(1, 1), [])
    with pytest.raises((sqlite3.Error, DatabaseError)):
        scribe.journal.settle(Progress(2, 2), [letter("a1"), Outgoing("b", "t", None, False, None)])
    assert scribe.journal.progress() == Progress(1, 1)
    assert outbox(scribe.journal) == []


def test_progress_is_noted_now_and_then_without_messages(scribe, monkeypatch):
    """When bars cause no message for long, progress is noted all the same, so that a restart stays short."""
    monkeypatch.setattr(live, "PROGRESS_EVERY", 5)
    script = [(START + (70 + i) * SECOND, [Message.of(bar("A", 1))]) for i in range(20)]
    script[0] = (START + 61 * SECOND, [Message.of(bar("A", 1), bar("B", 1), topic="t/bars/1m")])
    _, src, sink, decisions = opened(scribe, script, Sent())
    noted = []

    async def runs():
        for decision in decisions:
            src.decide(decision)
        pipeline = Pipeline(lambda *_: Spread())
        settle = sink.settle

        async def noting(now):
            await settle(now)
            noted.append((src.position, (await scribe(scribe.journal.progress)).seq))

        sink.settle = noting
        await run(src, pipeline, sink)

    play(runs())
    assert noted[-1][0] == 22
    assert all(0 <= position - seq < 5 for position, seq in noted)
    assert len({seq for _, seq in noted}) <= 7


class Broker:
    """A link whose answers to publications are scripted; `faults` maps a topic to its coming answers."""

    def __init__(self):
        self.connected = asyncio.Event()
        self.sent, self.properties, self.faults, self.open = [], [], {}, {}

    async def publish(self, message, now, properties=()):
        self.sent.append(message.id)
        self.properties.append(dict(properties))
        waits = self.open.get(message.topic)
        if waits is not None:
            await waits.wait()
        else:
            await asyncio.sleep(0)
        answers = self.faults.get(message.topic)
        return answers.pop(0) if answers else None


def letter(name, expires=None):
    """A message whose topic is its first character."""
    return Outgoing(name, name[0], name.encode(), True, expires)


async def until(holds):
    """Wait until something holds, and not for long."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError


def fill(scribe, *names, expires=None):
    """Put messages into the outbox."""
    scribe.journal.settle(scribe.journal.progress(), [letter(name, expires) for name in names])


def delivers(scribe, broker, during=None, clock=None):
    """Run a courier until its outbox is empty; return it."""

    async def main():
        broker.connected.set()
        courier = Courier(broker, scribe, clock or World(), "me", "boot")
        task = asyncio.create_task(courier.run())
        if during is not None:
            await during(courier)
        await courier.drained()
        task.cancel()
        return courier

    return play(main())


@pytest.fixture
def broker(monkeypatch):
    """A broker that can refuse, and a courier that tries again soon."""
    monkeypatch.setattr(live, "RETRY_SECONDS", 0.01)
    return Broker()


def test_outbox_is_delivered_in_its_order(scribe, broker):
    """For each topic messages go out in the order of the outbox, each once."""
    fill(scribe, "a1", "b1", "a2", "c1", "a3", "b2")
    delivers(scribe, broker)
    assert sorted(broker.sent) == ["a1", "a2", "a3", "b1", "b2", "c1"]
    assert [s for s in broker.sent if s[0] == "a"] == ["a1", "a2", "a3"]
    assert [s for s in broker.sent if s[0] == "b"] == ["b1", "b2"]
    assert scribe.journal.outbox_counts()[State.DELIVERED] == 6


def test_next_of_a_topic_waits_for_the_answer(scribe, broker):
    """A topic's next message is sent only once the broker has the one before it."""
    fill(scribe, "a1", "b1", "a2")
    broker.open["a"] = asyncio.Event()

    async def looks(courier):
        await asyncio.sleep(0.1)
        assert broker.sent == ["a1", "b1"]
        broker.open["a"].set()

    delivers(scribe, broker, looks)
    assert broker.sent == ["a1", "b1", "a2"]


def test_refused_message_holds_its_topic_and_no_other(scribe, broker):
    """A refused message stays pending, later ones of its topic wait behind it, other topics go on."""
    fill(scribe, "a1", "a2", "b1", "b2")
    broker.faults["a"] = ["refused by the broker: Not authorized"] * 5
    seen = []

    async def looks(courier):
        await until(lambda: len(broker.faults["a"]) <= 2)
        rows = await scribe(scribe.journal.pending, 10)  # on the thread that has the connection
        seen.extend(row.message.id for row in rows)

    delivers(scribe, broker, looks)
    assert seen == ["a1"]  # the oldest pending message of each topic
    assert [s for s in broker.sent if s[0] == "a"] == ["a1"] * 6 + ["a2"]
    assert [s for s in broker.sent if s[0] == "b"] == ["b1", "b2"]
    assert scribe.journal.outbox_counts()[State.DELIVERED] == 4


def test_refusal_is_logged_once(scribe, broker):
    """However often a refused topic is tried again, the log says so once, and again after it worked."""
    fill(scribe, "a1", "a2")
    broker.faults["a"] = ["refused"] * 3 + [None] + ["refused"] * 2
    with capture_logs() as lines:
        delivers(scribe, broker)
    assert [line["topic"] for line in lines if line["event"] == "publish_failed"] == ["a", "a"]
    assert broker.sent[-1] == "a2"


def test_refusal_beyond_the_window_holds_order_too(scribe, broker, monkeypatch):
    """With more pending than are sent at once, a refused topic is still in order."""
    monkeypatch.setattr(live, "AT_ONCE", 2)
    names = [f"{topic}{n}" for n in range(5) for topic in "ab"]
    fill(scribe, *names)
    broker.faults["a"] = ["refused", None, "refused", "refused"]
    delivers(scribe, broker)
    refusals = iter([False, True, False, False])
    accepted = [name for name in broker.sent if name[0] == "b" or next(refusals, True)]
    assert [n for n in accepted if n[0] == "a"] == ["a0", "a1", "a2", "a3", "a4"]
    assert [n for n in accepted if n[0] == "b"] == ["b0", "b1", "b2", "b3", "b4"]
    assert len(accepted) == 10


def test_expired_messages_are_marked_and_not_sent(scribe, broker):
    """A message past its validity is counted as expired; nobody gets it late."""
    fill(scribe, "a1", "b1", expires=START)
    fill(scribe, "a2", expires=START + 1)
    delivers(scribe, broker)
    assert broker.sent == ["a2"]
    assert scribe.journal.outbox_counts() == {State.PENDING: 0, State.DELIVERED: 1, State.EXPIRED: 2}


def test_expiry_frees_the_topic(scribe, broker):
    """A refused message that expires lets the later ones of its topic pass."""
    clock = World()
    fill(scribe, "a1", expires=START + 1)
    fill(scribe, "a2")
    broker.faults["a"] = ["refused"]

    async def passes(_courier):
        await until(lambda: not broker.faults["a"])
        clock.time = START + 2

    delivers(scribe, broker, passes, clock)
    assert broker.sent == ["a1", "a2"]
    assert scribe.journal.outbox_counts() == {State.PENDING: 0, State.DELIVERED: 1, State.EXPIRED: 1}


def test_restart_sends_what_was_not_delivered(scribe, broker):
    """After a crash the outbox goes on where it was: delivered messages are not sent again."""
    fill(scribe, "a1", "a2", "b1")
    broker.open["b"] = asyncio.Event()

    async def crashes():
        broker.connected.set()
        task = asyncio.create_task(Courier(broker, scribe, World(), "me", "one").run())
        await asyncio.sleep(0.1)
        task.cancel()

    fill(scribe, "c1")
    scribe.journal.mark([(1, State.DELIVERED)])
    play(crashes())
    assert broker.sent == ["a2", "b1", "c1"]
    again = Broker()
    delivers(scribe, again)
    # The batch with b1 was not answered as a whole: a message is sent again rather than lost.
    assert again.sent[:2] == ["a2", "b1"]
    third = Broker()
    delivers(scribe, third)
    assert third.sent == []


def test_nothing_is_sent_without_a_connection(scribe, broker):
    """While there is no connection the outbox waits, and goes out when there is one."""
    fill(scribe, "a1")

    async def main():
        courier = Courier(broker, scribe, World(), "me", "boot")
        task = asyncio.create_task(courier.run())
        await asyncio.sleep(0.05)
        before = list(broker.sent)
        broker.faults["a"] = [NOT_CONNECTED]
        broker.connected.set()
        await courier.drained()
        task.cancel()
        return before

    assert play(main()) == []
    assert broker.sent == ["a1", "a1"]


def test_woken_courier_sends_what_is_new(scribe, broker):
    """A message that comes while the courier rests goes out when it is woken, and `drained` waits for it."""

    async def adds(courier):
        await courier.drained()
        await scribe(fill, scribe, "a1")
        courier.wake()

    delivers(scribe, broker, adds)
    assert broker.sent == ["a1"]


def test_dead_letter_alone_is_delivered(scribe, broker):
    """A dead letter goes out at once, not with the next signal."""
    world = World()
    world.deliver(BAD)

    async def comes(courier):
        await courier.drained()
        with pytest.raises(EndOfSource):
            await source(world, scribe, queued=courier.wake).next(None)

    delivers(scribe, broker, comes)
    assert len(broker.sent) == 1


def test_what_differs_from_run_to_run_travels_beside_the_body(scribe, broker):
    """Publication time, instance, boot and a rising sequence are properties; the body is as it was stored."""
    fill(scribe, "a1", "b1", "c1")
    delivers(scribe, broker)
    assert [p["sequence"] for p in broker.properties] == ["1", "2", "3"]
    assert {(p["instance"], p["boot"], p["published_at"]) for p in broker.properties} == {
        ("me", "boot", "2023-11-14T22:14:00Z")
    }
