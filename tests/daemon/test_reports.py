"""Backtests in a folder: what is told of each, and which files are handed out."""

import json
import os

import pytest

from barcast.daemon.reports import ALL, TOLD, listed, report
from barcast.models import DataError


def backtest(folder, name, time, **meta):
    """A folder as `barcast backtest` writes it, as far as it is told."""
    (folder / name).mkdir()
    row = {"strategy": "drift", "sharpe": 1.5}
    about = dict.fromkeys(TOLD[1:]) | meta
    scores = [{"symbol": symbol, "horizon": 1, "crps": 0.1} for symbol in ("A", ALL)]
    told = {"meta": about, "portfolio": [row], "scores": scores}
    (folder / name / "result.json").write_text(json.dumps(told))
    os.utime(folder / name / "result.json", (time, time))


def test_newest_comes_first_and_what_is_damaged_is_named(tmp_path):
    """A folder without an index is none; one whose index says nothing is told of with the reason."""
    backtest(tmp_path, "old", 1000, model="m1")
    backtest(tmp_path, "new", 2000, model="m2")
    (tmp_path / "new" / "report.html").write_text("<p>")
    (tmp_path / "other").mkdir()
    for name, text in (("cut", "{"), ("list", "[]"), ("deep", "[" * 100_000), ("bare", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
        os.utime(tmp_path / name / "result.json", (500, 500))
    found = json.loads(listed(tmp_path))
    assert [each["name"] for each in found] == ["new", "old", "bare", "cut", "deep", "list"]
    assert [each["report"] for each in found] == [True] + [False] * 5
    new = found[0]
    assert (new["model"], new["written"], new["strategies"]) == ("m2", "1970-01-01T00:33:20Z", ["drift"])
    assert new["portfolio"] == [{"strategy": "drift", "sharpe": 1.5}]
    assert new["scores"] == [{"symbol": ALL, "horizon": 1, "crps": 0.1}]
    assert all(each["fault"].startswith("result.json cannot be read: ") for each in found[2:])
    with pytest.raises(DataError, match="name a folder that the daemon may read"):
        listed(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "new/..", "none", "new\0", "a" * 5000])
def test_nothing_else_is_handed_out(tmp_path, name):
    """Only the report of a folder that is there, whatever is asked for."""
    (tmp_path / "report.html").write_text("secret")
    folder = tmp_path / "reports"
    folder.mkdir()
    backtest(folder, "new", 1)
    (folder / "new" / "report.html").write_text("<p>")
    assert report(folder, "new") == b"<p>"
    assert report(folder, name) is None
