"""Retraining: it promotes what the gate accepted, and survives whatever its subprocesses do."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from barcast.daemon import retraining
from barcast.daemon.gate import Verdict
from barcast.daemon.panel import Board, TrainingSettings
from barcast.daemon.retraining import Result, Retraining, Serving
from barcast.daemon.trainer import children
from barcast.models import ConfigError, DataError, DiskFullError

TRAINS = (
    "import pathlib, sys; out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
    "out.mkdir(); (out / 'model.json').write_text('{}')"
)
ACCEPTED_BY = (
    "import sys, json; print(json.dumps({'accepted': True, 'reason': 'better', 'challenger': 'new', "
    "'champion': WHOM}))"
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
    """A retraining in a folder, and what it asked its owner to do."""

    def __init__(self, folder, train=TRAINS, gate="", timeout=20.0, stall=20.0, left=()):
        self.promoted, self.refused, self.champion = [], [], "old"
        self.train, self.gate = train, gate
        self.left, self.margin, self.folder = left, 0.0, folder
        self.limits, self.told = (timeout, stall), []

    def start(self, listen=None):
        """The retraining, as it is after a start, and who listens to its board."""
        commands = Commands(self)
        run = children(commands, dict(os.environ))

        def news():
            self.told.append(json.loads(board.encode()))
            if listen is not None:
                listen(self.told[-1])

        board = Board(lambda: 7, news)
        return Retraining(
            self.folder,
            run,
            self._serving,
            *self.limits,
            lambda *given: self.promote(*given),
            self._refuse,
            board,
        )

    def _serving(self):
        return Serving(self.champion, self.margin, self.left)

    async def promote(self, challenger, verdict, champion):
        self.promoted.append((challenger.name, (challenger / "model.json").is_file(), verdict))
        return True

    async def _refuse(self, verdict):
        self.refused.append(verdict)

    def run(self, reasons=()):
        """Run once, under asyncio's debug mode; return the names of the events that it logged."""

        async def main():
            self.retraining = self.start()
            self.result = await self.retraining.run(reasons)

        with capture_logs() as logs:
            asyncio.run(main(), debug=True)
        self.logs = {entry["event"]: entry for entry in logs}
        return [entry["event"] for entry in logs]


class Commands:
    """The programs of a job as they are now."""

    def __init__(self, job):
        self.job = job

    def __getitem__(self, verb):
        program = {"train": self.job.train, "gate": self.job.gate}[verb]
        return [str(program)] if isinstance(program, os.PathLike) else python(program)


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """A run is not tried again, unless a test says so."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", ())


def offer(folder, name):
    """Put a checkpoint into the inbox, as an operator would."""
    (folder / "challengers" / name).mkdir(parents=True)
    (folder / "challengers" / name / "model.json").write_text("{}")


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
        assert sorted(p.name for p in (tmp_path / "refused").iterdir()) == ["trained", "trained.json"]
        assert json.loads((tmp_path / "refused" / "trained.json").read_bytes())["reason"] == "worse"
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
    job.train = tmp_path / "absent"
    assert job.run() == ["retrain_started", "train_failed", "retrain_given_up"]
    assert str(job.train) in job.logs["train_failed"]["reason"]
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
    assert job.result == Result.failed
    assert job.promoted == []
    assert not alive(int(note.read_text()))


def test_stopped_job_takes_its_subprocess_along(tmp_path):
    """When the daemon stops during a training, the trainer ends with it."""
    note = tmp_path / "pid"
    hangs = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    job = Job(tmp_path, hangs)

    async def main():
        task = asyncio.create_task(job.start().run([]))
        for _ in range(500):
            if note.exists() and note.read_text():
                break
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main(), debug=True)
    assert not alive(int(note.read_text()))


def test_challenger_that_cannot_take_over_is_set_aside(tmp_path):
    """One whose preparation fails is not judged again and again: it is kept in refused/ with the reason."""
    offer(tmp_path, "a")
    job = Job(tmp_path, EXITS, says(ACCEPTED))

    async def fails(challenger, verdict, champion):
        raise RuntimeError("shapes cannot be multiplied")

    job.promote = fails
    assert job.run() == ["retrain_started", "challenger_judged", "promotion_failed", "train_failed"]
    reason = "it could not take over: shapes cannot be multiplied"
    assert [(v.accepted, v.reason) for v in job.refused] == [(False, reason)]
    assert json.loads((tmp_path / "refused" / "a.json").read_bytes())["reason"] == reason
    assert (tmp_path / "refused" / "a" / "model.json").is_file()
    assert list((tmp_path / "challengers").iterdir()) == []


def counted(path):
    """A trainer that notes each of its runs."""
    return f"open({str(path)!r}, 'a').write('x')\n{TRAINS}"


@pytest.mark.parametrize(
    "fault",
    [DiskFullError("no room"), OSError(errno.ENOSPC, "no room"), DataError("history/b.csv, row 1: ...")],
    ids=["disk", "copy", "history"],
)
def test_challenger_waits_for_what_is_no_fault_of_its_own(tmp_path, monkeypatch, fault):
    """Without room, or with a history that cannot be read, it stays and is judged again, none is trained."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", (0.01,) * 3)
    count = tmp_path / "trainings"
    job = Job(tmp_path, counted(count), says(ACCEPTED))
    asked = []

    async def fails_twice(challenger, verdict, champion):
        asked.append(challenger.name)
        if len(asked) < 3:
            raise fault
        return True

    job.promote = fails_twice
    events = job.run()
    assert asked == ["trained"] * 3
    assert count.read_text() == "x"
    assert job.result == Result.promoted
    assert events.count("promotion_postponed") == 2
    assert (job.refused, list((tmp_path / "challengers").iterdir())) == ([], [])


def test_verdict_waits_for_room(tmp_path, monkeypatch):
    """On a full disk a refused challenger stays; with room it is judged again, told of and set aside."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", (0.01,))
    count, write, faults = tmp_path / "trainings", Path.write_bytes, [OSError(errno.ENOSPC, "no room")]

    def full(path, what):
        if faults:
            raise faults.pop()
        return write(path, what)

    monkeypatch.setattr(Path, "write_bytes", full)
    job = Job(tmp_path, counted(count), says(REFUSED))
    job.run()
    assert count.read_text() == "x"
    assert job.refused == [REFUSED]
    assert sorted(p.name for p in (tmp_path / "refused").iterdir()) == ["trained", "trained.json"]


@pytest.mark.parametrize("verdict", [ACCEPTED, REFUSED], ids=["accepted", "refused"])
def test_challenger_that_cannot_be_moved_is_named_and_passed_over(tmp_path, monkeypatch, verdict):
    """One that another user laid there is told of; the training that was asked for takes place."""
    offer(tmp_path, "a")

    def of_others(function):
        def may_not(path, *given, **named):
            if path.name == "a":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *given, **named)

        return may_not

    monkeypatch.setattr(Path, "rename", of_others(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", of_others(shutil.rmtree))
    job = Job(tmp_path, gate=says(verdict))
    events = job.run()
    assert events.count("challenger_judged") == 2
    line = job.logs["challenger_stuck"]
    assert (line["name"], line["log_level"]) == ("a", "error")
    assert "give it to the daemon's user" in line["remedy"]
    assert [p.name for p in (tmp_path / "challengers").iterdir()] == ["a"]


def test_folder_that_cannot_be_looked_into_is_passed_over(tmp_path, monkeypatch):
    """One that only another user may read is told of, too."""
    offer(tmp_path, "a")
    looks = Path.is_file

    def may_not(path):
        if path.parent.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looks(path)

    monkeypatch.setattr(Path, "is_file", may_not)
    job = Job(tmp_path, gate=says(ACCEPTED))
    assert job.run() == ["retrain_started", "challenger_stuck", "challenger_judged"]


def test_half_written_checkpoint_is_not_judged(tmp_path):
    """A name that begins with a dot is that of a copy under way, or of one that was killed."""
    offer(tmp_path, ".trained.0123456789abcdef.new")
    job = Job(tmp_path, gate=says(ACCEPTED))
    job.run()
    assert [name for name, _, _ in job.promoted] == ["trained"]


def test_challenger_is_judged_again_when_another_model_took_over_meanwhile(tmp_path):
    """A verdict holds against the champion it was made on: after a rollback it is asked for again."""
    offer(tmp_path, "a")
    says_whom = ACCEPTED_BY.replace("WHOM", "sys.argv[sys.argv.index('--champion') + 1]")
    job = Job(tmp_path, EXITS, says_whom)
    asked = []

    async def overtaken(challenger, verdict, champion):
        asked.append((champion, verdict.champion))
        job.champion = "older"
        return len(asked) > 1

    job.promote = overtaken
    job.run()
    assert asked == [("old", "old"), ("older", "older")]


def test_model_that_was_rolled_back_from_does_not_return(tmp_path):
    """However good its score, a model that an operator left behind is refused."""
    job = Job(tmp_path, gate=says(ACCEPTED), left=("new",))
    job.run()
    assert job.promoted == []
    [verdict] = job.refused
    assert "rolled back from" in verdict.reason


def test_margin_of_the_moment_is_asked(tmp_path):
    """The gate is told who serves and what must be gained."""
    said = ACCEPTED_BY.replace("WHOM", "' '.join(sys.argv[1:5])")
    job = Job(tmp_path, gate=said)
    job.margin = 0.25
    job.run()
    [(_, _, verdict)] = job.promoted
    assert verdict.champion == "--champion old --margin 0.25"


def test_reasons_are_in_the_verdict(tmp_path):
    """Subscribers see why a model was trained."""
    job = Job(tmp_path, gate=says(REFUSED))
    job.run(["schedule", "drift"])
    assert job.refused[0].triggers == ("schedule", "drift")
    assert job.result == Result.refused


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
        task, lags, loop = asyncio.create_task(job.start().run([])), [], asyncio.get_running_loop()
        while not task.done():
            asleep = loop.time()
            await asyncio.sleep(0.01)
            lags.append(loop.time() - asleep)
        return lags

    lags = asyncio.run(main(), debug=True)
    assert len(lags) > 20
    assert max(lags) < 0.8
    assert len(job.promoted) == 1


SPEAKS = "import sys, time\nfor _ in range(8): print('step', file=sys.stderr, flush=True); time.sleep(0.1)\n"


def test_trainer_that_falls_silent_is_killed(tmp_path):
    """One that is stopped says nothing any more: it is taken for dead long before its time is over."""
    note = tmp_path / "pid"
    hangs = f"import os, signal\nopen({str(note)!r}, 'w').write(str(os.getpid()))\n"
    job = Job(tmp_path, hangs + "os.kill(os.getpid(), signal.SIGSTOP)", says(ACCEPTED), 20.0, 0.7)
    assert job.run() == ["retrain_started", "train_stalled", "retrain_given_up"]
    assert not alive(int(note.read_text()))
    assert job.promoted == []


def test_trainer_that_speaks_is_not_taken_for_dead(tmp_path):
    """Every line is a sign of life, however long the training is."""
    job = Job(tmp_path, SPEAKS + TRAINS, says(ACCEPTED), 20.0, 0.6)
    job.run()
    assert len(job.promoted) == 1


def test_gate_that_falls_silent_is_killed(tmp_path):
    """The judge is watched like the trainer."""
    job = Job(tmp_path, TRAINS, "import time; time.sleep(60)", 20.0, 0.7)
    assert "gate_stalled" in job.run()
    assert job.result == Result.failed


def test_failed_training_is_tried_again_and_given_up(tmp_path, monkeypatch):
    """It is tried again after each pause, then left until the next reason; a fault of a person's at once."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", (0.01, 0.01))
    job = Job(tmp_path, DIES, says(ACCEPTED))
    tries = ["train_failed", "retrain_waits"] * 2 + ["train_failed", "retrain_given_up"]
    assert job.run() == ["retrain_started", *tries]
    job.train = EXITS
    assert job.run() == ["retrain_started", "train_failed"]
    assert job.result == Result.failed


def test_second_try_judges_what_the_first_trained(tmp_path, monkeypatch):
    """A gate that died is called again; the training is not repeated."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", (0.01,))
    count, once = tmp_path / "trainings", tmp_path / "died"
    gate = f"import pathlib\np = pathlib.Path({str(once)!r})\nif not p.exists():\n  p.touch(); {DIES}\n"
    job = Job(tmp_path, f"open({str(count)!r}, 'a').write('x')\n{TRAINS}", gate + says(ACCEPTED))
    job.run()
    assert job.result == Result.promoted
    assert count.read_text() == "x"


def test_requests_during_a_run_cause_one_more(tmp_path):
    """However many come, with whatever reasons, while a training is under way."""
    job = Job(tmp_path, f"import time; time.sleep(0.3)\n{TRAINS}", says(REFUSED))

    async def main():
        supervisor, taken = job.start(), []
        supervisor.ask("schedule")
        for _ in range(2):
            reasons = await supervisor.wanted()
            taken.append(reasons)
            running = asyncio.create_task(supervisor.run(reasons))
            await asyncio.sleep(0.1)
            if len(taken) == 1:
                for reason in ("drift", "age", "drift"):
                    supervisor.ask(reason)
            await running
        waiting = asyncio.create_task(supervisor.wanted())
        await asyncio.sleep(0.05)
        waiting.cancel()
        return taken, supervisor.runs

    taken, runs = asyncio.run(main(), debug=True)
    assert taken == [("schedule",), ("drift", "age")]
    assert runs == {Result.refused: 2}


def test_who_asks_can_follow_the_run_to_its_end(tmp_path):
    """The lines of the trainer and the verdict are told, of the run that was asked for."""
    job = Job(tmp_path, SPEAKS + TRAINS, says(REFUSED))

    async def main():
        supervisor, lines = job.start(), []
        first = asyncio.create_task(supervisor.run(["schedule"]))
        await asyncio.sleep(0.3)
        following = asyncio.create_task(supervisor.follow("asked", lines.append))
        await first
        assert not following.done()
        await supervisor.run(await supervisor.wanted())
        return await following, lines

    result, lines = asyncio.run(main(), debug=True)
    assert result == Result.refused
    assert lines.count("challenger new: refused; worse") == 2  # of the run under way, and of its own
    assert lines.count("step") > 8


GIVES_WAY = (
    "import os, sys, time\nfrom barcast.daemon.trainer import give_way\n"
    "give_way(5, os.getppid() if sys.argv[1] == 'mine' else 1 << 22)\n"
    "print(os.getpid(), os.nice(0), open('/proc/self/oom_score_adj').read().strip(), flush=True)\n"
    "time.sleep(60)"
)


def test_trainer_ends_with_whoever_started_it(tmp_path):
    """After kill -9 of its parent, the kernel kills it; one whose parent is gone already ends by itself."""
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {GIVES_WAY!r}, 'mine'])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid, niceness, oom = process.stdout.readline().split()
    assert (int(niceness) - os.nice(0), oom) == (5, "1000")
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not alive(int(pid)):
            break
        time.sleep(0.05)
    assert not alive(int(pid))
    orphan = subprocess.run([sys.executable, "-c", GIVES_WAY, "gone"], timeout=20)
    assert orphan.returncode == 1


def test_trainer_has_one_thread_of_each_library(tmp_path):
    """What bounds threads is in its environment, whatever the daemon's says."""
    program = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['POLARS_MAX_THREADS'])"
    run = children({"train": python(program)}, {**os.environ, "OMP_NUM_THREADS": "64"})
    status, out = asyncio.run(run("train", [], print))
    assert (status, out) == (0, b"1 1\n")


def test_long_lines_and_no_last_newline_are_heard(tmp_path):
    """A line longer than any buffer is cut, and what comes last counts without its end."""
    program = "import sys; sys.stderr.write('x' * 300000 + '\\n' + 'end')"
    lines = []
    asyncio.run(children({"train": python(program)}, dict(os.environ))("train", [], lines.append))
    assert [line[:3] for line in lines] == ["xxx", "end"]


TELLS = TRAINS.replace("write_text('{}')", "write_text(repr(sys.argv))")
"""A training whose model is its own command line."""


def test_settings_are_handed_to_the_training(tmp_path):
    """They go with the training that was asked for, and with none after it; the board tells them."""
    job, wanted = Job(tmp_path, TELLS, says(REFUSED)), TrainingSettings(kind="ldm4ts", image=128, rate=0.01)

    async def main():
        made = job.start()
        found = []
        for settings in (wanted, None):
            made.ask("asked for", settings)
            await made.run(await made.wanted())
            found.append((tmp_path / "refused" / "trained" / "model.json").read_text())
        return found

    first, second = asyncio.run(main())
    assert repr(wanted.encode()) in first
    assert "--settings" not in second
    assert job.told[0]["settings"] == {"kind": "ldm4ts", "image": 128, "rate": 0.01}
    assert job.told[-1]["settings"] is None
    assert (job.told[-1]["running"], job.told[-1]["result"]) == (False, "refused")
    assert job.told[-1]["lines"][-1] == "challenger new: refused; worse"


def test_what_was_left_by_another_training_is_not_judged_for_settings(tmp_path):
    """A model that an earlier run could not have judged makes way for the one that is wanted now."""
    offer(tmp_path, "trained")
    job = Job(tmp_path, TELLS, says(REFUSED))

    async def main():
        made = job.start()
        made.ask("asked for", TrainingSettings())
        await made.run(await made.wanted())

    asyncio.run(main())
    assert "--settings" in (tmp_path / "refused" / "trained" / "model.json").read_text()


HANGS = "import sys, time; print('at it', file=sys.stderr, flush=True); time.sleep(60)"


@pytest.mark.parametrize("train", [HANGS, EXITS.replace("78", "1")], ids=["at work", "between two tries"])
def test_training_can_be_stopped(tmp_path, monkeypatch, train):
    """Its process is gone, it is not tried again, what waited for it is over; the next one works."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", (60.0,))
    job, heard = Job(tmp_path, train, says(ACCEPTED)), asyncio.Event()

    def listen(stand):
        if any("at it" in line or "next try" in line for line in stand["lines"]):
            heard.set()

    async def main():
        made = job.start(listen)
        with pytest.raises(ConfigError, match="no training is under way: there is nothing to stop"):
            made.stop()
        made.ask("first")
        run = asyncio.ensure_future(made.run(await made.wanted()))
        await heard.wait()
        follower = asyncio.ensure_future(made.follow("second", lambda _: None))
        await asyncio.sleep(0)
        said = made.stop()
        result = await run
        assert await follower is Result.stopped
        assert not made.running
        job.train = TRAINS
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(made.wanted(), 0.05)
        made.ask("third")
        return said, result, await made.run(await made.wanted())

    began = time.monotonic()
    said, result, after = asyncio.run(main())
    assert time.monotonic() - began < 30
    assert said.startswith("the training ends")
    assert (result, after) == (Result.stopped, Result.promoted)
    assert "stopped" in [each.get("result") for each in job.told]


def heard_of(words, heard):
    """Sets `heard` once the board has said one of the words."""
    return lambda stand: any(word in line for line in stand["lines"] for word in words) and heard.set()


def test_what_is_stopped_while_it_is_judged_does_not_come_back(tmp_path):
    """It is dropped: the next run trains anew. What took over before stays, and who follows hears the end."""
    offer(tmp_path, "a")
    job, heard = Job(tmp_path, TELLS, "import sys\n"), asyncio.Event()
    waits = "print('at it', file=sys.stderr, flush=True); import time; time.sleep(60)"
    slow = f"if sys.argv[-1].endswith('trained'):\n    {waits}"
    job.gate += slow + "\n" + says(ACCEPTED)

    async def main():
        made = job.start(heard_of(["at it"], heard))
        first = asyncio.ensure_future(made.follow("first", lambda _: None, TrainingSettings(seed=1)))
        await asyncio.sleep(0)
        run = asyncio.ensure_future(made.run(await made.wanted()))
        await heard.wait()
        second = asyncio.ensure_future(made.follow("second", lambda _: None))
        await asyncio.sleep(0)
        made.stop()
        results = [await run, await first, await second]
        assert not (tmp_path / "challengers" / "trained").exists()
        job.gate = says(REFUSED)
        made.ask("third")
        await made.run(await made.wanted())
        return results

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [Result.promoted] * 3
    assert "--settings" not in (tmp_path / "refused" / "trained" / "model.json").read_text()


@pytest.mark.parametrize("settings", [None, TrainingSettings(seed=7)], ids=["alike", "by settings"])
def test_request_in_a_pause_is_answered(tmp_path, monkeypatch, settings):
    """One without settings is done with the run that waits; one with settings is a run of its own."""
    monkeypatch.setattr(retraining, "RETRY_SECONDS", (60.0,))
    job, heard = Job(tmp_path, EXITS.replace("78", "1"), says(REFUSED)), asyncio.Event()

    async def main():
        made = job.start(heard_of(["next try"], heard))
        made.ask("schedule")
        run = asyncio.ensure_future(made.run(await made.wanted()))
        await heard.wait()
        job.train = TELLS
        follower = asyncio.ensure_future(made.follow("order", lambda _: None, settings))
        results = [await run]
        if settings is not None:
            results.append(await made.run(await made.wanted()))
        results.append(await follower)
        assert made._settings is None
        return results

    results = asyncio.run(asyncio.wait_for(main(), 60))
    assert results == [*([Result.failed] if settings else []), Result.refused, Result.refused]
    trained = (tmp_path / "refused" / "trained" / "model.json").read_text()
    assert ("--settings" in trained) == (settings is not None)


@pytest.mark.parametrize(("timeout", "stall", "said"), [(0.3, 20.0, "timeout"), (20.0, 0.3, "said nothing")])
def test_board_says_why_a_process_was_killed(tmp_path, timeout, stall, said):
    """Whoever looks at it, and not at the log, wants to know."""
    job = Job(tmp_path, HANGS, timeout=timeout, stall=stall)
    job.run()
    assert said in job.told[-1]["lines"][-1]


def test_what_a_stopped_training_wrote_at_its_end_does_not_come_back(tmp_path):
    """The stop came after the model was written and before the process ended; the next run trains anew."""
    job, heard = Job(tmp_path, f"{TELLS}\n{HANGS}", says(REFUSED)), asyncio.Event()

    async def main():
        made = job.start(heard_of(["at it"], heard))
        made.ask("first", TrainingSettings(seed=1))
        run = asyncio.ensure_future(made.run(await made.wanted()))
        await heard.wait()
        assert (tmp_path / "challengers" / "trained" / "model.json").is_file()
        made.stop()
        assert await run is Result.stopped
        job.train = TELLS
        made.ask("second")
        await made.run(await made.wanted())

    asyncio.run(asyncio.wait_for(main(), 60))
    assert "--settings" not in (tmp_path / "refused" / "trained" / "model.json").read_text()
