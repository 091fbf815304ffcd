"""A rollback while the daemon is down: what its model could not forecast is passed over, also in replays."""

import json
import shutil
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from barcast.daemon.config import load
from barcast.daemon.events import Answered, Champion, Ordered, Reign, Warmth
from barcast.daemon.journal import Journal, Kind, Progress
from barcast.daemon.live import Decision
from barcast.daemon.retention import compact
from barcast.daemon.store import ModelStore
from barcast.daemon.succession import rollback_journal
from barcast.daemon.wire import to_ns
from barcast.models import CheckpointError
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.replayed import replay_journal
from tests.rim import SECOND, Instance, Message, World, outbox, path_of, play, revision

pytestmark = pytest.mark.usefixtures("each_journal")
BAD = "0123456789abcdef"
TEXT = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\nsymbols = ["A", "B"]\n[mqtt]\nroot = "t"\n'


class Raises(Spread):
    """Cannot forecast what closes from the seventh minute on."""

    def forecast(self, windows):
        if windows[0].close_time >= START + 7 * MINUTE:
            raise RuntimeError("shapes do not fit")
        return super().forecast(windows)


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The state directory of a configuration; its store has the model BAD, and `fhs` is a fake, too."""
    known = {"fhs": Spread("fhs"), "hs": Spread("hs", window=20), BAD: Raises(BAD)}

    def open_model(path, *_):
        if "/" in path and not Path(path).is_dir():
            raise CheckpointError(f"{path}: not there")
        return known[Path(path).name]

    monkeypatch.setattr("barcast.daemon.store.open_model", open_model)
    (tmp_path / "barcast.toml").write_text(TEXT)
    (tmp_path / "state" / "models" / BAD).mkdir(parents=True)
    return tmp_path / "state"


def serve(state, time, steps):
    """Let an instance start at a time and work; say what it ever sent."""
    world = World(time=time)
    world.script.extend(steps)
    store = ModelStore(state / "models", "1m")
    with closing(Instance(state / "journal.db", world, store.open)) as instance:
        play(instance.run())
        return path_of(outbox(instance.journal))


def bars(first, last, symbols="AB"):
    """The bars of some minutes, as they come a second after their close."""
    return [
        (START + m * MINUTE + SECOND, [Message.of(bar(s, m)) for s in symbols])
        for m in range(first, last + 1)
    ]


def activate(model, *before):
    """A model takes over from others."""
    champion = Champion(model, "numpy", 8, "test", before=tuple(map(Reign, before)))
    return lambda source: source.decide(Decision(Kind.ACTIVATION, champion.encode(), champion.event))


def lived(state, steps, waiting=()):
    """An instance that lived, and was killed when the bars that wait were journalled; their last record."""
    begin = [(START, lambda source: source.decide(revision(settings()))), (START, activate("fhs"))]
    serve(state, START, begin + steps)
    with closing(Journal(state / "journal.db")) as journal:
        came = [(time, m) for time, messages in waiting for m in messages]
        return journal.append([(time, Kind.BARS, m.topic, m.payload) for time, m in came])[-1:]


def back(state, now, to=None):
    """Roll back; say what the operator reads."""
    return rollback_journal(load(state.parent / "barcast.toml"), now, Ordered("uid 0", "rollback", to=to))


def closes(messages):
    """Close, in minutes, and model of each group that was told of."""
    bodies = [json.loads(m.payload) for m in messages if "/groups/" in m.topic]
    times = [to_ns(datetime.fromisoformat(body["close_time"])) for body in bodies]
    return [((t - START) // MINUTE, body["model"]) for t, body in zip(times, bodies, strict=True)]


def kinds(state):
    """The records that are not bars."""
    with closing(Journal(state / "journal.db", readonly=True)) as journal:
        return [record.kind for record in journal.decisions(1 << 62)]


def test_rollback_rescues_from_a_model_that_is_gone(state):
    """The bars that wait for it are passed over; the next start serves, and a replay needs it no more."""
    lived(state, [*bars(1, 6), (START + 6 * MINUTE + 2 * SECOND, activate(BAD, "fhs"))], bars(7, 8))
    shutil.rmtree(state / "models" / BAD)
    with pytest.raises(CheckpointError):
        serve(state, START + 9 * MINUTE, [])
    said = back(state, START + 9 * MINUTE)
    assert "fhs will serve" in said
    assert "2 groups of bars, in 5 records, are passed over" in said
    sent = serve(state, START + 9 * MINUTE, bars(10, 12))
    assert closes(sent) == [(m, "fhs") for m in (1, 2, 3, 4, 5, 6, 10, 11, 12)]
    assert replay_journal(state / "journal.db").messages == sent


def test_rollback_rescues_from_a_model_that_raises(state):
    """What it forecast before stays as it was said, also what a timer released; its bars stay in windows."""
    takes_over = [(START + 4 * MINUTE, activate(BAD, "fhs"))]
    lived(state, [*bars(1, 3), *takes_over, *bars(4, 5), *bars(6, 6, "A")], bars(7, 8))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        serve(state, START + 9 * MINUTE, [])
    back(state, START + 9 * MINUTE)
    sent = serve(state, START + 9 * MINUTE, bars(9, 10))
    told = (1, 2, 3, 4, 5, 6, 7, 9, 10)  # the seventh had expired by then: it is not forecast
    assert closes(sent) == [(m, "fhs" if m < 4 or m > 8 else BAD) for m in told]
    assert replay_journal(state / "journal.db").messages == sent
    signals = [json.loads(m.payload) for m in sent if m.topic == "t/signals/1m/A"]
    assert signals[-1]["flags"] == []  # no hole where nothing was forecast


@pytest.mark.parametrize(("wait", "shed"), [(5 * SECOND, False), (20 * SECOND, True)])
def test_group_that_waited_at_the_stop(state, wait, shed):
    """One whose wait is over by the rollback is passed over; another is the new model's."""
    waiting = bars(7, 7, "A")
    time, _ = waiting[0]
    [last] = lived(state, [*bars(1, 5), (START + 6 * MINUTE, activate(BAD, "fhs"))], waiting)
    with closing(Journal(state / "journal.db")) as journal:
        journal.settle(Progress(last, time), [])
    assert ("1 groups of bars, in 0 records" in back(state, time + wait)) == shed
    assert (Kind.SHED in kinds(state)) == shed
    sent = serve(state, time + wait, bars(9, 9))
    assert closes(sent) == [(m, "fhs") for m in [1, 2, 3, 4, 5, *([] if shed else [7]), 9]]
    assert replay_journal(state / "journal.db").messages == sent


def test_nothing_is_passed_over_where_nothing_waits(state):
    """A rollback of an instance that ended its work is an order and an activation alone."""
    lived(state, [*bars(1, 5), (START + 6 * MINUTE, activate(BAD, "fhs"))])
    assert "passed over" not in back(state, START + 7 * MINUTE)
    rolled_back = [Kind.ORDERED, Kind.ACTIVATION, Kind.ANSWERED]
    assert kinds(state) == [Kind.REVISION, *[Kind.ACTIVATION] * 2, *rolled_back]


def test_model_that_looks_back_further_finds_its_bars(state):
    """What is known goes with the activation, as when a running daemon rolls back; the replay has it, too."""
    lived(state, [*bars(1, 40), (START + 41 * MINUTE, activate(BAD, "fhs"))])
    back(state, START + 42 * MINUTE, "hs")
    assert kinds(state)[-3:] == [Kind.ACTIVATION, Kind.WARMUP, Kind.ANSWERED]
    with closing(Journal(state / "journal.db", readonly=True)) as journal:
        warmth = Warmth.decode(journal.last(Kind.WARMUP).payload)
    assert [bar.symbol for bar in warmth.bars].count("A") == 20
    sent = serve(state, START + 42 * MINUTE, bars(41, 41))
    assert closes(sent)[-1] == (41, "hs")
    signals = [json.loads(m.payload) for m in sent if "/signals/" in m.topic]
    assert (signals[-1]["model"], signals[-1]["flags"]) == ("hs", [])
    assert replay_journal(state / "journal.db").messages == sent


def test_operator_reads_one_sentence(state, run, capsys):
    """The command says what it did, and how much it passed over; what it read is no news."""
    lived(state, [*bars(1, 5), (START + 6 * MINUTE, activate(BAD, "fhs"))], bars(7, 8))
    capsys.readouterr()
    assert run("ctl", str(state.parent / "barcast.toml"), "rollback") == (
        0,
        f"fhs will serve from the next start on; {BAD} is left behind; 2 groups of bars, in 5 records, are "
        "passed over without a forecast\n",
        "",
    )
    with closing(Journal(state / "journal.db", readonly=True)) as journal:
        answered = Answered.decode(journal.last(Kind.ANSWERED).payload)
        assert answered.order == journal.last(Kind.ORDERED).seq
    assert "passed over" in answered.done


@pytest.mark.parametrize("kept", range(2, 9))
def test_compaction_keeps_what_was_passed_over(state, kept):
    """Wherever the journal then begins, a replay says the end of what was sent, and a start reads on."""
    takes_over = [(START + 4 * MINUTE, activate(BAD, "fhs"))]
    lived(state, [*bars(1, 3), *takes_over, *bars(4, 5), *bars(6, 6, "A")], bars(7, 8))
    back(state, START + 9 * MINUTE)
    serve(state, START + 9 * MINUTE, bars(9, 10))
    now = START + 10 * MINUTE + 2 * SECOND
    compact(state, now, kept * MINUTE, (), lambda: None)
    with closing(Journal(state / "journal.db", readonly=True)) as journal:
        assert journal.base > 0
    sent = serve(state, now, bars(11, 12))
    replayed = replay_journal(state / "journal.db").messages
    assert replayed == sent[len(sent) - len(replayed) :]
    assert closes(replayed)[-2:] == [(11, "fhs"), (12, "fhs")]
