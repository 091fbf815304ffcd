"""The samplers of a diffusion model beside each other: how good, how dear, and which to configure."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barcast.daemon.calendar import iso
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import SAMPLERS, ConfigError, DataError, Forecaster, Window
from barcast.models.evaluation import Forecasts, collect
from barcast.models.scores import Estimate, crps, gain, lag

STEPS = (2, 4, 8, 20)
REFERENCE = ("dpmpp3", 100)
TOLERANCE = 0.0005
"""The share of CRPS over the best that is given up for fewer evaluations."""
ORIGINS = 300
TIMED = 7
"""Forecasts that are timed of each sampler, after one that is not."""

DEFINITIONS = {
    "evaluations": "how often the network is asked for each sample",
    "cpu_ms": f"processor time of one forecast on one thread: the median of {TIMED}",
    "crps": "in the validation half, of log returns before calibration, each horizon over its mean absolute "
    "outcome there",
    "validation": "CRPS over that of the reference in percent, in the older half of the origins; its paired "
    "error is that of Newey and West (1987)",
    "confirmation": "the same in the newer half, by which nothing was chosen",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A sampler with a number of steps; see `DEFINITIONS`."""

    sampler: str
    steps: int
    evaluations: int
    cpu_ms: float
    crps: float
    validation: Estimate
    confirmation: Estimate


@dataclass(frozen=True, slots=True)
class Comparison:
    """All trials, and the one to take: see `choose`.

    `adds` is whether training found that the diffusion adds anything to the map.
    """

    trials: tuple[Trial, ...]
    chosen: Trial
    adds: bool
    meta: dict[str, Any]

    def json(self) -> str:
        """Everything as one JSON object."""
        trials = [
            {**asdict(t), "validation": t.validation._asdict(), "confirmation": t.confirmation._asdict()}
            for t in self.trials
        ]
        chosen = {"sampler": self.chosen.sampler, "steps": self.chosen.steps}
        whole = {"meta": self.meta, "definitions": DEFINITIONS, "trials": trials, "chosen": chosen}
        return json.dumps({**whole, "adds": self.adds}, allow_nan=False)


def compare(
    directory: Path,
    histories: Sequence[Window],
    timeframe: Timeframe,
    *,
    steps: Sequence[int] = STEPS,
    origins: int = ORIGINS,
    clock: Callable[[], float],
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> Comparison:
    """Forecast by every sampler in every number of steps that it takes, where the model has not learnt from.

    About so many `origins`, on a grid in time common to all symbols, are cut into an older half, to choose
    by, and a newer one; none of the older is realised in the newer. `clock` gives seconds of processor time.
    Raise `ConfigError` for a model that is not an SSSD or of another timeframe, `DataError` for too few bars.
    """
    from barcast.models.checkpoint import load
    from barcast.models.samplers import build
    from barcast.models.trained import Trained

    checkpoint = load(directory)
    trained = checkpoint.trained
    if not isinstance(trained, Trained):
        raise ConfigError(f"{directory} is not sampled by itself: name an SSSD model")
    if trained.scaling.timeframe != timeframe.text:
        raise ConfigError(
            f"{directory}: the model was trained on {trained.scaling.timeframe!r} bars, not on "
            f"{timeframe.text!r}; give bars of its own timeframe"
        )
    keys = [(sampler, n) for sampler, least in SAMPLERS.items() for n in steps if n >= least]
    forecasters: list[Forecaster] = [trained.raw(checkpoint.model, *key) for key in (REFERENCE, *keys)]
    since, slot = trained.record.validation_end, timeframe.duration or DAY
    stride = _stride(histories, since, origins)

    def stand(done: int, count: int, window: Window) -> None:
        progress(0, f"{done} of {count}, {window.symbol}")

    last = max(int(window.close_time) for window in histories)
    found = collect(forecasters, histories, since=since, until=last, stride=stride, slot=slot, progress=stand)
    horizons, levels = trained.scaling.horizons, trained.levels
    older, newer, cut = _halves(found, {h.symbol: h for h in histories}, max(horizons))
    size = np.abs(found.outcomes[older]).mean(0)
    losses = [(crps(found.outcomes, q, levels) / size).mean(1) for q in found.quantiles]

    def over(own: NDArray[np.float64], half: NDArray[np.bool_]) -> Estimate:
        moments, at = np.unique(found.close_times[half], return_inverse=True)
        lags = lag(max(horizons), stride, len(moments))
        saved = gain(own[half], losses[0][half], at, len(moments), lags)
        return Estimate(-100 * saved.value, 100 * saved.error)

    window = max(histories, key=len)
    trials = tuple(
        Trial(
            sampler=sampler,
            steps=n,
            evaluations=build(sampler, n).evaluations,
            cpu_ms=_cpu_ms(forecaster, window, clock),
            crps=float(own[older].mean()),
            validation=over(own, older),
            confirmation=over(own, newer),
        )
        for (sampler, n), forecaster, own in zip(keys, forecasters[1:], losses[1:], strict=True)
    )
    return Comparison(
        trials,
        choose(trials),
        adds=trained.record.denoiser_step > 0,
        meta={
            "model": checkpoint.model,
            "timeframe": timeframe.text,
            "reference": dict(zip(("sampler", "steps"), REFERENCE, strict=True)),
            "tolerance": TOLERANCE,
            "stride": stride,
            "symbols": sorted(set(found.symbols)),
            "origins": {"validation": int(older.sum()), "confirmation": int(newer.sum())},
            "since": iso(int(found.close_times.min())),
            "cut": iso(cut),
            "until": iso(int(found.close_times.max())),
        },
    )


def choose(trials: Sequence[Trial]) -> Trial:
    """The fewest evaluations within `TOLERANCE` of the lowest CRPS in validation, and the best of these."""
    most = min(trial.crps for trial in trials) * (1 + TOLERANCE)
    good = [trial for trial in trials if trial.crps <= most]
    return min(good, key=lambda trial: (trial.evaluations, trial.crps))


def _stride(histories: Sequence[Window], since: int, origins: int) -> int:
    """Bar slots from one origin to the next: no divisor of a day or a week, so that all hours come."""
    count = sum(int((history.close_times >= since).sum()) for history in histories)
    stride = max(1, count // origins)
    while gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    return stride


def _halves(
    found: Forecasts, histories: dict[str, Window], reach: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """Which origins are in the older half of their times and realised in it, which in the newer; the cut."""
    moments = np.unique(found.close_times)
    cut = int(moments[len(moments) // 2])
    realised = np.empty(len(found.symbols), np.int64)
    for symbol, history in histories.items():
        own = np.array(found.symbols) == symbol
        realised[own] = history.close_times[
            np.searchsorted(history.close_times, found.close_times[own]) + reach
        ]
    older, newer = realised < cut, found.close_times >= cut
    if not older.any():
        raise DataError(
            f"The bars from {iso(int(moments[0]))[:10]} on, which the model has not learnt from, are too few "
            "to choose by one half of them: give newer ones."
        )
    return older, newer, cut


def _cpu_ms(forecaster: Forecaster, window: Window, clock: Callable[[], float]) -> float:
    forecaster.forecast([window])
    took = []
    for _ in range(TIMED):
        began = clock()
        forecaster.forecast([window])
        took.append(clock() - began)
    return 1e3 * median(took)
