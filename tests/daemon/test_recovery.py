"""Crashes at every commit: recovery goes on as if nothing had happened."""

import json
from collections import Counter

import pytest

from barcast.daemon.journal import Journal
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Arrival, Revision
from barcast.daemon.start import Following
from tests import checks
from tests.checks import open_model, serve, story
from tests.fakes import MINUTE, START
from tests.postgres import change, put
from tests.rim import SECOND

pytestmark = pytest.mark.usefixtures("each_journal")
ON_SERVER = pytest.mark.postgres


def kinds(messages):
    """How many messages of each kind there are."""
    return Counter(message.topic.split("/")[1] for message in messages)


SHAPES = [(1, 0), (1, 4 * SECOND), (3, 0), (8, 0)]
"""How many messages come together, and how late a timer wakes."""
CRASHES = [("sqlite", shape, again) for shape in SHAPES for again in (False, True)]
CRASHES += [pytest.param("postgresql", (3, 4 * SECOND), again, marks=ON_SERVER) for again in (False, True)]


@pytest.mark.parametrize(("each_journal", "shape", "again"), CRASHES, indirect=["each_journal"])
def test_crash_at_any_commit_changes_no_message(tmp_path, shape, again):
    """Cut after every commit, the daemon goes on to the same outbox, in the same order, byte for byte.

    With `again` the crash came before the acknowledgement, so that the broker sends the last messages again.
    """
    checks.crash_at_any_commit_changes_no_message(tmp_path, *shape, again)


def test_the_story_holds_what_can_go_wrong(tmp_path):
    """The control of the story: stragglers, dead letters, withheld forecasts, two models and a late timer."""
    whole = serve(tmp_path, story())
    bodies = [json.loads(m.payload) for m in whole.sent]
    groups = [b for b, m in zip(bodies, whole.sent, strict=True) if "/groups/" in m.topic]
    assert sum(g["straggler"] for g in groups) >= 3
    assert groups[-1]["straggler"]
    assert any(g["withheld"] for g in groups)
    assert {g["model"] for g in groups} == {"spread", "other"}
    assert kinds(whole.sent)["deadletter"] == 2
    assert kinds(whole.sent)["signals"] > 20


def test_replay_says_what_was_sent(tmp_path):
    """The journal's replay gives the messages of the outbox, also those of groups that a timer released."""
    checks.replay_says_what_was_sent(tmp_path)


def test_decision_made_amid_work_is_replayed_where_it_acted(tmp_path):
    """A decision that is made while events wait and a forecast takes long acts where the journal has it."""
    checks.decision_amid_work_is_replayed(tmp_path)


def test_group_released_by_a_timer_is_not_released_again(tmp_path):
    """After a crash behind the last timer nothing is computed a second time, and the straggler is one."""
    whole = serve(tmp_path, story(), cutting=True)
    [cut] = [c for c in whole.cuts if c.what == "settle at 726.0"]
    rest = serve(tmp_path, cut.rest, cut.time, cut.journal)
    [message] = rest.offered
    body = json.loads(message.payload)
    assert (message.topic, body["close_time"], body["straggler"]) == (
        "t/groups/1m",
        "2023-11-14T22:26:00Z",
        True,
    )


def test_every_group_is_settled_once_without_a_crash(tmp_path):
    """Without a crash no message is offered to the outbox twice."""
    whole = serve(tmp_path, story())
    assert [m.id for m in whole.offered] == [m.id for m in whole.sent]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE progress SET seq = (SELECT MAX(seq) FROM record)",
        "DELETE FROM outbox WHERE n = (SELECT MAX(n) FROM outbox)",
        "DELETE FROM record WHERE seq = (SELECT MAX(seq) FROM record)",
        "UPDATE record SET time = time + 15000000000 WHERE seq = (SELECT MAX(seq) FROM record)",
    ],
)
def test_journal_that_broke_a_promise_is_found_out(tmp_path, change):
    """The control: with progress ahead of the outbox, or a message, record or stamp lost, a cut differs."""
    whole = serve(tmp_path, story(8), cutting=True)
    differing = 0
    for cut in whole.cuts:
        cut.journal.execute(change)
        cut.journal.commit()
        try:
            differing += serve(tmp_path, cut.rest, cut.time, cut.journal).sent != whole.sent
        except RuntimeError:  # the settings themselves were lost
            differing += 1
    assert differing > 3


def test_clean_start_has_nothing_to_recover(tmp_path):
    """In an empty journal there is nothing to rebuild, and nothing to do again."""
    journal = Journal(tmp_path / "journal.db")
    pipeline = Pipeline(open_model)
    assert Following(journal, pipeline).recover() == []
    assert pipeline.model is None
    journal.close()


def test_recovery_ends_where_the_path_was(tmp_path):
    """Windows, model and settings are those at the last settled event; later ones are handed out again."""
    whole = serve(tmp_path, story(), cutting=True)
    [cut] = [c for c in whole.cuts if c.what == "append at 570.0"]
    put(cut.journal, tmp_path / "cut.db")
    journal = Journal(tmp_path / "cut.db")
    pipeline = Pipeline(open_model)
    backlog = Following(journal, pipeline).recover()
    progress = journal.progress()
    journal.close()
    assert [type(event) for _, event in backlog] == [Revision, Arrival]
    assert [seq for seq, _ in backlog] == [progress.seq + 1, progress.seq + 2]
    assert pipeline.model == "other"
    assert pipeline.settings.max_wait == 10 * SECOND
    assert pipeline.deadline is None
    window = pipeline.windows.cut("A", START + 9 * MINUTE, 8)
    assert window.close_time == START + 9 * MINUTE
    assert 150.0 in window.values[:, 3]


def test_waiting_group_waits_on_after_a_crash(tmp_path):
    """A group that had begun is still waiting after recovery, until the moment that its first arrival set."""
    whole = serve(tmp_path, story(), cutting=True)
    [cut] = [c for c in whole.cuts if c.what == "append at 722.0"]
    put(cut.journal, tmp_path / "cut.db")
    change(tmp_path / "cut.db", "UPDATE progress SET seq = (SELECT MAX(seq) FROM record)")
    journal = Journal(tmp_path / "cut.db")
    pipeline = Pipeline(open_model)
    assert Following(journal, pipeline).recover() == []
    journal.close()
    assert pipeline.deadline == START + 726 * SECOND
