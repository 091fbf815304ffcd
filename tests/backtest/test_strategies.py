"""Strategies in a backtest: what is built in trades by its defaults, and so does the file to begin with."""

import shutil

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest.replay import run_backtest
from barcast.backtest.sample import sample_bars, sample_strategy
from barcast.daemon.pipeline import StrategySettings
from barcast.strategies import KINDS, build


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Half a year of the sample with each strategy by its defaults, and a copy of the shipped file."""
    mine = shutil.copy(sample_strategy(), tmp_path_factory.mktemp("mine") / "mine.py")
    return run_backtest(
        [sample_bars()],
        stamp="close",
        model="fhs",
        timeframe="session",
        calendar="XNYS",
        strategies=[StrategySettings.parse(text) for text in (*KINDS, f"{mine}:least=0.1")],
        since="2012-07-01",
        until="2013-01-01",
    )


@pytest.mark.parametrize("name", [*KINDS, "Lean"])
def test_defaults_trade(result, name):
    """By its defaults each strategy holds something on most days, and not everything always."""
    equity = result.equity.filter(pl.col("strategy") == name)
    held = equity["gross"].to_numpy()[1:]
    assert (held > 0).mean() > 0.5
    assert held.mean() < 0.99
    assert (result.fills["strategy"] == name).sum() > 20


def test_rank_is_neutral_in_the_books(result):
    """Long and short legs of the ranking are opened with the same value."""
    fills = result.fills.filter(pl.col("strategy") == "rank")
    first = fills.filter(pl.col("decided") == fills["decided"].min())
    assert first.height == 2
    values = (first["units"] * first["price"]).to_list()
    assert sum(values) == pytest.approx(0)


def test_shipped_strategy_is_short():
    """The file to begin with is one that can be read at a glance, and works as it is."""
    assert len(sample_strategy().read_text().splitlines()) < 20
    assert build(str(sample_strategy()), "mine", {"least": 0.2}).name == "mine"


COUNTS = """
from dataclasses import dataclass

COUNT = 0


@dataclass(frozen=True)
class Counts:
    name: str
    every: int = 7

    def on_forecasts(self, close_time, forecasts):
        global COUNT
        COUNT += 1
        return dict.fromkeys(forecasts, COUNT % self.every / self.every)
"""
"""A strategy that keeps what it must not, in its module."""


def test_instances_of_a_file_share_nothing(tmp_path):
    """A strategy has the same targets alone and beside another of its class, whatever its module keeps."""
    (tmp_path / "counts.py").write_text(COUNTS)
    mine = f"{tmp_path / 'counts.py'}:Counts"

    def tested(*strategies):
        return run_backtest(
            sample_bars(),
            stamp="close",
            model="ewma",
            timeframe="session",
            calendar="XNYS",
            strategies=strategies,
            since="2013-01-01",
            until="2013-03-01",
            baselines=False,
        )

    both = tested(mine, f"{mine}:name=other,every=3")
    for name, text in (("Counts", mine), ("other", f"{mine}:name=other,every=3")):
        alone = tested(text)
        assert alone.targets["target"].n_unique() > 2
        for frame in ("targets", "fills", "equity"):
            beside = getattr(both, frame).filter(strategy=name)
            assert_frame_equal(beside, getattr(alone, frame).filter(strategy=name), check_exact=True)
