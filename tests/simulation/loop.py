"""An event loop on virtual time, on which a seed decides what is done first.

Nothing waits: when nothing is ready, the clock jumps to the next timer. What is ready at the same moment runs
in any order. Work for threads is done on this one, at moments of its own.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

MOST_STEPS = 400_000
"""Callbacks after which a schedule is taken for one that never ends."""


class Hang(Exception):  # noqa: N818 - what happened, not what is wrong
    """Nothing will ever happen again, or things happen without end."""


class Waits(BaseException):
    """A job sleeps on its thread: it begins again after so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Sleeping:
    """Stands in for the event of threads that a job waits for; the state is whether it is set."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Let no job wait any more."""
        self._set = True

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set

    def wait(self, seconds: float) -> bool:
        """Whether it is set; else the job waits."""
        if not self._set:
            raise Waits(seconds)
        return True


class _Numbered:
    """What sets of asyncio hold is ordered by its number, and not by where it lies in memory."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class NumberedTask(_Numbered, asyncio.Task[Any]):
    """A task with a number."""


class NumberedFuture(_Numbered, asyncio.Future[Any]):
    """A future with a number."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The state is the time, how many callbacks ran, what went wrong in one, and what waits.

    `shuffled` is the share of callbacks that are taken from anywhere among those that are ready, `stalling`
    that of the jumps of the clock that go too far, as on a machine that was busy. `before`, if there is one,
    is called before each callback.
    """

    def __init__(self, dice: Random, shuffled: float, stalling: float) -> None:
        super().__init__()
        self.dice, self.shuffled, self.stalling = dice, shuffled, stalling
        self.steps = self.stalls = 0
        self.before: Callable[[], None] | None = None
        self.faults: list[str] = []
        self._virtual = 0.0
        self._numbers = 0
        self.set_task_factory(self._task)
        self.set_exception_handler(self._note)

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual

    def _numbered(self, made: Any) -> Any:
        self._numbers += 1
        made.number = self._numbers
        return made

    def _task(self, loop: asyncio.AbstractEventLoop, coro: Any, **given: Any) -> Any:
        return self._numbered(NumberedTask(coro, loop=loop, **given))

    def create_future(self) -> Any:
        """A future with a number."""
        return self._numbered(NumberedFuture(loop=self))

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _run_once(self) -> None:
        ready, timers, dice = self._ready, self._scheduled, self.dice
        if self.steps >= MOST_STEPS:
            raise Hang(f"{self.steps} callbacks ran, at {self._virtual:.3f} s")
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready:
            if not timers:
                raise Hang(f"nothing waits for anything, at {self._virtual:.3f} s")
            self._virtual = max(self._virtual, timers[0]._when)
            if self.stalling and dice.random() < self.stalling:
                self._virtual += dice.choice((0.01, 0.3, 3.0))
                self.stalls += 1
        while timers and timers[0]._when <= self._virtual:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        at = int(dice.random() * len(ready)) if len(ready) > 1 and dice.random() < self.shuffled else 0
        if at:
            ready.rotate(-at)
        handle = ready.popleft()
        if at:
            ready.rotate(at)
        if not handle._cancelled:
            self.steps += 1
            if self.before is not None:
                self.before()
            handle._run()

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def _process_events(self, event_list: object) -> None:
        """No file is watched."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Do the work on this thread, at a moment that the lane of the executor decides."""
        lane = executor if isinstance(executor, Lane) else Lane(self, (0.0, 0.02))
        return lane.call(func, *args)

    async def create_unix_server(self, *_: Any, **__: Any) -> "Listener":  # type: ignore[override]
        """Nobody connects."""
        return Listener()


class Listener:
    """A server that nobody reaches."""

    def close(self) -> None:
        """There is nothing to close."""


class Done:
    """Stands in for the future of a thread's job that is done."""

    def result(self) -> None:
        """It has none."""


class Lane:
    """A thread in virtual time: one job after the other, each at a moment between its begin and its end.

    The state is the jobs that wait and whether one is under way. `pace` are the seconds that half a job takes
    at least and at most, or what says so at the moment. `perform` does a job, and may have other ideas.
    `dead` lanes do nothing any more.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        pace: tuple[float, float] | Callable[[], tuple[float, float]],
        perform: Callable[[Callable[[], Any]], Any] = lambda job: job(),
    ) -> None:
        self.dead = False
        self._loop, self._pace, self._perform = loop, pace, perform
        self._jobs: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._busy = False

    def call(self, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Have it done after the others."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.append((future, partial(func, *args)))
        if not self._busy:
            self._busy = True
            self._loop.call_later(self._half(), self._work)
        return future

    def submit(self, func: Callable[[], Any]) -> Done:
        """Do all that waits, and then this, at once."""
        while self._jobs and not self.dead:
            future, job = self._jobs.popleft()
            if not future.done():
                outcome = self._tried(job)
                if not self.dead:  # of a crash amid it nobody hears
                    self._settle(future, outcome)
        func()
        return Done()

    def shutdown(self) -> None:
        """Take no more; there is no thread to end."""

    def _half(self) -> float:
        low, high = self._pace() if callable(self._pace) else self._pace
        return low + (high - low) * self._loop.dice.random() ** 3

    def _work(self) -> None:
        while self._jobs and self._jobs[0][0].done():  # whoever wanted it has gone
            self._jobs.popleft()
        if not self._jobs or self.dead:
            self._busy = False
            return
        future, job = self._jobs[0]
        try:
            outcome = self._tried(job)
        except Waits as waits:
            self._loop.call_later(waits.seconds, self._work)
            return
        if self._jobs:  # closing may have done it
            self._jobs.popleft()
        self._loop.call_later(self._half(), self._end, future, outcome)

    def _end(self, future: asyncio.Future[Any], outcome: tuple[Any, Exception | None]) -> None:
        if self.dead:
            return
        self._settle(future, outcome)
        self._work_on()

    def _work_on(self) -> None:
        self._busy = bool(self._jobs)
        if self._busy:
            self._loop.call_later(self._half(), self._work)

    def _tried(self, job: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            return self._perform(job), None
        except Exception as error:  # noqa: BLE001 - it is the caller's, as that of any thread
            return None, error

    @staticmethod
    def _settle(future: asyncio.Future[Any], outcome: tuple[Any, Exception | None]) -> None:
        if future.done():
            return
        result, error = outcome
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
