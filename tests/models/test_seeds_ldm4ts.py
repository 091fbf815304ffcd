"""`LDM4TSModel`: what goes in, what comes out, what a step of training is, and what must not be possible."""

import copy
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from torch import Generator, Tensor, nn

from barcast.models import CheckpointError, ConfigError, DataError, samplers
from barcast.models import ldm4ts as package
from barcast.models.ldm4ts import LDM4TSModel, fit, validate, windows
from barcast.models.ldm4ts.attention import Backend, Processor
from barcast.models.ldm4ts.fitting import TIMESTEPS_SEEN
from barcast.models.ldm4ts.model import QUANTILES
from barcast.models.ldm4ts.network import PRESETS
from tests.garch import simulate
from tests.kernels import both, installed

CONTEXT, HORIZONS, STEPS = 48, [1, 4, 16], 4
SMALL: dict[str, Any] = {
    "horizons": HORIZONS,
    "context": CONTEXT,
    "preset": "tiny",
    "sampling_steps": STEPS,
    "enable_gradient_checkpointing": False,
}
MOMENTS = {"mean", "std", *QUANTILES}


def made(**options: Any) -> LDM4TSModel:
    return LDM4TSModel(**SMALL | options)


@pytest.fixture(scope="module")
def model() -> LDM4TSModel:
    """One that nothing has taught, for tests that do not change it."""
    return made().eval()


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    """Rows of bars and the closes that followed."""
    bars = torch.from_numpy(simulate("SYM", 700, seed=3, season=True).window.values)
    return windows(bars, CONTEXT, max(HORIZONS), 9)


class Calls:
    """What a U-Net was asked with: canvas and timesteps of each call."""

    def __init__(self, model: LDM4TSModel) -> None:
        self.canvas: list[Tensor] = []
        self.times: list[Tensor] = []
        self.hook = model.net.unet.register_forward_pre_hook(self._seen)

    def _seen(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.canvas.append(arguments[0].detach())
        self.times.append(arguments[1])


def away(found: dict[str, Tensor], name: str, price: Tensor) -> Tensor:
    """A forecast's prices as log returns."""
    return torch.log(found[name].double() / price[:, None])


def test_the_published_options_are_the_defaults() -> None:
    """Names and numbers of the documents; more than they have is by keyword."""
    given = {name: p.default for name, p in inspect.signature(LDM4TSModel).parameters.items()}
    assert given["image_size"] == (64, 64)
    assert given["horizons"] == (15, 60, 240)
    assert given["diffusion_steps"] == samplers.TIMESTEPS == 1000
    assert given["attention_backend"] == "default"
    assert given["enable_gradient_checkpointing"] is True
    assert given["context"] == 100
    model = LDM4TSModel(image_size=(64, 64), horizons=[15, 60, 240], diffusion_steps=1000, device="cpu")
    assert model.options.image_size == 64
    assert {15, 60, 240} <= set(model.steps)
    names = list(inspect.signature(LDM4TSModel.forward).parameters)
    assert names[1:6] == ["ohlcv", "current_price", "num_samples", "return_all", "training_mode"]


@pytest.mark.parametrize("samples", [1, 2, 10])
def test_any_number_of_samples_forecasts(
    model: LDM4TSModel, rows: tuple[Tensor, Tensor], samples: int
) -> None:
    """Moments and quantiles of the price are finite and ordered, of one sample too, and come again."""
    ohlcv = rows[0][:3]
    found = model(ohlcv, ohlcv[:, -1, 3], num_samples=samples)
    assert set(found) == MOMENTS
    assert {tuple(x.shape) for x in found.values()} == {(3, 3)}
    assert all(torch.isfinite(x).all() and not x.requires_grad for x in found.values())
    ordered = torch.stack([found[name] for name in QUANTILES])
    assert (ordered.diff(dim=0) >= 0).all()
    assert (found["std"] == 0).all() if samples == 1 else (found["std"] > 0).all()
    if samples == 1:
        assert torch.equal(found["q05"], found["q95"])
        torch.testing.assert_close(found["mean"], found["q50"])
    else:
        assert (found["q025"] < found["q05"]).all()
    again = model(ohlcv, ohlcv[:, -1, 3], num_samples=samples)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_quantiles_hold_what_they_are_called() -> None:
    """q05 to q95 is the central 90 %, q025 to q975 the central 95 %: of the map's law nearly exactly so."""
    assert QUANTILES == {"q025": 0.025, "q05": 0.05, "q50": 0.5, "q95": 0.95, "q975": 0.975}
    model = made().eval()
    with torch.no_grad():
        model.net.gate.bias.fill_(-30)  # the map alone
        model.net.map.head.zero_()
    bars = torch.from_numpy(simulate("SYM", 60, seed=5).window.values)[None]
    found, spread = model(bars, num_samples=200), model.seen(bars).spread(torch.tensor(HORIZONS))
    for name, level in QUANTILES.items():
        wanted = torch.special.ndtri(torch.tensor(level)) * spread
        torch.testing.assert_close(away(found, name, bars[:, -1, 3]), wanted, atol=1e-4, rtol=0.01)


def test_all_samples_are_one_batch(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """`sampling_steps` calls of the U-Net whatever the number of samples, and it is counted."""
    for samples in (1, 7):
        calls = Calls(model)
        model(rows[0][:3], num_samples=samples)
        calls.hook.remove()
        assert [x.shape[0] for x in calls.canvas] == [3 * samples] * STEPS
        assert model.unet_calls == STEPS


def test_all_that_there_is_on_request(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """Samples of which the moments are, the image of what was, latents and tokens, in the shapes said."""
    ohlcv = rows[0][:2]
    found = model(ohlcv, num_samples=6, return_all=True)
    assert set(found) == MOMENTS | {"samples", "image", "latent", "conditioning"}
    assert found["samples"].shape == (2, 6, 3)
    assert found["image"].shape == (2, 3, 64, 64)
    assert (found["image"][..., 48:] == 0).all()
    assert found["latent"].shape == (2, 6, 4, 8, 2)
    assert found["conditioning"].shape[1] >= 8  # one token would be attended to whatever it says
    torch.testing.assert_close(found["mean"], found["samples"].mean(1))
    torch.testing.assert_close(found["std"], found["samples"].std(1, correction=0), rtol=1e-2, atol=1e-5)


def test_a_row_alone_is_the_row_among_others(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """Whoever shares the batch, one or many, forecasts differ by rounding only."""
    ohlcv = rows[0][:5].clone()
    ohlcv[3, :, :4] *= 150  # another symbol
    together, price = model(ohlcv, num_samples=5), ohlcv[:, -1, 3]
    for at in (slice(0, 1), slice(3, 4), slice(2, 5)):
        alone = model(ohlcv[at], num_samples=5)
        for name in QUANTILES:
            gap = away(alone, name, price[at]) - away(together, name, price)[at]
            assert gap.abs().max() < 1e-5


def test_the_scale_of_prices_does_not_matter(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """Bars of thousandths and of thousands that moved alike have the same forecast in returns."""
    ohlcv = rows[0][:1]
    many = torch.cat([ohlcv * torch.tensor([scale] * 4 + [1.0]) for scale in (1.0, 1 / 4096, 4096.0)])
    found = model(many, num_samples=8)
    for name in QUANTILES:
        returns = away(found, name, many[:, -1, 3])
        assert (returns - returns[:1]).abs().max() < 1e-6


def test_the_current_price_is_what_returns_are_counted_from(
    model: LDM4TSModel, rows: tuple[Tensor, Tensor]
) -> None:
    """A number for all, or one each as list, array or tensor; without one it is the newest close."""
    ohlcv = rows[0][:2]
    close = ohlcv[:, -1, 3]
    base = model(ohlcv)["q50"]
    for same in (close, close.tolist(), close.numpy(), close.float()):
        torch.testing.assert_close(model(ohlcv, same)["q50"], base)
    torch.testing.assert_close(model(ohlcv, 2 * close)["q50"], 2 * base)
    one = model(ohlcv[:1], 1.0850)["q50"]
    torch.testing.assert_close(one, base[:1] * float(1.0850 / close[0]))


def test_only_the_newest_bars_are_seen(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """Longer windows forecast the same bits, and no parameter or buffer comes into being by a call."""
    names = {name: x.shape for name, x in model.state_dict().items()}
    bars = torch.from_numpy(simulate("SYM", 200, seed=8).window.values)
    long, short = model(bars[None]), model(bars[None, -CONTEXT:])
    assert all(torch.equal(long[name], short[name]) for name in long)
    assert {name: x.shape for name, x in model.state_dict().items()} == names


def test_training_mode_is_one_call(rows: tuple[Tensor, Tensor]) -> None:
    """One call of the U-Net, which sees alpha x0 + sigma eps; a loss, and an estimate with gradients."""
    model = made()
    ohlcv, targets = rows[0][:4], rows[1][:4]
    calls = Calls(model)
    g = Generator().manual_seed(4)
    found = model(ohlcv, training_mode=True, targets=targets, generator=g, return_all=True)
    assert len(calls.canvas) == model.unet_calls == 1
    assert set(found) > MOMENTS | {"loss", "velocity_loss", "direct_loss"}
    assert {tuple(found[name].shape) for name in MOMENTS} == {(4, 3)}
    assert found["loss"].requires_grad
    assert found["mean"].requires_grad
    assert (found["std"] == 0).all()
    t, eps, _ = model.drawn(4, Generator().manual_seed(4))
    assert torch.equal(calls.times[0].long(), t)
    seen = model.seen(ohlcv)
    x0 = model.net.coming(seen.sequence, model.ways(seen, targets))
    level = samplers.alphas_cumprod()[t][:, None, None, None]
    torch.testing.assert_close(calls.canvas[0][:, :4, :, -2:], level**0.5 * x0 + (1 - level) ** 0.5 * eps)


def test_a_training_step_matches_what_it_says_of_itself(rows: tuple[Tensor, Tensor]) -> None:
    """With a U-Net that is right of v its error is none, and the estimate is the latents of the outcome."""
    model = made().eval()
    seen = model.seen(rows[0][:4])
    way = model.ways(seen, rows[1][:4])
    with torch.no_grad():
        known, x0 = model.net.known(seen.sequence), model.net.coming(seen.sequence, way)
        t, eps, _ = model.drawn(4, Generator().manual_seed(4))
        alpha, sigma = (x[t][:, None, None, None] for x in (model.alpha, model.sigma))
        model.net.velocity = lambda *_: alpha * eps - sigma * x0  # type: ignore[method-assign]
        found = model.losses(seen, known, x0, way, t, eps, 1.0)
    assert float(found.velocity) < 1e-12
    torch.testing.assert_close(found.latent, x0, atol=1e-4, rtol=1e-4)


def test_every_timestep_is_trained_as_often(model: LDM4TSModel) -> None:
    """Drawn from all thousand alike, not from the middle."""
    t, _, _ = model.drawn(8000, Generator().manual_seed(9))
    assert chisquare(np.bincount(t // 50, minlength=20)).pvalue > 0.01
    assert int(t.min()) < 5
    assert int(t.max()) > 994


def test_gradients_reach_all_that_learns(rows: tuple[Tensor, Tensor]) -> None:
    """By the loss every trainable tensor; by the forecast, as the documents train, U-Net and conditioners."""
    model = made()
    ohlcv, targets = rows[0][:6], rows[1][:6]
    model(ohlcv, training_mode=True, targets=targets)["loss"].backward()
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in learns.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert {name.split(".")[1] for name in set(dict(model.named_parameters())) - set(learns)} == {"vae"}
    model.zero_grad()
    outputs = model(ohlcv, training_mode=True, targets=targets)
    nn.functional.mse_loss(outputs["mean"], targets[:, [h - 1 for h in HORIZONS]].float()).backward()
    reached = {name.split(".")[1] for name, p in learns.items() if p.grad is not None and p.grad.any()}
    assert {"unet", "statistics", "frequency", "temporal", "map", "gate", "read"} <= reached


def test_training_needs_what_came_after(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """Without targets, or with them where nothing is trained, one sentence says what is meant."""
    ohlcv, targets = rows[0][:2], rows[1][:2]
    with pytest.raises(ConfigError, match=r"give targets, the closes of the 16 bars that follow each row"):
        model(ohlcv, training_mode=True)
    with pytest.raises(ConfigError, match="a forecast must not be given them"):
        model(ohlcv, targets=targets)
    with pytest.raises(ConfigError, match="num_samples = 3 is for forecasts"):
        model(ohlcv, num_samples=3, training_mode=True, targets=targets)
    with pytest.raises(ConfigError, match="num_samples = 0 is not possible"):
        model(ohlcv, num_samples=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 96}, "image_size = 96 is not possible: give a side of 64, 128, 224, 256 pixels"),
        ({"image_size": (64, 128)}, "image_size = (64, 128)"),
        ({"image_size": "64"}, "image_size = '64'"),
        ({"horizons": []}, "horizons = [] is not possible"),
        ({"horizons": [60, 15]}, "horizons = [60, 15] do not rise"),
        ({"horizons": [0, 15]}, "horizons = 0 is not possible: give a whole number from 1"),
        ({"horizons": [1.5]}, "horizons = 1.5"),
        ({"diffusion_steps": 500}, "diffusion_steps = 500 is not what this model trains and samples with"),
        ({"diffusion_steps": 50}, "save no memory and no time"),
        (
            {"sampling_steps": 1001},
            "sampling_steps = 1001 is not possible: give a whole number from 2 to 400",
        ),
        ({"sampling_steps": 1}, "sampling_steps = 1"),
        ({"sampler": "heun"}, "sampler = 'heun' is refused"),
        ({"preset": "huge"}, "preset = 'huge' is unknown: take one of tiny, small, base"),
        ({"context": 20}, "context = 20 is not possible: give a whole number from 32"),
        ({"seed": -1}, "seed = -1"),
        ({"enable_gradient_checkpointing": 1}, "enable_gradient_checkpointing = 1"),
        ({"attention_backend": "xformers"}, "attention backend 'xformers' is unknown: choose auto, default"),
        ({"device": "tpu"}, "device = 'tpu' cannot be used"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options: dict[str, Any], words: str) -> None:
    """Each names the field, its value and what it may be, in one line."""
    with pytest.raises(ConfigError) as fault:
        made(**options)
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: x[0], r"shape \(48, 5\), not \(B, L, 5\).* give ohlcv\[None\]"),
        (lambda x: x[..., :4], r"shape \(2, 48, 4\), not \(B, L, 5\)"),
        (lambda x: x[:, -30:], "ohlcv has 30 bars a row, and the model sees 48"),
        (lambda x: x.numpy(), r"ohlcv is numpy\.ndarray: give a torch tensor"),
        (lambda x: put(x, 3, torch.nan), r"ohlcv row 1, bar -8 .*: close is nan, no finite number"),
        (lambda x: put(x, 4, torch.inf), "volume is inf"),
        (lambda x: put(x, 0, -1.0), "open is -1: prices are above 0"),
        (lambda x: put(x, 4, -1.0), "volume is -1"),
        (lambda x: put(x, 1, 1e-3), "high is 0.001, below the low"),
        (lambda x: put(x, 3, 1e6), r"close is 1e\+06, outside of low and high"),
    ],
)
def test_bars_that_cannot_be_are_named(
    model: LDM4TSModel, rows: tuple[Tensor, Tensor], wrong: Any, words: str
) -> None:
    """Row, bar, column and value are said, in forecasts and in training alike."""
    with pytest.raises(DataError, match=words):
        model(wrong(rows[0][:2]))
    with pytest.raises(DataError, match=words):
        fit(model, wrong(rows[0][:2]), rows[1][:2])


def put(x: Tensor, column: int, value: float) -> Tensor:
    """The bars with one number of row 1 replaced."""
    y = x.clone()
    y[1, -8, column] = value
    return y


def test_prices_that_cannot_be_are_named(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """Current prices and targets that are none, of another shape, or too few rows to learn from."""
    ohlcv, targets = rows[0][:2], rows[1][:2]
    for price, words in (
        (-1.0, "current_price = -1.0 holds what is no price"),
        (float("nan"), "no price above 0"),
        ([1.0, 2.0, 3.0], r"current_price has the shape \(3,\): give one price, or one for each of 2 rows"),
        ("1.08x", "current_price = '1.08x' is no price"),
    ):
        with pytest.raises(DataError, match=words):
            model(ohlcv, price)
    spoilt = targets.clone()
    spoilt[1, 4] = torch.nan
    for given, words in (
        (targets[:, :3], r"targets are \(2, 3\): give a tensor \(2, 16\), the closes of the 16 bars"),
        (spoilt, "targets row 1, bar 5 ahead: nan is no price above 0"),
    ):
        with pytest.raises(DataError, match=words):
            model(ohlcv, training_mode=True, targets=given)
    with pytest.raises(DataError, match="2 rows cannot be learnt: give at least 24"):
        fit(model, ohlcv, targets)
    with pytest.raises(ConfigError, match="learning_rate = 0"):
        fit(model, ohlcv, targets, learning_rate=0)
    with pytest.raises(DataError, match="30 bars make no row: give at least 48 and 16 that follow"):
        windows(torch.ones(30, 5), 48, 16)
    with pytest.raises(DataError, match=r"bars are \(30, 4\)"):
        windows(torch.ones(30, 4), 48, 16)


def test_rows_are_cut_with_what_follows() -> None:
    """The closes of a row's targets begin with the bar after its last, and every step is taken."""
    bars = torch.arange(40.0)[:, None].expand(-1, 5)
    ohlcv, targets = windows(bars, 10, 4, 3)
    assert ohlcv.shape == (9, 10, 5)
    assert targets.shape == (9, 4)
    assert ohlcv[2, :, 3].tolist() == list(range(6, 16))
    assert targets[2].tolist() == [16, 17, 18, 19]


def test_a_training_is_a_function_of_rows_and_seed(rows: tuple[Tensor, Tensor]) -> None:
    """Two trainings end with the same bits; the autoencoder learns and is frozen, all phases are told."""
    ends, seen = [], set()
    for _ in range(2):
        model = made(seed=5)
        before = copy.deepcopy(model.state_dict())
        fit(model, rows[0][:36], rows[1][:36], steps=1, batch_size=4, progress=lambda p: seen.add(p.phase))
        ends.append(model.state_dict())
        assert not any(p.requires_grad for p in model.net.vae.parameters())
        assert not model.training
    assert seen == {"autoencoder", "diffusion", "gate"}
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))
    assert not torch.equal(before["net.map.static"], ends[0]["net.map.static"])
    assert not torch.equal(before["net.spread"], ends[0]["net.spread"])
    other = made(seed=6).state_dict()
    assert not torch.equal(other["net.unet.conv_in.weight"], before["net.unet.conv_in.weight"])


def test_it_learns(rows: tuple[Tensor, Tensor]) -> None:
    """Some steps of a loop of one's own, on one batch, bring the loss down at fixed levels and noise."""
    model = made()
    ohlcv, targets = rows[0][:8], rows[1][:8]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    before = validate(model, ohlcv, targets, num_samples=2)
    for _ in range(12):
        optimiser.zero_grad()
        model(ohlcv, training_mode=True, targets=targets)["loss"].backward()
        optimiser.step()
    after = validate(model, ohlcv, targets, num_samples=2)
    assert after.loss < 0.9 * before.loss
    assert after.velocity_loss < before.velocity_loss


def test_a_validation_comes_again_to_the_bit(rows: tuple[Tensor, Tensor]) -> None:
    """Both losses: timesteps and noise are fixed, and neither mode nor generator of the model is touched."""
    model, ohlcv, targets = made().train(), rows[0][:6], rows[1][:6]
    state, calls = model.noise_generator.get_state(), Calls(model)
    first = validate(model, ohlcv, targets, num_samples=4)
    assert [int(t[0]) for t in calls.times[: len(TIMESTEPS_SEEN)]] == list(TIMESTEPS_SEEN)
    assert len(calls.times) == len(TIMESTEPS_SEEN) + STEPS
    calls.hook.remove()
    assert validate(model, ohlcv, targets, num_samples=4) == first
    assert torch.equal(model.noise_generator.get_state(), state)
    assert model.training
    assert all(np.isfinite(first))


def test_noise_belongs_to_seed_or_generator(model: LDM4TSModel, rows: tuple[Tensor, Tensor]) -> None:
    """No global state is asked: the seed's Sobol points, or draws of the generator that is given."""
    ohlcv = rows[0][:1]
    torch.manual_seed(1)
    first = model(ohlcv, num_samples=4)["mean"]
    torch.manual_seed(2)
    assert torch.equal(model(ohlcv, num_samples=4)["mean"], first)
    drawn = [model(ohlcv, num_samples=4, generator=Generator().manual_seed(s))["mean"] for s in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    stochastic = made(sampler="ddpm").eval()
    assert torch.equal(stochastic(ohlcv)["mean"], stochastic(ohlcv)["mean"])


def test_a_checkpoint_is_all_weights_or_none(rows: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """The same bits when loaded; another number of steps may be asked for; anything else is refused."""
    model, ohlcv, path = made(seed=3).eval(), rows[0][:2], tmp_path / "model.safetensors"
    model.save_checkpoint(path)
    again = LDM4TSModel.from_checkpoint(path)
    assert again.options == model.options
    assert torch.equal(again(ohlcv, num_samples=3)["q95"], model(ohlcv, num_samples=3)["q95"])
    assert LDM4TSModel.from_checkpoint(path, sampling_steps=7).options.sampling_steps == 7
    with pytest.raises(ConfigError, match="horizons is part of what has learnt: change sampling_steps"):
        LDM4TSModel.from_checkpoint(path, horizons=[1])
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        LDM4TSModel.from_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="cannot be written"):
        model.save_checkpoint(tmp_path / "no" / "folder")
    weights = load_file(path)
    own = asdict(model.options)
    told = {"format": "barcast LDM4TSModel 1", "options": json.dumps(own)}
    other = tmp_path / "other.safetensors"
    for spoil, header, words in (
        ({}, {}, "format is None"),
        (
            {},
            told | {"options": json.dumps(own | {"horizons": [1, 4]})},
            r"is \(2, 32, 54\) .*, not \(2, 32, 36\)",
        ),
        ({}, told | {"options": '{"horizons": [1, 4, 16]}'}, "options are not of this version"),
        ({}, told | {"options": "{"}, "options are not of this version"),
        ({}, told | {"options": 100_000 * "[" + 100_000 * "]"}, "options are not of this version"),
        (
            {"net.gate.bias": torch.full((3,), torch.nan)},
            None,
            "net.gate.bias holds a number that is not finite",
        ),
        ({"net.gate.bias": torch.zeros(4)}, None, r"net.gate.bias is \(4,\) .*, not \(3,\)"),
        ({"net.more": torch.zeros(4)}, None, "net.more is missing or unknown"),
    ):
        save_file(weights | spoil, other, told if header is None else header)
        with pytest.raises(CheckpointError, match=words):
            LDM4TSModel.from_checkpoint(other)


def test_attention_is_that_which_is_asked_for(model: LDM4TSModel) -> None:
    """Default is torch's own; what is missing is said in a line with what to install; sage never trains."""
    set_to = [x.processor for x in model.net.unet.modules() if hasattr(x, "processor")]
    assert set_to
    assert all(type(p) is Processor and p.backend is Backend.sdpa for p in set_to)
    with (
        installed(cuda=None),
        pytest.raises(ConfigError, match=r"flash cannot be used: torch .* without CUDA"),
    ):
        made(attention_backend="flash")
    with installed(), pytest.raises(ConfigError, match="flash-attn is not installed; pip install ninja"):
        made(attention_backend="flash")
    with both(), pytest.raises(ConfigError, match="sageattention has no backward pass"):
        made(attention_backend="sage")


def test_checkpointing_keeps_the_gradients(rows: tuple[Tensor, Tensor]) -> None:
    """With it on, as by default, a step has the same loss and gradients within 1e-6, by one call."""
    found = []
    for on in (False, True):
        model = made(enable_gradient_checkpointing=on)
        assert model.net.unet.is_gradient_checkpointing is on
        g = Generator().manual_seed(1)
        loss = model(rows[0][:2], training_mode=True, targets=rows[1][:2], generator=g)["loss"]
        loss.backward()
        assert model.unet_calls == 1
        found.append((loss.detach(), model.net.unet.conv_in.weight.grad, model.net.statistics.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_package_brings_nothing_that_is_not_asked_for() -> None:
    """The name is imported without torch; each name that is offered is there."""
    program = "import sys, barcast.models.ldm4ts\nassert not {'torch', 'diffusers'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="LDM4TSModels"):
        _ = package.LDM4TSModels
    assert {name for name in package.__all__ if getattr(package, name) is not None} == set(package.__all__)


PAGE = Path(__file__).parents[2] / "deploy" / "seeds-ldm4ts.md"


def test_the_page_of_ldm4ts_says_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code runs as it is printed, with fewer steps of training, and says where the training stands."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    assert code.count("steps=200") == 1
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec(code.replace("steps=200", "steps=2"), said)
    out = capsys.readouterr().out
    assert re.search(r"autoencoder, step 2 of 2", out)
    assert "1 call of the U-Net" in out
    assert "8 calls of the U-Net" in out
    assert (said["forecast"]["q05"] < said["forecast"]["q95"]).all()
    assert torch.equal(said["again"]["q95"], said["forecast"]["q95"])
    assert said["estimate"]["total_estimated_gb"] > 0


def test_the_page_of_ldm4ts_names_what_exists() -> None:
    """Each test and each file that the page names is there, and the sizes that it says are so."""
    page, root = PAGE.read_text(), PAGE.parents[1]
    sources = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 25
    assert [name for name in named if f"def {name}(" not in sources] == []
    assert [name for name in re.findall(r"`(tests/[\w/]+\.py)`", page) if not (root / name).is_file()] == []
    for preset in PRESETS:
        count = sum(p.numel() for p in LDM4TSModel(preset=preset).parameters())
        assert f"| {preset} | {count:,} |" in page
