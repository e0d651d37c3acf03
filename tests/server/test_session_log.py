"""Tests of the log of a session's life: user, address and id, and no secret."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import KEY, ServerThread
from zcproto.app.authentication import CallableAuthenticator
from zcproto.auth import Identity
from zcproto.config.model import LogConfig
from zcproto.observe.log import configure_logging
from zcproto.sessions.token import token_text
from zcproto.wire.frame import NO_TOKEN

Log = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Log:
    """Return the lines logged since the last call, and all text to search for secrets."""
    configure_logging(LogConfig(level="info", format="json"))

    def take() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        return [line for line in found if line["event"].startswith(("session.", "login."))]

    return take


def flush(server: ServerThread) -> None:
    """Write the queued log lines."""
    server.in_loop(server.server.state.log_soon.write)


def test_session_that_ended_without_a_connection_is_logged(serve: Serve, lines: Log) -> None:
    server = serve(sessions__per_user=1)
    with server.client("ada") as client:
        evicted = client.opened["id"]
    server.until_left()
    with server.client("ada") as client:
        pass
    flush(server)
    found = [(line["event"], line["session"]) for line in lines()]
    assert found[1:] == [("session.evicted", evicted), ("session.opened", client.opened["id"])]


def test_session_open_refresh_and_close_are_logged(serve: Serve, lines: Log) -> None:
    server = serve()
    with server.client() as client:
        client.open_session("ada", client="test/1")
        refresh_token, session_id = client.opened["refresh_token"], client.opened["id"]
        client.token = NO_TOKEN
        again = client.call("session.refresh", {"refresh_token": refresh_token, "client": "test/2"})
        client.token = again["token"]
        client.call("session.close")
    flush(server)
    found = lines()
    assert [line["event"] for line in found] == ["session.opened", "session.refreshed", "session.closed"]
    for line in found:
        assert (line["session"], line["user"], line["peer"]) == (session_id, "ada", "127.0.0.1")
        assert line["timestamp"].endswith("Z")
    assert (found[0]["scheme"], found[0]["client"], found[1]["client"]) == ("api_key", "test/1", "test/2")


def test_revocations_are_logged_with_user_and_count(serve: Serve, lines: Log) -> None:
    server = serve()
    with server.client("ada") as client, server.client("ada") as other:
        flush(server)
        lines()
        client.call("session.revoke", {"id": other.opened["id"]})
        client.call("session.revoke", {"all": True})
        flush(server)
        one, all_ = lines()
    assert (one["event"], one["session"], one["which"]) == (
        "session.revoked",
        client.opened["id"],
        other.opened["id"],
    )
    assert (all_["which"], all_["sessions"]) == ("all", 1)


def test_failed_logins_are_logged_with_a_limit(serve: Serve, lines: Log) -> None:
    server = serve()
    with server.client() as client:
        for _ in range(30):
            client.refused("session.open", {"scheme": "api_key", "user": "ada", "key": "a wrong key"})
        assert client.refused("session.open", {"scheme": "nonsense"}).code == 3
    found = lines()
    assert len(found) == 10
    assert {tuple(line[name] for name in ("event", "level", "scheme", "user", "peer")) for line in found} == {
        ("login.failed", "info", "api_key", "ada", "127.0.0.1")
    }
    assert "a wrong key" not in str(found)


def test_failed_login_of_an_authenticator_that_is_awaited_is_logged(serve: Serve, lines: Log) -> None:
    async def identify(user: str) -> Identity | None:
        await asyncio.sleep(0)
        return None

    server = serve(authenticators=[CallableAuthenticator("directory", identify)])
    with server.client() as client:
        client.refused("session.open", {"scheme": "directory", "user": "ada"})
    (line,) = lines()
    assert (line["event"], line["scheme"], line["user"]) == ("login.failed", "directory", "ada")


@pytest.mark.parametrize("form", ["json", "console"])
def test_name_in_a_failed_login_is_escaped_and_bounded(
    serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path, form: Literal["json", "console"]
) -> None:
    audit = tmp_path / "audit.log"
    server = serve()
    configure_logging(LogConfig(level="info", format=form, audit_file=audit))
    sent = "\n\x1b[31m\u202e\u2028" + 200 * "x"
    with server.client() as client:
        client.refused("session.open", {"scheme": "api_key", "user": sent[:128], "key": "a wrong key"})
        client.refused("session.open", {"scheme": "api_key", "user": sent, "key": "a wrong key"})
    configure_logging(LogConfig())
    for text in (capsys.readouterr().err, audit.read_text()):
        assert text.isascii()
        assert "\x1b" not in text
        first, *_ = found = [line for line in text.splitlines() if "login.failed" in line]
        assert "\\n" in first
        assert "x" * 120 in first
        assert "x" * 121 not in text
        assert len(found) == 2


def test_failed_login_of_a_device_names_the_device(serve: Serve, lines: Log) -> None:
    server = serve(users_file=True)
    with server.client() as client:
        client.refused("session.open", {"scheme": "ed25519", "device": "laptop", "signature": bytes(64)})
    assert [line["user"] for line in lines() if line["event"] == "login.failed"] == ["device:laptop"]


def test_failed_login_that_names_no_user_is_logged_without_one(serve: Serve, lines: Log) -> None:
    server = serve(authenticators=[CallableAuthenticator("ticket", lambda ticket: None)])
    with server.client() as client:
        client.refused("session.open", {"scheme": "ticket", "ticket": "a"})
    (line,) = lines()
    assert "user" not in line


def test_refresh_token_reuse_is_logged_as_warning(serve: Serve, lines: Log) -> None:
    server = serve()
    with server.client() as client:
        client.open_session("ada")
        token = client.opened["refresh_token"]
        client.token = NO_TOKEN
        client.call("session.refresh", {"refresh_token": token, "client": "test/1"})
        flush(server)
        lines()
        client.refused("session.refresh", {"refresh_token": token, "client": "thief/1"})
    (line,) = lines()
    assert (line["event"], line["level"]) == ("session.refresh_reused", "warning")
    assert (line["session"], line["user"], line["peer"]) == (client.opened["id"], "ada", "127.0.0.1")


def test_log_contains_no_secret(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogConfig(level="debug", format="json"))
    server: ServerThread = serve()
    with server.client("ada") as client:
        secrets = [client.token, client.opened["refresh_token"]]
        client.token = NO_TOKEN
        again = client.call("session.refresh", {"refresh_token": secrets[1], "client": "test/1"})
        secrets += [again["token"], again["refresh_token"]]
        client.token = again["token"]
        client.call("session.close")
    flush(server)
    text = capsys.readouterr().err
    assert "session.opened" in text
    for secret in secrets:
        assert token_text(secret) not in text
        assert secret.hex() not in text
    assert KEY not in text
