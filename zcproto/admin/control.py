"""The control socket: a UNIX socket in the home folder through which the owner of a running server controls it.

    zcproto status -> HTTP over <home>/control.sock -> operations.py

Decides: who may connect. The owner of the socket file is the one server of this home folder.

Rules:
- The operating system reports the peer's user: the server's own user and root may connect. Where it does not, the
  modes of socket and folder decide.
- HTTP is that of the HTTPS side: the same parser, and limits against malformed and slow requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zcproto.admin.http_protocol import HttpEndpoint
from zcproto.common.home import Home
from zcproto.common.unix_socket import SocketFile, peer_process
from zcproto.errors import ConfigError
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import Peer, Router, SecurityHeaders
from zcproto.server.listener import AcceptLoop
from zcproto.server.state import ServerState, log

MAX_CONNECTIONS: Final = 32
BACKLOG: Final = 64
KEEP_INTERVAL: Final = 10.0
"""Seconds between two looks whether the socket was removed."""

LIMITS: Final = HttpLimits(
    max_body=262_144,  # a thousand session ids
    max_requests=100_000,  # status once a second for a day
    request_timeout=10.0,
    answer_timeout=600.0,  # making keys and running alert commands take time
    idle_timeout=60.0,
)
_NO_SOCKETS: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP})
"""A read-only folder, as in some containers, or a file system without sockets."""

_ROOT: Final = 0
_REFUSED: Final = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 46\r\nConnection: close\r\n\r\n"
    b"this socket is for the server's user, and root"
)


@dataclass(frozen=True, slots=True, eq=False)
class ControlPeer(Peer):
    """The calling process. `uid` and `pid` may be unknown."""

    uid: int | None = None
    pid: int | None = None


class ControlSocket(AcceptLoop):
    """The control socket of one server. `refused` counts connections of other users and those over the limit."""

    def __init__(self, home: Home, state: ServerState, router: Router, *, own_uid: int | None = None) -> None:
        super().__init__(asyncio.get_running_loop(), backlog=BACKLOG)
        self._file = SocketFile(home.control)
        self._own_uid = os.geteuid() if own_uid is None else own_uid
        self.endpoint = HttpEndpoint(state, router.find, SecurityHeaders(tls=False), LIMITS, _peer)
        self.refused = 0

    def open(self) -> bool:
        """Create the socket without accepting yet. Return False if the folder cannot hold one: a server can do
        without. Raises ConfigError if the operator can fix the problem.
        """
        listening = open_control(self._file)
        if listening is not None:
            self.listen_on([listening])
        return listening is not None

    async def keep(self) -> None:
        """Make the socket again if it is removed, until cancelled."""
        while True:
            await asyncio.sleep(KEEP_INTERVAL)
            if self._file.is_missing:
                listening = renewed_socket(self._file, BACKLOG)
                if listening is not None:
                    self.replace_sockets([listening])

    def close(self) -> None:
        """Stop accepting, close open connections and remove the socket."""
        super().close()
        self.endpoint.close()
        self._file.close()

    # --- connections ---------------------------------------------------------------------------------

    def _admit(self, connection: socket.socket, address: Any) -> None:
        peer = peer_of(connection)
        if peer.uid not in (None, self._own_uid, _ROOT):
            self.refused += 1
            log.warning("control.refused", uid=peer.uid, pid=peer.pid)
            with contextlib.suppress(OSError):  # the peer has gone
                connection.send(_REFUSED)
            connection.close()
        elif len(self.endpoint.connections) + len(self._adopting) >= MAX_CONNECTIONS:
            self.refused += 1
            connection.close()
        else:
            self._adopt(connection, self.endpoint.protocol())


def open_control(file: SocketFile) -> socket.socket | None:
    """Return the listening control socket; None, which is logged, if the folder cannot hold one.

    Raises ConfigError if the operator can fix the problem.
    """
    try:
        listening = file.open(BACKLOG)
    except OSError as error:
        if error.errno in _NO_SOCKETS:
            log.warning("control.unavailable", path=file.path, reason=error.strerror)
            return None
        raise ConfigError([f"{file.path}: cannot be created: {error.strerror or error}"]) from error
    if listening is None:
        raise _used_by_another(file.path)
    return listening


def renewed_socket(file: SocketFile, backlog: int) -> socket.socket | None:
    """Return a new listening socket, which is logged, if that of a running server was removed; else None."""
    if not file.is_missing:
        return None
    try:
        listening = file.renew(backlog)
    except (OSError, ConfigError) as error:
        log.error("server.socket_missing", path=file.path, reason=str(error))
        return None
    log.warning("server.socket_renewed", path=file.path)
    return listening


def require_unused(home: Home) -> None:
    """Raise ConfigError if a server runs with this home folder, before anything in it is changed."""
    with contextlib.suppress(OSError):  # reported by `open_control`, if it matters
        if SocketFile(home.control).is_locked:
            raise _used_by_another(home.control)


def _used_by_another(path: Path) -> ConfigError:
    return ConfigError(
        [
            f"{path.parent}: a server runs with this home folder; stop it, or give this one another home folder"
            " (--home or ZCPROTO_HOME) and another server.port"
        ]
    )


def _peer(transport: asyncio.BaseTransport) -> ControlPeer:
    return peer_of(transport.get_extra_info("socket"))


def peer_of(connection: socket.socket) -> ControlPeer:
    """Return the process that made a connection, which it cannot forge, if the system supports that."""
    process = peer_process(connection)
    if process is None:
        return ControlPeer("local")
    return ControlPeer(f"local uid {process.uid}", uid=process.uid, pid=process.pid)
