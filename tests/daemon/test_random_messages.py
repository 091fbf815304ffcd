"""A hundred thousand random messages: bars or dead letters, never an exception, always the same."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator

import msgspec

from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import DeadLetter, Reject
from barcast.models import Adjustment, Bar
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.rim import SECOND, Instance, Message, World, activation, outbox, path_of, revision

COUNT = 100_000
CALENDARS = Calendars("24x7", Timeframe.parse("1m"), {"EUR": "fx"})
TOPICS = ["t/bars/1m/A", "t/bars/1m/B", "t/bars/1m/EUR", "t/bars/1m", "t/bars/1m", "t/adjustments/A"]
SYMBOLS = ["A", "B", "C-1", "EUR", "a", "", "Ä", "A" * 33, "A\0", None, 7]
FIELDS = ["close_time", "open", "high", "low", "close", "volume", "symbol", "trades", "vwap"]
ADJUSTMENT_FIELDS = ["time", "factor", "kind", "symbol"]
HOSTILE = [
    None,
    True,
    "",
    "1.5",
    "split",
    [],
    [1.5],
    {},
    {"open": 1.5},
    [[[[[[]]]]]],
    0,
    -0.0,
    -1,
    1.5,
    5e-324,
    1e-15,
    1e15,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    1 << 63,
    (1 << 64) - 1,
    -(1 << 63),
    1_700_000_040,
    "2023-11-14T22:14:00",
    "2023-11-14T22:14:00+25:00",
    "2023-11-31T22:14:00Z",
    "1969-12-31T23:59:00Z",
    "9999-12-31T23:59:59.999999999Z",
    "0001-01-01T00:00:00+23:59",
    "\ud7ff\uffff\U0010ffff",
    "x" * 2000,
]
REMEDIES = ("send ", "correct ", "name ", "spell ", "publish ")


class Feed:
    """Messages that are nearly right in every way that dice can think of; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def message(self, now: int) -> Message:
        """One message, sent at a time."""
        dice = self.dice
        topic = dice.choice(TOPICS)
        if dice.random() < 0.1:
            payload = dice.randbytes(dice.randrange(60))
        else:
            payload = self._encoded(self._plain(now, topic))
        while dice.random() < 0.3:
            payload = self._damaged(payload, now)
        while dice.random() < 0.05:
            topic = self._damaged(topic.encode(), now).decode("utf-8", "replace")
        return Message(topic, payload)

    def _plain(self, now: int, topic: str) -> object:
        def one(now: int) -> dict[str, object]:
            if topic.startswith("t/adjustments"):
                return self._adjustment(now)
            return self._bar(now, topic.split("/")[3] if topic.count("/") == 3 else None)

        if self.dice.random() < 0.6:
            return one(now)
        return [
            one(now) if self.dice.random() < 0.95 else self._hostile() for _ in range(self.dice.randrange(5))
        ]

    def _bar(self, now: int, symbol: str | None) -> dict[str, object]:
        dice = self.dice
        price = dice.uniform(90, 110)
        whole: dict[str, object] = {
            "close_time": wire.to_text((now // MINUTE - dice.randrange(4)) * MINUTE),
            "open": price,
            "high": price + 1,
            "low": price - 1,
            "close": price + dice.uniform(-1, 1),
            "volume": dice.randrange(100),
        }
        if symbol is None or dice.random() < 0.2:
            whole["symbol"] = symbol or dice.choice(SYMBOLS[:4])
        if dice.random() < 0.2:
            whole["trades"] = dice.randrange(100)
            whole["vwap"] = price
        return self._spoilt(whole, FIELDS)

    def _adjustment(self, now: int) -> dict[str, object]:
        time = wire.to_text(now - self.dice.randrange(10) * SECOND)
        return self._spoilt(
            {
                "time": time,
                "factor": self.dice.choice([0.5, 2.0, 1.01]),
                "kind": self.dice.choice(["split", "roll"]),
            },
            ADJUSTMENT_FIELDS,
        )

    def _spoilt(self, whole: dict[str, object], fields: list[str]) -> dict[str, object]:
        dice = self.dice
        while dice.random() < 0.25:
            field = dice.choice(fields)
            match dice.randrange(5):
                case 0:
                    whole.pop(field, None)
                case 1:
                    other = dice.choice(fields)
                    whole[field], whole[other] = whole.get(other), whole.get(field)
                case 2:
                    whole["symbol"] = dice.choice(SYMBOLS)
                case _:
                    whole[field] = self._hostile()
        return whole

    def _hostile(self) -> object:
        return self.dice.choice(HOSTILE)

    def _encoded(self, plain: object) -> bytes:
        if self.dice.random() < 0.4:
            return msgspec.msgpack.encode(plain)
        return json.dumps(plain).encode()

    def _damaged(self, payload: bytes, now: int) -> bytes:
        dice = self.dice
        at = dice.randrange(len(payload) + 1)
        match dice.randrange(6):
            case 0:
                return payload[:at]
            case 1:
                return payload[at:]
            case 2:
                return payload[:at] + dice.randbytes(dice.randrange(1, 5)) + payload[at:]
            case 3:
                other = self._encoded(self._bar(now, None))
                return payload[:at] + other[dice.randrange(len(other)) :]
            case 4:
                return payload[:at] + payload[at + dice.randrange(8) :]
            case _:
                if not payload:
                    return payload
                changed = bytearray(payload)
                changed[at - 1] ^= 1 << dice.randrange(8)
                return bytes(changed)


def found(message: Message, now: int) -> tuple[list[Bar], list[Adjustment], list[Reject]]:
    """What a message holds."""
    if message.topic.startswith("t/adjustments/"):
        told = wire.declared(message.topic, message.payload, "t")
        return ([], [], [told]) if isinstance(told, Reject) else ([], [told], [])
    bars, rejects = wire.decode(message.topic, message.payload, now, "t", CALENDARS)
    return bars, [], rejects


def sound(b: Bar, now: int) -> bool:
    """Whether a bar is what the interior relies on."""
    return (
        wire.SYMBOL.fullmatch(b.symbol) is not None
        and 0 < b.close_time <= now + MINUTE
        and CALENDARS.of(b.symbol).is_close(b.close_time)
        and 0 < b.low <= min(b.open, b.close) <= max(b.open, b.close) <= b.high < 1e15
        and 0 <= b.volume < 1e15
        and (b.trades is None or 0 <= b.trades < 1e15)
        and (b.vwap is None or 0 < b.vwap < 1e15)
    )


letters = msgspec.json.Decoder(DeadLetter)


def test_a_hundred_thousand_messages_are_bars_or_dead_letters():
    """Whatever bytes come: sound bars or reasons with a remedy, that can be published, and again the same."""
    feed, seen = Feed(20231114), Counter[str]()
    for _ in range(COUNT):
        message = feed.message(START)
        bars, adjustments, rejects = told = found(message, START)
        assert told == found(message, START), message
        if not (bars or adjustments or rejects):
            seen["nothing"] += 1
            decoder = msgspec.msgpack if message.payload.lstrip()[:1] != b"[" else msgspec.json
            assert decoder.decode(message.payload) == [], message
        for b in bars:
            assert sound(b, START), message
        if bars:
            assert wire.decode("t/bars/1m", wire.encode_bars(bars), START, "t", CALENDARS) == (bars, []), (
                message
            )
        for a in adjustments:
            assert wire.SYMBOL.fullmatch(a.symbol), message
            assert 1e-6 <= a.factor <= 1e6, message
            assert 0 < a.time < 1 << 63, message
        for reject in rejects:
            assert reject.reason.rpartition("; ")[2].startswith(REMEDIES), (message, reject)
            assert len(reject.reason) <= wire.CUT, message
            letter = wire.dead_letter([reject], message.topic, START, "t/deadletter/me")
            body = letters.decode(letter.payload)
            assert body.reason == reject.reason, message
            assert len(body.payload) <= wire.CUT, message
            seen[reject.reason.split(" ")[0]] += 1
        seen["bars"] += bool(bars)
        seen["mixed"] += bool(bars and rejects)
        seen["adjustments"] += bool(adjustments)
        seen["refused"] += bool(rejects)
    # The control: the dice reached both sides of every rule.
    assert min(seen["bars"], seen["refused"]) > COUNT // 4
    assert min(seen["mixed"], seen["adjustments"], seen["nothing"]) > COUNT // 100
    fields = ("open", "high", "low", "close", "volume", "trades", "vwap", "close_time", "symbol", "topic")
    assert min(seen[kind] for kind in (*fields, "timeframe", "factor", "time", "Object", "Expected")) > 3


def busy(feed: Feed, count: int, minutes: int) -> Iterator[tuple[int, list[Message]]]:
    """Good bars of three symbols every minute, and random messages in between."""
    for minute in range(1, minutes + 1):
        moment = START + minute * MINUTE
        for k, symbol in enumerate("ABG"):
            yield moment + k * SECOND, [Message.of(bar(symbol, minute))]
        for k in range(6):
            time = moment + 3 * SECOND + k * 9 * SECOND
            yield time, [feed.message(time) for _ in range(count // (6 * minutes))]


def test_the_path_survives_random_messages(tmp_path):
    """Two thousand random messages between good bars: all are acknowledged, and the replay says the same."""
    world, feed, minutes = World(), Feed(7), 20
    steps = list(busy(feed, 2040, minutes))
    models = {"spread": Spread()}
    instance = Instance(tmp_path / "journal.db", world, lambda model, *_: models[model])
    world.script.append((START, lambda src: src.decide(revision(settings(("A", "B", "G"))))))
    world.script.append((START, lambda src: src.decide(activation("spread"))))
    world.script.extend(steps)
    asyncio.run(instance.run())

    sent = sum(len(messages) for _, messages in steps)
    assert sent >= 2000
    assert world.acked == list(range(1, sent + 1))
    said = outbox(instance.journal)
    assert path_of(said) == instance.replayed()
    bodies = [json.loads(m.payload) for m in said]
    groups = [b for m, b in zip(said, bodies, strict=True) if "/groups/" in m.topic]
    fed = [g for g in groups if "G" in (*g["symbols"], *g["withheld"])]
    assert len(fed) == minutes
    assert sum("/signals/" in m.topic for m in said) > 2 * minutes
    assert sum("/deadletter/" in m.topic for m in said) > 800
    assert all(b"null" not in m.payload.replace(b'"previous":null', b"") for m in path_of(said))
    instance.close()
