"""What an authenticator is: it takes a login's fields and says who that is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

MAX_USER: Final = 128
"""Longest name of a user, in characters."""


PeerCertificate = Callable[[], bytes | None]
"""Gives the client's certificate in this connection, which TLS has verified, in DER form; None without one."""


def no_certificate() -> None:
    """The certificate of a client that shows none."""


class Identity(NamedTuple):
    """A user who has proved who they are. An operator may look into the server and steer it."""

    user: str
    operator: bool = False


class Authenticator(Protocol):
    """One scheme of `session.open`."""

    @property
    def scheme(self) -> str:
        """The name that clients give."""
        ...

    def authenticate(
        self, params: Mapping[str, Any], address: str, certificate: PeerCertificate
    ) -> Identity | Awaitable[Identity | None] | None:
        """Who this is, or None for anyone who has not proved it, whatever the cause.

        `params` are the fields of `session.open`, as the client sent them; `address` is the client's, and
        `certificate` gives its certificate.
        Raises InvalidArgument for fields that are missing or of the wrong type, before it looks at any
        secret. An unknown user and a wrong secret must take the same steps.
        """
        ...


@runtime_checkable
class NamesUser(Protocol):
    """An authenticator that knows whom a login is of from the certificate, and not from its fields."""

    def user_named(self, certificate: PeerCertificate) -> str:
        """The user for whom a failure is counted; empty if that is nobody."""
        ...
