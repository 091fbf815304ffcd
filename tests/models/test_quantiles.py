"""Mean, spread and direction out of a few quantiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from barcast.models import LEVELS, Forecast
from barcast.models.quantiles import moments


def drawn(q: np.ndarray, levels: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """The quantile function that the docstring states, at probabilities x."""
    p = np.array(levels)
    low = (q[1] - q[0]) / np.log(p[1] / p[0])
    high = (q[-1] - q[-2]) / np.log((1 - p[-2]) / (1 - p[-1]))
    inside = np.interp(x, p, q)
    return np.where(
        x < p[0],
        q[0] + low * np.log(x / p[0]),
        np.where(x > p[-1], q[-1] - high * np.log((1 - x) / (1 - p[-1])), inside),
    )


@given(
    st.lists(st.integers(-50_000, 50_000).map(lambda n: n * 1e-6), min_size=7, max_size=7).map(sorted),
)
def test_they_are_those_of_the_stated_function(quantiles: list[float]) -> None:
    """Mean and deviation are the integrals over the drawn function; a rise is its share above zero."""
    q = np.array(quantiles)
    mean, std, rise = (x[0] for x in moments(q[None], LEVELS))
    x = (np.arange(200_000) + 0.5) / 200_000
    y = drawn(q, LEVELS, x)
    scale = 1e-3 * (np.ptp(q) + 1e-9)
    assert mean == pytest.approx(y.mean(), abs=scale)
    assert std == pytest.approx(y.std(), abs=5 * scale)
    assert 0 <= rise <= 1
    assert (y > 0).mean() - 1e-4 <= rise <= (y >= 0).mean() + 1e-4


def test_a_normal_distribution_is_nearly_recovered() -> None:
    """From seven quantiles of a normal the three are right within a few percent."""
    q = 0.002 + 0.01 * norm.ppf(LEVELS)
    mean, std, rise = (x[0] for x in moments(q[None], LEVELS))
    assert mean == pytest.approx(0.002, abs=1e-9)
    assert std == pytest.approx(0.01, rel=0.06)
    assert rise == pytest.approx(norm.cdf(0.2), abs=0.01)


def test_what_stands_still_has_no_spread() -> None:
    """Equal quantiles give their value, no spread and a sure direction, without a warning."""
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        mean, std, rise = moments(np.array([[0.01] * 7, [-0.01] * 7]), LEVELS)
    np.testing.assert_allclose(mean, [0.01, -0.01])
    np.testing.assert_allclose(std, 0, atol=1e-12)
    assert rise.tolist() == [1.0, 0.0]


def test_one_that_is_not_forecast_is_named() -> None:
    """A quantile of another level or horizon: which of the two it is, its value, and which there are."""
    q, some = np.array([[-0.1, 0.0, 0.1], [-0.2, 0.0, 0.2]]), np.zeros(2)
    forecast = Forecast("IBM", 0, 1.0, (1, 5), (0.05, 0.5, 0.95), q, some, some, some, False)
    assert forecast.quantile(0.95, 5) == 0.2
    with pytest.raises(ValueError, match=r"^level 0\.1 is not forecast: take one of 0\.05, 0\.5, 0\.95$"):
        forecast.quantile(0.1, 5)
    with pytest.raises(ValueError, match=r"^horizon 3 is not forecast: take one of 1, 5$"):
        forecast.quantile(0.1, 3)
