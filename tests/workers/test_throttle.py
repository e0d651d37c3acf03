"""A throttle that counts for all workers of a server."""

from __future__ import annotations

from typing import Any

import pytest

from zcproto.auth import Throttle
from zcproto.auth.throttle import QUIET_S
from zcproto.errors import ZcprotoError
from zcproto.workers.limits import SharedMemory, memory_size
from zcproto.workers.throttle import MAX_REMEMBERED, SharedThrottle, throttle_calls

HOME, ELSEWHERE = "192.0.2.1", "198.51.100.7"
FREE = 3


class Company:
    """The throttles of two workers, and the process that counts for both."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.calls: list[tuple[str, ...]] = []
        self.is_away = False
        self.replace()
        self.memory = SharedMemory(bytearray(memory_size(2, 1)), 2, 1, bytes(32))
        self.workers = [SharedThrottle(self, self.memory.worker(number), FREE) for number in range(2)]

    def replace(self) -> None:
        """Start another process that counts for all."""
        self.throttle = Throttle(FREE)
        self._calls, self._notices = throttle_calls(self.throttle, lambda: self.now)

    async def call(self, topic: str, *arguments: Any, within: float) -> Any:
        if self.is_away:
            raise ZcprotoError("away")
        assert within < 1
        self.calls.append((topic, *arguments))
        return await self._calls[topic](None, *arguments)

    def notify(self, topic: str, *arguments: Any) -> bool:
        if not self.is_away:
            self.calls.append((topic, *arguments))
            self._notices[topic](None, *arguments)
        return not self.is_away

    async def check(self, worker: int, user: str = "ada", address: str = HOME) -> int:
        wait_ms = self.workers[worker].check(user, address, self.now)
        return wait_ms if isinstance(wait_ms, int) else await wait_ms

    async def fail(self, worker: int, times: int, user: str = "ada", address: str = HOME) -> None:
        for _ in range(times):
            await self.workers[worker].failed(user, address, self.now)

    def succeed(self, worker: int, user: str = "ada", address: str = HOME) -> None:
        self.workers[worker].succeeded(user, address, self.now)


@pytest.fixture
def company() -> Company:
    return Company()


async def test_failures_in_several_workers_add_up(company: Company) -> None:
    await company.fail(0, FREE - 1)
    assert [await company.check(worker) for worker in (0, 1)] == [0, 0]
    await company.fail(1, 1)
    assert [await company.check(worker) for worker in (0, 1)] == [1_000, 1_000]
    company.now += 1
    assert [await company.check(worker) for worker in (0, 1)] == [0, 0]


async def test_login_without_a_recent_failure_costs_no_call(company: Company) -> None:
    await company.fail(0, 1, "bob", ELSEWHERE)
    company.calls.clear()
    assert company.workers[1].check("ada", HOME, company.now) == 0
    company.succeed(1)
    assert company.calls == [("throttle.succeeded", "ada", HOME)]
    company.succeed(1)
    assert len(company.calls) == 1


async def test_failure_is_remembered_for_as_long_as_it_counts(company: Company) -> None:
    await company.fail(0, FREE)
    company.now += QUIET_S - 1
    company.calls.clear()
    await company.check(1)
    assert company.calls == [("throttle.check", "ada", HOME)]
    company.now += 2 * QUIET_S
    assert company.workers[1].check("ada", HOME, company.now) == 0


async def test_login_from_a_known_network_is_not_delayed_by_failures_elsewhere(company: Company) -> None:
    company.succeed(0)
    await company.fail(0, 20, address=ELSEWHERE)
    assert await company.check(1) == 0
    assert await company.check(1, address="203.0.113.9") > 0


async def test_success_in_one_worker_ends_the_delay_in_the_others(company: Company) -> None:
    company.succeed(0)
    await company.fail(1, FREE)
    assert await company.check(0) == 1_000
    company.now += 1
    company.succeed(0)
    await company.fail(1, 1)
    assert await company.check(1) == 0


async def test_refusal_is_remembered_for_a_second_with_its_whole_delay(company: Company) -> None:
    await company.fail(0, FREE + 6)
    assert await company.check(1) == 64_000
    asked = len(company.calls)
    company.now += 0.5
    assert company.workers[1].check("ada", HOME, company.now) == 63_500
    company.now += 0.5
    assert await company.check(1) == 63_000
    assert len(company.calls) == asked + 1


async def test_worker_decides_by_its_own_failures_while_the_other_process_is_away(company: Company) -> None:
    company.is_away = True
    await company.fail(0, FREE)
    company.succeed(1, "bob")
    assert await company.check(0) == 1_000
    assert await company.check(1) == 0
    await company.fail(1, FREE)
    assert await company.check(1) == 1_000
    company.is_away = False
    assert await company.check(1) == 0  # a new process begins without failures
    company.calls.clear()
    company.succeed(1, "bob")
    assert company.calls  # reported when it is back


async def test_known_logins_are_reported_again_to_a_process_that_replaces_the_other(company: Company) -> None:
    company.succeed(0)
    company.replace()
    company.workers[0].link_lost()
    company.succeed(0)
    await company.fail(1, 20, address=ELSEWHERE)
    assert await company.check(1) == 0


async def test_memory_of_refusals_and_known_logins_is_bounded(company: Company) -> None:
    for number in range(MAX_REMEMBERED + 10):
        company.succeed(0, f"user{number}")
    assert len(company.workers[0]._reported) == MAX_REMEMBERED


async def test_own_limit_follows_the_configuration(company: Company) -> None:
    company.workers[0].reconfigure(1)
    company.is_away = True
    await company.fail(0, 1)
    assert await company.check(0) == 1_000
    assert len(company.workers[0]) == 3
