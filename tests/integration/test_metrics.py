"""A running daemon is asked how it is."""

import json
import socket
import subprocess
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.garch import simulate
from tests.integration.broker import free_port
from tests.integration.instance import BARCAST, Feed, Instance, rough, write_history

MINUTE = 60 * 10**9
HISTORY, LIVE = 400, 20


def get(port, path):
    """Status and body of an address."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(port):
    """Every sample: name and label values -> value."""
    _, text = get(port, "/metrics")
    found = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for family in found for s in family.samples}


def test_counters_move_and_the_end_is_not_delayed(broker, tmp_path, request):
    """Bars, groups and messages are counted as they come; without a broker it is not ready; it stops."""
    names = ["AA", "BB", "CC"]
    windows = [simulate(name, HISTORY + LIVE, seed=2, step=MINUTE).window for name in names]
    begin = int(windows[0].close_times[HISTORY - 1])
    port = free_port()
    instance = Instance(
        tmp_path / "instance", broker.port, names, "fhs", begin, speed=200, sampler=None, http=port
    )
    write_history(windows, HISTORY, instance.state / "history")
    instance.launch()
    request.addfinalizer(instance.kill)
    instance.wait_for("broker_connected")
    instance.wait_for("prepared")
    before = scrape(port)
    feed = Feed(instance, rough(windows, HISTORY, seed=1))
    feed.start()
    feed.client.publish("barcast/v1/bars/1m/AA", b"{", 1)
    feed.close()
    status, said = get(port, "/readyz")
    assert (status, json.loads(said)["not"]) == (200, [])
    assert get(port, "/healthz")[0] == 200
    after = scrape(port)
    assert before["barcast_bars_total", "newest"] == 0
    assert after["barcast_bars_total", "newest"] > 40
    assert after["barcast_groups_total", "full"] + after["barcast_groups_total", "incomplete"] == LIVE
    assert after["barcast_signals_total",] > 40
    assert after["barcast_dead_letters_total",] == 1
    assert after["barcast_published_total",] > 60
    assert after["barcast_publish_latency_seconds_count",] > 60
    assert after["barcast_bar_lag_seconds_count",] >= 50
    assert (after["barcast_ready",], after["barcast_broker_connected",], after["barcast_deaf",]) == (1, 1, 0)
    assert after["barcast_journal_size_bytes",] > 10_000
    assert after["process_resident_memory_bytes",] > 10_000_000
    assert [key[1:] for key in after if key[0] == "barcast_model_info"] != []

    other = subprocess.run([*BARCAST, "run", str(other_of(instance))], capture_output=True, text=True)
    assert other.returncode == 78
    assert f"error: http: 127.0.0.1:{port}: Address already in use; name a" in other.stderr

    broker.stop()
    instance.wait_for("broker_lost")
    status, said = get(port, "/readyz")
    assert (status, json.loads(said)["not"]) == (503, ["connected"])
    with socket.create_connection(("127.0.0.1", port)) as waiting:
        waiting.sendall(b"GET /metrics HT")
        broker.start()
        instance.wait_for("broker_connected", count=2)
        assert instance.stop() == 0


def other_of(instance):
    """The configuration of another instance that wants the same port."""
    path = instance.folder / "other.toml"
    path.write_text((instance.folder / "barcast.toml").read_text().replace('"state"', '"elsewhere"'))
    return path
