"""What is old leaves the journal: its bars go into the archive, the state of the path into a snapshot.

Of the snapshots the one after the last record that left is where a replay begins, and the newest one where a
start begins; between them those are kept that a verification of the last day begins with. A compaction that
is killed leaves a journal that recovers and replays as before, and the next one ends its work.
"""

import asyncio
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from barcast.daemon import bars
from barcast.daemon.events import Champion, Warmth, events, restore
from barcast.daemon.journal import Journal, Kind, Place, Snapshot, exists
from barcast.daemon.pipeline import Pipeline, Settings, pass_over
from barcast.daemon.ports import Arrival, Event
from barcast.daemon.room import room
from barcast.daemon.start import only_one
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.daemon.trainer import Run
from barcast.models import ConfigError

FIRST_SECONDS, EVERY_SECONDS = 600.0, 86_400.0
"""How long after a start the daemon compacts its journal, and how often from then on."""

LONGEST_SECONDS = 6 * 3600.0
"""How long a compaction may take before it is killed: the first one of a large journal takes many minutes."""
LAST_LINES = 5
"""Lines of what a compaction said that are logged."""
VERIFIED = 25 * 3600 * 10**9
"""Nanoseconds that a verification may reach back and find a snapshot near: a day, and an hour more."""
SIGNALS_KEPT = 500
"""Bars for which messages stay in the outbox: drift is seen by signals whose outcomes are known by now."""

log = structlog.get_logger()
_MODEL = re.compile(r"[0-9a-f]{16}|\.[0-9a-f]{16}\.partial")


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did: how many messages with bars and messages of the outbox left, which models.

    `base` is the record up to which messages have left, `newest` the one after which a start reads on, `days`
    how many files of the archive changed.
    """

    records: int
    messages: int
    days: int
    base: int
    newest: int
    models: tuple[str, ...]

    def sentence(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.records} messages with bars left for {self.days} files of the archive, {self.messages} "
            f"left the outbox, {len(self.models)} models were removed; a start reads on after record "
            f"{self.newest}, a replay after {self.base}"
        )


def compact(
    state_dir: Path,
    now: int,
    keep: int,
    named: Collection[str],
    rest: Callable[[], None],
    place: Place | None = None,
) -> Compacted:
    """Let leave what is older than `keep` nanoseconds at `now`; a daemon may be at work.

    Its journal is that of the state directory where no `place` is named.

    What it has not settled yet stays in any case, and so do decisions, settings and adjustments, which are
    small. `named` are the models that the configuration names. `rest` is called after each commit. Raise
    ConfigError while another compaction is at work.
    """
    place = place or state_dir / "journal.db"
    if not exists(place):
        raise ConfigError(f"{place}: no journal there; run the daemon first")
    with only_one(state_dir / "compaction.lock", "compaction"), room(state_dir):
        journal = Journal(place)
        try:
            return _compact(journal, state_dir, now, keep, named, rest)
        finally:
            journal.close()


async def daily(run: Run) -> None:
    """Run the verb `compact` some minutes after the start and then each day."""
    await asyncio.sleep(FIRST_SECONDS)
    while True:
        said: deque[str] = deque(maxlen=LAST_LINES)
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                status, out = await run("compact", [], said.append)
        except TimeoutError:
            log.error("compaction_failed", reason=f"no end after {LONGEST_SECONDS:.0f} s; it was killed")
        except OSError as error:  # such as no memory for another process
            log.error("compaction_failed", reason=str(error))
        else:
            said.extend(out.decode("utf-8", "replace").splitlines())
            if status:
                log.error("compaction_failed", exit_status=status, last_words="\n".join(said))
            else:
                log.info("compacted", said="\n".join(said))
        await asyncio.sleep(EVERY_SECONDS)


def _compact(
    journal: Journal, state_dir: Path, now: int, keep: int, named: Collection[str], rest: Callable[[], None]
) -> Compacted:
    journal.begin_compaction()
    revision = journal.last(Kind.REVISION)
    if revision is None:  # of a start that was killed
        return Compacted(0, 0, 0, 0, 0, ())
    # Settings may be there before anything is settled; all of a journal are of one timeframe.
    timeframe = Settings.decode(revision.payload).timeframe
    before, settled = now - keep, journal.progress().seq
    pipeline = Pipeline(bars.serves_nothing)
    base = restore(journal, pipeline, journal.base)
    days = 0

    def old() -> Iterator[Event]:
        nonlocal base
        for seq, event in events(journal.records(base, settled), pipeline.revision):
            if event.time > before:
                return
            base = seq
            yield event

    for batch in bars.batches(old()):
        seen = list(pipeline.windows.superseded())
        came = bars.received((bar for e in batch if isinstance(e, Arrival) for bar in e.bars), seen)
        for event in batch:
            pass_over(pipeline, event)
        if came.height:
            days += bars.write_days(came, state_dir / "archive", timeframe)
    if base > journal.base:
        journal.put_snapshot(Snapshot(base, pipeline.state.encode()), rest)
    newest = _bring_up(journal, pipeline, base, settled, rest)
    left = [snapshot for snapshot in journal.snapshots() if snapshot[0] >= base]
    journal.rebase(base, {base, newest, *_for_verification(left, now)})
    rest()
    journal.drop_snapshots(rest)
    records = journal.drop_bars(rest)
    for record in journal.decisions(base):
        if record.kind in (Kind.WARMUP, Kind.NEWCOMER) and (warmth := Warmth.decode(record.payload)).bars:
            journal.shorten(record.seq, msgspec.structs.replace(warmth, bars=()).encode())
            rest()
    bar = Timeframe.parse(timeframe).duration or DAY
    messages = journal.drop_messages(min(before, now - SIGNALS_KEPT * bar), rest)
    models = tuple(_collect(state_dir / "models", {*named, *_referenced(journal, base)}, before))
    return Compacted(records, messages, days, base, newest, models)


def _for_verification(snapshots: Sequence[tuple[int, int]], now: int) -> Iterator[int]:
    """Of snapshots (record, time) the newest that is old enough to begin with, and the next one to be so."""
    old = [seq for seq, time in snapshots if time <= now - VERIFIED]
    yield from old[-1:]
    yield from [seq for seq, _ in snapshots[len(old) :]][:1]


def _bring_up(journal: Journal, pipeline: Pipeline, base: int, settled: int, rest: Callable[[], None]) -> int:
    """Take the snapshot that a start begins with, after the last record that is settled."""
    found = journal.snapshot(settled)
    if found is not None and found.seq > base:
        base = restore(journal, pipeline, settled)
    position = base
    for seq, event in events(journal.records(base, settled), pipeline.revision):
        pass_over(pipeline, event)
        position = seq
    if position > base:
        journal.put_snapshot(Snapshot(position, pipeline.state.encode()), rest)
    return position


def _referenced(journal: Journal, base: int) -> Iterator[str]:
    """The models that a replay needs, and the one before them: the way back from a bad activation."""
    activations = list(journal.of_kind(Kind.ACTIVATION))
    since = sum(record.seq <= base for record in activations)
    for record in activations[max(0, since - 2) :]:
        champion = Champion.decode(record.payload)
        yield champion.model
        yield from (reign.model for reign in champion.before)  # where a rollback leads to


def _collect(models: Path, needed: Collection[str], before: int) -> Iterator[str]:
    """Remove the models that nothing refers to and nobody has changed since `before`; yield their names."""
    for folder in sorted(models.iterdir()) if models.is_dir() else ():
        at = folder.stat()  # a copy has the old time of its source, and a new one of its own
        if (
            _MODEL.fullmatch(folder.name)
            and folder.name not in needed
            and max(at.st_mtime_ns, at.st_ctime_ns) < before
        ):
            shutil.rmtree(folder)
            yield folder.name
