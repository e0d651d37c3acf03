"""Which requests are recorded: by a ratio, by their callers, by a sampler; and what hostile callers can cause."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from tests.telemetry.helpers import NOT_SAMPLED, SAMPLED, TRACE_ID, Spans
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.connection.server_calls import CallToClient
from zcproto.telemetry.requests import _AMBIENT
from zcproto.telemetry.spans import context_of, ids_for_log, trace_calls, traceparent_of
from zcproto.testing import MemoryServer
from zcproto.wire.message import RequestMeta


def make_app() -> App[Any]:
    app: App[Any] = App()

    @app.method(public=True)
    async def current() -> str | None:
        return traceparent_of(trace.get_current_span())

    @app.method(public=True)
    def plain(context: Context) -> str | None:
        return traceparent_of(trace.get_current_span())

    @app.method
    def direct() -> str | None:
        return traceparent_of(trace.get_current_span())

    return app


def sampled(header: str) -> int:
    return int(header[53:], 16) & 1


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.5, 130, 270), (1.0, 400, 400)])
async def test_ratio_decides_for_traces_that_begin_here(ratio: float, least: int, most: int) -> None:
    app, spans = make_app(), Spans(ratio)
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app)
        for _ in range(400):
            await client.call("direct")
    assert least <= len(spans.ended) <= most
    assert len({span.context.trace_id for span in spans.ended}) == len(spans.ended)
    # Another server with the same ratio would decide alike.
    bound = round(ratio * 2**64)
    assert all(span.context.trace_id % 2**64 < bound for span in spans.ended)


@pytest.mark.parametrize("method", ["current", "plain"])
async def test_unrecorded_request_passes_on_that_it_is_not_recorded(method: str) -> None:
    app, spans = make_app(), Spans(0.0)
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app)
        header = await client.call(method)
    assert sampled(header) == 0
    assert not spans.ended


@pytest.mark.parametrize("method", ["current", "plain", "direct"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, None])
async def test_callers_decision_is_followed(method: str, ratio: float | None) -> None:
    app, spans = make_app(), Spans(1.0 if ratio is None else ratio)
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app, ratio=ratio)
        recorded = await client.call(method, traceparent=SAMPLED)
        unrecorded = await client.call(method, traceparent=NOT_SAMPLED)
    assert sampled(recorded)
    assert sampled(unrecorded) == 0
    assert {recorded[3:35], unrecorded[3:35]} == {SAMPLED[3:35]}
    assert len({recorded[36:52], unrecorded[36:52], SAMPLED[36:52]}) == 3
    assert spans.only().context.trace_id == TRACE_ID


async def test_sampler_of_the_program_decides_without_a_ratio() -> None:
    app, spans = make_app(), Spans()
    spans.provider.sampler = ALWAYS_OFF
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app, ratio=None)
        assert sampled(await client.call("current")) == 0
    assert not spans.ended


@pytest.mark.parametrize(
    ("trust", "with_session", "without"),
    [("all", True, True), ("sessions", True, False), ("none", False, False)],
)
async def test_traceparent_counts_for_those_who_are_trusted(
    trust: str, with_session: bool, without: bool
) -> None:
    """Else a stranger could have every request recorded, and join traces of others."""
    app, spans = make_app(), Spans(0.0)
    async with MemoryServer(app) as server, server.connect("ada") as ada, server.connect() as stranger:
        spans.trace(server, app, trust=trust)
        for client, is_trusted in ((ada, with_session), (stranger, without)):
            header = await client.call("current", traceparent=SAMPLED)
            assert (header[3:35] == SAMPLED[3:35]) is is_trusted
            assert sampled(header) == int(is_trusted)
    assert len(spans.ended) == with_session + without


@pytest.mark.parametrize(
    "hostile",
    [
        "",
        "00",
        SAMPLED + "-extra",
        SAMPLED.upper(),
        f"ff-{SAMPLED[3:]}",
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'0' * 16}-01",
        f"00-{'g' * 32}-{'1' * 16}-01",
        SAMPLED.replace("-", "_"),
        "\n".join([SAMPLED] * 2),
        "\u0660" * 55,
        "0" * 100_000,
    ],
)
async def test_malformed_traceparent_begins_a_trace(hostile: str) -> None:
    app, spans = make_app(), Spans()
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app)
        header = await client.call("current", traceparent=hostile)
    assert spans.only().parent is None
    assert spans.only().context.trace_id == int(header[3:35], 16)
    assert context_of(hostile) == {}


async def test_flags_of_a_caller_are_reduced_to_those_that_are_known() -> None:
    app, spans = make_app(), Spans()
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app)
        await client.call("current", traceparent=f"{SAMPLED[:-2]}ff")
    parent = spans.only().parent
    assert parent is not None
    assert parent.trace_flags == 3


async def test_tracestate_is_not_carried() -> None:
    """ZCP/1 has no field for it; a caller's `tracestate` in meta is ignored, however long."""
    app, spans = make_app(), Spans()
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app)
        connection = client._connections.current
        assert connection is not None
        meta = {"deadline_ms": 5_000, "traceparent": SAMPLED, "tracestate": "a=" + "b" * 10_000}
        _, answer = connection.request("current", {}, client._sessions.token, meta, float("inf"))
        header = await answer
    assert header[3:35] == SAMPLED[3:35]
    assert not spans.only().context.trace_state


async def test_idempotent_call_is_one_span_however_often_it_is_sent() -> None:
    app, spans = make_app(), Spans()
    async with MemoryServer(app) as server, server.connect("ada") as client:
        spans.trace(server, app)
        first = await client.call("direct", idempotency_key="once")
        assert await client.call("direct", idempotency_key="once") == first
    assert spans.only().context.span_id == int(first[36:52], 16)


async def test_request_that_is_refused_leaves_no_decision_behind() -> None:
    """A decision for a request that is not run may serve the next one; it never serves two."""
    app, spans = make_app(), Spans()
    async with MemoryServer(app) as server, server.connect("ada") as client:
        tracing = spans.trace(server, app)
        assert tracing.is_due(RequestMeta())
        for _ in range(3):
            await client.call("direct")
    assert len({span.context.trace_id for span in spans.ended}) == 3


def test_ambient_trace_is_never_recorded_and_never_the_same() -> None:
    span = trace.get_current_span(_AMBIENT)
    headers = {traceparent_of(span) for _ in range(10)}
    assert len(headers) == 10
    assert all(header is not None and sampled(header) == 0 for header in headers)


@pytest.mark.parametrize("of_caller", [None, SAMPLED])
async def test_client_gets_the_span_of_its_call_as_parent(of_caller: str | None) -> None:
    spans, sent = Spans(1.0), []
    async with MemoryServer(make_app()) as server:
        tracing = spans.trace(server, make_app())

        async def send(call: CallToClient) -> None:
            sent.append(call.traceparent)

        await tracing.call_client(CallToClient("approve", {}, 5.0, of_caller), "192.0.2.1", send)
    assert sent == [traceparent_of(trace.NonRecordingSpan(spans.only().context))]
    assert (spans.only().parent is None) == (of_caller is None)


async def test_calls_within_an_unrecorded_request_are_not_recorded() -> None:
    app, spans = make_app(), Spans(1.0)
    inner: App[Any] = App()
    async with MemoryServer(app) as server:
        spans.trace(server, app)
        async with server.connect("bob", middleware=[trace_calls(spans.provider)]) as bob:

            @inner.method
            async def ask() -> Any:
                return await bob.call("current")

            unrecorded = Spans(0.0)
            async with MemoryServer(inner) as outer, outer.connect("ada") as ada:
                unrecorded.trace(outer, inner)
                header = await ada.call("ask")
    assert sampled(header) == 0
    assert not spans.ended


def test_line_of_the_log_within_an_unrecorded_request_has_no_ids() -> None:
    token = attach(_AMBIENT)
    try:
        assert ids_for_log([]) == {}
    finally:
        detach(token)


def test_line_of_the_log_outside_of_any_span_has_no_ids() -> None:
    assert ids_for_log(["value", ValueError("x")]) == {}
