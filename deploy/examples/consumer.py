"""A reader to begin with: print what may be acted on, and when to stop. See barcast.daemon.client."""

import argparse
import asyncio
import ssl
from pathlib import Path

from barcast.daemon import log
from barcast.daemon.client import Client


async def main(given: argparse.Namespace) -> None:
    """Print the groups of an instance until interrupted."""
    log.configure("warning")
    async with Client(
        given.host,
        given.port,
        instance=given.instance,
        root=given.root,
        username=given.user,
        password=given.password_file.read_text().strip() if given.password_file else None,
        tls=ssl.create_default_context(cafile=given.ca) if given.ca else None,
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
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("instance", help="its name, as in its configuration")
    options.add_argument("--host", default="127.0.0.1", help="the broker")
    options.add_argument("--port", type=int, default=1883, help="8883 with --ca, as a rule")
    options.add_argument("--root", default="barcast/v1", help="root topic")
    options.add_argument("--user")
    options.add_argument("--password-file", type=Path)
    options.add_argument("--ca", help="turns TLS on: the broker's authority")
    asyncio.run(main(options.parse_args()))
