"""What a forecast costs: by its sampler, by its folding, against the way it once was made."""

from collections.abc import Sequence
from functools import partial
from timeit import default_timer
from typing import TypedDict

import torch

from barcast.models import samplers
from barcast.models.sssd.model import Features, ImprovedSSSDModel, SSSDModel, Statistics, Timer, timed

ORIGINAL = ("ddim", 50)  # how the model's predecessor sampled


class Improvement(TypedDict):
    """What `benchmark_improvement` found, times in milliseconds, each the median of five."""

    time_original_ms: float
    time_folded_ms: float
    time_improved_ms: float
    speedup: float
    predictions_original: dict[int, Statistics]
    predictions_improved: dict[int, Statistics]


def benchmark_improvement(
    model_improved: ImprovedSSSDModel,
    model_original: SSSDModel,
    features: Features,
    horizons: Sequence[int] = (0,),
    num_samples: int = 100,
    timer: Timer = default_timer,
) -> Improvement:
    """Time a forecast by its sampler against one of 50 DDIM steps for each sample of each horizon in turn.

    `time_folded_ms` is that of the 50 steps with all samples in one batch: it parts what the folding gives
    from what the sampler gives.
    """
    noise = model_original.noise(horizons, num_samples, None)
    solver = samplers.build(*ORIGINAL)

    @torch.no_grad()
    def one_by_one() -> dict[int, Statistics]:
        c = model_original.context(features)
        found: dict[int, Statistics] = {}
        for h in horizons:
            each = [model_original.solve(solver, c, noise[s : s + 1]) for s in range(num_samples)]
            found |= model_original.summary(torch.cat(each, 1), [h])
        return found

    folded = partial(model_original.inference_forward, features, horizons, num_samples, *ORIGINAL)
    improved = partial(model_improved.inference_forward, features, horizons, num_samples)
    original_ms, original = timed(one_by_one, timer)
    improved_ms, predictions = timed(improved, timer)
    return Improvement(
        time_original_ms=original_ms,
        time_folded_ms=timed(folded, timer)[0],
        time_improved_ms=improved_ms,
        speedup=original_ms / improved_ms,
        predictions_original=original,
        predictions_improved=predictions,
    )
