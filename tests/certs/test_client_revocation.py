"""Revocation of client certificates, the revocation list (CRL) and the list of issued certificates."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.certs.client_folder import WHEN, CertificateFolder, folder
from tests.certs.support import DAY, openssl, pem
from zcproto.certs import client_ca, files
from zcproto.certs.issued import REASONS, UNKNOWN_NAME
from zcproto.errors import CertificateError

__all__ = ["folder"]


def test_revocation_by_name_revokes_every_certificate_of_the_user(folder: CertificateFolder) -> None:
    first, bob = folder.issue(), folder.issue("bob")
    second = folder.issue(renew=True)
    folder.now += DAY
    revoked = folder.revoke("ada", reason="keyCompromise")
    assert [(entry.serial, entry.revoked_at, entry.reason) for entry in revoked] == [
        (serial, WHEN + DAY, "keyCompromise") for serial in (first.serial, second.serial)
    ]
    assert folder.revoked == {first.serial, second.serial}
    assert folder.listed == [
        (first.serial, "ada", True),
        (bob.serial, "bob", False),
        (second.serial, "ada", True),
    ]
    assert not list(client_ca.revoke_client(folder.directory, name="ada", now=folder.now))


def test_revocation_by_serial_number_revokes_one_certificate(folder: CertificateFolder) -> None:
    first = folder.issue()
    second = folder.issue(renew=True)
    (revoked,) = folder.revoke(serial=first.serial.lower())
    assert (revoked.serial, revoked.name) == (first.serial, "ada")
    assert folder.revoked == {first.serial}
    assert folder.verify(second.certificate).endswith(": OK\n")


def test_first_reason_and_date_of_a_revocation_are_kept(folder: CertificateFolder) -> None:
    folder.issue()
    folder.revoke("ada", reason="superseded")
    number = folder.crl_number
    folder.now += DAY
    assert folder.revoke("ada", reason="keyCompromise") == ()
    (entry,) = folder.crl
    assert entry.revocation_date_utc == WHEN
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == "superseded"
    assert folder.crl_number == number


def test_unspecified_reason_is_omitted_from_the_crl(folder: CertificateFolder) -> None:
    folder.issue()
    (revoked,) = folder.revoke("ada")
    assert revoked.reason == "unspecified"
    (entry,) = folder.crl
    assert list(entry.extensions) == []


@pytest.mark.parametrize("reason", REASONS)
def test_openssl_parses_the_crl(folder: CertificateFolder, reason: str) -> None:
    issued = folder.issue()
    folder.revoke("ada", reason=reason)
    crl, ca = folder.path("client-ca.crl"), folder.path("client-ca.crt")
    text = openssl("crl", "-in", crl, "-noout", "-text", "-CAfile", ca)
    octets = issued.serial.zfill(len(issued.serial) + len(issued.serial) % 2)
    for part in ("Version 2", "CRL Number", "Authority Key Identifier", f"Serial Number: {octets}"):
        assert part in text


def test_revocation_of_an_unknown_name_is_an_error(folder: CertificateFolder) -> None:
    folder.issue()
    with pytest.raises(
        CertificateError, match=r"client-ca\.issued: has no certificate of 'bob'; check the name"
    ):
        folder.revoke("bob")
    with pytest.raises(CertificateError, match="hexadecimal digits"):
        folder.revoke(serial="bob!")


def test_unknown_revocation_reason_is_refused(folder: CertificateFolder) -> None:
    folder.issue()
    for reason in ("", "certificateHold", "removeFromCRL", "key_compromise"):
        with pytest.raises(CertificateError, match="one of: unspecified, keyCompromise"):
            folder.revoke("ada", reason=reason)


def test_revocation_without_an_authority_is_an_error(folder: CertificateFolder) -> None:
    with pytest.raises(CertificateError, match="No such file or directory"):
        folder.revoke("ada")
    files.make_folder(folder.directory)
    with pytest.raises(CertificateError, match="no client certificate was ever issued here"):
        folder.revoke("ada")
    assert folder.files() == {".lock"}


def test_unlisted_serial_number_is_revoked_nevertheless(folder: CertificateFolder) -> None:
    folder.ensure()
    (revoked,) = folder.revoke(serial="4D:2A")
    assert (revoked.serial, revoked.name) == ("4D2A", UNKNOWN_NAME)
    assert folder.revoked == {"4D2A"}
    assert "It is revoked nevertheless." in folder.sentences[-1]
    assert folder.listed == [("4D2A", "?", True)]


# --- the signed list, and when it is signed again ---------------------------------------------------------


def test_crl_refresh_without_an_authority_does_nothing(folder: CertificateFolder) -> None:
    assert folder.refresh() is None
    files.make_folder(folder.directory)
    assert folder.refresh() is None
    assert folder.files() == set()


def test_authority_deleted_while_waiting_for_the_lock_is_missing(
    folder: CertificateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.ensure()
    real = files.locked

    def locked(directory: Path, *arguments: Any) -> Any:
        for path in directory.glob("client-ca.*"):
            path.unlink()
        return real(directory, *arguments)

    monkeypatch.setattr(files, "locked", locked)
    assert folder.refresh() is None


def test_crl_exists_from_the_start(folder: CertificateFolder) -> None:
    assert folder.ensure() == (folder.path("client-ca.crt"), folder.path("client-ca.crl"))
    assert list(folder.crl) == []
    assert folder.crl.last_update_utc == WHEN - timedelta(hours=1)
    assert folder.crl.next_update_utc == WHEN + 365 * DAY
    assert folder.crl_number == int(WHEN.timestamp())
    again = {name: folder.path(name).stat().st_ino for name in folder.files()}
    folder.ensure()
    assert {name: folder.path(name).stat().st_ino for name in folder.files()} == again


def test_crl_is_signed_again_after_a_month(folder: CertificateFolder) -> None:
    folder.ensure()
    first = folder.crl
    due = folder.refresh()
    assert due == WHEN - timedelta(hours=1) + 30 * DAY
    folder.now = due - timedelta(seconds=1)
    assert folder.refresh() == due
    assert folder.crl == first
    folder.now = due
    assert folder.refresh() == due + 30 * DAY - timedelta(hours=1)
    assert folder.crl.next_update_utc == due + 365 * DAY
    assert folder.crl_number > first.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def test_crl_numbers_increase_within_a_second_and_after_a_clock_change(folder: CertificateFolder) -> None:
    folder.issue("ada"), folder.issue("bob")
    folder.revoke("ada")
    number = folder.crl_number
    folder.revoke("bob")
    assert folder.crl_number == number + 1
    folder.now -= 10 * DAY
    folder.refresh()
    assert folder.crl_number == number + 2
    assert folder.crl.last_update_utc < folder.now
    assert len(folder.revoked) == 2


def test_lost_or_damaged_crl_is_signed_again(folder: CertificateFolder, ec_key: Any) -> None:
    issued = folder.issue()
    folder.revoke("ada", reason="keyCompromise")
    path = folder.path("client-ca.crl")
    good = path.read_bytes()
    foreign = x509.CertificateRevocationListBuilder(folder.ca.subject, WHEN - DAY, WHEN + DAY)
    for damage in (
        None,
        b"",
        good[: len(good) // 2],
        pem(folder.ca),
        foreign.sign(ec_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
    ):
        path.unlink()
        if damage is not None:
            path.touch(0o600)
            path.write_bytes(damage)
        folder.sentences.clear()
        folder.refresh()
        assert folder.revoked == {issued.serial}
        assert len(folder.sentences) == (damage is not None)
        (entry,) = folder.crl
        assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == "keyCompromise"


def test_expired_certificates_leave_the_list_and_the_crl(folder: CertificateFolder) -> None:
    ada = folder.issue("ada")
    bob = folder.issue("bob", lifetime=365 * DAY)
    folder.revoke("ada"), folder.revoke("bob")
    folder.now = ada.not_after + 7 * DAY
    folder.refresh()
    assert folder.revoked == {ada.serial, bob.serial}
    folder.now += timedelta(seconds=1)
    folder.issue("carol")
    assert len(folder.listed) == 3  # until the next signed list is without it
    folder.now += 30 * DAY
    folder.refresh()
    assert folder.revoked == {bob.serial}
    folder.revoke("carol")
    assert [(name, revoked) for _, name, revoked in folder.listed] == [("bob", True), ("carol", True)]


def test_revocation_survives_an_old_list_restored_from_a_backup(folder: CertificateFolder) -> None:
    ada = folder.issue("ada")
    backup = folder.path("client-ca.issued").read_bytes()
    bob = folder.issue("bob")
    folder.revoke("ada", reason="keyCompromise"), folder.revoke("bob", reason="superseded")
    folder.path("client-ca.issued").write_bytes(backup)
    folder.now += 40 * DAY
    folder.refresh()
    assert folder.revoked == {ada.serial, bob.serial}
    folder.issue("carol")
    assert [(name, revoked) for _, name, revoked in folder.listed] == [
        ("ada", True),
        ("?", True),
        ("carol", False),
    ]
    assert {entry.reason for entry in client_ca.issued_clients(folder.directory)} == {
        "keyCompromise",
        "superseded",
        "",
    }


def test_lost_list_is_an_error_and_not_an_empty_list(folder: CertificateFolder) -> None:
    ada = folder.issue("ada")
    folder.revoke("ada")
    path = folder.path("client-ca.issued")
    path.unlink()
    for act in (lambda: folder.issue("bob"), lambda: folder.revoke("ada")):
        with pytest.raises(
            CertificateError, match=r"client-ca\.issued: is missing.* create an empty file there"
        ):
            act()
    assert client_ca.issued_clients(folder.directory) == ()
    folder.now += 40 * DAY
    assert folder.refresh() == folder.now + DAY  # the signed list goes on with what it has
    assert folder.revoked == {ada.serial}
    assert "Until then" in folder.sentences[-1]
    path.touch(0o600)
    folder.issue("bob")
    assert [(name, revoked) for _, name, revoked in folder.listed] == [("?", True), ("bob", False)]


@pytest.mark.parametrize("damage", [b"damaged\n", None])
def test_lost_list_and_crl_stop_signing(folder: CertificateFolder, damage: bytes | None) -> None:
    folder.issue("ada")
    folder.path("client-ca.crl").unlink()
    folder.path("client-ca.issued").unlink()
    if damage is not None:
        folder.path("client-ca.issued").touch(0o600)
        folder.path("client-ca.issued").write_bytes(damage)
    for act in (folder.refresh, folder.ensure):
        with pytest.raises(CertificateError, match=r"client-ca\.issued: is "):
            act()
    assert not folder.path("client-ca.crl").exists()


def test_full_list_is_refused(folder: CertificateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.issue("ada", lifetime=DAY)
    folder.issue("bob")
    monkeypatch.setattr(client_ca, "MAX_LIST_BYTES", 350)
    with pytest.raises(CertificateError, match=r"client-ca\.issued: is full with 3 certificates"):
        folder.issue("carol")
    assert not folder.path("clients/carol.crt").exists()
    folder.revoke("ada"), folder.revoke("bob")
    folder.now += 31 * DAY  # ada's is over
    assert folder.issue("carol").certificate.name == "carol.crt"
