"""The audit finds what looks ahead, whatever its seed, and nothing where nothing does."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest import replay
from barcast.backtest.audit import REMOVED, Audit, Trial, Violation, audit, audit_backtest, poisoned
from barcast.backtest.cli.auditing import _first, _kept, _print, _verdict
from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars, sample_strategy
from barcast.daemon.history import History
from barcast.daemon.wire import to_ns
from barcast.models import Adjustment, ConfigError, DataError, open_model
from barcast.strategies import KINDS
from tests.garch import simulate

HOUR = 3_600_000_000_000
VALUES = ("open", "high", "low", "close", "volume")
CLOSE, SEEDS = pl.col("close"), (1, 2, 3)

PEEKS = """
from dataclasses import dataclass
from functools import cache
import polars as pl

CLOSE = pl.col("close")
RETURN = CLOSE.log().diff()
COLUMNS = {
    "honest": RETURN * 20,
    "centred": (CLOSE / CLOSE.rolling_mean(9, center=True, min_samples=1) - 1) * 20,
    "normalised": (RETURN - RETURN.mean()) / RETURN.std() / 5,
    "shifted": (CLOSE.shift(-1) / CLOSE).log() * 20,
}

@cache
def table(file, column):
    rows = pl.read_parquet(file).sort("close_time").unique(maintain_order=True)
    rows = rows.with_columns(COLUMNS[column].over("symbol").clip(-1, 1).alias("x")).drop_nulls("x")
    return {(s, t): x for s, t, x in rows.select("symbol", pl.col("close_time").to_physical(), "x").rows()}

@dataclass(frozen=True)
class Peek:
    name: str
    file: str
    column: str = "honest"

    def on_forecasts(self, close_time, forecasts):
        known = table(self.file, self.column)
        return {s: known[s, close_time] for s in forecasts if (s, close_time) in known}
"""

CHECK = """
    def check(self, known, symbol, close_time):
        if (symbol, close_time) not in known:
            raise LookupError(f"nothing in {self.file}")
"""


def hourly(count=260, symbols=("UP", "DOWN")):
    """Bars of two symbols around the clock, stamped by their close."""
    frames = []
    for name in symbols:
        w = simulate(name, count, seed=5).window
        columns = {n: w.values[:, i] for i, n in enumerate(VALUES)}
        frames.append(pl.DataFrame({"symbol": [name] * len(w), "ns": w.close_times} | columns))
    times = pl.from_epoch("ns", "ns").dt.replace_time_zone("UTC").alias("close_time")
    return pl.concat(frames).select("symbol", times, *VALUES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with hourly bars, and a strategy that reads the whole frame of them."""
    folder = tmp_path_factory.mktemp("audited")
    hourly().write_parquet(folder / "bars.parquet")
    (folder / "peek.py").write_text(PEEKS)
    return folder


def audited(folder, *columns, since=200, **changes):
    """An audit of strategies that trade by these columns of the folder's bars."""
    bars, first = folder / "bars.parquet", hourly(1)["close_time"][0]
    strategies = [f"{folder / 'peek.py'}:file={bars},column={name},name={name}" for name in columns]
    start = None if since is None else to_ns(first) + since * HOUR
    settings = {"model": "ewma", "stamp": "close", "strategies": strategies, "since": start, "cuts": 2}
    return audit_backtest(changes.pop("files", bars), **(settings | changes))


@pytest.mark.parametrize("seed", SEEDS)
def test_strategies_that_peek_are_found_and_others_are_not(folder, seed):
    """A centred mean, a whole frame's scale and the next bar's close are each found, and named.

    Each value is told with the cut, the row and both runs' values, and how many bars ahead it must look.
    """
    found = audited(folder, "honest", "centred", "normalised", "shifted", seed=seed)
    assert not found.passed
    assert {one.strategy for one in found.violations} == {"centred", "normalised", "shifted"}
    for strategy, ahead in (("centred", 4), ("shifted", 1)):
        own = [one for one in found.violations if one.strategy == strategy]
        assert {one.cut for one in own if one.check == "cut"} == set(found.cuts)
        assert max(one.ahead for one in own) == ahead
    [first, *_] = [one for one in found.violations if one.strategy == "centred"]
    assert (first.frame, first.field, first.check) == ("targets", "target", "cut")
    assert first.symbol in ("UP", "DOWN")
    assert first.whole != first.other
    told = json.loads(found.json())
    assert told["passed"] is False
    assert told["violations"][0]["cut"].endswith("Z")


def test_parameters_of_strategies_are_given_the_copy(folder, tmp_path, monkeypatch):
    """Whether named by an argument, by a default, by another spelling or as a folder: the copy is read."""
    monkeypatch.chdir(folder)
    source = PEEKS.replace("file: str\n", 'file: str = "bars.parquet"\n')
    (tmp_path / "mine.py").write_text(source)
    for text in (
        f"{tmp_path / 'mine.py'}:column=shifted",
        f"{folder}/peek.py:column=shifted,file=./bars.parquet",
    ):
        found = audited(folder, strategies=[text])
        assert {one.strategy for one in found.violations} == {"Peek"}
        assert found.unseen == ()
    inside = PEEKS.replace("read_parquet(file)", 'read_parquet(f"{file}/bars.parquet")')
    (tmp_path / "inside.py").write_text(inside)
    parts = tmp_path / "parts"
    parts.mkdir()
    hourly().write_parquet(parts / "bars.parquet")
    text = f"{tmp_path / 'inside.py'}:column=shifted,file={parts}"
    assert not audited(folder, files=parts, strategies=[text]).passed


def test_other_files_of_strategies_are_cut_too_or_named(folder, tmp_path):
    """A frame of features that is no file with bars is cut by its own times; what cannot be is told."""
    features = hourly().select("symbol", "close_time", "close")
    features.write_parquet(tmp_path / "features.parquet")
    text = f"{folder / 'peek.py'}:column=shifted,file={tmp_path / 'features.parquet'}"
    assert not audited(folder, strategies=[text]).passed
    stray = PEEKS.replace("file: str\n", f'file: str\n    notes: str = "{tmp_path / "notes.txt"}"\n')
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "stray.py").write_text(stray)
    text = f"{tmp_path / 'stray.py'}:file={folder / 'bars.parquet'}"
    found = audited(folder, strategies=[text], cuts=1)
    assert found.passed
    [sentence] = found.unseen
    assert "notes.txt as notes, which could not be cut" in sentence


def test_whatever_only_fails_without_a_future_is_found(folder, tmp_path):
    """A strategy that needs the bar after each close raises in a cut run: that is a violation, too.

    Its error names the file that it was given, not the copy.
    """
    missing = "if close_time and s in forecasts and (self.check(known, s, close_time) or True)"
    source = PEEKS.replace("if (s, close_time) in known", missing) + CHECK
    (tmp_path / "raises.py").write_text(source)
    text = f"{tmp_path / 'raises.py'}:column=shifted,file={folder / 'bars.parquet'}"
    found = audited(folder, strategies=[text], until=to_ns(hourly()["close_time"][250]))
    assert [one.field for one in found.violations if one.check == "cut"] == ["error"] * 2
    assert f"LookupError: nothing in {folder / 'bars.parquet'}" in found.violations[0].other


def test_what_a_module_keeps_is_forgotten(folder, tmp_path):
    """A strategy that reads its file once and keeps it in a variable is loaded anew for each run."""
    kept = "known = KEPT.setdefault(0, table(self.file, self.column))"
    source = PEEKS.replace("known = table(self.file, self.column)", kept) + "\nKEPT = {}\n"
    (tmp_path / "keeps.py").write_text(source)
    text = f"{tmp_path / 'keeps.py'}:column=shifted,file={folder / 'bars.parquet'}"
    found = audited(folder, strategies=[text], cuts=1)
    assert {one.check for one in found.violations} >= {"cut"}


def test_what_begins_or_is_declared_after_a_cut_is_no_fault(folder, tmp_path, monkeypatch):
    """Before its first bar a symbol that was asked for is left out, and a split before it is declared."""
    late = hourly().filter((pl.col("symbol") == "UP") | (pl.int_range(pl.len()).over("symbol") >= 255))
    late.write_csv(tmp_path / "late.csv", datetime_format="%Y-%m-%dT%H:%M:%SZ")
    split = Adjustment("UP", to_ns(late["close_time"][258]), 0.5, "split")
    declared = {}

    def noted(**settings):
        result = run_backtest(**settings)
        declared[result.bars["close_time"].max()] = settings["adjustments"]
        return result

    monkeypatch.setattr("barcast.backtest.audit.run_backtest", noted)
    symbols = ["UP", "DOWN"]
    found = audited(
        folder, "honest", files=tmp_path / "late.csv", symbols=symbols, adjustments=[split], since=0
    )
    assert found.passed
    assert found.unseen == ()
    assert sorted(map(len, declared.values())) == [0, 0, 1]


STATES = """
from dataclasses import dataclass, field

COUNT = 0

@dataclass
class Keeps:
    name: str
    most: int = 1
    seen: dict = field(default_factory=dict, init=False)

class Module(Keeps):
    def on_forecasts(self, close_time, forecasts):
        global COUNT
        COUNT += 1
        return dict.fromkeys(forecasts, COUNT % self.most / self.most)

class Own(Keeps):
    def on_forecasts(self, close_time, forecasts):
        before, self.seen = self.seen or forecasts, dict(forecasts)
        return {s: float(f.reference > before[s].reference) for s, f in forecasts.items()}

class Begins(Keeps):
    def on_forecasts(self, close_time, forecasts):
        held = self.seen.setdefault("held", forecasts["UP"].close_time)
        if self.most and close_time > held and close_time < held + 40 * 3_600_000_000_000:
            raise LookupError("not yet")
        return dict.fromkeys(forecasts, 0.5)
"""


def test_strategies_that_keep_a_state_are_found(folder, tmp_path):
    """A counter in the module, whatever its period, and what an instance remembers: found by a later start.

    Nothing of them looks ahead; each is named with symbol, close and both values, and signals are the same.
    """
    (tmp_path / "states.py").write_text(STATES)
    file, peek = tmp_path / "states.py", f"{folder / 'peek.py'}:file={folder / 'bars.parquet'}"
    kept = [f"{file}:Module:most={n},name=c{n}" for n in (2, 3, 5)] + [f"{file}:Own"]
    found = audited(folder, strategies=[peek, *kept])
    assert {one.strategy for one in found.violations} == {"c2", "c3", "c5", "Own"}
    changed = {(one.check, one.frame, one.field) for one in found.violations}
    assert changed == {("start", "targets", "target"), ("anew", "targets", "target")}
    later = [trial for trial in found.trials if trial.check == "start"]
    assert [trial.cut for trial in later] == [*found.starts] == [found.starts[0], found.starts[0] + HOUR]
    assert all(one.close_time >= one.cut and one.whole != one.other for one in found.violations)
    assert found.warmup is not None
    told = json.loads(found.json())
    assert told["violations"][0]["symbol"] in ("UP", "DOWN")
    assert all(start.endswith("Z") for start in told["starts"])


HOLDS = """
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Holds:
    name: str
    band: float = 0.02
    file: str = ""
    held: dict = field(default_factory=dict, init=False)

    def on_forecasts(self, close_time, forecasts):
        for symbol, forecast in forecasts.items():
            lean = 2 * forecast.rise.item(0) - 1
            if abs(lean) > self.band:
                self.held[symbol] = 1.0 if lean > 0 else -1.0
        return {symbol: self.held.get(symbol, 0.0) for symbol in forecasts}
"""
"""One that goes on with what it held as long as the forecast leans to neither side."""


def test_strategy_that_holds_on_is_found(tmp_path):
    """What it keeps shows at few closes, far from one another: each is asked of an instance made anew."""
    hourly(520).write_parquet(tmp_path / "bars.parquet")
    (tmp_path / "holds.py").write_text(HOLDS)
    (tmp_path / "peek.py").write_text(PEEKS)
    peek = f"{tmp_path / 'peek.py'}:file={tmp_path / 'bars.parquet'}"
    mine = [f"{tmp_path / 'holds.py'}:name={name},band={band}" for name, band in (("on", 0.003), ("off", -1))]
    found = audited(tmp_path, strategies=[*mine, peek, "rank"], model="fhs", since=None, cuts=1, seed=2)
    assert {(one.strategy, one.field) for one in found.violations} == {("on", "target")}
    own = [one for one in found.violations if one.check == "anew"]
    assert own
    assert all(one.cut == one.close_time and one.other == 0 for one in own)
    assert set(found.asked) > {one.cut for one in own}
    assert len(found.asked) > 100
    [trial] = [trial for trial in found.trials if trial.check == "anew"]
    assert trial.values > 4 * len(found.asked)
    assert 0 < trial.differ < trial.values / 10


def test_run_that_fails_when_it_begins_later_is_found(folder, tmp_path):
    """A strategy that only works with what it once saw is a violation, not the end of the audit."""
    first = to_ns(hourly(1)["close_time"][0]) + 200 * HOUR
    (tmp_path / "states.py").write_text(STATES.replace("if self.most", f"if held > {first}"))
    found = audited(folder, strategies=[f"{tmp_path / 'states.py'}:Begins"], since=200)
    assert {(one.check, one.field) for one in found.violations} == {("start", "error")}
    assert "LookupError: not yet" in found.violations[0].other
    assert found.warmup is None


def test_symbol_that_is_away_is_no_state(folder, tmp_path):
    """One whose market is shut at a later start has the same targets as in the whole run when it opens."""
    friday, sunday = (datetime(2024, 1, day, 22, tzinfo=UTC) for day in (12, 14))
    weeks = pl.col("close_time"), pl.col("close_time").dt.offset_by("7d")
    shut = pl.any_horizontal(time.is_between(friday, sunday, closed="right") for time in weeks)
    hourly(400).filter((pl.col("symbol") == "DOWN") | ~shut).write_parquet(tmp_path / "bars.parquet")
    settings = {"strategies": ["vol-target"], "calendars": {"UP": "fx"}, "cuts": 1, "since": 230}
    settings["until"] = to_ns(hourly(400)["close_time"][350])
    found = audited(folder, files=tmp_path / "bars.parquet", **settings)
    assert to_ns(friday) < found.starts[0] < to_ns(sunday)
    assert found.passed


def test_what_does_not_repeat_itself_is_said(folder, tmp_path, monkeypatch):
    """Dice in a strategy end an audit before the cuts: nothing could be told from them.

    No run is compared with the baselines, of which nothing is told.
    """
    asked = []
    monkeypatch.setattr(
        "barcast.backtest.audit.run_backtest", lambda **given: asked.append(given) or run_backtest(**given)
    )
    source = PEEKS.replace("known[s, close_time] for", "__import__('random').random() for")
    (tmp_path / "dice.py").write_text(source)
    found = audited(folder, strategies=[f"{tmp_path / 'dice.py'}:file={folder / 'bars.parquet'}"])
    assert found.cuts == ()
    assert {one.check for one in found.violations} == {"repeat"}
    assert [given["baselines"] for given in asked] == [False, False]


def test_shipped_strategies_look_at_nothing_later(tmp_path):
    """All shipped strategies pass on the shipped bars; signals look as far back as the model says."""
    bars = pl.read_parquet(sample_bars()).filter(pl.col("close_time") > datetime(2010, 6, 1, tzinfo=UTC))
    bars.filter(pl.col("symbol").is_in(["AAPL", "IBM"])).write_parquet(tmp_path / "bars.parquet")
    found = audit_backtest(
        tmp_path / "bars.parquet",
        stamp="close",
        calendar="XNYS",
        strategies=[*KINDS, f"{sample_strategy()}:least=0.1"],
        since="2013-02-01",
        cuts=2,
        adjustments=[Adjustment("AAPL", to_ns(datetime(2013, 2, 15, 21, tzinfo=UTC)), 0.5, "split")],
    )
    assert found.passed
    assert [trial.check for trial in found.trials] == [
        "repeat",
        *["cut", "poison"] * 2,
        *["start"] * 2,
        "anew",
    ]
    assert all(trial.values > 100 and not trial.ended for trial in found.trials)
    assert found.warmup.settled in (found.warmup.window, found.warmup.window - 1)
    assert [row["missing"] for row in found.data["symbols"]] == [0, 0]


# A pipeline of one's own, as in a notebook: it takes frames and gives frames.


def recent(outcome):
    """The width that nine in ten of the last outcomes were within."""
    return outcome.abs().rolling_quantile(0.9, window_size=100, min_samples=20)


def overall(outcome):
    """The width that nine in ten of all outcomes are within."""
    return outcome.abs().quantile(0.9)


def calibrated(bars, width=None):
    """A quantile as wide as `width` says of the outcomes in deviations; by default of those known by then."""
    outcome = pl.col("r").shift(-1) / pl.col("std")
    made = (
        bars.unique()
        .sort("symbol", "close_time")
        .with_columns(r=CLOSE.log().diff().over("symbol"), horizon=1)
        .with_columns(std=pl.col("r").rolling_std(50).over("symbol"))
        .with_columns(width=(width(outcome) if width else recent(outcome.shift(1))).over("symbol"))
        .with_columns(q95=pl.col("width") * pl.col("std"))
        .drop_nulls("q95")
    )
    return {"signals": made.select("symbol", "close_time", "horizon", "std", "q95")}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [recent, overall])
def test_pipeline_of_ones_own_is_audited(width, seed):
    """A calibration by later outcomes is found, and one by those that were known by then is not."""
    assert audit(calibrated, [hourly()], cuts=4, seed=seed).passed
    found = audit(lambda bars: calibrated(bars, width), [hourly()], cuts=4, seed=seed)
    assert not found.passed
    assert {(one.frame, one.field) for one in found.violations} <= {("signals", "q95"), ("signals", "row")}


class Peeking:
    """A forecaster whose quantiles are wider where the next bar turned out to move far."""

    def __init__(self, inner, seen):
        self.card, self._inner, self._seen = inner.card, inner, seen

    def forecast(self, windows):
        """See `Forecaster.forecast`."""
        return [self._wider(forecast) for forecast in self._inner.forecast(windows)]

    def _wider(self, forecast):
        own = self._seen[forecast.symbol]
        later = own.values[own.close_times > forecast.close_time, 3]
        move = abs(np.log(later[0] / forecast.reference)) if len(later) else 0.0
        wider = 1 + min(1.0, move / forecast.std[0])
        return msgspec.structs.replace(forecast, quantiles=forecast.quantiles * wider)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_forecaster_that_peeks_is_found(folder, monkeypatch, seed):
    """Quantiles that know the outcome are found in the signals, whatever the strategy makes of them."""
    seen = {}

    def read(*arguments):
        history = History(*arguments)
        seen.update(history)
        return history

    monkeypatch.setattr(replay, "History", read)
    monkeypatch.setattr(replay, "open_model", lambda *a: Peeking(open_model(*a), seen))
    found = audited(folder, "honest", seed=seed)
    signals = [one for one in found.violations if one.frame == "signals"]
    assert {one.cut for one in signals} == set(found.cuts)
    assert {one.ahead for one in signals} == {1}
    assert {one.field[0] for one in signals} == {"q"}


@pytest.mark.parametrize("span", [30, 50])
def test_how_far_back_signals_look_is_found(span):
    """A rolling window settles at its length; an exponential one goes on counting its oldest bar."""

    def signals(std):
        def told(bars):
            made = bars.unique().sort("symbol", "close_time").with_columns(std=std.over("symbol"))
            return {"signals": made.with_columns(q50="std").drop_nulls("std")}

        return told

    found = audit(signals(CLOSE.rolling_std(span)), [hourly()], cuts=1, window=40).warmup
    assert (found.window, found.settled, found.most) == (40, span, 260)
    told = {reach.bars: reach for reach in found.tried}
    assert told[span].distance < 1e-9
    assert told[40].lacking == (2 if span > 40 else 0)
    found = audit(signals(CLOSE.ewm_std(span=1000)), [hourly()], cuts=1, window=40).warmup
    assert found.settled == found.most == 260
    assert found.tried[0].distance > 0.1


def test_bits_count_and_cuts_begin_with_the_signals():
    """Minus zero is not zero, no number is no number, and nothing is cut before the first signal."""
    bars = hourly(30, symbols=["UP"])
    begin = pl.col("close_time") >= bars["close_time"][20]

    def told(frame):
        zero = 0.0 if frame.height == bars.height else -0.0
        made = frame.unique().select("symbol", "close_time", x=pl.lit(zero), y=pl.lit(float("nan")))
        return {"early": made.filter(~begin).drop("x"), "signals": made.filter(begin)}

    found = audit(told, [bars], cuts=3)
    cut = {(one.frame, one.field) for one in found.violations if one.check == "cut"}
    assert cut == {("signals", "x")}
    assert min(found.cuts) >= to_ns(bars["close_time"][20])


def test_wide_frames_are_compared_column_by_column():
    """A symbol's own column that only begins after the cut is empty before; one that changed is found."""
    late = (pl.col("symbol") == "UP") | (pl.int_range(pl.len()).over("symbol") >= 150)
    bars = hourly(200).filter(late)

    def told(frame, column="close"):
        wide = frame.unique().sort("close_time", "symbol").with_columns(gone=CLOSE - CLOSE.mean())
        return {"features": wide.pivot("symbol", index="close_time", values=column)}

    assert audit(told, [bars], cuts=4).passed
    found = audit(lambda frame: told(frame, "gone"), [bars], cuts=1)
    assert {one.field for one in found.violations} >= {"UP"}
    assert found.trials[1].differ > [one.check for one in found.violations].count("cut") == 20


def test_trainings_count_once_their_moment_is_past():
    """Cuts are closes of bars; a training that is over at a cut itself is of the time after it."""
    bars = hourly(40, symbols=["UP"])

    def told(frame):
        frame = frame.unique().sort("close_time")
        ends = frame.select(judged="close_time", crps="close").vstack(
            frame.select(judged=pl.col("close_time").dt.offset_by("-30m"), crps=pl.col("close").shift(1))
        )
        return {"trainings": ends.filter(pl.col("judged") < frame["close_time"].max()), "signals": frame}

    found = audit(told, [bars], cuts=40)
    assert found.passed
    assert len(found.cuts) == 39
    assert all(trial.values for trial in found.trials)


def test_poison_is_valid_and_wild():
    """Poisoned bars are bars, in every file the same, and each differs; those before stay to the bit."""
    bars = hourly().with_columns(feature=pl.int_range(pl.len()))
    texts = bars.select(pl.all().cast(pl.String)).rename({"close": "Close", "close_time": "time"})
    ns = bars["close_time"].to_physical().to_numpy()
    cut = int(np.unique(ns)[100])
    one, other = poisoned([bars, texts], [ns, ns], cut, np.random.default_rng(3), "close_time")
    before = pl.col("close_time").to_physical() <= cut
    assert_frame_equal(one.filter(before), bars.filter(before))
    after = one.filter(~before)
    assert after.filter(pl.col("low") > pl.min_horizontal("open", "close")).height == 0
    assert after.filter(pl.col("high") < pl.max_horizontal("open", "close")).height == 0
    assert (after.select(VALUES).min_horizontal() > 0).all()
    kept = after.unique(["symbol", "close_time"])
    was = bars.filter(~before)
    assert 0 < was.height - kept.height < 3 * REMOVED * was.height
    assert after.height > kept.height
    both = was.join(kept, on=["symbol", "close_time"], suffix="_now")
    assert (both["close"] != both["close_now"]).mean() > 0.9
    assert (both["feature"] != both["feature_now"]).mean() > 0.9
    prices = other.select(pl.col("open", "high", "low", "Close", "volume").cast(pl.Float64))
    assert_frame_equal(prices.rename({"Close": "close"}), one.select(VALUES))


def test_faults_of_the_caller_are_one_sentence(folder):
    """No cuts, no times, nothing told: what to do is said."""
    with pytest.raises(ConfigError, match="cuts = 0: give a number from 1"):
        audit(calibrated, [hourly()], cuts=0)
    with pytest.raises(ConfigError, match="a frame has no column 'when'"):
        audit(calibrated, [hourly()], known="when")
    for given in (lambda bars: bars, lambda bars: {"signals": bars.lazy()}, lambda bars: None):
        with pytest.raises(
            ConfigError, match=r'gave .*, not polars frames by name: return \{"signals": frame\}'
        ):
            audit(given, [hourly()])
    with pytest.raises(
        ConfigError, match="frame 'signals' that the run gave has no column 'close_time', only "
    ):
        audit(lambda bars: {"signals": bars.drop("close_time")}, [hourly()])
    with pytest.raises(ConfigError, match=r"frames\[1\] is 'bars', of type str: give polars frames"):
        audit(calibrated, [hourly(), "bars"])
    with pytest.raises(DataError, match="nothing is told of a time before the last bar"):
        audit(lambda bars: {}, hourly())
    with pytest.raises(DataError, match=r"absent\.parquet does not exist"):
        audited(folder, files=Path("absent.parquet"))


def test_bars_are_described(folder, tmp_path):
    """Holes, rows that are there twice or not in order, jumps and the other end of the bars are told."""
    bars = hourly()
    up = bars.filter(symbol="UP").with_row_index().filter(~pl.col("index").is_between(100, 102)).drop("index")
    jump = [
        pl.when(pl.int_range(pl.len()) > 150).then(2 * pl.col(n)).otherwise(n).alias(n) for n in VALUES[:4]
    ]
    up = up.with_columns(jump)
    pl.concat([up[10:20], up[5:], up[:5], bars.filter(symbol="DOWN")]).write_csv(tmp_path / "bars.csv")
    text = pl.read_csv(tmp_path / "bars.csv").rename({"close_time": "time"})
    text.with_columns(pl.col("time").str.replace(r"[+]0000$", "Z")).write_csv(tmp_path / "bars.csv")
    found = audited(folder, files=tmp_path / "bars.csv", cuts=1, strategies=["vol-target"])
    assert found.passed
    down, own = found.data["symbols"]
    assert own["symbol"] == "UP"
    names = ("bars", "missing", "largest_hole", "doubled", "out_of_order", "jumps")
    assert [own[name] for name in names] == [257, 3, 3, 10, 2, 1]
    assert [down[name] for name in names] == [260, 0, 0, 0, 0, 0]
    assert own["hole_after"] == "2024-01-05T04:00:00Z"
    assert found.data["other_end"] is True


def test_command(run, folder, tmp_path):
    """The table names the strategy, the file holds everything, and the exit status is 1 on a violation."""
    bars, peek = str(folder / "bars.parquet"), f"{folder / 'peek.py'}:file={folder / 'bars.parquet'}"
    options = ["--stamp", "close", "--since", "2024-01-09T12:00:00", "--cuts", "2", "--model", "ewma"]
    status, out, _ = run(
        "audit", bars, *options, "--strategy", f"{peek},column=shifted", "--out", str(tmp_path)
    )
    assert status == 1
    assert "Peek" in out
    assert "the model says" in out  # how far back signals look is told all the same
    assert "fails:" in out
    told = json.loads((tmp_path / "audit.json").read_text())
    assert told["violations"][0]["strategy"] == "Peek"
    assert [len(told["cuts"]), len(told["trials"])] == [2, 8]
    status, out, _ = run("audit", bars, *options, "--strategy", peek, "--json")
    assert status == 0
    assert json.loads(out)["passed"] is True
    status, _, err = run("audit", bars, *options, "--config", "x.toml")
    assert status == 2
    assert "--model is taken from --config" in " ".join(err.split())


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("retrained", [True, False])
def test_what_is_not_tried_is_told_with_its_reason(capsys, passed, retrained):
    """Trainings are the reason where models are retrained, and nowhere else."""
    data = {"timeframe": "1h", "calendar": "24x7", "stamp": "close", "symbols": [], "other_end": False}
    broken = () if passed else (Violation("cut", 5, "signals", None, "UP", 5, None, "q50", 1.0, 2.0, 1),)
    found = Audit(
        seed=1,
        cuts=(5,),
        starts=(),
        trials=(Trial("cut", 5, 10, 0),),
        violations=broken,
        warmup=None,
        data=data | {"warning": ""},
    )
    _print(found, retrained)
    told = capsys.readouterr().out
    assert ("trainings depend on both" in told) == retrained
    assert ("mend that first" in told) == (not retrained and not passed)


def test_last_line(capsys):
    """A verdict that could not see everything is qualified; what keeps a state has a table and a number."""
    trials = tuple(Trial(check, 5, 10, 0) for check in ("repeat", "cut", "start"))
    audit = Audit(seed=1, cuts=(5,), starts=(6,), trials=trials, violations=(), warmup=None)
    _verdict(audit)
    _verdict(replace(audit, unseen=("one",)))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "passes",
        "passes, as far as what the strategies are given could be cut",
    ]
    kept = Violation("start", 6, "targets", "mine", "UP", 7, None, "target", 0.5, 0.25, 0)
    failed = replace(audit, trials=(*trials[:2], Trial("start", 6, 10, 3)), violations=(kept,))
    _verdict(failed)
    assert "fails: 3 of 10 values from 1 later start on depend on what was asked before" in (
        capsys.readouterr().out
    )
    assert [*_kept(_first(failed, ("start",)), 1, 0).columns[2].cells] == ["1/1"]
    assert _first(failed, ("cut",)) == {}
