"""What a start does before it serves: holds the state directory, recovers, and decides what has changed."""

import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from barcast.daemon import wire
from barcast.daemon.bars import last_bars
from barcast.daemon.config import Config
from barcast.daemon.events import Champion, Reign, Warmth, events, restore
from barcast.daemon.history import bars, digest, history_files, scan
from barcast.daemon.journal import Journal, Kind, Progress, Record
from barcast.daemon.pipeline import Pipeline, Settings, pass_over, try_strategies
from barcast.daemon.ports import Event
from barcast.daemon.room import flush, hand_over, make, room
from barcast.daemon.store import ModelStore
from barcast.models import Bar, ConfigError, Forecaster
from barcast.strategies import PATH

CLOCK_BACK = 86_400 * 10**9
"""How far the clock may be behind the newest record of the journal at a start, in nanoseconds."""

PART_BARS = 10_000
"""Bars in one record of a warm-up, about: the event loop takes them at once."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Opening:
    """What a start finds: who serves since when, and what differs from the journal's last.

    `settings` is None where the journal has them already, `activated` for a champion that is still to be
    activated; `warmth` is what the windows lack.
    """

    settings: bytes | None
    champion: Champion
    activated: int | None
    warmth: Sequence[Warmth]


def opening(config: Config, journal: Journal, store: ModelStore, now: int) -> Opening:
    """Find what this start has to decide.

    Raise ConfigError for what could not work later, before any of it is journalled.
    """
    settings, stamped = config.settings(), journal.last_time()
    if stamped > now + CLOCK_BACK:
        raise ConfigError(
            f"{journal.place}: its newest record is of {wire.to_text(stamped)}, and the clock shows "
            f"{wire.to_text(now)}; set the clock right, or name another state_dir"
        )
    last = journal.last(Kind.REVISION)
    before = Settings.decode(last.payload) if last else settings
    if (before.timeframe, before.calendar) != (settings.timeframe, settings.calendar):
        raise ConfigError(
            f"timeframe, calendar: {config.state_dir} holds {before.timeframe} bars on "
            f"{before.calendar}, not {settings.timeframe} on {settings.calendar}; name another state_dir"
        )
    served = [(record.time, Champion.decode(record.payload)) for record in journal.of_kind(Kind.ACTIVATION)]
    since, known = served[-1] if served else (None, None)
    model = store.resolve(config.model.name, config.model.first, known.model if known else None)
    card = fitting(settings, store, model, now).card
    keep_strategies(settings, config.state_dir / "strategies")
    reason = "the configuration names it"
    activated: int | None = None
    if known and (known.model, known.fingerprint) == (model, card.fingerprint):
        champion, activated = known, since
    elif known and known.model == model:
        champion = known.succeeded_by(known.reign, card, "the machine has another fingerprint")
    else:
        reign = Reign(model, until=store.known_until(model))
        nobody = Champion(model, card.fingerprint, card.window, reason, until=reign.until)
        champion = known.succeeded_by(reign, card, reason) if known else nobody
    have = max((champion.window for _, champion in served), default=0)
    return Opening(
        settings.encode() if last is None or before != settings else None,
        champion,
        activated,
        warmth(config, card.window, have, journal.last(Kind.WARMUP), now),
    )


def fitting(settings: Settings, store: ModelStore, model: str, now: int) -> Forecaster:
    """A model as settings have it sampled.

    Raise CheckpointError for one that cannot be opened, ConfigError for strategies that it cannot serve.
    """
    forecaster = store.open(model, settings.sampler, settings.steps, bool(settings.touch))
    try_all(settings, forecaster, now)
    return forecaster


def try_all(settings: Settings, forecaster: Forecaster, now: int) -> None:
    """Try the strategies of settings on the symbols that they name, at the newest close before `now` (ns).

    Raise ConfigError as `try_strategies` does.
    """
    calendar = settings.bar_calendars().default
    close = calendar.closes_before(now, 1) if calendar.covers(now) else 0
    try_strategies(settings.build(), forecaster.card, settings.symbols, close)


def keep_strategies(settings: Settings, folder: Path) -> None:
    """Keep a copy of each file of a user's own strategies, as DIGEST.py, for recovery and replays.

    Raise ConfigError for one that changed since the configuration was read, DiskFullError without room.
    """
    for strategy in settings.strategies:
        path, version = PATH.fullmatch(strategy.kind), folder / f"{strategy.digest}.py"
        if path is None or version.is_file():
            continue
        source = Path(path["file"]).read_bytes()
        if hashlib.sha256(source).hexdigest()[: len(strategy.digest)] != strategy.digest:
            raise ConfigError(f"strategy {strategy.kind}: it changed while it was read; try again")
        partial = folder / f".{version.name}"
        with room(folder.parent):
            make(folder)
            partial.write_bytes(source)
            flush(partial)
            partial.replace(version)
            flush(folder)


@contextmanager
def handed_down(config: Config) -> Iterator[None]:
    """Let the daemon's children go by a configuration from when what is done within went well.

    Its file may say something else by then, which a reload refused. Raise DiskFullError without room.
    """
    partial = config.in_force.with_suffix(".partial")
    with room(config.state_dir):
        partial.unlink(missing_ok=True)
        partial.touch(0o600)
        partial.write_text(config.text(), "utf-8")
    try:
        yield
        partial.replace(config.in_force)
    finally:
        partial.unlink(missing_ok=True)


def warmth(config: Config, length: int, have: int, record: Record | None, now: int) -> list[Warmth]:
    """What the windows, which keep `have` bars, lack of what is known: in parts, of whole symbols each.

    A model that looks back over more, `length` bars, gets as many of each symbol from journal, archive and
    history. One that does not gets those of the history alone, and only if `record`, the last warm-up, is not
    of the files that are there.
    """
    files = history_files(config.state_dir / "history")
    found, calendars = digest(files) if files else "", config.bar_calendars()
    changed = bool(files) and (record is None or Warmth.decode(record.payload).digest != found)
    if length > have:
        own = last_bars(config.state_dir, config.journal_place, calendars, now, length)
    elif changed:
        frame = scan(files, "close", calendars, until=now + 1).collect()
        own = (tuple(bars(group.tail(length).lazy())) for _, group in frame.group_by("symbol"))
    else:
        return []
    parts: list[list[Bar]] = [[]]
    for symbol in own:
        if len(parts[-1]) + len(symbol) > PART_BARS and parts[-1]:
            parts.append([])
        parts[-1] += symbol
    # Without a bar as well: the next start then knows that it has seen these files.
    return [Warmth(found, length, tuple(part)) for part in parts if part or changed]


class Following:
    """The path as a journal has it, brought up to the journal's end as often as is wanted.

    The state is the path's, the record that it is after and the time of that, and how far the journal had
    come.
    """

    def __init__(self, journal: Journal, pipeline: Pipeline) -> None:
        self.position = self.snapshot = self.read = 0
        self._journal, self._pipeline = journal, pipeline
        self._settled = Progress(0, 0)
        self._clock = -1

    def catch_up(self) -> None:
        """Take what was settled since."""
        journal, pipeline = self._journal, self._pipeline
        with journal.one_moment():
            self._settled = journal.progress()
            if self._clock < 0 or journal.base > self.position:
                self.position = self.snapshot = restore(journal, pipeline, self._settled.seq)
                self._clock = 0
            for seq, event in events(journal.records(self.position, self._settled.seq), pipeline.revision):
                pass_over(pipeline, event)
                self.position, self._clock, self.read = seq, event.time, self.read + 1

    def recover(self) -> list[tuple[int, Event]]:
        """Bring the path to the very state that it had; return the events still to be settled.

        Starting and recovering from a crash are the same: groups that were settled are formed again, so that
        the batcher knows them, and not forecast again.
        """
        self.catch_up()
        backlog = list(events(self._journal.records(self._settled.seq), self._pipeline.revision))
        # A timer released groups after the last event, at a time that no event has.
        if self._settled.clock > self._clock:
            for _ in self._pipeline.due(self._settled.clock):
                pass
        log.info("recovered", records=self.read, snapshot=self.snapshot, backlog=len(backlog))
        return backlog


@contextmanager
def only_one(path: Path, who: str = "instance") -> Iterator[None]:
    """Hold a lock file of the state directory, so that no second one is at the same work."""
    with room(path.parent):
        file = path.open("a")
        hand_over(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"state_dir: {path.parent} is in use by another {who}; stop it or name another directory"
            ) from error
        yield
