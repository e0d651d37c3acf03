"""A private text file in the home folder, read and written by several processes.

Rules: zcproto/common/files.py; writers hold a lock. Every fault is a ConfigError that names the file.

Must not know: what the text means.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tomli

from zcproto.common.files import file_errors, locked, read_file, replace_file
from zcproto.common.text import escape_text
from zcproto.common.watcher import NO_FILE, Identity, file_identity, identity_of
from zcproto.errors import ConfigError

LOCK_WAIT_S: Final = 10.0
"""Time another process needs to add a million users."""

_SHOWN: Final = 120

NOT_READ: Final[Identity] = (-2,)


class PrivateText:
    """A private text file. Creating this object touches nothing. `what` describes the file: "file of users"."""

    __slots__ = ("_lock_wait_s", "_max_bytes", "_path", "_what", "path")

    def __init__(
        self,
        path: str | os.PathLike[str],
        what: str,
        *,
        max_bytes: int,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.path = Path(path)
        self._path = str(self.path)  # every login looks at a file: convert its path once
        self._what = what
        self._max_bytes = max_bytes
        self._lock_wait_s = lock_wait_s

    def look(self) -> Identity:
        """Return the state of the file: one stat, no exception."""
        return file_identity(self._path)

    def read(self) -> tuple[Identity, str]:
        """Return the state of the file and its text; NO_FILE and no text if it is missing."""
        with file_errors(self.path, "read"):
            try:
                data, status = read_file(self.path, self._max_bytes)
            except FileNotFoundError:
                return NO_FILE, ""
        try:
            return identity_of(status), data.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"is not UTF-8 at byte {error.start}") from None

    def document(self, text: str) -> dict[str, Any]:
        """Parse the text as TOML."""
        try:
            return tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise self.fault(escape_text(str(error), _SHOWN)) from None
        except RecursionError:
            raise self.fault(f"is nested too deeply for a {self._what}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the writers. A missing folder is created."""
        with file_errors(self.path, "written"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self.path.with_name(f".{self.path.name}.lock"), self._lock_wait_s):
                yield

    def replace(self, text: str) -> None:
        """Replace the file in one step. The caller holds the lock."""
        data = text.encode()
        if len(data) > self._max_bytes:
            raise self.fault(f"would be larger than {self._max_bytes} bytes")
        replace_file(self.path, data)

    def fault(self, *faults: str) -> ConfigError:
        """Return an error that lists faults of this file, each with its path."""
        path = escape_text(str(self.path))
        return ConfigError([f"{path}: {fault}" for fault in faults])
