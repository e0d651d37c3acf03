"""End sessions: by expiry, revocation or eviction, and keep tombstones of them.

Decides when a session is live, lapsed or ended, and notifies observers.

Rules:
- A token is valid while `wall` is below its `expires_at` and below its last use plus the idle limit. A session once
  seen expired stays expired, even if the clock goes back.
- A session whose token has expired stays, lapsed, while its refresh token is valid.
- `generation` grows whenever a token may have become invalid.
- Tombstones are kept for a time and up to a number, so that holders of ended tokens learn why. Without one a token
  is refused as unknown; dropping a tombstone never makes a token valid.
- A change is complete before observers are notified of it.

It must not know: how sessions begin; connections, stores, clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from zcproto.errors import Code
from zcproto.sessions.grace import GraceTable
from zcproto.sessions.session import EndReason, SessionSettings
from zcproto.sessions.table import FREE, LAPSED, LIVE, NONE, SessionTable
from zcproto.sessions.token import id_from_text, id_text

Observer = Callable[[str, Code, EndReason], None]
RotationObserver = Callable[[str, bytes], None]

NEVER: Final = 2**63
_ENDING_COST: Final = 4  # ending a session takes about as long as scanning this many


class Lifecycle:
    """The session table and how sessions leave it. Base of `SessionRegistry`."""

    def __init__(self, settings: SessionSettings) -> None:
        # One more slot: a refresh adds a tombstone before the oldest one is dropped.
        self._table = table = SessionTable(settings.max_sessions + settings.dead_limit + 1)
        self._grace = GraceTable(settings.refresh_grace_ms, settings.grace_limit)
        self._state = table.state
        self._expires_at = table.expires_at
        self._last_used_at = table.last_used_at
        self._apply(settings)
        self._ended: list[tuple[bytes, Code, EndReason]] = []  # not yet announced to observers
        self._rotated_ids: list[bytes] = []  # likewise
        self._wall = 0  # of the last call that passed it; the time of death of sessions ended without one
        self._cursor = 0
        self._eviction_cursor = 0
        self._live = 0
        self.generation = 0
        self.closed = False  # refuse every token; see `SessionRegistry.refuse_all`
        self.trusted_until = (
            NEVER  # a time from which on every token is refused; see `SessionRegistry.distrust`
        )
        self.observers: list[Observer] = []
        self.rotation_observers: list[RotationObserver] = []
        self.opened = self.refreshed = self.expired = self.revoked = self.replaced = 0
        self.refresh_reused = self.checks_refused = self.sweeps = 0

    def __len__(self) -> int:
        """Return the number of live sessions, including those not yet found expired."""
        return self._live

    @property
    def lapsed(self) -> int:
        """Return the number of lapsed sessions."""
        return self.kept - self._live

    @property
    def kept(self) -> int:
        """Return the number of live and lapsed sessions."""
        return self._table.tokens.count - self._table.tombstones

    @property
    def tombstones(self) -> int:
        """Return the number of tombstones."""
        return self._table.tombstones

    @property
    def settings(self) -> SessionSettings:
        return self._settings

    def reconfigure(self, settings: SessionSettings) -> None:
        """Apply new settings. Existing sessions keep their expiry; the idle limit changes for them too.

        `max_sessions`, `dead_limit` and `grace_limit` size the table and must not change.
        """
        assert (settings.max_sessions, settings.dead_limit, settings.grace_limit) == (
            self._settings.max_sessions,
            self._settings.dead_limit,
            self._settings.grace_limit,
        )
        self._apply(settings)
        self.generation += 1  # tokens may now expire at another time

    def _apply(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._idle = NEVER if settings.idle_timeout_ms is None else settings.idle_timeout_ms
        self._tenth = settings.lifetime_ms // 10
        self._grace.grace_ms = settings.refresh_grace_ms

    def clean(self, wall: int, max_slots: int) -> int:
        """Clean one slice of the table. Return the number of live tokens found expired.

        `max_slots` bounds the work: each scanned slot counts one, each ended session and dropped tombstone four
        more. A slice stops at the end of the table and then increments `sweeps`: call until it changes for a
        full pass.
        """
        self._wall = wall
        self._grace.expire(wall)
        before = self.expired
        work = max_slots - self._drop_old_tombstones(wall, max_slots // 2)
        state, slab, slot = self._state, self._table.slab, self._cursor
        while work > 0 and slot < slab.size:
            if FREE < state[slot] <= LAPSED and self._is_due(slot, wall):
                self._expire_if_due(slot, wall)
                work -= _ENDING_COST
            slot += 1
            work -= 1
        if slot >= slab.size:
            slot = 0
            self.sweeps += 1
        self._cursor = slot
        self._table.trim()
        self._announce()
        return self.expired - before

    def _drop_old_tombstones(self, wall: int, work: int) -> int:
        """Drop tombstones past their lifetime. Return the work done."""
        table, done = self._table, 0
        while done < work and table.tombstones and self._is_forgotten(table.first_tombstone, wall):
            table.drop_oldest_tombstone()
            done += _ENDING_COST
        return done

    def _drop_surplus_tombstone(self) -> None:
        if self._table.tombstones > self._settings.dead_limit:
            self._table.drop_oldest_tombstone()

    def _is_forgotten(self, slot: int, wall: int) -> bool:
        return wall - self._last_used_at[slot] >= self._settings.dead_keep_ms

    def expire(self, session_id: str, wall: int) -> None:
        """Let a session lapse or end now if it is due, before `clean` finds it."""
        raw = id_from_text(session_id)
        slot = NONE if raw is None else self._slot_of(raw)
        if slot != NONE:
            self._wall = wall
            self._expire_if_due(slot, wall)
            self._announce()

    def _is_kept(self, slot: int) -> bool:
        return FREE < self._state[slot] <= LAPSED

    def _slot_of(self, session_id: bytes) -> int:
        """Return the slot of a live or lapsed session, or NONE."""
        slot = self._table.ids.find(session_id)
        return slot if slot != NONE and self._is_kept(slot) else NONE

    def _is_due(self, slot: int, wall: int) -> bool:
        """Return True if a live session should have lapsed, or a lapsed one ended."""
        if self._state[slot] == LIVE:
            return wall >= self._expires_at[slot] or wall >= self._last_used_at[slot] + self._idle
        return wall >= self._table.refresh_expires_at[slot]

    def _expire_if_due(self, slot: int, wall: int) -> bool:
        """Let a live or lapsed session lapse or end if it is due. Return False if it has ended."""
        if not self._is_due(slot, wall):
            return True
        if self._state[slot] == LIVE:
            self.expired += 1
            reason = EndReason.EXPIRED if wall >= self._expires_at[slot] else EndReason.IDLE
            self._invalidate(slot, Code.TOKEN_EXPIRED, reason)
            self._state[slot] = LAPSED
        if wall < self._table.refresh_expires_at[slot]:
            return True
        self._end(slot, Code.TOKEN_EXPIRED, EndReason.UNKNOWN)
        return False

    def _refusal(self, slot: int, wall: int) -> Code:
        """Return the code for an invalid token."""
        if slot == NONE:
            return Code.UNAUTHENTICATED
        if self._is_kept(slot):
            self._expire_if_due(slot, wall)
            self._announce()
            return Code.TOKEN_EXPIRED
        return Code.UNAUTHENTICATED if self._is_forgotten(slot, wall) else Code(self._state[slot])

    def _invalidate(self, slot: int, code: Code, reason: EndReason) -> None:
        """Invalidate a live token."""
        self._live -= 1
        self.generation += 1
        if self.observers:
            self._ended.append((self._table.ids[slot], code, reason))

    def _end(self, slot: int, code: Code, reason: EndReason) -> None:
        """End a live or lapsed session for good."""
        if self._state[slot] == LIVE:
            self._invalidate(slot, code, reason)
        self._grace.drop(self._table.ids[slot])
        self._table.add_tombstone(slot, code, self._wall)
        self._drop_surplus_tombstone()

    def _revoke(self, slot: int, reason: EndReason) -> None:
        if reason is not EndReason.CLOSED:
            self.revoked += 1
        self._end(slot, Code.TOKEN_REVOKED, reason)

    def _note_rotation(self, slot: int) -> None:
        """Note that a session has another token than it may have had."""
        if self.rotation_observers:
            self._rotated_ids.append(self._table.ids[slot])

    def _announce(self) -> None:
        """Notify observers of the sessions that ended or got another token since the last call."""
        if self._ended:
            ended, self._ended = self._ended, []
            for session_id, code, reason in ended:
                for observer in self.observers:
                    observer(id_text(session_id), code, reason)
        if self._rotated_ids:
            rotated, self._rotated_ids = self._rotated_ids, []
            for session_id in rotated:
                slot = self._slot_of(session_id)
                if slot != NONE:
                    for notify in self.rotation_observers:
                        notify(id_text(session_id), self._table.tokens[slot])
