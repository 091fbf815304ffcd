"""Histories told in a sentence, and what a language model of a local folder makes of it.

Zhong et al. 2025 (arXiv:2502.14887) put statistics of a history into a prompt for a frozen BERT. The sentence
has the timeframe and the numbers of `prompt.numbers`, but no symbol: a model serves symbols that it has not
learnt from. The language model learns nothing and is in no checkpoint, which names its folder and the hash of
its files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from barcast.models.errors import ConfigError
from barcast.models.ldm4ts.prompt import LAGS

LENGTH = 64
"""Tokens of a sentence: a longer one is cut, a shorter one filled up."""
SPANS = 8
"""States that are kept of a sentence: each is the mean over as many of its tokens."""
READ = (".json", ".txt", ".safetensors", ".model")
"""Ends of the names of files that decide what a folder's model and tokenizer are."""


class Language:
    """A language model that nothing changes, of one timeframe. It has no state that a sentence changes.

    `sha256` is that of the folder's files, by name and contents; `width` are the channels of a state.
    """

    def __init__(self, folder: Path, timeframe: str, tokenizer: Any, model: Any, digest: str) -> None:
        self.folder, self.sha256, self.timeframe = folder, digest, timeframe
        self._tokenizer, self._model = tokenizer, model
        self.width = int(model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """What else decides its bits."""
        return f"transformers={version('transformers')}"

    @torch.no_grad()
    def states(self, numbers: Tensor, bars: int) -> Tensor:
        """What is made of histories of so many bars, of `prompt.numbers` (B, COUNT): (B, SPANS, D)."""
        told = self._tokenizer(
            [sentence(row, self.timeframe, bars) for row in numbers.tolist()],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        mask = told["attention_mask"]
        states = self._model(input_ids=told["input_ids"], attention_mask=mask).last_hidden_state
        shape = len(numbers), SPANS, LENGTH // SPANS, -1
        seen = mask.reshape(*shape[:3], 1).float()
        found: Tensor = (states.float().reshape(shape) * seen).sum(2) / seen.sum(2).clamp(min=1)
        return found


def sentence(numbers: list[float], timeframe: str, bars: int) -> str:
    """One row of `prompt.numbers`, of a history of so many bars, in words."""
    least, most, median, began, spread, lately = numbers[:6]
    lags, strengths = numbers[6 : 6 + LAGS], numbers[6 + LAGS :]
    known = [round(lag * (bars // 2)) for lag, strength in zip(lags, strengths, strict=True) if strength > 0]
    rhythm = f"repeats after {' '.join(map(str, known))} bars" if known else "repeats never"
    way = "still" if not spread else "rising" if began < 0 else "falling"
    least, most, median, began = (round(x, 1) + 0.0 for x in (least, most, median, began))  # no minus zero
    return (
        f"{timeframe} bars {way} from {began:.1f}, min {least:.1f} max {most:.1f} median {median:.1f}, "
        f"volatility {spread:.1f} lately {lately:.1f}, {rhythm}"
    )


def digest_of(folder: Path) -> str:
    """The sha256 of a folder's files. Raise `ConfigError` where it cannot be read or has no `config.json`."""
    about = f"text = {str(folder)!r}"
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{about}: there is no config.json; name the local folder of a BERT or CLIP text model, with its "
            "tokenizer and its weights as safetensors, or leave it out"
        )
    whole = sha256()
    try:
        for path in sorted(path for path in folder.iterdir() if path.suffix in READ):
            with path.open("rb") as f:
                whole.update(f"{path.name} {file_digest(f, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise ConfigError(f"{about}: {error.strerror}: {error.filename}; copy the folder again") from error
    return whole.hexdigest()


def required() -> Any:
    """The package transformers; raises `ConfigError` where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"transformers cannot be imported ({error}); install barcast with its extra text: "
            "pip install '.[text]'"
        ) from error
    return transformers


def open_language(folder: Path, timeframe: str) -> Language:
    """The model and tokenizer of a local folder, as transformers writes them.

    Nothing is downloaded, no pickle is opened and no program of the folder is run. Raise `ConfigError` for a
    folder that holds none, one whose weights are missing, and without transformers.
    """
    folder = folder.absolute()
    about = f"text = {str(folder)!r}"
    digest = digest_of(folder)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{about}: there are no safetensors, and pickles are not opened, as they can run a program; take "
            "the folder with model.safetensors"
        )
    transformers = required()
    of: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(folder, **of)
            clip = config.model_type in ("clip", "clip_text_model")
            kind = transformers.CLIPTextModel if clip else transformers.AutoModel
            if config.model_type == "clip":
                config = config.text_config
            model, loaded = kind.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                **of,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **of)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{about}: {said}; copy the folder again") from error
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
    if missing or loaded["mismatched_keys"]:
        first = missing[0] if missing else sorted(map(str, loaded["mismatched_keys"]))[0]
        raise ConfigError(
            f"{about}: weights are missing or of other sizes, such as {first}; copy the folder again"
        )
    if tokenizer.pad_token is None:
        raise ConfigError(f"{about}: its tokenizer cannot fill a sentence up; name a BERT or CLIP text model")
    places = getattr(config, "max_position_embeddings", LENGTH)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size") or places < LENGTH:
        raise ConfigError(
            f"{about}: {config.model_type} encodes no sentence of {LENGTH} tokens; name a BERT or CLIP text "
            "model"
        )
    model.requires_grad_(False)
    return Language(folder, timeframe, tokenizer, model.eval(), digest)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its bars and its warnings of weights that are made anew: what matters of these is checked."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
