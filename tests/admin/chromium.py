"""A headless Chromium, driven over a pair of pipes by its DevTools protocol.

    with Chromium(folder, pins=[pin]) as browser, browser.tab(width=390, height=844) as tab:
        tab.open("https://localhost:7443/")
        tab.until("document.title == 'zcproto'")

Messages are JSON, each ended by a zero byte, on descriptors 3 and 4 of the browser (`--remote-debugging-pipe`).
Events of a page (requests, console, policy violations) are collected in `Tab.events`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.limits import TIMEOUT

GOODBYE = 10.0
"""Seconds for it to end after it was closed."""

SWITCHES = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check"),
    *("--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-domain-reliability"),
    *(
        "--disable-default-apps",
        "--metrics-recording-only",
        "--no-pings",
        "--mute-audio",
        "--hide-scrollbars",
    ),
    "--disable-features=Translate,OptimizationHints,MediaRouter,DialMediaRouteProvider",
    # No other name resolves, so that the browser itself cannot connect anywhere either.
    "--host-resolver-rules=MAP localhost 127.0.0.1, MAP * ~NOTFOUND",
)


class Chromium:
    """One browser with its own profile. `pins` are of certificates that it trusts additionally."""

    def __init__(self, folder: Path, pins: Sequence[str] = ()) -> None:
        self._folder = folder
        self._pins = ",".join(pin.removeprefix("sha256/") for pin in pins)
        self._buffer = bytearray()
        self._number = 0
        self._tabs: dict[str, Tab] = {}

    def __enter__(self) -> Self:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = ["chromium", *SWITCHES, f"--user-data-dir={self._folder / 'profile'}"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # there is no sandbox for root
        if self._pins:
            command.append(f"--ignore-certificate-errors-spki-list={self._pins}")
        log = os.open(self._folder / "chromium.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        # Move both to high numbers first, so that neither is overwritten by the other.
        near = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 16) for each in (to_browser, from_browser)]
        ends = {1: log, 2: log, 3: near[0], 4: near[1]}
        self._pid = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, "HOME": str(self._folder)},
            file_actions=[(os.POSIX_SPAWN_DUP2, end, number) for number, end in ends.items()],
            setsid=True,
        )
        for end in (to_browser, from_browser, log, *near):
            os.close(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, AssertionError):  # it may have ended; otherwise it is killed below
            self.call("Browser.close")
        ended = os.pidfd_open(self._pid)
        if not select.select([ended], [], [], GOODBYE)[0]:
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        for end in (ended, self._out, self._in):
            os.close(end)

    def tab(self, *, width: int = 1280, height: int = 800, dark: bool = False, mobile: bool = False) -> Tab:
        """Open a new tab of this size, light or dark."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target)
        for domain in ("Page", "Network", "Runtime", "Log", "Audits", "Security"):
            tab.call(f"{domain}.enable")
        tab.call("Page.setLifecycleEventsEnabled", enabled=True)
        tab.size(width, height, mobile=mobile)
        tab.dark(dark)
        return tab

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages(time.monotonic() + TIMEOUT):
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
        raise AssertionError(f"no answer to {method}: {self._browser_log()}")

    def listen(self, deadline: float) -> bool:
        """Deliver the next message of the browser to its tab. Return False after a timeout."""
        return next(self._messages(deadline), None) is not None

    def _messages(self, deadline: float) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self._in], [], [], left)[0]:
                    return
                data = os.read(self._in, 1 << 20)
                assert data, f"the browser has ended: {self._browser_log()}"
                self._buffer += data
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text)
            tab = self._tabs.get(message.get("sessionId", ""))
            if tab is not None and "method" in message:
                tab.events.append(message)
            yield message

    def _browser_log(self) -> str:
        return (self._folder / "chromium.log").read_text(errors="replace")[-2_000:]


class Tab:
    """One page with its `events`."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def dark(self, wanted: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[feature])

    def open(self, url: str) -> None:
        """Navigate and wait until the page is loaded."""
        before = len(self.events)
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        self.wait(
            lambda: any(event["method"] == "Page.loadEventFired" for event in self.events[before:]),
            f"{url} was not loaded",
        )

    def run(self, expression: str) -> Any:
        """Evaluate an expression in the page. Raises AssertionError if it throws."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = TIMEOUT) -> Any:
        """Wait until an expression is true in the page and return its value."""
        promise = f"""new Promise((done) => {{
          const ask = () => {{ const value = {expression}; if (value) {{ clearInterval(timer); done(value); }} }};
          const timer = setInterval(ask, 50);
          setTimeout(() => {{ clearInterval(timer); done(null); }}, {seconds * 1000 - 5000});
          ask();
        }})"""
        value = self.run(promise)
        assert value, f"it did not come to be: {expression}; the page says: {self.text()}"
        return value

    def advance(self, seconds: float) -> None:
        """Advance the time of the page and run its timers. Its time stops then: use it at the end of a test."""
        before = len(self.events)
        self.run(f"setTimeout(() => {{ window.advanced = true; }}, {seconds * 900})")
        self.call("Emulation.setVirtualTimePolicy", policy="advance", budget=seconds * 1000)
        self.wait(
            lambda: any(e["method"] == "Emulation.virtualTimeBudgetExpired" for e in self.events[before:]),
            "its time did not go by",
        )
        assert self.run("window.advanced"), "its timers stood still"

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until the events fulfil a condition."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self._browser.listen(deadline), what

    def text(self, selector: str = "body") -> str:
        """Return the visible text."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def type(self, selector: str, text: str) -> None:
        """Type into a field with key events."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of an element."""
        place = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView();"
            " const box = node.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Save a PNG of the viewport or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    # --- events ----------------------------------------------------------------------------------

    def requested(self) -> list[str]:
        """Return the URLs of all requests."""
        return [
            str(event["params"]["request"]["url"])
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[Any]:
        """Return console errors, exceptions, policy violations and issues reported by the browser."""
        found: list[Any] = []
        for event in self.events:
            params = event["params"]
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(params["exceptionDetails"])
                case "Runtime.consoleAPICalled":
                    found.append([params["type"], *(each.get("value") for each in params["args"])])
                case "Log.entryAdded":
                    found.append(params["entry"])
                case "Audits.issueAdded":
                    found.append(params["issue"])
        return found
