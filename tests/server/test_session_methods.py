"""Tests of `session.*` over real TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.helpers import ERROR, EVENT, GOAWAY, KEY, NO_TOKEN, RESPONSE, Client, ServerThread, wall
from zcproto.app.authentication import CallableAuthenticator
from zcproto.auth import Identity, UserFile
from zcproto.common.roles import OPERATORS
from zcproto.errors import Code

Serve = Callable[..., ServerThread]

HOUR_MS = 3_600_000


# --- session.open ------------------------------------------------------------------------------------------


def test_session_open_returns_a_session(connect: Callable[..., Client], user: str) -> None:
    client = connect()
    opened = client.open_session(user)
    assert set(opened) == {
        "token",
        "id",
        "user",
        "expires_at",
        "idle_timeout_ms",
        "refresh_token",
        "refresh_expires_at",
        "bound",
    }
    assert len(opened["token"]) == len(opened["refresh_token"]) == 32
    assert opened["token"] != opened["refresh_token"]
    assert (opened["user"], opened["bound"], opened["idle_timeout_ms"]) == (user, False, HOUR_MS)
    assert abs(opened["expires_at"] - wall() - 24 * HOUR_MS) < 10_000
    assert abs(opened["refresh_expires_at"] - wall() - 30 * 24 * HOUR_MS) < 10_000
    client.echo()


@pytest.mark.requirement("refresh")
def test_session_open_without_refresh_and_idle_limit(serve: Serve) -> None:
    server = serve(sessions__refresh=False, sessions__idle_timeout="off")
    with server.client("ada") as client:
        assert client.opened["refresh_token"] is None
        assert client.opened["refresh_expires_at"] is None
        assert client.opened["idle_timeout_ms"] == 0
        client.echo()


def test_connection_carries_sessions_of_several_users(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    first = client.token
    client.open_session(user + "2")
    assert client.call("session.info")["user"] == user + "2"
    assert client.call("session.info", token=first)["user"] == user


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": None}, "scheme must be a str"),
        ({"scheme": "smoke signals"}, "scheme: not offered here; use one of: api_key"),
        ({"client": 5}, "client must be a str"),
        ({"client": "x" * 129}, "client must be at most 128 printable characters"),
        ({"client": "a\x1bb"}, "client must be at most 128 printable characters"),
    ],
)
def test_malformed_login_is_refused(
    connect: Callable[..., Client], change: dict[str, Any], message: str
) -> None:
    login = {"scheme": "api_key", "user": "ada", "key": KEY, "client": "test/1"}
    refused = connect().refused("session.open", {**login, **change})
    assert (refused.code, refused.message) == (Code.INVALID_ARGUMENT, message)


def test_wrong_key_and_unknown_user_get_the_same_answer(serve: Serve) -> None:
    def identify(user: str, key: str) -> Identity | None:
        return Identity("ada") if (user, key) == ("ada", "secret") else None

    server = serve(authenticators=[CallableAuthenticator("api_key", identify)])
    with server.client() as client:
        bodies = {
            client.refused("session.open", {"scheme": "api_key", "user": user, "key": key}).body
            for user, key in (("ada", "wrong"), ("stranger", "secret"), ("", ""))
        }
        assert len(bodies) == 1
        assert client.refused("echo").code == Code.UNAUTHENTICATED
        client.open_session("ada", "secret")
        client.echo()


def test_waiting_login_does_not_delay_others(serve: Serve) -> None:
    import asyncio

    gate: list[asyncio.Future[None]] = []

    async def slowly() -> Identity | None:
        gate.append(asyncio.get_running_loop().create_future())
        await gate[-1]
        return Identity("slow")

    server = serve(
        authenticators=[
            CallableAuthenticator("slow", slowly),
            CallableAuthenticator("api_key", lambda user, key: Identity("ada")),
        ]
    )
    with server.client() as slow, server.client("ada") as other:
        slow.send(slow.request("session.open", {"scheme": "slow"}))
        server.until(lambda: gate)
        other.echo()
        server.in_loop(lambda: gate[0].set_result(None))
        assert slow.answer(1).value["user"] == "slow"
    # A client that does not wait for the answer gets no session.
    with server.client() as hasty:
        hasty.send(hasty.request("session.open", {"scheme": "slow"}))
        server.until(lambda: len(gate) == 2)
        before = server.stats["sessions"]
        hasty.cancel(1)
        assert hasty.answer(1).code == Code.CANCELLED
        server.until(gate[1].cancelled)
        assert server.stats["sessions"] == before


def test_failing_authenticator_is_internal_error(serve: Serve) -> None:
    def identify(user: str) -> Identity | None:
        raise RuntimeError("the directory is on fire")

    server = serve(authenticators=[CallableAuthenticator("api_key", identify)])
    with server.client() as client:
        refused = client.refused("session.open", {"scheme": "api_key", "user": "ada"})
        assert refused.code == Code.INTERNAL
        assert b"fire" not in refused.body
        assert client.refused("echo").code == Code.UNAUTHENTICATED


@pytest.mark.usefixtures("long_login_delay")
def test_failed_logins_are_throttled(serve: Serve) -> None:
    server = serve(limits__login_failures=2)
    with server.client() as client, server.client("bystander") as bystander:
        login = {"scheme": "api_key", "user": "ada", "key": "guess"}
        answers = [client.refused("session.open", login) for _ in range(10)]
        codes = [answer.code for answer in answers]
        assert codes[:2] == [Code.UNAUTHENTICATED] * 2
        assert set(codes[4:]) == {Code.RESOURCE_EXHAUSTED}
        assert answers[-1].details["retry_after_ms"] > 0
        # The correct key is refused as well during the delay.
        assert client.refused("session.open", {**login, "key": KEY}).code == Code.RESOURCE_EXHAUSTED
        bystander.echo()


def test_changed_users_file_applies_to_logins(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(users_file=True, log__level="info")
    users = UserFile(server.home / "users.toml")
    with server.client() as client:
        wrong = {"scheme": "api_key", "user": "ada", "key": "A" * 43}
        stranger = client.refused("session.open", wrong)
        key = users.add("ada")
        assert client.refused("session.open", wrong).body == stranger.body
        client.open_session("ada", key)
        assert client.refused("server.stats").code == Code.PERMISSION_DENIED
        client.open_session("root", users.add("root", roles=OPERATORS))
        assert client.call("server.stats")["sessions"] == 2
        # A malformed file leaves the users unchanged.
        text = users.path.read_text()
        users.path.write_text("no file of users")
        assert client.refused("session.open", wrong).body == stranger.body  # the refused user was looked up
        client.open_session("ada", key)
        assert '"event":"users.unreadable"' in capsys.readouterr().err
        users.path.write_text(text)
        client.open_session("ada", key)


# --- the cap -----------------------------------------------------------------------------------------------


@pytest.mark.requirement("per_user")
def test_session_limit_refuses_one_more(serve: Serve) -> None:
    server = serve(sessions__per_user=2)
    with server.client("ada") as first, server.client("ada") as second, server.client() as third:
        refused = third.refused(
            "session.open", {"scheme": "api_key", "user": "ada", "key": KEY, "client": "test/1"}
        )
        assert (refused.code, refused.details) == (Code.RESOURCE_EXHAUSTED, {"limit": 2})
        first.echo()
        third.open_session("eve")
        second.call("session.close")
        third.open_session("ada")
        third.echo()


@pytest.mark.requirement("per_user")
def test_session_limit_evicts_the_oldest(serve: Serve) -> None:
    server = serve(sessions__per_user=2, sessions__when_full="evict_oldest")
    with server.client("ada") as first, server.client("ada") as second, server.client("ada") as third:
        event = first.event()
        assert event.value[0] == "session.revoked"
        assert event.token == first.token
        assert first.refused("echo").code == Code.SESSION_REPLACED
        second.echo()
        third.echo()


# --- session.refresh ---------------------------------------------------------------------------------------


def refresh(client: Client, refresh_token: bytes, client_name: str = "test/1") -> Any:
    return client.call(
        "session.refresh", {"refresh_token": refresh_token, "client": client_name}, token=NO_TOKEN
    )


@pytest.mark.requirement("refresh")
def test_refresh_replaces_both_tokens(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    old, old_token = client.opened, client.token
    new = refresh(client, old["refresh_token"])
    assert new["id"] == old["id"]
    assert new["refresh_expires_at"] == old["refresh_expires_at"]
    assert new["token"] != old["token"]
    assert new["refresh_token"] != old["refresh_token"]
    assert client.refused("echo", token=old_token).code == Code.TOKEN_REVOKED
    client.token = new["token"]
    client.echo()
    assert client.events == []


def test_refresh_on_another_connection_keeps_the_first(connect: Callable[..., Client], user: str) -> None:
    first, second = connect(user), connect()
    new = refresh(second, first.opened["refresh_token"])
    assert first.refused("echo").code == Code.TOKEN_REVOKED
    first.token = second.token = new["token"]
    first.echo()
    second.echo()
    assert first.events == second.events == []
    # After the revocation both get the event, with their token.
    connect(user).call("session.revoke", {"id": new["id"]})
    assert first.event().token == second.event().token == new["token"]


def test_spent_refresh_token_repeats_its_pair_within_the_grace(
    connect: Callable[..., Client], user: str
) -> None:
    client = connect(user)
    spent = client.opened["refresh_token"]
    new = refresh(client, spent)
    assert refresh(connect(), spent) == new


@pytest.mark.requirement("refresh")
def test_spent_refresh_token_of_another_client_ends_the_session(
    connect: Callable[..., Client], user: str
) -> None:
    client, thief, other = connect(user), connect(), connect(user)
    spent = client.opened["refresh_token"]
    client.token = refresh(client, spent)["token"]
    client.echo()
    refused = thief.refused("session.refresh", {"refresh_token": spent, "client": "thief/1"})
    assert refused.code == Code.TOKEN_REVOKED
    event = client.event()
    assert (event.value, event.token) == (
        ["session.revoked", {"reason": "refresh token reused"}],
        client.token,
    )
    assert client.refused("echo").code == Code.TOKEN_REVOKED
    other.echo()


def test_malformed_refresh_token_is_refused(connect: Callable[..., Client]) -> None:
    client = connect()
    assert client.refused("session.refresh", {"refresh_token": bytes(32)}).code == Code.UNAUTHENTICATED
    for params in ({"refresh_token": bytes(31)}, {"refresh_token": "x" * 32}, {}):
        assert client.refused("session.refresh", params).code == Code.INVALID_ARGUMENT
    params = {"refresh_token": bytes(32), "client": "\n"}
    assert client.refused("session.refresh", params).code == Code.INVALID_ARGUMENT


@pytest.mark.requirement("refresh")
def test_token_kinds_are_not_interchangeable(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    assert client.refused("session.refresh", {"refresh_token": client.token}).code == Code.UNAUTHENTICATED
    assert client.refused("echo", token=client.opened["refresh_token"]).code == Code.UNAUTHENTICATED
    client.echo()


def test_expired_session_is_refreshed(serve: Serve) -> None:
    server = serve(sessions__lifetime="1h", sessions__refresh_lifetime="10h")
    with server.client("ada") as client:
        server.clock.ahead_ms = HOUR_MS
        ahead = {"timestamp": wall() + HOUR_MS}
        refused = client.refused("echo", **ahead)
        assert refused.code == Code.TOKEN_EXPIRED
        new = client.call(
            "session.refresh",
            {"refresh_token": client.opened["refresh_token"], "client": "test/1"},
            token=NO_TOKEN,
            **ahead,
        )
        assert client.call("echo", {"a": 1}, token=new["token"], **ahead) == {"a": 1}
        assert client.events == []  # expiry sends no session.revoked


# --- session.info and session.list -------------------------------------------------------------------------


def test_session_info_describes_the_session(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    info = client.call("session.info")
    assert set(info) == {
        "id",
        "user",
        "created_at",
        "last_used_at",
        "expires_at",
        "client",
        "address",
        "bound",
        "connections",
    }
    (connection,) = info["connections"]
    assert connection["address"] == "127.0.0.1"
    assert connection["since"] >= info["created_at"]
    assert info["id"] == client.opened["id"]
    assert info["expires_at"] == client.opened["expires_at"]
    assert (info["user"], info["client"], info["address"], info["bound"]) == (
        user,
        "test/1",
        "127.0.0.1",
        False,
    )
    assert abs(info["created_at"] - wall()) < 10_000
    assert info["created_at"] <= info["last_used_at"]


def test_session_list_marks_the_current_session(connect: Callable[..., Client], user: str) -> None:
    first, second = connect(user), connect(user)
    connect(user + "2")
    listed = second.call("session.list")
    assert [(each["id"], each["current"]) for each in listed] == [
        (first.opened["id"], False),
        (second.opened["id"], True),
    ]
    info = second.call("session.info")
    mine = {name: value for name, value in listed[1].items() if name not in ("current", "last_used_at")}
    assert mine == {name: value for name, value in info.items() if name != "last_used_at"}


# --- session.revoke and session.close ----------------------------------------------------------------------


def expect_revoked_event(client: Client, reason: str) -> None:
    event = client.event()
    assert (event.kind, event.stream, event.token) == (EVENT, 0, client.token)
    assert event.value == ["session.revoked", {"reason": reason}]
    assert client.refused("echo").code == Code.TOKEN_REVOKED


def test_revoke_by_id_reaches_every_connection_of_the_session(
    connect: Callable[..., Client], user: str
) -> None:
    asking, first, second = connect(user), connect(user), connect()
    second.token = first.token
    second.echo()
    untouched = connect(user)
    assert asking.call("session.revoke", {"id": first.opened["id"]}) == {"revoked": 1}
    expect_revoked_event(first, "revoked by its user")
    expect_revoked_event(second, "revoked by its user")
    asking.echo()
    untouched.echo()
    assert asking.events == untouched.events == []


def test_second_revoke_is_not_found(connect: Callable[..., Client], user: str) -> None:
    asking, other = connect(user), connect(user)
    asking.call("session.revoke", {"id": other.opened["id"]})
    assert asking.refused("session.revoke", {"id": other.opened["id"]}).code == Code.NOT_FOUND


def test_revoke_of_another_users_session_is_not_found(connect: Callable[..., Client], user: str) -> None:
    asking, other = connect(user), connect(user + "2")
    unknown = asking.refused("session.revoke", {"id": "A" * 22})
    foreign = asking.refused("session.revoke", {"id": other.opened["id"]})
    malformed = asking.refused("session.revoke", {"id": "no id at all"})
    assert unknown.code == Code.NOT_FOUND
    assert unknown.body == foreign.body == malformed.body
    other.echo()
    assert other.events == []


def test_revoke_of_own_session_sends_no_event(connect: Callable[..., Client], user: str) -> None:
    asking, same = connect(user), connect()
    same.token = asking.token
    same.echo()
    assert asking.call("session.revoke", {"id": asking.opened["id"]}) == {"revoked": 1}
    assert asking.refused("echo").code == Code.TOKEN_REVOKED
    assert asking.events == []
    expect_revoked_event(same, "revoked by its user")


def test_revoke_all_includes_the_own_session(connect: Callable[..., Client], user: str) -> None:
    asking, others, stranger = connect(user), [connect(user), connect(user)], connect(user + "2")
    # The calling connection has another session of the user and gets no event.
    asking.open_session(user)
    assert asking.call("session.revoke", {"all": True}) == {"revoked": 4}
    for other in others:
        expect_revoked_event(other, "revoked by its user")
    assert asking.refused("echo").code == Code.TOKEN_REVOKED
    assert asking.events == []
    stranger.echo()


@pytest.mark.parametrize(
    "params", [{}, {"all": False}, {"id": "A" * 22, "all": True}, {"id": None}, {"id": 5}, {"all": 1}]
)
def test_revoke_without_or_with_both_selectors_is_refused(
    connect: Callable[..., Client], user: str, params: dict[str, Any]
) -> None:
    client = connect(user)
    assert client.refused("session.revoke", params).code == Code.INVALID_ARGUMENT
    client.echo()


def test_session_close_ends_only_the_own_session(connect: Callable[..., Client], user: str) -> None:
    client, other = connect(user), connect(user)
    assert client.call("session.close") == {}
    assert client.refused("echo").code == Code.TOKEN_REVOKED
    assert client.events == []
    other.echo()
    # The connection stays open and may open another session.
    client.open_session(user)
    client.echo()


def test_session_close_applies_to_the_next_frame(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    client.send(client.request("session.close"), client.request("echo", {"a": 1}))
    closed, refused = client.answer(client.stream - 1), client.answer(client.stream)
    assert (closed.kind, refused.kind) == (RESPONSE, ERROR)
    assert refused.code == Code.TOKEN_REVOKED


@pytest.mark.parametrize("method", ["session.info", "session.list", "session.revoke", "session.close"])
def test_session_methods_need_a_session(connect: Callable[..., Client], method: str) -> None:
    assert connect().refused(method).code == Code.UNAUTHENTICATED


def test_session_expiring_event_is_sent_once(serve: Serve) -> None:
    server = serve(sessions__lifetime="1h", sessions__refresh_lifetime="2h")
    with server.client("ada") as first, server.client() as client:
        server.clock.ahead_ms = 54 * 60_000 - 500  # a tenth of its lifetime will be left soon
        client.token = first.token
        client.call("echo", timestamp=server.clock.wall())
        event = client.event()
        assert event.value == ["session.expiring", {"expires_at": first.opened["expires_at"]}]
        assert event.token == first.token
        assert 0 < first.opened["expires_at"] - event.timestamp <= 6 * 60_000


@pytest.mark.parametrize(("user", "reason"), [("ada", "idle"), ("ada", "no_session"), (None, "no_session")])
def test_connection_without_use_or_session_gets_goaway(serve: Serve, user: str | None, reason: str) -> None:
    idle_timeout = "5m" if reason == "idle" else "1h"
    server = serve(loop_factory=asyncio.new_event_loop, limits__idle_timeout=idle_timeout)
    with server.client(user) as client:
        if user is not None and reason == "no_session":
            client.call("session.close")
        server.advance(300)
        frames, how = client.rest_until_closed()
        assert [frame.kind for frame in frames] == [GOAWAY]
        assert frames[0].value == {"reason": reason, "retry_after_ms": 0}
        assert how == "close_notify"
        assert server.stats["connections_ended"] == {reason: 1}
    server.until_left()
