"""Build registries with a manual clock and deterministic random bytes."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any, NamedTuple

from zcproto.common.roles import NO_ROLES, Roles
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, Session, SessionRegistry, SessionSettings
from zcproto.sessions.index import END, DigestIndex, LinearHash
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.slab import CHUNK, Slab

WALL = 1_700_000_000_000
SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR


class CountedEntropy:
    """Deterministic random bytes that differ at each call."""

    def __init__(self) -> None:
        self.calls = 0
        self.sizes: list[int] = []

    def __call__(self, size: int, /) -> bytes:
        self.calls += 1
        self.sizes.append(size)
        return sha256(self.calls.to_bytes(8, "big")).digest()[:size]


class NewSession(NamedTuple):
    """A new session as a store gets it, with its tokens."""

    record: SessionRecord
    token: bytes
    refresh_token: bytes | None


def new_session(registry: SessionRegistry, user: str, **opening: Any) -> NewSession:
    fields, token, refresh_token = registry.new_session(user, **opening)
    return NewSession(SessionRecord(*fields), token, refresh_token)


class RegistryHarness:
    """A registry with its observed endings and shortcuts to use it."""

    def __init__(self, entropy: Callable[[int], bytes] | None = None, **settings: Any) -> None:
        self.settings = SessionSettings(**settings)
        self.entropy = CountedEntropy()
        self.registry = SessionRegistry(self.settings, entropy or self.entropy)
        self.table = self.registry._table  # for checks of the memory layout and of leaks
        self.ended: list[tuple[str, Code, str]] = []
        self.registry.observers.append(
            lambda session_id, code, reason: self.ended.append((session_id, code, reason))
        )

    def open(
        self,
        user: str = "alice",
        wall: int = WALL,
        *,
        roles: Roles = NO_ROLES,
        client: str = "zc/1",
        address: str = "192.0.2.1",
        bound: bool = False,
    ) -> OpenedSession:
        return self.registry.open(
            user,
            roles=roles,
            client=client,
            address=address,
            wall=wall,
            key="device:phone" if bound else "",
        )

    def refresh(
        self, token: bytes | None, wall: int = WALL, *, client: str = "zc/1", address: str = "192.0.2.1"
    ) -> OpenedSession:
        assert token is not None
        return self.registry.refresh(token, client=client, address=address, wall=wall)

    def good(self, token: bytes, wall: int = WALL) -> Session:
        """Return the session of a token that must be valid."""
        session = self.registry.check(token, wall)
        assert isinstance(session, Session), session
        return session

    def code(self, token: bytes, wall: int = WALL) -> Code:
        """Return the code of a token that must be refused."""
        code = self.registry.check(token, wall)
        assert isinstance(code, Code), code
        return code

    def clean(self, wall: int) -> int:
        """Clean the whole table."""
        sweeps, expired = self.registry.sweeps, 0
        while self.registry.sweeps == sweeps:
            expired += self.registry.clean(wall, 1000)
        return expired

    @property
    def strings(self) -> tuple[int, int, int]:
        """Return the number of interned users, clients and addresses."""
        return len(self.table.users), len(self.table.clients), len(self.table.addresses)


def used_slots(slab: Slab) -> int:
    return slab.size - sum(slab._free)


def digests(width: int = 32) -> tuple[Slab, DigestIndex]:
    slab = Slab(8 * CHUNK, 40, link=36)
    return slab, DigestIndex(slab, offset=0, width=width, next_=32)


def digest(number: int, width: int = 32) -> bytes:
    return sha256(b"%d" % number).digest()[:width]


def longest_chain(index: LinearHash) -> int:
    lengths = []
    for bucket in range(index.buckets):
        length, slot = 0, index._heads[bucket]
        while slot != END:
            length, slot = length + 1, index._next[slot]
        lengths.append(length)
    assert sum(lengths) == index.count
    return max(lengths)
