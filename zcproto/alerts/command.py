"""Run a program for each message, with the message as JSON on its standard input.

Rules:
- No shell: the arguments come from the configuration alone, never from a message.
- The program gets a minimal environment, only the three standard descriptors, and its own session. After the
  timeout it is killed with everything it has started there.
- The first `MAX_OUTPUT` bytes of its output are kept for diagnosis; the rest is discarded.
- The message is delivered if the program exits with code 0.

It must not know: the content of a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Self

from zcproto.alerts.alert import clean_text
from zcproto.alerts.sinks import Undelivered
from zcproto.common.files import OTHERS_WRITE, UnusableFileError, check_access, check_place
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

MAX_OUTPUT: Final = 4_096
SHOWN: Final = 200
"""Characters of its output shown when it fails."""

TRIES: Final = 3
"""Few attempts, because a failed program may have done a part of its work."""

PASSED_ON: Final = ("PATH", "HOME", "LANG", "TZ")
"""Environment variables passed to the program. Others may contain passphrases."""

_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_READ: Final = 65_536


class Command:
    """A sink that runs a program. Raises ConfigError if it cannot be run, or others can change or replace it."""

    name = "command"

    def __init__(self, arguments: Sequence[str], *, timeout: float, environ: Mapping[str, str]) -> None:
        check_program(Path(arguments[0]))
        self._arguments = list(arguments)
        self.where = escape_text(arguments[0])
        self._timeout = timeout
        self._environ = {"PATH": _PATH, **{name: environ[name] for name in PASSED_ON if name in environ}}

    async def deliver(self, body: bytes) -> str:
        loop = asyncio.get_running_loop()
        try:
            with _file_of(body) as stdin, _Output() as output:
                process = await self._begin(loop, stdin, output.write_end)
                output.close_write_end()
                try:
                    async with asyncio.timeout(self._timeout):
                        printed = await output.read(loop)
                        code = await loop.run_in_executor(None, process.wait)
                except BaseException:
                    _kill(process)
                    await loop.run_in_executor(None, process.wait)
                    raise
        except TimeoutError:
            raise Undelivered(f"the program did not end within {self._timeout:g} s", tries=TRIES) from None
        except OSError as error:
            raise Undelivered(f"the program cannot be run: {error.strerror}", tries=TRIES) from error
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        result = f"{ended}: {printed}" if printed else ended
        if code:
            raise Undelivered(f"the program ended with {result}", tries=TRIES)
        return result

    async def _begin(
        self, loop: asyncio.AbstractEventLoop, stdin: IO[bytes], stdout: int
    ) -> subprocess.Popen[bytes]:
        # In a thread, because the disk may be slow; not with the loop's own subprocesses, because uvloop passes
        # on every inheritable descriptor, such as a listening socket of systemd.
        def run() -> subprocess.Popen[bytes]:
            return subprocess.Popen(  # noqa: S603 - the arguments come from the configuration
                self._arguments,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                env=self._environ,
                cwd="/",
                start_new_session=True,
            )

        beginning = loop.run_in_executor(None, run)
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(_kill_begun)
            raise


class _Output:
    """A pipe for the output of a program, which can be closed while another process still holds its other end."""

    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        self._file = open(read_end, "rb", buffering=0)  # noqa: SIM115 - closed at the exit
        self._transport: asyncio.BaseTransport | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_write_end()
        if self._transport is not None:
            self._transport.close()
        else:
            self._file.close()

    def close_write_end(self) -> None:
        """Close the write end, which the program has inherited."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    async def read(self, loop: asyncio.AbstractEventLoop) -> str:
        """Read until every writer has closed the pipe. Return the beginning of the output."""
        reader = asyncio.StreamReader(loop=loop)
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop), self._file
        )
        kept = b""
        while data := await reader.read(_READ):
            kept += data[: MAX_OUTPUT - len(kept)]
        return clean_text(kept.decode("utf-8", "replace").strip(), SHOWN)


def _file_of(body: bytes) -> IO[bytes]:
    """Return a file that contains the message, so that a program that does not read it blocks nothing."""
    # In memory if possible: the alert may be about a full disk.
    in_memory = hasattr(os, "memfd_create")
    file: IO[bytes] = open(os.memfd_create("alert"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(body + b"\n")
    file.seek(0)
    return file


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the program with everything in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill_begun(beginning: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """Kill a program whose start was cancelled."""
    if not beginning.cancelled() and beginning.exception() is None:
        process = beginning.result()
        _kill(process)
        process.wait()


def check_program(path: Path) -> None:
    """Raise ConfigError unless this user may run the program, and others can neither change nor replace it."""
    key = "alerts.command"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not os.access(path, os.X_OK):
            raise ConfigError([f"{key}: {escape_text(str(path))} is not a program that this user may run"])
        check_access(path, status, OTHERS_WRITE)
        check_place(path)
    except OSError as error:
        raise ConfigError([f"{key}: {escape_text(str(path))} cannot be run: {error.strerror}"]) from error
    except UnusableFileError as error:
        raise ConfigError([f"{key}: {error}"]) from error
