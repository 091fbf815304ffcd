"""The end of the daemon's process: soon after it is asked for, whatever threads still read."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, pathlib, sys, threading, time
from barcast.daemon import app, log, lookout, start
from barcast.daemon.config import load

def reads(*_):
    print("reading", flush=True)
    time.sleep(600)

async def looks(*_):
    await asyncio.to_thread(reads)

log.configure()
app.FAREWELL_SECONDS = 0.1
if sys.argv[2] == "starting":
    start.Following.recover = reads
else:
    lookout.Lookout.run = looks
app.serve(load(pathlib.Path(sys.argv[1])), {"compact": ["true"]})
"""


@pytest.mark.parametrize("state", ["starting", "serving"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_reading_does_not_hold_up_the_end(tmp_path, state, number):
    """Neither a long journal at a start nor a long history later is read to its end first."""
    config = tmp_path / "barcast.toml"
    config.write_text(
        'instance = "desk"\nstate_dir = "state"\ntimeframe = "1m"\n[mqtt]\nroot = "t"\nport = 1\n'
    )
    command = [sys.executable, "-c", PROGRAM, str(config), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "reading\n", process.stderr.read()
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert '"event": "stopped"' in said
