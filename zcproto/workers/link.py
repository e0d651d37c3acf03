"""Calls and notices between the processes of one server, over a UNIX socket.

    topics = Topics()
    topics.calls["throttle.check"] = check          # async def check(link: Link, address: str) -> bool
    topics.notices["log.rotate"] = rotate           # def rotate(link: Link) -> None

    server = LinkServer(listen_unix(path), topics, name="coordinator")    # one process
    await server.start()

    client = LinkClient(path, topics, name="worker 1", random=fraction)   # each of the others
    client.start()
    if await client.call("throttle.check", "192.0.2.1"): ...
    client.notify("alerts.count", "login_failures", 3)

Both ends have topics, call each other and send notices: the server through the `Link`s in `LinkServer.links`, or
with `LinkServer.notify` to all of them. Arguments and results are what msgpack has: None, bool, int, float, str
(with lone surrogates too), bytes, lists, and dicts; tuples arrive as lists.

- A handler of calls is a coroutine function, or a function that does not wait and is answered at once. A CallError
  arrives as that error; any other exception goes to the loop's exception handler and arrives as InternalError.
- `call` raises LinkLost if there is no connection, if it is lost, or if no answer comes in time: the call may have
  been executed. It raises ResourceExhausted, without an effect, if too many calls wait or the peer reads none.
- A notice is delivered or the connection is lost: it is never dropped on a connection that goes on. Calls and
  notices of one connection arrive in the order in which they were sent; calls are executed concurrently.
- A handler whose connection is lost runs to its end; its answer is dropped.

Rules:
- A message is its length in four bytes, and a msgpack list of its kind and fields. One that is too large, or of
  another shape, ends the connection. HELLO comes first; a peer that is older than MIN_VERSION is refused.
- Time is counted in ticks of the event loop: one that was blocked reads what has arrived before a call is late.
- The bytes of one turn of the event loop are one write. A peer that does not read is disconnected at MAX_BUFFER.
- A client sends a ping after `heartbeat` seconds without one, and also while calls wait. If nothing comes for
  `silence` seconds, the connection is lost. Time in which the server, whose process id is the fact `pid`, waits
  for a processor does not count: it is not silent, the machine is busy.
- The socket is for one user: its mode is 0600, and the peer's user is checked where the system reports it.

`LinkCore` is the part without sockets. It must not know: what a topic is for.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from types import CoroutineType
from typing import Any, Final, cast

import msgpack

from zcproto.common.backoff import HALF, backoff_s
from zcproto.common.deadlines import next_multiple
from zcproto.common.network import address_of
from zcproto.common.process import queued_seconds
from zcproto.common.unix_socket import peer_process
from zcproto.errors import CallError, InternalError, ResourceExhausted, Unimplemented, ZcprotoError

VERSION: Final = 1
MIN_VERSION: Final = 1
"""The oldest version of a peer: during a rolling restart, two versions of the package talk to each other."""

MAX_MESSAGE: Final = 64 << 20
TICKS: Final = 4
"""Ticks within the silence of a client."""

HELLO, CALL, ANSWER, ERROR, NOTICE, PING, PONG = range(7)

_LENGTH: Final = struct.Struct("!I")
_SHAPES: Final[dict[int, tuple[type, ...]]] = {
    HELLO: (int, str, dict),  # version, name, facts
    CALL: (int, str, list),  # number, topic, arguments
    ANSWER: (int, object),  # number, result
    ERROR: (int, int, str, dict),  # number, code, message, details
    NOTICE: (str, list),  # topic, arguments
    PING: (),
    PONG: (),
}

Message = tuple[Any, ...]
"""One of HELLO to PONG, and its fields as in _SHAPES."""


class LinkLost(ZcprotoError):
    """A call got no answer. It may have been executed. `reason` is for the operator's log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LinkViolation(ZcprotoError):
    """The peer sent something that is not a message of this version."""


def pack(*message: Any) -> bytes:
    """Return the bytes of a message. Raises TypeError, ValueError or OverflowError for what msgpack has not."""
    body: bytes = msgpack.packb(message, unicode_errors="surrogatepass")
    return _LENGTH.pack(len(body)) + body


class LinkCore:
    """One end of a connection: bytes in, messages out. Call `receive`, and `tick` while `is_due`.

    `waiting` has the calls that wait for an answer: whatever the caller has stored, by number.
    """

    def __init__(self, *, max_message: int = MAX_MESSAGE, silence: int | None = None) -> None:
        self._max_message = max_message
        self._silence = silence
        self._buffer = bytearray()
        self._number = 0
        self._ticks = 0
        self._heard_at = 0
        self._is_pinged = False
        self._waiting: dict[int, tuple[Any, int]] = {}
        self.is_greeted = False

    @property
    def waiting(self) -> int:
        """The number of calls that wait for an answer."""
        return len(self._waiting)

    @property
    def is_due(self) -> bool:
        """Whether the peer is to send something, so that time is counted."""
        return bool(self._waiting) or self._is_pinged or not self.is_greeted

    def receive(self, data: bytes) -> list[Message]:
        """Return the messages that are complete. Raises LinkViolation, after which the connection is unusable."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start, size = 0, len(buffer)
        while size - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self._max_message:
                raise LinkViolation(f"a message of {length} bytes is over the limit of {self._max_message}")
            end = start + _LENGTH.size + length
            if end > size:
                break
            messages.append(self._read(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        self._heard_at = self._ticks
        return messages

    def _read(self, body: bytearray) -> Message:
        try:
            message = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogatepass")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise LinkViolation(f"a message cannot be read: {type(error).__name__}") from error
        kind = message[0] if isinstance(message, list) and message else None
        shape = _SHAPES.get(kind) if type(kind) is int else None
        if shape is None or len(message) != len(shape) + 1 or not all(map(isinstance, message[1:], shape)):
            raise LinkViolation("a message has another shape than those of this version")
        if kind == PONG:
            self._is_pinged = False
        if self.is_greeted is (kind == HELLO):
            raise LinkViolation("HELLO is the first message, once")
        if kind == HELLO:
            if message[1] < MIN_VERSION:
                raise LinkViolation(
                    f"the peer has version {message[1]} of the link, this process needs {MIN_VERSION} or later"
                )
            self.is_greeted = True
        return tuple(message)

    def call(self, topic: str, arguments: Iterable[Any], waiting: Any, ticks: int) -> bytes:
        """Return the bytes of a call, for which `waiting` waits for so many ticks. Raises as `pack`."""
        number = self._number + 1
        data = self.pack(CALL, number, topic, arguments)
        self._number = number
        self._waiting[number] = waiting, self._ticks + ticks
        return data

    def pack(self, *message: Any) -> bytes:
        """Return the bytes of a message as `pack`. Raises ValueError if it is too large, too."""
        data = pack(*message)
        if len(data) - _LENGTH.size > self._max_message:
            raise ValueError(f"a message of {len(data)} bytes is over the limit of {self._max_message}")
        return data

    def ping(self) -> bytes:
        """Return the bytes of a ping; none if the answer to the last one is due."""
        if self._is_pinged:
            return b""
        self._is_pinged = True
        return pack(PING)

    def take(self, number: int) -> Any:
        """Return who waits for a call, once; None if it does not wait any more."""
        return self._waiting.pop(number, (None, 0))[0]

    def take_all(self) -> list[Any]:
        """Return who waits for all calls."""
        return [self.take(number) for number in list(self._waiting)]

    def tick(self) -> list[Any]:
        """Count time. Return those whose calls are late. Raises LinkLost if the peer was silent for too long."""
        self._ticks += 1
        if self._silence is not None and self._ticks - self._heard_at > self._silence:
            raise LinkLost("the other process does not answer")
        return [self.take(number) for number, (_, due) in list(self._waiting.items()) if due <= self._ticks]

    def rest(self) -> None:
        """Count no silence for the time until the next tick: nothing was due."""
        self._heard_at = self._ticks


MAX_CALLS: Final = 8_192
"""Calls that wait for one peer; twice as many of a peer run here."""

MAX_BUFFER: Final = 128 << 20
"""Bytes for a peer that does not read."""

HIGH_WATER: Final = 4 << 20
"""Bytes that wait for a peer, beyond which calls are refused until it has read them."""

MAX_LINKS: Final = 1_024
CALL_LIMIT_S: Final = 5.0
HELLO_LIMIT_S: Final = 5.0
SILENCE_S: Final = 3.0
"""The kernel reports a process that has ended at once. This is for one that hangs, and longer than one is slow."""

HEARTBEAT_S: Final = 2.0
"""Of a link without calls. Each call finds a silent peer by itself, within the silence."""

TICK_S: Final = 0.25
"""Of a server, which does not watch for silence: the kernel reports a process that has ended."""

FIRST_PAUSE_S: Final = 0.01
LONGEST_PAUSE_S: Final = 0.5
"""Between attempts to connect: a process that starts again is found within this time."""

LASTING_S: Final = 1.0
"""A connection that ended sooner counts as a failed attempt: its peer may end each one after HELLO."""

_TURNS_TO_WRITE: Final = 2
"""Turns of the event loop: the link hands the bytes to the transport, which may write them at the end of a turn."""

_ROOT: Final = 0
_RETRY_MS: Final = 250

CallHandler = Callable[..., Any]
"""Called with the link and the arguments of a call. Returns its result, or a coroutine that does."""

NoticeHandler = Callable[..., object]
"""Called with the link and the arguments of a notice. Must not raise."""


@dataclass(slots=True)
class Topics:
    """What an end does for its peers: handlers by topic."""

    calls: dict[str, CallHandler] = field(default_factory=dict)
    notices: dict[str, NoticeHandler] = field(default_factory=dict)


class Link(asyncio.Protocol):
    """One end of a connection. `name` and `facts` are the peer's, from its HELLO; `lost` is why it ended.

    `on_made` returns whether a connection is admitted. `on_greeted` is called with the link when HELLO came, then
    `on_lost` when an admitted connection has ended. `tick` and `heartbeat` are in seconds.
    """

    def __init__(
        self,
        topics: Topics,
        hello: bytes,
        *,
        on_made: Callable[[Link, asyncio.BaseTransport], bool] = lambda link, transport: True,
        on_greeted: Callable[[Link], object],
        on_lost: Callable[[Link], object],
        tick: float = TICK_S,
        heartbeat: float | None = None,
    ) -> None:
        self._topics = topics
        self._hello = hello
        self._on_made = on_made
        self._on_greeted = on_greeted
        self._on_lost = on_lost
        self._tick = tick
        self._heartbeat = heartbeat
        self._core = LinkCore(silence=None if heartbeat is None else TICKS)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._unwritten = 0
        self._is_paused = False
        self._is_ending = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_ticking = False
        self._queued = 0.0
        self._running: set[asyncio.Task[None]] = set()
        self.name = ""
        self.facts: dict[str, Any] = {}
        self.lost = ""

    def __repr__(self) -> str:
        return f"<Link {self.name or 'without HELLO'}{self.lost and ', lost: ' + self.lost}>"

    async def call(
        self, topic: str, *arguments: Any, within: float = CALL_LIMIT_S, is_lasting: bool = False
    ) -> Any:
        """Call the peer and return its result. `within` is in seconds; a lasting call is never refused here.

        Raises LinkLost, ResourceExhausted, or the CallError of the peer.
        """
        if self.lost:
            raise LinkLost(self.lost)
        if (self._core.waiting >= MAX_CALLS or self._is_paused) and not is_lasting:
            raise _too_many_calls()
        future = self._loop.create_future()
        # The first tick may come at once.
        self._send(self._core.call(topic, arguments, future, ceil(within / self._tick) + 1))
        if not self._is_ticking:
            self._plan()
        return await future

    def notify(self, topic: str, *arguments: Any) -> None:
        """Send a notice. Does nothing if the connection is lost."""
        self.send(self._core.pack(NOTICE, topic, arguments))

    def send(self, data: bytes) -> None:
        """Send what `pack` returned: a notice for many peers is packed once."""
        if not self.lost:
            self._send(data)

    @property
    def waiting(self) -> int:
        """The bytes that the peer has not read, and its socket has no room for."""
        buffered = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self._unwritten + buffered

    def lose(self, reason: str, *, abort: bool = True) -> None:
        """End the connection. Calls that wait fail with LinkLost."""
        if self.lost:
            return
        self.lost = reason
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None and abort:
            self._transport.abort()
        for future in self._core.take_all():
            _fail(future, reason)
        self._on_lost(self)

    async def end(self, within: float) -> None:
        """Begin no more calls, answer those that run, within so many seconds, and end the connection."""
        self._is_ending = True
        await self.finish(within)
        if not self.lost:
            assert self._transport is not None
            self._flush()
            self._transport.close()  # unlike an abort, after what is written
            self.lose("closed", abort=False)

    async def finish(self, within: float) -> None:
        """Wait for the handlers that run, at most so many seconds; then cancel them."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=within)
            for task in late:
                task.cancel()

    # --- from the transport --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._on_made(self, transport):
            self.lost = "refused"
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        self._send(self._hello)
        self._timer = self._loop.call_later(
            HELLO_LIMIT_S, self.lose, "the other process sent no HELLO in time"
        )

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._core.receive(data)
        except LinkViolation as error:
            self.lose(str(error))
            return
        for message in messages:
            if not self.lost and not self._is_ending:
                self._handle(*message)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False

    def connection_lost(self, error: Exception | None) -> None:
        self.lose(str(error) if error else "the other process closed the connection")

    # --- messages ------------------------------------------------------------------------------------

    def _handle(self, kind: int, *fields: Any) -> None:
        if kind == ANSWER:
            number, result = fields
            future = self._core.take(number)
            if future is not None and not future.done():
                future.set_result(result)
        elif kind == CALL:
            self._start(*fields)
        elif kind == NOTICE:
            topic, arguments = fields
            handler = self._topics.notices.get(topic)
            if handler is not None:  # a newer peer may have more to say
                handler(self, *arguments)
        elif kind == ERROR:
            number, code, text, details = fields
            future = self._core.take(number)
            if future is not None and not future.done():
                future.set_exception(CallError.from_wire(code, text, details))
        elif kind == PING:
            self._send(pack(PONG))
        elif kind == PONG:
            if not self._core.is_due:
                self._plan()
        elif kind == HELLO:
            _, self.name, self.facts = fields
            self._plan()
            self._on_greeted(self)

    def _start(self, number: int, topic: str, arguments: list[Any]) -> None:
        handler = self._topics.calls.get(topic)
        if handler is None:
            self._refuse(
                number, Unimplemented(f"{topic} is not known: the processes are of different versions")
            )
        elif len(self._running) >= 2 * MAX_CALLS:
            self._refuse(number, _too_many_calls())
        else:
            try:
                result = handler(self, *arguments)
                if not isinstance(result, CoroutineType):
                    self.send(self._core.pack(ANSWER, number, result))
                    return
            except Exception as error:
                self._failed(number, error)
                return
            task = self._loop.create_task(self._run(number, result), name="zcproto-link")
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, number: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self.send(self._core.pack(ANSWER, number, await work))
        except Exception as error:
            self._failed(number, error)

    def _failed(self, number: int, error: Exception) -> None:
        if not isinstance(error, CallError):
            self._loop.call_exception_handler({"message": "a handler of a link failed", "exception": error})
            error = InternalError("the other process failed; see its log")
        self._refuse(number, error)

    def _refuse(self, number: int, error: CallError) -> None:
        self.send(pack(ERROR, number, error.code, error.message, error.details))

    def _send(self, data: bytes) -> None:
        self._out.append(data)
        self._unwritten += len(data)
        if len(self._out) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        out, self._out, self._unwritten = self._out, [], 0
        if not self.lost:
            assert self._transport is not None
            self._transport.write(b"".join(out))
            if self._transport.get_write_buffer_size() > MAX_BUFFER:
                self.lose("the other process does not read")

    # --- time ----------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Set the timer: for a tick while something is due, else for the heartbeat."""
        if self._timer is not None:
            self._timer.cancel()
        if self._core.is_due and not self._is_ticking:
            self._core.rest()
        self._is_ticking = self._core.is_due
        if self._is_ticking:
            self._timer = self._loop.call_later(self._tick, self._count)
        elif self._heartbeat is not None:
            self._timer = self._loop.call_at(next_multiple(self._heartbeat, self._loop.time()), self._ping)

    def _is_peer_starved(self) -> bool:
        """Return whether the server waited for a processor for most of the last tick."""
        pid = self.facts.get("pid")
        if self._heartbeat is None or type(pid) is not int:
            return False
        before, self._queued = self._queued, queued_seconds(pid)
        return self._queued - before > self._tick / 2

    def _count(self) -> None:
        try:
            for future in () if self._is_peer_starved() else self._core.tick():
                _fail(future, "the other process did not answer in time")
        except LinkLost as error:
            self.lose(error.reason)
        else:
            if self._heartbeat is not None and self._core.waiting:
                self._ping()
            else:
                self._plan()

    def _ping(self) -> None:
        if data := self._core.ping():
            self._send(data)
        self._plan()


class LinkServer:
    """The end that listens: it has a link to each client.

    `links` are those whose HELLO came, oldest first. `on_link` is called with a link when it is added to `links`,
    `on_lost` when it was removed. `refused` counts connections of other users, and those beyond MAX_LINKS.
    """

    def __init__(
        self, listening: socket.socket, topics: Topics, *, name: str, facts: dict[str, Any] | None = None
    ) -> None:
        self._listening = listening
        self.topics = topics
        self._hello = pack(HELLO, VERSION, name, facts or {})
        self._server: asyncio.AbstractServer | None = None
        self._open: set[Link] = set()
        self.links: dict[Link, None] = {}
        self.on_link: list[Callable[[Link], object]] = []
        self.on_lost: list[Callable[[Link], object]] = []
        self.refused = 0

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._protocol, sock=self._listening
        )

    def notify(self, topic: str, *arguments: Any) -> None:
        """Send a notice to all clients."""
        data = pack(NOTICE, topic, arguments)
        for link in list(self.links):
            link.send(data)

    async def flush(self) -> None:
        """Wait until what was sent is written, to peers that read."""
        for _ in range(_TURNS_TO_WRITE):
            await asyncio.sleep(0)

    async def close(self, within: float = 1.0) -> None:
        """Stop listening and end all connections, after the answers of handlers that run for so many seconds."""
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(link.end(within) for link in list(self._open)))

    def _protocol(self) -> Link:
        return Link(
            self.topics, self._hello, on_made=self._made, on_greeted=self._greeted, on_lost=self._lost
        )

    def _made(self, link: Link, transport: asyncio.BaseTransport) -> bool:
        peer = peer_process(transport.get_extra_info("socket"))
        if len(self._open) >= MAX_LINKS or (peer is not None and peer.uid not in (os.geteuid(), _ROOT)):
            self.refused += 1
            return False
        self._open.add(link)
        return True

    def _greeted(self, link: Link) -> None:
        self.links[link] = None
        for callback in self.on_link:
            callback(link)

    def _lost(self, link: Link) -> None:
        self._open.discard(link)
        if link in self.links:
            del self.links[link]
            for callback in self.on_lost:
                callback(link)


class LinkClient:
    """The end that connects, and connects again when the connection is lost.

    `link` is the connection once HELLO came, `reason` why it is missing. `on_up` is called with a new link,
    `on_down` with one that was lost. `silence` and `heartbeat` are in seconds; `random` returns numbers from 0 to
    1.
    """

    def __init__(
        self,
        path: Path,
        topics: Topics,
        *,
        name: str,
        facts: dict[str, Any] | None = None,
        silence: float = SILENCE_S,
        heartbeat: float = HEARTBEAT_S,
        random: Callable[[], float],
    ) -> None:
        self._path = path
        self._topics = topics
        self._hello = pack(HELLO, VERSION, name, facts or {})
        self._silence = silence
        self._heartbeat = heartbeat
        self._random = random
        self._task: asyncio.Task[None] | None = None
        self._is_up = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._failures = 0
        self._up_at = 0.0
        self.link: Link | None = None
        self.reason = "it is not connected yet"
        self.on_up: list[Callable[[Link], object]] = []
        self.on_down: list[Callable[[Link], object]] = []

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.get_running_loop().create_task(self._keep_connected(), name="zcproto-link")

    async def ready(self, within: float) -> None:
        """Wait until the link is up. Raises LinkLost after so many seconds."""
        try:
            async with asyncio.timeout(within):
                await self._is_up.wait()
        except TimeoutError:
            raise LinkLost(self.reason) from None

    async def call(
        self, topic: str, *arguments: Any, within: float = CALL_LIMIT_S, is_lasting: bool = False
    ) -> Any:
        """Call the server as in `Link.call`."""
        if self.link is None:
            raise LinkLost(self.reason)
        return await self.link.call(topic, *arguments, within=within, is_lasting=is_lasting)

    def notify(self, topic: str, *arguments: Any) -> bool:
        """Send a notice. Return False if there is no link."""
        if self.link is None:
            return False
        self.link.notify(topic, *arguments)
        return True

    async def close(self, within: float = 1.0) -> None:
        """End the connection and wait at most so many seconds for the handlers that run."""
        link = self.link
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if link is not None:
            await link.finish(within)

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._has_ended.clear()
            try:
                with address_of(self._path) as address:
                    _, link = await loop.create_unix_connection(self._protocol, address)
            except OSError as error:
                self.reason = f"{self._path}: {error.strerror or error}"
            else:
                try:
                    await self._has_ended.wait()
                finally:
                    link.lose("closed")
            if self._failures:
                pause = backoff_s(self._failures, FIRST_PAUSE_S, LONGEST_PAUSE_S, HALF, self._random())
                await asyncio.sleep(pause)
            self._failures += 1

    def _protocol(self) -> Link:
        return Link(
            self._topics,
            self._hello,
            on_greeted=self._greeted,
            on_lost=self._lost,
            tick=self._silence / TICKS,
            heartbeat=self._heartbeat,
        )

    def _greeted(self, link: Link) -> None:
        self.link, self.reason = link, ""
        self._up_at = asyncio.get_running_loop().time()
        self._is_up.set()
        for callback in self.on_up:
            callback(link)

    def _lost(self, link: Link) -> None:
        was_up, self.link, self.reason = self.link is link, None, link.lost
        if was_up and asyncio.get_running_loop().time() - self._up_at >= LASTING_S:
            self._failures = 0
        self._is_up.clear()
        self._has_ended.set()
        if was_up:
            for callback in self.on_down:
                callback(link)


def _fail(future: asyncio.Future[Any], reason: str) -> None:
    if not future.done():
        future.set_exception(LinkLost(reason))


def _too_many_calls() -> ResourceExhausted:
    return ResourceExhausted(
        "too many calls wait for another process; retry later", {"retry_after_ms": _RETRY_MS}
    )
