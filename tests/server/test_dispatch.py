"""Tests of dispatch over real TLS, by methods that return, raise or wait as tests request.

Each request gets exactly one answer, also if requests run at the same time, are cancelled or exceed their deadline.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.server.helpers import (
    CANCEL,
    ERROR,
    EVENT,
    NO_TOKEN,
    PONG,
    RESPONSE,
    Client,
    ServerThread,
    eventually,
    wall,
)
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.common.roles import OPERATORS
from zcproto.errors import CallError, Code, NotFound, ResourceExhausted, Unavailable

SECRET = "canary-5e1f"
RAISED = {code.name.lower(): CallError.by_code[code] for code in Code if code <= Code.UNAUTHENTICATED}
"""Errors that every method may raise, by the name of their code."""
FAULTS: dict[str, BaseException] = {
    "value_error": ValueError(SECRET),
    "key_error": KeyError(SECRET),
    "cancelled_error": asyncio.CancelledError(SECRET),
    "generator_exit": GeneratorExit(SECRET),
    "unsendable_details": NotFound("no", {"what": object()}),
    "without_details": Unavailable("later"),
    "busy_without_details": ResourceExhausted("later"),
    "with_limit": ResourceExhausted("too many", {"limit": 3}),
}


@dataclass
class Item:
    name: str
    count: int = 1


class WaitingMethods:
    """Methods that wait until the test releases them: which wait, and how they ended."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Future[Any]] = {}
        self.ended: list[tuple[str, str]] = []
        self.contexts: dict[str, Context] = {}


def application(gate: WaitingMethods) -> App:
    app = App()

    @app.method("plain")
    def plain(item: Item) -> str:
        return item.name * item.count

    @app.method("async.ready")
    async def async_ready(item: Item) -> str:
        return item.name * item.count

    @app.method("hello", public=True)
    def hello(context: Context) -> Any:
        return [context.session is None, context.peer]

    @app.method("operators", roles=OPERATORS)
    def operators() -> str:
        return "welcome"

    @app.method("wait")
    async def wait(context: Context, name: str) -> str:
        future = gate.waiting[name] = asyncio.get_running_loop().create_future()
        gate.contexts[name] = context
        try:
            result = str(await future)
        except asyncio.CancelledError:
            gate.ended.append((name, "cancelled"))
            raise
        gate.ended.append((name, result))
        return result

    @app.method("wait.stubborn")
    async def wait_stubborn(name: str) -> str:
        future = gate.waiting[name] = asyncio.get_running_loop().create_future()
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                gate.ended.append((name, "ignored it"))
        return str(future.result())

    def raises(kind: str) -> None:
        if kind == "recursion_error":
            raises(kind)
        raise RAISED[kind](f"it is {kind}", {"n": 1}) if kind in RAISED else copy.copy(FAULTS[kind])

    @app.method("raise.plain")
    def raise_plain(kind: str) -> None:
        raises(kind)

    @app.method("raise.first")
    async def raise_first(kind: str) -> None:
        raises(kind)

    @app.method("raise.later")
    async def raise_later(kind: str) -> None:
        await asyncio.sleep(0)
        raises(kind)

    def gives(what: str) -> Any:
        return {
            "nil": None,
            "object": object(),
            "loop": _loop(),
            "surrogate": "\ud800",
            "huge_int": 2**64,
            "coroutine_like": lambda: 1,
            "bytes": b"\x00",
            "nested": [{"a": [1, 2.5, None, True]}],
        }[what]

    @app.method("give.plain")
    def give_plain(what: str) -> Any:
        return gives(what)

    @app.method("give.later")
    async def give_later(what: str) -> Any:
        await asyncio.sleep(0)
        return gives(what)

    @app.method("big")
    def big(size: int) -> bytes:
        return bytes(size)

    @app.method("big.later")
    async def big_later(size: int) -> bytes:
        await asyncio.sleep(0)
        return bytes(size)

    @app.method("context")
    async def context_(context: Context) -> dict[str, Any]:
        before = context.time_left
        return {
            "user": context.user,
            "method": context.method,
            "peer": context.peer,
            "traceparent": context.traceparent,
            "time_left": before,
            "cancelled": context.cancelled,
            "wall": context.wall(),
            "now": context.now(),
        }

    @app.method("context.user", public=True)
    def context_user(context: Context) -> str:
        return context.user

    @app.method("event")
    def event(context: Context, data: Any = None, size: int = 0) -> bool:
        return context.send_event("news", bytes(size) if size else data)

    @app.method("event.public", public=True)
    def event_public(context: Context) -> bool:
        return context.send_event("news", 1)

    return app


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.fixture(scope="module")
def gate() -> WaitingMethods:
    return WaitingMethods()


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    certs: Path,
    gate: WaitingMethods,
) -> Iterator[ServerThread]:
    loop_factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    home = tmp_path_factory.mktemp("dispatch") / "home"
    with ServerThread(
        home, certs, application(gate), loop_factory=loop_factory, limits__max_streams=8
    ) as server:
        yield server


@pytest.fixture
def client(server: ServerThread, gate: WaitingMethods) -> Iterator[Client]:
    gate.waiting.clear()
    gate.ended.clear()
    gate.contexts.clear()
    with server.client("ada") as client:
        yield client
    server.until_left()


def release(server: ServerThread, gate: WaitingMethods, name: str, result: str) -> None:
    eventually(lambda: name in gate.waiting)
    server.in_loop(lambda: gate.waiting[name].set_result(result))


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
            assert refused.message == "this needs a session: connect with a user and a key, or another login"
        # Existing and unknown methods cannot be distinguished.
        bodies = {client.refused(method).body for method in ("plain", "no.such.method")}
        assert len(bodies) == 1


def test_unknown_method_is_unimplemented(client: Client) -> None:
    refused = client.refused("no.such.method")
    assert refused.code == Code.UNIMPLEMENTED
    assert refused.message == "unknown method 'no.such.method'; call server.info to list methods"


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
        "this method needs a session; connect with a user and a key, or another login",
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
    names = [str(number) for number in range(8)]
    client.send(*(client.request("wait", {"name": name}) for name in names))
    refused = client.refused("hello")
    assert refused.code == Code.RESOURCE_EXHAUSTED
    assert refused.details["retry_after_ms"] > 0
    release(server, gate, names.pop(), "done")
    assert client.answer().value == "done"
    assert client.call("hello")
    for name in names:
        release(server, gate, name, "done")
    assert len(client.answers(7)) == 7


@pytest.mark.parametrize("in_one_read", [False, True])
def test_cancel_is_answered_once_at_once(
    client: Client, server: ServerThread, gate: WaitingMethods, in_one_read: bool
) -> None:
    before = server.stats["errors"].get("1", 0)
    frames = client.request("wait", {"name": "a"}), client.frame(CANCEL, stream=client.stream)
    if in_one_read:
        client.send(*frames)
    else:
        client.send(frames[0])
        eventually(lambda: "a" in gate.waiting)
        client.send(frames[1])
    answer = client.answer(client.stream)
    assert (answer.kind, answer.code, answer.message) == (ERROR, Code.CANCELLED, "cancelled by the caller")
    eventually(lambda: gate.ended == [("a", "cancelled")])
    assert gate.contexts["a"].cancelled
    client.call("hello")  # no second answer came before this one
    assert server.stats["errors"]["1"] - before == 1


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


def test_deadline_does_not_affect_immediate_answer(client: Client) -> None:
    assert client.call("async.ready", {"item": {"name": "a"}}, meta={"deadline_ms": 1}) == "a"


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
