"""Server handshakes with an OpenSSL client that succeed."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ServerPairs
from tests.helpers import FakeTimers
from tests.tls.conftest import NewPair
from tests.tls.hellos import (
    in_records,
)
from tests.tls.support import (
    PEER,
    RecordingProtocol,
    TlsPair,
)
from zcproto.tls.context import SUITES, SiteContexts, client_context, server_context
from zcproto.tls.transport import TlsPhase


@pytest.mark.requirement("tls_version")
def test_handshake_negotiates_tls_1_3_and_first_suite(agreed: TlsPair) -> None:
    assert agreed.client.version() == "TLSv1.3"
    cipher = agreed.client.cipher()
    assert cipher is not None
    assert cipher[0] == SUITES[0]
    assert agreed.protocol.calls == ["made"]
    assert agreed.log == []
    assert agreed.acceptor.handshakes_completed == 1
    assert [*agreed.acceptor.groups.values()] == [1]
    assert agreed.acceptor.handshakes_in_progress == 0
    assert agreed.failures == {}


def test_deadline_of_handshake_means_nothing_after_it(agreed: TlsPair, timers: FakeTimers) -> None:
    timers.advance(agreed.acceptor.handshake_timeout + 1)
    assert agreed.phase is TlsPhase.OPEN
    assert agreed.failures == {}
    assert len(agreed.acceptor.wheel) == 0


@pytest.mark.requirement("forward_secrecy")
def test_no_session_ticket_is_sent(agreed: TlsPair) -> None:
    """RFC 8446 section 4.6.1: a ticket would follow the handshake."""
    assert agreed.raw.take() == b""
    assert agreed.client.session is not None
    assert not agreed.client.session.has_ticket


@pytest.mark.parametrize(
    ("offer", "chosen"),
    [
        (["zcp/1"], "zcp/1"),
        (["http/1.1"], "http/1.1"),
        (["http/1.1", "zcp/1"], "zcp/1"),
        (["h2", "http/1.1"], "http/1.1"),
        ([], None),
    ],
)
def test_alpn_selects_protocol_factory(
    offer: list[str], chosen: str | None, timers: FakeTimers, server_tls: ssl.SSLContext, ca_file: Path
) -> None:
    spoke: list[str | None] = []

    def factory(name: str | None) -> Callable[[], RecordingProtocol]:
        return lambda: spoke.append(name) or RecordingProtocol()  # type: ignore[func-returns-value]

    client = client_context(ca_file=ca_file)
    if offer:
        client.set_alpn_protocols(offer)
    else:
        client = ssl.create_default_context(cafile=ca_file)
    protocols = {name: factory(name) for name in ("zcp/1", "http/1.1", None)}
    pair = TlsPair(timers, server_tls, client, protocols=protocols).agree()
    assert spoke == [chosen]
    assert pair.client.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("piece", [1, 2, 5, 100, 1_000])
def test_handshake_in_pieces_succeeds(tls_pair: TlsPair, piece: int) -> None:
    tls_pair.raw.deliver(tls_pair.step(), piece)
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step(), piece)
    assert tls_pair.protocol.calls == ["made"]


@pytest.mark.parametrize("size", [1, 7, 200, 1_000])
def test_hello_in_many_records_succeeds(tls_pair: TlsPair, size: int) -> None:
    tls_pair.raw.deliver(in_records(tls_pair.step()[5:], size, b"\3\1"))
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step())
    assert tls_pair.protocol.calls == ["made"]


def test_hello_retry_request_selects_shared_group(
    timers: FakeTimers, server_pairs: ServerPairs, client_tls: ssl.SSLContext
) -> None:
    """RFC 8446 section 4.1.4: the random of a HelloRetryRequest is a digest of its name."""
    context = server_context(server_pairs, ["zcp/1"])
    context.set_ecdh_curve("prime256v1")
    pair = TlsPair(timers, context, client_tls)
    pair.raw.deliver(pair.step())
    retry = pair.hear()
    assert bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c") in retry
    assert pair.phase is TlsPhase.HANDSHAKE
    assert pair.acceptor.handshakes_in_progress == 1
    pair.exchange()
    assert pair.phase is TlsPhase.OPEN
    pair.say(b"hello")
    assert pair.protocol.received == b"hello"


def test_data_in_same_read_as_finished_is_delivered(tls_pair: TlsPair) -> None:
    tls_pair.exchange(b"first words")
    assert tls_pair.protocol.received == b"first words"


def test_large_data_in_same_read_as_finished_is_delivered(tls_pair: TlsPair) -> None:
    data = bytes(range(256)) * 230
    tls_pair.exchange(data)
    assert tls_pair.protocol.received == data
    assert tls_pair.raw.writes


def test_protocol_may_write_and_close_in_connection_made(new_pair: NewPair) -> None:
    def made(protocol: RecordingProtocol) -> None:
        protocol.transport.write(b"go away")
        protocol.transport.close()

    pair = new_pair(protocol=RecordingProtocol(made=made))
    pair.exchange(b"unheard")
    assert pair.protocol.received == b""
    assert pair.client_reads() == b"go away"
    assert pair.client_saw_close_notify()


def test_protocol_may_pause_reading_in_connection_made(new_pair: NewPair) -> None:
    pair = new_pair(
        protocol=RecordingProtocol(made=lambda protocol: protocol.transport.pause_reading()),
    )
    pair.exchange(b"later")
    assert pair.protocol.received == b""
    assert not pair.raw.is_reading()
    pair.server.resume_reading()
    assert pair.protocol.received == b"later"
    assert pair.raw.is_reading()


def test_new_connections_use_replaced_context(
    timers: FakeTimers, server_pairs: ServerPairs, client_tls: ssl.SSLContext
) -> None:
    old, new = (server_context([pair], ["zcp/1"]) for pair in server_pairs)
    new.leaves = frozenset({b"leaf"})
    first = TlsPair(timers, old, client_tls)
    first.raw.deliver(first.step())
    first.acceptor.contexts = SiteContexts(new)
    first.hear()
    first.raw.deliver(first.step())
    second = TlsPair(timers, old, client_tls, acceptor=first.acceptor).agree()
    assert first.phase is TlsPhase.OPEN
    assert first.client.getpeercert(True) != second.client.getpeercert(True)
    assert (first.server.leaves(), second.server.leaves()) == (frozenset(), {b"leaf"})


def test_extra_info_matches_asyncio_tls_transport(agreed: TlsPair) -> None:
    transport = agreed.protocol.transport
    assert transport is agreed.server
    assert transport.get_extra_info("peername") == ("192.0.2.7", 40_000)
    assert transport.get_extra_info("cipher")[0] == SUITES[0]
    assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert transport.get_extra_info("peercert") is None
    assert {transport.get_extra_info("tls_group"): 1} == agreed.acceptor.groups
    assert transport.get_extra_info("nothing", "default") == "default"
    assert transport.get_protocol() is agreed.protocol
    assert not transport.can_write_eof()
    assert transport.peer == PEER


def test_extra_info_is_empty_before_and_after_connection(tls_pair: TlsPair) -> None:
    server = tls_pair.server
    names = ("ssl_object", "cipher", "peercert")
    assert [server.get_extra_info(name, "none") for name in (*names, "tls_group")] == ["none"] * 4
    tls_pair.agree()
    tls_pair.raw.lose()
    assert [server.get_extra_info(name, "none") for name in (*names, "peername")] == ["none"] * 4
    assert server.get_write_buffer_size() == 0
    assert server.leaves() == frozenset()
    server.set_write_buffer_limits(high=1)


def test_protocol_can_be_replaced(agreed: TlsPair) -> None:
    other = RecordingProtocol()
    agreed.server.set_protocol(other)
    agreed.say(b"hello")
    assert other.received == b"hello"
    assert agreed.protocol.received == b""
