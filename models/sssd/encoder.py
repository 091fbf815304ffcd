"""What the network knows of the bars: features and sequence -> context."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models.sssd.layers import Architecture, Dropout, linear
from barcast.models.sssd.s4d import S4D


class Encoder(nn.Module):
    """Rolling features and the sequence of the last bars -> context c."""

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
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
        x = self.enter(sequence)  # (B, L, state)
        y = functional.gelu(self.first(x.transpose(1, 2)).transpose(1, 2))
        x = x + functional.glu(self.mix(y), -1)
        y = functional.gelu(self.second.newest(x.transpose(1, 2)))  # nothing reads earlier steps of it
        last = x[:, -1] + functional.glu(self.mix_newest(y), -1)  # (B, state)
        if drop is not None:
            features = drop.inputs(features)
            last = drop.inputs(last)
        y = functional.silu(self.features(features))  # (B, width)
        y = y if drop is None else drop.hidden(y)
        y = functional.silu(self.hidden(torch.cat([y, last], -1)))
        y = y if drop is None else drop.hidden(y)
        return functional.silu(self.leave(y))
