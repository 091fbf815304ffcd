"""What is shipped to try the program with: daily bars of five US stocks, a model, a strategy, a notebook."""

from importlib.resources import files
from pathlib import Path

from barcast.models import ConfigError

CHECKPOINTS = {"sssd": "checkpoint", "ldm4ts": "ldm4ts"}
"""The folders of shipped models, by their kind."""


def sample_bars() -> Path:
    """The Parquet file with the sample bars; `README.md` beside it says where they come from."""
    return Path(str(files(__name__) / "us_daily.parquet"))


def sample_checkpoint(kind: str = "sssd") -> Path:
    """The folder of the model of a kind, `sssd` or `ldm4ts`, that is shipped with the sample bars.

    Raise `ConfigError` for another kind.
    """
    if kind not in CHECKPOINTS:
        raise ConfigError(f"no model {kind!r} is shipped: name one of {', '.join(CHECKPOINTS)}")
    return Path(str(files(__name__) / CHECKPOINTS[kind]))


def sample_generator() -> Path:
    """The folder of the generator of stress scenarios that is shipped with the sample bars."""
    return Path(str(files(__name__) / "stress"))


def sample_strategy() -> Path:
    """The file with a strategy to begin with, of which a copy can be changed."""
    return Path(str(files(__name__) / "strategy.py"))


def example_notebook() -> Path:
    """A notebook that runs a backtest on the sample bars and draws it."""
    return Path(str(files(__name__) / "example.ipynb"))
