"""A connection under load: what it asked and what it waits for."""

from __future__ import annotations

import time
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zcproto.common.clock import system_clock
from zcproto.errors import InvalidArgument, ResourceExhausted, ZcprotoError
from zcproto.load.link import Link
from zcproto.load.tally import Kind, count
from zcproto.wire.frame import NO_TOKEN

if TYPE_CHECKING:
    from zcproto.common.deadlines import DeadlineWheel
    from zcproto.load.record import Record
    from zcproto.tls.transport import TlsTransport


class Stage(IntEnum):
    """Where a connection of the generator is."""

    NEW = 0
    CONNECTED = 1  # the handshake is done
    READY = 2  # it has its session
    OVER = 3


class Asked(NamedTuple):
    """A request in flight. Times in monotonic seconds."""

    kind: Kind
    number: int
    intended: float
    sent: float


class LinkOwner(Protocol):
    """The owner of many links, as they use it; implemented by `Generator`."""

    wheel: DeadlineWheel
    record: Record
    in_flight: int

    def welcomed(self, link: LoadLink) -> None: ...
    def answered(self, link: LoadLink, asked: Asked, value: Any) -> None: ...
    def refused(self, link: LoadLink, asked: Asked, code: int) -> None: ...
    def link_lost(self, link: LoadLink, cause: str) -> None: ...
    def link_gone(self) -> None: ...


class LoadLink(Link):
    """One of many connections of a `Generator`."""

    __slots__ = ("_generator", "index", "intended", "pending", "stage", "tls", "token")

    def __init__(self, generator: LinkOwner, index: int) -> None:
        super().__init__(generator.wheel)
        self._generator = generator
        self.index = index
        self.stage = Stage.NEW
        self.intended = 0.0
        """When it was due to connect."""
        self.token = NO_TOKEN
        self.tls: TlsTransport | None = None
        """From its first moment on, unlike `transport`: so that it can be aborted at any time."""
        self.pending: dict[int, Asked] = {}
        """By stream: answers may come in any order."""

    def ask(self, kind: Kind, method: str, params: dict[str, Any], number: int, intended: float) -> None:
        """Queue one request; `flush` sends it."""
        tally = self._generator.record.tallies[kind]
        tally.planned += 1
        try:
            stream = self.conversation.request(method, params, token=self.token, wall=system_clock.wall())
        except ResourceExhausted:
            count(tally.not_sent, "too many in flight on the connection")
            return
        except InvalidArgument:
            count(tally.not_sent, "larger than the server takes")
            return
        except ZcprotoError:
            count(tally.not_sent, "the connection is ending")
            return
        tally.sent += 1
        self._generator.in_flight += 1
        self.pending[stream] = Asked(kind, number, intended, time.monotonic())

    def welcomed(self) -> None:
        self._generator.welcomed(self)

    def answered(self, stream: int, value: Any) -> None:
        asked = self.pending.pop(stream, None)
        if asked is not None:  # else it came after we had given it up
            self._generator.answered(self, asked, value)

    def refused(self, stream: int, code: int, message: str, details: dict[str, Any]) -> None:
        asked = self.pending.pop(stream, None)
        if asked is not None:
            self._generator.refused(self, asked, code)

    def lost(self, cause: str) -> None:
        self._generator.link_lost(self, cause)

    def gone(self) -> None:
        self._generator.link_gone()
