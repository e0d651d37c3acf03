from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from zcproto.errors import CertificateError

from .support import DAY, NOW, build, der, ensure, pem, pem_of, pem_of_key


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_authority_is_made_once(made: Path) -> None:
    before = (made / "ca.crt").read_bytes(), (made / "ca.key").read_bytes()
    ensure(made, now=NOW + 80 * DAY)
    assert ((made / "ca.crt").read_bytes(), (made / "ca.key").read_bytes()) == before


def test_a_lost_certificate_of_the_authority_is_made_again_from_its_key(made: Path) -> None:
    old = read(made / "ca.crt")
    leaf = (made / "server.crt").read_bytes()
    (made / "ca.crt").unlink()
    told: list[str] = []
    ensure(made, progress=told.append)
    new = read(made / "ca.crt")
    assert new.subject == old.subject
    assert new.public_key() == old.public_key()
    assert new.serial_number != old.serial_number
    assert (made / "server.crt").read_bytes() == leaf
    assert told == [f"Renewed {made}/ca.crt with its key, until 2036-05-31."]


def test_a_damaged_certificate_of_the_authority_is_put_aside_and_made_again(made: Path) -> None:
    (made / "ca.crt").write_bytes(b"junk")
    told: list[str] = []
    ensure(made, progress=told.append)
    assert (made / "ca.crt.aside").read_bytes() == b"junk"
    read(made / "server.crt").verify_directly_issued_by(read(made / "ca.crt"))
    assert told[0].endswith(f"It is put aside as {made}/ca.crt.aside.")


@pytest.mark.parametrize(
    "when", [3652 * DAY - 90 * DAY + DAY, 4000 * DAY, -2 * DAY], ids=["due", "expired", "early"]
)
def test_the_authority_is_renewed_with_its_key_when_a_leaf_could_outlive_it(made: Path, when: Any) -> None:
    old = read(made / "ca.crt")
    (one, _) = ensure(made, now=NOW + when)
    new = read(made / "ca.crt")
    assert new.public_key() == old.public_key()
    assert new.subject == old.subject
    assert new.not_valid_after_utc > one.not_after == (NOW + when + 90 * DAY).replace(microsecond=0)
    assert new.not_valid_before_utc <= one.not_before


def test_the_authority_is_not_renewed_before_that(made: Path) -> None:
    old = (made / "ca.crt").read_bytes()
    ensure(made, now=NOW + 3652 * DAY - 91 * DAY)
    assert (made / "ca.crt").read_bytes() == old


def fail_to_write(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full for the file of this name."""
    real = os.open

    def full(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_EXCL and Path(path).name == f".{name}.new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", full)


def test_an_authority_that_cannot_be_renewed_is_kept_while_it_is_valid(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read(made / "ca.crt")
    fail_to_write(monkeypatch, "ca.crt")
    told: list[str] = []
    (one, _) = ensure(made, now=NOW + 3600 * DAY, progress=told.append)
    assert one.not_after == old.not_valid_after_utc
    assert f"{made}/ca.crt could not be renewed: {made}/ca.crt: cannot be written: No space left" in told[0]
    with pytest.raises(CertificateError, match=r"ca\.crt: cannot be written: No space left on device"):
        ensure(made, now=NOW + 3700 * DAY)


def test_without_the_key_of_the_authority_the_leaves_are_served_until_they_expire(made: Path) -> None:
    (made / "ca.key").unlink()
    before = [(made / name).read_bytes() for name in ("server.crt", "server-ecdsa.crt")]
    told: list[str] = []
    ensure(made, progress=told.append)
    assert told == []
    pairs = ensure(made, now=NOW + 80 * DAY, progress=told.append)
    assert [pair.certificate.read_bytes() for pair in pairs] == before
    assert len(told) == 2
    assert told[0].startswith(
        f"{made}/server.crt could not be renewed (it expires on 2026-08-30 12:30 UTC): {made}/ca.key: does not"
        " exist, so no certificate can be issued; put the right one back, or move ca.crt and"
    )
    with pytest.raises(
        CertificateError, match=r"ca\.key: does not exist, so no certificate can be issued; put the"
    ):
        ensure(made, now=NOW + 91 * DAY)
    with pytest.raises(CertificateError, match=r"must be made \(it lacks the name new\.example\): .*ca\.key"):
        ensure(made, names=["new.example"])
    assert not (made / "ca.key").exists()


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("other", r"ca\.key: is not the key of .*ca\.crt; put the right one back"),
        ("ec", r"ca\.key: is no RSA key of at least 2048 bits; put the right one back"),
        (b"junk", r"ca\.key: holds no PEM key that can be read; restore it; put the right one back"),
    ],
)
def test_a_wrong_key_of_the_authority_is_as_good_as_none(
    made: Path, other_rsa_key: Any, ec_key: Any, key: Any, says: str
) -> None:
    keys = {"other": pem_of_key(other_rsa_key), "ec": pem_of_key(ec_key)}
    data = keys.get(key, key)
    (made / "ca.key").write_bytes(data)
    assert len(ensure(made)) == 2
    with pytest.raises(CertificateError, match=says):
        ensure(made, now=NOW + 91 * DAY)
    assert (made / "ca.key").read_bytes() == data


def test_an_authority_of_which_nothing_can_be_read_is_told(made: Path) -> None:
    (made / "ca.crt").unlink()
    (made / "ca.key").write_bytes(b"junk")
    with pytest.raises(CertificateError, match=r"ca\.key: holds no PEM key"):
        ensure(made)
    (made / "ca.key").rename(made / "ca.crt")
    with pytest.raises(CertificateError, match=r"ca\.crt: holds no PEM certificate"):
        ensure(made)
    assert (made / "ca.crt").read_bytes() == b"junk"


def test_a_key_of_the_authority_that_others_can_read_stops_the_start(made: Path) -> None:
    (made / "ca.key").chmod(0o640)
    with pytest.raises(CertificateError, match=r"ca\.key: others can read .*; run `chmod 600 .*ca\.key`"):
        ensure(made)


def test_an_authority_made_by_others_is_never_replaced(made: Path, rsa_key: Any, ec_key: Any) -> None:
    for key in (rsa_key, ec_key):
        foreign = pem(build(key, subject="A company's CA"))
        (made / "ca.crt").write_bytes(foreign)
        (made / "ca.key").write_bytes(pem_of_key(key))
        with pytest.raises(
            CertificateError, match=r"ca\.crt: was not made here and is never replaced; move it"
        ):
            ensure(made, now=NOW + 5000 * DAY)
        assert (made / "ca.crt").read_bytes() == foreign


def test_an_authority_with_a_key_of_an_unknown_kind_is_never_replaced(made: Path, ec_key: Any) -> None:
    ec_public_key = bytes.fromhex("06072a8648ce3d0201")  # RFC 5480 section 2.1.1
    data = der(build(ec_key))
    assert data.count(ec_public_key) == 1
    unknown = pem_of(data.replace(ec_public_key, ec_public_key[:-1] + b"\x7f"))
    (made / "ca.crt").write_bytes(unknown)
    with pytest.raises(CertificateError, match=r"ca\.crt: was not made here and is never replaced"):
        ensure(made)
    assert (made / "ca.crt").read_bytes() == unknown


def test_leaves_without_an_authority_are_not_overwritten(made: Path) -> None:
    for name in ("ca.crt", "ca.key"):
        (made / name).unlink()
    leaf = (made / "server.crt").read_bytes()
    with pytest.raises(CertificateError, match=r"server\.crt: was not issued by the own authority"):
        ensure(made)
    assert (made / "server.crt").read_bytes() == leaf
    assert not (made / "ca.crt").exists()
    for path in made.glob("server*"):
        path.unlink()
    assert len(ensure(made)) == 2


def test_a_copied_folder_goes_on_working(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    assert [one.pin for one in ensure(made)] == [one.pin for one in ensure(tmp_path / "copy")]
