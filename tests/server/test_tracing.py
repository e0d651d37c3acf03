"""The places at which a server's requests and calls are traced, with a tracing that records what it is asked."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.server.protocol_harness import Harness
from zcproto.app.app import Method
from zcproto.connection.events import Request
from zcproto.connection.server_calls import CallToClient
from zcproto.errors import Code
from zcproto.server.protocol import TracedProtocol
from zcproto.wire.message import RequestMeta

TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


within: contextvars.ContextVar[bool] = contextvars.ContextVar("within", default=False)
"""Set in the context of a read."""


class FakeTracing:
    """Records what happens; with `due` every request is followed."""

    def __init__(self, due: bool = False) -> None:
        self.due = due
        self.seen: list[Any] = []
        self.instead: Method | None = None
        self.read_context = contextvars.copy_context()
        self.read_context.run(within.set, True)

    def is_due(self, meta: RequestMeta) -> bool:
        return self.due

    def enter(self, request: Request, method: Method) -> tuple[Method, Any]:
        self.seen.append(method.name)
        return self.instead or method, method.name

    def leave(self, entered: Any) -> None:
        self.seen.append(f"left {entered}")

    async def call_client(
        self, call: CallToClient, peer: str, send: Callable[[CallToClient], Awaitable[Any]]
    ) -> Any:
        self.seen.append((call.method, peer, call.traceparent))
        return await send(call._replace(traceparent=TRACE))


def test_request_that_is_not_due_takes_its_usual_way_within_the_trace_of_the_read(harness: Harness) -> None:
    peer = harness.connect("ada", TracedProtocol)
    tracing = harness.state.tracing = FakeTracing()
    found: list[bool] = []
    harness.state.methods["big"].function = lambda n: found.append(within.get())
    peer.send(peer.request(1, "big", {"n": 1}), peer.request(2, "big", {"n": 2}))
    assert found == [True, True]
    assert not within.get()
    assert tracing.seen == []
    assert len(peer.answers()) == 2


def test_traced_connection_serves_before_traces_are_recorded(harness: Harness) -> None:
    peer = harness.connect("ada", TracedProtocol)
    peer.send(peer.request(1, "big", {"n": 1}))
    assert len(peer.answers()) == 1


def test_request_that_is_due_is_entered_and_left(harness: Harness) -> None:
    peer = harness.connect("ada")
    tracing = harness.state.tracing = FakeTracing(due=True)
    peer.send(peer.request(1, "big", {"n": 1}))
    assert tracing.seen == ["big", "left big"]
    assert harness.state.methods["big"].calls == 2  # the first by `login`


def test_method_that_the_tracing_returns_runs_instead(harness: Harness) -> None:
    peer = harness.connect("ada")
    tracing = harness.state.tracing = FakeTracing(due=True)
    tracing.instead = Method("big", lambda n: f"traced {n}")
    peer.send(peer.request(1, "big", {"n": 1}))
    (answer,) = peer.answers()
    assert answer.value == "traced 1"
    assert harness.ran == []


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_trace_is_left_whatever_a_method_raises(harness: Harness, error: type[BaseException]) -> None:
    peer = harness.connect("ada")
    tracing = harness.state.tracing = FakeTracing(due=True)

    def end() -> None:
        raise error

    tracing.instead = Method("big", end)
    with pytest.raises(error):
        peer.send(peer.request(1, "big", {}))
    assert tracing.seen == ["big", "left big"]


def test_refused_request_is_not_entered(harness: Harness) -> None:
    peer = harness.connect()
    tracing = harness.state.tracing = FakeTracing(due=True)
    peer.send(peer.request(1, "big", {"n": 1}))
    (answer,) = peer.answers()
    assert answer.error.code == Code.UNAUTHENTICATED
    assert tracing.seen == []


def test_call_to_a_client_is_sent_by_the_tracing(harness: Harness) -> None:
    harness.allow_calls()
    client = harness.connect("ada")
    client.handle("approve")
    tracing = harness.state.tracing = FakeTracing()
    task = client.call(*harness.state.clients.find())
    (call,) = client.answers()
    assert tracing.seen == [("approve", "192.0.2.7", None)]
    assert TRACE in repr(call)
    client.send(client.result(call.stream, "yes"))
    harness.turn()
    assert task.result() == "yes"
