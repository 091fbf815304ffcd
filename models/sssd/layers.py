"""Sizes of the network, and the layers that all of its parts are made of."""

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of the network."""

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
    denoiser: int = 64  # width of the denoiser
    blocks: int = 2  # residual blocks of the denoiser


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
    with torch.no_grad():
        layer.bias.zero_()
        if generator is None:
            layer.weight.zero_()
        else:
            layer.weight.uniform_(-1 / sqrt(n_in), 1 / sqrt(n_in), generator=generator)
    return layer
