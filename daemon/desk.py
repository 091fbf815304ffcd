"""Where operators order: each order is journalled, carried out beside the path, and answered.

By the socket of the state directory, see `control`, and over MQTT: a message on
`{root}/control/{instance}/{verb}`, answered on its response topic, which is below `{root}/answers/`, with its
correlation data. Neither waits for bars, and bars do not wait for them.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from barcast.daemon import wire
from barcast.daemon.config import Topics
from barcast.daemon.control import VERBS, Answer, Order, Tell, answered
from barcast.daemon.events import Answered, Ordered, decoded
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Courier, LiveSource, Scribe
from barcast.daemon.mqtt import NOT_CONNECTED, Delivery, Link, Request
from barcast.daemon.wire import Outgoing, Reject
from barcast.models import DeposedError

MOST_BYTES = 4096
"""The longest body of an order."""
UNDER_WAY = 32
"""Orders by the broker that are under way at once, at most."""
KNOWN = 1000
"""Orders by the broker that are remembered, at most: one that comes again is not carried out again."""
RECORDS = 10_000
"""How far back a start looks for them, in records before those that are settled: the broker sends again what
was not acknowledged, and of that there is a window of `mqtt.RECEIVE_MAXIMUM`."""
UNSENT = 1000
"""Answers that wait for the broker, at most; then the oldest is dropped."""
SILENT_SECONDS = 3.0
"""How long who ordered hears nothing of it."""
LAPSE_SECONDS = 60.0
"""After how long an order from this machine, of which the journal knows nothing yet, is not carried out."""
ANSWER_SECONDS = 60.0
"""How long an answer is of use."""
PAUSE_SECONDS = 0.2
"""Pause after an answer could not be sent."""

log = structlog.get_logger()
CarryOut = Callable[[Order, Tell], Awaitable[str]]
"""Carries out an order and returns a sentence. Raise ConfigError for what cannot be done."""


@dataclass(frozen=True, slots=True)
class _Unsent:
    """An answer on its way: to where, by what it is known there, until when it is of use (loop's clock)."""

    topic: str
    correlation: bytes
    body: wire.AnswerMessage
    until: float


class Desk:
    """Takes orders, by the socket and by the broker.

    An order is in the journal before it is carried out, and then what came of it; `state` decides nothing and
    is not. One that came by the broker is acknowledged after that. What comes again, as nobody heard the
    acknowledgement, also after a start anew, is answered again and not carried out again.

    The state is the orders by the broker that are known, by the topic of their answers and their correlation
    data (None: under way), those of them that are under way, the answers that wait for the broker, all tasks,
    and the order before: who, what, and what came of it.
    """

    def __init__(
        self,
        topics: Topics,
        boot: str,
        link: Link,
        scribe: Scribe,
        source: LiveSource,
        courier: Courier,
        carry_out: CarryOut,
    ) -> None:
        self.last = ""
        self._topics, self._boot, self._link = topics, boot, link
        self._scribe, self._source, self._courier = scribe, source, courier
        self._carry_out = carry_out
        self._known = _known(scribe.journal)
        self._under_way = 0
        self._unsent: deque[_Unsent] = deque()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        link.requests(topics.control, self.take)

    async def run(self) -> None:
        """Send answers until cancelled; what is under way ends then, too."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._unsent:
                    await self._send(self._unsent.popleft())
        finally:
            for task in self._tasks:
                task.cancel()

    async def order(self, order: Order, who: str, tell: Tell) -> Answer:
        """Carry out what somebody on this machine wants, unless the journal is away too long before."""
        expires = asyncio.get_running_loop().time() + LAPSE_SECONDS
        return await self._carried(order, Ordered(who, **_said(order)), tell, expires)

    def signalled(self, verb: str) -> None:
        """Carry out what a signal to the process means."""

        async def carried() -> None:
            await self.order(Order(verb), "signal", lambda _line: None)

        self._begin(carried())

    def take(self, delivery: Delivery) -> None:
        """Take what came by the broker. It is on its way into the journal when this returns."""
        request = delivery.request
        assert request is not None
        if request.retained and not delivery.payload and not request.answers:
            return  # a retained order was taken back
        verb = delivery.topic.removeprefix(self._topics.control)
        try:
            answers = self._where(request)
        except ValueError as error:
            self._lay_aside(delivery, str(error))
            return
        key = (answers, request.correlation)
        try:
            order = _read(verb, delivery.payload, request)
            if key not in self._known and self._under_way >= UNDER_WAY:
                raise ValueError(f"{UNDER_WAY} orders are under way: wait for one of them, and order again")
        except ValueError as error:
            log.warning("order_unusable", topic=delivery.topic[: wire.CUT], reason=str(error)[: wire.CUT])
            self._answer(key, verb, Answer(refused=str(error)))
            return
        if key in self._known:
            log.info("order_known", verb=verb)
            if (known := self._known[key]) is not None:
                self._answer(key, verb, known)
            return
        self._known[key] = None
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]
        self._under_way += 1
        who = f"mqtt {request.claims}".strip()[: wire.CUT]
        note = Ordered(who, **_said(order), answers=answers, correlation=request.correlation.hex())

        def tell(line: str) -> None:
            self._answer(key, verb, Answer(line=line))

        # Now, not when the task begins: what is acknowledged is in the journal.
        written = None if order.verb == "state" else self._write(Kind.ORDERED, note.encode())

        async def carry() -> None:
            try:
                answer = await self._carried(order, note, tell, request.expires, written)
            finally:
                self._under_way -= 1
            if key in self._known:
                self._known[key] = answer
            self._answer(key, verb, answer)

        self._begin(carry())

    async def _carried(
        self,
        order: Order,
        note: Ordered,
        tell: Tell,
        expires: float | None,
        written: "asyncio.Future[list[int]] | None" = None,
    ) -> Answer:
        """Journal an order, unless that is under way, carry it out, and journal what came of it."""
        log.info("ordered", who=note.who, **msgspec.to_builtins(order))
        if order.verb == "state":
            return await answered(order, self._carry_out(order, tell))
        held = "the journal cannot be written now, see the daemon's log: the order waits for it"
        silence = asyncio.get_running_loop().call_later(SILENT_SECONDS, tell, held)
        try:
            [number] = await (written or self._write(Kind.ORDERED, note.encode()))
        except (OSError, DeposedError) as error:  # only while the daemon stops: before that the journal waits
            return Answer(refused=f"the daemon stops, and nothing can be journalled ({error}); order again")
        finally:
            silence.cancel()
        tell(f"taken: record {number}")

        async def carried() -> Answer:
            if expires is not None and asyncio.get_running_loop().time() >= expires:
                answer = Answer(refused="the order expired before it could be carried out; order again")
            else:
                answer = await answered(order, self._carry_out(order, tell))
            if answer.refused is None:
                log.info("order_done", record=number, verb=order.verb, result=answer.done)
            else:
                log.warning("order_refused", record=number, verb=order.verb, reason=answer.refused)
            self.last = f"{order.verb} by {note.who}: {answer.done or answer.refused}"
            try:
                await self._write(Kind.ANSWERED, Answered(number, answer.done, answer.refused).encode())
            except (OSError, DeposedError) as error:  # as above: the next start answers that it does not know
                log.warning("answer_not_journalled", record=number, reason=str(error))
            return answer

        if order.verb == "reload" and not order.wait:

            async def aside() -> None:
                await carried()

            self._begin(aside())
            return Answer(done="asked for; the log will say what comes of it")
        return await carried()

    def _write(self, kind: str, payload: bytes) -> "asyncio.Future[list[int]]":
        return self._scribe(self._scribe.journal.append, [(self._source.now(), kind, "", payload)])

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="order")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _where(self, request: Request) -> str:
        """Where an answer goes. Raise ValueError where none can."""
        below, topic = self._topics.answers, request.answers or ""
        if not topic.startswith(below) or len(topic) > wire.CUT or set(topic) & set("+#\0"):
            raise ValueError(
                f"the response topic {topic[: wire.SHOWN]!r} is not below {below}; name one there"
            )
        if not request.correlation:
            raise ValueError("there is no correlation data; send some that is new for each order")
        return topic

    def _lay_aside(self, delivery: Delivery, reason: str) -> None:
        """What cannot be answered goes to the dead letters."""
        log.warning("dead_letter", topic=delivery.topic[: wire.CUT], reason=reason[: wire.CUT], count=1)
        self._source.dead_letters += 1
        reject = Reject(reason, delivery.payload[: wire.CUT])
        letter = wire.dead_letter([reject], delivery.topic, self._source.now(), self._topics.deadletter)
        self._scribe(self._scribe.journal.append, [], [letter])
        self._courier.wake()

    def _answer(self, key: tuple[str, bytes], verb: str, answer: Answer) -> None:
        """Let an answer wait for the broker."""
        topic, correlation = key
        body = wire.AnswerMessage(
            verb=verb[: wire.SHOWN],
            instance=self._topics.instance,
            boot=self._boot,
            line=answer.line,
            done=answer.done,
            refused=answer.refused,
        )
        until = asyncio.get_running_loop().time() + ANSWER_SECONDS
        self._unsent.append(_Unsent(topic, correlation, body, until))
        if len(self._unsent) > UNSENT:
            self._unsent.popleft()
        self._news.set()

    async def _send(self, unsent: _Unsent) -> None:
        payload, expires = msgspec.json.encode(unsent.body), int(ANSWER_SECONDS * 1e9)
        message = Outgoing("", unsent.topic, payload, retain=False, expires=expires)
        while asyncio.get_running_loop().time() < unsent.until:
            fault = await self._link.publish(message, 0, correlation=unsent.correlation)
            if fault is None:
                return
            if fault != NOT_CONNECTED:
                log.warning("answer_refused", topic=unsent.topic, reason=fault)
                return
            await asyncio.sleep(PAUSE_SECONDS)
            await self._link.connected.wait()


def _said(order: Order) -> dict[str, Any]:
    names = ("verb", "wait", "to", "reason", "training")
    return {name: getattr(order, name) for name in names}


def _read(verb: str, payload: bytes, request: Request) -> Order:
    """The order of a message. Raise ValueError for what is none."""
    if verb not in VERBS:
        raise ValueError(f"verb {verb[: wire.SHOWN]!r} is none of {', '.join(VERBS)}")
    if request.retained:
        raise ValueError(
            "the order is retained, so that it would come again at each connection; send an empty retained "
            "message to its topic to take it back, and order without"
        )
    if len(payload) > MOST_BYTES:
        raise ValueError(f"the body has {len(payload)} bytes, more than {MOST_BYTES}; say less")
    try:
        body = msgspec.json.decode(payload or b"{}", type=wire.OrderMessage)
    except wire.UNDECODABLE as error:
        raise ValueError(f'{error}; send an object such as {{"reason": "..."}}, or nothing') from error
    return Order(verb, body.wait, body.to, body.reason)


def _known(journal: Journal) -> dict[tuple[str, bytes], Answer | None]:
    """The orders by the broker that an earlier start took, with what it answered."""
    after = max(0, journal.progress().seq - RECORDS)
    results = {
        found.order: Answer(done=found.done, refused=found.refused)
        for _, found in decoded(journal.of_kind(Kind.ANSWERED, after), Answered.decode)
    }
    unknown = Answer(
        refused="the daemon was started anew before this was done: look at its state, and order again"
    )
    known: dict[tuple[str, bytes], Answer | None] = {}

    def key(payload: bytes) -> tuple[str, bytes]:
        order = Ordered.decode(payload)
        return order.answers, bytes.fromhex(order.correlation)

    for number, (answers, correlation) in decoded(journal.of_kind(Kind.ORDERED, after), key):
        if correlation:
            known[answers, correlation] = results.get(number, unknown)
    return known
