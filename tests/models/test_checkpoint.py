"""Models on disk: what was saved comes back to the bit, and nothing else is accepted."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from barcast.models import CheckpointError, ConfigError, Window, checkpoint
from barcast.models.checkpoint import load, open_forecaster, save
from barcast.models.diffusion import SSSDForecaster
from barcast.models.sssd import SSSD
from barcast.models.trained import Trained


@pytest.fixture
def directory(trained: Trained, tmp_path: Path) -> Path:
    save(trained, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_comes_back_to_the_bit(trained: Trained, directory: Path, histories: list[Window]) -> None:
    """A loaded model has the id, the record and the forecasts of the one that was saved."""
    checkpoint = load(directory)
    assert checkpoint.trained.record == trained.record
    before = SSSDForecaster(trained.net, trained.scaling, trained.levels, "x").forecast(histories)
    after = open_forecaster(directory).forecast(histories)
    for a, b in zip(before, after, strict=True):
        assert a.quantiles.tobytes() == b.quantiles.tobytes()
        assert a.rise.tobytes() == b.rise.tobytes()
    assert open_forecaster(directory).card.model == checkpoint.model


def test_the_id_is_a_hash_of_the_contents(trained: Trained, directory: Path, tmp_path: Path) -> None:
    """Saving again gives the same 16 hex digits and bytes; the smallest change of a weight gives others."""
    model = load(directory).model
    assert save(load(directory).trained, tmp_path / "copy") == model
    for name in ("model.json", "weights.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (directory / name).read_bytes()
    changed = load(directory).trained
    with torch.no_grad():
        changed.net.denoiser.leave.bias[0] += 1e-7
    assert save(changed, tmp_path / "other") != model
    assert len(model) == 16
    assert int(model, 16) >= 0


def test_saving_replaces_a_directory_as_a_whole(trained: Trained, directory: Path) -> None:
    """Saving over a model leaves exactly the new files, and no temporary ones beside it."""
    (directory / "stray").write_text("x")
    save(trained, directory)
    assert sorted(p.name for p in directory.iterdir()) == ["model.json", "weights.safetensors"]
    assert [p.name for p in directory.parent.iterdir()] == ["model"]


def test_every_number_of_the_network_is_read(
    trained: Trained, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a loaded network is as it was made: made of NaN, it is still the one that was saved."""

    def of_nothing(*arguments: Any) -> SSSD:
        net = SSSD(*arguments)
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.fill_(float("nan"))
        return net

    monkeypatch.setattr(checkpoint, "SSSD", of_nothing)
    found, saved = load(directory).trained.net, trained.net
    names = {name for name, _ in (*found.named_parameters(), *found.named_buffers())}
    assert names == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_sampler_and_steps_are_chosen_when_a_model_is_opened(directory: Path) -> None:
    """One key chooses the sampler; what does not exist is refused with the choices."""
    assert open_forecaster(directory).card.sampler == "dpmpp"
    card = open_forecaster(directory, "ddim", 20).card
    assert (card.sampler, card.steps) == ("ddim", 20)
    with pytest.raises(ConfigError, match="ddim, dpmpp"):
        open_forecaster(directory, "euler")
    with pytest.raises(ConfigError, match="steps = 1"):
        open_forecaster(directory, "ddim", 1)


def _body(directory: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((directory / "model.json").read_text())
    return body


def _signed(directory: Path, body: dict[str, Any]) -> None:
    """Write model.json with a right id, as a foreign program or another version would."""
    body = {k: v for k, v in body.items() if k != "id"}
    weights = (directory / "weights.safetensors").read_bytes()
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    model = sha256(canonical + b"\0" + weights).hexdigest()[:16]
    (directory / "model.json").write_text(json.dumps({"id": model, **body}))


def _field(name: str, value: object) -> Callable[[Path], None]:
    return lambda d: _signed(d, _body(d) | {name: value})


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(d: Path) -> None:
        tensors = load_file(d / "weights.safetensors")
        change(tensors)
        save_file(tensors, d / "weights.safetensors")
        _signed(d, _body(d))

    return damage


def _flip(name: str, at: int) -> Callable[[Path], None]:
    def damage(d: Path) -> None:
        content = bytearray((d / name).read_bytes())
        content[at] ^= 1
        (d / name).write_bytes(content)

    return damage


def _without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k != name}


def _statistic(name: str, value: object) -> Callable[[Path], None]:
    return lambda d: _signed(d, _body(d) | {"scaling": _body(d)["scaling"] | {name: value}})


def _garbage(d: Path) -> None:
    (d / "weights.safetensors").write_bytes(b"x" * 100)
    _signed(d, _body(d))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "model.json: cannot be read"),
    "no weights": (lambda d: (d / "weights.safetensors").unlink(), "weights.safetensors: cannot be read"),
    "not JSON": (lambda d: (d / "model.json").write_text("{"), "not JSON"),
    "not text": (lambda d: (d / "model.json").write_bytes(b"\xff\xfe"), "not JSON"),
    "not an object": (lambda d: (d / "model.json").write_text("[1]"), "holds a list"),
    "flipped weight": (_flip("weights.safetensors", -5), "does not fit the contents"),
    "truncated weights": (
        lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-9]),
        "does not fit the contents",
    ),
    "edited field": (
        lambda d: (d / "model.json").write_text(json.dumps(_body(d) | {"timeframe": "4h"})),
        "does not fit the contents",
    ),
    "newer format": (_field("format", 2), "format is 2, not 1"),
    "foreign kind": (_field("kind", "ldm"), "kind is 'ldm'"),
    "other schedule": (_field("schedule", ["linear", 1000]), "schedule is"),
    "other prediction": (_field("prediction", "epsilon"), "prediction is 'epsilon'"),
    "other window": (_field("window", 10), "window is 10, not"),
    "other features": (_field("features", ["a"]), "features is .'a'., not"),
    "unknown timeframe": (_field("timeframe", "1w"), "timeframe '1w' is unknown"),
    "other statistics": (_statistic("gain", [[1.0]]), r"scaling.gain is \(1, 1\), not \(3, 168\)"),
    "statistics not finite": (_statistic("factor", [float("nan")] * 168), "scaling.factor holds a number"),
    "statistics of zero": (_statistic("std", [0.0] * 80), "scaling.std"),
    "falling levels": (_field("levels", [0.9, 0.1]), r"levels \(0.9, 0.1\) cannot be used"),
    "text for a time": (
        lambda d: _signed(d, _body(d) | {"record": _body(d)["record"] | {"until": "now"}}),
        "got `str`",
    ),
    "negative size": (
        lambda d: _signed(d, _body(d) | {"architecture": _body(d)["architecture"] | {"width": -1}}),
        "architecture.width is -1",
    ),
    "no window": (lambda d: _signed(d, _without(_body(d), "window")), "window is None"),
    "nested too deep": (lambda d: (d / "model.json").write_text("[" * 99_999), "not JSON"),
    "no record": (lambda d: _signed(d, _without(_body(d), "record")), "record is missing; train"),
    "unknown size": (
        lambda d: _signed(d, _body(d) | {"architecture": _body(d)["architecture"] | {"heads": 4}}),
        "unexpected keyword argument 'heads'",
    ),
    "missing tensor": (_tensors(lambda t: t.pop("whiten")), "tensor whiten is missing or unknown"),
    "extra tensor": (_tensors(lambda t: t.update(more=torch.ones(1))), "tensor more is missing or unknown"),
    "other shape": (_tensors(lambda t: t.update(whiten=torch.eye(4))), r"whiten is \(4, 4\)"),
    "other type": (_tensors(lambda t: t.update(whiten=torch.eye(3).double())), "whiten is .* torch.float64"),
    "not finite": (_tensors(lambda t: t["map.static"].fill_(float("nan"))), "map.static holds a number"),
    "garbage weights": (
        _garbage,
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_is_refused_in_one_sentence(directory: Path, what: str) -> None:
    """A damaged, foreign or newer model raises CheckpointError with file, finding and remedy."""
    damage, words = DAMAGE[what]
    damage(directory)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(directory)
    assert ";" in str(caught.value) or "check the path" in str(caught.value)
    assert str(directory) in str(caught.value)
