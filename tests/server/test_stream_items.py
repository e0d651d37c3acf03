"""Tests of methods that take the items of a client."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers import Answer
from tests.server.protocol_harness import LIMITS, Harness, Peer, items, kinds, nothing_left
from zcproto.errors import Code
from zcproto.server.item_budget import ItemBudget
from zcproto.wire.frame import CANCEL, ITEM, Kind
from zcproto.wire.message import decode_body, encode_body

WINDOW = replace(LIMITS, window_items=4, window_bytes=2_000)
ITEM_SIZE = 65
"""Bytes of an item that is a small number."""


def next_item(harness: Harness) -> None:
    """Let `slowly` take an item."""
    harness.futures.pop().set_result(None)


@pytest.fixture
def client(harness: Harness) -> Peer:
    harness.allow_streams(WINDOW)
    return harness.connect("ada")


def credits(answers: list[Answer]) -> list[list[int]]:
    return [decode_body(answer.body) for answer in answers if answer.kind is Kind.CREDIT]


def test_method_takes_items_and_returns_its_result(client: Peer) -> None:
    client.send(client.open("sum", {"start": 10}))
    assert credits(client.turn()) == [[4, 2_000]]
    client.send(*client.items(1, 2, 3), client.end())
    answers = client.turn()
    assert answers[-1].value == 16
    assert client.harness.taken == [1, 2, 3]
    nothing_held(client)


def nothing_held(client: Peer) -> None:
    assert client.harness.state.items.held == 0


def test_end_at_once_gives_no_items(client: Peer) -> None:
    client.send(client.open("sum"), client.end())
    (answer,) = client.turn()
    assert answer.value == 0


def test_credit_follows_what_the_method_takes(client: Peer) -> None:
    client.send(client.open("slowly"))
    assert client.turn() == [], "nothing is granted before the method asks"
    next_item(client.harness)
    assert credits(client.turn()) == [[4, 2_000]]
    client.send(*client.items(1, 2, 3, 4))
    assert client.turn() == []
    next_item(client.harness)
    assert credits(client.turn()) == [[6, 2_000 + 2 * ITEM_SIZE]]
    client.send(client.frame(CANCEL, 1))
    client.turn()
    nothing_held(client)


def test_items_both_ways_wait_for_each_other(client: Peer) -> None:
    client.send(client.open("echo.items", credit=(1, 10_000)))
    client.turn()
    client.send(*client.items("a", "b", "c"))
    assert items(client.turn()) == ["a"]
    client.send(client.credit(10), client.end())
    answers = client.turn()
    assert items(answers) == ["b", "c"]
    assert answers[-1].value == "done"


def test_client_that_has_ended_its_items_gets_all_of_the_server(client: Peer) -> None:
    client.send(client.open("count", {"n": 1_000}), client.end())
    answers = client.answers()
    for _ in range(100):
        answers += client.turn()
    assert items(answers) == [*range(1_000)]
    assert answers[-1].kind is Kind.RESPONSE


@pytest.mark.parametrize(
    ("body", "number"),
    [(b"", 1), (b"\xc1", 1), (encode_body("x"), 1), (b"\x91" * 40 + b"\x01", 1), (b"\xc7\x01\x05\x00", 1)],
)
def test_item_that_does_not_suit_fails_the_stream_with_its_number(
    client: Peer, body: bytes, number: int
) -> None:
    client.send(client.open("sum"))
    client.turn()
    client.send(*client.items(7), client.frame(ITEM, 1, body))
    answer = client.turn()[-1]
    assert (answer.code, answer.error.details["item"]) == (Code.INVALID_ARGUMENT, number)
    client.send(client.request(2, "big", {"n": 1, "size": 1}))
    assert kinds(client.turn()) == [Kind.RESPONSE], "the connection goes on"


def test_late_items_are_dropped_and_one_more_is_fatal(client: Peer) -> None:
    client.send(client.open("ignore"))
    client.turn()
    client.send(*client.items(1))
    assert client.turn()[-1].value == "enough"
    client.send(*client.items(2, 3, 4))  # 4 were granted
    assert client.turn() == []
    client.send(*client.items(5))
    assert client.answers()[-1].code == Code.PROTOCOL_ERROR


def test_late_items_are_not_those_of_another_stream(client: Peer) -> None:
    client.send(client.open("ignore"))
    client.turn()
    client.send(*client.items(1))
    client.turn()
    client.send(*client.items(2, 3), client.open("sum"))
    client.turn()
    client.send(*client.items(10), client.end())
    assert client.turn()[-1].value == 10


def test_request_of_a_method_that_takes_items_is_refused_with_its_shape(client: Peer) -> None:
    for method, shape in (("sum", "client"), ("echo.items", "both")):
        client.send(client.request(1, method))
        (answer,) = client.answers()
        assert (answer.code, answer.error.details) == (Code.FAILED_PRECONDITION, {"shape": shape})


def test_caller_cannot_pass_the_items_as_a_param(client: Peer) -> None:
    client.send(client.open("sum", {"numbers": [1, 2]}))
    (answer,) = client.answers()
    assert answer.code == Code.INVALID_ARGUMENT


def test_second_task_that_takes_items_fails(client: Peer) -> None:
    client.send(client.open("pair"))
    assert client.turn()[-1].code == Code.INTERNAL


@pytest.mark.parametrize("how", ["cancelled", "lost"])
def test_method_that_ignores_the_cut_gets_no_more_items(client: Peer, how: str) -> None:
    client.send(client.open("slowly"))
    client.turn()
    next_item(client.harness)
    client.turn()
    if how == "lost":
        client.lose()
    else:
        client.send(client.frame(CANCEL, 1))
    client.turn()
    assert client.harness.taken == []
    assert client.harness.state.tasks.running == 0


def test_streams_that_depend_on_one_another_do_not_deadlock(harness: Harness) -> None:
    harness.allow_streams(replace(WINDOW, window_items=1, window_bytes=1))
    client = harness.connect("ada")
    client.send(client.open("slowly", stream=1), client.open("echo.items", stream=2, credit=(1, 1)))
    client.turn()
    next_item(client.harness)
    client.turn()
    client.send(*client.items("x", stream=1))
    client.send(*client.items("y", stream=2))
    assert items(client.turn()) == ["y"]
    assert client.harness.taken == ["x"]


def test_items_of_an_ended_connection_are_discarded(client: Peer) -> None:
    client.send(client.open("slowly"))
    client.turn()
    next_item(client.harness)
    client.turn()
    client.send(*client.items(1, 2, 3))
    assert client.harness.state.items.held > 0
    client.lose()
    nothing_held(client)
    nothing_left(client.harness)


MEMORY = 16_000
LARGE_ITEM = bytes(900)


def fill(harness: Harness, connections: int) -> list[Peer]:
    """Let one user be granted items on all streams before it sends any; then it sends all that it may.

    A last connection opens one more stream while these items wait.
    """
    peers = [harness.connect("ada") for _ in range(connections)]
    granted = list[tuple[Peer, Answer]]()
    for peer in peers:
        for number in range(1, LIMITS.max_open + 1):
            peer.send(peer.open("slowly", stream=number))
            peer.turn()
            next_item(harness)
            granted += [(peer, answer) for answer in peer.turn()]
    assert {answer.kind for _, answer in granted} == {Kind.CREDIT}
    assert harness.state.items.held == 0

    def send() -> None:  # before a method takes any
        for peer, answer in granted:
            items, size = decode_body(answer.body)
            allowed = min(items, -(-size // len(peer.items(LARGE_ITEM)[0])))
            frames = peer.items(*[LARGE_ITEM] * allowed, stream=answer.stream)
            peer.protocol.data_received(b"".join(frames))
            held.append(harness.state.items.held)
        last.protocol.data_received(last.open("sum"))

    last = harness.connect("ada")
    held = list[int]()
    harness.in_loop(send)
    assert MEMORY / 2 - 2_000 < max(held) <= MEMORY / 2
    return [*peers, last]


def test_items_granted_before_any_is_held_stay_within_the_share_of_their_user(harness: Harness) -> None:
    harness.allow_streams(replace(WINDOW, memory_bytes=MEMORY))
    *peers, last = fill(harness, connections=6)
    answers = [answer for peer in peers for answer in peer.turn()]
    cut = [answer.error for answer in answers if answer.kind is Kind.ERROR]
    assert {(error.code, error.details["reason"]) for error in cut} == {(Code.CANCELLED, "memory")}
    assert harness.state.counters.streams_cut == {"memory": len(cut)}
    (refused,) = last.turn()
    assert (refused.code, refused.error.details) == (Code.RESOURCE_EXHAUSTED, {"retry_after_ms": 1_000})
    for peer in peers:
        peer.lose()
    assert (harness.state.items.held, harness.state.items.promised, harness.state.items.shares) == (0, 0, {})


def test_user_that_fills_its_share_does_not_refuse_or_cut_another_one(harness: Harness) -> None:
    harness.allow_streams(replace(WINDOW, memory_bytes=MEMORY))
    fill(harness, connections=6)
    bob = harness.connect("bob")
    bob.send(bob.open("sum"))
    (credit,) = credits(bob.turn())
    total = 0
    for number in range(1, 50):
        bob.send(*bob.items(number))
        total += number
        bob.turn()
    bob.send(bob.end())
    assert bob.turn()[-1].value == total
    assert credit[0] >= 1


def test_windows_shrink_before_the_memory_is_promised(harness: Harness) -> None:
    harness.allow_streams(replace(WINDOW, memory_bytes=MEMORY))
    peers = [harness.connect("ada") for _ in range(6)]
    granted = list[int]()
    for peer in peers:
        for number in range(1, LIMITS.max_open + 1):
            peer.send(peer.open("sum", stream=number))
            granted += [size for _, size in credits(peer.turn())]
    assert granted == sorted(granted, reverse=True)
    assert granted[0] == WINDOW.window_bytes
    assert sum(granted) < MEMORY / 2
    assert min(granted) >= 1
    bob = harness.connect("bob")
    bob.send(bob.open("sum"))
    ((_, size),) = credits(bob.turn())
    assert size > 4 * granted[-1]


def test_memory_for_some_items_is_there_whatever_is_configured(harness: Harness) -> None:
    harness.allow_streams(replace(WINDOW, memory_bytes=1))
    client = harness.connect("ada")
    client.send(client.open("sum"))
    assert credits(client.turn()) == [[1, 500]]


BUDGET = 1_200
MOST = (10, 100)


def test_each_of_two_users_holds_at_most_a_third() -> None:
    budget = ItemBudget()
    ada, bob = budget.join("ada"), budget.join("bob")
    ada.count(600, 0)
    assert not ada.is_over(BUDGET)
    bob.count(300, 0)
    assert (ada.is_over(BUDGET), bob.is_over(BUDGET)) == (True, False)
    ada.count(-200, 0)
    bob.count(100, 0)
    assert (ada.is_over(BUDGET), bob.is_over(BUDGET)) == (False, False)
    bob.count(1, 0)
    assert bob.is_over(BUDGET)


def test_window_shrinks_with_what_was_promised_and_never_below_one_item() -> None:
    budget = ItemBudget()
    ada, bob = budget.join("ada"), budget.join("bob")
    assert ada.window(BUDGET, MOST, 0) == MOST
    ada.count(0, 500)
    assert ada.window(BUDGET, MOST, 100) == (5, 50)
    assert bob.window(BUDGET, MOST, 0) == (8, 87)
    ada.count(0, 500)
    assert ada.window(BUDGET, MOST, 0) == (1, 1)


def test_share_ends_with_its_last_stream() -> None:
    budget = ItemBudget()
    share = budget.join("ada")
    assert budget.join("ada") is share
    share.leave()
    assert [*budget.shares] == ["ada"]
    share.leave()
    assert budget.shares == {}
