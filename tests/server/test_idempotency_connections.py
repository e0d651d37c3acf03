"""Requests with an idempotency key over whole connections, with the time advanced by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.server.protocol_harness import Harness, Peer
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.errors import CallError, Code
from zcproto.wire.frame import CANCEL, NO_TOKEN, Kind


class OrderServer(Harness):
    """A server with methods that can be called with a key."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.counts: dict[str, int] = {}

    def _methods(self) -> App:
        app = super()._methods()

        def count(name: str) -> int:
            self.counts[name] = self.counts.get(name, 0) + 1
            return self.counts[name]

        @app.method("pay")
        def pay(amount: int = 1, size: int = 0) -> Any:
            return bytes(size) if size else ["paid", amount, count("pay")]

        @app.method("fail")
        def fail(code: int) -> None:
            count("fail")
            raise CallError.by_code[code](f"number {self.counts['fail']}")

        @app.method("break")
        def break_() -> object:
            count("break")
            return object()

        @app.method("hello", public=True)
        def hello(context: Context) -> str:
            return f"hello {count('hello')}"

        @app.method("anything")
        def anything(**params: Any) -> Any:
            params["n"] = count("anything")
            return params

        return app


@pytest.fixture
def orders(loop: asyncio.AbstractEventLoop) -> Iterator[OrderServer]:
    orders = OrderServer(loop)
    yield orders
    for future in orders.futures:
        if not future.done():
            future.set_result(None)
    assert loop.run_until_complete(orders.state.tasks.close(1.0)) == 0


def ask(peer: Peer, stream: int, method: str, params: dict[str, Any] | None = None, **meta: Any) -> Any:
    """Send a request and return its only answer."""
    peer.send(peer.request(stream, method, params, **{"idempotency_key": "k", **meta}))
    (answer,) = peer.answers()
    assert answer.stream == stream
    return answer


def test_stored_answer_is_sent_on_this_and_another_connection(orders: OrderServer) -> None:
    peer, again = orders.connect("ada"), orders.connect("ada")
    assert ask(peer, 1, "pay", {"amount": 5}).value == ["paid", 5, 1]
    assert ask(peer, 2, "pay", {"amount": 5}, deadline_ms=5_000).value == ["paid", 5, 1]
    assert ask(again, 1, "pay", {"amount": 5}).value == ["paid", 5, 1]
    assert ask(again, 2, "pay", {"amount": 6}).error.code == Code.FAILED_PRECONDITION
    assert ask(orders.connect("bob"), 1, "pay", {"amount": 6}).value == ["paid", 6, 2]
    assert ask(again, 3, "pay", {"amount": 5}, idempotency_key="another").value == ["paid", 5, 3]


def test_requests_without_a_key_are_each_run(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    for stream in (1, 2):
        peer.send(peer.request(stream, "pay", deadline_ms=1_000))
        (answer,) = peer.answers()
        assert answer.value == ["paid", 1, stream]


def test_method_may_change_its_params(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    first = ask(peer, 1, "anything", {"a": [1]}).value
    assert ask(peer, 2, "anything", {"a": [1]}).value == first == {"a": [1], "n": 1}


def test_invalid_params_do_not_use_the_key(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    assert ask(peer, 1, "pay", {"amount": "five"}).error.code == Code.INVALID_ARGUMENT
    assert ask(peer, 2, "pay", {"amount": 5}).value == ["paid", 5, 1]


def test_key_without_a_session_is_refused(orders: OrderServer) -> None:
    peer = orders.connect()
    answer = ask(peer, 1, "hello")
    assert answer.error.code == Code.INVALID_ARGUMENT
    assert "session" in answer.error.message
    assert ask(peer, 2, "pay").error.code == Code.UNAUTHENTICATED
    assert ask(orders.connect("ada"), 1, "hello").value == "hello 1"
    assert ask(orders.connect("ada"), 1, "hello").value == "hello 1"


def test_stored_errors_are_sent_with_their_incident(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    assert ask(peer, 1, "fail", {"code": 5}).error.message == "number 1"
    assert ask(peer, 2, "fail", {"code": 5}).error.message == "number 1"
    first = ask(peer, 3, "break", idempotency_key="b").error
    assert first.code == Code.INTERNAL
    assert ask(peer, 4, "break", idempotency_key="b").error == first
    assert orders.counts == {"fail": 1, "break": 1}
    for stream in (5, 6):
        assert (
            ask(peer, stream, "fail", {"code": 14}, idempotency_key="u").error.details["retry_after_ms"] > 0
        )
    assert orders.counts["fail"] == 3


def test_large_answer_is_stored_and_too_large_answer_is_an_error(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    assert len(ask(peer, 1, "pay", {"size": 9_000}).value) == 9_000
    assert len(ask(peer, 2, "pay", {"size": 9_000}).value) == 9_000
    too_large = {"size": orders.state.settings.max_frame}
    first = ask(peer, 3, "pay", too_large, idempotency_key="large").error
    assert first.code == Code.INTERNAL
    assert ask(peer, 4, "pay", too_large, idempotency_key="large").error == first
    largest = orders.state.settings.max_body - 5
    assert len(ask(peer, 5, "pay", {"size": largest}, idempotency_key="largest").value) == largest


def test_waiting_request_is_run_once_for_all_connections(orders: OrderServer) -> None:
    peers = [orders.connect("ada") for _ in range(3)]
    for peer in peers:
        peer.send(peer.request(1, "wait", idempotency_key="k"), peer.request(2, "wait", idempotency_key="k"))
    (future,) = orders.futures
    future.set_result("done")
    orders.turn()
    for peer in peers:
        assert sorted((answer.stream, answer.value) for answer in peer.answers()) == [
            (1, "done"),
            (2, "done"),
        ]
        assert ask(peer, 1, "pay", idempotency_key="other").value[0] == "paid"  # the stream is free again


def test_closed_connection_does_not_end_the_run(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.lose()
    orders.turn()
    (future,), (context,) = orders.futures, orders.contexts
    assert not future.cancelled()
    again = orders.connect("ada")
    again.send(again.request(1, "wait", idempotency_key="k"))
    future.set_result("done")
    orders.turn()
    (answer,) = again.answers()
    assert answer.value == "done"
    assert ask(orders.connect("ada"), 1, "wait").value == "done"
    assert len(orders.futures) == 1
    assert not context.send_event("unknown", 1)


def test_closed_connections_leave_no_waiting_callers(orders: OrderServer) -> None:
    for _ in range(5):
        peer = orders.connect("ada")
        peer.send(*(peer.request(stream, "wait", idempotency_key="k") for stream in (1, 2)))
        peer.send(peer.frame(CANCEL, 2))
        peer.lose()
    (run,) = orders.state.idempotency._running.values()
    assert run.waiting == {}


def test_cancel_is_answered_at_once_and_the_run_continues(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.send(peer.frame(CANCEL, 1))
    (answer,) = peer.answers()
    assert answer.error.code == Code.CANCELLED
    orders.turn()
    (future,), (context,) = orders.futures, orders.contexts
    assert not future.cancelled()
    assert not context.cancelled
    future.set_result("done")
    orders.turn()
    assert peer.answers() == []
    assert ask(peer, 1, "wait").value == "done"


def test_cancelled_request_counts_as_in_flight_until_it_ends(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    for stream in range(1, 17):
        peer.send(peer.request(stream, "wait", idempotency_key=f"k{stream}"))
        peer.send(peer.frame(CANCEL, stream))
    peer.answers()
    assert ask(peer, 50, "pay").error.code == Code.RESOURCE_EXHAUSTED
    for future in orders.futures:
        future.set_result(None)
    orders.turn()
    assert ask(peer, 50, "pay").value == ["paid", 1, 1]


def test_deadline_ends_only_the_wait_of_its_caller(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    peer.send(peer.request(1, "wait", idempotency_key="k", deadline_ms=1_000))
    peer.send(peer.request(2, "wait", idempotency_key="k", deadline_ms=5_000))
    (context,) = orders.contexts
    assert context.time_left is None
    orders.advance(1.5)
    (answer,) = peer.answers()
    assert (answer.stream, answer.error.code) == (1, Code.DEADLINE_EXCEEDED)
    orders.futures[0].set_result("done")
    orders.turn()
    (answer,) = peer.answers()
    assert (answer.stream, answer.value) == (2, "done")


def test_method_that_closes_its_connection_continues(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    peer.send(peer.request(1, "close.and.wait", idempotency_key="k"))
    assert peer.transport.is_closing()
    orders.futures[0].set_result(None)
    orders.turn()
    assert ask(orders.connect("ada"), 1, "close.and.wait").value is None
    assert len(orders.futures) == 1
    peer = orders.connect("ada")
    peer.send(peer.request(1, "close.and.answer", idempotency_key="c"))
    assert peer.transport.is_closing()
    assert ask(orders.connect("ada"), 1, "close.and.answer", idempotency_key="c").value == b""


def test_drain_waits_for_runs_without_a_connection(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.lose()
    orders.state.draining = True
    drained = orders.loop.create_task(orders.state.wait_drained())
    orders.turn()
    assert not drained.done()
    orders.futures[0].set_result(None)
    orders.turn()
    assert drained.done()


def test_drain_does_not_wait_long_for_runs_without_a_connection(
    orders: OrderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.server.state.ABANDONED_S", 0)
    peer = orders.connect("ada")
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.lose()
    orders.state.draining = True
    orders.loop.run_until_complete(asyncio.wait_for(orders.state.wait_drained(), TIMEOUT))
    assert orders.state.idempotency.running == 1
    assert orders.loop.run_until_complete(orders.state.tasks.close(1.0)) == 0
    orders.state.draining = False
    assert ask(orders.connect("ada"), 1, "wait").error.code == Code.CANCELLED


def test_shutdown_sends_away_callers_that_wait_for_the_run_of_another(orders: OrderServer) -> None:
    first, other = orders.connect("ada"), orders.connect("ada")
    first.send(first.request(1, "wait", idempotency_key="k"))
    other.send(other.request(1, "wait", idempotency_key="k"), other.request(2, "wait"))
    for peer in (first, other):
        peer.protocol.cancel_all()
    (answer,) = first.answers()
    assert answer.error.code == Code.CANCELLED, "its method has run in part"
    waiting, without_key = other.answers()
    assert (waiting.stream, waiting.error.code) == (1, Code.UNAVAILABLE)
    assert waiting.error.details == {"retry_after_ms": 1_000}
    assert without_key.error.code == Code.CANCELLED


def test_shutdown_answers_waiting_callers_and_stores_the_answer(orders: OrderServer) -> None:
    peer = orders.connect("ada")
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.send(peer.request(2, "wait", idempotency_key="k"))
    peer.send(peer.frame(CANCEL, 2))
    peer.answers()
    peer.protocol.cancel_all()
    peer.protocol.close("drain_timeout")
    (answer,) = peer.answers()
    assert (answer.stream, answer.error.code) == (1, Code.CANCELLED)
    assert orders.loop.run_until_complete(orders.state.tasks.close(1.0)) == 0
    assert ask(orders.connect("ada"), 1, "wait").error.code == Code.CANCELLED
    assert len(orders.futures) == 1


def test_answers_of_protocol_methods_are_not_stored(orders: OrderServer) -> None:
    """Their answers may contain tokens, which must not be stored."""
    peer = orders.connect("ada")
    peer.token = NO_TOKEN
    answer = ask(peer, 1, "session.open", {"scheme": "none"})
    assert answer.kind is Kind.ERROR
    assert orders.state.idempotency.bytes_kept == 0
