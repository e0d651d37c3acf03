"""One connection, with a scripted server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.exceptions import ResponseError

from tests.limits import TIMEOUT
from tests.stores.valkey.server_process import until
from zcproto.errors import ConfigError
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.valkey.link import LAST_CHECK_S, Link, Target
from zcproto.stores.valkey.servers import check_server

HELLO = b"%3\r\n$6\r\nserver\r\n$6\r\nvalkey\r\n$7\r\nversion\r\n$5\r\n8.1.1\r\n$5\r\nproto\r\n:3\r\n"
SILENCE = 0.1


class ScriptedServer:
    """A server that greets correctly and then sends what a test requires."""

    def __init__(self) -> None:
        self.greeting = HELLO
        self.received: list[bytes] = []
        self.writer: asyncio.StreamWriter | None = None
        self.server: asyncio.Server | None = None
        self.closed = asyncio.Event()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        try:
            while True:
                words = await self.read(reader)
                if words[0] == b"HELLO":
                    writer.write(self.greeting)
                elif words[0] == b"CLIENT":
                    writer.write(b"+OK\r\n")
                else:
                    self.received.append(b" ".join(words))
        except (asyncio.IncompleteReadError, OSError):
            self.closed.set()

    async def read(self, reader: asyncio.StreamReader) -> list[bytes]:
        words = []
        for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
            size = int((await reader.readuntil(b"\r\n"))[1:])
            words.append((await reader.readexactly(size + 2))[:-2])
        return words

    def say(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)

    @property
    def target(self) -> Target:
        assert self.server is not None
        return Target(
            "127.0.0.1", self.server.sockets[0].getsockname()[1], username="ann", password="hunter2"
        )


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    scripted.server = await asyncio.start_server(scripted.accept, "127.0.0.1", 0)
    yield scripted
    scripted.server.close()
    if scripted.writer is not None:
        scripted.writer.transport.abort()


class Recorder:
    """Records the callbacks of a connection."""

    def __init__(self) -> None:
        self.all: list[object] = []

    def news(self, keys: list[bytes] | None) -> None:
        self.all.append(keys)

    def lost(self) -> None:
        self.all.append("lost")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def link(scripted: ScriptedServer, recorder: Recorder) -> AsyncIterator[Link]:
    link = await Link.connect(scripted.target, TIMEOUT, recorder.news, recorder.lost)
    yield link
    await link.close()


async def test_replies_are_matched_to_commands_in_order(link: Link, scripted: ScriptedServer) -> None:
    calls = asyncio.gather(link.call("GET", b"a"), link.call("GET", "b"), link.call("INCRBY", "c", 7))
    await until(lambda: scripted.received == [b"GET a", b"GET b", b"INCRBY c 7"])
    scripted.say(b"$1\r\n1\r\n_\r\n:3\r\n")
    assert await calls == [b"1", None, 3]


async def test_invalidation_comes_in_order_between_replies(
    link: Link, scripted: ScriptedServer, recorder: Recorder
) -> None:
    calls = [asyncio.ensure_future(link.call("GET", name)) for name in "ab"]
    for call in calls:
        call.add_done_callback(lambda call: recorder.all.append(call.result()))
    await until(lambda: len(scripted.received) == 2)
    scripted.say(b"+one\r\n>2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\nx\r\n$1\r\ny\r\n+two\r\n")
    await asyncio.gather(*calls)
    assert sorted(map(str, recorder.all)) == sorted(["b'one'", "b'two'", "[b'x', b'y']"])
    scripted.say(b">2\r\n$10\r\ninvalidate\r\n_\r\n")
    await until(lambda: recorder.all[-1:] == [None])


async def test_error_reply_affects_only_its_command(link: Link, scripted: ScriptedServer) -> None:
    calls = asyncio.gather(link.call("GET", "a"), link.call("GET", "b"), return_exceptions=True)
    await until(lambda: len(scripted.received) == 2)
    scripted.say(b"-ERR no\r\n+yes\r\n")
    refused, answered = await calls
    assert isinstance(refused, ResponseError)
    assert answered == b"yes"
    assert not link.lost


async def test_cancelled_command_does_not_change_the_order_of_replies(
    link: Link, scripted: ScriptedServer
) -> None:
    calls = [asyncio.ensure_future(link.call("GET", name)) for name in "ab"]
    await until(lambda: len(scripted.received) == 2)
    calls[0].cancel()
    await asyncio.sleep(0)
    scripted.say(b"+one\r\n+two\r\n")
    assert await calls[1] == b"two"
    assert not link.lost


async def test_silent_connection_is_lost(link: Link, scripted: ScriptedServer, recorder: Recorder) -> None:
    link._silence = SILENCE
    other = asyncio.ensure_future(link.call("GET", "b"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SILENCE):
            await link.call("GET", "a")
    await until(lambda: bool(link.lost))
    assert link.lost == "no answer within 100 ms"
    assert recorder.all == ["lost"]
    for call in (other, link.call("GET", "c")):
        with pytest.raises(StoreUnavailable, match="no answer within 100 ms"):
            await call
    await scripted.closed.wait()


async def test_blocked_event_loop_does_not_count_as_silence(link: Link, scripted: ScriptedServer) -> None:
    link._silence = SILENCE

    async def impatient() -> None:
        async with asyncio.timeout(SILENCE):
            await link.call("GET", "a")

    call = asyncio.ensure_future(impatient())
    await until(lambda: len(scripted.received) == 1)
    scripted.say(b"+one\r\n")
    time.sleep(SILENCE)  # noqa: ASYNC251 - what is tested
    await asyncio.gather(call, return_exceptions=True)
    second = asyncio.ensure_future(link.call("GET", "b"))
    await until(lambda: len(scripted.received) == 2)
    await asyncio.sleep(0.02)
    scripted.say(b"+two\r\n")
    assert await second == b"two"


async def test_caller_with_a_shorter_timeout_does_not_lose_the_connection(
    link: Link, scripted: ScriptedServer
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SILENCE):
            await link.call("GET", "a")
    await asyncio.sleep(2 * LAST_CHECK_S)
    assert not link.lost


async def test_connection_with_other_replies_is_not_silent(link: Link, scripted: ScriptedServer) -> None:
    link._silence = SILENCE
    first, second = (asyncio.ensure_future(link.call("GET", name)) for name in "ab")
    await until(lambda: len(scripted.received) == 2)
    scripted.say(b"+one\r\n")
    assert await first == b"one"
    await asyncio.sleep(SILENCE)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.sleep(2 * LAST_CHECK_S)
    assert not link.lost
    third = asyncio.ensure_future(link.call("GET", "c"))
    await until(lambda: len(scripted.received) == 3)
    scripted.say(b"+two\r\n+three\r\n")  # late, after the callers gave up
    assert await third == b"three"


@pytest.mark.parametrize(
    "reply",
    [
        b"\x15\x03\x01\r\n",
        b":1x\r\n",
        b"+unasked\r\n",
        b"$x\r\n",
        b"-LOADING it reads its file\r\n",
        b"$5\r\nab",
    ],
    ids=["garbage", "no number", "unasked", "no length", "not ready", "cut short"],
)
async def test_invalid_reply_loses_the_connection(
    link: Link, scripted: ScriptedServer, recorder: Recorder, reply: bytes
) -> None:
    scripted.say(reply)
    if reply.startswith(b"$5"):
        assert scripted.writer is not None
        scripted.writer.close()
    await until(lambda: recorder.all == ["lost"])
    assert link.lost
    with pytest.raises(StoreUnavailable):
        await link.call("GET", "a")


async def test_commands_in_flight_are_bounded(
    link: Link, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.link.MAX_WAITING", 3)
    waiting = [link.send("GET", name) for name in "abc"]
    with pytest.raises(StoreUnavailable, match="too many operations are waiting"):
        link.send("GET", "d")
    await until(lambda: len(scripted.received) == 3)
    scripted.say(b"+1\r\n+2\r\n+3\r\n")
    assert await asyncio.gather(*waiting) == [b"1", b"2", b"3"]


async def test_close_fails_commands_in_flight_without_reporting_a_loss(
    link: Link, recorder: Recorder
) -> None:
    call = asyncio.ensure_future(link.call("GET", "a"))
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await call
    assert recorder.all == []
    await link.close()


GREETINGS = {
    "an old one": (b"-ERR unknown command 'HELLO'\r\n", ConfigError, "cannot be used"),
    "no user": (b"-WRONGPASS invalid username-password pair hunter2\r\n", ConfigError, r"password: .*\*\*\*"),
    "not ready": (b"-LOADING it reads its file\r\n", StoreUnavailable, "it reads its file"),
    "a list": (b"*0\r\n", StoreUnavailable, "does not answer like"),
    "another version": (b"%1\r\n$5\r\nproto\r\n:2\r\n", StoreUnavailable, "RESP"),
    "something else": (b"HTTP/1.1 400 Bad Request\r\n\r\n", StoreUnavailable, "127.0.0.1"),
}


@pytest.mark.parametrize("kind", GREETINGS)
async def test_server_that_is_not_valkey_is_refused(scripted: ScriptedServer, kind: str) -> None:
    scripted.greeting, error, message = GREETINGS[kind]
    with pytest.raises(error, match=message) as refused:
        await Link.connect(scripted.target, SILENCE)
    assert "hunter2" not in str(refused.value)
    await until(scripted.closed.is_set)


class Answering:
    """A connection with one reply."""

    def __init__(self, **about: Any) -> None:
        self.about = {name.encode(): value for name, value in about.items()}

    async def call(self, *command: object) -> dict[bytes, Any]:
        return self.about


GOOD = {"server": b"redis", "version": b"7.0.0", "mode": b"standalone", "role": b"master"}


@pytest.mark.parametrize(
    ("about", "cluster", "error", "message"),
    [
        ({"version": b"6.2.14"}, False, ConfigError, "has version 6.2.14; install 7 or later"),
        ({"mode": b"cluster"}, False, ConfigError, "redis.cluster"),
        ({}, True, ConfigError, "does not belong to a cluster"),
        ({"mode": b"sentinel", "role": b"sentinel"}, False, ConfigError, "redis.sentinel"),
        ({"role": b"replica"}, False, StoreUnavailable, "a replica"),
        ({"role": b"slave", "mode": b"cluster"}, True, StoreUnavailable, "a replica"),
    ],
)
async def test_unsuitable_server_is_refused(
    about: dict[str, bytes], cluster: bool, error: type[Exception], message: str
) -> None:
    link: Any = Answering(**GOOD | about)
    with pytest.raises(error, match=message):
        await check_server(link, clustered=cluster)


@pytest.mark.parametrize("about", [{}, {"version": b"10.1"}, {"version": b"unstable"}, {"role": b"primary"}])
async def test_suitable_server_is_accepted(about: dict[str, bytes]) -> None:
    check: Callable[..., Awaitable[None]] = check_server
    await check(Answering(**GOOD | about), clustered=False)
    await check(Answering(**GOOD | about | {"mode": b"cluster"}), clustered=True)
