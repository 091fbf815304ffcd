"""Schedules over the cores, or one of them to look at."""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

MEMORY = Path("/dev/shm")
"""Where journals lie: an fsync costs nothing there."""
PORTION = 50
"""Schedules that a process plays before it says so."""
SAY_SECONDS = 30.0


@dataclass
class Summary:
    """What became of schedules: how many there were, of how many events, what happened how often."""

    schedules: int = 0
    events: int = 0
    callbacks: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    violations: dict[int, list[str]] = field(default_factory=dict)

    def add(self, other: "Summary") -> None:
        """Put two together."""
        self.schedules += other.schedules
        self.events += other.events
        self.callbacks += other.callbacks
        self.happened.update(other.happened)
        self.violations |= other.violations


def portion(first: int, count: int) -> Summary:
    """Play so many schedules."""
    from tests.simulation.world import play, prepared

    summary = Summary()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, prepared():
        for seed in range(first, first + count):
            outcome = play(seed, Path(folder))
            violations = {seed: outcome.violations} if outcome.violations else {}
            summary.add(Summary(1, outcome.events, outcome.steps, outcome.happened, violations))
    return summary


def show(seed: int) -> int:
    """Play one schedule and print it."""
    from tests.simulation.world import play, prepared

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, prepared():
        outcome = play(seed, Path(folder))
    print("\n".join(outcome.history))
    print(f"seed {seed}: trace {outcome.trace}, {outcome.steps} callbacks")
    print("\n".join(outcome.violations) or "every promise was kept")
    return bool(outcome.violations)


def soak(first: int, count: int, to: Path = Path("soak.json")) -> int:
    """Play many schedules over the cores; write what became of them to a file."""
    began = told = time.monotonic()
    total = Summary()
    begins = iter(range(first, first + count, PORTION))
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:

        def more(some: int) -> set[object]:
            return {
                pool.submit(portion, begin, min(PORTION, first + count - begin))
                for begin in islice(begins, some)
            }

        waiting = more(2 * cores)
        while waiting:
            done = next(as_completed(waiting))  # type: ignore[arg-type, var-annotated]
            waiting.discard(done)
            waiting |= more(1)
            part: Summary = done.result()
            total.add(part)
            for seed, violations in part.violations.items():
                print(f"seed {seed}: {violations[0][:500]}")
                print(f"  again: {sys.executable} -m tests.simulation {seed}", flush=True)
            if time.monotonic() - told > SAY_SECONDS:
                told = time.monotonic()
                print(f"{total.schedules} of {count} schedules, {len(total.violations)} violated", flush=True)
    seconds = time.monotonic() - began
    body = {
        "first": first,
        "schedules": total.schedules,
        "events": total.events,
        "callbacks": total.callbacks,
        "seconds": round(seconds, 1),
        "cores": cores,
        "happened": dict(sorted(total.happened.items())),
        "never": sorted(kind for kind, times in total.happened.items() if not times),
        "violations": dict(sorted(total.violations.items())),
    }
    to.write_text(json.dumps(body, indent=1) + "\n")
    for kind, times in sorted(total.happened.items()):
        print(f"{times:10d} {kind}")
    print(
        f"{total.schedules} schedules of {total.events} events in {seconds:.0f} s on {cores} cores: "
        f"{len(total.violations)} violated a promise"
    )
    return bool(total.violations)
