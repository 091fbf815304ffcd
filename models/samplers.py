"""Deterministic diffusion samplers, written out with coefficients computed beforehand.

A sampler is a function of a velocity and a noise; schedule, grid of timesteps and network are kept
apart from it. The schedule is the cosine one of Nichol and Dhariwal (2021), called `squaredcos_cap_v2` in
diffusers; models predict v = alpha eps - sigma x0 (Salimans and Ho 2022). Steps are uniform in log-SNR, since
the usual spacings shrink narrow distributions. Arithmetic is float32 in the order of diffusers' `step()`, to
which the tests tie it bit by bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor

from barcast.models.errors import ConfigError

SCHEDULE = "squaredcos_cap_v2"
PREDICTION = "v_prediction"
TIMESTEPS = 1000
SIGMA_MAX, SIGMA_MIN = 20.0, 0.02  # noise over signal at the two ends of the grid

Velocity = Callable[[Tensor, int], Tensor]
"""(x_t, i) -> v: the predicted velocity, of x_t's shape, at the i-th timestep of the grid."""

Run = Callable[[Velocity, Tensor], Tensor]
"""(velocity, noise) -> x_0, of the noise's shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """A sampler on its grid: `lambdas` (NFE,) float64 are log(alpha / sigma) of each evaluation, in order."""

    lambdas: Tensor
    run: Run

    @property
    def evaluations(self) -> int:
        """How often the velocity is asked for."""
        return len(self.lambdas)


def alphas_cumprod() -> Tensor:
    """The squared signal level alpha_t^2 of the schedule, (1000,) float32."""

    def alpha_bar(t: float) -> float:
        return cos((t + 0.008) / 1.008 * pi / 2) ** 2

    T = TIMESTEPS
    betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), 0)


def lambdas() -> Tensor:
    """Half the log signal-to-noise ratio, log(alpha_t / sigma_t), falling, (1000,) float64."""
    a = alphas_cumprod().double()
    return 0.5 * torch.log(a / (1 - a))


def grid(steps: int) -> list[int]:
    """Integer timesteps, falling, as near as they come to a grid uniform in log-SNR."""
    table = lambdas()
    first = int((table + torch.log(torch.tensor(SIGMA_MAX))).abs().argmin())
    last = int((table + torch.log(torch.tensor(SIGMA_MIN))).abs().argmin())
    if not 1 < steps <= (first - last) // 2:
        raise ConfigError(f"steps = {steps} cannot be sampled: choose 2 to {(first - last) // 2}")
    wanted = torch.linspace(float(table[first]), float(table[last]), steps, dtype=torch.float64)
    timesteps = (table[None] - wanted[:, None]).abs().argmin(1).tolist()
    for i in range(steps - 2, -1, -1):  # near the end a grid step may be finer than a timestep
        timesteps[i] = max(timesteps[i], timesteps[i + 1] + 1)
    return [int(t) for t in timesteps]


def ddim(timesteps: Sequence[int]) -> Run:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12), ending at x_0."""
    a = alphas_cumprod()
    here = a[list(timesteps)]
    after = torch.cat([here[1:], torch.ones(1)])
    alphas, sigmas = (here**0.5).tolist(), ((1 - here) ** 0.5).tolist()
    alphas_after, sigmas_after = (after**0.5).tolist(), ((1 - after) ** 0.5).tolist()

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        for i, (alpha, sigma) in enumerate(zip(alphas, sigmas, strict=True)):
            v = velocity(x, i)
            x0 = alpha * x - sigma * v
            eps = alpha * v + sigma * x
            x = alphas_after[i] * x0 + sigmas_after[i] * eps
        return x

    return run


def dpmpp(timesteps: Sequence[int]) -> Run:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, alg. 2); the first and the last step are first order."""
    a = alphas_cumprod()
    ratio = ((1 - a) / a) ** 0.5  # sigma_t / alpha_t
    s = torch.cat([ratio[list(timesteps)], torch.zeros(1)])
    alpha = 1 / ((s**2 + 1) ** 0.5)
    sigma = s * alpha
    lam = torch.log(alpha) - torch.log(sigma)  # infinite at the end
    h = lam[1:] - lam[:-1]
    keep = (sigma[1:] / sigma[:-1]).tolist()
    gain = alpha[1:] * (torch.exp(-h) - 1.0)
    half = (0.5 * gain).tolist()
    slope = (1.0 / (h[:-1] / h[1:])).tolist()  # 1 / r_0 of every step but the first
    gains, alphas, sigmas = gain.tolist(), alpha.tolist(), sigma.tolist()
    last = len(timesteps) - 1

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        previous = x
        for i in range(last + 1):
            x0 = alphas[i] * x - sigmas[i] * velocity(x, i)
            if 0 < i < last:
                D1 = slope[i - 1] * (x0 - previous)
                x = keep[i] * x - gains[i] * x0 - half[i] * D1
            else:
                x = keep[i] * x - gains[i] * x0
            previous = x0
        return x

    return run


SAMPLERS: dict[str, Callable[[Sequence[int]], Run]] = {"ddim": ddim, "dpmpp": dpmpp}
"""The samplers by the key that configurations use."""


def build(sampler: str, steps: int) -> Solver:
    """The sampler of this key in so many steps; raises `ConfigError` naming the choices."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler = {sampler!r} is unknown: choose one of {', '.join(sorted(SAMPLERS))}")
    timesteps = grid(steps)
    return Solver(lambdas()[timesteps], SAMPLERS[sampler](timesteps))
