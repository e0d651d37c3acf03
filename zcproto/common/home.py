"""The home folder: where it is, what stands where in it, and who may write to it.

Rules: the folder is made with mode 0700. One that others may write to is refused: whoever can replace
config.toml or a key file owns the server.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

VARIABLE = "ZCPROTO_HOME"
DEFAULT = "~/.zeroclaw"
MAX_PATH = 4096
"""PATH_MAX of Linux."""


class Home:
    """The home folder. Making one touches nothing; `ensure` does."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """Read if present and no other configuration is named."""
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
        """One-time codes for devices to come, as digests."""
        return self.path / "pairing.toml"

    @property
    def sessions(self) -> Path:
        """Sessions, digests only."""
        return self.path / "sessions.db"

    @property
    def revocations(self) -> Path:
        """Revocations that wait until the store of sessions can be written to."""
        return self.path / "revocations.pending"

    @property
    def control(self) -> Path:
        """The socket by which a running server is controlled."""
        return self.path / "control.sock"

    def ensure(self) -> None:
        """Makes the folder if it is not there. Raises ConfigError if it cannot be used."""
        shown = escape_text(str(self.path))
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError([f"{shown}: is no folder; name another one by --home"]) from None
        except OSError as error:
            raise ConfigError([f"{shown}: cannot be the home folder: {error.strerror}"]) from error
        self.check()

    def check(self) -> None:
        """Raises ConfigError if the folder, which must be there, cannot be used."""
        shown = escape_text(str(self.path))
        try:
            status = self.path.stat()
        except OSError as error:
            raise ConfigError([f"{shown}: cannot be the home folder: {error.strerror}"]) from error
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError([f"{shown}: is no folder; name another one by --home"])
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError([f"{shown}: belongs to another user (uid {status.st_uid}); run as that user"])
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError([f"{shown}: others may write to this folder; run: chmod go-w '{shown}'"])


def resolve_home(option: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Home:
    """The home folder of --home, else of ZCPROTO_HOME, else ~/.zeroclaw. Relative to the current folder.

    Raises ConfigError for a path that no folder can have.
    """
    named = os.fspath(option) if option is not None else environ.get(VARIABLE)
    path = Path(named or DEFAULT)
    try:
        path = path.expanduser()
    except RuntimeError:  # no such user, or a user without a home, as in some containers
        raise ConfigError(
            [f"{escape_text(str(path))}: whose home folder is this? Name a folder by --home"]
        ) from None
    # Absolute, so that it stays the same folder wherever the program goes.
    path = path.absolute()
    if len(str(path)) > MAX_PATH or not str(path).isprintable():
        raise ConfigError([f"{escape_text(str(path), 60)}: is no path; name another one by --home"])
    return Home(path)
