from __future__ import annotations

import errno
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from tests.certs.support import DAY, NOW, build, openssl, pem_of_key, pin_of
from tests.helpers import raising
from zcproto.certs import files, rollover
from zcproto.certs.rollover import NextPins
from zcproto.errors import CertificateError

TYPES = ("rsa-2048", "ecdsa-p256")
WHOLE_NOW = NOW.replace(microsecond=0)
LINE = "zcproto next key, announced at 2026-06-01T12:30:15Z, to be used from 2026-06-08T12:30:15Z\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "certs"
    directory.mkdir(0o700)
    return directory


def announce(folder: Path, key: Any, days: float = 7, now: datetime = NOW) -> rollover.NextKey:
    return rollover.announce(folder, key, now + days * DAY, now, lambda sentence: None)


def find(
    folder: Path, now: datetime = NOW, sentences: list[str] | None = None
) -> dict[str, rollover.NextKey]:
    return rollover.find(folder, TYPES, now, [].append if sentences is None else sentences.append)


def put(path: Path, data: bytes, mode: int = 0o600) -> None:
    path.touch(mode)
    path.chmod(mode)
    path.write_bytes(data)


def test_next_key_is_private_and_read_unchanged(folder: Path, rsa_key: Any) -> None:
    sentences: list[str] = []
    old = os.umask(0)
    try:
        next_key = rollover.announce(folder, rsa_key, NOW + 7 * DAY, NOW, sentences.append)
    finally:
        os.umask(old)
    path = folder / "server.next.key"
    assert [one.name for one in folder.iterdir()] == ["server.next.key"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (next_key.path, next_key.announced_at, next_key.use_from) == (path, WHOLE_NOW, WHOLE_NOW + 7 * DAY)
    read = rollover.read(path)
    assert read is not None
    assert pem_of_key(read.key) == pem_of_key(rsa_key)
    assert (read.announced_at, read.use_from, read.pin) == (WHOLE_NOW, WHOLE_NOW + 7 * DAY, next_key.pin)
    assert read.key_type == "rsa-2048"
    assert sentences == [
        f"Announced {path}: the next rsa-2048 key, pin {next_key.pin}, will be used from 2026-06-08 12:30 UTC."
    ]


def test_next_key_file_has_a_header_and_is_parsed_by_openssl(folder: Path, ec_key: Any) -> None:
    announce(folder, ec_key)
    path = folder / "server-ecdsa.next.key"
    assert path.read_bytes() == LINE.encode() + pem_of_key(ec_key)
    assert openssl("pkey", "-in", path).encode() == pem_of_key(ec_key)


@pytest.mark.parametrize("kind", ["rsa_key", "ec_key"])
def test_pin_is_that_of_a_certificate_for_the_key(request: Any, folder: Path, kind: str) -> None:
    key = request.getfixturevalue(kind)
    assert announce(folder, key).pin == pin_of(build(key))


def test_announced_keys_are_read_without_lock_and_changes(folder: Path, rsa_key: Any, ec_key: Any) -> None:
    assert rollover.announced(folder) is None
    assert rollover.announced(folder / "missing") is None
    first = announce(folder, rsa_key)
    assert rollover.announced(folder) == NextPins((first.pin,), WHOLE_NOW + 7 * DAY)
    second = announce(folder, ec_key, days=3)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert rollover.announced(folder) == NextPins((first.pin, second.pin), WHOLE_NOW + 3 * DAY)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert set(rollover.paths(folder)) == set(folder.iterdir())


def test_next_keys_are_found_by_type(folder: Path, rsa_key: Any, ec_key: Any) -> None:
    announce(folder, rsa_key)
    announce(folder, ec_key)
    sentences: list[str] = []
    assert {kind: one.path.name for kind, one in find(folder, sentences=sentences).items()} == {
        "rsa-2048": "server.next.key",
        "ecdsa-p256": "server-ecdsa.next.key",
    }
    assert sentences == []


def damaged(name: str, ec_key: Any) -> bytes:
    whole = LINE.encode() + pem_of_key(ec_key)
    edwards = pem_of_key(ed25519.Ed25519PrivateKey.generate())
    return {
        "empty": b"",
        "junk": b"\xff\0junk" * 100,
        "half": whole[: len(whole) * 2 // 3],
        "no line": pem_of_key(ec_key),
        "half a line": whole[40:],
        "a certificate": LINE.encode() + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "no key": LINE.encode() + b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "no month": whole.replace(b"2026-06-08", b"2026-13-08"),
        "year 0": whole.replace(b"2026-06-08", b"0000-06-08"),
        "another kind": LINE.encode() + edwards,
        "weak": LINE.encode() + pem_of_key(rsa.generate_private_key(65537, 1024)),
        "too large": whole + b" " * files.MAX_FILE_BYTES,
    }[name]


KINDS = ("empty", "junk", "half", "no line", "half a line", "a certificate", "no key", "no month", "year 0")


@pytest.mark.parametrize("name", [*KINDS, "another kind", "weak", "too large"])
def test_damaged_next_key_is_set_aside_and_reported(folder: Path, ec_key: Any, name: str) -> None:
    path = folder / "server-ecdsa.next.key"
    data = damaged(name, ec_key)
    put(path, data)
    sentences: list[str] = []
    assert rollover.announced(folder, sentences.append) is None
    assert sentences.pop().endswith(" It is not announced.")
    assert path.read_bytes() == data
    assert rollover.announced(folder) is None
    assert find(folder, sentences=sentences) == {}
    assert not path.exists()
    assert (folder / "server-ecdsa.next.key.aside").read_bytes() == data
    (sentence,) = sentences
    assert sentence.startswith(f"{path}: ")
    assert sentence.endswith(f"It was set aside as {path}.aside.")
    assert "PRIVATE" not in sentence
    assert find(folder, sentences=sentences) == {}
    assert len(sentences) == 1


def test_next_key_with_a_damaged_private_half_is_not_announced(folder: Path, rsa_key: Any) -> None:
    numbers = rsa_key.private_numbers()
    damaged_key = rsa.RSAPrivateNumbers(
        p=numbers.p,
        q=numbers.q,
        d=numbers.d ^ 8,
        dmp1=numbers.dmp1 ^ 8,
        dmq1=numbers.dmq1,
        iqmp=numbers.iqmp,
        public_numbers=numbers.public_numbers,
    ).private_key(unsafe_skip_rsa_key_validation=True)
    put(folder / "server.next.key", LINE.encode() + pem_of_key(damaged_key))
    sentences: list[str] = []
    assert find(folder, sentences=sentences) == {}
    assert "its private half is damaged" in sentences[0]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_next_key_readable_by_others_is_not_used(folder: Path, ec_key: Any, mode: int) -> None:
    announce(folder, ec_key)
    path = folder / "server-ecdsa.next.key"
    path.chmod(mode)
    sentences: list[str] = []
    assert rollover.announced(folder, sentences.append) is None
    assert find(folder, sentences=sentences) == {}
    assert all("others can read or change this file" in sentence for sentence in sentences)
    assert len(sentences) == 2
    assert not path.exists()


def test_next_key_that_is_not_a_file_is_set_aside(folder: Path) -> None:
    path = folder / "server.next.key"
    path.mkdir()
    os.mkfifo(folder / "server-ecdsa.next.key")
    sentences: list[str] = []
    assert find(folder, sentences=sentences) == {}
    assert all("is not a regular file" in sentence for sentence in sentences)
    assert {one.name for one in folder.iterdir()} == {
        "server.next.key.aside",
        "server-ecdsa.next.key.aside",
    }


def test_disk_that_refuses_everything_stops_nothing(
    folder: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(folder, ec_key)
    sentences: list[str] = []
    refuse = raising(OSError(errno.EIO, "Input/output error"))
    for name in ("exists", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            patch.setattr(Path, "replace", refuse)
            assert find(folder, sentences=sentences) == {}
    assert len(sentences) == 4
    for sentence in sentences:
        assert "Input/output error. It cannot be set aside: Input/output error; move it away." in sentence
    assert len(find(folder)) == 1


@pytest.mark.parametrize(
    ("name", "key"), [("server.next.key", "ec_key"), ("server-ecdsa.next.key", "rsa_key")]
)
def test_key_of_the_other_family_is_set_aside(request: Any, folder: Path, name: str, key: str) -> None:
    put(folder / name, LINE.encode() + pem_of_key(request.getfixturevalue(key)))
    sentences: list[str] = []
    assert find(folder, sentences=sentences) == {}
    assert sentences == [
        f"{folder / name} is a next key of a type that is not configured. It was set aside as"
        f" {folder / name}.aside."
    ]


def test_next_key_of_an_unconfigured_type_is_set_aside(folder: Path, rsa_key: Any) -> None:
    announce(folder, rsa_key)
    assert rollover.find(folder, ("rsa-3072", "ecdsa-p256"), NOW, lambda sentence: None) == {}
    assert (folder / "server.next.key.aside").exists()


def test_staged_announcement_left_by_a_crash_is_deleted(folder: Path, ec_key: Any) -> None:
    put(folder / ".server-ecdsa.next.key.new", LINE.encode() + pem_of_key(ec_key))
    assert find(folder) == {}
    assert list(folder.iterdir()) == []


def test_failed_announcement_keeps_the_one_before(
    folder: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = announce(folder, ec_key)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CertificateError, match=r"next\.key: cannot be written: No space left on device"):
            rollover.announce(folder, first.key, NOW + 20 * DAY, NOW, lambda sentence: None)
    assert find(folder)["ecdsa-p256"].use_from == first.use_from
    assert [path.name for path in folder.iterdir()] == ["server-ecdsa.next.key"]


def test_next_key_can_be_announced_for_another_time(folder: Path, ec_key: Any) -> None:
    first = announce(folder, ec_key)
    moved = rollover.announce(folder, first.key, NOW + 20 * DAY, NOW + DAY, lambda sentence: None)
    assert moved.pin == first.pin
    assert find(folder, NOW + DAY)["ecdsa-p256"].use_from == WHOLE_NOW + 20 * DAY
    assert find(folder, NOW + DAY)["ecdsa-p256"].announced_at == WHOLE_NOW + DAY


def test_used_next_key_is_no_longer_announced(folder: Path, ec_key: Any) -> None:
    next_key = announce(folder, ec_key)
    rollover.delete(next_key)
    rollover.delete(next_key)
    assert list(folder.iterdir()) == []


def test_cancelled_keys_are_set_aside(folder: Path, rsa_key: Any, ec_key: Any) -> None:
    sentences: list[str] = []
    assert rollover.cancel(folder, sentences.append) == ()
    announce(folder, rsa_key)
    announce(folder, ec_key)
    assert rollover.cancel(folder, sentences.append) == rollover.paths(folder)
    assert rollover.announced(folder) is None
    assert sentences[0] == (
        f"{folder}/server.next.key will not be used. It was set aside as {folder}/server.next.key.aside."
    )
    assert len(list(folder.glob("*.aside"))) == len(sentences) == 2


def test_announcement_by_a_clock_that_was_ahead_keeps_its_length(folder: Path, ec_key: Any) -> None:
    announce(folder, ec_key, now=NOW + 3650 * DAY)
    sentences: list[str] = []
    found = find(folder, sentences=sentences)["ecdsa-p256"]
    assert found.use_from == WHOLE_NOW + 7 * DAY
    assert rollover.announced(folder) == NextPins((found.pin,), found.use_from)
    assert len(sentences) == 1
    assert find(folder, NOW + 8 * DAY, sentences)["ecdsa-p256"].use_from == found.use_from
    assert len(sentences) == 1


def test_clock_slightly_ahead_changes_nothing(folder: Path, ec_key: Any) -> None:
    first = announce(folder, ec_key, now=NOW + timedelta(hours=1))
    assert find(folder)["ecdsa-p256"].use_from == first.use_from


def test_failed_correction_of_the_times_is_reported_and_retried(
    folder: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = announce(folder, ec_key, now=NOW + 100 * DAY)
    sentences: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        assert find(folder, sentences=sentences)["ecdsa-p256"].use_from == first.use_from
    assert "could not be corrected: " in sentences[0]
    assert find(folder)["ecdsa-p256"].use_from == WHOLE_NOW + 7 * DAY


def test_times_are_in_utc(folder: Path, ec_key: Any) -> None:
    announce(folder, ec_key)
    read = rollover.read(folder / "server-ecdsa.next.key")
    assert read is not None
    assert read.use_from.tzinfo is read.announced_at.tzinfo is UTC
