"""The protocol between a service manager such as systemd and a service: sd_notify(3), sd_listen_fds(3).

    NOTIFY_SOCKET                  a datagram socket for READY=1, WATCHDOG=1, STATUS=... (lines of NAME=VALUE)
    WATCHDOG_USEC, WATCHDOG_PID    how often WATCHDOG=1 is expected
    LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES    sockets that are already open, from descriptor 3 on

Decides: what is reported, and when.

Rules:
- The variables are removed from the environment, so that child processes do not act on them.
- The event loop itself feeds the watchdog. If the loop hangs, systemd aborts the process with SIGABRT, and Python
  writes the stack of every thread to stderr.
- Notifying never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from zcproto.common.clock import Clock, system_clock
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.server.state import log

FIRST_DESCRIPTOR: Final = 3
MAX_SOCKETS: Final = 64
_MAX_ADDRESS: Final = 107
"""Bytes of a UNIX socket's path on Linux (unix(7))."""

_VARIABLES: Final = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)
USEC: Final = 1_000_000
"""Microseconds in a second, the unit of all times here."""

STATUS_INTERVAL: Final = 10.0
"""Seconds between two updates of STATUS, unless a watchdog needs more."""

MIN_INTERVAL: Final = 0.02
"""Seconds: a watchdog of microseconds cannot be fed and must not occupy the loop."""

STOP_MARGIN: Final = 10.0
"""Seconds that a process needs to end, in addition to its drain."""


UNIT_FOLDERS: Final = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system")

PassedSocket = tuple[str, socket.socket]
"""The FileDescriptorName= of a listening TCP socket that was open before this process began, and the socket."""


class ServiceManager:
    """The service manager of this process. Without one, every method does nothing.

    `watchdog` is the seconds within which WATCHDOG=1 is expected, None without a watchdog. `sockets` are the passed
    sockets.
    """

    def __init__(
        self,
        notify_address: str = "",
        watchdog: float | None = None,
        sockets: tuple[PassedSocket, ...] = (),
        clock: Clock = system_clock,
    ) -> None:
        self.watchdog = watchdog
        self.sockets = sockets
        self._clock = clock
        self._notify_address = notify_address
        self._address = "\0" + notify_address[1:] if notify_address.startswith("@") else notify_address
        self._socket: socket.socket | None = None
        if notify_address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        self.interval = STATUS_INTERVAL
        if watchdog is not None:
            self.interval = max(MIN_INTERVAL, min(STATUS_INTERVAL, watchdog / 2))
        self._next: asyncio.TimerHandle | None = None
        self._status: Callable[[], str] = lambda: ""
        self._reported = ""
        self._is_ready = self._is_stopping = False

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str], pid: int) -> Self:
        """Remove the variables from the environment and apply those addressed to the process `pid`.

        Raises ConfigError for malformed values and for sockets that cannot be served on.
        """
        found = {name: environ.pop(name) for name in _VARIABLES if name in environ}
        address = found.get("NOTIFY_SOCKET", "")
        if address and (address[0] not in "/@" or len(os.fsencode(address)) > _MAX_ADDRESS):
            raise _fault("NOTIFY_SOCKET", address, "must be the path of a UNIX socket")
        watchdog = None
        if found.get("WATCHDOG_PID", str(pid)) == str(pid) and "WATCHDOG_USEC" in found:
            watchdog = _number(found, "WATCHDOG_USEC", 1, 2**63) / USEC
        sockets: tuple[PassedSocket, ...] = ()
        if found.get("LISTEN_PID") == str(pid) and "LISTEN_FDS" in found:
            sockets = _passed_sockets(found)
        return cls(address, watchdog if address else None, sockets)

    def environment(self) -> dict[str, str]:
        """Return the variables for a process that will be the main one."""
        if self._socket is None:
            return {}
        found = {"NOTIFY_SOCKET": self._notify_address}
        if self.watchdog is not None:
            found["WATCHDOG_USEC"] = str(int(self.watchdog * USEC))
        return found

    def notify(self, **values: str | int) -> bool:
        """Send one message: `notify(READY=1, STATUS="serving")`. Return False if it was not sent."""
        if self._socket is None:
            return False
        text = "\n".join(f"{name}={escape_text(str(value))}" for name, value in values.items())
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:  # the receiver is gone or too slow; the service continues
            return False
        return True

    # --- reports of a server -------------------------------------------------------------------------

    def ready(self, loop: asyncio.AbstractEventLoop, status: Callable[[], str]) -> None:
        """Report that the server listens, and feed the watchdog from now on. `status` describes the load."""
        self.begin(status)
        if self._is_ready:
            self._next = loop.call_later(self.interval, self._tick_again, loop)

    def begin(self, status: Callable[[], str]) -> None:
        """Report that the server listens; the caller calls `tick` every `interval` seconds from now on."""
        if self._socket is None:
            return
        if self.watchdog is not None and not faulthandler.is_enabled() and sys.stderr is not None:
            faulthandler.enable()
        self._status, self._reported = status, status()
        if not self.notify(READY=1, MAINPID=os.getpid(), STATUS=self._reported):
            log.warning("service_manager.unreachable", cure="unset NOTIFY_SOCKET, or start it by systemd")
        self._is_ready = True

    def _tick_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._next = loop.call_later(self.interval, self._tick_again, loop)
        self.tick()

    def tick(self) -> None:
        """Feed the watchdog, and report the load if it has changed."""
        values: dict[str, str | int] = {}
        if self.watchdog is not None:
            values["WATCHDOG"] = 1
        status = self._status()
        if status != self._reported:
            values["STATUS"] = status
        if values and self.notify(**values):
            self._reported = status

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Report a reload while the body runs, and readiness after it, whatever its outcome.

        Reports nothing before `ready` and during a drain.
        """
        self.reload_begins()
        try:
            yield
        finally:
            self.reload_ends()

    def reload_begins(self) -> None:
        if not self._is_ready or self._is_stopping:
            return
        # Type=notify-reload compares this time with that of its signal (systemd.service(5)).
        self.notify(RELOADING=1, MONOTONIC_USEC=int(self._clock.now() * USEC))

    def reload_ends(self) -> None:
        if self._is_ready and not self._is_stopping:
            self._reported = self._status()
            self.notify(READY=1, STATUS=self._reported)

    def stopping(self, drain_timeout: float) -> None:
        """Report a drain of at most `drain_timeout` seconds. The watchdog is still fed."""
        self._is_stopping = True
        self.notify(
            STOPPING=1, STATUS="draining", EXTEND_TIMEOUT_USEC=int((drain_timeout + STOP_MARGIN) * USEC)
        )
        self._status = lambda: "draining"
        self._reported = "draining"

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def has_socket_unit(port: int, folders: Iterable[str] = UNIT_FOLDERS) -> bool:
    """Return whether systemd holds this port for a service: one of its socket units names it."""
    names = re.compile(rf"^\s*ListenStream\s*=\s*(\S*:)?{port}\s*$", re.MULTILINE)
    for folder in map(Path, folders):
        for path in (*folder.glob("*.socket"), *folder.glob("*.socket.d/*.conf")):
            with contextlib.suppress(OSError):
                if names.search(path.read_text("utf-8", "replace")):
                    return True
    return False


def _passed_sockets(found: Mapping[str, str]) -> tuple[PassedSocket, ...]:
    count = _number(found, "LISTEN_FDS", 0, MAX_SOCKETS)
    names = found.get("LISTEN_FDNAMES", "").split(":") if found.get("LISTEN_FDNAMES") else []
    names += [""] * (count - len(names))
    return tuple((names[index], _listening_socket(FIRST_DESCRIPTOR + index)) for index in range(count))


def _listening_socket(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
    except OSError as error:
        raise _fault("LISTEN_FDS", str(descriptor), f"is not a socket: {error.strerror}") from error
    if (
        passed.family not in (socket.AF_INET, socket.AF_INET6)
        or passed.type != socket.SOCK_STREAM
        or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        passed.detach()  # leave it open for its owner
        raise _fault(
            "LISTEN_FDS", str(descriptor), "is not a listening TCP socket; use ListenStream=, Accept=no"
        )
    return passed


def _number(found: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = found.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise _fault(name, text, f"must be a number from {least} to {most}")
    return int(text)


def _fault(name: str, value: str, sentence: str) -> ConfigError:
    return ConfigError([f"{name} = {escape_text(value, 60)!r} (environment): {sentence}"])
