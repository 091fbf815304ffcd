"""The network: a conditional quantile map, and a diffusion denoiser behind a structured state-space encoder.

An outcome z (log return over its scale, one number per horizon) is M(u): a monotone map of a normal score u,
shaped by the features of the bars; it is the average of the maps of several members. The scores of the
horizons are u = W w with W W' their correlation, and the diffusion model is one of w given the context c of
features and sequence. It starts at w ~ N(0, I), where the velocity that is to be predicted averages to zero
for every x_t: a denoiser that says zero IS the map alone, and it begins there.

Shapes: B origins, S samples, H horizons, M members, K knots, F features, L steps of a sequence of C channels.
"""

from dataclasses import dataclass
from math import log, pi, sqrt
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

PROBABILITIES = (
    *(0.002, 0.01, 0.025, 0.05, 0.1, 0.175, 0.25, 0.375, 0.5),
    *(0.625, 0.75, 0.825, 0.9, 0.95, 0.975, 0.99, 0.998),
)  # of the map's knots
BEND = 1.5  # the log of a knot spacing moves at most this far from that of the static map


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of the network."""

    features: int
    channels: int
    context: int  # L
    horizons: int  # H
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


def _uniform(shape: tuple[int, int, int], generator: Generator) -> Tensor:
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


class S4D(nn.Module):
    """Diagonal state-space layer, S4D-Lin with zero-order hold (Gu et al. 2022, arXiv:2206.11893).

    x' = A x + B u, y = 2 Re(C x) + D u, with A_n = -1/2 + i pi n at the start and B absorbed in C. The kernel
    is computed in complex128, and kept while the module is in eval mode.
    """

    def __init__(self, width: int, poles: int, generator: Generator) -> None:
        super().__init__()
        N = poles
        dt = torch.rand(width, generator=generator) * (log(0.3) - log(0.005)) + log(0.005)
        self.log_dt = nn.Parameter(dt)  # (H,)
        self.log_A_real = nn.Parameter(torch.full((width, N), log(0.5)))  # (H, N)
        self.A_imag = nn.Parameter(pi * torch.arange(N).float().repeat(width, 1))  # (H, N)
        self.C = nn.Parameter(torch.randn(width, N, 2, generator=generator) * sqrt(0.5))  # (H, N, 2)
        self.D = nn.Parameter(torch.randn(width, generator=generator))  # (H,)
        self._kernel: Tensor | None = None

    def discretise(self) -> tuple[Tensor, Tensor]:
        """Zero-order hold: exp(dt A) and C (exp(dt A) - 1) / A, both (H, N) complex128."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        dtA = self.log_dt.double().exp()[:, None] * A
        return torch.exp(dtA), torch.view_as_complex(self.C.double()) * (torch.exp(dtA) - 1) / A

    def kernel(self, L: int) -> Tensor:
        """The first L terms of the impulse response, (H, L) float32."""
        if self.training or self._kernel is None or self._kernel.shape[-1] != L:
            A, C = self.discretise()
            powers = torch.exp(torch.log(A)[..., None] * torch.arange(L, dtype=torch.float64))  # (H, N, L)
            self._kernel = 2 * torch.einsum("hn,hnl->hl", C, powers).real.float()
        return self._kernel

    def train(self, mode: bool = True) -> "S4D":
        """Switch the mode, and forget the kernel."""
        self._kernel = None
        super().train(mode)
        return self

    def forward(self, u: Tensor) -> Tensor:
        """Causal convolution of u (B, H, L) with the kernel, (B, H, L).

        It is a product with the kernel's Toeplitz matrix: for the tens of steps of a sequence a tenth of the
        time of a Fourier transform, the way back included.
        """
        L = u.shape[-1]
        lag = torch.arange(L) - torch.arange(L)[:, None]  # (L, L): of the column behind the row
        toeplitz = self._response(L)[:, lag.clamp(min=0)] * (lag >= 0)  # (H, L, L)
        y: Tensor = torch.bmm(u.transpose(0, 1), toeplitz).transpose(0, 1)
        return y

    def newest(self, u: Tensor) -> Tensor:
        """The last step of `forward`, (B, H)."""
        y: Tensor = torch.einsum("bhl,hl->bh", u, self._response(u.shape[-1]).flip(-1))
        return y

    def _response(self, L: int) -> Tensor:
        """The kernel and D, which acts without delay, (H, L)."""
        return self.kernel(L) + functional.pad(self.D[:, None], (0, L - 1))


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
        self.enter = nn.Parameter(_uniform((M, F, D), generator))
        self.enter_bias = nn.Parameter(torch.zeros(M, 1, D))
        self.hidden = nn.Parameter(_uniform((M, D, D), generator))
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


class Denoiser(nn.Module):
    """Velocity of the scores: residual blocks modulated by c and noise level (FiLM, Perez et al. 2018)."""

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
        D = a.denoiser
        self.time = linear(17, a.code, generator)
        self.film = linear(a.code, 2 * D * a.blocks, generator)
        self.enter = linear(a.horizons, D, generator)
        self.first = nn.ModuleList([linear(D, D, generator) for _ in range(a.blocks)])
        self.second = nn.ModuleList([linear(D, D, generator) for _ in range(a.blocks)])
        self.leave = linear(D, a.horizons, None)

    def modulation(self, c: Tensor, lam: Tensor, drop: Dropout | None = None) -> Tensor:
        """c (..., code) and lambda = log(alpha / sigma) (...) -> scales and shifts (..., 2 D blocks)."""
        phase = lam[..., None] * (pi / 8) * torch.arange(1, 9)
        time = torch.cat([lam[..., None] / 4, torch.sin(phase), torch.cos(phase)], -1)
        c = c if drop is None else drop.hidden(c)
        film: Tensor = self.film(functional.silu(c + self.time(time)))
        return film

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x_t (..., H) and its modulation (..., 2 D blocks), broadcast -> v (..., H)."""
        y = self.enter(x)
        parts = film.chunk(2 * len(self.first), -1)
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            z = functional.layer_norm(y, y.shape[-1:]) * (1 + parts[2 * i]) + parts[2 * i + 1]
            y = y + second(functional.silu(first(z)))
        v: Tensor = self.leave(functional.silu(y))
        return v


class SSSD(nn.Module):
    """All that a checkpoint stores as weights.

    `whiten` (H, H) is the Cholesky factor W of the scores' correlation, `noise` (S, H) the fixed standard
    normals from which every forecast starts.
    """

    whiten: Tensor
    noise: Tensor

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
        self.architecture = a
        self.map = QuantileMap(a, generator)
        self.encoder = Encoder(a, generator)
        self.denoiser = Denoiser(a, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        self.register_buffer("whiten", torch.eye(a.horizons))
        self.register_buffer("noise", sobol_normals(a.samples, a.horizons, seed))


def sobol_normals(samples: int, dimensions: int, seed: int) -> Tensor:
    """Scrambled Sobol points as standard normals, (S, dimensions) float32 (Owen 1998)."""
    engine = torch.quasirandom.SobolEngine(dimensions, True, seed)  # type: ignore[no-untyped-call]
    points = engine.draw(samples, dtype=torch.float64)
    normals: Tensor = torch.special.ndtri(points.clamp(2**-31, 1 - 2**-31)).float()
    return normals


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
