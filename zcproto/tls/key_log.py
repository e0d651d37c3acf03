"""The key log of a client, for programs that read its captured traffic: spec/wireshark.

It is written for whoever asks for it by name, never because of SSLKEYLOGFILE, and never by a server.
"""

from __future__ import annotations

import errno
import os
import shlex
import ssl
import stat
from pathlib import Path
from typing import Final

from zcproto.errors import ConfigError

_OTHERS: Final = 0o077


def log_keys(context: ssl.SSLContext, path: Path) -> None:
    """Have a context append the secrets of its connections to a file that is this user's alone.

    The ssl module would make the file with the rights that new files have, so it is made here first. Raises
    ConfigError for a file that others can reach, or that cannot be written.
    """
    try:
        _make_private(path)
        context.keylog_filename = str(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise ConfigError([f"{path}: is a link; name the key log itself"]) from error
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{path}: the key log cannot be written: {reason}; check the path"]) from error


def _make_private(path: Path) -> None:
    # Not blocking, as opening a FIFO would wait for its reader.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError([f"{path}: the key log is not a regular file; name another one"])
    if status.st_uid != os.geteuid():
        raise ConfigError(
            [f"{path}: this key log belongs to another user (uid {status.st_uid}); name another file"]
        )
    if status.st_mode & _OTHERS:
        raise ConfigError(
            [
                f"{path}: others can read or change this key log (mode {stat.S_IMODE(status.st_mode):04o});"
                f" run `chmod 600 {shlex.quote(str(path))}`, or remove it"
            ]
        )
