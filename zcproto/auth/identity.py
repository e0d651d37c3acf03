"""Define the interface of authenticators: from a login's fields to a user. Adapt a function to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable
from typing import Any, Final, NamedTuple, Protocol

MAX_USER: Final = 128
"""Longest name of a user, in characters."""


class Channel(NamedTuple):
    """The connection of a login: what a proof is tied to."""

    certificate: Callable[[], bytes | None] = lambda: None
    """Returns the client's certificate in this connection (DER, verified by TLS), or None."""
    salt: bytes = b""
    """Unique to the connection."""
    leaves: Callable[[], frozenset[bytes]] = frozenset
    """Returns the SHA-256 of each server certificate (DER) that this client may have been shown."""


NO_CHANNEL: Final = Channel()
"""A connection that no proof can be tied to."""


class Identity(NamedTuple):
    """An authenticated user. An operator may inspect and control the server.

    `key` is what the session is bound to, empty for none: `device:NAME`, or `tls:` and the hex SHA-256 of the
    public key in a client's certificate.
    """

    user: str
    operator: bool = False
    key: str = ""


class Authenticator(Protocol):
    """One scheme of `session.open`."""

    @property
    def scheme(self) -> str:
        """The name that clients send."""

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel
    ) -> Identity | Awaitable[Identity | None] | None:
        """Return the user, or None for a failed login, whatever the cause.

        `params` are the fields of `session.open` as received; `address` is the client's, `channel` the connection.
        Raises InvalidArgument for missing or mistyped fields, before it uses a secret. An unknown user and a wrong
        secret must take the same steps.
        """


Answer = Identity | str | None
Function = Callable[[Mapping[str, Any], str], Answer | Awaitable[Answer]]


class CallableAuthenticator:
    """A scheme decided by a function of the login's fields and the client's address.

    The function returns an Identity, the name of a user who is not an operator, or None. A plain function runs in
    the event loop and must not block; use an `async` one to hash a password or query a database.
    """

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
        """Check the answer, so that a bug in the function does not let anyone in."""
        if answer is None or isinstance(answer, Identity):
            identity = answer
        elif isinstance(answer, str):
            identity = Identity(answer)
        else:
            raise TypeError(
                f"the function of scheme {self.scheme!r} must return an Identity, a user's name or None,"
                f" not {type(answer).__name__}"
            )
        if identity is not None and not 0 < len(identity.user) <= MAX_USER:
            raise ValueError(
                f"the function of scheme {self.scheme!r} must return a user's name of 1 to {MAX_USER} characters,"
                f" not {len(identity.user)}"
            )
        return identity
