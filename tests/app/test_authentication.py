"""Schemes decided by a function of the application."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from zcproto.app.app import Context
from zcproto.app.authentication import Answer, CallableAuthenticator
from zcproto.auth import Identity
from zcproto.auth.identity import NO_CHANNEL
from zcproto.common.roles import OPERATORS
from zcproto.errors import InvalidArgument

CHANNEL = NO_CHANNEL._replace(context="the context")


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("answer", "identity"),
    [
        (None, None),
        ("alice", Identity("alice")),
        (Identity("root", roles=OPERATORS), Identity("root", OPERATORS)),
    ],
)
async def test_fields_are_passed_by_name_and_the_answer_becomes_an_identity(
    answer: Answer, identity: Identity | None, waits: bool
) -> None:
    seen: list[tuple[Any, ...]] = []

    def plain(context: Context, ticket: bytes, realm: str = "home") -> Answer:
        seen.append((context, ticket, realm))
        return answer

    async def waiting(context: Context, ticket: bytes, realm: str = "home") -> Answer:
        await asyncio.sleep(0)
        return plain(context, ticket, realm)

    authenticator = CallableAuthenticator("own", waiting if waits else plain)
    assert (authenticator.scheme, repr(authenticator)) == ("own", "CallableAuthenticator('own')")
    result = authenticator.authenticate({"scheme": "own", "ticket": b"t"}, "192.0.2.1", CHANNEL)
    if waits:
        assert not isinstance(result, Identity | None)
        result = await result
    assert result == identity
    assert seen == [("the context", b"t", "home")]


@pytest.mark.parametrize("params", [{}, {"user": 1, "password": "p"}, {"user": "a", "password": "p", "x": 1}])
def test_missing_mistyped_and_unknown_fields_are_refused_before_the_function_runs(params: Any) -> None:
    def check(user: str, password: str) -> None:
        raise AssertionError("it must not run")

    with pytest.raises(InvalidArgument):
        CallableAuthenticator("own", check).authenticate({"scheme": "own", **params}, "192.0.2.1")


@pytest.mark.parametrize(
    ("field", "params", "name"),
    [
        ("user", {"user": "ada"}, "ada"),
        ("email", {"email": "ada@example.org", "user": "eve"}, "ada@example.org"),
        ("email", {"user": "eve"}, ""),
        ("user", {"user": 5}, ""),
        (None, {"user": "ada"}, ""),
    ],
)
def test_failures_are_counted_for_the_user_field(field: str | None, params: Any, name: str) -> None:
    authenticator = CallableAuthenticator("own", lambda **fields: None, user_field=field)
    assert authenticator.user_named(params, CHANNEL) == name


@pytest.mark.parametrize("scheme", ["", "Password", "a b", "x" * 65, "näme"])
def test_malformed_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64 characters"):
        CallableAuthenticator(scheme, lambda: None)


def test_function_that_cannot_be_called_by_name_is_refused() -> None:
    def check(user: str, /) -> None: ...

    with pytest.raises(TypeError, match=r"^scheme own: "):
        CallableAuthenticator("own", check)


def test_async_function_does_not_run_in_a_thread() -> None:
    async def check(user: str) -> None: ...

    with pytest.raises(TypeError, match=r"^scheme own: thread=True is for def"):
        CallableAuthenticator("own", check, thread=True)
