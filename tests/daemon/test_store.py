"""Models are opened by name; a store holds the one that was opened last, and no other."""

import gc
from pathlib import Path
from weakref import ref

import pytest

from barcast.backtest.replay import Recording, replay
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Activation, Arrival, Revision, Warmup
from barcast.daemon.store import ModelStore
from barcast.models import BASELINES, Bar, ConfigError, open_model
from tests.fakes import MINUTE, START, settings
from tests.garch import simulate

WARM, LIVE = 300, 8


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
    for opener in (ModelStore(tmp_path, "1m").open, lambda name, _sampler, _steps: everything[name]):
        recording = Recording()
        replay(events, Pipeline(opener), recording)
        said.append([(m.topic, m.payload) for m in recording.messages])
    assert said[0] == said[1]
    assert sum("/signals/" in topic for topic, _ in said[0]) == LIVE
