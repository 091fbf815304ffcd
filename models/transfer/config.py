"""How a stress generator is trained, and the TOML file that says so."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from sys import float_info
from typing import Any

from barcast.models.errors import ConfigError

SOLVERS = ("euler", "heun")
MAX_SAMPLES, MAX_POSITIONS = 8192, 256
MOST = {"width": 1024, "code": 1024, "batch": 4096, "ode_steps": 100, "sample_steps": 400}
"""Of whole numbers that memory and time grow with."""
SHOWN = 60
"""Characters of a wrong value that a sentence shows."""


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Settings of a training; raises `ConfigError` for any that cannot be."""

    steps: int = 4000  # of the flow, whose velocity is compared with that of real windows
    energy_steps: int = 24  # thereafter, of whole ways from sources to other regimes
    batch: int = 48
    rate: float = 2e-3  # of learning the flow
    energy_rate: float = 2e-4
    label_drop_prob: float = 0.15  # rows whose velocity is that of no regime in particular
    cfg_scale: float = 2.0  # severity: 0 none, 2 nearly the regime, 3 all of it, above 3 beyond it
    width: int = 32  # of the network
    code: int = 64  # of time and regime
    ode_steps: int = 5  # of a way in training
    sample_steps: int = 8  # of a way in a scenario
    solver: str = "heun"
    use_gradient_checkpointing: bool = True
    max_samples: int = MAX_SAMPLES  # patches on each side of a texture's distance
    max_spatial_samples: int = MAX_POSITIONS  # of a self-similarity
    texture: float = 1.0  # weights of the energies, and of the flow beside them
    content: float = 1.0
    anchor: float = 1.0
    use_velocity_reg: bool = True
    velocity: float = 0.01
    use_divergence_reg: bool = False
    divergence: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            fits = type(value) is kind or (kind is float and type(value) is int)
            said = f"{field.name} = {value!r:.{SHOWN}}"
            if not fits:
                raise ConfigError(f"{said} is no {_KINDS[kind]}: write one")
            if kind is int and not 1 <= value <= MOST.get(field.name, 10**6):
                raise ConfigError(f"{said} cannot be: take 1 to {MOST.get(field.name, 10**6)}")
            if kind is float and not 0 <= value <= float_info.max:
                raise ConfigError(f"{said} cannot be: take a number from 0 on")
        for name in ("rate", "energy_rate"):
            if not getattr(self, name):
                raise ConfigError(f"{name} = 0 learns nothing: take a number above 0")
        if self.solver not in SOLVERS:
            raise ConfigError(f"solver = {self.solver!r} is unknown: choose one of {', '.join(SOLVERS)}")
        if self.label_drop_prob >= 1:
            raise ConfigError(f"label_drop_prob = {self.label_drop_prob} leaves no label: take less than 1")
        if self.width % 8 or self.code % 8:
            raise ConfigError(f"width = {self.width} and code = {self.code}: take multiples of 8")

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "TransferConfig":
        """Settings from plain values, which are from `where`; raise `ConfigError` for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, 1)
                said = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
                raise ConfigError(f"{where}: {name}: unknown key; {said}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "TransferConfig":
        """Read a TOML file; raise `ConfigError` for one that cannot be read or says what cannot be."""
        try:
            values = tomllib.loads(path.read_text("utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}; correct what stands there") from error
        return cls.of(values, str(path))


_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
