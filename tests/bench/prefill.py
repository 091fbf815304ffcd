"""Many forecasts at once: `barcast prefill` on all cores, each window in the tile of the live service.

The bars are a seeded walk of one-minute bars. Each run is the command line in a process of its own, as a
quant calls it; its CPU time is that of all its workers. `python -m tests.bench.prefill FORECASTS` measures
so many with each sampler: a million are those of 20 symbols in five weeks.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.report import Row, Section, host, sentence
from tests.bench.rig import NOW, minutes, run, walk, write_history
from tests.bench.scale import learnt

SYMBOLS = 20
FORECASTS = 20_000
SAMPLED = (("none", None), ("angle", 2), ("dpmpp", None))
"""Samplers and steps, None: their own; `none` is the map alone."""


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
        section.rows.append(Row(what, _made([*words, "--cache", str(folder / f"cache-{sampler}")])))
    return section


def _made(words: list[str]) -> dict[str, Any]:
    ran = run(*words)
    made = int(ran.said[-1].split()[0].replace(",", ""))
    size = sum(path.stat().st_size for path in Path(words[-1]).rglob("*.parquet"))
    cost = 1e3 * ran.cpu_seconds / made
    return {"forecasts": made, "seconds": ran.seconds, "cpu_ms": cost, "cache_mb": size / 1e6}


def main() -> None:
    """Measure so many and say what was found."""
    print(sentence(host()))
    with tempfile.TemporaryDirectory(prefix="barcast-bench-") as folder:
        section = _section(print, Path(folder), int(sys.argv[1]))
    print(json.dumps(section.plain(), indent=1))


if __name__ == "__main__":
    main()
