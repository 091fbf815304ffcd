"""The models of one state directory, by content id, and the baselines, which need no files."""

import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from barcast.models import (
    LEVELS,
    CheckpointError,
    ConfigError,
    FilteredHistoricalSimulation,
    Forecaster,
    Garch,
    HistoricalSimulation,
    Scaled,
    default_horizons,
)

BASELINES: dict[str, Callable[[str, Sequence[int], Sequence[float]], Forecaster]] = {
    "hs": HistoricalSimulation,
    "fhs": FilteredHistoricalSimulation,
    **{name: partial(Scaled, name) for name in ("ewma", "har", "hs-s", "fhs-s", "ewma-s", "har-s")},
    **{name: partial(Garch, name) for name in ("garch", "garch-s")},
}
"""The forecasters that are not trained, of a timeframe, horizons and levels; -s with a time-of-week factor.

All raise `ConfigError` where they cannot serve: -s on daily bars, GARCH without the package arch.
"""
_ID = re.compile(r"[0-9a-f]{16}")


class ModelStore:
    """Opens models of `directory`; the state is the forecasters that are open already."""

    def __init__(self, directory: Path, timeframe: str) -> None:
        self.directory = directory
        self._timeframe = timeframe
        self._open: dict[tuple[str, str | None, int | None], Forecaster] = {}

    def open(self, model: str, sampler: str | None, steps: int | None) -> Forecaster:
        """The forecaster of a model id or baseline, loaded on first use; another's files are refused."""
        key = (model, sampler, steps)
        if key not in self._open:
            forecaster = open_model(self.path(model), self._timeframe, sampler, steps)
            if model not in BASELINES and forecaster.card.model != model:
                raise CheckpointError(
                    f"{self.path(model)}: holds the model {forecaster.card.model}; copy {model} back, or "
                    "name the folder after the model that it holds"
                )
            self._open[key] = forecaster
        return self._open[key]

    def adopt(self, source: Path) -> str:
        """Copy a checkpoint into the store under its id; return the id. Raise CheckpointError if damaged."""
        from barcast.models.checkpoint import load

        model = load(source).model
        if not (self.directory / model).is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = self.directory / f".{model}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(self.directory / model)
        return model

    def resolve(self, name: str, first: str, champion: str | None) -> str:
        """The id that `model.name` means: a baseline, an id, a directory, or `champion`.

        As long as there is no champion, `first` serves.
        """
        if name == "champion":
            return champion if champion is not None else self._known("first", first)
        return self._known("name", name)

    def _known(self, key: str, name: str) -> str:
        if name in BASELINES or (_ID.fullmatch(name) and (self.directory / name).is_dir()):
            return name
        if Path(name).is_dir():
            return self.adopt(Path(name))
        raise ConfigError(
            f"model.{key}: {name!r} is neither a baseline ({', '.join(BASELINES)}), nor an id in "
            f"{self.directory}, nor a checkpoint directory; train one with `barcast train`"
        )

    def path(self, model: str) -> str:
        """What `open_model` takes for a model id or a baseline."""
        return model if model in BASELINES else str(self.directory / model)


def open_model(name: str, timeframe: str, sampler: str | None, steps: int | None) -> Forecaster:
    """Open a checkpoint directory, or a baseline by its name. Imports torch for a checkpoint only."""
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
