"""A token that the edge does not admit on this connection is answered like one that nobody knows."""

from __future__ import annotations

from tests.helpers import ConnectionPair
from zcproto.connection.events import Request, SessionJoined
from zcproto.connection.server import ServerConnection
from zcproto.errors import Code
from zcproto.sessions import Session


class Door:
    """Admits whom it is told to, and remembers who asked."""

    def __init__(self, pair: ConnectionPair, *users: str) -> None:
        self.users = set(users)
        self.asked: list[str] = []
        clock = pair.clock
        pair.server = ServerConnection(
            pair.settings, pair.registry, salt=pair.salt, wall=clock.wall(), now=clock.now(), admits=self
        )
        pair.answer()

    def __call__(self, session: Session) -> bool:
        self.asked.append(session.user)
        return session.user in self.users


def test_a_token_is_refused_each_time_and_joins_nothing(pair: ConnectionPair) -> None:
    door = Door(pair)
    opened = pair.open_session()
    for _ in range(2):
        assert pair.send(pair.request(1, token=opened.token)) == []
        refused = pair.answer()
        pair.send(pair.request(1, token=bytes([1] * 32)))
        unknown = pair.answer()
        assert refused.error == unknown.error
        assert refused.error.code == Code.UNAUTHENTICATED
    assert list(pair.server.session_ids) == []
    assert door.asked == ["ada", "ada"]


def test_one_that_is_admitted_is_asked_for_once(pair: ConnectionPair) -> None:
    door = Door(pair, "ada")
    good, bad = pair.open_session("ada"), pair.open_session("bob")
    joined, _ = pair.send(pair.request(1, token=good.token))
    assert joined == SessionJoined(good.session.id)
    for stream in range(2, 6):
        assert pair.send(pair.request(stream, token=bad.token)) == []
        assert isinstance(pair.get(pair.request(stream, token=good.token)), Request)
        pair.clock.advance(2)
    assert door.asked.count("ada") == 1


def test_a_session_opened_here_is_not_asked_for(pair: ConnectionPair) -> None:
    door = Door(pair)
    pair.login()
    assert isinstance(pair.get(pair.request(1)), Request)
    assert door.asked == []


def test_the_token_of_a_bound_session_is_not_even_asked_to_be_attached(pair: ConnectionPair) -> None:
    door = Door(pair)
    opened = pair.registry.open(
        "ada", operator=False, client="", address="", wall=pair.clock.wall(), key="device:phone"
    )
    assert pair.send(pair.request(1, "session.attach", token=opened.token)) == []
    refused = pair.answer().error
    assert refused.code == Code.UNAUTHENTICATED
    assert refused.details == {}
    assert door.asked == ["ada"]
