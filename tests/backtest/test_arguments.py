"""Arguments of the Python functions: what is another thing than it should be is named with what to give."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from barcast.backtest.arguments import Moment, nanoseconds
from barcast.backtest.audit import audit_backtest
from barcast.backtest.evaluate import open_field
from barcast.backtest.ledger import Execution
from barcast.backtest.replay import learnt_until, run_backtest
from barcast.backtest.sample import sample_bars
from barcast.backtest.sweep import sweep
from barcast.models import ConfigError, open_model


@dataclass(frozen=True)
class Mine:
    """A strategy of one's own, handed over as what it is."""

    name: str


def test_moments() -> None:
    """A time is read as UTC; what is no time is named with its argument."""
    assert nanoseconds("2024-01-01", "since") == nanoseconds("2024-01-01T01:00+01:00", "since")
    day: Moment = date(2024, 1, 1)  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match=r"since is datetime\.date\(2024, 1, 1\), of type date: give a date"
    ):
        nanoseconds(day, "since")
    with pytest.raises(ConfigError, match="until: 'soon' is no time: write one such as"):
        nanoseconds("soon", "until")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"since": date(2012, 1, 1)}, r"since is datetime\.date"),
        (
            {"strategies": [{"kind": "rank"}]},
            r"strategies\[0\] is \{'kind': 'rank'\}, of type dict: give a text",
        ),
        ({"strategies": {"kind": "rank"}}, "strategies is .*, of type dict"),
        (
            {"strategies": ["rank", Mine("m")]},
            r"strategies\[1\] is Mine.*, of type Mine: give a text such as",
        ),
        ({"execution": {"spread_bp": 2}}, r"execution is .*, of type dict: give Execution\(\.\.\.\)"),
        ({"files": pl.DataFrame({"close": [1.0]})}, "files is shape: .* of type DataFrame: give the path"),
        ({"files": [pl.DataFrame({"close": [1.0]})]}, r"files\[0\] is shape"),
        ({"adjustments": "splits.csv"}, "adjustments is 'splits.csv', of type str: give Adjustment"),
    ],
)
@pytest.mark.parametrize("of", [run_backtest, sweep, audit_backtest])
def test_what_is_another_thing_is_refused(of, given, said: str, tmp_path: Path) -> None:
    """The sentence names the argument, the value and what to give, in whatever function."""
    settings = {"files": sample_bars(), "stamp": "close", "calendar": "XNYS"} | given
    settings |= {"out": tmp_path} if of is sweep else {}
    files = settings.pop("files")
    with pytest.raises(ConfigError, match=said) as caught:
        of(files, **settings)
    assert "\n" not in str(caught.value)


def test_model_is_named_by_a_path_or_a_text() -> None:
    """Both open the same model, and a backtest tells the same of it."""
    assert open_model(Path("hs"), "1d", None, None).card == open_model("hs", "1d", None, None).card
    assert learnt_until(Path("hs")) == 0
    assert list(open_field([Path("fhs")], "1d").forecasters) == list(open_field(["fhs"], "1d").forecasters)
    one, other = (
        run_backtest(
            sample_bars(),
            stamp="close",
            calendar="XNYS",
            symbols="IBM",
            model=model,
            since="2013-02-25",
            execution=Execution(),
        )
        for model in (Path("ewma"), "ewma")
    )
    assert one.meta == other.meta
    assert one.skill.equals(other.skill)
