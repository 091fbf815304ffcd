"""`barcast models`: what a model is, and how large a training would make one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from barcast.backtest.cli.training import Preset
from barcast.backtest.sample import sample_checkpoint
from barcast.models.checkpoint import load, save
from barcast.models.sssd.layers import PRESETS
from tests import kinds

MODEL = str(sample_checkpoint())


def test_a_checkpoint_is_described_for_scripts(run):
    """With --json: what it forecasts, has learnt from and is made of, as it is in the checkpoint."""
    status, out, err = run("models", "describe", MODEL, "--json")
    assert (status, err) == (0, "")
    found, model = json.loads(out), load(Path(MODEL))
    card, net = model.forecaster().card, model.trained.net
    assert (found["model"], found["kind"], found["timeframe"]) == (model.model, "sssd", "session")
    assert (found["horizons"], found["window"]) == ([1, 5, 20], card.window)
    assert (found["sampler"], found["steps"]) == (card.sampler, card.steps)
    assert [found["preset"], *map(found["architecture"].get, ("encoder", "head"))] == ["small", "s4d", "mlp"]
    assert found["path"] == list(range(1, 21))
    assert found["sampler"] == "none"  # the quantiles are those of the map
    assert found["coupling"] == {"sampler": "none", "steps": 0, "samples": 0}  # a Gaussian copula
    assert found["learnt_until"] == "2009-12-31T21:00:00Z"
    assert found["denoiser_step"] == model.trained.record.denoiser_step
    assert found["fingerprint"] == card.fingerprint
    counts = found["parameters"]
    assert counts["all"] == sum(p.numel() for p in net.parameters())
    assert counts["all"] == counts["map"] + counts["encoder"] + counts["denoiser"]
    size = sum(path.stat().st_size for path in Path(MODEL).iterdir())
    assert found["megabytes"] == size / 1e6


def test_a_checkpoint_is_described_for_people(run):
    """The same, line by line."""
    status, out, _ = run("models", "describe", MODEL)
    said = " ".join(out.split())
    assert status == 0
    for part in (
        f"sssd {load(Path(MODEL)).model} forecasts session bars over 1, 5, 20 bars levels 0.05",
        "learnt from 8778 bars to 2009-12-31T21:00:00Z: AAPL, GOOG, IBM, MSFT encoder, head s4d, mlp",
        "preset small sizes features 50, channels 4, context 64",
        "parameters map 155,568, encoder ",
        "paths 20 steps: 1, 2, 3",
        "by default quantiles by the map, not sampled; paths by a Gaussian copula size ",
        " MB ",
        f"torch={torch.__version__}",
    ):
        assert part in said


def test_a_denoiser_that_serves_is_said_to_make_the_paths(run, tmp_path):
    """Where training found that it adds to a Gaussian copula, paths are sampled, and quantiles are not."""
    trained, folder = load(Path(MODEL)).trained, str(tmp_path / "serves")
    assert trained.record.denoiser_step == 0
    save(replace(trained, record=replace(trained.record, denoiser_step=30)), Path(folder))
    status, out, _ = run("models", "describe", folder, "--json")
    found, card = json.loads(out), load(Path(folder)).forecaster(paths=True).card
    assert (status, found["sampler"], card.sampler) == (0, "none", "dpmpp")
    assert found["coupling"] == {"sampler": "dpmpp", "steps": 8, "samples": card.samples}
    status, out, _ = run("models", "describe", folder)
    said = " ".join(out.split())
    assert status == 0
    assert "denoiser of step 30" in said
    assert "by default quantiles by the map, not sampled; paths by the diffusion model: dpmpp, 8 " in said


def test_other_kinds_are_described_too(run, tmp_path):
    """Trees by their number, an ensemble by its members and their weights."""
    trained = load(Path(MODEL)).trained
    save(kinds.ensemble(tmp_path / "members", trained), tmp_path / "mixed")
    status, out, _ = run("models", "describe", str(tmp_path / "members" / "trees"))
    assert status == 0
    assert "trees 21 by default nothing is sampled" in " ".join(out.split())
    status, out, _ = run("models", "describe", str(tmp_path / "mixed"))
    assert status == 0
    assert "member hs weights 0.25, 0.00, 1.00" in " ".join(out.split())
    status, out, _ = run("models", "describe", str(tmp_path / "mixed"), "--json")
    members = json.loads(out)["members"]
    assert [m["weights"] for m in members] == [[0.25, 0, 1], [0.5, 0.5, 0], [0.25, 0.5, 0]]


def test_without_a_model_the_presets_are_shown(run):
    """Each with its parts and parameters, for a number of features that is said; `train` takes them all."""
    status, out, _ = run("models", "describe", "--json")
    presets = json.loads(out)["presets"]
    assert status == 0
    assert [p["preset"] for p in presets] == list(PRESETS) == [p.value for p in Preset]
    assert [p["default"] for p in presets] == [False, True, False]
    for p in presets:
        assert p["architecture"] | PRESETS[p["preset"]] == p["architecture"]
        assert 4 * p["parameters"]["all"] / 1e6 < p["megabytes"] < 35
    status, out, _ = run("models", "describe")
    said = " ".join(out.split())
    assert status == 0
    features = presets[0]["architecture"]["features"]
    assert f"for 1h bars: {features} features, horizons 1, 4, 16; by default small" in said
    assert f"base multiscale unet1d {presets[2]['parameters']['map']:,} " in said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("fhs", "fhs is a baseline, which has no checkpoint; name a checkpoint directory"),
        ("nowhere", "nowhere/model.json: cannot be read (No such file or directory); check the path"),
    ],
)
def test_what_is_no_checkpoint_is_refused(run, model, said):
    """In one sentence, with exit status 78."""
    status, out, err = run("models", "describe", model)
    assert (status, out) == (78, "")
    assert said in " ".join(err.split())
