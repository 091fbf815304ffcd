"""Orders by HTTP: for those alone who know the token, and each answered in words."""

import json
from dataclasses import replace

import pytest

from barcast.daemon.control import Answer, Order
from barcast.daemon.http import REPORT_POLICY
from barcast.daemon.panel import TrainingSettings
from tests.daemon.living import showing
from tests.daemon.test_page import HERE, app, ask

TOKEN = "0123456789abcdef"


class Taken:
    """A page that takes orders, and which it took."""

    def __init__(self, answer=Answer(done="done so"), token=TOKEN):  # noqa: B008
        self.orders = []

        async def order(given):
            self.orders.append(given)
            return answer

        self.app = app(replace(showing(token=token), order=order))

    def post(self, verb, body=b"", token=TOKEN, headers=HERE):
        """Status, headers and what is answered."""
        own = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        status, headers, said = ask(self.app, f"/orders/{verb}", "POST", [*headers, *own], body=body)
        return status, headers, json.loads(said)


def test_order_of_who_knows_the_token_is_carried_out():
    """With what belongs to it; the answer is what came of it."""
    made = Taken()
    assert made.post("rollback", b'{"to":"m1","reason":"odd"}')[::2] == (200, {"done": "done so"})
    made.post("retrain", b'{"training":{"kind":"ldm4ts","image":128}}')
    made.post("pause")
    wanted = TrainingSettings(kind="ldm4ts", image=128)
    orders = [Order("rollback", to="m1", reason="odd"), Order("retrain", training=wanted), Order("pause")]
    assert made.orders == orders


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "0", "ä" * 16])
def test_order_without_the_token_is_refused(token):
    """Whatever it is; nothing is carried out."""
    made = Taken()
    status, headers, said = made.post("pause", token=token)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert said == {"error": "orders need the token of [http]"}
    assert made.orders == []


def test_without_a_token_there_are_no_orders():
    """Not even of who sends none."""
    made = Taken(token=None)
    for token in (None, "", "None", TOKEN):
        status, _, said = made.post("pause", token=token)
        assert (status, said["error"]) == (403, "no orders are taken here: name a token_file in [http]")
    assert made.orders == []


def test_page_elsewhere_cannot_order():
    """A name that does not stand for this machine is refused before the token is looked at."""
    made = Taken()
    assert made.post("pause", headers=((b"host", b"evil.example"),))[0] == 421
    assert made.orders == []


@pytest.mark.parametrize(
    ("verb", "body", "said"),
    [
        ("dance", b"", "verb 'dance' is none of state, retrain"),
        ("pause", b"{", "Input data was truncated"),
        ("pause", b'{"why":1}', "unknown field `why`"),
        ("pause", b'{"to":"x"}', "`to` goes with the verb rollback, not pause"),
        ("retrain", b'{"training":{"steps":0}}', "Expected `int` >= 1 - at `$.training.steps`"),
        ("retrain", b'{"training":{"image":64}}', "`image` goes with the kind ldm4ts, not sssd"),
        ("stop", b'{"training":{}}', "`training` goes with the verb retrain, not stop"),
        ("pause", b"[" * 90_000, "Expected `object`"),
        ("pause", b'{"reason":"' + b"x" * 300_000, "the body has more than 100000 bytes"),
        ("pause", b"\xff", "malformed"),
    ],
)
def test_what_is_no_order_is_refused(verb, body, said):
    """With a sentence that names what is wrong."""
    made = Taken()
    status, _, told = made.post(verb, body)
    assert status == 400
    assert said in told["error"]
    assert made.orders == []


def test_refusal_is_told():
    """What the daemon does not do is no fault of the form."""
    made = Taken(Answer(refused="nothing to stop"))
    assert made.post("stop")[::2] == (409, {"error": "nothing to stop"})


def test_report_of_a_backtest_is_of_no_origin():
    """It has scripts of its own, and so must not know the page, nor be shown in a frame."""
    shown = app(showing(reports={"new": b"<p>"}))
    status, headers, body = ask(shown, "/backtests/new")
    assert (status, headers["content-security-policy"], body) == (200, REPORT_POLICY, b"<p>")
    assert REPORT_POLICY.startswith("sandbox allow-scripts; default-src 'none';")
    assert "allow-same-origin" not in REPORT_POLICY
    assert ask(shown, "/backtests/none")[0] == 404
