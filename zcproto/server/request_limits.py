"""Limits of what one user and one address may request: requests a second, and requests in progress.

Decides: which requests are refused, and when their callers may retry.

Rules:
- Requests without a session, and all by HTTP, count for their address, those with one for their user too.
- Logins and refreshes are left to their own limits: a client that is refused here must still get its session.

It must not know: connections, how a method is run, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from zcproto.common.counts import ALONE, Counting
from zcproto.common.network import network_of
from zcproto.errors import ResourceExhausted

LIMIT_NAMES: Final = (
    "requests_per_user",
    "requests_per_address",
    "public_requests_per_address",
    "running_per_user",
    "running_per_address",
)
"""The keys in `[limits]`."""

_RUNNING: Final = {"retry_after_ms": 250}


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

    def __init__(self, settings: RequestSettings = RequestSettings(), counting: Counting = ALONE) -> None:
        self._users = counting.rate("requests_per_user")
        self._addresses = counting.rate("requests_per_address")
        self._public = counting.rate("public_requests_per_address")
        self._running_users = counting.counts("running_per_user")
        self._running_addresses = counting.counts("running_per_address")
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
        return self._running_users.most

    @property
    def most_running_per_address(self) -> int:
        return self._running_addresses.most

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
            self._running_users.add(user)
        self._running_addresses.add(network_of(peer))

    def end(self, user: str | None, peer: str) -> None:
        if user is not None:
            self._running_users.remove(user)
        self._running_addresses.remove(network_of(peer))
