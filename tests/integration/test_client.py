"""A trading system on the client: every signal once, whatever happens, and word of a daemon that is gone."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from barcast.daemon.client import Client
from barcast.daemon.contract import document
from barcast.daemon.journal import Journal, State
from barcast.daemon.wire import to_text
from barcast.models import Bar
from tests.garch import simulate
from tests.integration.broker import ROOT, SHIPPED_ACL
from tests.integration.instance import Feed, Instance, client, write_history

MINUTE = 60 * 10**9
HISTORY, LIVE = 300, 60
LIVELY = (sys.executable, "-m", "tests.integration.lively")
EXAMPLES = ROOT / "deploy" / "examples"
TOOLS = ROOT / ".tools/usr"  # where `make` unpacks Debian's packages without root
ENV = os.environ | {
    "PYTHONPATH": f"{ROOT}/.dev:{ROOT}",
    "PATH": f"{os.environ['PATH']}:{TOOLS}/bin",
    "LD_LIBRARY_PATH": f"{TOOLS}/lib/x86_64-linux-gnu" if TOOLS.is_dir() else "",
}


class Process:
    """A program that prints lines."""

    def __init__(self, command: list[str], file: Path, env: dict[str, str] = ENV) -> None:
        self.file = file
        with file.open("wb") as out, file.with_suffix(".err").open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)

    def lines(self) -> list[str]:
        """What it has said."""
        return self.file.read_text().splitlines()

    def told(self, what: str) -> list[dict[str, object]]:
        """What it has said of one kind, when its lines are JSON."""
        return [line for line in map(json.loads, self.lines()) if line["what"] == what]

    def wait_for(self, found, seconds=30.0):
        """Wait until there is something to find."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if result := found():
                return result
            assert self.process.poll() is None, self.file.with_suffix(".err").read_text()
            time.sleep(0.02)
        raise AssertionError("\n".join(self.lines()[-20:]) + self.file.with_suffix(".err").read_text())

    def end(self) -> None:
        """End it and what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)


def instance_of(folder, broker, speed):
    """An instance with two symbols, a history and a baseline, and the plan of its feed."""
    names = ["AA", "BB"]
    windows = [simulate(name, HISTORY + LIVE, seed=5, step=MINUTE).window for name in names]
    begin = int(windows[0].close_times[HISTORY - 1])
    soon = datetime.now(UTC) + timedelta(seconds=4)
    instance = Instance(folder, broker.port, names, "ewma", begin, speed, command=LIVELY, at=soon)
    write_history(windows, HISTORY, instance.state / "history")
    plan = []
    for w in windows:
        rows = zip(w.close_times[HISTORY:].tolist(), w.values[HISTORY:].tolist(), strict=True)
        plan += [(close + 10**9, Bar(w.symbol, close, *values)) for close, values in rows]
    return instance, sorted(plan, key=lambda piece: (piece[0], piece[1].symbol))


def test_reader_sees_each_signal_once_and_hears_of_every_end(broker, tmp_path, request):
    """A broker restart, a kill -9, a frozen and a stopped daemon: no signal is lost or comes twice.

    Each end is reported before the validity of the newest signal ends.
    """
    instance, plan = instance_of(tmp_path / "instance", broker, speed=30)
    config = instance.write()
    reader = Process(
        [sys.executable, "-m", "tests.integration.reader", str(config)], tmp_path / "reader.jsonl"
    )
    request.addfinalizer(reader.end)
    instance.launch()
    request.addfinalizer(instance.kill)
    reader.wait_for(lambda: reader.told("resume"))
    feed = Feed(instance, plan)
    feed.start()

    def next_of(what):
        seen = len(reader.told(what))
        return lambda: reader.wait_for(lambda: reader.told(what)[seen:])[0]

    def reason_of(halt):
        assert halt["at"] < max(s["valid_until"] for s in reader.told("signal"))
        return halt["reason"]

    next_of("signal")()
    resumed = next_of("resume")
    broker.stop()  # the daemon's last will is the broker's last word
    time.sleep(0.5)
    broker.start()
    resumed()
    next_of("signal")()

    halted, resumed = next_of("halt"), next_of("resume")
    instance.kill()
    assert "lost its connection, or its life" in reason_of(halted())
    instance.launch()
    resumed()
    next_of("signal")()

    halted, resumed = next_of("halt"), next_of("resume")
    instance.process.send_signal(signal.SIGSTOP)
    assert reason_of(halted()).startswith("no status of test for 1.5 s")
    instance.process.send_signal(signal.SIGCONT)
    resumed()
    next_of("group")()  # its signals were handed out by both readers, none of them twice

    stale = next_of("stale")
    reader.process.send_signal(signal.SIGSTOP)
    time.sleep(3.5 * 60 / instance.speed)  # the next signal comes within a minute, and is valid for two
    reader.process.send_signal(signal.SIGCONT)
    stale()
    next_of("signal")()

    halted = next_of("halt")
    assert instance.stop() == 0
    assert "was stopped" in reason_of(halted())
    feed.plan.clear()
    feed.close()
    reader.end()

    journal = Journal(instance.state / "journal.db", readonly=True)
    rows = journal._db.execute("SELECT topic, payload, state FROM outbox").fetchall()
    journal.close()
    sent = [(topic.split("/")[2], json.loads(payload), State(state)) for topic, payload, state in rows]
    delivered = {body["id"] for kind, body, state in sent if kind == "signals" and state is State.DELIVERED}
    expired = {
        body["close_time"] for kind, body, state in sent if kind == "groups" and state is State.EXPIRED
    }
    handed = [line["id"] for line in reader.told("signal")]
    stale = {line["id"] for line in reader.told("stale") if line["kind"] == "Signal"}
    groups = [line["id"] for line in reader.told("group")]
    print(f"\n{len(delivered)} signals delivered: {len(handed)} handed out, {len(stale)} refused")
    assert len(handed) == len(set(handed)) >= 8
    assert len(groups) == len(set(groups)) >= 4
    assert set(handed) | stale >= delivered
    assert not set(handed) & stale
    assert stale
    assert {gap["close_time"] for gap in reader.told("gap")} <= expired
    assert all(line["at"] < line["valid_until"] for line in reader.told("signal"))


def test_examples_show_what_may_be_acted_on(broker, tmp_path, request):
    """The example programs print a fresh signal, and neither a stale one nor one that is not tradable."""
    examples = {
        name: message["examples"][0]["payload"]
        for name, message in document()["components"]["messages"].items()
        if "examples" in message
    }
    soon = to_text(time.time_ns() // 10**9 * 10**9 + 3600 * 10**9)
    late = {"valid_until": "2026-01-05T17:00:00Z"}
    signals = {
        "FRESH": {"valid_until": soon},
        "LATE": late,
        "BACKLOG": {"valid_until": soon, "tradable": False},
    }
    group = examples["GroupDone"] | {"valid_until": soon, "symbols": list(signals)}
    feed = client("feed", broker.port)
    feed.loop_start()
    request.addfinalizer(lambda: (feed.disconnect(), feed.loop_stop()))
    for name, own in signals.items():
        body = examples["Signal"] | {"id": name, "symbol": name} | own
        feed.publish(f"barcast/v1/signals/1h/{name}", json.dumps(body), 1, retain=True)
    feed.publish("barcast/v1/status/desk", json.dumps(examples["Status"]), 1, retain=True).wait_for_publish(5)

    port = str(broker.port)
    consumer = [sys.executable, str(EXAMPLES / "consumer.py"), "desk", "--port", port]
    python = Process(consumer, tmp_path / "consumer")
    request.addfinalizer(python.end)
    shell = Process(["sh", str(EXAMPLES / "watch.sh"), "barcast/v1", "-p", port], tmp_path / "watch")
    request.addfinalizer(shell.end)
    python.wait_for(lambda: "resume" in python.lines())
    feed.publish("barcast/v1/groups/1h", json.dumps(group), 1)
    python.wait_for(lambda: len(python.lines()) >= 2)
    shell.wait_for(lambda: len(shell.lines()) >= 2)
    stopped = examples["Status"] | {"state": "stopped"}
    feed.publish("barcast/v1/status/desk", json.dumps(stopped), 1, retain=True)
    python.wait_for(lambda: len(python.lines()) >= 3)
    assert python.lines() == [
        "resume",
        "2026-01-05T15:00:00Z FRESH 99.5 to 101.51 by 2026-01-05T16:00:00Z degraded",
        "halt: the daemon was stopped",
    ]
    assert [line.split("\t") for line in shell.lines()] == [
        ["2026-01-05T15:00:00Z", "FRESH", f"2026-01-05T{end}:00:00Z", low, high, "0.5"]
        for end, low, high in (("16", "99.5000083", "101.510042"), ("19", "98.5099667", "102.530235"))
    ]


def test_shipped_access_list_lets_a_reader_read(brokers):
    """The user `reader` of deploy/mosquitto.acl has the rights that a client needs, targets and all."""
    broker = brokers(acl=SHIPPED_ACL.read_text())
    messages = document()["components"]["messages"]
    soon = {"valid_until": to_text(time.time_ns() + 3600 * 10**9)}
    daemon = client("barcast", broker.port, "barcast")
    daemon.loop_start()
    for kind, name in (("targets/drift/1h/BTCUSD", "Target"), ("status/desk", "Status")):
        body = messages[name]["examples"][0]["payload"] | (soon if name == "Target" else {})
        daemon.publish(f"barcast/v1/{kind}", json.dumps(body), 1, retain=True).wait_for_publish(5)

    async def read():
        resumed = asyncio.Event()
        async with (
            asyncio.timeout(20),
            Client(
                "127.0.0.1",
                broker.port,
                instance="desk",
                username="reader",
                password="reader",
                on_resume=resumed.set,
            ) as reader,
        ):
            await resumed.wait()
            return await anext(reader.targets())

    assert asyncio.run(read()).target == 0.25
    daemon.disconnect()
    daemon.loop_stop()
