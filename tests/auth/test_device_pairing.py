"""Pairing codes: made, read, traded once, and ended by wrong tries and by time."""

from __future__ import annotations

import asyncio
import itertools
import re
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tests.auth.helpers import write
from zcproto.auth import CurrentUsers, Device, DeviceFile, Enrollment, PairingFile, Throttle, UserFile
from zcproto.auth import pairing as pairing_module
from zcproto.auth.pairing import MAX_OPEN, MAX_WAITING, MAX_WRONG, Pairing
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
    """The digest's cost is no part of what is tested."""
    monkeypatch.setattr(pairing_module, "_COST", 2)


class Desk:
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
        users = CurrentUsers(self.users, on_fault=pytest.fail)
        self.enrollment = Enrollment(self.codes, self.devices, users, self.throttle)

    def make(self, user: str = "ada", life: int = LIFE, wall: int = WALL) -> str:
        return self.codes.make(user, life, wall)

    async def enroll(
        self, code: str, name: str = "laptop", key: bytes = KEY, wall: int = WALL, address: str = ADDRESS
    ) -> Pairing:
        return await self.enrollment.enroll(code, key, name, address=address, wall=wall, now=NOW)

    async def refused(self, code: str, **options: Any) -> None:
        with pytest.raises(Unauthenticated, match="the code was not accepted"):
            await self.enroll(code, **options)

    @property
    def open(self) -> int:
        return self.codes.count_open(WALL)

    def names(self) -> list[str]:
        return self.devices.names()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "home")


# --- making ------------------------------------------------------------------------------------------


def test_a_code_is_two_groups_that_can_be_read_aloud(desk: Desk) -> None:
    codes = {desk.make() for _ in range(50)}
    assert len(codes) == 50
    assert all(re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{4}-[0-9A-HJKMNP-TV-Z]{4}", code) for code in codes)


def test_all_40_bits_are_in_it(tmp_path: Path) -> None:
    bits = itertools.chain([bytes(16), b"\xff" * 5, bytes(5), b"\x00\x44\x32\x14\xc7"])
    codes = PairingFile(tmp_path / "home" / "pairing.toml", entropy=lambda size: next(bits))
    assert codes.make("ada", LIFE, WALL) == "ZZZZ-ZZZZ"
    assert codes.make("ada", LIFE, WALL) == "0000-0000"
    assert codes.make("ada", LIFE, WALL) == "0123-4567"


def test_the_file_is_the_owners_alone_and_has_no_code(desk: Desk) -> None:
    code = desk.make()
    text = desk.path.read_text()
    assert stat.S_IMODE(desk.path.stat().st_mode) == 0o600
    assert code not in text
    assert code.replace("-", "") not in text
    assert "ada" in text
    assert repr(desk.codes) == f"PairingFile({str(desk.path)!r})"


def test_the_same_code_looks_another_each_time(tmp_path: Path) -> None:
    found = set()
    for number in range(2):
        entropy = iter([bytes([number]) * 16, bytes(5)])
        path = tmp_path / f"home{number}" / "pairing.toml"
        PairingFile(path, entropy=lambda size, entropy=entropy: next(entropy)).make("ada", LIFE, WALL)
        found.update(re.findall(r'digest = "(.*)"', path.read_text()))
    assert len(found) == 2


def test_what_cannot_be_a_users_name_gets_no_code(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="a name has printable characters"):
        desk.make("a\nb")
    assert not desk.path.exists()


def test_only_so_many_codes_are_open_at_once(desk: Desk) -> None:
    for _ in range(MAX_OPEN):
        desk.make()
    with pytest.raises(ConfigError, match="100 codes are open already"):
        desk.make()
    assert desk.make(wall=WALL + LIFE) is not None  # those have expired
    assert desk.codes.count_open(WALL + LIFE) == 1


# --- trading -----------------------------------------------------------------------------------------


async def test_a_code_is_traded_for_a_device_of_its_user_once(desk: Desk) -> None:
    code = desk.make("bob")
    assert await desk.enroll(code, "phone") == ("bob", "phone")
    desk.devices.load()
    added = datetime.fromtimestamp(WALL / 1000, UTC)
    assert desk.devices.devices == {"phone": Device("bob", KEY, added)}
    await desk.refused(code, name="other")
    assert desk.names() == ["phone"]


@pytest.mark.parametrize(
    "change", [str.lower, lambda code: code.replace("-", ""), lambda code: f" {code[:2]} {code[2:]}\t"]
)
async def test_a_code_is_read_as_people_write(desk: Desk, change: Any) -> None:
    assert await desk.enroll(change(desk.make())) == ("ada", "laptop")


@given(st.text(max_size=40))
def test_reading_never_raises_and_gives_one_text(text: str) -> None:
    assert pairing_module._read(pairing_module._read(text)) == pairing_module._read(text)


def test_characters_that_look_the_same_are_the_same() -> None:
    assert pairing_module._read("oO-iI lL-uu") == "001111UU"


async def test_each_code_is_for_its_own_user(desk: Desk) -> None:
    codes = {user: desk.make(user) for user in ("ada", "bob")}
    assert (await desk.enroll(codes["bob"], "b")).user == "bob"
    assert (await desk.enroll(codes["ada"], "a")).user == "ada"
    assert desk.open == 0


@pytest.mark.parametrize(("late", "good"), [(LIFE - 1, True), (LIFE, False), (10 * LIFE, False)])
async def test_a_code_is_good_until_its_time_is_over(desk: Desk, late: int, good: bool) -> None:
    code = desk.make()
    if good:
        await desk.enroll(code, wall=WALL + late)
    else:
        await desk.refused(code, wall=WALL + late)
    assert desk.names() == ["laptop"] * good


async def test_a_name_that_is_taken_does_not_spend_the_code(desk: Desk) -> None:
    desk.devices.add("laptop", "bob", KEY, datetime.fromtimestamp(0, UTC))
    code = desk.make()
    for _ in range(MAX_WRONG + 1):
        with pytest.raises(AlreadyExists, match="choose another name"):
            await desk.enroll(code)
    await desk.enroll(code, "laptop-2")


async def test_a_code_for_a_user_who_is_gone_is_none(desk: Desk) -> None:
    code = desk.make("carol")
    await desk.refused(code)
    desk.users.add("carol")
    assert (await desk.enroll(code)).user == "carol"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"code": "x" * 65}, "code must have at most 64 characters"),
        ({"name": ""}, "name: a name has 1 to 128"),
        ({"name": " x"}, "name: a name has printable"),
        ({"key": bytes(32)}, "public_key must be a public key of Ed25519, 32 bytes"),
        ({"key": KEY[:31]}, "public_key"),
    ],
)
async def test_what_cannot_be_is_named_and_counts_for_nothing(
    desk: Desk, options: dict[str, Any], said: str
) -> None:
    code = desk.make()
    for _ in range(MAX_WRONG):
        with pytest.raises(InvalidArgument, match=said):
            await desk.enroll(**{"code": code, **options})
    await desk.enroll(code)


async def test_a_code_traded_by_two_at_once_is_good_for_one(tmp_path: Path) -> None:
    desk, other = Desk(tmp_path / "home"), None
    code = desk.make()
    other = Enrollment(
        PairingFile(desk.path),
        DeviceFile(desk.devices.path),
        CurrentUsers(desk.users, on_fault=pytest.fail),
        Throttle(),
    )
    results = await asyncio.gather(
        desk.enroll(code, "a"),
        other.enroll(code, KEY, "b", address=ADDRESS, wall=WALL, now=NOW),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["Pairing", "Unauthenticated"]
    assert len(desk.names()) == 1


async def test_a_device_that_cannot_be_written_down_costs_the_code(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather that than a code that is good twice."""
    code = desk.make()

    def fail(*_: Any) -> None:
        raise ConfigError(["the disk is full"])

    with monkeypatch.context() as patch:
        patch.setattr(DeviceFile, "add", fail)
        with pytest.raises(ConfigError):
            await desk.enroll(code)
    await desk.refused(code)


# --- wrong tries -------------------------------------------------------------------------------------


async def test_five_wrong_tries_end_every_code_that_was_open(desk: Desk) -> None:
    codes = [desk.make(), desk.make("bob")]
    for _ in range(MAX_WRONG - 1):
        await desk.refused(WRONG)
    assert desk.open == 2
    late = desk.make()
    await desk.refused(WRONG)
    assert desk.open == 1
    for code in codes:
        await desk.refused(code)
    assert desk.open == 1
    await desk.enroll(late)


async def test_wrong_tries_are_counted_across_restarts(desk: Desk) -> None:
    code = desk.make()
    for _ in range(MAX_WRONG):
        desk.begin()
        await desk.refused(WRONG)
    await desk.refused(code)


async def test_whatever_is_no_code_is_a_wrong_try(desk: Desk) -> None:
    code = desk.make()
    for wrong in ("", "?", "é" * 64, "\ud800", code + "0"):
        await desk.refused(wrong)
    await desk.refused(code)


async def test_many_wrong_tries_at_once_are_all_counted(desk: Desk) -> None:
    code = desk.make()
    tries = [desk.enroll(WRONG, f"x{number}") for number in range(MAX_WRONG)]
    results = await asyncio.gather(*tries, desk.enroll(code), return_exceptions=True)
    assert {type(result) for result in results} == {Unauthenticated}


async def test_without_an_open_code_nothing_is_written(desk: Desk) -> None:
    await desk.refused(WRONG)
    assert not desk.path.exists()
    desk.make(life=1)
    before = desk.path.read_bytes()
    await desk.refused(WRONG, wall=WALL + 1)
    assert desk.path.read_bytes() == before


async def test_wrong_codes_are_throttled_by_their_address_right_ones_are_not_counted(desk: Desk) -> None:
    desk.throttle = Throttle(2)
    desk.begin()
    for number in range(5):
        await desk.enroll(desk.make(), f"device-{number}")
    for _ in range(2):
        await desk.refused(WRONG)
    code = desk.make()
    with pytest.raises(ResourceExhausted) as caught:
        await desk.enroll(code)
    assert caught.value.details == {"retry_after_ms": 1000}
    assert desk.open == 1
    await desk.enroll(code, address="198.51.100.7")


async def test_only_so_many_wait_for_their_turn(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    trade = PairingFile.trade

    def slow(self: PairingFile, *args: Any) -> None:
        held.wait(10)
        trade(self, *args)

    monkeypatch.setattr(PairingFile, "trade", slow)
    waiting = [asyncio.create_task(desk.enroll(WRONG)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as caught:
        await desk.enroll(WRONG)
    assert caught.value.details == {"retry_after_ms": 1000}
    held.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(result) for result in results} == {Unauthenticated}
    await desk.refused(WRONG)


def test_codes_that_were_used_up_by_another_process_meanwhile_are_none(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = desk.make()
    monkeypatch.setattr(PairingFile, "count_open", lambda self, wall: 1)
    desk.codes.trade(code, WALL + LIFE, lambda user, spend: pytest.fail("it has expired"))


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
def test_a_damaged_file_is_told_and_gives_nothing(desk: Desk, change: Any) -> None:
    code = desk.make()
    text = desk.path.read_text()
    assert change(text) != text
    write(desk.path, change(text))
    with pytest.raises(ConfigError, match="is damaged; remove it"):
        desk.codes.trade(code, WALL, lambda user, spend: pytest.fail("traded"))
    with pytest.raises(ConfigError, match="is damaged; remove it"):
        desk.make()


def test_a_file_that_others_can_read_is_refused(desk: Desk) -> None:
    desk.make()
    desk.path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        desk.make()


def test_a_try_costs_whoever_has_the_file_too_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 bits are 10^12 tries: with 16 MiB and some ten milliseconds each, centuries."""
    monkeypatch.undo()
    assert pairing_module._COST == 2**14
    assert len(pairing_module._digest_of("ZZZZZZZZ", bytes(16))) == 32
