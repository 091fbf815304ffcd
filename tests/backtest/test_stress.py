"""Backtests over stress scenarios: the very path, the same bytes, and nothing that takes them for history."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from barcast.backtest import plot, stress, workers
from barcast.backtest.cache import Remembered
from barcast.backtest.replay import run_backtest
from barcast.backtest.report import html, write_stress
from barcast.backtest.sample import sample_bars, sample_checkpoint, sample_generator
from barcast.backtest.stress import StressResult, run_stress
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import read_windows, scan
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import to_text
from barcast.models import Adjustment, ConfigError, DataError, Window, open_model, optimiser
from barcast.models.transfer import (
    StressScenarioGenerator,
    TransferConfig,
    load_generator,
    save_generator,
    train,
    training,
)
from barcast.models.transfer.generator import LEAST_BEFORE
from tests.garch import simulate

TINY = TransferConfig(
    steps=2, energy_steps=1, batch=8, width=8, code=8, ode_steps=1, sample_steps=2, max_samples=256
)
MADE = 300
"""Bars that are made up."""


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    lengths = {"LONG": 3300, "PAIR": 3300, "YOUNG": 900}
    return [
        simulate(name, 3300, seed=k, levels=(0.0015, 0.005), switch=0.002).window.part(3300 - n, 3300)
        for k, (name, n) in enumerate(lengths.items())
    ]


@pytest.fixture(scope="module")
def bars(windows: list[Window], tmp_path_factory: pytest.TempPathFactory) -> Path:
    columns = ("open", "high", "low", "close", "volume")
    close_time = pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC")
    frames = [
        pl.DataFrame(
            {"symbol": w.symbol, "close_time": w.close_times} | dict(zip(columns, w.values.T, strict=True))
        )
        for w in windows
    ]
    path = tmp_path_factory.mktemp("bars") / "bars.parquet"
    pl.concat(frames).with_columns(close_time).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = [simulate(f"SYM{k}", 4500, seed=k, levels=(0.0015, 0.005), switch=0.002).window for k in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LOOK_WINDOWS", 16), ("LOOK_WAYS", 4)):
            patch.setattr(training, name, value)
        patch.setattr(optimiser, "EPOCHS", 1)
        made = train(own, timeframe="1h", config=TINY)
    folder = tmp_path_factory.mktemp("stress") / "model"
    save_generator(made, folder)
    return folder


@pytest.fixture(scope="module")
def asked(bars: Path, model: Path, windows: list[Window]) -> dict[str, Any]:
    return {
        "files": bars,
        "stamp": "close",
        "generator": model,
        "since": int(windows[0].close_times[-MADE]),
        "n": 3,
        "seed": 4,
        "model": "hs",
        "jobs": 1,
    }


@pytest.fixture(scope="module")
def result(asked: dict[str, Any]) -> StressResult:
    return run_stress(**asked)


def test_history_comes_out_as_in_a_backtest(result: StressResult, asked: dict[str, Any]) -> None:
    """The bars as they were go through the same path: books and scores are those of a plain backtest."""
    plain = run_backtest(
        asked["files"],
        stamp="close",
        timeframe="1h",
        model="hs",
        symbols=["LONG", "PAIR"],
        since=asked["since"],
        baselines=False,
    )
    assert result.books.filter(regime="history").drop("regime", "number").equals(plain.portfolio)
    pooled = plain.scores.filter(symbol="all").drop("symbol")
    assert result.scores.filter(regime="history").drop("regime", "number").equals(pooled)


def test_each_scenario_is_a_backtest_of_its_bars(
    result: StressResult, asked: dict[str, Any], model: Path
) -> None:
    """What stands there of a scenario is what `run_backtest` says of it, whatever others were made."""
    windows = _windows(asked)
    [scenario] = load_generator(model).scenarios(windows, "crisis", (2,), 4, since=asked["since"])
    one = run_backtest(
        asked["files"], stamp="close", timeframe="1h", model="hs", scenario=scenario, baselines=False
    )
    books = result.books.filter(regime="crisis", number=2).drop("regime", "number")
    assert books.equals(one.portfolio)
    assert one.meta["scenario"] == scenario[0].mark
    closes = result.prices.filter(regime="crisis", number=2, symbol="PAIR")["close"].to_numpy()
    assert (closes == scenario[1].rows[-MADE - 1 :, 3]).all()
    assert "Barcast backtest: scenario, not forecast" in html(one)


def _windows(asked: dict[str, Any]) -> list[Window]:
    frame = pl.read_parquet(asked["files"]).filter(pl.col("symbol") != "YOUNG").sort("symbol", "close_time")
    return [
        Window(
            symbol,
            own["close_time"].dt.epoch("ns").to_numpy(),
            own.select("open", "high", "low", "close", "volume").to_numpy(),
        )
        for (symbol,), own in frame.group_by("symbol", maintain_order=True)
    ]


def test_the_same_seed_gives_the_same_bytes(
    result: StressResult, asked: dict[str, Any], tmp_path: Path
) -> None:
    """Also with two workers; another seed gives other scenarios."""
    again = run_stress(**asked | {"jobs": 2})
    for name, some in (("a", result), ("b", again)):
        some.save(tmp_path / name)
        write_stress(some, tmp_path / name / "report.html")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "books.parquet",
        "equity.parquet",
        "prices.parquet",
        "report.html",
        "scores.parquet",
        "stress.json",
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Scenario, not forecast" in page
    assert StressResult.load(tmp_path / "a").books.equals(result.books)
    other = run_stress(**asked | {"seed": 5, "n": 1, "regimes": "crisis"})
    mine, others = (x.books.filter(regime="crisis", number=0) for x in (result, other))
    assert not mine.equals(others)


def test_what_came_before_is_asked_once(model: Path) -> None:
    """A scenario's backtest is the same to the bit where a calibrated model's past answers are kept."""
    frame = scan([sample_bars()], "close", Calendars("XNYS", Timeframe.parse("session")), ["MSFT"])
    [window] = read_windows(frame).values()
    since = int(window.close_times[-MADE])
    first, second = load_generator(model).generate(window, "volatile", 2, 1, since=since)
    settings = {"stamp": "close", "timeframe": "session", "calendar": "XNYS", "model": sample_checkpoint()}
    settings |= {"files": sample_bars(), "baselines": False}
    remembered = Remembered(since)
    run_backtest(**settings, scenario=first, cache=remembered)
    assert len(remembered._said) > 1000
    assert all(close < since for _, _, close in remembered._said)
    plain, kept = (run_backtest(**settings, scenario=second, cache=cache) for cache in (None, remembered))
    assert kept.meta["decisions_sha256"] == plain.meta["decisions_sha256"]


def test_what_one_model_said_is_not_anothers(windows: list[Window]) -> None:
    """Two models that share a memory keep their own answers."""
    remembered = Remembered(windows[0].close_time + 1)
    for _ in range(2):
        for name in ("hs", "ewma"):
            model = open_model(name, "1h", None, None)
            [found] = remembered.of(model).forecast([windows[0]])
            assert found.quantiles.tobytes() == model.forecast([windows[0]])[0].quantiles.tobytes()
    assert len(remembered._said) == 2


def test_a_symbol_without_a_past_is_left_out_by_name(result: StressResult) -> None:
    """The others go on."""
    assert result.meta["symbols"] == ["LONG", "PAIR"]
    assert "YOUNG" in result.meta["warning"]


def test_without_since_all_begin_together(
    asked: dict[str, Any], windows: list[Window], tmp_path: Path
) -> None:
    """The first close at which every symbol that can be made up has a past, also where bars are missing."""
    times, k = windows[0].close_times, LEAST_BEFORE + 20
    holes = {"LONG": times[100:120], "PAIR": times[k - 5 : k + 5]}
    at = pl.col("close_time").dt.epoch("ns")
    missing = [(pl.col("symbol") == name) & at.is_between(*t[[0, -1]]) for name, t in holes.items()]
    pl.read_parquet(asked["files"]).filter(~pl.any_horizontal(missing)).write_parquet(
        tmp_path / "bars.parquet"
    )
    own = {"files": tmp_path / "bars.parquet", "since": None, "until": int(times[k + 400])}
    found = run_stress(**asked | own | {"n": 1, "regimes": ["calm"]})
    assert found.meta["since"] == to_text(int(times[k]))
    for regime in ("history", "calm"):
        assert found.equity.filter(regime=regime).select(at.min()).item() == times[k]
        for name, first in (("LONG", k - 1), ("PAIR", k - 6)):
            prices = found.prices.filter(regime=regime, symbol=name)
            assert prices.select(at.min()).item() == times[first]


def test_what_is_kept_does_not_grow_with_the_bars(
    result: StressResult, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equity and prices some closes, the same in all scenarios, and of few symbols; their numbers stay."""
    monkeypatch.setattr(stress, "CLOSES", 40)
    monkeypatch.setattr(stress, "SYMBOLS_DRAWN", 1)
    few = run_stress(**asked | {"n": 1, "regimes": "crisis"})
    assert few.equity["close_time"].n_unique() == 40
    for regime in ("history", "crisis"):
        whole, some = (each.equity.filter(regime=regime, number=0) for each in (result, few))
        same = whole.join(some, on=["strategy", "close_time"], how="semi", maintain_order="left")
        assert same.equals(some)
        ends = [(each["close_time"].min(), each["close_time"].max()) for each in (whole, some)]
        assert ends[0] == ends[1]
        assert few.books.filter(regime=regime).equals(result.books.filter(regime=regime, number=0))
    assert few.prices["symbol"].unique().to_list() == ["LONG"]
    assert few.prices.filter(regime="crisis").height == 40
    with pytest.raises(ConfigError, match="symbol 'PAIR' has no prices here: take one of LONG"):
        plot.stress_prices(few, "PAIR")
    write_stress(few, tmp_path / "report.html")


def test_a_result_is_whole_or_none(
    result: StressResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that is interrupted leaves nothing that passes for a result, and may be done again."""
    result.save(tmp_path)

    def full(path: Path, content: bytes) -> None:
        if path.stem == "prices":
            raise ConfigError("full")
        workers.write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(stress, "write_whole", full)
        with pytest.raises(ConfigError, match="full"):
            result.save(tmp_path)
    with pytest.raises(DataError, match="holds no whole result"):
        StressResult.load(tmp_path)
    result.save(tmp_path)
    assert StressResult.load(tmp_path).prices.equals(result.prices)
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds letter\.txt, which is no result of scenarios"):
        result.save(tmp_path)


def test_bars_that_the_generator_knows_are_named(result: StressResult) -> None:
    """It has learnt from the very time that is tested."""
    assert "The generator has learnt from bars up to 2024-0" in result.meta["warning"]


def test_warnings_of_scenarios_are_counted(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, with how often it came; what history says, too, is not said again."""
    said = iter(["old", "old\nnew", "old\nnew", "rare", "new"])
    plain = run_backtest(
        asked["files"],
        stamp="close",
        timeframe="1h",
        model="hs",
        symbols="LONG",
        since=asked["since"],
        baselines=False,
    )

    def warned(*_: Any, **__: Any) -> Any:
        plain.meta["warning"] = next(said)
        return plain

    monkeypatch.setattr(stress, "run_backtest", warned)
    lines = run_stress(**asked | {"n": 2}).meta["warning"].split("\n")
    assert lines[-3:] == ["old", "In 3 of 4 scenarios: new", "In 1 of 4 scenarios: rare"]


def test_the_summary_is_by_hand(result: StressResult) -> None:
    """Quantiles and means over scenarios, as numpy has them."""
    returns = result.books.filter(regime="crisis", strategy="median-drift")["total_return"].to_numpy()
    row = result.summary.row(
        by_predicate=(pl.col("regime") == "crisis") & (pl.col("strategy") == "median-drift"), named=True
    )
    assert row["scenarios"] == 3
    assert row["worst_return"] == pytest.approx(np.quantile(returns, 0.05))
    assert row["shortfall"] == returns.min()
    assert row["median_return"] == np.median(returns)
    assert row["losing"] == (returns < 0).mean()
    assert set(row) - {"regime", "strategy"} == set(stress.DEFINITIONS)
    many = pl.concat([result.books.head(1)] * 140).with_columns(
        number=pl.int_range(140), total_return=pl.int_range(140) / 100
    )
    [row] = StressResult(many, result.scores, result.equity, result.prices, {}).summary.iter_rows(named=True)
    assert row["shortfall"] == pytest.approx(0.03)  # of the lowest 7


def test_a_scenario_is_not_learnt_from(asked: dict[str, Any], model: Path) -> None:
    """No training beside it, and nothing that goes with history alone."""
    [scenario] = load_generator(model).generate(_windows(asked), "crisis", since=asked["since"])
    settings = {"stamp": "close", "timeframe": "1h", "model": "hs", "scenario": scenario}
    with pytest.raises(ConfigError, match="a scenario is made up, and nothing is learnt from it"):
        run_backtest(asked["files"], retrain="17 3 * * sun", **settings)
    split = Adjustment("LONG", asked["since"], 2.0, "split")
    for name, value in (("adjustments", [split]), ("symbols", ["LONG"]), ("until", asked["since"] + 1)):
        with pytest.raises(ConfigError, match=f"{name} is for history"):
            run_backtest(asked["files"], **{name: value}, **settings)
    with pytest.raises(ConfigError, match="scenario is empty"):
        run_backtest(asked["files"], **settings | {"scenario": []})
    with pytest.raises(
        ConfigError, match=r"scenario\[0\] is \[Scenario.* give one of the lists that generate"
    ):
        run_backtest(asked["files"], **settings | {"scenario": [scenario]})
    with pytest.raises(ConfigError, match="scenario is 'crisis', of type str"):
        run_backtest(asked["files"], **settings | {"scenario": "crisis"})


def test_a_hole_in_the_first_symbol_shortens_no_test(asked: dict[str, Any], model: Path) -> None:
    """What is tested begins with the first bar that is made up of any symbol."""
    long, pair = _windows(asked)
    kept = np.delete(np.arange(len(long)), np.s_[-MADE : 10 - MADE])
    holed = Window("LONG", long.close_times[kept], long.values[kept])
    since = asked["since"]
    [scenario] = load_generator(model).generate([holed, pair], "crisis", since=since)
    assert scenario[0].since > scenario[1].since == since
    one = run_backtest(
        asked["files"], stamp="close", timeframe="1h", model="hs", scenario=scenario, baselines=False
    )
    assert one.equity["close_time"].dt.epoch("ns").min() == since


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"regimes": ["panic"], "files": "none.parquet"}, ConfigError, "regime 'panic' is unknown: take one"),
        ({"regimes": ["calm", "calm"]}, ConfigError, "name each once"),
        ({"n": 0, "files": "none.parquet"}, ConfigError, "n = 0 scenarios cannot be"),
        ({"jobs": 0, "files": "none.parquet"}, ConfigError, "jobs = 0: take 1 or more, or -1"),
        ({"seed": -1, "files": "none.parquet"}, ConfigError, "seed = -1 cannot be"),
        ({"cfg_scale": 9.0}, ConfigError, "cfg_scale = 9.0 cannot be"),
        ({"since": 0}, DataError, "too few come before it; begin later"),
        ({"since": 4 * 10**18}, DataError, "too few come after it; begin earlier"),
        ({"symbols": ["YOUNG"]}, DataError, "no symbol has bars enough"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    asked: dict[str, Any], wrong: dict[str, Any], error: type[Exception], words: str
) -> None:
    """One sentence, from here and not from a worker."""
    with pytest.raises(error, match=words):
        run_stress(**asked | wrong)


def test_splits_are_no_returns(asked: dict[str, Any], windows: list[Window], tmp_path: Path) -> None:
    """A declared split is taken out before scenarios are made: the same tables as without it."""
    at = int(windows[0].close_times[2000])
    frame = pl.read_parquet(asked["files"])
    after = (pl.col("symbol") == "LONG") & (pl.col("close_time").dt.epoch("ns") > at)
    prices = [
        pl.when(after).then(pl.col(c) / 2).otherwise(pl.col(c)).alias(c)
        for c in ("open", "high", "low", "close")
    ]
    volume = pl.when(after).then(pl.col("volume") * 2).otherwise(pl.col("volume")).alias("volume")
    frame.with_columns(*prices, volume).write_parquet(tmp_path / "split.parquet")
    own = asked | {"files": tmp_path / "split.parquet", "n": 1, "regimes": ["crisis"]}
    found = run_stress(**own, adjustments=[Adjustment("LONG", at + 1, 0.5, "split")])
    plain = run_stress(**asked | {"n": 1, "regimes": ["crisis"]})
    assert found.scores["crps"].to_list() == pytest.approx(plain.scores["crps"].to_list(), rel=1e-9)


def test_the_command_writes_a_report(run: Any, asked: dict[str, Any], tmp_path: Path) -> None:
    """`barcast stress`; a folder of something else is refused."""
    since = np.datetime64(asked["since"], "ns").astype("datetime64[s]")
    options = [
        "--stamp",
        "close",
        "--generator",
        str(asked["generator"]),
        "--since",
        f"{since}Z",
        "--model",
        "hs",
    ]
    options += ["--scenarios", "1", "--regime", "crisis", "--seed", "4", "--jobs", "1"]
    status, out, err = run("stress", str(asked["files"]), *options, "--out", str(tmp_path / "out"))
    assert status == 0, err
    assert "scenario, not forecast" in out
    assert "YOUNG" in err
    told = json.loads((tmp_path / "out" / "stress.json").read_text())
    assert told["note"] == "scenario, not forecast"
    assert told["meta"]["regimes"] == ["crisis"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    status, _, err = run("stress", str(asked["files"]), *options, "--out", str(tmp_path / "mine"))
    assert status == 2
    assert "letter.txt" in err
    status, _, err = run("stress", "none.parquet", *options, "--jobs", "0")
    assert (status, "jobs = 0: take 1 or more" in err) == (78, True)


def test_the_shipped_generator_makes_scenarios_of_the_sample_bars() -> None:
    """It has learnt from bars before 2012 alone, and brings later ones into a crisis."""
    generator = load_generator(sample_generator())
    assert generator.trained.record.timeframe == "session"
    begin = int(np.datetime64("2012-01-01", "ns").astype(np.int64))
    assert generator.trained.record.validation_end < begin
    frame = scan([sample_bars()], "close", Calendars("XNYS", Timeframe.parse("session")), ["MSFT", "IBM"])
    windows = list(read_windows(frame).values())
    made = generator.generate(windows, "crisis", 4, since=begin)
    real = [np.diff(np.log(w.values[:, 3])) for w in windows]
    sizes = [
        np.std(np.diff(np.log(one.rows[-MADE:, 3]))) / r[1 - MADE :].std()
        for s in made
        for one, r in zip(s, real, strict=True)
    ]
    assert 1.5 < np.median(sizes) < 6


def test_a_generator_is_one_by_its_bars(model: Path, windows: list[Window]) -> None:
    """The scenario of a number does not depend on which others were asked for."""
    generator: StressScenarioGenerator = load_generator(model)
    some = list(generator.scenarios(windows[:2], "crisis", (1, 3), 7))
    whole = generator.generate(windows[:2], "crisis", 4, 7)
    assert [[one.number for one in each] for each in some] == [[1, 1], [3, 3]]
    assert all((a.rows == b.rows).all() for a, b in zip(some[1], whole[3], strict=True))
