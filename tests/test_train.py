"""`barcast train` as a person uses it: killed and started again, by several processes, with a log to read."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import polars as pl
import pytest
from safetensors.numpy import load_file

from barcast.backtest.sample import sample_bars
from barcast.backtest.tables import PREFIX
from barcast.models import ConfigError
from barcast.models.checkpoint import preset_of
from tests.integration.broker import free_port

DAILY = ["--stamp", "close", "--timeframe", "session", "--calendar", "XNYS", "--symbol", "IBM"]
QUICK = [*DAILY, "--until", "2003-01-01", "--steps", "13"]
QUICKER = [*QUICK[:-1], "5"]

pytestmark = pytest.mark.usefixtures("few_looks")

KILLED = """
import os, random, signal, sys
import barcast.backtest.cli as cli
dice = random.Random(4)
for _ in range(2):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 2)
        cli.main()
    os.close(writing)
    epochs = (line for line in open(reading, "rb") if b'"epoch"' in line)
    for _ in range(dice.randint(1, 9)):
        next(epochs)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> str:
    """All years of one symbol."""
    path = tmp_path_factory.mktemp("bars") / "bars.parquet"
    pl.read_parquet(sample_bars()).filter(symbol="IBM").write_parquet(path)
    return str(path)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter with one thread; whatever it starts ends with it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=PIPE, stderr=PIPE, text=True, env=env, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def epochs(err: str) -> list[dict[str, object]]:
    """The log lines about epochs."""
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "epoch"]


def named(folder: Path) -> set[str]:
    """What lies in a folder, less the bars that a killed process leaves there."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(PREFIX)}


def test_a_killed_training_goes_on_to_the_same_model(run, bars, tmp_path, few_looks):
    """Killed with SIGKILL at random moments and started again, the model has the id of one left alone."""
    status, _, whole = run("train", bars, *QUICK, "--out", str(tmp_path / "whole"))
    assert status == 0, whole
    killed = tmp_path / "killed"
    assert python("-c", few_looks + KILLED, "train", bars, *QUICK, "--out", str(killed)).returncode == 0
    assert named(tmp_path) - {".killed.training.new", ".killed.lock"} == {"whole", ".killed.training"}
    status, _, err = run("train", bars, *QUICK, "--out", str(killed))
    assert status == 0, err
    assert "the training goes on from" in err
    assert 0 < len(epochs(err)) < len(epochs(whole))
    for name in ("model.json", "weights.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert named(tmp_path) == {"killed", "whole"}


def test_each_epoch_is_a_log_line_with_both_losses(run, bars, tmp_path):
    """Where nobody watches a terminal each look at validation is a line; the record keeps the curve."""
    status, _, err = run("train", bars, *QUICK, "--out", str(tmp_path / "model"))
    assert status == 0, err
    record = json.loads((tmp_path / "model" / "model.json").read_text())["record"]
    assert [{k: line[k] for k in ("phase", "step", "crps", "loss")} for line in epochs(err)] == [
        {k: c[k] for k in ("phase", "step", "crps", "loss")} for c in record["candidates"]
    ]
    assert (record["precision"], record["processes"]) == ("fp32", 1)


def test_processes_of_two_hosts_train_one_model(bars, run, tmp_path, few_looks):
    """Under torchrun two processes share each batch, each as on a host and disk of its own; the first one
    writes and speaks.
    """
    status, _, err = run("train", bars, *QUICKER, "--out", str(tmp_path / "one"))
    assert status == 0, err
    me = tmp_path / "me.py"
    me.write_text(f"{few_looks}from barcast.backtest import cli\ncli.main()\n")
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    meet += ["--master_port", str(free_port())]
    (tmp_path / "far").mkdir()

    def host(rank: int) -> subprocess.CompletedProcess[str]:
        launch = ["-m", "torch.distributed.run", *meet, "--node_rank", str(rank), str(me)]
        out = tmp_path / ("two" if rank == 0 else "far/two")
        return python(*launch, "train", bars, *QUICKER, "--out", str(out))

    with ThreadPoolExecutor(2) as both:
        first, second = both.map(host, (0, 1))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (first.stderr.count("written to"), second.stderr.count("written to")) == (1, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["far", "me.py", "one", "two"]
    assert not list((tmp_path / "far").iterdir())
    records = [json.loads((tmp_path / n / "model.json").read_text())["record"] for n in ("one", "two")]
    assert [r["processes"] for r in records] == [1, 2]
    curves = [[(c["phase"], c["step"]) for c in r["candidates"]] for r in records]
    assert curves[0] == curves[1]
    for a, b in zip(records[0]["candidates"], records[1]["candidates"], strict=True):
        assert b["crps"] == pytest.approx(a["crps"], rel=1e-5)
        assert b["loss"] == (a["loss"] and pytest.approx(a["loss"], rel=1e-4))
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        assert other[name] == pytest.approx(weights, rel=1e-3, abs=1e-4), name


def test_the_network_has_the_sizes_of_its_preset(run, bars, tmp_path):
    """A preset by name, or that of the model to start from; what it does not go with is refused."""
    tiny, next_one = str(tmp_path / "tiny"), str(tmp_path / "next")
    status, _, err = run("train", bars, *QUICKER, "--out", tiny, "--preset", "tiny")
    assert status == 0, err
    status, _, err = run("train", bars, *QUICKER, "--out", next_one, "--init-from", tiny)
    assert status == 0, err
    assert preset_of(tiny) == preset_of(next_one) == "tiny"
    status, _, err = run("train", bars, *QUICKER, "--out", next_one, "--init-from", tiny, "--preset", "small")
    assert (status, "train from scratch" in " ".join(err.split())) == (78, True)
    status, _, err = run("train", bars, *DAILY, "--out", next_one, "--kind", "lgbm", "--preset", "small")
    assert (status, "--preset does not go with --kind lgbm" in " ".join(err.split())) == (2, True)


def test_second_training_of_one_model_is_refused(run, bars, tmp_path):
    """While one is at work another with the same --out ends at once; of another model it does not."""
    lock = tmp_path / ".model.lock"
    with lock.open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        status, _, err = run("train", bars, *QUICKER, "--out", str(tmp_path / "model"))
        assert (status, "another training of" in err, "timeframe" in err) == (78, True, False)
        assert [*tmp_path.iterdir()] == [lock]
        mixed = ["--kind", "ensemble", "--member", "hs", "--member", "ewma"]
        assert run("train", bars, *DAILY, *mixed, "--out", str(tmp_path / "b"))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {".model.lock", "b"}


@pytest.mark.parametrize(
    ("state", "said"), [(True, "the same command goes on with it"), (False, "nothing of it")]
)
def test_interrupted_training_says_what_is_left(run, bars, tmp_path, monkeypatch, state, said):
    """Whoever ends it by hand is told whether the same command goes on."""

    def ended(*_, **__):
        if state:
            (tmp_path / ".model.training").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("barcast.backtest.cli.training._train", ended)
    _, _, err = run("train", bars, *QUICKER, "--out", str(tmp_path / "model"))
    assert f"interrupted: {said}" in err
    assert not (tmp_path / ".model.lock").exists()


def test_what_may_mislead_is_said(run, bars, tmp_path):
    """A wild close, bars that are missing and a last time far ahead are told before the training."""
    rows = pl.read_parquet(bars).sort("close_time").with_row_index("n")
    wild = rows.with_columns(close=pl.when(pl.col("n") == 500).then(100 * pl.col("close")).otherwise("close"))
    wild = wild.with_columns(high=pl.max_horizontal("high", "close")).filter(
        ~pl.col("n").is_in([700, 710, 720])
    )
    short = rows.with_columns(symbol=pl.lit("SHORT")).head(900)
    pl.concat([wild, short]).drop("n").write_parquet(tmp_path / "wild.parquet")
    given = [*DAILY[:-2], "--kind", "ensemble", "--member", "hs", "--member", "ewma"]
    status, _, err = run("train", str(tmp_path / "wild.parquet"), *given, "--out", str(tmp_path / "model"))
    assert status == 0, err
    assert "IBM jumped 2 times, to 1" in err
    assert "the model learns one as a return; declare a split" in err
    assert "IBM lacks 3 bars that the calendar XNYS has (the most, 1, after" in err
    assert "SHORT ends at" in err
    assert "before the end: the model learns nothing of it after that" in err


def test_members_that_are_none_are_told(run, bars, tmp_path):
    """Too few of an ensemble are refused before the bars are read; a misspelt one is named with baselines."""
    given = [*DAILY, "--kind", "ensemble", "--member", "hs", "--out", str(tmp_path / "model")]
    status, _, err = run("train", bars, *given)
    assert (status, "give --member twice" in " ".join(err.split()), "timeframe" in err) == (2, True, False)
    status, _, err = run("train", bars, *given, "--member", "emwa")
    assert (status, "no baseline is called so: did you mean ewma?" in err) == (78, True)


def test_no_time_at_all_is_a_fault(run, bars, tmp_path):
    """A cap that leaves no time for a step ends in a sentence, and leaves nothing behind."""
    status, _, err = run("train", bars, *QUICK, "--minutes", "0", "--out", str(tmp_path / "model"))
    assert status == 78
    assert "leaves no time for a step: allow more" in err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_retraining_does_not_reach_the_next_one(run, bars, tmp_path, few_looks):
    """What is left of a retraining is gone on from with the same bars only; with others it begins anew."""
    history = tmp_path / "state" / "history"
    history.mkdir(parents=True)
    known = pl.read_parquet(bars)
    config = tmp_path / "barcast.toml"
    config.write_text(
        'instance = "x"\nstate_dir = "state"\ntimeframe = "session"\ncalendar = "XNYS"\n'
        '[retrain]\ncron = "0 3 * * *"\nsteps = 2\nnice = 0\n'
    )
    challenger = tmp_path / "state" / "challengers" / "trained"
    arguments = ("train-challenger", str(config), "--out", str(challenger), "--champion", "fhs")
    known.head(700).write_parquet(history / "bars.parquet")
    assert run(*arguments)[0] == 0
    state = challenger.with_name(".trained.training")
    assert not state.exists()
    first = challenger.joinpath("model.json").read_bytes()

    killed = few_looks + KILLED.replace("range(2)", "range(1)").replace("(1, 9)", "(2, 2)")
    interrupted = python("-c", killed, *arguments)
    assert interrupted.returncode == 0, interrupted.stderr
    assert state.exists()
    left = state.read_bytes()
    status, _, err = run(*arguments)
    assert (status, "goes on from" in err) == (0, True), err
    assert challenger.joinpath("model.json").read_bytes() == first

    state.write_bytes(left)
    known.head(800).write_parquet(history / "bars.parquet")
    status, _, err = run(*arguments)
    assert (status, "of other bars, options or versions: the training begins anew" in err) == (0, True), err
    assert challenger.joinpath("model.json").read_bytes() != first
    assert not state.exists()


def test_options_of_ldm4ts_reach_its_training(run, bars, tmp_path, monkeypatch):
    """Each by its name; with another kind each is refused, and a folder that is none in one sentence."""
    from barcast.models.ldm4ts import training as latent

    given = {"vae": tmp_path / "vae", "text": tmp_path / "text", "image": 128}
    given |= {"attention": "auto", "checkpoint_gradients": True}
    options = ["--vae", str(tmp_path / "vae"), "--text", str(tmp_path / "text"), "--image-size", "128"]
    options += ["--attention", "auto", "--checkpoint-gradients"]
    command = ["train", bars, *QUICKER, "--out", str(tmp_path / "model")]
    seen = {}

    def train(_, **options):
        seen.update(options)
        raise ConfigError("seen")

    with monkeypatch.context() as patch:
        patch.setattr(latent, "train", train)
        status, _, err = run(*command, "--kind", "ldm4ts", *options)
    assert (status, "seen" in err) == (78, True)
    assert given.items() <= seen.items()
    for words in (options[:2], options[2:4], options[6:8], options[8:]):
        status, _, err = run(*command, *words)
        assert (status, f"{words[0]} does not go with --kind sssd" in " ".join(err.split())) == (2, True)
    status, _, err = run(*command, "--kind", "ldm4ts", *options[:2])
    assert (status, "config.json cannot be read" in err) == (78, True)
