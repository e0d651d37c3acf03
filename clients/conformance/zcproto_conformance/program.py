"""The client's program as a process: sends steps, receives answers, and searches all output for secrets.

One process serves many checks. After it hung or died, call `stop`; the next step starts another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from zcproto_conformance.errors import CheckFailed, KitError, Unsupported

MAX_LINE: Final = 8 * 1024 * 1024
STDERR_KEPT: Final = 8_192
STDERR_SHOWN: Final = 2_000
STOP_SECONDS: Final = 5.0


class StepFailed(Exception):
    """The program answered a step with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(json.dumps(error))
        self.error = error
        self.kind = str(error.get("kind"))


class Program:
    """Runs the client's command. `on_line` is called with each line sent or received."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stop_seconds: float = STOP_SECONDS,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self._command = list(command)
        self._stop_seconds = stop_seconds
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._failure = "it was not started"
        self._stderr = b""
        self.secrets: set[str] = set()
        self.leaked = False

    async def _start(self) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=MAX_LINE,
            )
        except OSError as error:
            raise KitError(f"cannot run {self._command[0]}: {error.strerror}") from error
        self._process = process
        self._stderr = b""
        self._readers = [
            asyncio.create_task(self._read_answers(process)),
            asyncio.create_task(self._read_stderr(process)),
        ]
        return process

    async def _read_answers(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        failure: str | None = None
        while failure is None:
            try:
                line = await process.stdout.readline()
            except ValueError:
                failure = f"it wrote a line of more than {MAX_LINE} bytes"
            else:
                failure = self._receive_answer(line) if line else "its standard output ended"
        self._failure = failure
        for future in self._pending.values():
            if not future.done():
                future.set_exception(CheckFailed(f"the program failed: {failure}"))
                future.exception()  # mark it as retrieved: not every step is awaited
        self._pending.clear()

    def _receive_answer(self, line: bytes) -> str | None:
        """Resolve the step that an answer belongs to. Return what is wrong with the answer, or None."""
        text = line.decode("utf-8", "replace").rstrip("\n")
        self._search_secrets(text)
        if self._on_line is not None:
            self._on_line(f"<- {text}")
        try:
            answer = json.loads(text)
        except ValueError:
            return f"it wrote a line that is not JSON: {text[:200]!r}"
        if not isinstance(answer, dict) or not isinstance(answer.get("id"), int):
            return f"it wrote a line without an id: {text[:200]!r}"
        if not any(key in answer for key in ("ok", "error", "unsupported")):
            return f"it wrote an answer with neither ok nor error: {text[:200]!r}"
        future = self._pending.pop(answer["id"], None)
        if future is None:
            return f"it answered step {answer['id']}, which is not pending"
        if future.done():
            return None
        if "unsupported" in answer:
            future.set_exception(Unsupported(f"unsupported: {answer['unsupported']}"))
        elif isinstance(answer.get("error"), dict):
            future.set_exception(StepFailed(answer["error"]))
        elif "error" in answer:
            future.set_exception(CheckFailed(f"its error is not an object: {text[:200]!r}"))
        else:
            future.set_result(answer["ok"])
        future.exception()  # mark it as retrieved: not every step is awaited
        return None

    async def _read_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while data := await process.stderr.read(STDERR_KEPT):
            before, self._stderr = self._stderr, (self._stderr + data)[-STDERR_KEPT:]
            self._search_secrets((before + data).decode("utf-8", "replace"))
            if self._on_line is not None:
                self._on_line("!! " + data.decode("utf-8", "replace").rstrip("\n"))

    def _search_secrets(self, text: str) -> None:
        if any(secret in text for secret in self.secrets):
            self.leaked = True

    @property
    def has_failed(self) -> bool:
        """Whether it was started and no longer answers."""
        return self._process is not None and self._readers[0].done()

    async def wait_ended(self) -> NoReturn:
        """Wait until it no longer answers. Raises CheckFailed then."""
        await asyncio.wait(self._readers[:1])
        raise CheckFailed(f"the program failed: {self._failure}")

    @property
    def stderr(self) -> str:
        """The end of its standard error."""
        return self._stderr.decode("utf-8", "replace")[-STDERR_SHOWN:]

    async def begin(self, step: str, fields: dict[str, Any]) -> asyncio.Future[Any]:
        """Send a step. The future returns `ok`, or raises StepFailed, Unsupported or CheckFailed."""
        process = self._process or await self._start()
        self._last_id += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.has_failed:
            raise CheckFailed(f"the program failed: {self._failure}")
        self._pending[self._last_id] = future
        line = json.dumps({"id": self._last_id, "step": step, **fields})
        if self._on_line is not None:
            self._on_line(f"-> {line}")
        assert process.stdin is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
        except ConnectionError as error:
            raise CheckFailed(f"the program failed: {self._failure}") from error
        return future

    async def stop(self) -> int | None:
        """Close standard input and wait for the program to exit; kill it after a timeout. Return its exit code."""
        process, self._process = self._process, None
        readers, self._readers = self._readers, []
        if process is None:
            return None
        assert process.stdin is not None
        process.stdin.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._stop_seconds):
                    await process.wait()
        finally:  # also of a run that is cancelled
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await asyncio.wait(readers, timeout=1.0)  # search its last output for secrets, too
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        return process.returncode
