"""The energies of a transfer: how far latents are from a regime's texture, and from a source's structure.

They are computed in float32, whatever autocast is at work around them, and draw from a generator.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional

from barcast.models.transfer.config import MAX_POSITIONS, MAX_SAMPLES
from barcast.models.transfer.network import Velocity

PATCH = 3  # positions of a patch's side
PROJECTIONS = 64
NUDGE = 1e-2  # deviations: how far the divergence looks


def texture_distance(
    x: Tensor,
    reference: Tensor,
    regime: Tensor,
    generator: Generator,
    max_samples: int = MAX_SAMPLES,
    projections: int = PROJECTIONS,
) -> Tensor:
    """The sliced Wasserstein-1 distance between patches of latents and of references, regime by regime.

    `x` and `reference` are (B, C, H, W), row for row of the regimes (B,). Each regime's patches are compared
    with those of its own references alone, and the mean is over rows: two regimes that stand in each other's
    place are far apart. Numbers go through asinh in interquartile ranges of the references, so that tails
    don't drown the rest. Returns () float32; raises `ValueError` where the shapes differ.
    """
    if x.shape != reference.shape or len(regime) != len(x):
        raise ValueError(
            f"latents {tuple(x.shape)}, references {tuple(reference.shape)} and regimes "
            f"{tuple(regime.shape)} do not go together"
        )
    with torch.amp.autocast(x.device.type, enabled=False):
        total = x.new_zeros((), dtype=torch.float32)
        theta = directions(PATCH**2 * x.shape[1], projections, generator).to(x.device)
        for each in sorted(set(regime.tolist())):
            own = regime == each
            a, b = _patches(x[own].float()), _patches(reference[own].float())
            low, middle, high = torch.quantile(b[: 2**18], b.new_tensor([0.25, 0.5, 0.75]), dim=0)
            spread = (high - low).clamp(min=1e-6)
            count = min(len(a), max_samples)
            some = [y[torch.randperm(len(y), generator=generator)[:count].to(y.device)] for y in (a, b)]
            a, b = (torch.asinh((y - middle) / spread) @ theta for y in some)
            apart = (a.sort(0).values - b.sort(0).values).abs().mean()
            total = total + apart * own.sum() / len(own)
        return total


def directions(numbers: int, count: int, generator: Generator) -> Tensor:
    """Random unit vectors as columns (numbers, count), at right angles in groups of `numbers`."""
    found = []
    for _ in range(-(-count // numbers)):
        q, r = torch.linalg.qr(torch.randn(numbers, numbers, generator=generator))
        found.append(q * r.diagonal().sign())
    return torch.cat(found, 1)[:, :count]


def self_similarity(
    x: Tensor, source: Tensor, generator: Generator, max_positions: int = MAX_POSITIONS
) -> Tensor:
    """How differently two latents resemble themselves: 0 for equal ones, () float32.

    The cosines between all pairs of some positions of `x` (B, C, H, W) less those of `source`, squared, their
    mean. Both are looked at in the same positions. Level and spread of a channel in a window don't count:
    these are texture.
    """
    with torch.amp.autocast(x.device.type, enabled=False):
        a, b = (y.float().flatten(2) for y in (x, source))
        if a.shape[2] > max_positions:
            at = torch.randperm(a.shape[2], generator=generator)[:max_positions].to(a.device)
            a, b = a[..., at], b[..., at]
        return (_cosines(a) - _cosines(b)).square().mean()


def divergence(velocity: Velocity, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
    """The mean square of a velocity's divergence per number, by one probe of each row (Hutchinson), ()."""
    probe = torch.randn(x.shape, generator=generator).to(x)
    change = velocity(x + NUDGE * probe, t) - velocity(x - NUDGE * probe, t)
    each = (probe * change).flatten(1).mean(1) / (2 * NUDGE)
    return each.square().mean()


def _patches(x: Tensor) -> Tensor:
    """All patches of latents, (B P, C PATCH^2)."""
    return functional.unfold(x, PATCH).transpose(1, 2).flatten(0, 1)


def _cosines(x: Tensor) -> Tensor:
    """The cosines between positions (B, C, S) -> (B, S, S)."""
    x = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True).clamp(min=1e-6)
    x = functional.normalize(x, dim=1)
    return x.transpose(1, 2) @ x
