"""What clients were told of their sessions, and whether a server still says the same.

A session of which an answer was lost may be in one of two states; `settle` finds out in which.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from zcproto.errors import CallError, Code, ResourceExhausted, Unavailable
from zcproto.load.caller import Caller
from zcproto.load.plan import Credential

CLIENT: Final = "zcproto-bench/1"
AT_ONCE: Final = 8
"""Checks in flight on one connection: fewer than it may have before a token was taken on it."""

PATIENCE_S: Final = 20.0
"""For a server that says "later": a store that is out, or too many tokens that nobody knows."""

_T = TypeVar("_T")
_ENDED: Final = (Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.UNAUTHENTICATED)
_PAUSE_S: Final = 0.05


@dataclass(slots=True, eq=False)
class Told:
    """A session as its client knows it."""

    user: str
    id: str
    token: bytes = field(repr=False)
    refresh_token: bytes = field(repr=False)
    replaced: bytes = field(default=b"", repr=False)
    """The access token that the last refresh has replaced."""
    is_ended: bool = False
    is_unsure: bool = False
    """Whether somebody asked to end it, and was not told that it has."""
    is_asked: bool = False
    """Whether a refresh was asked for and not answered with a pair: its client asks again."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.user}/{self.id}"

    def take(self, opened: dict[str, Any]) -> None:
        """A refresh was answered."""
        self.replaced, self.token = self.token, opened["token"]
        self.refresh_token = opened["refresh_token"]
        self.is_asked = False


async def open_session(caller: Caller, credential: Credential) -> Told:
    """Raises CallError or ConnectionClosed."""
    params = {"scheme": "api_key", "user": credential.user, "key": credential.key, "client": CLIENT}
    opened = await caller.call("session.open", params)
    return Told(credential.user, opened["id"], opened["token"], opened["refresh_token"])


async def refresh(caller: Caller, told: Told) -> None:
    """Trade a session's pair for a new one. Raises CallError or ConnectionClosed; then nothing is known of it."""
    told.is_asked = True
    told.take(await caller.call("session.refresh", {"refresh_token": told.refresh_token, "client": CLIENT}))


async def is_good(caller: Caller, token: bytes) -> bool:
    """Whether the server takes a token. Raises CallError for anything that says neither yes nor no."""

    async def ask() -> bool:
        try:
            await caller.call("echo", {}, token)
        except CallError as error:
            if error.code in _ENDED:
                return False
            raise
        return True

    return await patiently(ask)


async def patiently(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask again as long as the answer is to come later."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE_S
    while True:
        try:
            return await ask()
        except (ResourceExhausted, Unavailable) as error:
            wait_s = max(_PAUSE_S, error.details.get("retry_after_ms", 0) / 1000)
            if loop.time() + wait_s > end:
                raise
        await asyncio.sleep(wait_s)


@dataclass(slots=True)
class Broken:
    """Promises that a server did not keep."""

    lost: set[str] = field(default_factory=set)
    """Sessions that live, and that it refused, by name."""
    risen: set[str] = field(default_factory=set)
    """Sessions that had ended, and that it let in."""
    spent: set[str] = field(default_factory=set)
    """Those whose replaced token it took."""

    def add(self, other: Broken) -> None:
        self.lost |= other.lost
        self.risen |= other.risen
        self.spent |= other.spent

    def __len__(self) -> int:
        return len(self.lost) + len(self.risen) + len(self.spent)


async def check(caller: Caller, sessions: Iterable[Told]) -> Broken:
    """See what a server says of each session that is not unsure; a refresh that was not answered is asked for
    once more. Raises CallError or ConnectionClosed."""
    broken = Broken()

    async def check_one(told: Told) -> None:
        if told.is_unsure:
            return
        if told.is_asked and not told.is_ended:
            await patiently(partial(refresh, caller, told))
        good = await is_good(caller, told.token)
        if good and told.is_ended:
            broken.risen.add(told.name)
        elif not good and not told.is_ended:
            broken.lost.add(told.name)
        if told.replaced and await is_good(caller, told.replaced):
            broken.spent.add(told.name)

    # Those that live first: they are what makes this connection one with a session.
    await each_of(sorted(sessions, key=lambda told: told.is_ended), check_one)
    return broken


async def each_of(sessions: Iterable[Told], work: Callable[[Told], Awaitable[None]]) -> None:
    """Do something for each session, a few at once, in about their order."""
    left = iter(sessions)

    async def some() -> None:
        for told in left:
            await work(told)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(some())
