"""The checkpoints that come with the sample bars."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from barcast.backtest.sample import CHECKPOINTS, sample_checkpoint
from barcast.models import FilteredHistoricalSimulation, HistoricalSimulation, Window, compare
from barcast.models.catalog import STEPS
from barcast.models.checkpoint import Checkpoint, load, save
from barcast.models.trained import Record

SAMPLE = Path(__file__).parents[2] / "backtest" / "sample"
YEAR_2010, YEAR_2012 = (int(np.datetime64(f"{y}-01-01", "ns").astype(np.int64)) for y in (2010, 2012))
MONTH = 30 * 86_400 * 10**9


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


@pytest.mark.parametrize(("kind", "end"), [("sssd", YEAR_2010), ("ldm4ts", YEAR_2012)])
def test_it_was_trained_on_the_sample_before(kind: str, end: int) -> None:
    """The record says which bars were used, and that all of them were learnt from."""
    record = load(sample_checkpoint(kind)).trained.record
    assert isinstance(record, Record)
    assert end - MONTH < record.train_end == record.validation_end == record.until < end
    assert record.symbols == ("AAPL", "GOOG", "IBM", "MSFT")
    assert not record.capped
    assert (record.seed, record.init_from) == (0, None)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_it_is_what_it_was(kind: str, tmp_path: Path) -> None:
    """Saved again it has the same id and bytes, so that an ensemble may hold it; each is small."""
    shipped = sample_checkpoint(kind)
    checkpoint = load(shipped)
    assert save(checkpoint.trained, tmp_path / "again") == checkpoint.model
    for name in ("model.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (shipped / name).read_bytes()
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 1_000_000


def test_its_card_says_whether_the_denoiser_matters(checkpoint: Checkpoint, histories: list[Window]) -> None:
    """It is sampled as its training chose; without steps, no weight of the denoiser changes a forecast."""
    chosen = checkpoint.trained.record.denoiser_step
    assert checkpoint.forecaster().card.steps == (STEPS if chosen else 0)
    raw = checkpoint.trained.raw
    before, alone = (raw("x", None, n).forecast(histories) for n in (STEPS, 0))
    with torch.no_grad():
        for p in checkpoint.trained.net.denoiser.leave.parameters():
            p.add_(0.1)
    after, still = (raw("x", None, n).forecast(histories) for n in (STEPS, 0))
    for a, b, c, d in zip(before, after, alone, still, strict=True):
        assert np.abs(a.quantiles / b.quantiles - 1).max() > 1e-3
        assert c.quantiles.tobytes() == d.quantiles.tobytes()


def test_it_beats_the_baselines_on_the_years_after(checkpoint: Checkpoint, histories: list[Window]) -> None:
    """On bars that it has not learnt from its CRPS is below that of both historical simulations."""
    forecaster = checkpoint.forecaster()
    card = forecaster.card
    others = [
        kind(card.timeframe, card.horizons, card.levels)
        for kind in (HistoricalSimulation, FilteredHistoricalSimulation)
    ]
    until = max(w.close_time for w in histories)
    mine, *theirs = compare([forecaster, *others], histories, since=YEAR_2010, until=until, stride=10)
    assert all(mine.normalised < other.normalised for other in theirs)
