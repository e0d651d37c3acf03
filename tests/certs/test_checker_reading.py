"""A checker of a process that only reads what another one issues."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.certs.harness import MANAGED, Harness, kinds, managed_harness
from tests.certs.support import DAY
from zcproto.certs.settings import CertificateSettings, ManagedSite
from zcproto.errors import CertificateError
from zcproto.tls.context import ClientTrust

pytestmark = pytest.mark.usefixtures("quick_keys")


class ReadingHarness(Harness):
    """A checker that issues nothing."""

    maintains = False


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_reader_serves_what_the_issuer_has_renewed_and_issues_nothing(tmp_path: Path) -> None:
    issuer = managed_harness(tmp_path)
    issuer.check()
    reader = ReadingHarness(issuer.settings)
    reader.check()
    assert reader.served.leaf_sha256 == issuer.served.leaf_sha256
    assert reader.checker.status(reader.now)[-1].names  # the authority
    before = content(tmp_path / "certs")
    for _ in range(120):
        assert kinds(reader.check(DAY)) == []
    assert content(tmp_path / "certs") == before
    issuer.now = reader.now
    assert "renewed" in kinds(issuer.check())
    found = reader.check()
    assert kinds(found) == ["loaded"]
    assert found.serving is not None
    assert found.serving.pairs[0].leaf_sha256 == issuer.served.leaf_sha256


def test_reader_without_issued_certificates_does_not_start(tmp_path: Path) -> None:
    reader = ReadingHarness(managed_harness(tmp_path).settings)
    with pytest.raises(CertificateError, match="has left none that can be served; look for its errors"):
        reader.check()
    assert not (tmp_path / "certs").exists()


def test_reader_announces_the_next_pins_of_the_issuer(tmp_path: Path) -> None:
    issuer = managed_harness(tmp_path, renew_key=True)
    issuer.check()
    reader = ReadingHarness(issuer.settings)
    assert reader.check().next_pins is None
    announced = issuer.check(55 * DAY)
    assert announced.next_pins is not None
    assert reader.check(55 * DAY).next_pins == announced.next_pins
    assert ReadingHarness(issuer.settings).check().next_pins == announced.next_pins
    issuer.check(8 * DAY)
    assert reader.check(8 * DAY).next_pins is None
    assert reader.served.leaf_sha256 == issuer.served.leaf_sha256


def test_reader_neither_makes_nor_signs_the_client_authority(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    trust = ClientTrust(directory / "client-ca.crt", directory / "client-ca.crl")
    issuer = Harness(
        CertificateSettings(ManagedSite(directory, MANAGED), clients=trust, client_directory=directory)
    )
    issuer.check()
    reader = ReadingHarness(issuer.settings)
    reader.check()
    before = content(directory)
    reader.check(20 * DAY)
    assert content(directory) == before
    (directory / "client-ca.crt").unlink()
    with pytest.raises(CertificateError, match=r"client-ca\.crt"):
        ReadingHarness(issuer.settings).check()
    assert not (directory / "client-ca.crt").exists()
