"""The one who waits: it follows the journal to the state of a recovery, and leads while it is sure."""

import asyncio
import errno
import threading
from contextlib import closing, suppress

import msgspec
import pytest
import structlog

from barcast.daemon import standby
from barcast.daemon.journal import Kind, Progress
from barcast.daemon.notify import Notifier
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.retention import compact
from barcast.daemon.standby import Leadership, Standby
from barcast.daemon.start import Following
from barcast.daemon.store import ModelStore
from barcast.models import DeposedError, JournalLostError
from tests.checks import open_model, story
from tests.daemon.living import until
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.rim import SECOND, Instance, Message, World, activation, play, revision


class Lease:
    """A lease whose server says what it is told to: an epoch, whether it is ours, or that it is away."""

    def __init__(self, *answers):
        self.answers, self.released = list(answers), False

    def take(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    renew = take

    def release(self):
        self.released = True


@pytest.fixture
def quickly(monkeypatch):
    """Spans of time that a test can wait for."""
    for name, seconds in (("LEASE_SECONDS", 0.3), ("RENEW_SECONDS", 0.1), ("TAKE_SECONDS", 0.01)):
        monkeypatch.setattr(standby, name, seconds)


async def both(one):
    """Follow, and take the lease when it can be had."""
    async with asyncio.TaskGroup() as group:
        group.create_task(one.follow())
        return await one.take()


# Following.


@pytest.mark.usefixtures("each_journal")
@pytest.mark.parametrize("every", [1, 7])
def test_following_ends_where_a_recovery_does(tmp_path, every):
    """Looked at again and again while it grows, also across a compaction, a journal gives the same state."""
    world, looks = World(), 0
    world.script.extend(story())
    with closing(Instance(tmp_path / "journal.db", world, open_model)) as instance:
        journal, pipeline = instance.journal, Pipeline(open_model)
        following = Following(journal, pipeline)

        def spy(commit):
            def spied(*args):
                nonlocal looks
                done = commit(*args)
                looks += 1
                if looks == 30:
                    compact(tmp_path, world.time, 10 * SECOND, (), lambda: None)
                if looks % every == 0:
                    following.catch_up()
                return done

            return spied

        journal.append, journal.settle = spy(journal.append), spy(journal.settle)
        asyncio.run(instance.run())
        fresh = Pipeline(open_model)
        assert following.recover() == Following(journal, fresh).recover()
        assert looks > 35
        assert pipeline.state == fresh.state
        assert pipeline.windows.symbols


def test_standby_says_what_it_lacks(tmp_path, quickly):
    """Without the model it is not ready, and says so once; when the model is there, it is."""
    world = World()
    world.script.append((START, lambda src: src.decide(revision(settings()))))
    world.script.append((START, lambda src: src.decide(activation("0123456789abcdef"))))
    world.script += [
        (START + m * MINUTE + SECOND, [Message.of(bar(s, m)) for s in "AB"]) for m in range(1, 9)
    ]
    there = []

    def opened(model, *options):
        if not there:
            return ModelStore(tmp_path / "models", "1m").open(model, *options)
        return open_model("spread", *options)

    with closing(
        Instance(tmp_path / "journal.db", world, lambda _, *options: open_model("spread", *options))
    ) as instance:
        asyncio.run(instance.run())
        pipeline = Pipeline(opened)
        leadership = Leadership(Lease(*[None] * 10_000))
        waits = Standby(Following(instance.journal, pipeline), pipeline, Notifier(None), leadership)
        assert waits.fault

        async def stands_by():
            task = asyncio.create_task(both(waits))
            await until(lambda: "0123456789abcdef" in waits.fault)
            there.append("a model")
            await until(lambda: not waits.fault)
            task.cancel()
            await asyncio.wait([task])

        with structlog.testing.capture_logs() as said:
            play(stands_by())
    events = [line["event"] for line in said if line["event"] != "recovered"]
    assert events == ["standby", "standby_not_ready", "standby_ready"]


# Leading.


def test_lease_is_sure_as_long_as_it_was_renewed(quickly):
    """While the server is away nobody is let through; when it is back and the lease still ours, all are."""

    class Away(Lease):
        away, asked = False, 0

        def renew(self):
            self.asked += 1
            if self.away:
                raise JournalLostError("away")
            return True

    lease = Away(1)

    async def leads():
        leadership = Leadership(lease)
        assert await leadership.take() == 1
        await leadership.sure()
        lease.away = True
        keeping = asyncio.create_task(leadership.keep())
        await until(lambda: lease.asked > 0)
        await asyncio.sleep(standby.LEASE_SECONDS)
        waiting = asyncio.create_task(leadership.sure())
        asked = lease.asked
        await until(lambda: lease.asked > asked)
        assert not waiting.done()
        lease.away = False
        await waiting
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        await leadership.release()

    play(leads())
    assert lease.released


def test_one_that_lost_the_lease_ends(quickly):
    """What another one has is not asked for again."""

    async def leads():
        leadership = Leadership(Lease(1, True, False))
        await leadership.take()
        await leadership.keep()

    with pytest.raises(DeposedError, match="has passed to another instance"):
        play(leads())


def test_server_that_goes_while_one_waits_is_waited_for(tmp_path, quickly):
    """A standby outlives its server's absence, and takes the lease after it."""
    away = JournalLostError("away")

    class Nothing:
        def catch_up(self):
            raise away

    async def waits():
        pipeline = Pipeline(open_model)
        return await both(
            Standby(Nothing(), pipeline, Notifier(None), Leadership(Lease(None, None, away, away, 7)))
        )

    assert play(waits()) == 7


def test_fault_of_our_own_ends_a_standby(quickly):
    """What is no fault of files or of the server is not hidden by the next look."""

    class Broken:
        def catch_up(self):
            raise RuntimeError("a fault of ours")

    async def waits():
        await both(Standby(Broken(), Pipeline(open_model), Notifier(None), Leadership(Lease(*[None] * 1000))))

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a fault of ours")):
        play(waits())


def test_fault_while_the_lease_comes_is_not_swallowed(quickly):
    """A path that may have taken half an event must not serve."""
    go = threading.Event()

    class Broken:
        def catch_up(self):
            go.wait(5)
            raise RuntimeError("half an event was taken")

    async def waits():
        leadership = Leadership(Lease(7))
        one = Standby(Broken(), Pipeline(open_model), Notifier(None), leadership)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(one.follow())
            assert await one.take() == 7
            go.set()
            await reading

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="half an event")):
        play(waits())


def test_server_without_room_does_not_end_the_leader(quickly):
    """It is waited out, as that of a commit is."""

    async def leads():
        leadership = Leadership(Lease(1, OSError(errno.ENOSPC, "server: no room"), *[True] * 100))
        await leadership.take()
        keeping = asyncio.create_task(leadership.keep())
        await asyncio.sleep(0.25)
        await leadership.sure()
        assert not keeping.done()
        keeping.cancel()

    play(leads())


def test_other_settings_of_the_same_model_are_prepared(tmp_path):
    """Another number of steps makes another forecaster, which has seen no symbol yet."""
    made, world = {}, World()

    class Asked(Spread):
        asked = 0

        def forecast(self, windows):
            self.asked += 1
            return super().forecast(windows)

    def opened(*asked):
        return made.setdefault(asked, Asked("m"))

    world.script.append((START, lambda source: source.decide(revision(settings("A")))))
    world.script.append((START, lambda source: source.decide(activation("m"))))
    world.script += [(START + m * MINUTE + SECOND, [Message.of(bar("A", m))]) for m in range(1, 9)]
    with closing(Instance(tmp_path / "journal.db", world, lambda *_: Spread("m"))) as instance:
        play(instance.run())
        pipeline = Pipeline(opened)
        following = Following(instance.journal, pipeline)
        one = Standby(following, pipeline, Notifier(None), Leadership(Lease()))
        following.catch_up()
        one._prepare()
        assert [forecaster.asked for forecaster in made.values()] == [1]
        [number] = instance.journal.append(
            [(world.time, Kind.REVISION, "", msgspec.structs.replace(settings("A"), steps=7).encode())]
        )
        instance.journal.settle(Progress(number, world.time), [])
        following.catch_up()
        one._prepare()
        assert [forecaster.asked for forecaster in made.values()] == [1, 1]
