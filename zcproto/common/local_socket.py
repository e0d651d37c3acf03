"""UNIX sockets by the path of a file: paths that are too long for the system, and who is at the other end."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

MAX_ADDRESS: Final = 107 if sys.platform == "linux" else 103
"""Bytes of a UNIX socket's path (unix(7))."""

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_DESCRIPTORS: Final = Path("/proc/self/fd")


class LocalPeer(NamedTuple):
    """The process at the other end, as it was when it connected, and the user that it ran as."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> LocalPeer | None:
    """Who is at the other end; None where the system does not say. It cannot be forged."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return LocalPeer(pid, uid)


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """What to bind or to connect to for the socket at a path, while the body runs.

    A path that is too long is named by a descriptor of its folder, where the system can do that; else it is given
    as it is, and the system says what is wrong. Raises OSError if there is no folder.
    """
    if len(os.fsencode(path)) <= MAX_ADDRESS or not _DESCRIPTORS.is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)
