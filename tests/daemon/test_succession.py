"""Who serves: activations form a stack, rollbacks go down it, and what was left behind stays there."""

import errno
import sqlite3
from contextlib import closing

import pytest

from barcast.daemon.config import load
from barcast.daemon.events import Answered, Champion, Ordered, Reign, events
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.ports import Activation
from barcast.daemon.retention import _referenced
from barcast.daemon.start import only_one
from barcast.daemon.store import ModelStore
from barcast.daemon.succession import rollback_journal
from barcast.models import ConfigError, DiskFullError
from tests.fakes import START, Spread

CARD = Spread().card
BACK = Ordered("uid 0", "rollback", reason="it is not what it promised")
LEAST = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n'


def stacked(*models):
    """A champion that took over from others, one after the other."""
    champion = Champion(models[0], "numpy", 8, "first")
    for k, model in enumerate(models[1:]):
        champion = champion.succeeded_by(Reign(model, 0.5 + k / 10, START + k), CARD, "better")
    return champion


def back(champion, to=None):
    """The champion after a rollback."""
    return champion.rolled_back(champion.behind(to), CARD, "back")


def test_rolling_back_twice_goes_back_two_models():
    """Not forth again: what was rolled back from is not below."""
    champion = stacked("a", "b", "c")
    once = back(champion)
    twice = back(once)
    assert [champion.model, once.model, twice.model] == ["c", "b", "a"]
    assert (once.crps, once.until) == (0.5, START)
    assert twice.behind(None) is None
    assert set(twice.left) == {"b", "c"}


def test_model_further_down_takes_all_above_away():
    """With a name, everything above it is left behind at once."""
    after = back(stacked("a", "b", "c", "d"), "b")
    assert (after.model, [r.model for r in after.before], set(after.left)) == ("b", ["a"], {"c", "d"})
    assert after.behind("d") is None


def test_next_activation_is_on_top_of_what_was_rolled_back_to():
    """A later challenger is one step above the model that serves again; who returns is not left behind."""
    after = back(stacked("a", "b")).succeeded_by(Reign("c"), CARD, "better")
    assert ([r.model for r in after.before], after.left) == (["a"], ("b",))
    again = after.rolled_back(Reign("b"), CARD, "named")
    assert ([r.model for r in again.before], again.left) == (["a", "c"], ("c",))


def test_same_model_again_does_not_stand_on_itself():
    """Another fingerprint, after an update, is no step to go back."""
    champion = stacked("a", "b")
    assert champion.succeeded_by(champion.reign, CARD, "fingerprint").before == champion.before


def test_return_is_remembered_until_another_model_follows():
    """Also under another fingerprint: it is still the model that somebody went back to."""
    after = back(stacked("a", "b"))
    assert (stacked("a", "b").returned, after.returned) == (False, True)
    assert after.succeeded_by(after.reign, CARD, "fingerprint").returned
    assert not after.succeeded_by(Reign("c"), CARD, "better").returned


def test_what_is_remembered_is_bounded():
    """An instance that lives for years does not journal an ever longer list."""
    champion = stacked(*(f"m{k}" for k in range(50)))
    assert [r.model for r in champion.before] == [f"m{k}" for k in range(33, 49)]


def test_activation_of_an_older_version_is_read():
    """Journals that know no stack yet are decoded as before."""
    old = b'{"model":"fhs","fingerprint":"numpy","window":645,"reason":"the configuration names it"}'
    champion = Champion.decode(old)
    assert (champion.model, champion.crps, champion.before, champion.left) == ("fhs", None, (), ())
    assert Champion.decode(champion.encode()) == champion


@pytest.fixture
def instance(tmp_path):
    """A configuration, and a journal in which `ewma` took over from `fhs`, and that from `hs`."""
    path = tmp_path / "barcast.toml"
    path.write_text(LEAST)
    (tmp_path / "state").mkdir()
    journal = Journal(tmp_path / "state" / "journal.db")
    journal.append([(START, Kind.ACTIVATION, "", stacked("hs", "fhs", "ewma").encode())])
    journal.close()
    return path


def serving(path):
    """The newest activation of the journal, and how many messages wait."""
    journal = Journal(path.parent / "state" / "journal.db", readonly=True)
    try:
        last = journal.last(Kind.ACTIVATION)
        return Champion.decode(last.payload), last.time, len(journal.pending(10))
    finally:
        journal.close()


def test_rollback_of_an_instance_that_is_down(instance):
    """The decision is journalled and told, and stamped after all that is in the journal."""
    settings = load(instance)
    said = [rollback_journal(settings, START - 5, BACK)]
    assert said[0].startswith("fhs will serve from the next start on; ewma")
    champion, time, waiting = serving(instance)
    assert (champion.model, champion.window, time, waiting) == ("fhs", 645, START, 1)
    said.append(rollback_journal(settings, START + 5, BACK))
    champion, time, _ = serving(instance)
    assert (champion.model, time) == ("hs", START + 5)
    journal = Journal(instance.parent / "state" / "journal.db", readonly=True)
    found = [event for _, event in events(journal.records())]
    assert [event.model for event in found if isinstance(event, Activation)] == ["ewma", "fhs", "hs"]
    orders = {record.seq: Ordered.decode(record.payload) for record in journal.of_kind(Kind.ORDERED)}
    assert [*orders.values()] == [BACK, BACK]
    answers = [Answered.decode(record.payload) for record in journal.of_kind(Kind.ANSWERED)]
    assert answers == [Answered(order, done=done) for order, done in zip(orders, said, strict=True)]
    journal.close()


@pytest.mark.parametrize(
    ("text", "to", "said"),
    [
        ('[model]\nname = "fhs"\n', None, "model.name = 'fhs' pins the model"),
        ("", "ewma", "ewma serves already"),
        ("", "0123456789abcdef", "0123456789abcdef: no such model in"),
        ("", "../../etc", "no such model in"),
        ('[[strategy]]\nkind = "quantile-band"\nparams = { horizon = 7 }\n', None, "horizon"),
    ],
)
def test_rollback_that_leads_nowhere_is_refused(instance, text, to, said):
    """In one sentence, and nothing is journalled."""
    instance.write_text(LEAST + text)
    with pytest.raises(ConfigError, match=said):
        rollback_journal(load(instance), START, Ordered("uid 0", "rollback", to=to))
    assert serving(instance)[0].model == "ewma"


def test_nothing_to_roll_back_to_is_said(instance):
    """The first model of an instance has none before it."""
    settings = load(instance)
    for _ in range(2):
        rollback_journal(settings, START, BACK)
    with pytest.raises(ConfigError, match="no model served before hs"):
        rollback_journal(settings, START, BACK)


def test_rollback_beside_a_running_instance_is_refused(instance):
    """Two never write one journal: without its socket, a running daemon is left alone."""
    settings = load(instance)
    with (
        only_one(settings.state_dir / "lock"),
        pytest.raises(ConfigError, match="in use by another instance"),
    ):
        rollback_journal(settings, START, BACK)


def test_second_instance_leaves_the_lock_as_it_is(tmp_path):
    """What is in the holder's file is the holder's."""
    (tmp_path / "lock").write_text("held")
    with only_one(tmp_path / "lock"), pytest.raises(ConfigError), only_one(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "held"


def test_chosen_model_is_held_in_the_store(instance, monkeypatch):
    """From the moment on that it is chosen, before it is opened, no compaction takes it."""
    settings, held = load(instance), []
    monkeypatch.setattr(ModelStore, "hold", lambda _, model: held.append(model) or True)
    monkeypatch.setattr(ModelStore, "open", lambda *_: held.append("opened") or Spread("fhs"))
    rollback_journal(settings, START, BACK)
    assert held == ["fhs", "opened"]


def test_rollback_on_a_full_disk_says_so(instance, monkeypatch):
    """In one sentence, and the champion stays."""

    def full(*_):
        raise OSError(errno.ENOSPC, "database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", full)
        with pytest.raises(DiskFullError, match="make room on its disk"):
            rollback_journal(load(instance), START, BACK)
    assert serving(instance)[0].model == "ewma"


def test_damaged_activation_is_named(instance):
    """By the number of its record."""
    with closing(sqlite3.connect(instance.parent / "state" / "journal.db")) as db:
        db.execute("UPDATE record SET payload = '{'")
        db.commit()
    with pytest.raises(ConfigError, match=r"record 1 \(activation\): .*restore a copy"):
        rollback_journal(load(instance), START, BACK)


def test_models_below_the_champion_stay_in_the_store(instance):
    """What is old leaves the state directory, but not the models that a rollback leads to."""
    journal = Journal(instance.parent / "state" / "journal.db", readonly=True)
    assert set(_referenced(journal, journal.base)) == {"hs", "fhs", "ewma"}
    journal.close()
