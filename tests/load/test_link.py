"""One connection's pump, with its timers turned by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.helpers import NOW, SALT, FakeTimers
from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import TlsError
from zcproto.load.link import Link
from zcproto.sessions import SessionRegistry, SessionSettings


class Recorded(Link):
    __slots__ = ("seen",)

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.seen: list[tuple[Any, ...]] = []

    def lost(self, cause: str) -> None:
        self.seen.append(("lost", cause))

    def gone(self) -> None:
        self.seen.append(("gone",))


class Transport:
    """What a link writes to."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = 0

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None:
        self.closed += 1


class Joined:
    """A link and the server's end of its conversation."""

    def __init__(self) -> None:
        self.timers = FakeTimers()
        self.wheel = DeadlineWheel(self.timers)
        self.link = Recorded(self.wheel)
        self.transport = Transport()
        registry = SessionRegistry(SessionSettings(), bytes)
        self.server = ServerConnection(
            ConnectionSettings(idle_timeout_s=30.0), registry, salt=SALT, wall=system_clock.wall(), now=NOW
        )
        self.link.connection_made(cast("Any", self.transport))
        self.link.data_received(self.server.data_to_send())


@pytest.fixture
def joined() -> Joined:
    return Joined()


def test_a_silent_connection_is_kept_alive(joined: Joined) -> None:
    assert joined.transport.sent == []
    joined.timers.advance(11.0)  # a third of the idle timeout, and the wheel's grain
    (ping,) = joined.transport.sent
    assert [*joined.server.receive_data(ping, system_clock.wall(), NOW)] == []
    joined.link.data_received(joined.server.data_to_send())
    joined.timers.advance(11.0)
    assert len(joined.transport.sent) == 2
    assert joined.link.seen == []


def test_a_server_that_answers_no_ping_is_lost(joined: Joined) -> None:
    joined.timers.advance(25.0)
    assert joined.link.seen == [("lost", "the server did not answer a PING")]
    assert joined.transport.closed == 1
    assert len(joined.wheel) == 0
    joined.link.handle_deadline(joined.timers.time())
    assert len(joined.link.seen) == 1


def test_a_server_that_breaks_the_contract_is_lost_with_its_code(joined: Joined) -> None:
    joined.link.data_received(bytes(68))
    assert joined.link.seen == [("lost", "ended by PROTOCOL_ERROR")]


def test_a_loss_is_told_once(joined: Joined) -> None:
    joined.link.eof_received()
    joined.link.connection_lost(TlsError("truncated"))
    assert joined.link.seen == [("lost", "closed by the server"), ("gone",)]


@pytest.mark.parametrize(
    ("error", "cause"), [(TlsError("truncated"), "truncated"), (None, "closed by the server")]
)
def test_the_cause_of_a_loss_is_the_transports(joined: Joined, error: TlsError | None, cause: str) -> None:
    joined.link.connection_lost(error)
    assert joined.link.seen == [("lost", cause), ("gone",)]


def test_closing_is_no_loss(joined: Joined) -> None:
    joined.link.close()
    joined.link.close()
    joined.link.connection_lost(None)
    assert joined.link.seen == [("gone",)]
    assert joined.transport.closed == 1
    joined.link.flush()
    assert joined.transport.sent == []


def test_a_connection_closed_while_it_was_made_is_closed_then() -> None:
    link = Recorded(DeadlineWheel(FakeTimers()))
    link.close()
    transport = Transport()
    link.connection_made(cast("Any", transport))
    assert transport.closed == 1
    assert link.transport is None


def test_what_a_link_does_not_care_for_changes_nothing(joined: Joined) -> None:
    link = Link(joined.wheel)
    link.connection_made(cast("Any", Transport()))
    server = joined.server
    link.conversation = joined.link.conversation
    link.conversation.request("echo", {}, wall=system_clock.wall())
    list(server.receive_data(link.conversation.data_to_send(), system_clock.wall(), NOW))
    server.go_away("draining", 100, system_clock.wall())
    link.data_received(server.data_to_send())
    link.answered(1, {})
    link.eof_received()
    link.connection_lost(None)
    assert link.ended
