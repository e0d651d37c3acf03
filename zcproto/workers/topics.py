"""The topics of all workers: the coordinator numbers each event and sends it to the workers that follow its topic.

    worker: PUBLISH -> coordinator: EVENT -> the workers that follow the topic, and the one that published it
    worker: FOLLOW  -> coordinator: AT, the last number

Rules:
- The link is a worker's third one, of its own: the calls of sessions never wait behind events.
- For a worker that does not read, events are dropped at MAX_WAITING. It finds the gap by the numbers.
- A new coordinator has another epoch: it starts with no numbers.

It must not know: subscribers, the content of an event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from zcproto.bus.topics import INBOX, MAX_WAITING, SharedTopics
from zcproto.common.clock import Entropy
from zcproto.workers.link import NOTICE, Link, LinkClient, LinkServer, Topics, pack

FOLLOW: Final = "topics.follow"
UNFOLLOW: Final = "topics.unfollow"
PUBLISH: Final = "topics.publish"
AT: Final = "topics.at"
EVENT: Final = "topics.event"

ABSENCE_S: Final = 2.0
"""A worker that lives connects again within LONGEST_PAUSE_S of a link."""

_EPOCH_SIZE: Final = 8


@dataclass(slots=True)
class _Numbered:
    number: int = 0
    followers: dict[Link, None] = field(default_factory=dict)


class TopicHub:
    """The topics of the workers, in the coordinator, whose own topics it carries too: they have no subscribers.

    `dropped` counts events for workers that did not read.
    """

    waiting = 0
    unreadable = 0
    absence_s = 0.0

    def __init__(self, entropy: Entropy) -> None:
        self._epoch = entropy(_EPOCH_SIZE)
        self._topics: dict[str, _Numbered] = {}
        self._own: SharedTopics | None = None
        self.dropped = 0

    def serve(self, server: LinkServer) -> None:
        """Answer the workers."""
        server.topics.notices |= {FOLLOW: self._follow, UNFOLLOW: self._unfollow, PUBLISH: self._publish}
        server.on_lost.append(self._lost)

    async def start(self, topics: SharedTopics) -> None:
        self._own = topics
        topics.up()

    async def stop(self) -> None:
        self._own = None

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        self._publish(None, name, lost, body)

    def follow(self, name: str) -> None:
        """Do nothing: a process that accepts no connections has no subscribers."""

    def unfollow(self, name: str) -> None:
        """Do nothing, likewise."""

    def _topic(self, name: str) -> _Numbered:
        return self._topics.setdefault(name, _Numbered())

    def _follow(self, link: Link, name: str) -> None:
        topic = self._topic(name)
        topic.followers[link] = None
        link.notify(AT, name, self._epoch, topic.number)

    def _unfollow(self, link: Link, name: str) -> None:
        self._topic(name).followers.pop(link, None)
        self._forget_if_unused(name)

    def _lost(self, link: Link) -> None:
        for name in [*self._topics]:
            self._unfollow(link, name)

    def _forget_if_unused(self, name: str) -> None:
        if name.startswith(INBOX) and not self._topics[name].followers:
            del self._topics[name]

    def _publish(self, link: Link | None, name: str, lost: int, body: bytes | None) -> None:
        topic = self._topic(name)
        topic.number += lost + (body is not None)
        data = pack(NOTICE, EVENT, [name, self._epoch, topic.number, lost, body, False, 0])
        for follower in topic.followers:
            if follower is not link:
                if follower.waiting > MAX_WAITING:
                    self.dropped += 1
                else:
                    follower.send(data)
        if link is not None:
            own = None if body is None else b""
            link.notify(EVENT, name, self._epoch, topic.number, lost, own, True, len(topic.followers))
        elif self._own is not None:
            self._own.acknowledged(name, len(topic.followers))
        self._forget_if_unused(name)


class WorkerTopics:
    """The carrier of a worker's topics: its link to the coordinator at `path`."""

    unreadable = 0
    absence_s = ABSENCE_S

    def __init__(self, path: Path, *, name: str, silence: float, random: Callable[[], float]) -> None:
        handlers = Topics(notices={AT: self._at, EVENT: self._received})
        self._client = LinkClient(path, handlers, name=name, silence=silence, random=random)
        self.topics: SharedTopics | None = None

    async def start(self, topics: SharedTopics) -> None:
        """Connect, and stay connected."""
        self.topics = topics
        self._client.on_up.append(lambda link: topics.up())
        self._client.on_down.append(lambda link: topics.down())
        self._client.start()

    async def stop(self) -> None:
        await self._client.close()

    @property
    def waiting(self) -> int:
        return 0 if self._client.link is None else self._client.link.waiting

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        self._client.notify(PUBLISH, name, lost, body)

    def follow(self, name: str) -> None:
        self._client.notify(FOLLOW, name)

    def unfollow(self, name: str) -> None:
        self._client.notify(UNFOLLOW, name)

    def _at(self, link: Link, name: str, epoch: bytes, number: int) -> None:
        assert self.topics is not None, "it was started"
        self.topics.at(name, epoch, number)

    def _received(
        self,
        link: Link,
        name: str,
        epoch: bytes,
        number: int,
        lost: int,
        body: Any,
        is_own: bool,
        receivers: int,
    ) -> None:
        assert self.topics is not None, "it was started"
        if is_own:
            self.topics.acknowledged(name, receivers)
        self.topics.received(name, epoch, number, lost, body, is_own=is_own)
