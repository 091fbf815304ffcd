"""What may be set of a training, what is refused before one begins, and what is told of it."""

import json

import msgspec
import pytest

from barcast.daemon.panel import LINES, Board, Choices, TrainingSettings
from barcast.models import ConfigError

CHOICES = msgspec.convert(
    {
        "images": [64, 256],
        "batches": [64, 32],
        "backends": [
            {"name": "sdpa", "usable": True, "training": True, "why": "torch", "remedy": ""},
            {"name": "flash", "usable": False, "training": True, "why": "no GPU", "remedy": "choose sdpa"},
            {"name": "sage", "usable": True, "training": False, "why": "", "remedy": ""},
        ],
        "usages": [
            {"batch": b, "image": p, "attention": a, "checkpoint_gradients": c}
            | {"gb": b * p / 1000 / (1 + c), "savings": 50.0 * c, "needs": b * p / 900 / (1 + c)}
            for b in (64, 32)
            for p in (64, 256)
            for a in ("sdpa", "flash", "sage")
            for c in (False, True)
        ],
        "memory": 10.0,
        "window": 96,
    },
    Choices,
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "Expected `int` >= 1"),
        ({"rate": 0.5}, "Expected `float` <= 0.01"),
        ({"rate": 1e-9}, "Expected `float` >= 1e-05"),
        ({"kind": "lgbm"}, "Invalid enum value 'lgbm'"),
        ({"preset": "huge"}, "Invalid enum value 'huge'"),
        ({"seed": -1}, "Expected `int` >= 0"),
        ({"image": 128}, "`image` goes with the kind ldm4ts, not sssd"),
        ({"batch": 8}, "`batch` goes with the kind ldm4ts"),
        ({"attention": "sdpa"}, "`attention` goes with the kind ldm4ts"),
        ({"checkpoint_gradients": True}, "`checkpoint_gradients` goes with the kind ldm4ts"),
        ({"epochs": 3}, "Object contains unknown field `epochs`"),
    ],
)
def test_what_is_out_of_range_or_would_be_ignored_is_refused(settings, said):
    """Each is one sentence that names the field."""
    with pytest.raises(ConfigError, match="settings of a training: ") as refused:
        TrainingSettings.decode(json.dumps(settings))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"symbols": ["A", "X"]}, "symbols: 'X' has no bars here"),
        ({"kind": "ldm4ts", "image": 128}, "image = 128 is none of 64, 256"),
        ({"kind": "ldm4ts", "batch": 48}, "batch = 48 is none of 64, 32"),
        ({"kind": "ldm4ts", "attention": "best"}, "attention = best is none of sdpa, flash, sage"),
        (
            {"kind": "ldm4ts", "attention": "flash"},
            "flash cannot be used here: no GPU; choose sdpa",
        ),
        ({"kind": "ldm4ts", "attention": "sage"}, "attention sage passes no gradient back"),
        ({"kind": "ldm4ts", "image": 256}, "about 16.38 GB and there are 10.00 GB; choose a smaller batch"),
    ],
)
def test_what_cannot_be_trained_here_is_refused(settings, said):
    """Before a training begins, and with the reason."""
    wanted = msgspec.convert(settings, TrainingSettings)
    with pytest.raises(ConfigError) as refused:
        CHOICES.check(wanted, ["A", "B"])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"symbols": ["B"]},
        {"kind": "ldm4ts"},
        {"kind": "ldm4ts", "image": 256, "checkpoint_gradients": True},
        {"kind": "ldm4ts", "image": 256, "preset": "tiny"},
    ],
)
def test_what_can_be_trained_here_is_not(settings):
    """Also a preset of which there is no estimate."""
    CHOICES.check(msgspec.convert(settings, TrainingSettings), ["A", "B"])


def test_board_tells_how_a_training_stands():
    """Epochs of the try under way apart from the last lines, and nothing of the training before."""
    news = []
    board = Board(lambda: 5, lambda: news.append(json.loads(board.encode())))
    epoch = {"phase": "map", "step": 10, "steps": 40, "done": 10, "total": 160, "loss": None, "crps": 0.5}
    said = json.dumps(epoch | {"event": "epoch", "timestamp": "now"})
    assert board.encode() == b"null"
    board.begin(["asked for"], TrainingSettings(steps=40))
    board.does("train")
    board.hear(said)
    board.does("waits")
    board.does("train")
    for n in range(LINES + 5):
        board.hear(f"bar {n}")
    board.hear('{"x":' * 900)  # deeper than any decoder goes
    board.hear(said)
    board.hear('{"event": "training", "note": "goes on", "level": "info"}')
    assert news[-1]["epochs"] == [epoch | {"at": 5}]
    assert news[-1]["lines"] == [*(f"bar {n}" for n in range(7, LINES + 5)), '{"x":' * 900, "goes on"]
    assert (news[-1]["running"], news[-1]["began"], news[-1]["does"]) == (True, 5, "train")
    board.end("promoted")
    assert (news[-1]["running"], news[-1]["ended"], news[-1]["result"]) == (False, 5, "promoted")
    board.begin(["age"], None)
    told = {"running": True, "reasons": ["age"], "settings": None, "began": 5, "epochs": [], "lines": []}
    assert news[-1] == told
