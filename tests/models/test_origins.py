"""The cut into learning, validation and the part that is held out."""

import weakref
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from barcast.models import ConfigError, DataError, Window, origins, scaling
from barcast.models.evaluation import even_stride, every
from barcast.models.origins import BLOCKS, OUTLIER, Split, Table, thinned
from barcast.models.origins import split as cut_and_collect
from tests.garch import simulate

HORIZONS = (1, 4, 16)


@pytest.fixture(scope="module")
def histories() -> list[Window]:
    return [simulate("A", 2400, seed=1).window, simulate("B", 2000, seed=2).window]


def split(
    histories: Collection[Window],
    until: int | None = None,
    folder: Path | None = None,
    validation: float = 0.2,
    hold_out: float = 0.1,
) -> Split:
    """Hourly bars with a validation and a held-out part."""
    return cut_and_collect(histories, "1h", HORIZONS, until, folder, validation=validation, hold_out=hold_out)


def test_outcomes_are_realised_before_their_part_ends(histories: list[Window]) -> None:
    """No training origin has a target after the part ends, no validation origin starts before it begins."""
    data = split(histories)
    first = data.scaling.layout.har[-1] + 1
    learn = look = 0
    for w in histories:
        k = np.arange(first, len(w) - max(HORIZONS))
        opened, closed = w.close_times[k], w.close_times[k + max(HORIZONS)]
        learn += int((closed <= data.train_end).sum())
        look += int(((opened > data.train_end) & (closed <= data.validation_end)).sum())
    assert data.validation is not None
    assert (len(data.learn), len(data.validation)) == (learn, look)
    assert data.train_end < data.validation_end < data.until


@pytest.mark.parametrize(("validation", "hold_out"), [(0.0, 0.0), (0.0, 0.25), (0.2, 0.0), (0.2, 0.25)])
def test_parts_have_the_share_of_the_bars_that_was_asked_for(
    histories: list[Window], validation: float, hold_out: float
) -> None:
    """The newest share is held out, and of the rest the newest is validation; none of it if it is 0."""
    data = split(histories, None, None, validation, hold_out)
    times = np.concatenate([w.close_times for w in histories])
    assert (times > data.validation_end).mean() == pytest.approx(hold_out, abs=1e-3)
    left = times[times <= data.validation_end]
    assert (left > data.train_end).mean() == pytest.approx(validation, abs=1e-3)
    assert (data.validation is None) == (validation == 0)
    assert data.until == times.max()


def test_blocks_are_equal_parts_of_the_calendar(histories: list[Window]) -> None:
    """Each block follows the one before for every symbol, with as many origins; it is named by both ends."""
    data = split(histories, None, None, 0.0, 0.1)
    block, first = data.learn.block, data.scaling.layout.har[-1] + 1
    opened, closed = [], []
    for w in histories:
        k = np.arange(first, len(w) - max(HORIZONS))
        k = k[w.close_times[k + max(HORIZONS)] <= data.train_end]
        opened.append(w.close_times[k])
        closed.append(w.close_times[k + max(HORIZONS)])
    start, end = torch.from_numpy(np.concatenate(opened)), torch.from_numpy(np.concatenate(closed))
    size = torch.bincount(block[:, 0])
    assert len(size) == BLOCKS
    assert size.max() - size.min() <= 2 * len(histories)
    edges = [int(start[block[:, 0] == b].max()) for b in range(BLOCKS - 1)]
    assert torch.equal(block[:, 0], sum((start > edge).long() for edge in edges))
    assert torch.equal(block[:, 1], sum((end > edge).long() for edge in edges))
    assert (block[:, 0] < block[:, 1]).sum() == 3 * max(HORIZONS) * len(histories)


def test_an_origin_holds_what_a_window_shows_and_what_came_after(histories: list[Window]) -> None:
    """Features, sequence, scale and outcome of an origin are those of the window cut at its bar."""
    data = split(histories)
    w, k = histories[0], data.scaling.layout.har[-1] + 1 + 700
    frame = data.scaling.of_window(Window("A", w.close_times[: k + 1], w.values[: k + 1]))
    np.testing.assert_allclose(data.learn.features[700], frame.features[0], atol=1e-6)
    np.testing.assert_allclose(data.learn.scale[700], frame.scale[0], rtol=1e-9)
    L = data.scaling.layout.context
    sequence = data.learn.sequence(torch.tensor([700]), L)[0]
    np.testing.assert_allclose(sequence, frame.channels[-L:], atol=1e-6)
    price = np.log(w.values[:, 3])
    y = [price[k + h] - price[k] for h in HORIZONS]
    np.testing.assert_allclose(data.learn.z[700] * data.learn.scale[700], y, rtol=1e-9, atol=1e-12)


def test_one_wild_bar_does_not_spoil_the_statistics(histories: list[Window]) -> None:
    """A price that jumps a thousandfold for one bar leaves scale and outcomes within bounds."""
    values = histories[1].values.copy()
    values[900, :4] *= 1000
    clean = split(histories)
    wild = split([histories[0], Window("B", histories[1].close_times, values)])
    assert wild.learn.z.abs().max() <= OUTLIER
    ratio = wild.scaling.gain / clean.scaling.gain
    assert ratio[0].max() < 1.6
    assert ratio.max() < 2  # in its symbol's own row it counts twice, as its own and as one of all
    assert ratio.min() > 0.6


def test_a_broken_bar_is_refused_wherever_it_stands(histories: list[Window]) -> None:
    """A bar that is not finite is refused also in the parts that are not learnt from."""
    for k in (10, 1700, 1990):
        values = histories[1].values.copy()
        values[k, 1] = np.inf
        with pytest.raises(DataError, match=f"B has an unusable bar at row {k}"):
            split([histories[0], Window("B", histories[1].close_times, values)])


def test_the_digest_follows_every_bar(histories: list[Window]) -> None:
    """The hash of the data changes with one volume in the held-out part, and not with bars after `until`."""
    until = int(histories[1].close_times[1800])
    first = split(histories, until)
    values = histories[1].values.copy()
    values[1801:] *= 2
    same = split([histories[0], Window("B", histories[1].close_times, values)], until)
    values = values.copy()
    values[1800, 4] += 1
    other = split([histories[0], Window("B", histories[1].close_times, values)], until)
    assert first.digest == same.digest != other.digest


def test_tables_on_disk_hold_the_same_numbers(histories: list[Window], tmp_path: Path) -> None:
    """Every tensor has the bits that it has in memory, is a mapped file, and leaves no name behind."""
    here, there = (split(histories, None, folder) for folder in (None, tmp_path))
    assert list(tmp_path.iterdir()) == []
    mapped = Path("/proc/self/maps").read_text()
    for a, b in ((here.learn, there.learn), (here.validation, there.validation)):
        assert a is not None
        assert b is not None
        for name in ("features", "channels", "row", "z", "scale", "block"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
            start = f"{theirs.data_ptr():x}-"
            assert [line for line in mapped.splitlines() if line.startswith(start)] or name == "row"
    at = torch.tensor([3, 700, 41])
    assert torch.equal(here.learn.sequence(at, 64), there.learn.sequence(at, 64))


def test_a_few_bars_at_a_time_give_the_same_numbers(
    histories: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few bars are in memory at once, each origin has what it has when the whole history is."""
    whole = split(histories)
    monkeypatch.setattr(scaling, "PIECE", 97)
    pieces = split(histories)
    np.testing.assert_allclose(pieces.scaling.mean, whole.scaling.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(pieces.scaling.std, whole.scaling.std, rtol=1e-9)
    for mine, theirs in ((pieces.learn, whole.learn), (pieces.validation, whole.validation)):
        assert mine is not None
        assert theirs is not None
        for name in ("prices", "row", "z", "scale", "block", "channels"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        torch.testing.assert_close(mine.features, theirs.features, rtol=1e-5, atol=1e-6)


def test_of_very_many_origins_some_are_kept(histories: list[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are evenly spread over all symbols, and each is one of those that there are without the limit."""
    whole = split(histories)
    monkeypatch.setattr(origins, "MOST", 250)
    some = split(histories)
    for kept, every_one in ((some.learn, whole.learn), (some.validation, whole.validation)):
        assert kept is not None
        assert every_one is not None
        same = thinned(torch.arange(len(every_one)), 250)
        assert 150 < len(kept) < 400
        for name in ("features", "row", "z", "scale", "block"):
            assert torch.equal(getattr(kept, name), getattr(every_one, name)[same])


def test_histories_are_read_anew_whenever_they_are_asked_for(histories: list[Window]) -> None:
    """A collection that maps its windows from files gives the same split, and none of them is held."""
    opened = []

    class Files(Collection[Window]):
        def __iter__(self) -> Iterator[Window]:
            for w in histories:
                fresh = Window(w.symbol, w.close_times.copy(), w.values.copy())
                opened.append(weakref.ref(fresh.values))
                yield fresh

        def __len__(self) -> int:
            return len(histories)

        def __contains__(self, window: object) -> bool:
            return window in histories

    mine, theirs = split(Files()), split(histories)
    assert len(opened) > 10
    assert [ref() for ref in opened if ref() is not None] == []
    assert mine.digest == theirs.digest
    assert torch.equal(mine.learn.features, theirs.learn.features)


@pytest.mark.parametrize("n", [0, 1, 3, 7, 12])
def test_the_nth_of_several_ascending_times(n: int) -> None:
    """It is that of all of them in order, equal ones counted each; empty ones are passed over."""
    times = [
        np.array(t, np.int64)
        for t in ([5, 6, 9, 9], [], [1, 5, 7, 8, 20], [2**62, 2**62 + 1, 2**62 + 3, 2**62 + 5])
    ]
    assert origins._nth(times, n) == sorted(np.concatenate(times).tolist())[n]


def test_a_disk_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    """A folder that is not there ends in a sentence that names it."""
    with pytest.raises(ConfigError, match="none: No such file or directory; name a directory"):
        Table(3, np.float32, tmp_path / "none")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk at hand")
@pytest.mark.parametrize("rows", [2, 100_000])
def test_a_full_disk_is_a_fault(tmp_path: Path, rows: int) -> None:
    """It is met while rows are added, or with the last of them, which have waited in memory."""
    table = Table(3, np.float32, tmp_path)
    table._file.close()
    table._file = open("/dev/full", "w+b")  # noqa: SIM115
    with pytest.raises(ConfigError, match="No space left on device; make room"):  # noqa: PT012
        table.add(np.ones((rows, 3)))
        table.tensor()
    with suppress(OSError):
        table._file.close()


@pytest.mark.parametrize("n", [100, 601, 24 * 300 - 1, 24 * 300, 168 * 300, 99_999])
def test_what_is_left_of_many_origins_walks_through_every_hour(n: int) -> None:
    """However many origins there are, about as many as asked for are left, of all hours and weekdays."""
    left = every(n, even_stride(n, 300))
    assert thinned(torch.arange(n), 300).tolist() == left.tolist()
    assert min(n, 180) <= len(left) < 360
    assert left[-1] < n
    for period in (5, 24):
        count = np.bincount(left % period, minlength=period)
        assert count.min() > 0.7 * len(left) / period


def test_origins_are_thinned_by_symbol_and_hour(histories: list[Window]) -> None:
    """Thinned origins come from every symbol and hour in equal shares; few stay as they are."""
    learn = split(histories).learn
    assert len(learn.thin(len(learn))) == len(learn)
    thin = learn.thin(len(learn) // 24)
    hours = np.bincount(thin.row.numpy() % 24, minlength=24)
    assert hours.min() > 0.5 * len(thin) / 24
