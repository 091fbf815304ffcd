"""What /metrics says is what happened: in this process, with a broker that is only pretended."""

import asyncio
import errno
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from barcast.daemon import metrics, retraining
from barcast.daemon.distribution import Distribution
from barcast.daemon.live import LiveSink
from barcast.daemon.ports import Group, Outcome
from barcast.daemon.trainer import children
from barcast.models import Coverage
from tests.daemon.living import LEAST, at_work, daemon, deliver, until
from tests.fakes import MINUTE, START, Spread, bar
from tests.rim import SECOND, Message, Silent, play

TWO = LEAST.replace("[mqtt]", 'symbols = ["A", "B"]\nmax_wait = "100ms"\n[mqtt]')
"""Groups of two, which wait a tenth of a second for each other."""


async def scraped(made):
    """Every sample: name and labels -> value."""
    families = text_string_to_metric_families((await made.metrics.text()).decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_distribution_counts_up_to_its_bounds():
    """A value on a bound belongs below it; what is negative counts as nothing."""
    found = Distribution((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 7, -3):
        found.observe(value)
    assert found.counts == [3, 1, 1, 1]
    assert found.sum == 15


def test_bars_are_counted_once_each(tmp_path):
    """Each bar has one verdict; groups, dead letters and delivered messages are counted as they happen."""
    made = daemon(tmp_path, TWO, START + 2 * MINUTE + SECOND)

    async def story():
        async with at_work(made) as sent:
            before = await scraped(made)
            a, b = bar("A", 2), bar("B", 2)
            await deliver(made, Message.of(a), Message.of(b))  # full
            await deliver(made, Message.of(a), Message.of(bar("A", 1)), Message.of(bar("A", 2, 150.0)))
            await deliver(made, Message("t/bars/1m/A", b"{}"))
            await deliver(made, Message.of(bar("C", 2)))  # its group is gone
            return before, await scraped(made), sent

    before, after, sent = play(story())
    assert {
        key[1]: value for key, value in before.items() if key[0] == "barcast_bars_total"
    } == dict.fromkeys(("newest", "older", "correction", "duplicate", "forgotten", "stale", "straggler"), 0)
    assert {key[1]: value for key, value in after.items() if key[0] == "barcast_bars_total"} == {
        "newest": 2,
        "older": 1,
        "correction": 1,
        "duplicate": 1,
        "forgotten": 0,
        "stale": 0,
        "straggler": 1,
    }
    groups = {key[1]: value for key, value in after.items() if key[0] == "barcast_groups_total"}
    assert groups == {"full": 1, "incomplete": 0, "straggler": 1}
    assert after["barcast_withheld_total",] == 3  # filtered historical simulation needs more bars
    assert after["barcast_dead_letters_total",] == 1
    assert after["barcast_published_total",] == len(sent)
    assert after["barcast_outbox_pending_messages",] == 0
    assert after["barcast_symbols",] == 3
    assert after["barcast_last_close_timestamp_seconds",] == (START + 2 * MINUTE) / 1e9
    assert after["barcast_bar_lag_seconds_count",] == 6
    assert after["barcast_bar_lag_seconds_bucket", "0.5"] == 0
    assert after["barcast_bar_lag_seconds_bucket", "300"] == 6
    assert after["barcast_batch_latency_seconds_count",] == 2
    assert after["barcast_publish_latency_seconds_count",] == 2  # a dead letter was not emitted by the path
    assert after["barcast_close_to_published_seconds_sum",] > 2
    assert after["barcast_loop_lag_seconds_count",] > 0


def test_what_recovery_counts_happened_before(tmp_path):
    """After a restart the counters begin at 0: a rate over the start shows no flood."""

    async def story(made, *messages):
        async with at_work(made):
            await deliver(made, *messages)
            return await scraped(made)

    a, b = bar("A", 2), bar("B", 2)
    clock = START + 2 * MINUTE + SECOND
    play(story(daemon(tmp_path, TWO, clock), Message.of(a), Message.of(a), Message.of(b)))
    after = play(story(daemon(tmp_path, TWO, clock)))
    assert sum(value for key, value in after.items() if key[0] == "barcast_bars_total") == 0
    assert after["barcast_symbols",] == 2


def test_an_incomplete_group_and_a_hole_are_counted(tmp_path):
    """A group that waited in vain, and the bars that are missing before one."""
    made = daemon(tmp_path, TWO, START + 400 * MINUTE + SECOND)

    async def story():
        async with at_work(made):
            old = [bar("A", m) for m in range(1, 390)]
            await deliver(made, Message.of(*old))
            await deliver(made, Message.of(bar("A", 400)))
            await until(lambda: made.sink.counts.holes > 0)
            return await scraped(made)

    after = play(story())
    assert after["barcast_bars_total", "stale"] == 389
    assert after["barcast_groups_total", "incomplete"] == 1
    assert after["barcast_signals_total",] == 1
    assert after["barcast_signals_degraded_total",] == 1
    assert after["barcast_holes_total",] == 1


def test_refused_publications_are_counted_and_wait(tmp_path):
    """What the broker refuses stays in the outbox, and each try counts."""
    text = TWO.replace('"B"', '"REFUSED"')
    made = daemon(tmp_path, text, START + 400 * MINUTE + SECOND)

    async def story():
        async with at_work(made):
            for name in ("A", "REFUSED"):
                await deliver(made, Message.of(*(bar(name, m) for m in range(1, 400))))
            await deliver(made, Message.of(bar("A", 400)), Message.of(bar("REFUSED", 400)))
            await until(lambda: made.courier.failed > 0)
            return await scraped(made)

    after = play(story())
    assert after["barcast_signals_total",] == 4  # that of minute 399 is still of use
    assert after["barcast_publish_failures_total",] >= 1
    assert after["barcast_outbox_pending_messages",] == 2


def test_overdue_follows_the_calendar(tmp_path):
    """Bars are overdue where the market is open; a symbol on a calendar that is shut is not."""
    text = TWO.replace("[mqtt]", '[calendars]\nfx = ["B"]\n[mqtt]')
    saturday = 1_700_308_800 * SECOND  # 2023-11-18 12:00
    made = daemon(tmp_path, text, saturday + 10 * SECOND)

    async def story():
        async with at_work(made):
            quiet = await scraped(made)
            made.metrics._since -= 10 * MINUTE
            return quiet, await scraped(made)

    quiet, after = play(story())
    assert quiet["barcast_overdue_seconds", "24x7"] == quiet["barcast_overdue_seconds", "fx"] == 0
    assert 549 < after["barcast_overdue_seconds", "24x7"] < 560  # nine minutes and ten seconds
    assert after["barcast_overdue_seconds", "fx"] == 0


def test_coverage_is_that_of_all_symbols(tmp_path):
    """Each symbol's coverage weighs by its outcomes; another model's is forgotten."""
    sink = LiveSink(None, SimpleNamespace(position=0, now=lambda: START, forecast=lambda: None), Silent())
    model = Spread()

    def outcome(card, **shares):
        forecasts = {
            name: SimpleNamespace(
                coverage=given and Coverage((0.9,), np.array([given[0]]), given[1]), warming=False
            )
            for name, given in shares.items()
        }
        group = Group(START, START, tuple(shares))
        parts = {key: {} for key in ("degraded", "withheld", "holes", "targets", "terms")}
        return Outcome("t", "1m", group, card, forecasts, **parts)

    sink._count(outcome(model.card, A=([0.5, 1.0], (10, 10)), B=([0.9, 0.8], (30, 10)), C=None))
    made = metrics.Metrics(daemon(tmp_path).config, None)
    found = {(s.name, *s.labels.values()): s.value for family in made._coverage(sink) for s in family.samples}
    assert found == {
        ("barcast_coverage_ratio", "1", "0.9"): pytest.approx(0.8),
        ("barcast_coverage_ratio", "2", "0.9"): pytest.approx(0.9),
        ("barcast_coverage_outcomes", "1"): 40,
        ("barcast_coverage_outcomes", "2"): 20,
    }
    sink._count(outcome(Spread("other").card, A=None))
    assert [s for family in made._coverage(sink) for s in family.samples] == []


def test_a_retraining_that_dies_is_counted(tmp_path, monkeypatch):
    """The scheduled job ends without a verdict: it failed, and the model in force stays."""
    made = daemon(tmp_path, LEAST + '[retrain]\ncron = "0 3 * * *"\n', START)
    made.children = children({verb: ["false"] for verb in ("train", "gate", "compact")}, os.environ)
    monkeypatch.setattr(retraining, "RETRY_SECONDS", ())

    async def story():
        async with at_work(made):
            before = await scraped(made)
            await made.retraining.run([])
            return before, await scraped(made)

    before, after = play(story())
    runs = {key[1]: value for key, value in after.items() if key[0] == "barcast_retrain_runs_total"}
    assert runs == {"promoted": 0, "refused": 0, "failed": 1, "stopped": 0}
    assert ("barcast_retrain_seconds",) not in before
    assert after["barcast_retrain_seconds",] > 0
    assert (before["barcast_retrain_scheduled",], after["barcast_retrain_scheduled",]) == (1, 1)


def no_room_before(room):
    """A write to a disk that is full until there is room."""
    if not room.is_set():
        raise OSError(errno.ENOSPC, "database or disk is full")


def test_readiness_names_what_is_missing(tmp_path):
    """Ready is a daemon that leads, recovered, serves, hears a broker, moves, can write and has a model."""
    made = daemon(tmp_path, TWO, START)

    async def story():
        starting = (await made.metrics.ready(), made.metrics.alive(), await scraped(made))
        async with at_work(made):
            seen = [await made.metrics.ready()]
            assert (await scraped(made))["barcast_ready",] == 1
            made.link.deaf = True
            seen.append(await made.metrics.ready())
            made.link.deaf = False
            made.link.connected.clear()
            seen.append(await made.metrics.ready())
            made.link.connected.set()
            room = threading.Event()
            written = made.scribe(no_room_before, room)
            seen.append(await made.metrics.ready())
            full = await scraped(made)
            room.set()
            await written
            seen.append(await made.metrics.ready())
            made.vitals._moved -= 1000
            return starting, seen, made.metrics.alive(), full

    (nothing, living, said), seen, stuck, full = play(story())
    assert {name for name, holds in nothing.items() if holds} == {"leading"}
    assert living == {"moving": True}
    assert said["barcast_ready",] == 0
    assert said["barcast_info", "me", "1m", metrics.version("barcast")] == 1
    assert [[name for name, holds in conditions.items() if not holds] for conditions in seen] == [
        [],
        ["hearing"],
        ["connected"],
        ["journal"],
        [],
    ]
    assert (full["barcast_ready",], full["barcast_disk_full",]) == (0, 1)
    assert stuck == {"moving": False}


def test_a_disk_that_stands_still_is_no_journal(tmp_path, monkeypatch):
    """While the journal's thread waits for its disk the daemon is not ready, and a scrape still answers."""
    made, disk = daemon(tmp_path, TWO, START), threading.Event()
    monkeypatch.setattr(metrics, "ANSWER_SECONDS", 0.05)

    async def story():
        async with at_work(made):
            before = await made.metrics.ready()
            made.scribe(disk.wait, 5)
            try:
                return before, await made.metrics.ready(), await scraped(made)
            finally:
                disk.set()

    before, during, said = play(story())
    assert (before["journal"], during["journal"], said["barcast_ready",]) == (True, False, 0)


def test_who_looks_on_does_not_busy_the_journal(tmp_path, monkeypatch):
    """However many pages are told how things stand, its thread is asked once for all, and again later."""
    made, asked = daemon(tmp_path, TWO, START), []

    async def story():
        async with at_work(made):
            waiting = made.scribe.journal.waiting
            monkeypatch.setattr(made.scribe.journal, "waiting", lambda: (asked.append(0), waiting())[1])
            found = await asyncio.gather(*(made.metrics.lately() for _ in range(16)))
            once = len(asked)
            made.metrics._due = 0.0
            await made.metrics.lately()
            return found, once

    found, once = play(story())
    assert all(all(conditions.values()) for conditions in found)
    assert (once, len(asked)) == (1, 2)


def test_no_label_is_a_symbol(tmp_path):
    """However many symbols there are, the samples stay as many: none is named."""
    made = daemon(tmp_path, LEAST, START + 2 * MINUTE + SECOND)

    async def story():
        async with at_work(made):
            await deliver(made, Message.of(bar("AAA", 2)))
            few = await made.metrics.text()
            await deliver(made, *(Message.of(bar(f"S{i}", 2)) for i in range(50)))
            return few, await made.metrics.text()

    few, many = play(story())
    assert few.count(b"\n") == many.count(b"\n")
    assert b"AAA" not in few
    assert b"S49" not in many
