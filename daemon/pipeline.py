"""The one path from bars to outcomes, and the one loop that drives it, live and in every replay."""

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from traceback import extract_tb
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from barcast.daemon.batcher import Batcher, BatcherState
from barcast.daemon.calendar import REACH, Calendar, Calendars, iso
from barcast.daemon.continuity import Continuity, Faults, Run
from barcast.daemon.ports import (
    Activation,
    Arrival,
    Declaration,
    EndOfSource,
    Event,
    Group,
    Hole,
    Outcome,
    Pause,
    Revision,
    Sink,
    Source,
    Term,
    Warmup,
)
from barcast.daemon.timeframe import Timeframe
from barcast.models import (
    Bar,
    Card,
    ConfigError,
    DataError,
    Forecast,
    Forecaster,
    Verdict,
    Window,
    Windows,
    usable,
)
from barcast.models.forecast import Paths, freeze
from barcast.models.joint import outlook
from barcast.models.window import NEWEST, WindowsState
from barcast.strategies import PATH, Strategy, build, identify

HOLES_WITHHELD = 0.1
"""The share of missing bars in the shortest usable window above which no forecast is made."""

AT_ONCE = 16
"""Windows that the model is asked about at once: each time a group of many symbols is seen to move on."""

MAX_JUMP = 0.3
"""How far a price may be from the close before it, as a share, without a declared split or roll."""

SHOWN = 40
"""Characters of an unknown symbol or a wrong target that a sentence shows."""


class StrategyError(Exception):
    """A strategy raised where it was asked for targets; what it raised is the cause."""


class StrategySettings(msgspec.Struct, frozen=True):
    """One strategy of the path: what it is, what it is called, its parameters.

    `digest` is that of the file of a strategy which is not built in: another one is refused. Empty: any.
    """

    kind: str
    name: str
    params: dict[str, float | int | str | bool] = {}
    digest: str = ""

    @classmethod
    def of(
        cls,
        kind: str,
        name: str | None = None,
        params: Mapping[str, float | int | str | bool] = MappingProxyType({}),
    ) -> "StrategySettings":
        """The settings of a strategy as its file is now, called by its own name unless another is given.

        Raise ConfigError for a kind, a name or a parameter that there is not.
        """
        own, digest = identify(kind)
        settings = cls(kind, name or own, dict(params), digest)
        settings.build()
        return settings

    @classmethod
    def parse(cls, text: str) -> "StrategySettings":
        """Settings as they are written on a command line: KIND or KIND:PARAMETER=VALUE,PARAMETER=VALUE.

        The kind may be FILE.py:CLASS. A value is true, false, a number or a text, which may stand in quotes;
        the parameter `name` is the name. Raise ConfigError for what is not of this form, and as `of` does.
        """
        kind, written = cls.written(text)
        params = {param: typed(value) for param, value in written.items()}
        name = params.pop("name", None)
        return cls.of(kind, None if name is None else str(name), params)

    @staticmethod
    def written(text: str) -> tuple[str, dict[str, str]]:
        """The kind and the texts of the parameters of what `parse` reads. Raise ConfigError as it does."""
        found = re.fullmatch(rf"(?P<kind>{PATH.pattern}|[^:]*?)(:(?P<params>[^:=]+=.*))?", text, re.DOTALL)
        pairs = found["params"].split(",") if found and found["params"] else []
        params: dict[str, str] = {}
        for param, sign, value in (pair.partition("=") for pair in pairs):
            if not (param.strip() and sign) or param.strip() in params:
                found = None
                break
            params[param.strip()] = value.strip()
        if not found:
            raise ConfigError(
                f"strategy {text!r}: write KIND or KIND:PARAMETER=VALUE,PARAMETER=VALUE, each parameter once"
            )
        return found["kind"], params

    def build(self, kept: Path | None = None) -> Strategy:
        """The strategy, of a file as it was, if need be from the folder where versions are `kept`.

        Raise ConfigError when it cannot be made, or its file is not what it was and was not kept.
        """
        return build(self.kind, self.name, self.params, self.digest, kept)


def typed(text: str) -> float | int | str | bool:
    """What a parameter that is written on a command line is: true, false, a number, or a text."""
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the path needs to know; journalled at every change, so that a replay knows it too.

    `touch` are the pairs of barriers that signals tell of, see `joint.Outlook`; without any, none is told.
    """

    root: str
    timeframe: str
    calendar: str
    calendars: dict[str, str] = {}
    symbols: tuple[str, ...]
    max_wait: int
    max_jump: float = MAX_JUMP
    sampler: str | None
    steps: int | None
    touch: tuple[tuple[float, float], ...] = ()
    strategies: tuple[StrategySettings, ...]

    def bar_calendars(self) -> Calendars:
        """The bar closes of the path."""
        return Calendars(self.calendar, Timeframe.parse(self.timeframe), self.calendars)

    def build(self, kept: Path | None = None) -> tuple[Strategy, ...]:
        """The strategies of the path, see `StrategySettings.build`.

        Raise ConfigError for one that cannot be made, and for names that repeat.
        """
        names = [s.name for s in self.strategies]
        if len(set(names)) < len(names):
            raise ConfigError(f"strategy names {', '.join(names)} repeat; give each a name of its own")
        return tuple(s.build(kept) for s in self.strategies)

    def encode(self) -> bytes:
        """Canonical JSON: the same settings always give the same bytes."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def decode(cls, payload: bytes) -> "Settings":
        """Read what `encode` wrote."""
        return msgspec.json.decode(payload, type=cls)


OpenModel = Callable[[str, str | None, int | None, bool], Forecaster]
"""Opens a model by id, with a sampler, a number of steps (None: the model's own), and with paths or not."""


@dataclass(slots=True)
class Counts:
    """What became of the bars."""

    newest: int = 0
    older: int = 0
    correction: int = 0
    duplicate: int = 0
    forgotten: int = 0
    stale: int = 0
    straggler: int = 0


class PipelineState(msgspec.Struct, frozen=True):
    """All that the path knows, to be stored. A field that is added later needs a default."""

    settings: Settings | None
    model: str | None
    counts: Counts
    windows: WindowsState
    runs: dict[str, Run]
    batcher: BatcherState
    newcomers: dict[str, None]
    lacking: dict[str, int]
    paused: bool = False

    def encode(self) -> bytes:
        """As msgpack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, state: bytes) -> "PipelineState":
        """Read what `encode` wrote."""
        return msgspec.msgpack.decode(state, type=cls)


class Pipeline:
    """Batcher, windows, forecaster and strategies: what turns events into outcomes.

    The state is the windows, the continuity of their bars, the batcher, the settings and the model in force,
    with the `fingerprint` that it was activated under (None after a restore), and counters; `paused`, whether
    groups are formed and not forecast; `newcomers`, the symbols that came without a history since, in order;
    and `lacking`, of those whose history was looked up after that, the newest close then. `forecasts` counts
    how often the model was asked, for whoever watches. The first event must be a `Revision`; a model is
    opened, and strategies are made, when the first group needs them: recovery passes over settings whose
    files may have changed since. A file of a user's own is taken as it was when its settings were journalled,
    if it is `kept` in a folder. With `hashed` windows know what stands for their bars.
    """

    def __init__(self, open_model: OpenModel, kept: Path | None = None, hashed: bool = False) -> None:
        self.counts, self.forecasts = Counts(), 0
        self.model: str | None = None
        self.fingerprint: str | None = None
        self.revision: Settings | None = None
        self.windows = Windows(1, hashed)
        self.continuity = Continuity()
        self.calendars = Calendars("24x7", Timeframe.parse("1m"))
        self.batcher = Batcher((), 0, self.calendars.open)
        self._strategies: tuple[Strategy, ...] | None = None
        self.newcomers: dict[str, None] = {}
        self.lacking: dict[str, int] = {}
        self.paused = False
        self._open_model, self._kept = open_model, kept
        self._forecaster: Forecaster | None = None

    @property
    def state(self) -> PipelineState:
        """Everything that what comes depends on; in parts not a copy: encode it before the next event."""
        return PipelineState(
            self.revision,
            self.model,
            self.counts,
            self.windows.state,
            self.continuity.runs,
            self.batcher.state,
            self.newcomers,
            self.lacking,
            self.paused,
        )

    def restore(self, state: PipelineState) -> None:
        """Go on from a state, which is this pipeline's from now on."""
        if state.settings is not None:
            self._revise(state.settings)
        self.model, self._forecaster, self.counts = state.model, None, state.counts
        self.windows = Windows.of(state.windows)
        self.continuity.runs, self.batcher.state = state.runs, state.batcher
        self.newcomers, self.lacking, self.paused = state.newcomers, state.lacking, state.paused

    @property
    def deadline(self) -> int | None:
        """When the path must be told the time again, at the latest."""
        return self.batcher.deadline

    @property
    def forecaster(self) -> Forecaster:
        """The model in force, opened on first use."""
        if self._forecaster is None:
            if self.model is None:
                raise RuntimeError("a group is due before an activation")
            settings = self.settings
            self._forecaster = self._open_model(
                self.model, settings.sampler, settings.steps, bool(settings.touch)
            )
        return self._forecaster

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies of the settings in force, made on first use."""
        if self._strategies is None:
            self._strategies = self.settings.build(self._kept)
        return self._strategies

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        if self.revision is None:
            raise RuntimeError("an event came before the first revision")
        return self.revision

    def due(self, now: int) -> Iterable[Group]:
        """Groups whose wait ended at or before `now`."""
        return self.batcher.due(now)

    def take(self, event: Event, sink: Sink | None = None) -> Iterator[Group]:
        """Take one event; yield each group that it completes before going on."""
        match event:
            case Arrival(time, bars):
                yield from self._take_bars(bars, time, sink)
            case Declaration(_, adjustment):
                if self.windows.adjust(adjustment):
                    self.continuity.disturbed(adjustment.symbol)
                    if sink is not None:
                        sink.adjusted(adjustment)
            case Revision():
                self._revise(Settings.decode(event.settings))
            case Warmup(_, _, bars, symbol):
                self.windows.warm(bars)
                if symbol:
                    self.newcomers.pop(symbol, None)
                    self.lacking[symbol] = self.windows.newest(symbol)
            case Activation():
                self.model, self.fingerprint, self._forecaster = event.model, event.fingerprint, None
                self.windows.lengthen(event.window)
            case Pause():
                self.paused = event.paused

    def outcome(self, group: Group) -> Outcome:
        """Forecast a group and ask the strategies: a function of the state at this moment."""
        card, settings = self.forecaster.card, self.settings
        length = max(2, card.min_window)
        windows: list[Window] = []
        degraded: dict[str, tuple[str, ...]] = {}
        withheld: dict[str, str] = {}
        holes: dict[str, tuple[Hole, ...]] = {}
        terms = self._terms(group, card.horizons)
        close_time, cut, sound = group.close_time, self.windows.cut, self.continuity.sound
        for symbol in group.symbols:
            if not terms[symbol].ends:
                name = self.calendars.of(symbol).name
                withheld[symbol] = f"the calendar {name} ends before the horizons; install a newer one"
                continue
            window = cut(symbol, close_time, card.window)
            if window is None:
                withheld[symbol] = f"0 of at least {card.min_window} bars"
                continue
            if len(window.close_times) < length or not sound(symbol, close_time, length):
                faults, lacking = self._examined(window, card)
                if lacking:
                    holes[symbol] = lacking
                if len(window) < card.min_window:
                    withheld[symbol] = f"{len(window)} of at least {card.min_window} bars"
                    continue
                if faults is not None:
                    if faults.missing > HOLES_WITHHELD * length:
                        withheld[symbol] = f"{faults.missing} of the last {length} bars are missing"
                        continue
                    if reasons := _reasons(faults, length):
                        degraded[symbol] = reasons
            windows.append(window)
        made: list[Forecast] = []
        for first in range(0, len(windows), AT_ONCE):
            made += self.forecaster.forecast(windows[first : first + AT_ONCE])
            self.forecasts += 1
        forecasts = {f.symbol: f for f, good in zip(made, usable(made, card), strict=True) if good}
        for forecast in made:
            if forecast.symbol not in forecasts:
                withheld[forecast.symbol] = "the model gave no forecast that can be a price"
        told = {name: outlook(f, settings.touch) for name, f in forecasts.items()} if settings.touch else {}
        targets: dict[str, dict[str, float]] = {}
        refused: dict[str, str] = {}
        raised: dict[str, Exception] = {}
        if forecasts and not group.straggler:
            for strategy in self.strategies:
                try:
                    own, fault = _asked(strategy, group.close_time, forecasts)
                except StrategyError as error:
                    raised[strategy.name] = error
                    fault = f"it raised {type(error.__cause__).__name__}"
                if fault:
                    refused[strategy.name] = (
                        f"strategy {strategy.name}, close {iso(group.close_time)}: {fault}; none of its "
                        "targets is taken"
                    )
                else:
                    targets[strategy.name] = own
        if told:  # they are large, and nobody needs them any more
            forecasts = {name: msgspec.structs.replace(f, paths=None) for name, f in forecasts.items()}
        return Outcome(
            root=settings.root,
            timeframe=settings.timeframe,
            group=group,
            card=card,
            forecasts=forecasts,
            degraded=degraded,
            withheld=withheld,
            holes=holes,
            targets=targets,
            terms=terms,
            refused=refused,
            raised=raised,
            outlooks=told,
        )

    def valid_until(self, group: Group) -> int:
        """When the last signal of a group may not be used any more, in nanoseconds."""
        return max(term.valid_until for term in self._terms(group, (1,)).values())

    def passed(self, group: Group) -> Outcome:
        """The outcome of a group that is shed: all of its symbols are withheld, and their holes asked for."""
        settings, card = self.settings, self.forecaster.card
        windows = (self.windows.cut(symbol, group.close_time, card.window) for symbol in group.symbols)
        lacking = {w.symbol: self._examined(w, card)[1] for w in windows if w is not None}
        return Outcome(
            root=settings.root,
            timeframe=settings.timeframe,
            group=group,
            card=card,
            forecasts={},
            degraded={},
            withheld=dict.fromkeys(group.symbols, "shed"),
            holes={symbol: holes for symbol, holes in lacking.items() if holes},
            targets={},
            terms=self._terms(group, card.horizons),
            shed=True,
        )

    def _examined(self, window: Window, card: Card) -> tuple[Faults | None, tuple[Hole, ...]]:
        """What is wrong with the bars of a window that a model looks at, and which are to be asked for."""
        symbol, length = window.symbol, max(2, card.min_window)
        calendar, faults = self.calendars.of(symbol), None
        holes: tuple[Hole, ...] = ()
        if not self.continuity.sound(symbol, int(window.close_times[-1]), length) and len(window) > 1:
            faults = self.continuity.faults(window, length, calendar, self.settings.max_jump)
            holes = (faults.hole,) if faults.hole else ()
        short = len(window) < card.min_window
        if short and (before := self._unasked(window, calendar, card.window - len(window))):
            holes = (before, *holes)
        return faults, holes

    def _unasked(self, window: Window, calendar: Calendar, bars: int) -> Hole | None:
        """What a new symbol lacks before its first bar, to be asked for once.

        That is with its first bar after its history was looked up: a function of the state, so that a group
        that is formed again, and not forecast again, changes nothing.
        """
        symbol, first = window.symbol, int(window.close_times[0])
        if len(window) < 2 or self.lacking.get(symbol) != int(window.close_times[-2]):
            return None
        try:
            after = calendar.closes_before(first, bars + 1)
        except DataError:  # the exchange's sessions are not known for so long
            return None
        missing = calendar.missing_between(after, first)
        return Hole(after, first, missing) if missing else None

    def _take_bars(self, bars: Iterable[Bar], time: int, sink: Sink | None) -> Iterator[Group]:
        counts, windows, continuity = self.counts, self.windows, self.continuity
        put, runs, max_jump, of = windows.put, continuity.runs, self.settings.max_jump, self.calendars.of
        newest_of, rebased, add = continuity.newest, windows.rebased, self.batcher.add
        accepted = None if sink is None else sink.accepted
        common, adjusted = None if self.calendars.others else self.calendars.default, windows.adjusted
        calendar: Calendar | None = None
        oldest = 0
        for bar in bars:
            symbol = bar.symbol
            verdict = put(bar)
            if verdict is not NEWEST:
                setattr(counts, verdict.value, getattr(counts, verdict.value) + 1)
                if verdict is not Verdict.DUPLICATE:
                    continuity.disturbed(symbol)
                continue
            counts.newest += 1
            if symbol not in runs and windows.count(symbol) == 1:
                self.newcomers[symbol] = None
            if (own := common or of(symbol)) is not calendar:
                calendar, oldest = own, own.oldest_valid(time)
            newest_of(bar, own, max_jump)
            if adjusted and rebased(symbol):
                continuity.disturbed(symbol)
            if accepted is not None:
                accepted(bar)
            if bar.close_time < oldest:
                counts.stale += 1
                continue
            for group in add(bar, time):
                counts.straggler += group.straggler
                yield group

    def _revise(self, settings: Settings) -> None:
        self.revision, self._forecaster = settings, None
        self.calendars = settings.bar_calendars()
        # What followed under other hours, or within another jump, proves nothing.
        self.continuity = Continuity()
        self.batcher.reconfigure(settings.symbols, settings.max_wait, self.calendars.open)
        self._strategies = None

    def _terms(self, group: Group, horizons: Sequence[int]) -> dict[str, Term]:
        """The term of each symbol; without ends where the calendar does not know that far."""
        terms: dict[str, Term] = {}
        reach = max(horizons)
        for calendar, symbols in self.calendars.split(group.symbols):
            known = calendar.covers(group.close_time, reach)
            closes = calendar.closes_after(group.close_time, max(reach, REACH) if known else REACH)
            ends = tuple(closes[h - 1] for h in horizons) if known else ()
            term = Term(ends, closes[0], closes[REACH - 1])
            terms.update(dict.fromkeys(symbols, term))
        return terms


def _reasons(faults: Faults, length: int) -> tuple[str, ...]:
    """Why a forecast from such bars is degraded, if it is."""
    missing = (f"{faults.missing} of the last {length} bars are missing",) if faults.missing else ()
    return missing + tuple(
        f"the price jumped to {ratio:.4g} times the last close at {iso(time)}; declare a split or a roll"
        for time, ratio in faults.jumps
    )


def _asked(
    strategy: Strategy, close_time: int, forecasts: Mapping[str, Forecast], trial: bool = False
) -> tuple[dict[str, float], str]:
    """The targets of a strategy in the order of the forecasts, and what is wrong with them, if anything.

    A sentence shows of a value only what is the same in every run: it is published. What the strategy is
    given it cannot change. Raise StrategyError for whatever the strategy raises.
    """
    try:
        given: Any = strategy.on_forecasts(close_time, MappingProxyType(forecasts))
    except (Exception, SystemExit) as error:
        when = f"asked on trial{_as_of(close_time)}" if trial else f"close {iso(close_time)}"
        raise StrategyError(
            f"strategy {strategy.name}, {when}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(given, Mapping):
        return {}, f"it gave {_kind(given)}, not a target for each symbol"
    strange = [key for key in given if key not in forecasts]
    if strange:
        names = [repr(key)[:SHOWN] if isinstance(key, str) else _kind(key) for key in strange]
        return {}, f"it gave a target of {min(names)}, which was not forecast"
    targets: dict[str, float] = {}
    for symbol in forecasts:
        if symbol in given:
            target = given[symbol]
            if type(target) is float and -1 <= target <= 1:
                targets[symbol] = target
                continue
            real = isinstance(target, Real) and not isinstance(target, bool)
            if not real or not -1 <= target <= 1:
                shown = str(target)[:SHOWN] if real else _kind(target)
                return {}, f"its target of {symbol} is {shown}, not a number from -1 to 1"
            targets[symbol] = float(target)
    return targets, ""


def in_strategy(error: Exception) -> str:
    """What a strategy raised, and in which line of its own file; a fault of the settings says all itself."""
    cause = error.__cause__
    if isinstance(cause, ConfigError):
        return str(cause)
    frames = extract_tb(cause.__traceback__)[1:] if cause is not None else []
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    where = f", in {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return f"{error}{where}; correct it there"


def _kind(thing: object) -> str:
    return f"a value of type {type(thing).__name__}"


def _as_of(close_time: int) -> str:
    return f" as of {iso(close_time)}" if close_time else ""


def first_asked(histories: Mapping[str, Window], least: int, since: int) -> tuple[tuple[str, ...], int]:
    """The symbols of the first group from `since` on in which one has `least` bars, and its close.

    They are those that have as many by then. Where none ever has, it is the first group, and all in it.
    """
    for need in (least, 1):
        firsts = {}
        for symbol, window in histories.items():
            place = max(need - 1, int(np.searchsorted(window.close_times, since)))
            if place < len(window):
                firsts[symbol] = int(window.close_times[place])
        if firsts:
            first = min(firsts.values())
            return tuple(symbol for symbol, close in firsts.items() if close == first), first
    return (), since


def try_strategies(
    strategies: Iterable[Strategy], card: Card, symbols: Sequence[str] = (), close_time: int = 0
) -> None:
    """Ask each strategy once about forecasts of the card's shape.

    They are of `symbols` at the `close_time` (nanoseconds), better of ones that it will be asked about, as it
    may look them up: TRIAL, and 0, where none are known. Raise ConfigError for a strategy that needs a level
    or a horizon that the model does not forecast, for one that raises, and for targets that are none: better
    before the settings are journalled than at the first group.
    """
    rising = np.linspace(-0.01, 0.01, len(card.levels))
    quantiles, returns = np.tile(rising, (len(card.horizons), 1)), np.zeros((1, len(card.path)))
    some, still = np.full(len(card.horizons), 0.5), np.zeros(len(card.path))
    freeze(quantiles, returns, some, still)
    trial = Forecast(
        symbol="TRIAL",
        close_time=close_time,
        reference=1.0,
        horizons=card.horizons,
        levels=card.levels,
        quantiles=quantiles,
        mean=some,
        std=some,
        rise=some,
        warming=False,
        paths=Paths(card.path, returns, still) if card.path else None,
    )
    forecasts = {name: msgspec.structs.replace(trial, symbol=name) for name in symbols or (trial.symbol,)}
    for strategy in strategies:
        try:
            _, fault = _asked(strategy, close_time, forecasts, trial=True)
        except StrategyError as error:
            raise ConfigError(in_strategy(error)) from error
        if fault:
            raise ConfigError(
                f"strategy {strategy.name}, asked on trial{_as_of(close_time)}: {fault}; correct the strategy"
            )


def pass_over(pipeline: Pipeline, event: Event) -> None:
    """Let the path take an event, without forecasting the groups that it completes."""
    for _ in pipeline.due(event.time):
        pass
    for _ in pipeline.take(event):
        pass


async def run(source: Source, pipeline: Pipeline, sink: Sink, executor: Executor | None = None) -> None:
    """Drive the pipeline until the source ends or the task is cancelled.

    Lateness is decided by an event's own recorded time, and before the event joins; a group that is due
    leaves before anything newer is seen, and is not forecast if the source sheds it. While the path is
    paused, groups leave and nothing is said of them. With an executor the forecasts are computed there, so
    that a live event loop stays free; in a replay they are computed at once.
    """

    async def emit(group: Group) -> None:
        if pipeline.paused:
            return
        if await source.sheds(group, pipeline.valid_until):
            outcome = pipeline.passed(group)
        elif executor is None:
            outcome = pipeline.outcome(group)
        else:
            outcome = await asyncio.get_running_loop().run_in_executor(executor, pipeline.outcome, group)
        await sink.emit(outcome)

    while True:
        try:
            event = await source.next(pipeline.deadline)
        except EndOfSource:
            return
        now = source.now() if event is None else event.time
        for group in pipeline.due(now):
            await emit(group)
        if event is not None:
            for group in pipeline.take(event, sink):
                await emit(group)
        await sink.settle(now)
