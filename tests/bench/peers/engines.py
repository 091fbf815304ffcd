"""The same moving-average cross in other engines and in a plain loop: one run of one of them.

`python engines.py ENGINE BARS` runs it once and says on standard output, as JSON, what it took and what it
traded. It runs in an environment that holds the engines (requirements.txt) and not the product; nothing of
the product is imported here.

The rule: from the second bar on that has both averages, be long while the mean of the last 10 closes is above
that of the last 50, else flat; market orders. Timed is what a user would wait for, in CPU time of all threads
of the process: build the engine, run it, compute its own statistics. Imports and the conversion of bars to
the engine's own form are left out.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAST, SLOW = 10, 50
CAPITAL = 1_000_000
UNITS = 10
Times = NDArray[np.int64]
"""Closes of bars in nanoseconds, (N,)."""
Values = NDArray[np.float64]
"""Their open, high, low, close and volume, (N, 5)."""
Engine = tuple[Callable[[], Any], Callable[[Any], list[float]]]
"""What is timed, and what takes the prices of the entries, in order, out of its result."""


def plain(_closes: Times, values: Values) -> Engine:
    """The reference: a loop with orders filled at the next open."""
    rows = [(row[0], row[3]) for row in values.tolist()]

    def run() -> tuple[list[float], list[float]]:
        fast: deque[float] = deque(maxlen=FAST)
        slow: deque[float] = deque(maxlen=SLOW)
        cash, held, wanted = float(CAPITAL), 0, 0
        entries, equity = [], []
        for n, (open_, close) in enumerate(rows):
            if wanted != held:
                if wanted:
                    entries.append(open_)
                cash -= (wanted - held) * open_
                held = wanted
            fast.append(close)
            slow.append(close)
            if n >= SLOW:
                wanted = UNITS if sum(fast) / FAST > sum(slow) / SLOW else 0
            equity.append(cash + held * close)
        return entries, equity

    return run, lambda result: result[0]


def backtesting(closes: Times, values: Values) -> Engine:
    """backtesting.py."""
    import pandas as pd
    from backtesting import Backtest, Strategy

    names = ("Open", "High", "Low", "Close", "Volume")
    frame = pd.DataFrame(values, columns=names, index=pd.to_datetime(closes))

    def mean(x: Any, n: int) -> Any:
        return pd.Series(x).rolling(n).mean()

    class Cross(Strategy):
        def init(self) -> None:
            self.fast = self.I(mean, self.data.Close, FAST)
            self.slow = self.I(mean, self.data.Close, SLOW)

        def next(self) -> None:
            if self.fast[-1] > self.slow[-1]:
                if not self.position:
                    self.buy(size=UNITS)
            elif self.position:
                self.position.close()

    def run() -> Any:
        return Backtest(frame, Cross, cash=CAPITAL).run()

    return run, lambda stats: stats["_trades"].sort_values("EntryBar")["EntryPrice"].tolist()


def backtrader(closes: Times, values: Values) -> Engine:
    """Backtrader, without its standard observers, with two analyzers."""
    import backtrader as bt
    import pandas as pd

    names = ("open", "high", "low", "close", "volume")
    frame = pd.DataFrame(values, columns=names, index=pd.to_datetime(closes))

    class Cross(bt.Strategy):
        def __init__(self) -> None:
            self.fast, self.slow = bt.ind.SMA(period=FAST), bt.ind.SMA(period=SLOW)
            self.entries: list[float] = []

        def notify_order(self, order: Any) -> None:
            if order.status == order.Completed and order.isbuy():
                self.entries.append(order.executed.price)

        def next(self) -> None:
            if len(self) <= SLOW:
                return
            if self.fast[0] > self.slow[0]:
                if not self.position:
                    self.buy(size=UNITS)
            elif self.position:
                self.close()

    def run() -> Any:
        cerebro = bt.Cerebro(stdstats=False)
        cerebro.adddata(bt.feeds.PandasData(dataname=frame))
        cerebro.addstrategy(Cross)
        cerebro.addanalyzer(bt.analyzers.TradeAnalyzer)
        cerebro.addanalyzer(bt.analyzers.DrawDown)
        cerebro.broker.setcash(CAPITAL)
        return cerebro.run()[0]

    return run, lambda strategy: strategy.entries


def nautilus(closes: Times, values: Values) -> Engine:
    """nautilus_trader, without logs.

    A market order is filled at the close that it was decided at; whether it is long the strategy remembers,
    which is quicker than asking the portfolio.
    """
    import pandas as pd
    from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
    from nautilus_trader.config import LoggingConfig
    from nautilus_trader.indicators import SimpleMovingAverage
    from nautilus_trader.model.currencies import USD
    from nautilus_trader.model.data import BarType
    from nautilus_trader.model.enums import AccountType, OmsType, OrderSide
    from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
    from nautilus_trader.model.instruments import Equity
    from nautilus_trader.model.objects import Money, Price, Quantity
    from nautilus_trader.persistence.wranglers import BarDataWrangler
    from nautilus_trader.trading.strategy import Strategy

    venue = Venue("SIM")
    instrument = Equity(
        instrument_id=InstrumentId(Symbol("A"), venue),
        raw_symbol=Symbol("A"),
        currency=USD,
        price_precision=5,
        price_increment=Price.from_str("0.03125"),
        lot_size=Quantity.from_int(1),
        ts_event=0,
        ts_init=0,
    )
    kind = BarType.from_str("A.SIM-1-MINUTE-LAST-EXTERNAL")
    names = ("open", "high", "low", "close", "volume")
    frame = pd.DataFrame(values, columns=names, index=pd.to_datetime(closes, utc=True))
    bars = BarDataWrangler(kind, instrument).process(frame)

    class Cross(Strategy):
        def __init__(self) -> None:
            super().__init__()
            self.fast, self.slow = SimpleMovingAverage(FAST), SimpleMovingAverage(SLOW)
            self.long, self.seen = False, 0

        def on_start(self) -> None:
            self.register_indicator_for_bars(kind, self.fast)
            self.register_indicator_for_bars(kind, self.slow)
            self.subscribe_bars(kind)

        def on_bar(self, bar: Any) -> None:
            self.seen += 1
            if self.seen <= SLOW:
                return
            long = self.fast.value > self.slow.value
            if long != self.long:
                self.long = long
                side = OrderSide.BUY if long else OrderSide.SELL
                size = Quantity.from_int(UNITS)
                self.submit_order(self.order_factory.market(instrument.id, side, size))

    def run() -> Any:
        engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(bypass_logging=True)))
        engine.add_venue(
            venue,
            oms_type=OmsType.NETTING,
            account_type=AccountType.CASH,
            base_currency=USD,
            starting_balances=[Money(CAPITAL, USD)],
        )
        engine.add_instrument(instrument)
        engine.add_data(bars)
        engine.add_strategy(Cross())
        engine.run()
        return engine, engine.get_result()

    def entries(result: Any) -> list[float]:
        orders = [o for o in result[0].cache.orders() if o.side == OrderSide.BUY and o.is_closed]
        return [float(o.avg_px) for o in sorted(orders, key=lambda o: o.ts_init)]

    return run, entries


ENGINES: dict[str, Callable[[Times, Values], Engine]] = {
    "plain": plain,
    "backtesting": backtesting,
    "backtrader": backtrader,
    "nautilus_trader": nautilus,
}
"""By the name of the package; `plain` is of none."""


def measured(engine: Engine) -> dict[str, Any]:
    """Run once: CPU and wall seconds, entries, the sum of their prices, and the peak of resident memory.

    The peak is that of the process, with imports and data.
    """
    run, entries = engine
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    prices = entries(result)
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "entries": len(prices),
        "paid": sum(prices),
        "peak_mb": int(peak.split()[1]) / 1024,
    }


def read(path: str) -> tuple[Times, Values]:
    """Closes and values of the bars in a file."""
    with np.load(path) as file:
        return file["closes"], file["values"]


if __name__ == "__main__":
    name = sys.argv[1]
    found = measured(ENGINES[name](*read(sys.argv[2])))
    found["version"] = None if name == "plain" else version(name)
    print(json.dumps(found))
