"""Delay logins by the failures that all workers of a server have seen.

    worker: SharedThrottle.check -> no recent failure of the user or network in any worker: 0
                                 -> otherwise a call -> throttle_topics -> Throttle, in one process

Decides: when that process has to be asked, and what holds while it cannot be.

Rules:
- A login without a recent failure of its user or its network costs no message: the workers mark both in shared
  counts when a login fails.
- A failed login is answered when it has been counted for all, so that the next attempt meets its delay.
- A refusal is remembered, for at most a second: an attacker who does not wait costs one call a second.
- A worker also counts for itself. Its own counts decide while the other process is away: that is less strict by the
  number of workers, and never open. A process that replaces it begins without failures.

It must not know: the link between the processes, how users authenticate; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import ceil
from typing import Any, Final, Protocol

from zcproto.auth.throttle import QUIET_S, Pair, Throttle
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.network import network_of
from zcproto.errors import ZcprotoError
from zcproto.workers.limits import WorkerCounting

CHECK: Final = "throttle.check"
FAILED: Final = "throttle.failed"
SUCCEEDED: Final = "throttle.succeeded"

WITHIN_S: Final = 0.5
"""How long the other process may take, before a worker decides by its own counts."""

REMEMBERED_S: Final = 1.0
MAX_REMEMBERED: Final = 16_384
"""Refusals; and users at a network whose successful login was reported."""


class ThrottleLink(Protocol):
    """The connection to the process that counts for all."""

    async def call(self, topic: str, *arguments: Any, within: float) -> Any:
        """Call it. Raises ZcprotoError if it cannot be reached, or refuses."""

    def notify(self, topic: str, *arguments: Any) -> bool: ...


class SharedThrottle:
    """The throttle of one worker."""

    def __init__(self, link: ThrottleLink, counting: WorkerCounting, login_failures: int) -> None:
        self._link = link
        self._own = Throttle(login_failures)
        self._users = counting.failures("user", QUIET_S)
        self._networks = counting.failures("network", QUIET_S)
        self._refused: OrderedDict[Pair, tuple[float, float]] = OrderedDict()
        self._reported: OrderedDict[Pair, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._own)

    def reconfigure(self, login_failures: int) -> None:
        """Change the number of free failures, for the time in which this worker decides."""
        self._own.reconfigure(login_failures)

    def link_lost(self, *_: object) -> None:
        """Forget what the other process knows: another one may replace it."""
        self._reported.clear()
        self._refused.clear()

    def check(self, user: str, address: str, now: float) -> int | Awaitable[int]:
        """Return the milliseconds that a login has to wait, or 0; to be awaited if it may have to."""
        network = network_of(address)
        if not self._has_failures(user, network, now):
            return 0
        asked_at, until = self._refused.get((user, network), (0.0, 0.0))
        if asked_at <= now < min(asked_at + REMEMBERED_S, until):
            return ceil((until - now) * MS_PER_SECOND)
        return self._ask(user, address, now)

    def failed(self, user: str, address: str, now: float) -> Awaitable[None]:
        """Count a refused login. Await the result before answering it."""
        self._own.failed(user, address, now)
        self._users.add(user, 1, now)
        self._networks.add(network_of(address), 1, now)
        return self._report_failure(user, address)

    def succeeded(self, user: str, address: str, now: float) -> None:
        """Record a successful login."""
        self._own.succeeded(user, address, now)
        network = network_of(address)
        pair = (user, network)
        if pair not in self._reported or self._has_failures(user, network, now):
            self._refused.pop(pair, None)
            if self._link.notify(SUCCEEDED, user, address):
                _remember(self._reported, pair, None)

    def _has_failures(self, user: str, network: str, now: float) -> bool:
        users, networks = self._users, self._networks
        return bool(
            (user and users.count(user, now, is_whole=True)) or networks.count(network, now, is_whole=True)
        )

    async def _ask(self, user: str, address: str, now: float) -> int:
        try:
            wait_ms: int = await self._link.call(CHECK, user, address, within=WITHIN_S)
        except ZcprotoError:
            return self._own.check(user, address, now)
        if wait_ms:
            _remember(self._refused, (user, network_of(address)), (now, now + wait_ms / MS_PER_SECOND))
        return wait_ms

    async def _report_failure(self, user: str, address: str) -> None:
        with suppress(ZcprotoError):  # counted here
            await self._link.call(FAILED, user, address, within=WITHIN_S)


def _remember(table: OrderedDict[Pair, Any], pair: Pair, value: object) -> None:
    table[pair] = value
    table.move_to_end(pair)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def throttle_calls(
    throttle: Throttle, now: Callable[[], float]
) -> tuple[dict[str, Callable[..., Awaitable[Any]]], dict[str, Callable[..., object]]]:
    """Return the handlers of calls and of notices, by topic, of the process that counts for all."""

    async def check(link: object, user: str, address: str) -> int:
        return throttle.check(user, address, now())

    async def failed(link: object, user: str, address: str) -> None:
        throttle.failed(user, address, now())

    def succeeded(link: object, user: str, address: str) -> None:
        throttle.succeeded(user, address, now())

    return {CHECK: check, FAILED: failed}, {SUCCEEDED: succeeded}
