"""What clients of two nodes know and may expect, while the nodes and their store have faults.

A revoked session and a replaced token are refused at once by the node that acknowledged it, and within BOUND_S by
the other. An isolated node accepts nothing after its grace. Once all faults are over, nothing acknowledged is lost,
at most one token of a session is good, and no user has more sessions than allowed.

What a failover loses is not kept if all nodes that remember it crash, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.properties.nodes import GRACE_S, SLOW, WORKS, Node, Simulation, raw_id
from zcproto.errors import CallError, Code
from zcproto.sessions import OpenedSession, SessionSettings
from zcproto.sessions.health import HealthState
from zcproto.sessions.record import Rotation, SessionRecord, WhenFull
from zcproto.sessions.token import digest_of
from zcproto.stores.base import NotRotated, Repeated

BOUND_S = 5.0
LEASED_S = 2.0
"""How long a node may take to write the leases of new connections, or all after a gap."""

DETECTION_S = 2.0
"""How long a node may take to notice that it is isolated."""

SETTLED_S = 12.0
RESTORED_S = 45.0
REFRESH_GRACE_S = 10.0
SKEW_MS = 1_000
RETRIED_MS = 7_000
"""How long after its first attempt a refresh may be retried, with clocks that differ."""

USERS = ("ada", "ben")
CLIENT = {"client": "test/1", "address": "192.0.2.7"}
DEAD = {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED}


@dataclass
class Fact:
    """Something acknowledged by a node. `stored_at` is since when the primary has it."""

    number: int
    node: Node
    at: float
    stored_at: float | None = None


@dataclass(repr=False)
class ModelSession:
    """A session as its client has it. A `spent` token was replaced by another one that was acknowledged."""

    id: str
    user: str
    key: str
    opened_at: int
    pairs: list[tuple[bytes, bytes]]
    rotated_by: list[set[Node]] = field(default_factory=list)
    """For each rotation, from one of `pairs` to the next, the nodes that answered it and so remember it."""
    spent: dict[bytes, Fact] = field(default_factory=dict)
    ended: Fact | None = None
    may_be_lost: bool = False
    forgotten: set[bytes] = field(default_factory=set)
    """Tokens whose end was lost by the store and by all nodes that could repeat it."""
    refreshing_since: float | None = None
    """When the first refresh with an unknown outcome began."""
    is_missing: bool = False
    """Whether the store lost it with all data, and no node has restored it yet."""
    missing_at: float = -1_000.0
    """When it was last missing."""

    def __repr__(self) -> str:
        return f"{self.user}'s {self.id[:4]}"

    @property
    def token(self) -> bytes:
        return self.pairs[-1][0]


class Model:
    """Two nodes with their clients. `isolated_since` and `disturbed_at` are by the number of a node."""

    def __init__(self, when_full: WhenFull) -> None:
        self.limit = 2
        chosen = SessionSettings(
            per_user=self.limit, when_full=when_full, refresh_grace_ms=round(REFRESH_GRACE_S * 1_000)
        )
        self.simulation = Simulation(chosen)
        self.store = self.simulation.store
        self.store.on_evicted = self.evicted
        self.store.on_rotated = self.rotated
        self.sessions: list[ModelSession] = []
        self.tasks: list[Any] = []
        self.last_accepted: list[tuple[int, str, bytes]] = []
        self.evictions: dict[bytes, list[bytes]] = {}
        self.rotations: dict[bytes, list[Rotation]] = {}
        self.revoked_user_at = dict.fromkeys(USERS, -1_000.0)
        self.isolated_since: list[float | None] = [None, None]
        self.disturbed_at = [0.0, 0.0]
        self.stopped_at = [0.0, 0.0]
        self.failed_over_at = 0.0
        self.has_lost_data = False
        self.advance(0.0)
        for number in range(3):
            self.open(number % 2, USERS[number % 2])

    # --- what is observed ------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.simulation.time.now_s

    def advance(self, seconds: float) -> None:
        self.simulation.advance(seconds, self.observe)
        self.check_tasks()

    def observe(self) -> None:
        now = self.now
        for number, node in enumerate(self.simulation.nodes):
            if node is None or not node.is_serving:
                self.disturbed_at[number] = self.stopped_at[number] = now
                self.isolated_since[number] = None
                continue
            if node.link.is_reachable:
                self.isolated_since[number] = None
            elif self.isolated_since[number] is None:
                self.isolated_since[number] = now
            if not node.link.is_reachable or node.sync.health.state is not HealthState.HEALTHY:
                self.disturbed_at[number] = now
            if node.is_paused:
                self.stopped_at[number] = now
        for session in self.sessions:
            record = self.store.primary.registry.record(raw_id(session.id))
            session.is_missing &= record is None
            if session.is_missing:
                session.missing_at = now
                session.may_be_lost |= not self.can_be_restored(session)
            if session.ended is not None:
                self.note_stored(session.ended, record is None)
            for token, fact in session.spent.items():
                self.note_stored(fact, record is None or record.token_digest != digest_of(token))

    def note_stored(self, fact: Fact, is_stored: bool) -> None:
        if not is_stored:
            fact.stored_at = None
        elif fact.stored_at is None:
            fact.stored_at = self.now

    def evicted(self, new: bytes, ended: list[bytes]) -> None:
        self.evictions.setdefault(new, []).extend(ended)
        if self.simulation.settings.when_full == "evict_disconnected":
            for session in self.sessions:
                assert raw_id(session.id) not in ended or not self.is_in_use(session), "in use"
        for session in self.sessions:
            session.may_be_lost |= raw_id(session.id) in ended

    def is_in_use(self, session: ModelSession) -> bool:
        """Return whether a node that has had the store for a while has a connection that uses a session."""
        for number, node in enumerate(self.simulation.nodes):
            talk = None if node is None else node.conversations.get(session.id)
            if talk is not None and talk.is_joined and session.ended is None:
                known_since = max(talk.joined_at, self.disturbed_at[number], self.failed_over_at)
                if self.now > known_since + LEASED_S and node is not None and not node.is_paused:
                    record = node.registry.record(raw_id(session.id))
                    if record is not None and self.now < record.expires_at:
                        return True
        return False

    def rotated(self, rotation: Rotation, result: SessionRecord | NotRotated | Repeated) -> None:
        """Excuse the loss of a session whose client has given up a refresh that reaches the store late.

        By then it looks like theft; or it succeeds, if a failover has lost the one that was acknowledged.
        """
        made = self.rotations.setdefault(rotation.id, [])
        for session in self.sessions:
            acknowledged = {digest_of(token) for token, _ in session.pairs}
            if raw_id(session.id) != rotation.id or rotation.token_digest in acknowledged:
                continue
            if isinstance(result, SessionRecord):
                session.may_be_lost |= rotation.spent_digest != digest_of(session.pairs[-1][1])
            elif isinstance(result, NotRotated) and rotation.spent_digest in {
                each.spent_digest for each in made
            }:
                is_retry = rotation.spent_digest == made[-1].spent_digest
                session.may_be_lost |= not is_retry or rotation.wall >= made[-1].wall + RETRIED_MS
        if isinstance(result, SessionRecord):
            made.append(rotation)

    def lose_facts(self) -> None:
        """Give up what neither the primary nor a node has any more."""
        nodes = self.simulation.nodes
        pending = {key for disk in self.simulation.disks for key in disk}
        for session in self.sessions:
            session_id = raw_id(session.id)
            registry = self.store.primary.registry
            record = registry.record(session_id)
            digests = [digest_of(token) for token, _ in session.pairs]
            if record is None and session.is_missing:
                session.may_be_lost |= not self.can_be_restored(session)
            elif record is None or record.token_digest not in digests:
                session.may_be_lost = True
            else:
                repeating = session.rotated_by[digests.index(record.token_digest) :]
                session.may_be_lost |= any(answered.isdisjoint(nodes) for answered in repeating)
            if registry.ended(session_id) is not None:
                continue
            is_pending = not pending.isdisjoint({(session_id, None, None), (b"", session.user, None)})
            if session.ended is not None and not is_pending:
                # A node that was notified repeats the revocation, too.
                knowing = {node for node in nodes if node is not None and node.registry.ended(session_id)}
                if not self.is_remembered(session.ended, knowing):
                    session.ended, session.may_be_lost = None, True
                    session.forgotten.update(token for token, _ in session.pairs)
            rotated_by = dict(zip((token for token, _ in session.pairs), session.rotated_by, strict=False))
            for token, fact in list(session.spent.items()):
                is_spent = record is not None and record.token_digest != digest_of(token)
                if not is_spent and not self.is_remembered(fact, rotated_by.get(token, set())):
                    del session.spent[token]
                    session.forgotten.add(token)

    def can_be_restored(self, session: ModelSession) -> bool:
        """Return whether a node knows a session that the store has lost, and can write it back."""
        for node in self.simulation.nodes:
            if node is not None and node.is_serving and not node.is_paused and node.link.is_reachable:
                record = node.registry.record(raw_id(session.id))
                is_current = record is not None and record.token_digest == digest_of(session.token)
                if is_current and not node.registry.closed:
                    return True
        return False

    def is_remembered(self, fact: Fact, knowing: set[Node]) -> bool:
        """Return whether a running node remembers a fact: the one that acknowledged it, or one of these."""
        nodes = self.simulation.nodes
        if fact.node not in nodes:
            for number, node in enumerate(nodes):
                if node in knowing:
                    assert node is not None
                    fact.number, fact.node = number, node
        return fact.node in nodes

    def accepted(self, number: int, node: Node, session: ModelSession, token: bytes) -> None:
        isolated_since = self.isolated_since[number]
        assert isolated_since is None or self.now <= isolated_since + GRACE_S + DETECTION_S, "grace is over"
        for fact in (session.ended, session.spent.get(token)):
            if fact is None:
                continue
            assert fact.node is not node, "refused by the node that acknowledged it"
            assert fact is not session.ended or fact.number != number, "refused by this node after a restart"
            begins = [fact.at, self.failed_over_at, self.disturbed_at[number]]
            if fact.stored_at is not None:
                begins.append(fact.stored_at)
            else:
                begins += self.disturbed_at[fact.number], self.stopped_at[fact.number]
            assert self.now <= max(begins) + BOUND_S, "refused by all nodes within the bound"

    def check_refusal(self, session: ModelSession) -> None:
        is_excused = session.may_be_lost or session.ended or self.was_missing(session)
        assert is_excused, "nothing acknowledged is lost"

    def was_missing(self, session: ModelSession) -> bool:
        """Return whether a node may have looked for a session before another one restored it."""
        return self.now <= session.missing_at + BOUND_S

    def fact(self, number: int, node: Node) -> Fact:
        return Fact(number, node, self.now)

    # --- clients ---------------------------------------------------------------------------------------

    def spawn(
        self,
        number: int,
        call: Callable[[Node], Awaitable[Any]],
        done: Callable[[Node, Any], None],
        refused: Callable[[CallError], None] = lambda error: None,
    ) -> None:
        node = self.simulation.nodes[number]
        if node is None or not node.is_serving:
            return

        async def run() -> None:
            try:
                result = await call(node)
            except CallError as error:
                refused(error)
            else:
                done(node, result)

        task = node.loop.create_task(run())
        self.tasks.append(task)
        self.advance(0.0)

    def open(self, number: int, user: str, key: str = "") -> None:
        began, clock = self.now, self.simulation.clocks[number]
        wall = clock.wall()

        def done(node: Node, opened: OpenedSession) -> None:
            assert opened.refresh_token is not None
            session = ModelSession(
                opened.session.id,
                user,
                key,
                max(wall, clock.wall()),
                [(opened.token, opened.refresh_token)],
                [],
            )
            # A revocation of all sessions of a user ends those opened at the same time, by any of the clocks.
            session.may_be_lost = node.link.server is not self.store.primary or (
                self.failed_over_at >= began
                or began <= self.revoked_user_at[user] + 15.0
                or self.is_evicted(session)
            )
            self.sessions.append(session)
            for each in self.sessions:
                if raw_id(each.id) in self.evictions.get(raw_id(session.id), []):
                    each.ended = each.ended or self.fact(number, node)

        self.spawn(number, lambda node: node.sessions.open(user, key=key, **CLIENT), done, self.refused)

    def is_evicted(self, session: ModelSession) -> bool:
        return any(raw_id(session.id) in ended for ended in self.evictions.values())

    def refused(self, error: CallError) -> None:
        assert error.code in DEAD | {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED}

    def request(self, number: int, session: ModelSession, token: bytes) -> None:
        def done(node: Node, code: Code | None) -> None:
            if code in DEAD and token == session.token and session.refreshing_since is None:
                self.check_refusal(session)

        def accepted(node: Node) -> None:
            self.accepted(number, node, session, token)
            self.last_accepted.append((number, session.id, token))

        self.spawn(number, lambda node: node.request(session.id, token, lambda: accepted(node)), done)

    def refresh(self, number: int, session: ModelSession) -> None:
        """Refresh a session; or retry a refresh whose outcome is unknown."""
        began = self.now
        if session.refreshing_since is None:
            session.refreshing_since = began
        used, refresh_token = session.pairs[-1]

        def done(node: Node, opened: OpenedSession) -> None:
            assert opened.refresh_token is not None
            if session.token == used:
                session.refreshing_since = None
            tokens = [token for token, _ in session.pairs]
            if opened.token in tokens[1:]:
                session.rotated_by[tokens.index(opened.token) - 1].add(node)
            else:
                if session.token != used:
                    assert session.may_be_lost, "one refresh has one result"
                    session.spent[opened.token] = self.fact(number, node)
                    return
                session.spent[used] = self.fact(number, node)
                session.pairs.append((opened.token, opened.refresh_token))
                session.rotated_by.append({node})
            if node.link.server is not self.store.primary or self.failed_over_at >= began:
                session.may_be_lost = True

        def refused(error: CallError) -> None:
            self.refused(error)
            if error.code in DEAD and session.token == used:
                self.check_refusal(session)

        self.spawn(number, lambda node: node.sessions.refresh(refresh_token, **CLIENT), done, refused)

    def steal(self, number: int, session: ModelSession) -> None:
        session.may_be_lost = True
        self.spawn(
            number,
            lambda node: node.sessions.refresh(session.pairs[0][1], client="thief/1", address="192.0.2.9"),
            lambda node, opened: None,
            self.refused,
        )

    def revoke(self, number: int, session: ModelSession) -> None:
        began, was_lost, session.may_be_lost = self.now, session.may_be_lost, True

        def done(node: Node, is_revoked: bool) -> None:
            if is_revoked:
                session.ended = session.ended or self.fact(number, node)
            else:
                has_ended = self.is_evicted(session) or self.revoked_user_at[session.user] >= began
                is_excused = was_lost or session.ended or has_ended or self.was_missing(session)
                assert is_excused, "nothing acknowledged is lost"

        self.spawn(
            number,
            lambda node: node.sessions.revoke(session.id, user=session.user, reason="test"),
            done,
            self.refused,
        )

    def revoke_many(self, number: int, user: str, key: str = "") -> None:
        """Revoke all sessions of a user, or those bound to a key."""
        mine = [each for each in self.sessions if each.user == user and key in ("", each.key)]
        self.note_revoked(user)
        wall = self.simulation.clocks[number].wall()
        # A repetition after a failover does not end sessions opened later by the clocks of the nodes.
        mine = [each for each in mine if each.opened_at <= wall]

        def done(node: Node, count: int) -> None:
            self.note_revoked(user)
            for session in mine:
                session.ended = session.ended or self.fact(number, node)

        def call(node: Node) -> Awaitable[int]:
            if key:
                return node.sessions.revoke_key(user, key, "test")
            return node.sessions.revoke_user(user, "test")

        def refused(error: CallError) -> None:
            self.note_revoked(user)
            self.refused(error)

        self.spawn(number, call, done, refused)

    def note_revoked(self, user: str) -> None:
        self.revoked_user_at[user] = self.now
        for session in self.sessions:
            session.may_be_lost |= session.user == user

    def disconnect(self, number: int, session: ModelSession) -> None:
        node = self.simulation.nodes[number]
        if node is not None:
            node.disconnect(session.id)

    def change_limit(self, limit: int) -> None:
        self.limit = limit
        self.simulation.settings = replace(self.simulation.settings, per_user=limit)
        for node in self.simulation.nodes:
            if node is not None:
                node.registry.reconfigure(self.simulation.settings)

    # --- faults ----------------------------------------------------------------------------------------

    def set_link(self, numbers: tuple[int, ...], mode: str) -> None:
        for number in numbers:
            node = self.simulation.nodes[number]
            if node is not None:
                node.link.set_mode(mode)
        self.advance(0.0)

    def fail_over(self, lost: int, *, is_planned: bool) -> None:
        self.failed_over_at = self.now
        self.store.fail_over(lost, is_planned=is_planned)
        self.lose_facts()
        self.advance(0.0)

    def calm(self) -> None:
        """End all faults, and let the nodes recover."""
        for number, node in enumerate(self.simulation.nodes):
            if node is None:
                self.simulation.start(number)
            else:
                node.is_paused = False
                node.link.set_mode(WORKS)
        self.advance(3.0)

    def certain(self, number: int) -> ModelSession | None:
        """End all faults, and return a session that must work. Open one if necessary."""
        self.calm()
        if not self.sure:
            for user in USERS:
                self.open(number, user)
        return next(iter(self.sure), None)

    @property
    def sure(self) -> list[ModelSession]:
        """The sessions that must work."""
        return [
            each
            for each in self.sessions
            if not each.may_be_lost and each.ended is None and each.refreshing_since is None
        ]

    def lose_last_write(self, number: int, *, revokes: bool, restarts: bool, is_planned: bool) -> None:
        """Lose a revocation or a rotation by a failover, so that only the node that made it remembers it."""
        session = self.certain(number)
        if session is None:
            return
        (self.revoke if revokes else self.refresh)(number, session)
        self.fail_over(1, is_planned=is_planned)
        if restarts:
            self.crash_or_start(1 - number)
            self.crash_or_start(1 - number)
        self.advance(6.0)
        self.use(session)

    def pause_over_revocation(self, number: int, seconds: float, *, sets_back: bool) -> None:
        """Revoke on one node while the other is paused, lacks the notice, and has a slow link.

        Its wall clock may be set back by the length of the pause.
        """
        session = self.certain(number)
        if session is None:
            return
        self.use(session)
        node = self.simulation.nodes[number]
        node.is_paused = True
        node.link.set_mode(SLOW)
        self.fail_over(0, is_planned=True)
        self.advance(3.0)
        self.revoke(1 - number, session)
        self.advance(seconds)
        clock = self.simulation.clocks[number]
        set_back_ms = round((3.0 + seconds) * 1_000) if sets_back else 0
        clock.offset_ms -= set_back_ms
        node.is_paused = False
        self.advance(0.0)
        self.use(session)
        clock.offset_ms += set_back_ms

    def use(self, session: ModelSession) -> None:
        """Send a request with each token of a session to each node."""
        for number in (0, 1):
            for token, _ in session.pairs:
                self.request(number, session, token)

    def lose_all_data(self) -> None:
        self.failed_over_at = self.now
        self.has_lost_data = True
        self.store.lose_all()
        for session in self.sessions:
            session.is_missing = True
        self.lose_facts()
        self.advance(0.0)

    def pause_or_resume(self, number: int) -> None:
        node = self.simulation.nodes[number]
        if node is not None:
            node.is_paused = not node.is_paused
            self.advance(0.0)

    def crash_or_start(self, number: int) -> None:
        if self.simulation.nodes[number] is None:
            self.simulation.start(number)
        else:
            self.simulation.crash(number)
            self.lose_facts()
        self.advance(0.0)

    def set_clock(self, number: int, offset_ms: int) -> None:
        self.simulation.clocks[number].offset_ms = offset_ms
        self.advance(0.0)

    # --- after all faults ------------------------------------------------------------------------------

    def check_tasks(self) -> None:
        running = []
        for task in self.tasks:
            if not task.done():
                running.append(task)
            elif not task.cancelled():
                task.result()
        self.tasks = running

    def accepted_tokens(self, number: int) -> set[tuple[str, bytes]]:
        """Return the tokens that a node accepts."""
        self.last_accepted = []
        for session in self.sessions:
            for token, _ in session.pairs:
                self.request(number, session, token)
                self.advance(0.01)
        return {(session_id, token) for _, session_id, token in self.last_accepted}

    def finish(self) -> None:
        """End all faults and check everything."""
        try:
            self.settle()
        finally:
            self.simulation.close()

    def settle(self) -> None:
        self.calm()
        self.advance(RESTORED_S if self.has_lost_data else SETTLED_S)
        for node in self.simulation.nodes:
            assert node.sync.health.state is HealthState.HEALTHY
            assert not len(node.pending)
        accepted, elsewhere = self.accepted_tokens(0), self.accepted_tokens(1)
        # After a loss of all data, a session that a node has restored may have ended on the other. A node that once
        # looked up a forgotten token still refuses it. It knows the token, not the session, so cannot repeat that.
        forgotten = {(each.id, token) for each in self.sessions for token in each.forgotten}
        assert accepted ^ elsewhere <= forgotten or self.has_lost_data, "nodes agree"
        accepted |= elsewhere
        for session in self.sessions:
            good = [token for session_id, token in accepted if session_id == session.id]
            assert len(good) <= 1, "at most one token is good"
            if session.refreshing_since is None and not session.may_be_lost and session.ended is None:
                assert good == [session.token], "nothing acknowledged is lost"
        for user in USERS:
            self.open(0, user)
            self.advance(1.0)
            live = self.store.primary.live(user)
            if self.simulation.settings.when_full == "evict_oldest":
                assert len(live) <= self.limit, "at most the limit live"
        self.advance(6.0)
        accepted = self.accepted_tokens(0) | self.accepted_tokens(1)
        if self.simulation.settings.when_full == "evict_oldest":
            for user in USERS:
                mine = [each for each in self.sessions if each.user == user]
                assert len({each.id for each in mine} & {each for each, _ in accepted}) <= self.limit
