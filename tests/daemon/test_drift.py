"""Drift: what the champion said is held against what happened, and noise is not taken for it."""

import numpy as np
import pytest

from barcast.daemon import drift
from barcast.daemon.calendar import iso
from barcast.daemon.drift import Bars, Said, chosen, measure
from barcast.models import Window
from tests.fakes import MINUTE, START

HORIZONS, LEVELS = (1, 4, 16), [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
NORMAL = np.array([-1.6449, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449])
SIGMA = 0.002


def bars(symbol, returns, start=0):
    """A window whose closes follow from log returns."""
    close = 100 * np.exp(np.cumsum(returns))
    times = START + MINUTE * np.arange(start, start + len(close), dtype=np.int64)
    return Window(symbol, times, np.column_stack([close] * 4 + [np.ones(len(close))]))


def signals(window, sigma=SIGMA):
    """What a model says that takes the volatility for `sigma`, at each bar, newest first."""
    told = []
    for time, close in zip(window.close_times.tolist(), window.values[:, 3].tolist(), strict=True):
        prices = [(close * np.exp(sigma * h**0.5 * NORMAL)).tolist() for h in HORIZONS]
        told.append(Said(window.symbol, iso(time), close, "m", [Bars(h) for h in HORIZONS], LEVELS, prices))
    return told[::-1]


def reading(rng, symbols=3, count=600, sigma=SIGMA, common=0.5):
    """The reading of a model that takes the volatility for `SIGMA`, where it is `sigma`."""
    shared = rng.standard_normal(count)
    told, closes = [], {}
    for k in range(symbols):
        own = rng.standard_normal(count)
        returns = sigma * (common**0.5 * shared + (1 - common) ** 0.5 * own)
        closes[f"S{k}"] = bars(f"S{k}", returns)
        told += signals(closes[f"S{k}"])
    return measure(told, closes)


def held_out():
    """The CRPS over the mean absolute outcome of one who knows a normal distribution."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal(400_000)
    miss = z[:, None] - NORMAL
    levels = np.array(LEVELS)
    return float((2 * np.maximum(levels * miss, (levels - 1) * miss)).mean() / np.abs(z).mean())


def test_figures_are_those_of_the_gate():
    """Coverage and CRPS of a model that knows the process are those it promised, within their errors."""
    found = reading(np.random.default_rng(3), symbols=8, common=0.0)
    assert found.times == drift.TIMES
    assert found.signals == 8 * drift.TIMES
    assert set(found.coverage) == {(p, h) for p in (0.8, 0.9) for h in HORIZONS}
    for (nominal, _), share in found.coverage.items():
        assert abs(share.value - nominal) < 4 * share.error
    assert found.crps.value == pytest.approx(held_out(), rel=0.03)


def test_calibrated_process_is_not_taken_for_drift():
    """Many readings of a model that is right, of symbols that move together: none asks for any."""
    rng, truth = np.random.default_rng(1), held_out()
    reasons = [reading(rng, symbols=1 + k % 4, count=280).beyond(0.05, 0.1, truth) for k in range(60)]
    assert [reason for reason in reasons if reason] == []


def test_doubled_volatility_is_drift():
    """When the process is twice as volatile, the coverage falls far below its band: a training is due."""
    for seed in range(10):
        reason = reading(np.random.default_rng(seed), sigma=2 * SIGMA).beyond(0.05, 0.1, None)
        assert reason.startswith("drift: ")
        assert "% of outcomes over" in reason


def test_worse_score_is_drift_where_it_is_known_what_was_promised():
    """The CRPS is held against that of the verdict; without one, only the coverage counts."""
    found = reading(np.random.default_rng(5))
    promised = 0.7 * found.crps.value
    assert "above the" in found.beyond(0.05, 0.1, promised)
    assert found.beyond(0.05, 0.1, None) is None
    assert found.beyond(0.05, 0.5, promised) is None


def test_only_what_has_matured_counts():
    """An origin counts once the outcomes of all its horizons are there; too few closes say nothing."""
    rng = np.random.default_rng(2)
    window = bars("S", SIGMA * rng.standard_normal(drift.LEAST + 15))
    assert measure(signals(window), {"S": window}) is None
    longer = bars("S", SIGMA * rng.standard_normal(drift.LEAST + 16))
    found = measure(signals(longer), {"S": longer})
    assert (found.times, found.signals) == (drift.LEAST, drift.LEAST)
    assert measure(signals(longer) * 2, {"S": longer}).signals == drift.LEAST
    assert measure(signals(longer), {"other": longer}) is None
    assert measure([], {}) is None


def test_horizon_counts_the_symbol_s_own_bars():
    """Where bars are missing, the outcome is that of the bars that came; without a bar there is none."""
    rng = np.random.default_rng(4)
    whole = bars("S", SIGMA * rng.standard_normal(400))
    kept = np.ones(400, bool)
    kept[[50, 200, 201]] = False
    holed = Window("S", whole.close_times[kept], whole.values[kept])
    assert measure(signals(holed), {"S": holed}).signals == drift.TIMES
    assert measure(signals(whole)[: drift.TIMES + 16], {"S": holed}).signals == drift.TIMES - 2


def test_other_price_basis_is_no_outcome():
    """Signals keep the prices of their time, windows those of today: a split between them is no drift."""
    rng = np.random.default_rng(6)
    before = bars("S", SIGMA * rng.standard_normal(500))
    halved = before.values.copy()
    halved[:, :4] *= 0.5
    plain = measure(signals(before), {"S": before})
    after = measure(signals(before), {"S": Window("S", before.close_times, halved)})
    assert after.crps.value == pytest.approx(plain.crps.value)


def test_some_symbols_of_many_are_looked_at():
    """All of few, and about thirty of many, evenly over their names."""
    assert chosen(["B", "A"]) == ["A", "B"]
    some = chosen(f"S{k:04d}" for k in range(1000))
    assert len(some) <= drift.SYMBOLS
    assert (some[0], some[1]) == ("S0000", "S0032")
