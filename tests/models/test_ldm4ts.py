"""LDM4TS: one call of the U-Net in training, and every promise of a forecaster."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Generator, Tensor

from barcast.daemon.challenger import train_challenger
from barcast.models import SAMPLERS, CheckpointError, ConfigError, Window, open_model, samplers
from barcast.models.checkpoint import load, save
from barcast.models.description import describe
from barcast.models.ldm4ts import training
from barcast.models.ldm4ts.forecaster import Sampling, quantiles_of
from barcast.models.ldm4ts.losses import noise_levels
from barcast.models.ldm4ts.network import LDM4TS, PRESETS, RANGE, LatentArchitecture, timesteps_of
from barcast.models.ldm4ts.trained import LatentTrained
from barcast.models.ldm4ts.training import deviations
from barcast.models.optimiser import Progress
from tests import kinds
from tests.checks import bits, forecast_does_not_depend_on_its_batch
from tests.garch import simulate

HORIZONS, LEVELS = (1, 4, 16), (0.05, 0.25, 0.5, 0.75, 0.95)
OUTPUTS: dict[str, Any] = {"timeframe": "1h", "horizons": HORIZONS, "levels": LEVELS, "preset": "tiny"}


@pytest.fixture(scope="module")
def bars() -> list[Window]:
    return [simulate(f"SYM{i}", 2200, seed=7, season=True).window for i in range(2)]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with kinds.few_latents():
        yield


@pytest.fixture(scope="module")
def latent(bars: list[Window]) -> LatentTrained:
    return training.train(bars, **OUTPUTS, steps=2, hold_out=0.1)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    return [simulate(f"NEW{i}", 2000 if i else 300, seed=20 + i).window for i in range(3)]


def network(**sizes: Any) -> LDM4TS:
    usual = {"features": 9, "channels": 4, "context": 64, "horizons": 3, "path": 16, "samples": 6}
    a = LatentArchitecture.of("tiny", **(usual | sizes))
    return LDM4TS(a, Generator().manual_seed(1)).eval()


def begun(bars: list[Window], samples: int) -> training._Training:
    """A training before its first step."""
    data = training.split(bars, "1h", HORIZONS, None, validation=0.0, hold_out=0.0)
    features = data.learn.features.shape[1]
    a = LatentArchitecture.of(
        "tiny", features=features, channels=4, context=64, horizons=3, path=16, samples=samples
    )
    return training._Training(data, LEVELS, 0, 1, None, a)


def told(net: LDM4TS, count: int) -> tuple[Tensor, Tensor]:
    """Features and sequences."""
    g, a = Generator().manual_seed(2), net.architecture
    return torch.randn(count, a.features, generator=g), torch.randn(count, a.context, a.channels, generator=g)


def what_is_told_matters() -> None:
    """Other tokens, another image of what was: other ways, from the same noise."""
    net = network()
    with torch.no_grad():
        for p in net.unet.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=Generator().manual_seed(3)))
        features, sequence = told(net, 2)
        tokens, known = net.tokens(features, sequence), net.known(sequence)
        sampling = Sampling(net, "ddim", 3)
        ways = sampling.ways(known[:1], tokens[:1])
        assert (sampling.ways(known[:1], tokens[1:]) - ways).abs().max() > 1e-4
        assert (sampling.ways(known[1:], tokens[:1]) - ways).abs().max() > 1e-4


def an_image_is_that_of_its_row() -> None:
    """In a batch of histories of other periods, too."""
    net = network()
    _, sequence = told(net, 4)
    wave = torch.sin(2 * torch.pi * torch.arange(64) / torch.tensor([[6.0], [32.0], [12.0], [20.0]]))
    sequence[..., RANGE] += 3 * wave
    together = net.images(sequence, None)
    assert len(net.history(sequence)[1].unique()) > 1
    for i in range(len(sequence)):
        assert torch.equal(net.images(sequence[i : i + 1], None)[0], together[i])


def training_sees_what_serving_sees(bars: list[Window]) -> None:
    """Of what was; of what is to come nothing, but as what the U-Net has to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEARNT", 10)
        one = begun(bars, 4)
        one._prepare_latents()
    with torch.no_grad():
        for at, known in zip(one.drawn, one.known, strict=True):
            served = one.net.known(one._sequence(at[None]))[0]
            assert (served - known).abs().max() < 1e-4 * served.abs().max()


def test_training_sees_what_serving_sees(bars: list[Window]) -> None:
    """See there; and an image in a batch is that of its own row, with its own period."""
    training_sees_what_serving_sees(bars)
    an_image_is_that_of_its_row()


def test_a_step_of_training_calls_the_unet_once(bars: list[Window]) -> None:
    """Every trainable part of the phase has a gradient from it; timesteps are drawn from all there are."""
    one = begun(bars, 32)
    one._prepare_latents()
    calls: list[Tensor] = []
    one.net.unet.register_forward_pre_hook(lambda _module, given: calls.append(given[1]))
    share = training.Share(0, 1, Generator().manual_seed(1))
    loss = one._velocity_loss(share)
    loss.backward()
    assert len(calls) == 1
    for part in (one.net.unet, one.net.statistics, one.net.frequency):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    for _ in range(60):
        with torch.no_grad():
            one._velocity_loss(share)
    drawn = torch.cat(calls)
    assert drawn.min() < 20
    assert drawn.max() > 979


def test_the_gate_learns_from_the_older_half_of_all_symbols(bars: list[Window]) -> None:
    """And the other half chooses its weights, after every outcome that it has learnt from."""
    one = begun(bars, 4)
    part = one.learn.only(one.judged)
    older, newer = part.only(one.first), part.only(one.second)
    assert older.closes[:, 1].max() <= newer.closes[:, 0].min()
    both = [len(set((origins.row // len(bars[0])).tolist())) for origins in (older, newer)]
    assert both == [2, 2]


def test_memory_that_ends_while_latents_are_prepared_is_no_end(
    bars: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not finished is prepared again, also where the autoencoder was given."""
    one = begun(bars, 4)
    one.given = "given"
    encoded, tries = one._encoded, iter([True])

    def short(at: Tensor, way: Tensor) -> Tensor:
        if next(tries, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encoded(at, way)

    monkeypatch.setattr(one, "_encoded", short)
    with pytest.raises(torch.OutOfMemoryError):
        one._prepare_latents()
    one._prepare_latents()
    assert len(one.latents) == len(one.known) == len(one.drawn) > 0


def test_the_weights_of_the_loss_are_those_of_min_snr() -> None:
    """min(SNR, 5) / (SNR + 1) for an error of v (Hang et al. 2023), where SNR = alpha^2 / sigma^2."""
    noise = noise_levels()
    snr = (noise.alpha / noise.sigma) ** 2
    torch.testing.assert_close(noise.weight, snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=1e-7)


def test_a_forecast_does_not_depend_on_its_batch(latent: LatentTrained, windows: list[Window]) -> None:
    """0 bits differ: the period of an image is that of its own window, each window has a tile of its own."""
    forecast_does_not_depend_on_its_batch(latent.raw("x"), windows, (1, 2, 3))


@pytest.mark.parametrize("sampler", ["dpmpp", "ddpm"])
def test_later_bars_change_no_forecast_and_no_path(latent: LatentTrained, sampler: str) -> None:
    """Whatever stands after t in the arrays a window was cut from, the forecast at t keeps its bits."""
    w, forecaster = simulate("NEW", 2000, seed=30).window, latent.raw("x", sampler, 2)
    for n in (120, 1950):
        poisoned = w.values.copy()
        poisoned[n:] = np.nan
        clean, dirty = (Window("NEW", w.close_times[:n], values[:n]) for values in (w.values, poisoned))
        assert bits(forecaster, [clean]) == bits(forecaster, [dirty])
        assert (forecaster.couplings([clean])[0].ranks == forecaster.couplings([dirty])[0].ranks).all()


def test_what_is_served_is_calibrated_and_knows_paths(latent: LatentTrained, windows: list[Window]) -> None:
    """Quantiles rise, a warming window is forecast too, and paths have the steps of any model's."""
    forecaster = latent.forecaster("x", paths=True)
    made = forecaster.forecast([windows[0]])[0]
    assert made.warming
    assert (np.diff(made.quantiles, axis=1) >= 0).all()
    assert np.isfinite(made.std).all()
    assert made.paths is not None
    assert made.paths.steps == tuple(range(1, 17))
    assert made.paths.returns.shape == (training.SAMPLES, 16)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_samples_it(latent: LatentTrained, windows: list[Window], sampler: str) -> None:
    """Each in its fewest steps."""
    made = latent.raw("x", sampler, SAMPLERS[sampler]).forecast(windows[1:2])[0]
    assert np.isfinite(made.quantiles).all()


def test_a_checkpoint_forecasts_the_same_bits(
    latent: LatentTrained, windows: list[Window], tmp_path: Path
) -> None:
    """Saved and opened by its path, with its kind, and described."""
    model = save(latent, tmp_path / "model")
    again = load(tmp_path / "model")
    assert (again.model, isinstance(again.trained, LatentTrained)) == (model, True)
    first, second = latent.raw(model), again.trained.raw(model)  # type: ignore[attr-defined]
    assert bits(first, windows) == bits(second, windows)
    about = describe(str(tmp_path / "model"))
    assert (about["kind"], about["preset"], about["sampler"]) == ("ldm4ts", "tiny", "dpmpp")
    assert about["parameters"]["all"] == sum(p.numel() for p in latent.net.parameters())
    with pytest.raises(ConfigError, match="choose one of"):
        open_model(str(tmp_path / "model"), "1h", "other", None)


def test_a_checkpoint_without_diffusers_is_told_what_is_missing(
    latent: LatentTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra, and not another training, as of a file that is damaged."""
    save(latent, tmp_path / "model")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"with its extra hub: pip install '.\[hub\]'$"):
        load(tmp_path / "model")


def test_a_checkpoint_of_other_sizes_is_refused(latent: LatentTrained, tmp_path: Path) -> None:
    """Before a network of any size is made."""
    from barcast.models import checkpoint

    save(latent, tmp_path / "model")
    body, weights = checkpoint.header(tmp_path / "model"), (tmp_path / "model" / "weights.safetensors")
    body["architecture"]["hidden"] = 10**9
    with pytest.raises(CheckpointError, match="architecture needs"):
        checkpoint._latent(tmp_path / "model", body, weights.read_bytes())


def test_a_training_that_was_interrupted_goes_on_to_the_same_bits(
    bars: list[Window], latent: LatentTrained, tmp_path: Path
) -> None:
    """In each phase; and two trainings of one seed are the same model."""

    class StopError(Exception):
        """Ends a training."""

    phases: set[str] = set()

    def stop(p: Progress) -> None:
        if p.crps is not None and p.step == 1 and p.phase not in phases:
            phases.add(p.phase)
            raise StopError

    for _ in range(5):
        try:
            found = training.train(
                bars, **OUTPUTS, steps=2, hold_out=0.1, state=tmp_path / "state", progress=stop
            )
        except StopError:
            continue
        break
    assert phases == set(training.RATES)
    assert save(found, tmp_path / "a") == save(latent, tmp_path / "b")


def test_what_is_told_matters() -> None:
    """Nor need any part be there."""
    what_is_told_matters()
    net = network()
    with torch.no_grad():
        features, sequence = told(net, 2)
        tokens = net.tokens(features, sequence)
        assert tokens.shape[1] >= 8
        for part, lost in (("statistics", 8), ("frequency", 4)):
            few = network(**{part: False})
            assert few.tokens(features, sequence).shape[1] == tokens.shape[1] - lost
        blind = network(vision=False)
        assert torch.equal(blind.known(sequence)[:1], blind.known(sequence)[1:])


def test_weights_are_a_function_of_the_generator() -> None:
    """All of them, those of diffusers' modules too; torch's own generator decides none."""
    first = network().state_dict()
    torch.randn(3)
    second = network().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_latents_are_measured() -> None:
    """Those of what is to come have mean 0 and variance 1 then, and ways are read from them unscaled."""
    net = network()
    with torch.no_grad():
        _, sequence = told(net, 30)
        way = torch.randn(30, 16, generator=Generator().manual_seed(4))
        raw = net.coming(sequence, way)
        net.measure(raw)
        scaled = net.coming(sequence, way)
        assert scaled.mean(0).abs().max() < 1e-4
        assert float(scaled.std()) == pytest.approx(1, abs=0.03)
        torch.testing.assert_close(net.way(scaled), net.read(raw.flatten(1)), rtol=1e-3, atol=1e-4)


def test_timesteps_of_noise_levels() -> None:
    """At the schedule's own levels its timesteps, between two of them in between."""
    known = samplers.lambdas().double()
    torch.testing.assert_close(timesteps_of(known[[3, 500, 998]]), torch.tensor([3.0, 500.0, 998.0]))
    middle = float(timesteps_of((known[500:501] + known[501:502]) / 2))
    assert middle == pytest.approx(500.5)
    assert timesteps_of(torch.tensor([50.0, -50.0], dtype=torch.float64)).tolist() == [0, 999]


def test_quantiles_of_samples() -> None:
    """Of normal samples those of the normal distribution, beyond the last too; moved and stretched alike."""
    ranks = torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    levels = torch.tensor([0.001, 0.05, 0.5, 0.95, 0.999], dtype=torch.float64)
    normal = torch.special.ndtri(levels)
    found = quantiles_of(torch.stack([ranks, 3 + 2 * ranks.flip(0)]), normal)
    np.testing.assert_allclose(found[0], norm.ppf(levels), atol=1e-9)
    np.testing.assert_allclose(found[1], 3 + 2 * norm.ppf(levels), atol=1e-9)
    one = quantiles_of(torch.ones(1, 8), normal)
    assert torch.equal(one, torch.ones_like(one))


def test_deviations_of_steps() -> None:
    """At a horizon its own; between two their squares grow evenly."""
    found = deviations(np.array([[1.0, 2.0, 5.0]]), (1, 4, 16), (1, 2, 4, 10, 16))[0]
    np.testing.assert_allclose(found**2, [1, 2, 4, 14.5, 25])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"image": 96}, "image size 96 cannot be used: take one of 64, 128, 224, 256"),
        ({"unet": (12,)}, "architecture.unet is"),
        ({"unet": (8, 8, 8, 8)}, "not 1 to 3 multiples of 8"),
        ({"vae": (8, 8)}, "architecture.vae is"),
        ({"vae": [8, 8, 8, 8]}, "not whole numbers above 0"),
        ({"width": 30}, "a multiple of 4"),
        ({"members": 0}, "architecture.members is 0"),
        ({"vision": 1}, "architecture.vision is 1"),
        ({"path": 65}, "an image of 64 pixels cannot show 65 steps of a path"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], said: str) -> None:
    """Each is a sentence with the field, its value and what it may be."""
    with pytest.raises(ConfigError, match=said):
        network(**sizes)


def test_the_presets_grow(bars: list[Window]) -> None:
    """The default has about a million and a half weights, the largest four times as many."""
    counts = {}
    for name in PRESETS:
        a = LatentArchitecture.of(name, features=81, channels=4, context=64, horizons=3, path=16, samples=32)
        net = LDM4TS(a, Generator().manual_seed(0))
        counts[name] = sum(p.numel() for p in net.parameters())
        assert a.least < counts[name]
        assert a.preset == name
    assert counts["tiny"] < 400_000 < 1_500_000 < counts["small"] < 2_000_000 < counts["base"] < 8_000_000
    with pytest.raises(ConfigError, match="preset 'huge' is unknown"):
        training.train(bars, **OUTPUTS | {"preset": "huge"}, steps=1)


def test_a_challenger_is_of_the_champions_kind_and_sizes(
    bars: list[Window], latent: LatentTrained, tmp_path: Path
) -> None:
    """A retraining of an LDM4TS trains an LDM4TS."""
    champion = str(tmp_path / "champion")
    save(latent, tmp_path / "champion")
    card = open_model(champion, "1h", None, None).card
    train_challenger({w.symbol: w for w in bars}, tmp_path / "new", "1h", card, champion, 1, lambda _: None)
    found = load(tmp_path / "new").trained
    assert isinstance(found, LatentTrained)
    assert found.net.architecture == latent.net.architecture
