"""Orders to a running daemon: short, answered in lines, and from nobody but its own user."""

import asyncio
import os
import socket
import stat
import time

import pytest
from structlog.testing import capture_logs

from barcast.daemon import control, worker
from barcast.daemon.control import Order, ask, serve
from barcast.models import ConfigError


def ordered(folder, orders, carry_out):
    """Give orders from a thread of their own to a daemon that serves; return what came of each."""

    async def take(order, who, tell):
        assert who == f"uid {os.getuid()}"  # as the kernel says
        return await control.answered(order, carry_out(order, tell))

    async def main():
        serving = asyncio.create_task(serve(folder, take))
        await asyncio.sleep(0.05)  # it binds at once
        try:
            return [await asyncio.to_thread(order) for order in orders]
        finally:
            serving.cancel()
            await asyncio.wait([serving])

    return asyncio.run(main(), debug=True)


async def echo(order, tell):
    """Tell two lines, then say what was ordered."""
    tell("one")
    await asyncio.sleep(0.01)
    tell("two")
    return f"{order.verb} {order.to}"


def test_order_is_carried_out_and_told(tmp_path):
    """Lines come on the way, the result at the end; the socket is its user's, as long as the daemon runs."""
    lines, modes = [], []

    def first():
        modes.append(stat.S_IMODE((tmp_path / "control").stat().st_mode))
        return ask(tmp_path, Order("rollback", to="fhs"), lines.append)

    assert ordered(tmp_path, [first], echo) == ["rollback fhs"]
    assert lines == ["one", "two"]
    assert modes == [0o600]
    assert not (tmp_path / "control").exists()


def test_directory_with_a_long_path_is_reached(tmp_path):
    """A socket's address holds 107 bytes: the directory's path may be longer."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    assert ordered(deep, [lambda: ask(deep, Order("state"), print)], echo) == ["state None"]


def test_refusal_is_a_fault_of_the_order(tmp_path):
    """What cannot be done comes back as the sentence that says why."""

    async def refuses(order, tell):
        raise ConfigError("nothing to roll back to")

    def order():
        with pytest.raises(ConfigError, match="nothing to roll back to"):
            ask(tmp_path, Order("rollback"), print)

    ordered(tmp_path, [order], refuses)


def test_fault_that_nobody_foresaw_is_an_answer(tmp_path):
    """Whoever orders learns what went wrong; the log has the traceback, and the daemon goes on."""

    async def breaks(order, tell):
        if order.verb == "state":
            return "here"
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def order():
        with pytest.raises(
            ConfigError, match=r"^rollback failed: RuntimeError: mat1 .*; the daemon's log has"
        ):
            ask(tmp_path, Order("rollback"), print)

    with capture_logs() as logs:
        found = ordered(tmp_path, [order, lambda: ask(tmp_path, Order("state"), print)], breaks)
    assert found[1] == "here"
    assert ("order_failed", True) in [(line["event"], line.get("exc_info")) for line in logs]


def unread(folder, connections):
    """Order something and read nothing of it."""
    connections.append(socket.socket(socket.AF_UNIX))
    connections[0].connect(str(folder / "control"))
    connections[0].sendall(b'{"verb": "rollback"}\n')
    time.sleep(0.3)


@pytest.mark.parametrize("last", [False, True], ids=["under way", "done"])
def test_who_does_not_read_does_not_hold_up_the_end(tmp_path, last):
    """A stop does not wait for what a client has not read."""
    connections = []

    async def talks(order, tell):
        for _ in range(3000):
            tell("x" * 100)
        if not last:
            await asyncio.Event().wait()
        return "done"

    ordered(tmp_path, [lambda: unread(tmp_path, connections)], talks)
    connections[0].close()


def test_who_does_not_read_for_long_is_let_go(tmp_path):
    """The lines for one client take so much memory, and no more."""
    connections, said = [], []

    async def talks(order, tell):
        for _ in range(5 * control.UNREAD_BYTES // 1000):
            tell("x" * 1000)
        await asyncio.sleep(0)
        return "done"

    def then_reads():
        unread(tmp_path, connections)
        with connections[0] as s:
            said.append(b"".join(iter(lambda: s.recv(1 << 20), b"")))

    ordered(tmp_path, [then_reads], talks)
    assert len(said[0]) < control.UNREAD_BYTES + 300_000
    assert b"done" not in said[0]


def test_nobody_there_is_told_apart(tmp_path):
    """Without a daemon there is no answer, also where one that was killed left its socket behind."""
    assert ask(tmp_path, Order("state"), print) is None
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control"))
    assert ask(tmp_path, Order("state"), print) is None
    assert ordered(tmp_path, [lambda: ask(tmp_path, Order("state"), print)], echo) == ["state None"]


def raw(folder, payload):
    """What is answered to bytes."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(str(folder / "control"))
        s.sendall(payload)
        return s.makefile("rb").readline()


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"{}\n", b"refused"),
        (b"state\n", b"send one line such as"),
        (b'{"verb": "dance"}\n', b"none of state, retrain, stop, reload, pause, resume, rollback"),
        (b'{"verb": "state", "now": 1}\n', b"unknown field"),
        (b"x" * (worker.LINE_BYTES + 2), b"refused"),
        (b'{"verb": "state", "to": "fhs"}\n', b"`to` goes with the verb rollback, not state"),
        (b'{"verb": "rollback", "wait": true}\n', b"`wait` goes with the verbs retrain and reload"),
        (
            b'{"verb": "pause", "reason": "' + b"x" * 501 + b'"}\n',
            b"`reason` has 501 characters, more than 500",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path, payload, said):
    """What is no order is answered with one that would be, and the daemon goes on."""
    found = ordered(
        tmp_path, [lambda: raw(tmp_path, payload), lambda: ask(tmp_path, Order("state"), print)], echo
    )
    assert said in found[0]
    assert found[1] == "state None"


def test_silence_is_not_waited_for(tmp_path, monkeypatch):
    """Whoever connects and says nothing is sent away."""
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 0.1)
    assert b"refused" in ordered(tmp_path, [lambda: raw(tmp_path, b"")], echo)[0]


def test_who_leaves_does_not_stop_what_was_ordered(tmp_path):
    """An order is carried out to its end, whether or not somebody waits for it."""
    done = []

    async def slow(order, tell):
        await asyncio.sleep(0.2)
        tell("nobody hears it")
        done.append(order.verb)
        return "done"

    def leaves():
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(tmp_path / "control"))
            s.sendall(b'{"verb": "rollback"}\n')

    ordered(tmp_path, [leaves, lambda: time.sleep(0.4)], slow)
    assert done == ["rollback"]


def test_socket_of_a_successor_stays(tmp_path):
    """Where a state directory is shared, the one that is put out ends after the other has begun."""

    async def done(_order, _who, _tell):
        return control.Answer(done="ok")

    async def story():
        tasks = []
        for count in (1, 2):
            before = (tmp_path / control.NAME).stat().st_ino if count == 2 else None
            tasks.append(asyncio.create_task(serve(tmp_path, done)))
            while not (tmp_path / control.NAME).exists() or (tmp_path / control.NAME).stat().st_ino == before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        said = await asyncio.to_thread(ask, tmp_path, Order("state"), print)
        tasks[1].cancel()
        await asyncio.wait(tasks[1:])
        return said

    assert asyncio.run(story()) == "ok"
    assert not (tmp_path / control.NAME).exists()
