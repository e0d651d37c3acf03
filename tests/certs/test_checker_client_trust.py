"""Client authorities and revocation lists (CRL) as a checker watches and renews them."""

from __future__ import annotations

import errno
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from tests.certs.harness import (
    HOUR,
    MANAGED,
    Harness,
    external_site,
    kinds,
    messages,
    write,
)
from tests.certs.support import DAY, NOW, build, pem
from tests.helpers import raising
from zcproto.certs import client_ca, sources
from zcproto.certs.settings import CertificateSettings, ManagedSite
from zcproto.certs.sources import Origin
from zcproto.errors import CertificateError
from zcproto.tls.context import ClientTrust

pytestmark = pytest.mark.usefixtures("quick_keys")


def revocations(key: Any, until: datetime | None = NOW + 90 * DAY, serial: int = 7) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clients")])
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(NOW - DAY)
    builder = builder.next_update(until or NOW + DAY).add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def client_trust_harness(folder: Path, key: Any, crl: bytes | None) -> Harness:
    write(folder, "site", key, "a.example", not_after=NOW + 90 * DAY)
    (folder / "ca.pem").write_bytes(
        pem(build(key, subject="clients", not_after=NOW + 400 * DAY))
        + pem(build(key, subject="clients of old", not_after=NOW + 50 * DAY))
    )
    if crl is not None:
        (folder / "crl.pem").write_bytes(crl)
    trust = ClientTrust(folder / "ca.pem", None if crl is None else folder / "crl.pem")
    return Harness(CertificateSettings(external_site(folder, "site"), clients=trust))


def test_changed_client_authorities_are_reported(tmp_path: Path, ec_key: Any) -> None:
    harness = client_trust_harness(tmp_path, ec_key, None)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert harness.check().serving is None
    (tmp_path / "ca.pem").write_bytes(pem(build(ec_key, not_after=NOW + 400 * DAY)))
    outcome = harness.check()
    assert kinds(outcome) == ["client_trust_loaded"]
    assert outcome.serving is not None  # each context contains the authorities


def test_changed_crl_is_reported(tmp_path: Path, ec_key: Any) -> None:
    harness = client_trust_harness(tmp_path, ec_key, revocations(ec_key))
    harness.check()
    (tmp_path / "crl.pem").write_bytes(revocations(ec_key, serial=8) + revocations(ec_key))
    outcome = harness.check()
    assert kinds(outcome) == ["client_trust_loaded"]
    assert outcome.serving is not None
    assert messages(outcome) == f"Loaded {tmp_path}/ca.pem and {tmp_path}/crl.pem for clients' certificates."


@pytest.mark.parametrize("name", ["ca.pem", "crl.pem"])
@pytest.mark.parametrize("data", [b"", b"junk", "cut", "bad", None])
def test_bad_client_trust_files_change_nothing_but_prevent_a_start(
    tmp_path: Path, ec_key: Any, name: str, data: Any
) -> None:
    harness = client_trust_harness(tmp_path, ec_key, revocations(ec_key))
    harness.check()
    good = (tmp_path / name).read_bytes()
    if data is None:
        (tmp_path / name).unlink()
    elif data == "bad":
        lines = good.splitlines(keepends=True)
        (tmp_path / name).write_bytes(lines[0] + lines[1] + lines[-1])
    else:
        (tmp_path / name).write_bytes(good[:200] if data == "cut" else data)
    outcomes = harness.checks(200)
    assert kinds(*outcomes) == ["files_bad"]
    assert not any(outcome.serving for outcome in outcomes)
    assert f"{tmp_path / name}: " in messages(*outcomes)
    harness.restart()
    with pytest.raises(CertificateError):
        harness.check()


def test_unparsable_name_in_a_client_authority_is_an_error(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = client_trust_harness(tmp_path, ec_key, None)

    def fail(name: x509.Name) -> str:
        raise ValueError("bad")

    monkeypatch.setattr(sources, "_expiring", fail)
    with pytest.raises(CertificateError, match=r"ca\.pem: contains a certificate that cannot be parsed"):
        harness.check()


def test_crl_without_expiry_is_refused(tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = client_trust_harness(tmp_path, ec_key, revocations(ec_key))

    class Endless:
        next_update_utc = None

    monkeypatch.setattr(x509, "load_pem_x509_crl", lambda data: Endless())
    with pytest.raises(CertificateError, match="without an expiry"):
        harness.check()


def test_expiry_of_client_authorities_and_crls_is_reported(tmp_path: Path, ec_key: Any) -> None:
    harness = client_trust_harness(tmp_path, ec_key, revocations(ec_key, NOW + 40 * DAY))
    harness.check()
    harness.checks(9)
    outcome = harness.check(15 * DAY)
    assert [(notice.path, notice.days) for notice in outcome.notices] == [(str(tmp_path / "crl.pem"), 30)]
    outcome = harness.check(10 * DAY)
    assert [(notice.path, notice.days) for notice in outcome.notices] == [(str(tmp_path / "ca.pem"), 30)]
    ends = [one for one in harness.checker.status(harness.now) if one.source is Origin.CLIENT_AUTHORITY]
    assert [one.names for one in ends] == [("CN=clients",), ("CN=clients of old",)]


def managed_clients(folder: Path) -> Harness:
    directory = folder / "certs"
    trust = ClientTrust(directory / "client-ca.crt", directory / "client-ca.crl")
    return Harness(
        CertificateSettings(ManagedSite(directory, MANAGED), clients=trust, client_directory=directory)
    )


def test_managed_client_authority_is_created_and_a_revocation_is_detected(tmp_path: Path) -> None:
    harness = managed_clients(tmp_path)
    assert kinds(harness.check()) == ["renewed"]
    assert (tmp_path / "certs" / "client-ca.crl").exists()
    harness.checks(3)
    client_ca.issue_client(tmp_path / "certs", "ada", lifetime=30 * DAY, now=harness.now)
    assert kinds(harness.check()) == []
    client_ca.revoke_client(tmp_path / "certs", name="ada", now=harness.now)
    outcome = harness.check()
    assert kinds(outcome) == ["client_trust_loaded"]


def test_managed_crl_is_signed_again_before_it_expires(tmp_path: Path) -> None:
    harness = managed_clients(tmp_path)
    harness.check()
    outcomes = harness.checks(133, 3 * DAY)
    assert 12 <= kinds(*outcomes).count("client_trust_loaded") <= 15
    assert set(kinds(*outcomes)) == {"client_trust_loaded", "renewed"}
    assert kinds(harness.check(sleeps=-500 * DAY)).count("client_trust_loaded") == 1


def test_managed_crl_that_cannot_be_signed_is_reported_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_clients(tmp_path)
    harness.checks(5)
    with monkeypatch.context() as patch:
        patch.setattr(client_ca, "refresh_crl", raising(CertificateError("no")))
        outcomes = harness.checks(48, HOUR)
        assert kinds(*outcomes) == ["renewal_failed", "renewal_failed"]
        assert {notice.path for outcome in outcomes for notice in outcome.notices} == {
            str(tmp_path / "certs" / "client-ca.crl")
        }
    assert kinds(*harness.checks(12, HOUR)) == ["renewal_recovered"]


def test_missing_managed_client_authority_is_not_retried_as_overdue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_clients(tmp_path)
    harness.checks(3)
    monkeypatch.setattr(client_ca, "refresh_crl", lambda *arguments, **named: None)
    assert kinds(*harness.checks(5, HOUR)) == []


def test_existing_client_trust_files_suffice_for_a_start_if_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_clients(tmp_path)
    harness.check()
    harness.restart()
    with monkeypatch.context() as patch:
        patch.setattr(client_ca, "ensure_authority", raising(OSError(errno.EIO, "Input/output error")))
        outcome = harness.check()
    assert kinds(outcome) == ["loaded", "renewal_failed"]
    assert "renewal_recovered" in kinds(*harness.checks(90))
    harness.restart()
    monkeypatch.setattr(
        client_ca, "ensure_authority", raising(CertificateError("client-ca.crt: was not made here"))
    )
    with pytest.raises(CertificateError, match=r"^client-ca\.crt: was not made here$"):
        harness.check()


@pytest.mark.parametrize(
    ("name", "mode", "fault"),
    [
        ("", 0o700, ""),
        ("", 0o755, "others can list or change this folder (mode 0755)"),
        ("client-ca.key", 0o644, "client-ca.key: others can read or change this file (mode 0644)"),
        ("client-ca.crt", 0o666, "client-ca.crt: others can change this file (mode 0666)"),
        ("client-ca.crl", 0o666, "client-ca.crl: others can change this file (mode 0666)"),
    ],
)
def test_fault_of_the_client_authority_is_found_before_the_start(
    tmp_path: Path, name: str, mode: int, fault: str
) -> None:
    folder = tmp_path / "certs"
    clients = ClientTrust(*client_ca.paths(folder))
    site = ManagedSite(folder, MANAGED)
    harness = Harness(CertificateSettings(site, clients=clients, client_directory=folder))
    assert harness.checker.faults(NOW) == []
    assert not folder.exists(), "nothing is made by looking"
    harness.check()
    (folder / name).chmod(mode)
    found = harness.checker.faults(harness.now)
    assert all(fault in each for each in found)
    assert bool(found) == bool(fault)
    harness.restart()
    if not fault:
        harness.check()
        return
    with pytest.raises(CertificateError) as refused:
        harness.check()
    assert str(refused.value) in found


def test_client_authority_on_a_bad_disk_suffices_if_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "certs"
    clients = ClientTrust(*client_ca.paths(folder))
    harness = Harness(
        CertificateSettings(ManagedSite(folder, MANAGED), clients=clients, client_directory=folder)
    )
    harness.check()
    monkeypatch.setattr(client_ca, "check_authority", raising(OSError(errno.EIO, "bad disk")))
    assert harness.checker.faults(harness.now) == []


def test_fault_of_external_client_authorities_is_found_before_the_start(tmp_path: Path, ec_key: Any) -> None:
    harness = client_trust_harness(tmp_path, ec_key, None)
    assert harness.checker.faults(NOW) == []
    (tmp_path / "ca.pem").write_bytes(b"?")
    (tmp_path / "site.key").unlink()
    site, clients = harness.checker.faults(NOW)
    assert "site.key: cannot be read: No such file" in site
    assert "ca.pem: contains no PEM certificate" in clients
