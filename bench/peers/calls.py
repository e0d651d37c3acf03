"""The CPU that a call costs the client: zcproto's own client and that of websockets, in turns on one processor.

That of websockets runs twice: with its defaults, which compress messages, and without compression.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers.environment import Environment
from bench.stage import CLIENT_CPU, bench_environment
from zcproto.common.text import escape_text
from zcproto.errors import ZcprotoError
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor

OWN: Final = "zcproto"
COMPRESSING: Final = "websockets"
PLAIN: Final = "websockets without compression"

DEPTHS: Final = (1, 16)
"""Calls in flight on one connection."""

CALLS: Final = {1: 800, 16: 3_200}
"""Calls in a slice."""

START_S: Final = 30.0
SLICE_S: Final = 60.0
LINES_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Target:
    """A running server, and what its client needs."""

    port: int
    ca_file: Path
    payload_bytes: int


class Caller:
    """A process with one client that makes calls in slices."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: Path) -> None:
        self.name = name
        self._process = process
        self._errors = errors
        self._line(START_S)

    def cost(self, count: int, depth: int) -> float:
        """Make calls, and return the microseconds of CPU that each cost the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count} {depth}\n".encode())
        self._process.stdin.flush()
        return float(self._line(SLICE_S))

    def _line(self, limit: float) -> str:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], limit)
        line = self._process.stdout.readline().decode() if readable else ""
        if not line:
            said = " / ".join(self._errors.read_text(errors="replace").splitlines()[-LINES_SHOWN:])
            raise ZcprotoError(f"the client of {self.name} has failed: {escape_text(said, 500)}")
        return line


@contextlib.contextmanager
def run_caller(
    name: str, python: Path | str, module: str, arguments: list[str], log: Path
) -> Iterator[Caller]:
    """Run a client until the end of the block."""
    command = [str(python), "-P", "-m", f"bench.peers.callers.{module}", *arguments]
    with on_processor(CLIENT_CPU), log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=bench_environment()
        )
    try:
        yield Caller(name, process, log)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def run_callers(
    own: Target, websockets: Target, user: Credential, environment: Environment, folder: Path
) -> Iterator[list[Caller]]:
    """Run the client of zcproto, and that of websockets with and without compression."""
    arguments = [str(own.port), str(own.ca_file), *user, str(own.payload_bytes)]
    theirs = [str(websockets.port), str(websockets.ca_file), str(websockets.payload_bytes)]
    programs: tuple[tuple[str, Path | str, str, list[str]], ...] = (
        (OWN, sys.executable, "zcproto_client", arguments),
        (COMPRESSING, environment.python, "websockets_client", [*theirs, "deflate"]),
        (PLAIN, environment.python, "websockets_client", [*theirs, "none"]),
    )
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(run_caller(*program, folder / f"callers.{number}"))
            for number, program in enumerate(programs)
        ]


def measure_calls(callers: Sequence[Caller], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return the microseconds of a call by depth and client, a figure for each round."""
    found: dict[int, dict[str, list[float]]] = {
        depth: {caller.name: [] for caller in callers} for depth in DEPTHS
    }
    for _, depth in itertools.product(range(rounds), DEPTHS):
        for caller in callers:
            found[depth][caller.name].append(caller.cost(CALLS[depth], depth))
    return found
