"""Sweeps: the same results wherever they are computed, and choices that see nothing of what judges them."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest.grid import Search, Template, grid, variants
from barcast.backtest.metrics import portfolio
from barcast.backtest.replay import run_backtest
from barcast.backtest.sweep import Record, sweep
from barcast.backtest.workers import ONE_THREAD
from barcast.daemon.wire import to_ns
from barcast.models import BarcastError, ConfigError, DataError
from tests.backtest.test_strategies import COUNTS
from tests.garch import windows

ROOT = Path(__file__).parents[2]
STRATEGIES = ("vol-target:volatility=0.01|0.05", "median-drift:gain=1|3,costs=0")
MODELS = ("hs", "fhs")
CELLS, FOLDS = 8, 4
SINCE = "2024-01-12"

SIDE = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    name: str
    side: float = 1.0

    def on_forecasts(self, close_time, forecasts):
        return dict.fromkeys(forecasts, self.side)
"""
"""A strategy that holds whatever it is told to."""


def written(path, change=lambda bars: bars):
    """Hourly bars of two symbols in a file."""
    frames = [
        pl.DataFrame(w.values, schema=["open", "high", "low", "close", "volume"]).with_columns(
            symbol=pl.lit(w.symbol),
            ts=pl.from_epoch(pl.Series(w.close_times), "ns").dt.replace_time_zone("UTC"),
        )
        for w in windows(2, 560)
    ]
    change(pl.concat(frames)).write_parquet(path)
    return path


def drifting(bars, *, until, before, after):
    """Prices that drift by so much a bar before a moment (ns) and after it."""
    k = pl.int_range(pl.len()).over("symbol")
    turn = (pl.col("ts").to_physical() < until).sum().over("symbol")
    log = before * pl.min_horizontal(k, turn) + after * (k - pl.min_horizontal(k, turn))
    return bars.with_columns((pl.col(name) * log.exp()) for name in ("open", "high", "low", "close"))


def swept(bars, out, **changes):
    """A sweep over a grid of eight cells; what is given replaces what it has."""
    settings = {"strategies": STRATEGIES, "models": MODELS, "jobs": 1, "since": SINCE} | changes
    return sweep(bars, stamp="close", out=out, **settings)


def jobs(folder):
    """The records in a folder, by name."""
    return {path.name: path.read_bytes() for path in (folder / "jobs").glob("*.job")}


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """A file of bars."""
    return written(tmp_path_factory.mktemp("bars") / "bars.parquet")


@pytest.fixture(scope="module")
def whole(bars, tmp_path_factory):
    """A sweep by one job at a time, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    result = swept(bars, folder)
    result.save(folder)
    return result, folder


@pytest.fixture
def copied(whole, tmp_path):
    """A folder with the records of that sweep."""
    folder = tmp_path / "copied"
    (folder / "jobs").mkdir(parents=True)
    for name, content in jobs(whole[1]).items():
        (folder / "jobs" / name).write_bytes(content)
    return folder


def assert_same(whole, result, folder):
    """The same checksum, tables, JSON and records, to the byte."""
    assert result.meta["checksum"] == whole[0].meta["checksum"]
    result.save(folder)
    assert (folder / "sweep.json").read_bytes() == (whole[1] / "sweep.json").read_bytes()
    assert jobs(folder) == jobs(whole[1])


def test_tables_are_whole_and_in_a_folder_of_their_own(whole, tmp_path, monkeypatch):
    """A folder by its text is made; one with anything else is refused; a full disk leaves no whole sweep.

    What a save that was killed has left is none of somebody else.
    """
    result, folder = whole[0], tmp_path / "new" / "folder"
    result.save(str(folder))
    (folder / ".cells.host.1.partial").touch()
    result.save(folder)
    assert (folder / "sweep.json").read_bytes() == (whole[1] / "sweep.json").read_bytes()

    plain, left = Path.write_bytes, iter((1, 1))

    def full(path, content):
        plain(path, content[:9])
        if not next(left, 0):
            raise OSError(28, "No space left on device")
        return plain(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match=r"path\.parquet: .*No space left on device; name a folder"):
        result.save(folder)
    monkeypatch.undo()
    assert not (folder / "sweep.json").exists()
    for name in ("cells", "folds", "path", "equity"):
        assert pl.read_parquet(folder / f"{name}.parquet").equals(getattr(result, name))
    (folder / "cells.csv").touch()
    with pytest.raises(ConfigError, match=r"holds cells\.csv, which no sweep has written"):
        result.save(folder)
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        result.save(folder / "cells.csv")


@pytest.mark.parametrize("backend", ["loky", "ray", "dask"])
def test_backend_and_number_of_jobs_change_no_byte(bars, whole, tmp_path, backend):
    """One job at a time here, and two at a time in other processes, give the same bytes."""
    if backend != "loky":
        package = {"ray": "ray", "dask": "distributed"}[backend]
        pytest.importorskip(package, reason="the extra `cluster` is not installed")
    result = swept(bars, tmp_path, jobs=2, backend=backend)
    assert result.ran == CELLS * FOLDS
    assert_same(whole, result, tmp_path)


def test_cache_changes_no_byte(bars, whole, tmp_path):
    """What is forecast once for all cells, strategies and sweeps is what each would have been told."""
    for out in ("one", "other"):
        result = swept(bars, tmp_path / out, jobs=2, cache=tmp_path / "cache")
        assert_same(whole, result, tmp_path / out)
    assert len({path.parent for path in (tmp_path / "cache").glob("*/*.parquet")}) == len(MODELS)


def test_order_of_the_grid_changes_no_record(bars, whole, tmp_path):
    """Whatever is named first, the records and their checksum are the same."""
    result = swept(bars, tmp_path, strategies=STRATEGIES[::-1], models=MODELS[::-1])
    assert result.meta["checksum"] == whole[0].meta["checksum"]
    assert jobs(tmp_path) == jobs(whole[1])


def test_cell_does_not_depend_on_its_neighbours(bars, whole, tmp_path):
    """A cell alone has the bytes that it has in a backtest with others, also beside one that never trades."""
    alone = swept(bars, tmp_path, strategies=["vol-target:volatility=0.05"], models=["hs"])
    assert alone.ran == FOLDS
    assert jobs(tmp_path).items() <= jobs(whole[1]).items()
    beside = swept(bars, tmp_path / "b", strategies=["quantile-band:band=0.8", "vol-target"], models=["hs"])
    assert beside.ran == 2 * FOLDS
    assert jobs(tmp_path).items() <= jobs(tmp_path / "b").items()
    assert "1 of 2 cells never traded" in beside.meta["warning"]


def test_record_is_what_a_backtest_of_the_fold_says(bars, whole):
    """Equity and figures of a cell on a fold are those of `run_backtest` over that time."""
    result, folder = whole
    cell = result.folds.filter(fold=2, model="hs").row(0, named=True)
    settings = {"stamp": "close", "model": "hs", "strategies": ["vol-target:volatility=0.01"]}
    said = run_backtest(bars, **settings, since=cell["since"], until=cell["until"])
    book = said.equity.filter(strategy="vol-target")
    row = said.portfolio.filter(strategy="vol-target").row(0, named=True)
    assert {name: cell[name] for name in ("sharpe", "turnover", "fills")} == {
        name: row[name] for name in ("sharpe", "turnover", "fills")
    }
    assert cell["crps"] == pytest.approx(said.scores.filter(symbol="all")["crps"].mean(), rel=1e-12)
    records = [Record.read(path) for path in (folder / "jobs").glob("*.job")]
    assert book["equity"].to_numpy().tobytes() in [record.equity for record in records]
    assert book["close_time"].to_physical().to_numpy().tobytes() in [record.times for record in records]


def test_backtest_without_baselines_is_the_same_but_for_the_skill(bars):
    """What is left out is the comparison alone."""
    plain, bare = (
        run_backtest(bars, stamp="close", model="hs", since="2024-01-20", baselines=baselines)
        for baselines in (True, False)
    )
    assert plain.skill.height > 0 == bare.skill.height
    assert bare.skill.schema == plain.skill.schema
    assert bare.meta["decisions_sha256"] == plain.meta["decisions_sha256"]
    assert_frame_equal(bare.portfolio, plain.portfolio, check_exact=True)


def test_folds_are_put_in_a_row_by_their_returns(whole):
    """Over all folds, a cell's figures are those of its returns in them, one after the other."""
    result, _ = whole
    for cell in result.cells.iter_rows(named=True):
        folds = result.folds.filter(strategy=cell["strategy"], model=cell["model"])
        growth = np.prod(1 + folds["total_return"].to_numpy())
        assert cell["total_return"] == pytest.approx(growth - 1, abs=1e-12)
        assert cell["fills"] == folds["fills"].sum()
        assert cell["max_drawdown"] <= folds["max_drawdown"].min() + 1e-12
    assert result.cells["sharpe"].to_list() == sorted(result.cells["sharpe"], reverse=True)
    assert result.equity["fold"].unique().to_list() == [2, 3, 4]
    last = result.equity["walk_forward"][-1]
    assert last == pytest.approx(np.prod(1 + result.path["total_return"].to_numpy()), rel=1e-12)
    assert result.meta["walk_forward"]["total_return"] == pytest.approx(last - 1, abs=1e-12)


def test_sweep_that_goes_on_runs_only_what_is_missing(bars, whole, copied):
    """Of records that are gone just these are computed again; leftovers of a killed worker are removed."""
    gone = sorted((copied / "jobs").glob("*.job"))[::5]
    for path in gone:
        path.unlink()
    left = copied / "jobs" / ".0123456789abcdef.17.partial"
    left.write_bytes(b"half")
    scratch = copied / "jobs" / ".barcast-left"
    scratch.mkdir()
    (scratch / "UP.closes").touch()
    result = swept(bars, copied)
    assert not left.exists()
    assert not scratch.exists()
    assert result.ran == len(gone) == 7
    assert_same(whole, result, copied)
    assert swept(bars, copied).ran == 0


def test_killed_sweep_goes_on_to_the_same_checksum(bars, whole, tmp_path):
    """After kill -9 of the command and its workers in the middle, only the rest is run, to the same bytes."""
    given = [option for text in STRATEGIES for option in ("--strategy", text)]
    given += [option for name in MODELS for option in ("--model", name)]
    command = [sys.executable, "-m", "barcast.backtest.cli", "sweep", str(bars), "--stamp", "close"]
    running = subprocess.Popen(
        [*command, *given, "--since", SINCE, "--jobs", "2", "--out", str(tmp_path)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while running.poll() is None and not any(tmp_path.glob("jobs/*.job")):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = len([*tmp_path.glob("jobs/*.job")])
    assert 0 < done < CELLS * FOLDS
    result = swept(bars, tmp_path)
    assert result.ran == CELLS * FOLDS - done
    assert_same(whole, result, tmp_path)


def test_leftover_that_is_gone_meanwhile_is_no_fault(bars, copied, monkeypatch):
    """Whoever else removes what a killed worker left is not in the way."""
    plain = Path.iterdir
    gone = copied / "jobs" / ".0123456789abcdef.17.partial"
    monkeypatch.setattr(Path, "iterdir", lambda path: [gone, *plain(path)])
    assert swept(bars, copied).ran == 0


def test_cache_that_is_no_folder_is_a_sentence(bars, tmp_path):
    """It is named with the fold in whose worker it was found."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"fold 1 of 4, .*file: .*; name a folder that you may write"):
        swept(bars, tmp_path / "out", models=["hs"], cache=tmp_path / "file")


def test_damaged_record_is_computed_again(bars, whole, copied):
    """One with another byte, a cut one and one under another's name are told, and not believed."""
    changed, cut, moved, other = sorted((copied / "jobs").glob("*.job"))[:4]
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
    cut.write_bytes(cut.read_bytes()[:100])
    moved.write_bytes(other.read_bytes())
    result = swept(bars, copied)
    assert (result.ran, sorted(result.again)) == (3, [changed.name, cut.name, moved.name])
    assert_same(whole, result, copied)


def test_foreign_file_is_refused_by_name(bars, copied):
    """A file that no sweep writes, and a damaged record that this one cannot compute again, are named."""
    record = next((copied / "jobs").glob("*.job"))
    (copied / "jobs" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine\.txt: no sweep has written it; remove it"):
        swept(bars, copied)
    (copied / "jobs" / "mine.txt").rename(copied / "jobs" / f"{'0' * 64}.job")
    with pytest.raises(DataError, match=r"0000\.job: is damaged"):
        swept(bars, copied)
    assert record.exists()


def test_folder_is_one_sweeps_at_a_time(bars, copied):
    """Another one that is at work there is told so, and computes nothing."""
    with (copied / "jobs" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another sweep is at work there"):
            swept(bars, copied)
    assert swept(bars, copied).ran == 0


def test_all_cells_of_a_folder_are_trials(bars, whole, copied):
    """Another sweep into the folder adds its cells, and deflates by all of them; the same again adds none."""
    assert whole[0].meta["trials"] == CELLS
    more = swept(bars, copied, strategies=["vol-target:volatility=0.02|0.03", "rank"], models=["hs"])
    assert more.meta["trials"] == CELLS + 3
    again = swept(bars, copied)
    assert (again.ran, again.meta["trials"]) == (0, CELLS + 3)
    later = swept(bars, copied, folds=2, models=["hs"])
    assert (later.ran, later.meta["trials"]) == (CELLS, CELLS + 3)
    one, other = (r.cells.sort("strategy", "model")["dsr"] for r in (whole[0], again))
    assert (one > other).all()


def test_deflated_sharpe_counts_the_trials(bars, whole):
    """It is that of a portfolio with as many trials."""
    result, folder = whole
    best = result.cells.row(0, named=True)
    records = [Record.read(path) for path in (folder / "jobs").glob("*.job")]
    pieces = [
        np.frombuffer(record.equity)
        for fold in result.folds.filter(strategy=best["strategy"], model=best["model"]).iter_rows(named=True)
        for record in records
        if record.figures["total_return"] == fold["total_return"]
    ]
    returns = np.concatenate([np.append(np.diff(p) / p[:-1], 0.0) for p in pieces])[:-1]
    equity = np.cumprod(np.append(1.0, 1 + returns))
    times = pl.from_epoch(pl.Series(range(len(equity))), "s").dt.cast_time_unit("ns")
    frame = pl.DataFrame({"close_time": times.dt.replace_time_zone("UTC"), "equity": equity})
    fills = run_backtest(bars, stamp="close", model="hs", baselines=False).fills.clear()
    named = frame.with_columns(strategy=pl.lit("x"), gross=0.0, carry=0.0)
    [row] = portfolio(named, fills, result.meta["periods_per_year"], CELLS).to_dicts()
    assert best["dsr"] == pytest.approx(row["dsr"], rel=1e-9)
    assert best["sharpe"] == pytest.approx(row["sharpe"], rel=1e-9)
    assert best["dsr"] < best["psr"]
    assert result.meta["walk_forward"]["dsr"] == result.meta["walk_forward"]["psr"]


@pytest.fixture
def side(tmp_path):
    """The file of a strategy that is long or short as it is told."""
    path = tmp_path / "side.py"
    path.write_text(SIDE)
    return str(path)


def turned(folder, turn, after):
    """A file of bars that fall until a moment (ns), and then drift by so much a bar."""
    folder.mkdir(exist_ok=True)
    return written(
        folder / f"{after}.parquet", lambda bars: drifting(bars, until=turn, before=-0.003, after=after)
    )


@pytest.mark.parametrize(("folds", "trials"), [(4, None), (2, 20)])
def test_choice_does_not_see_the_fold_that_judges_it(bars, side, tmp_path, folds, trials):
    """A future planted into the last fold would choose otherwise, and changes no cell and no choice."""
    values = "-1.0|1.0" if trials is None else "-1.0..1.0"
    settings = {"strategies": [f"{side}:side={values}"], "models": ["hs"], "trials": trials, "folds": folds}
    plain = swept(bars, tmp_path / "plain", **settings | {"trials": None, "strategies": ["rank"]})
    turn = plain.path["since"].to_physical()[-1]
    falls, rises = (
        swept(turned(tmp_path, turn, after), tmp_path / f"{after}", **settings) for after in (-0.003, 0.012)
    )
    assert falls.cells.sort("strategy")["said"].equals(rises.cells.sort("strategy")["said"])
    assert_frame_equal(falls.path.head(folds - 2), rises.path.head(folds - 2), check_exact=True)
    chosen = ("strategy", "before")
    assert_frame_equal(falls.path.select(chosen), rises.path.select(chosen), check_exact=True)
    assert "side=-" in rises.path["said"][-1]
    assert falls.path["sharpe"][-1] > 0 > rises.path["sharpe"][-1]
    assert rises.path["best"][-1] > 0
    assert trials is None or 15 < rises.cells.height <= trials


def test_choice_does_not_see_the_hours_of_the_fold_that_judges_it(bars, tmp_path, monkeypatch):
    """Where symbols keep other hours later, what was chosen before, and by what, stays the same."""

    def chosen(*periods):
        """What is chosen after the first of two folds with so many periods a year."""

        def work(job):
            n = 0 if job.said.startswith("fold 1") else 1
            times = (job.since + np.arange(10)).astype("<i8").tobytes()
            for (key, trial, _), (fall, gain) in zip(job.cells, ((0.13, 0.1), (0.02, 0.05)), strict=True):
                equity = np.interp(np.arange(10), (0, 1, 9), (1, 1 - fall, 1 + gain)).astype("<f8").tobytes()
                none = dict.fromkeys(("calmar", "turnover", "exposure"))
                record = Record(
                    key=key,
                    trial=trial,
                    crps=[],
                    figures=none | {"periods": 9, "fills": 1, "costs": 0.0},
                    times=times,
                    equity=equity,
                    held_times=times,
                    held_equity=equity,
                    periods_per_year=periods[n],
                    warning="",
                )
                (job.folder / f"{key}.job").write_bytes(record.encode())

        monkeypatch.setattr("barcast.backtest.sweep.work", work)
        settings = {"strategies": STRATEGIES[:1], "models": ["hs"], "folds": 2, "by": "calmar"}
        path = swept(bars, tmp_path / "-".join(map(str, periods)), **settings).path
        return path.select("strategy", "before")

    plain = chosen(365, 365)
    assert_frame_equal(chosen(365, 300), plain, check_exact=True)
    assert chosen(300, 300)["strategy"][0] != plain["strategy"][0]  # the control


def test_cell_is_chosen_only_after_the_search_has_asked_for_it(bars, side, tmp_path):
    """A search asks in equal parts after each fold but the last, the same cells each time."""
    settings = {"strategies": [f"{side}:side=-1.0..1.0"], "models": ["hs"], "trials": 9, "by": "total_return"}
    falling = turned(tmp_path, 0, -0.003)
    one = swept(falling, tmp_path / "one", **settings)
    other = swept(falling, tmp_path / "other", **settings, jobs=2)
    assert one.meta["checksum"] == other.meta["checksum"]
    assert one.cells.equals(other.cells)
    known = dict(one.cells.select("strategy", "known").rows())
    assert sorted(known.values()) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(known[row["strategy"]] < row["fold"] for row in one.path.iter_rows(named=True))
    first = one.folds.filter(fold=1).sort("total_return")["strategy"][-1]
    assert known[first] > 1  # the control: it would have been chosen for fold 2


def cells_of(*texts, models=("hs",)):
    """The cells of a grid."""
    return grid(variants(models, (), (), "1h"), [Template.parse(text) for text in texts])


def test_every_combination_of_a_grid_is_a_cell_once():
    """Alternatives are multiplied; what is the same strategy by its defaults is the same cell."""
    found = cells_of("quantile-band:band=0.05|0.1|0.2,horizon=1|4", "quantile-band:horizon=4")
    assert [cell.said for cell in found] == [
        *(f"quantile-band band={band} horizon={h}" for band in (0.05, 0.1, 0.2) for h in (1, 4))
    ]
    assert len({cell.strategy.name for cell in found}) == 6
    assert len(cells_of("rank", "vol-target", models=MODELS)) == 4


def test_samplers_and_steps_are_of_models_that_are_sampled(monkeypatch):
    """A model that is not sampled is there once, the others with each sampler and number of steps."""
    [plain] = variants(["hs"], (), (), "1h")

    def opened(name, timeframe, sampler, steps):
        card = replace(plain.card, sampler="none" if name == "hs" else sampler or "dpmpp")
        return SimpleNamespace(card=card)

    monkeypatch.setattr("barcast.backtest.grid.open_model", opened)
    found = variants(["hs", "net", "hs"], ("ddim", "angle", "ddim"), (2, 4), "1h")
    assert [(v.model, v.sampler, v.steps) for v in found] == [
        ("hs", None, None),
        *(("net", sampler, steps) for sampler in ("ddim", "angle") for steps in (2, 4)),
    ]
    assert [(v.model, v.sampler) for v in variants(["net"], (), (), "1h")] == [("net", None)]


def test_folds_begin_where_every_model_forecasts(bars, tmp_path):
    """Without a beginning, the time is cut from the first bar after which all models have enough."""
    need = max(v.card.min_window for v in variants(MODELS, (), (), "1h"))
    result = swept(bars, tmp_path, since=None, strategies=["vol-target"], folds=2)
    start, end = (result.folds[name].to_physical() for name in ("since", "until"))
    times = pl.read_parquet(bars)["ts"].unique().sort().to_physical()
    assert (start.min(), end.max()) == (times[need - 1], times[-1] + 1)
    assert result.folds.filter(fold=1)["periods"].n_unique() == 1


def test_strategy_of_a_file_is_the_same_cell_wherever_it_is(tmp_path):
    """Its digest and its parameters identify it, not its path."""
    ids = []
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(SIDE)
        ids += [cell.strategy_id for cell in cells_of(f"{tmp_path / name}:side=0.5")]
    (tmp_path / "c.py").write_text(SIDE + "# another\n")
    assert ids[0] == ids[1] != cells_of(f"{tmp_path / 'c.py'}:side=0.5")[0].strategy_id


def test_search_stays_in_its_ranges():
    """Numbers are within, whole where the parameter is, and found near what was worth most."""
    text = "quantile-band:band=0.01..0.5,costs=0|2"
    search = Search(variants(["hs"], (), (), "1h"), [Template.parse(text), Template.parse("rank:least=2..5")])
    worth, seen = {}, []
    for _ in range(6):
        new = search.ask(10, 1, worth)
        seen += new
        for cell in new:
            band = cell.strategy.params.get("band")
            worth[cell.id] = None if band is None else -abs(band - 0.3)
    bands = [cell.strategy.params["band"] for cell in seen if "band" in cell.strategy.params]
    least = [cell.strategy.params["least"] for cell in seen if "least" in cell.strategy.params]
    assert all(0.01 <= band <= 0.5 for band in bands)
    assert set(least) <= {2, 3, 4, 5}
    assert all(isinstance(n, int) for n in least)
    assert len({cell.id for cell in seen}) == len(seen)
    assert np.median(np.abs(np.array(bands[-20:]) - 0.3)) < 0.05


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategies": ["quantile-band:bnd=0.1|0.2"]}, "has no parameter 'bnd': did you mean band"),
        ({"strategies": ["quantile-band:band=0.1|2"]}, "parameter band is 2, not a number from 0 to 1"),
        ({"strategies": ["quantile-band:band=0.1|"]}, "parameter band is '', not a number"),
        ({"strategies": ["quantile-band:horizon=1|3"]}, "wants horizon 3, but the model forecasts"),
        ({"strategies": ["quantile-band:name=x"]}, "names its cells itself"),
        ({"strategies": ["nothing"]}, "strategy kind 'nothing' is unknown"),
        ({"strategies": ["quantile-band:band=0.1..0.2"]}, "band has a range, which only a search can try"),
        ({"trials": 2}, "trials = 2: take 3 or more"),
        ({"trials": 3}, "--trials searches ranges: give one"),
        ({"strategies": ["quantile-band:band=0.3..0.1"], "trials": 3}, "band from 0.3 to 0.1 is no range"),
        ({"strategies": ["quantile-band:band=0.5..1.5"], "trials": 3}, "parameter band is 1.5, not"),
        (
            {"strategies": ["quantile-band:band=0.5..0.95"], "trials": 3},
            "needs the level 0.025, but the model",
        ),
        ({"strategies": ["rank:share=0.1..0.3,horizon=1|3"], "trials": 3}, "wants horizon 3, but the model"),
        ({"samplers": ["ddim"]}, "hs is not sampled"),
        ({"steps": [4]}, "hs is not sampled"),
        ({"folds": 1}, "folds = 1: take 2 or more"),
        ({"by": "luck"}, "by = 'luck': take one of sharpe"),
        ({"backend": "threads"}, "backend = 'threads': take one of loky, ray, dask"),
        ({"jobs": 0}, "jobs = 0: take 1 or more"),
        ({"address": "tcp://x:1"}, "loky has no cluster"),
        ({"since": "2030-01-01"}, "give an earlier one"),
    ],
)
def test_sweep_that_cannot_be_is_refused_before_the_work(bars, tmp_path, changes, said):
    """One sentence names what is wrong, and nothing has been computed."""
    with pytest.raises(BarcastError) as caught:
        swept(bars, tmp_path / "out", **changes)
    assert said in str(caught.value)
    assert not [*tmp_path.glob("out/jobs/*.job")]


@pytest.mark.parametrize(
    ("package", "changes", "extra"),
    [
        ("ray", {"backend": "ray"}, "cluster"),
        ("distributed", {"backend": "dask"}, "cluster"),
        ("optuna", {"trials": 3, "strategies": ["rank:share=0.1..0.3"]}, "sweep"),
    ],
)
def test_package_that_is_missing_is_named_with_its_extra(
    bars, tmp_path, monkeypatch, package, changes, extra
):
    """What is not installed ends in the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'barcast\[{extra}\]'"):
        swept(bars, tmp_path, **changes)


def test_worker_that_finds_other_files_or_another_fingerprint_writes_nothing(bars, tmp_path, monkeypatch):
    """Files that changed since the sweep began, and a machine with other bits, are refused by name."""
    with monkeypatch.context() as patch:
        patch.setattr("barcast.backtest.sweep.digest", lambda paths: "0" * 64)
        with pytest.raises(DataError, match=r"fold 1 of 4, .*, model fhs: the files have changed"):
            swept(bars, tmp_path)
    [own] = variants(["hs"], (), (), "1h")
    with monkeypatch.context() as patch:
        other = replace(own, card=replace(own.card, fingerprint="another"))
        patch.setattr("barcast.backtest.sweep.variants", lambda *asked: [other])
        with pytest.raises(ConfigError, match=r"a worker computes under the fingerprint 'numpy=.*'another'"):
            swept(bars, tmp_path)
    assert jobs(tmp_path) == {}


@pytest.mark.parametrize("count", [1, 2])
def test_fault_in_a_fold_names_fold_and_model(bars, tmp_path, count):
    """A strategy that raises ends the sweep in one sentence, from whatever process it was raised in."""
    last = to_ns(pl.read_parquet(bars)["ts"].max()) - 24 * 3_600_000_000_000
    (tmp_path / "bad.py").write_text(SIDE.replace("self.side)", f"self.side / (close_time < {last}))"))
    with pytest.raises(ConfigError) as caught:
        swept(bars, tmp_path / "out", strategies=[f"{tmp_path / 'bad.py'}"], models=["hs"], jobs=count)
    said = str(caught.value)
    assert re.match(r"fold [1-4] of 4, 2024-01-\d\d to 2024-\d\d-\d\d, model hs: strategy Side, ", said)
    assert "ZeroDivisionError" in said
    assert "\n" not in said


def test_fault_of_a_cell_names_its_parameters(bars, tmp_path):
    """Not the digest that its name is made of, neither on trial nor in a fold."""
    late = "self.side * (close_time > 1_706_000_000 * 10**9)"
    for at, target in (("asked on trial", "self.side"), ("close ", late)):
        (tmp_path / "bad.py").write_text(SIDE.replace("self.side)", f"{target})"))
        with pytest.raises(ConfigError, match=rf"strategy Side side=1\.5, {at}"):
            swept(bars, tmp_path / "out", strategies=[f"{tmp_path / 'bad.py'}:side=0.5|1.5"], models=["hs"])


def test_sweep_without_the_cell_that_failed_goes_on(bars, tmp_path):
    """The error says what is kept: a sweep of the others computes only what was not found until then."""
    late = "self.side * (close_time > 1_706_000_000 * 10**9))"
    (tmp_path / "bad.py").write_text(SIDE.replace("self.side)", late))
    given = {"models": ["hs"], "folds": 4, "jobs": 1}
    with pytest.raises(ConfigError, match=r"What was found until then is in .*jobs: a sweep without"):
        swept(bars, tmp_path / "out", strategies=["rank", f"{tmp_path / 'bad.py'}:side=1.5"], **given)
    assert 0 < swept(bars, tmp_path / "out", strategies=["rank"], **given).ran < 4


def test_one_of_something_needs_no_list(bars, whole, tmp_path):
    """A text is one strategy, model or symbol, not as many as it has letters."""
    options = {"stamp": "close", "folds": 2, "jobs": 1}
    result = sweep(bars, out=tmp_path, strategies="rank", models="hs", symbols="SYM0", **options)
    assert result.cells["strategy"].len() == 1
    one, several = (
        run_backtest(bars, stamp="close", model="hs", since="2024-01-20", baselines=False, **given)
        for given in (
            {"strategies": "rank", "symbols": "SYM0", "cache": tmp_path / "kept"},
            {"strategies": ["rank"], "symbols": ["SYM0"]},
        )
    )
    assert one.meta == several.meta
    assert [*(tmp_path / "kept").rglob("*.parquet")]


def test_command_says_what_would_have_been_chosen(run, bars, tmp_path, monkeypatch):
    """The command prints cells, choices, trials and checksum, and writes them; a fault exits with 78."""
    for name in ONE_THREAD:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # and put back what the command changes
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")
    given = [str(bars), "--stamp", "close", "--model", "hs", "--jobs", "1", "--folds", "3"]
    status, out, err = run("sweep", *given, "--strategy", STRATEGIES[0], "--out", str(tmp_path / "out"))
    assert status == 0, err
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert told["meta"]["checksum"] in out
    assert "2 trials in this folder; 6 of 6 backtests of a cell and fold were run" in " ".join(out.split())
    assert "volatility=0.01" in out
    assert "walk-forward, folds 2 to 3: return" in out
    assert [row["fold"] for row in told["path"]] == [2, 3]
    assert pl.read_parquet(tmp_path / "out" / "cells.parquet").height == len(told["cells"]) == 2
    status, _, err = run(
        "sweep", *given, "--strategy", "vol-target:volatility=1|no", "--out", str(tmp_path / "b")
    )
    assert (status, "parameter volatility is 'no'" in " ".join(err.split())) == (78, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "book.txt").write_text("mine")
    status, _, err = run("sweep", *given, "--out", str(tmp_path / "mine"))
    assert (status, "holds book.txt" in " ".join(err.replace("│", " ").split())) == (2, True)


def test_cells_of_a_file_share_nothing(bars, tmp_path):
    """A cell has the same bytes alone and beside others, whatever the module of its file keeps."""
    (tmp_path / "counts.py").write_text(COUNTS)
    mine = f"{tmp_path / 'counts.py'}:Counts"
    grounds = {"models": ["hs"], "folds": 2, "since": "2024-01-20"}
    swept(bars, tmp_path / "both", strategies=[f"{mine}:every=3|7"], **grounds)
    together = jobs(tmp_path / "both")
    assert len(together) == 4
    for every in (3, 7):
        swept(bars, tmp_path / f"{every}", strategies=[f"{mine}:every={every}"], **grounds)
        alone = jobs(tmp_path / f"{every}")
        assert len(alone) == 2
        assert alone.items() <= together.items()
