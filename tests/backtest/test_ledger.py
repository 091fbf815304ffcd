"""The books by hand, rule by rule, and in the whole: what was traded, paid and held always adds up."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import exp, log

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from barcast.backtest.ledger import BENCHMARK, Execution, Ledger
from barcast.backtest.replay import drive
from barcast.daemon.ports import Group, Outcome, Term
from barcast.models import Adjustment, Bar, Card, ConfigError, Forecast

LEVELS = (0.05, 0.5, 0.95)
CARD = Card("m1", "numpy", "1d", (1, 2), LEVELS, 2, 1, "none", 0, 0, "here")
SYMBOLS = ("A", "B", "C")
TENTH = np.log([[0.9, 1.0, 1.1], [0.8, 1.0, 1.2]])
"""Quantiles of forecasts: 10 % down and up at the outer levels of the shorter horizon."""
BUY, SALE = (100 * exp(quantile) for quantile in TENTH[0][[0, 2]])
"""Limits of orders at the outer levels, from a price of 100."""
DAY = 86_400 * 10**9
YEAR = 31_557_600 * 10**9
FREE = Execution(commission_bp=0, slippage_bp=0, capital=1000)

Step = Bar | Adjustment | Outcome


def bar(
    symbol: str,
    time: int,
    open_price: float,
    close: float,
    low: float | None = None,
    high: float | None = None,
    volume: float = 1.0,
) -> Bar:
    low = min(open_price, close) if low is None else low
    high = max(open_price, close) if high is None else high
    return Bar(symbol, time, open_price, high, low, close, volume)


def replaced(one: Bar, time: int) -> Bar:
    return Bar(one.symbol, time, one.open, one.high, one.low, one.close, one.volume)


def outcome(
    time: int,
    targets: Mapping[str, Mapping[str, float]],
    references: Mapping[str, float] | None = None,
    straggler: bool = False,
) -> Outcome:
    """A due group; without references each symbol with a target is forecast from a price of 1."""
    if references is None:
        references = {symbol: 1.0 for wanted in targets.values() for symbol in wanted}
    row, pair = TENTH, np.array([0.5, 0.25])
    forecasts = {
        s: Forecast(s, time, reference, (1, 2), LEVELS, row, pair, pair, pair, False)
        for s, reference in references.items()
    }
    group = Group(time, time, tuple(references), straggler=straggler)
    terms = dict.fromkeys(references, Term((time + 1, time + 2), time + 1, time + 2))
    return Outcome("root", "1d", group, CARD, forecasts, {}, {}, {}, targets, terms)


def play(ledger: Ledger, step: Step) -> None:
    match step:
        case Bar():
            ledger.accepted(step)
        case Adjustment():
            ledger.adjusted(step)
        case _:
            drive(ledger.emit(step))


def run(execution: Execution, steps: Iterable[Step]) -> Ledger:
    ledger = Ledger(execution)
    for step in steps:
        play(ledger, step)
    return ledger


def fills(ledger: Ledger, *columns: str, strategy: str = "s") -> list[tuple[object, ...]]:
    frame = ledger.fills().filter(pl.col("strategy") == strategy)
    return frame.with_columns(pl.col("decided", "close_time").to_physical()).select(columns).rows()


def equity(ledger: Ledger, *columns: str, strategy: str = "s") -> list[tuple[object, ...]]:
    return ledger.equity().filter(pl.col("strategy") == strategy).select(columns).rows()


def approx(*rows: tuple[object, ...]) -> list[tuple[object, ...]]:
    return [tuple(pytest.approx(x) if isinstance(x, float) else x for x in row) for row in rows]


def test_by_hand() -> None:
    """Two symbols, one strategy: the fills, costs and equity are those worked out on paper."""
    ledger = run(
        Execution(commission_bp=10, spread_bp=4, slippage_bp=5, capital=1000),
        [
            bar("A", 1, 10, 10),
            bar("B", 1, 20, 20),
            outcome(1, {"s": {"A": 1.0, "B": -0.5}}),  # orders: A 500, B -250
            bar("A", 2, 12.5, 13),  # 40 units; costs 0.5 + 0.1 + 0.25
            bar("B", 2, 25, 24),  # -10 units; costs 0.25 + 0.05 + 0.125
            outcome(2, {"s": {"A": 0.0}}),
            bar("A", 3, 14, 99),  # sold; costs 0.56 + 0.112 + 0.28
            bar("B", 3, 22, 23),
            outcome(3, {}),
        ],
    )
    assert fills(
        ledger, "symbol", "price", "units", "commission", "spread", "slippage", "position", "basis"
    ) == approx(
        ("A", 12.5, 40.0, 0.5, 0.1, 0.25, 40.0, 1.0),
        ("B", 25.0, -10.0, 0.25, 0.05, 0.125, -10.0, 1.0),
        ("A", 14.0, -40.0, 0.56, 0.112, 0.28, 0.0, 1.0),
    )
    second = 1000 - 40 * 12.5 - 0.85 + 10 * 25 - 0.425
    third = second + 40 * 14 - 0.952
    worth = second + 40 * 13 - 10 * 24
    assert equity(ledger, "cash", "equity", "gross", "net", "carry") == approx(
        (1000.0, 1000.0, 0.0, 0.0, 0.0),
        (second, worth, 760 / worth, 280 / worth, 0.0),
        (third, third - 10 * 23, 230 / (third - 230), -230 / (third - 230), 0.0),
    )
    assert fills(ledger, "decided", "close_time") == [(1, 2), (1, 2), (2, 3)]


def test_next_close() -> None:
    """At the next close the fill is part of the mark of that very close."""
    ledger = run(
        replace(FREE, fill="next-close"),
        [bar("A", 1, 10, 10), outcome(1, {"s": {"A": 1.0}}), bar("A", 2, 12, 20), outcome(2, {})],
    )
    assert fills(ledger, "close_time", "price", "units") == [(2, 20.0, 50.0)]
    assert equity(ledger, "cash", "equity", "gross") == [(1000.0, 1000.0, 0.0), (0.0, 1000.0, 1.0)]


@pytest.mark.parametrize(
    ("target", "following", "price"),
    [
        (1.0, bar("A", 2, 95, 92, low=89), 90.0),
        (1.0, bar("A", 2, 95, 92, low=BUY), None),  # touched, not traded through
        (1.0, bar("A", 2, 85, 95), 85.0),  # the open is better
        (-1.0, bar("A", 2, 105, 105, high=111), 110.0),
        (-1.0, bar("A", 2, 105, 106, high=SALE), None),
        (-1.0, bar("A", 2, 120, 100), 120.0),
    ],
)
def test_limit(target: float, following: Bar, price: float | None) -> None:
    """A limit fills where the next bar trades through it, at the limit or a better open, or lapses."""
    ledger = run(
        Execution(fill="limit", limit_level=0.05, spread_bp=10, commission_bp=10, capital=1000),
        [
            bar("A", 1, 100, 100),
            outcome(1, {"s": {"A": target}}, {"A": 100.0}),
            following,
            bar("A", 3, 1, 1000),
        ],
    )
    wanted = 10.0 * target
    made = fills(ledger, "close_time", "price", "units", "commission", "spread", "slippage")
    assert made == approx(*[(2, price, wanted, abs(wanted) * price * 1e-3, 0.0, 0.0)] if price else [])


def test_limit_level_is_interpolated_and_the_side_is_what_the_order_does() -> None:
    """A long book that wants less sells, at the level's mirror, linear between the levels of the model."""
    ledger = run(
        replace(FREE, fill="limit", limit_level=0.275),
        [
            bar("A", 1, 100, 100),
            outcome(1, {"s": {"A": 1.0}}, {"A": 100.0}),
            bar("A", 2, 100, 100, low=1),
            outcome(2, {"s": {"A": 0.5}}, {"A": 100.0}),
            bar("A", 3, 100, 100, high=200),
        ],
    )
    buy, sale = 100 * exp(log(0.9) / 2), 100 * exp(log(1.1) / 2)
    worth = 1000 + 10 * (100 - buy)
    assert fills(ledger, "price", "units") == approx((buy, 10.0), (sale, worth / 200 - 10))


@pytest.mark.parametrize("level", [0.04, 0.96])
def test_limit_level_that_the_model_does_not_forecast(level: float) -> None:
    """A level outside of the model's is refused with the levels that can be taken."""
    with pytest.raises(ConfigError, match=rf"limit_level = {level}: .* 0.05 to 0.95: take one from 0.05 to"):
        run(
            replace(FREE, fill="limit", limit_level=level),
            [bar("A", 1, 1, 1), outcome(1, {"s": {"A": 1.0}})],
        )


def test_partial_fills() -> None:
    """One fill takes a share of the bar's volume; the rest of its units waits, until a newer order."""
    ledger = run(
        Execution(commission_bp=0, slippage_bp=0, volume_share=0.1, impact=0.5, capital=1000),
        [
            bar("A", 1, 10, 10),
            outcome(1, {"s": {"A": 1.0}}),
            bar("A", 2, 10, 10, volume=0),  # nothing
            bar("A", 3, 20, 20, volume=300),  # 1000 / 20 = 50 units are wanted: 30
            bar("A", 4, 5, 5, volume=100),  # 10
            bar("A", 5, 5, 5, volume=400),  # the last 10, a share of 0.025
            bar("A", 6, 5, 5, volume=1000),
        ],
    )
    assert fills(ledger, "decided", "close_time", "units", "slippage", "position") == approx(
        (1, 3, 30.0, 0.5 * 0.01 * 600, 30.0),
        (1, 4, 10.0, 0.5 * 0.01 * 50, 40.0),
        (1, 5, 10.0, 0.5 * 0.025**2 * 50, 50.0),
    )


def test_newer_order_replaces_the_rest() -> None:
    """What was left over of an older order is gone with a newer one; a limit order leaves nothing over."""
    steps = [
        bar("A", 1, 10, 10),
        outcome(1, {"s": {"A": 1.0}}, {"A": 10.0}),
        bar("A", 2, 10, 10, low=1, volume=10),
        outcome(2, {"s": {"A": 0.02}}, {"A": 10.0}),
        bar("A", 3, 10, 10, high=100, volume=10),
        bar("A", 4, 10, 10, high=100, volume=10),
    ]
    share = replace(FREE, volume_share=1.0)
    assert fills(run(share, steps), "close_time", "units", "position") == [(2, 10.0, 10.0), (3, -8.0, 2.0)]
    limits = run(replace(share, fill="limit"), [*steps[:3], *steps[4:]])
    assert fills(limits, "close_time", "units") == [(2, 10.0)]


def test_borrow() -> None:
    """The value of shorts and cash below zero cost their rate over the time between two marks."""
    ledger = run(
        replace(FREE, borrow=0.02, leverage=4.0),
        [
            bar("A", 1, 10, 10),
            bar("B", 1, 10, 10),
            outcome(1, {"s": {"A": 1.0, "B": -0.25}}),
            bar("A", 2, 10, 10),  # 200 units
            bar("B", 2, 10, 10),  # -50 units: cash is -500
            outcome(2, {}),
            bar("A", 2 + YEAR // 2, 10, 10),
            bar("B", 2 + YEAR // 2, 20, 20),
            outcome(2 + YEAR // 2, {}),
            outcome(2 + YEAR, {}),
        ],
    )
    assert equity(ledger, "cash", "equity", "carry")[1:] == approx(
        (-500.0, 1000.0, 0.0),
        (-515.0, 485.0, 0.5 * 0.02 * (1000 + 500)),
        (-530.15, 469.85, 0.5 * 0.02 * (1000 + 515)),
    )


@pytest.mark.parametrize(("target", "rate"), [(1.0, 0.1), (-1.0, 0.1), (-1.0, -0.1)])
def test_funding(target: float, rate: float) -> None:
    """Longs pay and shorts receive the rate on the value at the mark; a rate below zero turns it round."""
    ledger = run(
        replace(FREE, funding=rate),
        [
            bar("A", 1, 10, 10),
            outcome(1, {"s": {"A": target}}),
            bar("A", 1 + YEAR // 4, 10, 12),
            outcome(1 + YEAR // 4, {}),
        ],
    )
    paid = 0.25 * rate * 1200 * target
    worth = 1000 + 200 * target - paid
    assert equity(ledger, "equity", "carry", "net")[1] == approx((worth, paid, 1200 * target / worth))[0]


def test_leverage() -> None:
    """Targets of 1 in every symbol hold the leverage times the equity in all."""
    ledger = run(
        replace(FREE, leverage=3.0),
        [
            *(bar(symbol, 1, 10, 10) for symbol in SYMBOLS),
            outcome(1, {"s": dict.fromkeys(SYMBOLS, 1.0)}),
            *(bar(symbol, 2, 10, 10) for symbol in SYMBOLS),
            outcome(2, {}),
        ],
    )
    assert equity(ledger, "cash", "gross", "net")[-1] == approx((-2000.0, 3.0, 3.0))[0]


def test_leverage_is_a_cap() -> None:
    """What would go beyond it is scaled down together; closing never is, nor is anything sold for it."""
    ledger = run(
        FREE,
        [
            *(bar(symbol, 1, 10, 10) for symbol in "ABCDE"),
            outcome(1, {"s": {"A": 1.0, "B": 0.5, "D": 0.5, "E": -0.5}}),
            bar("A", 2, 10, 80),  # 20 units
            bar("B", 2, 10, 10),  # 10 units
            bar("C", 2, 10, 10),
            bar("D", 2, 10, 10),  # 10 units
            bar("E", 2, 10, 10),  # -10 units
            # Equity 2400, 480 a symbol. Kept: A 1600 and B, that is wanted more of, 100. D shrinks to 48. E
            # turns from -100: first it is closed. What is over, 652, is shared by B's 380, C's 480, E's 240.
            outcome(2, {"s": {"B": 1.0, "C": -1.0, "D": 0.1, "E": 0.5}}),
            *(bar(symbol, 3, 10, 10) for symbol in "BCDE"),
        ],
    )
    part = 652 / 1100
    assert fills(ledger, "symbol", "position")[4:] == approx(
        ("B", 10 + 38 * part), ("C", -48 * part), ("D", 4.8), ("E", 24 * part)
    )


def test_split_while_an_order_is_open() -> None:
    """An order's value, the units left over of it, and a limit mean the same after a split as before."""
    split = Adjustment("A", 2, 0.5, "split")
    market = run(
        replace(FREE, volume_share=1.0),
        [
            bar("A", 1, 100, 100),
            outcome(1, {"s": {"A": 1.0}}),
            bar("A", 2, 100, 100, volume=6),  # 6 of 10 units
            split,
            bar("A", 3, 50, 50, volume=6),  # 6 of the 8 units that 4 have become
            bar("A", 4, 25, 25, volume=6),  # the last 2
            outcome(4, {}),
        ],
    )
    assert fills(market, "price", "units", "position", "basis") == [
        (100.0, 6.0, 6.0, 1.0),
        (50.0, 6.0, 18.0, 0.5),
        (25.0, 2.0, 20.0, 0.5),
    ]
    assert equity(market, "equity")[-1] == (1000 - 600 - 300 - 50 + 20 * 25.0,)
    decision = [bar("A", 2, 100, 100), outcome(2, {"s": {"A": 1.0}}, {"A": 100.0})]
    whole = run(FREE, [*decision, split, bar("A", 3, 50, 50), outcome(3, {})])
    assert fills(whole, "units", "position", "basis") == [(20.0, 20.0, 0.5)]
    assert equity(whole, "cash", "equity")[-1] == (0.0, 1000.0)
    execution = replace(FREE, fill="limit", limit_level=0.05)
    for low, made in ((44.0, [(45.0, 20.0, 0.5)]), (45.0, [])):
        following = bar("A", 3, 48, 50, low=low)
        limit = run(execution, [*decision, split, following])
        late = run(execution, [decision[0], split, bar("A", 3, 1, 1), decision[1], replaced(following, 4)])
        assert fills(limit, "price", "units", "basis") == approx(*made)
        assert fills(late, "price", "units", "basis") == approx(*made)


def test_benchmark_with_a_late_symbol() -> None:
    """Equal parts of all symbols seen, at the first group and when a new symbol is seen, and held between."""
    steps: list[Step] = [
        bar("A", 1, 10, 10),
        outcome(1, {}),  # nothing is forecast yet: no book begins
        bar("A", 2, 10, 10),
        outcome(2, {"s": {"A": 0.0}}),
        bar("A", 3, 10, 10),  # 100 units
        outcome(3, {"s": {"A": 0.0}}),
        bar("A", 4, 30, 20),
        bar("B", 4, 5, 5),
        outcome(4, {"s": {"A": 0.0}}),  # 2000: 1000 each
        bar("B", 5, 4, 4),  # 250 units; the other half is ordered
        outcome(5, {}),
        bar("A", 6, 25, 25),  # 40 units are kept
        bar("B", 6, 4, 8),
        outcome(6, {}),
    ]
    columns = ("symbol", "decided", "close_time", "price", "units")
    made = [("A", 2, 3, 10.0, 100.0), ("B", 4, 5, 4.0, 250.0), ("A", 4, 6, 25.0, -60.0)]
    worth = [1000, 1000, 2000, 2000, 1500 + 40 * 25 - 1000 + 250 * 8]
    for execution in (FREE, replace(FREE, fill="limit"), replace(FREE, leverage=2)):
        ledger = run(execution, steps)
        assert fills(ledger, *columns, strategy=BENCHMARK) == made
        assert [value for (value,) in equity(ledger, "equity", strategy=BENCHMARK)] == worth
        assert BENCHMARK not in ledger.targets()["strategy"]
    closes = run(replace(FREE, fill="next-close", commission_bp=10), steps)
    assert fills(closes, "price", "commission", strategy=BENCHMARK)[0] == (10.0, 1.0)


def test_benchmark_has_its_name_to_itself() -> None:
    """A strategy that is called as the benchmark is refused."""
    with pytest.raises(ConfigError, match=r"'buy-and-hold'.*another name"):
        run(FREE, [bar("A", 1, 1, 1), outcome(1, {BENCHMARK: {"A": 1.0}})])


def test_books_are_separate() -> None:
    """Each strategy has its own book, which begins with its first targets."""
    ledger = run(
        FREE,
        [
            bar("A", 1, 1, 1),
            outcome(1, {"long": {"A": 1.0}, "short": {"A": -1.0}}),
            bar("A", 2, 1, 1.1),
            outcome(2, {"late": {"A": 0.0}}),
        ],
    )
    last = ledger.equity().group_by("strategy").last().sort("strategy")
    assert dict(last.select("strategy", "equity").rows()) == pytest.approx(
        {BENCHMARK: 1100, "late": 1000, "long": 1100, "short": 900}
    )


def test_ruin() -> None:
    """A book without equity left closes what it has and opens nothing, whatever the targets and orders."""
    ledger = run(
        FREE,
        [
            bar("A", 1, 1, 1),
            bar("B", 1, 1, 1),
            outcome(1, {"s": {"A": -1.0, "B": -1.0}}),
            bar("A", 2, 1, 5),  # B's order stays open
            outcome(2, {"s": {"A": -1.0}}),
            bar("A", 3, 5, 5),
            bar("B", 3, 1, 1),
            outcome(3, {"s": {"A": 1.0}}),
            bar("A", 4, 5, 5),
        ],
    )
    assert fills(ledger, "symbol", "position") == [("A", -500.0), ("A", 0.0)]
    assert equity(ledger, "equity", "gross", "net") == [(1000, 0, 0), (-1000, 0, 0), (-1000, 0, 0)]


def test_late_group() -> None:
    """A group that becomes due after newer bars is marked as of its own close, and fills after them."""
    ledger = run(
        FREE,
        [
            bar("A", 1, 1, 1),
            outcome(1, {"s": {"A": 1.0}}),
            bar("A", 2, 2, 2),
            bar("A", 3, 5, 9),
            bar("B", 3, 1, 1),  # not seen at 2
            outcome(2, {"s": {"A": 0.5}}),
            bar("A", 4, 4, 4),
        ],
    )
    assert equity(ledger, "equity") == [(1000.0,), (1000.0,)]
    assert fills(ledger, "price", "position") == [(2.0, 500.0), (4.0, 125.0)]


def test_late_bar_of_another_symbol() -> None:
    """A fill of an old close that comes after one of a newer close still counts at the old close."""
    ledger = run(
        FREE,
        [
            bar("A", 1, 1, 1),
            bar("B", 1, 1, 1),
            outcome(1, {"s": {"A": 1.0, "B": 1.0}}),
            bar("A", 2, 1, 1),
            bar("A", 3, 5, 9),
            bar("B", 2, 1, 3),
            outcome(2, {}),
        ],
    )
    assert equity(ledger, "cash", "equity") == [(1000.0, 1000.0), (0.0, 2000.0)]


def test_straggler() -> None:
    """A straggler is scored, but marks no book, and its bar, too late for the mark, fills nothing."""
    steps: list[Step] = [
        bar("A", 1, 1, 1),
        bar("B", 1, 1, 1),
        outcome(1, {"s": {"B": 1.0}}, {"A": 1.0, "B": 1.0}),
        bar("A", 2, 1, 1),
        outcome(2, {}, {"A": 1.0}),
        bar("B", 2, 0.5, 1),
        outcome(2, {}, {"B": 1.0}, straggler=True),
        bar("B", 3, 2, 2),
        outcome(3, {}, {"B": 1.0}),
    ]
    ledger = run(FREE, steps)
    assert fills(ledger, "close_time", "price", "units") == [(3, 2.0, 250.0)]
    assert equity(ledger, "cash") == [(1000.0,), (1000.0,), (500.0,)]
    assert ledger.signals().filter(pl.col("horizon") == 1)["symbol"].to_list() == ["A", "B", "A", "B", "B"]
    assert not fills(run(replace(FREE, fill="limit"), steps), "units")  # it has lapsed


def test_signals_are_flagged_as_live_ones() -> None:
    """One of too few bars is warming, one of wrong bars degraded with its reasons; others are neither."""
    first, second = outcome(1, {}, {"A": 10.0, "B": 1.0}), outcome(2, {}, {"A": 10.0, "B": 1.0})
    warming = msgspec.structs.replace(first.forecasts["A"], warming=True)
    first = msgspec.structs.replace(first, forecasts={**first.forecasts, "A": warming})
    second = msgspec.structs.replace(second, degraded={"B": ("3 bars are missing", "the price jumped")})
    signals = run(FREE, [bar("A", 1, 10, 10), bar("B", 1, 1, 1), first, second]).signals()
    assert signals.columns[-3:] == ["model", "warming", "degraded"]
    one = signals.filter(pl.col("horizon") == 1).select("symbol", "warming", "degraded").rows()
    reasons = "3 bars are missing; the price jumped"
    assert one == [("A", True, ""), ("B", False, ""), ("A", False, ""), ("B", False, reasons)]
    assert signals.filter(pl.col("horizon") == 2)["degraded"].to_list() == ["", "", "", reasons]
    assert run(FREE, []).signals().columns[-2:] == ["warming", "degraded"]


def test_signals_and_outcomes() -> None:
    """Forecasts are kept a row a horizon, and meet the symbol's own bars that many closes later."""
    ledger = run(
        FREE,
        [
            bar("A", 1, 10, 10),
            bar("B", 1, 1, 1),
            outcome(1, {}, {"A": 10.0, "B": 1.0}),
            bar("B", 2, 1, 2),
            bar("A", 4, 10, 11),
            Adjustment("A", 5, 0.5, "split"),
            bar("A", 7, 5, 6),
        ],
    )
    signals = ledger.signals()
    assert signals.columns[:6] == ["symbol", "close_time", "horizon", "q05", "q50", "q95"]
    assert signals.row(1, named=True)["q95"] == pytest.approx(log(1.2))
    assert signals.row(1, named=True)["rise"] == 0.25
    assert signals["model"].unique().to_list() == ["m1"]
    rows = ledger.outcomes().with_columns(pl.col("close_time", "end_time").to_physical()).rows()
    assert rows == [
        ("A", 1, 1, 4, 11.0, pytest.approx(log(1.1))),
        ("A", 1, 2, 7, 6.0, pytest.approx(log(1.2))),
        ("B", 1, 1, 2, 2.0, pytest.approx(log(2))),
    ]


def test_bars_and_targets() -> None:
    """Every accepted bar is kept with its basis, and every target, also of a strategy that wants none."""
    wanted = {"s": {"A": 0.25, "B": -1.0}, "t": {}}
    ledger = run(
        FREE,
        [
            Adjustment("A", 1, 0.5, "split"),
            Adjustment("A", 4, 0.1, "split"),
            bar("B", 1, 3, 3),
            bar("A", 1, 10, 12, low=9, high=13),
            outcome(1, wanted),
            bar("A", 3, 5, 6),
            outcome(3, {"s": {"A": 0.25}}),
            bar("A", 5, 0.5, 0.6),
        ],
    )
    physical = pl.col("close_time").to_physical()
    assert ledger.bars().with_columns(physical).rows() == [
        ("A", 1, 10.0, 13.0, 9.0, 12.0, 1.0),
        ("B", 1, 3.0, 3.0, 3.0, 3.0, 1.0),
        ("A", 3, 5.0, 6.0, 5.0, 6.0, 0.5),
        ("A", 5, 0.5, 0.6, 0.5, 0.6, 0.05),
    ]
    assert ledger.targets().with_columns(physical).rows() == [
        ("s", "A", 1, 0.25),
        ("s", "B", 1, -1.0),
        ("s", "A", 3, 0.25),
    ]


@pytest.mark.parametrize("target", [1.01, -2.0, float("nan"), float("inf")])
def test_refuses_targets(target: float) -> None:
    """A target that is not in [-1, 1] stops the run, naming strategy, symbol and value."""
    with pytest.raises(ValueError, match=f"strategy s wants {target} of A at 1970-01-01T00:00:00.000000001Z"):
        run(FREE, [bar("A", 1, 1, 1), outcome(1, {"s": {"A": target}})])


def test_refuses_a_target_of_what_was_not_forecast() -> None:
    """A target of a symbol without a forecast stops the run too."""
    with pytest.raises(ValueError, match=r"strategy s wants 1.0 of A at .* symbol that is forecast"):
        run(FREE, [bar("A", 1, 1, 1), bar("B", 1, 1, 1), outcome(1, {"s": {"A": 1.0}}, {"B": 1.0})])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fill", "at-once"),
        ("limit_level", 0),
        ("limit_level", 1.0),
        ("commission_bp", -1),
        ("spread_bp", float("nan")),
        ("slippage_bp", float("inf")),
        ("slippage_bp", "2"),
        ("slippage_bp", True),
        ("impact", -0.1),
        ("volume_share", 0.0),
        ("volume_share", 1.5),
        ("borrow", -0.01),
        ("funding", float("inf")),
        ("leverage", 0),
        ("capital", 0.0),
    ],
)
def test_refuses_an_execution_that_cannot_be(name: str, value: object) -> None:
    """A value that no book can be kept by is refused by name, with what can be said instead."""
    with pytest.raises(ConfigError, match=f"{name} = {value!r}: (give|take)"):
        Execution(**{name: value})  # type: ignore[arg-type]


def test_impact_needs_a_volume_share() -> None:
    """Without a bound on the share of the volume the price paid would have none."""
    with pytest.raises(ConfigError, match=r"impact = 0.1: .*volume_share"):
        Execution(impact=0.1)


def test_empty() -> None:
    """A ledger that saw nothing gives empty frames with their columns."""
    ledger = Ledger(Execution())
    frames = ledger.fills(), ledger.equity(), ledger.signals(), ledger.outcomes(), ledger.bars()
    for frame in (*frames, ledger.targets()):
        assert frame.height == 0
        assert frame.schema["close_time"] == pl.Datetime("ns", "UTC")


price = st.floats(50, 150)
target = st.floats(-1, 1) | st.just(0.0)


@st.composite
def any_bar(draw: st.DrawFn, symbol: str, time: int) -> Bar:
    low, one, other, high = sorted(draw(st.lists(price, min_size=4, max_size=4)))
    if draw(st.booleans()):
        one, other = other, one
    return bar(symbol, time, one, other, low, high, draw(st.sampled_from([0.0, 1.0, 5.0, 1000.0])))


@st.composite
def stories(draw: st.DrawFn) -> list[Step]:
    """Some symbols' bars a day, in some order, and a group, which may come a day late or before some bars.

    A split may be declared before the day's bars.
    """
    steps: list[Step] = []
    late: Outcome | None = None
    for day in range(1, draw(st.integers(2, 10))):
        time = day * DAY
        come = draw(st.lists(st.sampled_from(SYMBOLS), min_size=1, unique=True))
        if draw(st.integers(0, 3)) == 0:
            factor = draw(st.sampled_from([0.5, 0.1, 3.0]))
            steps.append(Adjustment(draw(st.sampled_from(SYMBOLS)), time - DAY // 2, factor, "split"))
        bars = [draw(any_bar(symbol, time)) for symbol in come]
        on_time = draw(st.integers(1, len(bars)))
        steps += bars[:on_time]
        if late is not None:
            steps.append(late)
        closes = {known.symbol: known.close for known in bars[:on_time]}
        names = draw(st.sets(st.sampled_from(["s", "t"])))
        targets = {
            name: {symbol: draw(target) for symbol in closes if draw(st.integers(0, 3))}
            for name in sorted(names)
        }
        group = outcome(time, targets, closes)
        late = group if draw(st.integers(0, 3)) == 0 else None
        if late is None:
            steps.append(group)
        steps += bars[on_time:]
    return steps


@st.composite
def executions(draw: st.DrawFn) -> Execution:
    basis_points = st.just(0.0) | st.floats(0, 50)
    volume_share = draw(st.none() | st.floats(0.01, 1))
    return Execution(
        fill=draw(st.sampled_from(["next-open", "next-close", "limit"])),
        limit_level=draw(st.floats(0.05, 0.95)),
        commission_bp=draw(basis_points),
        spread_bp=draw(basis_points),
        slippage_bp=draw(basis_points),
        impact=draw(st.floats(0, 1)) if volume_share else 0.0,
        volume_share=volume_share,
        borrow=draw(st.floats(0, 1)),
        funding=draw(st.floats(-1, 1)),
        leverage=draw(st.floats(0.1, 4)),
        capital=1000.0,
    )


@settings(deadline=None)
@given(story=stories(), execution=executions())
def test_conservation(story: list[Step], execution: Execution) -> None:
    """Cash is capital less what was bought and paid, units are the sum of trades, equity is both.

    All is worked out again from the frames; of the story only which bars had come when a group did.
    """
    ledger = run(execution, story)
    frames = [f.with_columns(pl.col("close_time").to_physical()) for f in (ledger.fills(), ledger.equity())]
    trades = list(frames[0].with_columns(pl.col("decided").to_physical()).iter_rows(named=True))
    marks = list(frames[1].iter_rows(named=True))
    kept = ledger.bars().with_columns(pl.col("close_time").to_physical())
    bars = {(b["symbol"], b["close_time"]): b for b in kept.iter_rows(named=True)}
    volumes = {(b.symbol, b.close_time): b.volume for b in story if isinstance(b, Bar)}
    assert volumes.keys() == bars.keys()
    came: list[tuple[str, int]] = []
    known: dict[int, dict[str, tuple[str, int]]] = {}  # of each mark, the newest bar of each symbol
    for step in story:
        if isinstance(step, Bar):
            came.append((step.symbol, step.close_time))
        elif isinstance(step, Outcome):
            time = step.group.close_time
            known[time] = {key[0]: key for key in sorted(came, key=lambda k: k[1]) if key[1] <= time}
    for trade in trades:
        own = bars[trade["symbol"], trade["close_time"]]
        units, basis, paid = trade["units"], own["basis"], abs(trade["units"]) * trade["price"]
        share = abs(units) / volumes[trade["symbol"], trade["close_time"]] if execution.volume_share else 0.0
        assert trade["decided"] < trade["close_time"]
        assert trade["basis"] == basis
        assert share <= (execution.volume_share or 0.0) * (1 + 1e-12)
        assert trade["commission"] == pytest.approx(paid * execution.commission_bp / 1e4)
        if execution.fill == "limit" and trade["strategy"] != BENCHMARK:
            decided = bars[trade["symbol"], trade["decided"]]
            level = execution.limit_level if units > 0 else 1 - execution.limit_level
            limit = decided["close"] * exp(np.interp(level, LEVELS, TENTH[0])) * basis / decided["basis"]
            if units > 0:
                assert own["low"] < limit
                assert trade["price"] == pytest.approx(min(own["open"], limit))
            else:
                assert own["high"] > limit
                assert trade["price"] == pytest.approx(max(own["open"], limit))
            assert trade["spread"] == trade["slippage"] == 0
        else:
            assert trade["price"] == own["close" if execution.fill == "next-close" else "open"]
            assert trade["spread"] == pytest.approx(paid * execution.spread_bp / 2e4)
            slippage = paid * (execution.slippage_bp / 1e4 + execution.impact * share**2)
            assert trade["slippage"] == pytest.approx(slippage)
        before = [
            t["units"] * t["basis"]
            for t in trades
            if (t["strategy"], t["symbol"]) == (trade["strategy"], trade["symbol"])
            and t["close_time"] <= trade["close_time"]
        ]
        assert trade["position"] == pytest.approx(sum(before) / basis, abs=1e-9)
    for at, mark in enumerate(marks):
        time = mark["close_time"]
        earlier = [m for m in marks[:at] if m["strategy"] == mark["strategy"]]
        own = [t for t in trades if t["strategy"] == mark["strategy"] and t["close_time"] <= time]
        spent = sum(t["units"] * t["price"] for t in own)
        costs = sum(t["commission"] + t["spread"] + t["slippage"] for t in own)
        cash = execution.capital - spent - costs - sum(m["carry"] for m in earlier)
        close = {symbol: bars[key]["close"] / bars[key]["basis"] for symbol, key in known[time].items()}
        held = {s: sum(t["units"] * t["basis"] for t in own if t["symbol"] == s) for s in close}
        assert {t["symbol"] for t in own} <= close.keys()
        values = [units * close[symbol] for symbol, units in held.items()]
        gross, net = sum(map(abs, values)), sum(values)
        elapsed = (time - earlier[-1]["close_time"]) / YEAR if earlier else 0.0
        within = 1e-9 * (execution.capital + gross + sum(abs(t["units"] * t["price"]) for t in own))
        borrowed = (gross - net) / 2 + max(0.0, -cash)
        carry = elapsed * (execution.borrow * borrowed + execution.funding * net)
        assert mark["carry"] == pytest.approx(carry, abs=within)
        assert mark["cash"] == pytest.approx(cash - mark["carry"], abs=within)
        assert mark["equity"] == pytest.approx(mark["cash"] + net, abs=within)
        alive = mark["equity"] > 0
        assert mark["gross"] * mark["equity"] == pytest.approx(gross if alive else 0.0, abs=within)
        assert mark["net"] * mark["equity"] == pytest.approx(net if alive else 0.0, abs=within)


@settings(deadline=None)
@given(story=stories(), execution=executions())
def test_leverage_caps_every_decision(story: list[Step], execution: Execution) -> None:
    """What is held, or ordered where an order is in force, is within the leverage, or nothing may grow."""
    ledger = Ledger(execution)
    for step in story:
        play(ledger, step)
        if not isinstance(step, Outcome):
            continue
        time = step.group.close_time
        known = {symbol: ledger._up_to(symbol, time) for symbol in ledger._last}
        prices = {symbol: at[0].close / at[1] for symbol, at in known.items() if at}
        for name, wanted in step.targets.items():
            book = ledger._books[name]
            worth = {symbol: units * prices[symbol] for symbol, units in book.held.items()}
            values = worth | {symbol: order.value for symbol, order in book.orders.items()}
            most = execution.leverage * max(0.0, book.equity)
            if sum(map(abs, values.values())) > most * (1 + 1e-9) + 1e-9:
                for symbol in wanted:
                    value, now = values[symbol], worth.get(symbol, 0.0)
                    assert value == 0 or value * now > 0
                    assert abs(value) <= abs(now) + 1e-9


@settings(deadline=None)
@given(story=stories(), execution=executions(), cut=st.integers(1, 9), factor=st.floats(0.5, 2))
def test_nothing_after_a_mark_changes_it(
    story: list[Step], execution: Execution, cut: int, factor: float
) -> None:
    """Whatever comes after t, or nothing: bars, fills, targets and equity up to t are the same bits."""

    def poisoned(step: Step) -> Step:
        if isinstance(step, Bar) and step.close_time > cut * DAY:
            prices = (factor * p for p in (step.open, step.high, step.low, step.close))
            return Bar(step.symbol, step.close_time, *prices, volume=3.0)
        return step

    def upto(ledger: Ledger) -> list[pl.DataFrame]:
        until = pl.col("close_time").to_physical() <= cut * DAY
        frames = ledger.fills(), ledger.equity(), ledger.bars(), ledger.targets()
        return [frame.filter(until) for frame in frames]

    times = [s.group.close_time if isinstance(s, Outcome) else getattr(s, "close_time", 0) for s in story]
    last = max((k for k, time in enumerate(times) if 0 < time <= cut * DAY), default=-1)
    whole = upto(run(execution, story))
    for other in (map(poisoned, story), story[: last + 1]):
        for frame, again in zip(whole, upto(run(execution, other)), strict=True):
            assert_frame_equal(frame, again, check_exact=True)


def test_symbol_order() -> None:
    """The order in which the symbols of one close come makes no difference to the books."""

    def both(order: int) -> Ledger:
        first = [bar("A", 1, 10, 10), bar("B", 1, 20, 20)]
        second = [bar("A", 2, 11, 15), bar("B", 2, 19, 12)]
        group = outcome(1, {"s": {"A": 0.7, "B": 0.9}})
        return run(Execution(), [*first[::order], group, *second[::order], outcome(2, {})])

    one, other = both(1), both(-1)
    columns = ["strategy", "symbol"]
    assert_frame_equal(one.fills().sort(columns), other.fills().sort(columns), check_exact=True)
    assert_frame_equal(one.bars(), other.bars(), check_exact=True)
    assert one.equity()["equity"].to_list() == pytest.approx(other.equity()["equity"].to_list(), rel=1e-15)


def test_rounding_is_not_traded() -> None:
    """A target of 1 at every close, with opens where the closes were, is one purchase and no dust."""
    prices = (100 * np.exp(0.01 * np.random.default_rng(1).standard_normal(200).cumsum())).tolist()
    steps: list[Step] = []
    for time, (before, price) in enumerate(pairwise(prices), 1):
        steps += [bar("A", time, before, price), outcome(time, {"s": {"A": 1.0}}, {"A": price})]
    fills = run(FREE, steps).fills()
    assert fills.filter(strategy="s").height == 1
