"""GOAWAY, fatal errors, and what is left after the end; replays of what was captured."""

from __future__ import annotations

import pytest

from tests.helpers import SALT, WALL, ConnectionPair, FakeClock, small_registry
from zcproto.connection.events import NEVER, ConnectionEnded, Request
from zcproto.connection.settings import ConnectionSettings, TransportSecurityPolicy
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import NO_TOKEN, Kind
from zcproto.wire.message import decode_body

# --- WELCOME --------------------------------------------------------------------------------------------


def test_the_welcome_says_what_a_client_needs() -> None:
    settings = ConnectionSettings(
        server="shop",
        max_frame=70_000,
        max_streams=7,
        idle_timeout_s=12.5,
        tolerance_ms=4_000,
        sts=TransportSecurityPolicy(max_age_s=60, include_subdomains=False),
    )
    welcome = ConnectionPair(settings=settings).welcome
    assert (welcome.kind, welcome.stream, welcome.counter) == (Kind.WELCOME, 0, 0)
    assert (welcome.timestamp, welcome.salt, welcome.token) == (WALL, SALT, NO_TOKEN)
    assert welcome.value == {
        "server": "shop",
        "versions": [1],
        "max_frame": 70_000,
        "max_streams": 7,
        "idle_timeout_ms": 12_500,
        "tolerance_ms": 4_000,
        "sts": {"max_age": 60, "include_subdomains": False},
    }


def test_the_defaults_are_those_of_the_protocol() -> None:
    settings = ConnectionSettings()
    assert (settings.max_frame, settings.max_frame_before_session) == (1_048_576, 16_384)
    assert (settings.tolerance_ms, settings.open_timeout_s, settings.max_stale_in_a_row) == (30_000, 10.0, 10)
    assert decode_body(settings.welcome_body)["server"] == "zcproto"  # no version unless the operator says so
    assert "welcome_body" not in repr(settings)


# --- GOAWAY ---------------------------------------------------------------------------------------------


def drain(pair: ConnectionPair) -> None:
    pair.server.go_away("draining", 1_000, pair.clock.wall())


def test_a_draining_connection_finishes_what_runs_and_takes_nothing_new(pair: ConnectionPair) -> None:
    pair.login()
    request = pair.hold(pair.request(1))
    drain(pair)
    answer = pair.answer()
    assert (answer.kind, answer.stream, answer.token) == (Kind.GOAWAY, 0, NO_TOKEN)
    assert answer.value == {"reason": "draining", "retry_after_ms": 1_000}
    refusal = pair.refused(pair.request(2))
    assert (refusal.stream, refusal.code) == (2, Code.UNAVAILABLE)
    assert refusal.error.details == {"retry_after_ms": 1_000}
    pair.send(pair.ping())
    assert pair.answer().kind is Kind.PONG
    assert pair.respond(request)
    assert pair.answer().kind is Kind.RESPONSE
    assert pair.server.in_flight == 0


def test_a_draining_connection_still_says_what_is_wrong_with_a_token(pair: ConnectionPair) -> None:
    drain(pair)
    pair.answers()
    assert pair.refused(pair.request(1, token=b"?" * 32)).code == Code.UNAUTHENTICATED
    assert pair.refused(pair.request(1, "server.info", token=NO_TOKEN)).code == Code.UNAVAILABLE


def test_a_second_goaway_is_not_sent(pair: ConnectionPair) -> None:
    drain(pair)
    drain(pair)
    assert len(pair.answers()) == 1
    pair.server.end()
    drain(pair)
    assert pair.answers() == []


def test_a_fault_while_draining_is_fatal_as_ever(pair: ConnectionPair) -> None:
    drain(pair)
    assert pair.fatal(pair.ping(salt=bytes(8))).code == Code.REPLAYED


def test_a_goaway_within_a_read_holds_for_the_next_frame(pair: ConnectionPair) -> None:
    pair.login()
    data = pair.request(1) + pair.request(2)
    events = pair.receive_data(data)
    request = next(events)
    assert isinstance(request, Request)
    drain(pair)
    pair.respond(request)
    assert list(events) == []
    assert [answer.kind for answer in pair.answers()] == [Kind.GOAWAY, Kind.RESPONSE, Kind.ERROR]


# --- fatal errors ---------------------------------------------------------------------------------------


def test_a_fatal_error_is_the_last_word(pair: ConnectionPair) -> None:
    pair.login()
    request = pair.hold(pair.request(1, meta={"deadline_ms": 1_000}))
    fault = pair.frame(0x01FF0000, 1)
    events = pair.send(pair.ping() + fault + pair.request(2) + pair.ping())
    assert events == [ConnectionEnded(Code.PROTOCOL_ERROR, "frame kind not allowed here")]
    assert [answer.kind for answer in pair.answers()] == [Kind.PONG, Kind.ERROR]
    assert pair.server.state is State.CLOSED
    assert not pair.respond(request)
    assert pair.send(pair.request(3)) == []
    pair.clock.advance(1_000)
    assert pair.timeout() == []
    assert pair.server.next_deadline() == NEVER
    assert pair.server.data_to_send() == b""


def test_an_error_says_nothing_of_what_was_sent(pair: ConnectionPair) -> None:
    marker = b"c4nary-c4nary-c4nary-c4nary-c4na"
    pair.send(pair.request(1, "c4nary", token=marker))
    pair.send(pair.request(1, "C4NARY"))
    pair.send(pair.frame(0x01FF0000, 1, marker))
    for answer in pair.answers():
        assert b"c4nary" not in answer.body.lower()


# --- replays --------------------------------------------------------------------------------------------


def captured(pair: ConnectionPair) -> list[bytes]:
    """What a client has said, all of it accepted."""
    pair.login()
    frames = [pair.request(stream) for stream in (1, 2, 3)] + [pair.ping(), pair.cancel(9)]
    for frame in frames:
        for event in pair.send(frame):
            assert isinstance(event, Request)
            pair.respond(event)
    assert len(pair.answers()) == 4
    return frames


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("which", range(5))
def test_a_replay_on_the_same_connection_is_refused(pair: ConnectionPair, which: int) -> None:
    frames = captured(pair)
    assert pair.fatal(frames[which]).code == Code.REPLAYED


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("which", range(5))
def test_a_replay_on_another_connection_is_refused(which: int) -> None:
    registry = small_registry()
    victim = ConnectionPair(registry, salt=b"victim..")
    frames = captured(victim)
    thief = ConnectionPair(registry, salt=b"thief...")
    assert thief.fatal(frames[which]).code == Code.REPLAYED
    assert thief.server.state is State.CLOSED
    assert victim.get(victim.request(4)).session is not None


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("which", range(5))
def test_a_replay_after_a_restart_is_refused(pair: ConnectionPair, which: int) -> None:
    """The tokens may even be good still, and the clock the same: the salt is new."""
    frames = captured(pair)
    after = ConnectionPair(small_registry(), salt=b"restart.")
    assert after.login().token == pair.token
    assert after.fatal(frames[which]).code == Code.REPLAYED


@pytest.mark.requirement("replays")
def test_a_whole_conversation_replayed_runs_nothing(pair: ConnectionPair) -> None:
    frames = captured(pair)
    other = ConnectionPair(pair.registry, salt=b"another.", clock=FakeClock(pair.clock.wall()))
    events = other.send(b"".join(frames))
    assert events == [ConnectionEnded(Code.REPLAYED, "nonce belongs to another connection")]


@pytest.mark.requirement("replays")
def test_frames_in_another_order_are_refused(pair: ConnectionPair) -> None:
    pair.login()
    first, second = pair.request(1), pair.request(2)
    pair.get(second)
    assert pair.fatal(first).code == Code.REPLAYED


def test_two_connections_with_one_registry_have_counters_of_their_own() -> None:
    registry = small_registry()
    pairs = [ConnectionPair(registry, salt=bytes([n] * 8)) for n in range(3)]
    for pair in pairs:
        pair.login()
        for stream in (1, 2, 3):
            pair.get(pair.request(stream))


def test_an_answer_at_once_is_the_same_frame_as_one_in_a_later_turn() -> None:
    frames = []
    for at_once in (True, False):
        pair = ConnectionPair()
        pair.login()
        pair.answers()
        request = pair.get(pair.request(1))
        if at_once:
            pair.server.respond_at_once(request.stream, request.token, b"\x01", pair.clock.wall())
        else:
            assert pair.respond(request, b"\x01")
        frames.append(pair.server.data_to_send())
    assert frames[0] == frames[1] != b""


def test_nothing_is_answered_at_once_on_a_connection_that_its_method_has_ended() -> None:
    pair = ConnectionPair()
    pair.login()
    pair.answers()
    request = pair.get(pair.request(1))
    pair.server.end()
    pair.server.respond_at_once(request.stream, request.token, b"\x01", pair.clock.wall())
    assert pair.server.data_to_send() == b""
