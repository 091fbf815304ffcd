"""The conditional quantile map of each horizon."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models.sssd.layers import Architecture, Dropout, uniform

PROBABILITIES = (
    *(0.002, 0.01, 0.025, 0.05, 0.1, 0.175, 0.25, 0.375, 0.5),
    *(0.625, 0.75, 0.825, 0.9, 0.95, 0.975, 0.99, 0.998),
)  # of the map's knots
BEND = 1.5  # the log of a knot spacing moves at most this far from that of the static map


class QuantileMap(nn.Module):
    """Knots of the monotone map M: u -> z, linear between them and beyond the outermost.

    The knots sit at the normal scores of `PROBABILITIES`. Each member is a perceptron of its own that moves
    the median knot and scales the spacings of its static map, which was learnt from all of its outcomes; it
    starts at zero. Parameters have the members first.
    """

    static: Tensor

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
        self.K, self.H, self.M = len(PROBABILITIES), a.horizons, a.members
        M, F, D, out = a.members, a.features, a.width, a.horizons * (self.K + 1)
        self.enter = nn.Parameter(uniform((M, F, D), generator))
        self.enter_bias = nn.Parameter(torch.zeros(M, 1, D))
        self.hidden = nn.Parameter(uniform((M, D, D), generator))
        self.hidden_bias = nn.Parameter(torch.zeros(M, 1, D))
        self.head = nn.Parameter(torch.zeros(M, D, out))
        self.head_bias = nn.Parameter(torch.zeros(M, 1, out))
        rising = torch.arange(self.K).float().repeat(M, self.H, 1)
        self.register_buffer("static", rising)  # (M, H, K)

    def forward(self, features: Tensor, drop: Dropout | None = None) -> Tensor:
        """features of each member (B, M, F) -> its knots z_k, rising in k, (B, M, H, K)."""
        x = features if drop is None else drop.inputs(features)
        for weight, bias in ((self.enter, self.enter_bias), (self.hidden, self.hidden_bias)):
            y = torch.baddbmm(bias, x.transpose(0, 1), weight)  # (M, B, width)
            x = functional.silu(y).transpose(0, 1)
            x = x if drop is None else drop.hidden(x)
        out = torch.baddbmm(self.head_bias, x.transpose(0, 1), self.head).transpose(0, 1)
        out = out.reshape(-1, self.M, self.H, self.K + 1)
        shift, spread, shape = out[..., :1], out[..., 1:2], out[..., 2:]
        bend = BEND * torch.tanh((spread + shape) / BEND)
        step = torch.diff(self.static, dim=-1) * torch.exp(bend)  # (B, M, H, K - 1)
        rise = functional.pad(torch.cumsum(step, -1), (1, 0))  # from the lowest knot
        m = self.K // 2
        knots: Tensor = self.static[..., m : m + 1] + shift + rise - rise[..., m : m + 1]
        return knots

    def of_members(self, features: Tensor) -> Tensor:
        """features (B, F) -> the knots that every member gives to them, (B, M, H, K)."""
        knots: Tensor = self(features[:, None].expand(-1, self.M, -1))
        return knots

    def average(self, features: Tensor) -> Tensor:
        """features (B, F) -> the map's knots, the mean of its members', (B, H, K) float64."""
        return self.of_members(features).double().mean(1)


def piecewise(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The rising function through the knots (xs, ys) (..., K) at x (..., n), linear also beyond them."""
    at = torch.searchsorted(xs[..., 1:-1].contiguous(), x.contiguous())  # (..., n): the segment
    x0, x1 = xs.gather(-1, at), xs.gather(-1, at + 1)
    y0, y1 = ys.gather(-1, at), ys.gather(-1, at + 1)
    return y0 + (x - x0) * ((y1 - y0) / (x1 - x0))


def knot_scores() -> Tensor:
    """Normal scores of the map's knots, (K,) float64."""
    scores: Tensor = torch.special.ndtri(torch.tensor(PROBABILITIES, dtype=torch.float64))
    return scores
