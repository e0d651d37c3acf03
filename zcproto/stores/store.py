"""What every store of sessions does. All stores pass the same tests (tests/stores/contract.py).

Rules:
- When a coroutine that changes something has returned, the change is durable: it survives a crash of this
  process, and with a store of its own process also one of this machine. The one exception is `touch`.
- Each operation takes effect whole or not at all, also between processes that share the store.
- An operation that cannot be done raises StoreUnavailable within the store's timeout, and may have taken effect
  all the same: whoever asks again must not be hurt by that. Nothing here waits for longer, and nothing blocks
  the loop.
- Times come in as `wall`, in milliseconds. A store reads no clock to decide about a session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from zcproto.errors import Code, ZcprotoError
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit

MAX_LISTED: Final = 10_000
"""Sessions of everybody that are listed at once."""


class StoreUnavailable(ZcprotoError):
    """The store did not do it, or not in time. `reason` is for the operator's log and holds no secret."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the store of sessions is unavailable: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Created:
    """The session is kept. `ended` are those that made room for it."""

    ended: tuple[EndedRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitReached:
    """The user has as many live sessions as allowed, and none makes room. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """The pair was replaced. `old_token_digest` is that of the token which is dead from now on; empty if this
    rotation had been done before."""

    record: SessionRecord
    old_token_digest: bytes


@dataclass(frozen=True, slots=True)
class NotRotated:
    """Why a refresh was refused.

    UNAUTHENTICATED: not known, or forgotten. TOKEN_EXPIRED: `refresh_expires_at` has passed.
    TOKEN_REVOKED, SESSION_REPLACED: the session had ended so; TOKEN_REVOKED with `reused`: the refresh token was a
    spent one of a session that lived until then, and has been ended for it.
    """

    code: Code
    reused: bool = False


class ClaimState(Enum):
    """What is known of a request with an idempotency key."""

    NEW = "new"  # it is for the caller to run
    RUNNING = "running"  # somebody runs it; ask again
    DONE = "done"  # its answer is kept
    CONFLICT = "conflict"  # the key was used for another request


@dataclass(frozen=True, slots=True)
class Claim:
    state: ClaimState
    answer: bytes = b""
    """DONE: what `keep_answer` was given."""
    until: int = field(default=0, compare=False)
    """RUNNING: when the claim ends, by which whoever made it knows it again; 0 if the store does not say."""


class ChangeKind(Enum):
    """What other processes did to sessions that this one may know."""

    SESSION = "session"  # the session with `id` was changed or has ended: forget what is known of it
    ALL = "all"  # anything may have changed: forget everything
    EMPTIED = "emptied"  # as ALL, and by no will of anybody the store has lost what it kept


@dataclass(frozen=True, slots=True)
class Change:
    kind: ChangeKind
    id: bytes = b""


class SessionStore(Protocol):
    """A store of sessions. Made without I/O; `open` comes first, `close` last."""

    @property
    def shared(self) -> bool:
        """Whether other processes write to it too: then tokens that are not known here are looked up in it."""
        ...

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """Get ready. `on_change` is called for what other processes do; never for what this one does.

        Raises StoreUnavailable, or ConfigError for what waiting cannot mend.
        """
        ...

    async def close(self) -> None:
        """Write what was to be written behind, and let go. Never raises."""
        ...

    async def ping(self) -> None:
        """Show that the store can be written to."""
        ...

    def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """All that is kept, in batches, for a store that is not shared; nothing for one that is."""
        ...

    # --- sessions --------------------------------------------------------------------------------

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        """Keep a new session (its time is `record.created_at`), if the user's limit allows. The same record once
        more is no second session, and brings back none that has ended."""
        ...

    async def rotate(self, rotation: Rotation) -> Rotated | NotRotated:
        """Replace a session's pair of tokens, if the refresh token that was shown is its current one. A spent one
        ends the session. The old access token is remembered as revoked. The same rotation once more is none."""
        ...

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        """The session of an access token, expired or not, or the memory of one that has ended."""
        ...

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        """The session with an id."""
        ...

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        """Note when sessions (by id) were last used. Never backwards; unknown ids are passed over. Need not be
        durable at once."""
        ...

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        """End sessions and remember them; those that were live or lapsed, and `user`'s if that is given."""
        ...

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        """End all sessions of a user."""
        ...

    async def end_all(self, code: Code, wall: int) -> int:
        """End every session; how many there were."""
        ...

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        """A user's sessions (None: everybody's, at most MAX_LISTED), the oldest first, lapsed ones included."""
        ...

    async def count(self) -> int:
        """Sessions kept, lapsed ones included."""
        ...

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """Remove at most `limit` sessions whose token and refresh token are both past their time, memories of
        ended ones at least `keep_ended_ms` old, and answers past their time; how many were removed."""
        ...

    # --- answers of requests with an idempotency key ----------------------------------------------

    async def claim(self, user: str, key: str, request_digest: bytes, wall: int, lease_ms: int) -> Claim:
        """Ask to run a request. NEW claims it until `lease_ms` have passed; then somebody else may.

        Keys are each user's own. What is past its time is as if it had never been. A store that holds as many
        as it may forgets its oldest answers, never a request that runs: then it raises ResourceExhausted.
        """
        ...

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        """The request was run; its answer is kept until `keep_ms` have passed. Not if there is no claim."""
        ...

    async def release_claim(self, user: str, key: str) -> None:
        """The request was not run after all: the next who asks may. An answer that is kept stays."""
        ...
