"""What a conversation is made with: the client's program on one side, the scripted server on the other."""

from __future__ import annotations

import asyncio
import base64
import itertools
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from zcproto.common.clock import Clock, Entropy
from zcproto_conformance.certificates import HOST, Authority, Leaf
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.link import NO_TOKEN, Frame, Link
from zcproto_conformance.program import Program, Refused
from zcproto_conformance.server import ScriptedServer, tls_context
from zcproto_conformance.values import typed, untyped

USER: Final = "ada"
HOUR_MS: Final = 3_600_000
NO_ANSWER: Final = "no answer"
PATIENCE: Final = 20.0
"""Seconds that the kit waits for what must come, unless it is told to be more patient."""


@dataclass
class Session:
    """A session that the scripted server gave out."""

    id: str
    token: bytes
    refresh_token: bytes | None
    bound: bool = False

    def result(self, wall: int, **changes: Any) -> dict[str, Any]:
        """The result of `session.open` and `session.refresh`."""
        return {
            "token": self.token,
            "id": self.id,
            "user": USER,
            "expires_at": wall + 24 * HOUR_MS,
            "idle_timeout_ms": HOUR_MS,
            "refresh_token": self.refresh_token,
            "refresh_expires_at": None if self.refresh_token is None else wall + 720 * HOUR_MS,
            "bound": self.bound,
            **changes,
        }


class Fixtures:
    """What all conversations of a run share: certificates, the clock, randomness, a folder."""

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
        self.at_end: list[Callable[[], Awaitable[None]]] = []

    async def close(self) -> None:
        """End what was begun for the whole run."""
        while self.at_end:
            await self.at_end.pop()()


class Call:
    """A call that the client was told to make."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage = stage
        self.name = name

    async def result(self) -> Any:
        """Its result. Raises CheckFailed if it failed."""
        try:
            return untyped(await self._stage.do("expect", call=self.name))
        except Refused as refused:
            raise CheckFailed(f"the call failed: {refused}") from refused
        except ValueError as error:
            raise CheckFailed(f"the result of the call: {error}") from error

    async def gives(self, wanted: Any) -> None:
        """Its result must be this."""
        result = await self.result()
        expect(result == wanted, f"the call gave {result!r:.200} instead of {wanted!r:.200}")

    async def error(self, kind: str) -> dict[str, Any]:
        """The error with which it failed, which must be of this kind."""
        return await self._stage.refused("expect", kind, call=self.name)

    async def refused(self, *codes: int) -> dict[str, Any]:
        """The error of the call, which must have one of these codes."""
        error = await self.error("call")
        expect(error.get("code") in codes, f"the call ended with {error} instead of code {codes}")
        return error

    async def lost(self, *, clean: bool | None = None) -> dict[str, Any]:
        """The call must have ended with its connection."""
        error = await self.error("closed")
        if clean is not None:
            expect(error.get("clean") is clean, f"the call ended with {error} instead of clean {clean}")
        return error

    async def cancel(self) -> None:
        await self._stage.do("cancel", call=self.name)


class Client:
    """A client that the program was told to make."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage = stage
        self.name = name

    async def call(self, method: str, params: dict[str, Any] | None = None, /, **options: Any) -> Call:
        """Begin a call."""
        call = Call(self._stage, f"call-{next(self._stage.fixtures.numbers)}")
        fields = {"params": None if params is None else typed(params), **options}
        await self._stage.do("call", client=self.name, call=call.name, method=method, **fields)
        return call

    async def calls(self, method: str, count: int) -> list[Call]:
        return [await self.call(method, {"n": n}) for n in range(count)]

    async def event(self) -> tuple[str, Any]:
        """The next event that the application is told."""
        said = await self._stage.do("event", client=self.name)
        return said["name"], untyped(said["data"])

    async def session(self) -> dict[str, Any] | None:
        session: dict[str, Any] | None = await self._stage.do("session", client=self.name)
        return session

    async def open_session(self) -> asyncio.Future[Any]:
        return await self._stage.begin("open_session", client=self.name)

    async def cut(self) -> None:
        await self._stage.do("cut", client=self.name)

    async def closing(self) -> asyncio.Future[Any]:
        """Begin to close it."""
        return await self._stage.begin("close", client=self.name)


@dataclass
class Joined:
    """A client with its connection, both ready."""

    client: Client
    link: Link
    session: Session = field(default_factory=lambda: Session("none", NO_TOKEN, None))

    async def exchange(self) -> None:
        """One call goes through: the connection is alive and well."""
        call = await self.client.call("echo", {"ping": 1})
        self.link.answer(await self.link.request("echo"), {"ping": 1})
        await call.gives({"ping": 1})


class Stage:
    """One conversation: a scripted server of its own, and clients by name."""

    def __init__(self, program: Program, fixtures: Fixtures, *, patience: float = PATIENCE) -> None:
        self.program = program
        self.fixtures = fixtures
        self.patience = patience
        self.server = ScriptedServer(fixtures.clock, fixtures.entropy, patience=patience)
        self.leaf = fixtures.leaf
        self.context = tls_context(self.leaf.file)
        self.ahead_ms = 0
        self.key = fixtures.entropy(24).hex()
        self.program.secrets.add(self.key)
        self.answered_at_end: bool | None = None  # None: nothing was asked
        self._clients: list[Client] = []

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Clients are told to close, then the server goes. What a client does now is no part of the check."""
        closing = []
        for client in self._clients:
            try:
                closing.append(await client.closing())
            except CheckFailed:
                break  # the program is gone, with all its clients
        await self.server.stop()
        if closing:
            _, late = await asyncio.wait(closing, timeout=self.patience)
            self.answered_at_end = not late

    # --- the program ------------------------------------------------------------------------------

    async def begin(self, step: str, **fields: Any) -> asyncio.Future[Any]:
        """Send a step, and do not wait for its answer."""
        return await self.program.begin(step, fields)

    async def do(self, step: str, **fields: Any) -> Any:
        """Send a step, and wait for its answer. Raises Refused or CheckFailed."""
        return await self.answer(await self.begin(step, **fields), step)

    async def answer(self, future: asyncio.Future[Any], step: str = "the step") -> Any:
        """Wait for the answer to a step."""
        done, _ = await asyncio.wait([future], timeout=self.patience)
        if not done:
            raise CheckFailed(f"{NO_ANSWER} to {step} within {self.patience:g} s")
        return future.result()

    async def refused(self, step: str, *kinds: str, **fields: Any) -> dict[str, Any]:
        """Send a step that must be answered with an error of one of these kinds."""
        return await self.refusal(await self.begin(step, **fields), step, *kinds)

    async def refusal(self, future: asyncio.Future[Any], step: str, *kinds: str) -> dict[str, Any]:
        """Wait for the error of a step."""
        try:
            result = await self.answer(future, step)
        except Refused as refused:
            expect(refused.kind in kinds, f"{step} failed with {refused} instead of {' or '.join(kinds)}")
            return refused.error
        raise CheckFailed(
            f"{step} succeeded with {str(result)[:200]} instead of an error ({' or '.join(kinds)})"
        )

    async def pause(self, seconds: float) -> None:
        """Wait, for what should not happen."""
        await asyncio.sleep(seconds)

    # --- a client and its connection --------------------------------------------------------------

    async def connecting(self, **options: Any) -> tuple[Client, asyncio.Future[Any]]:
        """Tell the program to connect a new client. `options` are those of the step; None leaves one out."""
        number = next(self.fixtures.numbers)
        client = Client(self, f"client-{number}")
        usual = {
            "address": self.server.address,
            "server_name": HOST,
            "ca_file": str(self.fixtures.ca.file),
            "home": str(self.fixtures.folder / f"home-{number}"),
        }
        fields = {name: value for name, value in {**usual, **options}.items() if value is not None}
        self._clients.append(client)
        return client, await self.begin("connect", client=client.name, **fields)

    async def link(self, *, context: ssl.SSLContext | None = None) -> Link:
        """The next connection, with TLS agreed."""
        link = await self.server.connection()
        link.ahead_ms = self.ahead_ms
        await link.handshake(context or self.context)
        return link

    async def welcomed(self, **changes: Any) -> Link:
        """The next connection, with TLS agreed and WELCOME sent."""
        link = await self.link()
        link.welcome(**changes)
        return link

    async def joined(self, *, welcome: dict[str, Any] | None = None, **options: Any) -> Joined:
        """A client that is connected and has no session."""
        client, connected = await self.connecting(**options)
        link = await self.welcomed(**(welcome or {}))
        await self.answer(connected, "connect")
        return Joined(client, link)

    async def with_session(
        self, *, welcome: dict[str, Any] | None = None, refresh: bool = True, **options: Any
    ) -> Joined:
        """A client that is connected and has a session."""
        options = {"user": USER, "key": self.key, **options}
        client, connected = await self.connecting(**options)
        link = await self.welcomed(**(welcome or {}))
        session = await self.open_session(link, refresh=refresh)
        said = await self.answer(connected, "connect")
        expect(
            isinstance(said, dict) and said.get("session") == session.id,
            f"connect was answered with {said} instead of the session {session.id}",
        )
        return Joined(client, link, session)

    def new_session(self, *, refresh: bool = True, bound: bool = False) -> Session:
        """A session with new tokens, which the program must never put out."""
        token = self.fixtures.entropy(32)
        refresh_token = self.fixtures.entropy(32) if refresh else None
        for secret in (token, refresh_token):
            if secret is not None:
                text = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
                self.program.secrets |= {secret.hex(), text}
        return Session(f"s-{next(self.fixtures.numbers)}", token, refresh_token, bound)

    async def open_session(self, link: Link, *, refresh: bool = True, bound: bool = False) -> Session:
        """Answer `session.open` on a connection."""
        request = await link.request("session.open")
        expect(request.token == NO_TOKEN, "session.open came with a token")
        session = self.new_session(refresh=refresh, bound=bound)
        self.give(link, request, session)
        return session

    def give(self, link: Link, request: Frame, session: Session, **changes: Any) -> None:
        """Answer `session.open` or `session.refresh` with a session."""
        link.limit = 1_048_576
        link.answer(request, session.result(link.wall, **changes))

    async def back(self, session: Session, **changes: Any) -> Link:
        """The next connection of a client that comes back with its session."""
        link = await self.welcomed(**changes)

        def shown(link: Link, request: Frame) -> None:
            expect(request.token == session.token, "the client came back with another token")
            link.limit = 1_048_576
            link.answer(request, {})

        link.auto["session.info"] = shown
        return link


def use_leaf(stage: Stage, leaf: Leaf) -> None:
    """From the next connection on the server shows another certificate."""
    stage.leaf = leaf
    stage.context = tls_context(leaf.file)
