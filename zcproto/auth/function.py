"""Schemes that an embedding program writes as one function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable
from typing import Any

from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity

Answer = Identity | str | None
Function = Callable[[Mapping[str, Any], str], Answer | Awaitable[Answer]]


class CallableAuthenticator:
    """A scheme decided by a function of the login's fields and the client's address.

    The function may be plain or `async`. It gives an Identity, the name of a user who is no operator, or
    None. A plain one runs in the event loop and must not wait; one that hashes a password or asks a
    database is `async`.
    """

    __slots__ = ("_function", "scheme")

    def __init__(self, scheme: str, function: Function) -> None:
        self.scheme = scheme
        self._function = function

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        answer = self._function(params, address)
        if isawaitable(answer):
            return self._wait_for(answer)
        return self._identity(answer)

    async def _wait_for(self, answer: Awaitable[Answer]) -> Identity | None:
        return self._identity(await answer)

    def _identity(self, answer: Answer) -> Identity | None:
        """The function's answer, checked: a mistake in it must not let anyone in."""
        if answer is None or isinstance(answer, Identity):
            identity = answer
        elif isinstance(answer, str):
            identity = Identity(answer)
        else:
            raise TypeError(
                f"the function of scheme {self.scheme!r} must give an Identity, a user's name or None,"
                f" not {type(answer).__name__}"
            )
        if identity is not None and not 0 < len(identity.user) <= MAX_USER:
            raise ValueError(
                f"the function of scheme {self.scheme!r} must give a user's name of 1 to {MAX_USER} characters,"
                f" not {len(identity.user)}"
            )
        return identity
