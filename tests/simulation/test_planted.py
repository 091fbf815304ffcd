"""Bugs planted into the daemon: some schedule among the first finds each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from barcast.daemon import pipeline, start, wire
from barcast.daemon.batcher import Batcher
from barcast.daemon.journal import Journal
from barcast.daemon.live import Courier, LiveSource
from barcast.models.window import Windows
from tests.planting import plant
from tests.simulation.world import play


@dataclass(frozen=True)
class Bug:
    """A function of the daemon, what to put in the place of which of its words, and who says so."""

    where: Callable[..., Any]
    words: dict[str, str]
    found_by: str


BUGS = {
    "a bar is acknowledged before it is committed": Bug(
        LiveSource._begin,
        {
            "numbers = self._scribe(self._scribe.journal.append, records, outgoing)": "self._link.ack(deliveries); "
            "numbers = self._scribe(self._scribe.journal.append, records, outgoing)"
        },
        "acknowledged",
    ),
    "the outbox is not in one transaction with the progress": Bug(
        Journal.settle,
        {
            "with _transaction(self._db) as db:\n        _enqueue(db, outgoing)\n        _come(db, progress)": "with "
            "_transaction(self._db) as db:\n        _come(db, progress)\n    with _transaction(self._db) as db:\n"
            "        _enqueue(db, outgoing)"
        },
        "told_of|replayed",
    ),
    "lateness is decided when the loop gets to it": Bug(
        pipeline.run,
        {"now = source.now() if event is None else event.time": "now = source.now()"},
        "replayed",
    ),
    "an id is that of the topic and not of the body": Bug(
        wire._outgoing,
        {
            "digest = hashlib.sha256(topic.encode() + b\"\\0\" + msgspec.json.encode(body)).hexdigest()[:24]": "digest = "
            "hashlib.sha256(f'{topic} {getattr(body, \"close_time\", id(body))}'.encode()).hexdigest()[:24]"
        },
        ".",
    ),
    "a window takes a bar that is newer than the close": Bug(
        Windows.cut,
        {"at = None if ring is None else ring.find(close_time)": "at = None if ring is None else ring.stop - 1"},
        "windows",
    ),
    "the courier overtakes a refused message": Bug(
        Courier._deliver,
        {"blocked.add(topic)": "blocked.add(topic); states.append((row.n, State.DELIVERED))"},
        "delivered|in_order",
    ),
    "a recovery forgets the settled clock": Bug(
        start.recover,
        {"if settled.clock > clock:": "if settled.clock > clock and False:"},
        ".",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the first schedules says what is wrong."""
    bug = BUGS[name]
    plant(bug.where, bug.words, monkeypatch)
    for seed in range(200):
        outcome = play(seed, tmp_path)
        if outcome.violations:
            print(name, seed, outcome.violations[0][:300])
            return
    pytest.fail(f"200 schedules do not find it")
