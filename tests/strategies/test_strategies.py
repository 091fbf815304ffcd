from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from barcast.models import ConfigError, Forecast
from barcast.strategies import KINDS, MedianDrift, QuantileBand, build

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
    targets = QuantileBand("band", costs=2.0).on_forecasts(0, {"IBM": forecast("IBM", row)})
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
    """A strategy trades on its horizon, the shortest unless said; one that is not forecast is refused."""
    both = {"IBM": forecast("IBM", [-0.01] * 5, [0.01] * 5)}
    assert QuantileBand("band").on_forecasts(0, both) == {"IBM": -1.0}
    assert QuantileBand("band", horizon=6).on_forecasts(0, both) == {"IBM": 1.0}
    with pytest.raises(ConfigError, match="'band' wants horizon 5, but the model forecasts 1, 6 bars"):
        QuantileBand("band", horizon=5).on_forecasts(0, both)


def test_level_not_forecast() -> None:
    """A model that does not reach the band's edges is refused by name."""
    one = np.zeros((1, 1))
    narrow = Forecast("IBM", 0, 1.0, (1,), (0.5,), one, one[0], one[0], one[0], False)
    with pytest.raises(
        ConfigError, match=r"'band' needs the level 0\.25, but the model forecasts 0\.5 to 0\.5:"
    ):
        QuantileBand("band").on_forecasts(0, {"IBM": narrow})


@given(group=groups(), kind=st.sampled_from(sorted(KINDS)), gain=st.floats(0, 100), costs=st.floats(0, 50))
def test_targets(group: dict[str, Forecast], kind: str, gain: float, costs: float) -> None:
    """Targets lie in [-1, 1], one for each symbol, whatever the order and company of the symbols."""
    params = {"costs": costs} | ({"gain": gain} if kind == "median-drift" else {})
    strategy = build(kind, "any", params)
    targets = strategy.on_forecasts(0, group)
    assert targets.keys() == group.keys()
    assert all(-1 <= target <= 1 for target in targets.values())
    backwards = dict(reversed(group.items()))
    assert strategy.on_forecasts(0, backwards) == targets
    for symbol, alone in group.items():
        assert strategy.on_forecasts(0, {symbol: alone}) == {symbol: targets[symbol]}


def test_build() -> None:
    """A config names the kind and gives the parameters."""
    assert build("quantile-band", "tight", {"costs": 1, "horizon": 5}) == QuantileBand(
        "tight", costs=1, horizon=5
    )
    assert build("median-drift", "drift", {}) == MedianDrift("drift")


@pytest.mark.parametrize(
    ("kind", "name", "params", "message"),
    [
        ("quantile_band", "x", {}, "kind 'quantile_band' is unknown: did you mean quantile-band"),
        ("martingale", "x", {}, "take one of quantile-band, median-drift"),
        (
            "median-drift",
            "x",
            {"cost": 1},
            "no parameter 'cost': did you mean costs.* There are gain, costs, horizon",
        ),
        ("median-drift", "x", {"name": "y"}, "no parameter 'name'"),
        ("median-drift", "x", {"costs": -1}, "costs is -1, not a number from 0"),
        ("median-drift", "x", {"gain": "2"}, "gain is '2', not a number"),
        ("median-drift", "x", {"gain": float("nan")}, "gain is nan"),
        ("median-drift", "x", {"gain": True}, "gain is True"),
        ("median-drift", "x", {"horizon": 1.5}, "horizon is 1.5, not a whole number of bars from 1"),
        ("median-drift", "a/b", {}, "name 'a/b' cannot be part of a topic"),
    ],
)
def test_build_refuses(kind: str, name: str, params: dict[str, Any], message: str) -> None:
    """An unknown kind or parameter and a value that does not fit are refused, saying what there is."""
    with pytest.raises(ConfigError, match=message):
        build(kind, name, params)
