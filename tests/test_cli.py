"""The command line: what a person mistypes ends in one sentence, and what they ask for is what they get."""

import json
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import polars.testing
import pytest
import typer
from rich.text import Text

from barcast.backtest import cli
from barcast.backtest.cli import terminal
from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.backtest.verify import read_capture
from barcast.daemon.adjustments import read_adjustments
from barcast.daemon.events import Champion
from barcast.daemon.journal import Journal, Kind
from barcast.models import ConfigError, DataError, ensemble, gbm

DAILY = ["--stamp", "close", "--timeframe", "session", "--calendar", "XNYS"]
SAMPLE, MODEL = str(sample_bars()), str(sample_checkpoint())


@pytest.fixture
def short(tmp_path):
    """Fifty bars of one symbol."""
    path = tmp_path / "short.parquet"
    pl.read_parquet(SAMPLE).filter(symbol="IBM").head(50).write_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    ("price", "said"),
    [
        (104590.3, "104590"),
        (1234.56, "1234.6"),
        (12.3456, "12.346"),
        (0.00001234567, "0.000012346"),
        (1, "1.0000"),
    ],
)
def test_prices_are_readable(price, said):
    """Five digits, all before the point, and no exponent."""
    assert terminal.price(price) == said


@pytest.mark.parametrize(
    ("cached", "said"), [(False, "nothing is written"), (True, "forecasts that were made")]
)
def test_interrupted_backtest_says_what_is_left(run, tmp_path, monkeypatch, cached, said):
    """Whoever ends it by hand is told that nothing is written, or that the cache has what was forecast."""

    def ended(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("barcast.backtest.replay.run_backtest", ended)
    options = [
        "--stamp",
        "close",
        "--timeframe",
        "session",
        "--calendar",
        "XNYS",
        "--out",
        str(tmp_path / "out"),
    ]
    options += ["--cache", str(tmp_path / "cache")] if cached else []
    _, _, err = run("backtest", str(sample_bars()), *options)
    assert f"interrupted: {said}" in err or f"interrupted: the {said}" in err


def test_forecast_in_json_holds_every_level(run):
    """With --json each symbol is one object with all levels and the ends of its horizons."""
    options = [*DAILY, "--model", "fhs", "--symbol", "IBM", "--json"]
    status, out, _ = run("forecast", SAMPLE, *options)
    assert status == 0
    [line] = out.splitlines()
    found = json.loads(line)
    assert found["symbol"] == "IBM"
    assert found["close_time"] == "2013-03-01T21:00:00Z"
    assert [h["bars"] for h in found["horizons"]] == [1, 5, 20]
    assert len(found["std"]) == 3
    assert [len(row) for row in found["quantiles"]] == [len(found["levels"])] * 3
    assert found["quantiles"][0] == sorted(found["quantiles"][0])
    assert found["warming"] is False
    _, out, _ = run("forecast", SAMPLE, *options, "--until", "2001-06-01")
    assert json.loads(out)["warming"] is True


def test_forecast_shows_nothing_that_the_live_path_would_withhold(run, tmp_path):
    """A symbol whose forecast can be no price is left out by name; where there is no other, it is a fault."""
    known = pl.read_parquet(SAMPLE).filter(symbol="IBM").sort("close_time")
    price = pl.when(pl.int_range(pl.len()) % 2 == 0).then(1.0).otherwise(1000.0)
    names = ("open", "high", "low", "close")
    wild = known.with_columns(price.alias(name) for name in names).with_columns(symbol=pl.lit("WILD"))
    wild.write_parquet(tmp_path / "wild.parquet")
    options = [*DAILY, "--model", "hs", "--json"]
    status, out, err = run(
        "forecast", str(tmp_path / "wild.parquet"), SAMPLE, "--symbol", "IBM", "--symbol", "WILD", *options
    )
    assert status == 0, err
    assert [json.loads(line)["symbol"] for line in out.splitlines()] == ["IBM"]
    assert "WILD: the model gave no forecast that can be a price: left out" in " ".join(err.split())
    status, out, err = run("forecast", str(tmp_path / "wild.parquet"), *options)
    assert (status, out) == (78, "")
    assert "can be a price: check the bars for wild prices" in " ".join(err.split())


@pytest.fixture
def split(tmp_path):
    """IBM as it would have traded with a split in two on 1 June 2012, and the file that declares it."""
    prices = ["open", "high", "low", "close"]
    until = pl.col("close_time") <= datetime(2012, 6, 1, 20, tzinfo=UTC)
    scaled = [pl.when(until).then(2 * pl.col(name)).otherwise(name).alias(name) for name in prices]
    volume = pl.when(until).then(pl.col("volume") / 2).otherwise("volume").alias("volume")
    pl.read_parquet(SAMPLE).filter(symbol="IBM").with_columns(*scaled, volume).write_parquet(
        tmp_path / "traded.parquet"
    )
    (tmp_path / "splits.csv").write_text("symbol,time,factor,kind\nIBM,2012-06-01T20:00:00Z,0.5,split\n")
    return str(tmp_path / "traded.parquet"), str(tmp_path / "splits.csv")


def test_declared_split_changes_no_forecast(run, split):
    """Bars as traded with their split declared forecast what split-adjusted bars do, to the bit."""
    traded, splits = split
    options = [*DAILY, "--model", "fhs", "--symbol", "IBM", "--json"]
    _, plain, _ = run("forecast", SAMPLE, *options)
    _, declared, _ = run("forecast", traded, *options, "--adjustments", splits)
    _, undeclared, _ = run("forecast", traded, *options)
    assert declared == plain != undeclared


def test_declared_split_changes_no_backtest(split):
    """Scores, equity and outcomes over a declared split are those of split-adjusted bars."""
    traded, splits = split
    options = {
        "stamp": "close",
        "timeframe": "session",
        "calendar": "XNYS",
        "symbols": ["IBM"],
        "since": "2012-05-01",
    }
    plain = run_backtest([SAMPLE], **options)
    declared = run_backtest([traded], adjustments=read_adjustments(Path(splits)), **options)
    assert declared.outcomes.drop("price").equals(plain.outcomes.drop("price"))
    pl.testing.assert_frame_equal(declared.scores, plain.scores, abs_tol=1e-12)
    pl.testing.assert_frame_equal(declared.equity, plain.equity, abs_tol=1e-12)
    assert run_backtest([traded], **options).outcomes["outcome"].min() < -0.6


def test_hours_of_one_symbol_are_taken_from_the_command_line(run, short):
    """--symbol-calendar overrides --calendar for its symbol; anything but SYMBOL=NAME is refused."""
    other = ["--stamp", "close", "--timeframe", "session", "--calendar", "XLON", "--model", "fhs"]
    status, _, err = run("forecast", short, *other)
    assert (status, "calendar XLON" in err) == (78, True)
    status, _, err = run("forecast", short, *other, "--symbol-calendar", "IBM=XNYS")
    assert "No symbol has the 249 bars" in err
    status, _, err = run("forecast", short, *other, "--symbol-calendar", "IBM")
    assert (status, "write SYMBOL=NAME" in err) == (2, True)


def test_forecast_fits_a_terminal_of_80_columns(run):
    """No number of the table is cut."""
    _, out, _ = run("forecast", SAMPLE, *DAILY, "--model", "fhs")
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_forecast_cuts_no_price_in_a_pipe(run, tmp_path):
    """A currency's five digits take more room than a terminal has."""
    small = [pl.col(name) / 1000 for name in ("open", "high", "low", "close")]
    bars = pl.read_parquet(SAMPLE).with_columns(*small, symbol="LONG_NAMED_" + pl.col("symbol"))
    bars.write_parquet(tmp_path / "small.parquet")
    _, out, err = run("forecast", str(tmp_path / "small.parquet"), *DAILY, "--model", "fhs")
    assert "LONG_NAMED_AAPL" in out, err
    assert "…" not in out


@pytest.mark.parametrize("command", ["forecast", "backtest"])
def test_nothing_to_forecast_is_a_fault(run, short, command):
    """Too little history for any forecast ends with how much is needed, not with an empty table."""
    status, _, err = run(command, short, *DAILY, "--model", "fhs")
    assert status == 78
    assert "249 bars" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["backtest", SAMPLE, *DAILY, "--model", "hs", "--sampler", "ddim"], "not sampled"),
        (["backtest", SAMPLE, *DAILY, "--model", "har", "--steps", "4"], "not sampled"),
        (["backtest", SAMPLE, *DAILY, "--out", SAMPLE], "is a file"),
        (["backtest", SAMPLE, *DAILY, "--config", "x.toml", "--model", "hs"], "--model is taken from"),
        (["backtest", SAMPLE, *DAILY, "--retrain-steps", "3"], "--retrain-steps goes with"),
        (["backtest", SAMPLE, *DAILY, "--retrain", "soon"], "retrain: cron: 'soon' has 1 fields"),
        (["backtest", SAMPLE, *DAILY, "--volume-share", "2"], "volume_share = 2.0"),
        (["backtest", SAMPLE, *DAILY, "--retrain", "0 3 * * *", "--training-time", "1w"], "'1w': write a"),
        (["publish", SAMPLE, "--stamp", "close", "--timeframe", "foo"], "timeframe"),
        (["publish", SAMPLE, "--stamp", "close"], "timeframe"),
        (["publish", SAMPLE, *DAILY, "--root", ""], "root"),
        (["publish", SAMPLE, "--stamp", "close", "--config", "x.toml", "--host", "h"], "--host"),
        (["train", SAMPLE, *DAILY, "--out", "/proc/none/x"], "--out"),
        (["audit", SAMPLE, *DAILY, "--out", "/proc/none/x"], "name a folder that you may write"),
        (
            ["train", SAMPLE, *DAILY, "--out", "x", "--kind", "lgbm", "--steps", "9"],
            "--steps does not go with",
        ),
        (["train", SAMPLE, *DAILY, "--out", "x", "--kind", "lgbm", "--member", "hs"], "--member does not go"),
        (["train", SAMPLE, *DAILY, "--out", "x", "--member", "hs"], "--member does not go with --kind sssd"),
        (["train", SAMPLE, *DAILY, "--out", "x", "--kind", "ensemble", "--seed", "1"], "--seed does not go"),
        (["train", SAMPLE, *DAILY, "--out", "x", "--kind", "ensemble"], "give --member twice"),
        (
            ["train", SAMPLE, *DAILY, "--out", "x", "--kind", "ensemble", "--member", "no", "--member", "hs"],
            "no baseline is called so",
        ),
        (["verify", "nowhere.db"], "no journal there"),
        (["contract", "--root", "a/#"], "root: 'a/#': use a topic without wildcards"),
        (["run", "nowhere.toml"], "no such file"),
    ],
)
def test_faults_of_the_user_end_in_a_sentence(run, arguments, said):
    """No traceback: a fault names what is wrong, and exits with 78 or, for options, 2."""
    status, out, err = run(*arguments)
    assert status in (2, 78)
    assert said in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["evaluate"], "--report"),
        (["evaluate"], "--json"),
        (["backtest"], "--out"),
        (["predict", "--model", "hs", "--origins", "nowhere.csv"], "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_before_the_work(run, tmp_path, command, option):
    """What may not be written is named before the first bar is read, and nothing is left behind."""
    command = [command[0], "nowhere.parquet", *DAILY, *command[1:], option]
    status, _, err = run(*command, "/proc/none/x")
    assert (status, f"{option}: " in err) == (78, True), err
    file = tmp_path / "new" / "x"
    status, _, err = run(*command, str(file))
    assert (status, "nowhere.parquet does not exist" in err or "nowhere.csv" in err) == (78, True), err
    assert not file.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert run(*command, str(file))[0] in (2, 78)
    assert file.read_text() == "mine"


def test_trees_and_an_ensemble_are_trained_and_tested(run, tmp_path, monkeypatch):
    """Both kinds come out of `train`, are shown on held-out bars, and serve in a backtest and a forecast."""
    for place, least in ((gbm, "ROUNDS"), (ensemble, "ORIGINS"), (cli.training, "HELD_OUT")):
        monkeypatch.setattr(place, least, 100)
    history = [SAMPLE, *DAILY, "--symbol", "IBM", "--until", "2005-01-01"]
    trees, mix = str(tmp_path / "trees"), str(tmp_path / "mix")
    status, _, err = run("train", *history, "--out", trees, "--kind", "lgbm")
    assert (status, "held-out forecasts" in err) == (0, False), err
    status, _, err = run("train", *history, "--out", trees, "--kind", "lgbm", "--hold-out", "0.1")
    assert (status, "held-out forecasts" in err) == (0, True), err
    members = ["--member", "fhs", "--member", "hs", "--member", trees]
    share = ["--hold-out", "0.1"]
    status, _, err = run("train", *history, "--out", mix, "--kind", "ensemble", *members, *share)
    assert (status, "weights +20: fhs 0." in err) == (0, True), err
    status, _, err = run("train", *history, "--out", str(tmp_path / "new"), "--init-from", trees)
    assert (status, "is no sssd" in err) == (78, True)
    for model, kind in ((trees, "lgbm"), (mix, "ensemble")):
        options = {"stamp": "close", "timeframe": "session", "calendar": "XNYS", "symbols": ["IBM"]}
        seen = run_backtest([SAMPLE], model=model, since="2003-10-01", until="2003-10-10", **options)
        later = run_backtest([SAMPLE], model=model, since="2005-06-01", until="2005-06-10", **options)
        assert (seen.meta["kind"], later.meta["kind"]) == (kind, kind)
        assert "in sample" in str(seen.meta["warning"])
        assert "in sample" not in later.meta["warning"]
        assert run("forecast", *history, "--model", model)[0] == 0
        status, _, err = run("forecast", *history, "--model", model, "--sampler", "ddim")
        assert (status, "is not sampled: leave sampler and steps out" in err) == (78, True)
        with pytest.raises(ConfigError, match="is not sampled"):
            run_backtest([SAMPLE], model=model, steps=4, **options)


def test_an_ensemble_forecasts_what_its_trained_members_do(run, tmp_path, monkeypatch):
    """Without --horizon it takes those of the first checkpoint; others are refused with what to do."""
    monkeypatch.setattr(gbm, "ROUNDS", 5)
    history = [SAMPLE, *DAILY, "--symbol", "IBM", "--until", "2005-01-01"]
    trees = str(tmp_path / "trees")
    status, _, err = run("train", *history, "--out", trees, "--kind", "lgbm", "--horizon", "2")
    assert status == 0, err
    mix = ["train", *history, "--out", str(tmp_path / "mix"), "--kind", "ensemble"]
    mix += ["--member", "hs", "--member", trees]
    status, _, err = run(*mix)
    assert (status, "weights +2: hs 0." in err) == (0, True), err
    status, _, err = run(*mix, "--horizon", "3")
    assert (status, "take its horizons for all" in err) == (78, True), err


def test_training_never_replaces_what_is_no_model(run, tmp_path):
    """A directory with other files in it is named before the training begins, and left alone."""
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, err = run("train", SAMPLE, *DAILY, "--out", str(tmp_path))
    assert status == 78
    assert "holds something else than a model" in " ".join(err.split())
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_retraining_leaves_a_halted_symbol_out_and_says_so(run, tmp_path):
    """A symbol that stands still, or is new, does not stop the retraining of the others; it is named."""
    prices = ["open", "high", "low", "close"]
    known = pl.read_parquet(SAMPLE).filter(symbol="IBM")
    halted = known.with_columns(pl.lit(1.0).alias(name) for name in prices).with_columns(
        symbol=pl.lit("HALT")
    )
    new = known.tail(40).with_columns(symbol=pl.lit("NEW"))
    (tmp_path / "state" / "history").mkdir(parents=True)
    pl.concat([known, halted, new]).write_parquet(tmp_path / "state" / "history" / "bars.parquet")
    config = tmp_path / "barcast.toml"
    config.write_text(
        'instance = "x"\nstate_dir = "state"\ntimeframe = "session"\ncalendar = "XNYS"\n'
        '[retrain]\ncron = "0 3 * * *"\nsteps = 1\nnice = 0\n'
    )
    out = tmp_path / "new"
    status, _, err = run("train-challenger", str(config), "--out", str(out), "--champion", "fhs")
    assert status == 0, err
    assert "left out, as too short or standing still: HALT, NEW" in err
    record = json.loads((out / "model.json").read_text())["record"]
    assert (record["symbols"], record["left_out"]) == (["IBM"], ["HALT", "NEW"])


def test_backtest_on_what_the_model_learnt_from_says_so():
    """A test period that the model has seen is called in sample; a later one is not."""
    options = {
        "stamp": "close",
        "model": MODEL,
        "timeframe": "session",
        "calendar": "XNYS",
        "symbols": ["IBM"],
    }
    seen = run_backtest([SAMPLE], since="2008-06-02", until="2008-06-20", **options)
    assert "in sample" in str(seen.meta["warning"])
    later = run_backtest(
        [SAMPLE], since=datetime(2012, 6, 1, tzinfo=UTC), until="2012-06-20T00:00:00Z", **options
    )
    assert "in sample" not in later.meta["warning"]


def test_capture_is_read_as_mosquitto_sub_prints_it(tmp_path):
    """A line is topic and payload with a blank between, or a JSON array of the two."""
    path = tmp_path / "seen"
    path.write_text('r/signals/1m/A {"a": 1}\n["r/groups/1m","{}"]\n')
    assert read_capture(path) == [("r/signals/1m/A", b'{"a": 1}'), ("r/groups/1m", b"{}")]
    path.write_text('r/signals/1m/A {"a": 1}\n[7]\n')
    with pytest.raises(DataError, match="line 2"):
        read_capture(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "BARS", "--model", "hs", "--origins", "ORIGINS", "--out", "BARS"], "in use by this"),
        (["predict", "BARS", "--model", "hs", "--origins", "ORIGINS", "--out", "ORIGINS"], "in use by this"),
        (["predict", "BARS", "--model", "hs", "--origins", "ORIGINS", "--out", "q.csv"], "to hold Parquet"),
        (["backtest", "BARS", "--model", "hs", "--out", "."], "not empty, and holds no backtest"),
        (["backtest", "kept/BARS", "--model", "hs", "--out", "kept"], "which is read"),
        (["backtest", "BARS", "--model", "kept/models/a", "--out", "kept"], "which is read"),
        (["evaluate", "BARS", "--model", "hs", "--json", "BARS"], "in use by this"),
        (["evaluate", "BARS", "--model", "hs", "--report", "r.html", "--json", "r.html"], "in use by this"),
    ],
)
def test_nothing_that_is_read_is_written_over(run, tmp_path, monkeypatch, arguments, words):
    """An output that is an input, or another output, is refused before anything is read."""
    monkeypatch.chdir(tmp_path)
    bars, origins = tmp_path / "bars.parquet", tmp_path / "origins.parquet"
    bars.write_bytes(b"years of bars")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "result.json").write_bytes(b"{}")
    origins.write_bytes(b"origins")
    named = [
        {"BARS": "bars.parquet", "kept/BARS": "kept/bars.parquet", "ORIGINS": str(origins)}.get(a, a)
        for a in arguments
    ]
    status, _, err = run(*named, *DAILY)
    assert (status, words in " ".join(err.replace("│", " ").split())) == (2, True)
    assert (bars.read_bytes(), origins.read_bytes()) == (b"years of bars", b"origins")


@pytest.fixture
def sent(monkeypatch):
    """What would be published: how many bars, of which timeframe, and whether a wait was told of."""
    calls = []

    async def send(bars, _address, _root, timeframe, _clock, told, waits):
        calls.append((len(bars), timeframe))
        waits(bars[0].close_time, 90_000.0)
        told(len(bars), bars[-1].close_time)

    monkeypatch.setattr("barcast.daemon.publish.publish", send)
    return calls


def test_bars_of_another_length_are_not_published(run, tmp_path, sent):
    """Daily bars in a configuration of minutes are named, by their column or the distances between them."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "x"\nstate_dir = "s"\ntimeframe = "1m"\n')
    status, _, err = run("publish", SAMPLE, "--stamp", "close", "--config", str(config))
    assert (status, sent) == (78, [])
    assert "timeframe: '1m' is configured, and the files hold '1d' bars (the most frequent distance" in err
    says = pl.read_parquet(SAMPLE).head(2).with_columns(timeframe=pl.lit("1d"))
    says.write_parquet(tmp_path / "says.parquet")
    status, _, err = run("publish", str(tmp_path / "says.parquet"), "--stamp", "close", "--timeframe", "1m")
    assert (status, "column 'timeframe' of" in err) == (78, True)


def test_bars_are_published_and_a_long_wait_is_told(run, tmp_path, sent):
    """Of the configured length, or too few to tell; whoever waits for the next close is told until when."""
    cut = ["--symbol", "IBM", "--since", "2012-01-03", "--until", "2012-01-10"]
    status, out, err = run("publish", SAMPLE, *DAILY, *cut)
    assert (status, "published 5 bars" in out, sent) == (0, True, [(5, "session")]), err
    assert "the next bar closes at 2012-01-03T21:00:00" in err
    assert "1 day, 1:00:00 from now" in err
    pl.read_parquet(SAMPLE).head(1).write_parquet(tmp_path / "one.parquet")
    assert run("publish", str(tmp_path / "one.parquet"), "--stamp", "close", "--timeframe", "1m")[0] == 0


def test_help_says_what_is_written():
    """No bracket in a help text is taken for markup: `[mqtt]` would be left out."""
    told, groups = {}, [("", typer.main.get_command(cli.app))]
    for above, group in groups:
        for name, command in group.commands.items():
            told[f"{above}{name}"] = command.help
            named = {f"{above}{name} {each.name}": each.help for each in command.params}
            told |= {key: text for key, text in named.items() if text}
            groups += [(f"{name} ", command)] if hasattr(command, "commands") else []
    assert len(told) > 100
    shown = {name: Text.from_markup(text).plain for name, text in told.items()}
    wrong = [name for name, text in told.items() if shown[name] != text.replace("\\[", "[")]
    assert not wrong, wrong


def test_help_shows_brackets(run):
    """Escaped ones come out as they are meant."""
    said = " ".join(run("ctl", "--help")[1].replace("│", " ").split())
    assert "as the user of [mqtt] in the configuration" in said


def test_orders_without_a_daemon_are_refused(run, tmp_path):
    """Who serves is the daemon's to say, and a training is its to do; a rollback needs something below."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n')
    for words in (["state"], ["retrain"], ["retrain", "--wait"], ["pause", "--reason", "rest"], ["reload"]):
        status, _, err = run("ctl", str(config), *words)
        assert (status, "no daemon runs on" in err) == (78, True)
    for words in (
        ["pause", "--wait"],
        ["dance"],
        ["resume", "--to", "fhs"],
        ["state", "--reason", "x" * 501],
    ):
        assert run("ctl", str(config), *words)[0] == 2
    status, _, err = run("ctl", str(config), "rollback")
    assert status == 78, err
    assert not (tmp_path / "state").exists()
    (tmp_path / "state").mkdir()
    status, _, err = run("ctl", str(config), "rollback")
    assert (status, "no journal there, so there is nothing to roll back" in " ".join(err.split())) == (
        78,
        True,
    )


def test_check_says_when_a_training_is_wanted(run, tmp_path):
    """Schedule, age, drift and demand, as the configuration has them."""
    config = tmp_path / "barcast.toml"
    config.write_text(
        'instance = "x"\nstate_dir = "s"\ntimeframe = "1m"\n[retrain]\nmax_age = "30d"\ndrift = {}\n'
    )
    assert "at an age of 30 days, at drift, on demand" in run("check", str(config))[1]


def test_check_says_how_forecasts_are_sampled_and_what_is_touched(run, tmp_path):
    """Sampler, steps and barriers have lines where the configuration has them, and only there."""
    config = tmp_path / "barcast.toml"
    plain = 'instance = "x"\nstate_dir = "s"\ntimeframe = "session"\ncalendar = "XNYS"\n'
    config.write_text(plain)
    said = run("check", str(config))[1]
    assert "sampler" not in said
    assert "touch" not in said
    first = f"first = {json.dumps(MODEL)}\n"
    asked = f'{plain}[model]\n{first}sampler = "dpmpp"\nsteps = 8\ntouch = [[2, 1], [0.5, 1]]\n'
    config.write_text(asked)
    status, out, err = run("check", str(config))
    assert status == 0, err
    said = " ".join(out.split())
    assert "sampler dpmpp, 8 steps" in said
    assert "touch 2 up / 1 down, 0.5 up / 1 down, in deviations over the longest horizon" in said


def test_check_refuses_touch_of_a_model_without_paths(run, tmp_path):
    """What a start would refuse: a baseline or trees at first, and a champion that is one."""
    config, state = tmp_path / "barcast.toml", tmp_path / "s"

    def said(model: str) -> str:
        plain = 'instance = "x"\nstate_dir = "s"\ntimeframe = "1m"\n[model]\n'
        config.write_text(f"{plain}touch = [[2, 1]]\n{model}")
        status, out, err = run("check", str(config))
        assert (status == 78) == bool(err), out
        return " ".join(err.split())

    remedy = "put a checkpoint directory of an SSSD or LDM4TS into model.first, or leave model.touch out"
    for text in (said(""), said('first = "har-s"')):
        assert "model.first: " in text
        assert "of kind baseline and forecasts no paths, which model.touch needs" in text
        assert remedy in text
    for kind, refused in (("lgbm", True), ("sssd", False)):
        (tmp_path / "m").mkdir(exist_ok=True)
        about = {"format": 3, "timeframe": "1m", "kind": kind}
        (tmp_path / "m" / "model.json").write_text(json.dumps(about))
        assert (remedy in said('first = "m"')) == refused
        text = said('name = "m"')
        assert ("into model.name, or leave model.touch out" in text) == refused
    (tmp_path / "m" / "model.json").write_text("{")
    assert "not JSON" in said('first = "m"')
    (tmp_path / "m" / "model.json").write_text(json.dumps(about | {"format": 2}))
    assert "format is 2, not 3" in said('first = "m"')
    (tmp_path / "m" / "model.json").write_text(json.dumps(about | {"timeframe": "1h"}))
    assert "was trained on '1h' bars, not on '1m'" in said('first = "m"')
    (tmp_path / "empty").mkdir()
    assert "model.json: cannot be read" in said('first = "empty"')
    (tmp_path / "m" / "model.json").write_text(json.dumps(about))
    state.mkdir()
    journal = Journal(state / "journal.db")
    assert said('first = "m"') == ""  # no champion yet
    journal.append([(1, Kind.ACTIVATION, "", Champion("fhs", "f", 100, "named").encode())])
    text = said('first = "m"')
    assert "fhs, which is to serve, is of kind baseline" in text
    assert "barcast ctl CONFIG rollback --to" in text
    served = "0123456789abcdef"
    (state / "models" / served).mkdir(parents=True)
    (state / "models" / served / "model.json").write_text(json.dumps(about))
    journal.append([(2, Kind.ACTIVATION, "", Champion(served, "f", 100, "better").encode())])
    journal.close()
    assert said("") == ""  # the champion serves, not fhs
