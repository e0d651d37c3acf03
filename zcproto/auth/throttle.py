"""Slow down guessing without letting attackers lock a user out.

Decides: how long a login has to wait. Delays double from 1 s; a login that comes too early is refused and does not
count.

Rules:
- Failures are counted for a user at an address (*pair*), for the user, and for the address. The first
  `login_failures` of a pair or a user are free, and four times as many of an address, which many may share.
- A pair with a successful login is *known*. Only its own failures delay it: an attacker who tries a user's name, or
  shares an address, does not lock the user out of a known address.
- Other pairs wait for the longest of the three delays. A user's delay is at most a minute, that of a pair or an
  address at most a quarter of an hour: one address can delay a user for one minute in fifteen. No delay is
  permanent.
- Only the free failures of a pair count for its address. A program that retries an old key forever does not block
  its neighbours, while an attacker who tries many users is slowed down soon.
- A login without a user name counts for its address alone.
- Failures expire after half an hour without another. A success resets the failures of its pair, but not of the
  user: those were someone else's.
- Every table is bounded and evicts the row unused for longest. An IPv6 address counts as its /64 network, which
  one customer controls.

Must not know: clocks (`now` is monotonic seconds), how users authenticate.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Hashable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from zcproto.common.backoff import backoff_s
from zcproto.common.network import network_of

FIRST_DELAY_S: Final = 1.0
USER_DELAY_S: Final = 60.0
ADDRESS_DELAY_S: Final = 900.0
QUIET_S: Final = 1800.0
ADDRESS_FACTOR: Final = 4

_MS_PER_S: Final = 1000

Key = TypeVar("Key", bound=Hashable)
Pair = tuple[str, str]


class LoginThrottle(Protocol):
    """What delays logins: a `Throttle`, or one that asks another process."""

    def __len__(self) -> int: ...

    def reconfigure(self, login_failures: int) -> None: ...

    def check(self, user: str, address: str, now: float) -> int | Awaitable[int]: ...

    def failed(self, user: str, address: str, now: float) -> Awaitable[None] | None: ...

    def succeeded(self, user: str, address: str, now: float) -> None: ...


class _Count(NamedTuple):
    failures: int
    last: float


class _FailureTable(Generic[Key]):
    """Failures by key, ordered by the last failure."""

    def __init__(self, free: int, limit: int) -> None:
        self.free = free
        self._limit = limit
        self.rows: OrderedDict[Key, _Count] = OrderedDict()

    def wait_s(self, key: Key, longest_s: float, now: float) -> float:
        """Return the seconds until the next attempt is allowed; 0 or less for now."""
        row = self.rows.get(key)
        if row is None or row.failures < self.free or now - row.last >= QUIET_S:
            return 0.0
        return row.last + backoff_s(row.failures - self.free + 1, FIRST_DELAY_S, longest_s) - now

    def add(self, key: Key, now: float) -> int:
        """Count a failure. Return the failures of this key."""
        rows = self.rows
        while rows and now - next(iter(rows.values())).last >= QUIET_S:
            rows.popitem(last=False)
        row = rows.pop(key, None)
        failures = 1 if row is None else row.failures + 1
        rows[key] = _Count(failures, now)
        if len(rows) > self._limit:
            rows.popitem(last=False)
        return failures


class Throttle:
    """Delays of logins. `login_failures` are free; each table has at most `max_entries` rows."""

    def __init__(self, login_failures: int = 5, *, max_entries: int = 16_384) -> None:
        self._free = login_failures
        self._max_entries = max_entries
        self._pairs: _FailureTable[Pair] = _FailureTable(login_failures, max_entries)
        self._users: _FailureTable[str] = _FailureTable(login_failures, max_entries)
        self._addresses: _FailureTable[str] = _FailureTable(ADDRESS_FACTOR * login_failures, max_entries)
        self._known: OrderedDict[Pair, None] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of rows in all tables."""
        counts = len(self._pairs.rows) + len(self._users.rows) + len(self._addresses.rows)
        return counts + len(self._known)

    def reconfigure(self, login_failures: int) -> None:
        """Change the number of free failures. Counts are kept."""
        self._free = self._pairs.free = self._users.free = login_failures
        self._addresses.free = ADDRESS_FACTOR * login_failures

    def check(self, user: str, address: str, now: float) -> int:
        """Return the milliseconds that a login of this user from this address has to wait, or 0."""
        if not (self._pairs.rows or self._users.rows):  # an address fails with a user only
            return 0  # no recent failure: the usual case
        network = network_of(address)
        pair = (user, network)
        if pair in self._known:
            wait_s = self._pairs.wait_s(pair, USER_DELAY_S, now)
        else:
            wait_s = max(
                self._pairs.wait_s(pair, ADDRESS_DELAY_S, now),
                self._users.wait_s(user, USER_DELAY_S, now) if user else 0.0,
                self._addresses.wait_s(network, ADDRESS_DELAY_S, now),
            )
        return max(0, math.ceil(wait_s * _MS_PER_S))

    def failed(self, user: str, address: str, now: float) -> None:
        """Count a refused login."""
        network = network_of(address)
        pair = (user, network)
        failures = self._pairs.add(pair, now)
        if pair in self._known:
            return
        self._users.add(user, now)
        if failures <= self._free:
            self._addresses.add(network, now)

    def succeeded(self, user: str, address: str, now: float) -> None:
        """Record a successful login of this user from this address."""
        pair = (user, network_of(address))
        if self._pairs.rows:
            self._pairs.rows.pop(pair, None)
        known = self._known
        if pair in known:
            known.move_to_end(pair)
            return
        known[pair] = None
        if len(known) > self._max_entries:
            known.popitem(last=False)
