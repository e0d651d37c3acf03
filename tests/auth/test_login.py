"""A login from its fields to an identity, or to one of few answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.auth.helpers import DIGEST, drive, identified
from zcproto.auth import ApiKeyAuthenticator, CallableAuthenticator, Identity, Login, Throttle, UserFile
from zcproto.auth.login import MAX_UNDECIDED
from zcproto.errors import CallError, InvalidArgument, ResourceExhausted, Unauthenticated, Unavailable
from zcproto.sessions import token_text

ADDRESS, ELSEWHERE = "192.0.2.1", "198.51.100.7"
NOW = 50.0


def never(params: Mapping[str, Any], address: str) -> None:
    return None


@pytest.fixture
def key(users: UserFile) -> str:
    return users.add("alice", operator=True)


@pytest.fixture
def login(users: UserFile, key: str) -> Login:
    return Login([ApiKeyAuthenticator(users, on_fault=pytest.fail)], Throttle())


def ask(login: Login, user: str, key: str, address: str = ADDRESS, now: float = NOW) -> Identity:
    return drive(identified(login, {"scheme": "api_key", "user": user, "key": key}, address, now))


def test_who_has_the_key_is_let_in_without_a_wait(login: Login, key: str) -> None:
    assert ask(login, "alice", key) == Identity("alice", operator=True)


@pytest.mark.parametrize(
    ("user", "text"),
    [("alice", DIGEST), ("nobody", DIGEST), ("alice", "no key"), ("nobody", ""), ("x" * 128, DIGEST)],
)
def test_everyone_else_gets_the_same_answer(login: Login, user: str, text: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        ask(login, user, text)
    assert caught.value.message == "the login was not accepted; check the name, and the key or certificate"
    assert caught.value.details == {}


def test_one_function_says_no_in_the_same_words() -> None:
    login = Login([CallableAuthenticator("own", never)], Throttle())
    with pytest.raises(Unauthenticated) as caught:
        drive(identified(login, {"scheme": "own"}, ADDRESS, NOW))
    assert caught.value.message == "the login was not accepted; check the name, and the key or certificate"


def test_logins_are_counted_by_scheme_and_result(login: Login, key: str) -> None:
    assert login.schemes == ("api_key",)
    ask(login, "alice", key)
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            ask(login, "bob", DIGEST)
    with pytest.raises(ResourceExhausted):
        ask(login, "bob", DIGEST)
    with pytest.raises(InvalidArgument):
        drive(identified(login, {"scheme": "other"}, ADDRESS, NOW))
    assert login.accepted == {"api_key": 1, "session.attach": 0}
    assert login.refused == {"api_key": 5, "session.attach": 0}
    assert login.throttled == 1


# Schemes


@pytest.mark.parametrize("scheme", [None, 5, b"api_key", ["api_key"], {}])
def test_a_scheme_is_a_str(login: Login, scheme: Any) -> None:
    with pytest.raises(InvalidArgument, match="scheme: a str is needed"):
        drive(identified(login, {"scheme": scheme}, ADDRESS, NOW))


def test_a_missing_scheme_is_named(login: Login) -> None:
    with pytest.raises(InvalidArgument, match="scheme"):
        drive(identified(login, {}, ADDRESS, NOW))


@pytest.mark.parametrize("scheme", ["", "API_KEY", "tls", "api_key ", "x" * 10**5, "<script>"])
def test_an_unknown_scheme_is_not_repeated(login: Login, scheme: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        drive(identified(login, {"scheme": scheme}, ADDRESS, NOW))
    assert caught.value.message == "scheme: not offered here; use one of: api_key"


def test_schemes_are_chosen_by_name() -> None:
    login = Login(
        [CallableAuthenticator(name, lambda p, a, name=name: name) for name in ("one", "two")], Throttle()
    )
    for name in ("one", "two"):
        assert drive(identified(login, {"scheme": name}, ADDRESS, NOW)) == Identity(name)
    with pytest.raises(InvalidArgument, match="one, two"):
        drive(identified(login, {"scheme": "three"}, ADDRESS, NOW))


def test_a_scheme_has_one_authenticator() -> None:
    with pytest.raises(ValueError, match="'own'"):
        Login([CallableAuthenticator("own", never), CallableAuthenticator("own", never)], Throttle())


# Throttling


def test_failures_lead_to_a_delay_that_says_when_to_come_back(login: Login, key: str) -> None:
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            ask(login, "alice", DIGEST)
    for text in (DIGEST, key):
        with pytest.raises(ResourceExhausted) as caught:
            ask(login, "alice", text)
        assert caught.value.details == {"retry_after_ms": 1000}
    assert ask(login, "alice", key, now=NOW + 1.0) == Identity("alice", operator=True)


def test_a_delayed_login_is_not_looked_at() -> None:
    calls: list[str] = []

    def function(params: Mapping[str, Any], address: str) -> None:
        calls.append(address)

    login = Login([CallableAuthenticator("own", function)], Throttle(2))
    for _ in range(10):
        with pytest.raises(CallError):
            drive(identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW))
    assert len(calls) == 2


def test_a_success_is_remembered_against_the_failures_of_others(login: Login, key: str) -> None:
    ask(login, "alice", key)
    for _ in range(8):
        with pytest.raises(CallError):
            ask(login, "alice", DIGEST, ELSEWHERE)
    assert ask(login, "alice", key)
    with pytest.raises(ResourceExhausted):
        ask(login, "alice", key, "203.0.113.9")


def test_users_known_and_unknown_are_answered_alike_all_the_way(login: Login) -> None:
    answers: dict[str, list[tuple[str, str]]] = {"alice": [], "nobody": []}
    for user, address in (("alice", ADDRESS), ("nobody", ELSEWHERE)):
        now = NOW
        for _ in range(12):
            with pytest.raises(CallError) as caught:
                ask(login, user, token_text(bytes(32)), address, now)
            answers[user].append((str(caught.value), repr(caught.value.details)))
            now += 0.5
    assert answers["alice"] == answers["nobody"]


def test_a_faulty_field_is_no_failure(login: Login, key: str) -> None:
    for _ in range(20):
        with pytest.raises(InvalidArgument):
            drive(identified(login, {"scheme": "api_key", "user": "alice", "key": 5}, ADDRESS, NOW))
    assert ask(login, "alice", key)


@pytest.mark.parametrize("error", [RuntimeError("database is gone"), Unavailable("later")])
@pytest.mark.parametrize("waits", [False, True])
async def test_a_fault_of_the_authenticator_is_no_failure(error: Exception, waits: bool) -> None:
    broken = True

    def plain(params: Mapping[str, Any], address: str) -> str:
        if broken:
            raise error
        return "alice"

    async def waiting(params: Mapping[str, Any], address: str) -> str:
        await asyncio.sleep(0)
        return plain(params, address)

    login = Login([CallableAuthenticator("own", waiting if waits else plain)], Throttle(1))
    for _ in range(MAX_UNDECIDED + 5):
        with pytest.raises(type(error)):
            await identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW)
    broken = False
    assert await identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW) == Identity("alice")


@pytest.mark.parametrize("field", ["user", "device"])
async def test_guesses_sent_together_do_not_all_pass(field: str) -> None:
    tried = 0

    async def function(params: Mapping[str, Any], address: str) -> None:
        nonlocal tried
        tried += 1
        await asyncio.sleep(0)

    login = Login([CallableAuthenticator("own", function)], Throttle())
    params = {"scheme": "own", field: "alice"}
    results = await asyncio.gather(
        *(identified(login, params, ADDRESS, NOW) for _ in range(200)), return_exceptions=True
    )
    assert tried == MAX_UNDECIDED
    refused = [each for each in results if isinstance(each, ResourceExhausted)]
    assert len(refused) == 200 - MAX_UNDECIDED
    assert all(each.details == {"retry_after_ms": 1000} for each in refused)
    with pytest.raises(ResourceExhausted):
        await identified(login, params, ADDRESS, NOW)
    assert login._undecided == {}


async def test_a_login_cancelled_while_it_waits_is_undecided_no_more() -> None:
    async def function(params: Mapping[str, Any], address: str) -> None:
        await asyncio.Event().wait()

    login = Login([CallableAuthenticator("own", function)], Throttle())
    tasks = [
        asyncio.ensure_future(identified(login, {"scheme": "own", "user": "a"}, ADDRESS, NOW))
        for _ in range(3)
    ]
    await asyncio.sleep(0)
    assert login._undecided == {"a": 3}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert login._undecided == {}


async def test_logins_that_name_nobody_do_not_hold_up_each_other() -> None:
    async def function(params: Mapping[str, Any], address: str) -> str:
        await asyncio.sleep(0)
        return "somebody"

    login = Login([CallableAuthenticator("own", function)], Throttle())
    results = await asyncio.gather(*(identified(login, {"scheme": "own"}, ADDRESS, NOW) for _ in range(100)))
    assert results == [Identity("somebody")] * 100


def test_devices_and_users_of_one_name_are_counted_apart() -> None:
    login = Login([CallableAuthenticator("own", never)], Throttle(1))
    with pytest.raises(Unauthenticated):
        drive(identified(login, {"scheme": "own", "device": "alice"}, ADDRESS, NOW))
    with pytest.raises(Unauthenticated):
        drive(identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW))
    with pytest.raises(ResourceExhausted):
        drive(identified(login, {"scheme": "own", "device": "alice"}, ADDRESS, NOW))


@pytest.mark.parametrize("length", [129, 10**6])
def test_a_huge_name_costs_no_huge_memory(length: int) -> None:
    throttle = Throttle(1)
    login = Login([CallableAuthenticator("own", never)], throttle)
    with pytest.raises(Unauthenticated):
        drive(identified(login, {"scheme": "own", "user": "x" * length}, ADDRESS, NOW))
    assert throttle.check("x" * 128, ADDRESS, NOW) > 0


def test_a_session_is_never_opened_by_the_name_alone(tmp_path: Path) -> None:
    users = UserFile(tmp_path / "users.toml")
    users.load()
    login = Login([ApiKeyAuthenticator(users, on_fault=pytest.fail)], Throttle())
    with pytest.raises(Unauthenticated):
        ask(login, "alice", "")
