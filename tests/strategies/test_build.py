"""What a strategy is made from: a kind, a name and parameters that fit its fields."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from barcast.models import ConfigError
from barcast.strategies import KINDS, MedianDrift, QuantileBand, build, identify, kinds
from barcast.strategies.params import checked, parameters_of


def test_build() -> None:
    """A config names the kind and gives the parameters."""
    assert build("quantile-band", "tight", {"costs": 1, "horizon": 5}) == QuantileBand(
        "tight", costs=1, horizon=5
    )
    assert build("median-drift", "drift", {}) == MedianDrift("drift")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kind_is_known_by_its_name(kind: str) -> None:
    """Each built-in kind can be named, is called after itself, and is in no file that could change."""
    assert build(kind, "x", {}) == KINDS[kind]("x")
    assert identify(kind) == (kind, "")
    assert kind in kinds()


@pytest.mark.parametrize(
    ("kind", "name", "params", "message"),
    [
        ("quantile_band", "x", {}, "kind 'quantile_band' is unknown: did you mean quantile-band"),
        ("martingale", "x", {}, "take one of quantile-band, median-drift.*, or name a file and its class as"),
        ("", "x", {}, "kind '' is unknown"),
        (
            "median-drift",
            "x",
            {"cost": 1},
            "no parameter 'cost': did you mean costs.* There are gain, costs, horizon",
        ),
        ("median-drift", "x", {"name": "y"}, "no parameter 'name'"),
        ("median-drift", "x", {"costs": -1}, "costs is -1, not a number from 0"),
        ("median-drift", "x", {"gain": "2"}, "gain is '2', not a number"),
        ("median-drift", "x", {"gain": float("nan")}, "gain is nan"),
        ("median-drift", "x", {"gain": float("inf")}, "gain is inf"),
        ("median-drift", "x", {"gain": True}, "gain is True"),
        ("median-drift", "x", {"horizon": 1.5}, "horizon is 1.5, not a whole number from 1"),
        ("median-drift", "x", {"horizon": 5.0}, "horizon is 5.0, not a whole number from 1"),
        ("median-drift", "x", {"horizon": 0}, "horizon is 0, not a whole number from 1"),
        ("quantile-band", "x", {"band": 1.5}, "band is 1.5, not a number from 0 to 1"),
        ("vol-target", "x", {"volatility": 0}, "volatility is 0, not a number above 0"),
        ("skew-tilt", "x", {"level": 0.5}, "level is 0.5, not a number above 0 below 0.5"),
        ("rank", "x", {"share": 0.6}, "share is 0.6, not a number above 0 to 0.5"),
        ("rank", "x", {"least": 1}, "least is 1, not a whole number from 2"),
        ("rank", "x", {"least": 2.0}, "least is 2.0, not a whole number from 2"),
        ("median-drift", "a/b", {}, "name 'a/b' cannot be part of a topic"),
        ("median-drift", "", {}, "name '' cannot be part of a topic"),
    ],
)
def test_build_refuses(kind: str, name: str, params: dict[str, Any], message: str) -> None:
    """An unknown kind or parameter and a value that does not fit are refused, saying what there is."""
    with pytest.raises(ConfigError, match=message):
        build(kind, name, params)


@dataclass(frozen=True)
class Many:
    """A class with a field of each type that a parameter can have."""

    name: str
    needed: int
    rate: float = 1.0
    often: bool = False
    how: Literal["fast", "slow"] = "fast"
    note: str | None = None
    limit: Annotated[int, Meta(ge=0, lt=9)] | float = 0
    table: list[str] = field(default_factory=list)
    made: int = field(default=0, init=False)


def test_types_of_the_fields_decide() -> None:
    """What fits a field is handed on, a whole number as a float where a float is wanted."""
    values = checked(
        Many, "x", {"needed": 3, "rate": 2, "often": True, "how": "slow", "note": "n", "limit": 0.5}
    )
    assert values == {
        "needed": 3,
        "rate": 2.0,
        "often": True,
        "how": "slow",
        "note": "n",
        "limit": 0.5,
    }
    assert type(values["rate"]) is float
    assert type(checked(Many, "x", {"needed": 1, "limit": 5})["limit"]) is int


def test_parameters_are_what_can_be_set() -> None:
    """What a strategy works out for itself is no parameter, nor is its name."""
    told = parameters_of(Many("x", 3))
    assert list(told) == ["needed", "rate", "often", "how", "note", "limit", "table"]
    assert (told["needed"], told["how"], told["table"]) == (3, "fast", [])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "'x' needs the parameter needed: give it a whole number"),
        ({"needed": True}, "needed is True, not a whole number"),
        ({"needed": 3.0}, "needed is 3.0, not a whole number"),
        ({"often": 1}, "often is 1, not true or false"),
        ({"how": "swift"}, "how is 'swift', not one of fast, slow"),
        ({"note": 1}, "note is 1, not a text"),
        ({"limit": "9"}, "limit is '9', not a whole number from 0 below 9 or a number"),
        ({"table": "a"}, "table is 'a', not of a type that a parameter can have"),
        ({"made": 1}, "no parameter 'made': .*needed, rate"),
        ({"rate": "x" * 500}, "rate is 'x{59}, not a number"),
    ],
)
def test_what_does_not_fit_a_field_is_refused(params: dict[str, Any], message: str) -> None:
    """The sentence names strategy, parameter and value, and says what is wanted."""
    with pytest.raises(ConfigError, match=message):
        checked(Many, "x", params)
