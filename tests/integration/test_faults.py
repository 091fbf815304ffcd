"""What goes wrong around the daemon changes nothing in it."""

import json
import os
import signal
import subprocess
import time

from barcast.backtest.verify import verify
from barcast.daemon.journal import Journal, Kind
from tests.garch import simulate
from tests.integration.instance import Feed, Instance, Subscriber, rough, until, write_history

MINUTE = 60 * 10**9
HISTORY, LIVE = 1450, 600  # of the live bars as many are sent as it takes


def test_killed_trainer_and_bad_messages_change_nothing(broker, checkpoints, tmp_path, request):
    """A trainer that is killed is named in the log; bad messages become dead letters; signals go on."""
    names = ["AA", "BB", "CC"]
    windows = [simulate(name, HISTORY + LIVE, seed=2, step=MINUTE).window for name in names]
    begin = int(windows[0].close_times[HISTORY - 1])
    table = "[retrain]\nsteps = 8\nnice = 0\n"
    good = str(checkpoints / "good")
    instance = Instance(tmp_path / "instance", broker.port, names, good, begin, speed=100, retrain=table)
    write_history(windows, HISTORY, instance.state / "history")
    subscriber = Subscriber(broker.port)
    instance.launch()
    request.addfinalizer(instance.kill)
    instance.wait_for("broker_connected")
    feed = Feed(instance, rough(windows, HISTORY, seed=1))
    feed.start()
    for payload in (b"{", b'{"close_time": 7}', b"\xff\xfe"):
        feed.client.publish("barcast/v1/bars/1m/AA", payload, 1)

    assert instance.order("retrain", "--now").returncode == 0
    instance.wait_for("retrain_started")
    trainer = None
    for _ in range(100):
        found = subprocess.run(
            ["pgrep", "-P", str(instance.process.pid), "-f", "train-challenger"],
            capture_output=True,
            text=True,
        )
        if found.stdout:
            trainer = int(found.stdout.split()[0])
            break
        time.sleep(0.05)
    assert trainer is not None
    os.kill(trainer, signal.SIGKILL)
    failed = instance.wait_for("train_failed")
    assert failed["exit_status"] == -9
    before = len(subscriber.of("signals"))
    until(lambda: len(subscriber.of("signals")) > before, "it goes on")
    feed.plan.clear()
    feed.close()
    time.sleep(1)
    assert instance.stop() == 0
    subscriber.close()

    journal = Journal(instance.state / "journal.db", readonly=True)
    kinds = [record.kind for record in journal.records()]
    journal.close()
    assert kinds.count(Kind.ACTIVATION) == 1
    letters = [json.loads(payload) for _, payload in subscriber.of("deadletter")]
    assert len(letters) == 3
    assert all(letter["reason"] for letter in letters)
    states = [json.loads(payload)["state"] for _, payload in subscriber.of("status")]
    assert states[0] == "ready"
    assert states[-1] == "stopped"
    captured = [pair for kind in ("signals", "targets", "groups", "backfill") for pair in subscriber.of(kind)]
    assert verify(instance.state / "journal.db", captured=captured).differing == 0
    assert verify(instance.state / "journal.db").agrees
