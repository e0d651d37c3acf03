"""Authenticators of an application: time limit, answers and errors."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest

from tests.auth.helpers import FunctionAuthenticator, identified
from zcproto.auth import ApplicationAuthenticator, Identity, Login, Throttle
from zcproto.auth.identity import NO_CHANNEL, Channel
from zcproto.auth.login import MAX_MESSAGES, mask_fields
from zcproto.common.exceptions import MAX_EXCEPTIONS
from zcproto.common.roles import OPERATORS
from zcproto.errors import (
    CallError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

ADDRESS = "192.0.2.1"
NOW = 50.0
FIELDS = {"scheme": "own", "user": "alice", "password": "hunter2"}

Function = Callable[[Mapping[str, Any], str], Any]


class Recorded:
    """An authenticator in a login, and what it reported."""

    def __init__(self, function: Function, seconds: float = 5.0, *, waits: bool = False) -> None:
        async def waiting(params: Mapping[str, Any], address: str) -> Any:
            await asyncio.sleep(0)
            return function(params, address)

        self.refused: list[tuple[str, str, str]] = []
        self.timed_out: list[tuple[str, str]] = []
        self.authenticator = ApplicationAuthenticator(
            FunctionAuthenticator("own", waiting if waits else function),
            lambda: seconds,
            lambda *reason: self.refused.append(reason),
            lambda *scheme: self.timed_out.append(scheme),
        )
        self.throttle = Throttle(1)
        self.login = Login([self.authenticator], self.throttle)

    async def open(self, fields: Mapping[str, Any] = FIELDS) -> Identity:
        return await identified(self.login, fields, ADDRESS, NOW)

    @property
    def has_failures(self) -> bool:
        return self.throttle.check("alice", ADDRESS, NOW) > 0


def raising(error: Exception) -> Function:
    def function(params: Mapping[str, Any], address: str) -> None:
        raise error

    return function


waits = pytest.mark.parametrize("waits", [False, True])


@waits
async def test_identity_opens_a_session_of_an_external_user(waits: bool) -> None:
    own = Recorded(lambda params, address: Identity(params["user"], roles=OPERATORS), waits=waits)
    assert await own.open() == Identity("alice", OPERATORS)
    assert own.login.external == {"own"}


@waits
async def test_none_refuses_the_login_and_counts_as_a_failure(waits: bool) -> None:
    own = Recorded(lambda params, address: None, waits=waits)
    with pytest.raises(Unauthenticated):
        await own.open()
    assert (own.login.refused["own"], own.has_failures) == (1, True)


@pytest.mark.parametrize("scheme", ["", "x" * 65, "Own", "a b"])
def test_scheme_that_no_client_can_name_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64 characters"):
        Login([FunctionAuthenticator(scheme, raising(AssertionError()))], Throttle())


@waits
@pytest.mark.parametrize(
    "answer",
    [
        *(True, False, 0, b"alice", "alice", ("alice", OPERATORS, "")),
        Identity(5),  # type: ignore[arg-type]
        Identity("a", True),  # type: ignore[arg-type]
        Identity("a", "admin"),  # type: ignore[arg-type]
        Identity("a", key=5),  # type: ignore[arg-type]
        Identity("a", ends_at=1.5),  # type: ignore[arg-type]
    ],
)
async def test_answer_of_another_type_is_an_error(answer: Any, waits: bool) -> None:
    own = Recorded(lambda params, address: answer, waits=waits)
    with pytest.raises(TypeError, match="the scheme 'own' must return None, or an Identity"):
        await own.open()
    assert own.login.failed["own"] == 1
    assert not own.has_failures


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\ud800"])
async def test_unusable_name_of_a_user_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"1 to 128 printable characters, not {len(name)}"):
        await Recorded(lambda params, address: Identity(name)).open()


@waits
@pytest.mark.parametrize(
    "error", [NotFound("no user alice"), PermissionDenied("disabled"), Unauthenticated("expired")]
)
async def test_error_that_refuses_the_login_gets_the_answer_of_all_failed_logins(
    error: CallError, waits: bool
) -> None:
    own = Recorded(raising(error), waits=waits)
    with pytest.raises(Unauthenticated, match="the login was not accepted") as caught:
        await own.open()
    assert caught.value.__context__ is None
    assert own.refused == [("own", str(error).replace("alice", "***"), ADDRESS)]
    assert own.login.refused["own"] == 1
    assert own.has_failures


@waits
@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (InvalidArgument("ticket: a str is needed"), 0),
        (Unavailable("the directory does not answer"), 1),
        (ResourceExhausted("later", {"retry_after_ms": 5}), 1),
        (RuntimeError("bug"), 1),
        (TimeoutError("of its own"), 1),
    ],
)
async def test_other_errors_are_raised_and_are_no_failed_login(
    error: Exception, failed: int, waits: bool
) -> None:
    own = Recorded(raising(error), waits=waits)
    with pytest.raises(type(error)) as caught:
        await own.open()
    assert caught.value is error
    assert own.login.failed["own"] == failed
    assert (own.refused, own.timed_out, own.has_failures) == ([], [], False)


async def test_slow_authenticator_is_cancelled() -> None:
    ended: list[str] = []

    async def function(params: Mapping[str, Any], address: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    own = Recorded(function, seconds=0.0)
    with pytest.raises(Unavailable, match="takes too long") as caught:
        await own.open()
    assert caught.value.__cause__ is None
    assert ended == ["cancelled"]
    assert own.timed_out == [("own", ADDRESS)]
    assert (own.login.failed["own"], own.login.pending, own.has_failures) == (1, 0, False)


class NamesByEmail(FunctionAuthenticator):
    """Names the user by another field; a bug returns what is not a name."""

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> Any:
        return params.get("email")


@pytest.mark.parametrize(
    ("fields", "name"), [({"email": "a" * 200}, "a" * 128), ({"email": 5}, ""), ({"user": "eve"}, "")]
)
def test_name_for_failures_is_that_of_the_authenticator(fields: dict[str, Any], name: str) -> None:
    inner = NamesByEmail("own", lambda params, address: None)
    own = ApplicationAuthenticator(inner, lambda: 1.0, lambda *_: None, lambda *_: None)
    assert own.user_named(fields, NO_CHANNEL) == name


def chained(*errors: Exception) -> Exception:
    """Return the first one, caused by the others."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def noted(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


def shown(error: BaseException | None) -> list[str]:
    """Return the messages of an exception and its causes."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return found


@waits
@pytest.mark.parametrize(
    ("error", "messages"),
    [
        (KeyError("hunter2"), ["RuntimeError: KeyError: '***'"]),
        (ValueError("it's\\ok"), ["ValueError: it's\\ok"]),
        (
            chained(ValueError("no entry"), OSError("hunter2 is unknown"), OSError("disk")),
            [
                "RuntimeError: ValueError: no entry",
                "RuntimeError: OSError: *** is unknown",
                "RuntimeError: OSError: disk",
            ],
        ),
        (chained(ValueError("no entry"), OSError("disk")), ["ValueError: no entry", "OSError: disk"]),
        (
            chained(ValueError("hunter2"), *(OSError(str(number)) for number in range(MAX_EXCEPTIONS))),
            ["RuntimeError: ValueError: ***"]
            + [f"RuntimeError: OSError: {number}" for number in range(MAX_EXCEPTIONS - 1)],
        ),
        (noted(ValueError("wrong"), "with hunter2"), ["RuntimeError: ValueError: wrong"]),
        (
            ExceptionGroup("several", [ValueError("hunter2")]),
            ["RuntimeError: ExceptionGroup: several (1 sub-exception)"],
        ),
        (
            ExceptionGroup("many", [ValueError(str(number)) for number in range(MAX_MESSAGES)]),
            ["RuntimeError: ExceptionGroup: many (64 sub-exceptions)"],
        ),
    ],
)
async def test_exception_is_logged_without_the_fields(
    error: Exception, messages: list[str], waits: bool
) -> None:
    own = Recorded(raising(error), waits=waits)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        await own.open()
    assert shown(caught.value) == messages
    places = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert places[-1] == "function", "where it was raised"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("hunter2 is wrong for alice", "*** is wrong for ***"),
        ("the scheme own", "the scheme own"),
        ("a is short", "a is short"),
        (repr("back\\slash"), "'***'"),
    ],
)
def test_fields_are_masked_in_a_reason(text: str, masked: str) -> None:
    assert mask_fields(text, {**FIELDS, "short": "a", "number": 5, "quoted": "back\\slash"}) == masked
