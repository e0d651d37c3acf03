"""Define the interface of authenticators: from a login's fields to a user."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from zcproto.common.roles import NO_ROLES, roles_from
from zcproto.sessions.session import DEVICE_KEY
from zcproto.wire.message import METHOD_ALPHABET

MAX_USER: Final = 128
"""Longest name of a user, in characters."""

MAX_SCHEME: Final = 64
"""Longest name of a scheme, in characters."""


class Channel(NamedTuple):
    """The connection of a login: what a proof is tied to."""

    certificate: Callable[[], bytes | None] = lambda: None
    """Returns the client's certificate in this connection (DER, verified by TLS), or None."""
    salt: bytes = b""
    """Unique to the connection."""
    leaves: Callable[[], frozenset[bytes]] = frozenset
    """Returns the SHA-256 of each server certificate (DER) that this client may have been shown."""
    context: Any = None
    """The context of `session.open`, for authenticators of the application."""


NO_CHANNEL: Final = Channel()
"""A connection that no proof can be tied to."""


class Identity(NamedTuple):
    """An authenticated user.

    `roles` are those of the session; with the role "operator" it may inspect and control the server. `key` is what
    the session is bound to, empty for none: `device:NAME`, or `tls:` and the hex SHA-256 of the public key in a
    client's certificate. The session ends at `ends_at` at the latest, in milliseconds since the Unix epoch; None is
    as configured.
    """

    user: str
    roles: Set[str] = NO_ROLES
    key: str = ""
    ends_at: int | None = None


class Authenticator(Protocol):
    """One scheme of `session.open`.

    Failed logins are counted for the user whom the fields name by `user`. If others do, add a method
    `user_named(params, channel) -> str` that returns the name, empty to count for the address alone.
    """

    @property
    def scheme(self) -> str:
        """The name that clients send: 1 to 64 characters of a-z 0-9 _ ."""

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel
    ) -> Identity | Awaitable[Identity | None] | None:
        """Return the user, or None for a failed login, whatever the cause.

        `params` are the fields of `session.open` as received; `address` is the client's, `channel` the connection.
        Raises InvalidArgument for missing or mistyped fields, before it uses a secret; Unavailable or
        ResourceExhausted if it cannot decide now. Any other CallError is a failed login: its message is logged,
        and the client gets the answer of all failed logins. An unknown user and a wrong secret must take the same
        steps.
        """


def user_in(params: Mapping[str, Any], channel: Channel = NO_CHANNEL) -> str:
    """Return the name in the fields of a login for which failures are counted, or an empty text."""
    user = params.get("user")
    if isinstance(user, str):
        return user[:MAX_USER]
    device = params.get("device")
    if isinstance(device, str):
        return DEVICE_KEY + device[:MAX_USER]
    return ""


class BuiltInSchemes(Enum):
    """In a list of authenticators: the API keys, devices and client certificates of the server's home folder, and
    the tokens of the configured identity providers."""

    BUILT_IN = "api_key, ed25519, tls and jwt"


BUILT_IN_SCHEMES: Final = BuiltInSchemes.BUILT_IN

Authenticators = Sequence[Authenticator | BuiltInSchemes]


def check_scheme(scheme: str) -> None:
    """Raise ValueError for a name that a scheme cannot have."""
    if not 1 <= len(scheme) <= MAX_SCHEME or not METHOD_ALPHABET.issuperset(scheme):
        raise ValueError(f"scheme {scheme!r} must be 1 to {MAX_SCHEME} characters of a-z 0-9 _ .")


def check_identity(identity: object, scheme: str) -> Identity | None:
    """Return the answer of an application's authenticator. A bug there must not let anyone in.

    Raises TypeError or ValueError for anything but an Identity with the name of a user and roles, or None.
    """
    if identity is None:
        return None
    if not isinstance(identity, Identity) or not _has_types(*identity):
        raise TypeError(
            f"the authenticator of the scheme {scheme!r} must return None, or an Identity of a str and a set of"
            f" roles, not {type(identity).__name__}"
        )
    if not 0 < len(identity.user) <= MAX_USER or not identity.user.isprintable():
        raise ValueError(
            f"the authenticator of the scheme {scheme!r} must return a user's name of 1 to {MAX_USER} printable"
            f" characters, not {len(identity.user)}"
        )
    return identity._replace(roles=roles_from(identity.roles)) if identity.roles else identity


def _has_types(user: object, roles: object, key: object, ends_at: object) -> bool:
    return (
        isinstance(user, str)
        and isinstance(roles, Set)
        and isinstance(key, str)
        and (ends_at is None or type(ends_at) is int)
    )
