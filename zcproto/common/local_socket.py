"""Use UNIX sockets at paths of any length, and identify the process at the other end."""

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
    """The process at the other end and its user, at the time of the connection."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> LocalPeer | None:
    """Return the process at the other end, which cannot forge it, or None if the system does not support that."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return LocalPeer(pid, uid)


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """Yield the address to bind or connect to for the socket at a path. It is valid inside the body.

    A path that is too long is replaced by one through a descriptor of its folder, where the system has /proc.
    Otherwise the system reports the error. Raises OSError if the folder is missing.
    """
    if len(os.fsencode(path)) <= MAX_ADDRESS or not _DESCRIPTORS.is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)
