"""Spans by OpenTelemetry's semantic conventions for RPC, version 1.45, and the context that callers pass on.

    caller's span -> `traceparent` of a request -> span of the method -> its calls, to servers and to clients

Rules:
- Without a provider, the global one is used when a call begins.
- A span is never needed: without an SDK only the context is passed on.
- Messages and stacks are masked as in the log. Params, results, users and tokens are in no span.
- An error of a server's span is what its operator should look at; other codes are the caller's affair.
- An exception that has passed through a span carries its ids, for the line of the log that describes it.

Must not know: sampling, where spans go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context as TraceContext
from opentelemetry.context import attach, detach
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
    set_span_in_context,
)

from zcproto.app.context import Context
from zcproto.client.handlers import Call
from zcproto.client.streams import OutgoingCall
from zcproto.common.middleware import CallNext, Middleware
from zcproto.errors import CallError, Code, ZcprotoError
from zcproto.observe.log import TRACE_ATTRIBUTE, shown_message, shown_stack
from zcproto.wire.message import parse_traceparent

SYSTEM: Final = "zcproto"
SCOPE: Final = "zcproto.telemetry"
SCHEMA: Final = "https://opentelemetry.io/schemas/1.45.0"

STATUS_CODE: Final = "rpc.status_code"
ERROR_TYPE: Final = "error.type"

SERVER_FAULTS: Final = frozenset(
    {
        Code.UNKNOWN,
        Code.DEADLINE_EXCEEDED,
        Code.UNIMPLEMENTED,
        Code.INTERNAL,
        Code.UNAVAILABLE,
        Code.DATA_LOSS,
    }
)
"""The codes that are errors of a server's span, as for gRPC."""

NO_CONTEXT: Final = TraceContext()

_FLAGS: Final = TraceFlags.SAMPLED | 0x02
"""Those of `traceparent` that are passed on: sampled, random."""


# --- context -----------------------------------------------------------------------------------------------


def context_of(traceparent: str | None) -> TraceContext:
    """Return the context with a caller's span; an empty one without a valid `traceparent`."""
    if parse_traceparent(traceparent) is None:
        return NO_CONTEXT
    assert traceparent is not None
    parent = SpanContext(
        int(traceparent[3:35], 16),
        int(traceparent[36:52], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(traceparent[53:], 16) & _FLAGS),
    )
    return set_span_in_context(NonRecordingSpan(parent), NO_CONTEXT)


def traceparent_of(span: Span) -> str | None:
    """Return the `traceparent` of calls within a span; None if it is of no trace."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


# --- spans -------------------------------------------------------------------------------------------------


def tracer_of(provider: TracerProvider | None) -> Tracer:
    """Return the tracer of this package, of the global provider by default."""
    return trace.get_tracer(SCOPE, tracer_provider=provider, schema_url=SCHEMA)


async def run_within(
    span: Span,
    parent: TraceContext | None,
    work: Callable[[], Awaitable[Any]],
    code_of: Callable[[BaseException], Code | None],
    faults: frozenset[Code] | None = None,
) -> Any:
    """Await `work` within a span, and end it. `faults` are the codes that make it an error; None for all."""
    token = attach(set_span_in_context(span, parent))
    try:
        result = await work()
    except BaseException as error:
        if span.is_recording():
            _record(span, error, code_of(error), faults)
            _mark(span, error)
        raise
    else:
        span.set_attribute(STATUS_CODE, "OK")
        return result
    finally:
        detach(token)
        span.end()


def _record(span: Span, error: BaseException, code: Code | None, faults: frozenset[Code] | None) -> None:
    if code is not None:
        span.set_attribute(STATUS_CODE, code.name)
        if faults is not None and code not in faults:
            return
    kind = type(error)
    span.set_attribute(ERROR_TYPE, f"{kind.__module__}.{kind.__qualname__}" if code is None else code.name)
    message = shown_message(error)
    span.set_status(Status(StatusCode.ERROR, message or kind.__qualname__))
    if not isinstance(error, CallError | asyncio.CancelledError):
        found = {"exception.type": kind.__qualname__, "exception.stacktrace": shown_stack(error)}
        if message:
            found["exception.message"] = message
        span.add_event("exception", found)


def _mark(span: Span, error: BaseException) -> None:
    with suppress(AttributeError, TypeError):  # of a class that allows no attributes
        setattr(error, TRACE_ATTRIBUTE, _ids(span.get_span_context()))


def ids_for_log(values: Collection[Any]) -> dict[str, str]:
    """Return the ids for a line of the log: those of an exception among its values, or of the current span.

    Spans that are not recorded have none: they cannot be looked up.
    """
    for value in values:
        if isinstance(value, BaseException):
            marked = getattr(value, TRACE_ATTRIBUTE, None)
            if marked is not None:
                return dict(marked)
    context = trace.get_current_span().get_span_context()
    return _ids(context) if context.is_valid and context.trace_flags.sampled else {}


def _ids(context: SpanContext) -> dict[str, str]:
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def code_of_call(error: BaseException) -> Code | None:
    """Return the code of a call's error; None if it has failed without an answer."""
    if isinstance(error, asyncio.CancelledError):
        return Code.CANCELLED
    return _known(error.code) if isinstance(error, CallError) else None


def code_of_method(error: BaseException, time_left: float | None) -> Code:
    """Return the code with which the error of a method, or of a handler, is answered."""
    if isinstance(error, asyncio.CancelledError):
        return Code.CANCELLED if time_left is None or time_left > 0 else Code.DEADLINE_EXCEEDED
    if isinstance(error, ZcprotoError) and error.of_client:
        return Code.ABORTED
    return (_known(error.code) or Code.UNKNOWN) if isinstance(error, CallError) else Code.INTERNAL


def _known(code: int) -> Code | None:
    try:
        return Code(code)
    except ValueError:  # of a newer version
        return None


# --- middleware ----------------------------------------------------------------------------------------------


def trace_calls(provider: TracerProvider | None = None) -> Middleware[OutgoingCall]:
    """Return middleware of a client that puts each call, with all its attempts, and each stream within a span.

    The server gets the span's context, so that the span of its method becomes a child. A `traceparent` that the
    call has is its parent instead of the current span.
    """

    async def traced_call(call: OutgoingCall, call_next: CallNext[OutgoingCall]) -> Any:
        parent = None if call.traceparent is None else context_of(call.traceparent)
        attributes: dict[str, Any] = {"rpc.system.name": SYSTEM, "rpc.method": call.method}
        if call.endpoint is not None:
            attributes |= {"server.address": call.endpoint.host, "server.port": call.endpoint.port}
        span = tracer_of(provider).start_span(call.method, parent, SpanKind.CLIENT, attributes)
        call.traceparent = traceparent_of(span) or call.traceparent
        return await run_within(span, parent, lambda: call_next(call), code_of_call)

    return traced_call


def trace_handlers(provider: TracerProvider | None = None) -> Middleware[Call]:
    """Return middleware of a client that puts each of its handlers within a span, a child of the server's."""

    async def traced_handler(call: Call, call_next: CallNext[Call]) -> Any:
        parent = context_of(call.traceparent)
        attributes = {"rpc.system.name": SYSTEM, "rpc.method": call.method}
        span = tracer_of(provider).start_span(call.method, parent, SpanKind.SERVER, attributes)
        return await run_within(
            span,
            parent,
            lambda: call_next(call),
            lambda error: code_of_method(error, call.time_left),
            SERVER_FAULTS,
        )

    return traced_handler


def trace_requests(provider: TracerProvider | None = None) -> Middleware[Context]:
    """Return middleware of an application that puts each call of a method within a span, a child of the caller's.

    For programs that set up OpenTelemetry themselves; `[telemetry]` of the server costs less for requests that are
    not recorded.
    """

    async def traced_request(context: Context, call_next: CallNext[Context]) -> Any:
        return await within_request_span(
            tracer_of(provider), context_of(context.traceparent), context, call_next
        )

    return traced_request


async def within_request_span(
    tracer: Tracer, parent: TraceContext, context: Context, call_next: CallNext[Context]
) -> Any:
    """Run a method within a span whose parent is in `parent`."""
    attributes = {"rpc.system.name": SYSTEM, "rpc.method": context.method, "client.address": context.peer}
    span = tracer.start_span(context.method, parent, SpanKind.SERVER, attributes)
    return await run_within(
        span,
        parent,
        lambda: call_next(context),
        lambda error: code_of_method(error, context.time_left),
        SERVER_FAULTS,
    )
