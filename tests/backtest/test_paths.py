"""Scores of paths in `barcast evaluate`, against a Brownian motion whose every probability is known."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from msgspec.structs import replace
from rich.console import Console

from barcast.backtest import cli
from barcast.backtest import evaluate as module
from barcast.backtest.evaluate import Field, evaluate, open_field
from barcast.backtest.paths import BINS, BROWNIAN, COUPLINGS, JOINT, OWN, PAIRS, gaussian
from barcast.backtest.report import write_evaluation
from barcast.daemon.timeframe import Timeframe
from barcast.models import LEVELS, Card, ConfigError, Forecast, Window
from barcast.models.forecast import Paths
from barcast.models.joint import first_passage
from tests.backtest.browser import chromium, faults, find_chromium

HOUR = 3600 * 10**9
HORIZONS, STEPS, SIGMA = (1, 6), tuple(range(1, 7)), 0.01
HOURLY = Timeframe.parse("1h")
S = 64


def walk(symbol: str, n: int, seed: int) -> Window:
    """Hourly bars of a Brownian motion, with the highs and lows that it has between its closes."""
    rng = np.random.default_rng(seed)
    moves = SIGMA * rng.standard_normal(n)
    price = np.concatenate(([0.0], moves.cumsum()))
    a, b = price[:-1], price[1:]
    # the extremes of a bridge, by their distributions: exp(-2 (m - a)(m - b) / s^2) is uniform
    reach = np.sqrt((b - a) ** 2 - 2 * SIGMA**2 * np.log(rng.random((2, n))))
    high, low = (a + b + reach[0]) / 2, (a + b - reach[1]) / 2
    values = np.exp(np.stack([a, high, low, b, np.zeros(n)], 1))
    return Window(symbol, HOUR * np.arange(100, 100 + n, dtype=np.int64), values)


class Says:
    """Forecasts normal returns of `factor` times the true deviation, with paths if it is asked to."""

    def __init__(self, model: str, factor: float = 1.0, paths: bool = False, silent: int = -1) -> None:
        steps = STEPS if paths else ()
        self.card = Card(model, "fake", "1h", HORIZONS, LEVELS, 2, 2, "none", 0, 0, "numpy", steps)
        self.factor, self.silent = factor, silent

    def forecast(self, windows):
        rng = np.random.default_rng(7)
        scale = self.factor * SIGMA
        std = scale * np.sqrt(HORIZONS)
        q = np.outer(std, [-1.645, -1.282, -0.674, 0, 0.674, 1.282, 1.645])
        made = []
        for w in windows:
            quiet = w.close_time == self.silent
            paths = None
            if self.card.path and not quiet:
                returns = scale * rng.standard_normal((S, len(STEPS))).cumsum(1)
                paths = Paths(STEPS, returns, np.full(len(STEPS), scale))
            said = np.full_like(q, np.nan) if quiet else q
            nothing = np.zeros(2)
            made.append(
                Forecast(
                    w.symbol,
                    w.close_time,
                    1.0,
                    HORIZONS,
                    LEVELS,
                    said,
                    nothing,
                    std,
                    nothing,
                    False,
                    paths=paths,
                )
            )
        return made


class Together(Says):
    """A rival whose paths are all of one rank."""

    def forecast(self, windows):
        sort = [(f, np.sort(f.paths.returns, 0)) for f in super().forecast(windows)]
        return [replace(f, paths=replace(f.paths, returns=returns)) for f, returns in sort]


def field(har: float = 1.0, silent: int = -1) -> Field:
    """A model that knows the truth, with a rival that knows the marginals, and what else is needed."""
    models = {"hs": Says("hs"), "har-s": Says("har", har), "truth": Says("truth", 1.0, True, silent)}
    return Field(models, dict.fromkeys(models, "hs"), {}, {"truth": Together("rival", 1.0, True)}, "har-s")


@pytest.fixture(scope="module")
def known():
    """The truth about two Brownian motions, beside a driftless one of the same volatility."""
    return evaluate(field(), [walk("A", 3000, 1), walk("B", 3000, 2)], HOURLY, folds=2, stride=7)


def test_true_paths_are_better_than_the_same_marginals_coupled_otherwise(known):
    """Beyond errors where the coupling is another, within them where it is the same."""
    assert gaussian(known.paths) == []
    same = pl.when(coupling=OWN).then(pl.col("value")).max().over("model", "score")
    assert gaussian(known.paths.with_columns(value=same)) == ["truth"]
    for score in JOINT:
        rows = {row["coupling"]: row for row in known.paths.filter(score=score).to_dicts()}
        assert list(rows) == list(COUPLINGS)
        assert rows[OWN]["own_gain"] is None
        for coupling in ("independent", "comonotone", "gaussian"):
            assert rows[coupling]["own_gain"] > 3 * rows[coupling]["own_gain_error"] > 0, (score, coupling)
        assert abs(rows["random walk"]["own_gain"]) < 4 * rows["random walk"]["own_gain_error"] + 0.3
        # the rival is comonotone: the same ranks in every step
        assert rows["gaussian"]["value"] == pytest.approx(rows["comonotone"]["value"], rel=1e-9)
    assert set(known.paths["n"]) == {known.scores["n"].max()}


def test_touches_are_those_of_the_known_motion(known):
    """Shares that came true and those that were said agree with the closed form, the scores with Brier's."""
    for up, down in PAIRS:
        exact = first_passage(up, down, 1.0)
        p = np.array([exact.up, exact.down, 1 - exact.up - exact.down])
        rows = {row["coupling"]: row for row in known.touch.filter(up=up, down=down).to_dicts()}
        assert list(rows) == [*COUPLINGS, BROWNIAN]
        for coupling in (OWN, "random walk", BROWNIAN):
            row = rows[coupling]
            for k, side in enumerate(("up", "down")):
                assert row[f"{side}_first"] == pytest.approx(p[k], abs=0.05)
                assert row[f"said_{side}_first"] == pytest.approx(p[k], abs=0.02)
            assert abs(row["brier"] - (1 - (p**2).sum())) < 4 * row["error"] < 0.1
        assert rows[BROWNIAN]["over_har"] is None
        assert abs(rows[OWN]["over_har"]) < 4 * rows[OWN]["over_har_error"] + 1
        assert rows["independent"]["over_har"] < -3 * rows["independent"]["over_har_error"]
        assert rows["independent"]["own_gain"] > 3 * rows["independent"]["own_gain_error"]


def test_bins_hold_every_probability_once(known):
    """Two for each forecast and pair; what came true is what was said, within errors, and not of others."""
    n = known.paths["n"][0]
    counted = known.reliability.group_by("up", "down", "coupling").agg(pl.col("n").sum())
    assert set(counted["n"]) == {2 * n}
    assert (known.reliability["upper"] - known.reliability["lower"]).to_numpy() == pytest.approx(1 / BINS)
    own = known.reliability.filter(pl.col("coupling") == OWN, pl.col("n") > 100)
    assert own.height >= len(PAIRS)
    assert ((own["seen"] - own["said"]).abs() < 4 * own["error"] + 0.02).all()
    apart = known.reliability.filter(pl.col("coupling") == "independent", pl.col("n") > 100)
    assert ((apart["seen"] - apart["said"]).abs() > 4 * apart["error"]).any()


def test_wrong_volatility_loses_to_the_truth():
    """A Brownian motion of half the volatility says too few touches, at barriers that are the model's own."""
    found = evaluate(field(har=0.5), [walk("A", 3000, 3)], HOURLY, folds=1, stride=7)
    own = found.touch.filter(pl.col("coupling") == OWN, pl.col("up") + pl.col("down") < 4)
    assert own.height == 3
    assert (own["over_har"] > 3 * own["over_har_error"]).all()
    [said] = found.touch.filter(coupling=BROWNIAN, up=1.0, down=1.0)["said_up_first"]
    assert said == pytest.approx(first_passage(2.0, 2.0, 1.0).up, rel=1e-9)


def test_origins_without_paths_count_for_none():
    """Where a model is silent nothing is scored, of any coupling, and nothing is shifted by it."""
    history = walk("A", 900, 1)
    silent = int(history.close_times[700])
    options = {"since": int(history.close_times[600]), "folds": 1, "stride": 1}
    found = evaluate(field(silent=silent), [history], HOURLY, **options)
    whole = evaluate(field(), [history], HOURLY, **options)
    assert found.paths["n"][0] == whole.paths["n"][0] - 1
    for frame in (found.paths, found.touch, found.reliability):
        numbers = frame.select(pl.selectors.float()).drop_nulls()
        assert numbers.select(pl.all_horizontal(pl.all().is_finite())).to_series().all()
    assert found.paths["value"].to_numpy() == pytest.approx(whole.paths["value"].to_numpy(), rel=0.05)


def test_the_same_evaluation_is_the_same():
    """The other couplings are drawn by keys of the origins, not by chance."""
    history = walk("A", 300, 1)
    one, other = (evaluate(field(), [history], HOURLY, folds=1, stride=9).json() for _ in range(2))
    assert one == other


def test_numbers_and_page(known, tmp_path):
    """JSON and the page have the parts about paths; without paths neither has."""
    found = json.loads(known.json())
    assert {"paths", "touch", "reliability"} < found.keys()
    assert "over_har" in found["definitions"]
    write_evaluation(known, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<section id="part-paths">' in page
    assert page.count('id="touches0"') == 1
    assert re.search(r"<td>independent</td>", page)
    without = evaluate(
        Field({"hs": Says("hs")}, {"hs": "hs"}, {}), [walk("A", 900, 1)], HOURLY, folds=1, stride=5
    )
    assert not {"paths", "touch", "reliability"} & json.loads(without.json()).keys()
    write_evaluation(without, tmp_path / "without.html")
    assert "part-paths" not in (tmp_path / "without.html").read_text()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_drawn(known, tmp_path, width):
    """On a screen and on a phone every figure is drawn, and nothing fails, is fetched or juts out."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: how the page is drawn was not looked at")
    write_evaluation(known, tmp_path / "page.html")
    with chromium(program, tmp_path / "profile") as page:
        assert faults(page, tmp_path / "page.html", width) == []


def test_field_of_models_with_paths(monkeypatch, tmp_path):
    """A checkpoint is opened with paths and once more for its rival; one without is compared all the same."""
    (tmp_path / "a").mkdir()
    asked = []

    def opens(name, timeframe, sampler, steps, paths=False):
        asked.append((Path(name).name, steps, paths))
        if paths and name.endswith("flat"):
            raise ConfigError("flat has no paths")
        return Says(name, 1.0, paths)

    monkeypatch.setattr(module, "open_model", opens)
    found = open_field(["a", "flat", "hs"], "1h", paths=True)
    assert list(found.forecasters) == ["hs", "har-s", "a", "flat"]
    assert (found.brownian, list(found.rivals)) == ("har-s", ["a"])
    assert asked == [("a", None, True), ("flat", None, True), ("flat", None, False), ("a", 0, True)]
    assert open_field(["a", "hs"], "1d", paths=True).brownian == "har"
    with pytest.raises(ConfigError, match="flat has no paths"):
        open_field(["flat"], "1h", paths=True)
    with pytest.raises(ConfigError, match="--paths needs a model of paths: name an SSSD"):
        open_field(["hs"], "1h", paths=True)


def test_command_prints_and_writes_paths(run, tmp_path, monkeypatch):
    """With --paths the table of couplings fits 100 columns; a field without any path is refused."""
    bars = walk("A", 600, 1)
    names = ("open", "high", "low", "close", "volume")
    frame = pl.DataFrame(dict(zip(names, bars.values.T, strict=True)))
    times = pl.Series(bars.close_times).cast(pl.Datetime("ns", "UTC"))
    frame.with_columns(symbol=pl.lit("A"), ts=times).write_parquet(tmp_path / "bars.parquet")
    files = [str(tmp_path / "bars.parquet"), "--stamp", "close", "--model", "hs"]
    status, _, err = run("evaluate", *files, "--paths")
    assert (status, "--paths needs a model of paths: name an SSSD or LDM4TS by --model" in err) == (78, True)

    def opens(name, _timeframe, _sampler, _steps, paths=False):
        return Says(name, 1.0, paths)

    monkeypatch.setattr(module, "open_model", opens)
    monkeypatch.setattr(module, "learnt_until", lambda _name: 0)
    monkeypatch.setattr(module, "learnt_warning", lambda *_: "")
    monkeypatch.setattr(cli, "out", Console(width=100))
    for name in ("hs", "har-s"):
        monkeypatch.setitem(module.BASELINES, name, lambda *_: Says("b"))
    more = ["--model", "mine", "--folds", "1", "--paths", "--json", str(tmp_path / "x.json")]
    status, out, err = run("evaluate", *files, *more)
    assert status == 0, err
    assert all(coupling in out for coupling in (*COUPLINGS, BROWNIAN))
    assert "The other barriers are on the page (--report)." in out
    assert max(len(line.rstrip()) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["coupling"] for row in found["paths"][: len(COUPLINGS)]] == list(COUPLINGS)
