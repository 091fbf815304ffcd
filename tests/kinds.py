"""Small models of the other kinds, made by hand out of a trained one, or after a step or two of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from barcast.models.checkpoint import open_member, save
from barcast.models.ensemble import Ensemble
from barcast.models.gbm import Boosted, Trees, TreesRecord
from barcast.models.ldm4ts import training as latent
from barcast.models.scaling import Scaling
from barcast.models.trained import Past, Trained


def past(of: Past) -> dict[str, object]:
    """The fields that the records of all kinds have."""
    return {field.name: getattr(of, field.name) for field in fields(Past)}


def boosted(scaling: Scaling, levels: tuple[float, ...], record: Past) -> Boosted:
    """Trees of one split each, at the mean of a feature; on one side the outcomes spread a little wider."""
    H, Q = len(scaling.horizons), len(levels)
    T = H * Q
    roots = 3 * np.arange(T, dtype=np.int32)
    feature = np.zeros(3 * T, np.int32)
    feature[roots] = np.arange(T) % len(scaling.mean)
    children = np.repeat(np.arange(3 * T, dtype=np.int32)[:, None], 2, 1)
    children[roots] += np.array([1, 2], np.int32)
    value = np.zeros(3 * T)
    spread = np.tile(3 * (np.array(levels) - 0.5), H)
    value[roots + 1], value[roots + 2] = 0.9 * spread, 1.1 * spread
    trees = Trees(np.ones((H, Q), np.int32), roots, feature, np.zeros(3 * T), children, value)
    return Boosted(trees, scaling, levels, TreesRecord(**past(record), seed=0))


def ensemble(folder: Path, trained: Trained) -> Ensemble:
    """Historical simulation, the model and trees like above, with weights that differ by horizon."""
    scaling = trained.scaling
    save(trained, folder / "network")
    save(boosted(scaling, trained.levels, trained.record), folder / "trees")
    members = tuple(open_member(name) for name in ("hs", str(folder / "network"), str(folder / "trees")))
    weights = np.array([[0.25, 0.5, 0.25], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])[: len(scaling.horizons)]
    record = Past(**past(trained.record))
    return Ensemble(scaling.timeframe, scaling.horizons, trained.levels, members, weights, record)


@contextmanager
def few_latents() -> Iterator[None]:
    """Trainings of an LDM4TS look at few forecasts, and learn from few: a step takes no time."""
    phases = {"map": 60, "autoencoder": 16, "diffusion": 4, "gate": 12}
    changes = {"LOOK_ORIGINS": phases, "LEARNT": 40, "BATCHES": dict.fromkeys(phases, 8), "LOOK_SAMPLES": 4}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(latent, name, value)
        yield
