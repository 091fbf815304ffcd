"""`python -m tests.bench.gpu`: attention, checkpointing and batches of LDM4TS on a GPU, in memory and speed.

Beside that: a step of training that asks the U-Net once, and one that goes back through a whole sampler; and
the samplers. It writes bench-gpu.json and one table, bench-gpu.md. Without a GPU it says so and measures on
one core of the CPU, with smaller batches: memory is counted there, time is the processor's.
"""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from torch import Generator, Tensor, nn

from barcast.models import SAMPLERS
from barcast.models.diffusion import use_one_thread
from barcast.models.ldm4ts.attention import (
    Backend,
    head_dims,
    probe,
    refused,
    set_gradient_checkpointing,
    use_backend,
)
from barcast.models.ldm4ts.memory import estimate_vram_usage
from barcast.models.samplers import build
from tests.bench.attention import LATENT, MODELS, Measured, inputs, loss
from tests.bench.report import host, sentence

JSON, MARKDOWN = Path("bench-gpu.json"), Path("bench-gpu.md")
SAMPLER, FULL_STEPS, STEPS = "ddim", 50, 20
"""What a full step goes back through; the steps of each sampler that is timed."""
WARM, ROUNDS = 1, 5
ROOM = 0.8
"""Of a GPU's memory, which a batch may take by its estimate."""


@dataclass(frozen=True)
class Size:
    """Which batches are measured, and of which images; `many` are those that samplers fill."""

    images: tuple[int, ...]
    batches: tuple[int, ...]
    many: int
    tokens: int = 16


SIZES = {"cuda": Size((64, 256), (1, 4, 16, 64), 256), "cpu": Size((64,), (1, 4), 8)}


@dataclass(frozen=True)
class Line:
    """One measurement: bytes at the peak in MB, milliseconds, and these over those of the reference."""

    what: str
    image: int
    batch: int
    mb: float | None
    estimated_mb: float | None
    ms: float
    times: float


def measure(device: str, size: Size, tell: Callable[[str], None]) -> dict[str, list[Line]]:
    """All sections, by name."""
    return {
        "training": list(_training(device, size, tell)),
        "modes": list(_modes(device, size, tell)),
        "samplers": list(_samplers(device, size, tell)),
    }


def _training(device: str, size: Size, tell: Callable[[str], None]) -> Iterator[Line]:
    """Steps of each model by each backend that it can be trained with, over diffusers' own plain one."""
    for part in MODELS:
        usable = [p.name for p in probe() if refused(p, True, head_dims(MODELS[part]())) is None]
        counted = Measured(part) if device == "cpu" else None
        for image in size.images:
            for batch in size.batches:
                plain = None
                for backend in usable:
                    for checkpointing in (False, True):
                        what = f"{part} by {backend}" + (", checkpointed" if checkpointing else "")
                        said = estimate_vram_usage(
                            batch, size.tokens, image, backend, checkpointing, part=part
                        )
                        estimated = 1e3 * said["total_estimated_gb"]
                        tell(f"{what}: {batch} of {image} pixels")
                        if device == "cuda" and 1e6 * estimated > ROOM * _total():
                            tell(f"left out: {estimated:,.0f} MB are more than {ROOM:.0%} of this GPU")
                            continue
                        mb, ms = _step(part, backend, checkpointing, batch, image, size.tokens, device)
                        if counted is not None:
                            peak = counted.peak(batch, image, size.tokens, checkpointing=checkpointing)
                            mb = peak / 1e6
                        plain = plain or ms
                        yield Line(what, image, batch, mb, estimated, ms, ms / plain)


def _step(
    part: str, backend: Backend, checkpointing: bool, batch: int, image: int, tokens: int, device: str
) -> tuple[float, float]:
    """MB at the peak and milliseconds of a step of training."""
    before = _held()
    model = MODELS[part]().to(device)
    use_backend(model, backend, training=True)
    set_gradient_checkpointing(model, checkpointing)
    optimiser = torch.optim.AdamW(model.parameters())
    given = inputs(part, batch, image, tokens, device)

    def step() -> None:
        loss(model, given).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()

    ms, peak = _timed(step)
    return (peak - before) / 1e6, ms


def _modes(device: str, size: Size, tell: Callable[[str], None]) -> Iterator[Line]:
    """A step that asks the U-Net once, at any noise level, and one back through a sampler."""
    model, known, times, condition = _sampled(device, size, size.batches[0])
    solver = build(SAMPLER, FULL_STEPS)
    noise = known[:, :LATENT]

    def ask(x: Tensor, _i: int) -> Tensor:
        return _velocity(model, x, known, times, condition)

    def fast() -> None:
        ask(noise, 0).square().mean().backward()  # type: ignore[no-untyped-call]

    def full() -> None:
        solver.run(ask, noise).square().mean().backward()  # type: ignore[no-untyped-call]

    reference = None
    for what, does in (("one call, as in training", fast), (f"back through {FULL_STEPS} steps", full)):
        tell(what)
        before = _held()
        ms, peak = _timed(does)
        reference = reference or ms
        mb = (peak - before) / 1e6 if device == "cuda" else None
        yield Line(what, size.images[0], len(noise), mb, None, ms, ms / reference)


def _samplers(device: str, size: Size, tell: Callable[[str], None]) -> Iterator[Line]:
    """Each sampler's work for many samples in one batch, over that of the first."""
    model, known, times, condition = _sampled(device, size, size.many)
    reference = None
    for name in SAMPLERS:
        tell(f"{name}, {STEPS} steps")
        solver = build(name, STEPS)
        shape = (solver.draws + 1, *known[:, :LATENT].shape)
        noise = torch.randn(shape, generator=Generator(device).manual_seed(1), device=device)

        @torch.no_grad()
        def sample(solver: Any = solver, noise: Tensor = noise) -> None:
            ask = partial(_asked, model, known, times, condition)
            solver.run(ask, noise if solver.draws else noise[0])

        before = _held()
        ms, peak = _timed(sample)
        reference = reference or ms
        mb = (peak - before) / 1e6 if device == "cuda" else None
        what = f"{name}, {solver.evaluations} calls"
        yield Line(what, size.images[0], size.many, mb, None, ms, ms / reference)


def _sampled(device: str, size: Size, batch: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The U-Net, and what it is asked with."""
    model = MODELS["unet"]().to(device)
    use_backend(model, Backend.sdpa, training=True)
    canvas, times, condition = inputs("unet", batch, size.images[0], size.tokens, device)
    return model, canvas, times, condition


def _velocity(model: nn.Module, x: Tensor, known: Tensor, times: Tensor, condition: Tensor) -> Tensor:
    """The U-Net's answer to noisy latents x beside what is known."""
    found: Tensor = model(torch.cat([x, known[:, LATENT:]], 1), times, condition).sample
    return found


def _asked(model: nn.Module, known: Tensor, times: Tensor, condition: Tensor, x: Tensor, _i: int) -> Tensor:
    return _velocity(model, x, known, times, condition)


def _timed(does: Callable[[], None]) -> tuple[float, int]:
    """The median milliseconds of it after a warm-up, and the most bytes that were allocated."""
    on_gpu = torch.cuda.is_available()
    timer = perf_counter if on_gpu else process_time
    for _ in range(WARM):
        does()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(ROUNDS):
        began = timer()
        does()
        if on_gpu:
            torch.cuda.synchronize()
        took.append(timer() - began)
    return 1e3 * median(took), torch.cuda.max_memory_allocated() if on_gpu else 0


def _total() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def _held() -> int:
    """Bytes that are allocated on the GPU, after what nobody needs is given back."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def markdown(machine: str, sections: dict[str, list[Line]]) -> str:
    """One table of all sections, under the machine."""
    header = "| what | pixels | batch | MB | estimated MB | off | ms | times |"
    lines = [machine, "", header, "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, rows in sections.items():
        lines.append(f"| **{name}** | | | | | | | |")
        for row in rows:
            mb = estimated = off = ""
            if row.mb is not None:
                mb = f"{row.mb:,.1f}"
            if row.mb is not None and row.estimated_mb is not None:
                estimated, off = f"{row.estimated_mb:,.1f}", f"{row.estimated_mb / row.mb - 1:+.1%}"
            cells = (row.what, row.image, row.batch, mb, estimated, off, f"{row.ms:,.1f}", f"{row.times:.2f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(sizes: dict[str, Size] = SIZES, folder: Path = Path()) -> None:
    """Measure, print, write."""
    out = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = probe()
    if device == "cpu":
        use_one_thread()
        out.print(f"no GPU: {found[1].why}; what follows is of one core of the CPU")
    facts = {**host(), "torch": version("torch")}
    on = torch.cuda.get_device_name() if device == "cuda" else "no GPU, one core"
    sections = measure(device, sizes[device], lambda line: out.print(line, highlight=False))
    left = {each.name: each.line() for each in found if not each.usable}
    plain = {name: [asdict(row) for row in rows] for name, rows in sections.items()}
    result = {"machine": facts, "device": on, "not_usable": left, "sections": plain}
    (folder / JSON).write_text(json.dumps(result, indent=1))
    text = markdown(f"{sentence(facts)}; {on}", sections)
    (folder / MARKDOWN).write_text(text)
    out.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
