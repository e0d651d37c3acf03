"""The table of runs, and the store in memory around it, with times as arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from zcproto.errors import FailedPrecondition, NotFound, OutOfRange, PermissionDenied, ResourceExhausted
from zcproto.runs import log
from zcproto.runs.log import (
    GONE_BYTES,
    ITEM_BYTES,
    KNOWN_PER_USER,
    KNOWN_S,
    LONGEST_KEEP_S,
    RUN_BYTES,
    Gap,
    Opening,
    RunInfo,
    RunKey,
    RunLimits,
    RunState,
    RunTable,
    Superseded,
)
from zcproto.runs.store import MemoryRuns

ADA, BOB = RunKey("ada", "one"), RunKey("bob", "one")
LIMITS = RunLimits(
    items=4, bytes=1_000, runs_per_user=2, bytes_per_user=1_500, total_bytes=100_000, keep_s=60
)
OK = 0, b"end"
MANY = 100, 1 << 20

INFO = RunInfo("chat", b"digest", "s1", "192.0.2.1", False, 1_000, None, "p1", b"generation", size=10)
OPENING = Opening("chat", b"digest", 0, "first", False, INFO)
ATTACHING = Opening("chat", None, 0, "second", False)


def make(limits: RunLimits = LIMITS, **options: bool) -> RunTable:
    return RunTable(limits, **options)


def started(count: int = 0, *, end: log.End | None = None, limits: RunLimits = LIMITS) -> RunTable:
    """Return a table with a run of so many items of one byte."""
    table = make(limits)
    table.open(ADA, OPENING, 0)
    append(table, 0, count, end)
    return table


def append(
    table: RunTable, first: int, count: int, end: log.End | None = None, *, key: RunKey = ADA, size: int = 1
) -> RunState | None:
    bodies = [bytes([position % 256]) * size for position in range(first, first + count)]
    return table.append(key, INFO.generation, first, bodies, end, 0)


def state_of(table: RunTable, key: RunKey = ADA) -> RunState:
    return dict(table.runs())[key]


# --- opening ---------------------------------------------------------------------------------------------


def test_first_open_starts_run_and_later_one_attaches() -> None:
    table = make()
    is_new, state = table.open(ADA, OPENING, 0)
    assert (is_new, state.first, state.next, state.attachment, state.is_attached) == (
        True,
        0,
        0,
        "first",
        True,
    )
    is_new, state = table.open(ADA, ATTACHING, 0)
    assert (is_new, state.attachment, state.info) == (False, "second", INFO)
    assert len(table) == 1


def test_repeated_opening_of_one_owner_is_still_new_and_of_another_one_attaches() -> None:
    table = started(2)
    assert table.open(ADA, OPENING, 0)[0]
    other = replace(OPENING, attachment="x", info=replace(INFO, generation=b"other"))
    is_new, state = table.open(ADA, other, 0)
    assert not is_new
    assert state.info is INFO


@pytest.mark.parametrize(
    ("opening", "error"),
    [
        (replace(OPENING, method="other"), FailedPrecondition),
        (replace(ATTACHING, method="other"), FailedPrecondition),
        (replace(OPENING, digest=b"other"), FailedPrecondition),
        (replace(ATTACHING, position=1), OutOfRange),
        (replace(ATTACHING, position=7), OutOfRange),
    ],
    ids=["method", "method without params", "params", "before the first item", "behind the last item"],
)
def test_attachment_that_does_not_fit_the_run_is_refused_without_superseding(
    opening: Opening, error: type[Exception]
) -> None:
    table = started(4)
    table.take(ADA, "first", 4)
    append(table, 4, 2)
    assert (state_of(table).first, state_of(table).next) == (2, 6)
    with pytest.raises(error) as raised:
        table.open(ADA, opening, 0)
    assert state_of(table).attachment == "first"
    if error is OutOfRange:
        assert raised.value.details == {"first": 2, "next": 6}  # type: ignore[attr-defined]


@pytest.mark.parametrize("position", [2, 6])
def test_attachment_may_start_at_first_and_at_next(position: int) -> None:
    table = started(4)
    table.take(ADA, "first", 4)
    append(table, 4, 2)
    table.open(ADA, replace(ATTACHING, position=position), 0)
    assert len(table.read(ADA, "second", position, *MANY)[1]) == 6 - position


@pytest.mark.parametrize("opening", [ATTACHING, replace(OPENING, position=1)], ids=["no params", "position"])
def test_unknown_id_is_not_started_without_params_or_from_a_later_position(opening: Opening) -> None:
    table = make()
    with pytest.raises(NotFound):
        table.open(ADA, opening, 0)
    assert len(table) == 0


def test_run_of_bound_session_is_attached_by_bound_session_only() -> None:
    table = make()
    table.open(ADA, replace(OPENING, is_bound=True, info=replace(INFO, is_bound=True)), 0)
    with pytest.raises(PermissionDenied):
        table.open(ADA, ATTACHING, 0)
    table.open(ADA, replace(ATTACHING, is_bound=True), 0)


def test_runs_of_users_with_one_id_are_apart() -> None:
    table = started(3)
    with pytest.raises(NotFound):
        table.open(BOB, ATTACHING, 0)
    assert table.open(BOB, OPENING, 0)[0]
    assert table.read(BOB, "first", 0, *MANY)[1] == []
    assert [key for key, _ in table.runs("ada")] == [ADA]
    assert table.runs("eve") == []


def test_position_ahead_of_a_log_that_may_lag_is_accepted_until_the_end_is_written() -> None:
    table = make(may_lag=True)
    table.open(ADA, OPENING, 0)
    table.open(ADA, replace(ATTACHING, position=3), 0)
    assert table.read(ADA, "second", 3, *MANY)[1] == []
    append(table, 0, 1, OK)
    with pytest.raises(OutOfRange):
        table.read(ADA, "second", 3, *MANY)
    with pytest.raises(OutOfRange):
        table.open(ADA, replace(ATTACHING, position=3), 0)


# --- appending -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [(2, 2, 4), (0, 4, 4), (1, 1, 2), (0, 2, 2), (2, 0, 2)],
    ids=["next", "overlap", "repeated", "all repeated", "nothing"],
)
def test_items_that_are_there_are_skipped(first: int, count: int, expected: int) -> None:
    table = started(2)
    state = append(table, first, count)
    assert state is not None
    assert state.next == expected
    assert table.read(ADA, "first", 0, *MANY)[1] == [bytes([each]) for each in range(expected)]


def test_gap_is_refused_with_the_position_that_comes_next() -> None:
    with pytest.raises(Gap) as raised:
        append(started(2), 3, 1)
    assert raised.value.next == 2


@pytest.mark.parametrize(
    ("first", "count", "end", "is_repeated"),
    [(0, 2, OK, True), (2, 0, OK, True), (2, 0, (1, b"x"), False), (2, 1, None, False), (2, 0, None, False)],
    ids=["same", "same end", "another end", "items", "nothing"],
)
def test_only_the_same_end_can_be_appended_again(
    first: int, count: int, end: log.End | None, is_repeated: bool
) -> None:
    table = started(2, end=OK)
    assert (append(table, first, count, end) is not None) is is_repeated
    state = state_of(table)
    assert (state.next, state.end) == (2, OK)


@pytest.mark.parametrize("key", [ADA, BOB, RunKey("ada", "two")])
def test_append_of_another_generation_or_to_a_run_that_is_gone_has_no_effect(key: RunKey) -> None:
    table = started()
    assert table.append(key, b"another", 0, [b"x"], OK, 0) is None
    assert state_of(table).next == 0


# --- reading and taking ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "size", "expected"),
    [(10, 1 << 20, 3), (2, 1 << 20, 2), (10, 2 * (ITEM_BYTES + 1), 2), (10, 1, 1)],
    ids=["all", "items", "bytes", "one beyond the bytes"],
)
def test_read_is_bounded_but_makes_progress(items: int, size: int, expected: int) -> None:
    state, bodies = started(3).read(ADA, "first", 0, items, size)
    assert len(bodies) == expected
    assert state.next == 3


def test_superseded_attachment_can_neither_read_nor_take_nor_detach() -> None:
    table = started(3)
    table.open(ADA, ATTACHING, 0)
    with pytest.raises(Superseded):
        table.read(ADA, "first", 0, *MANY)
    table.take(ADA, "first", 3)
    table.detach(ADA, "first", 0)
    assert (state_of(table).taken, state_of(table).is_attached) == (0, True)
    table.detach(ADA, "second", 0)
    assert not state_of(table).is_attached


def test_taken_items_are_kept_until_a_bound_needs_the_room() -> None:
    table = started(3)
    table.take(ADA, "first", 2)
    assert (state_of(table).first, state_of(table).taken) == (0, 2)
    append(table, 3, 2)  # 5 items, of which 4 may be kept
    assert state_of(table).first == 1
    with pytest.raises(OutOfRange):
        table.read(ADA, "first", 0, *MANY)


@pytest.mark.parametrize(
    ("positions", "expected"), [((2, 1), 2), ((9,), 3), ((0,), 0)], ids=["falls", "beyond", "nothing"]
)
def test_taken_only_rises_and_stays_in_the_log(positions: tuple[int, ...], expected: int) -> None:
    table = started(3)
    for position in positions:
        table.take(ADA, "first", position)
    assert state_of(table).taken == expected


def test_operations_on_a_run_that_is_gone() -> None:
    table = make()
    table.take(ADA, "first", 1)
    table.detach(ADA, "first", 0)
    table.unwatch(ADA, print)
    assert not table.cancel(ADA, "caller")
    assert table.forget("ada", 0) == 0
    for operation in (lambda: table.read(ADA, "first", 0, *MANY), lambda: table.watch(ADA, print)):
        with pytest.raises(NotFound):
            operation()


# --- bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size", "taken", "is_full"),
    [
        *((3, 1, 0, False), (4, 1, 0, True), (4, 1, 1, False), (1, 1_000 - ITEM_BYTES - 1, 0, False)),
        *((1, 1_000 - ITEM_BYTES, 0, True), (1, 2_000, 0, True), (1, 2_000, 1, False)),
    ],
    ids=["below", "items", "some taken", "below bytes", "bytes", "more bytes", "large one taken"],
)
def test_run_is_full_at_a_bound_of_items_that_were_not_taken(
    count: int, size: int, taken: int, is_full: bool
) -> None:
    table = started()
    append(table, 0, count, size=size)
    table.take(ADA, "first", taken)
    assert state_of(table).is_full is is_full


def test_lowered_bounds_hold_from_the_next_append() -> None:
    table = started(3)
    table.limits = replace(LIMITS, items=2)
    state = append(table, 3, 0)
    assert state is not None
    assert (state.is_full, state.first, state.next) == (True, 0, 3)


def test_taken_items_of_other_runs_of_the_user_make_room_before_the_method_waits() -> None:
    table, two = started(limits=replace(LIMITS, bytes=5_000)), RunKey("ada", "two")
    append(table, 0, 2, size=400)
    table.take(ADA, "first", 1)
    table.open(two, OPENING, 0)
    append(table, 0, 2, key=two, size=400)
    assert (state_of(table).first, state_of(table, two).is_full) == (1, False)
    append(table, 2, 1, key=two, size=400)
    assert state_of(table, two).is_full
    woken: list[str] = []
    table.watch(two, lambda: woken.append("two"))
    table.take(ADA, "first", 2)
    assert woken == ["two"]
    append(table, 3, 0, key=two)
    assert not state_of(table, two).is_full


def test_ended_run_of_the_user_makes_room_for_items_and_those_of_others_are_kept() -> None:
    table, two = started(3, end=OK), RunKey("ada", "two")
    table.open(BOB, OPENING, 0)
    append(table, 0, 1, OK, key=BOB)
    table.open(two, OPENING, 0)
    append(table, 0, 1, key=two, size=1_400)
    assert {key for key, _ in table.runs()} == {two, BOB}


def test_user_at_the_bound_of_runs_loses_the_oldest_ended_one_first() -> None:
    table = make()
    for name, at in (("a", 1), ("b", 0)):
        key = RunKey("ada", name)
        table.open(key, OPENING, 0)
        table.append(key, INFO.generation, 0, [], OK, at)
    table.open(ADA, OPENING, 1)
    assert {key.id for key, _ in table.runs()} == {"a", "one"}
    table.open(RunKey("ada", "c"), OPENING, 1)
    with pytest.raises(ResourceExhausted):
        table.open(RunKey("ada", "d"), OPENING, 1)
    assert table.open(BOB, OPENING, 1)[0]


def test_bound_of_all_users_refuses_new_runs_only() -> None:
    table = make(replace(LIMITS, total_bytes=RUN_BYTES + INFO.size + 2 * ITEM_BYTES))
    table.open(ADA, OPENING, 0)
    append(table, 0, 2)
    with pytest.raises(ResourceExhausted):
        table.open(BOB, OPENING, 0)
    assert not table.open(ADA, ATTACHING, 0)[0]
    state = append(table, 2, 1)
    assert state is not None
    assert not state.is_full
    table.forget("ada", 0)
    assert table.size == GONE_BYTES
    assert table.open(BOB, OPENING, 0)[0]


@pytest.mark.parametrize(
    "fill",
    [
        lambda table: [table.open(RunKey(f"user{each}", "a"), OPENING, 0) for each in range(8)],
        lambda table: table.open(ADA, replace(OPENING, info=replace(INFO, size=50_000)), 0),
        lambda table: (table.open(ADA, OPENING, 0), append(table, 0, 0, (0, bytes(50_000)))),
        lambda table: table.known([RunKey("ada", str(each)) for each in range(200)], 0),
    ],
    ids=["runs", "params", "end", "ids that are gone"],
)
def test_all_that_users_can_make_grow_counts_in_the_bound_of_all(fill: Callable[[RunTable], Any]) -> None:
    table = make(replace(LIMITS, total_bytes=32_000))
    fill(table)
    with pytest.raises(ResourceExhausted):
        table.open(BOB, OPENING, 0)
    append(table, 0, 0, OK)
    table.sweep(LONGEST_KEEP_S)
    table.sweep(LONGEST_KEEP_S + KNOWN_S)
    for key, state in table.runs():
        table.append(key, INFO.generation, state.next, [], OK, 0)
    table.sweep(3 * LONGEST_KEEP_S)
    table.sweep(4 * LONGEST_KEEP_S)
    assert table.size == 0


def test_large_end_counts_in_the_bound_of_its_user() -> None:
    table, two = started(1, end=(0, bytes(2_000))), RunKey("ada", "two")
    table.open(two, OPENING, 0)
    append(table, 0, 1, key=two)
    assert [key for key, _ in table.runs()] == [two]


def test_ids_that_are_gone_are_bounded_for_each_user() -> None:
    table = make(replace(LIMITS, total_bytes=2 * KNOWN_PER_USER * GONE_BYTES))
    for number in range(KNOWN_PER_USER):
        key = RunKey("ada", str(number))
        table.open(key, OPENING, 0)
        table.forget("ada", 0)
    with pytest.raises(ResourceExhausted):
        table.open(ADA, OPENING, 0)
    assert table.open(BOB, OPENING, 0)[0]
    assert table.open(ADA, OPENING, KNOWN_S)[0]


# --- time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "kept_until"),
    [
        (lambda table: table.detach(ADA, "first", 10), 70),
        (lambda table: None, LONGEST_KEEP_S),
        (lambda table: (table.detach(ADA, "first", 10), table.open(ADA, ATTACHING, 60)), LONGEST_KEEP_S),
        (lambda table: table.detach(ADA, "first", LONGEST_KEEP_S - 1), LONGEST_KEEP_S),
    ],
    ids=["after the last reader", "while it is read", "while it is read again", "an hour at most"],
)
def test_ended_run_is_kept(steps: Callable[[RunTable], Any], kept_until: float) -> None:
    table = started(1, end=OK)
    steps(table)
    assert table.sweep(kept_until - 0.1) == 0
    assert table.sweep(kept_until) == 1
    assert (len(table), table.size) == (0, GONE_BYTES)


def test_running_run_is_kept_though_nothing_reads_it() -> None:
    table = started(1)
    table.detach(ADA, "first", 0)
    assert table.sweep(1e9) == 0


def test_id_of_a_run_that_is_gone_is_not_started_again_for_a_while() -> None:
    table = started()
    table.forget("ada", 0)
    for opening in (OPENING, ATTACHING):
        with pytest.raises(NotFound):
            table.open(ADA, opening, KNOWN_S - 0.1)
    assert table.open(ADA, OPENING, KNOWN_S)[0]


def test_sweep_forgets_users_without_runs_and_known_ids() -> None:
    table = started()
    table.forget("ada", 0)
    assert table.sweep(KNOWN_S) == 0
    assert table._users == {}  # its memory is the point


# --- wake-ups, and the end of users ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "is_woken"),
    [
        (lambda table: append(table, 1, 1), True),
        (lambda table: append(table, 1, 0, OK), True),
        (lambda table: append(table, 1, 0), False),
        (lambda table: table.take(ADA, "first", 1), False),
        (lambda table: table.open(ADA, ATTACHING, 0), True),
        (lambda table: table.detach(ADA, "first", 0), True),
        (lambda table: table.cancel(ADA, "caller"), True),
        (lambda table: table.forget("ada", 0), True),
        (lambda table: table.open(BOB, OPENING, 0), False),
    ],
    ids=["items", "end", "nothing", "taken", "attached", "detached", "cancelled", "forgotten", "another run"],
)
def test_change_of_a_run_wakes_those_who_watch_it(change: Callable[[RunTable], Any], is_woken: bool) -> None:
    table, woken = started(1), []
    table.watch(ADA, lambda: woken.append(1))
    change(table)
    assert bool(woken) is is_woken
    table = started(1)
    table.watch(ADA, woken.clear)
    table.unwatch(ADA, woken.clear)
    woken.append(2)
    change(table)
    assert woken


def test_taken_items_of_a_full_run_wake_its_owner() -> None:
    table, woken = started(LIMITS.items), []
    table.watch(ADA, lambda: woken.append(1))
    table.take(ADA, "first", 1)
    table.take(ADA, "first", 2)  # its owner knows that there is room
    assert woken == [1]


def test_first_reason_of_a_cancellation_stays_and_an_ended_run_cannot_be_cancelled() -> None:
    table = started()
    assert table.cancel(ADA, "caller")
    assert table.cancel(ADA, "deadline")
    assert state_of(table).cancel == "caller"
    append(table, 0, 0, OK)
    assert not table.cancel(ADA, "caller")


def test_forget_deletes_running_and_ended_runs_of_one_user() -> None:
    table = started(1, end=OK)
    table.open(RunKey("ada", "two"), OPENING, 0)
    table.open(BOB, OPENING, 0)
    assert table.forget("ada", 0) == 2
    assert [key for key, _ in table.runs()] == [BOB]
    assert append(table, 0, 1, key=RunKey("ada", "two")) is None


# --- properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_keep_positions_bounds_and_sizes(seed: int) -> None:
    rand, now = random.Random(seed), 0.0
    limits = replace(LIMITS, runs_per_user=3)
    table, keys = make(limits), [RunKey(user, id_) for user in ("ada", "bob") for id_ in "abcd"]
    written: dict[RunKey, list[bytes]] = {}
    gone_at: dict[RunKey, float] = {}
    for step in range(600):
        now += rand.choice([0, 0, 1, 90])
        key, states = rand.choice(keys), dict(table.runs())
        operation = rand.randrange(8)
        try:
            if operation < 2:
                if table.open(key, replace(OPENING, attachment=f"{step}"), now)[0] and key not in states:
                    written[key] = []
            elif operation < 5 and key in states and not states[key].is_full:
                bodies = [rand.randbytes(rand.choice([1, 30, 700])) for _ in range(rand.randrange(3))]
                end = OK if rand.random() < 0.2 else None
                if table.append(key, INFO.generation, states[key].next, bodies, end, now) is not None:
                    written[key] += bodies
            elif operation == 5 and key in states:
                table.take(key, states[key].attachment, rand.randint(0, states[key].next))
            elif operation == 6 and key in states:
                table.detach(key, states[key].attachment, now)
            else:
                table.sweep(now)
        except (NotFound, OutOfRange, ResourceExhausted):
            pass
        table.sweep(now)
        gone_at |= dict.fromkeys(states.keys() - dict(table.runs()).keys(), now)
        states = dict(table.runs())
        total = GONE_BYTES * sum(key not in states and now < at + KNOWN_S for key, at in gone_at.items())
        for key, state in states.items():
            kept = table.read(key, state.attachment, state.first, *MANY)[1]
            assert kept == written[key][state.first :]
            assert state.first <= state.taken <= state.next == len(written[key])
            total += RUN_BYTES + sum(ITEM_BYTES + len(body) for body in kept)
            total += INFO.size if state.end is None else ITEM_BYTES + len(state.end[1])
            room = limits.bytes + 3 * (ITEM_BYTES + 700)
            assert sum(ITEM_BYTES + len(body) for body in kept) <= room
        assert table.size == total
        assert all(len(table.runs(user)) <= 3 for user in ("ada", "bob"))


async def test_store_in_memory_passes_everything_to_its_table_with_the_time() -> None:
    now = 0.0
    table = make()
    store = MemoryRuns(table, lambda: now)
    is_new, state = await store.open(ADA, OPENING)
    assert is_new
    assert await store.append(ADA, INFO.generation, 0, [b"a"], None) is state
    assert (await store.read(ADA, "first", 0, *MANY))[1] == [b"a"]
    await store.take(ADA, "first", 1)
    await store.detach(ADA, "first")
    assert (state.taken, state.is_attached) == (1, False)
    assert await store.cancel(ADA, "caller")
    assert await store.runs("ada") == [(ADA, state)]
    woken: list[int] = []
    store.watch(ADA, lambda: woken.append(1))
    now = 5.0
    assert await store.forget("ada") == 1
    assert woken == [1]
    with pytest.raises(NotFound):
        table.open(ADA, OPENING, KNOWN_S + 4.9)
