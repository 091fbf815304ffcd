"""Markets that shut: the right groups, no false hole, and a replay that says the same.

The closes in here are written down by hand, in the local time of each market, not asked of a calendar.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from barcast.backtest.replay import Recording, replay
from barcast.daemon.events import events
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Decision, LiveSink, Scribe
from barcast.daemon.pipeline import Pipeline, Settings, run
from barcast.daemon.ports import Activation, Revision
from barcast.daemon.wire import to_ns
from barcast.models import Bar
from tests.fakes import Spread
from tests.rim import Message, Silent, World, outbox, source

SECOND, HOUR = 10**9, 3600 * 10**9
HOURS = {"EURUSD": "fx", "USDJPY": "fx", "AAPL": "XNYS", "IBM": "XNYS", "SAP": "XETR"}
MODEL = Spread(window=12, min_window=6)


def at(place: str, *local: int) -> int:
    """Nanoseconds of a local time."""
    zones = {"NY": "America/New_York", "FFM": "Europe/Berlin", "UTC": "UTC"}
    return to_ns(datetime(*local, tzinfo=ZoneInfo(zones[place])))  # type: ignore[arg-type, misc]


def hourly(place: str, day: Sequence[int], first: tuple[int, int], last: tuple[int, int]) -> list[int]:
    """Every hour from a local time of a day without a clock change to another, and the last one itself."""
    return [*range(at(place, *day, *first), at(place, *day, *last), HOUR), at(place, *day, *last)]


@dataclass(frozen=True)
class Told:
    """What a group message said, and the flags of its signals."""

    close: int
    came: tuple[str, ...]
    missing: tuple[str, ...]
    flags: frozenset[str]


@dataclass(frozen=True)
class Run:
    """The groups of a live run, in order, and the topics on which bars were asked for."""

    groups: list[Told]
    asked: list[str]


def price(symbol: str, close: int) -> float:
    return 100 + len(symbol) + (close // HOUR * 7919 % 13) / 10


def live(
    folder: Path, closes: dict[str, list[int]], configured: bool, timeframe: str = "1h", hours=HOURS
) -> Run:
    """Send each symbol's bars one by one, a second after their close and after each other.

    The journal of the run is replayed; its messages must be those of the run.
    """
    folder.mkdir()
    names = sorted(closes)
    settings = Settings(
        root="t",
        timeframe=timeframe,
        calendar="24x7" if timeframe == "1h" else "XNYS",
        calendars={symbol: hours[symbol] for symbol in names if symbol in hours},
        symbols=tuple(names) if configured else (),
        max_wait=20 * SECOND,
        sampler=None,
        steps=None,
        strategies=(),
    )
    sent = sorted((close, symbol) for symbol, own in closes.items() for close in own)
    body = {"model": "spread", "fingerprint": "numpy", "window": 12, "reason": "test"}
    first = sent[0][0] - HOUR
    revision = Decision(Kind.REVISION, settings.encode(), lambda time: Revision(time, settings.encode()))
    activation = Decision(
        Kind.ACTIVATION, json.dumps(body).encode(), lambda time: Activation(time, "spread", "numpy", 12)
    )
    script = [(first, lambda s: s.decide(revision)), (first, lambda s: s.decide(activation))]
    for close, symbol in sent:
        delay = (1 + names.index(symbol)) * SECOND
        p = price(symbol, close)
        bar = Bar(symbol, close, p, p + 1, p - 1, p, 10.0)
        script.append((close + delay, [Message.of(bar, topic=f"t/bars/{timeframe}/{symbol}")]))
    journal = Journal(folder / "journal.db")
    scribe, world = Scribe(journal), World(time=first)
    world.script.extend(sorted(script, key=lambda step: step[0]))
    src = source(world, scribe, calendars=settings.bar_calendars())

    asyncio.run(run(src, Pipeline(lambda *_: MODEL), LiveSink(scribe, src, Silent())))
    said = outbox(journal)
    again = Recording()
    replay((event for _, event in events(journal.records())), Pipeline(lambda *_: MODEL), again)
    scribe.close()
    assert not [m for m in said if "/deadletter/" in m.topic]
    assert [(m.id, m.payload) for m in said] == [(m.id, m.payload) for m in again.messages]
    groups, flags = [], set()
    for message in said:
        told = json.loads(message.payload)
        if "/signals/" in message.topic:
            flags.update(told["flags"])
        elif "/groups/" in message.topic:
            moment = to_ns(datetime.fromisoformat(told["close_time"]))
            came = tuple(sorted([*told["symbols"], *told["withheld"]]))
            groups.append(Told(moment, came, tuple(told["missing"]), frozenset(flags)))
            flags = set()
    return Run(groups, [m.topic for m in said if "/backfill/" in m.topic])


def expected(closes: dict[str, list[int]]) -> list[tuple[int, tuple[str, ...]]]:
    """All symbols of a close in one group, and nobody is waited for."""
    together: dict[int, list[str]] = {}
    for symbol in sorted(closes):
        for close in closes[symbol]:
            together.setdefault(close, []).append(symbol)
    return [(close, tuple(together[close])) for close in sorted(together)]


def whole(run: Run, closes: dict[str, list[int]]) -> None:
    """Every group is complete, nothing is degraded, and no bar is asked for."""
    assert [(g.close, g.came) for g in run.groups] == expected(closes)
    assert all(g.missing == () for g in run.groups)
    assert all("degraded" not in g.flags for g in run.groups)
    assert run.asked == []


def day_and_night(start: int, stop: int) -> list[int]:
    """Every full hour from `start` to `stop`."""
    return list(range(-(-start // HOUR) * HOUR, stop + 1, HOUR))


def test_fx_sunday_open_over_both_clock_changes(tmp_path):
    """The week ends on Friday 17:00 and begins on Sunday 17:00 New York, also over a clock change."""
    for k, (friday, sunday, monday) in enumerate(
        [((2026, 3, 6), (2026, 3, 8), (2026, 3, 9)), ((2026, 10, 30), (2026, 11, 1), (2026, 11, 2))]
    ):
        week = [*hourly("NY", friday, (5, 0), (17, 0)), *hourly("NY", sunday, (18, 0), (23, 0))]
        week += hourly("NY", monday, (0, 0), (9, 0))
        assert (week[13] - week[12]) // HOUR == (48 if k == 0 else 50)
        closes = {
            "BTCUSD": day_and_night(week[0], week[-1]),
            "EURUSD": week,
            "USDJPY": week,
        }
        for configured in (True, False):
            run = live(tmp_path / f"{k}{configured}", closes, configured)
            if configured:
                whole(run, closes)
            else:  # the first bar of each symbol is not expected by anybody yet
                late = [g for g in run.groups if g.close > week[0]]
                whole(Run(late, run.asked), {s: [c for c in own if c > week[0]] for s, own in closes.items()})


def test_closed_hours_are_holes_of_a_market_that_never_shuts(tmp_path):
    """The control: the same bars under 24x7 are waited for, degraded and asked for again."""
    week = [*hourly("NY", (2026, 3, 6), (5, 0), (17, 0)), *hourly("NY", (2026, 3, 8), (18, 0), (23, 0))]
    closes = {"BTCUSD": day_and_night(week[0], week[-1]), "EURUSD": week}
    run = live(tmp_path / "run", closes, True, hours={})
    assert [g.close for g in run.groups if g.missing == ("EURUSD",)] == sorted(
        set(closes["BTCUSD"]) - set(week)
    )
    assert run.asked == ["t/backfill/1h/EURUSD"]


def test_us_half_day_and_holiday(tmp_path):
    """After Thanksgiving the session ends at 13:00 with a bar of half an hour; Thursday has none."""
    wednesday = [*hourly("NY", (2025, 11, 26), (10, 30), (15, 30)), at("NY", 2025, 11, 26, 16)]
    friday = [*hourly("NY", (2025, 11, 28), (10, 30), (12, 30)), at("NY", 2025, 11, 28, 13)]
    monday = [*hourly("NY", (2025, 12, 1), (10, 30), (15, 30)), at("NY", 2025, 12, 1, 16)]
    stock = wednesday + friday + monday
    closes = {"AAPL": stock, "BTCUSD": day_and_night(wednesday[0], monday[-1])}
    whole(live(tmp_path / "hourly", closes, True), closes)
    daily = [at("NY", 2025, 11, d, 16) for d in (18, 19, 20, 21, 24, 25, 26)]
    daily += [at("NY", 2025, 11, 28, 13), at("NY", 2025, 12, 1, 16)]
    whole(live(tmp_path / "daily", {"AAPL": daily}, True, "session"), {"AAPL": daily})


def test_clock_changes_of_two_continents(tmp_path):
    """Between the changes of New York and Frankfurt the two are an hour closer; neither sees a hole."""
    for k, days in enumerate(
        [
            [(2026, 3, d) for d in (5, 6, 9, 10, 26, 27, 30, 31)],
            [(2026, 10, d) for d in (22, 23, 26, 27, 29, 30)] + [(2026, 11, 2), (2026, 11, 3)],
        ]
    ):
        # Two stretches: the days between are a real hole, so each stretch is a run of its own.
        for part in (days[:4], days[4:]):
            closes = {
                "AAPL": [c for d in part for c in (*hourly("NY", d, (10, 30), (15, 30)), at("NY", *d, 16))],
                "SAP": [
                    c for d in part for c in (*hourly("FFM", d, (10, 0), (17, 0)), at("FFM", *d, 17, 30))
                ],
            }
            whole(live(tmp_path / f"{k}{part[0]}", closes, True), closes)


def test_bar_outside_the_hours_of_its_symbol_is_refused(tmp_path):
    """A Saturday bar is a bar of BTCUSD and a dead letter of EURUSD, which says whose hours were meant."""
    saturday = at("UTC", 2026, 3, 7, 12)
    folder = tmp_path / "journal.db"
    scribe, world = Scribe(Journal(folder)), World(time=saturday)
    settings = Settings(
        root="t",
        timeframe="1h",
        calendar="24x7",
        calendars=HOURS,
        symbols=(),
        max_wait=SECOND,
        sampler=None,
        steps=None,
        strategies=(),
    )
    both = [Bar(s, saturday, 1.0, 1.0, 1.0, 1.0, 0.0) for s in ("BTCUSD", "EURUSD")]
    world.deliver(Message.of(*both, topic="t/bars/1h"))
    src = source(world, scribe, calendars=settings.bar_calendars())
    arrival = asyncio.run(src.next(None))
    [letter] = [json.loads(m.payload) for m in outbox(scribe.journal)]
    scribe.close()
    assert [bar.symbol for bar in arrival.bars] == ["BTCUSD"]
    assert "no 1h bar of the calendar fx closes" in letter["reason"]


def test_listing_and_delisting(tmp_path):
    """A symbol that appears is waited for from its next group on, one that goes for three of its own groups.

    Closed hours do not count: a stock that was delisted on Friday is still missed on Monday.
    """
    friday = [*hourly("NY", (2026, 1, 9), (10, 30), (15, 30)), at("NY", 2026, 1, 9, 16)]
    monday = [*hourly("NY", (2026, 1, 12), (10, 30), (15, 30)), at("NY", 2026, 1, 12, 16)]
    closes = {
        "AAPL": friday,  # delisted over the weekend
        "BTCUSD": day_and_night(friday[0], monday[-1]),
        "NEWUSD": day_and_night(monday[0], monday[-1]),
        "IBM": friday + monday,
    }
    run = live(tmp_path / "run", closes, False)
    by_close = {g.close: g for g in run.groups}
    assert [by_close[c].missing for c in monday] == [("AAPL",)] * 3 + [()] * 4
    assert all(by_close[c].missing == () for c in closes["BTCUSD"] if c not in monday)
    first, second = closes["NEWUSD"][:2]
    came = [g.came for g in run.groups if g.close == first]
    assert came in ([("BTCUSD",), ("NEWUSD",)], [("BTCUSD", "NEWUSD")])
    assert by_close[second].came == ("BTCUSD", "NEWUSD")
    assert all("degraded" not in g.flags for g in run.groups)
    assert run.asked == []


def test_delisted_but_configured_symbol_is_named(tmp_path):
    """A configured symbol that stays away is waited for and named in its groups, and only there."""
    friday = [*hourly("NY", (2026, 1, 9), (10, 30), (15, 30)), at("NY", 2026, 1, 9, 16)]
    closes = {"AAPL": friday[:2], "BTCUSD": day_and_night(friday[0], friday[-1] + 30 * HOUR)}
    half_past = {"IBM": friday}
    run = live(tmp_path / "run", closes | half_past, True)
    missing = {g.close: g.missing for g in run.groups if g.missing}
    assert missing == dict.fromkeys(friday[2:], ("AAPL",))
