"""The programs in the README and in docs/applications.md run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.messages import ROOT


def write_programs(page: Path, folder: Path, port: int) -> None:
    """Write each block of Python that is introduced by its file name."""
    found = re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    for name, text in found:
        (folder / name).write_text(text.replace("localhost:7443", f"localhost:{port}"))


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    environ = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    environ.pop("ZCPROTO_HOME", None)
    return environ


@contextmanager
def serving(folder: Path, port: int, *command: str) -> Iterator[None]:
    """Run a server with its home in `folder`, and a user ada whose key is in ada.key."""
    (folder / "ada.key").touch(0o600)
    (folder / "ada.key").write_text(run(folder, "-m", "zcproto", "user", "add", "ada"))
    environ = {**environment(folder), "ZCPROTO_SERVER__PORT": str(port)}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while "server.listening" not in (folder / "log").read_text():
                assert process.poll() is None, (folder / "log").read_text()
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.05)
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path, certs: Path) -> Path:
    home = tmp_path / ".zeroclaw"
    home.mkdir(0o700)
    shutil.copytree(certs, home / "certs")
    return tmp_path


INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q .\n"


def test_readme_blocks_run_by_one_paste_in_an_empty_folder(tmp_path: Path, port: int) -> None:
    page = (ROOT / "README.md").read_text()
    section = page[page.index("## A server and a client") : page.index("## 10,000 connections")]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    pasted = "".join(blocks).replace("localhost:7443", f"localhost:{port}")
    assert pasted.count(INSTALL) == 1
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("python", ""), ("zcproto", " -m zcproto")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (programs / name).chmod(0o755)
    environ = environment(tmp_path) | {
        "ZCPROTO_SERVER__PORT": str(port),
        "ZCPROTO_CERTIFICATES__KEY_TYPES": "ecdsa-p256",
    }
    done = subprocess.run(
        ["bash"],  # reads what is pasted from its standard input, like a terminal
        input=pasted.replace(INSTALL, ""),
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if "hello" in line]
    assert answers == ['"hello, anyone"', '"hello shell (asked by ada)"', "hello world (asked by ada)"], (
        done.stderr
    )
    assert done.returncode == 0, done.stderr


def test_application_guide_programs_run(folder: Path, port: int) -> None:
    write_programs(ROOT / "docs" / "applications.md", folder, port)
    with serving(folder, port, "-m", "zcproto", "serve", "shop:app"):
        assert run(folder, "buy.py") == "40\nonly 12 left; order fewer {'left': 12}\n"
        assert run(folder, "gate.py") == "12\nada None\n"
        assert run(folder, "beside.py") == "12\n['eve']\n"
        assert "welcome" in run(folder, "-m", "zcproto", "call", f"localhost:{port}", "greeting")


def test_application_guide_test_passes(folder: Path, port: int) -> None:
    write_programs(ROOT / "docs" / "applications.md", folder, port)
    assert "1 passed" in run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py")
