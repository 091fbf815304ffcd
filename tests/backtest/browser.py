"""A headless Chromium over its debugging pipe: what a page draws, logs and asks the network for."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The browser's program, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """One tab. `faults` collects exceptions, error logs and failed requests; `requests` every address."""

    read: Any
    write: Any
    session: str = ""
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False
    _count: int = 0
    _rest: bytes = b""

    def call(self, method: str, **params: object) -> Any:
        """Call a method of the protocol; give its result."""
        self._count += 1
        mine = self._count
        message = {"id": mine, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while (answer := self._next()).get("id") != mine:
            pass
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path | str, width: int, height: int = 900) -> None:
        """Load a file, or an address, into a window of this size and wait until it has loaded and drawn."""
        self.faults.clear()
        self.requests.clear()
        self.loaded = False
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path if isinstance(path, str) else path.as_uri())
        while not self.loaded:
            self._next()
        self.settle()

    def settle(self) -> None:
        """Wait for two frames: what was to be drawn is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self.read.fileno(), 1 << 16)
            assert chunk, "the browser ended"
            self._rest += chunk
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        match message.get("method"), message.get("params"):
            case "Page.loadEventFired", _:
                self.loaded = True
            case "Runtime.exceptionThrown", p:
                told = p["exceptionDetails"]
                self.faults.append(told.get("exception", {}).get("description", told["text"]))
            case "Runtime.consoleAPICalled", p if p["type"] in ("error", "warning", "assert"):
                self.faults.append(str([a.get("value", a.get("description")) for a in p["args"]]))
            case "Log.entryAdded", p if p["entry"]["level"] in ("error", "warning"):
                self.faults.append(p["entry"]["text"])
            case "Network.requestWillBeSent", p:
                self.requests.append(p["request"]["url"])
            case "Network.loadingFailed", p:
                self.faults.append(f"request failed: {p['errorText']}")
        return message


WIDE = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
FIGURES = """
[...document.querySelectorAll(".figure")].filter(box => !box.closest("[hidden]")).map(box => {
  const sheet = box.querySelector("svg.main-svg")?.getBoundingClientRect();
  const marks = [...box.querySelectorAll(".cartesianlayer :is(.trace path, .hm image)")];
  const seen = marks.filter(mark => {
    const {width, height} = mark.getBoundingClientRect();
    return width + height > 1;
  });
  return {id: box.id, drawn: !!sheet && sheet.width > 200 && sheet.height > 80, marks: seen.length};
})
"""
"""What each figure that is not behind a menu has drawn."""


def faults(page: Page, path: Path, width: int) -> list[str]:
    """What is wrong with a page of figures at this width; every entry of each menu is looked at."""
    page.open(path, width)
    found = _undrawn(page)
    menus = page.run("[...document.querySelectorAll('select')].map(menu => menu.options.length)")
    for k, entries in enumerate(menus):
        for entry in range(1, entries):
            page.run(
                f"(menu => {{ menu.selectedIndex = {entry}; menu.dispatchEvent(new Event('change')); }})"
                f"(document.querySelectorAll('select')[{k}])"
            )
            page.settle()
            found += _undrawn(page)
    if (needed := page.run(WIDE)) > width:
        found.append(f"the page is {needed} px wide in a window of {width} px")
    asked = [url for url in page.requests if url != path.as_uri() and not url.startswith("data:")]
    return [*dict.fromkeys(found), *(f"the page asks for {url}" for url in asked), *page.faults]


def _undrawn(page: Page) -> list[str]:
    told = []
    for figure in page.run(FIGURES):
        if not figure["drawn"]:
            told.append(f"{figure['id']} is not drawn")
        elif not figure["marks"]:
            told.append(f"{figure['id']} draws nothing")
    return told


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """Start the browser with a profile of its own and open one tab."""
    down, up = os.pipe(), os.pipe()

    def connect() -> None:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (down[0], up[1])]
        for end, place in zip(ends, (3, 4), strict=True):  # where the browser looks for its pipes
            os.dup2(end, place)

    command = [
        *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--remote-debugging-pipe", "--hide-scrollbars", "--no-first-run"),
        *("--disable-background-networking", f"--user-data-dir={profile}"),
    ]
    quiet = subprocess.DEVNULL
    browser = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=connect, stdout=quiet, stderr=quiet)
    os.close(down[0])
    os.close(up[1])
    with open(down[1], "wb") as write, open(up[0], "rb", buffering=0) as read:
        try:
            page = Page(read, write)
            target = page.call("Target.createTarget", url="about:blank")["targetId"]
            page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            yield page
        finally:
            browser.terminate()
            browser.wait(20)
