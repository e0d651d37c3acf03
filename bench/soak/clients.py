"""Clients that open, use, refresh and end sessions at random, and judge every answer by what they were told before.

What is right: a session that lives is answered with what was sent; one that has ended, and a token that was
replaced, are refused; whoever sends garbage is thrown out. A session of which an answer was lost is in one of two
states, and is let go. While the store is out an opening or a refresh may be put off, and nothing else.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from bench.storms.hostile import Intruder
from zcproto.errors import CallError, Code, ConnectionClosed, ResourceExhausted, Unavailable, ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.plan import Credential
from zcproto.wire.frame import NO_TOKEN

CLIENT: Final = "zcproto-soak/1"
MOST: Final = 5
"""Sessions that a client has at once."""

DEAD_TRIED: Final = 20
"""Ended sessions and replaced tokens that a client remembers."""

SIZES: Final = (0, 16, 64, 1_000, 8_000, 60_000)
SMALL: Final = 8_000
"""Bytes that a connection without a session may send, too."""

MARGIN_MS: Final = 2_000
"""Around the moment of an expiry either answer is right: the server's clock reads when it reads the frame."""

OUT_S: Final = 15.0
"""Within which whoever sends garbage has to be thrown out."""

_GONE: Final = (Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED)
_LATER: Final = (ResourceExhausted, Unavailable)


@dataclass(slots=True, eq=False)
class Held:
    """A session as its client knows it. Times are milliseconds since the Unix epoch."""

    id: str
    token: bytes = field(repr=False)
    refresh_token: bytes = field(repr=False)
    expires_at: int
    refresh_expires_at: int

    def take(self, told: dict[str, Any]) -> None:
        self.token, self.refresh_token = told["token"], told["refresh_token"]
        self.expires_at, self.refresh_expires_at = told["expires_at"], told["refresh_expires_at"]


@dataclass(slots=True)
class Seen:
    """What all clients have seen."""

    done: Counter[str] = field(default_factory=Counter)
    """Answers that were as they had to be, by what was asked for."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that were not, by what was wrong."""
    later: Counter[str] = field(default_factory=Counter)
    """What was put off, by the name of the code."""
    lost: Counter[str] = field(default_factory=Counter)
    """Connections that ended and should not have, by why."""

    @property
    def judged(self) -> int:
        return self.done.total() + self.wrong.total()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Client:
    """One user's. A steady one keeps its connection, and only asks and refreshes."""

    def __init__(
        self, credential: Credential, chance: random.Random, seen: Seen, pause_s: float, steady: bool = False
    ) -> None:
        self._credential = credential
        self._chance = chance
        self._seen = seen
        self._pause_s = pause_s
        self._is_steady = steady
        self._caller: Caller | None = None
        self._place: Place | None = None
        self._live: list[Held] = []
        self._dead: list[bytes] = []
        self._stopping = False

    async def run(self, place: Place) -> None:
        """Act until `stop`; then leave, unless it is a steady one."""
        self._place, self._stopping = place, False
        while not self._stopping:
            await self._act()
            await asyncio.sleep(self._chance.expovariate(1 / self._pause_s))
        if not self._is_steady:
            await self._leave()

    def stop(self) -> None:
        self._stopping = True

    async def settle(self, place: Place) -> None:
        """Judge once more all that is remembered, and end what lives."""
        self._place = place
        for held in list(self._live):
            await self._guarded(self._ask, held)
        for token in self._dead[-DEAD_TRIED:]:
            await self._guarded(self._try_dead, token)
        for held in list(self._live):
            await self._guarded(self._end, held)
        await self._leave()

    # --- one act -----------------------------------------------------------------------------------------------

    async def _act(self) -> None:
        self._lapse()
        choice = self._chance.random()
        if not self._live or (choice < 0.12 and len(self._live) < MOST and not self._is_steady):
            return await self._guarded(self._open)
        held = self._chance.choice(self._live)
        if self._is_due(held) or choice < 0.2:
            return await self._guarded(self._refresh, held)
        if self._is_steady or choice < 0.66:
            return await self._guarded(self._ask, held)
        if choice < 0.74:
            return await self._guarded(self._end, held)
        if choice < 0.84 and self._dead:
            return await self._guarded(self._try_dead, self._chance.choice(self._dead[-DEAD_TRIED:]))
        if choice < 0.9:
            return await self._guarded(self._rave)
        return await self._leave()

    async def _guarded(self, act: Callable[..., Awaitable[None]], *what: Any) -> None:
        """What an act is answered with, when that is no answer to it."""
        try:
            await act(*what)
        except _LATER as error:
            self._seen.later[error.code.name] += 1
            await asyncio.sleep(min(error.details.get("retry_after_ms", 0) / 1000, 0.5))
        except ConnectionClosed as error:
            self._seen.lost[str(error)[:120]] += 1
            self._caller = None
        except ZcprotoError as error:
            self._seen.wrong[f"{act.__name__.strip('_')}: {_said(error)}"] += 1

    async def _connected(self) -> Caller:
        """The connection, with a session taken on it: until then little is allowed there."""
        caller = self._caller
        if caller is not None and not caller.ended:
            return caller
        if caller is not None:
            self._caller = None
            raise ConnectionClosed("the connection was ended by the server")
        held = next((each for each in self._live if not _may_have_expired(each.expires_at)), None)
        return await self._connect(held)

    async def _connect(self, held: Held | None) -> Caller:
        """A new connection, and a session taken on it: this one, or a new one. If that fails it is left again."""
        assert self._place is not None
        caller = await self._place.caller()
        self._seen.done["connect"] += 1
        try:
            if held is None:
                await self._open_on(caller)
            else:
                await self._check_echo(caller, held, 1, 16)
        except ZcprotoError:
            await caller.leave()
            raise
        self._caller = caller
        return caller

    async def _open(self) -> None:
        caller = self._caller
        if caller is None or caller.ended:
            self._caller = None
            await self._connect(None)
        else:
            await self._open_on(caller)

    async def _open_on(self, caller: Caller) -> None:
        params = {
            "scheme": "api_key",
            "user": self._credential.user,
            "key": self._credential.key,
            "client": CLIENT,
        }
        told = await caller.call("session.open", params)
        held = Held(told["id"], told["token"], told["refresh_token"], 0, 0)
        held.take(told)
        self._live.append(held)
        self._seen.done["open"] += 1

    async def _ask(self, held: Held) -> None:
        caller = await self._connected()
        await self._check_echo(caller, held, self._chance.choice((1, 1, 4, 16)), self._chance.choice(SIZES))

    async def _check_echo(self, caller: Caller, held: Held, depth: int, size: int) -> None:
        """Some requests at once, each answered with what it was."""
        if size > SMALL:  # spec/zcp1.md 5.3: taken here first, as the last one here may have ended
            await self._check_echo(caller, held, 1, 16)
            if _may_have_expired(held.expires_at):
                return
        params = [{"n": number, "data": self._chance.randbytes(size)} for number in range(depth)]
        calls = [caller.call("echo", each, held.token) for each in params]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for sent, answer in zip(params, answers, strict=True):
            if isinstance(answer, BaseException):
                if (
                    isinstance(answer, CallError)
                    and answer.code in _GONE
                    and _may_have_expired(held.expires_at)
                ):
                    self._seen.done["expired"] += 1
                    continue
                raise answer
            if answer != sent:
                self._seen.wrong["echo: another answer"] += 1
            elif _has_expired(held.expires_at):
                self._seen.wrong["echo: an expired session was let in"] += 1
            else:
                self._seen.done["echo"] += 1

    async def _refresh(self, held: Held) -> None:
        caller = await self._connected()
        if held not in self._live:
            return
        self._live.remove(held)  # until there is an answer nobody knows which pair is good
        try:
            told = await caller.call(
                "session.refresh", {"refresh_token": held.refresh_token, "client": CLIENT}, NO_TOKEN
            )
        except CallError as error:
            if error.code in _GONE and _may_have_expired(held.refresh_expires_at):
                self._seen.done["expired"] += 1
                return
            raise
        self._bury(held.token)
        held.take(told)
        self._live.append(held)
        self._seen.done["refresh"] += 1

    async def _end(self, held: Held) -> None:
        """Close it, or have another session of its user revoke it."""
        caller = await self._connected()
        if held not in self._live:
            return
        self._live.remove(held)
        others = [each for each in self._live if not _may_have_expired(each.expires_at)]
        try:
            if others and self._chance.random() < 0.5:
                await caller.call("session.revoke", {"id": held.id}, self._chance.choice(others).token)
            else:
                await caller.call("session.close", {}, held.token)
        except CallError as error:
            if not (error.code in (*_GONE, Code.NOT_FOUND) and _may_have_expired(held.expires_at)):
                raise
        self._bury(held.token)
        self._seen.done["end"] += 1

    async def _try_dead(self, token: bytes) -> None:
        caller = await self._connected()
        try:
            await caller.call("echo", {}, token)
        except CallError as error:
            if error.code not in _GONE:
                raise
            self._seen.done["refused"] += 1
        else:
            self._seen.wrong["a session that had ended was let in"] += 1

    async def _rave(self) -> None:
        """Somebody who sends what is none of the protocol."""
        assert self._place is not None
        intruder = await self._place.join(Intruder(self._place.wheel))
        intruder.send(self._chance.randbytes(self._chance.choice((64, 500, 5_000))))
        try:
            async with asyncio.timeout(OUT_S):
                await intruder.out.wait()
        except TimeoutError:
            self._seen.wrong["garbage was suffered"] += 1
        else:
            self._seen.done["thrown out"] += 1
        await intruder.leave()

    async def _leave(self) -> None:
        """Properly, or without a word."""
        caller, self._caller = self._caller, None
        if caller is None:
            return
        if self._chance.random() < 0.3 and caller.transport is not None:
            caller.transport.abort()
        await caller.leave()

    # --- what is remembered ------------------------------------------------------------------------------------

    def _bury(self, token: bytes) -> None:
        self._dead.append(token)
        del self._dead[:-DEAD_TRIED]

    def _is_due(self, held: Held) -> bool:
        return held.expires_at - now_ms() < 2 * MARGIN_MS

    def _lapse(self) -> None:
        """Let go what has expired for good, and try that it is refused."""
        for held in [each for each in self._live if _has_expired(each.refresh_expires_at)]:
            self._live.remove(held)
            self._bury(held.token)


def _may_have_expired(at: int) -> bool:
    return now_ms() > at - MARGIN_MS


def _has_expired(at: int) -> bool:
    return now_ms() > at + MARGIN_MS


def _said(error: ZcprotoError) -> str:
    return error.code.name if isinstance(error, CallError) else type(error).__name__
