"""The client CA over the years: renewal, loss, unsafe files, crashes."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.certs.client_folder import WHEN, CertificateFolder, folder
from tests.certs.support import DAY, build, der, pem, pem_of_key
from tests.helpers import raising
from zcproto.certs import client_ca, files
from zcproto.certs.issued import Issued, render_list
from zcproto.errors import CertificateError

__all__ = ["folder"]


# --- the authority over the years, and its loss ----------------------------------------------------------


def test_client_authority_is_renewed_with_its_key_before_a_certificate_could_outlive_it(
    folder: CertificateFolder,
) -> None:
    old = folder.issue("ada", lifetime=1826 * DAY)
    first = folder.ca
    folder.now = first.not_valid_after_utc - 1826 * DAY
    folder.issue("bob", lifetime=1826 * DAY)
    assert folder.ca == first
    folder.now += timedelta(seconds=1)
    new = folder.issue("carol", lifetime=1826 * DAY)
    assert folder.ca != first
    assert (folder.ca.subject, folder.ca.public_key()) == (first.subject, first.public_key())
    assert folder.verify(new.certificate).endswith(": OK\n")
    folder.now = old.not_after - timedelta(seconds=1)
    folder.refresh()
    assert folder.verify(old.certificate).endswith(": OK\n")


def test_lost_client_authority_certificate_is_reissued(folder: CertificateFolder) -> None:
    issued = folder.issue()
    for damage in (None, b"damaged"):
        folder.path("client-ca.crt").unlink()
        if damage is not None:
            folder.path("client-ca.crt").touch(0o600)
            folder.path("client-ca.crt").write_bytes(damage)
        folder.refresh()
        assert folder.verify(issued.certificate).endswith(": OK\n")


def test_rsa_key_of_the_client_authority_counts_as_missing(folder: CertificateFolder, rsa_key: Any) -> None:
    folder.issue()
    folder.path("client-ca.key").write_bytes(pem_of_key(rsa_key))
    with pytest.raises(
        CertificateError, match=r"client-ca\.key: the key is rsa-\d+ instead of ecdsa; no client"
    ):
        folder.issue("bob")


def test_lost_client_authority_key_stops_issuing_and_revoking_but_keeps_the_crl(
    folder: CertificateFolder,
) -> None:
    issued = folder.issue()
    folder.path("client-ca.key").unlink()
    for act in (lambda: folder.issue("bob"), lambda: folder.revoke("ada")):
        with pytest.raises(
            CertificateError, match=r"client-ca\.key: does not exist, so no client certificate can be issued"
        ):
            act()
    due = folder.refresh()
    assert due is not None
    folder.now = due
    assert folder.refresh() == due + DAY
    assert "could not be signed again" in folder.sentences[-1]
    assert folder.verify(issued.certificate).endswith(": OK\n")
    end = folder.crl.next_update_utc
    assert end is not None
    folder.now = end + timedelta(seconds=1)
    with pytest.raises(
        CertificateError, match=r"client-ca\.crl: must be signed again: .*client-ca\.key: does not"
    ):
        folder.refresh()
    folder.path("client-ca.crl").unlink()
    with pytest.raises(CertificateError, match="must be signed again"):
        folder.refresh()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (b"damaged", "contains no PEM key"),
        (pem_of_key(rsa.generate_private_key(65537, 1024)), "1024 bits"),
        (pem_of_key(ec.generate_private_key(ec.SECP256R1())), "does not belong to"),
    ],
)
def test_wrong_client_authority_key_is_reported(folder: CertificateFolder, key: bytes, said: str) -> None:
    folder.issue()
    folder.path("client-ca.key").write_bytes(key)
    with pytest.raises(CertificateError, match=said) as caught:
        folder.issue("bob")
    assert "move all client-ca.* files away" in str(caught.value)


def test_client_authority_without_certificate_and_valid_key_is_missing(folder: CertificateFolder) -> None:
    folder.issue()
    folder.path("client-ca.crt").unlink()
    folder.path("client-ca.key").write_bytes(b"damaged")
    with pytest.raises(CertificateError, match="contains no PEM key"):
        folder.issue("bob")


@pytest.mark.parametrize("kind", ["foreign", "unreadable"])
def test_client_authority_of_another_issuer_is_never_used(
    folder: CertificateFolder, ec_key: Any, kind: str
) -> None:
    files.make_folder(folder.directory)
    key = ec_key if kind == "foreign" else ed25519.Ed25519PrivateKey.generate()
    certificate = build(key, algorithm=hashes.SHA256() if kind == "foreign" else None)
    data = pem(certificate)
    if kind == "unreadable":  # a key of an algorithm that is unknown
        changed = der(certificate).replace(b"\x06\x03\x2b\x65\x70", b"\x06\x03\x2b\x65\x7f")
        data = pem(x509.load_der_x509_certificate(changed))
    folder.path("client-ca.crt").touch(0o600)
    folder.path("client-ca.crt").write_bytes(data)
    with pytest.raises(
        CertificateError, match=r"was not created here and is never replaced.*tls\.client_ca_file"
    ):
        folder.ensure()
    assert folder.path("client-ca.crt").read_bytes() == data


def test_new_client_authority_sets_the_old_crl_aside(folder: CertificateFolder) -> None:
    issued = folder.issue()
    folder.revoke("ada")
    folder.path("client-ca.crt").unlink()
    folder.path("client-ca.key").unlink()
    folder.ensure()
    assert folder.path("client-ca.crl.aside").exists()
    assert folder.revoked == {issued.serial}
    with pytest.raises(CertificateError, match="was not issued by"):
        folder.issue()


# --- files that are not safe -----------------------------------------------------------------------------


def test_files_that_others_can_change_or_read_are_refused(folder: CertificateFolder) -> None:
    folder.issue()
    for name, mode in (("client-ca.key", 0o640), ("client-ca.issued", 0o622), ("client-ca.crl", 0o622)):
        folder.path(name).chmod(mode)
        with pytest.raises(CertificateError, match=rf"{name}: .*chmod"):
            folder.issue("bob")
        folder.path(name).chmod(0o600)
    folder.directory.chmod(0o755)
    for act in (lambda: folder.issue("bob"), lambda: folder.revoke("ada"), folder.refresh, folder.ensure):
        with pytest.raises(CertificateError, match="chmod 700"):
            act()


def test_wait_for_the_lock_is_reported(folder: CertificateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.ensure()
    tries = iter([BlockingIOError(), None])

    def flock(descriptor: int, how: int) -> None:
        error = next(tries)
        if error is not None:
            raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    folder.refresh()
    assert (
        folder.sentences[-1]
        == f"Waiting for another process that is changing the certificates in {folder.directory}."
    )


def test_system_error_becomes_a_certificate_error(
    folder: CertificateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.ensure()
    monkeypatch.setattr(files, "_stage", raising(OSError(28, "No space left on device")))
    with pytest.raises(CertificateError, match="No space left on device"):
        folder.issue()
    assert client_ca.issued_clients(folder.directory) == ()


# --- a crash at any moment -------------------------------------------------------------------------------


class Stopped(BaseException):
    """The process ends here; nothing of it runs on."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends everything at the step of that number: before a file is staged, or renamed into its place."""
    left = [-1]

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            step(*arguments)

        return run

    def set_left(count: int) -> None:
        left[0] = count

    monkeypatch.setattr(files, "_stage", counted(files._stage))
    monkeypatch.setattr(files, "_promote", counted(files._promote))
    yield set_left
    left[0] = -1


def acts(kind: str) -> tuple[Callable[[CertificateFolder], None], Callable[[CertificateFolder], object]]:
    """What was there before, and what is stopped in the middle."""
    prepare: dict[str, Callable[[CertificateFolder], None]] = {
        "first": lambda folder: None,
        "issue": lambda folder: folder.issue("bob") and None,
        "renew": lambda folder: folder.issue("ada") and None,
        "revoke": lambda folder: folder.issue("ada") and None,
    }
    act: dict[str, Callable[[CertificateFolder], object]] = {
        "first": lambda folder: folder.issue("ada"),
        "issue": lambda folder: folder.issue("ada"),
        "renew": lambda folder: folder.issue("ada", renew=True),
        "revoke": lambda folder: folder.revoke("ada"),
    }
    return prepare[kind], act[kind]


@pytest.mark.parametrize(("kind", "steps"), [("first", 14), ("issue", 6), ("renew", 4), ("revoke", 4)])
def test_crash_at_any_step_can_be_continued(
    tmp_path: Path, stop_after: Callable[[int], None], kind: str, steps: int
) -> None:
    prepare, act = acts(kind)
    for step in range(steps + 1):
        folder = CertificateFolder(tmp_path / str(step))
        prepare(folder)
        stop_after(step)
        if step == steps:
            act(folder)  # so many steps it has, and no more
            break
        with pytest.raises(Stopped):
            act(folder)
        stop_after(-1)
        written = {path.name: path for path in folder.directory.rglob("ada.crt")}
        if "ada.crt" in written and kind != "revoke":  # every installed certificate is in the list
            serial = f"{x509.load_pem_x509_certificate(written['ada.crt'].read_bytes()).serial_number:X}"
            assert serial in [serial for serial, *_ in folder.listed]
        folder.refresh()
        folder.issue("ada", renew=True) if kind != "revoke" else folder.revoke("ada")
        certificate = x509.load_pem_x509_certificate(folder.path("clients/ada.crt").read_bytes())
        key = serialization.load_pem_private_key(folder.path("clients/ada.key").read_bytes(), None)
        assert key.public_key() == certificate.public_key()
        assert certificate.issuer == folder.ca.subject
        assert (f"{certificate.serial_number:X}" in folder.revoked) == (kind == "revoke")
        assert not [name for name in folder.files() if name.endswith((".new", ".aside"))]


def test_interrupted_revocation_is_finished_by_the_next_crl_refresh(
    folder: CertificateFolder, stop_after: Callable[[int], None]
) -> None:
    issued = folder.issue()
    stop_after(2)  # the list is in place, the signed one is not
    with pytest.raises(Stopped):
        folder.revoke("ada")
    stop_after(-1)
    assert folder.revoked == set()
    folder.refresh()
    assert folder.revoked == {issued.serial}


def test_large_fleet_fits_into_the_list(folder: CertificateFolder) -> None:
    folder.ensure()
    count = 8_000
    fleet = [Issued(number + 1, f"device-{number:05}.fleet", WHEN + DAY) for number in range(count)]
    path = folder.path("client-ca.issued")
    path.write_bytes(render_list(fleet))
    folder.issue("ada")
    folder.revoke("ada")
    assert len(client_ca.issued_clients(folder.directory)) == count + 1


def test_folder_can_be_copied(folder: CertificateFolder, tmp_path: Path) -> None:
    issued = folder.issue()
    copy = CertificateFolder(tmp_path / "copy")
    shutil.copytree(folder.directory, copy.directory)
    copy.revoke("ada")
    assert copy.revoked == {issued.serial}
    assert folder.revoked == set()
