"""A circuit breaker around a session store: during an outage operations fail at once instead of waiting.

What this file decides: that each operation ends within the store's timeout. Whether the store may be called is
decided by StoreHealth.

It must not know: what an operation is for, what is done about an outage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from zcproto.errors import Unavailable
from zcproto.observe.histogram import WAITED_S, Histogram
from zcproto.sessions.health import StoreHealth
from zcproto.stores.base import SessionStore, StoreUnavailable

T = TypeVar("T")


class Call(Protocol):
    """The type of `CircuitBreaker.call` and `CircuitBreaker.attempt`."""

    def __call__(self, operation: Coroutine[Any, Any, T], /) -> Coroutine[Any, Any, T]: ...


@dataclass(eq=False)
class CircuitBreaker:
    """Runs operations of `store` while its health allows them: `await breaker.call(breaker.store.find(digest))`.

    `timeout` is in seconds; `now` returns monotonic seconds. `reason` is the store's last failure. `in_flight`
    counts the operations that run now, `durations` how long the finished ones took.
    """

    store: SessionStore
    health: StoreHealth
    timeout: float
    now: Callable[[], float]
    reason: str = field(default="", init=False)
    in_flight: int = field(default=0, init=False)
    durations: Histogram = field(default_factory=partial(Histogram, WAITED_S), init=False)

    def check(self) -> None:
        """Raise Unavailable if the store is not called now."""
        if not self.health.is_healthy:
            raise self.unavailable()

    def unavailable(self) -> Unavailable:
        """Return the error for callers who need the store."""
        return Unavailable(
            "the session store does not answer: try again",
            {"retry_after_ms": self.health.retry_after_ms(self.now())},
        )

    async def call(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation and return its result. Raises StoreUnavailable."""
        if not self.health.is_healthy:
            operation.close()
            raise StoreUnavailable("it is out; calls are suspended until a probe succeeds")
        began = self.now()
        self.in_flight += 1
        try:
            return await self.attempt(operation)
        except StoreUnavailable as error:
            self.reason = error.reason
            now = self.now()
            self.health.failed(now, now - began)
            raise
        finally:
            self.in_flight -= 1
            self.durations.add(self.now() - began)

    async def attempt(self, operation: Awaitable[T], within: float | None = None) -> T:
        """Run an operation whatever the health, for probes. The outcome is not counted."""
        limit = self.timeout if within is None else within
        try:
            async with asyncio.timeout(limit):
                return await operation
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {limit * 1000:.0f} ms") from None
