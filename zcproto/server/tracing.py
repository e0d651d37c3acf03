"""What traces the requests of a server and its calls to clients. zcproto/telemetry implements it.

Must not know: spans, their format, where they go.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from zcproto.app.app import Method
from zcproto.connection.events import Request
from zcproto.connection.server_calls import CallToClient
from zcproto.wire.message import RequestMeta


class Tracing(Protocol):
    """Follows traces from callers to methods, and from methods to clients."""

    read_context: contextvars.Context
    """Where the requests of a read run: within a trace that is not recorded. Copied for each read."""

    def is_due(self, meta: RequestMeta) -> bool:
        """Return whether a request is recorded, or continues a trace: `enter` is called for it."""

    def enter(self, request: Request, method: Method) -> tuple[Method, Any]:
        """Make the trace of a request the current one.

        Return the method to run, which has a span around it if the request is recorded, and what `leave` gets.
        """

    def leave(self, entered: Any) -> None:
        """Make the trace current again that was so before."""

    async def call_client(
        self, call: CallToClient, peer: str, send: Callable[[CallToClient], Awaitable[Any]]
    ) -> Any:
        """Send a call to a client, with another `traceparent` if it has a span, and return its result."""
