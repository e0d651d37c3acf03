"""The protocol of a server that records traces: it processes each read in a context without a recorded trace."""

from __future__ import annotations

from collections.abc import Iterator

from zcproto.connection.events import RawRequest, ServerEvent
from zcproto.server.protocol import ServerProtocol


class TracedProtocol(ServerProtocol):
    """One connection of a server that records traces."""

    __slots__ = ()

    def _process(self, events: Iterator[ServerEvent] | tuple[RawRequest], wall: int) -> None:
        tracing = self._state.tracing
        if tracing is None:  # the server has not started
            ServerProtocol._process(self, events, wall)
        else:
            tracing.read_context.copy().run(ServerProtocol._process, self, events, wall)
