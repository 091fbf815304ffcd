"""Many forecasts at once: `barcast prefill` on all cores, each window in the tile of the live service.

The bars are a seeded walk of one-minute bars. Each run is the command line in a process of its own, as a
quant calls it; its CPU time is that of all its workers. `python -m tests.bench.prefill FORECASTS` measures
so many with each sampler: a million are those of 20 symbols in five weeks.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.report import Row, Section, host, sentence
from tests.bench.rig import NOW, minutes, walk, write_history
from tests.bench.scale import learnt

SYMBOLS = 20
FORECASTS = 20_000
SAMPLED = (("none", None), ("angle", 2), ("dpmpp", None))
"""Samplers and steps, None: their own; `none` is the map alone."""
CHILD = """
import json, resource, sys, time
from joblib.externals.loky import get_reusable_executor
from barcast.backtest.cli import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
get_reusable_executor().shutdown(wait=True)
workers = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps(time.process_time() + workers.ru_utime + workers.ru_stime))
"""
"""The command line, and then the seconds of CPU that it and its workers took."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """What a forecast takes by each sampler."""
    return _section(tell, folder, FORECASTS)


def _section(tell: Callable[[str], None], folder: Path, forecasts: int) -> Section:
    section = Section(
        "prefill",
        f"Forecasts of {SYMBOLS} symbols, one-minute bars, calibrated, into a cache",
        {
            "forecasts": ("forecasts", ","),
            "seconds": ("s", ",.0f"),
            "cpu_ms": ("CPU ms each", ",.2f"),
            "cache_mb": ("MB", ",.0f"),
        },
    )
    model = learnt(folder / "learnt", tell)
    count = forecasts // SYMBOLS
    write_history(walk(SYMBOLS, count), minutes(NOW, count), folder / "bars")
    for sampler, steps in SAMPLED:
        what = "the map alone" if sampler == "none" else f"{sampler}, {steps or 'its own'} steps"
        tell(what)
        words = ["prefill", str(folder / "bars"), "--stamp", "close", "--model", str(model)]
        if sampler != "none":
            words += ["--sampler", sampler, *(["--steps", str(steps)] if steps else [])]
        section.rows.append(Row(what, _run([*words, "--cache", str(folder / f"cache-{sampler}")])))
    return section


def _run(words: list[str]) -> dict[str, Any]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"prefill failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    seconds = time.monotonic() - began
    *_, said, cpu = done.stdout.splitlines()
    made = int(said.split()[0].replace(",", ""))
    size = sum(path.stat().st_size for path in Path(words[-1]).rglob("*.parquet"))
    return {"forecasts": made, "seconds": seconds, "cpu_ms": 1e3 * float(cpu) / made, "cache_mb": size / 1e6}


def main() -> None:
    """Measure so many and say what was found."""
    print(sentence(host()))
    with tempfile.TemporaryDirectory(prefix="barcast-bench-") as folder:
        section = _section(print, Path(folder), int(sys.argv[1]))
    print(json.dumps(section.plain(), indent=1))


if __name__ == "__main__":
    main()
