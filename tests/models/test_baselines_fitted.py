"""Baselines that fit something: known numbers, purity, seasons by the right clock, bars that stand still."""

import os
import subprocess
import sys
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barcast.models import (
    Bar,
    CheckpointError,
    ConfigError,
    Forecast,
    Forecaster,
    Garch,
    Scaled,
    Window,
    Windows,
    compare,
    fitted,
    open_model,
)
from barcast.models.fitted import Season, Series
from barcast.models.season import slots
from tests.garch import HOUR, START, simulate

HORIZONS, LEVELS = (1, 4), (0.05, 0.25, 0.5, 0.75, 0.95)
PLAIN = ("ewma", "har")
NAMES = (*PLAIN, "hs-s", "fhs-s", "ewma-s", "har-s")


def make(name: str) -> Forecaster:
    return (Garch if name.startswith("garch") else Scaled)(name, "1h", HORIZONS, LEVELS)


@pytest.fixture(scope="module")
def window() -> Window:
    return simulate("SIM", 7000, seed=3, season=True).window


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 200 bars, so that a test can walk through many of them."""
    reach = replace(fitted.INTRADAY, har=(1, 4, 16), outcomes=120, fit=150, least=100, refit=50)
    monkeypatch.setattr(fitted, "INTRADAY", reach)


def until(window: Window, bars: int, symbol: str = "SIM") -> Window:
    return Window(symbol, window.close_times[:bars], window.values[:bars])


def bits(f: Forecast) -> tuple[object, ...]:
    arrays = (f.quantiles, f.mean, f.std, f.rise)
    return f.symbol, f.close_time, f.reference, f.warming, *(a.tobytes() for a in arrays)


def width(f: Forecast) -> np.ndarray:
    """Of the 90 % interval over each horizon."""
    return np.asarray(f.quantiles[:, -1] - f.quantiles[:, 0])


def moved(returns: np.ndarray, close_times: np.ndarray | None = None) -> Window:
    """Bars without a range that make these returns."""
    price = 100 * np.exp(np.concatenate([[0.0], np.cumsum(returns)]))
    before = np.concatenate([price[:1], price[:-1]])
    values = np.column_stack([before, np.maximum(before, price), np.minimum(before, price), price, price])
    times = START + HOUR * np.arange(1, len(price) + 1) if close_times is None else close_times
    return Window("SIM", times, values)


# ---- known numbers


def test_ewma_is_the_normal_distribution_of_riskmetrics(window: Window) -> None:
    """Its quantiles are the normal's times the weighted volatility of 128 returns and the root of time."""
    f = make("ewma").forecast([window])[0]
    weight = 0.94 ** np.arange(127, -1, -1)
    sigma = np.sqrt(np.average(np.diff(np.log(window.values[-129:, 3])) ** 2, weights=weight))
    for i, h in enumerate(HORIZONS):
        expected = [sigma * h**0.5 * NormalDist().inv_cdf(p) for p in LEVELS]
        np.testing.assert_allclose(f.quantiles[i], expected, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(f.std, sigma * np.sqrt(HORIZONS))
    assert f.mean.tolist() == [0.0, 0.0]
    assert f.rise.tolist() == [0.5, 0.5]
    assert make("ewma").card.window == 129


def segment(window: Window, forecaster: Forecaster) -> slice:
    """The bars that a window of the symbol SIM is fitted to, found one by one."""
    from zlib import crc32

    every = fitted.INTRADAY.refit * HOUR
    phase = crc32(b"SIM") * every >> 32
    newest = window.close_time
    inside = [i for i, t in enumerate(window.close_times) if (newest - phase) // every * every + phase >= t]
    stop = inside[-1] + 1
    return slice(stop - fitted.INTRADAY.fit, stop)


def test_har_is_least_squares_on_logs_of_mean_variances(window: Window) -> None:
    """Its numbers are those of numpy's least squares and quantiles over the bars it may look at."""
    forecaster = make("har")
    window = Window("SIM", *(a[-forecaster.card.window :] for a in (window.close_times, window.values)))
    f = forecaster.forecast([window])[0]
    o, high, low, c = np.log(window.values[:, :4]).T
    variance = np.concatenate([[np.nan], (high - low)[1:] ** 2 / (4 * np.log(2)) + (o[1:] - c[:-1]) ** 2])

    def past(k: int, first: int, floor: float) -> list[float]:
        spans = ((w, max(first, k + 1 - w)) for w in (1, 4, 16, 96, 480))
        return [1.0, *(np.log(variance[a : k + 1].mean() + floor) for _, a in spans)]

    cut = segment(window, forecaster)
    floor = 1e-3 * variance[cut.start + 1 : cut.stop].mean()
    now = len(window) - 1
    first = now - 2000 - 4 - 480 + 1  # the oldest variance that is looked at
    for i, h in enumerate(HORIZONS):
        rows = range(cut.start + 1 + 480, cut.stop - h)
        X = [past(k, cut.start + 1, floor) for k in rows]
        y = [np.log(variance[k + 1 : k + 1 + h].mean() + floor) for k in rows]
        b = np.linalg.lstsq(np.array(X), np.array(y), rcond=None)[0]
        scale = {k: np.exp(0.5 * (past(k, first, floor) @ b)) for k in range(now - 2000 - h + 1, now + 1)}
        outcomes = [(c[k] - c[k - h]) / scale[k - h] for k in range(now - 1999, now + 1)]
        np.testing.assert_allclose(f.quantiles[i], np.quantile(outcomes, LEVELS) * scale[now], rtol=1e-4)


def test_linear_systems_are_solved_as_well_as_by_lapack() -> None:
    """Also ill-conditioned ones, and those whose rows must change places."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6):
        x = rng.standard_normal((200, n)) * 10.0 ** -np.arange(n)
        for A in (x.T.copy() @ x, np.eye(n)[::-1] + np.diag(np.arange(n) % 2 * 1e-3)):
            b = rng.standard_normal(n)
            np.testing.assert_allclose(A @ fitted.solve(A, b), b, atol=1e-12 * np.abs(b).max())
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        fitted.solve(np.ones((2, 2)), np.ones(2))


def test_no_kernel_of_a_processor_decides_the_bits_of_a_fit() -> None:
    """The coefficients are the same to the bit, whichever kernels numpy's OpenBLAS takes."""
    script = """if True:
        import numpy as np
        from barcast.models import fitted, scaling
        rng = np.random.default_rng(0)
        for n in (2, 3, 5, 6) * 20:
            X, y = rng.standard_normal((n, 300)), rng.standard_normal(300)
            found = fitted._least_squares(X, y), *scaling._normal(np.exp(X.T), y)
            print(*(b.tobytes().hex() for b in found))
    """
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | kernels,
            check=True,
            capture_output=True,
        ).stdout
        for kernels in ({}, {"OPENBLAS_CORETYPE": "Prescott"})
    }
    assert len(said) == 1
    assert len(said.pop()) > 10_000


def test_other_bits_have_another_fingerprint() -> None:
    """Where a processor lacks what numpy's logarithm uses here, and it differs, so does the fingerprint."""
    script = """if True:
        import numpy as np
        from barcast.models import open_model
        x = np.random.default_rng(0).uniform(0.5, 20, 100_000)
        print(open_model("hs", "1h", None, None).card.fingerprint)
        print(hash(np.log(x).tobytes()), hash(np.exp(x).tobytes()))
    """
    known = np.lib.introspect.opt_func_info(func_name="^log$", signature="float64")
    used = {kernel["current"] for kernels in known.values() for kernel in kernels.values()}
    less = " ".join(name for name in used if not name.startswith("baseline"))
    found = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            env=os.environ | {"PYTHONHASHSEED": "0"} | lacking,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for lacking in ({}, {"NPY_DISABLE_CPU_FEATURES": less} if less else {})
    ]
    assert len({bits for _, bits in found}) <= len({fingerprint for fingerprint, _ in found})


@pytest.mark.parametrize("name", ["hs-s", "fhs-s"])
def test_simulation_by_season_divides_by_what_the_hours_ahead_are_like(name: str, window: Window) -> None:
    """Outcomes are over the root mean square factor of their hours, times that of the hours ahead."""
    forecaster = make(name)
    window = Window("SIM", *(a[-forecaster.card.window :] for a in (window.close_times, window.values)))
    f = forecaster.forecast([window])[0]
    cut = segment(window, forecaster)
    price, now = np.log(window.values[:, 3]), len(window) - 1
    r = np.concatenate([[np.nan], np.diff(price)])
    slot = slots(window.close_times, "UTC")
    own = slot[cut.start + 1 : cut.stop]
    size = np.abs(r[cut.start + 1 : cut.stop])
    size = np.minimum(size, 20 * np.quantile(size, 0.9))
    size /= size.mean()
    day = np.array([(30 + size[own % 24 == s].sum()) / (30 + (own % 24 == s).sum()) for s in range(24)])
    rest = size / day[own % 24]
    rest /= rest.mean()
    week = np.array([(30 + rest[own == s].sum()) / (30 + (own == s).sum()) for s in range(168)])
    factor = day[np.arange(168) % 24] * week

    x = r / factor[slot]
    weight = 0.94 ** np.arange(127, -1, -1)
    for i, h in enumerate(HORIZONS):
        ahead = np.array([np.mean(factor[own[k + 1 : k + 1 + h]] ** 2) for k in range(len(own) - h)])
        of = [ahead[own[:-h] == s] for s in range(168)]
        gain = np.array([np.sqrt((a.sum() + 1) / (len(a) + 1)) for a in of])

        def scale(k: int, gain: np.ndarray = gain) -> float:
            sigma = 1.0 if name == "hs-s" else np.sqrt(np.average(x[k - 127 : k + 1] ** 2, weights=weight))
            return float(sigma * gain[slot[k]])

        n = 500 if name == "hs-s" else 2000
        outcomes = [(price[k] - price[k - h]) / scale(k - h) for k in range(now - n + 1, now + 1)]
        np.testing.assert_allclose(f.quantiles[i], np.quantile(outcomes, LEVELS) * scale(now), rtol=1e-9)


def test_seasons_and_ranges_pay_on_bars_that_have_them(window: Window) -> None:
    """On a GARCH process with a daily season each refinement scores below what it refines."""
    names = ("hs-s", "fhs-s", "har-s", "har")
    makers = [Scaled(name, "1h", (1,), LEVELS) for name in names]
    since, until_ = int(window.close_times[5500]), window.close_time
    scores = compare(makers, [window], since=since, until=until_, stride=2)
    crps = {name: s.normalised for name, s in zip(names, scores, strict=True)}
    assert crps["har-s"] < crps["fhs-s"] < crps["hs-s"]
    assert crps["har-s"] < crps["har"]
    coverage = scores[names.index("har-s")].coverage[0]
    np.testing.assert_allclose(coverage, [0.9, 0.5], atol=0.04)


# ---- a function of the window alone


@pytest.mark.parametrize("name", [*NAMES, "garch-s"])
def test_they_look_at_their_window_only(name: str, window: Window) -> None:
    """A forecast is the same from its window and from more bars, in any company; a short one is warming."""
    forecaster = make(name)
    n = forecaster.card.window
    cut = Window("SIM", window.close_times[-n:], window.values[-n:])
    least = until(window, forecaster.card.min_window)
    whole, alone, warming = forecaster.forecast([window, cut, least])
    assert bits(whole) == bits(alone) == bits(make(name).forecast([cut])[0])
    assert bits(warming) == bits(make(name).forecast([least])[0])
    full = forecaster.card.min_window == n
    assert [whole.warming, alone.warming, warming.warming] == [False, False, not full]
    assert np.isfinite(warming.quantiles).all()
    with pytest.raises(ValueError, match="needs"):
        forecaster.forecast([until(window, forecaster.card.min_window - 1)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("horizon", [100, 300, 1500])
@pytest.mark.parametrize("name", ["har", "har-s", "fhs-s"])
def test_a_long_horizon_leaves_bars_to_fit_to(name: str, horizon: int) -> None:
    """However far ahead, the first forecasts are fitted to some outcomes."""
    forecaster = Scaled(name, "1h", (1, horizon), LEVELS)
    n = forecaster.card.min_window
    assert n <= forecaster.card.window
    bars = simulate("SIM", n + 240, seed=4).window
    for f in forecaster.forecast([until(bars, n + more) for more in (0, 1, 120, 240)]):
        assert 0.1 < width(f)[1] / width(f)[0] / np.sqrt(horizon) < 10


def test_later_bars_do_not_touch_earlier_forecasts(window: Window) -> None:
    """With all bars after one replaced, and looked at first, the forecasts up to it keep their bits."""
    poisoned = window.values.copy()
    poisoned[6000:] *= 7
    for name in NAMES:
        clean, dirty = make(name), make(name)
        dirty.forecast([Window("SIM", window.close_times[:k], poisoned[:k]) for k in (6001, 6300, 7000)])
        for k in (5700, 5999, 6000):
            before = Window("SIM", window.close_times[:k], poisoned[:k])
            assert bits(dirty.forecast([before])[0]) == bits(clean.forecast([until(window, k)])[0])


CONSTANT = [HealthCheck.function_scoped_fixture]  # it is the same for all examples
ACTS = st.tuples(
    st.sampled_from("AB"),
    st.sampled_from(["next", "next", "several", "correct", "insert", "gap", "repeat"]),
    st.one_of(st.integers(1, 6), st.integers(40, 210)),
    st.integers(0, 2),  # bars before the newest one at which the window ends
)


def walk(name: str, seed: int, bars: int, acts: list[tuple[str, str, int, int]]) -> None:
    """Let things happen to two symbols; each forecast has the bits of one that sees the window first."""
    rng = np.random.default_rng(seed)
    windows, newest = Windows(300), {"A": START // HOUR, "B": START // HOUR}
    lived = make(name)

    def put(symbol: str, close_time: int) -> None:
        o, c = np.exp(rng.normal(0, 0.01, 2)).tolist()
        windows.put(Bar(symbol, close_time, o, max(o, c) * 1.001, min(o, c), c, 1.0))

    def move(symbol: str, count: int) -> None:
        for _ in range(count):
            newest[symbol] += 1
            put(symbol, newest[symbol] * HOUR)

    for symbol in newest:
        move(symbol, bars)
    for symbol, what, much, back in acts:
        match what:
            case "next":
                move(symbol, 1)
            case "several":
                move(symbol, much)
            case "correct":
                put(symbol, (newest[symbol] - much) * HOUR)
            case "insert":
                put(symbol, (newest[symbol] - much) * HOUR - HOUR // 2)
            case "gap":
                newest[symbol] += much
                move(symbol, 1)
        for of, ago in ((symbol, back), ("A", 0)):
            cut = windows.cut(of, (newest[of] - ago) * HOUR, lived.card.window)
            if cut is not None and len(cut) >= lived.card.min_window:
                assert bits(lived.forecast([cut])[0]) == bits(make(name).forecast([cut])[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("short")
@given(
    seed=st.integers(0, 2**32 - 1),
    bars=st.one_of(st.integers(100, 160), st.integers(190, 210)),
    acts=st.lists(ACTS, min_size=5, max_size=20),
)
@settings(max_examples=25, deadline=None, suppress_health_check=CONSTANT)
def test_forecasts_do_not_depend_on_what_was_forecast_before(
    name: str, seed: int, bars: int, acts: list[tuple[str, str, int, int]]
) -> None:
    """A forecaster with any past gives the bits of one that sees the window first and alone."""
    walk(name, seed, bars, acts)


@pytest.mark.usefixtures("short")
@given(seed=st.integers(0, 2**32 - 1), acts=st.lists(ACTS, min_size=3, max_size=8))
@settings(max_examples=8, deadline=None, suppress_health_check=CONSTANT)
def test_neither_do_those_of_garch(seed: int, acts: list[tuple[str, str, int, int]]) -> None:
    """The same for the process that is fitted by a search."""
    walk("garch-s", seed, 190, acts)


@pytest.mark.parametrize("name", ["har-s", "garch"])
@pytest.mark.usefixtures("short")
def test_fits_are_rare_and_notice_a_correction(
    name: str, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars in a row share a fit up to the next boundary; a bar corrected in what was fitted makes another."""
    made: list[int] = []
    kind = Garch if name == "garch" else Scaled
    fit = kind._fit
    monkeypatch.setattr(kind, "_fit", lambda self, s: made.append(len(s.returns)) or fit(self, s))
    lived = make(name)
    changes = []
    for bars in range(300, 500):
        before = len(made)
        lived.forecast([until(window, bars)])
        if len(made) > before:
            changes.append(bars)
    assert np.diff(changes[1:]).tolist() == [50] * (len(changes) - 2)
    assert set(made) == {149}
    others = make(name)
    for symbol in ("A", "B", "C", "D"):
        others.forecast([until(window, 400, symbol)])
    del made[:]
    for symbol in ("A", "B", "C", "D"):
        for bars in range(401, 420):
            others.forecast([until(window, bars, symbol)])
    assert len(made) < 4  # boundaries differ: not all symbols pass one at a time

    del made[:]
    at = changes[-1]
    lived.forecast([until(window, at)])
    for age, again in ((1, 1), (100, 1), (160, 0)):
        values = window.values.copy()
        values[at - 1 - age, 4] += 1.0
        fresh = make(name)
        fresh.forecast([until(window, at)])
        del made[:]
        changed = Window("SIM", window.close_times[:at], values[:at])
        found = fresh.forecast([changed])[0]
        assert len(made) == again
        assert bits(found) == bits(make(name).forecast([changed])[0])


@pytest.mark.usefixtures("short")
def test_no_window_touches_another_in_its_call(window: Window) -> None:
    """Full, warming and broken windows of many symbols give in one call what each gives alone."""
    values = window.values.copy()
    values[150, 1] = np.nan
    cuts = [until(window, n, f"S{i}") for i, n in enumerate([150, 160, 190, 200, 201, 500] * 5)]
    cuts.insert(3, Window("BROKEN", window.close_times[:190], values[:190]))
    for name in NAMES:
        cuts = [w for w in cuts if len(w) >= make(name).card.min_window]
        together = make(name).forecast(cuts)
        assert [bits(f) for f in together] == [bits(make(name).forecast([w])[0]) for w in cuts]


# ---- bars that are not as they should be


@pytest.mark.parametrize("name", [*NAMES, "garch", "garch-s"])
@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.filterwarnings("error")
def test_a_price_that_is_none_gives_no_finite_forecast(name: str, price: float, window: Window) -> None:
    """A window with a price that has no logarithm is not forecast, and leaves no trace in later ones."""
    lived = make(name)
    n = lived.card.window
    for column in range(4):
        values = window.values[: n + 1].copy()
        values[n - 50, column] = price
        f = lived.forecast([Window("SIM", window.close_times[:n], values[:n])])[0]
        assert np.isnan(f.quantiles).all()
        assert np.isnan([f.mean, f.std, f.rise]).all()
    assert bits(lived.forecast([until(window, n)])[0]) == bits(make(name).forecast([until(window, n)])[0])


@pytest.mark.parametrize("name", ["hs", "fhs", *NAMES, "garch", "garch-s"])
@pytest.mark.filterwarnings("error")
def test_bars_that_stand_still_have_next_to_no_width(name: str) -> None:
    """A symbol that never moved is forecast to stay, by finite numbers, also while it is warming."""
    from barcast.daemon.store import open_model

    forecaster = open_model(name, "1h", None, None)
    for n in (forecaster.card.min_window, forecaster.card.window):
        f = forecaster.forecast([moved(np.zeros(n - 1))])[0]
        assert (np.abs(f.quantiles) < 1e-4).all()
        assert np.isfinite([f.mean, f.std, f.rise]).all()


@pytest.mark.parametrize("name", ["hs", "fhs", *NAMES, "garch", "garch-s"])
@pytest.mark.parametrize("still", [200, 630, 6000])
@pytest.mark.filterwarnings("error")
def test_bands_stay_sane_when_a_symbol_that_stood_still_moves(name: str, still: int) -> None:
    """From its first moves of about 1 % on, no quantile is more than 25 times as far away."""
    from barcast.daemon.store import open_model

    rng = np.random.default_rng(5)
    r = np.concatenate([rng.normal(0, 0.01, 6000), np.zeros(still), rng.normal(0, 0.01, 300)])
    forecaster = open_model(name, "1h", None, None)
    window = moved(r)
    for moves in (1, 2, 5, 20, 60, 120, 299):
        f = forecaster.forecast([until(window, 6001 + still + moves)])[0]
        assert (np.abs(f.quantiles) < 25 * 0.01 * np.sqrt(f.horizons)[:, None]).all(), moves
    last = f.quantiles[:, -1] / (1.645 * 0.01 * np.sqrt(f.horizons))
    assert (last > 0.15).all()


# ---- time of week


@pytest.mark.parametrize("name", ["hs-s", "fhs-s", "ewma-s", "har-s", "garch-s"])
def test_the_hours_are_those_of_new_york_when_the_market_keeps_them(name: str) -> None:
    """Before the busy hours of New York bands are wide, in winter and, an hour earlier by UTC, in summer."""
    times = START + HOUR * np.arange(1, 7001)  # January to October
    hour = slots(times, "America/New_York") % 24
    rng = np.random.default_rng(2)
    r = rng.normal(0, 0.002, 7000) * np.where((hour >= 9) & (hour < 12), 4.0, 1.0)
    window = moved(r[1:], times)
    forecaster = Scaled(name, "1h", (1,), LEVELS) if name != "garch-s" else Garch(name, "1h", (1,), LEVELS)
    widths = np.array([width(forecaster.forecast([until(window, k)])[0])[0] for k in range(5600, 5696)])
    ahead = hour[5600:5696]
    busy = (ahead >= 9) & (ahead < 12)
    assert np.median(widths[busy]) > 3 * np.median(widths[~busy])
    assert widths[busy].min() > 1.5 * widths[~busy].max()


def test_bars_within_an_hour_are_no_more_evidence_than_one() -> None:
    """Four bars an hour that move like the one of that hour teach the same factors."""
    times = START + HOUR * np.arange(1, 1001)
    r = np.random.default_rng(3).normal(0, 0.01, 1000)
    quarters = (times[:, None] - HOUR // 4 * np.arange(3, -1, -1)).ravel()
    found = [
        Season.of(Series(t, np.append(0.0, np.cumsum(x)), x, x * x), (1,)).factor
        for t, x in ((times, r), (quarters, np.repeat(r, 4)))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    assert found[0].std() > 0.05


@pytest.mark.parametrize("timeframe", ["1d", "session", "7d"])
@pytest.mark.parametrize("name", ["hs-s", "fhs-s", "ewma-s", "har-s", "garch-s"])
def test_daily_bars_have_no_hour_of_the_week(name: str, timeframe: str) -> None:
    """A time-of-week factor of daily bars is refused in a sentence that says what to take."""
    with pytest.raises(ConfigError, match=f"'{name}' .*'{timeframe}' bars .* take '{name[:-2]}'"):
        (Garch if name == "garch-s" else Scaled)(name, timeframe, (1,), LEVELS)


@pytest.mark.parametrize("name", ["har", "garch"])
def test_daily_bars_look_back_by_weeks_and_months(name: str) -> None:
    """Daily and session bars are forecast too, from at most 1,020 bars."""
    for timeframe in ("1d", "session"):
        forecaster = (Garch if name == "garch" else Scaled)(name, timeframe, (1, 5, 20), LEVELS)
        assert forecaster.card.window == 1020
        window = simulate("SIM", 1100, seed=1, step=24 * HOUR).window
        f = forecaster.forecast([window])[0]
        assert (np.diff(f.quantiles, axis=1) > 0).all()
        assert (np.diff(width(f)) > 0).all()
        assert not f.warming


def test_a_timeframe_that_is_none_is_refused() -> None:
    """A length of bars that cannot be read is named."""
    with pytest.raises(ConfigError, match="timeframe '1w' is unknown"):
        Scaled("har", "1w", (1,), LEVELS)


def test_ids_depend_on_name_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has an id that begins with its name and changes with what it is asked for and made of."""
    ids = {make(name).card.model for name in (*NAMES, "garch", "garch-s")}
    assert {model.rpartition("-")[0] for model in ids} == {*NAMES, "garch", "garch-s"}
    before = make("har").card.model
    assert before != Scaled("har", "1h", (1, 5), LEVELS).card.model
    monkeypatch.setattr(fitted, "INTRADAY", replace(fitted.INTRADAY, refit=100))
    assert before != make("har").card.model


def test_misspelt_baseline_is_recognised() -> None:
    """What is the name of no folder was meant for the baseline that is spelt nearly so."""
    with pytest.raises(CheckpointError, match=r"'fsh'.* did you mean fhs"):
        open_model("fsh", "1h", None, None)
