"""Write the key log of a client, to decrypt captured traffic (spec/wireshark).

It is written only to an explicitly configured file, never because of SSLKEYLOGFILE, and never by a server.
"""

from __future__ import annotations

import errno
import os
import ssl
import stat
from pathlib import Path

from zcproto.common.files import UnusableFileError, check_access
from zcproto.errors import ConfigError


def log_keys(context: ssl.SSLContext, path: Path) -> None:
    """Append the secrets of a context's connections to a file that only this user can access.

    The file is created here with mode 0600, because the ssl module would use the umask. Raises ConfigError if
    others can access the file or it cannot be written.
    """
    try:
        _make_private(path)
        context.keylog_filename = str(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise ConfigError([f"{path}: is a link; give the path of the key log itself"]) from error
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{path}: the key log cannot be written: {reason}; check the path"]) from error


def _make_private(path: Path) -> None:
    # O_NONBLOCK: opening a FIFO would wait for its reader.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError(path, "the key log is not a regular file; give another path")
    check_access(path, status)
