"""Bugs planted into the real code: the check that guards the promise fails, and passes without the bug."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from barcast.backtest.sample import sample_checkpoint
from barcast.daemon.journal import Journal
from barcast.daemon.live import LiveSource
from barcast.daemon.pipeline import run
from barcast.models import Forecaster, Window, paths, samplers
from barcast.models.checkpoint import load, open_forecaster
from barcast.models.diffusion import Distribution, SSSDForecaster
from barcast.models.ldm4ts import training as latent
from barcast.models.ldm4ts import vision
from barcast.models.ldm4ts.forecaster import Sampling
from barcast.models.ldm4ts.network import LDM4TS
from barcast.models.scaling import Scaling
from barcast.models.trained import Trained
from tests import checks
from tests.daemon.test_machine import DaemonMachine
from tests.fakes import Spread
from tests.garch import simulate
from tests.models import test_ldm4ts, test_paths, test_vision
from tests.planting import plant
from tests.rim import SECOND

DAY = 86_400 * SECOND


def crash_at_any_commit(folder: Path) -> None:
    """See there, for eight messages at a time."""
    checks.crash_at_any_commit_changes_no_message(folder, together=8, late=0, again=False)


def busy_loop(_folder: Path) -> None:
    """See there, for as many runs as the tests have."""
    checks.busy_loop_says_what_its_replay_says(range(25))


def batch_of_the_fake(_folder: Path) -> None:
    """Batches of the forecaster that the tests of the path use."""
    checks.forecast_does_not_depend_on_its_batch(Spread(), some_windows(), (1, 2, 5))


def batch_of_dpmpp(_folder: Path) -> None:
    """Batches of the shipped model by its own sampler."""
    forecaster = open_forecaster(sample_checkpoint(), "dpmpp")
    checks.forecast_does_not_depend_on_its_batch(forecaster, some_windows(), (1, 2, 5))


def batch_of_ddim(_folder: Path) -> None:
    """Batches of the shipped model by the other sampler."""
    forecaster = open_forecaster(sample_checkpoint(), "ddim")
    checks.forecast_does_not_depend_on_its_batch(forecaster, some_windows(), (1, 2, 5))


def batch_of_paths(_folder: Path) -> None:
    """Batches of paths, of windows of one array and others."""
    windows = [*test_paths.consecutive(*NEAR), *some_windows()]
    test_paths.paths_are_those_of_each_window_alone(with_denoiser(), windows)


def look_ahead_of_paths(_folder: Path) -> None:
    """Paths with other bars behind each of some windows of one array."""
    test_paths.paths_know_no_later_bar(with_denoiser(), *NEAR)


def horizons_of_paths(_folder: Path) -> None:
    """What is read from the shipped model's paths at its horizons."""
    forecaster = open_forecaster(sample_checkpoint(), paths=True)
    test_paths.paths_are_the_forecast_at_its_horizons(forecaster, some_windows())


def with_denoiser() -> Forecaster:
    """The shipped model with paths in four steps of a denoiser that has been made to matter."""
    trained = load(sample_checkpoint()).trained
    assert isinstance(trained, Trained)
    torch.nn.init.normal_(trained.net.denoiser.leave.weight, 0, 0.05, torch.Generator().manual_seed(5))
    return trained.forecaster("x", None, 4, paths=True)


def batch_of_latents(_folder: Path) -> None:
    """Batches of the shipped LDM4TS, in one call of its U-Net."""
    forecaster = open_forecaster(sample_checkpoint("ldm4ts"), "angle", 1)
    checks.forecast_does_not_depend_on_its_batch(forecaster, some_windows()[:3], (1, 3))


def image_of_a_row(_folder: Path) -> None:
    """Images of an LDM4TS, of which each has a period of its own."""
    test_ldm4ts.an_image_is_that_of_its_row()


def right_of_an_image(_folder: Path) -> None:
    """What images of an LDM4TS show of what is to come."""
    test_vision.test_nothing_on_the_left_depends_on_what_is_to_come(64)


def what_the_unet_is_told(_folder: Path) -> None:
    """What an LDM4TS's U-Net makes of tokens and of the image of what was."""
    test_ldm4ts.what_is_told_matters()


def future_in_training(_folder: Path) -> None:
    """What an LDM4TS's U-Net sees of a bar in training, and when it serves."""
    test_ldm4ts.training_sees_what_serving_sees([simulate("S", 2200, seed=7).window])


NEAR = simulate("NEAR", 1310, seed=9, step=DAY).window, (1302, 1304, 1310)
"""Bars of one array, and the rows with which windows end that share the work of them."""


def some_windows() -> list[Window]:
    """Windows of six symbols."""
    return [simulate(f"S{n}", 400 + n, seed=n, step=DAY).window for n in range(6)]


@dataclass(frozen=True)
class Bug:
    """A function of the program, what to put in the place of which of its words, and the check for it."""

    where: Callable[..., Any]
    words: dict[str, str]
    check: checks.Check


COMMITS = "numbers = self._scribe(self._scribe.journal.append, records, outgoing)"
ACKNOWLEDGES = "self._link.ack(deliveries)"
ENQUEUES = "_enqueue(db, outgoing)"
DECIDES = "self._decisions.append((decision, written))"
JOURNALS = "self._scribe.journal.append([(self.now(), decision.kind, '', decision.payload)])"
ACTS = "self._ready.appendleft((self.position, decision.event(self.now())))"

BUGS = {
    "acknowledged before the commit": Bug(
        LiveSource._begin,
        {COMMITS: f"{ACKNOWLEDGES}; {COMMITS}"},
        checks.acknowledged_after_the_commit,
    ),
    "an outbox row is lost": Bug(
        Journal.settle,
        {ENQUEUES: "_enqueue(db, outgoing[:-1])"},
        checks.replay_says_what_was_sent,
    ),
    "progress is noted before its outcomes": Bug(
        Journal.append,
        {ENQUEUES: f"{ENQUEUES}; db.execute('UPDATE progress SET seq = seq + ?', (len(records),))"},
        crash_at_any_commit,
    ),
    "lateness is decided when the loop gets to it": Bug(
        run,
        {"now = source.now() if event is None else event.time": "now = source.now()"},
        busy_loop,
    ),
    "the noise moves on from window to window": Bug(
        Distribution._noise,
        {"if not self.draws:": "self.noise = self.noise.flip(1)\n    if not self.draws:"},
        batch_of_ddim,
    ),
    "the solver keeps its history from window to window": Bug(
        samplers.dpmpp,
        {
            "last = len(timesteps) - 1": "last, kept = len(timesteps) - 1, []",
            "previous = x\n": "previous = kept.pop() if kept else x\n",
            "if 0 < i < last:": "if i < last and previous is not x:",
            "slope[i - 1]": "slope[max(i - 1, 0)]",
            "return x\n": "kept.append(previous); return x\n",
        },
        batch_of_dpmpp,
    ),
    "ranks are taken over the batch": Bug(
        SSSDForecaster.couplings,
        {
            "return [": "found = [",
            "zip(windows, frames, strict=True)]": "zip(windows, frames, strict=True)]\n"
            "        mean = np.mean([c.ranks for c in found], 0).argsort(0).argsort(0)\n"
            "        return [Coupling(c.steps, mean, c.bridge) for c in found]",
        },
        batch_of_paths,
    ),
    "a path reads the quantiles of the horizon before": Bug(
        paths.between,
        {"found[..., k, :] = quantiles[..., j, :]": "found[..., k, :] = quantiles[..., max(j - 1, 0), :]"},
        horizons_of_paths,
    ),
    "a sequence goes on with the bars of the next window": Bug(
        Scaling.of_windows,
        {"frame.channels[: len(frame.channels) - (last - k)]": "frame.channels"},
        look_ahead_of_paths,
    ),
    "an image has the period of the first row of its batch": Bug(
        LDM4TS.history,
        {"vision.period(sequence[..., RANGE])": "vision.period(sequence[..., RANGE])[:1].expand(len(way))"},
        image_of_a_row,
    ),
    "training shows the U-Net what is to come": Bug(
        latent._Training._prepare_latents,
        {
            "net.known(self._sequence(some)) for": "torch.cat([net.vae.encode(net.images("
            "self._sequence(some), self._coming(self.learn.only(some)))).latent_dist.mean / net.spread "
            "* (1 - net.mask), net.mask.expand(len(some), -1, -1, -1)], 1) for"
        },
        future_in_training,
    ),
    "an image without what is to come shows something there": Bug(
        vision.images,
        {"known.new_zeros(B, 3, size, size - left)": "known[..., left - size :]"},
        right_of_an_image,
    ),
    "the noise of latents is drawn for each call": Bug(
        Sampling.ways,
        {"start = self._noise.expand(": "start = torch.randn_like(self._noise).expand("},
        batch_of_latents,
    ),
    "the U-Net's tokens are dropped": Bug(
        LDM4TS.asked,
        {"for y in (known, tokens)": "for y in (known, 0 * tokens)"},
        what_the_unet_is_told,
    ),
    "the U-Net's image of what was is dropped": Bug(
        LDM4TS.asked,
        {"for y in (known, tokens)": "for y in (0 * known, tokens)"},
        what_the_unet_is_told,
    ),
    "the forecaster of the tests keeps something": Bug(
        Spread._one,
        {"spread = 1e-4": "self.n = getattr(self, 'n', 0) + 1; spread = 1e-4 * self.n"},
        batch_of_the_fake,
    ),
    "an activation acts before it is journalled": Bug(
        LiveSource.decide,
        {DECIDES: f"{DECIDES}; {ACTS}"},
        checks.decision_is_journalled_before_it_acts,
    ),
    "an activation overtakes what is journalled": Bug(
        LiveSource.decide,
        {DECIDES: f"{DECIDES}; {ACTS}"},
        checks.decision_amid_work_is_replayed,
    ),
    "an activation is journalled twice": Bug(
        LiveSource.decide,
        {DECIDES: f"{DECIDES}; {JOURNALS}"},
        checks.decision_is_journalled_before_it_acts,
    ),
    "an activation that is journalled twice is replayed too early": Bug(
        LiveSource.decide,
        {DECIDES: f"{DECIDES}; {JOURNALS}"},
        checks.decision_amid_work_is_replayed,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes as the code is, fails with the bug in it, and passes again without."""
    bug = BUGS[name]
    for folder in ("before", "planted", "after"):
        (tmp_path / folder).mkdir()
    bug.check(tmp_path / "before")
    with monkeypatch.context() as patch:
        plant(bug.where, bug.words, patch)
        with pytest.raises(AssertionError):
            bug.check(tmp_path / "planted")
    bug.check(tmp_path / "after")


FOUND_BY_THE_MACHINE = [
    "acknowledged before the commit",
    "an outbox row is lost",
    "progress is noted before its outcomes",
    "lateness is decided when the loop gets to it",
    "the forecaster of the tests keeps something",
    "an activation acts before it is journalled",
    "an activation is journalled twice",
]


@pytest.mark.parametrize("name", FOUND_BY_THE_MACHINE)
def test_planted_bug_is_found_by_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of anything in any order finds the bug, too: what it looks at can break."""
    plant(BUGS[name].where, BUGS[name].words, monkeypatch)
    draws = settings(
        max_examples=1000, stateful_step_count=40, phases=[Phase.generate], derandomize=True, database=None
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(DaemonMachine, settings=draws)


def test_bug_whose_words_are_gone_is_planted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the code under a bug is noticed: it is not passed over as caught."""
    gone = Bug(Journal.settle, {"what it never said": ""}, busy_loop)
    with pytest.raises(AssertionError, match="plant the bug again"):
        plant(gone.where, gone.words, monkeypatch)
