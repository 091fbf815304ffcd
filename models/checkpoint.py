"""Models on disk: a directory with `model.json` and `weights.safetensors`, named by the hash of both."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from barcast.models import samplers
from barcast.models.diffusion import SAMPLER, STEPS, SSSDForecaster
from barcast.models.errors import BarcastError, CheckpointError
from barcast.models.scaling import CHANNELS, Scaling, feature_names
from barcast.models.sssd import SSSD, Architecture
from barcast.models.trained import Record, Trained, check_outputs

FORMAT = 1
JSON, WEIGHTS = "model.json", "weights.safetensors"
STATISTICS = ("factor", "volume", "har", "gain", "mean", "std")  # the arrays of a Scaling
DIVISORS = ("factor", "gain", "std")  # those that must be above zero


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model read from disk, and its id: 16 hex digits that depend on every byte of it."""

    model: str
    trained: Trained

    def forecaster(self, sampler: str = SAMPLER, steps: int = STEPS) -> SSSDForecaster:
        """A forecaster of this model; raises `ConfigError` for an unknown sampler or number of steps."""
        t = self.trained
        return SSSDForecaster(t.net, t.scaling, t.levels, self.model, sampler, steps)


def check_target(directory: Path) -> Path:
    """The absolute path of a directory that `save` may write; raises `CheckpointError` for any other."""
    directory = directory.absolute()
    foreign = directory.is_dir() and any(directory.iterdir()) and not (directory / JSON).is_file()
    if foreign or (directory.exists() and not directory.is_dir()):
        raise CheckpointError(f"{directory}: holds something else than a model; name a new directory")
    return directory


def save(trained: Trained, directory: Path) -> str:
    """Write a model into a directory, which is created, or replaced as a whole if it holds a model.

    Returns the model's id; raises `CheckpointError` rather than replace anything else.
    """
    directory = check_target(directory)
    weights = save_tensors({k: v.contiguous() for k, v in trained.net.state_dict().items()})
    body = _body(trained)
    model = _identity(body, weights)
    fresh = directory.with_name(f".{directory.name}.{model}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    _write(fresh / WEIGHTS, weights)
    _write(fresh / JSON, json.dumps({"id": model, **body}, indent=1, allow_nan=False).encode() + b"\n")
    if directory.exists():
        old = directory.with_name(f".{directory.name}.{model}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        fresh.rename(directory)
        shutil.rmtree(old)
    else:
        fresh.rename(directory)
    return model


def load(directory: Path) -> Checkpoint:
    """Read a model; raises `CheckpointError` for one that is incomplete, damaged, foreign or newer."""
    path = directory / JSON
    body = _json(path)
    for field, mine, remedy in (
        ("format", FORMAT, "use the version of barcast that wrote it, or train again"),
        ("kind", "sssd", "point to a model that `barcast train` wrote"),
        ("schedule", [samplers.SCHEDULE, samplers.TIMESTEPS], "train again: it cannot be sampled by another"),
        ("prediction", samplers.PREDICTION, "train again: it cannot be sampled as another"),
    ):
        if body.get(field) != mine:
            raise CheckpointError(f"{path}: {field} is {body.get(field)!r}, not {mine!r}; {remedy}")
    weights = _read(directory / WEIGHTS)
    claimed = body.pop("id", None)
    if claimed != (found := _identity(body, weights)):
        raise CheckpointError(
            f"{path}: id {claimed!r} does not fit the contents of {JSON} and {WEIGHTS}, which is {found!r}; "
            "copy the directory again"
        )
    trained = _trained(path, body)
    _fill(trained.net, weights, directory / WEIGHTS)
    return Checkpoint(str(claimed), trained)


def open_forecaster(directory: Path, sampler: str | None = None, steps: int | None = None) -> SSSDForecaster:
    """The forecaster of the model in a directory, with the default sampler and steps where None is given."""
    return load(directory).forecaster(sampler or SAMPLER, STEPS if steps is None else steps)


def _body(trained: Trained) -> dict[str, Any]:
    s = trained.scaling
    return {
        "format": FORMAT,
        "kind": "sssd",
        "timeframe": s.timeframe,
        "horizons": list(s.horizons),
        "levels": list(trained.levels),
        "window": s.window,
        "schedule": [samplers.SCHEDULE, samplers.TIMESTEPS],
        "prediction": samplers.PREDICTION,
        "architecture": asdict(trained.net.architecture),
        "features": feature_names(s.timeframe, s.horizons),
        "scaling": {name: getattr(s, name).tolist() for name in STATISTICS},
        "record": asdict(trained.record),
    }


def _identity(body: Mapping[str, Any], weights: bytes) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode() + b"\0" + weights).hexdigest()[:16]


def _trained(path: Path, body: dict[str, Any]) -> Trained:
    """The model without its weights. The hash was right, so what fails here is a foreign or a newer file."""
    try:
        horizons = msgspec.convert(body["horizons"], tuple[int, ...])
        levels = msgspec.convert(body["levels"], tuple[float, ...])
        check_outputs(horizons, levels)
        statistics = {name: np.array(body["scaling"][name], np.float64) for name in STATISTICS}
        scaling = Scaling(body["timeframe"], horizons, **statistics)
        record = msgspec.convert(body["record"], Record)
        architecture = Architecture(**body["architecture"])
        for name, size in asdict(architecture).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"architecture.{name} is {size!r}, not a whole number above 0")
        names = feature_names(scaling.timeframe, horizons)
        net = SSSD(architecture, torch.Generator().manual_seed(0))
    except KeyError as e:
        raise CheckpointError(f"{path}: {e.args[0]} is missing; train again with this version") from e
    except (TypeError, ValueError, RuntimeError, msgspec.ValidationError, BarcastError) as e:
        raise CheckpointError(f"{path}: {e}; train again with this version") from e
    slots, H, F = scaling.layout.slots, len(horizons), len(names)
    shapes = {"factor": (slots,), "volume": (slots,), "gain": (H, slots), "mean": (F,), "std": (F,)}
    shapes["har"] = (H, len(scaling.layout.har))
    for field, found, mine in (
        ("window", body.get("window"), scaling.window),
        ("features", body.get("features"), names),
        ("architecture.features", architecture.features, F),
        ("architecture.horizons", architecture.horizons, H),
        ("architecture.context", architecture.context, scaling.layout.context),
        ("architecture.channels", architecture.channels, CHANNELS),
        *((f"scaling.{name}", statistics[name].shape, shape) for name, shape in shapes.items()),
    ):
        if found != mine:
            raise CheckpointError(f"{path}: {field} is {found}, not {mine}; train again with this version")
    for name, array in statistics.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: scaling.{name} holds a number that is not finite; train again")
        if name in DIVISORS and array.min() <= 0:
            raise CheckpointError(f"{path}: scaling.{name} holds {array.min()}, not above 0; train again")
    return Trained(net=net, scaling=scaling, levels=levels, record=record)


def _fill(net: SSSD, weights: bytes, path: Path) -> None:
    try:
        tensors = load_tensors(weights)
    except SafetensorError as e:
        raise CheckpointError(f"{path}: not a safetensors file ({e}); copy the directory again") from e
    own = net.state_dict()
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())[0]
        raise CheckpointError(f"{path}: tensor {odd} is missing or unknown; train again with this version")
    for name, mine in own.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (mine.shape, mine.dtype):
            got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, mine))
            raise CheckpointError(f"{path}: {name} is {got}, not {want}; train again with this version")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds a number that is not finite; train again")
    net.load_state_dict(tensors, strict=True)
    net.eval()


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(_read(path))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({e}); copy the directory again") from e
    if not isinstance(body, dict):
        raise CheckpointError(
            f"{path}: holds a {type(body).__name__}, not an object; copy the directory again"
        )
    return body


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}); check the path of the model") from e


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
