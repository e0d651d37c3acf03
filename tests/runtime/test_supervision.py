"""Tests of what is reported to a service manager, and of passed sockets, with real processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock, FakeTimers
from tests.runtime.test_service_manager import listening
from tests.server.helpers import ROOT, TIMEOUT, Client, configuration
from zcproto.cli import main
from zcproto.runtime.server import Server
from zcproto.runtime.service_manager import STATUS_INTERVAL, ServiceManager

Message = dict[str, str]

LONG_WATCHDOG = str(1800 * 1_000_000)
"""For processes that must not be replaced where the machine is busy. It is fed every ten seconds."""

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]

[server]
hang_timeout = "1h"
"""

APPLICATION = """
from zcproto import App

app = App()


@app.method("block", public=True)
def block(path: str) -> str:
    \"\"\"Block until the pipe is written to.\"\"\"
    with open(path) as pipe:
        return pipe.read()
"""


class FakeServiceManager:
    """Receives notifications; `messages` holds them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[Message] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def next(self, timeout: float = TIMEOUT) -> Message:
        self._socket.settimeout(timeout)
        text = self._socket.recv(4096).decode()
        message = dict(line.split("=", 1) for line in text.splitlines())
        self.messages.append(message)
        return message

    def until(self, name: str, value: str) -> Message:
        while (message := self.next()).get(name) != value:
            pass
        return message

    def is_silent(self, seconds: float) -> bool:
        try:
            self.next(seconds)
        except TimeoutError:
            return True
        return False

    def drain(self) -> None:
        while not self.is_silent(0.001):
            pass

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeServiceManager]:
    manager = FakeServiceManager(tmp_path / "notify")
    yield manager
    manager.close()


# --- with a clock that is turned by hand ---------------------------------------------------------------------


class ManagerHarness:
    """A service manager, fake timers and the status of a server."""

    def __init__(self, manager: FakeServiceManager, watchdog: float | None) -> None:
        self.timers = FakeTimers()
        self.status = "serving 0"
        self.manager = ServiceManager(str(manager.path), watchdog, clock=FakeClock(now=12.5))

    def ready(self) -> None:
        loop: Any = self.timers
        self.manager.ready(loop, lambda: self.status)


def test_watchdog_is_fed_twice_per_interval(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=4.0)
    harness.ready()
    assert manager.next() == {"READY": "1", "MAINPID": str(os.getpid()), "STATUS": "serving 0"}
    harness.timers.advance(1.9)
    assert manager.is_silent(0.01)
    harness.timers.advance(0.2)
    assert manager.next() == {"WATCHDOG": "1"}
    harness.status = "serving 1"
    harness.timers.advance(2)
    assert manager.next() == {"WATCHDOG": "1", "STATUS": "serving 1"}
    harness.timers.advance(2)
    assert manager.next() == {"WATCHDOG": "1"}
    harness.manager.close()
    harness.timers.advance(100)


def test_without_watchdog_only_status_changes_are_sent(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=None)
    harness.ready()
    manager.next()
    harness.timers.advance(STATUS_INTERVAL * 3)
    assert manager.is_silent(0.01)
    harness.status = "serving 1"
    harness.timers.advance(STATUS_INTERVAL)
    assert manager.next() == {"STATUS": "serving 1"}
    harness.manager.close()


def test_tiny_watchdog_interval_does_not_occupy_the_loop(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=0.000_001)
    harness.ready()
    harness.timers.advance(0.1)
    manager.next()
    fed = 0
    while not manager.is_silent(0.01):
        fed += 1
    assert 1 <= fed <= 6
    harness.manager.close()


def test_long_watchdog_interval_keeps_status_fresh(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=3600)
    harness.ready()
    manager.next()
    harness.timers.advance(STATUS_INTERVAL + 0.1)
    assert manager.next() == {"WATCHDOG": "1"}
    harness.manager.close()


def test_reload_is_reported_with_its_time_and_always_ends(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=None)
    harness.ready()
    manager.next()
    with harness.manager.reloading():
        assert manager.next() == {"RELOADING": "1", "MONOTONIC_USEC": "12500000"}
    assert manager.next() == {"READY": "1", "STATUS": "serving 0"}

    def fail() -> None:
        with harness.manager.reloading():
            raise ValueError("no configuration")

    with pytest.raises(ValueError, match="no configuration"):
        fail()
    assert manager.next()["RELOADING"] == "1"
    assert manager.next() == {"READY": "1", "STATUS": "serving 0"}
    harness.manager.close()


def test_reload_is_not_reported_before_ready_or_during_drain(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=None)
    with harness.manager.reloading():
        assert manager.is_silent(0.01)
    harness.ready()
    manager.next()
    harness.manager.stopping(1.0)
    manager.next()
    with harness.manager.reloading():
        assert manager.is_silent(0.01)
    harness.manager.close()


def test_drain_extends_the_timeout_and_feeds_the_watchdog(manager: FakeServiceManager) -> None:
    harness = ManagerHarness(manager, watchdog=4.0)
    harness.ready()
    manager.next()
    harness.manager.stopping(30.0)
    assert manager.next() == {"STOPPING": "1", "STATUS": "draining", "EXTEND_TIMEOUT_USEC": "40000000"}
    harness.timers.advance(2.1)
    assert manager.next() == {"WATCHDOG": "1"}
    harness.manager.close()


def test_supervision_without_service_manager_does_nothing() -> None:
    timers: Any = FakeTimers()
    manager = ServiceManager()
    manager.ready(timers, lambda: "")
    with manager.reloading():
        pass
    manager.stopping(1.0)
    manager.close()
    assert timers.armed == []


def test_unreachable_service_manager_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timers: Any = FakeTimers()
    manager = ServiceManager(str(tmp_path / "gone"))
    manager.ready(timers, lambda: "serving")
    assert "service_manager.unreachable" in capsys.readouterr().err
    manager.close()


# --- real processes ------------------------------------------------------------------------------------------


@pytest.fixture
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ZCPROTO_SERVER__LIFESPAN_TIMEOUT")  # EXTEND_TIMEOUT_USEC includes it
    (home / "blocking_app.py").write_text(APPLICATION)
    return home


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Start `zcproto serve` as a service manager does; `passed` become descriptors from 3 on."""
    with ExitStack() as stack:

        def start(*arguments: str, passed: tuple[int, ...] = (), **variables: str) -> subprocess.Popen[str]:
            plan = " ".join(f"{place}<&{descriptor}" for place, descriptor in enumerate(passed, 3))
            if passed:
                variables = {"LISTEN_FDS": str(len(passed)), **variables}
            # $$ is the process that exec replaces
            script = f'LISTEN_PID=$$ exec "$@" {plan}'
            command = [sys.executable, "-m", "zcproto", "--home", str(home), "serve", *arguments]
            process = stack.enter_context(
                subprocess.Popen(
                    ["/bin/bash", "-c", script, "-", *command],
                    stdout=subprocess.PIPE,
                    stderr=stack.enter_context(open(home / "log", "w")),
                    text=True,
                    cwd=home,
                    pass_fds=passed,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def where(process: subprocess.Popen[str], home: Path) -> list[int]:
    """Return the ports that a process reports, in order."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("zcproto: listening on "), (home / "log").read_text()
    return [int(line.rpartition(":")[2])]


def test_process_reports_ready_reload_and_stop(start: Start, manager: FakeServiceManager, home: Path) -> None:
    process = start("--port", "0", NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="600000")
    assert manager.next() == {
        "READY": "1",
        "MAINPID": str(process.pid),
        "STATUS": "serving 0 connections, 0 sessions",
    }
    (port,) = where(process, home)
    assert manager.next() == {"WATCHDOG": "1"}
    with Client(port, home / "certs" / "ca.crt"):
        assert manager.until("STATUS", "serving 1 connection, 0 sessions")["WATCHDOG"] == "1"
    before = time.monotonic_ns() // 1000
    process.send_signal(signal.SIGHUP)
    reloading = manager.until("RELOADING", "1")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    manager.until("READY", "1")
    process.send_signal(signal.SIGTERM)
    assert manager.until("STOPPING", "1")["EXTEND_TIMEOUT_USEC"] == "70000000"
    assert process.wait(TIMEOUT) == 0


def test_hanging_loop_does_not_feed_the_watchdog(
    start: Start, manager: FakeServiceManager, home: Path, key: str
) -> None:
    process = start(
        "--port", "0", "blocking_app:app", NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="200000"
    )
    manager.until("READY", "1")
    (port,) = where(process, home)
    manager.until("WATCHDOG", "1")
    os.mkfifo(home / "pipe")
    with Client(port, home / "certs" / "ca.crt") as client:
        client.open_session("ada", key)
        client.send(client.request("block", {"path": str(home / "pipe")}))
        with open(home / "pipe", "w") as pipe:  # opens as soon as the method waits
            manager.drain()
            assert manager.is_silent(0.5)
            pipe.write("go on")
        assert client.answer().value == "go on"
        manager.until("WATCHDOG", "1")
        # As a service manager does without WATCHDOG=1; the log then has the stack of the loop.
        client.send(client.request("block", {"path": str(home / "pipe")}))
        with open(home / "pipe", "w"):
            process.send_signal(signal.SIGABRT)
            assert process.wait(TIMEOUT) == -signal.SIGABRT
    log = (home / "log").read_text()
    assert "Fatal Python error: Aborted" in log
    assert "blocking_app.py" in log


def test_supervisor_of_workers_reports_ready_reload_and_stop(
    start: Start, manager: FakeServiceManager, home: Path
) -> None:
    process = start(
        "--port", "0", "--workers", "2", NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC=LONG_WATCHDOG
    )
    assert manager.next() == {"READY": "1", "MAINPID": str(process.pid), "STATUS": "2 of 2 workers"}
    assert manager.next() == {"WATCHDOG": "1"}
    process.send_signal(signal.SIGHUP)
    manager.until("RELOADING", "1")
    manager.until("READY", "1")
    config = home / "config.toml"
    good = config.read_text()
    config.write_text(f"{good}\nfault = 1\n")
    assert main(["--home", str(home), "reload"]) == 2
    manager.until("STATUS", "2 of 2 workers; the configuration was refused, a restart would fail")
    config.write_text(good)
    assert main(["--home", str(home), "reload"]) == 0
    manager.until("STATUS", "2 of 2 workers")
    process.send_signal(signal.SIGTERM)
    assert manager.until("STOPPING", "1")["EXTEND_TIMEOUT_USEC"] == "70000000"
    assert process.wait(TIMEOUT) == 0


def test_only_passed_sockets_are_served(start: Start, home: Path, key: str) -> None:
    with listening("127.0.0.1") as first, listening("::1") as second, listening("127.0.0.1") as configured:
        taken = configured.getsockname()[1]  # a second bind would fail
        process = start("--port", str(taken), passed=(first.fileno(), second.fileno()))
        (port,) = where(process, home)
        assert port == first.getsockname()[1]
        for host, listener in (("127.0.0.1", first), ("::1", second)):
            with Client(listener.getsockname()[1], home / "certs" / "ca.crt", host=host) as client:
                client.open_session("ada", key)
                assert client.call("session.info")["address"] == host
        # Connections wait while no process serves: the service manager keeps the socket.
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
        with socket.create_connection(first.getsockname()[:2], TIMEOUT):
            start("--port", str(taken), passed=(first.fileno(),))


def test_passed_redirect_socket_has_no_tls(start: Start, home: Path) -> None:
    with listening("127.0.0.1") as tls, listening("127.0.0.1") as plain:
        process = start(passed=(tls.fileno(), plain.fileno()), LISTEN_FDNAMES="zcproto:redirect")
        (port,) = where(process, home)
        assert port == tls.getsockname()[1]
        with Client(port, home / "certs" / "ca.crt") as client:
            assert client.is_open()
        with socket.create_connection(plain.getsockname()[:2], TIMEOUT) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert raw.recv(65_536).startswith(b"HTTP/1.1 308 ")


def test_passed_redirect_socket_needs_http(start: Start, home: Path) -> None:
    with (home / "config.toml").open("a") as config:
        config.write("[http]\nenabled = false\n")
    with listening("127.0.0.1") as plain:
        process = start("--port", "0", passed=(plain.fileno(),), LISTEN_FDNAMES="redirect")
        assert process.wait(TIMEOUT) == 2
    assert "http.enabled = false: pass no socket" in (home / "log").read_text()


def test_dual_stack_socket_maps_ipv4_addresses(start: Start, home: Path, key: str) -> None:
    with listening("::") as both:
        process = start(passed=(both.fileno(),))
        (port,) = where(process, home)
        for host in ("127.0.0.1", "::1"):
            with Client(port, home / "certs" / "ca.crt", host=host) as client:
                client.open_session("ada", key)
                assert client.call("session.info")["address"] == host


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="takes systemd")
def test_systemd_socket_activate_passes_a_socket(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-E", f"PYTHONPATH={ROOT}"]
    process = subprocess.Popen(
        [*command, sys.executable, "-m", "zcproto", "--home", str(home), "serve", "--port", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )
    try:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("Listening on "):
            assert process.poll() is None
        with Client(port, home / "certs" / "ca.crt") as client:
            assert client.is_open()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def test_server_in_a_program_accepts_passed_sockets(home: Path) -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    address = bound.getsockname()
    async with Server(None, configuration(home), home=home, sockets=[bound]) as server:
        assert server.addresses == [address]
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await reader.read(12)) == b"HTTP/1.1 400"
        writer.close()
        await writer.wait_closed()
    assert bound.fileno() == -1
