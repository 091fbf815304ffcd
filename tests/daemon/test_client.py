"""The client: each signal once, none that may not be acted on, and word of a daemon that is not at work."""

import asyncio
import dataclasses
import json
from collections import deque
from contextlib import suppress

import pytest

from barcast.daemon import client as module
from barcast.daemon import wire
from barcast.daemon.client import Client, Gap, NewerSchemaError, order
from barcast.daemon.mqtt import Delivery
from barcast.daemon.ports import Arrival
from barcast.models import ConfigError
from tests.fakes import MINUTE, START, bar, opening, outgoing
from tests.rim import SECOND, play


def at(second, *bars):
    """An arrival some seconds after the start."""
    return Arrival(START + int(second * SECOND), bars)


def told(*minutes, late=0.0):
    """What the path says when both symbols come a second after each of these minutes."""
    return outgoing([*opening(), *(at(60 * m + 1 + late, bar("A", m), bar("B", m)) for m in minutes)])


def of(messages, *kinds):
    """Some kinds of them."""
    return [m for m in messages if m.topic.split("/")[1] in kinds]


class Wire:
    """A link in memory: what is delivered, and what was acknowledged."""

    def __init__(self, fault=None):
        self.inbox, self.arrived, self.acked = deque(), asyncio.Event(), []
        self._fault = fault

    async def run(self, _on_connect):
        if self._fault is not None:
            raise self._fault
        await asyncio.Event().wait()

    def leave(self):
        self.left = True

    def ack(self, deliveries):
        self.acked += deliveries

    def bring(self, *messages):
        for message in messages:
            self.inbox.append(Delivery(message.topic, message.payload, 1, 1, 1))
        self.arrived.set()


class Reader:
    """A client on such a link, whose clock stands still, and what it called back."""

    def __init__(self, fault=None, **settings):
        self.now, self.stale, self.gaps, self.said = START + 5 * MINUTE + SECOND, [], [], []
        self.client = Client(
            instance="me",
            root="t",
            clock=lambda: self.now,
            on_stale=lambda m: self.stale.append((type(m).__name__, m.symbol, m.close_time)),
            on_gap=self.gaps.append,
            on_halt=self.said.append,
            on_resume=lambda: self.said.append("resumed"),
            **settings,
        )
        self.client._link = self.wire = Wire(fault)

    async def __aenter__(self):
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *what):
        await self.client.__aexit__(*what)

    async def take(self, source, seconds=0.05):
        """What a reader hands out until nothing came for a while."""
        found = []
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(seconds):
                    found.append(await anext(source))
        return found


def close(minute):
    return wire.to_text(START + minute * MINUTE)


def test_each_signal_is_handed_out_once():
    """Redeliveries and retained copies, in whatever order, bring nothing new; all are acknowledged."""
    messages = told(1, 2, 3, 4, 5)
    sent = of(messages, "signals", "targets", "groups")

    async def main():
        async with Reader() as r:
            r.wire.bring(*sent, *sent, *reversed(sent))
            found = await r.take(r.client.signals())
            r.wire.bring(*of(messages, "signals"))
            again = await r.take(r.client.signals(), 0.02)
            targets = await r.take(r.client.targets())
            groups = await r.take(r.client.groups())
            return found, again, targets, groups, len(r.wire.acked), r.gaps

    found, again, targets, groups, acked, gaps = play(main())
    expected = [json.loads(m.payload)["id"] for m in of(messages, "signals")]
    valid = expected[2:]  # those of the third minute are valid until the fifth closes
    assert [s.id for s in found] == valid
    assert again == []
    assert [(t.symbol, t.close_time) for t in targets] == [(s, close(m)) for m in (4, 5) for s in "AB"]
    assert [(g.done.close_time, sorted(g.signals)) for g in groups] == [
        (close(m), ["A", "B"]) for m in (4, 5)
    ]
    assert acked == 3 * len(sent) + len(of(messages, "signals"))
    assert gaps == []


def test_stale_is_told_and_not_handed_out():
    """What is past its validity is refused when it comes, and when it waited until then."""
    sent = of(told(1, 2, 3, 4, 5), "signals", "targets", "groups")

    async def main():
        async with Reader() as r:
            r.wire.bring(*sent)
            await asyncio.sleep(0.02)
            early = list(r.stale)
            r.now = START + 6 * MINUTE  # the validity of minute 4 ends with minute 6
            signals = await r.take(r.client.signals())
            groups = await r.take(r.client.groups())
            return early, r.stale, signals, groups

    early, stale, signals, groups = play(main())
    assert sorted(early) == sorted((kind, s, close(3)) for kind in ("Signal", "Target") for s in "AB")
    assert {time for _, _, time in stale[len(early) :]} == {close(4)}
    assert [s.close_time for s in signals] == [close(5)] * 2
    assert [g.done.close_time for g in groups] == [close(5)]


@pytest.mark.parametrize("untradable", [False, True])
def test_backlog_is_refused_unless_asked_for(untradable):
    """What is not tradable is told to on_stale; who asks for it gets it."""
    base = told(1, 2, 3, 4)
    backlog = told(1, 2, 3, 4, 5, late=60)[len(base) - 1 :]
    late = [m for m in of(backlog, "signals", "targets", "groups") if close(5).encode() in m.payload]

    async def main():
        async with Reader(untradable=untradable) as r:
            r.now = START + 6 * MINUTE + 2 * SECOND
            r.wire.bring(*late)
            found = [await r.take(s()) for s in (r.client.signals, r.client.targets, r.client.groups)]
            return [len(part) for part in found], len(r.stale), r.gaps

    assert play(main()) == (([2, 2, 1], 0, []) if untradable else ([0, 0, 0], 4, []))


def test_shed_group_is_a_gap():
    """It has no signals; who waits for them is told whose, once, and nothing waits for them."""
    groups = of(told(1, 2, 3, 4, 5), "groups")
    shed = json.loads(groups[-1].payload)
    shed |= {"shed": True, "symbols": [], "withheld": {"A": "overload", "B": "overload"}}
    last = dataclasses.replace(groups[-1], payload=json.dumps(shed).encode())

    async def main():
        async with Reader() as r:
            r.wire.bring(last, last)
            return await r.take(r.client.groups()), r.gaps, r.client._unfinished

    assert play(main()) == ([], [Gap("1m", close(5), ("A", "B"))], {})


def newer(message):
    """The message as a later version would send it."""
    payload = message.payload.replace(b'"schema":1', b'"schema":2').replace(b'"rise":[', b'"rises":["x",')
    return dataclasses.replace(message, payload=payload)


def test_newer_schema_is_refused_with_the_remedy():
    """A newer message raises where it is read, whatever else it holds, and is not acknowledged."""
    sent = of(told(1, 2, 3, 4, 5), "signals")[-2:]

    async def main():
        async with Reader() as r:
            r.wire.bring(sent[0], newer(sent[1]))
            signals = r.client.signals()
            assert (await anext(signals)).symbol == "A"
            with pytest.raises(NewerSchemaError, match=r"t/signals/1m/B: .* schema 2, .* up to 1; install"):
                await anext(signals)
            assert len(r.wire.acked) == 1

    with pytest.raises(NewerSchemaError):  # also for who does not read
        play(main())


def test_unknown_fields_are_ignored_and_junk_is_skipped():
    """A field that was added changes nothing; what is no message is acknowledged and dropped."""
    [signal] = of(told(1, 2, 3, 4, 5), "signals")[-1:]
    added = signal.payload.replace(b'"schema":1', b'"schema":1,"skew":[0.1]')
    topic = signal.topic

    async def main():
        async with Reader() as r:
            for payload in (b"", b"{", b"\xff", b'{"schema":1}', added):
                r.wire.bring(wire.Outgoing("", topic, payload, True, None))
            return await r.take(r.client.signals()), len(r.wire.acked)

    found, acked = play(main())
    assert [s.symbol for s in found] == ["B"]
    assert acked == 5


def test_group_waits_for_signals_that_come_after_it():
    """The message that a group is complete may overtake a signal of it."""
    *signals, group = of(told(1, 2, 3, 4, 5), "signals", "groups")[-3:]

    async def main():
        async with Reader() as r:
            groups = r.client.groups()
            r.wire.bring(signals[0], group)
            assert await r.take(groups, 0.02) == []
            r.wire.bring(signals[1])
            [found] = await r.take(r.client.groups())
            return found, r.gaps, r.client._parts, r.client._unfinished

    found, gaps, *rest = play(main())
    assert list(found.signals) == ["A", "B"]
    assert gaps == []
    assert rest == [{}, {}]


def test_signal_that_does_not_come_is_a_gap(monkeypatch):
    """A group that is told complete and is not is named after a while, with who is missing."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.02)
    *signals, group = of(told(1, 2, 3, 4, 5), "signals", "groups")[-3:]

    async def main():
        async with Reader() as r:
            r.wire.bring(signals[0], group)
            found = await r.take(r.client.groups())
            return found, r.gaps, len(await r.take(r.client.signals())), r.client._parts

    assert play(main()) == ([], [Gap("1m", close(5), ("B",))], 1, {})


def test_missed_group_is_a_gap():
    """Each group names the one before it: one that never came is noticed with the next, stragglers or not."""
    sent = of(told(1, 2, 3, 4, 5), "signals", "targets", "groups")
    without = [
        m for m in sent if not ("/groups/" in m.topic and json.loads(m.payload)["close_time"] == close(4))
    ]
    assert len(without) == len(sent) - 1

    async def main(messages):
        async with Reader() as r:
            r.wire.bring(*messages)
            await asyncio.sleep(0.02)
            return r.gaps

    assert play(main(without)) == [Gap("1m", close(4))]
    assert play(main(sent)) == []
    # Who begins with the last one has missed nothing.
    assert play(main(sent[-5:])) == []


def test_straggler_is_a_group_of_its_own():
    """A straggler comes as a second group of its close, and breaks no chain."""
    base = [at(60 * m + 1, bar("A", m), bar("B", m)) for m in range(1, 5)]
    tail = [at(301, bar("A", 5)), at(312, bar("B", 5)), at(361, bar("A", 6), bar("B", 6))]
    sent = of(outgoing([*opening(), *base, *tail]), "signals", "groups")

    async def main():
        async with Reader() as r:
            r.wire.bring(*sent)
            groups = await r.take(r.client.groups())
            return [(g.done.close_time, g.done.straggler, list(g.signals)) for g in groups][-3:], r.gaps

    assert play(main()) == (
        [(close(5), False, ["A"]), (close(5), True, ["B"]), (close(6), False, ["A", "B"])],
        [],
    )


def status(state, boot="b1", interval=0.1, paused=False):
    """A status as the daemon, or its last will, sends it."""
    gone = state == "lost"
    body = wire.Status(
        state=state,
        instance="me",
        boot=boot,
        time=None if gone else wire.to_text(START),
        interval=None if gone else interval,
        processed=None,
        waiting=None if gone else 0,
        paused=paused,
    )
    return wire.status(body, "t/status/me")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("starting", "the daemon is starting"),
        ("deaf", "the daemon hears no bars"),
        ("stopped", "the daemon was stopped"),
        ("lost", "the daemon lost its connection, or its life"),
    ],
)
def test_daemon_that_says_that_it_is_not_at_work(state, reason):
    """Every state but ready halts, once and at once; ready resumes."""

    async def main():
        async with Reader() as r:
            assert r.client.halted == "no status has come yet"
            for message in (status("ready"), status(state), status(state), status("ready", "b2")):
                r.wire.bring(message)
                await asyncio.sleep(0.01)
            return r.said, r.client.halted, r.client.status.boot

    assert play(main()) == (["resumed", reason, "resumed"], None, "b2")


def test_paused_daemon_halts():
    """It is at work and makes no signals: whoever trades by them must know."""

    async def main():
        async with Reader() as r:
            for message in (status("ready"), status("ready", paused=True), status("ready")):
                r.wire.bring(message)
                await asyncio.sleep(0.01)
            return r.said

    assert play(main()) == ["resumed", "an operator paused the daemon", "resumed"]


def test_last_will_of_an_earlier_start_halts_nothing():
    """A broker may tell of the end of a connection after the next start is at work."""

    async def main():
        async with Reader() as r:
            for message in (status("ready", "b2"), status("lost", "b1")):
                r.wire.bring(message)
                await asyncio.sleep(0.01)
            return r.said

    assert play(main()) == ["resumed"]


def test_silence_of_three_intervals_halts():
    """Heartbeats keep it going; three intervals without one halt, whatever the cause; the next resumes."""

    async def main():
        async with Reader() as r:
            for _ in range(8):  # longer than three intervals in all
                r.wire.bring(status("ready"))
                await asyncio.sleep(0.05)
            alive = list(r.said)
            await asyncio.sleep(0.4)
            r.wire.bring(status("ready"))
            await asyncio.sleep(0.02)
            return alive, r.said

    alive, said = play(main())
    reason = "no status of me for 0.3 s: the daemon hangs, or the broker is out of reach"
    assert alive == ["resumed"]
    assert said == ["resumed", reason, "resumed"]


def test_no_status_at_all_halts(monkeypatch):
    """Who never hears of the daemon is told so, too."""
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.01)

    async def main():
        async with Reader() as r:
            await asyncio.sleep(0.1)
            return r.said, r.client.halted

    said, halted = play(main())
    assert said == [halted]


def test_memory_is_bounded(monkeypatch):
    """Ids, unread messages and unfinished groups are forgotten at last; what a reader loses is a gap."""
    for name, most in (("REMEMBERED", 4), ("WAITING", 3), ("UNFINISHED", 2)):
        monkeypatch.setattr(module, name, most)
    sent = of(told(*range(1, 10)), "signals")

    async def main():
        async with Reader() as r:
            r.wire.bring(*sent)
            await asyncio.sleep(0.02)
            kept = len(r.client._seen), len(r.client._signals._items), len(r.client._parts)
            unread, signals = list(r.gaps), r.client.signals()
            first = await anext(signals)
            r.wire.bring(*of(told(*range(1, 12)), "signals")[-4:])
            await asyncio.sleep(0.02)
            return kept, unread, r.gaps, first.close_time

    kept, unread, gaps, first = play(main())
    assert kept == (4, 3, 2)
    assert unread == []  # nobody had asked for them
    assert first == close(8)
    assert gaps == [Gap("1m", close(9), ("A",)), Gap("1m", close(9), ("B",)), Gap("1m", close(10), ("A",))]


def test_fault_of_the_connection_reaches_the_reader():
    """A subscription that is refused is raised by whoever reads, or at the end."""

    async def main():
        async with Reader(ConfigError("not granted")) as r:
            await anext(r.client.signals())

    async def idle():
        async with Reader(ConfigError("not granted")):
            await asyncio.sleep(0.01)

    for coroutine in (main(), idle()):
        with pytest.raises(ConfigError, match="not granted"):
            play(coroutine)


def test_readers_end_with_the_client():
    """Readers in other tasks end when the client is left, after what waits for them."""
    sent = of(told(1, 2, 3, 4, 5), "signals")[-2:]

    async def main():
        found = []
        async with Reader() as r:

            async def read():
                found.extend([signal.symbol async for signal in r.client.signals()])

            reading = asyncio.create_task(read())
            r.wire.bring(*sent)
            await asyncio.sleep(0.02)
        await reading
        assert r.wire.left
        return found

    assert play(main()) == ["A", "B"]


@pytest.mark.parametrize(
    ("connected", "message", "said"),
    [
        (False, None, "no broker: Connection refused"),
        (True, None, "it has no status on the broker"),
        (True, status("stopped"), "its status is stopped"),
    ],
)
def test_order_that_nobody_takes_says_what_is_known(monkeypatch, connected, message, said):
    """Whether the broker was reached, and what the daemon's retained status says."""
    link = Wire()
    link.connected, link.fault = asyncio.Event(), "Connection refused"
    monkeypatch.setattr(module, "Link", lambda *_, **__: link)
    monkeypatch.setattr(module, "TAKEN_SECONDS", 0.05)

    async def main():
        if connected:
            link.connected.set()
        if message is not None:
            link.bring(message)
        await order(instance="me", root="t", verb="pause")

    with pytest.raises(ConfigError, match=rf"me: no answer to pause within 0 s \({said}\); look whether"):
        play(main())
