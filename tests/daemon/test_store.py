"""Models are opened by name; a store holds the one that was opened last, and no other."""

import gc
import os
import time
from pathlib import Path
from weakref import ref

import pytest

from barcast.backtest.replay import Recording, replay
from barcast.backtest.sample import sample_checkpoint
from barcast.daemon.bars import received, write_days
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Activation, Arrival, Revision, Warmup
from barcast.daemon.retention import _collect
from barcast.daemon.store import ModelStore
from barcast.models import BASELINES, Bar, ConfigError, open_model
from tests.fakes import MINUTE, START, settings
from tests.garch import simulate

WARM, LIVE = 300, 8
SAMPLE = sample_checkpoint()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was brought to the disk, by its path then, and what was renamed, in order."""
    said: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def brought(number: int) -> None:
        fsync(number)
        said.append(os.readlink(f"/proc/self/fd/{number}"))

    def renamed(source: Path, target: Path) -> Path:
        said.append(f"renamed to {target}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", brought)
    monkeypatch.setattr(Path, "rename", renamed)
    return said


def test_adopted_model_is_on_the_disk_before_its_source_may_go(tmp_path: Path, disk: list[str]) -> None:
    """Its files, then the folders that list them, then, under its name, the one that lists it."""
    models = tmp_path / "state" / "models"
    model = ModelStore(models, "session").adopt(SAMPLE)
    partial = models / f".{model}.partial"
    copied = [partial / path.relative_to(SAMPLE) for path in SAMPLE.rglob("*")]
    at = disk.index(f"renamed to {models / model}")
    assert {*map(str, copied), str(partial)} <= set(disk[:at])
    assert disk.index(str(partial)) > max(disk.index(str(path)) for path in copied)
    assert disk[at + 1 :] == [str(models)]
    assert {str(tmp_path), str(tmp_path / "state")} <= set(disk[:at])  # which list the new folders


def test_new_archive_is_on_the_disk_with_its_files(tmp_path: Path, disk: list[str]) -> None:
    """The folder above lists the archive, before anything leaves the journal for it."""
    bars = received([Bar("A", START, 1.0, 1.0, 1.0, 1.0, 1.0)], ())
    assert write_days(bars, tmp_path / "archive", "1m") == 1
    assert disk[0] == str(tmp_path)
    assert disk[-1] == str(tmp_path / "archive")


def test_model_that_is_about_to_serve_is_not_collected(tmp_path: Path) -> None:
    """One that nothing refers to yet stays from the moment it is chosen, however old its folder is."""
    store = ModelStore(tmp_path, "session")
    model = store.adopt(SAMPLE)
    for choose in (lambda: store.adopt(SAMPLE) == model, lambda: store.hold(model)):
        time.sleep(0.02)
        before = time.time_ns()
        time.sleep(0.02)
        assert choose()
        assert list(_collect(tmp_path, set(), before)) == []
    assert store.hold("fhs")
    assert list(_collect(tmp_path, set(), time.time_ns() + 10**9)) == [model]
    assert not store.hold(model)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_opened_by_its_name(name: str) -> None:
    """Its card bears the name and the horizons of the timeframe; daily bars have none with a season."""
    card = open_model(name, "15m", None, None).card
    assert (card.kind, card.horizons, card.sampler) == (name, (1, 4, 16), "none")
    assert card.model.startswith(f"{name}-")
    assert card.window >= card.min_window
    if name.endswith("-s"):
        with pytest.raises(ConfigError, match="hours of the week"):
            open_model(name, "session", None, None)
    else:
        assert open_model(name, "session", None, None).card.horizons == (1, 5, 20)


def test_a_model_that_serves_no_more_is_not_kept(tmp_path: Path) -> None:
    """A swap leaves nothing of the predecessor, which knows every symbol's past; the newest is kept."""
    store = ModelStore(tmp_path, "1m")
    newest = store.open("fhs", None, None)
    assert store.open("fhs", None, None) is newest
    gone = ref(newest)
    newest = store.open("hs", None, None)
    gc.collect()
    assert gone() is None
    assert store.open("hs", None, None) is newest


def test_a_path_that_jumps_between_models_says_what_one_that_holds_them_all_says(tmp_path: Path) -> None:
    """There and back within a few bars, and an activation before any forecast of the one before it."""
    values = simulate("A", WARM + LIVE, seed=1).window.values.tolist()
    bars = [Bar("A", START + MINUTE * (k + 1 - WARM), *row) for k, row in enumerate(values)]
    events = [Revision(START, settings(["A"]).encode()), Activation(START, "fhs", "", 700)]
    events.append(Warmup(START, "", tuple(bars[:WARM])))
    for k, names in enumerate([[], [], ["hs"], ["fhs"], ["hs", "fhs"], ["hs"], [], ["fhs"]]):
        now = bars[WARM + k].close_time
        events += [Activation(now - 1, name, "", 700) for name in names]
        events.append(Arrival(now, (bars[WARM + k],)))
    everything = {name: open_model(name, "1m", None, None) for name in ("hs", "fhs")}
    said = []
    for opener in (ModelStore(tmp_path, "1m").open, lambda name, *_: everything[name]):
        recording = Recording()
        replay(events, Pipeline(opener), recording)
        said.append([(m.topic, m.payload) for m in recording.messages])
    assert said[0] == said[1]
    assert sum("/signals/" in topic for topic, _ in said[0]) == LIVE
