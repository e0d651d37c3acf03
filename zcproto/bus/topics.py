"""The topics of one process whose events go to all processes (sans-IO).

    topic.publish -> SharedTopics.publish -> carrier -> `received` in each process, in the publisher's too
                                                     -> topic.receive, with the number of missed events

Decides: which events count as missed.

Rules:
- The carrier numbers the events of a topic. A process that follows a topic has missed the numbers between two
  events that it gets, and those since the last one when it follows the topic again.
- Numbers begin again with another `epoch`, after the carrier has lost its state.
- While the carrier is away, an event goes to the subscribers of its own process, and counts as lost for all others.
  So does one that was sent, but not seen again, before a carrier was lost: it may have reached some.
- A process publishes a bounded number of events, and of bytes, a second; and so many bytes wait to be sent.

It must not know: sockets, subscribers, the content of an event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from zcproto.common.rates import TokenBucket
from zcproto.errors import ResourceExhausted

EVENTS_PER_S: Final = 10_000
BYTES_PER_S: Final = 32 << 20
"""What one process publishes in topics of all processes, on average over the burst of the bucket."""

MAX_WAITING: Final = 8 << 20
"""Bytes that wait for a carrier, or for a process that does not read what the carrier brings."""

INBOX: Final = "zcproto:inbox:"
"""The topics that only one process follows have this prefix: what is known of one ends with that process."""

_RETRY_MS: Final = 100


OnSent = Callable[[int], object]
"""Called with the number of processes that got an event, the own one included. Not called if it is unknown."""


class SharedTopic(Protocol):
    """A topic of this process."""

    name: str
    carrier: SharedTopics | None

    def receive(self, body: bytes | None, missed: int = 0) -> None: ...


class Carrier(Protocol):
    """Takes events to the other processes. It calls `up`, `down`, `at`, `received`, `acknowledged`, `failed`."""

    async def start(self, topics: SharedTopics) -> None:
        """Connect, and stay connected. Does not wait for the other processes."""

    async def stop(self) -> None: ...

    absence_s: float
    """Seconds after which a process that does not follow its own topic has ended, and is not connecting again."""
    unreadable: int
    """Events that came and could not be opened."""

    @property
    def waiting(self) -> int:
        """The bytes that were published and are not sent yet."""

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        """Number so many events that were lost, and then this one; None for none."""

    def follow(self, name: str) -> None:
        """Have `at` called with the last number of a topic, then `received` for each event."""

    def unfollow(self, name: str) -> None: ...


@dataclass(slots=True)
class _State:
    """What is known of a topic. `lost` are the own events that others miss, `sent` the numbers that each message
    takes which did not come back yet.

    `number` is that of the last event, if the topic `is_followed` and was once in this `epoch`.
    """

    topic: SharedTopic
    is_followed: bool = False
    epoch: bytes | None = None
    number: int = 0
    sent: deque[tuple[int, OnSent | None]] = field(default_factory=deque)
    lost: int = 0


class SharedTopics:
    """The topics of one process that have a `carrier`. `now` returns monotonic seconds.

    `refused` counts events that were not published because of a limit, `lost` those that other processes missed
    because the carrier was away, and `missed` those of other processes that this one has missed.
    """

    def __init__(self, carrier: Carrier, now: Callable[[], float]) -> None:
        self._carrier = carrier
        self._now = now
        self._states: dict[str, _State] = {}
        self._events = TokenBucket(EVENTS_PER_S)
        self._bytes = TokenBucket(BYTES_PER_S)
        self._is_started = False
        self.is_up = False
        self.on_followed: Callable[[str], object] = lambda name: None
        """Called with a topic whose events come from now on."""
        self.on_down: Callable[[], object] = lambda: None
        self.refused = 0
        self.lost = 0
        self.missed = 0

    def undelivered(self) -> dict[str, int]:
        """Return the events that processes did not get, by reason."""
        return {
            "lost": self.lost,
            "missed": self.missed,
            "unreadable": self._carrier.unreadable,
            "refused": self.refused,
        }

    async def start(self) -> None:
        """Let the carrier connect. Idempotent."""
        if not self._is_started:
            self._is_started = True
            await self._carrier.start(self)

    async def stop(self) -> None:
        """Disconnect. Events go to the subscribers of this process alone."""
        for state in self._states.values():
            state.topic.carrier = None
        await self._carrier.stop()
        self.is_up = False

    @property
    def is_away(self) -> bool:
        """Whether the other processes cannot be reached. False before `start`."""
        return self._is_started and not self.is_up

    @property
    def is_used(self) -> bool:
        """Whether there are topics."""
        return bool(self._states)

    def add(self, topic: SharedTopic) -> None:
        """Join a topic with those of the same name in the other processes."""
        self._states[topic.name] = _State(topic)
        topic.carrier = self

    def remove(self, name: str) -> None:
        """Forget a topic that this process does not follow."""
        self._states.pop(name, None)

    # --- from topics -----------------------------------------------------------------------------------

    @property
    def absence_s(self) -> float:
        return self._carrier.absence_s

    def publish(self, name: str, body: bytes, on_sent: OnSent | None = None) -> None:
        """Send an event to the other processes. Raises ResourceExhausted, without an effect, at a limit."""
        now, state = self._now(), self._states[name]
        if not self.is_up:
            state.lost += 1
            self.lost += 1
            return
        is_full = self._carrier.waiting + len(body) > MAX_WAITING or self._bytes.debt_s(now, len(body)) > 0
        if is_full or not self._events.admit(now):
            self.refused += 1
            raise ResourceExhausted(
                f"topic {name}: too many events for the other processes; publish fewer",
                {"retry_after_ms": _RETRY_MS},
            )
        self._bytes.charge(len(body), now)
        self._send(state, body, on_sent)

    def follows(self, name: str) -> bool:
        """Return whether a topic has subscribers in this process."""
        state = self._states.get(name)
        return state is not None and state.is_followed

    def follow(self, name: str) -> None:
        state = self._states[name]
        state.is_followed, state.epoch = True, None  # what came before has no subscriber
        if self.is_up:
            self._carrier.follow(name)

    def unfollow(self, name: str) -> None:
        self._states[name].is_followed = False
        if self.is_up:
            self._carrier.unfollow(name)

    def _send(self, state: _State, body: bytes | None, on_sent: OnSent | None = None) -> None:
        lost, state.lost = state.lost, 0
        state.sent.append((lost + (body is not None), on_sent))
        self._carrier.publish(state.topic.name, lost, body)

    # --- from the carrier ------------------------------------------------------------------------------

    def up(self) -> None:
        """The carrier is there: follow the topics that have subscribers, and number what was lost meanwhile."""
        self.is_up = True
        for name, state in self._states.items():
            if state.is_followed:
                self._carrier.follow(name)
            if state.lost:
                self._send(state, None)

    def down(self) -> None:
        """The carrier is away."""
        self.is_up = False
        for state in self._states.values():
            lost = sum(numbers for numbers, _ in state.sent)
            state.lost += lost
            self.lost += lost
            state.sent.clear()
        self.on_down()

    def at(self, name: str, epoch: bytes, number: int) -> None:
        """Take the last number of a topic that is followed from now on."""
        state = self._states.get(name)
        if state is not None and state.is_followed:
            if state.epoch is not None:
                self._miss(state, number if epoch != state.epoch else number - state.number)
            state.epoch, state.number = epoch, number
            self.on_followed(name)

    def received(
        self, name: str, epoch: bytes, number: int, lost: int, body: bytes | None, *, is_own: bool
    ) -> None:
        """Take an event of a topic, its number, and how many were lost just before it; None for no event."""
        state = self._states.get(name)
        if state is None or not state.is_followed:
            return
        previous = number - lost - (body is not None)
        missed = 0
        if state.epoch is not None:  # else the topic is followed from this event on
            missed = max(0, previous - (state.number if epoch == state.epoch else 0))
        state.epoch, state.number = epoch, number
        if is_own:  # the subscribers of this process have the event, and those that others lost
            self._miss(state, missed)
        else:
            self.missed += missed + lost
            state.topic.receive(body, missed + lost)

    def acknowledged(self, name: str, receivers: int) -> None:
        """The carrier has numbered the first message of a topic that was not acknowledged yet, and sent it."""
        state = self._states.get(name)
        if state is not None and state.sent:
            _, on_sent = state.sent.popleft()
            if on_sent is not None:
                on_sent(receivers)

    def failed(self, name: str) -> None:
        """The carrier has not published the first message of a topic that was not acknowledged yet."""
        state = self._states.get(name)
        if state is not None and state.sent:
            lost, _ = state.sent.popleft()
            state.lost += lost
            self.lost += lost

    def _miss(self, state: _State, missed: int) -> None:
        if missed > 0:
            self.missed += missed
            state.topic.receive(None, missed)
