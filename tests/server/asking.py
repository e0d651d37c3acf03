"""A server whose methods make pending calls, and clients that answer them.

ask(client)                       # a pending call to ada
id, call = offer(other)           # `other` has registered by `handle`
answer(other, call, "yes")
assert result(client) == "yes"
"""

from __future__ import annotations

from typing import Any

import msgpack

from tests.server.helpers import Client, Frame
from zcproto.wire.frame import Kind
from zcproto.wire.message import decode_call

APP = """
import os

from zcproto import App, Context
from zcproto.errors import ZcprotoError

app = App()


@app.method("pid")
def pid() -> int:
    return os.getpid()


@app.method("ask")
async def ask(context: Context, timeout: float) -> str:
    try:
        return str(await context.ask("ada", "approve", tool="ls", timeout=timeout))
    except ZcprotoError as error:
        return type(error).__name__
"""


def handle(client: Client, *methods: str) -> None:
    """Register methods, `approve` if none is given, without waiting for the answer."""
    client.send(client.request("session.handle", {"methods": methods or ("approve",), "max": 8}))
    assert receive(client, Kind.RESPONSE).value == {}


def ask(client: Client, seconds: float = 900.0) -> None:
    client.send(client.request("ask", {"timeout": seconds}))


def receive(client: Client, kind: int) -> Frame:
    """Return the next frame of a kind; the others come later."""
    for index, frame in enumerate(client.events):
        if frame.kind == kind:
            return client.events.pop(index)
    while (frame := client.receive()).kind != kind:
        assert frame.kind != Kind.ERROR, frame
        client.events.append(frame)
    return frame


def offer(client: Client) -> tuple[str, Frame]:
    """Return the id of the next pending call, and its CALL."""
    frame = receive(client, Kind.CALL)
    call_id = decode_call(frame.body)[3]
    assert call_id is not None
    return call_id, frame


def answer(client: Client, call: Frame, value: Any) -> None:
    client.send(client.frame(Kind.RESULT, msgpack.packb(value), stream=call.stream, token=call.token))


def withdrawn(client: Client, call: Frame) -> None:
    """Wait until a call is withdrawn."""
    while receive(client, Kind.WITHDRAW).stream != call.stream:
        pass


def result(client: Client) -> Any:
    return receive(client, Kind.RESPONSE).value
