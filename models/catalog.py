"""Every forecaster by its name: the baselines, which need no files, and the directories of trained models."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from barcast.models.baselines import FilteredHistoricalSimulation, HistoricalSimulation
from barcast.models.errors import ConfigError
from barcast.models.fitted import Scaled
from barcast.models.forecast import LEVELS, Card, Forecaster, default_horizons
from barcast.models.garch import Garch

BASELINES: dict[str, Callable[[str, Sequence[int], Sequence[float]], Forecaster]] = {
    "hs": HistoricalSimulation,
    "fhs": FilteredHistoricalSimulation,
    **{name: partial(Scaled, name) for name in ("ewma", "har", "hs-s", "fhs-s", "ewma-s", "har-s")},
    **{name: partial(Garch, name) for name in ("garch", "garch-s")},
}
"""The forecasters that are not trained, of a timeframe, horizons and levels; -s with a time-of-week factor.

All raise `ConfigError` where they cannot serve: -s on daily bars, GARCH without the package arch.
"""


def open_model(
    name: str, timeframe: str, sampler: str | None, steps: int | None, paths: bool = False
) -> Forecaster:
    """Open a checkpoint directory, or a baseline by its name. Imports torch for a checkpoint only.

    Sampler and steps are for models that are sampled; the others have none, see `check_sampled`. With `paths`
    forecasts carry them; raises `ConfigError` for a model that knows none.
    """
    if name in BASELINES:
        if paths:
            raise ConfigError(f"{name} is a baseline, without paths or touches: name an SSSD for these")
        return BASELINES[name](timeframe, default_horizons(timeframe), LEVELS)
    from barcast.models.checkpoint import open_forecaster

    forecaster = open_forecaster(Path(name), sampler, steps, paths)
    if forecaster.card.timeframe != timeframe:
        raise ConfigError(
            f"{name}: the model was trained on {forecaster.card.timeframe!r} bars, not on {timeframe!r}; "
            "name another model or train one"
        )
    return forecaster


def check_sampled(name: str, card: Card, sampler: str | None, steps: int | None) -> None:
    """Raise `ConfigError` where a sampler or steps are asked of a model that is not sampled."""
    if card.sampler == "none" and (sampler is not None or steps is not None):
        raise ConfigError(
            f"{name} is not sampled: leave sampler and steps out, or name a diffusion model, or an ensemble "
            "with one"
        )
