"""The models of one state directory, by content id."""

import os
import re
import shutil
from pathlib import Path

from barcast.daemon.room import flush, make, room
from barcast.models import BASELINES, CheckpointError, ConfigError, Forecaster, open_model

_ID = re.compile(r"[0-9a-f]{16}")


class ModelStore:
    """Opens models of `directory`; the state is the forecaster that was opened last.

    A forecaster grows with the symbols that it has seen: one that serves no more is not kept.
    """

    def __init__(self, directory: Path, timeframe: str) -> None:
        self.directory = directory
        self._timeframe = timeframe
        self._last: tuple[tuple[str, str | None, int | None, bool], Forecaster] | None = None

    def open(self, model: str, sampler: str | None, steps: int | None, paths: bool = False) -> Forecaster:
        """The forecaster of a model id or baseline: the last one, or loaded; another's files are refused."""
        key, last = (model, sampler, steps, paths), self._last  # two threads may open at once
        if last is not None and last[0] == key:
            return last[1]
        forecaster = open_model(self.path(model), self._timeframe, sampler, steps, paths)
        if model not in BASELINES and forecaster.card.model != model:
            raise CheckpointError(
                f"{self.path(model)}: holds the model {forecaster.card.model}; copy {model} back, or "
                "name the folder after the model that it holds"
            )
        self._last = key, forecaster
        return forecaster

    def adopt(self, source: Path) -> str:
        """Copy a checkpoint into the store under its id; return the id. Raise CheckpointError if damaged.

        The copy is on the disk then, whatever becomes of the power: its source may be removed.
        """
        from barcast.models.checkpoint import load

        model = load(source).model
        if not self.hold(model):
            partial = self.directory / f".{model}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with room(self.directory):
                    make(self.directory)
                    for file in sorted(path for path in source.rglob("*") if path.is_file()):
                        target = partial / file.relative_to(source)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, target)
                        flush(target)
                    for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
                        flush(folder)
                    partial.rename(self.directory / model)
            finally:  # half a copy takes room
                shutil.rmtree(partial, ignore_errors=True)
        with room(self.directory):
            flush(self.directory)
        return model

    def hold(self, model: str) -> bool:
        """Say whether the store has a model that is about to serve, and let no compaction take it until then.

        One spares the folders that were changed lately.
        """
        if not self.has(model):
            return False
        if model not in BASELINES:
            try:
                os.utime(self.directory / model)
            except FileNotFoundError:  # it was just taken
                return False
            except PermissionError:  # another user's: we could not remove it, either
                pass
        return True

    def has(self, model: str) -> bool:
        """Whether it is a baseline, or an id of the store."""
        return model in BASELINES or (_ID.fullmatch(model) is not None and (self.directory / model).is_dir())

    def known_until(self, model: str) -> int:
        """The newest close that a model of the store knew at its training, in nanoseconds; baselines: 0."""
        if model in BASELINES:
            return 0
        from barcast.models.checkpoint import load

        return load(self.directory / model).trained.record.until

    def resolve(self, name: str, first: str, champion: str | None) -> str:
        """The id that `model.name` means: a baseline, an id, a directory, or `champion`.

        As long as there is no champion, `first` serves.
        """
        if name == "champion":
            return champion if champion is not None else self._known("first", first)
        return self._known("name", name)

    def _known(self, key: str, name: str) -> str:
        if self.has(name):
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
