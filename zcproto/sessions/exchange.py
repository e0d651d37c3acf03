"""Exchange sessions between the in-memory table and a store.

Decides how a stored record becomes a session that tokens are checked against, and back.

Rules:
- An ended session stays ended: no record of a store, which may be older, revives it.
- Forgetting is not ending: observers are not notified, and the token is unknown until the session is restored.
- If the table is full, a restored session evicts one that has not been used recently and can be restored itself.

It must not know: the store, connections, clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from zcproto.errors import Code
from zcproto.sessions.lifecycle import Lifecycle
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.session import EndReason
from zcproto.sessions.table import LIVE, NONE, TOKEN_ONLY

EVICTION_SAMPLE: Final = 64
"""Slots sampled to find the least recently used session."""

_ENDED_CODES: Final = frozenset({Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED})


class Exchange(Lifecycle):
    """The session table as a store uses it. Ids are the 16 raw bytes."""

    def restore(self, record: SessionRecord, *, make_room: bool = False) -> bool:
        """Insert or replace a session from its stored record.

        Return False if it has ended here, or if the table is full and `make_room` is not set.
        """
        table = self._table
        self._wall = max(self._wall, record.last_used_at)
        slot = table.ids.find(record.id)
        if slot != NONE:
            if not self._is_kept(slot):
                return False
            if table.tokens[slot] == record.token_digest:
                self._update(slot, record)
                return True
        if table.tokens.find(record.token_digest) != NONE:
            return False  # the token was valid once and is not any more
        if slot != NONE:
            self._forget(slot)
        elif self.kept >= self._settings.max_sessions:
            if not make_room:
                return False
            self._evict()
        added = table.add(record)
        self._live += 1
        if make_room or slot != NONE:  # not while a store is loaded: no connection has any of its sessions
            self._note_rotation(added)
            self._announce()
        return True

    def restore_ended(self, ended: EndedRecord) -> None:
        """Insert a tombstone from a store. If its session is known here, it ends."""
        assert ended.code in _ENDED_CODES
        if not self.end(ended.id, ended.code, EndReason.UNKNOWN, ended.ended_at) and (
            self._table.tokens.find(ended.token_digest) == NONE
        ):
            self._table.add_token_tombstone(ended.token_digest, ended.code, ended.ended_at)
            self._drop_surplus_tombstone()

    def end(self, session_id: bytes, code: Code, reason: EndReason, wall: int) -> bool:
        """End a live or lapsed session on behalf of a store. Return False if the id is unknown."""
        slot = self._slot_of(session_id)
        if slot == NONE:
            return False
        self._wall = wall
        if code is Code.SESSION_REPLACED:
            self.replaced += 1
        self._end(slot, code, reason)
        self._announce()
        return True

    def forget(self, session_id: bytes) -> bool:
        """Forget a live or lapsed session. Return False if the id is unknown."""
        slot = self._slot_of(session_id)
        if slot == NONE:
            return False
        self._forget(slot)
        return True

    def forget_unless(self, is_kept: Callable[[bytes], bool], start: int, max_slots: int) -> int:
        """Forget live and lapsed sessions for which `is_kept(id)` is False, in one slice of the table.

        Start at 0; return the start of the next slice, 0 at the end of the table.
        """
        slot, end = start, start + max_slots
        while slot < end and slot < self._table.slab.size:  # the slab shrinks while it empties
            if self._is_kept(slot) and not is_kept(self._table.ids[slot]):
                self._forget(slot)
            slot += 1
        return 0 if slot >= self._table.slab.size else slot

    def record(self, session_id: bytes) -> SessionRecord | None:
        """Return the record of a live or lapsed session, or None."""
        slot = self._slot_of(session_id)
        return None if slot == NONE else self._record(slot)

    def record_of(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        """Return the session of a token, its tombstone, or None."""
        slot = self._table.tokens.find(token_digest)
        if slot == NONE:
            return None
        return self._record(slot) if self._is_kept(slot) else self._tombstone(slot)

    def ended(self, session_id: bytes) -> EndedRecord | None:
        """Return the tombstone of an ended session, or None."""
        slot = self._table.ids.find(session_id)
        return None if slot == NONE or self._is_kept(slot) else self._tombstone(slot)

    def _tombstone(self, slot: int) -> EndedRecord:
        table = self._table
        session_id = b"" if table.flags[slot] & TOKEN_ONLY else table.ids[slot]
        return EndedRecord(session_id, table.tokens[slot], Code(self._state[slot]), self._last_used_at[slot])

    def ended_since(self, wall: int) -> list[EndedRecord]:
        """Return the tombstones of sessions that were revoked or replaced since `wall`, oldest first."""
        table = self._table
        return [
            self._tombstone(slot)
            for slot in table.tombstone_slots()
            if self._state[slot] != Code.TOKEN_EXPIRED
            and not table.flags[slot] & TOKEN_ONLY
            and self._last_used_at[slot] >= wall
        ]

    def records(self, user: str | None, limit: int) -> list[SessionRecord]:
        """Return the oldest `limit` live and lapsed sessions of a user (None: of all), oldest first."""
        table = self._table
        if user is not None:
            return [self._record(slot) for slot in table.of_user(user)[:limit]]
        slots = [slot for slot in range(table.slab.size) if self._is_kept(slot)]
        slots.sort(key=table.created_at.__getitem__)
        return [self._record(slot) for slot in slots[:limit]]

    def uses(self, since: int, start: int, max_slots: int) -> tuple[int, list[tuple[bytes, int]]]:
        """Return the sessions (id, time) of one slice that were used after `since`, with the start of the next
        slice.

        Start at 0; the next start is 0 at the end of the table.
        """
        table = self._table
        end = min(start + max_slots, table.slab.size)
        used = [
            (table.ids[slot], self._last_used_at[slot])
            for slot in range(start, end)
            if self._state[slot] == LIVE and self._last_used_at[slot] > since
        ]
        return (0 if end >= table.slab.size else end), used

    def _update(self, slot: int, record: SessionRecord) -> None:
        table = self._table
        if record.expires_at < table.expires_at[slot]:
            self.generation += 1
        table.expires_at[slot] = record.expires_at
        table.refresh_expires_at[slot] = record.refresh_expires_at
        table.last_used_at[slot] = max(table.last_used_at[slot], record.last_used_at)
        table.set_refresh_digest(slot, record.refresh_digest)

    def _forget(self, slot: int) -> None:
        if self._state[slot] == LIVE:
            self._live -= 1
            self.generation += 1
        self._grace.drop(self._table.ids[slot])
        self._table.drop(slot)

    def _evict(self) -> None:
        """Forget the least recently used session of a sample. There must be at least one session."""
        size, sampled, oldest = self._table.slab.size, 0, NONE
        while sampled < EVICTION_SAMPLE or oldest == NONE:
            slot = self._eviction_cursor = (self._eviction_cursor + 1) % size
            sampled += 1
            if self._is_kept(slot) and (
                oldest == NONE or self._last_used_at[slot] < self._last_used_at[oldest]
            ):
                oldest = slot
        self._forget(oldest)

    def _record(self, slot: int) -> SessionRecord:
        table = self._table
        key, roles = table.key[slot], table.roles[slot]
        return SessionRecord(
            id=table.ids[slot],
            token_digest=table.tokens[slot],
            refresh_digest=table.refresh_digest(slot),
            user=table.users[table.user[slot]],
            client=table.clients[table.client[slot]],
            address=table.addresses[table.address[slot]],
            flags=table.flags[slot],
            created_at=table.created_at[slot],
            last_used_at=table.last_used_at[slot],
            expires_at=table.expires_at[slot],
            refresh_expires_at=table.refresh_expires_at[slot],
            key="" if key == NONE else table.keys[key],
            roles="" if roles == NONE else table.keys[roles],
            origin=table.origin(slot),
        )
