"""`zcproto health`: a running server, none, and one that does not answer."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.capabilities import obeying_file_modes
from tests.server.conftest import Serve
from tests.server.helpers import ROOT, TIMEOUT, ServerThread, eventually
from tests.server.process import ServerProcess
from zcproto.cli import main
from zcproto.common.unix_socket import listen_unix

Capture = pytest.CaptureFixture[str]

health = importlib.import_module("zcproto.cli.health")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "of-commands"
    path.mkdir(0o700)
    monkeypatch.setenv("ZCPROTO_HOME", str(path))
    return path


@contextmanager
def answering(home: Path, *parts: bytes) -> Iterator[None]:
    """A server that sends some bytes to its first client and ends the connection."""

    def serve() -> None:
        with listening.accept()[0] as connection:
            connection.recv(1000)
            with suppress(OSError):  # the client may have left
                for part in parts:
                    connection.sendall(part)

    with listen_unix(home / "control.sock", 1) as listening:
        listening.settimeout(TIMEOUT)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def failed(capsys: Capture, *args: str) -> str:
    """Return the one line of a failed check."""
    assert main(["health", *args]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.strip()


def test_running_server_is_healthy_and_ready(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(serve().home))
    assert main(["health"]) == 0
    assert main(["health", "--ready"]) == 0
    assert capsys.readouterr() == ("the server answers\nready\n", "")


def test_draining_server_is_healthy_but_not_ready(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server: ServerThread = serve()
    monkeypatch.setenv("ZCPROTO_HOME", str(server.home))
    server.in_loop(lambda: setattr(server.server.state, "draining", True))
    assert main(["health"]) == 0
    assert capsys.readouterr().out == "the server answers\n"
    assert failed(capsys, "--ready") == "zcproto: not ready: draining: the server is stopping"


def test_server_with_workers_is_ready(tmp_path: Path, certs: Path, capsys: Capture) -> None:
    home = tmp_path / "home"
    with ServerProcess(home, certs, "--workers", "2"):
        # It listens a moment before the coordinator has asked the workers.
        eventually(lambda: main(["health", "--ready", "--home", str(home)]) == 0)
    printed = capsys.readouterr()
    assert printed.out == "ready\n"
    assert set(printed.err.splitlines()) <= {"zcproto: not ready: workers: none has answered"}


def test_no_server_is_one_line_and_exit_code_1(home: Path, capsys: Capture) -> None:
    expected = f"zcproto: no server runs with the home folder {home}; start one, or use --home"
    assert failed(capsys) == expected
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(home / "control.sock"))
    assert failed(capsys) == expected
    assert failed(capsys, "--home", str(home / "missing")).startswith("zcproto: no server runs")


def test_hung_server_fails_within_the_limit(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(health, "LIMIT_S", 0.05)
    with listen_unix(home / "control.sock", 0):
        assert "did not answer within 0.05 s" in failed(capsys)
        # The first connection fills the backlog: the second check cannot even connect.
        assert "did not answer within 0.05 s" in failed(capsys)


def test_server_that_sends_byte_by_byte_cannot_extend_the_limit(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    times = iter(range(100))
    monkeypatch.setattr(health, "LIMIT_S", 2.0)
    monkeypatch.setattr(health, "system_clock", type("Clock", (), {"now": lambda: float(next(times))}))
    with answering(home, b"H", b"T"):
        assert "did not answer within 2 s" in failed(capsys)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", "the server ended the connection"),
        (b"SSH-2.0-x\r\n", "the server ended the connection"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "you are not allowed"),
        (b"HTTP/1.1 503 Unavailable\r\n\r\n", "not ready: the server answered 503"),
        (b"HTTP/1.1 200 OK\r\n\r\n{", "the answer of the server cannot be read"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", "the answer of the server cannot be read"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"ready": false, "reasons": []}', "not ready: no worker serves"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"ready": false, "reasons": ["a\\u001b", "b"]}', r"not ready: a\x1b; b"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000, "the answer of the server cannot be read"),
    ],
)
def test_answers_of_other_programs_are_failures(
    answer: bytes, expected: str, home: Path, capsys: Capture
) -> None:
    with answering(home, answer[:60_000], answer[60_000:65_537]):
        assert expected in failed(capsys, "--ready")


def test_folder_of_another_user_is_a_failure(home: Path, capsys: Capture) -> None:
    with listen_unix(home / "control.sock", 1), obeying_file_modes():
        home.chmod(0o000)
        try:
            assert "you are not allowed" in failed(capsys)
        finally:
            home.chmod(0o700)


def test_other_errors_of_the_system_are_a_failure(home: Path, capsys: Capture) -> None:
    (home / "control.sock").symlink_to("control.sock")
    assert "the server cannot be asked: " in failed(capsys)


def test_probe_imports_little(home: Path) -> None:
    program = "import sys; from zcproto.cli import main; main(['health']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT, check=True, cwd=ROOT
    )
    heavy = {
        "asyncio",
        "cryptography",
        "http.client",
        "msgpack",
        "pydantic",
        "ssl",
        "uvloop",
        "zcproto.config",
    }
    assert heavy.isdisjoint(done.stdout.split())
