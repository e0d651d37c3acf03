"""A server in a process of its own, that never outlives its parent."""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from zcproto.common.text import escape_text
from zcproto.errors import ZcprotoError
from zcproto.load.processes import module_command, module_environment, uninterrupted

READY: Final = "zcproto: listening on "
START_TIMEOUT: Final = 90.0
"""Seconds until it listens. Finding two primes of 2,048 bits is a matter of luck, and machines differ."""

IN_MEMORY: Final = {"ZCPROTO_STORE__URL": "memory"}
"""A demonstration measures the server and not a disk. The environment of who asks for it wins."""

END_TIMEOUT: Final = 15.0
LINES_SHOWN: Final = 5


class DemoServer:
    """`zcproto serve` for a home folder, as a context manager. `port` is where it listens, on 127.0.0.1.

    `store` is the address of its store of sessions; None is that of the environment, else memory. It may be started
    again when it has ended.
    """

    def __init__(self, home: Path, store: str | None = None) -> None:
        self._home = home
        self._store = {} if store is None else {"ZCPROTO_STORE__URL": store}
        self._errors = home / "server.err"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        try:
            with uninterrupted(), self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    module_command("zcproto.load.demo.child", str(self._home)),
                    stdin=subprocess.PIPE,  # its end tells the child that we are gone
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**IN_MEMORY, **module_environment(), **self._store},
                    start_new_session=True,  # Ctrl-C is for us: the server is wanted until the report is done
                )
            self.port = self._wait_ready(self._process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Of its process, as long as it runs."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it at once, with no moment to do anything."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT
        said = b""
        while not said.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise ZcprotoError(f"the server was not ready within {START_TIMEOUT:.0f} s")
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                raise ZcprotoError(f"the server did not start: {self._last_words()}")
            said += data
        first = said.decode(errors="replace").splitlines()[0]
        if not first.startswith(READY):
            raise ZcprotoError(f"the server said {escape_text(first, 200)!r} instead of where it listens")
        return int(first.rpartition(":")[2])

    def _last_words(self) -> str:
        lines = self._errors.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        return " / ".join(escape_text(line, 500) for line in lines) or "it did not say why"

    def _end(self) -> None:
        """Drain it, and if that does not help, kill it."""
        process = self._process
        if process is None:  # it could not be started
            return
        with uninterrupted():
            process.terminate()
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
