"""Provide the keys of an issuer of tokens: fetched, cached, rotated.

Decides: when keys are fetched, and how long old ones serve.

Rules:
- Keys are fetched when they are first needed, and then once in `refresh_s` in the background. Concurrent logins
  share one fetch.
- An unknown key id fetches them too, but not within `min_interval_s` of the last attempt: tokens with invented key
  ids cannot make the server ask more often.
- While the provider does not answer, the last keys serve for `stale_s`. Without any, logins are undecided
  (Unavailable), and not counted as failed.

Must not know: tokens, HTTP, what a key is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from zcproto.auth.jwt import IssuerKey
from zcproto.errors import Unavailable


class KeysFailed(Exception):
    """The keys cannot be fetched. `str()` is the reason in a sentence."""


class KeyEvents(Protocol):
    """Called when keys were loaded after a failure or are others than before, when an outage begins, and when the
    last keys have become too old in it."""

    def loaded(self, keys: Sequence[IssuerKey]) -> None: ...
    def failed(self, reason: str, can_serve: bool) -> None: ...


@dataclass(eq=False, slots=True, kw_only=True)
class IssuerKeys:
    """The keys of one issuer. `fetch` returns them, or raises KeysFailed; `now` is monotonic seconds.

    Counters for operators: how often keys were `fetched`, and `failures`. `is_failing`: whether the last fetch has
    failed.
    """

    fetch: Callable[[], Awaitable[list[IssuerKey]]]
    now: Callable[[], float]
    events: KeyEvents
    refresh_s: float
    min_interval_s: float
    stale_s: float
    fetched: int = 0
    failures: int = 0
    is_failing: bool = False
    _keys: list[IssuerKey] = field(default_factory=list)
    _fetched_at: float | None = None
    _tried_at: float | None = None
    _could_serve: bool = True  # at the last report of a failure
    _fetching: asyncio.Task[None] | None = None

    async def find(self, choose: Callable[[Sequence[IssuerKey]], list[IssuerKey]]) -> list[IssuerKey]:
        """Return the keys that `choose` returns, fetched again if it returns an empty list. Raises Unavailable."""
        age = self.age()
        found = choose(self._keys) if self.can_serve else []
        if not found or age is None or age >= self.refresh_s:
            fetching = self._begin()
            if fetching is not None and not found:
                await asyncio.shield(fetching)
                found = choose(self._keys)
            if not self.can_serve:
                raise Unavailable(
                    "the identity provider does not answer; try again",
                    {"retry_after_ms": round(self.min_interval_s * 1000)},
                )
        return found

    def age(self) -> float | None:
        """Return the seconds since the keys were fetched; None without any."""
        return None if self._fetched_at is None else self.now() - self._fetched_at

    @property
    def can_serve(self) -> bool:
        """Whether there are keys that are not too old."""
        age = self.age()
        return age is not None and age < self.stale_s

    def _begin(self) -> asyncio.Task[None] | None:
        """Return the fetch that is running or may begin now."""
        if self._fetching is None:
            now = self.now()
            if self._tried_at is not None and now < self._tried_at + self.min_interval_s:
                return None
            self._tried_at = now
            self._fetching = asyncio.get_running_loop().create_task(self._fetch(), name="zcproto-keys")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            keys = await self.fetch()
        except KeysFailed as error:
            self.failures += 1
            if not self.is_failing or self._could_serve != self.can_serve:
                self.is_failing, self._could_serve = True, self.can_serve
                self.events.failed(str(error), self._could_serve)
        else:
            self.fetched += 1
            is_changed = self.is_failing or {key.kid for key in keys} != {key.kid for key in self._keys}
            self._keys, self._fetched_at, self.is_failing = keys, self.now(), False
            if is_changed:
                self.events.loaded(keys)
        finally:
            self._fetching = None
