"""API keys, checked against a file of users that may change at any time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.auth.helpers import DIGEST, FakeLog, decision, directory, write
from tests.helpers import drive
from tests.limits import TIMEOUT
from zcproto import auth
from zcproto.auth import Identity, UserFile, schemes
from zcproto.auth.schemes import LOOK_HOLDS_S, ApiKeyAuthenticator
from zcproto.common.roles import NO_ROLES, OPERATORS, Roles
from zcproto.errors import InvalidArgument
from zcproto.sessions import token_text

ADDRESS = "192.0.2.1"


class Scheme:
    """An authenticator, its users, and its reports. The clock advances by `passing` seconds before each login."""

    def __init__(self, path: Path) -> None:
        self.users = UserFile(path)
        self.users.load()
        self.seconds = 0.0
        self.passing = 1.0
        self.authenticator = ApiKeyAuthenticator(directory(self.users), now=lambda: self.seconds)

    async def ask(self, user: Any, key: Any, **more: Any) -> Identity | None:
        self.seconds += self.passing
        params = {"scheme": "api_key", "user": user, "key": key, **more}
        return await decision(self.authenticator.authenticate(params, ADDRESS))


@pytest.fixture
def scheme(path: Path) -> Scheme:
    return Scheme(path)


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    assert not hasattr(auth, "nothing")
    assert auth.Throttle is auth.Throttle


@pytest.mark.parametrize("roles", [NO_ROLES, OPERATORS, frozenset({"admin"})])
def test_valid_key_opens_a_session(scheme: Scheme, roles: Roles) -> None:
    key = scheme.users.add("alice", roles=roles)
    assert drive(scheme.ask("alice", key)) == Identity("alice", roles)
    assert drive(scheme.ask("alice", key, client="zc/1")) == Identity("alice", roles)


def test_wrong_user_or_key_is_refused(scheme: Scheme) -> None:
    key, other = scheme.users.add("alice"), scheme.users.add("bob")
    user = scheme.users.find("alice")
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
        assert drive(scheme.ask(name, text)) is None


def test_malformed_key_is_refused_even_if_its_placeholder_matches(scheme: Scheme, path: Path) -> None:
    zero = token_text(schemes.digest_of(bytes(32)))
    write(path, f'[users.zero]\nkey_sha256 = "{zero}"\n')
    scheme.users.load()
    assert drive(scheme.ask("zero", "no key")) is None
    assert drive(scheme.ask("zero", token_text(bytes(32)))) == Identity("zero")


def test_disabled_user_and_user_without_key_are_refused(scheme: Scheme) -> None:
    key = scheme.users.add("alice")
    scheme.users.add_digest("bob", None)
    scheme.users.disable("alice")
    for name, text in [("alice", key), ("bob", key), ("bob", token_text(bytes(32))), ("bob", "")]:
        assert drive(scheme.ask(name, text)) is None
    scheme.users.enable("alice")
    assert drive(scheme.ask("alice", key)) == Identity("alice")


def test_decoy_digest_of_unknown_users_never_logs_in(path: Path) -> None:
    secret = b"s" * 32
    users = UserFile(path)
    users.load()
    authenticator = ApiKeyAuthenticator(directory(users), entropy=lambda size: schemes.digest_of(secret))
    params = {"scheme": "api_key", "user": "unknown", "key": token_text(secret)}
    assert authenticator.authenticate(params, ADDRESS) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alice", "right"),
        ("alice", "wrong"),
        ("alice", "no key"),
        ("unknown", "right"),
        ("unknown", "no key"),
    ],
)
def test_every_login_takes_the_same_steps(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    key = scheme.users.add("alice")
    text = {"right": key, "wrong": DIGEST}.get(text, text)
    steps: list[tuple[str, int, int]] = []
    digest_of, compare = schemes.digest_of, schemes.compare_digest

    def digest(token: bytes) -> bytes:
        steps.append(("digest", len(token), 0))
        return digest_of(token)

    def compared(one: bytes, other: bytes) -> bool:
        steps.append(("compare", len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(schemes, "digest_of", digest)
    monkeypatch.setattr(schemes, "compare_digest", compared)
    drive(scheme.ask(name, text))
    assert steps == [("digest", 32, 0), ("compare", 32, 32)]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("user", [None, 5, b"alice", ["alice"], "", "x" * 129]),
        ("key", [None, 5, b"k" * 32, [], "x" * 129]),
    ],
)
def test_missing_or_invalid_field_is_named(scheme: Scheme, field: str, values: list[Any]) -> None:
    params = {"scheme": "api_key", "user": "alice", "key": DIGEST}
    wrong = [{**params, field: value} for value in values]
    del params[field]
    for each in (*wrong, params):
        with pytest.raises(InvalidArgument, match=rf"^INVALID_ARGUMENT: {field}"):
            scheme.authenticator.authenticate(each, ADDRESS)


def test_unknown_field_is_refused_without_repeating_it(scheme: Scheme) -> None:
    with pytest.raises(InvalidArgument) as caught:
        drive(scheme.ask("alice", DIGEST, passwort="secret"))
    assert "passwort" not in str(caught.value)
    assert "secret" not in str(caught.value)


# A file that changes


async def test_new_user_is_accepted_immediately(scheme: Scheme, path: Path) -> None:
    assert await scheme.ask("alice", DIGEST) is None
    key = UserFile(path).add("alice")
    assert await scheme.ask("alice", key) == Identity("alice")
    assert drive(scheme.ask("alice", key)) == Identity("alice")


async def test_removed_user_and_replaced_key_are_refused_immediately(scheme: Scheme, path: Path) -> None:
    key = scheme.users.add("alice")
    write(path, f'[users.alice]\nkey_sha256 = "{DIGEST}"\n')
    assert await scheme.ask("alice", key) is None
    write(path, "")
    assert await scheme.ask("alice", key) is None
    assert list(scheme.users.entries) == []


async def test_unchanged_file_is_not_read(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    key = scheme.users.add("alice")
    monkeypatch.setattr(UserFile, "reload", lambda self: pytest.fail("read again"))
    for _ in range(3):
        assert drive(scheme.ask("alice", key)) == Identity("alice")


async def test_concurrent_logins_share_one_reading(
    scheme: Scheme, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = UserFile(path).add("alice")
    readings: list[None] = []
    all_wait = threading.Event()
    reload = UserFile.reload

    def counted(self: UserFile) -> None:
        readings.append(None)
        all_wait.wait(TIMEOUT)
        reload(self)

    monkeypatch.setattr(UserFile, "reload", counted)
    logins = [asyncio.ensure_future(scheme.ask("alice", key)) for _ in range(50)]
    await asyncio.sleep(0)
    all_wait.set()
    results = await asyncio.gather(*logins)
    assert results == [Identity("alice")] * 50
    assert len(readings) == 1


async def test_login_cancelled_during_reading_does_not_block_others(
    scheme: Scheme, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = UserFile(path).add("alice")
    go_on = threading.Event()
    reload = UserFile.reload

    def held(self: UserFile) -> None:
        go_on.wait(TIMEOUT)
        reload(self)

    monkeypatch.setattr(UserFile, "reload", held)
    first = asyncio.ensure_future(scheme.ask("alice", key))
    second = asyncio.ensure_future(scheme.ask("alice", key))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go_on.set()
    assert await second == Identity("alice")


async def test_faulty_file_is_reported_once_and_keeps_its_users(
    scheme: Scheme, path: Path, log: FakeLog
) -> None:
    key = scheme.users.add("alice")
    write(path, "nonsense")
    for _ in range(3):
        assert await scheme.ask("alice", key) == Identity("alice")
    assert log.events == ["users.unreadable"]
    write(path, "other nonsense")
    assert await scheme.ask("alice", key) == Identity("alice")
    assert log.events == 2 * ["users.unreadable"]
    write(path, "")
    assert await scheme.ask("alice", key) is None
    assert log.events[2:] == ["users.readable", "users.changed"]
    write(path, "# still good")
    assert await scheme.ask("alice", key) is None
    assert len(log.events) == 4


def test_concurrent_logins_share_one_file_check(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    key = scheme.users.add("alice")
    looks: list[float] = []
    original = UserFile.changed

    def changed(users: UserFile) -> bool:
        looks.append(scheme.seconds)
        return original(users)

    monkeypatch.setattr(UserFile, "changed", changed)
    scheme.passing = LOOK_HOLDS_S / 4
    for _ in range(8):
        assert drive(scheme.ask("alice", key)) == Identity("alice")
    assert looks == [pytest.approx(LOOK_HOLDS_S / 4), pytest.approx(5 * LOOK_HOLDS_S / 4)]


async def test_key_is_not_refused_without_a_new_file_check(scheme: Scheme, path: Path) -> None:
    key = scheme.users.add("alice")
    assert await scheme.ask("alice", key) == Identity("alice")
    scheme.passing = 0.0
    new = UserFile(path).add("bob")
    assert await scheme.ask("bob", new) == Identity("bob")
    other = UserFile(path).new_key("alice")
    assert await scheme.ask("alice", other) == Identity("alice")
    assert await scheme.ask("alice", key) is None


async def test_removed_user_is_refused_after_the_file_check_expires(scheme: Scheme, path: Path) -> None:
    key = scheme.users.add("alice")
    assert await scheme.ask("alice", key) == Identity("alice")
    UserFile(path).remove("alice")
    scheme.passing = 0.6 * LOOK_HOLDS_S
    assert await scheme.ask("alice", key) == Identity("alice")
    assert await scheme.ask("alice", key) is None
    assert await scheme.ask("alice", key) is None
