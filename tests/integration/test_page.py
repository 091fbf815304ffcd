"""The page of a real daemon on a real broker, in a real browser: what it shows, when, and to whom."""

import json
import re
import time
from contextlib import contextmanager
from math import log
from urllib.request import urlopen

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from barcast.daemon.wire import encode_bars
from barcast.models import Bar
from tests.backtest.browser import WIDE, find_chromium
from tests.backtest.results import made_up, sessions
from tests.garch import simulate
from tests.integration.broker import free_port
from tests.integration.instance import Instance, Subscriber, client, until, write_history
from tests.integration.test_metrics import scrape

MINUTE = 60 * 10**9
NAMES = ["AA", "BB", "CC"]
YOUNG = 300
"""Bars of the last symbol's history: of a calibrated model it has no coverage yet."""
CALIBRATED = 4100
"""Bars after which a model that is calibrated online says how often it was right."""
SPEED = 20
WAIT_SECONDS = 15 / SPEED
"""How long a group waits for a symbol, in real seconds."""
SHOWN_SECONDS = 1.0
"""How long after its signal a bar may be shown."""
WIDTHS = (1280, 360)
AWAY = re.compile(r"Failed to load resource: net::ERR_|net::ERR_INCOMPLETE_CHUNKED_ENCODING")
"""What a browser says by itself while nobody answers."""
VIOLATIONS = "addEventListener('securitypolicyviolation', e => "
VIOLATIONS += "console.error('against the policy:', e.violatedDirective, e.blockedURI))"
SEEN = """() => {
  window.seen = {};
  const look = () => {
    for (const row of document.querySelectorAll("#symbols tr[data-symbol]"))
      window.seen[`${row.dataset.symbol} ${row.cells[1].dataset.value}`] ??= Date.now();
  };
  new MutationObserver(look).observe(
    document.querySelector("#symbols tbody"), { subtree: true, childList: true, attributes: true });
}"""
"""Notes when a symbol's row first had a price."""
ROWS = """() => Object.fromEntries([...document.querySelectorAll("#symbols tr[data-symbol]")].map(row =>
  [row.dataset.symbol,
   [...row.cells].slice(1, 5).map(cell => [Number(cell.dataset.value), cell.textContent])]))"""
RISE = """rise =>
  Number(document.querySelector("#symbols tr[data-symbol=AA]").cells[4].dataset.value) === rise"""
TABLE = """selector => [...document.querySelectorAll(`${selector} tbody tr`)].map(row =>
  [row.cells[0].firstChild.textContent,
   ...[...row.cells].slice(1).map(cell => [Number(cell.dataset.value), cell.textContent])])"""


@pytest.fixture
def look():
    """Opens a tab; what it says on its console without being allowed to is in its `faults`."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: how the page looks was not looked at")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=program, args=options)

        def opened(port):
            tab = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
            tab.faults = []
            tab.add_init_script(VIOLATIONS)
            tab.on("pageerror", lambda error: tab.faults.append(str(error)))
            tab.on("console", lambda m: m.type in ("error", "warning") and tab.faults.append(m.text))
            tab.goto(f"http://127.0.0.1:{port}/")
            holds(tab, "live")
            return tab

        yield opened
        browser.close()


def holds(tab, state):
    """Wait until the page says that the connection is so."""
    tab.wait_for_selector(f"#link[data-state={state}]", timeout=30_000)


class Market:
    """An instance with a page, and bars that close by its clock."""

    def __init__(self, broker, folder, model, history, bars=200, **more):
        self.windows = [simulate(name, history + bars, seed=3, step=MINUTE).window for name in NAMES]
        self.next = history
        begin = int(self.windows[0].close_times[history - 1])
        self.http = free_port()
        self.instance = Instance(folder, broker.port, NAMES, model, begin, SPEED, http=self.http, **more)
        if model == "hs":
            self.instance.sampler = None
        write_history(self.windows[:2], history, self.instance.state / "history")
        write_history(self.windows[2:], history, self.instance.state / "history", history - YOUNG)
        self.feed = client("feed", broker.port)
        self.feed.loop_start()
        self.instance.launch()
        self.instance.wait_for("broker_connected")
        self.instance.wait_for("prepared", 240)

    def close(self):
        """End it all."""
        self.feed.disconnect()
        self.feed.loop_stop()
        self.instance.kill()

    def publish(self, without=()):
        """The bars of the next close, once the clock has come to it; give them and when they were sent."""
        close = int(self.windows[0].close_times[self.next])
        time.sleep(max(0.0, self.instance.real(close) + 0.05 - time.time()))
        bars = [Bar(w.symbol, close, *w.values[self.next].tolist()) for w in self.windows]
        self.next += 1
        sent = time.time()
        for bar in bars:
            if bar.symbol not in without:
                self.feed.publish(f"barcast/v1/bars/1m/{bar.symbol}", encode_bars([bar]), 1)
        return bars, sent

    def catch_up(self):
        """Publish what closed while nobody published."""
        while self.instance.real(int(self.windows[0].close_times[self.next])) < time.time():
            self.publish()


@pytest.fixture
def market(broker, tmp_path):
    """Starts an instance."""
    begun = []

    def begin(model, history, **more):
        begun.append(Market(broker, tmp_path / "instance", model, history, **more))
        return begun[-1]

    yield begin
    for one in begun:
        one.close()


def shown(tab, bars):
    """Wait until all of these bars are on the page; give when the last one came to it."""
    keys = [f"{bar.symbol} {bar.close:.17g}" for bar in bars]
    found = "keys => keys.map(key => key.split(' ')).every(([symbol, price]) => Object.keys(window.seen)"
    found += ".some(key => key.startsWith(symbol + ' ') && Number(key.split(' ')[1]) === Number(price)))"
    tab.wait_for_function(found, arg=keys, timeout=30_000)
    seen = {(key.split()[0], float(key.split()[1])): at for key, at in tab.evaluate("window.seen").items()}
    return max(seen[bar.symbol, bar.close] for bar in bars) / 1e3


@contextmanager
def allowed(tab):
    """What a browser says of a daemon that is away is no fault here; anything else is."""
    assert tab.faults == []
    yield
    assert [fault for fault in tab.faults if not AWAY.search(fault)] == []
    tab.faults.clear()


@pytest.mark.browser
def test_it_follows_and_says_who_is_away(broker, market, look):
    """Bars are shown as soon as they are forecast; a lost broker and a lost daemon are said, and end."""
    played = market("hs", 400)
    tab = look(played.http)
    played.catch_up()
    played.publish()
    tab.wait_for_selector("#symbols tr[data-symbol]", timeout=30_000)
    tab.evaluate(SEEN)
    took = []
    for _ in range(3):
        bars, sent = played.publish()
        took.append(shown(tab, bars) - sent)
    print(
        f"\nfrom the publication of three bars until they are shown: {', '.join(f'{t:.3f} s' for t in took)}"
    )
    assert 0 < min(took) < SHOWN_SECONDS + WAIT_SECONDS

    assert tab.faults == []
    broker.kill()
    holds(tab, "ill")
    assert "no connection to the broker" in tab.text_content("#link")
    broker.start()
    holds(tab, "live")

    with allowed(tab):
        played.instance.kill()
        holds(tab, "lost")
        assert tab.text_content("#link") == "Disconnected"
        assert tab.text_content("#alert").startswith("Not connected since ")
        assert tab.is_visible("#alert")
        played.instance.launch()
        holds(tab, "live")
    assert tab.is_hidden("#alert")
    until(lambda: played.feed.is_connected(), "the feed has its broker again")
    played.catch_up()
    shown(tab, played.publish()[0])
    assert tab.faults == []


@pytest.mark.browser
def test_numbers_are_those_of_messages_and_metrics(broker, checkpoints, market, look):
    """Every number of the tables is in the newest signals, and in the metrics where these have it.

    Each part is looked at by axe, in the light and in the dark, on a screen and on a phone.
    """
    heard = Subscriber(broker.port)
    played = market(str(checkpoints / "good"), CALIBRATED)
    tab = look(played.http)
    played.catch_up()
    played.publish()
    played.publish(without=("CC",))  # something to say in Trust, and a degraded signal
    bars, _ = played.publish()
    tab.wait_for_selector("#symbols tr[data-symbol]", timeout=30_000)
    tab.evaluate(SEEN)
    tab.reload()  # what is handed out as a whole is the same
    tab.wait_for_selector("#symbols tr[data-symbol]", timeout=30_000)
    tab.evaluate(SEEN)
    shown(tab, bars)
    newest = {body["symbol"]: body for _, payload in heard.of("signals") for body in [json.loads(payload)]}
    heard.close()
    assert newest.keys() == set(NAMES)
    assert {body["reference"] for body in newest.values()} == {bar.close for bar in bars}

    columns = [horizon["bars"] for horizon in newest["AA"]["horizons"]]
    assert [int(text.split()[0]) for text in tab.locator("#horizon option").all_text_contents()] == columns
    for row, horizon in enumerate(columns):
        tab.select_option("#horizon", str(horizon))
        tab.wait_for_function(RISE, arg=newest["AA"]["rise"][row])
        for symbol, cells in tab.evaluate(ROWS).items():
            same_row(cells, newest[symbol], row)
    for symbol, body in newest.items():
        tab.click(f"#symbols tr[data-symbol={symbol}] button")
        first = body["quantiles"][0][0]
        tab.wait_for_function(
            "value => Number(document.querySelector('#quantiles td')?.dataset.value) === value", arg=first
        )
        for (until_, *cells), quantiles, rise, horizon in zip(
            tab.evaluate(TABLE, "#quantiles"), body["quantiles"], body["rise"], columns, strict=True
        ):
            assert int(until_.split()[0]) == horizon
            assert [value for value, _ in cells] == [*quantiles, rise]
            assert all(float(text) == float(f"{value:.6g}") for value, text in cells[:-1])
            assert_rounded(cells[-1], 100, 0)

    tab.evaluate("location.hash = '#trust'")
    tab.wait_for_selector("#coverage td[data-value]", timeout=30_000)
    metrics = scrape(played.http)
    share, outcomes = coverage(newest.values())
    assert outcomes
    for (name, *cells), horizon in zip(tab.evaluate(TABLE, "#coverage"), columns, strict=True):
        assert int(name.split()[0]) == horizon
        assert cells[-1] == [outcomes[horizon], str(outcomes[horizon])]
        assert metrics["barcast_coverage_outcomes", str(horizon)] == outcomes[horizon]
        for cell, interval in zip(cells[:-1], newest["AA"]["coverage"]["share"], strict=True):
            assert cell[0] == pytest.approx(share[horizon, interval], rel=1e-12)
            told = metrics["barcast_coverage_ratio", str(horizon), f"{float(interval):g}"]
            assert cell[0] == pytest.approx(told, abs=1e-8)  # messages round
            assert_rounded(cell, 100, 1)
    [(_, _, model)] = {key for key in metrics if key[0] == "barcast_model_info"}
    assert tab.text_content("#champion tbody tr .id") == model
    name, timeframe, version = next(key[1:] for key in metrics if key[0] == "barcast_info")
    assert tab.text_content("#instance") == f"{name}, {timeframe} bars"
    assert tab.text_content("#version").startswith(f"Barcast {version};")
    assert "CC: not in time" in tab.text_content("#events")

    assert faults_of_parts(tab) == []
    assert tab.faults == []


TOKEN = "0123456789abcdef"
UNAUTHORISED = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"


def order(tab, press, token=None):
    """Press what orders something, and answer the question that comes, where it does."""
    tab.click(press)
    if token is not None:
        tab.fill("#order-token", token)
        tab.click("#order-do")


@pytest.mark.browser
def test_trainings_rollbacks_and_backtests(market, look, tmp_path):
    """A training is set, started, stopped and judged; its model is left again; reports are compared."""
    folder = tmp_path / "instance"
    (folder / "reports").mkdir(parents=True)
    (folder / "token").write_text(TOKEN)
    for name, closes in (("one", 100), ("other", 120)):
        made_up(closes=sessions(closes)).save(folder / "reports" / name)
    (folder / "reports" / "one" / "report.html").write_text("<script>document.title = origin</script>")
    page = 'token_file = "token"\nreports = "reports"\n'
    retrain = "[retrain]\nsteps = 12\nmargin = 0.0\nnice = 0\n"
    played = market("hs", 1500, page=page, retrain=retrain)
    tab = look(played.http)
    tab.click("nav a[href='#training']")
    tab.wait_for_selector("#settings:not([hidden])", timeout=60_000)
    told = requests(played.http, "/training")

    tab.select_option("#set-kind", "ldm4ts")
    for image, checkpointed in (("64", False), ("128", False), ("128", True), ("256", True)):
        tab.select_option("#set-image", image)
        tab.set_checked("#set-checkpoint_gradients", checkpointed)
        [usage] = [
            each
            for each in told["usages"]
            if (each["batch"], each["attention"]) == (64, "sdpa")
            and (each["image"], each["checkpoint_gradients"]) == (int(image), checkpointed)
        ]
        said = tab.text_content("#memory")
        assert float(tab.get_attribute("#memory", "data-value")) == usage["gb"]
        assert said.startswith(f"{usage['gb']:.2f} GB at the peak")
        assert ("% less than plain" in said) == checkpointed
        state = "bad" if usage["needs"] > told["memory"] else "good" if checkpointed else "plain"
        assert tab.get_attribute("#memory", "data-state") == state
    tab.select_option("#set-image", "64")
    tab.fill("#set-budget", "0.1")
    fitting = [
        each["batch"]
        for each in told["usages"]
        if (each["image"], each["attention"], each["checkpoint_gradients"]) == (64, "sdpa", True)
        and each["needs"] <= 0.1
    ]
    assert tab.text_content("#largest") == f"The largest batch for the budget: {max(fitting)}"
    tab.select_option("#set-kind", "sssd")
    tab.select_option("#set-preset", "tiny")

    order(tab, "#start", "wrong")
    tab.wait_for_selector("#ordered[data-state=refused]")
    assert tab.text_content("#ordered") == "Not done: orders need the token of [http]."
    assert tab.faults == [UNAUTHORISED]
    tab.faults.clear()
    tab.fill("#set-symbols", "AA, XX")
    order(tab, "#start", TOKEN)
    tab.wait_for_selector("#ordered:has-text('has no bars here')")
    assert tab.faults.pop().endswith("409 (Conflict)")
    tab.fill("#set-symbols", "")
    tab.fill("#set-steps", "2000")
    order(tab, "#start")
    tab.wait_for_selector("#progress[max]:not([hidden])", timeout=60_000)
    assert tab.is_disabled("#start")
    order(tab, "#stop")
    tab.wait_for_selector(".result:has-text('The training was stopped.')", timeout=30_000)
    assert tab.is_disabled("#stop")

    tab.fill("#set-steps", "12")
    order(tab, "#start")
    tab.wait_for_selector(".result:has-text('The challenger ')", timeout=120_000)
    verdict = tab.text_content("#verdict")
    assert verdict.startswith("The gate: challenger ")
    promoted = "accepted" in verdict
    became = "The challenger took over." if promoted else "The challenger was refused."
    assert tab.text_content(".result").startswith(became)
    metrics = scrape(played.http)
    runs = {key[1]: value for key, value in metrics.items() if key[0] == "barcast_retrain_runs_total"}
    assert runs == {"promoted": promoted, "refused": not promoted, "failed": 0, "stopped": 1}
    if not promoted:  # then by hand: any model of the store or a baseline may serve
        assert played.instance.order("rollback", "--to", "fhs").returncode == 0
        tab.reload()

    tab.click("nav a[href='#trust']")
    tab.wait_for_selector("#champion button", timeout=30_000)
    assert tab.text_content("#champion button") == "Serve again"
    before = tab.text_content("#champion tbody tr .id")
    tab.click("#champion button")
    assert tab.text_content("#order-title") == "Let hs serve again?"
    assert tab.locator("#order-do").text_content() == "Roll back"
    tab.click("#order-cancel")
    assert tab.text_content("#champion tbody tr .id") == before
    order(tab, "#champion button")
    if tab.is_visible("#order-token"):
        tab.fill("#order-token", TOKEN)
    tab.click("#order-do")
    tab.wait_for_selector("#champion tbody tr:first-child .id:text-is('hs')", timeout=60_000)
    assert f"hs serves again; {before} is left behind" in tab.text_content("#rolled")

    tab.click("nav a[href='#backtests']")
    for name in ("one", "other"):
        tab.check(f"input[aria-label='Compare {name}']")
    tab.wait_for_selector("#compared table")
    told = {each["name"]: each for each in requests(played.http, "/backtests")}
    strategies = [book["strategy"] for book in told["one"]["portfolio"]]
    for strategy in strategies:
        rows = tab.eval_on_selector_all(
            "#compared div div",
            "(sheets, name) => [...sheets.find(sheet => sheet.firstChild.textContent === name)"
            ".querySelectorAll('tbody tr')].map(row => [...row.cells].slice(1)"
            ".map(cell => cell.dataset.value === undefined ? null : Number(cell.dataset.value)))",
            strategy,
        )
        keys = ["total_return", "cagr", "volatility", "sharpe", "dsr", "max_drawdown", "exposure", "turnover"]
        for key, shown_ in zip([*keys, "costs", "fills"], rows, strict=True):
            books = [
                next(book for book in told[name]["portfolio"] if book["strategy"] == strategy)
                for name in ("one", "other")
            ]
            assert shown_ == [book[key] for book in books], key
    assert faults_of_parts(tab) == []
    tab.set_viewport_size({"width": WIDTHS[0], "height": 900})
    with tab.expect_popup() as opened:
        tab.click("#backtest-list a")
    assert opened.value.title() == "null"  # it is of no origin
    assert tab.faults == []


def requests(port, path):
    """What the daemon answers, from JSON."""
    with urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        return json.load(answer)


def same_row(cells, body, row):
    """What the table of symbols says of a signal and a horizon."""
    low, middle, high = (body["quantiles"][row][body["levels"].index(level)] for level in (0.05, 0.5, 0.95))
    last, (down, centre, up) = body["reference"], map(log, (low, middle, high))
    skew = (up + down - 2 * centre) / (up - down)
    values = [last, (high - low) / last, skew, body["rise"][row]]
    assert [value for value, _ in cells] == pytest.approx(values, rel=1e-12, abs=1e-9)
    assert [cells[0][0], cells[3][0]] == [last, body["rise"][row]]
    assert float(cells[0][1]) == float(f"{last:.6g}")
    for cell, scale, digits in zip(cells[1:], (100, 1, 100), (2, 2, 0), strict=True):
        assert_rounded(cell, scale, digits)


def assert_rounded(cell, scale, digits):
    """What is written is what is kept, rounded."""
    value, text = cell
    written = float(text.removesuffix(" %").replace("\N{MINUS SIGN}", "-"))
    assert abs(written - scale * value) <= 0.5 * 10**-digits + 1e-9


def coverage(bodies):
    """Share by horizon and interval, and outcomes by horizon, of all signals that tell any."""
    told = [body for body in bodies if body.get("coverage")]
    columns = [horizon["bars"] for horizon in told[0]["horizons"]]
    outcomes = {b: sum(body["coverage"]["outcomes"][h] for body in told) for h, b in enumerate(columns)}
    share = {
        (b, interval): sum(
            body["coverage"]["share"][interval][h] * body["coverage"]["outcomes"][h] for body in told
        )
        / outcomes[b]
        for h, b in enumerate(columns)
        for interval in told[0]["coverage"]["share"]
    }
    return share, outcomes


def faults_of_parts(tab):
    """What axe finds to be serious in each part, and parts that are wider than the window."""
    found, grounds = [], {}
    for part in tab.eval_on_selector_all("nav a", "links => links.map(link => link.hash.slice(1))"):
        tab.evaluate("part => { location.hash = part }", part)
        tab.wait_for_selector(f"#{part}:not([hidden])", state="attached")
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                tab.emulate_media(color_scheme=scheme)
                where = f"{part}, {width} px, {scheme}"
                if (wide := tab.evaluate(WIDE)) > width:
                    found.append(f"{where}: {wide} px wide")
                grounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                for fault in Axe().run(tab).response["violations"]:
                    if fault["impact"] in ("serious", "critical"):
                        places = ", ".join(str(node["target"]) for node in fault["nodes"])
                        found.append(f"{where}: {fault['id']} ({fault['impact']}) {places}")
    assert sum(luminance(grounds["light"])) > 600 > 150 > sum(luminance(grounds["dark"]))
    return found


def luminance(colour):
    """The red, green and blue of a colour as a browser writes it."""
    return [int(part) for part in re.findall(r"\d+", colour)[:3]]
