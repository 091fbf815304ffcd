"""Messages of an instance, made by hand, for tests of what is seen of it and how that is drawn."""

import msgspec

from barcast.daemon import wire
from barcast.daemon.watch import Moment, Seen

SECOND, HOUR = 10**9, 3600 * 10**9
CLOSE = 1_767_625_200 * SECOND  # 2026-01-05T15:00:00Z
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
HORIZONS = (1, 4)


def moment(seconds=12.0):
    """So long after the close, on both clocks."""
    return Moment(CLOSE + int(seconds * SECOND), seconds)


def signal(symbol="BTCUSD", close=CLOSE, group=3, **own):
    """A signal of an hourly model; each horizon has quantiles of its own."""
    shares = (-0.02, -0.015, -0.005, 0.001, 0.006, 0.016, 0.021)
    fields = {
        "schema": wire.SCHEMA,
        "id": f"{symbol}{close}",
        "symbol": symbol,
        "timeframe": "1h",
        "close_time": wire.to_text(close),
        "reference": 100.5,
        "horizons": [wire.Horizon(bars, wire.to_text(close + bars * HOUR)) for bars in HORIZONS],
        "levels": list(LEVELS),
        "quantiles": [[100.5 * (1 + bars**0.5 * share) for share in shares] for bars in HORIZONS],
        "mean": [0.0, 0.0],
        "std": [0.01, 0.02],
        "rise": [0.53, 0.57],
        "model": "2c404eb755b950ed",
        "sampler": "dpmpp",
        "steps": 8,
        "samples": 256,
        "valid_until": wire.to_text(close + 2 * HOUR),
        "tradable": True,
        "flags": [],
        "reasons": [],
        "group": wire.GroupOfSignal(wire.to_text(close), group, symbol),
        "coverage": wire.CoverageOfSignal({"0.9": [0.904, 0.871]}, [250, 247]),
    }
    return wire.Signal(**fields | own)


def target(symbol="BTCUSD", strategy="drift", close=CLOSE, **own):
    """A target of a strategy."""
    fields = {
        "schema": wire.SCHEMA,
        "id": f"{strategy}{symbol}{close}",
        "strategy": strategy,
        "symbol": symbol,
        "timeframe": "1h",
        "close_time": wire.to_text(close),
        "target": 0.25,
        "model": "2c404eb755b950ed",
        "valid_until": wire.to_text(close + 2 * HOUR),
        "tradable": True,
    }
    return wire.Target(**fields | own)


def done(close=CLOSE, symbols=("BTCUSD",), **own):
    """What is told of a complete group."""
    fields = {
        "schema": wire.SCHEMA,
        "id": f"group{close}{symbols}{own}",
        "timeframe": "1h",
        "close_time": wire.to_text(close),
        "previous": wire.to_text(close - HOUR),
        "straggler": False,
        "symbols": list(symbols),
        "withheld": {},
        "missing": [],
        "model": "2c404eb755b950ed",
        "valid_until": wire.to_text(close + 2 * HOUR),
        "tradable": True,
    }
    return wire.GroupDone(**fields | own)


def status(state="ready", boot="5f0c2a91", **own):
    """A status as the daemon says it, or of a last will."""
    fields = {"time": wire.to_text(CLOSE), "interval": 10.0, "processed": wire.to_text(CLOSE), "waiting": 7}
    known = {} if state == "lost" else fields
    return wire.Status(state=state, instance="desk", boot=boot, **known | own)


def notice(model="2c404eb755b950ed"):
    """Who serves."""
    return wire.ModelNotice(
        schema=wire.SCHEMA,
        id=model,
        model=model,
        activated=wire.to_text(CLOSE - HOUR),
        time=wire.to_text(CLOSE - HOUR),
        fingerprint="numpy",
        verdict={},
    )


def topic(body, root="barcast/v1"):
    """Where a message is published."""
    match body:
        case wire.Signal():
            return f"{root}/signals/{body.timeframe}/{body.symbol}"
        case wire.Target():
            return f"{root}/targets/{body.strategy}/{body.timeframe}/{body.symbol}"
        case wire.GroupDone():
            return f"{root}/groups/{body.timeframe}"
        case wire.Status():
            return f"{root}/status/{body.instance}"
    return f"{root}/models/desk"


def seen(*bodies, at=None, linked=True):
    """What is seen after these messages."""
    at = at or moment()
    found = Seen("barcast/v1", "desk", "1h", moment(0))
    found.link(linked, "connecting", moment(0))
    for body in bodies:
        found.take(topic(body), msgspec.json.encode(body), at)
    return found
