"""The client's program as a process: steps go in, answers come out, and no secret may.

One process serves many checks. Whoever finds it hanging or dead calls `stop`; the next step starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from zcproto_conformance.errors import CheckFailed, KitError, Unsupported

MAX_LINE: Final = 8 * 1024 * 1024
STDERR_KEPT: Final = 8_192
STDERR_SHOWN: Final = 2_000
STOP_SECONDS: Final = 5.0


class Refused(Exception):
    """The program answered a step with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(json.dumps(error))
        self.error = error
        self.kind = str(error.get("kind"))


class Program:
    """Runs the client's command. `tell` is called with each line that passes, if somebody wants to see them."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stop_seconds: float = STOP_SECONDS,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._command = list(command)
        self._stop_seconds = stop_seconds
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._gone = "it was not started"
        self._stderr = b""
        self._said = ""
        self.starts = 0
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
            raise KitError(f"{self._command[0]}: {error.strerror}") from error
        self._process = process
        self._stderr = b""
        self.starts += 1
        self._readers = [
            asyncio.create_task(self._read_answers(process)),
            asyncio.create_task(self._read_stderr(process)),
        ]
        return process

    async def _read_answers(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        why = "its standard output ended"
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                why = f"it wrote a line of more than {MAX_LINE} bytes"
                break
            if not line:
                break
            fault = self._take_answer(line)
            if fault is not None:
                why = fault
                break
        self._gone = why
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(CheckFailed(f"the program failed: {why}"))
                future.exception()  # whoever waits is told; a step nobody waits for is no fault
        self._waiting.clear()

    def _take_answer(self, line: bytes) -> str | None:
        """Hand an answer to who waits for it. What is wrong with it, if anything is."""
        text = line.decode("utf-8", "replace").rstrip("\n")
        self._look_for_secrets(text)
        if self._tell is not None:
            self._tell(f"<- {text}")
        try:
            answer = json.loads(text)
        except ValueError:
            return f"it wrote a line that is no JSON: {text[:200]!r}"
        if not isinstance(answer, dict) or not isinstance(answer.get("id"), int):
            return f"it wrote a line without an id: {text[:200]!r}"
        if not any(key in answer for key in ("ok", "error", "unsupported")):
            return f"it wrote an answer with neither ok nor error: {text[:200]!r}"
        future = self._waiting.pop(answer["id"], None)
        if future is None:
            return f"it answered step {answer['id']}, which waits for no answer"
        if future.done():
            return None
        if "unsupported" in answer:
            future.set_exception(Unsupported(f"unsupported: {answer['unsupported']}"))
        elif isinstance(answer.get("error"), dict):
            future.set_exception(Refused(answer["error"]))
        elif "error" in answer:
            future.set_exception(CheckFailed(f"its error is no object: {text[:200]!r}"))
        else:
            future.set_result(answer["ok"])
        future.exception()  # whoever waits is told; a step nobody waits for is no fault
        return None

    async def _read_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while data := await process.stderr.read(STDERR_KEPT):
            before, self._stderr = self._stderr, (self._stderr + data)[-STDERR_KEPT:]
            self._look_for_secrets((before + data).decode("utf-8", "replace"))
            if self._tell is not None:
                self._tell("!! " + data.decode("utf-8", "replace").rstrip("\n"))

    def _look_for_secrets(self, text: str) -> None:
        if any(secret in text for secret in self.secrets):
            self.leaked = True

    @property
    def is_gone(self) -> bool:
        """Whether it was started, and answers no more."""
        return self._process is not None and self._readers[0].done()

    @property
    def stderr(self) -> str:
        """The end of what it wrote to standard error."""
        return self._stderr.decode("utf-8", "replace")[-STDERR_SHOWN:]

    async def begin(self, step: str, fields: dict[str, Any]) -> asyncio.Future[Any]:
        """Send a step. The future's result is `ok`; it raises Refused, Unsupported or CheckFailed."""
        process = self._process or await self._start()
        self._last_id += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.is_gone:
            raise CheckFailed(f"the program failed: {self._gone}")
        self._waiting[self._last_id] = future
        line = json.dumps({"id": self._last_id, "step": step, **fields})
        if self._tell is not None:
            self._tell(f"-> {line}")
        assert process.stdin is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
        except (ConnectionError, BrokenPipeError) as error:
            raise CheckFailed(f"the program failed: {self._gone}") from error
        return future

    async def stop(self) -> int | None:
        """End the program as the contract says, or by force if it does not end. Returns its exit code."""
        process, self._process = self._process, None
        readers, self._readers = self._readers, []
        if process is None:
            return None
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(self._stop_seconds):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await asyncio.wait(readers, timeout=1.0)  # its last words are looked through, too
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        return process.returncode
