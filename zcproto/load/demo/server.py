"""A server in a separate process that never outlives its parent."""

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
"""Seconds until it listens. The time to generate an RSA-4096 key is random and depends on the machine."""

IN_MEMORY: Final = {"ZCPROTO_STORE__URL": "memory"}
"""Measure the server and not a disk, unless the caller's environment sets a store."""

END_TIMEOUT: Final = 15.0
LINES_SHOWN: Final = 5


class DemoServer:
    """`zcproto serve` in a home folder, as a context manager. It listens on `port` of 127.0.0.1; 0 is any free one.

    `store` is the URL of its session store, by default that of the environment, or else memory. `app` is a
    MODULE:APP, by default the built-in one. It can be started again after it has ended.
    """

    def __init__(self, home: Path, store: str | None = None, app: str | None = None, port: int = 0) -> None:
        self._arguments = [str(home), "--port", str(port), *(() if app is None else (app,))]
        self._store = {} if store is None else {"ZCPROTO_STORE__URL": store}
        self._errors = home / "server.err"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        try:
            with uninterrupted(), self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    module_command("zcproto.load.demo.child", *self._arguments),
                    stdin=subprocess.PIPE,  # closed when this process ends, which ends the child
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**IN_MEMORY, **module_environment(), **self._store},
                    start_new_session=True,  # Ctrl-C must not stop the server before the report
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
        """The process id while it runs."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the process without a drain."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT
        output = b""
        while not output.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise ZcprotoError(
                    f"the server was not ready within {START_TIMEOUT:.0f} s; try again on a less busy machine"
                )
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                raise ZcprotoError(f"the server did not start: {self._last_lines()}")
            output += data
        first = output.decode(errors="replace").splitlines()[0]
        if not first.startswith(READY):
            raise ZcprotoError(f"the server printed {escape_text(first, 200)!r} instead of its address")
        return int(first.rpartition(":")[2])

    def _last_lines(self) -> str:
        lines = self._errors.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        return " / ".join(escape_text(line, 500) for line in lines) or "it printed no error"

    def _end(self) -> None:
        """Drain the server, or kill it after END_TIMEOUT."""
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
