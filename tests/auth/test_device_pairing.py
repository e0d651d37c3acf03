"""Pairing codes: made, read, redeemed once, and ended by wrong tries and by time."""

from __future__ import annotations

import asyncio
import hashlib
import re
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.auth.helpers import directory, write
from tests.limits import TIMEOUT
from zcproto.auth import (
    DeviceFile,
    Enrollment,
    PairingFile,
    RegisteredDevice,
    Throttle,
    UserFile,
)
from zcproto.auth import pairing as pairing_module
from zcproto.auth.pairing import MAX_OPEN, MAX_WAITING, MAX_WRONG
from zcproto.errors import AlreadyExists, ConfigError, InvalidArgument, ResourceExhausted, Unauthenticated

WALL = 1_767_225_600_000
NOW = 50.0
MINUTE_MS = 60_000
LIFE = 10 * MINUTE_MS
ADDRESS = "192.0.2.1"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
WRONG = "0000-0000"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make digests cheap: their cost is tested separately."""
    monkeypatch.setattr(pairing_module, "_COST", 2)


class PairingHome:
    """A home with the users ada and bob, where devices are enrolled."""

    def __init__(self, home: Path, **options: Any) -> None:
        self.users = UserFile(home / "users.toml")
        self.users.add("ada"), self.users.add("bob")
        self.codes = PairingFile(home / "pairing.toml", **options)
        self.devices = DeviceFile(home / "devices.toml")
        self.throttle = Throttle(1_000)
        self.path = home / "pairing.toml"
        self.begin()

    def begin(self) -> None:
        """As after a restart, but for the throttle."""
        users = directory(self.users)
        self.enrollment = Enrollment(self.codes, self.devices, users, self.throttle)

    def make(self, user: str = "ada", life: int = LIFE, wall: int = WALL) -> str:
        return self.codes.make(user, life, wall)

    async def enroll(
        self, code: str, name: str = "laptop", key: bytes = KEY, wall: int = WALL, address: str = ADDRESS
    ) -> str:
        return await self.enrollment.enroll(code, key, name, address=address, wall=wall, now=NOW)

    async def refused(self, code: str, **options: Any) -> None:
        with pytest.raises(Unauthenticated, match="the code was not accepted"):
            await self.enroll(code, **options)

    @property
    def open(self) -> int:
        return self.codes.count_open(WALL)

    def names(self) -> list[str]:
        return self.devices.read_names()


@pytest.fixture
def pairings(tmp_path: Path) -> PairingHome:
    return PairingHome(tmp_path / "home")


# --- making ------------------------------------------------------------------------------------------


def test_code_is_two_groups_of_unambiguous_characters(pairings: PairingHome) -> None:
    codes = {pairings.make() for _ in range(50)}
    assert len(codes) == 50
    assert all(re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{4}-[0-9A-HJKMNP-TV-Z]{4}", code) for code in codes)


def test_code_encodes_all_40_bits(tmp_path: Path) -> None:
    bits = iter([bytes(16), b"\xff" * 5, bytes(5), b"\x00\x44\x32\x14\xc7"])
    codes = PairingFile(tmp_path / "home" / "pairing.toml", entropy=lambda size: next(bits)[:size])
    assert codes.make("ada", LIFE, WALL) == "ZZZZ-ZZZZ"
    assert codes.make("ada", LIFE, WALL) == "0000-0000"
    assert codes.make("ada", LIFE, WALL) == "0123-4567"


def test_file_is_private_and_contains_no_code(pairings: PairingHome) -> None:
    code = pairings.make()
    text = pairings.path.read_text()
    assert stat.S_IMODE(pairings.path.stat().st_mode) == 0o600
    assert code not in text
    assert code.replace("-", "") not in text
    assert "ada" in text
    assert repr(pairings.codes) == f"PairingFile({str(pairings.path)!r})"


def test_same_code_has_a_different_digest_each_time(tmp_path: Path) -> None:
    found = set()
    for number in range(2):
        entropy = iter([bytes([number]) * 16, bytes(5)])
        path = tmp_path / f"home{number}" / "pairing.toml"
        PairingFile(path, entropy=lambda size, entropy=entropy: next(entropy)).make("ada", LIFE, WALL)
        found.update(re.findall(r'digest = "(.*)"', path.read_text()))
    assert len(found) == 2


def test_invalid_user_name_gets_no_code(pairings: PairingHome) -> None:
    with pytest.raises(ConfigError, match="a name has printable characters"):
        pairings.make("a\nb")
    assert not pairings.path.exists()


def test_number_of_open_codes_is_limited(pairings: PairingHome) -> None:
    for _ in range(MAX_OPEN):
        pairings.make()
    with pytest.raises(ConfigError, match="100 codes are open already"):
        pairings.make()
    assert pairings.make(wall=WALL + LIFE) is not None  # those have expired
    assert pairings.codes.count_open(WALL + LIFE) == 1


# --- trading -----------------------------------------------------------------------------------------


async def test_code_registers_one_device_of_its_user(pairings: PairingHome) -> None:
    code = pairings.make("bob")
    assert await pairings.enroll(code, "phone") == "bob"
    pairings.devices.load()
    added = datetime.fromtimestamp(WALL / 1000, UTC)
    assert pairings.devices.entries == {"phone": RegisteredDevice("bob", KEY, added)}
    await pairings.refused(code, name="other")
    assert pairings.names() == ["phone"]


@pytest.mark.parametrize(
    "change", [str.lower, lambda code: code.replace("-", ""), lambda code: f" {code[:2]} {code[2:]}\t"]
)
async def test_code_is_accepted_in_any_common_spelling(pairings: PairingHome, change: Any) -> None:
    assert await pairings.enroll(change(pairings.make())) == "ada"


async def test_similar_characters_are_equal(tmp_path: Path) -> None:
    pairings = PairingHome(
        tmp_path / "home", entropy=lambda size: bytes.fromhex("0000108421")[:size].ljust(size)
    )
    assert pairings.make() == "0001-1111"
    assert await pairings.enroll("0oO-iI lL-1") == "ada"


async def test_code_registers_a_device_of_its_own_user_only(pairings: PairingHome) -> None:
    codes = {user: pairings.make(user) for user in ("ada", "bob")}
    assert await pairings.enroll(codes["bob"], "b") == "bob"
    assert await pairings.enroll(codes["ada"], "a") == "ada"
    assert pairings.open == 0


@pytest.mark.parametrize(("late", "good"), [(LIFE - 1, True), (LIFE, False), (10 * LIFE, False)])
async def test_code_is_valid_until_it_expires(pairings: PairingHome, late: int, good: bool) -> None:
    code = pairings.make()
    if good:
        await pairings.enroll(code, wall=WALL + late)
    else:
        await pairings.refused(code, wall=WALL + late)
    assert pairings.names() == ["laptop"] * good


async def test_name_in_use_does_not_spend_the_code(pairings: PairingHome) -> None:
    pairings.devices.add("laptop", "bob", KEY, datetime.fromtimestamp(0, UTC))
    code = pairings.make()
    for _ in range(MAX_WRONG + 1):
        with pytest.raises(AlreadyExists, match="choose another name"):
            await pairings.enroll(code)
    await pairings.enroll(code, "laptop-2")


async def test_code_of_a_removed_user_is_refused(pairings: PairingHome) -> None:
    code = pairings.make("carol")
    await pairings.refused(code)
    pairings.users.add("carol")
    assert await pairings.enroll(code) == "carol"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": "x" * 65}, "code must have at most 64 characters"),
        ({"name": ""}, "name: a name has 1 to 128"),
        ({"name": " x"}, "name: a name has printable"),
        ({"key": bytes(32)}, "public_key must be an Ed25519 public key of 32 bytes"),
        ({"key": KEY[:31]}, "public_key"),
    ],
)
async def test_invalid_fields_are_named_and_not_counted(
    pairings: PairingHome, options: dict[str, Any], message: str
) -> None:
    code = pairings.make()
    for _ in range(MAX_WRONG):
        with pytest.raises(InvalidArgument, match=message):
            await pairings.enroll(**{"code": code, **options})
    await pairings.enroll(code)


async def test_concurrent_use_of_one_code_registers_one_device(tmp_path: Path) -> None:
    pairings, other = PairingHome(tmp_path / "home"), None
    code = pairings.make()
    other = Enrollment(
        PairingFile(pairings.path),
        DeviceFile(pairings.devices.path),
        directory(pairings.users),
        Throttle(),
    )
    results = await asyncio.gather(
        pairings.enroll(code, "a"),
        other.enroll(code, KEY, "b", address=ADDRESS, wall=WALL, now=NOW),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["Unauthenticated", "str"]
    assert len(pairings.names()) == 1


async def test_failed_write_of_the_device_spends_the_code(
    pairings: PairingHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather that than a code that is good twice."""
    code = pairings.make()

    def fail(*_: Any) -> None:
        raise ConfigError(["the disk is full"])

    with monkeypatch.context() as patch:
        patch.setattr(DeviceFile, "add", fail)
        with pytest.raises(ConfigError):
            await pairings.enroll(code)
    await pairings.refused(code)


# --- wrong tries -------------------------------------------------------------------------------------


async def test_five_wrong_attempts_end_all_open_codes(pairings: PairingHome) -> None:
    codes = [pairings.make(), pairings.make("bob")]
    for _ in range(MAX_WRONG - 1):
        await pairings.refused(WRONG)
    assert pairings.open == 2
    late = pairings.make()
    await pairings.refused(WRONG)
    assert pairings.open == 1
    for code in codes:
        await pairings.refused(code)
    assert pairings.open == 1
    await pairings.enroll(late)


async def test_wrong_attempts_are_counted_across_restarts(pairings: PairingHome) -> None:
    code = pairings.make()
    for _ in range(MAX_WRONG):
        pairings.begin()
        await pairings.refused(WRONG)
    await pairings.refused(code)


async def test_malformed_code_is_a_wrong_attempt(pairings: PairingHome) -> None:
    code = pairings.make()
    for wrong in ("", "?", "é" * 64, "\ud800", code + "0"):
        await pairings.refused(wrong)
    await pairings.refused(code)


async def test_concurrent_wrong_attempts_are_all_counted(pairings: PairingHome) -> None:
    code = pairings.make()
    tries = [pairings.enroll(WRONG, f"x{number}") for number in range(MAX_WRONG)]
    results = await asyncio.gather(*tries, pairings.enroll(code), return_exceptions=True)
    assert {type(result) for result in results} == {Unauthenticated}


async def test_without_an_open_code_nothing_is_written(pairings: PairingHome) -> None:
    await pairings.refused(WRONG)
    assert not pairings.path.exists()
    pairings.make(life=1)
    before = pairings.path.read_bytes()
    await pairings.refused(WRONG, wall=WALL + 1)
    assert pairings.path.read_bytes() == before


async def test_wrong_codes_are_throttled_by_address_and_valid_ones_not_counted(pairings: PairingHome) -> None:
    pairings.throttle = Throttle(2)
    pairings.begin()
    for number in range(5):
        await pairings.enroll(pairings.make(), f"device-{number}")
    for _ in range(2):
        await pairings.refused(WRONG)
    code = pairings.make()
    with pytest.raises(ResourceExhausted) as caught:
        await pairings.enroll(code)
    assert caught.value.details == {"retry_after_ms": 1000}
    assert pairings.open == 1
    await pairings.enroll(code, address="198.51.100.7")


async def test_number_of_waiting_attempts_is_limited(
    pairings: PairingHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    redeem = PairingFile.redeem

    def slow(self: PairingFile, *args: Any) -> Any:
        held.wait(TIMEOUT)
        return redeem(self, *args)

    monkeypatch.setattr(PairingFile, "redeem", slow)
    waiting = [asyncio.create_task(pairings.enroll(WRONG)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as caught:
        await pairings.enroll(WRONG)
    assert caught.value.details == {"retry_after_ms": 1000}
    held.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(result) for result in results} == {Unauthenticated}
    await pairings.refused(WRONG)


def test_codes_spent_by_another_process_are_refused(
    pairings: PairingHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = pairings.make()
    monkeypatch.setattr(PairingFile, "count_open", lambda self, wall: 1)
    with pairings.codes.redeem(code, WALL + LIFE) as found:
        assert found is None


# --- the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("salt", "pepper"),
        lambda text: re.sub(r'salt = ".', 'salt = "', text),
        lambda text: re.sub(r'salt = ".', 'salt = "G', text),
        lambda text: re.sub(r"salt = .*", "salt = 5", text),
        lambda text: text + "more = 1\n",
        lambda text: text.replace("wrong = 0", "wrong = true"),
        lambda text: text.replace("wrong = 0\n", ""),
        lambda text: re.sub(r'digest = ".', 'digest = "', text),
        lambda text: text.replace("ada", " ada"),
        lambda text: text.replace("[[codes]]", "[codes]"),
        lambda text: re.sub(r"(?s)\[\[codes.*", "codes = [5]", text),
    ],
)
def test_damaged_file_is_reported_and_accepts_no_code(pairings: PairingHome, change: Any) -> None:
    code = pairings.make()
    text = pairings.path.read_text()
    assert change(text) != text
    write(pairings.path, change(text))
    with (
        pytest.raises(ConfigError, match="is damaged; remove it"),
        pairings.codes.redeem(code, WALL),
    ):
        pytest.fail("redeemed")
    with pytest.raises(ConfigError, match="is damaged; remove it"):
        pairings.make()


def test_file_readable_by_others_is_refused(pairings: PairingHome) -> None:
    pairings.make()
    pairings.path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        pairings.make()


def test_guessing_codes_from_a_stolen_file_is_too_slow(
    pairings: PairingHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 bits are 10^12 tries: with 16 MiB and some ten milliseconds each, centuries."""
    monkeypatch.undo()
    costs: list[int] = []

    def scrypt(code: bytes, *, salt: bytes, n: int, r: int, p: int, dklen: int) -> bytes:
        costs.append(128 * n * r)
        return hashlib.scrypt(code, salt=salt, n=n, r=r, p=p, dklen=dklen)

    monkeypatch.setattr(pairing_module, "scrypt", scrypt)
    pairings.make()
    assert costs == [16 * 2**20]
    assert re.search(r'digest = "[0-9a-f]{64}"', pairings.path.read_text())
