"""Logins and pairing with a throttle that must be awaited, because another process counts the failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.auth.helpers import directory
from tests.auth.test_directory import PUBLIC_KEY
from zcproto.auth import DeviceFile, Enrollment, Identity, Login, PairingFile, Throttle, UserFile
from zcproto.auth.identity import NO_CHANNEL, Channel
from zcproto.errors import ResourceExhausted, Unauthenticated

HOME = "192.0.2.1"
FREE = 3
NOW = 1_000.0


class AwaitedThrottle(Throttle):
    """Counts as its base does, a turn of the loop later."""

    def check(self, user: str, address: str, now: float) -> Awaitable[int]:  # type: ignore[override]
        async def checked() -> int:
            await asyncio.sleep(0)
            return Throttle.check(self, user, address, now)

        return checked()

    def failed(self, user: str, address: str, now: float) -> Awaitable[None]:  # type: ignore[override]
        async def counted() -> None:
            await asyncio.sleep(0)
            Throttle.failed(self, user, address, now)

        return counted()


@pytest.fixture
def throttle() -> AwaitedThrottle:
    return AwaitedThrottle(FREE)


class Own:
    scheme = "own"

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def authenticate(self, params: Any, address: str, channel: Channel = NO_CHANNEL) -> Any:
        found = Identity(params["user"]) if params["right"] else None
        if not self.waits:
            return found

        async def later() -> Identity | None:
            await asyncio.sleep(0)
            return found

        return later()


@pytest.mark.parametrize("waits", [False, True])
async def test_login_is_refused_once_failures_are_counted(throttle: AwaitedThrottle, waits: bool) -> None:
    login = Login([Own(waits)], throttle)

    async def log_in(right: bool, now: float = NOW) -> Identity:
        answer = login.open({"scheme": "own", "user": "ada", "right": right}, HOME, now)
        return answer if isinstance(answer, Identity) else await answer

    for _ in range(FREE):
        with pytest.raises(Unauthenticated):
            await log_in(False)
    with pytest.raises(ResourceExhausted) as refused:
        await log_in(True)
    assert refused.value.details == {"retry_after_ms": 1_000}
    assert (await log_in(True, NOW + 1)).user == "ada"
    assert login.throttled == 1


async def test_attached_session_is_refused_once_failures_are_counted(throttle: AwaitedThrottle) -> None:
    login = Login([Own(False)], throttle)

    def attach() -> Any:
        return login.attach("device:a", "ada", b"", b"", HOME, NOW, NO_CHANNEL)

    for _ in range(FREE):
        with pytest.raises(Unauthenticated):
            await attach()
    with pytest.raises(ResourceExhausted):
        await attach()


async def test_pairing_code_is_refused_once_failures_are_counted(
    throttle: AwaitedThrottle, tmp_path: Path
) -> None:
    users = UserFile(tmp_path / "users.toml")
    users.add("ada")
    enrollment = Enrollment(
        PairingFile(tmp_path / "pairing.toml"),
        DeviceFile(tmp_path / "devices.toml"),
        directory(users),
        throttle,
    )
    wall = int(datetime.now(UTC).timestamp() * 1000)

    async def try_code() -> None:
        await enrollment.enroll("AAAA-AAAA", PUBLIC_KEY, "laptop", address=HOME, wall=wall, now=NOW)

    for _ in range(FREE):
        with pytest.raises(Unauthenticated):
            await try_code()
    with pytest.raises(ResourceExhausted):
        await try_code()
