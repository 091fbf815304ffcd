"""The replay composition root: the very path that runs live, fed from history."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import polars as pl

from barcast.backtest import caveats
from barcast.backtest.arguments import (
    Moment,
    check_adjustments,
    check_execution,
    listed,
    nanoseconds,
    paths_of,
    settings_of,
)
from barcast.backtest.cache import ForecastCache, Remembered
from barcast.backtest.ledger import BENCHMARK, YEAR, Execution, Ledger
from barcast.backtest.metrics import portfolio
from barcast.backtest.result import BacktestResult
from barcast.backtest.scoring import scores
from barcast.backtest.skill import SCHEMA as SKILL
from barcast.backtest.skill import skill
from barcast.backtest.tables import Rows, Store, collected, scratch_in
from barcast.backtest.walk import TRAININGS, WalkForward
from barcast.backtest.workers import writing_in
from barcast.daemon import wire
from barcast.daemon.adjustments import adjusted
from barcast.daemon.calendar import Calendars, iso
from barcast.daemon.config import Retrain, cron_schedule, duration
from barcast.daemon.events import Champion
from barcast.daemon.history import History, Stamp, digest, find_timeframe
from barcast.daemon.pipeline import (
    MAX_JUMP,
    Pipeline,
    Settings,
    StrategySettings,
    first_asked,
    in_strategy,
    run,
    try_strategies,
)
from barcast.daemon.ports import (
    Activation,
    Arrival,
    Declaration,
    EndOfSource,
    Event,
    Group,
    Outcome,
    Revision,
    Sink,
    Warmup,
)
from barcast.daemon.store import ModelStore
from barcast.daemon.wire import Outgoing
from barcast.models import (
    BASELINES,
    Adjustment,
    Bar,
    ConfigError,
    DataError,
    Forecaster,
    Window,
    check_sampled,
    open_model,
)
from barcast.models.joint import check_pairs
from barcast.strategies.params import parameters_of

if TYPE_CHECKING:
    from barcast.models.transfer.generator import Scenario


class Agenda(Protocol):
    """What is done at moments of its own between the events of a replay."""

    @property
    def next(self) -> int | None:
        """The next such moment, in nanoseconds."""
        ...

    def came(self, time: int) -> None:
        """Take note that bars came."""
        ...

    def act(self, now: int) -> Iterable[Event]:
        """Do what is due; return what the path has to know of it."""
        ...


class ReplaySource:
    """Events in order of their time, and a clock that jumps from one to the next.

    After the last event the clock jumps from deadline to deadline, so that no group stays behind; with `end`
    (nanoseconds), not beyond that. What is on the `agenda` comes after the events of its moment and the
    groups that are due by then. Groups whose keys are in `shed` are shed.
    """

    def __init__(
        self,
        events: Iterable[Event],
        end: int | None = None,
        agenda: Agenda | None = None,
        shed: Container[str] = (),
    ) -> None:
        self._events, self._end, self._agenda, self._shed = iter(events), end, agenda, shed
        self._ahead: Event | None = next(self._events, None)
        self._decided: deque[Event] = deque()
        self._now = 0

    def now(self) -> int:
        """The simulated time in nanoseconds."""
        return self._now

    async def next(self, deadline: int | None) -> Event | None:
        """See `Source.next`."""
        while not self._decided:
            event, agenda = self._ahead, self._agenda
            if event is None and (deadline is None or (self._end is not None and deadline > self._end)):
                raise EndOfSource
            ahead = None if event is None else event.time
            first = min(time for time in (deadline, ahead) if time is not None)
            if agenda is not None and agenda.next is not None and agenda.next < first:
                self._now = agenda.next
                self._decided.extend(agenda.act(self._now))
                continue
            self._now = first
            if event is None or event.time > first:
                return None
            self._ahead = next(self._events, None)
            if agenda is not None and isinstance(event, Arrival):
                agenda.came(event.time)
            return event
        return self._decided.popleft()

    async def sheds(self, group: Group, valid_until: Callable[[Group], int]) -> bool:
        """Whether it was shed when it was live."""
        return group.key in self._shed


class Recording:
    """A sink that keeps every outgoing message, as the live daemon would have sent it."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []

    def accepted(self, bar: Bar) -> None:
        """Nothing is sent of a bar alone."""

    def adjusted(self, adjustment: Adjustment) -> None:
        """Nothing is sent of an adjustment alone."""

    async def emit(self, outcome: Outcome) -> None:
        """Encode the outcome's messages."""
        self.messages.extend(wire.messages(outcome))

    async def settle(self, now: int) -> None:
        """There is nothing to make durable."""


def arrivals(bars: Iterable[Bar]) -> Iterator[Arrival]:
    """Bars sorted by close time, as if those of one close came together at that moment."""
    for close_time, together in groupby(bars, attrgetter("close_time")):
        yield Arrival(close_time, tuple(together))


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits for the outside: it needs no event loop, also in a notebook."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("a replay waited for something outside of it")


def replay(
    source: Iterable[Event],
    pipeline: Pipeline,
    sink: Sink,
    end: int | None = None,
    agenda: Agenda | None = None,
    shed: Container[str] = (),
) -> None:
    """Drive the path with events until their end, and on to the last group that waits, or is due by `end`."""
    drive(run(ReplaySource(source, end, agenda, shed), pipeline, sink))


_bits = msgspec.msgpack.Encoder(enc_hook=np.ndarray.tobytes).encode


class _Decisions:
    """A sink in front of the ledger: hashes every outcome to the last bit, so that two runs can be compared.

    It hands signals on to the walk-forward, and keeps what was wrong with the bars: for each symbol how many
    forecasts were withheld and why the last time, how many were degraded, and what holes did, and which
    symbols were forecast. What live is
    published is a function of the outcomes, and takes longer to be written than they take to be made.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.sha256 = hashlib.sha256()
        self.forecast: set[str] = set()
        self.withheld: dict[str, tuple[int, str]] = {}
        self.degraded: Counter[str] = Counter()
        self.holes = caveats.Holes()
        self.walk: WalkForward | None = None
        self._ledger = ledger
        self.accepted, self.adjusted, self.settle = ledger.accepted, ledger.adjusted, ledger.settle

    async def emit(self, outcome: Outcome) -> None:
        """Hash the outcome and hand it on. Raise ConfigError for a strategy without targets."""
        for error in outcome.raised.values():
            raise ConfigError(in_strategy(error)) from error
        for sentence in outcome.refused.values():
            raise ConfigError(f"{sentence}; live it would have no targets in this group: mend the strategy")
        for symbol, why in outcome.withheld.items():
            self.withheld[symbol] = (self.withheld.get(symbol, (0, ""))[0] + 1, why)
        self.degraded.update(outcome.degraded.keys())
        self.holes.seen(outcome)
        self.sha256.update(_bits(outcome))
        self.forecast.update(outcome.forecasts)
        if self.walk is not None:
            sent = wire.messages(outcome)
            self.walk.said([(m.topic, m.payload) for m in sent if "/signals/" in m.topic])
        await self._ledger.emit(outcome)


def run_backtest(
    files: Sequence[Path | str] | Path | str,
    *,
    stamp: Stamp,
    model: Path | str = "fhs",
    timeframe: str | None = None,
    calendar: str = "24x7",
    calendars: Mapping[str, str] = MappingProxyType({}),
    adjustments: Sequence[Adjustment] = (),
    strategies: Sequence[str | StrategySettings] | str = ("quantile-band", "median-drift"),
    symbols: Sequence[str] | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    touch: Sequence[tuple[float, float]] = (),
    max_jump: float = MAX_JUMP,
    execution: Execution | None = None,
    retrain: Retrain | str | None = None,
    training_time: str = "30m",
    models: Path | str | None = None,
    trials: int | None = None,
    baselines: bool = True,
    cache: ForecastCache | Remembered | Path | str | None = None,
    scratch: Path | str | None = None,
    scenario: "Sequence[Scenario] | None" = None,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> BacktestResult:
    """Replay bars from Parquet or CSV files through the live path, and keep the books.

    `stamp` says which end of a bar the files' times name; the timeframe is found in them unless it is given.
    `since` and `until` are datetimes, ISO 8601 texts or nanoseconds since 1970, UTC where they name no zone:
    bars before `since` only warm the windows up. `model` is a checkpoint directory or the name of a baseline.
    Bars of one close count as received together at that moment. How targets are filled, and what that costs,
    says `execution`; without it they are filled at the next bar's open. A strategy is settings, or a text
    such as `median-drift:costs=1` or `mine.py:Mine`. `calendars` (symbol -> name) are those of symbols that
    keep other hours than `calendar`; an adjustment takes effect with the first bar after its time. `trials`
    is how many strategies and settings were tried in all until these were found, for the deflated Sharpe
    ratio; by default those of this run. Without `baselines` nothing is compared with them: `skill` is empty.
    With a `cache`, or the folder of one, what was forecast before is not forecast again, and the result is
    the same to the bit.
    `touch` are pairs of barriers, how far up and how far down in standard deviations of the forecast over the
    longest horizon: see `BacktestResult.signals`.

    What memory does not hold lies in a folder in `scratch`, by default among the system's temporary files, as
    long as the result is there. A copy by pickle holds all rows.

    A `scenario` of `StressScenarioGenerator` has its bars in place of those of the files, and is tested from
    where the first of its symbols is made up. It has its symbols, its end and its price basis, and nothing
    is learnt from it.

    With `retrain`, a cron expression or the table of a daemon's configuration, challengers are trained when
    they would be live, of which `cron`, `max_age`, `drift`, `steps` and `margin` count. Each learns from the
    bars that closed when it was asked for, and is judged, and may take over, `training_time` (such as 30m)
    later. The schedule counts from the first close on, which is no occasion itself. Models that took over are
    kept in the folder `models`, if one is named.

    Raise DataError for bars that cannot be used, ConfigError for arguments, for a strategy that raises or
    whose targets are none and for a folder that cannot be written, CheckpointError for the model. What can be
    used and may mislead, such as holes or jumps that no adjustment explains, is said in `meta["warning"]`, a
    line for each kind.
    """
    if stamp not in ("open", "close"):
        raise ConfigError(f"stamp = {stamp!r}: say 'open' or 'close', the end of a bar that its time names")
    paths, model = paths_of(files), str(model)
    path_settings, execution = settings_of(strategies), check_execution(execution)
    adjustments = check_adjustments(adjustments)
    models, scratch = (None if folder is None else Path(folder) for folder in (models, scratch))
    symbols = [symbols] if isinstance(symbols, str) else symbols
    cache = ForecastCache(cache) if isinstance(cache, Path | str) else cache
    if scenario is not None:
        told = {"adjustments": adjustments, "symbols": symbols, "until": until, "retrain": retrain}
        scenario = _check_scenario(scenario, [name for name, given in told.items() if given])
        since = min(one.since for one in scenario) if since is None else since
    timeframe = timeframe or found_timeframe(paths, stamp, calendar, symbols)[0]
    if isinstance(retrain, str):
        retrain = cron_schedule(retrain, None)
    since, until = nanoseconds(since, "since"), nanoseconds(until, "until")
    if since is not None and until is not None and since >= until:
        raise ConfigError(
            f"since is {wire.to_text(since)}, and until {wire.to_text(until)}: give a since before until"
        )
    settings = Settings(
        root="backtest",
        timeframe=timeframe,
        calendar=calendar,
        calendars=dict(calendars),
        symbols=tuple(symbols or ()),
        max_wait=1,
        max_jump=max_jump,
        sampler=sampler,
        steps=steps,
        touch=check_pairs([(up, down) for up, down in touch]),
        strategies=path_settings,
    )
    closes = settings.bar_calendars()
    forecaster = open_model(model, timeframe, sampler, steps, bool(settings.touch))
    check_sampled(model, forecaster.card, sampler, steps)
    if execution.fill == "limit":
        for buy in (True, False):
            execution.limit_at(buy, forecaster.card.levels)
    shelves = Store(scratch)
    ledger = Ledger(execution, shelves)
    decisions = _Decisions(ledger)
    known = (lambda one: one) if cache is None else cache.of
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_in(scratch))
        with writing_in(scratch):
            if scenario is None:
                history = History(paths, stamp, closes, symbols, until, folder)
            else:
                made_up = (Window(one.symbol, one.times, one.rows) for one in scenario)
                history = History.of_windows(made_up, folder)
        start, last = history.first if since is None else since, history.last
        if start > last:
            raise DataError(
                f"{', '.join(map(str, paths))}: the last bar closes at {wire.to_text(last)}, and since is "
                f"{wire.to_text(start)}: give an earlier one."
            )
        asked = first_asked(history, forecaster.card.min_window, start)
        try_strategies(settings.build(), forecaster.card, *asked)
        past = _Past(settings, model, forecaster, history, adjustments, start, last)
        by_digest = isinstance(cache, ForecastCache)
        if isinstance(cache, ForecastCache):
            stack.enter_context(cache)
        if retrain is None:
            pipeline = Pipeline(lambda *_: known(forecaster), hashed=by_digest)
            replay(past.story(model, progress), pipeline, decisions)
            trainings, untrained = pl.DataFrame(schema=TRAININGS), ""
        else:
            store = ModelStore(models or folder / "models", timeframe)
            pipeline = Pipeline(lambda *asked: known(store.open(*asked)), hashed=by_digest)
            walk = decisions.walk = past.walk(retrain, duration(training_time), store, pipeline, progress)
            replay(past.story(walk.champion.model, progress), pipeline, decisions, agenda=walk)
            trainings, untrained = walk.frame(), walk.untrained(last)
        signals, outcomes, fills, equity = (
            ledger.signals(),
            ledger.outcomes(),
            ledger.fills(),
            ledger.equity(),
        )
        holes = " ".join(decisions.holes.sentences(closes))
        made = collected(signals.select(pl.col("model").unique(maintain_order=True)))["model"].to_list()
        if not made:
            why = "; ".join(
                f"{symbol}: {reason}" for symbol, (_, reason) in [*decisions.withheld.items()][:3]
            )
            raise DataError(f"nothing was forecast ({why}): give more history, or mend it. {holes}".strip())
        periods = _periods_per_year(closes, equity)
        jumps = caveats.jumps(adjusted(history, adjustments), start, forecaster.card.window, max_jump)
        declared = [
            a for a in adjustments if (not symbols or a.symbol in symbols) and (not until or a.time < until)
        ]
        silent = [
            f"{symbol} was never forecast ({why}), and is part of {BENCHMARK} all the same."
            for symbol, (_, why) in decisions.withheld.items()
            if symbol not in decisions.forecast
        ]
        traded = set(collected(fills.select(pl.col("strategy").unique()))["strategy"])
        idle = [one.name for one in settings.strategies if one.name not in traded]
        warnings = [
            learnt_warning(model, start),
            *caveats.of_jumps(jumps),
            holes,
            *caveats.of_ends(history, start, closes),
            *caveats.of_volumes(history, start, execution),
            *caveats.of_adjustments(history, declared),
            *caveats.of_calendars(history, {} if symbols else closes.others),
            untrained,
            caveats.few(silent),
            *(f"{name} never traded." for name in idle),
        ]
        beside = pl.DataFrame(schema=SKILL)
        if baselines:
            beside = skill(signals, outcomes, history, adjustments, timeframe, progress)
        trials = max(1, len(settings.strategies)) if trials is None else trials
        return BacktestResult(
            store=shelves,
            signals=signals,
            outcomes=outcomes,
            bars=ledger.bars(),
            targets=ledger.targets(),
            fills=fills,
            equity=equity,
            trainings=trainings,
            scores=scores(signals, outcomes),
            skill=beside.filter(pl.col("other") != model) if retrain is None else beside,
            portfolio=portfolio(equity, fills, periods, trials),
            meta={
                "warning": "\n".join(filter(None, warnings)),
                **({} if scenario is None else {"scenario": scenario[0].mark}),
                **past.told(),
                "models": made,
                "periods_per_year": periods,
                "execution": asdict(execution),
                "trials": trials,
                "retraining": _asked(retrain, training_time),
                "files": [path.name for path in paths],
                "files_sha256": None if scenario is not None else digest(paths),  # none of them was read
                "jumps": [msgspec.to_builtins(jump) | {"close_time": iso(jump.close_time)} for jump in jumps],
                "decisions_sha256": decisions.sha256.hexdigest(),
                "bars": asdict(pipeline.counts),
                "degraded": dict(decisions.degraded),
                "withheld": {s: f"{n} times, the last: {why}" for s, (n, why) in decisions.withheld.items()},
            },
        )


def _check_scenario(scenario: "Sequence[Scenario]", given: Sequence[str]) -> "Sequence[Scenario]":
    """The scenario of each symbol.

    Raise ConfigError for anything else, also for none, and for arguments that go with history alone.
    """
    from barcast.models.transfer.generator import Scenario

    remedy = "one of the lists that generate returns, such as generate(...)[0]"
    scenario = listed(scenario, "scenario", (Scenario,), remedy)
    if not scenario:
        raise ConfigError("scenario is empty: give the bars of one symbol at least, as generate returns them")
    if "retrain" in given:
        raise ConfigError("retrain: a scenario is made up, and nothing is learnt from it: leave retrain out")
    if given:
        raise ConfigError(f"{given[0]} is for history: give it to what the scenario is made of")
    return scenario


@dataclass(frozen=True, slots=True)
class _Past:
    """What a backtest replays: settings, the first model by name, all bars, and the closes that are tested.

    Times are nanoseconds; bars before `start` only warm the windows up.
    """

    settings: Settings
    model: str
    forecaster: Forecaster
    history: History
    adjustments: Sequence[Adjustment]
    start: int
    last: int

    def story(self, first: str, progress: Callable[[int, str], None]) -> Iterator[Event]:
        """The events in order of time, beginning with the activation of the model `first`."""
        card, before = self.forecaster.card, self.start - 1
        yield Revision(before, self.settings.encode())
        yield Activation(before, first, card.fingerprint, card.window)
        yield Warmup(before, "", tuple(self.history.newest(before, card.window)))
        for adjustment in self.adjustments:
            yield Declaration(before, adjustment)
        for arrival in arrivals(self.history.bars(self.start)):
            progress(len(arrival.bars), wire.to_text(arrival.time))
            yield arrival

    def walk(
        self,
        retrain: Retrain,
        training_time: int,
        store: ModelStore,
        pipeline: Pipeline,
        progress: Callable[[int, str], None],
    ) -> WalkForward:
        """The schedule of trainings beside the path, whose models are those of the store."""
        card = self.forecaster.card
        first = self.model if self.model in BASELINES else store.adopt(Path(self.model))
        champion = Champion(
            first, card.fingerprint, card.window, "it is the first", until=store.known_until(first)
        )

        def say(text: str) -> None:
            progress(0, text)

        return WalkForward(
            retrain,
            training_time,
            champion,
            self.start,
            self.history,
            self.adjustments,
            store,
            pipeline,
            say,
        )

    def told(self) -> dict[str, object]:
        """What identifies it, for `BacktestResult.meta`."""
        settings, card = self.settings, self.forecaster.card
        strategies = [
            {"kind": one.kind, "digest": one.digest, "name": one.name, **parameters_of(built)}
            for one, built in zip(settings.strategies, settings.build(), strict=True)
        ]
        return {
            "model": card.model,
            "kind": card.kind,
            "sampler": card.sampler,
            "steps": card.steps,
            "samples": card.samples,
            "touch": [list(pair) for pair in settings.touch],
            "fingerprint": card.fingerprint,
            "timeframe": settings.timeframe,
            "calendar": settings.calendar,
            "calendars": settings.calendars,
            "max_jump": settings.max_jump,
            "adjustments": [msgspec.to_builtins(adjustment) for adjustment in self.adjustments],
            "strategies": strategies,
        }


def found_timeframe(
    files: Sequence[Path], stamp: Stamp, calendar: str, symbols: Sequence[str] | None
) -> tuple[str, str]:
    """The timeframe of the files, and what it was found by; days of an exchange are its sessions."""
    found, how = find_timeframe(files, stamp, symbols)
    return "session" if found.text == "1d" and calendar not in ("24x7", "fx") else found.text, how


def _periods_per_year(closes: Calendars, equity: Rows) -> int:
    """The calendar's; where symbols keep other hours than one another, the marks of the books in a year.

    The book that was marked most often was at every close at which any was.
    """
    if not closes.others:
        return closes.periods_per_year
    time = pl.col("close_time").to_physical()
    books = equity.lazy().group_by("strategy").agg(pl.len(), first=time.min(), last=time.max())
    most = collected(books.select("len", "first", "last").sort("len").tail(1))
    marks, first, last = map(int, most.row(0)) if most.height else (0, 0, 0)
    if marks < 2:
        return closes.periods_per_year
    return max(1, round((marks - 1) / ((last - first) / YEAR)))


def _asked(retrain: Retrain | None, training_time: str) -> dict[str, object]:
    """What of the schedule counts in a replay."""
    if retrain is None:
        return {}
    return {
        "cron": retrain.cron,
        "max_age_days": retrain.max_age and retrain.max_age / 86_400e9,
        "drift": None if retrain.drift is None else retrain.drift.model_dump(),
        "steps": retrain.steps,
        "margin": retrain.margin,
        "training_time": training_time,
    }


def learnt_until(model: Path | str) -> int:
    """The close up to which a checkpoint directory has learnt and chosen, in nanoseconds; baselines: 0."""
    if str(model) in BASELINES:
        return 0
    from barcast.models.checkpoint import load

    return load(Path(model)).trained.record.validation_end


def learnt_warning(model: Path | str, first: int) -> str:
    """A warning when a model has seen some of the bars that it is tested on, else nothing."""
    seen = learnt_until(model)
    if seen <= first:
        return ""
    return (
        f"The model has learnt from bars up to {wire.to_text(seen)[:10]}: what it forecasts before that day "
        "is in sample and says nothing about the future. Train with --until, or test from that day on."
    )
