"""The users of a file that may change while a server runs.

It must not know: what users prove who they are by.
"""

from __future__ import annotations

from collections.abc import Callable

from zcproto.auth.current_file import CurrentFile
from zcproto.auth.users import User, UserFile
from zcproto.errors import ConfigError


class CurrentUsers(CurrentFile):
    """Users as they are in their file now: it is looked at whenever a user is sought."""

    __slots__ = ("_file",)

    def __init__(
        self,
        file: UserFile,
        *,
        on_fault: Callable[[ConfigError], None],
        on_recovered: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(file, on_fault=on_fault, on_recovered=on_recovered)
        self._file = file

    async def find(self, name: str) -> User | None:
        await self.refresh()
        return self._file.find(name)

    def known(self, name: str) -> User | None:
        """A user as of the last look at the file."""
        return self._file.find(name)
