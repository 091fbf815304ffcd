"""One self-contained HTML page of a backtest or an evaluation: figures, scores and what they mean."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import polars as pl
from plotly.offline import get_plotlyjs

from barcast.backtest import plot
from barcast.backtest.evaluate import ALL, Evaluation
from barcast.backtest.evaluate import DEFINITIONS as COMPARED
from barcast.backtest.metrics import DEFINITIONS as OF_BOOKS
from barcast.backtest.result import BacktestResult
from barcast.backtest.scoring import DEFINITIONS, INTERVALS, POOLED
from barcast.models.scores import Estimate

FANS = 6
"""Symbols whose forecasts are drawn."""

SYMBOLS = 12
"""Symbols that the head of an evaluation names."""

TOLERANCE = 0.02
"""Coverage farther than this from its nominal share is marked."""

Cell = Callable[[object], str]

_CSS = """
.warning { background: #fef3c7; border: 1px solid #f59e0b; border-radius: 8px; padding: 10px 14px; }
:root {
  color-scheme: light;
  --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --page: #f8fafc; --card: #fff; --band: #f1f5f9;
  --off: #b45309;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 20px 0 0; }
p { margin: 0 0 12px; color: var(--soft); max-width: 78ch; }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px 22px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.cards { margin-top: 20px; }
.card { padding: 12px 16px; }
.card b { display: block; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; display: block; line-height: 1.4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
tr.pooled td { font-weight: 600; background: var(--band); }
td.off { color: var(--off); font-weight: 600; }
.tight th, .tight td { padding: 5px 6px; font-size: 13px; }
table.meta td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
table.meta td:first-child { white-space: nowrap; color: var(--soft); width: 1%; }
table.meta td:last-child { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 14px 0 0; }
dl { font-size: 13px; color: var(--soft); }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 640px) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
  section { padding: 16px 14px; }
}
"""


def write_report(result: BacktestResult, path: Path, title: str = "Barcast backtest") -> None:
    """Write the page of a backtest to `path`; it needs no network to be read."""
    path.write_text(html(result, title), encoding="utf-8")


def write_evaluation(result: Evaluation, path: Path) -> None:
    """Write the page of an evaluation to `path`; it needs no network to be read."""
    body = "\n".join([_evaluation_head(result), *_evaluation_sections(result)])
    path.write_text(_page("Barcast evaluation", body), encoding="utf-8")


def html(result: BacktestResult, title: str = "Barcast backtest") -> str:
    """The page of a backtest. The same result gives the same text."""
    return _page(title, "\n".join([_head(result, title), _cards(result), *_sections(result)]))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_CSS}</style>\n'
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(result: BacktestResult, title: str) -> str:
    signals = result.signals
    if not signals.height:
        return f"<h1>{escape(title)}</h1><p>No forecast was made.</p>"
    first, last = signals["close_time"].min(), signals["close_time"].max()
    symbols = ", ".join(sorted(signals["symbol"].unique()))
    models = ", ".join(sorted(signals["model"].unique()))
    warning = result.meta.get("warning")
    return (
        f"<h1>{escape(title)}</h1>"
        f"<p>{escape(symbols)}, {_day(first)} to {_day(last)}, model {escape(models)}.</p>"
        + (f'<p class="warning">{escape(str(warning))}</p>' if warning else "")
    )


def _cards(result: BacktestResult) -> str:
    cards = []
    pooled = result.scores.filter(pl.col("symbol") == POOLED).sort("horizon")
    if pooled.height:
        row = pooled.row(0, named=True)
        horizon = f"{row['horizon']} bar{'s' if row['horizon'] > 1 else ''} ahead"
        cards += [
            (_whole(pooled["n"].sum()), "forecasts scored"),
            (_percent(row["coverage_90"]), f"inside the 90 % interval, {horizon}"),
            (_basis_points(row["crps"]), f"CRPS in basis points, {horizon}"),
        ]
    for row in result.portfolio.iter_rows(named=True):
        sharpe = f"Sharpe {_number(row['sharpe'])}"
        cards.append((_percent(row["total_return"]), f"{_text(row['strategy'])}, total return; {sharpe}"))
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    return f'<div class="cards">{boxes}</div>'


def _sections(result: BacktestResult) -> Iterator[str]:
    if result.portfolio.height:
        yield _section(
            "Strategies",
            "An order is fixed at a close, by the equity then, and filled at its symbol's next open. "
            "Costs are taken off; there is no limit of volume, borrowing or margin.",
            _portfolio(result),
            _draw(plot.equity(result), "equity"),
            "<h3>Drawdown</h3>",
            _draw(plot.drawdown(result), "drawdown"),
        )
    if result.scores.height:
        yield _section(
            "Calibration",
            "A forecast is calibrated when outcomes fall inside its intervals as often as these claim "
            "(dashed), and equally often between any two levels (a flat line at 1).",
            _draw(plot.coverage(result), "coverage"),
            "<h3>Where outcomes fell between the levels</h3>",
            _draw(plot.pit(result), "pit"),
        )
        yield _section(
            "Scores",
            "Each horizon, all symbols pooled, then each symbol. Coverage more than "
            f"{100 * TOLERANCE:.0f} points off is marked.",
            _scores(result),
        )
    symbols = sorted(result.outcomes["symbol"].unique())
    if symbols:
        drawn = symbols[:FANS]
        rest = f" {len(symbols) - len(drawn)} more symbols are not drawn." if len(symbols) > FANS else ""
        figures = [
            part
            for k, symbol in enumerate(drawn)
            for part in (f"<h3>{escape(symbol)}</h3>", _draw(plot.fan(result, symbol), f"fan{k}"))
        ]
        yield _section(
            "Forecasts and what came",
            f"The last closes, and the forecasts made at some of them.{rest}",
            *figures,
        )
    yield _section("What was run", "", _meta(result.meta))


def _evaluation_head(result: Evaluation) -> str:
    meta = result.meta
    folds, pooled = meta["folds"], result.scores.filter(fold=ALL)
    symbols = ", ".join(meta["symbols"][:SYMBOLS])
    more = f" and {len(meta['symbols']) - SYMBOLS} more" if len(meta["symbols"]) > SYMBOLS else ""
    cards = [(_whole(pooled["n"][0]), f"origins of {len(meta['symbols'])} symbols")]
    for h in meta["horizons"]:
        best = pooled.filter(horizon=h).sort("crps").row(0, named=True)
        told = f"is best at +{h}: {_signed(best['skill'])} % over hs"
        cards.append((_text(best["model"]), f"{told}, {_percent(best['coverage_90'])} inside 90 %"))
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    return (
        f"<h1>Barcast evaluation</h1><p>{escape(symbols + more)}; {meta['timeframe']} bars, "
        f"{folds[0]['since'][:10]} to {folds[-1]['until'][:10]} in {len(folds)} folds, an origin every "
        f"{meta['stride']} bars.</p>"
        + (f'<p class="warning">{escape(meta["warning"])}</p>' if meta["warning"] else "")
        + f'<div class="cards">{boxes}</div>'
    )


def _evaluation_sections(result: Evaluation) -> Iterator[str]:
    horizons = result.meta["horizons"]
    yield _section(
        "Skill",
        "How far a model's CRPS is below that of historical simulation (hs) on the same origins, all folds "
        "pooled. A bar reaches two standard errors to either side.",
        _draw(plot.skill(result), "skill"),
        "<h3>Fold by fold</h3>",
        _draw(plot.skill_by_fold(result), "skill-folds"),
    )
    yield _section(
        "Scores",
        "All folds pooled. Bold in the column of the best baseline: more than two standard errors away from "
        f"it. Coverage more than {100 * TOLERANCE:.0f} points off is marked.",
        *(part for h in horizons for part in (f"<h3>+{plot.bars(h)}</h3>", _pooled(result, h))),
        _terms(
            {
                "CRPS, bp": f"{COMPARED['crps']}; basis points, 0.0001",
                "% over a model": COMPARED["gain"],
                "±": COMPARED["error"],
                **{f"inside {p} %": COMPARED[f"coverage_{p}"] for p in INTERVALS},
                "worst": COMPARED["worst"],
            }
        ),
    )
    yield _section(
        "Each against each",
        "By how many percent the CRPS of the row's model is below that of the column's, all folds pooled, "
        "with the standard error of the paired difference; bold beyond two of them.",
        *(part for h in horizons for part in (f"<h3>+{plot.bars(h)}</h3>", _gains(result, h))),
    )
    intervals = []  # not all levels have one
    if any(result.scores[f"coverage_{percent}"].count() for percent in INTERVALS):
        intervals += ["<h3>Fold by fold</h3>", _draw(plot.coverage_by_fold(result), "coverage-folds")]
    if result.thirds.height:
        intervals += [
            "<h3>By expected volatility</h3>"
            "<p>A third of each symbol's origins each, by the width of the 80 % interval of "
            f"{escape(result.meta['volatility'])}.</p>",
            _draw(plot.coverage_by_third(result), "coverage-thirds"),
        ]
    yield _section(
        "Calibration",
        "The share of outcomes inside the central 50, 80 and 90 % intervals, beside the share that belongs "
        "there (dashed). A bar reaches two standard errors to either side.",
        *intervals,
        "<h3>Reliability</h3><p>How far the share of outcomes at or below a quantile is from its level: "
        "0 when calibrated.</p>",
        _draw(plot.reliability(result), "reliability"),
        "<h3>Where outcomes fell between the levels</h3><p>Flat at 1 when calibrated.</p>",
        _draw(plot.pits(result), "pits"),
    )
    yield _section("What was compared", "", _meta(result.meta))


def _pooled(result: Evaluation, horizon: int) -> str:
    best = result.best_baseline(horizon)
    others = dict.fromkeys([result.meta["reference"], best])
    labels = ["model", "CRPS, bp", *(f"% over {other}" for other in others)]
    labels += [f"inside {p} %" for p in INTERVALS] + ["worst"]
    rows = []
    for row in result.scores.filter(fold=ALL, horizon=horizon).sort("crps").iter_rows(named=True):
        model = row["model"]
        cells = [f"<td>{_text(model)}</td>", f"<td>{1e4 * row['crps']:.2f}</td>"]
        cells += [_estimate(result.gain(horizon, model, other), other == best) for other in others]
        for percent in INTERVALS:
            value, error = row[f"coverage_{percent}"], row[f"coverage_{percent}_error"]
            shown = f"{_percent(value)} &plusmn;{100 * error:.1f}" if error is not None else "&ndash;"
            cells.append(f"<td{_mark(f'coverage_{percent}', value)}>{shown}</td>")
        rows.append(f"<tr>{''.join(cells)}<td>{row['worst']:.3f}</td></tr>")
    return _table({label: (label, _text) for label in labels}, "".join(rows))


def _gains(result: Evaluation, horizon: int) -> str:
    pooled = result.scores.filter(fold=ALL, horizon=horizon).sort("crps")
    models = pooled["model"].to_list()
    rows = []
    for model in models:
        cells = [_estimate(result.gain(horizon, model, other), True) for other in models]
        rows.append(f"<tr><td>{_text(model)}</td>{''.join(cells)}</tr>")
    return f'<div class="tight">{_table({m: (m, _text) for m in ("", *models)}, "".join(rows))}</div>'


def _estimate(gain: Estimate | None, mark: bool) -> str:
    """A cell; bold where a gain to mark is more than two errors from zero."""
    if gain is None:
        return "<td>&ndash;</td>"
    shown = f"{_signed(gain.value)} &plusmn;{gain.error:.2f}"
    return f"<td>{f'<b>{shown}</b>' if mark and abs(gain.value) > plot.SURE * gain.error else shown}</td>"


def _signed(value: float) -> str:
    return f"{value:z.2f}".replace("-", "&minus;")


def _section(title: str, text: str, *parts: str) -> str:
    told = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{told}{''.join(parts)}</section>"


def _draw(figure: go.Figure, name: str) -> str:
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    drawn: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return drawn


def _portfolio(result: BacktestResult) -> str:
    columns: dict[str, tuple[str, Cell]] = {
        "strategy": ("strategy", _text),
        "total_return": ("total return", _percent),
        "volatility": ("volatility", _percent),
        "sharpe": ("Sharpe", _number),
        "max_drawdown": ("max drawdown", _percent),
        "costs": ("costs", _percent),
        "fills": ("fills", _whole),
        "periods": ("periods", _whole),
    }
    rows = "".join(
        f"<tr>{''.join(f'<td>{cell(row[name])}</td>' for name, (_, cell) in columns.items())}</tr>"
        for row in result.portfolio.iter_rows(named=True)
    )
    periods = result.meta.get("periods_per_year")
    stated = {"P": f"periods in a year: {periods}"} if periods is not None else {}
    return _table(columns, rows) + _definitions(columns, stated)


def _scores(result: BacktestResult) -> str:
    columns: dict[str, tuple[str, Cell]] = {
        "symbol": ("symbol", _text),
        "horizon": ("horizon", _whole),
        "n": ("n", _whole),
        "pinball": ("pinball, bp", _basis_points),
        "crps": ("CRPS, bp", _basis_points),
        **{f"coverage_{percent}": (f"inside {percent} %", _percent) for percent in INTERVALS},
    }
    pooled = result.scores.filter(pl.col("symbol") == POOLED).sort("horizon")
    single = result.scores.filter(pl.col("symbol") != POOLED).sort("symbol", "horizon")
    rows = []
    for row in pl.concat([pooled, single]).iter_rows(named=True):
        cells = [f"<td{_mark(name, row[name])}>{cell(row[name])}</td>" for name, (_, cell) in columns.items()]
        kind = ' class="pooled"' if row["symbol"] == POOLED else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    unit = {"bp": "basis points of log return, 0.0001"}
    return _table(columns, "".join(rows)) + _definitions(columns, unit)


def _table(columns: Mapping[str, tuple[str, Cell]], rows: str) -> str:
    heads = "".join(f"<th>{escape(label)}</th>" for label, _ in columns.values())
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _definitions(columns: Mapping[str, tuple[str, Cell]], more: Mapping[str, str]) -> str:
    known = OF_BOOKS | DEFINITIONS
    told = {label: known[name] for name, (label, _) in columns.items() if name in known}
    return _terms({**told, **more})


def _terms(told: Mapping[str, str]) -> str:
    terms = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in told.items())
    return f"<dl>{terms}</dl>"


def _meta(meta: Mapping[str, object]) -> str:
    rows = []
    for key, value in meta.items():
        shown = (
            value if isinstance(value, str) else json.dumps(value, indent=1, default=str, ensure_ascii=False)
        )
        rows.append(f"<tr><td>{escape(key)}</td><td>{escape(shown)}</td></tr>")
    return f'<div class="wide"><table class="meta"><tbody>{"".join(rows)}</tbody></table></div>'


def _mark(name: str, value: object) -> str:
    if name.startswith("coverage_") and isinstance(value, float):
        nominal = int(name.removeprefix("coverage_")) / 100
        return ' class="off"' if abs(value - nominal) > TOLERANCE else ""
    return ""


def _day(time: object) -> str:
    return time.date().isoformat() if isinstance(time, datetime) else ""


def _text(value: object) -> str:
    return escape(str(value))


def _whole(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else "&ndash;"


def _number(value: object) -> str:
    return f"{value:.2f}".replace("-", "&minus;") if isinstance(value, float) else "&ndash;"


def _percent(value: object) -> str:
    return f"{value:.1%}".replace("-", "&minus;") if isinstance(value, float) else "&ndash;"


def _basis_points(value: object) -> str:
    return f"{1e4 * value:.1f}" if isinstance(value, float) else "&ndash;"
