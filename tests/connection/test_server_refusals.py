"""Test that refused frames are counted by cause and code, across connections."""

from __future__ import annotations

from tests.helpers import SALT, ConnectionPair
from zcproto.connection.server import ConnectionTotals, ServerConnection
from zcproto.errors import Code
from zcproto.wire.frame import NO_TOKEN, REQUEST
from zcproto.wire.message import encode_request

Counts = dict[tuple[str, int], int]


def counting_pair() -> tuple[ConnectionPair, Counts]:
    """Return a connection and its counters of refusals."""
    counts: Counts = {}
    return pair_counting_in(counts), counts


def pair_counting_in(counts: Counts) -> ConnectionPair:
    """Return a connection that counts refusals in `counts`."""
    pair = ConnectionPair()
    pair.server = ServerConnection(
        pair.settings,
        pair.registry,
        salt=SALT,
        wall=pair.clock.wall(),
        now=pair.clock.now(),
        totals=ConnectionTotals(counts),
    )
    return pair


def echo(pair: ConnectionPair, **fields: object) -> bytes:
    return pair.frame(REQUEST, 1, encode_request("echo", None), **fields)


def test_refused_frames_are_counted_by_cause_and_code() -> None:
    pair, counts = counting_pair()
    pair.login()
    pair.send(echo(pair, timestamp=pair.clock.wall() - 60_000))
    pair.send(echo(pair, token=b"?" * 32))
    pair.send(pair.frame(REQUEST, 1, b"\xc1"))
    pair.send(pair.frame(REQUEST, 1, encode_request("echo", None, {"deadline_ms": 0})))
    pair.send(pair.frame(REQUEST, 1, bytes(20_000), token=NO_TOKEN))
    pair.server.go_away("draining", 1_000, pair.clock.wall())
    pair.send(echo(pair))
    assert counts == {
        ("stale", Code.STALE_TIMESTAMP): 1,
        ("token", Code.UNAUTHENTICATED): 1,
        ("malformed", Code.INVALID_ARGUMENT): 1,
        ("deadline", Code.DEADLINE_EXCEEDED): 1,
        ("too_large_without_session", Code.UNAUTHENTICATED): 1,
        ("draining", Code.UNAVAILABLE): 1,
    }


def test_accepted_frame_is_not_counted() -> None:
    pair, counts = counting_pair()
    pair.login()
    (event,) = pair.send(echo(pair))
    assert event is not None
    assert counts == {}


def test_connections_can_share_refusal_counts() -> None:
    counts: Counts = {}
    for number in (1, 2):
        pair = pair_counting_in(counts)
        pair.send(echo(pair, token=b"?" * 32))
        assert counts == {("token", Code.UNAUTHENTICATED): number}
