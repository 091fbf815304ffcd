"""The page: what it answers and refuses, what it is told until when, and what a browser makes of it."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection

import msgspec
import numpy as np
import pytest

from barcast.daemon import http, view, wire
from barcast.daemon.http import ASSETS, HEADERS, listen, page, serving
from barcast.daemon.ports import Arrival
from barcast.daemon.reckoning import reckon
from barcast.daemon.view import View, chart
from barcast.daemon.watch import Row
from barcast.models import Window
from tests.backtest.browser import WIDE, chromium, find_chromium
from tests.daemon.living import LEAST, at_work, daemon, deliver, showing, until
from tests.daemon.test_reckoning import market, told
from tests.daemon.test_view import empty, parsed, seen, signal
from tests.fakes import MINUTE, START, bar, opening, outgoing
from tests.rim import SECOND, Message, play
from tests.seen import LEVELS
from tests.seen import signal as said_signal

HERE = ((b"host", b"127.0.0.1:9464"),)


def app(shown=None):
    """All addresses, with a daemon that is well."""

    async def metrics():
        return b"barcast_ready 1\n"

    async def ready():
        return {"moving": True}

    return page(metrics, lambda: {"moving": True}, ready, shown or showing())


async def request(what, path, method="GET", headers=HERE, query=b"", body=b""):
    """Status, headers and body of one request."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "server": ("127.0.0.1", 9464),
        "client": ("127.0.0.1", 1),
    }
    await what(scope, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def ask(*arguments, **options):
    """The same, outside of a loop."""
    return play(request(*arguments, **options))


def test_every_answer_has_the_headers():
    """Found or not, allowed or not, of page or metrics, or a fault: the policy is on each."""
    evil = {"Host": "evil.example"}
    faulty = replace(showing(), chart=lambda symbol: b"{}" if symbol == "A" else 1 / 0)
    asked = [
        (200, "GET", "/", {}),
        (200, "GET", "/page/app.mjs", {}),
        (200, "GET", "/metrics", {}),
        (200, "GET", "/activations", {}),
        (404, "GET", "/nothing", {}),
        (404, "GET", "/page/../http.py", {}),
        (200, "GET", "/symbols/A", {}),
        *((405, "POST", path, {}) for path in ("/", "/events", "/symbols/A", "/metrics")),
        (421, "GET", "/", evil),
        (200, "HEAD", "/events", {}),
        (500, "GET", "/symbols/B", {}),
    ]

    def answered(port, method, path, headers):
        with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders())

    async def story():
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        async with serving(listening, app(faulty)):
            return [await asyncio.to_thread(answered, port, *what) for _, *what in asked]

    told = play(story())
    assert [status for status, _ in told] == [status for status, *_ in asked]
    for _, headers in told:
        assert HEADERS.items() <= {key.title(): value for key, value in headers.items()}.items()
    assert HEADERS.keys() == {
        "Content-Security-Policy",
        "Cross-Origin-Opener-Policy",
        "Cross-Origin-Resource-Policy",
        "Permissions-Policy",
        "Referrer-Policy",
        "X-Content-Type-Options",
        "X-Frame-Options",
    }
    assert "'unsafe" not in HEADERS["Content-Security-Policy"]
    assert HEADERS["Content-Security-Policy"].startswith("default-src 'none';")


@pytest.mark.parametrize("path", ["/", "/page/style.css", "/events", "/activations"])
def test_head_has_no_body(path):
    """HEAD says what GET would, and ends."""
    status, headers, _ = ask(app(), path, "HEAD")
    assert status == 200
    assert headers["content-type"].startswith(("text/", "application/json"))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "XYZ"])
def test_nothing_can_be_changed(method):
    """Only what reads is allowed."""
    for path in ("/", "/page/app.mjs", "/events", "/symbols/A", "/activations"):
        assert ask(app(), path, method)[0] == 405


def test_odd_requests_are_no_fault():
    """Whatever is in path, query and headers, the answer is never a 5xx."""
    draw = random.Random(7)
    shown = app(showing(charts={"A": b"{}"}))
    places = ["/", "/page/", "/symbols/", "/symbols/A", "/activations", "/events/"]

    async def story():
        for _ in range(500):
            text = bytes(draw.randrange(256) for _ in range(draw.randrange(12)))
            path = draw.choice(places) + draw.choice(["", "/", text.decode("utf-8", "surrogateescape")])
            host = draw.choice([b"localhost", b"[::1]:1", b"[", b"", b":::", text])
            headers = [(b"host", host), (b"if-none-match", text)][: draw.randrange(3)]
            status, _, _ = await request(shown, path, "GET", headers, text)
            assert status < 500, (path, headers)

    play(story())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:9464", 200),
        ("127.0.0.1", 200),
        ("[::1]:9464", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_a_foreign_name_is_refused(host, status):
    """On loopback only names of loopback are answered to; metrics are scraped by any name."""
    headers = ((b"host", host.encode()),)
    for path in ("/", "/page/app.mjs", "/activations"):
        assert ask(app(), path, headers=headers)[0] == status
    assert ask(app(), "/metrics", headers=headers)[0] == 200


def test_a_file_that_is_known_is_not_sent_again():
    """By its tag."""
    status, headers, body = ask(app(), "/page/style.css")
    assert (status, body) == (200, (ASSETS / "style.css").read_bytes())
    again = ask(app(), "/page/style.css", headers=(*HERE, (b"if-none-match", headers["etag"].encode())))
    assert (again[0], again[2]) == (304, b"")


def test_a_stray_file_is_no_fault(tmp_path, monkeypatch):
    """What an editor or a system leaves among the files of the page is not served, and stops nothing."""
    for name in ("index.html", "app.mjs~", ".DS_Store", "README"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "__pycache__").mkdir()
    monkeypatch.setattr(http, "ASSETS", tmp_path)
    assert [ask(app(), f"/page/{path.name}")[0] for path in sorted(tmp_path.iterdir())] == [404] * 4 + [200]


def test_it_needs_nothing_from_elsewhere():
    """No script or style in the markup, no other host but in links, every file it names is there."""
    text = (ASSETS / "index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    links = set(re.findall(r'<a href="(https?:[^"]+)"', text))
    assert set(re.findall(r'https?://[^"]+', text)) == links == {"https://www.tradingview.com/"}
    named = set(re.findall(r'(?:href|src)="/page/([^"]+)"', text))
    for path in ASSETS.glob("*.mjs"):
        own = path.name != "lightweight-charts.mjs"
        named |= set(re.findall(r'from "\./([^"]+)"', path.read_text("utf-8"))) if own else set()
    assert named == {path.name for path in ASSETS.iterdir()} - {"index.html"}


def test_who_made_the_charts_is_said():
    """As their licence asks: the notice and a link are in sight, licence and notice are shipped."""
    text = (ASSETS / "index.html").read_text("utf-8")
    footer = text[text.index("<footer") :]
    assert "TradingView Lightweight Charts™, Copyright © 2023 TradingView, Inc." in footer
    assert "Apache License" in (ASSETS / "lightweight-charts-LICENSE.txt").read_text("utf-8")
    assert "TradingView, Inc." in (ASSETS / "lightweight-charts-NOTICE.txt").read_text("utf-8")


def test_a_symbol_without_bars_is_null():
    """Which is no error: it may be expected and not have come."""
    assert ask(app(), "/symbols/A")[2] == b"null"
    assert ask(app(showing(charts={"A": b"{}"})), "/symbols/A")[2] == b"{}"


async def looking(port):
    """A connection that follows the events, past the headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    return head, reader, writer


async def chunk(reader):
    """The next event."""
    size = int(await reader.readline(), 16)
    data = await reader.readexactly(size + 2)
    return parsed(data[:-2])


def test_events_begin_with_the_state_and_go_on():
    """First all there is, then the time, then each group as it is told; all of it ends with the server."""

    async def story():
        shown = empty()
        shown.told(seen(1, "A", "B"))
        listening = listen("127.0.0.1", 0)
        async with serving(listening, app(showing(shown))):
            head, reader, writer = await looking(listening.getsockname()[1])
            found = [await chunk(reader), await chunk(reader)]
            shown.told(seen(2, "B"))
            found.append(await chunk(reader))
        rest = await reader.read()
        writer.close()
        await until(lambda: not shown._viewers)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        return head, found, rest, [task for task in left if "limited" not in repr(task)]

    head, (state, beat, update), rest, left = play(story())
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-type: text/event-stream" in head
    assert (state[0], state[1]["signals"]) == ("state", [["A", 1], ["B", 1]])
    assert (beat[0], beat[1]["not"]) == ("beat", [])
    assert (update[0], update[1]["signals"]) == ("group", [["B", 2]])
    assert (rest, left) == (b"", [])


def test_the_time_is_told_again_and_again(monkeypatch):
    """So that silence means that nobody is there."""
    monkeypatch.setattr(http, "BEAT_SECONDS", 0.02)

    async def story():
        listening = listen("127.0.0.1", 0)
        async with serving(listening, app()):
            _, reader, writer = await looking(listening.getsockname()[1])
            found = [await chunk(reader) for _ in range(4)]
            writer.close()
        return found

    assert [name for name, _ in play(story())] == ["state", "beat", "beat", "beat"]


def test_who_goes_makes_room(monkeypatch):
    """One viewer too many is refused until another one has gone; who only asks is told the same."""
    monkeypatch.setattr(view, "VIEWERS", 1)

    async def story():
        shown = empty()
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        async with serving(listening, app(showing(shown))):
            first, _, writer = await looking(port)
            second, _, other = await looking(port)
            assert (await request(app(showing(shown)), "/events", "HEAD"))[0] == 429
            for one in (writer, other):
                one.close()
            await until(lambda: not shown._viewers)
            third, _, last = await looking(port)
            last.close()
        return first, second, third

    heads = play(story())
    assert [head.split()[1] for head in heads] == [b"200", b"429", b"200"]


def test_who_does_not_read_is_let_go(monkeypatch):
    """A viewer that takes nothing holds what is on its way for a while, and is cut off then."""
    monkeypatch.setattr(http, "STALLED_SECONDS", 0.1)

    async def story():
        shown = empty()
        for name in "ABCD":
            shown.told([signal(name, "x" * 5_000_000), *seen(1, "E")])
        listening = listen("127.0.0.1", 0)
        async with serving(listening, app(showing(shown))):
            _, _, writer = await looking(listening.getsockname()[1])
            assert shown._viewers
            await until(lambda: not shown._viewers)
            writer.close()

    play(story())


SERVED = LEAST.replace("[mqtt]", 'symbols = ["A"]\n[mqtt]') + "[http]\nport = 9\n"


def test_it_shows_what_the_broker_gets(tmp_path):
    """Of a daemon at work: each signal byte by byte, bars as they came, who serves; also after a restart."""
    clock = START + 400 * MINUTE + SECOND
    bars = [bar("A", minute) for minute in range(1, 401)]

    async def story(made, *messages):
        async with at_work(made) as sent:
            await deliver(made, *messages)
            shown = made.shown()
            what = (shown.view.whole(), shown.chart("A"), await shown.activations(), await shown.beat())
            assert shown.chart("B") is None
            return what, sent

    ours = (Message.of(*bars[:399]), Message.of(bars[399]))
    (whole, drawn, served, beat), sent = play(story(daemon(tmp_path, SERVED, clock), *ours))
    newest = [m.payload for m in sent if "/signals/" in m.topic][-1]
    assert newest in whole
    assert newest in drawn
    plotted = json.loads(drawn)["bars"]
    assert len(plotted) == view.CANDLES
    assert plotted[-1] == [(START + 400 * MINUTE) // SECOND, *map(float, bars[-1].values)]
    assert json.loads(drawn)["ahead"][0] == plotted[-1][0] + 60
    [activation] = json.loads(served)
    assert activation["champion"]["model"] == "fhs"
    assert json.loads(beat)["not"] == []
    (after, again, served_since, _), _ = play(story(daemon(tmp_path, SERVED, clock)))
    assert newest in after
    assert json.loads(again)["bars"][-1] == plotted[-1]
    assert served_since == served


def test_what_is_not_committed_is_not_shown(tmp_path):
    """The view is told after the journal has it."""
    made, before = daemon(tmp_path, SERVED, START + 400 * MINUTE + SECOND), []

    async def story():
        async with at_work(made):
            shown, settle = made.view, made.scribe.journal.settle

            def settled(progress, messages):
                before.append((len(shown.signals("A")), len(messages)))
                settle(progress, messages)

            made.scribe.journal.settle = settled
            await deliver(made, Message.of(*(bar("A", minute) for minute in range(1, 400))))
            await deliver(made, Message.of(bar("A", 400)))
            return len(shown.signals("A"))

    assert play(story()) > 0
    first = next(known for known, messages in before if messages)
    assert first == 0


def test_a_daemon_that_is_not_ready_shows_that(tmp_path):
    """While it recovers or stands by there are no bars, nobody serves, and the beat says why."""
    made = daemon(tmp_path, SERVED, START)

    async def story():
        shown = made.shown()
        return shown.chart("A"), await shown.activations(), json.loads(await shown.beat())

    nothing, nobody, beat = play(story())
    assert (nothing, nobody) == (None, b"[]")
    assert "recovered" in beat["not"]


NAMES = tuple(f"S{number:02}" for number in range(40))


class Stage:
    """A page in a thread of its own, which is told what is said minute by minute."""

    def __init__(self) -> None:
        self.view = View(
            "t", "1m", {"instance": "me", "timeframe": "1m", "bars": "t/bars/1m", "speed": 1, "version": "1"}
        )
        self._events = opening(NAMES)
        self.bars: dict[str, list] = {name: [] for name in NAMES}
        self.said: list = []
        self.minute = 0
        self.port = 0
        self.now = START
        self.well = True

    @contextmanager
    def served(self) -> Iterator[None]:
        """Serve it, again on the same port."""
        ready, loop = threading.Event(), asyncio.new_event_loop()
        end = asyncio.Event()

        async def story():
            listening = listen("127.0.0.1", self.port)
            self.port = listening.getsockname()[1]
            shown = replace(
                showing(self.view, self),
                beat=self.beat,
                activations=self.activations,
                reckoning=self.reckoned,
            )
            async with serving(listening, app(shown)):
                ready.set()
                await end.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(story(),))
        thread.start()
        ready.wait()
        self._loop = loop
        try:
            yield
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join()
            loop.close()

    async def beat(self):
        """The time, and whether it serves."""
        said = {"now": wire.to_text(self.now), "not": [] if self.well else ["serving"], "paused": False}
        return json.dumps(said).encode()

    async def activations(self):
        """One, once it serves."""
        champion = {"model": "first", "reason": "start", "crps": None, "until": None}
        told = [{"time": wire.to_text(START), "champion": champion}]
        return json.dumps(told if self.well else []).encode()

    async def reckoned(self):
        """What is reckoned, of which there are too few outcomes over the longest horizon."""
        windows = market(symbols=2, count=110)
        self.reckoning = reckon(told(windows), windows, "1m")
        return msgspec.json.encode(self.reckoning)

    def get(self, symbol):
        """The chart of a symbol."""
        own = self.bars.get(symbol)
        if not own:
            return None
        window = Window(
            symbol, np.array([b.close_time for b in own]), np.array([list(map(float, b.values)) for b in own])
        )
        ahead = [own[-1].close_time + k * MINUTE for k in (1, 2)]
        return chart(window, ahead, self.view.signals(symbol))

    def play(self, minutes=1):
        """Let minutes pass; give the newest signals by symbol."""
        for _ in range(minutes):
            self.minute += 1
            found = tuple(bar(name, self.minute, 100 + self.minute + k / 7) for k, name in enumerate(NAMES))
            for one in found:
                self.bars[one.symbol].append(one)
            self.now = START + self.minute * MINUTE + 1
            self._events.append(Arrival(self.now, found))
        messages = outgoing(self._events)
        fresh, self.said = messages[len(self.said) :], messages
        told = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (self.view.told(fresh), told.set()))
        told.wait()
        signals = (json.loads(m.payload) for m in fresh if "/signals/" in m.topic)
        return {found["symbol"]: found for found in signals}


def until_true(tab, condition):
    """Wait until a condition holds on the page, at most ten seconds; it is asked for once a frame."""
    script = (
        "new Promise(done => { const end = performance.now() + 10000; const look = () => "
        f"({condition}) ? done(1) : performance.now() > end ? done(0) : setTimeout(look, 16); look(); }})"
    )
    assert tab.run(script), (condition, tab.faults)


CELLS = "Object.fromEntries([...document.querySelectorAll('#symbols tr[data-symbol]')].map(row => "
CELLS += "[row.dataset.symbol, [...row.cells].slice(1, 5).map(cell => Number(cell.dataset.value))]))"


SEARCH = "(s => {{ s.value = '{}'; s.dispatchEvent(new Event('input')) }})(document.getElementById('search'))"


def check_texts_and_figures(tab):
    """What is written of prices; width and skew as `barcast watch` has them; where the median is."""

    def told(module, what):
        return tab.run(f"import('/page/{module}.mjs').then(own => {what})")

    prices = [1234567.89, 15123456, 65432.15, 1.5, 0.000123456789]
    texts = ["1234568", "15123456", "65432.2", "1.5", "0.000123457"]
    assert told("format", f"{prices}.map(own.price)") == texts
    for levels, median, pairs in [
        (LEVELS, 3, [[0, 6], [1, 5], [2, 4]]),
        ((0.1, 0.9), -1, [[0, 1]]),
        ((0.1, 0.5, 0.8), 1, [[0, 2]]),
        ((0.05, 0.25, 0.5, 0.6, 0.75, 0.95), 2, [[0, 5], [1, 4]]),
    ]:
        assert told("signal", f"own.spread({list(levels)})") == {"median": median, "pairs": pairs}
    for own in (
        {},
        {"levels": [0.1, 0.9], "quantiles": [[99.0, 102.0]] * 2},
        {"levels": [0.05, 0.5, 0.9, 0.95], "quantiles": [[90.0, 101.0, 109.0, 130.0]] * 2},
        {"quantiles": [[100.5] * 7] * 2},
    ):
        body = said_signal(**own)
        said = Row.of(body).figures[4]
        found = told("signal", f"own.figures({msgspec.json.encode(body).decode()}, 4)")
        assert (found["last"], found["rise"]) == (body.reference, said.rise)
        for name, value in (("width", said.width), ("skew", said.skew)):
            assert found[name] == (None if value is None else pytest.approx(value))


@pytest.mark.browser
def test_a_browser_follows_it(tmp_path):
    """Rows, chart, numbers of the messages, updates, search, sorting, keys, and the server gone."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: how the page looks was not looked at")
    stage = Stage()
    with chromium(program, tmp_path) as tab:
        with stage.served():
            tab.open(f"http://127.0.0.1:{stage.port}/", 1280)
            until_true(tab, "document.getElementById('link').dataset.state === 'live'")
            until_true(tab, "document.getElementById('empty').textContent.startsWith('No signal yet')")
            signals = stage.play(20)
            until_true(tab, f"document.getElementById('symbols').ariaRowCount == {len(NAMES) + 1}")
            until_true(tab, "document.querySelector('#quantiles td')")
            assert tab.run("document.getElementById('count').textContent") == f"{len(NAMES)} symbols"
            assert 10 < tab.run("document.querySelectorAll('#symbols tr[data-symbol]').length") < len(NAMES)
            for symbol, (last, width, skew, rise) in tab.run(CELLS).items():
                said = Row.of(msgspec.convert(signals[symbol], wire.Signal)).figures[1]
                assert (last, rise) == (signals[symbol]["reference"], said.rise)
                assert (width, skew) == pytest.approx((said.width, said.skew))
            check_texts_and_figures(tab)
            shown = "[...document.querySelectorAll('#quantiles td')].map(cell => Number(cell.dataset.value))"
            first = signals[NAMES[0]]
            rows = zip(first["quantiles"], first["rise"], strict=True)
            assert tab.run(shown) == [value for row, rise in rows for value in (*row, rise)]

            after = stage.play()
            until_true(tab, f"({CELLS}).S00[0] === {after['S00']['reference']}")
            until_true(tab, f"({shown})[0] === {after['S00']['quantiles'][0][0]}")

            tab.run(SEARCH.format("s1"))
            until_true(tab, "document.getElementById('count').textContent === '10 of 40 symbols'")
            tab.run(SEARCH.format(""))
            tab.run("document.querySelectorAll('#symbols th button')[1].click()")
            until_true(tab, "document.querySelector('#symbols tr[data-symbol]').dataset.symbol === 'S39'")
            tab.run("document.querySelector('#symbols tr[data-symbol] button').focus()")
            for key in ("ArrowDown", "ArrowDown"):
                tab.call("Input.dispatchKeyEvent", type="keyDown", key=key)
            until_true(tab, "document.getElementById('chart-title').textContent === 'S37'")
            until_true(tab, "document.activeElement.textContent === 'S37'")
            tab.run("location.hash = '#trust'")
            until_true(tab, "document.getElementById('coverage').textContent.startsWith('No signal tells')")

            tab.open(f"http://127.0.0.1:{stage.port}/?phone#market/S03", 390, 844)
            until_true(tab, "document.querySelector('#quantiles td')")
            assert tab.run("document.getElementById('chart-title').textContent") == "S03"
            assert tab.run(WIDE) <= 390
            assert tab.faults == []
            assert all(url.startswith(f"http://127.0.0.1:{stage.port}/") for url in tab.requests)
        until_true(tab, "!document.getElementById('alert').hidden")
        assert tab.run("document.getElementById('link').dataset.state") == "lost"
        with stage.served():
            until_true(tab, "document.getElementById('alert').hidden")
            until_true(tab, "document.getElementById('link').dataset.state === 'live'")


FILLS = "(own => { const fill = own.fill; window.fills = []; "
FILLS += "own.fill = function () { if (this.globalAlpha < 0.3) window.fills.push(this.globalAlpha); "
FILLS += "fill.call(this); } })"
FILLS += "(CanvasRenderingContext2D.prototype)"
HIDE = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }}); "
HIDE += "document.dispatchEvent(new Event('visibilitychange'))"


@pytest.mark.browser
def check_reckoning(tab, reckoning):
    """The tables of each horizon have the figures that were told, all digits; and all is drawn."""
    figures = "[...row.querySelectorAll('td')].map((cell) => Number(cell.dataset.value))"
    bodies = f"[...own.querySelectorAll('tbody')].map((body) => [...body.rows].map((row) => {figures}))"
    shown = tab.run(f"[...document.querySelectorAll('#reckoning .held')].map((own) => {bodies})")
    told_of = [one for one in reckoning.horizons if one.coverage]
    for (covered, fell), one in zip(shown, told_of, strict=True):
        spans = [[c.spans[k].inside for c in one.coverage] for k in range(len(reckoning.spans))]
        counts = [share.outcomes for share in one.coverage[0].spans]
        assert covered[:-1] == [[*inside, count] for inside, count in zip(spans, counts, strict=True)]
        assert covered[-1] == [*(c.whole.inside for c in one.coverage), sum(counts)]
        shares = ([count / sum(counted) for count in counted] for counted in (one.pit, one.lately))
        assert fell == [list(row) for row in zip(reckoning.expected, *shares, strict=True)]
    drawn = "document.querySelectorAll('#reckoning svg[role=img][aria-label] {}').length"
    assert tab.run(drawn.format("polyline")) == 3 * len(told_of)
    assert tab.run(drawn.format("rect")) == 2 * len(reckoning.expected) * len(told_of)


def test_a_browser_says_what_it_does_not_know(tmp_path, monkeypatch):
    """Before it serves, of a stale fan, in a hidden tab, when too many look on, and when nobody answers."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: what the page says was not looked at")
    monkeypatch.setattr(http, "BEAT_SECONDS", 0.1)
    stage = Stage()
    stage.well = False

    def says(tab, name, text):
        until_true(tab, f"document.getElementById('{name}').textContent.includes({text!r})")

    with chromium(program, tmp_path) as tab:
        with stage.served():
            tab.open(f"http://127.0.0.1:{stage.port}/#trust/%", 1280)  # what is no address is none
            says(tab, "champion", "Not known yet: the daemon is not serving")
            for name in ("coverage", "reckoning", "faults", "events"):
                says(tab, name, "Not known yet")
            stage.well = True
            says(tab, "champion", "first")
            says(tab, "reckoning", "218 signals of this model for 2 symbols at 109 closes")
            says(tab, "reckoning", "Too few outcomes yet over 16 bars at 94 of 100 closes")
            check_reckoning(tab, stage.reckoning)
            stage.play(5)
            says(tab, "events", "withheld")

            tab.run(FILLS)
            tab.run("location.hash = '#market/S03'")
            says(tab, "chart-state", "valid until")
            until_true(tab, "fills.at(-1) > 0.15")  # the newest fan is drawn last
            stage.now += 1000 * MINUTE
            says(tab, "chart-state", "stale")
            until_true(tab, "fills.at(-1) < 0.1")

            tab.run(HIDE.format("true"))
            play(until(lambda: not stage.view._viewers))
            monkeypatch.setattr(view, "VIEWERS", 0)
            tab.run(HIDE.format("false"))
            says(tab, "alert", "the daemon refused: as many look on as may")
            monkeypatch.setattr(view, "VIEWERS", 1)
            until_true(tab, "document.getElementById('alert').hidden")
        says(tab, "alert", "no connection to the daemon")
