"""Splits and rolls: a declared one is no return, an undeclared jump is degraded and named."""

import asyncio
import json
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.replay import Recording, replay
from barcast.daemon.adjustments import adjusted, read_adjustments
from barcast.daemon.events import Champion, events
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Decision, Scribe
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Arrival, Declaration, Revision
from barcast.models import Adjustment, Bar, DataError, Window, Windows
from tests.fakes import MINUTE, START, Spread, bar, opening, outgoing
from tests.rim import Message, World, outbox, source

SECOND = 10**9
SPLIT = Adjustment("A", START + 6 * MINUTE, 0.5, "split")


def halved(minute: int) -> Bar:
    """A's bar after a split of one into two: half the price, twice the volume."""
    b = bar("A", minute)
    return Bar("A", b.close_time, b.open / 2, b.high / 2, b.low / 2, b.close / 2, 2 * b.volume)


def feed(last: int = 10, split: int = 6) -> list[Arrival]:
    """A's bars, the ones after minute `split` on the new basis."""
    return [
        Arrival(START + m * MINUTE + SECOND, (bar("A", m) if m <= split else halved(m),))
        for m in range(1, last + 1)
    ]


def signals(messages) -> list[dict]:
    return [json.loads(m.payload) for m in messages if "/signals/" in m.topic]


def inserted(story, event):
    """Events in order of their time."""
    return sorted([*story, event], key=lambda e: e.time)


@pytest.mark.parametrize("minute", [2, 6.5, 6.9])
def test_declared_split_is_no_return(minute):
    """Whenever it was declared before the first bar of the new basis, forecasts are those of no split."""
    plain = signals(outgoing([*opening(("A",)), *feed(split=99)]))
    declared = Declaration(START + int(minute * MINUTE), SPLIT)
    adjusted = signals(outgoing([*opening(("A",)), *inserted(feed(), declared)]))
    assert len(adjusted) == len(plain) == 8
    for a, p in zip(adjusted, plain, strict=True):
        assert a["reasons"] == []
        scale = 1 if a["close_time"] <= p["close_time"] and plain.index(p) < 4 else 0.5
        assert a["reference"] == scale * p["reference"]
        np.testing.assert_allclose(np.array(a["quantiles"]) / scale, p["quantiles"], rtol=1e-4)
        np.testing.assert_allclose(a["mean"], p["mean"], atol=1e-9)


def test_undeclared_jump_is_degraded_and_named():
    """A price that halves without a word is forecast, flagged, and named as long as it is in the window."""
    model = Spread(window=8, min_window=4)
    told = signals(outgoing([*opening(("A",)), *feed(12)], spread=model))
    flagged = [s for s in told if "degraded" in s["flags"]]
    assert [s["close_time"][14:16] for s in flagged] == ["21", "22", "23"]
    for s in flagged:
        [reason] = s["reasons"]
        assert "jumped to 0.4978 times" in reason
        assert "2023-11-14T22:21:00Z" in reason
        assert "declare a split or a roll" in reason


def test_jump_that_is_declared_later_is_mended():
    """Declared after its bars, a split still scales the windows from then on, and no message before it."""
    late = Declaration(START + 8 * MINUTE + 30 * SECOND, SPLIT)
    model = Spread(window=8, min_window=5)
    a = signals(outgoing([*opening(("A",)), *feed()], spread=model))
    b = signals(outgoing([*opening(("A",)), *inserted(feed(), late)], spread=model))
    assert a[:4] == b[:4]
    assert [bool(s["reasons"]) for s in a] == [False, False, True, True, True, True]
    assert [bool(s["reasons"]) for s in b] == [False, False, True, True, False, False]


def test_roll_leaves_volume_alone():
    """A roll scales prices; contracts traded stay what they were. A split scales both."""
    for kind, volume in (("roll", 10.0), ("split", 20.0)):
        windows = Windows(8)
        windows.put(bar("A", 1))
        windows.put(bar("A", 2, 50.0))
        assert windows.adjust(Adjustment("A", START + MINUTE, 0.5, kind))
        cut = windows.cut("A", START + 2 * MINUTE, 8)
        np.testing.assert_allclose(cut.values[0], [*np.array(bar("A", 1).values[:4]) / 2, volume])
        assert cut.values[1].tolist() == list(bar("A", 2, 50.0).values)
        assert not cut.values.flags.writeable


@given(st.permutations(range(1, 9)), st.integers(0, 8), st.integers(0, 9))
def test_window_knows_an_adjustment_only_after_its_time(order, at, when):
    """Whatever the order of bars and declaration, a window that ends at or before its time is untouched."""
    windows = Windows(8)
    moved = Adjustment("A", START + at * MINUTE, 4.0, "roll")
    for k, minute in enumerate(order):
        if k == when:
            windows.adjust(moved)
        windows.put(bar("A", minute))
    windows.adjust(moved)
    assert not windows.adjust(moved)
    for minute in range(1, 9):
        cut = windows.cut("A", START + minute * MINUTE, 8)
        closes = [bar("A", m).close * (4.0 if m <= at < minute else 1.0) for m in range(1, minute + 1)]
        assert cut.values[:, 3].tolist() == closes


def test_duplicates_and_corrections_are_told_apart_on_the_old_basis(tmp_path):
    """A bar from before the split that comes again is a duplicate, not a correction to half its price."""
    base = inserted(feed(), Declaration(START + 6 * MINUTE + 30 * SECOND, SPLIT))
    again = Arrival(START + 9 * MINUTE + 30 * SECOND, (bar("A", 5),))
    assert outgoing([*opening(("A",)), *inserted(base, again)]) == outgoing([*opening(("A",)), *base])


def test_ledger_holds_through_a_split():
    """A book does not jump over a declared split, its units do; outcomes are those of a holder."""

    class Long:
        name = "long"

        def on_forecasts(self, _close, forecasts):
            return dict.fromkeys(forecasts, 1.0)

    class Holder(Pipeline):
        """The path with a strategy that is always long."""

        strategies = (Long(),)

    def books(*story):
        ledger = Ledger(Execution())
        replay([*opening(("A",)), *story], Holder(lambda *_: Spread()), ledger)
        return ledger

    plain = books(*feed(split=99))
    split = books(*inserted(feed(), Declaration(START + 2 * MINUTE, SPLIT)))
    wrong = books(*feed())
    np.testing.assert_allclose(split.equity()["equity"], plain.equity()["equity"], rtol=1e-9)
    np.testing.assert_allclose(split.outcomes()["outcome"], plain.outcomes()["outcome"], atol=1e-12)
    off = wrong.equity()["equity"].to_numpy() / plain.equity()["equity"].to_numpy() - 1
    assert np.abs(off).max() > 0.3
    last, undivided = (book.fills().filter(strategy="long").row(-1, named=True) for book in (split, plain))
    assert last["position"] == pytest.approx(2 * undivided["position"])
    assert last["price"] == halved(10).open


ADJUSTMENT = {"time": "2023-11-14T22:20:00Z", "factor": 0.5, "kind": "split"}


def test_live_declaration_is_journalled_and_replays(tmp_path):
    """A declaration is journalled, acknowledged after its commit, and the replay says the same."""
    journal = Journal(tmp_path / "journal.db")
    scribe, world = Scribe(journal), World()
    first, second = opening(("A",))
    champion = Champion("spread", "numpy", 8, "test")
    decisions = [
        Decision(Kind.REVISION, first.settings, lambda time: Revision(time, first.settings)),
        Decision(Kind.ACTIVATION, champion.encode(), champion.event),
    ]
    script = [(START, lambda src, d=d: src.decide(d)) for d in decisions]
    script += [(e.time, [Message.of(*e.bars)]) for e in feed()]
    declared = [Message("t/adjustments/A", body) for body in (json.dumps(ADJUSTMENT).encode(), b"{}")]
    script.append((START + 6 * MINUTE + 30 * SECOND, declared))
    world.script.extend(sorted(script, key=lambda step: step[0]))
    found = []

    async def take():
        src = source(world, scribe)
        while world.script:
            found.append(await src.next(None))

    asyncio.run(take())
    journaled = [event for _, event in events(journal.records())]
    assert Declaration(START + 6 * MINUTE + 30 * SECOND, SPLIT) in found
    assert journaled == found
    assert len(world.acked) == 12
    assert len(outbox(journal)) == 1
    recording = Recording()
    replay(journaled, Pipeline(lambda *_: Spread()), recording)
    assert recording.messages == outgoing(found)
    assert found[:2] == [first, second]
    assert all(s["reasons"] == [] for s in signals(recording.messages))
    scribe.close()


def test_adjustments_of_a_file(tmp_path):
    """A CSV or Parquet file declares what a feed would, and a row that cannot be is named."""
    path = tmp_path / "splits.csv"
    path.write_text(
        "symbol,time,factor,kind\nA,2023-11-14T22:20:00Z,0.5,split\nB,2024-01-01T00:00:00+01:00,1.01,roll\n"
    )
    expected = [SPLIT, Adjustment("B", 1_704_063_600 * SECOND, 1.01, "roll")]
    assert read_adjustments(path) == expected
    rows = [(a.symbol, datetime.fromtimestamp(a.time // SECOND, UTC), a.factor, a.kind) for a in expected]
    pl.DataFrame(rows, ["symbol", "time", "factor", "kind"], orient="row").write_parquet(
        tmp_path / "s.parquet"
    )
    assert read_adjustments(tmp_path / "s.parquet") == expected
    for wrong, said in (
        ("A,2023-11-14T22:20:00Z,zero,split", "row 1: .*factor"),
        ("A,2023-11-14T22:20:00,0.5,split", "row 1: .*time"),
        ("a,2023-11-14T22:20:00Z,0.5,split", "row 1: symbol 'a'"),
        (",2023-11-14T22:20:00Z,0.5,split", "row 1: symbol"),
        ("A,2023-11-14T22:20:00Z,0.5,merger", "row 1: .*merger.*split or roll"),
        ("A,2023-11-14T22:20:00Z,0,roll", "row 1: factor 0.0"),
    ):
        path.write_text(f"symbol,time,factor,kind\n{wrong}\n")
        with pytest.raises(DataError, match=rf"splits.csv, {said}"):
            read_adjustments(path)
    for name in ("none.csv", "splits.txt"):
        with pytest.raises(DataError, match=name):
            read_adjustments(tmp_path / name)


def test_declaration_for_the_same_time_replaces_the_first():
    """A corrected factor counts alone, in windows, files and books; a factor of 1 withdraws."""
    right, wrong = SPLIT, Adjustment("A", SPLIT.time, 0.25, "split")
    withdrawn = Adjustment("A", SPLIT.time, 1.0, "split")
    for story, factor in (([wrong, right], 0.5), ([right, wrong, right], 0.5), ([right, withdrawn], 1.0)):
        windows, ledger = Windows(8), Ledger(Execution())
        for each in story:
            assert windows.adjust(each)
            ledger.adjusted(each)
        for minute in (6, 7):
            windows.put(bar("A", minute))
            ledger.accepted(bar("A", minute))
        cut = windows.cut("A", START + 7 * MINUTE, 8)
        assert cut.values[0, 3] == factor * bar("A", 6).close
        raw = Window("A", cut.close_times, np.array([bar("A", m).values for m in (6, 7)]))
        assert adjusted({"A": raw}, story)["A"].values.tolist() == cut.values.tolist()
        assert ledger.bars()["basis"].to_list() == [1.0, factor]


def test_split_that_was_declared_and_did_not_come_is_named():
    """However early a split was declared: prices that do not follow it jump on the newest basis."""
    model = Spread(window=8, min_window=4)
    declared = Declaration(START + 90 * SECOND, Adjustment("A", START + 8 * MINUTE, 0.5, "split"))
    told = signals(outgoing([*opening(("A",)), *inserted(feed(14, split=99), declared)], spread=model))
    flagged = [s["close_time"][14:16] for s in told if s["reasons"]]
    assert flagged == ["23", "24", "25"]
    assert "jumped to 2" in told[5]["reasons"][0]
