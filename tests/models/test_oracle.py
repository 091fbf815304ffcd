"""The truth of a simulated process, and how near a model trained for seconds comes to it."""

import numpy as np
import pytest

from barcast.models import LEVELS, open_model, optimiser, training
from tests.bench.oracle import HORIZONS, covered, forecasts, oracle, ratio
from tests.garch import simulate

STEPS = 60
BOUND = 1.04  # of the oracle's CRPS; the benchmark trains in full and aims at 1.03


def test_the_paths_end_as_the_process_does():
    """One step ahead the quantiles of the paths are those known in closed form, and outcomes fall so."""
    s = simulate("A", 6000, seed=2, season=True)
    at = np.arange(50, 5900, 10)
    quantiles, deviations = s.outlook(at, HORIZONS, LEVELS)
    assert quantiles[:, 0] == pytest.approx(s.quantiles(LEVELS)[at], rel=1e-3, abs=1e-12)
    assert deviations[:, 0] == pytest.approx(s.ahead[at], rel=0.01)
    price = np.log(s.window.values[:, 3])
    for j, h in enumerate(HORIZONS):
        found = covered(price[at + h] - price[at], quantiles[:, j], s.window.close_times[at], h)
        assert found["worst_coverage"] < 3, (h, found)


def test_a_short_training_comes_near_the_oracle(monkeypatch, few_looks):
    """The CRPS is within a few percent of what full knowledge of the process gives, at every horizon."""
    monkeypatch.setattr(optimiser, "EPOCHS", 3)
    simulations = [simulate(f"SYM{i}", 4000, seed=21, season=True) for i in range(2)]
    histories = [s.window for s in simulations]
    since = int(histories[0].close_times[-1001])
    trained = training.train(
        histories, timeframe="1h", horizons=HORIZONS, levels=LEVELS, until=since, steps=STEPS
    )
    found = forecasts(None, trained.forecaster("model"), histories, since)
    plain = forecasts(None, open_model("hs", "1h", None, None), histories, since)
    truth, _ = oracle(simulations, found)
    for j, h in enumerate(HORIZONS):
        y, times = found.outcomes[:, j], found.close_times
        own = ratio(y, found.quantiles[0][:, j], truth[:, j], times, h).value
        assert own < BOUND, h
        assert ratio(y, plain.quantiles[0][:, j], truth[:, j], times, h).value > own + 0.02, h
        assert covered(y, found.quantiles[0][:, j], times, h)["worst_coverage"] < 3, h
