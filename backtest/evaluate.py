"""Forecasters side by side on identical rolling origins, over consecutive folds of calendar time."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.paths import DEFINITIONS as PATHS
from barcast.backtest.paths import PathScores
from barcast.backtest.replay import learnt_until, learnt_warning
from barcast.backtest.scoring import INTERVALS, interval
from barcast.backtest.skill import VOLATILITY
from barcast.daemon.calendar import iso
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import (
    BASELINES,
    LEVELS,
    ConfigError,
    DataError,
    Forecaster,
    Window,
    default_horizons,
    open_model,
)
from barcast.models.evaluation import Forecasts, collect
from barcast.models.forecast import FAR
from barcast.models.scores import THIRDS, Estimate, crps, gain, lag, mean, pit, thirds

REFERENCE = "hs"
"""The baseline that skill is measured against."""

ALL = "all"
"""The fold of the rows that pool all folds."""

FOLDS = 4
INTRADAY = 5
"""Bar slots from one origin to the next below a day: no divisor of 24 hours, so all hours come."""

DEFINITIONS = {
    "n": "forecasts",
    "times": "origin times: the symbols of a time count as one observation in every error",
    "crps": "twice the pinball loss averaged over the levels and forecasts, of log returns",
    "skill": "100 (1 - CRPS / CRPS of hs)",
    "gain": "100 (1 - CRPS / CRPS of the other model), on the same origins",
    "error": "standard error, Newey and West (1987) over origin times, lag max(2 ceil(h/stride), T^(1/3))",
    "coverage_50": "share of outcomes from q25 to q75; 0.5 when calibrated",
    "coverage_80": "share of outcomes from q10 to q90; 0.8 when calibrated",
    "coverage_90": "share of outcomes from q05 to q95; 0.9 when calibrated",
    "worst": "largest distance of the share of outcomes at or below a quantile from its level",
    "direction": "share of outcomes on the side of zero where the median is, of those where neither is 0",
    "third": "a third of each symbol's origins, by the width of the 80 % interval of the model `volatility`",
}

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Scores of several models on the same origins. Rows of the fold `all` pool the others.

    - `scores`: fold, horizon (bars), model, n, times, crps (log return), skill and skill_error (percent),
      coverage_50, coverage_80, coverage_90 with their errors (null without the levels), worst, direction and
      direction_error (null without a median other than 0).
    - `gains`: fold, horizon, model, other, gain, error (percent).
    - `thirds`: horizon, model, third, n, and the coverages with their errors.
    - `levels`: fold, horizon, model, level, below (share of outcomes at or below the quantile), error.
    - `pit`: fold, horizon, model, lower, upper (levels, 0 and 1 at the ends), share, density.
    - `meta`: models, folds, what was left out and a warning.

    Where models forecast paths, over all folds, and null otherwise:

    - `paths`: model, coupling, score (`energy`, `moves` or `variogram`), n, times, value, error, own_gain and
      own_gain_error (percent).
    - `touch`: up, down (deviations), model, coupling, n, times, up_first and down_first (shares of what came
      true), said_up_first and said_down_first, brier, error, and over_har and own_gain with their errors.
    - `reliability`: up, down, model, coupling, lower, upper (of the bin), n, said, seen, error.

    `DEFINITIONS`, here and in `paths`, say what the numbers are.
    """

    scores: pl.DataFrame
    gains: pl.DataFrame
    thirds: pl.DataFrame
    levels: pl.DataFrame
    pit: pl.DataFrame
    meta: dict[str, Any]
    paths: pl.DataFrame | None = None
    touch: pl.DataFrame | None = None
    reliability: pl.DataFrame | None = None

    def best_baseline(self, horizon: int) -> str:
        """The baseline with the lowest CRPS over all folds."""
        pooled = self.scores.filter(fold=ALL, horizon=horizon)
        pooled = pooled.filter(pl.col("model").is_in(self.meta["baselines"]))
        return str(pooled.sort("crps")["model"][0])

    def gain(self, horizon: int, model: str, other: str) -> Estimate | None:
        """The gain of one model over another over all folds, in percent; none over itself."""
        if model == other:
            return None
        row = self.gains.filter(fold=ALL, horizon=horizon, model=model, other=other)
        return Estimate(row["gain"].item(), row["error"].item())

    def json(self) -> str:
        """Everything as one JSON object; numbers that there are not are null."""
        names = ("scores", "gains", "thirds", "levels", "pit", "paths", "touch", "reliability")
        frames = {name: getattr(self, name) for name in names}
        rows = {name: _finite(frame).to_dicts() for name, frame in frames.items() if frame is not None}
        told = DEFINITIONS if self.paths is None else DEFINITIONS | PATHS
        return json.dumps({"meta": self.meta, "definitions": told, **rows}, allow_nan=False)


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """The models to compare by their labels, what each was opened by, and why others were left out.

    `rivals` are, for models of paths, those that forecast the same quantiles and paths by a Gaussian copula,
    and `brownian` is the label of the baseline that says how far a Brownian motion gets.
    """

    forecasters: dict[str, Forecaster]
    names: dict[str, str]
    left_out: dict[str, str]
    rivals: dict[str, Forecaster] = dataclasses.field(default_factory=dict)
    brownian: str | None = None


def open_field(names: Sequence[Path | str], timeframe: str, paths: bool = False) -> Field:
    """Open models by name: baselines and checkpoint directories, with horizons and levels in common.

    The reference is always among them; without any baseline named, all are that suit the timeframe and whose
    packages are installed. Baselines forecast what the checkpoints do. A checkpoint is labelled by the name
    of its directory, or by the path as given where another one, or a baseline, has that name. With `paths`
    those that can forecast them, and HAR stands beside them: with a time-of-week factor, but of daily bars.
    Raise as `open_model` does, and `ConfigError` for paths that none of them forecasts.
    """
    asked = [str(name) for name in names]
    trained: dict[str, Forecaster] = {}
    refused = "--paths needs a model of paths: name an SSSD or LDM4TS by --model"
    for name in dict.fromkeys(name for name in asked if name not in BASELINES):
        try:
            trained[name] = open_model(name, timeframe, None, None, paths)
        except ConfigError as error:
            if not paths:
                raise
            trained[name], refused = open_model(name, timeframe, None, None), str(error)
    winding = [name for name, forecaster in trained.items() if forecaster.card.path]
    if paths and not winding:
        raise ConfigError(refused)
    card = next((f.card for f in trained.values()), None)
    horizons = card.horizons if card else default_horizons(timeframe)
    levels = card.levels if card else LEVELS
    named = [name for name in asked if name in BASELINES]
    brownian = ("har" if (Timeframe.parse(timeframe).duration or DAY) >= DAY else "har-s") if paths else None
    beside = [] if brownian is None else [brownian]
    rivals: dict[str, Forecaster] = {}
    field = Field({}, {}, {}, rivals, brownian)
    for name in dict.fromkeys([REFERENCE, *(named or BASELINES), *beside]):
        try:
            field.forecasters[name] = BASELINES[name](timeframe, horizons, levels)
            field.names[name] = name
        except ConfigError as error:
            if name in named or name in beside:
                raise
            field.left_out[name] = str(error)
    taken = Counter([*BASELINES, "", *(Path(name).name for name in trained)])
    for name, forecaster in trained.items():
        label = Path(name).name
        label = name if taken[label] > 1 else label
        field.forecasters[label], field.names[label] = forecaster, name
        if name in winding:
            rivals[label] = open_model(name, timeframe, None, 0, paths)
    return field


def evaluate(
    field: Field,
    histories: Collection[Window],
    timeframe: Timeframe,
    *,
    since: int | None = None,
    until: int | None = None,
    folds: int = FOLDS,
    stride: int | None = None,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> Evaluation:
    """Score all models on the origins that every one can forecast, with since <= close < until.

    Origins are every `stride`-th bar slot of a grid in time common to all symbols: by default each from a day
    on, else every fifth. Without `since` they begin where no model has learnt from. The period from the first
    to the last is cut into `folds` of equal time. Origins at which a model makes nothing usable are left out
    for all. Raise `ConfigError` when models do not forecast the same, `DataError` without origins in a fold.
    """
    slot = timeframe.duration or DAY
    step = stride or (1 if slot >= DAY else INTRADAY)
    labels = list(field.forecasters)
    first = max(map(learnt_until, field.names.values())) if since is None else since
    last = max(window.close_time for window in histories)

    watcher = None
    if field.brownian is not None:
        rivals = {labels.index(label): rival for label, rival in field.rivals.items()}
        watcher = PathScores(list(field.forecasters.values()), rivals, labels.index(field.brownian))

    def stand(done: int, count: int, window: Window) -> None:
        progress(0, f"{done} of {count}, {window.symbol}")

    found = collect(
        list(field.forecasters.values()),
        histories,
        since=first,
        until=last if until is None else min(last, until - 1),
        stride=step,
        slot=slot,
        progress=stand,
        watch=None if watcher is None else watcher.watch,
    )
    found, withheld, keep = _usable(found, labels)
    start = max(first, int(found.close_times.min())) if since is None else since
    end = last if until is None else min(last, until)
    edges = [start + (end - start) * k // folds for k in range(folds + 1)]
    card = next(iter(field.forecasters.values())).card
    at = np.searchsorted(edges[1:-1], found.close_times, "right")
    parts = {ALL: np.ones(len(at), bool)} | {str(k + 1): at == k for k in range(folds)}
    for (name, chosen), (a, b) in zip(list(parts.items())[1:], pairwise(edges), strict=True):
        if not chosen.any():
            raise DataError(
                f"Fold {name}, {iso(a)[:10]} to {iso(b)[:10]}, holds no forecast origin: take fewer folds, "
                "a longer time, or give more bars before it."
            )
    volatility = VOLATILITY if VOLATILITY in labels else labels[0]
    tables = _Tables(labels, card.horizons, card.levels)
    for name, chosen in parts.items():
        tables.fold(name, found, chosen, step)
    tables.by_volatility(found, volatility, step)
    joint: dict[str, pl.DataFrame] = {}
    if watcher is not None:
        _, moment = np.unique(found.close_times, return_inverse=True)
        joint = watcher.frames(labels, keep, moment, step)
    warnings = {label: learnt_warning(name, start) for label, name in field.names.items()}
    return tables.evaluation(
        {
            "warning": " ".join(f"{label}: {text}" for label, text in warnings.items() if text),
            "timeframe": timeframe.text,
            "stride": step,
            "horizons": list(card.horizons),
            "levels": list(card.levels),
            "symbols": sorted(set(found.symbols)),
            "models": {label: f.card.model for label, f in field.forecasters.items()},
            "baselines": [label for label, name in field.names.items() if name in BASELINES],
            "reference": REFERENCE,
            "volatility": volatility,
            "folds": [
                {"fold": str(k + 1), "since": iso(a), "until": iso(b)}
                for k, (a, b) in enumerate(pairwise(edges))
            ],
            "left_out": field.left_out,
            "withheld": withheld,
        },
        joint,
    )


def _usable(found: Forecasts, labels: Sequence[str]) -> tuple[Forecasts, dict[str, int], NDArray[np.bool_]]:
    """The origins at which all models forecast something usable, at how many each did not, and which."""
    good = [(np.abs(q) < FAR).all((1, 2)) for q in found.quantiles]  # not of nan
    withheld = {label: int((~g).sum()) for label, g in zip(labels, good, strict=True) if not g.all()}
    keep = np.logical_and.reduce(good)
    if not keep.any():
        raise DataError(f"{', '.join(withheld)}: no usable forecast at any origin; leave the model out.")
    if not withheld:
        return found, {}, keep
    symbols = tuple(s for s, k in zip(found.symbols, keep, strict=True) if k)
    quantiles = [q[keep] for q in found.quantiles]
    return Forecasts(found.outcomes[keep], quantiles, symbols, found.close_times[keep]), withheld, keep


class _Tables:
    """Collects rows; the state is the lists that become the frames of an `Evaluation`."""

    def __init__(self, labels: Sequence[str], horizons: Sequence[int], levels: Sequence[float]) -> None:
        self.labels, self.horizons, self.levels = labels, horizons, np.array(levels)
        self.scores: list[dict[str, object]] = []
        self.gains: list[dict[str, object]] = []
        self.thirds: list[dict[str, object]] = []
        self.shares: list[dict[str, object]] = []
        self.bins: list[dict[str, object]] = []

    def fold(self, name: str, found: Forecasts, chosen: NDArray[np.bool_], stride: int) -> None:
        """Score the chosen origins (n,) as one fold."""
        moments, at = np.unique(found.close_times[chosen], return_inverse=True)
        T = len(moments)
        edges = np.concatenate([[0.0], self.levels, [1.0]])
        for j, h in enumerate(self.horizons):
            lags = lag(h, stride, T)
            y = found.outcomes[chosen, j]
            quantiles = {m: q[chosen, j] for m, q in zip(self.labels, found.quantiles, strict=True)}
            losses = {m: crps(y, q, self.levels) for m, q in quantiles.items()}
            for model, q in quantiles.items():
                key = {"fold": name, "horizon": h, "model": model}
                below = [mean(y <= q[:, k], at, T, lags) for k in range(len(self.levels))]
                share = np.array([b.value for b in below])
                skill = gain(losses[model], losses[REFERENCE], at, T, lags)
                self.scores.append(
                    {
                        **key,
                        "n": len(y),
                        "times": T,
                        "crps": float(losses[model].mean()),
                        "skill": 100 * skill.value,
                        "skill_error": 100 * skill.error,
                        **self._coverage(y, q, at, T, lags),
                        "worst": float(np.abs(share - self.levels).max()),
                        **self._direction(y, q, at, T, lags),
                    }
                )
                self.shares += [
                    {**key, "level": level, "below": b.value, "error": b.error}
                    for level, b in zip(self.levels.tolist(), below, strict=True)
                ]
                self.bins += [
                    {**key, "lower": a, "upper": b, "share": s, "density": s / (b - a)}
                    for (a, b), s in zip(pairwise(edges.tolist()), pit(share).tolist(), strict=True)
                ]
                for other in self.labels:
                    if other != model:
                        saved = gain(losses[model], losses[other], at, T, lags)
                        values = {"gain": 100 * saved.value, "error": 100 * saved.error}
                        self.gains.append({**key, "other": other, **values})

    def by_volatility(self, found: Forecasts, model: str, stride: int) -> None:
        """Coverage in calm, middle and volatile times, over all folds."""
        moments, at = np.unique(found.close_times, return_inverse=True)
        widths = found.quantiles[self.labels.index(model)]
        for j, h in enumerate(self.horizons):
            if (pair := interval(self.levels, 80)) is None:
                return
            third = thirds(widths[:, j, pair[1]] - widths[:, j, pair[0]], found.symbols)
            lags = lag(h, stride, len(moments))
            for label, q in zip(self.labels, found.quantiles, strict=True):
                for k, name in enumerate(THIRDS):
                    own = third == k
                    covered = self._coverage(found.outcomes[own, j], q[own, j], at[own], len(moments), lags)
                    key = {"horizon": h, "model": label, "third": name, "n": int(own.sum())}
                    self.thirds.append({**key, **covered})

    def evaluation(self, meta: dict[str, object], joint: Mapping[str, pl.DataFrame]) -> Evaluation:
        """The rows as frames."""
        return Evaluation(
            scores=pl.DataFrame(self.scores, infer_schema_length=None),
            gains=pl.DataFrame(self.gains, infer_schema_length=None),
            thirds=pl.DataFrame(self.thirds, infer_schema_length=None),
            levels=pl.DataFrame(self.shares, infer_schema_length=None),
            pit=pl.DataFrame(self.bins, infer_schema_length=None),
            meta=meta,
            **joint,
        )

    def _coverage(
        self, y: Array, q: Array, at: NDArray[np.intp], times: int, lags: int
    ) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for percent in INTERVALS:
            pair = interval(self.levels, percent)
            if pair is None:
                found |= {f"coverage_{percent}": None, f"coverage_{percent}_error": None}
                continue
            inside = mean((y >= q[:, pair[0]]) & (y <= q[:, pair[1]]), at, times, lags)
            found |= {f"coverage_{percent}": inside.value, f"coverage_{percent}_error": inside.error}
        return found

    def _direction(
        self, y: Array, q: Array, at: NDArray[np.intp], times: int, lags: int
    ) -> dict[str, float | None]:
        middle = np.flatnonzero(self.levels == 0.5)
        side = np.sign(y) * np.sign(q[:, middle[0]]) if len(middle) else np.zeros(len(y))
        if not side.any():
            return {"direction": None, "direction_error": None}
        right = mean(side[side != 0] > 0, at[side != 0], times, lags)
        return {"direction": right.value, "direction_error": right.error}


def _finite(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))
