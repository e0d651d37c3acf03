"""Test the reads of requests in C against the general path, which takes the same bytes in two pieces, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.connection.helpers import count_checks
from tests.helpers import ConnectionPair
from tests.wire.fast_path import needs_compiled
from zcproto.connection import server
from zcproto.connection.events import GoAwayReason, Request, ServerEvent
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import EndReason
from zcproto.wire.frame import NO_TOKEN, Kind

Edge = Callable[[ConnectionPair, Request], None]


def respond(pair: ConnectionPair, request: Request) -> None:
    pair.respond(request)


def hold(pair: ConnectionPair, request: Request) -> None:
    pair.server.hold(request, pair.clock.now())


def end(pair: ConnectionPair, request: Request) -> None:
    pair.server.end()


def go_away(pair: ConnectionPair, request: Request) -> None:
    pair.server.go_away(GoAwayReason.DRAINING, 1_000, pair.clock.wall())
    pair.respond(request)


def end_session(pair: ConnectionPair, request: Request) -> None:
    if request.session is not None:
        pair.registry.close(request.session)
    pair.respond(request)


def forget_key(pair: ConnectionPair, request: Request) -> None:
    pair.server.tokens.prove("device:d")
    pair.server.tokens.disprove("device:d")
    pair.respond(request)


Reads = Callable[[ConnectionPair], list[bytes]]


def of_two_sessions(pair: ConnectionPair) -> list[bytes]:
    ada, eve = pair.token, pair.login("eve").token
    pair.respond(pair.get(pair.request(8)))
    return [
        pair.request(number, token=token) for number, token in enumerate((eve, ada, eve, ada, ada, eve), 1)
    ]


READS: dict[str, Reads] = {
    "two": lambda pair: [pair.request(1), pair.request(3)],
    "four": lambda pair: [pair.request(number) for number in (1, 2, 3, 4)],
    "one in pieces after another": lambda pair: [pair.request(1), pair.request(2)[:70]],
    "with a ping": lambda pair: [pair.request(1), pair.ping(), pair.request(2)],
    "the same stream twice": lambda pair: [pair.request(1), pair.request(1)],
    "a cancelled one": lambda pair: [pair.request(1), pair.cancel(1), pair.request(2)],
    "malformed": lambda pair: [pair.request(1), pair.request(2, "NO METHOD"), pair.request(3)],
    "too late": lambda pair: [
        pair.request(1, meta={"deadline_ms": 5}),
        pair.request(2, meta={"deadline_ms": 0}),
        pair.request(3, meta={"traceparent": "?"}),
    ],
    "without a session": lambda pair: [pair.request(1), pair.request(2, token=NO_TOKEN), pair.request(3)],
    "of two sessions": of_two_sessions,
    "of two sessions, with a ping": lambda pair: [*of_two_sessions(pair), pair.ping(), pair.request(7)],
    "a replay": lambda pair: [pair.request(1), pair.request(2, counter=pair.counter)],
    "a stale one": lambda pair: [
        pair.request(1),
        pair.request(2, timestamp=pair.clock.wall() - 60_000),
        pair.request(3),
    ],
}


def conversation(reads: Reads, edge: Edge, *, in_pieces: bool) -> list[object]:
    """Return the events and answers of one read after a login, and of a request after it."""
    pair = ConnectionPair(settings=ConnectionSettings(max_streams=2))
    pair.login()
    pair.respond(pair.get(pair.request(8)))  # the token is known here from now on
    data = b"".join(reads(pair))
    seen: list[object] = []

    def take(data: bytes) -> None:
        for event in pair.receive_data(data):
            seen.append(shown(event))
            if isinstance(event, Request):
                edge(pair, event)

    if in_pieces:
        take(data[:1])
        take(data[1:])
    else:
        take(data)
    seen += [(answer.kind, answer.stream, answer.body) for answer in pair.answers()]
    take(pair.request(9))
    return [
        *seen,
        [(answer.kind, answer.stream, answer.body) for answer in pair.answers()],
        pair.server.state,
    ]


def shown(event: ServerEvent | Request) -> object:
    if isinstance(event, Request):
        session = None if event.session is None else event.session.user
        return event.stream, event.token, session, event.method, event.params, event.meta
    return repr(event)


@pytest.mark.parametrize("edge", [respond, hold, end, go_away, end_session, forget_key])
@pytest.mark.parametrize("reads", READS.values(), ids=READS)
def test_fast_path_and_division_of_a_read_change_nothing(
    reads: Reads, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [conversation(reads, edge, in_pieces=in_pieces) for in_pieces in (False, True)]
    monkeypatch.setattr(server, "read_requests", None)
    found.append(conversation(reads, edge, in_pieces=False))
    assert found[0] == found[1] == found[2]


def test_requests_beside_a_held_one_are_refused_at_the_limit() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(max_streams=2))
    pair.login()
    pair.hold(pair.request(1))
    pair.respond(pair.get(pair.request(2)))
    pair.hold(pair.request(3))
    assert pair.send(pair.request(4)) == []
    codes = [answer.code for answer in pair.answers() if answer.kind is Kind.ERROR]
    assert codes[-1] == Code.RESOURCE_EXHAUSTED


@needs_compiled
def test_decoder_is_made_for_the_first_frame_of_another_kind(pair: ConnectionPair) -> None:
    ConnectionPair().get(pair.request())  # the name of its method is known from now on
    pair.get(pair.request())
    assert pair.server._decoder is None
    assert pair.server.buffered == 0
    pair.send(pair.ping())
    assert pair.server._decoder is not None


def test_decoder_made_after_the_session_accepts_large_frames(pair: ConnectionPair) -> None:
    opened = pair.open_session("ada")
    pair.server.join(opened.session, opened.token, pair.clock.wall(), pair.clock.now())
    pair.token = opened.token
    large = pair.request(params={"data": bytes(20_000)})
    pair.send(large[:100])
    assert pair.server.buffered == 100
    assert pair.get(large[100:]).params == {"data": bytes(20_000)}


def open_here(
    pair: ConnectionPair, during: Callable[[], object] = lambda: None, **opening: Any
) -> list[bytes]:
    """Open a session by a request of this connection; return the tokens that are checked from then on."""
    pair.get(pair.request(1, "session.open", token=NO_TOKEN))
    opened = pair.registry.open("ada", wall=pair.clock.wall(), client="", address="", **opening)
    during()
    pair.server.join(opened.session, opened.token, pair.clock.wall(), pair.clock.now())
    pair.token = opened.token
    looked_up, _ = count_checks(pair.registry)
    return looked_up


def test_session_opened_here_is_accepted_without_a_check(pair: ConnectionPair) -> None:
    checked = open_here(pair)
    assert pair.get(pair.request(3)).session is not None
    assert checked == []
    pair.clock.advance(1.0)
    assert pair.get(pair.request(5)).session is not None
    assert pair.registry.list("ada", pair.clock.wall())[0].last_used_at == pair.clock.wall()


@pytest.mark.parametrize("which", ["it", "another", "all refused"])
def test_session_opened_here_is_checked_after_a_revocation(pair: ConnectionPair, which: str) -> None:
    other = pair.open_session("eve").session

    def revoke() -> None:
        if which == "all refused":
            pair.registry.refuse_all()
            pair.get(pair.request(9, token=NO_TOKEN))
        elif which == "it":
            pair.registry.revoke_user("ada", EndReason.BY_USER)
        else:
            pair.registry.close(other)

    checked = open_here(pair, revoke)
    pair.send(pair.request(3))
    assert checked == ([] if which == "another" else [pair.token])
    refused = {"it": [Code.TOKEN_REVOKED], "another": [], "all refused": [Code.UNAVAILABLE]}
    assert [answer.code for answer in pair.answers() if answer.kind is Kind.ERROR] == refused[which]


def test_session_revoked_before_it_joins_is_refused_although_other_frames_came(pair: ConnectionPair) -> None:
    wall, now = pair.clock.wall(), pair.clock.now()
    opening = pair.get(pair.request(1, "session.open", token=NO_TOKEN))
    pair.server.hold(opening, now)
    opened = pair.registry.open("ada", wall=wall, client="", address="")
    pair.registry.revoke_user("ada", EndReason.BY_USER)
    pair.get(pair.request(3, token=NO_TOKEN))
    pair.server.join(opened.session, opened.token, wall, now)
    pair.send(pair.request(5, token=opened.token))
    assert pair.answers()[-1].code == Code.TOKEN_REVOKED
    pair.server.respond(opening, b"", wall)
    pair.get(pair.request(3, token=NO_TOKEN))
    checked = open_here(pair)
    assert pair.get(pair.request(7)).session is not None
    assert checked == [], "the next one needs no check again"


def test_bound_session_opened_here_needs_its_key(pair: ConnectionPair) -> None:
    open_here(pair, key="device:d")
    pair.send(pair.request(3))
    assert pair.answers()[-1].code == Code.UNAUTHENTICATED
