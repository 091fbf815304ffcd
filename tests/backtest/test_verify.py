"""What is said of a recorded run that is computed again: to the byte on its machine, elsewhere how far."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barcast.backtest import verify as verify_module
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.backtest.verify import Comparison, read_capture, verify
from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import Champion, Warmth
from barcast.daemon.history import bars, scan
from barcast.daemon.journal import Journal, Kind, Progress
from barcast.daemon.pipeline import Settings, StrategySettings
from barcast.daemon.retention import compact
from barcast.daemon.store import ModelStore
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.verification import Report
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
from tests.checks import open_model
from tests.fakes import MINUTE, START, Spread, bar, settings
from tests.replayed import replay_journal
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
    found = verify(elsewhere / "journal.db")
    [(recorded, own)] = found.fingerprints
    assert replay_journal(elsewhere / "journal.db").fingerprints == found.fingerprints
    assert ("cpu=DEFAULT" in recorded, "cpu=DEFAULT" in own) == (True, False)
    assert found.agrees
    assert (found.signals, found.differing, found.missing) == (2 * SESSIONS, 0, 0)
    assert found.apart.signals == 2 * SESSIONS
    assert 0 <= found.apart.quantile < 1
    assert 0 <= found.apart.deviations < 1e-2
    assert (found.apart.differing > 0) == (max(found.apart.quantile, found.apart.mean, found.apart.std) > 0)
    status, out, err = run("verify", str(elsewhere / "journal.db"))
    assert (status, err) == (0, "")
    assert f"recorded under {recorded!r}, replayed under {own!r}: bytes are not promised" in out
    assert f"{found.apart.differing} of {2 * SESSIONS} signals differ" in out
    assert "24 signals in the journal's own outbox" in out


def test_spoilt_figure_is_found_elsewhere_with_its_size(elsewhere, run, tmp_path):
    """In a capture from elsewhere a quantile that was moved by 3 basis points stands out by its place."""
    file = captured(elsewhere, tmp_path / "seen")
    assert run("verify", str(elsewhere / "journal.db"), "--capture", str(file))[0] == 0
    seen = read_capture(file)
    at = [topic for topic, _ in seen].index("t/signals/session/IBM")
    signal = msgspec.json.decode(seen[at][1], type=Signal)
    signal.quantiles[1][5] += 3e-4 * signal.reference
    seen[at] = seen[at][0], msgspec.json.encode(signal)
    found = verify(elsewhere / "journal.db", captured=seen)
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
    return held(
        own,
        [
            ("t/signals/1m/A" if isinstance(c, Signal) else "t/targets/drift/1m/A", msgspec.json.encode(c))
            for c in captured
        ],
        elsewhere,
    )


def held(replayed, captured, elsewhere=False, **options):
    """What is said of replayed messages beside captured ones."""
    comparison = Comparison(captured=captured, **options)
    comparison.hear(replayed, elsewhere)
    return comparison.end([("x", "y")] if elsewhere else ())


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
    agree = held(replayed, [*captured, captured[0]])
    assert (agree.signals, agree.differing, agree.missing, agree.agrees) == (2, 0, 0, True)
    flipped = held(replayed, [("t/signals/1m/A", b"0"), *captured[1:]])
    assert (flipped.differing, flipped.missing, flipped.agrees) == (1, 1, False)
    assert [(place.topic, place.symbol) for place in flipped.places] == [("t/signals/1m/A", "A")]
    late = held(replayed, captured[:2])
    assert (late.missing, late.agrees) == (1, True)
    extra = held(replayed[:2], captured)
    assert (extra.differing, [place.topic for place in extra.places]) == (1, ["t/groups/1m"])
    assert not held(replayed, []).agrees
    gone, other = (Comparison(told, left=5, whole=False) for told in ((), [("t/groups/1m", b"0")]))
    for comparison in (gone, other):
        comparison.hear(replayed)
    assert (found := gone.end()).agrees
    assert found.missing == 0
    assert not other.end().agrees
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
    assert (found.signals, found.differing, found.missing, found.agrees) == (1, 0, 0, True)
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
    assert (found.differing, found.missing, found.agrees) == (1, 1, False)


def test_figure_within_one_fingerprint_is_a_difference():
    """Bytes are promised there: the smallest change of a figure is one."""
    found = beside(other(rise=[0.5, 0.600000001]), TARGET, elsewhere=False)
    assert (found.differing, found.agrees, found.apart) == (1, False, None)


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


def spoil(state, old, new, which=LAST):
    """Put something else into a signal of the outbox, by default the last one."""
    sql = f"UPDATE outbox SET payload = CAST(REPLACE(payload, ?, ?) AS BLOB) WHERE n = {which}"
    change(state, sql, old, new)


@pytest.mark.parametrize("foreign", [False, True])
def test_journal_is_held_against_its_own_outbox(state, run, foreign):
    """Without a capture every message of the outbox is looked at; one that is gone from it is missed."""
    if foreign:
        move(state)
    path = str(state / "journal.db")
    status, out, _ = run("verify", path)
    assert status == 0
    assert "8 signals in the journal's own outbox, 0 messages differ from the replay" in out
    assert ("0 of 8 signals differ" in out) == foreign
    for count, gone in enumerate((LAST, "(SELECT MIN(n) FROM outbox)"), 1):
        change(state, f"DELETE FROM outbox WHERE n = {gone}")
        status, out, _ = run("verify", path)
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
    status, out, _ = run("verify", str(state / "journal.db"))
    assert (status, "9 signals" in out, "1 messages differ from the replay" in out) == (1, True, True)


@pytest.mark.parametrize("foreign", [False, True])
def test_figure_of_the_outbox(state, run, foreign):
    """One digit of a signal is a difference where bytes are promised, and has a size where they are not."""
    if foreign:
        move(state)
    spoil(state, '"rise":[0.5,', '"rise":[0.4,')
    status, out, _ = run("verify", str(state / "journal.db"))
    assert status == (not foreign)
    assert ("1 messages differ from the replay" in out) == (not foreign)
    assert ("1 of 8 signals differ, by at most 0 bp of the price and 0 of" in out) == foreign


def test_flag_of_the_outbox_is_no_figure(state, run):
    """Another machine flags the same forecasts."""
    move(state)
    spoil(state, '"flags":["warming"]', '"flags":[]')
    status, out, _ = run("verify", str(state / "journal.db"))
    assert status == 1
    assert "1 messages differ from the replay, figures from elsewhere aside" in out


@pytest.mark.parametrize(("which", "foreign"), [("MIN", -1), ("MAX", 0)])
def test_bytes_are_promised_for_the_part_that_was_recorded_here(state, which, foreign):
    """A journal that moved with its daemon: the bytes of what it said here are checked, before or after."""
    move(state, f"= (SELECT {which}(seq) FROM record WHERE kind = 'activation')")
    whole = verify(state / "journal.db")
    assert (whole.fingerprints, whole.agrees) == ((("numpy=0.1", "numpy"),), True)
    assert whole.apart.signals == 4
    spoil(state, '"rise":[0.5,', '"rise":[0.4,', LAST if foreign else LAST.replace("MAX", "MIN"))
    here = verify(state / "journal.db")
    assert (here.differing, here.apart.differing) == (1, 0)
    spoil(state, '"rise":[0.5,', '"rise":[0.4,', LAST.replace("MAX", "MIN") if foreign else LAST)
    both = verify(state / "journal.db")
    assert (both.differing, both.apart.differing) == (1, 1)


def test_what_was_not_settled_yet_is_not_missed(state):
    """Bars that were journalled and not forecast any more are due after the next start."""
    with closing(Journal(state / "journal.db")) as journal:
        late = (START + 7 * MINUTE, Kind.BARS, "t/bars/1m/A", encode_bars([bar("A", 7, 100.0)]))
        journal.append([late])
    replayed = replay_journal(state / "journal.db")
    assert replayed.settled < len(replayed.messages)
    found = verify(state / "journal.db")
    assert (found.agrees, found.missing) == (True, 0)


# Streams of messages.


def plain(number):
    """A message of a stream: the signals of three symbols of each close, and their group."""
    close = f"2025-01-{1 + number // 4 % 28:02d}T21:00:00Z"
    name = number % 4
    topic = "t/groups/1d" if name == 3 else f"t/signals/1d/{'ABC'[name]}"
    return message(topic, f'{{"close_time":"{close}","n":{number}}}'.encode())


@given(st.integers(0, 10**6))
def test_streams_differ_by_what_is_in_one_of_them(seed):
    """Whatever is lost, added, altered or changes places: what has no equal on the other side is counted."""
    dice = random.Random(seed)
    said = [plain(number) for number in range(100)]
    told = [(m.topic, m.payload) for m in said]
    for _ in range(dice.randrange(8)):
        k = dice.randrange(len(told))
        match dice.randrange(4):
            case 0:
                del told[k]
            case 1:
                told.insert(k, (told[k][0], told[k][1].replace(b'"n":', b'"n":9')))
            case 2:
                told[k] = told[k][0], told[k][1].replace(b'"n"', b'"m"')
            case 3:
                told.insert(dice.randrange(len(told)), told.pop(k))
    told = list(dict.fromkeys(told))
    again = {(m.topic, m.payload) for m in said}
    wanted = len(set(told) - again), len(again - set(told))
    comparison = Comparison(told)
    for at in range(0, 100, 4):
        comparison.hear(said[at : at + 4])
    found = comparison.end()
    assert (found.differing, found.missing) == wanted
    assert found.agrees == (wanted == (0, 0))
    captured = held(said, dice.sample(told, len(told)))
    assert (captured.differing, captured.missing) == wanted


def test_nothing_is_kept_of_what_agrees_and_little_of_what_does_not(monkeypatch):
    """Memory does not grow: with the messages that are the same not at all, else up to a bound."""
    monkeypatch.setattr(verify_module, "WAITING", 8)
    said = [plain(number) for number in range(100)]
    told = [(m.topic, m.payload) for m in said]
    same = Comparison(told)
    for one in said:
        same.hear([one])
        assert same._told.count == same._said.count == 0
    assert same.end().signals == 75
    other = Comparison([(topic, payload.replace(b'"n"', b'"m"')) for topic, payload in told])
    for one in said:
        other.hear([one])
        assert other._told.count <= 8
        assert other._said.count <= 8
    found = other.end()
    assert (found.signals, found.differing, found.missing) == (75, 100, 100)
    assert len(found.places) == 10
    assert found.sentence().count("\n") == 11


# A day.

MINUTES = 1440
NOON = START + 720 * MINUTE


def story(first, last):
    """Minutes of three symbols: some bars come twice, some late, out of order, corrected or not at all."""
    steps = []
    for minute in range(first, last):
        time, late = START + minute * MINUTE + SECOND, minute % 50 == 0
        names = [name for name in "ABC" if not (late and name == "C") and (minute % 97 or name != "B")]
        sent = [Message.of(bar(name, minute)) for name in names]
        if minute % 7 == 0:
            sent.append(sent[0])
        if minute % 61 == 0:
            sent.append(Message.of(bar("A", minute - 2, close=99.0)))
        steps.append((time, sent))
        if late:
            steps.append((time + 14 * SECOND, [Message.of(bar("C", minute))]))
    return steps


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """The state directory of an instance that lived for a day, with three starts and a new model at noon.

    Before the second and the third start its journal was compacted.
    """
    state = tmp_path_factory.mktemp("day")
    decided = [
        (START, lambda source: source.decide(revision(settings("ABC")))),
        (START, lambda source: source.decide(activation("spread"))),
    ]
    noon = [(NOON + 30 * SECOND, lambda source: source.decide(activation("other")))]
    parts = ([*decided, *story(1, 480)], [*story(480, 721), *noon, *story(721, 960)], story(960, MINUTES))
    for steps in parts:
        world = World(time=steps[0][0])
        world.script.extend(steps)
        with closing(Instance(state / "journal.db", world, open_model)) as instance:
            play(instance.run())
        compact(state, world.time, 86_400 * SECOND, (), lambda: None)
    return state


@pytest.fixture
def lived(day, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setattr(
        "barcast.daemon.store.open_model", lambda path, *options: open_model(Path(path).name, *options[1:])
    )
    state = tmp_path / "state"
    shutil.copytree(day, state)
    return state


def test_a_real_day_passes(lived, run):
    """Duplicates, stragglers, corrections, starts, another model and compactions: 0 messages differ."""
    found = verify(lived / "journal.db")
    assert (found.differing, found.missing, found.older) == (0, 0, 0)
    assert found.signals > 4000
    config = lived.parent / "barcast.toml"
    config.write_text('instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n')
    status, out, err = run("verify", str(config), "--json")
    report = msgspec.json.decode(out, type=Report)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert (report.agrees, report.signals, report.places) == (True, found.signals, ())
    assert msgspec.json.decode(out).keys() >= {"differing", "missing", "older", "fingerprints", "apart"}


def signal_at(state, symbol, minute):
    """The number of a signal in the outbox."""
    close = wire.to_text(START + minute * MINUTE)
    with closing(sqlite3.connect(state / "journal.db")) as db:
        [(n, payload)] = db.execute(
            "SELECT n, payload FROM outbox WHERE topic = ? AND INSTR(payload, ?)",
            (f"t/signals/1m/{symbol}", f'"close_time":"{close}"'.encode()),
        ).fetchall()
    return n, payload


def plant(state, symbol, minute):
    """Change a digit of a quantile in the outbox, and nothing else."""
    n, payload = signal_at(state, symbol, minute)
    at = payload.index(b'"quantiles":[[') + len(b'"quantiles":[[') + 4
    digit = b"7" if payload[at : at + 1] != b"7" else b"3"
    change(state, "UPDATE outbox SET payload = ? WHERE n = ?", payload[:at] + digit + payload[at + 1 :], n)


def test_one_byte_is_found_and_named(lived, run):
    """A digit of one quantile among thousands: exit status 1, and its topic, symbol, close and field."""
    plant(lived, "B", 1201)
    close = wire.to_text(START + 1201 * MINUTE)
    status, out, _ = run("verify", str(lived / "journal.db"))
    assert (status, "1 messages differ from the replay, 1 of the replay are not in it" in out) == (1, True)
    assert f"t/signals/1m/B, symbol B, close {close}: another quantiles" in out
    status, out, _ = run("verify", str(lived / "journal.db"), "--json")
    report = msgspec.json.decode(out, type=Report)
    assert (status, report.agrees, report.differing) == (1, False, 1)
    [place] = report.places
    assert (place.topic, place.symbol, place.close_time) == ("t/signals/1m/B", "B", close)


def test_since_computes_and_compares_only_later_closes(lived, run):
    """From the snapshot before it on: earlier records are not read, and earlier messages not looked at."""
    whole = verify(lived / "journal.db")
    since = START + 1200 * MINUTE
    text = wire.to_text(since)
    change(lived, "UPDATE record SET payload = x'00' WHERE kind = 'bars' AND time < ?", START + 900 * MINUTE)
    plant(lived, "A", 1199)
    found = verify(lived / "journal.db", since)
    assert (found.differing, found.missing, found.older) == (0, 0, 0)
    assert found.signals == pytest.approx(whole.signals / 6, rel=0.05)
    assert run("verify", str(lived / "journal.db"), "--since", text)[0] == 0
    plant(lived, "A", 1200)
    assert verify(lived / "journal.db", since).differing == 1
    assert verify(lived / "journal.db", since + 1).differing == 0
    n, _ = signal_at(lived, "A", 1200)
    change(lived, "DELETE FROM outbox WHERE n = ?", n)
    gone = verify(lived / "journal.db", since)
    assert (gone.differing, gone.missing, gone.agrees) == (0, 1, False)


def test_since_after_a_compaction(lived):
    """What left the journal is older; the day since is verified, also where it begins before the journal."""
    change(lived, "UPDATE outbox SET state = 1")
    done = compact(lived, START + MINUTES * MINUTE, 120 * MINUTE, (), lambda: None)
    assert done.records > 3000
    for minute, older in ((0, True), (1000, True), (1330, False), (1400, False)):
        found = verify(lived / "journal.db", START + minute * MINUTE)
        assert (found.agrees, found.older > 0) == (True, older)
        assert found.signals > 100
    plant(lived, "C", 1401)
    assert verify(lived / "journal.db", START + 1330 * MINUTE).differing == 1
