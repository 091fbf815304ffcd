import asyncio
from collections.abc import Iterable, Mapping
from math import log

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from barcast.backtest.ledger import Ledger
from barcast.daemon.ports import Group, Outcome, Term
from barcast.models import Bar, Card, Forecast

LEVELS = (0.05, 0.5, 0.95)
CARD = Card("m1", "numpy", "1d", (1, 2), LEVELS, 2, 1, "none", 0, 0, "here")
SYMBOLS = ("A", "B", "C")


def bar(symbol: str, time: int, open_price: float, close: float) -> Bar:
    return Bar(symbol, time, open_price, max(open_price, close), min(open_price, close), close, 1.0)


def outcome(
    time: int,
    targets: Mapping[str, Mapping[str, float]],
    references: Mapping[str, float] = {},
    straggler: bool = False,
) -> Outcome:
    row = np.array([[-0.01, 0.0, 0.01], [-0.02, 0.0, 0.02]])
    pair = np.array([0.5, 0.25])
    forecasts = {
        s: Forecast(s, time, reference, (1, 2), LEVELS, row, pair, pair, pair, False)
        for s, reference in references.items()
    }
    group = Group(time, time, tuple(references), straggler=straggler)
    terms = dict.fromkeys(references, Term((time + 1, time + 2), time + 1, time + 2))
    return Outcome("root", "1d", group, CARD, forecasts, {}, {}, {}, targets, terms)


def run(ledger: Ledger, steps: Iterable[Bar | Outcome]) -> Ledger:
    async def play() -> None:
        for step in steps:
            if isinstance(step, Bar):
                ledger.accepted(step)
            else:
                await ledger.emit(step)
                await ledger.settle(step.group.close_time)

    asyncio.run(play())
    return ledger


def test_by_hand() -> None:
    """Two symbols, one strategy: the fills, costs and equity are those worked out on paper."""
    ledger = run(
        Ledger(commission=10, slippage=5, capital=1000.0),
        [
            bar("A", 1, 10, 10),
            bar("B", 1, 20, 20),
            outcome(1, {"s": {"A": 1.0, "B": -0.5}}),  # orders: A 500, B -250
            bar("A", 2, 12.5, 13),  # 40 units; costs 0.5 + 0.25
            bar("B", 2, 25, 24),  # -10 units; costs 0.25 + 0.125
            outcome(2, {"s": {"A": 0.0}}),
            bar("A", 3, 14, 99),  # sold; costs 0.56 + 0.28
            bar("B", 3, 22, 23),
            outcome(3, {}),
        ],
    )
    rows = ledger.fills().select("symbol", "price", "units", "commission", "slippage", "position").rows()
    assert rows == [
        ("A", 12.5, 40.0, 0.5, 0.25, 40.0),
        ("B", 25.0, -10.0, 0.25, 0.125, -10.0),
        ("A", 14.0, -40.0, pytest.approx(0.56), pytest.approx(0.28), 0.0),
    ]
    second = 1000 - 40 * 12.5 - 0.75 + 10 * 25 - 0.375
    third = second + 40 * 14 - 0.84
    assert ledger.equity().select("cash", "equity", "gross").rows() == [
        (1000.0, 1000.0, 0.0),
        (pytest.approx(second), pytest.approx(second + 40 * 13 - 10 * 24), pytest.approx(760 / 1028.875)),
        (pytest.approx(third), pytest.approx(third - 10 * 23), pytest.approx(230 / (third - 230))),
    ]
    assert ledger.fills()["decided"].to_physical().to_list() == [1, 1, 2]
    assert ledger.fills()["close_time"].to_physical().to_list() == [2, 2, 3]


def test_books_are_separate() -> None:
    """Each strategy has its own book, which begins with its first targets."""
    ledger = run(
        Ledger(0, 0),
        [
            bar("A", 1, 1, 1),
            outcome(1, {"long": {"A": 1.0}, "short": {"A": -1.0}}),
            bar("A", 2, 1, 1.1),
            outcome(2, {"late": {"A": 0.0}}),
        ],
    )
    last = ledger.equity().group_by("strategy").last().sort("strategy")
    assert dict(last.select("strategy", "equity").rows()) == pytest.approx(
        {"late": 1, "long": 1.1, "short": 0.9}
    )


def test_ruin() -> None:
    """A book without equity left closes what it has and opens nothing, whatever the targets."""
    ledger = run(
        Ledger(0, 0),
        [
            bar("A", 1, 1, 1),
            outcome(1, {"s": {"A": -1.0}}),
            bar("A", 2, 1, 3),
            outcome(2, {"s": {"A": -1.0}}),
            bar("A", 3, 3, 3),
            outcome(3, {"s": {"A": 1.0}}),
            bar("A", 4, 3, 3),
        ],
    )
    assert ledger.fills()["position"].to_list() == [-1.0, 0.0]
    assert ledger.equity()["equity"].to_list() == [1.0, -1.0, -1.0]


def test_late_group() -> None:
    """A group that becomes due after newer bars is marked as of its own close, and fills after them."""
    ledger = run(
        Ledger(0, 0),
        [
            bar("A", 1, 1, 1),
            outcome(1, {"s": {"A": 1.0}}),
            bar("A", 2, 2, 2),
            bar("A", 3, 5, 9),
            outcome(2, {"s": {"A": 0.0}}),
            bar("A", 4, 4, 4),
        ],
    )
    assert ledger.equity()["equity"].to_list() == [1.0, 1.0]
    assert ledger.fills()["price"].to_list() == [2.0, 4.0]


def test_late_bar_of_another_symbol() -> None:
    """A fill of an old close that comes after one of a newer close still counts at the old close."""
    ledger = run(
        Ledger(0, 0),
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
    assert ledger.equity()["equity"].to_list() == [1.0, 2.0]
    assert ledger.equity()["cash"].to_list() == [1.0, 0.0]


def test_straggler() -> None:
    """A straggler's forecast is scored, but marks no book."""
    ledger = run(
        Ledger(0, 0),
        [
            bar("A", 1, 1, 1),
            outcome(1, {"s": {"A": 0.0}}, {"A": 1.0}),
            bar("B", 1, 1, 1),
            outcome(1, {}, {"B": 1.0}, straggler=True),
        ],
    )
    assert ledger.equity().height == 1
    assert ledger.signals()["symbol"].unique(maintain_order=True).to_list() == ["A", "B"]


def test_signals_and_outcomes() -> None:
    """Forecasts are kept a row a horizon, and meet the symbol's own bars that many closes later."""
    ledger = run(
        Ledger(0, 0),
        [
            bar("A", 1, 10, 10),
            bar("B", 1, 1, 1),
            outcome(1, {}, {"A": 10.0, "B": 1.0}),
            bar("B", 2, 1, 2),
            bar("A", 4, 10, 11),
            bar("A", 7, 10, 12),
        ],
    )
    signals = ledger.signals()
    assert signals.columns[:6] == ["symbol", "close_time", "horizon", "q05", "q50", "q95"]
    assert signals.row(1, named=True)["q95"] == 0.02
    assert signals.row(1, named=True)["rise"] == 0.25
    assert signals["model"].unique().to_list() == ["m1"]
    rows = ledger.outcomes().with_columns(pl.col("close_time", "end_time").to_physical()).rows()
    assert rows == [
        ("A", 1, 1, 4, 11.0, pytest.approx(log(1.1))),
        ("A", 1, 2, 7, 12.0, pytest.approx(log(1.2))),
        ("B", 1, 1, 2, 2.0, pytest.approx(log(2))),
    ]


@pytest.mark.parametrize("target", [1.01, -2.0, float("nan"), float("inf")])
def test_refuses_targets(target: float) -> None:
    """A target that is not in [-1, 1] stops the run, naming strategy, symbol and value."""
    with pytest.raises(ValueError, match=f"strategy s wants {target} of A at 1970-01-01T00:00:00.000000001Z"):
        run(Ledger(0, 0), [bar("A", 1, 1, 1), outcome(1, {"s": {"A": target}})])


def test_empty() -> None:
    """A ledger that saw nothing gives empty frames with their columns."""
    ledger = Ledger(0, 0)
    for frame in (ledger.fills(), ledger.equity(), ledger.signals(), ledger.outcomes()):
        assert frame.height == 0
        assert frame.schema["close_time"] == pl.Datetime("ns", "UTC")


price = st.floats(0.5, 200)
target = st.floats(-1, 1) | st.just(0.0)


@st.composite
def stories(draw: st.DrawFn) -> list[list[Bar | Outcome]]:
    """Steps of each close: some symbols' bars in some order, and a group, now and then one close late."""
    closes: list[list[Bar | Outcome]] = []
    late: Outcome | None = None
    seen: set[str] = set()
    for time in range(1, draw(st.integers(2, 12))):
        symbols = draw(st.lists(st.sampled_from(SYMBOLS), min_size=1, unique=True))
        seen |= set(symbols)
        steps: list[Bar | Outcome] = [bar(symbol, time, draw(price), draw(price)) for symbol in symbols]
        if late is not None:
            steps.append(late)
        names = draw(st.sets(st.sampled_from(["s", "t"])))
        group = outcome(time, {name: {symbol: draw(target) for symbol in symbols} for name in names})
        late = group if draw(st.booleans()) else None
        if late is None:
            steps.append(group)
        closes.append(steps)
    return closes


@settings(deadline=None)
@given(story=stories(), commission=st.floats(0, 50), slippage=st.floats(0, 50))
def test_conservation(story: list[list[Bar | Outcome]], commission: float, slippage: float) -> None:
    """Cash is capital less what was bought and paid; units are the sum of trades; equity is both."""
    ledger = run(Ledger(commission, slippage, 100.0), [step for steps in story for step in steps])
    fills, equity = ledger.fills(), ledger.equity()
    closes = {(s.symbol, s.close_time): s.close for steps in story for s in steps if isinstance(s, Bar)}
    for mark in equity.with_columns(time=pl.col("close_time").to_physical()).iter_rows(named=True):
        own = fills.filter(
            (pl.col("strategy") == mark["strategy"]) & (pl.col("close_time").to_physical() <= mark["time"])
        )
        spent = own.select((pl.col("units") * pl.col("price")).sum()).item()
        paid = own.select((pl.col("commission") + pl.col("slippage")).sum()).item()
        assert mark["cash"] == pytest.approx(100 - spent - paid, abs=1e-6)
        held = own.group_by("symbol").agg(pl.col("units").sum(), pl.col("position").last())
        assert held["units"].to_list() == pytest.approx(held["position"].to_list(), abs=1e-9)
        value = 0.0
        for symbol, units, _ in held.iter_rows():
            newest = max(time for known, time in closes if known == symbol and time <= mark["time"])
            value += units * closes[symbol, newest]
        assert mark["equity"] == pytest.approx(mark["cash"] + value, abs=1e-6)
    costs = fills.select(
        (pl.col("units").abs() * pl.col("price") * (commission + slippage) / 1e4).sum()
    ).item()
    assert costs == pytest.approx(fills.select((pl.col("commission") + pl.col("slippage")).sum()).item())


@settings(deadline=None)
@given(story=stories(), cut=st.integers(1, 11), factor=st.floats(0.1, 10))
def test_no_look_ahead(story: list[list[Bar | Outcome]], cut: int, factor: float) -> None:
    """Whatever the bars after t are, fills and equity up to t stay the same to the bit."""

    def poisoned(step: Bar | Outcome) -> Bar | Outcome:
        if isinstance(step, Bar) and step.close_time > cut:
            return bar(step.symbol, step.close_time, step.open * factor, step.close / factor)
        return step

    true, false = Ledger(3, 2), Ledger(3, 2)
    run(true, [step for steps in story for step in steps])
    run(false, [poisoned(step) for steps in story for step in steps])
    for frame, other in ((true.fills(), false.fills()), (true.equity(), false.equity())):
        until = pl.col("close_time").to_physical() <= cut
        assert_frame_equal(frame.filter(until), other.filter(until), check_exact=True)


def test_symbol_order() -> None:
    """The order in which the symbols of one close come makes no difference to the books."""

    def play(order: int) -> Ledger:
        first = [bar("A", 1, 10, 10), bar("B", 1, 20, 20)]
        second = [bar("A", 2, 11, 15), bar("B", 2, 19, 12)]
        group = outcome(1, {"s": {"A": 0.7, "B": 0.9}})
        return run(Ledger(5, 5), [*first[::order], group, *second[::order], outcome(2, {})])

    assert_frame_equal(play(1).fills(), play(-1).fills().sort("symbol"), check_exact=True)
    assert play(1).equity()["equity"][-1] == pytest.approx(play(-1).equity()["equity"][-1], rel=1e-15)
