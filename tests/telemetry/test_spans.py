"""Spans of servers and Python clients: their parents, attributes and errors."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from tests.telemetry.helpers import NOT_SAMPLED, SAMPLED, TRACE_ID, Spans, chain
from zcproto.app.app import App, Items
from zcproto.app.context import Context
from zcproto.client.handlers import Call
from zcproto.client.retry import MAX_RETRY_AFTER_MS
from zcproto.client.streams import OutgoingCall
from zcproto.errors import (
    CallError,
    ConnectionClosed,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from zcproto.telemetry import trace_calls, trace_handlers, trace_requests
from zcproto.testing import LocalServer, MemoryServer, MovableClock

KEY = "c3VwZXItc2VjcmV0LWtleS1vZi1hZGEtMDEyMzQ1Njc4OWFi"


@pytest.fixture
def spans() -> Spans:
    return Spans()


def make_app() -> App[Any]:
    app: App[Any] = App()
    delays = itertools.chain([1], itertools.repeat(MAX_RETRY_AFTER_MS))  # a second retry would be too late

    @app.method
    def add(a: int, b: int) -> int:
        return a + b

    @app.method
    async def inner() -> str:
        await asyncio.sleep(0)
        return f"{trace.get_current_span().get_span_context().span_id:016x}"

    @app.method(thread=True)
    def blocking() -> str:
        return f"{trace.get_current_span().get_span_context().span_id:016x}"

    @app.method(public=True)
    def hello() -> str:
        return "hello"

    @app.method
    def fail(kind: str) -> None:
        raise {
            "not_found": NotFound("no such thing"),
            "unavailable": Unavailable(f"try key={KEY}", {"retry_after_ms": next(delays)}),
            "value": ValueError(f"token: {KEY}"),
        }[kind]

    @app.method
    async def count(n: int, fails: bool = False) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        if fails:
            raise NotFound("no more")

    @app.method
    async def total(items: Items[int]) -> int:
        return sum([item async for item in items])

    @app.method
    async def ask(context: Context) -> Any:
        return await context.client.call("approve", timeout=20)

    return app


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# --- one trace -------------------------------------------------------------------------------------------------


async def test_call_through_two_servers_is_one_trace_of_four_spans(spans: Spans) -> None:
    last = make_app()
    async with spans.serve(last) as b, b.connect("bob", middleware=spans.middleware) as to_b:
        first: App[Any] = App()

        @first.method
        async def sum_up(a: int) -> Any:
            return await to_b.call("add", a=a, b=1)

        async with spans.serve(first) as a, a.connect("ada", middleware=spans.middleware) as to_a:
            assert await to_a.call("sum_up", a=1) == 2
    found = chain(spans.ended)
    assert [(span.name, span.kind) for span in found] == [
        ("sum_up", SpanKind.CLIENT),
        ("sum_up", SpanKind.SERVER),
        ("add", SpanKind.CLIENT),
        ("add", SpanKind.SERVER),
    ]
    assert [span.parent is not None and span.parent.is_remote for span in found] == [False, True, False, True]


async def test_attributes_follow_the_conventions_for_rpc(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada", middleware=spans.middleware) as client:
        await client.call("add", a=1, b=2)
        endpoint = client.endpoint
    assert endpoint is not None
    call, method = chain(spans.ended)
    common = {"rpc.system.name": "zcproto", "rpc.method": "add", "rpc.status_code": "OK"}
    assert attributes(call) == {**common, "server.address": endpoint.host, "server.port": endpoint.port}
    assert set(attributes(method)) == {*common, "client.address"}
    assert method.instrumentation_scope is not None
    assert method.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.45.0"
    for span in (call, method):
        assert span.status.status_code is StatusCode.UNSET
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time


@pytest.mark.parametrize("method", ["inner", "blocking"])
async def test_span_is_current_in_the_method(spans: Spans, method: str) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada") as client:
        current = await client.call(method)
    assert current == f"{spans.only().context.span_id:016x}"


async def test_stream_is_one_span_until_it_ends(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada", middleware=spans.middleware) as client:
        async with client.stream("count", n=3) as stream:
            assert [item async for item in stream] == [0, 1, 2]
        with pytest.raises(NotFound):
            async with client.stream("count", n=1, fails=True) as stream:
                assert [item async for item in stream] == [0]
    by_trace: dict[int, list[ReadableSpan]] = {}
    for span in spans.ended:
        by_trace.setdefault(span.context.trace_id, []).append(span)
    whole, failed = (chain(tuple(each)) for each in by_trace.values())
    assert [span.kind for span in whole] == [SpanKind.CLIENT, SpanKind.SERVER]
    assert [attributes(span)["rpc.status_code"] for span in whole] == ["OK", "OK"]
    assert [attributes(span)["rpc.status_code"] for span in failed] == ["NOT_FOUND", "NOT_FOUND"]


async def test_stream_of_the_clients_items_is_one_span(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server:
        client = server.connect("ada", middleware=spans.middleware)
        async with client, client.stream("total", items=[1, 2, 3]) as stream:
            assert await stream.finished() == 6
    assert [span.name for span in chain(spans.ended)] == ["total", "total"]


def test_blocking_client_continues_the_span_of_its_caller(spans: Spans) -> None:
    """Its calls run on the loop of another thread."""
    app: App[Any] = App()

    @app.method
    def parent(context: Context) -> str | None:
        return context.traceparent

    tracer = spans.provider.get_tracer("test")
    with (
        LocalServer(app) as server,
        server.connect_blocking("ada", middleware=spans.middleware) as client,
        tracer.start_as_current_span("outer") as outer,
    ):
        header = client.call("parent")
    assert int(header[3:35], 16) == outer.get_span_context().trace_id
    call, _ = spans.ended
    assert call.parent is not None
    assert call.parent.span_id == outer.get_span_context().span_id


async def test_call_of_the_server_is_a_span_on_both_sides(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server:
        client = server.connect(
            "ada",
            middleware=spans.middleware,
            handler_middleware=[trace_handlers(spans.provider)],
        )
        async with client:

            @client.handler("approve")
            async def approve(call: Call) -> str:
                return call.traceparent or ""

            await client.open_session()
            assert str(await client.call("ask"))[3:35] == f"{spans.ended[0].context.trace_id:032x}"
    found = chain(spans.ended)
    assert [(span.name, span.kind) for span in found] == [
        ("ask", SpanKind.CLIENT),
        ("ask", SpanKind.SERVER),
        ("approve", SpanKind.CLIENT),
        ("approve", SpanKind.SERVER),
    ]


async def test_call_to_a_client_without_handler_is_an_error_of_its_span(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada") as client:
        with pytest.raises(CallError):
            await client.call("ask")
    method, call = chain(spans.ended)
    assert attributes(call)["rpc.status_code"] == "UNAVAILABLE"
    assert call.status.status_code is StatusCode.ERROR
    assert attributes(method)["rpc.status_code"] == "ABORTED"  # as the caller gets it
    assert method.status.status_code is StatusCode.UNSET


async def test_handler_errors_have_the_code_of_their_answer(spans: Spans) -> None:
    app = make_app()
    handler_middleware = [trace_handlers(spans.provider)]
    async with (
        spans.serve(app) as server,
        server.connect("ada", handler_middleware=handler_middleware) as client,
    ):

        @client.handler("approve")
        async def approve() -> None:
            raise RuntimeError("not today")

        await client.open_session()
        with pytest.raises(CallError):
            await client.call("ask")
    handler = next(span for span in spans.ended if span.name == "approve" and span.kind is SpanKind.SERVER)
    assert attributes(handler)["error.type"] == "INTERNAL"
    assert [event.name for event in handler.events] == ["exception"]


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "raised", "code", "is_fault"),
    [
        ("not_found", NotFound, "NOT_FOUND", False),
        ("unavailable", Unavailable, "UNAVAILABLE", True),
        ("value", InternalError, "INTERNAL", True),
    ],
)
async def test_error_of_a_method(
    spans: Spans, kind: str, raised: type[CallError], code: str, is_fault: bool
) -> None:
    app = make_app()
    async with (
        spans.serve(app) as server,
        server.connect("ada", middleware=spans.middleware) as client,
    ):
        with pytest.raises(raised):
            await client.call("fail", kind=kind)
    call, *methods = sorted(spans.ended, key=lambda span: span.kind is SpanKind.SERVER)
    assert len(methods) == (2 if kind == "unavailable" else 1)
    assert attributes(call)["rpc.status_code"] == attributes(call)["error.type"] == code
    assert call.status.status_code is StatusCode.ERROR
    for method in methods:
        assert method.parent is not None
        assert method.parent.span_id == call.context.span_id
        assert attributes(method)["rpc.status_code"] == code
        assert attributes(method).get("error.type") == (code if is_fault else None)
        assert method.status.status_code is (StatusCode.ERROR if is_fault else StatusCode.UNSET)
        assert [event.name for event in method.events] == (["exception"] if kind == "value" else [])


@pytest.mark.parametrize("kind", ["value", "unavailable"])
async def test_spans_hold_no_secret(spans: Spans, kind: str) -> None:
    app = make_app()
    async with (
        spans.serve(app) as server,
        server.connect("margaret", middleware=spans.middleware) as client,
    ):
        with pytest.raises(CallError):
            await client.call("fail", kind=kind)
    text = "".join(span.to_json() for span in spans.ended)
    assert KEY not in text
    assert "(hidden)" in text
    assert "margaret" not in text


async def test_exception_event_has_type_message_and_stack(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada") as client:
        with pytest.raises(InternalError):
            await client.call("fail", kind="value")
    (event,) = spans.only().events
    found = dict(event.attributes or {})
    assert found["exception.type"] == "ValueError"
    assert found["exception.message"] == "token: (hidden)"
    assert "in fail" in str(found["exception.stacktrace"])


async def test_incident_in_the_log_names_the_trace(spans: Spans, capsys: pytest.CaptureFixture[str]) -> None:
    from zcproto.config import LogConfig
    from zcproto.observe.log import add_trace_ids, configure_logging, flush_log
    from zcproto.telemetry.spans import ids_for_log

    app = make_app()
    configure_logging(LogConfig(format="json"))
    add_trace_ids(ids_for_log)
    try:
        async with spans.serve(app) as server, server.connect("ada") as client:
            with pytest.raises(InternalError):
                await client.call("fail", kind="value")
        flush_log()
    finally:
        add_trace_ids(None)
    line = next(line for line in capsys.readouterr().err.splitlines() if "request.failed" in line)
    context = spans.only().context
    assert json.loads(line)["trace_id"] == f"{context.trace_id:032x}"
    assert json.loads(line)["span_id"] == f"{context.span_id:016x}"


async def test_method_past_its_deadline_is_a_fault_of_the_server(spans: Spans) -> None:
    app, runs, clock = make_app(), asyncio.Event(), MovableClock()

    @app.method
    async def run() -> None:
        runs.set()
        await asyncio.get_running_loop().create_future()

    async with spans.serve(app, clock=clock) as server, server.connect("ada") as client:
        call = asyncio.create_task(client.call("run", timeout=30))
        await runs.wait()
        clock.advance(30)
        with pytest.raises(DeadlineExceeded):
            await call
    assert attributes(spans.only())["rpc.status_code"] == "DEADLINE_EXCEEDED"


async def test_cancelled_call_is_not_a_fault_of_the_server(spans: Spans) -> None:
    app, runs = make_app(), asyncio.Event()

    @app.method
    async def run() -> None:
        runs.set()
        await asyncio.get_running_loop().create_future()

    async with spans.serve(app) as server, server.connect("ada", middleware=spans.middleware) as client:
        call = asyncio.create_task(client.call("run"))
        await runs.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call("session.info")  # the server has received the cancellation before
    outer, method = chain(tuple(span for span in spans.ended if span.name == "run"))
    assert attributes(outer)["error.type"] == "CANCELLED"
    assert attributes(method)["rpc.status_code"] == "CANCELLED"
    assert method.status.status_code is StatusCode.UNSET


async def test_call_without_an_answer_has_the_type_of_its_exception(spans: Spans) -> None:
    async def lose(call: OutgoingCall) -> Any:
        raise ConnectionClosed("the connection was lost")

    with pytest.raises(ConnectionClosed):
        await trace_calls(spans.provider)(OutgoingCall(method="add", params={}), lose)
    assert attributes(spans.only())["error.type"] == "zcproto.errors.ConnectionClosed"
    assert "rpc.status_code" not in attributes(spans.only())


async def test_params_that_do_not_fit_are_within_the_span(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada") as client:
        with pytest.raises(InvalidArgument):
            await client.call("add", a="one", b=2)
    assert attributes(spans.only())["rpc.status_code"] == "INVALID_ARGUMENT"


# --- who begins a trace ----------------------------------------------------------------------------------------


async def test_explicit_traceparent_is_the_parent_of_the_call(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada", middleware=spans.middleware) as client:
        await client.call("add", a=1, b=2, traceparent=SAMPLED)
    assert {span.context.trace_id for span in spans.ended} == {TRACE_ID}


async def test_without_sdk_the_context_is_passed_on() -> None:
    """The API alone makes no spans: a caller's context goes through."""
    sent: list[OutgoingCall] = []

    async def record(call: OutgoingCall) -> str:
        sent.append(call)
        return "result"

    provider = trace.NoOpTracerProvider()
    call = OutgoingCall(method="add", params={}, traceparent=SAMPLED)
    assert await trace_calls(provider)(call, record) == "result"
    alone = OutgoingCall(method="add", params={})
    await trace_calls(provider)(alone, record)
    assert [each.traceparent for each in sent] == [SAMPLED, None]


async def test_application_with_its_own_sdk_traces_by_middleware(spans: Spans) -> None:
    app = make_app()
    app.middleware(trace_requests(spans.provider))
    async with MemoryServer(app) as server, server.connect("ada") as client:
        await client.call("add", a=1, b=2, traceparent=NOT_SAMPLED)
        await client.call("add", a=1, b=2, traceparent=SAMPLED)
    assert spans.only().context.trace_id == TRACE_ID


async def test_methods_of_the_protocol_have_no_span(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect("ada") as client:
        await client.call("session.info")
    assert not spans.ended


async def test_refused_calls_have_no_span(spans: Spans) -> None:
    app = make_app()
    async with spans.serve(app) as server, server.connect() as stranger:
        for method in ("add", "no.such.method"):
            with pytest.raises(CallError):
                await stranger.call(method, traceparent=SAMPLED)
    assert not spans.ended
