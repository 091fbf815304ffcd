"""What operators start from is in order."""

import re
from pathlib import Path

from barcast.daemon.config import load

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()


DEFAULTS = ("max_wait", "log_level", "root", "name", "first", "margin", "timeout", "stall", "nice", "since")
SHOWN = ("sampler", "steps", "max_age", "drift")


def test_example_configuration_is_in_order(tmp_path):
    """The commented configuration loads, and each commented key shows the default that it claims."""
    shown = (ROOT / "deploy" / "barcast.toml").read_text()
    path = tmp_path / "barcast.toml"
    path.write_text(shown)
    plain = load(path)
    for key in DEFAULTS + SHOWN:
        assert f"# {key} = " in shown
        shown = shown.replace(f"# {key} = ", f"{key} = ")
    path.write_text(shown)
    explicit = load(path)
    assert explicit.strategies() == plain.strategies()
    changed = {
        "strategy": plain.strategy,
        "model": explicit.model.model_copy(update={"sampler": None, "steps": None}),
        "retrain": explicit.retrain.model_copy(update={"steps": None, "max_age": None, "drift": None}),
    }
    assert explicit.model_copy(update=changed) == plain
    assert (explicit.model.sampler, explicit.model.steps, explicit.retrain.steps) == ("dpmpp", 8, 300)
    assert explicit.retrain.max_age == 30 * 86_400 * 10**9
    assert explicit.retrain.drift.model_dump() == {"coverage": 0.05, "crps": 0.1}


def test_configuration_of_an_operator_elsewhere_is_in_order(tmp_path):
    """What the runbook shows is all that an order over the broker needs."""
    [shown] = re.findall(r"^```toml\n(instance.*?)^```$", RUNBOOK.split("\n## Orders\n")[1], re.M | re.S)
    path = tmp_path / "operator.toml"
    path.write_text(shown)
    assert load(path).mqtt.username == "operator"
