"""Forecasts that are kept: the same to the bit, of the very bars alone, and no model works for them again."""

import random

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from barcast.backtest import cache as cache_module
from barcast.backtest import cli
from barcast.backtest.cache import ForecastCache
from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.models import Adjustment, Bar, Calibrated, DataError, Window, Windows, open_model
from barcast.models.diffusion import SSSDForecaster
from barcast.models.window import hashed, window_at
from tests.fakes import MINUTE, START

FRAMES = ("signals", "outcomes", "targets", "fills", "equity", "scores", "skill", "portfolio")


def backtest(folder=None, strategy="quantile-band", model="hs", since="2010-01-01", **changes):
    """A replay of some months, and the cache that it used."""
    cache = ForecastCache(folder) if folder else None
    options = {"stamp": "close", "calendar": "XNYS", "symbols": ["IBM", "AAPL"], "until": "2010-05-01"}
    named = {"model": model, "strategies": [strategy], "since": since}
    return run_backtest([sample_bars()], **(options | named | changes), cache=cache), cache


def assert_same(one, other):
    """Two results are one to the bit, in all that they tell."""
    assert one.meta == other.meta
    for name in FRAMES:
        assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)


@pytest.fixture
def asked(monkeypatch):
    """The windows that the network was asked about."""
    windows, forecast = [], SSSDForecaster._forecast
    monkeypatch.setattr(
        SSSDForecaster, "_forecast", lambda self, *given: windows.append(given[0]) or forecast(self, *given)
    )
    return windows


def test_another_strategy_asks_no_network(tmp_path, asked):
    """Its result is that of a replay without a cache, to the bit: signals with coverage, books, hashes."""
    model = str(sample_checkpoint())
    first, _ = backtest(tmp_path, model=model)
    assert len(asked) > 1000
    asked.clear()
    second, cache = backtest(tmp_path, "median-drift", model)
    assert (asked, cache.made) == ([], 0)
    assert cache.kept == first.signals.height / 3
    plain, _ = backtest(None, "median-drift", model)
    assert_same(second, plain)


def test_another_calibration_asks_no_network(tmp_path, asked):
    """What is kept before calibration serves windows of another length, and other outcomes."""
    forecaster = open_model(str(sample_checkpoint()), "session", None, None)
    windows = Windows(forecaster.card.window, hashed=True)
    frame = pl.read_parquet(sample_bars()).filter(symbol="IBM").head(2000)
    rows = frame.select(pl.col("close_time").to_physical(), "open", "high", "low", "close", "volume").rows()
    for time, *values in rows:
        windows.put(Bar("IBM", time, *values))
    window = windows.cut("IBM", rows[-1][0], forecaster.card.window)
    with ForecastCache(tmp_path) as cache:
        cache.of(forecaster).forecast([window])
    assert len(asked) > 500
    asked.clear()
    other = Calibrated(forecaster.inner, 300, 100)
    shorter = window.part(len(window) - other.card.window, len(window))
    [known] = ForecastCache(tmp_path).of(other).forecast([shorter])
    assert asked == []
    [plain] = Calibrated(forecaster.inner, 300, 100).forecast([shorter])
    assert known.quantiles.tobytes() == plain.quantiles.tobytes()
    assert known.coverage.share.tobytes() == plain.coverage.share.tobytes()


def test_prefilled_history_asks_no_network(tmp_path, asked):
    """Filled by symbols and parts of time on two processes: a replay finds all of it, the same to the bit."""
    words = [
        "prefill",
        str(sample_bars()),
        "--stamp",
        "close",
        "--calendar",
        "XNYS",
        "--cache",
        str(tmp_path),
    ]
    words += ["--model", str(sample_checkpoint()), "--symbol", "IBM", "--since", "2010-03-01", "--jobs", "2"]
    done = CliRunner().invoke(cli.app, [*words, "--until", "2010-05-01"])
    assert done.exit_code == 0, done.output
    assert "44 forecasts of 1 symbols are there" in done.output
    assert asked == []  # here
    options = {"model": str(sample_checkpoint()), "symbols": ["IBM"], "since": "2010-03-01"}
    found, cache = backtest(tmp_path, **options)
    assert (asked, cache.made) == ([], 0)
    assert cache.kept == found.signals.height / 3 > 40
    plain, _ = backtest(**options)
    assert_same(found, plain)


@pytest.mark.parametrize("adjusted", [False, True])
def test_history_knows_what_its_windows_hold(adjusted):
    """A window of a history, hashed at once, is that of a ring, hashed bar by bar, on each basis."""
    dice, windows = random.Random(adjusted), Windows(7, hashed=True)
    split = [Adjustment("A", START + 20 * MINUTE, 0.5, "split")] if adjusted else []
    for one in split:
        windows.adjust(one)
    values = np.array([[dice.uniform(1, 2)] * 5 for _ in range(60)])
    times = START + MINUTE * np.arange(60)
    history = hashed(Window("A", times, values))
    for place, row in enumerate(values.tolist()):
        windows.put(Bar("A", int(times[place]), *row))
        mine, other = windows.cut("A", int(times[place]), 7), window_at(history, place, 7, split)
        assert content(mine) == content(other)
        assert mine.digest == other.digest
        assert mine.part(1, len(mine)).digest == other.part(1, len(other)).digest


def test_adjusted_prices_are_another_window(tmp_path):
    """A declared split changes what is asked, and only where its basis does."""
    split = [Adjustment("IBM", 1267448400 * 10**9, 0.5, "split")]
    backtest(tmp_path)
    plain, _ = backtest(None, adjustments=split)
    kept, cache = backtest(tmp_path, adjustments=split)
    assert_same(kept, plain)
    assert 0 < cache.made < cache.kept


def test_small_files_and_few_spans_say_the_same(tmp_path, monkeypatch):
    """However the forecasts are written and read."""
    plain, _ = backtest()
    for name, value in (("BARS", 16), ("PENDING", 7), ("LOADED", 1)):
        monkeypatch.setattr(cache_module, name, value)
    first, _ = backtest(tmp_path)
    second, cache = backtest(tmp_path)
    assert_same(first, plain)
    assert_same(second, plain)
    assert cache.made == 0


def test_what_was_made_before_a_fault_is_kept(tmp_path):
    """A strategy that raises in the middle costs no forecast."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass\nclass Late:\n    name: str\n    seen: int = 0\n\n"
        "    def on_forecasts(self, close_time, forecasts):\n        self.seen += 1\n"
        "        if self.seen > 50:\n            raise ValueError('too late')\n        return {}\n"
    )
    with pytest.raises(Exception, match="too late"):
        backtest(tmp_path / "cache", f"{tmp_path}/mine.py:Late")
    _, cache = backtest(tmp_path / "cache")
    assert cache.kept >= 90


def test_damaged_file_is_named(tmp_path):
    """A changed byte is not believed: the file says its own digest."""
    backtest(tmp_path)
    [part] = tmp_path.glob("*/*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match=f"{part.name}: is damaged; remove it"):
        backtest(tmp_path)
    part.unlink()
    _, cache = backtest(tmp_path)
    assert cache.kept == 0


def test_other_forecasters_have_other_folders(tmp_path):
    """A card that differs in anything is another forecaster."""
    backtest(tmp_path)
    backtest(tmp_path, model="fhs")
    folders = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert folders == ["fhs", "hs"]
    told = msgspec.json.decode((next(tmp_path.glob("fhs-*")) / "card.json").read_bytes())
    assert (told["kind"], told["horizons"]) == ("fhs", [1, 5, 20])


def content(window):
    """What a window holds, as a key."""
    return window.symbol, window.close_times.tobytes(), window.values.tobytes()


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_digest_stands_for_what_a_window_holds(seed):
    """However bars came, were corrected or put on another basis: equal digests, equal bars, and back."""
    dice, seen, digests = random.Random(seed), {}, {}
    for _ in range(3):
        windows = Windows(dice.choice((5, 9)), hashed=True)
        for _ in range(dice.randrange(10, 120)):
            minute, symbol = dice.randrange(40), dice.choice("AB")
            if dice.random() < 0.05:
                windows.adjust(Adjustment(symbol, START + minute * MINUTE, 0.5, "split"))
                continue
            price = float(dice.choice((1, 1, 1, 2)))
            windows.put(Bar(symbol, START + minute * MINUTE, price, price, price, price, 1.0))
            newest = windows.newest(symbol)
            window = windows.cut(symbol, newest, dice.choice((3, 5)))
            parts = [window, *(window.part(k, len(window)) for k in range(1, min(3, len(window))))]
            for part in parts:
                key = content(part)
                assert digests.setdefault(part.digest, key) == key
                if not part.basis:
                    assert seen.setdefault(key, part.digest) == part.digest


def test_windows_that_are_not_hashed_are_not_kept(tmp_path):
    """Without what stands for the bars nothing is looked up, and nothing is written."""
    windows = Windows(200)
    for minute in range(200):
        windows.put(Bar("A", START + minute * MINUTE, 1.0, 1.0, 1.0, 1.0 + minute % 3, 1.0))
    window = windows.cut("A", START + 199 * MINUTE, 200)
    assert window.digest is None
    with ForecastCache(tmp_path) as cache:
        kept = cache.of(open_model("hs", "1m", None, None))
        kept.forecast([window])
    assert cache.made == 1
    assert list(tmp_path.iterdir()) == []


def test_command_says_what_was_known(tmp_path):
    """The option keeps forecasts from run to run, and a folder that cannot be is its fault."""
    words = ["backtest", str(sample_bars()), "--stamp", "close", "--calendar", "XNYS", "--model", "hs"]
    words += ["--since", "2010-01-01", "--until", "2010-03-01", "--symbol", "IBM"]
    run = CliRunner()
    for kept, made in ((0, 38), (38, 0)):
        done = run.invoke(
            cli.app, [*words, "--cache", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
        )
        assert done.exit_code == 0, done.output
        assert f"{kept} forecasts were known" in done.output.replace("\n", " ")
        assert f"asked {made} times" in done.output.replace("\n", " ")
    (tmp_path / "file").touch()
    done = run.invoke(cli.app, [*words, "--cache", str(tmp_path / "file"), "--out", str(tmp_path / "out")])
    assert "--cache" in str(done.exception)
