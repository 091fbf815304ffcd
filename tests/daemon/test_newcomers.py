"""New symbols and holes: history for the one, requests for both, and bars that fill them by any way."""

import asyncio
import json
from contextlib import closing

import polars as pl
import pytest

from barcast.daemon.bars import bars_of
from barcast.daemon.config import load
from barcast.daemon.events import Warmth
from barcast.daemon.journal import Kind
from barcast.daemon.live import Decision
from barcast.daemon.newcomers import Newcomers
from barcast.daemon.ports import Warmup
from barcast.daemon.retention import compact
from barcast.models import Bar, DataError
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.rim import (
    MINUTELY,
    SECOND,
    Instance,
    Message,
    World,
    activation,
    outbox,
    path_of,
    revision,
)

DAY = 86_400 * SECOND
FIRST = 40
"""The minute with which the live bars begin."""


def write_bars(folder, symbol, minutes, name="h"):
    """A history file."""
    folder.mkdir(parents=True, exist_ok=True)
    bars = [bar(symbol, m) for m in minutes]
    times = pl.Series([b.close_time for b in bars]).cast(pl.Datetime("ns", "UTC"))
    columns = {n: [float(getattr(b, n)) for b in bars] for n in ("open", "high", "low", "close", "volume")}
    frame = pl.DataFrame({"symbol": [symbol] * len(bars), "close_time": times, **columns})
    frame.write_parquet(folder / f"{name}.parquet")


def opened(*_):
    """A model that needs 10 bars and looks back for 16."""
    return Spread(window=16, min_window=10)


class Live:
    """A daemon's own parts over a journal, taken from minute to minute."""

    def __init__(self, folder, symbols=()):
        self.folder = folder
        (folder / "barcast.toml").write_text('instance = "x"\nstate_dir = "."\ntimeframe = "1m"\n')
        self.world = World(time=START + FIRST * MINUTE)
        self.loop = asyncio.new_event_loop()
        self.start()
        self.decide(revision(settings(symbols, SECOND)), activation("spread", 16))

    def start(self):
        self.instance = Instance(self.folder / "journal.db", self.world, opened)
        config = load(self.folder / "barcast.toml")
        self.newcomers = Newcomers(config, self.world, self.instance.pipeline, self.instance.source)

    def restart(self):
        """As after a crash."""
        self.instance.close()
        self.start()

    def run(self, coroutine):
        """Let it happen, and whatever the path makes of it."""
        try:
            self.loop.run_until_complete(coroutine)
        finally:
            self.loop.run_until_complete(self.instance.run())

    def decide(self, *decisions):
        """Decide something."""

        async def decided():
            for decision in decisions:
                self.instance.source.decide(decision)

        self.run(decided())

    def take(self, *messages, minute=None):
        """Let messages come, by default now, and whatever follows happen."""
        if minute is not None:
            self.world.time = max(self.world.time, START + minute * MINUTE)
        self.world.deliver(*messages)
        self.loop.run_until_complete(self.instance.run())

    def look(self):
        """Look up who is new, and let the path take what was found."""
        self.run(self.newcomers.look())

    def said(self, kind):
        """The bodies of what was said under one kind of topic."""
        return [json.loads(m.payload) for m in outbox(self.instance.journal) if f"/{kind}/" in m.topic]

    def end(self):
        """The replay says the same, also from where a compaction left the journal."""
        told = path_of(outbox(self.instance.journal))
        assert self.instance.replayed() == told
        self.instance.close()
        self.loop.close()
        done = compact(self.folder, self.world.time, MINUTE, (), lambda: None)
        assert done.base
        with closing(Instance(self.folder / "journal.db", self.world, opened)) as again:
            rest = again.replayed()
        assert rest == told[len(told) - len(rest) :]


def one(symbol, minute, close=None):
    """A message with one bar."""
    return Message.of(bar(symbol, minute, close))


def array(symbol, minutes):
    """A message with many."""
    return Message.of(*(bar(symbol, m) for m in minutes), topic="t/bars/1m")


def test_new_symbol_is_warmed_from_files_added_meanwhile(tmp_path):
    """The first group of a new symbol is withheld; its history is journalled, and the next is forecast."""
    live = Live(tmp_path)
    write_bars(tmp_path / "history", "B", range(FIRST))
    live.take(one("A", FIRST), minute=FIRST)
    write_bars(tmp_path / "history", "A", range(FIRST - 30, FIRST), "added")
    live.look()
    live.take(one("A", FIRST + 1), minute=FIRST + 1)
    live.look()
    first, second = live.said("groups")
    assert first["withheld"] == {"A": "1 of at least 10 bars"}
    assert second["symbols"] == ["A"]
    assert live.said("backfill") == []
    kinds = [r.kind for r in live.instance.journal.records()]
    assert kinds.count(Kind.NEWCOMER) == 1
    warmth = Warmth.decode(live.instance.journal.last(Kind.NEWCOMER).payload)
    assert (warmth.symbol, len(warmth.bars)) == ("A", 16)
    assert live.instance.journal.last(Kind.WARMUP) is None
    live.end()


def test_archive_warms_as_well(tmp_path):
    """What left a journal is history for a symbol that comes back to a new one; the archive wins."""
    write_bars(tmp_path / "history", "A", range(FIRST - 9, FIRST))
    archive = tmp_path / "archive"
    archive.mkdir()
    frame = pl.DataFrame(
        {"symbol": ["A"], "close_time": [START + (FIRST - 1) * MINUTE]}
        | {n: [7.0] for n in ("open", "high", "low", "close", "volume", "vwap")}
        | {"trades": [3], "timeframe": ["1m"]}
    ).with_columns(pl.col("close_time").cast(pl.Datetime("ns", "UTC")))
    frame.write_parquet(archive / "bars-2023-11-14.parquet")
    found = bars_of(tmp_path, ["A", "Z"], MINUTELY, START + FIRST * MINUTE, 16)
    assert [b.close for b in found["A"]][-1] == 7.0
    assert len(found["A"]) == 9
    assert found["Z"] == ()


def test_crash_before_the_look_up_forgets_nobody(tmp_path):
    """Who was new before a crash is looked up after it."""
    live = Live(tmp_path)
    live.take(one("A", FIRST), minute=FIRST)
    live.restart()
    write_bars(tmp_path / "history", "A", range(FIRST - 30, FIRST))
    live.look()
    live.restart()
    live.look()
    live.take(one("A", FIRST + 1), minute=FIRST + 1)
    assert live.said("groups")[-1]["symbols"] == ["A"]
    live.end()


def test_unreadable_history_is_looked_up_again(tmp_path):
    """A file that is not whole yet decides nothing."""
    live = Live(tmp_path)
    live.take(one("A", FIRST), minute=FIRST)
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "h.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(DataError, match=r"h\.parquet cannot be read"):
        live.look()
    write_bars(tmp_path / "history", "A", range(FIRST - 30, FIRST))
    live.look()
    live.take(one("A", FIRST + 1), minute=FIRST + 1)
    assert live.said("groups")[-1]["symbols"] == ["A"]
    live.end()


def test_symbol_without_history_is_asked_for_once(tmp_path):
    """The bars before its first one are asked for, as many as the model looks back for, and never again."""
    live = Live(tmp_path)
    live.take(one("A", FIRST), minute=FIRST)
    live.look()
    assert live.said("backfill") == []
    live.take(one("A", FIRST + 1), minute=FIRST + 1)
    [asked] = live.said("backfill")
    assert (asked["symbol"], asked["bars"]) == ("A", 14)
    assert asked["before"] == "2023-11-14T22:54:00Z"
    assert asked["after"] == "2023-11-14T22:39:00Z"
    live.restart()
    live.look()
    for minute in (FIRST + 2, FIRST + 3):
        live.take(one("A", minute), minute=minute)
    assert live.said("backfill") == [asked]
    sent = range(FIRST - 14, FIRST)
    live.take(array("A", sent), minute=FIRST + 3)
    assert [g["symbols"] for g in live.said("groups")] == [[]] * 4
    live.take(one("A", FIRST + 4), minute=FIRST + 4)
    assert live.said("groups")[-1]["symbols"] == ["A"]
    [signal] = live.said("signals")
    assert (signal["close_time"], signal["flags"]) == ("2023-11-14T22:58:00Z", [])
    live.end()


def test_hole_of_a_symbol_that_lacks_bars_is_asked_for_too(tmp_path):
    """What is missing between its bars, and what is missing before them, are two requests."""
    live = Live(tmp_path)
    live.take(one("A", FIRST), minute=FIRST)
    live.look()
    live.take(one("A", FIRST + 3), minute=FIRST + 3)
    asked = [(b["after"][11:16], b["before"][11:16], b["bars"]) for b in live.said("backfill")]
    assert asked == [("22:39", "22:54", 14), ("22:54", "22:57", 2)]
    live.end()


def test_backtests_and_old_journals_ask_for_nothing(tmp_path):
    """Without a decision about its history a new symbol is only withheld."""
    live = Live(tmp_path)
    for minute in range(FIRST, FIRST + 4):
        live.take(one("A", minute), minute=minute)
    assert live.said("backfill") == []
    assert [g["symbols"] for g in live.said("groups")] == [[]] * 4
    live.end()


def holed(tmp_path, missing):
    """A symbol with whole windows of which some minutes are missing right before its newest bar."""
    live = Live(tmp_path, ("A",))
    live.decide(warm(range(FIRST - 30, FIRST)))
    live.take(one("A", FIRST), minute=FIRST)
    newest = FIRST + missing + 1
    live.take(one("A", newest), minute=newest)
    return live, newest


def warm(minutes):
    """The warm-up of a start."""
    bars = [bar("A", m) for m in minutes]
    warmth = Warmth("x", 16, tuple(Bar(b.symbol, b.close_time, *map(float, b.values)) for b in bars))
    return Decision(Kind.WARMUP, warmth.encode(), warmth.event)


@pytest.mark.parametrize("how", ["array", "one by one", "backwards", "twice"])
def test_bars_sent_again_fill_the_hole(tmp_path, how):
    """Sent as ordinary bars they end `degraded` with the next bar, and are no signal themselves."""
    live, newest = holed(tmp_path, 1)
    [asked] = live.said("backfill")
    assert asked["bars"] == 1
    assert live.said("signals")[-1]["reasons"] == ["1 of the last 10 bars are missing"]
    before = len(outbox(live.instance.journal))
    again = [FIRST + 1]
    match how:
        case "array":
            live.take(array("A", range(FIRST - 5, newest)), minute=newest)
        case "one by one":
            live.take(*(one("A", m) for m in again), minute=newest)
        case "backwards":
            live.take(*(one("A", m) for m in reversed(range(FIRST, newest))), minute=newest)
        case _:
            live.take(array("A", again), one("A", again[0]), array("A", again), minute=newest)
    assert len(outbox(live.instance.journal)) == before
    live.take(one("A", newest + 1), minute=newest + 1)
    assert live.said("signals")[-1]["flags"] == []
    assert live.said("backfill") == [asked]
    live.end()


def test_part_of_a_hole_leaves_the_rest(tmp_path):
    """With some of the bars the signal is withheld no more, and degraded by the rest until that comes."""
    live, newest = holed(tmp_path, 3)
    assert live.said("groups")[-1]["withheld"] == {"A": "3 of the last 10 bars are missing"}
    [asked] = live.said("backfill")
    assert (asked["after"][11:16], asked["before"][11:16], asked["bars"]) == ("22:54", "22:58", 3)
    live.take(array("A", [FIRST + 1, FIRST + 3]), minute=newest)
    live.take(one("A", newest + 1), minute=newest + 1)
    assert live.said("signals")[-1]["reasons"] == ["1 of the last 10 bars are missing"]
    live.take(one("A", FIRST + 2), minute=newest + 1)
    live.take(one("A", newest + 2), minute=newest + 2)
    assert live.said("signals")[-1]["flags"] == []
    assert live.said("backfill") == [asked]
    live.end()


def test_wrong_bars_fill_no_hole(tmp_path):
    """What is off the grid, of another symbol, impossible, or older than all that is kept fills nothing."""
    live, newest = holed(tmp_path, 1)
    body = json.loads(one("A", FIRST + 1).payload)
    off = body | {"close_time": "2023-11-14T22:55:30Z"}
    mad = body | {"low": body["high"] * 2}
    live.take(
        *(Message("t/bars/1m/A", json.dumps(b).encode()) for b in (off, mad)),
        Message("t/bars/1m/A", one("B", FIRST + 1).payload),
        one("A", -10_000),
        minute=newest,
    )
    live.take(one("A", newest + 1), minute=newest + 1)
    assert live.said("signals")[-1]["flags"] == ["degraded"]
    assert len([m for m in outbox(live.instance.journal) if "/deadletter/" in m.topic]) == 3
    live.take(one("A", FIRST + 1, close=400.0), minute=newest + 1)  # a bar, and a wrong one
    live.take(one("A", newest + 2), minute=newest + 2)
    assert "the price jumped" in live.said("signals")[-1]["reasons"][0]
    live.take(one("A", FIRST + 1), minute=newest + 2)
    live.take(one("A", newest + 3), minute=newest + 3)
    assert live.said("signals")[-1]["flags"] == []
    live.end()


def test_request_covers_a_downtime_longer_than_the_session(tmp_path):
    """When the broker kept nothing, the first bar after it asks for all that closed meanwhile."""
    live, newest = holed(tmp_path, 8 * 1440)
    [asked] = live.said("backfill")
    assert asked["bars"] == 8 * 1440
    assert live.said("groups")[-1]["withheld"] != {}
    live.take(array("A", range(FIRST + 1, newest)), minute=newest)
    live.take(one("A", newest + 1), minute=newest + 1)
    assert live.said("signals")[-1]["flags"] == []
    assert live.said("backfill") == [asked]
    live.end()


def test_warm_up_of_one_symbol_is_not_that_of_all():
    """The event names the symbol, and older payloads are read as before."""
    assert Warmth("d", 1, ()).event(5) == Warmup(5, "d", ())
    assert Warmth.decode(Warmth("d", 1, (), "A").encode()).event(5) == Warmup(5, "d", (), "A")
