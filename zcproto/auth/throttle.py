"""Slows down guessing, without giving anyone the means to lock a user out.

What this file decides: how long a login has to wait. Delays double from 1 s on; a login that comes too
early is refused and does not count.

Rules:
- Failures are counted three ways: for a user at an address (*pair*), for a user, for an address. The
  first `login_failures` of a pair or a user are free, and four times as many of an address (many may
  share one).
- A pair that logged in with success before is *known*. It waits for its own failures only: whoever
  hammers a user's name, or shares an address, does not keep the user out where the user is at home.
- Everybody else waits for the longest of the three. A user's delay is at most a minute, and that of one
  pair or address a quarter of an hour: so one address can keep a user busy for a minute in fifteen. No
  delay is permanent.
- Of one pair only its free failures count for the address: a program with an old key, that tries for
  ever, does not shut out what else comes from its address, while someone who tries many users is slowed
  down soon.
- A login that names no user (an empty name) is counted for its address alone.
- Half an hour without a failure is forgotten. A success forgets the failures of its pair, not of the
  user: they were somebody else's.
- Every table is bounded; the row untouched for longest goes first. An IPv6 address stands for its /64
  network, which one customer has whole.

It must not know: clocks (`now` is monotonic seconds), how users prove who they are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, NamedTuple, TypeVar

from zcproto.common.network import network_of

FIRST_DELAY_S: Final = 1.0
USER_DELAY_S: Final = 60.0
ADDRESS_DELAY_S: Final = 900.0
QUIET_S: Final = 1800.0
ADDRESS_FACTOR: Final = 4

_MAX_DOUBLINGS: Final = 20
_MS_PER_S: Final = 1000

Key = TypeVar("Key", bound=Hashable)
Pair = tuple[str, str]


class _Row(NamedTuple):
    failures: int
    last: float


class _Failures(Generic[Key]):
    """Failures by key, the key that failed last at the end."""

    __slots__ = ("_limit", "free", "rows")

    def __init__(self, free: int, limit: int) -> None:
        self.free = free
        self._limit = limit
        self.rows: OrderedDict[Key, _Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def wait_s(self, key: Key, longest_s: float, now: float) -> float:
        """Seconds until the next attempt, 0 or less for none."""
        row = self.rows.get(key)
        if row is None or row.failures < self.free or now - row.last >= QUIET_S:
            return 0.0
        doublings = min(row.failures - self.free, _MAX_DOUBLINGS)
        return row.last + min(FIRST_DELAY_S * 2.0**doublings, longest_s) - now

    def add(self, key: Key, now: float) -> int:
        """Count a failure; how many there are of this key now."""
        rows = self.rows
        while rows and now - next(iter(rows.values())).last >= QUIET_S:
            rows.popitem(last=False)
        row = rows.pop(key, None)
        failures = 1 if row is None else row.failures + 1
        rows[key] = _Row(failures, now)
        if len(rows) > self._limit:
            rows.popitem(last=False)
        return failures

    def forget(self, key: Key) -> None:
        if self.rows:
            self.rows.pop(key, None)


class Throttle:
    """Delays for logins. `login_failures` are free; each of the tables has at most `max_entries` rows."""

    __slots__ = ("_addresses", "_free", "_known", "_max_entries", "_pairs", "_users")

    def __init__(self, login_failures: int = 5, *, max_entries: int = 16_384) -> None:
        self._free = login_failures
        self._max_entries = max_entries
        self._pairs: _Failures[Pair] = _Failures(login_failures, max_entries)
        self._users: _Failures[str] = _Failures(login_failures, max_entries)
        self._addresses: _Failures[str] = _Failures(ADDRESS_FACTOR * login_failures, max_entries)
        self._known: OrderedDict[Pair, None] = OrderedDict()

    def __len__(self) -> int:
        """Rows of all tables."""
        return len(self._pairs) + len(self._users) + len(self._addresses) + len(self._known)

    def reconfigure(self, login_failures: int) -> None:
        """Have another number of failures free. What was counted stays counted."""
        self._free = self._pairs.free = self._users.free = login_failures
        self._addresses.free = ADDRESS_FACTOR * login_failures

    def check(self, user: str, address: str, now: float) -> int:
        """Milliseconds that a login of this user from this address has to wait; 0: go on."""
        if not (self._pairs.rows or self._users.rows or self._addresses.rows):
            return 0  # nobody has failed of late: nearly always
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
        """Count a login that was refused."""
        network = network_of(address)
        pair = (user, network)
        failures = self._pairs.add(pair, now)
        if pair in self._known:
            return
        self._users.add(user, now)
        if failures <= self._free:
            self._addresses.add(network, now)

    def succeeded(self, user: str, address: str, now: float) -> None:
        """Note that this user is at home at this address."""
        pair = (user, network_of(address))
        self._pairs.forget(pair)
        known = self._known
        known[pair] = None
        known.move_to_end(pair)
        if len(known) > self._max_entries:
            known.popitem(last=False)
