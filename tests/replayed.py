"""All messages of a journal that is computed again, for tests that look at each: `verify` keeps none."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from barcast.backtest.verify import _Run, _Sink
from barcast.daemon import journal as journals
from barcast.daemon.journal import Journal
from barcast.daemon.wire import Outgoing


@dataclass(frozen=True, slots=True)
class Replayed:
    """Signals, targets, groups and requests for bars, the first `settled` of them in the outbox by now.

    `fingerprints` are those (recorded, own) that differ.
    """

    messages: list[Outgoing]
    settled: int = 0
    fingerprints: tuple[tuple[str, str], ...] = ()


def replay_journal(journal: journals.Place, state_dir: Path | None = None) -> Replayed:
    """Compute it as far as it reaches back; raises what `verify` does."""
    said: list[Outgoing] = []
    with closing(Journal(journal, readonly=True)) as reader, reader.one_moment():
        run = _Run(reader, 0, state_dir)
        sink = _Sink(run.pipeline, 0, lambda messages, _: said.extend(messages))
        run.settled(sink)
        settled = len(said)
        run.rest(sink)
    return Replayed(said, settled, tuple(sink.fingerprints))
