"""Walk-forward: the live schedule of trainings on replay time, with the same triggers and the same gate.

A reason asks for a training at a moment of the replay. The challenger learns from the bars that closed by
then; a simulated training time later it is judged on those that closed by that moment, and if it is better
it serves from there on. Reasons that come meanwhile cause one more run. So whatever comes after a moment
changes nothing that was trained, judged or activated up to it.
"""

import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from barcast.backtest.workers import writing_in
from barcast.daemon.adjustments import adjusted
from barcast.daemon.calendar import iso
from barcast.daemon.challenger import train_challenger
from barcast.daemon.config import Retrain
from barcast.daemon.drift import TIMES, chosen, measure
from barcast.daemon.events import Champion, Reign
from barcast.daemon.gate import Verdict, judge
from barcast.daemon.history import History
from barcast.daemon.lookout import BARS, LOOK_SECONDS, Age, Drifted, reign
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Event, Warmup
from barcast.daemon.schedule import occasions
from barcast.daemon.store import ModelStore
from barcast.models import Adjustment, ConfigError, DataError, Window

if TYPE_CHECKING:
    from barcast.models.optimiser import Progress

TIME = pl.Datetime("ns", "UTC")
TRAININGS = pl.Schema(
    {
        "asked": TIME,
        "reasons": pl.String(),
        "judged": TIME,
        "accepted": pl.Boolean(),
        "challenger": pl.String(),
        "champion": pl.String(),
        "challenger_crps": pl.Float64(),
        "champion_crps": pl.Float64(),
        "gain": pl.Float64(),
        "gain_error": pl.Float64(),
        "origins": pl.Int64(),
        "reason": pl.String(),
    }
)

LOOK = int(LOOK_SECONDS * 1e9)
"""How long after bars came drift is looked for, in nanoseconds: live it is as often."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A training under way: what it is for, when it was asked for and when it is over (nanoseconds)."""

    reasons: tuple[str, ...]
    asked: int
    over: int


class WalkForward:
    """Trains, judges and activates when the live daemon would; an `Agenda` of a replay.

    `history` holds all bars, of which it reads those that have closed. The state
    is the champion and since when it serves, the triggers, the run under way and the reasons that wait, the
    newest signals as far as drift is looked for, and a row for each training that was over.
    """

    def __init__(
        self,
        retrain: Retrain,
        training_time: int,
        champion: Champion,
        start: int,
        history: History,
        adjustments: Sequence[Adjustment],
        store: ModelStore,
        pipeline: Pipeline,
        progress: Callable[[str], None],
    ) -> None:
        """Raise ConfigError where nothing could ever ask for a training."""
        if not (retrain.cron or retrain.max_age or retrain.drift):
            raise ConfigError("retrain: nothing asks for a training; give cron, max_age or drift")
        self.champion, self._activated = champion, start
        self._trainings: list[dict[str, object]] = []
        self._retrain, self._training_time = retrain, training_time
        self._history, self._adjustments = history, adjustments
        self._store, self._pipeline, self._progress = store, pipeline, progress
        self._age = Age(retrain.max_age) if retrain.max_age else None
        self._drifted = Drifted(retrain.drift.coverage, retrain.drift.crps) if retrain.drift else None
        self._signals: deque[list[tuple[str, bytes]]] = deque()
        self._cron = occasions(retrain.cron, start) if retrain.cron else iter(())
        self._fires = next(self._cron, None)
        self._look: int | None = None
        self._run: _Run | None = None
        self._waiting: list[str] = []

    @property
    def next(self) -> int | None:
        """The next moment at which something is to be done, in nanoseconds."""
        over = None if self._run is None else self._run.over
        old = None if self._age is None else self._age.next(self._since)
        return min((m for m in (over, self._fires, self._look, old) if m is not None), default=None)

    def came(self, time: int) -> None:
        """Take note that bars came: a while later it is time to look for drift."""
        if self._look is None and self._drifted:
            self._look = time + LOOK

    def said(self, signals: list[tuple[str, bytes]]) -> None:
        """Take note of the signals of a group, as (topic, payload)."""
        if self._drifted and signals:
            self._signals.append(signals)
            while len(self._signals) > TIMES + max(self._pipeline.forecaster.card.horizons) + 1:
                self._signals.popleft()

    def act(self, now: int) -> list[Event]:
        """Do what is due; return what the path has to know of it."""
        events: list[Event] = []
        if self._run is not None and self._run.over <= now:
            run, self._run = self._run, None
            events = self._finish(run)
            if self._waiting:
                self._begin(now)
        if self._fires is not None and self._fires <= now:
            self._fires = next(self._cron, None)
            self._ask("cron", now)
        if self._look is not None and self._look <= now:
            self._look = None
            self._ask(self._drift(now), now)
        if self._age is not None:
            self._ask(self._age.due(self._since, now), now)
        return events

    def frame(self) -> pl.DataFrame:
        """The trainings that were over, see `BacktestResult.trainings`."""
        whole = {name: pl.Int64() if dtype == TIME else dtype for name, dtype in TRAININGS.items()}
        return pl.DataFrame(self._trainings, schema=whole).with_columns(
            pl.from_epoch(name, "ns").dt.replace_time_zone("UTC") for name in ("asked", "judged")
        )

    def untrained(self, last: int) -> str:
        """Why no training was over when the last bar closed; nothing where one was."""
        if self._trainings:
            return ""
        if self._run is not None:
            return (
                f"No training was over by the last bar, {iso(last)}: the one asked for at "
                f"{iso(self._run.asked)} takes until {iso(self._run.over)}; shorten the training time, or "
                "give more bars."
            )
        fires = "" if self._fires is None else f", and {self._retrain.cron!r} next does at {iso(self._fires)}"
        nothing = f"Nothing asked for a training by the last bar, {iso(last)}"
        return f"{nothing}{fires}: give more bars, or ask sooner."

    def _ask(self, reason: str | None, now: int) -> None:
        if reason is None:
            return
        if reason not in self._waiting:
            self._waiting.append(reason)
        if self._run is None:
            self._begin(now)

    def _begin(self, now: int) -> None:
        self._run = _Run(tuple(self._waiting), now, now + self._training_time)
        self._waiting = []

    def _drift(self, now: int) -> str | None:
        """What drift has to say, see `Lookout.look`."""
        pipeline, drifted = self._pipeline, self._drifted
        if drifted is None or pipeline.model != self.champion.model:  # else it takes over at this moment
            return None
        closes: dict[str, Window] = {}
        for symbol in chosen(pipeline.windows.symbols):
            window = pipeline.windows.foreseen(symbol, BARS, ())
            if window is not None:
                closes[symbol] = window
        newest_first = (signal for group in reversed(self._signals) for signal in reversed(group))
        card = pipeline.forecaster.card
        said = reign(newest_first, card.model, closes, TIMES + max(card.horizons))
        reading = measure(said, closes)
        return None if reading is None else drifted.due(reading, self.champion.crps, now)

    @property
    def _since(self) -> int:
        return self.champion.until or self._activated

    def _finish(self, run: _Run) -> list[Event]:
        """Train, judge, and if it is better activate."""
        challenger = self._store.directory / ".challenger"
        settings, champion, now = self._pipeline.settings, self.champion, run.over
        card, timeframe = self._pipeline.forecaster.card, settings.timeframe
        number = len(self._trainings) + 1
        eased = self._age is not None and self._age.over(self._since, now)
        row: dict[str, object] = {"asked": run.asked, "reasons": "; ".join(run.reasons), "judged": now}
        row |= {"accepted": False, "champion": champion.model}
        self._trainings.append(row)

        def stand(p: "Progress") -> None:
            self._progress(f"training {number}, {iso(run.asked)[:10]}: {p.phase} {p.step} of {p.steps}")

        def judging(done: int, count: int, _: Window) -> None:
            self._progress(f"judging {number}: {done} of {count} forecasts")

        try:
            steps, path = self._retrain.steps, self._store.path(champion.model)
            with writing_in(self._store.directory):
                train_challenger(self._known(run.asked), challenger, timeframe, card, path, steps, stand)
            verdict = judge(
                challenger,
                path,
                self._known(now),
                timeframe,
                0.0 if eased else self._retrain.margin,
                settings.sampler,
                settings.steps,
                bool(settings.touch),
                judging,
            )
            row |= _told(verdict)
            return self._take_over(self._store.adopt(challenger), verdict, now) if verdict.accepted else []
        except DataError as error:  # such as too few bars yet: live the next reason tries again, too
            row["reason"] = str(error)
            return []
        finally:
            shutil.rmtree(challenger, ignore_errors=True)

    def _take_over(self, model: str, verdict: Verdict, now: int) -> list[Event]:
        settings, pipeline = self._pipeline.settings, self._pipeline
        card = self._store.open(model, settings.sampler, settings.steps, bool(settings.touch)).card
        known = Reign(model, verdict.challenger_crps, self._store.known_until(model))
        self.champion = self.champion.succeeded_by(known, card, verdict.reason)
        self._activated = now
        events: list[Event] = [self.champion.event(now)]
        if card.window > pipeline.windows.length:
            events.append(Warmup(now, "", tuple(self._history.newest(now, card.window))))
        return events

    def _known(self, until: int) -> Mapping[str, Window]:
        """Every bar that closed by then, of each symbol on the basis of its newest."""
        return adjusted(self._history.closed(until), self._adjustments)


def _told(verdict: Verdict) -> dict[str, object]:
    names = ("accepted", "challenger", "challenger_crps", "champion_crps", "gain", "gain_error", "origins")
    return {name: getattr(verdict, name) for name in (*names, "reason")}
