"""News and backlog: what became due when a newer bar should have closed is told, and not to be traded."""

import json
from contextlib import closing
from datetime import datetime

import msgspec
import pytest

from barcast.daemon.calendar import Calendar
from barcast.daemon.ports import Arrival, Revision
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import to_ns
from barcast.models import Bar
from tests.checks import open_model
from tests.fakes import MINUTE, START, bar, opening, outgoing, settings
from tests.rim import SECOND, Instance, Message, World, activation, outbox, path_of, play, revision

HOUR = 60 * MINUTE


def said(messages, kind):
    """(minute of the close, whether it is tradable) of one kind of message, in order."""
    bodies = [json.loads(m.payload) for m in messages if f"/{kind}/" in m.topic]
    return [(minute(body), body["tradable"]) for body in bodies]


def minute(body):
    return (to_ns(datetime.fromisoformat(body["close_time"])) - START) // MINUTE


def at(second, *bars):
    """An arrival some seconds after the start."""
    return Arrival(START + int(second * SECOND), bars)


def test_what_comes_in_time_is_tradable():
    """Signals, targets and groups of bars that come before their successors should close."""
    messages = outgoing([*opening(), *(at(60 * m + 59, bar("A", m), bar("B", m)) for m in range(1, 6))])
    for kind in ("signals", "targets", "groups"):
        assert said(messages, kind)
        assert all(tradable for _, tradable in said(messages, kind))


def test_group_that_is_complete_with_the_next_close_is_not_tradable():
    """The moment of the next close is too late, one nanosecond before it is not."""
    steps = [at(60 * m + 1, bar("A", m), bar("B", m)) for m in range(1, 5)]
    for late, tradable in ((0, True), (1, False)):
        time = START + 6 * MINUTE - 1 + late
        messages = outgoing([*opening(), *steps, Arrival(time, (bar("A", 5), bar("B", 5)))])
        for kind, count in (("signals", 2), ("targets", 2), ("groups", 1)):
            assert said(messages, kind)[-count:] == [(5, tradable)] * count


@pytest.mark.parametrize(("first", "tradable"), [(349, True), (350, False)])
def test_group_that_waited_until_the_next_close_is_not_tradable(first, tradable):
    """An incomplete group is due when its wait of ten seconds ends, whoever looks whenever."""
    steps = [at(60 * m + 1, bar("A", m), bar("B", m)) for m in range(1, 5)]
    messages = outgoing([*opening(), *steps, at(first, bar("A", 5)), at(361, bar("A", 6), bar("B", 6))])
    assert [t for m, t in said(messages, "groups") if m == 5] == [tradable]


def test_straggler_after_the_next_close_is_not_tradable():
    """A straggler is due when it comes."""
    steps = [at(60 * m + 1, bar("A", m), bar("B", m)) for m in range(1, 5)]
    for second, tradable in ((330, True), (361, False)):
        messages = outgoing([*opening(), *steps, at(301, bar("A", 5)), at(second, bar("B", 5))])
        assert said(messages, "groups")[-2:] == [(5, True), (5, tradable)]


@pytest.mark.parametrize("late", [0, 30 * SECOND])
@pytest.mark.parametrize("together", [1, 60])
def test_after_an_outage_only_the_newest_is_tradable(tmp_path, together, late):
    """Half an hour of bars at once: the older ones only warm, the last but one is told, the newest traded.

    What the daemon publishes is what a replay of its journal says, however late its timers wake.
    """
    world = World(late=late)
    missed = [Message.of(bar(s, m)) for m in range(11, 41) for s in "AB"]
    world.script.extend(
        [
            (START, lambda src: src.decide(revision(settings()))),
            (START, lambda src: src.decide(activation("spread"))),
            *((START + m * MINUTE + SECOND, [Message.of(bar(s, m)) for s in "AB"]) for m in range(1, 11)),
            *(
                (START + 40 * MINUTE + SECOND, missed[i : i + together])
                for i in range(0, len(missed), together)
            ),
            # B does not come: a timer releases it five seconds before the next close, and may wake later.
            (START + 41 * MINUTE + 45 * SECOND, [Message.of(bar("A", 41))]),
            (START + 43 * MINUTE + SECOND, [Message.of(bar(s, 43)) for s in "AB"]),
        ]
    )
    with closing(Instance(tmp_path / "journal.db", world, open_model)) as instance:
        play(instance.run())
        sent, replayed = path_of(outbox(instance.journal)), instance.replayed()
        stale = instance.pipeline.counts.stale
    assert replayed == sent
    assert stale == 2 * 28
    newest = [(39, False), (40, True), (41, True), (43, True)]
    assert said(sent, "groups") == [(m, True) for m in range(1, 11)] + newest
    expected = [(m, True) for m in range(3, 11) for _ in "AB"]
    expected += [(39, False)] * 2 + [(40, True)] * 2 + [(41, True)]
    assert said(sent, "signals") == expected
    assert said(sent, "targets") == expected


def test_each_symbol_has_its_own_next_bar():
    """At the end of the week the next bar of a currency closes on Sunday, that of a coin in an hour."""
    week = Calendar("fx", Timeframe.parse("1h"))
    friday = 1_731_708_000 * 10**9  # 2024-11-15T22:00Z, 17:00 in New York
    closes = [c for c in week.closes_after(friday - 12 * HOUR, 12) if c <= friday]
    assert closes[-1] == friday
    own = msgspec.structs.replace(
        settings(("EURUSD", "BTC")), timeframe="1h", calendar="24x7", calendars={"EURUSD": "fx"}
    )
    begin = [Revision(START, own.encode()), opening()[1]]

    def both(close, time):
        return Arrival(time, tuple(Bar(s, close, 100.0, 101.0, 99.0, 100.5, 1.0) for s in ("BTC", "EURUSD")))

    steps = [both(close, close + SECOND) for close in closes[:-1]] + [both(friday, friday + HOUR)]
    messages = outgoing([*begin, *steps])
    last = {m.topic: json.loads(m.payload)["tradable"] for m in messages[-5:]}
    assert last == {
        "t/signals/1h/BTC": False,
        "t/signals/1h/EURUSD": True,
        "t/targets/drift/1h/BTC": False,
        "t/targets/drift/1h/EURUSD": True,
        "t/groups/1h": False,
    }


def test_groups_name_the_one_before_them():
    """Each group but the first and the stragglers names the close of the group before it."""
    steps = [at(60 * m + 1, bar("A", m), bar("B", m)) for m in (1, 2, 4)]
    steps += [at(301, bar("A", 5)), at(312, bar("B", 5)), at(361, bar("A", 6), bar("B", 6))]
    groups = [json.loads(m.payload) for m in outgoing([*opening(), *steps]) if "/groups/" in m.topic]
    regular = [group for group in groups if not group["straggler"]]
    assert [g["previous"] for g in regular] == [None, *(g["close_time"] for g in regular[:-1])]
    assert [g["previous"] for g in groups if g["straggler"]] == [None]
