"""The checks that guard the promises: called by the tests of each part, and with a bug planted under them."""

import asyncio
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barcast.backtest.replay import Recording
from barcast.daemon.journal import Journal
from barcast.daemon.live import Scribe
from barcast.daemon.pipeline import Pipeline, run
from barcast.daemon.ports import Activation, Arrival, EndOfSource, Event, Group
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, Forecaster, Window
from tests.fakes import MINUTE, START, Spread, bar, opening, outgoing, settings
from tests.postgres import put
from tests.rim import (
    SECOND,
    Instance,
    Message,
    Step,
    World,
    activation,
    outbox,
    path_of,
    play,
    revision,
    source,
    taken,
)

MODELS = {"spread": Spread(), "other": Spread("other", window=6)}
SYMBOLS = ("A", "B", "C")


def open_model(model: str, _sampler: str | None, _steps: int | None, _paths: bool) -> Spread:
    """The models of the stories."""
    return MODELS[model]


# Commit before acknowledging, and before acting.


def acknowledged_after_the_commit(folder: Path) -> None:
    """The broker is told that messages are ours only once they are in the journal, oldest first."""
    a, b = (Message.of(bar(symbol, 1)) for symbol in "AB")
    with closing(Scribe(Journal(folder / "journal.db"))) as scribe:
        world, notes = World(), []
        append, ack = scribe.journal.append, world.ack

        def spy(records, outgoing):
            written = append(records, outgoing)
            notes.append(("committed", [r.topic for r in scribe.journal.records()]))
            return written

        scribe.journal.append = spy
        world.ack = lambda deliveries: (ack(deliveries), notes.append(("acknowledged", list(world.acked))))
        world.deliver(b, a, b)
        found = play(taken(source(world, scribe)))
    assert notes == [
        ("committed", ["t/bars/1m/B", "t/bars/1m/A", "t/bars/1m/B"]),
        ("acknowledged", [1, 2, 3]),
    ]
    assert [b.symbol for event in found for b in event.bars] == ["B", "A", "B"]


def decision_is_journalled_before_it_acts(folder: Path) -> None:
    """A decision takes its place before the messages that wait, and is in the journal by then, once."""
    with closing(Scribe(Journal(folder / "journal.db"))) as scribe:
        world = World()
        src = source(world, scribe)

        async def decides():
            world.deliver(Message.of(bar("A", 1)))
            first, second = src.decide(activation("x")), src.decide(activation("y"))
            assert not first.done()
            event = await src.next(None)
            kinds = [(r.kind, r.time) for r in scribe.journal.records()]
            assert kinds == [("activation", START), ("activation", START), ("bars", START)]
            assert first.done()
            assert second.done()
            return [event, *await taken(src)]

        events = play(decides())
    assert events[0] == Activation(START, "x", "numpy", 8)
    assert [type(event) for event in events] == [Activation, Activation, Arrival]


def decision_amid_work_is_replayed(folder: Path) -> None:
    """A decision that is made while events wait and a forecast takes long is replayed where it acted."""
    world = World()
    steps: list[Step] = [
        (START, lambda src: src.decide(revision(settings(SYMBOLS)))),
        (START, lambda src: src.decide(activation("spread"))),
    ]
    steps += [(START + m * MINUTE + SECOND, [Message.of(bar(s, m)) for s in SYMBOLS]) for m in range(1, 7)]
    at_once = [bar("A", 7), bar("B", 7), bar("C", 7), bar("A", 8), bar("B", 8)]
    steps.append((START + 8 * MINUTE + SECOND, [Message.of(b) for b in at_once]))
    steps.append((START + 9 * MINUTE + SECOND, [Message.of(bar(s, 9)) for s in SYMBOLS]))
    world.script.extend(steps)
    with closing(Instance(folder / "journal.db", world, open_model)) as instance:
        emit = instance.sink.emit

        async def slow(outcome):
            await emit(outcome)
            if outcome.group.close_time == START + 7 * MINUTE:
                instance.source.decide(activation("other"))
                world.time += 30 * SECOND

        instance.sink.emit = slow
        play(instance.run())
        sent, replayed = outbox(instance.journal), instance.replayed()
    models = [m.payload.split(b'"model":"')[1].split(b'"')[0] for m in sent if "/groups/" in m.topic]
    assert replayed == path_of(sent)
    assert models == [b"spread"] * 8 + [b"other"]


# Crashes.


def story(together: int = 1) -> list[Step]:
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

    def decides(decision):
        return lambda src: src.decide(decision)

    decided = [
        (0, decides(revision(settings(SYMBOLS)))),
        (0, decides(activation("spread"))),
        (60 * 6 + 3, decides(activation("other"))),
        (60 * 9 + 20, decides(revision(settings(SYMBOLS, max_wait=5 * SECOND)))),
    ]
    steps = sorted([*decided, *grouped], key=lambda step: step[0])
    return [(START + second * SECOND, what) for second, what in steps]


@dataclass
class Cut:
    """The journal as a crash would leave it, what was still to come, and what had come last."""

    journal: sqlite3.Connection
    rest: list[Step]
    last: list[Step]
    time: int
    what: str


@dataclass
class Run:
    """What a daemon left behind: its outbox and journal, and every message that it ever offered to them."""

    sent: list[Outgoing]
    replayed: list[Outgoing]
    offered: list[Outgoing]
    cuts: list[Cut]


def serve(
    folder: Path,
    script: Sequence[Step],
    start: int = START,
    image: sqlite3.Connection | None = None,
    late: int = 0,
    cutting: bool = False,
) -> Run:
    """Recover from a journal and run until the script ends, with the daemon's own parts."""
    for old in folder.glob("journal.db*"):
        old.unlink()
    if image is not None:
        put(image, folder / "journal.db")
    world = World(time=start, late=late)
    world.script.extend(script)
    offered, cuts = [], []
    with closing(Instance(folder / "journal.db", world, open_model)) as instance:

        def spy(name):
            commit = getattr(instance.journal, name)

            def spied(*args):
                done = commit(*args)
                offered.extend(args[-1])
                if cutting:
                    rest = list(world.script)
                    came = [*script][: len(script) - len(rest)][-1:]
                    what = f"{name} at {(world.time - START) / SECOND}"
                    cuts.append(Cut(instance.image(), rest, came, world.time, what))
                return done

            setattr(instance.journal, name, spied)

        spy("append")
        spy("settle")
        asyncio.run(instance.run())
        return Run(outbox(instance.journal), instance.replayed(), offered, cuts)


def crash_at_any_commit_changes_no_message(folder: Path, together: int, late: int, again: bool) -> None:
    """Cut after every commit, the daemon goes on to the same outbox, in the same order, byte for byte.

    With `again` the crash came before the acknowledgement, so that the broker sends the last messages again.
    """
    script = story(together)
    whole = serve(folder, script, late=late, cutting=True)
    assert len(whole.cuts) >= 19
    for cut in whole.cuts:
        messages = [step for step in cut.last if again and not callable(step[1])]
        rest = serve(folder, [*messages, *cut.rest], cut.time, cut.journal, late)
        if again:  # what could not be used may be told of twice
            assert path_of(rest.sent) == path_of(whole.sent), cut.what
            assert {m.id for m in rest.sent} >= {m.id for m in whole.sent}
        else:
            assert rest.sent == whole.sent, cut.what
        assert rest.replayed == whole.replayed
        computed = {m.id: m for m in whole.offered}
        assert all(computed[m.id] == m for m in path_of(rest.offered)), cut.what


def replay_says_what_was_sent(folder: Path) -> None:
    """The journal's replay gives the messages of the outbox, also those of groups that a timer released."""
    whole = serve(folder, story(), late=4 * SECOND)
    assert whole.replayed == path_of(whole.sent)
    assert len(whole.replayed) > 40


# One path.


class BusySource:
    """A live source in miniature: events are stamped on arrival and handed out when the loop gets to them.

    Its clock runs on while forecasts are computed, and its timer wakes late.
    """

    def __init__(self, events: Sequence[Event], seed: int) -> None:
        self.waiting = list(events)
        self.random = random.Random(seed)
        self.clock = events[0].time

    def now(self) -> int:
        """The time, which runs on between the questions."""
        return self.clock

    async def next(self, deadline: int | None) -> Event | None:
        """See `Source.next`."""
        self.clock += self.random.choice([0, 0, SECOND // 10, 3 * SECOND, 12 * SECOND])
        came = bool(self.waiting) and self.waiting[0].time <= self.clock
        if not came and deadline is not None and deadline <= self.clock:
            return None
        if not self.waiting:
            if deadline is None:
                raise EndOfSource
            self.clock = max(self.clock, deadline)
            return None
        if not came and deadline is not None and deadline < self.waiting[0].time:
            self.clock = max(self.clock, deadline + self.random.randrange(SECOND))
            if self.clock < self.waiting[0].time:
                return None
        event = self.waiting.pop(0)
        self.clock = max(self.clock, event.time)
        return event

    async def sheds(self, group: Group, valid_until: Callable[[Group], int]) -> bool:
        """Nothing is shed."""
        return False


def history(seed: int) -> list[Event]:
    """Half an hour of two symbols with delays, duplicates, missing and out-of-order bars."""
    dice, pieces = random.Random(seed), list[tuple[int, Bar]]()
    for minute in range(1, 31):
        for symbol in "AB":
            delay = dice.choice([0.2, 0.5, 1, 9, 10, 11, 15, 70, 200])
            if dice.random() < 0.05:
                continue
            for _ in range(1 + (dice.random() < 0.1)):
                pieces.append((START + minute * MINUTE + int(delay * SECOND), bar(symbol, minute)))
                delay += dice.random() * 5
    return [*opening(), *(Arrival(t, (b,)) for t, b in sorted(pieces, key=lambda p: (p[0], p[1].symbol)))]


def busy_loop_says_what_its_replay_says(seeds: Sequence[int]) -> None:
    """However late the loop gets to an arrival or a timer, the replay of what it received is the same."""
    for seed in seeds:
        events, recording = history(seed), Recording()
        asyncio.run(run(BusySource(events, seed), Pipeline(lambda *_: Spread()), recording))
        assert recording.messages == outgoing(events), seed


# Batches.


def forecast_does_not_depend_on_its_batch(
    forecaster: Forecaster, windows: Sequence[Window], sizes: Sequence[int] = (1, 2, 3, 7, 16, 31, 64)
) -> None:
    """In batches of these sizes, in random company, every window gets the same bits as alone."""
    alone = [bits(forecaster, [window])[0] for window in windows]
    rng = np.random.default_rng(1)
    for size in sizes:
        for _ in range(2):
            chosen = rng.permutation(len(windows))[:size]
            assert bits(forecaster, [windows[i] for i in chosen]) == [alone[i] for i in chosen]


def bits(forecaster: Forecaster, windows: Sequence[Window]) -> list[bytes]:
    """Everything that is forecast of each window, as bytes."""
    return [
        f.quantiles.tobytes() + f.mean.tobytes() + f.std.tobytes() + f.rise.tobytes()
        for f in forecaster.forecast(windows)
    ]


Check = Callable[[Path], None]
"""A check that works in an empty folder. Raise AssertionError when the promise is broken."""
