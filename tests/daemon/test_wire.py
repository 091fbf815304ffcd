"""Messages: what is accepted, and what goes out."""

import json

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.ports import Arrival
from barcast.daemon.timeframe import Timeframe
from barcast.models import Bar, Coverage
from tests.fakes import Spread, bar, opening, outgoing

NOW = wire.to_ns(msgspec.json.decode(b'"2026-03-01T12:00:00Z"', type=__import__("datetime").datetime))
MINUTES = Calendars("24x7", Timeframe.parse("1m"))
GOOD = {
    "close_time": "2026-03-01T11:59:00Z",
    "open": 1.0,
    "high": 2.0,
    "low": 0.5,
    "close": 1.5,
    "volume": 3.0,
}


def decode(payload, topic="r/bars/1m/BTCUSD"):
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return wire.decode(topic, raw, NOW, "r", MINUTES)


def test_one_bar_takes_its_symbol_from_the_topic():
    """A bar without a symbol belongs to the topic's."""
    bars, rejects = decode(GOOD)
    assert bars == [Bar("BTCUSD", NOW - 60 * 10**9, 1.0, 2.0, 0.5, 1.5, 3.0)]
    assert rejects == []


def test_array_of_many_symbols():
    """The topic without a symbol takes an array in which each bar names its own."""
    bars, rejects = decode([GOOD | {"symbol": s} for s in ("A", "B")], "r/bars/1m")
    assert [b.symbol for b in bars] == ["A", "B"]
    assert rejects == []


def test_msgpack_says_the_same_as_json():
    """The two encodings are told apart by their first byte."""
    for message in (GOOD, [GOOD, GOOD | {"close_time": "2026-03-01T11:58:00Z"}]):
        assert decode(msgspec.msgpack.encode(message)) == decode(message)
        assert len(decode(message)[0]) >= 1


def test_zone_is_respected():
    """A time with an offset is the moment that it names."""
    bars, _ = decode(GOOD | {"close_time": "2026-03-01T13:59:00+02:00"})
    assert bars[0].close_time == NOW - 60 * 10**9


@given(
    st.binary(max_size=200), st.sampled_from(["r/bars/1m/BTCUSD", "r/bars/1m", "r/bars/1m/\x00", "r/bars"])
)
def test_no_payload_raises(payload, topic):
    """Any bytes at all end as bars or as dead letters that can be published."""
    bars, rejects = wire.decode(topic, payload, NOW, "r", MINUTES)
    assert bars or rejects or payload.strip() in (b"[]", b"\x90")
    if rejects:
        json.loads(wire.dead_letter(rejects, topic, NOW, "d").payload)


prices = st.floats(1e-6, 1e12, allow_nan=False)


@given(prices, prices, st.floats(0, 1e14), st.integers(10**9 // 60, NOW // (60 * 10**9)))
def test_bars_survive_the_wire(a, b, volume, minute):
    """What is encoded is decoded to the same bar."""
    low, high = sorted((a, b))
    bar = Bar("X.Y-1", minute * 60 * 10**9, a, high, low, b, volume, 3, 1.5)
    assert wire.decode("r/bars/1m", wire.encode_bars([bar, bar]), NOW, "r", MINUTES) == ([bar, bar], [])
    assert wire.decode("r/bars/1m", wire.encode_bars([bar]), NOW, "r", MINUTES) == ([bar], [])


def test_times_are_written_and_read_back():
    """RFC 3339 in UTC with as many decimals as are needed."""
    assert wire.to_text(NOW) == "2026-03-01T12:00:00Z"
    assert wire.to_text(NOW + 1_500_000) == "2026-03-01T12:00:00.0015Z"


def test_coverage_is_published_where_it_is_known():
    """A calibrated model's signals carry it; those of others have no such field, and differ in nothing."""

    class Judged(Spread):
        def _one(self, w):
            share = np.array([[2 / 3, 0.5]])
            return msgspec.structs.replace(super()._one(w), coverage=Coverage((0.9,), share, (3, 2)))

    events = [*opening(), *(Arrival(b.close_time, (b,)) for b in map(bar, "AAAA", range(1, 5)))]
    plain, judged = (
        [json.loads(m.payload) for m in outgoing(events, spread=model) if "/signals/" in m.topic]
        for model in (Spread(), Judged())
    )
    assert [m.pop("coverage") for m in judged] == [
        {"share": {"0.9": [0.666666667, 0.5]}, "outcomes": [3, 2]} for _ in plain
    ]
    assert {m.pop("id") for m in judged}.isdisjoint({m.pop("id") for m in plain})
    assert judged == plain != []
    assert msgspec.convert(plain[0] | {"id": ""}, wire.Signal).coverage is None
