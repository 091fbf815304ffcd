"""Autoencoders of an LDM4TS, trained here or given: one contract, and every folder that is none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from barcast.models import ConfigError
from barcast.models.ldm4ts.autoencoder import (
    DOWN,
    UP,
    autoencoder,
    decoded,
    encoded,
    open_autoencoder,
    sizes_of,
)
from barcast.models.ldm4ts.network import LDM4TS, LatentArchitecture

WEIGHTS = "diffusion_pytorch_model.safetensors"
SD = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": (DOWN,) * 4,
    "up_block_types": (UP,) * 4,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 256,
}
"""The layout of Stable Diffusion's autoencoder, an eighth as wide."""


def drawn(module: nn.Module, seed: int = 5) -> nn.Module:
    """A module whose weights are drawn from a seed."""
    g = Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Stable Diffusion has it, written by diffusers."""
    path = tmp_path_factory.mktemp("sd") / "vae"
    drawn(AutoencoderKL(**SD)).save_pretrained(path)
    return path


def network(vae: Any) -> LDM4TS:
    """A network with an autoencoder."""
    a = LatentArchitecture.of(
        "tiny",
        features=9,
        channels=4,
        context=64,
        horizons=3,
        path=16,
        samples=6,
        given=True,
        **sizes_of(vae),
    )
    net = LDM4TS(a, Generator().manual_seed(1)).eval()
    net.vae.load_state_dict(vae.state_dict())
    return net


@pytest.fixture(scope="module", params=["trained here", "given"])
def net(request: pytest.FixtureRequest, folder: Path) -> LDM4TS:
    own = request.param == "trained here"
    return network(drawn(autoencoder((8, 8, 8, 16), 64)) if own else open_autoencoder(folder))


def told(count: int) -> tuple[Tensor, Tensor]:
    """Sequences and what is to come."""
    g = Generator().manual_seed(2)
    return torch.randn(count, 64, 4, generator=g), torch.randn(count, 16, generator=g)


@torch.no_grad()
def test_an_autoencoder_keeps_the_contract(net: LDM4TS) -> None:
    """[B, 3, P, P] -> [B, 4, P/8, P/8] -> [B, 3, P, P], rows apart, and latents of mean 0 and variance 1."""
    sequence, way = told(12)
    image = net.images(sequence, way)
    latent = encoded(net.vae, image)
    assert latent.shape == (12, 4, 8, 8)
    assert (
        decoded(net.vae, latent).shape == net.reconstructed(image)[0].shape == image.shape == (12, 3, 64, 64)
    )
    torch.testing.assert_close(encoded(net.vae, image[3:4]), latent[3:4], rtol=1e-4, atol=1e-5)
    net.measure(net.coming(sequence, way) * net.spread + net.centre)
    found = net.coming(sequence, way)
    assert found.mean(0).abs().max() < 1e-3
    assert float(found.std()) == pytest.approx(1, abs=0.06)
    assert net.way(found).shape == (12, 16)


@torch.no_grad()
def test_latents_of_what_was_know_nothing_of_what_is_to_come(net: LDM4TS) -> None:
    """They are those of the image whose right is blank; with the right shown, the middle would tell of it."""
    sequence, way = told(2)
    known = net.known(sequence)
    blank = net.images(sequence, way)
    blank[..., 48:] = 0
    torch.testing.assert_close(known[:, :4, :, :6] * net.spread, encoded(net.vae, blank)[..., :6])
    assert (known[:, :4, :, 6:] == 0).all()
    left = encoded(net.vae, net.images(sequence, way))[..., :6]
    assert (left - encoded(net.vae, net.images(sequence, -way))[..., :6]).abs().max() > 1e-4


def test_a_folder_is_opened_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Its sizes and its weights, also those of older files, in which attention has other names."""
    found = open_autoencoder(folder)
    assert sizes_of(found) == {"vae": (32, 32, 64, 64), "vae_layers": 2, "vae_groups": 32}
    weights = load_file(folder / WEIGHTS)
    assert all(torch.equal(x, weights[name]) for name, x in found.state_dict().items())
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, x in weights.items():
        for new, former in old.items():
            name = name.replace(new, former)
        renamed[name] = x.half()
    shutil.copytree(folder, tmp_path / "old")
    save_file(renamed, tmp_path / "old" / WEIGHTS)
    again = open_autoencoder(tmp_path / "old").state_dict()
    assert all(x.dtype == torch.float32 for x in again.values())
    assert all(torch.equal(x, weights[name].half().float()) for name, x in again.items())


DEEP = 100_000 * "[" + 100_000 * "]"


def config(**changed: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def fewer(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_out.bias"]
    save_file(weights, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text(DEEP), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no object"),
        (config(_class_name="UNet2DModel"), "_class_name is 'UNet2DModel', not 'AutoencoderKL'"),
        (config(latent_channels=16), "latent_channels is 16, not 4"),
        (config(block_out_channels=[32, 32, 64]), "pixels of a latent is 4, not 8"),
        (config(act_fn="relu"), "act_fn is 'relu', not 'silu'"),
        (config(use_quant_conv=False), "use_quant_conv is False, not True"),
        (config(block_out_channels=[32, 32, 64, 128]), "copy the folder again"),
        (fewer, "missing weights, 1 of them, such as decoder.conv_out.bias"),
        (pickled, "there is diffusion_pytorch_model.bin alone, a pickle"),
        (lambda folder: (folder / WEIGHTS).unlink(), "there are none"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"0123456789"), "copy the folder again"),
    ],
)
def test_a_folder_that_cannot_be_used(folder: Path, tmp_path: Path, change: Any, said: str) -> None:
    """One sentence with the option, its value and what to do."""
    shutil.copytree(folder, tmp_path / "vae")
    change(tmp_path / "vae")
    with pytest.raises(ConfigError, match=said) as caught:
        open_autoencoder(tmp_path / "vae")
    assert str(caught.value).startswith(f"vae = '{tmp_path / 'vae'}': ")
    assert "\n" not in str(caught.value)
