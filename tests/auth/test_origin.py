"""Tests of the origin of sessions: which changes of users and devices it detects."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.auth.helpers import directory
from zcproto.auth import UserFile
from zcproto.auth.devices import DeviceFile
from zcproto.auth.directory import Origins
from zcproto.common.roles import OPERATORS
from zcproto.sessions.record import NO_ORIGIN, ORIGIN_SIZE

ADDED = datetime(2026, 1, 1, tzinfo=UTC)
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
OTHER = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
PHONE = "device:phone"


class Files:
    """The files of a home folder, changed by another process, and the origins of a server."""

    def __init__(self, folder: Path) -> None:
        self._paths = folder / "users.toml", folder / "devices.toml"
        self.users.add("ada", roles=frozenset({"billing"}))
        self.users.add("bob")
        self.devices.add("phone", "ada", PUBLIC, ADDED)
        self.origins = Origins(directory(self.users), directory(self.devices))

    @property
    def users(self) -> UserFile:
        users = UserFile(self._paths[0])
        users.load()
        return users

    @property
    def devices(self) -> DeviceFile:
        devices = DeviceFile(self._paths[1])
        devices.load()
        return devices

    async def read(self) -> None:
        await self.origins.users.refresh()
        await self.origins.devices.refresh()

    def replace_device(self, name: str, public_key: bytes = OTHER) -> None:
        self.devices.remove(name)
        self.devices.add(name, "ada", public_key, ADDED)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_origin_differs_by_user_and_device(files: Files) -> None:
    files.devices.add("laptop", "ada", OTHER, ADDED)
    origins = Origins(directory(files.users), directory(files.devices))
    found = {
        origins.of(*each) for each in (("ada", ""), ("bob", ""), ("ada", PHONE), ("ada", "device:laptop"))
    }
    assert len(found) == 4
    assert {len(each) for each in found} == {ORIGIN_SIZE}
    assert NO_ORIGIN not in found
    assert origins.of("ada", "tls:" + 64 * "a") == origins.of("ada", "")  # its proof names the key
    assert origins.of("eve", "") == origins.of("ada", "device:none") == NO_ORIGIN


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        (lambda files: files.users.new_key("ada"), {"", PHONE}),
        (lambda files: files.users.set_roles("ada", OPERATORS), {"", PHONE}),
        (lambda files: files.users.remove("ada"), {"", PHONE}),
        (lambda files: files.replace_device("phone"), {PHONE}),
        (lambda files: files.devices.remove("phone"), {PHONE}),
        (lambda files: files.devices.set_roles("phone", frozenset({"billing"})), {PHONE}),
        (lambda files: files.replace_device("phone", PUBLIC), set()),
        (lambda files: files.users.new_key("bob"), set()),
    ],
    ids=[
        "key",
        "roles",
        "removed",
        "device key",
        "device removed",
        "device roles",
        "same device",
        "other user",
    ],
)
async def test_change_ends_the_sessions_that_it_concerns(
    files: Files, change: Callable[[Files], None], ended: set[str]
) -> None:
    opened = {key: files.origins.of("ada", key) for key in ("", PHONE)}
    assert all(files.origins.applies("ada", *each) for each in opened.items())
    change(files)
    assert all(files.origins.applies("ada", *each) for each in opened.items()), "not read yet"
    await files.read()
    assert {each[0] for each in opened.items() if not files.origins.applies("ada", *each)} == ended
