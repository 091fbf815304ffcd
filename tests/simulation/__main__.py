"""Play schedules over the cores, or one with all that happens in it.

python -m tests.simulation FIRST         # one: what happened, moment by moment
python -m tests.simulation FIRST COUNT   # so many from FIRST on: counts, violations; writes soak.json
"""

import os
import sys

from tests.simulation.soak import show, soak


def main() -> int:
    """Do what the arguments say."""
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # the processes are as many as the cores
    numbers = [int(argument) for argument in sys.argv[1:]]
    if len(numbers) == 1:
        return show(*numbers)
    if len(numbers) == 2:
        return soak(*numbers)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
