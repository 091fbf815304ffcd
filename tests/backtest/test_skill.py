"""What was published beside the baselines, on the same origins."""

import numpy as np
import polars as pl
import pytest

from barcast.backtest import skill as module
from barcast.backtest.evaluate import ALL, Field, evaluate
from barcast.backtest.result import level_column
from barcast.backtest.skill import DEFINITIONS, SCHEMA, skill
from barcast.daemon import gate
from barcast.daemon.timeframe import Timeframe
from barcast.models import BASELINES, LEVELS, Adjustment, Window
from barcast.models.evaluation import Forecasts, collect
from barcast.models.scores import THIRDS
from tests.garch import simulate

HORIZONS = (1, 4)
BARS = 480
DAILY = ["hs", "fhs", "ewma", "har"]


def histories(bars: int = BARS) -> dict[str, Window]:
    """Two symbols; the second one begins forty bars later."""
    a, b = simulate("A", bars, seed=1).window, simulate("B", bars, seed=2).window
    return {"A": a, "B": Window("B", b.close_times[40:], b.values[40:])}


def forecasts(name: str, timeframe: str = "1d", levels: tuple[float, ...] = LEVELS) -> Forecasts:
    """What a baseline says at every bar that it can forecast."""
    forecaster = BASELINES[name](timeframe, HORIZONS, levels)
    return collect([forecaster], list(histories().values()), since=0, until=1 << 62)


def frames(
    found: Forecasts, factor: float = 1.0, levels: tuple[float, ...] = LEVELS
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signals and outcomes as a backtest has them, the bands `factor` times as wide."""
    n, H, Q = found.quantiles[0].shape
    columns = {
        "symbol": np.repeat(found.symbols, H),
        "close_time": np.repeat(found.close_times, H),
        "horizon": np.tile(HORIZONS, n),
    }
    keys = pl.DataFrame(columns).with_columns(pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC"))
    q = factor * found.quantiles[0].reshape(-1, Q)
    named = [pl.Series(level_column(level), q[:, k]) for k, level in enumerate(levels)]
    shuffled = keys.with_columns(*named, model=pl.lit("m")).sample(fraction=1, shuffle=True, seed=1)
    return shuffled, keys.with_columns(outcome=pl.Series(found.outcomes.ravel()))


@pytest.fixture(scope="module")
def plain() -> tuple[pl.DataFrame, pl.DataFrame]:
    return frames(forecasts("ewma"))


@pytest.mark.parametrize(("timeframe", "name"), [("1d", "har"), ("1h", "fhs-s")])
def test_nothing_is_better_than_itself(timeframe: str, name: str) -> None:
    """A baseline's own signals have skill 0 against it, to the bit, and another against every other."""
    told: list[str] = []
    signals, outcomes = frames(forecasts(name, timeframe))
    table = skill(signals, outcomes, histories(), [], timeframe, lambda n, at: told.extend([at] * n))
    assert table.schema == SCHEMA
    own = table.filter(other=name)
    assert set(own["skill"]) == set(own["error"]) == {0.0}
    assert (table.filter(pl.col("other") != name)["skill"] != 0).all()
    expected = DAILY if timeframe == "1d" else list(gate.RIVALS)
    rows = table.filter(symbol="all", horizon=4)
    assert rows.select("regime", "other").rows() == [(r, o) for r in ("all", *THIRDS) for o in expected]
    assert set(table["symbol"]) == {"A", "B", "all"}
    pooled = table.filter(regime="all", horizon=1, other=name)
    assert len(told) == len(expected) * pooled.filter(symbol="all")["n"].item()
    assert set(DEFINITIONS) == {"regime", *SCHEMA.names()[4:]}


def test_worse_on_purpose(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """Bands that are far too wide have negative skill beyond doubt, in every regime."""
    signals, outcomes = frames(forecasts("ewma"), factor=3.0)
    table = skill(signals, outcomes, histories(), [], "1d").filter(other="ewma")
    assert (table["skill"] < -2 * table["error"]).all()
    assert (table["error"] > 0).all()
    same = skill(*plain, histories(), [], "1d").filter(other="ewma")
    assert table["other_crps"].to_list() == same["crps"].to_list()
    shares = table.select(pl.col("skill") - 100 * (1 - pl.col("crps") / pl.col("other_crps"))).to_series()
    assert shares.abs().max() < 1e-9


def test_as_evaluate_has_it(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """On the same origins CRPS, gains and their errors are those of `barcast evaluate`, thirds as large."""
    models = {name: BASELINES[name]("1d", HORIZONS, LEVELS) for name in DAILY}
    models["mine"] = BASELINES["ewma"]("1d", HORIZONS, LEVELS)
    field = Field(models, dict.fromkeys(models, "hs"), {})
    known = evaluate(field, list(histories().values()), Timeframe.parse("1d"), folds=1, stride=1)
    table = skill(*plain, histories(), [], "1d")
    for h in HORIZONS:
        pooled = table.filter(symbol="all", regime="all", horizon=h)
        row = known.scores.filter(fold=ALL, horizon=h, model="mine").row(0, named=True)
        assert set(pooled["n"]) == {row["n"]}
        assert set(pooled["times"]) == {row["times"]}
        assert pooled["crps"][0] == pytest.approx(row["crps"], rel=1e-12)
        for one in pooled.iter_rows(named=True):
            gain = known.gain(h, "mine", one["other"])
            assert (one["skill"], one["error"]) == pytest.approx(tuple(gain), rel=1e-9)
        for name in THIRDS:
            part = table.filter(symbol="all", regime=name, horizon=h, other="hs")
            assert part["n"].item() == known.thirds.filter(horizon=h, model="hs", third=name)["n"].item()


def test_later_bars_change_nothing(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """What baselines say at an origin does not depend on the bars after it."""
    last = histories()["A"].close_times[-60]
    signals, outcomes = (f.filter(pl.col("close_time").to_physical() <= last) for f in plain)
    poisoned = {}
    for symbol, w in histories().items():
        values = w.values.copy()
        values[w.close_times > last] *= np.random.default_rng(1).uniform(0.1, 10.0)
        poisoned[symbol] = Window(symbol, w.close_times, values)
    clean = skill(signals, outcomes, histories(), [], "1d")
    assert clean["n"].max() > 100
    assert clean.equals(skill(signals, outcomes, poisoned, [], "1d"))


def test_price_basis_of_then(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """A declared split is no return: the table is the one of bars without it."""
    whole = histories()
    at = int(whole["A"].close_times[-100])
    values = whole["A"].values.copy()
    values[whole["A"].close_times > at, :4] /= 4
    cut = whole | {"A": Window("A", whole["A"].close_times, values)}
    declared = [Adjustment("A", at, 0.25, "split")]
    expected = skill(*plain, whole, [], "1d")
    found = skill(*plain, cut, declared, "1d")
    np.testing.assert_allclose(found["other_crps"], expected["other_crps"], rtol=1e-9)
    silent = skill(*plain, cut, [], "1d").filter(symbol="A", regime="all")
    assert (silent["other_crps"] > 1.1 * expected.filter(symbol="A", regime="all")["other_crps"]).any()


def test_many_origins_are_thinned(plain: tuple[pl.DataFrame, pl.DataFrame], monkeypatch) -> None:
    """Of many origins about so many are taken, at times that symbols have in common."""
    whole = skill(*plain, histories(), [], "1d").filter(symbol="all", regime="all", horizon=1)
    monkeypatch.setattr(module, "MAX_ORIGINS", 60)
    table = skill(*plain, histories(), [], "1d").filter(regime="all", horizon=1, other="hs")
    n = dict(table.select("symbol", "n").rows())
    assert whole["n"][0] > 400
    assert 50 < n["all"] < 90
    assert n["A"] == table.filter(symbol="all")["times"].item() > n["B"] == n["all"] - n["A"]


def test_only_what_is_known_counts(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """An origin without one of its outcomes, or with too few bars up to it, is none."""
    signals, outcomes = plain
    late = histories()["A"].close_times[-30]
    partly = outcomes.filter((pl.col("horizon") == 1) | (pl.col("close_time").to_physical() < late))
    whole = skill(signals, outcomes, histories(), [], "1d").filter(symbol="A", regime="all", other="hs")
    fewer = skill(signals, partly, histories(), [], "1d").filter(symbol="A", regime="all", other="hs")
    assert whole["n"].to_list() == [BARS - 4 - least_bars() + 1] * 2
    assert fewer["n"].to_list() == [n - 26 for n in whole["n"]]


def least_bars() -> int:
    return max(BASELINES[name]("1d", HORIZONS, LEVELS).card.min_window for name in DAILY)


def test_nothing_to_compare(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """Without a signal, an outcome or enough bars the table is empty."""
    signals, outcomes = plain
    early = histories()["A"].close_times[200]
    short = signals.filter(pl.col("close_time").to_physical() < early)
    for one, other in ((signals.clear(), outcomes), (signals, outcomes.clear()), (short, outcomes)):
        table = skill(one, other, histories(), [], "1d")
        assert (table.height, table.schema) == (0, SCHEMA)


def test_other_levels() -> None:
    """Baselines forecast the levels of the signals; without an 80 % interval there are no regimes."""
    levels = (0.25, 0.5, 0.75)
    table = skill(*frames(forecasts("fhs", levels=levels), levels=levels), histories(), [], "1d")
    assert set(table["regime"]) == {"all"}
    assert set(table.filter(other="fhs")["skill"]) == {0.0}


def test_signal_without_its_bar(plain: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """A history that lacks a signal's bar is an error, not an origin at the next one."""
    w = histories()["A"]
    keep = np.arange(len(w)) != 400
    holed = histories() | {"A": Window("A", w.close_times[keep], w.values[keep])}
    with pytest.raises(ValueError, match="A has a signal at 2024-01-17T17:00:00Z, but no bar of then"):
        skill(*plain, holed, [], "1d")
