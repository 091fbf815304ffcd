"""Samplers against diffusers and against distributions that are known."""

from dataclasses import dataclass
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


def _dpm(**options: object) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_schedule=samplers.SCHEDULE, prediction_type=samplers.PREDICTION, **options
    )


def _diffusers(
    scheduler: object, timesteps: Tensor, x: Tensor, velocity: samplers.Velocity = velocity
) -> Tensor:
    for i, t in enumerate(timesteps.tolist()):
        x = scheduler.step(velocity(x, i), t, x).prev_sample  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 14, 15, 20, 50])
def test_dpmpp_is_diffusers_to_the_bit(steps: int) -> None:
    """DPM-Solver++ gives the bits of DPMSolverMultistepScheduler on the same timesteps."""
    timesteps = samplers.grid(steps)
    scheduler = _dpm()
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
    scheduler = _dpm(solver_order=1)
    scheduler.set_timesteps(timesteps=timesteps)
    ours = samplers.ddim(timesteps)(velocity, NOISE)
    assert (ours - _diffusers(scheduler, scheduler.timesteps, NOISE)).abs().max() < 1e-5


@dataclass(frozen=True)
class Mixture:
    """A mixture of K normal distributions, whose quantiles and velocity are known; all float64."""

    weight: tuple[float, ...]
    mean: tuple[float, ...]
    width: tuple[float, ...]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        w, mu, sd = (torch.tensor(x, dtype=torch.float64) for x in (self.weight, self.mean, self.width))
        return w, mu, sd

    @property
    def sd(self) -> float:
        w, mu, sd = self.parts
        return float((w @ (sd**2 + mu**2) - (w @ mu) ** 2).sqrt())

    def quantiles(self, p: Tensor) -> Tensor:
        """Where the distribution function is p (N,), by bisection."""
        w, mu, sd = self.parts
        low, high = torch.full_like(p, -20.0), torch.full_like(p, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle[:, None] - mu) / sd) @ w < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def velocity(self, timesteps: list[int]) -> samplers.Velocity:
        """What a network that has learnt all would predict at these timesteps."""
        w, mu, sd = self.parts
        a = samplers.alphas_cumprod()[timesteps].double()

        def exact(x: Tensor, i: int) -> Tensor:
            alpha, sigma = a[i].sqrt(), (1 - a[i]).sqrt()
            variance = (alpha * sd) ** 2 + sigma**2  # (K,) of x_t, given the part
            off = x[:, None].double() - alpha * mu  # (N, K)
            r = torch.softmax(torch.log(w) - 0.5 * torch.log(variance) - 0.5 * off**2 / variance, 1)
            x0 = (r * (mu + alpha * sd**2 / variance * off)).sum(1)  # E[x_0 | x_t]
            v = (alpha * x - x0) / sigma  # alpha eps - sigma x_0, with eps = (x_t - alpha x_0) / sigma
            return v.float()

        return exact


MIXTURES = {
    "heavy": Mixture((0.8, 0.2), (0.0, 0.0), (0.5, 2.0)),
    "bimodal": Mixture((0.5, 0.5), (-1.0, 1.0), (0.3, 0.3)),
    "narrow": Mixture((1.0,), (0.3,), (0.1,)),
    "skew": Mixture((0.7, 0.3), (-0.4, 0.9), (0.3, 0.8)),
}
LADDER = (5, 10, 20, 50)
P = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
GAUSS = torch.special.ndtri(P).float()  # noise without chance: N(0, 1) at evenly spread probabilities


def _error(mixture: Mixture, x: Tensor) -> float:
    """The Wasserstein-1 distance of the samples from the mixture, over its standard deviation."""
    return float((x.double().sort().values - mixture.quantiles(P)).abs().mean()) / mixture.sd


def _sampled(sampler: str, steps: int, mixture: Mixture) -> Tensor:
    timesteps = samplers.grid(steps)
    return samplers.build(sampler, steps).run(mixture.velocity(timesteps), GAUSS)


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int], dict[str, float]]:
    return {
        (sampler, steps): {name: _error(m, _sampled(sampler, steps, m)) for name, m in MIXTURES.items()}
        for sampler in samplers.SAMPLERS
        for steps in LADDER
    }


def _mean(errors: dict[str, float]) -> float:
    return sum(errors.values()) / len(errors)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_errors_fall_with_the_steps(sampler: str, errors: dict[tuple[str, int], dict[str, float]]) -> None:
    """From 5 to 50 steps the samples come closer to every mixture, down to what the ends of the grid cost.

    The start, with 20 times as much noise, forgets a mean of 0.3, which is 1.5 % of a width of 0.1; the last
    step, from a noise of 0.02, takes 2 % off that width.
    """
    for few, more in pairwise(errors[sampler, steps] for steps in LADDER):
        assert _mean(more) < _mean(few)
        assert all(more[name] < max(few[name], 0.02) for name in MIXTURES)
    assert _mean(errors[sampler, 50]) < _mean(errors[sampler, 5]) / 8


@pytest.mark.parametrize("name", MIXTURES)
def test_dpmpp_is_far_closer_than_ddim(name: str, errors: dict[tuple[str, int], dict[str, float]]) -> None:
    """With 20 steps the error of DPM-Solver++ is at most a quarter of DDIM's, and below DDIM's with 50."""
    assert errors["dpmpp", 20][name] < errors["ddim", 20][name] / 4
    assert errors["dpmpp", 20][name] < errors["ddim", 50][name]


@pytest.mark.parametrize("name", MIXTURES)
def test_twenty_steps_of_dpmpp_give_the_quantiles(name: str) -> None:
    """Each quantile from 5 to 95 % is within 4 % of the standard deviation."""
    mixture, levels = MIXTURES[name], torch.arange(1, 20, dtype=torch.float64) / 20
    found = torch.quantile(_sampled("dpmpp", 20, mixture).double(), levels)
    assert float((found - mixture.quantiles(levels)).abs().max()) < 0.04 * mixture.sd


@pytest.mark.parametrize(("sampler", "steps"), [("dpmpp", 20), ("dpmpp", 50), ("ddim", 200)])
def test_a_narrow_gaussian_is_recovered(sampler: str, steps: int) -> None:
    """With the exact velocity of N(0.3, 0.1²) the samples have its mean, and its width within 3 %."""
    x = _sampled(sampler, steps, MIXTURES["narrow"])
    assert abs(float(x.mean()) - 0.3) < 0.003
    assert abs(float(x.std()) / 0.1 - 1) < 0.03


@pytest.mark.parametrize(("steps", "width"), [(20, 0.90), (50, 0.95), (100, 0.965)])
def test_ddim_needs_many_steps_for_the_width(steps: int, width: float) -> None:
    """Up to 100 steps DDIM leaves a narrow Gaussian more than 3 % too narrow: 10 % with 20 steps."""
    assert float(_sampled("ddim", steps, MIXTURES["narrow"]).std()) / 0.1 == pytest.approx(width, abs=0.004)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_the_usual_spacings_shrink_a_narrow_gaussian(spacing: str) -> None:
    """With diffusers' own timesteps 20 steps lose over 20 % of the width, by its scheduler and by ours."""
    mixture, scheduler = MIXTURES["narrow"], _dpm(timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.tolist()
    theirs = _diffusers(scheduler, scheduler.timesteps, GAUSS, mixture.velocity(timesteps))
    ours = samplers.dpmpp(timesteps)(mixture.velocity(timesteps), GAUSS)
    assert torch.equal(ours, theirs)
    assert float(theirs.std()) < 0.8 * 0.1


def test_a_scheduler_shared_by_windows_mixes_them() -> None:
    """One diffusers scheduler cannot serve a second window as it is, and two in turn spoil each other."""
    first, second = MIXTURES["bimodal"], MIXTURES["skew"]
    scheduler, timesteps = _dpm(), samplers.grid(20)
    scheduler.set_timesteps(timesteps=timesteps)
    alone = _diffusers(scheduler, scheduler.timesteps, GAUSS, first.velocity(timesteps))
    with pytest.raises(IndexError):
        _diffusers(scheduler, scheduler.timesteps, GAUSS, first.velocity(timesteps))

    scheduler.set_timesteps(timesteps=timesteps)
    x, other = GAUSS, GAUSS
    for i, t in enumerate(timesteps):
        scheduler._step_index = i  # as a caller would who has seen the IndexError
        x = scheduler.step(first.velocity(timesteps)(x, i), t, x).prev_sample
        scheduler._step_index = i
        other = scheduler.step(second.velocity(timesteps)(other, i), t, other).prev_sample
    assert _error(first, alone) < 0.01
    assert min(_error(first, x), _error(second, other)) > 1.0


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_sampler_keeps_nothing_of_a_window(sampler: str) -> None:
    """One sampler gives the same bits again: after other inputs, after a failure, and amid another run."""
    first, second = MIXTURES["bimodal"], MIXTURES["skew"]
    timesteps = samplers.grid(20)
    alone = samplers.build(sampler, 20).run(first.velocity(timesteps), GAUSS)
    other = samplers.build(sampler, 20).run(second.velocity(timesteps), GAUSS[:999])
    run = samplers.build(sampler, 20).run

    def fails(x: Tensor, i: int) -> Tensor:
        if i == 7:
            raise RuntimeError("midway")
        return second.velocity(timesteps)(x, i)

    def interrupted(x: Tensor, i: int) -> Tensor:
        assert torch.equal(run(second.velocity(timesteps), GAUSS[:999]), other)
        return first.velocity(timesteps)(x, i)

    noise = GAUSS.clone()
    assert torch.equal(run(first.velocity(timesteps), noise), alone)
    assert torch.equal(run(second.velocity(timesteps), GAUSS[:999]), other)
    with pytest.raises(RuntimeError, match="midway"):
        run(fails, noise)
    assert torch.equal(run(first.velocity(timesteps), noise), alone)
    assert torch.equal(run(interrupted, noise), alone)
    assert torch.equal(noise, GAUSS)


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
        samplers.build("euler", 8)
