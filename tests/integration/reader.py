"""A trading system in a process of its own: what its client hands out and says, as JSON lines.

Its clock is that of the instance whose configuration it is given.
"""

import asyncio
import json
import sys
from pathlib import Path

from barcast.daemon import log
from barcast.daemon.app import WallClock
from barcast.daemon.client import Client
from barcast.daemon.config import load
from barcast.daemon.wire import to_text


async def main(path: Path) -> None:
    """Write until terminated."""
    log.configure("warning")
    config = load(path)
    clock = WallClock(config).now

    def say(what: str, **more: object) -> None:
        print(json.dumps({"what": what, "at": to_text(clock()), **more}), flush=True)

    async with Client(
        config.mqtt.host,
        config.mqtt.port,
        instance=config.instance,
        name="reader",
        clock=clock,
        on_stale=lambda m: say("stale", id=m.id, kind=type(m).__name__),
        on_gap=lambda gap: say("gap", close_time=gap.close_time, symbols=gap.symbols),
        on_halt=lambda reason: say("halt", reason=reason),
        on_resume=lambda: say("resume"),
    ) as client:

        async def groups() -> None:
            async for group in client.groups():
                say("group", id=group.done.id, symbols=list(group.signals))

        async def signals() -> None:
            async for signal in client.signals():
                say("signal", id=signal.id, valid_until=signal.valid_until)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(groups())
            tasks.create_task(signals())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
