"""`LDM4TSModel`: bars of a window -> the prices of all horizons, by a latent diffusion over images.

It is made of the parts of the network that serves: `LDM4TS`, the samplers, the backends of attention, the
optimiser's loop. What is diffused is what is to come: noise of a random level is added to the latents of the
right part of an image, and the U-Net, which sees the left part, says v = alpha eps - sigma x0. A step of
training asks it once. A forecast asks it `sampling_steps` times, whatever the number of samples, which are
rows of one batch.

Shapes: B rows, L bars, S samples, H horizons, T bars to come (the longest horizon), G steps of a way, P
pixels, p = P / 8 latents of a side, of which f = p / 4 columns are to come, N tokens of width W.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models import samplers
from barcast.models.catalog import MOST_STEPS, SAMPLERS, check_sampler
from barcast.models.checkpoint import fill
from barcast.models.errors import CheckpointError, ConfigError
from barcast.models.ldm4ts import attention, vision
from barcast.models.ldm4ts.autoencoder import LATENT
from barcast.models.ldm4ts.bars import (
    FEATURES,
    LEAST_CONTEXT,
    MOST_CONTEXT,
    Seen,
    checked,
    flag,
    outcomes,
    prices,
    rising,
    seen,
    whole,
)
from barcast.models.ldm4ts.forecaster import SAMPLER, quantiles_of
from barcast.models.ldm4ts.losses import DIRECT, Levels, estimate, noise_levels, pinball
from barcast.models.ldm4ts.network import LDM4TS, PRESET, PRESETS, LatentArchitecture, timesteps_of
from barcast.models.ldm4ts.training import DROP, FAR
from barcast.models.paths import path_steps
from barcast.models.scaling import CHANNELS
from barcast.models.sssd.marginal import PROBABILITIES, knot_scores, piecewise
from barcast.models.sssd.network import sobol_normals

QUANTILES = {"q025": 0.025, "q05": 0.05, "q50": 0.5, "q95": 0.95, "q975": 0.975}
LEVELS = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
LONGEST, MOST_HORIZONS = 5000, 64
"""Bars of a horizon, and horizons, at most."""
WAYS = 16
"""Random ways that the latents of a model are measured by which has learnt nothing yet."""
OWN = 0.01
"""Weights of map and gate at the start, where those of the network that serves are zero."""
HOW = ("sampling_steps", "sampler", "attention_backend", "enable_gradient_checkpointing")
"""What may be changed of a model that has learnt."""
FORMAT = "barcast LDM4TSModel 1"


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that a model is made of but its device; see `LDM4TSModel`. Raises `ConfigError`."""

    image_size: int | tuple[int, int]
    horizons: tuple[int, ...]
    diffusion_steps: int
    sampling_steps: int
    attention_backend: str
    enable_gradient_checkpointing: bool
    context: int
    preset: str
    sampler: str
    seed: int

    def __post_init__(self) -> None:
        sides = self.image_size if isinstance(self.image_size, list | tuple) else (self.image_size,) * 2
        if len(sides) != 2 or sides[0] != sides[1] or sides[0] not in vision.SIZES:
            known = ", ".join(map(str, vision.SIZES))
            raise ConfigError(
                f"image_size = {self.image_size!r} is not possible: give a side of {known} pixels, or twice "
                "the same in a tuple"
            )
        object.__setattr__(self, "image_size", sides[0])
        object.__setattr__(self, "horizons", rising("horizons", self.horizons, LONGEST, MOST_HORIZONS))
        if type(self.diffusion_steps) is not int or self.diffusion_steps != samplers.TIMESTEPS:
            raise ConfigError(
                f"diffusion_steps = {self.diffusion_steps!r} is not what this model trains and samples with: "
                f"write {samplers.TIMESTEPS}; fewer would make the same noise coarser, and save no memory "
                "and no time: a step of training asks the U-Net once whatever they are, a forecast as often "
                "as sampling_steps says"
            )
        check_sampler(self.sampler)
        whole("sampling_steps", self.sampling_steps, SAMPLERS[self.sampler], MOST_STEPS)
        whole("context", self.context, LEAST_CONTEXT, MOST_CONTEXT)
        whole("seed", self.seed, 0, 2**31 - 1)
        if self.preset not in PRESETS:
            raise ConfigError(f"preset = {self.preset!r} is unknown: take one of {', '.join(PRESETS)}")
        flag("enable_gradient_checkpointing", self.enable_gradient_checkpointing)


class Losses(NamedTuple):
    """The losses of one call of the U-Net, and the one estimate of what is to come that it makes.

    `loss` () is the sum that is learnt by, `velocity` () the weighted error of v, `direct` () that of the way
    which the estimated latents say, `fused` (B, H) the outcomes in deviations after the gate, with gradients,
    `latent` (B, 4, p, f) the estimate.
    """

    loss: Tensor
    velocity: Tensor
    direct: Tensor
    fused: Tensor
    latent: Tensor


class Drawn(NamedTuple):
    """What was sampled: outcomes (B, S, H) and quantiles (B, H, Q) in deviations, latents (B, S, 4, p, f)."""

    samples: Tensor
    quantiles: Tensor
    latent: Tensor


class LDM4TSModel(nn.Module):
    """A latent diffusion of the prices to come, given the bars of a window of any symbol.

    `image_size` is the side of an image in pixels: 64, 128, 224 or 256. `horizons` are in bars ahead, of
    whatever timeframe the bars have: on bars of 5 minutes 15 is 75 minutes. `context` are the bars that a
    forecast sees, the newest of those it is given. `sampler` and `sampling_steps` solve for what is to come;
    `diffusion_steps` is 1000, the schedule's length, and nothing else. `attention_backend` is `default`,
    `flash` or `auto` (see `attention.choose`): the model trains, so that sage is refused. `preset` names the
    sizes of the network. Weights and noise are functions of `seed`. Raises `ConfigError` for what cannot be.

    `unet_calls` counts the calls of the U-Net by the newest `forward`. `noise_generator` draws levels and
    noise of training steps that are given no generator.
    """

    alpha: Tensor
    sigma: Tensor
    weight: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int] = (64, 64),
        horizons: Sequence[int] = (15, 60, 240),
        *,
        diffusion_steps: int = samplers.TIMESTEPS,
        sampling_steps: int = 20,
        attention_backend: str = "default",
        enable_gradient_checkpointing: bool = True,
        context: int = 100,
        preset: str = PRESET,
        sampler: str = SAMPLER,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.options = o = Options(
            image_size=image_size,
            horizons=horizons,  # type: ignore[arg-type]
            diffusion_steps=diffusion_steps,
            sampling_steps=sampling_steps,
            attention_backend=attention_backend,
            enable_gradient_checkpointing=enable_gradient_checkpointing,
            context=context,
            preset=preset,
            sampler=sampler,
            seed=seed,
        )
        at = _device(device)
        self.horizons, self.steps = o.horizons, path_steps(o.horizons)
        self._places = [self.steps.index(h) for h in o.horizons]
        a = LatentArchitecture.of(
            o.preset,
            features=FEATURES,
            channels=CHANNELS,
            context=o.context - 1,
            horizons=len(o.horizons),
            path=len(self.steps),
            samples=1,
            image=o.image_size,
        )
        self.noise_generator = Generator().manual_seed(o.seed)
        self.net = LDM4TS(a, self.noise_generator)
        self._begin()
        attention.use_backend(self.net, o.attention_backend, training=True, device=at.type)
        attention.set_gradient_checkpointing(self.net, o.enable_gradient_checkpointing)
        self.solver = samplers.build(o.sampler, o.sampling_steps)
        for name, x in noise_levels()._asdict().items():
            self.register_buffer(name, x, persistent=False)
        self.unet_calls = 0
        self.net.unet.register_forward_pre_hook(self._count)
        self.to(at)

    def _begin(self) -> None:
        """Before anything is learnt: the map says a normal law, and latents are measured on random ways."""
        g, net = self.noise_generator, self.net
        with torch.no_grad():
            for part in (net.map.head, net.gate.weight):
                part.normal_(0, OWN, generator=g)
            net.map.static.copy_(knot_scores().float().expand_as(net.map.static))
            a = net.architecture
            sequence = torch.randn(WAYS, a.context, a.channels, generator=g)
            net.measure(self.raw_latents(sequence, torch.randn(WAYS, a.path, generator=g)))
        net.vae.requires_grad_(False)

    def _count(self, _module: nn.Module, _given: Any) -> None:
        self.unet_calls += 1

    def forward(
        self,
        ohlcv: Tensor,
        current_price: Any = None,
        num_samples: int = 1,
        return_all: bool = False,
        training_mode: bool = False,
        *,
        targets: Tensor | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Forecast prices, or, with `training_mode` and `targets`, the losses of one call of the U-Net.

        `ohlcv` (B, L, 5) are closed bars, oldest first, of at least `context` bars; `current_price`, a number
        or one for each row, is what returns are counted from, by default the newest close. All rows start
        from the same noise, Sobol points by the seed or draws of `generator`, and no row depends on another.

        Without `training_mode`: `mean`, `std`, `q025`, `q05`, `q50`, `q95` and `q975` of the price at each
        horizon, (B, H). `q05` to `q95` is a central interval of 90 %, `q025` to `q975` of 95 %. Of one sample
        `std` is 0 and the quantiles are it. No gradients are kept.

        With `training_mode`: noise of a random level, the same chance for each of the 1000, is added to the
        latents of `targets` (B, T), the closes of the T bars that follow, T being the longest horizon. `loss`
        () is what is learnt by; `velocity_loss` and `direct_loss` () are parts of it. The prices are those of
        the one estimate that the call makes of what is to come, with gradients: never a forecast, as it has
        been shown some of the outcome.

        `return_all` adds `samples` (B, S, H), prices of which the moments are; `image` (B, 3, P, P) of what
        was, its right quarter 0; `latent` (B, S, 4, p, f), what was sampled, of mean 0 and variance 1; and
        `conditioning` (B, N, W), the tokens that the U-Net attends to. In `training_mode` S is 1.

        Raises `DataError` for bars or prices that cannot be, `ConfigError` for such options.
        """
        self.unet_calls = 0
        rows = self.seen(ohlcv, current_price)
        whole("num_samples", num_samples, 1)
        if training_mode:
            if targets is None:
                raise ConfigError(
                    "training_mode=True learns from what came after: give targets, the closes of the "
                    f"{self.horizons[-1]} bars that follow each row, (B, {self.horizons[-1]})"
                )
            if num_samples != 1:
                raise ConfigError(
                    f"num_samples = {num_samples} is for forecasts: a step of training makes one estimate"
                )
            return self._trained(rows, targets, generator or self.noise_generator, return_all)
        if targets is not None:
            raise ConfigError("targets are for training_mode=True: a forecast must not be given them")
        with torch.no_grad():
            drawn = self.draw(rows, num_samples, LEVELS, generator)
            found = self._prices(rows, drawn.samples, drawn.quantiles)
            return found | (self._all(rows, drawn.samples, drawn.latent) if return_all else {})

    def seen(self, ohlcv: Tensor, current_price: Any = None) -> Seen:
        """Bars (B, L, 5) and prices as the network sees them; raise `DataError` for such that cannot be."""
        x = checked(ohlcv, self.options.context)
        device = self.alpha.device
        return seen(x.to(device), prices(current_price, x).to(device))

    def ways(self, rows: Seen, targets: Tensor) -> Tensor:
        """The outcomes (B, G) float32 of closes to come (B, T), each step in deviations of its own."""
        steps = torch.tensor(self.steps, device=rows.price.device)
        away = outcomes(targets, rows, self.horizons[-1])[:, steps - 1] / rows.spread(steps)
        return away.clamp(-FAR, FAR).float()

    def losses(
        self, rows: Seen, known: Tensor, x0: Tensor, way: Tensor, t: Tensor, eps: Tensor, kept: Tensor | float
    ) -> Losses:
        """One call of the U-Net, at timesteps t (B,) with noise eps (B, 4, p, f).

        `known` (B, 5, p, p) and `x0` (B, 4, p, f) are latents of what was and of what is to come, `way`
        (B, G); `kept` (B, F + W) is 0 for what map and gate are not told, else 1 over the share that is.
        """
        net, z = self.net, way[:, self._places]
        tokens = net.tokens(rows.features, rows.sequence)
        levels = Levels(self.alpha, self.sigma, self.weight)
        found = estimate(net, levels, t, x0, eps, way, known, tokens)
        velocity, direct = found.velocity.mean(), found.direct.mean()
        told = net.told(rows.features, rows.sequence) * kept
        knots = net.map.of_members(told)  # (B, M, H, K)
        miss, p = z[:, None, :, None] - knots, torch.tensor(PROBABILITIES, device=z.device)
        mapped = pinball(miss, p).mean()
        share = torch.sigmoid(net.gate(told))
        fused = share * found.way[:, self._places] + (1 - share) * knots[..., knots.shape[-1] // 2].mean(1)
        # where noise is nearly all of x it tells nothing of the outcome: there the gate can be judged
        gated = functional.smooth_l1_loss(fused, z, reduction="none").mean(1)
        gate = DIRECT * (self.sigma[t] ** 8 * gated).mean()
        return Losses(velocity + direct + mapped + gate, velocity, direct, fused, found.latent)

    def draw(self, rows: Seen, samples: int, levels: Tensor, generator: Generator | None = None) -> Drawn:
        """Sample what is to come and fuse it with the map; quantiles are at levels (Q,), float64."""
        z, latent = self.sample(rows, samples, generator)
        share, knots = self.told(rows)
        return Drawn(*_fused(z, share, knots, levels), latent)

    def sample(
        self,
        rows: Seen,
        samples: int,
        generator: Generator | None = None,
        solver: samplers.Solver | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outcomes (B, H, S) float64 in deviations, and latents (B, S, 4, p, f): one batch for all samples.

        The U-Net is called once for each evaluation of the solver, by default that of the options.
        """
        net, solver = self.net, solver or self.solver
        known, tokens = net.known(rows.sequence), net.tokens(rows.features, rows.sequence)
        times = timesteps_of(solver.lambdas).to(self.alpha.device)
        noise = self.noise(samples, solver.draws, generator).to(self.alpha.device)[..., None, :, :, :, :]
        start = noise.expand(*noise.shape[:-5], len(rows), *noise.shape[-4:])  # ([draws,] B, S, 4, p, f)
        latent = solver.run(net.asked(known, tokens, times), start)
        return net.way(latent)[..., self._places].transpose(1, 2).double().cpu(), latent

    def told(self, rows: Seen) -> tuple[Tensor, Tensor]:
        """The share of what is sampled (B, H, 1), and the map's knots (B, H, K), both float64."""
        told = self.net.told(rows.features, rows.sequence)
        share = torch.sigmoid(self.net.gate(told)).double()[..., None]
        return share.cpu(), self.net.map.average(told).cpu()

    def noise(self, samples: int, draws: int = 0, generator: Generator | None = None) -> Tensor:
        """What every row starts from, (S, 4, p, f), or (1 + draws, S, 4, p, f)."""
        a = self.net.architecture
        shape, size = (samples, LATENT, a.latents, a.ahead), LATENT * a.latents * a.ahead
        seed = self.options.seed
        if generator is None:
            start = sobol_normals(samples, size, seed).reshape(shape)
        else:
            start = torch.randn(shape, generator=generator)
        if not draws:
            return start
        fresh = torch.randn(draws, *shape, generator=generator or Generator().manual_seed(seed))
        return torch.cat([start[None], fresh])

    def save_checkpoint(self, path: str | PathLike[str]) -> None:
        """Write weights and options to one file of safetensors, which takes its name when it is whole."""
        state = {name: x.contiguous() for name, x in self.state_dict().items()}
        part = Path(f"{path}.part")
        try:
            save_file(state, part, {"format": FORMAT, "options": json.dumps(asdict(self.options))})
            part.replace(path)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                part.unlink()
            raise ConfigError(f"{path}: cannot be written ({error}); name another place") from error

    @classmethod
    def from_checkpoint(
        cls, path: str | PathLike[str], device: str | torch.device = "cpu", **how: Any
    ) -> "LDM4TSModel":
        """The model of a file, all of its weights or none; `how` changes options of `HOW`.

        Raises `CheckpointError` for a file that is missing, damaged or of another network.
        """
        if wrong := [name for name in how if name not in HOW]:
            raise ConfigError(f"{wrong[0]} is part of what has learnt: change {', '.join(HOW)} alone")
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as weights ({error}); check the path") from error
        if told.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format is {told.get('format')!r}, not {FORMAT!r}; use what save_checkpoint wrote"
            )
        try:
            options = json.loads(told["options"])
            Options(**options)
        except (KeyError, ValueError, TypeError, RecursionError, ConfigError) as error:
            raise CheckpointError(
                f"{path}: its options are not of this version ({error}); train again"
            ) from error
        model = cls(device=device, **(options | how))
        fill(model, weights, Path(path))
        return model

    def _trained(
        self, rows: Seen, targets: Tensor, generator: Generator, return_all: bool
    ) -> dict[str, Tensor]:
        way = self.ways(rows, targets)
        with torch.no_grad():
            known, raw = self.net.known(rows.sequence), self.raw_latents(rows.sequence, way)
            x0 = (raw - self.net.centre) / self.net.spread
        t, eps, kept = self.drawn(len(rows), generator)
        found = self.losses(rows, known, x0, way, t, eps, kept if self.training else 1.0)
        one = found.fused.double()[:, None]  # (B, 1, H)
        quantiles = one.transpose(1, 2).expand(-1, -1, len(QUANTILES))
        made = self._prices(rows, one, quantiles)
        made |= {"loss": found.loss, "velocity_loss": found.velocity, "direct_loss": found.direct}
        return made | (self._all(rows, one, found.latent[:, None]) if return_all else {})

    def drawn(self, count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Of so many rows timesteps (B,), noise (B, 4, p, f), and what map and gate are told, (B, F + W)."""
        a, device = self.net.architecture, self.alpha.device
        t = torch.randint(samplers.TIMESTEPS, (count,), generator=generator)
        eps = torch.randn(count, LATENT, a.latents, a.ahead, generator=generator)
        kept = (torch.rand(count, a.features + a.width, generator=generator) >= DROP) / (1 - DROP)
        return t.to(device), eps.to(device), kept.to(device)

    def raw_latents(self, sequence: Tensor, way: Tensor) -> Tensor:
        """Latents of what is to come as the encoder gives them, (B, 4, p, f)."""
        net = self.net
        latent: Tensor = net.vae.encode(net.images(sequence, way)).latent_dist.mean
        return latent[..., -net.architecture.ahead :]

    def _prices(self, rows: Seen, samples: Tensor, quantiles: Tensor) -> dict[str, Tensor]:
        """Moments of samples (B, S, H) and quantiles (B, H, Q) in deviations, as prices (B, H)."""
        of = self._price_of(rows)
        x = of(samples)
        found = {"mean": x.mean(1), "std": x.std(1, correction=0)}
        for name, q in zip(QUANTILES, quantiles.unbind(-1), strict=True):
            found[name] = of(q[:, None])[:, 0]
        return {name: y.float() for name, y in found.items()}

    def _price_of(self, rows: Seen) -> Callable[[Tensor], Tensor]:
        """What makes prices (B, S, H) of outcomes in deviations (B, S, H)."""
        spread = rows.spread(torch.tensor(self.horizons, device=rows.price.device))[:, None]
        return lambda z: rows.price[:, None, None] * torch.exp(spread * z.to(spread.device))

    def _all(self, rows: Seen, samples: Tensor, latent: Tensor) -> dict[str, Tensor]:
        net = self.net
        return {
            "samples": self._price_of(rows)(samples).float(),
            "image": net.images(rows.sequence, None),
            "latent": latent,
            "conditioning": net.tokens(rows.features, rows.sequence),
        }


def mapped(knots: Tensor, scores: Tensor) -> Tensor:
    """The map's outcomes (B, H, n), of its knots (B, H, K), at normal scores (n,)."""
    u = scores.expand(*knots.shape[:2], -1).contiguous()
    return piecewise(u, knot_scores().expand(knots.shape), knots)


def _fused(z: Tensor, share: Tensor, knots: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Samples (B, H, S), the gate (B, H, 1) and knots (B, H, K) -> samples (B, S, H), quantiles (B, H, Q).

    A sample goes with what the map says at its rank. One sample is every quantile of itself.
    """
    S = z.shape[-1]
    at = torch.special.ndtri((torch.arange(S, dtype=torch.float64) + 0.5) / S)
    rank = z.argsort(stable=True, dim=-1).argsort(-1)
    samples = share * z + (1 - share) * mapped(knots, at).gather(-1, rank)
    if S == 1:
        return samples.transpose(1, 2), samples.expand(-1, -1, len(levels))
    normal = torch.special.ndtri(levels)
    quantiles = share * quantiles_of(z, normal) + (1 - share) * mapped(knots, normal)
    return samples.transpose(1, 2), torch.cummax(quantiles, -1).values


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).split("\n")[0]
        raise ConfigError(f"device = {device!r} cannot be used ({said}): write 'cpu'") from error
    return found
