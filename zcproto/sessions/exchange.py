"""What passes between the sessions known here and a store that keeps them.

What this file decides: how a session of a store becomes one that tokens are checked against, and back.

Rules:
- What ended here stays ended: no record of a store, which may be older, brings it back.
- A session that is forgotten did not end. Nobody is told; its token is unknown until the session is restored.
- Where the table is full, a session that can be restored makes room: one that was not used for long.

It must not know: the store, connections, clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from zcproto.errors import Code
from zcproto.sessions.lifecycle import Lifecycle
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.table import LIVE, NONE, TOKEN_ONLY

LOOKED_AT: Final = 64
"""Slots among which the one that was used longest ago makes room."""

_ENDED_CODES: Final = frozenset({Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED})


class Exchange(Lifecycle):
    """The table of sessions, as a store sees it. Ids are the 16 bytes."""

    __slots__ = ()

    def restore(self, record: SessionRecord, *, make_room: bool = False) -> bool:
        """Take in a session as a store keeps it, instead of what was known of it.

        False if it has ended here, or if there is no room (with `make_room` another is forgotten for it).
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
            return False  # a token that was good once, and is no more
        if slot != NONE:
            self._forget(slot)
        elif self.kept >= self._settings.max_sessions:
            if not make_room:
                return False
            self._make_way()
        table.add(
            record.user,
            record.client,
            record.address,
            record.key,
            record.flags,
            record.created_at,
            record.last_used_at,
            record.expires_at,
            record.refresh_expires_at,
            record.id,
            record.token_digest,
            record.refresh_digest,
        )
        self._live += 1
        return True

    def restore_ended(self, ended: EndedRecord) -> None:
        """Take in the memory of a token that was good once. Its session, if it is known here, ends."""
        assert ended.code in _ENDED_CODES
        if not self.end(ended.id, ended.code, "", ended.ended_at) and (
            self._table.tokens.find(ended.token_digest) == NONE
        ):
            self._table.bury_token(ended.token_digest, ended.code, ended.ended_at)
            self._forget_surplus()

    def end(self, session_id: bytes, code: Code, reason: str, wall: int) -> bool:
        """End a session, live or lapsed, as a store says. False if none has this id."""
        slot = self._table.ids.find(session_id)
        if slot == NONE or not self._is_kept(slot):
            return False
        self._wall = wall
        if code is Code.TOKEN_REVOKED:
            self.revoked += 1
        elif code is Code.SESSION_REPLACED:
            self.replaced += 1
        self._end(slot, code, reason)
        self._announce()
        return True

    def forget(self, session_id: bytes) -> bool:
        """Know nothing of a live or lapsed session any more. False if nothing was known."""
        slot = self._table.ids.find(session_id)
        if slot == NONE or not self._is_kept(slot):
            return False
        self._forget(slot)
        return True

    def forget_all(self) -> None:
        """Know nothing of any live or lapsed session any more."""
        slot = 0
        while slot < self._table.slab.size:  # it shrinks as it empties
            if self._is_kept(slot):
                self._forget(slot)
            slot += 1

    def forget_unless(self, is_kept: Callable[[bytes], bool], start: int, max_slots: int) -> int:
        """A slice of the table: know nothing any more of live and lapsed sessions, but for those (by id) that are
        to be kept. It begins at 0, and 0 comes back when the table is through."""
        slot, end = start, start + max_slots
        while slot < end and slot < self._table.slab.size:  # it shrinks as it empties
            if self._is_kept(slot) and not is_kept(self._table.ids[slot]):
                self._forget(slot)
            slot += 1
        return 0 if slot >= self._table.slab.size else slot

    def record(self, session_id: bytes) -> SessionRecord | None:
        """A live or lapsed session, as a store keeps it."""
        slot = self._table.ids.find(session_id)
        return None if slot == NONE or not self._is_kept(slot) else self._record(slot)

    def record_of(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        """The session of a token, or the memory of one."""
        table = self._table
        slot = table.tokens.find(token_digest)
        if slot == NONE:
            return None
        if self._is_kept(slot):
            return self._record(slot)
        session_id = b"" if table.flags[slot] & TOKEN_ONLY else table.ids[slot]
        return EndedRecord(session_id, token_digest, Code(self._state[slot]), self._last_used_at[slot])

    def ended(self, session_id: bytes) -> EndedRecord | None:
        """The memory of a session that has ended."""
        table = self._table
        slot = table.ids.find(session_id)
        if slot == NONE or self._is_kept(slot):
            return None
        return EndedRecord(session_id, table.tokens[slot], Code(self._state[slot]), self._last_used_at[slot])

    def ended_since(self, code: Code, wall: int) -> list[EndedRecord]:
        """The memories of sessions that have ended with a code, since that time. It looks at the whole table."""
        table = self._table
        return [
            EndedRecord(table.ids[slot], table.tokens[slot], code, self._last_used_at[slot])
            for slot in range(table.slab.size)
            if self._state[slot] == code
            and not table.flags[slot] & TOKEN_ONLY
            and self._last_used_at[slot] >= wall
        ]

    def records(self, user: str | None, limit: int) -> list[SessionRecord]:
        """A user's live and lapsed sessions, or everybody's; the oldest `limit`, the oldest first."""
        table = self._table
        if user is not None:
            return [self._record(slot) for slot in table.of_user(user)[:limit]]
        slots = [slot for slot in range(table.slab.size) if self._is_kept(slot)]
        slots.sort(key=table.created_at.__getitem__)
        return [self._record(slot) for slot in slots[:limit]]

    def uses(self, since: int, start: int, max_slots: int) -> tuple[int, list[tuple[bytes, int]]]:
        """A slice of the sessions (id, time) that were used after `since`, and where the next slice starts.

        It begins at 0, and 0 comes back when the table is through.
        """
        table = self._table
        end = min(start + max_slots, table.slab.size)
        used = [
            (table.ids[slot], self._last_used_at[slot])
            for slot in range(start, end)
            if self._state[slot] == LIVE and self._last_used_at[slot] > since
        ]
        return (0 if end >= table.slab.size else end), used

    # Parts

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

    def _make_way(self) -> None:
        """Forget the session that was used longest ago among some. There is at least one."""
        size, looked_at, oldest = self._table.slab.size, 0, NONE
        while looked_at < LOOKED_AT or oldest == NONE:
            slot = self._way_cursor = (self._way_cursor + 1) % size
            looked_at += 1
            if self._is_kept(slot) and (
                oldest == NONE or self._last_used_at[slot] < self._last_used_at[oldest]
            ):
                oldest = slot
        self._forget(oldest)

    def _record(self, slot: int) -> SessionRecord:
        table = self._table
        key = table.key[slot]
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
        )
