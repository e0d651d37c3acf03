"""The status page in a real Chromium over TLS: figures, requests, faults, policy, layout."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.admin.chromium import Chromium, Tab
from tests.admin.https_client import add
from tests.client.conftest import options_for
from tests.interop.support import needs
from tests.server.conftest import Serve
from tests.server.helpers import Client, ServerThread
from tests.workers.test_reports import group_of_one
from zcproto.alerts import AlertKind
from zcproto.client import connect_blocking
from zcproto.http.messages import HttpResponse, Route, text_response
from zcproto.runtime.build import WorkerRole
from zcproto.sessions.token import token_text
from zcproto.tls.pins import key_pin

pytestmark = [needs("chromium"), pytest.mark.timeout(600)]

SIZES = {"phone": (390, 844), "desktop": (1280, 800)}
SHIFTS = """
  window.shifts = [];
  new PerformanceObserver((list) => window.shifts.push(
    ...list.getEntries().filter((entry) => !entry.hadRecentInput).map((entry) => entry.value)
  )).observe({ type: "layout-shift", buffered: true });
"""

Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[Chromium]:
    """A Chromium that trusts the certificate of all servers of the suite."""
    pem = (certs / "server-ecdsa.crt").read_bytes()
    certificate = x509.load_pem_x509_certificate(pem)
    with Chromium(tmp_path_factory.mktemp("chromium"), [key_pin(certificate.public_key())]) as browser:
        yield browser


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chromium keeps idle connections for a while, though the server has announced their end."""
    monkeypatch.setattr("zcproto.tls.transport.LINGER_TIME", 0.1)


@pytest.fixture
def show(browser: Chromium) -> Iterator[Open]:
    """Show the page of a server in a new tab, which is closed at the end of the test."""
    with ExitStack() as stack:

        def open_tab(server: ServerThread, path: str = "", *, before: str = "", **options: Any) -> Tab:
            tab = stack.enter_context(browser.tab(**options))
            if before:
                tab.call("Page.addScriptToEvaluateOnNewDocument", source=before)
            tab.open(f"{home_of(server)}{path}")
            return tab

        yield open_tab


def home_of(server: ServerThread) -> str:
    return f"https://localhost:{server.port}/"


def give(tab: Tab, token: bytes | str) -> None:
    """Type a token and press Enter."""
    tab.type("#token", token if isinstance(token, str) else token_text(token))
    tab.press_enter()


def open_figures(show: Open, server: ServerThread, client: Client, **options: Any) -> Tab:
    """Show the page, give it the client's token, and wait for the figures."""
    tab = show(server, **options)
    give(tab, client.token)
    shows(tab, "#state", "Ready")
    return tab


def figure(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}).innerText"


def shows(tab: Tab, selector: str, text: str) -> None:
    """Wait until a visible element contains this text."""
    tab.until(f"{figure(selector)}.includes({json.dumps(text)})")


def assert_requests_nothing(tab: Tab, other: Tab) -> None:
    """Assert that a tab requests nothing for a minute.

    The other tab covers it and is then hidden: the page must not take that as a request to resume.
    """
    requested = tab.requested()
    tab.until("document.hidden")
    tab.call("Page.bringToFront")
    tab.until("!document.hidden")
    other.until("document.hidden")
    tab.advance(60)
    assert tab.requested() == requested


def assert_no_other_requests(tab: Tab, server: ServerThread) -> None:
    """Assert that only the page and its figures were requested, and that the browser reported no violation."""
    home = home_of(server)
    assert set(tab.requested()) <= {home, f"{home}status.json"}
    assert tab.complaints() == []


# --- figures ---------------------------------------------------------------------------------------------


def test_ready_server_with_internal_errors_shows_them(serve: Serve, show: Open) -> None:
    server = serve(alerts__internal_errors=1)
    with server.client("operator") as client:
        tab = show(server)
        give(tab, client.token)
        shows(tab, "#state", "Ready")
        server.in_loop(lambda: server.server.state.incident("greet", ValueError(), peer="", connection=""))
        server.in_loop(server.server.parts.alerts.tick)
        while "with errors" not in tab.run(figure("#state")):  # its figures may be a second old
            tab.advance(5)
        shows(tab, "#alerts", "requests failed with INTERNAL")


def test_figures_update_and_nothing_else_is_requested(serve: Serve, show: Open) -> None:
    server = serve(store__url="sqlite")
    server.in_loop(
        lambda: server.server.parts.alerts.raise_(
            AlertKind.SESSIONS_REVOKED, "bob ended a session of <b>ada</b>", about="ada"
        )
    )
    with server.tcp() as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.recv(1)
    with server.client("operator") as client:
        tab = show(server)
        assert tab.requested() == [home_of(server)]  # nothing is requested without a token
        assert not tab.run("document.querySelector('#figures').checkVisibility()")
        give(tab, client.token)
        shows(tab, "#state", "Ready")
        shows(tab, "#sessions", "1")
        shows(tab, "#connections-more", "1 ZCP")
        shows(tab, "#alerts", "warning bob ended a session of <b>ada</b>")  # as it is, not as markup
        shows(tab, "#certificates", "server-ecdsa.crt")
        assert re.search(r"8[89] days", tab.text("#certificates"))
        shows(tab, "#store", "healthy")
        shows(tab, "#results", "Completed")
        shows(tab, "#results", "Plaintext HTTP")
        shows(tab, "#process", "MB")
        assert not tab.run("document.querySelector('#streams-card').checkVisibility()")
        for _ in range(300):
            client.echo()
        tab.until("Number(document.querySelector('#requests').innerText) > 1")
        shows(tab, "#latency", "µs")
        with server.client("ada"), server.client("eve"):
            shows(tab, "#sessions", "3")
            shows(tab, "#connections-more", "3 ZCP")
            tab.until("/L/.test(document.querySelector('[data-lines=sessions] .first').getAttribute('d'))")
        assert_no_other_requests(tab, server)
        assert tab.run("location.href") == home_of(server)
        assert tab.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert tab.run("document.querySelector('#token').value") == ""


def test_streams_are_shown_once_there_are_some(serve: Serve, show: Open) -> None:
    server = serve()
    with (
        server.client("operator") as operator,
        connect_blocking(f"127.0.0.1:{server.port}", **options_for(server)) as client,
    ):
        tab = open_figures(show, server, operator)
        assert not tab.run("document.querySelector('#streams-card').checkVisibility()")
        with client.stream("repeat", n=0, data=b"", count=2, interval=3_600) as stream:
            stream.receive()
            tab.until(f"/^Open\\s+1$/m.test({figure('#streams')})")
            assert tab.run("document.querySelector('#streams-card').checkVisibility()")
        tab.until(f"/^Cut\\s+1$/m.test({figure('#streams')})")
        assert re.search(r"^Items sent\s+0 MB\s+1$", tab.text("#streams"), re.MULTILINE)


def test_workers_are_shown_with_those_that_do_not_answer(serve: Serve, show: Open) -> None:
    server = serve(role=WorkerRole(fleet=group_of_one))
    with server.client("operator") as operator:
        tab = open_figures(show, server, operator)
        assert tab.run("document.querySelector('#workers-card').checkVisibility()")
        shows(tab, "#workers", "Coordinator")
        tab.until(f"/^1\\s+serving, pid \\d+, 1 restart\\s+\\d/m.test({figure('#workers')})")
        tab.until(f"/^3\\s+absent(\\s+\\u2013){{4}}$/m.test({figure('#workers')})")
        shows(tab, "#state", "Ready")


def test_alert_details_are_only_shown_to_operators(serve: Serve, show: Open) -> None:
    server = serve()
    server.in_loop(
        lambda: server.server.parts.alerts.raise_(
            AlertKind.SESSIONS_REVOKED, "bob ended one of margaret", about="margaret"
        )
    )
    with server.client("eve") as eve:
        tab = show(server)
        give(tab, eve.token)
        shows(tab, "#alerts", "warning Session: revoked")
        assert "Details are shown to operators" in tab.text()
        assert "margaret" not in tab.text()


def test_hidden_page_requests_nothing(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("ada") as client:
        tab = open_figures(show, server, client)
        other = show(server)
        tab.until("document.hidden")
        asked = tab.requested()
        tab.advance(60)
        assert tab.requested() == asked
        assert other.requested() == [home_of(server)]


def test_paused_page_requests_nothing_until_it_is_resumed(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("ada") as client:
        tab = open_figures(show, server, client)
        tab.click("#pause")
        shows(tab, "#state", "Paused")
        tab.click("#pause")
        shows(tab, "#state", "Ready")
        tab.click("#pause")
        shows(tab, "#state", "Paused")
        assert_requests_nothing(tab, show(server))


def test_forget_removes_the_token_and_all_figures(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("ada") as client:
        tab = open_figures(show, server, client)
        tab.click("#forget")
        shows(tab, "#state", "Not connected")
        assert_requests_nothing(tab, show(server))
    assert tab.text("main").endswith("Show figures")
    assert "healthy" not in tab.run("document.querySelector('main').textContent")


# --- faults ----------------------------------------------------------------------------------------------


def test_malformed_and_refused_tokens_are_reported_differently(serve: Serve, show: Open) -> None:
    server = serve()
    tab = show(server)
    give(tab, "too short")
    shows(tab, "#token-fault", "this is 9 characters")
    assert tab.requested() == [home_of(server)]
    tab.run("document.querySelector('#token').value = ''")
    give(tab, bytes(range(32)))
    shows(tab, "#token-fault", "The server refused this token")
    assert tab.run("document.activeElement.id") == "token"
    assert tab.requested() == [home_of(server), f"{home_of(server)}status.json"]  # and not requested again


def test_closed_session_is_reported_and_its_figures_removed(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("ada") as client:
        tab = open_figures(show, server, client)
        client.call("session.close")
    shows(tab, "#token-fault", "The session has expired or was revoked")
    assert not tab.run("document.querySelector('#figures').checkVisibility()")
    with server.client("ada") as client:
        give(tab, client.token)
        shows(tab, "#state", "Ready")


def test_unreachable_server_is_reported_and_the_last_figures_stay(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("ada") as client:
        tab = open_figures(show, server, client)
    server.drain()
    shows(tab, "#fault", "No answer from the server.")
    shows(tab, "#state", "No answer")
    assert tab.run("document.querySelector('#figures').checkVisibility()")
    assert re.search(r"from \d\d:\d\d:\d\d", tab.text("#fault"))


def test_reasons_of_a_server_that_is_not_ready_are_shown(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("ada") as client:
        tab = open_figures(show, server, client)
        server.in_loop(lambda: setattr(server.server.state, "draining", True))
        shows(tab, "#state", "Draining")
        shows(tab, "#fault", "draining: the server is stopping")
        server.in_loop(lambda: setattr(server.server.state, "draining", False))
        shows(tab, "#state", "Ready")
        tab.until("document.querySelector('#fault').innerText === ''")


# --- policy ---------------------------------------------------------------------------------------------


def test_page_policy_blocks_foreign_content(serve: Serve, show: Open) -> None:
    """Proves that violations are detected, so that an empty list of complaints means something."""
    server = serve()
    tab = show(server)
    assert tab.complaints() == []
    tab.run("""
      window.broken = [];
      document.addEventListener("securitypolicyviolation", (event) => window.broken.push(event.effectiveDirective));
      const image = new Image(); image.src = "https://localhost/other.png";
      const script = document.createElement("script");
      try { script.textContent = "window.ran = 1"; } catch { window.refused = 1; }
      fetch("https://localhost:1/").catch(() => 0);
      document.body.setAttribute("style", "color: red");
      try { document.body.innerHTML = "<b>x</b>"; } catch { window.refused += 1; }
    """)
    tab.until("window.broken.length >= 5")
    assert {"img-src", "connect-src", "style-src-attr", "require-trusted-types-for"} <= set(
        tab.run("window.broken")
    )
    assert tab.run("[window.ran, window.refused]") == [None, 2]
    tab.wait(tab.complaints, "the browser reported no violation")


def test_page_refuses_to_be_framed(serve: Serve, show: Open) -> None:
    server = serve()
    html = b"<!doctype html><title>around</title><iframe src='/'></iframe>"
    policy = "default-src 'none'; frame-src 'self'"
    add(server, Route("GET", "/around", lambda _: HttpResponse(200, html, "text/html", policy=policy)))
    tab = show(server, "around")
    tab.wait(
        lambda: any(
            "frame-ancestors" in json.dumps(each) or "X-Frame" in json.dumps(each)
            for each in tab.complaints()
        ),
        "the frame was not refused",
    )


# --- layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_layout_fits_in_dark_and_light_and_does_not_shift(
    serve: Serve, show: Open, tmp_path: Path, size: str
) -> None:
    server = serve()
    width, height = SIZES[size]
    with server.client("operator") as client:
        tab = show(server, before=SHIFTS, width=width, height=height, mobile=size == "phone")
        grounds = []
        for step in ("token", "figures"):
            if step == "figures":
                give(tab, client.token)
                shows(tab, "#state", "Ready")
                tab.run("window.shifts.length = 0")
                # Wait for lines in the charts and changed figures.
                client.echo()
                tab.until("document.querySelector('.first').getAttribute('d').split('L').length > 3")
                assert sum(tab.run("window.shifts")) < 0.01
            assert tab.run("document.documentElement.scrollWidth") <= width
            for dark in (False, True):
                tab.dark(dark)
                picture = tmp_path / f"{size}-{step}-{'dark' if dark else 'light'}.png"
                tab.screenshot(picture)
                assert struct.unpack("!II", picture.read_bytes()[16:24]) == (width, height)
                grounds.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        assert grounds[0] == grounds[2] != grounds[1] == grounds[3]
        assert min_target(tab) >= 24


def min_target(tab: Tab) -> Any:
    """Return the least height in pixels of a button or input (WCAG 2.2, 2.5.8)."""
    return tab.run("""Math.min(...[...document.querySelectorAll("button, input")]
      .filter((node) => node.checkVisibility()).map((node) => node.getBoundingClientRect().height))""")


def test_every_element_has_an_accessible_name(serve: Serve, show: Open) -> None:
    server = serve()
    with server.client("operator") as client:
        tab = open_figures(show, server, client)
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]
    ]
    for role in ("button", "image", "region", "table", "heading", "textbox"):
        assert all(name for found, name in nodes if found == role and role != "table"), role
    assert {"Connections", "Sessions", "Certificates", "Alerts, last 24 hours"} <= {
        name for role, name in nodes if role == "region"
    }
    charts = [name for role, name in nodes if role == "image"]
    assert len(charts) == 5
    assert all(name.startswith("Chart of the last ") for name in charts)


def test_other_status_codes_and_malformed_figures_are_reported(serve: Serve, show: Open) -> None:
    """Responses that are neither figures nor 401, such as 429 with Retry-After."""
    server = serve()
    answers = [text_response(429, "too many tries; wait", headers=(("Retry-After", "3"),))]
    side = server.server.parts.http
    assert side is not None
    side.router._paths["/status.json"]["GET"] = lambda _: answers[0]
    with server.client("ada") as client:
        tab = show(server)
        give(tab, client.token)
        shows(tab, "#fault", "The server answered 429: too many tries; wait. Retrying in 3 s.")
        answers[0] = HttpResponse(200, b'{"half": ', "application/json")
        shows(tab, "#fault", "server and page have different versions")
