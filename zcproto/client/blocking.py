"""The client for programs without an event loop: the same methods as Client, without `await`.

Rules:
- Each BlockingClient runs a Client on an event loop in a background thread.
- Any number of threads may call its methods concurrently; they share one connection.
- Ctrl-C during a call cancels only that call, on the server too.
- The thread never prevents a program from exiting.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from inspect import isawaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

from zcproto.client.client import UNSET, Client, SessionClient, UserSession
from zcproto.client.credentials import Device, LoginSource
from zcproto.client.endpoints import Address, Endpoint
from zcproto.client.handlers import Event, Function, run_in_thread, settle
from zcproto.client.options import ConnectOptions, EnrollOptions, accept_options
from zcproto.client.session import ClientSession
from zcproto.client.streams import DEFAULT_WINDOW, Reopen, Stream, check_items
from zcproto.common.misuse import no_such_method, wrong_use
from zcproto.common.process import new_event_loop
from zcproto.common.value_types import RETURNS_ANY, Returned
from zcproto.errors import ConnectionClosed
from zcproto.wire.message import Credit

Result = TypeVar("Result")


class LoopThread:
    """An event loop in a background thread, which does not prevent the program from exiting."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._running: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="zcproto-client", daemon=True)
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        return self._loop is not None

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._live())
        except OSError as error:  # no event loop: too many open files
            self._running.set_exception(error)

    async def _live(self) -> None:
        self._running.set_result(asyncio.get_running_loop())
        await self._stop.wait()

    def start(self) -> None:
        """Start the thread. Raises OSError without an event loop."""
        with self._lock:
            if self._thread.ident is not None:
                raise RuntimeError("this client was opened before; create a new one")
            if self._is_closed:
                raise ConnectionClosed("this client is closed")
            self._thread.start()
            self._loop = self._running.result()

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop and return its result. An interrupt cancels it."""
        with self._lock:
            if self._is_closed or self._loop is None:
                work.close()
                raise ConnectionClosed(
                    "this client is closed; create a new one"
                    if self._is_closed
                    else "open the client first: with connect_blocking(...) as client"
                )
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # no effect if it is done
            raise

    def close(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `end` and stop the loop. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            loop = self._loop
            if loop is None:
                return
        try:
            asyncio.run_coroutine_threadsafe(end(), loop).result()
        finally:
            loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


class BlockingSessionClient:
    """Calls, streams, handlers and events of one session. Base of `BlockingClient` and `BlockingUserSession`."""

    def __init__(self, client: SessionClient, thread: LoopThread) -> None:
        self._client = client
        self._thread = thread
        self._wait = thread.wait

    def __repr__(self) -> str:
        return f"Blocking{self._client!r}"

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    if not TYPE_CHECKING:
        __aenter__ = __aexit__ = wrong_use("write with; a program with asyncio uses connect")
        __getattr__ = no_such_method("client.call")

    @property
    def session(self) -> ClientSession | None:
        """The open session, or None."""
        return self._client.session

    @property
    def events(self) -> Iterator[Event]:
        """Yield events in order, waiting for the next one, until the client is closed."""
        while True:
            try:
                event = self._wait(self._next_event())
            except ConnectionClosed:
                return
            if event is None:
                return
            yield event

    async def _next_event(self) -> Event | None:
        return await anext(self._client.events, None)

    def open_session(self) -> ClientSession:
        """Open a session like `Client.open_session`."""
        return self._wait(self._client.open_session())

    def handler(self, name: str) -> Callable[[Function], Function]:
        """Let the server call a function like `Client.handler`. It runs in a thread of its own, and may block.

        A call that the server does not await any more cannot stop the thread; look at `call.cancelled`.
        """

        add = self._client.handler(name, in_thread=True)

        async def add_in_loop(function: Function) -> Function:
            return add(function)

        def register(function: Function) -> Function:
            return self._wait(add_in_loop(function)) if self._thread.is_running else add(function)

        return register

    def handle(self, name: str, function: Callable[..., Any]) -> None:
        """Let the server call a function, like `handler`, and wait until it can, like `Client.handle`."""
        if self._thread.is_running:
            self._wait(self._client.handle(name, function, in_thread=True))
        else:
            self._client.handler(name, in_thread=True)(function)

    def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        returns: type[Returned] = RETURNS_ANY,
        timeout: float | None = UNSET,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
        **named: Any,
    ) -> Returned:
        """Call a method like `Client.call`."""
        return self._wait(
            self._client.call(
                method,
                params,
                returns=returns,
                timeout=timeout,
                idempotency_key=idempotency_key,
                traceparent=traceparent,
                **named,
            )
        )

    def stream(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        items: Iterable[Any] | None = None,
        reopen: Reopen | None = None,
        durable: bool = False,
        window: Credit = DEFAULT_WINDOW,
        timeout: float | None = None,
        item_timeout: float | None = None,
        traceparent: str | None = None,
        **named: Any,
    ) -> BlockingStream:
        """Open a stream like `Client.stream`, with `with`, or with `for` alone. `items` may block."""
        check_items(items, Iterable)
        stream = self._client.stream(
            method,
            params,
            items=None if items is None else _in_thread(items),
            reopen=reopen,
            durable=durable,
            window=window,
            timeout=timeout,
            item_timeout=item_timeout,
            traceparent=traceparent,
            **named,
        )
        return BlockingStream(self._wait, stream)

    def resume(
        self,
        id: str,
        *,
        method: str = "",
        after: int | None = None,
        window: Credit = DEFAULT_WINDOW,
        timeout: float | None = None,
        item_timeout: float | None = None,
    ) -> BlockingStream:
        """Go on with a durable stream like `Client.resume`."""
        stream = self._client.resume(
            id, method=method, after=after, window=window, timeout=timeout, item_timeout=item_timeout
        )
        return BlockingStream(self._wait, stream)

    def durable_streams(self) -> list[dict[str, Any]]:
        """Return the durable streams of this user like `Client.durable_streams`."""
        return self._wait(self._client.durable_streams())


class BlockingClient(BlockingSessionClient):
    """A client of one server. Create it with `zcproto.connect_blocking` and use it in a `with` statement."""

    _client: Client

    def __init__(self, client: Client) -> None:
        super().__init__(client, LoopThread())

    def open(self) -> None:
        """Connect like `Client.open`. `with` calls this."""
        self._thread.start()
        atexit.register(self.close)
        try:
            self._wait(self._client.open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the session and the connection. Pending calls in other threads raise ConnectionClosed."""
        atexit.unregister(self.close)
        self._thread.close(self._client.close)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The hosts and ports that were given to `connect_blocking`."""
        return self._client.addresses

    @property
    def address(self) -> Address:
        """The first of `addresses`."""
        return self._client.address

    @property
    def endpoint(self) -> Endpoint | None:
        """Where this client is connected; None without a connection."""
        return self._client.endpoint

    @property
    def welcome(self) -> Mapping[str, Any]:
        """The server's latest WELCOME; empty without a connection."""
        return self._client.welcome

    def session_for(
        self,
        *,
        user: str | None = None,
        key: str | None = None,
        key_file: str | Path | None = None,
        device: Device | str | Path | None = None,
        device_name: str | None = None,
        login: LoginSource | None = None,
    ) -> BlockingUserSession:
        """Return a session of another user on this connection, like `Client.session_for`; use it with `with`."""
        session = self._client.session_for(
            user=user,
            key=key,
            key_file=key_file,
            device=device,
            device_name=device_name,
            login=_login_in_thread(login),
        )
        return BlockingUserSession(session, self._thread)


class BlockingUserSession(BlockingSessionClient):
    """A session of another user on the connection of a client. Create it with `BlockingClient.session_for`."""

    _client: UserSession

    def open(self) -> None:
        """Open the session like `UserSession.open`. `with` calls this."""
        self._wait(self._client.open())

    def close(self) -> None:
        """Close the session; the connection stays open. Idempotent."""
        with contextlib.suppress(ConnectionClosed):  # the client is closed, and all its sessions are
            self._wait(self._client.close())


class BlockingStream:
    """A stream for programs without an event loop; otherwise like `Stream`."""

    def __init__(self, wait: Callable[[Coroutine[Any, Any, Any]], Any], stream: Stream) -> None:
        self._wait = wait
        self._stream = stream
        self._is_open = False

    @property
    def result(self) -> Any:
        """The result of the method. Raises RuntimeError before the items have ended."""
        return self._stream.result

    @property
    def id(self) -> str | None:
        """The id of a durable stream; None of another one."""
        return self._stream.id

    @property
    def position(self) -> int | None:
        """How many items of a durable stream were received; None of another one."""
        return self._stream.position

    @property
    def draining(self) -> bool:
        """Whether the server is going away."""
        return self._stream.draining

    def __enter__(self) -> Self:
        self._wait(self._stream.__aenter__())
        self._is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ConnectionClosed):
            self._wait(self._stream.__aexit__(*error))

    if not TYPE_CHECKING:
        __aenter__ = __aexit__ = wrong_use("write with; a program with asyncio uses connect")
        __aiter__ = wrong_use("write for; a program with asyncio uses connect")

    def close(self) -> None:
        """Leave the stream: cancel it, unless it is durable or has ended. Idempotent."""
        self.__exit__()

    def cancel(self) -> bool:
        """Cancel the method of a durable stream. Return whether it was running."""
        is_cancelled: bool = self._wait(self._stream.cancel())
        return is_cancelled

    def receive(self) -> Any:
        """Return the next item. Raises EOFError after the last one."""
        return self._wait(self._stream.receive())

    def send(self, item: Any) -> None:
        """Send an item like `Stream.send`."""
        self._wait(self._stream.send(item))

    def end(self) -> None:
        """Send no more items. Idempotent."""
        self._wait(self._stream.end())

    def finished(self) -> Any:
        """End this side's items and return the result like `Stream.finished`."""
        return self._wait(self._stream.finished())

    def __iter__(self) -> Iterator[Any]:
        aiter(self._stream)  # raises RuntimeError if it was read
        if not self._is_open:  # the short form, without `with`
            with self:
                yield from self
            return
        while True:
            try:
                item = self.receive()
            except EOFError:
                return
            yield item


_END: Final = object()


async def _in_thread(items: Iterable[Any]) -> AsyncGenerator[Any, None]:
    """Iterate over items that may block in a thread of its own, which does not keep the program from exiting."""
    source, loop = iter(items), asyncio.get_running_loop()
    wanted: queue.SimpleQueue[asyncio.Future[Any] | None] = queue.SimpleQueue()

    def work() -> None:
        while (future := wanted.get()) is not None:
            item, failure = None, None
            try:
                item = next(source, _END)
            except BaseException as error:  # passed to the stream
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, future, item, failure)
        if isinstance(source, Generator):
            source.close()

    threading.Thread(target=work, name="zcproto-items", daemon=True).start()
    try:
        while True:
            future = loop.create_future()
            wanted.put(future)
            item = await future
            if item is _END:
                return
            yield item
    finally:
        wanted.put(None)


def _login_in_thread(login: LoginSource | None) -> LoginSource | None:
    """Let the function of a login run in a thread of its own, so that it may block."""
    if not callable(login):
        return login

    async def fetch() -> Any:
        found = await run_in_thread(login, {}, is_awaited=False)  # closing the client does not wait for it
        return await found if isawaitable(found) else found

    return fetch


@accept_options(ConnectOptions)
def connect_blocking(address: str | Sequence[str], options: ConnectOptions) -> BlockingClient:
    """Return a client for programs without an event loop; otherwise the same as `connect`.

        with zcproto.connect_blocking("host:7443", user="ada", key_file="ada.key", ca_file="ca.crt") as client:
            print(client.call("echo", word="hello"))

    `on_event` is called in the client's thread, the function of a `login` in a thread of its own: it may block.
    """
    return BlockingClient(Client(address, replace(options, login=_login_in_thread(options.login))))


def enroll_blocking(
    address: str | Sequence[str], code: str, device: Device, name: str, **options: Unpack[EnrollOptions]
) -> str:
    """Enroll a device like `enroll`, in a program without an event loop."""
    with connect_blocking(address, session=False, **options) as client:
        enrolled = client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])
