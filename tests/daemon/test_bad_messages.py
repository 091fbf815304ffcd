"""Bad messages, each refused with a reason and a remedy, while the loop goes on."""

import asyncio
import json
import math
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import pytest

from barcast.daemon.calendar import Calendars
from barcast.daemon.events import events
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Decision, Scribe
from barcast.daemon.pipeline import Settings
from barcast.daemon.ports import Arrival, Declaration, EndOfSource, Revision
from barcast.daemon.timeframe import Timeframe
from tests.fakes import START, bar
from tests.rim import Message, World, outbox, source

A, MANY, SPLITS = "t/bars/1m/A", "t/bars/1m", "t/adjustments/A"
HOURS = {"EURUSD": "fx", "IBM": "XNYS", "INFY": "XBOM"}
CALENDARS = Calendars("24x7", Timeframe.parse("1m"), HOURS)
GOOD = {
    "close_time": "2023-11-14T22:14:00Z",
    "open": 10.0,
    "high": 12.0,
    "low": 9.0,
    "close": 11.0,
    "volume": 5.0,
}
SPLIT = {"time": "2023-11-14T22:00:00Z", "factor": 0.5, "kind": "split"}
REMEDIES = ("send ", "correct ", "name ", "spell ", "publish ")
"""What a remedy begins with: it tells the sender what to do."""

pack = msgspec.msgpack.encode


def text(plain: object) -> bytes:
    """As JSON; also NaN, which JSON does not know, and integers of any length."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(plain).encode()
    finally:
        sys.set_int_max_str_digits(4300)


def one(**changes: object) -> bytes:
    """A good bar but for these fields."""
    return text(GOOD | changes)


def packed(**changes: object) -> bytes:
    """The same as msgpack, which can hold NaN."""
    return pack(GOOD | changes)


def without(field: str, whole: dict[str, object] = GOOD) -> bytes:
    """A good message but for a field that is not there."""
    return text({name: value for name, value in whole.items() if name != field})


@dataclass(frozen=True)
class Bad:
    """A message: its payload, a piece of the reason, its topic, good bars in it, and how many are not."""

    payload: bytes
    reason: str
    topic: str = A
    kept: int = 0
    count: int = 1


PRICES = {
    f"{field} {value}": Bad(packed(**{field: value}), f"{field} {value} is no price")
    for field in ("open", "high", "low", "close")
    for value in (math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e308, 5e-324)
} | {
    "NaN in JSON": Bad(one(open=math.nan), "malformed"),
    "infinity in JSON": Bad(one(high=math.inf), "malformed"),
    "price of 1e400": Bad(one().replace(b"12.0", b"1e400"), "out of range - at `$.high`"),
    "price of 400 digits": Bad(one(high=10**400), "out of range - at `$.high`"),
    "price of 5,000 digits": Bad(one(high=10**5000), "out of range - at `$.high`"),
    "high below low": Bad(one(high=8.0), "low 9.0 is above high 8.0"),
    "open above high": Bad(one(open=12.5), "open 12.5 is not between low 9.0 and high 12.0"),
    "open below low": Bad(one(open=8.5), "open 8.5 is not between"),
    "close above high": Bad(one(close=12.5), "close 12.5 is not between"),
    "close below low": Bad(one(close=8.5), "close 8.5 is not between"),
    "price as text": Bad(one(open="10.0"), "Expected `float`, got `str` - at `$.open`"),
    "price true": Bad(one(high=True), "got `bool` - at `$.high`"),
    "price null": Bad(one(low=None), "got `null` - at `$.low`"),
    "array for a price": Bad(one(close=[11.0]), "got `array` - at `$.close`"),
    "object for a price": Bad(one(close={"USD": 11.0}), "got `object` - at `$.close`"),
    "the last of two opens is bad": Bad(one()[:-1] + b', "open": -1}', "open -1.0 is no price"),
}

COUNTS = {
    "negative volume": Bad(one(volume=-1), "volume -1.0 is not from 0"),
    "NaN volume": Bad(packed(volume=math.nan), "volume nan is not from 0"),
    "infinite volume": Bad(packed(volume=math.inf), "volume inf is not from 0"),
    "volume beyond any market": Bad(one(volume=1e300), "volume 1e+300 is not from 0 to below 1e+15"),
    "volume at the limit": Bad(one(volume=10**15), "volume 1000000000000000.0 is not from 0 to below 1e+15"),
    "volume of 1e400": Bad(one().replace(b"5.0", b"1e400"), "out of range - at `$.volume`"),
    "volume null": Bad(one(volume=None), "got `null` - at `$.volume`"),
    "negative trades": Bad(one(trades=-1), "trades -1 is not from 0"),
    "half a trade": Bad(one(trades=1.5), "Expected `int | null`, got `float` - at `$.trades`"),
    "trades as text": Bad(one(trades="5"), "got `str` - at `$.trades`"),
    "trades true": Bad(one(trades=True), "got `bool` - at `$.trades`"),
    "trades at the limit": Bad(one(trades=10**15), "trades 10^15 or more is not from 0 to below 1e+15"),
    "trades of 400 digits": Bad(one(trades=10**400), "trades 10^15 or more is not from 0 to below"),
    "trades of 400 digits, negative": Bad(one(trades=-(10**400)), "trades -10^15 or more is not from 0"),
    "trades of 5,000 digits": Bad(one(trades=10**5000), "out of range - at `$.trades`"),
    "negative vwap": Bad(one(vwap=-1), "vwap -1.0 is not between"),
    "zero vwap": Bad(one(vwap=0), "vwap 0.0 is not between"),
    "NaN vwap": Bad(packed(vwap=math.nan), "vwap nan is not between"),
    "infinite vwap": Bad(packed(vwap=math.inf), "vwap inf is not between"),
}

TIMES = {
    "time without a zone": Bad(one(close_time="2023-11-14T22:14:00"), "with a timezone component"),
    "impossible date": Bad(one(close_time="2023-02-30T22:14:00Z"), "Invalid RFC3339"),
    "hour 24": Bad(one(close_time="2023-11-14T24:00:00Z"), "Invalid RFC3339"),
    "leap second": Bad(one(close_time="2023-11-14T22:13:60Z"), "Invalid RFC3339"),
    "date alone": Bad(one(close_time="2023-11-14"), "Invalid RFC3339"),
    "words for a time": Bad(one(close_time="yesterday"), "Invalid RFC3339"),
    "empty time": Bad(one(close_time=""), "Invalid RFC3339"),
    "time null": Bad(one(close_time=None), "Expected `datetime`, got `null`"),
    "seconds since 1970": Bad(one(close_time=1700000040), "Expected `datetime`, got `int`"),
    "seconds since 1970 as text": Bad(one(close_time="1700000040"), "Invalid RFC3339"),
    "milliseconds in msgpack": Bad(packed(close_time=1700000040000), "Expected `datetime`, got `int`"),
    "1970 itself": Bad(one(close_time="1970-01-01T00:00:00Z"), "is not after 1970"),
    "before 1970": Bad(one(close_time="1969-12-31T23:59:00Z"), "is not after 1970"),
    "year 1": Bad(one(close_time="0001-01-01T00:00:00+23:59"), "is not after 1970"),
    "two bars ahead": Bad(one(close_time="2023-11-14T22:16:00Z"), "is after 2023-11-14T22:15:00Z"),
    "a day ahead": Bad(one(close_time="2023-11-15T22:14:00Z"), "that an arrival at 2023-11-14T22:14:00Z"),
    "wrong zone": Bad(one(close_time="2023-11-14T22:14:00-05:00"), "that an arrival at 2023-11-14T22:14:00Z"),
    "year 9999": Bad(one(close_time="9999-12-31T23:59:00-23:59"), "that an arrival at"),
    "half a minute": Bad(one(close_time="2023-11-14T22:13:30Z"), "when no 1m bar of the calendar 24x7"),
    "a millisecond off": Bad(one(close_time="2023-11-14T22:13:59.999Z"), "when no 1m bar"),
    "Saturday in the fx market": Bad(
        one(close_time="2023-11-11T12:00:00Z"), "no 1m bar of the calendar fx closes", "t/bars/1m/EURUSD"
    ),
    "night in New York": Bad(
        one(close_time="2023-11-14T08:00:00Z"), "no 1m bar of the calendar XNYS closes", "t/bars/1m/IBM"
    ),
    "before the exchange's first session": Bad(
        one(close_time="1980-03-03T10:00:00Z"), "outside the years that the calendar XBOM", "t/bars/1m/INFY"
    ),
}

NAMES = {
    f"symbol {name!a:.20}": Bad(one(), "is not of the form", f"t/bars/1m/{name}")
    for name in (
        "btc",
        "+",
        "#",
        "A+",
        "A#",
        "A\0",
        "A B",
        "A\n",
        "Ä",
        "$SYS",
        "-A",
        "",
        "A" * 33,
        "a" * 5000,
    )
} | {
    "other timeframe": Bad(one(), "timeframe '5m' is not the '1m' of this instance", "t/bars/5m/A"),
    "timeframe in other case": Bad(one(), "timeframe '1M' is not the '1m'", "t/bars/1M/A"),
    "no timeframe": Bad(one(), "timeframe '' is not the '1m'", "t/bars//A"),
    "long timeframe": Bad(one(), "mmm...' is not the '1m'", f"t/bars/{'m' * 5000}/A"),
    "topic too deep": Bad(one(), "is not t/bars/TIMEFRAME/SYMBOL", "t/bars/1m/A/B"),
    "topic ends in a slash": Bad(one(), "is not t/bars/TIMEFRAME/SYMBOL", "t/bars/1m/A/"),
    "topic not deep enough": Bad(one(), "is not t/bars/TIMEFRAME/SYMBOL", "t/bars"),
    "topic of another root": Bad(one(), "is not t/bars/TIMEFRAME/SYMBOL", "x/bars/1m/A"),
    "topic of a signal": Bad(one(), "is not t/bars/TIMEFRAME/SYMBOL", "t/signals/1m/A"),
    "long foreign topic": Bad(one(), "is not t/bars/TIMEFRAME/SYMBOL", "x/" * 5000),
    "symbol other than the topic's": Bad(one(symbol="B"), "symbol 'B' disagrees with the topic's 'A'"),
    "long symbol other than the topic's": Bad(one(symbol="b" * 5000), "disagrees with the topic's 'A'"),
    "one bar without a symbol": Bad(one(), "symbol is missing", MANY),
    "array without a symbol": Bad(text([GOOD]), "symbol is missing", MANY),
    "empty symbol": Bad(text([GOOD | {"symbol": ""}]), "symbol is missing", MANY),
    "symbol null": Bad(text([GOOD | {"symbol": None}]), "symbol is missing", MANY),
    "symbol as a number": Bad(text([GOOD | {"symbol": 5}]), "Expected `str | null`, got `int`", MANY),
    "lower-case symbol in an array": Bad(text([GOOD | {"symbol": "btc"}]), "symbol 'btc' is not of", MANY),
    "long symbol in an array": Bad(text([GOOD | {"symbol": "a" * 5000}]), "aaa...' is not of the form", MANY),
    "half a surrogate in a symbol": Bad(b'[{"symbol": "\\ud800"}]', "truncated", MANY),
}

FORMS = {
    **{f"without {field}": Bad(without(field), f"missing required field `{field}`") for field in GOOD},
    **{f"cut after {n} bytes": Bad(one()[:n], "truncated") for n in (1, 2, 16, 40, 60, len(one()) - 1)},
    "empty": Bad(b"", "the payload is empty"),
    "only blanks": Bad(b" \r\n\t ", "truncated"),
    "garbage behind": Bad(one() + b"x", "trailing characters"),
    "NUL behind": Bad(one() + b"\0", "trailing characters"),
    "two bars in a row": Bad(one() * 2, "trailing characters"),
    "bracket behind an array": Bad(text([GOOD]) + b"]", "trailing characters"),
    "number": Bad(b"7", "Expected `object`, got `int`"),
    "text": Bad(b'"A"', "Expected `object`, got `str`"),
    "null": Bad(b"null", "Expected `object`, got `null`"),
    "true": Bad(b"true", "Expected `object`, got `bool`"),
    "empty object": Bad(b"{}", "missing required field `close_time`"),
    "fields in other case": Bad(one().replace(b"close_time", b"Close_Time"), "missing required field"),
    "CSV": Bad(b"2023-11-14T22:14:00Z,10,12,9,11,5", "Expected `object`, got `int`"),
    "CSV that begins with a name": Bad(b"A,10,12,9,11,5", "invalid character"),
    "XML": Bad(b"<bar/>", "invalid character"),
    "Python": Bad(repr(GOOD).encode(), "malformed"),
    "comma too many": Bad(one()[:-1] + b",}", "malformed"),
    "brackets without an end": Bad(b"[" * 100_000, "Expected `object`, got `array`"),
    "objects without an end": Bad(b'{"x":' * 100_000, "nested too deep"),
    "nested in an unknown field": Bad(
        one()[:-1] + b', "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deep"
    ),
    "nested in an array": Bad(b"[[" + b'{"x":' * 50_000, "Expected `object`, got `array`"),
    "not UTF-8": Bad(b'{"symbol": "\xff\xfe"}', "utf-8"),
    "byte order mark": Bad(b"\xef\xbb\xbf" + one(), "taken for msgpack by its first byte"),
    "UTF-16": Bad(one().decode().encode("utf-16"), "taken for msgpack by its first byte"),
    "gzip": Bad(b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "invalid character"),
    "a million blanks before it": Bad(b" " * 2_000_000 + one(), "more than 1000000"),
    "2 MB": Bad(one(x="y" * 2_000_000), "the payload has 2000117 bytes, more than 1000000"),
    "half a million numbers": Bad(
        b"[" + b"7," * 499_998 + b"7]", "got `int` - at `$[0]`, in an array of 499999", MANY
    ),
}

PACKED = {
    "packed, cut": Bad(packed()[:-3], "truncated"),
    "packed array, cut": Bad(pack([GOOD, GOOD])[:-3], "truncated"),
    "packed, garbage behind": Bad(packed() + b"\0", "trailing characters"),
    "packed text": Bad(pack("A"), "Expected `object`, got `str`"),
    "packed number": Bad(pack(300), "Expected `object`, got `int`"),
    "packed small number": Bad(pack(5), "invalid character"),
    "packed null": Bad(pack(None), "Expected `object`, got `None`"),
    "packed price as text": Bad(packed(open="10"), "Expected `float`, got `str`"),
    "packed price as bytes": Bad(packed(open=b"10"), "Expected `float`, got `bytes`"),
    "packed price null": Bad(packed(open=None), "Expected `float`, got `None`"),
    "packed symbol as bytes": Bad(packed(symbol=b"A"), "Expected `str | null`, got `bytes`"),
    "packed symbol not UTF-8": Bad(packed(symbol="??").replace(b"??", b"\xed\xa0"), "utf-8"),
    "extension": Bad(pack(msgspec.msgpack.Ext(5, b"abc")), "Expected `object`, got `ext`"),
    "extension for a price": Bad(packed(low=msgspec.msgpack.Ext(5, b"abc")), "got `ext` - at `$.low`"),
    "timestamp out of range": Bad(
        packed().replace(pack(GOOD["close_time"]), b"\xc7\x0c\xff" + b"\0" * 4 + b"\x7f" + b"\xff" * 7),
        "Timestamp is out of range",
    ),
    "timestamp of too many nanoseconds": Bad(
        packed().replace(pack(GOOD["close_time"]), b"\xd7\xff" + b"\xff" * 8), "nanoseconds out of range"
    ),
    "numbers for the names of fields": Bad(pack({1: 2}), "Expected `str`, got `int`"),
    "reserved byte": Bad(b"\xc1", "malformed"),
    "array said to be of four billion": Bad(b"\xdd\xff\xff\xff\xff", "truncated"),
    "object said to be of four billion": Bad(b"\xdf\xff\xff\xff\xff", "truncated"),
    "text said to be of four billion": Bad(b"\xdb\xff\xff\xff\xff", "truncated"),
    "packed, nested": Bad(b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0", "nested too deep"),
}

THREE = [GOOD | {"symbol": symbol} for symbol in ("X", "Y", "Z")]
FAULTS = {
    "high below low": (GOOD | {"symbol": "B", "high": 1.0}, "low 9.0 is above high 1.0"),
    "without a price": ({"symbol": "B"}, "missing required field"),
    "no object": (7, "Expected `object`, got `int`"),
    "lower case": (GOOD | {"symbol": "b"}, "symbol 'b' is not of the form"),
}
ARRAYS = {
    f"{where} of {form}: {fault}": Bad(
        encode([*THREE[:place], piece, *THREE[place:]]), reason, MANY, kept=len(THREE)
    )
    for fault, (piece, reason) in FAULTS.items()
    for where, place in (("first", 0), ("middle", 1), ("last", 3))
    for form, encode in (("an array", text), ("a packed array", pack))
} | {
    "array of arrays": Bad(text([[GOOD]]), "Expected `object`, got `array`"),
    "array of empty arrays": Bad(text([[], []]), "Expected `object`, got `array`", count=2),
    "all of an array": Bad(text([GOOD | {"low": 99.0}] * 3), "low 99.0 is above high 12.0", count=3),
    "all of a packed array": Bad(pack([{}, 7, None]), "missing required field", count=3),
    "every second": Bad(text([*THREE[:1], {}, *THREE[1:2], 7]), "missing required", MANY, kept=2, count=2),
    "another's bar in an array of one symbol": Bad(text([GOOD, *THREE]), "disagrees", kept=1, count=3),
    "array that is cut": Bad(text(THREE)[:-9], "truncated", MANY),
}


def split(reason: str, **changes: object) -> Bad:
    """A good adjustment but for these fields."""
    return Bad(text(SPLIT | changes), reason, SPLITS)


ADJUSTMENTS = {
    **{
        f"adjustment without {field}": Bad(without(field, SPLIT), f"missing required field `{field}`", SPLITS)
        for field in SPLIT
    },
    **{
        f"factor {factor}": Bad(pack(SPLIT | {"factor": factor}), f"factor {factor} is not from", SPLITS)
        for factor in (math.nan, math.inf, -2.0, 0.0, -0.0, 1e-7, 1e7)
    },
    "empty adjustment": Bad(b"", "the payload is empty", SPLITS),
    "half an adjustment": Bad(text(SPLIT)[:20], "truncated", SPLITS),
    "array of adjustments": Bad(text([SPLIT]), "Expected `object`, got `array`", SPLITS),
    "bar as an adjustment": Bad(one(), "missing required field `time`", SPLITS),
    "factor as text": split("Expected `float`, got `str`", factor="0.5"),
    "factor of 400 digits": split("out of range", factor=10**400),
    "unknown kind": split("Invalid enum value 'merger'", kind="merger"),
    "long unknown kind": split("Invalid enum value 'mmm", kind="m" * 5000),
    "kind null": split("got `null` - at `$.kind`", kind=None),
    "adjustment without a zone": split("timezone component", time="2023-11-14T22:00:00"),
    "adjustment at seconds since 1970": split("Expected `datetime`, got `int`", time=1700000000),
    "adjustment before 1970": split("is not between 1970 and 2262", time="1969-11-14T22:00:00Z"),
    "adjustment in the year 9999": split("is not between 1970 and 2262", time="9999-12-31T23:59:59Z"),
    "adjustment with an empty symbol": split("symbol '' disagrees with the topic's 'A'", symbol=""),
    "adjustment of another symbol": split("symbol 'B' disagrees", symbol="B"),
    "nested adjustment": Bad(b'{"x":' + b"[" * 50_000, "nested too deep", SPLITS),
    "packed adjustment, cut": Bad(pack(SPLIT)[:-3], "taken for msgpack by its first byte", SPLITS),
    "adjustment too long": split("more than 1000000", x="y" * 1_000_000),
    **{
        f"adjustment on {topic!a:.40}": Bad(text(SPLIT), "is not of the form", topic)
        for topic in (f"t/adjustments/{name}" for name in ("", "btc", "A/B", "A\0", "a" * 5000))
    },
    "adjustment without a segment": Bad(text(SPLIT), "is not t/bars/TIMEFRAME", "t/adjustments"),
}

TABLES = {
    "price": PRICES,
    "count": COUNTS,
    "time": TIMES,
    "name": NAMES,
    "form": FORMS,
    "msgpack": PACKED,
    "array": ARRAYS,
    "adjustment": ADJUSTMENTS,
}
CASES = {f"{kind}: {name}": bad for kind, table in TABLES.items() for name, bad in table.items()}


class Told:
    """What became of some messages: the events, the dead letters, the acknowledged, the journal's events."""

    def __init__(self, folder, *messages):
        journal = Journal(folder / "journal.db")
        journal._db.execute("PRAGMA synchronous = OFF")  # the disk is not what is tested
        scribe, world = Scribe(journal), World()
        settings = Settings(
            root="t",
            timeframe="1m",
            calendar="24x7",
            calendars=HOURS,
            symbols=(),
            max_wait=1,
            sampler=None,
            steps=None,
            strategies=(),
        ).encode()
        self.events = []

        async def take():
            src = source(world, scribe, calendars=CALENDARS)
            src.decide(Decision(Kind.REVISION, settings, lambda time: Revision(time, settings)))
            await src.next(None)
            world.deliver(*messages)
            while True:
                try:
                    self.events.append(await src.next(None))
                except EndOfSource:
                    return

        asyncio.run(take())
        self.acked = world.acked
        self.letters = outbox(journal)
        self.records = [r for r in journal.records() if r.kind != Kind.REVISION]
        self.journaled = [event for _, event in events(journal.records())][1:]
        scribe.close()


def shows(shown: str, payload: bytes) -> bool:
    """Whether a text is a payload or a piece of it, as it was sent or as it was read, cut."""
    sent = payload.decode("utf-8", "backslashreplace")
    return len(shown) <= 1000 and (shown in (sent[:1000], "") or shown in sent or '"close_time":"' in shown)


@pytest.mark.parametrize("case", CASES)
def test_bad_message_is_a_dead_letter_and_the_loop_goes_on(tmp_path, case):
    """It is acknowledged and told of once with a reason and a remedy; only its good bars are journalled."""
    bad, good = CASES[case], Message.of(bar("OK", 0))
    told = Told(tmp_path, Message(bad.topic, bad.payload), good)

    assert told.acked == [1, 2]
    [letter] = told.letters
    body = json.loads(letter.payload)
    assert letter.topic == "t/deadletter/me"
    assert bad.reason in body["reason"]
    assert body["reason"].rpartition("; ")[2].startswith(REMEDIES)
    assert body["topic"] == bad.topic[:1000]
    assert body["count"] == bad.count
    assert shows(body["payload"], bad.payload)

    *kept, last = told.events
    assert [b.symbol for b in last.bars] == ["OK"]
    assert sum(len(event.bars) for event in kept) == bad.kept
    assert [r.payload for r in told.records] == [bad.payload] * bool(bad.kept) + [good.payload]
    assert told.journaled == told.events


def test_the_table_is_long():
    """No kind of message is lost from the table by a slip."""
    assert len(CASES) >= 200
    assert len({(bad.topic, bad.payload) for bad in CASES.values()}) == len(CASES)


TAKEN = {
    "zero volume": one(volume=0),
    "negative zero volume": one(volume=-0.0),
    "symbol of the topic": one(symbol="A"),
    "empty symbol beside the topic's": one(symbol=""),
    "unknown fields": one(x=[1, {"y": None}], Open="ten"),
    "1e400 in an unknown field": one(x=7)[:-2] + b"1e400}",
    "integers for prices": one(open=10, high=12, low=9, close=11, volume=5),
    "a field said twice counts as the last": b'{"open": -1, ' + one()[1:],
    "blanks around it": b" \r\n\t" + one() + b"\n",
    "other zone": one(close_time="2023-11-15T03:44:00+05:30"),
    "one bar ahead": one(close_time="2023-11-14T22:15:00Z"),
    "finer than a microsecond": one(close_time="2023-11-14T22:14:00.0000001Z"),
    "trades and vwap": one(trades=10**15 - 1, vwap=10.5),
    "array of one": text([GOOD]),
    "packed": packed(),
    "packed timestamp": packed(close_time=datetime(2023, 11, 14, 22, 14, tzinfo=UTC)),
    "extension in an unknown field": packed(x=msgspec.msgpack.Ext(5, b"abc")),
}


@pytest.mark.parametrize("case", TAKEN)
def test_odd_message_is_taken(tmp_path, case):
    """The control: what is odd and means a bar all the same is taken without a word."""
    told = Told(tmp_path, Message(A, TAKEN[case]))
    [event] = told.events
    assert [(b.symbol, b.open) for b in event.bars] == [("A", 10.0)]
    assert told.letters == []
    assert told.journaled == told.events


def test_good_adjustment_is_taken(tmp_path):
    """The control of the adjustments: with nothing changed, the message is one."""
    told = Told(tmp_path, *(Message(SPLITS, payload) for payload in (text(SPLIT), pack(SPLIT))))
    assert [type(event) for event in told.events] == [Declaration] * 2
    assert told.letters == []


@pytest.mark.parametrize("payload", [b"[]", b" [ ] ", b"\x90", b"\xdc\x00\x00"])
def test_array_of_nothing_says_nothing(tmp_path, payload):
    """An empty array is acknowledged; there is nothing to journal and nothing to complain of."""
    told = Told(tmp_path, Message(MANY, payload), Message.of(bar("OK", 0)))
    assert told.acked == [1, 2]
    assert told.letters == []
    assert [type(event) for event in told.events] == [Arrival]
    assert len(told.records) == 1


def test_many_bad_messages_at_once(tmp_path):
    """All of the table in a few commits: each is told of, and every good bar between them is taken."""
    messages = []
    for n, bad in enumerate(CASES.values()):
        messages += [Message(bad.topic, bad.payload), Message.of(bar(f"S{n}", 0))]
    told = Told(tmp_path, *messages)
    assert told.acked == list(range(1, len(messages) + 1))
    letters = [json.loads(letter.payload) for letter in told.letters]
    for bad in CASES.values():  # letters of the same words at the same time are one
        assert any(bad.reason in body["reason"] and body["topic"] == bad.topic[:1000] for body in letters)
    came = [b.symbol for event in told.events for b in event.bars]
    assert [name for name in came if name.startswith("S")] == [f"S{n}" for n in range(len(CASES))]
    assert told.journaled == told.events
    assert all(event.time == START for event in told.events)
