"""The file of devices: read whole or not at all, written in one step; and those that are gone from it."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import tomli
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.auth.helpers import write
from zcproto.auth import CurrentDevices, Device, DeviceFile
from zcproto.auth.devices import gone_between
from zcproto.errors import AlreadyExists, ConfigError, NotFound
from zcproto.sessions import token_text

ADDED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEYS = [
    Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key().public_bytes_raw() for n in range(5)
]
KEY = token_text(KEYS[0])
ENTRY = f'user = "ada"\npublic_key = "{KEY}"\nadded = 2026-01-02T03:04:05Z\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "devices.toml"


@pytest.fixture
def devices(path: Path) -> DeviceFile:
    return DeviceFile(path)


def add(devices: DeviceFile, name: str, user: str = "ada", key: bytes = KEYS[0]) -> None:
    devices.add(name, user, key, ADDED)


# Writing


def test_a_device_is_in_the_file_and_found_after_reading(path: Path, devices: DeviceFile) -> None:
    add(devices, "laptop")
    document = tomli.loads(path.read_text())
    assert document == {"devices": {"laptop": {"user": "ada", "public_key": KEY, "added": ADDED}}}
    assert devices.find("laptop") is None  # it is seen by reading, whoever wrote it
    devices.load()
    assert devices.find("laptop") == Device("ada", KEYS[0], ADDED)
    assert (len(devices), devices.names(), repr(devices)) == (1, ["laptop"], f"DeviceFile({str(path)!r})")


def test_file_and_folder_are_for_the_owner_alone(path: Path, devices: DeviceFile) -> None:
    old = os.umask(0)
    try:
        add(devices, "laptop")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_name_is_of_one_device_whoevers_it_is(path: Path, devices: DeviceFile) -> None:
    add(devices, "laptop")
    before = path.read_bytes()
    with pytest.raises(AlreadyExists, match='there is a device "laptop" already; choose another name'):
        add(devices, "laptop", "bob", KEYS[1])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "user", "key"),
    [
        ("", "ada", KEYS[0]),
        (" x", "ada", KEYS[0]),
        ("x" * 129, "ada", KEYS[0]),
        ("a\nb", "ada", KEYS[0]),
        ("x", "a\x1b[31m", KEYS[0]),
        ("x", "ada", bytes(32)),
        ("x", "ada", KEYS[0][:31]),
        ("x", "ada", KEYS[0] + b"x"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    path: Path, devices: DeviceFile, name: str, user: str, key: bytes
) -> None:
    with pytest.raises(ConfigError) as caught:
        add(devices, name, user, key)
    assert str(caught.value).isprintable()
    assert not path.exists()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=20), user=st.text(min_size=1, max_size=20))
def test_any_names_are_kept_exactly_or_refused(tmp_path: Path, name: str, user: str) -> None:
    devices = DeviceFile(tmp_path / "any" / "devices.toml")
    devices.path.unlink(missing_ok=True)
    try:
        add(devices, name, user)
        add(devices, "next-" * 10)
    except ConfigError:
        assert not devices.path.exists()
    else:
        devices.load()
        assert devices.find(name) == Device(user, KEYS[0], ADDED)


def test_the_time_is_kept_in_whole_seconds_of_utc(devices: DeviceFile) -> None:
    east = timezone(timedelta(hours=5))
    devices.add("a", "ada", KEYS[0], datetime(2026, 1, 2, 8, 4, 5, 678_900, tzinfo=east))
    devices.add("b", "ada", KEYS[1], datetime(1, 1, 1, tzinfo=UTC))
    devices.load()
    assert devices.devices["a"].added == ADDED
    assert devices.devices["b"].added.year == 1


def test_a_removed_device_is_out_of_the_file_and_the_others_stay(path: Path, devices: DeviceFile) -> None:
    for number, name in enumerate(("a", 'qu"o\\te', "c")):
        add(devices, name, key=KEYS[number])
    assert devices.remove('qu"o\\te') == Device("ada", KEYS[1], ADDED)
    assert devices.names() == ["a", "c"]
    with pytest.raises(NotFound, match='there is no device "b"'):
        devices.remove("b")
    devices.remove("a"), devices.remove("c")
    assert devices.names() == []
    assert tomli.loads(path.read_text()) == {}


def test_writers_do_not_lose_each_others_devices(path: Path) -> None:
    first, second = DeviceFile(path), DeviceFile(path)
    add(first, "a"), add(second, "b", key=KEYS[1]), add(first, "c", key=KEYS[2])
    assert second.names() == ["a", "b", "c"]


# Reading


def faults(devices: DeviceFile) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        devices.load()
    return [fault.removeprefix(f"{devices.path}: ") for fault in caught.value.faults]


def test_without_a_file_there_are_no_devices_yet(devices: DeviceFile) -> None:
    assert devices.changed()
    devices.load()
    assert len(devices) == 0
    assert not devices.changed()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense", "at end of document"),
        ("other = 1", 'unknown key "other"'),
        ("devices = 5", "devices must be tables"),
        ("[devices]\nx = 5", 'device "x": must be a table with user, public_key, added'),
        (f"[devices.' x']\n{ENTRY}", 'device " x": a name has printable characters'),
        (f"[devices.x]\n{ENTRY.replace('ada', '')}", 'device "x": user must be'),
        (
            f"[devices.x]\n{ENTRY}user2 = 1",
            'device "x": unknown key "user2"; it takes user, public_key, added',
        ),
        (f"[devices.x]\n{ENTRY.replace(KEY, KEY[:-1])}", 'device "x": public_key must be 43 characters'),
        (f"[devices.x]\n{ENTRY.replace(KEY, token_text(bytes(32)))}", 'device "x": public_key must be'),
        (
            f"[devices.x]\n{ENTRY.replace('05Z', '05')}",
            'device "x": added must be a date and time with an offset',
        ),
        (f"[devices.x]\n{ENTRY.replace('2026-01-02T03:04:05Z', '5')}", 'device "x": added must be'),
        (
            f"[devices.x]\n{ENTRY.replace('2026-01-02T03:04:05Z', '0001-01-01T00:00:00+23:00')}",
            'device "x": added must be',
        ),
    ],
)
def test_a_fault_names_its_place(path: Path, devices: DeviceFile, text: str, expected: str) -> None:
    write(path, text)
    (fault,) = faults(devices)
    assert expected in fault
    assert fault.isprintable()


def test_a_file_that_others_can_use_is_refused(path: Path, devices: DeviceFile) -> None:
    write(path, "", 0o644)
    assert f"chmod 600 {path}" in faults(devices)[0]


@pytest.mark.parametrize("what", ["nonsense", "mode", "gone"])
def test_a_file_gone_bad_leaves_the_devices_known_before(path: Path, devices: DeviceFile, what: str) -> None:
    add(devices, "laptop")
    devices.load()
    if what == "nonsense":
        write(path, "nonsense")
    elif what == "mode":
        path.chmod(0o640)
    else:
        path.unlink()
    assert devices.changed()
    with pytest.raises(ConfigError):
        devices.reload()
    assert not devices.changed()
    assert devices.find("laptop") is not None


# Those that are gone


def test_gone_is_what_was_removed_or_became_another() -> None:
    a, b = Device("ada", KEYS[0], ADDED), Device("bob", KEYS[1], ADDED)
    before = {"a": a, "b": b}
    assert gone_between(before, before) == {}
    assert gone_between(before, {**before, "c": a}) == {}
    assert gone_between(before, {"b": b}) == {"a": a}
    assert gone_between(before, {"a": a._replace(user="bob"), "b": b}) == {"a": a}
    assert gone_between(before, {"a": a._replace(public_key=KEYS[2]), "b": b}) == {"a": a}
    assert gone_between(before, {"a": a._replace(added=ADDED + timedelta(1)), "b": b}) == {}


class Watched:
    """Devices of a running server, and what it was told of them."""

    def __init__(self, path: Path) -> None:
        self.file = DeviceFile(path)
        self.file.load()
        self.told: list[Any] = []
        self.current = CurrentDevices(
            self.file,
            on_fault=lambda fault: self.told.append("fault"),
            on_recovered=lambda: self.told.append("good"),
            on_gone=lambda gone: self.told.append(sorted(gone)),
        )


async def test_new_and_removed_devices_are_known_at_once(path: Path, devices: DeviceFile) -> None:
    add(devices, "a")
    watched = Watched(path)
    add(devices, "b", key=KEYS[1])
    assert await watched.current.find("b") == Device("ada", KEYS[1], ADDED)
    assert watched.told == []
    devices.remove("a")
    assert await watched.current.find("b") is not None
    assert watched.told == [["a"]]
    assert await watched.current.find("a") is None
    devices.remove("b")
    add(devices, "b", key=KEYS[2])
    await watched.current.refresh()
    await watched.current.refresh()
    assert watched.told == [["a"], ["b"]]


async def test_a_faulty_file_ends_no_device_and_what_it_hid_is_told_after(
    path: Path, devices: DeviceFile
) -> None:
    add(devices, "a"), add(devices, "b", key=KEYS[1])
    watched = Watched(path)
    good = devices._file.read()[1]
    write(path, "nonsense")
    await watched.current.refresh()
    await watched.current.refresh()
    assert await watched.current.find("a") is not None
    assert watched.told == ["fault"]
    write(path, good.replace("[devices.a]", "[devices.z]"))
    await watched.current.refresh()
    assert watched.told == ["fault", ["a"], "good"]


async def test_nobody_has_to_be_told_of_those_that_are_gone(path: Path, devices: DeviceFile) -> None:
    add(devices, "a")
    file = DeviceFile(path)
    file.load()
    current = CurrentDevices(file, on_fault=pytest.fail)
    devices.remove("a")
    assert await current.find("a") is None
