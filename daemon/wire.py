"""Messages: bytes to bars, outcomes to bytes.

What goes out is canonical JSON of deterministic fields only, so that a replay can be compared byte by
byte; what differs from run to run travels as MQTT user properties.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
import numpy as np

from barcast.daemon.calendar import Calendar
from barcast.daemon.ports import Outcome
from barcast.models import Bar
from barcast.models.bar import LEAST, MOST

SCHEMA = 1
"""Version of the outgoing messages. Fields may be added within a version; readers ignore unknown ones."""

AHEAD = 86_400_000_000_000
"""How far ahead of its arrival a bar may close, in nanoseconds: clocks differ, and some feeds send early."""

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder says of bytes that are no message; the last of thousands of nested brackets."""

SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9._-]{0,31}")
CUT = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY, _SECOND, _MICROSECOND = 86_400_000_000_000, 1_000_000_000, 1_000


def to_ns(time: datetime) -> int:
    """Nanoseconds since 1970 of a time that knows its zone."""
    since = time - _EPOCH
    return since.days * _DAY + since.seconds * _SECOND + since.microseconds * _MICROSECOND


def to_text(ns: int) -> str:
    """RFC 3339 in UTC, with as many decimals of a second as are needed."""
    seconds, rest = divmod(ns, _SECOND)
    text = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}{f'.{rest:09d}'.rstrip('0') if rest else ''}Z"


class BarMessage(msgspec.Struct, gc=False):
    """A bar on the wire. `close_time` is RFC 3339 with a zone; the symbol may come from the topic."""

    close_time: Annotated[datetime, msgspec.Meta(tz=True)]
    open: float
    high: float
    low: float
    close: float
    volume: float
    symbol: str | None = None
    trades: int | None = None
    vwap: float | None = None

    @classmethod
    def of(cls, bar: Bar) -> "BarMessage":
        """The message that carries a bar; what is finer than a microsecond is cut."""
        time = _EPOCH + timedelta(microseconds=bar.close_time // _MICROSECOND)
        return cls(time, *bar.values, bar.symbol, bar.trades, bar.vwap)


class Horizon(msgspec.Struct, frozen=True):
    """How many of the symbol's own bars ahead, and when that bar should close."""

    bars: int
    end_time: str


class GroupOfSignal(msgspec.Struct, frozen=True):
    """The group a signal belongs to: its close, how many signals it has, and which symbol ends it."""

    close_time: str
    signals: int
    last: str


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """The published forecast of one symbol. Prices are in the unit of the bars.

    `quantiles` is one list of prices for each horizon, along `levels`; `mean` and `std` are of the log
    return over the horizon; `rise` is the probability that the price is above `reference` by then.
    """

    schema: int
    id: str
    symbol: str
    timeframe: str
    close_time: str
    reference: float
    horizons: list[Horizon]
    levels: list[float]
    quantiles: list[list[float]]
    mean: list[float]
    std: list[float]
    rise: list[float]
    model: str
    sampler: str
    steps: int
    samples: int
    valid_until: str
    flags: list[str]
    group: GroupOfSignal


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy's wanted exposure in one symbol, from -1 to 1, decided from a group's forecasts."""

    schema: int
    id: str
    strategy: str
    symbol: str
    timeframe: str
    close_time: str
    target: float
    model: str
    valid_until: str


class GroupDone(msgspec.Struct, frozen=True, kw_only=True):
    """A finished group: whose signals were sent before this message, and whose were withheld and why."""

    schema: int
    id: str
    timeframe: str
    close_time: str
    straggler: bool
    symbols: list[str]
    withheld: dict[str, str]
    model: str
    valid_until: str


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message of which something could not be used: the first such bar and why, and how many there were."""

    schema: int
    id: str
    topic: str
    reason: str
    received: str
    payload: str
    count: int


class ModelNotice(msgspec.Struct, frozen=True, kw_only=True):
    """The champion, since when, and the verdict on a challenger that was given at `time`, if one was."""

    schema: int
    id: str
    model: str
    activated: str
    time: str
    fingerprint: str
    verdict: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish: at least once, under one id, not after `expires` (nanoseconds, None: never)."""

    id: str
    topic: str
    payload: bytes
    retain: bool
    expires: int | None


@dataclass(frozen=True, slots=True)
class Reject:
    """A piece of a message that could not be used."""

    reason: str
    payload: bytes


_json_bars = msgspec.json.Decoder(list[BarMessage])
_pack_bars = msgspec.msgpack.Decoder(list[BarMessage])
_json_bar = msgspec.json.Decoder(BarMessage)
_pack_bar = msgspec.msgpack.Decoder(BarMessage)
_json_raw = msgspec.json.Decoder(list[msgspec.Raw])
_pack_raw = msgspec.msgpack.Decoder(list[msgspec.Raw])


def decode(
    topic: str, payload: bytes, received: int, root: str, calendar: Calendar
) -> tuple[list[Bar], list[Reject]]:
    """Bars of one message, and what of it could not be used.

    `{root}/bars/{timeframe}/{symbol}` carries one bar or an array of that symbol,
    `{root}/bars/{timeframe}` an array of many symbols; JSON and msgpack are told apart by the first byte.
    Good bars of an array with a bad one are kept. `received` is the time of arrival in nanoseconds: a bar
    that closes more than `AHEAD` after it is refused, as it would pass for the newest until then. The
    calendar says which timeframe is taken, and when an exchange is known to be open.
    """
    prefix = f"{root}/bars/"
    parts = topic.removeprefix(prefix).split("/") if topic.startswith(prefix) else []
    if not 1 <= len(parts) <= 2:
        return [], [Reject(f"topic {topic!r} is not {prefix}TIMEFRAME/SYMBOL or {prefix}TIMEFRAME", payload)]
    if parts[0] != calendar.timeframe.text:
        mine = calendar.timeframe.text
        return [], [Reject(f"timeframe {parts[0]!r}: this instance takes {mine!r} bars only", payload)]
    symbol = parts[1] if len(parts) == 2 else None
    if not payload:
        return [], [Reject("the payload is empty; send a bar or an array of bars", payload)]
    packed = payload[0] >= 0x80
    try:
        if payload.lstrip()[:1] == b"[" or payload[0] in range(0x90, 0xA0) or payload[0] in (0xDC, 0xDD):
            messages = (_pack_bars if packed else _json_bars).decode(payload)
        else:
            messages = [(_pack_bar if packed else _json_bar).decode(payload)]
    except UNDECODABLE as error:
        return _piecewise(payload, symbol, received, calendar, packed, error)
    bars: list[Bar] = []
    rejects: list[Reject] = []
    for message in messages:
        if reason := _fault(message, symbol, received, calendar):
            rejects.append(Reject(reason, msgspec.json.encode(_finite(message))))
        else:
            bars.append(_bar(message, symbol))
    return bars, rejects


def encode_bars(bars: list[Bar]) -> bytes:
    """One bar as an object, several as an array, in JSON."""
    messages = [BarMessage.of(bar) for bar in bars]
    return msgspec.json.encode(messages[0] if len(messages) == 1 else messages)


def _piecewise(
    payload: bytes, symbol: str | None, received: int, calendar: Calendar, packed: bool, error: Exception
) -> tuple[list[Bar], list[Reject]]:
    """Keep the good bars of an array of which one does not even decode."""
    try:
        pieces = (_pack_raw if packed else _json_raw).decode(payload)
    except UNDECODABLE:
        return [], [Reject(str(error), payload)]
    bars: list[Bar] = []
    rejects: list[Reject] = []
    one = _pack_bar if packed else _json_bar
    for piece in pieces:
        try:
            message = one.decode(piece)
        except UNDECODABLE as fault:
            rejects.append(Reject(str(fault), bytes(piece)))
            continue
        if reason := _fault(message, symbol, received, calendar):
            rejects.append(Reject(reason, bytes(piece)))
        else:
            bars.append(_bar(message, symbol))
    return bars, rejects


def _bar(message: BarMessage, symbol: str | None) -> Bar:
    m = message
    return Bar(
        m.symbol or symbol or "",
        to_ns(m.close_time),
        m.open,
        m.high,
        m.low,
        m.close,
        m.volume,
        m.trades,
        m.vwap,
    )


def _fault(message: BarMessage, symbol: str | None, received: int, calendar: Calendar) -> str | None:
    """Why a decoded bar cannot be used, or None."""
    m = message
    name = m.symbol or symbol
    if name is None:
        return "symbol is missing; name it in each bar of an array or in the topic"
    if symbol is not None and m.symbol not in (None, symbol):
        return f"symbol {m.symbol!r} disagrees with the topic's {symbol!r}"
    if not SYMBOL.fullmatch(name):
        return f"symbol {name!r} is not of the form [A-Z0-9][A-Z0-9._-]{{0,31}}"
    close, given = to_ns(m.close_time), m.close_time.isoformat()
    if not 0 < close <= received + AHEAD:
        return f"close_time {given} is not between 1970 and the time of arrival, {to_text(received)}"
    if not calendar.covers(close):
        return f"close_time {given} is outside the years that the calendar {calendar.name} knows"
    if calendar.close_at_or_after(close) != close:
        return (
            f"close_time {given} is when no {calendar.timeframe} bar of the calendar {calendar.name} closes"
        )
    # One comparison chain refuses NaN as well: every comparison with it is false.
    if LEAST < m.low <= m.open <= m.high < MOST and m.low <= m.close <= m.high and 0 <= m.volume < MOST:
        return None
    return (
        f"open {m.open}, high {m.high}, low {m.low}, close {m.close}, volume {m.volume}: prices must be "
        f"within {LEAST} and {MOST} and low <= open, close <= high; volume must be below {MOST}, not negative"
    )


def _finite(message: BarMessage) -> dict[str, Any]:
    """A message as plain data whose numbers JSON can hold."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    bad = {k: str(v) for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    return plain | bad


def messages(outcome: Outcome) -> Iterator[Outgoing]:
    """What subscribers are told of an outcome: signals, targets, then that the group is complete."""
    group, root, timeframe = outcome.group, outcome.root, outcome.timeframe
    close, valid = to_text(group.close_time), to_text(outcome.valid_until)
    names = list(outcome.forecasts)
    horizons = [Horizon(h, to_text(t)) for h, t in zip(outcome.card.horizons, outcome.ends, strict=True)]
    for name, forecast in outcome.forecasts.items():
        prices = forecast.reference * np.exp(forecast.quantiles)
        yield _outgoing(
            Signal(
                schema=SCHEMA,
                id="",
                symbol=name,
                timeframe=timeframe,
                close_time=close,
                reference=forecast.reference,
                horizons=horizons,
                levels=list(forecast.levels),
                quantiles=[_rounded(row) for row in prices],
                mean=_rounded(forecast.mean),
                std=_rounded(forecast.std),
                rise=_rounded(forecast.rise),
                model=outcome.card.model,
                sampler=outcome.card.sampler,
                steps=outcome.card.steps,
                samples=outcome.card.samples,
                valid_until=valid,
                flags=list(outcome.flags[name]),
                group=GroupOfSignal(close, len(names), names[-1]),
            ),
            f"{root}/signals/{timeframe}/{name}",
            retain=True,
            expires=outcome.valid_until,
        )
    for strategy, targets in outcome.targets.items():
        for name, target in targets.items():
            yield _outgoing(
                Target(
                    schema=SCHEMA,
                    id="",
                    strategy=strategy,
                    symbol=name,
                    timeframe=timeframe,
                    close_time=close,
                    target=float(f"{target:.9g}"),
                    model=outcome.card.model,
                    valid_until=valid,
                ),
                f"{root}/targets/{strategy}/{timeframe}/{name}",
                retain=True,
                expires=outcome.valid_until,
            )
    yield _outgoing(
        GroupDone(
            schema=SCHEMA,
            id="",
            timeframe=timeframe,
            close_time=close,
            straggler=group.straggler,
            symbols=names,
            withheld=dict(outcome.withheld),
            model=outcome.card.model,
            valid_until=valid,
        ),
        f"{root}/groups/{timeframe}",
        retain=False,
        expires=outcome.valid_until,
    )


def dead_letter(rejects: Sequence[Reject], topic: str, received: int, deadletters: str) -> Outgoing:
    """The message that says what of a message could not be used; texts beyond 1,000 characters are cut."""
    first = rejects[0]
    letter = DeadLetter(
        schema=SCHEMA,
        id="",
        topic=topic[:CUT],
        reason=first.reason[:CUT],
        received=to_text(received),
        payload=first.payload.decode("utf-8", "backslashreplace")[:CUT],
        count=len(rejects),
    )
    return _outgoing(letter, deadletters, retain=False, expires=None)


def model_notice(
    model: str, activated: int, fingerprint: str, verdict: dict[str, Any], time: int, topic: str
) -> Outgoing:
    """The retained message that names the champion."""
    notice = ModelNotice(
        schema=SCHEMA,
        id="",
        model=model,
        activated=to_text(activated),
        time=to_text(time),
        fingerprint=fingerprint,
        verdict=verdict,
    )
    return _outgoing(notice, topic, retain=True, expires=None)


def _outgoing(
    body: Signal | Target | GroupDone | DeadLetter | ModelNotice,
    topic: str,
    *,
    retain: bool,
    expires: int | None,
) -> Outgoing:
    """Encode a message under the id that its own content gives: the hash of topic and body."""
    digest = hashlib.sha256(topic.encode() + b"\0" + msgspec.json.encode(body)).hexdigest()[:24]
    return Outgoing(
        digest, topic, msgspec.json.encode(msgspec.structs.replace(body, id=digest)), retain, expires
    )


def _rounded(values: np.ndarray) -> list[float]:
    """Nine significant digits: finer than any tick, and a message that people can read."""
    return [float(f"{value:.9g}") for value in values.tolist()]
