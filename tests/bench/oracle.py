"""How near the model comes to the truth, on bars of a process whose quantiles are known.

The oracle knows the parameters and the hidden state: nobody can forecast better. What lies between it and the
model is taken apart: the shape (the true scale with one shape for all), the scale (static knots over the
model's scale, with and without its level) and what the map and diffusion win back.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barcast.models import LEVELS, Forecaster, Window, open_model
from barcast.models.evaluation import Forecasts, collect
from barcast.models.scores import Estimate, crps, gain, lag, mean
from tests.bench.report import Row, Section, Target
from tests.bench.variants import FULL, Training, no_level
from tests.garch import Simulation, simulate

HORIZONS = (1, 4, 16)
SYMBOLS, BARS, TESTED, STRIDE = 4, 12_000, 2_000, 2
SHAPE_BARS = 2_000
"""Bars of each symbol, evenly spread, from which the one shape of all outcomes is taken."""
CENTRAL = ((0.5, 2, 4), (0.8, 1, 5), (0.9, 0, 6))
"""Intervals, and the places of their levels."""


def measure(tell: Callable[[str], None], _folder: Path) -> Section:
    """Train with the full budget on all but the newest bars, and score on these."""
    section = Section(
        "oracle",
        "CRPS over that of the oracle, ± Newey-West, and the coverage's distance from nominal in such errors",
        {
            "ratio_to_oracle": ("CRPS ratio", ".4f"),
            "error": ("±", ".4f"),
            **{f"coverage_{100 * p:.0f}": (f"{100 * p:.0f} %", ".1%") for p, _, _ in CENTRAL},
            "worst_coverage": ("worst, errors", ".1f"),
        },
    )
    simulations = [simulate(f"SYM{i}", BARS, 21, season=True) for i in range(SYMBOLS)]
    histories = [s.window for s in simulations]
    until = int(histories[0].close_times[-TESTED - 1])
    options: dict[str, Any] = {"timeframe": "1h", "horizons": HORIZONS, "levels": LEVELS, "until": until}
    still = Training((), ((no_level, ()),))
    forecasters: dict[str, tuple[Training | None, Forecaster]] = {
        "hs": (None, open_model("hs", "1h", None, None)),
        "har-s": (None, open_model("har-s", "1h", None, None)),
    }
    for what, training in (
        ("static map, scale without level", still),
        ("static map", Training(())),
        ("the product", FULL),
    ):
        tell(f"{what}: training")
        trained = training.run(None, histories, **options)
        if training is FULL:
            forecasters["the map alone"] = training, trained.forecaster("map", None, 0)
        forecasters[what] = training, trained.forecaster("model")
    found: dict[str, Forecasts] = {}
    for what, (changes, forecaster) in forecasters.items():
        tell(f"{what}: forecasts")
        found[what] = forecasts(changes, forecaster, histories, until)
    tell("oracle: paths")
    first = found["static map"]
    truth, deviation = oracle(simulations, first)
    y = first.outcomes
    shape = np.quantile(standardised(simulations, until), LEVELS, axis=0).T  # (H, Q)
    quantiles = {"oracle": truth, "true scale, one shape": deviation[..., None] * shape}
    quantiles |= {what: some.quantiles[0] for what, some in found.items()}
    for what, q in quantiles.items():
        for j, h in enumerate(HORIZONS):
            own = ratio(y[:, j], q[:, j], truth[:, j], first.close_times, h)
            raw = {"ratio_to_oracle": own.value, "error": own.error}
            raw |= covered(y[:, j], q[:, j], first.close_times, h)
            target = Target("ratio_to_oracle", 1.03, most=True) if what == "the product" else None
            section.rows.append(Row(f"{what}, {h} bars", raw, target=target))
    return section


def forecasts(
    training: Training | None, forecaster: Forecaster, histories: Sequence[Window], since: int
) -> Forecasts:
    """What a forecaster says from `since` on, under the changes with which it was trained."""
    until = histories[0].close_time
    if training is None:
        return collect([forecaster], histories, since=since, until=until, stride=STRIDE)
    with training.changed():
        return collect([forecaster], histories, since=since, until=until, stride=STRIDE)


def oracle(simulations: Sequence[Simulation], found: Forecasts) -> tuple[Any, Any]:
    """True quantiles (n, H, Q) and deviations (n, H) at the origins of some forecasts."""
    parts = []
    for s in simulations:
        own = found.close_times[np.array(found.symbols) == s.window.symbol]
        parts.append(s.outlook(np.searchsorted(s.window.close_times, own), HORIZONS, LEVELS))
    return np.concatenate([q for q, _ in parts]), np.concatenate([sd for _, sd in parts])


def standardised(simulations: Sequence[Simulation], until: int) -> Any:
    """Outcomes over their true deviation, (n, H), of bars that close by `until`."""
    parts = []
    for s in simulations:
        price = np.log(s.window.values[:, 3])
        end = int(np.searchsorted(s.window.close_times, until, "right")) - max(HORIZONS)
        at = np.linspace(0, end - 1, SHAPE_BARS).astype(np.int64)
        y = np.stack([price[at + h] - price[at] for h in HORIZONS], 1)
        parts.append(y / s.outlook(at, HORIZONS, LEVELS)[1])
    return np.concatenate(parts)


def ratio(y: Any, q: Any, truth: Any, close_times: Any, h: int) -> Estimate:
    """The CRPS of quantiles over that of the true ones, at one horizon."""
    times, at = np.unique(close_times, return_inverse=True)
    mine, theirs = crps(y, q, LEVELS), crps(y, truth, LEVELS)
    own = gain(mine, theirs, at, len(times), lag(h, STRIDE, len(times)))
    return Estimate(1 - own.value, own.error)


def covered(y: Any, q: Any, close_times: Any, h: int) -> dict[str, float]:
    """Coverage of the central intervals at one horizon, and the largest distance from nominal in errors."""
    times, at = np.unique(close_times, return_inverse=True)
    found, worst = {}, 0.0
    for p, low, high in CENTRAL:
        inside = (y >= q[:, low]) & (y <= q[:, high])
        share = mean(inside, at, len(times), lag(h, STRIDE, len(times)))
        found[f"coverage_{100 * p:.0f}"] = share.value
        worst = max(worst, abs(share.value - p) / share.error)
    return found | {"worst_coverage": worst}
