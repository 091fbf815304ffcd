"""Checkpoints of `SSSDModel` as torch files, in the layouts that have been in use.

| layout | a dictionary | loads into |
|---|---|---|
| `model_state_dict` | with the weights under this key: what `save_checkpoint` writes | this network |
| `state_dict`, `model` | with the weights under this key | this network |
| raw | of weights alone | this network |

In each of them the weights of the former SSSD, whose layers are other ones, are recognised and refused. What
a file says of its configuration must be what the model is made with; a file without one is held to names and
shapes alone. Files are read with `weights_only`: they hold tensors and plain values, and run nothing.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from barcast.models.errors import CheckpointError

LAYOUTS = ("model_state_dict", "state_dict", "model")
AGAIN = "train one with this version"
FORMER = ".s4.Lambda"  # the end of a name that only weights of the former SSSD have


def write(
    path: str | PathLike[str],
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    epoch: int,
    optimizer_state: Mapping[str, Any] | None,
    metrics: Mapping[str, float] | None,
) -> None:
    """Write a checkpoint in the layout `model_state_dict`, with its configuration."""
    body = {"epoch": epoch, "model_state_dict": dict(state), "config": config, "metrics": dict(metrics or {})}
    if optimizer_state is not None:
        body["optimizer_state_dict"] = optimizer_state
    torch.save(body, path)


def read(
    path: str | PathLike[str], config: Mapping[str, Any], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a checkpoint, of the names and shapes of those `wanted`.

    Raises `CheckpointError` for a file that cannot be read, of other settings than `config`, or of another
    network; the sentence says which layers do not fit.
    """
    _check_packing(path)
    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; name a checkpoint") from None
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as tensors and plain values ({reason}); save its state_dict anew"
        ) from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: holds a {type(body).__name__}, no dictionary of weights; {AGAIN}")
    layout = next((key for key in LAYOUTS if isinstance(body.get(key), dict)), None)
    state = body if layout is None else body[layout]
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(
            f"{path}: holds {', '.join(map(str, list(body)[:4])) or 'nothing'}, and weights under none of "
            f"{', '.join(LAYOUTS)}; save its state_dict anew"
        )
    if former := [name for name in state if name.endswith(FORMER)]:
        raise CheckpointError(f"{path}: {_former(state, former[0])}")
    if layout is not None and isinstance(body.get("config"), dict):
        _check_config(path, body["config"], config)
    _check_weights(path, state, wanted)
    return dict(state)


def _check_packing(path: str | PathLike[str]) -> None:
    """Raise `CheckpointError` for a packed file, which torch never writes: it may be of any size unpacked."""
    try:
        if not is_zipfile(path):
            return
        with ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != ZIP_STORED]
    except (BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); save its state_dict anew") from error
    if packed:
        raise CheckpointError(f"{path}: {packed[0]} in it is compressed; save its state_dict anew")


def _former(state: Mapping[str, Tensor], name: str) -> str:
    """Why weights of the former SSSD cannot serve."""
    poles = "x".join(map(str, state[name].shape))
    head = next((n for n in state if n.endswith("diffusion_head.mlp.0.weight")), None)
    inputs = "" if head is None else f" of {state[head].shape[1]} inputs"
    return (
        f"weights of the former SSSD, which this network cannot take: {name} are {poles} real poles that all "
        "channels share, in a layer that sums over the channels, where S4D has complex ones for each; and a "
        f"denoiser{inputs} of which most are a latent vector that no loss ties to an outcome, where this one "
        f"takes the outcomes of all horizons; {AGAIN}"
    )


def _check_config(path: Any, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    said = theirs.get("model", {})
    if not isinstance(said, Mapping):
        raise CheckpointError(f"{path}: its config.model is {said!r}, no table; save its state_dict anew")
    for name, value in _flat(mine["model"], "model").items():
        found = _found(said, name.split(".")[1:], value)
        if _plain(found) != _plain(value):
            raise CheckpointError(
                f"{path}: was trained with {name} = {found!r}, and the configuration says {value!r}; "
                "use the former"
            )


def _check_weights(path: Any, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for fault, names in (
        ("lacks", [name for name in wanted if name not in state]),
        ("has, unknown to this network,", [name for name in state if name not in wanted]),
    ):
        if names:
            raise CheckpointError(
                f"{path}: {fault} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") + "; "
                "make the configuration that of the training, or " + AGAIN
            )
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(state[name].shape)}, and the configuration makes it "
                f"{tuple(value.shape)}; make it that of the training"
            )
        if not state[name].is_floating_point() or not torch.isfinite(state[name]).all():
            raise CheckpointError(f"{path}: {name} holds what is no finite real number; {AGAIN}")


def _flat(table: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        here = f"{path}.{name}"
        found |= _flat(value, here) if isinstance(value, Mapping) else {here: value}
    return found


def _found(table: Any, names: Sequence[str], default: Any) -> Any:
    """What a table says under these names, one in the other; the default where it says nothing."""
    for name in names:
        if not isinstance(table, Mapping):
            return table
        if name not in table:
            return default
        table = table[name]
    return table


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
