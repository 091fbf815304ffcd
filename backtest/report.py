"""One self-contained HTML page of a backtest or an evaluation: figures, scores and what they mean."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from math import floor, log10
from pathlib import Path

import plotly.graph_objects as go
import polars as pl
from plotly.offline import get_plotlyjs

from barcast.backtest import metrics, plot, scoring, skill
from barcast.backtest.evaluate import ALL, Evaluation
from barcast.backtest.evaluate import DEFINITIONS as COMPARED
from barcast.backtest.ledger import BENCHMARK
from barcast.backtest.paths import DEFINITIONS as PATHS
from barcast.backtest.paths import JOINT, OWN
from barcast.backtest.result import BacktestResult
from barcast.backtest.scoring import INTERVALS, POOLED
from barcast.backtest.stress import DEFINITIONS as STRESSED
from barcast.backtest.stress import HISTORY, StressResult
from barcast.backtest.tables import Rows, collected
from barcast.backtest.workers import write_whole
from barcast.models.scores import Estimate

FANS = 6
"""Symbols whose forecasts and trades are drawn."""

SYMBOLS = 12
"""Symbols that the head of a page names."""

STRATEGIES = 5
"""Strategies that have a card, beside buy-and-hold."""

TRADES = 20
"""Fills that are listed."""

TOLERANCE = 0.02
"""Coverage farther than this from its nominal share is marked."""

LINE = 100
"""Letters of a value that stand in one line."""

PANELS = 620
"""Pixels that panels side by side need."""

PERCENT = frozenset(
    (
        *("total_return", "cagr", "volatility", "max_drawdown", "var_95", "cvar_95", "alpha", "exposure"),
        *("win_rate", "costs", "carry", "psr", "dsr"),
    )
)
"""Metrics that are shares."""

LABELS = {
    "cagr": "CAGR",
    "var_95": "value at risk, 95 %",
    "cvar_95": "expected shortfall, 95 %",
    "psr": "probabilistic Sharpe",
    "dsr": "deflated Sharpe",
    "sharpe": "Sharpe ratio",
    "sortino": "Sortino ratio",
    "calmar": "Calmar ratio",
    "omega": "omega ratio",
    "interval_80": "interval 80 %, bp",
    "interval_90": "interval 90 %, bp",
    "other_crps": "its CRPS, bp",
    "pinball": "pinball, bp",
    "crps": "CRPS, bp",
    **{f"coverage_{percent}": f"inside {percent} %" for percent in INTERVALS},
}
"""What columns are called where their own name, without underscores, would not do."""

_SCRIPT = """
function figure(id, spec, follows) {
  const element = document.getElementById(id);
  element.draw = () => {
    element.draw = () => {};
    const settings = {displaylogo: false, responsive: true, displayModeBar: false};
    Plotly.newPlot(element, spec.data, spec.layout, settings);
    if (follows) follow(element);
  };
  if (!element.closest("[hidden]")) element.draw();
}
function choose(select) {
  select.closest(".choice").querySelectorAll(":scope > div").forEach((pane, k) => {
    pane.hidden = k !== select.selectedIndex;
    if (!pane.hidden) pane.querySelectorAll(".figure").forEach(element => element.draw());
  });
}
function follow(element) {
  const fit = moved => {
    if (!Object.keys(moved).some(name => name.startsWith("xaxis") || name === "visible")) return;
    const {xaxis} = element._fullLayout, [first, last] = xaxis.range.map(end => xaxis.r2l(end));
    let low = Infinity, high = -Infinity;
    for (const trace of element._fullData) {
      if (trace.visible !== true) continue;
      for (let k = 0; k < trace.x.length; k++) {
        const x = xaxis.d2l(trace.x[k]), y = trace.y[k];
        if (!(x >= first && x <= last)) continue;
        if (y < low) low = y;
        if (y > high) high = y;
      }
    }
    if (low > high) return;
    const room = 0.05 * (high - low) || 1;
    Plotly.relayout(element, {"yaxis.range": [low - room, high + room]});
  };
  element.on("plotly_relayout", fit);
  element.on("plotly_restyle", changed => fit(changed[0]));
}
"""
"""Draw a figure once it is seen, show the chosen pane, keep the prices in view within their panel."""

_BASIS = {"bp": "basis points of log return, 0.0001"}

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
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 18px; font-size: 14px; }
a { color: #1d4ed8; text-decoration: none; }
a:hover { text-decoration: underline; }
select { font: inherit; font-size: 14px; padding: 3px 8px; border: 1px solid #cbd5e1; border-radius: 6px; }
select { background: #fff; color: var(--ink); max-width: 100%; }
label { display: inline-flex; gap: 8px; align-items: center; color: var(--soft); font-size: 14px; }
.rangeslider-mask-min-opp-axis, .rangeslider-mask-max-opp-axis { display: none; }
.rangeslider-mask-min, .rangeslider-mask-max { fill: #94a3b8 !important; fill-opacity: 0.3 !important; }
table.metrics td, table.metrics th { vertical-align: top; }
table.metrics td:first-child { white-space: normal; min-width: 250px; max-width: 400px; font-weight: 600; }
table.metrics td:first-child, table.metrics th:first-child {
  position: sticky; left: 0; background: var(--card);
}
table.metrics small { font-weight: 400; }
td small { display: block; font-size: 12px; line-height: 1.35; color: var(--soft); }
td.reason { white-space: normal; min-width: 260px; text-align: left; }
td.text, th.text { text-align: left; }
.buy { color: #047857; }
.sell { color: #b91c1c; }
@media (max-width: 640px) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
  section { padding: 16px 14px; }
  table.metrics td:first-child { min-width: 180px; }
}
"""


def write_report(result: BacktestResult, path: Path | str, title: str = "Barcast backtest") -> None:
    """Write the page of a backtest to `path`; it needs no network to be read.

    Raise ConfigError where it cannot be written: what was there is there still.
    """
    write_whole(Path(path), html(result, title).encode())


def write_evaluation(result: Evaluation, path: Path | str) -> None:
    """Write the page of an evaluation to `path` as `write_report` does."""
    body = "\n".join([_evaluation_head(result), *_evaluation_sections(result)])
    write_whole(Path(path), _page("Barcast evaluation", body).encode())


def write_stress(result: StressResult, path: Path | str) -> None:
    """Write the page of backtests over scenarios to `path` as `write_report` does."""
    body = "\n".join([_stress_head(result), *_stress_sections(result)])
    write_whole(Path(path), _page("Barcast stress scenarios", body).encode())


def html(result: BacktestResult, title: str = "Barcast backtest") -> str:
    """The page of a backtest. The same result gives the same text."""
    sections = list(_sections(result))
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = [_head(result, title), _cards(result), f"<nav>{links}</nav>", *(text for _, text in sections)]
    return _page(title, "\n".join(body))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_CSS}</style>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_SCRIPT}</script>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(result: BacktestResult, title: str) -> str:
    signals, time = result.rows("signals"), pl.col("close_time")
    first, last = collected(signals.select(first=time.min(), last=time.max())).row(0)
    if first is None:
        return f"<h1>{escape(title)}</h1><p>No forecast was made.</p>"
    symbols = _symbols(signals)
    models = plot.models_in_force(result)["model"].unique(maintain_order=True).to_list()
    shown = f"model {models[0]}" if len(models) == 1 else f"{len(models)} models, the first {models[0]}"
    warning = result.meta.get("warning")
    if scenario := result.meta.get("scenario"):
        title, warning = f"{title}: scenario, not forecast", f"{scenario}\n{warning}"
    return (
        f"<h1>{escape(title)}</h1>"
        f"<p>{_named(symbols)}, {_day(first)} to {_day(last)}, {escape(shown)}.</p>"
        + _warning(str(warning or ""))
    )


def _symbols(rows: Rows) -> list[str]:
    return sorted(collected(rows.select(pl.col("symbol").unique()))["symbol"])


def _cards(result: BacktestResult) -> str:
    cards = []
    pooled = result.scores.filter(pl.col("symbol") == POOLED).sort("horizon")
    if pooled.height:
        row = pooled.row(0, named=True)
        horizon = f"{plot.bars(row['horizon'])} ahead"
        cards += [
            (_whole(pooled["n"].sum()), "forecasts scored"),
            (_percent(row["coverage_90"]), f"inside the 90 % interval, {horizon}"),
            (_basis_points(row["crps"]), f"CRPS in basis points, {horizon}"),
        ]
    reference = pl.col("strategy") == BENCHMARK
    books = [result.portfolio.filter(~reference).head(STRATEGIES), result.portfolio.filter(reference)]
    for row in pl.concat(books).iter_rows(named=True):
        sharpe = f"Sharpe {_number(row['sharpe'])}"
        cards.append((_percent(row["total_return"]), f"{_text(row['strategy'])}, total return; {sharpe}"))
    return _boxes(cards)


def _boxes(cards: Iterable[tuple[str, str]]) -> str:
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    return f'<div class="cards">{boxes}</div>'


def _sections(result: BacktestResult) -> Iterator[tuple[str, str]]:
    """The name and the text of each section that the result has something for."""
    traded = _symbols(result.rows("fills").filter(pl.col("strategy") != BENCHMARK))
    forecast = _symbols(result.rows("outcomes"))
    if result.portfolio.height:
        yield _part(
            "Strategies",
            "Equity after all costs, marked at each close. Buy-and-hold holds every symbol alike.",
            _draw(plot.equity(result), "equity"),
            "<h3>Drawdown</h3>",
            _draw(plot.drawdown(result), "drawdown"),
            "<h3>Metrics</h3>",
            _portfolio(result),
        )
        yield _part(
            "Monthly returns",
            "Percent, by UTC dates; the first and the last month may be incomplete.",
            _choice(
                "strategy",
                {
                    name: _draw(plot.monthly(result, name), f"monthly{k}", PANELS)
                    for k, name in enumerate(result.portfolio["strategy"])
                },
            ),
        )
    if traded:
        figures = {
            s: _draw(plot.trades(result, s), f"trades{k}", follows=True) for k, s in enumerate(traded[:FANS])
        }
        yield _part(
            "Trades",
            "Drag to scroll, or use the slider; the area of a mark is the traded value."
            + _undrawn(traded, "trades"),
            _choice("symbol", figures),
            f"<h3>The last {TRADES}</h3>",
            _trades(result),
        )
    if result.portfolio.height:
        yield _part(
            "Exposure and costs",
            "What is held as a share of equity: long plus short (gross), and long less short (net).",
            _draw(plot.exposure(result), "exposure"),
            "<h3>Costs</h3>",
            _draw(plot.costs(result), "costs"),
        )
    if forecast:
        yield _part(
            "Forecasts",
            "The closes, and what had been forecast of each: a band stands at the close that it was for. "
            "Drag to scroll, or use the slider." + _undrawn(forecast, "fan"),
            _choice(
                "symbol",
                {
                    symbol: _draw(plot.fan(result, symbol), f"fan{k}", follows=True)
                    + "<h3>What was forecast from some closes</h3>"
                    + _draw(plot.fans(result, symbol), f"fans{k}")
                    for k, symbol in enumerate(forecast[:FANS])
                },
            ),
        )
    if result.scores.height:
        yield _part(
            "Calibration",
            "The share of outcomes inside the central intervals, beside the share that belongs there "
            "(dashed). A bar reaches two standard errors to either side.",
            _draw(plot.coverage(result), "coverage"),
            "<h3>Where outcomes fell between the levels</h3><p>Flat at 1 when calibrated.</p>",
            _draw(plot.pit(result), "pit", PANELS),
            "<h3>Reliability</h3><p>How far the share of outcomes at or below a quantile is from its level: "
            "0 when calibrated.</p>",
            _draw(plot.reliability(result), "reliability"),
        )
        yield _part(
            "Scores",
            "Each horizon, all symbols pooled, then each symbol. Coverage more than "
            f"{100 * TOLERANCE:.0f} points off is marked.",
            _scores(result),
        )
    if result.skill.height:
        yield _part(
            "Skill",
            "By how many percent the CRPS is below that of each baseline on the same origins, with the "
            "standard error of the paired difference; bold beyond two of them.",
            _skill(result),
            _draw(plot.skill(result), "skill", PANELS),
            "<h3>In calm and volatile times</h3>",
            _draw(plot.skill(result, "regime"), "skill-regime", PANELS),
            "<h3>By symbol</h3>",
            _draw(plot.skill(result, "symbol"), "skill-symbol", PANELS),
        )
    if result.trainings.height:
        yield _part(
            "Retraining",
            "Above, the model in force; below, what each challenger gained over the champion on bars that "
            "neither had learnt from, two standard errors to either side.",
            _draw(plot.retraining(result), "retraining"),
            _trainings(result),
        )
    yield _part("What was run", "", _meta(result.meta))


def _evaluation_head(result: Evaluation) -> str:
    meta = result.meta
    folds, pooled = meta["folds"], result.scores.filter(fold=ALL)
    cards = [(_whole(pooled["n"][0]), f"origins of {len(meta['symbols'])} symbols")]
    for h in meta["horizons"]:
        best = pooled.filter(horizon=h).sort("crps").row(0, named=True)
        told = f"is best at +{h}: {_signed(best['skill'])} % over hs"
        cards.append((_text(best["model"]), f"{told}, {_percent(best['coverage_90'])} inside 90 %"))
    return (
        f"<h1>Barcast evaluation</h1><p>{_named(meta['symbols'])}; {meta['timeframe']} bars, "
        f"{folds[0]['since'][:10]} to {folds[-1]['until'][:10]} in {len(folds)} folds, an origin every "
        f"{meta['stride']} bars.</p>" + _warning(meta["warning"]) + _boxes(cards)
    )


def _evaluation_sections(result: Evaluation) -> Iterator[str]:
    horizons = result.meta["horizons"]
    yield _section(
        "Skill",
        "How far a model's CRPS is below that of historical simulation (hs) on the same origins, all folds "
        "pooled. A bar reaches two standard errors to either side.",
        _draw(plot.model_skill(result), "skill", PANELS),
        "<h3>Fold by fold</h3>",
        _draw(plot.skill_by_fold(result), "skill-folds", PANELS),
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
                **{name: COMPARED[name] for name in ("worst", "direction")},
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
        intervals += ["<h3>Fold by fold</h3>", _draw(plot.coverage_by_fold(result), "coverage-folds", PANELS)]
    if result.thirds.height:
        intervals += [
            "<h3>By expected volatility</h3>"
            "<p>A third of each symbol's origins each, by the width of the 80 % interval of "
            f"{escape(result.meta['volatility'])}.</p>",
            _draw(plot.coverage_by_third(result), "coverage-thirds", PANELS),
        ]
    yield _section(
        "Calibration",
        "The share of outcomes inside the central 50, 80 and 90 % intervals, beside the share that belongs "
        "there (dashed). A bar reaches two standard errors to either side.",
        *intervals,
        "<h3>Reliability</h3><p>How far the share of outcomes at or below a quantile is from its level: "
        "0 when calibrated.</p>",
        _draw(plot.model_reliability(result), "reliability", PANELS),
        "<h3>Where outcomes fell between the levels</h3><p>Flat at 1 when calibrated.</p>",
        _draw(plot.pits(result), "pits", PANELS),
    )
    if result.paths is not None:
        longest = plot.bars(horizons[-1])
        yield _section(
            "Paths",
            f"What models say of the way to +{longest}. Every row has the same quantiles at each step, put "
            "together otherwise, and the same barriers; bold where the model's own paths are more than two "
            "standard errors apart.",
            _choice(
                "model",
                {
                    model: _paths(result, model) + _draw(plot.touches(result, model), f"touches{k}", PANELS)
                    for k, model in enumerate(result.paths["model"].unique(maintain_order=True))
                },
            ),
            _terms(
                {
                    "coupling": PATHS["coupling"],
                    **{score: PATHS[score] for score in JOINT},
                    "own, % better": PATHS["own_gain"],
                    "up, down": PATHS["up, down"],
                    "Brier": PATHS["brier"],
                    "% over brownian": PATHS["over_har"],
                    "±": COMPARED["error"],
                }
            ),
        )
    yield _section("What was compared", "", _meta(result.meta))


def _stress_head(result: StressResult) -> str:
    meta, books = result.meta, result.summary
    cards = []
    for row in books.filter((pl.col("regime") != HISTORY) & (pl.col("strategy") != BENCHMARK)).iter_rows(
        named=True
    ):
        told = f"{_text(row['strategy'])}, {_text(row['regime'])}: return in the worst 5 %, on average"
        cards.append((_percent(row["shortfall"]), told))
    return (
        f"<h1>Barcast stress scenarios</h1><p>{_named(meta['symbols'])}; {meta['timeframe']} bars, "
        f"{meta['since'][:10]} to {meta['until'][:10]}, {meta['scenarios']} scenarios of each regime: "
        f"{_text(', '.join(meta['regimes']))}; model {_text(meta['model'])}.</p>"
        + _warning(
            "Scenario, not forecast: these bars were made up, to see what books and intervals would come to. "
            "Nothing here says how likely that is."
        )
        + _warning(meta["warning"])
        + _boxes(cards)
    )


def _stress_sections(result: StressResult) -> Iterator[str]:
    books = result.books["strategy"].unique(maintain_order=True).to_list()
    yield _section(
        "Outcomes",
        "Every scenario is one backtest on the live path. A box holds the middle half of the scenarios, its "
        "line is their median; the dark mark is what came of the bars as they were.",
        _draw(plot.stress_outcomes(result), "outcomes", PANELS),
        _summary(result),
        _terms({_label(name): text for name, text in STRESSED.items()}),
    )
    panes = {
        name: _draw(plot.stress_growth(result, name), f"growth-{k}", PANELS) for k, name in enumerate(books)
    }
    yield _section(
        "Equity",
        "The middle 90 % and 50 % of the scenarios at each close that is kept, and their median. Dark: the "
        "bars as they were.",
        _choice("Strategy", panes),
    )
    yield _section(
        "Intervals under stress",
        "Share of outcomes inside the central intervals, of all symbols together, for each horizon. Dashed: "
        "what they say of themselves.",
        _draw(plot.stress_coverage(result), "coverage", PANELS),
    )
    panes = {
        name: _draw(plot.stress_prices(result, name), f"prices-{k}", PANELS)
        for k, name in enumerate(result.prices["symbol"].unique(maintain_order=True))
    }
    yield _section(
        "Scenarios",
        "The first scenarios of each regime: closes over the last one before them, of the first symbols.",
        _choice("Symbol", panes),
    )
    yield _section("What was asked", "", _meta(result.meta))


def _summary(result: StressResult) -> str:
    names = list(STRESSED)
    rows = []
    for row in result.summary.iter_rows(named=True):
        cells = [_text(row["regime"]), _text(row["strategy"]), _whole(row["scenarios"])]
        cells += [_percent(row[name]) for name in names[1:]]
        pooled = ' class="pooled"' if row["regime"] == HISTORY else ""
        rows.append(f"<tr{pooled}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = _columns(["regime", "strategy", *(_label(name) for name in names)], rows, (1,))
    return f'<div class="tight">{table}</div>'


def _pooled(result: Evaluation, horizon: int) -> str:
    best = result.best_baseline(horizon)
    others = dict.fromkeys([result.meta["reference"], best])
    labels = ["model", "CRPS, bp", *(f"% over {other}" for other in others)]
    labels += [f"inside {p} %" for p in INTERVALS] + ["worst", "direction"]
    rows = []
    for row in result.scores.filter(fold=ALL, horizon=horizon).sort("crps").iter_rows(named=True):
        model = row["model"]
        cells = [f"<td>{_text(model)}</td>", f"<td>{1e4 * row['crps']:.2f}</td>"]
        cells += [_estimate(result.gain(horizon, model, other), other == best) for other in others]
        for percent in INTERVALS:
            value = row[f"coverage_{percent}"]
            cells.append(
                f"<td{_mark(f'coverage_{percent}', value)}>{_within(row, f'coverage_{percent}')}</td>"
            )
        cells += [f"<td>{row['worst']:.3f}</td>", f"<td>{_within(row, 'direction')}</td>"]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table({label: (label, _text) for label in labels}, "".join(rows))


def _paths(result: Evaluation, model: str) -> str:
    """The joint scores of a model's paths, and what was said of barriers and came true."""
    scores, touch = (frame.filter(model=model) for frame in (result.paths, result.touch) if frame is not None)
    rows = []
    for coupling in scores["coupling"].unique(maintain_order=True):
        cells = [f"<td>{_text(coupling)}</td>"]
        for score in JOINT:
            row = scores.filter(coupling=coupling, score=score).row(0, named=True)
            cells.append(f"<td>{row['value']:.4f}</td>{_estimate(_gain(row, 'own_gain'), True)}")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    labels = ["coupling", *(label for score in JOINT for label in (score, "own, % better"))]
    joint = f'<div class="tight">{_columns(labels, rows)}</div>'
    rows = []
    for row in touch.iter_rows(named=True):
        shares = [row[name] for side in ("up", "down") for name in (f"said_{side}_first", f"{side}_first")]
        cells = [f'<td>{row["up"]:g} up, {row["down"]:g} down</td><td class="text">{row["coupling"]}</td>']
        cells += [f"<td>{_percent(share)}</td>" for share in shares]
        cells.append(f"<td>{row['brier']:.4f}</td>")
        cells += [_estimate(_gain(row, name), True) for name in ("over_har", "own_gain")]
        kind = ' class="pooled"' if row["coupling"] == OWN else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    labels = ["barriers", "coupling", "up first: said", "came true", "down first: said", "came true"]
    labels += ["Brier", "% over brownian", "own, % better"]
    return (
        f"{joint}<h3>Barriers that are touched first</h3>"
        f'<div class="tight">{_columns(labels, rows, (1,))}</div>'
        "<h3>Reliability of touches</h3><p>What was said and what came true, of up first and down first; on "
        f"the dashed line when calibrated. Bins of fewer than {plot.FEW} are left out.</p>"
    )


def _gain(row: Mapping[str, float | None], name: str) -> Estimate | None:
    value, error = row[name], row[f"{name}_error"]
    return None if value is None or error is None else Estimate(value, error)


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


def _warning(text: str) -> str:
    """A paragraph for each line."""
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in text.splitlines())


def _undrawn(symbols: Sequence[str], function: str) -> str:
    if len(symbols) <= FANS:
        return ""
    return (
        f" Of {len(symbols)} symbols the first {FANS} are drawn. Of any other, in Python: "
        f'plot.{function}(BacktestResult.load(folder), "{symbols[FANS]}").show().'
    )


def _named(symbols: Sequence[str]) -> str:
    more = f" and {len(symbols) - SYMBOLS} more" if len(symbols) > SYMBOLS else ""
    return escape(", ".join(symbols[:SYMBOLS]) + more)


def _section(title: str, text: str, *parts: str) -> str:
    told = f"<p>{escape(text)}</p>" if text else ""
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{told}{"".join(parts)}</section>'


def _part(title: str, text: str, *parts: str) -> tuple[str, str]:
    return title, _section(title, text, *parts)


def _anchor(title: str) -> str:
    return "part-" + title.lower().replace(" ", "-")


def _choice(what: str, panes: Mapping[str, str]) -> str:
    """Panes of which one is shown, with a menu where there are several."""
    if len(panes) == 1:
        return "".join(f"<h3>{escape(name)}</h3>{pane}" for name, pane in panes.items())
    options = "".join(f"<option>{escape(name)}</option>" for name in panes)
    shown = "".join(f"<div{' hidden' if k else ''}>{pane}</div>" for k, pane in enumerate(panes.values()))
    menu = f'<select autocomplete="off" onchange="choose(this)">{options}</select>'
    return f'<div class="choice"><label>{what} {menu}</label>{shown}</div>'


def _draw(figure: go.Figure, name: str, least: int = 0, follows: bool = False) -> str:
    """A figure; its box scrolls where there are fewer than `least` pixels.

    One that `follows` fits its prices to the time that is shown.
    """
    spec, width = figure.to_json(), f' style="min-width:{least}px"' if least else ""
    script = f'<script>figure("{name}", {spec}, {json.dumps(follows)})</script>'
    return f'<div class="wide"><div class="figure" id="{name}"{width}></div></div>{script}'


def _portfolio(result: BacktestResult) -> str:
    """Metrics as rows, each with its definition, and strategies as columns."""
    table = result.portfolio
    heads = "".join(f"<th>{escape(name)}</th>" for name in table["strategy"])
    rows = []
    for name, text in metrics.DEFINITIONS.items():
        if name in table.columns:
            cell = _fine_percent if name in PERCENT else _plain
            values = "".join(f"<td>{cell(value)}</td>" for value in table[name])
            rows.append(f"<tr><td>{_label(name)}<small>{escape(text)}</small></td>{values}</tr>")
    periods = result.meta.get("periods_per_year")
    stated = f"<p>P, the periods in a year: {periods}.</p>" if periods is not None else ""
    return (
        f'{stated}<div class="wide"><table class="metrics"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _trades(result: BacktestResult) -> str:
    fills = result.rows("fills")
    names = [name for name in result.portfolio["strategy"] if name != BENCHMARK]
    if isinstance(fills, pl.LazyFrame):  # those of a strategy are in order
        fills = pl.concat([collected(fills.filter(strategy=name).tail(TRADES)) for name in names])
    own = fills.filter(pl.col("strategy") != BENCHMARK).sort("close_time", maintain_order=True)
    own = own.tail(TRADES).reverse()
    traded, paid = pl.col("units").abs(), pl.col("commission") + pl.col("spread") + pl.col("slippage")
    numbers = own.select(traded, "price", "position", value=traded * pl.col("price"), paid=paid)
    columns = [_aligned(numbers[name]) for name in ("units", "price", "value", "paid", "position")]
    rows = []
    for row, *cells in zip(own.iter_rows(named=True), *columns, strict=True):
        side, kind = ("bought", "buy") if row["units"] > 0 else ("sold", "sell")
        rows.append(
            f'<tr><td>{_moment(row["close_time"])}</td><td class="text">{_text(row["strategy"])}</td>'
            f'<td class="text">{_text(row["symbol"])}</td><td class="text {kind}">{side}</td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    labels = ["close of the bar, UTC", "strategy", "symbol", "side", "units", "price", "value", "costs"]
    return f'<div class="tight">{_columns([*labels, "units held then"], rows, (1, 2, 3))}</div>'


def _aligned(values: pl.Series) -> list[str]:
    """Numbers of one column with the same decimals: five digits of a middle one, at least two decimals."""
    sizes = sorted(abs(value) for value in values if value)
    decimals = 4 - floor(log10(sizes[len(sizes) // 2])) if sizes else 2
    return [_minus(f"{value:,.{min(8, max(2, decimals))}f}".replace(",", " ")) for value in values]


def _scores(result: BacktestResult) -> str:
    """A row for each symbol and horizon; a coverage shows its error."""
    points = ("pinball", "crps", "interval_80", "interval_90")
    columns: dict[str, tuple[str, Cell]] = {
        "symbol": ("symbol", _text),
        "horizon": ("horizon", _plain),
        "n": ("n", _plain),
        **{name: (_label(name), _basis_points) for name in points},
        **{f"coverage_{percent}": (_label(f"coverage_{percent}"), _percent) for percent in INTERVALS},
    }
    pooled = result.scores.filter(pl.col("symbol") == POOLED).sort("horizon")
    single = result.scores.filter(pl.col("symbol") != POOLED).sort("symbol", "horizon")
    rows = []
    for row in pl.concat([pooled, single]).iter_rows(named=True):
        cells = []
        for name, (_, cell) in columns.items():
            error = row.get(f"{name}_error")
            doubt = f" &plusmn;{100 * error:.1f}" if error is not None else ""
            cells.append(f"<td{_mark(name, row[name])}>{cell(row[name])}{doubt}</td>")
        kind = ' class="pooled"' if row["symbol"] == POOLED else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    terms = scoring.DEFINITIONS
    told = {label: terms[name] for name, (label, _) in columns.items() if name in terms}
    told |= {"±": terms["coverage_90_error"], **_BASIS}
    return f'<div class="tight">{_table(columns, "".join(rows))}</div>{_terms(told)}'


def _skill(result: BacktestResult) -> str:
    """A row for what was published and for each baseline, the hardest to beat first."""
    pooled = result.skill.filter((pl.col("symbol") == POOLED) & (pl.col("regime") == POOLED))
    horizons = sorted(pooled["horizon"].unique())
    order = pooled.group_by("other").agg(pl.col("skill").mean()).sort("skill", "other")["other"]
    found = {(row["other"], row["horizon"]): row for row in pooled.iter_rows(named=True)}
    mine = "".join(f"<td>{_basis_points(found[order[0], h]['crps'])}</td><td></td>" for h in horizons)
    rows = [f'<tr class="pooled"><td>as published</td>{mine}</tr>']
    for other in order:
        cells = [f"<td>{_text(other)}</td>"]
        for h in horizons:
            row = found[other, h]
            known = row["skill"] is not None and row["error"] is not None
            skilled = _estimate(Estimate(row["skill"], row["error"]) if known else None, True)
            cells.append(f"<td>{_basis_points(row['other_crps'])}</td>{skilled}")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    labels = ["", *(label for h in horizons for label in (f"+{plot.bars(h)}: CRPS, bp", "skill, %"))]
    told = {_label(name): text for name, text in skill.DEFINITIONS.items() if name not in ("n", "times")}
    return _columns(labels, rows) + _terms(told | _BASIS)


def _trainings(result: BacktestResult) -> str:
    rows = []
    for row in result.trainings.reverse().iter_rows(named=True):
        known = row["gain"] is not None and row["gain_error"] is not None
        gain = Estimate(100 * row["gain"], 100 * row["gain_error"]) if known else None
        fate, kind = ("accepted", "buy") if row["accepted"] else ("refused", "sell")
        rows.append(
            f"<tr><td>{_moment(row['asked'])}</td><td>{_moment(row['judged'])}</td>"
            f'<td class="text {kind}">{fate}</td><td class="text">{_text(row["challenger"] or "")}</td>'
            f'{_estimate(gain, True)}<td>{_plain(row["origins"])}</td><td class="reason">'
            f"{_text(row['reason'] or '')}<small>trained for: {_text(row['reasons'])}</small></td></tr>"
        )
    labels = ["asked, UTC", "judged, UTC", "verdict", "challenger", "gain, %", "origins", "why"]
    told = {
        "gain": "by how much the challenger's CRPS is below the champion's on the same origins, and its "
        "standard error; bold beyond two of them",
        "origins": "forecasts that the verdict rests on",
    }
    return f'<div class="tight">{_columns(labels, rows, (2, 3, 6))}</div>{_terms(told)}'


def _columns(labels: Sequence[str], rows: Sequence[str], left: Sequence[int] = ()) -> str:
    """A table; columns are aligned right but for the first and those in `left`."""
    heads = "".join(
        f'<th class="text">{escape(label)}</th>' if k in left else f"<th>{escape(label)}</th>"
        for k, label in enumerate(labels)
    )
    head, body = f"<thead><tr>{heads}</tr></thead>", f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _table(columns: Mapping[str, tuple[str, Cell]], rows: str) -> str:
    heads = "".join(f"<th>{escape(label)}</th>" for label, _ in columns.values())
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _terms(told: Mapping[str, str]) -> str:
    terms = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in told.items())
    return f"<dl>{terms}</dl>"


def _meta(meta: Mapping[str, object]) -> str:
    rows = []
    for key, value in meta.items():
        if key == "warning":  # the head of the page says it
            continue
        shown = "none" if value in ({}, [], None) else _json(value)
        if isinstance(value, list) and len(shown) > LINE:
            shown = "\n".join(map(_json, value))
        elif isinstance(value, dict) and value:
            shown = "\n".join(f"{name}: {_json(inner)}" for name, inner in value.items())
        rows.append(f"<tr><td>{escape(key)}</td><td>{escape(shown)}</td></tr>")
    return f'<div class="wide"><table class="meta"><tbody>{"".join(rows)}</tbody></table></div>'


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _mark(name: str, value: object) -> str:
    if name.startswith("coverage_") and isinstance(value, float):
        nominal = int(name.removeprefix("coverage_")) / 100
        return ' class="off"' if abs(value - nominal) > TOLERANCE else ""
    return ""


def _label(name: str) -> str:
    return escape(LABELS.get(name, name.replace("_", " ")))


def _day(time: object) -> str:
    return time.date().isoformat() if isinstance(time, datetime) else ""


def _moment(time: object) -> str:
    return f"{time:%Y-%m-%d %H:%M}" if isinstance(time, datetime) else "&ndash;"


def _text(value: object) -> str:
    return escape(str(value))


def _plain(value: object) -> str:
    return _whole(value) if isinstance(value, int) else _number(value)


def _whole(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else "&ndash;"


def _number(value: object) -> str:
    return _minus(f"{value:.2f}") if isinstance(value, float) else "&ndash;"


def _percent(value: object) -> str:
    return _minus(f"{value:.1%}") if isinstance(value, float) else "&ndash;"


def _within(row: Mapping[str, float | None], share: str) -> str:
    value, error = row[share], row[f"{share}_error"]
    return "&ndash;" if error is None else f"{_percent(value)} &plusmn;{100 * error:.1f}"


def _fine_percent(value: object) -> str:
    return _minus(f"{value:.2%}") if isinstance(value, float) else "&ndash;"


def _minus(text: str) -> str:
    return text.replace("-", "&minus;")


def _basis_points(value: object) -> str:
    return f"{1e4 * value:.1f}" if isinstance(value, float) else "&ndash;"
