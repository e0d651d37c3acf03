from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.certs.support import DAY, NOW, build, pem, pem_of_key
from zcproto.certs import client_ca, keys, managed, sources
from zcproto.certs.checker import CertificateChecker, CheckResult, ContextSettings
from zcproto.certs.external import ExternalSite
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.notices import NoticeKind
from zcproto.certs.pair import CertificatePair
from zcproto.certs.settings import CertificateSettings, ClientTrust, ManagedSite
from zcproto.certs.sources import Origin, Renewal
from zcproto.errors import CertificateError
from zcproto.tls.suites import SUITES

CONTEXTS = ContextSettings(("zcp/1",), SUITES, "off")
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
OWN = ManagedSettings(
    names=("zcp.example.com",),
    key_types=("ecdsa-p256",),
    lifetime=90 * DAY,
    renew_before=30 * DAY,
    renew_key=False,
    host_names=("localhost",),
)


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch, rsa_key: Any) -> None:
    """RSA keys that are there already."""
    real = keys.generate
    monkeypatch.setattr(keys, "generate", lambda kind: rsa_key if keys.family(kind) == "rsa" else real(kind))


class Harness:
    """A checker with its clocks and its progress sentences."""

    def __init__(
        self, settings: CertificateSettings, environ: Mapping[str, str] | None = None, now: datetime = NOW
    ) -> None:
        self.settings = settings
        self.environ = environ or {}
        self.now = now
        self.monotonic = 5000.0
        self.sentences: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.checker = CertificateChecker(
            self.settings,
            CONTEXTS,
            random=lambda: 0.5,
            environ=self.environ,
            progress=self.sentences.append,
        )

    def check(self, after: timedelta = SECOND, *, sleeps: timedelta = timedelta(0)) -> CheckResult:
        """A check after so much time; `sleeps` moves the wall clock alone, either way."""
        self.now += after + sleeps
        self.monotonic += after.total_seconds()
        return self.checker.check(self.now, self.monotonic)

    def checks(self, count: int, after: timedelta = SECOND) -> list[CheckResult]:
        return [self.check(after) for _ in range(count)]

    def settle(self) -> None:
        """Lets it see what it has just written itself."""
        for _ in range(3):
            assert self.check().notices == ()

    @property
    def served(self) -> CertificatePair:
        return self.checker.certificates.default.pairs[0]


def kinds(*outcomes: CheckResult) -> list[str]:
    return [notice.kind.value for outcome in outcomes for notice in outcome.notices]


def messages(*outcomes: CheckResult) -> str:
    return "\n".join(notice.message for outcome in outcomes for notice in outcome.notices)


def managed_harness(folder: Path, **changes: Any) -> Harness:
    settings = ManagedSettings(**{**{name: getattr(OWN, name) for name in OWN.__slots__}, **changes})
    return Harness(CertificateSettings(ManagedSite(folder / "certs", settings)))


def disk_fails(monkeypatch: pytest.MonkeyPatch, error: int, *functions: str) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise OSError(error, os.strerror(error))

    for function in functions:
        monkeypatch.setattr(os, function, fail)


def test_it_rests_between_reading_what_is_new_and_seeing_to_it(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    rests: list[int] = []
    harness.checker = CertificateChecker(
        harness.settings, CONTEXTS, random=lambda: 0.5, environ={}, rest=lambda: rests.append(1)
    )
    harness.check()
    harness.settle()
    rests.clear()
    harness.checks(3)
    assert rests == []  # nothing has changed
    managed.renew(tmp_path / "certs", OWN, harness.now)
    assert kinds(harness.check()) == ["loaded"]
    assert len(rests) == 3  # after loading, before building the context, before its handshake


def write(folder: Path, stem: str, key: Any, *names: str, **changes: Any) -> tuple[Path, Path]:
    san = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    certificate, key_path = folder / f"{stem}.crt", folder / f"{stem}.key"
    certificate.write_bytes(pem(build(key, extensions=[san], **changes)))
    key_path.touch(0o600)
    key_path.write_bytes(pem_of_key(key))
    return certificate, key_path


def external_site(folder: Path, stem: str, *names: str) -> ExternalSite:
    return ExternalSite(names, (folder / f"{stem}.crt",), (folder / f"{stem}.key",))


# --- own certificates


def test_the_first_check_makes_certificates_and_gives_them(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    assert harness.checker.status(harness.now) == ()
    outcome = harness.check()
    assert outcome.serving is not None
    assert outcome.serving.certificates is harness.checker.certificates
    assert outcome.serving.certificates.default.names == ()
    assert kinds(outcome) == ["renewed"]
    (notice,) = outcome.notices
    assert notice.path == str(tmp_path / "certs" / "server-ecdsa.crt")
    assert notice.message.startswith(
        f"Issued {notice.path}: ecdsa-p256 for zcp.example.com, localhost; valid"
    )
    assert (notice.pins, notice.not_after) == ((harness.served.pin,), harness.served.not_after)
    assert outcome.last_renewal == Renewal(harness.now, ok=True)
    assert outcome.next_pins is None
    assert any("Created the certificate authority" in sentence for sentence in harness.sentences)


def test_certificates_that_are_there_are_loaded(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.restart()
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert outcome.last_renewal is None


def test_nothing_is_said_while_nothing_changes(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    for outcome in harness.checks(200):
        assert (outcome.serving, outcome.notices) == (None, ())


def test_a_check_with_nothing_to_do_takes_less_than_a_millisecond(tmp_path: Path, ec_key: Any) -> None:
    write(tmp_path, "site", ec_key, "a.example")
    origin = ManagedSite(tmp_path / "certs", OWN)
    harness = Harness(CertificateSettings(origin, (external_site(tmp_path, "site", "a.example"),)))
    harness.checks(5)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        harness.check()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001


def test_a_certificate_is_renewed_with_its_key_when_it_is_due(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    before = harness.served
    harness.now, harness.monotonic = before.not_after - 30 * DAY - 2 * SECOND, harness.monotonic + 60 * 86_400
    assert kinds(harness.check()) == []
    outcome = harness.check()
    assert kinds(outcome) == ["renewed"]
    assert outcome.serving is not None
    assert harness.served.pin == before.pin
    assert harness.served.not_after > before.not_after
    assert outcome.last_renewal == Renewal(harness.now, ok=True)
    harness.settle()


def test_a_renewal_that_fails_keeps_the_old_and_is_tried_again_with_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    runs = []
    real = managed.ensure
    monkeypatch.setattr(managed, "ensure", lambda *arguments: runs.append(harness.now) or real(*arguments))
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        outcome = harness.check(61 * DAY)
        assert kinds(outcome) == ["renewal_failed", "expiry"]  # it has less than the 30 days of an alert left
        assert "No space left on device" in messages(outcome)
        assert outcome.last_renewal == Renewal(harness.now, ok=False)
        outcomes = harness.checks(3600)
        assert kinds(*outcomes) == []  # told once
        assert 4 <= len(runs) <= 8  # after 45 s, 90 s, 3 min, ...
        assert harness.served is before
        assert kinds(*harness.checks(36, HOUR)) == ["renewal_failed"]  # a day later
    for _ in range(8):
        outcome = harness.check(HOUR)
        if outcome.notices:
            break
    assert kinds(outcome) == ["renewed", "renewal_recovered", "expiry_ended"]
    assert outcome.last_renewal == Renewal(harness.now, ok=True)
    assert harness.served.not_after > before.not_after


def test_a_failure_of_another_kind_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    for error in (errno.ENOSPC, errno.EIO):
        with monkeypatch.context() as patch:
            disk_fails(patch, error, "fsync")
            outcomes = [harness.check(61 * DAY), harness.check(HOUR)]
            assert kinds(*outcomes).count("renewal_failed") == 1
            assert os.strerror(error) in messages(*outcomes)
        harness.now -= 61 * DAY


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("function", ["fsync", "open", "replace", "stat", "fstat", "unlink", "fchmod"])
def test_whatever_the_disk_does_nothing_is_raised_and_the_old_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, function: str
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    before = harness.served
    with monkeypatch.context() as patch:
        disk_fails(patch, error, function)
        harness.checks(10, 61 * DAY / 10)
        assert harness.served is before or function == "unlink"
    harness.checks(2, 6 * HOUR)
    assert harness.served.not_after > before.not_after
    assert harness.served.not_before <= harness.now <= harness.served.not_after


def test_threads_that_cannot_be_started_are_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = managed_harness(tmp_path)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(managed, "_generate", fail)
    with pytest.raises(CertificateError, match="could not be checked: can't start new thread"):
        harness.check()
    monkeypatch.undo()
    assert harness.check().serving is not None


def test_the_clock_set_right_in_either_direction_is_caught_up_with_at_once(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    pin = harness.served.pin
    for sleeps in (80 * DAY, 3000 * DAY, -6000 * DAY, 60 * DAY, -2 * HOUR, 12000 * DAY, -9000 * DAY):
        outcome = harness.check(sleeps=sleeps)
        assert kinds(outcome) == ["renewed"], sleeps
        assert harness.served.not_before <= harness.now
        assert harness.now < harness.served.not_after - 30 * DAY
        assert harness.served.pin == pin
        harness.settle()


@pytest.mark.parametrize("sleeps", [100 * DAY, -100 * DAY], ids=["expired", "not yet valid"])
def test_what_is_not_valid_now_is_tried_again_each_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeps: timedelta
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        harness.check(sleeps=sleeps)
        harness.checks(3600)
    harness.checks(60)
    assert harness.served.not_before <= harness.now <= harness.served.not_after


def test_the_folder_is_visited_once_when_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    runs = []
    real = managed.ensure
    monkeypatch.setattr(managed, "ensure", lambda *arguments: runs.append(harness.now) or real(*arguments))
    harness.check(sleeps=DAY)
    harness.checks(100)
    assert len(runs) == 1


def test_a_short_step_of_the_clock_changes_nothing(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    for sleeps in (20 * SECOND, -20 * SECOND, 59 * DAY, -59 * DAY):
        assert kinds(harness.check(sleeps=sleeps)) == []


def test_names_of_the_machine_are_asked_for_each_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path, host_names=None)
    found = ["localhost", "127.0.0.1"]
    monkeypatch.setattr(managed, "found_names", lambda: tuple(found))
    harness.check()
    harness.settle()
    found.append("192.0.2.77")
    outcomes = harness.checks(3600)
    assert kinds(*outcomes) == ["renewed"]
    assert "192.0.2.77" in harness.served.names


def test_what_the_command_line_has_renewed_is_served_at_the_next_check(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    managed.renew(tmp_path / "certs", OWN, harness.now)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert harness.served.leaf_sha256 != before.leaf_sha256
    assert outcome.last_renewal is not None
    harness.settle()


def test_next_keys_of_the_command_line_are_announced_and_used_in_time(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    managed.rotate(tmp_path / "certs", OWN, harness.now)
    outcome = harness.check()
    assert kinds(outcome) == ["next_pins"]
    assert outcome.serving is None
    assert outcome.next_pins is not None
    assert outcome.next_pins.pins == outcome.notices[0].pins != (before.pin,)
    assert harness.check().next_pins == outcome.next_pins
    harness.checks(6 * 24 + 23, HOUR)
    assert harness.served is before
    (rotated,) = [one for one in harness.checks(3, HOUR) if one.notices]
    assert kinds(rotated) == ["renewed", "key_rotated"]
    assert (harness.served.pin,) == outcome.next_pins.pins
    assert rotated.next_pins is None
    harness.settle()


def test_next_keys_that_are_taken_back_are_not_announced_any_more(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    managed.rotate(tmp_path / "certs", OWN, harness.now)
    harness.checks(3)
    managed.cancel(tmp_path / "certs")
    outcome = harness.check()
    assert (outcome.next_pins, outcome.notices) == (None, ())


def test_new_keys_are_announced_before_a_renewal_where_they_are_wanted(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, renew_key=True)
    harness.check()
    before = harness.served.pin
    outcomes = harness.checks(61 * 2, timedelta(hours=12))
    assert kinds(*outcomes) == ["next_pins", "renewed", "key_rotated"]
    assert harness.served.pin != before


def test_a_pair_that_is_written_over_by_hand_is_given_time(tmp_path: Path) -> None:
    """A backup is copied over what is there: the certificate first, the key some seconds later."""
    harness = managed_harness(tmp_path)
    harness.check()
    directory, backup = tmp_path / "certs", tmp_path / "backup"
    shutil.copytree(directory, backup)
    saved = harness.served
    managed.rotate(directory, OWN, harness.now, at_once=True)
    harness.checks(3)
    assert harness.served.pin != saved.pin
    shutil.copy(backup / "server-ecdsa.crt", directory)
    for outcome in harness.checks(20):
        assert (outcome.serving, outcome.notices) == (None, ())
    shutil.copy(backup / "server-ecdsa.key", directory)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert harness.served.leaf_sha256 == saved.leaf_sha256
    harness.settle()
    assert not list(directory.glob("*.aside"))


def test_what_stays_damaged_is_repaired(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk")
    assert kinds(*harness.checks(30)) == []
    assert harness.served is before
    assert kinds(harness.check()) == ["renewed"]
    assert harness.served.pin == before.pin
    harness.settle()


def test_damage_does_not_wait_if_nothing_good_is_served(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk")
    assert kinds(harness.check(sleeps=400 * DAY)) == ["renewed"]


def test_files_that_are_never_quiet_are_repaired_in_the_end(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    for turn in range(301):
        (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk %d" % turn)
        outcome = harness.check()
        if outcome.notices:
            break
    assert kinds(outcome) == ["renewed"]
    assert turn == 300


def test_a_folder_that_is_deleted_is_filled_again_and_served_on_meanwhile(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    shutil.rmtree(tmp_path / "certs")
    assert kinds(*harness.checks(30)) == []
    assert harness.served is before
    assert kinds(harness.check()) == ["renewed", "key_rotated"]
    assert harness.served.pin != before.pin


def test_a_lost_key_of_the_authority_is_reported_and_the_alert_comes(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    (tmp_path / "certs" / "ca.key").unlink()
    outcomes = harness.checks(89 * 4, timedelta(hours=6))
    alerts = [
        notice for outcome in outcomes for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY
    ]
    assert [alert.days for alert in alerts] == [30, 14, 7, 3, 1]
    assert all(alert.path == str(harness.served.certificate) for alert in alerts)
    assert all(alert.left is not None and alert.not_after == harness.served.not_after for alert in alerts)
    assert "in 29 days" in alerts[0].message
    failures = [one for one in kinds(*outcomes) if one == "renewal_failed"]
    assert 20 < len(failures) <= 31  # one a day
    outcomes = harness.checks(8, timedelta(hours=6))
    (expired,) = [
        notice for outcome in outcomes for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY
    ]
    assert expired.days == 0
    assert "expired on" in expired.message


def test_an_managed_certificate_that_is_not_due_is_no_reason_for_an_alert(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, lifetime=2 * DAY)
    assert kinds(harness.check()) == ["renewed"]
    outcomes = harness.checks(9 * 24, HOUR)
    assert set(kinds(*outcomes)) == {"renewed"}


def test_the_end_of_the_authority_is_reported(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    (tmp_path / "certs" / "ca.key").unlink()
    left = harness.checker.status(harness.now)[-1]
    assert (left.source, left.path) == (Origin.AUTHORITY, tmp_path / "certs" / "ca.crt")
    outcome = harness.check(sleeps=left.not_after - harness.now - 2 * DAY)
    alerts = {notice.path: notice.days for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY}
    assert alerts[str(tmp_path / "certs" / "ca.crt")] == 3


# --- starts that are not good


@pytest.mark.requirement("fallback")
def test_without_anything_to_serve_every_check_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        for _ in range(3):
            with pytest.raises(CertificateError, match="No space left"):
                harness.check()
    assert kinds(harness.check()) == ["renewed"]


@pytest.mark.parametrize("function", ["fsync", "replace", "unlink"])
def test_a_disk_that_cannot_be_written_does_not_stop_a_start_with_good_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.restart()
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        disk_fails(patch, errno.EROFS, function)
        outcome = harness.check()
        assert kinds(outcome) == ["loaded", "renewal_failed"]
        assert outcome.serving is not None
        assert "Read-only file system" in messages(outcome)
    assert kinds(*harness.checks(60)) == ["renewal_recovered"]


def test_one_good_certificate_of_two_is_enough_if_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path, key_types=("rsa-2048", "ecdsa-p256"))
    harness.check()
    (tmp_path / "certs" / "server.crt").unlink()
    harness.restart()
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        outcome = harness.check()
    assert kinds(outcome) == ["loaded", "renewal_failed"]
    assert [one.key_type for one in harness.checker.certificates.pairs] == ["ecdsa-p256"]
    assert "renewed" in kinds(*harness.checks(60))
    assert [one.key_type for one in harness.checker.certificates.pairs] == ["rsa-2048", "ecdsa-p256"]


def test_what_was_not_created_here_stops_a_start_and_nothing_else(tmp_path: Path, ec_key: Any) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    write(
        tmp_path / "certs", "server-ecdsa", ec_key, "zcp.example.com", "localhost", not_after=NOW + 99 * DAY
    )
    outcomes = harness.checks(60)
    assert kinds(*outcomes) == ["renewal_failed"]
    assert "was not issued by the authority" in messages(*outcomes)
    assert harness.served is before
    harness.restart()
    with pytest.raises(CertificateError, match="was not issued by the authority"):
        harness.check()


@pytest.mark.parametrize(
    "changes",
    [{"key_types": ("ecdsa-p384",)}, {"names": ("other.example",)}, {"names": ("bad_name",)}],
)
def test_what_is_not_wanted_is_not_loaded_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    managed_harness(tmp_path).check()
    harness = managed_harness(tmp_path, **changes)
    disk_fails(monkeypatch, errno.ENOSPC, "fsync")
    with pytest.raises(CertificateError):
        harness.check()


def test_a_file_that_changes_while_it_is_loaded_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    harness.settle()
    before = harness.served
    managed.renew(tmp_path / "certs", OWN, harness.now)
    real = sources.load_pair

    def renew_after_it(*arguments: Any) -> CertificatePair:
        loaded = real(*arguments)
        monkeypatch.setattr(sources, "load_pair", real)
        managed.renew(tmp_path / "certs", OWN, harness.now)
        return loaded

    monkeypatch.setattr(sources, "load_pair", renew_after_it)
    assert kinds(harness.check()) == []
    assert harness.served is before
    assert kinds(harness.check()) == ["loaded"]


# --- certificates of others


@pytest.fixture
def other_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_with_files_of_other_programs_nothing_is_made(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
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


def test_bad_files_change_nothing_and_are_reported_once(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
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


@pytest.mark.requirement("expiry_alerts")
def test_the_end_of_other_programs_certificates_is_reported_at_each_threshold(
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


def test_sites_stand_beside_managed_certificates(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example", not_after=NOW + 90 * DAY)
    write(tmp_path, "b", other_key, "*.b.example", not_after=NOW + 90 * DAY)
    sites = (external_site(tmp_path, "a", "a.example"), external_site(tmp_path, "b", "*.b.example"))
    harness = Harness(CertificateSettings(ManagedSite(tmp_path / "certs", OWN), sites))
    outcome = harness.check()
    assert kinds(outcome) == ["renewed", "loaded", "loaded"]
    assert outcome.serving is not None
    assert [site.names for site in outcome.serving.certificates.sites] == [
        (),
        ("a.example",),
        ("*.b.example",),
    ]
    own_site = outcome.serving.certificates.default
    write(tmp_path, "b", ec_key, "*.b.example", not_after=NOW + 90 * DAY)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert outcome.serving.certificates.default == own_site
    assert [(one.source, one.site) for one in harness.checker.status(harness.now)] == [
        (Origin.OWN, ()),
        (Origin.FILES, ("a.example",)),
        (Origin.FILES, ("*.b.example",)),
        (Origin.AUTHORITY, ()),
    ]


def test_a_site_that_cannot_be_served_stops_the_start(tmp_path: Path, ec_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example")
    harness = Harness(
        CertificateSettings(
            ManagedSite(tmp_path / "certs", OWN), (external_site(tmp_path, "a", "c.example"),)
        )
    )
    for _ in range(2):
        with pytest.raises(CertificateError, match=r"is not valid for c\.example"):
            harness.check()
    with pytest.raises(CertificateError, match="has no names"):
        Harness(CertificateSettings(ManagedSite(tmp_path / "certs", OWN), (external_site(tmp_path, "a"),)))


def test_a_bad_site_does_not_hold_up_the_others(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example", not_after=NOW + 90 * DAY)
    write(tmp_path, "b", ec_key, "b.example", not_after=NOW + 90 * DAY)
    sites = tuple(external_site(tmp_path, stem, f"{stem}.example") for stem in ("a", "b"))
    harness = Harness(CertificateSettings(ManagedSite(tmp_path / "certs", OWN), sites))
    harness.check()
    (tmp_path / "a.crt").unlink()
    write(tmp_path, "b", other_key, "b.example", not_after=NOW + 90 * DAY)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert (
        outcome.serving.certificates.sites[2].pairs[0].pin
        != outcome.serving.certificates.sites[1].pairs[0].pin
    )


# --- certificates of clients


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


def test_a_change_of_the_authorities_for_clients_is_reported(tmp_path: Path, ec_key: Any) -> None:
    harness = client_trust_harness(tmp_path, ec_key, None)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert harness.check().serving is None
    (tmp_path / "ca.pem").write_bytes(pem(build(ec_key, not_after=NOW + 400 * DAY)))
    outcome = harness.check()
    assert kinds(outcome) == ["client_trust_loaded"]
    assert outcome.serving is not None  # each context contains the authorities


def test_a_new_list_of_revoked_certificates_is_reported(tmp_path: Path, ec_key: Any) -> None:
    harness = client_trust_harness(tmp_path, ec_key, revocations(ec_key))
    harness.check()
    (tmp_path / "crl.pem").write_bytes(revocations(ec_key, serial=8) + revocations(ec_key))
    outcome = harness.check()
    assert kinds(outcome) == ["client_trust_loaded"]
    assert outcome.serving is not None
    assert messages(outcome) == f"Loaded {tmp_path}/ca.pem and {tmp_path}/crl.pem for clients' certificates."


@pytest.mark.parametrize("name", ["ca.pem", "crl.pem"])
@pytest.mark.parametrize("data", [b"", b"junk", "cut", "bad", None])
def test_bad_files_for_clients_change_nothing_and_stop_a_start(
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


def test_a_name_in_an_authority_that_cannot_be_read_is_an_error(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = client_trust_harness(tmp_path, ec_key, None)

    def fail(name: x509.Name) -> str:
        raise ValueError("bad")

    monkeypatch.setattr(sources, "_expiring", fail)
    with pytest.raises(CertificateError, match=r"ca\.pem: contains a certificate that cannot be parsed"):
        harness.check()


def test_a_list_without_an_end_is_refused(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = client_trust_harness(tmp_path, ec_key, revocations(ec_key))

    class Endless:
        next_update_utc = None

    monkeypatch.setattr(x509, "load_pem_x509_crl", lambda data: Endless())
    with pytest.raises(CertificateError, match="without an expiry"):
        harness.check()


def test_the_ends_of_authorities_and_lists_for_clients_are_reported(tmp_path: Path, ec_key: Any) -> None:
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
    trust = ClientTrust(directory / "client-ca.crt", directory / "client-ca.crl", directory)
    return Harness(CertificateSettings(ManagedSite(directory, OWN), clients=trust))


def test_the_managed_authority_for_clients_is_made_and_a_revocation_is_seen(tmp_path: Path) -> None:
    harness = managed_clients(tmp_path)
    assert kinds(harness.check()) == ["renewed"]
    assert (tmp_path / "certs" / "client-ca.crl").exists()
    harness.checks(3)
    client_ca.issue_client(tmp_path / "certs", "ada", lifetime=30 * DAY, now=harness.now)
    assert kinds(harness.check()) == []
    client_ca.revoke_client(tmp_path / "certs", name="ada", now=harness.now)
    outcome = harness.check()
    assert kinds(outcome) == ["client_trust_loaded"]


def test_the_managed_list_is_signed_again_before_it_ends(tmp_path: Path) -> None:
    harness = managed_clients(tmp_path)
    harness.check()
    outcomes = harness.checks(133, 3 * DAY)
    assert 12 <= kinds(*outcomes).count("client_trust_loaded") <= 15
    assert set(kinds(*outcomes)) == {"client_trust_loaded", "renewed"}
    assert kinds(harness.check(sleeps=-500 * DAY)).count("client_trust_loaded") == 1


def test_an_managed_list_that_cannot_be_signed_is_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_clients(tmp_path)
    harness.checks(5)

    def fail(*arguments: Any, **named: Any) -> Any:
        raise CertificateError("no")

    with monkeypatch.context() as patch:
        patch.setattr(client_ca, "refresh_crl", fail)
        outcomes = harness.checks(48, HOUR)
        assert kinds(*outcomes) == ["renewal_failed", "renewal_failed"]
        assert {notice.path for outcome in outcomes for notice in outcome.notices} == {
            str(tmp_path / "certs" / "client-ca.crl")
        }
    assert kinds(*harness.checks(12, HOUR)) == ["renewal_recovered"]


def test_managed_authorities_for_clients_that_are_gone_are_no_error_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_clients(tmp_path)
    harness.checks(3)
    monkeypatch.setattr(client_ca, "refresh_crl", lambda *arguments, **named: None)
    assert kinds(*harness.checks(5, HOUR)) == []


def test_a_start_goes_on_with_what_is_there_for_clients_if_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_clients(tmp_path)
    harness.check()
    harness.restart()
    with monkeypatch.context() as patch:

        def fail(*arguments: Any, **named: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(client_ca, "ensure_authority", fail)
        outcome = harness.check()
    assert kinds(outcome) == ["loaded", "renewal_failed"]
    assert "renewal_recovered" in kinds(*harness.checks(90))
    harness.restart()

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise CertificateError("client-ca.crt: was not made here")

    monkeypatch.setattr(client_ca, "ensure_authority", refuse)
    with pytest.raises(CertificateError, match="was not made here"):
        harness.check()


# --- what is told of all that


def test_the_status_reports_all_that_is_in_use(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, key_types=("rsa-2048", "ecdsa-p256"))
    harness.check()
    rsa, ecdsa, ca = harness.checker.status(harness.now + DAY)
    assert (rsa.key_type, ecdsa.key_type, ca.key_type) == ("rsa-2048", "ecdsa-p256", "")
    assert rsa.names == ("zcp.example.com", "localhost")
    assert (rsa.source, rsa.path) == (Origin.OWN, tmp_path / "certs" / "server.crt")
    assert [one.pin for one in (rsa, ecdsa)] == [
        one.pin for one in harness.checker.certificates.default.pairs
    ]
    assert rsa.sha256 == harness.served.leaf_sha256
    assert rsa.seconds_left == pytest.approx(89 * 86_400, abs=1)
    assert rsa.not_after == harness.served.not_after
    assert ca.names[0].startswith("CN=zcproto own CA ")
    assert harness.checker.status(harness.now.astimezone(UTC) + 100 * DAY)[0].seconds_left < 0


def test_a_time_without_a_zone_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    with pytest.raises(ValueError, match="aware"):
        harness.checker.check(NOW.replace(tzinfo=None), 1.0)


def test_a_renewal_that_finds_nothing_to_do_is_not_asked_each_second(
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


def test_an_authority_that_cannot_be_read_for_a_while_is_watched_on(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    path = tmp_path / "certs" / "ca.crt"
    path.rename(tmp_path / "ca.crt")
    harness.checks(3)
    assert harness.checker.status(harness.now)[-1].source is Origin.AUTHORITY
    (tmp_path / "ca.crt").rename(path)
    harness.settle()
