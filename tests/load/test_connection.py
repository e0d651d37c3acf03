"""One connection of the load generator, with fake timers."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.helpers import NOW, SALT, FakeTimers
from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import TlsError
from zcproto.load.connection import FrameConnection
from zcproto.sessions import SessionRegistry, SessionSettings


class RecordedConnection(FrameConnection):
    __slots__ = ("seen",)

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.seen: list[tuple[Any, ...]] = []

    def lost(self, cause: str) -> None:
        self.seen.append(("lost", cause))

    def gone(self) -> None:
        self.seen.append(("gone",))


class FakeTransport:
    """Records what a connection writes."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = 0

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None:
        self.closed += 1


class Ends:
    """A connection and the server's end of its conversation."""

    def __init__(self) -> None:
        self.timers = FakeTimers()
        self.wheel = DeadlineWheel(self.timers)
        self.connection = RecordedConnection(self.wheel)
        self.transport = FakeTransport()
        registry = SessionRegistry(SessionSettings(), bytes)
        self.server = ServerConnection(
            ConnectionSettings(idle_timeout_s=30.0), registry, salt=SALT, wall=system_clock.wall(), now=NOW
        )
        self.connection.connection_made(cast("Any", self.transport))
        self.connection.data_received(self.server.data_to_send())


@pytest.fixture
def ends() -> Ends:
    return Ends()


def test_idle_load_connection_sends_ping(ends: Ends) -> None:
    assert ends.transport.sent == []
    ends.timers.advance(11.0)  # a third of the idle timeout, and a tick of the wheel
    (ping,) = ends.transport.sent
    assert [*ends.server.receive_data(ping, system_clock.wall(), NOW)] == []
    ends.connection.data_received(ends.server.data_to_send())
    ends.timers.advance(11.0)
    assert len(ends.transport.sent) == 2
    assert ends.connection.seen == []


def test_missing_pong_is_a_loss(ends: Ends) -> None:
    ends.timers.advance(25.0)
    assert ends.connection.seen == [("lost", "the server did not answer a PING")]
    assert ends.transport.closed == 1
    assert len(ends.wheel) == 0
    ends.connection.handle_deadline(ends.timers.time())
    assert len(ends.connection.seen) == 1


def test_protocol_violation_is_a_loss_with_its_code(ends: Ends) -> None:
    ends.connection.data_received(bytes(68))
    assert ends.connection.seen == [("lost", "ended by PROTOCOL_ERROR")]


def test_loss_is_reported_once(ends: Ends) -> None:
    ends.connection.eof_received()
    ends.connection.connection_lost(TlsError("truncated"))
    assert ends.connection.seen == [("lost", "closed by the server"), ("gone",)]


@pytest.mark.parametrize(
    ("error", "cause"), [(TlsError("truncated"), "truncated"), (None, "closed by the server")]
)
def test_loss_has_the_cause_of_the_transport(ends: Ends, error: TlsError | None, cause: str) -> None:
    ends.connection.connection_lost(error)
    assert ends.connection.seen == [("lost", cause), ("gone",)]


def test_close_is_not_a_loss(ends: Ends) -> None:
    ends.connection.close()
    ends.connection.close()
    ends.connection.connection_lost(None)
    assert ends.connection.seen == [("gone",)]
    assert ends.transport.closed == 1
    ends.connection.flush()
    assert ends.transport.sent == []
    connection, transport = RecordedConnection(DeadlineWheel(FakeTimers())), FakeTransport()
    connection.close()  # before it is made
    connection.connection_made(cast("Any", transport))
    assert (transport.closed, connection.transport) == (1, None)


def test_events_without_a_handler_are_ignored(ends: Ends) -> None:
    connection = FrameConnection(ends.wheel)
    connection.connection_made(cast("Any", FakeTransport()))
    server = ends.server
    connection.conversation = ends.connection.conversation
    connection.conversation.request("echo", {}, wall=system_clock.wall())
    list(server.receive_data(connection.conversation.data_to_send(), system_clock.wall(), NOW))
    server.go_away("draining", 100, system_clock.wall())
    connection.data_received(server.data_to_send())
    connection.answered(1, {})
    connection.eof_received()
    connection.connection_lost(None)
    assert connection.ended
