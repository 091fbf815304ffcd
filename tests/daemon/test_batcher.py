"""Groups: complete, late, older ones first, stragglers, expectations."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barcast.daemon.batcher import Batcher
from barcast.daemon.ports import Group
from barcast.models import Bar


def bar(symbol: str, close: int) -> Bar:
    return Bar(symbol, close, 1, 1, 1, 1, 0)


def always(symbols: Collection[str], _close: int) -> set[str]:
    """A market that never shuts."""
    return set(symbols)


def add(batcher: Batcher, symbol: str, close: int, now: int) -> list[Group]:
    """Decide lateness by the arrival's time, then add: what the loop does."""
    return [*batcher.due(now), *batcher.add(bar(symbol, close), now)]


def test_complete_group_is_due_at_once():
    """A group is due with the bar that completes the configured symbols, in order of the symbols."""
    batcher = Batcher(["B", "A"], 10, always)
    assert add(batcher, "B", 100, 101) == []
    assert add(batcher, "A", 100, 102) == [Group(100, 102, ("A", "B"))]
    assert batcher.deadline is None


def test_incomplete_group_is_due_after_the_wait():
    """A group that stays incomplete is due max_wait after its first arrival."""
    batcher = Batcher(["A", "B"], 10, always)
    add(batcher, "A", 100, 101)
    assert batcher.deadline == 111
    assert list(batcher.due(110)) == []
    assert list(batcher.due(111)) == [Group(100, 111, ("A",), ("B",))]


def test_arrival_after_the_wait_is_a_straggler():
    """A bar received after its group's deadline is a straggler even if no timer woke up before it."""
    batcher = Batcher(["A", "B"], 10, always)
    add(batcher, "A", 100, 101)
    assert add(batcher, "B", 100, 111) == [
        Group(100, 111, ("A",), ("B",)),
        Group(100, 111, ("B",), straggler=True),
    ]


def test_due_group_takes_older_ones_along():
    """Groups leave in order of their close, so that the retained signal of a symbol is its newest."""
    batcher = Batcher(["A", "B"], 10, always)
    add(batcher, "A", 100, 101)
    add(batcher, "A", 200, 102)
    assert add(batcher, "B", 200, 103) == [
        Group(100, 103, ("A",), ("B",)),
        Group(200, 103, ("A", "B"), previous=100),
    ]


def test_expected_symbols_follow_the_last_groups():
    """Without configured symbols a new one is waited for from the next group, a silent one for three more."""
    batcher = Batcher([], 10, always)
    add(batcher, "A", 100, 100)
    assert add(batcher, "A", 200, 200) == [
        Group(100, 110, ("A",)),
        Group(200, 200, ("A",), previous=100),
    ]
    assert add(batcher, "B", 200, 201) == [Group(200, 201, ("B",), straggler=True)]
    assert add(batcher, "A", 300, 300) == []
    assert add(batcher, "B", 300, 301) == [Group(300, 301, ("A", "B"), previous=200)]
    for close in (400, 500, 600):
        assert add(batcher, "A", close, close) == []
        assert list(batcher.due(close + 10)) == [
            Group(close, close + 10, ("A",), ("B",), previous=close - 100)
        ]
    assert add(batcher, "A", 700, 700) == [Group(700, 700, ("A",), previous=600)]


@given(
    st.lists(
        st.tuples(st.sampled_from("ABC"), st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=40
    ),
    st.integers(1, 20),
    st.booleans(),
    st.data(),
)
def test_timers_that_wake_late_or_never_change_nothing(arrivals, wait, configured, data):
    """Any extra wake-up between two arrivals gives the same groups as none at all."""
    symbols = "ABC" if configured else ""
    quiet, restless = Batcher(symbols, wait, always), Batcher(symbols, wait, always)
    now, one, other = 0, [], []
    for symbol, close, pause in arrivals:
        for _ in range(data.draw(st.integers(0, 2))):
            other += restless.due(now + data.draw(st.integers(0, pause)))
        now += pause
        one += add(quiet, symbol, close, now)
        other += add(restless, symbol, close, now)
    one += quiet.due(now + wait)
    other += restless.due(now + wait)
    assert one == other


@pytest.mark.parametrize("late", [0, 1, 50])
def test_lateness_decided_by_the_timer_would_differ(late):
    """The control: flushing by the time at which a timer happened to wake gives other groups."""

    def by_timer(wakes: int) -> list[Group]:
        batcher = Batcher(["A", "B"], 10, always)
        groups = [*batcher.add(bar("A", 100), 101)]
        if wakes <= 112:
            groups += batcher.due(wakes)
        groups += batcher.add(bar("B", 100), 112)
        return groups

    assert (by_timer(111 + late) == by_timer(111)) is (late < 2)
