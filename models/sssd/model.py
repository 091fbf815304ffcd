"""`SSSDModel`: sequences of several timeframes -> samples of the outcomes of all horizons.

It is made of the parts of the network that serves: S4D layers, the denoiser, the samplers, the optimiser's
loop. What is diffused is the vector of all horizons' outcomes, divided by their spread; the denoiser predicts
v = alpha eps - sigma x0 on the cosine schedule. A forecast folds all samples of all horizons into one call of
the denoiser for each evaluation.

Shapes: B rows, S samples, H horizons, L steps of a sequence, F features.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from statistics import median
from timeit import default_timer, repeat
from typing import Any, TypedDict, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models import optimiser, samplers
from barcast.models.errors import ConfigError, DataError
from barcast.models.optimiser import Budget, Fitted, Phase, Progress, Share, processes
from barcast.models.scores import crps
from barcast.models.sssd import legacy
from barcast.models.sssd.config import SSSDConfig
from barcast.models.sssd.encoder import Fused, MultiScaleS4D
from barcast.models.sssd.head import HorizonEmbedding, build_head
from barcast.models.sssd.layers import Architecture, linear
from barcast.models.sssd.network import sobol_normals

STEPS = {"dpmpp": 20, "ddim": 20, "euler": 25, "kdpm2": 30}
"""The samplers that `ImprovedSSSDModel` takes as its `scheduler_type`, and their steps by default."""

GAMMA = 5.0  # of the loss's weights (Hang et al. 2023, arXiv:2303.09556)
REFERENCE = ("dpmpp", 200)  # what the error of other samplers is measured against
RUNS = 5  # of what is timed, after one to warm up
LOOK_SAMPLES, LOOK_SAMPLER = 64, ("dpmpp", 8)
HELD_OUT = 6  # one in so many rows, the newest, chooses between the weights of a training

Timer = Callable[[], float]

Features = Mapping[str, Tensor]
"""A sequence for each timeframe, (B, L, F); L may differ between them."""


class Statistics(TypedDict):
    """The forecast of one horizon: each (B,), and the `samples` (S, B) that it was taken from.

    `q05` to `q95` is a central interval of 90 %; `std` is that of the samples, 0 of one.
    """

    mean: Tensor
    std: Tensor
    q05: Tensor
    q50: Tensor
    q95: Tensor
    samples: Tensor


class Comparison(TypedDict):
    """One sampler's forecast: the median time of five, and its distance from a fine solution.

    `error` is the root mean square over all samples of what the steps miss, in standard deviations of the
    samples of 200 steps from the same noise; `evaluations` counts calls of the denoiser.
    """

    time_ms: float
    predictions: dict[int, Statistics]
    steps: int
    evaluations: int
    error: float


class SSSDModel(nn.Module):
    """A diffusion model of the outcomes of all horizons, given sequences of features.

    `centre` and `spread` (H,) standardise outcomes; a spread of zero stands for one not known yet. Weights
    and the noise of forecasts are functions of `config.system.seed`. After weights were changed by hand, call
    `eval()` before forecasting: it forgets what was computed from the former ones.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, config: SSSDConfig) -> None:
        super().__init__()
        self.config = config
        self.scheduler_type = "ddim"
        self.default_inference_steps = config.model.diffusion.steps_inference
        encoder, horizons = config.model.encoder, config.model.horizons.minutes
        a = Architecture(
            features=encoder.feature_dim,
            channels=encoder.feature_dim,
            context=max(config.data.lookback_bars.values()),
            horizons=len(horizons),
            path=len(horizons),
            samples=1,
            state=config.model.s4.state_dim,
            code=encoder.context_dim,
            denoiser=config.model.head.latent_dim,
            head=config.model.head.type,
        )
        self.generator = Generator().manual_seed(config.system.seed)
        channels, layers = [a.channels] * len(encoder.timeframes), config.model.s4.n_layers
        self.encoder = MultiScaleS4D(channels, a.state, a.poles, layers, self.generator)
        self.leave = linear(a.state, a.code, self.generator)
        self.head = build_head(a, self.generator)
        width = config.model.horizons.embedding_dim
        self.horizons = HorizonEmbedding(horizons, width, self.generator)
        self.location = linear(a.code, width, None)
        self.register_buffer("centre", torch.zeros(a.horizons))
        self.register_buffer("spread", torch.zeros(a.horizons))
        level = samplers.alphas_cumprod()
        self.alpha, self.sigma, self.lam = level**0.5, (1 - level) ** 0.5, samplers.lambdas().float()
        weights = torch.tensor(config.model.horizons.weights, dtype=torch.float32)
        self.weights = weights / weights.mean()
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def standardise(self, targets: Tensor) -> None:
        """Take centre and spread of the outcomes from the targets (B, H) of the training part."""
        targets = self._targets(targets, len(targets))
        spread = targets.std(0, correction=0)
        if not (spread > 0).all():
            minutes = self.config.model.horizons.minutes[int(spread.argmin())]
            raise DataError(f"the targets of the horizon {minutes} minutes never move: give other rows")
        self.centre.copy_(targets.mean(0))
        self.spread.copy_(spread)

    def context(self, features: Features) -> Tensor:
        """What the sequences say, (B, code); raise `DataError` for others than the model is made for."""
        return functional.silu(self.leave(self._fused(features).state))

    def importance(self, features: Features) -> dict[str, float]:
        """The share of each timeframe in the context, averaged over the rows; they sum to one."""
        with torch.no_grad():
            shares = self._fused(features).importance.mean(0)
        return dict(zip(self.config.model.encoder.timeframes, shares.tolist(), strict=True))

    def loss(self, features: Features, targets: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The v-prediction loss at timesteps t (B,) with noise eps (B, H), by rows' and horizons' weights.

        Rows weigh min(SNR, 5) / (SNR + 1), horizons as the configuration says.
        """
        if not self.spread.all():
            raise ConfigError("the spread of outcomes is not known: call `standardise` with the targets")
        c = self.context(features)
        x0 = (self._targets(targets, len(c)) - self.centre) / self.spread
        alpha, sigma, lam = self.alpha[t, None], self.sigma[t, None], self.lam[t]
        v = self.velocity(alpha * x0 + sigma * eps, *self.modulation(c, lam))
        error = (self.weights * (v - (alpha * eps - sigma * x0)) ** 2).mean(-1)
        ratio = torch.exp(2 * lam)
        mean: Tensor = (ratio.clamp(max=GAMMA) / (ratio + 1) * error).mean()
        return mean

    def training_step(self, batch: tuple[Features, Tensor]) -> dict[str, Tensor]:
        """The loss of features and targets (B, H), {"loss": ()}; noise comes from the model's generator."""
        features, targets = batch
        if not self.training:
            self.train()
        t, eps = draw(len(targets), len(self.weights), self.generator)
        return {"loss": self.loss(features, targets, t, eps)}

    @torch.no_grad()
    def inference_forward(
        self,
        features: Features,
        horizons: Sequence[int],
        num_samples: int = 100,
        sampler: str | None = None,
        num_steps: int | None = None,
        generator: Generator | None = None,
    ) -> dict[int, Statistics]:
        """Forecast the horizons of these indices: `config.model.horizons.indices` has those of minutes.

        Every row and every call starts from the same noise, scrambled Sobol points by the configured seed, or
        independent draws of `generator`: a row alone and one among others differ by rounding only. Raises
        `ConfigError` for an unknown horizon, sampler or number of steps, `DataError` for wrong features.
        """
        default = self.default_inference_steps if sampler is None else STEPS.get(sampler, 20)
        solver = samplers.build(sampler or self.scheduler_type, default if num_steps is None else num_steps)
        noise = self.noise(horizons, num_samples, generator, solver.draws)
        return self.summary(self.solve(solver, self.context(features), noise), horizons)

    def noise(
        self, horizons: Sequence[int], num_samples: int, generator: Generator | None = None, draws: int = 0
    ) -> Tensor:
        """What a forecast starts from, (S, H), or (1 + draws, S, H) for a sampler that draws on its way.

        Raises `ConfigError` for an unknown horizon, and for no sample.
        """
        minutes, seed = self.config.model.horizons.minutes, self.config.system.seed
        for h in horizons:
            if not isinstance(h, int) or not 0 <= h < len(minutes):
                raise ConfigError(
                    f"horizon {h!r} is no index: choose from 0 to {len(minutes) - 1}, which stand for "
                    f"{', '.join(map(str, minutes))} minutes"
                )
        if num_samples < 1:
            raise ConfigError(f"num_samples = {num_samples} is not possible: give at least 1")
        shape = (num_samples, len(minutes))
        start = torch.randn(shape, generator=generator) if generator else sobol_normals(*shape, seed)
        if not draws:
            return start
        fresh = torch.randn(draws, *shape, generator=generator or Generator().manual_seed(seed))
        return torch.cat([start[None], fresh])

    def solve(self, solver: samplers.Solver, c: Tensor, noise: Tensor) -> Tensor:
        """Contexts (B, code) and noise as of `noise`, the same for every row -> outcomes (B, S, H)."""
        lam = solver.lambdas.float()[:, None].expand(-1, len(c))
        film, shift = self.modulation(c.expand(len(lam), -1, -1), lam)  # (evaluations, B, .)
        film, shift = film[:, :, None], shift[:, :, None]
        start = noise[..., None, :, :].expand(*noise.shape[:-2], len(c), -1, -1)
        return self.outcomes(solver.run(lambda x, i: self.velocity(x, film[i], shift[i]), start))

    def modulation(self, c: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts (..., code) and log(alpha / sigma) (...) -> what `velocity` takes of them."""
        sigma = torch.sigmoid(-2 * lam).sqrt()
        location = self.location(c) @ self.horizons(self.config.model.horizons.minutes).T  # (..., H)
        return self.head.modulation(c, lam), sigma[..., None] * location

    def velocity(self, x: Tensor, film: Tensor, shift: Tensor) -> Tensor:
        """v of x_t (..., H): that of the denoiser, and of a location linear in context and horizon.

        Through the denoiser alone a location is learnt late: all that leads to it begins near zero.
        """
        v: Tensor = self.head(x, film) - shift
        return v

    def outcomes(self, x0: Tensor) -> Tensor:
        """Outcomes (..., H) of standardised ones."""
        return self.centre + torch.where(self.spread > 0, self.spread, 1.0) * x0

    def summary(self, outcomes: Tensor, horizons: Sequence[int]) -> dict[int, Statistics]:
        """Statistics of outcomes (B, S, H) at the horizons of these indices."""
        found = {}
        for h in horizons:
            x = outcomes[..., h].T  # (S, B)
            low, middle, high = torch.quantile(x, torch.tensor([0.05, 0.5, 0.95]), dim=0)
            found[h] = Statistics(
                mean=x.mean(0), std=x.std(0, correction=0), q05=low, q50=middle, q95=high, samples=x
            )
        return found

    def save_checkpoint(
        self,
        path: str | PathLike[str],
        epoch: int = 0,
        optimizer_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write weights and configuration in the layout `model_state_dict`."""
        legacy.write(path, self.state_dict(), self.config.to_dict(), epoch, optimizer_state, metrics)

    def compare_schedulers(
        self,
        features: Features,
        horizons: Sequence[int],
        num_samples: int = 50,
        num_steps: int = 20,
        timer: Timer = default_timer,
    ) -> dict[str, Comparison]:
        """Forecast by each sampler of `STEPS` in so many steps, from one noise; `timer` is in seconds."""
        forecast = partial(self.inference_forward, features, horizons, num_samples)
        exact = _stacked(forecast(*REFERENCE))
        found: dict[str, Comparison] = {}
        for name in STEPS:
            time, predictions = timed(partial(forecast, name, num_steps), timer)
            missed = (_stacked(predictions) - exact) / exact.std(1, correction=0, keepdim=True)
            found[name] = Comparison(
                time_ms=time,
                predictions=predictions,
                steps=num_steps,
                evaluations=samplers.build(name, num_steps).evaluations,
                error=float(missed.square().mean().sqrt()),
            )
        return found

    def _fused(self, features: Features) -> Fused:
        names, width = self.config.model.encoder.timeframes, self.config.model.encoder.feature_dim
        if set(features) != set(names):
            raise DataError(
                f"features are of {', '.join(features) or 'no timeframe'}, and the model sees "
                f"{', '.join(names)}: give a sequence of each"
            )
        for name in names:
            if not isinstance(features[name], Tensor):
                raise DataError(f"features of {name} are {_kind(features[name])}: give torch tensors")
        rows = len(features[names[0]])
        for name in names:
            x = features[name]
            if x.dim() != 3 or x.shape[2] != width or len(x) != rows or not x.shape[1]:
                raise DataError(
                    f"features of {name} have the shape {tuple(x.shape)}: give ({rows}, L, {width}), "
                    "the width being model.encoder.feature_dim"
                )
            if not torch.isfinite(x).all():
                raise DataError(f"features of {name} are not all finite: mend or remove the rows")
        fused: Fused = self.encoder([features[name].float() for name in names])
        return fused

    def _targets(self, targets: Tensor, rows: int) -> Tensor:
        shape = (rows, len(self.config.model.horizons.minutes))
        if not isinstance(targets, Tensor):
            raise DataError(f"targets are {_kind(targets)}: give a torch tensor")
        if targets.shape != shape or not torch.isfinite(targets).all():
            raise DataError(
                f"targets of the shape {tuple(targets.shape)} cannot be learnt: give finite ones, {shape}, a "
                "row for each of the features and a column for each of model.horizons.minutes"
            )
        return targets.float()


class ImprovedSSSDModel(SSSDModel):
    """The same network with a sampler of its own, one of `STEPS`, and its number of steps."""

    def __init__(self, config: SSSDConfig, scheduler_type: str = "dpmpp") -> None:
        if scheduler_type not in STEPS:
            raise ConfigError(
                f"scheduler_type = {scheduler_type!r} is unknown: choose one of {', '.join(STEPS)}"
            )
        super().__init__(config)
        self.scheduler_type = scheduler_type
        self.default_inference_steps = STEPS[scheduler_type]

    @classmethod
    def from_sssd_checkpoint(
        cls, checkpoint_path: str | PathLike[str], config: SSSDConfig, scheduler_type: str = "dpmpp"
    ) -> "ImprovedSSSDModel":
        """Load the weights of an `SSSDModel`; see `legacy.read` for the layouts that there are.

        Raises `CheckpointError` for a file that is damaged, of another network or other settings: all weights
        fit, or none are taken.
        """
        model = cls(config, scheduler_type)
        model.load_state_dict(legacy.read(checkpoint_path, config.to_dict(), model.state_dict()))
        return model.eval()


def fit(
    model: SSSDModel,
    features: Features,
    targets: Tensor,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Fitted:
    """Train on rows in order of time, as `model.config.training` says; the newest sixth chooses the weights.

    The loop is the one that trains the served models: a warm-up and a cosine, and averaged weights, of which
    those that forecast the newest rows best remain. The outcomes of the last rows before the newest sixth
    reach into it by up to the longest horizon: where that matters, leave those rows out, since rows bear no
    times. Raises `DataError` for rows not to be learnt from.
    """
    options, n = model.config.training, len(targets) - len(targets) // HELD_OUT
    if n == len(targets) or any(len(x) != len(targets) for x in features.values()):
        counts = ", ".join(f"{len(x)} of {name}" for name, x in features.items())
        raise DataError(
            f"{counts} and {len(targets)} rows of targets cannot be learnt: give as many of each, at least "
            f"{HELD_OUT}"
        )
    model.standardise(targets[:n])
    learnt = {name: x[:n] for name, x in features.items()}
    newest = {name: x[n:] for name, x in features.items()}
    levels, solver = torch.arange(1, 20) / 20, samplers.build(*LOOK_SAMPLER)

    def loss(share: Share) -> Tensor:
        g, B = share.generator, options.batch_size
        at = share.rows(torch.randint(n, (B,), generator=g))
        t, eps = (share.rows(x) for x in draw(B, targets.shape[1], g))
        return model.loss({name: x[at] for name, x in learnt.items()}, targets[at], t, eps)

    def look() -> list[float]:
        noise = sobol_normals(LOOK_SAMPLES, targets.shape[1], model.config.system.seed)
        found = []
        for at in torch.split(torch.arange(len(targets) - n), options.batch_size):
            c = model.context({name: x[at] for name, x in newest.items()})
            outcomes = model.solve(solver, c, noise)
            found.append(torch.quantile(outcomes, levels, dim=1).permute(1, 2, 0))  # (., H, Q)
        quantiles = torch.cat(found)
        return [float((crps(targets[n:], quantiles, levels) / model.spread.numpy()).mean())]

    accelerator = processes(options.precision, options.gradient_accumulation_steps, options.batch_size)
    phase = Phase("denoiser", [model], options.learning_rate, loss, look, lambda: None)
    generator = Generator().manual_seed(model.config.system.seed)
    fitted = optimiser.fit(model, [phase], Budget(options.steps), generator, accelerator, None, progress)
    model.eval()
    return fitted


def draw(rows: int, horizons: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) that are uniform and stratified over the rows, and noise (B, H)."""
    position = (torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)) / rows
    t = (samplers.TIMESTEPS * position).long().clamp(max=samplers.TIMESTEPS - 1)
    return t, torch.randn(rows, horizons, generator=generator)


T = TypeVar("T")


def timed(forecast: Callable[[], T], timer: Timer = default_timer) -> tuple[float, T]:
    """The median milliseconds of a forecast, and what it says."""
    found = forecast()
    return 1000 * median(repeat(forecast, number=1, repeat=RUNS, timer=timer)), found


def _forget(model: nn.Module, _: Any) -> None:
    """Let the layers forget what they computed from former weights."""
    model.train(model.training)


def _kind(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def _stacked(predictions: Mapping[int, Statistics]) -> Tensor:
    """(horizons, S, B)."""
    return torch.stack([p["samples"] for p in predictions.values()])
