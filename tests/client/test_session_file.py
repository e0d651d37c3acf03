"""A session in a file continues after a restart of its client."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.client.helpers import (
    Action,
    ScriptedServer,
    client_of,
    cut,
    fail,
    refreshable,
    scripted,
    silence,
    token,
    token_of,
    turns,
)
from tests.helpers import WALL
from tests.server.helpers import KEY, ServerThread
from zcproto.client import credentials
from zcproto.client.client import Client, connect
from zcproto.client.credentials import SchemeLogin, SessionFile, identity_of
from zcproto.errors import Code, ConfigError, ResourceExhausted

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "session.json"


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def content_of(path: Path) -> bytes:
    """Return the content of the file, empty if it does not exist."""
    return path.read_bytes() if path.exists() else b""


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(path: Path, mode: int) -> None:
    path.chmod(mode)


def expire(path: Path) -> None:
    """Let the kept token count as expired at the client."""
    edit(path, lambda content: content["session"].update(expires_at=int(time.time() * 1000) - 1))


async def session_id(client: Client) -> str:
    """Open the client, use its session and close it. Return the id of the session."""
    async with client:
        assert client.session is not None
        info = await client.call("session.info")
        assert info["id"] == client.session.id
        return client.session.id


def logins(server: ServerThread) -> int:
    return server.in_loop(lambda: server.server.state.registry.opened)


# --- a restart --------------------------------------------------------------------------------------------


async def test_session_continues_after_a_restart_without_a_login(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    before = logins(shared)
    first = await session_id(connect_to(shared, session_file=path))
    assert mode_of(path) == 0o600
    for _ in range(3):
        assert await session_id(connect_to(shared, session_file=path)) == first
    assert logins(shared) == before + 1


async def test_session_continues_after_a_crash(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    client = await connect_to(shared, session_file=path)
    assert client.session is not None
    client._sessions.file.close()  # as the system does
    assert await session_id(connect_to(shared, session_file=str(path))) == client.session.id
    await client.close()


def test_session_belongs_to_all_addresses_in_any_order(path: Path) -> None:
    files = [
        connect(addresses, user="ada", key=KEY, session_file=path)._session_file
        for addresses in ("a.example,b.example", ["b.example:7443", "a.example"], "a.example")
    ]
    servers = [file._about["server"] for file in files if file is not None]
    assert servers == ["a.example:7443,b.example:7443"] * 2 + ["a.example:7443"]


def test_blocking_client_continues_the_session(shared: ServerThread, blocking: Blocking, path: Path) -> None:
    def once() -> str:
        with blocking(shared, session_file=path) as client:
            client.call("echo")
            assert client.session is not None
            return client.session.id

    assert once() == once()


async def test_expired_token_is_refreshed_and_the_file_rewritten(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    first = await session_id(connect_to(shared, session_file=path))
    before = content_of(path)
    expire(path)
    assert await session_id(connect_to(shared, session_file=path)) == first
    assert content_of(path) != before
    assert await session_id(connect_to(shared, session_file=path)) == first


@pytest.mark.parametrize("is_expired", [False, True])
async def test_revoked_session_is_replaced_by_a_login(
    shared: ServerThread, connect_to: ConnectTo, path: Path, is_expired: bool
) -> None:
    first = await session_id(connect_to(shared, session_file=path))
    async with connect_to(shared) as other:
        await other.call("session.revoke", id=first)
    if is_expired:
        expire(path)
    second = await session_id(connect_to(shared, session_file=path))
    assert second != first
    assert await session_id(connect_to(shared, session_file=path)) == second


async def test_evicted_session_is_replaced_by_a_login(
    serve: Callable[..., ServerThread], connect_to: ConnectTo, path: Path
) -> None:
    server = serve(sessions__per_user=1)
    first = await session_id(connect_to(server, session_file=path))
    async with connect_to(server) as other:
        assert other.session is not None
        with pytest.raises(ResourceExhausted, match="all sessions of this user are in use"):
            await connect_to(server, session_file=path)
    assert await session_id(connect_to(server, session_file=path)) != first


async def test_closed_session_is_replaced_by_a_login(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    async with connect_to(shared, session_file=path) as client:
        assert client.session is not None
        first = client.session.id
        await client.call("session.close")
    assert await session_id(connect_to(shared, session_file=path)) != first


# --- files that are not used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(server="127.0.0.1:1"),
        lambda content: content.update(identity="user bob"),
        lambda content: content.update(version=2),
        lambda content: content.update(more=1),
        lambda content: content.pop("session"),
        lambda content: content["session"].pop("token"),
        lambda content: content["session"].update(token="not base64"),
        lambda content: content["session"].update(token="AAAA"),
        lambda content: content["session"].update(token=1),
        lambda content: content["session"].update(token=None),
        lambda content: content["session"].update(expires_at="tomorrow"),
        lambda content: content.update(session=[]),
    ],
)
async def test_foreign_or_damaged_session_is_replaced_by_a_login(
    shared: ServerThread, connect_to: ConnectTo, path: Path, change: Edit
) -> None:
    first = await session_id(connect_to(shared, session_file=path))
    edit(path, change)
    second = await session_id(connect_to(shared, session_file=path))
    assert second != first
    assert await session_id(connect_to(shared, session_file=path)) == second


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000])
async def test_file_that_cannot_be_parsed_is_replaced(
    shared: ServerThread, connect_to: ConnectTo, path: Path, content: bytes
) -> None:
    write(path, content)
    first = await session_id(connect_to(shared, session_file=path))
    assert await session_id(connect_to(shared, session_file=path)) == first


async def test_file_of_another_user_is_replaced(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    await session_id(connect_to(shared, session_file=path))
    async with connect_to(shared, user="bob", session_file=path) as client:
        assert client.session is not None
        assert client.session.user == "bob"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
async def test_file_that_others_can_read_is_refused_with_the_cure(
    shared: ServerThread, connect_to: ConnectTo, path: Path, mode: int
) -> None:
    first = await session_id(connect_to(shared, session_file=path))
    set_mode(path, mode)
    for _ in range(2):  # the lock is released
        with pytest.raises(ConfigError, match=r"session_file: .* run: chmod 600"):
            await connect_to(shared, session_file=path)
    set_mode(path, 0o600)
    assert await session_id(connect_to(shared, session_file=path)) == first


async def test_path_that_cannot_be_used_is_an_error(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"session_file: .* cannot be used: .*; check the path"):
        await connect_to(shared, session_file=path / "missing" / "file")
    with pytest.raises(ConfigError, match="not a regular file"):
        await connect_to(shared, session_file=path.parent)


def test_file_without_credentials_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="session_file: credentials are missing"):
        connect("127.0.0.1", session_file=path)


async def test_disk_that_fails_leaves_no_session_and_does_not_disturb_the_client(
    shared: ServerThread, connect_to: ConnectTo, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await session_id(connect_to(shared, session_file=path))
    expire(path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(credentials, "replace_file", full)
    assert await session_id(connect_to(shared, session_file=path)) == first
    assert not content_of(path)


# --- several clients --------------------------------------------------------------------------------------


async def test_second_client_of_the_file_has_a_session_of_its_own(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    async with connect_to(shared, session_file=path) as one:
        assert one.session is not None
        content = content_of(path)
        async with connect_to(shared, session_file=path) as other:
            assert other.session is not None
            assert other.session.id != one.session.id
        ids = [each["id"] for each in await one.call("session.list")]
        assert other.session is None  # it was closed on the server
        assert one.session.id in ids
        assert content_of(path) == content
    assert await session_id(connect_to(shared, session_file=path)) == one.session.id


async def test_session_of_another_user_on_the_connection_is_not_kept(
    shared: ServerThread, connect_to: ConnectTo, path: Path
) -> None:
    async with connect_to(shared, session_file=path) as client:
        content = content_of(path)
        async with client.session_for(user="bob", key=KEY) as bob:
            assert bob.session is not None
            assert content_of(path) == content


def test_lock_that_is_got_after_the_close_is_released(path: Path) -> None:
    """As when a client is closed while a thread opens the file."""
    login = SchemeLogin({"scheme": "x"})
    file = SessionFile(path, "host:7443", login)
    file.close()
    assert file.load() is None
    assert not file.is_held


def test_logins_of_a_scheme_have_different_identities() -> None:
    one, same, other = (
        SchemeLogin({"scheme": "password", "user": "ada", "password": "a"}),
        SchemeLogin({"password": "a", "user": "ada", "scheme": "password"}),
        SchemeLogin({"scheme": "password", "user": "bob", "password": "a"}),
    )
    assert identity_of(one) == identity_of(same) != identity_of(other)
    assert identity_of(SchemeLogin(lambda: {"scheme": "password"})) == "login "


# --- the conversation -------------------------------------------------------------------------------------


def kept(path: Path, **session: Any) -> None:
    """Write the file of a session that the scripted server has opened."""
    result = {
        "token": token(50),
        "id": "session-50",
        "user": "ada",
        "expires_at": WALL + 3_600_000,
        "idle_timeout_ms": 0,
        "refresh_token": bytes(32),
        "refresh_expires_at": WALL + 7_200_000,
        "bound": False,
        **session,
    }
    credentials = client_of(ScriptedServer())._credentials
    assert credentials is not None
    file = SessionFile(path, "server.example:7443", credentials)
    file.load()
    file.save(result)
    file.close()


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("obstacle", [cut, fail(Code.UNAVAILABLE, retry_after_ms=100)])
@scripted
async def test_question_about_the_session_of_the_file_is_repeated(path: Path, obstacle: Action) -> None:
    kept(path)
    server = ScriptedServer()
    server.script("session.info", obstacle)
    async with client_of(server, session_file=path) as client:
        await client.call("echo")
        assert server.calls()[0].token == token(50)
        assert client.session is not None
        assert client.session.id == "session-50"
    assert server.calls("session.open") == server.calls("session.close") == []


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize(
    ("answer", "methods"),
    [
        (fail(Code.TOKEN_EXPIRED), ["session.info", "session.refresh"]),
        (fail(Code.TOKEN_REVOKED), ["session.info", "session.open"]),
        (fail(Code.SESSION_REPLACED), ["session.info", "session.open"]),
        (fail(Code.UNAUTHENTICATED), ["session.info", "session.open"]),
        (fail(Code.INTERNAL), ["session.info", "session.open"]),
    ],
)
@scripted
async def test_refused_session_of_the_file_is_refreshed_or_replaced(
    path: Path, answer: Action, methods: list[str]
) -> None:
    kept(path)
    server = ScriptedServer()
    server.script("session.info", answer)
    async with client_of(server, session_file=path) as client:
        assert server.methods == methods
        assert token_of(client) == token(1)


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("code", [Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.UNAUTHENTICATED])
@scripted
async def test_refused_refresh_of_the_session_of_the_file_opens_another(path: Path, code: Code) -> None:
    kept(path, expires_at=WALL - 1)
    server = ScriptedServer()
    server.script("session.refresh", fail(code))
    async with client_of(server, session_file=path):
        assert server.methods == ["session.refresh", "session.open"]


@pytest.mark.usefixtures("no_threads")
@scripted
async def test_refresh_token_is_not_in_the_file_while_it_is_being_spent(path: Path) -> None:
    server = ScriptedServer()
    server.session = refreshable()
    async with client_of(server, session_file=path) as client:
        assert content_of(path)
        server.script("session.refresh", silence)
        server.script("echo", fail(Code.TOKEN_EXPIRED))
        call = asyncio.create_task(client.call("echo"))
        await turns()
        assert server.calls("session.refresh")
        assert not content_of(path)
        call.cancel()
    assert b'"refresh_token": null' in content_of(path)
