"""Test that a session that is not admitted on a connection is refused like an unknown token."""

from __future__ import annotations

from tests.helpers import ConnectionPair
from zcproto.connection.events import Request, SessionJoined
from zcproto.connection.server import ServerConnection
from zcproto.errors import Code
from zcproto.sessions import Session


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
