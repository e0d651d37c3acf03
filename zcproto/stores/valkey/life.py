"""Signs of life: whether the process that claimed a request with an idempotency key is still there.

    claim -> renew h:NODE every RENEW_S -> it expires LIFE_MS after the process has ended, or lost the store

Decides: when this process renews its key, and when the claims of another one may be given away. A process whose key
is missing may still run: then its answers are stored all the same.

Must not know: claims, requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import inf
from typing import Any, Final

from zcproto.common.clock import MS_PER_SECOND
from zcproto.errors import ResourceExhausted
from zcproto.stores.base import StoreUnavailable

LIFE_MS: Final = 4_000
RENEW_S: Final = 1.0
"""How often the key is renewed: three times in a row may fail."""


class SignOfLife:
    """The key of one process. `call` sends a command whose first argument is a key, within the store's timeout."""

    def __init__(self, call: Callable[..., Awaitable[Any]], prefix: bytes, node: bytes) -> None:
        self._call = call
        self._prefix = prefix
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._trusted_at = inf

    async def begin(self) -> None:
        """Write the key, and renew it from now on. Idempotent. Raises like `call`."""
        if self._task is None:
            await self._renew()
        if self._task is None:  # nor has another claim begun it meanwhile
            self._task = asyncio.get_running_loop().create_task(self._renew_often())

    async def is_missing(self, node: bytes) -> bool:
        """Return whether a process has shown no sign of life lately."""
        return not await self._call("EXISTS", self._key(node))

    async def is_gone(self, node: bytes) -> bool:
        """Return whether a process has shown no sign of life although it had the time for one."""
        return asyncio.get_running_loop().time() >= self._trusted_at and await self.is_missing(node)

    def store_reached(self) -> None:
        """Give all processes time for a sign of life: the store was reached after a gap."""
        self._trusted_at = asyncio.get_running_loop().time() + LIFE_MS / MS_PER_SECOND

    async def end(self) -> None:
        """Renew the key no more. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _renew(self) -> None:
        await self._call("SET", self._key(self._node), b"", "PX", LIFE_MS)

    async def _renew_often(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(StoreUnavailable, ResourceExhausted):  # tried again after RENEW_S
                await self._renew()

    def _key(self, node: bytes) -> bytes:
        return self._prefix + b"h:" + node
