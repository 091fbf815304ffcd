"""The lookout: age and drift ask for a training, at most once a day, from what the journal holds."""

import asyncio
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from barcast.daemon.app import Daemon, Outside
from barcast.daemon.config import load
from barcast.daemon.drift import LEAST, Bars, Said
from barcast.daemon.events import Champion
from barcast.daemon.journal import Journal
from barcast.daemon.lookout import REST, Age, Drifted, Lookout
from barcast.daemon.wire import Outgoing, to_text
from barcast.models import Bar, Windows
from tests.fakes import MINUTE, START, Spread

DAY = 86_400 * 10**9
SIGMA, LEVELS = 0.002, [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
NORMAL = np.array([-1.6449, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449])
TEXT = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n[retrain]\n'


def test_old_champion_asks_once_a_day():
    """It asks when it is too old, and again only after a rest; a younger one does not ask."""
    age = Age(30 * DAY)
    assert age.due(START, START + 30 * DAY) is None
    assert age.due(START, START + 31 * DAY) == "age: the champion is 31.0 days old"
    assert age.due(START, START + 31 * DAY + REST - 1) is None
    assert age.due(START, START + 32 * DAY) is not None
    assert age.over(START, START + 31 * DAY)
    assert not age.over(START + 5 * DAY, START + 31 * DAY)


def test_drift_asks_once_a_day():
    """A reading outside its bands asks, and rests as age does; one inside never asks."""
    drifted = Drifted(0.05, 0.1)
    far, near = SimpleNamespace(beyond=lambda *_: "drift: far"), SimpleNamespace(beyond=lambda *_: None)
    assert drifted.due(near, None, START) is None
    assert drifted.due(far, None, START) == "drift: far"
    assert drifted.due(far, None, START + REST - 1) is None
    assert drifted.due(far, None, START + REST) == "drift: far"


def instance(folder, text, volatility, until=0):
    """A lookout over a journal with signals of 400 minutes that take the volatility for `SIGMA`."""
    (folder / "barcast.toml").write_text(TEXT + text)
    config = load(folder / "barcast.toml")
    config.state_dir.mkdir()
    returns = volatility * np.random.default_rng(3).standard_normal(400)
    windows, sent = Windows(1000), []
    for minute, close in enumerate((100 * np.exp(np.cumsum(returns))).tolist()):
        time = START + minute * MINUTE
        windows.put(Bar("A", time, close, close, close, close, 1.0))
        prices = [(close * np.exp(SIGMA * h**0.5 * NORMAL)).tolist() for h in (1, 2)]
        said = Said("A", to_text(time), close, "spread", [Bars(1), Bars(2)], LEVELS, prices)
        sent.append(Outgoing(f"{minute}", "barcast/v1/signals/1m/A", msgspec.json.encode(said), True, None))
    journal = Journal(config.state_dir / "journal.db")
    journal.append([], sent)
    champion = Champion("spread", "numpy", 8, "test", until=until)
    succession = SimpleNamespace(champion=champion, activated=START)
    model = Spread()
    pipeline = SimpleNamespace(windows=windows, model="spread", forecaster=model)
    clock = SimpleNamespace(now=lambda: START + 2 * DAY)
    return Lookout(config, clock, succession, pipeline), journal, succession


@pytest.mark.parametrize(("volatility", "asks"), [(SIGMA, False), (2 * SIGMA, True)])
def test_drift_is_read_from_the_journal(tmp_path, volatility, asks):
    """What was published is held against the bars; after a restart it knows as much."""
    lookout, journal, _ = instance(tmp_path, "drift = {}\n", volatility)
    reasons = asyncio.run(lookout.look(), debug=True)
    journal.close()
    assert [reason.split(":")[0] for reason in reasons] == ["drift"] * asks
    assert lookout.reading.times > LEAST
    assert not lookout.old


def test_signals_of_another_model_end_the_reading(tmp_path):
    """A model is not blamed for what its predecessor said."""
    lookout, journal, _ = instance(tmp_path, "drift = {}\n", 2 * SIGMA)
    lookout._pipeline.forecaster = Spread("other")
    assert asyncio.run(lookout.look()) == []
    assert lookout.reading is None
    lookout._pipeline.model = "other"  # an activation is under way
    assert asyncio.run(lookout.look()) == []
    journal.close()


def test_age_counts_from_the_newest_bar_that_was_known(tmp_path):
    """Without a training it counts from the activation; an old champion asks for no margin."""
    lookout, journal, succession = instance(tmp_path, 'max_age = "36h"\n', SIGMA)
    assert (lookout.since, lookout.old) == (START, True)
    assert asyncio.run(lookout.look()) == ["age: the champion is 2.0 days old"]
    succession.champion = Champion("spread", "numpy", 8, "test", until=START + DAY)
    assert not lookout.old
    journal.close()


def test_model_that_was_gone_back_to_is_as_old_as_its_return(tmp_path):
    """Else the daemon would undo a rollback by itself, with a training on much the same bars."""
    lookout, journal, succession = instance(tmp_path, 'max_age = "36h"\n', SIGMA)
    succession.champion = Champion("spread", "numpy", 8, "back", until=START - 9 * DAY, returned=True)
    assert (lookout.since, lookout.old) == (START, True)
    succession.activated = START + DAY
    assert (lookout.since, lookout.old) == (START + DAY, False)
    assert asyncio.run(lookout.look()) == []
    journal.close()


@pytest.mark.parametrize(
    ("old", "returned", "margin"), [(False, False, 0.1), (True, False, 0.0), (True, True, 0.1)]
)
def test_margin_is_waived_for_an_old_champion_only(tmp_path, old, returned, margin):
    """And not for one that somebody went back to."""
    (tmp_path / "barcast.toml").write_text(TEXT + "margin = 0.1\n")
    daemon = Daemon(load(tmp_path / "barcast.toml"), {}, asyncio.Event(), None, Outside())
    champion = Champion("spread", "numpy", 8, "test", returned=returned)
    daemon.succession = SimpleNamespace(champion=champion)
    daemon.lookout = SimpleNamespace(old=old)
    assert daemon._serving().margin == margin


def test_nothing_is_looked_for_unasked(tmp_path):
    """Without the keys there is neither age nor drift."""
    lookout, journal, _ = instance(tmp_path, "", 2 * SIGMA)
    assert asyncio.run(lookout.look()) == []
    assert (lookout.reading, lookout.old) == (None, False)
    journal.close()


def test_look_that_fails_does_not_end_the_lookout(tmp_path, monkeypatch):
    """A journal that cannot be read is logged; the daemon goes on, and it looks again."""
    lookout, journal, _ = instance(tmp_path, 'max_age = "36h"\ndrift = {}\n', SIGMA)
    journal.close()
    monkeypatch.setattr("barcast.daemon.lookout.LOOK_SECONDS", 0.01)
    (lookout._config.state_dir / "journal.db").rename(tmp_path / "away")
    asked = []

    async def main():
        looking = asyncio.create_task(lookout.run(SimpleNamespace(ask=asked.append)))
        await asyncio.sleep(0.3)
        (tmp_path / "away").rename(lookout._config.state_dir / "journal.db")
        lookout._age = Age(DAY)
        await asyncio.sleep(0.5)
        looking.cancel()

    with capture_logs() as logs:
        asyncio.run(main())
    assert "lookout_failed" in [line["event"] for line in logs]
    assert [reason.split(":")[0] for reason in asked] == ["age"]
