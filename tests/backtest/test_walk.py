"""Walk-forward: trainings on replay time are those of the live schedule, and know nothing of what follows."""

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest.cache import ForecastCache
from barcast.backtest.replay import ReplaySource, drive, run_backtest
from barcast.backtest.walk import LOOK
from barcast.daemon import gate
from barcast.daemon.bars import known_bars
from barcast.daemon.calendar import Calendars
from barcast.daemon.challenger import train_challenger
from barcast.daemon.config import DriftBands, Retrain
from barcast.daemon.pipeline import StrategySettings
from barcast.daemon.ports import Activation, Arrival, EndOfSource
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import to_ns
from barcast.models import Adjustment, ConfigError, Window, open_model
from tests.garch import simulate

HOUR = 3600 * 10**9
DAY = 24 * HOUR
BARS, SINCE, END = 1540, 1330, 1500
"""Bars in all, those before the test, and those up to the end that is moved, about."""
DRIFT = StrategySettings("median-drift", "drift", {"costs": 0.0})
SCHEDULE = Retrain(cron="0 3 * * *", steps=2, margin=0.0)
VALUES = ("open", "high", "low", "close", "volume")


def frame_of(*windows):
    """Bars of some symbols as a file holds them."""
    frames = [
        pl.DataFrame({"symbol": [w.symbol] * len(w), "ns": w.close_times})
        .with_columns(pl.Series(name, w.values[:, k]) for k, name in enumerate(VALUES))
        .with_columns(close_time=pl.from_epoch("ns", "ns").dt.replace_time_zone("UTC"))
        for w in windows
    ]
    return pl.concat(frames)


@pytest.fixture(scope="module", autouse=True)
def _few_rivals(few_looks):
    """The gate has two baselines beside a challenger: which of them it passes is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "RIVALS", ("hs", "fhs"))
        yield


@pytest.fixture(scope="module")
def hourly():
    """Bars of two symbols around the clock; the ninth of March is the first day that is tested."""
    return frame_of(*(simulate(name, BARS, seed=seed).window for name, seed in (("UP", 5), ("DOWN", 6))))


@pytest.fixture(scope="module")
def times(hourly):
    """The closes in order, in nanoseconds."""
    return sorted(set(hourly["ns"]))


def walk(bars, path, times, until=None, retrain=SCHEDULE, **changes):
    """A walk-forward over bars up to a close."""
    bars.drop("ns").write_parquet(path)
    given = {"stamp": "close", "model": "fhs", "timeframe": "1h", "since": times[min(SINCE, len(times) - 1)]}
    given |= {
        "strategies": [StrategySettings("median-drift", "drift", {"costs": 0.0})],
        "training_time": "150m",
        "until": until,
    }
    return run_backtest([path], retrain=retrain, **(given | changes))


@pytest.fixture(scope="module")
def end(times):
    """The close of 04:00 UTC behind which the end is cut: a training asked for at 03:00 is under way."""
    [at] = [t for t in times[END - 24 : END] if t % DAY == 4 * HOUR]
    return at


@pytest.fixture(scope="module")
def whole(hourly, times, tmp_path_factory):
    """All bars."""
    return walk(hourly, tmp_path_factory.mktemp("walk") / "bars.parquet", times)


def assert_same_until(one, other, moment):
    """What was said, done, trained and activated up to a moment is the same to the bit, and there is some."""
    for name, time in (("signals", "close_time"), ("fills", "close_time"), ("equity", "close_time")):
        upto = pl.col(time).to_physical() <= moment
        before = getattr(one, name).filter(upto)
        assert before.height > 0, name
        assert_frame_equal(before, getattr(other, name).filter(upto), check_exact=True)
    upto = pl.col("judged").to_physical() <= moment
    trained = one.trainings.filter(upto)
    assert trained.height >= 5
    assert trained["accepted"].sum() >= 2
    assert_frame_equal(trained, other.trainings.filter(upto), check_exact=True)


def test_cache_hides_no_champion(whole, hourly, times, tmp_path):
    """What each champion says is kept as its own: a walk-forward that knows all is one without a cache."""
    cache, until = ForecastCache(tmp_path / "cache"), times[SINCE + 60]
    for known in (False, True):
        found = walk(hourly, tmp_path / "bars.parquet", times, until=until, cache=cache)
        assert (cache.kept > 0) == known
        assert found.signals["model"].n_unique() > 1
        for name, time in (("signals", "close_time"), ("fills", "close_time"), ("equity", "close_time")):
            before = getattr(whole, name).filter(pl.col(time).to_physical() < until)
            assert_frame_equal(getattr(found, name), before, check_exact=True)


def test_later_end_changes_nothing_before_it(whole, hourly, times, end, tmp_path):
    """A fifth more of time adds rows, and changes no signal, fill, training or activation before it."""
    shorter = walk(hourly, tmp_path / "bars.parquet", times, until=end + 1)
    tested = len([t for t in times if times[SINCE] <= t <= end])
    assert BARS - SINCE - tested >= 0.2 * tested
    assert_same_until(shorter, whole, end)
    assert shorter.trainings.height < whole.trainings.height
    assert shorter.signals["close_time"].to_physical().max() == end


def test_poisoned_future_changes_nothing_before_it(whole, hourly, times, end, tmp_path):
    """With every bar after t replaced, and a split declared there, all up to t is the same to the bit.

    That holds for the challengers, too, of which one was asked for before t and is over after it.
    """
    factor = pl.when(pl.col("ns") > end).then(pl.lit(3.0) + pl.col("ns") // HOUR % 3).otherwise(1.0)
    poisoned = hourly.with_columns(pl.col(name) * factor for name in VALUES)
    split = Adjustment("UP", end + 5 * HOUR, 0.5, "split")
    other = walk(poisoned, tmp_path / "bars.parquet", times, adjustments=[split])
    assert_same_until(whole, other, end)
    [at] = (
        row for row in whole.trainings.iter_rows(named=True) if row["asked"] < as_time(end) < row["judged"]
    )
    [same] = other.trainings.filter(pl.col("asked") == at["asked"]).iter_rows(named=True)
    assert same["challenger"] == at["challenger"]  # it learnt from the bars before
    assert same["challenger_crps"] != at["challenger_crps"]  # the control: it was judged on those after
    assert not other.signals.equals(whole.signals)


def as_time(ns):
    """A moment as it is in frames."""
    return pl.Series([ns]).cast(pl.Datetime("ns", "UTC")).item()


def test_signals_name_the_model_in_force(whole):
    """From the close after an activation on, signals are those of the new model; a refused one never."""
    accepted = whole.trainings.filter("accepted")
    served = whole.signals.group_by("model").agg(
        first=pl.col("close_time").min(), last=pl.col("close_time").max()
    )
    models = dict(served.select("model", "first").iter_rows())
    assert set(models) - set(accepted["challenger"]) == {whole.meta["model"]}
    for row in accepted.iter_rows(named=True):
        later = whole.signals["close_time"].filter(whole.signals["close_time"] > row["judged"])
        assert models[row["challenger"]] == later.min()
    assert set(whole.trainings.filter(~pl.col("accepted"))["challenger"]).isdisjoint(models)


def test_replay_trains_the_very_model_that_the_daemon_would(whole, hourly, tmp_path):
    """From the bars that an instance knows at that moment, the trainer of the daemon makes the same bits."""
    first = whole.trainings.filter("accepted").row(0, named=True)
    (tmp_path / "history").mkdir()
    hourly.drop("ns").write_parquet(tmp_path / "history" / "bars.parquet")
    now = to_ns(first["asked"])
    calendars = Calendars("24x7", Timeframe.parse("1h"))
    known = known_bars(tmp_path, calendars, now)
    card = open_model("fhs", "1h", None, None).card
    model, _ = train_challenger(known, tmp_path / "out", "1h", card, "fhs", SCHEDULE.steps, lambda _: None)
    assert model == first["challenger"]


def test_reasons_that_come_meanwhile_cause_one_more_run(hourly, times, tmp_path):
    """One run at a time: what is asked for during it waits for its end, once."""
    bars = hourly.filter(pl.col("ns") < times[300])
    found = walk(
        bars,
        tmp_path / "bars.parquet",
        times,
        retrain=Retrain(cron="0 * * * *", steps=1),
        training_time="150m",
        since=times[260],
    ).trainings
    hours = (found["asked"].to_physical() - times[0]) / HOUR
    assert hours.to_list()[:4] == [pytest.approx(260 + h) for h in (1, 3.5, 6, 8.5)]
    assert (found["judged"] - found["asked"]).dt.total_minutes().unique().to_list() == [150]
    assert set(found["reasons"]) == {"cron"}


def test_training_without_enough_bars_is_told(hourly, times, tmp_path):
    """Too few bars to learn from are no end of the replay: the row says why, and the champion stays."""
    bars = hourly.filter(pl.col("ns") < times[290])
    found = walk(bars, tmp_path / "bars.parquet", times, since=times[260])
    assert found.trainings.height == 1
    row = found.trainings.row(0, named=True)
    assert (row["accepted"], row["challenger"], row["champion"]) == (False, None, "fhs")
    assert "bars" in row["reason"]
    assert found.signals["model"].unique().to_list() == [found.meta["model"]]


def test_drift_asks_on_replay_time(tmp_path):
    """Bars that turn four times as volatile ask for a training, by the coverage of what was published."""
    noise = 0.002 * np.random.default_rng(3).standard_normal(830)
    start = 1_704_070_800 * 10**9
    asked = Retrain(drift=DriftBands(), steps=1)
    found = {}
    for volatility in (1.0, 4.0):
        returns = noise * np.where(np.arange(830) < 700, 1.0, volatility)
        close = 100 * np.exp(np.cumsum(returns))
        times = start + HOUR * np.arange(830)
        values = np.stack([close, close, close, close, np.ones(830)], 1)
        bars = frame_of(Window("UP", times, values))
        found[volatility] = walk(
            bars, tmp_path / "bars.parquet", times, retrain=asked, model="hs", since=int(times[570])
        ).trainings
    assert found[1.0].is_empty()
    assert found[4.0].height > 0
    assert all(reason.startswith("drift: ") for reason in found[4.0]["reasons"])
    moments = found[4.0]["asked"].to_physical()
    assert times[700] < moments.min()
    assert (moments % HOUR).unique().to_list() == [LOOK]


def test_age_asks_on_replay_time(hourly, times, tmp_path):
    """A champion that is older than `max_age` asks for a training at that moment, then once a day."""
    bars = hourly.filter(pl.col("ns") < times[400])
    schedule = Retrain(max_age="2d", steps=1)
    found = walk(bars, tmp_path / "bars.parquet", times, retrain=schedule, since=times[260]).trainings
    asked = found["asked"].to_physical() - times[260]
    assert asked.to_list() == [(2 + k) * DAY + 1 for k in range(4)]
    assert found["reasons"][0].startswith("age: the champion is 2.0 days old")


def test_age_asks_while_no_bar_comes(hourly, times, tmp_path):
    """A market that is shut keeps no champion young: live the lookout goes on looking, too."""
    shut = pl.col("ns").is_between(times[300], times[372], closed="none")
    bars = hourly.filter(pl.col("ns") < times[390]).filter(~shut)
    schedule = Retrain(max_age="2d", steps=1)
    found = walk(bars, tmp_path / "bars.parquet", times, retrain=schedule, since=times[260], model="hs")
    asked = found.trainings["asked"].to_physical() - times[260]
    assert asked.to_list() == [(2 + k) * DAY + 1 for k in range(4)]
    assert times[300] < times[260] + asked[0] < times[372]


def test_retrain_without_a_trigger_is_an_error(hourly, times, tmp_path):
    """A schedule that would never train is a mistake."""
    with pytest.raises(ConfigError, match="nothing asks for a training; give cron, max_age or drift"):
        walk(hourly, tmp_path / "bars.parquet", times, retrain=Retrain(steps=1))


class Plan:
    """An agenda with moments of its own, that notes what it hears."""

    def __init__(self, *moments):
        self.moments, self.heard = list(moments), []

    @property
    def next(self):
        """The next moment."""
        return self.moments[0] if self.moments else None

    def came(self, time):
        """Note it."""
        self.heard.append(time)

    def act(self, now):
        """Activate something at each moment."""
        self.moments.pop(0)
        return [Activation(now, "m", "f", 1)]


def told(source, deadlines):
    """What a source gives for some deadlines: the times of events, or None and the time then."""
    found = []

    async def ask():
        for deadline in deadlines:
            try:
                event = await source.next(deadline)
            except EndOfSource:
                found.append("end")
                return
            found.append((type(event).__name__, source.now()))

    drive(ask())
    return found


def test_agenda_comes_after_the_events_and_groups_of_its_moment():
    """Bars of a moment come first, then the groups that are due by then, then what is on the agenda."""
    plan = Plan(5, 10, 12)
    source = ReplaySource([Arrival(10, ()), Arrival(20, ())], agenda=plan)
    assert told(source, [None, None, 10, 11, 11, 12, None, None, None]) == [
        ("Activation", 5),
        ("Arrival", 10),
        ("NoneType", 10),
        ("Activation", 10),
        ("NoneType", 11),
        ("NoneType", 12),
        ("Activation", 12),
        ("Arrival", 20),
        "end",
    ]
    assert plan.heard == [10, 20]


def test_agenda_ends_with_the_bars():
    """After the last event only groups that still wait pass the time; an agenda does not go on for ever."""
    plan = Plan(*range(5, 100, 5))
    source = ReplaySource([Arrival(10, ())], agenda=plan)
    assert told(source, [None, None, 12, 12, None]) == [
        ("Activation", 5),
        ("Arrival", 10),
        ("Activation", 10),
        ("NoneType", 12),
        "end",
    ]
