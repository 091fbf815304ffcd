"""The contract with feeds and readers: an AsyncAPI 3.0 document, made from the types of the messages.

What it says of fields is written at the types in `wire`; topics, delivery and rules are written here. Its
examples are real messages.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from barcast.daemon import wire
from barcast.daemon.control import VERBS
from barcast.daemon.mqtt import SESSION_SECONDS
from barcast.daemon.ports import Group, Hole, Outcome, Term
from barcast.models import Bar, Card, Coverage, Forecast
from barcast.models.joint import Outlook, Touch

ROOT = "barcast/v1"
"""The root topic that a configuration has when it names no other."""

RULES = f"""\
Bars in, calibrated quantile forecasts out, over MQTT 5 with QoS 1. Operations are named from the daemon's
side.

Every message that the daemon sends carries `schema`, the version of this contract: {wire.SCHEMA}.

- A reader ignores fields that it does not know.
- Within a version fields may be added, and a reader must do without them.
- A field that is removed, renamed, or given another type or meaning raises the version.
- A reader refuses a message whose version is newer than the one it knows.

A message has a deterministic body: its `id` is the hash of topic and content. It is delivered at least once,
and counts once for each id; what differs from run to run travels as MQTT 5 user properties. A reader acts on
no signal or target past its `valid_until`, and on none that is not `tradable`.
"""

JSON, MSGPACK = "application/json", "application/msgpack"
PARAMETERS = {
    "timeframe": ("Length of a bar: {n}{s|m|h|d}, or session for the days of an exchange.", "1h"),
    "symbol": (f"Of the form {wire.SYMBOL.pattern}.", "BTCUSD"),
    "strategy": ("The name of a strategy in the configuration.", "drift"),
    "instance": ("The name of the daemon in its configuration.", "desk"),
    "verb": (f"One of {', '.join(VERBS)}.", "pause"),
    "order": ("What the sender of an order calls it.", "17a3f0"),
}
VALID = "It expires when the signal does, at valid_until."


@dataclass(frozen=True, slots=True)
class _Channel:
    """A topic under the root, who speaks there, and what is said.

    `expires` says when the broker discards a message; `headers`, whether it has user properties; `packed`,
    whether what is received may be in msgpack.
    """

    name: str
    topic: str
    what: str
    message: str
    action: Literal["send", "receive"]
    retain: bool = False
    expires: str = ""
    headers: bool = True
    packed: bool = True


CHANNELS = (
    _Channel(
        "bars", "bars/{timeframe}/{symbol}", "One bar of a symbol, or an array of them.", "Bars", "receive"
    ),
    _Channel("manyBars", "bars/{timeframe}", "Bars of many symbols at once.", "NamedBars", "receive"),
    _Channel("adjustments", "adjustments/{symbol}", "A split or a roll.", "AdjustmentMessage", "receive"),
    _Channel(
        "signals", "signals/{timeframe}/{symbol}", "The forecast of a symbol.", "Signal", "send", True, VALID
    ),
    _Channel(
        "targets",
        "targets/{strategy}/{timeframe}/{symbol}",
        "What a strategy wants to hold.",
        "Target",
        "send",
        True,
        VALID,
    ),
    _Channel(
        "groups", "groups/{timeframe}", "All signals of a close are sent.", "GroupDone", "send", False, VALID
    ),
    _Channel(
        "backfill", "backfill/{timeframe}/{symbol}", "Bars are missing.", "Backfill", "send", False, VALID
    ),
    _Channel("models", "models/{instance}", "Which model serves.", "ModelNotice", "send", True),
    _Channel(
        "status",
        "status/{instance}",
        "Whether bars are processed: a heartbeat, and a last will.",
        "Status",
        "send",
        True,
        "A ready one expires after three intervals.",
        headers=False,
    ),
    _Channel("deadletter", "deadletter/{instance}", "A message could not be used.", "DeadLetter", "send"),
    _Channel(
        "control",
        "control/{instance}/{verb}",
        "An order of an operator: with a response topic below answers/ and correlation data.",
        "OrderMessage",
        "receive",
        expires="An order that expired is not carried out.",
        packed=False,
    ),
    _Channel(
        "answers",
        "answers/{instance}/{order}",
        "What comes of an order, on its response topic, with its correlation data.",
        "AnswerMessage",
        "send",
        expires="After a minute.",
        headers=False,
    ),
)

BODIES = (
    wire.Signal,
    wire.Target,
    wire.GroupDone,
    wire.Backfill,
    wire.ModelNotice,
    wire.Status,
    wire.DeadLetter,
    wire.AnswerMessage,
)
"""The types of what the daemon sends."""


def text(root: str = ROOT) -> str:
    """The document as JSON, always in the same order."""
    return json.dumps(document(root), indent=2, ensure_ascii=False) + "\n"


def document(root: str = ROOT) -> dict[str, Any]:
    """The AsyncAPI document of an instance with a root topic."""
    lost = wire.Status(state="lost", instance="{instance}", boot="{boot}")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Barcast",
            "version": str(wire.SCHEMA),
            "description": RULES,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": JSON,
        "servers": {
            "broker": {
                "host": "{host}:{port}",
                "protocol": "mqtt",
                "protocolVersion": "5",
                "description": "The broker, and how the daemon connects to it.",
                "variables": {"host": {"default": "127.0.0.1"}, "port": {"default": "1883"}},
                "bindings": {
                    "mqtt": {
                        "clientId": "barcast-{instance}",
                        "cleanSession": False,
                        "sessionExpiryInterval": SESSION_SECONDS,
                        "lastWill": {
                            "topic": f"{root}/status/{{instance}}",
                            "qos": 1,
                            "retain": True,
                            "message": msgspec.json.encode(lost).decode(),
                        },
                        "bindingVersion": "0.2.0",
                    }
                },
            }
        },
        "channels": {channel.name: _channel(channel, root) for channel in CHANNELS},
        "operations": {
            f"{channel.action}{channel.name[0].upper()}{channel.name[1:]}": _operation(channel)
            for channel in CHANNELS
        },
        "components": {"messages": _messages(root), "schemas": _schemas(), "parameters": _parameters()},
    }


def _channel(channel: _Channel, root: str) -> dict[str, Any]:
    names = [segment[1:-1] for segment in channel.topic.split("/") if segment.startswith("{")]
    return {
        "address": f"{root}/{channel.topic}",
        "title": channel.what,
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _names(channel)},
    }


def _names(channel: _Channel) -> list[str]:
    """The messages of a channel: what a feed sends may also be packed."""
    packed = channel.action == "receive" and channel.packed
    return [channel.message, *([f"Packed{channel.message}"] if packed else [])]


def _operation(channel: _Channel) -> dict[str, Any]:
    mqtt: dict[str, Any] = {"qos": 1, "retain": channel.retain}
    if channel.expires:
        mqtt["messageExpiryInterval"] = {"type": "integer", "description": channel.expires}
    return {
        "action": channel.action,
        "channel": {"$ref": f"#/channels/{channel.name}"},
        "title": channel.what,
        "bindings": {"mqtt": mqtt | {"bindingVersion": "0.2.0"}},
        "messages": [{"$ref": f"#/channels/{channel.name}/messages/{name}"} for name in _names(channel)],
    }


def _messages(root: str) -> dict[str, Any]:
    examples, found = _examples(root), dict[str, Any]()
    for channel in CHANNELS:
        for name in _names(channel):
            packed = name != channel.message
            found[name] = {
                "title": channel.what + (" In msgpack." if packed else ""),
                "contentType": MSGPACK if packed else JSON,
                "payload": {"$ref": f"#/components/schemas/{channel.message}"},
            }
            if channel.action == "send" and channel.headers:
                found[name]["headers"] = {"$ref": "#/components/schemas/UserProperties"}
            if not packed:
                found[name]["examples"] = [{"payload": payload} for payload in examples[channel.message]]
    return found


def _schemas() -> dict[str, Any]:
    types = (wire.BarMessage, wire.AdjustmentMessage, wire.OrderMessage, *BODIES)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        schema["description"] = " ".join(schema["description"].split())
    for body in BODIES:
        if not body.__struct_config__.omit_defaults:  # then every field is always there
            schemas[body.__name__]["required"] = list(body.__struct_fields__)
        for field in schemas[body.__name__]["properties"].values():
            field.pop("default", None)
    bar = {"$ref": "#/components/schemas/BarMessage"}
    named = {"allOf": [bar, {"required": ["symbol"], "properties": {"symbol": {"type": "string"}}}]}
    schemas["Bars"] = {"anyOf": [bar, {"type": "array", "items": bar}]}
    schemas["NamedBars"] = {"anyOf": [named, {"type": "array", "items": named}]}
    schemas["UserProperties"] = {
        "description": "MQTT 5 user properties: what differs from one delivery of a message to another.",
        "type": "object",
        "properties": {
            "published_at": {
                "type": "string",
                "format": "date-time",
                "description": "When this delivery was made.",
            },
            "instance": {"type": "string", "description": "Who made it."},
            "boot": {"type": "string", "description": "Another one after each start of the instance."},
            "sequence": {
                "type": "string",
                "pattern": "^[0-9]+$",
                "description": "The number of the delivery since the start: of all topics, retries included.",
            },
        },
        "required": ["published_at", "instance", "boot", "sequence"],
    }
    return dict(sorted(schemas.items()))


def _parameters() -> dict[str, Any]:
    return {
        name: {"description": description, "examples": [example]}
        for name, (description, example) in PARAMETERS.items()
    }


def _examples(root: str) -> dict[str, list[Any]]:
    """Payloads of each kind of message, made by what makes the real ones."""
    hour = 3_600_000_000_000
    close = 1_767_625_200_000_000_000  # 2026-01-05T15:00:00Z
    card = Card("2c404eb755b950ed", "sssd", "1h", (1, 4), (0.05, 0.5, 0.95), 4201, 85, "none", 0, 0, "numpy")
    forecast = Forecast(
        symbol="BTCUSD",
        close_time=close,
        reference=100.5,
        horizons=card.horizons,
        levels=card.levels,
        quantiles=np.array([[-0.01, 0.0, 0.01], [-0.02, 0.0, 0.02]]),
        mean=np.array([0.0, 0.0]),
        std=np.array([0.006, 0.012]),
        rise=np.array([0.5, 0.5]),
        warming=False,
        coverage=Coverage((0.9,), np.array([[0.904, 0.896]]), (250, 250)),
    )
    outcome = Outcome(
        root=root,
        timeframe="1h",
        group=Group(close, close + hour // 1800, ("BTCUSD", "ETHUSD"), ("XRPUSD",), False, close - hour),
        card=card,
        forecasts={"BTCUSD": forecast},
        degraded={"BTCUSD": ("2 of the last 85 bars are missing",)},
        withheld={"ETHUSD": "40 of at least 85 bars"},
        holes={"BTCUSD": (Hole(close - 3 * hour, close, 2),)},
        targets={"drift": {"BTCUSD": 0.25}},
        terms=dict.fromkeys(
            ("BTCUSD", "ETHUSD"), Term((close + hour, close + 4 * hour), close + hour, close + 2 * hour)
        ),
        refused={
            "tilt": "strategy tilt, close 2026-01-05T15:00:00Z: its target of BTCUSD is nan, not a number "
            "from -1 to 1; none of its targets is taken"
        },
        outlooks={
            "BTCUSD": Outlook(((2.0, 1.0),), 0.012, Touch(np.array([0.045]), np.array([0.317])), 0.0101)
        },
    )
    signal, target, group, backfill = wire.messages(outcome)
    bars = [Bar("BTCUSD", close, 100.0, 101.0, 99.0, 100.5, 12.0)]
    bars.append(Bar("ETHUSD", close, 10.0, 10.5, 9.5, 10.25, 300.0, 41, 10.1))
    reject = wire.Reject(
        "high 99.0 is below low 101.0; correct it, or leave the bar out", b'{"close_time":"..."}'
    )
    letter = wire.dead_letter([reject], f"{root}/bars/1h/BTCUSD", close, f"{root}/deadletter/desk")
    notice = wire.model_notice(card.model, close, card.fingerprint, {}, close, f"{root}/models/desk")
    ready = wire.Status(
        state="ready",
        instance="desk",
        boot="5f0c2a91",
        time=wire.to_text(close + hour // 1200),
        interval=10.0,
        processed=wire.to_text(close),
        waiting=0,
    )
    lost = wire.Status(state="lost", instance="desk", boot="5f0c2a91")
    answer = wire.AnswerMessage(
        verb="pause", instance="desk", boot="5f0c2a91", done="paused: bars are taken, and nothing is forecast"
    )
    sent: dict[str, Sequence[bytes]] = {
        "Bars": [wire.encode_bars(bars[:1])],
        "NamedBars": [wire.encode_bars(bars)],
        "AdjustmentMessage": [b'{"time":"2026-01-05T00:00:00Z","factor":0.5,"kind":"split"}'],
        "Signal": [signal.payload],
        "Target": [target.payload],
        "GroupDone": [group.payload],
        "Backfill": [backfill.payload],
        "ModelNotice": [notice.payload],
        "Status": [msgspec.json.encode(ready), msgspec.json.encode(lost)],
        "DeadLetter": [letter.payload],
        "OrderMessage": [b'{"reason":"maintenance of the feed"}'],
        "AnswerMessage": [msgspec.json.encode(answer)],
    }
    return {name: [msgspec.json.decode(payload) for payload in payloads] for name, payloads in sent.items()}
