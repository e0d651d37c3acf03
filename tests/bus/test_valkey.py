"""Topics of several servers over real Valkey and Redis servers, alone and as a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgpack
import pytest
from redis.crc import key_slot

from tests.helpers import until
from tests.limits import TIMEOUT
from tests.stores.valkey.helpers import ClusterOf, url_of
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, running
from zcproto.app.topics import Subscription, Topic
from zcproto.bus.sealing import Opener, Sealer
from zcproto.bus.topics import SharedTopics
from zcproto.bus.valkey import ValkeyTopics
from zcproto.common.clock import system_clock, system_entropy
from zcproto.stores.valkey.store import ValkeyStore

KEYS = (bytes(32),)


class Node:
    """A server: its topic, and a subscriber of it. `got` are the events of the subscriber."""

    def __init__(self, url: str, *, keys: tuple[bytes, ...] = KEYS, keep: int = 1024) -> None:
        store = ValkeyStore(url, timeout=TIMEOUT)
        self.carrier = ValkeyTopics(
            *(store.make_servers, b"zcp:", Sealer(keys, system_entropy), Opener(keys)),
            *(system_entropy, TIMEOUT),
        )
        self.topics = SharedTopics(self.carrier, system_clock.now)
        self.topic = Topic("news", scope="server", keep=keep)
        self.topics.add(self.topic)
        self.events: Subscription | None = None
        self.got: list[object] = []
        self._reading: asyncio.Task[None] | None = None

    async def _read(self) -> None:
        assert self.events is not None
        async for event in self.events:
            self.got.append(event.value)

    def subscribe(self) -> None:
        self.events = self.topic.subscribe()
        self._reading = asyncio.create_task(self._read())

    @property
    def missed(self) -> int:
        assert self.events is not None
        return self.events.missed

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        await self.topics.stop()


@asynccontextmanager
async def nodes(url: str, count: int = 2) -> AsyncIterator[list[Node]]:
    """Run servers that have each seen an event of each."""
    async with AsyncExitStack() as stack:
        found = [Node(url) for _ in range(count)]
        for node in found:
            node.subscribe()
            await node.topics.start()
            stack.push_async_callback(node.close)
        await all_connected(found)
        yield found


async def all_connected(found: list[Node]) -> None:
    """Publish until each server gets the events of each, then forget them."""
    for publisher in found:

        def all_got(publisher: Node = publisher) -> bool:
            publisher.topic.publish(id(publisher))
            return all(id(publisher) in node.got for node in found)

        await until(all_got)
        publisher.topic.publish(-id(publisher))  # after all others of this publisher
    await until(lambda: all(-id(publisher) in node.got for node in found for publisher in found))
    for node in found:
        node.got.clear()
        assert node.events is not None
        node.events.missed = 0


async def test_events_reach_all_servers_once_and_in_order(server: ServerProcess) -> None:
    async with nodes(url_of(server), 3) as (first, second, third):
        for number in range(500):
            first.topic.publish(number)
            if not number % 50:
                await asyncio.sleep(0)
        second.topic.publish("end")
        await until(
            lambda: all("end" in node.got and len(node.got) == 501 for node in (first, second, third))
        )
        for node in (second, third):
            assert [event for event in node.got if event != "end"] == list(range(500))
        assert [node.missed for node in (first, second, third)] == [0, 0, 0]


async def test_bodies_are_sealed_and_the_number_is_all_that_is_kept(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        first.topic.publish("very secret")
        await until(lambda: "very secret" in second.got)
        assert server.command("KEYS", "zcp:e:*") == [b"zcp:e:{news}"]
        assert set(server.command("HKEYS", "zcp:e:{news}")) == {b"e", b"n"}
        assert server.command("PTTL", "zcp:e:{news}") > 0
        subscribed = "SPUBLISH" if "cluster" in url_of(server) else "PUBLISH"
        forged = msgpack.packb([b"x", 1, 0, b"sender", b"very secret"])
        server.command(subscribed, "zcp:e:{news}", forged)
        server.command(subscribed, "zcp:e:{news}", b"\xc1")
        await until(lambda: second.carrier.unreadable == 2)
        assert second.got == ["very secret"]


async def test_server_with_another_key_counts_events_as_missed(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, _):
        stranger = Node(url_of(server), keys=(b"x" * 32,))
        stranger.subscribe()
        await stranger.topics.start()
        try:

            def has_seen() -> bool:
                first.topic.publish("a")
                return stranger.carrier.unreadable > 1

            await until(has_seen)
            assert stranger.got == []
            assert stranger.topics.missed >= stranger.carrier.unreadable
        finally:
            await stranger.close()


async def test_lost_connection_is_made_again_and_the_gap_is_reported(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: not (first.topics.is_up and second.topics.is_up))
        sent = 0

        def arrives() -> bool:
            nonlocal sent
            first.topic.publish(sent)
            sent += 1
            return bool(second.got)

        await until(arrives)
        await until(lambda: second.got[-1:] == [sent - 1])
        assert len(second.got) + second.missed >= sent
        assert second.got == sorted(set(second.got), key=int)  # type: ignore[call-overload]
        assert first.got == list(range(sent))


async def test_flushed_server_begins_with_other_numbers(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        assert server.command("FLUSHALL") == b"OK"
        first.topic.publish("a")
        await until(lambda: second.got == ["a"])
        assert second.missed == 0


async def test_scripts_that_were_flushed_are_sent_again(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        server.command("SCRIPT", "FLUSH")
        first.topic.publish("a")
        await until(lambda: second.got == ["a"])


async def test_refused_script_is_reported_with_the_next_event(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        server.command("SET", "zcp:e:{news}", "of another type")
        lost = first.topics.lost
        first.topic.publish("lost")
        await until(lambda: first.topics.lost == lost + 1)
        server.command("DEL", "zcp:e:{news}")
        first.topic.publish("a")
        await until(lambda: second.got == ["a"])
        assert second.missed == 1


async def test_topic_without_subscribers_is_not_received(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        second.topic.leave(None)
        channels = "SHARDNUMSUB" if "cluster" in url_of(server) else "NUMSUB"
        await until(lambda: server.command("PUBSUB", channels, "zcp:e:{news}")[1] == 1)
        published = second.topic.published
        first.topic.publish("a")
        second.topic.publish("b")
        await until(lambda: first.got == ["a", "b"])
        assert second.topic.published == published + 1


@pytest.mark.parametrize("program", PROGRAMS)
async def test_server_that_starts_later_is_found(program: str, tmp_path: object) -> None:
    folder = tmp_path
    with running(program, folder) as server:  # type: ignore[arg-type]
        server.kill()
        node, other = Node(server.url), Node(server.url)
        for each in (node, other):
            each.subscribe()
            await each.topics.start()
        try:
            node.topic.publish("before")
            assert node.topics.lost == 1
            server.start()
            await all_connected([node, other])
        finally:
            await node.close()
            await other.close()


@pytest.mark.parametrize("program", PROGRAMS)
async def test_user_without_permission_is_reported(program: str, tmp_path: object) -> None:
    with running(program, tmp_path) as server:  # type: ignore[arg-type]
        server.command("ACL", "SETUSER", "zc", "on", ">secret", "~*", "+@all", "resetchannels")
        node = Node(f"redis://zc:secret@{server.address}")
        await node.topics.start()
        try:
            await asyncio.sleep(0)
            node.topic.publish("a")
            assert not node.topics.is_up
        finally:
            await node.close()


async def test_slot_that_moves_loses_no_event_without_a_report(cluster: ClusterOf) -> None:
    slot = key_slot(b"zcp:e:{news}")
    async with nodes(cluster.url) as (first, second):
        source = cluster.owner(slot)
        sink = (source + 1) % 3
        sent = 0

        async def publish(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                first.topic.publish(sent)
                sent += 1
                await asyncio.sleep(0)

        await publish(20)
        cluster.begin_move(slot, source, sink)
        await publish(20)
        cluster.move_keys(slot, source, sink)
        cluster.end_move(slot, sink)

        def arrives() -> bool:
            nonlocal sent
            first.topic.publish(sent)
            sent += 1
            return sent - 1 in second.got or sent - 2 in second.got

        await until(arrives)
        await until(lambda: second.got[-1:] == [sent - 1])
        assert second.got == sorted(set(second.got), key=int)  # type: ignore[call-overload]
        assert len(second.got) + second.missed >= sent
        cluster.begin_move(slot, sink, source)
        cluster.move_keys(slot, sink, source)
        cluster.end_move(slot, source)
