"""The three lines of a first start."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.server.helpers import TIMEOUT
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.config.model import CertificatesConfig
from zcproto.runtime.first_start import FirstStart


def server_at(home: Path, **certificates: Any) -> Any:
    config = Config(certificates=CertificatesConfig(directory=home / "certs", **certificates))
    names = ("localhost", "vm", "127.0.0.1", "::1", "192.0.2.7")
    return SimpleNamespace(
        home=Home(home), config=config, port=7443, certificates=[SimpleNamespace(names=names)]
    )


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `zcproto` in PATH."""
    folder = tmp_path.with_name(f"{tmp_path.name}-bin")
    folder.mkdir()
    (folder / "zcproto").touch(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def lines_of(server: Any) -> tuple[list[str], list[str]]:
    """Run through a start; return the lines on the terminal, and the sentences that were passed on."""
    terminal, sentences = io.StringIO(), []
    first = FirstStart(sentences.append, terminal)
    first.begin(server.config, server.home)
    first.progress("Issued it.")
    first.ready(server.certificates[0].names, server.port)
    first.progress("Renewed it.")
    return terminal.getvalue().splitlines(), sentences


def test_first_start_prints_three_lines_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path))
    assert lines_of(server_at(tmp_path)) == (
        [
            f"zcproto: first start: creating {tmp_path} with keys and certificates; RSA keys take some seconds",
            f"zcproto: clients trust {tmp_path}/certs/ca.crt; the server is localhost, vm, 127.0.0.1, ::1"
            " and 1 more name",
            "zcproto: next, in another terminal: zcproto user add ada --out ada.key",
        ],
        ["Renewed it."],
    )


def test_next_command_is_a_call_if_there_are_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZCPROTO_HOME", raising=False)
    (tmp_path / "users.toml").touch()
    lines, _ = lines_of(server_at(tmp_path))
    assert lines[2] == (
        f"zcproto: next, in another terminal: zcproto --home {tmp_path} call localhost:7443 server.info"
    )


def test_next_command_runs_without_an_activated_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    lines, _ = lines_of(server_at(tmp_path))
    python = shlex.quote(sys.executable)
    assert lines[2].endswith(f": {python} -m zcproto user add ada --out ada.key")


def test_later_start_passes_the_progress_on(tmp_path: Path) -> None:
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / "ca.crt").touch()
    assert lines_of(server_at(tmp_path)) == ([], ["Issued it.", "Renewed it."])


def test_external_certificates_are_not_created(tmp_path: Path) -> None:
    external = {"mode": "files", "certificate": [tmp_path / "a.crt"], "key": [tmp_path / "a.key"]}
    assert lines_of(server_at(tmp_path, **external)) == ([], ["Issued it.", "Renewed it."])


def test_without_a_terminal_the_progress_is_passed_on(tmp_path: Path) -> None:
    sentences: list[str] = []
    first = FirstStart(sentences.append, None)
    server = server_at(tmp_path)
    first.begin(server.config, server.home)
    first.progress("Issued it.")
    first.ready(["localhost"], 7443)
    assert sentences == ["Issued it."]


def test_program_on_a_terminal_prints_them_among_its_log(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    program = "import zcproto; app = zcproto.App(); zcproto.serve(app)"
    environ = {
        **os.environ,
        "ZCPROTO_HOME": str(tmp_path / "home"),
        "ZCPROTO_SERVER__PORT": "0",
        "ZCPROTO_CERTIFICATES__KEY_TYPES": "ecdsa-p256",
    }
    with subprocess.Popen([sys.executable, "-c", program], env=environ, stderr=theirs) as process:
        try:
            os.close(theirs)
            seen = b""
            while b"next, in another terminal" not in seen:
                seen += os.read(ours, 4096)  # fails when the process has ended
            process.terminate()
            with contextlib.suppress(OSError):  # the end of the process
                while True:
                    os.read(ours, 4096)
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()
    os.close(ours)
    lines = [line for line in seen.decode().splitlines() if line.startswith("zcproto: ")]
    assert len(lines) == 3
    assert lines[0].startswith(f"zcproto: first start: creating {tmp_path}/home")
