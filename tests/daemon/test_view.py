"""What the page is told: the very messages, newest first of all, in bounded memory however slow who looks."""

import asyncio
import json

import numpy as np
import pytest

from barcast.daemon import view, wire
from barcast.daemon.journal import Kind, Record
from barcast.daemon.ports import Arrival
from barcast.daemon.view import CrowdedError, View, activations, chart, reach
from barcast.daemon.wire import Outgoing
from barcast.models import Window
from tests.fakes import MINUTE, START, bar, opening, outgoing
from tests.rim import play


def told(minutes, symbols=("A", "B")):
    """What the path says to bars of these symbols, from minute 1 on."""
    events = opening(symbols)
    for minute in range(1, minutes + 1):
        events.append(Arrival(START + minute * MINUTE + 1, tuple(bar(name, minute) for name in symbols)))
    return outgoing(events)


def signal(symbol, number):
    """A message under a symbol's topic."""
    return Outgoing("", f"t/signals/1m/{symbol}", json.dumps([symbol, number]).encode(), True, None)


def done(*symbols, **fields):
    """The message that ends a group."""
    group = wire.GroupDone(
        schema=1,
        id="",
        timeframe="1m",
        previous=None,
        straggler=False,
        symbols=list(symbols),
        model="m",
        valid_until="2026-11-22T10:02:00Z",
        tradable=True,
        **{"close_time": "2026-11-22T10:00:00Z", "withheld": {}, "missing": []} | fields,
    )
    return Outgoing("", "t/groups/1m", view.msgspec.json.encode(group), False, None)


def seen(number, *symbols):
    """A group with one signal each."""
    return [*(signal(name, number) for name in symbols), done(*symbols)]


def empty():
    """A view of nothing yet."""
    return View("t", "1m", {"instance": "me"})


def parsed(event):
    """Name and data of an event."""
    first, second, *rest = event.decode().split("\n")
    assert rest == ["", ""]
    return first.removeprefix("event: "), json.loads(second.removeprefix("data: "))


async def followed(shown, *batches):
    """The events of one who looks from the beginning."""
    with shown.watched() as viewer:
        found = [await viewer.next()]
        for batch in batches:
            shown.told(batch)
            found.append(await viewer.next())
    return found


def test_viewers_get_the_bytes_of_the_messages():
    """State and updates hold each signal, group and request byte by byte as the broker gets it."""
    messages = told(6)
    signals = [m for m in messages if "/signals/" in m.topic]
    shown = empty()
    first, update = play(followed(shown, messages[-4:]))
    nothing = {"training": None, "since": None, "signals": [], "groups": [], "gaps": []}
    assert parsed(first) == ("state", {"about": {"instance": "me"}, **nothing})
    assert parsed(update)[0] == "group"
    assert all(m.payload in update for m in messages[-4:] if "/targets/" not in m.topic)
    shown.told(messages)
    assert [json.loads(p)["symbol"] for p in (shown.signals("A")[-1], shown.signals("B")[-1])] == ["A", "B"]
    assert {shown.signals(name)[-1] for name in "AB"} == {m.payload for m in signals[-2:]}
    assert all(m.payload in shown.whole() for m in signals[-2:])
    assert not any(m.payload in shown.whole() for m in signals[:-2])


def test_a_group_is_one_event():
    """However many symbols it has; what is asked for because of it belongs to it, targets do not."""
    gap = Outgoing("", "t/backfill/1m/A", b'{"symbol":"A"}', False, None)
    target = Outgoing("", "t/targets/x/1m/A", b'{"target":1}', True, None)
    batch = [signal("A", 1), signal("B", 1), target, done("A", "B"), gap, signal("C", 1), done("C")]

    async def story():
        shown = empty()
        with shown.watched() as viewer:
            await viewer.next()
            shown.told(batch)
            return [parsed(await viewer.next()) for _ in range(2)], viewer._updates

    (first, second), rest = play(story())
    assert first[1]["signals"] == [["A", 1], ["B", 1]]
    assert first[1]["gaps"] == [{"symbol": "A"}]
    assert (second[1]["signals"], second[1]["gaps"], list(rest)) == ([["C", 1]], [], [])


def test_some_earlier_signals_are_kept():
    """Every eighth, six of them, whether they were told or remembered; the same one twice is one."""
    shown, again = empty(), empty()
    for number in range(100):
        for _ in range(2):
            shown.told(seen(number, "A"))
    numbers = [json.loads(payload)[1] for payload in shown.signals("A")]
    assert numbers == [48, 56, 64, 72, 80, 88, 96, 99][-view.FANS - 1 :]
    again.remember([(m.topic, m.payload) for m in (signal("A", number) for number in reversed(range(100)))])
    assert again.signals("A") == shown.signals("A")
    assert again.signals("B") == []


def test_who_looked_before_is_told_what_is_remembered():
    """A page is served while the journal is read: who has the empty state already gets the whole of it."""

    async def story():
        shown = empty()
        with shown.watched() as viewer:
            await viewer.next()
            waiting = asyncio.create_task(viewer.next())
            await asyncio.sleep(0)
            shown.remember([(m.topic, m.payload) for m in (signal("B", 1), signal("A", 1))])
            async with asyncio.timeout(10):
                return parsed(await waiting)

    name, state = play(story())
    assert (name, state["signals"]) == ("state", [["A", 1], ["B", 1]])


def test_since_when_groups_are_known_is_said():
    """From the first that was told: of those before a start nothing is known, well or not."""
    shown = empty()
    shown.remember([(signal("A", 1).topic, signal("A", 1).payload)])
    assert parsed(shown.whole())[1]["since"] is None
    shown.told([done("A", close_time="2026-11-22T10:00:00Z")])
    shown.told([done("A", close_time="2026-11-22T10:01:00Z")])
    assert parsed(shown.whole())[1]["since"] == "2026-11-22T10:00:00Z"


def test_symbols_are_bounded(monkeypatch):
    """Those that were forecast last are kept."""
    monkeypatch.setattr(view, "SYMBOLS", 3)
    shown = empty()
    for name in "ABCAD":
        shown.told(seen(1, name))
    assert parsed(shown.whole())[1]["signals"] == [["C", 1], ["A", 1], ["D", 1]]
    assert not shown.signals("B")


def test_groups_worth_a_word_are_kept():
    """Those in which all was well are not; of the others, and of requests, the newest ones."""
    shown = empty()
    shown.told(seen(1, "A"))
    for number in range(view.GROUPS + 5):
        gap = Outgoing("", "t/backfill/1m/A", b"%d" % number, False, None)
        shown.told([done("A", missing=[f"S{number}"]), *[gap] * 3])
    _, state = parsed(shown.whole())
    assert [group["missing"] for group in state["groups"]] == [[f"S{n}"] for n in range(5, view.GROUPS + 5)]
    assert len(state["gaps"]) == view.GAPS


@pytest.mark.parametrize(
    "fields",
    [
        {"withheld": {"B": "why"}},
        {"missing": ["B"]},
        {"straggler": True},
        {"refused": {"s": "why"}},
        {"shed": True},
    ],
)
def test_what_is_worth_a_word(fields):
    """Withheld, missing, late, refused, shed."""
    group = view.msgspec.structs.replace(
        view.msgspec.json.decode(done("A").payload, type=wire.GroupDone), **fields
    )
    shown = empty()
    shown.told([Outgoing("", "t/groups/1m", view.msgspec.json.encode(group), False, None)])
    assert len(parsed(shown.whole())[1]["groups"]) == 1


def test_who_is_slow_loses_updates_and_no_memory():
    """Beyond so many updates nothing waits but the news that the whole is to be sent again."""

    async def story():
        shown = empty()
        with shown.watched() as slow, shown.watched() as quick:
            await slow.next()
            for number in range(1000):
                shown.told(seen(number, "A"))
                await quick.next()
                assert len(slow._updates) <= view.QUEUE
            state = parsed(await slow.next())
            shown.told(seen(1000, "A"))
            return state, parsed(await slow.next())

    (name, state), (after, update) = play(story())
    assert (name, state["signals"]) == ("state", [["A", 999]])
    assert (after, update["signals"]) == ("group", [["A", 1000]])


def test_nobody_waits_in_vain():
    """One who waits is woken by the next group, and not before."""

    async def story():
        shown = empty()
        with shown.watched() as viewer:
            await viewer.next()
            waiting = asyncio.create_task(viewer.next())
            await asyncio.sleep(0.01)
            assert not waiting.done()
            shown.told(seen(1, "A"))
            assert parsed(await waiting)[1]["signals"] == [["A", 1]]

    play(story())


def test_viewers_are_bounded(monkeypatch):
    """One too many is told so; who goes makes room."""
    monkeypatch.setattr(view, "VIEWERS", 1)
    shown = empty()
    for _ in range(2):
        with shown.watched(), pytest.raises(CrowdedError), shown.watched():
            pass


def test_a_chart_has_bars_and_signals_as_they_are():
    """Times in seconds, prices as they came, signals byte by byte."""
    payload = next(m.payload for m in told(4) if "/signals/" in m.topic)
    values = np.array([[1.1, 2.2, 0.3, 1.7, 10.0], [1.7, 1.8, 1.6, 1.75, 0.1]])
    window = Window("A", np.array([START, START + MINUTE]), values)
    made = chart(window, [START + 2 * MINUTE], [payload])
    found = json.loads(made)
    seconds = START // 10**9
    assert found["bars"] == [[seconds, *values[0]], [seconds + 60, *values[1]]]
    assert (found["symbol"], found["ahead"]) == ("A", [seconds + 120])
    assert payload in made
    assert reach(payload) == 2


def test_activations_are_the_journals():
    """The newest first, with the record's time, and not without end."""
    records = [
        Record(n, START + n * MINUTE, Kind.ACTIVATION, "", b'{"model":"m%d"}' % n)
        for n in range(view.ACTIVATIONS + 3)
    ]
    found = json.loads(activations(iter(records)))
    assert found[0] == {
        "time": wire.to_text(START + (view.ACTIVATIONS + 2) * MINUTE),
        "champion": {"model": f"m{view.ACTIVATIONS + 2}"},
    }
    assert len(found) == view.ACTIVATIONS
