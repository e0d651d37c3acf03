"""Streams of a client whose server follows a script: lost connections, refusals, when a stream is opened again."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.client.helpers import (
    STREAMS,
    ReceivedRequest,
    ScriptedServer,
    client_of,
    cut,
    fail,
    goodbye,
    ok,
    refreshable,
    scripted,
    silence,
    token,
    turns,
)
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    ConnectionClosed,
    DataLoss,
    DeadlineExceeded,
    ResourceExhausted,
    SessionReplaced,
    StaleTimestamp,
    Unavailable,
)
from zcproto.wire.frame import CREDIT, END, ITEM, RESPONSE, encode_frame
from zcproto.wire.message import encode_body


def items(*values: Any, then: Any = silence) -> Any:
    """Send items, and then what another action sends."""

    def act(request: ReceivedRequest) -> None:
        for value in values:
            request.link.item(request.stream, value)
        then(request)

    return act


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer(**STREAMS)


@pytest.mark.parametrize(("how", "is_clean"), [(cut, False), (goodbye, True)])
@scripted
async def test_lost_connection_ends_a_stream_after_its_items(how: Any, is_clean: bool) -> None:
    server = ScriptedServer(**STREAMS)
    server.script("count", items(1, 2, then=how))
    async with client_of(server) as client, client.stream("count") as stream:
        assert [await stream.receive() for _ in range(2)] == [1, 2]
        with pytest.raises(ConnectionClosed) as caught:
            await stream.receive()
        assert caught.value.clean is is_clean
        await asyncio.sleep(60)
    assert server.methods.count("count") == 1, "a stream that has begun is not opened again"


@scripted
async def test_stream_is_cancelled_if_its_middleware_returns_at_once(server: ScriptedServer) -> None:
    async def hasty(call: Any, call_next: Any) -> None:
        task = asyncio.ensure_future(call_next(call))
        await asyncio.sleep(0)
        task.cancel()

    async with client_of(server, middleware=[hasty]) as client:
        server.script("count", items(1))
        with pytest.raises(RuntimeError, match="returned before the stream ended"):
            async with client.stream("count"):
                pytest.fail("not entered")
        await turns()
        assert server.link.cancelled == [server.calls("count")[0].stream]


@scripted
async def test_stream_that_was_certainly_not_run_is_opened_again(server: ScriptedServer) -> None:
    server.script("count", goodbye, items(1, then=ok("done")))
    async with client_of(server) as client, client.stream("count", n=3) as stream:
        assert [item async for item in stream] == [1]
        assert stream.result == "done"
    assert [request.params for request in server.calls("count")] == [{"n": 3}] * 2


@scripted
async def test_connection_lost_without_an_item_may_have_run_the_stream(server: ScriptedServer) -> None:
    server.script("count", cut)
    async with client_of(server) as client, client.stream("count") as stream:
        with pytest.raises(ConnectionClosed):
            await stream.receive()
    assert len(server.calls("count")) == 1


@scripted
async def test_stale_open_is_opened_again_once(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        stale = fail(Code.STALE_TIMESTAMP, server_time=server.wall())
        server.script("count", stale, ok(1))
        async with client.stream("count") as stream:
            assert await stream.finished() == 1
        server.script("count", stale, stale)
        async with client.stream("count") as stream:
            with pytest.raises(StaleTimestamp):
                await stream.receive()
    assert len(server.calls("count")) == 4


@scripted
async def test_expired_token_is_renewed_before_a_stream_is_opened_again(server: ScriptedServer) -> None:
    server.session = refreshable()
    server.script("count", fail(Code.TOKEN_EXPIRED), ok(1))
    async with client_of(server) as client, client.stream("count") as stream:
        await stream.end()
        assert await stream.finished() == 1
    assert [request.token for request in server.calls("count")] == [token(1), token(2)]
    ends = [each for each in server.link.on_streams if each[0] == END]
    assert [each[2] for each in ends] == [token(1), token(2)], "the end of the items is repeated"


@scripted
async def test_unavailable_is_tried_again_and_a_full_connection_is_not(server: ScriptedServer) -> None:
    server.script("count", fail(Code.UNAVAILABLE, retry_after_ms=500), ok(1))
    server.script("full", fail(Code.RESOURCE_EXHAUSTED, limit=4))
    server.script("later", fail(Code.UNAVAILABLE, retry_after_ms=9_000))
    async with client_of(server) as client:
        async with client.stream("count") as stream:
            assert await stream.finished() == 1
        with pytest.raises(ResourceExhausted):
            async with client.stream("full") as stream:
                await stream.receive()
        with pytest.raises(Unavailable):
            async with client.stream("later", timeout=5.0) as stream:
                await stream.receive()


@scripted
async def test_large_open_shows_the_token_first(server: ScriptedServer) -> None:
    server.script("count", ok(1))
    async with client_of(server) as client:
        await client.call("echo")
        await server.lose()
        async with client.stream("count", text="x" * 20_000) as stream:
            assert await stream.finished() == 1
    assert server.methods[-3:-1] == ["session.info", "count"]


@scripted
async def test_nothing_is_taken_from_the_application_before_a_stream_is_opened_again() -> None:
    server, taken = ScriptedServer(**STREAMS), []

    def source() -> Any:
        for number in range(3):
            taken.append(number)
            yield number

    server.script("sum", goodbye, silence)
    async with client_of(server) as client, client.stream("sum", items=source()) as stream:
        await asyncio.sleep(10)
        assert len(server.calls("sum")) == 2
        assert taken == []
        request = server.calls("sum")[1]
        server.link.credit(request.stream, 2)
        await turns()
        assert taken == [0, 1]
        server.link.credit(request.stream, 9)
        await turns()
        sent = [(each[0], each[3]) for each in server.link.on_streams]
        assert sent == [(ITEM, 0), (ITEM, 1), (ITEM, 2), (END, None)]
        request.respond("done")
        assert await stream.finished() == "done"


@scripted
async def test_many_items_of_one_read_wake_the_application_once_and_keep_their_order() -> None:
    server = ScriptedServer(**STREAMS)
    server.script("count", silence)
    async with client_of(server) as client, client.stream("count", window=(2_000, 10**6)) as stream:
        reader = asyncio.create_task(stream.receive())
        await turns()
        link, (request,) = server.link, server.calls("count")
        wakes = 0
        pending = stream._pending
        assert pending is not None
        waiter = pending._waiter
        assert waiter is not None

        def woken(_: object) -> None:
            nonlocal wakes
            wakes += 1

        waiter.add_done_callback(woken)
        frames = [
            encode_frame(
                ITEM, request.stream, server.wall(), link.salt, link.counter + n, request.token, body
            )
            for n, body in enumerate(map(encode_body, range(1_000)))
        ]
        link.counter += 1_000
        link.protocol.data_received(b"".join(frames))
        assert await reader == 0
        assert wakes == 1
        assert [await stream.receive() for _ in range(999)] == [*range(1, 1_000)]


@scripted
async def test_frames_of_a_stream_keep_the_token_of_its_open_after_a_refresh(server: ScriptedServer) -> None:
    server.session = refreshable()
    server.script("count", silence)
    server.script("echo", fail(Code.TOKEN_EXPIRED), ok(1))
    async with client_of(server) as client, client.stream("count", window=(2, 10_000)) as stream:
        await turns()
        await client.call("echo")
        (request,) = server.calls("count")
        for number in range(2):
            server.link.item(request.stream, number)
        await stream.receive()
        await turns()
        assert server.calls("echo")[-1].token == token(2)
        assert {each[2] for each in server.link.on_streams if each[0] == CREDIT} == {token(1)}


@scripted
async def test_replaced_session_ends_a_stream_and_the_client_does_not_come_back() -> None:
    server = ScriptedServer(**STREAMS)
    server.script("count", silence)
    async with client_of(server) as client, client.stream("count") as stream:
        await turns()
        (request,) = server.calls("count")
        server.script("session.info", fail(Code.SESSION_REPLACED))
        server.link.event("session.revoked", {"reason": "replaced"}, token(1))
        request.fail(Code.CANCELLED, {"reason": "session_replaced"})
        with pytest.raises(Cancelled) as caught:
            await stream.receive()
        assert caught.value.details == {"reason": "session_replaced"}
        await asyncio.sleep(60)
        with pytest.raises(SessionReplaced):
            await client.call("echo")
    assert server.methods.count("session.open") == 1


@scripted
async def test_item_that_cannot_be_read_fails_the_stream_and_cancels_the_method() -> None:
    server = ScriptedServer(**STREAMS)
    server.script("count", silence)
    async with client_of(server) as client, client.stream("count") as stream:
        await turns()
        (request,) = server.calls("count")
        server.link.send(ITEM, request.stream, b"\xc1")
        with pytest.raises(Exception, match="item 0 cannot be read"):
            await stream.receive()
        await turns()
        assert server.link.cancelled == [request.stream]


@scripted
async def test_stale_item_fails_the_stream_with_data_loss_and_cancels_the_method() -> None:
    server = ScriptedServer(**STREAMS)
    server.script("count", silence)
    async with client_of(server) as client, client.stream("count") as stream:
        await turns()
        (request,) = server.calls("count")
        server.link.item(request.stream, 1)
        assert await stream.receive() == 1
        server.ahead_ms = -40_000
        server.link.item(request.stream, 2)
        with pytest.raises(DataLoss):
            await stream.receive()
        await turns()
        assert server.link.cancelled == [request.stream]


# --- reopen -----------------------------------------------------------------------------------------------


def stale(request: ReceivedRequest) -> None:
    request.fail(Code.CANCELLED, {"reason": "stale", "server_time": 1})


def draining(request: ReceivedRequest) -> None:
    request.fail(Code.CANCELLED, {"reason": "draining", "retry_after_ms": 5_000})


def late_item(request: ReceivedRequest) -> None:
    late(ITEM, request)


def late_answer(request: ReceivedRequest) -> None:
    late(RESPONSE, request)


def late(kind: int, request: ReceivedRequest) -> None:
    """Send a frame that is stale on arrival."""
    server = request.link.server
    server.ahead_ms -= 40_000
    request.link.send(kind, request.stream, encode_body({"id": 0}), token=request.token)
    server.ahead_ms += 40_000


@pytest.mark.parametrize("how", [cut, goodbye, stale, draining, late_answer])
@scripted
async def test_interrupted_stream_with_reopen_goes_on_behind_its_last_item(how: Any) -> None:
    server = ScriptedServer(**STREAMS)
    server.script("jobs", items({"id": 1}, {"id": 2}, then=how), items({"id": 3}, then=how), ok("done"))
    async with client_of(server) as client:
        stream = client.stream("jobs", of="ada", reopen=lambda last: {"after": last["id"]})
        async with stream:
            assert [item["id"] async for item in stream] == [1, 2, 3]
            assert stream.result == "done"
    assert [request.params for request in server.calls("jobs")] == [
        {"of": "ada"},
        {"of": "ada", "after": 2},
        {"of": "ada", "after": 3},
    ]


@pytest.mark.parametrize("how", [cut, late_item])
@scripted
async def test_stream_with_reopen_that_had_no_item_is_opened_with_its_own_params(how: Any) -> None:
    server = ScriptedServer(**STREAMS)
    server.script("jobs", how, ok(1))
    async with (
        client_of(server) as client,
        client.stream("jobs", n=1, reopen=lambda last: {"after": last}) as stream,
    ):
        assert await stream.finished() == 1
    assert [request.params for request in server.calls("jobs")] == [{"n": 1}] * 2


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.NOT_FOUND, {}),
        (Code.CANCELLED, {"reason": "token_revoked"}),
        (Code.CANCELLED, {"reason": "slow"}),
        (Code.UNAVAILABLE, {}),
        (Code.DATA_LOSS, {}),
    ],
)
@scripted
async def test_error_of_the_method_or_session_is_raised_with_reopen_too(
    code: Code, details: dict[str, Any]
) -> None:
    server = ScriptedServer(**STREAMS)
    server.script("jobs", items(1, then=fail(code, **details)))
    async with (
        client_of(server) as client,
        client.stream("jobs", reopen=lambda last: {"after": last}) as stream,
    ):
        assert await stream.receive() == 1
        with pytest.raises(CallError) as caught:
            await stream.receive()
        assert caught.value.code is code
    assert len(server.calls("jobs")) == 1


@scripted
async def test_reopening_backs_off_and_ends_at_the_timeout(server: ScriptedServer) -> None:
    server.script("jobs", *[cut] * 5, items(1, then=cut), *[cut] * 100)
    async with (
        client_of(server) as client,
        client.stream("jobs", timeout=60.0, reopen=lambda last: {"after": last}) as stream,
    ):
        assert await stream.receive() == 1
        with pytest.raises((ConnectionClosed, DeadlineExceeded)):
            await stream.receive()
    times = [request.at for request in server.calls("jobs")]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert waits[:5] == sorted(waits[:5])
    assert len(times) < 30


@scripted
async def test_stream_with_reopen_of_a_closed_client_ends(server: ScriptedServer) -> None:
    server.script("jobs", silence)
    client = await client_of(server)
    async with client.stream("jobs", reopen=lambda last: {}) as stream:
        await turns()
        await client.close()
        with pytest.raises(ConnectionClosed):
            await stream.receive()


@scripted
async def test_stream_with_reopen_sends_no_items() -> None:
    async with client_of(ScriptedServer(**STREAMS)) as client:
        with pytest.raises(ValueError, match="choose"):
            client.stream("jobs", items=[1], reopen=lambda last: {})
        async with client.stream("jobs", reopen=lambda last: {}) as stream:
            with pytest.raises(RuntimeError, match="no items"):
                await stream.send(1)
