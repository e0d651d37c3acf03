"""The operations of the control API: parameters, results, errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.admin.control_helpers import Answered, ask
from tests.audit_trail import lines_of
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import Client, ServerThread, eventually
from zcproto.admin import operations
from zcproto.admin.snapshot import readiness_report
from zcproto.alerts import AlertKind
from zcproto.app.app import App
from zcproto.auth import DeviceFile, UserFile
from zcproto.common.exceptions import MASK
from zcproto.config.model import LogConfig
from zcproto.errors import InternalError, PermissionDenied, Unavailable
from zcproto.observe.log import configure_logging, level, set_level
from zcproto.sessions.token import token_text


def made_key() -> tuple[str, str]:
    """Return a new key and its digest."""
    key = os.urandom(32)
    return token_text(key), token_text(hashlib.sha256(key).digest())


def get(server: ServerThread, path: str) -> Any:
    answer = ask(server.home / "control.sock", "GET", f"/v1/{path}")
    assert answer.status == 200, answer
    return answer.value


def post(server: ServerThread, path: str, fields: Any = None) -> Answered:
    return ask(server.home / "control.sock", "POST", f"/v1/{path}", fields)


def done(server: ServerThread, path: str, fields: Any = None) -> Any:
    answer = post(server, path, fields)
    assert answer.status == 200, answer
    return answer.value


def was_revoked(client: Client) -> bool:
    """Return whether the client got the event session.revoked."""
    return str(client.event().value[0]) == "session.revoked"


# --- the server --------------------------------------------------------------------------------------------


def test_readiness_is_that_of_readyz(serve: Serve) -> None:
    server = serve()
    assert get(server, "readiness") == server.in_loop(lambda: readiness_report(server.server.parts))


def test_status_reports_this_server(serve: Serve) -> None:
    server = serve()
    with server.client("ada"):
        found = get(server, "status")
    assert found["pid"] == os.getpid()
    assert found["sessions"]["live"] == 1
    assert found["requests"]["in_flight"] == 0  # the request for the status does not count


def test_reload_returns_changes_and_keys_that_need_a_restart(serve: Serve) -> None:
    server = serve()
    server.settings = {"limits__max_streams": 3, "idempotency__keep": "1h"}
    found = done(server, "reload", {})
    assert [each["key"] for each in found["changed"]] == ["limits.max_streams"]
    assert found["restart"] == [
        {"key": "idempotency.keep", "old": '"10m"', "new": '"1h"', "effect": "restart"}
    ]
    server.settings = {"limits__max_streams": 0}
    answer = post(server, "reload")
    assert answer.status == 422
    assert len(answer.value["faults"]) == 1
    assert "limits.max_streams" in answer.value["error"]
    assert server.server.config.limits.max_streams == 3


def test_drain_ends_the_server(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        client.send(client.request("sleep", {"ms": 3_600_000}))
        server.until(lambda: server.server.state.tasks.running == 1)
        assert done(server, "drain", {"timeout": 3600}) == {"connections": 1, "timeout": 3600.0}
        server.until(lambda: server.server.state.draining)
        assert get(server, "status")["draining"]
        client.fin()
    server.join()
    assert not (server.home / "control.sock").exists()


def test_drain_uses_the_configured_timeout_by_default(serve: Serve) -> None:
    server = serve(server__drain_timeout="50m")
    assert done(server, "drain")["timeout"] == 3000.0
    server.join()


@pytest.mark.parametrize("timeout", [-1, 3601, "1", True, [1]])
def test_drain_refuses_a_timeout_out_of_range(serve: Serve, timeout: Any) -> None:
    server = serve()
    assert post(server, "drain", {"timeout": timeout}).status == 400
    assert not server.server.state.draining


def test_log_level_is_returned_and_set(serve: Serve) -> None:
    server = serve()
    before = level()
    try:
        assert get(server, "log") == {"level": before}
        assert done(server, "log", {"level": "debug"}) == {"level": "debug", "before": before}
        assert level() == "debug"
        answer = post(server, "log", {"level": "loud"})
        assert answer.status == 400
        assert "use debug" in answer.value["error"]
        assert post(server, "log").status == 400
    finally:
        set_level(before)


# --- sessions ----------------------------------------------------------------------------------------------


def test_sessions_are_listed_and_revoked(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("ben") as ben, server.client("cleo") as cleo:
        found = get(server, "sessions")
        assert [each["user"] for each in found["sessions"]] == ["ada", "ben", "cleo"]
        assert not found["more"]
        (only,) = get(server, "sessions?user=ada")["sessions"]
        assert only["id"] == ada.opened["id"]
        text = json.dumps(found)
        for client in (ada, ben, cleo):
            assert token_text(client.token) not in text
        assert done(server, "sessions/revoke", {"ids": [only["id"], only["id"], "unknown"]}) == {"revoked": 1}
        assert was_revoked(ada)
        assert done(server, "sessions/revoke", {"user": "ben"}) == {"revoked": 1}
        assert was_revoked(ben)
        assert done(server, "sessions/revoke", {"all": True}) == {"revoked": 1}
        assert was_revoked(cleo)
        assert get(server, "sessions")["sessions"] == []
    kinds = server.in_loop(lambda: server.server.parts.alerts.center.sent[AlertKind.SESSIONS_REVOKED])
    assert kinds == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"all": False},
        {"ids": ["x"], "user": "ada"},
        {"ids": ["x"], "all": True},
        {"ids": [1]},
        {"ids": ["x"] * 1_001},
        {"ids": "x"},
        {"user": 1},
        {"all": 1},
        {"everybody": True},
        ["ids"],
        b"{",
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_ambiguous_or_malformed_revocation_is_refused(serve: Serve, fields: Any) -> None:
    server = serve()
    with server.client("ada") as client:
        answer = post(server, "sessions/revoke", fields)
        assert answer.status == 400
        assert answer.value["error"]
        client.echo()


@pytest.mark.parametrize("query", ["?users=ada", "?user=a&user=b", "?user=a&b=c", "?" + "a=b&" * 100])
def test_unknown_or_repeated_query_parameter_is_refused(serve: Serve, query: str) -> None:
    server = serve()
    answer = ask(server.home / "control.sock", "GET", f"/v1/sessions{query}")
    assert answer.status == 400


def test_session_list_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "LISTED", 2)
    server = serve()
    for name in ("ada", "ben", "cleo"):
        server.client(name).close()
    found = get(server, "sessions")
    assert [each["user"] for each in found["sessions"]] == ["ada", "ben"]
    assert found["more"]


def test_user_name_in_the_query_is_percent_decoded(serve: Serve) -> None:
    server = serve()
    server.client("zoë & co").close()
    (found,) = get(server, "sessions?user=zo%C3%AB+%26+co")["sessions"]
    assert found["user"] == "zoë & co"


# --- users -------------------------------------------------------------------------------------------------


def test_users_are_added_changed_and_removed(serve: Serve) -> None:
    server = serve(users_file=True)
    key, digest = made_key()
    assert done(server, "users/add", {"name": "ada", "key_digest": digest}) == {}
    assert done(server, "users/add", {"name": "robot", "roles": ["operator"]}) == {}
    assert get(server, "users") == {
        "users": [
            {"name": "ada", "roles": [], "key": True, "disabled": False},
            {"name": "robot", "roles": ["operator"], "key": False, "disabled": False},
        ],
        "more": False,
    }
    with server.client() as client:
        client.open_session("ada", key)
        key, digest = made_key()
        assert done(server, "users/new-key", {"name": "ada", "key_digest": digest}) == {"sessions": 1}
        assert was_revoked(client)
        client.open_session("ada", key)
        assert done(server, "users/disable", {"name": "ada"}) == {"sessions": 1}
        assert was_revoked(client)
        assert get(server, "users")["users"][0]["disabled"]
        assert done(server, "users/enable", {"name": "ada"}) == {}
        client.open_session("ada", key)
        assert done(server, "users/remove", {"name": "ada"}) == {"sessions": 1}
        assert was_revoked(client)
    file = UserFile(server.home / "users.toml")
    file.load()
    assert list(file.entries) == ["robot"]


def test_faults_of_user_changes_are_reported(serve: Serve) -> None:
    server = serve(users_file=True)
    done(server, "users/add", {"name": "ada"})
    answer = post(server, "users/add", {"name": "ada"})
    assert answer.status == 422
    assert "exists already" in answer.value["error"]
    answer = post(server, "users/remove", {"name": "ben"})
    assert answer.status == 404
    assert answer.value["error"] == 'no user is named "ben"; zcproto user list shows the users'
    assert post(server, "users/add", {}).value["error"] == "name is missing"
    assert post(server, "users/add", {"name": "a\nb"}).status == 422
    for digest in ("", "x" * 43 + "=", "x" * 42, "\u00e9" * 43):
        assert post(server, "users/add", {"name": "eve", "key_digest": digest}).status == 400
        assert post(server, "users/new-key", {"name": "ada", "key_digest": digest}).status == 400
    assert post(server, "users/new-key", {"name": "ada"}).value["error"] == "key_digest is missing"


def test_user_change_applies_before_the_next_file_watch(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change applies when the response arrives."""
    monkeypatch.setattr("zcproto.auth.directory.LOOK_INTERVAL", 3600.0)
    server = serve(users_file=True)
    key, digest = made_key()
    done(server, "users/add", {"name": "ada", "key_digest": digest})
    with server.client() as client:
        client.open_session("ada", key)
        assert done(server, "users/remove", {"name": "ada"}) == {"sessions": 1}
        assert was_revoked(client)


def test_user_operations_are_refused_with_custom_authenticators(serve: Serve) -> None:
    server = serve()
    for path in ("users/add", "users/remove"):
        assert post(server, path, {"name": "ada"}).status == 409
    assert post(server, "devices/remove", {"name": "d"}).status == 409
    assert ask(server.home / "control.sock", "GET", "/v1/devices").status == 409
    assert not (server.home / "users.toml").exists()


def test_devices_are_listed_and_removed(serve: Serve) -> None:
    server = serve(users_file=True)
    done(server, "users/add", {"name": "ada"})
    DeviceFile(server.home / "devices.toml").add("laptop", "ada", bytes(range(32)), datetime.now(UTC))
    eventually(lambda: get(server, "devices")["devices"])
    (found,) = get(server, "devices")["devices"]
    assert (found["name"], found["user"]) == ("laptop", "ada")
    assert found["public_key"] == token_text(bytes(range(32)))
    assert done(server, "devices/remove", {"name": "laptop"}) == {"user": "ada", "sessions": 0}
    assert get(server, "devices")["devices"] == []
    assert post(server, "devices/remove", {"name": "laptop"}).status == 404


# --- the log -----------------------------------------------------------------------------------------------


def test_changes_are_logged_with_the_calling_process(serve: Serve, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="info", file=tmp_path / "log"))
    server = serve(users_file=True)
    done(server, "users/add", {"name": "ada"})
    done(server, "users/disable", {"name": "ada"})
    post(server, "users/disable", {"name": "ben"})
    done(server, "sessions/revoke", {"all": True})
    server.settings = {"limits__max_streams": 0}
    assert post(server, "reload").status == 422
    events = map(json.loads, (tmp_path / "log").read_text().splitlines())
    lines = [event for event in events if event["event"] == "control.asked"]
    assert [(line["what"], line.get("user"), line.get("sessions")) for line in lines] == [
        ("users.add", "ada", None),
        ("users.disable", "ada", 0),
        ("sessions.revoke", None, 0),
        ("reload", None, None),
    ]
    assert {(line["uid"], line["pid"]) for line in lines} == {(os.geteuid(), os.getpid())}


def test_changes_are_in_the_audit_trail_with_their_outcome(serve: Serve, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="error", audit_file=tmp_path / "audit"))
    server = serve(users_file=True)
    done(server, "users/add", {"name": "ada"})
    done(server, "users/roles", {"name": "ada", "roles": ["billing"]})
    assert post(server, "users/disable", {"name": "ben"}).status == 404
    assert post(server, "devices/remove", {"name": "laptop"}).status == 404
    assert post(server, "users/add", {"nonsense": 1}).status == 400
    assert post(server, "sessions/revoke", {"ids": ["AAAAAAAAAAA"]}).status == 200
    server.settings = {"limits__max_streams": 0}
    assert post(server, "reload").status == 422
    lines = [line for line in lines_of(tmp_path / "audit") if line["event"].startswith("control.")]
    shown = ("outcome", "what", "user", "device", "roles", "ids", "sessions")
    assert [tuple(line.get(key) for key in shown) for line in lines] == [
        ("success", "users.add", "ada", None, None, None, None),
        ("success", "users.roles", "ada", None, ["billing"], None, 0),
        ("failure", "users.disable", "ben", None, None, None, None),
        ("failure", "devices.remove", None, "laptop", None, None, None),
        ("failure", "users.add", None, None, None, None, None),
        ("success", "sessions.revoke", None, None, None, ["AAAAAAAAAAA"], 0),
        ("success", "reload", None, None, None, None, None),
        ("failure", "reload", None, None, None, None, None),
    ]
    assert {(line["uid"], line["pid"]) for line in lines} == {(os.geteuid(), os.getpid())}


# --- certificates and alerts ---------------------------------------------------------------------------------


def test_issued_certificates_are_served_before_the_response(serve: Serve) -> None:
    server = serve(certificates__watch_interval="1h")
    before = get(server, "certificates")
    assert before["pins"] == [before["certificates"][0]["pin"]]
    assert before["pins_next"] is None
    made = done(server, "certificates/renew", {})
    assert [each["new_key"] for each in made["certificates"]] == [False]
    after = get(server, "certificates")
    assert after["pins"] == before["pins"]
    assert after["certificates"][0]["sha256"] != before["certificates"][0]["sha256"]
    made = done(server, "certificates/rotate", {})
    assert made["told"]
    assert get(server, "certificates")["pins_next"]["pins"] == made["next_pins"]["pins"]
    assert len(done(server, "certificates/cancel")["cancelled"]) == 1
    assert get(server, "certificates")["pins_next"] is None
    made = done(server, "certificates/rotate", {"at_once": True})
    assert get(server, "certificates")["pins"] == [made["certificates"][0]["pin"]] != before["pins"]


def test_renewal_of_an_unconfigured_key_type_is_refused(serve: Serve) -> None:
    server = serve()
    answer = post(server, "certificates/renew", {"type": "rsa"})
    assert (answer.status, answer.value["error"]) == (
        400,
        "type must be one of certificates.key_types: ecdsa",
    )
    assert done(server, "certificates/renew", {"type": "ecdsa"})["certificates"]


def test_failed_renewal_is_reported(serve: Serve) -> None:
    server = serve()
    (server.home / "certs" / "ca.key").write_text("no key")
    answer = post(server, "certificates/renew", {})
    assert answer.status == 422
    assert "ca.key" in answer.value["error"]


def test_external_certificates_cannot_be_renewed(serve: Serve) -> None:
    server = serve()
    folder = server.home / "certs"
    server.reload(
        certificates__mode="files",
        certificates__certificate=[str(folder / "server-ecdsa.crt")],
        certificates__key=[str(folder / "server-ecdsa.key")],
    )
    for what in ("renew", "rotate", "cancel"):
        assert post(server, f"certificates/{what}", {}).status == 409


def test_alerts_are_listed_and_tested(serve: Serve, tmp_path: Path) -> None:
    received = tmp_path / "received"
    server = serve(alerts__command=["/bin/sh", "-c", f"cat >> {received}; echo got it"])
    server.in_loop(lambda: server.server.parts.alerts.raise_(AlertKind.STORE_DEGRADED, "the store is out"))
    found = get(server, "alerts")
    assert [each["title"] for each in found["open"]] == ["the store is out"]
    (result,) = done(server, "alerts/test")["sinks"]
    assert result["arrived"]
    assert result["said"].endswith("got it")
    done(server, "alerts/test")

    def messages() -> list[dict[str, Any]]:  # the alert of the store may come before, between or after
        return [json.loads(line) for line in received.read_text().splitlines()]

    eventually(lambda: len(messages()) == 3)
    assert Counter(each["alert"]["kind"] for each in messages()) == {"alerts.test": 2, "store.degraded": 1}
    assert len({each["id"] for each in messages()}) == 3


def test_event_of_an_operator_reaches_the_subscribers(serve: Serve) -> None:
    app = App()
    news = app.topic("news", of=int)
    server = serve(app=app)
    events = server.in_loop(news.subscribe)
    assert done(server, "topics/publish", {"topic": "news", "event": 7}) == {
        "topic": "news",
        "scope": "process",
    }

    async def next_value() -> Any:
        return (await anext(events)).value

    assert asyncio.run_coroutine_threadsafe(next_value(), server.loop).result(TIMEOUT) == 7


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"topic": "other", "event": 7}, 404, "unknown topic 'other'; the topics are news"),
        ({"topic": "echo", "event": 7}, 404, "unknown topic 'echo'"),
        ({"topic": "news", "event": "7"}, 400, "topic news: event must be an int"),
        ({"topic": "news", "event": 1 << 70}, 400, "an int of more than 64 bits"),
    ],
)
def test_event_that_cannot_be_published_is_refused(
    serve: Serve, fields: dict[str, Any], status: int, message: str
) -> None:
    app = App()
    app.topic("news", of=int)
    answer = post(serve(app=app), "topics/publish", fields)
    assert answer.status == status
    assert message in answer.value["error"]


def test_pending_calls_are_listed_answered_and_refused(serve: Serve) -> None:
    server = serve()

    def ask_ada(**params: Any) -> Future[Any]:
        waiting = server.server.ask("ada", "approve", params, timeout=60.0)
        asked = asyncio.run_coroutine_threadsafe(waiting, server.loop)
        eventually(lambda: any(each["params"] for each in get(server, "calls")["calls"]))
        return asked

    one = ask_ada(text="pay 100?", password="secret")
    (listed,) = get(server, "calls?user=ada")["calls"]
    assert listed["params"] == {"text": "pay 100?", "password": MASK}
    assert listed["expires_at"] - listed["asked_at"] == 60_000
    assert get(server, "calls?user=bob") == {"calls": [], "more": False}
    assert done(server, "calls/answer", {"id": listed["id"], "result": {"yes": True}})["user"] == "ada"
    assert one.result(TIMEOUT) == {"yes": True}
    assert post(server, "calls/answer", {"id": listed["id"], "result": 1}).status == 404
    two = ask_ada(text="pay 200?")
    (listed,) = get(server, "calls")["calls"]
    done(server, "calls/refuse", {"id": listed["id"], "reason": "not\ntoday"})
    refused = two.exception(TIMEOUT)
    assert isinstance(refused, PermissionDenied)
    assert refused.message == "not\\ntoday"


# --- the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v2/status", "/v1/status/", "/healthz", "/metrics"])
def test_unknown_path_is_404(serve: Serve, path: str) -> None:
    server = serve()
    answer = ask(server.home / "control.sock", "GET", path)
    assert answer.status == 404
    assert "application/json" not in answer.head


def test_get_of_a_changing_operation_is_405(serve: Serve) -> None:
    server = serve()
    for path in ("drain", "sessions/revoke", "users/add", "certificates/renew", "alerts/test"):
        assert ask(server.home / "control.sock", "GET", f"/v1/{path}").status == 405


def test_unavailable_store_is_503(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    async def out(user: str | None, limit: int) -> Any:
        raise Unavailable("the session store does not answer: try again")

    monkeypatch.setattr(server.server.state.sessions, "records", out)
    answer = ask(server.home / "control.sock", "GET", "/v1/sessions")
    assert (answer.status, answer.value["error"][:17]) == (503, "the session store")


def test_internal_error_returns_only_an_incident_id(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    async def broken(user: str | None, limit: int) -> Any:
        raise InternalError("a secret of ours")

    monkeypatch.setattr(server.server.state.sessions, "records", broken)
    answer = ask(server.home / "control.sock", "GET", "/v1/sessions")
    assert answer.status == 500
    assert b"incident" in answer.body
    assert b"secret" not in answer.body
