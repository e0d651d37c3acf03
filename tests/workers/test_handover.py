"""The steps of an upgrade, whatever happens in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.workers.upgrade import Action, Handover, Input, Step

UPGRADE = (Input.REQUESTED, Input.PREPARED, Input.COORDINATOR_ENDED, Input.SERVING)


def test_upgrade_hands_over_in_order() -> None:
    handover = Handover()
    assert [handover.handle(each) for each in (*UPGRADE, Input.WORKER_ENDED)] == [
        (Action.START_SUCCESSOR,),
        (Action.END_COORDINATOR,),
        (Action.GIVE_STORE,),
        (Action.LEAVE, Action.DRAIN_NEXT),
        (Action.DRAIN_NEXT,),
    ]
    assert handover.is_retiring


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("is_heard_of", [True, False])
def test_failure_before_the_successor_serves_rolls_back(steps: int, is_heard_of: bool) -> None:
    handover = Handover()
    for each in UPGRADE[:steps]:
        handover.handle(each)
    assert handover.is_timed
    if is_heard_of:
        assert handover.handle(Input.FAILED) == (Action.END_SUCCESSOR,)
        assert not handover.has_coordinator, "the successor may still have the store"
    assert handover.handle(Input.SUCCESSOR_ENDED) == (Action.SERVE_ON,)
    assert handover.step is Step.IDLE
    assert handover.handle(Input.REQUESTED) == (Action.START_SUCCESSOR,)


def test_second_request_changes_nothing() -> None:
    handover = Handover()
    handover.handle(Input.REQUESTED)
    assert handover.handle(Input.REQUESTED) == ()


@given(st.lists(st.sampled_from(Input), max_size=40))
def test_at_most_one_coordinator_and_one_successor_whatever_happens(inputs: list[Input]) -> None:
    handover = Handover()
    successors, has_own, gave, left = 0, True, False, False
    for each in inputs:
        if each is Input.COORDINATOR_ENDED and not handover.has_coordinator:
            has_own = False
        if each is Input.SUCCESSOR_ENDED:
            successors, gave = 0, False
        for action in handover.handle(each):
            assert not left or action is Action.DRAIN_NEXT, "there is no way back"
            if action is Action.START_SUCCESSOR:
                successors += 1
            elif action is Action.GIVE_STORE:
                gave = True
            elif action is Action.SERVE_ON:
                has_own = True
            elif action is Action.LEAVE:
                left = True
            elif action is Action.DRAIN_NEXT:
                assert left
        assert successors <= 1
        assert not (gave and has_own)
        assert handover.is_retiring == left
