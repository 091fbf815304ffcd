"""The books of a backtest: a sink that fills targets, marks positions and keeps what scores need.

The rules. An order's value is fixed when it is decided: the book's equity at that close x target / number of
symbols seen up to then. It is filled at the open of the next accepted bar of its symbol: `value / open`
units are held, whatever the price did in between. A newer order of the symbol replaces one not filled yet; a
symbol without a target in a group keeps what it has. Commission and slippage are basis points of the
traded value, paid in cash. A book without equity left only closes positions. Each group's close marks the
book: what was held at that close, at the newest accepted closes up to it. Forecasts are scored with the
symbol's own bars as first accepted; corrections and bars out of order change neither fills nor scores.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import polars as pl

from barcast.backtest.result import level_column
from barcast.daemon.calendar import iso
from barcast.daemon.ports import Outcome
from barcast.models import Adjustment, Bar, Forecast

BENCHMARK = "buy-and-hold"

TIME = pl.Datetime("ns", "UTC")
FILLS = pl.Schema(
    {
        "strategy": pl.String(),
        "symbol": pl.String(),
        "decided": TIME,
        "close_time": TIME,
        "price": pl.Float64(),
        "units": pl.Float64(),
        "commission": pl.Float64(),
        "spread": pl.Float64(),
        "slippage": pl.Float64(),
        "position": pl.Float64(),
        "basis": pl.Float64(),
    }
)
EQUITY = pl.Schema(
    {
        "strategy": pl.String(),
        "close_time": TIME,
        "cash": pl.Float64(),
        "equity": pl.Float64(),
        "gross": pl.Float64(),
        "net": pl.Float64(),
        "carry": pl.Float64(),
    }
)
SIGNALS = pl.Schema(
    {
        "symbol": pl.String(),
        "close_time": TIME,
        "horizon": pl.Int64(),
        "reference": pl.Float64(),
        "mean": pl.Float64(),
        "std": pl.Float64(),
        "rise": pl.Float64(),
        "model": pl.String(),
    }
)
"""Without the columns of the levels."""
OUTCOMES = pl.Schema(
    {
        "symbol": pl.String(),
        "close_time": TIME,
        "horizon": pl.Int64(),
        "end_time": TIME,
        "price": pl.Float64(),
        "outcome": pl.Float64(),
    }
)


@dataclass(frozen=True, slots=True)
class Fill:
    """`units` traded at `price`, the open of the bar that closed at `close_time`, and the costs in cash.

    `basis` is the price basis of that bar: what the symbol's first bar cost 1 would cost it now.
    """

    symbol: str
    decided: int
    close_time: int
    price: float
    units: float
    commission: float
    slippage: float
    position: float
    basis: float

    @property
    def paid(self) -> float:
        """What it took out of the cash."""
        return self.units * self.price + self.commission + self.slippage


@dataclass(slots=True)
class _Series:
    """The accepted closes of one symbol, in order of time, and the price basis of each."""

    times: list[int] = field(default_factory=list)
    closes: list[float] = field(default_factory=list)
    bases: list[float] = field(default_factory=list)

    def close_at(self, time: int) -> float:
        """The close up to `time`, on the basis of the first bar."""
        at = bisect_right(self.times, time) - 1
        return self.closes[at] / self.bases[at]


class _Book:
    """One strategy's money. The state is cash, units held, open orders, and what was done so far.

    Units are held on the price basis of each symbol's first bar, so that a split changes none of them.
    """

    def __init__(self, capital: float) -> None:
        self.capital = self.cash = capital
        self.newest = 0
        self.units: dict[str, float] = {}
        self.orders: dict[str, tuple[int, float]] = {}
        self.fills: list[Fill] = []
        self.marks: list[tuple[int, float, float, float, float, float]] = []

    def fill(self, bar: Bar, basis: float, commission: float, slippage: float) -> None:
        decided, value = self.orders.pop(bar.symbol)
        position = value / bar.open
        units = position - self.units.get(bar.symbol, 0.0) / basis
        if units == 0:
            return
        traded = abs(units) * bar.open
        paid = (traded * commission, traded * slippage)
        fill = Fill(bar.symbol, decided, bar.close_time, bar.open, units, *paid, position, basis)
        self.fills.append(fill)
        self.cash -= fill.paid
        self.units[bar.symbol] = position * basis
        self.newest = max(self.newest, bar.close_time)

    def mark(self, time: int, series: Mapping[str, _Series]) -> float:
        """Note and return the equity at the close `time`, as if nothing newer had come."""
        cash, units = self.cash, self.units
        if time < self.newest:
            cash, units = self.capital, {}
            for fill in self.fills:
                if fill.close_time <= time:
                    cash -= fill.paid
                    units[fill.symbol] = fill.position * fill.basis
        values = [held * series[symbol].close_at(time) for symbol, held in units.items() if held]
        equity = cash + sum(values)
        gross = sum(map(abs, values)) / equity if equity > 0 else 0.0
        net = sum(values) / equity if equity > 0 else 0.0
        self.marks.append((time, cash, equity, gross, net, 0.0))
        return equity


class Ledger:
    """A sink with one book for each strategy.

    The state is the books, the accepted closes of each symbol, the adjustments declared for it, and the
    forecasts made. `commission` and
    `slippage` are in basis points of the traded value; `capital` is what each book begins with.
    """

    def __init__(self, commission: float, slippage: float, capital: float = 1.0) -> None:
        self.commission, self.slippage, self.capital = commission, slippage, capital
        self._books: dict[str, _Book] = {}
        self._series: dict[str, _Series] = {}
        self._adjustments: dict[str, list[Adjustment]] = {}
        self._forecasts: list[tuple[str, Forecast]] = []

    def accepted(self, bar: Bar) -> None:
        """Fill the open orders of the bar's symbol at its open, and keep its close."""
        basis = 1.0
        if bar.symbol in self._adjustments:
            own = self._adjustments[bar.symbol]
            basis = prod(a.factor for a in own if a.time < bar.close_time)
        for book in self._books.values():
            if bar.symbol in book.orders:
                book.fill(bar, basis, self.commission / 1e4, self.slippage / 1e4)
        series = self._series.get(bar.symbol)
        if series is None:
            series = self._series[bar.symbol] = _Series()
        series.times.append(bar.close_time)
        series.closes.append(bar.close)
        series.bases.append(basis)

    def adjusted(self, adjustment: Adjustment) -> None:
        """Count what bars cost after the adjustment's time on the basis of the bars before it."""
        known = self._adjustments.setdefault(adjustment.symbol, [])
        known[:] = [*(other for other in known if other.time != adjustment.time), adjustment]

    async def emit(self, outcome: Outcome) -> None:
        """Keep the forecasts, mark every book at the group's close and place the orders of its targets.

        Raise ValueError for a target that is not in [-1, 1].
        """
        self._forecasts += [(outcome.card.model, forecast) for forecast in outcome.forecasts.values()]
        if outcome.group.straggler:
            return
        close_time = outcome.group.close_time
        for strategy, targets in outcome.targets.items():
            self._books.setdefault(strategy, _Book(self.capital))
            for symbol, target in targets.items():
                if not -1 <= target <= 1:
                    raise ValueError(
                        f"strategy {strategy} wants {target} of {symbol} at {iso(close_time)}, not -1 to 1"
                    )
        seen = sum(series.times[0] <= close_time for series in self._series.values())
        for strategy, book in self._books.items():
            each = max(0.0, book.mark(close_time, self._series)) / seen
            for symbol, target in outcome.targets.get(strategy, {}).items():
                book.orders[symbol] = (close_time, each * target)

    async def settle(self, now: int) -> None:
        """A ledger is in memory: there is nothing to make durable."""

    def fills(self) -> pl.DataFrame:
        """The trades, in order: see `BacktestResult.fills`."""
        rows = [
            (name, f.symbol, f.decided, f.close_time, f.price, f.units)  # noqa: RUF005
            + (f.commission, 0.0, f.slippage, f.position, f.basis)
            for name, book in self._books.items()
            for f in book.fills
        ]
        return pl.DataFrame(rows, schema=FILLS, orient="row")

    def equity(self) -> pl.DataFrame:
        """Cash, equity and gross exposure (share of equity) at each close: see `BacktestResult.equity`."""
        rows = [(name, *mark) for name, book in self._books.items() for mark in book.marks]
        return pl.DataFrame(rows, schema=EQUITY, orient="row")

    def signals(self) -> pl.DataFrame:
        """The forecasts, a row for each horizon: see `BacktestResult.signals`."""
        frames = []
        shapes = {(forecast.horizons, forecast.levels) for _, forecast in self._forecasts}
        for horizons, levels in sorted(shapes):
            H = len(horizons)
            made = [(m, f) for m, f in self._forecasts if (f.horizons, f.levels) == (horizons, levels)]
            own = [forecast for _, forecast in made]
            quantiles = np.concatenate([forecast.quantiles for forecast in own])  # (N H, Q)
            columns = {
                "symbol": np.repeat([forecast.symbol for forecast in own], H),
                "close_time": np.repeat([forecast.close_time for forecast in own], H),
                "horizon": np.tile(horizons, len(own)),
                **{level_column(level): quantiles[:, k] for k, level in enumerate(levels)},
                "reference": np.repeat([forecast.reference for forecast in own], H),
                "mean": np.concatenate([forecast.mean for forecast in own]),
                "std": np.concatenate([forecast.std for forecast in own]),
                "rise": np.concatenate([forecast.rise for forecast in own]),
                "model": np.repeat([model for model, _ in made], H),
            }
            frames.append(pl.DataFrame(columns).with_columns(_utc("close_time")))
        if not frames:
            return pl.DataFrame(schema=SIGNALS)
        return pl.concat(frames, how="diagonal").sort("close_time", "symbol", "horizon")

    def outcomes(self) -> pl.DataFrame:
        """What became of the forecasts whose horizon has passed: see `BacktestResult.outcomes`."""
        rows = []
        for _, forecast in self._forecasts:
            series = self._series[forecast.symbol]
            at = bisect_right(series.times, forecast.close_time) - 1
            for horizon in forecast.horizons:
                if at + horizon < len(series.times):
                    end, price = series.times[at + horizon], series.closes[at + horizon]
                    change = float(
                        np.log(price / series.closes[at] * (series.bases[at] / series.bases[at + horizon]))
                    )
                    rows.append((forecast.symbol, forecast.close_time, horizon, end, price, change))
        return pl.DataFrame(rows, schema=OUTCOMES, orient="row").sort("close_time", "symbol", "horizon")


def _utc(name: str) -> pl.Expr:
    return pl.from_epoch(name, "ns").dt.replace_time_zone("UTC").alias(name)
