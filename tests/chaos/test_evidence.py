"""Whoever judges a run finds each promise that was broken in it."""

import json
from collections.abc import Callable

import pytest

from barcast.daemon.journal import Kind, State
from tests.chaos.evidence import Evidence, Posted, Record
from tests.chaos.proxy import Told

BARS = "barcast/v1/bars/1m/A"
SIGNALS = "barcast/v1/signals/1m/A"
DEADLETTERS = "barcast/v1/deadletter/test"
BROKEN_BAR = (BARS, b"{")


def body(name: str, **more: object) -> bytes:
    """A message with an id."""
    return json.dumps({"id": name, **more}).encode()


def bar(minute: int) -> bytes:
    """A bar on the wire."""
    prices = dict.fromkeys(("open", "high", "low", "close", "volume"), 1.0)
    return json.dumps({"symbol": "A", "close_time": f"2024-01-01T00:{minute:02d}:00Z", **prices}).encode()


def signal(minute: int) -> tuple[str, bytes]:
    """A signal of a close."""
    return SIGNALS, body(f"s{minute}", close_time=f"2024-01-01T00:{minute:02d}:00Z")


def sound() -> Evidence:
    """Of three minutes in which all was kept: the second signal expired, a message was no bar."""
    fed = [(BARS, bar(minute)) for minute in (1, 2, 3)]
    signals = [signal(minute) for minute in (1, 2, 3)]
    letter = (DEADLETTERS, body("d", topic=BARS, payload="{"))
    evidence = Evidence(
        fed={message: 10.0 * n for n, message in enumerate([*fed, BROKEN_BAR])},
        taken=[Told(10.0 * n, *message) for n, message in enumerate([*fed, BROKEN_BAR])],
        delivered=[Told(1.0, *signals[0]), Told(21.0, *signals[2]), Told(31.0, *letter)],
        seen=[(1.0, *signals[0]), (2.0, *signals[0]), (21.0, *signals[2]), (31.0, *letter)],
        replayed=set(signals),
    )
    evidence.records = {n: Record(n, Kind.BARS, *message) for n, message in enumerate(fed, 1)}
    for n, (topic, payload) in enumerate([*signals, letter], 1):
        evidence.outbox[n] = Posted(json.loads(payload)["id"], topic, payload)
    evidence.states = dict.fromkeys(range(1, 5), State.DELIVERED) | {2: State.EXPIRED}
    evidence.faults["daemon killed"] = 1
    return evidence


def test_nothing_is_found_where_all_was_kept() -> None:
    """A broker that was killed may have forgotten a bar, which was sent again, and a signal."""
    evidence = sound()
    assert evidence.violations() == []
    evidence.broker_down.append(21.5)
    evidence.lost[BARS, bar(3)] = 20.0
    evidence.seen = [seen for seen in evidence.seen if seen[0] != 21.0]
    assert evidence.violations() == []


def without_record(evidence: Evidence) -> None:
    del evidence.records[2]


def without_letter(evidence: Evidence) -> None:
    del evidence.outbox[4], evidence.states[4]
    evidence.seen.pop()


def forgotten_by_the_broker(evidence: Evidence) -> None:
    evidence.lost[BARS, bar(3)] = 20.0
    evidence.broker_down.append(10.0)


def not_in_the_archive(evidence: Evidence) -> None:
    evidence.left = {("A", 60), ("A", 120)}
    evidence.archived = {("A", 60)}


def other_bytes(evidence: Evidence) -> None:
    topic, payload = signal(1)
    evidence.seen.append((5.0, topic, payload.replace(b'"s1"', b'"s1" ')))


def second_id(evidence: Evidence) -> None:
    evidence.outbox[5] = Posted("other", SIGNALS, body("other", close_time="2024-01-01T00:01:00Z"))
    evidence.states[5] = State.EXPIRED
    evidence.replayed.add((SIGNALS, evidence.outbox[5].payload))


def out_of_order(evidence: Evidence) -> None:
    evidence.seen.insert(0, evidence.seen[2])


def unseen(evidence: Evidence) -> None:
    evidence.seen = evidence.seen[2:]


def pending(evidence: Evidence) -> None:
    evidence.states[2] = State.PENDING


def stranger(evidence: Evidence) -> None:
    evidence.seen.append((9.0, SIGNALS, body("unknown")))


def not_replayed(evidence: Evidence) -> None:
    evidence.replayed.remove(signal(3))


def never_said(evidence: Evidence) -> None:
    evidence.replayed.add(signal(4))


def back_in_time(evidence: Evidence) -> None:
    evidence.records[3] = Record(1, Kind.BARS, BARS, bar(3))


def never_happened(evidence: Evidence) -> None:
    evidence.faults["disk full"] = 0


def noticed_on_the_way(evidence: Evidence) -> None:
    evidence.said.append("the daemon ended by itself")


def nothing_shown(evidence: Evidence) -> None:
    evidence.taken.clear()


@pytest.mark.parametrize(
    ("breaks", "named"),
    [
        (without_record, "acknowledged by the daemon, and neither"),
        (without_letter, "acknowledged by the daemon, and neither"),
        (forgotten_by_the_broker, "nobody harmed since"),
        (not_in_the_archive, "in no archive"),
        (other_bytes, "ids with different bytes"),
        (second_id, "closes with two messages"),
        (out_of_order, "out of order"),
        (unseen, "no subscriber saw it"),
        (pending, "neither delivered nor expired"),
        (stranger, "not in the outbox"),
        (not_replayed, "that no replay says"),
        (never_said, "never were in the outbox"),
        (back_in_time, "stamps of the journal go back"),
        (never_happened, "did not happen"),
        (noticed_on_the_way, "ended by itself"),
        (nothing_shown, "nothing is shown"),
    ],
)
def test_each_broken_promise_is_found(breaks: Callable[[Evidence], None], named: str) -> None:
    """One thing goes wrong, and a sentence says what."""
    evidence = sound()
    breaks(evidence)
    assert any(named in violation for violation in evidence.violations())
