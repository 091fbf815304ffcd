"""A short chaos: every kind of fault that is quick, in some seconds. `make chaos` takes its time."""

import subprocess
import sys

SECONDS = 10


def test_short_chaos_breaks_no_promise() -> None:
    """Broker, network, disk, clock and daemon break at once; every bar and signal is accounted for."""
    command = [sys.executable, "-m", "tests.chaos", "--minutes", str(SECONDS / 60), "--seed", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 violations" in run.stdout
