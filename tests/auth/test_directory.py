"""Users who are removed, disabled or changed while a server runs or is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, Client
from zcproto.auth import UserFile
from zcproto.auth.directory import LOOK_INTERVAL, Users
from zcproto.common.home import Home
from zcproto.errors import Code
from zcproto.wire.frame import NO_TOKEN

CHANGES = {
    "disable": lambda users: users.disable("ada"),
    "remove": lambda users: users.remove("ada"),
    "new key": lambda users: users.new_key("ada"),
}


@pytest.fixture
def users(tmp_path: Path) -> UserFile:
    """The users of the server's home."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return UserFile(home / "users.toml")


def refused(client: Client, method: str = "echo", params: dict[str, Any] | None = None) -> int:
    with pytest.raises(AnsweredError) as error:
        client.call(method, params)
    return error.value.code


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_sessions_of_a_gone_user_end_within_a_second(
    serve: Serve, users: UserFile, change: Callable[[UserFile], object]
) -> None:
    keys = {name: users.add(name) for name in ("ada", "bob")}
    server = serve(users_file=True)
    with server.client() as ada, server.client() as bob:
        opened = ada.open_session("ada", keys["ada"])
        bob.open_session("bob", keys["bob"])
        change(users)
        event = ada.event()
        assert event.value == ["session.revoked", {"reason": "the user was changed"}]
        assert event.token == ada.token
        assert refused(ada) == Code.TOKEN_REVOKED
        ada.token = NO_TOKEN
        assert (
            refused(ada, "session.refresh", {"refresh_token": opened["refresh_token"]}) == Code.TOKEN_REVOKED
        )
        with pytest.raises(AnsweredError):
            ada.open_session("ada", keys["ada"])
        bob.echo()


def test_enabled_user_can_open_a_new_session(serve: Serve, users: UserFile) -> None:
    key = users.add("ada")
    server = serve(users_file=True)
    with server.client() as client:
        client.open_session("ada", key)
        users.disable("ada")
        client.event()
        users.enable("ada")
        client.token = NO_TOKEN
        client.open_session("ada", key)
        client.echo()


def test_session_of_an_unknown_user_is_refused(serve: Serve, users: UserFile) -> None:
    """Such as one restored from a store, or opened by another server."""
    users.add("bob")
    server = serve(users_file=True)

    def open_session() -> Any:
        return server.server.state.registry.open(
            "ada", operator=False, client="", address="127.0.0.1", wall=server.clock.wall()
        )

    opened = server.in_loop(open_session)
    with server.client() as client:
        client.token = opened.token
        assert refused(client) == Code.UNAUTHENTICATED
        client.token = NO_TOKEN
        answer = refused(client, "session.refresh", {"refresh_token": opened.refresh_token})
        assert answer == Code.UNAUTHENTICATED
    assert server.stats["refused_users"] == 2


def test_users_of_a_custom_authenticator_are_not_checked(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client, server.client() as other:
        other.token = client.token
        other.echo()
    assert server.server.state.binding.is_user is None


# --- the watch ---------------------------------------------------------------------------------------


class WatchedUsers:
    """Users of a home folder, checked when a test says so."""

    def __init__(self, home: Path) -> None:
        self.reported: list[str] = []
        self.fails = False
        self.slept: list[float] = []
        self.users = Users(Home(home), on_gone=self.on_gone, sleep=self.sleep)

    async def on_gone(self, name: str) -> None:
        self.reported.append(name)
        if self.fails:
            raise RuntimeError("the store is out")

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.looked.set()
        await self.turn.wait()
        self.turn.clear()

    async def run(self, *steps: Callable[[], object]) -> list[list[str]]:
        """Return the users reported gone after each step."""
        self.turn, self.looked = asyncio.Event(), asyncio.Event()
        task = asyncio.ensure_future(self.users.watch())
        reported = []
        for step in steps:
            await self.looked.wait()
            self.looked.clear()
            self.reported = []
            step()
            self.turn.set()
            await self.looked.wait()
            reported.append(self.reported)
        task.cancel()
        await asyncio.wait([task])
        return reported


async def test_each_gone_user_is_reported_once(users: UserFile) -> None:
    users.add("ada")
    users.add("bob")
    watch = WatchedUsers(users.path.parent)
    reported = await watch.run(
        lambda: None, lambda: users.disable("ada"), lambda: None, lambda: users.remove("bob"), lambda: None
    )
    assert reported == [[], ["ada"], [], ["bob"], []]
    assert set(watch.slept) == {LOOK_INTERVAL}


async def test_change_found_by_a_login_is_reported(users: UserFile) -> None:
    users.add("ada")
    watch = WatchedUsers(users.path.parent)
    users.remove("ada")
    assert watch.users.is_user("ada")
    assert await watch.users.current.find("ada") is None
    assert not watch.users.is_user("ada")
    assert await watch.run(lambda: None) == [["ada"]]


async def test_gone_user_is_reported_again_after_a_failure(users: UserFile) -> None:
    users.add("ada")
    users.add("bob")
    watch = WatchedUsers(users.path.parent)
    watch.fails = True
    reported = await watch.run(
        lambda: users.disable("ada"),
        lambda: users.disable("bob"),
        lambda: setattr(watch, "fails", False),
        lambda: None,
    )
    assert reported == [["ada"], ["ada", "bob"], ["ada", "bob"], []]


async def test_internal_error_does_not_end_the_watch(
    users: UserFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    users.add("ada")
    watch = WatchedUsers(users.path.parent)
    works = watch.users.current.refresh

    async def broken() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(type(watch.users.current), "refresh", lambda self: broken())
    reported = await watch.run(
        lambda: users.disable("ada"),
        lambda: monkeypatch.setattr(type(watch.users.current), "refresh", lambda self: works()),
    )
    assert reported == [[], ["ada"]]


async def test_unreadable_file_ends_no_session(users: UserFile) -> None:
    users.add("ada")
    watch = WatchedUsers(users.path.parent)
    good = users.path.read_bytes()
    reported = await watch.run(
        lambda: users.path.write_bytes(b"nonsense"), users.path.unlink, lambda: users.path.write_bytes(good)
    )
    assert reported == [[], [], []]
    assert watch.users.is_user("ada")
