"""What training yields: a model, and the record of how it came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from barcast.models.calibration import Calibrated
from barcast.models.catalog import SAMPLER, STEPS
from barcast.models.diffusion import SSSDForecaster
from barcast.models.errors import ConfigError
from barcast.models.forecast import Forecaster
from barcast.models.paths import path_steps
from barcast.models.scaling import Scaling
from barcast.models.sssd.network import SSSD

MOST_LEVELS, MOST_HORIZONS, FARTHEST = 1_000, 100, 50_000
"""Levels and horizons of a model, and bars that a horizon is ahead, at most."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A state of the network that was judged: the end of an epoch, and both losses there."""

    phase: str  # "map" or "denoiser"
    step: int
    crps: float  # of forecasts in full on what was not learnt from, the mean of all members, normalised; of
    # the denoiser the energy score, which is the CRPS of a whole path
    loss: float | None = None  # the fast loss, averaged over the steps since the look before


@dataclass(frozen=True, slots=True)
class Past:
    """What a model of any kind has learnt from. Times are nanoseconds since 1970 UTC."""

    data: str  # sha256 of the bars that were used
    symbols: tuple[str, ...]
    left_out: tuple[str, ...]  # symbols that are too short, or stand still, in the training part
    bars: int
    origins: int  # of the training part
    until: int  # no later bar was seen
    train_end: int  # learning ends, validation begins
    validation_end: int  # validation, if any, ends; what follows up to `until` was held out for the gate
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Record(Past):
    """How an SSSD came about."""

    seed: int
    capped: bool  # the cap on seconds ended a phase early: not reproducible
    init_from: str | None  # id of the model from which training started
    candidates: tuple[Candidate, ...]
    map_step: tuple[int, ...]  # of each member, chosen on the block that it has not learnt from
    denoiser_step: int  # chosen on the newest block; with 0 the steps of a path have a Gaussian copula
    precision: str = "fp32"  # of the losses' arithmetic
    processes: int = 1  # that shared each batch
    accumulate: int = 1  # parts of a batch in each process
    stopped: tuple[str, ...] = ()  # phases that ended early, as no look was better any more
    steps: int = 0  # that each phase was to take at most; 0 where an older record does not say
    rate: float | None = None  # of learning in the phase of the diffusion, where it was given


class Model(Protocol):
    """A trained model of any kind."""

    @property
    def record(self) -> Past:
        """What it has learnt from."""
        ...

    def forecaster(self, model: str, sampler: str | None, steps: int | None, paths: bool) -> Forecaster:
        """A forecaster of this model under an id; sampler and steps are for models that are sampled.

        With `paths` its forecasts carry paths; raises `ConfigError` for a model that knows none.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A network, the scaling of its inputs and outputs, the levels it was judged by, and its history."""

    net: SSSD
    scaling: Scaling
    levels: tuple[float, ...]
    record: Record

    @property
    def path(self) -> tuple[int, ...]:
        """The steps of its paths, in bars ahead."""
        return path_steps(self.scaling.horizons)

    def forecaster(
        self, model: str, sampler: str | None = None, steps: int | None = None, paths: bool = False
    ) -> Calibrated:
        """A calibrated forecaster, see `raw` and `Model.forecaster`."""
        raw = self.raw(model, sampler, steps, paths)
        return Calibrated(raw, self.scaling.layout.calibration, couple=raw if paths else None)

    def raw(
        self, model: str, sampler: str | None = None, steps: int | None = None, paths: bool = False
    ) -> SSSDForecaster:
        """A forecaster that is not calibrated; default sampler and steps where None is given.

        By default the quantiles are those of the map, of which nothing is sampled, and the paths those of the
        diffusion model if training found that it adds to a Gaussian copula. Raise `ConfigError` for an
        unknown sampler or number of steps.
        """
        quantiles = STEPS if sampler else 0
        coupling = STEPS if sampler or self.record.denoiser_step else 0
        if steps is not None:
            quantiles = coupling = steps
        of = self.net, self.scaling, self.levels, model, sampler or SAMPLER
        return SSSDForecaster(*of, quantiles, coupling if paths else 0)


def check_paths(model: str, paths: bool) -> None:
    """Raise `ConfigError` where paths are asked of a model that knows none."""
    if paths:
        raise ConfigError(
            f"model {model} forecasts each horizon alone, not the path to it: name an SSSD or LDM4TS, or "
            "leave out what needs paths, such as touch"
        )


def check_outputs(horizons: Sequence[int], levels: Sequence[float]) -> None:
    """Raise `ConfigError` for horizons or levels that no model can forecast."""
    if len(horizons) > MOST_HORIZONS or len(levels) > MOST_LEVELS:
        raise ConfigError(
            f"{len(horizons)} horizons and {len(levels)} levels cannot be used: give at most {MOST_HORIZONS} "
            f"and {MOST_LEVELS}"
        )
    if not horizons or list(horizons) != sorted({h for h in horizons if 0 < h <= FARTHEST}):
        raise ConfigError(
            f"horizons {tuple(horizons)} cannot be used: give rising counts of bars, at most {FARTHEST}"
        )
    if len(levels) < 2 or list(levels) != sorted({p for p in levels if 0 < p < 1}):
        raise ConfigError(
            f"levels {tuple(levels)} cannot be used: give two or more rising probabilities between 0 and 1"
        )
