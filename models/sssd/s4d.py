"""The structured state-space layer."""

from collections.abc import Callable
from math import log, pi, sqrt

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

DIRECT = 128  # steps up to which the convolution is a product with a matrix
LOG_DT, LOG_DECAY = (-9.0, 2.0), (-9.0, 4.0)  # within which logs of dt and of -Re A count: exp(dt A) > 0


class S4D(nn.Module):
    """Diagonal state-space layer, S4D-Lin with zero-order hold (Gu et al. 2022, arXiv:2206.11893).

    x' = A x + B u, y = 2 Re(C x) + D u, with A_n = -1/2 + i pi n at the start and B absorbed in C. Re A is
    below zero whatever the weights. The kernel is computed in complex128; it and what is made of it are kept
    while the module is in eval mode and nothing is learnt.
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
        self._kept: dict[str, tuple[int, Tensor]] = {}

    def poles(self) -> Tensor:
        """A, (H, N) complex128."""
        real = -self.log_A_real.double().clamp(*LOG_DECAY).exp()
        return torch.complex(real, self.A_imag.double())

    def discretise(self) -> tuple[Tensor, Tensor]:
        """Zero-order hold: exp(dt A) and C (exp(dt A) - 1) / A, both (H, N) complex128."""
        A = self.poles()
        dtA = self.log_dt.double().clamp(*LOG_DT).exp()[:, None] * A
        return torch.exp(dtA), torch.view_as_complex(self.C.double()) * (torch.exp(dtA) - 1) / A

    def kernel(self, L: int) -> Tensor:
        """The first L terms of the impulse response, (H, L) float32."""
        return self._once("kernel", L, self._computed)

    def train(self, mode: bool = True) -> "S4D":
        """Switch the mode, and forget the kernel."""
        self._kept = {}
        super().train(mode)
        return self

    def forward(self, u: Tensor) -> Tensor:
        """Causal convolution of u (B, H, L) with the kernel, (B, H, L).

        For the tens of steps of a sequence it is a product with the kernel's Toeplitz matrix, which takes two
        thirds of the time of a Fourier transform for a batch of 256, the way back included. From about 128
        steps on the transform is faster, and the matrix would grow with the square of the steps.
        """
        L = u.shape[-1]
        y: Tensor
        if L > DIRECT:  # of twice the length, so that the end does not reach round to the beginning
            spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(self._response(L), n=2 * L)
            y = torch.fft.irfft(spectrum, n=2 * L)[..., :L]
            return y
        rows = u.transpose(0, 1).contiguous()  # with other strides one row takes seven times as long
        y = torch.bmm(rows, self._once("toeplitz", L, self._toeplitz)).transpose(0, 1)
        return y

    def newest(self, u: Tensor) -> Tensor:
        """The last step of `forward`, (B, H)."""
        latest = self._once("latest", u.shape[-1], lambda L: self._response(L).flip(-1))
        y: Tensor = torch.einsum("bhl,hl->bh", u, latest)
        return y

    def step(self, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence: u (B, H) and the state x (B, H, N) before -> y (B, H) and the state.

        Without a state it is the first. Steps from the first on give what `forward` gives.
        """
        A, C = self.discretise()
        x = u[..., None] + (0 if x is None else A * x)
        return (2 * (C * x).sum(-1).real + self.D * u).float(), x

    def _computed(self, L: int) -> Tensor:
        A, C = self.discretise()
        lag = torch.arange(L, dtype=torch.float64, device=A.device)
        powers = torch.exp(torch.log(A)[..., None] * lag)  # (H, N, L)
        return 2 * torch.einsum("hn,hnl->hl", C, powers).real.float()

    def _once(self, name: str, L: int, make: Callable[[int], Tensor]) -> Tensor:
        """What is made of the weights for L steps."""
        if self.training or torch.is_grad_enabled():  # its graph serves one way back
            return make(L)
        kept = self._kept.get(name)
        if kept is None or kept[0] != L:
            kept = self._kept[name] = L, make(L)
        return kept[1]

    def _toeplitz(self, L: int) -> Tensor:
        """The convolution with the response as matrices of each channel, (H, L, L)."""
        step = torch.arange(L, device=self.D.device)
        lag = step - step[:, None]  # (L, L): of the column behind the row
        return self._response(L)[:, lag.clamp(min=0)] * (lag >= 0)

    def _response(self, L: int) -> Tensor:
        """The kernel and D, which acts without delay, (H, L)."""
        return self.kernel(L) + functional.pad(self.D[:, None], (0, L - 1))
