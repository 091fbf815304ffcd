"""Samplers against diffusers and against distributions that are known."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import log
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm
from scipy.stats import beta
from torch import Tensor

from barcast.models import MOST_STEPS, SAMPLERS, ConfigError, samplers
from barcast.models.catalog import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # DEIS of diffusers

MIX = 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
NOISE = torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
TRAINED = {"beta_schedule": samplers.SCHEDULE, "prediction_type": samplers.PREDICTION}
DETERMINISTIC = [sampler for sampler in SAMPLERS if sampler != "ddpm"]


def velocity(x: Tensor, i: int) -> Tensor:
    """Any smooth velocity that also depends on the step."""
    return torch.tanh(x @ MIX) + 0.01 * i


def noise_of(solver: samplers.Solver, start: Tensor) -> Tensor:
    """What a solver starts from, and the draws of a stochastic one."""
    if not solver.draws:
        return start
    fresh = torch.randn(solver.draws, *start.shape, generator=torch.Generator().manual_seed(3))
    return torch.cat([start[None], fresh])


def _dpm(**options: object) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**TRAINED, **options)


def _diffusers(
    scheduler: Any, timesteps: Tensor, x: Tensor, velocity: samplers.Velocity = velocity, **options: object
) -> Tensor:
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(timesteps):
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(velocity(seen, i), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(
    ("sampler", "order", "steps"),
    [
        (name, order, steps)
        for name, order in (("dpmpp", 2), ("dpmpp3", 3))
        for steps in (2, 3, 5, 8, 14, 15, 20, 50)
        if steps >= SAMPLERS[name]
    ],
)
def test_dpmpp_is_diffusers_to_the_bit(sampler: str, order: int, steps: int) -> None:
    """DPM-Solver++ gives the bits of DPMSolverMultistepScheduler on the same timesteps."""
    timesteps = samplers.grid(steps)
    scheduler = _dpm(solver_order=order)
    assert torch.equal(scheduler.alphas_cumprod, samplers.alphas_cumprod())
    scheduler.set_timesteps(timesteps=timesteps)
    ours = samplers.build(sampler, steps).run(velocity, NOISE)
    assert torch.equal(ours, _diffusers(scheduler, scheduler.timesteps, NOISE))


@pytest.mark.parametrize("steps", [2, 5, 8, 20, 50])
def test_ddim_is_diffusers_to_the_bit(steps: int) -> None:
    """DDIM gives the bits of DDIMScheduler on timesteps that it can express."""
    scheduler = DDIMScheduler(clip_sample=False, **TRAINED)
    scheduler.set_timesteps(steps)
    ours = samplers.ddim(scheduler.timesteps.tolist()).run(velocity, NOISE)
    assert torch.equal(ours, _diffusers(scheduler, scheduler.timesteps, NOISE))


@pytest.mark.parametrize("steps", [2, 8, 20, 50])
def test_ddim_is_the_first_order_solver(steps: int) -> None:
    """On the log-SNR grid DDIM agrees with DPM-Solver++ of order one."""
    timesteps = samplers.grid(steps)
    scheduler = _dpm(solver_order=1)
    scheduler.set_timesteps(timesteps=timesteps)
    ours = samplers.ddim(timesteps).run(velocity, NOISE)
    assert (ours - _diffusers(scheduler, scheduler.timesteps, NOISE)).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [2, 5, 8, 20, 50])
def test_euler_is_diffusers_to_the_bit(steps: int) -> None:
    """Euler gives the bits of EulerDiscreteScheduler on the same timesteps, and DDIM up to rounding."""
    timesteps = samplers.grid(steps)
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **TRAINED)  # noise of variance s^2 + 1
    scheduler.set_timesteps(timesteps=timesteps)
    ours = samplers.euler(timesteps).run(velocity, NOISE)
    assert torch.equal(ours, _diffusers(scheduler, scheduler.timesteps, NOISE))
    assert (ours - samplers.ddim(timesteps).run(velocity, NOISE)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("sampler", "scheduler", "spacing"),
    [
        (name, scheduler, spacing)
        for name, scheduler in (
            ("unipc", diffusers.UniPCMultistepScheduler),
            ("deis", diffusers.DEISMultistepScheduler),
        )
        for spacing in ("leading", "trailing", "linspace")
    ]
    # with other spacings timesteps are between the whole ones, or there is noise without the signal
    + [("kdpm2", diffusers.KDPM2DiscreteScheduler, "leading")],
)
def test_others_are_diffusers_to_the_bit(sampler: str, scheduler: Callable[..., Any], spacing: str) -> None:
    """UniPC, DEIS and KDPM2, which take no timesteps of ours there, give diffusers' bits on its own."""
    for steps in (3, 4, 8, 14, 15, 20, 50):
        theirs = scheduler(timestep_spacing=spacing, steps_offset=int(spacing == "leading"), **TRAINED)
        theirs.set_timesteps(steps)
        timesteps = theirs.timesteps
        whole = timesteps[[0, *range(2, len(timesteps), 2)]] if sampler == "kdpm2" else timesteps
        solver = samplers.SOLVERS[sampler](whole.long().tolist())
        assert solver.evaluations == len(timesteps)
        assert torch.equal(solver.run(velocity, NOISE), _diffusers(theirs, timesteps, NOISE))


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_kdpm2_asks_in_the_middle_of_each_step(steps: int) -> None:
    """The levels that it asks at are those of diffusers: 2 n - 1, the even ones between two of the grid."""
    theirs = diffusers.KDPM2DiscreteScheduler(timestep_spacing="leading", steps_offset=1, **TRAINED)
    theirs.set_timesteps(steps)
    solver = samplers.kdpm2(theirs.timesteps[[0, *range(2, 2 * steps - 1, 2)]].long().tolist())
    assert solver.evaluations == 2 * steps - 1
    at = torch.arange(2 * steps - 1)
    sigmas = torch.where(at % 2 == 0, theirs.sigmas[at], theirs.sigmas_interpol[at])
    assert (solver.lambdas + sigmas.double().log()).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [2, 8, 20, 50])
def test_ddpm_is_diffusers_to_the_bit(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDPM gives the bits of DDPMScheduler on the same timesteps, from the same draws."""
    solver = samplers.build("ddpm", steps)
    noise = noise_of(solver, NOISE)
    draws = iter([*noise[1:], torch.zeros_like(NOISE)])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_args, **_options: next(draws))
    scheduler = DDPMScheduler(clip_sample=False, **TRAINED)
    scheduler.set_timesteps(timesteps=samplers.grid(steps))
    assert torch.equal(solver.run(velocity, noise), _diffusers(scheduler, scheduler.timesteps, NOISE))


def test_ddpm_is_ddim_with_eta_one() -> None:
    """On timesteps that DDIMScheduler can express it makes the same steps from the same draws."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **TRAINED)
    scheduler.set_timesteps(20)
    solver = samplers.ddpm(scheduler.timesteps.tolist())
    noise = noise_of(solver, NOISE)
    x = NOISE
    for i, t in enumerate(scheduler.timesteps.tolist()):
        draw = noise[i + 1] if i < 19 else torch.zeros_like(x)
        x = scheduler.step(velocity(x, i), t, x, eta=1.0, variance_noise=draw).prev_sample
    assert (solver.run(velocity, noise) - x).abs().max() < 1e-5


@pytest.mark.parametrize("at", [0, 4, 12, 18])
def test_ddpm_draws_from_the_posterior(at: int) -> None:
    """Of one x_t and one predicted x_0, the next x varies as the posterior does, within 3 %.

    It is (1 - a') / (1 - a) (1 - a / a') for squared signal levels a and a' (Ho et al. 2020, eq. 7).
    """
    timesteps = samplers.grid(20)
    solver = samplers.ddpm(timesteps)
    seen = dict[int, Tensor]()

    def still(x: Tensor, i: int) -> Tensor:
        seen[i] = x
        return torch.zeros_like(x)

    fresh = torch.zeros(20, 20_000)
    fresh[at + 1] = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    solver.run(still, fresh)
    here, after = samplers.alphas_cumprod()[timesteps[at : at + 2]].double().tolist()
    posterior = (1 - after) / (1 - here) * (1 - here / after)
    assert float(seen[at].var()) == 0
    assert float(seen[at + 1].double().var()) == pytest.approx(posterior, rel=0.03)


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

    def velocity(self, lambdas: Tensor) -> samplers.Velocity:
        """What a network that has learnt all would predict at these noise levels, in the precision of x."""
        w, mu, sd = self.parts
        alphas, sigmas = torch.sigmoid(2 * lambdas).sqrt(), torch.sigmoid(-2 * lambdas).sqrt()

        def exact(x: Tensor, i: int) -> Tensor:
            alpha, sigma = alphas[i], sigmas[i]
            variance = (alpha * sd) ** 2 + sigma**2  # (K,) of x_t, given the part
            off = x[..., None].double() - alpha * mu  # (N, K)
            r = torch.softmax(torch.log(w) - 0.5 * torch.log(variance) - 0.5 * off**2 / variance, -1)
            x0 = (r * (mu + alpha * sd**2 / variance * off)).sum(-1)  # E[x_0 | x_t]
            v = (alpha * x - x0) / sigma  # alpha eps - sigma x_0, with eps = (x_t - alpha x_0) / sigma
            return v.to(x.dtype)

        return exact


MIXTURES = {
    "heavy": Mixture((0.8, 0.2), (0.0, 0.0), (0.5, 2.0)),
    "bimodal": Mixture((0.5, 0.5), (-1.0, 1.0), (0.3, 0.3)),
    "narrow": Mixture((1.0,), (0.3,), (0.1,)),
    "skew": Mixture((0.7, 0.3), (-0.4, 0.9), (0.3, 0.8)),
}
ON_GRID = [sampler for sampler in SAMPLERS if sampler != "angle"]
"""Those that step along a grid uniform in log-SNR, for any distribution."""

LADDER = (5, 10, 20, 50)
P = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
GAUSS = torch.special.ndtri(P).float()  # noise without chance: N(0, 1) at evenly spread probabilities


def _error(mixture: Mixture, x: Tensor) -> float:
    """The Wasserstein-1 distance of the samples from the mixture, over its standard deviation."""
    return float((x.double().sort().values - mixture.quantiles(P)).abs().mean()) / mixture.sd


def _sampled(sampler: str, steps: int, mixture: Mixture, start: Tensor = GAUSS) -> Tensor:
    solver = samplers.build(sampler, steps)
    return solver.run(mixture.velocity(solver.lambdas), noise_of(solver, start))


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int], dict[str, float]]:
    return {
        (sampler, steps): {name: _error(m, _sampled(sampler, steps, m)) for name, m in MIXTURES.items()}
        for sampler in SAMPLERS
        for steps in LADDER
    }


def _mean(errors: dict[str, float]) -> float:
    return sum(errors.values()) / len(errors)


@pytest.mark.parametrize("sampler", ON_GRID)
def test_errors_fall_with_the_steps(sampler: str, errors: dict[tuple[str, int], dict[str, float]]) -> None:
    """From 5 to 50 steps the samples come closer to every mixture, down to what the ends of the grid cost.

    The start, with 20 times as much noise, forgets a mean of 0.3, which is 1.5 % of a width of 0.1; the last
    step, from a noise of 0.02, takes 2 % off that width.
    """
    for few, more in pairwise(errors[sampler, steps] for steps in LADDER):
        assert _mean(more) < _mean(few)
        assert all(more[name] < max(few[name], 0.021) for name in MIXTURES)
    assert _mean(errors[sampler, 50]) < _mean(errors[sampler, 5]) / (5 if sampler == "ddpm" else 8)


MOST = {
    "ddim": (0.14, 0.070),
    "ddpm": (0.22, 0.140),
    "deis": (0.045, 0.0125),
    "dpmpp": (0.024, 0.0085),
    "dpmpp3": (0.020, 0.0060),
    "euler": (0.14, 0.070),
    "kdpm2": (0.026, 0.0085),
    "unipc": (0.017, 0.0060),
}
"""The mean error over the mixtures with 10 and with 20 steps, rounded up; kdpm2 asks 19 and 39 times."""


@pytest.mark.parametrize("sampler", ON_GRID)
def test_errors_are_what_is_said(sampler: str, errors: dict[tuple[str, int], dict[str, float]]) -> None:
    """With 10 and 20 steps each sampler is as near the mixtures as the table says, and not by far nearer."""
    for steps, most in zip((10, 20), MOST[sampler], strict=True):
        assert 0.8 * most < _mean(errors[sampler, steps]) < most


ORDERS = {
    "ddim": (0.9, 1.1),
    "euler": (0.9, 1.1),
    "dpmpp": (1.8, 2.1),
    "kdpm2": (1.9, 2.3),
    "deis": (1.6, 2.2),
    "dpmpp3": (2.3, 3.0),
    "unipc": (2.4, 3.1),
}
"""The order of convergence: of first, second and third order methods, UniPC's corrector adding one to two."""


@pytest.fixture(scope="module")
def finest() -> Callable[[str], dict[str, Tensor]]:
    """What a sampler makes of the mixtures in 962 steps, all that there are between the ends of the grid."""
    coarse = samplers.grid(10)
    every = list(range(coarse[0], coarse[-1] - 1, -1))

    @cache
    def made(sampler: str) -> dict[str, Tensor]:
        solver = samplers.SOLVERS[sampler](every)
        return {name: solver.run(m.velocity(solver.lambdas), GAUSS.double()) for name, m in MIXTURES.items()}

    return made


@pytest.mark.parametrize("sampler", sorted(ORDERS))
def test_the_order_is_that_of_the_theory(sampler: str, finest: Callable[[str], dict[str, Tensor]]) -> None:
    """The error against 962 steps from the same start falls with the power of the steps that theory says.

    In float64; the root mean square over the mixtures, over 10 to 80 steps. DEIS ends elsewhere than the
    others, so that it is compared with itself.
    """
    reference = finest("deis" if sampler == "deis" else "dpmpp3")
    counts, errors = (10, 20, 40, 80), []
    for steps in counts:
        assert samplers.grid(steps)[:: steps - 1] == samplers.grid(10)[::9]
        off = [
            float((_sampled(sampler, steps, m, GAUSS.double()) - reference[name]).square().mean()) / m.sd**2
            for name, m in MIXTURES.items()
        ]
        errors.append(sum(off) ** 0.5)
    low, high = ORDERS[sampler]
    assert low < -np.polyfit(np.log(counts), np.log(errors), 1)[0] < high


NEAR = Mixture((0.7, 0.3), (0.1, -0.1), (0.9, 1.2))
"""Nearly normal, as the scores of a path are: its deviation is 1.0."""


def test_an_even_angle_loses_nothing_where_the_velocity_is_zero() -> None:
    """Normal noise stays what it is, to the bit, in any number of steps."""
    for steps in (1, 2, 7, 50):
        solver = samplers.build("angle", steps)
        assert solver.evaluations == steps
        assert torch.equal(solver.run(lambda x, _: torch.zeros_like(x), GAUSS), GAUSS)


def test_one_evaluation_in_the_middle_does_near_the_normal_distribution() -> None:
    """Of data that are nearly normal it makes samples as near as eight evaluations of DPM-Solver++ do."""
    one, two, eight = (
        _error(NEAR, _sampled(*how, NEAR)) for how in (("angle", 1), ("dpmpp", 2), ("dpmpp", 8))
    )
    assert one < 0.012
    assert one < eight + 0.006
    assert two > 5 * one


def test_an_even_angle_is_of_first_order_and_not_for_the_narrow() -> None:
    """The error halves with twice the steps; of a width of a tenth ten steps make half as much again."""
    for name in ("heavy", "bimodal", "skew"):
        fine = _sampled("angle", 400, MIXTURES[name])
        off = [
            float((_sampled("angle", n, MIXTURES[name]) - fine).square().mean().sqrt()) for n in (10, 20, 40)
        ]
        assert all(1.6 < few / more < 2.6 for few, more in pairwise(off)), (name, off)
    assert _error(MIXTURES["narrow"], _sampled("angle", 10, MIXTURES["narrow"])) > 0.4


@pytest.mark.parametrize("samples", [1, 2, 10, 2000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_samples_is_finite(sampler: str, samples: int) -> None:
    """One sample or many, of the fewest steps and the most that a configuration takes."""
    start = GAUSS[torch.linspace(0, len(GAUSS) - 1, samples).long()]
    for name, mixture in MIXTURES.items():
        for steps in (SAMPLERS[sampler], 20, *([MOST_STEPS] if samples < 3 else [])):
            x = _sampled(sampler, steps, mixture, start)
            assert x.shape == start.shape, name
            assert bool(torch.isfinite(x).all()), name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_network_sees_has_variance_one(sampler: str) -> None:
    """Of normal outcomes, whose velocity is zero: the noise itself, then x_t of variance one within 0.2 %.

    So also of the solvers that work on x_t / alpha_t, at all levels they ask at. First order ones lose up to
    4 % in 100 steps, and where noise is drawn 10 % are chance.
    """
    solver, seen = samplers.build(sampler, 100), list[Tensor]()

    def still(x: Tensor, _: int) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    solver.run(still, noise_of(solver, GAUSS))
    assert len(seen) == solver.evaluations
    assert (seen[0] - GAUSS).abs().max() < 1e-6
    near = {"ddim": 0.04, "euler": 0.04, "ddpm": 0.1}.get(sampler, 0.002)
    variances = [float(x.double().var() / GAUSS.double().var()) for x in seen]
    assert variances == pytest.approx([1.0] * len(seen), rel=near)


@pytest.mark.parametrize("name", MIXTURES)
def test_dpmpp_is_far_closer_than_ddim(name: str, errors: dict[tuple[str, int], dict[str, float]]) -> None:
    """With 20 steps the error of DPM-Solver++ is at most a quarter of DDIM's, and below DDIM's with 50."""
    assert errors["dpmpp", 20][name] < errors["ddim", 20][name] / 4
    assert errors["dpmpp", 20][name] < errors["ddim", 50][name]


def _energy_distance(mixture: Mixture, sets: Tensor) -> float:
    """The energy distance (Szekely and Rizzo 2013) of sets of samples (n, N) from a mixture, on average."""
    truth = mixture.quantiles(P[::2] + 0.25 / len(P))

    def apart(x: Tensor, y: Tensor) -> float:
        return float((x[:, None] - y).abs().mean())

    own = [2 * apart(x, truth) - apart(x, x) for x in sets.double()]
    return sum(own) / len(own) - apart(truth, truth)


@pytest.mark.parametrize("name", MIXTURES)
def test_sets_of_samples_are_as_near_as_with_a_hundred_steps(name: str) -> None:
    """Of a hundred chance samples the solver's error is lost in theirs; DDIM's, with 20 steps, not quite."""
    start = torch.randn(100 * 100, generator=torch.Generator().manual_seed(6))

    def distance(sampler: str, steps: int) -> float:
        return _energy_distance(
            MIXTURES[name], _sampled(sampler, steps, MIXTURES[name], start).reshape(-1, 100)
        )

    fine = distance("dpmpp", 100)
    for sampler, steps, most in (
        ("dpmpp", 20, 1.1),
        ("euler", 25, 1.1),
        ("kdpm2", 30, 1.1),
        ("ddim", 20, 1.2),
    ):
        assert distance(sampler, steps) < most * fine, sampler
    assert distance("ddim", 8) > 1.3 * fine  # the measure sees steps that are too coarse


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
    solver = samplers.dpmpp(scheduler.timesteps.tolist())
    exact = mixture.velocity(solver.lambdas)
    theirs = _diffusers(scheduler, scheduler.timesteps, GAUSS, exact)
    ours = solver.run(exact, GAUSS)
    assert torch.equal(ours, theirs)
    assert float(theirs.std()) < 0.8 * 0.1


def test_a_scheduler_shared_by_windows_mixes_them() -> None:
    """One diffusers scheduler cannot serve a second window as it is, and two in turn spoil each other."""
    first, second = MIXTURES["bimodal"], MIXTURES["skew"]
    scheduler, timesteps = _dpm(), samplers.grid(20)
    lambdas = samplers.lambdas()[timesteps]
    scheduler.set_timesteps(timesteps=timesteps)
    alone = _diffusers(scheduler, scheduler.timesteps, GAUSS, first.velocity(lambdas))
    with pytest.raises(IndexError):
        _diffusers(scheduler, scheduler.timesteps, GAUSS, first.velocity(lambdas))

    scheduler.set_timesteps(timesteps=timesteps)
    x, other = GAUSS, GAUSS
    for i, t in enumerate(timesteps):
        scheduler._step_index = i  # as a caller would who has seen the IndexError
        x = scheduler.step(first.velocity(lambdas)(x, i), t, x).prev_sample
        scheduler._step_index = i
        other = scheduler.step(second.velocity(lambdas)(other, i), t, other).prev_sample
    assert _error(first, alone) < 0.01
    assert min(_error(first, x), _error(second, other)) > 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_keeps_nothing_of_a_window(sampler: str) -> None:
    """One sampler gives the same bits again: after other inputs, after a failure, and amid another run."""
    solver = samplers.build(sampler, 20)
    first, second = (MIXTURES[name].velocity(solver.lambdas) for name in ("bimodal", "skew"))
    whole = noise_of(solver, GAUSS)
    part = whole[..., :999]
    alone = samplers.build(sampler, 20).run(first, whole)
    other = samplers.build(sampler, 20).run(second, part)
    run = solver.run

    def fails(x: Tensor, i: int) -> Tensor:
        if i == 7:
            raise RuntimeError("midway")
        return second(x, i)

    def interrupted(x: Tensor, i: int) -> Tensor:
        assert torch.equal(run(second, part), other)
        return first(x, i)

    noise = whole.clone()
    assert torch.equal(run(first, noise), alone)
    assert torch.equal(run(second, part), other)
    with pytest.raises(RuntimeError, match="midway"):
        run(fails, noise)
    assert torch.equal(run(first, noise), alone)
    assert torch.equal(run(interrupted, noise), alone)
    assert torch.equal(noise, whole)


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_says_its_range(sampler: str) -> None:
    """Fewer steps than a sampler takes, or more, are refused with its name and its range."""
    fewest = SAMPLERS[sampler]
    assert len(samplers.build(sampler, fewest).lambdas) == (2 * fewest - 1 if sampler == "kdpm2" else fewest)
    for steps in (0, fewest - 1, MOST_STEPS + 1):
        said = f"steps = {steps} cannot be sampled by {sampler}: choose {fewest} to {MOST_STEPS}"
        with pytest.raises(ConfigError, match=said):
            samplers.build(sampler, steps)


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    """An unknown key raises ConfigError that names the choices; each choice is a solver of that name."""
    with pytest.raises(ConfigError, match="'dpm' is unknown: choose one of angle, ddim, ddpm, deis, dpmpp"):
        samplers.build("dpm", 8)
    assert {*samplers.SOLVERS, "angle"} == set(SAMPLERS)
    assert not set(REFUSED) & set(SAMPLERS)


# What is refused, measured on the same mixtures: by diffusers' schedulers, on our noise levels where they
# take them.

Levels = Sequence[float]


def _ours(steps: int) -> Levels:
    return torch.exp(-samplers.lambdas()[samplers.grid(steps)]).tolist()


def _karras(steps: int, rho: float = 7) -> Levels:
    """Karras et al. 2022, eq. 5, between the ends of our grid."""
    ends = [s ** (1 / rho) for s in (samplers.SIGMA_MAX, samplers.SIGMA_MIN)]
    return (np.linspace(*ends, steps) ** rho).tolist()


def _exponential(steps: int) -> Levels:
    return np.exp(np.linspace(log(samplers.SIGMA_MAX), log(samplers.SIGMA_MIN), steps)).tolist()


def _beta(steps: int) -> Levels:
    """As diffusers has them, after Lee et al. 2024."""
    share = beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
    return (samplers.SIGMA_MIN + share * (samplers.SIGMA_MAX - samplers.SIGMA_MIN)).tolist()


def _on(scheduler: Any, levels: Levels, twice: bool = False) -> Callable[[Mixture], Tensor]:
    """Samples by a scheduler of diffusers on given sigma / alpha, each but the first perhaps asked twice."""

    def sampled(mixture: Mixture) -> Tensor:
        asked = torch.tensor([levels[0], *(s for s in levels[1:] for _ in range(1 + twice))])
        scheduler.set_timesteps(len(levels))
        scheduler.sigmas = torch.cat([asked, torch.zeros(1)])
        scheduler.timesteps = torch.arange(len(asked), 0, -1).float()
        exact = mixture.velocity(-torch.log(asked.double()))
        return _diffusers(scheduler, scheduler.timesteps, GAUSS, exact)

    return sampled


def _mean_error(sampled: Callable[[Mixture], Tensor]) -> float:
    return sum(_error(m, sampled(m)) for m in MIXTURES.values()) / len(MIXTURES)


def _pndm(mixture: Mixture) -> Tensor:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **TRAINED)
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps) == 21
    exact = mixture.velocity(samplers.lambdas()[scheduler.timesteps])
    x = GAUSS
    for i, t in enumerate(scheduler.timesteps.tolist()):
        x = scheduler.step(exact(x, i), t, x).prev_sample
    return x


WHOLE = {"timestep_spacing": "leading", **TRAINED}  # starts from noise of variance s^2 + 1
MEASURED: dict[str, tuple[int, Callable[[Mixture], Tensor]]] = {
    "heun": (20, _on(diffusers.HeunDiscreteScheduler(**WHOLE), _ours(10), twice=True)),
    "lms": (8, _on(diffusers.LMSDiscreteScheduler(**WHOLE), _ours(8))),
    "pndm": (20, _pndm),
    "karras": (8, _on(_dpm(), _karras(8))),
    "exponential": (20, _on(_dpm(), _exponential(20))),
    "beta": (20, _on(_dpm(), _beta(20))),
}
"""The evaluations of dpmpp to compare with, and the samples of what is refused."""


@pytest.mark.parametrize("sampler", MEASURED)
def test_what_is_refused_is_as_bad_as_is_said(sampler: str) -> None:
    """The reason says how many times the error of dpmpp it has on the mixtures, within 5 %."""
    steps, sampled = MEASURED[sampler]
    ratio = _mean_error(sampled) / _mean_error(lambda m: _sampled("dpmpp", steps, m))
    with pytest.raises(ConfigError, match=f"sampler = '{sampler}' is refused: ") as caught:
        samplers.build(sampler, 20)
    said = re.search(r"([\d.]+) times that", str(caught.value))
    assert said is not None
    assert ratio == pytest.approx(float(said[1]), rel=0.05)
    assert f"{steps}" in str(caught.value)


def test_ancestral_euler_is_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same draws EulerAncestralDiscreteScheduler makes the samples of our DDPM."""
    assert set(REFUSED) == {"euler_a", *MEASURED}
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    solver = samplers.build("ddpm", 20)
    noise = noise_of(solver, GAUSS)
    draws = iter([*noise[1:], torch.zeros_like(GAUSS)] * len(MIXTURES))
    monkeypatch.setattr(module, "randn_tensor", lambda *_args, **_options: next(draws))
    theirs = _on(diffusers.EulerAncestralDiscreteScheduler(**WHOLE), _ours(20))
    for mixture in MIXTURES.values():
        ours = solver.run(mixture.velocity(solver.lambdas), noise)
        assert (theirs(mixture) - ours).abs().max() < 2e-4 * mixture.sd


def test_the_noise_levels_of_karras_are_those_of_the_paper() -> None:
    """The levels by which they are refused fall from one end to the other, evenly in the power 1 / 7."""
    levels = np.array(_karras(20))
    assert levels[[0, -1]] == pytest.approx([samplers.SIGMA_MAX, samplers.SIGMA_MIN], rel=1e-6)
    assert np.ptp(np.diff(levels ** (1 / 7))) < 1e-6
