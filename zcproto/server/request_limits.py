"""Limits of what one user and one address may request: requests a second, and requests in progress.

Decides: which requests are refused, and when their callers may retry.

Rules:
- A rate is a token bucket that holds the requests of BURST_S seconds. A refused request takes nothing from it.
- Requests without a session, and all by HTTP, count for their address, those with one for their user too.
- Logins and refreshes are left to their own limits: a client that is refused here must still get its session.
- The tables are bounded. When one is full of keys in use, further keys share a bucket.

It must not know: connections, how a method is run, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Final

from zcproto.common.network import network_of
from zcproto.errors import ResourceExhausted

BURST_S: Final = 2.0
MAX_KEYS: Final = 16_384
"""Users or addresses counted separately, about 200 bytes each."""

LIMIT_NAMES: Final = (
    "requests_per_user",
    "requests_per_address",
    "public_requests_per_address",
    "running_per_user",
    "running_per_address",
)
"""The keys in `[limits]`."""

UNLIMITED: Final = "session."
"""Methods that begin with this are not counted."""

_RUNNING: Final = {"retry_after_ms": 250}
_SHARED: Final = ""


class RequestRate:
    """A token bucket for each key. `per_second` is 0 for no limit."""

    __slots__ = ("_max_keys", "_step", "full_at", "per_second")

    def __init__(self, per_second: int, max_keys: int = MAX_KEYS) -> None:
        self.full_at: dict[str, float] = {}
        """When each bucket will be full again, the last used one last. Those without an entry are full."""
        self._max_keys = max_keys
        self.set_rate(per_second)

    def __len__(self) -> int:
        return len(self.full_at)

    def set_rate(self, per_second: int) -> None:
        """Apply another rate. Buckets stay as they are."""
        self.per_second = per_second
        self._step = 1 / per_second if per_second else 0.0

    def admit(self, key: str, now: float) -> int:
        """Count a request and return 0, or return the milliseconds until one is admitted."""
        step, full_at = self._step, self.full_at
        if not step:
            return 0
        full = full_at.pop(key, None)
        if full is None:
            key = self._new_key(key, now)
            full = full_at.pop(key, now)
        full = max(full, now)
        wait = full + step - now - max(BURST_S, step)
        full_at[key] = full if wait > 0 else full + step
        return ceil(wait * 1000) if wait > 0 else 0

    def charge(self, key: str, cost: int, now: float) -> None:
        """Take tokens, or all that are left."""
        step = self._step
        if step:
            full = self.full_at.pop(key, None)
            if full is None:
                key = self._new_key(key, now)
                full = self.full_at.pop(key, now)
            self.full_at[key] = min(max(full, now) + cost * step, now + max(BURST_S, step))

    def left(self, key: str, now: float) -> float:
        """Return how many of the tokens of BURST_S a key has left."""
        return (BURST_S - max(self.full_at.get(key, now) - now, 0.0)) * self.per_second

    def _new_key(self, key: str, now: float) -> str:
        while len(self.full_at) >= self._max_keys:
            oldest, full = next(iter(self.full_at.items()))
            if full > now:
                return _SHARED
            del self.full_at[oldest]
        return key


@dataclass(frozen=True, slots=True)
class RequestSettings:
    """Requests a second and requests in progress; 0 for no limit."""

    per_user: int = 0
    per_address: int = 0
    public_per_address: int = 0
    running_per_user: int = 0
    running_per_address: int = 0


class RequestLimits:
    """Counts the requests of all connections. `refused` counts the refused ones by limit."""

    def __init__(self, settings: RequestSettings = RequestSettings()) -> None:
        self._users = RequestRate(settings.per_user)
        self._addresses = RequestRate(settings.per_address)
        self._public = RequestRate(settings.public_per_address)
        self._running_users: Counter[str] = Counter()
        self._running_addresses: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.reconfigure(settings)

    def reconfigure(self, settings: RequestSettings) -> None:
        """Apply other limits from the next request on."""
        self._settings = settings
        self._users.set_rate(settings.per_user)
        self._addresses.set_rate(settings.per_address)
        self._public.set_rate(settings.public_per_address)
        self.counts_running = bool(settings.running_per_user or settings.running_per_address)
        """Whether `begin` and `end` have to be called for requests that wait."""
        self.checks_sessions = bool(self.counts_running or settings.per_user or settings.per_address)
        """Whether requests with a session have to be checked; those without one always do."""

    @property
    def most_running_per_user(self) -> int:
        """The requests in progress of the user with most of them."""
        return max(self._running_users.values(), default=0)

    @property
    def most_running_per_address(self) -> int:
        return max(self._running_addresses.values(), default=0)

    def check(self, user: str | None, peer: str, now: float) -> ResourceExhausted | None:
        """Count a request. Return the error if it must be refused. `user` is None without a session."""
        settings, network = self._settings, network_of(peer)
        if user is not None:
            if settings.running_per_user and self._running_users[user] >= settings.running_per_user:
                self.refused["running_per_user"] += 1
                return ResourceExhausted(
                    "too many requests of this user are running; wait for one to end", _RUNNING
                )
            wait_ms = self._users.admit(user, now)
            if wait_ms:
                self.refused["requests_per_user"] += 1
                return ResourceExhausted(
                    "too many requests of this user; send fewer a second", {"retry_after_ms": wait_ms}
                )
        else:
            wait_ms = self._public.admit(network, now)
            if wait_ms:
                self.refused["public_requests_per_address"] += 1
                return ResourceExhausted(
                    "too many requests without a session from this address; send fewer a second",
                    {"retry_after_ms": wait_ms},
                )
        if settings.running_per_address and self._running_addresses[network] >= settings.running_per_address:
            self.refused["running_per_address"] += 1
            return ResourceExhausted(
                "too many requests from this address are running; wait for one to end", _RUNNING
            )
        wait_ms = self._addresses.admit(network, now)
        if wait_ms:
            self.refused["requests_per_address"] += 1
            return ResourceExhausted(
                "too many requests from this address; send fewer a second", {"retry_after_ms": wait_ms}
            )
        return None

    def begin(self, user: str | None, peer: str) -> None:
        """Count a request that waits; call `end` with the same arguments when it has ended."""
        if user is not None:
            self._running_users[user] += 1
        self._running_addresses[network_of(peer)] += 1

    def end(self, user: str | None, peer: str) -> None:
        if user is not None:
            _decrement(self._running_users, user)
        _decrement(self._running_addresses, network_of(peer))


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
