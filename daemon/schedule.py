"""The scheduled job: train a challenger in a process of its own, judge it, and let a better one take over."""

import asyncio
import os
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger

from barcast.daemon.gate import Verdict
from barcast.models import ConfigError

log = structlog.get_logger()
_FIELDS = ("second", "minute", "hour", "day", "month", "day_of_week")


def cron(expression: str) -> CronTrigger:
    """A trigger in UTC from five fields (minute first) or six (second first)."""
    fields = expression.split()
    if len(fields) not in (5, 6):
        raise ConfigError(
            f"retrain.cron: {expression!r} has {len(fields)} fields; write five, or six with seconds"
        )
    if len(fields) == 5:
        fields.insert(0, "0")
    if re.search(r"(?<![/0-9])[0-9]", fields[5]):
        raise ConfigError(
            f"retrain.cron: {expression!r} numbers a weekday, and programs differ in which one is 0; "
            "write mon to sun"
        )
    try:
        return CronTrigger(**dict(zip(_FIELDS, fields, strict=True)), timezone=ZoneInfo("UTC"))
    except ValueError as error:
        raise ConfigError(f"retrain.cron: {expression!r}: {error}; write one such as 17 3 * * sun") from error


def scheduler(expression: str, job: Callable[[], Awaitable[None]]) -> AsyncIOScheduler:
    """A scheduler that runs the job: one instance, a missed run once and late rather than never."""
    planner = AsyncIOScheduler(timezone=ZoneInfo("UTC"))
    planner.add_job(
        job, cron(expression), id="retrain", misfire_grace_time=None, coalesce=True, max_instances=1
    )
    return planner


class Retrainer:
    """Trains challengers and has them judged, each in a subprocess, so that the live loop never waits.

    A checkpoint that somebody puts into `challengers/` is judged first, like one trained here. An accepted
    one is handed to `promote`; one that is refused, or cannot be opened, is kept in `refused/` until the next
    of its name. `train` and `gate` give the argument lists of the two subprocesses, up to the directory that
    they work on; `timeout` is in seconds. The state is the two folders.
    """

    def __init__(
        self,
        state_dir: Path,
        train: Callable[[], Sequence[str]],
        gate: Callable[[], Sequence[str]],
        timeout: float,
        promote: Callable[[Path, Verdict], Awaitable[None]],
        refuse: Callable[[Verdict], Awaitable[None]],
    ) -> None:
        self.inbox, self.refused = state_dir / "challengers", state_dir / "refused"
        self._train, self._gate, self._timeout = train, gate, timeout
        self._promote, self._refuse = promote, refuse

    async def run(self) -> None:
        """The job. What goes wrong in it is logged and changes nothing: the one broad handler."""
        try:
            await self._run()
        except Exception:
            log.exception("retrain_failed")

    async def _run(self) -> None:
        log.info("retrain_started")
        trained = self.inbox / "trained"
        shutil.rmtree(trained, ignore_errors=True)
        for challenger in self._offered():
            await self._judge(challenger)
        if await self._call([*self._train(), "--out", str(trained)], "train") is not None:
            await self._judge(trained)

    def _offered(self) -> list[Path]:
        self.inbox.mkdir(parents=True, exist_ok=True)
        return sorted(path for path in self.inbox.iterdir() if (path / "model.json").is_file())

    async def _judge(self, challenger: Path) -> None:
        answer = await self._call([*self._gate(), str(challenger)], "gate", challenger)
        if answer is None:
            return
        verdict = msgspec.json.decode(answer, type=Verdict)
        log.info("challenger_judged", name=challenger.name, **msgspec.to_builtins(verdict))
        if verdict.accepted:
            await self._promote(challenger, verdict)
            shutil.rmtree(challenger)
        else:
            await self._refuse(verdict)
            self._set_aside(challenger)

    def _set_aside(self, challenger: Path) -> None:
        self.refused.mkdir(exist_ok=True)
        shutil.rmtree(self.refused / challenger.name, ignore_errors=True)
        challenger.rename(self.refused / challenger.name)

    async def _call(self, command: Sequence[str], what: str, judged: Path | None = None) -> bytes | None:
        """Run a command to its end; return what it printed, or None when it failed, died or took too long.

        A fault names its file: where that is the `judged` one, it is set aside, as the next run would find it
        the same. A fault of the history or the champion leaves the challenger where it is.
        """
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        try:
            async with asyncio.timeout(self._timeout):
                out, err = await process.communicate()
        except TimeoutError:
            log.error(f"{what}_timed_out", seconds=self._timeout)
            return None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        said = err.decode("utf-8", "replace").strip()
        last_words = "\n".join(said.splitlines()[-5:])
        if process.returncode == 0:
            if said:
                log.info(f"{what}_said", last_words=last_words)
            return out
        if judged and process.returncode == os.EX_CONFIG and str(judged) in said:
            self._set_aside(judged)
            kept = str(self.refused / judged.name)
            log.error("challenger_unusable", name=judged.name, kept_in=kept, last_words=last_words)
        else:
            log.error(f"{what}_failed", exit_status=process.returncode, last_words=last_words)
        return None
