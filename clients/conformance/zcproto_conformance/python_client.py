"""The program through which the conformance kit drives the Python client.

    zcproto-conformance python -m zcproto_conformance.python_client

README.md of the distribution specifies the steps.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto.client.client import Client, UserSession, connect, default_client
from zcproto.client.credentials import Device
from zcproto.client.handlers import Call
from zcproto.client.streams import Stream
from zcproto.errors import (
    CallError,
    CannotConnect,
    CertificateError,
    Code,
    ConfigError,
    ConnectionClosed,
    ProtocolError,
    TlsError,
)
from zcproto.tls.transport import TlsTransport
from zcproto_conformance.python_vectors import STEPS as VECTOR_STEPS
from zcproto_conformance.values import typed, untyped

KIT: Final = 1
MAX_LINE: Final = 8 * 1024 * 1024
_MS: Final = 1000

CAUSES: Final = {
    "certificate_untrusted": "certificate",
    "certificate_expired": "certificate",
    "certificate_name_mismatch": "certificate",
    "certificate_revoked": "certificate",
    "pin_mismatch": "pin",
    "no_application_protocol": "protocol",
    "unsupported_version": "protocol",
    "no_shared_parameters": "protocol",
    "wrong_parameters": "protocol",
    "not_tls": "protocol",
    "sts_policy": "policy",
}

Step = Callable[[Mapping[str, Any]], Awaitable[Any]]


class OpenStream:
    """A stream, and the task that opens it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.opening = asyncio.create_task(stream.__aenter__())
        self.sending = asyncio.Lock()

    async def opened(self) -> Stream:
        """Wait until it is open. Raises the error that has prevented it."""
        await asyncio.wait([self.opening])
        return self.opening.result()


class HeldCalls:
    """Calls of the server to one client, held until a step answers them."""

    def __init__(self) -> None:
        self._answers: list[asyncio.Future[Any]] = []  # by the number of the call
        self._seen: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def hold(self, call: Call, params: Mapping[str, Any]) -> Any:
        number = len(self._answers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        seen = {"call": number, "method": call.method, "user": call.user, "params": typed(dict(params))}
        seen["pending"] = call.id
        self._seen.put_nowait(seen)
        return await answer

    async def next(self) -> Any:
        return await self._seen.get()

    def answer(self, step: Mapping[str, Any]) -> None:
        held = self._answers[step["call"]]
        if held.done():
            return
        if "code" in step:
            held.set_exception(CallError.from_wire(step["code"], "failed by the scenario", {}))
        else:
            held.set_result(untyped(step["value"]))


def next_of(logins: Iterable[Any]) -> Callable[[], Any]:
    """Return a function that returns the next login each time."""
    values = iter(logins)
    return lambda: untyped(next(values))


class Conform:
    """The steps, each a method named after its step that returns the value of `ok`."""

    def __init__(self) -> None:
        self.clients: dict[str, Client | UserSession] = {}
        self.calls: dict[str, asyncio.Task[Any]] = {}
        self.streams: dict[str, OpenStream] = {}
        self.held: dict[str, HeldCalls] = {}

    async def hello(self, step: Mapping[str, Any]) -> Any:
        return {"kit": KIT, "client": default_client(), "features": ["durable"]}

    async def connect(self, step: Mapping[str, Any]) -> Any:
        key = step.get("device_key")
        device = None if key is None else Device(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key)))
        options: dict[str, Any] = {
            "user": step.get("user"),
            "key": step.get("key"),
            "ca_file": step.get("ca_file"),
            "pins": step.get("pins", ()),
            "verify": step.get("verify", True),
            "server_hostname": step.get("server_name"),
            "device": device,
            "device_name": step.get("device"),
            "login": next_of(step["login"]) if "login" in step else None,
            "client": step.get("client_name"),
            "home": Path(step["home"]),
        }
        for name in ("max_calls", "max_connections"):
            if name in step:
                options[name] = step[name]
        for name in ("timeout", "connect_timeout"):
            if f"{name}_ms" in step:
                options[name] = step[f"{name}_ms"] / _MS
        client = connect(step["address"], **options)
        self.clients[step["client"]] = client  # before it is open, so that `close` always finds it
        await client.open()
        return {"session": None if client.session is None else client.session.id}

    async def session_for(self, step: Mapping[str, Any]) -> Any:
        client = self.clients[step["of"]]
        assert isinstance(client, Client)
        session = client.session_for(user=step["user"], key=step["key"])
        self.clients[step["client"]] = session
        await session.open()
        return {"session": None if session.session is None else session.session.id}

    async def call(self, step: Mapping[str, Any]) -> Any:
        client = self.clients[step["client"]]
        options: dict[str, Any] = {
            name: step[name] for name in ("idempotency_key", "traceparent") if name in step
        }
        if "timeout_ms" in step:
            options["timeout"] = step["timeout_ms"] / _MS
        call = client.call(step["method"], untyped(step.get("params")), **options)
        self.calls[step["call"]] = asyncio.create_task(call)
        await asyncio.sleep(0)  # let it start

    async def expect(self, step: Mapping[str, Any]) -> Any:
        call = self.calls[step["call"]]
        await asyncio.wait([call])
        return typed(call.result())

    async def cancel(self, step: Mapping[str, Any]) -> Any:
        self.calls[step["call"]].cancel()

    async def open(self, step: Mapping[str, Any]) -> Any:
        options: dict[str, Any] = {}
        if "credit" in step:
            options["window"] = tuple(step["credit"])
        if "timeout_ms" in step:
            options["timeout"] = step["timeout_ms"] / _MS
        if "durable" in step:
            options["durable"] = step["durable"]
        client = self.clients[step["client"]]
        stream = client.stream(step["method"], untyped(step.get("params")), **options)
        self.streams[step["stream"]] = OpenStream(stream)
        await asyncio.sleep(0)  # let it start

    async def resume(self, step: Mapping[str, Any]) -> Any:
        client = self.clients[step["client"]]
        stream = client.resume(step["run"], method=step["method"], after=step["after"])
        self.streams[step["stream"]] = OpenStream(stream)
        await asyncio.sleep(0)  # let it start

    async def position(self, step: Mapping[str, Any]) -> Any:
        stream = self.streams[step["stream"]].stream
        return {"id": stream.id, "position": stream.position}

    async def cancel_run(self, step: Mapping[str, Any]) -> Any:
        await (await self.streams[step["stream"]].opened()).cancel()

    async def next(self, step: Mapping[str, Any]) -> Any:
        stream = await self.streams[step["stream"]].opened()
        try:
            return {"item": typed(await stream.receive())}
        except EOFError:
            return {"end": typed(stream.result)}

    async def send(self, step: Mapping[str, Any]) -> Any:
        opened = self.streams[step["stream"]]
        stream = await opened.opened()
        async with opened.sending:
            await stream.send(untyped(step["value"]))

    async def finish(self, step: Mapping[str, Any]) -> Any:
        await (await self.streams[step["stream"]].opened()).end()

    async def leave(self, step: Mapping[str, Any]) -> Any:
        opened = self.streams[step["stream"]]
        opened.opening.cancel()
        opened.stream.close()

    async def handle(self, step: Mapping[str, Any]) -> Any:
        held = self.held.setdefault(step["client"], HeldCalls())
        client = self.clients[step["client"]]

        @client.handler(step["method"])
        async def _(call: Call, tool: str | None = None, number: int | None = None) -> Any:
            params = {"tool": tool, "number": number}
            return await held.hold(call, {name: value for name, value in params.items() if value is not None})

    async def called(self, step: Mapping[str, Any]) -> Any:
        return await self.held[step["client"]].next()

    async def answer(self, step: Mapping[str, Any]) -> Any:
        self.held[step["client"]].answer(step)

    async def event(self, step: Mapping[str, Any]) -> Any:
        event = await anext(self.clients[step["client"]].events)
        return {"name": event.name, "data": typed(event.data)}

    async def session(self, step: Mapping[str, Any]) -> Any:
        session = self.clients[step["client"]].session
        if session is None:
            return None
        return {"id": session.id, "user": session.user, "expires_at": session.expires_at}

    async def open_session(self, step: Mapping[str, Any]) -> Any:
        return {"session": (await self.clients[step["client"]].open_session()).id}

    async def cut(self, step: Mapping[str, Any]) -> Any:
        connection = self.clients[step["client"]]._connections.current
        transport = None if connection is None else connection._transport
        if isinstance(transport, TlsTransport):
            transport._raw.abort()  # below TLS, like a network failure

    async def close(self, step: Mapping[str, Any]) -> Any:
        client = self.clients.pop(step["client"], None)
        if client is not None:  # None: the connect step failed before it was made
            await client.close()

    # --- the program --------------------------------------------------------------------------------

    def step(self, name: str) -> Step | None:
        """Return the implementation of a step, or None for an unknown step."""
        if name in VECTOR_STEPS:
            return as_coroutine(VECTOR_STEPS[name])
        found: Step | None = getattr(self, name, None) if name in STEPS else None
        return found

    async def run(self) -> None:
        """Execute the steps from standard input until it ends."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_LINE)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        tasks: set[asyncio.Task[None]] = set()
        while line := await reader.readline():
            task = asyncio.create_task(self._execute(json.loads(line)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        for client in self.clients.values():
            await client.close()

    async def _execute(self, step: Mapping[str, Any]) -> None:
        do = self.step(step["step"])
        if do is None:
            write({"id": step["id"], "unsupported": f"unknown step {step['step']!r}"})
            return
        try:
            answer = {"ok": await do(step)}
        except KNOWN as error:
            answer = {"error": describe(error)}
        except asyncio.CancelledError as error:
            if step["step"] != "expect":
                raise
            answer = {"error": describe(error)}
        except Exception as error:  # of this program, or a fault of the client
            traceback.print_exc()
            answer = {"error": {"kind": "unexpected", "message": type(error).__name__}}
        write({"id": step["id"], **answer})


STEPS: Final = frozenset(
    {
        "hello",
        "connect",
        "session_for",
        "call",
        "expect",
        "cancel",
        "event",
        "session",
        "open_session",
        "cut",
        "close",
    }
    | {"resume", "position", "cancel_run"}
    | {"open", "next", "send", "finish", "leave", "handle", "called", "answer"}
)
KNOWN: Final = (
    *(CallError, ConnectionClosed, TlsError, CertificateError, ConfigError, ProtocolError),
    *(EOFError, RuntimeError),  # a stream that has ended or was closed
)


def as_coroutine(do: Callable[[Mapping[str, Any]], Any]) -> Step:
    async def step(fields: Mapping[str, Any]) -> Any:
        return do(fields)

    return step


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error in the form of the kit."""
    if isinstance(error, asyncio.CancelledError):
        return {"kind": "call", "code": Code.CANCELLED, "name": "CANCELLED", "message": "", "details": None}
    if isinstance(error, CallError):
        return {
            "kind": "call",
            "code": error.code,
            "name": error.code.name,
            "message": error.message,
            "details": typed(error.details),
        }
    if isinstance(error, CannotConnect):
        return {"kind": "connect", "message": str(error)}
    if isinstance(error, ConnectionClosed):
        return {"kind": "closed", "clean": error.clean, "code": error.code, "message": str(error)}
    if isinstance(error, ProtocolError):
        return {"kind": "closed", "clean": False, "code": error.code, "message": str(error)}
    if isinstance(error, TlsError):
        return {"kind": "tls", "cause": CAUSES.get(error.failure, "other"), "message": str(error)}
    return {"kind": "argument", "message": str(error)}


def write(answer: Mapping[str, Any]) -> None:
    """Write one line and flush it."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    asyncio.run(Conform().run())


if __name__ == "__main__":
    main()
