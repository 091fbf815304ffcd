"""The daemon's verifications: one at a time, each told of, and gone with the daemon."""

import asyncio
import os
from types import SimpleNamespace

import msgspec
import pytest
import structlog

from barcast.daemon import verification
from barcast.daemon.config import load
from barcast.daemon.schedule import scheduler
from barcast.daemon.trainer import children
from barcast.daemon.verification import Place, Report, Result, Verification
from barcast.models import ConfigError
from tests.daemon.living import LEAST, at_work, daemon, until
from tests.daemon.test_metrics import scraped
from tests.fakes import MINUTE, START
from tests.rim import SECOND, play

PLACE = Place("t/signals/1m/A", "A", "2023-11-14T22:20:00Z", "another quantiles")
CLOCK = SimpleNamespace(now=lambda: START + 1440 * MINUTE)
SCHEDULED = LEAST + '[verify]\ncron = "47 4 * * *"\n'


def report(differing=0, **changes):
    """What a verification prints."""
    found = Report(not differing, 4000, differing, 0, 0, (), 1.5, None, (PLACE,) * differing)
    return msgspec.json.encode(msgspec.structs.replace(found, **changes))


def ran(process, times=1, asks=1, since=86_400 * SECOND):
    """A verification that was asked for, once it ended so often; and the log of it."""

    async def story():
        found = Verification(process, CLOCK, since)
        task = asyncio.create_task(found.run())
        for done in range(times):
            for _ in range(asks):
                await found.ask()
            await until(lambda done=done: found.runs.total() == done + 1)
        task.cancel()
        return found

    with structlog.testing.capture_logs() as said:
        return play(story()), said


def answering(status, out, *words, since="2023-11-14T22:14:00Z"):
    """A process that ends so."""

    async def process(verb, arguments, on_line):
        assert (verb, arguments) == ("verify", ["--json", "--since", since])
        for word in words:
            on_line(word)
        return status, out

    return process


def test_what_agrees_is_told():
    """The counts are kept and logged, with the instance's time."""
    found, [line] = ran(answering(0, report()))
    assert (found.runs, found.last.signals, found.ended) == ({Result.agrees: 1}, 4000, CLOCK.now())
    assert (line["event"], line["log_level"], line["signals"]) == ("verified", "info", 4000)


def test_longer_than_time_is_all():
    """A span from before 1970 is that from then on."""
    found, _ = ran(answering(0, report(), since="1970-01-01T00:00:00Z"), since=10**9 * 86_400 * SECOND)
    assert found.runs == {Result.agrees: 1}


def test_a_difference_is_an_error_that_names_the_place():
    """The first places are in the line, by topic, symbol, close and field."""
    found, [line] = ran(answering(1, report(1)))
    assert found.runs == {Result.differs: 1}
    assert (line["event"], line["log_level"], line["differing"]) == ("verify_differs", "error", 1)
    assert line["places"] == ["t/signals/1m/A, symbol A, close 2023-11-14T22:20:00Z: another quantiles"]


@pytest.mark.parametrize(("status", "out"), [(78, b""), (1, b""), (-9, b"{"), (0, b'{"agrees": true}')])
def test_what_dies_has_failed(status, out):
    """Without a report there is no result, whatever the status: the last words are logged, the rest stays."""
    found, [line] = ran(answering(status, out, "one", "error: the model is gone"))
    assert (found.runs, found.last, found.ended) == ({Result.failed: 1}, None, 0)
    assert (line["event"], line["exit_status"]) == ("verify_failed", status)
    assert line["last_words"].endswith("the model is gone")


def test_process_that_cannot_start_has_failed():
    """No memory for another process is told, and the next time it is tried again."""

    async def process(verb, arguments, on_line):
        raise OSError("no memory")

    found, said = ran(process, times=2)
    assert found.runs == {Result.failed: 2}
    assert said[0]["reason"] == "no memory"


def test_one_that_hangs_is_killed(tmp_path, monkeypatch):
    """After its time it is gone, and has failed."""
    monkeypatch.setattr(verification, "LONGEST_SECONDS", 0.5)
    mark = tmp_path / "pid"
    found, [line] = ran(children({"verify": ["sh", "-c", f'echo $$ > "{mark}"; exec sleep 60']}, os.environ))
    assert found.runs == {Result.failed: 1}
    assert "it was killed" in line["reason"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_two_do_not_overlap():
    """What is asked for during a verification is done with it."""
    at_work = most = started = 0

    async def process(verb, arguments, on_line):
        nonlocal at_work, most, started
        at_work, started = at_work + 1, started + 1
        most = max(most, at_work)
        await found[0].ask()
        await asyncio.sleep(0.01)
        at_work -= 1
        return 0, report()

    found = []

    async def story():
        found.append(Verification(process, CLOCK, SECOND))
        task = asyncio.create_task(found[0].run())
        await found[0].ask()
        await until(lambda: found[0].runs.total() == 1)
        await asyncio.sleep(0.02)
        assert started == 1
        await found[0].ask()
        await until(lambda: found[0].runs.total() == 2)
        task.cancel()

    play(story())
    assert (most, started) == (1, 2)


def test_it_ends_with_the_daemon(tmp_path):
    """A daemon that stops leaves no verification behind."""
    mark = tmp_path / "pid"

    async def story():
        process = children({"verify": ["sh", "-c", f'echo $$ > "{mark}"; exec sleep 60']}, os.environ)
        found = Verification(process, CLOCK, SECOND)
        task = asyncio.create_task(found.run())
        await found.ask()
        await until(lambda: mark.exists() and mark.read_text().endswith("\n"))
        task.cancel()
        await asyncio.wait([task])

    play(story())
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_metrics_after_a_difference(tmp_path):
    """The schedule starts the process of the daemon's own; what it prints is on /metrics."""
    made = daemon(tmp_path, SCHEDULED.replace("47 4", "* * *"), START)
    answer = tmp_path / "report"
    answer.write_bytes(report(2, missing=1))
    made.children = children({"verify": ["sh", "-c", f'cat "{answer}"; exit 1', "verify"]}, os.environ)

    async def story():
        async with at_work(made):
            before = await scraped(made)
            task = asyncio.create_task(made.verification.run())
            planner = scheduler(made._jobs())
            planner.start()
            await until(lambda: made.verification.runs.total() > 0)
            planner.shutdown(wait=False)
            task.cancel()
            return before, await scraped(made)

    before, after = play(story())
    assert before["barcast_verify_scheduled",] == 1
    assert ("barcast_verify_signals",) not in before
    assert after["barcast_verify_signals",] == 4000
    assert after["barcast_verify_differing_messages",] == 3
    assert after["barcast_verify_seconds",] == 1.5
    assert after["barcast_verify_last_timestamp_seconds",] == pytest.approx(START / 1e9, abs=60)
    assert after["barcast_verify_runs_total", "differs"] >= 1


def test_without_the_table_there_is_none(tmp_path):
    """No schedule, and a metric that says so."""
    made = daemon(tmp_path, LEAST, START)

    async def story():
        async with at_work(made):
            return made._jobs(), await scraped(made)

    jobs, metrics = play(story())
    assert (jobs, metrics["barcast_verify_scheduled",]) == ({}, 0)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('cron = "0 4 * *"', "verify.cron: '0 4 * *' has 4 fields"),
        ('cron = "0 4 * * 0"', "verify.cron: '0 4 * * 0' numbers a weekday"),
        ('since = "1d"', "verify.cron: missing"),
        ('cron = "0 4 * * *"\nsince = "a day"', "verify.since: write a duration"),
    ],
)
def test_wrong_schedule_names_its_table(tmp_path, table, said):
    """A fault of [verify] is not said of [retrain]."""
    path = tmp_path / "barcast.toml"
    path.write_text(f"{LEAST}[verify]\n{table}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert said in str(caught.value)
    assert "retrain" not in str(caught.value)
