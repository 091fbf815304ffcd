"""The books of a backtest: a sink that fills targets, marks positions and keeps what scores need.

The rules. An order is fixed when it is decided: its value is the leverage x the book's equity at that close x
target / number of symbols seen up to then. At the market it is filled by the next accepted bar of its symbol,
at its open or close: `value / price` units are held, whatever the price did in between. What a bar's volume
leaves over of these units waits for the bar after it. A limit order is for `value / reference` units, and
lapses after one bar. An order waits for its symbol's next bar, however long, and takes its room until then.
A newer order of the symbol replaces one not filled yet; a symbol without a target in a group keeps what it
has, an open order too.

Costs are paid in cash. A book without equity left only closes positions. At a decision the values held, or
ordered where an order is in force, may not exceed the leverage x equity in all: what is ordered beyond what
is held on the same side is scaled down together until they do not, and nothing is sold for it.

Each group's close marks the book: what was held at that close, at the newest accepted closes up to it. A bar
that came only after the mark of its close fills nothing, so that a mark is final. Forecasts are scored with
the symbol's own bars as first accepted; corrections and bars out of order change neither fills nor scores.
The book `BENCHMARK` holds equal parts of all symbols seen, without leverage and always at the market: ordered
at the first group that is forecast, and parted anew only when another symbol is seen.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from math import copysign, exp, isfinite
from operator import attrgetter, itemgetter, mul
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.result import level_column, outlook_columns
from barcast.backtest.tables import Rows, Store, between, collected, joined
from barcast.daemon.calendar import iso
from barcast.daemon.history import PRICES
from barcast.daemon.ports import Outcome
from barcast.models import Adjustment, Bar, ConfigError, Forecast
from barcast.models.joint import Outlook

BENCHMARK = "buy-and-hold"
"""The book that every strategy is compared with."""

DUST = 1e-9
"""A change of a position by no more than this share of it is rounding, and is not traded."""

YEAR = 365.25 * 86_400 * 1e9
"""Nanoseconds in a year of borrowing."""

PENDING = 10_000
"""Bars after which what is known of them goes to tables: objects take several times as much memory."""

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
BARS = pl.Schema(
    {
        "symbol": pl.String(),
        "close_time": TIME,
        "open": pl.Float64(),
        "high": pl.Float64(),
        "low": pl.Float64(),
        "close": pl.Float64(),
        "basis": pl.Float64(),
    }
)
TARGETS = pl.Schema(
    {"strategy": pl.String(), "symbol": pl.String(), "close_time": TIME, "target": pl.Float64()}
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
        "warming": pl.Boolean(),
        "degraded": pl.String(),
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

_FILLS = ("next-open", "next-close", "limit")
_FROM_ZERO = ("commission_bp", "spread_bp", "slippage_bp", "impact", "borrow")


@dataclass(frozen=True, slots=True)
class Execution:
    """How orders are filled, what they cost, and how much may be held.

    - `fill`: `next-open` and `next-close` fill at these prices of the next bar. `limit` buys at the price
      that the forecast of the shortest horizon has at `limit_level`, and sells at that of 1 - `limit_level`
      (linear between levels), when the next bar trades through it: at the limit, or at a better open.
    - `commission_bp`, `spread_bp`, `slippage_bp`: basis points of the traded value. A fill pays half of the
      spread; that of a limit order pays neither spread nor slippage nor impact.
    - `impact`: fraction of the price that trading the whole volume of a bar would cost; the cost grows with
      the square of the share of the volume (zipline's VolumeShareSlippage) and counts as slippage.
    - `volume_share`: the most of a bar's volume that one fill takes; a bar without volume then fills nothing.
    - `borrow`: a year, on the value of shorts and on cash below zero. `funding`: a year, longs pay it and
      shorts receive it. Both are shares (0.02), for the time from mark to mark, of the values at the later.
    - `leverage`: what targets of 1 in every symbol hold in all, as a multiple of the equity, and the most.
    - `capital`: the cash that each book begins with.

    Raise ConfigError for a value that cannot be.
    """

    fill: str = "next-open"
    limit_level: float = 0.25
    commission_bp: float = 1.0
    spread_bp: float = 0.0
    slippage_bp: float = 2.0
    impact: float = 0.0
    volume_share: float | None = None
    borrow: float = 0.0
    funding: float = 0.0
    leverage: float = 1.0
    capital: float = 1_000_000.0

    def __post_init__(self) -> None:
        if self.fill not in _FILLS:
            raise ConfigError(f"fill = {self.fill!r}: take one of {', '.join(_FILLS)}")
        for name in (setting.name for setting in fields(self)):
            value = getattr(self, name)
            if name == "fill" or (name == "volume_share" and value is None):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            if name in _FROM_ZERO:
                good, remedy = number and value >= 0, "a number from 0"
            elif name == "limit_level":
                good, remedy = number and 0 < value < 1, "a number between 0 and 1"
            elif name == "volume_share":
                good, remedy = number and 0 < value <= 1, "a share above 0 and up to 1, or none"
            elif name == "funding":
                good, remedy = number, "a finite number"
            else:
                good, remedy = number and value > 0, "a number above 0"
            if not good:
                raise ConfigError(f"{name} = {value!r}: give {remedy}")
        if self.impact and self.volume_share is None:
            raise ConfigError(
                f"impact = {self.impact!r}: it grows with the share of a bar's volume, which nothing bounds; "
                "give volume_share, the most of it that one fill takes, too"
            )

    def limit_at(self, buy: bool, levels: Sequence[float]) -> float:
        """The level at which to buy or sell. Raise ConfigError for one that is not among the model's."""
        lowest, highest = levels[0], levels[-1]
        level = self.limit_level if buy else round(1 - self.limit_level, 12)
        if not lowest <= level <= highest:
            least, most = max(lowest, round(1 - highest, 12)), min(highest, round(1 - lowest, 12))
            raise ConfigError(
                f"limit_level = {self.limit_level:g}: an order needs the quantile at {level:g}, and the "
                f"model forecasts {lowest:g} to {highest:g}: take one from {least:g} to {most:g}"
            )
        return level

    def limit_return(self, forecast: Forecast, buy: bool) -> float:
        """The log return from the reference at which to buy or sell. Raise as `limit_at` does."""
        level = self.limit_at(buy, forecast.levels)
        shortest = forecast.horizons.index(min(forecast.horizons))
        return float(np.interp(level, forecast.levels, forecast.quantiles[shortest]))


class _Order(msgspec.Struct, gc=False):
    """What is wanted of one symbol since the close `decided`: a position of `value`.

    `units` are those wanted, once a price has fixed them, and `limit` is the price of a limit order to `buy`
    or sell, both on the basis of the symbol's first bar.
    """

    decided: int
    value: float
    units: float | None = None
    limit: float | None = None
    buy: bool = False


class _Book:
    """One strategy's money.

    The state is the open orders, the units held now, what was held at the last mark with the cash and equity
    then, the fills that were not part of a mark yet, and the newest rows of what was done, the older of which
    are in tables. Units are held on the price basis of each symbol's first bar, so that a split changes none
    of them.
    """

    def __init__(self, name: str, execution: Execution, store: Store) -> None:
        self.name, self.execution = name, execution
        self.filled, self.equities = store.table(FILLS), store.table(EQUITY)
        self.orders: dict[str, _Order] = {}
        self.units: dict[str, float] = {}
        self.held: dict[str, float] = {}
        self.cash = self.equity = execution.capital
        self.marked = -1
        self.unmarked: list[tuple[int, str, float, float]] = []
        self.fills: list[Any] = []  # row after row: a tuple for each takes several times as long to read
        self.marks: list[Any] = []

    def shelve(self) -> None:
        """Put the rows into the tables."""
        named = pl.lit(self.name).alias("strategy")
        for rows, table, schema in ((self.fills, self.filled, FILLS), (self.marks, self.equities, EQUITY)):
            own = pl.Schema({name: dtype for name, dtype in schema.items() if name != "strategy"})
            table.add(_frame(rows, own).select(named, pl.all()))
        self.fills, self.marks = [], []

    def fill(self, came: Sequence[tuple[Bar, float]]) -> None:
        """Fill the open orders of the symbols of bars, in order, as far as each bar lets it.

        Beside each bar is its price basis.
        """
        orders, execution, held_of = self.orders, self.execution, self.units.get
        fills, unmarked, marked = self.fills, self.unmarked, self.marked
        at_close, share, impact = execution.fill == "next-close", execution.volume_share, execution.impact
        commission_bp, spread_bp, slippage_bp = (
            execution.commission_bp,
            execution.spread_bp,
            execution.slippage_bp,
        )
        for bar, basis in came:
            symbol, close_time = bar.symbol, bar.close_time
            order = orders.get(symbol)
            if order is None:
                continue
            limit = order.limit
            if limit is not None:
                del orders[symbol]
            if close_time <= marked:
                continue
            if limit is None:
                price = bar.close if at_close else bar.open
            else:
                limit *= basis
                if (bar.low >= limit) if order.buy else (bar.high <= limit):
                    continue
                price = min(bar.open, limit) if order.buy else max(bar.open, limit)
            most = None if share is None else share * bar.volume
            if most == 0:
                continue
            if order.units is None:
                order.units = order.value / price * basis
            held, position = held_of(symbol, 0.0) / basis, order.units / basis
            units = position - held
            if most is None or abs(units) <= most:
                orders.pop(symbol, None)
            else:
                units = copysign(most, units)
                position = held + units
            if abs(units) <= DUST * max(abs(position), abs(held)):
                continue
            traded = abs(units) * price
            commission, spread, slippage = traded * commission_bp / 1e4, 0.0, 0.0
            if limit is None:
                spread = traded * spread_bp / 2e4
                slippage = traded * slippage_bp / 1e4
                if impact:
                    slippage += impact * (units / bar.volume) ** 2 * traded
            now = self.units[symbol] = position * basis
            paid = units * price + commission + spread + slippage
            unmarked.append((close_time, symbol, paid, now))
            fills += (symbol, order.decided, close_time, price, units)
            fills += (commission, spread, slippage, position, basis)

    def mark(self, time: int, prices: Mapping[str, float]) -> None:
        """Count the fills up to the close `time`, take the carry, and note what that makes of the book.

        `prices` are those of that close, on the basis of the first bar. Without equity left, orders that do
        not close a position are dropped.
        """
        newer = []
        for fill in self.unmarked:
            filled, symbol, paid, units = fill
            if filled > time:
                newer.append(fill)
                continue
            self.cash -= paid
            self.held[symbol] = units
            if not units:
                del self.held[symbol]
        self.unmarked = newer
        longs = shorts = 0.0
        for symbol, units in self.held.items():
            if units > 0:
                longs += units * prices[symbol]
            else:
                shorts -= units * prices[symbol]
        carry, execution = 0.0, self.execution
        if self.marked >= 0:
            borrowed = shorts + max(0.0, -self.cash)
            rate = execution.borrow * borrowed + execution.funding * (longs - shorts)
            carry = rate * ((time - self.marked) / YEAR)
        self.marked = time
        self.cash -= carry
        equity = self.equity = self.cash + longs - shorts
        gross = net = 0.0
        if equity > 0:
            gross, net = (longs + shorts) / equity, (longs - shorts) / equity
        else:
            self.orders = {symbol: order for symbol, order in self.orders.items() if order.value == 0}
        self.marks += (time, self.cash, equity, gross, net, carry)

    def values(self, targets: Mapping[str, float], prices: Mapping[str, float]) -> dict[str, float]:
        """The value to hold of each symbol with a target, within the leverage, as of the last mark."""
        most = max(0.0, self.equity) * self.execution.leverage
        each = most / len(prices)
        wanted = {symbol: each * target for symbol, target in targets.items()}
        if len(wanted) == len(prices):
            return wanted
        worth = {symbol: units * prices[symbol] for symbol, units in self.held.items()}
        kept = worth | {symbol: order.value for symbol, order in self.orders.items()}
        # The middle of the three: as much of what is wanted as is held on that side already.
        base = {symbol: sorted((0.0, value, worth.get(symbol, 0.0)))[1] for symbol, value in wanted.items()}
        used = sum(abs(value) for symbol, value in kept.items() if symbol not in wanted)
        room = max(0.0, most - used - sum(map(abs, base.values())))
        growth = sum(abs(value - base[symbol]) for symbol, value in wanted.items())
        if growth <= room:
            return wanted
        part = room / growth
        return {symbol: base[symbol] + part * (value - base[symbol]) for symbol, value in wanted.items()}


class Ledger:
    """A sink with one book for each strategy, and the benchmark's.

    The state is the books, the number of symbols among which the benchmark's was parted, the bars that came
    and have filled nothing yet (before all else that is done with the books, they do), the accepted bars
    with the price basis of each, of each symbol the newest one and its close on the basis of the first bar,
    the newest close time of all, the adjustments declared (time -> factor) with the price basis that follows
    from them (times, factors after each), the forecasts made with what flags them, and the targets wanted.
    What is older than some thousand bars is in tables of the `store`, and of these bars the newest of each
    symbol stays beside: no group may come then for a close before that.
    """

    def __init__(self, execution: Execution, store: Store | None = None) -> None:
        self.execution = execution
        self._store = store or Store()
        self._bars, self._signals, self._wanted = map(self._store.table, (BARS, SIGNALS, TARGETS))
        self._pending = 0
        self._books: dict[str, _Book] = {}
        self._parted = 0
        self._came: list[Bar] = []
        self._accepted: list[tuple[Bar, float]] = []
        self._last: dict[str, tuple[Bar, float]] = {}
        self._shelved: dict[str, tuple[Bar, float]] = {}
        self._prices: dict[str, float] = {}
        self._newest = -1
        self._adjustments: dict[str, dict[int, float]] = {}
        self._bases: dict[str, tuple[Sequence[int], Sequence[float]]] = {}
        self._forecasts: dict[tuple[tuple[int, ...], tuple[float, ...], str], _Forecasts] = {}
        self._outlooks: dict[tuple[str, int], Outlook] = {}
        self._targets: list[tuple[str, int, Mapping[str, float]]] = []
        self._flags: dict[tuple[str, int], tuple[bool, str]] = {}

    def accepted(self, bar: Bar) -> None:
        """Keep the bar; it fills the open orders of its symbol before anything else is done."""
        self._came.append(bar)

    def _fill(self) -> None:
        """Let the bars that came fill open orders."""
        if not self._came:
            return
        if self._bases:
            came = [(bar, self._basis(bar)) for bar in self._came]
        else:
            came = [(bar, 1.0) for bar in self._came]
        for book in self._books.values():
            if book.orders:
                book.fill(came)
        self._accepted += came
        self._last |= {known[0].symbol: known for known in came}
        self._prices |= {bar.symbol: bar.close / basis for bar, basis in came}
        self._newest = max(self._newest, max([bar.close_time for bar in self._came]))
        self._came.clear()

    def _basis(self, bar: Bar) -> float:
        """What costs at a bar what cost 1 before all adjustments."""
        times, factors = self._bases.get(bar.symbol, ((), (1.0,)))
        return factors[bisect_left(times, bar.close_time)]

    def adjusted(self, adjustment: Adjustment) -> None:
        """Count what bars cost after the adjustment's time on the basis of the bars before it."""
        self._fill()
        known = self._adjustments.setdefault(adjustment.symbol, {})
        known[adjustment.time] = adjustment.factor
        times = sorted(known)
        self._bases[adjustment.symbol] = (times, [*accumulate((known[t] for t in times), mul, initial=1.0)])

    async def emit(self, outcome: Outcome) -> None:
        """Keep the forecasts, mark every book at the group's close and place the orders of its targets.

        Raise ConfigError for a strategy with the benchmark's name and for a limit level that the model does
        not forecast, ValueError for a target that is not in [-1, 1] or of a symbol without a forecast.
        """
        self._fill()
        if outcome.forecasts:
            card = outcome.card
            kind = card.horizons, card.levels, card.model
            if kind not in self._forecasts:
                self._forecasts[kind] = _Forecasts(*kind)
            self._forecasts[kind].add([*outcome.forecasts.values()])
        self._outlooks |= {(name, outcome.group.close_time): said for name, said in outcome.outlooks.items()}
        for name, forecast in outcome.forecasts.items():
            if forecast.warming or name in outcome.degraded:
                reasons = "; ".join(outcome.degraded.get(name, ()))
                self._flags[name, outcome.group.close_time] = forecast.warming, reasons
        if outcome.group.straggler:
            return
        close_time = outcome.group.close_time
        for strategy, targets in outcome.targets.items():
            self._check(strategy, targets, outcome)
            self._targets.append((strategy, close_time, targets))
            if strategy not in self._books:
                self._books[strategy] = _Book(strategy, self.execution, self._store)
        if outcome.forecasts and BENCHMARK not in self._books:
            market = "next-close" if self.execution.fill == "next-close" else "next-open"
            execution = replace(self.execution, fill=market, leverage=1.0)
            self._books[BENCHMARK] = _Book(BENCHMARK, execution, self._store)
        prices = self._prices
        if close_time < self._newest:
            known = {symbol: self._up_to(symbol, close_time) for symbol in self._last}
            prices = {symbol: at[0].close / at[1] for symbol, at in known.items() if at is not None}
        for strategy, book in self._books.items():
            book.mark(close_time, prices)
            if strategy != BENCHMARK:
                wanted = outcome.targets.get(strategy)
            else:
                wanted = dict.fromkeys(prices, 1.0) if len(prices) > self._parted else None
                self._parted = len(prices)
            if wanted:
                values = book.values(wanted, prices)
                book.orders |= {symbol: _Order(close_time, value) for symbol, value in values.items()}
                if book.execution.fill == "limit":
                    for symbol in values:
                        self._limit(book.orders[symbol], book, outcome.forecasts[symbol])
        self._pending += len(outcome.group.symbols)
        if self._pending >= PENDING and close_time >= self._newest:
            self._shelve()

    def _up_to(self, symbol: str, time: int) -> tuple[Bar, float] | None:
        """The newest accepted bar of a symbol up to a close, and its price basis."""
        if self._last[symbol][0].close_time <= time:
            return self._last[symbol]
        for known in reversed(self._accepted):
            if known[0].symbol == symbol and known[0].close_time <= time:
                return known
        older = self._shelved.get(symbol)
        return older if older is not None and older[0].close_time <= time else None

    def _check(self, strategy: str, targets: Mapping[str, float], outcome: Outcome) -> None:
        if strategy == BENCHMARK:
            raise ConfigError(
                f"strategy name {BENCHMARK!r} is that of the book which others are compared with: "
                "give the strategy another name"
            )
        for symbol, target in targets.items():
            if symbol not in outcome.forecasts or not -1 <= target <= 1:
                raise ValueError(
                    f"strategy {strategy} wants {target} of {symbol} at {iso(outcome.group.close_time)}: "
                    "a target is from -1 to 1, of a symbol that is forecast"
                )

    def _limit(self, order: _Order, book: _Book, forecast: Forecast) -> None:
        """Make it a limit order, for the units that its value is at the reference price."""
        known = self._up_to(forecast.symbol, forecast.close_time)
        if known is None:
            raise RuntimeError(f"{forecast.symbol} is forecast, and has no bar up to then")
        reference = forecast.reference / known[1]
        order.units = order.value / reference
        order.buy = order.units > book.units.get(forecast.symbol, 0.0)
        order.limit = reference * exp(self.execution.limit_return(forecast, order.buy))

    async def settle(self, now: int) -> None:
        """A ledger outlives no process: there is nothing to make durable."""

    def fills(self) -> Rows:
        """The trades of each book, in order: see `BacktestResult.fills`."""
        self._shelve()
        return joined([book.filled for book in self._books.values()] or [self._store.table(FILLS)])

    def equity(self) -> Rows:
        """What each book was at each close: see `BacktestResult.equity`."""
        self._shelve()
        return joined([book.equities for book in self._books.values()] or [self._store.table(EQUITY)])

    def bars(self) -> Rows:
        """The accepted bars and the price basis of each: see `BacktestResult.bars`."""
        self._shelve()
        return self._bars.rows()

    def targets(self) -> Rows:
        """Every target of every strategy: see `BacktestResult.targets`."""
        self._shelve()
        return self._wanted.rows()

    def signals(self) -> Rows:
        """The forecasts, a row for each horizon: see `BacktestResult.signals`."""
        self._shelve()
        return self._signals.rows()

    def outcomes(self) -> Rows:
        """What became of the forecasts whose horizon has passed: see `BacktestResult.outcomes`.

        The bars are read backwards, so that those that a horizon reaches are there: the next of each symbol.
        """
        self._shelve()
        signals, parts = self._signals.rows(), self._bars.parts()
        reach = max(collected(signals.lazy().select(pl.col("horizon").unique()))["horizon"], default=0)
        tables, later = [self._store.table(OUTCOMES) for _ in parts], pl.DataFrame(schema=BARS)
        for part, table in zip(reversed(parts), reversed(tables), strict=True):
            bars = collected(part)
            ends, later = _outcomes(between(signals, bars), bars, later, reach)
            table.add(ends)
            self._store.settle()
        return joined(tables or [self._store.table(OUTCOMES)])

    def _shelve(self) -> None:
        """Put what is pending into the tables."""
        self._fill()
        self._pending = 0
        self._bars.add(self._newer_bars())
        self._signals.add(self._newer_signals())
        self._wanted.add(self._newer_targets())
        self._forecasts, self._outlooks, self._targets = {}, {}, []
        self._flags = {}
        self._accepted, self._shelved = [], dict(self._last)
        for book in self._books.values():
            book.shelve()
        self._store.settle()

    def _newer_bars(self) -> pl.DataFrame:
        """The accepted bars that are in no table yet."""
        if not self._accepted:
            return pl.DataFrame(schema=BARS)
        bars = [bar for bar, _ in self._accepted]
        columns = {name: [*map(attrgetter(name), bars)] for name in ("symbol", "close_time", *PRICES)}
        columns["basis"] = [basis for _, basis in self._accepted]
        return _framed(columns, BARS).sort("close_time", "symbol")

    def _newer_targets(self) -> pl.DataFrame:
        """The targets that are in no table yet."""
        wanted = [targets for _, _, targets in self._targets]
        given = pl.DataFrame(
            {
                "strategy": [name for name, _, _ in self._targets],
                "close_time": [t for _, t, _ in self._targets],
            },
            schema={"strategy": pl.String(), "close_time": pl.Int64()},
        )[np.repeat(np.arange(len(wanted)), [*map(len, wanted)])]
        columns = {
            "strategy": given["strategy"],
            "symbol": [*chain.from_iterable(wanted)],
            "close_time": given["close_time"],
            "target": [*chain.from_iterable(targets.values() for targets in wanted)],
        }
        return _framed(columns, TARGETS)

    def _newer_signals(self) -> pl.DataFrame:
        """The forecasts that are in no table yet."""
        frames = [own.frame(self._outlooks) for _, own in sorted(self._forecasts.items(), key=itemgetter(0))]
        if not frames:
            return pl.DataFrame(schema=SIGNALS)
        return self._flagged(pl.concat(frames, how="diagonal").sort("close_time", "symbol", "horizon"))

    def _flagged(self, signals: pl.DataFrame) -> pl.DataFrame:
        """Signals with what flags them, after their model."""
        rows = [(*of, *flags) for of, flags in self._flags.items()]
        whose = {name: SIGNALS[name] for name in ("symbol", "close_time", "warming", "degraded")}
        flags = pl.DataFrame(rows, schema=whose | {"close_time": pl.Int64()}, orient="row")
        flags = flags.with_columns(_utc("close_time"))
        last = signals.columns.index("model") + 1
        return signals.join(flags, on=["symbol", "close_time"], how="left", maintain_order="left").select(
            *signals.columns[:last],
            pl.col("warming").fill_null(False),
            pl.col("degraded").fill_null(""),
            *signals.columns[last:],
        )


class _Forecasts:
    """Forecasts of one model, by columns: to look at thousands of objects again takes longer."""

    def __init__(self, horizons: tuple[int, ...], levels: tuple[float, ...], model: str) -> None:
        self.horizons, self.levels, self.model = horizons, levels, model
        self.symbols: list[str] = []
        self.close_times: list[int] = []
        self.references: list[float] = []
        self.quantiles: list[NDArray[np.float64]] = []  # (N H, Q), those below (N H,) of each group
        self.mean: list[NDArray[np.float64]] = []
        self.std: list[NDArray[np.float64]] = []
        self.rise: list[NDArray[np.float64]] = []

    def add(self, forecasts: Sequence[Forecast]) -> None:
        """Add the forecasts of a group."""
        self.symbols += [forecast.symbol for forecast in forecasts]
        self.close_times += [forecast.close_time for forecast in forecasts]
        self.references += [forecast.reference for forecast in forecasts]
        self.quantiles.append(np.concatenate([forecast.quantiles for forecast in forecasts]))
        self.mean.append(np.concatenate([forecast.mean for forecast in forecasts]))
        self.std.append(np.concatenate([forecast.std for forecast in forecasts]))
        self.rise.append(np.concatenate([forecast.rise for forecast in forecasts]))

    def frame(self, outlooks: Mapping[tuple[str, int], Outlook]) -> pl.DataFrame:
        """A row for each horizon, with what the outlooks say, if there are any."""
        N, H = len(self.symbols), len(self.horizons)
        quantiles, mean, std, rise = map(np.concatenate, (self.quantiles, self.mean, self.std, self.rise))
        told = {level_column(level): quantiles[:, k] for k, level in enumerate(self.levels)}
        origins: dict[str, Any] = {
            "symbol": self.symbols,
            "close_time": self.close_times,
            "reference": np.array(self.references, float),
        }
        names = ["symbol", "close_time", "horizon", *told, "reference", "mean", "std", "rise", "model"]
        if outlooks:
            beside = outlook_columns(
                [outlooks[of] for of in zip(self.symbols, self.close_times, strict=True)]
            )
            origins |= beside
            names += beside
        figures = pl.DataFrame(
            {"horizon": np.tile(self.horizons, N), **told, "mean": mean, "std": std, "rise": rise}
        )
        rows = pl.DataFrame(origins)[np.repeat(np.arange(N), H)].with_columns(figures)
        return rows.with_columns(_utc("close_time"), model=pl.lit(self.model)).select(names)


def _outcomes(
    signals: pl.DataFrame, bars: pl.DataFrame, later: pl.DataFrame, reach: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The outcomes of the forecasts made at some bars, and of these and `later` the next `reach` of a symbol.

    `later` are the next bars of each symbol after `bars`, as far as there are any, at most `reach` of them.
    """
    place = pl.int_range(pl.len()).over("symbol")
    both = pl.concat([bars.select(*BARS), later]).with_columns(place=place)
    made = both.head(bars.height).select("symbol", "close_time", "place", "close", "basis")
    ends = both.select("symbol", "place", end_time="close_time", price="close", then="basis")
    found = (
        signals.select("symbol", "close_time", "horizon")
        .join(made, on=["symbol", "close_time"])
        .with_columns(pl.col("place") + pl.col("horizon"))
        .join(ends, on=["symbol", "place"])
        .sort("close_time", "symbol", "horizon")
    )
    ratio = found["price"] / found["close"] * (found["basis"] / found["then"])
    found = found.with_columns(pl.Series("outcome", np.log(ratio.to_numpy())))
    return found.select(*OUTCOMES), both.filter(pl.col("place") < reach).drop("place")


def _frame(values: Sequence[Any], schema: pl.Schema) -> pl.DataFrame:
    """Rows, value after value, whose times are nanoseconds."""
    return _framed({name: values[k :: len(schema)] for k, name in enumerate(schema)}, schema)


def _framed(columns: Mapping[str, Any], schema: pl.Schema) -> pl.DataFrame:
    """Columns whose times are nanoseconds."""
    plain = {name: pl.Int64() if dtype == TIME else dtype for name, dtype in schema.items()}
    return pl.DataFrame(columns, schema=plain, strict=False).cast(schema)


def _utc(name: str) -> pl.Expr:
    return pl.from_epoch(name, "ns").dt.replace_time_zone("UTC").alias(name)
