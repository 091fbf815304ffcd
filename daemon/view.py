"""What the page shows, in memory: the newest messages by symbol, and what is on its way to each viewer.

Nothing is computed anew: viewers are handed the very bytes that subscribers get, once these are committed.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import msgspec

from barcast.daemon import wire
from barcast.daemon.journal import Record
from barcast.daemon.wire import Outgoing
from barcast.models import Window

CANDLES = 300
"""Bars of a chart, at most: as many as the windows of the model keep."""
FANS, APART = 6, 8
"""Earlier signals of a symbol that are kept, and how many signals one is after the one before it."""
SYMBOLS = 5_000
"""Symbols of which signals are kept: those that were forecast last."""
GROUPS, GAPS = 20, 50
"""Groups in which something was not as it should be, and requests for missing bars, that are kept."""
QUEUE = 8
"""Updates that wait for a viewer; one who is slower gets the whole state instead."""
VIEWERS = 16
"""Viewers at once."""
APART_SECONDS = 0.005
"""How long one viewer is woken after another: what is sent to all of them at once holds up the event loop."""
REMEMBERED = 20_000
"""Newest messages of the outbox that a start looks for signals in."""
ACTIVATIONS = 50
"""Changes of the model that are told, the newest ones."""


class CrowdedError(Exception):
    """There are as many viewers as there may be."""


class _Reach(msgspec.Struct):
    horizons: list[wire.Horizon]


_group = msgspec.json.Decoder(wire.GroupDone)
_reach = msgspec.json.Decoder(_Reach)


class View:
    """The newest signal of each symbol and some before it, and what was wrong with the last groups.

    All of it is bounded, and so is what waits for a viewer. `about` says whose view it is. The state is the
    signals, the groups and requests worth a word, the close of the first group that was told (None: none was
    yet, and nothing is known of those before), who looks, and the whole as an event, made when somebody needs
    it. How a training stands is asked of `training`, as JSON. It belongs to the event loop.
    """

    def __init__(self, root: str, timeframe: str, about: Mapping[str, object]) -> None:
        self._signals, self._gaps = f"{root}/signals/{timeframe}/", f"{root}/backfill/{timeframe}/"
        self._groups = f"{root}/groups/{timeframe}"
        self._about = msgspec.json.encode(about)
        self._newest: dict[str, bytes] = {}
        self._earlier: dict[str, deque[bytes]] = {}
        self._count: dict[str, int] = {}
        self._troubled: deque[bytes] = deque(maxlen=GROUPS)
        self._lacking: deque[bytes] = deque(maxlen=GAPS)
        self.training: Callable[[], bytes] = lambda: b"null"
        self._since: str | None = None
        self._viewers: set[Viewer] = set()
        self._whole: bytes | None = None

    @property
    def prefix(self) -> str:
        """What the topics of signals begin with."""
        return self._signals

    @property
    def crowded(self) -> bool:
        """Whether as many look on as may."""
        return len(self._viewers) >= VIEWERS

    def remember(self, sent: Sequence[tuple[str, bytes]]) -> None:
        """Take signals of before, topic and payload, the newest first, as the journal gives them.

        Who looks already, as one may while the journal is read, is sent the whole again.
        """
        for topic, payload in reversed(sent):
            self._take(topic, payload)
        self._whole = None
        for viewer in self._viewers:
            viewer.begin_again()

    def told(self, messages: Sequence[Outgoing]) -> None:
        """Take messages that were committed, group by group, and hand them on to who looks."""
        signals: list[bytes] = []
        gaps: list[bytes] = []
        group: bytes | None = None
        for message in messages:
            topic, payload = message.topic, message.payload
            if group is not None and not topic.startswith(self._gaps):  # the next group begins
                self._hand_out(group, signals, gaps)
                group, signals, gaps = None, [], []
            if topic.startswith(self._signals):
                self._take(topic, payload)
                signals.append(payload)
            elif topic == self._groups:
                group, found = payload, _group.decode(payload)
                self._since = self._since or found.close_time
                if found.straggler or found.withheld or found.missing or found.refused or found.shed:
                    self._troubled.append(payload)
            elif topic.startswith(self._gaps):
                self._lacking.append(payload)
                gaps.append(payload)
        if group is not None:
            self._hand_out(group, signals, gaps)

    def signals(self, symbol: str) -> list[bytes]:
        """The signals that are kept of a symbol, the newest last."""
        newest = self._newest.get(symbol)
        return [] if newest is None else [*self._earlier[symbol], newest]

    def whole(self) -> bytes:
        """All there is, as an event."""
        if self._whole is None:
            self._whole = event(
                "state",
                b'{"about":%b,"training":%b,"since":%b,"signals":%b,"groups":%b,"gaps":%b}'
                % (
                    self._about,
                    self.training(),
                    msgspec.json.encode(self._since),
                    _array(self._newest.values()),
                    _array(self._troubled),
                    _array(self._lacking),
                ),
            )
        return self._whole

    @contextmanager
    def watched(self) -> "Iterator[Viewer]":
        """A viewer for as long as the body runs. Raise CrowdedError when there are too many."""
        if self.crowded:
            raise CrowdedError
        viewer = Viewer(self)
        self._viewers.add(viewer)
        try:
            yield viewer
        finally:
            self._viewers.remove(viewer)

    def train(self) -> None:
        """Let who looks hear how a training stands: once, however often that changes before."""
        self._whole = None
        for place, viewer in enumerate(self._viewers):
            viewer.train(place * APART_SECONDS)

    def _take(self, topic: str, payload: bytes) -> None:
        symbol = topic.removeprefix(self._signals)
        before = self._newest.pop(symbol, None)
        self._newest[symbol] = payload  # behind all others: the first one is the oldest
        if before is None:
            self._earlier[symbol], self._count[symbol] = deque(maxlen=FANS), 0
        elif before != payload:  # after a crash one may be made again
            if self._count[symbol] % APART == 0:
                self._earlier[symbol].append(before)
            self._count[symbol] += 1
        while len(self._newest) > SYMBOLS:
            gone = next(iter(self._newest))
            del self._newest[gone], self._earlier[gone], self._count[gone]

    def _hand_out(self, group: bytes, signals: Sequence[bytes], gaps: Sequence[bytes]) -> None:
        self._whole = None
        if self._viewers:
            parts = (group, _array(signals), _array(gaps))
            update = event("group", b'{"group":%b,"signals":%b,"gaps":%b}' % parts)
            for place, viewer in enumerate(self._viewers):
                viewer.put(update, place * APART_SECONDS)


class Viewer:
    """What waits for one who looks: at first the whole, then updates; the whole again when there are many."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._updates: deque[bytes] = deque()
        self._behind, self._training = True, False
        self._news = asyncio.Event()

    def train(self, after: float) -> None:
        """Let how a training stands be handed out, `after` seconds."""
        self._training = True
        asyncio.get_running_loop().call_later(after, self._news.set)

    def put(self, update: bytes, after: float) -> None:
        """Let an update wait, unless the whole is to be sent anyway; it is handed out `after` seconds."""
        if self._behind:
            return
        self._updates.append(update)
        if len(self._updates) > QUEUE:
            self._updates.clear()
            self._behind = True
        asyncio.get_running_loop().call_later(after, self._news.set)

    def begin_again(self) -> None:
        """Let the whole be sent, and nothing that waits."""
        self._updates.clear()
        self._behind = True
        self._news.set()

    async def next(self) -> bytes:
        """The next event, as soon as there is one."""
        while not (self._behind or self._updates or self._training):
            self._news.clear()
            await self._news.wait()
        if self._behind:
            self._behind = self._training = False
            return self._view.whole()
        if self._updates:
            return self._updates.popleft()
        self._training = False
        return event("training", self._view.training())


def event(name: str, data: bytes) -> bytes:
    """A server-sent event of JSON, which has no line breaks."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def reach(signal: bytes) -> int:
    """How many bars a signal looks ahead."""
    return max(horizon.bars for horizon in _reach.decode(signal).horizons)


def chart(window: Window, ahead: Sequence[int], signals: Sequence[bytes]) -> bytes:
    """The bars of a window, the closes that follow (nanoseconds), and signals, as JSON.

    A bar is [seconds since 1970 of its close, open, high, low, close, volume].
    """
    seconds = (window.close_times // 1_000_000_000).tolist()
    bars = [[time, *values] for time, values in zip(seconds, window.values.tolist(), strict=True)]
    return msgspec.json.encode(
        {
            "symbol": window.symbol,
            "bars": bars,
            "ahead": [time // 1_000_000_000 for time in ahead],
            "signals": [msgspec.Raw(signal) for signal in signals],
        }
    )


def activations(records: Iterable[Record]) -> bytes:
    """Who served since when and why, the newest first, as the journal has it, as JSON."""
    newest = list(islice(reversed(list(records)), ACTIVATIONS))
    return msgspec.json.encode(
        [{"time": wire.to_text(record.time), "champion": msgspec.Raw(record.payload)} for record in newest]
    )


def _array(parts: Iterable[bytes]) -> bytes:
    return b"[%b]" % b",".join(parts)
