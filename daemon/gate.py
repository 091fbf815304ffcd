"""The gate: a challenger serves only if it is better than the champion on bars it has not learnt from."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from barcast.daemon.store import open_model
from barcast.models import Window

MIN_ORIGINS = 50
"""Fewer forecasts than this say nothing about which model is better."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate decided and on what evidence. The CRPS values are relative to the scale of each series."""

    accepted: bool
    reason: str
    challenger: str
    champion: str
    challenger_crps: float | None = None
    champion_crps: float | None = None
    origins: int = 0


def judge(
    challenger: Path, champion: str, histories: Mapping[str, Window], timeframe: str, margin: float
) -> Verdict:
    """Score both on the bars after the challenger's own training and validation part.

    The champion is a checkpoint directory or a baseline. The challenger needs the same horizons and
    levels and a CRPS below (1 - margin) times the champion's.
    """
    from barcast.models.checkpoint import load
    from barcast.models.evaluation import score

    new, old = open_model(str(challenger), timeframe, None, None), open_model(champion, timeframe, None, None)
    names = {"challenger": new.card.model, "champion": old.card.model}
    for what in ("horizons", "levels"):
        mine, theirs = getattr(new.card, what), getattr(old.card, what)
        if mine != theirs:
            return Verdict(accepted=False, reason=f"{what} {mine} are not the champion's {theirs}", **names)
    since = load(challenger).held_out_since
    until = max(window.close_time for window in histories.values())
    mine, theirs = (score(f, list(histories.values()), since=since, until=until) for f in (new, old))
    if mine.n < MIN_ORIGINS:
        return Verdict(
            accepted=False,
            reason=f"only {mine.n} forecasts to compare on; at least {MIN_ORIGINS} are needed",
            origins=mine.n,
            **names,
        )
    accepted = mine.crps < (1 - margin) * theirs.crps
    change = 100 * (mine.crps / theirs.crps - 1)
    return Verdict(
        accepted=accepted,
        reason=f"CRPS {change:+.2f} % against the champion; needs less than {-100 * margin:.2f} %",
        challenger_crps=float(f"{mine.crps:.6g}"),
        champion_crps=float(f"{theirs.crps:.6g}"),
        origins=mine.n,
        **names,
    )
