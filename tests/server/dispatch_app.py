"""A server whose methods return, raise or wait as tests request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.server.helpers import Client, ServerThread, eventually
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.common.roles import OPERATORS
from zcproto.errors import (
    Aborted,
    AlreadyExists,
    CallError,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnknownError,
)

SECRET = "canary-5e1f"
RAISED: dict[str, type[CallError]] = {
    kind.code.name.lower(): kind
    for kind in (
        Aborted,
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        InternalError,
        InvalidArgument,
        NotFound,
        OutOfRange,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        UnknownError,
    )
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
        if kind in RAISED:
            raise RAISED[kind](f"it is {kind}", {"n": 1})
        if kind == "value_error":
            raise ValueError(SECRET)
        if kind == "key_error":
            raise KeyError(SECRET)
        if kind == "recursion_error":
            raises(kind)
        if kind == "cancelled_error":
            raise asyncio.CancelledError(SECRET)
        if kind == "generator_exit":
            raise GeneratorExit(SECRET)
        if kind == "unsendable_details":
            raise NotFound("no", {"what": object()})
        if kind == "without_details":
            raise Unavailable("later")
        if kind == "busy_without_details":
            raise ResourceExhausted("later")
        if kind == "with_limit":
            raise ResourceExhausted("too many", {"limit": 3})

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
