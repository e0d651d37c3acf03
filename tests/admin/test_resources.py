"""The status page and its figures: content, access, bounds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.admin.https_client import ask, bearer
from tests.helpers import FakeClock
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.admin import resources
from zcproto.admin.parts import Parts
from zcproto.admin.resources import FRESH_S, MAX_ALERTS, MAX_NAMES, Resources, page, page_figures
from zcproto.alerts import AlertKind

CERTIFICATE = {
    "file": "server.crt",
    "source": "own",
    "names": ["a.example"],
    "site": [],
    "key_type": "ecdsa-p256",
    "pin": "sha256/x",
    "sha256": "00",
    "not_after": 1,
    "days_left": 80,
    "seconds_left": 80 * 86_400,
}


def alert(number: int, *, over: bool = False) -> dict[str, Any]:
    return {
        "kind": "session.revoked",
        "about": "ada",
        "severity": "warning",
        "title": f"bob ended a session of ada ({number})",
        "details": {"by": "bob"},
        "began_at": number,
        "last_at": number,
        "ended_at": number + 1 if over else None,
        "count": 1,
        "many": False,
    }


def report(**changed: Any) -> dict[str, Any]:
    """A status report with the fields that the page uses, and some that it must not show."""
    usual = {
        "api": 1,
        "version": "1",
        "pid": 4711,
        "time": 1,
        "started_at": 0,
        "uptime_s": 1,
        "addresses": ["10.1.2.3:7443"],
        "draining": False,
        "log_level": "info",
        **{key: {} for key in ("connections", "sessions", "requests", "streams", "traffic")},
        **{key: {} for key in ("handshakes", "process")},
        "certificates": [CERTIFICATE],
        "store": {"url": "sqlite", "state": "healthy"},
        "alerts": {"open": [alert(1)], "over": [], "sinks": [{"name": "webhook"}]},
        "workers": [],
    }
    return {**usual, **changed}


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def directives(policy: str) -> dict[str, str]:
    found = [directive.strip().partition(" ") for directive in policy.split(";")]
    return {name: value for name, _, value in found}


# --- the page --------------------------------------------------------------------------------------------


def test_page_policy_allows_only_its_own_style_and_script(shared: ServerThread) -> None:
    answer = ask(shared, "/")
    text = answer.body.decode()
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert answer.one("content-type") == "text/html; charset=utf-8"
    assert directives(answer.one("content-security-policy")) == {
        "default-src": "'none'",
        "script-src": sha256(script),
        "style-src": sha256(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_page_loads_and_stores_nothing() -> None:
    text = page().body.decode()
    addresses = set(re.findall(r"[a-z]+://[^'\"\s]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the namespace of SVG, which is never requested
    assert set(re.findall(r"""(?:href|src|action)=["']([^"']*)""", text)) == {
        "data:image/svg+xml,%3Csvg xmlns=",
        *("/healthz", "/readyz", "/.well-known/zcp"),
    }
    assert re.findall(r"fetch\(([^,]*)", text) == ['"/status.json"']
    for word in (
        *(
            "localStorage",
            "sessionStorage",
            "indexedDB",
            "cookie",
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
        ),
        *(
            "eval(",
            "Function(",
            "document.write",
            "history.",
            "location.search",
            "location.hash",
            " on",
            "style=",
        ),
    ):
        assert not re.search(rf"{re.escape(word)}\w*=" if word == " on" else re.escape(word), text), word


def test_page_is_under_40_kib() -> None:
    assert len(page().body) < 40 * 1024


def test_page_contains_no_figure(serve: Serve) -> None:
    server = serve()
    with server.client("ada"):
        assert ask(server, "/").body == page().body


# --- access ---------- ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", ["session", "address", "open", "off"])
def test_status_json_needs_a_session_for_every_setting_of_metrics(serve: Serve, metrics: str) -> None:
    server = serve(http__metrics=metrics)
    with server.client("ada") as client:
        refused = ask(server, "/status.json")
        assert refused.status == 401
        assert refused.one("www-authenticate") == 'Bearer realm="zcproto"'
        assert b"connections" not in refused.body
        answer = ask(server, "/status.json", headers=bearer(client.token))
        assert (answer.status, answer.one("content-type")) == (200, "application/json")
        assert answer.one("cache-control") == "no-store"
        client.call("session.close")
        revoked = ask(server, "/status.json", headers=bearer(client.token))
    assert revoked.status == 401
    assert 'error="invalid_token"' in revoked.one("www-authenticate")


def test_token_in_the_query_is_ignored(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        token = bearer(client.token)["Authorization"].removeprefix("Bearer ")
        assert ask(server, f"/status.json?access_token={token}").status == 401


def test_status_json_reports_the_server(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        for _ in range(20):
            client.echo()
        found = json.loads(ask(server, "/status.json", headers=bearer(client.token)).body)
    assert found["ready"] is True
    assert found["reasons"] == []
    assert found["connections"]["zcp"] == found["connections"]["http"] == 1
    assert found["sessions"]["live"] == 1
    assert found["requests"]["total"] == 21
    assert found["handshakes"]["completed"] == 2
    assert found["store"]["state"] == "healthy"
    assert found["certificates"][0]["days_left"] in (88, 89)


def test_user_names_are_only_shown_to_operators(serve: Serve) -> None:
    server = serve()
    server.in_loop(
        lambda: server.server.parts.alerts.raise_(
            AlertKind.SESSIONS_REVOKED, "bob ended a session of margaret", about="margaret"
        )
    )
    with server.client("eve") as eve, server.client("operator") as operator:
        seen_by_eve = json.loads(ask(server, "/status.json", headers=bearer(eve.token)).body)
        seen_by_operator = json.loads(ask(server, "/status.json", headers=bearer(operator.token)).body)
    (alert_of_eve,) = seen_by_eve["alerts"]["open"]
    (alert_of_operator,) = seen_by_operator["alerts"]["open"]
    assert alert_of_eve["kind"] == "session.revoked"
    assert "margaret" not in json.dumps(seen_by_eve)
    assert alert_of_operator["title"] == "bob ended a session of margaret"
    assert (seen_by_eve["operator"], seen_by_operator["operator"]) == (False, True)


@pytest.mark.parametrize("operator", [False, True])
def test_fields_that_the_page_does_not_show_are_not_sent(operator: bool) -> None:
    text = json.dumps(page_figures(report(), operator))
    for hidden in ("4711", "10.1.2.3", "webhook", "sha256", "log_level", '"by"'):
        assert hidden not in text
    assert ("ada" in text) is operator


# --- bounds ----------------------------------------------------------------------------------------------


def test_only_the_newest_alerts_are_listed_and_the_rest_counted() -> None:
    alerts = {
        "open": [alert(n) for n in range(1000)],
        "over": [alert(n, over=True) for n in range(60)],
        "sinks": [],
    }
    found = page_figures(report(alerts=alerts), True)["alerts"]
    assert [each["began_at"] for each in found["open"]] == list(range(999, 999 - MAX_ALERTS, -1))
    assert [each["ended_at"] for each in found["over"]] == list(range(60, 60 - MAX_ALERTS, -1))
    assert (found["more_open"], found["more_over"]) == (1000 - MAX_ALERTS, 60 - MAX_ALERTS)


def test_only_the_first_names_are_listed_and_the_rest_counted() -> None:
    names = [f"{number}.example" for number in range(20)]
    (found,) = page_figures(report(certificates=[{**CERTIFICATE, "names": names}]), True)["certificates"]
    assert (found["names"], found["more_names"]) == (names[:MAX_NAMES], 20 - MAX_NAMES)
    (found,) = page_figures(report(), True)["certificates"]
    assert (found["names"], found["more_names"]) == (["a.example"], 0)


async def test_figures_are_read_at_most_once_a_second_and_only_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, readings = FakeClock(), []

    async def read(parts: object) -> dict[str, Any]:
        readings.append(clock.now())
        return report(time=len(readings))

    monkeypatch.setattr(resources, "read_status", read)
    monkeypatch.setattr(
        resources, "readiness_report", lambda parts: {"ready": False, "reasons": ["store: out"]}
    )
    found = Resources(cast("Parts", SimpleNamespace(clock=clock, state=None, fleet=None)))
    assert readings == []
    for _ in range(1000):
        await found.figures(operator=False)
        await found.figures(operator=True)
    assert len(readings) == 1
    clock.advance(FRESH_S * 0.9)
    assert json.loads((await found.figures(operator=True)).body)["time"] == 1
    clock.advance(FRESH_S * 0.2)
    newest = json.loads((await found.figures(operator=False)).body)
    assert (newest["time"], newest["ready"], newest["reasons"]) == (2, False, ["store: out"])
    assert len(readings) == 2


# --- colours ---------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, by WCAG 2.2."""
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(digit * 2 for digit in digits)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast(scheme: int) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for lines with a meaning."""
    found = re.findall(r":root \{(.*?)\}", page().body.decode(), re.DOTALL)
    colour = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", found[scheme]))
    assert len(found) == 2
    for text in ("text", "quiet", "good", "warn", "bad", "first"):
        for ground in ("card", "ground"):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
    assert contrast(colour["on-mark"], colour["first"]) >= 4.5
    for line in ("first", "second", "field"):
        assert contrast(colour[line], colour["card"]) >= 3, line
