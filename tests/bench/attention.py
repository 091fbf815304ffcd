"""What the U-Net and the autoencoder of LDM4TS keep in memory, plain and checkpointed, and what it costs.

`python -m tests.bench.attention` prints the coefficients of `barcast.models.ldm4ts.memory` anew.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from barcast.models.diffusion import use_one_thread
from barcast.models.ldm4ts import autoencoder as autoencoders
from barcast.models.ldm4ts import memory, network
from barcast.models.ldm4ts.attention import Backend, set_gradient_checkpointing, use_backend
from tests import kernels
from tests.bench.report import Row, Section, Target

TOKEN = 64
"""Channels of a token of the condition."""
CHANNELS, LATENT, FACTOR = 9, 4, 8
"""Of the U-Net's input and of a latent; how much smaller a latent is than its image."""


def unet(image: int = 64) -> Any:
    """The default U-Net of LDM4TS for images of so many pixels."""
    outer = {"features": 1, "channels": 1, "context": 1, "horizons": 1, "path": 1, "samples": 1}
    return network.unet(network.LatentArchitecture.of(network.PRESET, image=image, **outer))


def autoencoder() -> Any:
    """The default autoencoder of LDM4TS."""
    return autoencoders.autoencoder(network.PRESETS[network.PRESET]["vae"], 64)


MODELS: dict[str, Callable[[], Any]] = {"unet": unet, "autoencoder": autoencoder}


def inputs(part: str, batch: int, image: int, tokens: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """What a model is called with, drawn from one seed."""
    g = Generator(device).manual_seed(1)
    randn = partial(torch.randn, generator=g, device=device)
    if part == "autoencoder":
        return (randn(batch, 3, image, image),)
    side = image // FACTOR
    times = torch.arange(batch, device=device) % 1000
    return randn(batch, CHANNELS, side, side), times, randn(batch, tokens, TOKEN)


def loss(model: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    """A mean square of what comes out."""
    out: Tensor = model(*given).sample
    return out.square().mean()


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live, as an allocator without overhead would hold them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked, and note what comes out."""
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Measured:
    """A model whose peaks are measured without computing anything: tensors have shapes and no numbers.

    The bytes are those of a run on a CPU, which a test holds. The optimiser is AdamW, which has made a step.
    """

    def __init__(self, part: str, backend: str = Backend.sdpa) -> None:
        self.part, self._mode, self._live = part, FakeTensorMode(), Live()
        with self._within(backend):
            self.model = MODELS[part]()
            self._optimiser = torch.optim.AdamW(self.model.parameters())
            for each in self.model.parameters():
                each.grad = torch.zeros_like(each)
            self._optimiser.step()
            self._optimiser.zero_grad()
        self._backend = backend

    @contextmanager
    def _within(self, backend: str) -> Iterator[None]:
        with kernels.both() if backend != Backend.sdpa else nullcontext(), self._mode, self._live:
            yield

    def peak(
        self, batch: int, image: int, tokens: int, *, training: bool = True, checkpointing: bool = False
    ) -> int:
        """The most bytes that live in a step of training, or in one call without gradients."""
        set_gradient_checkpointing(self.model, checkpointing)
        with self._within(self._backend), torch.set_grad_enabled(training):
            use_backend(self.model, self._backend, training)
            self._live.peak = self._live.now
            held = 0 if training else self._moments()
            given = inputs(self.part, batch, image, tokens)
            found = loss(self.model, given)
            if training:
                found.backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                self._optimiser.zero_grad()
        return self._live.peak - held

    def _moments(self) -> int:
        """Of the optimiser, which is not there where nothing is trained."""
        held = [each for state in self._optimiser.state.values() for each in state.values()]
        return sum(each.untyped_storage().nbytes() for each in held)


def saved_bytes(model: nn.Module, given: tuple[Tensor, ...]) -> int:
    """Bytes that a forward pass keeps for the backward pass, the weights not counted; a storage once."""
    weights = {each.untyped_storage()._cdata for each in model.parameters()}
    kept: dict[int, Tensor] = {}  # alive, so that no other storage takes their place

    def pack(each: Tensor) -> Tensor:
        storage = each.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = each
        return each

    with saved_tensors_hooks(pack, lambda each: each):
        loss(model, given)
    return sum(each.untyped_storage().nbytes() for each in kept.values())


GRID = ((64, 1), (64, 4), (64, 16), (128, 1), (128, 4), (128, 16), (224, 2), (224, 8), (256, 1), (256, 16))
TOKENS = (16, 100)
BATCH, IMAGE, ROUNDS = 4, 128, 5
"""Of the steps whose cost is measured."""
MODES: dict[str, dict[str, bool]] = {
    "plain": {"training": True},
    "checkpointed": {"training": True, "checkpointing": True},
    "sampling": {"training": False},
}


def fit(part: str, mode: str, backend: str) -> tuple[tuple[int, ...], int, float]:
    """Coefficients (fixed, of a pixel, of a token), how many peaks they are of, and their largest error."""
    measured = Measured(part, backend)
    weights = sum(each.numel() for each in measured.model.parameters())
    held = memory.BYTES[MODES[mode]["training"]] * weights
    rows, peaks = [], []
    for (image, batch), tokens in product(GRID, TOKENS if part == "unet" else TOKENS[:1]):
        rows.append([1.0, batch * image**2, batch * tokens if part == "unet" else 0.0])
        peaks.append(float(measured.peak(batch, image, tokens, **MODES[mode])))
    A, y = np.array(rows), np.array(peaks)
    above = y > 1.05 * held
    found = np.linalg.lstsq(A[above] / y[above, None], np.ones(above.sum()), rcond=None)[0].clip(0)
    known = tuple(round(float(each)) for each in found)
    error = np.abs(np.maximum(held, A @ np.array(known)) / y - 1).max()
    return known, len(y), float(error)


def measure(tell: Callable[[str], None], _folder: Path) -> Section:
    """What a step of training keeps and costs, plain and checkpointed, and attention by our processors."""
    use_one_thread()
    section = Section(
        "attention",
        f"LDM4TS: a step of training, {BATCH} images of {IMAGE} pixels, on one core",
        {
            "kept_mb": ("MB kept", ",.1f"),
            "peak_mb": ("MB at the peak", ",.1f"),
            "cpu_ms": ("CPU ms", ",.0f"),
            "times_slower": ("times slower", ",.2f"),
        },
    )
    for part in MODELS:
        peaks = Measured(part)
        given = inputs(part, BATCH, IMAGE, TOKENS[0])
        reference: dict[str, float] = {}
        for what, checkpointing in (("diffusers", False), ("sdpa", False), ("sdpa, checkpointed", True)):
            tell(f"{part}, {what}")
            model = MODELS[part]()
            set_gradient_checkpointing(model, checkpointing)
            if what != "diffusers":
                use_backend(model, Backend.sdpa, training=True)
            found = {
                "kept_mb": saved_bytes(model, given) / 1e6,
                "peak_mb": peaks.peak(BATCH, IMAGE, TOKENS[0], checkpointing=checkpointing) / 1e6,
                "cpu_ms": 1e3 * min(_step_seconds(model, given) for _ in range(ROUNDS)),
            }
            reference = reference or found
            found["times_slower"] = found["cpu_ms"] / reference["cpu_ms"]
            target = Target("kept_mb", 0.6 * reference["kept_mb"], most=True) if checkpointing else None
            section.rows.append(Row(f"{part}: {what}", found, target=target))
    return section


def _step_seconds(model: nn.Module, given: tuple[Tensor, ...]) -> float:
    """Processor time of a forward and a backward pass."""
    began = process_time()
    loss(model, given).backward()  # type: ignore[no-untyped-call]
    return process_time() - began


def main() -> None:
    """Measure all, and print the coefficients as `memory.py` has them."""
    for part, mode, backend in product(MODELS, MODES, (Backend.sdpa, Backend.flash)):
        known, count, error = fit(part, mode, backend)
        print(f'    ("{part}", "{mode}", "{backend}"): Fit{known},  # {count} peaks, {error:.1%} off at most')


if __name__ == "__main__":
    main()
