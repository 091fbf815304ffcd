"""The gate: a challenger serves only if it is better than the champion on bars it has not learnt from."""

from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from barcast.daemon.calendar import iso
from barcast.models import BASELINES, ConfigError, DataError, Forecaster, Window, even_stride, open_model
from barcast.models.evaluation import COSTLY_BARS, Forecasts, collect, newest
from barcast.models.forecast import FAR
from barcast.models.scores import crps, gain, lag

MIN_ORIGINS = 50
"""Fewer forecasts than this say nothing about which model is better."""
MAX_ORIGINS = 1500
"""Of more bars than this, about so many are origins, evenly spread: the verdict must not take an hour."""
MARGIN = 0.002
"""What a challenger must gain unless the configuration says. The gain of a training over the last one has an
error of 0.1 to 0.4 %: without a margin, one that is only as good would take over every second time."""
RIVALS = ("hs", "fhs", "ewma", "har", "hs-s", "fhs-s", "ewma-s", "har-s")
"""Baselines that a challenger must not be behind, where they suit the timeframe; none needs an extra."""
DOUBT = 2.0
"""Standard errors by which it must be behind one to be refused: the best of eight is partly lucky."""

Array = NDArray[np.float64]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate decided and on what evidence. CRPS is divided by the mean absolute outcome.

    `gain` is the share by which the challenger's CRPS is below the champion's on the same origins, and
    `gain_error` its standard error (Newey and West). `baselines` are the CRPS of those that were beside them.
    `since` and `until` are the closes between which origins and outcomes lie. `triggers` say why it was
    trained.
    """

    accepted: bool
    reason: str
    challenger: str
    champion: str
    challenger_crps: float | None = None
    champion_crps: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    baselines: dict[str, float] = {}
    origins: int = 0
    since: str | None = None
    until: str | None = None
    triggers: tuple[str, ...] = ()


def judge(
    challenger: Path,
    champion: str,
    histories: Mapping[str, Window],
    timeframe: str,
    margin: float,
    sampler: str | None = None,
    steps: int | None = None,
    paths: bool = False,
    progress: Callable[[int, int, Window], None] = lambda _done, _all, _window: None,
) -> Verdict:
    """Score both, sampled as they would serve, on the bars after the training and validation part of either.

    With `paths` a challenger that forecasts none is refused before anything is scored. The champion is a
    checkpoint directory or a baseline. The challenger needs the same horizons and levels, a CRPS below
    (1 - margin) times the champion's, and one that is not clearly above that of any of `RIVALS`, by `DOUBT`
    standard errors of the paired difference.
    `progress` is told the forecasts made, those to make, and the window at hand.
    """
    from barcast.models.checkpoint import costly, load

    new, old = (open_model(name, timeframe, sampler, steps) for name in (str(challenger), champion))
    refused = Verdict(accepted=False, reason="", challenger=new.card.model, champion=old.card.model)
    if paths:
        try:
            open_model(str(challenger), timeframe, sampler, steps, paths)
        except ConfigError as error:
            return msgspec.structs.replace(refused, reason=str(error))
    until = max(window.close_time for window in histories.values())
    learnt = [name for name in (str(challenger), champion) if name not in BASELINES]
    trained = [load(Path(name)).trained for name in learnt]
    since = max(one.record.validation_end for one in trained)
    if any(map(costly, trained)):
        since = max(since, newest(histories.values(), COSTLY_BARS, max(new.card.horizons)))
    refused = msgspec.structs.replace(refused, since=iso(since), until=iso(until))
    bars = sum(int((w.close_times >= since).sum()) for w in histories.values())
    stride = even_stride(bars, MAX_ORIGINS)
    beside = rivals(timeframe, new.card.horizons, new.card.levels)
    beside.pop(champion, None)
    try:
        found = collect(
            [new, old, *beside.values()],
            list(histories.values()),
            since=since,
            until=until,
            stride=stride,
            progress=progress,
        )
    except (ConfigError, DataError) as error:
        return msgspec.structs.replace(refused, reason=str(error))
    fit, *others = (~(np.abs(q) < FAR).all((1, 2)) for q in found.quantiles)  # True also for nan
    kept = ~np.logical_or.reduce(others)
    if unusable := int((fit & kept).sum()):
        return msgspec.structs.replace(refused, reason=f"{unusable} of its forecasts can be no price")
    losses = _losses(found, kept, new.card.levels)
    size = len(losses[0])
    mine, theirs, *crpses = (float(loss.mean()) if size else nan for loss in losses)
    moments, at = np.unique(found.close_times[kept], return_inverse=True)
    lags = lag(max(new.card.horizons), max(1, int(stride)), len(moments))
    saved, *over = (gain(losses[0], other, at, len(moments), lags) for other in losses[1:])
    scores = dict(zip(beside, crpses, strict=True))
    ahead = {name: g for name, g in zip(beside, over, strict=True) if g.value < -DOUBT * g.error}
    accepted, reason = False, f"only {size} forecasts to compare on; at least {MIN_ORIGINS} are needed"
    if size >= MIN_ORIGINS:
        change = 100 * (mine / theirs - 1)
        needed = f"it must be more than {100 * margin:.2f} % below"
        accepted = mine < (1 - margin) * theirs
        reason = f"CRPS {abs(change):.2f} % {'below' if change < 0 else 'above'} the champion's; {needed}"
        if accepted and ahead:
            accepted = False
            best = min(ahead, key=scores.__getitem__)
            behind, doubt = -100 * ahead[best].value, 100 * ahead[best].error
            reason = f"CRPS {behind:.2f} ± {doubt:.2f} % above that of the baseline {best}"
    return msgspec.structs.replace(
        refused,
        accepted=accepted,
        reason=reason,
        challenger_crps=_short(mine),
        champion_crps=_short(theirs),
        gain=_short(saved.value),
        gain_error=_short(saved.error),
        baselines={name: _short(score) for name, score in scores.items()} if size else {},
        origins=size,
    )


def rivals(timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> dict[str, Forecaster]:
    """Those of `RIVALS` that suit the timeframe, forecasting these horizons and levels."""
    found: dict[str, Forecaster] = {}
    for name in RIVALS:
        try:
            found[name] = BASELINES[name](timeframe, horizons, levels)
        except ConfigError:  # it needs hours of the week
            continue
    return found


def _losses(found: Forecasts, kept: NDArray[np.bool_], levels: tuple[float, ...]) -> list[Array]:
    """The CRPS of each model at the origins kept, (n,), over the mean absolute outcome of each horizon."""
    y = found.outcomes[kept]
    size = np.abs(y).mean(0) if len(y) else np.ones(y.shape[1])
    scale = np.where(size > 0, size, 1.0)
    return [(crps(y, q[kept], levels) / scale).mean(1) for q in found.quantiles]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
