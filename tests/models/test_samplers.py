"""Samplers against diffusers and against distributions that are known."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from barcast.models import ConfigError, samplers

MIX = 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
NOISE = torch.randn(256, 3, generator=torch.Generator().manual_seed(1))


def velocity(x: Tensor, i: int) -> Tensor:
    """Any smooth velocity that also depends on the step."""
    return torch.tanh(x @ MIX) + 0.01 * i


def _diffusers(scheduler: object, timesteps: Tensor, x: Tensor) -> Tensor:
    for i, t in enumerate(timesteps.tolist()):
        x = scheduler.step(velocity(x, i), t, x).prev_sample  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 14, 15, 20, 50])
def test_dpmpp_is_diffusers_to_the_bit(steps: int) -> None:
    """DPM-Solver++ gives the bits of DPMSolverMultistepScheduler on the same timesteps."""
    timesteps = samplers.grid(steps)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=samplers.SCHEDULE, prediction_type=samplers.PREDICTION
    )
    assert torch.equal(scheduler.alphas_cumprod, samplers.alphas_cumprod())
    scheduler.set_timesteps(timesteps=timesteps)
    assert torch.equal(
        samplers.dpmpp(timesteps)(velocity, NOISE), _diffusers(scheduler, scheduler.timesteps, NOISE)
    )


@pytest.mark.parametrize("steps", [2, 5, 8, 20, 50])
def test_ddim_is_diffusers_to_the_bit(steps: int) -> None:
    """DDIM gives the bits of DDIMScheduler on timesteps that it can express."""
    scheduler = DDIMScheduler(
        beta_schedule=samplers.SCHEDULE, prediction_type=samplers.PREDICTION, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    ours = samplers.ddim(scheduler.timesteps.tolist())(velocity, NOISE)
    assert torch.equal(ours, _diffusers(scheduler, scheduler.timesteps, NOISE))


@pytest.mark.parametrize("steps", [2, 8, 20, 50])
def test_ddim_is_the_first_order_solver(steps: int) -> None:
    """On the log-SNR grid DDIM agrees with DPM-Solver++ of order one."""
    timesteps = samplers.grid(steps)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=samplers.SCHEDULE, prediction_type=samplers.PREDICTION, solver_order=1
    )
    scheduler.set_timesteps(timesteps=timesteps)
    ours = samplers.ddim(timesteps)(velocity, NOISE)
    assert (ours - _diffusers(scheduler, scheduler.timesteps, NOISE)).abs().max() < 1e-5


@pytest.mark.parametrize(("sampler", "steps"), [("dpmpp", 20), ("dpmpp", 50), ("ddim", 200)])
def test_a_narrow_gaussian_is_recovered(sampler: str, steps: int) -> None:
    """With the exact velocity of N(0.3, 0.1²) the samples have its mean, and its width within 3 %."""
    mu, sd = 0.3, 0.1
    timesteps = samplers.grid(steps)
    a = samplers.alphas_cumprod()[timesteps]

    def exact(x: Tensor, i: int) -> Tensor:
        alpha, sigma = a[i].sqrt(), (1 - a[i]).sqrt()
        x0 = mu + alpha * sd**2 / ((alpha * sd) ** 2 + sigma**2) * (x - alpha * mu)
        return alpha * (x - alpha * x0) / sigma - sigma * x0

    noise = torch.special.ndtri((torch.arange(2001, dtype=torch.float64) + 0.5) / 2001).float()
    x = samplers.build(sampler, timesteps)(exact, noise)
    assert abs(float(x.mean()) - mu) < 0.003
    assert abs(float(x.std()) / sd - 1) < 0.03


@pytest.mark.parametrize("steps", [2, 3, 8, 20, 100, 400])
def test_the_grid_falls_and_is_uniform_in_log_snr(steps: int) -> None:
    """Timesteps fall strictly, span the noise levels, and have even log-SNR steps where timesteps allow."""
    timesteps = samplers.grid(steps)
    assert len(timesteps) == steps
    assert all(a > b for a, b in pairwise(timesteps))
    if steps <= 20:
        gaps = torch.diff(samplers.lambdas()[timesteps])
        assert gaps.max() / gaps.min() < 1.6


@pytest.mark.parametrize("steps", [-1, 0, 1, 1000])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    """A number of steps that has no grid raises ConfigError with the range."""
    with pytest.raises(ConfigError, match=f"steps = {steps} cannot be sampled: choose 2 to"):
        samplers.grid(steps)


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    """An unknown key raises ConfigError that names the choices."""
    with pytest.raises(ConfigError, match="'euler' is unknown: choose one of ddim, dpmpp"):
        samplers.build("euler", samplers.grid(8))
