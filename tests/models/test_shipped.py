"""The checkpoint that comes with the sample bars."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from barcast.models import FilteredHistoricalSimulation, HistoricalSimulation, Window, compare
from barcast.models.checkpoint import Checkpoint, load

SAMPLE = Path(__file__).parents[2] / "backtest" / "sample"
YEAR_2010 = int(np.datetime64("2010-01-01", "ns").astype(np.int64))


@pytest.fixture(scope="module")
def histories() -> list[Window]:
    def windows() -> Iterator[Window]:
        bars = pl.read_parquet(SAMPLE / "us_daily.parquet").sort("symbol", "close_time")
        for (symbol,), rows in bars.group_by(["symbol"], maintain_order=True):
            times = rows["close_time"].to_physical().to_numpy().astype(np.int64)
            yield Window(str(symbol), times, rows.select("open", "high", "low", "close", "volume").to_numpy())

    return list(windows())


@pytest.fixture
def checkpoint() -> Checkpoint:
    return load(SAMPLE / "checkpoint")


def test_it_was_trained_on_the_sample_before_2010(checkpoint: Checkpoint) -> None:
    """The record says which bars were used, and that validation chose a denoiser that says something."""
    record = checkpoint.trained.record
    assert record.until < YEAR_2010
    assert set(record.symbols) <= {"AAPL", "FB", "GOOG", "IBM", "MSFT"}
    assert not record.capped
    assert record.denoiser_step > 0


def test_its_denoiser_matters(checkpoint: Checkpoint, histories: list[Window]) -> None:
    """Zeroing the denoiser moves the quantiles of every symbol."""
    before = checkpoint.forecaster().forecast(histories)
    with torch.no_grad():
        for p in checkpoint.trained.net.denoiser.leave.parameters():
            p.zero_()
    after = checkpoint.forecaster().forecast(histories)
    for a, b in zip(before, after, strict=True):
        assert np.abs(a.quantiles / b.quantiles - 1).max() > 1e-3


def test_it_beats_the_baselines_on_bars_held_out_before_2010(
    checkpoint: Checkpoint, histories: list[Window]
) -> None:
    """On the bars kept for the gate its CRPS is below that of both historical simulations."""
    forecaster = checkpoint.forecaster()
    card, record = forecaster.card, checkpoint.trained.record
    others = [
        kind(card.timeframe, card.horizons, card.levels)
        for kind in (HistoricalSimulation, FilteredHistoricalSimulation)
    ]
    mine, *theirs = compare(
        [forecaster, *others], histories, since=record.validation_end, until=record.until, stride=5
    )
    assert all(mine.normalised < other.normalised for other in theirs)
