"""What a sweep tries: cells of model, sampler, steps and strategy, from a grid or by a search."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from barcast.daemon.pipeline import StrategySettings, try_strategies, typed
from barcast.models import BASELINES, Card, ConfigError, check_sampled, open_model
from barcast.strategies import PATH, identify
from barcast.strategies.params import parameters_of

if TYPE_CHECKING:
    import optuna

SEED = 7
"""Of the search: the same bars and ranges give the same cells."""

BATCH = 10
"""Cells that are asked for before any of them is told: a constant, so that no number of workers matters."""

DIGITS = 4
"""Significant digits of a number that a search finds."""

Value = float | int | str | bool

First = tuple[tuple[str, ...], int]
"""The symbols and the close (nanoseconds) that strategies are tried on: what they are asked about first."""

NOTHING: First = ((), 0)
"""Where no bars are known."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; `whole` ones where the parameter is a whole number."""

    low: float
    high: float
    whole: bool


@dataclass(frozen=True, slots=True)
class Template:
    """A strategy with several values to try of each parameter, as one --strategy says it."""

    kind: str
    params: Mapping[str, tuple[Value, ...] | Range]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Read KIND:PARAMETER=VALUE|VALUE,PARAMETER=LOW..HIGH, see `StrategySettings.parse`.

        A value in quotes is one text. Raise ConfigError as `StrategySettings.parse` does, for a range that is
        empty, and for a `name`: cells are named by what is in them.
        """
        kind, written = StrategySettings.written(text)
        if file := PATH.fullmatch(kind):  # a worker may have another working directory
            kind = kind.replace(file["file"], str(Path(file["file"]).absolute()), 1)
        if "name" in written:
            raise ConfigError(f"strategy {text!r}: a sweep names its cells itself; leave name out")
        params: dict[str, tuple[Value, ...] | Range] = {}
        ends: dict[str, tuple[Value, Value]] = {}
        for param, value in written.items():
            if found := _RANGE.fullmatch(value):
                low, high = (typed(end) for end in found.groups())
                ends[param] = low, high
            else:
                one = _QUOTED.fullmatch(value)
                params[param] = tuple(dict.fromkeys(map(typed, [value] if one else value.split("|"))))
        first = {param: values[0] for param, values in params.items() if isinstance(values, tuple)}
        for param, (low, high) in ends.items():
            lowest = {other: pair[0] for other, pair in ends.items()}
            built = [
                StrategySettings.of(kind, None, first | lowest | {param: end}).build() for end in (low, high)
            ]
            least, most = (getattr(one, param) for one in built)
            if not (isinstance(most, int | float) and isfinite(most) and least < most):
                raise ConfigError(f"strategy {text!r}: {param} from {low} to {high} is no range of numbers")
            params[param] = Range(least, most, isinstance(least, int))
        return cls(kind, {param: params[param] for param in written})

    @property
    def ranges(self) -> list[str]:
        """The parameters that a search has to find."""
        return [param for param, values in self.params.items() if isinstance(values, Range)]

    def probes(self) -> Iterator[dict[str, Value]]:
        """Each alternative and each end of a range once, the other parameters being as they are first."""
        values = {
            param: found if isinstance(found, tuple) else (found.low, found.high)
            for param, found in self.params.items()
        }
        first = {param: found[0] for param, found in values.items()}
        yield first
        for param, found in values.items():
            yield from (first | {param: value} for value in found[1:])

    def every(self) -> Iterator[dict[str, Value]]:
        """The parameters of each combination of the alternatives."""
        choices = [values for values in self.params.values() if isinstance(values, tuple)]
        for values in product(*choices):
            yield dict(zip(self.params, values, strict=True))


@dataclass(frozen=True, slots=True)
class Variant:
    """What makes forecasts: a model by name, with the sampler and steps that are asked of it."""

    model: str
    sampler: str | None
    steps: int | None
    card: Card

    def there(self) -> "Variant":
        """The same for a worker, whose working directory may be another one."""
        return self if self.model in BASELINES else replace(self, model=str(Path(self.model).absolute()))


@dataclass(frozen=True, slots=True)
class Cell:
    """A strategy on the forecasts of a variant.

    `said` is the strategy in words; the settings' name is made of the kind and a digest of all parameters, so
    that neither depends on what else is tried. `strategy_id` tells that strategy from others, wherever its
    file is. `known` is the number of the fold after which the cell was asked for, 0 in a grid.
    """

    variant: Variant
    strategy: StrategySettings
    said: str
    strategy_id: str
    known: int = 0

    @classmethod
    def of(cls, variant: Variant, kind: str, params: Mapping[str, Value], first: First = NOTHING) -> "Cell":
        """Raise ConfigError for parameters, horizons or levels that there are not, or where a trial fails."""
        own, digest = identify(kind)
        built = StrategySettings.of(kind, None, params).build()
        values = parameters_of(built)
        strategy_id = digest_of({"kind": own, "file": digest, "params": values})
        settings = StrategySettings.of(kind, f"{own[:19]}-{strategy_id[:12]}", params)
        try:
            try_strategies([settings.build()], variant.card, *first)
        except ConfigError as error:
            raise ConfigError(spelt(str(error), settings)) from error
        return cls(variant, settings, in_words(settings), strategy_id)

    @property
    def id(self) -> tuple[str, str | None, int | None, str]:
        """Model, sampler, steps and strategy: no two cells of a sweep share all of them."""
        return self.variant.model, self.variant.sampler, self.variant.steps, self.strategy.name


def in_words(settings: StrategySettings) -> str:
    """A strategy by its kind and the parameters that it was given."""
    own, _ = identify(settings.kind)
    return " ".join([own, *(f"{name}={value}" for name, value in settings.params.items())])


def spelt(text: str, settings: StrategySettings) -> str:
    """What is said of a cell, with its strategy in words instead of the name with a digest."""
    return text.replace(f"strategy {settings.name}", f"strategy {in_words(settings)}")


def digest_of(value: object) -> str:
    """The SHA-256, in hex, of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def variants(
    models: Sequence[str], samplers: Sequence[str], steps: Sequence[int], timeframe: str
) -> list[Variant]:
    """Each model with each sampler and number of steps; models that are not sampled once.

    Raise as `open_model` does, and ConfigError for samplers or steps of which no model makes use.
    """
    found, refused = [], None
    for model in dict.fromkeys(models):
        for sampler, count in product(dict.fromkeys(samplers) or [None], dict.fromkeys(steps) or [None]):
            card = open_model(model, timeframe, sampler, count).card
            try:
                check_sampled(model, card, sampler, count)
            except ConfigError as error:
                refused = error
                found.append(Variant(model, None, None, open_model(model, timeframe, None, None).card))
                break
            found.append(Variant(model, sampler, count, card))
    if refused and all(variant.sampler is None and variant.steps is None for variant in found):
        raise refused
    return found


def grid(over: Sequence[Variant], templates: Sequence[Template], first: First = NOTHING) -> list[Cell]:
    """Every strategy on every variant, each once. Raise ConfigError for a range, and as `Cell.of` does."""
    for template in templates:
        for param in template.ranges:
            raise ConfigError(
                f"strategy {template.kind}: {param} has a range, which only a search can try: give --trials "
                f"N, or alternatives such as {param}=1|2"
            )
    found: dict[object, Cell] = {}
    for variant in over:
        for template in templates:
            for params in template.every():
                cell = Cell.of(variant, template.kind, params, first)
                found.setdefault(cell.id, cell)
    return list(found.values())


class Search:
    """Asks for cells in ranges, by the tree-structured Parzen estimator of Optuna with a fixed seed.

    The state is what was asked for: the parameters of each trial, their distributions, and its cell. What is
    asked next follows from that and from what the cells are said to be worth then, from nothing else.
    """

    def __init__(
        self, over: Sequence[Variant], templates: Sequence[Template], first: First = NOTHING
    ) -> None:
        """Raise ConfigError without a range, without Optuna, and as `Cell.of` does for what may be asked."""
        if not any(template.ranges for template in templates):
            raise ConfigError(
                "--trials searches ranges: give one, such as --strategy quantile-band:band=0.01..0.3"
            )
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("--trials needs Optuna: pip install 'barcast[sweep]'") from error
        for variant in over:
            for template in templates:
                for params in template.probes():
                    Cell.of(variant, template.kind, params, first)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._over, self._templates, self._first = optuna, over, templates, first
        self._asked: list[tuple[dict[str, Any], dict[str, Any], Cell]] = []

    def ask(self, count: int, known: int, worth: Mapping[object, float | None]) -> list[Cell]:
        """The next cells, up to `count`, to be tried after so many folds; fewer where some were asked before.

        `worth` says by `Cell.id` how good each was that was asked for, more is better; None counts as the
        worst.
        """
        optuna = self._optuna
        least = min((value for value in worth.values() if value is not None), default=0.0)
        sampler = optuna.samplers.TPESampler(seed=SEED + len(self._asked))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for params, distributions, cell in self._asked:
            value = worth[cell.id]
            told = optuna.trial.create_trial(
                params=params, distributions=distributions, value=least if value is None else value
            )
            study.add_trial(told)
        fresh: dict[object, Cell] = {}
        for trial in [study.ask() for _ in range(count)]:
            cell = replace(self._cell(trial), known=known)
            if cell.id not in worth:
                fresh.setdefault(cell.id, cell)
            self._asked.append((trial.params, trial.distributions, cell))
        return list(fresh.values())

    def _cell(self, trial: "optuna.Trial") -> Cell:
        k = trial.suggest_categorical("variant", range(len(self._over)))
        n = trial.suggest_categorical("strategy", range(len(self._templates)))
        template, params = self._templates[n], {}
        for param, values in template.params.items():
            name = f"{n}.{param}"
            if isinstance(values, tuple):
                params[param] = values[trial.suggest_categorical(name, range(len(values)))]
            elif values.whole:
                params[param] = trial.suggest_int(name, int(values.low), int(values.high))
            else:
                found = float(f"{trial.suggest_float(name, values.low, values.high):.{DIGITS}g}")
                params[param] = min(max(found, values.low), values.high)
        return Cell.of(self._over[k], template.kind, params, self._first)
