"""Online calibration: what it corrects, what it leaves alone, and that nothing else moves its bits."""

import tracemalloc
from collections.abc import Sequence
from functools import cache
from math import log

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from barcast.models import (
    LEVELS,
    Adjustment,
    Bar,
    Calibrated,
    Card,
    ConfigError,
    FilteredHistoricalSimulation,
    Forecast,
    HistoricalSimulation,
    Window,
    Windows,
    calibration,
)
from barcast.models.calibration import (
    PRIOR,
    mirrored_quantiles,
    normal_scores,
    read_at,
    recalibrated,
    sliding,
)
from tests.checks import forecast_does_not_depend_on_its_batch
from tests.garch import HOUR, START, simulate

HORIZONS = (1, 3)
SIGMA = 0.01


class Moody:
    """Quantiles that every bar of the window moves, its time too; some have no width, or cannot be prices.

    `asked` holds the windows that it was asked about.
    """

    def __init__(self, window: int = 6, horizons: tuple[int, ...] = HORIZONS) -> None:
        self.card = Card("moody", "fake", "1m", horizons, LEVELS, window, 3, "none", 0, 0, "here")
        self.asked: list[Window] = []

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        self.asked += windows
        return [self._one(w) for w in windows]

    def _one(self, w: Window) -> Forecast:
        weight = np.arange(1, len(w) + 1)
        mood = int(w.close_times @ weight % 11 + w.values.sum(1) @ weight) % 11
        r = np.diff(np.log(w.values[:, 3]))
        width = {3: 0.0, 5: 100.0, 6: np.nan}.get(mood, 0.002 + (r**2 @ weight[1:]) ** 0.5)
        q = np.outer(np.sqrt(self.card.horizons), 1.2 * r[-1] * (mood == 4) + width * norm.ppf(LEVELS))
        nothing = np.zeros(len(self.card.horizons))
        return Forecast(
            w.symbol, w.close_time, w.reference, self.card.horizons, LEVELS, q, *[nothing] * 3, False
        )


class Normal:
    """Normal quantiles, `factor` times as wide as they should be when returns have the volatility SIGMA."""

    def __init__(self, factor: float, holes: bool = False) -> None:
        self.card = Card("normal", "fake", "1h", (1, 4), LEVELS, 2, 2, "none", 0, 0, "here")
        self.factor, self.holes = factor, holes

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        made = []
        for w in windows:
            q = self.factor * SIGMA * np.outer((1, 2), norm.ppf(LEVELS))
            if self.holes and w.close_time // HOUR % 3 == 0:
                q = np.full_like(q, np.nan)
            nothing = np.zeros(2)
            made.append(
                Forecast(w.symbol, w.close_time, w.reference, (1, 4), LEVELS, q, *[nothing] * 3, False)
            )
        return made


def bits(f: Forecast) -> tuple[object, ...]:
    arrays = (f.quantiles, f.mean, f.std, f.rise)
    known = f.coverage and (f.coverage.intervals, f.coverage.share.tobytes(), f.coverage.outcomes)
    return f.symbol, f.close_time, f.reference, f.warming, known, *(a.tobytes() for a in arrays)


def until(window: Window, bars: int) -> Window:
    return Window(window.symbol, window.close_times[:bars], window.values[:bars])


def walk(bars: int, seed: int, tick: float = 0.0) -> Window:
    """Hourly bars with normal returns of the volatility SIGMA; closes rounded to a tick."""
    price = 100 * np.exp(np.cumsum(SIGMA * np.random.default_rng(seed).standard_normal(bars)))
    if tick:
        price = np.round(price / tick) * tick
    return Window("WALK", START + HOUR * np.arange(bars), np.repeat(price[:, None], 5, 1))


# What it does.


@given(
    q=st.lists(st.lists(st.integers(-5, 5), min_size=7, max_size=7).map(sorted), min_size=1, max_size=3),
    y=st.integers(-9, 9),
    dice=st.floats(0, 1),
)
def test_a_score_is_where_the_outcome_fell(q: list[list[int]], y: int, dice: float) -> None:
    """Reading the forecast at an outcome's score gives the outcome, unless that is too far out."""
    quantiles = np.array(q) / 4
    g = normal_scores(np.full(len(q), y / 4), quantiles, LEVELS, np.full(len(q), dice))
    flat = quantiles[:, 0] == quantiles[:, -1]
    assert (np.isnan(g) == flat).all()
    inside = ~flat & (np.abs(g) < 4)
    back = read_at(np.repeat(g[:, None], 7, 1)[inside], quantiles[inside], LEVELS)
    np.testing.assert_allclose(back, y / 4, atol=1e-9)
    assert (np.sign(y / 4 - quantiles[~flat & ~inside, 3]) == np.sign(g[~flat & ~inside])).all()


def test_at_the_levels_own_scores_nothing_changes() -> None:
    """Without evidence a forecast is the inner one to the bit; a level's own quantile has its score."""
    q = np.sort(np.random.default_rng(0).normal(size=(2, 7)))
    z = recalibrated(np.empty(0), 4, LEVELS)
    assert read_at(np.array([z, z]), q, LEVELS).tobytes() == q.tobytes()
    np.testing.assert_allclose(z, norm.ppf(LEVELS), atol=1e-15)
    found = normal_scores(q[0], np.repeat(q[:1], 7, 0), LEVELS, np.zeros(7))
    assert found.tobytes() == z.tobytes()


def test_the_levels_give_way_to_the_quantiles_of_the_scores_shrunk() -> None:
    """Up and down alike; outcomes count by how many do not overlap, `PRIOR` of these speak for the levels."""
    g = np.random.default_rng(1).normal(0.4, 1.7, 300)
    own = norm.ppf(LEVELS)
    both = np.quantile(np.concatenate([g, -g]), LEVELS)
    for h in (1, 4):
        expected = (300 / h * both + PRIOR * own) / (300 / h + PRIOR)
        np.testing.assert_allclose(
            recalibrated(np.sort(np.abs(g)), h, LEVELS), expected, rtol=1e-9, atol=1e-12
        )


def test_quantiles_of_scores_and_their_images_are_those_of_numpy() -> None:
    """To the bit: of few scores and many, with ties, and at any levels."""
    rng = np.random.default_rng(3)
    for n in (*range(1, 9), 30, 255, 2000):
        for digits in (0, 1, 17):
            x = np.clip(np.round(rng.standard_cauchy(n), digits), -4, 4)
            for levels in (LEVELS, tuple(np.sort(rng.random(6)).tolist())):
                expected = np.quantile(np.concatenate((x, -x)), levels)
                np.testing.assert_array_equal(mirrored_quantiles(np.sort(np.abs(x)), levels), expected)


def test_spans_that_slide_hold_their_sizes_in_order() -> None:
    """Whatever leaves and comes, ties and what is no number with it, they are those sorted anew."""
    rng = np.random.default_rng(4)
    scores = np.round(rng.normal(0, 2, 200), 1)
    scores[rng.random(200) < 0.2] = np.nan
    spans = [*((a, a + 17) for a in range(150)), (0, 3), (1, 4), (1, 5), (5, 5), (6, 6), (2, 40)]
    found = list(sliding(scores, spans))
    for (a, b), size in zip(spans, found, strict=True):
        own = np.abs(scores[a:b])
        assert size.tobytes() == np.sort(own[~np.isnan(own)]).tobytes()


def test_it_does_what_it_says_bar_by_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition: forecasts of the past, their scores, the scale of then, and the coverage."""
    prior = 0.5
    monkeypatch.setattr(calibration, "PRIOR", prior)
    rng, outcomes, judged = np.random.default_rng(5), 12, 9
    values = np.repeat(100 * np.exp(np.cumsum(rng.normal(0, 0.01, 60)))[:, None], 5, 1)
    window = Window("X", START + HOUR * np.arange(60), values)
    inner, z = Moody(), norm.ppf(LEVELS)
    price = [log(x) for x in values[:, 3]]

    @cache
    def said(k: int) -> np.ndarray:
        cut = Window("X", window.close_times[k - 5 : k + 1], window.values[k - 5 : k + 1])
        q = inner.forecast([cut])[0].quantiles
        return q if (np.abs(q) < 5).all() else np.full_like(q, np.nan)

    def score(k: int, j: int) -> float:
        q, y = said(k)[j], price[k + HORIZONS[j]] - price[k]
        if not np.isfinite(q).all() or q[0] == q[-1]:
            return np.nan
        i = int(np.clip(np.searchsorted(q, y), 1, 6))
        return float(np.clip(z[i - 1] + (y - q[i - 1]) * (z[i] - z[i - 1]) / (q[i] - q[i - 1]), -4, 4))

    def published(k: int, j: int) -> np.ndarray:
        h, q = HORIZONS[j], said(k)[j]
        past = [score(i, j) for i in range(k - h - outcomes + 1, k - h + 1)]
        past = [g for g in past if not np.isnan(g)]
        both = np.quantile([*past, *(-g for g in past)], LEVELS) if past else z
        s = (len(past) * both + prior * h * z) / (len(past) + prior * h)
        i = np.clip(np.searchsorted(z, s), 1, 6)
        return q[i - 1] + (q[i] - q[i - 1]) * (s - z[i - 1]) / (z[i] - z[i - 1])

    lived = Calibrated(Moody(), outcomes, judged)
    counted = 0
    for n in range(40, 60):
        f = lived.forecast([until(window, n + 1)])[0]
        expected = np.array([published(n, j) for j in range(2)])
        if np.isfinite(expected).all():
            np.testing.assert_allclose(f.quantiles, expected, rtol=1e-9, atol=1e-15)
            counted += 1
        else:
            assert np.isnan(f.quantiles).all()
        assert f.coverage is not None
        assert f.coverage.intervals == (0.9, 0.8, 0.5)
        for j, h in enumerate(HORIZONS):
            places = [k for k in range(n - h - judged + 1, n - h + 1) if np.isfinite(said(k)).all()]
            assert f.coverage.outcomes[j] == len(places)
            for i in range(3):
                held = [
                    published(k, j)[i] <= price[k + h] - price[k] <= published(k, j)[-1 - i] for k in places
                ]
                assert f.coverage.share[i, j] == np.mean(held)
    assert counted > 10


def coverage(forecaster: Calibrated | Normal, window: Window, level: float, row: int) -> tuple[float, float]:
    """Of the central interval from `level` on over a horizon: how much it holds, and how wide it is."""
    h, i = forecaster.card.horizons[row], LEVELS.index(level)
    price, held, width = np.log(window.values[:, 3]), [], []
    for n in range(800, len(window) - h):
        q = forecaster.forecast([until(window, n + 1)])[0].quantiles[row]
        held.append(q[i] <= price[n + h] - price[n] <= q[-1 - i])
        width.append(q[-1 - i] - q[i])
    return float(np.mean(held)), float(np.mean(width))


@pytest.mark.parametrize(("factor", "least", "most"), [(0.5, 0.86, 0.91), (1.0, 0.88, 0.92), (2, 0.89, 0.94)])
def test_intervals_get_the_coverage_that_they_claim(factor: float, least: float, most: float) -> None:
    """A 90 % interval that is much too narrow or too wide holds about 90 %; a right one is left alone."""
    window = walk(3000, seed=2)
    raw, _ = coverage(Normal(factor), window, 0.05, 0)
    held, width = coverage(Calibrated(Normal(factor)), window, 0.05, 0)
    assert abs(raw - (2 * norm.cdf(1.6449 * factor) - 1)) < 0.02
    assert least < held < most
    if factor == 1:
        assert width == pytest.approx(2 * 1.6449 * SIGMA, rel=0.03)


def test_a_long_horizon_moves_less() -> None:
    """The same excess of the scores says less where outcomes overlap."""
    window = walk(1200, seed=3)
    f = Calibrated(Normal(0.5)).forecast([window])[0]
    widths = f.quantiles[:, -1] - f.quantiles[:, 0]
    raw = 0.5 * SIGMA * 2 * 1.6449 * np.array([1, 2])
    assert 1.7 < widths[0] / raw[0] < 2.05
    assert 1.4 < widths[1] / raw[1] < widths[0] / raw[0]


def test_the_coverage_that_is_published_is_that_of_the_forecasts() -> None:
    """Counted by a subscriber, the shares of the last outcomes inside their intervals are the published."""
    window, judged = walk(1100, seed=4), 200
    lived = Calibrated(Normal(0.7), outcomes=100, judged=judged)
    price, heard = np.log(window.values[:, 3]), {}
    for n in range(700, len(window)):
        cut = Window("WALK", window.close_times[: n + 1], window.values[: n + 1])
        f = heard[n] = lived.forecast([cut])[0]
        assert f.coverage is not None
    for j, h in enumerate((1, 4)):
        inside = [
            (heard[k].quantiles[j, 1] <= price[k + h] - price[k] <= heard[k].quantiles[j, -2])
            for k in range(n - h - judged + 1, n - h + 1)
        ]
        assert f.coverage.share[1, j] == np.mean(inside)
        assert f.coverage.outcomes[j] == judged


def test_forecasts_that_are_no_numbers_are_no_evidence() -> None:
    """Where the inner forecaster had nothing to say nothing is learnt, counted or forecast."""
    window = walk(1200, seed=6)
    holed = Calibrated(Normal(0.5, holes=True), 500)
    found = [holed.forecast([until(window, n)])[0] for n in range(1190, 1200)]
    for f in found:
        silent = f.close_time // HOUR % 3 == 0
        assert np.isnan(f.quantiles).all() == np.isnan(f.mean).all() == silent
        assert np.isfinite(f.quantiles).all() == (not silent)
        assert f.coverage is not None
        assert all(160 <= n <= 170 for n in f.coverage.outcomes)
    width = max(f.quantiles[0, -1] - f.quantiles[0, 0] for f in found if np.isfinite(f.mean).all())
    assert width > 1.6 * SIGMA * 1.6449


def test_prices_that_stand_still_teach_nothing() -> None:
    """Through a standstill and after it forecasts stay numbers, and without width there is no evidence."""
    window = walk(1600, seed=7)
    values = window.values.copy()
    values[700:1500] = values[700]
    still = Window("WALK", window.close_times, values)
    wrapped = Calibrated(HistoricalSimulation("1h", (1, 4), LEVELS), outcomes=60, judged=30)
    for n in range(690, 1600, 7):
        f = wrapped.forecast([until(still, n)])[0]
        assert all(np.isfinite(x).all() for x in (f.quantiles, f.mean, f.std, f.rise))
        assert (np.diff(f.quantiles) >= 0).all()
    f = wrapped.forecast([until(still, 1400)])[0]
    assert (f.quantiles == 0).all()
    assert f.coverage is not None
    assert (f.coverage.share == 1).all()


def test_coarse_ticks_do_not_look_like_too_wide_forecasts() -> None:
    """Where half of the bars close unchanged, a forecaster that is right about it is left about as it is."""
    window = walk(1800, seed=8, tick=1.5)
    assert 0.3 < (np.diff(window.values[:, 3]) == 0).mean() < 0.7
    inner = HistoricalSimulation("1h", (1,), LEVELS)
    scales = []
    lived = Calibrated(inner)
    for n in range(1400, 1800, 10):
        mine, theirs = (f.forecast([until(window, n)])[0].quantiles[0] for f in (lived, inner))
        scales.append((mine[-1] - mine[0]) / (theirs[-1] - theirs[0]))
    assert 0.95 < np.mean(scales) < 1.08


def test_the_card_says_that_it_is_calibrated() -> None:
    """Identity and outputs are the inner forecaster's, the window is longer, the fingerprint tells."""
    inner = FilteredHistoricalSimulation("1h", (1, 4), LEVELS)
    card = Calibrated(inner).card
    assert (card.model, card.min_window) == (inner.card.model, inner.card.min_window)
    assert card.window > inner.card.window + 500
    assert card.fingerprint.startswith(inner.card.fingerprint + "; calibration=")
    assert Calibrated(inner, outcomes=400).card.fingerprint != card.fingerprint


@pytest.mark.parametrize("levels", [(0.5,), (0.0, 0.5), (0.5, 1.0)])
def test_levels_without_a_score_are_refused(levels: tuple[float, ...]) -> None:
    """One level has no width, and 0 and 1 are infinitely far out."""
    with pytest.raises(ConfigError, match="cannot be recalibrated"):
        Calibrated(HistoricalSimulation("1h", (1,), levels))


# What moves no bit.

OUTCOMES, JUDGED = 7, 5


@pytest.fixture
def _nervous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that each score moves a lot, by its rank; and calls are worked off in small parts."""

    def form(size: np.ndarray, h: int, levels: tuple[float, ...]) -> np.ndarray:
        weight = np.arange(1, len(size) + 1) ** 2
        return norm.ppf(levels) * (0.1 + size @ weight) / (0.1 + weight.sum())

    monkeypatch.setattr(calibration, "recalibrated", form)
    monkeypatch.setattr(calibration, "ASKED", 10)


def calibrated() -> Calibrated:
    return Calibrated(Moody(), OUTCOMES, JUDGED)


WINDOW = calibrated().card.window


class Feed:
    """Random bars of two symbols in rings, as the daemon keeps them, and windows cut from them."""

    def __init__(self, seed: int, bars: int, tick: float) -> None:
        self.rng, self.tick = np.random.default_rng(seed), tick
        self.windows = Windows(WINDOW + 8)
        self.newest = {"A": 0, "B": 0}
        for symbol in self.newest:
            self.next(symbol, bars)

    def next(self, symbol: str, bars: int) -> None:
        """Bars at every second time, so that others can be inserted between them."""
        for _ in range(bars):
            self.newest[symbol] += 2
            self.put(symbol, self.newest[symbol])

    def put(self, symbol: str, time: int) -> None:
        p = float(round(100 * np.exp(self.rng.normal(0, 0.01)) / self.tick) * self.tick)
        if time > 0:
            self.windows.put(Bar(symbol, time, p, p, p, p, float(self.rng.integers(2))))

    def act(self, symbol: str, what: str, much: int) -> None:
        """Let one thing happen to a symbol; `much` is how many bars, or how many bars ago."""
        newest = self.newest[symbol]
        if what.startswith("several"):
            self.next(symbol, much)
        if what.startswith("correct"):
            self.put(symbol, newest - 2 * much)
        if what.startswith("insert"):
            self.put(symbol, newest - 2 * much - 1)
        if what.startswith("gap"):
            self.newest[symbol] += 2 * much
        if what.startswith("split"):
            self.windows.adjust(Adjustment(symbol, newest - 2 * much, 0.5, "split"))
        if what.endswith("next"):
            self.next(symbol, 1)


ACTS = st.tuples(
    st.sampled_from("AB"),
    st.one_of(
        st.just("next"),
        st.sampled_from(
            ["repeat", "several", "correct", "correct next", "insert", "insert next", "gap next", "split"]
        ),
    ),
    st.integers(0, WINDOW + 3),  # bars, or bars ago
    st.one_of(st.just(0), st.integers(0, 3)),  # bars before the newest one at which the window ends
    st.one_of(st.just(WINDOW), st.just(WINDOW), st.integers(3, WINDOW + 3)),  # length of the window
)


@pytest.mark.usefixtures("_nervous")
@given(
    seed=st.integers(0, 2**32 - 1),
    bars=st.integers(3, 2 * WINDOW),
    tick=st.sampled_from([1.0, 1e-6]),
    acts=st.lists(ACTS, min_size=5, max_size=30),
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forecasts_do_not_depend_on_what_was_forecast_before(
    seed: int, bars: int, tick: float, acts: list[tuple[str, str, int, int, int]]
) -> None:
    """After any past, in any company, the bits are those of one that sees the window first and alone."""
    feed, lived = Feed(seed, bars, tick), calibrated()
    for symbol, what, much, back, length in acts:
        feed.act(symbol, what, much)
        places = [(symbol, back, length), ("A", 0, WINDOW), (symbol, 0, length), (symbol, back, WINDOW)]
        cuts = [feed.windows.cut(s, feed.newest[s] - 2 * b, n) for s, b, n in places[: 1 + much % 4]]
        windows = [w for w in cuts if w is not None and len(w) >= 3]
        expected = [bits(calibrated().forecast([w])[0]) for w in windows]
        assert [bits(f) for f in lived.forecast(windows)] == expected


@pytest.mark.parametrize("asked", [10, 4096])
def test_windows_that_follow_one_another_are_forecast_as_each_alone(
    asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many of one history at once, some a second time, others skipped: the bits are those of each alone."""
    monkeypatch.setattr(calibration, "ASKED", asked)
    whole, lived = walk(400, seed=12), calibrated()
    calls = [range(WINDOW, 150), range(150, 200), range(190, 230), range(229, 232), range(240, 300, 2)]
    calls += [range(3, WINDOW + 5), range(300, 301), range(301, 390), range(301, 390)]
    joined = []
    of_run = Calibrated._published

    def noted(self: Calibrated, run: list[Window], past: object, q: np.ndarray) -> list[Forecast]:
        joined.append(len(run))
        return of_run(self, run, past, q)  # type: ignore[arg-type]

    for ends in calls:
        windows = [whole.part(max(0, k - WINDOW), k) for k in ends]
        expected = [bits(calibrated().forecast([w])[0]) for w in windows]
        with monkeypatch.context() as patch:
            patch.setattr(Calibrated, "_published", noted)
            made = lived.forecast(windows)
        assert [bits(f) for f in made] == expected
    assert min(joined) == 1
    assert max(joined) >= min(asked, 80)


@pytest.mark.usefixtures("_nervous")
@pytest.mark.parametrize("outcomes", [7, 40])
def test_a_changed_bar_of_any_age_is_noticed(outcomes: int) -> None:
    """Whichever bar is corrected or inserted before the next one, the bits are those of a fresh start."""
    lived = Calibrated(Moody(), outcomes, JUDGED)
    n, window = lived.card.window, walk(200, seed=9)
    for i in range(n):
        corrected = window.values[: n + 1].copy()
        corrected[i] *= 1 + 1e-6
        later = np.insert(window.close_times[: n + 1], i + 1, window.close_times[i] + 1)
        inserted = np.insert(window.values[: n + 1], i + 1, 50.0, axis=0)
        moved = window.close_times[: n + 1].copy()
        moved[i] += 1
        changed = [(later, inserted), (moved, window.values), (window.close_times[: n + 1], corrected)]
        for times, values in changed:
            lived.forecast([until(window, n)])
            after = Window("WALK", times[-n:], values[: len(times)][-n:])
            fresh = Calibrated(Moody(), outcomes, JUDGED).forecast([after])[0]
            assert bits(lived.forecast([after])[0]) == bits(fresh)


def test_bits_of_a_stateful_forecaster_survive_long_walks() -> None:
    """Bar after bar from the first forecast on, and some at once, around a forecaster with its own memory."""
    window = simulate("SIM", 1000, seed=3).window

    def fresh() -> Calibrated:
        return Calibrated(FilteredHistoricalSimulation("1h", (1, 4, 16), LEVELS), 60, 30)

    lived = fresh()
    assert lived.card.window < 800
    steps = [*range(lived.card.min_window, 780), *range(785, 1000, 5)]
    for bars in steps:
        f = lived.forecast([until(window, bars)])[0]
        if bars % 45 == 0:
            assert bits(f) == bits(fresh().forecast([until(window, bars)])[0])
    assert f.coverage is not None
    assert not f.warming


@pytest.mark.usefixtures("_nervous")
def test_a_window_that_slides_keeps_what_it_said_of_the_past() -> None:
    """More bars before those that are needed change nothing; it is warming as long as the inner one is."""
    window = walk(200, seed=10)
    n, inner = calibrated().card.window, calibrated().inner.card.window
    lengths = (200, n + 1, n, n - 1, inner, inner - 1)
    cuts = [Window("WALK", window.close_times[-k:], window.values[-k:]) for k in lengths]
    more, one, whole, less, new, few = calibrated().forecast(cuts)
    assert bits(more) == bits(one) == bits(whole)
    assert [f.warming for f in (whole, less, new, few)] == [False, False, False, True]
    assert less.quantiles.tobytes() == whole.quantiles.tobytes()  # only the coverage has less to count
    assert whole.coverage is not None
    assert few.coverage is None
    with pytest.raises(ValueError, match="needs 3"):
        calibrated().forecast([until(window, 2)])


@pytest.mark.usefixtures("_nervous")
def test_nothing_after_a_bar_changes_its_forecast() -> None:
    """With other bars after it, and after windows with those, the bits of a forecast are the same."""
    window = walk(120, seed=11)
    poisoned = window.values.copy()
    poisoned[80:] *= np.random.default_rng(0).uniform(0.5, 2, (40, 1))
    other = Window("WALK", window.close_times, poisoned)
    one, two = calibrated(), calibrated()
    clean = [bits(one.forecast([until(window, n)])[0]) for n in range(30, 120)]
    mixed = [bits(two.forecast([until(other, n)])[0]) for n in range(30, 120)]
    assert mixed[:51] == clean[:51]
    assert mixed[51:] != clean[51:]
    assert [bits(two.forecast([until(window, n)])[0]) for n in range(30, 120)] == clean


@pytest.mark.usefixtures("_nervous")
def test_no_window_touches_another_in_its_call() -> None:
    """Windows of many symbols, and many of one, give in any batch what each gives alone."""
    windows = [until(walk(90, seed=s), n) for s, n in zip(range(20), range(4, 84, 4), strict=True)]
    windows = [Window(f"S{i}", w.close_times, w.values) for i, w in enumerate(windows)]
    windows += [until(walk(90, seed=5), n) for n in range(50, 90, 3)]
    forecast_does_not_depend_on_its_batch(calibrated(), windows)
    forecast_does_not_depend_on_its_batch(Calibrated(Normal(0.6)), windows, (1, 7, 31))


def test_what_is_known_is_not_asked_again() -> None:
    """A symbol costs the bars of its window once, then one forecast a bar; a correction what follows it."""
    inner = Moody()
    lived, window = Calibrated(inner, OUTCOMES, JUDGED), walk(200, seed=12)

    def asked(values: np.ndarray, bars: int) -> int:
        inner.asked.clear()
        lived.forecast([Window("WALK", window.close_times[:bars], values[:bars])])
        assert all(len(w) == 6 for w in inner.asked)
        return len(inner.asked)

    assert asked(window.values, 100) == WINDOW - 5
    assert [asked(window.values, n) for n in (101, 102, 102, 107)] == [1, 1, 0, 5]
    values = window.values.copy()
    values[106 - 2] *= 1.001
    assert asked(values, 107) == 3 + max(HORIZONS)
    assert asked(values, 108) == 1
    inner.asked.clear()
    lived.forecast([Window("WALK", window.close_times[:n], values[:n]) for n in range(108, 120)])
    assert len(inner.asked) == 11


def test_many_new_symbols_take_no_more_memory_at_a_time_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the inner forecaster is worked off in parts; only each symbol's past is kept."""
    monkeypatch.setattr(calibration, "ASKED", 300)

    def beyond(symbols: int) -> int:
        lived = Calibrated(Normal(1.0), outcomes=60, judged=30)
        windows = [Window(f"S{i}", w.close_times, w.values) for i in range(symbols)]
        tracemalloc.start()
        made = lived.forecast(windows)
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(made) == symbols
        return most - kept

    w = walk(110, seed=14)
    beyond(4)  # what is set up once
    assert beyond(40) < 1.5 * beyond(4)


def test_a_call_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the inner forecaster raises, the next call gives the bits of a fresh start."""
    inner = Moody()
    lived, window = Calibrated(inner, OUTCOMES, JUDGED), walk(100, seed=13)
    lived.forecast([until(window, 60)])

    def broken(windows: Sequence[Window]) -> list[Forecast]:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(inner, "forecast", broken)
        with pytest.raises(RuntimeError, match="broken"):
            lived.forecast([until(window, 61)])
    assert bits(lived.forecast([until(window, 62)])[0]) == bits(calibrated().forecast([until(window, 62)])[0])
