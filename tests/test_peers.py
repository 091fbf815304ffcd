"""The comparison with other engines is honest: what runs here trades what the reference loop trades."""

from collections.abc import Callable

import pytest

from tests.bench.peers import here
from tests.bench.peers.__main__ import check_agree, make
from tests.bench.peers.engines import SLOW, Engine, Times, Values, measured, plain

BARS = 1_500


def prices(job: Callable[[Times, Values], Engine], seed: int) -> list[float]:
    """What one engine pays at its entries."""
    run, entries = job(*make(BARS, seed))
    return entries(run())


@pytest.mark.parametrize(("job", "seed"), [(here.path, 1), (here.path, 2), (here.backtest, 1)])
def test_enters_when_and_where_the_reference_enters(
    job: Callable[[Times, Values], Engine], seed: int
) -> None:
    """Each entry through the path is one of the plain loop, at its price, and none is left out."""
    expected = prices(plain, seed)
    assert len(expected) > BARS / 200
    assert prices(job, seed) == expected


def test_bars_are_such_that_all_engines_can_agree() -> None:
    """Sums of prices are exact, opens are the closes before, and nothing is decided at either end."""
    closes, values = make(BARS)
    assert len(closes) == len(values) == BARS
    assert (values[:, :4] * 32 % 1 == 0).all()
    assert (values[1:, 0] == values[:-1, 3]).all()
    assert (values[:, 2] <= values[:, (0, 3)].min(1)).all()
    assert (values[:, 1] >= values[:, (0, 3)].max(1)).all()
    for end in (values[: SLOW + 1, 3], values[-SLOW:, 3]):
        assert end[-10:].mean() < end[-50:].mean()


def test_another_entry_is_found_out() -> None:
    """The control: an engine that trades at another price, or not at all, stops the comparison."""
    run = measured(plain(*make(BARS)))
    assert run["cpu_seconds"] > 0
    assert run["peak_mb"] > 10
    check_agree({"one": [run, run], "other": [run]})
    for other in (run | {"paid": run["paid"] + 1 / 32}, run | {"entries": run["entries"] - 1}):
        with pytest.raises(RuntimeError, match="did not do the same work"):
            check_agree({"one": [run], "other": [run, other]})
    with pytest.raises(RuntimeError, match="did not do the same work"):
        check_agree({"one": [run | {"entries": 0, "paid": 0}]})
