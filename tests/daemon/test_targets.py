"""What strategies answer: one rule for targets that cannot be, the same live and in a replay."""

import json
from decimal import Decimal
from fractions import Fraction
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from structlog.testing import capture_logs

from barcast.backtest.replay import Recording, replay
from barcast.daemon.calendar import iso
from barcast.daemon.live import LiveSink
from barcast.daemon.pipeline import Pipeline, first_asked, in_strategy, try_strategies
from barcast.daemon.ports import Arrival
from barcast.models import ConfigError, Window
from tests.fakes import MINUTE, START, Spread, bar, opening
from tests.rim import Silent, play

CLOSE = START + 3 * MINUTE
AT = iso(CLOSE)


class Given:
    """A strategy that gives what it is told to, and keeps what it was asked."""

    def __init__(self, targets, name="given"):
        self.name, self.targets, self.asked = name, targets, []

    def on_forecasts(self, close_time, forecasts):
        self.asked.append((close_time, forecasts))
        return self.targets(forecasts) if callable(self.targets) else self.targets


class Kept(Recording):
    """A recording that also keeps the outcomes."""

    def __init__(self):
        super().__init__()
        self.outcomes = []

    async def emit(self, outcome):
        self.outcomes.append(outcome)
        await super().emit(outcome)


def asked(*answers, straggler=False):
    """The last outcome of three minutes of A and B, and the messages about it; one strategy an answer."""

    class Asking(Pipeline):
        strategies = tuple(Given(answer, f"s{n}") for n, answer in enumerate(answers))

    minutes = [Arrival(START + m * MINUTE + 10**9, (bar("A", m), bar("B", m))) for m in (1, 2, 3)]
    story = [*opening(), *minutes]
    if straggler:
        story[-1] = Arrival(START + 3 * MINUTE + 10**9, (bar("A", 3),))
        story.append(Arrival(START + 3 * MINUTE + 30 * 10**9, (bar("B", 3),)))
    kept = Kept()
    replay(story, Asking(lambda *_: Spread()), kept)
    said = [json.loads(m.payload) for m in kept.messages if json.loads(m.payload).get("close_time") == AT]
    return kept.outcomes[-1], said


@pytest.mark.parametrize(
    "targets",
    [
        {"A": 0.5, "B": -1},
        {"B": 1.0},
        {},
        {"A": np.float64(0.25), "B": np.float32(-0.5)},
        {"A": np.int64(1), "B": Fraction(1, 4)},
        {"A": -1.0, "B": 1},
    ],
)
def test_targets_that_are_some(targets):
    """A number of any kind from -1 to 1 is taken; a symbol that is left out gets no target."""
    outcome, said = asked(targets)
    assert outcome.refused == {}
    assert outcome.targets == {"s0": {symbol: float(target) for symbol, target in targets.items()}}
    assert all(type(target) is float for target in outcome.targets["s0"].values())
    assert [m["symbol"] for m in said if "strategy" in m] == sorted(targets)
    assert "refused" not in said[-1]


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ({"A": nan}, "its target of A is nan, not a number from -1 to 1"),
        ({"A": 0.5, "B": np.float64(nan)}, "its target of B is nan, not a number"),
        ({"A": inf}, "its target of A is inf, not"),
        ({"A": 1.0000001}, "its target of A is 1.0000001, not"),
        ({"A": -2}, "its target of A is -2, not"),
        ({"A": 10**400}, "its target of A is 1000000000"),
        ({"A": "1"}, "its target of A is a value of type str, not"),
        ({"A": None}, "its target of A is a value of type NoneType, not"),
        ({"A": True}, "its target of A is a value of type bool, not"),
        ({"A": np.bool_(True)}, "its target of A is a value of type bool"),
        ({"A": 1j}, "its target of A is a value of type complex, not"),
        ({"A": Decimal(1)}, "its target of A is a value of type Decimal, not"),
        ({"A": np.array(0.5)}, "its target of A is a value of type ndarray, not"),
        ({"A": object()}, "its target of A is a value of type object, not"),
        ({"A": 0.5, "C": 0.5}, "it gave a target of 'C', which was not forecast"),
        ({"A": 0.5, None: 0.5}, "it gave a target of a value of type NoneType, which was not forecast"),
        ({"X" * 100: 0}, f"it gave a target of '{'X' * 39}, which was not forecast"),
        (None, "it gave a value of type NoneType, not a target for each symbol"),
        ([0.5, 0.5], "it gave a value of type list, not a target for each symbol"),
        (pl.Series([0.5]), "it gave a value of type Series, not"),
        (0.5, "it gave a value of type float, not"),
    ],
)
def test_targets_that_are_none(targets, reason):
    """A strategy that gives one wrong target has none in the group; the signals and the others' go out."""
    outcome, said = asked({"B": 0.5}, targets)
    plain, _ = asked({"B": 0.5})
    assert outcome.targets == plain.targets == {"s0": {"B": 0.5}}
    [(name, sentence)] = outcome.refused.items()
    assert name == "s1"
    assert sentence.startswith(f"strategy s1, close {AT}: {reason}")
    assert sentence.endswith("; none of its targets is taken")
    assert [m["strategy"] for m in said if "strategy" in m] == ["s0"]
    assert [m["symbol"] for m in said if "reference" in m] == ["A", "B"]
    assert said[-1]["refused"] == {"s1": sentence}
    assert asked({"B": 0.5}, targets)[1] == said


def test_targets_come_in_the_order_of_the_signals():
    """Whatever order a strategy has, the messages are the same: a set has another in every run."""
    assert asked({"B": 0.5, "A": 0.25})[1] == asked({"A": 0.25, "B": 0.5})[1]


def test_straggler_is_no_group_to_ask_about():
    """A straggler asks nobody, so that nothing is refused."""
    outcome, _ = asked(None, straggler=True)
    assert outcome.group.straggler
    assert (outcome.targets, outcome.refused) == ({}, {})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda forecasts: forecasts["A"].quantiles.__imul__(2),
        lambda forecasts: forecasts["A"].std.fill(0),
        lambda forecasts: forecasts.pop("A"),
        lambda forecasts: forecasts.__setitem__("A", None),
    ],
)
def test_strategy_cannot_change_a_signal(spoil):
    """A strategy that writes into a forecast fails at once: what is published is what the model said."""
    outcome, said = asked(spoil, {"A": 0.5})
    assert isinstance(outcome.raised["s0"].__cause__, ValueError | AttributeError | TypeError)
    assert list(outcome.targets) == ["s1"]
    assert [m for m in said if "quantiles" in m] == [m for m in asked({"A": 0.5})[1] if "quantiles" in m]


def fail(forecasts):
    """Divide by zero."""
    return len(forecasts) / 0


def test_error_inside_a_strategy_takes_its_targets_and_nothing_else():
    """A strategy that raises has no targets in that group; the signals, and other strategies, go on.

    What is published names the kind of error only, the same in every run; where it was is for the log.
    """
    outcome, said = asked(fail, {"A": 0.5})
    why = f"strategy s0, close {AT}: it raised ZeroDivisionError; none of its targets is taken"
    assert outcome.refused == {"s0": why}
    assert outcome.targets == {"s1": {"A": 0.5}}
    assert [m["refused"] for m in said if "refused" in m] == [{"s0": why}]
    told = in_strategy(outcome.raised["s0"])
    where = f"{fail.__code__.co_filename}, line {fail.__code__.co_firstlineno + 2}"
    assert (
        told == f"strategy s0, close {AT}: ZeroDivisionError: division by zero, in {where}; correct it there"
    )


@pytest.mark.parametrize("raised", [KeyError("IBM"), SystemExit(3)])
def test_error_on_trial_is_found_at_the_start(raised):
    """A strategy that raises is refused before anything is journalled, and cannot end the program."""

    def fail(_):
        raise raised

    with pytest.raises(ConfigError, match=rf"strategy given, asked on trial: {type(raised).__name__}: "):
        try_strategies([Given(fail)], Spread().card)


@pytest.mark.parametrize("targets", [{"TRIAL": nan}, {"TRIAL": 2}, {"IBM": 0.5}, None])
def test_wrong_targets_are_found_on_trial(targets):
    """A strategy whose targets cannot be is refused at the start, before its settings are journalled."""
    try_strategies([Given({"TRIAL": 1.0})], Spread().card)
    with pytest.raises(ConfigError, match=r"strategy given, asked on trial: it.*; correct the strategy"):
        try_strategies([Given(targets)], Spread().card)


def test_trial_is_about_what_will_be_asked():
    """A strategy that looks its symbols, or the close, up in a table of its own finds them on trial."""
    table = {(name, CLOSE): 0.5 for name in "AB"}

    class Looks(Given):
        def on_forecasts(self, close_time, forecasts):
            assert {forecast.close_time for forecast in forecasts.values()} == {close_time}
            return {name: table[name, close_time] for name in forecasts}

    try_strategies([Looks(None)], Spread().card, "AB", CLOSE)
    with pytest.raises(ConfigError, match=rf"given, asked on trial as of {AT}: KeyError: \('C', {CLOSE}\)"):
        try_strategies([Looks(None)], Spread().card, "AC", CLOSE)


def test_first_that_is_asked_about():
    """Those that have enough bars at the first close where any has; without any, the first that come."""

    def window(name, first, count):
        return Window(name, np.arange(first, first + count), np.ones((count, 5)))

    some = {w.symbol: w for w in (window("A", 10, 20), window("B", 12, 20), window("C", 10, 3))}
    assert first_asked(some, 5, 0) == (("A",), 14)
    assert first_asked(some, 5, 15) == (("A",), 15)
    assert first_asked(some, 5, 16) == (("A", "B"), 16)
    assert first_asked(some, 5, 30) == (("B",), 30)
    assert first_asked(some, 50, 11) == (("A", "C"), 11)


def test_live_sink_warns_and_counts():
    """Live a refusal is a warning with its reason and a count; the group's messages go out."""
    outcome, said = asked({"A": nan}, {"A": 0.5})
    sink = LiveSink(None, SimpleNamespace(position=0, now=lambda: CLOSE, forecast=lambda: None), Silent())
    with capture_logs() as logs:
        play(sink.emit(outcome))
    [warning] = [entry for entry in logs if entry["log_level"] == "warning"]
    assert warning["event"] == "targets_refused"
    assert (warning["strategy"], warning["reason"]) == ("s0", outcome.refused["s0"])
    assert sink.counts.refused == 1
    assert [json.loads(m.payload) for m in sink._batch] == said
