"""GARCH: a process that is known is found again, and its paths are what theory says."""

import sys

import numpy as np
import pytest

from barcast.models import ConfigError, Garch, Window
from barcast.models.fitted import Series
from barcast.models.garch import CALM, Process, _maximum_likelihood
from tests.garch import simulate

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def process(n: int, omega: float, alpha: float, beta: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z, v, found = rng.standard_t(6, n) / np.sqrt(1.5), omega / (1 - alpha - beta), np.empty(n)
    for k in range(n):
        found[k] = np.sqrt(v) * z[k]
        v = omega + alpha * found[k] ** 2 + beta * v
    return found


def test_a_process_is_found_again() -> None:
    """The parameters of 20,000 simulated returns are recovered."""
    omega, alpha, beta = _maximum_likelihood(process(20_000, 0.03, 0.08, 0.89, seed=1))
    assert alpha == pytest.approx(0.08, abs=0.02)
    assert beta == pytest.approx(0.89, abs=0.03)
    assert omega / (1 - alpha - beta) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    "x",
    [
        np.eye(1, 300)[0] * 17.3,  # one move
        np.tile([1.0, -1.0], 150),
        np.concatenate([np.zeros(150), np.tile([1.4, -1.4], 75)]),
        np.exp(np.linspace(-9, 2, 300)) * np.tile([1.0, -1.0], 150),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_fitted_is_stationary(x: np.ndarray) -> None:
    """Returns that no GARCH process makes are given one that is stationary all the same."""
    omega, alpha, beta = _maximum_likelihood(x / np.sqrt((x * x).mean()))
    assert omega > 0
    assert min(alpha, beta) >= 0
    assert alpha + beta < 1


def test_one_step_is_the_residuals_times_the_volatility_of_now() -> None:
    """The quantiles over one bar are those of the fit's residuals, times a volatility filtered up to now."""
    forecaster = Garch("garch", "1h", (1, 4), LEVELS)
    window = simulate("SIM", 5480, seed=2).window
    f = forecaster.forecast([window])[0]
    digest, p = forecaster._fits["SIM"]
    r = np.diff(np.log(window.values[:, 3]))
    new = int((window.close_times > p.close_time).sum())
    assert 0 < new <= 480
    fit = r[-new - 4999 : -new]
    unit = np.sqrt((fit**2).mean())
    v, residuals = 1.0, []
    for k, x in enumerate(np.clip(r[-new - 4999 :] / unit, -15, 15)):
        if 50 <= k < len(fit):
            residuals.append(x / np.sqrt(v))
        v = p.omega + p.alpha * x * x + p.beta * v
    residuals = np.array(residuals[-2000:])
    z = np.sort(residuals - residuals.mean()) / residuals.std()
    paths = z[((np.arange(1000) + 0.5) / 1000 * len(z)).astype(int)] * np.sqrt(v) * unit
    np.testing.assert_allclose(f.quantiles[0], np.quantile(paths, LEVELS), rtol=1e-9)
    np.testing.assert_allclose([f.mean[0], f.std[0]], [paths.mean(), paths.std()], rtol=1e-6)
    assert f.rise[0] == (paths > 0).mean()
    assert digest


def test_paths_spread_as_theory_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance over 16 bars is the sum of the variances that the process expects for each."""
    forecaster = Garch("garch", "1h", (1, 16), LEVELS)
    monkeypatch.setattr("barcast.models.garch._maximum_likelihood", lambda x: (0.05, 0.1, 0.85))
    f = forecaster.forecast([simulate("SIM", 5480, seed=2).window])[0]
    p: Process = forecaster._fits["SIM"][1]
    long_run = p.unit**2 * 0.05 / (1 - 0.95)
    expected = sum(long_run + 0.95**k * (f.std[0] ** 2 - long_run) for k in range(16))
    assert f.std[1] ** 2 == pytest.approx(expected, rel=0.1)
    assert (np.abs(f.mean) < 0.02 * f.std).all()


def test_returns_of_any_size_give_the_same_process() -> None:
    """Prices that move a thousandth as much are fitted as well, to bands a thousandth as wide."""
    window = simulate("SIM", 2000, seed=4).window
    small = window.values.copy()
    small[:, :4] = np.exp(np.log(small[:, :4]) / 1000)
    big, tiny = (
        Garch("garch", "1h", (1, 4), LEVELS).forecast([Window("SIM", window.close_times, v)])[0].quantiles
        for v in (window.values, small)
    )
    np.testing.assert_allclose(big, 1000 * tiny, rtol=0.02, atol=1e-6)


def test_a_segment_without_a_fit_has_a_calm_process() -> None:
    """Bars that stand still are given the parameters of a calm process and no shocks."""
    window = simulate("SIM", 300, seed=1).window
    p = Garch("garch", "1h", (1,), LEVELS)._fit(Series.of(window.close_times, np.ones((300, 5))))
    assert (p.omega, p.alpha, p.beta) == CALM
    assert not p.residuals.any()


def test_without_arch_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that is missing is named with the command that installs it."""
    monkeypatch.setitem(sys.modules, "arch", None)
    said = r"'garch' needs the package arch; .* extra baselines: pip install '\.\[baselines\]'"
    with pytest.raises(ConfigError, match=said):
        Garch("garch", "1h", (1,), LEVELS)
