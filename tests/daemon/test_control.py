"""Orders to a running daemon: short, answered in lines, and from nobody but its own user."""

import asyncio
import socket
import stat

import pytest

from barcast.daemon import control
from barcast.daemon.control import Order, ask, serve
from barcast.models import ConfigError


def ordered(folder, orders, carry_out):
    """Give orders from a thread of their own to a daemon that serves; return what came of each."""

    async def main():
        serving = asyncio.create_task(serve(folder, ("state", "rollback"), carry_out))
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
        (b'{"verb": "stop"}\n', b"none of state, rollback"),
        (b'{"verb": "state", "now": 1}\n', b"unknown field"),
        (b"x" * 200_000 + b"\n", b"refused"),
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
    monkeypatch.setattr(control, "ORDER_SECONDS", 0.1)
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

    ordered(tmp_path, [leaves, lambda: __import__("time").sleep(0.4)], slow)
    assert done == ["rollback"]
