"""The sentinels of a service: which server is its primary now.

Decides: which sentinel's answer counts.

Rules:
- All sentinels are asked. The answer with the highest configuration epoch counts: a sentinel that was cut off
  reports the primary of an earlier one.
- `GET-MASTER-ADDR-BY-NAME` reports the new primary as soon as it is promoted, before `+switch-master` is published.
  The old primary calls itself a primary for about ten more seconds (WATCH_ROLE in spec/store.pml).
- Connections to sentinels are kept, because the question is repeated at every heartbeat.

It must not know: what is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import ResponseError

from zcproto.errors import ConfigError
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.valkey.link import Link, Target
from zcproto.stores.valkey.url import Address

_PATIENCE: Final = 0.25
"""The part of the time limit given to sentinels that have not answered while others have."""


class Sentinels:
    """The sentinels at `addresses`, which monitor `service`. `within` is in seconds, for all answers."""

    def __init__(
        self, addresses: tuple[Address, ...], service: str, target: Callable[[Address], Target], within: float
    ) -> None:
        self._addresses = addresses
        self._service = service
        self._target = target
        self._patience = within * _PATIENCE
        self._links: dict[Address, Link] = {}
        self._lock = asyncio.Lock()

    async def primary(self) -> Target:
        """Return the current primary, without a time limit. Raises StoreUnavailable or ConfigError."""
        async with self._lock:
            tasks = [asyncio.ensure_future(self._ask(address)) for address in self._addresses]
            try:
                done, left = await asyncio.wait(tasks, timeout=self._patience)
                while left and all(task.exception() is not None for task in done):
                    more, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    done |= more
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        answers = [task.result() for task in tasks if task in done and task.exception() is None]
        if answers:
            return self._target(max(answers, key=lambda answer: answer[0])[1])
        errors = [task.exception() for task in tasks]
        error = next((error for error in errors if isinstance(error, ConfigError)), errors[0])
        assert error is not None
        raise error

    async def close(self) -> None:
        async with self._lock:
            links, self._links = list(self._links.values()), {}
            await asyncio.gather(*(link.close() for link in links))

    async def _ask(self, address: Address) -> tuple[int, Address]:
        """Return the configuration epoch and the primary that one sentinel reports."""
        target = self._target(address)
        target.database = 0
        link = self._links.get(address)
        if link is not None and not link.lost:
            return await self._query(link, target)
        try:
            return await self._connect(Target(target.host, target.port, tls=target.tls), address)
        except (ConfigError, ResponseError):  # it requires a login
            return await self._connect(target, address)

    async def _connect(self, target: Target, address: Address) -> tuple[int, Address]:
        link = await Link.connect(target, self._patience)
        try:
            answer = await self._query(link, target)
        except BaseException:
            await link.close()
            raise
        self._links[address] = link
        return answer

    async def _query(self, link: Link, target: Target) -> tuple[int, Address]:
        found: Any
        about: Any
        found, about = await asyncio.gather(
            link.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service),
            link.call("SENTINEL", "MASTER", self._service),
            return_exceptions=True,
        )
        if isinstance(found, BaseException):
            raise found
        if not found:
            raise StoreUnavailable(f"the sentinel {target} does not monitor a service of this name")
        # Without permission for the second command, the answers of the other sentinels are preferred.
        epoch = -1 if isinstance(about, BaseException) else int(about[b"config-epoch"])
        host, port = found
        return epoch, (host.decode("utf-8", "replace"), int(port))
