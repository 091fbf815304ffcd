"""The gate: a challenger serves only if it is better than the champion on bars it has not learnt from."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from barcast.models import BASELINES, ConfigError, DataError, Window, compare, even_stride, open_model

MIN_ORIGINS = 50
"""Fewer forecasts than this say nothing about which model is better."""
MAX_ORIGINS = 1500
"""Of more bars than this, about so many are origins, evenly spread: the verdict must not take an hour."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate decided and on what evidence. CRPS is divided by the mean absolute outcome."""

    accepted: bool
    reason: str
    challenger: str
    champion: str
    challenger_crps: float | None = None
    champion_crps: float | None = None
    origins: int = 0


def judge(
    challenger: Path,
    champion: str,
    histories: Mapping[str, Window],
    timeframe: str,
    margin: float,
    sampler: str | None = None,
    steps: int | None = None,
) -> Verdict:
    """Score both, sampled as they would serve, on the bars after the training and validation part of either.

    The champion is a checkpoint directory or a baseline. The challenger needs the same horizons and
    levels and a CRPS below (1 - margin) times the champion's.
    """
    from barcast.models.checkpoint import load

    new, old = (open_model(name, timeframe, sampler, steps) for name in (str(challenger), champion))
    refused = Verdict(accepted=False, reason="", challenger=new.card.model, champion=old.card.model)
    until = max(window.close_time for window in histories.values())
    learnt = [name for name in (str(challenger), champion) if name not in BASELINES]
    since = max(load(Path(name)).trained.record.validation_end for name in learnt)
    bars = sum(int((w.close_times >= since).sum()) for w in histories.values())
    stride = even_stride(bars, MAX_ORIGINS)
    try:
        mine, theirs = compare([new, old], list(histories.values()), since=since, until=until, stride=stride)
    except (ConfigError, DataError) as error:
        return msgspec.structs.replace(refused, reason=str(error))
    change = 100 * (mine.normalised / theirs.normalised - 1)
    if mine.n < MIN_ORIGINS:
        accepted, reason = False, f"only {mine.n} forecasts to compare on; at least {MIN_ORIGINS} are needed"
    else:
        needed = f"it must be more than {100 * margin:.2f} % below"
        accepted = mine.normalised < (1 - margin) * theirs.normalised
        reason = f"CRPS {abs(change):.2f} % {'below' if change < 0 else 'above'} the champion's; {needed}"
    return msgspec.structs.replace(
        refused,
        accepted=accepted,
        reason=reason,
        challenger_crps=float(f"{mine.normalised:.6g}"),
        champion_crps=float(f"{theirs.normalised:.6g}"),
        origins=mine.n,
    )
