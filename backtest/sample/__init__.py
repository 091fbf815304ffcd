"""What is shipped to try the program with: thirteen years of daily bars of five US stocks."""

from importlib.resources import files
from pathlib import Path


def sample_bars() -> Path:
    """The Parquet file with the sample bars; `README.md` beside it says where they come from."""
    return Path(str(files(__name__) / "us_daily.parquet"))
