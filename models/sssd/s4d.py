"""The structured state-space layer."""

from math import log, pi, sqrt

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


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
