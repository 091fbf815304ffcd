"""Models on disk: a directory with `model.json` and `weights.safetensors`, named by the hash of both.

An ensemble has no weights file: its trained members are directories in `members/`, whose names are their ids.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from barcast.models import samplers
from barcast.models.catalog import BASELINES, FORMAT, JSON, TRANSFER, check_named, header, read
from barcast.models.ensemble import Ensemble, Member
from barcast.models.errors import BarcastError, CheckpointError, ConfigError
from barcast.models.forecast import Forecaster
from barcast.models.gbm import Boosted, Trees, TreesRecord
from barcast.models.ldm4ts.autoencoder import installed
from barcast.models.ldm4ts.language import Language, digest_of, open_language, required
from barcast.models.ldm4ts.network import LDM4TS, PARTS, LatentArchitecture
from barcast.models.ldm4ts.trained import LatentRecord, LatentTrained
from barcast.models.paths import path_steps
from barcast.models.scaling import CHANNELS, Scaling, feature_names
from barcast.models.season import ZONES
from barcast.models.sssd.layers import PRESET, Architecture
from barcast.models.sssd.network import SSSD
from barcast.models.trained import Model, Past, Record, Trained, check_outputs

WEIGHTS, MEMBERS = "weights.safetensors", "members"
MOST_WEIGHTS = 2_000_000_000
"""Bytes of weights that are read into memory, at most; the largest preset has some millions."""
AGAIN = "train again with this version"
UNSAMPLED = "train again: it cannot be sampled by another"
SCHEDULED = {"schedule": [samplers.SCHEDULE, samplers.TIMESTEPS], "prediction": samplers.PREDICTION}
"""The noise that a diffusion model has learnt from."""
STATISTICS = ("factor", "volume", "har", "gain", "mean", "std")  # the arrays of a Scaling
DIVISORS = ("factor", "gain", "std")  # those that must be above zero


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model read from disk, and its id: 16 hex digits that depend on every byte of it."""

    model: str
    trained: Model

    def forecaster(
        self, sampler: str | None = None, steps: int | None = None, paths: bool = False
    ) -> Forecaster:
        """A forecaster of this model, see `Model.forecaster`.

        Raise `ConfigError` for an unknown sampler or number of steps, and for paths that it does not know.
        """
        return self.trained.forecaster(self.model, sampler, steps, paths)


def check_target(directory: Path) -> Path:
    """The absolute path of a directory that `save` may write; raises `CheckpointError` for any other."""
    directory = directory.absolute()
    foreign = directory.is_dir() and any(directory.iterdir()) and not (directory / JSON).is_file()
    if foreign or (directory.exists() and not directory.is_dir()):
        raise CheckpointError(f"{directory}: holds something else than a model; name a new directory")
    return directory


def save(trained: Model, directory: Path) -> str:
    """Write a model into a directory, which is created, or replaced as a whole if it holds a model.

    Returns the model's id; raises `CheckpointError` rather than replace anything else.
    """
    model, files = _files(trained)
    write(directory, model, files)
    return model


def write(directory: Path, model: str, files: Mapping[str, bytes]) -> None:
    """Write the files of a model as `save` does, by their path in the directory."""
    directory = check_target(directory)
    fresh = directory.with_name(f".{directory.name}.{model}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for name, content in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            _write(fresh / name, content)
    except OSError:  # such as a full disk: what is there of it would only take room
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if directory.exists():
        old = directory.with_name(f".{directory.name}.{model}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        fresh.rename(directory)
        shutil.rmtree(old)
    else:
        fresh.rename(directory)


def load(directory: Path) -> Checkpoint:
    """Read a model; raises `CheckpointError` for one that is incomplete, damaged, foreign or newer."""
    path, body = directory / JSON, header(directory)
    kind = next((kind for kind in KINDS if kind.name == body.get("kind")), None)
    if body.get("kind") == TRANSFER:
        raise CheckpointError(
            f"{path}: is a stress generator, which makes scenarios up and forecasts nothing; point to a "
            "model that `barcast train` wrote"
        )
    if kind is None:
        known = ", ".join(kind.name for kind in KINDS)
        raise CheckpointError(
            f"{path}: kind is {body.get('kind')!r}, none of {known}; "
            "point to a model that `barcast train` wrote"
        )
    weights = read(directory / WEIGHTS, MOST_WEIGHTS) if kind.weights else b""
    claimed = verified(directory, body, weights, f"{JSON} and {WEIGHTS}" if kind.weights else JSON)
    return Checkpoint(claimed, kind.read(directory, body, weights))


def verified(directory: Path, body: dict[str, Any], weights: bytes, contents: str) -> str:
    """Take the id out of a model's `JSON`; raise `CheckpointError` where the contents have another one."""
    claimed = body.pop("id", None)
    if claimed != (found := identity(body, weights)):
        raise CheckpointError(
            f"{directory / JSON}: id {claimed!r} does not fit the contents of {contents}, which is "
            f"{found!r}; copy the directory again"
        )
    return str(claimed)


def open_forecaster(
    directory: Path, sampler: str | None = None, steps: int | None = None, paths: bool = False
) -> Forecaster:
    """The forecaster of the model in a directory, with the default sampler and steps where None is given."""
    return load(directory).forecaster(sampler, steps, paths)


def preset_of(name: str) -> str:
    """The preset whose sizes a model has, or a diffusion model in it; `PRESET` where there is none.

    `name` is a baseline or a checkpoint directory.
    """
    trained = open_member(name).trained
    members = trained.members if isinstance(trained, Ensemble) else [Member(name, trained)]
    found = [m.trained.net.architecture.preset for m in members if isinstance(m.trained, Trained)]
    return next((preset for preset in found if preset), PRESET)


def costly(trained: Model) -> bool:
    """Whether a forecast takes tenths of a second: of an LDM4TS, or of an ensemble with one."""
    if isinstance(trained, Ensemble):
        return any(m.trained is not None and costly(m.trained) for m in trained.members)
    return isinstance(trained, LatentTrained)


def learner_like(name: str) -> Callable[..., Trained | LatentTrained]:
    """`train` of the kind of diffusion model that a model is, of the same sizes; else of an SSSD.

    `name` is a baseline or a checkpoint directory.
    """
    trained = open_member(name).trained
    if isinstance(trained, LatentTrained):
        from barcast.models.ldm4ts import training as latent

        a, record = trained.net.architecture, trained.record
        parts = [part for part in PARTS if getattr(a, part)]
        language = trained.net.language
        return partial(
            latent.train,
            preset=a.preset,
            image=a.image,
            parts=parts,
            vae=trained.net.vae if a.given else None,
            text=None if language is None else language.folder,
            checkpoint_gradients=record.checkpointed,
            accumulate=record.accumulate,
        )
    from barcast.models import training

    return partial(training.train, preset=preset_of(name))


def open_member(name: str) -> Member:
    """A member of an ensemble: a baseline by its name, else a checkpoint directory."""
    if name in BASELINES:
        return Member(name)
    check_named(name)
    checkpoint = load(Path(name))
    return Member(checkpoint.model, checkpoint.trained)


def _files(trained: Model) -> tuple[str, dict[str, bytes]]:
    """A model's id, and the contents of its files by their path in its directory."""
    kind = next(kind for kind in KINDS if isinstance(trained, kind.holds))
    body = {"format": FORMAT, "kind": kind.name, **kind.body(trained)}
    weights = kind.weights(trained) if kind.weights else b""
    model = identity(body, weights)
    files = {JSON: json.dumps({"id": model, **body}, indent=1, allow_nan=False).encode() + b"\n"}
    if kind.weights:
        files[WEIGHTS] = weights
    for member in trained.members if isinstance(trained, Ensemble) else ():
        if member.trained is not None:
            inner, theirs = _files(member.trained)
            files |= {f"{MEMBERS}/{inner}/{name}": content for name, content in theirs.items()}
    return model, files


def _expect(path: Path, body: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    for field, mine in wanted.items():
        if body.get(field) != mine:
            raise CheckpointError(f"{path}: {field} is {body.get(field)!r}, not {mine!r}; {remedy}")


def _body(trained: Trained | LatentTrained) -> dict[str, Any]:
    s = trained.scaling
    return {
        "timeframe": s.timeframe,
        "horizons": list(s.horizons),
        "levels": list(trained.levels),
        "path": list(path_steps(s.horizons)),
        "window": s.window,
        **SCHEDULED,
        "architecture": asdict(trained.net.architecture),
        "features": feature_names(s.timeframe, s.horizons),
        "scaling": _scaling_body(s),
        "record": _record(trained.record),
    }


def _record(record: Record) -> dict[str, Any]:
    """As JSON; a rate that was not given is left out, as ids are older than it is."""
    told = asdict(record)
    if record.rate is None:
        del told["rate"]
    return told


def _latent_body(trained: LatentTrained) -> dict[str, Any]:
    language = trained.net.language
    if language is None:
        return _body(trained)
    return {**_body(trained), "text": {"folder": str(language.folder), "sha256": language.sha256}}


def _scaling_body(s: Scaling) -> dict[str, Any]:
    arrays = {name: getattr(s, name).tolist() for name in STATISTICS}
    return {"zone": s.zone, "symbols": list(s.symbols), **arrays}


def _weights(trained: Trained | LatentTrained) -> bytes:
    return save_tensors({k: v.contiguous() for k, v in trained.net.state_dict().items()})


def identity(body: Mapping[str, Any], weights: bytes) -> str:
    """A model's id, of what is in its `JSON` beside it, and of its weights."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode() + b"\0" + weights).hexdigest()[:16]


def _sssd(directory: Path, body: dict[str, Any], weights: bytes) -> Trained:
    path = directory / JSON
    _expect(path, body, SCHEDULED, UNSAMPLED)
    tensors = parsed(directory / WEIGHTS, weights)
    trained = _trained(path, body, tensors)
    fill(trained.net, tensors, directory / WEIGHTS)
    return trained


R = TypeVar("R", bound=Past)


@contextmanager
def foreign(path: Path) -> Iterator[None]:
    """Raise what fails in here as `CheckpointError`: the hash was right, so the file is foreign or newer."""
    try:
        yield
    except KeyError as e:
        raise CheckpointError(f"{path}: {e.args[0]} is missing; {AGAIN}") from e
    except (TypeError, ValueError, ArithmeticError, RuntimeError, msgspec.ValidationError, BarcastError) as e:
        raise CheckpointError(f"{path}: {e}; {AGAIN}") from e


def _scaling(path: Path, body: dict[str, Any], record: type[R]) -> tuple[Scaling, tuple[float, ...], R]:
    """What a model has that forecasts from the features: its scaling, levels and record."""
    with foreign(path):
        horizons = msgspec.convert(body["horizons"], tuple[int, ...])
        levels = msgspec.convert(body["levels"], tuple[float, ...])
        check_outputs(horizons, levels)
        statistics = {name: np.array(body["scaling"][name], np.float64) for name in STATISTICS}
        zone = msgspec.convert(body["scaling"]["zone"], str)
        if zone not in ZONES:
            raise ValueError(f"scaling.zone is {zone!r}, not one of {', '.join(ZONES)}")
        symbols = msgspec.convert(body["scaling"]["symbols"], tuple[str, ...])
        scaling = Scaling(body["timeframe"], horizons, zone, symbols, **statistics)
        found = msgspec.convert(body["record"], record)
        names = feature_names(scaling.timeframe, horizons)
    slots, H, F, rows = scaling.layout.slots, len(horizons), len(names), 1 + len(symbols)
    shapes: dict[str, tuple[int, ...]] = {"mean": (F,), "std": (F,), "har": (H, scaling.layout.terms)}
    shapes |= {"factor": (rows, slots), "volume": (rows, slots), "gain": (rows, H, slots)}
    for field, got, mine in (
        ("window", body.get("window"), scaling.window),
        ("features", body.get("features"), names),
        *((f"scaling.{name}", statistics[name].shape, shape) for name, shape in shapes.items()),
    ):
        if got != mine:
            raise CheckpointError(f"{path}: {field} is {got}, not {mine}; {AGAIN}")
    for name, array in statistics.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: scaling.{name} holds a number that is not finite; train again")
        if name in DIVISORS and array.min() <= 0:
            raise CheckpointError(f"{path}: scaling.{name} holds {array.min()}, not above 0; train again")
    return scaling, levels, found


def _trained(path: Path, body: dict[str, Any], tensors: Mapping[str, Tensor]) -> Trained:
    """The model, which these are the weights of, without them."""
    scaling, levels, record = _scaling(path, body, Record)
    with foreign(path):
        architecture = Architecture(**body["architecture"])
        known = msgspec.convert(body["path"], tuple[int, ...])
    _fits(path, architecture, scaling, known)
    enough(path, architecture.least, tensors)
    with foreign(path):
        net = SSSD(architecture, torch.Generator().manual_seed(0))
    return Trained(net=net, scaling=scaling, levels=levels, record=record)


def _latent(directory: Path, body: dict[str, Any], weights: bytes) -> LatentTrained:
    path = directory / JSON
    _expect(path, body, SCHEDULED, UNSAMPLED)
    tensors = parsed(directory / WEIGHTS, weights)
    scaling, levels, record = _scaling(path, body, LatentRecord)
    installed()  # that it is missing is no fault of the file
    with foreign(path):
        a = msgspec.convert(body["architecture"], LatentArchitecture)
        known = msgspec.convert(body["path"], tuple[int, ...])
    _fits(path, a, scaling, known)
    enough(path, a.least, tensors)
    with foreign(path):
        net = LDM4TS(a, torch.Generator().manual_seed(0))
    fill(net, tensors, directory / WEIGHTS)
    if a.text:
        net.language = _language(path, body, scaling.timeframe, a.text)
    return LatentTrained(net, scaling, levels, record)


def _language(path: Path, body: dict[str, Any], timeframe: str, width: int) -> Language:
    """The language model that a checkpoint names; raise `CheckpointError` for one of other files."""
    with foreign(path):
        named = msgspec.convert(body["text"], dict[str, str])
        folder, digest = Path(named["folder"]), named["sha256"]
    remedy = f"put the folder that it was trained with at {str(folder)!r}, or train again"
    required()  # that it is missing is no fault of the file
    try:
        found = digest_of(folder)
        if found != digest:
            raise CheckpointError(
                f"{path}: text = {str(folder)!r} holds other files (sha256 {found}); {remedy}"
            )
        language = open_language(folder, timeframe)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; {remedy}") from error
    if language.width != width:
        raise CheckpointError(f"{path}: architecture.text is {width}, not {language.width}; {AGAIN}")
    return language


def _fits(
    path: Path, architecture: Architecture | LatentArchitecture, scaling: Scaling, known: tuple[int, ...]
) -> None:
    """Raise `CheckpointError` for an architecture or path that is not of these features and horizons."""
    for field, found, mine in (
        ("architecture.features", architecture.features, len(scaling.mean)),
        ("architecture.horizons", architecture.horizons, len(scaling.horizons)),
        ("architecture.path", architecture.path, len(known)),
        ("path", known, path_steps(scaling.horizons)),
        ("architecture.context", architecture.context, scaling.layout.context),
        ("architecture.channels", architecture.channels, CHANNELS),
    ):
        if found != mine:
            raise CheckpointError(f"{path}: {field} is {found}, not {mine}; {AGAIN}")


def enough(path: Path, least: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for fewer weights than a network has, before one of any size is made."""
    if least > (numbers := sum(tensor.numel() for tensor in tensors.values())):
        raise CheckpointError(
            f"{path}: architecture needs {least} weights or more, and {WEIGHTS} has {numbers}; copy the "
            "directory again"
        )


def fill(net: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give a network its weights; raise `CheckpointError` for others than it has."""
    own = net.state_dict()
    _check(path, tensors, own)
    for name, mine in own.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (mine.shape, mine.dtype):
            got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, mine))
            raise CheckpointError(f"{path}: {name} is {got}, not {want}; {AGAIN}")
    net.load_state_dict(tensors, strict=True)
    net.eval()


def parsed(path: Path, weights: bytes) -> dict[str, Tensor]:
    """The tensors of a weights file; raise `CheckpointError` for any other file."""
    try:
        return load_tensors(weights)
    except SafetensorError as e:
        raise CheckpointError(f"{path}: not a safetensors file ({e}); copy the directory again") from e


def _check(path: Path, tensors: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Raise `CheckpointError` unless the tensors have these names, and no others, and finite numbers."""
    if tensors.keys() != set(names):
        odd = sorted(tensors.keys() ^ set(names))[0]
        raise CheckpointError(f"{path}: tensor {odd} is missing or unknown; {AGAIN}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds a number that is not finite; train again")


def _boosted_body(boosted: Boosted) -> dict[str, Any]:
    s = boosted.scaling
    return {
        "timeframe": s.timeframe,
        "horizons": list(s.horizons),
        "levels": list(boosted.levels),
        "window": s.window,
        "features": feature_names(s.timeframe, s.horizons),
        "scaling": _scaling_body(s),
        "record": asdict(boosted.record),
    }


def _boosted_weights(boosted: Boosted) -> bytes:
    return save_tensors({f.name: torch.from_numpy(getattr(boosted.trees, f.name)) for f in fields(Trees)})


def _boosted(directory: Path, body: dict[str, Any], weights: bytes) -> Boosted:
    scaling, levels, record = _scaling(directory / JSON, body, TreesRecord)
    path = directory / WEIGHTS
    tensors = parsed(path, weights)
    _check(path, tensors, [f.name for f in fields(Trees)])
    trees = Trees(**{name: tensor.numpy() for name, tensor in tensors.items()})
    fault = trees.fault((len(scaling.horizons), len(levels)), len(scaling.mean))
    if fault:
        raise CheckpointError(f"{path}: {fault}; {AGAIN}")
    return Boosted(trees, scaling, levels, record)


def _ensemble_body(ensemble: Ensemble) -> dict[str, Any]:
    cards = [member.card for member in ensemble.open_members()]
    return {
        "timeframe": ensemble.timeframe,
        "horizons": list(ensemble.horizons),
        "levels": list(ensemble.levels),
        "window": max(card.window for card in cards),
        "members": [
            {"name": member.name, "model": card.model}
            for member, card in zip(ensemble.members, cards, strict=True)
        ],
        "weights": ensemble.weights.tolist(),
        "record": asdict(ensemble.record),
    }


def _ensemble(directory: Path, body: dict[str, Any], _: bytes) -> Ensemble:
    path = directory / JSON
    with foreign(path):
        horizons = msgspec.convert(body["horizons"], tuple[int, ...])
        levels = msgspec.convert(body["levels"], tuple[float, ...])
        check_outputs(horizons, levels)
        named = [(m["name"], m["model"]) for m in msgspec.convert(body["members"], list[dict[str, str]])]
        weights = np.array(body["weights"], np.float64)
        record = msgspec.convert(body["record"], Past)
    members = tuple(_member(directory, name) for name, _ in named)
    with foreign(path):
        ensemble = Ensemble(body["timeframe"], horizons, levels, members, weights, record)
        cards = [forecaster.card for forecaster in ensemble.open_members()]
    shape = len(horizons), len(members)
    for field, got, mine in (
        ("members", [model for _, model in named], [card.model for card in cards]),
        ("window", body.get("window"), max((card.window for card in cards), default=0)),
        ("weights", weights.shape, shape),
    ):
        if got != mine:
            raise CheckpointError(f"{path}: {field} is {got}, not {mine}; {AGAIN}")
    for h, row in zip(horizons, weights, strict=True):
        if not (row >= 0).all() or not abs(row.sum() - 1) < 1e-9:
            raise CheckpointError(
                f"{path}: weights of horizon {h} are {row.tolist()}, not above 0 with a sum of 1; train again"
            )
    return ensemble


def _member(directory: Path, name: str) -> Member:
    if name in BASELINES:
        return Member(name)
    if not re.fullmatch("[0-9a-f]{16}", name):
        raise CheckpointError(
            f"{directory / JSON}: member {name!r} is neither a baseline ({', '.join(BASELINES)}) nor an id; "
            f"{AGAIN}"
        )
    checkpoint = load(directory / MEMBERS / name)
    if checkpoint.model != name or isinstance(checkpoint.trained, Ensemble):
        raise CheckpointError(
            f"{directory / MEMBERS / name}: holds {checkpoint.model}, which is another model or an ensemble; "
            "copy the directory again"
        )
    return Member(name, checkpoint.trained)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a kind of model is written and read: its part of model.json, its weights, and both read again."""

    name: str
    holds: type
    body: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any], bytes] | None
    read: Callable[[Path, dict[str, Any], bytes], Model]


KINDS = (
    _Kind("sssd", Trained, _body, _weights, _sssd),
    _Kind("ldm4ts", LatentTrained, _latent_body, _weights, _latent),
    _Kind("lgbm", Boosted, _boosted_body, _boosted_weights, _boosted),
    _Kind("ensemble", Ensemble, _ensemble_body, None, _ensemble),
)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
