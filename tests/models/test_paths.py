"""Joint paths: what is read from them at a horizon is the forecast, and they keep its promises."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.stats import norm

from barcast.models import (
    SAMPLERS,
    ConfigError,
    Forecast,
    Forecaster,
    Window,
    open_model,
    training,
)
from barcast.models.calibration import Calibrated
from barcast.models.diffusion import SSSDForecaster
from barcast.models.origins import Origins
from barcast.models.paths import Coupling, between, coupled, path_steps, read, with_paths
from barcast.models.quantiles import moments
from barcast.models.scaling import APART
from barcast.models.trained import Trained
from barcast.models.training import _Training
from barcast.models.window import runs
from tests.garch import simulate

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
Q = np.sort(np.random.default_rng(1).normal(0, 0.01, (3, 7)), -1) * np.array([[1.0], [2.0], [4.0]])


@pytest.mark.parametrize("horizons", [(1,), (1, 4, 16), (1, 5, 20), (3, 32), (7, 40, 250), (1, 2, 1000)])
def test_steps_rise_to_the_longest_horizon_and_hold_them_all(horizons: tuple[int, ...]) -> None:
    """Every bar up to 32; beyond, 32 even steps and the horizons."""
    steps = path_steps(horizons)
    assert list(steps) == sorted(set(steps))
    assert set(horizons) <= set(steps)
    assert (steps[0] >= 1, steps[-1]) == (True, max(horizons))
    assert len(steps) == max(horizons) if max(horizons) <= 32 else 32 <= len(steps) <= 32 + len(horizons)


def test_between_is_the_forecast_at_its_horizons_and_wider_by_the_root_of_time_between() -> None:
    """To the bit at a horizon; of normal quantiles whose variance grows evenly, what a random walk has."""
    assert between(Q, LEVELS, (1, 4, 16), (1, 4, 16)).tobytes() == Q.tobytes()
    assert (np.diff(between(Q, LEVELS, (1, 4, 16), range(1, 17)), axis=-1) >= 0).all()
    walk = norm.ppf(LEVELS) * np.sqrt([[2], [5], [20]])
    found = between(walk, LEVELS, (2, 5, 20), range(1, 21))
    np.testing.assert_allclose(found, norm.ppf(LEVELS) * np.sqrt(np.arange(1, 21))[:, None], rtol=1e-12)
    still = between(np.zeros((2, 7)), LEVELS, (1, 4), (1, 2, 3, 4))
    assert not still.any()


@pytest.mark.parametrize("levels", [(0.05, 0.95), (0.1, 0.2, 0.8, 0.9), (0.1, 0.3, 0.5, 0.7, 0.9)])
def test_between_has_a_median_without_its_level(levels: tuple[float, ...]) -> None:
    """Of a random walk seen at its ends, whatever the levels: no step leans to a side."""
    q = norm.ppf(levels)
    walk = q * np.sqrt([[4], [16]])
    found = between(walk, levels, (4, 16), range(1, 17))
    np.testing.assert_allclose(found, q * np.sqrt(np.arange(1, 17))[:, None], rtol=1e-9, atol=1e-12)
    up = between(walk + 1.0, levels, (4, 16), (2, 10))  # and with a drift that came at once
    np.testing.assert_allclose(up.mean(-1), [0.5, 1.0], atol=1e-12)


def test_reading_is_the_distribution_that_mean_and_spread_are_of() -> None:
    """At the levels the quantiles, with the mean and deviation of `moments` over all probabilities."""
    np.testing.assert_allclose(read(Q, LEVELS, np.array(LEVELS)), Q, atol=1e-17)
    dense = read(Q, LEVELS, (np.arange(400_000) + 0.5) / 400_000)
    assert (np.diff(dense) >= 0).all()
    mean, std, rise = moments(Q, LEVELS)
    np.testing.assert_allclose(dense.mean(-1), mean, atol=1e-7)
    np.testing.assert_allclose(dense.std(-1), std, rtol=1e-3)
    np.testing.assert_allclose((dense > 0).mean(-1), rise, atol=1e-5)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    series = [simulate(name, 1500, seed=20 + i).window for i, name in enumerate(("SYM0", "NEW0", "NEW1"))]
    return [Window(w.symbol, w.close_times[:n], w.values[:n]) for w in series for n in (90, 700, 1500)]


def consecutive(whole: Window, ends: Sequence[int]) -> list[Window]:
    """Windows that end with these rows of one array: where they are near, they share the work of its bars."""
    return [Window(whole.symbol, whole.close_times[:n], whole.values[:n]) for n in ends]


def poisoned(whole: Window, n: int) -> Window:
    """The same bars up to row n; what comes after them is far away."""
    values = whole.values.copy()
    values[n:] *= 1 + np.random.default_rng(n).random((len(values) - n, 1))
    return Window(whole.symbol, whole.close_times, values)


def paths_are_those_of_each_window_alone(forecaster: Forecaster, windows: Sequence[Window]) -> None:
    """Alone, in company and in another order, paths have the same bits."""
    together = [_paths(forecast) for forecast in forecaster.forecast(windows)]
    assert len(set(together)) == len(windows)
    back = forecaster.forecast(windows[::-1])[::-1]
    assert [_paths(forecast) for forecast in back] == together
    assert [_paths(forecaster.forecast([window])[0]) for window in windows] == together


def paths_know_no_later_bar(forecaster: Forecaster, whole: Window, ends: Sequence[int]) -> None:
    """Whatever follows a window in its array, even in later windows of the call, paths keep their bits."""
    clean = [_paths(forecast) for forecast in forecaster.forecast(consecutive(whole, ends))]
    for k, n in enumerate(ends[:-1], 1):
        forecasts = forecaster.forecast(consecutive(poisoned(whole, n), ends))
        same = [_paths(forecast) == before for forecast, before in zip(forecasts, clean, strict=True)]
        assert same == [True] * k + [False] * (len(ends) - k)


def paths_are_the_forecast_at_its_horizons(forecaster: Forecaster, windows: Sequence[Window]) -> None:
    """At each horizon they hold its quantile function at evenly spread probabilities, each once."""
    for forecast in forecaster.forecast(windows):
        paths = forecast.paths
        assert paths is not None
        assert paths.steps == forecaster.card.path
        at = [paths.steps.index(h) for h in forecast.horizons]
        S = len(paths.returns)
        found = np.sort(paths.returns[:, at], 0).T
        expected = read(forecast.quantiles, forecast.levels, (np.arange(S) + 0.5) / S)
        assert np.abs(found - expected).max() <= 1e-15


def _paths(forecast: Forecast) -> bytes:
    assert forecast.paths is not None
    return forecast.paths.returns.tobytes() + forecast.paths.bridge.tobytes()


@pytest.mark.parametrize(("sampler", "steps"), [(None, None), ("ddim", 4), (None, 0)])
def test_horizons_read_from_the_paths_are_the_forecast(
    trained: Trained, windows: list[Window], sampler: str | None, steps: int | None
) -> None:
    """See there; and their levels are the forecast's, which asking for paths does not change."""
    forecaster = trained.forecaster("x", sampler, steps, paths=True)
    paths_are_the_forecast_at_its_horizons(forecaster, windows)
    assert forecaster.card.path == path_steps(forecaster.card.horizons)
    plain = trained.forecaster("x", sampler, steps).forecast(windows)
    for forecast, without in zip(forecaster.forecast(windows), plain, strict=True):
        assert without.paths is None
        assert forecast.quantiles.tobytes() == without.quantiles.tobytes()
        paths = forecast.paths
        assert paths is not None
        S, at = len(paths.returns), [paths.steps.index(h) for h in forecast.horizons]
        found = np.sort(paths.returns[:, at], 0).T
        for level, q in zip(forecast.levels, forecast.quantiles.T, strict=True):
            assert np.abs((found <= q[:, None]).mean(-1) - level).max() <= 1 / S
        np.testing.assert_allclose(found.mean(-1), forecast.mean, atol=0.01 * forecast.std.max())


class Coupled:
    """The couplings of a model on quantiles that every window shares: what a calibration would repeat."""

    def __init__(self, raw: SSSDForecaster) -> None:
        self.raw = raw
        self.card = replace(raw.card, path=raw.path)

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecasts of the quantiles `Q`, with paths."""
        numbers = (LEVELS, Q, *moments(Q, LEVELS))
        same = [Forecast(w.symbol, w.close_time, 1.0, (1, 4, 16), *numbers, warming=False) for w in windows]
        return with_paths(self.raw, windows, same)


ENDS = (1940, 1941, 1944, 1952)
"""Rows of one array, so near that the windows which end there are worked out in one go."""


@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_couplings_depend_on_neither_batch_nor_future(
    trained: Trained, windows: list[Window], sampler: str | None
) -> None:
    """Windows of one array and others: bits are those of each alone, whatever comes after t."""
    whole = simulate("NEW0", ENDS[-1], seed=21).window
    near = consecutive(whole, ENDS)
    assert [len(run) for run in runs(near, trained.scaling.window, APART)] == [len(ENDS)]
    forecaster = Coupled(trained.raw("x", sampler, None if sampler is None else 4, paths=True))
    paths_are_those_of_each_window_alone(forecaster, [*near, windows[4], windows[1]])
    paths_know_no_later_bar(forecaster, whole, ENDS)


@pytest.mark.parametrize("sampler", [None, "ddpm"])
def test_paths_depend_on_neither_batch_nor_future(
    trained: Trained, windows: list[Window], sampler: str | None
) -> None:
    """The same of what is served, quantiles and calibration included."""
    whole, steps = simulate("NEW0", ENDS[-1], seed=21).window, None if sampler is None else 4
    forecaster = trained.forecaster("x", sampler, steps, paths=True)
    paths_are_those_of_each_window_alone(forecaster, [*consecutive(whole, ENDS), *windows[::3]])
    paths_know_no_later_bar(forecaster, whole, ENDS)


def test_the_denoiser_says_how_steps_go_together(trained: Trained, windows: list[Window]) -> None:
    """Without it, or where training found that it adds nothing, the copula is the Gaussian of the scores."""
    idle = replace(trained, record=replace(trained.record, denoiser_step=0))
    mine, plain, zero = (
        t.forecaster("x", None, steps, paths=True).forecast(windows[-1:])[0]
        for t, steps in ((trained, None), (idle, None), (trained, 0))
    )
    assert _paths(plain) == _paths(zero) != _paths(mine)
    assert plain.paths is not None
    scores = norm.ppf((plain.paths.returns.argsort(0).argsort(0) + 0.5) / len(plain.paths.returns))
    whiten = trained.net.whiten.double().numpy()
    assert np.abs(np.corrcoef(scores.T) - whiten @ whiten.T).max() < 0.05


def test_only_the_newest_bar_is_asked_how_steps_go_together(trained: Trained) -> None:
    """The forecasts behind the calibration need no paths: one coupling for each window."""
    w = simulate("NEW0", 1500, seed=21).window
    raw = trained.raw("x", paths=True)
    asked: list[int] = []

    class Counted:
        path = raw.path

        def couplings(self, windows: list[Window]) -> list[Coupling]:
            asked.append(len(windows))
            return raw.couplings(windows)

    Calibrated(raw, 200, couple=Counted()).forecast([w])
    assert asked == [1]


def test_a_forecast_that_is_no_number_has_no_paths(trained: Trained) -> None:
    """It is withheld anyway; that of the other window has its own."""
    w = simulate("NEW0", 700, seed=21).window
    broken = w.values.copy()
    broken[-200:] = np.nan
    forecaster = trained.forecaster("x", paths=True)
    with np.errstate(invalid="ignore"):
        bad, good = forecaster.forecast([Window("BAD", w.close_times, broken), w])
    assert bad.paths is None
    assert good.paths is not None


def test_what_knows_no_paths_says_so(trained: Trained) -> None:
    """A baseline is refused by its name, with the remedy."""
    with pytest.raises(ConfigError, match="fhs is a baseline and forecasts no paths: name an SSSD"):
        open_model("fhs", "1h", None, None, True)


def test_values_keep_their_coupling() -> None:
    """The largest value of every step is in the sample with its highest rank, whatever the quantiles."""
    forecast = Forecast("A", 0, 1.0, (1, 4, 16), LEVELS, Q, *moments(Q, LEVELS), warming=False)
    rng = np.random.default_rng(2)
    ranks = np.argsort(rng.random((64, 16)), 0)
    paths = coupled(forecast, Coupling(tuple(range(1, 17)), ranks, np.full(16, 0.5)))
    assert np.array_equal(paths.returns.argsort(0).argsort(0), ranks)
    moves = np.diff(paths.returns, axis=1, prepend=0.0)
    np.testing.assert_allclose(paths.bridge, 0.5 * moves.std(0))


def test_the_bridge_of_a_brownian_motion_is_the_motion() -> None:
    """The highs and lows of one go as far beyond its closes as the bridge says: 1, within 4 %."""
    n, G = 20_000, 16
    rng = np.random.default_rng(4)
    closes = rng.normal(0, 0.01, n).cumsum()
    before = np.concatenate([[0.0], closes[:-1]])
    far = np.sqrt((closes - before) ** 2 - 2 * 0.01**2 * np.log(rng.random((2, n))))  # of a bridge's extremes
    high, low = (before + closes + far[0]) / 2, (before + closes - far[1]) / 2
    row, none = torch.arange(n - G), torch.zeros(0)
    bars = torch.from_numpy(np.stack([closes, high, low], 1))
    part = Origins(none, none, bars, row, none, none, none, none)
    begun = _Training.__new__(_Training)
    begun.data = SimpleNamespace(scaling=SimpleNamespace(horizons=(1, 4, 16)))
    with patch.object(_Training, "_size", lambda *_: torch.full((n - G, 1), 0.1).double()):
        bridge = begun._bridge(part).numpy()
    np.testing.assert_allclose(bridge, 1.0, atol=0.04)


def test_a_forecast_that_hardly_moves_over_one_horizon_bounds_its_neighbours() -> None:
    """Between a horizon of no width but wild tails and a plain one, no step is wilder than both."""
    still = np.array([-0.002, -1e-6, 0.0, 0.0, 0.0, 1e-6, 0.002])
    plain = 0.01 * norm.ppf(LEVELS)
    for pair in ((still, plain), (plain, still), (0 * still, plain), (still, still)):
        found = between(np.stack(pair), LEVELS, (1, 4), (1, 2, 3, 4))
        assert (np.diff(found) >= 0).all()
        assert (found >= np.minimum(*pair) - 1e-15).all()
        assert (found <= np.maximum(*pair) + 1e-15).all()


@pytest.mark.usefixtures("few_looks")
@pytest.mark.parametrize("horizons", [(1, 4, 16), (2, 15, 16)])
def test_prices_that_rest_have_bridges_as_others_do(horizons: tuple[int, ...]) -> None:
    """Where four closes of five are the last one again, highs and lows stay near them, whatever the steps."""
    w = simulate("SYM0", 2600, seed=7).window
    values = w.values.copy()
    rests = np.random.default_rng(3).random(len(values)) < 0.8
    rests[0] = False
    last = np.maximum.accumulate(np.where(rests, 0, np.arange(len(values))))
    close = values[last, 3]
    values[:, 3], values[:, 0] = close, np.concatenate([close[:1], close[:-1]])
    values[:, 1], values[:, 2] = values[:, [0, 3]].max(1), values[:, [0, 3]].min(1)
    model = training.train(
        [Window("SYM0", w.close_times, values)], timeframe="1h", horizons=horizons, levels=LEVELS, steps=12
    )
    assert (model.net.bridge <= 1.5).all()
    [forecast] = model.forecaster("x", paths=True).forecast([Window("SYM0", w.close_times, values)])
    assert forecast.paths is not None
    widest = np.abs(forecast.paths.returns).max(0)
    assert (widest <= 1.01 * np.abs(forecast.paths.returns[:, -1]).max()).all()
