"""Pending revocations survive crashes, full disks and damage."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from zcproto.config.load import load_config
from zcproto.errors import Code, ConfigError
from zcproto.stores import pending as module
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.pending import WASTE, PendingRevocations, Revocation

WALL = 1_767_225_600_000
WITHIN = TIMEOUT
ROOT = Path(__file__).parents[2]

Open = Callable[..., Any]


def one(number: int, wall: int = WALL) -> Revocation:
    return Revocation(wall, number.to_bytes(16, "big"), "ada")


ADA = Revocation(WALL, user="ada")
ALL = Revocation(WALL)


def read(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_there(path: Path) -> bool:
    return path.exists()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "revocations.pending"


@pytest.fixture
async def opened(path: Path) -> AsyncIterator[Open]:
    """Return a function that opens the file like a new process. All are closed at the end."""
    made: list[PendingRevocations] = []

    async def open(**options: Any) -> PendingRevocations:
        made.append(PendingRevocations(path, **options))
        await made[-1].open()
        return made[-1]

    yield open
    for pending in made:
        await pending.close()


async def reopened(pending: PendingRevocations, path: Path) -> list[Revocation]:
    """Return what the next process reads."""
    await pending.close()
    again = PendingRevocations(path)
    await again.open()
    entries = again.entries
    await again.close()
    return entries


async def test_no_file_is_created_before_the_first_revocation(opened: Open, path: Path) -> None:
    pending = await opened()
    assert (len(pending), pending.entries, is_there(path)) == (0, [], False)


async def test_revocations_survive_a_restart_in_order(opened: Open, path: Path) -> None:
    pending = await opened()
    added = [
        one(1),
        ADA,
        ALL,
        Revocation(WALL, user=""),
        one(2),
        Revocation(WALL, user='evil "\\\n\udc80 \u202e'),
        one(3),
        replace(one(3), is_unverified=True),
        replace(one(3), user="eve", is_unverified=True),
    ]
    for revocation in added:
        await pending.add(revocation, WITHIN)
    assert pending.entries == added
    assert pending.get(one(3).id, "ada") == one(3)
    assert pending.get(one(3).id, "eve") == added[-1]
    assert pending.unverified("eve") == 1
    assert pending.get(one(2).id, None) == one(2)
    assert pending.get(b"x" * 16, None) is None
    assert mode(path) == 0o600
    assert await reopened(pending, path) == added


@pytest.mark.parametrize("code", [Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED])
async def test_every_field_is_stored(opened: Open, path: Path, code: Code) -> None:
    pending = await opened()
    await pending.add(Revocation(WALL, b"\xff" * 16, "ada", code), WITHIN)
    assert await reopened(pending, path) == [Revocation(WALL, b"\xff" * 16, "ada", code)]


async def test_revocation_is_on_disk_when_add_returns(opened: Open, path: Path) -> None:
    pending = await opened()
    await pending.add(ADA, WITHIN)
    first = read(path)
    await pending.add(one(1), WITHIN)
    assert read(path).startswith(first)
    assert read(path).count(b"\n") == 2


async def test_revocation_is_pending_before_it_is_on_disk(opened: Open) -> None:
    pending = await opened()
    adding = asyncio.ensure_future(pending.add(ADA, WITHIN))
    await asyncio.sleep(0)
    assert pending.entries == [ADA]
    await adding


async def test_concurrent_revocations_are_all_written(opened: Open, path: Path) -> None:
    pending = await opened()
    await asyncio.gather(*(pending.add(one(number), WITHIN) for number in range(500)))
    assert [entry.id for entry in await reopened(pending, path)] == [one(n).id for n in range(500)]


async def test_later_revocation_with_the_same_key_replaces_the_earlier(opened: Open, path: Path) -> None:
    pending = await opened()
    later = Revocation(WALL + 5, user="ada")
    for revocation in (ADA, one(1), later, Revocation(WALL, one(1).id, "bob")):
        await pending.add(revocation, WITHIN)
    assert pending.entries == [later, Revocation(WALL, one(1).id, "bob")]
    assert set(await reopened(pending, path)) == {later, Revocation(WALL, one(1).id, "bob")}


async def test_repeated_revocations_do_not_grow_the_file(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: None)
    pending = await opened()
    for number in range(3 * WASTE):
        await pending.add(Revocation(WALL + number, user="ada"), WITHIN)
    assert read(path).count(b"\n") <= WASTE + 2
    assert await reopened(pending, path) == [Revocation(WALL + 3 * WASTE - 1, user="ada")]


# --- removing ---------------------------------------------------------------------------------------------


async def test_removed_revocations_are_not_pending(opened: Open, path: Path) -> None:
    pending = await opened()
    for number in range(4):
        await pending.add(one(number), WITHIN)
    await pending.remove([one(9)], WITHIN)
    done = pending.entries[:2]
    await pending.remove(done, WITHIN)
    assert pending.entries == [one(2), one(3)]
    await pending.add(one(4), WITHIN)
    assert await reopened(pending, path) == [one(2), one(3), one(4)]


async def test_revocation_replaced_meanwhile_is_not_removed(opened: Open, path: Path) -> None:
    pending = await opened()
    await pending.add(ADA, WITHIN)
    replayed = pending.entries
    again = Revocation(WALL + 1, user="ada")
    await pending.add(again, WITHIN)
    await pending.remove(replayed, WITHIN)
    assert pending.entries == [again]
    assert await reopened(pending, path) == [again]


async def test_removing_the_last_revocation_leaves_an_empty_file(opened: Open, path: Path) -> None:
    pending = await opened()
    await pending.add(ADA, WITHIN)
    await pending.remove(pending.entries, WITHIN)
    assert read(path) == b""
    assert await reopened(pending, path) == []


# --- bounds -----------------------------------------------------------------------------------------------


async def test_new_revocation_is_refused_at_the_limit(opened: Open, path: Path) -> None:
    pending = await opened(limit=2)
    await pending.add(one(1), WITHIN)
    await pending.add(one(2), WITHIN)
    with pytest.raises(StoreUnavailable, match="2 revocations are waiting for the store"):
        await pending.add(one(3), WITHIN)
    await pending.add(one(2, WALL + 1), WITHIN)  # it replaces an entry, so it needs no room
    assert pending.entries == [one(1), one(2, WALL + 1)]
    await pending.remove([pending.entries[0]], WITHIN)
    await pending.add(one(3), WITHIN)
    assert await reopened(pending, path) == [one(2, WALL + 1), one(3)]


async def test_add_fails_before_open_and_after_close(opened: Open, path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="closed"):
        await PendingRevocations(path).add(ADA, WITHIN)
    pending = await opened()
    await pending.close()
    await pending.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await pending.add(ADA, WITHIN)


# --- disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "pwrite", "open"])
async def test_disk_failure_is_reported_and_the_next_write_stores_all(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    pending = await opened()
    await pending.add(one(1), WITHIN)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, function, fail)
        if function == "open":  # the file is open already
            await pending.add(one(2), WITHIN)
            with pytest.raises(StoreUnavailable, match="cannot be written: No space left"):
                await pending.remove([one(1)], WITHIN)
        else:
            with pytest.raises(StoreUnavailable, match="cannot be written: No space left"):
                await pending.add(one(2), WITHIN)
    assert one(2) in pending.entries  # it is pending nevertheless
    await pending.add(one(3), WITHIN)
    assert (await reopened(pending, path))[-2:] == [one(2), one(3)]


async def test_partial_write_is_completed(opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(module.os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    pending = await opened()
    await pending.add(one(1), WITHIN)
    await pending.add(ADA, WITHIN)
    assert await reopened(pending, path) == [one(1), ADA]


async def test_hung_disk_fails_within_the_timeout(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    fsync = os.fsync

    def hang(descriptor: int) -> None:
        gate.wait(TIMEOUT)
        fsync(descriptor)

    pending = await opened()
    monkeypatch.setattr(module.os, "fsync", hang)
    with pytest.raises(StoreUnavailable, match="within 20 ms"):
        await pending.add(ADA, 0.02)
    with pytest.raises(StoreUnavailable, match="within 20 ms"):
        await pending.add(one(1), 0.02)
    assert pending.entries == [ADA, one(1)]
    gate.set()
    assert await reopened(pending, path) == [ADA, one(1)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
async def test_folder_that_cannot_be_synced(
    opened: Open, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "no")
        fsync(descriptor)

    pending = await opened()
    monkeypatch.setattr(module.os, "fsync", fail)
    if number == errno.EINVAL:  # a file system that persists names without being asked
        await pending.add(ADA, WITHIN)
    else:
        with pytest.raises(StoreUnavailable):
            await pending.add(ADA, WITHIN)


async def test_exception_in_the_thread_is_raised_to_the_caller(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = await opened()
    monkeypatch.setattr(module, "_line", lambda revocation: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await pending.add(ADA, WITHIN)


# --- crashes and damage -------------------------------------------------------------------------------------


async def test_truncated_file_gives_its_complete_lines(opened: Open, path: Path) -> None:
    pending = await opened()
    added = [one(1), ADA, ALL]
    for revocation in added:
        await pending.add(revocation, WITHIN)
    await pending.close()
    data = read(path)
    second = data.index(b"\n")
    for end in (0, 1, *range(second, len(data) + 1)):
        write(path, data[:end])
        again = await opened()
        assert again.entries == added[: data[:end].count(b"\n")]
        assert again.damaged == []
        await again.close()


async def test_revocation_added_after_a_truncated_line_is_stored(opened: Open, path: Path) -> None:
    pending = await opened()
    await pending.add(one(1), WITHIN)
    await pending.close()
    write(path, read(path) + b"1234")
    again = await opened()
    await again.add(one(2), WITHIN)
    assert await reopened(again, path) == [one(1), one(2)]


@pytest.mark.parametrize("place", range(0, 100, 7))
async def test_damaged_line_affects_no_other_and_the_file_is_copied(
    opened: Open, path: Path, place: int
) -> None:
    pending = await opened()
    for number in range(3):
        await pending.add(one(number), WITHIN)
    await pending.close()
    data = bytearray(read(path))
    size = len(data) // 3
    data[size + place % (size - 1)] ^= 1
    write(path, data)
    again = await opened()
    assert again.entries == [one(0), one(2)]
    (aside,) = again.damaged
    assert aside.name == "revocations.pending.damaged-1"
    assert read(aside) == data
    await again.add(one(3), WITHIN)
    assert read(aside) == data
    assert await reopened(again, path) == [one(0), one(2), one(3)]


@pytest.mark.parametrize(
    "text",
    [
        b'[2,1,69,"",""]',
        b'[1,1,69,""]',
        b"{}",
        b'[1,1,5000,"",""]',
        b'[1,"1",69,"",""]'.replace(b'"1"', b"1.0"),
        b'[1,1,69,"zz",""]',
        b'[1,1,69,5,""]',
        b'[1,1,69,"",[1]]',
        b'[1,true,69,"",""]',
        b'[1, 1,69,"",""]',
        b"nonsense",
    ],
)
async def test_line_in_another_format_is_damage(opened: Open, path: Path, text: bytes) -> None:
    write(path, b"%08x %s\n" % (zlib.crc32(text), text))
    pending = await opened()
    assert pending.entries == []
    assert len(pending.damaged) == 1


async def test_repeated_damage_keeps_every_copy(opened: Open, path: Path) -> None:
    for number in range(1, 4):
        write(path, b"damage %d\n" % number)
        pending = await opened()
        assert pending.damaged == [path.with_name(f"{path.name}.damaged-{number}")]
        await pending.add(ADA, WITHIN)
        await pending.close()
    assert [read(path.with_name(f"{path.name}.damaged-{number}")) for number in range(1, 4)] == [
        b"damage %d\n" % number for number in range(1, 4)
    ]


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def too_large(path: Path) -> None:
    path.write_bytes(b"x" * 11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_folder, "is not a regular file; check the path"),
        (a_link, "pending revocations cannot be stored"),
        (a_fifo, "is not a regular file; check the path"),
        (too_large, "larger than 10 bytes"),
    ],
)
async def test_path_that_is_not_a_regular_file_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], message: str
) -> None:
    make(path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match=message):
        await PendingRevocations(path).open()


async def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pending revocations cannot be stored: No such file"):
        await PendingRevocations(tmp_path / "none" / "revocations.pending").open()


async def test_file_readable_by_others_becomes_private(opened: Open, path: Path) -> None:
    write(path, b"")
    await opened()
    assert mode(path) == 0o600


# --- several processes --------------------------------------------------------------------------------------


async def test_processes_of_one_home_use_different_files(opened: Open, path: Path) -> None:
    first, second = await opened(), await opened()
    await first.add(one(1), WITHIN)
    await second.add(one(2), WITHIN)
    assert (first.entries, second.entries) == ([one(1)], [one(2)])
    assert is_there(path.with_name("revocations-2.pending"))
    third = await opened()  # files of running processes are not used
    assert third.entries == []


async def test_file_of_an_ended_process_is_taken_over(opened: Open, path: Path) -> None:
    first, second, third = await opened(), await opened(), await opened()
    for number, pending in enumerate((first, second, third)):
        await pending.add(one(number), WITHIN)
    await second.close()
    await first.close()
    again = await opened()
    assert again.entries == [one(0), one(1)]
    assert not is_there(path.with_name("revocations-2.pending"))
    assert third.entries == [one(2)]
    await third.close()
    assert await reopened(again, path) == [one(0), one(1), one(2)]


async def test_file_of_a_process_that_ends_later_is_taken_over_by_one_that_runs(
    opened: Open, path: Path
) -> None:
    first, second, third = await opened(), await opened(), await opened()
    for number, pending in enumerate((first, second, third)):
        await pending.add(one(number), WITHIN)
    await second.add(one(0, WALL + 1), WITHIN)
    await first.take_left(WITHIN)  # of running processes nothing is taken
    assert first.entries == [one(0)]
    await second.close()
    await first.take_left(WITHIN)
    assert first.entries == [one(0), one(1)]
    assert not is_there(path.with_name("revocations-2.pending"))
    await first.take_left(WITHIN)
    assert third.entries == [one(2)]
    again = await opened()  # with the number that is free
    await again.add(one(3), WITHIN)
    assert is_there(path.with_name("revocations-2.pending"))
    await again.close()
    await third.close()
    assert await reopened(first, path) == [one(0), one(1), one(3), one(2)]


async def test_file_that_cannot_be_taken_over_stays(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await opened(), await opened()
    await second.add(one(1), WITHIN)
    await second.close()

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_file", fail)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await first.take_left(WITHIN)
    assert await reopened(first, path) == [one(1)]


def test_all_processes_of_the_largest_server_have_a_file_each_during_an_upgrade(tmp_path: Path) -> None:
    def workers(count: int) -> int | None:
        overrides = {"server.workers": count}
        return load_config(None, home=tmp_path, environ={}, overrides=overrides).server.workers

    most = 256
    assert workers(most) == most
    with pytest.raises(ConfigError):
        workers(most + 1)
    assert 2 * (most + 1) <= module.MAX_PROCESSES


async def test_processes_of_one_home_are_bounded(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PROCESSES", 2)
    await opened()
    await opened()
    with pytest.raises(ConfigError, match="2 processes use this home"):
        await opened()


KILLED = """
import asyncio, sys
from pathlib import Path
from zcproto.stores.pending import PendingRevocations, Revocation

async def main():
    pending = PendingRevocations(Path(sys.argv[1]))
    await pending.open()
    number = len(pending)
    while True:
        await pending.add(Revocation(1, number.to_bytes(16, "big")), 10)
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


async def found_in(path: Path) -> list[int]:
    pending = PendingRevocations(path)
    await pending.open()
    assert pending.damaged == []
    await pending.close()
    return [int.from_bytes(entry.id, "big") for entry in pending.entries]


def test_stored_revocations_survive_sigkill(path: Path) -> None:
    for count in (1, 40, 15):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as process:
            assert process.stdout is not None
            for _ in range(count):
                promised = int(process.stdout.readline())
            process.kill()
        found = asyncio.run(found_in(path))
        assert found == list(range(len(found)))
        assert len(found) > promised
