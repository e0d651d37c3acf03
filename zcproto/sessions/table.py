"""Store sessions as packed records.

Decides the layout of a record and the lists of sessions.

Rules:
- A slot is free, live, lapsed (its token expired, a refresh revives it) or a tombstone, whose state is the code
  that its token is answered with.
- Live and lapsed sessions are on the list of their user, in the order of opening, and each is one use of the user's
  name. Tombstones are on their own list, oldest first, and keep only their digests and the time of death (in
  `last_used_at`).
- Every used slot is in the index of tokens and, if it belongs to a session, in the index of ids.

It must not know: the time, the settings, observers.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from zcproto.errors import Code
from zcproto.sessions.index import DigestIndex, StringTable
from zcproto.sessions.record import ORIGIN_SIZE, RecordFields
from zcproto.sessions.slab import Slab
from zcproto.sessions.token import DIGEST_SIZE, ID_SIZE

# States. Any other value is the code of a tombstone.
FREE: Final = 0
LIVE: Final = 1
LAPSED: Final = 2

TOKEN_ONLY: Final = 128  # flag: tombstone of a token, not of a session; not found by id

NONE: Final = -1

# The record. Fields read by a check come first, to share few cache lines.
_TOKEN, _EXPIRES_AT, _LAST_USED_AT, _TOKEN_NEXT, _USER, _STATE, _FLAGS = 0, 32, 40, 48, 52, 56, 57
_CLIENT, _ID, _ID_NEXT, _ADDRESS, _CREATED_AT, _REFRESH_EXPIRES_AT = 60, 64, 80, 84, 88, 96
_BEFORE, _AFTER, _REFRESH, _KEY, _ROLES, _ORIGIN = 104, 108, 112, 144, 148, 152
RECORD_SIZE: Final = 160
HOT: Final = Struct("@32xQQ4xiBB6x16s")
"""The fields read by a check: expires_at, last_used_at, user, state, flags, id."""
HELD: Final = Struct("@32sQQ8xBB")
"""The fields read to check a session again: digest of the token, expires_at, last_used_at, state, flags."""

_WHOLE: Final = Struct("=32sQQiiBB2xi16siiQQii32sii8s")
assert _WHOLE.size == RECORD_SIZE

LEAST_BUCKETS: Final = 16_384
"""Minimum buckets of each digest index, and four times those of users: most servers have fewer sessions. 144 KiB
in total."""

_WITHOUT_ORIGIN: Final = bytes(ORIGIN_SIZE)
_NAME_BYTES: Final = 23
_ADDRESS_BYTES: Final = 39  # the longest IPv6 address as text
_KEY_BYTES: Final = 71  # `tls:` with a digest in hex


class SessionTable:
    """Records of sessions with their indexes and lists. `capacity` includes tombstones."""

    def __init__(self, capacity: int) -> None:
        slab = self.slab = Slab(capacity, RECORD_SIZE, link=_AFTER)
        self.bytes = slab.bytes
        self.state = slab.column("B", _STATE)
        self.flags = slab.column("B", _FLAGS)
        self.created_at = slab.column("Q", _CREATED_AT)
        self.last_used_at = slab.column("Q", _LAST_USED_AT)
        self.expires_at = slab.column("Q", _EXPIRES_AT)
        self.refresh_expires_at = slab.column("Q", _REFRESH_EXPIRES_AT)  # 0 without a refresh token
        self.user = slab.column("i", _USER)
        self.client = slab.column("i", _CLIENT)
        self.address = slab.column("i", _ADDRESS)
        self.key = slab.column("i", _KEY)  # NONE unless the session is bound
        self.roles = slab.column("i", _ROLES)  # NONE without other roles than that of an operator
        self._before = slab.column("i", _BEFORE)
        self._after = slab.column("i", _AFTER)
        least = min(LEAST_BUCKETS, 1 << slab.capacity.bit_length() - 1)
        self.tokens = DigestIndex(slab, offset=_TOKEN, width=DIGEST_SIZE, next_=_TOKEN_NEXT, least=least)
        self.ids = DigestIndex(slab, offset=_ID, width=ID_SIZE, next_=_ID_NEXT, least=least)
        self.users = StringTable(capacity, _NAME_BYTES, least // 4)  # the mark is the user's oldest session
        self.clients = StringTable(capacity, _NAME_BYTES)
        self.addresses = StringTable(capacity, _ADDRESS_BYTES)
        self.keys = StringTable(capacity, _KEY_BYTES)  # and lists of roles
        self.first_tombstone = NONE
        self.tombstones = 0

    # Sessions

    def add(self, record: RecordFields) -> int:
        """Add a live session to the end of its user's list and to the indexes. Return its slot.

        If its token or id is known, change nothing and return NONE.
        """
        (
            id_,
            token,
            refresh,
            user,
            client,
            address,
            flags,
            created,
            used,
            expires,
            until,
            key,
            roles,
            origin,
        ) = record
        slot = self.slab.allocate()
        users = self.users
        number = users.acquire(user)
        first = users.marks[number]
        # In one call: a login is cold in the cache, and writing each column separately costs more cache misses.
        _WHOLE.pack_into(
            self.bytes,
            slot * RECORD_SIZE,
            token,
            expires,
            used,
            NONE,  # the links of both indexes are set below
            number,
            LIVE,
            flags,
            self.clients.acquire(client),
            id_,
            NONE,
            self.addresses.acquire(address),
            created,
            until,
            slot,
            slot,
            refresh,
            self.keys.acquire(key) if key else NONE,
            self.keys.acquire(roles) if roles else NONE,
            origin,
        )
        if first == NONE:
            users.marks[number] = slot
        else:
            self._append(first, slot)
        # Checked after entering: nearly every bucket was empty, and then nothing needs to be compared.
        others = self.tokens.enter(slot), self.ids.enter(slot)
        if others != (NONE, NONE) and (self.tokens.repeats(slot) or self.ids.repeats(slot)):
            self.drop(slot)
            return NONE
        return slot

    def drop(self, slot: int) -> None:
        """Remove a live or lapsed session without a tombstone."""
        self._release(slot)
        self.tokens.remove(slot)
        self.ids.remove(slot)
        self.state[slot] = FREE
        self.slab.free_slot(slot)

    def move(self, slot: int, client: str, address: str) -> None:
        """Update the client and address of a session."""
        old_client, old_address = self.client[slot], self.address[slot]
        self.client[slot] = self.clients.acquire(client)
        self.address[slot] = self.addresses.acquire(address)
        self.clients.release(old_client)
        self.addresses.release(old_address)

    def of_user(self, user: str) -> list[int]:
        """Return the slots of a user's live and lapsed sessions, oldest first."""
        number = self.users.find(user)
        return [] if number == NONE else self._listed(self.users.marks[number])

    def refresh_digest(self, slot: int) -> bytes:
        start = slot * RECORD_SIZE + _REFRESH
        return self.bytes[start : start + DIGEST_SIZE].tobytes()

    def set_refresh_digest(self, slot: int, digest: bytes) -> None:
        start = slot * RECORD_SIZE + _REFRESH
        self.bytes[start : start + DIGEST_SIZE] = digest

    def origin(self, slot: int) -> bytes:
        start = slot * RECORD_SIZE + _ORIGIN
        origin = self.bytes[start : start + ORIGIN_SIZE].tobytes()
        return b"" if origin == _WITHOUT_ORIGIN else origin

    # Tombstones

    def add_tombstone(self, slot: int, code: Code, died_at: int) -> None:
        """Turn a live or lapsed session into a tombstone that is answered with `code`."""
        self._release(slot)
        self._append_tombstone(slot, code, died_at)

    def _release(self, slot: int) -> None:
        """Remove a session from its user's list and release its strings."""
        number = self.user[slot]
        self.users.marks[number] = self._unlink(self.users.marks[number], slot)
        self.users.release(number)
        self.clients.release(self.client[slot])
        self.addresses.release(self.address[slot])
        for number in (self.key[slot], self.roles[slot]):
            if number != NONE:
                self.keys.release(number)

    def add_token_tombstone(self, digest: bytes, code: Code, died_at: int) -> None:
        """Add a tombstone for a token whose session continues with another token."""
        slot = self.slab.allocate()
        self.tokens.put(slot, digest)
        self.flags[slot] = TOKEN_ONLY
        self._append_tombstone(slot, code, died_at)

    def _append_tombstone(self, slot: int, code: Code, died_at: int) -> None:
        self.state[slot] = code
        self.last_used_at[slot] = died_at
        self.first_tombstone = self._append(self.first_tombstone, slot)
        self.tombstones += 1

    def drop_oldest_tombstone(self) -> None:
        slot = self.first_tombstone
        self.first_tombstone = self._unlink(slot, slot)
        self.tombstones -= 1
        self.tokens.remove(slot)
        if not self.flags[slot] & TOKEN_ONLY:
            self.ids.remove(slot)
        self.state[slot] = FREE
        self.slab.free_slot(slot)

    def tombstone_slots(self) -> list[int]:
        """Return the slots of all tombstones, oldest first."""
        return [] if self.first_tombstone == NONE else self._listed(self.first_tombstone)

    def trim(self) -> None:
        """Return unused memory to the system, a bounded part of it in each call."""
        for slab in (self.slab, self.users.slab, self.clients.slab, self.addresses.slab, self.keys.slab):
            slab.trim()

    # Circular doubly linked lists, identified by their first slot

    def _append(self, first: int, slot: int) -> int:
        before, after = self._before, self._after
        if first == NONE:
            before[slot] = after[slot] = slot
            return slot
        last = before[first]
        after[last] = before[first] = slot
        before[slot] = last
        after[slot] = first
        return first

    def _unlink(self, first: int, slot: int) -> int:
        before, after = self._before[slot], self._after[slot]
        if after == slot:
            return NONE
        self._after[before] = after
        self._before[after] = before
        return after if first == slot else first

    def _listed(self, first: int) -> list[int]:
        slots = [first]
        slot = self._after[first]
        while slot != first:
            slots.append(slot)
            slot = self._after[slot]
        return slots
