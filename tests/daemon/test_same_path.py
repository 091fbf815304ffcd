"""Live and replay are the same path: a busy event loop and late timers change no byte."""

import asyncio

import pytest

from barcast.backtest import replay as replaying
from barcast.backtest.replay import ReplaySource, drive
from barcast.daemon import pipeline
from tests.checks import busy_loop_says_what_its_replay_says


@pytest.mark.parametrize("seed", range(25))
def test_busy_loop_says_what_its_replay_says(seed):
    """However late the loop gets to an arrival or a timer, the replay of what it received is the same."""
    busy_loop_says_what_its_replay_says([seed])


def test_replay_refuses_to_wait():
    """A replay that would wait for the outside is a fault, not a hang."""

    async def waits():
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waited"):
        drive(waits())


def test_replay_uses_the_live_loop():
    """There is one loop: the replay imports it, and has none of its own."""
    assert replaying.run is pipeline.run
    assert isinstance(ReplaySource([]), ReplaySource)
