"""What is said of a recorded run that is computed again: to the byte on its machine, elsewhere how far."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.backtest.verify import Replayed, compare, read_capture, replay_journal
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import Champion, Warmth
from barcast.daemon.history import bars, scan
from barcast.daemon.journal import Journal, Kind, Progress
from barcast.daemon.pipeline import Settings, StrategySettings
from barcast.daemon.store import ModelStore
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import (
    CoverageOfSignal,
    GroupOfSignal,
    Horizon,
    Outgoing,
    Signal,
    Target,
    TouchOfSignal,
    encode_bars,
)
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.rim import SECOND, Instance, Message, World, activation, play, revision

ROOT = Path(__file__).parents[2]
NAMES, SESSIONS, WARM = ("AAPL", "IBM"), 12, 185


def record(state):
    """Let the shipped model forecast the last sessions of the sample here; journal it as a daemon does."""
    store = ModelStore(state / "models", "session")
    model = store.adopt(sample_checkpoint())
    card = store.open(model, None, None).card
    calendars = Calendars("XNYS", Timeframe.parse("session"))
    known = list(bars(scan([sample_bars()], "close", calendars, NAMES, None, None)))[-2 * (WARM + SESSIONS) :]
    warm, live = known[: 2 * WARM], known[2 * WARM :]
    path = Settings(
        root="t",
        timeframe="session",
        calendar="XNYS",
        symbols=NAMES,
        max_wait=SECOND,
        sampler=None,
        steps=None,
        strategies=(StrategySettings("quantile-band", "band", {"band": 0.1, "horizon": 5}),),
    )
    began = warm[-1].close_time + SECOND
    champion = Champion(model, card.fingerprint, card.window, "test")
    with closing(Journal(state / "journal.db")) as journal:
        *_, last = journal.append(
            [
                (began, Kind.REVISION, "", path.encode()),
                (began, Kind.ACTIVATION, "", champion.encode()),
                (began, Kind.WARMUP, "", Warmth("", card.window, tuple(warm)).encode()),
                *(
                    (b.close_time + SECOND, Kind.BARS, f"t/bars/session/{b.symbol}", encode_bars([b]))
                    for b in live
                ),
            ]
        )
        journal.settle(
            Progress(last, live[-1].close_time + SECOND), replay_journal(state / "journal.db").messages
        )


def captured(state, file):
    """A file with all that went out, as a subscriber writes it down."""
    with closing(Journal(state / "journal.db", readonly=True)) as journal:
        lines = [[topic, payload.decode()] for topic, payload in journal.sent("", 1 << 40)]
    file.write_bytes(b"\n".join(map(msgspec.json.encode, reversed(lines))))
    return file


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A state directory that a process with other kernels of torch recorded."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch has no other kernels on this machine than the plain ones")
    state = tmp_path_factory.mktemp("elsewhere") / "state"
    state.mkdir()
    script = "import pathlib, sys, tests.backtest.test_verify as t; t.record(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    subprocess.run(
        [sys.executable, "-c", script, str(state)], cwd=ROOT, env=environment, check=True, timeout=120
    )
    return state


def test_journal_of_other_kernels_is_replayed_and_says_how_far_it_is_apart(elsewhere, run):
    """Torch's plain kernels give other last bits: the replay names both and the largest difference."""
    replayed = replay_journal(elsewhere / "journal.db")
    [(recorded, own)] = replayed.fingerprints
    assert ("cpu=DEFAULT" in recorded, "cpu=DEFAULT" in own) == (True, False)
    found = compare(replayed)
    assert found.agrees
    assert (found.signals, found.differing, found.missing) == (2 * SESSIONS, (), ())
    assert found.apart.signals == 2 * SESSIONS
    assert 0 <= found.apart.quantile < 1
    assert 0 <= found.apart.deviations < 1e-2
    assert (found.apart.differing > 0) == (max(found.apart.quantile, found.apart.mean, found.apart.std) > 0)
    status, out, err = run("replay", str(elsewhere / "journal.db"))
    assert (status, err) == (0, "")
    assert f"recorded under {recorded!r}, replayed under {own!r}: bytes are not promised" in out
    assert f"{found.apart.differing} of {2 * SESSIONS} signals differ" in out
    assert "24 signals in the journal's own outbox" in out


def test_spoilt_figure_is_found_elsewhere_with_its_size(elsewhere, run, tmp_path):
    """In a capture from elsewhere a quantile that was moved by 3 basis points stands out by its place."""
    file = captured(elsewhere, tmp_path / "seen")
    assert run("replay", str(elsewhere / "journal.db"), "--capture", str(file))[0] == 0
    seen = read_capture(file)
    at = [topic for topic, _ in seen].index("t/signals/session/IBM")
    signal = msgspec.json.decode(seen[at][1], type=Signal)
    signal.quantiles[1][5] += 3e-4 * signal.reference
    seen[at] = seen[at][0], msgspec.json.encode(signal)
    found = compare(replay_journal(elsewhere / "journal.db"), seen)
    assert found.apart.quantile == pytest.approx(3, abs=0.01)
    assert found.apart.deviations == pytest.approx(3e-4 / signal.std[1], rel=0.01)
    assert found.apart.place == f"IBM at {signal.close_time}, +5, q90"
    assert found.apart.place in found.sentence()


# Made by hand: one symbol, two horizons, three levels.

SIGNAL = Signal(
    schema=1,
    id="",
    symbol="A",
    timeframe="1m",
    close_time="2025-01-31T21:00:00Z",
    reference=200.0,
    horizons=[Horizon(1, "2025-01-31T21:01:00Z"), Horizon(5, "2025-01-31T21:05:00Z")],
    levels=[0.05, 0.5, 0.975],
    quantiles=[[190.0, 200.0, 210.0], [180.0, 200.0, 220.0]],
    mean=[0.001, 0.002],
    std=[0.02, 0.05],
    rise=[0.5, 0.6],
    model="m",
    sampler="none",
    steps=0,
    samples=0,
    valid_until="2025-01-31T21:02:00Z",
    tradable=True,
    flags=[],
    reasons=[],
    group=GroupOfSignal("2025-01-31T21:00:00Z", 1, "A"),
    coverage=CoverageOfSignal({"0.9": [0.88, 0.92]}, [250, 250]),
    touch=[TouchOfSignal(2.0, 1.0, 221.0, 190.2, 0.05, 0.3)],
    drawdown=0.04,
)
TARGET = Target(
    schema=1,
    id="",
    strategy="drift",
    symbol="A",
    timeframe="1m",
    close_time=SIGNAL.close_time,
    target=0.25,
    model="m",
    valid_until=SIGNAL.valid_until,
    tradable=True,
)


def message(topic, payload):
    """A replayed message."""
    return Outgoing(f"{topic} {payload}", topic, payload, True, None)


def beside(*captured, elsewhere=True):
    """What is said of captured bodies beside the two that were replayed."""
    own = [
        message("t/signals/1m/A", msgspec.json.encode(SIGNAL)),
        message("t/targets/drift/1m/A", msgspec.json.encode(TARGET)),
    ]
    ids, pairs = ({m.id for m in own}, (("x", "y"),)) if elsewhere else ((), ())
    replayed = Replayed(own, elsewhere=frozenset(ids), fingerprints=pairs)
    return compare(
        replayed,
        [
            ("t/signals/1m/A" if isinstance(c, Signal) else "t/targets/drift/1m/A", msgspec.json.encode(c))
            for c in captured
        ],
    )


def other(body=SIGNAL, **changes):
    """The same message with something else in it."""
    return msgspec.structs.replace(body, **changes)


def test_comparison_counts_what_differs_and_what_is_missing(tmp_path):
    """A capture with a message twice agrees; a changed byte differs; what was not captured is missing."""
    replayed = [
        message("t/signals/1m/A", b"1"),
        message("t/signals/1m/B", b"2"),
        message("t/groups/1m", b"3"),
    ]
    captured = [(m.topic, m.payload) for m in replayed]
    agree = compare(Replayed(replayed), [*captured, captured[0]])
    assert (agree.signals, agree.differing, agree.missing, agree.agrees) == (2, (), (), True)
    flipped = compare(Replayed(replayed), [("t/signals/1m/A", b"0"), *captured[1:]])
    assert flipped.differing == (("t/signals/1m/A", b"0"),)
    assert flipped.missing == (replayed[0],)
    assert not flipped.agrees
    late = compare(Replayed(replayed), captured[:2])
    assert (late.missing, late.agrees) == ((replayed[2],), True)
    assert compare(Replayed(replayed[:2]), captured).differing == (captured[2],)
    assert not compare(Replayed(replayed), []).agrees
    gone = compare(Replayed(replayed, settled=3, left=5))
    assert (gone.missing, gone.agrees) == ((), True)  # all of it has left the outbox
    assert not compare(Replayed(replayed, settled=3, left=5, outbox=(("t/groups/1m", b"0"),))).agrees
    file = tmp_path / "capture.jsonl"
    file.write_text('["t/signals/1m/A","1"]\n["t/signals/1m/B","2"]\n["t/groups/1m","3"]\n')
    assert read_capture(file) == captured


def test_largest_difference_of_each_figure_is_known():
    """Of signals made elsewhere the largest distance is told in the figures' own units, and where it is."""
    moved = other(
        quantiles=[[190.0, 200.0, 210.002], [180.0, 199.996, 220.0]],
        mean=[0.001, 0.002003],
        std=[0.02, 0.0505],
        rise=[0.5, 0.59],
        coverage=CoverageOfSignal({"0.9": [0.88, 0.916]}, [250, 250]),
        touch=[TouchOfSignal(2.0, 1.0, 221.1, 190.3, 0.04, 0.32)],
        drawdown=0.0403,
    )
    found = beside(moved, other(TARGET, target=0.2))
    assert (found.signals, found.differing, found.missing, found.agrees) == (1, (), (), True)
    apart = found.apart
    assert (apart.signals, apart.differing, apart.targets) == (1, 1, 1)
    assert apart.place == "A at 2025-01-31T21:00:00Z, +5, q50"
    assert apart.quantile == pytest.approx(0.2)  # 0.004 of 200
    assert apart.deviations == pytest.approx(1e-5 / 0.02)  # nearer, and a narrower forecast
    assert (apart.mean, apart.std) == (pytest.approx(0.03), pytest.approx(0.0005 / 0.0505))
    assert (apart.rise, apart.coverage, apart.target) == tuple(map(pytest.approx, (0.01, 0.004, 0.05)))
    assert (apart.touch, apart.drawdown) == (pytest.approx(0.02), pytest.approx(3))
    assert found.sentence() == (
        "1 signals captured, 0 messages differ from the replay, figures from elsewhere aside, 0 of the "
        "replay were not captured\nrecorded under 'x', replayed under 'y': bytes are not promised; 1 of 1 "
        "signals differ, by at most 0.2 bp of the price (A at 2025-01-31T21:00:00Z, +5, q50) and 0.0005 of "
        "the forecast's deviation, mean 0.03 bp, std 0.99 %, rise 0.01, coverage 0.004, touch 0.02, drawdown "
        "3 bp; 1 targets differ, by at most 0.05"
    )


def test_bits_that_happen_to_agree_elsewhere_are_said_to():
    """Where no byte differs nothing is said of sizes."""
    found = beside(SIGNAL, TARGET)
    assert found.agrees
    assert found.sentence().endswith("bytes are not promised; 0 of 1 signals differ")


@pytest.mark.parametrize(
    "changed",
    [
        other(flags=["degraded"]),
        other(reasons=["x"]),
        other(tradable=False),
        other(reference=200.1),
        other(model="n"),
        other(levels=[0.05, 0.5, 0.95]),
        other(horizons=SIGNAL.horizons[:1]),
        other(quantiles=[[190.0, 200.0], [180.0, 200.0]]),
        other(mean=[0.001]),
        other(coverage=None),
        other(coverage=CoverageOfSignal({"0.9": [0.88, 0.92]}, [250, 249])),
        other(touch=None),
        other(touch=[TouchOfSignal(2.0, 2.0, 221.0, 190.2, 0.05, 0.3)]),
        other(drawdown=None),
        other(close_time="2025-01-31T21:01:00Z"),
        other(TARGET, valid_until="2025-01-31T21:03:00Z"),
    ],
)
def test_more_than_figures_is_a_difference_elsewhere(changed):
    """What follows from the bars alone is the same on every machine: figures may differ, flags may not."""
    kept = TARGET if isinstance(changed, Signal) else SIGNAL
    found = beside(changed, kept)
    assert (len(found.differing), len(found.missing), found.agrees) == (1, 1, False)


def test_figure_within_one_fingerprint_is_a_difference():
    """Bytes are promised there: the smallest change of a figure is one."""
    found = beside(other(rise=[0.5, 0.600000001]), TARGET, elsewhere=False)
    assert (len(found.differing), found.agrees, found.apart) == (1, False, None)


# Of journals, with the fake.


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The state directory of an instance that lived for six minutes; its model `fhs` is a fake.

    After the fourth it is activated again.
    """
    monkeypatch.setattr("barcast.daemon.store.open_model", lambda *_: Spread("fhs"))

    def bars(minutes):
        return [(START + m * MINUTE + SECOND, [Message.of(bar(s, m)) for s in "AB"]) for m in minutes]

    world = World(time=START)
    world.script.extend(
        [
            (START, lambda source: source.decide(revision(settings()))),
            (START, lambda source: source.decide(activation("fhs"))),
            *bars(range(1, 5)),
            (START + 4 * MINUTE + 2 * SECOND, lambda source: source.decide(activation("fhs"))),
            *bars(range(5, 7)),
        ]
    )
    state = tmp_path / "state"
    state.mkdir()
    with closing(Instance(state / "journal.db", world, ModelStore(state / "models", "1m").open)) as instance:
        play(instance.run())
    return state


def change(state, sql, *values):
    """Change a journal behind everybody's back."""
    with closing(sqlite3.connect(state / "journal.db")) as db, db:
        assert db.execute(sql, values).rowcount > 0


def move(state, which="IN (SELECT seq FROM record WHERE kind = 'activation')"):
    """Let the journal be of another machine, or what came after some of its activations."""
    champion = Champion("fhs", "numpy=0.1", 8, "test").encode()
    change(state, f"UPDATE record SET payload = ? WHERE seq {which}", champion)


LAST = "(SELECT MAX(n) FROM outbox WHERE topic LIKE '%/signals/%')"


def spoil(state, old, new):
    """Put something else into the last signal of the outbox."""
    sql = f"UPDATE outbox SET payload = CAST(REPLACE(payload, ?, ?) AS BLOB) WHERE n = {LAST}"
    change(state, sql, old, new)


@pytest.mark.parametrize("foreign", [False, True])
def test_journal_is_held_against_its_own_outbox(state, run, foreign):
    """Without a capture every message of the outbox is looked at; one that is gone from it is missed."""
    if foreign:
        move(state)
    path = str(state / "journal.db")
    status, out, _ = run("replay", path)
    assert status == 0
    assert "8 signals in the journal's own outbox, 0 messages differ from the replay" in out
    assert ("0 of 8 signals differ" in out) == foreign
    for count, gone in enumerate((LAST, "(SELECT MIN(n) FROM outbox)"), 1):
        change(state, f"DELETE FROM outbox WHERE n = {gone}")
        status, out, _ = run("replay", path)
        assert (status, f"{count} of the replay are not in it" in out) == (1, True)


@pytest.mark.parametrize("foreign", [False, True])
def test_signal_of_the_outbox_that_nobody_replays(state, run, foreign):
    """One that the replay does not say is a difference everywhere."""
    if foreign:
        move(state)
    change(
        state,
        "INSERT INTO outbox (id, topic, payload, retain, expires) "
        f"SELECT 'x', 't/signals/1m/C', payload, 1, expires FROM outbox WHERE n = {LAST}",
    )
    status, out, _ = run("replay", str(state / "journal.db"))
    assert (status, "9 signals" in out, "1 messages differ from the replay" in out) == (1, True, True)


@pytest.mark.parametrize("foreign", [False, True])
def test_figure_of_the_outbox(state, run, foreign):
    """One digit of a signal is a difference where bytes are promised, and has a size where they are not."""
    if foreign:
        move(state)
    spoil(state, '"rise":[0.5,', '"rise":[0.4,')
    status, out, _ = run("replay", str(state / "journal.db"))
    assert status == (not foreign)
    assert ("1 messages differ from the replay" in out) == (not foreign)
    assert ("1 of 8 signals differ, by at most 0 bp of the price and 0 of" in out) == foreign


def test_flag_of_the_outbox_is_no_figure(state, run):
    """Another machine flags the same forecasts."""
    move(state)
    spoil(state, '"flags":["warming"]', '"flags":[]')
    status, out, _ = run("replay", str(state / "journal.db"))
    assert status == 1
    assert "1 messages differ from the replay, figures from elsewhere aside" in out


@pytest.mark.parametrize(("which", "foreign"), [("MIN", -1), ("MAX", 0)])
def test_bytes_are_promised_for_the_part_that_was_recorded_here(state, which, foreign):
    """A journal that moved with its daemon: the bytes of what it said here are checked, before or after."""
    move(state, f"= (SELECT {which}(seq) FROM record WHERE kind = 'activation')")
    replayed = replay_journal(state / "journal.db")
    assert replayed.fingerprints == (("numpy=0.1", "numpy"),)
    signals = [k for k, (topic, _) in enumerate(replayed.outbox) if "/signals/" in topic]  # newest first
    assert compare(replayed).apart.signals == 4
    for at in (0, -1):
        k, spoilt = signals[at], list(replayed.outbox)
        spoilt[k] = spoilt[k][0], spoilt[k][1].replace(b'"rise":[0.5,', b'"rise":[0.4,')
        found = compare(replace(replayed, outbox=tuple(spoilt)))
        assert (len(found.differing), found.apart.differing) == ((0, 1) if at == foreign else (1, 0))


def test_what_was_not_settled_yet_is_not_missed(state):
    """Bars that were journalled and not forecast any more are due after the next start."""
    with closing(Journal(state / "journal.db")) as journal:
        late = (START + 7 * MINUTE, Kind.BARS, "t/bars/1m/A", encode_bars([bar("A", 7, 100.0)]))
        journal.append([late])
    replayed = replay_journal(state / "journal.db")
    assert replayed.settled < len(replayed.messages)
    found = compare(replayed)
    assert (found.agrees, found.missing) == (True, ())
