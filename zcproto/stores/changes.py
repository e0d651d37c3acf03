"""Applies what other processes did in a shared store to the registry of this one.

What this file decides:
- A session changed by another process is dropped from the registry if no connection uses it. Otherwise the store
  is asked for it within the second.
- A store that lost its data (EMPTIED) gets the sessions that are known here back: those in use before anything
  else, so that their users notice nothing. After the grace period it does not, because tokens are refused then.

It must not know: connections (except whether one uses a session), how a call is answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from itertools import islice
from typing import Any, Final

from zcproto.errors import Code
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.token import id_text
from zcproto.stores.base import NO_LIMIT, Change, ChangeKind, StoreUnavailable
from zcproto.stores.operations import Call
from zcproto.stores.revoker import RETRY_PAUSE_S, Revoker, end_here

SLOTS: Final = 2_000
"""Sessions looked at in one turn of the event loop, about a millisecond."""

MAX_CHECKS: Final = 64
"""Sessions checked in the store at once."""

CHANGES: Final = 4_096
"""Changed sessions that are remembered, for `has_changed`."""

IsUsed = Callable[[str], bool]
"""Whether a connection uses a session, by the text of its id."""

Found = SessionRecord | EndedRecord

log = get_logger("zcproto.store")


class ChangeTracker:
    """Changes by other processes. `count` numbers them."""

    def __init__(self, revoker: Revoker, is_used: IsUsed) -> None:
        self._revoker = revoker
        self._breaker = revoker.breaker
        self._store = revoker.breaker.store
        self._registry = revoker.registry
        self._is_used = is_used
        self._all_changed = False
        self._is_emptied = False
        self._to_check: dict[bytes, int] = {}  # with the number of the change that made it necessary
        self._to_restore: dict[bytes, int] = {}
        self._is_checking = False
        self._changed_at: OrderedDict[bytes, int] = OrderedDict()
        self._all_changed_at = 0
        self.count = 0

    def has_changed(self, session_id: bytes, since: int) -> bool:
        """Return whether another process may have changed a session since `count` was `since`."""
        return self._all_changed_at > since or self._changed_at.get(session_id, 0) > since

    async def fetch(
        self, operation: Callable[[], Coroutine[Any, Any, Found | None]], call: Call | None = None
    ) -> Found | None:
        """Read a session from the store, again if it was changed meanwhile."""
        while True:
            count = self.count
            found: Found | None = await (call or self._breaker.call)(operation())
            if found is None or not self.has_changed(found.id, count):
                return found

    def apply(self, found: Found | None) -> None:
        """Update the registry with a session read from the store."""
        if isinstance(found, SessionRecord):
            self._registry.restore(found, make_room=self._store.shared)
        elif found is not None:
            end_here(self._registry, found)

    async def ensure_stored(self, session_id: bytes) -> None:
        """Restore a session that the store has lost, before it is asked about it."""
        if session_id in self._to_restore:
            await self._restore(self._breaker.call, [session_id])

    def handle(self, change: Change) -> None:
        """Handle a change by another process, reported by the store."""
        self.count += 1
        if change.kind is not ChangeKind.SESSION:
            self._all_changed_at = self.count
            self._changed_at.clear()
            self._all_changed = True
            if change.kind is ChangeKind.EMPTIED:
                self._is_emptied = True
                log.error("store.emptied", sessions=len(self._registry))
                self._revoker.on_event("store.emptied", {"sessions": len(self._registry)})
            self.start_checking()
            return
        self._changed_at.pop(change.id, None)
        self._changed_at[change.id] = self.count
        if len(self._changed_at) > CHANGES:
            _, self._all_changed_at = self._changed_at.popitem(last=False)
        if self._is_used(id_text(change.id)):
            self._to_check[change.id] = self.count
            self.start_checking()
        else:
            self._registry.forget(change.id)

    def start_checking(self) -> None:
        # After an outage everything is checked, so nothing is started during one.
        tasks = self._revoker.tasks
        if not self._is_checking and self._breaker.health.is_healthy and not tasks.is_stopping:
            self._is_checking = True
            tasks.run_in_background(self._check_changed())

    async def _check_changed(self) -> None:
        call = self._breaker.call
        try:
            while self._breaker.health.is_healthy:
                if self._all_changed:
                    work = self.check_all(call)
                elif self._to_check:
                    work = self._check(call, islice(self._to_check, MAX_CHECKS))
                elif self._to_restore:
                    work = self._restore(call, islice(self._to_restore, MAX_CHECKS))
                else:
                    break
                try:
                    await work
                except StoreUnavailable:
                    await asyncio.sleep(RETRY_PAUSE_S)
        finally:
            self._is_checking = False

    async def check_all(self, call: Call) -> None:
        """Drop the sessions that are not in use and check the others; or restore all if the store lost them."""
        emptied, used = self._is_emptied and not self._registry.closed, []

        def is_kept(session_id: bytes) -> bool:
            is_used = self._is_used(id_text(session_id))
            if is_used:
                used.append(session_id)
            elif emptied:
                self._to_restore[session_id] = self.count
            return is_used or emptied

        self._all_changed = self._is_emptied = False
        try:
            start = -1
            while start:
                start = self._registry.forget_unless(is_kept, max(start, 0), SLOTS)
                await asyncio.sleep(0)
            work = self._restore if emptied else self._check
            for first in range(0, len(used), MAX_CHECKS):
                await work(call, used[first : first + MAX_CHECKS])
        except BaseException:
            self._all_changed, self._is_emptied = True, self._is_emptied or emptied
            raise
        if emptied:
            self._revoker.repeat_after_loss()

    async def _check(self, call: Call, ids: Iterable[bytes]) -> None:
        """Update sessions in the registry from the store."""

        async def check(session_id: bytes) -> None:
            found = await self.fetch(partial(self._store.get, session_id), call)
            self.apply(found)
            if found is None:
                wall = self._revoker.clock.wall()
                self._registry.end(session_id, Code.TOKEN_REVOKED, EndReason.ELSEWHERE, wall)

        await _process(self._to_check, ids, check)

    async def _restore(self, call: Call, ids: Iterable[bytes]) -> None:
        """Write sessions back that the store has lost."""

        async def restore(session_id: bytes) -> None:
            record = self._registry.record(session_id)
            if record is not None:
                await call(self._store.create(record, NO_LIMIT))
                # Another process may have restored it first, and it may have been changed or ended since.
                self.apply(await self.fetch(partial(self._store.get, session_id), call))

        await _process(self._to_restore, ids, restore)


async def _process(
    waiting: dict[bytes, int], ids: Iterable[bytes], work: Callable[[bytes], Awaitable[None]]
) -> None:
    """Process sessions concurrently and remove them from `waiting`, except those changed again meanwhile."""
    begun = {session_id: waiting.get(session_id) for session_id in ids}
    await asyncio.gather(*map(work, begun))
    for session_id, change in begun.items():
        if waiting.get(session_id) == change:
            waiting.pop(session_id, None)
