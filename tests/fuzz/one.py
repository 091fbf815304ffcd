"""`python -m tests.fuzz.one TARGET SECONDS ARGUMENT...`: fuzz a target for so many seconds of CPU by atheris.

Runs in the environment that `make fuzz` makes. The arguments are those of libFuzzer. An input fails that
raises, takes longer than `-timeout`, or for which the process needs `MOST_MB` more than ever before.
"""

import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import atheris

MOST_MB = 300
"""What one input may add to the peak of the process: seeds take some 10."""
PURE = ["tomllib", "barcast"]
"""What is watched for coverage: what reads bytes in Python. The rest is compiled, or too much of it."""

warnings.simplefilter("ignore")
with atheris.instrument_imports(include=PURE):
    from tests.fuzz import targets

    for sound in targets.TARGETS[sys.argv[1]].seeds():  # what they load is watched; nobody's fault, too
        targets.TARGETS[sys.argv[1]].feed(sound)
if "torch._weights_only_unpickler" in sys.modules:
    atheris.instrument_func(sys.modules["torch._weights_only_unpickler"].Unpickler.load)


def peak() -> float:
    """Megabytes that this process needed at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(name: str, seconds: float, arguments: list[str]) -> None:
    """Feed the target until its time is over."""
    target = targets.TARGETS[name]
    count = 0

    def feed(data: bytes) -> None:
        nonlocal count
        count += 1
        before = peak()
        target.feed(data)
        if (grown := peak() - before) > MOST_MB:
            raise MemoryError(f"{grown:.0f} MB for an input of {len(data)} bytes")
        if count % 16 == 0 and time.process_time() > seconds:
            os.kill(os.getpid(), signal.SIGUSR1)  # libFuzzer ends, and says how far it came

    def change(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 0.5:
            changed: bytes = atheris.Mutate(data, most)
            return changed
        return target.change(data, dice)[:most]

    atheris.Setup([sys.argv[0], *arguments], feed, custom_mutator=change)
    atheris.Fuzz()


def seeds(name: str, folder: Path) -> None:
    """Write what a target is fed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.TARGETS[name].seeds()):
        (folder / f"seed-{number}").write_bytes(seed)


if __name__ == "__main__":
    what, limit, *rest = sys.argv[1:]
    seeds(what, Path(rest[0]))
    main(what, float(limit), rest)
