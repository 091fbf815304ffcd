from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from barcast.models import ConfigError, Forecast
from barcast.strategies import KINDS, MedianDrift, QuantileBand, Rank, SkewTilt, VolatilityTarget, build

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def forecast(symbol: str, *rows: list[float], std: float = 0.01) -> Forecast:
    quantiles: NDArray[np.float64] = np.array(rows)
    H = len(rows)
    spread = np.full(H, std)
    horizons = tuple(5 * h + 1 for h in range(H))
    return Forecast(
        symbol, 0, 100.0, horizons, LEVELS, quantiles, quantiles[:, 2], spread, np.full(H, 0.5), False
    )


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Forecast]:
    symbols = draw(st.lists(st.sampled_from(["AAPL", "GOOG", "IBM", "MSFT"]), unique=True))
    row = st.lists(st.floats(-1, 1), min_size=5, max_size=5).map(sorted)
    return {symbol: forecast(symbol, draw(row), draw(row), std=draw(st.floats(0, 1))) for symbol in symbols}


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ([-0.01, 0.001, 0.002, 0.005, 0.02], 0.5),
        ([-0.01, 0.0004, 0.002, 0.005, 0.02], 0.0),
        ([-0.01, 0.00041, 0.002, 0.005, 0.02], 0.002 / 0.00459),
        ([-0.02, -0.005, -0.002, -0.001, 0.01], -0.5),
        ([-0.02, -0.005, -0.002, -0.0004, 0.01], 0.0),
        ([0.01, 0.011, 0.012, 0.013, 0.014], 1.0),
        ([-0.01] * 5, -1.0),
        ([-0.01, -0.005, 0.0, 0.005, 0.01], 0.0),
    ],
)
def test_quantile_band(row: list[float], target: float) -> None:
    """The band trades when its central half clears a round trip, by median over width."""
    targets = QuantileBand("band", 0.5, costs=2.0).on_forecasts(0, {"IBM": forecast("IBM", row)})
    assert targets == {"IBM": pytest.approx(target)}


@pytest.mark.parametrize(
    ("band", "target"),
    [(0.5, 0.0), (0.3, 0.0), (0.14, 0.002 / 0.0095), (0.1, 0.002 / 0.0095), (0.0, 0.002 / 0.0095)],
)
def test_narrower_band(band: float, target: float) -> None:
    """A narrower band trades sooner, not larger; its edges lie on the line between the levels."""
    row = [-0.02, -0.005, 0.002, 0.0045, 0.03]
    targets = QuantileBand("band", band, costs=0.0).on_forecasts(0, {"IBM": forecast("IBM", row)})
    assert targets == {"IBM": pytest.approx(target)}


@pytest.mark.parametrize(
    ("median", "std", "target"),
    [(0.002, 0.01, 0.4), (-0.002, 0.01, -0.4), (0.0004, 0.01, 0.0), (0.02, 0.01, 1.0), (-0.02, 0.0, -1.0)],
)
def test_median_drift(median: float, std: float, target: float) -> None:
    """The drift is held in proportion to median over standard deviation, outside the dead zone."""
    strategy = MedianDrift("drift", gain=2.0, costs=2.0)
    targets = strategy.on_forecasts(0, {"IBM": forecast("IBM", [median] * 5, std=std)})
    assert targets == {"IBM": pytest.approx(target)}


def test_horizon() -> None:
    """A strategy trades on its horizon, the longest unless said; one that is not forecast is refused."""
    both = {"IBM": forecast("IBM", [-0.01] * 5, [0.01] * 5)}
    assert QuantileBand("band").on_forecasts(0, both) == {"IBM": 1.0}
    assert QuantileBand("band", horizon=1).on_forecasts(0, both) == {"IBM": -1.0}
    with pytest.raises(ConfigError, match="'band' wants horizon 5, but the model forecasts 1, 6 bars"):
        QuantileBand("band", horizon=5).on_forecasts(0, both)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_takes_a_horizon(kind: str) -> None:
    """Whatever the company, a horizon that is not forecast is refused at the first group."""
    with pytest.raises(ConfigError, match="'x' wants horizon 5, but the model forecasts 1 bars"):
        build(kind, "x", {"horizon": 5}).on_forecasts(0, {"IBM": forecast("IBM", [0.0] * 5)})


@pytest.mark.parametrize(
    ("std", "target"), [(0.02, 0.5), (0.04, 0.25), (0.01, 1.0), (0.001, 1.0), (0.0, 1.0)]
)
def test_volatility_target(std: float, target: float) -> None:
    """The forecast's standard deviation times the position is the wanted volatility, until all is held."""
    strategy = VolatilityTarget("vol", volatility=0.01)
    row = [-0.1, -0.05, -0.04, -0.01, 0.0]  # no view on the direction
    assert strategy.on_forecasts(0, {"IBM": forecast("IBM", row, std=std)}) == {"IBM": pytest.approx(target)}


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ([-0.02, -0.01, 0.0, 0.01, 0.02], 0.0),
        ([-0.01, -0.005, 0.0, 0.01, 0.02], 1 / 3 * 2),
        ([-0.02, -0.01, 0.0, 0.005, 0.01], -1 / 3 * 2),
        ([0.04, 0.045, 0.05, 0.06, 0.07], 1 / 3 * 2),
        ([-0.01, -0.01, -0.01, 0.0, 0.03], 1.0),
        ([-0.03, 0.0, 0.01, 0.01, 0.01], -1.0),
        ([-0.0101, -0.005, 0.0, 0.005, 0.01], 0.0),
        ([0.01] * 5, 0.0),
    ],
)
def test_skew_tilt(row: list[float], target: float) -> None:
    """The longer tail is leaned to wherever the median is, in proportion, outside the dead zone."""
    targets = SkewTilt("skew", gain=2.0, dead=0.01).on_forecasts(0, {"IBM": forecast("IBM", row)})
    assert targets == {"IBM": pytest.approx(target)}


def test_skew_level() -> None:
    """The level says how far out the tails are compared: at the quartiles it is Bowley's skewness."""
    group = {"IBM": forecast("IBM", [-0.05, -0.01, 0.0, 0.03, 0.05])}
    assert SkewTilt("skew", 0.25, gain=1.0).on_forecasts(0, group) == {"IBM": pytest.approx(0.5)}
    assert SkewTilt("skew", 0.05, gain=1.0).on_forecasts(0, group) == {"IBM": 0.0}


def ranked(medians: dict[str, float], **params: Any) -> dict[str, float]:
    """Which symbols a rank holds, of forecasts with these medians and a standard deviation of 0.01."""
    group = {symbol: forecast(symbol, [median] * 5) for symbol, median in medians.items()}
    targets = Rank("rank", **params).on_forecasts(0, group)
    assert list(targets) == list(medians)
    return {symbol: target for symbol, target in targets.items() if target}


def test_rank() -> None:
    """The best are held long against as many of the worst; what counts is median over deviation."""
    medians = {"C": 0.03, "A": -0.01, "E": 0.0, "B": -0.02, "D": 0.01}
    assert ranked(medians) == {"C": 1.0, "B": -1.0}
    assert ranked(medians, share=0.4) == {"C": 1.0, "D": 1.0, "A": -1.0, "B": -1.0}
    assert ranked(medians, share=0.5) == ranked(medians, share=0.4)
    group = {s: forecast(s, [m] * 5, std=0.1 if s == "C" else 0.01) for s, m in medians.items()}
    assert Rank("rank").on_forecasts(0, group)["D"] == 1.0


def test_rank_of_few() -> None:
    """A group of fewer symbols than wanted holds nothing."""
    assert ranked({"A": 0.01, "B": 0.02, "C": 0.03}, least=4) == {}
    assert ranked({"A": 0.01, "B": 0.02, "C": 0.03}) == {"C": 1.0, "A": -1.0}
    assert ranked({"A": 0.01}) == {}
    assert ranked({}) == {}


def test_rank_of_equals() -> None:
    """Equal forecasts are ranked by symbol, whatever order they come in."""
    for order in ("ABCD", "DCBA", "BDAC"):
        assert ranked(dict.fromkeys(order, 0.01)) == {"A": 1.0, "D": -1.0}


def test_rank_of_a_hundred() -> None:
    """A share that is exact on paper is not one symbol short for the sake of a float."""
    held = ranked({f"S{n:03}": float(n) for n in range(100)}, share=0.29)
    assert sum(target > 0 for target in held.values()) == 29


@given(group=groups())
def test_rank_is_neutral(group: dict[str, Forecast]) -> None:
    """Whatever is ranked, longs and shorts come to the same value."""
    targets = Rank("rank", share=0.5, least=2).on_forecasts(0, group)
    assert sum(targets.values()) == 0
    assert set(targets.values()) <= {-1.0, 0.0, 1.0}
    assert any(targets.values()) is (len(group) > 1)
    assert Rank("rank", share=0.5, least=2).on_forecasts(0, dict(reversed(group.items()))) == targets


def test_band_up_to_the_outermost_levels() -> None:
    """0.5 - 0.9 / 2 is a little less than 0.05 in binary fractions, and means it."""
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = np.array([[0.01, 0.02, 0.03, 0.04, 0.05]])
    one = Forecast("A", 0, 100.0, (1,), levels, quantiles, np.array([0.03]), np.ones(1), np.ones(1), False)
    assert QuantileBand("x", band=0.9).on_forecasts(0, {"A": one}) == {"A": 1.0}


def test_level_not_forecast() -> None:
    """A model that does not reach the band's edges is refused by name."""
    one = np.zeros((1, 1))
    narrow = Forecast("IBM", 0, 1.0, (1,), (0.5,), one, one[0], one[0], one[0], False)
    with pytest.raises(
        ConfigError, match=r"'band' needs the level 0\.25, but the model forecasts 0\.5 to 0\.5:"
    ):
        QuantileBand("band", 0.5).on_forecasts(0, {"IBM": narrow})


@given(
    group=groups(),
    kind=st.sampled_from(sorted(KINDS.keys() - {"rank"})),
    gain=st.floats(0, 100),
    costs=st.floats(0, 50),
)
def test_targets(group: dict[str, Forecast], kind: str, gain: float, costs: float) -> None:
    """Targets lie in [-1, 1], one for each symbol, whatever the order and company of the symbols."""
    known = {field.name for field in fields(KINDS[kind])}
    params = {"costs": costs, "gain": gain}
    strategy = build(kind, "any", {name: value for name, value in params.items() if name in known})
    targets = strategy.on_forecasts(0, group)
    assert targets.keys() == group.keys()
    assert all(-1 <= target <= 1 for target in targets.values())
    backwards = dict(reversed(group.items()))
    assert strategy.on_forecasts(0, backwards) == targets
    for symbol, alone in group.items():
        assert strategy.on_forecasts(0, {symbol: alone}) == {symbol: targets[symbol]}
