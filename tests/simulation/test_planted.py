"""Bugs planted into the daemon: one of the first schedules finds each, and says which promise is broken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from barcast.daemon import pipeline, start
from barcast.daemon.journal import Journal
from barcast.daemon.live import Courier, LiveSource
from barcast.models.window import Windows
from tests.planting import plant
from tests.simulation.world import play

WITHIN = 150
"""Schedules that may pass before a bug is found."""


@dataclass(frozen=True)
class Bug:
    """A function of the daemon, what to put in the place of which of its words, and whose promise it breaks.

    The promises are named after the functions of the oracle.
    """

    where: Callable[..., Any]
    words: dict[str, str]
    breaks: set[str]


COMMITS = "numbers = self._scribe(self._scribe.journal.append, records, outgoing)"

BUGS = {
    "a bar is acknowledged before it is committed": Bug(
        LiveSource._begin,
        {COMMITS: f"self._link.ack(deliveries); {COMMITS}"},
        {"acknowledged"},
    ),
    "progress is committed before the outbox": Bug(
        Journal.settle,
        {
            "    _enqueue(db, outgoing)\n": "",
            "_come(db, progress)": "_come(db, progress)\n    with self._db.transaction() as db:\n"
            "        _enqueue(db, outgoing)",
        },
        {"told_of", "replayed"},
    ),
    "lateness is decided when the loop gets to it": Bug(
        pipeline.run,
        {"now = source.now() if event is None else event.time": "now = source.now()"},
        {"replayed"},
    ),
    "a body tells of its boot, and its id does not": Bug(
        Courier._publish,
        {
            "fault = await": 'payload = message.payload[:-1] + b\',"boot":"%s"}\' % self._boot.encode()\n'
            "    message = Outgoing(message.id, message.topic, payload, message.retain, message.expires)\n"
            "    fault = await"
        },
        {"one_body"},
    ),
    "a window takes a bar that is newer than the close": Bug(
        Windows.cut,
        {"else ring.find(close_time)": "else ring.stop - 1"},
        {"windows"},
    ),
    "the courier overtakes a message that waits": Bug(
        Journal.pending,
        {"_PENDING": "_PENDING.replace('SELECT MIN(n)', 'SELECT MAX(n)')"},
        {"in_order"},
    ),
    "a refused message is taken for delivered": Bug(
        Courier._deliver,
        {"blocked.add(topic)": "states.append((row.n, State.DELIVERED))"},
        {"delivered"},
    ),
    "a recovery loses what was not settled": Bug(
        start.Following.recover,
        {
            "backlog = list(": "backlog = []\n    for _, event in (",
            "revision))\n": "revision)):\n        pass_over(self._pipeline, event)\n",
        },
        {"told_of"},
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name, memory, monkeypatch):
    """The witness says what is wrong with one of the first schedules."""
    bug = BUGS[name]
    plant(bug.where, bug.words, monkeypatch)
    for seed in range(WITHIN):
        found = play(seed, memory).violations
        if found:
            assert {fault.partition(":")[0] for fault in found} & bug.breaks, found
            return
    pytest.fail(f"{WITHIN} schedules do not find it")
