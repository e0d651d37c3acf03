"""API keys against the file of users, which may change at any time."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.auth.helpers import DIGEST, decision, drive, write
from zcproto.auth import ApiKeyAuthenticator, Identity, UserFile
from zcproto.auth import api_key as api_key_module
from zcproto.auth.api_key import LOOK_HOLDS_S
from zcproto.errors import ConfigError, InvalidArgument
from zcproto.sessions import token_text

ADDRESS = "192.0.2.1"


class Door:
    """An authenticator, its users, and what it reported. `passing` seconds go by before each login."""

    def __init__(self, path: Path) -> None:
        self.users = UserFile(path)
        self.users.load()
        self.events: list[ConfigError | str] = []
        self.seconds = 0.0
        self.passing = 1.0
        self.authenticator = ApiKeyAuthenticator(
            self.users,
            on_fault=self.events.append,
            on_recovered=lambda: self.events.append("recovered"),
            now=lambda: self.seconds,
        )

    async def ask(self, user: Any, key: Any, **more: Any) -> Identity | None:
        self.seconds += self.passing
        params = {"scheme": "api_key", "user": user, "key": key, **more}
        return await decision(self.authenticator.authenticate(params, ADDRESS))


@pytest.fixture
def door(path: Path) -> Door:
    return Door(path)


@pytest.mark.parametrize("operator", [False, True])
def test_the_right_key_opens(door: Door, operator: bool) -> None:
    key = door.users.add("alice", operator=operator)
    assert drive(door.ask("alice", key)) == Identity("alice", operator)
    assert drive(door.ask("alice", key, client="zc/1")) == Identity("alice", operator)


def test_nothing_else_does(door: Door) -> None:
    key, other = door.users.add("alice"), door.users.add("bob")
    user = door.users.find("alice")
    assert user is not None
    for name, text in [
        ("alice", other),
        ("bob", key),
        ("carol", key),
        ("Alice", key),
        ("alice", ""),
        ("alice", key[:-1]),
        ("alice", key + "A"),
        ("alice", key + "\n"),
        ("alice", key.swapcase()),
        ("alice", token_text(bytes(32))),
        ("alice", token_text(user.digest)),
        ("carol", token_text(bytes(32))),
        ("carol", ""),
        ("\ud800", "\ud800"),
        ("x" * 128, "x" * 128),
    ]:
        assert drive(door.ask(name, text)) is None


def test_a_text_that_is_no_key_never_opens_even_where_its_stand_in_would(door: Door, path: Path) -> None:
    zero = token_text(api_key_module.digest_of(bytes(32)))
    write(path, f'[users.zero]\nkey_sha256 = "{zero}"\n')
    door.users.load()
    assert drive(door.ask("zero", "no key")) is None
    assert drive(door.ask("zero", token_text(bytes(32)))) == Identity("zero")


def test_no_key_opens_for_who_has_none_or_is_disabled(door: Door) -> None:
    key = door.users.add("alice")
    door.users.add_without_key("bob")
    door.users.disable("alice")
    for name, text in [("alice", key), ("bob", key), ("bob", token_text(bytes(32))), ("bob", "")]:
        assert drive(door.ask(name, text)) is None
    door.users.enable("alice")
    assert drive(door.ask("alice", key)) == Identity("alice")


def test_the_stand_in_for_unknown_users_is_nobodys(path: Path) -> None:
    secret = b"s" * 32
    users = UserFile(path)
    users.load()
    authenticator = ApiKeyAuthenticator(
        users, on_fault=pytest.fail, entropy=lambda size: api_key_module.digest_of(secret)
    )
    params = {"scheme": "api_key", "user": "nobody", "key": token_text(secret)}
    assert authenticator.authenticate(params, ADDRESS) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [("alice", "right"), ("alice", "wrong"), ("alice", "no key"), ("nobody", "right"), ("nobody", "no key")],
)
def test_every_login_takes_the_same_steps(
    door: Door, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    key = door.users.add("alice")
    text = {"right": key, "wrong": DIGEST}.get(text, text)
    steps: list[tuple[str, int, int]] = []
    digest_of, compare = api_key_module.digest_of, api_key_module.compare_digest

    def digest(token: bytes) -> bytes:
        steps.append(("digest", len(token), 0))
        return digest_of(token)

    def compared(one: bytes, other: bytes) -> bool:
        steps.append(("compare", len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(api_key_module, "digest_of", digest)
    monkeypatch.setattr(api_key_module, "compare_digest", compared)
    drive(door.ask(name, text))
    assert steps == [("digest", 32, 0), ("compare", 32, 32)]


@pytest.mark.parametrize("user", [None, 5, b"alice", ["alice"], "", "x" * 129])
def test_a_bad_user_field_is_named(door: Door, user: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^INVALID_ARGUMENT: user"):
        drive(door.ask(user, DIGEST))


@pytest.mark.parametrize("key", [None, 5, b"k" * 32, [], "x" * 129])
def test_a_bad_key_field_is_named(door: Door, key: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^INVALID_ARGUMENT: key"):
        drive(door.ask("alice", key))


@pytest.mark.parametrize("missing", ["user", "key"])
def test_a_missing_field_is_named(door: Door, missing: str) -> None:
    params = {"scheme": "api_key", "user": "alice", "key": DIGEST}
    del params[missing]
    with pytest.raises(InvalidArgument, match=missing):
        door.authenticator.authenticate(params, ADDRESS)


def test_an_unknown_field_is_refused_without_repeating_it(door: Door) -> None:
    with pytest.raises(InvalidArgument) as caught:
        drive(door.ask("alice", DIGEST, passwort="secret"))
    assert "passwort" not in str(caught.value)
    assert "secret" not in str(caught.value)


# A file that changes


async def test_a_new_user_is_known_at_once(door: Door, path: Path) -> None:
    assert await door.ask("alice", DIGEST) is None
    key = UserFile(path).add("alice")
    assert await door.ask("alice", key) == Identity("alice")
    assert drive(door.ask("alice", key)) == Identity("alice")


async def test_a_removed_user_and_an_exchanged_key_are_known_at_once(door: Door, path: Path) -> None:
    key = door.users.add("alice")
    write(path, f'[users.alice]\nkey_sha256 = "{DIGEST}"\n')
    assert await door.ask("alice", key) is None
    write(path, "")
    assert await door.ask("alice", key) is None
    assert door.users.names == []


async def test_while_nothing_changed_the_file_is_not_read(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = door.users.add("alice")
    monkeypatch.setattr(UserFile, "reload", lambda self: pytest.fail("read again"))
    for _ in range(3):
        assert drive(door.ask("alice", key)) == Identity("alice")


async def test_logins_that_come_together_wait_for_one_reading(
    door: Door, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = UserFile(path).add("alice")
    readings: list[None] = []
    all_wait = threading.Event()
    reload = UserFile.reload

    def counted(self: UserFile) -> None:
        readings.append(None)
        all_wait.wait(10)
        reload(self)

    monkeypatch.setattr(UserFile, "reload", counted)
    logins = [asyncio.ensure_future(door.ask("alice", key)) for _ in range(50)]
    await asyncio.sleep(0)
    all_wait.set()
    results = await asyncio.gather(*logins)
    assert results == [Identity("alice")] * 50
    assert len(readings) == 1


async def test_a_login_cancelled_while_reading_does_not_hold_up_the_others(
    door: Door, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = UserFile(path).add("alice")
    go_on = threading.Event()
    reload = UserFile.reload

    def held(self: UserFile) -> None:
        go_on.wait(10)
        reload(self)

    monkeypatch.setattr(UserFile, "reload", held)
    first = asyncio.ensure_future(door.ask("alice", key))
    second = asyncio.ensure_future(door.ask("alice", key))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go_on.set()
    assert await second == Identity("alice")


async def test_a_file_gone_bad_is_told_of_once_and_keeps_its_users(door: Door, path: Path) -> None:
    key = door.users.add("alice")
    write(path, "nonsense")
    for _ in range(3):
        assert await door.ask("alice", key) == Identity("alice")
    assert len(door.events) == 1
    assert isinstance(door.events[0], ConfigError)
    write(path, "other nonsense")
    assert await door.ask("alice", key) == Identity("alice")
    assert len(door.events) == 2
    write(path, "")
    assert await door.ask("alice", key) is None
    assert door.events[2:] == ["recovered"]
    write(path, "# still good")
    assert await door.ask("alice", key) is None
    assert len(door.events) == 3


def test_a_crowd_is_let_in_by_one_look(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    key = door.users.add("alice")
    looks: list[float] = []
    look = UserFile.changed

    def changed(users: UserFile) -> bool:
        looks.append(door.seconds)
        return look(users)

    monkeypatch.setattr(UserFile, "changed", changed)
    door.passing = LOOK_HOLDS_S / 4
    for _ in range(8):
        assert drive(door.ask("alice", key)) == Identity("alice")
    assert looks == [pytest.approx(LOOK_HOLDS_S / 4), pytest.approx(5 * LOOK_HOLDS_S / 4)]


async def test_nobody_is_refused_by_a_look_of_before(door: Door, path: Path) -> None:
    key = door.users.add("alice")
    assert await door.ask("alice", key) == Identity("alice")
    door.passing = 0.0
    new = UserFile(path).add("bob")
    assert await door.ask("bob", new) == Identity("bob")
    other = UserFile(path).new_key("alice")
    assert await door.ask("alice", other) == Identity("alice")
    assert await door.ask("alice", key) is None


async def test_who_is_removed_gets_in_for_a_moment_at_most(door: Door, path: Path) -> None:
    key = door.users.add("alice")
    assert await door.ask("alice", key) == Identity("alice")
    UserFile(path).remove("alice")
    door.passing = 0.6 * LOOK_HOLDS_S
    assert await door.ask("alice", key) == Identity("alice")
    assert await door.ask("alice", key) is None
    assert await door.ask("alice", key) is None


async def test_recovery_may_go_unreported(path: Path) -> None:
    users = UserFile(path)
    key = users.add("alice")
    reported: list[ConfigError] = []
    seconds = itertools.count()
    authenticator = ApiKeyAuthenticator(users, on_fault=reported.append, now=lambda: next(seconds))
    params = {"scheme": "api_key", "user": "alice", "key": key}
    write(path, "nonsense")
    assert await decision(authenticator.authenticate(params, ADDRESS)) == Identity("alice")
    write(path, f'[users.alice]\nkey_sha256 = "{token_text(users.find("alice").digest)}"\n')
    assert await decision(authenticator.authenticate(params, ADDRESS)) == Identity("alice")
    assert len(reported) == 1
