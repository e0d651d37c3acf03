"""The connections of a session in other workers: who is asked, and what is shown without an answer."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from zcproto.errors import ResourceExhausted, Unimplemented
from zcproto.server.state import ServerState
from zcproto.workers.fleet import ASKED_AT_ONCE, HERE, OF, SESSIONS, connections_elsewhere, serve_connections
from zcproto.workers.link import Link, LinkClient, LinkLost, LinkServer, Topics


class OtherEnd:
    """The link to a worker, which answers with what a test gives; or the client of one."""

    def __init__(self, answer: Any, *, is_worker: bool = True) -> None:
        self.answer = answer
        self.facts = {"number": 1} if is_worker else {"urgent": True}
        self.asked: list[tuple[str, list[str]]] = []

    async def call(self, topic: str, session_ids: list[str], *, within: float) -> Any:
        self.asked.append((topic, session_ids))
        if isinstance(self.answer, asyncio.Event):
            await self.answer.wait()
            return {}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Coordinator:
    def __init__(self, *links: OtherEnd) -> None:
        self.links = dict.fromkeys(links)
        self.topics = Topics()
        serve_connections(cast(LinkServer, self))

    async def of(self, asker: OtherEnd, session_ids: list[str]) -> Any:
        return await self.topics.calls[OF](cast(Link, asker), session_ids)


async def test_other_workers_are_asked_and_silent_ones_left_out() -> None:
    asker = OtherEnd({"s": [[9, "192.0.2.9"]]})
    first, second = OtherEnd({"s": [[1, "192.0.2.1"]]}), OtherEnd({"s": [[2, "192.0.2.2"]], "t": []})
    silent, old, store = (
        OtherEnd(LinkLost("late")),
        OtherEnd(Unimplemented("")),
        OtherEnd({}, is_worker=False),
    )
    coordinator = Coordinator(asker, first, second, silent, old, store)
    found = await coordinator.of(asker, ["s", "t"])
    assert found == {"s": [[1, "192.0.2.1"], [2, "192.0.2.2"]], "t": []}
    assert asker.asked == store.asked == []
    assert first.asked == silent.asked == [(HERE, ["s", "t"])]


async def test_coordinator_asks_for_few_lists_at_once() -> None:
    gate = asyncio.Event()
    asker = OtherEnd({})
    coordinator = Coordinator(asker, OtherEnd(gate))
    asking = [asyncio.create_task(coordinator.of(asker, ["s"])) for _ in range(ASKED_AT_ONCE)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await coordinator.of(asker, ["s"])
    gate.set()
    await asyncio.gather(*asking)
    assert await coordinator.of(asker, ["s"]) == {"s": []}


@pytest.mark.parametrize(
    "failure", [LinkLost("no coordinator"), ResourceExhausted("busy"), Unimplemented("old")]
)
async def test_worker_without_an_answer_shows_its_own_connections(failure: Exception) -> None:
    elsewhere = connections_elsewhere(cast(LinkClient, OtherEnd(failure)), Topics(), cast(ServerState, None))
    assert await elsewhere(["s"]) == {}


async def test_worker_asks_about_the_newest_sessions() -> None:
    client = OtherEnd({})
    elsewhere = connections_elsewhere(cast(LinkClient, client), Topics(), cast(ServerState, None))
    await elsewhere([str(number) for number in range(SESSIONS + 1)])
    assert client.asked == [(OF, [str(number) for number in range(1, SESSIONS + 1)])]
