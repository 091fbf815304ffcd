"""The document of what is asked by HTTP: it has every address, and what is answered is what it says.

A new address is entered in deploy/openapi.json, and here only when it needs something to show.
"""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import msgspec
import pytest
import schemathesis
from hypothesis import settings
from referencing import Registry, Resource

from barcast.daemon.control import Answer
from barcast.daemon.http import page
from barcast.daemon.reckoning import reckon
from barcast.daemon.view import event
from tests.daemon.living import LEAST, at_work, daemon, deliver
from tests.daemon.test_reckoning import market
from tests.daemon.test_reckoning import told as told_of
from tests.daemon.test_view import parsed
from tests.fakes import MINUTE, START, bar
from tests.rim import SECOND, Message, play

DOCUMENT = Path(__file__).parents[2] / "deploy" / "openapi.json"
HERE, TOKEN = "http://localhost", "0123456789abcdef"
CASES = 25
"""Requests that are drawn for an address, at most, beside the examples."""
schema = schemathesis.openapi.from_path(
    DOCUMENT,
    config=schemathesis.Config.from_dict(
        {
            "base-url": HERE,
            "max-stream-events": 2,
            "generation": {"deterministic": True, "database": "none"},
            "checks": {
                "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503"]},
                # Which fields go together no schema says.
                "positive_data_acceptance": {"expected-statuses": ["2xx", "4xx"]},
            },
        }
    ),
)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a daemon had to show after 400 bars of EURUSD, and the events of a viewer of the last two."""
    text = LEAST.replace("[mqtt]", 'symbols = ["EURUSD"]\n[mqtt]') + "[http]\nport = 9\n"
    made = daemon(tmp_path_factory.mktemp("daemon"), text, START + 400 * MINUTE + SECOND)

    async def story():
        async with at_work(made):
            await deliver(made, Message.of(*(bar("EURUSD", minute) for minute in range(1, 400))))
            shown = made.shown()
            with shown.view.watched() as viewer:
                events = [await viewer.next()]
                await deliver(made, Message.of(bar("EURUSD", 400)))
                events.append(await viewer.next())
            events.append(event("beat", await shown.beat()))
            answers = shown.trust(), await made.metrics.text(), await made.metrics.ready()
            served = await shown.activations()
            return shown, events, shown.chart("EURUSD"), made.metrics.alive(), (served, *answers)

    return play(story())


@pytest.fixture(scope="module")
def app(told):
    """All addresses of that daemon."""
    shown, events, chart, alive, (activations, trust, metrics, ready) = told
    beat = events[-1].split(b"data: ")[1]

    def saying(what):
        async def said():
            return what

        return said

    async def report(name):
        return b"<p>" if name == "drift" else None

    async def order(given):
        return Answer(refused="nothing to stop") if given.verb == "stop" else Answer(done="done so")

    windows = market(symbols=1, count=300)
    held = replace(
        shown,
        chart={"EURUSD": chart}.get,
        activations=saying(activations),
        trust=lambda: trust,
        reckoning=saying(msgspec.json.encode(reckon(told_of(windows), windows, "1m"))),
        beat=saying(beat),
        backtests=saying(b"null"),
        report=report,
        order=order,
        token=TOKEN,
    )
    return page(saying(metrics), lambda: alive, saying(ready), held)


def test_document_is_valid_openapi():
    """By the schema of OpenAPI 3.1."""
    schema.validate()


def test_document_has_every_address(app):
    """What is served is in it, and nothing else."""
    served = {(route.path, method) for route in app._app.routes for method in route.methods - {"HEAD"}}
    assert served == {
        (path, method.upper())
        for path, item in json.loads(DOCUMENT.read_text())["paths"].items()
        for method in item.keys() - {"parameters"}
    }


@schema.parametrize()
@settings(max_examples=CASES)
def test_answers_are_as_documented(case, app):
    """Status, kind and content of every answer are in the document, whatever is asked; none is a fault."""
    case.operation.schema.app = app
    case.call_and_validate(app=app, headers={"Authorization": f"Bearer {TOKEN}"})


def test_events_are_as_documented(told):
    """What is in each kind of event, which a validator of the answer takes for mere text."""
    files = [DOCUMENT, DOCUMENT.with_name("asyncapi.json")]
    documents = [(path.name, Resource.opaque(json.loads(path.read_text()))) for path in files]
    registry = Registry().with_resources(documents)
    found = []
    for name, body in map(parsed, told[1]):
        kind = {"state": "State", "group": "Update", "beat": "Beat"}[name]
        where = {"$ref": f"{DOCUMENT.name}#/components/schemas/{kind}"}
        jsonschema.Draft202012Validator(where, registry=registry).validate(body)
        found.append((name, body))
    (_, state), (_, update), _ = found
    assert [name for name, _ in found] == ["state", "group", "beat"]
    assert all((state["signals"], update["signals"], update["group"]))
