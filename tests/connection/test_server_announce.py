"""What the server says to a connection of itself: with no token, at any time, to whoever is there."""

from __future__ import annotations

from tests.helpers import WALL, ConnectionPair
from zcproto.wire.frame import NO_TOKEN, Kind
from zcproto.wire.message import decode_event, encode_body

PINS = {"pins": ["sha256/" + "A" * 43 + "="], "from": WALL + 1}
BODY = encode_body(["pins.next", PINS])


def test_it_carries_no_token_and_needs_no_session(pair: ConnectionPair) -> None:
    pair.server.announce(BODY, WALL)
    answer = pair.answer()
    assert (answer.kind, answer.stream, answer.token) == (Kind.EVENT, 0, NO_TOKEN)
    assert decode_event(answer.body, 32) == ("pins.next", PINS)


def test_its_nonce_follows_that_of_the_frame_before(pair: ConnectionPair) -> None:
    pair.server.announce(BODY, WALL)
    pair.server.announce(BODY, WALL)
    first, second = pair.answers()
    assert (first.counter, second.counter) == (1, 2)


def test_a_connection_that_has_ended_is_told_nothing(pair: ConnectionPair) -> None:
    pair.server.end()
    pair.server.announce(BODY, WALL)
    assert pair.answers() == []
