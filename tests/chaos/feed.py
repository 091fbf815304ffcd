"""Who talks to the broker past the misbehaving network: a feed, and a subscriber that keeps evidence."""

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode

from barcast.daemon.wire import encode_bars
from barcast.models import Bar
from tests.integration.instance import Instance, client

MINUTE = 60 * 10**9
ROOT = "barcast/v1"
TURNS = 0.005
"""Seconds between looks at what is to be sent."""
ARRAY = 5
"""Old bars in one message, where it is an array."""

Message = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of the feed: its number at the library, what it is, when it was given (monotonic)."""

    mid: int
    message: Message
    time: float


class Feeder(threading.Thread):
    """Publishes a plan on an instance's clock and old bars, `rate` messages a second, whatever happens.

    Of the old ones some come as arrays, and some are no bars at all. It notes what the broker acknowledged to
    it, and when.
    """

    def __init__(self, instance: Instance, port: int, plan: Sequence[tuple[int, Bar]], rate: float) -> None:
        super().__init__(name="feed", daemon=True)
        self.sent: list[Sent] = []
        self.enough = threading.Event()
        self._answers: list[tuple[int, float]] = []
        self.rate = rate
        self._instance, self._plan = instance, plan
        self._client = client("feed", port)
        self._client.on_publish = self._answered
        self._client.loop_start()

    def _answered(self, _client: object, _data: object, mid: int, code: ReasonCode, _p: object) -> None:
        assert not code.is_failure, code
        self._answers.append((mid, time.monotonic()))

    def run(self) -> None:
        """Publish until it is enough."""
        plan, old = iter(self._plan), fillers(self._instance.start)
        ahead, turn, due = next(plan, None), time.monotonic(), 0.0
        while not self.enough.wait(TURNS):
            while ahead is not None and self._instance.real(ahead[0]) <= time.time():
                self.send(message(ahead[1]))
                ahead = next(plan, None)
            last, turn = turn, time.monotonic()
            due += (turn - last) * self.rate
            for each in itertools.islice(old, int(due)):
                self.send(each)
            due %= 1

    def send(self, *messages: Message) -> None:
        """Publish, or keep to be published once there is a connection."""
        for each in messages:
            info = self._client.publish(*each, 1)
            assert info.rc in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN), info.rc
            self.sent.append(Sent(info.mid, each, time.monotonic()))

    def acknowledged(self) -> dict[Message, float]:
        """What the broker took, and when it said so first: the n-th answer with a number is for its n-th."""
        answers: dict[int, list[float]] = defaultdict(list)
        for mid, when in list(self._answers):
            answers[mid].append(when)
        taken: dict[Message, float] = {}
        places: dict[int, Iterator[float]] = {mid: iter(times) for mid, times in answers.items()}
        for sent in list(self.sent):
            for when in itertools.islice(places.get(sent.mid, ()), 1):
                taken.setdefault(sent.message, when)
        return taken

    @property
    def waiting(self) -> int:
        """How many messages the broker has not acknowledged yet."""
        return len(self.sent) - len(self._answers)

    def close(self) -> None:
        """Leave the broker."""
        self.enough.set()
        self._client.disconnect()
        self._client.loop_stop()


def message(*bars: Bar) -> Message:
    """The message that carries bars."""
    topic = f"{ROOT}/bars/1m"
    return f"{topic}/{bars[0].symbol}" if len(bars) == 1 else topic, encode_bars(list(bars))


def fillers(start: int) -> Iterator[Message]:
    """Old bars of fifty symbols, in messages of one or in arrays, and now and then what is no bar."""
    dice = random.Random(start)
    for minute in itertools.count(1):
        bars = [
            Bar(f"OLD{i:02d}", start - 600 * MINUTE + minute % 500 * MINUTE, 50.0 + i, 51.0 + i, 49.0 + i,
                50.0 + i, float(minute))
            for i in range(50)
        ]  # fmt: skip
        while bars:
            count = ARRAY if dice.random() < 0.1 else 1
            yield message(*bars[:count])
            del bars[:count]
        yield f"{ROOT}/bars/1m/OLD00", json.dumps({"close_time": minute}).encode()


class Witness:
    """Subscribes with a session that lasts, and writes down everything with its time (monotonic)."""

    def __init__(self, port: int) -> None:
        self.seen: list[tuple[float, str, bytes]] = []
        subscribed = threading.Event()
        self._client = client("witness", port)
        self._client.on_message = lambda _c, _u, m: self.seen.append(
            (time.monotonic(), m.topic, bytes(m.payload))
        )
        self._client.on_subscribe = lambda *_: subscribed.set()
        kinds = ("signals", "targets", "groups", "backfill", "deadletter", "models", "status")
        self._client.subscribe([(f"{ROOT}/{kind}/#", 1) for kind in kinds])
        self._client.loop_start()
        assert subscribed.wait(10), "the broker answers no subscription"

    def state(self) -> str:
        """What the daemon's status said last."""
        said = [payload for _, topic, payload in self.seen if "/status/" in topic]
        return str(json.loads(said[-1])["state"]) if said else ""

    def newest(self) -> str:
        """The newest close that a tradable signal was of, as text; times as text sort like times."""
        signals = [json.loads(payload) for _, topic, payload in self.seen[-200:] if "/signals/" in topic]
        return max((str(body["close_time"]) for body in signals if body["tradable"]), default="")

    def close(self) -> None:
        """Leave the broker."""
        self._client.disconnect()
        self._client.loop_stop()
