"""Test sessions that a connection does not accept at once: bound ones, and those that are not admitted.

A bound token is refused, except for `session.attach`, until its key is proved on the connection. A session that
is not admitted is refused like an unknown token.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import ConnectionPair
from zcproto.connection.events import KeyWanted, Request, SessionJoined
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, Session
from zcproto.wire.frame import LENGTH_SIZE, NO_TOKEN, REQUEST
from zcproto.wire.message import encode_request

LAPTOP = "device:laptop"
CERTIFICATE = "tls:" + "0f" * 32
MINUTE = 60.0


def bound(pair: ConnectionPair, key: str = LAPTOP, user: str = "ada") -> OpenedSession:
    return pair.registry.open(user, client="test/1", address="192.0.2.7", wall=pair.clock.wall(), key=key)


def refused(pair: ConnectionPair, data: bytes) -> Any:
    """Return the ERROR of a frame whose key is wanted and not proved."""
    (wanted,) = pair.send(data)
    assert isinstance(wanted, KeyWanted)
    return pair.answer().error


def prove(pair: ConnectionPair, data: bytes, key: str) -> list[Any]:
    """Receive data, prove the key when it is wanted, and return the other events."""
    events: list[Any] = []
    for event in pair.receive_data(data):
        if isinstance(event, KeyWanted):
            assert event.key == key
            pair.server.tokens.prove(key)
        else:
            events.append(event)
    return events


# --- not proved --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "details"), [(LAPTOP, {"attach": True}), (CERTIFICATE, {"certificate": True})]
)
@pytest.mark.parametrize("method", ["echo", "session.info", "session.close", "server.info", "session.open"])
def test_bound_token_without_key_proof_is_refused_for_any_method(
    pair: ConnectionPair, key: str, details: dict[str, bool], method: str
) -> None:
    opened = bound(pair, key)
    for stream in (1, 2):
        error = refused(pair, pair.request(stream, method, token=opened.token))
        assert (error.code, error.details) == (Code.UNAUTHENTICATED, details)
    assert list(pair.server.sessions) == []


def test_attach_is_refused_for_token_bound_to_certificate(pair: ConnectionPair) -> None:
    opened = bound(pair, CERTIFICATE)
    error = refused(pair, pair.request(1, "session.attach", {"signature": bytes(64)}, token=opened.token))
    assert (error.code, error.details) == (Code.UNAUTHENTICATED, {"certificate": True})


def test_key_wanted_event_names_session_and_key(pair: ConnectionPair) -> None:
    opened = bound(pair)
    (wanted,) = pair.send(pair.request(1, token=opened.token))
    assert isinstance(wanted, KeyWanted)
    assert (wanted.key, wanted.session.id) == (LAPTOP, opened.session.id)


def test_unproved_bound_token_joins_nothing_and_does_not_count_as_use(pair: ConnectionPair) -> None:
    opened = bound(pair)
    before = pair.registry.info(opened.session.id, pair.clock.wall()).last_used_at
    pair.clock.advance(5)
    refused(pair, pair.request(1, token=opened.token))
    assert pair.registry.info(opened.session.id, pair.clock.wall()).last_used_at == before
    pair.clock.advance(5)
    (ended,) = pair.timeout()
    assert ended.reason == "no_session"


def test_unproved_bound_token_does_not_affect_other_sessions(pair: ConnectionPair) -> None:
    opened = bound(pair)
    mine = pair.login("bob")
    for stream in range(1, 6):
        refused(pair, pair.request(stream, token=opened.token))
        request = pair.get(pair.request(stream, token=mine.token))
        assert request.session.user == "bob"
    assert pair.get(pair.request(9, "server.info", token=NO_TOKEN)).session is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x90",
        encode_request("session.attach", {"signature": bytes(64)})[:-1],
        encode_request("session.attach", {"signature": bytes(64)}) + b"\0",
        encode_request("session.attach2", None),
    ],
)
def test_malformed_attach_is_refused_for_its_token(pair: ConnectionPair, body: bytes) -> None:
    opened = bound(pair)
    error = refused(pair, pair.frame(REQUEST, 1, body, token=opened.token))
    assert (error.code, error.details) == (Code.UNAUTHENTICATED, {"attach": True})


def test_oversized_attach_is_refused_for_its_token(pair: ConnectionPair) -> None:
    opened = bound(pair)
    pair.login("bob")  # raises the frame limit
    params = {"signature": bytes(pair.settings.max_frame_before_session)}
    error = refused(pair, pair.request(1, "session.attach", params, token=opened.token))
    assert (error.code, error.details) == (Code.UNAUTHENTICATED, {"attach": True})


@pytest.mark.parametrize(("beyond", "accepted"), [(0, True), (1, False)])
def test_attach_may_be_as_large_as_a_frame_before_a_session(
    pair: ConnectionPair, beyond: int, accepted: bool
) -> None:
    opened = bound(pair)
    pair.login("bob")  # raises the frame limit

    def attach_of(size: int) -> bytes:
        return pair.request(1, "session.attach", {"signature": bytes(size)}, token=opened.token)

    limit = pair.settings.max_frame_before_session
    rest = len(attach_of(limit // 2)) - LENGTH_SIZE - limit // 2
    events = pair.send(attach_of(limit - rest + beyond))
    assert isinstance(events[0], KeyWanted)
    assert (len(events) == 2) is accepted


def test_ended_bound_token_is_refused_as_revoked(pair: ConnectionPair) -> None:
    opened = bound(pair)
    pair.registry.close(opened.session)
    assert pair.refused(pair.request(1, "session.attach", token=opened.token)).code == Code.TOKEN_REVOKED


# --- attaching ---------------------------------------------------------------------------------------


def attach(pair: ConnectionPair, opened: OpenedSession, stream: int = 1, **fields: Any) -> Request:
    params = {"signature": bytes(64)}
    wanted, request = pair.send(pair.request(stream, "session.attach", params, token=opened.token, **fields))
    assert isinstance(wanted, KeyWanted)
    assert isinstance(request, Request)
    return request


def test_key_proved_by_attach_applies_to_next_frame(pair: ConnectionPair) -> None:
    opened = bound(pair)
    request = attach(pair, opened)
    assert (request.method, request.params) == ("session.attach", {"signature": bytes(64)})
    assert request.session.user == "ada"
    pair.respond(request)
    pair.answer()
    refused(pair, pair.request(1, token=opened.token))  # the edge has not verified the signature
    pair.server.tokens.prove(LAPTOP)
    joined, request = pair.send(pair.request(1, token=opened.token))
    assert joined == SessionJoined(opened.session.id)
    assert isinstance(request, Request)
    assert pair.get(pair.request(1, token=opened.token)).session is request.session


def test_attach_and_next_request_in_one_read_are_accepted(pair: ConnectionPair) -> None:
    opened = bound(pair)
    data = pair.request(1, "session.attach", {"signature": bytes(64)}, token=opened.token) + pair.request(
        2, token=opened.token
    )
    seen = []
    for event in pair.receive_data(data):
        seen.append(type(event).__name__)
        if isinstance(event, Request) and event.method == "session.attach":
            pair.server.tokens.prove(LAPTOP)
            pair.respond(event)
    assert seen == ["KeyWanted", "Request", "SessionJoined", "Request"]


def test_key_proof_applies_to_all_sessions_of_that_key_only(pair: ConnectionPair) -> None:
    first, second, other = bound(pair), bound(pair), bound(pair, "device:phone")
    pair.server.tokens.prove(LAPTOP)
    for opened in (first, second, first):
        assert isinstance(pair.send(pair.request(1, token=opened.token))[-1], Request)
    assert refused(pair, pair.request(1, token=other.token)).details == {"attach": True}


def test_refreshed_token_is_accepted_where_key_was_proved(pair: ConnectionPair) -> None:
    opened = bound(pair)
    pair.server.tokens.prove(LAPTOP)
    pair.send(pair.request(1, token=opened.token))
    assert opened.refresh_token is not None
    refreshed = pair.registry.refresh(opened.refresh_token, client="", address="", wall=pair.clock.wall())
    assert isinstance(pair.send(pair.request(1, token=refreshed.token))[-1], Request)
    assert pair.refused(pair.request(1, token=opened.token)).code == Code.TOKEN_REVOKED


def test_use_of_proved_session_extends_idle_limit(pair: ConnectionPair) -> None:
    opened = bound(pair)
    pair.server.tokens.prove(LAPTOP)
    for _ in range(5):
        pair.clock.advance(50 * MINUTE)
        assert isinstance(pair.send(pair.request(1, token=opened.token))[-1], Request)
    pair.clock.advance(61 * MINUTE)
    assert pair.refused(pair.request(1, token=opened.token)).code == Code.TOKEN_EXPIRED


def test_edge_can_prove_key_immediately(pair: ConnectionPair) -> None:
    opened = bound(pair, CERTIFICATE)
    joined, request = prove(pair, pair.request(1, token=opened.token), CERTIFICATE)
    assert joined == SessionJoined(opened.session.id)
    assert isinstance(request, Request)
    assert isinstance(pair.get(pair.request(1, token=opened.token)), Request)


def test_session_revoked_during_key_lookup_is_refused(pair: ConnectionPair) -> None:
    opened = bound(pair)
    for event in pair.receive_data(pair.request(1, token=opened.token)):
        assert isinstance(event, KeyWanted)
        pair.registry.close(event.session)
    assert pair.answer().code == Code.TOKEN_REVOKED


def test_withdrawn_key_proof_is_wanted_again(pair: ConnectionPair) -> None:
    opened = bound(pair)
    pair.server.tokens.prove(LAPTOP), pair.server.tokens.prove("device:phone")
    assert pair.server.tokens.has_proved(LAPTOP)
    pair.send(pair.request(1, token=opened.token))
    pair.server.tokens.disprove("device:nothing")
    assert isinstance(pair.get(pair.request(1, token=opened.token)), Request)
    pair.server.tokens.disprove(LAPTOP)
    assert not pair.server.tokens.has_proved(LAPTOP)
    refused(pair, pair.request(1, token=opened.token))
    other = bound(pair, "device:phone")
    assert isinstance(pair.send(pair.request(1, token=other.token))[-1], Request)


def test_withdrawn_key_proof_is_wanted_for_earlier_tokens_too(pair: ConnectionPair) -> None:
    opened = bound(pair)
    pair.server.tokens.prove(LAPTOP)
    pair.send(pair.request(1, token=opened.token))
    pair.login("eve")
    pair.get(pair.request(1))
    assert isinstance(pair.get(pair.request(1, token=opened.token)), Request)
    pair.get(pair.request(1))
    pair.server.tokens.disprove(LAPTOP)
    assert isinstance(pair.get(pair.request(1)), Request)
    refused(pair, pair.request(1, token=opened.token))


# --- attach follows the rules of every request -------------------------------------------------------


def test_attach_is_refused_while_draining_or_above_max_streams() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(max_streams=1))
    opened = bound(pair)
    held = attach(pair, opened)
    pair.server.hold(held, pair.clock.now())
    params = {"signature": bytes(64)}
    assert refused(pair, pair.request(2, "session.attach", params, token=opened.token)).code == (
        Code.RESOURCE_EXHAUSTED
    )
    assert refused(pair, pair.request(2, "echo", token=opened.token)).code == Code.UNAUTHENTICATED
    pair.respond(held)
    pair.answer()
    pair.server.go_away("draining", 0, pair.clock.wall())
    pair.answers()
    assert (
        refused(pair, pair.request(2, "session.attach", params, token=opened.token)).code == Code.UNAVAILABLE
    )


@pytest.mark.parametrize(("deadline_ms", "runs"), [(0, False), (-1, False), (1, True), (60_000, True)])
def test_attach_past_its_deadline_does_not_run(pair: ConnectionPair, deadline_ms: int, runs: bool) -> None:
    opened = bound(pair)
    data = pair.request(1, "session.attach", {}, {"deadline_ms": deadline_ms}, token=opened.token)
    _, *events = pair.send(data)
    assert len(events) == runs
    if not runs:
        assert pair.answer().code == Code.DEADLINE_EXCEEDED


def test_frames_after_attach_that_closed_connection_are_ignored(pair: ConnectionPair) -> None:
    opened = bound(pair)
    data = pair.request(1, "session.attach", {}, token=opened.token) + pair.request(2, token=NO_TOKEN)
    seen = []
    for event in pair.receive_data(data):
        seen.append(event)
        if isinstance(event, Request):
            pair.server.end()
    assert len(seen) == 2


def test_salt_is_available_for_signing(pair: ConnectionPair) -> None:
    assert pair.server.salt == pair.salt


class FakeAdmission:
    """Admit the given users and record each check."""

    def __init__(self, pair: ConnectionPair, *admitted: str) -> None:
        self.admitted = set(admitted)
        self.checked_users: list[str] = []
        clock = pair.clock
        pair.server = ServerConnection(
            pair.settings, pair.registry, salt=pair.salt, wall=clock.wall(), now=clock.now(), edge=self
        )
        pair.answer()

    def admits(self, session: Session) -> bool:
        self.checked_users.append(session.user)
        return session.user in self.admitted


def test_rejected_session_looks_like_unknown_token_each_time(pair: ConnectionPair) -> None:
    admission = FakeAdmission(pair)
    opened = pair.open_session()
    for _ in range(2):
        assert pair.send(pair.request(1, token=opened.token)) == []
        refused = pair.answer()
        pair.send(pair.request(1, token=bytes([1] * 32)))
        unknown = pair.answer()
        assert refused.error == unknown.error
        assert refused.error.code == Code.UNAUTHENTICATED
        assert refused.error.details == {"reason": "unknown_token"}
    assert list(pair.server.sessions) == []
    assert admission.checked_users == ["ada", "ada"]


def test_admission_is_checked_once_for_joined_session(pair: ConnectionPair) -> None:
    admission = FakeAdmission(pair, "ada")
    good, bad = pair.open_session("ada"), pair.open_session("bob")
    joined, _ = pair.send(pair.request(1, token=good.token))
    assert joined == SessionJoined(good.session.id)
    for stream in range(2, 6):
        assert pair.send(pair.request(stream, token=bad.token)) == []
        assert isinstance(pair.get(pair.request(stream, token=good.token)), Request)
        pair.clock.advance(2)
    assert admission.checked_users.count("ada") == 1


def test_session_opened_on_this_connection_needs_no_admission(pair: ConnectionPair) -> None:
    admission = FakeAdmission(pair)
    pair.login()
    assert isinstance(pair.get(pair.request(1)), Request)
    assert admission.checked_users == []


def test_rejected_bound_session_is_not_asked_to_attach(pair: ConnectionPair) -> None:
    admission = FakeAdmission(pair)
    opened = pair.registry.open("ada", client="", address="", wall=pair.clock.wall(), key="device:phone")
    assert pair.send(pair.request(1, "session.attach", token=opened.token)) == []
    refused = pair.answer().error
    assert refused.code == Code.UNAUTHENTICATED
    assert refused.details == {"reason": "unknown_token"}
    assert admission.checked_users == ["ada"]
