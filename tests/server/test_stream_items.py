"""Tests of methods that take the items of a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import Answer
from tests.server.protocol_harness import Harness, harness, nothing_left
from tests.server.test_streams import LIMITS, StreamPeer, items, kinds
from zcproto.app.context import Context
from zcproto.app.items import Items
from zcproto.errors import Code
from zcproto.wire.frame import CANCEL, END, ITEM, Kind
from zcproto.wire.message import decode_body, encode_body

__all__ = ["harness"]

WINDOW = replace(LIMITS, window_items=4, window_bytes=2_000)
ITEM_SIZE = 65
"""Bytes of an item that is a small number."""


class ItemPeer(StreamPeer):
    """A client that sends items."""

    def __init__(self, harness: Harness, **limits: Any) -> None:
        super().__init__(harness, replace(WINDOW, **limits))
        self.login()

    def _add_methods(self, harness: Harness) -> None:
        super()._add_methods(harness)
        app, self.taken = harness.app, list[Any]()

        @app.method("sum")
        async def sum_(numbers: Items[int], start: int = 0) -> int:
            total = start
            async for number in numbers:
                self.taken.append(number)
                total += number
            return total

        @app.method("echo.items")
        async def echo_items(context: Context, said: Items[Any]) -> AsyncIterator[Any]:
            async for value in said:
                yield value
            context.result = "done"

        @app.method("slowly")
        async def slowly(said: Items[Any]) -> None:
            """Take an item each time that a future is done."""
            while True:
                future = harness.loop.create_future()
                self.futures.append(future)
                await future
                try:
                    self.taken.append(await anext(said))
                except asyncio.CancelledError:
                    self.taken.append(await anext(said))

        @app.method("ignore")
        async def ignore(said: Items[Any]) -> str:
            await anext(said)
            return "enough"

        @app.method("pair")
        async def pair(said: Items[Any]) -> None:
            async def take() -> None:
                await anext(said)

            await asyncio.gather(take(), take())

        harness.state.add_methods(app)

    def items(self, *values: Any, stream: int = 1) -> list[bytes]:
        return [self.frame(ITEM, stream, encode_body(value)) for value in values]

    def end(self, stream: int = 1) -> bytes:
        return self.frame(END, stream)

    def next(self) -> None:
        """Let `slowly` take an item."""
        self.futures.pop().set_result(None)


@pytest.fixture
def client(harness: Harness) -> ItemPeer:
    return ItemPeer(harness)


def credits(answers: list[Answer]) -> list[list[int]]:
    return [decode_body(answer.body) for answer in answers if answer.kind is Kind.CREDIT]


def test_method_takes_items_and_returns_its_result(client: ItemPeer) -> None:
    client.send(client.open("sum", {"start": 10}))
    assert credits(client.turn()) == [[4, 2_000]]
    client.send(*client.items(1, 2, 3), client.end())
    answers = client.turn()
    assert answers[-1].value == 16
    assert client.taken == [1, 2, 3]
    nothing_held(client)


def nothing_held(client: ItemPeer) -> None:
    assert client.harness.state.item_bytes == 0


def test_end_at_once_gives_no_items(client: ItemPeer) -> None:
    client.send(client.open("sum"), client.end())
    (answer,) = client.turn()
    assert answer.value == 0


def test_credit_follows_what_the_method_takes(client: ItemPeer) -> None:
    client.send(client.open("slowly"))
    assert client.turn() == [], "nothing is granted before the method asks"
    client.next()
    assert credits(client.turn()) == [[4, 2_000]]
    client.send(*client.items(1, 2, 3, 4))
    assert client.turn() == []
    client.next()
    assert credits(client.turn()) == [[6, 2_000 + 2 * ITEM_SIZE]]
    client.send(client.frame(CANCEL, 1))
    client.turn()
    nothing_held(client)


def test_items_both_ways_wait_for_each_other(client: ItemPeer) -> None:
    client.send(client.open("echo.items", credit=(1, 10_000)))
    client.turn()
    client.send(*client.items("a", "b", "c"))
    assert items(client.turn()) == ["a"]
    client.send(client.credit(10), client.end())
    answers = client.turn()
    assert items(answers) == ["b", "c"]
    assert answers[-1].value == "done"


def test_client_that_has_ended_its_items_gets_all_of_the_server(client: ItemPeer) -> None:
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
    client: ItemPeer, body: bytes, number: int
) -> None:
    client.send(client.open("sum"))
    client.turn()
    client.send(*client.items(7), client.frame(ITEM, 1, body))
    answer = client.turn()[-1]
    assert (answer.code, answer.error.details["item"]) == (Code.INVALID_ARGUMENT, number)
    client.send(client.request(2, "big", {"n": 1, "size": 1}))
    assert kinds(client.turn()) == [Kind.RESPONSE], "the connection goes on"


def test_late_items_are_dropped_and_one_more_is_fatal(client: ItemPeer) -> None:
    client.send(client.open("ignore"))
    client.turn()
    client.send(*client.items(1))
    assert client.turn()[-1].value == "enough"
    client.send(*client.items(2, 3, 4))  # 4 were granted
    assert client.turn() == []
    client.send(*client.items(5))
    assert client.answers()[-1].code == Code.PROTOCOL_ERROR


def test_late_items_are_not_those_of_another_stream(client: ItemPeer) -> None:
    client.send(client.open("ignore"))
    client.turn()
    client.send(*client.items(1))
    client.turn()
    client.send(*client.items(2, 3), client.open("sum"))
    client.turn()
    client.send(*client.items(10), client.end())
    assert client.turn()[-1].value == 10


def test_request_of_a_method_that_takes_items_is_refused_with_its_shape(client: ItemPeer) -> None:
    for method, shape in (("sum", "client"), ("echo.items", "both")):
        client.send(client.request(1, method))
        (answer,) = client.answers()
        assert (answer.code, answer.error.details) == (Code.FAILED_PRECONDITION, {"shape": shape})


def test_caller_cannot_pass_the_items_as_a_param(client: ItemPeer) -> None:
    client.send(client.open("sum", {"numbers": [1, 2]}))
    (answer,) = client.answers()
    assert answer.code == Code.INVALID_ARGUMENT


def test_second_task_that_takes_items_fails(client: ItemPeer) -> None:
    client.send(client.open("pair"))
    assert client.turn()[-1].code == Code.INTERNAL


@pytest.mark.parametrize("how", ["cancelled", "lost"])
def test_method_that_ignores_the_cut_gets_no_more_items(client: ItemPeer, how: str) -> None:
    client.send(client.open("slowly"))
    client.turn()
    client.next()
    client.turn()
    if how == "lost":
        client.lose()
    else:
        client.send(client.frame(CANCEL, 1))
    client.turn()
    assert client.taken == []
    assert client.harness.state.tasks.running == 0


def test_streams_that_depend_on_one_another_do_not_deadlock(harness: Harness) -> None:
    client = ItemPeer(harness, window_items=1, window_bytes=1)
    client.send(client.open("slowly", stream=1), client.open("echo.items", stream=2, credit=(1, 1)))
    client.turn()
    client.next()
    client.turn()
    client.send(*client.items("x", stream=1))
    client.send(*client.items("y", stream=2))
    assert items(client.turn()) == ["y"]
    assert client.taken == ["x"]


def test_items_of_an_ended_connection_are_discarded(client: ItemPeer) -> None:
    client.send(client.open("slowly"))
    client.turn()
    client.next()
    client.turn()
    client.send(*client.items(1, 2, 3))
    assert client.harness.state.item_bytes > 0
    client.lose()
    nothing_held(client)
    nothing_left(client.harness)


def test_full_memory_shrinks_grants_and_refuses_new_streams(harness: Harness) -> None:
    client = ItemPeer(harness, memory_bytes=3 * ITEM_SIZE)
    client.send(client.open("slowly"))
    client.turn()
    client.next()
    client.turn()
    client.send(*client.items(1, 2, 3, 4))
    client.turn()
    client.send(client.open("sum", stream=2), client.open("count", {"n": 1}, stream=3))
    refused, *others = client.turn()
    assert (refused.code, refused.error.details) == (Code.RESOURCE_EXHAUSTED, {"retry_after_ms": 1_000})
    assert kinds(others) == [Kind.ITEM, Kind.RESPONSE]
    for _ in range(3):
        client.next()
        client.turn()
    client.send(client.open("sum", stream=2))
    assert credits(client.turn()) == [[4, 2_000]]
