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
    lost = [(9, 0, True), (10, 0, True)]  # what took long once is believed to do so twice
    assert groups(sent)[3:] == [(4, 2, False), (5, 2, False), *lost, *((m, 2, False) for m in range(11, 17))]
    assert counts.shed == len(shed) == 2
    assert said == sent


@pytest.mark.parametrize("pace", [45.0, 55.0, 80.0])
def test_a_machine_that_never_keeps_up_tells_what_it_can_in_time(tmp_path, pace):
    """Work for 90, 110 or 160 seconds a minute: some groups are told, each while it is valid."""
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
