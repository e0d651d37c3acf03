"""Replace a running server by a new one on the same sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.runs.served import APP, attach, read
from tests.server.helpers import PATIENT_CLIENT, ROOT, Client, eventually
from tests.server.process import ServerProcess, home_with
from zcproto import connect
from zcproto.auth import UserFile
from zcproto.errors import ConfigError
from zcproto.runtime.process_setup import UPGRADE
from zcproto.wire.frame import Kind
from zcproto.workers.upgrade import MAX_SIZE, Inheritance

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]

[server]
drain_timeout = "1h"
hang_timeout = "1h"
upgrade_timeout = "59m"
"""
PLACE = """
import os
from zcproto.app.app import App

app = App()

@app.method("parent")
def parent():
    return os.getppid()
"""

FAILING = """
from contextlib import asynccontextmanager
from zcproto.app.app import App

@asynccontextmanager
async def lifespan(app):
    raise RuntimeError("no database")
    yield

app = App(lifespan=lifespan)
"""


HANGING = FAILING.replace('raise RuntimeError("no database")', "await Event().wait()").replace(
    "import asynccontextmanager", "import asynccontextmanager\nfrom asyncio import Event"
)

BLOCKED = """
import os
import threading

os.mkdir("blocked")
threading.Event().wait()
"""

BLOCKED_LIFESPAN = FAILING.replace(
    'raise RuntimeError("no database")',
    'os.makedirs("blocked", exist_ok=True)\n    threading.Event().wait()',
).replace("from context", "import os, threading\nfrom context")


@pytest.fixture
def placed(home: Path, key: str) -> Path:
    """Return a home with a user, and an application that returns which supervisor answers."""
    (home / "placed.py").write_text(PLACE)
    return home


@contextlib.contextmanager
def running(home: Path, certs: Path) -> Iterator[ServerProcess]:
    """Run a server, and end its successors with it."""
    with ServerProcess(home, certs, "--workers", "2", app="placed:app") as server:
        try:
            yield server
        finally:
            for line in server.events("upgrade.started"):
                end(line["pid"])


@pytest.fixture
def server(placed: Path, certs: Path) -> Iterator[ServerProcess]:
    with running(placed, certs) as server:
        yield server


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[tuple[ServerProcess, str]]:
    """Return a server whose upgrades all fail, and the key of ada."""
    home = home_with(tmp_path_factory.mktemp("rolled_back"), certs, CONFIG)
    key = UserFile(home / "users.toml").add("ada")
    (home / "placed.py").write_text(PLACE)
    with running(home, certs) as server:
        yield server, key


@pytest.fixture
def serves_on(rolled_back: tuple[ServerProcess, str]) -> Iterator[ServerProcess]:
    """Return that server, which has to serve old and new sessions after the test."""
    server, key = rolled_back
    token, _ = call(server, key, None)
    yield server
    assert call(server, key, token) == (token, server.process.pid)
    assert call(server, key, None)[1] == server.process.pid
    for name in ("control.sock", "workers.sock"):
        assert (server.home / name).is_socket()


def end(pid: int) -> None:
    """End a successor, which has no parent here."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def call(server: ServerProcess, key: str, token: bytes | None) -> tuple[bytes, int]:
    """Connect, with a new session without a token, and return the token and the supervisor that answers."""
    with server.client(*(("ada", key) if token is None else ())) as client:
        client.token = client.token if token is None else token
        return client.token, client.call("parent")


def upgrade(server: ServerProcess) -> tuple[int, str]:
    """Return the exit code and the output of the command."""
    command = [sys.executable, "-m", "zcproto", "--home", str(server.home), "upgrade"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return done.returncode, done.stdout + done.stderr


async def test_upgrade_keeps_sessions_and_loses_no_request(server: ServerProcess, key: str) -> None:
    first = server.process.pid
    token, parent = call(server, key, None)
    assert parent == first
    ca_file = server.home / "certs" / "ca.crt"
    options: dict[str, Any] = {"user": "ada", "key": key, "ca_file": ca_file, **PATIENT_CLIENT}
    async with connect(f"127.0.0.1:{server.port}", **options) as kept:
        assert await kept.call("parent") == first
        server.signal(signal.SIGUSR2)
        while server.process.poll() is None:
            assert await kept.call("parent") > 0
            async with connect(f"127.0.0.1:{server.port}", **options) as new:
                assert await new.call("parent") > 0
        (started,) = server.events("upgrade.started")
        assert await kept.call("parent") == started["pid"]
    assert server.process.returncode == 0
    assert [line["pid"] for line in server.events("upgrade.done")] == [started["pid"]]
    assert call(server, key, token) == (token, started["pid"])
    assert not server.events("worker.ended", "worker.killed", "server.fault")
    assert not server.events("store.degraded", "store.recovered", "alert.began")
    os.kill(started["pid"], signal.SIGTERM)
    eventually(lambda: not (server.home / "control.sock").exists())


def test_durable_runs_go_on_in_old_workers_and_are_read_in_new_ones(
    placed: Path, certs: Path, key: str
) -> None:
    (placed / "placed.py").write_text(APP)
    with running(placed, certs) as server, ExitStack() as stack:
        clients: dict[int, Client] = {}
        while len(clients) < 2:  # one in each worker
            client = stack.enter_context(server.client("ada", key))
            clients.setdefault(client.call("pid"), client)
        for number, client in enumerate(clients.values()):
            attach(client, 0, {"total": 100, "hold": 10}, id=str(number))
            assert read(client, 10) == [*range(10)]
        server.signal(signal.SIGUSR2)
        for client in clients.values():
            cut = client.receive()
            assert (cut.kind, cut.details) == (Kind.ERROR, {"reason": "draining", "detached": True})
        eventually(lambda: len(server.events("server.runs_go_on")) == 2)  # neither waits for the other
        readers: list[Client] = []
        for number, client in enumerate(clients.values()):
            other = stack.enter_context(server.client())
            other.token = client.token
            attach(other, 5, id=str(number))
            assert read(other, 5) == [*range(5, 10)]
            assert other.call("pid") not in clients
            readers.append(other)
        (placed / "go").touch()
        for reader in readers:
            assert read(reader, 90) == [*range(10, 100)]
            assert reader.receive().kind == Kind.RESPONSE
        assert server.wait() == 0
        assert len((placed / "started").read_text().split()) == 2


def test_upgrade_is_rolled_back_if_the_new_application_fails(server: ServerProcess, key: str) -> None:
    first = server.process.pid
    token, _ = call(server, key, None)
    (server.home / "placed.py").write_text("raise RuntimeError('not ready')\n")
    for count in (1, 2):
        server.signal(signal.SIGUSR2)
        eventually(lambda count=count: len(server.events("upgrade.failed")) == count)
        assert call(server, key, token) == (token, first)
    (server.home / "placed.py").write_text(PLACE)
    code, output = upgrade(server)
    (pid,) = [line["pid"] for line in server.events("upgrade.done")]
    assert (code, output) == (0, f"the new server serves, with process id {pid}\n")


def test_single_process_refuses_an_upgrade_and_serves_on(placed: Path, certs: Path, key: str) -> None:
    with ServerProcess(placed, certs, app="placed:app") as server:
        server.signal(signal.SIGUSR2)
        eventually(lambda: bool(server.events("upgrade.failed")))
        code, output = upgrade(server)
        assert code == 1
        assert "one process cannot be replaced; restart it instead" in output
        assert call(server, key, None)[1] == os.getpid()


def test_upgrade_is_rolled_back_if_a_lifespan_fails(serves_on: ServerProcess) -> None:
    (serves_on.home / "placed.py").write_text(FAILING)
    code, output = upgrade(serves_on)
    assert code == 1
    assert "the new one has failed: the lifespan of the application did not start: it raised" in output


def test_upgrade_is_rolled_back_if_the_successor_is_killed(serves_on: ServerProcess) -> None:
    (serves_on.home / "placed.py").write_text(PLACE)
    before = [len(serves_on.events(name)) for name in ("upgrade.started", "upgrade.failed")]
    serves_on.signal(signal.SIGUSR2)
    eventually(lambda: len(serves_on.events("upgrade.started")) > before[0])
    os.kill(serves_on.events("upgrade.started")[-1]["pid"], signal.SIGKILL)
    eventually(lambda: len(serves_on.events("upgrade.failed")) > before[1])


def test_upgrade_is_rolled_back_if_the_new_server_is_not_ready_in_time(serves_on: ServerProcess) -> None:
    (serves_on.home / "config.toml").write_text(CONFIG.replace('"59m"', '"1s"'))
    serves_on.signal(signal.SIGHUP)
    # the supervisor's is before the workers'
    eventually(lambda: len(serves_on.events("config.reloaded")) == 3)
    (serves_on.home / "placed.py").write_text(HANGING)
    code, output = upgrade(serves_on)
    assert code == 1, output
    reason = "it did not serve within 1 s (server.upgrade_timeout)"
    assert f"the old server serves on; the new one has failed: {reason}" in output
    (slow,) = serves_on.events("upgrade.slow")
    assert slow["seconds"] == 1.0
    eventually(lambda: not is_running(slow["pid"]))


def test_upgrade_to_one_worker_names_the_setting(placed: Path, certs: Path, key: str) -> None:
    config = placed / "config.toml"
    config.write_text(CONFIG + "workers = 2\n")
    with ServerProcess(placed, certs, app="placed:app") as server:
        config.write_text(CONFIG + "workers = 1\n")
        code, output = upgrade(server)
        assert code == 1
        assert (
            "the new one has failed: server.workers = 1: one process cannot take over from several" in output
        )
        assert call(server, key, None)[1] == server.process.pid


@pytest.mark.parametrize(
    "value", ["", "{}", "[]", '{"channel":1}', '{"channel":"1"}', "9" * (MAX_SIZE + 1), "[" * 4_000]
)
def test_malformed_inheritance_is_refused(value: str) -> None:
    environ = {UPGRADE: value}
    with pytest.raises(ConfigError, match="unset it"):
        Inheritance.from_environ(environ)
    assert environ == {}
    assert Inheritance.from_environ(environ) is None


@pytest.mark.parametrize("application", [BLOCKED, BLOCKED_LIFESPAN], ids=["import", "lifespan"])
def test_unfinished_successor_ends_with_the_server_that_is_killed(
    server: ServerProcess, key: str, certs: Path, application: str
) -> None:
    (server.home / "placed.py").write_text(application)
    server.signal(signal.SIGUSR2)
    eventually((server.home / "blocked").exists)
    (started,) = server.events("upgrade.started")
    server.process.kill()
    eventually(lambda: not is_running(started["pid"]))
    (server.home / "placed.py").write_text(PLACE)
    with ServerProcess(server.home, certs, "--workers", "2", app="placed:app") as again:
        assert call(again, key, None)[1] == again.process.pid
