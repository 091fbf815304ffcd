"""What an LDM4TS learns by, for the training of checkpoints and for that of an `LDM4TSModel`."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from barcast.models import samplers
from barcast.models.ldm4ts.network import LDM4TS
from barcast.models.ldm4ts.vision import AHEAD

GAMMA = 5.0  # signal to noise above which no noise level counts more
DIRECT = 0.1  # of the loss is by the way that the estimated latents say
DIVERGENCE = 1e-4  # of the autoencoder's loss is by the distance of its latents from standard normals


class Levels(NamedTuple):
    """Of each timestep (1000,): the share of signal and of noise, and the weight of the error of v."""

    alpha: Tensor
    sigma: Tensor
    weight: Tensor


def noise_levels() -> Levels:
    """Those of the samplers; weights are by signal to noise, at most `GAMMA` (Hang et al. 2023)."""
    level = samplers.alphas_cumprod()
    ratio = level / (1 - level)
    return Levels(level**0.5, (1 - level) ** 0.5, torch.clamp(ratio, max=GAMMA) / (ratio + 1))


class Estimate(NamedTuple):
    """Of one call of the U-Net: errors (B,) of v and of the way, the way (B, G) and the latents it says."""

    velocity: Tensor
    direct: Tensor
    way: Tensor
    latent: Tensor


def estimate(
    net: LDM4TS,
    levels: Levels,
    t: Tensor,
    x0: Tensor,
    eps: Tensor,
    way: Tensor,
    known: Tensor,
    tokens: Tensor,
) -> Estimate:
    """Call the U-Net once, at timesteps t (B,), for latents x0 (B, 4, p, f) with noise eps of that shape.

    The error of v = alpha eps - sigma x0 has its weight; that of the way (B, G) which is read from
    alpha x - sigma v, the latents that v implies, has alpha squared.
    """
    alpha, sigma = (x[t][:, None, None, None] for x in (levels.alpha, levels.sigma))
    x = alpha * x0 + sigma * eps
    v = net.velocity(x, t.float(), known, tokens)
    error = ((v - (alpha * eps - sigma * x0)) ** 2).mean((1, 2, 3))
    latent = alpha * x - sigma * v
    told = net.way(latent)
    away = functional.smooth_l1_loss(told, way, reduction="none").mean(1)
    return Estimate(levels.weight[t] * error, DIRECT * levels.alpha[t] ** 2 * away, told, latent)


def image_loss(net: LDM4TS, sequence: Tensor, way: Tensor, half: Tensor, shown: float) -> Tensor:
    """Error of images and of ways read from their latents, and the latents' divergence.

    What is to come is not in the images of `half` (B,); `shown` of the rest are in each share of a batch.
    """
    a = net.architecture
    image = net.images(sequence, way)
    image[half, :, :, a.image - a.image // AHEAD :] = 0
    found, posterior = net.reconstructed(image)
    latent = posterior.mean[~half][..., -a.ahead :]
    error = functional.smooth_l1_loss(net.read(latent.flatten(1)), way[~half], reduction="none")
    loss: Tensor = functional.mse_loss(found, image) + DIVERGENCE * posterior.kl().mean()
    return loss + error.mean(1).sum() / shown


def pinball(miss: Tensor, p: Tensor) -> Tensor:
    """Losses of quantiles at levels p that outcomes exceed by `miss`, both (..., Q)."""
    return torch.maximum(p * miss, (p - 1) * miss)


def fused(net: LDM4TS, told: Tensor, sampled: Tensor, mapped: Tensor) -> Tensor:
    """Quantiles (B, H, Q) by the gate's share of what is sampled, and the map's."""
    share = torch.sigmoid(net.gate(told)).double()[..., None]
    return share * sampled + (1 - share) * mapped
