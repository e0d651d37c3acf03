"""The contract of every session store. All stores pass the same tests (tests/stores/contract).

Rules:
- When a coroutine that changes something has returned, the change is durable: it survives a crash of this
  process and, with a store in another process, of this machine. The exceptions are `touch` and `lease`.
- Each operation is atomic, also between processes that share the store.
- An operation that fails raises StoreUnavailable within the store's timeout. It may have taken effect
  nevertheless, so repeating any operation must be harmless. No operation blocks the event loop.
- An operation that is refused because too many wait raises ResourceExhausted. It has no effect; the store is well.
- Times are passed in as `wall`, in milliseconds. A store reads no clock to decide about a session.
- How long answers are kept and leases held is counted with the store's own clock, which setting a machine's clock
  does not change: the clocks of processes that share a store may differ by more than an answer is kept.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from zcproto.errors import Code, ResourceExhausted, ZcprotoError
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit

MAX_LISTED: Final = 10_000
"""Sessions listed in one call when no user is named."""

CLOCK_SKEW_MS: Final = 10_000
"""Between processes that share a store, and between them and the store."""

_RETRY_MS: Final = 250
_RETRY_FULL_MS: Final = 10_000

LEASE_MS: Final = 60_000
"""How long a session counts as in use after its process has crashed."""

HEARTBEAT_S: Final = 0.4
"""How often a shared store is asked for its role; with the timeout, an outage is detected well within a second."""

NO_LIMIT: Final = UserLimit(2**31 - 1, "refuse", None)


class StoreUnavailable(ZcprotoError):
    """The store failed or did not answer in time. `reason` is for the operator's log and holds no secret."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the session store is unavailable: {reason}")
        self.reason = reason


class DamagedRecord(StoreUnavailable):
    """The store works, but this operation met a record that cannot be used."""


class KeysMoving(StoreUnavailable):
    """The store works, but moves the keys of this operation from one of its servers to another."""


Notice = Callable[..., object]
"""Called with the name of a notice for the operator, and its values as keywords. Must not raise."""


def too_many_operations() -> ResourceExhausted:
    """Return the error for an operation that is refused although the store is well."""
    return ResourceExhausted(
        "too many operations wait for the session store; retry later", {"retry_after_ms": _RETRY_MS}
    )


def too_many_sessions() -> ResourceExhausted:
    """Return the error for a login when the server has reached its limit of sessions."""
    return ResourceExhausted(
        "the server has reached its limit of sessions; retry later", {"retry_after_ms": _RETRY_FULL_MS}
    )


@dataclass(frozen=True, slots=True)
class Created:
    """The session is stored. `ended` are the sessions that were ended to make room for it."""

    ended: tuple[EndedRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitReached:
    """The user has as many live sessions as allowed, and none could be ended. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class NotRotated:
    """Why a refresh was refused.

    UNAUTHENTICATED: the session is unknown or expired from the store. TOKEN_EXPIRED: `refresh_expires_at` has
    passed. TOKEN_REVOKED, SESSION_REPLACED: the session had ended this way. TOKEN_REVOKED with `reused`: a spent
    refresh token of a live session was shown, and the session was ended because of it.
    """

    code: Code
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Repeated:
    """The refresh was made before, within its grace, for the same client at the same address.

    Nothing was changed. `record` is the session, `sealed` what the rotation had.
    """

    record: SessionRecord
    sealed: bytes


class ClaimState(Enum):
    """The state of a request with an idempotency key."""

    NEW = "new"  # the caller runs it
    RUNNING = "running"  # another caller runs it; ask again
    DONE = "done"  # its answer is stored
    CONFLICT = "conflict"  # the key was used for another request


@dataclass(frozen=True, slots=True)
class Claim:
    state: ClaimState
    answer: bytes = b""
    """DONE: the bytes that `keep_answer` was given."""
    is_own: bool = field(default=False, compare=False)
    """RUNNING: whether this process made the claim."""
    has_expired: bool = field(default=False, compare=False)
    """RUNNING, CONFLICT: whether the process that made the claim is late with its renewal."""
    is_orphan: bool = field(default=False, compare=False)
    """RUNNING: whether the process that made the claim has shown no sign of life lately."""
    owner: bytes = field(default=b"", compare=False)
    """RUNNING, CONFLICT: the name of that process, if it has given one."""


class ChangeKind(Enum):
    """What other processes did to sessions that this process may have cached."""

    SESSION = "session"  # the session `id` was changed or ended: drop it from the cache
    ALL = "all"  # anything may have changed: drop everything
    EMPTIED = "emptied"  # like ALL, and the store lost its data unexpectedly
    FLUSHED = "flushed"  # like ALL, and all data was deleted by a command
    LOST = "lost"  # a connection is lost, so that changes are not reported until ALL
    AWAY = "away"  # the store is about to be away for a moment, as in an upgrade; nothing has changed


@dataclass(frozen=True, slots=True)
class Change:
    kind: ChangeKind
    id: bytes = b""
    ended: EndedRecord | None = None
    """How the session ended, if the store reports that too: it need not be asked."""


class SessionStore(Protocol):
    """A session store. Its constructor does no I/O; `open` comes first, `close` last."""

    @property
    def shared(self) -> bool:
        """Whether other processes write to it too, so that unknown tokens have to be looked up in it."""

    @property
    def keeps_time(self) -> bool:
        """Whether each operation ends within the timeout, measured where a busy event loop does not count."""

    @property
    def keeps_changes(self) -> bool:
        """Whether no acknowledged change is ever lost, as it may be in a failover."""

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """Open the store. `on_change` is called for changes by other processes, never for those of this one.

        Raises StoreUnavailable, or ConfigError for a fault that retrying cannot fix.
        """

    async def close(self) -> None:
        """Write what was delayed and release all resources. Never raises."""

    async def ping(self) -> None:
        """Check that the store can be written to, and is not one that was replaced by a failover."""

    async def examine(self, wall: int) -> Sequence[str]:
        """Return what is wrong with the configuration of the store's servers, one sentence each."""

    def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """Yield all records in small batches; nothing if the store is shared.

        Operations on sessions go ahead of it. A batch has what they had changed when it was read.
        """

    # --- sessions --------------------------------------------------------------------------------

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        """Store a new session if the user's limit allows it; the current time is `record.created_at`.

        The sessions that it replaces end in the same step (LIMIT in spec/store.pml).

        Creating the same record again neither adds a session nor revives one that has ended.
        """

    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        """Replace a session's token pair if the refresh token shown is the current one. Return its new record.

        A spent refresh token ends the session; the last one does not within the grace, if its rotation had a sealed
        pair, which is as durable as the rotation. The old access token is remembered as revoked. Repeating a
        rotation changes nothing.
        """

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        """Return the session of an access token, expired or not, or the tombstone of an ended one."""

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        """Return the session with an id, or its tombstone."""

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        """Record the last use of sessions by id. Times never go backwards and unknown ids are skipped.

        Need not be durable when it returns.
        """

    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        """Renew (True) or give up (False) the leases of this process on sessions, by id, if the store is shared.

        A lease lasts LEASE_MS; a session that this process creates begins with one. Unknown ids are skipped. Need
        not be durable when it returns.
        """

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        """End sessions by id, only those of `user` if given, and return those that were live or lapsed."""

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        """End all sessions of a user."""

    async def end_all(self, code: Code, wall: int) -> int:
        """End every session and return how many there were."""

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        """Return the sessions of a user, oldest first, lapsed ones included.

        None: those of all users, at most MAX_LISTED.
        """

    async def count(self) -> int:
        """Return the number of sessions stored, lapsed ones included."""

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """Remove expired entries, at most `limit`, and return how many were removed.

        These are sessions whose access and refresh tokens have both expired, tombstones at least `keep_ended_ms`
        old, and expired answers.
        """

    # --- answers to requests with an idempotency key ----------------------------------------------

    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        """Claim a request, in order to run it. NEW: the caller owns it until `lease_ms` have passed.

        RUNNING and `is_own`: it owns it for that time from now on. So a claim is renewed by claiming it again.

        Keys are per user. Expired entries count as absent, except the claim of another process that lives. A full
        store evicts its oldest answers but never a running request; if that does not make room it raises
        ResourceExhausted.
        """

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        """Store the answer of a claimed request for `keep_ms`. Does nothing without a claim.

        A process whose claim may have expired has to claim the request again before.
        """

    async def release_claim(self, user: str, key: str) -> None:
        """Give up the claim of a request that was not run. An answer already stored stays."""
