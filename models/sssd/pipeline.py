"""The model as a pipeline of diffusers: any of its schedulers, saved and shared in its folders."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Generator, Tensor

from barcast.models import samplers
from barcast.models.errors import ConfigError
from barcast.models.sssd.config import SSSDConfig
from barcast.models.sssd.model import Features, SSSDModel, Statistics

try:
    from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
    from diffusers.configuration_utils import register_to_config
except ImportError as error:
    raise ConfigError(
        f"diffusers cannot be imported ({error}); install barcast with its extra hub: "
        "pip install 'barcast[hub]'"
    ) from error

NOISE_SCHEDULE = {
    "num_train_timesteps": samplers.TIMESTEPS,
    "beta_schedule": samplers.SCHEDULE,
    "prediction_type": samplers.PREDICTION,
}
"""What a scheduler must be made with: that for which the model was trained."""

LEVELS = ("karras", "exponential", "beta", "flow")
UNWANTED = (
    *("clip_sample", "thresholding", "rescale_betas_zero_snr", "use_lu_lambdas"),
    *(f"use_{name}_sigmas" for name in LEVELS),
)
"""What a scheduler must be made without: it would cut outcomes, or ask at other noise levels."""


class SSSDNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An `SSSDModel` as diffusers saves and loads it: `settings` are those of `SSSDConfig.to_dict`."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.model = SSSDModel(SSSDConfig.from_dict(settings))


class SSSDPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A model and a scheduler of diffusers, such as `DPMSolverMultistepScheduler(**NOISE_SCHEDULE)`.

    `save_pretrained` writes both into a folder of which `SSSDPipeline.from_pretrained` makes the same
    pipeline again; `push_to_hub` uploads that folder. Raises `ConfigError` for a scheduler that would sample
    with another noise schedule than the model was trained with.
    """

    def __init__(self, model: Any, scheduler: Any) -> None:
        super().__init__()
        for name, value in NOISE_SCHEDULE.items() | {(name, False) for name in UNWANTED}:
            if scheduler.config.get(name, value) != value:
                raise ConfigError(
                    f"{type(scheduler).__name__} has {name} = {scheduler.config[name]!r}, and the model was "
                    f"trained for {value!r}: make it with {name}={value!r}"
                )
        if not torch.equal(scheduler.alphas_cumprod, samplers.alphas_cumprod()):
            raise ConfigError(
                f"{type(scheduler).__name__} has noise levels of its own, and the model was trained for "
                f"those of {samplers.SCHEDULE}: make it with NOISE_SCHEDULE and without trained_betas"
            )
        if isinstance(model, SSSDModel):
            network = SSSDNetwork(model.config.to_dict())
            network.model = model
            model = network
        self.register_modules(model=model, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        features: Features,
        horizons: Sequence[int],
        num_inference_steps: int = 20,
        num_samples: int = 50,
        generator: Generator | None = None,
    ) -> dict[int, Statistics]:
        """Forecast the horizons of these minutes, by their minutes.

        Noise is as in `SSSDModel.inference_forward`; what a stochastic scheduler adds is drawn from
        `generator`, or by the configured seed. A scheduler that can be asked at any timesteps is asked on
        the grid that is uniform in log-SNR, others on their own.
        """
        model = self.model.model
        indices = model.config.model.horizons.indices(horizons)
        noise = model.noise(indices, num_samples, generator)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # it has the state of one run
        if "timesteps" in signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=samplers.grid(num_inference_steps))
        else:
            scheduler.set_timesteps(num_inference_steps)
        if generator is None:
            generator = Generator().manual_seed(model.config.system.seed)
        drawn = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}

        c, steps = model.context(features), scheduler.timesteps
        lam = _log_snr(steps)[:, None].expand(-1, len(c))
        film, shift = model.modulation(c.expand(len(lam), -1, -1), lam)  # (evaluations, B, .)
        x = noise.expand(len(c), -1, -1) * scheduler.init_noise_sigma
        for i, t in enumerate(steps):
            v = model.velocity(scheduler.scale_model_input(x, t), film[i, :, None], shift[i, :, None])
            x = scheduler.step(v, t, x, **drawn).prev_sample
        found = model.summary(model.outcomes(x), indices)
        return {minutes: found[h] for minutes, h in zip(horizons, indices, strict=True)}


def _log_snr(t: Tensor) -> Tensor:
    """log(alpha / sigma) at timesteps, those between two by interpolation of sigma / alpha."""
    ratio = torch.exp(-samplers.lambdas())
    low = t.double().floor().long().clamp(0, len(ratio) - 2)
    share = t.double() - low
    return -torch.log(ratio[low] * (1 - share) + ratio[low + 1] * share).float()
