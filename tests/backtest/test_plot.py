from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from barcast.backtest import plot
from barcast.backtest.ledger import BENCHMARK
from barcast.backtest.result import BacktestResult
from barcast.models import ConfigError
from tests.backtest.results import five_minutes, made_up, sessions


@pytest.fixture(scope="module")
def result() -> BacktestResult:
    """Two symbols of 400 sessions, the second one split two for one half way."""
    return made_up()


def named(figure, name):
    """The traces of that name."""
    return [trace for trace in figure.data if trace.name == name]


def moments(series: pl.Series) -> list[float]:
    """Times as an axis has them."""
    return (series.dt.epoch("us") / 1000).to_list()


def test_equity_and_drawdown(result: BacktestResult) -> None:
    """Equity begins at 1, drawdown stays below 0, both end as the metrics say; the reference is grey."""
    growth, below = plot.equity(result), plot.drawdown(result)
    assert [trace.name for trace in growth.data] == [BENCHMARK, "drift", "band"]
    assert growth.data[0].line.color == plot.GREY
    for curve, depth in zip(growth.data, below.data, strict=True):
        row = result.portfolio.row(by_predicate=pl.col("strategy") == curve.name, named=True)
        assert curve.y[0] == 1
        assert curve.y[-1] == pytest.approx(1 + row["total_return"])
        assert max(depth.y) == 0
        assert min(depth.y) == pytest.approx(row["max_drawdown"], rel=1e-5)


def test_long_books_are_thinned(result: BacktestResult) -> None:
    """Of many closes about 2,000 are drawn, the first and the last among them, and no drawdown is lost."""
    long = made_up(("AAA",), five_minutes(9001), strategies=("drift",))
    own = long.equity.filter(strategy="drift")["equity"]
    curve, depth = named(plot.equity(long), "drift")[0], named(plot.drawdown(long), "drift")[0]
    assert 1500 < len(curve.y) <= 2001
    assert curve.y[0] == 1
    assert curve.y[-1] == pytest.approx(own[-1] / own[0])
    assert min(depth.y) == pytest.approx((own / own.cum_max() - 1).min(), rel=1e-5)


def test_many_strategies_can_be_told_apart() -> None:
    """Beyond six colours the dashes change."""
    many = made_up(("AAA",), sessions(30), (1,), [f"s{k}" for k in range(20)])
    lines = [(t.line.color, t.line.dash) for t in plot.equity(many).data]
    assert len(lines) == 21
    assert len(set(lines)) == 21


def test_ribbon_stands_at_the_close_it_was_for(result: BacktestResult) -> None:
    """The median of a close is what was forecast of it a horizon before, on the newest price basis."""
    for symbol, split in (("AAA", 1.0), ("BBB", 0.5)):
        figure = plot.fan(result, symbol, horizon=5)
        median, close = named(figure, "median")[0], named(figure, "close")[0]
        own = result.bars.filter(symbol=symbol)
        assert list(close.x) == list(median.x) == moments(own["close_time"])
        newest = own["basis"][-1]
        assert newest == split
        assert close.y == pytest.approx((own["close"] / own["basis"] * newest).to_numpy(), rel=1e-6)
        assert np.isnan(median.y[:5]).all()
        made = result.signals.filter(symbol=symbol, horizon=5)
        expected = made["reference"] * made["q50"].exp() / own["basis"] * newest
        assert median.y[5:] == pytest.approx(expected.to_numpy()[:-5], rel=1e-6)
        band = named(figure, "90 % interval")[0]
        n = own.height - 5
        low = made["reference"] * made["q05"].exp() / own["basis"] * newest
        high = made["reference"] * made["q95"].exp() / own["basis"] * newest
        assert list(band.x[:n]) == list(median.x[5:])
        assert band.y[:n] == pytest.approx(low.to_numpy()[:-5], rel=1e-6)
        assert band.y[n : 2 * n][::-1] == pytest.approx(high.to_numpy()[:-5], rel=1e-6)
        told = figure.layout.xaxis.title.text
        assert (told is not None and "are adjusted" in told) == (split != 1)


def test_ribbon_has_a_gap_where_nothing_was_forecast(result: BacktestResult) -> None:
    """Bars without a forecast part the band: no line runs across."""
    closes = result.bars.filter(symbol="AAA")["close_time"]
    silent = ~pl.col("close_time").is_in(closes[100:120].to_list())
    figure = plot.fan(replace(result, signals=result.signals.filter(silent)), "AAA", horizon=1)
    band = named(figure, "90 % interval")[0]
    assert np.isnan(band.y).sum() == 2
    assert np.isnan(named(figure, "median")[0].y).sum() == 1 + 20


def test_ribbon_of_every_horizon(result: BacktestResult) -> None:
    """Without a horizon buttons choose: one at a time is seen, and the closes always."""
    figure = plot.fan(result, "AAA")
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["+1 bar", "+5 bars"]
    assert [trace.visible for trace in figure.data] == [True] * 3 + [False] * 3 + [True]
    second = figure.layout.updatemenus[0].buttons[1].args[0]["visible"]
    assert list(second) == [False] * 3 + [True] * 4


def test_fan_scrolls(result: BacktestResult) -> None:
    """The newest 150 bars are shown at first, whole in height, with all of the time on the slider."""
    figure = plot.fan(result, "AAA", horizon=1)
    closes = result.bars.filter(symbol="AAA")
    times = moments(closes["close_time"])
    first, last = figure.layout.xaxis.range
    assert sum(first <= time <= last for time in times) == plot.SHOWN
    start, end = figure.layout.xaxis.rangeslider.range
    assert start <= times[0]
    assert times[-1] <= end
    low, high = figure.layout.yaxis.range
    shown = closes["close"].tail(plot.SHOWN)
    assert low < shown.min() < shown.max() < high
    assert high - low < 2 * (shown.max() - shown.min())


def test_bars_stand_side_by_side_where_markets_sleep() -> None:
    """Sessions of a few hours leave no nights in between; of many bars the newest are drawn in full."""
    made = made_up(("AAA", "BBB"), five_minutes(4000), (1,))
    figure = plot.fan(made, "AAA")
    assert figure.layout.xaxis.type == "category"
    closes = named(figure, "close")[0]
    assert list(closes.x) == list(figure.layout.xaxis.categoryarray)
    assert len(set(closes.x)) == len(closes.x) <= 1501
    own = made.bars.filter(symbol="AAA")["close"].to_numpy()
    assert closes.y[-750:] == pytest.approx(own[-750:], rel=1e-6)
    assert closes.y[:3] == pytest.approx(own[[0, 5, 10]], rel=1e-6)
    assert "1 of 5 bars is drawn before 2009-03-" in figure.layout.xaxis.title.text
    marks = [x for trace in plot.trades(made, "AAA").data[1:] for x in trace.x]
    assert len(marks) > 100
    assert set(marks) <= set(closes.x)
    assert plot.fan(made_up(), "AAA").layout.xaxis.type == "date"


def test_fans_are_what_was_forecast(result: BacktestResult) -> None:
    """Each band starts at the close it was made at and ends at the quantiles' prices; fans do not overlap."""
    figure = plot.fans(result, "AAA", origins=3, bars=60)
    bands = named(figure, "q05 to q95")
    assert 1 <= len(bands) <= 3
    band = bands[0]
    origin = pl.from_epoch(pl.Series([band.x[0]]), "ms").dt.replace_time_zone("UTC")[0]
    made = result.signals.filter((pl.col("symbol") == "AAA") & (pl.col("close_time") == origin))
    last = made.row(by_predicate=pl.col("horizon") == 5, named=True)
    assert band.y[0] == band.y[-1] == last["reference"]
    assert band.y[2] == pytest.approx(last["reference"] * np.exp(last["q05"]))
    assert band.y[3] == pytest.approx(last["reference"] * np.exp(last["q95"]))
    starts = sorted((trace.x[0], max(trace.x)) for trace in bands)
    assert all(end <= start for (_, end), (start, _) in pairwise(starts))
    closes = figure.data[-1]
    assert closes.name == "close"
    assert len(closes.y) == 60


def test_many_trades_leave_the_price_to_be_seen(result: BacktestResult) -> None:
    """Where a book trades at each close, its marks are smaller and let the price through."""
    few, often = result, replace(result, fills=pl.concat([result.fills] * 4))
    sizes, opacities = [], []
    for each in (few, often):
        marker = plot.trades(each, "BBB").data[1].marker
        sizes.append(max(marker.size))
        opacities.append(marker.opacity)
    assert sizes[1] < 0.7 * sizes[0]
    assert opacities == [1.0, 0.5]


def test_trades_stand_where_they_were_made(result: BacktestResult) -> None:
    """Each fill is a mark at its price and close, bought or sold; buy-and-hold has none."""
    figure = plot.trades(result, "BBB")
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["drift", "band"]
    own = result.fills.filter(symbol="BBB", strategy="drift")
    for trace, sign in zip(figure.data[1:3], (1, -1), strict=True):
        part = own.filter(pl.col("units") * sign > 0)
        assert trace.name == ("bought" if sign == 1 else "sold")
        assert list(trace.x) == moments(part["close_time"])
        assert trace.y == pytest.approx((part["price"] / part["basis"] * 0.5).to_numpy(), rel=1e-6)
        values = (part["units"] * part["price"]).abs().to_numpy()
        assert (np.argsort(trace.marker.size) == np.argsort(values)).all()
    assert len(figure.data) == 1 + 2 * 2


def test_monthly_returns_by_hand() -> None:
    """A month begins at the last equity of the one before; what was not is null; years are compounded."""
    when = [(2024, 11, 15), (2024, 11, 29), (2024, 12, 31), (2025, 2, 3), (2025, 2, 28)]
    days = pl.Series("close_time", [f"{year}-{month:02}-{day:02}" for year, month, day in when])
    equity = pl.DataFrame({"strategy": ["s"] * 5, "equity": [100.0, 110.0, 99.0, 90.0, 108.9]})
    equity = equity.with_columns(days.str.to_datetime(time_unit="ns", time_zone="UTC"))
    table = plot.monthly_returns(replace(made_up(), equity=equity), "s")
    assert table["year"].to_list() == [2024, 2025]
    assert table["Nov"][0] == pytest.approx(0.1)
    assert table["Dec"][0] == pytest.approx(-0.1)
    assert table["Feb"][1] == pytest.approx(0.1)
    assert table["total"].to_list() == pytest.approx([-0.01, 0.1])
    others = table.drop("year", "total").to_numpy()
    assert np.isfinite(others.astype(float)).sum() == 3


def test_costs_are_shares_of_the_first_equity(result: BacktestResult) -> None:
    """All four kinds are there, and together they are what the metrics say."""
    paid = plot.costs_paid(result)
    both = paid.join(result.portfolio, on="strategy", suffix="_metric")
    assert both.height == 3
    sums = both["commission"] + both["spread"] + both["slippage"]
    assert sums.to_list() == pytest.approx(both["costs"].to_list())
    assert both["carry"].to_list() == pytest.approx(both["carry_metric"].to_list())
    bars = plot.costs(result).data
    assert [bar.name for bar in bars] == list(plot.COSTS)
    assert bars[0].x == pytest.approx(paid["commission"].to_numpy()[::-1], rel=1e-6)


def test_exposure_has_both_panels(result: BacktestResult) -> None:
    """Gross and net exposure of every strategy, each named once in the legend."""
    figure = plot.exposure(result)
    assert len(figure.data) == 6
    assert sum(trace.showlegend for trace in figure.data) == 3
    own = result.equity.filter(strategy="drift")
    gross, net = named(figure, "drift")
    assert gross.y == pytest.approx(own["gross"].to_numpy(), rel=1e-6)
    assert net.y == pytest.approx(own["net"].to_numpy(), rel=1e-6)


def test_retraining_is_a_timeline(result: BacktestResult) -> None:
    """Spans follow one another without a hole; every training is one mark with its fate and reason."""
    spans = plot.models_in_force(result)
    assert spans["until"].to_list()[:-1] == spans["since"].to_list()[1:]
    assert spans["model"].n_unique() == spans.height == 3
    figure = plot.retraining(result)
    assert [trace.name for trace in figure.data[:3]] == spans["model"].to_list()
    marks = figure.data[3:]
    assert [trace.name for trace in marks] == ["accepted (3)", "refused (1)", "not scored (1)"]
    assert list(marks[0].error_y.array) == pytest.approx([0.006] * 3)
    assert "accepted" in marks[0].text[0]
    assert "gain +1.20% ± 0.30%, 900 origins" in marks[0].text[0]
    assert "it must be more than" in marks[0].text[0].replace("<br>", " ")
    assert marks[2].y[0] == 0


def test_calibration_says_what_the_scores_say(result: BacktestResult) -> None:
    """Coverage reaches two errors to either side; reliability and PIT are of the same outcomes."""
    pooled = result.scores.filter(symbol="all").sort("horizon")
    dots = named(plot.coverage(result), "80 % interval")[0]
    assert list(dots.y) == pooled["coverage_80"].to_list()
    assert list(dots.error_y.array) == pytest.approx((2 * pooled["coverage_80_error"]).to_list())
    lines = plot.reliability(result).data
    assert [line.name for line in lines] == ["+1 bar", "+5 bars"]
    known = result.signals.join(result.outcomes, on=["symbol", "close_time", "horizon"]).filter(horizon=1)
    share = (known["outcome"] <= known["q25"]).mean()
    assert lines[0].y[2] == pytest.approx(share - 0.25)
    panels = [trace for trace in plot.pit(result).data if trace.type == "bar"]
    assert len(panels) == 2
    assert np.dot(panels[0].y, panels[0].width) == pytest.approx(1)


@pytest.mark.parametrize(
    ("by", "places"), [("symbol", ["AAA", "BBB"]), ("regime", ["calm", "middle", "volatile"])]
)
def test_skill_by(result: BacktestResult, by: str, places: list[str]) -> None:
    """A panel for each horizon, a mark with two errors for each baseline and value."""
    figure = plot.skill(result, by)
    assert list(figure.layout.xaxis.ticktext) == places
    har = named(figure, "har")
    rows = result.skill.filter(other="har", horizon=1)
    rows = rows.filter(
        (pl.col("symbol") == "all") != (by == "symbol"), (pl.col("regime") == "all") != (by == "regime")
    )
    assert list(har[0].y) == rows["skill"].to_list()
    assert list(har[0].error_y.array) == [1.6] * len(places)


def test_skill_pooled(result: BacktestResult) -> None:
    """Every baseline once a horizon."""
    figure = plot.skill(result)
    assert [sorted(trace.y) for trace in figure.data] == [["ewma", "fhs", "har", "hs"]] * 2


@pytest.mark.parametrize(
    ("draw", "fault"),
    [
        (lambda r: plot.fan(r, "ZZZ"), "symbol 'ZZZ' has no bars: take one of AAA, BBB"),
        (lambda r: plot.fans(r, "ZZZ"), "take one of AAA, BBB"),
        (lambda r: plot.trades(r, "ZZZ"), "take one of AAA, BBB"),
        (lambda r: plot.fan(r, "AAA", horizon=7), r"horizon 7 is not forecast for AAA: take one of \[1, 5\]"),
        (lambda r: plot.monthly(r, "x"), "strategy 'x' has no equity: take one of band, buy-and-hold, drift"),
        (lambda r: plot.skill(r, "year"), "by = 'year': take other, symbol or regime"),
    ],
)
def test_unknown_names(result: BacktestResult, draw, fault: str) -> None:
    """A name that the result does not know is refused with those it knows."""
    with pytest.raises(ConfigError, match=fault):
        draw(result)


def test_many_fills_are_thinned() -> None:
    """Of very many fills the last 500 of a strategy are marked, and the figure says so."""
    made = made_up(("AAA",), sessions(5200), (1,), ("drift",))
    figure = plot.trades(made, "AAA")
    assert sum(len(trace.x) for trace in figure.data[1:]) == 500
    assert "the last 500 fills are drawn" in figure.layout.xaxis.title.text
    assert "the last 500" not in str(plot.trades(made_up(), "AAA").layout.xaxis.title.text)
