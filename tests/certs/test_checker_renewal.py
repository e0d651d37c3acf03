"""Managed certificates as a checker serves them: issue, renewal, key rollover, damage, failing disks."""

from __future__ import annotations

import errno
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.certs.harness import (
    HOUR,
    MANAGED,
    SECOND,
    Harness,
    disk_fails,
    external_site,
    kinds,
    managed_harness,
    messages,
    write,
)
from tests.certs.support import DAY, NOW
from tests.helpers import raising
from zcproto.certs import managed, rollover, sources
from zcproto.certs.notices import NoticeKind
from zcproto.certs.pair import CertificatePair
from zcproto.certs.settings import CertificateSettings, ManagedSite
from zcproto.certs.sources import Origin, Renewal
from zcproto.errors import CertificateError

pytestmark = pytest.mark.usefixtures("quick_keys")


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    """Return a checker that serves what it has issued in the folder `certs`."""
    made = managed_harness(tmp_path)
    made.check()
    made.settle()
    return made


def test_checker_rests_between_slow_steps(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    rests: list[int] = []
    harness.restart(rest=lambda: rests.append(1))
    harness.check()
    harness.settle()
    rests.clear()
    harness.checks(3)
    assert rests == []  # nothing has changed
    managed.renew(tmp_path / "certs", MANAGED, harness.now)
    assert kinds(harness.check()) == ["loaded"]
    assert len(rests) == 3  # after loading, before building the context, before its handshake


def test_damaged_key_is_replaced_with_a_notice_of_both_pins(harness: Harness) -> None:
    old = harness.served
    old.key.write_bytes(b"junk")
    harness.restart()
    outcome = harness.check()
    (notice,) = [each for each in outcome.notices if each.kind is NoticeKind.KEY_REPLACED]
    assert notice.path == str(old.key)
    assert notice.pins == (old.pin, harness.served.pin)
    assert f"its pin was {old.pin} and is now {harness.served.pin}." in notice.message


def test_damaged_key_without_repair_prevents_a_start(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, repair=False)
    harness.check()
    harness.served.key.write_bytes(b"junk")
    harness.restart()
    with pytest.raises(CertificateError, match="restore the key from a backup"):
        harness.check()


def test_first_check_issues_certificates(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path)
    assert harness.checker.status(harness.now) == ()
    outcome = harness.check()
    assert outcome.serving is not None
    assert outcome.serving.sites is harness.checker.sites
    assert outcome.serving.sites[0].names == ()
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


def test_existing_certificates_are_loaded(harness: Harness) -> None:
    harness.restart()
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert outcome.last_renewal is None


def test_check_without_changes_reports_nothing(harness: Harness) -> None:
    for outcome in harness.checks(200):
        assert (outcome.serving, outcome.notices) == (None, ())


def test_check_without_changes_reads_files_now_and_then_only(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "site", ec_key, "a.example")
    origin = ManagedSite(tmp_path / "certs", MANAGED)
    harness = Harness(CertificateSettings(origin, (external_site(tmp_path, "site", "a.example"),)))
    harness.checks(5)
    opened, real = [], os.open

    def count(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(real(path, *arguments, **options))  # or raise: a file may be missing
        return opened[-1]

    monkeypatch.setattr(os, "open", count)
    counts = []
    for _ in range(50):
        harness.check()
        counts.append(len(opened))
        opened.clear()
    assert sum(count == 0 for count in counts) > 40  # now and then all are read


def test_due_certificate_is_renewed_with_its_key(harness: Harness) -> None:
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


def test_failed_renewal_keeps_the_old_certificate_and_is_retried_with_backoff(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert kinds(*outcomes) == []  # reported once
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


def test_different_renewal_failure_is_reported_at_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (errno.ENOSPC, errno.EIO):
        with monkeypatch.context() as patch:
            disk_fails(patch, error, "fsync")
            outcomes = [harness.check(61 * DAY), harness.check(HOUR)]
            assert kinds(*outcomes).count("renewal_failed") == 1
            assert os.strerror(error) in messages(*outcomes)
        harness.now -= 61 * DAY


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("function", ["fsync", "open", "replace", "stat", "fstat", "unlink", "fchmod"])
def test_disk_failure_raises_nothing_and_keeps_the_old_certificate(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, error: int, function: str
) -> None:
    before = harness.served
    with monkeypatch.context() as patch:
        disk_fails(patch, error, function)
        harness.checks(10, 61 * DAY / 10)
        assert harness.served is before or function == "unlink"
    harness.checks(2, 6 * HOUR)
    assert harness.served.not_after > before.not_after
    assert harness.served.not_before <= harness.now <= harness.served.not_after


def test_thread_that_cannot_be_started_fails_the_check_and_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    monkeypatch.setattr(managed, "_generate", raising(RuntimeError("can't start new thread")))
    with pytest.raises(CertificateError, match="could not be checked: can't start new thread"):
        harness.check()
    monkeypatch.undo()
    assert harness.check().serving is not None


def test_clock_change_in_either_direction_is_handled_at_once(harness: Harness) -> None:
    pin = harness.served.pin
    for sleeps in (80 * DAY, 3000 * DAY, -6000 * DAY, 60 * DAY, -2 * HOUR, 12000 * DAY, -9000 * DAY):
        outcome = harness.check(sleeps=sleeps)
        assert kinds(outcome) == ["renewed"], sleeps
        assert harness.served.not_before <= harness.now
        assert harness.now < harness.served.not_after - 30 * DAY
        assert harness.served.pin == pin
        harness.settle()


@pytest.mark.parametrize("sleeps", [100 * DAY, -100 * DAY], ids=["expired", "not yet valid"])
def test_certificate_not_valid_now_is_retried_every_minute(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, sleeps: timedelta
) -> None:
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        harness.check(sleeps=sleeps)
        harness.checks(3600)
    harness.checks(60)
    assert harness.served.not_before <= harness.now <= harness.served.not_after


def test_clock_change_starts_one_renewal_run(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = managed.ensure
    monkeypatch.setattr(managed, "ensure", lambda *arguments: runs.append(harness.now) or real(*arguments))
    harness.check(sleeps=DAY)
    harness.checks(100)
    assert len(runs) == 1


def test_short_clock_step_changes_nothing(harness: Harness) -> None:
    for sleeps in (20 * SECOND, -20 * SECOND, 59 * DAY, -59 * DAY):
        assert kinds(harness.check(sleeps=sleeps)) == []


def test_host_names_are_detected_every_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = managed_harness(tmp_path, host_names=None)
    found = ["localhost", "127.0.0.1"]
    monkeypatch.setattr(managed, "found_names", lambda: tuple(found))
    harness.check()
    harness.settle()
    found.append("192.0.2.77")
    outcomes = harness.checks(3600)
    assert kinds(*outcomes) == ["renewed"]
    assert "192.0.2.77" in harness.served.names


def test_certificate_renewed_by_the_command_line_is_served_by_the_next_check(
    harness: Harness, tmp_path: Path
) -> None:
    before = harness.served
    managed.renew(tmp_path / "certs", MANAGED, harness.now)
    outcome = harness.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.serving is not None
    assert harness.served.leaf_sha256 != before.leaf_sha256
    assert outcome.last_renewal is not None
    harness.settle()


def test_next_keys_of_the_command_line_are_announced_and_used_in_time(
    harness: Harness, tmp_path: Path
) -> None:
    before = harness.served
    managed.rotate(tmp_path / "certs", MANAGED, harness.now)
    outcome = harness.check()
    assert kinds(outcome) == ["next_pins"]
    assert outcome.serving is None
    assert outcome.next_pins is not None
    assert outcome.next_pins.pins == outcome.notices[0].pins != (before.pin,)
    assert outcome.notices[0].path == str(tmp_path / "certs")
    assert harness.check().next_pins == outcome.next_pins
    harness.checks(6 * 24 + 23, HOUR)
    assert harness.served is before
    (rotated,) = [one for one in harness.checks(3, HOUR) if one.notices]
    assert kinds(rotated) == ["renewed", "key_rotated"]
    assert (harness.served.pin,) == outcome.next_pins.pins
    assert rotated.next_pins is None
    harness.settle()


def test_cancelled_next_keys_are_no_longer_announced(harness: Harness, tmp_path: Path) -> None:
    managed.rotate(tmp_path / "certs", MANAGED, harness.now)
    harness.checks(3)
    rollover.cancel(tmp_path / "certs")
    outcome = harness.check()
    assert (outcome.next_pins, outcome.notices) == (None, ())


def test_new_key_is_announced_before_the_renewal(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, renew_key=True)
    harness.check()
    before = harness.served.pin
    outcomes = harness.checks(61 * 2, timedelta(hours=12))
    assert kinds(*outcomes) == ["next_pins", "renewed", "key_rotated"]
    assert harness.served.pin != before


def test_half_restored_pair_is_given_time_to_settle(harness: Harness, tmp_path: Path) -> None:
    """A backup is copied over what is there: the certificate first, the key some seconds later."""
    directory, backup = tmp_path / "certs", tmp_path / "backup"
    shutil.copytree(directory, backup)
    saved = harness.served
    managed.rotate(directory, MANAGED, harness.now, at_once=True)
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


def test_persistent_damage_is_repaired(harness: Harness, tmp_path: Path) -> None:
    before = harness.served
    (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk")
    assert kinds(*harness.checks(30)) == []
    assert harness.served is before
    assert kinds(harness.check()) == ["renewed"]
    assert harness.served.pin == before.pin
    harness.settle()


def test_damage_is_repaired_at_once_if_nothing_valid_is_served(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk")
    assert kinds(harness.check(sleeps=400 * DAY)) == ["renewed"]


def test_files_that_keep_changing_are_repaired_eventually(harness: Harness, tmp_path: Path) -> None:
    for turn in range(301):
        (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk %d" % turn)
        outcome = harness.check()
        if outcome.notices:
            break
    assert kinds(outcome) == ["renewed"]
    assert turn == 300


def test_deleted_folder_is_recreated_and_certificates_stay_served(harness: Harness, tmp_path: Path) -> None:
    before = harness.served
    shutil.rmtree(tmp_path / "certs")
    assert kinds(*harness.checks(30)) == []
    assert harness.served is before
    assert kinds(harness.check()) == ["renewed", "key_rotated"]
    assert harness.served.pin != before.pin


def test_lost_authority_key_is_reported_and_raises_an_expiry_alert(harness: Harness, tmp_path: Path) -> None:
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


def test_managed_certificate_not_yet_due_raises_no_expiry_alert(tmp_path: Path) -> None:
    harness = managed_harness(tmp_path, lifetime=2 * DAY)
    assert kinds(harness.check()) == ["renewed"]
    outcomes = harness.checks(9 * 24, HOUR)
    assert set(kinds(*outcomes)) == {"renewed"}


def test_authority_expiry_is_reported(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "certs" / "ca.key").unlink()
    left = harness.checker.status(harness.now)[-1]
    assert (left.source, left.path) == (Origin.AUTHORITY, tmp_path / "certs" / "ca.crt")
    outcome = harness.check(sleeps=left.not_after - harness.now - 2 * DAY)
    alerts = {notice.path: notice.days for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY}
    assert alerts[str(tmp_path / "certs" / "ca.crt")] == 3


# --- failing starts


@pytest.mark.requirement("fallback")
def test_every_check_raises_while_nothing_can_be_served(
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
def test_unwritable_disk_does_not_prevent_a_start_with_valid_certificates(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
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


def test_one_valid_certificate_of_two_suffices_if_the_disk_fails(
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
    assert [one.key_type for one in harness.checker.sites[0].pairs] == ["ecdsa-p256"]
    assert "renewed" in kinds(*harness.checks(60))
    assert [one.key_type for one in harness.checker.sites[0].pairs] == ["rsa-2048", "ecdsa-p256"]


def test_certificate_of_another_issuer_prevents_a_start_but_not_a_check(
    harness: Harness, tmp_path: Path, ec_key: Any
) -> None:
    before = harness.served
    write(
        tmp_path / "certs", "server-ecdsa", ec_key, "zcp.example.com", "localhost", not_after=NOW + 99 * DAY
    )
    outcomes = harness.checks(60)
    assert kinds(*outcomes) == ["renewal_failed"]
    assert "was not issued by" in messages(*outcomes)
    assert harness.served is before
    harness.restart()
    with pytest.raises(CertificateError, match="was not issued by"):
        harness.check()


@pytest.mark.parametrize(
    "changes",
    [{"key_types": ("ecdsa-p384",)}, {"names": ("other.example",)}, {"names": ("bad_name",)}],
)
def test_unconfigured_certificates_are_not_loaded_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    managed_harness(tmp_path).check()
    harness = managed_harness(tmp_path, **changes)
    disk_fails(monkeypatch, errno.ENOSPC, "fsync")
    with pytest.raises(CertificateError):
        harness.check()


def test_file_that_changes_while_it_is_loaded_is_not_served(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = harness.served
    managed.renew(tmp_path / "certs", MANAGED, harness.now)
    real = sources.load_pair

    def renew_after_it(*arguments: Any) -> CertificatePair:
        loaded = real(*arguments)
        monkeypatch.setattr(sources, "load_pair", real)
        managed.renew(tmp_path / "certs", MANAGED, harness.now)
        return loaded

    monkeypatch.setattr(sources, "load_pair", renew_after_it)
    assert kinds(harness.check()) == []
    assert harness.served is before
    assert kinds(harness.check()) == ["loaded"]


def test_bad_disk_prevents_no_start_that_has_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = managed_harness(tmp_path)
    harness.check()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert harness.checker.faults(harness.now) == []
    (tmp_path / "certs" / "server-ecdsa.key").unlink()
    (found,) = harness.checker.faults(harness.now)
    assert "cannot be written: Permission denied; run: chmod u+rwx" in found
