"""Models of numpy in a store, and the processes that train, judge and compact, on virtual time."""

import asyncio
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec

from barcast.daemon.gate import Verdict
from barcast.daemon.retention import compact
from barcast.daemon.store import ModelStore
from barcast.models import Forecaster
from tests.fakes import Spread

FATES = ("better", "better", "better", "worse", "dies", "stalls", "unusable")


def forecaster(model: str, timeframe: str, folder: Path | None = None) -> Spread:
    """The forecaster of a baseline, or of what is written in a folder."""
    made = json.loads((folder / "model.json").read_bytes()) if folder else {"window": 6}
    spread = Spread(model, made["window"], 2)
    spread.card = replace(spread.card, timeframe=timeframe)
    return spread


class Store(ModelStore):
    """A store whose models are files of a few bytes."""

    def open(self, model: str, sampler: str | None, steps: int | None, paths: bool = False) -> Forecaster:
        """The forecaster of a model."""
        folder = None if model in ("fhs", "hs") else self.directory / model
        return forecaster(model, self._timeframe, folder)

    def adopt(self, source: Path) -> str:
        """Copy a model into the store."""
        model = hashlib.sha256((source / "model.json").read_bytes()).hexdigest()[:16]
        if not self.hold(model):
            partial = self.directory / f".{model}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(self.directory / model)
        return model

    def known_until(self, model: str) -> int:
        """None of them tells."""
        return 0


def _write(folder: Path, made: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(made))


class Killed(Exception):  # noqa: N818 - what happens to a process
    """The process is killed."""


class Turns:
    """A function on a thread that runs only between two calls of `step`, up to its next `rest`."""

    def __init__(self, work: Callable[[Callable[[], None]], str]) -> None:
        self.done, self.said = False, ""
        self.error: Exception | None = None
        self._killed = False
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), name="compaction", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Let it work up to its next rest, or its end; one that has ended does nothing."""
        if self.done:
            return
        self._theirs.release()
        self._mine.acquire()
        if self.done:
            self._thread.join()

    def kill(self) -> None:
        """End it where it rests."""
        self._killed = True
        self.step()

    def _rest(self) -> None:
        self._mine.release()
        self._theirs.acquire()
        if self._killed:
            raise Killed

    def _run(self, work: Callable[[Callable[[], None]], str]) -> None:
        self._theirs.acquire()
        try:
            if not self._killed:
                self.said = work(self._rest)
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits for the process
            self.error = error
        finally:
            self.done = True
            self._mine.release()


class Children:
    """Runs the verbs of the daemon: `train`, `gate` and `compact`.

    `fates` are what becomes of trainings in this schedule; `compacts` says whether compactions do anything,
    `full` whether the disk is. The state is what happened and the compaction that is under way.
    """

    def __init__(
        self,
        dice: Random,
        folder: Callable[[], Path],
        now: Callable[[], int],
        keep: int,
        before: Callable[[], None],
        full: Callable[[], bool],
    ) -> None:
        self.fates: Sequence[str] = FATES
        self.happened: Counter[str] = Counter()
        self.compacts = True
        self._dice, self._folder, self._now, self._keep = dice, folder, now, keep
        self._before, self._full = before, full
        self._compaction: Turns | None = None

    async def __call__(
        self, verb: str, arguments: Sequence[str], on_line: Callable[[str], None]
    ) -> tuple[int, bytes]:
        """Run a verb to its end. One that this knows nothing of does nothing."""
        if verb == "train":
            return await self._train(Path(arguments[arguments.index("--out") + 1]), on_line)
        if verb == "gate":
            return await self._gate(Path(arguments[-1]), arguments[arguments.index("--champion") + 1])
        if verb == "compact" and self.compacts:
            return await self._compact()
        return 0, b""

    def kill(self) -> None:
        """End what is under way: children do not outlive the daemon."""
        if self._compaction is not None:
            self.happened["compaction killed"] += not self._compaction.done
            self._compaction.kill()
            self._compaction = None

    async def _train(self, out: Path, on_line: Callable[[str], None]) -> tuple[int, bytes]:
        fate = self._dice.choice(self.fates)
        self.happened[f"training: {fate}"] += 1
        for epoch in range(self._dice.randrange(1, 4)):
            await asyncio.sleep(self._dice.uniform(0.1, 3))
            on_line(f"epoch {epoch}")
        if fate == "dies":
            return self._dice.choice((1, -9, os.EX_CONFIG)), b""
        if fate == "stalls":
            await asyncio.sleep(3600)
        _write(out, {"window": self._dice.choice((4, 6, 9)), "fate": fate, "n": self._dice.randrange(10**9)})
        return 0, b""

    async def _gate(self, challenger: Path, champion: str) -> tuple[int, bytes]:
        await asyncio.sleep(self._dice.uniform(0.1, 3))
        body = (challenger / "model.json").read_bytes()
        made, model = json.loads(body), hashlib.sha256(body).hexdigest()[:16]
        if made["fate"] == "unusable":
            return os.EX_CONFIG, b""
        verdict = Verdict(
            accepted=made["fate"] == "better",
            reason=f"it is {made['fate']}",
            challenger=model,
            champion=champion,
        )
        return 0, msgspec.json.encode(verdict)

    async def _compact(self) -> tuple[int, bytes]:
        folder = self._folder()
        if self._full():
            return 74, b""
        self.happened["compaction"] += 1
        now, keep = self._now(), self._keep
        own = self._compaction = Turns(lambda rest: compact(folder, now, keep, (), rest).sentence())
        try:
            while not own.done:
                self._before()
                own.step()
                await asyncio.sleep(3 * self._dice.random() ** 2)
        finally:
            own.kill()
        if own.error is not None:
            raise own.error
        return 0, own.said.encode()
