"""The promise of one path, kept by the real daemon on a real broker."""

import json
import shutil
import time
from datetime import UTC, datetime, timedelta

import pytest

from barcast.backtest.verify import verify
from barcast.daemon.journal import Journal, Kind, State
from tests.garch import simulate
from tests.integration.instance import Feed, Instance, Subscriber, rough, until, write_history

MINUTE = 60 * 10**9
HISTORY, LIVE, SYMBOLS = 1450, 600, 26  # of the live bars as many are sent as it takes
ENOUGH = 1200
NEW, RECENT = 22, 85  # symbols that are too new to learn from, and their bars of history


@pytest.mark.long
def test_rough_live_run_replays_to_the_same_bytes(broker, checkpoints, tmp_path, request):
    """Both samplers, a bad feed, a broker restart, a kill -9 and a model swap: the replay differs in no byte.

    What is compared is what an independent subscriber wrote down. A message that it did not get must be
    marked as expired in the outbox. It ends when there are signals enough, and some by the new model.
    """
    names = [f"S{i:02d}" for i in range(SYMBOLS)]
    windows = [simulate(name, HISTORY + LIVE, seed=3, step=MINUTE).window for name in names]
    begin = int(windows[0].close_times[HISTORY - 1])
    instance = Instance(
        tmp_path / "instance", broker.port, names, str(checkpoints / "spoiled"), begin, speed=60
    )
    write_history(windows[NEW:], HISTORY, instance.state / "history")
    write_history(windows[:NEW], HISTORY, instance.state / "history", HISTORY - RECENT)
    subscriber = Subscriber(broker.port)
    instance.launch()
    request.addfinalizer(instance.kill)
    instance.wait_for("broker_connected")
    feed = Feed(instance, rough(windows, HISTORY, seed=4))
    feed.start()

    until(lambda: len(subscriber.of("signals")) >= 300, "signals by the first sampler")
    first = subscriber.signed()
    instance.kill()
    instance.sampler = "ddim"
    shutil.copytree(checkpoints / "good", instance.state / "challengers" / "better")
    soon = datetime.now(UTC) + timedelta(seconds=7)
    instance.cron = f"{soon.second} * * * * *"
    instance.launch()
    instance.wait_for("ready", count=2)
    until(lambda: len(subscriber.of("signals")) >= 800, "signals by the other sampler")
    broker.stop()
    time.sleep(0.5)
    broker.start()
    ended = instance.wait_for("retrain_ended", seconds=300)
    until(lambda: len(subscriber.of("signals")) >= ENOUGH and subscriber.signed() != first, "it takes over")
    feed.plan.clear()
    feed.close()
    time.sleep(1)  # what waits for a timer
    assert instance.stop() == 0
    subscriber.close()

    journal = Journal(instance.state / "journal.db", readonly=True)
    records = list(journal.records())
    counts = journal.outbox_counts()
    captured = [pair for kind in ("signals", "targets", "groups", "backfill") for pair in subscriber.of(kind)]
    heard, told = set(captured), journal._db.execute("SELECT topic, payload, state FROM outbox").fetchall()
    ours = ("/signals/", "/targets/", "/groups/", "/backfill/")
    unheard = {s for t, p, s in told if (t, p) not in heard and any(kind in t for kind in ours)}
    journal.close()
    difference = verify(instance.state / "journal.db", captured=captured)
    models = {json.loads(p)["model"] for _, p in subscriber.of("signals")}
    samplers = {json.loads(p)["sampler"] for _, p in subscriber.of("signals")}
    print(
        f"\n{difference.sentence()}; {counts[State.EXPIRED]} expired; samplers {sorted(samplers)}; "
        f"{len(models)} models; loop lag during the retraining p99 {ended['loop_lag_p99_ms']} ms, "
        f"max {ended['loop_lag_max_ms']} ms"
    )
    assert difference.signals >= ENOUGH
    assert difference.differing == 0
    assert verify(instance.state / "journal.db").agrees
    assert difference.missing <= counts[State.EXPIRED]
    assert unheard <= {State.EXPIRED}
    assert counts[State.PENDING] == 0
    assert samplers == {"dpmpp", "ddim"}
    assert len([r for r in records if r.kind == Kind.ACTIVATION]) >= 2
    assert len([r for r in records if r.kind == Kind.REVISION]) == 2
    assert any(json.loads(p)["straggler"] for _, p in subscriber.of("groups"))
