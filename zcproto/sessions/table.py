"""The sessions themselves, as packed records.

What this file decides: where each fact of a session is kept, and the lists that sessions are on.

Rules:
- A slot is free, live, lapsed (its token expired, a refresh brings it back), or dead; a dead one's state
  is the code that its token is answered with.
- Live and lapsed sessions are on their user's list, in the order of opening. Dead ones are on the list of
  the dead, in the order of dying, and keep nothing but their digests and the time of death (in
  `last_used_at`).
- A slot that is not free is in the index of tokens, and in that of ids if it is a session's.

It must not know: the time, the settings, who is told.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from zcproto.errors import Code
from zcproto.sessions.index import DigestIndex
from zcproto.sessions.slab import Slab
from zcproto.sessions.strings import UNKNOWN, StringTable
from zcproto.sessions.token import DIGEST_SIZE, ID_SIZE

# States. Any other is the code of a dead one.
FREE: Final = 0
LIVE: Final = 1
LAPSED: Final = 2

TOKEN_ONLY: Final = 128  # a flag: the memory of a token, not of a session; it is not found by id

NONE: Final = -1

# The record. What a check reads comes first, to be in few lines of the processor's cache.
_TOKEN, _EXPIRES_AT, _LAST_USED_AT, _TOKEN_NEXT, _USER, _STATE, _FLAGS = 0, 32, 40, 48, 52, 56, 57
_CLIENT, _ID, _ID_NEXT, _ADDRESS, _CREATED_AT, _REFRESH_EXPIRES_AT = 60, 64, 80, 84, 88, 96
_BEFORE, _AFTER, _REFRESH, _KEY = 104, 108, 112, 144
RECORD_SIZE: Final = 152
HOT: Final = Struct("@32xQQ4xiBB6x16s")
"""What a check reads of a record: expires_at, last_used_at, user, state, flags, id."""

_WHOLE: Final = Struct("=32sQQiiBB2xi16siiQQii32si4x")
assert _WHOLE.size == RECORD_SIZE

LEAST_BUCKETS: Final = 16_384
"""Of each index by digest, and a quarter as many of that of users: most servers have fewer sessions at once. In all
144 KiB."""

_NAME_BYTES: Final = 23
_ADDRESS_BYTES: Final = 39  # the longest IPv6 address as text
_KEY_BYTES: Final = 71  # `tls:` with a digest in hex


class SessionTable:
    """Records of sessions, the indexes over them, the lists through them. `capacity` counts the dead too."""

    __slots__ = (
        "_after",
        "_before",
        "address",
        "addresses",
        "bytes",
        "client",
        "clients",
        "created_at",
        "dead",
        "dead_first",
        "expires_at",
        "flags",
        "ids",
        "key",
        "keys",
        "last_used_at",
        "refresh_expires_at",
        "slab",
        "state",
        "tokens",
        "user",
        "users",
    )

    def __init__(self, capacity: int) -> None:
        slab = self.slab = Slab(capacity, RECORD_SIZE, link=_AFTER)
        self.bytes = slab.bytes
        self.state = slab.column("B", _STATE)
        self.flags = slab.column("B", _FLAGS)
        self.created_at = slab.column("Q", _CREATED_AT)
        self.last_used_at = slab.column("Q", _LAST_USED_AT)
        self.expires_at = slab.column("Q", _EXPIRES_AT)
        self.refresh_expires_at = slab.column("Q", _REFRESH_EXPIRES_AT)  # 0: no refresh token
        self.user = slab.column("i", _USER)
        self.client = slab.column("i", _CLIENT)
        self.address = slab.column("i", _ADDRESS)
        self.key = slab.column("i", _KEY)  # NONE: the session is not bound
        self._before = slab.column("i", _BEFORE)
        self._after = slab.column("i", _AFTER)
        least = min(LEAST_BUCKETS, 1 << slab.capacity.bit_length() - 1)
        self.tokens = DigestIndex(slab, offset=_TOKEN, width=DIGEST_SIZE, next_=_TOKEN_NEXT, least=least)
        self.ids = DigestIndex(slab, offset=_ID, width=ID_SIZE, next_=_ID_NEXT, least=least)
        self.users = StringTable(capacity, _NAME_BYTES, least // 4)  # the mark is the user's oldest session
        self.clients = StringTable(capacity, _NAME_BYTES)
        self.addresses = StringTable(capacity, _ADDRESS_BYTES)
        self.keys = StringTable(capacity, _KEY_BYTES)
        self.dead_first = NONE
        self.dead = 0

    # Sessions

    def add(
        self,
        user: str,
        client: str,
        address: str,
        key: str,
        flags: int,
        created_at: int,
        last_used_at: int,
        expires_at: int,
        refresh_expires_at: int,
        session_id: bytes,
        token_digest: bytes,
        refresh_digest: bytes,
    ) -> int:
        """The slot of a new live session, at the end of its user's list and in the indexes."""
        slot = self.slab.take()
        users = self.users
        number = users.take(user)
        first = users.marks[number] if users.uses[number] > 1 else NONE
        # At once: a login is not warm in the processor's cache, and each column by itself costs it some lines.
        _WHOLE.pack_into(
            self.bytes,
            slot * RECORD_SIZE,
            token_digest,
            expires_at,
            last_used_at,
            NONE,  # both indexes' links follow when it is entered there
            number,
            LIVE,
            flags,
            self.clients.take(client),
            session_id,
            NONE,
            self.addresses.take(address),
            created_at,
            refresh_expires_at,
            slot,
            slot,
            refresh_digest,
            self.keys.take(key) if key else NONE,
        )
        users.marks[number] = slot if first == NONE else self._append(first, slot)
        self.tokens.enter(slot, token_digest)
        self.ids.enter(slot, session_id)
        return slot

    def drop(self, slot: int) -> None:
        """Give up a live or lapsed session without a memory of it."""
        self._leave(slot)
        self.tokens.remove(slot)
        self.ids.remove(slot)
        self.state[slot] = FREE
        self.slab.give_back(slot)

    def move(self, slot: int, client: str, address: str) -> None:
        """Note that a session is now used by this client from this address."""
        old_client, old_address = self.client[slot], self.address[slot]
        self.client[slot] = self.clients.take(client)
        self.address[slot] = self.addresses.take(address)
        self.clients.give_back(old_client)
        self.addresses.give_back(old_address)

    def of_user(self, user: str) -> list[int]:
        """A user's live and lapsed sessions, the oldest first."""
        number = self.users.find(user)
        return [] if number == UNKNOWN else self._listed(self.users.marks[number])

    def refresh_digest(self, slot: int) -> bytes:
        start = slot * RECORD_SIZE + _REFRESH
        return self.bytes[start : start + DIGEST_SIZE].tobytes()

    def set_refresh_digest(self, slot: int, digest: bytes) -> None:
        start = slot * RECORD_SIZE + _REFRESH
        self.bytes[start : start + DIGEST_SIZE] = digest

    # The dead

    def bury(self, slot: int, code: Code, died_at: int) -> None:
        """Turn a live or lapsed session into the memory of one, to be answered with `code`."""
        self._leave(slot)
        self._mourn(slot, code, died_at)

    def _leave(self, slot: int) -> None:
        """Take a session from its user's list, and give up its strings."""
        number = self.user[slot]
        self.users.marks[number] = self._unlink(self.users.marks[number], slot)
        self.users.give_back(number)
        self.clients.give_back(self.client[slot])
        self.addresses.give_back(self.address[slot])
        if self.key[slot] != NONE:
            self.keys.give_back(self.key[slot])

    def bury_token(self, digest: bytes, code: Code, died_at: int) -> None:
        """Remember a single token, whose session lives on with another."""
        slot = self.slab.take()
        self.tokens.put(slot, digest)
        self.flags[slot] = TOKEN_ONLY
        self._mourn(slot, code, died_at)

    def _mourn(self, slot: int, code: Code, died_at: int) -> None:
        self.state[slot] = code
        self.last_used_at[slot] = died_at
        self.dead_first = self._append(self.dead_first, slot)
        self.dead += 1

    def forget_oldest(self) -> None:
        """Give up the oldest memory."""
        slot = self.dead_first
        self.dead_first = self._unlink(slot, slot)
        self.dead -= 1
        self.tokens.remove(slot)
        if not self.flags[slot] & TOKEN_ONLY:
            self.ids.remove(slot)
        self.state[slot] = FREE
        self.slab.give_back(slot)

    def trim(self) -> None:
        """Give back memory that is not needed any more, a part of it in each call."""
        for slab in (self.slab, self.users.slab, self.clients.slab, self.addresses.slab, self.keys.slab):
            slab.trim()

    # Circular doubly linked lists; a list is known by its first slot.

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
