"""Make UNIX sockets for one user, connect to them, and look at who connects."""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from zcproto.common.clock import system_clock
from zcproto.common.files import UnusableFileError, is_locked, staging_path, try_lock
from zcproto.common.network import address_of

_RETRY_S: Final = 0.05

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid

_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2
_XUCRED: Final = struct.Struct("=IIh2x16I")
"""sys/un.h and sys/ucred.h of macOS: the version, the uid, the number of groups and the groups."""


def listen_unix(path: Path, backlog: int) -> socket.socket:
    """Return a socket that listens at a path, with mode 0600 from the beginning. It replaces a socket left there.

    Raises OSError, or UnusableFileError if something else is at the path.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UnusableFileError(path, "not a socket; move it away, the server needs this path for one")
    staged = staging_path(path)
    staged.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        with address_of(staged) as address:
            listening.bind(address)
        os.chmod(staged, 0o600)  # before it listens: no connection was possible so far
        listening.listen(backlog)
        staged.replace(path)
    except BaseException:
        listening.close()
        raise
    return listening


def connect_unix(path: Path, limit_s: float) -> socket.socket:
    """Return a socket that is connected to the one at a path, with a timeout of `limit_s` seconds.

    Tries again for that time while the backlog is full: a UNIX socket does not wait then. Raises OSError.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(limit_s)
    deadline = system_clock.now() + limit_s
    try:
        with address_of(path) as address:
            while True:
                try:
                    connected.connect(address)
                except BlockingIOError:
                    if system_clock.now() >= deadline:
                        raise
                    time.sleep(_RETRY_S)
                else:
                    return connected
    except BaseException:
        connected.close()
        raise


class SocketFile:
    """A listening socket at a path, which one process at a time owns: the one with the lock beside the path.

    Its children may serve on the socket, but give up the lock. Nothing is created until `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._inode = 0

    @property
    def is_locked(self) -> bool:
        """Whether any process owns the path."""
        return is_locked(self._lock_path)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def open(self, backlog: int) -> socket.socket | None:
        """Return the listening socket; None if another process owns the path.

        Raises OSError, or ConfigError if something else is at the path.
        """
        self._lock = try_lock(self._lock_path)
        if self._lock is None:
            return None
        try:
            return self.renew(backlog)
        except BaseException:
            self.leave()
            raise

    @property
    def is_missing(self) -> bool:
        """Whether this process owns the path, and its socket was removed or replaced."""
        try:
            return bool(self._inode) and self.path.lstat().st_ino != self._inode
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def renew(self, backlog: int) -> socket.socket:
        """Return a new listening socket at the path, whose lock this process holds. Raises as `open`."""
        listening = listen_unix(self.path, backlog)
        self._inode = self.path.lstat().st_ino
        return listening

    @property
    def lock(self) -> int | None:
        """The descriptor that holds the lock; None if this process does not own the path."""
        return self._lock

    def adopt(self, lock: int) -> None:
        """Share the lock of the process that owns the path, until it leaves: then `take_over`."""
        self._lock = lock

    def take_over(self) -> None:
        """Own the path from now on; without `adopt` nothing changes."""
        if self._lock is not None:
            with suppress(OSError):  # the socket was removed
                self._inode = self.path.lstat().st_ino

    def close(self) -> None:
        """Remove the socket and release the lock. Idempotent."""
        if self._inode:
            with suppress(OSError):  # the socket or the whole folder was removed before
                if self.path.lstat().st_ino == self._inode:
                    self.path.unlink()
        self.leave()

    def leave(self) -> None:
        """Close the descriptor of the lock, in a child that does not own the path."""
        self._inode = 0
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class PeerProcess(NamedTuple):
    """The process at the other end of a UNIX socket, when it connected."""

    pid: int
    uid: int


def peer_process(connection: socket.socket) -> PeerProcess | None:
    """Return the process that made a connection, which it cannot forge; None if the system does not report it."""
    if sys.platform == "darwin":
        _, uid, *_ = _XUCRED.unpack(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size))
        return PeerProcess(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID), uid)
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return PeerProcess(pid, uid)
