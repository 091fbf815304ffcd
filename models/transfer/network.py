"""The velocity network, and the solvers that follow it: from a latent to noise, and from noise to a latent.

x_t = (1 - t) noise + t latent, and the velocity is latent - noise (flow matching: Lipman et al. 2023, Liu et
al. 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import log, sqrt

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from barcast.models.errors import ConfigError
from barcast.models.sssd.layers import linear
from barcast.models.transfer.latent import CHANNELS
from barcast.models.transfer.regimes import REGIMES

NULL = len(REGIMES)
"""The token of no regime in particular."""
FULL = 3.0
"""The severity that is the regime in full, as it was learnt."""
WAVES = 16  # of the time's embedding

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, 4, H, W), t (B,)) -> velocity, of x's shape."""


@dataclass(frozen=True, slots=True)
class TransferArchitecture:
    """Sizes of the network; raises `ConfigError` for any it cannot have."""

    width: int = 32  # channels at every bar; twice as many at every fourth, three times at every sixteenth
    code: int = 64  # of time and regime

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 8 <= value <= 1024 or value % 8:
                raise ConfigError(f"architecture.{field.name} is {value!r}, not a multiple of 8 up to 1024")

    @property
    def least(self) -> int:
        """A count that the network's weights are never below: what a file must hold for it."""
        return self.width**2 + self.code**2


class VelocityNetwork(nn.Module):
    """A U-Net along the bars: (B, 4, H, W), t (B,) and regimes (B,) -> velocity (B, 4, H, W).

    Regimes are places in `REGIMES`, or `NULL`. The last layer begins at zero: so does the velocity.
    """

    def __init__(self, a: TransferArchitecture, generator: Generator) -> None:
        super().__init__()
        self.architecture = a
        w, C = a.width, len(CHANNELS)
        self.regime = nn.Parameter(torch.randn(NULL + 1, a.code, generator=generator) / 2)
        self.time = linear(2 * WAVES, a.code, generator)
        self.told = linear(a.code, a.code, generator)
        self.enter = _convolution(C, w, 5, 1, generator)
        self.down = nn.ModuleList(
            [_convolution(w, 2 * w, 4, 4, generator), _convolution(2 * w, 3 * w, 4, 4, generator)]
        )
        self.fine, self.middle, self.deep = (_Block(k * w, a.code, generator) for k in (1, 2, 3))
        self.deepest = _Block(3 * w, a.code, generator)
        self.up = nn.ModuleList(
            [_convolution(3 * w, 2 * w, 1, 1, generator), _convolution(2 * w, w, 1, 1, generator)]
        )
        self.middle_again, self.fine_again = _Block(2 * w, a.code, generator), _Block(w, a.code, generator)
        self.leave = _convolution(w, C, 5, 1, None)

    def forward(self, x: Tensor, t: Tensor, regime: Tensor) -> Tensor:
        """The velocity of latents on their way."""
        at = t[:, None] * torch.exp(torch.linspace(0.0, log(100.0), WAVES, device=t.device))
        code = self.told(functional.silu(self.time(torch.cat([at.sin(), at.cos()], 1)) + self.regime[regime]))
        code = functional.silu(code)
        fine = self.fine(self.enter(x.flatten(2)), code)  # (B, w, N)
        middle = self.middle(self.down[0](fine), code)  # (B, 2 w, N / 4)
        deep = self.deepest(self.deep(self.down[1](middle), code), code)  # (B, 3 w, N / 16)
        middle = self.middle_again(middle + _stretched(self.up[0](deep)), code)
        fine = self.fine_again(fine + _stretched(self.up[1](middle)), code)
        v: Tensor = self.leave(functional.silu(fine))
        return v.reshape(x.shape)


class _Block(nn.Module):
    """Two convolutions, the first modulated by the code, beside what goes in."""

    def __init__(self, width: int, code: int, generator: Generator) -> None:
        super().__init__()
        self.first, self.second = (_convolution(width, width, 5, 1, generator) for _ in range(2))
        self.modulate = linear(code, 2 * width, generator)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        gain, shift = self.modulate(code)[..., None].chunk(2, 1)
        y = self.first(functional.silu(functional.group_norm(x, 8)))
        found: Tensor = (x + self.second(functional.silu(y * (1 + gain) + shift))) / sqrt(2)
        return found


def _convolution(n_in: int, n_out: int, size: int, stride: int, generator: Generator | None) -> nn.Conv1d:
    """A convolution along the bars; zero without a generator."""
    layer: nn.Conv1d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv1d, n_in, n_out, size, stride=stride, padding=size // 2 if stride == 1 else 0
    )
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.zero_()
        if generator is None:
            layer.weight.zero_()
        else:
            reach = sqrt(3 / (size * n_in))
            layer.weight.uniform_(-reach, reach, generator=generator)
    return layer


def _stretched(x: Tensor) -> Tensor:
    return x.repeat_interleave(4, 2)


def strength(cfg_scale: float) -> float:
    """How much of the way into a regime a severity goes: 0, 0.70, 0.96 and 1 at 0 to 3, beyond it above."""
    part = cfg_scale / FULL
    return 1 - (1 - part) ** 3 if part < 1 else part


def guided(net: nn.Module, regime: Tensor, cfg_scale: float) -> Velocity:
    """The velocity towards regimes (B,), by classifier-free guidance (Ho and Salimans 2022).

    Its weight is the `strength` of `cfg_scale`: with 3 the velocity is that of the regime as it was learnt,
    with 0 that of no regime in particular, and above 3 it goes beyond.
    """
    null, weight = torch.full_like(regime, NULL), strength(cfg_scale)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if weight in (0, 1):
            v: Tensor = net(x, t, regime if weight else null)
            return v
        free, told = net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([null, regime])).chunk(2)
        return torch.lerp(free, told, weight)

    return velocity


def travel(
    velocity: Velocity, x: Tensor, start: float, stop: float, steps: int, solver: str, keep: bool = True
) -> Tensor:
    """Follow a velocity from one time to another in even steps, by Euler's or Heun's method.

    Without `keep` a step's activations are computed again when gradients are asked for, so that memory hardly
    grows with the steps.
    """
    h = (stop - start) / steps

    def step(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        if solver == "heun":
            v = (v + velocity(x + h * v, t + h)) / 2
        return x + h * v

    for k in range(steps):
        t = x.new_full((len(x),), start + k * h)
        x = step(x, t) if keep else checkpoint(step, x, t, use_reentrant=False)
    return x
