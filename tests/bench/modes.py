"""Training LDM4TS by one call of the U-Net, and back through a sampler: what a step costs, and what it buys.

Two copies of one small model, whose images have been learnt, get the same CPU seconds on the same bars of US
shares. The one learns as `training_mode` does: noise of a random level, one call. The other samples by 50
steps and learns by the CRPS of what it sampled, back through all of them. Both are scored by the full sampler
on later bars, by what is sampled alone: the quantile map beside it is not learnt here.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import count
from math import cos, pi
from pathlib import Path
from time import process_time
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from barcast.backtest.sample import sample_bars
from barcast.models import samplers
from barcast.models.diffusion import use_one_thread
from barcast.models.ldm4ts import LDM4TSModel, windows
from barcast.models.ldm4ts.bars import COLUMNS, Seen
from barcast.models.ldm4ts.fitting import LEVELS, NORMAL, _Learnt
from barcast.models.ldm4ts.forecaster import quantiles_of
from barcast.models.ldm4ts.network import PRESETS
from barcast.models.optimiser import Share
from barcast.models.scores import crps, gain, lag, mean
from barcast.models.sssd.model import timed
from tests.bench.report import Row, Section, Target
from tests.garch import simulate

SYMBOLS = ("AAPL", "IBM", "MSFT")
CONTEXT, HORIZONS = 64, (1, 5, 10)
LATER, STRIDE = 0.3, 12
"""The share of the bars, the newest, that both are scored on, and from one origin to the next."""
SECONDS = 120.0
"""Of the CPU for each of the two; the images take a fifth of that beside."""
BATCH, RATE = 16, 1e-3
SAMPLER, STEPS, SAMPLES = "ddim", 50, 16
PAIR = 2
"""Samples of a row in a step back through the sampler: the fewest that have a CRPS."""
ROUNDS = 3
COSTS = ((4, 32), (20, 1), (20, 10))
"""Steps and samples of a forecast that is timed."""


Numbers = NDArray[np.float64]


class Rows(NamedTuple):
    """Rows of all symbols, their outcomes in deviations, and the number of each row's time."""

    seen: Seen
    way: Tensor
    at: NDArray[np.int64]


def measure(tell: Callable[[str], None], _folder: Path) -> Section:
    """A step of each, and the CRPS of both after the same seconds."""
    use_one_thread()
    section = Section(
        "modes",
        f"LDM4TS: one call of the U-Net a step, or back through {STEPS}; {SECONDS:.0f} CPU seconds each",
        {
            "ms": ("ms a step", ",.0f"),
            "steps": ("steps", ",.0f"),
            "times": ("times slower", ",.1f"),
            "crps": ("CRPS, sd", ".4f"),
            "gain": ("lower by", ".1%"),
            "error": ("±", ".1%"),
        },
    )
    model = LDM4TSModel(
        horizons=HORIZONS, context=CONTEXT, preset="tiny", enable_gradient_checkpointing=False
    )
    learn, later = _rows(model, 0.0, 1 - LATER, 1), _rows(model, 1 - LATER, 1.0, STRIDE)
    learnt = _Learnt(model, learn.seen, learn.way, BATCH)
    tell("the images, once for both")
    model.net.vae.requires_grad_(True)
    parts = [model.net.vae, model.net.read]
    _train(parts, lambda g: learnt.image_loss(Share(0, 1, g)), SECONDS / 5)
    learnt.prepare()
    numbers: dict[str, dict[str, float]] = {}
    scores: dict[str, Numbers] = {}
    for what, way in WAYS.items():
        tell(f"{what}, {SECONDS:.0f} s")
        own = deepcopy(model)
        net = own.net
        parts = [net.unet, net.statistics, net.frequency, net.temporal, net.read]
        ms = _step_ms(own, learnt, way)
        steps = _train(parts, partial(way, own, learnt, PAIR), SECONDS)
        tell(f"{what}: scoring")
        scores[what], numbers[what] = _score(own, later), {"ms": ms, "steps": steps}
    tell("before either: scoring")
    scores["before either"], numbers["before either"] = _score(model, later), {}
    times = int(later.at.max()) + 1
    reach = lag(max(HORIZONS), STRIDE, times)
    one, back = WAYS
    for what, score in scores.items():
        numbers[what]["crps"] = mean(score, later.at, times, reach).value
    better = gain(scores[one], scores[back], later.at, times, reach)
    numbers[one] |= {"gain": better.value, "error": better.error}
    numbers[back]["times"] = numbers[back]["ms"] / numbers[one]["ms"]
    for what, found in numbers.items():
        section.rows.append(Row(what, found, target=TARGETS.get(what)))
    return section


def forecasts(tell: Callable[[str], None], _folder: Path) -> Section:
    """What a forecast costs by preset, steps and samples, and how many weights there are."""
    use_one_thread()
    section = Section(
        "ldm4ts",
        "LDM4TSModel: one forecast of 100 bars, 64 pixels, horizons 15, 60 and 240, on one core",
        {
            "weights": ("weights", ",.0f"),
            "trained": ("without autoencoder", ",.0f"),
            "ms": ("CPU ms", ",.0f"),
        },
    )
    bars = torch.from_numpy(simulate("SYM", 100, seed=1).window.values)[None]
    for preset in PRESETS:
        for steps, samples in COSTS:
            tell(f"{preset}, {steps} steps, {samples} samples")
            model = LDM4TSModel(preset=preset, sampling_steps=steps).eval()
            ms, _ = timed(partial(model, bars, None, samples), process_time)
            counts = {"weights": model.parameters(), "trained": _without_images(model)}
            numbers = {name: float(sum(p.numel() for p in found)) for name, found in counts.items()}
            section.rows.append(Row(f"{preset}, {steps} steps, {samples} samples", numbers | {"ms": ms}))
    return section


def _without_images(model: LDM4TSModel) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _rows(model: LDM4TSModel, first: float, last: float, every: int) -> Rows:
    """Rows of a part of each symbol's bars: windows and outcomes lie within it."""
    table = pl.read_parquet(sample_bars())
    seen, ways, at = [], [], []
    for symbol in SYMBOLS:
        own = table.filter(pl.col("symbol") == symbol).sort("close_time").select(COLUMNS)
        bars = torch.from_numpy(own.to_numpy().copy())
        bars = bars[int(first * len(bars)) : int(last * len(bars))]
        ohlcv, targets = windows(bars, CONTEXT, max(HORIZONS), every)
        rows = model.seen(ohlcv)
        seen.append(rows)
        ways.append(model.ways(rows, targets))
        at.append(torch.arange(len(rows)))
    joined = Seen(*(torch.cat([getattr(x, name) for x in seen]) for name in Seen.__dataclass_fields__))
    return Rows(joined, torch.cat(ways), torch.cat(at).numpy())


def _train(parts: list[torch.nn.Module], loss: Callable[[Generator], Tensor], seconds: float) -> int:
    """AdamW by a rate that falls with the seconds; how many steps there were."""
    parameters = [p for part in parts for p in part.parameters()]
    optimiser = torch.optim.AdamW(parameters, RATE)
    generator, began = Generator().manual_seed(1), process_time()
    for step in count():
        spent = (process_time() - began) / seconds
        if spent >= 1:
            return step
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * 0.5 * (1 + cos(pi * spent))
        optimiser.zero_grad()
        loss(generator).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    raise AssertionError


def _fast(model: LDM4TSModel, learnt: _Learnt, _samples: int, g: Generator) -> Tensor:
    """The loss of what is diffused, by one call."""
    i = torch.randint(len(learnt.drawn), (BATCH,), generator=g)
    t, eps, _ = model.drawn(BATCH, g)
    at = learnt.drawn[i]
    found = model.losses(
        learnt.rows.only(at), learnt.known[i], learnt.latents[i], learnt.way[at], t, eps, 1.0
    )
    return found.velocity + found.direct


def _full(model: LDM4TSModel, learnt: _Learnt, samples: int, g: Generator) -> Tensor:
    """The CRPS of samples at the horizons, or of one sample its absolute error, by all calls of a sampler."""
    at = learnt.drawn[torch.randint(len(learnt.drawn), (BATCH,), generator=g)]
    z, _ = model.sample(learnt.rows.only(at), samples, g, samplers.build(SAMPLER, STEPS))  # (B, H, S)
    y = learnt.way[at][:, learnt.places].double()
    apart = 0.5 * (z[..., 0] - z[..., 1]).abs() if samples == PAIR else torch.zeros(())
    return ((z - y[..., None]).abs().mean(-1) - apart).mean()


def _step_ms(
    model: LDM4TSModel, learnt: _Learnt, way: Callable[[LDM4TSModel, _Learnt, int, Generator], Tensor]
) -> float:
    """CPU milliseconds of a loss and its gradients, of one sample a row: the least of some."""
    generator, took = Generator().manual_seed(2), []
    for _ in range(ROUNDS):
        began = process_time()
        way(model, learnt, 1, generator).backward()  # type: ignore[no-untyped-call]
        took.append(1e3 * (process_time() - began))
        model.zero_grad()
    return min(took)


@torch.no_grad()
def _score(model: LDM4TSModel, rows: Rows) -> Numbers:
    """CRPS of each row by the full sampler, in deviations, averaged over the horizons."""
    model.eval()
    places, found = [model.steps.index(h) for h in HORIZONS], []
    for some in torch.split(torch.arange(len(rows.way)), 8):
        z, _ = model.sample(rows.seen.only(some), SAMPLES, None, samplers.build(SAMPLER, STEPS))
        y = rows.way[some][:, places].double()
        found.append(torch.from_numpy(crps(y, quantiles_of(z, NORMAL), LEVELS)).mean(1))
    return torch.cat(found).numpy()


WAYS = {"one call": _fast, f"back through {STEPS} steps": _full}
TARGETS = dict(zip(WAYS, (Target("gain", 0.0), Target("times", 40.0)), strict=True))
