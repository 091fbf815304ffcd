"""Messages: what is accepted, what is refused and why, what goes out."""

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.timeframe import Timeframe
from barcast.models import Bar

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


BAD = {
    "negative price": (GOOD | {"low": -1.0}, "prices must be"),
    "zero price": (GOOD | {"open": 0.0, "low": 0.0}, "prices must be"),
    "high below low": (GOOD | {"high": 0.4}, "prices must be"),
    "close above high": (GOOD | {"close": 2.5}, "prices must be"),
    "price beyond any market": (GOOD | {"high": 1e308}, "prices must be"),
    "close off the grid": (GOOD | {"close_time": "2026-03-01T11:58:59.999Z"}, "no 1m bar"),
    "nested in an unknown field": (b'{"x":' + b"[" * 20000 + b"]" * 20000 + b"}", "recursion"),
    "negative volume": (GOOD | {"volume": -1.0}, "not negative"),
    "naive time": (GOOD | {"close_time": "2026-03-01T11:59:00"}, "timezone"),
    "future time": (GOOD | {"close_time": "2026-03-03T11:59:00Z"}, "after its arrival"),
    "time before 1970": (GOOD | {"close_time": "1969-03-03T11:59:00Z"}, "1970"),
    "text for a number": (GOOD | {"open": "1.0"}, "Expected `float`"),
    "missing field": ({k: v for k, v in GOOD.items() if k != "high"}, "missing required field `high`"),
    "symbol disagrees": (GOOD | {"symbol": "ETHUSD"}, "disagrees"),
    "no object": (7, "Expected `object`"),
    "half a JSON": (b'{"close_time": "2026-03-01T11', "truncated"),
    "empty": (b"", "empty"),
    "not UTF-8": (b'{"symbol": "\xff\xfe"}', "utf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bar_is_refused_with_a_reason(case):
    """What cannot be used is given back with a reason, and no bar."""
    payload, reason = BAD[case]
    bars, [reject] = decode(payload)
    assert bars == []
    assert reason.lower() in reject.reason.lower()


def test_time_that_the_exchange_does_not_know():
    """A bar from before an exchange's first known session is refused, and does not stop the path later."""
    mumbai = Calendars("XBOM", Timeframe.parse("session"))
    old = json.dumps(GOOD | {"close_time": "1980-03-03T10:00:00Z"}).encode()
    bars, [reject] = wire.decode("r/bars/session/RELIANCE", old, NOW, "r", mumbai)
    assert bars == []
    assert "XBOM" in reject.reason


def test_topic_faults():
    """Another timeframe, a lower-case symbol and a foreign topic are refused by name."""
    for topic, reason in (
        ("r/bars/5m/BTCUSD", "timeframe '5m'"),
        ("r/bars/1m/btc", "symbol 'btc'"),
        ("x/bars/1m/BTCUSD", "topic"),
        ("r/bars/1m/A/B", "topic"),
        ("r/bars/1m", "symbol is missing"),
    ):
        bars, [reject] = decode(GOOD, topic)
        assert bars == []
        assert reason in reject.reason


def test_good_bars_of_a_bad_array_are_kept():
    """One bar that cannot be used does not cost the others, in JSON and in msgpack."""
    for bad in (GOOD | {"low": 9.0}, GOOD | {"open": None}, {"x": 1}):
        array = [GOOD, bad, GOOD | {"close_time": "2026-03-01T11:58:00Z"}]
        for payload in (json.dumps(array).encode(), msgspec.msgpack.encode(array)):
            bars, rejects = decode(payload)
            assert (len(bars), len(rejects)) == (2, 1)


def test_nan_in_msgpack_is_refused():
    """JSON cannot hold NaN, msgpack can."""
    for field in ("open", "high", "low", "close", "volume"):
        bars, [reject] = decode(msgspec.msgpack.encode(GOOD | {field: math.nan}))
        assert bars == []
        assert "nan" in reject.reason
        assert wire.dead_letter([reject], "t", NOW, "d").payload


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
