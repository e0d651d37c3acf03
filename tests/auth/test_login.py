"""A login from its fields to an identity, or to one of few answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.auth.helpers import DIGEST, FunctionAuthenticator, directory, identified
from tests.helpers import drive
from zcproto.auth import Identity, Login, Throttle, UserFile
from zcproto.auth.identity import NO_CHANNEL, Authenticator
from zcproto.auth.login import MAX_PENDING, ApplicationAuthenticator
from zcproto.auth.schemes import ApiKeyAuthenticator
from zcproto.common.roles import OPERATORS
from zcproto.errors import CallError, InvalidArgument, ResourceExhausted, Unauthenticated, Unavailable
from zcproto.sessions import token_text

ADDRESS, ELSEWHERE = "192.0.2.1", "198.51.100.7"
NOW = 50.0


def never(params: Mapping[str, Any], address: str) -> None:
    return None


def application(own: Authenticator) -> ApplicationAuthenticator:
    return ApplicationAuthenticator(own, lambda: 8.0, lambda *refused: None, lambda *late: None)


@pytest.fixture
def key(users: UserFile) -> str:
    return users.add("alice", roles=OPERATORS)


@pytest.fixture
def login(users: UserFile, key: str) -> Login:
    return Login([ApiKeyAuthenticator(directory(users))], Throttle())


def ask(login: Login, user: str, key: str, address: str = ADDRESS, now: float = NOW) -> Identity:
    return drive(identified(login, {"scheme": "api_key", "user": user, "key": key}, address, now))


def test_valid_key_is_accepted_without_suspending(login: Login, key: str) -> None:
    assert ask(login, "alice", key) == Identity("alice", roles=OPERATORS)


@pytest.mark.parametrize(
    ("user", "text"),
    [("alice", DIGEST), ("unknown", DIGEST), ("alice", "no key"), ("unknown", ""), ("x" * 128, DIGEST)],
)
def test_all_failed_logins_get_the_same_error(login: Login, user: str, text: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        ask(login, user, text)
    assert caught.value.message == "the login was not accepted; check the name, and the key or certificate"
    assert caught.value.details == {}


def test_failed_login_of_a_function_gets_the_same_error() -> None:
    login = Login([FunctionAuthenticator("own", never)], Throttle())
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
def test_scheme_must_be_a_str(login: Login, scheme: Any) -> None:
    with pytest.raises(InvalidArgument, match="scheme: a str is needed"):
        drive(identified(login, {"scheme": scheme}, ADDRESS, NOW))


def test_missing_scheme_is_named(login: Login) -> None:
    with pytest.raises(InvalidArgument, match="scheme"):
        drive(identified(login, {}, ADDRESS, NOW))


@pytest.mark.parametrize("scheme", ["", "API_KEY", "tls", "api_key ", "x" * 10**5, "<script>"])
def test_unknown_scheme_is_not_repeated(login: Login, scheme: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        drive(identified(login, {"scheme": scheme}, ADDRESS, NOW))
    assert caught.value.message == "scheme: not offered here; use one of: api_key"


def test_schemes_are_chosen_by_name() -> None:
    login = Login(
        [FunctionAuthenticator(name, lambda p, a, name=name: Identity(name)) for name in ("one", "two")],
        Throttle(),
    )
    for name in ("one", "two"):
        assert drive(identified(login, {"scheme": name}, ADDRESS, NOW)) == Identity(name)
    with pytest.raises(InvalidArgument, match="one, two"):
        drive(identified(login, {"scheme": "three"}, ADDRESS, NOW))


def test_two_authenticators_for_one_scheme_are_refused() -> None:
    with pytest.raises(ValueError, match="'own'"):
        Login([FunctionAuthenticator("own", never), FunctionAuthenticator("own", never)], Throttle())


# Throttling


def test_throttled_login_gets_the_time_to_wait(login: Login, key: str) -> None:
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            ask(login, "alice", DIGEST)
    for text in (DIGEST, key):
        with pytest.raises(ResourceExhausted) as caught:
            ask(login, "alice", text)
        assert caught.value.details == {"retry_after_ms": 1000}
    assert ask(login, "alice", key, now=NOW + 1.0) == Identity("alice", roles=OPERATORS)


def test_throttled_login_is_not_examined() -> None:
    calls: list[str] = []

    def function(params: Mapping[str, Any], address: str) -> None:
        calls.append(address)

    login = Login([FunctionAuthenticator("own", function)], Throttle(2))
    for _ in range(10):
        with pytest.raises(CallError):
            drive(identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW))
    assert len(calls) == 2


def test_known_user_is_not_throttled_by_failures_of_others(login: Login, key: str) -> None:
    ask(login, "alice", key)
    for _ in range(8):
        with pytest.raises(CallError):
            ask(login, "alice", DIGEST, ELSEWHERE)
    assert ask(login, "alice", key)
    with pytest.raises(ResourceExhausted):
        ask(login, "alice", key, "203.0.113.9")


def test_known_and_unknown_users_get_the_same_answers(login: Login) -> None:
    answers: dict[str, list[tuple[str, str]]] = {"alice": [], "unknown": []}
    for user, address in (("alice", ADDRESS), ("unknown", ELSEWHERE)):
        now = NOW
        for _ in range(12):
            with pytest.raises(CallError) as caught:
                ask(login, user, token_text(bytes(32)), address, now)
            answers[user].append((str(caught.value), repr(caught.value.details)))
            now += 0.5
    assert answers["alice"] == answers["unknown"]


def test_invalid_field_does_not_count_as_a_failure(login: Login, key: str) -> None:
    for _ in range(20):
        with pytest.raises(InvalidArgument):
            drive(identified(login, {"scheme": "api_key", "user": "alice", "key": 5}, ADDRESS, NOW))
    assert ask(login, "alice", key)


@pytest.mark.parametrize("error", [RuntimeError("database is gone"), Unavailable("later")])
@pytest.mark.parametrize("waits", [False, True])
async def test_exception_of_the_authenticator_does_not_count_as_a_failure(
    error: Exception, waits: bool
) -> None:
    broken = True

    def plain(params: Mapping[str, Any], address: str) -> Identity:
        if broken:
            raise error
        return Identity("alice")

    async def waiting(params: Mapping[str, Any], address: str) -> Identity:
        await asyncio.sleep(0)
        return plain(params, address)

    login = Login([FunctionAuthenticator("own", waiting if waits else plain)], Throttle(1))
    for _ in range(MAX_PENDING + 5):
        with pytest.raises(type(error)):
            await identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW)
    broken = False
    assert await identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW) == Identity("alice")


@pytest.mark.parametrize("field", ["user", "device"])
async def test_concurrent_guesses_are_limited(field: str) -> None:
    tried = 0

    async def function(params: Mapping[str, Any], address: str) -> None:
        nonlocal tried
        tried += 1
        await asyncio.sleep(0)

    login = Login([FunctionAuthenticator("own", function)], Throttle())
    params = {"scheme": "own", field: "alice"}
    results = await asyncio.gather(
        *(identified(login, params, ADDRESS, NOW) for _ in range(200)), return_exceptions=True
    )
    assert tried == MAX_PENDING
    refused = [each for each in results if isinstance(each, ResourceExhausted)]
    assert len(refused) == 200 - MAX_PENDING
    assert all(each.details == {"retry_after_ms": 1000} for each in refused)
    with pytest.raises(ResourceExhausted):
        await identified(login, params, ADDRESS, NOW)
    assert tried == MAX_PENDING


async def test_cancelled_login_is_no_longer_pending() -> None:
    async def function(params: Mapping[str, Any], address: str) -> None:
        await asyncio.Event().wait()

    login = Login([FunctionAuthenticator("own", function)], Throttle())
    tasks = [
        asyncio.ensure_future(identified(login, {"scheme": "own", "user": "a"}, ADDRESS, NOW))
        for _ in range(MAX_PENDING)
    ]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        login.open({"scheme": "own", "user": "a"}, ADDRESS, NOW)
    tasks.pop().cancel()
    await asyncio.sleep(0)
    tasks.append(asyncio.ensure_future(identified(login, {"scheme": "own", "user": "a"}, ADDRESS, NOW)))
    await asyncio.sleep(0)
    assert not tasks[-1].done()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_concurrent_logins_without_a_name_are_not_limited() -> None:
    async def function(params: Mapping[str, Any], address: str) -> Identity:
        await asyncio.sleep(0)
        return Identity("alice")

    login = Login([FunctionAuthenticator("own", function)], Throttle())
    results = await asyncio.gather(*(identified(login, {"scheme": "own"}, ADDRESS, NOW) for _ in range(100)))
    assert results == [Identity("alice")] * 100


def test_sessions_opened_without_a_name_are_limited_for_the_user_whom_the_authenticator_names() -> None:
    login = Login([application(FunctionAuthenticator("own", never))], Throttle())
    unnamed = {"scheme": "own", "ticket": "a"}
    with ExitStack() as openings:
        for _ in range(MAX_PENDING):
            openings.enter_context(login.opening(unnamed, NO_CHANNEL, "alice"))
        with pytest.raises(ResourceExhausted) as refused, login.opening(unnamed, NO_CHANNEL, "alice"):
            pass
        assert refused.value.details == {"retry_after_ms": 1000}
        assert login.throttled == 1
        with login.opening(unnamed, NO_CHANNEL, "bob"):
            pass
        with login.opening(
            {"scheme": "own", "user": "alice"}, NO_CHANNEL, "alice"
        ):  # counted while it was pending
            pass
    with login.opening(unnamed, NO_CHANNEL, "alice"):
        pass


def test_device_and_user_of_the_same_name_are_counted_separately() -> None:
    login = Login([FunctionAuthenticator("own", never)], Throttle(1))
    with pytest.raises(Unauthenticated):
        drive(identified(login, {"scheme": "own", "device": "alice"}, ADDRESS, NOW))
    with pytest.raises(Unauthenticated):
        drive(identified(login, {"scheme": "own", "user": "alice"}, ADDRESS, NOW))
    with pytest.raises(ResourceExhausted):
        drive(identified(login, {"scheme": "own", "device": "alice"}, ADDRESS, NOW))


@pytest.mark.parametrize("length", [129, 10**6])
def test_long_name_is_truncated_before_it_is_counted(length: int) -> None:
    throttle = Throttle(1)
    login = Login([FunctionAuthenticator("own", never)], throttle)
    with pytest.raises(Unauthenticated):
        drive(identified(login, {"scheme": "own", "user": "x" * length}, ADDRESS, NOW))
    assert throttle.check("x" * 128, ADDRESS, NOW) > 0


def test_user_name_alone_never_opens_a_session(tmp_path: Path) -> None:
    users = UserFile(tmp_path / "users.toml")
    users.load()
    login = Login([ApiKeyAuthenticator(directory(users))], Throttle())
    with pytest.raises(Unauthenticated):
        ask(login, "alice", "")


async def test_pending_logins_are_limited_in_all_and_for_one_address() -> None:
    gate = asyncio.Event()

    async def function(params: Mapping[str, Any], address: str) -> Identity:
        await gate.wait()
        return Identity("alice")

    login = Login([FunctionAuthenticator("own", function)], Throttle(), max_pending=8)

    def start(address: str) -> asyncio.Task[Identity]:
        opening = login.open({"scheme": "own"}, address, NOW)
        assert not isinstance(opening, Identity)
        return asyncio.ensure_future(opening)

    async def is_refused(address: str) -> bool:
        await asyncio.sleep(0)
        try:
            login.open({"scheme": "own"}, address, NOW)
        except ResourceExhausted as error:
            return bool(error.details == {"retry_after_ms": 1000})
        return False

    opened = [start(ADDRESS), start(ADDRESS)]
    assert await is_refused(ADDRESS)
    for network in range(3):
        opened += [start(f"2001:db8:{network}::1"), start(f"2001:db8:{network}::2")]
        assert await is_refused(f"2001:db8:{network}::3")
    assert (login.pending, login.all_pending, login.throttled) == (8, 8, 4)
    assert await is_refused(ELSEWHERE)
    gate.set()
    assert await asyncio.gather(*opened) == [Identity("alice")] * 8
    assert login.pending == 0
    opened = [start(ADDRESS)]
    assert await asyncio.gather(*opened) == [Identity("alice")]


# Attempts without a name


class AwaitedThrottle(Throttle):
    """A throttle that has to be awaited, like that of a worker."""

    def check(self, user: str, address: str, now: float) -> Any:
        return asyncio.sleep(0, super().check(user, address, now))

    def failed(self, user: str, address: str, now: float) -> Any:
        return asyncio.sleep(0, super().failed(user, address, now))


@pytest.mark.parametrize("throttle", [Throttle, AwaitedThrottle])
async def test_attempts_without_a_name_are_delayed_by_address(throttle: type[Throttle]) -> None:
    login = Login([], throttle())
    for _ in range(5):
        await login.admit_unnamed(ADDRESS, NOW)
        await login.refuse_unnamed(ADDRESS, NOW)
    with pytest.raises(ResourceExhausted) as caught:
        await login.admit_unnamed(ADDRESS, NOW)
    assert caught.value.details == {"retry_after_ms": 1000}
    assert login.throttled == 1
    await login.admit_unnamed(ELSEWHERE, NOW)
    await login.admit_unnamed(ADDRESS, NOW + 1)
