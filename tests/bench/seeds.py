"""What forecasts of an `SSSDModel` cost by sampler, steps and rows, how near they come, and its training.

Times are of a network of the published size with weights that nothing has taught: they do not change them.
Errors and scores are of a small one that has learnt rows whose law is known.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time

import torch
from torch import Tensor

from barcast.models.diffusion import use_one_thread
from barcast.models.samplers import build
from barcast.models.scores import crps
from barcast.models.sssd import ImprovedSSSDModel, SSSDConfig, SSSDModel, benchmark_improvement, fit
from barcast.models.sssd.model import REFERENCE, STEPS, timed
from tests.bench.report import Row, Section
from tests.models import seeds

SAMPLES, HORIZONS = 100, [0, 1, 2]
SWEEP = {"dpmpp": (20, 30, 50), "ddim": (20, 50)}
SYMBOLS = (1, 2, 5, 8, 20)
LEARNT, UNSEEN = 1500, 500
LEVELS = torch.arange(1, 20) / 20


def measure(tell: Callable[[str], None], _folder: Path) -> Section:
    """Samplers, steps, folding, rows of a batch and a step of training."""
    use_one_thread()
    section = Section(
        "seeds",
        f"SSSDModel: {SAMPLES} samples of {len(HORIZONS)} horizons, on one core",
        {
            "ms": ("CPU ms", ",.1f"),
            "per_row": ("CPU ms a row", ",.1f"),
            "evaluations": ("evaluations", ",.0f"),
            "error": ("error, sd", ".3f"),
            "crps": ("CRPS, sd", ".4f"),
            "times_faster": ("times faster", ",.1f"),
            "mb": ("MB", ",.1f"),
        },
    )
    tell("training a small model")
    small = SSSDModel(seeds.config())
    x = seeds.features(LEARNT)
    fit(small, x, seeds.targets(x))
    unseen = seeds.features(UNSEEN, seed=8)
    outcome = seeds.targets(unseen, seed=9)

    exact, _ = _solved(small, unseen, outcome, *REFERENCE)

    large = ImprovedSSSDModel(SSSDConfig()).eval()
    features = _features(large, 1)
    for name, default in STEPS.items():
        for steps in sorted({default, *SWEEP.get(name, ())}):
            tell(f"{name}, {steps} steps")
            ms, _ = timed(
                partial(large.inference_forward, features, HORIZONS, SAMPLES, name, steps), process_time
            )
            samples, score = _solved(small, unseen, outcome, name, steps)
            numbers = {
                "ms": ms,
                "evaluations": build(name, steps).evaluations,
                "error": float(((samples - exact) / exact.std(1, keepdim=True)).square().mean().sqrt()),
                "crps": score,
            }
            section.rows.append(Row(f"{name}, {steps} steps", numbers))

    tell("one call for each sample")
    one = benchmark_improvement(large, large, features, HORIZONS, SAMPLES, process_time)
    original, folded, improved = (one[f"time_{k}_ms"] for k in ("original", "folded", "improved"))  # type: ignore[literal-required]
    section.rows += [
        Row("ddim, 50 steps for each sample of each horizon in turn", {"ms": original, "times_faster": 1.0}),
        Row("ddim, 50 steps of all in one", {"ms": folded, "times_faster": original / folded}),
        Row("dpmpp, 20 steps of all in one", {"ms": improved, "times_faster": original / improved}),
    ]
    for rows in SYMBOLS:
        tell(f"{rows} rows")
        many = _features(large, rows)
        ms, _ = timed(partial(large.inference_forward, many, HORIZONS, SAMPLES), process_time)
        section.rows.append(Row(f"dpmpp, 20 steps, a batch of {rows}", {"ms": ms, "per_row": ms / rows}))

    tell("a step of training")
    batch = large.config.training.batch_size
    examples = _features(large, batch), torch.randn(batch, 4, generator=seeds.generator())
    large.standardise(examples[1])

    def step() -> None:
        large.training_step(examples)["loss"].backward()  # type: ignore[no-untyped-call]

    ms, _ = timed(step, process_time)
    size = 4 * sum(p.numel() for p in large.parameters()) / 1e6
    section.rows.append(Row(f"a step of training, {batch} rows", {"ms": ms, "mb": size}))
    return section


def _features(model: SSSDModel, rows: int) -> dict[str, Tensor]:
    width, g = model.config.model.encoder.feature_dim, seeds.generator()
    lookback = model.config.data.lookback_bars
    return {name: torch.randn(rows, length, width, generator=g) for name, length in lookback.items()}


def _solved(
    model: SSSDModel, features: dict[str, Tensor], outcome: Tensor, sampler: str, steps: int
) -> tuple[Tensor, float]:
    """Samples (H, S, B), and their score over rows and horizons in standard deviations of the outcomes."""
    found = model.inference_forward(features, HORIZONS, SAMPLES, sampler, steps)
    samples = torch.stack([found[h]["samples"] for h in HORIZONS])
    quantiles = torch.quantile(samples, LEVELS, dim=1).permute(2, 1, 0)  # (B, H, Q)
    return samples, float((crps(outcome, quantiles, LEVELS) / outcome.std(0).numpy()).mean())
