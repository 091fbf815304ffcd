"""What training and sampling an LDM4TS take in memory, which batch fits, and what to do when it did not.

Counted are the bytes of live tensors at the peak of a step: weights, gradients, both moments of AdamW and
activations, all float32, of the preset small and the autoencoder that is trained. What a GPU needs beside
them, its context and the workspace of its libraries, is not in it, nor what an allocator wastes.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict, TypeVar

import torch

from barcast.models.errors import ConfigError
from barcast.models.ldm4ts import vision
from barcast.models.ldm4ts.attention import Backend, Probe, named, probe, refused

GB = 1e9
IMAGE_SIZES = vision.SIZES
WEIGHTS = {"unet": 1_079_012, "autoencoder": 316_695}
HEADS = {4, 8, 32}
"""Channels of the heads of both models."""
BYTES = {True: 16, False: 4}
"""Held for a weight, in training and otherwise: itself, its gradient, two moments."""
ERROR = 0.15
"""How far a peak may be from its estimate; the fits come nearer. `largest_batch` leaves as much free."""


class Fit(NamedTuple):
    """Bytes at the peak: fixed ones, those of each pixel of each image, of each token of each condition."""

    fixed: int
    pixel: int
    token: int


FITS = {
    ("unet", "plain", "sdpa"): Fit(12990695, 427, 3168),  # 20 peaks, 3.5% off at most
    ("unet", "plain", "flash"): Fit(12990700, 417, 1760),  # 20 peaks, 3.5% off at most
    ("unet", "checkpointed", "sdpa"): Fit(15151271, 135, 57),  # 20 peaks, 6.8% off at most
    ("unet", "checkpointed", "flash"): Fit(15128329, 133, 0),  # 20 peaks, 6.8% off at most
    ("unet", "sampling", "sdpa"): Fit(4316909, 51, 261),  # 20 peaks, 0.8% off at most
    ("unet", "sampling", "flash"): Fit(4316909, 51, 261),  # 20 peaks, 0.8% off at most
    ("autoencoder", "plain", "sdpa"): Fit(3786569, 2821, 0),  # 10 peaks, 0.3% off at most
    ("autoencoder", "plain", "flash"): Fit(3786568, 2817, 0),  # 10 peaks, 0.3% off at most
    ("autoencoder", "checkpointed", "sdpa"): Fit(3812521, 1371, 0),  # 10 peaks, 0.0% off at most
    ("autoencoder", "checkpointed", "flash"): Fit(3812521, 1371, 0),  # 10 peaks, 0.0% off at most
    ("autoencoder", "sampling", "sdpa"): Fit(1266780, 398, 0),  # 10 peaks, 0.1% off at most
    ("autoencoder", "sampling", "flash"): Fit(1266780, 398, 0),  # 10 peaks, 0.1% off at most
}
"""By model, mode and backend; `python -m tests.bench.attention` measures peaks and prints them anew."""


class Usage(TypedDict):
    """What a step takes: `total_estimated_gb` is the sum of the first two, in units of 10^9 bytes.

    `savings_vs_default_pct` is against the same batch by `sdpa` without checkpointing.
    """

    base_model_gb: float
    activation_memory_gb: float
    total_estimated_gb: float
    backend: str
    gradient_checkpointing: bool
    batch_size: int
    savings_vs_default_pct: float


def estimate_vram_usage(
    batch_size: int,
    sequence_length: int = 100,
    image_size: int = 64,
    backend: str = Backend.sdpa,
    gradient_checkpointing: bool = False,
    training: bool = True,
    part: str | None = None,
) -> Usage:
    """What a step of training, or one call without gradients, takes at its peak.

    A batch is of images of `image_size` pixels a side, and of conditions of `sequence_length` tokens. The
    U-Net and the autoencoder are trained one after the other: `part` names one of them, without it that of
    the higher peak is meant. Raises `ConfigError` for what cannot be trained or sampled so.
    """
    _check(batch_size, sequence_length, image_size, part)
    by = Backend.sdpa if backend == Backend.default else named(backend)
    if by is Backend.auto:
        raise ConfigError("attention backend auto depends on the machine: name sdpa or flash")
    if (why := refused(_assumed(by), training, HEADS)) is not None:
        raise ConfigError(f"attention backend {by} cannot be used: {'; '.join(why)}")
    if gradient_checkpointing and not training:
        raise ConfigError("gradient_checkpointing is for training: a call without gradients keeps nothing")
    parts = WEIGHTS if part is None else (part,)
    of = [(name, batch_size, sequence_length, image_size) for name in parts]
    base, peak = max((_peak(*each, by, gradient_checkpointing, training) for each in of), key=lambda x: x[1])
    _, default = max((_peak(*each, Backend.sdpa, False, training) for each in of), key=lambda x: x[1])
    return {
        "base_model_gb": base / GB,
        "activation_memory_gb": (peak - base) / GB,
        "total_estimated_gb": peak / GB,
        "backend": str(by),
        "gradient_checkpointing": gradient_checkpointing,
        "batch_size": batch_size,
        "savings_vs_default_pct": 100 * (1 - peak / default),
    }


def _assumed(backend: Backend) -> Probe:
    """A backend as if it were here: the estimate may be for another machine."""
    return Probe(backend, True, "", "", (), backend is not Backend.sage, tested=False)


def _peak(
    part: str, batch: int, tokens: int, image: int, backend: Backend, checkpointing: bool, training: bool
) -> tuple[int, int]:
    """Bytes of the weights and what belongs to them, and bytes at the peak."""
    mode = ("checkpointed" if checkpointing else "plain") if training else "sampling"
    fit = FITS[part, mode, backend]
    base = BYTES[training] * WEIGHTS[part]
    return base, max(base, fit.fixed + batch * (fit.pixel * image**2 + fit.token * tokens))


def _check(batch: int, tokens: int, image: int, part: str | None) -> None:
    for name, value in (("batch_size", batch), ("sequence_length", tokens)):
        if value < 1:
            raise ConfigError(f"{name} = {value} is not positive: name 1 or more")
    if image not in IMAGE_SIZES:
        raise ConfigError(f"image_size = {image} is not supported: choose {', '.join(map(str, IMAGE_SIZES))}")
    if part is not None and part not in WEIGHTS:
        raise ConfigError(f"part = {part!r} is unknown: choose {', '.join(WEIGHTS)}")


def largest_batch(
    budget_gb: float,
    sequence_length: int = 100,
    image_size: int = 64,
    backend: str = Backend.sdpa,
    gradient_checkpointing: bool = False,
    training: bool = True,
    part: str | None = None,
) -> int:
    """The largest batch whose estimate leaves `ERROR` of itself free within the budget; 0 if none does."""
    if not 0 < budget_gb < float("inf"):
        raise ConfigError(f"budget_gb = {budget_gb} is no amount of memory: name a positive number of GB")

    def fits(batch: int) -> bool:
        found = estimate_vram_usage(
            batch, sequence_length, image_size, backend, gradient_checkpointing, training, part
        )
        return found["total_estimated_gb"] * (1 + ERROR) <= budget_gb

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Recommended:
    """How to train within a budget: the batch is a power of two, and what it takes is estimated."""

    budget_gb: float
    image_size: int
    backend: str
    gradient_checkpointing: bool
    batch_size: int
    total_estimated_gb: float


BUDGETS = (6.0, 8.0, 12.0, 16.0)
WANTED = 32
"""The batch for which gradients are checkpointed, where it does not fit without."""


def recommend(budgets: tuple[float, ...] = BUDGETS, sequence_length: int = 100) -> Iterator[Recommended]:
    """A way to train for each budget in GB and each image size: plain where `WANTED` fits, else checkpointed.

    A budget for which an image is too large even so has none. The backend is `sdpa`: by the packages a step
    takes hardly less.
    """
    for budget in budgets:
        for image in IMAGE_SIZES:
            for checkpointing in (False, True):
                most = largest_batch(budget, sequence_length, image, Backend.sdpa, checkpointing)
                if most >= WANTED or (most and checkpointing):
                    batch = 1 << (most.bit_length() - 1)
                    found = estimate_vram_usage(batch, sequence_length, image, Backend.sdpa, checkpointing)
                    total = found["total_estimated_gb"]
                    yield Recommended(budget, image, found["backend"], checkpointing, batch, total)
                    break


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is trained, as far as it changes what that takes in memory."""

    batch_size: int
    image_size: int = 64
    backend: str = Backend.sdpa
    gradient_checkpointing: bool = False


T = TypeVar("T")
NO_STEPS = "fewer diffusion steps would not help: a step of training asks the network once whatever they are"


def with_ladder(
    run: Callable[[Plan], T],
    plan: Plan,
    tell: Callable[[str], None],
    probes: Callable[[], list[Probe]] = probe,
    device: str | None = None,
) -> tuple[T, Plan]:
    """Run a plan; each time the memory does not suffice, run it again by one that takes less.

    In this order: checkpoint gradients, let flash-attn attend, halve the batch down to 1, take smaller
    images. `tell` hears each step in one line, also one that is left out, and why. What comes out is what
    `run` returned, and the plan by which it did. `device` is where it runs, such as cpu. Raises
    `ConfigError` when no step is left.
    """
    steps = _ladder(plan, tell, probes, device)
    while True:
        try:
            return run(plan), plan
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            said = str(error).split("\n")[0] or type(error).__name__
        gc.collect()  # with the error its frames are gone, and what they held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found = next(steps, None)
        if found is None:
            raise ConfigError(
                f"the memory does not suffice for a batch of {plan.batch_size} with images of "
                f"{plan.image_size} pixels either: {said}; use a machine with more ({NO_STEPS})"
            )
        plan, how = found
        tell(f"out of memory ({said}): {how}")


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says so; that of torch on a CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _ladder(
    plan: Plan, tell: Callable[[str], None], probes: Callable[[], list[Probe]], device: str | None
) -> Iterator[tuple[Plan, str]]:
    """Plans that take less and less, each with what it does."""
    if plan.gradient_checkpointing:
        tell("checkpointing left out: it is on")
    else:
        plan = replace(plan, gradient_checkpointing=True)
        yield plan, "checkpointing gradients"
    if plan.backend in (Backend.flash, Backend.sage):
        tell(f"another attention backend left out: {plan.backend} is used")
    else:
        flash = next(each for each in probes() if each.name is Backend.flash)
        if (why := refused(flash, True, HEADS, device)) is not None:
            tell(f"attention backend flash left out: {why[0]}")
        else:
            plan = replace(plan, backend=Backend.flash)
            yield plan, "attention backend flash, which computes in 16 bits"
    if plan.batch_size == 1:
        tell("a smaller batch left out: it is 1")
    while plan.batch_size > 1:
        plan = replace(plan, batch_size=plan.batch_size // 2)
        yield plan, f"a batch of {plan.batch_size}"
    smaller = [size for size in sorted(IMAGE_SIZES, reverse=True) if size < plan.image_size]
    if not smaller:
        tell(f"smaller images left out: {plan.image_size} pixels are the least")
    for size in smaller:
        plan = replace(plan, image_size=size)
        yield plan, f"images of {size} pixels"
