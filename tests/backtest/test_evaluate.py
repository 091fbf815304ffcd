"""`barcast evaluate`: models on identical rolling origins."""

import json
import shutil
import sys
from statistics import NormalDist

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from barcast.backtest import cli
from barcast.backtest.evaluate import ALL, Field, evaluate, open_field
from barcast.backtest.report import write_evaluation
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.daemon.timeframe import Timeframe
from barcast.models import (
    BASELINES,
    LEVELS,
    ConfigError,
    DataError,
    Forecast,
    HistoricalSimulation,
    Window,
    catalog,
)
from barcast.models.scores import crps

HOUR = 3600 * 10**9
HORIZONS = (1, 4)
SIGMA = 0.01
NORMAL = NormalDist()
SAMPLE, MODEL = str(sample_bars()), str(sample_checkpoint())
SESSIONS = ["--stamp", "close", "--calendar", "XNYS", "--symbol", "IBM", "--since", "2012-06-01"]


class Normal(HistoricalSimulation):
    """Says that returns are normal, with `factor` times their true deviation, unless it says nothing."""

    def __init__(self, factor: float, silent: int = -1) -> None:
        super().__init__("1h", HORIZONS, LEVELS)
        self.factor, self.silent = factor, silent

    def forecast(self, windows):
        z = np.array([NORMAL.inv_cdf(p) for p in LEVELS])
        made = []
        for w in windows:
            scale = self.factor * SIGMA * np.sqrt(HORIZONS) if w.close_time != self.silent else np.nan
            q = np.multiply.outer(scale * np.ones(2), z)
            nothing = np.zeros(2)
            made.append(
                Forecast(w.symbol, w.close_time, 1.0, HORIZONS, LEVELS, q, nothing, nothing, nothing, False)
            )
        return made


def walk(symbol: str, n: int, seed: int, gaps: bool = False) -> Window:
    """Hourly closes of a random walk with the deviation SIGMA."""
    price = np.exp(np.cumsum(SIGMA * np.random.default_rng(seed).standard_normal(n)))
    times = HOUR * np.arange(100, 100 + n, dtype=np.int64)
    values = np.stack([price, price, price, price, np.ones(n)], 1)
    keep = np.arange(n) % 7 != 0 if gaps else np.ones(n, bool)
    return Window(symbol, times[keep], values[keep])


def field(**models) -> Field:
    return Field(models, dict.fromkeys(models, "hs"), {})


def fake(**models):
    everything = {"hs": HistoricalSimulation("1h", HORIZONS, LEVELS), **models}
    return field(**everything)


HOURLY = Timeframe.parse("1h")


@pytest.fixture(scope="module")
def known():
    """A forecaster that knows the truth and one that is half as wide again, on two random walks."""
    histories = [walk("A", 12_000, 1), walk("B", 12_000, 2)]
    return evaluate(fake(truth=Normal(1.0), wide=Normal(1.5)), histories, HOURLY, folds=3, stride=5)


def loss(factor: float) -> float:
    """Expected CRPS of normal quantiles that are `factor` times too wide, in units of the true deviation."""
    total = 0.0
    for p in LEVELS:
        q = factor * NORMAL.inv_cdf(p)
        total += NORMAL.pdf(q) + q * (NORMAL.cdf(q) - p)
    return 2 * total / len(LEVELS)


@pytest.mark.parametrize("j", [0, 1])
def test_scores_are_those_of_the_known_truth(known, j):
    """CRPS, paired gain and coverage are within four errors of what they are for normal returns."""
    h = HORIZONS[j]
    pooled = {row["model"]: row for row in known.scores.filter(fold=ALL, horizon=h).to_dicts()}
    assert pooled["truth"]["crps"] == pytest.approx(SIGMA * h**0.5 * loss(1.0), rel=0.05)
    expected = 100 * (1 - loss(1.0) / loss(1.5))
    found = known.gain(h, "truth", "wide")
    assert abs(found.value - expected) < 4 * found.error < 5
    assert found.value > 2 * found.error
    for percent in (50, 80, 90):
        for model, factor in (("truth", 1.0), ("wide", 1.5)):
            z = factor * NORMAL.inv_cdf(0.5 + percent / 200)
            value, error = (pooled[model][f"coverage_{percent}{end}"] for end in ("", "_error"))
            assert abs(value - (2 * NORMAL.cdf(z) - 1)) < 4 * error < 0.1
    assert pooled["truth"]["worst"] < 0.02 < 0.08 < pooled["wide"]["worst"]


def test_direction_is_a_share_of_those_that_went_somewhere():
    """Of independent returns no model says the side; one that knows it does, and is sure; no median, none."""

    class Knowing(Normal):
        """Its median is .3 deviations on the side of the outcome three times of four."""

        def forecast(self, windows):
            found = super().forecast(windows)
            for window, forecast in zip(windows, found, strict=True):
                k = int(np.searchsorted(history.close_times, window.close_time))
                away = 0.3 * SIGMA * (1 if k % 4 else -1)
                forecast.quantiles[0] += away * np.sign(history.values[k + 1, 3] - history.values[k, 3])
            return found

    history = walk("A", 12_000, 3)
    models = {
        "knowing": Knowing(1.0),
        "none": Normal(1.0),
        "fhs": BASELINES["fhs"]("1h", HORIZONS, LEVELS),
    }
    found = evaluate(fake(**models), [history], HOURLY, folds=1, stride=1)
    rows = {r["model"]: r for r in found.scores.filter(fold=ALL, horizon=1).to_dicts()}
    knowing = rows["knowing"]
    assert knowing["direction"] == pytest.approx(0.75, abs=1e-3)
    assert rows["none"]["direction"] is None
    for model in ("hs", "fhs"):
        binomial = 0.5 / rows[model]["n"] ** 0.5
        assert abs(rows[model]["direction"] - 0.5) < 0.02
        assert rows[model]["direction_error"] == pytest.approx(binomial, rel=0.1)


def test_bins_levels_and_thirds_belong_together(known):
    """Bins hold everything once, levels add up to them, and thirds pool to the coverage of all."""
    bins = known.pit.filter(fold=ALL, horizon=4, model="wide")
    assert bins.height == 8
    assert bins["share"].sum() == pytest.approx(1)
    below = known.levels.filter(fold=ALL, horizon=4, model="wide")
    np.testing.assert_allclose(bins["share"].cum_sum()[:7], below["below"])
    thirds = known.thirds.filter(horizon=4, model="wide")
    pooled = known.scores.filter(fold=ALL, horizon=4, model="wide")
    assert thirds["third"].to_list() == ["calm", "middle", "volatile"]
    assert thirds["n"].sum() == pooled["n"].item()
    total = (thirds["coverage_80"] * thirds["n"]).sum() / thirds["n"].sum()
    assert total == pytest.approx(pooled["coverage_80"].item())


def test_folds_follow_each_other_and_share_all_origins(known):
    """Every origin is in one fold; pooled scores are the means over the folds' forecasts."""
    rows = known.scores.filter(horizon=1, model="truth")
    parts, pooled = rows.filter(pl.col("fold") != ALL), rows.filter(fold=ALL)
    assert parts["n"].sum() == pooled["n"].item()
    assert (parts["crps"] * parts["n"]).sum() / parts["n"].sum() == pytest.approx(pooled["crps"].item())
    folds = known.meta["folds"]
    assert [f["fold"] for f in folds] == ["1", "2", "3"]
    assert [f["until"] for f in folds[:-1]] == [f["since"] for f in folds[1:]]


def test_origins_lie_on_a_grid_that_all_symbols_share():
    """Every fifth hour since 1970, whatever bars a symbol lacks; each scored as seen from its own bar."""
    full, gaps = walk("A", 900, 1), walk("B", 900, 2, gaps=True)
    since, until = int(full.close_times[600]), int(full.close_times[880])
    found = evaluate(fake(), [full, gaps], HOURLY, since=since, until=until + 1, folds=1, stride=5)
    hs, losses = HistoricalSimulation("1h", HORIZONS, LEVELS), []
    for w in (full, gaps):
        for k in range(len(w)):
            close = int(w.close_times[k])
            opened = close - HOUR
            if opened // HOUR % 5 or close < since or k + 4 >= len(w) or w.close_times[k + 4] > until:
                continue
            q = hs.forecast([Window(w.symbol, w.close_times[: k + 1], w.values[: k + 1])])[0].quantiles[1]
            losses.append(crps(np.log(w.values[k + 4, 3] / w.values[k, 3]), q, LEVELS))
    row = found.scores.filter(fold=ALL, horizon=4).row(0, named=True)
    assert (row["n"], row["crps"]) == (len(losses), pytest.approx(np.mean(losses)))
    assert row["times"] < row["n"] < 2 * row["times"]


def test_what_a_model_cannot_forecast_counts_for_none():
    """An origin without a usable forecast of one model is left out for all, and counted."""
    history = walk("A", 900, 1)
    silent = int(history.close_times[700])
    options = {"since": int(history.close_times[600]), "folds": 1, "stride": 1}
    all_ = evaluate(fake(truth=Normal(1.0)), [history], HOURLY, **options)
    found = evaluate(fake(truth=Normal(1.0, silent)), [history], HOURLY, **options)
    assert found.meta["withheld"] == {"truth": 1}
    assert set(found.scores["n"]) == {all_.scores["n"][0] - 1}
    assert found.scores["crps"].is_finite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"since": HOUR * 99_000}, "no forecast origin"),
        ({"folds": 500}, "holds no forecast origin: take fewer folds"),
        ({"since": 0, "folds": 8}, "Fold 1, 1970-01-01"),
    ],
)
def test_a_fold_without_origins_is_a_fault(options, said):
    """Nothing is divided by no forecast."""
    with pytest.raises(DataError, match=said):
        evaluate(fake(), [walk("A", 700, 1)], HOURLY, **options)


def test_without_a_named_baseline_all_that_suit_stand_beside_the_model(monkeypatch):
    """Baselines that refuse the timeframe, or lack their package, are left out with the reason."""

    def refuses(*_):
        raise ConfigError("fhs-s needs bars shorter than a day")

    monkeypatch.setitem(catalog.BASELINES, "fhs-s", refuses)
    monkeypatch.setitem(sys.modules, "arch", None)
    found = open_field([MODEL], "session")
    assert list(found.forecasters)[-1] == "checkpoint"
    assert {"hs", "fhs"} <= set(found.forecasters)
    assert found.left_out["fhs-s"] == "fhs-s needs bars shorter than a day"
    assert "'garch' needs the package arch" in found.left_out["garch"]
    assert list(open_field(["fhs", "fhs"], "1d").forecasters) == ["hs", "fhs"]
    with pytest.raises(ConfigError, match="shorter than a day"):
        open_field(["fhs-s"], "1d")


def test_models_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    """No model is lost behind another's label, and none is taken for a baseline."""
    monkeypatch.chdir(tmp_path)
    for place in ("a/model", "model", "b/har", "other"):
        shutil.copytree(MODEL, place)
    found = open_field(["a/model", "model", "b/har", "other", "hs"], "session")
    labels = {"hs": "hs", "a/model": "a/model", "model": "model", "b/har": "b/har", "other": "other"}
    assert found.names == labels
    assert list(found.forecasters) == list(labels)
    assert open_field(["a/model", "b/har", "hs"], "session").names == {
        "hs": "hs",
        "model": "a/model",
        "b/har": "b/har",
    }


def test_only_a_baseline_can_be_the_best_baseline():
    """What was opened decides, not what it is labelled."""
    models = {"hs": Normal(3.0), "fhs": Normal(1.0)}
    histories = [walk("A", 1200, 1)]
    options = {"since": int(histories[0].close_times[600]), "folds": 1, "stride": 5}
    for name, best in (("fhs", "fhs"), (MODEL, "hs")):
        found = evaluate(Field(models, {"hs": "hs", "fhs": name}, {}), histories, HOURLY, **options)
        assert found.best_baseline(1) == best


def test_the_command_writes_table_page_and_numbers(run, tmp_path, monkeypatch):
    """A table of 100 columns, a page that needs no network, and JSON with every part."""
    monkeypatch.setattr(cli, "out", Console(width=100))
    page, numbers = tmp_path / "new" / "page.html", tmp_path / "numbers.json"
    more = ["--model", MODEL, "--folds", "2", "--report", str(page), "--json", str(numbers)]
    status, out, err = run("evaluate", SAMPLE, *SESSIONS, *more)
    assert status == 0, err
    assert "timeframe session" in err
    assert "…" not in out
    assert max(len(line.rstrip()) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    assert all(f"+{h}: " in out for h in (1, 5, 20))
    found = json.loads(numbers.read_text())
    assert list(found) == ["meta", "definitions", "scores", "gains", "thirds", "levels", "pit"]
    models = list(found["meta"]["models"])
    assert (models[0], models[-1], len(found["meta"]["folds"])) == ("hs", "checkpoint", 2)
    assert len(found["scores"]) == 3 * 3 * len(models)
    assert len(found["gains"]) == 3 * 3 * len(models) * (len(models) - 1)
    assert found["meta"]["warning"] == ""
    assert found["meta"]["files"] == [sample_bars().name]
    text = page.read_text()
    assert "<script src" not in text
    assert text.count('class="figure"') == 6


def test_only_the_reference_can_be_shown(run, tmp_path):
    """hs alone has no skill to draw; the page is written all the same."""
    page = tmp_path / "page.html"
    status, out, err = run(
        "evaluate", SAMPLE, *SESSIONS, "--model", "hs", "--folds", "1", "--report", str(page)
    )
    assert status == 0, err
    assert "1 fold(s)" in out
    assert page.stat().st_size > 10**6


def test_a_model_that_learnt_from_the_test_says_so(run, tmp_path):
    """Bars that a checkpoint has seen are no test and called so; by default the test begins after them."""
    both = ["--model", "hs", "--model", MODEL, "--folds", "1", "--json", str(tmp_path / "x.json")]
    early = [*SESSIONS[:-1], "2008-06-02", "--until", "2009-01-01"]
    status, _, err = run("evaluate", SAMPLE, *early, *both)
    assert status == 0, err
    assert "checkpoint: The model has learnt from bars up to" in " ".join(err.split())
    status, _, err = run("evaluate", SAMPLE, *SESSIONS[:-2], "--until", "2010-07-01", *both)
    assert status == 0, err
    meta = json.loads((tmp_path / "x.json").read_text())["meta"]
    assert meta["warning"] == ""
    assert "2009-12-31" <= meta["folds"][0]["since"] < "2010-01-05"


def test_the_same_evaluation_gives_the_same_page(known, tmp_path):
    """Nothing of the page depends on the run."""
    for name in ("a", "b"):
        write_evaluation(known, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("levels", "figures"), [((0.2, 0.5, 0.8), 4), ((0.05, 0.5, 0.95), 5)])
def test_levels_without_the_usual_intervals_have_a_page(tmp_path, levels, figures):
    """Coverage is drawn of the intervals that there are; all else is there."""
    models = {name: catalog.BASELINES[name]("1h", HORIZONS, levels) for name in ("hs", "fhs")}
    found = evaluate(field(**models), [walk("A", 1500, 1)], HOURLY, folds=2)
    write_evaluation(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count('class="figure"') == figures


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "model 'nowhere': there is no such folder"),
        (["--model", MODEL, "--timeframe", "30m"], "trained on 'session' bars, not on '30m'"),
        (["--since", "2030-01-01"], "no forecast origin"),
        (["--symbol", "NONE"], "No bar of NONE was found"),
        (["--model", "hs", "--report", "."], "is a directory"),
        (["--model", "hs", "--json", "/proc/none/x.json"], "--json"),
        (["--model", "hs", "--folds", "400"], "take fewer folds"),
    ],
)
def test_faults_of_the_user_end_in_a_sentence(run, arguments, said):
    """A fault names what is wrong and exits with 78 or, for options, 2."""
    status, out, err = run("evaluate", SAMPLE, *SESSIONS, *arguments)
    assert status in (2, 78)
    assert said in " ".join((out + err).replace("│", " ").split())


@pytest.mark.parametrize("command", ["evaluate", "train", "forecast", "backtest"])
def test_short_or_bad_bars_end_in_a_sentence(run, tmp_path, command):
    """Fifty bars are too few for any origin, and a row without a price is named, not skipped."""
    more = {"train": ["--out", str(tmp_path / "m")], "evaluate": []}.get(command, ["--model", "hs"])
    rows = pl.read_parquet(SAMPLE).filter(symbol="IBM").head(50)
    rows.write_parquet(tmp_path / "short.parquet")
    options = ["--stamp", "close", "--calendar", "XNYS", *more]
    status, _, err = run(command, str(tmp_path / "short.parquet"), *options)
    assert status == 78, err
    rows[5, "close"] = float("nan")
    rows.write_parquet(tmp_path / "bad.parquet")
    status, _, err = run(command, str(tmp_path / "bad.parquet"), *options)
    assert (status, "row 6, IBM" in err) == (78, True)
