"""The durable runs of all users: their items, attachments and ends (sans-IO; zcp1.md, section 20).

    open   -> a run starts, or an attachment reads an existing one from a position
    append -> items, and at last the end, from the process that runs the method
    read   -> the items from a position on, for the current attachment
    take   -> items before a position are not needed any more

Decides: which run an id names, which attachment reads it, which items are dropped, how long a run is kept.

Rules:
- An append names the position of its first item: items that are there are skipped, a gap is refused. After the end,
  or with another generation, it has no effect.
- The newest attachment reads the run. Only its `take` counts.
- Items are dropped when a bound needs their room, and only those that were taken.
- An id whose run has gone stays known, so that an OPEN that is repeated does not start the method again.
- Each user has bounds. At the bound of all users no run starts; those that run go on.

Time is an argument, in monotonic seconds. It must not know: processes, connections, methods, sessions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from zcproto.errors import (
    FailedPrecondition,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    ZcprotoError,
)

ITEM_BYTES: Final = 64
"""Counted for each item beside its body."""

RUN_BYTES: Final = 4_096
"""Counted for each run, beside its params while it runs, against the bound of all users."""

GONE_BYTES: Final = 256
"""Counted for each id of a run that has gone, against the bound of all users."""

KNOWN_S: Final = 600.0
"""How long the id of a run that has gone stays known; a client repeats an OPEN for half of that time."""

KNOWN_PER_USER: Final = 4_096
"""Ids of runs of one user that have gone. With more no run starts until the oldest has been forgotten."""

LONGEST_KEEP_S: Final = 3_600.0
RETRY_MS: Final = 1_000

End = tuple[int, bytes]
"""The code, 0 for RESPONSE, and the body of the answer to a run."""

Taken = tuple[str, int, int]
"""An attachment, the position before which it needs no items, and its order."""


class RunKey(NamedTuple):
    """What names a run: its user, and the id that a client has chosen."""

    user: str
    id: str


class Superseded(ZcprotoError):
    """Another attachment reads the run."""


class Gap(ZcprotoError):
    """An append does not continue the log, which ends at `next`."""

    def __init__(self, next: int) -> None:
        super().__init__(f"the log ends at {next}")
        self.next = next


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Bounds of durable runs. `items` and `bytes` are of one run: of those that were not taken."""

    items: int = 1_024
    bytes: int = 1 << 20
    runs_per_user: int = 16
    bytes_per_user: int = 8 << 20
    total_bytes: int = 256 << 20
    keep_s: float = 900.0
    """How long a run is kept after its end, or after its last reader."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is fixed when a run starts.

    `digest` is that of method and params, `size` how many bytes the owner holds of these, `session` the id of the
    opener's, and `is_bound` whether that is bound to a key. Times are in milliseconds of wall time; `deadline` is
    None without one. `owner` is the process that runs the method, `generation` is random.
    """

    method: str
    digest: bytes
    session: str
    peer: str
    is_bound: bool
    since: int
    deadline: int | None
    owner: str
    generation: bytes
    size: int = 0


@dataclass(frozen=True, slots=True)
class Opening:
    """What an attachment asks for. `attachment` is random.

    `digest` is None if the client has sent no params, and `info` if the run must exist. `is_bound` is whether the
    session is bound to a key that was proved.
    """

    method: str
    digest: bytes | None
    position: int
    attachment: str
    is_bound: bool
    info: RunInfo | None = None


@dataclass(slots=True)
class RunState:
    """A run. Items from `first` to `next` are kept, and those before `taken` are not needed any more.

    `attachment` is the newest, which reads it while `is_attached`, and `order` counts the attachments. `cancel` is
    why the method is to be cancelled. `is_full` is whether the method must wait until items were taken.
    """

    info: RunInfo
    first: int = 0
    next: int = 0
    taken: int = 0
    attachment: str = ""
    order: int = 0
    is_attached: bool = False
    cancel: str = ""
    end: End | None = None
    is_full: bool = False


def within(bodies: Iterable[bytes], size: int) -> list[bytes]:
    """Return the first items, at least one, that have at most so many bytes."""
    found: list[bytes] = []
    for body in bodies:
        size -= ITEM_BYTES + len(body)
        if found and size < 0:
            break
        found.append(body)
    return found


@dataclass(slots=True, eq=False)
class _Run:
    state: RunState
    items: list[bytes] = field(default_factory=list)  # a deque has room for 64 at once
    size: int = 0  # of the items that are kept, and of the end
    untaken: int = 0  # of those that were not taken
    keep_until: float = 0.0  # after the end
    drop_at: float = 0.0  # after the end, at the latest
    watchers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def has_taken(self) -> bool:
        return self.state.first < self.state.taken

    def attach(self, attachment: str, order: int) -> None:
        self.state.attachment, self.state.order, self.state.is_attached = attachment, order, True

    def is_read_by(self, attachment: str, order: int) -> bool:
        """Return whether an attachment is the newest. One that is newer than any which is known was lost."""
        if attachment != self.state.attachment and order > self.state.order:
            self.attach(attachment, order)
        return attachment == self.state.attachment

    def bodies(self, position: int, end: int) -> list[bytes]:
        """Return the items that are kept, from a position on."""
        first = self.state.first
        return self.items[position - first : end - first]


@dataclass(slots=True)
class _User:
    runs: dict[str, _Run] = field(default_factory=dict)
    size: int = 0
    gone: OrderedDict[str, float] = field(default_factory=OrderedDict)  # ids, and until when they are known


class RunTable:
    """The runs that one process keeps. `limits` may be replaced.

    `may_lag`: the log of a run can be behind its readers for a while, after a part of it was lost.
    """

    def __init__(self, limits: RunLimits, *, may_lag: bool = False) -> None:
        self.limits = limits
        self._may_lag = may_lag
        self._users: dict[str, _User] = {}
        self.size = 0
        """Bytes of all runs and items, and of ids that are still known."""

    def __len__(self) -> int:
        return sum(len(user.runs) for user in self._users.values())

    # --- clients ---------------------------------------------------------------------------------------

    def open(self, key: RunKey, opening: Opening, now: float) -> tuple[bool, RunState]:
        """Start a run or attach to one, and return whether it is new, with its state.

        Raises NotFound, FailedPrecondition for another method or other params, PermissionDenied, OutOfRange, or
        ResourceExhausted.
        """
        user = self._users.get(key.user)
        run = None if user is None else user.runs.get(key.id)
        info = opening.info
        if run is None:
            if info is None or opening.position or self._is_known(user, key.id, now):
                raise NotFound("there is no run with this id; it was never started, or is not kept any more")
            run = self._start(key, info, now)
        else:
            self._check(run.state, opening)
        if opening.attachment != run.state.attachment:  # else it is repeated
            run.attach(opening.attachment, run.state.order + 1)
        run.state.is_attached = True
        self._wake(run)
        # By the generation, so that an opening can be repeated whose answer was lost.
        return info is not None and info.generation == run.state.info.generation, run.state

    def _check(self, state: RunState, opening: Opening) -> None:
        """Raise the error of an attachment that may not read a run."""
        info, position = state.info, opening.position
        if opening.method != info.method or opening.digest not in (None, info.digest):
            raise FailedPrecondition("the run with this id has another method or other params")
        check_binding(info, opening.is_bound)
        is_behind = position > state.next and (state.end is not None or not self._may_lag)
        if position < state.first or is_behind:
            raise out_of_range(state.first, state.next)

    def _start(self, key: RunKey, info: RunInfo, now: float) -> _Run:
        limits, user = self.limits, self._users.get(key.user, _User())
        if self.size >= limits.total_bytes:
            raise ResourceExhausted(
                "the durable runs of all users take too much memory; try again", {"retry_after_ms": RETRY_MS}
            )
        if len(user.gone) < KNOWN_PER_USER:
            while len(user.runs) >= limits.runs_per_user and self._drop_ended(key.user, now):
                pass
        if len(user.runs) >= limits.runs_per_user or len(user.gone) >= KNOWN_PER_USER:
            raise too_many_runs(limits.runs_per_user)
        return self._add(key, info)

    def _add(self, key: RunKey, info: RunInfo) -> _Run:
        run = self._users.setdefault(key.user, _User()).runs[key.id] = _Run(RunState(info))
        self.size += RUN_BYTES + info.size
        return run

    def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int, order: int = 0
    ) -> tuple[RunState, Sequence[bytes]]:
        """Return the items from a position on: at most so many and bytes, but at least one if there is one.

        `order` is that of the attachment, if the table may have lost it.

        Raises NotFound, Superseded, or OutOfRange if they were dropped or lie behind the end.
        """
        run = self._find(key)
        state = run.state
        if not run.is_read_by(attachment, order):
            raise Superseded
        if position < state.first or (position > state.next and state.end is not None):
            raise out_of_range(state.first, state.next)
        return state, within(run.bodies(position, position + items), size)

    def take(self, key: RunKey, attachment: str, position: int, order: int = 0) -> None:
        """Record that an attachment needs no item before a position. Without an effect if it is not the newest."""
        run = self._get(key)
        if run is None or not run.is_read_by(attachment, order):
            return
        state = run.state
        position = min(position, state.next)
        if position <= state.taken:
            return
        for body in run.bodies(state.taken, position):
            run.untaken -= ITEM_BYTES + len(body)
        was_full, state.taken = state.is_full, position
        state.is_full = self._is_full(key.user, run)
        if was_full and not state.is_full:  # else its owner learns of it with the next append
            self._wake(run)
        user = self._users[key.user]
        if user.size >= self.limits.bytes_per_user:  # its other runs may wait for this room
            for other in user.runs.values():
                if other.state.is_full:
                    self._wake(other)

    def detach(self, key: RunKey, attachment: str, now: float) -> None:
        """End an attachment, unless it was superseded."""
        run = self._get(key)
        if run is not None and attachment == run.state.attachment and run.state.is_attached:
            run.state.is_attached = False
            run.keep_until = now + self.limits.keep_s
            self._wake(run)

    def cancel(self, key: RunKey, reason: str) -> bool:
        """Let the owner cancel the method. Return whether the run was running."""
        run = self._get(key)
        if run is None or run.state.end is not None:
            return False
        if not run.state.cancel:
            run.state.cancel = reason
            self._wake(run)
        return True

    def knows(self, key: RunKey) -> bool:
        """Return whether there is a run with this key."""
        return self._get(key) is not None

    def runs(self, user: str | None = None) -> list[tuple[RunKey, RunState]]:
        """Return the runs of a user, or of all."""
        names = self._users if user is None else [user] if user in self._users else []
        return [
            (RunKey(name, id_), run.state) for name in names for id_, run in self._users[name].runs.items()
        ]

    def forget(self, user: str | None, now: float) -> int:
        """Delete the runs of a user, or of all users, and return how many there were.

        The methods that run find no log any more.
        """
        found = self.runs(user)
        for key, _ in found:
            self._drop(key, now)
        return len(found)

    # --- the owner -------------------------------------------------------------------------------------

    def append(
        self,
        key: RunKey,
        generation: bytes,
        first: int,
        bodies: Sequence[bytes],
        end: End | None,
        now: float,
        taken: Taken | None = None,
    ) -> RunState | None:
        """Add items, the first of which has the position `first`, and the end. Return the state.

        `taken` is recorded before, as `take` does. Return None if the run has gone, has ended otherwise, or is of
        another generation. Raises Gap.
        """
        run = self._get(key)
        if run is None or run.state.info.generation != generation:
            return None
        state = run.state
        if state.end is not None:
            return state if state.end == end and first + len(bodies) == state.next else None
        if first > state.next or (end is not None and first + len(bodies) < state.next):
            raise Gap(state.next)
        if taken is not None:
            self.take(key, *taken)
        size = 0
        for body in bodies[state.next - first :]:
            run.items.append(body)
            size += ITEM_BYTES + len(body)
            state.next += 1
        run.untaken += size
        if end is not None:
            state.end = end
            size += ITEM_BYTES + len(end[1])
            self.size -= state.info.size  # its method holds no params any more
            run.keep_until, run.drop_at = now + self.limits.keep_s, now + LONGEST_KEEP_S
        run.size += size
        self._users[key.user].size += size
        self.size += size
        self._make_room(key, run, now)
        was_full, state.is_full = state.is_full, self._is_full(key.user, run)
        if bodies or end is not None or was_full is not state.is_full:
            self._wake(run)
        return state

    def restore(self, key: RunKey, lost: RunState, now: float) -> bool:
        """Create a run again that the table has lost, without items: those before `lost.taken` are not needed.

        Also moves a log there that ends before. Return False if the run was deleted, or has ended.
        """
        user = self._users.get(key.user)
        run = None if user is None else user.runs.get(key.id)
        if run is None:
            if self._is_known(user, key.id, now):
                return False
            run = self._add(key, lost.info)
            run.attach(lost.attachment, lost.order)
            run.state.is_attached, run.state.cancel = lost.is_attached, lost.cancel
        state = run.state
        if state.info.generation != lost.info.generation or state.end is not None:
            return False
        if state.next < lost.taken:
            while run.items:
                self._drop_item(self._users[key.user], run)
            state.first = state.next = state.taken = lost.taken
            run.untaken = 0
        return True

    def known(self, keys: Iterable[RunKey], now: float) -> None:
        """Remember runs that have gone, whose ids the table has lost."""
        for key in keys:
            user = self._users.setdefault(key.user, _User())
            if key.id not in user.runs:
                self._remember(user, key.id, now)

    def _is_full(self, user: str, run: _Run) -> bool:
        state, limits = run.state, self.limits
        return state.next > state.taken and (
            state.next - state.taken >= limits.items
            or run.untaken >= limits.bytes
            or self._users[user].size >= limits.bytes_per_user
        )

    def _make_room(self, key: RunKey, run: _Run, now: float) -> None:
        """Drop taken items, then ended runs of the user, as far as the bounds need it."""
        limits, user = self.limits, self._users[key.user]
        while run.has_taken and (len(run.items) > limits.items or run.size > limits.bytes):
            self._drop_item(user, run)
        if user.size < limits.bytes_per_user:
            return
        for other in user.runs.values():
            while other.has_taken and user.size >= limits.bytes_per_user:
                self._drop_item(user, other)
        while user.size >= limits.bytes_per_user and self._drop_ended(key.user, now, but=key.id):
            pass

    def _drop_item(self, user: _User, run: _Run) -> None:
        size = ITEM_BYTES + len(run.items.pop(0))
        run.size -= size
        user.size -= size
        self.size -= size
        run.state.first += 1

    # --- time ------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> int:
        """Delete the runs that are not kept any more, and return how many."""
        dropped = 0
        for name in [*self._users]:
            user = self._users[name]
            for id_, run in [*user.runs.items()]:
                is_read = run.state.is_attached and now < run.drop_at
                if run.state.end is not None and not is_read and now >= min(run.keep_until, run.drop_at):
                    self._drop(RunKey(name, id_), now)
                    dropped += 1
            self._forget_gone(user, now)
            if not user.runs and not user.gone:
                del self._users[name]
        return dropped

    def watch(self, key: RunKey, wake: Callable[[], None]) -> None:
        """Have `wake` called when a run changes."""
        self._find(key).watchers.append(wake)

    def unwatch(self, key: RunKey, wake: Callable[[], None]) -> None:
        """Undo `watch`. Does nothing for a run that has gone."""
        run = self._get(key)
        if run is not None and wake in run.watchers:
            run.watchers.remove(wake)

    # --- parts -----------------------------------------------------------------------------------------

    def _get(self, key: RunKey) -> _Run | None:
        user = self._users.get(key.user)
        return None if user is None else user.runs.get(key.id)

    def _find(self, key: RunKey) -> _Run:
        run = self._get(key)
        if run is None:
            raise NotFound("the run has gone")
        return run

    def _is_known(self, user: _User | None, id_: str, now: float) -> bool:
        if user is None:
            return False
        self._forget_gone(user, now)
        return id_ in user.gone

    def _forget_gone(self, user: _User, now: float) -> None:
        while user.gone and next(iter(user.gone.values())) <= now:
            user.gone.popitem(last=False)
            self.size -= GONE_BYTES

    def _remember(self, user: _User, id_: str, now: float) -> None:
        if id_ not in user.gone:
            self.size += GONE_BYTES
        user.gone[id_] = now + KNOWN_S
        user.gone.move_to_end(id_)  # the oldest is first

    def _drop_ended(self, name: str, now: float, but: str = "") -> bool:
        """Drop the run of a user that ended first. Return whether there was one."""
        ended = (
            (run.drop_at, id_)
            for id_, run in self._users[name].runs.items()
            if run.state.end is not None and id_ != but
        )
        oldest = min(ended, default=None)
        if oldest is None:
            return False
        self._drop(RunKey(name, oldest[1]), now)
        return True

    def _drop(self, key: RunKey, now: float) -> None:
        user = self._users[key.user]
        run = user.runs.pop(key.id)
        user.size -= run.size
        self.size -= run.size + RUN_BYTES + (run.state.info.size if run.state.end is None else 0)
        self._remember(user, key.id, now)
        self._wake(run)

    def _wake(self, run: _Run) -> None:
        for wake in tuple(run.watchers):
            wake()


def check_binding(info: RunInfo, is_bound: bool) -> None:
    """Raise PermissionDenied for a session that is less bound than the one that has opened a run."""
    if info.is_bound and not is_bound:
        raise not_bound()


def not_bound() -> PermissionDenied:
    return PermissionDenied("the run was opened by a session that is bound to a key; use such a session")


def out_of_range(first: int, next: int) -> OutOfRange:
    return OutOfRange(f"the run has items from {first} to {next}", {"first": first, "next": next})


def too_many_runs(limit: int) -> ResourceExhausted:
    return ResourceExhausted("this user has too many durable runs; cancel one", {"limit": limit})
