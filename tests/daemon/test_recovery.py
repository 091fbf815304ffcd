"""Crashes at every commit: recovery goes on as if nothing had happened."""

import asyncio
import json
import sqlite3
from collections import Counter
from dataclasses import dataclass

import pytest

from barcast.backtest.replay import Recording, replay
from barcast.daemon.app import recover
from barcast.daemon.events import events
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Decision, LiveSink, Scribe
from barcast.daemon.pipeline import Pipeline, run
from barcast.daemon.ports import Activation, Arrival, Revision
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.rim import SECOND, Message, World, outbox, source

MODELS = {"spread": Spread(), "other": Spread("other", window=6)}
SYMBOLS = ("A", "B", "C")


def decision(kind, payload, event):
    """A decision as a step of a script."""
    return lambda src: src.decide(Decision(kind, payload, event))


def activation(model):
    """A model takes over."""
    body = json.dumps({"model": model, "fingerprint": "numpy", "window": 8, "reason": "test"}).encode()
    return decision(Kind.ACTIVATION, body, lambda time: Activation(time, model, "numpy", 8))


def revision(**changes):
    """Other settings."""
    body = settings(SYMBOLS, **changes).encode()
    return decision(Kind.REVISION, body, lambda time: Revision(time, body))


def story(together=1):
    """Twelve minutes with everything that the rules know, `together` messages at a time.

    A symbol is missing for some minutes, so that a timer releases its groups; its bars come as stragglers,
    after their successors, twice, corrected, or not at all. A model and the settings change. At the end a
    timer releases the last group, and a straggler of it comes after that.
    """
    sent = []
    for minute in range(1, 13):
        for i, symbol in enumerate(SYMBOLS):
            delay = 1 + i
            if symbol == "C" and minute in (5, 8, 12):
                delay = 14  # after its group
            if symbol == "B" and minute == 6:
                delay = 75  # after its successor
            if symbol == "C" and minute == 10:
                continue
            sent.append((60 * minute + delay, [Message.of(bar(symbol, minute))]))
    sent.append((60 * 4 + 30, [Message.of(bar("A", 4))]))
    sent.append((60 * 7 + 30, [Message.of(bar("A", 7, close=150.0))]))
    sent.append((60 * 8 + 4, [Message("t/bars/1m/A", b"{}")]))
    sent.append((60 * 9 + 30, [Message.of(bar("A", 9), bar("C", 9, close=0.0), topic="t/bars/1m")]))
    sent.sort(key=lambda step: step[0])
    grouped = []
    for i in range(0, len(sent), together):
        part = sent[i : i + together]
        grouped.append((part[-1][0], [message for _, messages in part for message in messages]))
    decided = [(0, revision()), (0, activation("spread"))]
    decided += [(60 * 6 + 3, activation("other")), (60 * 9 + 20, revision(max_wait=5 * SECOND))]
    steps = sorted([*decided, *grouped], key=lambda step: step[0])
    return [(START + second * SECOND, what) for second, what in steps]


@dataclass
class Cut:
    """The journal as a crash would leave it, what was still to come, and what had come last."""

    journal: sqlite3.Connection
    rest: list
    last: list
    time: int
    what: str


@dataclass
class Run:
    """What a daemon left behind: its outbox and journal, and every message that it ever offered to them."""

    sent: list
    replayed: list
    offered: list
    cuts: list


def serve(folder, script, start=START, image=None, late=0, cutting=False):
    """Recover from a journal and run until the script ends, with the daemon's own parts."""
    for old in folder.glob("journal.db*"):
        old.unlink()
    if image is not None:
        copy = sqlite3.connect(folder / "journal.db")
        image.backup(copy)
        copy.close()
    journal = Journal(folder / "journal.db")
    journal._db.execute("PRAGMA synchronous = OFF")  # the disk is not what is tested
    pipeline = Pipeline(open_model)
    backlog = recover(journal, pipeline)
    scribe, world = Scribe(journal), World(time=start, late=late)
    world.script.extend(script)
    src = source(
        world,
        scribe,
        backlog=backlog,
        position=journal.progress().seq,
        stamped=max(journal.last_time(), journal.progress().clock),
    )
    offered, cuts = [], []

    def spy(name):
        commit = getattr(journal, name)

        def spied(*args):
            done = commit(*args)
            offered.extend(args[-1])
            if cutting:
                image = sqlite3.connect(":memory:", check_same_thread=False)
                journal._db.backup(image)
                rest = list(world.script)
                came = [*script][: len(script) - len(rest)][-1:]
                cuts.append(Cut(image, rest, came, world.time, f"{name} at {(world.time - START) / SECOND}"))
            return done

        setattr(journal, name, spied)

    spy("append")
    spy("settle")
    asyncio.run(run(src, pipeline, LiveSink(scribe, src, Silent())))
    sent = outbox(journal)
    recording = Recording()
    replay((event for _, event in events(journal.records())), Pipeline(open_model), recording)
    scribe.close()
    return Run(sent, recording.messages, offered, cuts)


def open_model(model, _sampler, _steps):
    """The models of the story."""
    return MODELS[model]


class Silent:
    """A courier that delivers nothing."""

    def wake(self):
        """Nothing waits for it."""


def kinds(messages):
    """How many messages of each kind there are."""
    return Counter(message.topic.split("/")[1] for message in messages)


SHAPES = [(1, 0), (1, 4 * SECOND), (3, 0), (8, 0)]
"""How many messages come together, and how late a timer wakes."""


@pytest.mark.parametrize(("together", "late"), SHAPES)
@pytest.mark.parametrize("again", [False, True], ids=["acknowledged", "sent again"])
def test_crash_at_any_commit_changes_no_message(tmp_path, together, late, again):
    """Cut after every commit, the daemon goes on to the same outbox, in the same order, byte for byte.

    With `again` the crash came before the acknowledgement, so that the broker sends the last messages again.
    """
    script = story(together)
    whole = serve(tmp_path, script, late=late, cutting=True)
    assert len(whole.cuts) >= 19
    for cut in whole.cuts:
        messages = [step for step in cut.last if again and not callable(step[1])]
        rest = serve(tmp_path, [*messages, *cut.rest], cut.time, cut.journal, late)
        if again:  # what could not be used may be told of twice
            assert path_of(rest.sent) == path_of(whole.sent), cut.what
            assert {m.id for m in rest.sent} >= {m.id for m in whole.sent}
        else:
            assert rest.sent == whole.sent, cut.what
        assert rest.replayed == whole.replayed
        computed = {m.id: m for m in whole.offered}
        assert all(computed[m.id] == m for m in path_of(rest.offered)), cut.what


def path_of(messages):
    """What the path said: all but the dead letters."""
    return [m for m in messages if "/deadletter/" not in m.topic]


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
    whole = serve(tmp_path, story(), late=4 * SECOND)
    assert whole.replayed == path_of(whole.sent)
    assert len(whole.replayed) > 40


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
    assert recover(journal, pipeline) == []
    assert pipeline.model is None
    journal.close()


def test_recovery_ends_where_the_path_was(tmp_path):
    """Windows, model and settings are those at the last settled event; later ones are handed out again."""
    whole = serve(tmp_path, story(), cutting=True)
    [cut] = [c for c in whole.cuts if c.what == "append at 570.0"]
    copy = sqlite3.connect(tmp_path / "cut.db")
    cut.journal.backup(copy)
    copy.close()
    journal = Journal(tmp_path / "cut.db")
    pipeline = Pipeline(open_model)
    backlog = recover(journal, pipeline)
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
    copy = sqlite3.connect(tmp_path / "cut.db")
    cut.journal.backup(copy)
    copy.execute("UPDATE progress SET seq = (SELECT MAX(seq) FROM record)")
    copy.commit()
    copy.close()
    journal = Journal(tmp_path / "cut.db")
    pipeline = Pipeline(open_model)
    assert recover(journal, pipeline) == []
    journal.close()
    assert pipeline.deadline == START + 726 * SECOND
