"""A machine that is too slow: the oldest groups are shed, newer ones come in time, and a replay agrees."""

import json
from contextlib import closing
from datetime import datetime

import pytest

from barcast.daemon.events import shed_groups
from barcast.daemon.journal import Kind
from barcast.daemon.wire import to_ns
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.rim import SECOND, Instance, Message, World, activation, outbox, path_of, play, revision

pytestmark = pytest.mark.usefixtures("each_journal")


class Slow(Spread):
    """Takes its time: so many seconds of the world's clock for each symbol."""

    world: World
    pace: dict[int, float]

    def forecast(self, windows):
        close = windows[0].close_time
        self.world.time += int(self.pace.get(close, self.pace[0]) * len(windows) * SECOND)
        return super().forecast(windows)


def live(folder, pace, minutes=12, symbols="AB", cut=None):
    """What an instance of that pace sends of so many minutes, what a replay says, and the instance.

    `pace` is seconds a symbol, by the close, 0 for all others; `cut` ends the first life before that minute.
    """
    world, slow = World(), Slow("slow")
    slow.world, slow.pace = world, {0: 0.0} | pace
    lives = [range(1, cut), range(cut, minutes + 1)] if cut else [range(1, minutes + 1)]
    world.script.append((START, lambda src: src.decide(revision(settings(symbols)))))
    world.script.append((START, lambda src: src.decide(activation("slow"))))
    for some in lives:
        for minute in some:
            bars = [Message.of(bar(symbol, minute)) for symbol in symbols]
            world.script.append((START + minute * MINUTE + SECOND // 10, bars))
        with closing(Instance(folder / "journal.db", world, lambda *_: slow)) as instance:
            play(instance.run())
            world.inbox.clear()
            sent, said = path_of(outbox(instance.journal)), instance.replayed()
            shed = list(instance.journal.of_kind(Kind.OVERLOAD))
            counts = instance.sink.counts
    return sent, said, shed, counts


def groups(messages):
    """Of each group message: the minute of its close, how many signals, whether it was shed."""
    told = [json.loads(m.payload) for m in messages if m.topic == "t/groups/1m"]
    minutes = [(to_ns(datetime.fromisoformat(g["close_time"])) - START) // MINUTE for g in told]
    return [(m, len(g["symbols"]), g.get("shed", False)) for m, g in zip(minutes, told, strict=True)]


def test_a_machine_that_keeps_up_sheds_nothing(tmp_path):
    """A minute of work in two minutes of validity, once: the next group is late, and still of use."""
    sent, said, shed, counts = live(tmp_path, {0: 0.01, START + 5 * MINUTE: 30.0})
    assert groups(sent) == [(m, 2 * (m > 2), False) for m in range(1, 13)]
    assert (shed, counts.shed) == ([], 0)
    assert said == sent


def test_the_oldest_groups_are_shed_and_the_newest_come_in_time(tmp_path):
    """Five minutes of standstill: bars that expired meanwhile are stale, what is hardly valid is shed."""
    pace = {0: 0.01, START + 5 * MINUTE: 150.0}
    sent, said, shed, counts = live(tmp_path, pace, 16)
    lost = [(9, 0, True)]  # what took long once is believed to do so once more
    assert groups(sent)[3:] == [(4, 2, False), (5, 2, False), *lost, *((m, 2, False) for m in range(10, 17))]
    assert counts.shed == len(shed) == 1
    assert said == sent


@pytest.mark.parametrize("pace", [45.0, 55.0])
def test_a_machine_that_never_keeps_up_tells_what_it_can_in_time(tmp_path, pace):
    """Work for 90 or 110 seconds a minute: some groups are told, each while it is valid."""
    sent, said, shed, _ = live(tmp_path, {0: pace}, 40)
    kept = [minute for minute, count, _ in groups(sent)[5:] if count]
    assert len(kept) >= 35 * 0.7 * 60 / (2 * pace)
    assert len(groups(sent)) == 40
    assert shed
    assert said == sent


def test_what_was_shed_before_a_kill_stays_shed(tmp_path):
    """The decision is in the journal before it acts: a start forecasts nothing that a replay sheds."""
    world, slow = World(), Slow("slow")
    slow.world, slow.pace = world, {0: 0.01, START + 5 * MINUTE: 150.0}
    world.script.append((START, lambda src: src.decide(revision(settings("A")))))
    world.script.append((START, lambda src: src.decide(activation("slow"))))
    for minute in range(1, 13):
        world.script.append((START + minute * MINUTE, [Message.of(bar("A", minute))]))

    class Killed(BaseException):
        pass

    with closing(Instance(tmp_path / "journal.db", world, lambda *_: slow)) as instance:

        def dies(group):
            assert shed_groups(instance.journal) == {group.key}
            raise Killed

        instance.pipeline.passed = dies
        with pytest.raises(Killed):
            play(instance.run())
        world.inbox.clear()
    slow.pace = {0: 0.0}
    world.time -= 4 * MINUTE  # by its own clock a start would forecast it
    with closing(Instance(tmp_path / "journal.db", world, lambda *_: slow)) as instance:
        play(instance.run())
        sent = path_of(outbox(instance.journal))
        assert [minute for minute, _, was in groups(sent) if was] == [6]
        assert instance.replayed() == sent


@pytest.mark.parametrize(
    ("what", "shed"), [("a journal that is away", 0), ("a clock that is set forward", 1)]
)
def test_an_hour_that_is_no_work_is_not_taken_for_it(tmp_path, what, shed):
    """Waits for a disk or a server are no forecasts; a step of the clock looks like one, once."""
    world = World()
    hour = [60 * MINUTE]

    class Stepped(Spread):
        def forecast(self, windows):
            if what.startswith("a clock") and windows[0].close_time == START + 6 * MINUTE:
                world.time += hour.pop() if hour else 0
            return super().forecast(windows)

    world.script.append((START, lambda src: src.decide(revision(settings("A")))))
    world.script.append((START, lambda src: src.decide(activation("stepped"))))
    for minute in [*range(1, 7), *range(67, 80)]:
        world.script.append((START + minute * MINUTE, [Message.of(bar("A", minute))]))
    with closing(Instance(tmp_path / "journal.db", world, lambda *_: Stepped())) as instance:
        settle = instance.journal.settle

        def settles(progress, messages):
            settle(progress, messages)
            if what.startswith("a journal") and world.time == START + 6 * MINUTE:
                world.time += hour.pop() if hour else 0

        instance.journal.settle = settles
        play(instance.run())
        assert not hour
        assert len(list(instance.journal.of_kind(Kind.OVERLOAD))) == shed
        assert instance.replayed() == path_of(outbox(instance.journal))


def test_a_late_straggler_says_nothing_of_groups(tmp_path):
    """One symbol that took long alone, as behind a model that is prepared, is no pace for all."""
    world, slow = World(), Slow("slow")
    slow.world, slow.pace = world, {0: 0.01}
    names = [chr(ord("A") + k) for k in range(10)]

    def late(_source):
        slow.pace[START + 5 * MINUTE] = 20.0
        world.deliver(Message.of(bar(names[-1], 5)))

    world.script.append((START, lambda src: src.decide(revision(settings(names)))))
    world.script.append((START, lambda src: src.decide(activation("slow"))))
    for minute in range(1, 8):
        came = names[:-1] if minute == 5 else names
        world.script.append((START + minute * MINUTE, [Message.of(bar(name, minute)) for name in came]))
        if minute == 5:
            world.script.append((START + 5 * MINUTE + 20 * SECOND, late))
    with closing(Instance(tmp_path / "journal.db", world, lambda *_: slow)) as instance:
        play(instance.run())
        told = groups(path_of(outbox(instance.journal)))
    assert (5, 1, False) in told
    assert told[-2:] == [(6, 10, False), (7, 10, False)]


def test_what_lacks_before_a_shed_group_is_asked_for(tmp_path):
    """A hole is told of once, with the group right after it, which may be the one that is shed."""
    world, slow = World(), Slow("slow")
    slow.world, slow.pace = world, {0: 0.01, START + 5 * MINUTE: 200.0}
    world.script.append((START, lambda src: src.decide(revision(settings("A")))))
    world.script.append((START, lambda src: src.decide(activation("slow"))))
    for minute in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12):
        world.script.append((START + minute * MINUTE, [Message.of(bar("A", minute))]))
    with closing(Instance(tmp_path / "journal.db", world, lambda *_: slow)) as instance:
        play(instance.run())
        sent = path_of(outbox(instance.journal))
        assert instance.replayed() == sent
    asked = [json.loads(m.payload) for m in sent if m.topic == "t/backfill/1m/A"]
    assert [minute for minute, _, was in groups(sent) if was] == [7]
    assert [hole["bars"] for hole in asked] == [1]
