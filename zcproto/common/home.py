"""Locate and check the home folder, and name the files in it.

Rules: the folder is created with mode 0700. One that others can write to is refused: replacing config.toml or a
key file gives full control of the server.
"""

from __future__ import annotations

import os
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

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The default configuration file; optional."""
        return self.path / "config.toml"

    @property
    def certs(self) -> Path:
        """The default of `certificates.directory`."""
        return self.path / "certs"

    @property
    def users(self) -> Path:
        """Users, with digests of their keys."""
        return self.path / "users.toml"

    @property
    def devices(self) -> Path:
        """Devices, with their public keys."""
        return self.path / "devices.toml"

    @property
    def pairing(self) -> Path:
        """One-time pairing codes, as digests."""
        return self.path / "pairing.toml"

    @property
    def sessions(self) -> Path:
        """Sessions, with digests of their tokens."""
        return self.path / "sessions.db"

    @property
    def revocations(self) -> Path:
        """Revocations to replay when the session store is writable again."""
        return self.path / "revocations.pending"

    @property
    def control(self) -> Path:
        """The control socket of a running server."""
        return self.path / "control.sock"

    def ensure(self) -> None:
        """Create the folder if it is missing. Raises ConfigError if it cannot be used."""
        with file_errors(self.path, "used as the home folder"), suppress(FileExistsError):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.check()

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
