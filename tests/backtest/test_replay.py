"""A backtest on the shipped bars: nothing after a bar changes what was said or done at it."""

import asyncio
import hashlib
from datetime import UTC, datetime

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.daemon import wire
from barcast.daemon.pipeline import StrategySettings
from barcast.daemon.wire import to_ns
from barcast.models import CheckpointError, ConfigError, DataError
from tests.garch import simulate

HOUR = 3_600_000_000_000
STRATEGIES = (
    StrategySettings("quantile-band", "band", {"band": 0.02, "costs": 0.0, "horizon": 20}),
    StrategySettings("median-drift", "drift", {"gain": 1.0, "horizon": 1}),
)

GOLDEN = "c7e1417c73da458cebfc873ad58fd0fe970434e602b5f38df70ed59fa5e22f09"
"""The SHA-256 of every message about January 2010 by filtered historical simulation.

It changes when messages, rules or the forecaster change: be sure that they were meant to, then run
`pytest tests/backtest/test_replay.py -k golden` and put the hash that it found here.
"""


def day(text):
    """Midnight UTC of a day, in nanoseconds."""
    return to_ns(datetime.fromisoformat(text).replace(tzinfo=UTC))


def backtest(file=None, since="2009-06-01", until="2009-12-01", **changes):
    """A replay of half a year of the sample."""
    settings = {"model": "fhs", "timeframe": "session", "calendar": "XNYS", "strategies": STRATEGIES}
    return run_backtest(
        [file or sample_bars()],
        **({"stamp": "close", "since": day(since), "until": day(until)} | settings | changes),
    )


@pytest.fixture(scope="module")
def whole():
    """The half year as it was."""
    return backtest()


@pytest.fixture(scope="module")
def bars():
    """The shipped bars."""
    return pl.read_parquet(sample_bars())


def when(moment):
    """A moment as it is in frames."""
    return pl.lit(day(moment)).cast(pl.Datetime("ns", "UTC"))


def upto(frame, moment):
    """The rows at or before a moment."""
    return frame.filter(pl.col("close_time") <= when(moment))


def assert_same_until(one, other, moment):
    """Signals, fills and equity up to a moment are the same to the bit, and there are some."""
    for name in ("signals", "fills", "equity"):
        before = upto(getattr(one, name), moment)
        assert before.height > 0, name
        assert_frame_equal(before, upto(getattr(other, name), moment), check_exact=True)


def assert_differ(one, other):
    """The control: what came after did change something."""
    for name in ("signals", "fills", "equity"):
        assert not getattr(one, name).equals(getattr(other, name)), name


POISONS = {
    "prices": [(pl.col(name) * 1.7).alias(name) for name in ("open", "high", "low", "close")],
    "turned": [
        (1e4 / pl.col(a)).alias(b)
        for a, b in (("open", "open"), ("low", "high"), ("high", "low"), ("close", "close"))
    ],
}


@pytest.mark.parametrize("moment", ["2009-07-15", "2009-10-01"])
@pytest.mark.parametrize("poison", ["prices", "turned"])
def test_poisoned_future_changes_nothing_before_it(whole, bars, tmp_path, moment, poison):
    """With every bar after t replaced, each signal, fill and equity at or before t is the same to the bit."""
    after = pl.col("close_time") > when(moment)
    changed = [
        pl.when(after).then(e).otherwise(e.meta.output_name()).alias(e.meta.output_name())
        for e in POISONS[poison]
    ]
    bars.with_columns(changed).write_parquet(tmp_path / "poisoned.parquet")
    poisoned = backtest(tmp_path / "poisoned.parquet")
    assert_same_until(whole, poisoned, moment)
    assert_differ(whole, poisoned)


def test_symbol_that_ends_changes_nothing_before_it(whole, bars, tmp_path):
    """That a symbol will vanish, or another begin, is not known before."""
    gone = (pl.col("symbol") == "IBM") & (pl.col("close_time") > when("2009-09-01"))
    new = bars.filter((pl.col("symbol") == "AAPL") & (pl.col("close_time") > when("2009-09-01")))
    pl.concat([bars.filter(~gone), new.with_columns(symbol=pl.lit("NEW"))]).write_parquet(
        tmp_path / "changed.parquet"
    )
    changed = backtest(tmp_path / "changed.parquet")
    assert_same_until(whole, changed, "2009-09-01")
    assert_differ(whole, changed)


def test_longer_backtest_begins_with_the_shorter_one(whole):
    """A later end adds rows and changes no earlier one; outcomes that were open are added."""
    shorter = backtest(until="2009-09-01")
    last = "2009-09-01"
    assert_same_until(shorter, whole, last)
    for name in ("signals", "fills", "equity"):
        assert getattr(shorter, name).height == upto(getattr(whole, name), last).height
        assert getattr(whole, name).height > getattr(shorter, name).height
    keys = ["symbol", "close_time", "horizon"]
    known = shorter.outcomes.select(keys)
    assert_frame_equal(
        shorter.outcomes.sort(keys),
        whole.outcomes.join(known, on=keys, how="semi").sort(keys),
        check_exact=True,
    )


def test_earlier_start_changes_no_signal(whole):
    """Bars before the start warm the windows up completely: signals do not depend on where a test began."""
    earlier = backtest(since="2009-05-01")
    since = whole.signals["close_time"].min()
    assert_frame_equal(earlier.signals.filter(pl.col("close_time") >= since), whole.signals, check_exact=True)
    assert earlier.signals.height > whole.signals.height


def test_backtest_repeats_itself(whole):
    """The same backtest gives the same messages, frames and numbers."""
    again = backtest()
    assert again.meta == whole.meta
    for name in ("signals", "outcomes", "fills", "equity", "scores", "portfolio"):
        assert_frame_equal(getattr(again, name), getattr(whole, name), check_exact=True)


@pytest.fixture
def told(monkeypatch):
    """The SHA-256 of what would have been published of the outcomes of a backtest."""
    sha256 = hashlib.sha256()

    class Telling(Ledger):
        async def emit(self, outcome):
            for message in wire.messages(outcome):
                sha256.update(message.topic.encode() + b"\0" + message.payload + b"\n")
            await super().emit(outcome)

    monkeypatch.setattr("barcast.backtest.replay.Ledger", Telling)
    return sha256


def test_golden_messages(told):
    """A month's messages are the very bytes that they were when this was written."""
    result = backtest(since="2010-01-01", until="2010-02-01")
    assert result.signals.height == 19 * 4 * 3
    assert told.hexdigest() == GOLDEN


def test_hashes_see_every_digit(told, bars, tmp_path):
    """The control of the golden hash: one cent in one price is another hash, also of the decisions."""
    at = (pl.col("symbol") == "IBM") & (pl.col("close_time") > when("2010-01-20"))
    first = bars.filter(at)["close_time"].min()
    cent = pl.when(at & (pl.col("close_time") == first)).then(0.01).otherwise(0.0)
    bars.with_columns(pl.col("high") + cent, pl.col("close") + cent).write_parquet(tmp_path / "cent.parquet")
    other = backtest(tmp_path / "cent.parquet", since="2010-01-01", until="2010-02-01")
    assert told.hexdigest() != GOLDEN
    whole = backtest(since="2010-01-01", until="2010-02-01")
    assert whole.meta["decisions_sha256"] != other.meta["decisions_sha256"]


def same(one, other):
    """Whether two backtests said and did the same."""
    for name in ("signals", "fills", "equity"):
        assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    return one.meta["decisions_sha256"] == other.meta["decisions_sha256"]


def test_dates_of_sessions_mean_their_closes(whole, bars, tmp_path):
    """Daily files that only name the date give what files with the closing moment give."""
    local = pl.col("close_time").dt.convert_time_zone("America/New_York").dt.date()
    bars.with_columns(date=local).drop("close_time").write_csv(tmp_path / "dates.csv")
    assert same(backtest(tmp_path / "dates.csv", stamp="open"), whole)


@pytest.fixture(scope="module")
def hourly():
    """Bars of two symbols around the clock, stamped by their close."""
    frames = []
    for name in ("UP", "DOWN"):
        w = simulate(name, 300, seed=5).window
        columns = {n: w.values[:, i] for i, n in enumerate(("open", "high", "low", "close", "volume"))}
        frames.append(pl.DataFrame({"symbol": [name] * len(w), "ns": w.close_times} | columns))
    return pl.concat(frames).with_columns(close_time=pl.from_epoch("ns", "ns").dt.replace_time_zone("UTC"))


def test_stamp_says_which_end_a_time_names(hourly, tmp_path):
    """Files that name the open of a bar give what files that name its close give; a wrong stamp does not."""
    hourly.write_parquet(tmp_path / "closes.parquet")
    opens = hourly.with_columns(open_time=pl.col("close_time") - pl.duration(hours=1)).drop("close_time")
    opens.write_parquet(tmp_path / "opens.parquet")
    wrong = hourly.rename({"close_time": "open_time"})
    wrong.write_parquet(tmp_path / "wrong.parquet")
    closes, opened, shifted = (
        run_backtest([tmp_path / f"{name}.parquet"], stamp=stamp, model="hs", timeframe="1h")
        for name, stamp in (("closes", "close"), ("opens", "open"), ("wrong", "open"))
    )
    assert closes.signals.height > 0
    assert same(closes, opened)
    assert shifted.meta["decisions_sha256"] != closes.meta["decisions_sha256"]


def test_it_runs_inside_a_running_event_loop(whole):
    """A notebook has a loop of its own: a backtest needs none and disturbs none."""

    async def notebook():
        return backtest()

    assert same(asyncio.run(notebook()), whole)


def test_symbols_are_a_choice_that_changes_no_signal(whole):
    """A backtest of one symbol says of it what the backtest of all says."""
    alone = backtest(symbols=["IBM"])
    own = whole.signals.filter(pl.col("symbol") == "IBM")
    assert set(alone.signals["symbol"]) == {"IBM"}
    assert_frame_equal(alone.signals, own, check_exact=True)
    assert set(alone.fills["symbol"]) <= {"IBM"}


def test_costs_are_paid(whole):
    """Costs change no signal, and leave each book poorer."""
    free = backtest(execution=Execution(commission_bp=0.0, slippage_bp=0.0))
    assert_frame_equal(free.signals, whole.signals, check_exact=True)
    ends = [
        result.equity.group_by("strategy", maintain_order=True).last().select("strategy", pl.col("equity"))
        for result in (free, whole)
    ]
    gained = ends[0].join(ends[1], on="strategy", suffix="_paid")
    assert gained.height == 3
    assert (gained["equity"] > gained["equity_paid"]).all()


def test_signals_before_the_start_are_not_made(whole):
    """Bars before the start only warm up: nothing is forecast or traded at them."""
    begin = datetime(2009, 6, 1, tzinfo=UTC)
    assert whole.signals["close_time"].min() >= begin
    assert whole.equity["close_time"].min() >= begin
    assert whole.signals["close_time"].max() < datetime(2009, 12, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("changes", "fault", "said"),
    [
        ({"file": "absent.parquet"}, DataError, "absent.parquet does not exist"),
        ({"symbols": ["IBM", "TSLA"]}, DataError, "TSLA"),
        ({"since": "2030-01-01", "until": "2031-01-01"}, DataError, "the last bar closes at 2013-03-01"),
        ({"since": "2009-12-01", "until": "2009-06-01"}, ConfigError, "give a since before until"),
        ({"until": "1990-01-01", "since": "1980-01-01"}, DataError, "no bar"),
        ({"model": "no-such-model"}, CheckpointError, "no-such-model"),
        (
            {"model": str(sample_checkpoint()), "timeframe": "1d", "calendar": "24x7"},
            ConfigError,
            "'session' bars, not on '1d'",
        ),
        ({"model": str(sample_checkpoint()), "sampler": "heun"}, ConfigError, "take dpmpp"),
        ({"strategies": ["martingale"]}, ConfigError, "martingale"),
        ({"calendar": "XNYX"}, ConfigError, "XNYX"),
        ({"calendar": "24x7"}, ConfigError, "session"),
        ({"timeframe": "7m", "calendar": "24x7"}, ConfigError, "7m"),
        ({"stamp": "open"}, DataError, "time column"),
    ],
)
def test_what_cannot_be_done_is_said(changes, fault, said):
    """A wrong file, symbol, time, model or setting is one sentence that names it."""
    with pytest.raises(fault) as caught:
        backtest(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sampler", "steps"), [("sssd", "dpmpp", 2), ("sssd", "ddim", 2), ("ldm4ts", "angle", 1)]
)
def test_poisoned_future_changes_nothing_for_a_shipped_model(
    bars, tmp_path, monkeypatch, kind, sampler, steps
):
    """The diffusion model's signals and trades up to t are the same to the bit whatever comes after t."""
    import torch

    from barcast.models.ldm4ts import trained

    torch.set_num_threads(1)
    monkeypatch.setattr(trained, "OUTCOMES", 30)
    monkeypatch.setattr(trained, "JUDGED", 10)
    period = {"since": "2012-02-01", "until": "2012-03-01", "symbols": ["IBM"]}
    model = {"model": str(sample_checkpoint(kind)), "sampler": sampler, "steps": steps}
    moment = "2012-02-15"
    after = pl.col("close_time") > when(moment)
    changed = [
        pl.when(after).then(pl.col(n) * 1.3).otherwise(n).alias(n)
        for n in ("open", "high", "low", "close", "volume")
    ]
    bars.with_columns(changed).write_parquet(tmp_path / "poisoned.parquet")
    clean = backtest(**period, **model)
    poisoned = backtest(tmp_path / "poisoned.parquet", **period, **model)
    assert clean.signals.height == 20 * 3
    assert clean.meta["sampler"] == sampler
    assert_same_until(clean, poisoned, moment)
    assert_differ(clean, poisoned)
