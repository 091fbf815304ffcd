"""What a backtest hands over to the report and to notebooks."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, slots=True, eq=False)
class BacktestResult:
    """Everything a replay over history recorded. Times are datetime[ns, UTC], returns are log returns.

    - `signals`: symbol, close_time, horizon (bars), a column for each level (`q05` ...), reference, mean,
      std, rise, model. One row a horizon.
    - `outcomes`: symbol, close_time, horizon, end_time, price and outcome (the log return of the symbol's own
      `horizon`-th next bar), of the forecasts whose horizon has passed.
    - `fills`: strategy, symbol, decided, close_time, price, units, commission, slippage, position.
    - `equity`: strategy, close_time, cash, equity, gross.
    - `trainings`: a row for each training that was over: asked, reasons, judged, accepted, challenger,
      champion, challenger_crps, champion_crps, gain and gain_error (shares of CRPS), origins, reason. An
      accepted challenger serves from `judged` on.
    - `scores`: a row for each symbol and horizon, see `scoring.scores`.
    - `portfolio`: a row for each strategy, see `scoring.portfolio`.
    - `meta`: what identifies the run: config, hashes, calendar, timeframe, costs.
    """

    signals: pl.DataFrame
    outcomes: pl.DataFrame
    fills: pl.DataFrame
    equity: pl.DataFrame
    trainings: pl.DataFrame
    scores: pl.DataFrame
    portfolio: pl.DataFrame
    meta: dict[str, object]


def level_column(level: float) -> str:
    """The column of a level: `q05` for 0.05, `q97.5` for 0.975."""
    percent = f"{100 * level:.6g}"
    return f"q0{percent}" if 100 * level < 9.9999995 else f"q{percent}"


def levels_of(columns: Sequence[str]) -> dict[float, str]:
    """The levels among a frame's columns, rising, and the column of each."""
    named = [name for name in columns if name[:1] == "q" and name[1:].replace(".", "", 1).isdigit()]
    return dict(sorted((round(float(name[1:]) / 100, 8), name) for name in named))
