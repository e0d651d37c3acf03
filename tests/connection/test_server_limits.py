"""Test frame limits of a server: before, during and after a session."""

from __future__ import annotations

import pytest

from tests.helpers import SALT, WALL, ConnectionPair
from zcproto.connection.events import FrameBuffered, Request
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession
from zcproto.wire.frame import HEADER, MIN_LENGTH, NO_TOKEN, PING, REQUEST

SMALL, LARGE = 16_384, 1_048_576


def request_of_length(
    pair: ConnectionPair, length: int, token: bytes | None = None, method: str = "echo"
) -> bytes:
    """Return a valid request whose `length` field is exactly this."""
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
def test_frame_of_16_kib_is_accepted_without_session(pair: ConnectionPair, length: int) -> None:
    data = request_of_length(pair, length, method="session.open")
    assert len(data) == length + 4
    assert isinstance(pair.get(data), Request)


@pytest.mark.parametrize("length", [SMALL + 1, LARGE, LARGE + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("size", [4, 5, 68])
def test_oversized_frame_is_refused_from_its_length(pair: ConnectionPair, length: int, size: int) -> None:
    answer = pair.fatal(header(length)[:size])
    assert answer.code == Code.FRAME_TOO_LARGE


@pytest.mark.parametrize("length", [0, 1, 63])
@pytest.mark.parametrize("size", [4, 68])
def test_length_below_header_size_is_refused_immediately(
    pair: ConnectionPair, length: int, size: int
) -> None:
    assert pair.fatal(header(length)[:size]).code == Code.PROTOCOL_ERROR


@pytest.mark.parametrize("length", [SMALL + 1, LARGE - 1, LARGE])
def test_frame_of_1_mib_is_accepted_with_session(pair: ConnectionPair, length: int) -> None:
    pair.login()
    data = request_of_length(pair, length)
    assert len(data) == length + 4
    pair.get(data)


def test_frame_above_1_mib_is_refused_with_session(pair: ConnectionPair) -> None:
    pair.login()
    assert pair.fatal(header(LARGE + 1, pair.token)).code == Code.FRAME_TOO_LARGE


def test_accepted_token_raises_frame_limit_within_same_read(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    data = pair.request(1, token=opened.token) + request_of_length(pair, 50_000, opened.token)
    assert len(pair.send(data)) == 3


def test_refused_token_does_not_raise_frame_limit(pair: ConnectionPair) -> None:
    pair.refused(pair.request(1, token=b"?" * 32))
    assert pair.fatal(header(SMALL + 1, counter=9)).code == Code.FRAME_TOO_LARGE


def test_frame_limit_falls_when_session_ends(pair: ConnectionPair) -> None:
    opened = pair.login()
    leave(pair, opened)
    assert pair.fatal(header(SMALL + 1, counter=9)).code == Code.FRAME_TOO_LARGE


def test_frame_limit_falls_only_when_last_session_ends(pair: ConnectionPair) -> None:
    first, second = pair.login("ada"), pair.login("ben")
    leave(pair, first)
    pair.get(request_of_length(pair, LARGE))
    leave(pair, second)
    assert pair.fatal(header(SMALL + 1, counter=9)).code == Code.FRAME_TOO_LARGE


def test_frame_limit_rises_again_with_next_session(pair: ConnectionPair) -> None:
    for user in ("ada", "ben"):
        opened = pair.login(user)
        pair.get(request_of_length(pair, LARGE))
        leave(pair, opened)
        pair.refused(pair.request(1))


def test_partly_received_large_frame_is_completed_when_session_ends(pair: ConnectionPair) -> None:
    """It was allowed when it began, so only its token is refused and the connection stays open."""
    opened = pair.login()
    data = request_of_length(pair, 100_000)
    assert pair.send(data[:500]) == []
    leave(pair, opened)
    answer = pair.refused(data[500:])
    assert answer.code == Code.TOKEN_REVOKED
    pair.get(pair.request(2, "server.info", token=NO_TOKEN))


def test_large_request_without_token_is_refused(pair: ConnectionPair) -> None:
    """Public methods need at most 16 KiB, so the body is not decoded."""
    pair.login()
    pair.get(request_of_length(pair, SMALL, NO_TOKEN))
    answer = pair.refused(request_of_length(pair, SMALL + 1, NO_TOKEN))
    assert answer.code == Code.UNAUTHENTICATED
    pair.get(pair.request(1))


def test_frame_limits_are_configurable() -> None:
    settings = ConnectionSettings(max_frame=500, max_frame_before_session=200)
    pair = ConnectionPair(settings=settings)
    assert settings.max_body == 500 - MIN_LENGTH
    assert pair.welcome.value["max_frame"] == 500
    pair.get(request_of_length(pair, 200))
    pair.login()
    pair.get(request_of_length(pair, 500))
    assert pair.fatal(header(501, counter=9)).code == Code.FRAME_TOO_LARGE


def test_large_frame_in_pieces_is_buffered_once(pair: ConnectionPair) -> None:
    pair.login()
    data = request_of_length(pair, LARGE)
    sizes = []
    for start in range(0, len(data) - 1, 65_536):
        sizes += pair.send(data[start : min(start + 65_536, len(data) - 1)])
    assert pair.server.buffered == len(data) - 1
    reported = [*range(65_536, LARGE + 1, 65_536), LARGE + 4]
    assert sizes == [FrameBuffered(size, pair.clock.now(), "ada") for size in reported]
    request, buffered = pair.send(data[-1:])
    assert isinstance(request, Request)
    assert buffered == FrameBuffered(0, pair.clock.now(), "ada")
    assert pair.server.buffered == 0


def test_incomplete_frame_is_reported_from_4_kib_in_steps(pair: ConnectionPair) -> None:
    data = request_of_length(pair, SMALL)
    began = pair.clock.now()
    assert pair.send(data[:4095]) == []
    assert pair.send(data[4095:4096]) == [FrameBuffered(SMALL + 4, began, "")]
    pair.clock.advance(1.0)
    assert pair.send(data[4096:-1]) == []
    request, buffered = pair.send(data[-1:])
    assert isinstance(request, Request)
    assert buffered == FrameBuffered(0, pair.clock.now(), "")


def test_incomplete_frame_that_grows_keeps_its_age(pair: ConnectionPair) -> None:
    pair.login()
    data = request_of_length(pair, 200_000)
    began = pair.clock.now()
    assert pair.send(data[:60_000]) == [FrameBuffered(65_536, began, "ada")]
    pair.clock.advance(1.0)
    assert pair.send(data[60_000:65_536]) == []
    assert pair.send(data[65_536:70_000]) == [FrameBuffered(131_072, began, "ada")]


def test_next_incomplete_frame_has_its_own_age(pair: ConnectionPair) -> None:
    first, second = request_of_length(pair, SMALL), request_of_length(pair, SMALL)
    pair.send(first[:5000])
    pair.clock.advance(2.0)
    request, buffered = pair.send(first[5000:] + second[:6000])
    assert isinstance(request, Request)
    assert buffered == FrameBuffered(SMALL + 4, pair.clock.now(), "")
    pair.respond(request)
    pair.clock.advance(2.0)
    request, buffered = pair.send(second[6000:] + first[:10])
    assert isinstance(request, Request)
    assert buffered == FrameBuffered(0, pair.clock.now(), "")


@pytest.mark.parametrize("count", [1, 963])
def test_each_ping_is_answered_by_pong(pair: ConnectionPair, count: int) -> None:
    pair.send(b"".join(pair.frame(PING) for _ in range(count)))
    assert len(pair.answers()) == count
    assert pair.server.data_to_send() == b""
