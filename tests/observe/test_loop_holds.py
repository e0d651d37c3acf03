"""Tests of finding the method that holds the event loop: samples of stacks taken by hand, and a real server."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import eventually
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.common.middleware import CallNext
from zcproto.observe.loop_lag import HELD, LEAST_SEEN, Hold, LoopHolds, current_stacks, names_by_code


class Stacks:
    """The stack of this thread as the test sets it, and the time for which the timer is overdue."""

    def __init__(self) -> None:
        self.frame: FrameType | None = None
        self.overdue = 1.0

    def __call__(self) -> dict[int, FrameType]:
        return {} if self.frame is None else {threading.get_ident(): self.frame}


def slow(work: Callable[[], None] = lambda: None) -> FrameType:
    work()
    return sys._getframe()


def other() -> FrameType:
    return sys._getframe()


@pytest.fixture
def stacks() -> Stacks:
    return Stacks()


@pytest.fixture
def found() -> list[Hold]:
    return []


@pytest.fixture
def holds(stacks: Stacks, found: list[Hold]) -> LoopHolds:
    functions = [("slow", slow), ("other", other)]
    return LoopHolds(lambda: stacks.overdue, functions, found.append, stacks)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_no_collection_runs_while_stacks_are_taken(monkeypatch: pytest.MonkeyPatch, is_enabled: bool) -> None:
    taking: list[bool] = []

    def take() -> dict[int, FrameType]:
        taking.append(gc.isenabled())
        raise MemoryError

    assert current_stacks()[threading.get_ident()].f_back is sys._getframe()
    monkeypatch.setattr(sys, "_current_frames", take)
    if not is_enabled:
        gc.disable()
    try:
        with pytest.raises(MemoryError):
            current_stacks()
        assert gc.isenabled() is is_enabled
    finally:
        gc.enable()
    assert taking == [False]


def test_call_seen_all_along_is_reported(holds: LoopHolds, stacks: Stacks, found: list[Hold]) -> None:
    stacks.frame = slow()
    for _ in range(LEAST_SEEN):
        holds.sample()
    holds.timer_ran(0.25)
    (hold,) = found
    assert (hold.method, hold.seconds) == ("slow", 0.25)
    assert hold.at.startswith("observe/test_loop_holds.py:")
    assert hold.at.endswith(" slow")
    assert holds.counts == {"slow": 1}
    holds.timer_ran(0.25)
    assert len(found) == 1


@pytest.mark.parametrize("next_frame", [None, other()])
def test_call_that_ended_before_the_timer_ran_is_reported(
    holds: LoopHolds, stacks: Stacks, found: list[Hold], next_frame: FrameType | None
) -> None:
    stacks.frame = slow()
    for _ in range(LEAST_SEEN):
        holds.sample()
    stacks.frame = next_frame
    holds.sample()
    holds.timer_ran(0.25)
    assert holds.counts == {"slow": 1}
    holds.timer_ran(0.25)
    assert len(found) == 1


def test_call_that_ended_before_the_loop_was_late_is_not_reported(holds: LoopHolds, stacks: Stacks) -> None:
    stacks.frame, stacks.overdue = slow(), HELD / 2
    for _ in range(LEAST_SEEN):
        holds.sample()
    stacks.frame = None
    holds.sample()
    holds.timer_ran(0.25)
    assert not holds.counts


def test_method_is_found_above_what_it_calls(holds: LoopHolds, stacks: Stacks, found: list[Hold]) -> None:
    def blocked() -> None:
        stacks.frame = sys._getframe()
        for _ in range(LEAST_SEEN):
            holds.sample()

    slow(blocked)
    holds.timer_ran(HELD)
    assert [hold.method for hold in found] == ["slow"]


@pytest.mark.parametrize("late", [HELD - 0.001, 0.0, -0.001])
def test_short_hold_is_not_reported(holds: LoopHolds, stacks: Stacks, found: list[Hold], late: float) -> None:
    stacks.frame = slow()
    for _ in range(LEAST_SEEN):
        holds.sample()
    holds.timer_ran(late)
    assert found == []


def test_many_calls_in_one_turn_are_not_a_hold(holds: LoopHolds, stacks: Stacks, found: list[Hold]) -> None:
    for call in (slow, other, slow, slow, slow):
        stacks.frame = call()
        holds.sample()
    holds.timer_ran(1.0)
    assert found == []


def test_loop_that_turns_between_samples_is_not_held(
    holds: LoopHolds, stacks: Stacks, found: list[Hold]
) -> None:
    stacks.frame = slow()
    for overdue in (1.0, 1.0, -0.001, 1.0):
        stacks.overdue = overdue
        holds.sample()
    holds.timer_ran(1.0)
    assert found == []


def test_code_of_other_functions_is_not_reported(holds: LoopHolds, stacks: Stacks, found: list[Hold]) -> None:
    for frame in (sys._getframe(), None):
        stacks.frame = frame
        for _ in range(LEAST_SEEN):
            holds.sample()
        holds.timer_ran(1.0)
    assert found == []


# --- names -----------------------------------------------------------------------------------------------


class Callables:
    def bound(self) -> None: ...
    def __call__(self) -> None: ...


def decorated() -> Callable[[], FrameType]:
    @functools.wraps(slow)
    def wrapper() -> FrameType:
        return slow()

    return wrapper


def getter(name: str) -> Callable[[], str]:
    return lambda: name


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (slow, slow.__code__),
        (functools.partial(functools.partial(slow)), slow.__code__),
        (Callables().bound, Callables.bound.__code__),
        (Callables(), Callables.__call__.__code__),
        (decorated(), slow.__code__),
    ],
)
def test_callables_are_known_by_the_code_that_they_run(function: Any, code: Any) -> None:
    assert names_by_code([("name", function)]) == {code: "name"}


def test_callable_without_code_is_skipped() -> None:
    assert names_by_code([("length", len), ("number", int)]) == {}


def test_functions_of_one_code_share_their_names() -> None:
    (name,) = names_by_code((each, getter(each)) for each in "abba").values()
    assert name == "a, b"
    (name,) = names_by_code((each, getter(each)) for each in "abcd").values()
    assert name == "a, b, c and others"


# --- a server --------------------------------------------------------------------------------------------


class Holder:
    """Work that holds the loop until its thread has been sampled often enough, for longer than HELD."""

    def __init__(self) -> None:
        self.samples = 0

    def hold(self) -> None:
        began, first = time.monotonic(), self.samples
        while self.samples < first + 2 * LEAST_SEEN or time.monotonic() < began + 2 * HELD:
            time.sleep(0.001)
            assert time.monotonic() < began + TIMEOUT


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> Holder:
    holder, sample = Holder(), LoopHolds.sample

    def counted(self: LoopHolds) -> None:
        sample(self)
        holder.samples += self._overdue() > 0

    monkeypatch.setattr(LoopHolds, "sample", counted)
    return holder


def test_methods_and_middleware_that_hold_the_loop_are_counted_and_logged(
    serve: Serve, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, lines = App(), []
    monkeypatch.setattr(
        "zcproto.runtime.build.log.warning", lambda event, **fields: lines.append((event, fields))
    )

    @app.middleware
    async def check(context: Context, call_next: CallNext[Context]) -> Any:
        if context.method == "quick":
            holder.hold()
        return await call_next(context)

    app.method("quick")(lambda: 1)

    @app.method
    def plain() -> int:
        holder.hold()
        return 2

    @app.method
    async def later() -> int:
        await asyncio.sleep(0)
        holder.hold()
        return 3

    server = serve(app)
    with server.client("ada") as client:
        assert [client.call(name) for name in ("quick", "plain", "later")] == [1, 2, 3]
    holds = server.server.parts.loop_lag.holds
    assert holds is not None
    expected = {"middleware check": 1, "plain": 1, "later": 1}

    def found() -> dict[str, dict[str, Any]]:  # beside others, for which a busy machine has had no processor
        return {
            each["what"]: each for event, each in lines if event == "loop.held" and each["what"] in expected
        }

    eventually(lambda: len(found()) == len(expected))  # written after it is counted
    assert {name: count for name, count in holds.counts.items() if name in {*expected, "quick"}} == expected
    assert [*found()] == [*expected]
    assert all(each["seconds"] >= HELD for each in found().values())
    assert found()["plain"]["at"].startswith("observe/test_loop_holds.py:")
