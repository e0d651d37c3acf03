"""Test WELCOME, announcements, GOAWAY, fatal errors, replays and counted refusals of a server connection."""

from __future__ import annotations

import pytest

from tests.helpers import SALT, WALL, ConnectionPair, FakeClock, small_registry
from zcproto.connection.events import NEVER, ConnectionEnded, Request
from zcproto.connection.server import ConnectionTotals, ServerConnection
from zcproto.connection.settings import ConnectionSettings, TransportSecurityPolicy
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import NO_TOKEN, REQUEST, RESPONSE, Kind
from zcproto.wire.message import decode_body, decode_event, encode_body, encode_request

# --- WELCOME --------------------------------------------------------------------------------------------


def test_welcome_contains_configured_limits() -> None:
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


def test_default_settings_follow_the_protocol() -> None:
    settings = ConnectionSettings()
    assert (settings.max_frame, settings.max_frame_before_session) == (1_048_576, 16_384)
    assert (settings.tolerance_ms, settings.open_timeout_s, settings.max_stale_in_a_row) == (30_000, 10.0, 10)
    assert decode_body(settings.welcome_body)["server"] == "zcproto"  # hides the version by default
    assert "welcome_body" not in repr(settings)


# --- GOAWAY ---------------------------------------------------------------------------------------------


def drain(pair: ConnectionPair) -> None:
    pair.server.go_away("draining", 1_000, pair.clock.wall())


def test_draining_connection_finishes_requests_and_refuses_new_ones(pair: ConnectionPair) -> None:
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


def test_draining_connection_still_refuses_unknown_token(pair: ConnectionPair) -> None:
    drain(pair)
    pair.answers()
    assert pair.refused(pair.request(1, token=b"?" * 32)).code == Code.UNAUTHENTICATED
    assert pair.refused(pair.request(1, "server.info", token=NO_TOKEN)).code == Code.UNAVAILABLE


def test_goaway_is_sent_once(pair: ConnectionPair) -> None:
    drain(pair)
    drain(pair)
    assert len(pair.answers()) == 1
    pair.server.end()
    drain(pair)
    assert pair.answers() == []


def test_replayed_frame_while_draining_closes_connection(pair: ConnectionPair) -> None:
    drain(pair)
    assert pair.fatal(pair.ping(salt=bytes(8))).code == Code.REPLAYED


def test_goaway_during_a_read_refuses_next_request_of_that_read(pair: ConnectionPair) -> None:
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


def test_nothing_is_received_or_sent_after_fatal_error(pair: ConnectionPair) -> None:
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


def test_errors_do_not_echo_received_bytes(pair: ConnectionPair) -> None:
    marker = b"c4nary-c4nary-c4nary-c4nary-c4na"
    pair.send(pair.request(1, "c4nary", token=marker))
    pair.send(pair.request(1, "C4NARY"))
    pair.send(pair.frame(0x01FF0000, 1, marker))
    for answer in pair.answers():
        assert b"c4nary" not in answer.body.lower()


# --- replays --------------------------------------------------------------------------------------------


def exchange_frames(pair: ConnectionPair) -> list[bytes]:
    """Return frames of a client that the server has accepted."""
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
def test_frame_replayed_on_same_connection_is_refused(pair: ConnectionPair, which: int) -> None:
    frames = exchange_frames(pair)
    assert pair.fatal(frames[which]).code == Code.REPLAYED


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("which", range(5))
def test_frame_replayed_on_another_connection_is_refused(which: int) -> None:
    registry = small_registry()
    victim = ConnectionPair(registry, salt=b"victim..")
    frames = exchange_frames(victim)
    thief = ConnectionPair(registry, salt=b"thief...")
    assert thief.fatal(frames[which]).code == Code.REPLAYED
    assert thief.server.state is State.CLOSED
    assert victim.get(victim.request(4)).session is not None


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("which", range(5))
def test_frame_replayed_after_restart_is_refused(pair: ConnectionPair, which: int) -> None:
    """The salt is new, even if tokens are still valid and the clock is the same."""
    frames = exchange_frames(pair)
    after = ConnectionPair(small_registry(), salt=b"restart.")
    assert after.login().token == pair.token
    assert after.fatal(frames[which]).code == Code.REPLAYED


@pytest.mark.requirement("replays")
def test_replayed_conversation_runs_no_request(pair: ConnectionPair) -> None:
    frames = exchange_frames(pair)
    other = ConnectionPair(pair.registry, salt=b"another.", clock=FakeClock(pair.clock.wall()))
    events = other.send(b"".join(frames))
    assert events == [ConnectionEnded(Code.REPLAYED, "nonce belongs to another connection")]


@pytest.mark.requirement("replays")
def test_reordered_frames_are_refused_as_replayed(pair: ConnectionPair) -> None:
    pair.login()
    first, second = pair.request(1), pair.request(2)
    pair.get(second)
    assert pair.fatal(first).code == Code.REPLAYED


def test_connections_sharing_a_registry_have_separate_counters() -> None:
    registry = small_registry()
    pairs = [ConnectionPair(registry, salt=bytes([n] * 8)) for n in range(3)]
    for pair in pairs:
        pair.login()
        for stream in (1, 2, 3):
            pair.get(pair.request(stream))


def test_immediate_response_on_closed_connection_is_dropped() -> None:
    pair = ConnectionPair()
    pair.login()
    pair.answers()
    request = pair.get(pair.request(1))
    pair.server.end()
    pair.server.outbox.send(RESPONSE, request.stream, request.token, b"\x01", pair.clock.wall())
    assert pair.server.data_to_send() == b""


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
