import json
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import polars as pl
import pytest
from typer import BadParameter

from barcast.backtest.cli.terminal import check_result_folder
from barcast.backtest.result import FRAMES, PARTIAL, BacktestResult
from barcast.models import ConfigError, DataError
from tests.backtest.results import made_up


@pytest.fixture(scope="module")
def result() -> BacktestResult:
    """Every frame is full, and some numbers are none."""
    made = made_up()
    strange = made.portfolio.with_columns(sharpe=pl.Series([nan, inf, None]), omega=pl.lit(-inf))
    return replace(made, portfolio=strange, equity=made.equity.with_columns(cash=pl.lit(nan)))


def same(one: BacktestResult, other: BacktestResult) -> bool:
    """Whether two results are equal, in types too."""
    frames = [(getattr(one, name), getattr(other, name)) for name in FRAMES]
    return one.meta == other.meta and all(a.schema == b.schema and a.equals(b) for a, b in frames)


def test_what_is_saved_is_loaded(result: BacktestResult, tmp_path: Path) -> None:
    """A result comes back as it was: frames with their types, nan and null, and meta."""
    result.save(tmp_path / "new" / "folder")
    assert same(BacktestResult.load(tmp_path / "new" / "folder"), result)
    assert not same(made_up(strategies=("other",)), result)


@pytest.mark.parametrize("lazy", [False, True])
def test_disk_that_is_full_leaves_the_result_that_was_there(
    result: BacktestResult, tmp_path: Path, lazy: bool
) -> None:
    """Whatever polars makes of it; nothing of the other one stays."""
    result.save(tmp_path)
    other = made_up(symbols=("ONE",))
    rows = {name: other.rows(name).lazy() if lazy else other.rows(name) for name in FRAMES}
    other = replace(other, **rows)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for full in (f"{FRAMES[2]}.partial", PARTIAL):
        (tmp_path / full).symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            other.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    other.save(tmp_path)
    assert same(BacktestResult.load(tmp_path), made_up(symbols=("ONE",)))


def test_loaded_result_is_saved_where_it_was(result: BacktestResult, tmp_path: Path, monkeypatch) -> None:
    """Also where its rows are still read from the files that it replaces, and again and again."""
    result.save(tmp_path)
    monkeypatch.setattr("barcast.backtest.result.LARGE", 0)
    loaded = BacktestResult.load(tmp_path)
    for _ in range(2):
        assert isinstance(loaded.rows("equity"), pl.LazyFrame)
        loaded.save(tmp_path)
        assert same(BacktestResult.load(tmp_path), result)
    assert same(loaded, result)


def test_folder_of_a_save_that_was_killed_is_taken_again(
    result: BacktestResult, tmp_path: Path, monkeypatch
) -> None:
    """Wherever it was killed: what it has left is no result, and nothing that somebody else would miss."""
    for last in range(2 + len(FRAMES)):
        plain, count = Path.replace, iter(range(100))

        def killed(path: Path, target: Path, last=last, plain=plain, count=count) -> Path:
            if next(count) == last:
                raise KeyboardInterrupt
            return plain(path, target)

        monkeypatch.setattr(Path, "replace", killed)
        if last <= len(FRAMES):
            with pytest.raises(KeyboardInterrupt):
                result.save(tmp_path)
            with pytest.raises(DataError):
                BacktestResult.load(tmp_path)
        else:
            result.save(tmp_path)
        monkeypatch.undo()
        check_result_folder(tmp_path, ())
        (tmp_path / "report.html").touch()
    assert same(BacktestResult.load(tmp_path), result)
    (tmp_path / "result.json").unlink()
    with pytest.raises(BadParameter, match="holds no backtest"):
        check_result_folder(tmp_path, ())


def test_folder_of_somebody_else_is_refused(result: BacktestResult, tmp_path: Path) -> None:
    """Nothing is written where something lies that is no result, such as bars; nor onto a file."""
    (tmp_path / "bars.parquet").write_text("mine")
    for place, said in (
        (tmp_path, "is not empty, and holds no backtest"),
        (tmp_path / "bars.parquet", "is a file"),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*: name a"):
            result.save(place)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_a_row(result: BacktestResult, tmp_path: Path) -> None:
    """A run of which nothing was recorded can be kept too."""
    empty = replace(result, **{name: getattr(result, name).clear() for name in FRAMES}, meta={})
    empty.save(tmp_path)
    assert same(BacktestResult.load(tmp_path), empty)


def test_json_is_for_other_tools(result: BacktestResult, tmp_path: Path) -> None:
    """The JSON file holds the tables with their definitions; what is no number is null, times are text."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    result.save(tmp_path)
    told = json.loads((tmp_path / "result.json").read_text("utf-8"), parse_constant=refuse)
    assert told["meta"] == result.meta
    assert [row["sharpe"] for row in told["portfolio"]] == [None, None, None]
    assert told["portfolio"][0]["total_return"] == result.portfolio["total_return"][0]
    assert told["trainings"][0]["asked"].endswith("T16:00:00Z")
    assert len(told["scores"]) == result.scores.height
    assert len(told["skill"]) == result.skill.height
    assert set(result.portfolio.columns) - {"strategy"} == set(told["definitions"]["portfolio"])
    assert set(told["definitions"]["scores"]) < set(result.scores.columns)
    assert set(told["definitions"]["skill"]) < set(result.skill.columns)


def test_a_result_replaces_another(result: BacktestResult, tmp_path: Path) -> None:
    """A folder holds the result that was saved last; one that JSON has no value for changes nothing."""
    result.save(tmp_path)
    other = made_up(symbols=("ONE",))
    other.save(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        replace(result, meta={"steps": nan}).save(tmp_path)
    assert same(BacktestResult.load(tmp_path), other)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            lambda f: (f / "result.json").unlink(),
            "holds no result.json; name a folder that .*save has written",
        ),
        (lambda f: (f / "result.json").write_text("{"), "result.json: is damaged"),
        (lambda f: (f / "result.json").write_bytes(b"\xff"), "result.json: is damaged"),
        (lambda f: (f / "result.json").write_text("[]"), "barcast_result = None, and 1 can be read"),
        (lambda f: (f / "result.json").write_text('{"barcast_result": 9}'), "barcast_result = 9"),
        (lambda f: (f / "equity.parquet").unlink(), "equity.parquet: is missing"),
        (lambda f: (f / "fills.parquet").write_bytes(b"PAR1"), "fills.parquet: is damaged"),
        (
            lambda f: (f / "portfolio.parquet").write_bytes((f / "equity.parquet").read_bytes()),
            r"portfolio.parquet: has no column \w+: it is no table of a result",
        ),
    ],
)
def test_what_is_no_result(result: BacktestResult, tmp_path: Path, spoil, fault: str) -> None:
    """A folder that is no result, or no whole one, is named with what is wrong."""
    result.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=fault):
        BacktestResult.load(tmp_path)


def test_it_is_shown_in_a_line(result: BacktestResult) -> None:
    """What is printed names model and frames; one that there is not is named beside those that there are."""
    shown = repr(result)
    assert shown.startswith("BacktestResult(")
    assert f"signals {result.signals.height:,}, " in shown
    assert len(shown) < 300
    with pytest.raises(ConfigError, match="no frame 'nope': take one of signals, outcomes"):
        result.rows("nope")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A folder that does not exist, or is a file, is no result either."""
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(DataError, match=r"holds no result\.json"):
            BacktestResult.load(tmp_path / name)
