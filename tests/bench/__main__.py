"""`python -m tests.bench [SECTION ...]`: measure everything in one run, print it, write bench.json.

Without sections all are measured. Figures of different runs are not for comparing: each row has its ratio to
the reference of the same run.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.bench import (
    attention,
    cost,
    ingest,
    latency,
    memory,
    modes,
    oracle,
    prefill,
    replay,
    retraining,
    samplers,
    scale,
    scrape,
    seeds,
    sizing,
    streaming,
    verify,
)
from tests.bench.report import Section, machine, sentence
from tests.integration.broker import executable

SECTIONS: dict[str, Callable[[Callable[[str], None], Path], Section]] = {
    "replay": replay.measure,
    "ingest": ingest.measure,
    "latency": latency.measure,
    "memory": memory.measure,
    "scale": scale.measure,
    "scrape": scrape.measure,
    "retraining": retraining.measure,
    "cost": cost.measure,
    "seeds": seeds.measure,
    "modes": modes.measure,
    "ldm4ts": modes.forecasts,
    "samplers": samplers.measure,
    "oracle": oracle.measure,
    "verify": verify.measure,
    "prefill": prefill.measure,
    "streaming": streaming.measure,
    "attention": attention.measure,
}
RESULT = Path("bench.json")
WIDTH = 150
"""Columns where there is no terminal to ask."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--readme", action="store_true", help=f"print the README's table from {RESULT} only")
    given = parser.parse_args()
    out = Console()
    if not out.is_terminal:
        out = Console(width=WIDTH)
    if given.readme:
        out.print(sizing.markdown(json.loads(RESULT.read_text())), markup=False, soft_wrap=True)
        return
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if executable() is None:
        parser.error("mosquitto is missing: .ci/tools installs it, or `apt-get install mosquitto`")
    facts = machine()
    out.print(sentence(facts))
    began = time.monotonic()
    sections = {name: _measured(name, out) for name in SECTIONS if name in (given.sections or SECTIONS)}
    if "latency" in sections:
        sections["sizing"] = sizing.compute(sections)
    found = {"machine": facts, "sections": {name: section.plain() for name, section in sections.items()}}
    RESULT.write_text(json.dumps(found, indent=1))
    for section in sections.values():
        out.print(section.table())
    if "sizing" in sections:
        out.print(sizing.markdown(found), markup=False, soft_wrap=True)
    out.print(f"{time.monotonic() - began:.0f} s; every number is in {RESULT}")


def _measured(name: str, out: Console) -> Section:
    """Measure one section under a line that says how far it is."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="barcast-bench-") as folder,
        Progress(*columns, console=out, refresh_per_second=2) as progress,
    ):
        line = progress.add_task(name, total=1)
        section = SECTIONS[name](
            lambda step: progress.update(line, description=f"{name}: {step}"), Path(folder)
        )
        progress.update(line, description=name, completed=1)
    section.seconds = time.monotonic() - began
    return section


if __name__ == "__main__":
    main()
