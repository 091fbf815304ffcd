"""The worker runs what is asked of it as long as somebody wants to know, and nothing else."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from structlog.testing import capture_logs

from barcast.daemon import worker

SPEAKS = (
    "import sys\nprint(*sys.argv[1:])\nfor n in range(3): print('line', n, file=sys.stderr, flush=True)\n"
)


class Worker:
    """A worker of one connection in a thread, with two verbs that run given programs."""

    def __init__(self, folder, train=SPEAKS, gate=SPEAKS):
        self.path, self.logs = folder / "socket", []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        commands = {"train": [sys.executable, "-c", train], "gate": [sys.executable, "-c", gate]}

        def serve():
            with listener, capture_logs() as self.logs:
                worker.work(listener, commands)

        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def call(self, verb, *arguments):
        """What the client gets: the lines and the result."""
        lines = []
        result = asyncio.run(worker.call(self.path, verb, arguments, lines.append), debug=True)
        return lines, result

    def ended(self):
        """Wait for the worker's end; the events that it logged."""
        self.thread.join(10)
        assert not self.thread.is_alive()
        return [entry["event"] for entry in self.logs]


def gone(note):
    """Whether the process whose number was noted ends soon."""
    pid = int(note.read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def hangs(note):
    """A program that notes its number and that of a grandchild, and hangs."""
    return (
        "import os, pathlib, subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(note)!r}).with_suffix('.inner').write_text(str(inner.pid))\n"
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
        "print('started', file=sys.stderr, flush=True)\ntime.sleep(60)"
    )


def test_lines_and_result_come_back(tmp_path):
    """The child's words come one by one, then its exit status and what it printed."""
    served = Worker(tmp_path)
    lines, result = served.call("gate", "--champion", "fhs")
    assert lines == ["line 0", "line 1", "line 2"]
    assert result == (0, b"--champion fhs\n")
    assert served.ended() == ["asked", "said", "said", "said", "ended"]


def test_line_without_an_end_is_cut(tmp_path):
    """However long a child's line is, it is handed on as far as one of a training in the daemon's service."""
    program = "import sys; sys.stderr.write('x' * 3_000_000 + '\\nend')"
    served = Worker(tmp_path, train=program)
    lines, result = served.call("train")
    assert [len(line) for line in lines] == [worker.LINE_KEPT, 3]
    assert result == (0, b"")
    served.ended()


def test_lines_come_while_the_child_works(tmp_path):
    """A line is there before the child ends: nothing waits for the end."""
    go = tmp_path / "go"
    waits = (
        "import pathlib, sys, time\nprint('first', file=sys.stderr, flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(.01)\n"
    )
    served = Worker(tmp_path, train=waits)
    lines = []

    def heard(line):
        lines.append(line)
        go.touch()

    assert asyncio.run(worker.call(served.path, "train", [], heard)) == (0, b"")
    assert lines == ["first"]
    served.ended()


@pytest.mark.parametrize(
    ("program", "status"),
    [("raise SystemExit(78)", 78), ("import os; os.kill(os.getpid(), 9)", -9)],
    ids=["exits", "killed"],
)
def test_child_that_fails_says_how(tmp_path, program, status):
    """The exit status of a child that fails, or the signal that killed it, is the result."""
    served = Worker(tmp_path, train=program)
    assert served.call("train")[1] == (status, b"")
    served.ended()


def test_child_dies_with_the_connection(tmp_path):
    """When the client is cancelled, the child and what it started are killed."""
    note = tmp_path / "pid"
    served = Worker(tmp_path, train=hangs(note))

    async def leave():
        started = asyncio.Event()
        task = asyncio.create_task(worker.call(served.path, "train", [], lambda _line: started.set()))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(leave(), debug=True)
    assert served.ended() == ["asked", "said", "ended", "abandoned"]
    assert gone(note)
    assert gone(note.with_suffix(".inner"))


def answer(path, request):
    """What a worker answers to bytes."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path))
        s.sendall(request)
        return b"".join(iter(lambda: s.recv(4096), b""))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"train\n", "JSON is malformed"),
        (b"[1]\n", "Expected `object`, got `array`"),
        (b'{"verb": "train"}\n', "missing required field `arguments`"),
        (b'{"verb": "train", "arguments": [1]}\n', "Expected `str`, got `int`"),
        (b'{"verb": "train", "arguments": [], "shell": true}\n', "unknown field `shell`"),
        (b'{"verb": "rm", "arguments": ["-r"]}\n', "verb 'rm' is none of train, gate"),
        (b"x" * (worker.LINE_BYTES + 2), "no line within 10 s and 1048576 bytes"),
    ],
    ids=["word", "list", "half", "number", "more", "verb", "endless"],
)
def test_bad_request_is_refused(tmp_path, request_, said):
    """What is no request runs nothing and is answered by one line that says what to send."""
    served = Worker(tmp_path, train="raise SystemExit(3)")
    lines = answer(served.path, request_).splitlines()
    [line] = lines
    refusal = json.loads(line)["refused"]
    assert said in refusal
    assert 'send one line such as {"verb": "train", "arguments": []}' in refusal
    assert served.ended() == ["refused"]


def test_other_user_is_refused(tmp_path, monkeypatch):
    """Whoever is neither this user nor root is told so, whatever they ask for."""
    monkeypatch.setattr(
        worker, "_CREDENTIALS", type("Peer", (), {"size": 12, "unpack": lambda _: (1, 12345, 1)})
    )
    served = Worker(tmp_path)
    with pytest.raises(PermissionError, match="user 12345 may not ask for anything here; ask as"):
        served.call("train")
    assert served.ended() == ["refused"]


def test_client_that_says_nothing_is_let_go(tmp_path):
    """A connection that closes without a word ends the worker."""
    served = Worker(tmp_path)
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(served.path))
    assert served.ended() == ["abandoned"]


def test_worker_that_is_away_is_an_error(tmp_path):
    """Without a worker the call fails, and says where none is."""
    with pytest.raises(ConnectionError, match=r"no worker listens there .*correct the key `socket`"):
        asyncio.run(worker.call(tmp_path / "socket", "train", [], print))


def test_worker_that_dies_is_an_error(tmp_path):
    """A worker that ends before its child is no result."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def dies():
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)

        thread = threading.Thread(target=dies)
        thread.start()
        with pytest.raises(ConnectionError, match="the worker ended before its child"):
            asyncio.run(worker.call(tmp_path / "socket", "train", [], print))
        thread.join()


def test_command_serves_the_socket_that_it_is_given(tmp_path):
    """`barcast worker` takes the listening socket as its standard input, as systemd hands it over."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "desk"\nstate_dir = "state"\ntimeframe = "1m"\n')
    path, lines = tmp_path / "socket", []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "barcast.backtest.cli", "worker", str(config)]
        with subprocess.Popen(command, stdin=listener, stderr=subprocess.PIPE) as served:
            result = asyncio.run(worker.call(path, "gate", ["nowhere", "--champion", "fhs"], lines.append))
            said = served.stderr.read().decode()
    assert served.returncode == 0, said
    assert result == (78, b"")
    assert any("error: " in line for line in lines)
    assert '"event": "asked"' in said


def test_command_without_a_socket_says_who_starts_it(tmp_path, run, monkeypatch):
    """Started by hand it ends in one sentence."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "desk"\nstate_dir = "state"\ntimeframe = "1m"\n')
    with (tmp_path / "empty").open("w+") as file:
        monkeypatch.setattr("sys.stdin", file)
        status, _, said = run("worker", str(config))
    assert status == 78
    assert said == (
        "error: standard input is no listening socket; let systemd start barcast-retrain@.socket\n"
    )
