"""The one who waits: it follows the journal to the state of a recovery, and leads while it is sure."""

import asyncio
from contextlib import closing, suppress

import pytest
import structlog

from barcast.daemon import standby
from barcast.daemon.notify import Notifier
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.retention import compact
from barcast.daemon.standby import Leadership, Standby
from barcast.daemon.start import Following
from barcast.daemon.store import ModelStore
from barcast.models import CheckpointError, DeposedError, JournalLostError
from tests.checks import open_model, story
from tests.daemon.living import until
from tests.fakes import MINUTE, START, bar, settings
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
        waits = Standby(Following(instance.journal, pipeline), pipeline, Notifier(None))
        assert waits.fault

        async def stands_by():
            stop, faults = asyncio.Event(), []
            lease = Lease(*[None] * 10_000)
            task = asyncio.create_task(waits.wait(Leadership(lease), stop))
            await until(lambda: "0123456789abcdef" in waits.fault)
            faults.append(waits.fault)
            there.append("a model")
            await until(lambda: not waits.fault)
            stop.set()
            assert await task is None
            return faults

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
        one = Standby(Nothing(), pipeline, Notifier(None))
        return await one.wait(Leadership(Lease(None, None, away, away, 7)), asyncio.Event())

    assert play(waits()) == 7


def test_fault_of_our_own_ends_a_standby(quickly):
    """What is no fault of files or of the server is not hidden by the next look."""

    class Broken:
        def catch_up(self):
            raise RuntimeError("a fault of ours")

    async def waits():
        one = Standby(Broken(), Pipeline(open_model), Notifier(None))
        await one.wait(Leadership(Lease(*[None] * 1000)), asyncio.Event())

    with pytest.raises(RuntimeError, match="a fault of ours"):
        play(waits())


def test_missing_model_is_the_error_that_it_is(tmp_path):
    """The control of the store: a model that is not there is a CheckpointError."""
    with pytest.raises(CheckpointError):
        ModelStore(tmp_path, "1m").open("0123456789abcdef", None, None)
