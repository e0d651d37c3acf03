"""Pending calls between processes, over a carrier that loses, repeats and reorders messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from tests.helpers import FakeClock, until
from tests.server.remote_clients_harness import Bus, BusProcess, Connection, Sessions
from tests.sessions.helpers import CountedEntropy
from zcproto.errors import (
    CallError,
    Cancelled,
    DeadlineExceeded,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from zcproto.server import pending, remote_clients, remote_pending
from zcproto.server.clients import CallLimits
from zcproto.server.remote_pending import LOST_S


class Fleet:
    """Three processes. `owner` asks; the others have clients."""

    def __init__(self) -> None:
        self.bus, self.clock, self.entropy = Bus(), FakeClock(), CountedEntropy()
        self.sessions = Sessions()
        self.processes = [BusProcess(self.bus, self.clock, self.entropy, self.sessions) for _ in range(3)]
        self.owner, self.second, self.third = self.processes

    async def join(self) -> None:
        for process in self.processes:
            process.remote.begin()
        await until(lambda: all(process.topics.is_up for process in self.processes))

    def check(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        for process in self.bus.processes:
            process.wheel.advance(self.clock.now())
            process.remote.check(self.clock.now())

    async def settle(self, *, rounds: int = 12) -> None:
        """Let everything arrive, with as many checks as that may take."""
        for _ in range(rounds):
            self.check()
            for _ in range(8):
                await asyncio.sleep(0)
            await asyncio.sleep(remote_pending.TOGETHER_S)

    def kill(self, process: BusProcess) -> None:
        self.bus.processes.remove(process)
        process.topics.is_up = False


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(remote_clients, "CHECK_S", 1e6)  # tests check
    monkeypatch.setattr(remote_pending, "TOGETHER_S", 0.0)
    fleet = Fleet()
    await fleet.join()
    yield fleet
    for process in fleet.processes:
        await process.remote.stop()


async def offered(*connections: Connection) -> str:
    """Return the id of the call that is offered to all of them."""
    await until(lambda: all(connection.offers for connection in connections))
    ids = {*connections[0].offers}
    assert all({*connection.offers} == ids for connection in connections)
    (call_id,) = ids
    return call_id


def gone(*connections: Connection) -> bool:
    return not any(connection.offers for connection in connections)


async def test_call_is_offered_in_all_processes_and_answered_once(fleet: Fleet) -> None:
    own, second, third = (process.register() for process in fleet.processes)
    without, of_bob = fleet.third.register(method="other"), fleet.third.register("bob")
    task = fleet.owner.ask()
    call_id = await offered(own, second, third)
    later = fleet.second.register()
    await until(lambda: bool(later.offers))
    second.decide(call_id, "yes")
    assert await task == "yes"
    await until(lambda: gone(own, third, later))
    assert without.offered == of_bob.offered == []
    assert fleet.owner.pending.ended == {"answered": 1}
    assert [process.pending.held for process in fleet.processes] == [0, 0, 0]
    assert [process.wheel.due for process in fleet.processes] == [{}, {}, {}]


@pytest.mark.parametrize("error", [PermissionDenied("no", {"by": "ada"}), NotFound("no such tool")])
async def test_error_of_a_handler_elsewhere_is_the_answer(fleet: Fleet, error: CallError) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask()
    client.decide(await offered(client), error=error)
    with pytest.raises(type(error)) as raised:
        await task
    assert (raised.value.message, raised.value.details) == (error.message, error.details)


@pytest.mark.parametrize("error", [Unavailable("not now"), Unimplemented("no")])
async def test_failure_without_a_decision_stays_in_its_process(fleet: Fleet, error: CallError) -> None:
    client, other = fleet.second.register(), fleet.third.register()
    task = fleet.owner.ask()
    call_id = await offered(client, other)
    client.decide(call_id, error=error)
    fleet.check(1.0)
    assert bool(client.offers) == isinstance(error, Unavailable)
    other.decide(call_id, 7)
    assert await task == 7


async def test_first_of_two_answers_in_two_processes_wins(fleet: Fleet) -> None:
    second, third = fleet.second.register(), fleet.third.register()
    task = fleet.owner.ask()
    call_id = await offered(second, third)
    third.decide(call_id, 3)
    second.decide(call_id, 2)
    assert await task == 3
    await fleet.settle()
    assert fleet.owner.pending.ended == {"answered": 1}
    assert [process.pending.held for process in fleet.processes] == [0, 0, 0]


async def test_answer_of_the_own_process_wins_against_one_that_is_checked(fleet: Fleet) -> None:
    own, second = fleet.owner.register(), fleet.second.register()
    task = fleet.owner.ask()
    call_id = await offered(own, second)
    second.decide(call_id, 2)
    own.decide(call_id, 1)
    assert await task == 1
    await fleet.settle()
    assert fleet.second.pending.held == 0


async def test_client_that_answers_after_the_end_changes_nothing(fleet: Fleet) -> None:
    second, third = fleet.second.register(), fleet.third.register()
    fleet.bus.lost_kinds = {remote_pending.CHANGED}
    fleet.bus.lost_kinds.clear()
    task = fleet.owner.ask()
    call_id = await offered(second, third)
    fleet.bus.lost_kinds = {remote_pending.CHANGED}  # the other one is not withdrawn
    second.decide(call_id, 2)
    assert await task == 2
    await fleet.settle()
    assert third.offers
    third.decide(call_id, 3)
    await fleet.settle()
    assert fleet.third.pending.held == 0
    assert fleet.owner.pending.ended == {"answered": 1}


# --- whose answer counts -------------------------------------------------------------------------------


def rotate(fleet: Fleet, connection: Connection) -> None:
    """Refresh the session in another process; that of the connection does not know it yet."""
    record = fleet.sessions.records.pop(connection.session.token_digest)
    fleet.sessions.records[b"newer token"] = record


def revoke(fleet: Fleet, connection: Connection) -> None:
    del fleet.sessions.records[connection.session.token_digest]


@pytest.mark.parametrize("happens", [rotate, revoke])
async def test_session_whose_end_is_not_known_yet_gives_no_answer(fleet: Fleet, happens: Any) -> None:
    thief, user = fleet.second.register(), fleet.third.register()
    beside = fleet.second.register()
    task = fleet.owner.ask()
    call_id = await offered(thief, user, beside)
    happens(fleet, thief)
    thief.decide(call_id, "stolen")
    await until(lambda: remote_pending.REFUSED in fleet.bus.delivered)
    await fleet.settle()
    assert not task.done()
    assert not thief.offers
    fleet.check(1.0)
    assert thief.offers  # until its process learns it
    assert len(beside.offered) == 1
    user.decide(call_id, "mine")
    assert await task == "mine"


@pytest.mark.parametrize("change", [{"user": "eve"}, {"flags": 0}, {"id": bytes(15) + b"x"}])
async def test_answer_must_be_of_a_session_of_the_user_that_is_bound_as_asked(
    fleet: Fleet, change: dict[str, Any]
) -> None:
    bound, unbound = fleet.second.register(bound=True), fleet.second.register()
    task = fleet.owner.ask(bound=True)
    call_id = await offered(bound)
    assert not unbound.offers
    vars(fleet.sessions.records[bound.session.token_digest]).update(change)
    bound.decide(call_id, True)
    await until(lambda: remote_pending.REFUSED in fleet.bus.delivered)
    assert not task.done()
    task.cancel()


async def test_client_that_has_gone_after_its_refused_answer_is_not_asked_again(fleet: Fleet) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask()
    call_id = await offered(client)
    revoke(fleet, client)
    client.decide(call_id, True)
    fleet.second.clients.remove(client, client.session.id)  # type: ignore[arg-type]
    await until(lambda: remote_pending.REFUSED in fleet.bus.delivered)
    await fleet.settle()
    assert fleet.second.pending.held == 0
    task.cancel()


async def test_answer_waits_while_the_store_is_away_or_the_client_has_gone(fleet: Fleet) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask()
    call_id = await offered(client)
    fleet.sessions.is_away = True
    client.decide(call_id, "yes")
    fleet.second.clients.remove(client, client.session.id)  # type: ignore[arg-type]
    await fleet.settle()
    assert not task.done()
    fleet.sessions.is_away = False
    fleet.check()
    assert await task == "yes"


# --- how a call ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancelled", "deadline", "operator", "stop", "caller"])
async def test_offers_elsewhere_end_with_the_call(fleet: Fleet, end: str) -> None:
    second, third = fleet.second.register(), fleet.third.register()
    caller = fleet.sessions.open("bob")
    task = fleet.owner.ask(seconds=60.0, caller=caller)
    call_id = await offered(second, third)
    if end == "cancelled":
        task.cancel()
    elif end == "deadline":
        fleet.clock.advance(60.0)
        fleet.owner.wheel.advance(fleet.clock.now())
    elif end == "operator":
        fleet.owner.pending.answer(call_id, True, None, "root")
    elif end == "caller":
        fleet.owner.pending.caller_ended(caller.id)
    else:
        await fleet.owner.remote.stop()
    await until(lambda: gone(second, third))
    ended = {"operator": "answered", "deadline": "expired"}.get(end, "withdrawn")
    assert fleet.owner.pending.ended == {ended: 1}
    expected = {"operator": None, "deadline": DeadlineExceeded}.get(end, Cancelled)
    if end == "cancelled":
        expected = asyncio.CancelledError
    assert (await asyncio.gather(task, return_exceptions=True))[0].__class__ in (expected, bool)


async def test_copy_ends_at_its_deadline_without_its_owner(fleet: Fleet) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask(seconds=5.0)
    await offered(client)
    fleet.clock.advance(5.0)
    fleet.second.wheel.advance(fleet.clock.now())
    assert gone(client)
    assert fleet.second.pending.ended == {}
    assert fleet.second.remote.pending.owners
    fleet.check()
    assert fleet.second.remote.pending.owners == []
    task.cancel()


@pytest.mark.parametrize(("is_silent", "seconds"), [(True, LOST_S), (False, BusProcess.absence_s)])
async def test_offers_of_a_lost_owner_are_withdrawn(fleet: Fleet, is_silent: bool, seconds: float) -> None:
    second, third = fleet.second.register(), fleet.third.register()
    task = fleet.owner.ask()
    await offered(second, third)
    if is_silent:
        fleet.bus.lost_kinds = {remote_pending.CHANGED}
    else:
        fleet.kill(fleet.owner)
    fleet.check()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fleet.check(seconds)
    assert not gone(second, third)
    fleet.check(0.001)
    assert gone(second, third)
    assert fleet.second.pending.held == 0
    task.cancel()


async def test_time_without_a_carrier_does_not_count(fleet: Fleet) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask()
    call_id = await offered(client)
    for process in fleet.processes:
        process.topics.down()
    fleet.check(10 * LOST_S)
    client.decide(call_id, "yes")
    await fleet.settle()
    assert not task.done()
    for process in fleet.processes:
        process.topics.up()
    fleet.check(LOST_S)
    assert await task == "yes"


async def test_client_in_a_process_that_joins_later_is_asked(fleet: Fleet) -> None:
    task = fleet.owner.ask()
    await fleet.settle()
    late = BusProcess(fleet.bus, fleet.clock, fleet.entropy, fleet.sessions)
    client = late.register()
    await until(lambda: late.topics.is_up)
    fleet.check()
    client.decide(await offered(client), "late")
    assert await task == "late"
    await late.remote.stop()


async def test_copies_without_clients_are_dropped_and_come_back(fleet: Fleet) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask()
    await offered(client)
    fleet.second.clients.remove(client, client.session.id)  # type: ignore[arg-type]
    fleet.check()
    assert fleet.second.pending.held == 0
    again = fleet.second.register()
    again.decide(await offered(again), 1)
    assert await task == 1
    fleet.check(LOST_S + 1)
    assert not fleet.owner.remote.pending.is_active


# --- limits --------------------------------------------------------------------------------------------


async def test_copies_that_have_no_room_come_when_there_is_some(fleet: Fleet) -> None:
    fleet.second.clients.limits = CallLimits(pending_per_user=2)
    client = fleet.second.register()
    tasks = [fleet.owner.ask() for _ in range(3)]
    await until(lambda: len(client.offers) == 2)
    fleet.bus.delivered.clear()
    fleet.check()
    await asyncio.sleep(0)
    assert remote_pending.WANT not in fleet.bus.delivered  # not for what has no room
    with pytest.raises(ResourceExhausted):
        await fleet.second.ask()
    client.decide(next(iter(client.offers)), 1)
    await fleet.settle()
    assert len(client.offered) == 3
    assert [task.done() for task in tasks].count(True) == 1
    for task in tasks:
        task.cancel()


async def test_copies_without_room_for_their_bytes_do_not_hold_up_other_users(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_pending, "WANTED_AT_ONCE", 1)
    tasks = [fleet.owner.ask(user) for user in ("ada", "ada", "ada", "bob")]
    await fleet.settle()
    size = len(fleet.owner.pending.of("ada")[0].request)
    monkeypatch.setattr(pending, "BYTES_PER_USER", 2 * size)
    ada, bob = fleet.second.register(), fleet.second.register("bob")
    await fleet.settle()
    assert (len(ada.offers), len(bob.offers)) == (2, 1)
    monkeypatch.setattr(pending, "BYTES_PER_USER", 3 * size)
    await fleet.settle()
    assert len(ada.offers) == 3
    for task in tasks:
        task.cancel()


async def test_calls_come_in_parts(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_pending, "GIVEN_BYTES", 0)
    monkeypatch.setattr(remote_pending, "WANTED_AT_ONCE", 2)
    clients = [fleet.second.register(f"user{number}") for number in range(5)]
    tasks = [fleet.owner.ask(f"user{number}") for number in range(5) for _ in range(3)]
    await until(lambda: all(len(client.offers) == 3 for client in clients))
    for task in tasks:
        task.cancel()
    await until(lambda: gone(*clients))


async def test_client_whose_answer_has_no_room_is_asked_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fleet.second.register()
    task = fleet.owner.ask()
    call_id = await offered(client)
    monkeypatch.setattr(remote_pending, "KEPT_BYTES", 300)
    client.decide(call_id, "x" * 100)
    assert not client.offers
    fleet.check(1.0)
    client.decide(call_id, "x")
    assert await task == "x"
    await until(lambda: fleet.second.pending.held == 0)
    task = fleet.owner.ask()
    client.decide(await offered(client), "y")  # the room is free again
    assert await task == "y"


async def test_answer_that_is_too_large_between_processes_is_an_error(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_pending, "MAX_ANSWER", 10)
    client = fleet.second.register()
    task = fleet.owner.ask()
    client.decide(await offered(client), "x" * 20)
    with pytest.raises(ResourceExhausted, match="the answer has 21 bytes; at most 10"):
        await task


# --- operators -----------------------------------------------------------------------------------------


async def test_operator_lists_and_decides_calls_of_other_processes(fleet: Fleet) -> None:
    tasks = [fleet.owner.ask(), fleet.second.ask("bob")]
    await fleet.settle()
    elsewhere = fleet.third.remote.pending
    rows, is_complete = await elsewhere.list(None)
    assert is_complete
    assert [(row["user"], row["params"]) for row in rows] == [
        ("ada", {"tool": "ls"}),
        ("bob", {"tool": "ls"}),
    ]
    (row,), _ = await elsewhere.list("bob")
    assert (await elsewhere.decide(row["id"], "yes", None, "root"))["user"] == "bob"
    assert await tasks[1] == "yes"
    with pytest.raises(NotFound):
        await elsewhere.decide(row["id"], "yes", None, "root")
    await elsewhere.decide(rows[0]["id"], None, PermissionDenied("no"), "root")
    with pytest.raises(PermissionDenied):
        await tasks[0]


async def test_operator_learns_that_a_process_has_not_answered(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = fleet.owner.ask()
    await fleet.settle()
    monkeypatch.setattr(remote_pending, "LISTED_BYTES", 10)
    assert await fleet.third.remote.pending.list(None) == ([], False)
    monkeypatch.setattr(remote_clients, "FIND_S", 0.001)
    fleet.bus.lost_kinds = {remote_clients.FOUND}
    assert await fleet.third.remote.pending.list(None) == ([], False)
    with pytest.raises(Unavailable, match="repeat it"):
        await fleet.third.remote.pending.decide("unknown", 1, None, "root")
    task.cancel()


# --- anything --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
async def test_every_call_is_answered_once_whatever_the_carrier_does(fleet: Fleet, seed: int) -> None:
    random = fleet.bus.random = Random(seed)
    clients: list[tuple[BusProcess, Connection]] = []
    tasks: list[asyncio.Task[Any]] = []
    accepted: dict[str, set[int]] = {}
    answers: list[tuple[str, bytes]] = []
    ids: dict[str, asyncio.Task[Any]] = {}
    users = ("ada", "bob")

    def ask() -> None:
        process = random.choice(fleet.processes)
        before = {call.id for call in process.pending.of(None)}
        task = process.ask(random.choice(users))
        tasks.append(task)
        asyncio.get_running_loop().call_soon(
            lambda: ids.update(
                (call.id, task) for call in process.pending.of(None) if call.id not in before | ids.keys()
            )
        )

    def register() -> None:
        if len(clients) < 12:
            process = random.choice(fleet.processes)
            clients.append((process, process.register(random.choice(users), f"c{len(clients)}")))

    def leave() -> None:
        if clients:
            process, connection = clients.pop(random.randrange(len(clients)))
            process.clients.remove(connection, connection.session.id)  # type: ignore[arg-type]

    def answer() -> None:
        open_offers = [(*each, call_id) for each in clients for call_id in each[1].offers]
        if open_offers:
            process, connection, call_id = random.choice(open_offers)
            value = random.randrange(1_000_000)
            if connection.session.token_digest in fleet.sessions.records:
                accepted.setdefault(call_id, set()).add(value)
                answers.append((call_id, connection.session.token_digest))
            elif process.pending.own(call_id) is not None:
                return  # the connection would have noticed it
            connection.decide(call_id, value)

    def rotate_one() -> None:
        if clients:
            _, connection = random.choice(clients)
            fleet.sessions.records.pop(connection.session.token_digest, None)

    def cancel() -> None:
        if tasks:
            random.choice(tasks).cancel()

    steps = [ask] * 6 + [register] * 4 + [leave] + [answer] * 6 + [rotate_one] + [cancel] + [fleet.check] * 2
    for _ in range(150):
        random.choice(steps)()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    fleet.bus.random = None
    await fleet.settle()
    open_ids = {call.id for process in fleet.processes for call in process.pending.of(None)}
    results = {call_id: task for call_id, task in ids.items() if task.done() and not task.cancelled()}
    assert len(results) > 3
    for call_id, task in results.items():
        assert task.result() in accepted[call_id]
    live = [(each, each.session) for _, each in clients]
    for connection, session in live:
        mine = {call.id for process in fleet.processes for call in process.pending.of(session.user)}
        assert {*connection.offers} <= mine <= open_ids
        if session.token_digest in fleet.sessions.records:
            assert {*connection.offers} == mine
    for call_id, digest in answers:
        assert call_id not in open_ids or digest not in fleet.sessions.records, "an answer was lost"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await fleet.settle()
    assert [process.pending.held for process in fleet.processes] == [0, 0, 0]
