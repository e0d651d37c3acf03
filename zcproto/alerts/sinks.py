"""Deliver messages to sinks: a webhook and a program, each with a bounded queue and retries.

    put -> queue -> sink.deliver -> delivered, retried after a delay, or lost

Rules of a queue:
- A slow sink delays nothing else. Messages are delivered in order, one at a time.
- A message is retried with exponential backoff and jitter up to `MAX_AGE_S`, or as often as the failure allows.
- A full queue drops its oldest message: current alerts matter more.
- Lost messages are counted and logged.

Rules of the webhook, one POST for each message by HTTP/1.1 over TLS:

    Zcproto-Signature: t=1767225600,v1=HEX
    HEX = HMAC-SHA256(secret, b"1767225600" + b"." + body)

- The secret is the text of its file in UTF-8. The time is signed with the body, so that a captured message cannot
  be replayed later. Of several `v1` one must match, so that a secret can be rotated. Unknown parts of the header
  are ignored. Comparisons take constant time.
- A message is delivered if the status is 200 to 299; the rest of the response is not read.

Rules of the command, a program run for each message, with the message as JSON on its standard input:
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
import hashlib
import hmac
import os
import re
import shlex
import signal
import stat
import subprocess
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple, Protocol, Self

from zcproto.alerts.alert import clean_text
from zcproto.common.backoff import HALF, backoff_s
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.files import OTHERS_WRITE, UnusableFileError, check_access, check_place
from zcproto.common.https import Endpoint, Unreachable, verifying_context
from zcproto.common.secret import Secret
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger

QUEUED: Final = 256
"""Maximum messages queued for one sink, under 8 KiB each."""

MAX_AGE_S: Final = 3_600.0
"""Age after which a message is dropped."""

FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 120.0
DOWN_AFTER: Final = 3
"""Consecutive failures after which a sink counts as down."""

log = get_logger("zcproto.alerts")


class Undelivered(Exception):
    """A message was not delivered. The text is the reason, without secrets.

    `tries` is the total number of attempts worth making; None: until the message is too old.
    """

    def __init__(self, reason: str, *, tries: int | None = None) -> None:
        super().__init__(reason)
        self.tries = tries


class Sink(Protocol):
    """A receiver of messages."""

    @property
    def name(self) -> str:
        """Return one word for logs and metrics."""

    @property
    def where(self) -> str:
        """Return the destination for people, without secrets."""

    async def deliver(self, body: bytes) -> str:
        """Deliver one message. Return the receiver's answer for `zcproto alert test`. Raises Undelivered.

        It has its own timeout and can be cancelled.
        """


class _Waiting(NamedTuple):
    body: bytes
    since: float
    what: str


class SinkQueue:
    """A sink with its queue. `random` returns numbers in [0, 1).

    `on_down` is called with the reason when deliveries fail repeatedly, `on_up` when one succeeds after that.
    `delivered`, `failures` and `lost` are counters.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        clock: Clock,
        random: Callable[[], float],
        on_down: Callable[[str, str], None],
        on_up: Callable[[str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.sink = sink
        self._clock = clock
        self._random = random
        self._on_down = on_down
        self._on_up = on_up
        self._sleep = sleep
        self._queue: deque[_Waiting] = deque()
        self._filled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._in_a_row = 0
        self._running: asyncio.Task[None] | None = None
        self.delivered = 0
        self.failures = 0
        self.lost = 0

    @property
    def name(self) -> str:
        return self.sink.name

    @property
    def is_down(self) -> bool:
        """Return True if the last deliveries failed."""
        return self._in_a_row >= DOWN_AFTER

    def __len__(self) -> int:
        """Return the number of queued messages."""
        return len(self._queue)

    def put(self, body: bytes, what: str) -> None:
        """Queue a message. `what` names it in the log if it is lost."""
        if len(self._queue) >= QUEUED:
            self._lose(self._queue.popleft(), "the queue is full")
        self._queue.append(_Waiting(body, self._clock.now(), what))
        self._filled.set()

    def start(self) -> None:
        self._running = asyncio.get_running_loop().create_task(
            self._run(), name=f"zcproto-alerts-{self.name}"
        )

    async def stop(self, limit_s: float) -> None:
        """Deliver queued messages with one attempt each within the limit, then stop."""
        self._stopping.set()
        self._filled.set()
        running, self._running = self._running, None
        if running is not None:
            await asyncio.wait([running], timeout=limit_s)
            running.cancel()
            await asyncio.wait([running])
        while self._queue:
            self._lose(self._queue.popleft(), "the server ends")

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._stopping.is_set():
                    return
                self._filled.clear()
                await self._filled.wait()
                continue
            waiting = self._queue.popleft()
            try:
                await self._deliver(waiting)
            except asyncio.CancelledError:
                self._lose(waiting, "the server ends")
                raise

    async def _deliver(self, waiting: _Waiting) -> None:
        tries = 0
        while True:
            tries += 1
            limit = None
            try:
                await self.sink.deliver(waiting.body)
            except Undelivered as error:
                reason, limit = str(error), error.tries
            except Exception as error:  # an internal error must not stop the queue
                log.error("alert.sink_failed", sink=self.name, exc_info=error)
                reason, limit = type(error).__name__, 1
            else:
                self._arrived()
                return
            self._failed(reason)
            too_old = self._clock.now() - waiting.since >= MAX_AGE_S
            if self._stopping.is_set() or too_old or (limit is not None and tries >= limit):
                self._lose(waiting, reason)
                return
            await self._pause(backoff_s(tries, FIRST_DELAY_S, MAX_DELAY_S, HALF, self._random()))

    async def _pause(self, seconds: float) -> None:
        """Wait for the delay or until `stop`."""
        loop = asyncio.get_running_loop()
        waits = [loop.create_task(self._stopping.wait()), asyncio.ensure_future(self._sleep(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    def _arrived(self) -> None:
        was_down, self._in_a_row = self.is_down, 0
        self.delivered += 1
        if was_down:
            self._on_up(self.name)

    def _failed(self, reason: str) -> None:
        self.failures += 1
        self._in_a_row += 1
        if self.is_down:
            self._on_down(self.name, reason)

    def _lose(self, waiting: _Waiting, reason: str) -> None:
        self.lost += 1
        log.error("alert.lost", sink=self.name, reason=reason, what=waiting.what, lost=self.lost)


# --- the webhook -------------------------------------------------------------------------------------------


HEADER: Final = "Zcproto-Signature"
TOLERANCE_S: Final = 300
"""Maximum age of a signature, and maximum time in the future, in seconds."""

MAX_HEADER: Final = 1024
_TIME: Final = re.compile(r"[0-9]{1,12}")
REFUSED_TRIES: Final = 3
"""Attempts for a message that the receiver refuses: it may be misconfigured only briefly."""

USER_AGENT: Final = "zcproto-alerts/1"
_RETRIED: Final = frozenset({408, 425, 429})


class Webhook:
    """A sink that posts messages to a validated URL.

    `secret` signs them; None for no signature. Raises ConfigError for an invalid CA file.
    """

    name = "webhook"

    def __init__(
        self, url: str, secret: Secret | None, *, ca_file: Path | None, timeout: float, clock: Clock
    ) -> None:
        is_tls = url.startswith("https:")
        context = verifying_context(ca_file, "alerts.webhook_ca_file") if is_tls else None
        self._endpoint = Endpoint(url, context)
        self.where = self._endpoint.where
        self._secret = secret
        self._timeout = timeout
        self._clock = clock

    async def deliver(self, body: bytes) -> str:
        headers = [("User-Agent", USER_AGENT), ("Content-Type", "application/json")]
        if self._secret is not None:
            headers.append((HEADER, sign(self._secret, body, self._clock.wall())))
        try:
            response = await self._endpoint.send("POST", headers, body, timeout=self._timeout)
        except Unreachable as error:
            raise Undelivered(str(error)) from error
        host, status = self._endpoint.host, response.status
        if 200 <= status < 300:
            return f"{host} answered {status}"
        why = ": redirects are not followed" if 300 <= status < 400 else ""
        is_refused = status < 500 and status not in _RETRIED
        raise Undelivered(f"{host} answered {status}{why}", tries=REFUSED_TRIES if is_refused else None)

    async def reach(self) -> None:
        """Connect, and send nothing. Raises Undelivered."""
        try:
            await self._endpoint.reach(timeout=self._timeout)
        except Unreachable as error:
            raise Undelivered(str(error)) from error


# --- signatures ----------------------------------------------------------------------------------------------


def sign(secret: Secret, body: bytes, wall: int) -> str:
    """Return the value of the header for a body sent now."""
    seconds = wall // MS_PER_SECOND
    return f"t={seconds},v1={_digest(secret, body, str(seconds))}"


def check_signature(
    secret: Secret, body: bytes, header: str, wall: int, tolerance_s: int = TOLERANCE_S
) -> str:
    """Return the reason why a message is invalid, or an empty string. Accepts any header."""
    if len(header) > MAX_HEADER or not header.isascii():
        return "the header is not a signature"
    pairs = [pair.strip().partition("=") for pair in header.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    digests = [value for name, _, value in pairs if name == "v1"]
    if len(times) != 1 or not _TIME.fullmatch(times[0]) or not digests:
        return "the header is not a signature"
    right = _digest(secret, body, times[0])
    # Compare all, so that the time does not reveal which one matched.
    if not sum(hmac.compare_digest(right, each) for each in digests):
        return "the signature does not match: wrong secret or changed body"
    age_s = wall // MS_PER_SECOND - int(times[0])
    if abs(age_s) > tolerance_s:
        return f"the signature is {age_s} s old: {tolerance_s} s are allowed"
    return ""


def _digest(secret: Secret, body: bytes, seconds: str) -> str:
    signed = seconds.encode("ascii") + b"." + body
    return hmac.new(secret.reveal().encode(), signed, hashlib.sha256).hexdigest()


# --- the command -------------------------------------------------------------------------------------------


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
                    # Another cancellation may follow, while all threads are busy.
                    await asyncio.shield(loop.run_in_executor(None, process.wait))
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
            shown = escape_text(str(path))
            program = shlex.quote(shown)
            raise ConfigError(
                [f"{key}: {shown} is not a program that this user may run; run: chmod +x {program}"]
            )
        check_access(path, status, OTHERS_WRITE)
        check_place(path)
    except OSError as error:
        raise ConfigError(
            [
                f"{key}: {escape_text(str(path))} cannot be run: {error.strerror}; install it, or correct"
                " its path"
            ]
        ) from error
    except UnusableFileError as error:
        raise ConfigError([f"{key}: {error}"]) from error
