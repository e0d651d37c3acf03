"""Clients of other processes: finding and calling them over a carrier that loses messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from tests.helpers import until
from tests.server.remote_clients_harness import BusProcess, Two
from zcproto.app.context import MOST_FOUND, ConnectedClient
from zcproto.bus.topics import MAX_WAITING
from zcproto.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from zcproto.server import remote_clients
from zcproto.server.clients import CallLimits
from zcproto.server.remote_clients import LOST_S


@pytest.fixture
async def two(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Two]:
    monkeypatch.setattr(remote_clients, "CHECK_S", 1e6)  # tests check
    two = Two()
    yield two
    for each in two.bus.processes:
        await each.remote.stop()


async def test_client_of_another_process_is_found_and_called(two: Two) -> None:
    (client,) = await two.here.find()
    assert (client.user, client.session_id) == ("ada", two.connection.session.id)
    assert await two.here.find("bob") == await two.there.find("ada") == []
    two.connection.answer.set_result({"ok": True})
    assert await client.call("approve", tool="ls") == {"ok": True}
    assert two.connection.calls == [("approve", {"tool": "ls"})]
    assert two.here.remote.in_flight == 0


@pytest.mark.parametrize("error", [NotFound("no such tool", {"tool": "ls"}), ConnectionClosed("it ended")])
async def test_error_of_the_handler_arrives(two: Two, error: Exception) -> None:
    two.connection.answer.set_exception(error)
    (client,) = await two.here.find()
    with pytest.raises(type(error)) as raised:
        await client.call("approve")
    assert (str(raised.value), cast("Any", raised.value).of_client) == (str(error), True)


async def test_answer_that_is_too_large_between_processes_is_an_error(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_clients, "MAX_BODY", 100)
    two.connection.answer.set_result("x" * 100)
    (client,) = await two.here.find()
    with pytest.raises(ResourceExhausted, match="the answer has 102 bytes; at most 100"):
        await client.call("approve")
    with pytest.raises(InvalidArgument):
        await client.call("approve", text="x" * 100)


async def test_late_and_cancelled_calls_are_withdrawn(two: Two) -> None:
    late = await two.call(timeout=0.001)
    with pytest.raises(DeadlineExceeded):
        await late
    task = await two.call()
    task.cancel()
    await until(lambda: two.connection.withdrawn == 2)
    (client,) = await two.here.find()
    with pytest.raises(DeadlineExceeded):
        await client.call("approve", timeout=0)


async def test_call_whose_withdrawal_was_lost_is_withdrawn_by_the_next_check(two: Two) -> None:
    two.bus.lost_kinds = {remote_clients.WITHDRAW}
    task = await two.call()
    task.cancel()
    await until(lambda: remote_clients.WITHDRAW in two.bus.delivered)
    assert two.connection.withdrawn == 0
    two.check()
    await until(lambda: two.connection.withdrawn == 1)


async def test_lost_answer_is_sent_again_and_the_call_is_not(two: Two) -> None:
    two.bus.lost_kinds = {remote_clients.ANSWER}
    task = await two.call()
    two.connection.answer.set_result("fine")
    await until(lambda: remote_clients.ANSWER in two.bus.delivered)
    two.bus.lost_kinds.clear()
    two.check()
    assert await task == "fine"
    assert two.bus.delivered.count(remote_clients.CALL) == 1


@pytest.mark.parametrize("lost", [remote_clients.CALL, remote_clients.ANSWER])
async def test_call_that_the_other_process_does_not_know_has_perhaps_run(
    two: Two, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_clients, "KEPT_BYTES", 0)  # of answers
    two.bus.lost_kinds = {lost}
    two.connection.answer.set_result("fine")
    (client,) = await two.here.find()
    task = asyncio.create_task(client.call("approve"))
    await until(lambda: lost in two.bus.delivered)
    await asyncio.sleep(0)
    two.check()
    with pytest.raises(ConnectionClosed, match="may have run"):
        await task


@pytest.mark.parametrize(("is_silent", "seconds"), [(True, LOST_S), (False, BusProcess.absence_s)])
async def test_call_to_a_lost_process_has_perhaps_run(two: Two, is_silent: bool, seconds: float) -> None:
    task = await two.call()
    if is_silent:
        two.bus.lost_kinds = {remote_clients.CHECK}
    else:
        two.there.follows.clear()
    two.check()
    await until(lambda: remote_clients.CHECK in two.bus.delivered)
    await asyncio.sleep(0)
    two.check(seconds)
    assert not task.done()
    two.check(0.001)
    with pytest.raises(ConnectionClosed, match="is lost; the call may have run"):
        await task
    assert two.here.clients.ended == {"closed": 1}
    assert len(await two.here.find()) == is_silent
    two.there.remote.check(two.clock.now() + LOST_S)
    await until(lambda: two.connection.withdrawn == 1)


async def test_time_without_a_carrier_does_not_count(two: Two) -> None:
    task = await two.call()
    follows, two.there.follows = two.there.follows, set()
    two.check()  # the inbox is absent
    await asyncio.sleep(0)
    two.there.follows = follows
    for each in two.bus.processes:
        each.topics.down()
    two.check(10 * LOST_S)
    assert await two.here.find() == []
    with pytest.raises(Unavailable, match="cannot be reached now"):
        await ConnectedClient(
            remote_clients.RemoteClient(two.here.remote, two.there.remote.process, "c1", "192.0.2.1"),
            "s",
            "ada",
        ).call("approve")
    for each in two.bus.processes:
        each.topics.up()
    two.check()
    two.connection.answer.set_result("fine")
    assert await task == "fine"


async def test_call_to_a_process_that_has_ended_has_not_run(two: Two) -> None:
    (client,) = await two.here.find()
    two.there.follows.clear()
    with pytest.raises(Unavailable, match="find the client again"):
        await client.call("approve")
    assert two.here.clients.ended == {"unavailable": 1}


async def test_call_to_a_registration_that_has_gone_has_not_run(two: Two) -> None:
    (client,) = await two.here.find()
    two.there.clients.remove(cast("Any", two.connection), client.session_id)
    with pytest.raises(Unavailable, match="handles no method 'approve'"):
        await client.call("approve")


async def test_calls_to_other_processes_are_limited(two: Two) -> None:
    two.here.clients.limits = CallLimits(per_user=1)
    task = await two.call()
    (client,) = await two.here.find()
    with pytest.raises(ResourceExhausted, match="too many calls") as raised:
        await client.call("approve")
    assert raised.value.details == {"limit": 1}
    two.connection.answer.set_result("fine")
    assert await task == "fine"


async def test_ten_thousand_registrations_are_found_within_the_bound(two: Two) -> None:
    for number in range(10_000):
        two.there.register(f"user {number}", f"c{number}")
    assert len(await two.here.find()) == MOST_FOUND
    assert [client.user for client in await two.here.find("user 9999")] == ["user 9999"]


async def test_process_that_does_not_answer_is_left_out(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_clients, "FIND_S", 0.001)
    two.bus.lost_kinds = {remote_clients.FOUND}
    assert await two.here.find() == []
    monkeypatch.setattr(remote_clients, "MOST_FINDS", 0)
    with pytest.raises(ResourceExhausted, match="too many searches"):
        await two.here.find()


async def test_answer_over_the_rate_of_the_carrier_comes_later(two: Two) -> None:
    task = await two.call()
    two.there.waiting = MAX_WAITING
    two.connection.answer.set_result("fine")
    await until(lambda: two.there.topics.refused == 1)
    assert not task.done()
    two.there.waiting = 0
    two.check()
    assert await task == "fine"


async def test_stop_fails_own_calls_and_withdraws_those_of_others(two: Two) -> None:
    task = await two.call()
    await two.there.remote.stop()
    assert two.connection.withdrawn == 1
    await two.here.remote.stop()
    with pytest.raises(ConnectionClosed, match="the server has stopped"):
        await task


async def test_message_of_another_version_is_ignored(two: Two) -> None:
    await two.here.find()
    two.here.remote.send(two.there.remote.process, 99)  # only a newer version sends it
    two.here.remote.send(two.there.remote.process, remote_clients.FIND, 1)
    assert len(await two.here.find()) == 1
