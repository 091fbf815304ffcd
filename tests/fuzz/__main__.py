"""`python -m tests.fuzz [TARGET...]`: feed the decoders what coverage finds, by atheris; see `targets`.

`FUZZ_MINUTES` of CPU time, 60 by default, are shared out; one process works at a time. What is found comes
to `.tools/fuzzed/found/`, and ends in exit status 1; what was learnt of the inputs is kept in
`.tools/fuzzed/corpus/` for the next time. The wall clock may be read here.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from rich.console import Console
from rich.table import Table

from tests.fuzz.targets import TARGETS, corpus, toml_words

ROOT = Path(__file__).parents[2]
HOME, KEPT = ROOT / ".tools" / "fuzz", ROOT / ".tools" / "fuzzed"
TIMEOUT_SECONDS, MEMORY_MB, LONGEST = 20, 4096, 70_000


def fuzz(name: str, minutes: float) -> tuple[dict[str, str], list[Path]]:
    """Fuzz a target; return figures, and files with inputs that failed."""
    found, own = KEPT / "found", KEPT / "corpus" / name
    found.mkdir(parents=True, exist_ok=True)
    own.mkdir(parents=True, exist_ok=True)
    known = set(found.iterdir())
    with tempfile.TemporaryDirectory() as place:
        words = Path(place) / "words"
        plain = (word for word in toml_words() if '"' not in word and "\\" not in word)
        words.write_text("".join(f'"{word}"\n' for word in plain))
        regressions = Path(place) / "once"
        regressions.mkdir()
        for path in corpus(name):
            (regressions / path.name).write_bytes(path.read_bytes())
        command = [str(HOME / "bin/python"), "-m", "tests.fuzz.one", name, str(60 * minutes), str(own)]
        command += [str(regressions), f"-artifact_prefix={found}/{name}-", f"-timeout={TIMEOUT_SECONDS}"]
        command += [f"-rss_limit_mb={MEMORY_MB}", f"-max_len={LONGEST}", "-print_final_stats=1"]
        command += [f"-dict={words}"] if name == "configuration" else []
        environment = os.environ | {"PYTHONPATH": f"{ROOT / '.dev'}:{ROOT}", "OMP_NUM_THREADS": "1"}
        before = getrusage(RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    after, said = getrusage(RUSAGE_CHILDREN), done.stderr.decode("utf-8", "replace")
    cpu = sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
    failed = sorted(set(found.iterdir()) - known)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said)
    runs = re.search(r"number_of_executed_units: *(\d+)", said) or re.search(r"Done (\d+) in", said)
    if failed or runs is None or not covered:
        (KEPT / f"{name}.log").write_text(said)
        failed = failed or [KEPT / f"{name}.log"]
    cov, features, inputs = covered[-1] if covered else ("?", "?", "?")
    figures = {"runs": runs[1] if runs else "?", "CPU min": f"{cpu / 60:.1f}", "places": cov}
    return figures | {"features": features, "inputs": inputs, "failed": str(len(failed))}, failed


def main() -> int:
    """Fuzz what is asked for, and say what came of it."""
    names = sys.argv[1:] or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        sys.exit(f"there is no target {unknown[0]}: name some of {', '.join(TARGETS)}")
    minutes = float(os.environ.get("FUZZ_MINUTES", "60"))
    whole = sum(TARGETS[name].share for name in names)
    console, table, failures = Console(width=100), Table(), []
    for name in names:
        console.print(f"{name}: {minutes * TARGETS[name].share / whole:.1f} minutes of CPU", highlight=False)
        figures, failed = fuzz(name, minutes * TARGETS[name].share / whole)
        failures += failed
        if not table.columns:
            table.add_column("target")
            for title in figures:
                table.add_column(title, justify="right")
        table.add_row(name, *figures.values())
    console.print(table)
    for path in failures:
        console.print(f"failed: {path}", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
