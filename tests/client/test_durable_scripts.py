"""Durable streams of a client whose server follows a script: when they are opened again, and what is reported."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.helpers import (
    DURABLE,
    Action,
    ReceivedRequest,
    ScriptedServer,
    client_of,
    client_of_all,
    cut,
    fail,
    goodbye,
    now,
    ok,
    refreshable,
    scripted,
    silence,
    token,
    turns,
)
from zcproto.client import credentials
from zcproto.client.streams import Stream
from zcproto.errors import CallError, Cancelled, Code, ConnectionClosed, DeadlineExceeded, InternalError
from zcproto.wire.frame import CREDIT, END, ERROR, ITEM, RESPONSE
from zcproto.wire.message import Resume, encode_error


def run(items: int = 0, then: Action = silence) -> Action:
    """Accept a durable stream, send the items of a run up to a position, and then what another action sends."""

    def act(request: ReceivedRequest) -> None:
        assert request.resume is not None
        request.accept()
        for number in range(request.resume.position, items):
            request.link.item(request.stream, number)
        then(request)

    return act


def after(seconds: float, action: Action) -> Action:
    """Act later."""
    return lambda request: request.link.loop.call_later(seconds, action, request)


def detached(reason: str, code: Code = Code.CANCELLED, **details: Any) -> Action:
    """End the attachment and not the run."""
    return fail(code, reason=reason, detached=True, **details)


def stale(kind: int, body: bytes = b"\x01") -> Action:
    """Send a frame that is stale on arrival."""

    def act(request: ReceivedRequest) -> None:
        server = request.link.server
        server.ahead_ms -= 40_000
        request.link.send(kind, request.stream, body, token=request.token)
        server.ahead_ms += 40_000

    return act


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer(**DURABLE)


def resumes(server: ScriptedServer) -> list[tuple[int, bool]]:
    """Return the position of each OPEN, and whether it attaches."""
    opens = [request.resume for request in server.calls("chat")]
    assert len({each.id for each in opens if each is not None}) == 1, "all are of one run"
    return [(each.position, each.attaches) for each in opens if each is not None]


def reports(server: ScriptedServer) -> list[int]:
    """Return `taken` of each CREDIT on the last connection that has it."""
    sent = [value for kind, _, _, value in server.link.on_streams if kind == CREDIT]
    return [value[2] for value in sent if len(value) == 3]


async def take_all(stream: Stream) -> list[Any]:
    return [item async for item in stream]


# --- when a stream is opened again ------------------------------------------------------------------------


@scripted
async def test_first_open_is_repeated_for_five_minutes(server: ScriptedServer) -> None:
    server.script("chat", *[cut] * 1_000)
    async with client_of(server) as client:
        with pytest.raises(ConnectionClosed):
            await take_all(client.stream("chat", n=1, durable=True))
    opens = server.calls("chat")
    assert {request.params["n"] for request in opens} == {1}
    assert set(resumes(server)) == {(0, False)}
    assert 250 < opens[-1].at - opens[0].at < 300


@scripted
async def test_first_open_is_not_sent_after_a_long_time_without_a_connection(server: ScriptedServer) -> None:
    server.script("chat", silence)
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        await turns()
        server.refuse = [ConnectionClosed("refused")] * 12
        server.delay = 30.0
        await server.lose()
        with pytest.raises(ConnectionClosed, match="call durable_streams"):
            await stream.receive()
    assert len(server.calls("chat")) == 1


@pytest.mark.parametrize("seconds", [0, 400])
@scripted
async def test_accepted_run_is_attached_without_params(seconds: float) -> None:
    server = ScriptedServer(**DURABLE)
    server.script("chat", run(0, after(seconds, cut)), run(2, cut), run(3, ok("done")))
    async with client_of(server) as client, client.stream("chat", n=3, durable=True) as stream:
        assert await take_all(stream) == [0, 1, 2]
        assert (stream.result, stream.position) == ("done", 3)
    assert resumes(server) == [(0, False), (0, True), (2, True)]
    assert [request.params for request in server.calls("chat")] == [{"n": 3}, {}, {}]


@pytest.mark.parametrize(
    "how",
    [
        cut,
        goodbye,
        detached("slow"),
        detached("stale", server_time=1),
        detached("draining", retry_after_ms=100),
        detached("memory"),
        detached("token_rotated"),
        detached("token_expired"),
        stale(ITEM),
        stale(RESPONSE),
        stale(ERROR, encode_error(Code.NOT_FOUND, "stale")),
    ],
    ids=[
        *("cut", "goodbye", "slow", "stale", "draining", "memory", "token_rotated", "token_expired"),
        *("stale item", "stale answer", "stale error"),
    ],
)
@scripted
async def test_interrupted_attachment_goes_on_at_its_position(how: Action) -> None:
    server = ScriptedServer(**DURABLE)
    server.script("chat", run(2, how), run(3, ok("done")))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        got = [await stream.receive()]
        got += await take_all(stream)
    assert got == [0, 1, 2]
    assert resumes(server)[1][1]


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.CANCELLED, {"reason": "resumed_elsewhere", "detached": True}),
        (Code.CANCELLED, {"reason": "token_revoked"}),
        (Code.CANCELLED, {"reason": "abandoned"}),
        (Code.NOT_FOUND, {}),
        (Code.OUT_OF_RANGE, {"first": 7, "next": 9}),
        (Code.FAILED_PRECONDITION, {}),
        (Code.DATA_LOSS, {}),
        (Code.UNKNOWN, {"reason": "owner_lost", "items": 2}),
    ],
)
@scripted
async def test_end_of_the_run_is_raised(code: Code, details: dict[str, Any]) -> None:
    for answer in (run(2, fail(code, **details)), fail(code, **details)):
        server = ScriptedServer(**DURABLE)
        server.script("chat", run(0, cut), answer)
        async with client_of(server) as client:
            with pytest.raises(CallError) as caught:
                await take_all(client.stream("chat", durable=True))
        assert (caught.value.code, caught.value.details) == (code, details)
        assert len(resumes(server)) == 2


@pytest.mark.parametrize("loss", [cut, fail(Code.UNAVAILABLE)], ids=["connection", "unavailable"])
@scripted
async def test_stream_resumed_by_an_open_that_was_lost_goes_on_once(loss: Any) -> None:
    """The server may carry out that OPEN after the one that followed it."""
    server, elsewhere = ScriptedServer(**DURABLE), detached("resumed_elsewhere")
    server.script("chat", loss, run(1, elsewhere), run(2, elsewhere))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        assert [await stream.receive(), await stream.receive()] == [0, 1]
        with pytest.raises(Cancelled):
            await stream.receive()
    assert resumes(server) == [(0, False), (0, False), (1, True)]


@scripted
async def test_draining_server_is_left_for_another_address() -> None:
    first, second = (ScriptedServer(**DURABLE) for _ in range(2))

    def drain(request: ReceivedRequest) -> None:
        request.link.go_away("draining", 60_000)
        detached("draining", retry_after_ms=60_000)(request)

    first.script("chat", run(2, drain))
    second.script("chat", run(3, ok("done")))
    async with (
        client_of_all({"first.example": first, "second.example": second}) as client,
        client.stream("chat", durable=True) as stream,
    ):
        began = now()
        assert await take_all(stream) == [0, 1, 2]
        assert now() - began < 1.0, "the delay is of the first server"
    assert resumes(second) == [(2, True)]


@scripted
async def test_each_attachment_may_renew_the_session(server: ScriptedServer) -> None:
    server.session = refreshable()
    expired = fail(Code.TOKEN_EXPIRED)
    server.script("chat", run(0, cut), expired, run(0, cut), expired, run(0, ok("done")))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        assert await stream.finished() == "done"
    assert [request.token for request in server.calls("chat")][::2] == [token(1), token(2), token(3)]


@scripted
async def test_delays_grow_while_attachments_end_at_once_and_not_after_a_stable_one(
    server: ScriptedServer,
) -> None:
    end = detached("memory")
    server.script("chat", *[run(0, end)] * 6, *[run(0, after(60.0, end))] * 3, run(0, ok(1)))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        assert await stream.finished() == 1
    times = [request.at for request in server.calls("chat")]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[:6] == sorted(waits[:6])
    assert waits[5] > 1.0
    assert all(60.0 < wait < 60.2 for wait in waits[6:])


@scripted
async def test_timeout_ends_the_attachments(server: ScriptedServer) -> None:
    server.script("chat", run(1))
    async with client_of(server) as client, client.stream("chat", durable=True, timeout=5.0) as stream:
        assert await stream.receive() == 0
        with pytest.raises(DeadlineExceeded):
            await stream.receive()
    server.script("chat", run(1, detached("deadline", Code.DEADLINE_EXCEEDED)))
    async with client_of(server) as client, client.stream("chat", durable=True, timeout=0.01) as stream:
        assert await stream.receive() == 0
        with pytest.raises(DeadlineExceeded):
            await stream.receive()


@scripted
async def test_closed_client_attaches_no_more(server: ScriptedServer) -> None:
    server.script("chat", run(1))
    client = await client_of(server)
    async with client.stream("chat", durable=True) as stream:
        assert await stream.receive() == 0
        await client.close()
        with pytest.raises(ConnectionClosed):
            await stream.receive()
    assert len(server.calls("chat")) == 1


# --- leaving and cancelling -------------------------------------------------------------------------------


def ends(server: ScriptedServer) -> list[int]:
    return [stream for kind, stream, _, _ in server.link.on_streams if kind == END]


@scripted
async def test_leaving_sends_end_and_not_cancel(server: ScriptedServer) -> None:
    for how in (silence, run(1)):  # before ACCEPTED, too
        server.script("chat", how)
        async with client_of(server) as client:
            async with client.stream("chat", durable=True):
                await turns()
            await turns()
            assert ends(server) == [server.link.requests[-1].stream]
            assert server.link.cancelled == []


@scripted
async def test_item_that_cannot_be_decoded_detaches(server: ScriptedServer) -> None:
    server.script("chat", run(1, lambda request: request.link.send(ITEM, request.stream, b"\xc1")))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        assert await stream.receive() == 0
        with pytest.raises(InternalError, match="item 1 cannot be read"):
            await stream.receive()
        await turns()
        assert (stream.position, ends(server), server.link.cancelled) == (
            1,
            [server.calls("chat")[0].stream],
            [],
        )


@scripted
async def test_cancel_cancels_the_run_of_the_attachment(server: ScriptedServer) -> None:
    server.script("chat", run(2))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        assert await stream.receive() == 0
        cancelling = asyncio.create_task(stream.cancel())
        await turns()
        (request,) = server.calls("chat")
        assert server.link.cancelled == [request.stream]
        assert not cancelling.done()
        request.fail(Code.CANCELLED, {"reason": "caller"})
        assert await cancelling
        with pytest.raises(Cancelled):
            await stream.receive()
    assert (ends(server), server.calls("stream.cancel")) == ([], [])


@pytest.mark.parametrize(
    "how", [cut, detached("token_rotated"), ok("done"), silence], ids=["cut", "rotated", "ended", "silent"]
)
@scripted
async def test_cancel_that_was_not_answered_is_sent_by_id(how: Action) -> None:
    server = ScriptedServer(**DURABLE)
    server.script("chat", run(1))
    server.script("stream.cancel", ok({"cancelled": True}))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        assert await stream.receive() == 0
        cancelling = asyncio.create_task(stream.cancel())
        await turns()
        how(server.calls("chat")[0])
        assert await cancelling
    assert [request.params for request in server.calls("stream.cancel")] == [{"id": stream.id}]


@scripted
async def test_durable_stream_sends_no_items(server: ScriptedServer) -> None:
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        with pytest.raises(RuntimeError, match="sends no items"):
            await stream.send(1)


# --- what is reported -------------------------------------------------------------------------------------


@scripted
async def test_slow_reader_is_sent_no_more_than_its_window(server: ScriptedServer) -> None:
    server.script("chat", run(2))
    async with (
        client_of(server) as client,
        client.stream("chat", durable=True, window=(2, 10_000)) as stream,
    ):
        await asyncio.sleep(10)
        assert server.link.on_streams == []
        assert await stream.receive() == 0
        await turns()
        assert reports(server) == [], "the application has not finished with the item"
        assert await stream.receive() == 1
        await turns()
        assert reports(server) == [1]
        await asyncio.sleep(10)
        assert reports(server)[-1] == 1


@scripted
async def test_taken_is_reported_a_second_after_the_last_item(server: ScriptedServer) -> None:
    server.script("chat", run(3))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        reader = asyncio.create_task(take_all(stream))
        await asyncio.sleep(0.9)
        assert reports(server) == []
        await asyncio.sleep(0.2)
        assert reports(server) == [3]
        await asyncio.sleep(60)
        assert reports(server) == [3], "it is sent once"
        server.calls("chat")[0].respond()
        assert await reader == [0, 1, 2]


@pytest.mark.parametrize("delay", [0.0, 5.0])
@scripted
async def test_taken_is_reported_on_each_attachment(delay: float) -> None:
    server = ScriptedServer(**DURABLE)
    server.script("chat", run(3, after(30.0, cut)), after(delay, run()))
    async with client_of(server) as client, client.stream("chat", durable=True) as stream:
        reader = asyncio.create_task(take_all(stream))
        await asyncio.sleep(40.0)
        assert resumes(server) == [(0, False), (3, True)]
        assert reports(server) == [3]
        server.calls("chat")[1].respond()
        assert await reader == [0, 1, 2]


# --- the session file -------------------------------------------------------------------------------------


class Disk:
    """The file of positions, whose writes may fail. `written` has the positions in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures = 0
        self.written: list[int] = []
        self.on_write: Callable[[], None] = lambda: None

    def replace(self, path: Path, data: bytes) -> None:
        self.on_write()
        if self.failures:
            self.failures -= 1
            raise OSError("no space left on device")
        (position,) = json.loads(data)["streams"].values()
        self.written.append(position)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_threads: None) -> Disk:
    disk = Disk(tmp_path / "session.json")

    def replace(path: Path, data: bytes) -> None:
        if path.suffix == ".streams":
            disk.replace(path, data)

    monkeypatch.setattr(credentials, "replace_file", replace)
    return disk


@scripted
async def test_position_is_written_before_it_is_reported(server: ScriptedServer, disk: Disk) -> None:
    before: list[list[int]] = []
    disk.on_write = lambda: before.append(reports(server))
    server.script("chat", run(3))
    async with (
        client_of(server, session_file=disk.path) as client,
        client.stream("chat", durable=True, window=(3, 10_000)) as stream,
    ):
        reader = asyncio.create_task(take_all(stream))
        await asyncio.sleep(0.1)
        assert disk.written == reports(server) == [3]
        server.link.item(server.calls("chat")[0].stream, 3)
        await turns()
        assert reports(server)[-1] == 3, "a CREDIT reports no more than was written"
        await asyncio.sleep(0.1)
        assert disk.written == [3, 4]
        server.calls("chat")[0].respond()
        assert await reader == [0, 1, 2, 3]
    assert [max(each, default=0) for each in before] == [0, 3]


@scripted
async def test_nothing_is_reported_while_the_disk_fails(server: ScriptedServer, disk: Disk) -> None:
    disk.failures = 3
    server.script("chat", run(1))
    async with (
        client_of(server, session_file=disk.path) as client,
        client.stream("chat", durable=True) as stream,
    ):
        reader = asyncio.create_task(take_all(stream))
        await asyncio.sleep(2)
        assert reports(server) == []
        await asyncio.sleep(2)
        assert (disk.written, reports(server)) == ([1], [1])
        server.calls("chat")[0].respond()
        await reader


@scripted
async def test_another_client_without_the_lock_of_the_file_reports_without_writing(
    server: ScriptedServer, disk: Disk
) -> None:
    server.script("chat", run(1))
    async with (
        client_of(server, session_file=disk.path),
        client_of(server, session_file=disk.path) as client,
        client.stream("chat", durable=True) as stream,
    ):
        reader = asyncio.create_task(take_all(stream))
        await asyncio.sleep(2)
        assert (disk.written, reports(server)) == ([], [1])
        server.calls("chat")[0].respond()
        await reader


async def test_write_that_is_left_ends_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow write of an older position must not replace a newer one."""
    written: list[int] = []
    loop = asyncio.get_running_loop()
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(function: Callable[..., Any], path: Path, data: bytes) -> None:
        begun.set()
        await may_end.wait()
        written.extend(json.loads(data)["streams"].values())

    class Held:
        is_held = True
        positions_path = tmp_path / "session.json.streams"

    monkeypatch.setattr(asyncio, "to_thread", slow)
    positions = credentials.PositionFile(Held())  # type: ignore[arg-type]
    first = loop.create_task(positions.keep("a", 1))
    await begun.wait()
    first.cancel()
    second = loop.create_task(positions.keep("a", 2))
    await asyncio.sleep(0)
    may_end.set()
    assert await second
    assert written == [1, 2]


# --- resume -----------------------------------------------------------------------------------------------


@scripted
async def test_resume_attaches_at_once_if_the_method_is_given(server: ScriptedServer) -> None:
    server.script("chat", run(6, ok("done")))
    async with client_of(server) as client:
        stream = client.resume("A" * 22, method="chat", after=5)
        assert await take_all(stream) == [5]
        assert (stream.id, stream.position, stream.result) == ("A" * 22, 6, "done")
    assert server.calls("chat")[0].resume == Resume("A" * 22, 5, attaches=True)
    assert server.calls("stream.list") == []
