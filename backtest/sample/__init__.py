"""What is shipped to try the program with: daily bars of five US stocks, a model, a strategy, a notebook."""

from importlib.resources import files
from pathlib import Path


def sample_bars() -> Path:
    """The Parquet file with the sample bars; `README.md` beside it says where they come from."""
    return Path(str(files(__name__) / "us_daily.parquet"))


def sample_checkpoint() -> Path:
    """The folder of the model that is shipped with the sample bars."""
    return Path(str(files(__name__) / "checkpoint"))


def sample_strategy() -> Path:
    """The file with a strategy to begin with, of which a copy can be changed."""
    return Path(str(files(__name__) / "strategy.py"))


def example_notebook() -> Path:
    """A notebook that runs a backtest on the sample bars and draws it."""
    return Path(str(files(__name__) / "example.ipynb"))
