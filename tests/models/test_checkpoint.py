"""Models on disk: what was saved comes back to the bit, and nothing else is accepted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from barcast.models import CheckpointError, ConfigError, Window, checkpoint, training
from barcast.models.checkpoint import load, open_forecaster, preset_of, save
from barcast.models.scaling import feature_names
from barcast.models.sssd.layers import PRESET, PRESETS
from barcast.models.sssd.network import SSSD
from barcast.models.trained import Trained
from tests import kinds
from tests.models.conftest import HORIZONS

FEATURES = len(feature_names("1h", HORIZONS))


@pytest.fixture
def directory(trained: Trained, tmp_path: Path) -> Path:
    save(trained, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def newest(histories: list[Window]) -> list[Window]:
    """Windows with a few outcomes to calibrate by: each costs a forecast."""
    return [Window(w.symbol, w.close_times[-1950:], w.values[-1950:]) for w in histories]


def test_a_model_comes_back_to_the_bit(trained: Trained, directory: Path, newest: list[Window]) -> None:
    """A loaded model has the id, the record and the forecasts of the one that was saved."""
    checkpoint = load(directory)
    found = checkpoint.trained
    assert found.record == trained.record
    assert (found.scaling.zone, found.scaling.symbols) == (trained.scaling.zone, trained.scaling.symbols)
    assert found.scaling.symbols == ("SYM0", "SYM1")
    before, after = (f.forecast(newest) for f in (trained.forecaster("x"), open_forecaster(directory)))
    for a, b in zip(before, after, strict=True):
        assert a.quantiles.tobytes() == b.quantiles.tobytes()
        assert a.rise.tobytes() == b.rise.tobytes()
    assert open_forecaster(directory).card.model == checkpoint.model


@pytest.fixture
def trees(trained: Trained, tmp_path: Path) -> Path:
    save(kinds.boosted(trained.scaling, trained.levels, trained.record), tmp_path / "boosted")
    return tmp_path / "boosted"


@pytest.fixture
def mixed(trained: Trained, tmp_path: Path) -> Path:
    save(kinds.ensemble(tmp_path / "members", trained), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "members")
    return tmp_path / "mixed"


def _files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["directory", "trees", "mixed"])
def test_every_kind_comes_back_to_the_byte(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, newest: list[Window]
) -> None:
    """A model of any kind, saved again or copied, has the same files, id and forecasts."""
    directory = request.getfixturevalue(kind)
    first = load(directory)
    assert save(first.trained, tmp_path / "again") == first.model
    assert _files(tmp_path / "again") == _files(directory)
    shutil.move(directory, tmp_path / "elsewhere")
    before, after = first.forecaster(), open_forecaster(tmp_path / "elsewhere")
    assert before.card == after.card
    assert after.card.model == first.model
    for a, b in zip(before.forecast(newest), after.forecast(newest), strict=True):
        assert a.quantiles.tobytes() == b.quantiles.tobytes()
        assert (a.mean.tobytes(), a.std.tobytes()) == (b.mean.tobytes(), b.std.tobytes())
        assert a.rise.tobytes() == b.rise.tobytes()


def test_an_ensemble_samples_its_members_as_asked(mixed: Path) -> None:
    """Sampler and steps reach the network in it, and stand on its card; the others have none."""
    card = open_forecaster(mixed, "ddim", 20).card
    assert (card.kind, card.sampler, card.steps) == ("ensemble", "ddim", 20)
    assert "torch" in card.fingerprint
    with pytest.raises(ConfigError, match="steps = 1"):
        open_forecaster(mixed, "ddim", 1)


def test_the_id_of_an_ensemble_covers_weights_and_members(trained: Trained, tmp_path: Path) -> None:
    """Another weight or another member gives another id."""
    mix = kinds.ensemble(tmp_path, trained)
    ids = {save(mix, tmp_path / "mix")}
    ids.add(save(replace(mix, weights=mix.weights[::-1].copy()), tmp_path / "mix"))
    ids.add(save(replace(mix, members=mix.members[1:], weights=np.full((3, 2), 0.5)), tmp_path / "mix"))
    assert len(list((tmp_path / "mix" / "members").iterdir())) == 2
    assert len(ids) == 3


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


def test_a_checkpoint_that_names_no_parts_has_those_of_the_first(directory: Path) -> None:
    """Without encoder and head they are the layers on the bars alone and the perceptron."""
    body = _body(directory)
    for part in ("encoder", "head"):
        del body["architecture"][part]
    _signed(directory, body)
    found = load(directory).trained.net.architecture
    assert (found.encoder, found.head) == ("s4d", "mlp")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_comes_back(preset: str, trained: Trained, tmp_path: Path, newest: list[Window]) -> None:
    """A network of any sizes and parts forecasts what it did, to the bit, and its preset is known."""
    s = trained.scaling
    net = SSSD(training.architecture(preset, s.timeframe, s.horizons), torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.denoiser.leave.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    made = replace(trained, net=net.eval())
    save(made, tmp_path / "model")
    assert preset_of(str(tmp_path / "model")) == preset
    again = load(tmp_path / "model").trained
    before, after, map_alone = (m.raw("x", None, n) for m, n in ((made, 4), (again, 4), (again, 0)))
    (a,), (b,), (c,) = (forecaster.forecast(newest[:1]) for forecaster in (before, after, map_alone))
    assert np.isfinite(a.quantiles).all()
    assert a.quantiles.tobytes() == b.quantiles.tobytes() != c.quantiles.tobytes()


def test_the_preset_of_a_model(mixed: Path, trees: Path) -> None:
    """An ensemble has that of the diffusion model in it; models without one have the default."""
    assert preset_of(str(mixed)) == preset_of(str(trees)) == preset_of("fhs") == PRESET


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
    assert open_forecaster(directory).card.sampler == "none"
    assert open_forecaster(directory, paths=True).card.sampler == "dpmpp"
    card = open_forecaster(directory, "ddim", 20).card
    assert (card.sampler, card.steps) == ("ddim", 20)
    with pytest.raises(ConfigError, match="choose one of angle, "):
        open_forecaster(directory, "dpm")
    with pytest.raises(ConfigError, match=r"'lms' is refused: .* take dpmpp"):
        open_forecaster(directory, "lms")
    with pytest.raises(ConfigError, match="steps = 1"):
        open_forecaster(directory, "ddim", 1)


def _body(directory: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((directory / "model.json").read_text())
    return body


def _signed(directory: Path, body: dict[str, Any]) -> None:
    """Write model.json with a right id, as a foreign program or another version would."""
    body = {k: v for k, v in body.items() if k != "id"}
    file = directory / "weights.safetensors"
    weights = file.read_bytes() if file.exists() else b""
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
    "newer format": (_field("format", 4), "format is 4, not 3"),
    "older format": (_field("format", 2), "format is 2, not 3; .*train again"),
    "foreign kind": (_field("kind", "ldm"), "kind is 'ldm'"),
    "other schedule": (_field("schedule", ["linear", 1000]), "schedule is"),
    "other prediction": (_field("prediction", "epsilon"), "prediction is 'epsilon'"),
    "other window": (_field("window", 10), "window is 10, not"),
    "other features": (_field("features", ["a"]), "features is .'a'., not"),
    "unknown timeframe": (_field("timeframe", "1w"), "timeframe '1w' is unknown"),
    "other statistics": (_statistic("gain", [[1.0]]), r"scaling.gain is \(1, 1\), not \(3, 3, 168\)"),
    "statistics not finite": (
        _statistic("factor", [[float("nan")] * 168] * 3),
        "scaling.factor holds a number",
    ),
    "statistics of zero": (_statistic("std", [0.0] * FEATURES), "scaling.std"),
    "unknown time zone": (_statistic("zone", "Mars/Base"), "scaling.zone is 'Mars/Base', not one of UTC, "),
    "no time zone": (_statistic("zone", None), "got `null`"),
    "a symbol more": (
        _statistic("symbols", ["SYM0", "SYM1", "SYM2"]),
        r"scaling.factor is \(3, 168\), not \(4, 168\)",
    ),
    "a text for symbols": (_statistic("symbols", "SYM0"), "got `str`"),
    "a member less": (
        lambda d: _signed(d, _body(d) | {"architecture": _body(d)["architecture"] | {"members": 7}}),
        r"map\..* is \(8, .* not \(7, ",
    ),
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
    "unknown encoder": (
        lambda d: _signed(d, _body(d) | {"architecture": _body(d)["architecture"] | {"encoder": "lstm"}}),
        "architecture.encoder is 'lstm', none of s4d, multiscale; train again",
    ),
    "a number for a head": (
        lambda d: _signed(d, _body(d) | {"architecture": _body(d)["architecture"] | {"head": 1}}),
        "architecture.head is 1, none of mlp, unet1d; train again",
    ),
    "weights of another head": (
        lambda d: _signed(d, _body(d) | {"architecture": _body(d)["architecture"] | {"head": "unet1d"}}),
        r"architecture needs \d+ weights or more, and weights.safetensors has \d+",
    ),
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


def _member(d: Path, at: int) -> Path:
    return d / "members" / _body(d)["members"][at]["name"]


def _named(change: Callable[[list[dict[str, str]]], object]) -> Callable[[Path], None]:
    def damage(d: Path) -> None:
        body = _body(d)
        change(body["members"])
        _signed(d, body)

    return damage


def _weights(value: object) -> Callable[[Path], None]:
    return _field("weights", value)


def _nested(d: Path) -> None:
    inner, outer = _body(d)["id"], _body(d)
    shutil.copytree(d, d.parent / inner)
    shutil.move(d.parent / inner, d / "members" / inner)
    outer["members"][1] = {"name": inner, "model": inner}
    _signed(d, outer)


TREES: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer format": (_field("format", 4), "format is 4, not 3"),
    "no record": (lambda d: _signed(d, _without(_body(d), "record")), "record is missing; train"),
    "record of a network": (_field("record", {"seed": 0}), "missing required field"),
    "no weights": (lambda d: (d / "weights.safetensors").unlink(), "weights.safetensors: cannot be read"),
    "flipped leaf": (_flip("weights.safetensors", -5), "does not fit the contents"),
    "truncated weights": (
        lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-9]),
        "does not fit the contents",
    ),
    "garbage weights": (_garbage, "not a safetensors file"),
    "statistics of zero": (_statistic("std", [0.0] * FEATURES), "scaling.std"),
    "unknown time zone": (_statistic("zone", "Mars/Base"), "scaling.zone is 'Mars/Base', not one of UTC, "),
    "missing tensor": (_tensors(lambda t: t.pop("roots")), "tensor roots is missing or unknown"),
    "leaf that is no number": (_tensors(lambda t: t["value"].fill_(float("nan"))), "value holds a number"),
    "truncated trees": (
        _tensors(lambda t: t.update({n: t[n][:-1].clone() for n in ("feature", "threshold", "value")})),
        r"children is \(63, 2\) int32, not \(62, 2\) int32",
    ),
    "no trees": (
        _tensors(lambda t: t.update({n: t[n][:0].clone() for n in t if n != "counts"})),
        "counts are .* with a sum of 0",
    ),
    "fewer levels": (_tensors(lambda t: t.update(counts=t["counts"][:, :5].clone())), r"counts is \(3, 5\)"),
    "trees of nobody": (_tensors(lambda t: t["counts"].add_(1)), "counts are .* with a sum of 21"),
    "a quantile without trees": (_tensors(lambda t: t["counts"].mul_(0)), "counts are .* not above 0"),
    "unknown feature": (
        _tensors(lambda t: t["feature"].add_(FEATURES)),
        f"feature reaches from {FEATURES} to .* not from 0 to {FEATURES - 1}",
    ),
    "root beyond": (_tensors(lambda t: t["roots"].add_(60)), "roots reaches from 60"),
    "root before": (_tensors(lambda t: t["roots"].sub_(1)), "roots reaches from -1"),
    "child beyond": (_tensors(lambda t: t["children"][0].fill_(99)), "children of node 0 .*not behind"),
    "circle": (_tensors(lambda t: t["children"][1].fill_(0)), "children of node 1 are not behind it"),
    "half a leaf": (_tensors(lambda t: t["children"][1, 0].fill_(2)), "children of node 1 are not behind it"),
    "another type": (_tensors(lambda t: t.update(value=t["value"].float())), "value is .* float32"),
}

MIXED: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer format": (_field("format", 4), "format is 4, not 3"),
    "edited weights": (
        lambda d: (d / "model.json").write_text(json.dumps(_body(d) | {"weights": [[1]]})),
        "does not fit the contents of model.json, which",
    ),
    "not a number": (_weights([[float("nan"), 0.5, 0.5]] * 3), "weights of horizon 1 are"),
    "not a sum of 1": (_weights([[0.25, 0.5, 0.25], [0.2, 0.2, 0.2], [1, 0, 0]]), "weights of horizon 4 are"),
    "below 0": (_weights([[0.25, 0.5, 0.25], [1, 0, 0], [1.5, -0.25, -0.25]]), "weights of horizon 16 are"),
    "too few": (_weights([[0.5, 0.5]] * 3), r"weights is \(3, 2\), not \(3, 3\)"),
    "ragged": (_weights([[0.5, 0.5], [1.0]]), "model.json: .*; train again"),
    "text": (_weights("equal"), "model.json: .*; train again"),
    "no weights": (lambda d: _signed(d, _without(_body(d), "weights")), "weights is missing; train"),
    "no members": (_field("members", []), r"weights|window"),
    "no record": (lambda d: _signed(d, _without(_body(d), "record")), "record is missing; train"),
    "other window": (_field("window", 10), "window is 10, not"),
    "missing member": (lambda d: shutil.rmtree(_member(d, 1)), "members/[0-9a-f]{16}/model.json: cannot be"),
    "damaged member": (
        lambda d: (_member(d, 2) / "weights.safetensors").write_bytes(b""),
        "members/.*does not fit the contents",
    ),
    "foreign member": (
        lambda d: [shutil.rmtree(_member(d, 2)), shutil.copytree(_member(d, 1), _member(d, 2))],
        "which is another model or an ensemble; copy",
    ),
    "ensemble in itself": (_nested, "which is another model or an ensemble; copy"),
    "unknown baseline": (
        _named(lambda m: m[0].update(name="garch9")),
        "member 'garch9' is neither a baseline",
    ),
    "member outside": (_named(lambda m: m[1].update(name="../../model")), "member '../../model' is neither"),
    "other arithmetic": (_named(lambda m: m[0].update(model="hs-0")), "members is .'hs-0'"),
    "member of other horizons": (
        lambda d: _signed(d, _body(d) | {"horizons": [1, 4, 8]}),
        "horizons of member .* is .1, 4, 16., not .1, 4, 8.",
    ),
    "a list for a member": (_field("members", [["hs"]]), "model.json: .*; train again"),
}


@pytest.mark.parametrize(
    ("kind", "what"), [*(("trees", what) for what in TREES), *(("mixed", what) for what in MIXED)]
)
def test_a_damaged_model_of_another_kind_is_refused(
    request: pytest.FixtureRequest, kind: str, what: str
) -> None:
    """Trees and ensembles are checked as the network is: file, finding and remedy in one sentence."""
    directory: Path = request.getfixturevalue(kind)
    damage, words = {"trees": TREES, "mixed": MIXED}[kind][what]
    damage(directory)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(directory)
    assert ";" in str(caught.value) or "check the path" in str(caught.value)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_is_refused_in_one_sentence(directory: Path, what: str) -> None:
    """A damaged, foreign or newer model raises CheckpointError with file, finding and remedy."""
    damage, words = DAMAGE[what]
    damage(directory)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(directory)
    assert ";" in str(caught.value) or "check the path" in str(caught.value)
    assert str(directory) in str(caught.value)
