"""Test announcements: events without a token, sent to a connection at any time."""

from __future__ import annotations

from tests.helpers import WALL, ConnectionPair
from zcproto.wire.frame import NO_TOKEN, Kind
from zcproto.wire.message import decode_event, encode_body

PINS = {"pins": ["sha256/" + "A" * 43 + "="], "from": WALL + 1}
BODY = encode_body(["pins.next", PINS])


def test_announcement_has_no_token_and_needs_no_session(pair: ConnectionPair) -> None:
    pair.server.announce(BODY, WALL)
    answer = pair.answer()
    assert (answer.kind, answer.stream, answer.token) == (Kind.EVENT, 0, NO_TOKEN)
    assert decode_event(answer.body, 32) == ("pins.next", PINS)


def test_announcements_have_increasing_counters(pair: ConnectionPair) -> None:
    pair.server.announce(BODY, WALL)
    pair.server.announce(BODY, WALL)
    first, second = pair.answers()
    assert (first.counter, second.counter) == (1, 2)


def test_closed_connection_gets_no_announcement(pair: ConnectionPair) -> None:
    pair.server.end()
    pair.server.announce(BODY, WALL)
    assert pair.answers() == []
