"""The path: one stated rule for each kind of bar, no look-ahead, and what subscribers are told."""

import dataclasses
import json
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barcast.daemon.calendar import Calendar
from barcast.daemon.ports import Activation, Arrival, Revision
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import to_ns
from barcast.models import Bar
from tests.fakes import MINUTE, START, Spread, bar, opening, outgoing
from tests.fakes import settings as fake_settings

SECOND = 10**9


def arrivals(*pieces):
    """(seconds after the start, bars...) as events."""
    return [Arrival(START + int(second * SECOND), tuple(bars)) for second, *bars in pieces]


def both(minute, delay=1.0):
    """One arrival with the bars of A and B for a minute."""
    return (60 * minute + delay, bar("A", minute), bar("B", minute))


def said(messages, kind):
    """The bodies of one kind of message, by topic and in order."""
    return [(m.topic, json.loads(m.payload)) for m in messages if f"/{kind}/" in m.topic]


def test_complete_group_gives_signals_targets_and_an_end():
    """A due group is told as its signals, then its targets, then a message that says it is complete."""
    messages = outgoing([*opening(), *arrivals(*(both(m) for m in range(1, 5)))])
    last = [m.topic for m in messages[-5:]]
    assert last == [
        "t/signals/1m/A",
        "t/signals/1m/B",
        "t/targets/drift/1m/A",
        "t/targets/drift/1m/B",
        "t/groups/1m",
    ]
    body = json.loads(messages[-5].payload)
    assert body["close_time"] == "2023-11-14T22:18:00Z"
    assert [h["end_time"] for h in body["horizons"]] == ["2023-11-14T22:19:00Z", "2023-11-14T22:20:00Z"]
    assert body["group"] == {"close_time": "2023-11-14T22:18:00Z", "signals": 2, "last": "B"}
    assert body["valid_until"] == "2023-11-14T22:20:00Z"
    assert body["flags"] == ["warming"]
    assert len({m.id for m in messages}) == len(messages)


def test_too_few_bars_are_withheld_with_the_reason():
    """A symbol without enough bars is named in the group message instead of being forecast."""
    messages = outgoing([*opening(), *arrivals(both(1))])
    assert said(messages, "signals") == []
    [(_, group)] = said(messages, "groups")
    assert group["withheld"] == {"A": "1 of at least 3 bars", "B": "1 of at least 3 bars"}


def test_duplicate_is_dropped_also_after_a_correction():
    """A payload seen before changes nothing, even if another value came in between."""
    base = [both(1), both(2), both(3)]
    wrong = bar("A", 2, close=120.0)
    once = outgoing([*opening(), *arrivals(*base, (181.2, wrong), both(4))])
    again = outgoing(
        [*opening(), *arrivals(*base, (181.2, wrong), (181.3, bar("A", 2)), (181.4, wrong), both(4))]
    )
    assert once == again


def test_correction_counts_for_later_windows_only():
    """Other values for a known close change what comes later and nothing that was said."""
    base = [both(m) for m in range(1, 5)]
    plain = outgoing([*opening(), *arrivals(*base, both(5))])
    corrected = outgoing([*opening(), *arrivals(*base, (242, bar("A", 3, close=140.0)), both(5))])
    assert corrected[: len(plain) - 5] == plain[:-5]
    assert corrected[-5].payload != plain[-5].payload
    assert corrected[-4] != plain[-4] or corrected[-4].payload == plain[-4].payload


def test_older_bar_takes_its_place_without_a_signal():
    """A bar older than its symbol's newest enters later windows and triggers nothing."""
    late = bar("A", 2)
    pieces = [both(1), (121, bar("B", 2)), both(3), both(4)]
    without = outgoing([*opening(), *arrivals(*pieces, both(5))])
    with_it = outgoing([*opening(), *arrivals(*pieces, (242, late), both(5))])
    assert len(with_it) == len(without)
    assert with_it[-5].payload != without[-5].payload


def test_hole_inside_the_shortest_window_degrades_the_signal():
    """A bar missing among the last ones that a forecast needs is flagged as long as it is among them."""
    minutes = [m for m in range(1, 26) if m != 12]
    model = Spread(window=16, min_window=12)
    messages = outgoing(
        [*opening(("A",), window=16), *arrivals(*((60 * m + 1, bar("A", m)) for m in minutes))],
        spread=model,
    )
    signals = [json.loads(m.payload) for m in messages if "/signals/" in m.topic]
    degraded = [s["close_time"][14:16] for s in signals if "degraded" in s["flags"]]
    assert degraded == [f"{14 + m:02d}" for m in range(13, 24)]
    assert len(signals) == 13


def test_too_many_holes_withhold_the_forecast():
    """Past a limit of missing bars nothing is forecast, and the group says why."""
    messages = outgoing([*opening(("A",)), *arrivals(*((60 * m + 1, bar("A", m)) for m in (1, 3, 5)))])
    [*_, (_, group)] = said(messages, "groups")
    assert group["withheld"] == {"A": "2 of the last 3 bars are missing"}


def test_straggler_gets_a_signal_of_its_own_and_no_target():
    """The newest bar of a symbol whose group went without it is forecast alone, without a target."""
    base = [both(m) for m in range(1, 5)]
    messages = outgoing([*opening(), *arrivals(*base, (301, bar("A", 5)), (312, bar("B", 5)))])
    tail = messages[-2:]
    assert [m.topic for m in tail] == ["t/signals/1m/B", "t/groups/1m"]
    assert json.loads(tail[1].payload)["straggler"] is True


def test_stale_bar_only_warms_the_window():
    """A bar that comes after its signal would have expired is kept and not forecast."""
    base = [both(m) for m in range(1, 5)]
    messages = outgoing([*opening(), *arrivals(*base, both(5, delay=121))])
    assert messages == outgoing([*opening(), *arrivals(*base)])
    after = outgoing([*opening(), *arrivals(*base, both(5, delay=121), both(8))])
    [*_, (_, group)] = said(after, "groups")
    assert group["withheld"] == dict.fromkeys("AB", "2 of the last 3 bars are missing")


def test_activation_takes_over_between_two_groups():
    """Signals name the old model up to the activation and the new one after it."""
    base = [both(m) for m in range(1, 5)]
    swap = Activation(START + 242 * SECOND, "other", "numpy", 8)
    messages = outgoing(
        [*opening(), *arrivals(*base), swap, *arrivals(both(5), both(6))], other=Spread("other")
    )
    models = [json.loads(m.payload)["model"] for m in messages if "/signals/" in m.topic]
    assert models == ["spread"] * 4 + ["other"] * 4


def test_group_waiting_at_an_activation_is_forecast_by_the_new_model():
    """A group that is not due yet when a model takes over belongs to the new model, in every replay."""
    base = [both(m) for m in range(1, 5)]
    swap = Activation(START + 302 * SECOND, "other", "numpy", 8)
    messages = outgoing([*opening(), *arrivals(*base, (301, bar("A", 5))), swap], other=Spread("other"))
    assert json.loads(messages[-1].payload)["model"] == "other"


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 14), st.sampled_from([1.0, 1.5, 3.0]), st.sampled_from([0.0, 11.0]))
def test_poisoned_future_changes_no_byte_before_it(cut, factor, late):
    """Whatever comes after t, every message about t or before has the same bytes."""

    def play(poison):
        pieces = []
        for m in range(1, 18):
            wrong = poison and m > cut
            a, b = (bar(s, m, close=bar(s, m).close * factor * 1.1) if wrong else bar(s, m) for s in "AB")
            pieces += [(60 * m + 1, a), (60 * m + 1 + (late if m % 3 == 0 else 0.5), b)]
        return outgoing([*opening(), *arrivals(*pieces)])

    limit = f"{(START + cut * MINUTE) // 10**9}"

    def before(messages):
        return [m for m in messages if m.expires is not None and m.expires - 2 * MINUTE <= int(limit) * 10**9]

    clean, poisoned = play(False), play(True)
    assert before(clean) == before(poisoned)
    assert len(before(clean)) > 5
    assert clean != poisoned


def test_array_of_many_closes_gives_the_windows_of_each():
    """Bars of one array are taken in order, and each window ends at its own close."""
    together = outgoing([*opening(("A",)), *arrivals((240, *(bar("A", m) for m in range(2, 5))))])
    one_by_one = outgoing([*opening(("A",)), *arrivals(*((240, bar("A", m)) for m in range(2, 5)))])
    assert together == one_by_one
    assert len(said(together, "groups")) == 3


def test_path_needs_its_settings_first():
    """A journal that does not begin with a revision is a broken invariant, not an empty result."""
    with pytest.raises(RuntimeError, match="before the first revision"):
        outgoing([Activation(START, "spread", "numpy", 8), *arrivals(both(1))])


def test_price_that_cannot_be_is_withheld():
    """A model that gives a quantile beyond all reason, or none at all, is not published."""
    for beyond in (6.0, np.inf, np.nan):

        class Wild(Spread):
            def _one(self, window, beyond=beyond):
                made = super()._one(window)
                if window.symbol == "A":
                    quantiles = made.quantiles.copy()
                    quantiles[1, 2] = beyond
                    made = msgspec.structs.replace(made, quantiles=quantiles)
                return made

        messages = outgoing([*opening(), *arrivals(*(both(m) for m in range(1, 5)))], spread=Wild())
        assert {topic for topic, _ in said(messages, "signals")} == {"t/signals/1m/B"}
        assert said(messages, "groups")[-1][1]["withheld"] == {
            "A": "the model gave no forecast that can be a price"
        }


def test_falling_quantiles_are_a_fault():
    """Quantiles that fall along the levels are a broken model, which is named."""

    class Falling(Spread):
        def forecast(self, windows):
            return [
                msgspec.structs.replace(f, quantiles=f.quantiles[:, ::-1]) for f in super().forecast(windows)
            ]

    with pytest.raises(ValueError, match="quantiles of A fall along the levels"):
        outgoing([*opening(), *arrivals(*(both(m) for m in range(1, 5)))], spread=Falling())


def test_settings_in_force_decide_what_is_degraded():
    """With a narrower limit for jumps, a jump that was none before degrades the next signals."""
    model = Spread(window=12, min_window=6)
    bars = [bar("A", m, close=100.0 if m < 8 else 120.0) for m in range(1, 12)]
    steps = arrivals(*((60 * m + 1, b) for m, b in enumerate(bars, 1)))
    narrow = msgspec.structs.replace(fake_settings(("A",)), max_jump=0.1)
    told = [
        *opening(("A",), window=12),
        *steps[:9],
        Revision(START + 560 * SECOND, narrow.encode()),
        *steps[9:],
    ]
    reasons = [bool(body["reasons"]) for _, body in said(outgoing(told, spread=model), "signals")]
    assert reasons == [False] * 4 + [True, True]


def test_calendar_that_ends_withholds_and_does_not_raise():
    """Near the end of what a calendar knows bars are taken, and what cannot be dated is withheld by name."""
    calendar = Calendar("XSHG", Timeframe.parse("session"))
    last = calendar._closes.years.stop
    closes = calendar.closes_after(to_ns(datetime(last - 1, 11, 20, tzinfo=UTC)), 25)
    far = Spread()
    far.card = dataclasses.replace(far.card, horizons=(1, 60))
    shanghai = msgspec.structs.replace(fake_settings(("A",)), calendar="XSHG", timeframe="session")
    story = [Revision(closes[0], shanghai.encode()), Activation(closes[0], "spread", "numpy", 8)]
    for n, close in enumerate(closes):
        b = bar("A", n)
        assert calendar.is_close(close)
        story.append(Arrival(close, (Bar("A", close, *b.values),)))
    messages = outgoing(story, spread=far)
    assert said(messages, "signals") == []
    for _, group in said(messages, "groups")[3:]:
        assert "the calendar XSHG ends before the horizons" in group["withheld"]["A"]


def test_many_symbols_are_asked_about_some_at_once():
    """A large group is forecast in parts, all of it and in order, so that it can be seen to move on."""
    asked = []

    class Asked(Spread):
        def forecast(self, windows):
            asked.append(len(windows))
            return super().forecast(windows)

    symbols = [f"S{i:02d}" for i in range(40)]
    minutes = [Arrival(START + m * MINUTE, tuple(bar(s, m) for s in symbols)) for m in range(1, 5)]
    messages = outgoing([*opening(symbols), *minutes], spread=Asked())
    assert asked[-3:] == [16, 16, 8]
    assert [topic.rsplit("/", 1)[1] for topic, _ in said(messages, "signals")][-40:] == symbols
