"""Topics: each event is published once and sent to every stream that subscribes.

    topic.publish(event) -> encoded once -> the last events, which all subscriptions share
                         -> subscriptions that wait are woken, some in each turn of the loop

Decides: how many events are kept for slow subscribers, and what happens to those that are slower.

Rules:
- `publish` does not wait, whatever the subscribers do.
- A subscription is a position in the shared events: a subscriber that does not read costs no memory for events.
- A topic belongs to the event loop of its subscribers. One with the scope "server" has a carrier, which takes its
  events to the other processes and brings theirs: then `missed` events are those that the carrier has lost.
- Missed events have positions too: they count as with a slow subscriber.

It must not know: credit, connections, why a subscriber is slow, how the carrier works.
"""

from __future__ import annotations

import asyncio
import typing
from bisect import bisect_left
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar

from zcproto.bus.topics import SharedTopics
from zcproto.common.value_types import ValueType
from zcproto.errors import Cancelled, InvalidArgument
from zcproto.wire.frame import MIN_LENGTH
from zcproto.wire.message import MessageError, decode_body, encode_body

KEPT_BYTES: Final = 65_536
"""Most bytes of the events that a topic keeps, with their headers."""

MOST_KEPT: Final = 1_024

SUBSCRIBERS_PER_TURN: Final = 32
"""Each makes its connection encrypt and send a record, up to 50 us of the loop."""

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    Event = TypeVarWithDefault("Event", default=Any)
else:
    Event = TypeVar("Event")

Slow = Literal["drop_oldest", "end"]
"""What happens to a subscriber that is more than `keep` events behind."""

Scope = Literal["process", "server"]
"""Whose subscribers get an event: those of the process that publishes it, or of all processes of the server."""

_UNDECODED: Final = object()
_position_of = attrgetter("position")


class TopicEvent(Generic[Event]):
    """An event of a topic. A stream that yields it sends the encoded `body`, which all subscribers share.

    `missed` are the events between the one that the subscriber got before and this one. `position` counts all
    events of the topic in this process, those that were missed too.
    """

    __slots__ = ("_topic", "_value", "body", "missed", "position")

    def __init__(
        self, topic: Topic[Event], position: int, body: bytes, value: Any = _UNDECODED, missed: int = 0
    ) -> None:
        self._topic = topic
        self._value = value
        self.position = position
        self.body = body
        self.missed = missed

    @property
    def value(self) -> Event:
        """The event. Raises InvalidArgument if another process has published one of another type."""
        if self._value is _UNDECODED:
            self._value = self._topic.type.check(decode_body(self.body), "event")
        return typing.cast("Event", self._value)

    def after(self, missed: int) -> TopicEvent[Event]:
        """Return the event for a subscriber that has missed some before it."""
        return TopicEvent(self._topic, self.position, self.body, self._value, missed) if missed else self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Allow the class in the annotation of a stream, where it stands for an event of its type."""
        return handler.generate_schema((*typing.get_args(source), Any)[0])


class Watcher:
    """The task that waits for an `until`, for all subscriptions that share it."""

    __slots__ = ("subscriptions", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.subscriptions = 0


class Topic(Generic[Event]):
    """Events of one type for any number of subscribers; made by `App.topic`.

    `published` and `dropped` count events, the latter once for each subscriber that missed one. `ended` counts the
    subscribers that were cancelled because they had missed some. `carrier` is that of the server that runs, for a
    `scope` of "server"; without one, its only process has all subscribers.
    """

    def __init__(
        self,
        name: str,
        *,
        keep: int = 16,
        slow: Slow = "drop_oldest",
        of: Any = Any,
        scope: Scope = "process",
    ) -> None:
        if not 1 <= keep <= MOST_KEPT:
            raise ValueError(f"topic {name}: keep must be from 1 to {MOST_KEPT}")
        if slow not in ("drop_oldest", "end"):
            raise ValueError(f"topic {name}: slow must be 'drop_oldest' or 'end'")
        if scope not in ("process", "server"):
            raise ValueError(f"topic {name}: scope must be 'process' or 'server'")
        self.name = name
        self.scope = scope
        self.carrier: SharedTopics | None = None
        self.ends_slow = slow == "end"
        self.published = 0
        self.dropped = 0
        self.ended = 0
        self.subscribers = 0
        try:
            self.type = ValueType(of)
        except TypeError as error:
            raise TypeError(f"topic {name}: of: {error}") from error
        self._keep = keep
        self.position = 0
        """That of the next event."""
        self._last: deque[TopicEvent[Event]] = deque()
        self._last_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # of the subscribers
        self._waiting: list[asyncio.Future[None]] = []  # no set: it takes eight times the memory
        self._woken: deque[list[asyncio.Future[None]]] = deque()  # waited when an event was published
        self._watchers: dict[asyncio.Event, Watcher] = {}

    def publish(self, value: Event) -> None:
        """Send an event to all subscribers of this process, with the scope "server" to those of all. Does not wait.

        If it raises, no subscriber gets the event: TypeError for a value of another type than the topic's,
        MessageError for one that an item cannot carry, RuntimeError outside the event loop, ResourceExhausted if
        too much waits to be sent to other processes.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None or (self.subscribers and loop is not self._loop):
            raise RuntimeError(
                f"topic {self.name}: publish in the server's event loop; "
                "other threads use loop.call_soon_threadsafe(topic.publish, event)"
            )
        try:
            checked = self.type.check(value, "event")
        except InvalidArgument as error:
            raise TypeError(f"topic {self.name}: {error.message}") from None
        body = encode_body(checked if self.type.dump is None else self.type.dump(checked))
        if MIN_LENGTH + len(body) > KEPT_BYTES:
            raise MessageError(f"the event has {len(body)} bytes; at most {KEPT_BYTES - MIN_LENGTH} fit")
        if self.carrier is not None:
            self.carrier.publish(self.name, body)
        self._add(body, value)

    def receive(self, body: bytes | None, missed: int = 0) -> None:
        """Take an event of another process, and count so many that were missed before it. None for no event."""
        self.position += missed
        if body is not None:
            self._add(body, _UNDECODED)
        elif self.subscribers:
            self._wake()

    def _add(self, body: bytes, value: Any) -> None:
        event = TopicEvent(self, self.position, body, value)
        self.published += 1
        self.position += 1
        if self.subscribers:
            self._last.append(event)
            self._last_bytes += MIN_LENGTH + len(body)
            while len(self._last) > self._keep or self._last_bytes > KEPT_BYTES:
                self._last_bytes -= MIN_LENGTH + len(self._last.popleft().body)
            self._wake()

    def subscribe(self, until: asyncio.Event | None = None) -> Subscription[Event]:
        """Return an iterator of the events from now on, to be closed by `with`. It ends when `until` is set.

        Raises RuntimeError if the topic has subscribers in another event loop.
        """
        loop = asyncio.get_running_loop()
        if self.subscribers and loop is not self._loop:
            raise RuntimeError(f"topic {self.name}: the subscribers of a topic must share one event loop")
        self._loop = loop
        self.subscribers += 1
        if self.subscribers == 1 and self.carrier is not None:
            self.carrier.follow(self.name)
        if until is not None:
            watcher = self._watchers.get(until)
            if watcher is None:
                task = loop.create_task(until.wait(), name=f"topic-{self.name}")
                task.add_done_callback(lambda task: None if task.cancelled() else self._wake())
                watcher = self._watchers[until] = Watcher(task)
            watcher.subscriptions += 1
        return Subscription(self, until)

    def leave(self, until: asyncio.Event | None) -> None:
        """Count a subscription less. Release what only it needed."""
        self.subscribers -= 1
        if until is not None:
            watcher = self._watchers[until]
            watcher.subscriptions -= 1
            if not watcher.subscriptions:
                del self._watchers[until]
                watcher.task.cancel()
        if not self.subscribers:
            if self.carrier is not None:
                self.carrier.unfollow(self.name)
            self._waiting.clear()
            self._woken.clear()
            self._last.clear()
            self._last_bytes = 0

    def next_event(self) -> asyncio.Future[None]:
        """Return a future that is done when an event came or was missed, or an `until` is set."""
        if len(self._waiting) > 2 * self.subscribers:
            self._waiting = [waiter for waiter in self._waiting if not waiter.done()]  # cancelled
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        return waiter

    def take(self, position: int) -> TopicEvent[Event] | None:
        """Return the event at a position, or the oldest one after it that is kept; None before there is one.

        Raises Cancelled if events were missed and the policy is to end.
        """
        last, event = self._last, None
        if last and last[-1].position >= position:
            event = (
                last[-1]
                if last[-1].position == position
                else last[bisect_left(last, position, key=_position_of)]
            )
        missed = (self.position if event is None else event.position) - position
        if not missed:
            return event
        if self.ends_slow:
            self.dropped += missed
            self.ended += 1
            raise Cancelled(
                f"the subscriber missed {missed} events; read faster, or subscribe again", {"reason": "slow"}
            )
        if event is None:
            return None
        self.dropped += missed
        return event.after(missed)

    def _wake(self) -> None:
        """Wake all that wait now, in the next turns of the loop."""
        if self._waiting and self._loop is not None:
            self._woken.append(self._waiting)
            self._waiting = []
            if len(self._woken) == 1:
                self._loop.call_soon(self._wake_some)

    def _wake_some(self) -> None:
        if not self._woken:  # all have left
            return
        waiters = self._woken[0]
        for _ in range(min(SUBSCRIBERS_PER_TURN, len(waiters))):
            waiter = waiters.pop()
            if not waiter.done():
                waiter.set_result(None)
        if not waiters:
            self._woken.popleft()
        if self._woken:
            asyncio.get_running_loop().call_soon(self._wake_some)


class Subscription(Generic[Event]):
    """The events of a topic for one subscriber. `missed` counts those that it did not get."""

    __slots__ = ("_position", "_topic", "_until", "missed")

    def __init__(self, topic: Topic[Event], until: asyncio.Event | None) -> None:
        self._topic = topic
        self._until = until
        self._position = topic.position
        self.missed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._topic.leave(self._until)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TopicEvent[Event]:
        topic = self._topic
        while self._position == topic.position or (event := topic.take(self._position)) is None:
            if self._until is not None and self._until.is_set():
                raise StopAsyncIteration
            await topic.next_event()
        self._position = event.position + 1
        self.missed += event.missed
        return event
