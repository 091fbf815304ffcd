"""The scheduled job: it promotes what the gate accepted, and survives whatever its subprocesses do."""

import asyncio
import os
import sys
import time
from datetime import UTC, datetime

import msgspec
import pytest
from structlog.testing import capture_logs

from barcast.daemon.gate import Verdict
from barcast.daemon.schedule import Retrainer, cron, scheduler
from barcast.models import ConfigError

TRAINS = (
    "import pathlib, sys; out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
    "out.mkdir(); (out / 'model.json').write_text('{}')"
)
ACCEPTED = Verdict(accepted=True, reason="better", challenger="new", champion="old", origins=60)
REFUSED = Verdict(accepted=False, reason="worse", challenger="new", champion="old", origins=60)


def python(program):
    """The argument list that runs a program; what is added to it is in its sys.argv."""
    return [sys.executable, "-c", program]


def says(verdict):
    """A gate that prints a verdict."""
    return f"print({msgspec.json.encode(verdict).decode()!r})"


class Job:
    """A retrainer in a folder, and what it asked its owner to do."""

    def __init__(self, folder, train=TRAINS, gate="", timeout=20.0):
        self.promoted, self.refused = [], []
        self.train, self.gate = train, gate
        self.retrainer = Retrainer(
            folder,
            lambda: python(self.train),
            lambda: python(self.gate),
            timeout,
            self._promote,
            self._refuse,
        )

    async def _promote(self, challenger, verdict):
        self.promoted.append((challenger.name, (challenger / "model.json").is_file(), verdict))

    async def _refuse(self, verdict):
        self.refused.append(verdict)

    def run(self):
        """Run the job once, under asyncio's debug mode; return the names of the events that it logged."""
        with capture_logs() as logs:
            asyncio.run(self.retrainer.run(), debug=True)
        self.logs = {entry["event"]: entry for entry in logs}
        return [entry["event"] for entry in logs]


def offer(folder, name):
    """Put a checkpoint into the inbox, as an operator would."""
    (folder / "challengers" / name).mkdir(parents=True)
    (folder / "challengers" / name / "model.json").write_text("{}")


def fires(expression, after):
    """The next moment at which a cron expression fires."""
    return cron(expression).get_next_fire_time(None, after)


def test_five_fields_begin_with_the_minute():
    """Five fields mean minute, hour, day, month, weekday, at second 0 and in UTC."""
    noon = datetime(2026, 3, 28, 12, 0, 1, tzinfo=UTC)
    assert fires("30 3 * * *", noon) == datetime(2026, 3, 29, 3, 30, tzinfo=UTC)
    assert fires("0 3 * * sun", noon) == datetime(2026, 3, 29, 3, 0, tzinfo=UTC)


def test_six_fields_begin_with_the_second():
    """A sixth field in front is the second."""
    noon = datetime(2026, 3, 28, 12, 0, 1, tzinfo=UTC)
    assert fires("15 30 3 * * *", noon) == datetime(2026, 3, 29, 3, 30, 15, tzinfo=UTC)
    assert fires("*/20 * * * * *", noon) == datetime(2026, 3, 28, 12, 0, 20, tzinfo=UTC)


def test_the_machine_s_zone_does_not_matter(monkeypatch):
    """Where the host's zone skips an hour, the job still runs at that hour of UTC."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        skipped = fires("30 2 8 3 *", datetime(2026, 3, 8, 0, 0, tzinfo=UTC))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert skipped == datetime(2026, 3, 8, 2, 30, tzinfo=UTC)


def test_weekdays_are_named():
    """Weekdays are names, alone, in ranges and lists."""
    friday = datetime(2026, 3, 27, 12, 0, tzinfo=UTC)
    assert fires("0 3 * * mon-fri", friday).strftime("%a") == "Mon"
    assert fires("0 3 * * sun,sat", friday).strftime("%a") == "Sat"


@pytest.mark.parametrize("weekday", ["0", "7", "1-5", "mon,6"])
def test_numbered_weekday_is_refused(weekday):
    """A number would be another day to cron than to the scheduler, so it is not guessed."""
    with pytest.raises(ConfigError, match=r"numbers a weekday.*write mon to sun"):
        cron(f"0 3 * * {weekday}")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "0 fields; write five, or six with seconds"),
        ("0 3 * *", "4 fields"),
        ("0 0 3 * * * *", "7 fields"),
        ("0 24 * * *", "0 24"),
        ("0 3 * * someday", "someday"),
        ("x 3 * * *", "x 3"),
    ],
)
def test_expression_that_means_nothing_is_refused(expression, said):
    """A wrong expression is a fault of the configuration, said with the expression."""
    with pytest.raises(ConfigError, match=r"retrain\.cron: ") as caught:
        cron(expression)
    assert said in str(caught.value)


def test_scheduler_calls_the_job():
    """A planner that was started calls the job when its time comes."""

    async def main():
        called = asyncio.Event()

        async def job():
            called.set()

        planner = scheduler("* * * * * *", job)
        planner.start()
        async with asyncio.timeout(5):
            await called.wait()
        planner.shutdown(wait=False)
        return called.is_set()

    assert asyncio.run(main())


def test_missed_run_is_made_up_once():
    """A run that the machine slept through is run once when it wakes, never twice and never beside itself."""

    async def job():
        raise AssertionError

    job = scheduler("0 3 * * *", job).get_jobs()[0]
    assert (job.misfire_grace_time, job.coalesce, job.max_instances) == (None, True, 1)


def test_accepted_challenger_is_promoted_and_cleared_away(tmp_path):
    """A better model is handed over with its verdict while it is there, and then its folder goes."""
    job = Job(tmp_path, gate=says(ACCEPTED))
    events = job.run()
    assert job.promoted == [("trained", True, ACCEPTED)]
    assert job.refused == []
    assert list((tmp_path / "challengers").iterdir()) == []
    assert not (tmp_path / "refused").exists()
    assert events == ["retrain_started", "challenger_judged"]


def test_refused_challenger_is_kept_aside(tmp_path):
    """A worse model is announced and moved to refused/, where the next of its name replaces it."""
    job = Job(tmp_path, gate=says(REFUSED))
    for run in (1, 2):
        job.run()
        assert job.refused == [REFUSED] * run
        assert [p.name for p in (tmp_path / "refused").iterdir()] == ["trained"]
    assert job.promoted == []
    assert list((tmp_path / "challengers").iterdir()) == []


def test_offered_challengers_are_judged_before_the_trained_one(tmp_path):
    """What was put into the inbox is judged first, in order of name; folders without a model are left."""
    for name in ("b", "a"):
        offer(tmp_path, name)
    (tmp_path / "challengers" / "unfinished").mkdir()
    job = Job(tmp_path, gate=says(ACCEPTED))
    job.run()
    assert [name for name, _, _ in job.promoted] == ["a", "b", "trained"]
    assert [p.name for p in (tmp_path / "challengers").iterdir()] == ["unfinished"]


def test_gate_is_told_which_folder(tmp_path):
    """The gate's last argument is the challenger's folder."""
    verdict = says(ACCEPTED).replace("better", "' + sys.argv[-1].replace(chr(92), '/') + '")
    job = Job(tmp_path, gate="import sys\n" + verdict)
    job.run()
    [(_, _, given)] = job.promoted
    assert given.reason == str(tmp_path / "challengers" / "trained")


DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
EXITS = "import sys; print('one\\nmissing key', file=sys.stderr); sys.exit(78)"


@pytest.mark.parametrize(
    ("train", "gate", "event"),
    [
        (DIES, says(ACCEPTED), ("train_failed", "exit_status", -9)),
        (EXITS, says(ACCEPTED), ("train_failed", "exit_status", 78)),
        (EXITS, says(ACCEPTED), ("train_failed", "last_words", "one\nmissing key")),
        (TRAINS, DIES, ("gate_failed", "exit_status", -9)),
        (TRAINS, says(ACCEPTED) + "\nraise SystemExit(1)", ("gate_failed", "exit_status", 1)),
        (TRAINS, "print('accepted')", ("retrain_failed", "exc_info", True)),
        (TRAINS, "print('{\"accepted\": true}')", ("retrain_failed", "exc_info", True)),
        (TRAINS, "", ("retrain_failed", "exc_info", True)),
    ],
    ids=["killed", "exits", "last words", "gate killed", "verdict and failure", "word", "half", "nothing"],
)
def test_failed_subprocess_changes_nothing(tmp_path, train, gate, event):
    """Whatever a subprocess does, nobody is promoted, the log says why, and the next run works."""
    job = Job(tmp_path, train, gate)
    job.run()
    name, key, value = event
    assert job.logs[name][key] == value
    assert (job.promoted, job.refused) == ([], [])
    job.train, job.gate = TRAINS, says(ACCEPTED)
    job.run()
    assert job.promoted == [("trained", True, ACCEPTED)]


def test_command_that_is_not_there_changes_nothing(tmp_path):
    """A trainer that cannot even be started is logged and changes nothing."""
    job = Job(tmp_path)
    job.retrainer._train = lambda: [str(tmp_path / "absent")]
    assert job.run() == ["retrain_started", "retrain_failed"]
    assert job.promoted == []


def alive(pid):
    """Whether a process is there, as a zombie too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("stubborn", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"])
def test_hanging_subprocess_is_killed(tmp_path, stubborn):
    """A trainer that takes too long is killed and reaped, and promotes nobody."""
    note = tmp_path / "pid"
    hangs = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\n{stubborn}time.sleep(60)"
    job = Job(tmp_path, hangs, says(ACCEPTED), timeout=0.7)
    began = time.monotonic()
    job.run()
    assert time.monotonic() - began < 5
    assert job.logs["train_timed_out"]["seconds"] == 0.7
    assert job.promoted == []
    assert not alive(int(note.read_text()))


def test_stopped_job_takes_its_subprocess_along(tmp_path):
    """When the daemon stops during a training, the trainer ends with it."""
    note = tmp_path / "pid"
    hangs = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    job = Job(tmp_path, hangs)

    async def main():
        task = asyncio.create_task(job.retrainer.run())
        for _ in range(500):
            if note.exists() and note.read_text():
                break
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main(), debug=True)
    assert not alive(int(note.read_text()))


def test_promotion_that_fails_keeps_the_challenger(tmp_path):
    """A challenger that could not take over stays in the inbox and is judged again by the next run."""
    offer(tmp_path, "a")
    job = Job(tmp_path, EXITS, says(ACCEPTED))
    promote = job.retrainer._promote

    async def fails(challenger, verdict):
        raise OSError("disk full")

    job.retrainer._promote = fails
    assert job.run() == ["retrain_started", "challenger_judged", "retrain_failed"]
    job.retrainer._promote = promote
    job.run()
    assert job.promoted == [("a", True, ACCEPTED)]


def test_one_damaged_challenger_does_not_hide_the_others(tmp_path):
    """A challenger that the gate cannot judge leaves the way free for the next one and the trained one."""
    offer(tmp_path, "a")
    gate = f"import sys\nif sys.argv[-1].endswith('/a'): sys.exit(78)\n{says(ACCEPTED)}"
    job = Job(tmp_path, gate=gate)
    job.run()
    assert [name for name, _, _ in job.promoted] == ["trained"]


def blames(path):
    """A program that ends as the command line does on a fault in a file."""
    return f"import sys; print('error:', {path} + ': not JSON; copy it again', file=sys.stderr); sys.exit(78)"


def test_challenger_that_cannot_be_opened_is_set_aside(tmp_path):
    """A damaged challenger is named in one line, kept as it is in refused/, and not judged again."""
    offer(tmp_path, "a")
    job = Job(tmp_path, train=EXITS, gate=blames("sys.argv[-1]"))
    assert job.run() == ["retrain_started", "challenger_unusable", "train_failed"]
    line = job.logs["challenger_unusable"]
    assert (line["name"], line["kept_in"]) == ("a", str(tmp_path / "refused" / "a"))
    assert line["last_words"].endswith("challengers/a: not JSON; copy it again")
    assert (tmp_path / "refused" / "a" / "model.json").read_text() == "{}"
    assert job.run() == ["retrain_started", "train_failed"]
    assert (job.promoted, job.refused) == ([], [])


def test_fault_of_another_file_leaves_the_challenger_to_the_next_run(tmp_path):
    """A history that the gate cannot read is no fault of the challenger: it stays, and is judged again."""
    offer(tmp_path, "a")
    job = Job(tmp_path, train=EXITS, gate=blames("'history/bars.csv'"))
    assert job.run() == ["retrain_started", "gate_failed", "train_failed"]
    job.gate = says(ACCEPTED)
    job.run()
    assert job.promoted == [("a", True, ACCEPTED)]


def test_last_words_of_a_training_are_logged(tmp_path):
    """What the trainer says at its end, such as which symbols it left out, is in the daemon's log."""
    job = Job(tmp_path, f"{TRAINS}; print('left out: NEW', file=sys.stderr)", says(ACCEPTED))
    assert job.run() == ["retrain_started", "train_said", "challenger_judged"]
    assert job.logs["train_said"]["last_words"] == "left out: NEW"


def test_loop_stays_free_while_a_subprocess_works(tmp_path):
    """The event loop goes on while a trainer is busy."""
    job = Job(tmp_path, f"import time; time.sleep(1)\n{TRAINS}", says(ACCEPTED))

    async def main():
        task, lags, loop = asyncio.create_task(job.retrainer.run()), [], asyncio.get_running_loop()
        while not task.done():
            asleep = loop.time()
            await asyncio.sleep(0.01)
            lags.append(loop.time() - asleep)
        return lags

    lags = asyncio.run(main(), debug=True)
    assert len(lags) > 20
    assert max(lags) < 0.8
    assert len(job.promoted) == 1
