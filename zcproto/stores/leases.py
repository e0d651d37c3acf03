"""Finds the sessions that no connection uses, so that a login at the limit ends one of those.

Decides: which sessions of a user count as disconnected, and when leases are written.

Rules:
- A session counts as in use unless it is known that no connection uses it.
- Without a shared store, this process has all connections. Clients that were connected before it started have
  LEASE_S to come back.
- In a shared store each process keeps a lease on each session that its connections use. Leases are renewed in
  batches; the begin and the end of a connection are written soon. A request costs nothing.
- A session whose lease was given up is disconnected at once. One whose lease has expired, because its process
  crashed or lost the store, is so only after this process has had the store for LEASE_S without a gap: after an
  outage or a failover all processes need time to renew theirs.
- A server that stops gives up no leases: its clients are about to come back.

It must not know: connections (except which sessions they use), how the store keeps a lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import ResourceExhausted
from zcproto.sessions import SessionRegistry
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.sessions.token import id_from_text, id_text
from zcproto.stores.base import LEASE_MS, StoreUnavailable
from zcproto.stores.operations import BackgroundTasks, CircuitBreaker

LEASE_S: Final = LEASE_MS / MS_PER_SECOND
RENEW_S: Final = 20.0
"""How often leases are renewed: twice may fail."""

DELAY_S: Final = 0.05
"""How long changes are collected: thousands of connections may end at once."""

RETRY_S: Final = 1.0
BATCH: Final = 200
"""Leases written in one operation, which blocks the store for about 2 ms."""

MAX_CHANGED: Final = 131_072
"""Changes that wait for the store. Without the oldest ones a lease expires later than it could."""

IsUsed = Callable[[str], bool]
"""Whether a connection uses a session, by the text of its id."""


class Leases:
    """The leases of one process. `in_use` returns the sessions that its connections use."""

    def __init__(
        self,
        breaker: CircuitBreaker,
        registry: SessionRegistry,
        is_used: IsUsed,
        in_use: Callable[[], Iterable[str]],
        tasks: BackgroundTasks,
        wheel: DeadlineWheel,
        clock: Clock,
    ) -> None:
        self._breaker = breaker
        self._store = breaker.store
        self._registry = registry
        self._is_used = is_used
        self._in_use = in_use
        self._tasks = tasks
        self._wheel = wheel
        self._clock = clock
        self._changed: dict[str, None] = {}
        self._lock = asyncio.Lock()
        self._is_planned = False
        self._began = clock.wall()
        self._trusted_at = self._renew_at = clock.now() + LEASE_S
        self.is_registry_complete: Callable[[], bool] = lambda: True
        """Whether the registry has all sessions of a store that is not shared."""
        self.unjoined: set[bytes] = set()
        """Sessions that are being opened, so that no connection can use them yet."""
        self.deadline_tick = 0

    async def complete(self, limit: UserLimit, user: str) -> UserLimit:
        """Return the limit with what is known of the user's sessions.

        Raises StoreUnavailable, ResourceExhausted.
        """
        is_trusted = self._clock.now() >= self._trusted_at
        if self._store.shared:
            await self._write()
            return replace(limit, counts_expired=is_trusted)
        if self.is_registry_complete():
            records: Sequence[SessionRecord] = self._registry.records(user, self._registry.kept)
        else:
            records = await self._breaker.call(self._store.list(user))
        disconnected = frozenset(
            record.id
            for record in records
            if not self._is_used(id_text(record.id))
            and record.id not in self.unjoined
            and (is_trusted or record.created_at >= self._began)
        )
        return replace(limit, disconnected=disconnected)

    def connection_changed(self, session_id: str) -> None:
        """Note that a session got its first connection here, or lost its last one."""
        if not self._store.shared:
            return
        self._changed[session_id] = None
        if len(self._changed) > MAX_CHANGED:
            del self._changed[next(iter(self._changed))]
        if not self._is_planned:
            self._is_planned = True
            self._plan(min(self._clock.now() + DELAY_S, self._renew_at))

    def begin(self) -> None:
        """Renew all leases soon: the store was reached after a gap, in which it may have lost them."""
        if self._store.shared:
            now = self._clock.now()
            self._trusted_at, self._renew_at = now + LEASE_S, now
            self._plan(now)

    def handle_deadline(self, now: float) -> None:
        self._is_planned = False
        if now >= self._renew_at:
            self._renew_at = now + RENEW_S
            self._changed |= dict.fromkeys(self._in_use())
        if self._changed:
            self._tasks.run_in_background(self._write_or_retry())
        self._plan(self._renew_at)

    def _plan(self, at: float) -> None:
        if not self._tasks.is_stopping:
            self._wheel.set(self, at)

    async def _write_or_retry(self) -> None:
        try:
            await self._write()
        except (StoreUnavailable, ResourceExhausted):
            self._plan(min(self._clock.now() + RETRY_S, self._renew_at))
            raise

    async def _write(self) -> None:
        """Write what has changed until now, or restore it to be written later."""
        async with self._lock:
            while self._changed:
                some = dict.fromkeys(islice(self._changed, BATCH))
                for session_id in some:
                    del self._changed[session_id]  # if it changes meanwhile it is written again
                uses = [
                    (raw, self._is_used(session_id))
                    for session_id in some
                    if (raw := id_from_text(session_id)) is not None
                ]
                try:
                    await self._breaker.call(self._store.lease(uses))
                except BaseException:
                    self._changed = some | self._changed
                    raise
