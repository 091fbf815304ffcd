"""Strategies in settings: as a command line writes them, as a file has them, as the journal keeps them."""

import json

import msgspec
import pytest

from barcast.backtest.replay import replay
from barcast.backtest.sample import sample_strategy
from barcast.daemon.config import load
from barcast.daemon.pipeline import Pipeline, Settings, StrategySettings
from barcast.daemon.ports import Activation, Arrival, Revision
from barcast.models import ConfigError
from tests.daemon.test_targets import Kept
from tests.fakes import MINUTE, START, Spread, bar, settings

LEAST = 'instance = "a"\nstate_dir = "s"\ntimeframe = "1m"\n'
MINE = sample_strategy().read_text()


@pytest.fixture
def mine(tmp_path):
    """A file with a strategy, its path."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize(
    ("text", "kind", "name", "params"),
    [
        ("rank", "rank", "rank", {}),
        ("rank:share=.25,least=6", "rank", "rank", {"share": 0.25, "least": 6}),
        ("rank: share = 0.25 , name=slow", "rank", "slow", {"share": 0.25}),
        ("rank:name='a.b'", "rank", "a.b", {}),
        ("rank:name=5", "rank", "5", {}),
        ("median-drift:gain=1e1,costs=0", "median-drift", "median-drift", {"gain": 10.0, "costs": 0}),
    ],
)
def test_parse(text, kind, name, params):
    """A kind and its parameters are written on one line; `name` is the name."""
    made = StrategySettings.parse(text)
    assert (made.kind, made.name, made.params, made.digest) == (kind, name, params, "")
    assert [type(value) for value in made.params.values()] == [type(value) for value in params.values()]


@pytest.mark.parametrize(
    ("tail", "name", "params"),
    [
        ("", "Lean", {}),
        (":Lean", "Lean", {}),
        (":least=0.1", "Lean", {"least": 0.1}),
        (":Lean:least=0.1", "Lean", {"least": 0.1}),
        (":Lean:name=mine,least=0", "mine", {"least": 0}),
    ],
)
def test_parse_of_a_file(mine, tail, name, params):
    """A file and its class take parameters too, and have the digest of the file."""
    made = StrategySettings.parse(f"{mine}{tail}")
    assert (made.name, made.params) == (name, params)
    assert len(made.digest) == 16
    assert made.build().name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("-3", -3), ("1e-3", 1e-3), ("fast", "fast"), ("'5'", "5"), ("", "")],
)
def test_values(tmp_path, text, value):
    """true and false, numbers, and texts, which need quotes only where they look like another value."""
    path = tmp_path / "any.py"
    path.write_text(MINE.replace("least: float = 0.05", "least: bool | int | float | str = 0.05"))
    found = StrategySettings.parse(f"{path}:least={text}").params["least"]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank:", "'rank:': write KIND or KIND:PARAMETER=VALUE"),
        ("rank:share", "'rank:share': write KIND or"),
        ("rank:share=0.2,least", "write KIND or"),
        ("rank:share=0.2,share=0.3", "each parameter once"),
        ("rank:=3", "write KIND or"),
        ("rank:a:b=3", "write KIND or"),
        ("rnak:share=0.2", "kind 'rnak' is unknown: did you mean rank"),
        ("", "kind '' is unknown"),
        ("rank:shar=0.2", "'rank' has no parameter 'shar': did you mean share"),
        ("rank:share=many", "share is 'many', not a number above 0 to 0.5"),
        ("rank:name=a/b", "'a/b' cannot be part of a topic"),
        ("absent.py:Mine", r"absent\.py: No such file"),
        ("absent.py:Mine:gain=1", r"absent\.py: No such file"),
    ],
)
def test_parse_refuses(text, message):
    """What is not of the form, or names what there is not, is one sentence."""
    with pytest.raises(ConfigError, match=message) as caught:
        StrategySettings.parse(text)
    assert "\n" not in str(caught.value)


def test_file_beside_the_configuration(tmp_path, mine, monkeypatch):
    """In a configuration a strategy's file is relative to it, is called after its class, and has a digest."""
    config = tmp_path / "barcast.toml"
    config.write_text(LEAST + '[[strategy]]\nkind = "mine.py:Lean"\nparams = { least = 0.1 }\n')
    monkeypatch.chdir("/")
    [made] = load(config).strategies()
    assert made == StrategySettings.of(f"{mine}:Lean", params={"least": 0.1})
    assert (made.kind, made.name) == (f"{mine}:Lean", "Lean")
    assert load(config) == load(config)
    assert Settings.decode(load(config).settings().encode()) == load(config).settings()


def test_names_of_classes_repeat(tmp_path, mine):
    """Two strategies of one class need names of their own, as of one kind."""
    config = tmp_path / "barcast.toml"
    table = '[[strategy]]\nkind = "mine.py"\n'
    config.write_text(LEAST + table + table)
    with pytest.raises(ConfigError, match=r"\['Lean', 'Lean'\] repeat; give each \[\[strategy\]\] a name"):
        load(config)
    config.write_text(LEAST + table + table + 'name = "other"\n')
    assert [made.name for made in load(config).strategies()] == ["Lean", "other"]


def test_faults_of_a_file_are_said_beside_the_others(tmp_path, mine):
    """A file that fails is one line among the faults of a configuration."""
    mine.write_text("import nothing_like_it\n")
    config = tmp_path / "barcast.toml"
    config.write_text(LEAST + 'max_wait = "never"\n[[strategy]]\nkind = "mine.py"\n')
    with pytest.raises(ConfigError) as caught:
        load(config)
    lines = [line.removeprefix(f"{config}: ") for line in str(caught.value).splitlines()]
    assert [line.split(": ")[0] for line in lines] == ["max_wait", "strategy.0"]
    assert f"strategy {mine}, line 1: ModuleNotFoundError" in lines[1]


def test_running_daemon_keeps_what_it_read(tmp_path, mine):
    """A file that is edited under a running daemon changes nothing in it; the next start reads it."""
    config = tmp_path / "barcast.toml"
    config.write_text(LEAST + '[[strategy]]\nkind = "mine.py"\n')
    running = load(config)
    before = running.settings()
    mine.write_text(MINE.replace("0.05", "0.06"))
    assert running.settings() == before
    assert before.build()[0].least == 0.05
    assert load(config).settings() != before
    assert load(config).settings().build()[0].least == 0.06


def test_settings_of_older_journals(mine):
    """Settings that were journalled without a digest are read, and take the file as it is."""
    made = settings().encode()
    older = json.loads(made)
    for strategy in older["strategies"]:
        del strategy["digest"]
    assert Settings.decode(json.dumps(older).encode()) == settings()
    older["strategies"] = [{"kind": str(mine), "name": "x", "params": {}}]
    assert Settings.decode(json.dumps(older).encode()).build()[0].name == "x"


def test_names_of_settings_repeat():
    """Two strategies of one name would overwrite each other's targets: settings with them are refused."""
    twice = (StrategySettings("rank", "drift"), StrategySettings("median-drift", "drift"))
    made = msgspec.structs.replace(settings(), strategies=twice)
    with pytest.raises(ConfigError, match="strategy names drift, drift repeat; give each a name of its own"):
        made.build()


def story(kind, digest):
    """Three minutes of A under settings with a strategy of that kind, then others."""
    plain = settings(("A",))
    own = json.loads(plain.encode()) | {
        "strategies": [{"kind": kind, "name": "own", "params": {}, "digest": digest}]
    }
    yield Revision(START, json.dumps(own).encode())
    yield Activation(START, "spread", "numpy", 8)
    for m in (1, 2, 3):
        yield Arrival(START + m * MINUTE + 10**9, (bar("A", m),))
    yield Revision(START + 3 * MINUTE + 2 * 10**9, plain.encode())
    yield Arrival(START + 4 * MINUTE + 10**9, (bar("A", 4),))


def test_replay_refuses_a_changed_file(mine):
    """A journal replays with the file that it was recorded with, and says so when it is another one."""
    digest = StrategySettings.of(str(mine)).digest
    kept = Kept()
    replay(story(str(mine), digest), Pipeline(lambda *_: Spread()), kept)
    assert [list(outcome.targets) for outcome in kept.outcomes] == [[], [], ["own"], ["drift"]]
    with pytest.raises(ConfigError, match=r"mine\.py: changed since it was recorded"):
        replay(story(str(mine), "0" * 16), Pipeline(lambda *_: Spread()), Kept())


def test_replay_takes_the_version_that_was_kept(mine, tmp_path):
    """Where a file changed, or is gone, the kept version of the journalled digest gives the same targets."""
    settings = StrategySettings.of(str(mine))
    kept = tmp_path / "strategies"
    kept.mkdir()
    (kept / f"{settings.digest}.py").write_bytes(mine.read_bytes())
    before, after = Kept(), Kept()
    replay(story(str(mine), settings.digest), Pipeline(lambda *_: Spread()), before)
    elsewhere = str(tmp_path / "elsewhere" / "mine.py")
    replay(story(elsewhere, settings.digest), Pipeline(lambda *_: Spread(), kept), after)
    assert [o.targets for o in after.outcomes] == [o.targets for o in before.outcomes]
    assert after.outcomes[2].targets["own"]
    with pytest.raises(ConfigError, match="No such file"):
        replay(story(elsewhere, "1" * 16), Pipeline(lambda *_: Spread(), kept), Kept())


def test_settings_that_are_passed_over_need_no_file(tmp_path):
    """Recovery passes over groups without asking: strategies whose files are gone are not missed."""
    path = Pipeline(lambda *_: Spread())
    for event in story(str(tmp_path / "gone.py"), "0" * 16):
        groups = list(path.take(event))
    [group] = groups
    assert list(path.outcome(group).targets) == ["drift"]
