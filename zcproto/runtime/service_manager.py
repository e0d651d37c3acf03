"""What a service manager such as systemd tells a service, and is told by it: sd_notify(3), sd_listen_fds(3).

    NOTIFY_SOCKET                  a datagram socket for READY=1, WATCHDOG=1, STATUS=... (lines of NAME=VALUE)
    WATCHDOG_USEC, WATCHDOG_PID    how often WATCHDOG=1 is expected
    LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES    sockets that are open already, from descriptor 3 on

Both are a datagram and a few variables, which takes no library. The variables are taken out of the environment, so
that no child of this process believes that it is meant.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Final, NamedTuple, Self

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

FIRST_DESCRIPTOR: Final = 3
MAX_SOCKETS: Final = 64
_MAX_ADDRESS: Final = 107
"""Bytes of a UNIX socket's path on Linux (unix(7))."""

_VARIABLES: Final = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)
USEC: Final = 1_000_000
"""Microseconds in a second: the unit of all times here."""


class PassedSocket(NamedTuple):
    """A listening TCP socket that was open before this process began. `name` is that of FileDescriptorName=."""

    name: str
    socket: socket.socket


class ServiceManager:
    """The service manager of this process, if there is one.

    `watchdog` is the seconds within which WATCHDOG=1 is expected again, None if it is not. `sockets` are those
    passed, `failed` counts messages that could not be sent.
    """

    def __init__(
        self, notify_address: str = "", watchdog: float | None = None, sockets: tuple[PassedSocket, ...] = ()
    ) -> None:
        self.watchdog = watchdog
        self.sockets = sockets
        self.failed = 0
        self._address = "\0" + notify_address[1:] if notify_address.startswith("@") else notify_address
        self._socket: socket.socket | None = None
        if notify_address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str], pid: int) -> Self:
        """Take what is meant for the process `pid` out of the environment.

        Raises ConfigError for what no service manager says, and for sockets that cannot be served on.
        """
        told = {name: environ.pop(name) for name in _VARIABLES if name in environ}
        address = told.get("NOTIFY_SOCKET", "")
        if address and (address[0] not in "/@" or len(os.fsencode(address)) > _MAX_ADDRESS):
            raise _fault("NOTIFY_SOCKET", address, "must be the path of a UNIX socket")
        watchdog = None
        if told.get("WATCHDOG_PID", str(pid)) == str(pid) and "WATCHDOG_USEC" in told:
            watchdog = _number(told, "WATCHDOG_USEC", 1, 2**63) / USEC
        sockets: tuple[PassedSocket, ...] = ()
        if told.get("LISTEN_PID") == str(pid) and "LISTEN_FDS" in told:
            sockets = _passed_sockets(told)
        return cls(address, watchdog if address else None, sockets)

    @property
    def is_told(self) -> bool:
        """Whether anybody listens to `notify`."""
        return self._socket is not None

    def notify(self, **values: str | int) -> bool:
        """Send one message: `notify(READY=1, STATUS="serving")`. Never waits; False if it was not sent."""
        if self._socket is None:
            return False
        text = "\n".join(f"{name}={escape_text(str(value))}" for name, value in values.items())
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:  # nobody reads any more, or not fast enough: the service goes on
            self.failed += 1
            return False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _passed_sockets(told: Mapping[str, str]) -> tuple[PassedSocket, ...]:
    count = _number(told, "LISTEN_FDS", 0, MAX_SOCKETS)
    names = told.get("LISTEN_FDNAMES", "").split(":") if told.get("LISTEN_FDNAMES") else []
    names += [""] * (count - len(names))
    return tuple(
        PassedSocket(names[index], _listening_socket(FIRST_DESCRIPTOR + index)) for index in range(count)
    )


def _listening_socket(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
    except OSError as error:
        raise _fault("LISTEN_FDS", str(descriptor), f"is no socket: {error.strerror}") from error
    if (
        passed.family not in (socket.AF_INET, socket.AF_INET6)
        or passed.type != socket.SOCK_STREAM
        or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        passed.detach()  # it is not ours to close
        raise _fault(
            "LISTEN_FDS", str(descriptor), "is no listening TCP socket; use ListenStream=, Accept=no"
        )
    return passed


def _number(told: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = told.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise _fault(name, text, f"must be a number from {least} to {most}")
    return int(text)


def _fault(name: str, value: str, sentence: str) -> ConfigError:
    return ConfigError([f"{name} = {escape_text(value, 60)!r} (environment): {sentence}"])
