"""Pending calls: each state of an offer with each input, whose answer counts, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.server.protocol_harness import ABANDON_AFTER, Harness, Peer, items, nothing_left
from zcproto.app.context import Context
from zcproto.connection.events import GoAwayReason
from zcproto.connection.server_calls import CallToClient
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from zcproto.server import pending
from zcproto.server.clients import CallLimits
from zcproto.sessions import EndReason
from zcproto.wire.frame import CALL, CANCEL, FAILURE, WITHDRAW
from zcproto.wire.message import decode_call, encode_error

TIMEOUT = 60.0


@pytest.fixture
def harness(harness: Harness) -> Iterator[Harness]:
    harness.allow_calls()

    async def approve(context: Context) -> Any:
        return await context.client.call("approve", pending=True, timeout=TIMEOUT)

    async def ask_user(context: Context, user: str) -> Any:
        return await context.ask(user, "approve", {"tool": "x"}, timeout=TIMEOUT)

    harness.add_method(approve, "approve")
    harness.add_method(ask_user, "ask")
    yield harness
    for task in asyncio.all_tasks(harness.loop):
        task.cancel()
    harness.turn()


@pytest.fixture
def first(harness: Harness) -> Peer:
    return connect(harness)


@pytest.fixture
def second(harness: Harness) -> Peer:
    return connect(harness)


def connect(harness: Harness, user: str = "ada", *methods: str, key: str = "") -> Peer:
    """Connect a client that handles `approve`, or these methods, with a session that may be bound to a key."""
    peer = harness.connect()
    if key:
        harness.in_loop(lambda: peer.protocol.prove(key))
    wall = harness.clock.wall()
    peer.use(harness.registry.open(user, client="", address="", wall=wall, key=key))
    peer.handle(*methods or ("approve",))
    return peer


def ask(harness: Harness, user: str = "ada", timeout: float = TIMEOUT, **options: Any) -> asyncio.Task[Any]:
    state = harness.state
    call = CallToClient("approve", {"tool": "x"}, timeout)
    task = harness.loop.create_task(state.ask(user, call, **options))
    harness.turn()
    return task


def calls(peer: Peer) -> list[str | None]:
    """Return the ids of the pending calls that were offered to a client, and remember the last one's number."""
    found = [answer for answer in peer.turn() if answer.raw[1] == CALL]
    if found:
        offered[peer] = found[-1].stream, found[-1].token
    return [decode_call(answer.body)[3] for answer in found]


offered: dict[Peer, tuple[int, bytes]] = {}
"""Number and token of the last CALL to each client."""


@pytest.fixture(autouse=True)
def forget_offers() -> Iterator[None]:
    yield
    offered.clear()


def answer(peer: Peer, value: Any = True, code: Code | None = None) -> None:
    """Answer the last CALL with its token, as `code` if that is given."""
    number, token = offered[peer]
    kept, peer.token = peer.token, token
    if code is None:
        peer.send(peer.result(number, value))
    else:
        peer.send(peer.frame(FAILURE, number, encode_error(code, "no")))
    peer.token = kept
    peer.harness.turn()


def outcome(task: asyncio.Task[Any]) -> Any:
    """Return the result of a call, the type of its error, or None while it waits."""
    if not task.done():
        return None
    error = task.exception()
    return task.result() if error is None else type(error)


# --- states and inputs ---------------------------------------------------------------------------------

NO_ANSWERS = sorted(pending.NO_ANSWERS - {Code.UNIMPLEMENTED})


def offer(harness: Harness, peer: Peer) -> asyncio.Task[Any]:
    task = ask(harness)
    assert len(calls(peer)) == 1
    return task


def delay(harness: Harness, peer: Peer) -> asyncio.Task[Any]:
    task = offer(harness, peer)
    answer(peer, code=Code.RESOURCE_EXHAUSTED)
    return task


def decline(harness: Harness, peer: Peer) -> asyncio.Task[Any]:
    task = offer(harness, peer)
    answer(peer, code=Code.UNIMPLEMENTED)
    return task


def register(peer: Peer, *methods: str) -> None:
    peer.send(peer.request(90, "session.handle", {"methods": [*methods], "max": 8}))


def expire(peer: Peer) -> None:
    peer.end_session(Code.TOKEN_EXPIRED, EndReason.EXPIRED)


def revoke(peer: Peer) -> None:
    session_id = peer.opened.session.id
    peer.harness.in_loop(
        lambda: peer.harness.registry.revoke(session_id, user=None, reason=EndReason.BY_OPERATOR)
    )


def resume(peer: Peer) -> None:
    """Let the session expire, and show it again."""
    expire(peer)
    peer.send(peer.request(5, "big", {"n": 0, "size": 0}))


INPUTS: dict[str, Callable[[Peer], object]] = {
    "second": lambda peer: peer.harness.advance(1.0),
    "registered": lambda peer: register(peer, "approve"),
    "registered another": lambda peer: register(peer, "other"),
    "unregistered": register,
    "expired": expire,
    "resumed": resume,
    "revoked": revoke,
    "lost": lambda peer: peer.lose(),
    "deadline": lambda peer: peer.harness.advance(TIMEOUT + 1),
}

TABLE: dict[str, tuple[Callable[[Harness, Peer], asyncio.Task[Any]], dict[str, list[int]]]] = {
    "offered": (
        offer,
        {
            "second": [],
            "registered": [],
            "registered another": [],
            "unregistered": [WITHDRAW],
            "expired": [WITHDRAW],
            "resumed": [WITHDRAW, CALL],
            "revoked": [WITHDRAW],
            "lost": [],
            "deadline": [WITHDRAW],
        },
    ),
    "delayed": (
        delay,
        {
            "second": [CALL],
            "registered": [],
            "registered another": [],
            "unregistered": [],
            "expired": [],
            "resumed": [CALL],
            "revoked": [],
            "lost": [],
            "deadline": [CALL, WITHDRAW],
        },
    ),
    "declined": (
        decline,
        {
            "second": [],
            "registered": [CALL],
            "registered another": [],
            "unregistered": [],
            "expired": [],
            "resumed": [CALL],
            "revoked": [],
            "lost": [],
            "deadline": [],
        },
    ),
}


@pytest.mark.parametrize(
    ("state", "given"), [(state, given) for state, (_, inputs) in TABLE.items() for given in inputs]
)
def test_input_in_a_state_of_an_offer(harness: Harness, first: Peer, state: str, given: str) -> None:
    arrange, expected = TABLE[state]
    task = arrange(harness, first)
    first.answers()
    INPUTS[given](first)
    sent = [head for head in (each.raw[1] for each in first.turn()) if head in (CALL, WITHDRAW)]
    assert sent == expected[given]
    assert outcome(task) == (DeadlineExceeded if given == "deadline" else None)
    task.cancel()
    harness.turn()
    assert len(harness.state.pending) == 0


@pytest.mark.parametrize("code", NO_ANSWERS)
def test_failure_that_leaves_the_call_open_is_offered_again_after_1_to_30_s(
    harness: Harness, first: Peer, code: Code
) -> None:
    task = ask(harness, timeout=600.0)
    waits = []
    for _ in range(8):
        assert len(calls(first)) == 1
        answer(first, code=code)
        began = harness.clock.now()
        while not harness.state.pending.of("ada")[0].as_dict()["offered"]:
            harness.advance(1.0)
        waits.append(harness.clock.now() - began)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert outcome(task) is None


@pytest.mark.parametrize("code", sorted(set(Code) - pending.NO_ANSWERS - set(range(64, 67))))
def test_failure_of_a_handler_is_the_answer(harness: Harness, first: Peer, second: Peer, code: Code) -> None:
    task = ask(harness)
    assert calls(first) == calls(second)
    answer(first, code=code)
    error = task.exception()
    assert isinstance(error, CallError)
    assert second.heads() == [WITHDRAW]
    assert harness.state.pending.ended == {"failed": 1}


# --- whose answer counts -------------------------------------------------------------------------------


def test_call_is_offered_to_all_clients_and_those_that_come_and_answered_once(
    harness: Harness, first: Peer, second: Peer
) -> None:
    other = connect(harness, "ada", "other")
    of_bob = connect(harness, "bob")
    task = ask(harness)
    third = connect(harness)
    ids = [calls(peer) for peer in (first, second, third)]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 1
    answer(second, "yes")
    assert outcome(task) == "yes"
    assert [peer.heads() for peer in (first, third, other, of_bob)] == [[WITHDRAW], [WITHDRAW], [], []]
    answer(first, "after withdrawal")
    assert first.protocol._connection is not None  # an answer after the withdrawal ends nothing
    assert calls(connect(harness)) == []
    assert harness.state.pending.ended == {"answered": 1}


def test_answer_after_the_deadline_does_not_count(harness: Harness, first: Peer) -> None:
    task = ask(harness)
    (call_id,) = calls(first)
    assert call_id is not None
    harness.clock.advance(TIMEOUT)  # and the timer is late
    with pytest.raises(NotFound):
        harness.state.pending.answer(call_id, True, None, "root")
    answer(first)
    assert outcome(task) is DeadlineExceeded


def test_first_of_two_answers_in_one_turn_wins(harness: Harness, first: Peer, second: Peer) -> None:
    task = ask(harness)
    calls(first), calls(second)
    frames = [(peer, peer.result(offered[peer][0], value)) for peer, value in ((second, 2), (first, 1))]

    def both() -> None:
        for peer, frame in frames:
            peer.protocol.data_received(frame)

    harness.in_loop(both)
    harness.turn()
    assert outcome(task) == 2
    assert harness.state.pending.ended == {"answered": 1}


def test_answer_of_a_session_revoked_in_the_same_turn_does_not_count(harness: Harness, first: Peer) -> None:
    task = ask(harness)
    calls(first)
    session_id, frame = first.opened.session.id, first.result(offered[first][0], True)

    def step() -> None:
        harness.registry.revoke(session_id, user=None, reason=EndReason.BY_OPERATOR)
        first.protocol.data_received(frame)

    harness.in_loop(step)
    harness.turn()
    assert outcome(task) is None


def test_old_token_gives_no_answer_and_gets_no_call(harness: Harness, first: Peer) -> None:
    """The thief has a connection with a token that the user has rotated elsewhere."""
    thief = harness.connect()
    thief.use(first.opened)
    thief.handle("approve")
    task = ask(harness)
    assert calls(thief)  # the newest connection of the session, which shares it
    opened = first.opened
    assert opened.refresh_token is not None
    refreshed = harness.in_loop(
        lambda: harness.registry.refresh(
            opened.refresh_token, client="", address="", wall=harness.clock.wall()
        )
    )
    assert WITHDRAW in [each.raw[1] for each in thief.turn()]
    answer(thief, "stolen")
    assert outcome(task) is None
    first.use(refreshed)
    assert calls(first)
    assert calls(thief) == []
    answer(first, "mine")
    assert outcome(task) == "mine"


def test_call_that_was_offered_before_a_refresh_is_answered_with_its_token(
    harness: Harness, first: Peer
) -> None:
    task = ask(harness)
    calls(first)
    token = first.opened.refresh_token
    assert token is not None
    with harness.state.refreshing(first.protocol, first.opened.session.raw_id):
        refreshed = harness.registry.refresh(token, client="", address="", wall=harness.clock.wall())
        first.protocol.join(refreshed.session, refreshed.token)
    answer(first, "yes")
    assert outcome(task) == "yes"


@pytest.mark.parametrize(
    ("asker", "bound", "wants"),
    [("", False, "both"), ("", True, "bound"), ("device:a", False, "bound")],
    ids=["unbound", "asked for", "caller"],
)
def test_answer_comes_from_a_session_that_is_as_bound_as_the_callers(
    harness: Harness, asker: str, bound: bool, wants: str
) -> None:
    unbound, device = connect(harness), connect(harness, key="device:phone")
    wall = harness.clock.wall()
    caller = harness.registry.open("ada", client="", address="", wall=wall, key=asker).session
    task = ask(harness, caller=caller, bound=bound)
    assert [bool(calls(unbound)), bool(calls(device))] == [wants == "both", True]
    assert unbound.handle("approve").value == {}
    assert calls(unbound) == []
    answer(device)
    assert outcome(task) is True


def test_bound_caller_may_ask_another_user_who_has_no_device(harness: Harness) -> None:
    manager = connect(harness, "bob")
    wall = harness.clock.wall()
    caller = harness.registry.open("ada", client="", address="", wall=wall, key="device:a").session
    task = ask(harness, "bob", caller=caller)
    assert calls(manager)
    answer(manager)
    assert outcome(task) is True


def test_call_ends_with_the_session_for_which_it_was_asked(harness: Harness, first: Peer) -> None:
    thief = connect(harness, "ada", "other")
    task = ask(harness, caller=thief.opened.session)
    kept = ask(harness, caller=first.opened.session)
    calls(first)
    revoke(thief)
    harness.turn()
    assert outcome(task) is Cancelled
    assert first.heads() == [WITHDRAW]
    assert outcome(kept) is None


def test_calls_end_with_the_server(harness: Harness, first: Peer) -> None:
    task = ask(harness)
    harness.in_loop(harness.state.close)
    harness.turn()
    assert outcome(task) is Cancelled
    assert len(harness.state.pending) == 0


# --- several connections, and those that end ------------------------------------------------------------


def test_client_with_several_connections_gets_one_offer_which_moves(harness: Harness, first: Peer) -> None:
    further = harness.connect()
    further.use(first.opened)
    further.handle("approve")
    task = ask(harness)
    assert (bool(calls(first)), bool(calls(further))) == (False, True)
    further.lose()
    assert calls(first)
    answer(first)
    assert outcome(task) is True


def test_draining_connection_does_not_wait_and_the_next_one_gets_the_call(
    harness: Harness, first: Peer
) -> None:
    task = ask(harness)
    ids = calls(first)
    first.protocol.go_away(GoAwayReason.DRAINING)
    harness.turn()
    assert first.transport.is_closing()
    following = harness.connect()
    following.use(first.opened)
    following.handle("approve")
    assert calls(following) == ids
    answer(following)
    assert outcome(task) is True


def test_offer_moves_from_a_draining_connection_that_is_still_busy(harness: Harness, first: Peer) -> None:
    ask(harness)
    calls(first)
    first.send(first.request(6, "wait"))
    first.protocol.go_away(GoAwayReason.DRAINING)
    following = harness.connect()
    following.use(first.opened)
    following.handle("approve")
    assert calls(following)
    assert WITHDRAW in first.heads()


def test_call_does_not_keep_an_idle_connection_open(harness: Harness, first: Peer) -> None:
    ask(harness, timeout=3600.0)
    calls(first)
    harness.advance(700.0)
    assert first.transport.is_closing()


def test_client_without_room_is_offered_the_call_later(harness: Harness) -> None:
    peer = harness.connect("ada")
    peer.handle("approve", most=1)
    one, two = ask(harness), ask(harness)
    assert len(calls(peer)) == 1
    answer(peer, 1)
    assert outcome(one) == 1
    harness.advance(1.0)
    assert len(calls(peer)) == 1
    answer(peer, 2)
    assert outcome(two) == 2


# --- limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [CallLimits(pending_per_user=2), CallLimits(pending_total=2)])
def test_calls_that_wait_are_limited(harness: Harness, most: CallLimits) -> None:
    harness.state.clients.limits = most
    tasks = [ask(harness) for _ in range(3)]
    assert [outcome(task) for task in tasks] == [None, None, ResourceExhausted]
    tasks[0].cancel()
    harness.turn()
    assert outcome(ask(harness)) is None
    assert harness.state.pending.ended == {"refused": 1, "withdrawn": 1}
    assert harness.state.pending.most == 2


@pytest.mark.parametrize("bound", ["BYTES_PER_USER", "BYTES_IN_ALL"])
def test_bytes_that_wait_are_limited(harness: Harness, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(pending, bound, 50)
    tasks = [ask(harness) for _ in range(4)]
    assert [outcome(task) for task in tasks] == [None, None, ResourceExhausted, ResourceExhausted]


@pytest.mark.parametrize(
    ("params", "timeout", "error"),
    [
        ({"x": object()}, 1.0, InvalidArgument),
        ({"x": bytes(2**21)}, 1.0, InvalidArgument),
        ({}, 0.0, DeadlineExceeded),
        ({}, float("inf"), ValueError),
        ({}, float("nan"), ValueError),
    ],
    ids=["type", "size", "over", "infinite", "nan"],
)
def test_call_that_cannot_be_made_leaves_nothing(
    harness: Harness, params: dict[str, Any], timeout: float, error: type[Exception]
) -> None:
    made = harness.state.ask("ada", CallToClient("approve", params, timeout))
    with pytest.raises(error):
        harness.loop.run_until_complete(made)
    assert len(harness.state.pending) == 0
    nothing_left(harness)


def test_ten_thousand_calls_end_without_a_trace(harness: Harness) -> None:
    users = [f"user{number}" for number in range(100)]
    state = harness.state

    async def ask_all() -> list[asyncio.Task[Any]]:
        tasks = [
            asyncio.create_task(state.ask(user, CallToClient("approve", {}, TIMEOUT)))
            for user in users
            for _ in range(100)
        ]
        await asyncio.sleep(0)
        return tasks

    tasks = harness.loop.run_until_complete(ask_all())
    assert len(state.pending) == 10_000
    peer = connect(harness, "user7")
    assert len(calls(peer)) == 8  # as many as it takes at once
    harness.advance(TIMEOUT + 1)
    harness.turn()
    assert {outcome(task) for task in tasks} == {DeadlineExceeded}
    assert (len(state.pending), state.pending.most) == (0, 0)
    peer.lose()
    nothing_left(harness)


# --- operators, methods --------------------------------------------------------------------------------


def test_operator_answers_and_refuses_a_call_once(harness: Harness, first: Peer) -> None:
    one, two = ask(harness), ask(harness)
    ids = calls(first)
    pending_calls = harness.state.pending
    assert [call.id for call in pending_calls.of(None)] == ids
    assert [call.params() for call in pending_calls.of("ada")] == [{"tool": "x"}] * 2
    assert pending_calls.of("bob") == []
    assert ids[0] is not None
    assert ids[1] is not None
    pending_calls.answer(ids[0], "yes", None, "root")
    pending_calls.answer(ids[1], None, PermissionDenied("no"), "root")
    harness.turn()
    assert (outcome(one), outcome(two)) == ("yes", PermissionDenied)
    assert first.heads() == [WITHDRAW, WITHDRAW]
    with pytest.raises(NotFound):
        pending_calls.answer(ids[0], "again", None, "root")


def test_method_with_an_idempotency_key_asks_and_survives_its_connection(
    harness: Harness, first: Peer
) -> None:
    caller = connect(harness, "ada", "other")
    caller.send(caller.request(5, "approve", idempotency_key="k"))
    harness.turn()
    assert calls(first)
    caller.lose()
    harness.turn()
    answer(first, "yes")
    again = harness.connect()
    again.use(caller.opened)
    again.send(again.request(7, "approve", idempotency_key="k"))
    (repeated,) = again.turn()
    assert repeated.value == "yes"


def open_run(harness: Harness, timeout: float = TIMEOUT) -> Peer:
    """Open a durable stream whose method asks. Return its client, which answers no calls."""

    async def work(context: Context) -> AsyncIterator[Any]:
        yield "asks"
        yield await context.client.call("approve", pending=True, timeout=timeout)

    harness.add_method(work, "work", durable=True)
    harness.allow_durable()
    caller = connect(harness, "ada", "other")
    caller.send(caller.open("work", {}, resume={"id": "run", "from": 0}))
    assert items(caller.settle()) == ["asks"]
    return caller


def test_durable_run_asks_and_outlives_its_connection(harness: Harness, first: Peer) -> None:
    caller = open_run(harness, 3 * ABANDON_AFTER)
    assert calls(first)
    caller.lose()
    harness.turn()
    harness.advance(2 * ABANDON_AFTER)  # the time of a pending call is not that of an abandoned run
    harness.turn()
    second = connect(harness)
    assert calls(second)
    answer(second, "yes")
    again = harness.connect()
    again.use(caller.opened)
    again.send(again.open("work", None, resume={"id": "run", "from": 1}))
    assert items(again.settle()) == ["yes"]


def test_run_that_asks_is_abandoned_once_the_session_of_its_opener_has_expired(
    harness: Harness, first: Peer
) -> None:
    caller = open_run(harness, 10**7)
    assert harness.state.runs is not None
    caller.lose()
    harness.turn()
    wall, settings = harness.clock.wall(), harness.registry.settings
    harness.clock.advance(settings.refresh_lifetime_ms / 1000 + 1)
    harness.registry.open("bob", client="", address="", wall=wall)
    for _ in range(3):
        harness.advance(ABANDON_AFTER)
        harness.turn()
    assert harness.state.runs.ended == {"cancelled": 1}
    assert len(harness.state.pending) == 0


def test_pending_call_of_a_run_ends_with_the_run(harness: Harness, first: Peer) -> None:
    caller = open_run(harness)
    assert calls(first)
    caller.send(caller.frame(CANCEL, 1))
    caller.settle()
    assert first.heads() == [WITHDRAW]
    assert len(harness.state.pending) == 0


def test_method_without_a_key_cannot_wait(harness: Harness, first: Peer) -> None:
    first.send(first.request(5, "approve"))
    (refused,) = first.turn()
    assert refused.error.code == Code.FAILED_PRECONDITION
    assert "idempotency key" in refused.error.message


def test_method_asks_another_user_and_ends_with_its_caller(harness: Harness, first: Peer) -> None:
    manager = connect(harness, "bob")
    first.send(first.request(5, "ask", {"user": "bob"}))
    assert calls(manager)
    answer(manager, code=Code.PERMISSION_DENIED)
    (refused,) = first.turn()
    assert refused.error.code == Code.ABORTED
    first.send(first.request(6, "ask", {"user": "bob"}))
    assert calls(manager)
    first.lose()
    harness.turn()
    assert manager.heads() == [WITHDRAW]
