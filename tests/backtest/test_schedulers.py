"""`barcast schedulers`: the samplers of a diffusion model, and the choice among them."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.backtest.schedulers import TIMED, Trial, _halves, choose, compare
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import read_windows, scan
from barcast.daemon.timeframe import Timeframe
from barcast.models import SAMPLERS, ConfigError, DataError, Window, gbm
from barcast.models.checkpoint import load, save
from barcast.models.evaluation import Forecasts
from barcast.models.scores import Estimate

SESSION = Timeframe.parse("session")
SAMPLE, MODEL = str(sample_bars()), str(sample_checkpoint())
DAILY = ["--stamp", "close", "--timeframe", "session", "--calendar", "XNYS"]
FEW = ["--symbol", "IBM", "--origins", "24"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def histories() -> list[Window]:
    bars = read_windows(scan([sample_bars()], "close", Calendars("XNYS", SESSION)))
    return [bars["IBM"], bars["MSFT"]]


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> Path:
    """The shipped model with a denoiser that says something, as if training had found that it adds."""
    trained = load(sample_checkpoint()).trained
    with torch.no_grad():
        trained.net.denoiser.leave.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    path = tmp_path_factory.mktemp("wild") / "model"
    save(replace(trained, record=replace(trained.record, denoiser_step=1)), path)
    return path


@pytest.fixture(scope="module")
def found(wild, histories):
    """Two numbers of steps, with a clock that goes on by a millisecond each time it is asked."""
    ticks = count()
    return compare(wild, histories, SESSION, steps=(2, 12), origins=24, clock=lambda: next(ticks) / 1e3)


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
    for sampler in ("dpmpp", "unipc", "dpmpp3", "deis"):
        assert abs(by[sampler, 12].validation.value) < 0.3
        assert abs(by[sampler, 12].confirmation.value) < 0.3
    assert abs(by["dpmpp", 2].validation.value) > 5 * abs(by["dpmpp", 12].validation.value)
    assert all(t.validation.error > 0 for t in found.trials)
    assert found.adds


def test_origins_are_new_to_the_model_and_the_halves_apart(wild, histories, found):
    """They begin where the model has not learnt from; what chooses has come true before the other half."""
    learnt = np.datetime64(load(wild).trained.record.validation_end, "ns")
    meta = found.meta
    assert np.datetime64(meta["since"][:-1]) >= learnt
    assert meta["since"] < meta["cut"] < meta["until"]
    assert meta["symbols"] == ["IBM", "MSFT"]
    assert 8 < meta["origins"]["validation"] <= meta["origins"]["confirmation"] < 16
    [ibm, _] = histories
    every = Forecasts(np.zeros((100, 1)), [], ("IBM",) * 100, ibm.close_times[1000:1100])
    older, newer, cut = _halves(every, {"IBM": ibm}, 20)
    assert (older.sum(), newer.sum(), cut) == (30, 50, ibm.close_times[1050])
    assert older[:30].all()
    assert newer[50:].all()


def test_the_newer_half_chooses_nothing(wild, histories, found):
    """Other prices in the newer half change what confirms, and neither validation nor choice."""
    cut = int(np.datetime64(found.meta["cut"][:-1], "ns").astype(np.int64))
    rng = np.random.default_rng(3)
    changed = []
    for w in histories:
        values = w.values.copy()
        new = w.close_times >= cut
        values[new, :4] *= np.exp(np.cumsum(0.02 * rng.standard_normal(int(new.sum()))))[:, None]
        changed.append(Window(w.symbol, w.close_times, values))
    other = compare(wild, changed, SESSION, steps=(2, 12), origins=24, clock=lambda: 0.0)
    assert replace(other.chosen, confirmation=None, cpu_ms=1.0) == replace(
        found.chosen, confirmation=None, cpu_ms=1.0
    )
    for a, b in zip(other.trials, found.trials, strict=True):
        assert (a.crps, a.validation) == (b.crps, b.validation)
    assert [t.confirmation for t in other.trials] != [t.confirmation for t in found.trials]


def test_the_cheapest_of_the_good_is_chosen():
    """Fewest evaluations within 0.05 % of the best; among as many the best; the newer half has no say."""

    def trial(sampler, evaluations, crps, confirmation=0.0):
        nothing = Estimate(0.0, 0.0)
        return Trial(sampler, evaluations, evaluations, 1.0, crps, nothing, Estimate(confirmation, 0.1))

    best, near, too_far = trial("a", 20, 1.0), trial("b", 4, 1.00049), trial("c", 2, 1.00051, -9.0)
    assert choose([best, near, too_far]) is near
    assert choose([best, trial("d", 4, 1.0004), near]).sampler == "d"


def test_command_prints_what_to_configure_and_says_that_it_does_not_matter(run, tmp_path):
    """The shipped model's training kept no denoiser: all samplers are one, and the command says so."""
    path = tmp_path / "numbers.json"
    status, out, err = run("schedulers", MODEL, SAMPLE, *DAILY, *FEW, "--steps", "3", "--json", str(path))
    assert status == 0, err
    said = " ".join(out.split())
    assert "the diffusion adds nothing to this model" in said
    assert 'sampler = "' in out
    assert "steps = 3" in out
    numbers = json.loads(path.read_text())
    assert {t["sampler"] for t in numbers["trials"]} == set(SAMPLERS)
    assert all(abs(t["validation"]["value"]) < 1e-3 for t in numbers["trials"])
    assert all(t["cpu_ms"] > 0 for t in numbers["trials"])
    assert numbers["adds"] is False
    assert set(numbers["definitions"]) <= set(numbers["trials"][0])
    assert str(TIMED) in numbers["definitions"]["cpu_ms"]


def test_a_model_whose_denoiser_adds_is_not_belittled(run, wild):
    """With a denoiser that adds, the line is not there, and the table has a row for each trial."""
    status, out, err = run("schedulers", str(wild), SAMPLE, *DAILY, *FEW, "--steps", "2", "--steps", "4")
    assert status == 0, err
    assert "adds nothing" not in " ".join(out.split())
    rows = [line.split()[:2] for line in out.splitlines() if line.split()[:1] and line.split()[0] in SAMPLERS]
    assert rows == [[s, str(n)] for s, least in SAMPLERS.items() for n in (2, 4) if n >= least]


def test_what_cannot_be_compared_is_said(run, wild, histories, tmp_path):
    """A model that is not sampled, other bars and bars that it has learnt from end in one sentence."""
    status, _, err = run("schedulers", MODEL, SAMPLE, *DAILY, "--steps", "1")
    assert status == 2
    status, _, err = run("schedulers", "fhs", SAMPLE, *DAILY)
    assert (status, "fhs" in err) == (78, True)
    trees = gbm.train(histories[:1], timeframe="session", horizons=(1,), levels=(0.1, 0.9), until=None)
    save(trees, tmp_path / "trees")
    with pytest.raises(ConfigError, match="trees is not sampled by itself: name an SSSD model"):
        compare(tmp_path / "trees", histories, SESSION, clock=lambda: 0.0)
    with pytest.raises(ConfigError, match="trained on 'session' bars, not on '1h'"):
        compare(wild, histories, Timeframe.parse("1h"), clock=lambda: 0.0)
    status, _, err = run("schedulers", MODEL, SAMPLE, *DAILY, "--until", "2009-01-01")
    assert (status, "give more bars or a longer time" in " ".join(err.split())) == (78, True)
    end = int(np.searchsorted(histories[0].close_times, load(wild).trained.record.validation_end)) + 30
    short = [Window(w.symbol, w.close_times[:end], w.values[:end]) for w in histories]
    with pytest.raises(DataError, match="too few to choose by one half of them"):
        compare(wild, short, SESSION, steps=(3,), clock=lambda: 0.0)


def test_numbers_go_to_a_file_that_can_be_written(run, tmp_path):
    """A file that is read is not written over, before anything is forecast."""
    bars = tmp_path / "bars.parquet"
    pl.read_parquet(SAMPLE).write_parquet(bars)
    status, _, err = run("schedulers", MODEL, str(bars), *DAILY, "--json", str(bars))
    assert (status, "in use by this" in " ".join(err.replace("│", " ").split())) == (2, True)
