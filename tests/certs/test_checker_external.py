"""External certificates as a checker serves them, and the status of all certificates."""

from __future__ import annotations

import shutil
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.certs.harness import (
    MANAGED,
    Harness,
    external_site,
    kinds,
    managed_harness,
    messages,
    write,
)
from tests.certs.support import DAY, NOW, pem_of_key
from tests.common.support import mount_read_only
from zcproto.certs import managed
from zcproto.certs.notices import NoticeKind
from zcproto.certs.settings import CertificateSettings, ManagedSite
from zcproto.certs.sources import Origin
from zcproto.errors import CertificateError

pytestmark = pytest.mark.usefixtures("quick_keys")


@pytest.fixture
def other_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_external_files_are_served_without_issuing_anything(
    tmp_path: Path, ec_key: Any, other_key: Any
) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_after=NOW + 90 * DAY)
    harness = Harness(CertificateSettings(external_site(tmp_path, "site")))
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert (outcome.next_pins, outcome.last_renewal) == (None, None)
    before = harness.served.pin
    write(tmp_path, "site", other_key, "a.example", not_after=NOW + 99 * DAY)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert harness.served.pin != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.crt", "site.key"]


def test_bad_external_files_change_nothing_and_are_reported_once(
    tmp_path: Path, ec_key: Any, other_key: Any
) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_after=NOW + 90 * DAY)
    harness = Harness(CertificateSettings(external_site(tmp_path, "site")))
    harness.check()
    before = harness.served
    (tmp_path / "site.key").write_bytes(pem_of_key(other_key))
    outcomes = harness.checks(500)
    assert kinds(*outcomes) == ["files_bad"]
    assert messages(*outcomes).endswith("The last valid files remain in use.")
    assert harness.served is before
    (tmp_path / "site.key").write_bytes(pem_of_key(ec_key))
    assert kinds(harness.check()) == ["files_recovered"]


def test_rotated_secret_of_kubernetes_is_served(
    tmp_path: Path, ec_key: Any, other_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tls.crt -> ..data/tls.crt, and ..data -> ..VERSION, which is replaced in one step."""
    mount_read_only(monkeypatch)
    tmp_path.chmod(0o1777)

    def publish(version: str, key: Any, days: int) -> None:
        folder = tmp_path / f"..{version}"
        folder.mkdir()
        write(folder, "tls", key, "a.example", not_after=NOW + days * DAY)
        folder.chmod(0o755)
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("one", ec_key, 90)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    harness = Harness(CertificateSettings(external_site(tmp_path, "tls")))
    assert kinds(harness.check()) == ["loaded"]
    before = harness.served.pin
    publish("two", other_key, 99)
    shutil.rmtree(tmp_path / "..one")
    assert kinds(harness.check()) == ["loaded"]
    assert harness.served.pin != before


@pytest.mark.requirement("expiry_alerts")
def test_expiry_of_external_certificates_is_reported_at_each_threshold(
    tmp_path: Path, ec_key: Any, other_key: Any
) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_after=NOW + 40 * DAY)
    harness = Harness(CertificateSettings(external_site(tmp_path, "site"), alert_days=(20, 10)))
    outcomes = harness.checks(45 * 4, timedelta(hours=6))
    found = [notice for outcome in outcomes for notice in outcome.notices][1:]
    assert [(notice.kind, notice.days) for notice in found] == [
        (NoticeKind.EXPIRY, days) for days in (20, 10, 0)
    ]
    write(tmp_path, "site", other_key, "a.example", not_before=NOW, not_after=NOW + 90 * DAY)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded", "expiry_ended"]
    assert "is no longer about to expire" in messages(outcome)


@pytest.mark.parametrize("life", [1, 6, 47, 90])
def test_short_external_certificate_raises_an_alert_only_in_the_last_third_of_its_life(
    tmp_path: Path, ec_key: Any, life: int
) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_before=NOW, not_after=NOW + life * DAY)
    harness = Harness(CertificateSettings(external_site(tmp_path, "site")))
    assert kinds(harness.check(life * DAY / 2)) == ["loaded"]
    assert kinds(harness.check(life * DAY / 8)) == []
    assert kinds(harness.check(life * DAY / 8)) == ["expiry"]


def test_external_sites_are_served_beside_managed_certificates(
    tmp_path: Path, ec_key: Any, other_key: Any
) -> None:
    write(tmp_path, "a", ec_key, "a.example", not_after=NOW + 90 * DAY)
    write(tmp_path, "b", other_key, "*.b.example", not_after=NOW + 90 * DAY)
    sites = (external_site(tmp_path, "a", "a.example"), external_site(tmp_path, "b", "*.b.example"))
    harness = Harness(CertificateSettings(ManagedSite(tmp_path / "certs", MANAGED), sites))
    outcome = harness.check()
    assert kinds(outcome) == ["renewed", "loaded", "loaded"]
    assert outcome.serving is not None
    assert [site.names for site in outcome.serving.sites] == [
        (),
        ("a.example",),
        ("*.b.example",),
    ]
    own_site = outcome.serving.sites[0]
    write(tmp_path, "b", ec_key, "*.b.example", not_after=NOW + 90 * DAY)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert outcome.serving.sites[0] == own_site
    assert [(one.source, one.site) for one in harness.checker.status(harness.now)] == [
        (Origin.OWN, ()),
        (Origin.FILES, ("a.example",)),
        (Origin.FILES, ("*.b.example",)),
        (Origin.AUTHORITY, ()),
    ]


def test_invalid_site_prevents_a_start(tmp_path: Path, ec_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example")
    harness = Harness(
        CertificateSettings(
            ManagedSite(tmp_path / "certs", MANAGED), (external_site(tmp_path, "a", "c.example"),)
        )
    )
    for _ in range(2):
        with pytest.raises(CertificateError, match=r"is not valid for c\.example"):
            harness.check()


def test_bad_site_does_not_delay_other_sites(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example", not_after=NOW + 90 * DAY)
    write(tmp_path, "b", ec_key, "b.example", not_after=NOW + 90 * DAY)
    sites = tuple(external_site(tmp_path, stem, f"{stem}.example") for stem in ("a", "b"))
    harness = Harness(CertificateSettings(ManagedSite(tmp_path / "certs", MANAGED), sites))
    harness.check()
    (tmp_path / "a.crt").unlink()
    write(tmp_path, "b", other_key, "b.example", not_after=NOW + 90 * DAY)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert outcome.serving.sites[2].pairs[0].pin != outcome.serving.sites[1].pairs[0].pin


# --- status and errors


def test_status_lists_all_certificates_in_use(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, key_types=("rsa-2048", "ecdsa-p256"))
    harness.check()
    rsa, ecdsa, ca = harness.checker.status(harness.now + DAY)
    assert (rsa.key_type, ecdsa.key_type, ca.key_type) == ("rsa-2048", "ecdsa-p256", "")
    assert rsa.names == ("zcp.example.com", "localhost")
    assert (rsa.source, rsa.path) == (Origin.OWN, tmp_path / "certs" / "server.crt")
    assert [one.pin for one in (rsa, ecdsa)] == [one.pin for one in harness.checker.sites[0].pairs]
    assert rsa.sha256 == harness.served.leaf_sha256
    assert rsa.seconds_left == pytest.approx(89 * 86_400, abs=1)
    assert rsa.not_after == harness.served.not_after
    assert ca.names[0].startswith("CN=zcproto own CA ")
    assert harness.checker.status(harness.now.astimezone(UTC) + 100 * DAY)[0].seconds_left < 0


def test_naive_time_is_refused(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    with pytest.raises(ValueError, match="aware"):
        harness.checker.check(NOW.replace(tzinfo=None), 1.0)


def test_renewal_run_without_work_is_not_repeated_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    runs = []
    real = managed.ensure

    def keep(*arguments: Any) -> Any:
        runs.append(harness.now)
        found = real(*arguments)
        return managed.ManagedCertificates(
            found.pairs, found.next_pins, found.new_pins, found.problems, harness.now
        )

    monkeypatch.setattr(managed, "ensure", keep)
    harness.checks(3600)
    harness.checks(600)
    assert 8 <= len(runs) <= 12


def test_temporarily_unreadable_authority_is_still_watched(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    path = tmp_path / "certs" / "ca.crt"
    path.rename(tmp_path / "ca.crt")
    harness.checks(3)
    assert harness.checker.status(harness.now)[-1].source is Origin.AUTHORITY
    (tmp_path / "ca.crt").rename(path)
    harness.settle()
