"""`zcproto pair` and `zcproto device`: codes that are shown once, devices listed and removed."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.limits import TIMEOUT
from zcproto.auth import DeviceFile, PairingFile, UserFile
from zcproto.auth import pairing as pairing_module
from zcproto.cli import main, store
from zcproto.cli import user as user_module
from zcproto.cli.store import StoreInUseError
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.sessions import token_text
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.sessions.session import BOUND
from zcproto.stores.base import SessionStore, StoreUnavailable
from zcproto.stores.sqlite.store import SqliteStore

Capture = pytest.CaptureFixture[str]

KEYS = [
    Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key().public_bytes_raw() for n in range(3)
]
ADDED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MINUTE_MS = 60_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing_module, "_COST", 2)


@pytest.fixture
def users(home: Path) -> UserFile:
    return UserFile(home / "users.toml")


# --- pair --------------------------------------------------------------------------------------------


def trade(home: Path, code: str, wall: int | None = None) -> str | None:
    """Spend a code; return its user."""
    with PairingFile(home / "pairing.toml").redeem(code, wall or system_clock.wall()) as found:
        if found is None:
            return None
        user, spend = found
        spend()
        return user


def test_pair_prints_only_the_code_to_stdout(home: Path, users: UserFile, capsys: Capture) -> None:
    users.add("ada")
    assert main(["pair"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"[0-9A-Z]{4}-[0-9A-Z]{4}\n", out)
    assert err == (
        "This code enrolls one device of ada within 10 min; five wrong attempts end it. It is shown once:\n"
    )
    assert out.strip() not in (home / "pairing.toml").read_text()
    assert trade(home, out.strip()) == "ada"
    assert trade(home, out.strip()) is None


@pytest.mark.parametrize("minutes", [1, 10, 1440])
def test_code_is_valid_for_the_given_minutes(
    home: Path, users: UserFile, capsys: Capture, minutes: int
) -> None:
    users.add("ada")
    before = system_clock.wall()
    assert main(["pair", *([] if minutes == 10 else ["--minutes", str(minutes)])]) == 0
    after = system_clock.wall()
    codes = PairingFile(home / "pairing.toml")
    assert codes.count_open(before + minutes * MINUTE_MS - 1) == 1
    assert codes.count_open(after + minutes * MINUTE_MS) == 0
    assert f"within {minutes} min" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "1441", "x", "1.5"])
def test_minutes_out_of_range_are_refused(home: Path, users: UserFile, minutes: str) -> None:
    users.add("ada")
    assert main(["pair", "--minutes", minutes]) == 2
    assert not (home / "pairing.toml").exists()


def test_pair_needs_a_user_if_there_are_several(home: Path, users: UserFile, capsys: Capture) -> None:
    home.mkdir(0o700)
    assert main(["pair"]) == 2
    assert capsys.readouterr().err == "zcproto: there is no user yet; add one with zcproto user add NAME\n"
    users.add("ada"), users.add("bob")
    assert main(["pair"]) == 2
    assert capsys.readouterr() == ("", "zcproto: there are several users; choose one with --user NAME\n")
    assert main(["pair", "--user", "bob"]) == 0
    assert trade(home, capsys.readouterr().out.strip()) == "bob"
    users.disable("bob")
    assert main(["pair"]) == 0
    assert trade(home, capsys.readouterr().out.strip()) == "ada"


@pytest.mark.parametrize("name", ["carol", "dora", "", "a\nb\x1b[31m"])
def test_unknown_or_disabled_user_gets_no_code(
    home: Path, users: UserFile, capsys: Capture, name: str
) -> None:
    users.add("ada"), users.add("dora"), users.disable("dora")
    assert main(["pair", "--user", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is unknown or disabled" in err
    assert err.removesuffix("\n").isprintable()
    assert not (home / "pairing.toml").exists()


def test_qr_code_on_a_terminal(
    home: Path, users: UserFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("qrcode")
    users.add("ada")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["pair"]) == 0
    out, err = capsys.readouterr()
    drawn = err.split("once:\n")[1].splitlines()
    assert drawn == (user_module._qr_code(out.strip()) or "").splitlines()
    assert len(drawn) > 10
    assert set("".join(drawn)) <= set("█▀▄ \xa0")


def test_missing_qr_package_is_mentioned(
    home: Path, users: UserFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    users.add("ada")
    load = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "qrcode":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["pair"]) == 0
    out, err = capsys.readouterr()
    assert len(out) == 10
    assert err.endswith('For a QR code, run in a clone of zcproto: pip install ".[qr]"\n')


# --- device list -------------------------------------------------------------------------------------


@pytest.fixture
def devices(home: Path) -> DeviceFile:
    file = DeviceFile(home / "devices.toml")
    for name, user, key in zip(("laptop", "phone", "Zoë's"), ("ada", "bob", "ada"), KEYS, strict=True):
        file.add(name, user, key, ADDED)
    return file


def test_device_list_shows_user_and_key(devices: DeviceFile, capsys: Capture) -> None:
    assert main(["device", "list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["DEVICE", "USER", "ROLES", "ADDED", "PUBLIC", "KEY"]
    assert [row.split() for row in rows] == [
        [name, user, "of", "the", "user", "2026-01-02", "03:04", "UTC", token_text(key)]
        for name, user, key in zip(("laptop", "phone", "Zoë's"), ("ada", "bob", "ada"), KEYS, strict=True)
    ]


def test_device_list_of_one_user_as_json(devices: DeviceFile, capsys: Capture) -> None:
    assert main(["device", "list", "--user", "bob", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "phone",
            "user": "bob",
            "public_key": token_text(KEYS[1]),
            "added": "2026-01-02T03:04:05Z",
            "roles": None,
        }
    ]
    assert main(["device", "list", "--user", "unknown", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_device_list_without_a_file_creates_nothing(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    assert main(["device", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert list(home.iterdir()) == []


def test_damaged_device_file_is_reported(devices: DeviceFile, capsys: Capture) -> None:
    devices.path.write_text("nonsense")
    assert main(["device", "list"]) == 2
    assert "devices.toml: " in capsys.readouterr().err


# --- device remove -----------------------------------------------------------------------------------


def test_device_is_removed(devices: DeviceFile, capsys: Capture) -> None:
    assert main(["device", "remove", "laptop"]) == 0
    assert capsys.readouterr() == ("", "laptop of ada is removed; 0 sessions ended.\n")
    assert devices.read_names() == ["phone", "Zoë's"]
    assert main(["device", "remove", "laptop"]) == 1
    assert 'no device is named "laptop"; zcproto device list shows the devices' in capsys.readouterr().err


def kept(home: Path) -> SessionStore:
    return SqliteStore(home / "sessions.db", timeout=TIMEOUT)


def record(number: int, user: str, key: str) -> SessionRecord:
    wall = system_clock.wall()
    return SessionRecord(
        id=bytes([number]) * 16,
        token_digest=bytes([number]) * 32,
        refresh_digest=bytes([100 + number]) * 32,
        user=user,
        client="",
        address="",
        flags=BOUND if key else 0,
        created_at=wall,
        last_used_at=wall,
        expires_at=wall + 60 * MINUTE_MS,
        refresh_expires_at=0,
        key=key,
    )


def test_sessions_of_a_removed_device_end_in_the_store(
    home: Path, devices: DeviceFile, capsys: Capture
) -> None:
    limit = UserLimit(5, "refuse", None)

    async def fill() -> None:
        store = kept(home)
        await store.open(lambda change: None)
        for number, (user, key) in enumerate(
            [
                ("ada", "device:laptop"),
                ("ada", "device:laptop"),
                ("ada", "device:Zoë's"),
                ("ada", ""),
                ("bob", ""),
            ],
            1,
        ):
            await store.create(record(number, user, key), limit)
        await store.close()

    async def left() -> list[str]:
        store = kept(home)
        await store.open(lambda change: None)
        keys = [each.key for each in await store.list()]
        await store.close()
        return sorted(keys)

    asyncio.run(fill())
    assert main(["device", "remove", "laptop"]) == 0
    assert capsys.readouterr().err == "laptop of ada is removed; 2 sessions ended.\n"
    assert asyncio.run(left()) == ["", "", "device:Zoë's"]


def test_running_server_ends_the_sessions_of_a_removed_device(
    home: Path, devices: DeviceFile, capsys: Capture
) -> None:
    async def remove() -> None:
        store = kept(home)
        await store.open(lambda change: None)
        try:
            assert await asyncio.to_thread(main, ["device", "remove", "laptop"]) == 0
        finally:
            await store.close()

    asyncio.run(remove())
    expected = "laptop of ada is removed; the running server ends the sessions within a second.\n"
    assert capsys.readouterr().err == expected


def test_invalid_configuration_changes_no_device(home: Path, devices: DeviceFile) -> None:
    (home / "config.toml").write_text("nonsense = 1\n")
    assert main(["device", "remove", "laptop"]) == 2
    assert "laptop" in devices.read_names()


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            StoreInUseError(["a server runs"]),
            0,
            "laptop of ada is removed; the running server ends the sessions within a second.\n",
        ),
        (
            StoreUnavailable("the disk is full"),
            2,
            "zcproto: the change is made, but the sessions could not be ended: the session store is unavailable:"
            " the disk is full; end them when the store answers\n",
        ),
    ],
)
def test_device_is_removed_even_if_the_store_is_unavailable(
    home: Path,
    devices: DeviceFile,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    expected: str,
) -> None:
    @contextlib.asynccontextmanager
    async def unavailable(url: str, home: Home) -> AsyncIterator[SessionStore]:
        raise error
        yield

    monkeypatch.setattr(store, "opened_store", unavailable)
    monkeypatch.setattr(store, "has_no_sessions", lambda url, home: False)
    assert main(["device", "remove", "laptop"]) == code
    assert capsys.readouterr().err == expected
    assert devices.read_names() == ["phone", "Zoë's"]
