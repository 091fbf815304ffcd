"""Whether bars follow each other: what a search found is remembered, and changes nothing that is said."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barcast.daemon.continuity import Continuity
from barcast.daemon.ports import Arrival, Declaration, Revision, Warmup
from barcast.daemon.wire import to_ns
from barcast.models import Adjustment, Bar
from tests.fakes import MINUTE, START, Spread, bar, opening, outgoing, settings

MODEL = {"spread": Spread(window=12, min_window=6)}


@pytest.fixture
def searched(monkeypatch):
    """The closes of the windows that were searched."""
    closes, search = [], Continuity.faults

    def noted(self, window, *rest):
        closes.append(window.close_time)
        return search(self, window, *rest)

    monkeypatch.setattr(Continuity, "faults", noted)
    return closes


def forgetful(monkeypatch):
    """Let every window that no run of accepted bars covers be searched."""
    search = Continuity.faults

    def found(self, *about):
        told = search(self, *about)
        self._before.clear()
        return told

    monkeypatch.setattr(Continuity, "faults", found)


def minutes(first, last, **changes):
    """One arrival of A for each minute."""
    return [
        Arrival(START + m * MINUTE, (bar("A", m, **changes.get(f"m{m}", {})),)) for m in range(first, last)
    ]


def test_history_is_searched_once(searched):
    """Bars of the history count as followed from the first search on, until something disturbs them."""
    history = Warmup(START, "", tuple(bar("A", m) for m in range(1, 20)))
    steps = minutes(20, 30)
    outgoing([*opening(("A",), window=12), history, *steps], **MODEL)
    assert searched == [START + 20 * MINUTE]
    searched.clear()
    corrected = Arrival(START + 23 * MINUTE + 1, (bar("A", 22, volume=11.0),))
    outgoing([*opening(("A",), window=12), history, *steps[:4], corrected, *steps[4:]], **MODEL)
    assert searched == [START + 20 * MINUTE, START + 24 * MINUTE]


def test_hole_is_found_when_it_leaves_a_sound_window(searched):
    """A bar that is missing is told in each window that should have it, and those after are not searched."""
    messages = outgoing([*opening(("A",), window=12), *minutes(1, 12), *minutes(13, 30)], **MODEL)
    degraded = [m for m in messages if "/signals/" in m.topic and b"are missing" in m.payload]
    withheld = [m for m in messages if b"bars are missing" in m.payload and "/groups/" in m.topic]
    assert len(degraded) + len(withheld) == 5
    assert searched[-1] == START + 17 * MINUTE


STEPS = st.lists(
    st.one_of(
        st.just(("bar",)),
        st.just(("bar",)),
        st.just(("bar",)),
        st.just(("hole",)),
        st.tuples(st.just("jump"), st.sampled_from([60.0, 140.0])),
        st.tuples(st.just("older"), st.integers(1, 8)),
        st.tuples(st.just("adjust"), st.integers(-4, 4), st.sampled_from([0.5, 1.0, 1.7])),
        st.tuples(st.just("history"), st.integers(1, 9)),
        st.tuples(st.just("limit"), st.sampled_from([0.02, 0.3])),
    ),
    min_size=10,
    max_size=60,
)


def story(steps):
    """The events that the steps stand for."""
    now, events = 20, [*opening(("A",), window=12)]
    for n, (what, *more) in enumerate(steps):
        time = START + now * MINUTE + n
        if what in ("bar", "jump"):
            now += 1
            events.append(Arrival(START + now * MINUTE + n, (bar("A", now, *more),)))
        elif what == "hole":
            now += 1
        elif what == "older":
            events.append(Arrival(time, (bar("A", now - more[0], volume=20.0 + n),)))
        elif what == "adjust":
            events.append(
                Declaration(time, Adjustment("A", START + (now + more[0]) * MINUTE, more[1], "split"))
            )
        elif what == "history":
            events.append(Warmup(time, "", tuple(bar("A", now - k) for k in range(more[0], 0, -1)), "A"))
        else:
            events.append(
                Revision(time, msgspec.structs.replace(settings(("A",)), max_jump=more[0]).encode())
            )
    return events


@given(STEPS)
def test_memory_of_searches_changes_nothing(steps):
    """Whatever happens to a symbol's bars: what is said is what would be said if each window was searched."""
    told = outgoing(story(steps), **MODEL)
    with pytest.MonkeyPatch.context() as patch:
        forgetful(patch)
        assert outgoing(story(steps), **MODEL) == told


def test_closes_of_another_calendar_hide_no_hole(monkeypatch):
    """Bars of an older calendar make up for a hole as long as they are in the window, and no longer."""
    friday = to_ns(datetime(2024, 3, 1, 21, 55, tzinfo=UTC))
    monday = to_ns(datetime(2024, 3, 3, 22, 0, tzinfo=UTC))

    def at(time):
        return Arrival(time, (Bar("A", time, *bar("A", 0).values),))

    fx = msgspec.structs.replace(settings(("A",)), calendar="fx")
    weekend = [at(friday + m * MINUTE) for m in range(8)]  # two of them are after the close of the week
    after = [at(monday + m * MINUTE) for m in (1, 2, 3, 6, 7, 8, 9, 10, 11, 12)]  # and two are missing here
    events = [*opening(("A",), window=12), *weekend, Revision(friday + 8 * MINUTE, fx.encode()), *after]
    model = Spread(window=12, min_window=8)
    told = outgoing(events, spread=model)
    assert [m for m in told if b"missing" in m.payload]
    forgetful(monkeypatch)
    assert outgoing(events, spread=model) == told
