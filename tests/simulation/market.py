"""What a feed sends in one schedule: bars as they close, and all that feeds do to them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from barcast.daemon.wire import encode_bars, to_text
from barcast.models import Bar

SECOND = 10**9
BAR = 15
"""Seconds of a bar."""
TIMEFRAME = "15s"
ROOT = "t"
START = 1_700_000_100 * SECOND
"""When the clock begins: a close."""
BAD = (b"", b"{}", b'{"close_time": "yesterday"}', b"[[[[", b"\x92\xc0", b"\xff\xfe\x00", b"7")


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of the feed, and the second at which it is sent. `good`: some of it can be used."""

    at: float
    topic: str
    payload: bytes
    good: bool = True
    bad: str | None = None


def bar(symbol: str, n: int, shift: float = 0.0) -> Bar:
    """The bar that closes `n` bars after the start; its price follows from symbol and number."""
    price = 100 + ord(symbol[0]) % 7 + math.sin(n * 1.3 + ord(symbol[0])) + shift
    return Bar(symbol, START + n * BAR * SECOND, price, price + 1, price - 1, price + 0.25, 10.0 + n % 3)


def feed(
    dice: Random, symbols: Sequence[str], bars: int, kinds: set[str], happened: Counter[str]
) -> list[Sent]:
    """All that is sent, in order: `bars` bars of each symbol, spoilt in the ways named by `kinds`."""
    sent: list[Sent] = []

    def some(kind: str, share: float) -> bool:
        found = kind in kinds and dice.random() < share
        happened[kind] += found
        return found

    for n in range(1, bars + 1):
        together: list[Bar] = []
        latest = 0.0
        for symbol in symbols:
            if symbol == "D" and n < bars // 2:  # it appears later
                continue
            if some("hole", 0.08):
                continue
            one, at = bar(symbol, n), n * BAR + dice.random() ** 2 * 1.5
            if some("late bar", 0.12):
                at += dice.choice((2.5, 6, BAR + 3, 2 * BAR + 5))
            if "array" in kinds and at < n * BAR + 2 and dice.random() < 0.5:
                together.append(one)
                latest = max(latest, at)
            else:
                sent.append(_message(at, [one]))
            if some("sent twice", 0.1):
                sent.append(_message(at + dice.choice((0.0, 0.5, BAR)), [one]))
            if some("correction", 0.08):
                other = bar(symbol, n, dice.choice((0.5, -0.5)))
                sent.append(_message(at + dice.choice((0.2, 1.0, BAR)), [other]))
                if dice.random() < 0.3:
                    sent.append(_message(at + BAR + 1, [one]))
            if n > 2 and some("older bar", 0.06):
                sent.append(_message(at + 0.3, [bar(symbol, n - dice.randrange(1, 3), 0.125)]))
        if together:
            happened["array"] += len(together) > 1
            bad = None
            payload = _array(together)
            if some("bad bar in an array", 0.2):
                pieces = json.loads(payload)
                pieces.insert(dice.randrange(len(pieces) + 1), {"symbol": f"X{n}"})
                payload, bad = json.dumps(pieces).encode(), f'{{"symbol": "X{n}"}}'
            sent.append(Sent(latest, f"{ROOT}/bars/{TIMEFRAME}", payload, True, bad))
        if some("garbage", 0.15):
            payload = dice.choice(BAD)
            topic = dice.choice(
                (f"{ROOT}/bars/{TIMEFRAME}/A", f"{ROOT}/bars/{TIMEFRAME}", f"{ROOT}/bars/9m/A")
            )
            text = payload.decode("utf-8", "backslashreplace")
            sent.append(Sent(n * BAR + 10 * dice.random(), topic, payload, False, text))
        if some("adjustment", 0.1):
            time = to_text(START + (n - dice.randrange(3)) * BAR * SECOND)
            body = {"time": time, "factor": dice.choice((0.5, 2.0)), "kind": dice.choice(("split", "roll"))}
            at = n * BAR + 10 * dice.random()
            sent.append(Sent(at, f"{ROOT}/adjustments/{dice.choice(symbols)}", json.dumps(body).encode()))
    return sorted(sent, key=lambda one: one.at)


def _message(at: float, bars: list[Bar]) -> Sent:
    return Sent(at, f"{ROOT}/bars/{TIMEFRAME}/{bars[0].symbol}", encode_bars(bars))


def _array(bars: list[Bar]) -> bytes:
    payload = encode_bars(bars)
    return payload if payload.startswith(b"[") else b"[" + payload + b"]"
