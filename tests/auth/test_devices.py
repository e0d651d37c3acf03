"""The file of devices, which test_users.py tests for all files; devices that are gone from it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import tomli
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.auth.helpers import FakeLog, directory, write
from zcproto.auth import DeviceFile, RegisteredDevice
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


def test_added_device_is_found_after_reading(path: Path, devices: DeviceFile) -> None:
    add(devices, "laptop")
    document = tomli.loads(path.read_text())
    assert document == {"devices": {"laptop": {"user": "ada", "public_key": KEY, "added": ADDED}}}
    assert devices.find("laptop") is None  # found by the next reading
    devices.load()
    assert devices.find("laptop") == RegisteredDevice("ada", KEYS[0], ADDED)
    assert (len(devices.entries), devices.read_names(), repr(devices)) == (
        1,
        ["laptop"],
        f"DeviceFile({str(path)!r})",
    )


def test_device_name_is_unique_among_all_users(path: Path, devices: DeviceFile) -> None:
    add(devices, "laptop")
    before = path.read_bytes()
    with pytest.raises(AlreadyExists, match='a device is named "laptop" already; choose another name'):
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
def test_invalid_device_is_not_written(
    path: Path, devices: DeviceFile, name: str, user: str, key: bytes
) -> None:
    with pytest.raises(ConfigError) as caught:
        add(devices, name, user, key)
    assert str(caught.value).isprintable()
    assert not path.exists()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=20), user=st.text(min_size=1, max_size=20))
def test_any_names_are_stored_exactly_or_refused(tmp_path: Path, name: str, user: str) -> None:
    devices = DeviceFile(tmp_path / "any" / "devices.toml")
    devices.path.unlink(missing_ok=True)
    try:
        add(devices, name, user)
        add(devices, "next-" * 10)
    except ConfigError:
        assert not devices.path.exists()
    else:
        devices.load()
        assert devices.find(name) == RegisteredDevice(user, KEYS[0], ADDED)


def test_time_is_stored_in_whole_seconds_of_utc(devices: DeviceFile) -> None:
    east = timezone(timedelta(hours=5))
    devices.add("a", "ada", KEYS[0], datetime(2026, 1, 2, 8, 4, 5, 678_900, tzinfo=east))
    devices.add("b", "ada", KEYS[1], datetime(1, 1, 1, tzinfo=UTC))
    devices.load()
    assert devices.entries["a"].added == ADDED
    assert devices.entries["b"].added.year == 1


def test_removing_a_device_keeps_the_others(path: Path, devices: DeviceFile) -> None:
    for number, name in enumerate(("a", 'qu"o\\te', "c")):
        add(devices, name, key=KEYS[number])
    assert devices.remove('qu"o\\te') == RegisteredDevice("ada", KEYS[1], ADDED)
    assert devices.read_names() == ["a", "c"]
    with pytest.raises(NotFound, match='no device is named "b"'):
        devices.remove("b")
    devices.remove("a"), devices.remove("c")
    assert devices.read_names() == []
    assert tomli.loads(path.read_text()) == {}


def test_concurrent_writers_lose_no_device(path: Path) -> None:
    first, second = DeviceFile(path), DeviceFile(path)
    add(first, "a"), add(second, "b", key=KEYS[1]), add(first, "c", key=KEYS[2])
    assert second.read_names() == ["a", "b", "c"]


# Reading


def faults(devices: DeviceFile) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        devices.load()
    return [fault.removeprefix(f"{devices.path}: ") for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense", "at end of document"),
        ("other = 1", 'unknown key "other"'),
        ("devices = 5", "devices must be tables"),
        ("[devices]\nx = 5", 'device "x": must be a table; it takes user, public_key, added'),
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
        (f"[devices.x]\n{ENTRY}roles = 'a'", 'device "x": roles must be a list of names'),
    ],
)
def test_fault_names_its_place(path: Path, devices: DeviceFile, text: str, expected: str) -> None:
    write(path, text)
    (fault,) = faults(devices)
    assert expected in fault
    assert fault.isprintable()


# Gone devices


def test_removed_or_changed_device_is_gone() -> None:
    a, b = RegisteredDevice("ada", KEYS[0], ADDED), RegisteredDevice("bob", KEYS[1], ADDED)
    assert DeviceFile.is_gone(a, None)
    assert DeviceFile.is_gone(a, b)
    assert DeviceFile.is_gone(a, a._replace(user="bob"))
    assert DeviceFile.is_gone(a, a._replace(public_key=KEYS[2]))
    assert not DeviceFile.is_gone(a, a)
    assert not DeviceFile.is_gone(a, a._replace(added=ADDED + timedelta(1)))


class Watched:
    """Devices of a running server."""

    def __init__(self, path: Path) -> None:
        self.file = DeviceFile(path)
        self.file.load()
        self.current = directory(self.file)

    def take_gone(self) -> list[str]:
        return [name for name, _ in self.file.take_gone()]


async def test_new_and_removed_devices_are_found_immediately(path: Path, devices: DeviceFile) -> None:
    add(devices, "a")
    watched = Watched(path)
    add(devices, "b", key=KEYS[1])
    assert await watched.current.find("b") == RegisteredDevice("ada", KEYS[1], ADDED)
    assert watched.take_gone() == []
    devices.remove("a")
    assert await watched.current.find("b") is not None
    assert watched.take_gone() == ["a"]
    assert await watched.current.find("a") is None
    devices.remove("b")
    add(devices, "b", key=KEYS[2])
    await watched.current.refresh()
    await watched.current.refresh()
    assert watched.take_gone() == ["b"]
    assert watched.take_gone() == []


async def test_faulty_file_ends_no_device_and_hidden_changes_are_reported_later(
    path: Path, devices: DeviceFile, log: FakeLog
) -> None:
    add(devices, "a"), add(devices, "b", key=KEYS[1])
    watched = Watched(path)
    good = path.read_text()  # noqa: ASYNC240 - a small file
    write(path, "nonsense")
    await watched.current.refresh()
    await watched.current.refresh()
    assert await watched.current.find("a") is not None
    assert log.events == ["devices.unreadable"]
    assert watched.take_gone() == []
    write(path, good.replace("[devices.a]", "[devices.z]"))
    await watched.current.refresh()
    assert log.events == ["devices.unreadable", "devices.readable", "devices.changed"]
    assert watched.take_gone() == ["a"]


# Roles


def test_device_is_narrowed_to_roles_and_back(path: Path, devices: DeviceFile) -> None:
    add(devices, "laptop"), add(devices, "phone", key=KEYS[1])
    before = path.read_text()
    assert devices.set_roles("laptop", frozenset({"b", "a"})).roles is None
    assert 'roles = ["a","b"]\n' in path.read_text()
    assert devices.set_roles("laptop", frozenset()).roles == {"a", "b"}
    devices.load()
    laptop, phone = devices.entries["laptop"], devices.entries["phone"]
    assert (laptop.roles, laptop.as_dict("laptop")["roles"], phone.roles) == (frozenset(), [], None)
    assert laptop.narrow(frozenset({"a"})) == frozenset()
    assert phone.narrow(frozenset({"a"})) == {"a"}
    devices.set_roles("laptop", None)
    assert path.read_text() == before
    with pytest.raises(NotFound, match='no device is named "lost"'):
        devices.set_roles("lost", None)


def test_device_with_other_roles_is_gone(path: Path, devices: DeviceFile) -> None:
    add(devices, "laptop"), add(devices, "phone", key=KEYS[1])
    devices.load()
    DeviceFile(path).set_roles("laptop", frozenset({"a"}))
    devices.reload()
    assert [name for name, _ in devices.take_gone()] == ["laptop"]
