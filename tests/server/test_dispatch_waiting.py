"""Test requests that run at the same time, are cancelled or exceed their deadline."""

from __future__ import annotations

import pytest

from tests.server.dispatch_app import WaitingMethods, client, gate, release, server
from tests.server.helpers import CANCEL, ERROR, NO_TOKEN, Client, ServerThread, eventually
from zcproto.errors import Code

__all__ = ["client", "gate", "server"]


def test_concurrent_requests_are_answered_in_any_order(
    client: Client, server: ServerThread, gate: WaitingMethods
) -> None:
    client.send(*(client.request("wait", {"name": name}) for name in "abc"))
    for name in "cab":
        release(server, gate, name, name.upper())
    first = client.stream - 2
    found = {stream - first: frame.value for stream, frame in client.answers(3).items()}
    assert found == {0: "A", 1: "B", 2: "C"}


def test_request_over_max_streams_is_refused(
    client: Client, server: ServerThread, gate: WaitingMethods
) -> None:
    client.send(*(client.request("wait", {"name": str(number)}) for number in range(8)))
    refused = client.refused("hello")
    assert refused.code == Code.RESOURCE_EXHAUSTED
    assert refused.details["retry_after_ms"] > 0
    release(server, gate, "0", "done")
    assert client.answer().value == "done"
    assert client.call("hello")
    for number in range(1, 8):
        release(server, gate, str(number), "done")
    assert len(client.answers(7)) == 7


def test_cancel_is_answered_once_at_once(client: Client, server: ServerThread, gate: WaitingMethods) -> None:
    before = server.stats["errors"].get("1", 0)
    client.send(client.request("wait", {"name": "a"}))
    eventually(lambda: "a" in gate.waiting)
    client.cancel(client.stream)
    answer = client.answer(client.stream)
    assert (answer.kind, answer.code, answer.message) == (ERROR, Code.CANCELLED, "cancelled by the caller")
    eventually(lambda: gate.ended == [("a", "cancelled")])
    assert gate.contexts["a"].cancelled
    client.call("hello")  # no second answer came before this one
    assert server.stats["errors"]["1"] - before == 1


def test_cancel_in_the_same_read_as_its_request(client: Client, gate: WaitingMethods) -> None:
    request = client.request("wait", {"name": "a"})
    client.send(request, client.frame(CANCEL, stream=client.stream))
    assert client.answer(client.stream).code == Code.CANCELLED
    eventually(lambda: gate.ended == [("a", "cancelled")])
    client.call("hello")


def test_cancel_with_another_token_is_ignored(
    client: Client, server: ServerThread, gate: WaitingMethods
) -> None:
    client.send(client.request("wait", {"name": "a"}))
    client.send(client.frame(CANCEL, stream=client.stream, token=NO_TOKEN))
    release(server, gate, "a", "undisturbed")
    assert client.answer(client.stream).value == "undisturbed"


def test_method_ignoring_cancellation_still_counts_as_running(
    client: Client, server: ServerThread, gate: WaitingMethods
) -> None:
    names = [str(number) for number in range(8)]
    client.send(*(client.request("wait.stubborn", {"name": name}) for name in names))
    first = client.stream - 7
    for stream in range(first, first + 8):
        client.cancel(stream)
    assert {frame.code for frame in client.answers(8).values()} == {Code.CANCELLED}
    assert client.refused("hello").code == Code.RESOURCE_EXHAUSTED
    for name in names:
        release(server, gate, name, "late")
    server.until(lambda: server.server.state.tasks.running == 0)
    assert client.call("hello")


def test_deadline_exceeded_cancels_the_method(client: Client, gate: WaitingMethods) -> None:
    client.send(client.request("wait", {"name": "a"}, {"deadline_ms": 30}))
    answer = client.answer(client.stream)
    assert (answer.code, answer.message) == (Code.DEADLINE_EXCEEDED, "the deadline has passed")
    eventually(lambda: gate.ended == [("a", "cancelled")])
    client.call("hello")


def test_context_has_time_left(client: Client, server: ServerThread, gate: WaitingMethods) -> None:
    client.send(client.request("wait", {"name": "a"}, {"deadline_ms": 60_000}))
    eventually(lambda: "a" in gate.waiting)
    left = server.in_loop(lambda: gate.contexts["a"].time_left)
    assert left is not None
    assert 50 < left <= 60
    assert not server.in_loop(lambda: gate.contexts["a"].cancelled)
    release(server, gate, "a", "in time")
    assert client.answer(client.stream).value == "in time"


@pytest.mark.parametrize("deadline_ms", [0, -1, -(2**63)])
def test_expired_deadline_does_not_run_the_method(
    client: Client, gate: WaitingMethods, deadline_ms: int
) -> None:
    refused = client.refused("wait", {"name": "a"}, meta={"deadline_ms": deadline_ms})
    assert refused.code == Code.DEADLINE_EXCEEDED
    assert gate.waiting == {}


def test_deadline_does_not_affect_immediate_answer(client: Client) -> None:
    assert client.call("async.ready", {"item": {"name": "a"}}, meta={"deadline_ms": 1}) == "a"


def test_disconnect_cancels_running_methods(server: ServerThread, gate: WaitingMethods) -> None:
    gate.ended.clear()
    client = server.client("ada")
    client.send(client.request("wait", {"name": "lost"}))
    eventually(lambda: "lost" in gate.waiting)
    client.reset()
    eventually(lambda: ("lost", "cancelled") in gate.ended)
    assert server.in_loop(lambda: gate.contexts["lost"].cancelled)
    server.until_left()


@pytest.mark.parametrize("size", [1, 10_000])
def test_result_after_disconnect_is_dropped(server: ServerThread, gate: WaitingMethods, size: int) -> None:
    client = server.client("ada")
    gate.waiting.clear()
    client.send(client.request("wait.stubborn", {"name": "late"}))
    eventually(lambda: "late" in gate.waiting)
    client.reset()
    server.until_left(handlers=1)
    release(server, gate, "late", "x" * size)
    server.until_left()
