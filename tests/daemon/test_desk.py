"""Orders by the broker and by the socket: journalled before they act, carried out once, answered."""

import asyncio
import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog

from barcast.backtest.cli import operators
from barcast.backtest.verify import verify
from barcast.daemon import app, desk, log
from barcast.daemon.app import Daemon, Outside
from barcast.daemon.config import DriftBands, Retrain, load
from barcast.daemon.control import Answer, Order
from barcast.daemon.events import Answered, Ordered
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Scribe
from barcast.daemon.mqtt import Delivery, Request
from barcast.daemon.pipeline import Pipeline, PipelineState
from barcast.daemon.ports import Pause
from barcast.daemon.retraining import Result
from barcast.daemon.store import ModelStore
from barcast.models import ConfigError
from tests.daemon.living import LEAST, at_work, daemon, deliver, until
from tests.fakes import MINUTE, START, Spread, bar
from tests.rim import SECOND, Message, outbox, play

ONE = LEAST.replace("[mqtt]", 'symbols = ["A"]\n[mqtt]')


@pytest.fixture(autouse=True)
def spread(monkeypatch):
    """Every model is one of a few lines, which needs three bars."""
    monkeypatch.setattr(ModelStore, "open", lambda *_: Spread("fhs"))


@pytest.fixture
def made(tmp_path):
    """A daemon of one symbol at a time when the bars of minutes 7, 8 and 9 are news."""
    return daemon(tmp_path, ONE, START + 8 * MINUTE + SECOND)


def send(made, verb, body=b"", at="1", known=b"1", retained=False, expires=None):
    """Let an order come by the broker."""
    request = Request(f"t/answers/me/{at}", known, "ann", retained, expires)
    delivery = Delivery(f"t/control/me/{verb}", body, 1, 1, 1, request=request)
    made.desk.take(delivery)
    made.link.inbox.append(delivery)
    made.link.arrived.set()


def answers(sent, at="1"):
    """What was answered there."""
    return [json.loads(m.payload) for m in sent if m.topic == f"t/answers/me/{at}"]


async def ordered(made, sent, verb, body=b"", at="1", **how):
    """Order by the broker; return what came of it: the last answer."""
    before = len(ends(sent, at))
    send(made, verb, body, at, **how)
    await until(lambda: len(ends(sent, at)) > before)
    return ends(sent, at)[-1]


def ends(sent, at):
    """The last words on orders there."""
    return [a.get("done") or a["refused"] for a in answers(sent, at) if "line" not in a]


async def locally(made, verb, **what):
    """Order by the socket, past it; return the answer."""
    return await made.desk.order(Order(verb, **what), "uid 7", lambda _line: None)


def journalled(made, kind=Kind.ORDERED):
    """The payloads of a kind."""
    journal = Journal(made.config.state_dir / "journal.db", readonly=True)
    try:
        of = {Kind.ORDERED: Ordered.decode, Kind.ANSWERED: Answered.decode}
        return [of.get(kind, bytes)(record.payload) for record in journal.of_kind(kind)]
    finally:
        journal.close()


def signals(made):
    """The minutes of which there is a signal in the outbox, delivered or not."""
    journal = Journal(made.config.state_dir / "journal.db", readonly=True)
    try:
        return [m.topic for m in outbox(journal)].count("t/signals/1m/A")
    finally:
        journal.close()


async def warm(made):
    """Bars that are no news."""
    await deliver(made, *(Message.of(bar("A", minute)) for minute in range(1, 7)))


@pytest.mark.parametrize("by", ["broker", "socket"])
def test_paused_path_takes_bars_and_forecasts_nothing(made, by):
    """Bars are in the windows, groups pass, and what a replay says is the same to the byte."""

    async def story():
        async with at_work(made) as sent:

            async def give(verb, at):
                if by == "socket":
                    return (await locally(made, verb)).done
                return await ordered(made, sent, verb, at=at)

            await warm(made)
            await deliver(made, Message.of(bar("A", 7)))
            said = [await give("pause", "1")]
            await made._announce()
            states = [json.loads(m.payload)["paused"] for m in sent if m.topic == "t/status/me"]
            await deliver(made, Message.of(bar("A", 8)))
            middle = signals(made), made.pipeline.windows.count("A"), made.vitals.moving
            said.append(await give("resume", "2"))
            await deliver(made, Message.of(bar("A", 9)))
            return said, states, middle

    said, states, middle = play(story())
    assert states == [True]
    assert said == [
        "paused: bars are taken, and nothing is forecast until `resume`",
        "forecasts go on with the next group",
    ]
    assert middle == (1, 8, True)
    assert signals(made) == 2
    found = verify(made.config.state_dir / "journal.db")
    assert (found.signals, found.differing, found.missing) == (2, 0, 0)
    assert [(order.who, order.verb) for order in journalled(made)] == [
        (("uid 7" if by == "socket" else "mqtt ann"), verb) for verb in ("pause", "resume")
    ]
    assert len(journalled(made, Kind.PAUSE)) == 1


def test_pause_outlives_the_process(tmp_path, made):
    """After a start, also one from a snapshot, nothing is forecast until somebody wants it again."""

    async def first():
        async with at_work(made):
            await warm(made)
            await locally(made, "pause")
            await deliver(made, Message.of(bar("A", 7)))

    async def second(again):
        async with at_work(again):
            await deliver(again, Message.of(bar("A", 8)))
            paused, about = again.pipeline.paused, (await locally(again, "state")).done
            await locally(again, "resume")
            await deliver(again, Message.of(bar("A", 9)))
            return paused, about

    play(first())
    paused, about = play(second(daemon(tmp_path, ONE, START + 8 * MINUTE + SECOND)))
    assert paused
    assert "paused: nothing is forecast until `resume`" in about
    assert signals(made) == 1
    found = verify(made.config.state_dir / "journal.db")
    assert (found.signals, found.differing, found.missing) == (1, 0, 0)


def test_paused_state_is_in_a_snapshot():
    """A compaction forgets no pause."""
    path = Pipeline(lambda *_: Spread())
    list(path.take(Pause(START, True)))
    other = Pipeline(lambda *_: Spread())
    other.restore(PipelineState.decode(path.state.encode()))
    assert other.paused


def test_order_is_in_the_journal_before_it_is_acknowledged(made):
    """What is acknowledged is not sent again: it must be known by then."""
    seen = []

    async def story():
        async with at_work(made) as sent:
            made.link.ack = lambda deliveries: seen.append(
                (any(d.request for d in deliveries), len(journalled(made)))
            )
            await ordered(made, sent, "pause")
            await until(lambda: any(request for request, _ in seen))

    play(story())
    assert [count for request, count in seen if request] == [1]


def test_order_that_comes_again_is_carried_out_once(tmp_path, made):
    """The broker delivers at least once, also over a start; whoever asks again with the same data is told."""

    async def story(made, times):
        async with at_work(made) as sent:
            return [await ordered(made, sent, "pause", b'{"reason": "maintenance"}') for _ in range(times)]

    said = play(story(made, 2))
    again = daemon(tmp_path, ONE, START + 8 * MINUTE + SECOND)
    assert {*said, *play(story(again, 1))} == {said[0]}
    assert [order.reason for order in journalled(made)] == ["maintenance"]
    assert len(journalled(made, Kind.PAUSE)) == 1


def test_order_that_a_crash_interrupted_is_not_begun_again(tmp_path, made):
    """Whether it acted the daemon cannot know: a rollback done twice would go back two models."""

    async def first():
        async with at_work(made):
            note = Ordered("mqtt ann", "rollback", answers="t/answers/me/1", correlation=b"1".hex())
            await made.scribe(made.scribe.journal.append, [(START, Kind.ORDERED, "", note.encode())])

    async def second(again):
        async with at_work(again) as sent:
            return await ordered(again, sent, "rollback")

    play(first())
    said = play(second(daemon(tmp_path, ONE, START + 8 * MINUTE + SECOND)))
    assert said.startswith("the daemon was started anew before this was done")
    assert len(journalled(made)) == 1


@pytest.mark.parametrize(
    ("verb", "body", "how", "said"),
    [
        ("dance", b"", {}, "verb 'dance' is none of state, retrain, stop, reload"),
        ("pause/now", b"", {}, "verb 'pause/now' is none of"),
        ("pause", b"now", {}, "send an object such as"),
        ("pause", b'{"now": 1}', {}, "unknown field `now`"),
        ("pause", b"\xff", {}, "send an object such as"),
        ("pause", b"[" * 4000, {}, "send an object such as"),
        ("pause", b'{"to": "fhs"}', {}, "`to` goes with the verb rollback"),
        ("pause", b" " * 5000, {}, "the body has 5000 bytes, more than 4096"),
        ("pause", b"", {"retained": True}, "the order is retained"),
        ("pause", b"", {"expires": 0.0}, "the order expired"),
        ("retrain", b"", {}, "the configuration has no [retrain]"),
        ("rollback", b"", {}, "no model served before fhs"),
    ],
)
def test_bad_order_is_refused(made, verb, body, how, said):
    """With a sentence, and nothing happens."""

    async def story():
        async with at_work(made) as sent:
            return await ordered(made, sent, verb, body, **how)

    assert said in play(story())
    assert journalled(made, Kind.PAUSE) == []


@pytest.mark.parametrize(
    ("at", "known", "said"),
    [
        (None, b"1", "is not below t/answers/"),
        ("t/signals/1m/A", b"1", "the response topic 't/signals/1m/A' is not below t/answers/"),
        ("t/answers/#", b"1", "is not below"),
        ("t/answers/x", b"", "there is no correlation data"),
    ],
)
def test_order_that_cannot_be_answered_is_a_dead_letter(made, at, known, said):
    """Nothing is published where an order says, but below the topic for answers."""

    async def story():
        async with at_work(made) as sent:
            request = Request(at, known, "ann", False, None)
            made.desk.take(Delivery("t/control/me/pause", b"{}", 1, 1, 1, request=request))
            await until(lambda: [m for m in sent if m.topic == "t/deadletter/me"])
            return sent

    sent = play(story())
    letter = json.loads(next(m.payload for m in sent if m.topic == "t/deadletter/me"))
    assert said in letter["reason"]
    assert not made.pipeline.paused
    assert {m.topic.split("/")[1] for m in sent} <= {"deadletter", "models"}


def test_orders_do_not_pile_up(made, monkeypatch):
    """Whoever floods the daemon with orders is refused."""
    monkeypatch.setattr(desk, "UNDER_WAY", 1)
    hold = asyncio.Event()

    async def holds(_order, _tell):
        await hold.wait()
        return "done"

    async def story():
        async with at_work(made) as sent:
            made.desk._carry_out = holds
            send(made, "pause", at="1")
            said = await ordered(made, sent, "resume", at="2", known=b"2")
            hold.set()
            await until(lambda: ends(sent, "1"))
            return said

    assert play(story()).startswith("1 orders are under way")


def test_orders_do_not_wait_for_bars(made):
    """While a forecast takes its time, the state is said and an order taken; bars go on after it."""
    working, free = threading.Event(), threading.Event()

    class Slow(Spread):
        def forecast(self, windows):
            working.set()
            assert free.wait(5)
            return super().forecast(windows)

    async def story():
        async with at_work(made) as sent:
            await warm(made)
            made.pipeline._forecaster = Slow("fhs")
            made.link.inbox.append(Delivery("t/bars/1m/A", Message.of(bar("A", 7)).payload, 1, 1, 1))
            made.link.arrived.set()
            await until(working.is_set)
            state = await ordered(made, sent, "state", at="1")
            send(made, "pause", at="2", known=b"2")
            await until(lambda: answers(sent, "2"))
            taken = answers(sent, "2")
            free.set()
            await until(lambda: ends(sent, "2"))
            return state, taken

    state, taken = play(story())
    assert state.startswith("fhs serves since")
    assert [list(a)[-1] for a in taken] == ["line"]
    assert signals(made) == 1  # the group under way was before the pause


def change(made, old, new):
    """Edit the configuration file."""
    path = made.config._file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_order_that_comes_while_a_full_disk_stops_is_refused(made):
    """Then nothing waits for room any more: whoever ordered hears it, and nothing ends by a traceback."""

    def full(*_):
        written = asyncio.get_running_loop().create_future()
        written.set_exception(OSError(errno.ENOSPC, "no room"))
        return written

    async def story():
        async with at_work(made):
            await warm(made)
            made.desk._write = full
            answer = await locally(made, "pause")
            assert "the daemon stops" in answer.refused
            assert not made.pipeline.paused

    play(story())


def test_order_that_nothing_could_journal_lapses(made, monkeypatch):
    """Who ordered hears that it waits; what is known too late is journalled and not carried out."""
    for name, seconds in (("SILENT_SECONDS", 0.01), ("LAPSE_SECONDS", 0.1)):
        monkeypatch.setattr(desk, name, seconds)
    said = []

    async def story():
        async with at_work(made):
            await warm(made)
            write, held = made.desk._write, asyncio.Event()

            async def late(kind, payload):
                await held.wait()
                return await write(kind, payload)

            made.desk._write = lambda *given: asyncio.ensure_future(late(*given))
            made.scribe.lost = True
            assert "its server is away" in (await locally(made, "state")).done
            made.scribe.lost = False
            order = Order("pause")
            task = asyncio.create_task(made.desk.order(order, "uid 7", said.append))
            await until(lambda: said)
            await asyncio.sleep(0.2)
            held.set()
            answer = await task
            assert "expired" in answer.refused
            assert not made.pipeline.paused

    play(story())
    assert "the order waits" in said[0]
    assert [note.verb for note in journalled(made)] == ["pause"]
    assert "expired" in journalled(made, Kind.ANSWERED)[0].refused


def test_takeover_leaves_what_a_reload_refused(made, tmp_path):
    """A standby that was started before the file was spoilt serves by what it was started with."""
    spoilt = '[[strategy]]\nkind = "quantile-band"\nparams = {horizon = 4}\n[mqtt]'

    async def refused():
        async with at_work(made):
            await warm(made)
            change(made, "[mqtt]", spoilt)
            answer = await locally(made, "reload", wait=True)
            assert "quantile-band" in answer.refused
            change(made, spoilt, "[mqtt]")

    play(refused())
    other = Daemon(load(tmp_path / "barcast.toml"), {}, asyncio.Event(), None, Outside())
    change(made, "[mqtt]", spoilt)

    async def takes_over():
        other.scribe = Scribe(Journal(other.config.state_dir / "journal.db"))
        other.forecasts = ThreadPoolExecutor(1)
        try:
            other.follow().catch_up()
            await other._read_while_waiting()
            await other.build()
        finally:
            other.forecasts.shutdown()
            other.scribe.close()

    with structlog.testing.capture_logs() as said:
        play(takes_over())
    [refusal] = [line for line in said if line["event"] == "configuration_not_read"]
    assert "quantile-band" in refusal["reason"]
    assert other.config.strategies() == made.config.strategies()


def test_reload_takes_what_a_running_daemon_can_change(made):
    """Symbols, waits, strategies and the trainings' table act from the next event on, and replay."""

    async def story():
        async with at_work(made) as sent:
            await warm(made)
            await deliver(made, Message.of(bar("A", 7)))
            change(made, 'symbols = ["A"]\n', 'symbols = ["A", "B"]\nmax_wait = "100ms"\n')
            with made.config._file.open("a") as file:
                file.write('[[strategy]]\nkind = "median-drift"\nname = "drift"\n[retrain]\nmax_age = "9d"\n')
            said = await ordered(made, sent, "reload", b'{"wait": true}')
            assert (await locally(made, "reload", wait=True)).done == "nothing has changed"
            await deliver(made, Message.of(bar("A", 8)))
            await until(lambda: signals(made) == 2)  # B is waited for now
            await until(lambda: any(m.topic == "t/targets/drift/1m/A" for m in sent))
            return said

    said = play(story())
    assert said == "symbols, max_wait, strategy, retrain: as the file says now"
    assert made.lookout._age is not None
    assert len(journalled(made, Kind.REVISION)) == 2
    found = verify(made.config.state_dir / "journal.db")
    assert (found.signals, found.differing, found.missing) == (2, 0, 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('symbols = ["A"]', 'symbols = ["a"]', "symbols.0: a symbol is A-Z"),
        ('symbols = ["A"]', "symbols = [", "not valid TOML"),
        ('symbols = ["A"]', 'symbols = ["B"]\ninstance2 = 1', "instance2: unknown key"),
        ('root = "t"', 'root = "u"', "mqtt.root: cannot change while the daemon runs"),
        ('symbols = ["A"]', 'symbols = ["B"]\ncalendar = "fx"', "calendar: cannot change"),
        ("[mqtt]", '[model]\nfirst = "hs"\n[mqtt]', "model.first: cannot change"),
        (
            "[mqtt]",
            '[[strategy]]\nkind = "quantile-band"\nparams = {horizon = 4}\n[mqtt]',
            "quantile-band",
        ),
    ],
)
def test_bad_configuration_is_refused_while_the_old_one_runs(made, old, new, said):
    """All of it or nothing: the daemon goes on as before, and a signal follows."""

    async def story():
        async with at_work(made):
            await warm(made)
            before = made.config
            change(made, old, new)
            answer = await locally(made, "reload", wait=True)
            made.desk.signalled("reload")
            await until(lambda: len(journalled(made, Kind.ANSWERED)) == 2)
            assert made.config is before
            await deliver(made, Message.of(bar("A", 7)))
            return answer

    assert said in (play(story()).refused or "")
    assert signals(made) == 1
    assert len(journalled(made, Kind.REVISION)) == 1
    assert [order.who for order in journalled(made)] == ["uid 7", "signal"]
    assert all(said in answer.refused for answer in journalled(made, Kind.ANSWERED))


@pytest.mark.parametrize("bad", ["oops = 1\n", 'log_level = "debug"\n'])
def test_children_go_by_what_is_in_force(made, bad):
    """A file that was refused, as wrong or for a key beside `keep`, acts in no compaction or verification."""
    text, kept = made.config._file.read_text(), []

    async def story():
        async with at_work(made):
            for lines in ('keep = "9d"\n', f'{bad}keep = "1d"\n', 'keep = "8d"\n'):
                made.config._file.write_text(f"{lines}{text}")
                await locally(made, "reload", wait=True)
                kept.append(load(made.config.in_force).keep // (86_400 * SECOND))

    play(story())
    assert kept == [9, 9, 8]
    assert made.config.in_force.stat().st_mode & 0o777 == 0o600
    assert made.config.changed_in(load(made.config.in_force)) == ([], [])


def test_children_are_given_what_is_in_force(made, monkeypatch):
    """Each of them, in place of the file that the daemon was given."""
    given = {}
    monkeypatch.setattr(log, "configure", lambda *_: None)
    monkeypatch.setattr(app, "serve", lambda _config, commands: given.update(commands))
    operators.run(made.config._file)
    assert {verb: command[4] for verb, command in given.items()} == dict.fromkeys(
        ("train", "choices", "gate", "compact", "verify", "reckon"), str(made.config.in_force)
    )


def test_reload_without_waiting_is_answered_at_once(made):
    """What came of it is in the log and in the journal."""

    async def story():
        async with at_work(made):
            change(made, 'symbols = ["A"]', "max_jump = 0.5")
            answer = await locally(made, "reload")
            await until(lambda: journalled(made, Kind.ANSWERED))
            return answer

    assert play(story()).done.startswith("asked for")
    assert journalled(made, Kind.ANSWERED)[0].done == "symbols, max_jump: as the file says now"


def test_retraining_takes_its_limits_from_a_reload(made):
    """A table that comes is asked by orders from then on."""

    async def story():
        async with at_work(made):
            with made.config._file.open("a") as file:
                file.write('[retrain]\ncron = "17 3 * * sun"\ntimeout = "7s"\n')
            await locally(made, "reload", wait=True)
            planned = [job.id for job in made._planner.get_jobs()]
            asked = await locally(made, "retrain")
            made._planner.shutdown(wait=False)
            return planned, asked.done, made.retraining._timeout

    assert play(story()) == (
        ["retrain"],
        "asked for; the log and the model's topic will say what comes of it",
        7.0,
    )


@pytest.mark.parametrize("result", Result)
def test_training_that_failed_was_not_done(made, monkeypatch, result):
    """Who waited for it gets an error and a status to go by; a challenger that was refused is a result."""

    async def followed(*_):
        return result

    async def story():
        async with at_work(made):
            with made.config._file.open("a") as file:
                file.write("[retrain]\n")
            await locally(made, "reload", wait=True)
            monkeypatch.setattr(made.retraining, "follow", followed)
            return await locally(made, "retrain", wait=True)

    said = f"{result}; fhs serves"
    failed = Answer(refused=f"{said}; the log says why, and `retrain` tries again")
    assert play(story()) == (failed if result is Result.failed else Answer(done=said))


def test_pause_and_resume_that_are_taken_together_are_both_answered(made, monkeypatch):
    """While a group is forecast both come into one commit: the pause is over when it is looked at."""
    go, began, armed = threading.Event(), threading.Event(), threading.Event()

    class Slow(Spread):
        def forecast(self, windows):
            if armed.is_set():
                began.set()
                assert go.wait(10)
            return super().forecast(windows)

    monkeypatch.setattr(ModelStore, "open", lambda *_: Slow("fhs"))

    async def story():
        async with at_work(made) as sent:
            await warm(made)
            armed.set()
            message = Message.of(bar("A", 7))
            made.link.inbox.append(Delivery(message.topic, message.payload, 1, 1, 1))
            made.link.arrived.set()
            await until(began.is_set)
            send(made, "pause", at="1", known=b"1")
            send(made, "resume", at="2", known=b"2")
            await until(lambda: len(journalled(made)) == 2)
            go.set()
            await until(lambda: ends(sent, "1") and ends(sent, "2"))

    play(story())
    assert len(journalled(made, Kind.ANSWERED)) == 2


def test_damaged_order_of_the_journal_is_named(made, tmp_path):
    """A start ends in a sentence with the record."""

    async def start(one):
        async with at_work(one):
            pass

    play(start(made))
    journal = Journal(made.config.journal_place)
    [number] = journal.append([(journal.last_time(), Kind.ORDERED, "", b'{"who":"x"')])
    journal.close()
    with pytest.raises(ConfigError, match=rf"record {number} \(ordered\)"):
        play(start(daemon(tmp_path, ONE)))


def test_retained_order_that_is_taken_back_is_nobodys_fault(made):
    """The empty message that the refusal asks for is no dead letter."""

    async def story():
        async with at_work(made):
            request = Request(None, b"", "", True, None)
            made.desk.take(Delivery("t/control/me/pause", b"", 1, 1, 1, request=request))
            return made.source.dead_letters

    assert play(story()) == 0


def test_reload_amid_a_look_for_drift_ends_it(made):
    """What was read by bands that are no more asks for nothing."""

    async def story():
        async with at_work(made):
            await warm(made)
            looks = made.lookout
            bands = Retrain(drift=DriftBands(coverage=0.05, crps=0.1))
            looks.configure(made.config.model_copy(update={"retrain": bands}))

            def read(*_):
                looks.configure(made.config)  # which has no [retrain]
                return object()

            looks._read = read
            return await looks.look(), looks.reading

    assert play(story()) == ([], None)
