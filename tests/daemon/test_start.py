"""What a start decides, what it refuses before anything is journalled, and which bars a trainer sees."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from barcast.backtest.sample import sample_strategy
from barcast.daemon import bars as daemon_bars
from barcast.daemon import start as daemon_start
from barcast.daemon.app import Daemon, Outside, WallClock
from barcast.daemon.bars import known_bars
from barcast.daemon.config import load
from barcast.daemon.events import Champion, Warmth, events
from barcast.daemon.gate import Verdict
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Scribe
from barcast.daemon.pipeline import Pipeline, Settings
from barcast.daemon.start import opening, try_all, warmth
from barcast.daemon.store import ModelStore
from barcast.daemon.succession import Succession
from barcast.daemon.wire import encode_bars
from barcast.models import Adjustment, Bar, ConfigError, Windows
from tests.fakes import MINUTE, START, Spread, bar
from tests.fakes import settings as path_settings
from tests.replayed import Replayed, replay_journal

LEAST = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n'


def start(folder, text=LEAST):
    """A daemon as it is before it serves: its journal is open, its decisions are not taken."""
    path = folder / "barcast.toml"
    path.write_text(text)
    daemon = Daemon(load(path), {}, asyncio.Event(), None, Outside())
    daemon.config.state_dir.mkdir(exist_ok=True)
    daemon.scribe = Scribe(Journal(daemon.config.state_dir / "journal.db"))
    daemon.store = ModelStore(daemon.config.state_dir / "models", daemon.config.timeframe)
    daemon.pipeline = Pipeline(daemon.store.open)
    return daemon


class Decided:
    """In the place of the source: what was decided, which the path takes at once."""

    def __init__(self):
        self.decisions, self.caught_up = [], asyncio.Event()
        self.caught_up.set()

    @property
    def kinds(self):
        return [decision.kind for decision in self.decisions]

    def decide(self, decision):
        self.decisions.append(decision)


class Written(Decided):
    """The same, and whoever waits for the journal goes on."""

    def decide(self, decision):
        super().decide(decision)
        written = asyncio.get_running_loop().create_future()
        written.set_result(None)
        return written


def found(daemon):
    """What this start finds to decide."""
    return opening(daemon.config, daemon.scribe.journal, daemon.store, daemon.clock.now())


def succession(daemon, source):
    """Who decides about models, in front of a source."""
    parts = (daemon.scribe, daemon.store, daemon.pipeline, source, None)
    return Succession(daemon.config, daemon.clock, *parts, daemon.forecasts, found(daemon))


def decisions(daemon):
    """What this start decides."""
    source, daemon.forecasts = Decided(), None
    succession(daemon, source).open()
    return source.decisions


def decide(daemon, time=START):
    """Take the decisions and write them into the journal as the source would."""
    taken = decisions(daemon)
    daemon.scribe.journal.append([(time, d.kind, "", d.payload) for d in taken])
    return taken


def history(folder, minutes, close=100.0):
    """A history file of symbol A."""
    target = folder / "state" / "history"
    target.mkdir(parents=True, exist_ok=True)
    bars = [bar("A", m, close) for m in minutes]
    times = pl.Series([b.close_time for b in bars]).cast(pl.Datetime("ns", "UTC"))
    columns = {n: [getattr(b, n) for b in bars] for n in ("open", "high", "low", "close", "volume")}
    pl.DataFrame({"symbol": ["A"] * len(bars), "close_time": times, **columns}).write_parquet(
        target / "h.parquet"
    )


def test_first_start_decides_everything_and_the_next_nothing(tmp_path):
    """Settings, model and history are journalled once, and again only when they change."""
    history(tmp_path, range(1, 300))
    daemon = start(tmp_path)
    kinds = [d.kind for d in decide(daemon)]
    assert kinds == [Kind.REVISION, Kind.ACTIVATION, Kind.WARMUP]
    daemon.scribe.close()
    again = start(tmp_path)
    assert decisions(again) == []
    again.scribe.close()
    changed = start(tmp_path, LEAST + 'max_wait = "5s"\n')
    assert [d.kind for d in decisions(changed)] == [Kind.REVISION]
    history(tmp_path, range(1, 301))
    assert [d.kind for d in decisions(changed)] == [Kind.REVISION, Kind.WARMUP]
    changed.scribe.close()


def test_model_that_looks_back_further_is_warmed_from_the_same_history(tmp_path):
    """A warm-up that took fewer bars than the next model needs is taken again, with more."""
    history(tmp_path, range(1, 900))
    daemon = start(tmp_path)
    [warmup] = [d for d in decide(daemon) if d.kind == Kind.WARMUP]
    length = Warmth.decode(warmup.payload).length
    last = daemon.scribe.journal.last(Kind.WARMUP)
    now = daemon.clock.now()
    assert warmth(daemon.config, length, length, last, now) == []
    [more] = warmth(daemon.config, length + 50, length, last, now)
    assert len(more.bars) == length + 50
    daemon.scribe.close()


def test_model_that_looks_back_further_finds_all_that_is_known(tmp_path, monkeypatch):
    """Its windows go on from the history through the journal without a splice; a record has whole symbols."""
    monkeypatch.setattr(daemon_start, "PART_BARS", 1000)
    history(tmp_path, range(1, 301))
    daemon = start(tmp_path)
    decide(daemon)
    rows = [
        (
            bar(symbol, m, 99.0).close_time,
            Kind.BARS,
            f"barcast/v1/bars/1m/{symbol}",
            encode_bars([bar(symbol, m, 99.0)]),
        )
        for m in range(301, 1001)
        for symbol in ("A", "B")
    ]
    daemon.scribe.journal.append(rows)
    last = daemon.scribe.journal.last(Kind.WARMUP)
    parts = warmth(daemon.config, 900, 709, last, START + 2000 * MINUTE)
    minutes = [[(b.symbol, (b.close_time - START) // MINUTE) for b in part.bars] for part in parts]
    assert minutes == [[("A", m) for m in range(101, 1001)], [("B", m) for m in range(301, 1001)]]
    assert warmth(daemon.config, 709, 709, last, START + 2000 * MINUTE) == []
    monkeypatch.setattr(daemon_bars, "AT_ONCE", 100)  # read in pieces, each cut to what is wanted
    assert warmth(daemon.config, 900, 709, last, START + 2000 * MINUTE) == parts
    daemon.scribe.close()


@pytest.mark.parametrize("params", ["{ horizon = 7 }", "{ band = 0.98 }"])
def test_strategy_that_the_model_cannot_serve_is_refused_at_the_start(tmp_path, params):
    """A strategy that needs another horizon or level is refused before its settings are journalled."""
    daemon = start(tmp_path, LEAST + f'[[strategy]]\nkind = "quantile-band"\nparams = {params}\n')
    with pytest.raises(ConfigError):
        decide(daemon)
    assert daemon.scribe.journal.last(Kind.REVISION) is None
    daemon.scribe.close()


def test_strategy_whose_file_changed_is_journalled_anew(tmp_path):
    """A strategy whose file is another one since the last start makes other settings; the same makes none."""
    mine = tmp_path / "mine.py"
    mine.write_text(sample_strategy().read_text())
    text = LEAST + '[[strategy]]\nkind = "mine.py"\n'
    digests = []
    for change in (False, False, True):
        if change:
            mine.write_text(mine.read_text() + "\n")
        daemon = start(tmp_path, text)
        if Kind.REVISION in [d.kind for d in decide(daemon)]:
            record = daemon.scribe.journal.last(Kind.REVISION)
            digests.append(Settings.decode(record.payload).strategies[0].digest)
        daemon.scribe.close()
    assert len(set(digests)) == len(digests) == 2
    kept = {path.stem: path.read_bytes() for path in (tmp_path / "state" / "strategies").iterdir()}
    assert list(map(len, kept)) == [16, 16]
    assert set(kept) == set(digests)
    assert kept[digests[1]] == mine.read_bytes() == kept[digests[0]] + b"\n"


def test_state_of_another_timeframe_is_refused(tmp_path):
    """Bars of two lengths never share a state directory."""
    daemon = start(tmp_path)
    decide(daemon)
    daemon.scribe.close()
    other = start(tmp_path, LEAST.replace("1m", "1h"))
    with pytest.raises(ConfigError, match="holds 1m bars on 24x7, not 1h on 24x7"):
        found(other)
    other.scribe.close()


def test_clock_far_behind_the_journal_is_refused(tmp_path):
    """A journal from the future would make every bar stale: it is named instead."""
    daemon = start(tmp_path)
    decide(daemon, time=4_000_000_000 * 10**9)
    with pytest.raises(ConfigError, match=r"2096-10-02.*set the clock right"):
        found(daemon)
    daemon.scribe.close()


def test_history_beyond_the_clock_is_not_taken(tmp_path):
    """A rehearsal does not see the bars that its clock has not reached."""
    history(tmp_path, range(1, 400))
    now = datetime.fromtimestamp((START + 300 * 60 * 10**9) // 10**9, UTC).isoformat()
    text = LEAST + f"[rehearsal]\nstart = {now}\nat = {datetime.now(UTC).isoformat()}\nspeed = 1\n"
    daemon = start(tmp_path, text)
    [warmup] = [d for d in decide(daemon) if d.kind == Kind.WARMUP]
    daemon.scribe.close()
    assert max(b.close_time for b in Warmth.decode(warmup.payload).bars) == bar("A", 300).close_time
    config = load(tmp_path / "barcast.toml")
    known = known_bars(config.state_dir, config.bar_calendars(), WallClock(config).now())
    assert len(known["A"]) == 300


def test_trainer_sees_the_bars_that_the_windows_hold(tmp_path):
    """The journal wins over the history, a correction over its bar, and neither over what came after it."""
    history(tmp_path, [1, 2, 3], close=50.0)
    daemon = start(tmp_path)
    decide(daemon)
    first, better = bar("A", 3, close=60.0), bar("A", 3, close=61.0)
    arrivals = [bar("A", 2, close=70.0), first, better, first, Bar("B", START, 1, 1, 1, 1, 0)]
    rows = [
        (START + 180 * 10**9 + i, Kind.BARS, f"barcast/v1/bars/1m/{b.symbol}", encode_bars([b]))
        for i, b in enumerate(arrivals)
    ]
    daemon.scribe.journal.append(rows)
    daemon.scribe.close()
    history(tmp_path, [1, 2, 3], close=55.0)
    config = load(tmp_path / "barcast.toml")
    known = known_bars(config.state_dir, config.bar_calendars(), START + 10**18)
    assert known["A"].values[:, 3].tolist() == [55.0, 70.0, 61.0]
    assert list(known) == ["A", "B"]


def test_replay_under_another_fingerprint_names_both(tmp_path):
    """Bytes are promised within one fingerprint: a replay says of what was forecast under which it was."""
    daemon = start(tmp_path)
    decide(daemon)
    daemon.scribe.close()
    path = tmp_path / "state" / "journal.db"
    assert replay_journal(path) == Replayed([])
    journal = Journal(path)
    elsewhere = Champion("fhs", "numpy=0.1", 8, "test").encode()
    journal.append([(START + 1, Kind.ACTIVATION, "", elsewhere)])
    assert replay_journal(path).fingerprints == ()  # nothing was forecast under it
    journal.append([(START + MINUTE, Kind.BARS, "barcast/v1/bars/1m/A", encode_bars([bar("A", 1, 100.0)]))])
    journal.close()
    [(recorded, own)] = replay_journal(path).fingerprints
    assert recorded == "numpy=0.1"
    assert own.startswith("numpy=")
    assert json.loads(elsewhere)["window"] == 8


def test_rehearsal_clock_stands_until_it_begins(tmp_path):
    """Before its real moment the clock shows its start; after it, it runs as fast as it is told."""
    path = tmp_path / "barcast.toml"

    def clock(at):
        text = f"[rehearsal]\nstart = 2012-01-03T00:00:00Z\nat = {at.isoformat()}\nspeed = 3600\n"
        path.write_text(LEAST + text)
        return WallClock(load(path))

    begin = 1_325_548_800 * 10**9
    early = clock(datetime.now(UTC) + timedelta(seconds=100))
    assert early.now() == begin
    assert 100 < early.seconds_until(begin + 3600 * 10**9) + 1 < 102.1
    late = clock(datetime.now(UTC) - timedelta(seconds=100))
    assert abs(late.now() - begin - 360_000 * 10**9) < 3600 * 10**9
    assert late.seconds_until(begin) == 0


class Asked(Spread):
    """Notes what it was asked of: symbol, bars and oldest close of each window, and the decisions by then."""

    def __init__(self, decided, **how):
        super().__init__(**how)
        self.asked, self.decided = [], decided

    def forecast(self, windows):
        self.asked += [(w.symbol, len(w), w.close_times[0], tuple(self.decided.kinds)) for w in windows]
        return super().forecast(windows)


def served(folder, text, work):
    """Do some work of a daemon that has recovered from its journal."""
    daemon = start(folder, text)
    decide(daemon)
    for _, event in events(daemon.scribe.journal.records()):
        assert list(daemon.pipeline.take(event)) == []

    async def main():
        daemon.source = Written()
        daemon.succession = succession(daemon, daemon.source)
        await work(daemon)

    with ThreadPoolExecutor(1) as daemon.forecasts:
        asyncio.run(main())
    daemon.scribe.close()
    return daemon


@pytest.mark.parametrize(("symbols", "expected"), [([], ["A", "B"]), (["B", "Z"], ["B"])])
def test_champion_is_asked_of_each_symbol_once_at_the_start(tmp_path, symbols, expected):
    """Of those that are configured, or of all that have bars enough; what was there is taken first."""
    asked = []

    async def work(daemon):
        for symbol, count in (("A", 9), ("B", 5), ("C", 2)):
            for minute in range(count):
                daemon.pipeline.windows.put(bar(symbol, minute))
        model = daemon.pipeline._forecaster = Asked(daemon.source)
        daemon.source.caught_up.clear()
        waiting = asyncio.create_task(daemon.succession.prepare_champion())
        await asyncio.sleep(0.01)
        assert model.asked == []
        daemon.source.caught_up.set()
        await waiting
        asked.extend(model.asked)

    served(tmp_path, LEAST + f"symbols = {json.dumps(symbols)}\n", work)
    assert [(symbol, bars) for symbol, bars, *_ in asked] == [
        (symbol, {"A": 8, "B": 5}[symbol]) for symbol in expected
    ]


def test_challenger_is_asked_before_it_takes_over_of_all_that_it_will_see(tmp_path):
    """Its windows reach into the history further than the champion's; only then is it activated."""
    history(tmp_path, range(1, 900))
    asked = []

    async def work(daemon):
        windows = daemon.pipeline.windows
        windows.put(bar("A", 900))
        windows.put(bar("B", 900))
        kept = len(windows.cut("A", bar("A", 900).close_time, 10_000))
        assert kept < 800
        model = Asked(daemon.source, window=800)
        daemon.store.adopt = lambda _: "spread"
        daemon.store.known_until = lambda _: START
        daemon.store.open = lambda *_: model
        await daemon.succession.promote(
            tmp_path / "x", Verdict(accepted=True, reason="better", challenger="x", champion="y"), "fhs"
        )
        asked.extend(model.asked)
        assert daemon.source.kinds == [Kind.ACTIVATION, Kind.WARMUP]
        assert len(windows.cut("A", bar("A", 900).close_time, 10_000)) == kept

    served(tmp_path, LEAST, work)
    assert asked == [("A", 800, bar("A", 101).close_time, ())]


def test_foreseen_window_is_a_copy_on_the_basis_of_its_newest_bar():
    """Bars that come later, or are corrected, leave it alone; adjustments are applied; history is added."""
    windows = Windows(3)
    for minute in (5, 6, 7):
        windows.put(bar("A", minute, 100.0))
    windows.adjust(Adjustment("A", START + 6 * MINUTE, 0.5, "split"))
    older = [bar("A", minute, 80.0) for minute in (3, 4)]
    seen = windows.foreseen("A", 4, older)
    assert seen.values[:, 3].tolist() == [40.0, 50.0, 50.0, 100.0]
    windows.put(bar("A", 7, 99.0))
    windows.put(bar("A", 8, 98.0))
    assert seen.values[:, 3].tolist() == [40.0, 50.0, 50.0, 100.0]
    assert len(windows.cut("A", START + 7 * MINUTE, 9)) == 3
    assert windows.foreseen("B", 4, []) is None
    assert windows.foreseen("B", 4, [bar("B", 1)]).symbol == "B"


def test_trial_is_of_the_configured_symbols_at_the_newest_close(monkeypatch):
    """What a strategy looks up by symbol or time it finds on trial, whenever the daemon starts."""
    tried = []
    monkeypatch.setattr("barcast.daemon.start.try_strategies", lambda *given: tried.append(given[2:]))
    for late in (1, 10**9):
        try_all(path_settings(("A", "B")), Spread(), START + 5 * MINUTE + late)
    assert tried == [(("A", "B"), START + 5 * MINUTE)] * 2
