"""`server.users`: the users of a running server, as the program that runs it changes them.

    key = await server.users.add("ada")
    print(key.reveal())

Decides: what a change does to the file of users and to the sessions.

Rules: a change is in the file, and applies to the next login, when its method returns; sessions that it ends have
ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final, NamedTuple

from zcproto.admin.parts import Parts
from zcproto.auth import User, UserFile
from zcproto.auth.directory import Directory
from zcproto.common.roles import roles_from
from zcproto.common.secret import SecretText
from zcproto.errors import FailedPrecondition

NO_FILES: Final = (
    "the program of this server has its own authenticators: manage users and devices there,"
    " or add BUILT_IN_SCHEMES to them"
)


class UserEntry(NamedTuple):
    """One user."""

    name: str
    roles: frozenset[str]
    """With the role "operator" the user may administer the server."""
    has_key: bool
    """Whether the user has an API key. Devices and client certificates need none."""
    disabled: bool
    """Whether the user may not open sessions."""


class ServerUsers:
    """The users of a running server.

    Every method raises FailedPrecondition if the server has authenticators of its own, and ConfigError if the file
    of users cannot be read or changed.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def list(self) -> list[UserEntry]:
        """Return all users, in the order of their file."""
        directory = self.directory
        await directory.refresh()
        return [
            UserEntry(name, user.roles, user.has_key, user.disabled)
            for name, user in directory.file.entries.items()
        ]

    async def add(self, name: str, *, roles: Collection[str] = ()) -> SecretText:
        """Add a user, and return the API key. It is not shown again: the file holds a digest.

        Raises ConfigError for a name that exists or is malformed, ValueError for a malformed role.
        """
        key: SecretText
        key, _ = await self.change(UserFile.add, name, roles_from(roles))
        return key

    async def add_without_key(self, name: str, *, roles: Collection[str] = ()) -> None:
        """Add a user who opens sessions by devices and client certificates only. Raises like `add`."""
        await self.change(UserFile.add_digest, name, None, roles_from(roles))

    async def set_roles(self, name: str, roles: Collection[str]) -> int:
        """Replace the roles of a user, and end the sessions opened with the old ones. Return how many have ended.

        Raises NotFound for an unknown name, ValueError for a malformed role.
        """
        return (await self.change(UserFile.set_roles, name, roles_from(roles)))[1]

    async def new_key(self, name: str) -> SecretText:
        """Replace the key of a user, end the sessions opened with the old one, and return the new key.

        Raises NotFound for an unknown name, like the methods below.
        """
        key: SecretText
        key, _ = await self.change(UserFile.new_key, name)
        return key

    async def disable(self, name: str) -> int:
        """Refuse new sessions of a user, and end the open ones. Return how many have ended."""
        return (await self.change(UserFile.disable, name))[1]

    async def enable(self, name: str) -> None:
        """Allow a disabled user to open sessions again."""
        await self.change(UserFile.enable, name)

    async def remove(self, name: str) -> int:
        """Remove a user, and end the open sessions. Return how many have ended."""
        return (await self.change(UserFile.remove, name))[1]

    async def change(self, change: Callable[..., Any], name: str, *args: Any) -> tuple[Any, int]:
        """Change the file by one of its methods. Return the result, and how many sessions have ended."""
        file = UserFile(self._parts.home.users)
        return await self.directory.change(partial(change, file, name, *args), name)

    @property
    def directory(self) -> Directory[User]:
        """The users as of the last reading of their file."""
        if self._parts.users is None:
            raise FailedPrecondition(NO_FILES)
        return self._parts.users
