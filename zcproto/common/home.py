"""Locate and check the home folder, and name the files in it.

Rules: the folder is created with mode 0700. One that others can write to is refused: replacing config.toml or a
key file gives full control of the server.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from zcproto.common.files import check_folder, file_errors
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

VARIABLE = "ZCPROTO_HOME"
DEFAULT = "~/.zeroclaw"
MAX_PATH = 4096
"""PATH_MAX of Linux."""


class Home:
    """The home folder. Creating this object touches nothing; `ensure` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        """The default configuration file; optional."""
        self.certs = path / "certs"
        """The default of `certificates.directory`."""
        self.users = path / "users.toml"
        """Users, with digests of their keys."""
        self.devices = path / "devices.toml"
        """Devices, with their public keys."""
        self.tokens = path / "tokens.toml"
        """Machine tokens, as digests."""
        self.pairing = path / "pairing.toml"
        """One-time pairing codes, as digests."""
        self.sessions = path / "sessions.db"
        """Sessions, with digests of their tokens."""
        self.revocations = path / "revocations.pending"
        """Revocations to replay when the session store is writable again."""
        self.store_key = path / "store.key"
        """The keys that seal what servers send each other through their store."""
        self.control = path / "control.sock"
        """The control socket of a running server."""

        self.workers = path / "workers.sock"
        """The socket of a running server for its workers."""

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def ensure(self) -> None:
        """Create the folder if it is missing. Raises ConfigError if it cannot be used."""
        with file_errors(self.path, "used as the home folder"), suppress(FileExistsError):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.check()

    def require(self) -> None:
        """Raise ConfigError if the folder does not exist."""
        with file_errors(self.path, "used as the home folder", fix="run this as the user of the server"):
            try:
                status = self.path.stat()  # Path.exists() is False in Python 3.14 if access is denied
            except (FileNotFoundError, NotADirectoryError):
                raise ConfigError(
                    [
                        f"{self.path}: this home folder does not exist; name another one with --home or"
                        f" {VARIABLE}, or start a server, which creates it"
                    ]
                ) from None
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError(
                [f"{self.path}: is not a folder; name the home folder with --home or {VARIABLE}"]
            )

    def check(self) -> None:
        """Raise ConfigError if the folder is missing or cannot be used."""
        with file_errors(self.path, "used as the home folder"):
            check_folder(self.path)


def resolve_home(option: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Home:
    """Return the home folder of --home, else ZCPROTO_HOME, else ~/.zeroclaw, relative to the current folder.

    Raises ConfigError for a path that a folder cannot have.
    """
    named = os.fspath(option) if option is not None else environ.get(VARIABLE)
    path = Path(named or DEFAULT)
    try:
        path = path.expanduser()
    except RuntimeError:  # no such user, or a user without a home, as in some containers
        raise ConfigError(
            [f"{escape_text(str(path))}: the user has no home folder; use --home to name a folder"]
        ) from None
    path = path.absolute()  # the program may change its current folder
    if len(str(path)) > MAX_PATH or not str(path).isprintable():
        raise ConfigError([f"{escape_text(str(path), 60)}: is not a valid path; use --home to name another"])
    return Home(path)
