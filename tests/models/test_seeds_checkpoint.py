"""Checkpoints of `SSSDModel`: four layouts, all or nothing, and what is refused and why."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from barcast.models import CheckpointError
from barcast.models.sssd import ImprovedSSSDModel, SSSDConfig
from tests.models import seeds


def _save(path: Path, body: Any) -> Path:
    torch.save(body, path)
    return path


def _load(path: Path, config: SSSDConfig | None = None) -> ImprovedSSSDModel:
    return ImprovedSSSDModel.from_sssd_checkpoint(
        checkpoint_path=path, config=config or seeds.config(), scheduler_type="ddim"
    )


@pytest.mark.parametrize("layout", ["model_state_dict", "state_dict", "model", None])
def test_every_layout_loads_all_weights(layout: str | None, tmp_path: Path) -> None:
    """Whatever the layout, each weight and buffer arrives, and the forecasts are those of the model saved."""
    model = seeds.model()
    state = model.state_dict()
    path = _save(tmp_path / "x.pt", state if layout is None else {layout: state, "epoch": 3})
    loaded = _load(path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    x = seeds.features(3)
    mine, theirs = (m.inference_forward(x, [1], num_samples=8)[1]["samples"] for m in (loaded, model))
    assert torch.equal(mine, theirs)
    assert not torch.equal(ImprovedSSSDModel(seeds.config(), "ddim").state_dict()["centre"], state["centre"])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """`save_checkpoint` writes weights, settings and what a training adds, which plain torch reads safely."""
    model = seeds.model()
    optimiser = torch.optim.AdamW(model.parameters())
    path = tmp_path / "sssd.pt"
    model.save_checkpoint(path, epoch=4, optimizer_state=optimiser.state_dict(), metrics={"val_loss": 0.5})
    body = torch.load(path, weights_only=True)
    assert set(body) == {"epoch", "model_state_dict", "config", "metrics", "optimizer_state_dict"}
    assert (body["epoch"], body["metrics"]) == (4, {"val_loss": 0.5})
    assert SSSDConfig.from_dict(body["config"]) == model.config
    assert torch.equal(_load(path).leave.weight, model.leave.weight)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"diffusion": {"prediction_type": "epsilon"}}, "model.diffusion.prediction_type = 'epsilon'"),
        ({"diffusion": {"schedule": "scaled_linear"}}, "model.diffusion.schedule = 'scaled_linear'"),
        ({"horizons": {"minutes": [5, 15, 240]}}, "model.horizons.minutes = [5, 15, 240]"),
        ({"encoder": {"timeframes": ["1h", "5m"]}}, "model.encoder.timeframes = ['1h', '5m']"),
    ],
)
def test_other_settings_than_those_of_the_training_are_refused(
    table: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Weights that would fit by shape are refused where the file says that they were trained otherwise."""
    theirs = seeds.TABLES | {"model": seeds.TABLES["model"] | table}
    path = _save(tmp_path / "x.pt", {"model_state_dict": seeds.model().state_dict(), "config": theirs})
    with pytest.raises(CheckpointError) as fault:
        _load(path)
    assert f"was trained with {words}, and the configuration says" in str(fault.value)
    assert "use the former" in str(fault.value)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """A missing, an unknown and a misshapen weight each end in a sentence with its name."""
    state = seeds.model().state_dict()
    lacking = {name: value for name, value in state.items() if name != "leave.bias"}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (lacking, "lacks leave.bias;"),
        ({"leave.bias": state["leave.bias"]}, "lacks centre and "),
        (state | {"tail.weight": torch.zeros(1)}, "has, unknown to this network, tail.weight"),
        (state | {"leave.bias": torch.zeros(7)}, "leave.bias is (7,), and the configuration makes it (24,)"),
    ]
    for body, words in cases:
        with pytest.raises(CheckpointError) as fault:
            _load(_save(tmp_path / "x.pt", {"state_dict": body}))
        assert words in str(fault.value)
    spoilt: list[tuple[Any, str]] = [
        (state | {"leave.bias": torch.full((24,), torch.nan)}, "leave.bias holds what is no finite real"),
        (
            state | {"leave.bias": torch.zeros(24, dtype=torch.complex64)},
            "leave.bias holds what is no finite",
        ),
        ({1: torch.zeros(1)}, "weights under none of model_state_dict"),
    ]
    for body, words in spoilt:
        with pytest.raises(CheckpointError) as fault:
            _load(_save(tmp_path / "x.pt", {"state_dict": body}))
        assert words in str(fault.value)
    for table, words in (({"model": 3}, "config.model is 3, no table"), ({"model": {"s4": 3}}, "= 3")):
        with pytest.raises(CheckpointError) as fault:
            _load(_save(tmp_path / "x.pt", {"state_dict": state, "config": table}))
        assert words in str(fault.value)
    wide = seeds.config(encoder=seeds.TABLES["model"]["encoder"] | {"context_dim": 32})
    with pytest.raises(CheckpointError, match=r"leave\.weight is \(24, 16\), and the configuration makes it"):
        _load(_save(tmp_path / "x.pt", state), wide)


class _Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harmed",)


def test_a_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that would run something, and files that are none, are refused with the reason."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as tensors and plain values"):
        _load(_save(tmp_path / "x.pt", {"model": seeds.model().state_dict(), "by": _Harmful()}))
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(CheckpointError, match=r"text\.pt: cannot be read as tensors"):
        _load(tmp_path / "text.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut\.pt: cannot be read as tensors"):
        _load(tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="there is no such file; name a checkpoint"):
        _load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds a list, no dictionary"):
        _load(_save(tmp_path / "x.pt", [1]))
    with pytest.raises(CheckpointError, match="holds epoch, and weights under none of model_state_dict"):
        _load(_save(tmp_path / "x.pt", {"epoch": 3}))


def test_a_damaged_file_is_refused_or_loads(tmp_path: Path) -> None:
    """Whichever of its first bytes is another, there is either a sentence or a model."""
    path = _save(tmp_path / "whole.pt", seeds.model().state_dict())
    content, damaged, refused = path.read_bytes(), tmp_path / "damaged.pt", 0
    for at in range(0, 4000, 40):
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            _load(damaged)
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_the_former_weights_are_real_shaped() -> None:
    """The names and shapes that stand in for the former SSSD's have its 7,804,201 parameters."""
    weights = seeds.former_weights()
    buffers = 10_000 * 128  # of the timestep embedding
    assert sum(value.numel() for value in weights.values()) - buffers == 7_804_201


@pytest.mark.parametrize("layout", ["model_state_dict", "state_dict", "model", None])
def test_weights_of_the_former_model_are_refused_with_the_mismatch(
    layout: str | None, tmp_path: Path
) -> None:
    """They are recognised in each layout, and the sentence says which layers cannot be taken and why."""
    weights = seeds.former_weights()
    weights["encoder.timeframe_encoders.5m.layers.0.s4._kernel_cache"] = torch.zeros(200, 500)
    path = _save(tmp_path / "x.pt", weights if layout is None else {layout: weights, "config": {"model": {}}})
    with pytest.raises(CheckpointError) as fault:
        _load(path, SSSDConfig())
    sentence = str(fault.value)
    assert "weights of the former SSSD" in sentence
    assert (
        "encoder.timeframe_encoders.5m.layers.0.s4.Lambda are 128 real poles that all channels share"
        in sentence
    )
    assert "a denoiser of 1024 inputs" in sentence
    assert sentence.endswith("train one with this version")


def test_other_samplers_take_the_same_weights(tmp_path: Path) -> None:
    """One checkpoint serves all four samplers, which come near to each other with many steps."""
    model, x = seeds.model(), seeds.features(3)
    path = tmp_path / "x.pt"
    model.save_checkpoint(path)
    fine = []
    for name in ("dpmpp", "ddim", "euler", "kdpm2"):
        loaded = ImprovedSSSDModel.from_sssd_checkpoint(path, seeds.config(), scheduler_type=name)
        found = loaded.inference_forward(x, [0], num_samples=50, num_steps=200)[0]
        fine.append(found["samples"])
    spread = fine[0].std()
    assert all((other - fine[0]).abs().max() < 0.06 * spread for other in fine[1:])
