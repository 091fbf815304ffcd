"""Gradient-boosted quantile regression on the features of the network: LightGBM learns, numpy forecasts.

For each horizon and level, trees are grown on the pinball loss of the outcome over its scale (Ke et al. 2017;
Koenker and Bassett 1978). What they know is kept as arrays, so that a forecast needs no LightGBM and is a
function of the window alone.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from barcast.models.diffusion import use_one_thread
from barcast.models.errors import ConfigError
from barcast.models.forecast import Card, Forecast
from barcast.models.origins import Origins, split
from barcast.models.quantiles import forecast_of
from barcast.models.scaling import Scaling
from barcast.models.trained import Past, check_outputs, check_paths
from barcast.models.window import Window

Array = NDArray[np.float64]
Ints = NDArray[np.int32]

VALIDATION = 1 / 6  # of the bars
ROWS = 60_000  # origins to learn from, and to stop early on, thinned evenly
ROUNDS, PATIENCE = 400, 20  # trees of a quantile at most, and those grown in vain before it ends
WEIGHTS = (0.05, 10.0)  # of an origin: its scale over the mean one, within these
PARAMETERS = {
    "objective": "quantile",
    "learning_rate": 0.04,
    "num_leaves": 8,
    "feature_fraction": 0.4,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_col_wise": True,
}


@dataclass(frozen=True, slots=True)
class TreesRecord(Past):
    """How boosted trees came about."""

    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The regression trees of H x Q quantiles as arrays: T trees with N nodes.

    `counts` (H, Q) says how many trees each quantile has, in order; `roots` (T,) where each begins. A node
    hands a row on to `children` (N, 2): the first if its `feature` (N,) is at most `threshold` (N,), else the
    second; both stand behind it. A leaf is its own child and adds `value` (N,).
    """

    counts: Ints
    roots: Ints
    feature: Ints
    threshold: Array
    children: Ints
    value: Array

    def outputs(self, features: NDArray[np.float32]) -> Array:
        """The sum of the trees of each quantile, (H, Q), for a row of features (F,); NaN where one is."""
        if not np.isfinite(features).all():
            return np.full(self.counts.shape, np.nan)
        at, before = self.roots, self.roots[:0]
        while not np.array_equal(at, before):
            right = features[self.feature[at]] > self.threshold[at]
            at, before = self.children[at, right.astype(np.intp)], at
        first = np.cumsum(self.counts) - self.counts.ravel()  # (H Q,): the first tree of each
        sums: Array = np.add.reduceat(self.value[at], first)
        return sums.reshape(self.counts.shape)

    def fault(self, quantiles: tuple[int, int], features: int) -> str | None:
        """What is wrong with trees for quantiles (H, Q) of rows with so many features, if anything."""
        T, N = len(self.roots), len(self.feature)
        int32, float64 = np.dtype(np.int32), np.dtype(np.float64)
        for name, shape, dtype in (
            ("counts", quantiles, int32),
            ("roots", (T,), int32),
            ("feature", (N,), int32),
            ("threshold", (N,), float64),
            ("children", (N, 2), int32),
            ("value", (N,), float64),
        ):
            array = getattr(self, name)
            if (array.shape, array.dtype) != (shape, dtype):
                return f"{name} is {array.shape} {array.dtype}, not {shape} {dtype}"
        if self.counts.min() < 1 or self.counts.sum() != T:
            return f"counts are {self.counts.tolist()}, not above 0 with a sum of {T}"
        for name, array, end in (("roots", self.roots, N), ("feature", self.feature, features)):
            if array.min() < 0 or array.max() >= end:
                return f"{name} reaches from {array.min()} to {array.max()}, not from 0 to {end - 1}"
        own = np.arange(N, dtype=np.int32)[:, None]
        leaf = (self.children == own).all(1, keepdims=True)
        if not (leaf | (self.children > own)).all() or self.children.max() >= N:
            return (
                f"children of node {int(np.argmin((leaf | (self.children > own)).all(1)))} are not behind it"
            )
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Boosted:
    """Boosted trees, the scaling of their inputs and outputs, the levels they forecast, and their history."""

    trees: Trees
    scaling: Scaling
    levels: tuple[float, ...]
    record: TreesRecord

    def forecaster(
        self, model: str, sampler: str | None = None, steps: int | None = None, paths: bool = False
    ) -> "BoostedForecaster":
        """See `Model.forecaster`."""
        check_paths(model, paths)
        return BoostedForecaster(self, model)


class BoostedForecaster:
    """Forecasts of boosted trees. It has no state that a forecast changes.

    Each window is worked on alone. Quantiles that cross are sorted (Chernozhukov et al. 2010); mean, spread
    and probability of a rise follow from them, see `quantiles.moments`.
    """

    def __init__(self, boosted: Boosted, model: str) -> None:
        scaling = boosted.scaling
        self._trees, self._scaling = boosted.trees, scaling
        self._card = Card(
            model=model,
            kind="lgbm",
            timeframe=scaling.timeframe,
            horizons=scaling.horizons,
            levels=boosted.levels,
            window=scaling.window,
            min_window=scaling.min_window,
            sampler="none",
            steps=0,
            samples=0,
            fingerprint=_fingerprint(),
        )

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        return self._card

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        return [self._forecast(window) for window in windows]

    def _forecast(self, window: Window) -> Forecast:
        frame = self._scaling.of_window(window)
        z = np.sort(self._trees.outputs(frame.features[0].astype(np.float32)), -1)
        return forecast_of(self.card, window, z * frame.scale[0][:, None])


def train(
    histories: Collection[Window],
    *,
    timeframe: str,
    horizons: Sequence[int],
    levels: Sequence[float],
    until: int | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Boosted:
    """Train on whole histories, one window for each symbol; a function of (bars, configuration, seed).

    `until` (nanoseconds) is the last close that may be used, the newest if None; `hold_out` the share of the
    newest bars that are left alone. The validation part decides how many trees each quantile has. `progress`
    is told what is at hand. Raises `DataError` for bars that cannot be learnt from, `ConfigError` for
    horizons or levels that cannot be used, or without LightGBM.
    """
    check_outputs(horizons, levels)
    lightgbm = _lightgbm()
    use_one_thread()
    data = split(histories, timeframe, tuple(horizons), until, validation=VALIDATION, hold_out=hold_out)
    assert data.validation is not None
    learn, look = data.learn.thin(ROWS), data.validation.thin(ROWS)
    least = 400 if len(learn) > 50_000 else 150
    parameters = PARAMETERS | {"min_data_in_leaf": min(least, len(learn) // 20), "seed": seed}
    grown = []
    for j, h in enumerate(data.scaling.horizons):
        own = _dataset(lightgbm, learn, j, None)
        held = _dataset(lightgbm, look, j, own)
        for level in levels:
            booster = lightgbm.train(
                parameters | {"alpha": level},
                own,
                ROUNDS,
                valid_sets=[held],
                callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
            )
            grown.append(booster.dump_model(num_iteration=booster.best_iteration)["tree_info"])
            progress(f"horizon {h}, level {level}: {len(grown[-1])} trees")
    record = TreesRecord(**data.past(len(data.learn), _fingerprint(lightgbm)), seed=seed)
    return Boosted(_flat(grown, len(levels)), data.scaling, tuple(levels), record)


def _lightgbm() -> ModuleType:
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # without the package, or without its OpenMP
        raise ConfigError(
            f"lightgbm cannot be imported ({error}); install barcast with its extra baselines: "
            "pip install '.[baselines]'"
        ) from error
    module: ModuleType = lightgbm
    return module


def _dataset(lightgbm: ModuleType, part: Origins, horizon: int, reference: Any) -> Any:
    """Features and outcomes over one horizon; weights by scale make the loss one of returns."""
    scale = part.scale[:, horizon].numpy()
    return lightgbm.Dataset(
        part.features.numpy(),
        part.z[:, horizon].numpy(),
        weight=np.clip(scale / scale.mean(), *WEIGHTS),
        reference=reference,
        free_raw_data=False,
    )


def _flat(grown: list[list[dict[str, Any]]], levels: int) -> Trees:
    """The arrays of LightGBM's nested trees, which are those of each quantile in turn."""
    roots: list[int] = []
    rows: list[tuple[int, float, int, int, float]] = []

    def put(node: dict[str, Any]) -> int:
        at = len(rows)
        if "leaf_value" in node:
            rows.append((0, 0.0, at, at, node["leaf_value"]))
            return at
        rows.append((node["split_feature"], node["threshold"], 0, 0, 0.0))
        children = put(node["left_child"]), put(node["right_child"])
        rows[at] = (*rows[at][:2], *children, 0.0)
        return at

    for trees in grown:
        roots += [put(tree["tree_structure"]) for tree in trees]
    feature, threshold, left, right, value = zip(*rows, strict=True)
    return Trees(
        counts=np.array([len(trees) for trees in grown], np.int32).reshape(-1, levels),
        roots=np.array(roots, np.int32),
        feature=np.array(feature, np.int32),
        threshold=np.array(threshold, np.float64),
        children=np.array([left, right], np.int32).T.copy(),
        value=np.array(value, np.float64),
    )


def _fingerprint(lightgbm: ModuleType | None = None) -> str:
    """What the bits depend on besides model and bars."""
    mine = f"numpy={np.__version__} cpu={torch.backends.cpu.get_cpu_capability()}"
    return mine if lightgbm is None else f"lightgbm={lightgbm.__version__} {mine}"
