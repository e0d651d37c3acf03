"""Calls to clients at the server's edge: registration, limits, hand-over, the end of connections and sessions."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import pytest

from tests.server.protocol_harness import Harness, Peer, ended, nothing_left
from zcproto.app.context import Context
from zcproto.config import Config
from zcproto.connection.events import GoAwayReason
from zcproto.errors import (
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    ZcprotoError,
)
from zcproto.server.clients import CallLimits
from zcproto.server.protocol_methods import HANDLED_METHODS
from zcproto.sessions import EndReason
from zcproto.wire.frame import CALL, FAILURE, WITHDRAW
from zcproto.wire.message import decode_request, encode_error


def connect(harness: Harness, user: str = "ada", *methods: str) -> Peer:
    """Connect a client with a session, which registers methods."""
    peer = harness.connect(user)
    if methods:
        peer.handle(*methods)
    return peer


@pytest.fixture
def harness(harness: Harness) -> Harness:
    harness.allow_calls()
    return harness


@pytest.fixture
def client(harness: Harness) -> Peer:
    return connect(harness, "ada", "approve", "ask")


def begin(peer: Peer, **params: Any) -> asyncio.Task[Any]:
    """Call the newest client from outside of a method."""
    (client,) = peer.harness.state.clients.find(handles="approve")
    return peer.call(client, **params)


def failure(peer: Peer, task: asyncio.Task[Any], error: type[ZcprotoError]) -> ZcprotoError:
    """Return the error of a call, which must be of this type."""
    peer.harness.turn()
    failure = task.exception()
    assert isinstance(failure, error)
    assert failure.of_client
    return failure


# --- registration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "most"),
    [
        ([f"m{number}" for number in range(HANDLED_METHODS + 1)], 1),
        (["x" * 129], 1),
        ([""], 1),
        (["Approve"], 1),
        (["approve"], 0),
        (["approve"], -1),
    ],
)
def test_malformed_registration_is_invalid(client: Peer, methods: list[str], most: int) -> None:
    assert client.handle(*methods, most=most).error.code == Code.INVALID_ARGUMENT
    assert client.harness.state.clients.find(handles="ask") != []


def test_largest_registration_is_accepted(client: Peer) -> None:
    names = [f"{number:0128}" for number in range(HANDLED_METHODS)]
    assert client.handle(*names, most=2**63).value == {}
    assert len(client.harness.state.clients.find(handles=names[0])) == 1


def test_registration_is_replaced_and_withdrawn(client: Peer, harness: Harness) -> None:
    find = harness.state.clients.find
    assert client.handle("ask").value == {}
    assert (len(find(handles="approve")), len(find(handles="ask")), len(find())) == (0, 1, 1)
    client.handle()
    assert find() == []
    assert len(harness.state.clients) == 0


def test_server_without_calls_is_unimplemented(harness: Harness) -> None:
    harness.allow_calls(0)
    peer = connect(harness)
    assert peer.handle("approve").error.code == Code.UNIMPLEMENTED


def test_names_of_one_user_are_limited(client: Peer, harness: Harness) -> None:
    harness.state.clients.limits = CallLimits(names_per_user=3)
    other = connect(harness)
    assert other.handle("a", "b").error.details["limit"] == 3
    assert other.handle("a").value == {}
    assert client.handle("a", "b").value == {}, "it replaces its own"
    bob = connect(harness, "bob")
    assert bob.handle("a", "b", "c").value == {}
    other.handle()
    assert client.handle("a", "b", "c").value == {}, "what was withdrawn does not count"


def test_clients_are_found_by_user_and_method_the_newest_first(harness: Harness) -> None:
    peers = [Peer(harness) for _ in range(3)]
    for peer, user in zip(peers, ("ada", "ada", "bob"), strict=True):
        peer.login(user)
        peer.handle("approve", "ask" if user == "bob" else "tell")
    find = harness.state.clients.find
    assert [client._connection for client in find("ada")] == [peers[1].protocol, peers[0].protocol]
    assert [client.user for client in find(handles="ask")] == ["bob"]
    assert len(find()) == 3
    assert find("eve") == find("ada", "ask") == []
    peers[0].handle("approve")
    assert [client._connection for client in find("ada")] == [peers[0].protocol, peers[1].protocol]
    assert "ada" in repr(find("ada")[0])


# --- calls ---------------------------------------------------------------------------------------------


def test_call_is_handed_over_at_once_and_its_result_returned(client: Peer, harness: Harness) -> None:
    client.send(client.request(5, "call", {"tool": "sh"}))
    (call,) = client.answers()
    assert (call.raw[1], call.stream) == (CALL, 1)
    method, params, meta = decode_request(call.body)
    assert (method, params, meta.deadline_ms) == ("approve", {"tool": "sh"}, 30_000)
    assert harness.state.clients.in_flight == harness.state.clients.most_in_flight == 1
    client.send(client.result(1, True))
    harness.turn()
    (answer,) = client.answers()
    assert (answer.stream, answer.value) == (5, True)
    assert harness.state.clients.ended == {"answered": 1}
    assert harness.state.clients.in_flight == harness.state.clients.most_in_flight == 0


def test_error_of_a_client_is_shown_on_one_line_and_cut(client: Peer) -> None:
    task = begin(client)
    error = encode_error(Code.NOT_FOUND, "a\r\nb" + 2_000 * "x", {})
    client.send(client.frame(FAILURE, 1, error))
    message = failure(client, task, NotFound).message
    assert message.startswith("a\\r\\nbx")
    assert len(message) < 2_000
    assert client.harness.state.clients.ended == {"failed": 1}


def test_method_without_session_has_no_client(harness: Harness) -> None:
    peer = Peer(harness)

    @harness.app.method("public", public=True)
    async def public(context: Context) -> Any:
        return await context.client.call("approve")

    harness.state.add_methods(harness.app)
    peer.send(peer.request(1, "public"))
    assert peer.answers()[-1].error.code == Code.UNAUTHENTICATED
    assert Unauthenticated.of_client is False


def test_client_that_has_registered_nothing_is_unavailable(harness: Harness) -> None:
    peer = connect(harness)
    peer.send(peer.request(5, "call"))
    (answer,) = peer.answers()
    assert answer.error.code == Code.ABORTED, "the method may have run: its caller must not repeat it"
    assert "UNAVAILABLE" in answer.error.message
    assert harness.state.clients.ended == {"unavailable": 1}


def test_call_of_another_method_is_unavailable(client: Peer, harness: Harness) -> None:
    (found,) = harness.state.clients.find()
    failure(client, client.call(found, "other"), Unavailable)
    assert client.heads() == []


@pytest.mark.parametrize(
    ("params", "error", "result"),
    [
        ({"timeout": 0.0}, DeadlineExceeded, "deadline"),
        ({"timeout": -1.0}, DeadlineExceeded, "deadline"),
        ({"x": object()}, InvalidArgument, "invalid"),
        ({"x": bytes(1_048_576)}, InvalidArgument, "invalid"),
    ],
)
def test_call_that_cannot_be_made_sends_nothing(
    client: Peer, harness: Harness, params: dict[str, Any], error: type[ZcprotoError], result: str
) -> None:
    failure(client, begin(client, **params), error)
    assert client.heads() == []
    assert harness.state.clients.ended == {result: 1}


def test_params_in_a_mapping_and_by_name_are_joined(client: Peer, harness: Harness) -> None:
    (found,) = harness.state.clients.find()
    task = harness.loop.create_task(found.call("approve", {"timeout": 1, "x": 1}, timeout=5.0, x=2))
    harness.turn()
    (call,) = client.answers()
    assert decode_request(call.body)[1] == {"timeout": 1, "x": 2}
    client.send(client.result(1, None))
    harness.turn()
    assert task.result() is None


def test_default_limits_of_calls_are_those_of_the_configuration() -> None:
    calls = Config().calls
    assert CallLimits() == CallLimits(
        calls.per_user,
        calls.total,
        pending_per_user=calls.pending_per_user,
        pending_total=calls.pending_total,
    )


def test_calls_per_user_and_in_total_are_limited(client: Peer, harness: Harness) -> None:
    bob = connect(harness, "bob", "tell")
    (of_bob,) = harness.state.clients.find("bob")
    harness.state.clients.limits = CallLimits(per_user=2, total=3)
    tasks = [begin(client), begin(client), bob.call(of_bob, "tell")]
    assert failure(client, begin(client), ResourceExhausted).details == {"limit": 2}
    assert failure(bob, bob.call(of_bob, "tell"), ResourceExhausted).details == {"limit": 3}
    client.send(client.result(1, 1))
    harness.turn()
    assert tasks[0].result() == 1
    tasks.append(bob.call(of_bob, "tell"))
    for task in tasks:
        task.cancel()
    harness.turn()
    assert harness.state.clients.in_flight == 0
    assert harness.state.clients.ended == {"limited": 2, "answered": 1, "withdrawn": 3}


def test_client_that_does_not_read_is_not_called_beyond_the_buffer(client: Peer) -> None:
    client.transport.stuck = True
    tasks = [begin(client, x=bytes(15_000)) for _ in range(5)]
    failure(client, begin(client, x=bytes(15_000)), ResourceExhausted)
    assert not client.transport.aborted
    client.read_all()
    assert client.heads() == [CALL] * 5
    for task in tasks:
        task.cancel()
    client.harness.turn()


def test_deadline_fails_the_call_and_withdraws_it(client: Peer, harness: Harness) -> None:
    task = begin(client, timeout=5.0)
    assert client.heads() == [CALL]
    harness.advance(6.0)
    failure(client, task, DeadlineExceeded)
    assert client.heads() == [WITHDRAW]
    assert harness.state.clients.ended == {"deadline": 1}
    client.send(client.result(1, "late"))
    assert client.heads() == []
    client.lose()
    assert harness.state.counters.dropped_answers == 1


def test_call_of_an_ended_session_is_refused(client: Peer, harness: Harness) -> None:
    (found,) = harness.state.clients.find()
    harness.registry.revoke_user("ada", EndReason.BY_OPERATOR)
    failure(client, client.call(found), ZcprotoError)


def test_cancelled_method_withdraws_its_call(client: Peer, harness: Harness) -> None:
    task = begin(client)
    task.cancel()
    harness.turn()
    assert task.cancelled()
    assert client.heads() == [CALL, WITHDRAW]


@pytest.mark.parametrize("answer_first", [False, True])
def test_answer_and_cancellation_in_one_turn_withdraw_nothing(
    client: Peer, harness: Harness, answer_first: bool
) -> None:
    task = begin(client)
    steps = [lambda: client.protocol.data_received(client.result(1, 1)), task.cancel]
    harness.in_loop(lambda: [step() for step in (steps if answer_first else reversed(steps))])
    harness.turn()
    assert task.cancelled()
    assert client.heads() == [CALL]
    assert harness.state.clients.ended == {"answered": 1}


# --- several connections of a client -------------------------------------------------------------------


def further(client: Peer, *methods: str) -> Peer:
    """Return another connection of the client's session, which registers methods."""
    peer = client.harness.connect()
    peer.use(client.opened)
    if methods:
        peer.handle(*methods)
    return peer


def answered(peer: Peer, *callers: Peer) -> bool:
    """Let a method that was called on one connection call back; return whether that arrives on `peer`."""
    caller = callers[0] if callers else peer
    caller.send(caller.request(7, "call", {"method": "approve"}))
    peer.harness.turn()
    calls = [answer for answer in peer.answers() if answer.raw[1] == CALL]
    for call in calls:
        peer.send(peer.result(call.stream, "yes"))
    peer.harness.turn()
    return bool(calls)


def test_method_on_a_further_connection_calls_the_connection_that_has_registered(client: Peer) -> None:
    other = further(client)
    assert answered(client, other)
    (answer,) = other.answers()
    assert (answer.stream, answer.value) == (7, "yes")


def test_method_calls_its_own_connection_if_that_has_registered(client: Peer) -> None:
    newest = further(client, "approve")
    assert answered(client)
    assert newest.heads() == []
    assert answered(newest)


def test_method_calls_the_newest_connection_of_its_session_that_takes_calls(
    client: Peer, harness: Harness
) -> None:
    connections = [client, *(further(client, "approve", "ask") for _ in range(3)), further(client, "ask")]
    caller = further(client)
    second, third, newest = connections[1:4]
    stranger = connect(harness, "ada", "approve")
    assert answered(newest, caller)
    caller.answers()
    newest.protocol.go_away(GoAwayReason.DRAINING)
    assert answered(third, caller)
    caller.answers()
    third.lose()
    session_id: str = client.opened.session.id
    harness.in_loop(lambda: second.protocol.session_rotated(session_id, b"n" * 32))
    second.answers()
    assert answered(client, caller)
    assert stranger.heads() == []


def test_call_without_any_registration_of_the_session_is_unavailable(client: Peer) -> None:
    other = further(client)
    client.handle()
    other.send(other.request(7, "call", {"method": "approve"}))
    other.harness.turn()
    assert "no method 'approve' on this connection" in other.answers()[0].error.message
    assert client.heads() == []


def test_client_with_several_connections_is_listed_once(client: Peer, harness: Harness) -> None:
    find = harness.state.clients.find
    newest = further(client, "approve")
    elsewhere = further(client, "approve")
    elsewhere.protocol.peer = "198.51.100.9"
    assert [each._connection for each in find()] == [
        elsewhere.protocol,
        newest.protocol,
    ]  # who would be called
    assert [each._connection for each in find("ada", "ask")] == [client.protocol]
    newest.lose()
    assert [each._connection for each in find("ada")] == [elsewhere.protocol, client.protocol]


# --- the end of sessions and connections ---------------------------------------------------------------


def test_ended_session_fails_its_calls_only(client: Peer, harness: Harness) -> None:
    bob = harness.registry.open("bob", client="", address="", wall=harness.clock.wall())
    token, client.token = client.token, bob.token
    client.handle("tell", stream=91)
    client.token = token
    task, of_bob = begin(client), client.call(harness.state.clients.find("bob")[0], "tell")
    client.answers()
    session = client.opened.session
    client.protocol.session_ended(session.id, Code.TOKEN_REVOKED, EndReason.BY_OPERATOR)
    failure(client, task, ConnectionClosed)
    assert not of_bob.done()
    answers = client.answers()
    assert [answer.kind.name for answer in answers] == ["EVENT", "WITHDRAW"]
    assert harness.state.clients.find(handles="approve") == []
    client.lose()
    failure(client, of_bob, ConnectionClosed)
    assert harness.state.clients.ended == {"closed": 2}


def expire(client: Peer, reason: EndReason = EndReason.EXPIRED) -> None:
    """Let the token of the client's session expire."""
    client.end_session(Code.TOKEN_EXPIRED, reason)
    client.answers()


def refresh(client: Peer) -> None:
    """Refresh the session on this connection."""
    opened, harness = client.opened, client.harness
    assert opened.refresh_token is not None
    client.opened = harness.registry.refresh(
        opened.refresh_token, client="", address="", wall=harness.clock.wall()
    )
    client.token = client.opened.token


def test_registration_is_kept_while_its_session_expires_and_is_refreshed(
    client: Peer, harness: Harness
) -> None:
    (found,) = harness.state.clients.find(handles="approve")
    task = begin(client)
    harness.clock.advance(harness.registry.settings.lifetime_ms / 1_000)
    harness.in_loop(lambda: harness.registry.clean(harness.clock.wall(), 100))
    failure(client, task, ConnectionClosed)
    assert harness.state.clients.find() == []
    assert len(harness.state.clients) == 0
    failure(client, client.call(found), Unavailable)
    client.answers()
    refresh(client)
    client.protocol.join(client.opened.session, client.token)
    assert harness.state.clients.find(handles="approve") == [found]
    task = begin(client)
    (call,) = client.answers()
    assert (call.raw[1], call.token) == (CALL, client.token)
    client.send(client.result(call.stream, "yes"))
    harness.turn()
    assert task.result() == "yes"


@pytest.mark.parametrize("reason", [EndReason.EXPIRED, EndReason.IDLE])
def test_registration_is_kept_if_the_session_was_refreshed_elsewhere(
    client: Peer, harness: Harness, reason: EndReason
) -> None:
    expire(client, reason)
    refresh(client)
    assert harness.state.clients.find() == []
    client.send(client.request(5, "big", {"n": 0, "size": 0}))  # shows the token here
    assert len(harness.state.clients.find(handles="approve")) == 1


def test_registration_of_a_session_that_ended_for_good_is_dropped(client: Peer, harness: Harness) -> None:
    expire(client, EndReason.DISCONNECTED)
    refresh(client)
    client.protocol.join(client.opened.session, client.token)
    assert harness.state.clients.find() == []
    assert client.handle("a").value == {}


def test_expired_registrations_are_dropped_with_their_connection(client: Peer, harness: Harness) -> None:
    harness.state.clients.limits = CallLimits(names_per_user=2)
    expire(client)
    client.lose()
    other = connect(harness)
    assert other.handle("a", "b").value == {}
    clients = harness.state.clients  # what stays in its tables would be found by nothing else
    assert all(key[0] is not client.protocol for key in clients._users)
    assert clients._suspended == {}


def test_expired_registrations_make_room_for_others_of_the_user_the_oldest_first(
    client: Peer, harness: Harness
) -> None:
    harness.state.clients.limits = CallLimits(names_per_user=4)
    second, third, fourth = (Peer(harness) for _ in range(3))
    for peer, name in ((second, "second"), (third, "third")):
        peer.login()
        peer.handle(name)
    (found,) = harness.state.clients.find(handles="approve")
    expire(client)
    expire(second)
    fourth.login()
    assert fourth.handle("a").value == {}, "the oldest makes room"
    for peer in (client, second):
        refresh(peer)
        peer.protocol.join(peer.opened.session, peer.token)
    assert harness.state.clients.find(handles="approve") == []
    failure(client, client.call(found), Unavailable)
    assert len(harness.state.clients.find(handles="second")) == 1
    assert fourth.handle("a", "b", "c").error.details["limit"] == 4


def test_room_is_made_without_a_look_at_each_registration_of_the_user(client: Peer, harness: Harness) -> None:
    class Unread(dict[Any, Any]):
        def items(self) -> NoReturn:
            raise AssertionError("thousands of them for each request of a user at the limit")

        keys = __iter__ = items

    clients = harness.state.clients
    clients.limits = CallLimits(names_per_user=2)
    other = connect(harness)
    clients._by_user["ada"] = Unread(clients._by_user["ada"])
    assert other.handle("a").error.details["limit"] == 2
    expire(client)
    assert other.handle("a", "b").value == {}
    assert len(clients.find(handles="a")) == 1


def test_lost_connection_fails_its_calls_and_forgets_the_client(client: Peer, harness: Harness) -> None:
    found = harness.state.clients.find()[0]
    task = begin(client)
    client.lose()
    failure(client, task, ConnectionClosed)
    assert harness.state.clients.find() == []
    failure(client, client.call(found), Unavailable)
    nothing_left(harness)


def test_method_of_a_lost_connection_is_cancelled(client: Peer, harness: Harness) -> None:
    client.send(client.request(5, "call"))
    client.lose()
    harness.turn()
    nothing_left(harness)
    assert harness.state.clients.ended == {"closed": 1}


def test_registration_after_the_end_of_the_connection_is_nothing(client: Peer, harness: Harness) -> None:
    session = client.opened.session
    client.lose()
    client.protocol.register(session, frozenset({"approve"}), 1)
    client.protocol.unregister(session.id)
    assert len(harness.state.clients) == 0


def test_draining_connection_waits_for_its_calls(client: Peer, harness: Harness) -> None:
    task = begin(client)
    client.protocol.go_away(GoAwayReason.DRAINING)
    harness.turn()
    assert not client.transport.is_closing()
    client.send(client.result(1, 1))
    harness.turn()
    assert task.result() == 1
    assert client.transport.is_closing()
    assert ended(harness) == {"draining": 1}


def test_draining_connection_waits_for_its_methods_too(client: Peer, harness: Harness) -> None:
    client.send(client.request(5, "call"))
    client.protocol.go_away(GoAwayReason.DRAINING)
    client.send(client.result(1, 1))
    harness.turn()
    assert client.answers()[-1].value == 1
    assert client.transport.is_closing()
