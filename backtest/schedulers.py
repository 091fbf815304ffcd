"""The samplers of a diffusion model beside each other: how good, how dear, and which to configure."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from barcast.daemon.calendar import iso
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import BASELINES, SAMPLERS, Card, ConfigError, DataError, Forecast, Forecaster, Window
from barcast.models.evaluation import Forecasts, collect
from barcast.models.paths import Coupler, with_paths
from barcast.models.scores import Estimate, crps, energy, gain, lag

if TYPE_CHECKING:
    from barcast.models.ldm4ts.trained import LatentTrained
    from barcast.models.trained import Trained

Array = NDArray[np.float64]

STEPS = (1, 2, 4, 8, 20)
REFERENCE = ("dpmpp3", 100)
TOLERANCE = 0.0005
"""The share of a score that is given up for fewer evaluations."""
ORIGINS = 300
TIMED = 7
"""Forecasts that are timed of each sampler, after one that is not."""

DEFINITIONS = {
    "evaluations": "how often the network is asked for each sample",
    "cpu_ms": f"processor time of one forecast with paths on one thread: the median of {TIMED}",
    "energy": "energy score of paths: of the moves from step to step, over the deviation of the whole path",
    "crps": "of the quantiles, before calibration, each horizon over its mean absolute outcome",
    "mean": "in the older half of the origins",
    "validation": "by how much that of the reference is exceeded in the older half, in percent, with the "
    "paired error of Newey and West (1987)",
    "confirmation": "the same in the newer half, by which nothing was chosen",
}


class Score(NamedTuple):
    """A score, and its excess over that of the reference; see `DEFINITIONS`."""

    mean: float
    validation: Estimate
    confirmation: Estimate


@dataclass(frozen=True, slots=True)
class Trial:
    """A sampler with a number of steps; see `DEFINITIONS`."""

    sampler: str
    steps: int
    evaluations: int
    cpu_ms: float
    energy: Score
    crps: Score


@dataclass(frozen=True, slots=True)
class Comparison:
    """All trials, and the one to take: see `choose`."""

    trials: tuple[Trial, ...]
    chosen: Trial
    meta: dict[str, Any]

    def json(self) -> str:
        """Everything as one JSON object."""
        plain = msgspec.to_builtins(self)
        plain["chosen"] = {"sampler": self.chosen.sampler, "steps": self.chosen.steps}
        for trial in plain["trials"]:
            for score in ("energy", "crps"):
                mean, *halves = trial[score]
                excess = [dict(zip(Estimate._fields, half, strict=True)) for half in halves]
                trial[score] = dict(zip(Score._fields, (mean, *excess), strict=True))
        return json.dumps({**plain, "definitions": DEFINITIONS}, allow_nan=False)


class Winding(Forecaster, Coupler, Protocol):
    """What forecasts, and knows paths."""


class _Winding:
    """Forecasts with paths, and the energy scores of these; `energies` and `spreads` are the state.

    They are those of the forecasts so far, in order: of the moves, and the deviations of the whole paths.
    """

    def __init__(self, raw: Winding, histories: Mapping[str, Window]) -> None:
        self.raw, self._histories = raw, histories
        self.energies: list[float] = []
        self.spreads: list[float] = []

    @property
    def card(self) -> Card:
        """That of the forecaster within."""
        return self.raw.card

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; where there are no paths the score is not a number."""
        made = with_paths(self.raw, windows, self.raw.forecast(windows))
        for forecast in made:
            energy_, spread = nan, nan
            if forecast.paths is not None:
                history, steps = self._histories[forecast.symbol], np.array(forecast.paths.steps)
                at = int(np.searchsorted(history.close_times, forecast.close_time))
                went = np.log(history.values[at + steps, 3] / forecast.reference)
                moves = np.diff(forecast.paths.returns, axis=1, prepend=0.0)
                energy_ = float(energy(np.diff(went, prepend=0.0), moves))
                spread = float(forecast.paths.returns[:, -1].std())
            self.energies.append(energy_)
            self.spreads.append(spread)
        return made


def diffuses(directory: Path | str) -> bool:
    """Whether training found that the diffusion adds anything to a Gaussian copula; an LDM4TS has no copula.

    Raise `ConfigError` for what is no SSSD or LDM4TS, and `CheckpointError` for what cannot be read.
    """
    from barcast.models.trained import Trained

    trained = _sampled(directory)[1]
    return not isinstance(trained, Trained) or trained.record.denoiser_step > 0


def compare(
    directory: Path | str,
    histories: Collection[Window],
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
    Raise `ConfigError` for a model that is no SSSD or LDM4TS, or of another timeframe, `DataError` for too
    few bars.
    """
    from barcast.models.samplers import build

    model, trained = _sampled(directory)
    if trained.scaling.timeframe != timeframe.text:
        raise ConfigError(
            f"{directory}: the model was trained on {trained.scaling.timeframe!r} bars, not on "
            f"{timeframe.text!r}; give bars of its own timeframe"
        )
    keys = [(sampler, n) for sampler, least in SAMPLERS.items() for n in steps if n >= least]
    by_symbol = {history.symbol: history for history in histories}
    forecasters = [_Winding(_raw(model, trained, *key), by_symbol) for key in (REFERENCE, *keys)]
    horizons, levels = trained.scaling.horizons, trained.levels
    since, slot = trained.record.validation_end, timeframe.duration or DAY
    if not any(int((window.close_times >= since).sum()) > max(horizons) for window in histories):
        raise DataError(
            f"{directory} has learnt, and was validated, until {iso(since)}, and the bars end at "
            f"{iso(max(int(window.close_time) for window in histories))}: give bars from then on, more than "
            f"the {max(horizons)} of the longest horizon."
        )
    stride = _stride(histories, since, origins)

    def stand(done: int, count: int, window: Window) -> None:
        progress(0, f"{done} of {count}, {window.symbol}")

    last = max(int(window.close_time) for window in histories)
    found = collect(forecasters, histories, since=since, until=last, stride=stride, slot=slot, progress=stand)
    energies = np.array([f.energies for f in forecasters]) / forecasters[0].spreads
    sound = np.all([np.isfinite(x) for x in (*energies, *(q.sum((1, 2)) for q in found.quantiles))], axis=0)
    older, newer, cut = _halves(found, sound, by_symbol, max(horizons))
    size = np.abs(found.outcomes[older]).mean(0)
    losses = [(crps(found.outcomes, q, levels) / size).mean(1) for q in found.quantiles]

    def excess(own: Array, reference: Array, half: NDArray[np.bool_]) -> Estimate:
        moments, at = np.unique(found.close_times[half], return_inverse=True)
        lags = lag(max(horizons), stride, len(moments))
        saved = gain(own[half], reference[half], at, len(moments), lags)
        return Estimate(-100 * saved.value, 100 * saved.error)

    def score(own: Array, reference: Array) -> Score:
        return Score(float(own[older].mean()), *(excess(own, reference, half) for half in (older, newer)))

    window, own = max(histories, key=len), trained.raw(model).card
    trials = tuple(
        Trial(
            sampler=sampler,
            steps=n,
            evaluations=build(sampler, n).evaluations,
            cpu_ms=_cpu_ms(forecasters[k].raw, window, clock),
            energy=score(energies[k], energies[0]),
            crps=score(losses[k], losses[0]),
        )
        for k, (sampler, n) in enumerate(keys, 1)
    )
    return Comparison(
        trials,
        choose(trials),
        meta={
            "model": model,
            "timeframe": timeframe.text,
            "default": {"sampler": own.sampler, "steps": own.steps},
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


def _raw(model: str, trained: "Trained | LatentTrained", sampler: str, steps: int) -> Winding:
    from barcast.models.trained import Trained

    if isinstance(trained, Trained):
        return trained.raw(model, sampler, steps, paths=True)
    return trained.raw(model, sampler, steps)


def _sampled(directory: Path | str) -> "tuple[str, Trained | LatentTrained]":
    from barcast.models.checkpoint import load
    from barcast.models.ldm4ts.trained import LatentTrained
    from barcast.models.trained import Trained

    if str(directory) in BASELINES:
        raise ConfigError(f"{directory} is a baseline, which has no checkpoint; name a checkpoint directory")
    checkpoint = load(Path(directory))
    if not isinstance(checkpoint.trained, Trained | LatentTrained):
        raise ConfigError(f"{directory} is not sampled by itself: name an SSSD or LDM4TS")
    return checkpoint.model, checkpoint.trained


def choose(trials: Sequence[Trial]) -> Trial:
    """The fewest evaluations whose scores are within `TOLERANCE` in validation, and the nearest of as many.

    Both scores count, better or worse: what is far from the reference, which solves what the model says, is
    the error of its solver, also where it helps once.
    """

    def far(trial: Trial) -> float:
        return max(abs(trial.energy.validation.value), abs(trial.crps.validation.value)) / 100

    good = [trial for trial in trials if far(trial) <= TOLERANCE] or [min(trials, key=far)]
    return min(good, key=lambda trial: (trial.evaluations, far(trial)))


def _stride(histories: Collection[Window], since: int, origins: int) -> int:
    """Bar slots from one origin to the next: no divisor of a day or a week, so that all hours come."""
    count = sum(int((history.close_times >= since).sum()) for history in histories)
    stride = max(1, count // origins)
    while gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    return stride


def _halves(
    found: Forecasts, sound: NDArray[np.bool_], histories: Mapping[str, Window], reach: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """Which sound origins are in the older half and realised in it, which in the newer; the cut between."""
    moments = np.unique(found.close_times)
    cut = int(moments[len(moments) // 2])
    realised = np.empty(len(found.symbols), np.int64)
    for symbol, history in histories.items():
        own = np.array(found.symbols) == symbol
        realised[own] = history.close_times[
            np.searchsorted(history.close_times, found.close_times[own]) + reach
        ]
    older, newer = sound & (realised < cut), sound & (found.close_times >= cut)
    if min(len(np.unique(found.close_times[half])) for half in (older, newer)) < 2:
        raise DataError(
            f"The bars from {iso(int(moments[0]))[:10]} on, which the model has not learnt from, are too few "
            "to choose by one half of them: give newer ones."
        )
    return older, newer, cut


def _cpu_ms(forecaster: Winding, window: Window, clock: Callable[[], float]) -> float:
    took = []
    for _ in range(1 + TIMED):
        began = clock()
        with_paths(forecaster, [window], forecaster.forecast([window]))
        took.append(clock() - began)
    return 1e3 * median(took[1:])
