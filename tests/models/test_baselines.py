"""Baselines and scores on windows and distributions that are known."""

from collections.abc import Sequence

import numpy as np
import pytest

from barcast.models import (
    Card,
    ConfigError,
    DataError,
    FilteredHistoricalSimulation,
    Forecast,
    HistoricalSimulation,
    Window,
    compare,
    score,
)
from barcast.models.scores import crps
from tests.garch import HOUR, START, simulate

HORIZONS, LEVELS = (1, 4), (0.05, 0.25, 0.5, 0.75, 0.95)


@pytest.fixture(scope="module")
def window() -> Window:
    return simulate("SIM", 2000, seed=3).window


@pytest.mark.parametrize("kind", [HistoricalSimulation, FilteredHistoricalSimulation])
def test_baselines_look_at_their_window_only(
    kind: type[HistoricalSimulation] | type[FilteredHistoricalSimulation], window: Window
) -> None:
    """A baseline's forecast is the same from its window, from more bars, and in any company."""
    forecaster = kind("1h", HORIZONS, LEVELS)
    n = forecaster.card.window
    cut = Window("SIM", window.close_times[-n:], window.values[-n:])
    less = Window("SIM", window.close_times[-n + 1 :], window.values[-n + 1 :])
    whole, alone, warming = forecaster.forecast([window, cut, less])
    assert whole.quantiles.tobytes() == alone.quantiles.tobytes()
    assert [whole.warming, alone.warming, warming.warming] == [False, False, True]
    with pytest.raises(ValueError, match="needs"):
        forecaster.forecast([Window("SIM", window.close_times[:100], window.values[:100])])


def test_historical_simulation_is_the_quantiles_of_past_returns(window: Window) -> None:
    """Its quantiles are those of the last 500 returns over the horizon."""
    f = HistoricalSimulation("1h", HORIZONS, LEVELS).forecast([window])[0]
    price = np.log(window.values[:, 3])
    returns = price[4:] - price[:-4]
    np.testing.assert_allclose(f.quantiles[1], np.quantile(returns[-500:], LEVELS))
    assert f.mean[1] == pytest.approx(returns[-500:].mean())


def test_filtered_simulation_follows_the_volatility(window: Window) -> None:
    """After twenty bars with three times the movement its band is much wider than before."""
    price = np.log(window.values[:, 3])
    r = np.diff(price)
    r[-20:] *= 3
    moved = window.values.copy()
    moved[1:, :4] = np.exp(price[0] + np.cumsum(r))[:, None]
    forecaster = FilteredHistoricalSimulation("1h", HORIZONS, LEVELS)
    calm, busy = forecaster.forecast([window, Window("SIM", window.close_times, moved)])
    assert (
        (busy.quantiles[:, -1] - busy.quantiles[:, 0]) > 1.5 * (calm.quantiles[:, -1] - calm.quantiles[:, 0])
    ).all()


def test_ids_depend_on_the_parameters() -> None:
    """Baselines have ids that name their kind and change with what they are asked for."""
    first = HistoricalSimulation("1h", (1, 4), LEVELS).card
    assert first.model.startswith("hs-")
    assert first.model == HistoricalSimulation("1h", (1, 4), LEVELS).card.model
    assert first.model != HistoricalSimulation("1h", (1, 5), LEVELS).card.model
    assert FilteredHistoricalSimulation("1h", (1, 4), LEVELS).card.model.startswith("fhs-")


class Oracle:
    """Knows the true volatility of each bar of a simulation."""

    def __init__(self, quantiles: dict[int, np.ndarray], model: str = "oracle", least: int = 1) -> None:
        self.card = Card(model, "fake", "1h", (1,), LEVELS, least, least, "none", 0, 0, "")
        self.quantiles = quantiles

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        none = np.zeros(1)
        return [
            Forecast(
                *("SIM", w.close_time, w.reference, (1,), LEVELS, self.quantiles[w.close_time][None]),
                *(none, none, none, False),
            )
            for w in windows
        ]


@pytest.fixture(scope="module")
def oracle() -> tuple[Oracle, Window]:
    simulation = simulate("SIM", 6000, seed=4, season=True)
    q = simulation.quantiles(LEVELS)
    return Oracle(dict(zip(simulation.window.close_times.tolist(), q, strict=True))), simulation.window


def test_the_simulation_has_the_quantiles_it_claims(oracle: tuple[Oracle, Window]) -> None:
    """True quantiles cover what they should, and score below every baseline."""
    forecaster, window = oracle
    true = score(forecaster, [window], since=START, until=window.close_time)
    assert true.intervals == (0.9, 0.5)
    np.testing.assert_allclose(true.coverage[0], true.intervals, atol=0.02)
    hs = HistoricalSimulation("1h", (1,), LEVELS)
    fhs = FilteredHistoricalSimulation("1h", (1,), LEVELS)
    best, *others = compare([forecaster, hs, fhs], [window], since=START, until=window.close_time)
    assert all(best.normalised < other.normalised for other in others)


def test_scores_are_those_of_the_forecasts(window: Window) -> None:
    """Scores count exactly the origins whose targets are realised in time, and average their CRPS."""
    forecaster = HistoricalSimulation("1h", HORIZONS, LEVELS)
    since, until = START + 1000 * HOUR, START + 1100 * HOUR
    s = score(forecaster, [window], since=since, until=until, stride=3)
    origins = range(999, 1100 - 4, 3)
    assert s.n == len(origins)
    assert s.close_times.tolist() == [int(window.close_times[k]) for k in origins]
    price = np.log(window.values[:, 3])
    losses = []
    for k in origins:
        cut = Window("SIM", window.close_times[: k + 1], window.values[: k + 1])
        y = [price[k + h] - price[k] for h in HORIZONS]
        losses.append(crps(y, forecaster.forecast([cut])[0].quantiles, LEVELS))
    np.testing.assert_allclose(s.losses, losses)
    np.testing.assert_allclose(s.crps, np.mean(losses, 0))


def test_bars_after_until_do_not_touch_the_scores(window: Window) -> None:
    """Replacing the bars after `until` changes no score."""
    forecaster = HistoricalSimulation("1h", HORIZONS, LEVELS)
    values = window.values.copy()
    values[1500:] *= 7
    clean, dirty = (
        score(forecaster, [Window("SIM", window.close_times, v)], since=START, until=START + 1500 * HOUR)
        for v in (window.values, values)
    )
    assert clean.losses.tobytes() == dirty.losses.tobytes()


def test_models_are_compared_on_identical_origins(oracle: tuple[Oracle, Window]) -> None:
    """With several forecasters only origins count that all of them can forecast."""
    forecaster, window = oracle
    late = Oracle(forecaster.quantiles, "late", least=700)
    first, second = compare([forecaster, late], [window], since=START, until=START + 800 * HOUR)
    assert first.n == second.n == 800 - 700
    assert first.losses.tobytes() == second.losses.tobytes()


def test_what_cannot_be_compared_is_refused(oracle: tuple[Oracle, Window], window: Window) -> None:
    """Other horizons raise ConfigError, a period without origins DataError."""
    forecaster, _ = oracle
    with pytest.raises(ConfigError, match="horizons of hs"):
        compare([forecaster, HistoricalSimulation("1h", (1, 4), LEVELS)], [window], since=0, until=1)
    with pytest.raises(DataError, match="no forecast origin"):
        score(HistoricalSimulation("1h", (1,), LEVELS), [window], since=START, until=START + 50 * HOUR)
