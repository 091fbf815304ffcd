import errno
import gc
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest import ledger as books
from barcast.backtest import tables
from barcast.backtest.audit import audit_backtest
from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.replay import drive, run_backtest
from barcast.backtest.report import html
from barcast.backtest.result import FRAMES, BacktestResult
from barcast.backtest.sample import sample_bars
from barcast.backtest.scoring import pit, scores
from barcast.backtest.tables import Store
from barcast.daemon.history import History
from barcast.models import Adjustment, ConfigError
from tests.backtest.test_ledger import bar, outcome

LARGE = ("signals", "outcomes", "bars", "targets", "fills", "equity")


def spilling(monkeypatch: pytest.MonkeyPatch, pending: int = 40, room: int = 20_000) -> None:
    """Let memory hold next to nothing."""
    monkeypatch.setattr(books, "PENDING", pending)
    monkeypatch.setattr(tables, "ROOM", room)


def replayed(**more: object) -> BacktestResult:
    settings = {"stamp": "close", "calendar": "XNYS", "model": "hs", "since": "2012-06-01"}
    return run_backtest(sample_bars(), **settings | {"symbols": ["AAPL", "IBM"]} | more)


@pytest.fixture(scope="module")
def held() -> BacktestResult:
    return replayed()


def test_files_hold_what_memory_does(
    held: BacktestResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run whose tables lie in files is that in memory to the bit: frames, meta, page, what is saved."""
    spilling(monkeypatch)
    result = replayed(scratch=tmp_path)
    assert [isinstance(result.rows(name), pl.LazyFrame) for name in LARGE] == [True] * len(LARGE)
    assert not any(isinstance(held.rows(name), pl.LazyFrame) for name in FRAMES)
    for name in FRAMES:
        assert_frame_equal(getattr(result, name), getattr(held, name), check_exact=True)
    assert result.meta == held.meta
    assert html(result) == html(held)
    result.save(tmp_path / "saved")
    held.save(tmp_path / "plain")
    monkeypatch.setattr("barcast.backtest.result.LARGE", 1000)
    loaded = BacktestResult.load(tmp_path / "saved")
    assert isinstance(loaded.rows("signals"), pl.LazyFrame)
    for name in FRAMES:
        one, other = (pl.read_parquet(tmp_path / each / f"{name}.parquet") for each in ("saved", "plain"))
        assert_frame_equal(one, other, check_exact=True)
        assert_frame_equal(getattr(loaded, name), other, check_exact=True)
    loaded.save(tmp_path / "saved")  # over the files that it is read from
    assert_frame_equal(BacktestResult.load(tmp_path / "saved").signals, held.signals, check_exact=True)


def test_files_go_with_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder of a result is there as long as that, and that of the bars as long as the run."""
    spilling(monkeypatch, room=2_000)
    result = replayed(scratch=tmp_path, baselines=False, since="2012-12-01")
    [folder] = tmp_path.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".parquet"}
    gc.disable()  # nor have they to wait until somebody looks for what refers to itself
    try:
        del result
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()


def test_copy_by_pickle_has_the_rows(
    held: BacktestResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The files are those of the result, and go with it, also where the path could be read as a pattern."""
    place = tmp_path / "a[b]*?"
    place.mkdir()
    spilling(monkeypatch)
    result = replayed(scratch=place)
    assert isinstance(result.rows("signals"), pl.LazyFrame)
    copy = pickle.loads(pickle.dumps(result))
    del result
    assert not list(place.iterdir())
    assert copy.meta == held.meta
    for name in FRAMES:
        assert_frame_equal(getattr(copy, name), getattr(held, name), check_exact=True)


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "what", "instead"),
    [(History, "_add", no_room), (tables._Folder, "file", lambda _: Path("/dev/full"))],
)
def test_scratch_that_is_full_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: type, what: str, instead: Callable[..., object]
) -> None:
    """For bars and for tables the folder is named, whatever polars makes of it, and not the files of bars."""
    spilling(monkeypatch)
    monkeypatch.setattr(where, what, instead)
    with pytest.raises(ConfigError, match=r"No space left .*; name a folder that you may write") as told:
        replayed(scratch=tmp_path)
    assert str(told.value).startswith(f"{tmp_path}: ")
    assert not list(tmp_path.iterdir())


def test_temporary_files_that_cannot_be_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where no folder is named the system's is, and how another is taken."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    for run in (replayed, partial(audit_backtest, sample_bars(), stamp="close", calendar="XNYS")):
        with pytest.raises(ConfigError, match=r"nowhere: .*; let TMPDIR name a folder that you may write"):
            run()


def test_scores_of_spans(held: BacktestResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in spans, shares and their errors are the same to the bit, means up to rounding."""
    monkeypatch.setattr(tables, "SPAN", 100)
    found = scores(held.signals.lazy(), held.outcomes.lazy())
    means = pl.selectors.by_name("pinball", "crps") | pl.selectors.starts_with("interval")
    assert_frame_equal(found.select(~means), held.scores.select(~means), check_exact=True)
    assert_frame_equal(found.select(means), held.scores.select(means), rel_tol=1e-12, abs_tol=0)
    expected = pit(held.signals, held.outcomes)
    assert_frame_equal(pit(held.signals.lazy(), held.outcomes.lazy()), expected, check_exact=True)


def test_rows_that_are_not_in_order(held: BacktestResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of rows that fall back in time would be cut through closes: they are refused."""
    monkeypatch.setattr(tables, "SPAN", 100)
    with pytest.raises(ValueError, match="not in order of their closes"):
        scores(held.signals.reverse().lazy(), held.outcomes.lazy())


def told(ledger: Ledger) -> list[pl.DataFrame]:
    read: list[Callable[[], tables.Rows]] = [
        *(ledger.fills, ledger.equity, ledger.bars, ledger.targets, ledger.signals, ledger.outcomes)
    ]
    return [tables.collected(each()) for each in read]


def test_ledger_holds_a_few_bars_however_many_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has what is pending, one bar a symbol and what the store has room for; the tables have it all.

    The books go on over the seams: a position, an order without its bar, a split, a symbol that comes late
    and one that rests.
    """

    def story(ledger: Ledger) -> int:
        rng = np.random.default_rng(3)
        most = 0
        for time in range(1, 200):
            if time == 90:
                ledger.adjusted(Adjustment("A", 89, 0.5, "split"))
            names = [
                name for name, there in (("A", True), ("B", not 50 < time < 120), ("C", time > 30)) if there
            ]
            for name in names:
                ledger.accepted(
                    bar(name, time, *(rng.uniform(9, 11, 2) * (0.5 if name == "A" and time > 89 else 1)))
                )
            targets = {name: float(rng.uniform(-1, 1)) for name in names if rng.random() < 0.7}
            drive(ledger.emit(outcome(time, {"s": targets} if targets else {}, dict.fromkeys(names, 10.0))))
            book = list(ledger._books.values())
            rows = [*(own.fills[::10] for own in book), *(own.marks[::6] for own in book)]
            rows += [*(own.symbols for own in ledger._forecasts.values()), ledger._targets]
            rows += [ledger._came, ledger._accepted]
            most = max(most, *map(len, rows))
        return most

    whole = Ledger(Execution(borrow=0.01, volume_share=0.5))
    assert story(whole) > 300
    spilling(monkeypatch, 10, 5_000)
    store = Store()
    parts = Ledger(Execution(borrow=0.01, volume_share=0.5), store)
    assert story(parts) <= 12
    assert sum(table.size for table in store._tables) <= 5_000
    for one, other in zip(told(parts), told(whole), strict=True):
        assert_frame_equal(one, other, check_exact=True)
