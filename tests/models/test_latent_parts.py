"""What an LDM4TS can be trained with: given parts, less memory, other attention; and what that changes."""

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Generator

from barcast.models import CheckpointError, ConfigError, Window, checkpoint
from barcast.models.checkpoint import learner_like, load, save
from barcast.models.description import describe
from barcast.models.ldm4ts import language, training
from barcast.models.ldm4ts.attention import set_gradient_checkpointing
from barcast.models.ldm4ts.autoencoder import sizes_of
from barcast.models.ldm4ts.network import LDM4TS, LatentArchitecture
from barcast.models.ldm4ts.trained import LatentTrained
from barcast.models.optimiser import Progress, Share
from tests.checks import bits, forecast_does_not_depend_on_its_batch
from tests.garch import simulate
from tests.kernels import both, flash_attn_func, installed, package
from tests.models.test_autoencoder import SD, drawn

OUTPUTS: dict[str, Any] = {
    "timeframe": "1h",
    "horizons": (1, 4),
    "levels": (0.1, 0.5, 0.9),
    "preset": "tiny",
    "steps": 1,
}
FEW = {"map": 30, "autoencoder": 8, "diffusion": 4, "gate": 8}
BATCH = 8


@pytest.fixture(scope="module")
def bars() -> list[Window]:
    return [simulate("SYM", 1800, seed=7, season=True).window]


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    return [simulate(f"NEW{i}", 1700, seed=20 + i).window for i in range(2)]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOOK_ORIGINS", FEW)
        patch.setattr(training, "LEARNT", 20)
        patch.setattr(training, "BATCHES", dict.fromkeys(FEW, BATCH))
        patch.setattr(training, "LOOK_SAMPLES", 2)
        patch.setattr(training, "SAMPLES", 4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder as Stable Diffusion's, but narrower."""
    path = tmp_path_factory.mktemp("sd") / "vae"
    drawn(AutoencoderKL(**SD | {"block_out_channels": (32,) * 4})).save_pretrained(path)
    return path


def begun(bars: list[Window], vae: Any = None) -> training._Training:
    """A training before its first step, with the weights of a U-Net that says something."""
    data = training.split(bars, "1h", (1, 4), None, validation=0.0, hold_out=0.0)
    features = data.learn.features.shape[1]
    a = LatentArchitecture.of(
        "tiny", features=features, channels=4, context=64, horizons=2, path=4, samples=4
    )
    if vae is not None:
        a = replace(a, given=True, **sizes_of(vae))
    made = training._Training(data, (0.1, 0.5, 0.9), 0, 2, None, a, vae)
    drawn(made.net)
    made._prepare_latents()
    return made


def gradients(made: training._Training, of: str, parts: int = 1) -> dict[str, torch.Tensor]:
    """Those of a phase's loss over a whole batch, computed in parts."""
    made.net.zero_grad()
    for part in range(parts):
        loss = getattr(made, of)(Share(part, parts, Generator().manual_seed(3)))
        (loss / parts).backward()
    return {name: p.grad.clone() for name, p in made.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["_image_loss", "_velocity_loss"])
def test_less_memory_is_the_same_gradient(bars: list[Window], loss: str) -> None:
    """Of the training's own losses, checkpointed to 1e-6, and to 1e-5 in 2, 4 and 8 parts."""
    made = begun(bars)
    made.net.train()
    whole = gradients(made, loss)
    assert len(whole) > 50
    for parts in (2, 4, 8):
        for name, x in gradients(made, loss, parts).items():
            assert float((x - whole[name]).abs().max()) < 1e-5, name
    assert set_gradient_checkpointing(made.net, True) == 2
    for name, x in gradients(made, loss).items():
        assert float((x - whole[name]).abs().max()) < 1e-6, name


def train(bars: list[Window], **options: Any) -> tuple[LatentTrained, list[str]]:
    """A training, and what it noted."""
    notes: list[str] = []

    def hear(p: Progress) -> None:
        if p.note:
            notes.append(p.note)

    return training.train(bars, **OUTPUTS | options, progress=hear), notes


def test_a_training_goes_down_the_ladder(bars: list[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the phase that needs too much, step by step, each noted; earlier phases are kept as they are."""
    known = training._Training._velocity_loss
    tried: list[tuple[bool, int]] = []

    def greedy(self: training._Training, share: Share) -> torch.Tensor:
        tried.append((self.net.unet.is_gradient_checkpointing, share.of))
        if share.of < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return known(self, share)

    plain, none = train(bars)
    assert none == []
    monkeypatch.setattr(training._Training, "_velocity_loss", greedy)
    phases: list[str] = []
    maps = training._Training._map_loss
    monkeypatch.setattr(
        training._Training, "_map_loss", lambda self, share: (phases.append("map"), maps(self, share))[1]
    )
    found, notes = train(bars)
    assert list(dict.fromkeys(tried)) == [(False, 1), (True, 1), (True, 2), (True, 4)]
    assert [note.split(": ")[-1] for note in notes if note.startswith("out of memory")] == [
        "checkpointing gradients",
        "a batch of 4",
        "a batch of 2",
    ]
    assert sum("attention backend flash left out" in note for note in notes) == 1
    assert sum("the training goes on: diffusion, step 0" in note for note in notes) == 3
    assert len(phases) == OUTPUTS["steps"]
    assert (found.record.accumulate, found.record.checkpointed, found.record.attention) == (4, True, "sdpa")
    assert not found.net.unet.is_gradient_checkpointing
    for part in ("temporal", "map", "vae", "read"):
        theirs = getattr(plain.net, part).state_dict()
        assert all(torch.equal(x, theirs[name]) for name, x in getattr(found.net, part).state_dict().items())


def test_smaller_images_are_another_training(bars: list[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of the ladder: it begins anew, and is the model that was asked for so, to its id."""
    known = LDM4TS.reconstructed

    def greedy(self: LDM4TS, image: torch.Tensor) -> Any:
        if image.shape[-1] > 64:
            raise MemoryError
        return known(self, image)

    monkeypatch.setattr(LDM4TS, "reconstructed", greedy)
    found, notes = train(bars, image=128, accumulate=4)
    assert notes[-1] == "out of memory (MemoryError): images of 64 pixels"
    asked, _ = train(bars, image=64, accumulate=8, checkpoint_gradients=True)
    assert found.net.architecture == asked.net.architecture
    assert found.record == asked.record
    theirs = asked.net.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in found.net.state_dict().items())


def test_attention_of_a_training(bars: list[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    """By name or refused with the reason; a kernel attends while it learns, and never when it serves."""
    calls: list[int] = []

    def counted(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(len(q))
        return flash_attn_func(q, *rest, **options)

    counted.__name__ = "flash_attn_func"
    with both(), pytest.raises(ConfigError, match="sage cannot be used: sageattention has no backward pass"):
        train(bars, attention="sage")
    with (
        installed(package("flash_attn", counted), device="cuda"),
        pytest.raises(ConfigError, match="it computes on cuda, and the model is on cpu; choose sdpa"),
    ):
        train(bars, attention="flash")
    with installed(package("flash_attn", counted)):
        found, notes = train(bars, attention="auto")
    assert notes[0].startswith("attention by flash; not sage: sageattention has no backward pass")
    assert calls
    assert found.record.attention == "flash"
    calls.clear()
    found.raw("x").forecast([simulate("NEW", 1700, seed=20).window])
    assert not calls
    with pytest.raises(ConfigError, match="'quick' is unknown"):
        train(bars, attention="quick")


def test_a_given_autoencoder_is_kept(
    bars: list[Window], windows: list[Window], folder: Path, tmp_path: Path
) -> None:
    """Not learnt, kept in the checkpoint, which needs the folder no more; a challenger has the same."""
    found, _ = train(bars, vae=folder)
    weights = AutoencoderKL.from_pretrained(folder).state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in found.net.vae.state_dict().items())
    made = begun(bars, found.net.vae)
    made._read_loss(Share(0, 1, Generator().manual_seed(3))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.net.read.parameters())
    assert all(p.grad is None for p in made.net.vae.parameters())
    model = save(found, tmp_path / "model")
    again = load(tmp_path / "model").trained
    assert isinstance(again, LatentTrained)
    assert bits(again.raw(model), windows) == bits(found.raw(model), windows)
    forecast_does_not_depend_on_its_batch(again.raw(model), windows, (1, 2))
    assert describe(str(tmp_path / "model"))["architecture"]["vae_layers"] == 2
    wanted = {name: OUTPUTS[name] for name in ("timeframe", "horizons", "levels", "steps")}
    challenger = learner_like(str(tmp_path / "model"))(bars, **wanted)
    assert save(challenger, tmp_path / "new") == model


# A sentence for a language model.

WORDS = "bars rising falling from min max median volatility lately repeats after never"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with a tokenizer, as transformers writes it."""
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    from tokenizers import BertWordPieceTokenizer

    path = tmp_path_factory.mktemp("language") / "bert"
    path.mkdir()
    letters = "0123456789abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, ".", ",", "-", *WORDS.split()]
    vocabulary += [f"##{letter}" for letter in letters]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    made = BertWordPieceTokenizer(str(path / "vocab.txt"))._tokenizer
    transformers.BertTokenizerFast(tokenizer_object=made).save_pretrained(path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(vocabulary), **sizes)
    drawn(transformers.BertForMaskedLM(config)).save_pretrained(path)
    return path


def test_a_sentence_says_the_numbers_and_no_symbol() -> None:
    """All that a row has, rounded; lags that are none are left out."""
    row = [-1.24, 0.5, -0.3, -0.9, 0.8, 1.1, 12 / 32, 24 / 32, 2 / 32, 0, 0, 0.5, 0.4, 0.1, 0, 0]
    assert language.sentence(row, "1h", 64) == (
        "1h bars rising from -0.9, min -1.2 max 0.5 median -0.3, volatility 0.8 lately 1.1, "
        "repeats after 12 24 2 bars"
    )
    assert language.sentence([0.0] * 16, "1h", 64) == (
        "1h bars still from 0.0, min 0.0 max 0.0 median 0.0, volatility 0.0 lately 0.0, repeats never"
    )


def test_a_language_model_is_told_of_each_window(
    bars: list[Window], windows: list[Window], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight tokens more, of each row alone; none of it is in the checkpoint, which forecasts the same."""

    def offline(*_: Any, **__: Any) -> None:
        raise AssertionError("the network is not asked")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    found, _ = train(bars, text=bert)
    net = found.net
    features = torch.randn(3, net.architecture.features, generator=Generator().manual_seed(1))
    sequence = torch.randn(3, 64, 4, generator=Generator().manual_seed(2))
    with torch.no_grad():
        states = net.states(sequence)
        assert states.shape == (3, language.SPANS, 32)
        torch.testing.assert_close(net.states(sequence[1:2]), states[1:2], rtol=1e-5, atol=1e-6)
        assert (states[0] - states[1]).abs().max() > 1e-3
        tokens = net.tokens(features, sequence)
        assert torch.equal(tokens[:, -8:], net.said(states))
    model = save(found, tmp_path / "model")
    names = set(load(tmp_path / "model").trained.net.state_dict())  # type: ignore[attr-defined]
    assert {name for name in names if "said" in name} == {"said.weight", "said.bias"}
    assert (tmp_path / "model" / "weights.safetensors").stat().st_size < 2_500_000
    again = load(tmp_path / "model").trained
    assert isinstance(again, LatentTrained)
    assert bits(again.raw(model), windows) == bits(found.raw(model), windows)
    forecast_does_not_depend_on_its_batch(again.raw(model), windows, (1, 2))
    assert " transformers=" in again.raw(model).card.fingerprint
    assert describe(str(tmp_path / "model"))["text"] == str(bert)


def test_a_checkpoint_wants_its_language_model(bars: list[Window], bert: Path, tmp_path: Path) -> None:
    """Another or none at its place is one sentence with the remedy."""
    own = tmp_path / "bert"
    shutil.copytree(bert, own)
    save(train(bars, text=own)[0], tmp_path / "model")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match=f"text = '{own}' holds other files .* put the folder that it"):
        load(tmp_path / "model")
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match=f"text = '{own}': there is no config.json.* put the folder"):
        load(tmp_path / "model")
    shutil.copytree(bert, own)
    load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "there is no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0123456789"), "copy the folder again"),
        (lambda folder: (folder / "config.json").write_text("{"), "copy the folder again"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'),
            "copy the folder again",
        ),
    ],
)
def test_a_language_folder_that_cannot_be_used(bert: Path, tmp_path: Path, change: Any, said: str) -> None:
    """One sentence with the option, its value and what to do."""
    shutil.copytree(bert, tmp_path / "bert")
    change(tmp_path / "bert")
    with pytest.raises(ConfigError, match=said) as caught:
        language.open_language(tmp_path / "bert", "1h")
    assert str(caught.value).startswith(f"text = '{tmp_path / 'bert'}': ")
    assert "\n" not in str(caught.value)


def test_without_transformers_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that is missing is named, also where a checkpoint wants it, and not to train again."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers cannot be imported .* pip install '\.\[text\]'"):
        language.open_language(tmp_path, "1h")
    named = {"text": {"folder": str(tmp_path), "sha256": language.digest_of(tmp_path)}}
    with pytest.raises(ConfigError, match=r"^transformers cannot be imported .* pip install '\.\[text\]'$"):
        checkpoint._language(tmp_path / "model.json", named, "1h", 8)
