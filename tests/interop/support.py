"""Build and run clients and checkers of other TLS stacks."""

from __future__ import annotations

import functools
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

from tests.limits import TIMEOUT

SOURCES = Path(__file__).parent / "programs"

CRATES = Path("/usr/share/cargo/registry")
"""The crates of Debian's packages."""

CARGO_CONFIG = f"""
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "{CRATES}"
"""
CARGO_MANIFEST = """
[package]
name = "welcome"
version = "0.1.0"
edition = "2021"
[[bin]]
name = "welcome"
path = "main.rs"
[dependencies]
rustls = { version = "0.23", default-features = false, features = ["ring", "std"] }
"""

HEADER_START = 8
"""Size of a frame's length, version, kind and flags."""


class Outcome(NamedTuple):
    """Exit code of a client, the first bytes that it received, and its log output."""

    code: int
    start: bytes
    output: str


def run_client(command: Sequence[str | Path], log: Path | None = None) -> Outcome:
    """Run a client until it has written the first bytes that it received, or has exited.

    Its standard input stays open until then because some clients exit at its end. `log` is a file with more output.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        guard = threading.Timer(TIMEOUT, process.kill)
        guard.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            start = process.stdout.read(HEADER_START)
            process.stdin.close()
            process.stdout.close()  # so that a client that writes the rest of the frame does not block
            code = process.wait()
        finally:
            guard.cancel()
        errors.seek(0)
        output = errors.read().decode(errors="replace")
    if log is not None:
        output += log.read_text(errors="replace")
    return Outcome(code, start, output)


def run_command(command: Sequence[str | Path]) -> tuple[int, str]:
    """Run a command and return its exit code and output."""
    done = subprocess.run(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout.decode(errors="replace")


class Programs:
    """The clients of the folder `programs`, built into another folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def go(self) -> list[str | Path]:
        """Build the Go program. The first build compiles Go's TLS library, which takes about 15 seconds."""
        program = self._folder / "welcome-go"
        if not program.exists():
            # Build without downloads, a C compiler, or the user's settings.
            build = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}
            if "HOME" not in os.environ:
                build["GOCACHE"] = str(self._folder / "go-cache")
            self._build(["go", "build", "-o", program, SOURCES / "welcome.go"], build)
        return [program]

    def java(self) -> list[str | Path]:
        if not (self._folder / "Welcome.class").exists():
            self._build(["javac", "-Xlint:all", "-Werror", "-d", self._folder, SOURCES / "Welcome.java"])
        return ["java", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp", self._folder, "Welcome"]

    def c(self, name: str, *libraries: str) -> list[str | Path]:
        """Build a program in C."""
        program = self._folder / name
        if not program.exists():
            flags = ["-Wall", "-Wextra", "-Werror", *(f"-l{library}" for library in libraries)]
            self._build(["cc", "-o", program, SOURCES / f"{name}.c", *flags])
        return [program]

    def rust(self) -> list[str | Path]:
        """Build the Rust program with Debian's packages of the crates, without downloads."""
        folder = self._folder / "welcome-rust"
        if not folder.exists():
            (folder / ".cargo").mkdir(parents=True)
            (folder / ".cargo" / "config.toml").write_text(CARGO_CONFIG)
            (folder / "Cargo.toml").write_text(CARGO_MANIFEST)
            shutil.copy(SOURCES / "welcome.rs", folder / "main.rs")
        program = folder / "target" / "debug" / "welcome"
        if not program.exists():
            self._build(["cargo", "build", "--offline", "--quiet"], folder=folder)
        return [program]

    def node(self) -> list[str | Path]:
        return ["node", SOURCES / "welcome.mjs"]

    def _build(
        self,
        command: Sequence[str | Path],
        changes: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        done = subprocess.run(
            [*map(str, command)],
            cwd=folder,
            env={**os.environ, **(changes or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        if done.returncode:
            pytest.fail(f"{command[0]}: {done.stdout}{done.stderr}")


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


VERSIONED = {"cargo": "--version", "go": "version", "javac": "--version", "node": "--version"}
"""Programs that may be the shim of a version manager, which fails without a version for this user."""


@functools.cache
def is_present(command: str) -> bool:
    """Return whether a command is installed and runs; or whether an absolute path exists."""
    if command.startswith("/"):
        return any(Path("/").glob(command[1:]))
    if shutil.which(command) is None:
        return False
    version = VERSIONED.get(command)
    return (
        version is None or not subprocess.run([command, version], capture_output=True, check=False).returncode
    )


def needs(*commands: str) -> pytest.MarkDecorator:
    """Skip a test before its fixtures are set up if a command or an absolute path is not present."""
    missing = [command for command in commands if not is_present(command)]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed (.ci/run installs it): {', '.join(missing)}"
    )
