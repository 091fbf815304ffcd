"""Settings of an `SSSDModel`, under the paths of the published ones, as far as something reads them.

All of them are frozen, and checked where they are made: a fault is a `ConfigError` that names path, value and
remedy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from math import isfinite
from typing import Any, TypeVar

from barcast.models.errors import ConfigError
from barcast.models.optimiser import PRECISIONS
from barcast.models.sssd.layers import CHOICES


@dataclass(frozen=True, slots=True)
class S4Config:
    """The state-space layers of each timeframe."""

    state_dim: int = 128  # channels, of eight pairs of poles each
    n_layers: int = 4

    def __post_init__(self) -> None:
        _whole("model.s4.state_dim", self.state_dim, 4)
        _whole("model.s4.n_layers", self.n_layers)
        if self.state_dim % 4:
            raise ConfigError(
                f"model.s4.state_dim = {self.state_dim} is not possible: give a multiple of 4, the heads of "
                "the attention that joins the timeframes"
            )


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What is seen: a sequence of features of each timeframe."""

    timeframes: tuple[str, ...] = ("5m", "15m", "1h", "4h")
    feature_dim: int = 200
    context_dim: int = 512

    def __post_init__(self) -> None:
        _listed("model.encoder.timeframes", self.timeframes)
        for name in self.timeframes:
            if not isinstance(name, str) or not name.isalnum() or self.timeframes.count(name) > 1:
                raise ConfigError(
                    f"model.encoder.timeframes has {name!r}: write names such as '5m', each once"
                )
        _whole("model.encoder.feature_dim", self.feature_dim)
        _whole("model.encoder.context_dim", self.context_dim)


@dataclass(frozen=True, slots=True)
class DiffusionConfig:
    """What the model is trained for: one schedule and one prediction type, which sampling keeps to."""

    steps_train: int = 1000
    steps_inference: int = 20
    schedule: str = "cosine"
    prediction_type: str = "v_prediction"

    def __post_init__(self) -> None:
        only = {"steps_train": 1000, "schedule": "cosine", "prediction_type": "v_prediction"}
        for name, value in only.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"model.diffusion.{name} = {getattr(self, name)!r} is not what this model trains and "
                    f"samples with: write {value!r}"
                )
        _whole("model.diffusion.steps_inference", self.steps_inference, 2)


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """The denoiser."""

    type: str = "mlp"
    latent_dim: int = 256  # width of its layers

    def __post_init__(self) -> None:
        _one_of("model.head.type", self.type, CHOICES["head"])
        _whole("model.head.latent_dim", self.latent_dim, 4)


@dataclass(frozen=True, slots=True)
class HorizonConfig:
    """The horizons of a forecast in minutes, and how much each weighs in the loss."""

    minutes: tuple[int, ...] = (5, 15, 60, 240)
    weights: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
    embedding_dim: int = 128

    def __post_init__(self) -> None:
        _whole("model.horizons.embedding_dim", self.embedding_dim)
        _listed("model.horizons.minutes", self.minutes)
        _listed("model.horizons.weights", self.weights)
        for m in self.minutes:
            _whole("model.horizons.minutes", m)
        for w in self.weights:
            _number("model.horizons.weights", w)
        if any(a >= b for a, b in pairwise(self.minutes)):
            raise ConfigError(f"model.horizons.minutes = {self.minutes} do not rise: sort them, each once")
        if len(self.weights) != len(self.minutes):
            raise ConfigError(
                f"model.horizons.weights has {len(self.weights)} numbers for {len(self.minutes)} horizons: "
                "give one for each"
            )

    def indices(self, minutes: Sequence[int]) -> list[int]:
        """Where these minutes stand among the horizons; raise `ConfigError` for others."""
        for m in minutes:
            if m not in self.minutes:
                raise ConfigError(f"a horizon of {m} minutes is unknown: choose from {_list(self.minutes)}")
        return [self.minutes.index(m) for m in minutes]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The network."""

    s4: S4Config = field(default_factory=S4Config)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    horizons: HorizonConfig = field(default_factory=HorizonConfig)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How `fit` trains: AdamW, a warm-up and a cosine, averaged weights."""

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    gradient_accumulation_steps: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        _whole("training.steps", self.steps)
        _whole("training.batch_size", self.batch_size)
        _whole("training.gradient_accumulation_steps", self.gradient_accumulation_steps)
        _number("training.learning_rate", self.learning_rate)
        _one_of("training.precision", self.precision, PRECISIONS)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """How many closed bars of each timeframe a sequence has."""

    lookback_bars: Mapping[str, int] = field(
        default_factory=lambda: {"5m": 500, "15m": 166, "1h": 41, "4h": 10}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.lookback_bars, Mapping):
            raise ConfigError(f"data.lookback_bars = {self.lookback_bars!r} is no table: give '5m': 500 …")
        for timeframe, bars in self.lookback_bars.items():
            _whole(f"data.lookback_bars.{timeframe}", bars)


@dataclass(frozen=True, slots=True)
class SystemConfig:
    """Where the numbers come from: weights, noise and batches are functions of the seed."""

    seed: int = 42

    def __post_init__(self) -> None:
        _whole("system.seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class SSSDConfig:
    """Everything that the model, its training and its windows read."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        wanted, given = set(self.model.encoder.timeframes), set(self.data.lookback_bars)
        if wanted != given:
            raise ConfigError(
                f"data.lookback_bars is of {_list(sorted(given))}, model.encoder.timeframes are "
                f"{_list(sorted(wanted))}: give the bars of each"
            )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain tables, of which `from_dict` makes it again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> "SSSDConfig":
        """The settings that tables such as those of a file say, the others as they are by default.

        Raises `ConfigError` for what is unknown or impossible.
        """
        return _read(cls, tables, "")


T = TypeVar("T")


def _read(kind: type[T], tables: Any, path: str) -> T:
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{path or 'the configuration'} = {tables!r} is no table: give its keys")
    known = {f.name: f.default_factory for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in tables.items():
        here = f"{path}.{name}" if path else str(name)
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            raise ConfigError(
                f"{here} is unknown and nothing would read it: "
                + (f"{near[0]!r} may be meant" if near else f"there are {_list(sorted(known))}")
            )
        part: Any = known[name]
        if isinstance(part, type) and is_dataclass(part):
            values[name] = _read(part, value, here)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _list(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"


def _whole(path: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{path} = {value!r} is not possible: give a whole number of at least {least}")


def _number(path: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value <= 0:
        raise ConfigError(f"{path} = {value!r} is not possible: give a number above 0")


def _one_of(path: str, value: Any, choices: Any) -> None:
    if value not in tuple(choices):
        raise ConfigError(f"{path} = {value!r} is unknown: choose one of {_list(choices)}")


def _listed(path: str, values: Any) -> None:
    if not isinstance(values, tuple) or not values:
        raise ConfigError(f"{path} = {values!r} is not possible: give a tuple with at least one entry")
