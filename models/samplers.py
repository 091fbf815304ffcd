"""Diffusion samplers, written out with coefficients computed beforehand.

A sampler is a function of a velocity and a noise; schedule, grid of timesteps and network are kept
apart from it. The schedule is the cosine one of Nichol and Dhariwal (2021), called `squaredcos_cap_v2` in
diffusers; models predict v = alpha eps - sigma x0 (Salimans and Ho 2022). Steps are uniform in log-SNR, since
the usual spacings shrink narrow distributions. Arithmetic is float32 in the order of diffusers' `step()`, to
which the tests tie it bit by bit.

All but `ddpm` are deterministic: they follow the probability flow from the noise to x_0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import atan, cos, pi

import numpy as np
import torch
from torch import Tensor

from barcast.models.catalog import MOST_STEPS, check_sampler
from barcast.models.errors import ConfigError

SCHEDULE = "squaredcos_cap_v2"
PREDICTION = "v_prediction"
TIMESTEPS = 1000
SIGMA_MAX, SIGMA_MIN = 20.0, 0.02  # noise over signal at the two ends of the grid

Velocity = Callable[[Tensor, int], Tensor]
"""(x_t, i) -> v: the predicted velocity, of x_t's shape, at the i-th noise level that the solver asks for.

x_t is of variance one wherever x_0 is, also in the solvers that are written for x_t / alpha_t.
"""

Run = Callable[[Velocity, Tensor], Tensor]
"""(velocity, noise) -> x_0, of the noise's shape; of a stochastic solver the noise is (1 + draws, ...)."""


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """A sampler on its grid: `lambdas` (NFE,) float64 are log(alpha / sigma) of each evaluation, in order.

    A stochastic one takes `draws` fresh standard normals, each of x_0's shape, after the one that it starts
    from.
    """

    lambdas: Tensor
    run: Run
    draws: int = 0

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
    if not 1 < steps <= MOST_STEPS:
        raise ConfigError(f"steps = {steps} cannot be sampled: choose 2 to {MOST_STEPS}")
    wanted = torch.linspace(float(table[first]), float(table[last]), steps, dtype=torch.float64)
    timesteps = (table[None] - wanted[:, None]).abs().argmin(1).tolist()
    for i in range(steps - 2, -1, -1):  # near the end a grid step may be finer than a timestep
        timesteps[i] = max(timesteps[i], timesteps[i + 1] + 1)
    return [int(t) for t in timesteps]


def ddim(timesteps: Sequence[int]) -> Solver:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12), ending at x_0."""
    a = alphas_cumprod()
    here = a[list(timesteps)]
    after = torch.cat([here[1:], torch.ones(1)])
    alphas, sigmas = (here**0.5).unbind(), ((1 - here) ** 0.5).unbind()
    alphas_after, sigmas_after = (after**0.5).unbind(), ((1 - after) ** 0.5).unbind()

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        for i, (alpha, sigma) in enumerate(zip(alphas, sigmas, strict=True)):
            v = velocity(x, i)
            x0 = alpha * x - sigma * v
            eps = alpha * v + sigma * x
            x = alphas_after[i] * x0 + sigmas_after[i] * eps
        return x

    return Solver(lambdas()[list(timesteps)], run)


def ddpm(timesteps: Sequence[int]) -> Solver:
    """DDPM (Ho et al. 2020, eq. 7) between timesteps of any distance: a draw of the posterior at each step.

    It is DDIM with eta = 1. The last step, to x_0, has no variance.
    """
    a = alphas_cumprod()
    here = a[list(timesteps)]
    after = torch.cat([here[1:], torch.ones(1)])
    alphas, sigmas = (here**0.5).unbind(), ((1 - here) ** 0.5).unbind()
    alpha = here / after  # of the step alone
    of_x0 = ((after**0.5 * (1 - alpha)) / (1 - here)).unbind()
    of_x = (alpha**0.5 * (1 - after) / (1 - here)).unbind()
    deviations = (((1 - after) / (1 - here) * (1 - alpha)) ** 0.5).unbind()
    last = len(timesteps) - 1

    def run(velocity: Velocity, noise: Tensor) -> Tensor:
        x = noise[0]
        for i in range(last + 1):
            x0 = alphas[i] * x - sigmas[i] * velocity(x, i)
            x = of_x0[i] * x0 + of_x[i] * x
            if i < last:
                x = x + deviations[i] * noise[i + 1]
        return x

    return Solver(lambdas()[list(timesteps)], run, draws=last)


def dpmpp(timesteps: Sequence[int]) -> Solver:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, alg. 2); the first and the last step are first order."""
    _, alpha, sigma = _levels(timesteps)
    lam = torch.log(alpha) - torch.log(sigma)  # infinite at the end
    h = lam[1:] - lam[:-1]
    keep = (sigma[1:] / sigma[:-1]).unbind()
    gain = alpha[1:] * (torch.exp(-h) - 1.0)
    half = (0.5 * gain).unbind()
    slope = (1.0 / (h[:-1] / h[1:])).unbind()  # 1 / r_0 of every step but the first
    gains, alphas, sigmas = gain.unbind(), alpha.unbind(), sigma.unbind()
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

    return Solver(lambdas()[list(timesteps)], run)


def dpmpp3(timesteps: Sequence[int]) -> Solver:
    """DPM-Solver++(3M) (Lu et al. 2022): third order where three predictions are there.

    The last step is first order; with fewer than 15 steps the one before it is second order.
    """
    _, alpha, sigma = _levels(timesteps)
    lam = torch.log(alpha) - torch.log(sigma)  # infinite at the end
    h = lam[1:] - lam[:-1]
    keep = (sigma[1:] / sigma[:-1]).unbind()
    gain = alpha[1:] * (torch.exp(-h) - 1.0)
    half = (0.5 * gain).unbind()
    first = (alpha[1:] * ((torch.exp(-h) - 1.0) / h + 1.0)).unbind()  # of the first derivative
    second = (alpha[1:] * ((torch.exp(-h) - 1.0 + h) / h**2 - 0.5)).unbind()
    r0 = torch.cat([torch.ones(1), h[:-1] / h[1:]])
    r1 = torch.cat([torch.ones(2), h[:-2] / h[2:]])
    near, far = (1.0 / r0).unbind(), (1.0 / r1).unbind()
    lean, bend = (r0 / (r0 + r1)).unbind(), (1.0 / (r0 + r1)).unbind()
    gains, alphas, sigmas = gain.unbind(), alpha.unbind(), sigma.unbind()
    last = len(timesteps) - 1

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        m1 = m2 = x
        for i in range(last + 1):
            m0 = alphas[i] * x - sigmas[i] * velocity(x, i)
            if i in (0, last):
                x = keep[i] * x - gains[i] * m0
            elif i == 1 or (i == last - 1 and last < 14):
                x = keep[i] * x - gains[i] * m0 - half[i] * (near[i] * (m0 - m1))
            else:
                D1_0, D1_1 = near[i] * (m0 - m1), far[i] * (m1 - m2)
                D1 = D1_0 + lean[i] * (D1_0 - D1_1)
                D2 = bend[i] * (D1_0 - D1_1)
                x = keep[i] * x - gains[i] * m0 + first[i] * D1 - second[i] * D2
            m1, m2 = m0, m1
        return x

    return Solver(lambdas()[list(timesteps)], run)


def unipc(timesteps: Sequence[int]) -> Solver:
    """UniPC-2 with B_2(h) = exp(h) - 1 (Zhao et al. 2023): predictor and corrector of two steps.

    The corrector takes the prediction that the next step needs anyway, so that each step asks once.
    """
    _, alpha, sigma = _levels(timesteps)
    lam = torch.log(alpha) - torch.log(sigma)  # infinite at the end
    last = len(timesteps) - 1
    keep = (sigma[1:] / sigma[:-1]).unbind()
    gain = torch.expm1(-(lam[1:] - lam[:-1]))  # B(h), and h phi_1(h), of each step
    gains = (alpha[1:] * gain).unbind()
    ratios, correct = [1.0] * (last + 1), [(0.0, 0.5)] * (last + 1)
    for i in range(1, last):
        h = lam[i + 1] - lam[i]
        r = (lam[i - 1] - lam[i]) / h
        phi = gain[i] / -h - 1
        b = torch.stack([phi / gain[i], (phi / -h - 1 / 2) * 2 / gain[i]])
        R = torch.stack([torch.ones(2), torch.stack([r, torch.ones(())])])
        rho = torch.linalg.solve(R, b)
        ratios[i], correct[i] = float(r), (float(rho[0]), float(rho[1]))
    alphas, sigmas = alpha.unbind(), sigma.unbind()

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        m0, plain, D1 = x, x, torch.zeros_like(x)  # of the step before: prediction, x by it alone, slope
        for i in range(last + 1):
            m = alphas[i] * x - sigmas[i] * velocity(x, i)
            if i > 0:
                old, new = correct[i - 1]
                x = plain - gains[i - 1] * (old * D1 + new * (m - m0))
            plain = keep[i] * x - gains[i] * m
            if 0 < i < last:
                D1 = (m0 - m) / ratios[i]
                x = plain - gains[i] * (0.5 * D1)
            else:
                x = plain
            m0 = m
        return x

    return Solver(lambdas()[list(timesteps)], run)


def deis(timesteps: Sequence[int]) -> Solver:
    """DEIS of order two in log rho (Zhang and Chen 2023), which extrapolates the predicted noise.

    It ends where the schedule begins, with a noise of 0.006; with fewer than 15 steps by a first order step.
    """
    _, alpha, sigma = _levels(timesteps, _ratios()[:1])
    h = (torch.log(alpha) - torch.log(sigma)).diff()
    rho = sigma / alpha
    log = torch.from_numpy(np.log(rho.numpy()))

    def integral(t: Tensor, log_t: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Of (log t - c) / (b - c) over t, for logarithms b and c."""
        return t * (-c + log_t - 1) / (b - c)

    to, at, before = slice(2, None), slice(1, -1), slice(None, -2)
    near, far = (
        integral(rho[to], log[to], b, c) - integral(rho[at], log[at], b, c)
        for b, c in ((log[at], log[before]), (log[before], log[at]))
    )
    nears, fars = (torch.cat([torch.zeros(1), x]).unbind() for x in (near, far))
    keep, gains = (alpha[1:] / alpha[:-1]).unbind(), (sigma[1:] * (torch.exp(h) - 1.0)).unbind()
    alphas, sigmas = alpha.unbind(), sigma.unbind()
    last = len(timesteps) - 1

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        previous = x
        for i in range(last + 1):
            x0 = alphas[i] * x - sigmas[i] * velocity(x, i)
            eps = (x - alphas[i] * x0) / sigmas[i]
            if i == 0 or (i == last and last < 14):
                x = keep[i] * x - gains[i] * eps
            else:
                x = alphas[i + 1] * (x / alphas[i] + nears[i] * eps + fars[i] * previous)
            previous = eps
        return x

    return Solver(lambdas()[list(timesteps)], run)


def euler(timesteps: Sequence[int]) -> Solver:
    """Euler in sigma / alpha (Karras et al. 2022, alg. 1 without its second half)."""
    s = _levels(timesteps)[0]
    steps = s.diff().unbind()
    slope = _Slope(s[:-1])

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        x = x * slope.start
        for i, step in enumerate(steps):
            x = x + slope(velocity, x, i) * step
        return x

    return Solver(lambdas()[list(timesteps)], run)


def kdpm2(timesteps: Sequence[int]) -> Solver:
    """DPM-Solver-2 in sigma / alpha (Karras et al. 2022, after Lu et al. 2022): the slope amid each step.

    n steps ask 2 n - 1 times: the last one, to x_0, has nothing in its middle.
    """
    s = _levels(timesteps)[0]
    middle = s.log().lerp(s.roll(1).log(), 0.5).exp()[1:]  # of each step, 0 of the last
    slope = _Slope(torch.stack([s[:-1], middle], 1).flatten()[:-1])
    half, whole = (middle - s[:-1]).unbind(), s.diff().unbind()
    last = len(timesteps) - 1

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        x = x * slope.start
        for i in range(last):
            y = x + slope(velocity, x, 2 * i) * half[i]
            x = x + slope(velocity, y, 2 * i + 1) * whole[i]
        x0: Tensor = x + slope(velocity, x, 2 * last) * half[last]
        return x0

    lam = lambdas()[list(timesteps)]
    between = (lam[1:] + lam[:-1]) / 2
    return Solver(torch.cat([torch.stack([lam[:-1], between], 1).flatten(), lam[-1:]]), run)


def angle(steps: int) -> Solver:
    """Even steps of the angle between signal and noise, arctan(sigma / alpha), each by its middle's velocity.

    v is the derivative of x by that angle (Salimans and Ho 2022), so that nothing is lost where v is zero,
    as it is of normal data: near them one evaluation may do. First order; the grid of the others is not used.
    """
    first = atan(SIGMA_MAX)
    middles = [first * (1 - (i + 0.5) / steps) for i in range(steps)]

    def run(velocity: Velocity, x: Tensor) -> Tensor:
        for i in range(steps):
            x = x - first / steps * velocity(x, i)
        return x

    return Solver(-torch.tensor(middles, dtype=torch.float64).tan().log(), run)


class _Slope:
    """The derivative of y = x / alpha by s = sigma / alpha, at the noise levels s (NFE,) of a solver."""

    def __init__(self, s: Tensor) -> None:
        variance = s**2 + 1
        self.s, self.variance, self.norm = s.unbind(), variance.unbind(), (variance**0.5).unbind()
        self.of_v = (-s / variance**0.5).unbind()
        self.start = self.norm[0]  # the deviation of y where it starts

    def __call__(self, velocity: Velocity, y: Tensor, i: int) -> Tensor:
        x0 = velocity(y / self.norm[i], i) * self.of_v[i] + y / self.variance[i]
        slope: Tensor = (y - x0) / self.s[i]
        return slope


def _ratios() -> Tensor:
    """sigma_t / alpha_t of the schedule, rising, (1000,) float32."""
    a = alphas_cumprod()
    ratio: Tensor = ((1 - a) / a) ** 0.5
    return ratio


def _levels(timesteps: Sequence[int], end: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """sigma / alpha, alpha and sigma of the timesteps and of the end, x_0 unless given, (steps + 1,) each."""
    s = torch.cat([_ratios()[list(timesteps)], torch.zeros(1) if end is None else end])
    alpha = 1 / ((s**2 + 1) ** 0.5)
    return s, alpha, s * alpha


SOLVERS: dict[str, Callable[[Sequence[int]], Solver]] = {
    solver.__name__: solver for solver in (ddim, ddpm, deis, dpmpp, dpmpp3, euler, kdpm2, unipc)
}
"""The samplers on the grid by the key that configurations use: those of `catalog.SAMPLERS` but `angle`."""


def build(sampler: str, steps: int) -> Solver:
    """The sampler of this key in so many steps; raises `ConfigError`, see `catalog.check_sampler`."""
    check_sampler(sampler, steps)
    return angle(steps) if sampler == "angle" else SOLVERS[sampler](grid(steps))


def keyed_normals(draws: int, shape: Sequence[int], model: str, symbol: str, close_time: int) -> Tensor:
    """Standard normals (draws, *shape) float32 that model, symbol and close time alone decide.

    torch makes fewer than 16 numbers by another method: so many are drawn at least.
    """
    text = f"{model} {symbol} {close_time}"  # ids and symbols have no spaces
    seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    count = draws * int(np.prod(shape))
    normals = torch.randn(max(count, 16), generator=torch.Generator().manual_seed(seed))
    return normals[:count].reshape(draws, *shape)
