"""Baselines and scores on windows and distributions that are known."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barcast.models import (
    LEVELS as DEFAULT_LEVELS,
)
from barcast.models import (
    Bar,
    Card,
    ConfigError,
    DataError,
    FilteredHistoricalSimulation,
    Forecast,
    HistoricalSimulation,
    Window,
    Windows,
    compare,
    score,
)
from barcast.models.scores import crps
from tests.garch import HOUR, START, simulate

HORIZONS, LEVELS = (1, 4), (0.05, 0.25, 0.5, 0.75, 0.95)

Baseline = HistoricalSimulation | FilteredHistoricalSimulation
KINDS = (HistoricalSimulation, FilteredHistoricalSimulation)


@pytest.fixture(scope="module")
def window() -> Window:
    return simulate("SIM", 2000, seed=3).window


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_look_at_their_window_only(kind: type[Baseline], window: Window) -> None:
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


@pytest.mark.parametrize("bars", [105, 300, 504, 505, 2000])
def test_historical_simulation_is_the_quantiles_of_past_returns(bars: int, window: Window) -> None:
    """Its numbers are numpy's for the last 500 returns over the horizon, or for as many as there are."""
    levels = (0.0, 0.001, *LEVELS, 0.999, 1.0)
    f = HistoricalSimulation("1h", HORIZONS, levels).forecast([_until(window, bars)])[0]
    price = np.log(window.values[:bars, 3])
    for i, h in enumerate(HORIZONS):
        returns = (price[h:] - price[:-h])[-500:]
        expected = np.quantile(returns, levels)
        assert (np.abs(f.quantiles[i] - expected) <= 2 * np.spacing(np.abs(expected))).all()
        assert f.mean[i] == pytest.approx(returns.mean(), rel=1e-9, abs=1e-15)
        assert f.std[i] == pytest.approx(returns.std(), rel=1e-12)
        assert f.rise[i] == (returns > 0).mean()


def test_filtered_simulation_is_the_scaled_quantiles_of_filtered_returns(window: Window) -> None:
    """Its numbers are numpy's for past returns over the EWMA volatility of then, times that of now."""
    f = FilteredHistoricalSimulation("1h", HORIZONS, LEVELS).forecast([window])[0]
    price = np.log(window.values[-633:, 3])
    weight = 0.94 ** np.arange(127, -1, -1)
    squares = np.diff(price) ** 2
    sigma = np.sqrt([np.average(squares[k : k + 128], weights=weight) for k in range(505)])
    for i, h in enumerate(HORIZONS):
        outcomes = ((price[128 + h :] - price[128:-h]) / sigma[:-h])[-500:] * sigma[-1]
        np.testing.assert_allclose(f.quantiles[i], np.quantile(outcomes, LEVELS), rtol=1e-12)
        assert f.mean[i] == pytest.approx(outcomes.mean(), rel=1e-9)
        assert f.std[i] == pytest.approx(outcomes.std(), rel=1e-12)
        assert f.rise[i] == (outcomes > 0).mean()


def _until(window: Window, bars: int) -> Window:
    return Window(window.symbol, window.close_times[:bars], window.values[:bars])


def _bits(f: Forecast) -> tuple[object, ...]:
    arrays = (f.quantiles, f.mean, f.std, f.rise)
    return f.symbol, f.close_time, f.reference, f.warming, *(a.tobytes() for a in arrays)


class Feed:
    """Random bars of two symbols in rings, as the daemon keeps them, and windows cut from them."""

    def __init__(self, seed: int, bars: int, tick: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.tick = tick
        self.windows = Windows(700)
        self.newest = {"A": 0, "B": 0}
        for symbol in self.newest:
            self.next(symbol, bars)

    def price(self) -> float:
        """A price rounded to a coarse tick, so that equal returns and bars without a move are common."""
        return float(round(100 * np.exp(self.rng.normal(0, 0.01)) / self.tick) * self.tick)

    def next(self, symbol: str, bars: int) -> None:
        """Bars at every second time, so that others can be inserted between them."""
        for _ in range(bars):
            self.newest[symbol] += 2
            self.put(symbol, self.newest[symbol])

    def put(self, symbol: str, close_time: int) -> None:
        if close_time > 0:
            p = self.price()
            self.windows.put(Bar(symbol, close_time, p, p, p, p, 1.0))

    def act(self, symbol: str, what: str, much: int) -> None:
        """Let one thing happen to a symbol; `much` is how many bars, or how many bars ago."""
        newest = self.newest[symbol]
        match what:
            case "next":
                self.next(symbol, 1)
            case "several":
                self.next(symbol, much)
            case "correct":
                self.put(symbol, newest - 2 * much)
            case "correct and next":
                self.put(symbol, newest - 2 * much)
                self.next(symbol, 1)
            case "insert":
                self.put(symbol, newest - 2 * much - 1)
            case "insert and next":
                self.put(symbol, newest - 2 * much - 1)
                self.next(symbol, 1)
            case "gap":
                self.newest[symbol] += 2 * much
                self.next(symbol, 1)

    def cut(self, symbol: str, back: int, length: int) -> Window | None:
        return self.windows.cut(symbol, self.newest[symbol] - 2 * back, length)


AGES = st.one_of(st.integers(0, 6), st.integers(495, 520), st.integers(0, 660))
ACTS = st.tuples(
    st.sampled_from("AB"),
    st.one_of(
        st.just("next"),
        st.sampled_from(["repeat", "several", "correct", "correct and next", "insert", "insert and next"]),
        st.just("gap"),
    ),
    AGES,
    st.one_of(st.just(0), st.integers(0, 3)),  # bars before the newest one at which the window ends
    st.one_of(st.none(), st.none(), st.integers(240, 260), st.integers(495, 520), st.integers(620, 640)),
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**32 - 1),
    bars=st.one_of(st.integers(230, 260), st.integers(495, 520), st.integers(625, 660)),
    tick=st.sampled_from([1.0, 1e-6]),
    acts=st.lists(ACTS, min_size=5, max_size=25),
)
@settings(max_examples=60, deadline=None)
def test_forecasts_do_not_depend_on_what_was_forecast_before(
    kind: type[Baseline], seed: int, bars: int, tick: float, acts: list[tuple[str, str, int, int, int | None]]
) -> None:
    """A forecaster with any past gives the bits of one that sees the window first and alone."""
    feed = Feed(seed, bars, tick)
    lived = kind("1m", HORIZONS, LEVELS)
    for symbol, what, much, back, length in acts:
        feed.act(symbol, what, much)
        cuts = [feed.cut(symbol, back, length or lived.card.window), feed.cut("A", 0, lived.card.window)]
        windows = [w for w in cuts if w is not None and len(w) >= lived.card.min_window]
        expected = [_bits(kind("1m", HORIZONS, LEVELS).forecast([w])[0]) for w in windows]
        assert [_bits(f) for f in lived.forecast(windows)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_bar_of_any_age_is_noticed(kind: type[Baseline], window: Window) -> None:
    """Whichever bar is corrected or inserted before the next one, the bits are those of a fresh start."""
    lived = kind("1h", HORIZONS, LEVELS)
    n = lived.card.window
    before = Window("SIM", window.close_times[:n], window.values[:n])
    for i in range(n):
        corrected = window.values[: n + 1].copy()
        corrected[i] *= 1 + 1e-6
        inserted = np.insert(window.values[: n + 1], i + 1, 50.0, axis=0)[-n:]
        for values in (corrected, inserted):
            lived.forecast([before])
            after = Window("SIM", window.close_times[: len(values)], values)
            expected = kind("1h", HORIZONS, LEVELS).forecast([after])[0]
            assert _bits(lived.forecast([after])[0]) == _bits(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_long_walks_keep_their_bits(kind: type[Baseline], window: Window) -> None:
    """Bar after bar, from the first forecast through a thousand, the bits are those of a fresh start."""
    lived = kind("1h", (1, 4, 16), DEFAULT_LEVELS)
    for bars in range(lived.card.min_window, 1300):
        cut = _until(window, bars)
        f = lived.forecast([cut])[0]
        if bars % 7 == 0:
            assert _bits(f) == _bits(kind("1h", (1, 4, 16), DEFAULT_LEVELS).forecast([cut])[0])


def test_no_volatility_counts_as_next_to_nothing_after_a_standstill(window: Window) -> None:
    """Outcomes are over 0.3 times the window's root mean square return at least, in any order of windows."""
    price = np.log(window.values[:, 3])
    r = np.diff(price)
    r[500:600] = r[900:1100] = 0
    values = np.exp(np.concatenate([price[:1], price[0] + np.cumsum(r)]))[:, None] * np.ones(5)
    still = Window("SIM", window.close_times, values)
    lived = FilteredHistoricalSimulation("1h", HORIZONS, LEVELS)
    for bars in range(600, 1300):
        f = lived.forecast([_until(still, bars)])[0]
        if bars % 7 == 0:
            fresh = FilteredHistoricalSimulation("1h", HORIZONS, LEVELS)
            assert _bits(f) == _bits(fresh.forecast([_until(still, bars)])[0])
    price = np.log(values[1299 - 633 : 1299, 3])
    weight = 0.94 ** np.arange(127, -1, -1)
    squares = np.diff(price) ** 2
    sigma = np.array([np.sqrt(np.average(squares[k : k + 128], weights=weight)) for k in range(505)])
    least = 0.3 * np.sqrt(squares.mean())
    assert (sigma < 0.1 * least).any()
    sigma = np.maximum(sigma, least)
    for i, h in enumerate(HORIZONS):
        outcomes = ((price[128 + h :] - price[128:-h]) / sigma[:-h])[-500:] * sigma[-1]
        np.testing.assert_allclose(f.quantiles[i], np.quantile(outcomes, LEVELS), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_one_symbol_can_share_a_call(kind: type[Baseline], window: Window) -> None:
    """Consecutive windows in one call give what each gives alone, and earlier results stay as they were."""
    forecaster = kind("1h", HORIZONS, LEVELS)
    cuts = [_until(window, bars) for bars in range(600, 900)]
    together = forecaster.forecast(cuts)
    before = [_bits(f) for f in together]
    forecaster.forecast(cuts[::-1])
    assert [_bits(f) for f in together] == before
    assert before[::50] == [_bits(kind("1h", HORIZONS, LEVELS).forecast([w])[0]) for w in cuts[::50]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:.*encountered in log:RuntimeWarning")
def test_a_price_that_is_none_gives_no_finite_forecast(
    kind: type[Baseline], price: float, window: Window
) -> None:
    """A window with a price that has no logarithm is not forecast, and leaves no trace in later ones."""
    values = window.values.copy()
    values[1000, 3] = price
    broken = Window(window.symbol, window.close_times, values)
    lived = kind("1h", HORIZONS, LEVELS)
    for bars in (1000, 1001, 1002):
        f = lived.forecast([_until(broken, bars)])[0]
        assert np.isfinite(f.quantiles).all() == (bars == 1000)
    clean = _until(window, 1003)
    assert _bits(lived.forecast([clean])[0]) == _bits(kind("1h", HORIZONS, LEVELS).forecast([clean])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_window_touches_another_in_its_call(kind: type[Baseline], window: Window) -> None:
    """Full, warming and broken windows of many symbols give in one call what each gives alone."""
    lengths = [250, 400, 700, 504, 505, 633, 632, 2000]
    cuts = [Window(f"S{i}", window.close_times[:n], window.values[:n]) for i, n in enumerate(lengths * 20)]
    values = window.values.copy()
    values[100, 3] = np.nan
    cuts.insert(70, Window("BROKEN", window.close_times[:300], values[:300]))
    for horizons in ((1,), (1, 4, 16)):
        together = kind("1h", horizons, DEFAULT_LEVELS).forecast(cuts)
        alone = [kind("1h", horizons, DEFAULT_LEVELS).forecast([w])[0] for w in cuts]
        assert [_bits(f) for f in together] == [_bits(f) for f in alone]


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_follows_is_not_sorted_again(
    kind: type[Baseline], window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symbols that advance by a bar in turn are sorted once; one whose past was corrected is once more."""
    sort, sorts = np.sort, []
    monkeypatch.setattr(np, "sort", lambda x: sorts.append(len(x)) or sort(x))
    forecaster = kind("1h", HORIZONS, LEVELS)
    for bars in (250, *range(700, 720)):
        cut = _until(window, bars)
        forecaster.forecast([Window(s, cut.close_times, cut.values) for s in "ABC"])
    assert len(sorts) == 2 * 3 * len(HORIZONS)
    values = window.values.copy()
    values[700, 3] *= 1.0 + 1e-9
    forecaster.forecast([Window("A", window.close_times[:720], values[:720])])
    assert len(sorts) == (2 * 3 + 1) * len(HORIZONS)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_by_the_symbols(kind: type[Baseline], window: Window) -> None:
    """Three horizons take at most 25 kB a symbol, however many bars come."""
    forecaster = kind("1h", (1, 4, 16), DEFAULT_LEVELS)
    symbols = [f"S{i}" for i in range(40)]

    def turn(bars: int) -> None:
        cut = _until(window, bars)
        forecaster.forecast([Window(s, cut.close_times, cut.values) for s in symbols])

    tracemalloc.start()
    try:
        for bars in range(1000, 1010):
            turn(bars)
        early = tracemalloc.get_traced_memory()[0]
        for bars in range(1010, 1050):
            turn(bars)
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert early < 25_000 * len(symbols)
    assert late < early + 500 * len(symbols)


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
