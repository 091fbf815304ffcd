"""A recorded live run, computed again from its journal and held against what was published."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from barcast.backtest.replay import Recording, replay
from barcast.daemon import wire
from barcast.daemon.bars import serves_nothing
from barcast.daemon.events import events, restore
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.pipeline import Pipeline, Settings, pass_over
from barcast.daemon.ports import Shed
from barcast.daemon.store import ModelStore
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError, DataError, Forecaster


def replay_journal(journal: Path) -> list[Outgoing]:
    """Compute again every signal, target and group message from a journal, as far as it reaches back.

    Models are those of the journal's state directory; one that forecasts nothing in it is not opened. What
    was passed over live is passed over. Raise ConfigError when the journal has no settings in it, or a model
    another fingerprint here than it was activated under, CheckpointError when a model is missing or changed.
    """
    reader = Journal(journal, readonly=True)
    try:
        with reader.one_moment():
            revision = reader.last(Kind.REVISION)
            if revision is None:
                raise ConfigError(f"{journal}: nothing was recorded yet; run the daemon first")
            list(events([revision]))  # names the record if it is damaged
            store = ModelStore(journal.parent / "models", Settings.decode(revision.payload).timeframe)

            def open_same(model: str, sampler: str | None, steps: int | None) -> Forecaster:
                forecaster = store.open(model, sampler, steps)
                if (mine := forecaster.card.fingerprint) != pipeline.fingerprint:
                    raise ConfigError(
                        f"{journal}: recorded under {pipeline.fingerprint!r}, here it is {mine!r}; bytes are "
                        "promised within one fingerprint: replay where it was recorded"
                    )
                return forecaster

            recording, pipeline = Recording(), Pipeline(open_same)
            base = restore(reader, pipeline, reader.base)
            active = reader.last(Kind.ACTIVATION, base)
            for _, event in events([active] if active else []):  # a snapshot knows no fingerprint
                list(pipeline.take(event))
            for seq, shed in events(reader.of_kind(Kind.SHED)):
                if seq > base and isinstance(shed, Shed):
                    until = events(reader.records(base, shed.after), pipeline.revision)
                    replay((event for _, event in until), pipeline, recording, shed.clock)
                    passed = events(reader.records(max(base, shed.after), seq), pipeline.revision)
                    for _, event in passed:
                        pass_over(pipeline, event)
                    base = seq
            rest = events(reader.records(base), pipeline.revision)
            replay((event for _, event in rest), pipeline, recording)
            return recording.messages
    finally:
        reader.close()


@dataclass(frozen=True, slots=True)
class Difference:
    """Replayed messages beside captured ones, as (topic, payload), each counted once.

    `older` is how many captured ones are of closes that have left the journal: nothing is said of them.
    """

    signals: int
    differing: tuple[tuple[str, bytes], ...]
    missing: tuple[Outgoing, ...]
    older: int = 0

    def sentence(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.signals} signals captured, {len(self.differing)} messages differ from the replay, "
            f"{len(self.missing)} of the replay were not captured"
            + (f"; {self.older} are older than what the journal still holds" if self.older else "")
        )


def compare(
    replayed: Iterable[Outgoing], captured: Iterable[tuple[str, bytes]], left: int = -1
) -> Difference:
    """Compare signals, targets, groups and requests for bars byte by byte.

    At-least-once delivery may have brought a message twice: it counts once. What a replay does not say, such
    as a status, is left out, and so is what is of closes up to `left` (nanoseconds), which has left the
    journal.
    """
    kinds = ("/signals/", "/targets/", "/groups/", "/backfill/")
    seen = dict.fromkeys(pair for pair in captured if any(kind in pair[0] for kind in kinds))
    again = {(m.topic, m.payload): m for m in replayed}
    older = [key for key in seen if key not in again and 0 <= _close(key[1]) <= left]
    for key in older:
        del seen[key]
    return Difference(
        sum("/signals/" in topic for topic, _ in seen),
        tuple(key for key in seen if key not in again),
        tuple(m for key, m in again.items() if key not in seen),
        len(older),
    )


class _Closed(msgspec.Struct):
    """Of a message, the close that it is of: a request for bars names it as their end."""

    close_time: datetime | None = None
    before: datetime | None = None


def _close(payload: bytes) -> int:
    """The close that a message is of in nanoseconds, -1 where it names none."""
    try:
        found = msgspec.json.decode(payload, type=_Closed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return -1
    close = found.close_time or found.before
    return -1 if close is None or close.tzinfo is None else wire.to_ns(close)


def left_until(journal: Path) -> int:
    """The close (nanoseconds) up to which groups have left a journal, -1 where none has."""
    reader = Journal(journal, readonly=True)
    try:
        with reader.one_moment():
            pipeline = Pipeline(serves_nothing)
            restore(reader, pipeline, reader.base)
            return pipeline.batcher.state.closed
    finally:
        reader.close()


def read_capture(path: Path) -> list[tuple[str, bytes]]:
    """Topics and payloads that a subscriber wrote down, one message a line.

    A line is a topic, a blank and the payload, as `mosquitto_sub -v` prints it, or a JSON array of the two.
    Raise DataError for a file or line that is neither.
    """
    pairs = msgspec.json.Decoder(tuple[str, str])
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the lines that a subscriber wrote down")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        name, blank, plain = line.partition(b" ")
        if blank and not line.startswith(b"["):
            found.append((name.decode("utf-8", "replace"), plain))
            continue
        try:
            topic, payload = pairs.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}, line {number}: {line[:40].decode('utf-8', 'replace')!r} is no message ({error}); "
                "write topic, blank and payload, as mosquitto_sub -v does"
            ) from error
        found.append((topic, payload.encode()))
    return found
