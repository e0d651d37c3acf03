"""The thread of a store: groups, timeouts, and a busy event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pytest

from tests.limits import TIMEOUT
from tests.workers.hub_harness import until
from zcproto.errors import ResourceExhausted
from zcproto.stores import job_thread
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.job_thread import CHECKS, GROUP, Job, JobThread

LONG = TIMEOUT


class Bench:
    """A thread whose jobs are values that it returns, or functions that it calls."""

    def __init__(self, limit: int = 1_000) -> None:
        self.groups: list[list[object]] = []
        self.rests = 0
        self.rested = threading.Event()
        self.left = threading.Event()
        self.held = threading.Event()
        self.go_on = threading.Event()
        self.thread = JobThread(self._perform, self._idle, self._finish, limit=limit)

    def _perform(self, jobs: Sequence[Job]) -> None:
        self.groups.append([job.work for job in jobs])
        for job in jobs:
            if isinstance(job.work, Exception):
                job.error = job.work
            else:
                job.result = job.work() if callable(job.work) else job.work

    def _idle(self) -> bool:
        self.rests -= self.rests > 0
        if not self.rests:
            self.rested.set()
        return self.rests > 0

    def _finish(self) -> None:
        self.left.set()

    async def hold(self) -> asyncio.Task[object]:
        """Keep the thread busy until `go_on` is set."""

        def hang() -> None:
            self.held.set()
            assert self.go_on.wait(LONG)

        task = asyncio.create_task(self.thread.submit(hang, LONG))
        assert await asyncio.to_thread(self.held.wait, LONG)
        return task


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.go_on.set()
    assert await bench.thread.stop(LONG)


async def test_job_returns_its_result_or_raises(bench: Bench) -> None:
    assert await bench.thread.submit("work", LONG) == "work"
    with pytest.raises(KeyError):
        await bench.thread.submit(KeyError("work"), LONG)


async def test_jobs_of_one_loop_turn_form_one_group(bench: Bench) -> None:
    assert await asyncio.gather(*(bench.thread.submit(number, LONG) for number in range(9))) == [*range(9)]
    assert bench.groups == [[*range(9)]]


async def test_jobs_submitted_while_busy_form_the_next_group(bench: Bench) -> None:
    held = await bench.hold()
    asked = []
    for number in range(5):
        asked.append(asyncio.create_task(bench.thread.submit(number, LONG)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    bench.go_on.set()
    await asyncio.gather(held, *asked)
    assert bench.groups[1:] == [[*range(5)]]


async def test_is_waited_for_is_true_while_other_jobs_wait(bench: Bench) -> None:
    held = await bench.hold()
    assert not bench.thread.is_waited_for
    others = [asyncio.create_task(bench.thread.submit(number, LONG)) for number in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert bench.thread.is_waited_for
    bench.go_on.set()
    await asyncio.gather(held, *others)
    assert bench.thread.is_waited_for  # the two were one group
    await bench.thread.submit("alone", LONG)
    assert not bench.thread.is_waited_for


async def test_group_is_bounded(bench: Bench) -> None:
    count = 2 * GROUP + 10
    held = await bench.hold()
    asked = asyncio.gather(*(bench.thread.submit(number, LONG) for number in range(count)))
    await asyncio.sleep(0)
    bench.go_on.set()
    assert await asked == [*range(count)]
    await held
    assert max(map(len, bench.groups)) <= GROUP


async def test_timed_out_job_that_had_not_begun_is_not_run(bench: Bench) -> None:
    held = await bench.hold()
    for work, lasting in (("dropped", False), ("lasting", True)):
        with pytest.raises(StoreUnavailable, match="within 10 ms"):
            await bench.thread.submit(work, 0.01, lasting=lasting)
    bench.go_on.set()
    await held
    await bench.thread.submit("last", LONG)
    done = [work for group in bench.groups for work in group]
    assert done[1:] == ["lasting", "last"]


@pytest.fixture
def long_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_thread, "PATIENCE", math.inf)


@pytest.fixture
def progress(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a held thread work, as far as checks can see: it is further at each. Return what they saw."""
    progress: list[int] = []

    def see() -> int:
        progress.append(len(progress))
        return progress[-1]

    monkeypatch.setattr(bench.thread, "_progress", see)
    return progress


@pytest.mark.usefixtures("long_patience")
async def test_job_waits_longer_than_its_timeout_for_a_thread_that_works(
    bench: Bench, progress: list[int]
) -> None:
    held = await bench.hold()
    waits = asyncio.create_task(bench.thread.submit("work", 0.001))
    await until(lambda: len(progress) > 2 * CHECKS)
    bench.go_on.set()
    assert await waits == "work"
    await held


@pytest.mark.usefixtures("progress")
async def test_job_that_waits_too_long_for_a_thread_that_works_is_refused_and_not_run(bench: Bench) -> None:
    held = await bench.hold()
    kept = asyncio.create_task(bench.thread.submit("lasting", 0.0001, lasting=True))
    with pytest.raises(ResourceExhausted) as refused:
        await bench.thread.submit("refused", 0.0001)
    assert refused.value.details == {"retry_after_ms": 250}
    bench.go_on.set()
    await held
    assert await kept == "lasting"
    assert bench.groups[1:] == [["lasting"]]


@pytest.mark.usefixtures("long_patience")
async def test_job_fails_if_the_thread_hangs_in_it(bench: Bench) -> None:
    hanging = asyncio.create_task(bench.thread.submit(lambda: bench.go_on.wait(LONG), 0.001))
    with pytest.raises(StoreUnavailable, match="within 1 ms"):
        await hanging


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="takes a clock of each thread")
async def test_thread_that_uses_the_processor_does_not_hang(bench: Bench) -> None:
    def work() -> None:
        seen.append(bench.thread._progress())
        end = time.thread_time() + 0.001
        while time.thread_time() < end:
            pass
        seen.append(bench.thread._progress())

    seen: list[tuple[int, float, float]] = []
    await bench.thread.submit(work, LONG)
    (turn, used, _), (same_turn, used_after, _) = seen
    assert same_turn == turn
    assert used_after > used


@pytest.mark.usefixtures("long_patience")
async def test_thread_that_waits_for_a_processor_does_not_hang(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def queued(pid: int, thread: int | None) -> float:
        asked.append(thread)
        return float(len(asked))

    monkeypatch.setattr(job_thread, "queued_seconds", queued)
    monkeypatch.setattr(job_thread, "_READ_EVERY_S", 0.0)
    waits = asyncio.create_task(bench.thread.submit(lambda: bench.go_on.wait(LONG), 0.001))
    await until(lambda: len(asked) > 3 * CHECKS or waits.done())
    assert not waits.done()
    assert {*asked} == {bench.thread._thread.native_id}
    bench.go_on.set()
    assert await waits


async def test_done_job_is_not_late_when_the_loop_is(bench: Bench) -> None:
    job = Job("work", False, False, asyncio.get_running_loop().create_future(), done=True)
    bench.thread._is_busy = True
    bench.thread._check(job, LONG, CHECKS, CHECKS, bench.thread._progress())
    assert job.timer is not None
    job.timer.cancel()
    assert not job.future.done()


async def test_jobs_go_ahead_of_those_behind(bench: Bench) -> None:
    held = await bench.hold()
    later = asyncio.gather(*(bench.thread.submit(number, LONG, behind=True) for number in range(GROUP + 5)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ahead = asyncio.create_task(bench.thread.submit("ahead", LONG))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert bench.thread.is_waited_for
    bench.go_on.set()
    assert await later == [*range(GROUP + 5)]
    await asyncio.gather(held, ahead)
    assert bench.groups[1] == ["ahead", *range(GROUP - 1)]
    assert bench.groups[2] == [*range(GROUP - 1, GROUP + 5)]


async def test_jobs_ahead_form_the_next_group(bench: Bench) -> None:
    held = await bench.hold()
    asked = asyncio.gather(*(bench.thread.submit(number, LONG) for number in range(GROUP + 5)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ahead = asyncio.gather(*(bench.thread.submit(f"ahead {number}", LONG, ahead=True) for number in range(2)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert bench.thread.is_waited_for
    bench.go_on.set()
    assert await ahead == ["ahead 0", "ahead 1"]
    assert await asked == [*range(GROUP + 5)]
    await held
    assert bench.groups[1:] == [["ahead 0", "ahead 1"], [*range(GROUP)], [*range(GROUP, GROUP + 5)]]


async def test_too_many_jobs_ahead_make_several_groups(bench: Bench) -> None:
    held = await bench.hold()
    ahead = asyncio.gather(*(bench.thread.submit(number, LONG, ahead=True) for number in range(GROUP + 5)))
    asked = asyncio.gather(bench.thread.submit("asked", LONG))
    await asyncio.sleep(0)
    bench.go_on.set()
    await asyncio.gather(held, ahead, asked)
    assert bench.groups[1:] == [[*range(GROUP)], [*range(GROUP, GROUP + 5)], ["asked"]]


async def test_stop_runs_the_jobs_ahead_too() -> None:
    bench = Bench()
    held = await bench.hold()
    ahead = asyncio.create_task(bench.thread.submit("ahead", LONG, ahead=True))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(bench.thread.stop(LONG))
    await asyncio.sleep(0)
    bench.go_on.set()
    assert await ahead == "ahead"
    assert await stopping
    await held


async def test_full_queue_refuses_jobs_and_drains() -> None:
    bench = Bench(limit=3)
    held = await bench.hold()
    asked = [asyncio.create_task(bench.thread.submit(number, LONG)) for number in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="too many operations wait"):
        await bench.thread.submit("one too many", LONG)
    asked.append(asyncio.create_task(bench.thread.submit("lasting", LONG, lasting=True)))
    asked.append(asyncio.create_task(bench.thread.submit("behind", LONG, behind=True)))
    await asyncio.sleep(0)
    bench.go_on.set()
    await asyncio.gather(held, *asked)
    assert await bench.thread.submit("again", LONG) == "again"
    assert await bench.thread.stop(LONG)


async def test_stop_runs_the_jobs_behind_too() -> None:
    bench = Bench()
    held = await bench.hold()
    later = asyncio.gather(*(bench.thread.submit(number, LONG, behind=True) for number in range(3)))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(bench.thread.stop(LONG))
    await asyncio.sleep(0)
    bench.go_on.set()
    assert await later == [0, 1, 2]
    assert await stopping
    await held


async def test_stop_runs_submitted_jobs_and_is_idempotent() -> None:
    bench = Bench()
    held = await bench.hold()
    asked = asyncio.create_task(bench.thread.submit("late", LONG))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(bench.thread.stop(LONG))
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="closed"):
        await bench.thread.submit("too late", LONG)
    bench.go_on.set()
    assert await asked == "late"
    assert await stopping
    assert await bench.thread.stop(LONG)
    assert bench.left.is_set()
    await held


async def test_job_submitted_in_the_turn_of_stop_is_run() -> None:
    bench = Bench()
    asked, _ = await asyncio.gather(bench.thread.submit("late", LONG), bench.thread.stop(LONG))
    await asyncio.sleep(0)
    assert asked == "late"


async def test_stop_abandons_a_hung_thread() -> None:
    bench = Bench()
    held = await bench.hold()
    assert not await bench.thread.stop(0.01)
    bench.go_on.set()
    assert await bench.thread.stop(LONG)
    await held


async def test_idle_is_called_while_there_are_no_jobs(bench: Bench) -> None:
    bench.rests = 5
    await bench.thread.submit("one", LONG)
    assert await asyncio.to_thread(bench.rested.wait, LONG)
    assert await bench.thread.submit("two", LONG) == "two"


def test_closed_loop_is_not_called() -> None:
    made: list[Bench] = []

    async def abandon() -> None:
        made.append(Bench())
        task = await made[0].hold()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        stopping = asyncio.create_task(made[0].thread.stop(LONG))
        await asyncio.sleep(0)
        stopping.cancel()

    asyncio.run(abandon())
    made[0].go_on.set()
    assert made[0].left.wait(LONG)


# --- a loop that is too busy -----------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses of the event loop, which are not waited for."""
    pauses: list[float] = []
    monkeypatch.setattr(job_thread, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(job_thread, "_AGAIN_S", 0.0001)
    return pauses


async def test_loop_pauses_for_a_late_result_with_a_limit(bench: Bench, pauses: list[float]) -> None:
    held = await bench.hold()
    await until(lambda: len(pauses) == 100)
    await asyncio.sleep(0.02)
    assert len(pauses) == 100
    assert sum(pauses) < 0.02
    bench.go_on.set()
    await held


async def test_loop_does_not_pause_while_results_come(
    bench: Bench, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_thread, "_LATE_S", LONG)
    monkeypatch.setattr(job_thread, "_AGAIN_S", LONG)
    await bench.thread.submit("one", LONG)
    held = await bench.hold()
    bench.thread._watch(0, 0)
    assert not pauses, "a group was finished since the last check"
    bench.thread._watch(1, 0)
    assert len(pauses) == 1
    bench.go_on.set()
    await held
    bench.thread._watch(1, 1)
    assert len(pauses) == 1, "nothing waits"
