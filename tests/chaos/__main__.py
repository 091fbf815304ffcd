"""`python -m tests.chaos`: break broker, network, disk, clock and daemon at once, then count what was kept.

The summary is printed at the end. Exit status 1 when a promise was broken; the folder with journals, logs and
the broker's store then stays.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.bench.report import machine, sentence
from tests.chaos.evidence import Evidence
from tests.chaos.stage import Stage
from tests.integration.broker import executable

SYMBOLS = 16
EVERY_SECONDS = 10.0
"""How often a line says how it goes where there is no terminal."""
WIDTH = 150
INSIDE = "--inside"


def main() -> None:
    """Run, print, and say by the exit status whether all was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults happen")
    parser.add_argument("--seed", type=int, default=1, help="of the faults and the feed")
    parser.add_argument(
        "--planted", choices=["hasty"], default="", help="a daemon that acknowledges before it has stored"
    )
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if executable() is None:
        parser.error("mosquitto is missing: .ci/tools installs it, or `apt-get install mosquitto`")
    if not given.inside:
        for mapped in ([], ["--map-root-user"]):
            enter = ["unshare", "--mount", *mapped, "--"]
            if (
                subprocess.run(
                    [*enter, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
                ).returncode
                == 0
            ):
                os.execvp(enter[0], [*enter, sys.executable, "-m", "tests.chaos", *sys.argv[1:], INSIDE])
    out = Console()
    if not out.is_terminal:
        out = Console(width=WIDTH)
    stage = Stage(
        Path(tempfile.mkdtemp(prefix="chaos-")),
        given.seed,
        given.minutes * 60,
        SYMBOLS,
        given.inside,
        given.planted,
    )
    evidence = asyncio.run(watched(out, stage))
    violations = evidence.violations()
    summary(out, evidence, stage)
    for violation in violations:
        out.print(f"VIOLATION: {violation}", markup=False, highlight=False, soft_wrap=True)
    if given.inside:
        subprocess.run(["umount", str(stage.state)], check=True)
    if violations:
        out.print(f"{len(violations)} promises were broken; what is left lies in {stage.folder}")
        sys.exit(1)
    shutil.rmtree(stage.folder)
    out.print("0 violations")


async def watched(out: Console, stage: Stage) -> Evidence:
    """Run, and say how it goes."""
    out.print(f"{sentence(machine())}; seed {stage.seed}, {stage.seconds:.0f} s of faults")
    if not stage.small_disk:
        out.print("no disk can be mounted here, so none is filled: it takes root, or namespaces of users")
    work = asyncio.create_task(stage.run())
    with told(out, stage.seconds) as tell:
        while not work.done():
            await asyncio.wait([work], timeout=0.5)
            tell(stage.progress())
    return await work


@contextmanager
def told(out: Console, seconds: float) -> Iterator[Callable[[str], None]]:
    """Say how it goes: a bar on a terminal, else a line every ten seconds."""
    began = time.monotonic()
    if not out.is_terminal:
        last = began

        def line(text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY_SECONDS:
                last = time.monotonic()
                out.print(f"{last - began:5.0f} s: {text}", highlight=False)

        yield line
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=seconds)
        yield lambda text: progress.update(task, completed=time.monotonic() - began, description=text)


def summary(out: Console, evidence: Evidence, stage: Stage) -> None:
    """What happened, and what became of bars and signals."""
    for title, rows in (
        ("faults", evidence.faults),
        ("packets", stage.proxy.done),
        ("what became of it", evidence.figures() | evidence.ends),
    ):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        out.print(table)


if __name__ == "__main__":
    main()
