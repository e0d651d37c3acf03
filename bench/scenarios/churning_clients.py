"""Clients that open, use, refresh and end sessions at random, and judge every answer.

A live session must be answered with what was sent. An ended session and a replaced token must be refused. A
sender of garbage must be disconnected. A session of which an answer was lost may be in either of two states, so
its client forgets it. While the store is down an opening or a refresh may be put off, and nothing else.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from bench.scenarios.harness import cause_of
from bench.scenarios.sessions import ENDED_CODES, RETRY_LATER, ClientSession, open_session, refresh
from bench.scenarios.storm_clients import Intruder
from zcproto.errors import CallError, Code, ConnectionClosed, ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.plan import Credential

MAX_SESSIONS: Final = 5
"""Sessions that a client has at once."""

REMEMBERED: Final = 20
"""Ended sessions and replaced tokens that a client tries again."""

SIZES: Final = (0, 16, 64, 1_000, 8_000, 60_000)
SMALL: Final = 8_000
"""Bytes that a connection without a session may send, too."""

MARGIN_MS: Final = 2_000
"""Around the moment of an expiry either answer is right: the server's clock is read when it reads the frame."""

DISCONNECT_S: Final = 15.0
"""Within which a sender of garbage has to be disconnected."""

GONE_CODES: Final = (*ENDED_CODES, Code.TOKEN_EXPIRED)


@dataclass(slots=True)
class Seen:
    """Counts of all clients."""

    right: Counter[str] = field(default_factory=Counter)
    """Answers that were as they had to be, by what was asked for."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that were not, by what was wrong."""
    later: Counter[str] = field(default_factory=Counter)
    """Calls that were put off, by the name of the code."""
    lost: Counter[str] = field(default_factory=Counter)
    """Connections that ended and should not have, by cause."""

    @property
    def judged(self) -> int:
        return self.right.total() + self.wrong.total()


class Client:
    """One user's client. A steady one keeps its connection, and only calls and refreshes.

    `run` makes acts in random order. Each act may be made alone by `attempt`.
    """

    def __init__(
        self,
        target: LoadTarget,
        credential: Credential,
        chance: random.Random,
        seen: Seen,
        pause_s: float,
        steady: bool = False,
    ) -> None:
        self._target = target
        self._credential = credential
        self._chance = chance
        self._seen = seen
        self._pause_s = pause_s
        self._is_steady = steady
        self._caller: Caller | None = None
        self._stopping = False
        self.live: list[ClientSession] = []
        self.ended: list[bytes] = []
        """Tokens of ended sessions, and replaced tokens."""

    async def run(self) -> None:
        """Act until `stop`, then leave, unless it is a steady client."""
        self._stopping = False
        while not self._stopping:
            await self._act()
            await asyncio.sleep(self._chance.expovariate(1 / self._pause_s))
        if not self._is_steady:
            await self.leave()

    def stop(self) -> None:
        self._stopping = True

    async def settle(self) -> None:
        """Judge once more everything that is remembered, and end all sessions."""
        for session in list(self.live):
            await self.attempt(self.echo, session)
        for token in self.ended[-REMEMBERED:]:
            await self.attempt(self.try_ended, token)
        for session in list(self.live):
            await self.attempt(self.end, session)
        await self.leave()

    async def _act(self) -> None:
        self._forget_expired()
        choice = self._chance.random()
        if not self.live or (choice < 0.12 and len(self.live) < MAX_SESSIONS and not self._is_steady):
            return await self.attempt(self.open)
        session = self._chance.choice(self.live)
        if session.expires_at - now_ms() < 2 * MARGIN_MS or choice < 0.2:
            return await self.attempt(self.refresh, session)
        if self._is_steady or choice < 0.66:
            return await self.attempt(self.echo, session)
        if choice < 0.74:
            return await self.attempt(self.end, session)
        if choice < 0.84 and self.ended:
            return await self.attempt(self.try_ended, self._chance.choice(self.ended[-REMEMBERED:]))
        if choice < 0.9:
            return await self.attempt(self.send_garbage)
        return await self.leave()

    async def attempt(self, act: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Carry out an act, and count an error that it was answered with."""
        try:
            await act(*arguments)
        except RETRY_LATER as error:
            self._seen.later[error.code.name] += 1
            await asyncio.sleep(min(error.details.get("retry_after_ms", 0) / 1000, 0.5))
        except ConnectionClosed as error:
            self._seen.lost[str(error)[:120]] += 1
            self._caller = None
        except ZcprotoError as error:
            self._seen.wrong[f"{act.__name__}: {cause_of(error)}"] += 1

    async def _connected(self) -> Caller:
        """Return the connection, on which a session was used: until then a server allows little."""
        caller = self._caller
        if caller is not None and not caller.ended:
            return caller
        if caller is not None:
            self._caller = None
            raise ConnectionClosed("the connection was ended by the server")
        return await self._connect(
            next((each for each in self.live if not may_have_expired(each.expires_at)), None)
        )

    async def _connect(self, session: ClientSession | None) -> Caller:
        """Connect, and use this session or open one. If that fails the connection is closed again."""
        caller = await self._target.caller()
        self._seen.right["connect"] += 1
        try:
            if session is None:
                await self._open_on(caller)
            else:
                await self._check_echo(caller, session, 1, 16)
        except ZcprotoError:
            await caller.disconnect()
            raise
        self._caller = caller
        return caller

    async def open(self) -> None:
        caller = self._caller
        if caller is None or caller.ended:
            self._caller = None
            await self._connect(None)
        else:
            await self._open_on(caller)

    async def _open_on(self, caller: Caller) -> None:
        self.live.append(await open_session(caller, self._credential))
        self._seen.right["open"] += 1

    async def echo(self, session: ClientSession) -> None:
        caller = await self._connected()
        await self._check_echo(
            caller, session, self._chance.choice((1, 1, 4, 16)), self._chance.choice(SIZES)
        )

    async def _check_echo(self, caller: Caller, session: ClientSession, depth: int, size: int) -> None:
        """Send some requests at once; each must be answered with what was sent."""
        if (
            size > SMALL
        ):  # spec/zcp1.md, section 5.3: used here first, as the last session here may have ended
            await self._check_echo(caller, session, 1, 16)
            if may_have_expired(session.expires_at):
                return
        params = [{"n": number, "data": self._chance.randbytes(size)} for number in range(depth)]
        calls = [caller.call("echo", each, session.token) for each in params]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for sent, answer in zip(params, answers, strict=True):
            if isinstance(answer, BaseException):
                if not self._is_expiry(answer, session.expires_at):
                    raise answer
            elif answer != sent:
                self._seen.wrong["echo: a different answer"] += 1
            elif has_expired(session.expires_at):
                self._seen.wrong["echo: an expired session was accepted"] += 1
            else:
                self._seen.right["echo"] += 1

    async def refresh(self, session: ClientSession) -> None:
        caller = await self._connected()
        if session not in self.live:
            return
        self.live.remove(session)  # until there is an answer it is not known which pair is good
        try:
            await refresh(caller, session)
        except CallError as error:
            if self._is_expiry(error, session.refresh_expires_at):
                return
            raise
        self._remember_ended(session.replaced)
        self.live.append(session)
        self._seen.right["refresh"] += 1

    async def end(self, session: ClientSession) -> None:
        """Close a session, or revoke it by another one of its user."""
        caller = await self._connected()
        if session not in self.live:
            return
        self.live.remove(session)
        others = [each for each in self.live if not may_have_expired(each.expires_at)]
        try:
            if others and self._chance.random() < 0.5:
                await caller.call("session.revoke", {"id": session.id}, self._chance.choice(others).token)
            else:
                await caller.call("session.close", {}, session.token)
        except CallError as error:
            if not (error.code in (*GONE_CODES, Code.NOT_FOUND) and may_have_expired(session.expires_at)):
                raise
        self._remember_ended(session.token)
        self._seen.right["end"] += 1

    async def try_ended(self, token: bytes) -> None:
        caller = await self._connected()
        try:
            await caller.call("echo", {}, token)
        except CallError as error:
            if error.code not in GONE_CODES:
                raise
            self._seen.right["refused"] += 1
        else:
            self._seen.wrong["an ended session was accepted"] += 1

    async def send_garbage(self) -> None:
        intruder = await self._target.connect(Intruder(self._target.wheel))
        intruder.send(self._chance.randbytes(self._chance.choice((64, 500, 5_000))))
        try:
            async with asyncio.timeout(DISCONNECT_S):
                await intruder.out.wait()
        except TimeoutError:
            self._seen.wrong["garbage was tolerated"] += 1
        else:
            self._seen.right["disconnected"] += 1
        await intruder.disconnect()

    async def leave(self) -> None:
        """Close the connection in order, or abort it."""
        caller, self._caller = self._caller, None
        if caller is None:
            return
        if self._chance.random() < 0.3 and caller.transport is not None:
            caller.transport.abort()
        await caller.disconnect()

    def _is_expiry(self, error: BaseException, expires_at: int) -> bool:
        """Whether an error is right because the session has expired; counted if so."""
        expired = isinstance(error, CallError) and error.code in GONE_CODES and may_have_expired(expires_at)
        self._seen.right["expired"] += expired
        return expired

    def _remember_ended(self, token: bytes) -> None:
        self.ended.append(token)
        del self.ended[:-REMEMBERED]

    def _forget_expired(self) -> None:
        """Move sessions that can no longer be refreshed to the ended ones, which are tried."""
        for session in [each for each in self.live if has_expired(each.refresh_expires_at)]:
            self.live.remove(session)
            self._remember_ended(session.token)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def may_have_expired(at: int) -> bool:
    return now_ms() > at - MARGIN_MS


def has_expired(at: int) -> bool:
    return now_ms() > at + MARGIN_MS
