"""Signals that tell which barrier is touched first: what is asked of the model, said, and replayed."""

import json
from contextlib import closing
from dataclasses import replace

import msgspec
import numpy as np
import polars as pl
import pytest

from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars
from barcast.daemon import wire
from barcast.daemon.config import parse
from barcast.daemon.pipeline import Settings, try_strategies
from barcast.daemon.ports import Activation, Arrival, Revision
from barcast.daemon.store import ModelStore
from barcast.models import ConfigError, Window
from barcast.models.joint import outlook
from tests.fakes import MINUTE, START, Spread, Winding, bar, opening, outgoing, settings
from tests.rim import Instance, Message, World, activation, outbox, path_of, play, revision

SECOND = 10**9
PAIRS = ((2.0, 1.0), (1.0, 1.0))
ASKED = msgspec.structs.replace(settings(), touch=PAIRS)
BARS = [Arrival(START + m * MINUTE + SECOND, (bar("A", m), bar("B", m))) for m in range(1, 8)]


def signals(messages):
    return [m for m in messages if "/signals/" in m.topic]


def asked(pairs=PAIRS):
    """The events of a path whose settings have barriers."""
    events = [Revision(START, msgspec.structs.replace(settings(), touch=pairs).encode())]
    return [*events, Activation(START, "spread", "numpy", 8), *BARS]


def test_signal_says_what_the_paths_say():
    """Probabilities are those of the forecast's paths, prices those of its last deviation, to nine digits."""
    last = signals(outgoing(asked(), spread=Winding()))[-1]
    body = msgspec.json.decode(last.payload, type=wire.Signal)
    rows = [bar("B", m) for m in range(1, 8)]
    window = Window("B", np.array([b.close_time for b in rows]), np.array([b.values for b in rows]))
    [forecast] = Winding().forecast([window])
    said = outlook(forecast, PAIRS)
    assert body.drawdown == pytest.approx(said.drawdown, rel=1e-8)
    assert [(pair.up, pair.down) for pair in body.touch] == list(PAIRS)
    for k, pair in enumerate(body.touch):
        assert pair.up_first == pytest.approx(said.touch.up[k], rel=1e-8)
        assert pair.down_first == pytest.approx(said.touch.down[k], rel=1e-8)
        assert np.log(pair.up_price / body.reference) / pair.up == pytest.approx(body.std[-1], rel=1e-4)
        assert np.log(body.reference / pair.down_price) / pair.down == pytest.approx(body.std[-1], rel=1e-4)
        assert 0 < pair.up_first < 1 - pair.down_first < 1


def test_without_barriers_no_byte_changes():
    """A model that could tell of paths says what one that cannot does; no field is there."""
    plain = outgoing([*opening(), *BARS])
    assert outgoing([*opening(), *BARS], spread=Winding()) == plain
    told = outgoing(asked(), spread=Winding())
    less = [{k: v for k, v in json.loads(m.payload).items() if k != "id"} for m in plain]
    for was, message in zip(less, told, strict=True):
        now = {k: v for k, v in json.loads(message.payload).items() if k != "id"}
        if "/signals/" in message.topic:
            assert now.pop("touch")
            assert now.pop("drawdown") > 0
        assert now == was


def test_paths_are_asked_for_where_they_are_needed(tmp_path):
    """The store is asked for paths with barriers in the settings, and keeps both apart; replay is alike."""
    paths = []

    def open_model(_model, _sampler, _steps, wanted):
        paths.append(wanted)
        return Winding() if wanted else Spread()

    world = World()
    world.script += [(START, lambda src: src.decide(revision(settings())))]
    world.script += [(START, lambda src: src.decide(activation("spread")))]
    for minute in range(1, 13):
        if minute in (5, 9):
            now = ASKED if minute == 5 else settings()
            at = START + minute * MINUTE
            world.script.append((at, lambda src, now=now: src.decide(revision(now))))
        both = [Message.of(bar(symbol, minute)) for symbol in "AB"]
        world.script.append((START + minute * MINUTE + SECOND, both))
    with closing(Instance(tmp_path / "journal.db", world, open_model)) as instance:
        play(instance.run())
        sent = path_of(outbox(instance.journal))
        assert paths == [False, True, False]
        assert instance.replayed() == sent
    told = ["touch" in json.loads(m.payload) for m in signals(sent)]
    assert told == [False] * 4 + [True] * 8 + [False] * 8


def test_settings_of_older_journals_have_no_barriers():
    """What was journalled before there were any reads as before; with them it reads back as written."""
    assert Settings.decode(ASKED.encode()) == ASKED
    plain = json.loads(settings().encode())
    del plain["touch"]
    assert Settings.decode(json.dumps(plain).encode()) == settings()


def test_strategy_sees_paths_and_cannot_change_them():
    """Where barriers are configured a strategy is given the paths, on trial as well."""
    seen = []

    class Looks:
        name = "looks"

        def on_forecasts(self, close_time, forecasts):
            for forecast in forecasts.values():
                seen.append(forecast.paths.returns.shape)
                with pytest.raises(ValueError, match="read-only"):
                    forecast.paths.returns[0, 0] = 1
            return {}

    try_strategies([Looks()], Winding().card)
    assert seen == [(1, 2)]


BASE = {"instance": "i", "timeframe": "1m", "state_dir": "/nowhere"}


@pytest.mark.parametrize(
    ("touch", "said"),
    [
        ([[2, 0]], "model.touch: the barriers 2, 0 cannot be: write how far up and how far down, each from"),
        ([[1, float("inf")]], "model.touch: the barriers 1, inf cannot be"),
        ([[1, 1], [1.0, 1.0]], "model.touch: a pair of barriers repeats"),
        ([[1, 1], [1.0000001, 1]], "model.touch: a pair of barriers repeats"),
        ([[1 + k / 8, 1] for k in range(9)], "model.touch: 9 pairs of barriers are more than 8"),
        (
            [[1, 1, 1]],
            "model.touch: write pairs, how far up and how far down, such as [[2, 1]] (given: [[1, 1, 1]])",
        ),
        ([1, 1], "model.touch: write pairs, how far up and how far down, such as [[2, 1]] (given: [1, 1])"),
        ([["a", 1]], "model.touch: write pairs"),
        ([[True, 1]], "model.touch: write pairs"),
        ("1,1", "model.touch: write pairs"),
    ],
)
def test_barriers_that_cannot_be_are_named(touch, said):
    """Every fault of a pair is one of the configuration, with its key."""
    with pytest.raises(ConfigError) as error:
        parse(BASE | {"model": {"touch": touch}}, "x.toml")
    assert f"x.toml: {said}" in str(error.value)


def test_model_without_paths_is_refused(tmp_path):
    """A baseline has none: the configuration says so, and so does whoever opens it."""
    with pytest.raises(ConfigError, match="model: fhs is a baseline and forecasts no paths"):
        parse(BASE | {"model": {"name": "fhs", "touch": [[1, 1]]}}, "x.toml")
    parsed = parse(BASE | {"model": {"touch": [[2, 1]]}}, "x.toml")  # the champion may have some
    assert parsed.settings().touch == ((2.0, 1.0),)
    with pytest.raises(ConfigError, match="fhs is a baseline"):
        ModelStore(tmp_path, "1m").open("fhs", None, None, True)
    with pytest.raises(ConfigError, match="hs is a baseline"):
        run_backtest(sample_bars(), stamp="close", calendar="XNYS", model="hs", touch=[(2, 1)])


def test_backtest_keeps_what_signals_tell(monkeypatch):
    """The frame of signals has the columns of each pair; the messages are those of the path."""
    monkeypatch.setattr("barcast.backtest.replay.open_model", lambda *_: Winding())
    options = {"stamp": "close", "calendar": "XNYS", "symbols": ["IBM"], "since": "2012-06-01"}
    result = run_backtest(sample_bars(), timeframe="session", touch=[(2, 1), (0.5, 1)], **options)
    assert json.loads(json.dumps(result.meta)) == result.meta  # a result that is loaded says the same
    named = ["touch_up_2_1", "touch_down_2_1", "touch_up_0.5_1", "touch_down_0.5_1", "drawdown"]
    assert result.signals.columns[-5:] == named
    assert result.signals[named].null_count().sum_horizontal().item() == 0
    assert (result.signals["touch_up_2_1"] + result.signals["touch_down_2_1"]).max() <= 1
    without = run_backtest(sample_bars(), timeframe="session", **options)
    assert result.signals.drop(named).equals(without.signals)
    assert result.meta["decisions_sha256"] != without.meta["decisions_sha256"]


ORIGINS = "symbol,ts\nIBM,2012-06-06\nIBM,2012-06-04\n"


@pytest.fixture
def winding(monkeypatch):
    """Commands that open a model get the fake, with a card of sessions."""
    model = Winding()
    model.card = replace(model.card, timeframe="session")
    monkeypatch.setattr("barcast.models.open_model", lambda *_: model)
    monkeypatch.setattr("barcast.backtest.replay.open_model", lambda *_: model)


def test_commands_print_and_write_what_paths_say(run, tmp_path, winding):
    """`forecast` has a table and JSON as signals have, `predict` columns, alike in the rows of an origin."""
    files = [str(sample_bars()), "--stamp", "close", "--calendar", "XNYS"]
    more = ["--model", "m", "--touch", "2,1", "--touch", "0.5,1"]
    status, out, err = run("forecast", *files, "--symbol", "IBM", "--until", "2012-06-07", *more)
    assert status == 0, err
    assert "which barrier is touched first within +2" in out
    status, out, err = run("forecast", *files, "--symbol", "IBM", "--until", "2012-06-07", *more, "--json")
    assert status == 0, err
    line = json.loads(out)
    assert [(pair["up"], pair["down"]) for pair in line["touch"]] == [(2.0, 1.0), (0.5, 1.0)]
    assert line["touch"][0]["up_price"] > line["reference"] > line["touch"][0]["down_price"]
    assert np.array(line["path"]["quantiles"]).shape == (2, 3)
    (tmp_path / "origins.csv").write_text(ORIGINS)
    to = tmp_path / "x.parquet"
    status, _, err = run(
        "predict", *files, *more, "--origins", str(tmp_path / "origins.csv"), "--out", str(to)
    )
    assert status == 0, err
    made = pl.read_parquet(to)
    assert made.columns[-5:] == [
        *(f"touch_{side}_{pair}" for pair in ("2_1", "0.5_1") for side in ("up", "down")),
        "drawdown",
    ]
    rows = made.select(made.columns[-5:]).rows()
    assert rows[0] == rows[1] != rows[2] == rows[3]
    assert rows[0][0] == pytest.approx(line["touch"][0]["up_first"], rel=1e-8)


def test_backtest_of_a_configuration_takes_its_barriers(run, tmp_path, winding):
    """What the instance's file says, and what options say, are the same messages."""
    hashes = []
    file = tmp_path / "x.toml"
    text = 'instance="i"\ntimeframe="session"\ncalendar="XNYS"\nstate_dir="s"\nsymbols=["IBM"]\n'
    file.write_text(text + "[model]\ntouch=[[2, 1]]\n")
    options = ["--symbol", "IBM", "--calendar", "XNYS", "--touch", "2,1", "--strategy", "median-drift"]
    file.write_text(file.read_text() + '[[strategy]]\nkind="median-drift"\n')
    for how in (["--config", str(file)], options):
        to = tmp_path / f"out{len(hashes)}"
        status, _, err = run(
            "backtest",
            str(sample_bars()),
            "--stamp",
            "close",
            "--since",
            "2012-09-01",
            *how,
            "--out",
            str(to),
        )
        assert status == 0, err
        hashes.append(json.loads((to / "result.json").read_text())["meta"]["decisions_sha256"])
        assert "touch_up_2_1" in pl.read_parquet(to / "signals.parquet").columns
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [("2", "write UP,DOWN, such as 2,1"), ("a,b", "write UP,DOWN"), ("0,1", "each from 0.1 to 10")],
)
def test_barriers_of_options_that_cannot_be(run, given, said):
    """An option that is no pair of barriers is one that is wrong, with what to write."""
    status, out, err = run(
        "forecast", str(sample_bars()), "--stamp", "close", "--model", "m", "--touch", given
    )
    assert status == 2
    assert said in " ".join((out + err).replace("│", " ").split())


def test_commands_refuse_models_without_paths(run):
    """The sentence names the model and the way out."""
    files = [str(sample_bars()), "--stamp", "close", "--calendar", "XNYS"]
    status, _, err = run("forecast", *files, "--model", "hs", "--touch", "2,1")
    assert (status, "hs is a baseline and forecasts no paths" in err) == (78, True)
