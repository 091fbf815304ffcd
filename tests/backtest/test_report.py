import re
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

import polars as pl
import pytest

from barcast.backtest import metrics, scoring, skill
from barcast.backtest.report import FANS, html, write_evaluation, write_report
from barcast.backtest.result import FRAMES, BacktestResult
from barcast.models import ConfigError
from tests.backtest.browser import Page, chromium, faults, find_chromium
from tests.backtest.results import five_minutes, made_up

FIGURES = (
    *("equity", "drawdown", "monthly0", "monthly1", "monthly2", "trades0", "trades1", "exposure", "costs"),
    *("fan0", "fan1", "fans0", "fans1", "coverage", "pit", "reliability", "skill", "skill-regime"),
    *("skill-symbol", "retraining"),
)


@pytest.fixture(scope="module")
def result() -> BacktestResult:
    """Two symbols, two strategies, five trainings; with names that HTML must not take for its own."""
    made = made_up(symbols=("AAA", "B<i>B"))
    return replace(made, meta=made.meta | {"warning": "The model has seen <it>."})


def without_library(page: str) -> str:
    """The page less the script of plotly.js."""
    scripts = re.findall(r"<script[^>]*>.*?</script>", page, re.DOTALL)
    library = [script for script in scripts if len(script) > 4_000_000]
    assert len(library) == 1
    return page.replace(library[0], "")


def test_self_contained(result: BacktestResult, tmp_path: Path) -> None:
    """The page carries plotly.js once and fetches nothing."""
    write_report(result, tmp_path / "report.html", title="Two <stocks>")
    page = without_library((tmp_path / "report.html").read_text("utf-8"))
    assert "<title>Two &lt;stocks&gt;</title>" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(", page)
    assert "http" not in page


@pytest.mark.parametrize("kind", ["report", "evaluation"])
def test_page_is_whole_or_as_it_was(result: BacktestResult, tmp_path: Path, monkeypatch, kind: str) -> None:
    """On a full disk the page that was there stays, nothing else does, and the error names the file."""
    path, plain = tmp_path / "page.html", Path.write_bytes
    path.write_text("before")

    def full(partial: Path, content: bytes) -> int:
        plain(partial, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("barcast.backtest.report._evaluation_head", lambda _: "")
    monkeypatch.setattr("barcast.backtest.report._evaluation_sections", lambda _: [])
    with pytest.raises(ConfigError, match=r"page\.html: .*No space left on device; name a folder"):
        write_report(result, path) if kind == "report" else write_evaluation(None, path)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]


def test_sections(result: BacktestResult) -> None:
    """The page holds every figure, the tables with each number's definition, and what was run."""
    page = without_library(html(result))
    for name in FIGURES:
        assert page.count(f'id="{name}"') == 1, name
        assert page.count(f'<script>figure("{name}", ') == 1, name
    told = [*metrics.DEFINITIONS.values(), *scoring.DEFINITIONS.values()]
    told += [text for name, text in skill.DEFINITIONS.items() if name not in ("n", "times")]
    assert [text for text in told if escape(text) not in page] == []
    assert "the periods in a year: 252" in page
    assert "4a8f77" in page
    assert "The model has seen &lt;it&gt;." in page
    assert "B<i>B" not in page
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) == 10
    assert links == re.findall(r'<section id="([^"]+)"', page)


def test_metrics_are_rows(result: BacktestResult) -> None:
    """Each metric is a row with a value for each strategy, formatted as what it is."""
    page = html(result)
    heads = "".join(f"<th>{name}</th>" for name in result.portfolio["strategy"])
    assert f"<tr><th></th>{heads}</tr>" in page
    for name, label, shown in (
        ("total_return", "total return", "{:.2%}"),
        ("sharpe", "Sharpe ratio", "{:.2f}"),
        ("fills", "fills", "{}"),
    ):
        cells = "".join(f"<td>{shown.format(v).replace('-', '&minus;')}</td>" for v in result.portfolio[name])
        assert f"<td>{label}<small>{escape(metrics.DEFINITIONS[name])}</small></td>{cells}</tr>" in page
    assert page.count("<small>") >= len(metrics.DEFINITIONS)


def test_numbers(result: BacktestResult) -> None:
    """The tables show the result's numbers, and mark coverage that is off."""
    page = html(result)
    pooled = result.scores.filter(symbol="all", horizon=1).row(0, named=True)
    assert f"<td>{1e4 * pooled['crps']:.1f}</td>" in page
    assert f">{pooled['coverage_90']:.1%} &plusmn;{100 * pooled['coverage_90_error']:.1f}</td>" in page
    off = result.scores.with_columns(
        coverage_90=pl.lit(0.871), coverage_80=pl.lit(0.819), coverage_80_error=pl.lit(None, pl.Float64)
    )
    marked = html(replace(result, scores=off))
    assert re.search(r'<td class="off">87\.1% &plusmn;[0-9.]+</td>', marked)
    assert "<td>81.9%</td>" in marked
    last = result.fills.filter(pl.col("strategy") != "buy-and-hold").sort("close_time")
    assert (
        page.count('<td class="text buy">bought</td>') + page.count('<td class="text sell">sold</td>') == 20
    )
    assert f"{last['close_time'][-1]:%Y-%m-%d %H:%M}" in page


def test_skill_is_bold_beyond_two_errors(result: BacktestResult) -> None:
    """A gain that can be told from none stands out; one that cannot does not."""
    gains = pl.when(pl.col("other") == "har").then(1.0).otherwise(3.0)
    page = html(replace(result, skill=result.skill.with_columns(skill=gains, error=pl.lit(0.8))))
    assert "<td><b>3.00 &plusmn;0.80</b></td>" in page
    assert "<td>1.00 &plusmn;0.80</td>" in page


def test_trainings_are_told(result: BacktestResult) -> None:
    """The timeline and its table are there when something was trained, and only then."""
    page = html(result)
    assert page.count('<td class="text buy">accepted</td>') == 3
    assert page.count('<td class="text sell">refused</td>') == 2
    assert "trained for: weekly schedule; coverage drifted by 4 points" in page
    without = without_library(html(replace(result, trainings=result.trainings.clear())))
    assert "Retraining" not in without
    assert "Skill" in without
    assert "Skill" not in without_library(html(replace(result, skill=result.skill.clear())))


def test_same_result_same_page(result: BacktestResult) -> None:
    """The same result gives the same bytes."""
    assert html(result) == html(made_like(result))


def made_like(result: BacktestResult) -> BacktestResult:
    """Another object with the same content."""
    return replace(made_up(symbols=("AAA", "B<i>B")), meta=dict(result.meta))


def test_nothing_recorded(result: BacktestResult) -> None:
    """A run without a forecast still gives a page that says so."""
    empty = replace(result, **{name: getattr(result, name).clear() for name in FRAMES})
    page = without_library(html(empty))
    assert "No forecast was made." in page
    assert "What was run" in page
    assert "<script>figure(" not in page


def test_many_symbols_and_bars_fit() -> None:
    """Of many symbols some are drawn, which is said; the data of long series stay below some megabytes."""
    names = [f"S{k}" for k in range(FANS + 2)]
    page = without_library(html(made_up(names, five_minutes(4000), (1, 5, 20))))
    assert f"Of {FANS + 2} symbols the first {FANS} are drawn." in page
    assert "in Python: plot.trades(BacktestResult.load(folder), " in page
    assert "in Python: plot.fan(BacktestResult.load(folder), " in page
    assert f'id="fan{FANS - 1}"' in page
    assert f'id="fan{FANS}"' not in page
    assert len(page) < 7_000_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A headless Chromium with one tab."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: how the report is drawn was not looked at")
    with chromium(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.browser
def test_it_is_drawn(result: BacktestResult, browser: Page, tmp_path: Path) -> None:
    """Every figure is drawn, also those behind menus, and nothing fails, is fetched or juts out."""
    write_report(result, tmp_path / "report.html")
    assert faults(browser, tmp_path / "report.html", 1280) == []
    assert browser.run("[...document.querySelectorAll('.js-plotly-plot')].map(figure => figure.id)") == [
        *re.findall(r'class="figure" id="([^"]+)"', (tmp_path / "report.html").read_text("utf-8"))
    ]


@pytest.mark.browser
def test_it_is_drawn_on_a_phone(browser: Page, tmp_path: Path) -> None:
    """In 390 px too, with more strategies than colours, three horizons and bars that are thinned."""
    many = made_up(("AAA", "BBB"), five_minutes(1700), (1, 5, 20), [f"strategy-{k}" for k in range(7)])
    write_report(many, tmp_path / "report.html")
    assert faults(browser, tmp_path / "report.html", 390) == []


@pytest.mark.browser
def test_prices_in_view_fit_their_panel(result: BacktestResult, browser: Page, tmp_path: Path) -> None:
    """Scrolled to another time, and with another horizon, a fan chart shows that time's prices in height."""
    write_report(result, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1280)
    own = result.bars.filter(symbol="AAA").head(60)
    first, last = ((own["close_time"][k].timestamp() * 1000) for k in (0, -1))
    browser.run(f"Plotly.relayout('fan0', {{'xaxis.range': [{first}, {last}]}}).then(() => 0)")
    low, high = browser.run("document.getElementById('fan0').layout.yaxis.range")
    assert low < own["close"].min() < own["close"].max() < high
    assert high - low < 2 * (own["close"].max() - own["close"].min())
    second = "[false, false, false, true, true, true, true]"
    browser.run(f"Plotly.restyle('fan0', {{visible: {second}}}).then(() => 0)")
    lower, higher = browser.run("document.getElementById('fan0').layout.yaxis.range")
    assert lower < low < high < higher


NAV = "<nav>"
BROKEN = {
    "equity is not drawn": ('figure("equity", ', 'void ("equity", '),
    "equity draws nothing": ('figure("equity", {"data":[', 'figure("equity", {"data":[],"rest":['),
    "ReferenceError": (NAV, "<script>nobody()</script><nav>"),
    "request failed": (NAV, '<img src="nowhere.png"><nav>'),
    "the page asks for": (NAV, '<img src="there.png"><nav>'),
    "the page is": (NAV, '<div style="width: 2000px">wide</div><nav>'),
}


@pytest.mark.browser
def test_a_broken_page_is_found_out(result: BacktestResult, browser: Page, tmp_path: Path) -> None:
    """The control: a figure missing or empty, an error, a request and what is too wide are all seen."""
    parts = ("fills", "outcomes", "scores", "skill", "trainings")
    page = html(replace(result, **{name: getattr(result, name).clear() for name in parts}))
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    assert faults(browser, path, 1280) == []
    (tmp_path / "there.png").write_bytes(b"")
    for fault, (whole, broken) in BROKEN.items():
        path.write_text(page.replace(whole, broken, 1), encoding="utf-8")
        assert [told for told in faults(browser, path, 1280) if told.startswith(fault)], fault
