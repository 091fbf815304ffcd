"""Figures of a backtest or an evaluation, for the report and for notebooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from barcast.backtest.evaluate import ALL, Evaluation
from barcast.backtest.ledger import BENCHMARK
from barcast.backtest.paths import BROWNIAN, OWN, PAIRS
from barcast.backtest.result import BacktestResult, levels_of
from barcast.backtest.scoring import INTERVALS, POOLED
from barcast.backtest.scoring import pit as pit_bins
from barcast.backtest.stress import HISTORY, StressResult
from barcast.backtest.tables import collected, spans
from barcast.models import ConfigError

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
INK, GRID, BAND, GREY = "#334155", "#e2e8f0", "37, 99, 235", "#94a3b8"
GOOD, BAD = "#059669", "#dc2626"
COLUMNS = ("close_time", "equity", "gross", "net")
COSTS = ("commission", "spread", "slippage", "carry")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'
_MOST_POINTS = 2000
_MOST_BARS = 1500
_MOST_FILLS = 500
_MANY_FILLS = 100
_ROOM = 44
_FILLED = 4
_SLEEPY = 2.0
_AXIS: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID}
_CELLS = {"type": "category", "showgrid": False, "fixedrange": True, "ticks": ""}
_NOMINAL = {"color": INK, "width": 1, "dash": "dash"}
_LAYOUT: dict[str, Any] = {
    "template": {},
    "height": 380,
    "margin": {"l": 64, "r": 16, "t": 36, "b": 44},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": _FONT, "size": 13, "color": INK},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "hovermode": "x unified",
}
_MARKS = ("circle", "diamond", "square", "triangle-up")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MENU: dict[str, Any] = {
    "x": 0,
    "xanchor": "left",
    "y": 1.03,
    "yanchor": "bottom",
    "bgcolor": "white",
    "bordercolor": GRID,
    "font": {"size": 12},
}
SURE = 2
"""Standard errors that an error bar reaches to either side."""
FEW = 30
"""Probabilities in a bin below which it is not drawn."""
SHOWN = 150
"""Bars that a figure to scroll through shows at first."""

Array = NDArray[np.float64]


def equity(result: BacktestResult) -> go.Figure:
    """The equity of each strategy, as a multiple of what it began with; buy-and-hold is grey."""
    return _over_time(result, [("growth", "multiple of the first equity", "~g", ".4f")])


def drawdown(result: BacktestResult) -> go.Figure:
    """How far each strategy's equity is below its highest before."""
    figure = _over_time(result, [("drawdown", "below the highest equity before", "~%", ".2%")])
    for trace in figure.data:
        if trace.name != BENCHMARK and len(figure.data) <= _FILLED:
            trace.update(fill="tozeroy", fillcolor=_faint(trace.line.color))
    return figure


def exposure(result: BacktestResult) -> go.Figure:
    """What each strategy holds as a share of its equity: long plus short above, long less short below."""
    panels = [("gross", "gross", "~%", ".1%"), ("net", "net", "~%", ".1%")]
    return _over_time(result, panels).update_layout(height=440)


def costs(result: BacktestResult) -> go.Figure:
    """What each strategy paid, as a share of its first equity, by kind. Received carry is below 0."""
    paid = costs_paid(result).reverse()
    figure = _figure("", "")
    for k, kind in enumerate(COSTS):
        figure.add_bar(
            y=paid["strategy"].to_list(),
            x=_y(paid[kind]),
            name=kind,
            orientation="h",
            marker={"color": COLOURS[k]},
            hovertemplate="%{x:.3%}",
        )
    return figure.update_layout(
        barmode="relative",
        height=110 + 34 * max(1, paid.height),
        margin={"l": 130},
        xaxis={"tickformat": "~%", "title": _title("share of the first equity")},
        yaxis={"type": "category", "tickformat": None},
        hovermode="y unified",
    )


def costs_paid(result: BacktestResult) -> pl.DataFrame:
    """What each strategy paid as a share of its first equity: strategy and a column for each of `COSTS`.

    Carry is negative where more was received than paid.
    """
    fills, equity = result.rows("fills").lazy(), result.rows("equity").lazy()
    traded = fills.group_by("strategy").agg(pl.col(COSTS[:-1]).sum()).collect()
    first = pl.col("equity").sort_by("close_time").first().alias("first")
    each = equity.group_by("strategy").agg(first, pl.col("carry").sum()).collect()
    order = pl.DataFrame({"strategy": _strategies(result)}, schema={"strategy": pl.String()})
    for table in (each, traded):
        order = order.join(table, on="strategy", how="left", maintain_order="left")
    return order.select("strategy", *(pl.col(kind).fill_null(0.0) / pl.col("first") for kind in COSTS))


def monthly(result: BacktestResult, strategy: str) -> go.Figure:
    """A strategy's return in each month and year in percent; the first and the last may be incomplete."""
    table = monthly_returns(result, strategy)
    columns = table.columns[1:]
    values = 100 * table.select(columns).cast(pl.Float64).to_numpy()
    most = max(0.01, *np.abs(values[:, :12][~np.isnan(values[:, :12])]).tolist())
    figure = _figure("", "")
    figure.add_heatmap(
        z=values,
        x=columns,
        y=[str(year) for year in table["year"]],
        zmin=-most,
        zmax=most,
        colorscale=[[0, BAD], [0.5, "#ffffff"], [1, GOOD]],
        opacity=0.8,
        text=[["" if np.isnan(value) else f"{value:+z.1f}" for value in row] for row in values],
        texttemplate="%{text}",
        hovertemplate="%{x} %{y}: %{z:+.2f} %<extra></extra>",
        showscale=False,
        xgap=2,
        ygap=2,
    )
    figure.add_vline(x=11.5, line={"color": GREY, "width": 1})
    return figure.update_layout(
        height=60 + 30 * table.height,
        margin={"l": 48, "r": 8, "t": 32, "b": 8},
        xaxis=_CELLS | {"side": "top"},
        yaxis=_CELLS | {"autorange": "reversed"},
        hovermode="closest",
    )


def monthly_returns(result: BacktestResult, strategy: str) -> pl.DataFrame:
    """A strategy's returns, a row for each year: year, `Jan` ... `Dec`, total.

    A month's return runs from the last equity before it (the first's from the first equity) to its own last,
    by UTC dates, a close at midnight with the day that it ends; null where there was none, or nothing left.
    Raise ConfigError for a strategy without equity.
    """
    own = collected(result.rows("equity").filter(strategy=strategy).select("close_time", "equity"))
    own = own.sort("close_time")
    if not own.height:
        known = ", ".join(sorted(_strategies(result)))
        raise ConfigError(f"strategy {strategy!r} has no equity: take one of {known or 'none'}")
    before = pl.col("equity").shift(fill_value=own["equity"][0])
    change = pl.when(before > 0).then(pl.col("equity") / before - 1)
    when, last = pl.col("close_time").dt.offset_by("-1ns").dt, pl.col("equity").last()
    by_month = own.group_by(year=when.year(), month=when.month(), maintain_order=True).agg(last)
    by_year = own.group_by(year=when.year(), maintain_order=True).agg(last)
    months = by_month.with_columns(change=change)
    own_month = (pl.col("change").filter(pl.col("month") == k).first() for k in range(1, 13))
    wide = months.group_by("year", maintain_order=True).agg(
        *(month.alias(name) for month, name in zip(own_month, MONTHS, strict=True))
    )
    return wide.with_columns(by_year.select(change.alias("total")))


def fan(result: BacktestResult, symbol: str, horizon: int | None = None) -> go.Figure:
    """A symbol's closes, and around each what had been forecast of it, to scroll through.

    A band holds 90 or 50 % of outcomes by the forecast; it stands at the close that it was for, `horizon`
    bars after it was made. Without a horizon, buttons choose one. Prices are on the basis of the newest bar.
    Of more than 1,500 bars the newest half is drawn in full and of the others every k-th, which the figure
    says. Raise ConfigError for a symbol without bars and a horizon without forecasts.
    """
    track = _Track.of(result, symbol)
    made = result.rows("signals").filter(symbol=symbol)
    known = sorted(collected(made.select(pl.col("horizon").unique()))["horizon"])
    if horizon is not None and horizon not in known:
        raise ConfigError(f"horizon {horizon} is not forecast for {symbol}: take one of {known}")
    horizons = known if horizon is None else [horizon]
    figure, owners, inside = _scroll(track), list[int](), list[float]()
    for h in horizons:
        ribbon = track.ribbon(result, h)
        named = levels_of(ribbon.columns)
        for level, opacity in ((0.05, 0.13), (0.25, 0.2)):
            lower, upper = named.get(level), named.get(round(1 - level, 8))
            if lower and upper:
                figure.add_scatter(
                    **track.band(ribbon, lower, upper),
                    fill="toself",
                    fillcolor=f"rgba({BAND}, {opacity})",
                    mode="none",
                    name=f"{100 * (1 - 2 * level):.0f} % interval",
                    hoverinfo="skip",
                )
                newest = ribbon.tail(SHOWN if h == horizons[0] else 0)
                inside += [*newest[lower].drop_nulls(), *newest[upper].drop_nulls()]
        if median := named.get(0.5):
            figure.add_scatter(
                x=track.x(ribbon["close_time"]),
                y=_y(ribbon[median]),
                mode="lines",
                line={"color": COLOURS[0], "width": 1.3, "dash": "dot"},
                name="median",
                hovertemplate="%{y:.6~g}",
            )
        owners += [h] * (len(figure.data) - len(owners))
    figure.add_scatter(**track.line())
    if len(horizons) > 1:
        owned = [np.array([owner == h for owner in owners] + [True]).tolist() for h in horizons]
        _choose(figure, [f"+{bars(h)}" for h in horizons], owned)
    closes = track.bars["close"].tail(SHOWN)
    return figure.update_yaxes(range=_around([*closes, *inside]))


def fans(result: BacktestResult, symbol: str, origins: int = 6, bars: int = 120) -> go.Figure:
    """A symbol's last closes, and what was forecast from some of them: nested central intervals.

    From up to `origins` closes, evenly spread over the last `bars` whose outcomes are known and the longest
    horizon apart, the intervals between pairs of levels fan out over the horizons, around the median. Prices
    are on the basis of the newest bar. Raise ConfigError for a symbol without bars.
    """
    track = _Track.of(result, symbol, bars)
    mine = result.rows("signals").filter(symbol=symbol)
    longest = max([1, *collected(mine.select(pl.col("horizon").unique()))["horizon"]])
    late = pl.col("close_time") >= track.bars["close_time"][0]
    own = collected(mine.filter(late)).join(track.scales, on="close_time")
    own = own.with_columns(reference=pl.col("reference") * pl.col("scale")).sort("close_time", "horizon")
    ends = collected(result.rows("outcomes").filter(late, symbol=symbol))
    ends = ends.select("close_time", "horizon", "end_time")
    whole = ends.filter(pl.col("horizon") == longest).sort("close_time")["close_time"]
    step = max(longest, -(-len(whole) // origins))
    figure = _figure("price", "~g")
    figure.update_xaxes(**track.axis())
    named = list(levels_of(own.columns).values())
    pairs = list(zip(named[: len(named) // 2], reversed(named), strict=False))
    for k, origin in enumerate(whole.reverse().gather_every(step).reverse()):
        paths = own.filter(pl.col("close_time") == origin)
        paths = paths.join(ends, on=["close_time", "horizon"], maintain_order="left")
        start = paths["reference"][0]
        times = pl.concat([paths["close_time"].head(1), paths["end_time"]])
        for j, (lower, upper) in enumerate(pairs):
            figure.add_scatter(
                x=track.x(pl.concat([times, times.reverse()])),
                y=[start, *_prices(paths, lower), *reversed([start, *_prices(paths, upper)])],
                fill="toself",
                fillcolor=f"rgba({BAND}, {_opacity(j, len(pairs))})",
                mode="none",
                name=f"{lower} to {upper}",
                legendgroup=lower,
                showlegend=k == 0,
                hoverinfo="skip",
            )
        if "q50" in named:
            figure.add_scatter(
                x=track.x(times),
                y=[start, *_prices(paths, "q50")],
                mode="lines",
                line={"color": COLOURS[0], "width": 1.5, "dash": "dot"},
                name="median",
                legendgroup="median",
                showlegend=k == 0,
                hoverinfo="skip",
            )
    return figure.add_scatter(**track.line())


def trades(result: BacktestResult, symbol: str) -> go.Figure:
    """Where on a symbol's price each strategy bought and sold, to scroll through; a menu chooses one.

    The area of a mark is the traded value. Prices are on the basis of the newest bar; of many fills the last
    500 of a strategy are drawn, and bars as in `fan`. Raise ConfigError for a symbol without bars.
    """
    track = _Track.of(result, symbol)
    own = collected(result.rows("fills").filter(pl.col("strategy") != BENCHMARK, symbol=symbol))
    own = own.sort("close_time").with_columns(
        value=(pl.col("units") * pl.col("price")).abs(),
        shown=pl.col("price") * (track.basis / pl.col("basis")),
    )
    figure = _scroll(track)
    figure.add_scatter(**track.line())
    traded = own["strategy"].unique()
    strategies = [name for name in _strategies(result) if name in traded]
    for strategy in strategies:
        mine = own.filter(pl.col("strategy") == strategy).tail(_MOST_FILLS)
        most = mine["value"].max()
        scale = 1.0 if mine.height <= _MANY_FILLS else 0.6  # else the price cannot be seen for marks
        for side, mark, colour, sign in (("bought", "up", GOOD, 1), ("sold", "down", BAD, -1)):
            part = mine.filter(pl.col("units") * sign > 0)
            figure.add_scatter(
                x=track.x(track.nearest(part["close_time"])),
                y=_y(part["shown"]),
                customdata=part.select("units", "price", "value", "position").cast(pl.Float32).to_numpy(),
                mode="markers",
                marker={
                    "symbol": f"triangle-{mark}",
                    "color": colour,
                    "size": _y(scale * (5 + 11 * (part["value"] / most).sqrt())),
                    "opacity": 1.0 if scale == 1 else 0.5,
                    "line": {"color": "white", "width": scale},
                },
                name=side,
                hovertemplate="%{customdata[0]:.5~g} at %{customdata[1]:.6~g}, value %{customdata[2]:,.6~g}, "
                f"then %{{customdata[3]:.5~g}}<extra>{strategy}</extra>",
            )
    if own.height and max(own["strategy"].value_counts()["count"]) > _MOST_FILLS:
        told = [track.note] if track.note else []
        told.append(f"the last {_MOST_FILLS} fills are drawn")
        figure.update_xaxes(title=_title("<br>".join(told)))
    if len(strategies) > 1:
        owned = [[True, *(s == strategy for s in strategies for _ in range(2))] for strategy in strategies]
        _choose(figure, strategies, owned)
    closes = track.bars["close"].tail(SHOWN)
    recent = own.filter(pl.col("close_time") >= track.bars["close_time"].tail(SHOWN)[0])["shown"]
    return figure.update_yaxes(range=_around([*closes, *recent])).update_layout(hovermode="closest")


def retraining(result: BacktestResult) -> go.Figure:
    """The model in force over time, and each training: what it gained over the champion, and its fate.

    A bar reaches two standard errors to either side. A training without a verdict on CRPS stands at 0.
    """
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.16, 0.84], vertical_spacing=0.04)
    figure.update_layout(**(_LAYOUT | {"height": 400, "hovermode": "closest"}))
    figure.update_xaxes(**_AXIS, type="date").update_yaxes(**_AXIS)
    spans = models_in_force(result)
    for k, span in enumerate(spans.iter_rows(named=True)):
        ends = pl.Series([span["since"], span["until"]], dtype=spans["since"].dtype)
        figure.add_scatter(
            x=_x(ends),
            y=["in force"] * 2,
            mode="lines",
            line={"color": COLOURS[k % len(COLOURS)], "width": 16},
            opacity=(1.0, 0.6, 0.3)[k // len(COLOURS) % 3],
            name=span["model"],
            showlegend=False,
            hovertemplate=f"{span['model']}<br>{span['since']:%Y-%m-%d} to {span['until']:%Y-%m-%d}"
            "<extra></extra>",
            row=1,
            col=1,
        )
    trained = result.trainings.with_columns(at=pl.coalesce("judged", "asked"))
    scored = pl.col("gain").is_not_null()
    for name, chosen, colour, mark in (
        ("accepted", pl.col("accepted"), GOOD, "circle"),
        ("refused", ~pl.col("accepted") & scored, BAD, "x"),
        ("not scored", ~pl.col("accepted") & ~scored, GREY, "diamond-open"),
    ):
        own = trained.filter(chosen)
        figure.add_scatter(
            x=_x(own["at"]),
            y=_y(own["gain"].fill_null(0)),
            error_y=_bar(own["gain_error"].fill_null(0)),
            mode="markers",
            marker={"color": colour, "symbol": mark, "size": 10},
            name=f"{name} ({own.height})",
            text=[_told(row) for row in own.iter_rows(named=True)],
            hovertemplate="%{text}<extra></extra>",
            row=2,
            col=1,
        )
    figure.add_hline(y=0, line=_NOMINAL, row=2, col=1)
    figure.update_yaxes(showgrid=False, row=1, col=1)
    return figure.update_yaxes(
        title=_title("CRPS below the champion's"), tickformat="+.1~%", row=2, col=1
    ).update_layout(margin={"l": 84})


def models_in_force(result: BacktestResult) -> pl.DataFrame:
    """Which model made the forecasts over time, a row for each change: model, since, until (closes)."""
    runs = pl.concat([_runs(some) for some in spans(result.rows("signals").select("close_time", "model"))])
    merged = runs.group_by(pl.col("model").rle_id().alias("run"), maintain_order=True).agg(
        pl.col("model").first(), pl.col("since").first(), pl.col("until").last()
    )
    following = pl.col("since").shift(-1)
    return merged.select("model", "since", until=pl.coalesce(following, "until"))


def _runs(signals: pl.DataFrame) -> pl.DataFrame:
    """The first and the last close of each run of closes whose first signal is of one model."""
    first = signals.sort("close_time").group_by("close_time", maintain_order=True)
    runs = first.agg(pl.col("model").first()).with_columns(run=pl.col("model").rle_id())
    return runs.group_by("run", maintain_order=True).agg(
        pl.col("model").first(),
        pl.col("close_time").first().alias("since"),
        pl.col("close_time").last().alias("until"),
    )


def pit(result: BacktestResult) -> go.Figure:
    """Where outcomes fell between the levels, a panel for each horizon; flat at 1 when calibrated."""
    bins = pit_bins(result.rows("signals"), result.rows("outcomes"))
    horizons = sorted(bins["horizon"].unique())
    figure = _grid(horizons, ["density of outcomes"], 290).update_layout(margin={"t": 36})
    for column, h in enumerate(horizons, 1):
        _densities(figure, bins.filter(pl.col("horizon") == h), "outcomes", 1, column)
    return _unit_square(figure, bins)


def reliability(result: BacktestResult) -> go.Figure:
    """How far the share of outcomes at or below each quantile is from its level, by horizon."""
    bins = pit_bins(result.rows("signals"), result.rows("outcomes"))
    figure = _figure("share below - level", "+.1~%")
    for k, ((horizon,), own) in enumerate(bins.group_by("horizon", maintain_order=True)):
        inner = own.with_columns(below=pl.col("share").cum_sum())[:-1]
        figure.add_scatter(
            x=inner["upper"].to_numpy(),
            y=(inner["below"] - inner["upper"]).to_numpy(),
            mode="lines+markers",
            line=_line(k),
            name=f"+{bars(horizon)}",
            hovertemplate="%{y:+.2%}",
        )
    figure.add_hline(y=0, line=_NOMINAL)
    return figure.update_layout(xaxis={"title": _title("level"), "range": [0, 1], "tickformat": ".0%"})


def coverage(result: BacktestResult) -> go.Figure:
    """The share of outcomes inside each central interval, beside the share that belongs there (dashed).

    A bar reaches two standard errors (Newey and West) to either side.
    """
    pooled = result.scores.filter(pl.col("symbol") == POOLED).sort("horizon")
    figure = _figure("share of outcomes inside", ".0%")
    places = np.arange(pooled.height)
    for k, percent in enumerate(INTERVALS):
        values = pooled[f"coverage_{percent}"]
        figure.add_scatter(
            x=places + 0.1 * (k - 1),
            y=values.to_numpy(),
            error_y=_bar(pooled[f"coverage_{percent}_error"]),
            mode="markers+text",
            marker={"color": COLOURS[k], "symbol": _MARKS[k], "size": 9},
            text=["" if value is None else f" {value:.1%}" for value in values],
            textposition=["top right" if above else "bottom right" for above in values >= percent / 100],
            name=f"{percent} % interval",
            cliponaxis=False,
            hovertemplate="%{y:.2%}",
        )
        figure.add_hline(y=percent / 100, line={"color": COLOURS[k], "width": 1.3, "dash": "dash"})
    ticks = [f"+{bars(horizon)}" for horizon in pooled["horizon"]]
    return figure.update_layout(
        xaxis={"tickvals": places, "ticktext": ticks, "range": [-0.5, len(ticks) - 0.5], "showgrid": False},
        margin={"r": 40},
        hovermode="closest",
    )


def skill(result: BacktestResult, by: str = "other") -> go.Figure:
    """How far the CRPS is below each baseline's: pooled, or `by` "symbol" or "regime" (calm to volatile).

    A bar reaches two standard errors to either side. Raise ConfigError for another `by`.
    """
    if by not in ("other", "symbol", "regime"):
        raise ConfigError(f"by = {by!r}: take other, symbol or regime")
    symbol, regime = pl.col("symbol") == POOLED, pl.col("regime") == POOLED
    if by == "other":
        pooled = result.skill.filter(symbol & regime)
        dots = pooled.select("horizon", "skill", "error", model="other")
        return _dots(dots, "% below the baseline")
    rows = result.skill.filter(symbol & ~regime if by == "regime" else ~symbol & regime)
    rows = rows.rename({"other": "model"})
    others = sorted(rows["model"].unique())
    horizons = sorted(rows["horizon"].unique())
    figure = _by(rows, others, horizons, by, [("skill", "error", "% below the baseline")], 380)
    return figure.add_hline(y=0, line=_NOMINAL)


def model_skill(result: Evaluation) -> go.Figure:
    """How far each model's CRPS is below that of the reference, all folds pooled; the best one on top."""
    pooled = result.scores.filter(fold=ALL).filter(pl.col("model") != result.meta["reference"])
    dots = pooled.select("horizon", "model", "skill", error="skill_error")
    return _dots(dots, "% below hs")


def skill_by_fold(result: Evaluation) -> go.Figure:
    """The skill of each model in each fold."""
    rows = result.scores.filter(pl.col("fold") != ALL).filter(pl.col("model") != result.meta["reference"])
    figure = _by(rows, *_axes(result), "fold", [("skill", "skill_error", "% below hs")], 380)
    return figure.add_hline(y=0, line=_NOMINAL)


def coverage_by_fold(result: Evaluation) -> go.Figure:
    """The share of outcomes inside the central intervals in each fold."""
    return _coverages(result, result.scores.filter(pl.col("fold") != ALL), "fold")


def coverage_by_third(result: Evaluation) -> go.Figure:
    """The share of outcomes inside the central intervals, by how volatile the time was expected to be."""
    return _coverages(result, result.thirds, "third")


def pits(result: Evaluation) -> go.Figure:
    """Where outcomes fell between the levels, a row for each model; flat at 1 when calibrated."""
    models = list(result.meta["models"])
    horizons = result.meta["horizons"]
    figure = _grid(horizons, models, 70 + 110 * len(models))
    bins = result.pit.filter(fold=ALL)
    for row, model in enumerate(models, 1):
        for column, h in enumerate(horizons, 1):
            _densities(figure, bins.filter(model=model, horizon=h), model, row, column)
    return _unit_square(figure, bins)


def model_reliability(result: Evaluation) -> go.Figure:
    """How far the share of outcomes at or below each quantile is from its level."""
    rows = result.levels.filter(fold=ALL).with_columns(off=pl.col("below") - pl.col("level"))
    figure = _by(rows, *_axes(result), "level", [("off", "error", "share below - level")], 380)
    figure.add_hline(y=0, line=_NOMINAL)
    figure.update_xaxes(title=_title("level"))
    return figure.update_yaxes(tickformat="+.1%")


def touches(result: Evaluation, model: str) -> go.Figure:
    """Reliability of the probabilities of first touches: a model's paths, and a Brownian motion's.

    A panel for each pair of barriers; bins of fewer than `FEW` probabilities are left out.
    """
    bins = pl.DataFrame() if result.reliability is None else result.reliability
    bins = bins.filter(pl.col("model") == model, pl.col("n") >= FEW)
    shown, pairs = bins.filter(pl.col("coupling").is_in([OWN, BROWNIAN])), PAIRS
    most = min(1.0, max([0.2, *(1.05 * shown["said"]), *(1.05 * (shown["seen"] + SURE * shown["error"]))]))
    figure = make_subplots(
        cols=len(pairs),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        column_titles=[f"{up:g} up, {down:g} down" for up, down in pairs],
    )
    for column, (up, down) in enumerate(pairs, 1):
        for k, (coupling, name) in enumerate(((OWN, model), (BROWNIAN, BROWNIAN))):
            own = shown.filter(up=up, down=down, coupling=coupling)
            figure.add_scatter(
                x=own["said"].to_list(),
                y=own["seen"].to_list(),
                error_y=_bar(own["error"]),
                mode="lines+markers",
                line={"color": COLOURS[k], "width": 1},
                marker={"color": COLOURS[k], "symbol": _MARKS[k], "size": 7},
                customdata=own["n"].to_list(),
                hovertemplate="said %{x:.1%}, came true %{y:.1%} of %{customdata}",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        diagonal = {"x0": 0, "y0": 0, "x1": most, "y1": most}
        figure.add_shape(type="line", line=_NOMINAL, layer="below", row=1, col=column, **diagonal)
    layout = {"height": 380, "margin": {"l": 84, "r": 16, "t": 64, "b": 52}, "hovermode": "closest"}
    figure.update_layout(**(_LAYOUT | layout))
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    figure.update_xaxes(**_AXIS, range=[0, most], tickformat=".0%", title=_title("said"))
    figure.update_yaxes(**_AXIS, range=[0, most], tickformat=".0%")
    return figure.update_yaxes(title=_title("came true"), col=1)


def stress_growth(result: StressResult, strategy: str) -> go.Figure:
    """A book's equity over its first: the middle 90 and 50 % of the scenarios, their median, and history.

    They are drawn at the closes that the result has kept.
    """
    regimes, rows = result.meta["regimes"], result.equity.filter(strategy=strategy)
    figure = _side_by_side(regimes, "multiple of the first equity", "~g")
    past = rows.filter(regime=HISTORY).sort("close_time")
    for column, regime in enumerate(regimes, 1):
        closes = rows.filter(regime=regime).group_by("close_time")
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        some = closes.agg(pl.col("growth").quantile(p, "linear").alias(f"{p}") for p in levels)
        some = some.sort("close_time")
        line, at = _line(column - 1), {"row": 1, "col": column}
        for low, high in (("0.05", "0.95"), ("0.25", "0.75")):
            edge = {"x": _x(some["close_time"]), "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
            figure.add_scatter(**edge, y=_y(some[low]), showlegend=False, **at)
            fill = {"fill": "tonexty", "fillcolor": _faint(line["color"], 0.16)}
            figure.add_scatter(**edge, y=_y(some[high]), showlegend=False, **fill, **at)
        figure.add_scatter(
            x=_x(some["close_time"]), y=_y(some["0.5"]), name=f"median, {regime}", line=line, **at
        )
        shown = {"name": "as it was", "legendgroup": HISTORY, "showlegend": column == 1}
        figure.add_scatter(x=_x(past["close_time"]), y=_y(past["growth"]), line={"color": INK}, **shown, **at)
    return figure.update_xaxes(type="date")


def stress_outcomes(result: StressResult) -> go.Figure:
    """Total return and maximum drawdown of each book over the scenarios, a box for each regime."""
    figure = _side_by_side(("total return", "maximum drawdown"), "", "~%")
    for column, name in enumerate(("total_return", "max_drawdown"), 1):
        _boxes(figure, result.meta["regimes"], result.books, "strategy", name, column)
    return figure.update_layout(boxmode="group", height=420)


def stress_coverage(result: StressResult) -> go.Figure:
    """The share of outcomes inside the 80 % and 90 % intervals, a box over the scenarios for each regime."""
    figure = _side_by_side(("inside 80 %", "inside 90 %"), "", "~%")
    rows = result.scores.with_columns(ahead=pl.lit("+") + pl.col("horizon").cast(pl.String))
    for column, percent in enumerate((80, 90), 1):
        _boxes(figure, result.meta["regimes"], rows, "ahead", f"coverage_{percent}", column)
        figure.add_hline(y=percent / 100, line=_NOMINAL, row=1, col=column)
    return figure.update_layout(boxmode="group", height=380)


def stress_prices(result: StressResult, symbol: str) -> go.Figure:
    """The closes of some scenarios, over the last before them, and as they were.

    Raise ConfigError for a symbol whose prices are not kept.
    """
    regimes, rows = result.meta["regimes"], result.prices.filter(symbol=symbol)
    if not rows.height:
        known = ", ".join(result.prices["symbol"].unique(maintain_order=True)) or "none"
        raise ConfigError(f"symbol {symbol!r} has no prices here: take one of {known}")
    figure = _side_by_side(regimes, "multiple of the last close before", "~g")
    past = {"name": "as it was", "legendgroup": HISTORY, "line": {"color": INK, "width": 2}}
    for column, regime in enumerate(regimes, 1):
        own = {"name": regime, "line": _line(column - 1) | {"width": 0.8}, "opacity": 0.6}
        for name, look in ((regime, own), (HISTORY, past | {"showlegend": column == 1})):
            parts = rows.filter(regime=name).partition_by("number", maintain_order=True)
            some = [_every(part, _MOST_POINTS // 4) for part in parts]
            gap = pl.lit(None, pl.Float64).alias("close")  # one trace: a gap stands between two scenarios
            drawn = pl.concat([x for part in some for x in (part, part.tail(1).with_columns(gap))])
            y = _y(drawn["close"] / drawn["close"].first())
            figure.add_scatter(x=_x(drawn["close_time"]), y=y, mode="lines", **look, row=1, col=column)
    return figure.update_xaxes(type="date").update_layout(hovermode="closest")


def _side_by_side(titles: Sequence[str], axis: str, tickformat: str) -> go.Figure:
    """Panels beside one another, each with its own axes."""
    figure = make_subplots(
        cols=len(titles), shared_yaxes=bool(axis), subplot_titles=list(titles), horizontal_spacing=0.06
    )
    figure.update_layout(**_LAYOUT | {"margin": {"l": 64, "r": 16, "t": 72, "b": 44}})
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    figure.update_xaxes(**_AXIS).update_yaxes(**_AXIS | {"tickformat": tickformat})
    return figure.update_yaxes(title=_title(axis), row=1, col=1)


def _boxes(
    figure: go.Figure, regimes: Sequence[str], rows: pl.DataFrame, x: str, y: str, column: int
) -> None:
    """A box for each regime at each value of `x`, and what came of the bars as they were."""
    for k, regime in enumerate(regimes):
        own = rows.filter(regime=regime)
        figure.add_box(
            x=own[x].to_list(),
            y=_y(own[y]),
            name=regime,
            legendgroup=regime,
            showlegend=column == 1,
            marker={"color": COLOURS[k % len(COLOURS)], "size": 3},
            line={"width": 1.2},
            row=1,
            col=column,
        )
    past = rows.filter(regime=HISTORY)
    figure.add_scatter(
        x=past[x].to_list(),
        y=_y(past[y]),
        name="as it was",
        legendgroup=HISTORY,
        showlegend=column == 1,
        mode="markers",
        marker={"color": INK, "symbol": "line-ew-open", "size": 26, "line": {"width": 2}},
        row=1,
        col=column,
    )


def _every(rows: pl.DataFrame, most: int) -> pl.DataFrame:
    """At most about so many rows, evenly, the first and the last among them."""
    step = -(-rows.height // most)
    return (
        rows if step < 2 else pl.concat([rows.gather_every(step), rows.tail(1)]).unique(maintain_order=True)
    )


def _coverages(result: Evaluation, rows: pl.DataFrame, x: str) -> go.Figure:
    known = [p for p in INTERVALS if rows[f"coverage_{p}"].null_count() == 0]
    parts = [(f"coverage_{p}", f"coverage_{p}_error", f"in {p} %") for p in known]
    figure = _by(rows, *_axes(result), x, parts, 60 + 230 * len(parts))
    for row, percent in enumerate(known, 1):
        figure.add_hline(y=percent / 100, line=_NOMINAL, row=row, col="all")
    return figure.update_yaxes(tickformat=".0%")


def _axes(result: Evaluation) -> tuple[Sequence[str], Sequence[int]]:
    return list(result.meta["models"]), result.meta["horizons"]


def _by(
    rows: pl.DataFrame,
    models: Sequence[str],
    horizons: Sequence[int],
    x: str,
    parts: Sequence[tuple[str, str, str]],
    height: int,
) -> go.Figure:
    """A panel for each horizon and value (column, error, title), a mark with error bars for each model.

    The models stand side by side at each value of the column `x`.
    """
    figure = _grid(horizons, [title for _, _, title in parts], height)
    places = {value: i for i, value in enumerate(rows[x].unique(maintain_order=True))}
    room = 0.7 / max(1, len(models))
    for k, model in enumerate(models):
        for column, h in enumerate(horizons, 1):
            own = rows.filter(model=model, horizon=h)
            if not own.height:
                continue
            for row, (value, error, _) in enumerate(parts, 1):
                figure.add_scatter(
                    x=[places[at] + room * (k + 0.5) - 0.35 for at in own[x]],
                    y=own[value].to_list(),
                    error_y=_bar(own[error]),
                    mode="markers",
                    marker={
                        "color": COLOURS[k % len(COLOURS)],
                        "symbol": _MARKS[k // len(COLOURS) % len(_MARKS)],
                        "size": 6,
                    },
                    name=model,
                    legendgroup=model,
                    showlegend=(row, column) == (1, 1),
                    row=row,
                    col=column,
                )
    return figure.update_xaxes(
        tickvals=list(places.values()), ticktext=list(map(str, places)), showgrid=False
    )


def _grid(horizons: Sequence[int], titles: Sequence[str], height: int) -> go.Figure:
    """Panels with a row for each title and a column for each horizon; those of a row share their axis."""
    figure = make_subplots(
        rows=len(titles),
        cols=max(1, len(horizons)),
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.18 / len(titles),
        column_titles=[f"+{bars(h)}" for h in horizons],
    )
    figure.update_layout(
        **(
            _LAYOUT
            | {"height": height, "margin": {"l": 84, "r": 16, "t": 64, "b": 44}, "hovermode": "closest"}
        )
    )
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    figure.update_xaxes(**_AXIS)
    figure.update_yaxes(**_AXIS)
    for row, title in enumerate(titles, 1):
        figure.update_yaxes(title=_title(title), row=row, col=1)
    return figure


def _bar(errors: pl.Series) -> dict[str, Any]:
    return {"array": (SURE * errors).to_list(), "thickness": 1, "width": 2}


def _figure(title: str, tickformat: str) -> go.Figure:
    axes = {"xaxis": _AXIS, "yaxis": _AXIS | {"title": _title(title), "tickformat": tickformat}}
    return go.Figure(layout=_LAYOUT | axes)


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}}


def _line(k: int) -> dict[str, Any]:
    dash = _DASHES[k // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[k % len(COLOURS)], "width": 1.6, "dash": dash}


def _faint(colour: str, opacity: float = 0.08) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _x(times: pl.Series) -> Array:
    """Milliseconds since 1970, which a date axis takes: a third of the size of texts; nan for null."""
    return times.dt.epoch("ms").cast(pl.Float64).to_numpy()


def _y(values: pl.Series) -> NDArray[np.float32]:
    """Seven digits are more than a screen can show; nan for null."""
    return values.cast(pl.Float32).to_numpy()


def _around(values: Sequence[float]) -> list[float]:
    """A range that leaves a little room around values."""
    room = 0.05 * (max(values) - min(values)) or 1.0
    return [min(values) - room, max(values) + room]


def _over_time(result: BacktestResult, panels: Sequence[tuple[str, str, str, str]]) -> go.Figure:
    """A line for each strategy in each panel: (column of `_books`, title, format of ticks and of values)."""
    figure = make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.08)
    figure.update_layout(**_LAYOUT).update_xaxes(**_AXIS, type="date").update_yaxes(**_AXIS)
    for row, (column, title, ticks, values) in enumerate(panels, 1):
        for name, own, line in _books(result):
            figure.add_scatter(
                x=_x(own["close_time"]),
                y=_y(own[column]),
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                mode="lines",
                line=line,
                row=row,
                col=1,
            )
        figure.update_yaxes(title=_title(title), tickformat=ticks, hoverformat=values, row=row, col=1)
    return figure


def _strategies(result: BacktestResult) -> list[str]:
    names = result.rows("equity").select(pl.col("strategy").unique(maintain_order=True))
    return collected(names)["strategy"].to_list()


def _books(result: BacktestResult) -> list[tuple[str, pl.DataFrame, dict[str, Any]]]:
    """Growth, drawdown and exposure of each strategy and its line; buy-and-hold first, below the others.

    They are thinned to as many closes as a screen can show, drawdowns to the deepest in between.
    """
    books: list[tuple[str, pl.DataFrame, dict[str, Any]]] = []
    k = 0
    for name in _strategies(result):
        own = collected(result.rows("equity").filter(strategy=name).select(*COLUMNS)).sort("close_time")
        value = pl.col("equity")
        own = own.with_columns(growth=value / value.first(), drawdown=value / value.cum_max() - 1)
        step = -(-own.height // _MOST_POINTS)
        if step > 1:
            part = (pl.int_range(pl.len()) + step - 1) // step  # the first close stands alone
            others = pl.col("close_time", "growth", "gross", "net").last()
            own = own.group_by(part.alias("part"), maintain_order=True).agg(others, pl.col("drawdown").min())
        if name == BENCHMARK:
            books.insert(0, (BENCHMARK, own, {"color": GREY, "width": 1.6}))
        else:
            books.append((name, own, _line(k)))
            k += 1
    return books


@dataclass(frozen=True, slots=True)
class _Track:
    """A symbol's bars as they are drawn, on the price basis of the newest.

    `bars` (close_time, close) are those drawn, `scales` (close_time, scale) what to multiply a price of each
    close by, `basis` that of the newest bar. Where the market sleeps most of the time, bars stand side by
    side, and `name` is the format of what they are called there, else nothing. `note` is what to say.
    """

    symbol: str
    bars: pl.DataFrame
    scales: pl.DataFrame
    basis: float
    name: str
    note: str

    @classmethod
    def of(cls, result: BacktestResult, symbol: str, last: int | None = None) -> "_Track":
        """All bars of a symbol, thinned, or the last so many."""
        rows = result.rows("bars")
        own = collected(rows.filter(symbol=symbol).select("close_time", "close", "basis")).sort("close_time")
        if not own.height:
            known = ", ".join(collected(rows.select(pl.col("symbol").unique().sort()))["symbol"])
            raise ConfigError(f"symbol {symbol!r} has no bars: take one of {known or 'none'}")
        basis, n = float(own["basis"][-1]), own.height
        own = own.with_columns(scale=basis / pl.col("basis"))
        drawn = own.select("close_time", close=pl.col("close") * pl.col("scale"))
        times = own["close_time"]
        apart = times.diff().dt.total_nanoseconds()
        sleepy = n > 2 and apart.sum() > _SLEEPY * n * np.median(apart[1:])
        name = "%Y-%m-%d %H:%M" + (":%S" if times.dt.second().max() else "") if sleepy else ""
        told = []
        if last is not None:
            drawn = drawn.tail(last)
        elif n > _MOST_BARS:
            newest = n - _MOST_BARS // 2
            step = -(-newest // (_MOST_BARS - _MOST_BARS // 2))
            at = pl.int_range(pl.len())
            drawn = drawn.filter((at >= newest) | (at % step == 0))
            told.append(f"1 of {step} bars is drawn before {times[newest]:%Y-%m-%d}")
        if (changed := own.filter(pl.col("scale") != 1)).height:
            told.append(f"prices up to {changed['close_time'][-1]:%Y-%m-%d} are adjusted")
        scales = own.select("close_time", "scale")
        return cls(symbol, drawn, scales, basis, name, "<br>".join(told))

    def x(self, times: pl.Series) -> Array | list[str | None]:
        """Where times stand on the axis."""
        return times.dt.strftime(self.name).to_list() if self.name else _x(times)

    def nearest(self, times: pl.Series) -> pl.Series:
        """The bar that is drawn for each time, where bars stand side by side: the first from then on."""
        if not self.name:
            return times
        drawn = self.bars.select(close_time="close_time", drawn="close_time")
        return times.to_frame("close_time").join_asof(drawn, on="close_time", strategy="forward")["drawn"]

    def axis(self) -> dict[str, Any]:
        """Settings of the x axis."""
        if not self.name:
            return {"type": "date"}
        order = self.bars["close_time"].dt.strftime(self.name).to_list()
        return {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": order,
            "nticks": 5,
            "autotickangles": [0, 90],
            "automargin": "height",
        }

    def newest(self) -> list[float]:
        """The range of the x axis that holds the last bars."""
        return self._range(SHOWN)

    def whole(self) -> list[float]:
        """The range of the x axis that holds all bars."""
        return self._range(self.bars.height)

    def _range(self, last: int) -> list[float]:
        n = self.bars.height
        ends = [n - last, n - 1.0] if self.name else _x(self.bars["close_time"].tail(last))[[0, -1]].tolist()
        room = 0.01 * (ends[1] - ends[0]) or 1.0
        return [ends[0] - room, ends[1] + room]

    def line(self) -> dict[str, Any]:
        """The line of the closes."""
        return {
            "x": self.x(self.bars["close_time"]),
            "y": _y(self.bars["close"]),
            "mode": "lines",
            "line": {"color": INK, "width": 1.5},
            "name": "close",
            "hovertemplate": "%{y:.6~g}",
        }

    def ribbon(self, result: BacktestResult, horizon: int) -> pl.DataFrame:
        """What had been forecast of each close that is drawn: close_time and a column of prices a level."""
        key = ["close_time", "horizon"]
        mine = (pl.col("symbol") == self.symbol) & (pl.col("horizon") == horizon)
        drawn = pl.col("end_time").is_in(self.bars["close_time"].implode())
        ends = collected(result.rows("outcomes").filter(mine, drawn).select(*key, "end_time"))
        origins = pl.col("close_time").is_in(ends["close_time"].implode())
        made = collected(result.rows("signals").filter(mine, origins)).join(ends, on=key)
        made = made.join(self.scales, on="close_time")
        price = pl.col("reference") * pl.col("scale")
        named = levels_of(made.columns).values()
        prices = made.select(close_time="end_time", **{name: price * pl.col(name).exp() for name in named})
        newest = prices.unique("close_time", keep="last", maintain_order=True)
        return self.bars.select("close_time").join(newest, on="close_time", how="left", maintain_order="left")

    def band(self, ribbon: pl.DataFrame, lower: str, upper: str) -> dict[str, Any]:
        """A closed outline around each run of bars of which there was a forecast."""
        there = ribbon.with_columns(run=pl.col(lower).is_null().rle_id()).drop_nulls(lower)
        runs = []
        for run in there.partition_by("run"):
            low, high = (run.select("close_time", y=name) for name in (lower, upper))
            runs += [low, high.reverse(), low.clear(1)]
        outline = pl.concat(runs) if runs else there.select("close_time", y=lower)
        return {"x": self.x(outline["close_time"]), "y": _y(outline["y"])}


def _scroll(track: _Track) -> go.Figure:
    """A panel of prices with a slider below, which shows the newest bars at first."""
    figure = _figure("price", "~g").update_xaxes(**track.axis())
    return figure.update_layout(
        height=480,
        margin={"t": 16, "b": 16},
        legend={"yref": "container", "y": 0, "yanchor": "bottom"},
        dragmode="pan",
        xaxis={
            "range": track.newest(),
            "title": _title(track.note),
            "rangeslider": {
                "range": track.whole(),
                "yaxis": {"rangemode": "auto"},
                "thickness": 0.1,
                "bgcolor": "#f8fafc",
                "bordercolor": GRID,
            },
        },
    )


def _choose(figure: go.Figure, labels: Sequence[str], owned: Sequence[Sequence[bool]]) -> None:
    """Add a menu that shows the traces of one label at a time, those of the first at first."""
    entries = [
        {"label": label, "method": "restyle", "args": [{"visible": list(mine)}]}
        for label, mine in zip(labels, owned, strict=True)
    ]
    for trace, visible in zip(figure.data, owned[0], strict=True):
        trace.visible = visible
    beside = sum(map(len, labels)) <= _ROOM
    kind = {"type": "buttons", "direction": "right"} if beside else {"type": "dropdown", "direction": "down"}
    figure.update_layout(updatemenus=[_MENU | kind | {"buttons": entries}], margin={"t": 52})


def _told(training: dict[str, Any]) -> str:
    """What a mark of a training says."""
    fate = "accepted" if training["accepted"] else "refused"
    lines = [f"<b>{fate}</b> {training['challenger'] or ''}"]
    if training["gain"] is not None:
        gain, error = training["gain"], training["gain_error"] or 0
        lines.append(f"gain {gain:+.2%} ± {error:.2%}, {training['origins']} origins")
    lines += [training["reason"] or "", f"trained for: {training['reasons']}"]
    return "<br>".join("<br>".join(wrap(line, 70)) for line in lines if line)


def _dots(rows: pl.DataFrame, title: str) -> go.Figure:
    """A panel for each horizon, a mark with error bars for each model, the one furthest right on top."""
    horizons = sorted(rows["horizon"].unique())
    order = rows.group_by("model").agg(pl.col("skill").mean()).sort("skill", "model")["model"].to_list()
    figure = _grid(horizons, [""], 120 + 26 * len(order))
    for column, h in enumerate(horizons, 1):
        own = rows.filter(pl.col("horizon") == h)
        figure.add_scatter(
            x=own["skill"].to_list(),
            y=own["model"].to_list(),
            error_x=_bar(own["error"]) | {"color": COLOURS[0]},
            mode="markers",
            marker={"color": COLOURS[0], "size": 8},
            showlegend=False,
            hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
            row=1,
            col=column,
        )
    figure.add_vline(x=0, line=_NOMINAL)
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    return figure.update_xaxes(title=_title(title), matches="x")


def _densities(figure: go.Figure, bins: pl.DataFrame, name: str, row: int, column: int) -> None:
    """Add the bars of a PIT histogram to a panel."""
    figure.add_bar(
        x=((bins["lower"] + bins["upper"]) / 2).to_list(),
        y=bins["density"].to_list(),
        width=(bins["upper"] - bins["lower"]).to_list(),
        marker={"color": COLOURS[0], "opacity": 0.55, "line": {"color": "white", "width": 1}},
        name=name,
        showlegend=False,
        hovertemplate="%{y:.3f}",
        row=row,
        col=column,
    )


def _unit_square(figure: go.Figure, bins: pl.DataFrame) -> go.Figure:
    """Set the axes of PIT histograms, and draw the line at 1."""
    figure.add_hline(y=1, line=_NOMINAL)
    figure.update_xaxes(range=[0, 1], tickformat=".0%", tickvals=[0.1, 0.5, 0.9])
    return figure.update_yaxes(range=[0, max([1.5, *(1.05 * bins["density"])])])


def _prices(paths: pl.DataFrame, column: str) -> list[float]:
    return paths.select(pl.col("reference") * pl.col(column).exp()).to_series().to_list()


def _opacity(inner: int, pairs: int) -> float:
    return round(0.08 + 0.22 * inner / max(1, pairs), 3)


def bars(horizon: object) -> str:
    """A horizon in words."""
    return f"{horizon} bar" if horizon == 1 else f"{horizon} bars"
