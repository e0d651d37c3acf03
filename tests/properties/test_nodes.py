"""Test two nodes that share a store with any sequence of calls and faults.

A revoked session and a replaced token are refused at once by the node that acknowledged it, and within BOUND_S by
the other. An isolated node accepts nothing after its grace. Once all faults are over, nothing acknowledged is lost,
at most one token of a session is good, and no user has more sessions than allowed.

What a failover loses is not kept if the only node that remembers it crashes, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.helpers import machine_settings
from tests.properties.nodes import (
    DELAY_S,
    FAULTS,
    GRACE_S,
    REFUSES,
    TIMEOUT_S,
    WORKS,
    Node,
    Simulation,
    raw_id,
)
from zcproto.errors import CallError, Code
from zcproto.sessions import OpenedSession, SessionSettings
from zcproto.sessions.health import HealthState
from zcproto.sessions.record import WhenFull
from zcproto.sessions.token import digest_of

BOUND_S = 5.0
DETECTION_S = 2.0
"""How long a node may take to notice that it is isolated."""

SETTLED_S = 12.0
RESTORED_S = 45.0
REFRESH_GRACE_S = 10.0
SKEW_MS = 1_000
RETRIED_S = REFRESH_GRACE_S - 3.0
"""How long after its first attempt a refresh may be retried, with clocks that differ."""

USERS = ("ada", "ben")
KEYS = ("", "", "tls:" + "ab" * 32)
CLIENT = {"client": "test/1", "address": "192.0.2.7"}
DEAD = {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED}

NUMBERS = st.sampled_from([0, 1])


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
    spent: dict[bytes, Fact] = field(default_factory=dict)
    ended: Fact | None = None
    may_be_lost: bool = False
    refreshing_since: float | None = None
    """When the first refresh with an unknown outcome began."""

    def __repr__(self) -> str:
        return f"{self.user}'s {self.id[:4]}"

    @property
    def token(self) -> bytes:
        return self.pairs[-1][0]


class Nodes(RuleBasedStateMachine):
    """`isolated_since` and `disturbed_at` are by the number of a node."""

    @initialize(when_full=st.sampled_from(["refuse", "evict_oldest", "evict_oldest"]))
    def begin(self, when_full: WhenFull) -> None:
        self.limit = 2
        chosen = SessionSettings(
            per_user=self.limit, when_full=when_full, refresh_grace_ms=round(REFRESH_GRACE_S * 1_000)
        )
        self.simulation = Simulation(chosen)
        self.store = self.simulation.store
        self.store.on_evicted = self.evicted
        self.sessions: list[ModelSession] = []
        self.tasks: list[Any] = []
        self.last_accepted: list[tuple[int, str, bytes]] = []
        self.evictions: dict[bytes, list[bytes]] = {}
        self.revoked_user_at = dict.fromkeys(USERS, -1_000.0)
        self.isolated_since: list[float | None] = [None, None]
        self.disturbed_at = [0.0, 0.0]
        self.stopped_at = [0.0, 0.0]
        self.failed_over_at = 0.0
        self.has_lost_data = False
        self.advance(0.0)

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
        for session in self.sessions:
            session.may_be_lost |= raw_id(session.id) in ended

    def lose_facts(self) -> None:
        """Give up what neither the primary nor a node has any more."""
        nodes = self.simulation.nodes
        pending = {key for disk in self.simulation.disks for key in disk}
        for session in self.sessions:
            session_id = raw_id(session.id)
            registry = self.store.primary.registry
            record = registry.record(session_id)
            if record is None or record.token_digest != digest_of(session.token):
                session.may_be_lost = True
            if registry.ended(session_id) is not None:
                continue
            is_pending = not pending.isdisjoint({(session_id, None, None), (b"", session.user, None)})
            if session.ended is not None and session.ended.node not in nodes and not is_pending:
                session.ended, session.may_be_lost = None, True
            for token, fact in list(session.spent.items()):
                is_spent = record is not None and record.token_digest != digest_of(token)
                if not is_spent and fact.node not in nodes:
                    del session.spent[token]

    def accepted(self, number: int, node: Node, session: ModelSession, token: bytes) -> None:
        """Check that a node was allowed to accept a token."""
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

    @rule(number=NUMBERS, user=st.sampled_from(USERS), key=st.sampled_from(KEYS))
    def open(self, number: int, user: str, key: str) -> None:
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

        self.spawn(
            number,
            lambda node: node.sessions.open(user, operator=False, key=key, **CLIENT),
            done,
            self.refused,
        )

    def is_evicted(self, session: ModelSession) -> bool:
        return any(raw_id(session.id) in ended for ended in self.evictions.values())

    def refused(self, error: CallError) -> None:
        assert error.code in DEAD | {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED}

    @precondition(lambda self: self.sessions)
    @rule(number=NUMBERS, data=st.data(), age=st.sampled_from([0, 0, 0, 1, 2]))
    def request(self, number: int, data: st.DataObject, age: int) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        self.send_request(number, session, session.pairs[-1 - age % len(session.pairs)][0])

    def send_request(self, number: int, session: ModelSession, token: bytes) -> None:
        results: list[None] = []

        def done(node: Node, code: Code | None) -> None:
            if code in DEAD and token == session.token and session.refreshing_since is None:
                assert session.may_be_lost or session.ended, "nothing acknowledged is lost"

        def accepted(node: Node) -> None:
            self.accepted(number, node, session, token)
            self.last_accepted.append((number, session.id, token))

        self.spawn(
            number,
            lambda node: node.request(session.id, token, lambda: accepted(node)),
            done,
        )
        assert not results

    @precondition(lambda self: self.sessions)
    @rule(number=NUMBERS, data=st.data())
    def refresh(self, number: int, data: st.DataObject) -> None:
        """Refresh a session; or retry a refresh whose outcome is unknown, on any node."""
        session = data.draw(st.sampled_from(self.sessions))
        began = self.now
        if session.refreshing_since is None:
            session.refreshing_since = began
        elif began > session.refreshing_since + RETRIED_S:
            session.may_be_lost = True  # it looks like theft by now
        used, refresh_token = session.pairs[-1]

        def done(node: Node, opened: OpenedSession) -> None:
            assert opened.refresh_token is not None
            if session.token == used:
                session.refreshing_since = None
            if opened.token not in [token for token, _ in session.pairs]:
                if session.token != used:
                    assert session.may_be_lost, "one refresh has one result"
                    session.spent[opened.token] = self.fact(number, node)
                    return
                for token, _ in session.pairs:
                    session.spent.setdefault(token, self.fact(number, node))
                session.pairs.append((opened.token, opened.refresh_token))
            if node.link.server is not self.store.primary or self.failed_over_at >= began:
                session.may_be_lost = True

        def refused(error: CallError) -> None:
            self.refused(error)
            if error.code in DEAD and session.token == used:
                assert session.may_be_lost or session.ended, "nothing acknowledged is lost"

        self.spawn(number, lambda node: node.sessions.refresh(refresh_token, **CLIENT), done, refused)

    @precondition(lambda self: any(len(each.pairs) > 1 for each in self.sessions))
    @rule(number=NUMBERS, data=st.data())
    def steal(self, number: int, data: st.DataObject) -> None:
        """Show a spent refresh token."""
        session = data.draw(st.sampled_from([each for each in self.sessions if len(each.pairs) > 1]))
        session.may_be_lost = True
        self.spawn(
            number,
            lambda node: node.sessions.refresh(session.pairs[0][1], client="thief/1", address="192.0.2.9"),
            lambda node, opened: None,
            self.refused,
        )

    @precondition(lambda self: self.sessions)
    @rule(number=NUMBERS, data=st.data())
    def revoke(self, number: int, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        was_lost, session.may_be_lost = session.may_be_lost, True

        def done(node: Node, is_revoked: bool) -> None:
            if is_revoked:
                session.ended = session.ended or self.fact(number, node)
            else:
                assert was_lost or session.ended, "nothing acknowledged is lost"

        self.spawn(
            number,
            lambda node: node.sessions.revoke(session.id, user=session.user, reason="test"),
            done,
            self.refused,
        )

    @rule(number=NUMBERS, user=st.sampled_from(USERS), key=st.sampled_from([*KEYS[1:], ""]))
    def revoke_many(self, number: int, user: str, key: str) -> None:
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
        """Note that sessions of a user that were opened by now may end."""
        self.revoked_user_at[user] = self.now
        for session in self.sessions:
            session.may_be_lost |= session.user == user

    @precondition(lambda self: self.sessions)
    @rule(number=NUMBERS, data=st.data())
    def disconnect(self, number: int, data: st.DataObject) -> None:
        node = self.simulation.nodes[number]
        session = data.draw(st.sampled_from(self.sessions))
        if node is not None:
            node.conversations.pop(session.id, None)

    @rule(limit=st.sampled_from([1, 2, 3]))
    def change_limit(self, limit: int) -> None:
        self.limit = limit
        self.simulation.settings = replace(self.simulation.settings, per_user=limit)
        for node in self.simulation.nodes:
            if node is not None:
                node.registry.reconfigure(self.simulation.settings)

    # --- faults ----------------------------------------------------------------------------------------

    @rule(numbers=st.sampled_from([(0,), (1,), (0, 1)]), mode=st.sampled_from([WORKS, WORKS, *FAULTS]))
    def set_link(self, numbers: tuple[int, ...], mode: str) -> None:
        for number in numbers:
            node = self.simulation.nodes[number]
            if node is not None:
                node.link.set_mode(mode)
        self.advance(0.0)

    @rule(lost=st.sampled_from([0, 1, 2, 3, 5, 8]), is_planned=st.booleans())
    def fail_over(self, lost: int, is_planned: bool) -> None:
        self.failed_over_at = self.now
        self.store.fail_over(lost, is_planned=is_planned)
        self.lose_facts()
        self.advance(0.0)

    @rule(rare=st.integers(0, 3))
    def lose_all_data(self, rare: int) -> None:
        if not rare:
            self.failed_over_at = self.now
            self.has_lost_data = True
            self.store.lose_all()
            for session in self.sessions:
                session.may_be_lost = True
            self.lose_facts()
            self.advance(0.0)

    @rule(number=NUMBERS)
    def pause_or_resume(self, number: int) -> None:
        node = self.simulation.nodes[number]
        if node is not None:
            node.is_paused = not node.is_paused
            self.advance(0.0)

    @rule(number=NUMBERS)
    def crash_or_start(self, number: int) -> None:
        if self.simulation.nodes[number] is None:
            self.simulation.start(number)
        else:
            self.simulation.crash(number)
            self.lose_facts()
        self.advance(0.0)

    @rule(number=NUMBERS, offset_ms=st.sampled_from([-SKEW_MS, 0, SKEW_MS]))
    def set_clock(self, number: int, offset_ms: int) -> None:
        self.simulation.clocks[number].offset_ms = offset_ms
        self.advance(0.0)

    @rule(seconds=st.sampled_from([0.0, 0.01, DELAY_S, TIMEOUT_S, 1.0, 3.0, 6.0, 15.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.advance(seconds)

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
                self.send_request(number, session, token)
                self.advance(0.01)
        return {(session_id, token) for _, session_id, token in self.last_accepted}

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        try:
            self.settle()
        finally:
            self.simulation.close()

    def settle(self) -> None:
        for number, node in enumerate(self.simulation.nodes):
            if node is None:
                self.simulation.start(number)
            else:
                node.is_paused = False
                node.link.set_mode(WORKS)
        self.advance(RESTORED_S if self.has_lost_data else SETTLED_S)
        for node in self.simulation.nodes:
            assert node is not None
            assert node.sync.health.state is HealthState.HEALTHY
            assert not len(node.pending)
        accepted, elsewhere = self.accepted_tokens(0), self.accepted_tokens(1)
        # After a loss of all data, a session that a node has restored may have ended on the other.
        assert accepted == elsewhere or self.has_lost_data, "nodes agree"
        accepted |= elsewhere
        for session in self.sessions:
            good = [token for session_id, token in accepted if session_id == session.id]
            assert len(good) <= 1, "at most one token is good"
            if session.refreshing_since is None and not session.may_be_lost and session.ended is None:
                assert good == [session.token], "nothing acknowledged is lost"
        for user in USERS:
            self.open(0, user, "")
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


def test_isolated_node_without_an_operation_accepts_nothing_after_its_grace() -> None:
    nodes = Nodes()
    nodes.begin(when_full="refuse")
    nodes.open(number=0, user="ada", key="")
    nodes.set_link(numbers=(0,), mode=REFUSES)
    nodes.time_passes(seconds=25.0)
    (session,) = nodes.sessions
    nodes.send_request(0, session, session.token)
    nodes.teardown()


TestNodes = Nodes.TestCase
# The same examples in each run, except with `--hypothesis-profile=long`.
TestNodes.settings = settings(
    machine_settings(max_examples=60, steps=40), derandomize=settings.get_current_profile_name() != "long"
)
