"""The same moving-average cross here: the path that runs live, with a forecaster and a strategy for it.

`python -m tests.bench.peers.here JOB BARS` runs `path` or `backtest` once, as `engines` does.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl

from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.metrics import portfolio
from barcast.backtest.replay import arrivals, replay, run_backtest
from barcast.backtest.report import write_report
from barcast.backtest.result import BacktestResult
from barcast.backtest.tables import collected
from barcast.daemon.pipeline import Pipeline, Settings, StrategySettings
from barcast.daemon.ports import Activation, Event, Revision
from barcast.models import BASELINES, LEVELS, Bar, Card, Forecast, Window
from barcast.models.forecast import forecast_from
from tests.bench.peers.engines import FAST, SLOW, Engine, Times, Values, measured, read

SYMBOL = "A"
STRATEGY = StrategySettings(str(Path(__file__).with_name("long_flat.py")), "long-flat")
FREE = Execution(commission_bp=0, slippage_bp=0)
PERIODS_PER_YEAR = 365 * 24 * 60


class Cross:
    """A forecaster whose median says which average is higher; its spread means nothing."""

    card = Card("cross", "cross", "1m", (1,), LEVELS, SLOW + 1, SLOW + 1, "none", 0, 0, "")

    def __init__(self) -> None:
        spread, one, half = np.linspace(-1e-3, 1e-3, len(LEVELS)), np.array([1e-3]), np.array([0.5])
        self.says = {up: ((spread + up)[None], np.array([up]), one, half) for up in (-1e-4, 1e-4)}

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Compare the averages of each window."""
        return [self._one(window) for window in windows]

    def _one(self, window: Window) -> Forecast:
        closes = window.values[-SLOW:, 3].tolist()
        up = 1e-4 if sum(closes[-FAST:]) / FAST > sum(closes) / SLOW else -1e-4
        return forecast_from(self.card, window, *self.says[up])


def path(closes: Times, values: Values) -> Engine:
    """Bars through the path into the books, and the figures of the portfolio."""
    some = [Bar(SYMBOL, t, *row) for t, row in zip(closes.tolist(), values.tolist(), strict=True)]
    came: list[Event] = list(arrivals(some))

    def run() -> tuple[pl.DataFrame, pl.DataFrame]:
        pipeline, ledger = Pipeline(lambda *_: Cross()), Ledger(FREE)
        for event in _opening(int(closes[0])):
            list(pipeline.take(event))
        replay(came, pipeline, ledger)
        fills, equity = ledger.fills(), ledger.equity()
        return collected(fills), portfolio(equity, fills, PERIODS_PER_YEAR, 1)

    return run, lambda result: entries(result[0])


def backtest(closes: Times, values: Values) -> Engine:
    """All that `barcast backtest` does: from a file to scores and a report."""
    folder = Path(tempfile.mkdtemp(prefix="barcast-peers-"))
    names = ("open", "high", "low", "close", "volume")
    frame = pl.DataFrame(values, schema=names, orient="row")
    times = pl.Series("time", closes).cast(pl.Datetime("ns", "UTC"))
    frame.with_columns(times, symbol=pl.lit(SYMBOL)).write_parquet(folder / "bars.parquet")

    def run() -> BacktestResult:
        with patch.dict(BASELINES, {"cross": lambda *_: Cross()}):
            result = run_backtest(
                [folder / "bars.parquet"],
                stamp="close",
                model="cross",
                timeframe="1m",
                strategies=[STRATEGY],
                execution=FREE,
            )
        write_report(result, folder / "report.html", "cross")
        return result

    return run, lambda result: entries(result.fills)


def entries(fills: pl.DataFrame) -> list[float]:
    """What was paid where nothing was held before."""
    first = (pl.col("units") == pl.col("position")) & (pl.col("units") > 0)
    return fills.filter(first, strategy=STRATEGY.name)["price"].to_list()


def _opening(start: int) -> list[Event]:
    settings = Settings(
        root="bench",
        timeframe="1m",
        calendar="24x7",
        symbols=(SYMBOL,),
        max_wait=1,
        sampler=None,
        steps=None,
        strategies=(STRATEGY,),
    )
    return [Revision(start - 1, settings.encode()), Activation(start - 1, "cross", "", Cross.card.window)]


JOBS = {"path": path, "backtest": backtest}

if __name__ == "__main__":
    print(json.dumps(measured(JOBS[sys.argv[1]](*read(sys.argv[2])))))
