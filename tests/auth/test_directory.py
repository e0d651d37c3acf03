"""Users who are removed, disabled or changed while a server runs or is stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.auth.helpers import write
from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, Client
from zcproto.auth import DeviceFile, UserFile
from zcproto.auth.directory import LOOK_INTERVAL, LOOKS_REMEMBERED, Directory
from zcproto.auth.files import TableFile
from zcproto.auth.users import User
from zcproto.config.model import LogConfig
from zcproto.errors import Code, NotFound
from zcproto.observe.log import configure_logging
from zcproto.wire.frame import NO_TOKEN

PUBLIC_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
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
            "ada", client="", address="127.0.0.1", wall=server.clock.wall()
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


class FakeSleep:
    """Sleeps until a test lets the watch check its file."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._asleep = asyncio.Event()
        self._awake = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._asleep.set()
        await self._awake.wait()
        self._awake.clear()

    async def check(self) -> None:
        """Return when the watch has checked the file once."""
        await self._asleep.wait()
        self._asleep.clear()
        self._awake.set()
        await self._asleep.wait()


class Watched:
    """A directory and the names that it reports as gone."""

    directory: Directory[Any]

    def __init__(self) -> None:
        self.reported: list[str] = []
        self.faults: list[list[str]] = []
        self.fails = False
        self.sleep = FakeSleep()

    async def on_gone(self, name: str, entry: Any) -> int:
        self.reported.append(name)
        if self.fails:
            raise RuntimeError("the store is out")
        return 2

    def on_read(self, faults: Sequence[str]) -> None:
        self.faults.append(list(faults))

    async def run(self, *steps: Callable[[], object]) -> list[list[str]]:
        """Return the names reported gone after each step."""
        task = asyncio.ensure_future(self.directory.watch())
        reported = []
        for step in steps:
            self.reported = []
            step()
            await self.sleep.check()
            reported.append(self.reported)
        task.cancel()
        await asyncio.wait([task])
        return reported


def users_of(file: UserFile) -> UserFile:
    """Return the file as another process has it."""
    return UserFile(file.path)


class WatchedUsers(Watched):
    """Users of a home folder, checked when a test says so."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.file = UserFile(home / "users.toml")
        self.directory = Directory(
            UserFile(self.file.path), on_gone=self.on_gone, on_read=self.on_read, sleep=self.sleep
        )


class WatchedDevices(Watched):
    """Devices of a home folder, checked when a test says so."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.file = DeviceFile(home / "devices.toml")
        self.file.add("laptop", "ada", PUBLIC_KEY, datetime.now(UTC))
        self.directory = Directory(
            DeviceFile(self.file.path), on_gone=self.on_gone, on_read=self.on_read, sleep=self.sleep
        )


async def test_each_gone_user_is_reported_once(users: UserFile) -> None:
    users.add("ada")
    users.add("bob")
    watched = WatchedUsers(users.path.parent)
    reported = await watched.run(
        lambda: None, lambda: users.disable("ada"), lambda: None, lambda: users.remove("bob"), lambda: None
    )
    assert reported == [[], ["ada"], [], ["bob"], []]
    assert set(watched.sleep.slept) == {LOOK_INTERVAL}
    assert LOOK_INTERVAL < 1


async def test_change_of_another_process_is_left_to_it_but_not_one_of_our_own(users: UserFile) -> None:
    users.add("ada")
    users.add("bob")
    watched, left = WatchedUsers(users.path.parent), Watched()
    watched.directory = Directory(
        users, on_gone=watched.on_gone, on_gone_elsewhere=left.on_gone, sleep=watched.sleep
    )
    assert await watched.run(lambda: users_of(users).remove("ada")) == [[]]
    assert left.reported == ["ada"]
    _, ended = await watched.directory.change(lambda: users_of(users).remove("bob"), "bob")
    assert (ended, watched.reported, left.reported) == (2, ["bob"], ["ada"])


async def test_entry_that_others_report_gone_is_ended_once_and_again_later(users: UserFile) -> None:
    users.add("ada")
    users.add("bob")
    watched = WatchedUsers(users.path.parent)
    ada, bob = (watched.directory.known(name) for name in ("ada", "bob"))
    users.remove("ada")
    for _ in range(3):  # found here by the first report
        await watched.directory.report_gone("ada", ada)
    assert watched.reported == ["ada"]
    for _ in range(3):  # changed before this process has read the file
        await watched.directory.report_gone("carol", bob)
    assert watched.reported == ["ada", "carol"]
    await watched.run(*(2 * LOOKS_REMEMBERED * [lambda: None]))
    await watched.directory.report_gone("ada", ada)
    assert watched.reported == ["ada"]


async def test_reported_entry_whose_sessions_could_not_be_ended_is_tried_again(users: UserFile) -> None:
    users.add("ada")
    watched = WatchedUsers(users.path.parent)
    watched.fails = True
    with pytest.raises(RuntimeError):
        await watched.directory.report_gone("bob", None)
    watched.fails = False
    await watched.directory.report_gone("bob", None)
    assert watched.reported == ["bob", "bob"]


async def test_change_found_by_a_login_is_reported(users: UserFile) -> None:
    users.add("ada")
    watched = WatchedUsers(users.path.parent)
    users.remove("ada")
    assert watched.directory.is_known("ada")
    assert await watched.directory.find("ada") is None
    assert not watched.directory.is_known("ada")
    assert await watched.run(lambda: None) == [["ada"]]


async def test_gone_user_is_reported_again_after_a_failure(users: UserFile) -> None:
    users.add("ada")
    users.add("bob")
    watched = WatchedUsers(users.path.parent)
    watched.fails = True
    reported = await watched.run(
        lambda: users.disable("ada"),
        lambda: users.disable("bob"),
        lambda: setattr(watched, "fails", False),
        lambda: None,
    )
    assert reported == [["ada"], ["ada", "bob"], ["ada", "bob"], []]


async def test_gone_device_is_reported_again_after_a_failure(tmp_path: Path) -> None:
    watched = WatchedDevices(tmp_path)
    watched.fails = True
    reported = await watched.run(
        lambda: watched.file.remove("laptop"), lambda: setattr(watched, "fails", False), lambda: None
    )
    assert reported == [["laptop"], ["laptop"], []]
    assert watched.directory.file.entries == {}


async def test_changed_user_loses_sessions_immediately(users: UserFile) -> None:
    users.add("ada")
    watched = WatchedUsers(users.path.parent)
    assert await watched.directory.change(lambda: watched.file.disable("ada"), "ada") == (None, 2)
    assert await watched.directory.change(lambda: watched.file.enable("ada"), "ada") == (None, 0)
    assert watched.reported == ["ada"]


async def test_removed_device_loses_sessions_immediately(tmp_path: Path) -> None:
    watched = WatchedDevices(tmp_path)
    device, ended = await watched.directory.change(lambda: watched.file.remove("laptop"), "laptop")
    assert (device.user, ended) == ("ada", 2)
    with pytest.raises(NotFound):
        await watched.directory.change(lambda: watched.file.remove("laptop"), "laptop")


@pytest.mark.parametrize("kind", [WatchedUsers, WatchedDevices])
async def test_internal_error_does_not_end_the_watch(
    users: UserFile, kind: type[WatchedUsers | WatchedDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = kind(users.path.parent)
    users.add("ada")
    reported = await watched.run(
        lambda: monkeypatch.setattr(TableFile, "changed", lambda self: 1 / 0),
        monkeypatch.undo,
        lambda: None,
    )
    assert reported == [[], [], []]


@pytest.mark.parametrize("kind", [WatchedUsers, WatchedDevices])
async def test_unreadable_file_ends_no_session(
    users: UserFile,
    kind: type[WatchedUsers | WatchedDevices],
    capsys: pytest.CaptureFixture[str],
) -> None:
    users.add("ada")
    watched = kind(users.path.parent)
    path = watched.directory.file.path
    good = path.read_bytes()
    reported = await watched.run(lambda: write(path, "nonsense"), path.unlink, lambda: write(path, good))
    assert reported == [[], [], []]
    assert len(watched.directory.file.entries) == 1
    names = [json.loads(line)["event"].partition(".")[2] for line in capsys.readouterr().err.splitlines()]
    assert names == ["unreadable", "unreadable"]  # the recovery is below the default level
    damaged, missing, mended = watched.faults
    assert "is not TOML" in damaged[0]
    assert "is missing" in missing[0]
    assert mended == []


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_changes_of_a_file_are_logged_by_one_process(
    users: UserFile, tmp_path: Path, elsewhere: bool
) -> None:
    async def gone(name: str, user: User) -> int:
        return 0

    for name in ("ada", "ben"):
        users.add(name)
    configure_logging(LogConfig(file=tmp_path / "log"))
    directory = Directory(UserFile(users.path), on_gone=gone, on_gone_elsewhere=gone if elsewhere else None)
    users.add_many([f"robot-{number}" for number in range(20)])
    users.disable("ada")
    users.remove("ben")
    await directory.refresh()
    await directory.refresh()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    if elsewhere:
        assert lines == []
        return
    (line,) = lines
    shown = (line["event"], line["count"], line["changed"], line["removed"])
    assert shown == ("users.changed", 22, ["ada"], ["ben"])
    assert line["added"] == [f"robot-{number}" for number in range(16)]
