"""A reader to begin with: print what may be acted on, and when to stop. See barcast.daemon.client.

python consumer.py HOST PORT INSTANCE
"""

import asyncio
import sys

from barcast.daemon import log
from barcast.daemon.client import Client


async def main(host: str, port: str, instance: str) -> None:
    """Print the groups of an instance until interrupted."""
    log.configure("warning")
    async with Client(
        host,
        int(port),
        instance=instance,
        on_halt=lambda reason: print("halt:", reason, flush=True),  # here: go flat, or open nothing new
        on_resume=lambda: print("resume", flush=True),
        on_gap=lambda gap: print("gap:", gap, flush=True),
    ) as client:
        async for group in client.groups():
            for symbol, signal in group.signals.items():
                prices, end = signal.quantiles[0], signal.horizons[0].end_time
                span = f"{prices[0]:.6g} to {prices[-1]:.6g} by {end}"
                print(signal.close_time, symbol, span, *signal.flags, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
