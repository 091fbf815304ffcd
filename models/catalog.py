"""Every forecaster by its name: the baselines, which need no files, and the directories of trained models."""

from collections.abc import Callable, Sequence
from pathlib import Path

from barcast.models.baselines import FilteredHistoricalSimulation, HistoricalSimulation
from barcast.models.errors import ConfigError
from barcast.models.forecast import LEVELS, Forecaster, default_horizons

BASELINES: dict[str, Callable[[str, Sequence[int], Sequence[float]], Forecaster]] = {
    "hs": HistoricalSimulation,
    "fhs": FilteredHistoricalSimulation,
}
"""The forecasters that are not trained, made of timeframe, horizons and levels."""


def open_model(name: str, timeframe: str, sampler: str | None, steps: int | None) -> Forecaster:
    """Open a checkpoint directory, or a baseline by its name. Imports torch for a checkpoint only.

    Sampler and steps are for models that are sampled; the others have none.
    """
    if name in BASELINES:
        return BASELINES[name](timeframe, default_horizons(timeframe), LEVELS)
    from barcast.models.checkpoint import open_forecaster

    forecaster = open_forecaster(Path(name), sampler, steps)
    if forecaster.card.timeframe != timeframe:
        raise ConfigError(
            f"{name}: the model was trained on {forecaster.card.timeframe!r} bars, not on {timeframe!r}; "
            "name another model or train one"
        )
    return forecaster
