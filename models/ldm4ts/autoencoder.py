"""Between images and latents: an autoencoder of diffusers, small and trained here, or a given one."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from barcast.models.errors import ConfigError

SHRINK = 8
"""Pixels of a latent's side."""
LATENT = 4
"""Channels of a latent."""
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
"""What its levels are made of."""


def autoencoder(widths: tuple[int, ...], size: int, layers: int = 1, groups: int = 8) -> nn.Module:
    """An `AutoencoderKL` (Kingma and Welling 2014; Rombach et al. 2022) of random weights.

    `widths` are the channels of its four levels, multiples of `groups`, over which they are normalised;
    `layers` are those of a level.
    """
    made: nn.Module = installed().AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=(DOWN,) * len(widths),
        up_block_types=(UP,) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=LATENT,
        norm_num_groups=groups,
        sample_size=size,
    )
    return made


def open_autoencoder(folder: Path) -> nn.Module:
    """The autoencoder of a local folder in diffusers' layout: `config.json` and weights as safetensors.

    Nothing is downloaded, and no pickle is opened. Its `scaling_factor` is not used: latents are brought to
    variance 1 by what is measured of them. Raise `ConfigError` for a folder that holds none, one of other
    latents or other parts, and one whose weights are missing, more than it has, or damaged.
    """
    about = f"vae = {str(folder)!r}"
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{about}: config.json cannot be read ({error}); name the folder `vae` of a Stable Diffusion "
            "model in diffusers' layout, or leave it out: a small one is trained"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{about}: config.json holds no object; copy the folder again")
    levels = config.get("block_out_channels")
    count = len(levels) if isinstance(levels, list) else 0
    shrink = 2 ** (count - 1) if count else None
    parts: dict[str, tuple[Any, Any]] = {
        "_class_name": (config.get("_class_name"), "AutoencoderKL"),
        "in_channels": (config.get("in_channels", 3), 3),
        "out_channels": (config.get("out_channels", 3), 3),
        "latent_channels": (config.get("latent_channels", LATENT), LATENT),
        "pixels of a latent": (shrink, SHRINK),
        "down_block_types": (config.get("down_block_types"), [DOWN] * count),
        "up_block_types": (config.get("up_block_types"), [UP] * count),
        "act_fn": (config.get("act_fn", "silu"), "silu"),
    }
    whole = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    parts |= {name: (config.get(name, True), True) for name in whole}
    for name, (found, wanted) in parts.items():
        if found != wanted:
            raise ConfigError(f"{about}: {name} is {found!r}, not {wanted!r}; name another autoencoder")
    if not any(folder.glob("*.safetensors")):
        unsafe = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        there = f"there is {unsafe} alone, a pickle, which can run a program" if unsafe else "there are none"
        raise ConfigError(
            f"{about}: weights must be safetensors, and {there}; take the folder with "
            "diffusion_pytorch_model.safetensors"
        )
    try:
        found, loaded = installed().AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError),
        *(RuntimeError, SafetensorError),
    ) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{about}: {said}; copy the folder again") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[what])):
            raise ConfigError(
                f"{about}: {what.partition('_')[0]} weights, {len(names)} of them, such as {names[0]}; copy "
                "the folder again"
            )
    made: nn.Module = found.float().eval()
    return made


def sizes_of(vae: Any) -> dict[str, Any]:
    """The fields of a `LatentArchitecture` that say what an autoencoder is like."""
    of = vae.config
    return {
        "vae": tuple(of.block_out_channels),
        "vae_layers": of.layers_per_block,
        "vae_groups": of.norm_num_groups,
    }


def encoded(vae: Any, image: Tensor) -> Tensor:
    """The mean latents (B, 4, P / 8, P / 8) of images (B, 3, P, P), before they are scaled."""
    mean: Tensor = vae.encode(image).latent_dist.mean
    return mean


def decoded(vae: Any, latent: Tensor) -> Tensor:
    """Images (B, 3, P, P) of latents (B, 4, P / 8, P / 8) as the encoder gives them."""
    image: Tensor = vae.decode(latent).sample
    return image


def installed() -> Any:
    """The package diffusers; raises `ConfigError` where it is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(
            f"diffusers cannot be imported ({error}); install barcast with its extra hub: "
            "pip install '.[hub]'"
        ) from error
    return diffusers
