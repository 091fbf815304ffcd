"""The denoiser's head: what velocity the scores have, given context and noise level."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import pi
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models.errors import ConfigError
from barcast.models.sssd.layers import Architecture, Dropout, convolution, linear

Asked: TypeAlias = Callable[[Tensor], Callable[[Tensor, int], Tensor]]
"""Of contexts, of x_t and the place of its noise level: a velocity."""
FLOOR = 0.05  # of the mean square whose logarithm is taken


class Denoiser(nn.Module):
    """Velocity of the scores: layers modulated by c and noise level (FiLM, Perez et al. 2018).

    A head takes x_t (..., G) and its modulation, broadcast, and gives v (..., G). It says zero until it has
    learnt: its last layer, `leave`, begins at zero.
    """

    leave: nn.Linear

    def __init__(self, a: Architecture, scales: int, generator: Generator) -> None:
        """`scales` is how many channels are modulated in all."""
        super().__init__()
        self.time = linear(17, a.code, generator)
        self.film = linear(a.code, 2 * scales, generator)

    def modulation(self, c: Tensor, lam: Tensor, drop: Dropout | None = None) -> Tensor:
        """c (..., code) and lambda = log(alpha / sigma) (...) -> scales and shifts (..., 2 scales)."""
        c = c if drop is None else drop.hidden(c)
        film: Tensor = self.film(functional.silu(c + self._embedded(lam)))
        return film

    def at(self, lam: Tensor) -> Asked:
        """What a sampler asks at noise levels lambda (n,); what depends on these alone is worked out once.

        It is asked with contexts c (B, code), and then with x_t (..., B, S, G) and i for the i-th level: v of
        that shape.
        """
        film = self._levels(lam)

        def of(c: Tensor) -> Callable[[Tensor, int], Tensor]:
            parts = film(c)
            return lambda x, i: self(x, parts[i])

        return of

    def _levels(self, lam: Tensor) -> Callable[[Tensor], Tensor]:
        """The modulation of contexts (B, code) at noise levels (n,), (n, B, 1, 2 scales)."""
        time = self._embedded(lam[:, None])  # (n, 1, code)
        return lambda c: self.film(functional.silu(c + time))[:, :, None]

    def _embedded(self, lam: Tensor) -> Tensor:
        """Lambda (...) as the layers see it, (..., code)."""
        phase = lam[..., None] * (pi / 8) * torch.arange(1, 9, device=lam.device)
        time: Tensor = self.time(torch.cat([lam[..., None] / 4, torch.sin(phase), torch.cos(phase)], -1))
        return time


class MLP(Denoiser):
    """Residual blocks over all steps at once.

    They also see the size of x_t: a path is volatile, or calm, in all of its steps together.
    """

    def __init__(self, a: Architecture, generator: Generator) -> None:
        D = a.denoiser
        super().__init__(a, D * a.blocks, generator)
        self.enter = linear(a.path + 1, D, generator)
        self.first = nn.ModuleList([linear(D, D, generator) for _ in range(a.blocks)])
        self.second = nn.ModuleList([linear(D, D, generator) for _ in range(a.blocks)])
        self.leave = linear(D, a.path, None)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """See `Denoiser`."""
        parts = film.chunk(2 * len(self.first), -1)
        return self._layers()(x, [1 + scale for scale in parts[::2]], parts[1::2])

    def at(self, lam: Tensor) -> Asked:
        """See `Denoiser`: the bits of `forward`."""
        film, layers, blocks = self._levels(lam), self._layers(), len(self.first)

        def of(c: Tensor) -> Callable[[Tensor, int], Tensor]:
            parts = film(c)
            parts = parts.view(*parts.shape[:3], blocks, 2, -1)  # (n, B, 1, blocks, 2, D)
            scale, shift = parts.permute(4, 0, 3, 1, 2, 5)  # (n, blocks, B, 1, D) each
            scales, shifts = (1 + scale).unbind(), shift.unbind()
            return lambda x, i: layers(x, scales[i], shifts[i])

        return of

    def _layers(self) -> Callable[[Tensor, Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor], Tensor]:
        """The layers as a function of x_t, and of what scales and shifts each block, (..., D).

        Calling modules, and the constants of each layer, took a third of the time of a path. To normalise by
        ones and zeros gives the bits of a normalisation without them, in half of its time.
        """
        linear, normal = functional.linear, torch.layer_norm
        enter, leave = ((layer.weight, layer.bias) for layer in (self.enter, self.leave))
        pairs: Iterable[tuple[Any, Any]] = zip(self.first, self.second, strict=True)  # of linear layers
        blocks = [(first.weight, first.bias, second.weight, second.bias) for first, second in pairs]
        D = (len(self.enter.bias),)
        ones, zeros, floor = enter[0].new_ones(D), enter[0].new_zeros(D), enter[0].new_tensor(FLOOR)

        def velocity(
            x: Tensor, scales: Sequence[Tensor] | Tensor, shifts: Sequence[Tensor] | Tensor
        ) -> Tensor:
            size = torch.log((x * x).mean(-1, keepdim=True) + floor)
            y = linear(torch.cat([x, size], -1), *enter)
            for scale, shift, (w1, b1, w2, b2) in zip(scales, shifts, blocks, strict=True):
                z = normal(y, D, ones, zeros) * scale + shift
                y = y + linear(functional.silu(linear(z, w1, b1)), w2, b2)
            return linear(functional.silu(y), *leave)

        return velocity


class UNet1D(Denoiser):
    """Convolutions along the path, from all of its steps to every eighth (Ronneberger et al. 2015).

    On the way down each second step and its neighbours become one, on the way up each is two again, beside
    what was there on the way down: any number of steps will do. Every step has an embedding of its own, by
    which the head knows where on the path it is.
    """

    def __init__(self, a: Architecture, generator: Generator) -> None:
        fine = [-(-a.denoiser // 2), a.denoiser, 2 * a.denoiser]
        widths = [*fine, 4 * a.denoiser, *reversed(fine)]
        super().__init__(a, a.blocks * sum(widths), generator)
        self.scales = [2 * n for n in widths for _ in range(a.blocks)]
        down, up = list(pairwise(widths[:4])), list(pairwise(widths[3:]))
        self.enter = convolution(1, fine[0], generator)
        self.step = nn.Parameter(torch.randn(fine[0], a.path, generator=generator))
        self.down = nn.ModuleList([_Blocks(n, n, a.blocks, generator) for n in fine])
        self.shrink = nn.ModuleList([convolution(*pair, generator, stride=2) for pair in down])
        self.middle = _Blocks(widths[3], widths[3], a.blocks, generator)
        self.grow = nn.ModuleList([convolution(*pair, generator) for pair in up])
        self.up = nn.ModuleList([_Blocks(2 * n, n, a.blocks, generator) for _, n in up])
        self.leave = linear(fine[0], 1, None)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """See `Denoiser`."""
        film = film.expand(*x.shape[:-1], -1).reshape(-1, film.shape[-1], 1)
        parts = iter(torch.split(film, self.scales, 1))
        y = self.enter(x.reshape(-1, 1, x.shape[-1])) + self.step  # (n, denoiser / 2, G)
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(blocks(y, parts))
            y = shrink(skips[-1])
        y = self.middle(y, parts)
        for blocks, grow, skip in zip(self.up, self.grow, reversed(skips), strict=True):
            y = y.repeat_interleave(2, -1)[..., : skip.shape[-1]]
            y = blocks(torch.cat([grow(y), skip], 1), parts)
        v: Tensor = self.leave(functional.silu(y).transpose(1, 2))
        return v.reshape(x.shape)


class _Blocks(nn.ModuleList):
    """Residual blocks one after another, each with its part of the modulation."""

    def __init__(self, n_in: int, n_out: int, count: int, generator: Generator) -> None:
        super().__init__([_Block(n_out if i else n_in, n_out, generator) for i in range(count)])

    def forward(self, x: Tensor, parts: Iterator[Tensor]) -> Tensor:
        for block in self:
            x = block(x, next(parts))
        return x


class _Block(nn.Module):
    """Two convolutions of x (n, n_in, L), the second modulated, beside x itself -> (n, n_out, L)."""

    def __init__(self, n_in: int, n_out: int, generator: Generator) -> None:
        super().__init__()
        self.first = convolution(n_in, n_out, generator)
        self.second = convolution(n_out, n_out, generator)
        self.beside = nn.Identity() if n_in == n_out else convolution(n_in, n_out, generator, reach=0)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film.chunk(2, 1)
        y = self.first(functional.silu(functional.group_norm(x, 1)))
        y = functional.group_norm(y, 1) * (1 + scale) + shift
        z: Tensor = self.beside(x) + self.second(functional.silu(y))
        return z


def build_head(a: Architecture, generator: Generator) -> Denoiser:
    """The head that an architecture names."""
    return {"mlp": MLP, "unet1d": UNet1D}[a.head](a, generator)


class HorizonEmbedding(nn.Module):
    """What distinguishes one horizon from another: log-spaced waves of its length, and a layer of them.

    Lengths are counted in anything, such as minutes; those that are known are given once, and are learnt.
    """

    waves: Tensor

    def __init__(self, horizons: Sequence[int], width: int, generator: Generator) -> None:
        super().__init__()
        if not horizons or len(set(horizons)) < len(horizons) or min(horizons) < 1:
            raise ConfigError(f"horizons {tuple(horizons)} cannot be used: give different lengths above 0")
        self.horizons = tuple(horizons)
        length = torch.tensor(self.horizons, dtype=torch.float64).log()[:, None]  # (n, 1)
        phase = length * (pi / 12) * torch.arange(1, 9)  # the slowest turns once from a minute to centuries
        waves = torch.cat([length / 4, torch.sin(phase), torch.cos(phase)], -1)
        self.register_buffer("waves", waves.float(), persistent=False)  # (n, 17)
        self.layer = linear(waves.shape[-1], width, generator)

    def forward(self, horizons: Sequence[int]) -> Tensor:
        """The embedding of some of the known horizons, in their order, (H, width).

        Raise `ConfigError` for a horizon that is not known.
        """
        for h in horizons:
            if h not in self.horizons:
                known = ", ".join(map(str, self.horizons))
                raise ConfigError(f"horizon {h} is unknown: take from {known}, or train another model")
        table: Tensor = self.layer(self.waves)  # of all: a row does not depend on those asked for
        return table[[self.horizons.index(h) for h in horizons]]
