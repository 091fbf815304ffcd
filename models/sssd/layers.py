"""Sizes of the network, and the layers that all of its parts are made of."""

from dataclasses import dataclass, fields
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from barcast.models.errors import ConfigError

CHOICES = {"encoder": ("s4d", "multiscale"), "head": ("mlp", "unet1d")}
"""What the fields of an architecture that are no sizes may be."""
_SIZES = ("width", "state", "poles", "code", "denoiser", "blocks", "encoder", "head")
MOST_BLOCKS = 64
"""Residual blocks: each is a few modules, however narrow."""
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(_SIZES, (32, 8, 4, 16, 32, 1, "s4d", "mlp"), strict=True)),
    "small": dict(zip(_SIZES, (96, 16, 8, 48, 64, 2, "s4d", "mlp"), strict=True)),
    "base": dict(zip(_SIZES, (128, 32, 16, 64, 64, 2, "multiscale", "unet1d"), strict=True)),
}
"""Architectures by name, but for what follows from the bars and from what is forecast."""
PRESET = "small"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of the network, and of which kind its parts are; raises `ConfigError` for any it cannot have."""

    features: int
    channels: int
    context: int  # L
    horizons: int  # H
    path: int  # G: steps of the path that the denoiser knows
    samples: int  # S: rows of the fixed noise
    members: int = 8  # M
    width: int = 96  # of the map's layers, and the encoder's
    state: int = 16  # channels of the S4D layers
    poles: int = 8  # complex conjugate pairs of each S4D channel
    code: int = 48  # of the context c
    denoiser: int = 64  # width of the denoiser; of a U-Net that of every second step
    blocks: int = 2  # residual blocks of the denoiser; of a U-Net at each level
    encoder: str = "s4d"
    head: str = "mlp"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), CHOICES.get(field.name)
            if known and value not in known:
                raise ConfigError(f"architecture.{field.name} is {value!r}, none of {', '.join(known)}")
            if not known and (type(value) is not int or value < 1):
                raise ConfigError(f"architecture.{field.name} is {value!r}, not a whole number above 0")
        if self.blocks > MOST_BLOCKS:
            raise ConfigError(f"architecture.blocks is {self.blocks}, above {MOST_BLOCKS}")

    @classmethod
    def of(cls, preset: str, **given: Any) -> "Architecture":
        """The architecture of a preset, with the given sizes; raise `ConfigError` for an unknown preset."""
        if preset not in PRESETS:
            raise ConfigError(f"preset {preset!r} is unknown: take one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[preset] | given))

    @property
    def least(self) -> int:
        """A count that the network's weights are never below, nor far above: what a file must hold for it."""
        a = self
        wide, deep = max(a.features, a.width, a.horizons), max(a.denoiser, a.path, a.code)
        return max(
            a.members * a.width * wide,
            a.state * max(a.state, a.poles, a.width),
            a.width * a.code,
            a.denoiser * deep,
            a.denoiser * a.blocks * max(a.denoiser * (96 if a.head == "unet1d" else 1), a.code),
            a.path * max(a.path, a.samples),
        )

    @property
    def preset(self) -> str | None:
        """The preset whose sizes these are, if there is one."""
        fits = (all(getattr(self, k) == v for k, v in sizes.items()) for sizes in PRESETS.values())
        return next((name for name, fit in zip(PRESETS, fits, strict=True) if fit), None)


class Dropout(Protocol):
    """Random zeros for training."""

    def inputs(self, x: Tensor) -> Tensor:
        """What the network sees, with zeros."""
        ...

    def hidden(self, x: Tensor) -> Tensor:
        """What a layer says, with zeros."""
        ...


def uniform(shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """Weights of M layers (M, in, out), uniform within 1 / sqrt(in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / sqrt(shape[1])


def linear(n_in: int, n_out: int, generator: Generator | None) -> nn.Linear:
    """A linear layer drawn from `generator`; zero without one."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, n_in, n_out)  # type: ignore[no-untyped-call]
    _draw(layer, n_in, generator)
    return layer


def convolution(n_in: int, n_out: int, generator: Generator, *, reach: int = 1, stride: int = 1) -> nn.Conv1d:
    """A convolution over each step, or every `stride`-th, and `reach` steps on both sides, zero beyond."""
    size = 2 * reach + 1
    layer: nn.Conv1d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv1d, n_in, n_out, size, stride=stride, padding=reach
    )
    _draw(layer, size * n_in, generator)
    return layer


def _draw(layer: nn.Linear | nn.Conv1d, n_in: int, generator: Generator | None) -> None:
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.zero_()
        if generator is None:
            layer.weight.zero_()
        else:
            layer.weight.uniform_(-1 / sqrt(n_in), 1 / sqrt(n_in), generator=generator)
