"""The denoiser's head: what velocity the scores have, given context and noise level."""

from math import pi

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models.sssd.layers import Architecture, Dropout, linear


class Denoiser(nn.Module):
    """Velocity of the scores: residual blocks modulated by c and noise level (FiLM, Perez et al. 2018)."""

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
        D = a.denoiser
        self.time = linear(17, a.code, generator)
        self.film = linear(a.code, 2 * D * a.blocks, generator)
        self.enter = linear(a.path, D, generator)
        self.first = nn.ModuleList([linear(D, D, generator) for _ in range(a.blocks)])
        self.second = nn.ModuleList([linear(D, D, generator) for _ in range(a.blocks)])
        self.leave = linear(D, a.path, None)

    def modulation(self, c: Tensor, lam: Tensor, drop: Dropout | None = None) -> Tensor:
        """c (..., code) and lambda = log(alpha / sigma) (...) -> scales and shifts (..., 2 D blocks)."""
        phase = lam[..., None] * (pi / 8) * torch.arange(1, 9)
        time = torch.cat([lam[..., None] / 4, torch.sin(phase), torch.cos(phase)], -1)
        c = c if drop is None else drop.hidden(c)
        film: Tensor = self.film(functional.silu(c + self.time(time)))
        return film

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x_t (..., G) and its modulation (..., 2 D blocks), broadcast -> v (..., G)."""
        y = self.enter(x)
        parts = film.chunk(2 * len(self.first), -1)
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            z = functional.layer_norm(y, y.shape[-1:]) * (1 + parts[2 * i]) + parts[2 * i + 1]
            y = y + second(functional.silu(first(z)))
        v: Tensor = self.leave(functional.silu(y))
        return v
