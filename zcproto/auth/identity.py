"""What an authenticator is: it takes a login's fields and says who that is."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Final, NamedTuple, Protocol

MAX_USER: Final = 128
"""Longest name of a user, in characters."""


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
        self, params: Mapping[str, Any], address: str
    ) -> Identity | Awaitable[Identity | None] | None:
        """Who this is, or None for anyone who has not proved it, whatever the cause.

        `params` are the fields of `session.open`, as the client sent them; `address` is the client's.
        Raises InvalidArgument for fields that are missing or of the wrong type, before it looks at any
        secret. An unknown user and a wrong secret must take the same steps.
        """
        ...
