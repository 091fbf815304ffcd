"""The network of LDM4TS: images, their latents, a conditional U-Net on these, and a map to be fused with.

An outcome is the way to come, each step in deviations of its own, as the right part of an image. Diffused
are the latents of that part alone; the U-Net sees the latents of the left part, which were encoded with the
right one left out, and attends to tokens of features, statistics, spectrum and patches of the bars. What is
sampled is read from the latents as the way to come. At each horizon it is fused with a quantile map by a
gate: the quantiles of the fusion are means of both, weighted by the gate.

Shapes: B origins, S samples, H horizons, G steps, F features, L bars of C channels, N tokens of width W, P
pixels, p = P / 8 latents of a side, of which f = p / 4 columns are to come.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import sqrt
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from barcast.models import samplers
from barcast.models.errors import ConfigError
from barcast.models.ldm4ts import prompt, vision
from barcast.models.ldm4ts.autoencoder import LATENT, SHRINK, autoencoder, decoded, encoded
from barcast.models.ldm4ts.language import Language
from barcast.models.sssd.layers import Architecture, linear
from barcast.models.sssd.marginal import QuantileMap
from barcast.models.sssd.network import sobol_normals

PARTS = ("vision", "frequency", "statistics")
"""What the U-Net can be told: the image of what was, the spectrum of the bars, statistics of them."""
PATCH, STRIDE = 16, 8
"""Bars of a patch, and from one to the next."""
HEADS = 4
UNHEARD = -2.2
"""The gate's bias before it has learnt: a tenth of what is published is sampled, and the rest the map's."""
TOKENS = {"statistics": 8, "frequency": 4}
"""Tokens that features with statistics, and the spectrum, become."""
BINS = 33
"""Frequencies of the spectrum that its tokens are made of."""
RETURN, RANGE = 0, 1
"""The channels of the sequence that are a bar's return and its range."""


_SIZES = ("width", "hidden", "members", "layers", "unet", "vae")
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(_SIZES, (32, 32, 2, 1, (8, 16), (8, 8, 8, 8)), strict=True)),
    "small": dict(zip(_SIZES, (64, 96, 4, 2, (32, 64), (16, 32, 32, 32)), strict=True)),
    "base": dict(zip(_SIZES, (64, 128, 4, 2, (64, 128), (32, 64, 64, 64)), strict=True)),
}
"""Architectures by name, but for what follows from the bars and from what is forecast."""
PRESET = "small"
MOST_LEVELS, MOST_LAYERS, MOST_VAE_LAYERS = 3, 64, 8
"""Levels of the U-Net, which halves 8 latents twice, layers of the transformer, and of each level of the
autoencoder, at most."""


@dataclass(frozen=True, slots=True)
class LatentArchitecture:
    """Sizes of the network; raises `ConfigError` for any it cannot have.

    Without `vision` the U-Net does not see the image of what was, without `frequency` or `statistics` it has
    no tokens of these. With `text`, the channels of a language model's states, it attends to a sentence, too.
    With `given` the autoencoder is one that was there before: no training changes it.
    """

    features: int
    channels: int
    context: int  # L
    horizons: int  # H
    path: int  # G
    samples: int  # S
    image: int = 64  # P
    width: int = 64  # W
    hidden: int = 96  # of the map's layers
    members: int = 4  # of the map
    layers: int = 2  # of the patches' transformer
    unet: tuple[int, ...] = (32, 64)
    vae: tuple[int, ...] = (16, 32, 32, 32)
    vae_layers: int = 1  # of each of its levels
    vae_groups: int = 8  # over which its channels are normalised
    given: bool = False
    text: int = 0
    vision: bool = True
    frequency: bool = True
    statistics: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name in (*PARTS, "given"):
                fits = type(value) is bool
            else:
                several = field.name in ("unet", "vae")
                fits = (type(value) is tuple) == several
                fits &= all(
                    type(n) is int and n > -(field.name == "text")
                    for n in (value if several and fits else (value,))
                )
            if not fits:
                raise ConfigError(f"architecture.{field.name} is {value!r}, not whole numbers above 0")
        if self.image not in vision.SIZES:
            known = ", ".join(map(str, vision.SIZES))
            raise ConfigError(f"image size {self.image} cannot be used: take one of {known} pixels")
        if self.path > self.image:
            raise ConfigError(
                f"an image of {self.image} pixels cannot show {self.path} steps of a path: take larger "
                "images, or fewer horizons"
            )
        for name, most in (("unet", range(1, MOST_LEVELS + 1)), ("vae", range(4, 5))):
            widths = getattr(self, name)
            if any(width % 8 for width in widths) or len(widths) not in most:
                raise ConfigError(
                    f"architecture.{name} is {widths}, not {most[0]} to {most[-1]} multiples of 8"
                )
        if any(width % self.vae_groups for width in self.vae) or self.vae_layers > MOST_VAE_LAYERS:
            raise ConfigError(
                f"architecture.vae_groups is {self.vae_groups} and vae_layers {self.vae_layers}: the one "
                f"divides all of {self.vae}, the other is at most {MOST_VAE_LAYERS}"
            )
        if self.width % HEADS or self.layers > MOST_LAYERS:
            raise ConfigError(
                f"architecture.width is {self.width} and layers {self.layers}: the one is a multiple of "
                f"{HEADS}, the other at most {MOST_LAYERS}"
            )

    @classmethod
    def of(cls, preset: str, **given: Any) -> "LatentArchitecture":
        """The architecture of a preset, with the given sizes; raise `ConfigError` for an unknown preset."""
        if preset not in PRESETS:
            raise ConfigError(f"preset {preset!r} is unknown: take one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[preset] | given))

    @property
    def preset(self) -> str | None:
        """The preset whose sizes these are, but for those of a given autoencoder, if there is one."""
        fits = (
            all(getattr(self, k) == v for k, v in sizes.items() if not (self.given and k == "vae"))
            for sizes in PRESETS.values()
        )
        return next((name for name, fit in zip(PRESETS, fits, strict=True) if fit), None)

    @property
    def least(self) -> int:
        """A count that the network's weights are never below: what a file must hold for it."""
        a = self
        told, size = a.features + a.width, LATENT * a.latents * a.ahead
        return max(
            a.members * told * a.hidden,
            a.members * a.hidden * a.horizons,
            a.samples * size,
            a.path * a.hidden,
            a.channels * max(PATCH * a.width, BINS),
            a.context // STRIDE * a.width,
            a.text * a.width,
            a.layers * a.width**2,
            *(n * max(n, a.width) for n in a.unet),
            *(a.vae_layers * n**2 for n in a.vae),
        )

    @property
    def latents(self) -> int:
        """Latents of a side, p."""
        return self.image // SHRINK

    @property
    def ahead(self) -> int:
        """Columns of latents that are to come, f."""
        return self.latents // vision.AHEAD


def unet(a: LatentArchitecture) -> nn.Module:
    """A `UNet2DConditionModel` of random weights: noisy and known latents and a mask in, a velocity out."""
    from diffusers import UNet2DConditionModel

    levels = len(a.unet)
    return UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=a.latents,
        in_channels=2 * LATENT + 1,
        out_channels=LATENT,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=a.unet,
        layers_per_block=1,
        cross_attention_dim=a.width,
        attention_head_dim=tuple(min(8, n // 4) for n in a.unet),  # how many heads: diffusers' name is wrong
        norm_num_groups=8,
    )


class Temporal(nn.Module):
    """A transformer of patches of the sequence (Nie et al. 2023): (B, L, C) -> tokens (B, N, W)."""

    def __init__(self, a: LatentArchitecture, generator: Generator) -> None:
        super().__init__()
        count = 1 + max(0, -(-(a.context - PATCH) // STRIDE))
        self.enter = linear(PATCH * a.channels, a.width, generator)
        self.place = nn.Parameter(torch.randn(count, a.width, generator=generator) / sqrt(a.width))
        self.layers = nn.ModuleList([_Attention(a.width, generator) for _ in range(a.layers)])

    def forward(self, sequence: Tensor) -> Tensor:
        """The tokens of patches, the newest at the end."""
        lack = (len(self.place) - 1) * STRIDE + PATCH - sequence.shape[1]
        x = functional.pad(sequence, (0, 0, max(0, lack), 0))
        x = x[:, x.shape[1] - (len(self.place) - 1) * STRIDE - PATCH :]
        x = self.enter(x.unfold(1, PATCH, STRIDE).flatten(2)) + self.place
        for layer in self.layers:
            x = layer(x)
        told: Tensor = x
        return told


class _Attention(nn.Module):
    """A layer of a transformer, normalised before each part (Xiong et al. 2020)."""

    def __init__(self, width: int, generator: Generator) -> None:
        super().__init__()
        self.parts = linear(width, 3 * width, generator)
        self.leave = linear(width, width, generator)
        self.wide, self.narrow = linear(width, 2 * width, generator), linear(2 * width, width, generator)

    def forward(self, x: Tensor) -> Tensor:
        B, N, W = x.shape
        parts = self.parts(functional.layer_norm(x, (W,))).reshape(B, N, 3, HEADS, W // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        told = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.leave(told.transpose(1, 2).reshape(B, N, W))
        y: Tensor = x + self.narrow(functional.gelu(self.wide(functional.layer_norm(x, (W,)))))
        return y


class LDM4TS(nn.Module):
    """All that a checkpoint stores as weights.

    `noise` (S, 4, p, f) are the fixed standard normals that every forecast starts from. `centre` (4, p, f)
    and `spread` () bring the latents to come to mean 0 and variance 1, see `measure`.
    """

    noise: Tensor
    centre: Tensor
    spread: Tensor
    mask: Tensor

    def __init__(self, a: LatentArchitecture, generator: Generator) -> None:
        super().__init__()
        self.architecture = a
        shape = LATENT, a.latents, a.ahead
        size = LATENT * a.latents * a.ahead
        self.temporal = Temporal(a, generator)
        told = a.features + a.width
        sizes = Architecture(told, a.channels, a.context, a.horizons, a.path, a.samples, a.members, a.hidden)
        self.map = QuantileMap(sizes, generator)
        self.statistics = linear(a.features + prompt.COUNT, TOKENS["statistics"] * a.width, generator)
        self.frequency = linear(2 * BINS * a.channels, TOKENS["frequency"] * a.width, generator)
        self.said = linear(a.text, a.width, generator) if a.text else None
        self.language: Language | None = None  # of `text`: no weights of a checkpoint
        self.gate = linear(told, a.horizons, None)
        nn.init.constant_(self.gate.bias, UNHEARD)
        self.read = nn.Sequential(
            linear(size, 2 * a.hidden, generator), nn.SiLU(), linear(2 * a.hidden, a.path, generator)
        )
        self.vae: Any = _drawn(autoencoder(a.vae, a.image, a.vae_layers, a.vae_groups), generator)
        self.unet: Any = _drawn(unet(a), generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        noise = sobol_normals(a.samples, size, seed).reshape(a.samples, *shape)
        self.register_buffer("noise", noise)
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("mask", _mask(a), persistent=False)

    def history(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences (B, L, C) as the way to the newest bar (B, L), in deviations, and its period (B,)."""
        moves = sequence[..., RETURN]
        way = torch.cumsum(moves.flip(1), 1).flip(1)  # from before each bar to the newest
        L = moves.shape[1]
        return (moves - way) / sqrt(L), vision.period(sequence[..., RANGE])

    def images(self, sequence: Tensor, ahead: Tensor | None) -> Tensor:
        """Images (B, 3, P, P) of sequences (B, L, C) and what is to come (B, G), see `vision.images`."""
        return vision.images(*self.history(sequence), ahead, self.architecture.image)

    def known(self, sequence: Tensor) -> Tensor:
        """What the U-Net sees beside noisy latents: those of history and the mask, (B, 5, p, p)."""
        a = self.architecture
        mask = self.mask.expand(len(sequence), -1, -1, -1)
        if not a.vision:
            return torch.cat([mask.new_zeros(len(sequence), LATENT, a.latents, a.latents), mask], 1)
        latent = encoded(self.vae, self.images(sequence, None)) / self.spread
        return torch.cat([latent * (1 - mask), mask], 1)

    def coming(self, sequence: Tensor, ahead: Tensor) -> Tensor:
        """The latents (B, 4, p, f) of what is to come (B, G), of mean 0 and variance 1."""
        latent = encoded(self.vae, self.images(sequence, ahead))
        return (latent[..., -self.architecture.ahead :] - self.centre) / self.spread

    def way(self, latent: Tensor) -> Tensor:
        """What is to come (..., G), of latents (..., 4, p, f) of mean 0 and variance 1."""
        whole = latent * self.spread + self.centre
        found: Tensor = self.read(whole.flatten(-3))
        return found

    def states(self, sequence: Tensor) -> Tensor:
        """What the language model makes of sequences (B, L, C), (B, 8, D)."""
        if self.language is None:
            raise ConfigError(
                "the network was made for a language model and has none: open it by its checkpoint"
            )
        return self.language.states(self._numbers(sequence), sequence.shape[1])

    def _numbers(self, sequence: Tensor) -> Tensor:
        way, _ = self.history(sequence)
        return prompt.numbers(way, sequence[..., RETURN], sequence[..., RANGE])

    def tokens(self, features: Tensor, sequence: Tensor, states: Tensor | None = None) -> Tensor:
        """What the U-Net attends to, (B, N, W); `states` of the language model are made where not given."""
        a, B = self.architecture, len(features)
        found = [self.temporal(sequence)]
        if a.statistics:
            known = self.statistics(torch.cat([features, self._numbers(sequence)], 1))
            found.append(known.reshape(B, TOKENS["statistics"], a.width))
        if a.frequency:
            found.append(self.frequency(_spectrum(sequence)).reshape(B, TOKENS["frequency"], a.width))
        if self.said is not None:
            found.append(self.said(self.states(sequence) if states is None else states))
        return torch.cat(found, 1)

    def told(self, features: Tensor, sequence: Tensor) -> Tensor:
        """What map and gate see, (B, F + W)."""
        return torch.cat([features, self.temporal(sequence)[:, -1]], -1)

    def velocity(self, x: Tensor, t: Tensor, known: Tensor, tokens: Tensor) -> Tensor:
        """The velocity (B, 4, p, f) of noisy latents x at timesteps t (B,): one call of the U-Net."""
        left = self.architecture.latents - self.architecture.ahead
        canvas = torch.cat([functional.pad(x, (left, 0)), known], 1)
        v: Tensor = self.unet(canvas, t, encoder_hidden_states=tokens).sample
        return v[..., -x.shape[-1] :]

    def asked(self, known: Tensor, tokens: Tensor, timesteps: Tensor) -> Callable[[Tensor, int], Tensor]:
        """What a sampler asks: x (B, S, 4, p, f) at the i-th of its timesteps -> v, of x's shape."""

        def of(x: Tensor, i: int) -> Tensor:
            S = x.shape[1]
            t = timesteps[i].expand(len(x) * S)
            rows = (y.repeat_interleave(S, 0) for y in (known, tokens))
            return self.velocity(x.flatten(0, 1), t, *rows).reshape(x.shape)

        return of

    def reconstructed(self, image: Tensor) -> tuple[Tensor, Any]:
        """Images through the autoencoder, by their mean latents, and the distribution of these."""
        posterior = self.vae.encode(image).latent_dist
        return decoded(self.vae, posterior.mean), posterior

    @torch.no_grad()
    def measure(self, latent: Tensor) -> None:
        """Let latents to come (n, 4, p, f), as the encoder gives them, have mean 0 and variance 1."""
        self.centre.copy_(latent.mean(0))
        self.spread.copy_((latent - self.centre).std().clamp(min=1e-6))


def timesteps_of(lam: Tensor) -> Tensor:
    """The timesteps, 0 to 999 and between, of log ratios lambda (n,) of signal and noise."""
    known = samplers.lambdas().double()  # falling
    at = torch.searchsorted(-known, -lam.double()).clamp(1, len(known) - 1)
    share = (known[at - 1] - lam) / (known[at - 1] - known[at])
    return (at - 1 + share.clamp(0, 1)).float()


def _spectrum(sequence: Tensor) -> Tensor:
    """Real and imaginary parts of the channels' Fourier coefficients at `BINS` frequencies, (B, 2 BINS C)."""
    L = sequence.shape[1]
    window = torch.hann_window(L, periodic=False, device=sequence.device)
    waves = torch.fft.rfft(sequence.transpose(1, 2) * window, norm="ortho")  # (B, C, L // 2 + 1)
    at = torch.arange(BINS, device=sequence.device) * waves.shape[-1] // BINS
    return torch.view_as_real(waves[..., at]).flatten(1)


def _mask(a: LatentArchitecture) -> Tensor:
    mask = torch.zeros(1, 1, a.latents, a.latents)
    mask[..., -a.ahead :] = 1
    return mask


def _drawn(module: nn.Module, generator: Generator) -> nn.Module:
    """A module of diffusers whose weights are drawn from a generator: its own are from torch's global one."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                reach = 1 / sqrt(part.weight[0].numel())
                part.weight.uniform_(-reach, reach, generator=generator)
                if part.bias is not None:
                    part.bias.zero_()
    return module
