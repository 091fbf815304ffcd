"""What is known of an instance by its messages alone: messages in, state out.

It connects to nothing, draws nothing and reads no clock: whoever does tells it the time with each message.
"""

import math
from dataclasses import dataclass

from barcast.daemon.client import HALTS, INTERVAL_SECONDS, PAUSED, SILENT_INTERVALS, Body, outdated, read
from barcast.daemon.wire import GroupDone, ModelNotice, Signal, Status, Target, from_text

HALF, NINE_TENTHS = (0.25, 0.75), (0.05, 0.95)
"""The levels of the central intervals that hold 50 and 90 % of what comes."""
WORDS = {"starting": "STARTING", "deaf": "DEAF", "full": "FULL", "stopped": "STOPPED", "lost": "OFFLINE"}
"""What a daemon that is not at work is called, by the state in its status."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Now: on the instance's clock, in nanoseconds since 1970, and in real seconds since any moment."""

    time: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What a signal says of one horizon; None is what it does not say.

    `half` and `most` are the prices between which 50 and 90 % of the outcomes should be. `move` is the median
    and `width` the 90 % interval, each as a share of the reference. `skew` is (upper + lower - 2 median) /
    (upper - lower) of the log returns at the ends of the 90 % interval. `inside` is the share of the last
    outcomes that were inside the 90 % intervals, and `outcomes` how many that is.
    """

    bars: int
    end_time: str
    rise: float
    median: float | None
    half: tuple[float, float] | None
    most: tuple[float, float] | None
    move: float | None
    width: float | None
    skew: float | None
    inside: float | None
    outcomes: int


@dataclass(frozen=True, slots=True)
class Row:
    """The newest signal of a symbol: when its bar closed, and until when it is valid (nanoseconds)."""

    signal: Signal
    close: int
    until: int
    figures: dict[int, Figures]

    @classmethod
    def of(cls, signal: Signal) -> "Row":
        """What is shown of a signal, by the bars of each horizon. Raise ValueError for no prices."""
        if not min(signal.reference, *(price for row in signal.quantiles for price in row)) > 0:
            raise ValueError(f"{signal.symbol}: a price is not above 0")
        figures = {horizon.bars: _figures(signal, i) for i, horizon in enumerate(signal.horizons)}
        for each in figures.values():
            if not all(math.isfinite(x) for x in (each.move, each.width, each.skew) if x is not None):
                raise ValueError(f"{signal.symbol}: prices are too far apart")
        return cls(signal, from_text(signal.close_time), from_text(signal.valid_until), figures)


@dataclass(frozen=True, slots=True)
class Aim:
    """The newest target of a strategy: when its bar closed, and until when it is valid (nanoseconds)."""

    target: Target
    close: int
    until: int

    @classmethod
    def of(cls, target: Target) -> "Aim":
        """A target with its times. Raise ValueError for what are none."""
        return cls(target, from_text(target.close_time), from_text(target.valid_until))


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether the instance is at work, as one word, and why not, as a sentence (empty: it is)."""

    word: str
    why: str


class Seen:
    """What an instance has said since somebody looks, and whether there is a broker.

    The state is the newest signal of each symbol; by symbol the newest target of each strategy; the newest
    status, when it came and when it was said (real seconds); the newest notice of the model; the newest close
    with a signal, the symbols whose signals of it have come and how many there will be; the newest complete
    group and how long after its close that was told (nanoseconds); the id of what was last told of a group;
    how many groups and stragglers were told of and how many groups were shed; messages that could not be
    read; whether there is a broker, since when that is so, and why there is none.
    """

    def __init__(self, root: str, instance: str, timeframe: str, at: Moment, speed: float = 1.0) -> None:
        """`speed` is how many seconds of the instance's clock pass in a real one."""
        self.root, self.instance, self.timeframe, self.speed = root, instance, timeframe, speed
        self.subscriptions = [
            f"{root}/signals/{timeframe}/+",
            f"{root}/targets/+/{timeframe}/+",
            f"{root}/groups/{timeframe}",
            f"{root}/models/{instance}",
            f"{root}/status/{instance}",
        ]
        self.rows: dict[str, Row] = {}
        self.targets: dict[str, dict[str, Aim]] = {}
        self.status: Status | None = None
        self.heard = self.said = at.seconds
        self.model: ModelNotice | None = None
        self.close: int | None = None
        self.came: set[str] = set()
        self.due = 0
        self.done: GroupDone | None = None
        self.took = 0
        self.told = ""
        self.groups = self.stragglers = self.shed = self.unreadable = 0
        self.linked: bool | None = None
        self.since = at.seconds
        self.fault = ""

    @property
    def anything(self) -> bool:
        """Whether the instance has said anything."""
        return bool(self.rows or self.status or self.model or self.done)

    @property
    def strategies(self) -> list[str]:
        """Whose targets have come, by name."""
        return sorted({name for own in self.targets.values() for name in own})

    @property
    def horizons(self) -> list[int]:
        """How many bars ahead the signals look."""
        return sorted({bars for row in self.rows.values() for bars in row.figures})

    def link(self, connected: bool, fault: str, at: Moment) -> None:
        """Note whether there is a broker, and why not. The first connection is awaited without a word."""
        if connected != bool(self.linked):
            self.linked, self.since = connected, at.seconds
        self.fault = fault

    def take(self, topic: str, payload: bytes, at: Moment) -> None:
        """Take a message. Raise NewerSchemaError for one that only a newer barcast understands."""
        if not payload:
            self._taken_back(topic.removeprefix(f"{self.root}/").split("/"))
            return
        try:
            self._take(read(topic, payload, self.root), at)
        except (
            ValueError,
            TypeError,
            IndexError,
            ZeroDivisionError,
        ):  # it decodes, and is none of ours
            self.unreadable += 1

    def _take(self, body: Body | None, at: Moment) -> None:
        if body is None:
            self.unreadable += 1
        elif isinstance(body, Signal):
            self._signal(Row.of(body))
        elif isinstance(body, Target):
            aim, own = Aim.of(body), self.targets.setdefault(body.symbol, {})
            before = own.get(body.strategy)
            if before is None or before.close <= aim.close:
                own[body.strategy] = aim
        elif isinstance(body, GroupDone):
            self._group(body, at)
        elif isinstance(body, ModelNotice):
            self.model = body
        elif not outdated(body, self.status):
            # the first may be one that the broker has kept since the daemon went without a word
            again = self.status is not None and self.status.boot == body.boot and self.heard >= self.since
            age = 0.0 if again or body.time is None else (at.time - from_text(body.time)) / 1e9 / self.speed
            self.status, self.heard, self.said = body, at.seconds, at.seconds - max(0.0, age)

    def standing(self, at: Moment) -> Standing:
        """Whether the instance is at work; what is known of it counts only while there is a broker."""
        status, name = self.status, self.instance
        passed = f"for {at.seconds - self.since:.0f} s"
        if self.linked is None:
            return Standing("CONNECTING", f"{passed}: {self.fault}")
        if not self.linked:
            return Standing("NO BROKER", f"{passed}: {self.fault}; trying again, below is what was known")
        if status is None or self.heard < self.since:  # the broker keeps the newest one for who connects
            where = f"{self.root}/status/{name}"
            return Standing("NO STATUS", f"{passed}: has {name} ever run, and may this user read {where}?")
        if status.state in WORDS:
            return Standing(WORDS[status.state], HALTS[status.state])
        silence, limit = at.seconds - self.said, SILENT_INTERVALS * (status.interval or INTERVAL_SECONDS)
        if silence > limit:
            why = "the daemon hangs, or the broker is out of reach"
            return Standing("SILENT", f"no status for {silence:.0f} s, more than {limit:g}: {why}")
        return Standing("PAUSED", PAUSED) if status.paused else Standing("LIVE", "")

    def _signal(self, row: Row) -> None:
        signal = row.signal
        before = self.rows.get(signal.symbol)
        if before is not None and before.close > row.close:
            return
        self.rows[signal.symbol] = row
        if self.close is None or row.close > self.close:
            self.close, self.came, self.due = row.close, set(), 0
        if row.close == self.close:
            self.came.add(signal.symbol)
            self.due = max(self.due, signal.group.signals, len(self.came))

    def _group(self, done: GroupDone, at: Moment) -> None:
        took = at.time - from_text(done.close_time)
        if done.id == self.told:
            return
        self.told = done.id
        if done.straggler:
            self.stragglers += 1
        else:
            self.groups += 1
            self.shed += done.shed
            self.done, self.took = done, took

    def _taken_back(self, segments: list[str]) -> None:
        """A retained message is no more: neither is what it said."""
        match segments:
            case ["signals", _, symbol]:
                self.rows.pop(symbol, None)
            case ["targets", strategy, _, symbol]:
                self.targets.get(symbol, {}).pop(strategy, None)
            case ["models", _]:
                self.model = None


def _figures(signal: Signal, i: int) -> Figures:
    reference, horizon = signal.reference, signal.horizons[i]
    prices = dict(zip(signal.levels, signal.quantiles[i], strict=False))

    def between(levels: tuple[float, float]) -> tuple[float, float] | None:
        low, high = (prices.get(level) for level in levels)
        return None if low is None or high is None else (low, high)

    median, most = prices.get(0.5), between(NINE_TENTHS)
    skew = None
    if median is not None and most is not None and most[0] < most[1]:
        low, middle, high = (math.log(price) for price in (most[0], median, most[1]))
        skew = (high + low - 2 * middle) / (high - low)
    share = signal.coverage.share.get("0.9") if signal.coverage else None
    return Figures(
        bars=horizon.bars,
        end_time=horizon.end_time,
        rise=signal.rise[i],
        median=median,
        half=between(HALF),
        most=most,
        move=None if median is None else median / reference - 1,
        width=None if most is None else (most[1] - most[0]) / reference,
        skew=skew,
        inside=share[i] if share else None,
        outcomes=signal.coverage.outcomes[i] if signal.coverage else 0,
    )
