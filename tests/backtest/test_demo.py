"""The demonstration ends what it began."""

import asyncio
import contextlib
import os
import signal
import sys

import pytest
from rich.console import Console

from barcast.backtest.cli.quants import Shipped
from barcast.backtest.demo import SETTINGS, Demo
from barcast.backtest.sample import CHECKPOINTS, sample_checkpoint
from barcast.daemon import config
from barcast.models import ConfigError
from barcast.models.checkpoint import load


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """One whose processes only sleep, with a broker and a subscriber that are pretended; it gives both."""
    program = tmp_path / "sleeps"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    made, children = Demo(tmp_path / "demo", "127.0.0.1:1", 60.0, Console(quiet=True)), []

    async def watch():
        made.watched.set()
        await asyncio.Event().wait()

    start = made._start

    async def started(*words):
        children.append(await start(*words))
        return children[-1]

    monkeypatch.setattr(made, "_prepare", lambda: made.folder.mkdir())
    monkeypatch.setattr(made, "_broker", contextlib.nullcontext)
    monkeypatch.setattr(made, "_watch", watch)
    monkeypatch.setattr(made, "_start", started)
    yield made, children
    for child in children:
        if child.returncode is None:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("ready", [False, True], ids=["starting", "at work"])
def test_signal_ends_the_processes(demo, monkeypatch, number, ready):
    """A daemon that was left behind would train for ever: also one that has just been started."""
    made, children = demo
    before, interrupt = signal.getsignal(number), signal.getsignal(signal.SIGINT)
    start = made._start

    async def signalled(name, *words):
        if ready:
            made.ready.set()
        child = await start(name, *words)
        if name == ("publisher" if ready else "daemon"):
            os.kill(os.getpid(), number)
        return child

    def unhandled(*_):
        raise AssertionError("the signal would have ended the demo at once")

    monkeypatch.setattr(made, "_start", signalled)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number != signal.SIGINT:
        signal.signal(number, unhandled)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a shell's job in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            made.run()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(number, before)
    assert [child.returncode for child in children] == [-signal.SIGTERM] * (1 + ready)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_challenger_that_is_planted_is_of_the_kind_that_serves(tmp_path, kind):
    """Each shipped model has a configuration that a start takes, and is the first to serve by it."""
    made = Demo(tmp_path / "demo", "127.0.0.1:1", 60.0, Console(quiet=True), kind)
    made._prepare()
    found = config.load(tmp_path / "demo" / "barcast.toml")
    assert found.model.first == str(sample_checkpoint(kind))
    assert {found.model.sampler, found.model.steps} - {None} == {*SETTINGS[kind].sampling.values()}
    champion, planted = (load(path) for path in (made.model, made.state / "challengers" / "planted"))
    assert type(planted.trained) is type(champion.trained)
    assert planted.model != champion.model


def test_model_that_is_not_shipped_is_said(run):
    """With the names of those that are, before anything is written."""
    status, _, err = run("demo", "--model", "gpt")
    assert status == 2
    assert all(name in err for name in ("gpt", *CHECKPOINTS))
    assert list(map(str, Shipped)) == list(CHECKPOINTS) == list(SETTINGS)
    with pytest.raises(ConfigError, match="no model 'gpt' is shipped: name one of sssd, ldm4ts"):
        sample_checkpoint("gpt")
