"""Tests of dispatch over real TLS: each request gets exactly one answer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable

import pytest

from tests.server.dispatch_app import RAISED, SECRET, client, gate, server
from tests.server.helpers import EVENT, NO_TOKEN, PONG, RESPONSE, Client, ServerThread, eventually, wall
from zcproto.app.app import App
from zcproto.errors import Code

__all__ = ["client", "gate", "server"]


# --- who may call what -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["plain", "async.ready"])
def test_arguments_are_checked_and_result_is_answered(client: Client, method: str) -> None:
    assert client.call(method, {"item": {"name": "ab", "count": 2}}) == "abab"
    refused = client.refused(method, {"item": {"name": SECRET, "count": SECRET}})
    assert (refused.code, refused.message) == (Code.INVALID_ARGUMENT, "item.count must be an int")
    assert client.refused(method).message == "item is missing"
    assert SECRET.encode() not in refused.body


def test_answer_carries_the_token_of_its_request(client: Client) -> None:
    client.send(client.request("hello"), client.request("hello", token=NO_TOKEN))
    with_token, without = client.answer(client.stream - 1), client.answer(client.stream)
    assert with_token.token == client.token
    assert without.token == NO_TOKEN
    assert with_token.value == [False, "127.0.0.1"]
    assert without.value == [True, "127.0.0.1"]


def test_call_without_session_reaches_only_public_methods(server: ServerThread) -> None:
    with server.client() as client:
        assert client.call("hello") == [True, "127.0.0.1"]
        for method in ("plain", "operators", "no.such.method", "session.info", "server.stats"):
            refused = client.refused(method)
            assert refused.code == Code.UNAUTHENTICATED
            assert refused.message == "this needs a session: log in first (session.open)"
        # Existing and unknown methods cannot be distinguished.
        bodies = {client.refused(method).body for method in ("plain", "no.such.method")}
        assert len(bodies) == 1


def test_unknown_method_is_unimplemented(client: Client) -> None:
    refused = client.refused("no.such.method")
    assert refused.code == Code.UNIMPLEMENTED
    assert "no.such.method" not in refused.message


def test_operator_method_refuses_other_users(client: Client, server: ServerThread) -> None:
    assert client.refused("operators").code == Code.PERMISSION_DENIED
    with server.client("operator") as operator:
        assert operator.call("operators") == "welcome"
        assert operator.refused("operators", token=NO_TOKEN).code == Code.UNAUTHENTICATED


# --- errors ------------------------------------------------------------------------------------------------

WAYS = ["raise.plain", "raise.first", "raise.later"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", RAISED)
def test_call_error_is_answered_unchanged(client: Client, way: str, kind: str) -> None:
    refused = client.refused(way, {"kind": kind})
    assert refused.code == RAISED[kind].code
    assert refused.message == f"it is {kind}"
    assert refused.details == {"n": 1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "kind", ["value_error", "key_error", "recursion_error", "generator_exit", "unsendable_details"]
)
def test_unexpected_exception_is_internal_error_with_logged_incident(
    client: Client, capsys: pytest.CaptureFixture[str], way: str, kind: str
) -> None:
    capsys.readouterr()
    refused = client.refused(way, {"kind": kind})
    assert refused.code == Code.INTERNAL
    incident = refused.details["incident"]
    assert refused.message == f"internal error, incident {incident}"
    assert refused.details == {"incident": incident}
    assert re.fullmatch("[0-9a-f]{16}", incident)
    line = next(line for line in capsys.readouterr().err.splitlines() if incident in line)
    logged = json.loads(line)
    assert (logged["event"], logged["what"], logged["peer"]) == ("request.failed", way, "127.0.0.1")
    for inner in (SECRET, "Error", "Exit", "Traceback", ".py", "line "):
        assert inner.encode() not in refused.body
    client.call("hello")


@pytest.mark.parametrize("way", WAYS)
def test_cancellation_raised_by_the_method_is_answered(client: Client, way: str) -> None:
    refused = client.refused(way, {"kind": "cancelled_error"})
    assert (refused.code, refused.message) == (Code.CANCELLED, "the server cancelled the method")


@pytest.mark.parametrize("way", WAYS)
def test_incident_ids_are_unique(client: Client, way: str) -> None:
    ids = {client.refused(way, {"kind": "value_error"}).details["incident"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["without_details", "busy_without_details"])
def test_retryable_error_has_retry_after(client: Client, way: str, kind: str) -> None:
    assert client.refused(way, {"kind": kind}).details["retry_after_ms"] > 0


def test_details_of_resource_exhausted_are_kept(client: Client) -> None:
    assert client.refused("raise.plain", {"kind": "with_limit"}).details == {"limit": 3}


@pytest.mark.parametrize("way", ["give.plain", "give.later"])
@pytest.mark.parametrize("what", ["object", "loop", "surrogate", "huge_int", "coroutine_like"])
def test_unencodable_result_is_internal_error(client: Client, way: str, what: str) -> None:
    assert client.refused(way, {"what": what}).code == Code.INTERNAL
    # Nothing of the failed answer precedes the next one.
    assert client.call(way, {"what": "nested"}) == [{"a": [1, 2.5, None, True]}]


@pytest.mark.parametrize("way", ["give.plain", "give.later"])
def test_every_kind_of_value_is_answered(client: Client, way: str) -> None:
    assert client.call(way, {"what": "nil"}) is None
    assert client.call(way, {"what": "bytes"}) == b"\x00"


@pytest.mark.parametrize("way", ["big", "big.later"])
def test_result_over_max_frame_is_internal_error(client: Client, way: str) -> None:
    largest = client.welcome.value["max_frame"] - 64 - 5
    assert client.call(way, {"size": largest}) == bytes(largest)
    assert client.refused(way, {"size": largest + 1}).code == Code.INTERNAL
    assert client.call(way, {"size": 5_000}) == bytes(5_000)


def test_errors_are_counted_once_by_code(client: Client, server: ServerThread) -> None:
    before = dict(server.stats["errors"])
    client.refused("raise.plain", {"kind": "not_found"})
    client.refused("raise.later", {"kind": "not_found"})
    client.refused("raise.later", {"kind": "value_error"})
    after = server.stats["errors"]
    assert after["5"] - before.get("5", 0) == 2
    assert after["13"] - before.get("13", 0) == 1


# --- the context -------------------------------------------------------------------------------------------


def test_context_describes_the_call(client: Client) -> None:
    traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
    described = client.call("context", meta={"deadline_ms": 5_000, "traceparent": traceparent, "x": 1})
    assert (described["user"], described["method"], described["peer"]) == ("ada", "context", "127.0.0.1")
    assert described["traceparent"] == traceparent
    assert described["time_left"] == 5.0
    assert described["cancelled"] is False
    assert abs(described["wall"] - wall()) < 5_000
    assert described["now"] > 0


def test_call_without_deadline_has_no_time_left(client: Client) -> None:
    assert client.call("context")["time_left"] is None


def test_context_user_without_session_is_unauthenticated(client: Client) -> None:
    assert client.call("context.user") == "ada"
    refused = client.refused("context.user", token=NO_TOKEN)
    assert (refused.code, refused.message) == (
        Code.UNAUTHENTICATED,
        "this method needs a session; call session.open first",
    )


def test_method_sends_events_to_its_caller(client: Client) -> None:
    client.send(client.request("event", {"data": {"a": 1}}))
    frames = [client.receive(), client.receive()]
    event = next(frame for frame in frames if frame.kind == EVENT)
    answer = next(frame for frame in frames if frame.kind == RESPONSE)
    assert answer.value is True
    assert (event.value, event.stream, event.token) == (["news", {"a": 1}], 0, client.token)


def test_event_without_session_is_not_sent(client: Client) -> None:
    assert client.call("event.public", token=NO_TOKEN) is False


def test_event_over_max_frame_is_internal_error(client: Client) -> None:
    largest = client.welcome.value["max_frame"] - 64 - len(b"\x92\xa4news\xc6....")
    assert client.call("event", {"size": largest}) is True
    assert len(client.event().value[1]) == largest
    assert client.refused("event", {"size": largest + 1}).code == Code.INTERNAL
    assert client.events == []


def test_ping_is_answered_between_requests(client: Client) -> None:
    client.send(client.frame(6, token=b"t" * 32), client.request("hello"))
    pong = client.receive()
    assert (pong.kind, pong.stream, pong.token, pong.body) == (PONG, 0, b"t" * 32, b"")
    assert client.answer(client.stream)


def test_any_callable_can_be_a_method(serve: Callable[..., ServerThread]) -> None:
    app = App()

    class Counter:
        def __init__(self) -> None:
            self.n = 0

        async def __call__(self, by: int) -> int:
            self.n += by
            return self.n

    def add(a: int, b: int) -> int:
        return a + b

    app.method("count")(Counter())
    app.method("add")(functools.partial(add, 1))
    server = serve(app)
    with server.client("ada") as client:
        assert client.call("count", {"by": 2}) == 2
        assert client.call("count", {"by": 2}) == 4
        assert client.call("add", {"b": 2}) == 3


def test_method_may_drain_its_server(serve: Callable[..., ServerThread]) -> None:
    app = App()
    stopped = []

    @app.method("stop")
    async def stop() -> None:
        try:
            await server.server.drain(0)
        finally:
            stopped.append(True)

    server = serve(app)
    client = server.client("ada")
    client.send(client.request("stop"))
    client.rest_until_closed()
    client.close()
    eventually(lambda: stopped)
    server.drain()
