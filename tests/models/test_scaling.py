"""Bars to scale, features and sequence."""

from dataclasses import replace

import numpy as np
import pytest

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
from barcast.models.trained import Trained
from tests.garch import simulate
from tests.models.conftest import HORIZONS


@pytest.fixture(scope="module")
def window() -> Window:
    return simulate("NEW", 2600, seed=11, season=True).window


@pytest.fixture
def scaling(trained: Trained) -> Scaling:
    return trained.scaling


def _upto(window: Window, n: int, length: int) -> Window:
    cut = slice(max(0, n - length), n)
    return Window(window.symbol, window.close_times[cut], window.values[cut])


def _poisoned(window: Window, n: int) -> Window:
    values = window.values.copy()
    values[n:, :4] *= np.exp(np.random.default_rng(0).normal(0, 0.5, (len(values) - n, 1)))
    values[n:, 1] *= 3
    values[n:, 4] = 1e9
    return Window(window.symbol, window.close_times, values)


def test_whole_history_and_single_windows_agree(scaling: Scaling, window: Window) -> None:
    """The frame of a whole history equals the frames of the windows that end at each bar."""
    first = scaling.min_window - 1
    whole = scaling.frame(window.close_times, window.values, first)
    context = scaling.layout.context
    for n in (first + 1, 200, 481, 700, scaling.window - 1, scaling.window, scaling.window + 1, 2600):
        one = scaling.of_window(_upto(window, n, scaling.window))
        row = n - 1 - first
        np.testing.assert_allclose(one.features[0], whole.features[row], rtol=0, atol=1e-9)
        np.testing.assert_allclose(one.scale[0], whole.scale[row], rtol=1e-9)
        np.testing.assert_allclose(
            one.channels[-context:], whole.channels[n - 1 - context : n - 1], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("n", [90, 500, 1700, 2590])
def test_bars_after_the_origin_change_nothing(scaling: Scaling, window: Window, n: int) -> None:
    """Replacing every bar after t leaves scale, features and channels up to t the same to the bit."""
    first = scaling.min_window - 1
    clean = scaling.frame(window.close_times, window.values, first)
    bad = _poisoned(window, n)
    dirty = scaling.frame(bad.close_times, bad.values, first)
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


def test_the_window_is_as_long_as_it_must_be(scaling: Scaling, window: Window) -> None:
    """The oldest bar of a full window still matters, so `window` does not promise too much."""
    values = window.values[-scaling.window :].copy()
    values[0, :4] *= 2
    times = window.close_times[-scaling.window :]
    moved = scaling.of_window(Window("NEW", times, values))
    still = scaling.of_window(_upto(window, 2600, scaling.window))
    assert moved.scale.tobytes() != still.scale.tobytes()


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
    frame = scaling.frame(w.close_times, w.values, 600)
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
