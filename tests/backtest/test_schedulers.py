"""`barcast schedulers`: the samplers of a diffusion model, and the choice among them."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from barcast.backtest import schedulers
from barcast.backtest.cli import quants
from barcast.backtest.sample import sample_bars
from barcast.backtest.schedulers import TIMED, Score, Trial, _halves, choose, compare
from barcast.daemon.calendar import Calendars, iso
from barcast.daemon.history import read_windows, scan
from barcast.daemon.timeframe import Timeframe
from barcast.models import LEVELS, SAMPLERS, ConfigError, DataError, Window, checkpoint, training
from barcast.models.checkpoint import Checkpoint, load, save
from barcast.models.evaluation import Forecasts
from barcast.models.paths import with_paths
from barcast.models.scores import Estimate

SESSION = Timeframe.parse("session")
DAY = 86_400 * 10**9
SAMPLE = str(sample_bars())
DAILY = ["--stamp", "close", "--timeframe", "session", "--calendar", "XNYS"]
FEW = ["--symbol", "IBM", "--origins", "10"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def histories() -> list[Window]:
    bars = read_windows(scan([sample_bars()], "close", Calendars("XNYS", SESSION)))
    return [bars["IBM"], bars["MSFT"]]


@pytest.fixture(scope="module")
def plain(histories, tmp_path_factory, few_looks) -> Path:
    """A model of the bars before 2010 that has hardly learnt anything, as if no denoiser had been kept."""
    torch.set_num_threads(1)
    end = np.datetime64("2010-01-01", "ns").astype(np.int64)
    older = [
        Window(w.symbol, w.close_times[k], w.values[k]) for w in histories for k in [w.close_times < end]
    ]
    trained = training.train(older, timeframe="session", horizons=(1, 5), levels=LEVELS, steps=12)
    with torch.no_grad():
        trained.net.denoiser.leave.weight.zero_()
        trained.net.denoiser.leave.bias.zero_()
    path = tmp_path_factory.mktemp("plain") / "model"
    save(replace(trained, record=replace(trained.record, denoiser_step=0)), path)
    return path


@pytest.fixture(scope="module")
def wild(plain, tmp_path_factory) -> Path:
    """The same with a denoiser that says something, as if training had found that it adds."""
    trained = load(plain).trained
    with torch.no_grad():
        trained.net.denoiser.leave.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    path = tmp_path_factory.mktemp("wild") / "model"
    save(replace(trained, record=replace(trained.record, denoiser_step=1)), path)
    return path


@pytest.fixture(scope="module")
def found(wild, histories):
    """Two numbers of steps, with a clock that goes on by a millisecond each time it is asked."""
    ticks = count()
    return compare(wild, histories, SESSION, steps=(2, 12), origins=16, clock=lambda: next(ticks) / 1e3)


def test_every_sampler_is_tried_with_the_steps_that_it_takes(found):
    """Each sampler and number of steps is a row, less those that a sampler does not take."""
    tried = [(t.sampler, t.steps) for t in found.trials]
    assert tried == [(s, n) for s, least in SAMPLERS.items() for n in (2, 12) if n >= least]
    evaluations = {(t.sampler, t.steps): t.evaluations for t in found.trials}
    assert evaluations["kdpm2", 12] == 23
    assert all(n == key[1] for key, n in evaluations.items() if key[0] != "kdpm2")
    assert [t.cpu_ms for t in found.trials] == pytest.approx([1.0] * len(tried))


def test_more_steps_are_nearer_the_reference(found):
    """What a good solver makes in 12 steps scores as 100 steps of the reference do, and in 2 it does not."""
    by = {(t.sampler, t.steps): t for t in found.trials}

    def off(sampler, steps):
        scores = (by[sampler, steps].energy, by[sampler, steps].crps)
        return [abs(estimate.value) for score in scores for estimate in score[1:]]

    for sampler in ("dpmpp", "unipc", "dpmpp3"):
        assert max(off(sampler, 12)) < 0.5
    assert sum(off("dpmpp", 2)) > 3 * sum(off("dpmpp", 12))
    assert all(t.energy.validation.error > 0 for t in found.trials)


def test_scores_are_those_of_the_forecasts(wild, histories, found):
    """The mean energy score is that of the moves of the paths that are forecast, over their deviation."""
    trained = load(wild).trained
    forecaster = trained.raw("any", "dpmpp", 12, paths=True)
    reference = trained.raw("any", "dpmpp3", 100, paths=True)
    cut = int(np.datetime64(found.meta["cut"][:-1], "ns").astype(np.int64))
    since = int(np.datetime64(found.meta["since"][:-1], "ns").astype(np.int64))
    scores = []
    for w in histories:
        log_price = np.log(w.values[:, 3])
        for k in np.flatnonzero((w.close_times >= since) & (w.close_times < cut)):
            if (w.close_times[k] // DAY - 1) % found.meta["stride"] or w.close_times[k + 5] >= cut:
                continue
            at = [Window(w.symbol, w.close_times[: k + 1], w.values[: k + 1])]
            [f], [r] = (with_paths(x, at, x.forecast(at)) for x in (forecaster, reference))
            x = np.diff(f.paths.returns, axis=1, prepend=0)
            y = np.diff(log_price[k : k + 6])
            miss = np.linalg.norm(x - y, axis=1).mean()
            apart = np.linalg.norm(x[:, None] - x, axis=2).sum() / (len(x) * (len(x) - 1))
            scores.append((miss - apart / 2) / r.paths.returns[:, -1].std())
    [trial] = [t for t in found.trials if (t.sampler, t.steps) == ("dpmpp", 12)]
    assert len(scores) == found.meta["origins"]["validation"]
    assert trial.energy.mean == pytest.approx(np.mean(scores), rel=1e-9)


def test_origins_are_new_to_the_model_and_the_halves_apart(wild, histories, found):
    """They begin where the model has not learnt from; what chooses has come true before the other half."""
    learnt = np.datetime64(load(wild).trained.record.validation_end, "ns")
    meta = found.meta
    assert np.datetime64(meta["since"][:-1]) >= learnt
    assert meta["since"] < meta["cut"] < meta["until"]
    assert meta["symbols"] == ["IBM", "MSFT"]
    assert 5 < meta["origins"]["validation"] <= meta["origins"]["confirmation"] < 11
    [ibm, _] = histories
    every = Forecasts(np.zeros((100, 1)), [], ("IBM",) * 100, ibm.close_times[1000:1100])
    older, newer, cut = _halves(every, np.arange(100) != 7, {"IBM": ibm}, 20)
    assert (older.sum(), newer.sum(), cut) == (29, 50, ibm.close_times[1050])
    assert older[8:30].all()
    assert newer[50:].all()


def test_the_newer_half_chooses_nothing(wild, histories, found, monkeypatch):
    """Other prices in the newer half change what confirms, and neither validation nor choice."""
    cut = int(np.datetime64(found.meta["cut"][:-1], "ns").astype(np.int64))
    rng = np.random.default_rng(3)
    changed = []
    for w in histories:
        values = w.values.copy()
        new = w.close_times >= cut
        values[new, :4] *= np.exp(np.cumsum(0.02 * rng.standard_normal(int(new.sum()))))[:, None]
        changed.append(Window(w.symbol, w.close_times, values))
    monkeypatch.setattr(schedulers, "SAMPLERS", {"ddpm": 2, "dpmpp": 2})
    other = compare(wild, changed, SESSION, steps=(2, 12), origins=16, clock=lambda: 0.0)
    same = [trial for trial in found.trials if trial.sampler in ("ddpm", "dpmpp")]
    assert other.chosen.steps == choose(same).steps
    for a, b in zip(other.trials, same, strict=True):
        assert (a.energy[:2], a.crps[:2]) == (b.energy[:2], b.crps[:2])
        assert a.energy.confirmation != b.energy.confirmation


def test_the_cheapest_of_the_good_is_chosen():
    """Fewest evaluations within 0.05 % in both scores; of as many the nearest; no luck, by the older half."""

    def trial(sampler, evaluations, energy, crps=0.0, confirmation=0.0):
        scores = (Score(1.0, Estimate(x, 0.1), Estimate(confirmation, 0.1)) for x in (energy, crps))
        return Trial(sampler, evaluations, evaluations, 1.0, *scores)

    near, far, lucky = trial("b", 4, 0.049), trial("c", 2, 0.051, confirmation=-9.0), trial("a", 20, -0.3)
    assert choose([lucky, near, far]) is near
    assert choose([lucky, trial("d", 4, 0.03), near]).sampler == "d"
    assert choose([lucky, trial("e", 2, 0.0, crps=1.0)]) is lucky
    exact = trial("g", 8, 0.0)
    assert choose([trial("h", 1, -5.0, crps=-7.0), exact]) is exact
    assert choose([trial("h", 8, -0.03), exact]) is exact
    assert choose([trial("f", 4, 0.9), far, trial("e", 2, 0.0, crps=1.0)]) is far


def test_a_model_whose_denoiser_is_off_is_not_compared(run, plain, tmp_path, monkeypatch):
    """The command says so at once: it reads no bars, writes no numbers and names nothing to configure."""
    path = tmp_path / "numbers.json"
    monkeypatch.setattr(quants, "histories_of", None)
    status, out, err = run("schedulers", str(plain), SAMPLE, *DAILY, "--json", str(path))
    assert status == 0, err
    said = " ".join(out.split())
    assert "the diffusion adds nothing to this model" in said
    assert "nothing to compare" in said
    assert "sampler =" not in out
    assert not path.exists()


def test_command_prints_what_to_configure(run, wild, tmp_path):
    """The choice as lines of a configuration, what they change, and all numbers in a file."""
    path = tmp_path / "numbers.json"
    status, out, err = run("schedulers", str(wild), SAMPLE, *DAILY, *FEW, "--steps", "3", "--json", str(path))
    assert status == 0, err
    assert 'sampler = "' in out
    assert "steps = 3\nWith these lines the quantiles are sampled, too" in out
    numbers = json.loads(path.read_text())
    assert {t["sampler"] for t in numbers["trials"]} == set(SAMPLERS)
    assert numbers["chosen"]["steps"] == 3
    assert all(t["cpu_ms"] > 0 for t in numbers["trials"])
    first = numbers["trials"][0]
    assert set(numbers["definitions"]) <= set(first) | set(first["energy"])
    assert str(TIMED) in numbers["definitions"]["cpu_ms"]


def test_the_table_has_a_row_for_each_trial(found, capsys):
    """In order, and the lines for a configuration below, with what they change."""
    quants._print_schedulers(found)
    out = capsys.readouterr().out
    rows = [line.split()[:2] for line in out.splitlines() if line.split()[:1] and line.split()[0] in SAMPLERS]
    assert rows == [[t.sampler, str(t.steps)] for t in found.trials]
    lines = f'sampler = "{found.chosen.sampler}"\nsteps = {found.chosen.steps}\n'
    sentence = "With these lines the quantiles are sampled, too; without them they are those of the map.\n"
    assert out.endswith(lines + sentence)


def test_what_cannot_be_compared_is_said(run, plain, wild, histories, tmp_path, monkeypatch):
    """A model that is not sampled, other bars and bars that it has learnt from end in one sentence."""
    status, _, err = run("schedulers", str(plain), SAMPLE, *DAILY, "--steps", "0")
    assert status == 2
    status, _, err = run("schedulers", "fhs", SAMPLE, *DAILY)
    assert status == 78
    assert err == run("models", "describe", "fhs")[2]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda _: Checkpoint("id", object()))
        with pytest.raises(ConfigError, match="trees is not sampled by itself: name an SSSD or LDM4TS"):
            compare(tmp_path / "trees", histories, SESSION, clock=lambda: 0.0)
    with pytest.raises(ConfigError, match="trained on 'session' bars, not on '1h'"):
        compare(wild, histories, Timeframe.parse("1h"), clock=lambda: 0.0)
    status, _, err = run("schedulers", str(wild), SAMPLE, *DAILY, "--until", "2009-01-01")
    assert status == 78
    until = iso(load(wild).trained.record.validation_end)
    assert f"has learnt, and was validated, until {until}, and the bars end at 2008-12-31" in err
    end = int(np.searchsorted(histories[0].close_times, load(wild).trained.record.validation_end)) + 12
    short = [Window(w.symbol, w.close_times[:end], w.values[:end]) for w in histories]
    with pytest.raises(DataError, match="too few to choose by one half of them"):
        compare(wild, short, SESSION, steps=(3,), clock=lambda: 0.0)


def test_numbers_go_to_a_file_that_can_be_written(run, plain, tmp_path):
    """A file that is read is not written over, before anything is forecast."""
    bars = tmp_path / "bars.parquet"
    pl.read_parquet(SAMPLE).write_parquet(bars)
    status, _, err = run("schedulers", str(plain), str(bars), *DAILY, "--json", str(bars))
    assert (status, "in use by this" in " ".join(err.replace("│", " ").split())) == (2, True)
