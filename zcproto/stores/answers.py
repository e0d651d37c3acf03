"""The table of requests with an idempotency key: which are running, and the answers of the others.

Decides: who may run a request, how many answers are stored, and which are evicted first.

Rules:
- Keys are per user. Expired entries count as absent, except a running request whose claim names a process: it may
  live and be late with its renewal. The hub releases it if that process has gone; else it is removed LATE_MS later.
- Answers are bounded per user and in total. A user's new answer evicts that user's oldest ones, so that no user
  evicts answers of others except by the total bound.
- A running request is never evicted before its lease ends. If nothing else makes room, a new one is refused.

It must not know: the requests, files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Final

from zcproto.errors import ResourceExhausted
from zcproto.stores.base import Claim, ClaimState

LAST_MS: Final = 2**63 - 1
LATE_MS: Final = 3_600_000
"""How long an expired claim of another process is kept: much longer than a process is late and lives."""

_RETRY_MS: Final = 1_000
_SWEPT: Final = 64

Key = tuple[str, str]
"""The user and the idempotency key."""


DIGEST_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Bounds of the table. An answer of more than `user_bytes` is never stored."""

    count: int = 65_536
    """Requests of all users, running or answered: about 400 bytes each, and the answer."""
    bytes: int = 64 << 20
    """Bytes of all answers."""
    user_count: int = 1_024
    user_bytes: int = 4 << 20


DEFAULT_LIMITS: Final = AnswerLimits()


def check_size(answer: bytes, limits: AnswerLimits) -> None:
    """Raise ValueError for an answer that is never stored because of its size."""
    if len(answer) > min(limits.user_bytes, limits.bytes):
        raise ValueError(f"an answer of {len(answer)} bytes is too large to be stored")


def too_many_requests(whose: str = "") -> ResourceExhausted:
    """Return the error for a request that has no room in the table."""
    return ResourceExhausted(
        f"too many requests {whose}with an idempotency key are running; wait for one to end",
        {"retry_after_ms": _RETRY_MS},
    )


@dataclass(slots=True, eq=False)
class Entry:
    """A running request, or an answered one (`answer` is None if it is stored elsewhere)."""

    digest: bytes
    until: int
    running: bool = True
    answer: bytes | None = None
    size: int = 0
    is_own: bool = False

    @property
    def kept_until(self) -> int:
        """Return when the entry counts as absent."""
        return self.until + LATE_MS if self.running and self.owner else self.until

    @property
    def owner(self) -> bytes:
        """Return the name of the process that runs the request, if it has given one."""
        return self.digest[DIGEST_SIZE:]


@dataclass(slots=True, eq=False)
class _Share:
    """The entries of one user."""

    count: int = 0
    bytes: int = 0
    done: OrderedDict[Key, None] = field(default_factory=OrderedDict)


class Answers:
    """The table. `on_change` is called at every change with the key and the entry, or None if it was removed.

    `time` returns milliseconds, and never jumps. `read_answer` returns an answer that is stored elsewhere.
    """

    def __init__(
        self,
        limits: AnswerLimits,
        time: Callable[[], int],
        on_change: Callable[[Key, Entry | None], object] = lambda key, entry: None,
        read_answer: Callable[[Key], bytes] = lambda key: b"",
    ) -> None:
        self._limits = limits
        self._time = time
        self._on_change = on_change
        self._read_answer = read_answer
        self._entries: dict[Key, Entry] = {}
        self._running: OrderedDict[Key, None] = OrderedDict()
        self._done: OrderedDict[Key, None] = OrderedDict()
        self._users: dict[str, _Share] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, user: str, key: str) -> Entry | None:
        """Return a request that does not count as absent."""
        entry = self._entries.get((user, key))
        return entry if entry is not None and self._time() < entry.kept_until else None

    def left_ms(self, entry: Entry) -> int:
        """Return after how many milliseconds an entry expires."""
        return entry.until - self._time()

    def claim(self, user: str, key: str, digest: bytes, lease_ms: int) -> Claim:
        """Claim a request as in `SessionStore.claim`. Raises ResourceExhausted if too many requests are running.

        The bytes of `digest` beyond DIGEST_SIZE name the process that claims. They are stored with the claim.
        """
        entry = self.entry(user, key)
        has_expired, owner = False, b""
        if entry is not None:
            has_expired, owner = self._time() >= entry.until, entry.owner
        if entry is not None and not (has_expired and owner == digest[DIGEST_SIZE:]):
            if not compare_digest(entry.digest[:DIGEST_SIZE], digest[:DIGEST_SIZE]):
                return Claim(ClaimState.CONFLICT, has_expired=has_expired, owner=owner)
            if entry.running:
                is_known = entry.is_own or len(digest) > DIGEST_SIZE
                is_own = is_known and entry.digest == digest
                if is_own:
                    self._extend((user, key), entry, lease_ms)
                return Claim(ClaimState.RUNNING, is_own=is_own, has_expired=has_expired, owner=owner)
            answer = self._read_answer((user, key)) if entry.answer is None else entry.answer
            return Claim(ClaimState.DONE, answer)
        if (user, key) in self._entries:
            self._remove((user, key))
        self._make_room(user)
        self._add((user, key), Entry(digest, self._until(lease_ms), is_own=True))
        return Claim(ClaimState.NEW)

    def keep(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        """Store an answer as in `SessionStore.keep_answer`; only with a claim, which has the request's digest.

        Raises ValueError for an answer that is never stored because of its size.
        """
        limits, entry = self._limits, self._entries.get((user, key))
        check_size(answer, limits)
        if entry is None:
            return
        share = self._users[user]
        self._remove((user, key))
        while share.done and share.bytes + len(answer) > limits.user_bytes:
            self._remove(next(iter(share.done)))
        while self.bytes + len(answer) > limits.bytes:
            self._remove(next(iter(self._done)))
        entry.running, entry.answer, entry.size = False, answer, len(answer)
        entry.digest = entry.digest[:DIGEST_SIZE]
        entry.until = self._until(keep_ms)
        self._add((user, key), entry)

    def release(self, user: str, key: str) -> None:
        """Release a claim as in `SessionStore.release_claim`."""
        if (user, key) in self._running:
            self._remove((user, key))

    def expire(self, limit: int) -> int:
        """Remove at most `limit` expired entries among the oldest of each kind. Return how many."""
        entries, wall = self._entries, self._time()
        past: list[Key] = []
        for kind in (self._running, self._done):
            for _, key in zip(range(limit), kind, strict=False):
                if len(past) < limit and wall >= entries[key].kept_until:
                    past.append(key)
        for key in past:
            self._remove(key)
        return len(past)

    def restore(self, key: Key, entry: Entry) -> None:
        """Add an entry stored elsewhere, oldest first, without calling `on_change`."""
        share = self._users.get(key[0])
        if share is None:
            share = self._users[key[0]] = _Share()
        share.count += 1
        share.bytes += entry.size
        self.bytes += entry.size
        if entry.running:
            self._running[key] = None
        else:
            self._done[key] = share.done[key] = None
        self._entries[key] = entry

    def _extend(self, key: Key, entry: Entry, lease_ms: int) -> None:
        entry.until = self._until(lease_ms)
        self._running.move_to_end(key)
        self._on_change(key, entry)

    def _until(self, ms: int) -> int:
        return min(self._time() + ms, LAST_MS)

    def _make_room(self, user: str) -> None:
        limits, share = self._limits, self._users.get(user, _Share())
        if len(self._entries) >= limits.count or share.count >= limits.user_count:
            self.expire(_SWEPT)
        while share.count >= limits.user_count:
            if not share.done:
                raise too_many_requests("of this user ")
            self._remove(next(iter(share.done)))
        while len(self._entries) >= limits.count:
            if not self._done:
                raise too_many_requests()
            self._remove(next(iter(self._done)))

    def _add(self, key: Key, entry: Entry) -> None:
        self.restore(key, entry)
        self._on_change(key, entry)

    def _remove(self, key: Key) -> None:
        entry, share = self._entries.pop(key), self._users[key[0]]
        share.count -= 1
        share.bytes -= entry.size
        self.bytes -= entry.size
        if entry.running:
            del self._running[key]
        else:
            del self._done[key], share.done[key]
        if not share.count:
            del self._users[key[0]]
        self._on_change(key, None)
