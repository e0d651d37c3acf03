"""The harness of one scenario: the client's program on one side, the scripted server on the other."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from zcproto.common.clock import Clock, Entropy
from zcproto_conformance.certificates import HOST, Authority, Leaf
from zcproto_conformance.connection import MAX_FRAME, NO_TOKEN, Connection, Frame
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.program import Program, StepFailed
from zcproto_conformance.scripted_server import ScriptedServer, tls_context
from zcproto_conformance.values import typed, untyped

USER: Final = "ada"
HOUR_MS: Final = 3_600_000
NO_ANSWER: Final = "no answer"
PATIENCE: Final = 20.0
"""Default timeout in seconds for everything that must happen."""


@dataclass
class Session:
    """A session that the scripted server issued."""

    id: str
    token: bytes
    refresh_token: bytes | None
    bound: bool = False

    def result(self, wall: int) -> dict[str, Any]:
        """Return the result of `session.open` or `session.refresh`."""
        return {
            "token": self.token,
            "id": self.id,
            "user": USER,
            "expires_at": wall + 24 * HOUR_MS,
            "idle_timeout_ms": HOUR_MS,
            "refresh_token": self.refresh_token,
            "refresh_expires_at": None if self.refresh_token is None else wall + 720 * HOUR_MS,
            "bound": self.bound,
        }


class Fixtures:
    """Everything that the scenarios of a run share: certificates, the clock, randomness, a folder."""

    def __init__(self, folder: Path, clock: Clock, entropy: Entropy) -> None:
        self.folder = folder
        self.clock = clock
        self.entropy = entropy
        self.ca = Authority(folder, "ca", clock.wall())
        self.other_ca = Authority(folder, "other-ca", clock.wall())
        self.leaf = self.ca.leaf()
        self.next_leaf = self.ca.leaf()
        self.numbers = itertools.count(1)
        self.shared: dict[str, object] = {}
        self.cleanup: list[Callable[[], Awaitable[None]]] = []

    async def close(self) -> None:
        """Stop what scenarios started for the whole run."""
        while self.cleanup:
            await self.cleanup.pop()()


class Call:
    """A call that the client makes."""

    def __init__(self, harness: Harness, name: str) -> None:
        self._harness = harness
        self.name = name

    async def result(self) -> Any:
        """Wait for its result. Raises CheckFailed if the call failed."""
        try:
            return untyped(await self._harness.step("expect", call=self.name))
        except StepFailed as failure:
            raise CheckFailed(f"the call failed: {failure}") from failure
        except ValueError as error:
            raise CheckFailed(f"the result of the call: {error}") from error

    async def expect_result(self, expected: Any) -> None:
        """Raise CheckFailed unless the call returns this value."""
        result = await self.result()
        expect(result == expected, f"the call returned {result!r:.200} instead of {expected!r:.200}")

    async def error(self, kind: str) -> dict[str, Any]:
        """Wait for its error, which must be of this kind."""
        return await self._harness.step_error("expect", kind, call=self.name)

    async def expect_code(self, *codes: int) -> dict[str, Any]:
        """Wait for its error, which must have one of these codes."""
        error = await self.error("call")
        expect(error.get("code") in codes, f"the call ended with {error} instead of code {codes}")
        return error

    async def expect_lost(self, *, clean: bool | None = None) -> dict[str, Any]:
        """Wait for its error, which must be the end of the connection."""
        error = await self.error("closed")
        if clean is not None:
            expect(error.get("clean") is clean, f"the call ended with {error} instead of clean {clean}")
        return error

    async def cancel(self) -> None:
        await self._harness.step("cancel", call=self.name)


class Stream:
    """A stream of items that the client opens."""

    def __init__(self, harness: Harness, name: str) -> None:
        self._harness = harness
        self.name = name

    async def begin(self, step: str, **fields: Any) -> asyncio.Future[Any]:
        """Send one of its steps without waiting for the answer."""
        return await self._harness.begin_step(step, stream=self.name, **fields)

    async def next(self) -> dict[str, Any]:
        """Wait for the next item or the end: a map with `item` or `end`."""
        result = await self._harness.step("next", stream=self.name)
        expect(
            isinstance(result, dict) and len(result) == 1 and result.keys() <= {"item", "end"},
            f"next returned {result}",
        )
        return {key: untyped(value) for key, value in result.items()}

    async def expect_items(self, *expected: Any) -> None:
        """Raise CheckFailed unless these are the next items."""
        for value in expected:
            result = await self.next()
            expect(result == {"item": value}, f"next returned {result!r:.200} instead of item {value!r:.200}")

    async def expect_end(self, expected: Any) -> None:
        """Raise CheckFailed unless the stream has ended with this result."""
        result = await self.next()
        expect(
            result == {"end": expected}, f"next returned {result!r:.200} instead of the end {expected!r:.200}"
        )

    async def expect_code(self, *codes: int) -> dict[str, Any]:
        """Wait for its error, which must have one of these codes."""
        error = await self._harness.step_error("next", "call", stream=self.name)
        expect(error.get("code") in codes, f"the stream ended with {error} instead of code {codes}")
        return error

    async def expect_lost(self, *, clean: bool) -> None:
        """Wait for its error, which must be the end of the connection."""
        error = await self._harness.step_error("next", "closed", stream=self.name)
        expect(error.get("clean") is clean, f"the stream ended with {error} instead of clean {clean}")

    async def send(self, value: Any) -> None:
        """Send an item, and wait until it was sent."""
        await self._harness.step("send", stream=self.name, value=typed(value))

    async def finish(self) -> None:
        """Send no more items."""
        await self._harness.step("finish", stream=self.name)

    async def cancel_run(self) -> None:
        """Cancel the run of a durable stream, and wait until that was answered."""
        await self._harness.step("cancel_run", stream=self.name)

    async def position(self) -> dict[str, Any]:
        """Return the `id` and the `position` of a durable stream."""
        position: dict[str, Any] = await self._harness.step("position", stream=self.name)
        return position

    async def leave(self) -> None:
        """Give the stream up."""
        await self._harness.step("leave", stream=self.name)


@dataclass
class Called:
    """A call of the server that the application of a client holds."""

    harness: Harness
    client: str
    call: int
    method: str
    params: Any
    user: str
    pending: str | None
    """The id of a pending call; None of another one, and if the client does not read it."""

    async def answer(self, value: Any) -> None:
        await self.harness.step_result(await self.begin_answer(value), "answer")

    async def begin_answer(self, value: Any) -> asyncio.Future[Any]:
        """Answer without waiting for the step: the call may have been withdrawn."""
        return await self.harness.begin_step("answer", client=self.client, call=self.call, value=typed(value))

    async def fail(self, code: int) -> None:
        await self.harness.step("answer", client=self.client, call=self.call, code=code)


class Client:
    """A client in the program."""

    def __init__(self, harness: Harness, name: str) -> None:
        self._harness = harness
        self.name = name

    async def call(self, method: str, params: dict[str, Any] | None = None, /, **options: Any) -> Call:
        """Start a call."""
        call = Call(self._harness, f"call-{next(self._harness.fixtures.numbers)}")
        fields = {"params": None if params is None else typed(params), **options}
        await self._harness.step("call", client=self.name, call=call.name, method=method, **fields)
        return call

    async def calls(self, method: str, count: int) -> list[Call]:
        return [await self.call(method, {"n": n}) for n in range(count)]

    async def open(self, method: str, params: dict[str, Any] | None = None, /, **options: Any) -> Stream:
        """Start to open a stream."""
        stream = Stream(self._harness, f"stream-{next(self._harness.fixtures.numbers)}")
        fields = {"params": None if params is None else typed(params), **options}
        await self._harness.step("open", client=self.name, stream=stream.name, method=method, **fields)
        return stream

    async def resume(self, run: str, method: str, after: int) -> Stream:
        """Start to go on with a durable stream."""
        stream = Stream(self._harness, f"stream-{next(self._harness.fixtures.numbers)}")
        fields = {"run": run, "method": method, "after": after}
        await self._harness.step("resume", client=self.name, stream=stream.name, **fields)
        return stream

    async def begin_handle(self, method: str) -> asyncio.Future[Any]:
        """Let the application handle a method, whose calls it holds until `answer`."""
        return await self._harness.begin_step("handle", client=self.name, method=method)

    async def called(self) -> Called:
        """Wait for the next call that the application holds."""
        called = await self._harness.step("called", client=self.name)
        params = untyped(called["params"])
        fields = called["call"], called["method"], params, called["user"], called.get("pending")
        return Called(self._harness, self.name, *fields)

    async def event(self) -> tuple[str, Any]:
        """Wait for the next event that the client delivers to the application."""
        event = await self._harness.step("event", client=self.name)
        return event["name"], untyped(event["data"])

    async def session(self) -> dict[str, Any] | None:
        session: dict[str, Any] | None = await self._harness.step("session", client=self.name)
        return session

    async def begin_open_session(self) -> asyncio.Future[Any]:
        return await self._harness.begin_step("open_session", client=self.name)

    async def cut(self) -> None:
        await self._harness.step("cut", client=self.name)

    async def begin_close(self) -> asyncio.Future[Any]:
        return await self._harness.begin_step("close", client=self.name)


@dataclass
class ConnectedClient:
    """A client and the server's end of its connection, after WELCOME."""

    client: Client
    connection: Connection
    session: Session = field(default_factory=lambda: Session("none", NO_TOKEN, None))

    async def exchange(self) -> None:
        """Make one call and answer it, which shows that the connection works."""
        call = await self.client.call("echo", {"ping": 1})
        self.connection.respond(await self.connection.expect_request("echo"), {"ping": 1})
        await call.expect_result({"ping": 1})


class Harness:
    """One scenario: a scripted server of its own, and the clients it made."""

    def __init__(self, program: Program, fixtures: Fixtures, *, patience: float = PATIENCE) -> None:
        self.program = program
        self.fixtures = fixtures
        self.patience = patience
        self.server = ScriptedServer(fixtures.clock, fixtures.entropy, patience=patience)
        self.use_leaf(fixtures.leaf)
        self.clock_ahead_ms = 0
        self.key = fixtures.entropy(24).hex()
        self.program.secrets.add(self.key)
        self.closed_in_time: bool | None = None  # None: there was no client to close
        self._clients: list[Client] = []

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the clients, then stop the server. How the clients behave from here on is not checked."""
        closing = []
        for client in self._clients:
            try:
                closing.append(await client.begin_close())
            except CheckFailed:
                break  # the program has ended, and all its clients with it
        await self.server.stop()
        if closing:
            _, late = await asyncio.wait(closing, timeout=self.patience)
            self.closed_in_time = not late

    # --- steps of the program -----------------------------------------------------------------------

    async def begin_step(self, step: str, **fields: Any) -> asyncio.Future[Any]:
        """Send a step without waiting for its answer."""
        return await self.program.begin(step, fields)

    async def step(self, step: str, **fields: Any) -> Any:
        """Send a step and return its result. Raises StepFailed or CheckFailed."""
        return await self.step_result(await self.begin_step(step, **fields), step)

    async def step_result(self, future: asyncio.Future[Any], step: str = "the step") -> Any:
        """Wait for the result of a step. Raises StepFailed or CheckFailed."""
        done, _ = await asyncio.wait([future], timeout=self.patience)
        if not done:
            raise CheckFailed(f"{NO_ANSWER} to {step} within {self.patience:g} s")
        return future.result()

    async def step_error(self, step: str, *kinds: str, **fields: Any) -> dict[str, Any]:
        """Send a step and return its error, which must be of one of these kinds."""
        return await self.error_of(await self.begin_step(step, **fields), step, *kinds)

    async def error_of(self, future: asyncio.Future[Any], step: str, *kinds: str) -> dict[str, Any]:
        """Wait for the error of a step, which must be of one of these kinds."""
        try:
            result = await self.step_result(future, step)
        except StepFailed as failure:
            expect(failure.kind in kinds, f"{step} failed with {failure} instead of {' or '.join(kinds)}")
            return failure.error
        raise CheckFailed(
            f"{step} succeeded with {str(result)[:200]} instead of an error ({' or '.join(kinds)})"
        )

    # --- clients and connections --------------------------------------------------------------------

    async def begin_connect(self, **options: Any) -> tuple[Client, asyncio.Future[Any]]:
        """Start connecting a new client. `options` are those of the step; None omits one."""
        client = Client(self, f"client-{next(self.fixtures.numbers)}")
        defaults: dict[str, Any] = {
            "address": self.server.address,
            "server_name": HOST,
            "ca_file": str(self.fixtures.ca.file),
            "home": self.new_home(),
        }
        if self.patience > PATIENCE:  # the client's own defaults are too short for a slow machine
            timeout_ms = int(self.patience * 1000)
            defaults |= {"timeout_ms": timeout_ms, "connect_timeout_ms": timeout_ms}
        fields = {name: value for name, value in {**defaults, **options}.items() if value is not None}
        self._clients.append(client)
        return client, await self.begin_step("connect", client=client.name, **fields)

    def new_home(self) -> str:
        """Return a new home folder for a client."""
        return str(self.fixtures.folder / f"home-{next(self.fixtures.numbers)}")

    async def next_unsecured(self) -> Connection:
        """Return the next connection, before TLS. Raises CheckFailed at once if the program has ended."""
        arriving = asyncio.create_task(self.server.next_connection())
        ending = asyncio.create_task(self.program.wait_ended())
        try:
            done, _ = await asyncio.wait({arriving, ending}, return_when=asyncio.FIRST_COMPLETED)
            return await (arriving if arriving in done else ending)
        finally:
            arriving.cancel()
            ending.cancel()

    async def next_connection(self) -> Connection:
        """Accept the next connection and complete its TLS handshake."""
        connection = await self.next_unsecured()
        connection.clock_ahead_ms = self.clock_ahead_ms
        await connection.handshake(self.context)
        return connection

    async def next_welcomed(self, **changes: Any) -> Connection:
        """Accept the next connection and send WELCOME."""
        connection = await self.next_connection()
        connection.welcome(**changes)
        return connection

    async def next_resumed(self, session: Session, **changes: Any) -> Connection:
        """Accept the next connection of a client that must resume its session on it."""
        connection = await self.next_welcomed(**changes)

        def respond(connection: Connection, request: Frame) -> None:
            expect(request.token == session.token, "the client reconnected with another token")
            connection.frame_limit = MAX_FRAME
            connection.respond(request, {})

        connection.auto_responses["session.info"] = respond
        return connection

    async def connect(self, *, welcome: dict[str, Any] | None = None, **options: Any) -> ConnectedClient:
        """Connect a client without a session."""
        client, connecting = await self.begin_connect(**options)
        connection = await self.next_welcomed(**(welcome or {}))
        await self.step_result(connecting, "connect")
        return ConnectedClient(client, connection)

    async def connect_with_session(
        self, *, refresh: bool = True, welcome: dict[str, Any] | None = None, **options: Any
    ) -> ConnectedClient:
        """Connect a client and open a session, with or without a refresh token."""
        client, connecting = await self.begin_connect(user=USER, key=self.key, **options)
        connection = await self.next_welcomed(**(welcome or {}))
        session = await self.answer_session_open(connection, refresh=refresh)
        result = await self.step_result(connecting, "connect")
        expect(
            isinstance(result, dict) and result.get("session") == session.id,
            f"connect returned {result} instead of the session {session.id}",
        )
        return ConnectedClient(client, connection, session)

    async def session_for(self, peer: ConnectedClient, user: str) -> ConnectedClient:
        """Open a session of another user on the connection of a client."""
        client = Client(self, f"client-{next(self.fixtures.numbers)}")
        key = self.fixtures.entropy(24).hex()
        self.program.secrets.add(key)
        fields = {"of": peer.client.name, "client": client.name, "user": user, "key": key}
        opening = await self.begin_step("session_for", **fields)
        request = await peer.connection.expect_request("session.open")
        expect(request.params.get("user") == user, f"session.open has the params {sorted(request.params)}")
        session = self.new_session()
        result = session.result(peer.connection.wall) | {"user": user}
        peer.connection.respond(request, result)
        opened = await self.step_result(opening, "session_for")
        expect(opened == {"session": session.id}, f"session_for returned {opened}")
        return ConnectedClient(client, peer.connection, session)

    def new_session(self, *, refresh: bool = True, bound: bool = False) -> Session:
        """Issue a session with new tokens, which the program must never print."""
        token = self.fixtures.entropy(32)
        refresh_token = self.fixtures.entropy(32) if refresh else None
        for secret in (token, refresh_token):
            if secret is not None:
                text = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
                self.program.secrets |= {secret.hex(), text}
        return Session(f"s-{next(self.fixtures.numbers)}", token, refresh_token, bound)

    async def answer_session_open(self, connection: Connection, *, refresh: bool = True) -> Session:
        """Answer the `session.open` that must come next."""
        request = await connection.expect_request("session.open")
        expect(request.token == NO_TOKEN, "session.open was sent with a token")
        session = self.new_session(refresh=refresh)
        self.grant_session(connection, request, session)
        return session

    def grant_session(self, connection: Connection, request: Frame, session: Session) -> None:
        """Answer `session.open` or `session.refresh` with a session."""
        connection.frame_limit = MAX_FRAME
        connection.respond(request, session.result(connection.wall))

    def use_leaf(self, leaf: Leaf) -> None:
        """Present this certificate from the next connection on."""
        self.leaf = leaf
        self.context = tls_context(leaf.file)
