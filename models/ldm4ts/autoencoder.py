"""Between images and latents: a small autoencoder of diffusers."""

from typing import Any

from torch import Tensor, nn

from barcast.models.errors import ConfigError

SHRINK = 8
"""Pixels of a latent's side."""
LATENT = 4
"""Channels of a latent."""


def autoencoder(widths: tuple[int, ...], size: int) -> nn.Module:
    """An `AutoencoderKL` (Kingma and Welling 2014; Rombach et al. 2022) of random weights.

    `widths` are the channels of its four levels, multiples of 8.
    """
    made: nn.Module = installed().AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=8,
        sample_size=size,
    )
    return made


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
