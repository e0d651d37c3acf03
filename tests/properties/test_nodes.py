"""Test two nodes that share a store with any sequence of calls and faults (see nodes_model.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.helpers import machine_settings
from tests.loop_reports import LoopReports
from tests.properties.nodes import DELAY_S, FAULTS, REFUSES, TIMEOUT_S, WORKS
from tests.properties.nodes_model import SKEW_MS, USERS, Model
from zcproto.sessions import SessionRegistry
from zcproto.sessions.record import WhenFull
from zcproto.stores.base import LEASE_MS
from zcproto.stores.leases import Leases
from zcproto.stores.operations import Call
from zcproto.stores.pending import Revocation
from zcproto.stores.revoker import Revoker
from zcproto.stores.sync import ChangeTracker, StallWatch

KEYS = ("", "", "tls:" + "ab" * 32)
NUMBERS = st.sampled_from([0, 1])

has_sessions = precondition(lambda self: self.model.sessions)


class Nodes(RuleBasedStateMachine):
    @initialize(when_full=st.sampled_from(["refuse", "evict_oldest", "evict_disconnected"]))
    def begin(self, when_full: WhenFull) -> None:
        self.model = Model(when_full)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.finish()

    # --- clients ---------------------------------------------------------------------------------------

    @rule(number=NUMBERS, user=st.sampled_from(USERS), key=st.sampled_from(KEYS))
    def open(self, number: int, user: str, key: str) -> None:
        self.model.open(number, user, key)

    @has_sessions
    @rule(number=NUMBERS, data=st.data(), age=st.sampled_from([0, 0, 0, 1, 2]))
    def request(self, number: int, data: st.DataObject, age: int) -> None:
        session = data.draw(st.sampled_from(self.model.sessions))
        self.model.request(number, session, session.pairs[-1 - age % len(session.pairs)][0])

    @has_sessions
    @rule(number=NUMBERS, data=st.data())
    def refresh(self, number: int, data: st.DataObject) -> None:
        self.model.refresh(number, data.draw(st.sampled_from(self.model.sessions)))

    @precondition(lambda self: any(len(each.pairs) > 1 for each in self.model.sessions))
    @rule(number=NUMBERS, data=st.data())
    def steal(self, number: int, data: st.DataObject) -> None:
        refreshed = [each for each in self.model.sessions if len(each.pairs) > 1]
        self.model.steal(number, data.draw(st.sampled_from(refreshed)))

    @has_sessions
    @rule(number=NUMBERS, data=st.data())
    def revoke(self, number: int, data: st.DataObject) -> None:
        self.model.revoke(number, data.draw(st.sampled_from(self.model.sessions)))

    @rule(number=NUMBERS, user=st.sampled_from(USERS), key=st.sampled_from([*KEYS[1:], ""]))
    def revoke_many(self, number: int, user: str, key: str) -> None:
        self.model.revoke_many(number, user, key)

    @has_sessions
    @rule(number=NUMBERS, data=st.data())
    def disconnect(self, number: int, data: st.DataObject) -> None:
        self.model.disconnect(number, data.draw(st.sampled_from(self.model.sessions)))

    @rule(limit=st.sampled_from([1, 2, 3]))
    def change_limit(self, limit: int) -> None:
        self.model.change_limit(limit)

    # --- faults ----------------------------------------------------------------------------------------

    @rule(numbers=st.sampled_from([(0,), (1,), (0, 1)]), mode=st.sampled_from([WORKS, WORKS, *FAULTS]))
    def set_link(self, numbers: tuple[int, ...], mode: str) -> None:
        self.model.set_link(numbers, mode)

    @rule(lost=st.sampled_from([0, 1, 2, 3, 5, 8]), is_planned=st.booleans())
    def fail_over(self, lost: int, is_planned: bool) -> None:
        self.model.fail_over(lost, is_planned=is_planned)

    @rule(number=NUMBERS, revokes=st.booleans(), restarts=st.booleans(), is_planned=st.booleans())
    def lose_last_write(self, number: int, revokes: bool, restarts: bool, is_planned: bool) -> None:
        self.model.lose_last_write(number, revokes=revokes, restarts=restarts, is_planned=is_planned)

    @rule(number=NUMBERS, seconds=st.sampled_from([6.0, 15.0]), sets_back=st.booleans())
    def pause_over_revocation(self, number: int, seconds: float, sets_back: bool) -> None:
        self.model.pause_over_revocation(number, seconds, sets_back=sets_back)

    @rule(rare=st.integers(0, 3))
    def lose_all_data(self, rare: int) -> None:
        if not rare:
            self.model.lose_all_data()

    @rule(number=NUMBERS)
    def pause_or_resume(self, number: int) -> None:
        self.model.pause_or_resume(number)

    @rule(number=NUMBERS)
    def crash_or_start(self, number: int) -> None:
        self.model.crash_or_start(number)

    @rule(number=NUMBERS, offset_ms=st.sampled_from([-SKEW_MS, 0, SKEW_MS]))
    def set_clock(self, number: int, offset_ms: int) -> None:
        self.model.set_clock(number, offset_ms)

    @rule(seconds=st.sampled_from([0.0, 0.01, DELAY_S, TIMEOUT_S, 1.0, 3.0, 6.0, 15.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.model.advance(seconds)


TestNodes = Nodes.TestCase
# The same examples in each run, except with `--hypothesis-profile=long`.
TestNodes.settings = settings(
    machine_settings(max_examples=60, steps=40), derandomize=settings.get_current_profile_name() != "long"
)


# --- faults that the machine has to detect ---------------------------------------------------------------


async def _repeat_no_revocations(revoker: Revoker, call: Call, revocations: object) -> list[Revocation]:
    return []


async def _restore_nothing(changes: ChangeTracker, call: Call, ids: Iterable[bytes]) -> None:
    for session_id in list(ids):
        changes._to_restore.pop(session_id, None)


@pytest.mark.parametrize(
    ("owner", "method", "fault"),
    [
        pytest.param(Revoker, "_end_again", _repeat_no_revocations, id="revocations not repeated"),
        pytest.param(Revoker, "remember_rotation", lambda *_: None, id="rotations not remembered"),
        pytest.param(StallWatch, "handle_deadline", lambda watch, now: watch.resume(), id="stalls ignored"),
        pytest.param(SessionRegistry, "distrust", lambda registry: None, id="trusted after a stall"),
        pytest.param(
            *(ChangeTracker, "_restore", _restore_nothing),
            id="lost sessions not restored",
            marks=pytest.mark.slow,  # hundreds of examples
        ),
    ],
)
def test_state_machine_detects_seeded_fault(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, fault: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, method, fault)
    chosen = settings(max_examples=400, stateful_step_count=40, derandomize=True, database=None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Nodes, settings=settings(chosen, phases=[Phase.generate]))


# --- schedules that the machine has found, or that it rarely runs ----------------------------------------


def test_isolated_node_without_an_operation_accepts_nothing_after_its_grace() -> None:
    model = Model("refuse")
    model.set_link((0,), REFUSES)
    model.advance(25.0)
    session = model.sessions[0]
    model.request(0, session, session.token)
    model.finish()


def test_revocation_after_the_grace_ends_a_session_that_another_node_restores() -> None:
    model = Model("evict_oldest")
    model.pause_over_revocation(1, 15.0, sets_back=False)
    model.refresh(0, model.sessions[1])
    model.advance(0.01)
    model.lose_all_data()
    model.revoke_many(1, "ben")
    model.finish()


def test_rotation_lost_by_failover_and_crash_leaves_its_spent_token_refused_by_one_node() -> None:
    model = Model("evict_oldest")
    model.lose_last_write(1, revokes=False, restarts=False, is_planned=True)
    model.disconnect(0, model.sessions[0])
    model.crash_or_start(1)
    model.fail_over(1, is_planned=False)
    model.finish()


def test_revocation_lost_by_failover_and_crash_is_still_refused_where_the_token_was_looked_up() -> None:
    model = Model("evict_oldest")
    session = model.sessions[0]
    model.revoke(0, session)
    model.advance(0.01)
    model.request(1, session, session.token)
    model.advance(0.01)
    model.crash_or_start(0)
    model.fail_over(1, is_planned=False)
    model.finish()


def test_later_rotation_does_not_restore_an_earlier_one_that_is_lost() -> None:
    model = Model("evict_oldest")
    session = model.sessions[0]
    model.refresh(1, session)
    model.crash_or_start(1)
    model.crash_or_start(1)
    model.fail_over(5, is_planned=True)
    model.refresh(1, session)
    model.finish()


def test_revocation_sent_late_finds_a_session_that_ended_with_all_of_its_user() -> None:
    model = Model("evict_oldest")
    model.pause_or_resume(1)
    model.set_clock(0, -SKEW_MS)
    model.revoke(1, model.sessions[0])
    model.revoke_many(0, "ada")
    model.finish()


def test_refresh_sent_late_by_a_paused_node_ends_the_session() -> None:
    model = Model("evict_oldest")
    session = model.sessions[0]
    model.pause_or_resume(1)
    for number in (1, 0, 0):
        model.refresh(number, session)
        model.advance(0.01)
    model.pause_or_resume(1)
    model.finish()


def test_simulated_connection_keeps_the_order_of_operations() -> None:
    model = Model("refuse")
    node = model.simulation.nodes[0]
    assert node is not None
    answered: list[int] = []

    async def ask(number: int) -> None:
        await node.link.ping()
        answered.append(number)

    tasks = [node.loop.create_task(ask(number)) for number in range(20)]
    model.advance(0.01)
    model.finish()
    assert len(tasks) == len(answered)
    assert answered == sorted(answered)


@pytest.mark.parametrize("lost", range(9))
def test_rotation_lost_by_failover_is_repeated_before_its_refresh_token_is_used(lost: int) -> None:
    """Also if another operation, such as the lease of a session, found the new primary before."""
    model = Model("evict_disconnected")
    model.lose_last_write(0, revokes=False, restarts=True, is_planned=True)
    (session,) = (each for each in model.sessions if len(each.pairs) > 1)
    model.disconnect(0, session)
    model.fail_over(lost, is_planned=False)
    model.advance(0.2)
    model.refresh(0, session)
    model.finish()


def use_all_and_log_in() -> None:
    """Log in at one node while the other has had connections of all sessions for longer than a lease."""
    model = Model("evict_disconnected")
    try:
        for session in model.sessions:
            model.request(1, session, session.token)
        model.advance(2 * LEASE_MS / 1_000)
        model.open(0, "ada")
        model.advance(1.0)
    except AssertionError:
        model.simulation.close()
        raise
    model.finish()


def test_session_with_a_connection_is_kept_for_longer_than_a_lease() -> None:
    use_all_and_log_in()


def test_session_without_leases_is_found_to_be_evicted_while_in_use(
    monkeypatch: pytest.MonkeyPatch, loop_reports: LoopReports
) -> None:
    async def write_nothing(leases: Leases) -> None:
        leases._changed.clear()

    monkeypatch.setattr(Leases, "_write", write_nothing)
    with pytest.raises(AssertionError):
        use_all_and_log_in()
    assert isinstance(loop_reports.take()[0]["exception"], AssertionError)
