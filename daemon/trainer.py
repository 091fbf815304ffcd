"""The process of a training: heard line by line, and never outliving who started it."""

import asyncio
import ctypes
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from barcast.daemon.worker import call, lines

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
"""Variables that bound the threads of what a training uses; one, as its bits are those of one thread."""
_PR_SET_PDEATHSIG = 1


class Run(Protocol):
    """Runs a verb with arguments; returns the exit status, negative for a signal, and standard output.

    `on_line` gets each line of standard error as it comes. Cancelled, it kills what it runs.
    """

    def __call__(
        self, verb: str, arguments: Sequence[str], on_line: Callable[[str], None]
    ) -> Awaitable[tuple[int, bytes]]:
        """Run it to its end."""
        ...


def children(commands: Mapping[str, Sequence[str]], environment: Mapping[str, str]) -> Run:
    """Run verbs as processes of our own: `commands` holds the argument list that begins each."""
    bounded = {**environment, **dict.fromkeys(THREADS, "1")}

    async def run(verb: str, arguments: Sequence[str], on_line: Callable[[str], None]) -> tuple[int, bytes]:
        async def hear(stream: asyncio.StreamReader) -> None:
            async for line in lines(stream):
                on_line(line)

        child = await asyncio.create_subprocess_exec(
            *commands[verb], *arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=bounded
        )
        try:
            assert child.stdout is not None
            assert child.stderr is not None
            out, _ = await asyncio.gather(child.stdout.read(), hear(child.stderr))
            return await child.wait(), out
        finally:
            await _end(child)

    return run


def worker(socket: Path) -> Run:
    """Run verbs in another service, which listens on a socket, see `barcast.daemon.worker`."""

    async def run(verb: str, arguments: Sequence[str], on_line: Callable[[str], None]) -> tuple[int, bytes]:
        return await call(socket, verb, arguments, on_line)

    return run


async def _end(child: Process) -> None:
    if child.returncode is None:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def give_way(nice: int, parent: int | None) -> None:
    """Make this process the one that gives way: at low priority, the first that the kernel kills for memory.

    With a `parent` it is killed when that process ends, and ends at once if that is gone already.
    """
    with suppress(PermissionError):  # a sandbox may forbid it, and has limits of its own then
        os.nice(nice)
    with suppress(OSError):  # nor show this
        Path("/proc/self/oom_score_adj").write_text("1000")
    if parent is not None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            raise SystemExit(1)
