"""The forecaster: its promises about look-ahead, batches, order and noise."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from barcast.models import SAMPLERS, ConfigError, Forecast, Window
from barcast.models.diffusion import SSSDForecaster, use_one_thread
from barcast.models.samplers import keyed_normals
from barcast.models.sssd.marginal import knot_scores, piecewise
from barcast.models.trained import Trained
from tests.checks import forecast_does_not_depend_on_its_batch
from tests.garch import simulate

Open = Callable[..., SSSDForecaster]
NAMES = ("SYM0", "SYM1", "NEW0", "NEW1")


@pytest.fixture(scope="module")
def opened(trained: Trained) -> Open:
    def open_(sampler: str = "dpmpp", steps: int = 8) -> SSSDForecaster:
        return SSSDForecaster(trained.net, trained.scaling, trained.levels, "test", sampler, steps)

    return open_


@pytest.fixture
def alone(opened: Open) -> SSSDForecaster:
    """The map alone, of which nothing is sampled."""
    return opened(steps=0)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """64 windows of two symbols of the training and two new ones, from warming to full."""
    series = [simulate(name, 2000, seed=20 + i).window for i, name in enumerate(NAMES)]
    ends = np.linspace(90, 2000, 16).astype(int)
    return [Window(w.symbol, w.close_times[:n], w.values[:n]) for w in series for n in ends]


def _bytes(f: Forecast) -> bytes:
    return f.quantiles.tobytes() + f.mean.tobytes() + f.std.tobytes() + f.rise.tobytes()


@pytest.mark.parametrize("sampler", ["dpmpp", "ddim", "ddpm"])
def test_a_forecast_does_not_depend_on_its_batch(opened: Open, windows: list[Window], sampler: str) -> None:
    """In batches of 1 to 64 windows, in random company, every window gets the same bits."""
    forecast_does_not_depend_on_its_batch(opened(sampler), windows)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_looks_at_the_batch(opened: Open, windows: list[Window], sampler: str) -> None:
    """The same for few windows by any sampler."""
    forecast_does_not_depend_on_its_batch(opened(sampler, 4), windows[::8], (1, 3, 8))


def test_a_forecast_of_the_map_does_not_depend_on_its_batch(
    alone: SSSDForecaster, windows: list[Window]
) -> None:
    """The same where nothing is sampled."""
    forecast_does_not_depend_on_its_batch(alone, windows)


def test_control_variable_batch_shapes_do_change_bits(trained: Trained, windows: list[Window]) -> None:
    """Called with the whole batch at once, the same network gives other bits: the test above could fail."""
    net, scaling = trained.net, trained.scaling
    frames = [scaling.of_window(w) for w in windows]
    features = torch.from_numpy(np.concatenate([f.features for f in frames])).float()
    sequences = torch.from_numpy(np.stack([f.channels[-scaling.layout.context :] for f in frames])).float()
    n = range(len(frames))
    with torch.inference_mode():
        c = net.encoder(features, sequences)
        each = torch.cat([net.encoder(features[i, None], sequences[i, None]) for i in n])
        knots = net.map.average(features)
        knots_of_each = torch.cat([net.map.average(features[i, None]) for i in n])
    assert 0 < (c - each).abs().max() < 1e-4
    assert 0 < (knots - knots_of_each).abs().max() < 1e-4


@pytest.mark.parametrize("n", [90, 800, 1950])
def test_later_bars_change_no_forecast(opened: Open, alone: SSSDForecaster, n: int) -> None:
    """Whatever stands after t in the arrays a window was cut from, the forecast at t keeps its bits."""
    w = simulate("NEW", 2000, seed=30).window
    poisoned = w.values.copy()
    poisoned[n:] = np.nan
    for forecaster in (*map(opened, SAMPLERS), alone):
        clean, dirty = (
            forecaster.forecast([Window("NEW", w.close_times[:n], values[:n])])[0]
            for values in (w.values, poisoned)
        )
        assert _bytes(clean) == _bytes(dirty)


def test_older_bars_than_the_window_change_no_forecast(opened: Open, alone: SSSDForecaster) -> None:
    """A window longer than the card asks for gives the bits of one cut to that length."""
    w = simulate("NEW", 2000, seed=31).window
    for forecaster in (opened(), alone):
        n = forecaster.card.window
        cut = Window("NEW", w.close_times[-n:], w.values[-n:])
        assert _bytes(forecaster.forecast([w])[0]) == _bytes(forecaster.forecast([cut])[0])


def test_the_number_of_threads_is_set_where_forecasts_run(opened: Open, windows: list[Window]) -> None:
    """Forecasts use one thread whatever was set before, in any thread of the operating system."""
    forecaster = opened()
    one = [_bytes(f) for f in forecaster.forecast(windows[:4])]
    torch.set_num_threads(2)
    assert [_bytes(f) for f in forecaster.forecast(windows[:4])] == one
    assert torch.get_num_threads() == 1

    def elsewhere() -> tuple[list[bytes], int]:
        torch.set_num_threads(2)
        return [_bytes(f) for f in forecaster.forecast(windows[:4])], torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result() == (one, 1)


def test_the_global_generator_is_neither_used_nor_moved(opened: Open, windows: list[Window]) -> None:
    """Forecasts ignore torch's global seed and leave its state as it was."""
    for forecaster in map(opened, SAMPLERS):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = _bytes(forecaster.forecast(windows[:1])[0])
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        assert _bytes(forecaster.forecast(windows[:1])[0]) == first


DRAWN = """
import sys
from barcast.models.samplers import keyed_normals
sys.stdout.buffer.write(keyed_normals(7, (256, 3), "test", "SYM0", 1_700_000_000_000_000_000).numpy())
"""


def test_another_process_draws_the_same() -> None:
    """What a stochastic sampler draws is a function of model, symbol and close time: in any process."""
    of = ("test", "SYM0", 1_700_000_000_000_000_000)
    here = keyed_normals(7, (256, 3), *of)
    there = subprocess.run([sys.executable, "-c", DRAWN], capture_output=True, check=True).stdout
    assert here.numpy().tobytes() == there
    others = [("tesu", *of[1:]), (of[0], "SYM1", of[2]), (*of[:2], of[2] + 1)]
    for other in others:
        assert abs(float((here * keyed_normals(7, (256, 3), *other)).mean())) < 0.05
    few = keyed_normals(1, (3, 1), *of)
    assert few.shape == (1, 3, 1)
    assert torch.equal(few, keyed_normals(1, (3, 1), *of))


def test_the_draws_of_a_stochastic_sampler_have_a_key(trained: Trained, windows: list[Window]) -> None:
    """Another model id, symbol or close time draws other noise; a deterministic sampler draws none."""
    window = windows[-1]
    renamed = Window("OTHER", window.close_times, window.values)
    later = Window(window.symbol, window.close_times + 7 * 86_400 * 10**9, window.values)
    for sampler in SAMPLERS:
        one, other = (
            SSSDForecaster(trained.net, trained.scaling, trained.levels, model, sampler, 4)
            for model in ("one", "other")
        )
        asked = ((one, window), (other, window), (one, renamed), (one, later))
        first, *others = (_bytes(forecaster.forecast([w])[0]) for forecaster, w in asked)
        assert [said == first for said in others] == [sampler != "ddpm"] * 3


@given(seed=st.integers(0, 1000), n=st.integers(81, 200), crash=st.floats(-3, 3), quiet=st.booleans())
@settings(max_examples=40, deadline=None)
def test_quantiles_rise_on_any_window(opened: Open, seed: int, n: int, crash: float, quiet: bool) -> None:
    """Quantiles are finite and rise along the levels, also after a crash and on bars without any range."""
    w = simulate("ANY", 200, seed).window
    values = w.values[:n].copy()
    values[n // 2 :, :4] *= np.exp(crash)
    if quiet:
        values[:, :4] = values[:, 3:4]
    for forecaster in (opened(), opened(steps=0)):
        f = forecaster.forecast([Window("ANY", w.close_times[:n], values)])[0]
        assert np.isfinite(f.quantiles).all()
        assert (np.diff(f.quantiles, axis=1) >= 0).all()
        assert np.isfinite([f.mean, f.std]).all()
        assert (f.std > 0).all()
        assert ((f.rise >= 0) & (f.rise <= 1)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_zero_denoiser_is_the_map_alone(trained: Trained, windows: list[Window], sampler: str) -> None:
    """Without a velocity the quantiles are those of the map at exact normal scores, by a sampler or none."""
    net, window = trained.net, windows[-1]
    weight = net.denoiser.leave.weight.detach().clone()
    with torch.no_grad():
        net.denoiser.leave.weight.zero_()
    try:
        sampled, alone = (
            SSSDForecaster(net, trained.scaling, trained.levels, "zero", sampler, n).forecast([window])[0]
            for n in (8, 0)
        )
        frame = trained.scaling.of_window(window)
        use_one_thread()
        with torch.inference_mode():
            knots = net.map.average(torch.from_numpy(frame.features).float())[0]
    finally:
        with torch.no_grad():
            net.denoiser.leave.weight.copy_(weight)
    u = torch.from_numpy(norm.ppf(trained.levels)).expand(3, -1)
    expected = piecewise(u, knot_scores().expand(knots.shape), knots).numpy() * frame.scale[0][:, None]
    np.testing.assert_allclose(sampled.quantiles, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(alone.quantiles, expected, rtol=1e-12, atol=1e-15)
    for name in ("mean", "std", "rise"):
        np.testing.assert_allclose(getattr(sampled, name), getattr(alone, name), rtol=1e-5, atol=1e-9)


def test_a_model_whose_denoiser_adds_nothing_is_served_as_the_map_alone(
    trained: Trained, opened: Open, windows: list[Window]
) -> None:
    """By default nothing is sampled, and the card says so; sampler or steps that are asked for are taken."""
    plain = replace(trained, record=replace(trained.record, denoiser_step=0))
    card = plain.forecaster("x").card
    assert (card.sampler, card.steps, card.samples) == ("none", 0, 0)
    said = plain.raw("x").forecast(windows[-1:])[0]
    assert _bytes(said) == _bytes(opened("dpmpp", 0).forecast(windows[-1:])[0])
    for options, wanted in (
        (("ddim", None), ("ddim", 8)),
        ((None, 12), ("dpmpp", 12)),
        (("dpmpp", 8), ("dpmpp", 8)),
    ):
        asked = plain.raw("x", *options)
        assert (asked.card.sampler, asked.card.steps, asked.card.samples) == (*wanted, 256)
        sampled = asked.forecast(windows[-1:])[0]
        assert _bytes(sampled) == _bytes(opened(*wanted).forecast(windows[-1:])[0])
        assert np.abs(sampled.quantiles / said.quantiles - 1).max() > 1e-3
    with pytest.raises(ConfigError, match="heun"):
        plain.forecaster("x", "heun")
    coupled = trained.forecaster("x", paths=True).card
    assert (coupled.sampler, coupled.steps, coupled.samples) == ("dpmpp", 8, 256)
    assert trained.forecaster("x").card.sampler == plain.forecaster("x", paths=True).card.sampler == "none"


def test_the_denoiser_matters(trained: Trained, opened: Open, windows: list[Window]) -> None:
    """Zeroing the denoiser of a trained model changes its forecasts."""
    net = trained.net
    before = opened().forecast(windows[-1:])[0]
    weight = net.denoiser.leave.weight.detach().clone()
    with torch.no_grad():
        net.denoiser.leave.weight.zero_()
    after = opened().forecast(windows[-1:])[0]
    with torch.no_grad():
        net.denoiser.leave.weight.copy_(weight)
    assert np.abs(before.quantiles / after.quantiles - 1).max() > 1e-3


def test_mean_std_and_rise_fit_the_quantiles(
    opened: Open, alone: SSSDForecaster, windows: list[Window]
) -> None:
    """Mean, spread and probability of a rise describe the same distribution as the quantiles."""
    for f in (*opened().forecast(windows[15::16]), *alone.forecast(windows[15::16])):
        width = f.quantiles[:, 5] - f.quantiles[:, 1]
        assert (np.abs(f.mean - f.quantiles[:, 3]) < 0.3 * width).all()
        assert ((f.std / width > 0.25) & (f.std / width < 0.7)).all()
        above = 1 - np.array([np.interp(0, q, f.levels) for q in f.quantiles])
        np.testing.assert_allclose(f.rise, above, atol=0.03)


def test_more_steps_and_the_other_samplers_agree(opened: Open, windows: list[Window]) -> None:
    """Samplers differ in their error only: the default is near all samplers with many steps."""
    reference = opened("dpmpp", 100).forecast(windows[-1:])[0]
    width = (reference.quantiles[:, -1] - reference.quantiles[:, 0])[:, None]
    many = [(sampler, 0.005 if sampler in ("ddim", "euler") else 0.002) for sampler in SAMPLERS]
    many = [
        (sampler, 200, 0.12 if sampler == "ddpm" else near) for sampler, near in many
    ]  # 3 errors of 256 draws
    for sampler, steps, tolerance in (("dpmpp", 8, 0.02), ("ddim", 8, 0.05), *many):
        f = opened(sampler, steps).forecast(windows[-1:])[0]
        assert (np.abs(f.quantiles - reference.quantiles) / width).max() < tolerance, sampler


def test_short_windows_are_warming_and_shorter_ones_refused(opened: Open) -> None:
    """A window below `card.window` forecasts as warming; one below `card.min_window` raises ValueError."""
    forecaster = opened()
    card = forecaster.card
    w = simulate("NEW", card.window, seed=40).window

    def cut(n: int) -> Window:
        return Window("NEW", w.close_times[:n], w.values[:n])

    states = [f.warming for f in forecaster.forecast([cut(card.min_window), cut(card.window - 1), w])]
    assert states == [True, True, False]
    with pytest.raises(ValueError, match="NEW has"):
        forecaster.forecast([cut(card.min_window - 1)])


def test_the_card_tells_what_the_bits_depend_on(opened: Open) -> None:
    """The card carries sampler, steps, samples and a fingerprint with versions, CPU, threads and tile."""
    card = opened("ddim", 20).card
    assert (card.kind, card.sampler, card.steps, card.samples) == ("sssd", "ddim", 20, 256)
    for part in (f"torch={torch.__version__}", f"numpy={np.__version__}", "threads=1", "tile=1x256"):
        assert part in card.fingerprint
