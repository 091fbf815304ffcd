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
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from barcast.daemon.calendar import Calendars
from barcast.daemon.ports import Outcome
from barcast.models import Adjustment, Bar, Coverage
from barcast.models.bar import LEAST, MOST
from barcast.models.joint import Outlook

SCHEMA = 1
"""Version of the outgoing messages. Fields may be added within a version; readers ignore unknown ones."""

AHEAD = 60_000_000_000
"""How far ahead of its arrival a bar may close, in nanoseconds, or one bar if longer: clocks differ."""

MOST_BYTES = 1_000_000
"""The longest payload taken: some 5,000 bars."""

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder says of bytes that are no message; the last of thousands of nested brackets."""

MOST_PIECES = 20_000
"""The longest array that is searched for its good bars when one is malformed: no more fit into a payload."""

BAR = "send close_time (RFC 3339 with a zone) and open, high, low, close and volume (numbers)"
"""What a reason ends with when a payload has not the form of a bar."""

ADJUSTMENT = "send time (RFC 3339 with a zone), factor (a number) and kind (split or roll)"
"""What a reason ends with when a payload has not the form of an adjustment."""

SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9._-]{0,31}")
LONGEST_SYMBOL = 32
CUT = 1000
SHOWN = 200
"""Characters of a foreign text that a reason shows, so that the remedy behind it is never cut."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY, _SECOND, _MICROSECOND = 86_400_000_000_000, 1_000_000_000, 1_000
_FOREVER = 1 << 63


def to_ns(time: datetime) -> int:
    """Nanoseconds since 1970 of a time that knows its zone."""
    since = time - _EPOCH
    return since.days * _DAY + since.seconds * _SECOND + since.microseconds * _MICROSECOND


@lru_cache(1024)  # the messages of a close say the same few times over and over
def from_text(text: str) -> int:
    """Nanoseconds since 1970 of a time in a message. Raise ValueError for what is no time."""
    return to_ns(datetime.fromisoformat(text))


@lru_cache(1024)
def to_text(ns: int) -> str:
    """RFC 3339 in UTC, with as many decimals of a second as are needed."""
    seconds, rest = divmod(ns, _SECOND)
    text = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}{f'.{rest:09d}'.rstrip('0') if rest else ''}Z"


def _of(description: str, **schema: str) -> msgspec.Meta:
    """What the contract says of a field. It constrains nothing: the code decides what is taken."""
    return msgspec.Meta(description=description, extra_json_schema=schema or None)


Text = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""A time as RFC 3339 in UTC."""
Version = Annotated[int, _of("Version of the messages: a reader refuses a newer one than it knows.")]
Id = Annotated[str, _of("Hash of topic and content: a message that is delivered again keeps it.")]
Symbol = Annotated[str, _of("Whose bars these are.")]
OwnSymbol = Annotated[str | None, _of("Whose bar this is; on a topic with a symbol it may be left out.")]
Length = Annotated[str, _of("Length of a bar: {n}{s|m|h|d}, or session for the days of an exchange.")]
Close = Annotated[Text, _of("When the newest bar closed that was looked at.")]
ModelId = Annotated[str, _of("The model that was asked: an id of its content, or the name of a baseline.")]
Until = Annotated[Text, _of("Do not act on it from then on. It is the close of the second next bar.")]
Tradable = Annotated[
    bool,
    _of(
        "False: it became due when a newer bar should have closed already, as after an outage. It is told "
        "for completeness; do not trade it."
    ),
]


class BarMessage(msgspec.Struct, gc=False):
    """A bar on the wire."""

    close_time: Annotated[
        datetime, msgspec.Meta(tz=True, description="When it closed: RFC 3339 with a zone.")
    ]
    open: Annotated[float, _of("First price.")]
    high: Annotated[float, _of("Highest price.")]
    low: Annotated[float, _of("Lowest price.")]
    close: Annotated[float, _of("Last price.")]
    volume: Annotated[float, _of("Traded volume, in any unit that stays the same.")]
    symbol: OwnSymbol = None
    trades: Annotated[int | None, _of("Number of trades.")] = None
    vwap: Annotated[float | None, _of("Volume-weighted mean price.")] = None

    @classmethod
    def of(cls, bar: Bar) -> "BarMessage":
        """The message that carries a bar; what is finer than a microsecond is cut."""
        time = _EPOCH + timedelta(microseconds=bar.close_time // _MICROSECOND)
        return cls(time, *bar.values, bar.symbol, bar.trades, bar.vwap)


class AdjustmentMessage(msgspec.Struct, gc=False):
    """A changed price basis on the wire: bars that close after `time` cost `factor` times what they would."""

    time: Annotated[datetime, msgspec.Meta(tz=True), _of("RFC 3339 with a zone.")]
    factor: Annotated[float, _of("New price over old price: 0.5 for a split of one into two.")]
    kind: Annotated[Literal["split", "roll"], _of("What changed the basis.")]
    symbol: OwnSymbol = None


class Horizon(msgspec.Struct, frozen=True):
    """How far ahead a row of a signal looks."""

    bars: Annotated[int, _of("How many of the symbol's own bars ahead.")]
    end_time: Annotated[Text, _of("When that bar should close, by the symbol's calendar.")]


class GroupOfSignal(msgspec.Struct, frozen=True):
    """The group that a signal belongs to."""

    close_time: Close
    signals: Annotated[int, _of("How many signals it has.")]
    last: Annotated[str, _of("The symbol of its last signal.")]


class CoverageOfSignal(msgspec.Struct, frozen=True):
    """The share of the last outcomes over each horizon that lay inside the intervals forecast of them."""

    share: Annotated[
        dict[str, list[float]],
        _of('By nominal coverage of the central interval, such as "0.9": one share for each horizon.'),
    ]
    outcomes: Annotated[list[int], _of("How many outcomes that is, for each horizon.")]

    @classmethod
    def of(cls, coverage: Coverage) -> "CoverageOfSignal":
        """What is published of a forecast's coverage."""
        rows = zip(coverage.intervals, coverage.share, strict=True)
        return cls({f"{nominal:g}": _rounded(row) for nominal, row in rows}, list(coverage.outcomes))


class TouchOfSignal(msgspec.Struct, frozen=True):
    """Two barriers, and which of them the price touches first until the longest horizon ends."""

    up: Annotated[float, _of("How far the upper one is, in the last of `std`.")]
    down: Annotated[float, _of("How far the lower one is, in the last of `std`.")]
    up_price: Annotated[float, _of("The upper one: reference * exp(up * std).")]
    down_price: Annotated[float, _of("The lower one: reference * exp(-down * std).")]
    up_first: Annotated[float, _of("Probability that the upper one is touched, and before the lower one.")]
    down_first: Annotated[float, _of("Probability that the lower one is touched, and before the upper one.")]

    @classmethod
    def of(cls, outlook: Outlook, reference: float) -> "list[TouchOfSignal]":
        """What is published of an outlook, pair by pair."""
        units = np.array(outlook.pairs)
        prices = reference * np.exp(outlook.std * units * (1.0, -1.0))
        rows = np.column_stack((units, prices, *outlook.touch))
        return [cls(*_rounded(row)) for row in rows]


class Signal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The published forecast of one symbol. Prices are in the unit of the bars."""

    schema: Version
    id: Id
    symbol: Symbol
    timeframe: Length
    close_time: Close
    reference: Annotated[float, _of("The last price: the close of that bar.")]
    horizons: Annotated[list[Horizon], _of("The rows of quantiles, mean, std and rise.")]
    levels: Annotated[list[float], _of("Probabilities of the quantiles: 0.05 to 0.95 is a 90 % interval.")]
    quantiles: Annotated[list[list[float]], _of("Prices: one list for each horizon, along the levels.")]
    mean: Annotated[list[float], _of("Of the log return from the reference, for each horizon.")]
    std: Annotated[list[float], _of("Standard deviation of the log return, for each horizon.")]
    rise: Annotated[list[float], _of("Probability of a price above the reference, for each horizon.")]
    model: ModelId
    sampler: Annotated[str, _of("How a diffusion model was sampled; none for what is not sampled.")]
    steps: Annotated[int, _of("Steps of the sampler; 0 for none.")]
    samples: Annotated[int, _of("Samples that a diffusion model drew for quantiles or paths; 0 for none.")]
    valid_until: Until
    tradable: Tradable
    flags: Annotated[
        list[str], _of("warming: too few bars yet to look back as far as it should. degraded: see reasons.")
    ]
    reasons: Annotated[list[str], _of("What is wrong with the bars that it was made from.")]
    group: GroupOfSignal
    coverage: Annotated[
        CoverageOfSignal | None,
        _of("Only where the model is calibrated online and has been for long enough."),
    ] = None
    touch: Annotated[
        list[TouchOfSignal] | None,
        _of("Only where the configuration has such barriers: one for each pair, in its order."),
    ] = None
    drawdown: Annotated[
        float | None,
        _of(
            "Only beside touch: the expected maximum drawdown until the longest horizon ends, a log return, "
            "0 or more, of the reference and the closes on the way."
        ),
    ] = None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy's wanted exposure in one symbol, decided from the forecasts of a group."""

    schema: Version
    id: Id
    strategy: Annotated[str, _of("The strategy's name in the configuration.")]
    symbol: Symbol
    timeframe: Length
    close_time: Close
    target: Annotated[float, _of("From -1, all short, to 1, all long.")]
    model: ModelId
    valid_until: Until
    tradable: Tradable


class GroupDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A group is complete: the last message about it, after its signals and targets."""

    schema: Version
    id: Id
    timeframe: Length
    close_time: Close
    previous: Annotated[
        Text | None,
        _of(
            "The close of the group before it, so that a missed group is noticed; null for the first one and "
            "for a straggler."
        ),
    ]
    straggler: Annotated[
        bool, _of("One symbol whose bar came after its group was sent: a signal of its own, no target.")
    ]
    symbols: Annotated[list[str], _of("Whose signals it has.")]
    withheld: Annotated[dict[str, str], _of("Whose bars came without a forecast, and why.")]
    missing: Annotated[list[str], _of("Who was expected and did not come in time.")]
    model: ModelId
    valid_until: Until
    tradable: Annotated[bool, _of("Whether all of its symbols are tradable; see the signals.")]
    refused: Annotated[
        dict[str, str],
        _of("Which strategies gave targets that cannot be, so that they have none in this group, and why."),
    ] = {}
    shed: Annotated[
        bool, _of("Whether nothing was forecast, as the signals would have come after their time.")
    ] = False


class Backfill(msgspec.Struct, frozen=True, kw_only=True):
    """A request for the bars of a hole: send them as ordinary bars."""

    schema: Version
    id: Id
    symbol: Symbol
    timeframe: Length
    after: Annotated[Text, _of("The close before the hole.")]
    before: Annotated[Text, _of("The close after it.")]
    bars: Annotated[int, _of("How many bars are missing in between.")]


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message of which something could not be used: the first such bar, and why. Texts are cut."""

    schema: Version
    id: Id
    topic: Annotated[str, _of("Where it came.")]
    reason: Annotated[str, _of("What is wrong, and what to do.")]
    received: Annotated[Text, _of("When it came.")]
    payload: Annotated[str, _of("What could not be used; bytes that are no text are written as escapes.")]
    count: Annotated[int, _of("How many bars of the message could not be used.")]


class ModelNotice(msgspec.Struct, frozen=True, kw_only=True):
    """The champion, and the last verdict on a challenger."""

    schema: Version
    id: Id
    model: Annotated[str, _of("The champion: an id of its content, or the name of a baseline.")]
    activated: Annotated[Text, _of("Since when it serves.")]
    time: Annotated[Text, _of("When this was said.")]
    fingerprint: Annotated[str, _of("Under what its forecasts are the same to the bit.")]
    verdict: Annotated[
        dict[str, Any],
        _of("What the gate said, or of a rollback the same; empty where the settings named the model."),
    ]


class OrderMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order of an operator, the verb of which is in the topic. All of it may be left out.

    It names a response topic under `{root}/answers/` and correlation data, and is not retained.
    """

    wait: Annotated[bool, _of("Of retrain and reload: answer at its end.")] = False
    to: Annotated[str | None, _of("Of rollback: the model to go back to.")] = None
    reason: Annotated[str | None, _of("Why, for the journal.")] = None


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What comes of an order, with its correlation data: any number of lines, then one of the others."""

    schema: Version = SCHEMA
    verb: Annotated[str, _of("What was ordered.")]
    instance: Annotated[str, _of("Who answers.")]
    boot: Annotated[str, _of("The start of it that took the order: with another one nothing more comes.")]
    line: Annotated[str | None, _of("On the way: the first one says that the order was taken.")] = None
    done: Annotated[str | None, _of("It is done: what came of it.")] = None
    refused: Annotated[str | None, _of("It is not done: why, and what to do.")] = None


State = Literal["starting", "ready", "deaf", "full", "stopped", "lost"]
"""What an instance says of itself."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an instance processes bars; with the state `ready` it is the heartbeat.

    The state is said again and again as long as bars are processed. After three intervals of silence the
    instance is to be taken for dead, whatever it said last.
    """

    schema: Version = SCHEMA
    state: Annotated[
        State,
        _of(
            "ready; starting; deaf: no bars come by its subscription, though it asked for them; full: it "
            "takes no bar until there is room on its disk; stopped: it was told to; lost: its connection "
            "ended otherwise, said by the broker as its last will."
        ),
    ]
    instance: Annotated[str, _of("The instance's name.")]
    boot: Annotated[str, _of("Another one after each start.")]
    time: Annotated[Text | None, _of("When this was said, on the instance's clock; null in a last will.")] = (
        None
    )
    interval: Annotated[
        float | None, _of("The next one follows within so many real seconds; null in a last will.")
    ] = None
    processed: Annotated[Text | None, _of("Close of the newest group since its start, if any.")] = None
    waiting: Annotated[
        int | None, _of("Messages that it received and has not taken yet; null in a last will.")
    ] = None
    paused: Annotated[
        bool, _of("An operator paused it: bars are taken, and no signals are made until it is to go on.")
    ] = False


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
_json_adjustment = msgspec.json.Decoder(AdjustmentMessage)
_pack_adjustment = msgspec.msgpack.Decoder(AdjustmentMessage)


def decode(
    topic: str, payload: bytes, received: int, root: str, calendars: Calendars
) -> tuple[list[Bar], list[Reject]]:
    """Bars of one message, and what of it could not be used.

    `{root}/bars/{timeframe}/{symbol}` carries one bar or an array of that symbol,
    `{root}/bars/{timeframe}` an array of many symbols; JSON and msgpack are told apart by the first byte.
    Good bars of an array with a bad one are kept. `received` is the time of arrival in nanoseconds: a bar
    that closes later than that, by more than a bar and more than `AHEAD`, is refused, as it would pass for
    the newest until then. The calendars say which timeframe is taken, and when each symbol has bars.
    """
    try:
        symbol = _symbol_of(topic, root, calendars.timeframe.text)
        packed, array = _form(payload)
    except ValueError as error:
        return [], [Reject(str(error), payload)]
    try:
        if array:
            messages = (_pack_bars if packed else _json_bars).decode(payload)
        else:
            messages = [(_pack_bar if packed else _json_bar).decode(payload)]
    except UNDECODABLE as error:
        pieces = _pieces(payload, packed) if array else None
        if pieces is None or len(pieces) > MOST_PIECES:
            many = f", in an array of {len(pieces)}" if pieces else ""
            return [], [Reject(f"{_malformed(error, packed)}{many}; {BAR}", payload)]
        return _piecewise(pieces, symbol, received, calendars, packed)
    bars: list[Bar] = []
    rejects: list[Reject] = []
    latest, is_close = received + ahead(calendars), calendars.of(symbol or "").is_close
    for m in messages:
        name = m.symbol or symbol
        if symbol is None and name is not None:
            is_close = calendars.of(name).is_close
        since = m.close_time - _EPOCH
        close = since.days * _DAY + since.seconds * _SECOND + since.microseconds * _MICROSECOND
        # One comparison chain refuses NaN as well: every comparison with it is false.
        if (
            name is not None
            and (symbol is None or name == symbol)
            and (symbol is not None or is_symbol(name))
            and 0 < close <= latest
            and is_close(close)
            and LEAST < m.low <= m.open <= m.high < MOST
            and m.low <= m.close <= m.high
            and 0 <= m.volume < MOST
            and (m.trades is None or 0 <= m.trades < MOST)
            and (m.vwap is None or LEAST < m.vwap < MOST)
        ):
            bars.append(Bar(name, close, m.open, m.high, m.low, m.close, m.volume, m.trades, m.vwap))
        else:
            reason = _fault(m, symbol, received, calendars)
            rejects.append(Reject(reason, msgspec.json.encode(_finite(m))))
    return bars, rejects


def declared(topic: str, payload: bytes, root: str) -> Adjustment | Reject:
    """The adjustment of one message on `{root}/adjustments/{symbol}`, or why there is none in it."""
    segment = topic.removeprefix(f"{root}/adjustments/")
    try:
        packed, _ = _form(payload)
    except ValueError as error:
        return Reject(str(error), payload)
    try:
        message = (_pack_adjustment if packed else _json_adjustment).decode(payload)
    except UNDECODABLE as error:
        return Reject(f"{_malformed(error, packed)}; {ADJUSTMENT}", payload)
    if message.symbol is not None and message.symbol != segment:
        return Reject(_disagrees(message.symbol, segment), payload)
    try:
        return adjustment(message, segment)
    except ValueError as error:
        return Reject(str(error), payload)


def adjustment(message: AdjustmentMessage, symbol: str) -> Adjustment:
    """The adjustment of a symbol that a message stands for. Raise ValueError for one that cannot be."""
    time, factor = to_ns(message.time), message.factor
    if not is_symbol(symbol):
        raise ValueError(_no_symbol(symbol))
    if not 1e-6 <= factor <= 1e6:
        raise ValueError(f"factor {factor} is not from 1e-6 to 1e6; send the new price over the old one")
    if not 0 < time < _FOREVER:
        raise ValueError(f"time {message.time.isoformat()} is not between 1970 and 2262; correct it")
    return Adjustment(symbol, time, factor, message.kind)


def is_symbol(name: str) -> bool:
    """Whether a text can name a symbol."""
    return len(name) <= LONGEST_SYMBOL and _is_symbol(name)


@lru_cache(4096)  # of short texts alone: a feed could fill the memory with long ones
def _is_symbol(name: str) -> bool:
    return SYMBOL.fullmatch(name) is not None


@lru_cache(4096)
def _symbol_of(topic: str, root: str, timeframe: str) -> str | None:
    """The symbol that a topic names, if it names one. Raise ValueError for a topic that carries no bars."""
    prefix = f"{root}/bars/"
    parts = topic.removeprefix(prefix).split("/") if topic.startswith(prefix) else []
    if not 1 <= len(parts) <= 2:
        raise ValueError(
            f"topic {_shown(topic)!r} is not {prefix}TIMEFRAME/SYMBOL or {prefix}TIMEFRAME; publish there"
        )
    if parts[0] != timeframe:
        raise ValueError(
            f"timeframe {_shown(parts[0])!r} is not the {timeframe!r} of this instance; "
            "publish such bars, or run another instance for the others"
        )
    if len(parts) == 2 and not is_symbol(parts[1]):
        raise ValueError(_no_symbol(parts[1]))
    return parts[1] if len(parts) == 2 else None


def _form(payload: bytes) -> tuple[bool, bool]:
    """Whether a payload is msgpack, and whether it is an array. Raise ValueError for one that cannot be."""
    if not payload:
        raise ValueError("the payload is empty; send JSON or msgpack")
    if len(payload) > MOST_BYTES:
        raise ValueError(
            f"the payload has {len(payload)} bytes, more than {MOST_BYTES}; send fewer bars at once"
        )
    first = payload[0]
    if first in b" \t\r\n":
        first = payload.lstrip()[:1].ljust(1)[0]
    return first >= 0x80, first == 0x5B or 0x90 <= first < 0xA0 or first in (0xDC, 0xDD)


def ahead(calendars: Calendars) -> int:
    """How long before its close a bar may come, in nanoseconds: clocks differ."""
    return max(AHEAD, calendars.timeframe.duration or _DAY)


def encode_bars(bars: list[Bar]) -> bytes:
    """One bar as an object, several as an array, in JSON."""
    messages = [BarMessage.of(bar) for bar in bars]
    return msgspec.json.encode(messages[0] if len(messages) == 1 else messages)


def _pieces(payload: bytes, packed: bool) -> list[msgspec.Raw] | None:
    try:
        return (_pack_raw if packed else _json_raw).decode(payload)
    except UNDECODABLE:
        return None


def _piecewise(
    pieces: Sequence[msgspec.Raw], symbol: str | None, received: int, calendars: Calendars, packed: bool
) -> tuple[list[Bar], list[Reject]]:
    """Keep the good bars of an array of which one does not even decode."""
    bars: list[Bar] = []
    rejects: list[Reject] = []
    one = _pack_bar if packed else _json_bar
    for piece in pieces:
        try:
            m = one.decode(piece)
        except UNDECODABLE as fault:
            rejects.append(Reject(f"{_malformed(fault, packed)}; {BAR}", bytes(piece)))
            continue
        if reason := _fault(m, symbol, received, calendars):
            rejects.append(Reject(reason, bytes(piece)))
        else:
            name = m.symbol or symbol or ""
            bars.append(
                Bar(name, to_ns(m.close_time), m.open, m.high, m.low, m.close, m.volume, m.trades, m.vwap)
            )
    return bars, rejects


def _malformed(error: Exception, packed: bool) -> str:
    """What a decoder has against a payload, for people."""
    fault = "brackets are nested too deep" if isinstance(error, RecursionError) else _shown(str(error))
    return f"taken for msgpack by its first byte: {fault}" if packed else fault


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _no_symbol(name: str) -> str:
    return f"symbol {_shown(name)!r} is not of the form [A-Z0-9][A-Z0-9._-]{{0,31}}; spell it so"


def _disagrees(name: str, symbol: str) -> str:
    return f"symbol {_shown(name)!r} disagrees with the topic's {_shown(symbol)!r}; correct one of them"


def _fault(m: BarMessage, symbol: str | None, received: int, calendars: Calendars) -> str:
    """Why a decoded bar cannot be used; empty when it can."""
    name = m.symbol or symbol
    if name is None:
        return "symbol is missing; name it in each bar of an array or in the topic"
    if symbol is not None and name != symbol:
        return _disagrees(name, symbol)
    if not is_symbol(name):
        return _no_symbol(name)
    close, given, calendar = to_ns(m.close_time), m.close_time.isoformat(), calendars.of(name)
    if close <= 0:
        return f"close_time {given} is not after 1970; correct the time"
    latest = received + ahead(calendars)
    if close > latest:
        return (
            f"close_time {given} is after {to_text(latest)}, the latest that an arrival at "
            f"{to_text(received)} may have; correct the time or the clock"
        )
    if not calendar.covers(close):
        return (
            f"close_time {given} is outside the years that the calendar {calendar.name} knows; "
            "correct the time, or install a newer exchange_calendars"
        )
    if not calendar.is_close(close):
        return (
            f"close_time {given} is when no {calendar.timeframe} bar of the calendar {calendar.name} closes; "
            "correct the time, or name the symbol's calendar in the settings"
        )
    if fault := _implausible(m):
        return f"{fault}; correct it, or leave the bar out"
    if m.trades is not None and not 0 <= m.trades < MOST:
        count = m.trades if abs(m.trades) < MOST else f"{'-' * (m.trades < 0)}10^15 or more"
        return f"trades {count} is not from 0 to below {MOST:g}; correct it, or leave it out"
    if m.vwap is not None and not LEAST < m.vwap < MOST:
        return f"vwap {m.vwap} is not between {LEAST:g} and {MOST:g}; correct it, or leave it out"
    return ""


def _implausible(m: BarMessage) -> str:
    """Which price or volume cannot be; empty when all can."""
    prices = {"open": m.open, "high": m.high, "low": m.low, "close": m.close}
    for field, price in prices.items():
        if not LEAST < price < MOST:
            return f"{field} {price} is no price between {LEAST:g} and {MOST:g}"
    if m.low > m.high:
        return f"low {m.low} is above high {m.high}"
    for field, price in prices.items():
        if not m.low <= price <= m.high:
            return f"{field} {price} is not between low {m.low} and high {m.high}"
    if not 0 <= m.volume < MOST:
        return f"volume {m.volume} is not from 0 to below {MOST:g}"
    return ""


def _finite(message: BarMessage) -> dict[str, Any]:
    """A message as plain data whose numbers JSON can hold."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    bad = {k: str(v) for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    return plain | bad


def messages(outcome: Outcome) -> Iterator[Outgoing]:
    """What subscribers are told of an outcome: signals, targets, that it is complete, what to send again."""
    group, root, timeframe = outcome.group, outcome.root, outcome.timeframe
    close = to_text(group.close_time)
    previous = None if group.previous is None else to_text(group.previous)
    names = list(outcome.forecasts)
    for name, forecast in outcome.forecasts.items():
        prices = forecast.reference * np.exp(forecast.quantiles)
        term, reasons = outcome.terms[name], list(outcome.degraded.get(name, ()))
        outlook = outcome.outlooks.get(name)
        yield _outgoing(
            Signal(
                schema=SCHEMA,
                id="",
                symbol=name,
                timeframe=timeframe,
                close_time=close,
                reference=forecast.reference,
                horizons=[Horizon(h, to_text(t)) for h, t in zip(forecast.horizons, term.ends, strict=True)],
                levels=list(forecast.levels),
                quantiles=[_rounded(row) for row in prices],
                mean=_rounded(forecast.mean),
                std=_rounded(forecast.std),
                rise=_rounded(forecast.rise),
                model=outcome.card.model,
                sampler=outcome.card.sampler,
                steps=outcome.card.steps,
                samples=outcome.card.samples,
                valid_until=to_text(term.valid_until),
                tradable=outcome.tradable(name),
                flags=["warming"] * forecast.warming + ["degraded"] * bool(reasons),
                reasons=reasons,
                group=GroupOfSignal(close, len(names), names[-1]),
                coverage=CoverageOfSignal.of(forecast.coverage) if forecast.coverage else None,
                touch=TouchOfSignal.of(outlook, forecast.reference) if outlook else None,
                drawdown=float(f"{outlook.drawdown:.9g}") if outlook else None,
            ),
            f"{root}/signals/{timeframe}/{name}",
            retain=True,
            expires=term.valid_until,
        )
    for strategy, targets in outcome.targets.items():
        for name, target in targets.items():
            expires = outcome.terms[name].valid_until
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
                    valid_until=to_text(expires),
                    tradable=outcome.tradable(name),
                ),
                f"{root}/targets/{strategy}/{timeframe}/{name}",
                retain=True,
                expires=expires,
            )
    last = max(term.valid_until for term in outcome.terms.values())
    yield _outgoing(
        GroupDone(
            schema=SCHEMA,
            id="",
            timeframe=timeframe,
            close_time=close,
            previous=previous,
            straggler=group.straggler,
            symbols=names,
            withheld=dict(outcome.withheld),
            missing=list(group.missing),
            model=outcome.card.model,
            valid_until=to_text(last),
            tradable=all(map(outcome.tradable, group.symbols)),
            refused=dict(outcome.refused),
            shed=outcome.shed,
        ),
        f"{root}/groups/{timeframe}",
        retain=False,
        expires=last,
    )
    for name, hole in ((name, hole) for name, own in outcome.holes.items() for hole in own):
        yield _outgoing(
            Backfill(
                schema=SCHEMA,
                id="",
                symbol=name,
                timeframe=timeframe,
                after=to_text(hole.after),
                before=to_text(hole.before),
                bars=hole.bars,
            ),
            f"{root}/backfill/{timeframe}/{name}",
            retain=False,
            expires=outcome.terms[name].valid_until,
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


def status(body: Status, topic: str, expires: int | None = None) -> Outgoing:
    """The retained message that says whether an instance processes bars; it never waits in the outbox."""
    return Outgoing("", topic, msgspec.json.encode(body), retain=True, expires=expires)


def _outgoing(
    body: Signal | Target | GroupDone | Backfill | DeadLetter | ModelNotice,
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
