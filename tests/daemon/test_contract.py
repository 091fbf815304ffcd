"""The contract: it says what the code does, is valid AsyncAPI, and breaks no reader within a version."""

import copy
import json
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest

from barcast.backtest.cli import app
from barcast.daemon import contract, wire
from barcast.daemon.ports import Arrival, Revision
from barcast.models import Coverage
from tests.fakes import MINUTE, START, Winding, bar, opening, outgoing, settings

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "asyncapi.json"
ASYNCAPI = jsonschema.Draft7Validator(json.loads((ROOT / "tests" / "asyncapi" / "3.0.0.json").read_text()))
FROZEN = json.loads((ROOT / "tests" / "asyncapi" / f"fields-{wire.SCHEMA}.json").read_text())
DOCUMENT = contract.document("t")
SENT = {body.__name__ for body in contract.BODIES}
READ = (wire.Signal, wire.Target, wire.GroupDone, wire.Status)
"""What the client of this package reads."""


def faults(schema, payload):
    """What a payload has against it."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    return [e.message for e in jsonschema.Draft202012Validator(whole).iter_errors(payload)]


def channel_of(topic):
    """The channel of the contract whose address a topic has."""

    def fits(address):
        parts = address.split("/"), topic.split("/")
        return len(parts[0]) == len(parts[1]) and all(
            a == t or a.startswith("{") for a, t in zip(*parts, strict=True)
        )

    [name] = [name for name, channel in DOCUMENT["channels"].items() if fits(channel["address"])]
    return name


def real():
    """Messages as they go out: degraded, judged, with holes, a straggler, withheld, and all the others."""

    class Judged(Winding):
        def _one(self, w):
            share = np.array([[2 / 3, 0.5]])
            return msgspec.structs.replace(super()._one(w), coverage=Coverage((0.9,), share, (3, 2)))

    model = Judged(window=16, min_window=12)
    minutes = [m for m in range(1, 26) if m != 12]
    asked = msgspec.structs.replace(settings(), touch=((2.0, 1.0), (0.5, 1.0)))
    events = [Revision(START, asked.encode()), *opening(window=16)[1:]]
    for m in minutes:
        events.append(Arrival(START + m * MINUTE + 10**9, (bar("A", m),)))
        late = 30 if m == 20 else 2
        events.append(Arrival(START + m * MINUTE + late * 10**9, (bar("B", m),)))
    found = outgoing(events, spread=model)
    reject = wire.Reject("the payload is empty; send JSON or msgpack", b"\xff\x00")
    found.append(wire.dead_letter([reject], "t/bars/1m/A", START, "t/deadletter/me"))
    found.append(wire.model_notice("fhs", START, "numpy", {"accepted": False}, START, "t/models/me"))
    now = wire.to_text(START)
    ready = wire.Status(
        state="ready", instance="me", boot="b", time=now, interval=10.0, processed=now, waiting=3
    )
    found += [
        wire.status(body, "t/status/me")
        for body in (ready, wire.Status(state="lost", instance="me", boot="b"))
    ]
    answer = wire.AnswerMessage(verb="pause", instance="me", boot="b", done="paused")
    found.append(wire.Outgoing("", "t/answers/me/1", msgspec.json.encode(answer), False, START))
    return found


def test_shipped_document_is_what_the_code_says(capsys):
    """deploy/asyncapi.json is the output of `barcast contract`."""
    assert SHIPPED.read_text() == contract.text(), "run: barcast contract > deploy/asyncapi.json"
    app(["contract", "--root", "a/b"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["channels"]["groups"]["address"] == "a/b/groups/{timeframe}"
    assert printed["servers"]["broker"]["bindings"]["mqtt"]["lastWill"]["topic"] == "a/b/status/{instance}"


def test_document_is_valid_asyncapi():
    """The document keeps to the JSON schema of AsyncAPI 3.0.0."""
    assert [e.message for e in ASYNCAPI.iter_errors(json.loads(SHIPPED.read_text()))] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("operations", "sendSignals", "action"), "publish"),
        (("channels", "signals", "address"), 7),
        (("channels", "signals", "parameters"), ["symbol"]),
        (("operations", "sendSignals", "channel"), None),
        (("operations", "sendSignals", "bindings", "mqtt", "qos"), 3),
        (("servers", "broker", "host"), None),
        (("info", "version"), None),
        (("components", "schemas", "Signal", "properties"), "all"),
    ],
)
def test_planted_fault_is_found(path, value):
    """The control: a document that is wrong in one place is refused; None takes the place out."""
    document = copy.deepcopy(DOCUMENT)
    assert not list(ASYNCAPI.iter_errors(document))
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    assert list(ASYNCAPI.iter_errors(document))


def references(node):
    """Every $ref in a document."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def gaps(document):
    """What the schema of AsyncAPI lets pass: references to nothing, channels without address or use."""
    found = []
    for reference in references(document):
        place = document
        for key in reference.removeprefix("#/").split("/"):
            place = place.get(key, {})
        if not place:
            found.append(reference)
    used = {operation["channel"]["$ref"] for operation in document["operations"].values()}
    for name, channel in document["channels"].items():
        named = {part[1:-1] for part in channel.get("address", "").split("/") if part.startswith("{")}
        if (
            f"#/channels/{name}" not in used
            or "address" not in channel
            or named != set(channel["parameters"])
        ):
            found.append(name)
    return found


def test_nothing_is_missing_or_dangling():
    """Every reference leads somewhere; each channel has its address, its parameters and an operation."""
    assert gaps(DOCUMENT) == []


def test_planted_gap_is_found():
    """The control: a channel without address, parameter or operation, and a reference to nothing."""
    for path in (
        ("channels", "signals", "address"),
        ("channels", "signals", "parameters", "symbol"),
        ("operations", "sendSignals"),
        ("components", "messages", "Signal"),
        ("components", "schemas", "Horizon"),
    ):
        document = copy.deepcopy(DOCUMENT)
        place = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        assert gaps(document), path


def test_real_messages_keep_to_the_contract():
    """What is sent fits the payload of its channel, and is retained and expires as the contract says."""
    seen = set()
    for message in real():
        name = channel_of(message.topic)
        [payload] = DOCUMENT["channels"][name]["messages"]
        assert faults(payload, json.loads(message.payload)) == []
        mqtt = DOCUMENT["operations"][f"send{name[0].upper()}{name[1:]}"]["bindings"]["mqtt"]
        assert mqtt["retain"] is message.retain
        assert ("messageExpiryInterval" in mqtt) or message.expires is None
        seen.add(payload)
    assert seen == SENT
    bodies = [json.loads(m.payload) for m in real()]
    assert any("degraded" in b.get("flags", ()) for b in bodies)
    assert any("coverage" in b for b in bodies)
    assert any(len(b.get("touch", ())) == 2 and b["drawdown"] > 0 for b in bodies)
    assert any(b.get("straggler") for b in bodies)
    assert any(b.get("withheld") for b in bodies)


@pytest.mark.parametrize("kind", sorted(SENT))
def test_wrong_messages_do_not(kind):
    """The control: without any one of its fields, or with another type in it, a message does not fit."""
    [body, *_] = [
        json.loads(m.payload)
        for m in reversed(real())
        if list(DOCUMENT["channels"][channel_of(m.topic)]["messages"]) == [kind]
    ]
    assert faults(kind, body | {"new": 1}) == []
    for field in body:
        if field not in ("coverage", "touch", "drawdown", "refused", "done"):
            assert faults(kind, {k: v for k, v in body.items() if k != field}), field
        assert faults(kind, body | {field: [None]}), field


def test_examples_are_messages():
    """Every message but the packed ones has an example, which fits."""
    for name, message in DOCUMENT["components"]["messages"].items():
        assert ("examples" in message) is (message["contentType"] == "application/json")
        for example in message.get("examples", ()):
            assert faults(name, example["payload"]) == []
    assert faults("Bars", {"close_time": "2026-01-05T15:00:00Z"})
    nameless = DOCUMENT["components"]["messages"]["Bars"]["examples"][0]["payload"] | {"symbol": None}
    assert faults("NamedBars", nameless)
    assert faults("Bars", nameless) == []


def test_every_field_is_described():
    """No field of any message is left to guess."""
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, about in schema.get("properties", {}).items():
            assert about.get("description") or "$ref" in about, f"{name}.{field}"


def form(schema):
    """A schema without what is only for people."""
    if isinstance(schema, dict):
        return {k: form(v) for k, v in schema.items() if k not in ("description", "title", "default")}
    return [form(part) for part in schema] if isinstance(schema, list) else schema


def fields(schemas):
    """What a reader or a feed relies on: the fields of each message, their types, which are always there."""
    return {
        name: {"fields": form(schema["properties"]), "required": sorted(schema.get("required", ()))}
        for name, schema in schemas.items()
        if "properties" in schema
    }


def breaks(frozen, schemas):
    """Which frozen fields a contract no longer keeps."""
    found, now = [], fields(schemas)
    for name, before in frozen.items():
        if name not in now:
            found.append(f"{name} is gone")
            continue
        for field, kind in before["fields"].items():
            if now[name]["fields"].get(field) != kind:
                found.append(f"{name}.{field} was removed, renamed or given another type")
            elif (field in before["required"]) != (field in now[name]["required"]):
                found.append(f"{name}.{field}: whether it is always there has changed")
        if name not in SENT:
            added = set(now[name]["required"]) - set(before["required"]) - set(before["fields"])
            found += [f"{name}.{field} is new and required" for field in sorted(added)]
    return found


def test_version_keeps_its_fields():
    """Nothing that version 1 has is removed, renamed or retyped; what does so raises SCHEMA."""
    kept = breaks(FROZEN, DOCUMENT["components"]["schemas"])
    assert kept == [], "raise SCHEMA in daemon/wire.py, or keep the field"
    for body in READ:
        known = FROZEN[body.__name__]["fields"]
        needed = {f.name for f in msgspec.structs.fields(body) if f.required} - set(known)
        assert needed == set(), f"{body.__name__}: a field added within a version has a default"


@pytest.mark.parametrize("how", ["removed", "retyped", "optional", "needed", "gone"])
def test_broken_version_is_found(how):
    """The control: each kind of change that a reader or a feed would notice is found."""
    schemas = copy.deepcopy(DOCUMENT["components"]["schemas"])
    signal, given = schemas["Signal"], schemas["BarMessage"]
    if how == "removed":
        del signal["properties"]["rise"]
    elif how == "retyped":
        signal["properties"]["rise"]["items"] = {"type": "string"}
    elif how == "optional":
        signal["required"].remove("rise")
    elif how == "needed":
        given["properties"]["venue"] = {"type": "string"}
        given["required"].append("venue")
    else:
        del schemas["Target"]
    assert len(breaks(FROZEN, schemas)) == 1


def test_added_field_breaks_nothing():
    """The control of the control: what may be added is not found."""
    schemas = copy.deepcopy(DOCUMENT["components"]["schemas"])
    schemas["Signal"]["properties"]["skew"] = {"type": "number"}
    schemas["BarMessage"]["properties"]["venue"] = {"type": "string"}
    assert breaks(FROZEN, schemas) == []
