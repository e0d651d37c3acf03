"""Sessions as their clients know them, and checks of whether a server agrees.

A session of which an answer was lost is in one of two states; its client has to find out in which.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from bench.scenarios.harness import for_each
from zcproto.errors import CallError, Code, ResourceExhausted, Unavailable
from zcproto.load.caller import Caller
from zcproto.load.plan import Credential
from zcproto.wire.frame import NO_TOKEN

CLIENT: Final = "zcproto-bench/1"
RETRY_S: Final = 20.0
"""For how long a call is repeated while the server answers with a time to wait."""

ENDED_CODES: Final = (Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.UNAUTHENTICATED)
RETRY_LATER: Final = (ResourceExhausted, Unavailable)

_T = TypeVar("_T")
_LEAST_WAIT_S: Final = 0.05


@dataclass(slots=True, eq=False)
class ClientSession:
    """A session, by what the answers to its client were. Times are milliseconds since the Unix epoch."""

    user: str
    id: str
    token: bytes = field(repr=False)
    refresh_token: bytes = field(repr=False)
    expires_at: int
    refresh_expires_at: int
    replaced: bytes = field(default=b"", repr=False)
    """The access token that the last refresh replaced."""
    is_ended: bool = False
    is_unsure: bool = False
    """Whether an end was asked for and not acknowledged."""
    is_refreshing: bool = False
    """Whether a refresh was asked for and not answered with a pair."""

    @property
    def name(self) -> str:
        return f"{self.user}/{self.id}"

    def update(self, opened: dict[str, Any]) -> None:
        """Take over the pair that a refresh was answered with."""
        self.replaced, self.token = self.token, opened["token"]
        self.refresh_token = opened["refresh_token"]
        self.expires_at, self.refresh_expires_at = opened["expires_at"], opened["refresh_expires_at"]
        self.is_refreshing = False


async def open_session(caller: Caller, credential: Credential) -> ClientSession:
    """Open a session. Raises CallError or ConnectionClosed."""
    params = {"scheme": "api_key", "user": credential.user, "key": credential.key, "client": CLIENT}
    opened = await caller.call("session.open", params)
    times = (opened["expires_at"], opened["refresh_expires_at"])
    return ClientSession(credential.user, opened["id"], opened["token"], opened["refresh_token"], *times)


async def open_all(
    caller: Callable[[], Awaitable[Caller]], credentials: Iterable[Credential], at_once: int = 32
) -> list[Caller]:
    """Open a connection with a session for each, a few at once."""
    callers: list[Caller] = []

    async def open_one(credential: Credential) -> None:
        one = await caller()
        one.token = (await open_session(one, credential)).token
        callers.append(one)

    await for_each(credentials, open_one, at_once)
    return callers


async def refresh(caller: Caller, session: ClientSession) -> None:
    """Trade a session's pair for a new one. If it raises, the state of the session is not known."""
    session.is_refreshing = True
    params = {"refresh_token": session.refresh_token, "client": CLIENT}
    session.update(await caller.call("session.refresh", params, NO_TOKEN))


async def is_accepted(caller: Caller, token: bytes) -> bool:
    """Return whether the server accepts a token. Raises CallError for any answer that leaves it open."""

    async def ask() -> bool:
        try:
            await caller.call("echo", {}, token)
        except CallError as error:
            if error.code in ENDED_CODES:
                return False
            raise
        return True

    return await with_retries(ask)


async def with_retries(call: Callable[[], Awaitable[_T]]) -> _T:
    """Repeat a call while the server answers with a time to wait, for `RETRY_S` at most."""
    loop = asyncio.get_running_loop()
    end = loop.time() + RETRY_S
    while True:
        try:
            return await call()
        except RETRY_LATER as error:
            wait_s = max(_LEAST_WAIT_S, error.details.get("retry_after_ms", 0) / 1000)
            if loop.time() + wait_s > end:
                raise
        await asyncio.sleep(wait_s)


@dataclass(slots=True)
class Broken:
    """Sessions about which a server broke its promise, by their names."""

    lost: set[str] = field(default_factory=set)
    """Live ones that it refused."""
    revived: set[str] = field(default_factory=set)
    """Ended ones that it accepted."""
    reused: set[str] = field(default_factory=set)
    """Those whose replaced token it accepted."""

    def add(self, other: Broken) -> None:
        self.lost |= other.lost
        self.revived |= other.revived
        self.reused |= other.reused

    def __len__(self) -> int:
        return len(self.lost) + len(self.revived) + len(self.reused)


async def check(caller: Caller, sessions: Iterable[ClientSession]) -> Broken:
    """Try every session that is not unsure, and repeat refreshes that were not answered.

    Raises CallError or ConnectionClosed.
    """
    broken = Broken()

    async def check_one(session: ClientSession) -> None:
        if session.is_unsure:
            return
        if session.is_refreshing and not session.is_ended:
            try:
                await with_retries(partial(refresh, caller, session))
            except CallError as error:
                if error.code not in ENDED_CODES:
                    raise
                broken.lost.add(session.name)
                return
        accepted = await is_accepted(caller, session.token)
        if accepted and session.is_ended:
            broken.revived.add(session.name)
        elif not accepted and not session.is_ended:
            broken.lost.add(session.name)
        if session.replaced and await is_accepted(caller, session.replaced):
            broken.reused.add(session.name)

    # Live ones first: once a session was used on it, the connection may have more requests in flight.
    await for_each(sorted(sessions, key=lambda session: session.is_ended), check_one)
    return broken
