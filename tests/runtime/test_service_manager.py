"""Tests of the service manager protocol with a real datagram socket and real descriptors."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from zcproto.errors import ConfigError
from zcproto.runtime.service_manager import MAX_SOCKETS, ServiceManager

PID = 4711


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(TIMEOUT)
        yield listener


def test_without_service_manager_nothing_is_sent() -> None:
    environ = {"PATH": "/bin"}
    manager = ServiceManager.from_environ(environ, PID)
    assert (manager.watchdog, manager.sockets) == (None, ())
    assert not manager.notify(READY=1)
    manager.close()
    assert environ == {"PATH": "/bin"}


def test_message_is_one_datagram_of_lines(listener: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": listener.getsockname(), "WATCHDOG_USEC": "30000000", "PATH": "/bin"}
    manager = ServiceManager.from_environ(environ, PID)
    assert environ == {"PATH": "/bin"}, "children are not meant"
    assert manager.watchdog == 30.0
    assert manager.notify(READY=1, STATUS="serving")
    assert listener.recv(4096) == b"READY=1\nSTATUS=serving"
    manager.notify(STATUS="a\nSTOPPING=1")
    assert listener.recv(4096) == b"STATUS=a\\nSTOPPING=1", "a value ends with its line"
    manager.close()
    manager.close()
    assert not manager.notify(READY=1)


def test_abstract_socket_address_is_used() -> None:
    name = f"zcproto-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(TIMEOUT)
        manager = ServiceManager.from_environ({"NOTIFY_SOCKET": f"@{name}"}, PID)
        assert manager.notify(READY=1)
        assert listener.recv(4096) == b"READY=1"
        manager.close()


def test_unread_messages_block_nothing(listener: socket.socket) -> None:
    manager = ServiceManager(listener.getsockname())
    sent = 0
    while manager.notify(WATCHDOG=1):  # until its queue is full
        sent += 1
        assert sent < 100_000
    assert sent > 0
    listener.close()
    assert not manager.notify(WATCHDOG=1)
    manager.close()


@pytest.mark.parametrize("address", ["relative", "vsock:2:1", "/" + "a" * 107])
def test_malformed_notify_socket_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"NOTIFY_SOCKET = .* must be the path of a UNIX socket"):
        ServiceManager.from_environ({"NOTIFY_SOCKET": address}, PID)


@pytest.mark.parametrize(
    ("variables", "watchdog"),
    [
        ({"WATCHDOG_USEC": "1"}, 0.000_001),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(PID)}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_PID": str(PID)}, None),
    ],
)
def test_watchdog_of_another_process_is_ignored(
    listener: socket.socket, variables: dict[str, str], watchdog: float | None
) -> None:
    manager = ServiceManager.from_environ({"NOTIFY_SOCKET": listener.getsockname(), **variables}, PID)
    assert manager.watchdog == watchdog
    manager.close()


def test_watchdog_without_notify_socket_is_ignored() -> None:
    assert ServiceManager.from_environ({"WATCHDOG_USEC": "1000"}, PID).watchdog is None


@pytest.mark.parametrize("number", ["", "0", "-1", "1.5", "1e9", " 1", "²", "9" * 20, "x" * 100_000])
def test_malformed_watchdog_interval_is_refused(number: str) -> None:
    with pytest.raises(ConfigError, match=r"WATCHDOG_USEC = .* must be a number from 1"):
        ServiceManager.from_environ({"WATCHDOG_USEC": number}, PID)


@pytest.mark.parametrize("number", ["", "-1", str(MAX_SOCKETS + 1), "two"])
def test_malformed_socket_count_is_refused(number: str) -> None:
    with pytest.raises(ConfigError, match=r"LISTEN_FDS = .* must be a number from 0 to 64"):
        ServiceManager.from_environ({"LISTEN_PID": str(PID), "LISTEN_FDS": number}, PID)


@pytest.mark.parametrize("variables", [{}, {"LISTEN_PID": "1"}, {"LISTEN_PID": ""}])
def test_sockets_of_another_process_are_ignored(variables: dict[str, str]) -> None:
    assert ServiceManager.from_environ({"LISTEN_FDS": "2", **variables}, PID).sockets == ()
    assert ServiceManager.from_environ({"LISTEN_PID": str(PID)}, PID).sockets == ()


# --- descriptors, in a process of their own ------------------------------------------------------------------

CHILD = """
import os, sys
from zcproto.errors import ConfigError
from zcproto.runtime.service_manager import ServiceManager
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    manager = ServiceManager.from_environ(os.environ, os.getpid())
except ConfigError as error:
    print(error)
else:
    for name, passed in manager.sockets:
        print(name, passed.getsockname()[0], passed.fileno(), os.get_inheritable(passed.fileno()))
print(sorted(name for name in os.environ if name.startswith("LISTEN")))
"""


def passed(*sockets: socket.socket, names: str = "", count: int | None = None) -> list[str]:
    """Return the faults of a process that gets these sockets from descriptor 3 on."""
    plan = [f"{place}<&{each.fileno()}" for place, each in enumerate(sockets, 3)]
    done = subprocess.run(
        ["/bin/bash", "-c", f'exec "$@" {" ".join(plan)}', "-", sys.executable, "-c", CHILD],
        pass_fds=[each.fileno() for each in sockets],
        env={
            **os.environ,
            "LISTEN_FDS": str(len(sockets) if count is None else count),
            "LISTEN_FDNAMES": names,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
    )
    *lines, variables = done.stdout.splitlines()
    assert variables == "[]"
    return lines


def high(bound: socket.socket) -> socket.socket:
    """Return the socket with a descriptor that the child does not use otherwise."""
    number = fcntl.fcntl(bound.fileno(), fcntl.F_DUPFD_CLOEXEC, 100)
    bound.close()
    return socket.socket(fileno=number)


def listening(host: str) -> socket.socket:
    """Return a socket of a service manager; that of :: has both protocols."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return high(socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::"))


def test_passed_sockets_have_names_and_are_not_inherited() -> None:
    with listening("127.0.0.1") as first, listening("::1") as second:
        assert passed(first, second, names="zcproto:other") == [
            "zcproto 127.0.0.1 3 False",
            "other ::1 4 False",
        ]
        assert passed(first) == [" 127.0.0.1 3 False"]
        assert passed(first, second, names="one") == ["one 127.0.0.1 3 False", " ::1 4 False"]


def test_closed_descriptor_is_refused() -> None:
    with listening("127.0.0.1") as first:
        (fault,) = passed(first, count=60)
    assert "LISTEN_FDS" in fault
    assert "is not a socket: Bad file descriptor" in fault


def test_socket_that_does_not_listen_is_refused(tmp_path: Path) -> None:
    sentence = "LISTEN_FDS = '3' (environment): is not a listening TCP socket; use ListenStream=, Accept=no"
    datagrams = high(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    idle = high(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    local.bind(str(tmp_path / "socket"))
    local.listen()
    for wrong in (datagrams, idle, high(local)):
        with wrong:
            assert passed(wrong) == [sentence]
