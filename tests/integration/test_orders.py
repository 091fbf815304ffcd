"""Operators and a running daemon: the same orders by socket, broker and signal, with a real broker."""

import asyncio
import json
import signal
import threading
import time
from datetime import UTC, datetime, timedelta

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from barcast.backtest.verify import verify
from barcast.daemon.client import order
from barcast.daemon.events import Answered, Ordered
from barcast.daemon.journal import Journal, Kind
from barcast.models import ConfigError
from tests.garch import simulate
from tests.integration.broker import SHIPPED_ACL
from tests.integration.instance import Instance, Subscriber, client, until, write_history

MINUTE = 60 * 10**9
HISTORY, LIVE, SPEED = 1450, 80, 60.0


class Steady(threading.Thread):
    """A feed with rights: each bar at its close, until it is told to end."""

    def __init__(self, instance, windows):
        super().__init__(name="steady")
        self.instance, self.windows, self.ended = instance, windows, threading.Event()
        self.client = client("feed", instance.port, "feed")
        self.client.loop_start()

    def run(self):
        for i in range(HISTORY, HISTORY + LIVE):
            if self.ended.wait(max(0.0, self.instance.real(self.windows[0].close_times[i]) - time.time())):
                return
            for w in self.windows:
                names = ("open", "high", "low", "close", "volume")
                values = dict(zip(names, w.values[i].tolist(), strict=True))
                seconds = int(w.close_times[i]) // 10**9
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
                body = json.dumps({"close_time": at, **values})
                self.client.publish(f"barcast/v1/bars/1m/{w.symbol}", body, 1)

    def close(self):
        self.ended.set()
        self.join()
        time.sleep(0.5)
        self.client.disconnect()
        self.client.loop_stop()


def by_broker(broker, verb, user="operator", **what):
    """Order as somebody on another machine would."""
    place = {"port": broker.port, "instance": "test", "username": user, "password": user, "operator": "ann"}
    return asyncio.run(order("127.0.0.1", verb=verb, **place, **what))


def send(broker, verb, known, retain=False, expiry=None):
    """Publish an order and wait for nothing but the broker."""
    c = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    c.username_pw_set("operator", "operator")
    c.connect("127.0.0.1", broker.port)
    c.loop_start()
    p = Properties(PacketTypes.PUBLISH)
    p.ResponseTopic, p.CorrelationData = "barcast/v1/answers/test/raw", known
    if expiry:
        p.MessageExpiryInterval = expiry
    c.publish(f"barcast/v1/control/test/{verb}", b"", 1, retain, p).wait_for_publish(10)
    c.disconnect()
    c.loop_stop()


def test_orders_by_every_way(brokers, tmp_path, request):
    """Each verb by socket and broker; a bad configuration; a kill -9 while paused; a replay of it all."""
    broker = brokers(acl=SHIPPED_ACL.read_text())
    names = ["AA", "BB"]
    windows = [simulate(name, HISTORY + LIVE, seed=2, step=MINUTE).window for name in names]
    begin = int(windows[0].close_times[HISTORY - 1])
    instance = Instance(
        tmp_path / "instance",
        broker.port,
        names,
        "fhs",
        begin,
        SPEED,
        sampler=None,
        user="barcast",
        at=datetime.now(UTC) + timedelta(seconds=4),
    )
    write_history(windows, HISTORY, instance.state / "history")
    seen = Subscriber(broker.port, "operator")
    spied, subscribed = [], threading.Event()
    spy = client("spy", broker.port, "reader")  # who may not see orders, nor answers
    spy.on_message = lambda _c, _u, m: spied.append(m.topic)
    spy.on_subscribe = lambda *_: subscribed.set()
    spy.subscribe([("barcast/v1/answers/#", 1), ("barcast/v1/control/#", 1)])
    spy.loop_start()
    assert subscribed.wait(10)
    instance.launch()
    request.addfinalizer(instance.kill)
    instance.wait_for("broker_connected")
    feed = Steady(instance, windows)
    feed.start()
    until(lambda: seen.of("signals"), "signals come")

    # Pause by the broker, which an ordinary reader cannot; bars go on and signals do not.
    with pytest.raises(ConfigError, match=r"control/test/pause: refused by the broker"):
        by_broker(broker, "pause", user="reader")
    lines = []
    assert by_broker(broker, "pause", reason="a look", on_line=lines.append).startswith("paused: ")
    assert lines[0].startswith("taken: record ")
    until(lambda: json.loads(seen.of("status")[-1][1]).get("paused"), "the status says paused")
    paused = len(seen.of("signals"))
    time.sleep(2.5)  # more than two bars
    assert len(seen.of("signals")) == paused
    assert "paused: nothing is forecast" in by_broker(broker, "state")

    # A kill forgets no pause; what was sent while it was away is taken then, unless it expired.
    instance.kill()
    send(broker, "rollback", b"gone", expiry=1)
    time.sleep(1.5)
    send(broker, "state", b"waits")
    instance.launch()
    instance.wait_for("ready", count=2)
    until(
        lambda: [p for t, p in seen.of("answers") if t.endswith("/raw")], "the order that waited is answered"
    )
    assert "paused: nothing is forecast" in instance.order("state").stdout
    assert len(seen.of("signals")) == paused
    resumed = instance.order("resume", "--reason", "seen enough")
    assert resumed.stdout.startswith("forecasts go on"), resumed.stderr
    until(lambda: len(seen.of("signals")) > paused, "signals come again")

    # A bad configuration is refused by every way, while signals go on; a good one acts.
    path = instance.folder / "barcast.toml"
    good = path.read_text()
    path.write_text(good.replace('max_wait = "15s"', 'max_wait = "soon"'))
    bad = instance.order("reload", "--wait")
    assert (bad.returncode, "max_wait: write a duration" in bad.stderr) == (78, True), bad.stderr
    instance.process.send_signal(signal.SIGHUP)
    instance.wait_for("order_refused", count=2)
    with pytest.raises(ConfigError, match="max_wait: write a duration"):
        by_broker(broker, "reload", wait=True)
    before = len(seen.of("signals"))
    until(lambda: len(seen.of("signals")) > before, "signals go on")
    path.write_text(good.replace('max_wait = "15s"', 'max_wait = "12s"') + '[retrain]\nmax_age = "9d"\n')
    assert by_broker(broker, "reload", wait=True) == "max_wait, retrain: as the file says now"
    assert instance.order("reload", "--wait").stdout == "nothing has changed\n"

    # The model, back and forth; and one order that is retained.
    assert by_broker(broker, "rollback", to="hs").startswith("hs serves again; fhs is left behind")
    assert instance.order("rollback").stdout.startswith("fhs serves again")
    send(broker, "pause", b"kept", retain=True)
    until(
        lambda: any("retained" in p.decode() for _, p in seen.of("answers")), "the retained order is refused"
    )
    before = len(seen.of("signals"))
    until(lambda: len(seen.of("signals")) > before, "signals go on, still")
    feed.close()
    assert instance.stop() == 0
    seen.close()
    spy.disconnect()
    spy.loop_stop()

    assert spied == []
    journal = Journal(instance.state / "journal.db", readonly=True)
    orders = {r.seq: Ordered.decode(r.payload) for r in journal.of_kind(Kind.ORDERED)}
    results = {a.order: a for a in (Answered.decode(r.payload) for r in journal.of_kind(Kind.ANSWERED))}
    journal.close()
    assert [(o.who.split()[0], o.verb, results[n].refused is None) for n, o in orders.items()] == [
        ("mqtt", "pause", True),
        ("uid", "resume", True),
        ("uid", "reload", False),
        ("signal", "reload", False),
        ("mqtt", "reload", False),
        ("mqtt", "reload", True),
        ("uid", "reload", True),
        ("mqtt", "rollback", True),
        ("uid", "rollback", True),
    ]
    assert next(iter(orders.values())).who == "mqtt ann"
    captured = [pair for kind in ("signals", "targets", "groups", "backfill") for pair in seen.of(kind)]
    difference = verify(instance.state / "journal.db", captured=captured)
    print(f"\n{difference.sentence()}")
    assert difference.differing == 0
    assert difference.signals >= 8
    assert verify(instance.state / "journal.db").agrees
