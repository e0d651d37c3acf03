"""The control socket: a UNIX socket in the home folder, by which whoever owns a running server controls it.

    zcproto status -> HTTP by <home>/control.sock -> control_resources.py

What this file decides: whose socket it is while several servers could want it, and who may come in.

Rules:
- The socket is of mode 0600, and made whole: it is bound beside its place, and renamed. One that a dead server has
  left is replaced. Whoever holds the lock beside it is the one server of this home folder.
- The system says who is at the other end: the server's own user, and root, may come in. On a system that does not
  say, the modes of socket and folder decide.
- HTTP is what the HTTPS side has too: the same limits, the same care for whoever sends garbage.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from dataclasses import dataclass
from typing import Any, Final

from zcproto.admin.http_protocol import HttpEndpoint, HttpProtocol
from zcproto.common.home import Home
from zcproto.common.local_socket import LocalPeer, address_of, peer_of
from zcproto.errors import ConfigError
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import Peer
from zcproto.http.router import Router
from zcproto.http.security_headers import SecurityHeaders
from zcproto.server.state import ServerState, log

MAX_CONNECTIONS: Final = 32
BACKLOG: Final = 64
LIMITS: Final = HttpLimits(
    max_body=262_144,  # a thousand ids of sessions
    max_requests=100_000,  # status, once a second, for a day
    request_timeout=10.0,
    answer_timeout=600.0,  # keys may have to be made, commands for alerts may take their time
    idle_timeout=60.0,
)
PAUSE_WHEN_EXHAUSTED: Final = 0.5
_TAKES_NONE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP})
"""A folder that is read-only, as in some containers, or a file system without sockets."""

_ROOT: Final = 0
_REFUSED: Final = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 46\r\nConnection: close\r\n\r\n"
    b"this socket is for the server's user, and root"
)
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, eq=False)
class ControlPeer(Peer):
    """Who asks. `uid` and `pid` are None where the system does not say."""

    uid: int | None = None
    pid: int | None = None


class ControlSocket:
    """One server's control socket. `refused` counts those who may not come in, or for whom there was no room."""

    def __init__(self, home: Home, state: ServerState, router: Router, *, own_uid: int | None = None) -> None:
        self._path = home.control
        self._lock_path = home.control.with_suffix(".lock")
        self._own_uid = os.geteuid() if own_uid is None else own_uid
        self._socket: socket.socket | None = None
        self._lock: int | None = None
        self._inode = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._adopting: dict[asyncio.Task[Any], list[HttpProtocol]] = {}
        self.endpoint = HttpEndpoint(state, router, SecurityHeaders(None), LIMITS, _peer)
        self.refused = 0

    # --- the file ------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Make the socket; nobody is let in yet. False where the folder takes none: a server can do without.

        Raises ConfigError for what can be mended.
        """
        try:
            self._take_lock()
            self._bind()
        except OSError as error:
            self.close()
            if error.errno in _TAKES_NONE:
                log.warning("control.unavailable", path=self._path, reason=error.strerror)
                return False
            raise ConfigError([f"{self._path}: cannot be made: {error.strerror or error}"]) from error
        except BaseException:
            self.close()
            raise
        return True

    def _take_lock(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self._lock_path, flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                [f"{self._path}: a server runs with this home folder; stop it, or name another one by --home"]
            ) from None

    def _bind(self) -> None:
        path = self._path
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(
                    [f"{path}: is no socket; move it away, as the control socket belongs there"]
                )
        beside = path.with_name(f".{path.name}.new")
        beside.unlink(missing_ok=True)
        self._socket = listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.setblocking(False)
        with address_of(beside) as address:
            listening.bind(address)
        os.chmod(beside, 0o600)  # nobody could connect so far: it does not listen
        listening.listen(BACKLOG)
        self._inode = beside.lstat().st_ino
        beside.replace(path)

    def close(self) -> None:
        """Let nobody in any more, close what is open, and take the socket away."""
        self._stop_accepting()
        self.endpoint.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError):  # somebody has taken it away already, or the whole folder
                if self._path.lstat().st_ino == self._inode:
                    self._path.unlink()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- who comes in --------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let in who may come, from now on."""
        self._loop = loop
        assert self._socket is not None, "it is open"
        loop.add_reader(self._socket.fileno(), self._accept)

    def _stop_accepting(self) -> None:
        if self._loop is not None and self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())

    def _go_on_accepting(self) -> None:
        if self._socket is not None and self._loop is not None:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._socket is not None
        assert self._loop is not None
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.error("listener.exhausted", reason=error.strerror, retry_after_s=PAUSE_WHEN_EXHAUSTED)
            self._stop_accepting()
            self._loop.call_later(PAUSE_WHEN_EXHAUSTED, self._go_on_accepting)
            return
        connection.setblocking(False)
        peer = peer_of(connection)
        if not self._may_come_in(peer):
            assert peer is not None
            self.refused += 1
            log.warning("control.refused", uid=peer.uid, pid=peer.pid)
            with contextlib.suppress(OSError):  # it did not stay to hear it
                connection.send(_REFUSED)
            connection.close()
        elif self._count() >= MAX_CONNECTIONS:
            self.refused += 1
            connection.close()
        else:
            self._adopt(connection)

    def _may_come_in(self, peer: LocalPeer | None) -> bool:
        return peer is None or peer.uid in (self._own_uid, _ROOT)

    def _count(self) -> int:
        """Connections, those included that the loop does not have yet."""
        there = self.endpoint.connections
        return len(there) + sum(there.isdisjoint(made) for made in self._adopting.values())

    def _adopt(self, connection: socket.socket) -> None:
        assert self._loop is not None
        made: list[HttpProtocol] = []

        def protocol() -> HttpProtocol:
            made.append(self.endpoint.protocol())
            return made[0]

        adopting = self._loop.create_task(
            self._loop.connect_accepted_socket(protocol, connection), name="zcproto-control"
        )
        self._adopting[adopting] = made

        def adopted(task: asyncio.Task[Any]) -> None:
            del self._adopting[task]
            if task.cancelled() or task.exception() is not None:  # it went away before it was ours
                connection.close()

        adopting.add_done_callback(adopted)


def _peer(transport: asyncio.BaseTransport) -> ControlPeer:
    found = peer_of(transport.get_extra_info("socket"))
    if found is None:
        return ControlPeer("local")
    return ControlPeer(f"local uid {found.uid}", uid=found.uid, pid=found.pid)
