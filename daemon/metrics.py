"""What /metrics says: counts and gauges read off the daemon's parts when it is asked, nothing by symbol."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from barcast.daemon.config import Config
from barcast.daemon.distribution import Distribution
from barcast.daemon.journal import Journal
from barcast.daemon.live import Clock, Courier, LiveSink, LiveSource, Scribe
from barcast.daemon.lookout import Lookout
from barcast.daemon.mqtt import Link
from barcast.daemon.pipeline import Counts, Pipeline
from barcast.daemon.retraining import Result, Retraining
from barcast.daemon.room import free_bytes
from barcast.daemon.standby import Standby
from barcast.daemon.succession import Succession
from barcast.daemon.verification import Result as Verified
from barcast.daemon.verification import Verification
from barcast.daemon.vitals import Vitals
from barcast.models import DataError

ANSWER_SECONDS = 1.0
"""How long the journal's thread may be busy until its disk is taken to stand still."""
LOOK_SECONDS = 4.0
"""How long all who look on make do with one answer of the journal's thread."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The daemon's parts, once it has recovered."""

    link: Link
    scribe: Scribe
    source: LiveSource
    courier: Courier
    sink: LiveSink
    pipeline: Pipeline
    vitals: Vitals
    succession: Succession
    retraining: Retraining
    lookout: Lookout
    verification: Verification


@dataclass(frozen=True, slots=True)
class Storage:
    """Messages that wait in the outbox, bytes of the journal, bytes that its disk has left."""

    pending: int
    journal: int
    free: int


class Metrics(Collector):
    """Says how the daemon is: to a scrape in numbers, to those who ask whether it is well by conditions.

    The state is the standby that it is (None: it is none), the parts (None until the daemon has recovered),
    what they had counted until then, the moment of it, what was last known of the disk, whether the journal's
    thread answered in time, and when it is asked again for those who look on.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        self.serving = False
        self.standby: Standby | None = None
        self._config, self._clock = config, clock
        self._parts: Parts | None = None
        self._storage = Storage(0, 0, 0)
        self._answered = False
        self._looking, self._due = asyncio.Lock(), 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def configure(self, config: Config) -> None:
        """What is said of the configuration is of this one from now on."""
        self._config = config

    def watch(self, parts: Parts) -> None:
        """From now on these are the parts. What was counted in recovering happened before."""
        self._parts, self._since = parts, self._clock.now()
        self._before = Counts(**asdict(parts.pipeline.counts))

    async def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        await self._ask()
        return generate_latest(self._registry)

    def alive(self) -> dict[str, bool]:
        """Whether the path moves, as the watchdog sees it; that the event loop does, the answer shows."""
        return {"moving": self._parts is None or self._parts.vitals.moving}

    async def ready(self) -> dict[str, bool]:
        """What must hold for bars to be processed."""
        await self._ask()
        return self._conditions()

    async def lately(self) -> dict[str, bool]:
        """The same, however many ask: the journal's thread is asked once in a while for all of them."""
        loop = asyncio.get_running_loop()
        async with self._looking:
            if self._parts is not None and loop.time() >= self._due:
                await self._ask()
                self._due = loop.time() + LOOK_SECONDS
        return self._conditions()

    def describe(self) -> Iterable[Metric]:
        """Nothing: so that no part is asked before there are any."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every metric that is not the process's."""
        config = self._config
        about = {"name": config.instance, "timeframe": config.timeframe, "version": version("barcast")}
        yield InfoMetricFamily("barcast", "Instance, base timeframe and version.", about)
        yield _gauge("ready", "Whether bars are processed: all conditions of /readyz.", self._well())
        yield _gauge(
            "leader",
            "Whether it is the one of its instance that serves.",
            {(config.instance,): self.standby is None},
            "name",
        )
        yield _gauge(
            "standby_ready",
            "Whether a standby could take over: it has the journal and the model.",
            {} if self.standby is None else {(): not self.standby.fault},
        )
        if self._parts is not None:
            yield from self._bars(self._parts)
            yield from self._groups(self._parts)
            yield from self._messages(self._parts)
            yield from self._model(self._parts)
            yield from self._verified(self._parts.verification)
            yield from self._machine(self._parts)

    async def _ask(self) -> None:
        """Ask the journal's thread, which may be waiting for its disk, how things stand there."""
        if self._parts is None:
            return
        scribe, state_dir = self._parts.scribe, self._config.state_dir
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                pending = await scribe(scribe.journal.waiting)
                self._storage = await scribe(_storage, pending, scribe.journal, state_dir)
        except TimeoutError:
            self._answered = False
        else:
            self._answered = True

    def _conditions(self) -> dict[str, bool]:
        p = self._parts
        return {
            "leading": self.standby is None,
            "recovered": p is not None,
            "serving": self.serving,
            "connected": p is not None and p.link.connected.is_set(),
            "hearing": p is not None and _hears(p.link),
            "moving": p is not None and p.vitals.moving,
            "journal": self._answered and p is not None and not p.scribe.held,
            "model": p is not None and p.pipeline.model is not None,
        }

    def _well(self) -> bool:
        return all(self._conditions().values())

    def _bars(self, p: Parts) -> Iterator[Metric]:
        now, before = p.pipeline.counts, self._before
        n = {name: value - getattr(before, name) for name, value in asdict(now).items()}
        n["newest"] -= n["stale"] + n["straggler"]
        yield _counter(
            "bars",
            "Bars by what became of them: newest of their symbol, late (straggler, stale), or not newest.",
            {(verdict,): count for verdict, count in n.items()},
            "verdict",
        )
        yield _histogram(
            "bar_lag_seconds", "From a close to its arrival; the last bar of each message.", p.source.bar_lag
        )
        yield _gauge("inbox_messages", "Messages that came and are not taken yet.", len(p.link.inbox))
        yield _counter("qos0_shed", "Messages of QoS 0 that found no room.", p.link.shed)
        yield _counter("dead_letters", "Bars or messages that could not be used.", p.source.dead_letters)
        yield _gauge("symbols", "Symbols of which there are bars.", len(p.pipeline.windows.symbols))
        yield _gauge(
            "overdue_seconds",
            "How long the next close after the newest bar has passed; 0 while it has not.",
            {(name,): seconds for name, seconds in self._overdue(p)},
            "calendar",
        )

    def _overdue(self, p: Parts) -> Iterator[tuple[str, float]]:
        """By calendar: that of markets which are shut is 0."""
        windows, now = p.pipeline.windows, self._clock.now()
        symbols = self._config.symbols or windows.symbols
        for calendar, own in p.pipeline.calendars.split(symbols):
            newest = max((windows.newest(symbol) for symbol in own), default=0)
            try:
                due = calendar.closes_after(max(newest, self._since), 1)[0]
            except DataError:  # the calendar ends: its forecasts are withheld, with the reason
                continue
            yield calendar.name, max(0, now - due) / 1e9

    def _groups(self, p: Parts) -> Iterator[Metric]:
        counts, sink = p.sink.counts, p.sink
        kinds = {(kind,): getattr(counts, kind) for kind in ("full", "incomplete", "straggler")}
        yield _counter("groups", "Groups that were forecast.", kinds, "kind")
        yield _counter("signals", "Signals that were emitted.", counts.signals)
        yield _counter("signals_degraded", "Signals that were degraded.", counts.degraded)
        yield _counter("signals_warming", "Signals of symbols that were warming.", counts.warming)
        yield _counter("groups_shed", "Groups that were not forecast, as it was too late.", counts.shed)
        yield _counter("withheld", "Symbols of groups that were given no forecast.", counts.withheld)
        yield _counter("holes", "Gaps between the bars of a symbol.", counts.holes)
        yield _counter(
            "targets_refused", "Groups of a strategy without targets, as they were none.", counts.refused
        )
        yield _histogram(
            "batch_latency_seconds",
            "From the arrival or the deadline that made a group due until its forecasts are made.",
            sink.latency,
        )
        yield _gauge(
            "last_close_timestamp_seconds",
            "The newest close of which a group was forecast since the start.",
            {(): sink.processed / 1e9} if sink.processed else {},
        )
        yield from self._coverage(sink)

    def _coverage(self, sink: LiveSink) -> Iterator[Metric]:
        """The coverage that the signals tell, of all symbols, each weighed by its outcomes."""
        told = list(sink.coverage.values())
        shares: dict[tuple[str, ...], float] = {}
        outcomes: dict[tuple[str, ...], float] = {}
        if told:
            n = np.array([c.outcomes for c in told])  # (symbols, H)
            inside = np.einsum("sih,sh->ih", np.array([c.share for c in told]), n) / n.sum(0)  # (I, H)
            for h, horizon in enumerate(sink.horizons):
                outcomes[(str(horizon),)] = int(n[:, h].sum())
                for i, interval in enumerate(told[0].intervals):
                    shares[(str(horizon), f"{interval:g}")] = float(inside[i, h])
        text = "Share of the last outcomes inside the central interval, all symbols; online calibration only."
        yield _gauge("coverage_ratio", text, shares, "horizon", "interval")
        yield _gauge("coverage_outcomes", "Outcomes behind that share.", outcomes, "horizon")

    def _messages(self, p: Parts) -> Iterator[Metric]:
        courier, link = p.courier, p.link
        yield _gauge("broker_connected", "Whether there is a broker.", link.connected.is_set())
        yield _gauge("deaf", "Whether nothing comes by the subscription.", link.deaf)
        yield _gauge("outbox_pending_messages", "Messages due to subscribers.", self._storage.pending)
        yield _counter("published", "Messages that the broker has.", courier.delivered)
        yield _counter("expired", "Messages that were of no use any more before they went.", courier.expired)
        yield _counter("publish_failures", "Publications that failed; they are tried again.", courier.failed)
        yield _histogram(
            "publish_latency_seconds", "From a message's emission to the broker's PUBACK.", courier.latency
        )
        yield _histogram(
            "close_to_published_seconds",
            "From a close to the PUBACK of a message on it.",
            courier.since_close,
        )

    def _model(self, p: Parts) -> Iterator[Metric]:
        succession, retraining = p.succession, p.retraining
        champion = succession.champion
        about = {"model": champion.model, "fingerprint": champion.fingerprint}
        yield InfoMetricFamily("barcast_model", "The model that serves.", about)
        age = max(0, self._clock.now() - succession.activated) / 1e9
        yield _gauge(
            "model_age_seconds",
            "How long the model has served, since its activation.",
            {(): age} if succession.activated else {},
        )
        prepared = {} if succession.prepared is None else {(): succession.prepared}
        yield _gauge("prepare_seconds", "How long a model was prepared for its symbols last.", prepared)
        yield _gauge(
            "retrain_scheduled",
            "Whether the configuration has a retraining.",
            self._config.retrain is not None,
        )
        results = {(result.value,): retraining.runs[result] for result in Result}
        yield _counter(
            "retrain_runs", "Retrainings since the start, by the best they led to.", results, "result"
        )
        took = {(): retraining.seconds} if retraining.runs else {}
        yield _gauge("retrain_seconds", "How long the last retraining took.", took)
        reading = p.lookout.reading
        shares = (
            {}
            if reading is None
            else {
                (str(bars), f"{nominal:g}"): share.value
                for (nominal, bars), share in reading.coverage.items()
            }
        )
        yield _gauge(
            "drift_coverage_ratio",
            "Share of the champion's newest matured outcomes inside its published intervals.",
            shares,
            "horizon",
            "interval",
        )
        yield _gauge(
            "drift_crps",
            "CRPS of the champion's newest matured signals over the mean absolute outcome.",
            {} if reading is None else {(): reading.crps.value},
        )

    def _verified(self, v: Verification) -> Iterator[Metric]:
        """What verifications found; without any there are no values."""
        yield _gauge("verify_scheduled", "Whether the configuration has a verification.", v.since is not None)
        runs = {(result.value,): v.runs[result] for result in Verified}
        yield _counter("verify_runs", "Verifications since the start.", runs, "result")
        found: dict[str, float] = {}
        if r := v.last:
            missed = r.differing + r.missing
            found = {"at": v.ended / 1e9, "took": r.seconds, "signals": r.signals, "differing": missed}

        def last(name: str) -> dict[tuple[()], float]:
            return {(): found[name]} if found else {}

        yield _gauge(
            "verify_last_timestamp_seconds", "When the last one that came to a result ended.", last("at")
        )
        yield _gauge("verify_seconds", "How long the last verification took.", last("took"))
        yield _gauge("verify_signals", "Signals that it compared.", last("signals"))
        yield _gauge(
            "verify_differing_messages",
            "Messages that are not what the journal says when computed again, or missing.",
            last("differing"),
        )

    def _machine(self, p: Parts) -> Iterator[Metric]:
        storage = self._storage
        yield _histogram("loop_lag_seconds", "How late the event loop wakes a sleeper.", p.vitals.lag)
        yield _gauge("journal_size_bytes", "The journal's files.", storage.journal)
        yield _gauge("state_dir_free_bytes", "Room on the state directory's disk.", storage.free)
        yield _gauge("paused", "Whether an operator paused the forecasts.", p.pipeline.paused)
        yield _gauge("disk_full", "Whether all waits for room on that disk.", p.scribe.full)
        yield _gauge("journal_lost", "Whether all waits for the journal's server.", p.scribe.lost)


def _hears(link: Link) -> bool:
    """Whether bars come by the connection; without one, that is what is wrong, and not this."""
    return not link.deaf and (link.greeted or not link.connected.is_set())


def _storage(pending: int, journal: Journal, state_dir: Path) -> Storage:
    return Storage(pending, journal.size(), free_bytes(state_dir))


Values = float | Mapping[Any, float]
"""One value, or one for each tuple of label values."""


def _counter(name: str, text: str, values: Values, *labels: str) -> Metric:
    return _filled(CounterMetricFamily(f"barcast_{name}", text, labels=labels), values)


def _gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(f"barcast_{name}", text, labels=labels), values)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Values) -> Metric:
    for key, value in values.items() if isinstance(values, Mapping) else (((), values),):
        family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, found: Distribution) -> Metric:
    family = HistogramMetricFamily(f"barcast_{name}", text)
    upto = np.cumsum(found.counts).tolist()
    bounds = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
    family.add_metric((), list(zip(bounds, upto, strict=True)), found.sum)
    return family
