"""Retraining: what is asked for, what a run does, and what becomes of challengers."""

import asyncio
import os
import shutil
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from barcast.daemon.gate import Verdict
from barcast.daemon.panel import Board, TrainingSettings
from barcast.daemon.room import is_full
from barcast.daemon.trainer import Run
from barcast.models import ConfigError, DataError, DiskFullError

RETRY_SECONDS = (60.0, 300.0, 1500.0)
"""Pauses after which a run that failed is tried again; after the last it waits for the next reason."""
WORDS = 5
"""Last lines of a process that are logged."""

log = structlog.get_logger()
T = TypeVar("T")


class Result(StrEnum):
    """How a run ended."""

    promoted = "promoted"
    refused = "refused"
    failed = "failed"
    stopped = "stopped"


@dataclass(frozen=True, slots=True)
class Serving:
    """What a challenger is up against: the champion's id, the margin, and the models that must not return."""

    model: str
    margin: float
    left: Sequence[str]


class _FailedError(Exception):
    """There is no result, as was logged. `final`: a person must mend it, so that trying again is vain."""

    def __init__(self, final: bool) -> None:
        super().__init__("final" if final else "worth another try")
        self.final = final


@dataclass(slots=True)
class _Job:
    """One run: why and how, which of those judged were accepted, and whether the trained one was judged.

    Settings that somebody wants are for bars of now: what an earlier run has trained is not judged for it.
    """

    reasons: tuple[str, ...]
    settings: TrainingSettings | None = None
    begun: bool = False
    accepted: list[bool] = field(default_factory=list)
    trained: bool = False


class Retraining:
    """Takes requests, and runs a training for those that came, one after the other.

    Requests that come during a run cause one more, not more. A checkpoint that somebody puts into
    `challengers/` is judged first, like one trained here. An accepted one is handed to `promote`, which says
    no when another model took over meanwhile: then it is judged again. One that is refused, that cannot be
    opened, or that could not take over is kept in `refused/`, with the verdict beside it, until the next of
    its name. Where the disk or the history kept it from taking over, it stays and is judged again. Names that
    begin with a dot are left alone: they are not complete.

    `process` runs the verbs `train` and `gate`. One is killed `timeout` seconds after its start, and after
    `stall` seconds without a word. The `board` hears of all of it. The state is the two folders, the reasons
    that wait and the settings that were wanted last, how many asked and how many of them were taken, whether
    a run is under way, its process and whether it is to stop, and what metrics are made of: `runs` by result,
    the `seconds` of the last (0: none yet).
    """

    def __init__(
        self,
        state_dir: Path,
        process: Run,
        serving: Callable[[], Serving],
        timeout: float,
        stall: float,
        promote: Callable[[Path, Verdict, str], Awaitable[bool]],
        refuse: Callable[[Verdict], Awaitable[None]],
        board: Board,
    ) -> None:
        self.inbox, self.refused = state_dir / "challengers", state_dir / "refused"
        self.running = False
        self.runs: Counter[Result] = Counter()
        self.seconds = 0.0
        self.configure(process, timeout, stall)
        self._serving, self._promote, self._refuse, self._board = serving, promote, refuse, board
        self._reasons: list[str] = []
        self._settings: TrainingSettings | None = None
        self._asks = self._taken = 0
        self._child: asyncio.Future[tuple[int, bytes]] | None = None
        self._stopping = False
        self._asked = asyncio.Event()
        self._pausing = False
        self._listeners: set[Callable[[str | Result], None]] = set()

    def configure(self, process: Run, timeout: float, stall: float) -> None:
        """Run what is run from now on in another way, or with other limits."""
        self._process, self._timeout, self._stall = process, timeout, stall

    def ask(self, reason: str, settings: TrainingSettings | None = None) -> None:
        """Want a training, for a reason; a run that waits to try again does so at once.

        With `settings` it is by these; of two that wait, by those that were wanted last.
        """
        log.info("retrain_asked", reason=reason, running=self.running)
        self._asks += 1
        self._settings = settings or self._settings
        if reason not in self._reasons:
            self._reasons.append(reason)
        self._asked.set()

    def stop(self) -> str:
        """End the run under way, and what waits for it; return a sentence. Raise ConfigError where none can.

        A model that is being put into service is not held up; one that is being judged is dropped.
        """
        if self._child is None and not self._pausing:
            busy = "a model is being put into service or aside"
            why = busy if self.running else "no training is under way"
            raise ConfigError(f"{why}: there is nothing to stop; the daemon itself ends by SIGTERM")
        self._stopping = True
        self._take()
        self._settings = None
        if self._child is not None:
            self._child.cancel()
        else:
            self._asked.set()
        return "the training ends, and what waited for it; nothing of it takes over"

    async def follow(
        self, reason: str, on_line: Callable[[str], None], settings: TrainingSettings | None = None
    ) -> Result:
        """Want a training and follow it to its end; the lines are those of its processes and verdicts."""
        said: asyncio.Queue[str | Result] = asyncio.Queue()
        self._listeners.add(said.put_nowait)
        try:
            self.ask(reason, settings)
            mine = self._asks
            while True:
                word = await said.get()
                if not isinstance(word, Result):
                    on_line(word)
                elif mine <= self._taken:  # else it is of the run before the one that is asked for
                    return word
        finally:
            self._listeners.discard(said.put_nowait)

    async def wanted(self) -> tuple[str, ...]:
        """Wait until a training is wanted; return the reasons, which wait no more."""
        await self._asked.wait()
        return self._take()

    async def run(self, reasons: Sequence[str]) -> Result:
        """Judge what is offered, train, judge that; try again where a process failed. Raises nothing."""
        loop = asyncio.get_running_loop()
        began, self.running, self._stopping = loop.time(), True, False
        log.info("retrain_started", reasons=list(reasons))
        job = _Job(tuple(reasons), self._settings)
        self._settings = None
        self._board.begin(reasons, job.settings)
        try:
            await self._attempts(job)
        finally:
            self.running, self._pausing, self.seconds = False, False, loop.time() - began
        ended = Result.refused if job.trained else Result.stopped if self._stopping else Result.failed
        result = Result.promoted if any(job.accepted) else ended
        self.runs[result] += 1
        self._tell(result)
        self._board.end(result)
        return result

    def _take(self) -> tuple[str, ...]:
        reasons, self._reasons = tuple(self._reasons), []
        self._taken = self._asks
        self._asked.clear()
        return reasons

    def _tell(self, word: str | Result) -> None:
        if not isinstance(word, Result):
            self._board.hear(word)
        for listener in list(self._listeners):
            listener(word)

    async def _attempts(self, job: _Job) -> None:
        for pause in (*RETRY_SECONDS, None):
            fault = await tried(self._attempt(job), "retrain_failed")
            if fault is None or (isinstance(fault, _FailedError) and fault.final):
                return
            if pause is None:
                log.error("retrain_given_up", tries=len(RETRY_SECONDS) + 1)
                return
            log.warning("retrain_waits", seconds=pause)
            self._tell(f"failed; the next try is in {pause:g} s")
            self._board.does("waits")
            self._pausing = True
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._asked.wait()
            self._pausing = False
            if self._stopping and not self._reasons:
                self._asked.clear()
            if self._stopping or self._settings:  # those are of a run of their own
                return
            job.reasons = tuple(dict.fromkeys([*job.reasons, *self._take()]))

    async def _attempt(self, job: _Job) -> None:
        """Do what is left to do. Raise _FailedError when some of it has to be tried again."""
        trained, failed = self.inbox / "trained", None
        for challenger in self._offered():
            try:
                await self._judge(challenger, job)
            except _FailedError as error:  # a fault of the history or the champion leaves it where it is
                if self._stopping:
                    raise
                failed = failed if error.final else error
        if not job.trained:
            wanted = [] if job.settings is None else ["--settings", job.settings.encode()]
            if wanted and not job.begun:
                shutil.rmtree(trained, ignore_errors=True)
            job.begun = True
            try:
                if not (trained / "model.json").is_file():
                    how = ["--champion", self._serving().model, "--out", str(trained), *wanted]
                    await self._call("train", how)
                await self._judge(trained, job)
            finally:
                if self._stopping:
                    shutil.rmtree(trained, ignore_errors=True)
            job.trained = True
        if failed is not None:
            raise failed

    def _offered(self) -> list[Path]:
        self.inbox.mkdir(parents=True, exist_ok=True)
        found = []
        for path in sorted(self.inbox.iterdir()):
            if path.name != "trained" and not path.name.startswith("."):
                try:
                    if (path / "model.json").is_file():
                        found.append(path)
                except OSError as error:
                    self._stuck(path, error)
        return found

    async def _judge(self, challenger: Path, job: _Job) -> None:
        """Have it judged and act on the verdict. Raise _FailedError without one."""
        while True:
            serving = self._serving()
            against = ["--champion", serving.model, "--margin", repr(serving.margin)]
            answer = await self._call("gate", [*against, str(challenger)], challenger)
            if answer is None:
                return
            verdict = msgspec.json.decode(answer, type=Verdict)
            verdict = msgspec.structs.replace(verdict, triggers=job.reasons)
            if verdict.accepted and verdict.challenger in serving.left:
                verdict = _refused(
                    verdict, "it was rolled back from; `barcast ctl CONFIG rollback --to` brings it back"
                )
            log.info("challenger_judged", name=challenger.name, **msgspec.to_builtins(verdict))
            word = "accepted" if verdict.accepted else "refused"
            self._tell(f"challenger {verdict.challenger}: {word}; {verdict.reason}")
            if not verdict.accepted:
                break
            taken = await tried(self._take_over(challenger, verdict, serving.model), "promotion_failed")
            if isinstance(taken, _FailedError):
                raise taken
            if isinstance(taken, Exception):
                verdict = _refused(verdict, f"it could not take over: {taken or type(taken).__name__}")
                break
            if taken:
                job.accepted.append(True)
                try:
                    shutil.rmtree(challenger)
                except OSError as error:
                    self._stuck(challenger, error)
                return
        job.accepted.append(False)
        self._set_aside(challenger, msgspec.json.encode(verdict))
        await self._refuse(verdict)

    async def _take_over(self, challenger: Path, verdict: Verdict, champion: str) -> bool:
        try:
            return await self._promote(challenger, verdict, champion)
        except (DataError, DiskFullError, OSError) as error:  # no fault of the challenger's
            log.error("promotion_postponed", name=challenger.name, reason=str(error))
            raise _FailedError(final=False) from error

    def _set_aside(self, challenger: Path, why: bytes) -> None:
        """Move it into `refused/`. Without room for the verdict raise _FailedError, and leave it there."""
        kept = self.refused / challenger.name
        try:
            self.refused.mkdir(exist_ok=True)
            kept.with_name(f"{kept.name}.json").write_bytes(why)
            shutil.rmtree(kept, ignore_errors=True)
            challenger.rename(kept)
        except OSError as error:
            self._stuck(challenger, error)
            if is_full(error):
                raise _FailedError(final=False) from error

    def _stuck(self, challenger: Path, error: OSError) -> None:
        """One that cannot be read, moved or removed, as whoever laid it there is another user."""
        log.error(
            "challenger_stuck",
            name=challenger.name,
            reason=str(error),
            remedy=f"remove {challenger}, or give it to the daemon's user; else each run finds it again",
        )

    async def _call(self, verb: str, arguments: Sequence[str], judged: Path | None = None) -> bytes | None:
        """Run a verb to its end; return what it printed. Raise _FailedError when it failed, died or hung.

        A fault names its file: where that is the `judged` one, it is set aside, as the next run would find it
        the same, and nothing is returned.
        """
        self._board.does(verb)
        loop = asyncio.get_running_loop()
        end, words, blamed = loop.time() + self._timeout, deque[str](maxlen=WORDS), False
        try:
            async with asyncio.timeout_at(min(end, loop.time() + self._stall)) as limit:

                def on_line(line: str) -> None:
                    nonlocal blamed
                    if not limit.expired():
                        limit.reschedule(min(end, loop.time() + self._stall))
                    words.append(line)
                    blamed |= judged is not None and str(judged) in line
                    self._tell(line)

                self._child = asyncio.ensure_future(self._process(verb, arguments, on_line))
                status, out = await self._child
            if self._stopping:  # as it ended at that moment
                raise _FailedError(final=True)
        except TimeoutError as error:
            if loop.time() >= end:
                log.error(f"{verb}_timed_out", seconds=self._timeout)
                self._tell(f"{verb} was killed: it took more than the timeout of {self._timeout:g} s")
            else:
                log.error(f"{verb}_stalled", seconds=self._stall, last_words="\n".join(words))
                self._tell(f"{verb} was killed: it said nothing for {self._stall:g} s, its `stall`")
            raise _FailedError(final=self._stopping) from error
        except OSError as error:  # no worker listens, or it ended first; or no process can be started
            log.error(f"{verb}_failed", reason=str(error), last_words="\n".join(words))
            self._tell(f"{verb} failed: {error}")
            raise _FailedError(final=self._stopping) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self._stopping or (task is not None and task.cancelling()):
                raise
            log.info(f"{verb}_stopped")
            raise _FailedError(final=True) from error
        finally:
            if self._child is not None:
                self._child.cancel()
            self._child = None
        last_words = "\n".join(words)
        if status == 0:
            if words:
                log.info(f"{verb}_said", last_words=last_words)
            return out
        if judged is not None and status == os.EX_CONFIG and blamed:
            self._set_aside(judged, msgspec.json.encode({"reason": last_words}))
            kept = str(self.refused / judged.name)
            log.error("challenger_unusable", name=judged.name, kept_in=kept, last_words=last_words)
            return None
        log.error(f"{verb}_failed", exit_status=status, last_words=last_words)
        raise _FailedError(final=status == os.EX_CONFIG)


def _refused(verdict: Verdict, reason: str) -> Verdict:
    return msgspec.structs.replace(verdict, accepted=False, reason=reason)


async def tried(work: Awaitable[T], event: str) -> T | Exception:
    """The one broad handler: what goes wrong beside the path is logged, and changes nothing in it."""
    try:
        return await work
    except _FailedError as error:
        return error  # told where it happened
    except Exception as error:
        log.exception(event)
        return error
