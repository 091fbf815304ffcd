"""The latent of a window: an image of four channels that the returns can be read from again.

Bar k of a window stands in row k // W and column k % W. The channels are the return over the volatility
around it, the size of that, the way so far, and the logarithm of the volatility around it. First and last
together are the returns; the other two say the same in another way, for networks and losses.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from barcast.models.transfer.regimes import BARS

CHANNELS = ("return", "size", "path", "volatility")
HEIGHT = WIDTH = 16
assert HEIGHT * WIDTH == BARS
REACH, BANDWIDTH = 12, 4.0  # bars on each side that the volatility around a bar is a mean of
QUIET = 0.05  # of the mean size of a window: what the volatility around a bar is at least, beside its mean
DITHER = (0.1, 0.2, 0.2, 0.2)
"""Noise of each channel, in deviations, beside what it is made of.

The channels follow from one another, and some are smooth: without it there would be no way back from a
window to noise of full variance.
"""
FAR = 8.0  # deviations: no channel of what is generated counts as farther


def around(r: Tensor) -> Tensor:
    """The volatility around each bar of some windows: a weighted mean of sizes, mirrored at the ends.

    Returns (B, N) of windows that move -> (B, N), above 0.
    """
    size = r.abs()
    at = torch.arange(-REACH, REACH + 1, dtype=r.dtype, device=r.device)
    weight = torch.exp(-0.5 * (at / BANDWIDTH) ** 2)
    weight = (weight / weight.sum()).expand(1, 1, -1)
    padded = functional.pad(size[:, None], (REACH, REACH), mode="reflect")
    mean: Tensor = functional.conv1d(padded, weight)[:, 0]
    return mean + QUIET * size.mean(1, keepdim=True)


def channels(r: Tensor) -> Tensor:
    """Returns (B, N) of windows that move -> the channels as they are, (B, 4, H, W)."""
    level = around(r)
    shape = r / level
    path = r.cumsum(1) / (r.square().sum(1, keepdim=True)).sqrt()
    parts = torch.stack([shape, shape.abs(), path, level.log()], 1)
    return parts.reshape(*parts.shape[:2], HEIGHT, WIDTH)


@dataclass(frozen=True, slots=True, eq=False)
class LatentScale:
    """Mean and deviation of each channel, (4,) float64: measured, and stored with the model."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def measure(cls, r: Tensor) -> "LatentScale":
        """The scale by which the channels of some returns (n, N) have mean 0 and variance 1."""
        parts = channels(r.double())
        return cls(parts.mean((0, 2, 3)), parts.std((0, 2, 3)).clamp(min=1e-6))

    def encode(self, r: Tensor) -> Tensor:
        """Returns (B, N) over what is usual -> latents (B, 4, H, W) float32."""
        return self._scaled(channels(r.double())).float()

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 4, H, W) -> returns (B, N) float64, over what is usual."""
        shape, level = self.parts(x)
        return shape * level

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What returns are the product of: shapes (B, N) and volatilities around each bar (B, N), float64."""
        x = x.double().clamp(-FAR, FAR)
        shape, level = x[:, 0].flatten(1), x[:, 3].flatten(1)
        return (
            shape * self.deviation[0] + self.mean[0],
            (level * self.deviation[3] + self.mean[3]).exp(),
        )

    def consistent(self, x: Tensor) -> Tensor:
        """Latents whose four channels are of the returns that they are read as, (B, 4, H, W)."""
        return self.encode(self.decode(x))

    def _scaled(self, parts: Tensor) -> Tensor:
        return (parts - self.mean[:, None, None]) / self.deviation[:, None, None]


def dithered(x: Tensor, generator: Generator) -> Tensor:
    """Latents (B, 4, H, W) with a little noise of their own, see `DITHER`."""
    return x + torch.tensor(DITHER)[:, None, None] * torch.randn(x.shape, generator=generator)
