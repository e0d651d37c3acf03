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


class Channel(NamedTuple):
    """The connection that a login comes through: what ties a proof to it."""

    certificate: PeerCertificate = no_certificate
    salt: bytes = b""
    """No other connection has it."""
    leaves: Callable[[], frozenset[bytes]] = frozenset
    """Gives the SHA-256 of the server's certificates (DER), one of which the client was shown here."""


NO_CHANNEL: Final = Channel()
"""A connection that nothing can be tied to."""


class Identity(NamedTuple):
    """A user who has proved who they are. An operator may look into the server and steer it.

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
        """The name that clients give."""
        ...

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel
    ) -> Identity | Awaitable[Identity | None] | None:
        """Who this is, or None for anyone who has not proved it, whatever the cause.

        `params` are the fields of `session.open`, as the client sent them; `address` is the client's, and
        `channel` the connection.
        Raises InvalidArgument for fields that are missing or of the wrong type, before it looks at any
        secret. An unknown user and a wrong secret must take the same steps.
        """
        ...


@runtime_checkable
class NamesUser(Protocol):
    """An authenticator that knows whom a login is of from the connection, and not from its fields."""

    def user_named(self, channel: Channel) -> str:
        """The user for whom a failure is counted; empty if that is nobody."""
        ...


@runtime_checkable
class Attaches(Protocol):
    """An authenticator of sessions whose keys can be proved on further connections."""

    async def attaches(self, key: str, user: str, signature: bytes, token: bytes, channel: Channel) -> bool:
        """Whether the signature proves the key that a session of this user, with this token, is bound to.

        An unknown key and a wrong signature must take the same steps.
        """
        ...

    def is_gone(self, key: str) -> bool:
        """Whether a key of its kind is none any more, as of the last look."""
        ...
