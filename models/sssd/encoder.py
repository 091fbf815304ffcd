"""What the network knows of the bars: features and sequence -> context."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models.sssd.layers import Architecture, Dropout, linear
from barcast.models.sssd.s4d import S4D

BLOCKS = (4, 16)
"""Bars of a block of each higher timeframe."""
LAYERS = 2
"""S4D layers of each timeframe."""


class Encoder(nn.Module):
    """Rolling features and the sequence of the last bars -> context c.

    Of the sequence S4D layers read the bars alone, or, `multiscale`, also blocks of them.
    """

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
        self.frames: MultiScaleS4D | None = None
        if a.encoder == "multiscale":
            inputs = [a.channels] * (1 + len(BLOCKS))
            self.frames = MultiScaleS4D(inputs, a.state, a.poles, LAYERS, generator)
        else:
            self.enter = linear(a.channels, a.state, generator)
            self.first = S4D(a.state, a.poles, generator)
            self.second = S4D(a.state, a.poles, generator)
            self.mix = linear(a.state, 2 * a.state, generator)
            self.mix_newest = linear(a.state, 2 * a.state, generator)
        self.features = linear(a.features, a.width, generator)
        self.hidden = linear(a.width + a.state, a.width, generator)
        self.leave = linear(a.width, a.code, generator)

    def forward(self, features: Tensor, sequence: Tensor, drop: Dropout | None = None) -> Tensor:
        """features (B, F), sequence (B, L, C) -> c (B, code)."""
        last = self._newest(sequence)
        if drop is not None:
            features = drop.inputs(features)
            last = drop.inputs(last)
        y = functional.silu(self.features(features))  # (B, width)
        y = y if drop is None else drop.hidden(y)
        y = functional.silu(self.hidden(torch.cat([y, last], -1)))
        y = y if drop is None else drop.hidden(y)
        return functional.silu(self.leave(y))

    def _newest(self, sequence: Tensor) -> Tensor:
        """What the sequence (B, L, C) says of its newest bar, (B, state)."""
        if self.frames is not None:
            fused: Fused = self.frames([sequence, *(blocks(sequence, size) for size in BLOCKS)])
            return fused.state
        x = self.enter(sequence)  # (B, L, state)
        y = functional.gelu(self.first(x.transpose(1, 2)).transpose(1, 2))
        x = x + functional.glu(self.mix(y), -1)
        y = functional.gelu(self.second.newest(x.transpose(1, 2)))  # nothing reads earlier steps of it
        newest: Tensor = x[:, -1] + functional.glu(self.mix_newest(y), -1)
        return newest


def blocks(sequence: Tensor, size: int) -> Tensor:
    """The sequence (B, L, C) as bars of a higher timeframe, of `size` bars each, (B, L // size, C).

    The newest block ends with the newest bar, whatever the hour; bars too few for an oldest block are left
    out. Channels are those of `scaling.Frame`: a block's return is the sum over the root of `size`, so that
    it is as large as one bar's; its close lies where that of its last bar does; log range and log volume are
    means.
    """
    B, L, C = sequence.shape
    bars = sequence[:, L % size :].reshape(B, L // size, size, C)
    returns, ranges, locations, volumes = bars.unbind(-1)  # (B, L // size, size)
    columns = (returns.sum(-1) / size**0.5, ranges.mean(-1), locations[..., -1], volumes.mean(-1))
    return torch.stack(columns, -1)


class Fused(NamedTuple):
    """What the timeframes together say of the newest bar, and how much of it each of them says."""

    state: Tensor  # (B, width)
    importance: Tensor  # (B, T), with a sum of 1


class MultiScaleS4D(nn.Module):
    """One stack of S4D layers for each of T timeframes, and attention that fuses them.

    The query is the newest state of the first, the base timeframe; keys and values are the newest states of
    all. Timeframes may differ in length and in channels. Of one timeframe alone attention has no choice.
    """

    HEADS = 4

    def __init__(
        self, inputs: Sequence[int], width: int, poles: int, layers: int, generator: Generator
    ) -> None:
        """`inputs` are the channels of each timeframe, `width` (a multiple of 4) those of all states."""
        super().__init__()
        if not inputs or width % self.HEADS or layers < 1:
            raise ValueError(f"{len(inputs)} timeframes, width {width} and {layers} layers cannot be used")
        self.stacks = nn.ModuleList([_Stack(n, width, poles, layers, generator) for n in inputs])
        self.origin = nn.Parameter(torch.randn(len(inputs), width, generator=generator) / width**0.5)
        self.query = linear(width, width, generator)
        self.key = linear(width, width, generator).weight  # a bias would add the same to all keys
        self.value = linear(width, width, generator)
        self.leave = linear(width, width, generator)

    def forward(self, sequences: Sequence[Tensor]) -> Fused:
        """The sequences (B, L_k, C_k) of all timeframes, the base timeframe first -> what they say.

        Raise ValueError for another number of sequences, and for one without a step.
        """
        if len(sequences) != len(self.stacks):
            raise ValueError(f"{len(sequences)} sequences, not one for each of {len(self.stacks)} timeframes")
        for k, sequence in enumerate(sequences):
            if not sequence.shape[1]:
                raise ValueError(f"the sequence of timeframe {k} has no step: give more bars")
        pairs = zip(self.stacks, sequences, strict=True)
        states = torch.stack([stack(sequence) for stack, sequence in pairs], 1)  # (B, T, width)
        x = functional.layer_norm(states, states.shape[-1:]) + self.origin
        query = self._heads(self.query(x[:, :1]))  # (B, heads, 1, width / heads)
        key = self._heads(functional.linear(x, self.key))  # (B, heads, T, width / heads)
        value = self._heads(self.value(x))
        weights = torch.softmax(query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5, -1)  # (B, heads, 1, T)
        fused = (weights @ value).transpose(1, 2).flatten(1)  # (B, width)
        return Fused(states[:, 0] + self.leave(fused), weights[:, :, 0].mean(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.HEADS, -1).transpose(1, 2)


class _Stack(nn.Module):
    """Residual S4D layers over one sequence (B, L, C) -> what they say of its newest step, (B, width)."""

    def __init__(self, channels: int, width: int, poles: int, layers: int, generator: Generator) -> None:
        super().__init__()
        self.enter = linear(channels, width, generator)
        self.layers = nn.ModuleList([S4D(width, poles, generator) for _ in range(layers - 1)])
        self.mixes = nn.ModuleList([linear(width, 2 * width, generator) for _ in range(layers - 1)])
        self.last = S4D(width, poles, generator)
        self.mix = linear(width, 2 * width, generator)

    def forward(self, sequence: Tensor) -> Tensor:
        x = self.enter(sequence)  # (B, L, width)
        for layer, mix in zip(self.layers, self.mixes, strict=True):
            y = functional.gelu(layer(self._normal(x)).transpose(1, 2))
            x = x + functional.glu(mix(y), -1)
        y = functional.gelu(self.last.newest(self._normal(x)))  # nothing reads earlier steps of it
        newest: Tensor = x[:, -1] + functional.glu(self.mix(y), -1)
        return newest

    def _normal(self, x: Tensor) -> Tensor:
        """x (B, L, width), each step of size 1 -> (B, width, L)."""
        return functional.layer_norm(x, x.shape[-1:]).transpose(1, 2)
