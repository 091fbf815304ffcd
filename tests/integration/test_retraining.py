"""Trainings that are asked for, challengers that may not serve, and the way back: all of it replays."""

import json
import shutil
import subprocess
import time
from datetime import datetime

import pytest

from barcast.backtest.verify import verify
from barcast.daemon.events import Champion
from barcast.daemon.journal import Journal, Kind, State
from tests.garch import simulate
from tests.integration.instance import Feed, Instance, Subscriber, rough, until, write_history

MINUTE = 60 * 10**9
HISTORY, LIVE = 1450, 900  # of the live bars as many are sent as it takes


def close(signal):
    """The close of a signal, in nanoseconds."""
    return int(datetime.fromisoformat(json.loads(signal)["close_time"]).timestamp()) * 10**9


@pytest.mark.long
def test_retraining_and_rollback_replay(broker, checkpoints, tmp_path, request):
    """A better challenger takes over within a bar, bad ones change nothing, a step back is one command.

    Judged are a better model, one of other horizons, one of other bars, and the one trained then. The daemon
    is killed in a training, which ends with it, and rolled back while it is down.
    """
    import torch

    from barcast.models.checkpoint import save
    from barcast.models.training import train

    names = ["AA", "BB"]
    windows = [simulate(name, HISTORY + LIVE, seed=2, step=MINUTE).window for name in names]
    begin = int(windows[0].close_times[HISTORY - 1])
    table = "[retrain]\nsteps = 1\nmargin = 0.02\nnice = 0\n"  # what is trained here in a step must not win
    spoiled = str(checkpoints / "spoiled")
    instance = Instance(tmp_path / "instance", broker.port, names, spoiled, begin, speed=30, retrain=table)
    write_history(windows, HISTORY, instance.state / "history")
    inbox = instance.state / "challengers"
    torch.set_num_threads(1)
    short = [simulate("AA", 1200, seed=2, step=60 * MINUTE).window]
    levels = (0.05, 0.5, 0.95)
    save(train(short, timeframe="1h", horizons=(1, 4, 16), levels=levels, steps=1), inbox / "hourly")
    save(train(short, timeframe="1m", horizons=(1, 2), levels=levels, steps=1), inbox / "other")
    shutil.copytree(checkpoints / "good", inbox / "better")

    subscriber = Subscriber(broker.port)
    instance.launch()
    request.addfinalizer(instance.kill)
    instance.wait_for("broker_connected")
    feed = Feed(instance, rough(windows, HISTORY, seed=1))
    feed.start()
    followed = instance.order("retrain", "--now", "--wait")
    assert followed.returncode == 0, followed.stderr
    said = {line.split()[1]: line for line in followed.stderr.splitlines() if line.startswith("challenger ")}
    assert [word.split(": ")[1].split(";")[0] for word in said.values()].count("accepted") == 1
    assert followed.stdout.startswith("promoted; ")
    good = followed.stdout.split()[1]
    assert sorted(path.name for path in inbox.iterdir()) == []
    kept = instance.state / "refused"
    assert {p.name for p in kept.iterdir() if p.is_dir()} == {"hourly", "other", "trained"}
    assert "trained on '1h' bars" in (kept / "hourly.json").read_text()
    assert "horizons" in (kept / "other.json").read_text()

    assert instance.order("rollback", "--to", "hs").stdout.startswith("hs serves again")
    until(lambda: subscriber.signed() == "hs", "some bars under it")
    assert instance.order("rollback").stdout.startswith(f"{good} serves again")
    first = instance.order("rollback").stdout.split()[0]
    refused = instance.order("rollback")
    assert refused.returncode == 78
    assert f"no model served before {first}" in refused.stderr
    assert "0123456789abcdef: no such model" in instance.order("rollback", "--to", "0123456789abcdef").stderr
    shutil.copytree(checkpoints / "good", inbox / "again")
    assert instance.order("retrain", "--now").stdout.startswith("asked for")
    again = instance.wait_for("challenger_judged", seconds=300, count=4)
    assert (again["challenger"], again["accepted"]) == (good, False)
    assert again["reason"].startswith("it was rolled back from")
    trainer = child(instance)
    instance.kill()
    until(lambda: not running(trainer), "the training ends, too")
    assert instance.order("retrain").returncode == 78
    down = instance.order("rollback", "--to", good)
    assert down.stdout.startswith(f"{good} will serve from the next start on"), down.stderr
    instance.launch()
    instance.wait_for("ready", count=2)
    assert f"{good} serves since" in instance.order("retrain").stdout
    until(lambda: subscriber.signed() == good, "some bars under it")
    feed.plan.clear()
    feed.close()
    time.sleep(1)
    assert instance.stop() == 0
    subscriber.close()

    journal = Journal(instance.state / "journal.db", readonly=True)
    reigns = [(r.time, Champion.decode(r.payload)) for r in journal.records() if r.kind == Kind.ACTIVATION]
    counts = journal.outbox_counts()
    journal.close()
    assert [champion.model for _, champion in reigns] == [first, good, "hs", good, first, good]
    assert reigns[1][1].crps is not None
    assert (reigns[4][1].before, set(reigns[4][1].left)) == ((), {good, "hs"})
    notices = [json.loads(payload) for _, payload in subscriber.of("models")]
    assert [n["model"] for n in notices if n["verdict"].get("triggers") == ["rollback"]] == [
        "hs",
        good,
        first,
        good,
    ]

    signals = subscriber.of("signals")
    ends = [*(since for since, _ in reigns[1:]), 2**63]

    def may_serve(close):
        """Who serves between a bar before a close and the end of the validity of its signals."""
        return {
            champion.model
            for (since, champion), end in zip(reigns, ends, strict=True)
            if close - MINUTE < end and since < close + 2 * MINUTE
        }

    late = [p for _, p in signals if json.loads(p)["model"].split("-")[0] not in may_serve(close(p))]
    assert late == []
    captured = [pair for kind in ("signals", "targets", "groups", "backfill") for pair in subscriber.of(kind)]
    difference = verify(instance.state / "journal.db", captured=captured)
    print(f"\n{difference.sentence()}; {counts[State.EXPIRED]} expired; {len(reigns)} activations")
    assert difference.differing == 0
    assert verify(instance.state / "journal.db").agrees
    assert difference.missing == counts[State.EXPIRED]
    assert len({json.loads(p)["model"] for _, p in signals}) == 3


def child(instance):
    """The process id of the trainer, once there is one."""
    for _ in range(200):
        command = ["pgrep", "-P", str(instance.process.pid), "-f", "train-challenger"]
        found = subprocess.run(command, capture_output=True, text=True).stdout
        if found:
            return int(found.split()[0])
        time.sleep(0.05)
    raise AssertionError("no trainer was started")


def running(pid):
    """Whether a process is there and not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
