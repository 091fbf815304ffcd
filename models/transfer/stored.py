"""Stress generators on disk: a directory as a checkpoint's, of a kind that no forecaster is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Generator

from barcast.models.catalog import FORMAT, JSON, TRANSFER, header, read
from barcast.models.checkpoint import (
    AGAIN,
    MOST_WEIGHTS,
    WEIGHTS,
    enough,
    fill,
    foreign,
    identity,
    parsed,
    verified,
    write,
)
from barcast.models.errors import CheckpointError
from barcast.models.transfer.config import TransferConfig
from barcast.models.transfer.generator import StressScenarioGenerator
from barcast.models.transfer.latent import CHANNELS, HEIGHT, WIDTH, LatentScale
from barcast.models.transfer.network import TransferArchitecture, VelocityNetwork
from barcast.models.transfer.regimes import REGIMES, RegimeRule
from barcast.models.transfer.trained import PROBABILITIES, Transfer, TransferRecord


def save_generator(trained: Transfer, directory: Path) -> str:
    """Write a stress generator into a directory, as `checkpoint.save` does; returns its id."""
    body: dict[str, Any] = {"format": FORMAT, "kind": TRANSFER, **_body(trained)}
    weights = save_tensors({k: v.contiguous() for k, v in trained.net.state_dict().items()})
    model = identity(body, weights)
    content = json.dumps({"id": model, **body}, indent=1, allow_nan=False).encode() + b"\n"
    write(directory, model, {JSON: content, WEIGHTS: weights})
    return model


def load_generator(directory: Path) -> StressScenarioGenerator:
    """Read a stress generator; raises `CheckpointError` for one that is damaged or newer, or a forecaster."""
    path, body = directory / JSON, header(directory)
    if (kind := body.get("kind")) != TRANSFER:
        raise CheckpointError(
            f"{path}: kind is {kind!r}, which makes no scenarios; point to what `barcast train-stress` wrote"
        )
    weights = read(directory / WEIGHTS, MOST_WEIGHTS)
    model = verified(directory, body, weights, f"{JSON} and {WEIGHTS}")
    tensors = parsed(directory / WEIGHTS, weights)
    for field, mine in (("latent", _latent()), ("regimes", list(REGIMES))):
        if body.get(field) != mine:
            raise CheckpointError(f"{path}: {field} is {body.get(field)}, not {mine}; {AGAIN}")
    with foreign(path):
        config = TransferConfig.of(body["config"], "config")
        rule = msgspec.convert(body["rule"], RegimeRule)
        record = msgspec.convert(body["record"], TransferRecord)
        elasticity = msgspec.convert(body["elasticity"], float)
        scale = LatentScale(
            *(
                torch.tensor(msgspec.convert(body["scale"][name], list[float]), dtype=torch.float64)
                for name in ("mean", "deviation")
            )
        )
        architecture = TransferArchitecture(config.width, config.code)
        levels = np.array(msgspec.convert(body["levels"], list[list[float]]), np.float64)
    good = all(
        x.shape == (len(CHANNELS),) and bool(x.isfinite().all()) for x in (scale.mean, scale.deviation)
    )
    if not good or scale.deviation.min() <= 0:
        raise CheckpointError(
            f"{path}: scale is no finite mean and deviation above 0 of each channel; {AGAIN}"
        )
    whole = levels.shape == (len(REGIMES), len(PROBABILITIES)) and bool(np.isfinite(levels).all())
    if not whole or (np.diff(levels) < 0).any():
        raise CheckpointError(f"{path}: levels are no rising quantiles of each regime; {AGAIN}")
    enough(path, architecture.least, tensors)
    net = VelocityNetwork(architecture, Generator().manual_seed(0))
    fill(net, tensors, directory / WEIGHTS)
    return StressScenarioGenerator(Transfer(net, scale, rule, elasticity, levels, config, record), model)


def _body(trained: Transfer) -> dict[str, Any]:
    return {
        "latent": _latent(),
        "regimes": list(REGIMES),
        "scale": {name: getattr(trained.scale, name).tolist() for name in ("mean", "deviation")},
        "rule": asdict(trained.rule),
        "elasticity": trained.elasticity,
        "levels": trained.levels.tolist(),
        "config": asdict(trained.config),
        "record": asdict(trained.record),
    }


def _latent() -> dict[str, Any]:
    return {"channels": list(CHANNELS), "height": HEIGHT, "width": WIDTH}
