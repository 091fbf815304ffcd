"""Bars to scale, features and sequence."""

from dataclasses import replace

import numpy as np
import pytest

import barcast.models.scaling
from barcast.models import ConfigError, DataError, Window
from barcast.models.scaling import (
    DAILY,
    INTRADAY,
    Scaling,
    bars_to_learn,
    feature_names,
    fit,
    layout_of,
    signed_features,
    trailing_mean,
)
from barcast.models.season import slots
from barcast.models.trained import Trained
from tests.garch import HOUR, simulate
from tests.models.conftest import HORIZONS

DAY = 24 * HOUR
DAYS = (1, 5, 20)


@pytest.fixture(scope="module")
def window() -> Window:
    return simulate("NEW", 2600, seed=11, season=True).window


@pytest.fixture
def scaling(trained: Trained) -> Scaling:
    return trained.scaling


@pytest.fixture(scope="module")
def daily() -> Scaling:
    return fit([simulate(s, 900, seed=5, step=DAY).window for s in "AB"], "1d", DAYS)


def _upto(window: Window, n: int, length: int) -> Window:
    cut = slice(max(0, n - length), n)
    return Window(window.symbol, window.close_times[cut], window.values[cut])


def _poisoned(window: Window, n: int) -> Window:
    values = window.values.copy()
    values[n:, :4] *= np.exp(np.random.default_rng(0).normal(0, 0.5, (len(values) - n, 1)))
    values[n:, 1] *= 3
    values[n:, 4] = 1e9
    return Window(window.symbol, window.close_times, values)


def _agree(scaling: Scaling, window: Window) -> None:
    """The frame of a whole history equals those of windows: to rounding while warming, then to the bit."""
    first, L = scaling.min_window - 1, scaling.layout.context
    whole = scaling.frame(window.symbol, window.close_times, window.values, first)
    full = range(scaling.window, len(window) + 1, max(1, (len(window) - scaling.window) // 40))
    for n in (first + 1, 200, scaling.window - 1, *full):
        one = scaling.of_window(_upto(window, n, scaling.window))
        row = n - 1 - first
        parts = (
            (one.features[0], whole.features[row]),
            (one.scale[0], whole.scale[row]),
            (one.channels[-L:], whole.channels[n - 1 - L : n - 1]),
        )
        for mine, theirs in parts:
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)
            assert n < scaling.window or mine.tobytes() == theirs.tobytes()


def test_whole_history_and_single_windows_agree(scaling: Scaling, window: Window) -> None:
    """What training sees of a whole history is what the windows show that end at each bar."""
    assert scaling.window == 1921
    _agree(scaling, window)
    _agree(scaling, Window("SYM0", window.close_times, window.values))


def test_whole_history_and_single_windows_agree_in_daily_bars(daily: Scaling) -> None:
    """The same with the layout of daily bars, whose means reach farther."""
    assert daily.window == 1000 + 250 + 20
    _agree(daily, simulate("NEW", 1400, seed=12, step=DAY).window)


@pytest.mark.parametrize("piece", [1, 64, 700, 3000])
def test_frames_of_some_bars_at_a_time_are_the_whole_one(
    scaling: Scaling, window: Window, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They follow each other without a gap, and together have the bits of the frame of all bars."""
    window, first = window.part(0, 2600 if piece > 1 else 2100), 481 if piece > 1 else 2000
    monkeypatch.setattr(barcast.models.scaling, "PIECE", piece)
    arguments = window.symbol, window.close_times, window.values, first
    whole, found = scaling.frame(*arguments), list(scaling.frames(*arguments))
    assert [f.first for f in found] == list(range(first, len(window), piece))
    for name in ("scale", "features", "channels"):
        joined = np.concatenate([getattr(f, name) for f in found])
        assert joined.tobytes() == getattr(whole, name).tobytes()


@pytest.mark.parametrize("n", [90, 500, 1700, 2590])
def test_bars_after_the_origin_change_nothing(scaling: Scaling, window: Window, n: int) -> None:
    """Replacing every bar after t leaves scale, features and channels up to t the same to the bit."""
    first = scaling.min_window - 1
    bad = _poisoned(window, n)
    clean, dirty = (scaling.frame(w.symbol, w.close_times, w.values, first) for w in (window, bad))
    rows = n - first
    assert clean.scale[:rows].tobytes() == dirty.scale[:rows].tobytes()
    assert clean.features[:rows].tobytes() == dirty.features[:rows].tobytes()
    assert clean.channels[: n - 1].tobytes() == dirty.channels[: n - 1].tobytes()
    assert clean.features[rows:].tobytes() != dirty.features[rows:].tobytes()


def test_bars_before_the_window_change_nothing(scaling: Scaling, window: Window) -> None:
    """A window longer than the scaling asks for gives the same bits as one cut to that length."""
    long, exact = (scaling.of_window(_upto(window, 2600, n)) for n in (2600, scaling.window))
    assert long.features.tobytes() == exact.features.tobytes()
    assert long.scale.tobytes() == exact.scale.tobytes()


def test_the_window_is_as_long_as_it_must_be(scaling: Scaling, daily: Scaling, window: Window) -> None:
    """The oldest bar of a full window still matters, so `window` does not promise too much."""
    for s, w in ((scaling, window), (daily, simulate("NEW", 700, seed=12, step=DAY).window)):
        values = w.values[-s.window :].copy()
        values[0, :4] *= 2
        moved = s.of_window(Window("NEW", w.close_times[-s.window :], values))
        still = s.of_window(_upto(w, len(w), s.window))
        assert moved.features.tobytes() != still.features.tobytes()


def test_prices_and_volumes_have_no_unit(scaling: Scaling, window: Window) -> None:
    """Quoting prices and volumes in another unit changes no feature and no scale."""
    other = Window("NEW", window.close_times, window.values * np.array([8, 8, 8, 8, 1024.0]))
    a, b = (scaling.of_window(w) for w in (window, other))
    np.testing.assert_allclose(a.features, b.features, atol=1e-9)
    np.testing.assert_allclose(a.scale, b.scale, rtol=1e-9)


def test_mirrored_prices_flip_exactly_the_signed_features(scaling: Scaling, window: Window) -> None:
    """Turning prices upside down changes the sign of the signed features and nothing else."""
    o, h, low, c, v = window.values.T
    mirror = Window("NEW", window.close_times, np.column_stack([1 / o, 1 / low, 1 / h, 1 / c, v]))
    plain = replace(scaling, mean=np.zeros(()), std=np.full((), 1e6))
    a, b = (plain.of_window(w).features[0] * 1e6 for w in (window, mirror))
    sign = np.where(signed_features("1h", HORIZONS), -1, 1)
    location = [i for i, name in enumerate(feature_names("1h", HORIZONS)) if name.startswith("location")]
    others = np.setdiff1d(np.arange(len(sign)), location)  # the place in the range is not linear in the log
    np.testing.assert_allclose(a[others], (sign * b)[others], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(a[location], (sign * b)[location], atol=0.02)


def test_scale_is_the_expected_absolute_return(scaling: Scaling, histories: list[Window]) -> None:
    """Outcomes are about as large as their scale, at every horizon and hour of the day."""
    w = histories[0]
    frame = scaling.frame(w.symbol, w.close_times, w.values, 600)
    price = np.log(w.values[:, 3])
    for j, h in enumerate(HORIZONS):
        z = np.abs(price[600 + h :] - price[600:-h]) / frame.scale[:-h, j]
        assert 0.85 < z.mean() < 1.15
        hour = (w.close_times[600:-h] // 3_600_000_000_000) % 24
        by_hour = np.bincount(hour, z) / np.bincount(hour)
        assert by_hour.max() < 1.6
        assert by_hour.min() > 0.5


def test_a_symbol_that_stands_still_has_a_finite_frame(scaling: Scaling, window: Window) -> None:
    """A window without any movement or volume still gives finite numbers."""
    values = np.ones((scaling.window, 5)) * np.array([5, 5, 5, 5, 0.0])
    frame = scaling.of_window(Window("FLAT", window.close_times[: scaling.window], values))
    assert np.isfinite(frame.features).all()
    assert np.isfinite(frame.scale).all()
    assert (frame.scale > 0).all()


def test_a_window_that_is_too_short_is_refused(scaling: Scaling, window: Window) -> None:
    """Fewer bars than `min_window` raise ValueError."""
    with pytest.raises(ValueError, match=f"needs {scaling.min_window}"):
        scaling.of_window(_upto(window, scaling.min_window - 1, 10_000))


@pytest.mark.parametrize(
    ("n", "w", "first"), [(1, 1, 0), (5, 1, 2), (5, 5, 0), (5, 6, 3), (50, 7, 0), (50, 7, 20), (9, 4, 8)]
)
def test_trailing_mean_is_the_mean_of_the_last_entries(n: int, w: int, first: int) -> None:
    """A trailing mean equals the mean of the last w entries, or of all while there are fewer."""
    x = np.random.default_rng(3).normal(size=n)
    expected = [x[max(0, k + 1 - w) : k + 1].mean() for k in range(first, n)]
    np.testing.assert_allclose(trailing_mean(x, w, first), expected, atol=1e-14)


@pytest.mark.parametrize(("timeframe", "layout"), [("15m", INTRADAY), ("4h", INTRADAY), ("1d", DAILY)])
def test_layouts_follow_the_timeframe(timeframe: str, layout: object) -> None:
    """Timeframes below a day are intraday, whole days and sessions are daily."""
    assert layout_of(timeframe) is layout
    assert layout_of("session") is DAILY


@pytest.mark.parametrize("timeframe", ["", "h", "0h", "1w", "1.5h", "sessions"])
def test_unknown_timeframes_are_refused(timeframe: str) -> None:
    """A timeframe that is not understood raises ConfigError with the value."""
    with pytest.raises(ConfigError, match="timeframe"):
        layout_of(timeframe)


def test_unusable_histories_are_refused(window: Window) -> None:
    """Short, flat and broken histories raise DataError that names the symbol."""
    need = bars_to_learn("1h", HORIZONS)
    short = _upto(window, need - 1, need)
    flat = Window("FLAT", window.close_times, np.ones((2600, 5)))
    broken = Window("BAD", window.close_times, window.values.copy())
    broken.values[1234, 3] = np.nan
    for history, words in ((short, "NEW has"), (flat, "FLAT closes unchanged"), (broken, "BAD .* row 1234")):
        with pytest.raises(DataError, match=words):
            fit([history], "1h", HORIZONS)


def _stressed(window: Window, zone: str, hour: int, times: float) -> Window:
    """The same bars, in which the returns of one hour of the day by the clock of `zone` are larger."""
    r = np.diff(np.log(window.values[:, 3]), prepend=np.log(100.0))
    loud = np.where(slots(window.close_times, zone) % 24 == hour, times, 1.0)
    close = 100 * np.exp(np.cumsum(r * loud))
    shape = window.values[:, :4] / window.values[:, 3:4]
    values = np.column_stack([shape * close[:, None], window.values[:, 4]])
    return Window(window.symbol, window.close_times, values)


def _trading(window: Window) -> Window:
    """The bars that close between 10:00 and 16:00 in New York from Monday to Friday, with a loud open."""
    slot = slots(window.close_times, "America/New_York")
    keep = (slot % 24 >= 9) & (slot % 24 < 16) & (slot < 120)
    return _stressed(
        Window(window.symbol, window.close_times[keep], window.values[keep]), "America/New_York", 9, 4.0
    )


def test_the_week_is_that_of_the_clock_that_the_bars_keep() -> None:
    """US hours go by New York, around both changes of its clock; a market around the clock goes by UTC."""
    year = [simulate(s, 365 * 24, seed=3).window for s in "AB"]
    around = fit([_stressed(w, "UTC", 13, 4.0) for w in year], "1h", HORIZONS)
    us = fit([_trading(w) for w in year], "1h", HORIZONS)
    assert (around.zone, us.zone) == ("UTC", "America/New_York")
    assert fit(year, "1h", HORIZONS).zone == "UTC"
    day = us.factor[0].reshape(7, 24)[:5]
    assert (day.argmax(1) == 9).all()
    assert day[:, 9].min() > 1.8 * day[:, 10:16].max()
    assert around.factor[0].reshape(7, 24).argmax(1).tolist() == [13] * 7
    assert fit([simulate("A", 900, seed=5, step=DAY).window], "1d", DAYS).zone == "UTC"


def test_a_symbol_has_its_own_season_and_others_that_of_all() -> None:
    """Each symbol of the training has its own row; one that was not there has the first."""
    early, late = (
        _stressed(simulate(s, 4000, seed=9).window, "UTC", hour, 5.0) for s, hour in (("A", 6), ("B", 18))
    )
    s = fit([early, late], "1h", HORIZONS)
    assert s.symbols == ("A", "B")
    assert s.factor.shape == s.volume.shape == (3, 168)
    assert s.gain.shape == (3, len(HORIZONS), 168)
    a, b, new = (s.season(symbol) for symbol in ("A", "B", "NEW"))
    for season, row in ((new, 0), (a, 1), (b, 2)):
        assert np.array_equal(season.factor, s.factor[row])
        assert np.array_equal(season.volume, s.volume[row])
        assert np.array_equal(season.gain, s.gain[row])
    by_hour = [season.factor.reshape(7, 24).mean(0) for season in (a, b, new)]
    assert (by_hour[0].argmax(), by_hour[1].argmax()) == (6, 18)
    assert by_hour[0][6] > 1.3 * by_hour[2][6] > 1.3 * by_hour[1][6]
    assert by_hour[1][18] > 1.3 * by_hour[2][18] > 1.3 * by_hour[0][18]
    own, pooled = (s.of_window(Window(symbol, early.close_times, early.values)) for symbol in ("A", "C"))
    assert own.scale.tobytes() != pooled.scale.tobytes()
    assert own.features.tobytes() != pooled.features.tobytes()


def test_daily_bars_move_more_after_a_fall_where_they_did_so_before() -> None:
    """The regression finds that falls stir, as in equities, and nothing where up and down are alike."""

    def stirred(seed: int, by: float) -> Window:
        calm = simulate("A", 3000, seed=seed, step=DAY).window
        body = calm.values[:, 3] / calm.values[:, 0] - 1
        fell = np.concatenate([[False], body[:-1] < 0])
        wide = np.where(fell, by, 1.0)[:, None]
        values = calm.values.copy()
        values[:, :4] = values[:, :1] * (values[:, :4] / values[:, :1]) ** wide
        return Window("A", calm.close_times, values)

    first_fall = -len(DAILY.falls)
    stirs, same = (fit([stirred(7, by)], "1d", DAYS).har[0, first_fall] for by in (2.0, 1.0))
    assert stirs < -0.2
    assert abs(same) < 0.1


def test_daily_bars_that_never_fall_are_refused() -> None:
    """A price that only accrues leaves the regression without an answer: that is said, with the symbol."""
    window = simulate("CASH", 900, seed=5, step=DAY).window
    rise = 1e-4 * (1 + np.arange(900) % 7)
    close = 100 * np.exp(np.cumsum(rise))
    values = np.column_stack([close, close * np.exp(rise), close, close, np.ones(900)])
    with pytest.raises(DataError, match="CASH are too uniform"):
        fit([Window("CASH", window.close_times, values)], "1d", DAYS)


def test_daily_bars_have_one_season_for_all(daily: Scaling) -> None:
    """A symbol of the training and a new one have the same weekdays."""
    assert daily.symbols == ()
    assert daily.factor.shape == (1, 7)
    a, new = (daily.season(symbol).factor for symbol in ("A", "NEW"))
    assert np.array_equal(a, new)


def test_overlapping_outcomes_are_less_evidence() -> None:
    """A slot's gain is drawn to that of all the more, the more bars ahead: outcomes overlap as often."""
    w = _stressed(simulate("A", 1500, seed=2).window, "UTC", 12, 3.0)
    s = fit([w], "1h", (1, 48))
    spread = (s.gain[0] / s.gain[0].mean(1, keepdims=True)).std(1)
    assert spread[1] < 0.5 * spread[0]


def test_no_feature_of_a_calm_window_is_lost_in_another(scaling: Scaling, window: Window) -> None:
    """Each rolling feature says something: over a history it takes many values, all of them finite."""
    whole = scaling.frame(window.symbol, window.close_times, window.values, scaling.window - 1)
    assert np.isfinite(whole.features).all()
    names = feature_names("1h", HORIZONS)
    for name, column in zip(names, whole.features.T, strict=True):
        fixed = name.startswith(("hour", "week", "season", "gain", "still", "gap"))
        assert fixed or len(np.unique(column)) > 100, name
    assert {"regime", "range 96", "tails 100", "tails 500", "skew 500", "autocovariance 128"} <= set(names)
    assert len(set(names)) == len(names)
