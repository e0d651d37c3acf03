"""Traces of a server's requests: which of them are recorded, and the cheap way for all others.

    request -> trusted `traceparent`? -> recorded: the method with a span around it
                                      -> not recorded: the method as it is, within a trace that is not

Decides: with a ratio, whether a trace that begins here is recorded, before anything is created for it.

Rules:
- The method of a request that is not recorded takes the way that it takes without traces. Its calls pass on that it
  is not recorded, so that no other server records a part of it.
- A request that is refused before its method runs has no span: strangers could cause any number of them.
- Samplers other than a ratio are asked for each request, by the SDK.

Must not know: where spans go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextvars import Token, copy_context
from random import getrandbits, random
from typing import Any, Final, cast

from opentelemetry.context import Context as TraceContext
from opentelemetry.context import attach, create_key, detach, get_value
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Tracer,
    set_span_in_context,
)

from zcproto.app.app import RESERVED_PREFIXES, Method
from zcproto.app.context import Context
from zcproto.common.middleware import CallNext
from zcproto.connection.events import Request
from zcproto.connection.server_calls import CallToClient
from zcproto.telemetry.spans import (
    NO_CONTEXT,
    SYSTEM,
    code_of_call,
    context_of,
    run_within,
    traceparent_of,
    within_request_span,
)
from zcproto.wire.message import RequestMeta

TRUST_ALL: Final = "all"
TRUST_SESSIONS: Final = "sessions"

_ENTERED: Final = create_key("zcproto-entered")
"""What `enter` has decided, for the span of the method."""

_LOW_BITS: Final = (1 << 64) - 1
"""The bits of a trace id by which a ratio decides, as in the SDK's TraceIdRatioBased."""


class ChosenIds(RandomIdGenerator):
    """Makes random ids. The next trace gets `chosen`, if it is set: the id by which it was decided to record it."""

    def __init__(self) -> None:
        self.chosen = 0

    def generate_trace_id(self) -> int:
        chosen, self.chosen = self.chosen, 0
        return chosen or super().generate_trace_id()


class AmbientSpan(NonRecordingSpan):
    """The span of all requests that are not recorded and continue no trace: each time of another trace."""

    def __init__(self) -> None:
        super().__init__(INVALID_SPAN_CONTEXT)

    def get_span_context(self) -> SpanContext:
        return SpanContext(_IDS.generate_trace_id(), _IDS.generate_span_id(), is_remote=False)


class UnrecordedSpan(NonRecordingSpan):
    """The span of a request that is not recorded, as its caller's is not. Its id is made when it is needed."""

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent
        self._made: SpanContext | None = None

    def get_span_context(self) -> SpanContext:
        if self._made is None:
            trace_id = int(self._traceparent[3:35], 16)
            self._made = SpanContext(trace_id, _IDS.generate_span_id(), is_remote=False)
        return self._made


_IDS: Final = RandomIdGenerator()
_AMBIENT: Final = set_span_in_context(AmbientSpan(), NO_CONTEXT)
_SPAN_KEY: Final = next(iter(_AMBIENT))


class RequestTracing:
    """Follows the traces of a server's requests: `zcproto.server.tracing.Tracing`.

    `ratio` is the part of the traces that begin here to record; None if the tracer's sampler decides.
    """

    def __init__(
        self,
        tracer: Tracer,
        ids: ChosenIds,
        methods: Iterable[Method],
        *,
        ratio: float | None,
        trust: str = TRUST_SESSIONS,
    ) -> None:
        self._tracer = tracer
        self._ids = ids
        self._ratio = 1.0 if ratio is None else ratio  # above every random number
        self._has_ratio = ratio is not None
        self._bound = 0 if ratio is None else round(ratio * (_LOW_BITS + 1))
        self.read_context = copy_context()
        self.read_context.run(attach, _AMBIENT)
        self._decided = 0  # the id of the trace that the next request begins
        self._trusts_all = trust == TRUST_ALL
        self._trusts_sessions = trust == TRUST_SESSIONS
        self._traced = {
            method.name: method.served(method.name, (self._span,), None)
            for method in methods
            if not method.name.startswith(RESERVED_PREFIXES)
        }

    # --- zcproto.server.tracing.Tracing --------------------------------------------------------------

    def is_due(self, meta: RequestMeta) -> bool:
        if meta.traceparent is None:
            if random() >= self._ratio:  # noqa: S311 - not secret
                return False
            self._decide()
        return True

    def enter(self, request: Request, method: Method) -> tuple[Method, Token[TraceContext] | None]:
        decided, self._decided = self._decided, 0
        traced = self._traced.get(method.name)
        if traced is None:
            return method, None
        parent = request.meta.traceparent
        if parent is not None:
            if self._trusts_all or (self._trusts_sessions and request.session is not None):
                if self._has_ratio and not int(parent[53:], 16) & 1:
                    return method, attach(TraceContext({_SPAN_KEY: UnrecordedSpan(parent)}))
            else:
                parent = None
        if parent is None and not decided:
            if random() >= self._ratio:  # noqa: S311 - not secret
                return method, attach(_AMBIENT)
            self._decide()
            decided, self._decided = self._decided, 0
        return traced, attach(TraceContext({_ENTERED: (parent, decided)}))

    def _decide(self) -> None:
        """Choose the id of a trace that begins and is recorded; a sampler chooses otherwise."""
        if self._has_ratio:
            low = int(random() * self._bound)  # noqa: S311 - not secret
            self._decided = getrandbits(64) << 64 | low | 1

    def leave(self, entered: Token[TraceContext] | None) -> None:
        if entered is not None:
            detach(entered)

    async def call_client(
        self, call: CallToClient, peer: str, send: Callable[[CallToClient], Awaitable[Any]]
    ) -> Any:
        parent = None if call.traceparent is None else context_of(call.traceparent)
        attributes = {"rpc.system.name": SYSTEM, "rpc.method": call.method, "server.address": peer}
        span = self._tracer.start_span(call.method, parent, SpanKind.CLIENT, attributes)
        sent = call._replace(traceparent=traceparent_of(span) or call.traceparent)
        return await run_within(span, parent, lambda: send(sent), code_of_call)

    # --- the span of a method -------------------------------------------------------------------------

    async def _span(self, context: Context, call_next: CallNext[Context]) -> Any:
        parent, trace_id = cast("tuple[str | None, int]", get_value(_ENTERED))
        # Taken at once. If another thread takes it, its trace is recorded instead of this one.
        self._ids.chosen = trace_id
        return await within_request_span(self._tracer, context_of(parent), context, call_next)
