"""End the sessions of users and devices that are gone once, although every worker watches their files.

    worker: Directory.watch -> report_gone -> the coordinator: Directory.report_gone

The coordinator watches the files too. It would miss a change made while it is being replaced, so the workers report
each change until its sessions have ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.auth import DeviceFile, RegisteredDevice, User
from zcproto.auth.users import NO_KEY
from zcproto.workers.link import LinkClient

GONE: Final = "auth.gone"
WITHIN_S: Final = 5.0
_UNKNOWN: Final = datetime(1970, 1, 1, tzinfo=UTC)


async def report_gone(client: LinkClient, kind: str, name: str, user: str) -> None:
    """Report a user or a device of a user. Returns when the sessions have ended."""
    await client.call(GONE, kind, name, user, within=WITHIN_S)


def gone_calls(parts: Parts) -> dict[str, Callable[..., Awaitable[Any]]]:
    """Return the handlers of calls of the process that ends sessions, by topic."""
    return {GONE: partial(_end_reported, parts)}


async def _end_reported(parts: Parts, link: object, kind: str, name: str, user: str) -> None:
    if kind == DeviceFile.kind:
        if parts.devices is not None:
            await parts.devices.report_gone(name, RegisteredDevice(user, b"", _UNKNOWN))
    elif parts.users is not None:
        await parts.users.report_gone(name, User(NO_KEY))
