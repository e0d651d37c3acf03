"""Run the authenticators of an application: with a time limit, and with answers and errors that a login may have.

Rules:
- An answer that is not an identity is an error, so that a bug does not let anyone in.
- An error that refuses the login, such as NotFound, is a failed login: the client gets the answer of all failed
  logins, the log gets the message.
- Messages of errors reach the log without the values of the login's fields: any of them may be a secret.
- An authenticator that takes too long is cancelled. The login is not counted as failed, and can be tried again.

Must not know: how attempts are counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import isawaitable
from itertools import islice
from typing import Any, Final, NoReturn

from zcproto.auth.identity import (
    MAX_USER,
    NO_CHANNEL,
    Authenticator,
    Channel,
    Identity,
    check_identity,
    user_in,
)
from zcproto.common.exceptions import MAX_EXCEPTIONS
from zcproto.errors import CallError, Code, Unavailable

_UNDECIDED: Final = frozenset({Code.INVALID_ARGUMENT, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
"""Errors that do not refuse the login; the client gets them as they are."""

MAX_MESSAGES: Final = 64
"""Messages of an exception, its causes and members that are searched. With more of them it is replaced."""

MASKED_FROM: Final = 4
"""Values of this length and above are masked in the log: shorter ones are no secrets, and would hide words."""


@dataclass(frozen=True, slots=True, eq=False)
class ApplicationAuthenticator:
    """An authenticator of the application.

    `timeout` returns the seconds that it may take. `on_refused` is called with the scheme, the reason and the
    client's address, `on_timeout` with the scheme and the address.
    """

    authenticator: Authenticator
    timeout: Callable[[], float]
    on_refused: Callable[[str, str, str], None]
    on_timeout: Callable[[str, str], None]

    @property
    def scheme(self) -> str:
        return self.authenticator.scheme

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> str:
        """Return the name for which failures are counted, or an empty text."""
        user_named = getattr(self.authenticator, "user_named", user_in)
        name: object = user_named(params, channel)
        return name[:MAX_USER] if isinstance(name, str) else ""

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        try:
            answer = self.authenticator.authenticate(params, address, channel)
        except CallError as error:
            self._refused(error, params, address)
            return None
        except Exception as error:
            self._raise(error, params)
        if isawaitable(answer):
            return self._wait_for(answer, params, address)
        return check_identity(answer, self.scheme)

    async def _wait_for(
        self, answer: Awaitable[Identity | None], params: Mapping[str, Any], address: str
    ) -> Identity | None:
        limit = asyncio.timeout(self.timeout())
        try:
            async with limit:
                return check_identity(await answer, self.scheme)
        except CallError as error:
            self._refused(error, params, address)
            return None
        except Exception as error:
            if not limit.expired():
                self._raise(error, params)
            self.on_timeout(self.scheme, address)
            raise Unavailable("the login takes too long; try again") from None

    @staticmethod
    def _raise(error: Exception, params: Mapping[str, Any]) -> NoReturn:
        """Raise an unexpected exception, whose messages are logged."""
        replaced = without_fields(error, params)
        if replaced is None:
            raise error
        raise replaced from replaced.__cause__

    def _refused(self, error: CallError, params: Mapping[str, Any], address: str) -> None:
        if error.code in _UNDECIDED:
            raise error
        self.on_refused(self.scheme, mask_fields(str(error), params), address)


def mask_fields(text: str, params: Mapping[str, Any]) -> str:
    """Return a text without the values of a login's fields."""
    for name, value in params.items():
        if name != "scheme" and isinstance(value, str) and len(value) >= MASKED_FROM:
            text = text.replace(value, "***").replace(repr(value)[1:-1], "***")
    return text


def without_fields(error: BaseException, params: Mapping[str, Any]) -> RuntimeError | None:
    """Return what to log in place of an exception whose messages have values of a login's fields, if any has."""
    texts = [*islice(_messages(error), MAX_MESSAGES + 1)]
    if len(texts) <= MAX_MESSAGES and all(mask_fields(text, params) == text for text in texts):
        return None
    replaced: RuntimeError | None = None
    for each in reversed([*_chain(error)]):
        text = f"{type(each).__name__}: {mask_fields(str(each), params)}"
        effect = RuntimeError(text).with_traceback(each.__traceback__)
        effect.__cause__ = replaced
        replaced = effect
    return replaced


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(MAX_EXCEPTIONS):  # as many as the log shows
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _messages(error: BaseException) -> Iterator[str]:
    """Yield what the log shows of an exception, of its causes and of the members of groups."""
    for each in _chain(error):
        yield str(each)
        yield from getattr(each, "__notes__", ())
        for member in getattr(each, "exceptions", ()):
            yield from _messages(member)
