"""How large a frame may be: before a session, with one, and after it."""

from __future__ import annotations

import pytest

from tests.helpers import SALT, WALL, ConnectionPair
from zcproto.connection.events import Request
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession
from zcproto.wire.frame import HEADER, MIN_LENGTH, NO_TOKEN, PING, REQUEST

SMALL, LARGE = 16_384, 1_048_576


def of_length(pair: ConnectionPair, length: int, token: bytes | None = None, method: str = "echo") -> bytes:
    """A good request whose `length` is exactly this."""
    overhead = len(pair.request(1, method, {"a": b""})) + 3
    pair.counter -= 1
    data = pair.request(1, method, {"a": b"x" * (length + 4 - overhead)}, token=token)
    return (
        data + b""
        if len(data) == length + 4
        else pair.request(
            1, method, {"a": b"x" * (length + 4 - overhead - (len(data) - length - 4))}, token=token
        )
    )


def header(length: int, token: bytes = NO_TOKEN, counter: int = 1) -> bytes:
    return HEADER.pack(length, REQUEST, 1, WALL, SALT, counter, token)


def leave(pair: ConnectionPair, opened: OpenedSession) -> None:
    pair.registry.close(opened.session)
    pair.server.leave(opened.session.id, pair.clock.now())


@pytest.mark.parametrize("length", [SMALL - 1, SMALL])
def test_before_a_session_the_limit_is_16_kib_and_it_is_inside(pair: ConnectionPair, length: int) -> None:
    data = of_length(pair, length, method="session.open")
    assert len(data) == length + 4
    assert isinstance(pair.get(data), Request)


@pytest.mark.parametrize("length", [SMALL + 1, LARGE, LARGE + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("size", [4, 5, 68])
def test_a_longer_frame_is_refused_from_its_first_bytes(pair: ConnectionPair, length: int, size: int) -> None:
    answer = pair.fatal(header(length)[:size])
    assert answer.code == Code.FRAME_TOO_LARGE
    assert pair.server._decoder.buffered <= size


@pytest.mark.parametrize("length", [0, 1, 63])
@pytest.mark.parametrize("size", [4, 68])
def test_a_length_below_the_header_is_refused_from_its_first_bytes(
    pair: ConnectionPair, length: int, size: int
) -> None:
    assert pair.fatal(header(length)[:size]).code == Code.PROTOCOL_ERROR


@pytest.mark.parametrize("length", [SMALL + 1, LARGE - 1, LARGE])
def test_with_a_session_the_limit_is_1_mib_and_it_is_inside(pair: ConnectionPair, length: int) -> None:
    pair.login()
    data = of_length(pair, length)
    assert len(data) == length + 4
    pair.get(data)


def test_with_a_session_the_limit_is_a_limit(pair: ConnectionPair) -> None:
    pair.login()
    assert pair.fatal(header(LARGE + 1, pair.token)).code == Code.FRAME_TOO_LARGE


def test_the_first_accepted_token_lifts_the_limit_for_the_next_frame_of_the_same_read(
    pair: ConnectionPair,
) -> None:
    opened = pair.open_session()
    data = pair.request(1, token=opened.token) + of_length(pair, 50_000, opened.token)
    assert len(pair.send(data)) == 3


def test_a_refused_token_does_not_lift_the_limit(pair: ConnectionPair) -> None:
    pair.refused(pair.request(1, token=b"?" * 32))
    assert pair.fatal(header(SMALL + 1, counter=9)).code == Code.FRAME_TOO_LARGE


def test_after_the_session_the_small_limit_is_back(pair: ConnectionPair) -> None:
    opened = pair.login()
    leave(pair, opened)
    assert pair.fatal(header(SMALL + 1, counter=9)).code == Code.FRAME_TOO_LARGE


def test_as_long_as_one_session_lives_the_large_limit_holds(pair: ConnectionPair) -> None:
    first, second = pair.login("ada"), pair.login("ben")
    leave(pair, first)
    pair.get(of_length(pair, LARGE))
    leave(pair, second)
    assert pair.fatal(header(SMALL + 1, counter=9)).code == Code.FRAME_TOO_LARGE


def test_the_limit_rises_falls_and_rises_again(pair: ConnectionPair) -> None:
    for user in ("ada", "ben"):
        opened = pair.login(user)
        pair.get(of_length(pair, LARGE))
        leave(pair, opened)
        pair.refused(pair.request(1))


def test_a_large_frame_that_had_begun_is_taken_off_the_wire_when_the_session_ends(
    pair: ConnectionPair,
) -> None:
    """It was allowed when it began: its token is refused, the connection goes on."""
    opened = pair.login()
    data = of_length(pair, 100_000)
    assert pair.send(data[:500]) == []
    leave(pair, opened)
    answer = pair.refused(data[500:])
    assert answer.code == Code.TOKEN_REVOKED
    pair.get(pair.request(2, "server.info", token=NO_TOKEN))


def test_a_large_public_request_needs_a_session_of_its_own(pair: ConnectionPair) -> None:
    """Its body is never decoded: without a session 16 KiB are enough for all that may be asked."""
    pair.login()
    pair.get(of_length(pair, SMALL, NO_TOKEN))
    answer = pair.refused(of_length(pair, SMALL + 1, NO_TOKEN))
    assert answer.code == Code.UNAUTHENTICATED
    pair.get(pair.request(1))


def test_both_limits_are_settings() -> None:
    settings = ConnectionSettings(max_frame=500, max_frame_before_session=200)
    pair = ConnectionPair(settings=settings)
    assert settings.max_body == 500 - MIN_LENGTH
    assert pair.welcome.value["max_frame"] == 500
    pair.get(of_length(pair, 200))
    pair.login()
    pair.get(of_length(pair, 500))
    assert pair.fatal(header(501, counter=9)).code == Code.FRAME_TOO_LARGE


def test_frames_that_are_dribbled_in_are_not_buffered_twice(pair: ConnectionPair) -> None:
    pair.login()
    data = of_length(pair, LARGE)
    for start in range(0, len(data) - 1, 65_536):
        assert pair.send(data[start : min(start + 65_536, len(data) - 1)]) == []
    assert pair.server._decoder.buffered == len(data) - 1
    (event,) = pair.send(data[-1:])
    assert isinstance(event, Request)
    assert pair.server._decoder.buffered == 0


@pytest.mark.parametrize("count", [1, 963])
def test_each_ping_has_its_pong(pair: ConnectionPair, count: int) -> None:
    pair.send(b"".join(pair.frame(PING) for _ in range(count)))
    assert pair.server.queued == count
    assert len(pair.answers()) == count
    assert pair.server.queued == 0
