"""Programs of others as witnesses: how they are built and run, and what came of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCES = Path(__file__).parent / "programs"

PATIENCE = 30.0
"""Seconds after which a program that hangs is ended."""

HEADER_START = 8
"""Bytes of a frame's length, version, kind and flags."""


class Outcome(NamedTuple):
    """What a client did. `start` is what it received first; `said` is all that it told of itself."""

    code: int
    start: bytes
    said: str


def run(command: Sequence[str | Path], log: Path | None = None) -> Outcome:
    """Run a client until it has written the first bytes that it received, or has ended.

    Its standard input stays open till then: some leave at its end. `log` is a file in which it tells more.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        guard = threading.Timer(PATIENCE, process.kill)
        guard.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            start = process.stdout.read(HEADER_START)
            process.stdin.close()
            process.stdout.close()  # the rest of the frame is nobody's: a client that writes it must not wait
            code = process.wait()
        finally:
            guard.cancel()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if log is not None:
        said += log.read_text(errors="replace")
    return Outcome(code, start, said)


def run_command(command: Sequence[str | Path]) -> tuple[int, str]:
    """Run a command on files; return its exit code and its output."""
    done = subprocess.run(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout.decode(errors="replace")


class Programs:
    """The small clients in the folder `programs`, built into another folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def go(self) -> list[str | Path]:
        """The Go program. Building it makes Go's own TLS, too: some 15 seconds on the first time, then none."""
        program = self._folder / "welcome-go"
        if not program.exists():
            # Nothing is fetched, no C compiler is wanted, and nobody's settings count.
            build = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}
            if "HOME" not in os.environ:
                build["GOCACHE"] = str(self._folder / "go-cache")
            self._build(["go", "build", "-o", program, SOURCES / "welcome.go"], build)
        return [program]

    def java(self) -> list[str | Path]:
        if not (self._folder / "Welcome.class").exists():
            self._build(["javac", "-Xlint:all", "-Werror", "-d", self._folder, SOURCES / "Welcome.java"])
        return ["java", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp", self._folder, "Welcome"]

    def node(self) -> list[str | Path]:
        return ["node", SOURCES / "welcome.mjs"]

    def _build(self, command: Sequence[str | Path], changes: dict[str, str] | None = None) -> None:
        done = subprocess.run(
            [*map(str, command)],
            env={**os.environ, **(changes or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=4 * PATIENCE,
        )
        if done.returncode:
            pytest.fail(f"{command[0]}: {done.stdout}{done.stderr}")


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def needs(*commands: str) -> pytest.MarkDecorator:
    """Skips a test whose witness is not installed, before anything is made for it."""
    missing = [command for command in commands if shutil.which(command) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed here, and `.ci/run` installs it: {', '.join(missing)}"
    )
