"""`SSSDModel` and `ImprovedSSSDModel`: what goes in, what comes out, and what must not be possible."""

import re
import subprocess
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from barcast.models import ConfigError, DataError, optimiser, samplers
from barcast.models import sssd as package
from barcast.models.sssd import (
    Bars,
    ImprovedSSSDModel,
    SSSDConfig,
    SSSDModel,
    benchmark_improvement,
    closed_windows,
    fit,
)
from barcast.models.sssd.head import UNet1D
from barcast.models.sssd.layers import CHOICES
from barcast.models.sssd.model import STEPS, draw
from tests.models import seeds

KEYS = {"mean", "std", "q05", "q50", "q95", "samples"}


class Calls:
    """The calls of a module, by the shape of their first tensor."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        module.register_forward_pre_hook(self._seen)

    def _seen(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        first = arguments[0]
        self.shapes.append(tuple(first.shape) if isinstance(first, Tensor) else ())

    def __len__(self) -> int:
        return len(self.shapes)


def test_the_published_settings_are_the_defaults() -> None:
    """The paths that the documents use are there, with their numbers; tables make the same settings again."""
    config = SSSDConfig()
    assert config.model.encoder.feature_dim == 200
    assert config.model.encoder.timeframes == ("5m", "15m", "1h", "4h")
    assert config.model.encoder.context_dim == 512
    assert (config.model.s4.state_dim, config.model.s4.n_layers) == (128, 4)
    assert config.model.diffusion.steps_train == samplers.TIMESTEPS == 1000
    assert config.model.head.latent_dim == 256
    assert config.model.horizons.minutes == (5, 15, 60, 240)
    assert config.model.horizons.weights == (0.4, 0.3, 0.2, 0.1)
    assert config.model.horizons.embedding_dim == 128
    assert dict(config.data.lookback_bars) == {"5m": 500, "15m": 166, "1h": 41, "4h": 10}
    assert SSSDConfig.from_dict(config.to_dict()) == config
    assert seeds.config() == SSSDConfig.from_dict(seeds.config().to_dict())
    for head in CHOICES["head"]:
        assert seeds.config(head={"type": head}).model.head.type == head
    for precision in optimiser.PRECISIONS:
        assert SSSDConfig.from_dict({"training": {"precision": precision}}).training.precision == precision


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"modle": {}}, "modle is unknown and nothing would read it: 'model' may be meant"),
        ({"model": {"encoder": {"feature_dims": 3}}}, "model.encoder.feature_dims is unknown"),
        ({"model": {"encoder": {"feature_dim": 0}}}, "model.encoder.feature_dim = 0"),
        ({"model": {"encoder": {"feature_dim": "200"}}}, "model.encoder.feature_dim = '200'"),
        ({"model": {"encoder": {"timeframes": []}}}, "model.encoder.timeframes = ()"),
        ({"model": {"encoder": {"timeframes": ["5m", "5m"]}}}, "model.encoder.timeframes has '5m'"),
        ({"model": {"s4": {"state_dim": 6}}}, "model.s4.state_dim = 6"),
        ({"model": {"head": {"type": "transformer"}}}, "model.head.type = 'transformer' is unknown"),
        ({"model": {"diffusion": {"schedule": "scaled_linear"}}}, "schedule = 'scaled_linear' is not what"),
        ({"model": {"diffusion": {"prediction_type": "epsilon"}}}, "prediction_type = 'epsilon' is not what"),
        ({"model": {"diffusion": {"steps_train": 500}}}, "steps_train = 500 is not what"),
        ({"model": {"horizons": {"minutes": [5, 5]}}}, "model.horizons.minutes = (5, 5) do not rise"),
        ({"model": {"horizons": {"weights": [1.0]}}}, "weights has 1 numbers for 4 horizons"),
        ({"model": {"horizons": {"weights": [1, 1, 1, 0]}}}, "model.horizons.weights = 0"),
        ({"model": 3}, "model = 3 is no table"),
        ({"training": {"precision": "fp16"}}, "training.precision = 'fp16' is unknown"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate = nan"),
        ({"data": {"lookback_bars": {"5m": 3}}}, "data.lookback_bars is of 5m"),
        ({"data": {"lookback_bars": {"5m": 0}}}, "data.lookback_bars.5m = 0"),
        ({"system": {"seed": -1}}, "system.seed = -1"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(tables: dict[str, Any], words: str) -> None:
    """A fault names path, value and remedy, in one line."""
    with pytest.raises(ConfigError) as fault:
        SSSDConfig.from_dict(tables)
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


def test_the_package_brings_nothing_that_is_not_asked_for() -> None:
    """The served network comes without diffusers, and so does the model; only the pipeline imports it."""
    program = (
        "import sys\nimport barcast.models.diffusion\nassert 'barcast.models.sssd' in sys.modules\n"
        "from barcast.models.sssd import SSSDModel\nassert 'diffusers' not in sys.modules\n"
        "assert not {'xformers', 'flash_attn', 'sageattention'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="SSSDPipelines"):
        _ = package.SSSDPipelines
    assert {name for name in package.__all__ if getattr(package, name) is not None} == set(package.__all__)


@pytest.mark.parametrize("samples", [1, 2, 10])
@pytest.mark.parametrize("scheduler", STEPS)
def test_every_scheduler_forecasts(scheduler: str, samples: int) -> None:
    """Whatever the number of samples, statistics of each horizon are finite and ordered, and come again."""
    model = seeds.model(ImprovedSSSDModel, scheduler_type=scheduler)
    x = seeds.features(4)
    found = model.inference_forward(x, [0, 1, 2], num_samples=samples)
    assert list(found) == [0, 1, 2]
    for one in found.values():
        assert set(one) == KEYS
        assert one["samples"].shape == (samples, 4)
        assert {tuple(one[k].shape) for k in ("mean", "std", "q05", "q50", "q95")} == {(4,)}
        assert all(torch.isfinite(value).all() for value in one.values())
        assert (one["q05"] <= one["q50"]).all()
        assert (one["q50"] <= one["q95"]).all()
        torch.testing.assert_close(one["mean"], one["samples"].mean(0))
        torch.testing.assert_close(one["std"], one["samples"].std(0, correction=0))
    again = model.inference_forward(x, [0, 1, 2], num_samples=samples)
    assert all(torch.equal(again[h][k], found[h][k]) for h in found for k in KEYS)


def test_a_scheduler_has_its_own_steps() -> None:
    """20, 20, 25 and 30 steps by default, asking as often as the sampler needs; others are refused."""
    assert STEPS == {"dpmpp": 20, "ddim": 20, "euler": 25, "kdpm2": 30}
    for name, steps in STEPS.items():
        model = seeds.model(ImprovedSSSDModel, scheduler_type=name)
        assert model.default_inference_steps == steps
        calls = Calls(model.head)
        model.inference_forward(seeds.features(2), [0], num_samples=5)
        assert len(calls) == samplers.build(name, steps).evaluations == {"kdpm2": 59}.get(name, steps)
    with pytest.raises(ConfigError, match="scheduler_type = 'dpm' is unknown: choose one of dpmpp, ddim"):
        ImprovedSSSDModel(seeds.config(), "dpm")


def test_all_samples_of_all_horizons_are_one_call() -> None:
    """Each evaluation is one call with all rows, samples and horizons, and the sequences are read once."""
    model = seeds.model()
    head, encoder = Calls(model.head), Calls(model.encoder)
    model.inference_forward(seeds.features(4), [0, 1, 2], num_samples=100, num_steps=20)
    assert head.shapes == [(4, 100, 3)] * 20
    assert len(encoder) == 1


def test_horizons_are_permuted_with_what_is_asked_for() -> None:
    """Any subset in any order gives the same forecasts, to the bit."""
    model, x = seeds.model(), seeds.features(3)
    whole = model.inference_forward(x, [0, 1, 2])
    for order in ([2, 0, 1], [1], [2, 1]):
        part = model.inference_forward(x, order)
        assert list(part) == order
        assert all(torch.equal(part[h][k], whole[h][k]) for h in order for k in KEYS)
    assert not torch.equal(whole[0]["samples"], whole[1]["samples"])


def test_horizons_are_indices_and_have_minutes() -> None:
    """Indices are those of the configured minutes, which stand for themselves; anything else is refused."""
    horizons, model = seeds.config().model.horizons, seeds.model()
    assert horizons.indices([60, 5]) == [2, 0]
    assert SSSDConfig().model.horizons.indices([15, 60, 240]) == [1, 2, 3]  # not 0, 1, 2
    with pytest.raises(ConfigError, match="a horizon of 30 minutes is unknown: choose from 5, 15, 60"):
        horizons.indices([30])
    for wrong in (3, -1, 15, "5m"):
        with pytest.raises(ConfigError, match="is no index: choose from 0 to 2, which stand for 5, 15, 60"):
            model.inference_forward(seeds.features(1), [wrong])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="num_samples = 0"):
        model.inference_forward(seeds.features(1), [0], num_samples=0)
    with pytest.raises(ConfigError, match="steps = 1 "):
        model.inference_forward(seeds.features(1), [0], num_steps=1)


@pytest.mark.parametrize("sampler", [*STEPS, "ddpm"])
def test_a_row_alone_is_the_row_among_others(sampler: str) -> None:
    """Rows start from the same noise: whoever shares the batch, samples differ by rounding only."""
    model, x = seeds.model(), seeds.features(9)
    together = model.inference_forward(x, [0, 1, 2], 20, sampler)
    for at in (slice(4, 5), slice(2, 7)):
        alone = model.inference_forward({k: v[at] for k, v in x.items()}, [0, 1, 2], 20, sampler)
        for h in alone:
            gap = (alone[h]["samples"] - together[h]["samples"][:, at]).abs().max() / model.spread[h]
            assert gap < 1e-5
    assert together[0]["std"].unique().numel() > 1


def test_noise_belongs_to_seed_or_generator() -> None:
    """Forecasts follow the configured seed or the generator that is given, and no global state."""
    model, x = seeds.model(), seeds.features(2)

    def samples(**how: Any) -> Tensor:
        return model.inference_forward(x, [0], 16, **how)[0]["samples"]

    torch.manual_seed(1)
    first = samples()
    torch.manual_seed(2)
    assert torch.equal(samples(), first)
    assert torch.equal(samples(generator=seeds.generator(5)), samples(generator=seeds.generator(5)))
    assert not torch.equal(samples(generator=seeds.generator(5)), samples(generator=seeds.generator(6)))
    assert torch.equal(samples(sampler="ddpm"), samples(sampler="ddpm"))
    other = SSSDModel(replace(seeds.config(), system=replace(seeds.config().system, seed=7)))
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other.eval().inference_forward(x, [0], 16)[0]["samples"], first)


def test_weights_are_a_function_of_the_seed() -> None:
    """Two models of one configuration are the same, whatever else drew numbers."""
    pairs = zip(SSSDModel(seeds.config()).parameters(), SSSDModel(seeds.config()).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_default_size() -> None:
    """With the published settings the network has some 1.6 million weights, in less than 35 MB."""
    model = SSSDModel(SSSDConfig()).eval()
    count = sum(p.numel() for p in model.parameters())
    assert 1_000_000 < count < 2_500_000
    assert 4 * count < 35_000_000
    assert 4 * sum(p.numel() for p in model.head.parameters()) < 4_000_000
    x = {name: torch.zeros(1, length, 200) for name, length in model.config.data.lookback_bars.items()}
    found = model.inference_forward(x, [0, 1, 2, 3], num_samples=4)
    assert all(torch.isfinite(one["samples"]).all() for one in found.values())


def test_a_unet_may_be_the_denoiser() -> None:
    """With `model.head.type` another head learns and forecasts, on a checkpoint of its own shape."""
    model = SSSDModel(seeds.config(head={"type": "unet1d", "latent_dim": 8})).eval()
    assert type(model.head) is UNet1D
    x = seeds.features(4)
    found = model.inference_forward(x, [2, 0], num_samples=6, num_steps=5)
    assert all(torch.isfinite(one["samples"]).all() for one in found.values())
    model.standardise(seeds.targets(x))
    model.training_step((x, seeds.targets(x)))["loss"].backward()
    assert model.head.leave.weight.grad is not None


GOLDEN = {
    0: (0.0721, 1.0554, -1.6890, 0.1239, 1.6394),
    1: (0.1669, 1.9522, -2.8789, 0.1565, 3.1386),
    2: (0.2016, 3.9697, -5.6289, 0.3152, 6.9956),
}
"""Thousandths: mean, std, q05, q50 and q95 of each horizon of the first row."""


def test_a_seeded_model_says_what_it_always_said() -> None:
    """Weights, noise and steps of one seed have pinned statistics: 20 steps of DPM-Solver++, 64 samples."""
    model = seeds.model(ImprovedSSSDModel, scheduler_type="dpmpp")
    found = model.inference_forward(seeds.features(2), [0, 1, 2], num_samples=64)
    for h, expected in GOLDEN.items():
        said = [1e3 * float(found[h][k][0]) for k in ("mean", "std", "q05", "q50", "q95")]  # type: ignore[literal-required]
        assert said == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"5m": torch.zeros(2, 24, 5)},
            "features of 5m have the shape (2, 24, 5): give (2, L, 6), the",
        ),
        ({"1h": torch.zeros(2, 8, 200)}, "features of 1h have the shape (2, 8, 200): give (2, L, 6)"),
        ({"1h": torch.zeros(3, 8, 6)}, "features of 1h have the shape (3, 8, 6): give (2, L, 6)"),
        ({"1h": torch.zeros(2, 0, 6)}, "features of 1h have the shape (2, 0, 6)"),
        ({"1h": torch.full((2, 8, 6), torch.nan)}, "features of 1h are not all finite"),
        ({"4h": torch.zeros(2, 8, 6)}, "features are of 5m, 1h, 4h, and the model sees 5m, 1h"),
        ({"1h": None}, "features are of 5m, and the model sees 5m, 1h: give a sequence of each"),
    ],
)
def test_wrong_features_are_named(change: dict[str, Tensor | None], words: str) -> None:
    """Another width, number of rows or set of timeframes is refused with what is expected."""
    given = seeds.features(2) | change
    with pytest.raises(DataError) as fault:
        seeds.model().inference_forward({k: v for k, v in given.items() if v is not None}, [0])
    assert words in str(fault.value)


def test_arrays_are_no_tensors() -> None:
    """Features or targets that numpy holds are named, with the remedy."""
    model, x = seeds.model(), seeds.features(12)
    y = seeds.targets(x)
    wrong: dict[str, Any] = x | {"1h": x["1h"].numpy()}
    words = r"features of 1h are numpy\.ndarray: give torch tensors"
    with pytest.raises(DataError, match=words):
        model.inference_forward(wrong, [0])
    with pytest.raises(DataError, match=words):
        fit(model, wrong, y)
    with pytest.raises(DataError, match=r"targets are numpy\.ndarray: give a torch tensor"):
        fit(model, x, y.numpy())  # type: ignore[arg-type]


def test_every_timeframe_matters() -> None:
    """Each timeframe changes the forecast, its parameters get a gradient, and the shares sum to one."""
    model, x = seeds.model(), seeds.features(3)
    model.train()
    before = model.inference_forward(x, [0])[0]["samples"]
    for name in x:
        other = model.inference_forward(x | {name: x[name].flip(0)}, [0])[0]["samples"]
        assert not torch.equal(other, before)
    shares = model.importance(x)
    assert list(shares) == ["5m", "1h"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    assert min(shares.values()) > 0
    model.training_step((x, seeds.targets(x)))["loss"].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_two_steps_in_a_row_and_other_weights() -> None:
    """Training goes on after a forecast and another step, and a forecast after it is of the new weights."""
    model, x = seeds.model(), seeds.features(8)
    before = model.inference_forward(x, [0])[0]["samples"]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model.training_step((x, seeds.targets(x)))["loss"].backward()
        optimiser.step()
    after = model.eval().inference_forward(x, [0])[0]["samples"]
    assert not torch.equal(after, before)
    model.load_state_dict(seeds.model().state_dict())
    assert torch.equal(model.inference_forward(x, [0])[0]["samples"], before)


def test_v_is_the_rotation_of_noise_and_outcome() -> None:
    """With v = alpha eps - sigma x0, both come back from x_t and v; a denoiser that knows v has no loss."""
    model, x = seeds.model(), seeds.features(6)
    y = seeds.targets(x)
    t, eps = torch.tensor([0, 10, 300, 500, 900, 999]), torch.randn(6, 3, generator=seeds.generator())
    x0 = (y - model.centre) / model.spread
    alpha, sigma = model.alpha[t, None], model.sigma[t, None]
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(6, 1), rtol=0, atol=1e-6)
    x_t, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    torch.testing.assert_close(alpha * x_t - sigma * v, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.lam[t, None], torch.log(alpha / sigma), rtol=0, atol=2e-3)

    class Knows(nn.Module):
        def modulation(self, c: Tensor, lam: Tensor) -> Tensor:
            return c

        def forward(self, noisy: Tensor, film: Tensor) -> Tensor:
            torch.testing.assert_close(noisy, x_t)
            return v

    model.head = Knows()
    nn.init.zeros_(model.location.weight)
    assert model.loss(x, y, t, eps) == 0


def test_the_loss_weighs_rows_by_min_snr_and_horizons_as_configured() -> None:
    """A denoiser that says zero has the loss sum_h w_h v_h^2 min(SNR, 5) / (SNR + 1), by hand."""
    model, x = seeds.model(), seeds.features(4)
    for layer in (model.head.leave, model.location):
        nn.init.zeros_(layer.weight)
    y, t = seeds.targets(x), torch.tensor([3, 200, 600, 990])
    eps = torch.randn(4, 3, generator=seeds.generator())
    x0 = ((y - model.centre) / model.spread).double()
    a = samplers.alphas_cumprod().double()[t, None]
    v2 = (a.sqrt() * eps - (1 - a).sqrt() * x0) ** 2
    snr = a / (1 - a)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    expected = ((weights * v2).sum(1, keepdim=True) * snr.clamp(max=5) / (snr + 1)).mean()
    assert float(model.loss(x, y, t, eps).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_every_noise_level_is_trained_as_often() -> None:
    """Timesteps are uniform over all thousand, a row in each share of a batch; noise is standard normal."""
    t, eps = draw(20_000, 3, seeds.generator())
    counts = torch.bincount(t, minlength=1000)
    assert len(counts) == 1000
    assert int(counts.min()) >= 18
    assert int(counts.max()) <= 22
    few, _ = draw(10, 3, seeds.generator())
    assert torch.equal(few.sort().values // 100, torch.arange(10))
    assert eps.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("t", [0, 50, 500, 950, 999])
def test_what_is_noised_is_the_outcome(t: int) -> None:
    """x_t has mean alpha x0 and deviation sigma of the schedule, at early and at late times."""
    model, n = seeds.model(), 20_000
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x = {name: value.expand(n, -1, -1) for name, value in seeds.features(1).items()}
    y = torch.tensor([[1e-3, -2e-3, 3e-3]])
    with torch.no_grad():
        model.loss(x, y.expand(n, -1), torch.full((n,), t), torch.randn(n, 3, generator=seeds.generator()))
    a = float(samplers.alphas_cumprod()[t])
    x0 = (y[0] - model.centre) / model.spread
    torch.testing.assert_close(seen[0].mean(0), sqrt(a) * x0, rtol=0, atol=0.03 * sqrt(1 - a) + 1e-6)
    torch.testing.assert_close(seen[0].std(0), torch.full((3,), sqrt(1 - a)), rtol=0.015, atol=0)


def test_schedulers_are_compared_from_the_same_noise() -> None:
    """Times, forecasts, steps, evaluations and the distance from a fine solution, for each of the four."""
    model, x = seeds.model(), seeds.features(3)
    found = model.compare_schedulers(x, [0, 2], num_samples=20, num_steps=10)
    assert list(found) == list(STEPS)
    for name, one in found.items():
        assert set(one) == {"time_ms", "predictions", "steps", "evaluations", "error"}
        assert one["time_ms"] > 0
        assert (one["steps"], one["evaluations"]) == (10, 19 if name == "kdpm2" else 10)
        direct = model.inference_forward(x, [0, 2], 20, name, 10)
        assert torch.equal(one["predictions"][2]["samples"], direct[2]["samples"])
    finer = model.compare_schedulers(x, [0, 2], num_samples=20, num_steps=40)
    assert all(finer[name]["error"] < found[name]["error"] for name in STEPS)
    assert finer["dpmpp"]["error"] < 0.6 * finer["ddim"]["error"]


def test_the_improvement_is_measured_against_one_call_for_each_sample() -> None:
    """The original asks 50 times for each sample of each horizon; folded, its samples are the same."""
    original, improved = seeds.model(), seeds.model(ImprovedSSSDModel, scheduler_type="dpmpp")
    calls, fewer = Calls(original.head), Calls(improved.head)
    x = seeds.features(2)
    found = benchmark_improvement(improved, original, x, horizons=[0, 2], num_samples=3)
    runs = 6  # one to warm up, five that are timed
    assert len(calls) == runs * 2 * 3 * 50 + runs * 50  # in turn, and folded
    assert len(fewer) == runs * 20
    assert found["speedup"] == found["time_original_ms"] / found["time_improved_ms"]
    assert min(found["time_original_ms"], found["time_folded_ms"], found["time_improved_ms"]) > 0
    folded = original.inference_forward(x, [0, 2], 3, "ddim", 50)
    for h in (0, 2):
        gap = (found["predictions_original"][h]["samples"] - folded[h]["samples"]).abs().max()
        assert gap < 1e-5 * original.spread[h]
        assert set(found["predictions_improved"][h]) == KEYS


MINUTE = 60 * 10**9


def _bars(minutes: int, count: int, seed: int) -> Bars:
    closes = np.arange(1, count + 1, dtype=np.int64) * minutes * MINUTE
    return Bars(closes, np.random.default_rng(seed).normal(size=(count, 6)))


def test_windows_hold_closed_bars_matched_by_time() -> None:
    """At 10:03 the last 5-minute bar is that of 10:00 and the last hour that of 10:00: rows do not matter."""
    five, hour = _bars(5, 400, 0), _bars(60, 34, 1)
    ten = 10 * 60 * MINUTE
    found = closed_windows({"5m": five, "1h": hour}, [ten + 3 * MINUTE, ten - 1], {"5m": 24, "1h": 8})
    assert {name: tuple(x.shape) for name, x in found.items()} == {"5m": (2, 24, 6), "1h": (2, 8, 6)}
    np.testing.assert_array_equal(found["5m"][0], five.values[96:120].astype(np.float32))
    np.testing.assert_array_equal(found["1h"][0], hour.values[2:10].astype(np.float32))
    np.testing.assert_array_equal(found["1h"][1], hour.values[1:9].astype(np.float32))
    np.testing.assert_array_equal(found["5m"][1], five.values[95:119].astype(np.float32))


def test_nothing_after_a_time_changes_what_is_forecast_there() -> None:
    """Bars that close later, those still forming among them, may be anything: not a bit moves."""
    model = seeds.model()
    bars = {"5m": _bars(5, 400, 0), "1h": _bars(60, 34, 1)}
    at = np.array([10 * 60 * MINUTE, 11 * 60 * MINUTE + 35 * MINUTE])

    def forecast(bars: dict[str, Bars], at: np.ndarray) -> Tensor:
        x = closed_windows(bars, at, model.config.data.lookback_bars)
        return model.inference_forward(x, [0, 1, 2])[2]["samples"]

    clean = forecast(bars, at)
    for k, moment in enumerate(at):
        poisoned = {}
        for name, (closes, values) in bars.items():
            wrong = values.copy()
            wrong[closes > moment] = 1e6
            keep = closes <= moment + 120 * MINUTE  # and the history ends somewhere
            poisoned[name] = Bars(closes[keep], wrong[keep])
        assert torch.equal(forecast(poisoned, at[: k + 1])[:, k], forecast(bars, at[: k + 1])[:, k])
    early = {name: Bars(closes - 1, values) for name, (closes, values) in bars.items()}
    assert not torch.equal(forecast(early, at - 1 - MINUTE), clean)  # the control: other bars do matter


def test_histories_that_cannot_be_cut_are_named() -> None:
    """Too few closed bars, a missing timeframe and closes out of order are refused."""
    bars, lookback = {"5m": _bars(5, 40, 0), "1h": _bars(60, 34, 1)}, {"5m": 24, "1h": 8}
    with pytest.raises(DataError, match="5m had 12 closed bars at 3600000000000, and 24 are needed"):
        closed_windows(bars, [60 * MINUTE], lookback)
    with pytest.raises(DataError, match="there are no bars of 1h: give those of 5m, 1h"):
        closed_windows({"5m": bars["5m"]}, [180 * MINUTE], lookback)
    closes, values = bars["5m"]
    with pytest.raises(DataError, match="the closes of 5m do not rise"):
        closed_windows(bars | {"5m": Bars(closes[::-1], values)}, [60 * MINUTE], lookback)


def test_the_page_of_claims_says_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code runs as it is printed, tells where the training stands, and what it learns is true."""
    page = (Path(__file__).parents[2] / "deploy" / "seeds.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec("\n".join(blocks), said)
    lines = capsys.readouterr().out.splitlines()
    looks = [float(line.split()[-1]) for line in lines if line.startswith("step ")]
    assert len(looks) > 5
    assert min(looks) < 0.9 * looks[0]
    assert {name: x.shape[1] for name, x in said["features"].items()} == said["config"].data.lookback_bars
    assert list(said["forecast"]) == [1, 2]
    assert torch.equal(said["again"][1]["samples"], said["forecast"][1]["samples"])
    assert list(said["compared"]) == list(STEPS)
    assert said["improved"]["speedup"] > 0
    assert list(said["piped"]) == [15, 60]
    assert torch.equal(said["piped"][15]["samples"], said["forecast"][1]["samples"])


def test_the_page_of_claims_names_tests_that_exist() -> None:
    """Each test that `deploy/seeds.md` names is there, and so is each file."""
    root = Path(__file__).parents[2]
    page = (root / "deploy" / "seeds.md").read_text()
    sources = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in sources] == []
    assert [name for name in re.findall(r"`(tests/[\w/]+\.py)`", page) if not (root / name).is_file()] == []
