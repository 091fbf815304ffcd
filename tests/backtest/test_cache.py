"""Forecasts that are kept: the same to the bit, of the very bars alone, and no model works for them again."""

import errno
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

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
from barcast.backtest.cache import ForecastCache, Wanted, prefill
from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.models import (
    LEVELS,
    Adjustment,
    Bar,
    Calibrated,
    ConfigError,
    DataError,
    Window,
    Windows,
    open_model,
)
from barcast.models.baselines import HistoricalSimulation
from barcast.models.diffusion import SSSDForecaster
from barcast.models.evaluation import windows_at
from barcast.models.window import hashed, window_at
from tests.fakes import MINUTE, START
from tests.garch import simulate

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
        SSSDForecaster, "_forecast", lambda self, *given: windows.extend(given[0]) or forecast(self, *given)
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


@pytest.mark.parametrize("model", ["hs", "fhs", str(sample_checkpoint())])
def test_figures_cannot_be_changed(tmp_path, model):
    """Neither those that a model makes, nor those that were kept: strategies are given them as they are."""
    forecaster = open_model(model, "session", None, None)
    if isinstance(forecaster, Calibrated):
        forecaster = Calibrated(forecaster.inner, 50, 20)  # few outcomes, so that there is a coverage
    frame = pl.read_parquet(sample_bars()).filter(symbol="IBM").head(1400)
    values = frame.select("open", "high", "low", "close", "volume").to_numpy()
    history = hashed(Window("IBM", frame["close_time"].to_physical().to_numpy(), values))
    window = window_at(history, 1399, forecaster.card.window)
    with ForecastCache(tmp_path) as cache:
        made = cache.of(forecaster).forecast([window])
    for forecast in made + ForecastCache(tmp_path).of(forecaster).forecast([window]):
        shares = [forecast.coverage.share] if forecast.coverage else []
        assert len(shares) == isinstance(forecaster, Calibrated)
        for figures in (forecast.quantiles, forecast.mean, forecast.std, forecast.rise, *shares):
            assert not figures.flags.writeable


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


def test_windows_that_follow_one_another_are_known(tmp_path):
    """Many of one history at once, which a calibration works out as one, are still those that are kept."""
    inner = HistoricalSimulation("1h", (1, 4), LEVELS)
    forecaster, other = Calibrated(inner, 20, 10), Calibrated(inner, 19, 10)
    history = hashed(simulate("A", forecaster.card.window + 299, seed=3).window)
    with ForecastCache(tmp_path) as cache:
        for windows in windows_at(history, range(forecaster.card.window - 1, len(history)), 10**6):
            cache.of(forecaster).forecast(windows)
    cache, length = ForecastCache(tmp_path), other.card.window
    found, expected = [], []
    for windows in windows_at(history, range(forecaster.card.window - 1, len(history)), length):
        found += cache.of(other).forecast(windows)
        expected += Calibrated(inner, 19, 10).forecast(windows)
    assert (cache.made, len(found)) == (0, 300)
    assert [f.quantiles.tobytes() for f in found] == [f.quantiles.tobytes() for f in expected]


@pytest.mark.parametrize("backend", ["loky", "ray", "dask"])
def test_prefilled_history_asks_no_network(tmp_path, asked, backend, monkeypatch):
    """Filled by symbols and parts of time on two processes: a replay finds all of it, the same to the bit."""
    if backend != "loky":
        package = {"ray": "ray", "dask": "distributed"}[backend]
        pytest.importorskip(package, reason="the extra `cluster` is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # and put back what the command changes
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
    words += ["--backend", backend]
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
    for name, value in (("BARS", 16), ("PENDING", 7), ("ROWS", 1)):
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


def test_file_that_is_gone_meanwhile_is_forecast_again(tmp_path, monkeypatch):
    """Files may be removed at any time; one that may not be read is named with what to do."""
    backtest(tmp_path)
    plain = Path.read_bytes

    def gone(path):
        path.unlink(missing_ok=True)
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", gone)
    _, cache = backtest(tmp_path)
    assert (cache.kept, cache.made > 0) == (0, True)

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(ConfigError, match=r"parquet: .*denied.*; let the user of this program read it"):
        backtest(tmp_path)


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
    filling = ["prefill", *words[1:]]
    for command in ([*words, "--out", str(tmp_path / "out")], [*filling, "--jobs", "1"]):
        done = run.invoke(cli.app, [*command, "--cache", str(tmp_path / "file")])
        assert isinstance(done.exception, ConfigError)
        assert str(done.exception).startswith(f"--cache: {tmp_path / 'file'}: ")
        assert str(done.exception).endswith("name a folder that you may write, with room in it")


def rows_of(count, first=0):
    """Windows of a symbol, each a minute after the one before, as they are asked about."""
    dice, windows = random.Random(3), Windows(120, hashed=True)
    found = []
    for minute in range(first + count + 119):
        windows.put(Bar("A", START + minute * MINUTE, *[dice.uniform(1, 2)] * 4, 1.0))
        if minute >= first + 119:
            found.append(windows.cut("A", START + minute * MINUTE, 120))
    return found


def test_two_may_write_the_same_rows_at_once(tmp_path, monkeypatch):
    """Each has a partial of its own, also on another machine that sees the folder, and both end."""
    [window], met, names = rows_of(1), threading.Barrier(2, timeout=60), []
    plain, faults = Path.replace, []

    def meeting(path, target):
        names.append(path.name)
        met.wait()  # both have written, and none has it in its place
        return plain(path, target)

    def write():
        try:
            with ForecastCache(tmp_path) as cache:
                cache.of(open_model("hs", "1m", None, None)).forecast([window])
        except (OSError, ConfigError) as error:
            faults.append(error)

    monkeypatch.setattr(Path, "replace", meeting)
    both = [threading.Thread(target=write) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert faults == []
    assert len(set(names)) == len(names) == 4
    assert all(f".{os.uname().nodename}." in name for name in names)
    assert len([*tmp_path.glob("*/*.parquet")]) == 1
    assert not [*tmp_path.glob("*/.*")]


def test_partials_of_killed_workers_are_removed(tmp_path):
    """Those of threads that are at work, and of other machines, are left alone."""
    with ForecastCache(tmp_path) as cache:
        cache.of(open_model("hs", "1m", None, None)).forecast(rows_of(1))
    [folder] = tmp_path.iterdir()
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    here = os.uname().nodename
    names = [f".1-a.{here}.{ended.native_id}.partial", f".1-a.{here}.{threading.get_native_id()}.partial"]
    names += [f".1-a.{other}.{ended.native_id}.partial" for other in ("other", f"other.{here}")]
    for name in names:
        (folder / name).touch()
    with ForecastCache(tmp_path) as cache:
        cache.of(open_model("hs", "1m", None, None)).forecast(rows_of(1, 5000))
    assert {path.name for path in folder.glob(".*")} == {*names[1:]}


def test_full_disk_is_a_sentence_and_leaves_no_part(tmp_path, monkeypatch):
    """Whatever has no room is named with its folder; what is there of it would only take room."""

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ForecastCache(tmp_path)
    cache.of(open_model("hs", "1m", None, None)).forecast(rows_of(1))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match=r"hs-[\w-]+/card\.json: .*No space.*; name a folder that you may"):
        cache.__exit__()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_rows_bound_what_is_held_and_the_last_asked_stay(tmp_path, monkeypatch):
    """Spans are held up to so many rows beside the one at hand; one that is asked again stays longest."""
    monkeypatch.setattr(cache_module, "BARS", 10)
    windows = rows_of(50)
    with ForecastCache(tmp_path) as cache:
        cache.of(open_model("hs", "1m", None, None)).forecast(windows)
    loaded, load = [], cache_module._Shelf._load
    monkeypatch.setattr(
        cache_module._Shelf, "_load", lambda shelf, number: loaded.append(number) or load(shelf, number)
    )
    monkeypatch.setattr(cache_module, "ROWS", 20)
    cache = ForecastCache(tmp_path)
    known = cache.of(open_model("hs", "1m", None, None))
    spans = {}
    for window in windows:
        spans.setdefault(window.close_time // (10 * MINUTE), window)
    first, *others = list(spans.values())[1:5]  # of ten rows each
    known.forecast([first])
    for window in others:
        known.forecast([window])
        known.forecast([first])
        [shelf] = cache._shelves
        assert sum(len(span.rows) for span in shelf._spans.values()) <= 20 + 10
    assert cache.made == 0
    assert len(loaded) == len(set(loaded)) == 4


def test_fault_of_a_span_leaves_the_others(tmp_path, monkeypatch):
    """After a damaged file was named, what is sound is found as before."""
    monkeypatch.setattr(cache_module, "BARS", 10)
    monkeypatch.setattr(cache_module, "ROWS", 0)
    windows = rows_of(30)
    with ForecastCache(tmp_path) as cache:
        cache.of(open_model("hs", "1m", None, None)).forecast(windows)
    last = windows[-1].close_time // (10 * MINUTE)
    [part] = tmp_path.glob(f"*/{last}-*.parquet")
    part.write_bytes(b"half")
    cache = ForecastCache(tmp_path)
    known = cache.of(open_model("hs", "1m", None, None))
    known.forecast(windows[:1])
    with pytest.raises(DataError, match="is damaged"):
        known.forecast(windows[-1:])
    known.forecast(windows[:1])
    assert (cache.kept, cache.made) == (2, 0)


def filled(folder, *, until=20, since=0, **changes):
    """What `prefill` says of sixty bars of a symbol, asked for those from one place to another."""
    dice = random.Random(5)
    values = np.array([[dice.uniform(1, 2)] * 5 for _ in range(until)])
    times = START + MINUTE * np.arange(until)
    wanted = Wanted(folder, "hs", "1m", None, None, START + since * MINUTE, int(times[-1]))
    return prefill(wanted, {"A": Window("A", times, values)}, **({"jobs": 1} | changes))


@pytest.mark.parametrize("bars", [{"until": 20}, {"until": 200, "since": 200}])
def test_nothing_to_forecast_is_a_fault(tmp_path, bars):
    """A beginning after the last bar, or too few bars, is said, where nothing would come of it."""
    with pytest.raises(DataError, match=r"Nothing is to be forecast .*; give more history before it"):
        filled(tmp_path, **bars)


def test_process_opens_the_model_once(tmp_path, monkeypatch):
    """However many parts a process has of one model."""
    opened, plain = [], cache_module.open_model
    monkeypatch.setattr(cache_module, "open_model", lambda *asked: opened.append(asked) or plain(*asked))
    monkeypatch.setattr(cache_module, "SPAN", 10)
    cache_module._opened.cache_clear()
    assert filled(tmp_path, until=200) > 50
    assert len(opened) == 2  # by who asks, and by who works
    assert cache_module._opened.cache_info().currsize == 0  # it is held no longer than it works


def test_threads_of_a_worker_open_the_model_once_each(tmp_path, monkeypatch):
    """Also where their parts come in turns."""
    monkeypatch.setattr(cache_module, "SPAN", 10)
    threads, opened, plain = iter(100 * [1, 2]), [], cache_module.open_model
    monkeypatch.setattr(cache_module, "get_native_id", lambda: next(threads))
    monkeypatch.setattr(cache_module, "open_model", lambda *asked: opened.append(asked) or plain(*asked))
    filled(tmp_path, until=200)
    assert len(opened) == 3


def test_worker_with_another_fingerprint_fills_nothing(tmp_path, monkeypatch):
    """What it would keep no replay here would find."""
    plain = cache_module.open_model

    class Other:
        def __init__(self, model):
            self.card = replace(model.card, fingerprint="another")

    models = iter((plain, lambda *asked: Other(plain(*asked))))
    monkeypatch.setattr(cache_module, "open_model", lambda *asked: next(models)(*asked))
    cache_module._opened.cache_clear()
    with pytest.raises(ConfigError, match=r"a worker has hs.* under the fingerprint 'another', this machine"):
        filled(tmp_path, until=200)
    assert not [*tmp_path.rglob("*.parquet")]


def test_folder_that_workers_do_not_share_is_a_fault(tmp_path, monkeypatch):
    """What is not here after their work is elsewhere."""
    monkeypatch.setattr(cache_module, "run_jobs", lambda *_: None)
    with pytest.raises(DataError, match="the folder must be one that all workers share"):
        filled(tmp_path, until=200)


def test_folder_that_was_shared_before_is_a_fault(tmp_path, monkeypatch):
    """What is there from an earlier time does not stand for what workers have put elsewhere since."""
    monkeypatch.setattr(cache_module, "SPAN", 50)
    assert filled(tmp_path, until=200) == filled(tmp_path, until=200)
    monkeypatch.setattr(cache_module, "run_jobs", lambda *_: None)
    assert filled(tmp_path, until=200) == 84
    with pytest.raises(DataError, match="the folder must be one that all workers share"):
        filled(tmp_path, until=230)
