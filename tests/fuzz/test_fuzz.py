"""What reads foreign bytes takes them or refuses them in one sentence; `make fuzz` looks for more."""

import json
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from barcast.daemon import config
from barcast.models import CheckpointError, ConfigError, checkpoint
from barcast.models.sssd import legacy
from barcast.models.sssd.layers import PRESETS, Architecture
from barcast.models.sssd.network import SSSD
from tests.fuzz.targets import CORPUS, TARGETS, corpus

CHANGES = {
    "bars": 1500,
    "configuration": 300,
    "checkpoint": 200,
    "torch-file": 300,
    "record": 800,
    "journal": 100,
}
LEAST = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1h"\n'
DEEP = ".".join("a" * 20_000)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_raised_but_what_is_documented(name: str) -> None:
    """Sound inputs, those that once were faults, and the same dice's changes of them."""
    target, dice = TARGETS[name], random.Random(8)
    known = [*target.seeds(), *(path.read_bytes() for path in corpus(name))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words about pickles that nobody writes
        for data in known:
            target.feed(data)
        for _ in range(CHANGES[name]):
            data = dice.choice(known)
            for _ in range(dice.choice((1, 1, 2, 4))):
                data = target.change(data, dice)
            target.feed(data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_cli_parse_args = true\n", "'_cli_parse_args': unknown key"),
        ('_env_file = "other"\n', "'_env_file': unknown key"),
        (f"[mqtt]\nhost.{DEEP} = 1\n", "a key of 64 parts"),
        (f"[[strategy]]\nkind = 'a'\nparams = {{ {DEEP} = 1 }}\n", "a key of 64 parts"),
        ("[mqtt]\nport = 0x" + "f" * 6000 + "\n", "too large to be shown"),
        ("[mqtt]\nusername = 'u'\npassword_file = '" + "a" * 5000 + "'\n", "does not exist"),
        ("[model]\nname = '" + "a" * 5000 + "'\n", "is neither champion"),
        ("symbols = [" + "0," * 3000 + "]\n", "and 2950 faults more"),
        ("# " + "x" * config.MOST_BYTES + "\n", "no configuration has more than 1000000"),
    ],
)
def test_hostile_configuration_is_one_fault(tmp_path: Path, text: str, said: str) -> None:
    """What once ended in a traceback, took seconds or was taken for an order to the library is a sentence."""
    path = tmp_path / "barcast.toml"
    path.write_text(LEAST + text)
    with pytest.raises(ConfigError) as caught:
        config.load(path).mqtt.address("check")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("horizons", [1, 10**12], "at most 50000"),
        ("horizons", list(range(1, 102)), "at most 100 and 1000"),
        ("levels", [k / 2000 for k in range(1, 1002)], "at most 100 and 1000"),
        ("architecture", {"width": 10**6}, "weights or more, and"),
        ("architecture", {"members": 10**9}, "weights or more, and"),
        ("architecture", {"samples": 2**31}, "weights or more, and"),
        ("architecture", {"blocks": 10**6}, "architecture.blocks is 1000000, above 64"),
        ("scaling", {"har": [[10**400]]}, "too large"),
    ],
)
def test_model_of_any_size_is_refused_before_there_is_room_for_it(
    tmp_path: Path, field: str, value: Any, said: str
) -> None:
    """A small file that claims large sizes costs no memory: the limits come first."""
    seed = TARGETS["checkpoint"].seeds()[0]
    text, _, weights = seed[1:].partition(b"\0")
    body = json.loads(text)
    body[field] = {**body[field], **value} if isinstance(value, dict) else value
    del body["id"]
    body["id"] = checkpoint.identity(body, weights)
    (tmp_path / "model.json").write_text(json.dumps(body))
    (tmp_path / "weights.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert said in str(caught.value)


def test_packed_torch_file_is_refused_unread(tmp_path: Path) -> None:
    """A file may unpack to a thousand times its size; torch never packs, so that such a one is not its."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1_000_000))
    with pytest.raises(CheckpointError, match="archive/data/0 in it is compressed; save its state_dict anew"):
        legacy.read(path, {}, {})


def test_least_size_of_a_network_is_below_its_size_and_not_far() -> None:
    """What a file must hold for an architecture: never more than it has, and within a constant of it."""
    dice = random.Random(1)
    for preset in (*PRESETS, *["tiny"] * 20):
        shape = {"features": 40, "channels": 4, "context": 64, "horizons": 4, "path": 20, "samples": 64}
        if preset == "tiny":
            names = ("width", "poles", "code", "denoiser", "blocks", "samples", "path", "features")
            shape |= {name: dice.choice((1, 2, 5, 40)) for name in names}
            shape |= {"head": dice.choice(("mlp", "unet1d")), "encoder": dice.choice(("s4d", "multiscale"))}
        a = Architecture.of(preset, **shape)
        found = SSSD(a, torch.Generator().manual_seed(0)).state_dict().values()
        assert a.least <= sum(t.numel() for t in found) <= 200 * a.least


def test_corpus_has_no_input_without_a_target() -> None:
    """Each folder of the corpus is that of a target."""
    assert {path.name for path in CORPUS.iterdir()} <= TARGETS.keys()
