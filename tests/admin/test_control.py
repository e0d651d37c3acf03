"""The control socket: its file, who may connect, limits against hostile users."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.admin.control_helpers import ask, connect, exchange
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread, configuration, eventually
from tests.server.process import ServerProcess
from zcproto.admin import control as control_module
from zcproto.admin.control import MAX_CONNECTIONS, ControlSocket, peer_of, renewed_socket
from zcproto.common.home import Home
from zcproto.common.network import MAX_SOCKET_PATH, address_of
from zcproto.common.unix_socket import SocketFile
from zcproto.errors import ConfigError
from zcproto.http.messages import Router
from zcproto.runtime.server import Server
from zcproto.server.listener import PAUSE_WHEN_EXHAUSTED

OTHER_UID = 65_534


def control(server: ServerThread) -> ControlSocket:
    found = server.server._control
    assert found is not None
    return found


# --- the file ----------------------------------------------------------------------------------------------


def test_socket_is_private_and_removed_at_the_end(serve: Serve) -> None:
    server = serve()
    status = server.home.joinpath("control.sock").lstat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    assert ask(server.home / "control.sock", "GET", "/v1/status").status == 200
    server.drain()
    assert not (server.home / "control.sock").exists()
    assert not (server.home / ".control.sock.new").exists()


async def test_second_server_in_the_same_home_does_not_start(serve: Serve) -> None:
    first = serve()
    second = Server(config=configuration(first.home), home=first.home)
    with pytest.raises(ConfigError, match="a server runs with this home folder"):
        await second.start()
    assert ask(first.home / "control.sock", "GET", "/v1/status").value["pid"] == os.getpid()
    first.client("ada").close()


async def test_socket_of_a_killed_server_is_replaced(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    with ServerProcess(home, certs) as server:
        path = home / "control.sock"
        assert ask(path, "GET", "/v1/status").value["pid"] == server.process.pid
        server.signal(signal.SIGKILL)
        server.wait()
        assert path.exists()
        with pytest.raises(ConnectionRefusedError):
            connect(path)
    async with Server(config=configuration(home), home=home):
        assert path.exists()
    assert not path.exists()


def test_removed_socket_of_a_running_server_is_made_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "KEEP_INTERVAL", 0.01)
    server = serve()
    path = server.home / "control.sock"
    path.unlink()
    eventually(path.exists)
    eventually(lambda: control(server)._accepting)
    assert ask(path, "GET", "/v1/status").value["pid"] == os.getpid()

    def replace() -> None:
        path.unlink()
        path.mkdir()  # which only the operator can remove

    server.in_loop(replace)  # between two looks for the socket
    path.rmdir()
    eventually(path.exists)
    server.drain()
    assert not path.exists()


def test_socket_that_cannot_be_made_again_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = SocketFile(tmp_path / "x.sock")
    with file.open(1):  # type: ignore[union-attr]
        assert renewed_socket(file, 1) is None  # it is there
        file.path.unlink()
        file.path.write_text("mine")
        assert renewed_socket(file, 1) is None
    assert '"event":"server.socket_missing"' in capfd.readouterr().err
    assert file.path.read_text() == "mine"
    file.close()


async def test_regular_file_at_the_socket_path_is_never_replaced(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "certs").symlink_to(certs)
    (home / "control.sock").write_text("notes")
    with pytest.raises(ConfigError, match="not a socket"):
        await Server(config=configuration(home), home=home).start()
    assert (home / "control.sock").read_text() == "notes"
    (home / "control.sock").unlink()
    async with Server(config=configuration(home), home=home):  # the lock was released
        pass


async def test_symlink_at_the_socket_path_is_not_followed(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "certs").symlink_to(certs)
    (home / "control.sock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a socket"):
        await Server(config=configuration(home), home=home).start()
    (home / "control.sock").unlink()
    (home / "control.lock").unlink()
    (home / "control.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be created"):
        await Server(config=configuration(home), home=home).start()
    assert not (tmp_path / "elsewhere").exists()


async def test_failed_start_removes_the_socket(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "certs").symlink_to(certs)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = configuration(home, server__port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="cannot listen"):
            await Server(config=config, home=home).start()
    assert not (home / "control.sock").exists()
    async with Server(config=configuration(home), home=home):
        pass


async def test_server_starts_without_a_socket_in_a_read_only_folder(
    tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "certs").symlink_to(certs)

    def read_only(path: Path, backlog: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("zcproto.common.unix_socket.listen_unix", read_only)
    async with Server(config=configuration(home), home=home):
        assert "control.unavailable" in capsys.readouterr().err
        assert not (home / "control.sock").exists()


async def test_server_can_run_without_a_control_socket(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "certs").symlink_to(certs)
    async with Server(config=configuration(home), home=home, control=False):
        assert not (home / "control.sock").exists()


def test_replaced_socket_is_not_removed_at_the_end(serve: Serve) -> None:
    server = serve()
    path = server.home / "control.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other, address_of(path) as address:
        other.bind(address)
    server.drain()
    assert path.exists()


def test_socket_path_beyond_the_system_limit_works(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / ("long" * 30)
    with ServerThread(home, certs) as server:
        assert len(os.fsencode(server.home / "control.sock")) > MAX_SOCKET_PATH
        assert ask(server.home / "control.sock", "GET", "/v1/status").status == 200


# --- connections ------------------------------------------------------------------------------------------


def test_file_modes_decide_without_peer_credentials(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.delattr(socket, "SO_PEERCRED")
    with socket.socket() as some:
        assert peer_of(some).uid is None
    assert ask(server.home / "control.sock", "POST", "/v1/reload", {}).status == 200


def test_other_uid_is_refused(serve: Serve) -> None:
    server = serve()
    found = control(server)
    own, found._own_uid = found._own_uid, OTHER_UID + 1
    try:
        if os.geteuid() == 0:
            assert ask(server.home / "control.sock", "GET", "/v1/status").status == 200  # root is allowed
        else:
            assert ask(server.home / "control.sock", "GET", "/v1/status").status == 403
    finally:
        found._own_uid = own


OTHER_USER_PROGRAM = """
import json, os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
answers = []
for _ in range(50):
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(900)
            connection.connect(path)
            connection.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            answer = b""
            while part := connection.recv(65536):
                answer += part
            answers.append(answer.decode("latin-1"))
    except OSError as error:
        answers.append(type(error).__name__)
print(json.dumps(answers))
"""


def _ask_as_other_user(path: Path) -> list[str]:
    """Ask fifty times as another user of the system; return the responses or errors."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_USER_PROGRAM, str(path), str(OTHER_UID)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
        cwd="/",
    )
    return [str(each) for each in json.loads(done.stdout)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_hostile_user_is_refused_for_every_file_mode(certs: Path) -> None:
    # The folders of pytest are closed to others, but this test is about the socket.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with ServerThread(folder / "h", certs) as server:
            path = server.home / "control.sock"
            answers = _ask_as_other_user(path)
            assert set(answers) == {"PermissionError"}  # the home folder is closed
            server.home.chmod(0o755)
            assert set(_ask_as_other_user(path)) == {"PermissionError"}  # so is the socket
            path.chmod(0o666)
            answers = _ask_as_other_user(path)
            assert len(answers) == 50
            for answer in answers:  # a response, or a reset before it was read
                assert '"sessions"' not in answer
                assert answer.startswith("HTTP/1.1 403 ") or answer in (
                    "ConnectionResetError",
                    "BrokenPipeError",
                )
            assert control(server).refused == 50
            assert ask(path, "GET", "/v1/status").status == 200
            server.until(lambda: len(control(server).endpoint.connections) == 0)


def test_connections_are_bounded_and_freed_when_they_close(serve: Serve) -> None:
    server = serve()
    path = server.home / "control.sock"
    held = [connect(path) for _ in range(MAX_CONNECTIONS)]
    server.until(lambda: len(control(server).endpoint.connections) == MAX_CONNECTIONS)
    more = [connect(path) for _ in range(200)]
    for each in more:
        with each:
            assert each.recv(1) == b""
    assert len(control(server).endpoint.connections) == MAX_CONNECTIONS
    server.client("ada").close()
    for each in held:
        each.close()
    server.until(lambda: not control(server).endpoint.connections)
    assert ask(path, "GET", "/v1/status").status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 600 + b"\r\n\r\n", b" 400 "),
        (b"GET / HTTP/1.1\r\n\r\n", b" 400 "),
        (b"GET /v1/../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b" 404 "),
        (b"GET /" + b"a" * 100_000, b" 414 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * 5_000, b" 431 "),
        (b"POST /v1/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b" 413 "),
        (b"DELETE /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b" 405 "),
        (b"TRACE /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", b" 501 "),
    ],
)
def test_malformed_requests_are_refused(serve: Serve, sent: bytes, status: bytes) -> None:
    server = serve()
    path = server.home / "control.sock"
    answer = exchange(path, sent)
    assert status in answer.partition(b"\r\n")[0] or answer == b""  # a reset may have come before it
    assert ask(path, "GET", "/v1/status").status == 200


def test_random_bytes_do_not_break_the_server(serve: Serve) -> None:
    server = serve()
    path = server.home / "control.sock"
    for _ in range(50):
        try:
            with connect(path) as connection:
                connection.sendall(os.urandom(5_000))
        except OSError:
            pass
    assert ask(path, "GET", "/v1/status").status == 200
    server.until(lambda: not control(server).endpoint.connections)


def test_accept_is_retried_after_descriptor_exhaustion(serve: Serve) -> None:
    server = serve()
    path = server.home / "control.sock"
    found = control(server)

    class Exhausted:
        def _accept(self) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    exhausted: Any = Exhausted()
    paused_at = time.monotonic()
    server.in_loop(lambda: found._accept(exhausted, socket.AF_UNIX))
    for _ in range(2):  # the first waits in the backlog until the pause ends
        assert ask(path, "GET", "/v1/status").status == 200
        assert time.monotonic() - paused_at >= 0.9 * PAUSE_WHEN_EXHAUSTED


def test_connections_closed_at_once_leave_nothing_behind(serve: Serve) -> None:
    server = serve()
    path = server.home / "control.sock"
    for _ in range(300):
        connect(path).close()
    server.until(lambda: not control(server).endpoint.connections and not control(server)._adopting)
    assert ask(path, "GET", "/v1/status").status == 200


def test_idle_control_connection_does_not_delay_shutdown(serve: Serve) -> None:
    server = serve()
    with connect(server.home / "control.sock") as idle:
        eventually(lambda: len(control(server).endpoint.connections) == 1)
        server.drain()
        assert idle.recv(1) == b""


def test_closing_an_unopened_socket_leaves_the_running_one(tmp_path: Path, serve: Serve) -> None:
    server = serve()

    def open_and_close() -> None:
        other = ControlSocket(Home(server.home), server.server.state, Router())
        with pytest.raises(ConfigError):
            other.open()
        other.close()

    server.in_loop(open_and_close)
    assert (server.home / "control.sock").exists()
