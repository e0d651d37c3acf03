"""How sessions end: by time, by a word, and what is remembered of them.

What this file decides: when a session is live, lapsed or dead, and who is told.

Rules:
- A token is good while `wall` is below its `expires_at` and below its last use plus the idle limit.
  Expiry is absolute against `wall`, and a session once seen expired stays so: nothing un-expires when the
  clock goes back.
- A session whose token expired lives on, lapsed, while its refresh token is good. It holds no live token.
- `generation` grows whenever any token may have stopped being good.
- Dead tokens are remembered for a while and up to a number, so that their holders learn why. A forgotten
  token is refused as unknown; forgetting never makes one good.
- A change is complete before anyone is told of it.

It must not know: how sessions begin; connections, stores, clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from zcproto.errors import Code
from zcproto.sessions.grace import GraceTable
from zcproto.sessions.session import SessionSettings
from zcproto.sessions.table import FREE, LAPSED, LIVE, NONE, SessionTable
from zcproto.sessions.token import id_text

Observer = Callable[[str, Code, str], None]

NEVER: Final = 2**63
_ENDING_COST: Final = 4  # ending a session takes about as long as looking at this many


class Lifecycle:
    """The table of sessions, and how they leave it. `SessionRegistry` is what is used."""

    __slots__ = (
        "_cursor",
        "_ended",
        "_expires_at",
        "_grace",
        "_idle",
        "_last_used_at",
        "_live",
        "_settings",
        "_state",
        "_table",
        "_wall",
        "_way_cursor",
        "checks_refused",
        "closed",
        "expired",
        "generation",
        "observers",
        "opened",
        "refresh_reused",
        "refreshed",
        "replaced",
        "revoked",
        "sweeps",
    )

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        # A refresh buries the old token before the oldest memory goes: one slot more.
        self._table = table = SessionTable(settings.max_sessions + settings.dead_limit + 1)
        self._grace = GraceTable(settings.refresh_grace_ms, settings.grace_limit)
        self._state = table.state
        self._expires_at = table.expires_at
        self._last_used_at = table.last_used_at
        self._idle = NEVER if settings.idle_timeout_ms is None else settings.idle_timeout_ms
        self._ended: list[tuple[bytes, Code, str]] = []  # not yet announced
        self._wall = 0  # as of the last call that said it: the time of death where none is given
        self._cursor = 0
        self._way_cursor = 0
        self._live = 0
        self.generation = 0
        self.closed = False  # every token is refused; see `SessionRegistry.refuse_all`
        self.observers: list[Observer] = []
        self.opened = self.refreshed = self.expired = self.revoked = self.replaced = 0
        self.refresh_reused = self.checks_refused = self.sweeps = 0

    def __len__(self) -> int:
        """Live tokens, with those whose time has passed unnoticed so far."""
        return self._live

    @property
    def lapsed(self) -> int:
        """Sessions that only wait to be refreshed."""
        return self.kept - self._live

    @property
    def kept(self) -> int:
        """Sessions live and lapsed."""
        return self._table.slab.used - self._table.dead

    @property
    def remembered(self) -> int:
        """Dead tokens still remembered."""
        return self._table.dead

    def reconfigure(self, settings: SessionSettings) -> None:
        """Go by other settings. Sessions that are there keep their end, but for the idle limit.

        What bounds the table stays: `max_sessions`, `dead_limit` and `grace_limit` must be what they were.
        """
        assert (settings.max_sessions, settings.dead_limit, settings.grace_limit) == (
            self._settings.max_sessions,
            self._settings.dead_limit,
            self._settings.grace_limit,
        )
        self._settings = settings
        self._idle = NEVER if settings.idle_timeout_ms is None else settings.idle_timeout_ms
        self._grace.grace_ms = settings.refresh_grace_ms
        self.generation += 1  # how long a token is good may be another time now

    def clean(self, wall: int, max_slots: int) -> int:
        """One slice of the search for what time has ended; how many live tokens it found expired.

        It goes round the table. `max_slots` bounds the work: each slot looked at counts one, each session
        ended and each memory forgotten four more. A slice ends at the end of the table at the latest, and
        `sweeps` grows then: who wants all of it done calls until that changes.
        """
        self._wall = wall
        self._grace.expire(wall)
        before = self.expired
        work = max_slots - self._forget_old(wall, max_slots // 2)
        state, slab, slot = self._state, self._table.slab, self._cursor
        while work > 0 and slot < slab.size:
            if FREE < state[slot] <= LAPSED and self._is_due(slot, wall):
                self._settle(slot, wall)
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

    def _forget_old(self, wall: int, work: int) -> int:
        """Forget the dead whose time is up; the work that it was."""
        table, done = self._table, 0
        while done < work and table.dead and self._is_forgotten(table.dead_first, wall):
            table.forget_oldest()
            done += _ENDING_COST
        return done

    def _forget_surplus(self) -> None:
        if self._table.dead > self._settings.dead_limit:
            self._table.forget_oldest()

    def _is_forgotten(self, slot: int, wall: int) -> bool:
        return wall - self._last_used_at[slot] >= self._settings.dead_keep_ms

    def _is_kept(self, slot: int) -> bool:
        return FREE < self._state[slot] <= LAPSED

    def _is_due(self, slot: int, wall: int) -> bool:
        """Whether a live session should have lapsed by now, or a lapsed one ended."""
        if self._state[slot] == LIVE:
            return wall >= self._expires_at[slot] or wall >= self._last_used_at[slot] + self._idle
        return wall >= self._table.refresh_expires_at[slot]

    def _settle(self, slot: int, wall: int) -> bool:
        """Bring a live or lapsed session to the state that the time asks for; False if that was its end."""
        if not self._is_due(slot, wall):
            return True
        if self._state[slot] == LIVE:
            self.expired += 1
            self._die(slot, Code.TOKEN_EXPIRED, "expired" if wall >= self._expires_at[slot] else "idle")
            self._state[slot] = LAPSED
        if wall < self._table.refresh_expires_at[slot]:
            return True
        self._end(slot, Code.TOKEN_EXPIRED, "")
        return False

    def _refusal(self, slot: int, wall: int) -> Code:
        """The code for a token that is not good."""
        if slot == NONE:
            return Code.UNAUTHENTICATED
        if self._is_kept(slot):
            self._settle(slot, wall)
            self._announce()
            return Code.TOKEN_EXPIRED
        return Code.UNAUTHENTICATED if self._is_forgotten(slot, wall) else Code(self._state[slot])

    def _die(self, slot: int, code: Code, reason: str) -> None:
        """A live token is one no more."""
        self._live -= 1
        self.generation += 1
        if self.observers:
            self._ended.append((self._table.ids[slot], code, reason))

    def _end(self, slot: int, code: Code, reason: str) -> None:
        """End a live or lapsed session for good."""
        if self._state[slot] == LIVE:
            self._die(slot, code, reason)
        self._grace.drop(self._table.ids[slot])
        self._table.bury(slot, code, self._wall)
        self._forget_surplus()

    def _revoke(self, slot: int, reason: str) -> None:
        self.revoked += 1
        self._end(slot, Code.TOKEN_REVOKED, reason)

    def _announce(self) -> None:
        """Tell the observers what has ended since the last time."""
        if self._ended:
            ended, self._ended = self._ended, []
            for session_id, code, reason in ended:
                for observer in self.observers:
                    observer(id_text(session_id), code, reason)
