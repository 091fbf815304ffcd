"""Figures of a backtest or an evaluation, for the report and for notebooks."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from barcast.backtest.evaluate import ALL, Evaluation
from barcast.backtest.result import BacktestResult, levels_of
from barcast.backtest.scoring import INTERVALS, POOLED
from barcast.backtest.scoring import pit as pit_bins

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
INK, GRID, BAND = "#334155", "#e2e8f0", "37, 99, 235"
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'
_MOST_POINTS = 4000
_AXIS: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID}
_NOMINAL = {"color": INK, "width": 1, "dash": "dash"}
_LAYOUT: dict[str, Any] = {
    "height": 380,
    "margin": {"l": 64, "r": 16, "t": 36, "b": 44},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": _FONT, "size": 13, "color": INK},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "hovermode": "x unified",
}
_MARKS = ("circle", "diamond", "square", "triangle-up")
SURE = 2
"""Standard errors that an error bar reaches to either side."""


def equity(result: BacktestResult) -> go.Figure:
    """The equity of each strategy, as a multiple of what it began with."""
    figure = _figure("multiple of the first equity", "~g")
    for k, (name, own) in enumerate(_books(result)):
        figure.add_scatter(
            x=own["close_time"].to_list(), y=own["growth"].to_list(), name=name, mode="lines", line=_line(k)
        )
    return figure


def drawdown(result: BacktestResult) -> go.Figure:
    """How far each strategy's equity is below its highest before."""
    figure = _figure("below the highest equity before", "~%")
    for k, (name, own) in enumerate(_books(result)):
        figure.add_scatter(
            x=own["close_time"].to_list(),
            y=own["drawdown"].to_list(),
            name=name,
            mode="lines",
            line=_line(k),
            fill="tozeroy",
            fillcolor=_faint(k),
        )
    return figure


def fan(result: BacktestResult, symbol: str, origins: int = 6, bars: int = 120) -> go.Figure:
    """A symbol's last closes, and what was forecast from some of them: nested central intervals.

    From up to `origins` closes, evenly spread over the last `bars` whose outcomes are known and the longest
    horizon apart, the intervals between pairs of levels fan out over the horizons, around the median.
    """
    own = result.signals.filter(pl.col("symbol") == symbol).sort("close_time", "horizon")
    ends = result.outcomes.filter(pl.col("symbol") == symbol).select(
        "close_time", "horizon", "end_time", "price"
    )
    made = own.select("close_time", pl.col("reference").alias("price"))
    later = ends.select(pl.col("end_time").alias("close_time"), "price")
    closes = pl.concat([made, later]).unique("close_time", keep="first", maintain_order=True)
    closes = closes.sort("close_time").tail(bars)
    longest = own.select(pl.col("horizon").max()).item() or 1
    whole = ends.filter(pl.col("horizon") == longest).sort("close_time")["close_time"]
    whole = whole.filter(whole >= closes["close_time"].min()) if closes.height else whole
    step = max(longest, -(-len(whole) // origins))
    figure = _figure("price", "~g")
    named = list(levels_of(own.columns).values())
    pairs = list(zip(named[: len(named) // 2], reversed(named), strict=False))
    for k, origin in enumerate(whole.reverse().gather_every(step).reverse()):
        paths = own.filter(pl.col("close_time") == origin)
        paths = paths.join(ends, on=["close_time", "horizon"], maintain_order="left")
        start = paths["reference"][0]
        x = [origin, *paths["end_time"]]
        for j, (lower, upper) in enumerate(pairs):
            figure.add_scatter(
                x=[*x, *reversed(x)],
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
                x=x,
                y=[start, *_prices(paths, "q50")],
                mode="lines",
                line={"color": COLOURS[0], "width": 1.5, "dash": "dot"},
                name="median",
                legendgroup="median",
                showlegend=k == 0,
                hoverinfo="skip",
            )
    figure.add_scatter(
        x=closes["close_time"].to_list(),
        y=closes["price"].to_list(),
        mode="lines",
        line={"color": INK, "width": 1.6},
        name="close",
    )
    return figure


def pit(result: BacktestResult) -> go.Figure:
    """Where outcomes fell between the forecast levels, a line for each horizon; flat at 1 when calibrated."""
    bins = pit_bins(result.signals, result.outcomes)
    figure = _figure("density of outcomes", ".1f")
    for k, ((horizon,), own) in enumerate(bins.group_by("horizon", maintain_order=True)):
        edges = [own["lower"][0], *own["upper"]]
        density = [*own["density"], own["density"][-1]]
        figure.add_scatter(
            x=edges, y=density, mode="lines", line=_line(k) | {"shape": "hv"}, name=bars(horizon)
        )
    figure.add_hline(y=1, line=_NOMINAL)
    return figure.update_layout(
        xaxis={"title": _title("level"), "range": [0, 1], "tickformat": ".0%"},
        yaxis={"rangemode": "tozero"},
        hovermode="closest",
    )


def coverage(result: BacktestResult) -> go.Figure:
    """The share of outcomes inside each central interval, beside the share that belongs there."""
    pooled = result.scores.filter(pl.col("symbol") == POOLED).sort("horizon")
    figure = _figure("share of outcomes inside", ".0%")
    for k, percent in enumerate(INTERVALS):
        values = pooled[f"coverage_{percent}"].to_list()
        figure.add_bar(
            x=[bars(horizon) for horizon in pooled["horizon"]],
            y=values,
            text=["" if value is None else f"{value:.1%}" for value in values],
            name=f"{percent} % interval",
            marker_color=COLOURS[k],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
        )
        figure.add_hline(y=percent / 100, line={"color": COLOURS[k], "width": 1.5, "dash": "dash"})
    return figure.update_layout(
        barmode="group",
        yaxis={"range": [0, 1]},
        xaxis={"title": _title("horizon"), "type": "category"},
        hovermode="closest",
    )


def skill(result: Evaluation) -> go.Figure:
    """How far each model's CRPS is below that of the reference, all folds pooled; the best one on top."""
    pooled = result.scores.filter(fold=ALL).filter(pl.col("model") != result.meta["reference"])
    order = pooled.group_by("model").agg(pl.col("skill").mean()).sort("skill", "model")["model"].to_list()
    figure = _grid(result, [""], 120 + 26 * len(order))
    for column, h in enumerate(result.meta["horizons"], 1):
        rows = pooled.filter(horizon=h)
        figure.add_scatter(
            x=rows["skill"].to_list(),
            y=rows["model"].to_list(),
            error_x=_bar(rows["skill_error"]) | {"color": COLOURS[0]},
            mode="markers",
            marker={"color": COLOURS[0], "size": 8},
            showlegend=False,
            row=1,
            col=column,
        )
    figure.add_vline(x=0, line=_NOMINAL)
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    return figure.update_xaxes(title=_title("% below the CRPS of hs"), matches="x")


def skill_by_fold(result: Evaluation) -> go.Figure:
    """The skill of each model in each fold."""
    rows = result.scores.filter(pl.col("fold") != ALL).filter(pl.col("model") != result.meta["reference"])
    figure = _by(result, rows, "fold", [("skill", "skill_error", "% below hs")], 380)
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
    figure = _grid(result, models, 70 + 110 * len(models))
    bins = result.pit.filter(fold=ALL)
    for row, model in enumerate(models, 1):
        for column, h in enumerate(result.meta["horizons"], 1):
            own = bins.filter(model=model, horizon=h)
            figure.add_bar(
                x=((own["lower"] + own["upper"]) / 2).to_list(),
                y=own["density"].to_list(),
                width=(own["upper"] - own["lower"]).to_list(),
                marker={"color": COLOURS[0], "opacity": 0.55, "line": {"color": "white", "width": 1}},
                name=model,
                showlegend=False,
                row=row,
                col=column,
            )
    figure.add_hline(y=1, line=_NOMINAL)
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    highest = max(bins["density"].to_list())
    return figure.update_yaxes(range=[0, max(1.5, 1.05 * highest)])


def reliability(result: Evaluation) -> go.Figure:
    """How far the share of outcomes at or below each quantile is from its level."""
    rows = result.levels.filter(fold=ALL).with_columns(off=pl.col("below") - pl.col("level"))
    figure = _by(result, rows, "level", [("off", "error", "share below - level")], 380)
    figure.add_hline(y=0, line=_NOMINAL)
    figure.update_xaxes(title=_title("level"))
    return figure.update_yaxes(tickformat="+.1%")


def _coverages(result: Evaluation, rows: pl.DataFrame, x: str) -> go.Figure:
    known = [p for p in INTERVALS if rows[f"coverage_{p}"].null_count() == 0]
    parts = [(f"coverage_{p}", f"coverage_{p}_error", f"in {p} %") for p in known]
    figure = _by(result, rows, x, parts, 60 + 230 * len(parts))
    for row, percent in enumerate(known, 1):
        figure.add_hline(y=percent / 100, line=_NOMINAL, row=row, col="all")
    return figure.update_yaxes(tickformat=".0%")


def _by(
    result: Evaluation, rows: pl.DataFrame, x: str, parts: Sequence[tuple[str, str, str]], height: int
) -> go.Figure:
    """A panel for each horizon and value (column, error, title), a mark with error bars for each model.

    The models stand side by side at each value of the column `x`.
    """
    figure = _grid(result, [title for _, _, title in parts], height)
    places = {value: i for i, value in enumerate(rows[x].unique(maintain_order=True))}
    room = 0.7 / len(result.meta["models"])
    for k, model in enumerate(result.meta["models"]):
        for column, h in enumerate(result.meta["horizons"], 1):
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


def _grid(result: Evaluation, titles: Sequence[str], height: int) -> go.Figure:
    """Panels with a row for each title and a column for each horizon; those of a row share their axis."""
    horizons = result.meta["horizons"]
    figure = make_subplots(
        rows=len(titles),
        cols=len(horizons),
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
    return {"color": COLOURS[k % len(COLOURS)], "width": 1.6}


def _faint(k: int) -> str:
    red, green, blue = bytes.fromhex(COLOURS[k % len(COLOURS)][1:])
    return f"rgba({red}, {green}, {blue}, 0.08)"


def _books(result: BacktestResult) -> list[tuple[str, pl.DataFrame]]:
    """Growth and drawdown of each strategy, thinned to as many closes as a screen can show."""
    books = []
    for (name,), own in result.equity.sort("close_time").group_by("strategy", maintain_order=True):
        value = pl.col("equity")
        own = own.with_columns(growth=value / value.first(), drawdown=value / value.cum_max() - 1)
        step = -(-own.height // _MOST_POINTS)
        last = pl.int_range(pl.len()) == pl.len() - 1
        books.append((str(name), own.filter((pl.int_range(pl.len()) % step == 0) | last)))
    return sorted(books)


def _prices(paths: pl.DataFrame, column: str) -> list[float]:
    return paths.select(pl.col("reference") * pl.col(column).exp()).to_series().to_list()


def _opacity(inner: int, pairs: int) -> float:
    return round(0.08 + 0.22 * inner / max(1, pairs), 3)


def bars(horizon: object) -> str:
    """A horizon in words."""
    return f"{horizon} bar" if horizon == 1 else f"{horizon} bars"
