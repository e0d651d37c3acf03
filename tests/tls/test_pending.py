"""Test pending handshakes: shares of networks, the dropping of silent connections, and the order of slots."""

from __future__ import annotations

import ssl
from collections import Counter
from typing import Any, TypeAlias

import pytest

from tests.helpers import FakeTimers, MockTransport
from tests.tls.conftest import NewPair
from tests.tls.support import PEER, RecordingProtocol, new_acceptor
from tests.tls.test_proxy import CLIENT, HEADER
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pending import ENDED, READY, SILENT, SLOT, Network, PendingHandshakes
from zcproto.tls.proxy import ForwardedTransport
from zcproto.tls.server import TlsServerTransport
from zcproto.tls.transport import TlsPhase

FLOOD = ["198.51.100.1", "203.0.113.1", "192.0.2.1", "2001:db8::1"]
HONEST = "233.252.0.1"


Pending: TypeAlias = "PendingHandshakes[FakeConnection]"


class FakeConnection:
    network: Network[FakeConnection]
    stage: int

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.was_dropped = False

    def drop(self) -> None:
        self.was_dropped = True
        assert self.pending.leave(self) == SILENT


@pytest.fixture
def pending() -> Pending:
    return PendingHandshakes()


def join(pending: Pending, network: str, *, ready: bool = False) -> FakeConnection | None:
    """Return a new connection; None if it was refused."""
    if not pending.make_room(pending.network(network)):
        return None
    connection = FakeConnection(pending)
    pending.join(connection, pending.network(network))
    if ready:
        pending.become_ready(connection)
    return connection


def joined(pending: Pending, network: str, *, ready: bool = False) -> FakeConnection:
    connection = join(pending, network, ready=ready)
    assert connection is not None
    return connection


@pytest.mark.parametrize(("networks", "each"), [(1, 60), (2, 40), (3, 30), (5, 20)])
@pytest.mark.parametrize("places", [True, False])
def test_network_gets_as_many_places_or_slots_as_it_leaves_free(
    pending: Pending, networks: int, each: int, places: bool
) -> None:
    names = [str(number) for number in range(networks)]
    counts: Counter[str] = Counter()
    taken: list[FakeConnection] = []

    def take(name: str) -> bool:
        connection = join(pending, name, ready=True)
        if connection is None or not (places or pending.take_slot(connection)):
            return False
        taken.append(connection)
        counts[name] += 1
        return True

    if places:
        pending.max_places = 120
    else:
        pending.max_slots = 120
    while [name for name in names if take(name)]:
        pass
    assert set(counts.values()) == {each}
    assert take("another")
    for connection in taken:
        assert pending.leave(connection) == (READY if places else SLOT)
        assert pending.leave(connection) == ENDED
    assert pending.slots == 0
    assert take(names[0])


def test_flooding_network_displaces_its_own_oldest_silent_connection(
    pending: Pending,
) -> None:
    pending.max_places = 8
    honest = joined(pending, "honest")
    flood = [joined(pending, "flood") for _ in range(20)]
    assert not honest.was_dropped, "older, but of another network"
    assert [each.was_dropped for each in flood] == [True] * 16 + [False] * 4
    assert join(pending, "honest") is not None
    assert pending.places == 6


def test_total_limit_displaces_the_oldest_silent_connection_of_all(
    pending: Pending,
) -> None:
    pending.max_places = 3
    first, *others = [joined(pending, network) for network in "abcd"]
    assert first.was_dropped
    assert not any(each.was_dropped for each in others)
    assert pending.places == 3


def test_connection_waiting_for_a_slot_is_never_displaced(pending: Pending) -> None:
    pending.max_places = 4
    ready = [joined(pending, "a", ready=True), joined(pending, "a", ready=True)]
    assert join(pending, "a") is None, "the share of its network is taken"
    ready += [joined(pending, "b", ready=True), joined(pending, "c", ready=True)]
    assert pending.is_full
    assert join(pending, "d") is None
    assert not pending.drop_oldest()
    assert not any(each.was_dropped for each in ready)
    # A place becomes free, and a silent connection can be displaced again.
    assert pending.leave(ready[0]) == READY
    assert pending.leave(ready[0]) == ENDED
    assert join(pending, "d") is not None
    assert not pending.is_full
    assert join(pending, "e") is not None
    assert pending.is_full is False


def test_slots_go_to_networks_in_turn_and_oldest_first(pending: Pending) -> None:
    waiting = [joined(pending, network, ready=True) for network in "aaab"]
    order = []
    while (connection := pending.next_ready()) is not None:
        pending.end_turn(connection.network)
        pending.leave(connection)
        order.append(waiting.index(connection))
        pending.end_turn(connection.network)
    assert order == [0, 3, 1, 2]
    assert pending.places == 0


def test_network_over_its_share_of_slots_is_passed_over(pending: Pending) -> None:
    pending.max_slots = 4
    running = [joined(pending, "a"), joined(pending, "a")]
    for each in running:
        pending.take_slot(each)
    blocked, other = joined(pending, "a", ready=True), joined(pending, "b", ready=True)
    assert pending.next_ready() is other
    pending.leave(other)
    assert pending.next_ready() is None
    assert pending.leave(running[0]) == SLOT
    assert pending.next_ready() is blocked
    pending.max_slots = 1
    assert pending.next_ready() is None


def test_network_is_kept_while_it_is_in_use(pending: Pending) -> None:
    silent, ready, running = joined(pending, "a"), joined(pending, "b", ready=True), joined(pending, "c")
    pending.take_slot(running)
    used = [each.network for each in (silent, ready, running)]
    assert [network.connections for network in used] == [1, 1, 1]
    pending.leave(joined(pending, "idle"))
    assert list(pending._networks) == ["a", "b", "c"]
    assert [pending.network(name) for name in "abc"] == used


# --- connections ----------------------------------------------------------------------------------------


def connect(acceptor: Any, timers: FakeTimers, peer: str) -> tuple[TlsServerTransport, MockTransport]:
    server, raw = TlsServerTransport(acceptor, peer), MockTransport(timers)
    raw.connect(server)
    return server, raw


def test_silent_connections_do_not_delay_a_handshake(timers: FakeTimers, new_pair: NewPair) -> None:
    pair = new_pair()
    pair.acceptor.set_limits(2, 1_000)
    hello = pair.step()
    for number in range(300):
        _, raw = connect(pair.acceptor, timers, FLOOD[number % 4])
        raw.deliver(hello[: number % 200])
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.acceptor.pending.silent == 301
    pair.raw.deliver(hello)
    pair.hear()
    pair.raw.deliver(pair.step())
    assert pair.phase is TlsPhase.OPEN


def test_handshakes_of_flooding_networks_leave_slots_for_others(
    timers: FakeTimers, new_pair: NewPair
) -> None:
    pair = new_pair()
    acceptor = pair.acceptor
    acceptor.set_limits(20, 1_000)
    hello = pair.step()
    flood = [connect(acceptor, timers, FLOOD[number % 4]) for number in range(100)]
    for _, raw in flood:
        raw.deliver(hello)
    assert acceptor.handshakes_in_progress == 16  # four each, four left
    timers.run()
    assert acceptor.handshakes_in_progress == 16
    other = TlsServerTransport(acceptor, HONEST)
    raw = MockTransport(timers)
    raw.connect(other)
    raw.deliver(hello)
    assert raw.take(), "the server's flight"
    # A slot that becomes free goes to a connection that waits.
    flood[0][1].lose()
    assert acceptor.handshakes_in_progress == 16
    timers.run()
    assert acceptor.handshakes_in_progress == 17
    timers.advance(acceptor.handshake_timeout + 1)
    assert acceptor.handshakes_in_progress == acceptor.pending.places == 0


def test_raised_limit_starts_waiting_handshakes(timers: FakeTimers, new_pair: NewPair) -> None:
    pair = new_pair()
    pair.acceptor.set_limits(0, 10)
    pair.raw.deliver(pair.step())
    assert pair.phase is TlsPhase.HELLO
    pair.acceptor.set_limits(1, 10)
    timers.run()
    assert pair.phase is TlsPhase.HANDSHAKE


def test_room_is_reported_when_a_waiting_connection_gets_its_slot_or_is_closed(
    timers: FakeTimers, new_pair: NewPair
) -> None:
    pair = new_pair()
    acceptor, room = pair.acceptor, []
    acceptor.on_room = lambda: room.append(acceptor.pending.places)
    acceptor.set_limits(1, 2)
    hello = pair.step()
    pair.raw.deliver(hello)
    assert room == []
    waiting = [connect(acceptor, timers, FLOOD[number]) for number in range(2)]
    for _, raw in waiting:
        raw.deliver(hello)
    assert acceptor.pending.is_full
    waiting[0][1].lose()
    assert room == [1]
    pair.raw.lose()
    timers.run()
    assert room == [1, 0]


@pytest.mark.parametrize("is_adopted", [True, False])
def test_displaced_connection_is_reset_and_counted(
    timers: FakeTimers, server_tls: ssl.SSLContext, is_adopted: bool
) -> None:
    log: list[Any] = []
    acceptor = new_acceptor(timers, server_tls, RecordingProtocol, log)
    acceptor.set_limits(1, 1)
    server, raw = TlsServerTransport(acceptor, PEER), MockTransport(timers)
    if is_adopted:
        raw.connect(server)
        raw.deliver(b"\x16\x03\x01")
    assert acceptor.pending.make_room(acceptor.network_of(PEER))
    assert acceptor.pending.places == 0
    if not is_adopted:
        raw.connect(server)
    timers.run()
    assert raw.aborted
    assert raw.take() == b""
    assert log == [(TlsFailure.DISPLACED, PEER), "closed"]
    assert len(acceptor.wheel) == 0


def test_connection_that_fails_before_its_handshake_ends_is_reported_once(
    timers: FakeTimers, new_pair: NewPair
) -> None:
    wasted: list[tuple[str, bool]] = []
    pairs = [
        new_pair(
            on_wasted=lambda network, begun: wasted.append((network.name, begun)),
        )
        for _ in "abcd"
    ]
    silent, half, begun, opened = pairs
    network = silent.acceptor.network_of(PEER).name
    silent.server.drop()
    half.raw.deliver(half.step()[:100])
    half.raw.deliver_eof()
    begun.raw.deliver(begun.step())
    begun.raw.lose(ConnectionResetError())
    opened.agree().raw.lose(ConnectionResetError())
    timers.run()
    assert wasted == [(network, False), (network, False), (network, True)]


def test_handshake_that_waits_for_a_slot_in_vain_is_not_reported(
    timers: FakeTimers, new_pair: NewPair
) -> None:
    wasted: list[tuple[Any, bool]] = []
    pair = new_pair(on_wasted=lambda *call: wasted.append(call))
    pair.acceptor.set_limits(0, 10)
    pair.raw.deliver(pair.step())
    timers.advance(pair.acceptor.handshake_timeout + 1)
    assert pair.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}
    assert wasted == []


@pytest.mark.parametrize(
    ("peer", "network"),
    [("192.0.2.77", "192.0.2.0/24"), ("2001:db8:1:2::3", "2001:db8:1::/48"), ("", ""), ("a name", "a name")],
)
def test_peer_counts_for_its_network(
    timers: FakeTimers, server_tls: ssl.SSLContext, peer: str, network: str
) -> None:
    acceptor = new_acceptor(timers, server_tls, RecordingProtocol, [])
    assert acceptor.network_of(peer) is acceptor.pending.network(network)


def test_half_proxy_headers_are_displaced_and_header_moves_connection_to_client_network(
    timers: FakeTimers, new_pair: NewPair
) -> None:
    pair = new_pair(kind=ForwardedTransport)
    pending = pair.acceptor.pending
    pair.acceptor.set_limits(2, 4)
    pair.acceptor.on_forwarded = lambda balancer, client: pending.make_room(pair.acceptor.network_of(client))
    pair.raw.deliver(HEADER[:10])
    half = []
    for _ in range(10):
        assert pending.make_room(pair.acceptor.network_of(PEER))
        transport, raw = ForwardedTransport(pair.acceptor, PEER), MockTransport(timers)
        raw.connect(transport)
        raw.deliver(HEADER[:20])
        half.append((transport, raw))
    assert pair.failures == {TlsFailure.DISPLACED: 9}
    assert pair.raw.aborted
    half[-1][1].deliver(HEADER[20:])
    assert half[-1][0].peer == CLIENT
    assert half[-1][0].network is pair.acceptor.network_of(CLIENT)
    assert pending.places == 2
