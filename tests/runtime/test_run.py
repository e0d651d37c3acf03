"""Tests of a server process: signals, exit codes, and its protection."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import GOAWAY, RESPONSE, configuration, eventually, read_to_end
from tests.server.process import ServerProcess
from zcproto.auth import UserFile
from zcproto.common.roles import OPERATORS
from zcproto.config import Config
from zcproto.config.model import CertificatesConfig
from zcproto.errors import ConfigError
from zcproto.observe.process import resident_bytes
from zcproto.runtime import background, process_setup, run
from zcproto.runtime import server as server_module
from zcproto.runtime.process_setup import GC_THRESHOLDS, SWITCH_INTERVAL
from zcproto.runtime.serve import serve
from zcproto.runtime.server import Server
from zcproto.runtime.service_manager import ServiceManager

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]

[limits]
max_connections = 500
"""


# --- real processes ------------------------------------------------------------------------------------------


GATE = """
import asyncio
from pathlib import Path
from zcproto.app.app import App

app = App()

@app.method("wait")
async def wait():
    while not Path(__file__).with_name("open").exists():
        await asyncio.sleep(0.01)
"""
"""A method that runs until a file is there."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains_and_exits_with_0(home: Path, certs: Path, key: str, number: int) -> None:
    (home / "config.toml").write_text(f'{CONFIG}\n[server]\ndrain_timeout = "1h"')
    (home / "gate.py").write_text(GATE)
    with ServerProcess(home, certs, app="gate:app") as server:
        with (
            server.client("ada", key) as client,
            server.client("ada", key) as idle,
            server.client() as idle_without_session,
        ):
            client.send(client.request("wait"), client.request("server.info"))
            client.answer(client.stream)
            server.signal(number)
            for other in (idle, idle_without_session):
                frames, how = other.rest_until_closed()
                assert ([frame.kind for frame in frames], how) == ([GOAWAY], "close_notify")
            (home / "open").touch()
            frames, how = client.rest_until_closed()
            assert [frame.kind for frame in frames] == [GOAWAY, RESPONSE]
            assert how == "close_notify"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", server.port))
        assert server.wait() == 0
        events = re.findall(r'"event":"([a-z._]+)"', server.log)
        assert events[:3] == ["certificate.loaded", "sessions.loaded", "server.listening"]
        assert events[-2:] == ["server.draining", "server.ended"]
        assert "Traceback" not in server.log


def test_second_signal_forces_the_end(home: Path, certs: Path, key: str) -> None:
    (home / "config.toml").write_text(f'{CONFIG}\n[server]\ndrain_timeout = "1h"')
    with ServerProcess(home, certs) as server, server.client("ada", key) as client:
        client.send(client.request("sleep", {"ms": 3_600_000}), client.request("time"))
        client.answer(client.stream)
        server.signal(signal.SIGTERM)
        assert client.receive().kind == GOAWAY
        assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
        assert '"event":"server.forced"' in server.log


SLOW_START = """
import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

from zcproto import App

@asynccontextmanager
async def lifespan(app):
    Path(__file__).with_name("begun").touch()
    await asyncio.to_thread(time.sleep, 3600)
    yield

app = App(lifespan=lifespan)
"""
"""A start that takes long in a thread, as the generation of a key."""


@pytest.mark.parametrize("workers", [1, 2])
def test_signal_during_the_start_does_not_wait_for_it(home: Path, certs: Path, workers: int) -> None:
    (home / "config.toml").write_text(f"{CONFIG}\n[server]\nworkers = {workers}")
    (home / "slow.py").write_text(SLOW_START)
    with ServerProcess(home, certs, app="slow:app", listens=False) as server:
        eventually((home / "begun").exists)
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert not server.events("worker.killed", "worker.ended")
        assert workers > 1 or server.events("server.start_stopped")


def test_signal_during_handshake_ends_the_process(home: Path, certs: Path) -> None:
    (home / "config.toml").write_text(f'{CONFIG}\n[tls]\nhandshake_timeout = "2s"')
    with (
        ServerProcess(home, certs) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as half,
    ):
        half.sendall(b"\x16\x03\x01\x02\x00\x01")
        with server.client():  # the unfinished connection has been accepted
            server.signal(signal.SIGTERM)
            assert read_to_end(half)[0] == b""
        half.close()
        assert server.wait() == 0


def test_process_disables_core_dumps_and_raises_file_limit(home: Path, certs: Path) -> None:
    with ServerProcess(home, certs) as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 ", limits)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_changed_users_file_is_read_again(home: Path, certs: Path, key: str) -> None:
    with ServerProcess(home, certs) as server:
        later = UserFile(home / "users.toml").add("eve", roles=OPERATORS)
        with server.client("eve", later) as eve:
            assert eve.call("server.stats")["connections"] == 1
        text = (home / "users.toml").read_text()
        (home / "users.toml").write_text("not a file of users")
        with server.client("ada", key) as ada:
            ada.echo()
        eventually(lambda: '"event":"users.unreadable"' in server.log)
        (home / "users.toml").write_text(text)
        with server.client("ada", key) as ada:
            ada.echo()
        eventually(lambda: '"event":"users.readable"' in server.log)


@pytest.mark.requirement("logs")
def test_log_contains_no_key(home: Path, certs: Path, key: str) -> None:
    with ServerProcess(home, certs, "--log-level", "debug") as server:
        with server.client("ada", key) as client:
            client.echo()
            token = client.token
        with server.client() as client:
            client.refused("session.open", {"scheme": "api_key", "user": "ada", "key": "a-wrong-key"})
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        private = (home / "certs" / "server-ecdsa.key").read_text().splitlines()[1]
        for secret in (key, "a-wrong-key", base64.urlsafe_b64encode(token).decode().rstrip("="), token.hex()):
            assert secret not in server.log
        assert private not in server.log


# --- the same inside this process ------------------------------------------------------------------------------


@pytest.fixture
def process_state() -> Iterator[None]:
    """Restore what `serve` changes in the process."""
    thresholds = gc.get_threshold()
    limits = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    gc.unfreeze()
    yield
    gc.set_threshold(*thresholds)
    gc.freeze()  # as before; see tests/conftest.py
    for kind, limit in limits.items():
        resource.setrlimit(kind, limit)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class ExitError(BaseException):
    """Raised in place of `os._exit`."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def exit_(code: int) -> None:
        codes.append(code)
        raise ExitError

    monkeypatch.setattr(os, "_exit", exit_)
    return codes


def signal_when(condition: Callable[[], Any]) -> threading.Thread:
    """Send SIGTERM to this process from another thread once the condition holds."""

    def wait() -> None:
        eventually(condition)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.usefixtures("process_state")
def test_serve_runs_until_a_signal_and_drains(home: Path) -> None:
    listening: list[Server] = []
    thread = signal_when(lambda: listening)
    serve(None, configuration(home), home=home, ready=listening.append)
    thread.join()
    assert listening[0].port > 0
    assert gc.get_threshold() == GC_THRESHOLDS
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert gc.get_freeze_count() > 0
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listening[0].port))


class SlowServer:
    """A fake server whose drain is interrupted by a second signal, unless it has ended before."""

    def __init__(self, running: int = 0) -> None:
        self.drains = 0
        self.drained = asyncio.Event()
        self.state = self.tasks = self
        self.running = running
        self.config = Config()

    def summary(self) -> str:
        return "serving"

    async def start(self) -> None:
        pass

    async def drain(self) -> None:
        self.drains += 1
        if not self.drained.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        await self.drained.wait()


async def run_until_exit(server: Any) -> None:
    """Run `_serve` until a signal; it must exit."""

    def ready(_: Server) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ExitError):
        await run._serve(server, ready, ServiceManager(), {})
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


@pytest.mark.usefixtures("process_state")
async def test_second_signal_does_not_wait_for_the_drain(
    exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    server = SlowServer()
    await run_until_exit(server)
    assert (server.drains, exits) == (1, [1])
    assert '"event":"server.forced"' in capsys.readouterr().err


class StuckServer(SlowServer):
    async def start(self) -> None:
        for _ in range(2):  # the first signal cancels it
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


@pytest.mark.usefixtures("process_state")
async def test_second_signal_does_not_wait_for_the_start(exits: list[int]) -> None:
    await run_until_exit(StuckServer())
    assert exits == [0]


@pytest.mark.usefixtures("process_state")
async def test_running_methods_after_drain_exit_the_process(exits: list[int]) -> None:
    server = SlowServer(running=1)
    server.drained.set()
    await run_until_exit(server)
    assert (server.drains, exits) == (1, [1])


@pytest.mark.usefixtures("process_state")
def test_low_file_limit_is_logged(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_setup, "raise_file_limit", lambda wanted: 100)
    listening: list[Server] = []
    thread = signal_when(lambda: listening)
    config = configuration(home, limits__max_connections=499)  # the limit of 500 has been raised
    serve(None, config, home=home, ready=listening.append)
    thread.join()
    assert '"event":"server.file_limit"' in capsys.readouterr().err


def test_resident_memory_is_reported_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10_000_000 < resident_bytes() < 10_000_000_000

    def no_proc(*args: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_proc)
    assert 10_000_000 < resident_bytes() < 10_000_000_000
    used = SimpleNamespace(ru_maxrss=20_000_000)
    monkeypatch.setattr("resource.getrusage", lambda who: used)
    assert resident_bytes() == 20_000_000 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")  # in bytes there
    assert resident_bytes() == 20_000_000
    monkeypatch.setattr("zcproto.observe.process.HAS_USAGE", False)
    assert resident_bytes() == 0


# --- no certificate, no listening ------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*args: Any) -> Any:
        raise AssertionError("a port was bound")

    monkeypatch.setattr(server_module, "bind", bind)


@pytest.mark.usefixtures("nothing_is_bound")
async def test_home_writable_by_others_is_refused(home: Path) -> None:
    os.chmod(home, 0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        await Server(config=configuration(home), home=home).start()


@pytest.mark.usefixtures("nothing_is_bound")
async def test_users_file_readable_by_others_is_refused(home: Path, key: str) -> None:
    (home / "users.toml").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        await Server(config=configuration(home), home=home).start()


def test_default_home_and_configuration_match_the_cli(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(home))
    (home / "config.toml").write_text("[server]\nport = 7444")
    server = Server()
    assert server.home.path == home
    assert server.config.server.port == 7444
    assert server.config.certificates.directory == home / "certs"


def test_own_configuration_keeps_certificates_in_home(tmp_path: Path) -> None:
    assert Server(config=Config(), home=tmp_path).config.certificates.directory == tmp_path / "certs"
    chosen = CertificatesConfig(directory=tmp_path / "elsewhere")
    server = Server(config=Config(certificates=chosen), home=tmp_path)
    assert server.config.certificates.directory == tmp_path / "elsewhere"


async def test_ended_sessions_are_cleaned_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLEANUP_S", 0.1)
    config = configuration(home, sessions__refresh=False)
    async with Server(config=config, home=home) as server:
        registry = server.state.registry
        registry.open("ada", client="", address="", wall=0)
        assert len(registry) == 1
        async with asyncio.timeout(TIMEOUT):
            while len(registry):  # noqa: ASYNC110 - the registry knows no events
                await asyncio.sleep(0.005)
