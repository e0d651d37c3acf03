"""Counts over the workers of a server."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.common.rates import BURST_S
from zcproto.config import Config
from zcproto.workers import limits as module
from zcproto.workers.limits import SharedMemory, memory_size, rows_for, share_of

SECRET = bytes(range(32))
WORKERS = 3
RATE = 10
BURST = int(RATE * BURST_S)


def shared(workers: int = WORKERS, connections: int = 1, secret: bytes = SECRET) -> SharedMemory:
    return SharedMemory(bytearray(memory_size(workers, connections)), workers, connections, secret)


# --- counts ----------------------------------------------------------------------------------------------


def test_limit_holds_over_all_workers() -> None:
    memory = shared()
    counts = [memory.worker(number).counts("connections") for number in range(WORKERS)]
    assert [counts[number % WORKERS].add("192.0.2.1", 4) for number in range(6)] == [
        *(4 * [True]),
        False,
        False,
    ]
    assert {each["192.0.2.1"] for each in counts} == {each.most for each in counts} == {4}
    counts[2].remove("192.0.2.1")
    assert counts[0].add("192.0.2.1", 4)
    assert not counts[2].add("192.0.2.1", 4)


def test_counts_of_other_names_are_apart() -> None:
    worker = shared().worker(0)
    connections, running = worker.counts("connections"), worker.counts("running")
    connections.add("ada")
    assert (running["ada"], running.most) == (0, 0)


def test_counts_of_a_worker_that_has_ended_are_forgotten() -> None:
    memory = shared()
    first, second = (memory.worker(number) for number in range(2))
    for worker in (first, second):
        worker.counts("connections").add("ada")
        worker.rate("requests", RATE).charge("ada", 5, 100.0)
    memory.clear(0)
    assert memory.worker(0).counts("connections")["ada"] == 1
    assert second.rate("requests", RATE).left("ada", 100.0) == BURST - 5


Step = tuple[int, str, str]
steps = st.lists(
    st.tuples(
        st.integers(0, WORKERS - 1), st.sampled_from("abcdefgh"), st.sampled_from(["add", "remove", "die"])
    ),
    max_size=60,
)


def run(memory: SharedMemory, taken: list[Step], limit: int, check: Callable[[bool, int, int], None]) -> None:
    """Let workers count, and `check` with whether one was admitted, the truth and the count before."""
    counts = [memory.worker(number).counts("connections") for number in range(WORKERS)]
    truth: list[Counter[str]] = [Counter() for _ in range(WORKERS)]
    for number, key, action in taken:
        total, count = sum(each[key] for each in truth), counts[number][key]
        if action == "add":
            admitted = counts[number].add(key, limit)
            truth[number][key] += admitted
            check(admitted, total, count)
        elif action == "remove" and truth[number][key]:
            counts[number].remove(key)
            truth[number][key] -= 1
        elif action == "die":
            memory.clear(number)
            counts[number] = memory.worker(number).counts("connections")
            truth[number].clear()


@given(steps, st.integers(1, 4))
def test_admission_is_exact_while_keys_share_no_place(taken: list[Step], limit: int) -> None:
    def check(admitted: bool, total: int, count: int) -> None:
        assert (admitted, count) == (total < limit, total)

    run(shared(), taken, limit, check)


@given(steps, st.integers(1, 4))
def test_count_of_keys_that_share_places_is_never_less_than_the_truth(taken: list[Step], limit: int) -> None:
    def check(admitted: bool, total: int, count: int) -> None:
        assert count >= total
        assert not admitted or total < limit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_ROWS", 2)
        patch.setattr(module, "KEYS", 1)
        run(shared(), taken, limit, check)


def test_places_depend_on_the_secret() -> None:
    keys = [f"192.0.2.{number}" for number in range(50)]

    def places(secret: bytes) -> list[object]:
        counts = shared(secret=secret).worker(0).counts("connections")
        return [counts._places(key) for key in keys]

    one, other = places(SECRET), places(bytes(32))
    assert one == places(SECRET)
    assert not set(one) & set(other)


def test_key_is_rarely_counted_with_others_even_with_one_for_each_connection() -> None:
    memory = shared(1, 2_000)
    counts = memory.worker(0).counts("connections")
    for number in range(2_000):
        counts.add(f"key{number}")
    assert sum(counts[f"key{number}"] > 1 for number in range(2_000)) < 20


@pytest.mark.parametrize(
    ("connections", "rows"), [(1, 4_096), (2_000, 8_192), (20_000, 65_536), (1_000_000, 4_194_304)]
)
def test_memory_is_bounded_by_the_configuration(connections: int, rows: int) -> None:
    assert rows_for(connections) == rows
    assert memory_size(4, connections) == 2 * memory_size(2, connections)
    assert memory_size(1, connections) < 16 * rows + 600_000


# --- racing processes ------------------------------------------------------------------------------------


def in_children(count: int, work: Callable[[int], int]) -> list[int]:
    """Run `work` in forked processes; return what each returned, up to 255."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            result = 255
            try:
                result = work(number)
            finally:
                os._exit(result)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_racing_processes_take_every_place_and_no_more() -> None:
    memory = SharedMemory(mmap.mmap(-1, memory_size(5, 1)), 5, 1, SECRET)

    def work(number: int) -> int:
        counts = memory.worker(number).counts("connections")
        return sum(counts.add("192.0.2.1", 50) for _ in range(50))

    admitted = sum(in_children(4, work))
    counts = memory.worker(4).counts("connections")
    assert counts["192.0.2.1"] == admitted <= 50
    while counts.add("192.0.2.1", 50):  # a place that two have left to each other
        admitted += 1
    assert admitted == 50


def test_racing_processes_never_exceed_a_limit_while_others_leave() -> None:
    limit = 3
    memory = SharedMemory(mmap.mmap(-1, memory_size(4, 1)), 4, 1, SECRET)
    held = memoryview(mmap.mmap(-1, 16)).cast("i")  # what each process has been admitted to

    def work(number: int) -> int:
        counts = memory.worker(number).counts("connections")
        exceeded = 0
        for _ in range(2_000):
            if counts.add("192.0.2.1", limit):
                held[number] += 1
                exceeded += sum(held) > limit
                held[number] -= 1
                counts.remove("192.0.2.1")
        return exceeded

    assert in_children(4, work) == [0, 0, 0, 0]
    assert memory.worker(0).counts("connections")["192.0.2.1"] == 0


@pytest.mark.parametrize(("seen", "admitted"), [([False, True], True), (10 * [False], False)])
def test_attempts_of_others_at_the_last_place_are_outwaited_for_a_while(
    monkeypatch: pytest.MonkeyPatch, seen: list[bool], admitted: bool
) -> None:
    counts = shared().worker(0).counts("connections")
    monkeypatch.setattr(module.SharedCounts, "_is_at_most", lambda counts, key, limit: seen.pop(0))
    assert counts.add("192.0.2.1", 5) is admitted
    assert counts["192.0.2.1"] == admitted


def test_window_that_some_workers_have_left_is_counted_without_them() -> None:
    memory = shared(2)
    old, new = (memory.worker(number).failures("logins", 4.0) for number in range(2))
    old.add("ada", 5, 101.0)
    new.add("ada", 1, 109.0)  # two windows later
    assert new.count("ada", 109.0) == old.count("ada", 109.0) == 1


# --- rates -----------------------------------------------------------------------------------------------


def test_rate_is_that_of_all_workers() -> None:
    memory = shared()
    rates = [memory.worker(number).rate("requests", RATE) for number in range(WORKERS)]
    assert [rates[number % WORKERS].admit("ada", 100.0) for number in range(BURST)] == BURST * [0]
    assert [rate.admit("ada", 100.0) for rate in rates] == [100, 100, 100]
    assert [rate.left("ada", 100.0) for rate in rates] == [0, 0, 0]
    assert rates[0].admit("bob", 100.0) == 0


@given(st.integers(1, 50), st.lists(st.floats(0, 0.2), min_size=200, max_size=200))
def test_rate_admits_as_many_as_it_says_on_average(per_second: int, pauses: list[float]) -> None:
    memory, now, admitted = shared(2), 1_000.0, 0
    rates = [memory.worker(number).rate("requests", per_second) for number in range(2)]
    for number, pause in enumerate(pauses):
        now += pause
        admitted += rates[number % 2].admit("ada", now) == 0
    assert admitted <= per_second * (now - 1_000.0 + 2 * BURST_S) + 1


def test_refused_events_are_not_counted_and_the_wait_suffices() -> None:
    rate = shared().worker(1).rate("requests", RATE)
    now = 100.0
    for _ in range(5 * BURST):
        now += rate.admit("ada", now) / 1_000
    assert rate.admit("ada", now + BURST_S) == 0
    assert rate.left("ada", now + 3 * BURST_S) == BURST


def test_charges_are_counted_whatever_is_left() -> None:
    memory = shared()
    rate = memory.worker(0).rate("failed", RATE)
    rate.charge("192.0.2.0/24", 7, 100.0)
    assert "192.0.2.0/24" in rate
    assert memory.worker(1).rate("failed", RATE).left("192.0.2.0/24", 100.0) == BURST - 7
    rate.charge("192.0.2.0/24", 1_000, 100.0)
    assert rate.left("192.0.2.0/24", 100.0) == 0


def test_rate_of_zero_counts_nothing() -> None:
    rate = shared().worker(0).rate("requests")
    rate.charge("ada", 1_000, 100.0)
    assert [rate.admit("ada", 100.0) for _ in range(3)] == [0, 0, 0]
    assert "ada" not in rate
    rate.set_rate(RATE)
    assert rate.left("ada", 100.0) == BURST


def test_rate_below_one_burst_admits_one() -> None:
    rate = shared().worker(0).rate("requests", 1)
    assert [rate.admit("ada", 100.0) for _ in range(3)] == [0, 0, 1_000]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0, 12)), min_size=1, max_size=40),
    st.floats(0, 12),
)
def test_window_counts_the_events_of_its_seconds(events: list[tuple[int, float]], after: float) -> None:
    memory, seconds = shared(2), 4.0
    windows = [memory.worker(number).failures("logins", seconds) for number in range(2)]
    for number, at in sorted(events, key=lambda event: event[1]):
        windows[number].add("ada", 1, at)
    now = max(at for _, at in events) + after
    recent = sum(at > now - seconds for _, at in events)
    recent_and_before = sum(at >= now - 2 * seconds for _, at in events)
    assert recent <= windows[0].count("ada", now, is_whole=True) <= recent_and_before
    assert windows[0].count("ada", now) <= recent_and_before
    assert windows[0].count("bob", now) == 0


# --- memory ------------------------------------------------------------------------------------------------------


def test_share_of_the_only_worker_is_everything() -> None:
    assert share_of(Config(), 1) == Config()


@pytest.mark.parametrize(
    ("workers", "pending", "partial", "per_user", "streams"),
    [
        (2, 2_048, 25_165_824, 16_777_216, 33_554_432),
        (3, 1_366, 16_777_216, 16_777_216, 22_369_622),
        (64, 256, 786_432, 786_432, 1_048_576),
    ],
)
def test_limits_of_memory_are_divided_down_to_what_a_worker_needs(
    workers: int, pending: int, partial: int, per_user: int, streams: int
) -> None:
    config = share_of(Config(), workers)
    assert config.tls.max_pending == pending
    assert config.limits.partial_frame_bytes == partial
    assert config.limits.partial_frame_bytes_per_user == per_user
    assert config.streams.memory_bytes == streams


def test_share_is_never_more_than_the_limit() -> None:
    config = Config.model_validate({"tls": {"max_pending": 8}})
    assert share_of(config, 64).tls.max_pending == 8


def test_share_divides_nothing_else() -> None:
    before, after = Config().model_dump(), share_of(Config(), 4).model_dump()
    changed = {
        f"{section}.{name}"
        for section, values in before.items()
        for name, value in values.items()
        if after[section][name] != value
    }
    assert changed == {
        "tls.max_pending",
        "limits.partial_frame_bytes",
        "streams.memory_bytes",
        "limits.partial_frame_bytes_per_user",
    }
