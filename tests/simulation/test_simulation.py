"""The daemon in schedules of faults: every promise is kept, every fault came, a seed is one schedule."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation import world
from tests.simulation.soak import portion, show, soak
from tests.simulation.world import Schedule, play

SCHEDULES = 500
"""Schedules of each of the parts; `make soak` plays a hundred times as many as both."""


CONSEQUENCES = {
    *(f"{how} {where}" for how in ("killed", "power cut") for where in world.MOMENTS),
    "commit torn",
    "compaction",
    "delivered again",
    "disk full",
    "group shed",
    "killed after the first commit of a job",
    "loop stalled",
    "pause done",
    "publication refused",
    "reordered",
    "resume done",
    "retrain done",
    "rollback done",
    "training: better",
    "training: dies",
    "training: stalls",
    "training: unusable",
    "training: worse",
    "unsynced log torn",
}
"""What must come of it, too."""


@pytest.mark.parametrize("part", range(2))
def test_schedules_keep_every_promise_and_have_every_fault(part):
    """Whatever a seed lets happen, nothing is lost, doubled, stale or different in a replay."""
    summary = portion(part * SCHEDULES, SCHEDULES)
    assert summary.violations == {}
    assert summary.schedules == SCHEDULES
    assert [kind for kind, times in summary.happened.items() if not times] == []
    kinds = {*world.SPOILT, *world.WORLDLY, *CONSEQUENCES}
    assert kinds - summary.happened.keys() == set()


def test_seed_is_one_schedule_in_every_process(memory, tmp_path):
    """All that happens follows from the seed: here, here again, and where hashes and addresses differ."""
    seeds = (3, 7, 11)
    here = [play(seed, memory).trace for seed in seeds]
    assert [play(seed, memory).trace for seed in seeds] == here
    assert len(set(here)) == len(seeds)
    program = (
        "import sys; from pathlib import Path; from tests.simulation.world import play, prepared\n"
        "with prepared(): print(*(play(seed, Path(sys.argv[1])).trace for seed in (11, 7, 3)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env=os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == here[::-1]


def test_one_schedule_is_shown(capsys):
    """Moment by moment, and what became of it."""
    assert show(5) == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\n")
    assert "log ready" in said
    assert "every promise was kept" in said


def test_daemon_that_hangs_is_found(memory, monkeypatch):
    """A path that takes nothing any more is told apart from one that has nothing to do."""

    async def never(self, deadline):
        await self.caught_up.wait()

    monkeypatch.setattr(world.live.LiveSource, "next", never)
    outcome = play(1, memory)
    assert any("after the last fault" in fault for fault in outcome.violations)


def test_daemon_that_dies_is_found(memory, monkeypatch):
    """So is what it died of."""

    async def dies(self, outcome):
        raise ArithmeticError("the sink leaks")

    monkeypatch.setattr(world.live.LiveSink, "emit", dies)
    outcome = play(0, memory)
    assert any("the sink leaks" in fault for fault in outcome.violations)


@pytest.mark.parametrize("level", ["error", "exception"])
def test_log_line_that_nobody_expects_is_found(memory, level):
    """What a person would have to look at is no silence."""
    schedule = Schedule(0, memory)
    schedule.alive = True
    schedule.heard("error", {"event": "lookout_failed", "exc_info": level == "exception"})
    assert "lookout_failed" in schedule.violations[0]


def test_soak_writes_what_happened(tmp_path, capsys):
    """Schedules are played in other processes; a violation would name its seed."""
    assert soak(5, 2, tmp_path / "soak.json") == 0
    written = json.loads((tmp_path / "soak.json").read_text())
    assert (written["first"], written["schedules"], written["violations"]) == (5, 2, {})
    assert "2 schedules" in capsys.readouterr().out
