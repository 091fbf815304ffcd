"""How `barcast watch` looks and what keys do: lines of text from what is seen, the moment and the size."""

import asyncio

import msgspec
import pytest
from rich.cells import cell_len

from barcast.backtest.cli import screen
from barcast.backtest.cli.screen import Sort, View, draw, keys, pressed, snapshot
from barcast.backtest.cli.terminal import price
from barcast.backtest.cli.watching import Watcher
from barcast.daemon.config import load
from barcast.daemon.watch import Row
from barcast.models import ConfigError
from tests.seen import CLOSE, HOUR, done, moment, notice, seen, signal, status, target, topic

SIZES = [(80, 24), (200, 50), (40, 8), (60, 12), (132, 17)]
BROKER = "broker.example:8883"
LONG = "A-VERY-LONG-NAME.OF_A-SYMBOL.USD"


def many(count=100, **own):
    """An instance with many symbols, of which some are degraded, warming, not tradable or stale."""
    bodies = [signal(f"S{i:03d}", **own) for i in range(count)]
    bodies += [
        signal(LONG, reference=0.00001234567, quantiles=[[0.00001 + i * 1e-7 for i in range(7)]] * 2),
        signal("BAD", flags=["degraded", "warming"], reasons=["2 of the last 85 bars are missing"]),
        signal("OLD", close=CLOSE - 3 * HOUR),
        signal("VAIN", tradable=False),
    ]
    targets = [target("S000", name) for name in ("drift", "quantile-band", "rank")]
    return seen(*bodies, *targets, status(), notice(), done(symbols=["S000"], missing=["X"]))


def lines(found, view=None, size=(80, 24), at=None, **how):
    """The screen as plain text."""
    return [line.plain for line in draw(found, view or View(), at or moment(), BROKER, size, **how)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 100])
def test_screen_fits(size, count):
    """Whatever the size, every line fits, there are as many as rows, and head and foot are there."""
    for found in (many(count), seen(), seen(linked=False), seen(status("lost"))):
        for view in (View(), View(Sort.skew, "S", 4, "S001"), View(prefix="ZZ"), View(typed=True)):
            drawn = lines(found, view, size)
            assert len(drawn) == size[1]
            assert max(map(cell_len, drawn)) <= size[0]
            assert drawn[0].startswith("desk ")
            assert drawn[0].endswith("15:00:12Z")
            assert "degraded" in drawn[-2]
            assert ("begin with" if view.typed else " by ") in drawn[-1]


def test_too_small_a_terminal_is_told():
    """Below the least size the state and the remedy are all that is said."""
    drawn = lines(many(), size=(30, 5))
    assert drawn[:2] == ["desk LIVE", "make it 40x8 at least"]
    assert len(drawn) == 5


@pytest.mark.parametrize("bars", [1, 4])
def test_numbers_are_those_of_the_messages(bars):
    """What a wide screen shows of a symbol is what its messages say of that horizon."""
    body, wanted = signal(), target(target=-0.4)
    found = seen(body, wanted, status(), notice(), done(withheld={"X": "y"}), at=moment(2.5))
    drawn = lines(found, View(horizon=bars), (200, 50))
    head = next(line for line in drawn if line.startswith("SYMBOL"))
    row = next(line for line in drawn if line.startswith("BTCUSD"))
    i = (1, 4).index(bars)
    prices = dict(zip(body.levels, body.quantiles[i], strict=True))
    shown = row.replace("┃", " ").replace("━", " ").replace("─", " ").replace("┊", " ").split()
    assert shown == [
        "BTCUSD",
        price(body.reference),
        "12s",
        f"{100 * (prices[0.5] / body.reference - 1):+.2f}%",
        *(price(prices[level]) for level in (0.05, 0.95, 0.25, 0.75)),
        f"{100 * (prices[0.95] - prices[0.05]) / body.reference:.2f}%",
        f"{100 * body.rise[i]:.0f}%",
        f"{Row.of(body).figures[bars].skew:+.2f}",
        f"{100 * body.coverage.share['0.9'][i]:.0f}%",
        f"{wanted.target:+.2f}",
    ]
    reach = max(abs(p / body.reference - 1) for p in prices.values())
    assert f"+{bars} ±{100 * reach:.2f}%" in head
    detail = next(line for line in drawn if line.startswith(f"+{bars} "))
    assert f"rise {100 * body.rise[i]:.0f}%" in detail
    assert f"median {price(prices[0.5])}" in detail
    assert f"90% {price(prices[0.05])} {price(prices[0.95])}" in detail
    assert f"inside {100 * body.coverage.share['0.9'][i]:.0f}% of {body.coverage.outcomes[i]}" in detail
    assert body.horizons[i].end_time[11:] in detail
    assert f"model {notice().model} since 14:00:00Z  processed 15:00:00Z  waiting 7" in drawn[1]
    assert drawn[2] == "group 15:00:00Z: 1 after 2.5s  missing 0  withheld 1  late 0  shed 0 of 1"


def test_fan_is_drawn_to_scale():
    """The reference is in the middle, the ends of the intervals and the median where their prices are."""
    body = signal(reference=100.0, quantiles=[[90.0, 92, 95, 100, 105, 108, 110]] * 2)
    said = Row.of(body).figures[1]
    assert screen.fan(said, 100.0, 0.1, 13).plain == "───━━━┃━━━───"
    assert screen.fan(said, 100.0, 0.2, 13).plain == "   ─━━┃━━─   "
    body = signal(reference=100.0, quantiles=[[101.0, 102, 103, 104, 105, 106, 108]] * 2)
    assert screen.fan(Row.of(body).figures[1], 100.0, 0.1, 21).plain == "          ┊──━┃━───  "
    bare = signal(levels=[0.1, 0.9], quantiles=[[99.0, 102.0]] * 2)
    assert screen.fan(Row.of(bare).figures[1], 100.5, 0.1, 5).plain == "  ┊  "


def row_of(name, drawn):
    return next(line for line in drawn if line.startswith(name))


def test_faults_are_marked_by_signs():
    """Degraded, warming, not tradable and stale are signs in the line, not colours alone."""
    drawn = lines(many(0), size=(200, 50))
    signs = [row_of(name, drawn)[32:36].strip() for name in ("BAD", "OLD", "VAIN", LONG[:30])]
    assert signs == ["!w", "z", "x", ""]
    assert "2 of the last 85 bars" in row_of("BAD", drawn)
    assert drawn[-2] == "! degraded  w warming up  x not tradable  z stale: past its validity"
    later = lines(many(0), size=(200, 50), at=moment(2 * 3600))
    assert row_of("VAIN", later)[32:36].strip() == "xz"
    assert "2.0h" in row_of("VAIN", later)


def test_reasons_of_the_chosen_are_told_in_full():
    """On a narrow screen, where they have no column, the details have room for them."""
    reasons = ["2 of the last 85 bars are missing", "a jump of 31 % at 14:05 was not declared"]
    found = seen(signal("A"), signal("BAD", flags=["degraded"], reasons=reasons), status())
    said = " ".join(lines(found, View(chosen="BAD")))
    assert f"! {'; '.join(reasons)}" in " ".join(said.split())
    assert not any(reason in " ".join(lines(found)) for reason in reasons)


def test_long_names_are_cut_where_there_is_no_room():
    """A narrow screen shows their beginning and that there is more; a wide one, and the table, all of it."""
    found = many(0)
    assert any(line.startswith("A-VERY-LO… ") for line in lines(found))
    assert any(line.startswith(f"{LONG} ") for line in lines(found, size=(200, 50)))
    assert any(line.plain.startswith(f"{LONG} ") for line in snapshot(found, View(), moment(), BROKER, 100))


def test_texts_of_messages_give_the_terminal_no_orders():
    """Escape sequences and line ends in whatever is shown are replaced."""
    evil = "A\x1b[2J\x1b]0;x\x07\n\u202eB"
    found = seen(
        signal(evil, flags=["degraded"], reasons=[evil], model=evil, sampler=evil),
        target(evil, strategy=evil),
        notice(evil),
        status(),
    )
    every = [*lines(found), *lines(found, size=(200, 50))]
    every += [line.plain for line in snapshot(found, View(), moment(), BROKER, 100)]
    assert all(line.isprintable() for line in every)
    assert any("A?[2J" in line for line in every)


def test_terminals_that_know_ascii_alone_get_no_more():
    """Fans, arrows and what messages bring are written so; every line keeps its length."""
    found = many(1)
    found.take(topic(signal("Ä")), msgspec.json.encode(signal("Ä")), moment())
    for line in draw(found, View(), moment(), BROKER, (200, 50)):
        plain = screen.ascii_only(line).plain
        assert plain.isascii()
        assert len(plain) == len(line.plain)


@pytest.mark.parametrize(
    ("found", "word", "said"),
    [
        (seen(linked=False), "CONNECTING", "no signals yet"),
        (seen(), "NO STATUS", "no signals yet: they come when the 1h bars of a group have been forecast"),
        (seen(status(), signal()), "LIVE", "BTCUSD"),
        (seen(status("lost"), signal()), "OFFLINE", "the daemon lost its connection, or its life"),
        (seen(status("full")), "FULL", "the disk of the daemon is full"),
        (seen(status(paused=True)), "PAUSED", "an operator paused the daemon"),
    ],
)
def test_each_state_has_its_screen(found, word, said):
    """The state is a word in the first line, and in the fourth the sentence to it; no rows have a reason."""
    drawn = lines(found)
    assert drawn[0].startswith(f"desk  {word} ")
    assert said in "\n".join(drawn)
    assert drawn[3] == found.standing(moment()).why[:80]


def test_lost_broker_is_told_above_what_was_known():
    """The signals stay, with their age, below the word that there is no broker and why."""
    found = many(1)
    found.link(False, "[Errno 111] Connection refused", moment(20))
    drawn = lines(found, at=moment(32))
    assert drawn[0].startswith("desk  NO BROKER ")
    assert drawn[3].startswith("for 12 s: [Errno 111] Connection refused; trying again")
    assert "32s" in row_of("S000", drawn)


def test_symbols_are_sorted_by_what_is_asked_for():
    """By name, the widest, most skewed, likeliest or oldest first; those without the figure last."""
    wide = [[100.5 * (1 + s) for s in (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)]] * 2
    found = seen(
        signal("A", rise=[0.4, 0.6]),
        signal("B", quantiles=wide, rise=[0.9, 0.1]),
        signal("C", close=CLOSE - HOUR, rise=[0.5, 0.5]),
        signal("D", levels=[0.1, 0.9], quantiles=[[99.0, 102.0]] * 2, rise=[0.1, 0.9]),
    )

    def names(sort, bars=None):
        return "".join(row.signal.symbol for row in screen.rows(found, View(sort, horizon=bars)))

    assert [names(sort) for sort in Sort] == ["ABCD", "BACD", "ACBD", "BCAD", "CABD"]
    assert names(Sort.rise, 4) == "DACB"
    assert [r.signal.symbol for r in screen.rows(found, View(prefix="b"))] == ["B"]


def test_keys_move_through_more_symbols_than_rows():
    """Each of the symbols can be chosen, pages follow the choice, and the ends hold."""
    found, height, view = many(100), 24, View()

    def shown(view):
        drawn = lines(found, view)
        return [line.split()[0] for line in drawn[5:16] if line], drawn[-1].split(" by ")[0]

    assert shown(view)[1] == "1-11 of 104"
    for key in ("page down", "down", "end", "down"):
        view = pressed(key, view, found, height)
    assert view.chosen == "VAIN"
    assert shown(view) == (["S096", "S097", "S098", "S099", "VAIN"], "100-104 of 104")
    view = pressed("home", view, found, height)
    assert view.chosen == "A-VERY-LONG-NAME.OF_A-SYMBOL.USD"
    assert pressed("up", view, found, height).chosen == view.chosen
    assert pressed("q", view, found, height) is None
    assert pressed("?", view, found, height) == view


def test_keys_sort_filter_and_change_the_horizon():
    """s goes through the sort keys, arrows through the horizons, and letters after / are the prefix."""
    found, view = many(3), View()

    def press(*names):
        nonlocal view
        for name in names:
            view = pressed(name, view, found, 24)
        return view

    assert press("s").sort is Sort.width
    assert press("S", "S").sort is Sort.staleness
    assert [press("right").horizon, press("right").horizon, press("left").horizon] == [4, 1, 4]
    assert press("/", "q", "b", "back", "x") == View(Sort.staleness, "QX", 4, None, True)
    assert press("enter").typed is False
    assert press("escape").prefix == ""
    assert press("/", "s", "escape") == View(Sort.staleness, "", 4)


def test_bytes_of_a_terminal_are_keys():
    """Arrows in both of their spellings, pages, ends, letters, and what means nothing."""
    typed = b"q\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[1;5C\x1b[H/\x7f\r\x1b\x00\xff"
    assert keys(typed) == [
        *("q", "up", "down", "page up", "page down", "home", "/", "back", "enter", "escape"),
    ]


def test_table_for_no_terminal_holds_every_symbol():
    """All symbols are in it, and what is wrong with their bars in full below."""
    drawn = [line.plain for line in snapshot(many(100), View(), moment(), BROKER, 100)]
    assert sum(line.startswith("S") and line[1:4].isdigit() for line in drawn) == 100
    assert drawn[-1] == "! BAD: 2 of the last 85 bars are missing"
    assert max(map(cell_len, drawn)) <= 100


def test_spans_are_short():
    """The largest unit, five characters."""
    spans = [0, 59, 84, 3600, 9.97 * 3600, 86_400 * 2.55, 86_400 * 400, -3]
    assert [screen.span(int(s * 1e9)) for s in spans] == [
        *("0s", "59s", "1.4m", "1.0h", "10h", "2.5d", "400d", "-3s"),
    ]
    assert screen.span(654_000_000, True) == "0.654s"


def test_unknown_sort_and_missing_instance_end_in_a_sentence(run, tmp_path, monkeypatch):
    """A mistyped key is named with those that there are; without a broker a table fails after a while."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "desk"\nstate_dir = "s"\ntimeframe = "1h"\n[mqtt]\nport = 1\n')
    status, _, err = run("watch", str(config), "--sort", "size")
    assert (
        status,
        "none of name, width, skew, rise, staleness" in " ".join(err.replace("│", " ").split()),
    ) == (2, True)
    monkeypatch.setattr("barcast.backtest.cli.watching.PATIENCE_SECONDS", 0.5)
    status, out, err = run("watch", str(config))
    assert (status, out) == (78, "")
    assert "error: desk: nothing came from 127.0.0.1:1 below barcast/v1 within 0 s (no broker: " in err


def test_horizon_that_no_signal_has_is_named(tmp_path):
    """It is not shown as another one: that ends with those that there are, once signals tell."""
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "desk"\nstate_dir = "s"\ntimeframe = "1h"\n')
    watcher = Watcher(load(config), View(horizon=7))
    connection = asyncio.Future(loop=asyncio.new_event_loop())
    assert not watcher._take(connection)
    watcher.seen = seen(signal())
    with pytest.raises(ConfigError, match="--horizon: 7 is none of 1, 4"):
        watcher._take(connection)
    connection.get_loop().close()
