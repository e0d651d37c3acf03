"""`zcproto serve --reload`: the server starts again when a file has changed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zcproto
from tests.helpers import variables
from tests.server.helpers import PATIENT, PATIENT_CLIENT, ROOT, TIMEOUT, eventually
from zcproto import BlockingClient, connect_blocking
from zcproto.cli import autoreload, main
from zcproto.cli.autoreload import supervise

Capture = pytest.CaptureFixture[str]

APP = """
from zcproto import App

app = App()


@app.method("answer", public=True)
def answer() -> int:
    return {answer}
"""


LISTENS = re.compile(r"listen(?:ing|s) on (?:127\.0\.0\.1|localhost):(\d+)\b.*\n")


class Reloading:
    """`zcproto serve --reload` of an application in a folder."""

    def __init__(self, folder: Path, certs: Path, *options: str) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(0o700)
        shutil.copytree(certs, self.home / "certs")
        (self.home / "config.toml").write_text("[certificates]\nkey_types = ['ecdsa-p256']\n")
        self.write(APP.format(answer=1))
        self._output = open(folder / "output", "w")  # noqa: SIM115 - closed by `close`
        command = ["--home", str(self.home), "serve", "shop:app", "--reload", "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zcproto", *command],
            stdout=self._output,
            stderr=self._output,
            cwd=folder,
            env={**os.environ, **variables(PATIENT), "PYTHONPATH": str(ROOT)},
        )

    def wait_until_listening(self) -> None:
        eventually(lambda: LISTENS.search(self.output))
        self.port = int(LISTENS.findall(self.output)[0])

    def write(self, text: str) -> None:
        (self.folder / "shop.py").write_text(text)

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def answer(self) -> Any:
        with self.client() as client:
            return client.call("answer")

    def client(self) -> BlockingClient:
        ca_file = self.home / "certs" / "ca.crt"
        return connect_blocking(f"localhost:{self.port}", ca_file=ca_file, home=self.home, **PATIENT_CLIENT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        self._output.close()


@pytest.fixture
def reloading(tmp_path: Path, certs: Path, request: pytest.FixtureRequest) -> Iterator[Reloading]:
    server = Reloading(tmp_path, certs, *getattr(request, "param", ()))
    try:
        server.wait_until_listening()
        yield server
    finally:
        server.close()
        print(server.output)  # shown if the test has failed


with_and_without_workers = pytest.mark.parametrize(
    "reloading", [(), ("--workers", "2")], indirect=True, ids=["one process", "workers"]
)


@with_and_without_workers
def test_changed_application_is_served_at_the_same_port(reloading: Reloading) -> None:
    assert reloading.answer() == 1
    reloading.write(APP.format(answer=22))
    eventually(lambda: reloading.output.count("listening on") == 2)
    assert "changed: shop.py; starting again" in reloading.output
    assert reloading.answer() == 22
    reloading.process.send_signal(signal.SIGINT)
    assert reloading.process.wait(TIMEOUT) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", reloading.port))


def test_syntax_error_is_shown_and_the_next_change_repairs_it(reloading: Reloading) -> None:
    reloading.write("from zcproto import App\napp = App(\n")
    eventually(lambda: "it starts again after a change" in reloading.output)
    assert "shop cannot be imported; correct what it raises:" in reloading.output
    assert 'File "' in reloading.output
    assert "SyntaxError: '(' was never closed" in reloading.output
    assert reloading.process.poll() is None
    with socket.create_connection(("127.0.0.1", reloading.port)):  # waits for the next server
        reloading.write(APP.format(answer=3))
        assert reloading.answer() == 3


def test_client_waits_while_the_server_starts_again(reloading: Reloading) -> None:
    with reloading.client() as client:
        for number in range(2, 5):
            reloading.write(APP.format(answer=number))
            eventually(lambda: client.call("answer") == number)  # noqa: B023 - evaluated in this turn


@with_and_without_workers
def test_server_ends_if_its_parent_is_killed(reloading: Reloading) -> None:
    reloading.process.kill()
    # Linux sends the signal again if the server passes to another thread of its parent, which dies later: the
    # second one forces the end (prctl(2), PR_SET_PDEATHSIG).
    eventually(lambda: re.search(r"server\.(ended|forced)", reloading.output))


# --- faults ----------------------------------------------------------------------------------------------


def test_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    monkeypatch.chdir(tmp_path)
    assert main(["--home", str(tmp_path), "serve", "shop:app", "--reload"]) == 1
    assert capsys.readouterr().err == (
        "zcproto: the Python package watchfiles is required and not installed;"
        ' run in a clone of zcproto: pip install ".[reload]"\n'
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--reload-dir", "x"], "--reload-dir goes with --reload."),
        (
            ["--reload", "--reload-dir", "nowhere"],
            "nowhere: no such folder; give --reload-dir one that exists",
        ),
    ],
)
def test_wrong_folders_are_refused(
    tmp_path: Path, capsys: Capture, options: list[str], complaint: str
) -> None:
    assert main(["--home", str(tmp_path), "serve", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_folder_that_cannot_be_watched_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def no_watches(start: Any, changes: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(autoreload, "supervise", no_watches)
    monkeypatch.chdir(tmp_path)
    assert main(["--home", str(tmp_path), "serve", "--port", "0", "--reload"]) == 2
    assert (
        "the files cannot be watched: No space left on device; choose smaller folders"
        in capsys.readouterr().err
    )


class FakeServer:
    """A process that ends when it should, or only if it is killed."""

    def __init__(self, *, ends: bool = True, has_ended: bool = False) -> None:
        self.ends = ends
        self.code: int | None = 1 if has_ended else None
        self.killed = False

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        if self.ends:
            self.code = 0

    def kill(self) -> None:
        self.killed, self.code = True, -9

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("server", timeout or 0)
        return self.code


def test_server_that_does_not_end_is_killed(capsys: Capture) -> None:
    servers = [FakeServer(ends=False), FakeServer()]
    started = iter(servers)
    supervise(lambda: next(started), iter([["/a/b.py"], []]))  # type: ignore[arg-type, return-value]
    assert servers[0].killed
    assert not servers[1].killed
    assert servers[1].code == 0
    assert capsys.readouterr().err == "zcproto: changed: b.py; starting again\n"


def test_ended_server_is_reported_once_and_files_are_listed_up_to_three(capsys: Capture) -> None:
    servers = iter([FakeServer(has_ended=True), FakeServer()])
    changed = [f"/a/{name}.py" for name in "edcba"]
    supervise(lambda: next(servers), iter([[], [], changed]))  # type: ignore[arg-type, return-value]
    assert capsys.readouterr().err == (
        "zcproto: the server has ended; it starts again after a change\n"
        "zcproto: changed: a.py, b.py, c.py, ...; starting again\n"
    )


@pytest.mark.parametrize("reloading", [("--dev",)], indirect=True)
def test_dev_prints_one_line_for_each_start_and_each_request(reloading: Reloading) -> None:
    assert reloading.answer() == 1
    reloading.write(APP.format(answer="'no int'"))
    eventually(lambda: reloading.output.count("listens on") == 2)
    with pytest.raises(zcproto.InternalError):
        reloading.answer()
    eventually(lambda: "result must be an int" in reloading.output)
    patterns = [
        r"zcproto: shop:app listens on localhost:\d+: answer",
        r"\d\d:\d\d:\d\d -  answer  \d+\.\d ms",
        r"zcproto: changed: shop\.py; starting again",
        r"zcproto: shop:app listens on localhost:\d+: answer",
        r"\S+ -  answer  \d+\.\d ms  INTERNAL: the result is not int, as annotated: result must be an int",
    ]
    lines = reloading.output.splitlines()
    for pattern, line in zip(patterns, lines, strict=False):
        assert re.fullmatch(pattern, line), line
