"""A witness of its own: what must hold after a schedule, worked out again from what is in the journal."""

import json
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from barcast.backtest.verify import verify
from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import Champion, Warmth
from barcast.daemon.journal import Kind, State
from barcast.daemon.timeframe import Timeframe
from barcast.models import Adjustment, Bar, Window
from tests.fakes import Spread
from tests.simulation.market import BAR, ROOT, SECOND, TIMEFRAME
from tests.simulation.trainer import forecaster

if TYPE_CHECKING:
    from tests.simulation.world import Schedule

LENGTH = BAR * SECOND
CALENDARS = Calendars("24x7", Timeframe.parse(TIMEFRAME))
Values = tuple[float, ...]


def judge(schedule: "Schedule") -> None:
    """Tell the schedule of every promise that was not kept."""
    checks = (acknowledged, one_body, in_order, delivered, told_of, windows, replayed, decisions)
    for check in checks:
        for fault in check(schedule):
            schedule.violate(f"{check.__name__}: {fault}")


def acknowledged(schedule: "Schedule") -> Iterator[str]:
    """What was acknowledged is in the journal as often, what was bad of it in a dead letter."""
    stored = Counter(
        (r.topic, r.payload) for r in schedule.records.values() if r.kind in (Kind.BARS, Kind.ADJUSTMENT)
    )
    letters: Counter[tuple[str, str]] = Counter()
    for message in schedule.told.values():
        if "/deadletter/" in message.topic:
            body = json.loads(message.payload)
            letters[body["topic"], body["payload"]] += 1
    sent = {(one.topic, one.payload): one for one in schedule.sent}
    acked = Counter((one.topic, one.payload) for one in schedule.broker.acked.values())
    for key, times in acked.items():
        if key not in sent:
            continue  # a canary
        one = sent[key]
        if one.good and stored[key] < times:
            yield f"{key} was acknowledged {times} times and is in the journal {stored[key]} times"
        if not one.good and stored[key]:
            yield f"{key} is in the journal and cannot be used"
        # A dead letter is known by its body: two of one moment are one.
        if one.bad is not None and not letters[one.topic, one.bad]:
            yield f"{key} was acknowledged, and no dead letter tells of it"
    for key, times in stored.items():
        if times > schedule.broker.handed[key]:
            yield f"{key} came {schedule.broker.handed[key]} times and is in the journal {times} times"


def one_body(schedule: "Schedule") -> Iterator[str]:
    """What is published is in the outbox as it is; an id has one body, a topic and close one id."""
    told = {message.id: message for message in schedule.told.values()}
    if len(told) != len(schedule.told):
        yield "an id is in the outbox twice"
    about: dict[tuple[str, str], str] = {}
    for published in schedule.broker.published:
        kind = published.topic.split("/")[1]
        if kind in ("status", "bars"):
            continue
        body = json.loads(published.payload)
        message = told.get(body["id"])
        if message is None or (message.topic, message.payload) != (published.topic, published.payload):
            yield f"published on {published.topic} and not in the outbox as such: {published.payload!r}"
        if kind in ("signals", "targets") or (kind == "groups" and not body["straggler"]):
            one = about.setdefault((published.topic, body["close_time"]), body["id"])
            if one != body["id"]:
                yield f"{published.topic} of {body['close_time']} is {one} and {body['id']}"
    closes: dict[tuple[str, str], str] = {}
    for message in schedule.told.values():
        if message.topic.split("/")[1] in ("signals", "targets"):
            body = json.loads(message.payload)
            one = closes.setdefault((message.topic, body["close_time"]), message.id)
            if one != message.id:
                yield f"the outbox has {message.topic} of {body['close_time']} as {one} and {message.id}"


def in_order(schedule: "Schedule") -> Iterator[str]:
    """A topic's messages come in the order of the outbox; one may come again, none late."""
    rank = {message.id: n for n, message in schedule.told.items()}
    last: dict[str, int] = {}
    for published in schedule.broker.published:
        if published.topic.split("/")[1] in ("status", "bars"):
            continue
        n = rank.get(json.loads(published.payload)["id"], -1)
        if n < last.get(published.topic, 0):
            yield f"{published.topic}: number {n} came after {last[published.topic]}"
        last[published.topic] = n


def delivered(schedule: "Schedule") -> Iterator[str]:
    """Every message of the outbox was delivered, or its time had come."""
    taken = {
        json.loads(p.payload)["id"]
        for p in schedule.broker.published
        if p.topic.split("/")[1] not in ("status", "bars")
    }
    for n, message in schedule.told.items():
        state = schedule.states.get(n)
        expired = message.expires is not None and message.expires <= schedule.clock.latest
        if state is State.PENDING and n > schedule.promised:
            continue  # a training that ended while the daemon said good-bye: the next start sends it
        if state is State.PENDING:
            yield f"number {n} on {message.topic} is still pending"
        elif message.id not in taken and (state is State.DELIVERED or not expired):
            yield f"number {n} on {message.topic} is {state!r} and was never taken by the broker"


class Known:
    """What has been stored of each symbol, step by step; the state is the bars, and what was declared."""

    def __init__(self) -> None:
        self.bars: dict[str, dict[int, Values]] = {}
        self.seen: set[tuple[str, int, Values]] = set()
        self.adjustments: dict[str, list[Adjustment]] = {}

    def put(self, bar: Bar) -> bool:
        """Take a bar; whether it is the newest of its symbol."""
        own = self.bars.setdefault(bar.symbol, {})
        newest = max(own, default=-1)
        values = tuple(map(float, bar.values))
        if (bar.symbol, bar.close_time, values) not in self.seen:
            own[bar.close_time] = values
            self.seen.add((bar.symbol, bar.close_time, values))
        return bar.close_time > newest

    def window(self, symbol: str, close: int, length: int) -> Window | None:
        """The last bars of a symbol up to a close, on the basis of that one."""
        own = self.bars.get(symbol, {})
        if close not in own:
            return None
        times = sorted(time for time in own if time <= close)[-length:]
        values = np.array([own[time] for time in times])
        for adjustment in self.adjustments.get(symbol, ()):
            if adjustment.time < close:
                older = np.array(times) <= adjustment.time
                values[older, :4] *= adjustment.factor
                if adjustment.kind == "split":
                    values[older, 4] /= adjustment.factor
        return Window(symbol, np.array(times), values)


def history(schedule: "Schedule") -> Iterator[tuple[int, Known, list[tuple[Bar, bool]], set[str]]]:
    """Record by record: when, what is known then, the bars that came and whether newest, whose bars moved."""
    known = Known()
    for seq in sorted(schedule.records):
        record = schedule.records[seq]
        came: list[tuple[Bar, bool]] = []
        moved: set[str] = set()
        if record.kind == Kind.BARS:
            bars, _ = wire.decode(record.topic, record.payload, record.time, ROOT, CALENDARS)
            came = [(bar, known.put(bar)) for bar in bars]
        elif record.kind in (Kind.WARMUP, Kind.NEWCOMER):
            warmth = Warmth.decode(record.payload)
            for bar in warmth.bars:
                if bar.close_time not in known.bars.get(bar.symbol, {}):
                    known.put(bar)
            moved |= {bar.symbol for bar in warmth.bars}
        elif record.kind == Kind.ADJUSTMENT:
            found = wire.declared(record.topic, record.payload, ROOT)
            assert isinstance(found, Adjustment)
            own = known.adjustments.setdefault(found.symbol, [])
            if found not in own:
                own[:] = sorted([a for a in own if a.time != found.time] + [found], key=lambda a: a.time)
            moved.add(found.symbol)
        moved |= {bar.symbol for bar, _ in came}
        yield record.time, known, came, moved


def paused(schedule: "Schedule") -> Iterator[tuple[int, int]]:
    """From when to when it was paused, by the times of the records."""
    since = None
    for seq in sorted(schedule.records):
        record = schedule.records[seq]
        if record.kind == Kind.PAUSE and since is None:
            since = record.time
        elif record.kind == Kind.RESUME and since is not None:
            yield since, record.time
            since = None
    if since is not None:
        yield since, 1 << 62


def told_of(schedule: "Schedule") -> Iterator[str]:
    """Each bar that was the newest of its symbol, and not stale, is told of in one group of its close.

    One whose group may have left during a pause may be in none.
    """
    expected: Counter[tuple[str, str]] = Counter()
    perhaps: Counter[tuple[str, str]] = Counter()
    pauses = list(paused(schedule))
    for time, _, came, _ in history(schedule):
        for bar, newest in came:
            if newest and time <= bar.close_time + 2 * LENGTH:
                expected[wire.to_text(bar.close_time), bar.symbol] += 1
                leaves = max(time, bar.close_time) + LENGTH
                perhaps[wire.to_text(bar.close_time), bar.symbol] += any(
                    since <= leaves and time <= until for since, until in pauses
                )
    told: Counter[tuple[str, str]] = Counter()
    signals: Counter[tuple[str, str]] = Counter()
    for message in schedule.told.values():
        kind = message.topic.split("/")[1]
        if kind == "groups":
            body = json.loads(message.payload)
            told.update((body["close_time"], name) for name in (*body["symbols"], *body["withheld"]))
            for name in body["symbols"]:
                if signals[body["close_time"], name] != 1:
                    yield f"the group of {body['close_time']} names {name}, which has no signal before it"
        elif kind == "signals":
            body = json.loads(message.payload)
            signals[body["close_time"], body["symbol"]] += 1
    for key in expected - perhaps - told:
        yield f"{key} is due and in no group"
    for key in told - expected:
        yield f"{key} is in a group and should not be"


def windows(schedule: "Schedule") -> Iterator[str]:
    """Every signal is what its model says of a window that ends with its close, of bars that were stored."""
    wanted: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for message in schedule.told.values():
        if message.topic.split("/")[1] == "signals":
            body = json.loads(message.payload)
            close = wire.to_ns(msgspec.convert(body["close_time"], type=datetime))
            wanted.setdefault((body["symbol"], close), []).append(body)
    models: dict[str, Spread] = {}
    for _, known, _, moved in history(schedule):
        for key, bodies in wanted.items():
            if bodies and key[0] in moved:
                wanted[key] = [body for body in bodies if not _says(schedule, models, known, key, body)]
    for (symbol, close), bodies in wanted.items():
        for body in bodies:
            yield f"the signal {body['id']} of {symbol} at {close} is of no window that was stored"


def _says(
    schedule: "Schedule", models: dict[str, Spread], known: Known, key: tuple[str, int], body: dict[str, Any]
) -> bool:
    model = body["model"]
    if model not in models:
        folder = None if model in ("fhs", "hs") else schedule.folder / "models" / model
        models[model] = forecaster(model, TIMEFRAME, folder)
    window = known.window(*key, models[model].card.window)
    if window is None or len(window) < 2:
        return False
    forecast = models[model]._one(window)
    prices = forecast.reference * np.exp(forecast.quantiles)
    return bool(
        body["reference"] == forecast.reference
        and np.allclose(body["quantiles"], prices, rtol=1e-8, atol=0)
        and np.allclose(body["std"], forecast.std, rtol=1e-7, atol=0)
    )


def replayed(schedule: "Schedule") -> Iterator[str]:
    """A replay of the journal says what is in the outbox, byte for byte."""
    difference = verify(schedule.folder / "journal.db")
    if not difference.agrees:
        yield difference.sentence()


def decisions(schedule: "Schedule") -> Iterator[str]:
    """What an operator was told is done is in the journal; every activation was told of."""
    champions = [Champion.decode(r.payload) for r in schedule.records.values() if r.kind == Kind.ACTIVATION]
    for verb, answer in schedule.answers:
        if verb == "rollback" and not any(
            c.returned and answer.startswith(f"{c.model} serves again") for c in champions
        ):
            yield f"an operator was told {answer!r}, and the journal knows of none"
        if verb == "retrain" and answer.startswith("promoted") and len(champions) < 2:
            yield f"an operator was told {answer!r}, and the journal knows of none"
    notices = [json.loads(m.payload) for m in schedule.told.values() if m.topic.split("/")[1] == "models"]
    said = {notice["model"] for notice in notices}
    for champion in champions:
        if champion.model not in said:
            yield f"nobody was told that {champion.model} serves"
