"""Boosted trees: what LightGBM learnt is what numpy forecasts, from the window alone."""

import sys
from dataclasses import replace

import lightgbm
import numpy as np
import pytest
import torch

from barcast.models import ConfigError, HistoricalSimulation, Window, gbm, score
from barcast.models.gbm import Boosted, Trees, train
from barcast.models.origins import Origins, split
from tests.checks import forecast_does_not_depend_on_its_batch
from tests.garch import HOUR, START, simulate
from tests.models.conftest import HOLD_OUT, HORIZONS, LEVELS

FEW = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def boosted(histories: list[Window]) -> Boosted:
    return train(histories, timeframe="1h", horizons=HORIZONS, levels=LEVELS, hold_out=HOLD_OUT)


@pytest.fixture(scope="module")
def small() -> list[Window]:
    return [simulate(name, 1700, seed=4).window for name in ("A", "B")]


def _train(histories: list[Window], **options: object) -> Boosted:
    return train(histories, timeframe="1h", horizons=(1, 4), levels=FEW, **options)


def _bits(trees: Trees) -> list[bytes]:
    return [getattr(trees, name).tobytes() for name in Trees.__slots__]


def test_the_arrays_sum_to_what_lightgbm_predicts() -> None:
    """Flattened trees, deep, shallow and of one leaf, give LightGBM's own numbers to the last digits."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3000, 6)).astype(np.float32)
    z = torch.from_numpy(x[:, :1] * (1 + (x[:, 1:2] > 0)) + rng.standard_t(4, (3000, 1)))
    at, scale = torch.arange(3000), torch.rand(3000, 1) + 0.5
    none, block = torch.zeros(1), torch.zeros(3000, 2, dtype=torch.int64)
    part = Origins(torch.from_numpy(x), none, none, at, z, scale, block, block)
    boosters = []
    for level, rounds in ((0.05, 40), (0.5, 1), (0.95, 25)):
        options = gbm.PARAMETERS | {"alpha": level, "min_data_in_leaf": 5}
        boosters.append(lightgbm.train(options, gbm._dataset(lightgbm, part, 0, None), rounds))
    options = gbm.PARAMETERS | {"alpha": 0.5, "min_data_in_leaf": 3000}
    boosters.append(lightgbm.train(options, gbm._dataset(lightgbm, part, 0, None), 3))
    trees = gbm._flat([b.dump_model()["tree_info"] for b in boosters], 4)
    assert trees.counts.tolist()[0][:3] == [40, 1, 25]
    assert trees.fault((1, 4), 6) is None
    expected = np.stack([b.predict(x[:500]) for b in boosters], 1)
    found = np.stack([trees.outputs(row)[0] for row in x[:500]])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert np.ptp(found[:, 0]) > 1


def test_the_same_bars_and_seed_give_the_same_trees(small: list[Window]) -> None:
    """Training twice gives the same bits and record; another seed gives others."""
    one, again, other = _train(small), _train(small), _train(small, seed=1)
    assert _bits(one.trees) == _bits(again.trees)
    assert one.record == again.record
    assert _bits(one.trees) != _bits(other.trees)


def test_bars_after_until_do_not_exist(small: list[Window]) -> None:
    """Replacing every bar after `until` changes no bit of the model."""
    until = START + 1500 * HOUR
    poisoned = []
    for w in small:
        values = w.values.copy()
        values[1500:] = np.nan
        poisoned.append(Window(w.symbol, w.close_times, values))
    clean, dirty = (_train(bars, until=until) for bars in (small, poisoned))
    assert _bits(clean.trees) == _bits(dirty.trees)
    assert clean.record == dirty.record


def test_the_gate_part_is_not_seen(small: list[Window]) -> None:
    """Bars after the validation part change nothing but the hash of the data."""
    clean, poisoned = _train(small, hold_out=HOLD_OUT), []
    assert clean.record.train_end < clean.record.validation_end < clean.record.until
    for w in small:
        values = w.values.copy()
        values[w.close_times > clean.record.validation_end] *= 2
        poisoned.append(Window(w.symbol, w.close_times, values))
    dirty = _train(poisoned, hold_out=HOLD_OUT)
    assert _bits(clean.trees) == _bits(dirty.trees)
    assert replace(clean.record, data=dirty.record.data) == dirty.record


def test_a_forecast_is_a_function_of_its_window(boosted: Boosted, histories: list[Window]) -> None:
    """Neither the company nor older bars than the window's change a bit; quantiles rise."""
    forecaster = boosted.forecaster("trees")
    n = forecaster.card.window
    w = histories[0]
    windows = [Window(w.symbol, w.close_times[k - n : k], w.values[k - n : k]) for k in range(2800, 2832)]
    windows += [Window(w.symbol, w.close_times[:k], w.values[:k]) for k in (90, 400)]
    forecast_does_not_depend_on_its_batch(forecaster, windows, (1, 2, 7, 34))
    cut = Window(w.symbol, w.close_times[-n:], w.values[-n:])
    whole, alone = forecaster.forecast([w, cut])
    assert whole.quantiles.tobytes() == alone.quantiles.tobytes()
    made = forecaster.forecast(windows)
    assert all((np.diff(f.quantiles) >= 0).all() for f in made)
    assert [f.warming for f in made] == [False] * 32 + [True] * 2
    with pytest.raises(ValueError, match="needs"):
        forecaster.forecast([Window(w.symbol, w.close_times[:50], w.values[:50])])


def test_live_features_are_those_of_the_training(boosted: Boosted, histories: list[Window]) -> None:
    """The forecast at a window is what the trees say of the origin that training collected there."""
    shares = {"validation": gbm.VALIDATION, "hold_out": HOLD_OUT}
    data = split(histories, "1h", HORIZONS, None, **shares)
    forecaster, w = boosted.forecaster("trees"), histories[0]
    first = boosted.scaling.layout.har[-1] + 1
    for i in range(1000, 1040):
        k = first + i
        z = np.sort(boosted.trees.outputs(data.learn.features[i].numpy()), -1)
        expected = z * data.learn.scale[i].numpy()[:, None]
        [f] = forecaster.forecast([Window(w.symbol, w.close_times[: k + 1], w.values[: k + 1])])
        np.testing.assert_allclose(f.quantiles, expected, rtol=1e-9, atol=1e-15)


def test_senseless_bars_give_no_number(boosted: Boosted, histories: list[Window]) -> None:
    """A price that is not a number leaves quantiles that are none, so that the forecast is withheld."""
    w = histories[0]
    values = w.values.copy()
    values[-3] = np.nan
    [f] = boosted.forecaster("trees").forecast([Window(w.symbol, w.close_times, values)])
    assert np.isnan(f.quantiles).all()


def test_boosted_trees_beat_historical_simulation(boosted: Boosted, histories: list[Window]) -> None:
    """On held-out bars of a process with clustered volatility and a season, the next bar is better known."""
    scores = [
        score(f, histories, since=boosted.record.validation_end, until=boosted.record.until)
        for f in (boosted.forecaster("trees"), HistoricalSimulation("1h", HORIZONS, LEVELS))
    ]
    assert scores[0].crps[0] < 0.97 * scores[1].crps[0]


def test_only_training_needs_lightgbm(
    boosted: Boosted, histories: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package a model still serves, and training ends in one sentence that says what to do."""
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert np.isfinite(boosted.forecaster("trees").forecast(histories[:1])[0].quantiles).all()
    with pytest.raises(ConfigError, match=r"extra baselines: pip install '\.\[baselines\]'"):
        _train(histories)
