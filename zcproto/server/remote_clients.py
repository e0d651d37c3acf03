"""Finds the clients of the other processes of a server, and calls them.

    find -> FIND to all -> FOUND of each process that got it
    call -> CALL to the process of the client -> the call in that process -> ANSWER
            each CHECK_S: CHECK with the calls that wait -> ANSWER again, ALIVE with the calls that are unknown

A registration is state of the process that has the connection, a call of that one and of its caller's. They end
with these processes. A copy in a store would have to be repaired after each failover or death of a coordinator.
Messages are events of shared topics (zcproto/bus/topics.py): one of all processes, an inbox of each. They may be
lost; CHECK repairs that.

Rules:
- A call is sent once. It ends with ConnectionClosed if its process does not know it any more, or is lost: nothing
  came from it for LOST_S while this one was connected, or nothing followed its inbox for the carrier's `absence_s`.
- A call that is not waited for any more is withdrawn, also when its caller's process is lost.
- An answer is kept until a CHECK does not have its call, within KEPT_BYTES.
- A process connects to the others when its first client handles calls, or when it first looks for clients.

It must not know: how messages get to other processes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgpack

from zcproto.app.context import ConnectedClient
from zcproto.bus.topics import INBOX, OnSent, SharedTopics
from zcproto.connection.server_calls import CallToClient, encode_call
from zcproto.errors import (
    CallError,
    ConnectionClosed,
    DeadlineExceeded,
    ResourceExhausted,
    Unavailable,
)
from zcproto.server.calls import REFUSED
from zcproto.server.clients import CallsInFlight
from zcproto.server.remote_pending import RemotePending
from zcproto.server.state import ServerState
from zcproto.wire.message import decode_body, decode_error, encode_body, encode_error

ALL: Final = "zcproto:clients"
"""The topic that every process follows."""

FIND_S: Final = 0.5
JOIN_S: Final = 1.0
CHECK_S: Final = 1.0
LOST_S: Final = 10.0

MOST_FINDS: Final = 256
"""Searches of one process at once."""

MAX_BODY: Final = 4 << 20
"""Bytes of parameters, or of an answer, between processes."""

KEPT_BYTES: Final = 8 << 20
ANSWER_BYTES: Final = 256
"""What a kept answer takes beside its body."""

MAX_INBOXES: Final = 1_024
_ID_SIZE: Final = 8
_RETRY_MS: Final = 1_000

FIND, FOUND, CALL, WITHDRAW, ANSWER, CHECK, ALIVE = range(7)
RESULT, ERROR, CLOSED = range(3)


class Inbox:
    """A topic of messages. `receive` is called with each that comes."""

    def __init__(self, name: str, receive: Any = None) -> None:
        self.name = name
        self.carrier: SharedTopics | None = None
        self._receive = receive

    def receive(self, body: bytes | None, missed: int = 0) -> None:
        if body is not None and self._receive is not None:
            self._receive(body)


class RemoteClient:
    """The connection of a client in another process."""

    __slots__ = ("_clients", "connection_id", "peer", "process")

    def __init__(self, clients: RemoteClients, process: str, connection_id: str, peer: str) -> None:
        self._clients = clients
        self.process = process
        self.connection_id = connection_id
        self.peer = peer

    async def call_client(self, user: str, session_id: str, call: CallToClient) -> Any:
        """Call a method of the client where it is connected."""
        return await self._clients.state.trace_call(
            call, self.peer, partial(self._clients.call, self, user, session_id)
        )


@dataclass(slots=True)
class _Search:
    """What the processes have answered to one message, each once."""

    done: asyncio.Future[None]
    found: dict[str, Any] = field(default_factory=dict)
    expected: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.expected is not None and len(self.found) >= self.expected

    def check(self) -> None:
        if self.is_complete and not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True)
class _Host:
    """A process with clients that methods of this one call. Times are monotonic seconds."""

    heard: float
    absent: float | None = None
    calls: dict[int, asyncio.Future[Any]] = field(default_factory=dict)


@dataclass(slots=True)
class _Guest:
    """A process whose methods call clients of this one, and its calls: the task or the answer of each."""

    heard: float
    last: int = 0
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    answers: OrderedDict[int, tuple[int, bytes]] = field(default_factory=OrderedDict)


class RemoteClients:
    """The clients of the other processes, for this one, whose own it offers to them."""

    def __init__(self, state: ServerState, topics: SharedTopics) -> None:
        self.state = state
        self._topics = topics
        self.process = state.entropy(_ID_SIZE).hex()
        self._inbox = INBOX + self.process
        self._number = 0
        self._searches: dict[int, _Search] = {}
        self._hosts: dict[str, _Host] = {}
        self._guests: dict[str, _Guest] = {}
        self._kept = 0
        self._calls = CallsInFlight()
        self._inboxes: OrderedDict[str, None] = OrderedDict()
        self._ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._is_begun = self._has_joined = False
        self.handlers: dict[int, Callable[..., None]] = {
            FIND: self._asked,
            FOUND: self._found,
            CALL: self._called,
            WITHDRAW: self._withdrawn,
            ANSWER: self._answered,
            CHECK: self._checked,
            ALIVE: self._heard,
        }
        self.pending = RemotePending(self)
        topics.on_followed, topics.on_down = self._followed, self._cut_off
        state.clients.on_registered = self.begin

    # --- the carrier -----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """The calls of this process that clients of others have not answered."""
        return self._calls.total

    def begin(self) -> None:
        """Connect to the other processes. Idempotent."""
        if not self._is_begun:
            self._is_begun = True
            for name in (ALL, self._inbox):
                self._topics.add(Inbox(name, self._receive))
                self._topics.follow(name)
            self.spawn(self._topics.start())

    async def stop(self) -> None:
        """Withdraw the calls of others, and fail the own ones."""
        self._is_begun = True
        self.pending.stop()
        for process in [*self._hosts]:
            self._lose(process, ConnectionClosed("the server has stopped; the call may have run"))
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def spawn(self, work: Any) -> asyncio.Task[None]:
        """Run a coroutine until `stop`."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name="zcproto-clients")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _cut_off(self) -> None:
        """Begin to wait for signs of life again: no other process can be heard."""
        now = self.state.clock.now()
        self._ready.clear()
        for host in self._hosts.values():
            host.heard, host.absent = now, None
        for guest in self._guests.values():
            guest.heard = now
        self.pending.cut_off()

    def _followed(self, name: str) -> None:
        if name == self._inbox:
            self._has_joined = True
            self._ready.set()

    def send(self, process: str, *message: Any, on_sent: OnSent | None = None) -> None:
        """Send a message to a process. Raises ResourceExhausted at a limit of the carrier."""
        name = INBOX + process
        if name in self._inboxes:
            self._inboxes.move_to_end(name)
        else:
            self._inboxes[name] = None
            self._topics.add(Inbox(name))
            if len(self._inboxes) > MAX_INBOXES:
                self._topics.remove(self._inboxes.popitem(last=False)[0])
        self._publish(name, *message, on_sent=on_sent)

    def publish(self, *message: Any, on_sent: OnSent | None = None) -> None:
        """Send a message to all processes. Raises like `send`."""
        self._publish(ALL, *message, on_sent=on_sent)

    def _publish(self, name: str, kind: int, *values: Any, on_sent: OnSent | None = None) -> None:
        if self._topics.is_up:
            self._topics.publish(name, msgpack.packb((kind, self.process, *values)), on_sent)

    def _receive(self, body: bytes) -> None:
        kind, sender, *values = msgpack.unpackb(body)
        handler = self.handlers.get(kind)
        if handler is not None:  # else it is of a newer version
            with suppress(TypeError, ValueError):  # likewise
                handler(sender, *values)

    # --- finding ---------------------------------------------------------------------------------------

    async def find(self, user: str | None, handles: str | None, most: int) -> list[ConnectedClient]:
        """Return clients of the other processes. Those of a process that cannot be reached are left out."""
        found, _ = await self.search(FIND, user, handles, most)
        return [
            ConnectedClient(RemoteClient(self, process, connection_id, peer), session_id, user)
            for process, clients in found
            for user, session_id, connection_id, peer in clients
        ][:most]

    async def search(self, kind: int, *values: Any) -> tuple[Iterable[tuple[str, Any]], bool]:
        """Return what each of the other processes answers to a message, and whether all have answered."""
        self.begin()
        if self._has_joined and not self._topics.is_up:
            return (), False
        if len(self._searches) >= MOST_FINDS:
            raise ResourceExhausted(
                "too many searches for clients at once; retry later", {"retry_after_ms": _RETRY_MS}
            )
        number = self._next_number()
        search = self._searches[number] = _Search(asyncio.get_running_loop().create_future())

        def sent(receivers: int) -> None:
            search.expected = receivers - 1  # all but this one
            search.check()

        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(JOIN_S):
                    await self._ready.wait()
                async with asyncio.timeout(FIND_S):
                    self.publish(kind, number, *values, on_sent=sent)
                    await search.done
        finally:
            del self._searches[number]
        return search.found.items(), search.is_complete

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _asked(self, sender: str, number: int, user: str | None, handles: str | None, most: int) -> None:
        self.reply(sender, number, self.state.clients.describe(user, handles, most))

    def reply(self, process: str, number: int, found: Any) -> None:
        """Answer a search."""
        with suppress(ResourceExhausted):  # then this process is left out
            self.send(process, FOUND, number, found)

    def _found(self, sender: str, number: int, found: Any) -> None:
        search = self._searches.get(number)
        if search is not None:
            search.found[sender] = found
            search.check()

    # --- calls of this process -------------------------------------------------------------------------

    async def call(self, client: RemoteClient, user: str, session_id: str, call: CallToClient) -> Any:
        """Call a method of a client. Raises like `ConnectedClient.call`."""
        process, waiter = client.process, asyncio.get_running_loop().create_future()
        host = self._hosts.get(process)
        if host is None:
            host = self._hosts[process] = _Host(self.state.clock.now())

        def sent(receivers: int) -> None:
            if not receivers and not waiter.done():
                self.state.clients.count("unavailable")
                waiter.set_exception(
                    Unavailable("the process of the client has ended; find the client again")
                )

        try:
            with ExitStack() as counted:
                try:
                    counted.enter_context(self._calls.one_for(user, self.state.clients.limits))
                    number = self._next_number()
                    body = self._body(call)
                    if not self._topics.is_up:
                        raise Unavailable(
                            "the process of the client cannot be reached now; retry",
                            {"retry_after_ms": _RETRY_MS},
                        )
                    who = user, session_id, client.connection_id
                    what = call.method, body, call.timeout_s, call.traceparent
                    self.send(process, CALL, number, *who, *what, on_sent=sent)
                except CallError as error:
                    self.state.clients.count(REFUSED[error.code])
                    raise
                host.calls[number] = waiter
                self.watch()
                try:
                    async with asyncio.timeout(call.timeout_s):
                        return await waiter
                except TimeoutError:
                    raise DeadlineExceeded("the client has not answered in time") from None
                finally:
                    del host.calls[number]
                    if waiter.cancelled():
                        self._withdraw(process, number)
        finally:
            if self._watching is None and not host.calls and self._hosts.get(process) is host:
                del self._hosts[process]  # the call was not sent

    def _withdraw(self, process: str, number: int) -> None:
        with suppress(ResourceExhausted):  # then the next CHECK does it
            self.send(process, WITHDRAW, number)

    def _body(self, call: CallToClient) -> bytes:
        if call.timeout_s <= 0:
            raise DeadlineExceeded("the timeout of the call is over")
        encode_call(call, min(self.state.settings.max_body, MAX_BODY))  # raises what a local call does
        return encode_body(call.params)

    def _answered(self, sender: str, number: int, kind: int, body: bytes) -> None:
        host = self._hosts.get(sender)
        waiter = None if host is None else host.calls.get(number)
        if waiter is None or waiter.done():
            return
        if kind == RESULT:
            waiter.set_result(decode_body(body))
        elif kind == ERROR:
            waiter.set_exception(CallError.from_wire(*decode_error(body)))
        else:
            waiter.set_exception(ConnectionClosed(decode_body(body)))

    def _heard(self, sender: str, unknown: list[int]) -> None:
        host = self._hosts.get(sender)
        if host is not None:
            host.heard = self.state.clock.now()
            for number in unknown:
                self._fail(host, number, ConnectionClosed("the call or its answer was lost; it may have run"))

    def _lose(self, process: str, error: ConnectionClosed) -> None:
        self.pending.lose(process)
        host = self._hosts.pop(process)
        for number in [*host.calls]:
            self._fail(host, number, error)

    def _fail(self, host: _Host, number: int, error: ConnectionClosed) -> None:
        waiter = host.calls.get(number)
        if waiter is not None and not waiter.done():
            self.state.clients.count("closed")
            waiter.set_exception(ConnectionClosed(str(error)))

    # --- calls of others -------------------------------------------------------------------------------

    def _called(self, sender: str, number: int, *call: Any) -> None:
        guest = self._guests.get(sender)
        if guest is None:
            guest = self._guests[sender] = _Guest(self.state.clock.now())
        if number > guest.last:  # else it has come before
            guest.last = number
            guest.running[number] = self.spawn(self._run(sender, guest, number, *call))
            self.watch()

    async def _run(
        self,
        sender: str,
        guest: _Guest,
        number: int,
        user: str,
        session_id: str,
        connection_id: str,
        method: str,
        body: bytes,
        timeout: float,  # noqa: ASYNC109  it is sent
        traceparent: str | None,
    ) -> None:
        clients = self.state.clients
        try:
            connection = clients.connection_of(user, session_id, connection_id, method)
            if connection is None:
                clients.count("unavailable")
                raise Unavailable(f"the client handles no method {method!r}; find it again")
            call = CallToClient(method, decode_body(body), timeout, traceparent)
            result = await connection.call_here(session_id, call)
            kind, answer = RESULT, encode_body(result)
            if len(answer) > MAX_BODY:
                raise ResourceExhausted(
                    f"the answer has {len(answer)} bytes; at most {MAX_BODY} fit between processes"
                )
        except CallError as error:
            kind, answer = ERROR, encode_error(error.code, error.message, error.details)
        except ConnectionClosed as error:
            kind, answer = CLOSED, encode_body(str(error))
        finally:
            guest.running.pop(number, None)
        guest.answers[number] = kind, answer
        self._kept += ANSWER_BYTES + len(answer)
        self._send_answer(sender, number, kind, answer)
        while self._kept > KEPT_BYTES:
            oldest = next(each for each in self._guests.values() if each.answers)
            self._drop_answer(oldest, next(iter(oldest.answers)))

    def _send_answer(self, sender: str, number: int, kind: int, answer: bytes) -> None:
        with suppress(ResourceExhausted):  # then it is sent after the next CHECK
            self.send(sender, ANSWER, number, kind, answer)

    def _drop_answer(self, guest: _Guest, number: int) -> None:
        kept = guest.answers.pop(number, None)
        if kept is not None:
            self._kept -= ANSWER_BYTES + len(kept[1])

    def _withdrawn(self, sender: str, number: int) -> None:
        guest = self._guests.get(sender)
        if guest is not None:
            self._forget(guest, number)

    def _forget(self, guest: _Guest, number: int) -> None:
        self._drop_answer(guest, number)
        task = guest.running.pop(number, None)
        if task is not None:
            task.cancel()

    def _checked(self, sender: str, numbers: list[int]) -> None:
        guest = self._guests.get(sender)
        unknown = numbers
        if guest is not None:
            guest.heard = self.state.clock.now()
            for number in {*guest.running, *guest.answers}.difference(numbers):
                self._forget(guest, number)
            for number in numbers:
                if number in guest.answers:
                    self._send_answer(sender, number, *guest.answers[number])
            unknown = [
                number for number in numbers if number not in guest.running and number not in guest.answers
            ]
        with suppress(ResourceExhausted):
            self.send(sender, ALIVE, unknown)

    # --- signs of life ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """Call `check` each CHECK_S while it has something to do."""
        if self._watching is None or self._watching.done():
            self._watching = self.spawn(self._check_each())

    async def _check_each(self) -> None:
        """Check the other processes while there are calls to them, or of them, and once more."""
        while self._hosts or self._guests or self.pending.is_active:
            await asyncio.sleep(CHECK_S)
            self.check(self.state.clock.now())
        self._watching = None

    def check(self, now: float) -> None:
        """Ask the processes of called clients for their calls, and find those that are lost."""
        if not self._topics.is_up:
            self._cut_off()
            return
        self.pending.check(now)
        owners = self.pending.owners
        for process in owners:
            self._hosts.setdefault(process, _Host(now))
        for process, host in [*self._hosts.items()]:
            absent_s = 0.0 if host.absent is None else now - host.absent
            if now - host.heard > LOST_S or absent_s > self._topics.absence_s:
                self._lose(
                    process, ConnectionClosed("the process of the client is lost; the call may have run")
                )
                continue
            with suppress(ResourceExhausted):
                self.send(process, CHECK, [*host.calls], on_sent=self._sent_to(host))
            if not host.calls and process not in owners:  # it has dropped the last answers now
                del self._hosts[process]
        for process, guest in [*self._guests.items()]:
            if now - guest.heard > LOST_S:
                del self._guests[process]
                for number in [*guest.running, *guest.answers]:
                    self._forget(guest, number)

    def _sent_to(self, host: _Host) -> OnSent:
        def sent(receivers: int) -> None:
            if receivers:
                host.absent = None
            elif host.absent is None:
                host.absent = self.state.clock.now()

        return sent
