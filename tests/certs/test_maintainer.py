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
from zcproto.certs import clients, keys, maintainer, own
from zcproto.certs.foreign import ForeignSite
from zcproto.certs.maintainer import (
    ClientTrust,
    Maintainer,
    MaintainerSettings,
    NoticeKind,
    Outcome,
    OwnSource,
    Renewal,
    Source,
)
from zcproto.certs.own import OwnSettings
from zcproto.certs.pair import CertificatePair
from zcproto.errors import CertificateError

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
OWN = OwnSettings(
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


class World:
    """A maintainer, the clocks, and all that it said."""

    def __init__(
        self, settings: MaintainerSettings, environ: Mapping[str, str] | None = None, now: datetime = NOW
    ) -> None:
        self.settings = settings
        self.environ = environ or {}
        self.now = now
        self.monotonic = 5000.0
        self.said: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.maintainer = Maintainer(
            self.settings, random=lambda: 0.5, environ=self.environ, progress=self.said.append
        )

    def check(self, after: timedelta = SECOND, *, sleeps: timedelta = timedelta(0)) -> Outcome:
        """A check after so much time; `sleeps` moves the wall clock alone, either way."""
        self.now += after + sleeps
        self.monotonic += after.total_seconds()
        return self.maintainer.check(self.now, self.monotonic)

    def checks(self, count: int, after: timedelta = SECOND) -> list[Outcome]:
        return [self.check(after) for _ in range(count)]

    def settle(self) -> None:
        """Lets it see what it has just written itself."""
        for _ in range(3):
            assert self.check().notices == ()

    @property
    def served(self) -> CertificatePair:
        return self.maintainer.certificates.default.pairs[0]


def kinds(*outcomes: Outcome) -> list[str]:
    return [notice.kind.value for outcome in outcomes for notice in outcome.notices]


def messages(*outcomes: Outcome) -> str:
    return "\n".join(notice.message for outcome in outcomes for notice in outcome.notices)


def own_world(folder: Path, **changes: Any) -> World:
    settings = OwnSettings(**{**{name: getattr(OWN, name) for name in OWN.__slots__}, **changes})
    return World(MaintainerSettings(OwnSource(folder / "certs", settings)))


def disk_fails(monkeypatch: pytest.MonkeyPatch, error: int, *functions: str) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise OSError(error, os.strerror(error))

    for function in functions:
        monkeypatch.setattr(os, function, fail)


def test_it_rests_between_reading_what_is_new_and_seeing_to_it(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    rests: list[int] = []
    world.maintainer = Maintainer(
        world.settings, random=lambda: 0.5, environ={}, rest=lambda: rests.append(1)
    )
    world.check()
    world.settle()
    rests.clear()
    world.checks(3)
    assert rests == []  # nothing has changed
    own.renew(tmp_path / "certs", OWN, world.now)
    assert kinds(world.check()) == ["loaded"]
    assert rests == [1]


def write(folder: Path, stem: str, key: Any, *names: str, **changes: Any) -> tuple[Path, Path]:
    san = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    certificate, key_path = folder / f"{stem}.crt", folder / f"{stem}.key"
    certificate.write_bytes(pem(build(key, extensions=[san], **changes)))
    key_path.touch(0o600)
    key_path.write_bytes(pem_of_key(key))
    return certificate, key_path


def foreign_site(folder: Path, stem: str, *names: str) -> ForeignSite:
    return ForeignSite(names, (folder / f"{stem}.crt",), (folder / f"{stem}.key",))


# --- own certificates


def test_the_first_check_makes_certificates_and_gives_them(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    assert world.maintainer.status(world.now) == ()
    outcome = world.check()
    assert outcome.certificates is world.maintainer.certificates
    assert outcome.certificates.default.names == ()
    assert kinds(outcome) == ["renewed"]
    (notice,) = outcome.notices
    assert notice.what == str(tmp_path / "certs" / "server-ecdsa.crt")
    assert notice.message.startswith(f"Made {notice.what}: ecdsa-p256 for zcp.example.com, localhost; valid")
    assert (notice.pins, notice.not_after) == ((world.served.pin,), world.served.not_after)
    assert outcome.last_renewal == Renewal(world.now, ok=True)
    assert (outcome.next_pins, outcome.client_trust_changed) == (None, False)
    assert any("Made the certificate authority" in sentence for sentence in world.said)


def test_certificates_that_are_there_are_loaded(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.restart()
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.certificates is not None
    assert outcome.last_renewal is None


def test_nothing_is_said_while_nothing_changes(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    for outcome in world.checks(200):
        assert (outcome.certificates, outcome.notices) == (None, ())


def test_a_check_with_nothing_to_do_takes_less_than_a_millisecond(tmp_path: Path, ec_key: Any) -> None:
    write(tmp_path, "site", ec_key, "a.example")
    origin = OwnSource(tmp_path / "certs", OWN)
    world = World(MaintainerSettings(origin, (foreign_site(tmp_path, "site", "a.example"),)))
    world.checks(5)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        world.check()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001


def test_a_certificate_is_renewed_with_its_key_when_it_is_due(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    before = world.served
    world.now, world.monotonic = before.not_after - 30 * DAY - 2 * SECOND, world.monotonic + 60 * 86_400
    assert kinds(world.check()) == []
    outcome = world.check()
    assert kinds(outcome) == ["renewed"]
    assert outcome.certificates is not None
    assert world.served.pin == before.pin
    assert world.served.not_after > before.not_after
    assert outcome.last_renewal == Renewal(world.now, ok=True)
    world.settle()


def test_a_renewal_that_fails_keeps_the_old_and_is_tried_again_with_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    visits = []
    real = own.keep
    monkeypatch.setattr(own, "keep", lambda *arguments: visits.append(world.now) or real(*arguments))
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        outcome = world.check(61 * DAY)
        assert kinds(outcome) == ["renewal_failed", "expiry"]  # it has less than the 30 days of an alert left
        assert "No space left on device" in messages(outcome)
        assert outcome.last_renewal == Renewal(world.now, ok=False)
        outcomes = world.checks(3600)
        assert kinds(*outcomes) == []  # told once
        assert 4 <= len(visits) <= 8  # after 45 s, 90 s, 3 min, ...
        assert world.served is before
        assert kinds(*world.checks(36, HOUR)) == ["renewal_failed"]  # a day later
    for _ in range(8):
        outcome = world.check(HOUR)
        if outcome.notices:
            break
    assert kinds(outcome) == ["renewed", "renewal_recovered", "expiry_ended"]
    assert outcome.last_renewal == Renewal(world.now, ok=True)
    assert world.served.not_after > before.not_after


def test_a_failure_of_another_kind_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = own_world(tmp_path)
    world.check()
    for error in (errno.ENOSPC, errno.EIO):
        with monkeypatch.context() as patch:
            disk_fails(patch, error, "fsync")
            outcomes = [world.check(61 * DAY), world.check(HOUR)]
            assert kinds(*outcomes).count("renewal_failed") == 1
            assert os.strerror(error) in messages(*outcomes)
        world.now -= 61 * DAY


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("function", ["fsync", "open", "replace", "stat", "fstat", "unlink", "fchmod"])
def test_whatever_the_disk_does_nothing_is_raised_and_the_old_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, function: str
) -> None:
    world = own_world(tmp_path)
    world.check()
    before = world.served
    with monkeypatch.context() as patch:
        disk_fails(patch, error, function)
        world.checks(10, 61 * DAY / 10)
        assert world.served is before or function == "unlink"
    world.checks(2, 6 * HOUR)
    assert world.served.not_after > before.not_after
    assert world.served.not_before <= world.now <= world.served.not_after


def test_threads_that_cannot_be_started_are_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = own_world(tmp_path)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(own, "_generate", fail)
    with pytest.raises(CertificateError, match="could not be seen to: can't start new thread"):
        world.check()
    monkeypatch.undo()
    assert world.check().certificates is not None


def test_the_clock_set_right_in_either_direction_is_caught_up_with_at_once(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    pin = world.served.pin
    for sleeps in (80 * DAY, 3000 * DAY, -6000 * DAY, 60 * DAY, -2 * HOUR, 12000 * DAY, -9000 * DAY):
        outcome = world.check(sleeps=sleeps)
        assert kinds(outcome) == ["renewed"], sleeps
        assert world.served.not_before <= world.now
        assert world.now < world.served.not_after - 30 * DAY
        assert world.served.pin == pin
        world.settle()


@pytest.mark.parametrize("sleeps", [100 * DAY, -100 * DAY], ids=["expired", "not yet valid"])
def test_what_is_not_valid_now_is_tried_again_each_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeps: timedelta
) -> None:
    world = own_world(tmp_path)
    world.check()
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        world.check(sleeps=sleeps)
        world.checks(3600)
    world.checks(60)
    assert world.served.not_before <= world.now <= world.served.not_after


def test_the_folder_is_visited_once_when_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    visits = []
    real = own.keep
    monkeypatch.setattr(own, "keep", lambda *arguments: visits.append(world.now) or real(*arguments))
    world.check(sleeps=DAY)
    world.checks(100)
    assert len(visits) == 1


def test_a_short_step_of_the_clock_changes_nothing(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    for sleeps in (20 * SECOND, -20 * SECOND, 59 * DAY, -59 * DAY):
        assert kinds(world.check(sleeps=sleeps)) == []


def test_names_of_the_machine_are_asked_for_each_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path, host_names=None)
    found = ["localhost", "127.0.0.1"]
    monkeypatch.setattr(own, "found_names", lambda: tuple(found))
    world.check()
    world.settle()
    found.append("192.0.2.77")
    outcomes = world.checks(3600)
    assert kinds(*outcomes) == ["renewed"]
    assert "192.0.2.77" in world.served.names


def test_what_the_command_line_has_renewed_is_served_at_the_next_check(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    own.renew(tmp_path / "certs", OWN, world.now)
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.certificates is not None
    assert world.served.leaf_sha256 != before.leaf_sha256
    assert outcome.last_renewal is not None
    world.settle()


def test_next_keys_of_the_command_line_are_announced_and_used_in_time(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    own.rotate(tmp_path / "certs", OWN, world.now)
    outcome = world.check()
    assert kinds(outcome) == ["next_pins"]
    assert outcome.certificates is None
    assert outcome.next_pins is not None
    assert outcome.next_pins.pins == outcome.notices[0].pins != (before.pin,)
    assert world.check().next_pins == outcome.next_pins
    world.checks(6 * 24 + 23, HOUR)
    assert world.served is before
    (rotated,) = [one for one in world.checks(3, HOUR) if one.notices]
    assert kinds(rotated) == ["renewed", "key_rotated"]
    assert (world.served.pin,) == outcome.next_pins.pins
    assert rotated.next_pins is None
    world.settle()


def test_next_keys_that_are_taken_back_are_not_announced_any_more(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    own.rotate(tmp_path / "certs", OWN, world.now)
    world.checks(3)
    own.cancel(tmp_path / "certs")
    outcome = world.check()
    assert (outcome.next_pins, outcome.notices) == (None, ())


def test_new_keys_are_announced_before_a_renewal_where_they_are_wanted(tmp_path: Path) -> None:
    world = own_world(tmp_path, renew_key=True)
    world.check()
    before = world.served.pin
    outcomes = world.checks(61 * 2, timedelta(hours=12))
    assert kinds(*outcomes) == ["next_pins", "renewed", "key_rotated"]
    assert world.served.pin != before


def test_a_pair_that_is_written_over_by_hand_is_given_time(tmp_path: Path) -> None:
    """A backup is copied over what is there: the certificate first, the key some seconds later."""
    world = own_world(tmp_path)
    world.check()
    directory, backup = tmp_path / "certs", tmp_path / "backup"
    shutil.copytree(directory, backup)
    saved = world.served
    own.rotate(directory, OWN, world.now, at_once=True)
    world.checks(3)
    assert world.served.pin != saved.pin
    shutil.copy(backup / "server-ecdsa.crt", directory)
    for outcome in world.checks(20):
        assert (outcome.certificates, outcome.notices) == (None, ())
    shutil.copy(backup / "server-ecdsa.key", directory)
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert world.served.leaf_sha256 == saved.leaf_sha256
    world.settle()
    assert not list(directory.glob("*.aside"))


def test_what_stays_damaged_is_repaired(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk")
    assert kinds(*world.checks(30)) == []
    assert world.served is before
    assert kinds(world.check()) == ["renewed"]
    assert world.served.pin == before.pin
    world.settle()


def test_damage_does_not_wait_if_nothing_good_is_served(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk")
    assert kinds(world.check(sleeps=400 * DAY)) == ["renewed"]


def test_files_that_are_never_quiet_are_repaired_in_the_end(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    for turn in range(301):
        (tmp_path / "certs" / "server-ecdsa.crt").write_bytes(b"junk %d" % turn)
        outcome = world.check()
        if outcome.notices:
            break
    assert kinds(outcome) == ["renewed"]
    assert turn == 300


def test_a_folder_that_is_deleted_is_filled_again_and_served_on_meanwhile(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    shutil.rmtree(tmp_path / "certs")
    assert kinds(*world.checks(30)) == []
    assert world.served is before
    assert kinds(world.check()) == ["renewed", "key_rotated"]
    assert world.served.pin != before.pin


def test_a_lost_key_of_the_authority_is_told_and_the_alert_comes(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    (tmp_path / "certs" / "ca.key").unlink()
    outcomes = world.checks(89 * 4, timedelta(hours=6))
    alerts = [
        notice for outcome in outcomes for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY
    ]
    assert [alert.days for alert in alerts] == [30, 14, 7, 3, 1]
    assert all(alert.what == str(world.served.certificate) for alert in alerts)
    assert all(alert.left is not None and alert.not_after == world.served.not_after for alert in alerts)
    assert "in 29 days" in alerts[0].message
    failures = [one for one in kinds(*outcomes) if one == "renewal_failed"]
    assert 20 < len(failures) <= 31  # one a day
    outcomes = world.checks(8, timedelta(hours=6))
    (expired,) = [
        notice for outcome in outcomes for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY
    ]
    assert expired.days == 0
    assert "expired on" in expired.message


def test_an_own_certificate_that_is_not_due_is_no_reason_for_an_alert(tmp_path: Path) -> None:
    world = own_world(tmp_path, lifetime=2 * DAY)
    assert kinds(world.check()) == ["renewed"]
    outcomes = world.checks(9 * 24, HOUR)
    assert set(kinds(*outcomes)) == {"renewed"}


def test_the_end_of_the_authority_is_told(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    (tmp_path / "certs" / "ca.key").unlink()
    left = world.maintainer.status(world.now)[-1]
    assert (left.source, left.path) == (Source.AUTHORITY, tmp_path / "certs" / "ca.crt")
    outcome = world.check(sleeps=left.not_after - world.now - 2 * DAY)
    alerts = {notice.what: notice.days for notice in outcome.notices if notice.kind is NoticeKind.EXPIRY}
    assert alerts[str(tmp_path / "certs" / "ca.crt")] == 3


# --- starts that are not good


@pytest.mark.requirement("fallback")
def test_without_anything_to_serve_every_check_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path)
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        for _ in range(3):
            with pytest.raises(CertificateError, match="No space left"):
                world.check()
    assert kinds(world.check()) == ["renewed"]


@pytest.mark.parametrize("function", ["fsync", "replace", "unlink"])
def test_a_disk_that_cannot_be_written_does_not_stop_a_start_with_good_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    world = own_world(tmp_path)
    world.check()
    world.restart()
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        disk_fails(patch, errno.EROFS, function)
        outcome = world.check()
        assert kinds(outcome) == ["loaded", "renewal_failed"]
        assert outcome.certificates is not None
        assert "Read-only file system" in messages(outcome)
    assert kinds(*world.checks(60)) == ["renewal_recovered"]


def test_one_good_certificate_of_two_is_enough_if_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path, key_types=("rsa-2048", "ecdsa-p256"))
    world.check()
    (tmp_path / "certs" / "server.crt").unlink()
    world.restart()
    with monkeypatch.context() as patch:
        disk_fails(patch, errno.ENOSPC, "fsync")
        outcome = world.check()
    assert kinds(outcome) == ["loaded", "renewal_failed"]
    assert [one.key_type for one in world.maintainer.certificates.pairs] == ["ecdsa-p256"]
    assert "renewed" in kinds(*world.checks(60))
    assert [one.key_type for one in world.maintainer.certificates.pairs] == ["rsa-2048", "ecdsa-p256"]


def test_what_was_not_made_here_stops_a_start_and_nothing_else(tmp_path: Path, ec_key: Any) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    write(
        tmp_path / "certs", "server-ecdsa", ec_key, "zcp.example.com", "localhost", not_after=NOW + 99 * DAY
    )
    outcomes = world.checks(60)
    assert kinds(*outcomes) == ["renewal_failed"]
    assert "was not issued by the own authority" in messages(*outcomes)
    assert world.served is before
    world.restart()
    with pytest.raises(CertificateError, match="was not issued by the own authority"):
        world.check()


@pytest.mark.parametrize(
    "changes",
    [{"key_types": ("ecdsa-p384",)}, {"names": ("other.example",)}, {"names": ("bad_name",)}],
)
def test_what_is_not_wanted_is_not_loaded_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    own_world(tmp_path).check()
    world = own_world(tmp_path, **changes)
    disk_fails(monkeypatch, errno.ENOSPC, "fsync")
    with pytest.raises(CertificateError):
        world.check()


def test_a_file_that_changes_while_it_is_loaded_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    before = world.served
    own.renew(tmp_path / "certs", OWN, world.now)
    real = maintainer.load_pair

    def renew_after_it(*arguments: Any) -> CertificatePair:
        loaded = real(*arguments)
        monkeypatch.setattr(maintainer, "load_pair", real)
        own.renew(tmp_path / "certs", OWN, world.now)
        return loaded

    monkeypatch.setattr(maintainer, "load_pair", renew_after_it)
    assert kinds(world.check()) == []
    assert world.served is before
    assert kinds(world.check()) == ["loaded"]


# --- certificates of others


@pytest.fixture
def other_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_with_files_of_others_nothing_is_made(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_after=NOW + 90 * DAY)
    world = World(MaintainerSettings(foreign_site(tmp_path, "site")))
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert (outcome.next_pins, outcome.last_renewal) == (None, None)
    before = world.served.pin
    write(tmp_path, "site", other_key, "a.example", not_after=NOW + 99 * DAY)
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.certificates is not None
    assert world.served.pin != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.crt", "site.key"]


def test_bad_files_change_nothing_and_are_told_once(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_after=NOW + 90 * DAY)
    world = World(MaintainerSettings(foreign_site(tmp_path, "site")))
    world.check()
    before = world.served
    (tmp_path / "site.key").write_bytes(pem_of_key(other_key))
    outcomes = world.checks(500)
    assert kinds(*outcomes) == ["files_bad"]
    assert messages(*outcomes).endswith("What was good before is used on.")
    assert world.served is before
    (tmp_path / "site.key").write_bytes(pem_of_key(ec_key))
    assert kinds(world.check()) == ["files_recovered"]


@pytest.mark.requirement("expiry_alerts")
def test_the_end_of_others_certificates_is_told_at_each_threshold(
    tmp_path: Path, ec_key: Any, other_key: Any
) -> None:
    write(tmp_path, "site", ec_key, "a.example", not_after=NOW + 40 * DAY)
    world = World(MaintainerSettings(foreign_site(tmp_path, "site"), alert_days=(20, 10)))
    outcomes = world.checks(45 * 4, timedelta(hours=6))
    found = [notice for outcome in outcomes for notice in outcome.notices][1:]
    assert [(notice.kind, notice.days) for notice in found] == [
        (NoticeKind.EXPIRY, days) for days in (20, 10, 0)
    ]
    write(tmp_path, "site", other_key, "a.example", not_before=NOW, not_after=NOW + 90 * DAY)
    outcome = world.check()
    assert kinds(outcome) == ["loaded", "expiry_ended"]
    assert "is not about to expire any more" in messages(outcome)


def test_sites_stand_beside_own_certificates(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example", not_after=NOW + 90 * DAY)
    write(tmp_path, "b", other_key, "*.b.example", not_after=NOW + 90 * DAY)
    sites = (foreign_site(tmp_path, "a", "a.example"), foreign_site(tmp_path, "b", "*.b.example"))
    world = World(MaintainerSettings(OwnSource(tmp_path / "certs", OWN), sites))
    outcome = world.check()
    assert kinds(outcome) == ["renewed", "loaded", "loaded"]
    assert outcome.certificates is not None
    assert [site.names for site in outcome.certificates.sites] == [(), ("a.example",), ("*.b.example",)]
    own_site = outcome.certificates.default
    write(tmp_path, "b", ec_key, "*.b.example", not_after=NOW + 90 * DAY)
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.certificates is not None
    assert outcome.certificates.default == own_site
    assert [(one.source, one.site) for one in world.maintainer.status(world.now)] == [
        (Source.OWN, ()),
        (Source.FILES, ("a.example",)),
        (Source.FILES, ("*.b.example",)),
        (Source.AUTHORITY, ()),
    ]


def test_a_site_that_cannot_be_served_stops_the_start(tmp_path: Path, ec_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example")
    world = World(
        MaintainerSettings(OwnSource(tmp_path / "certs", OWN), (foreign_site(tmp_path, "a", "c.example"),))
    )
    for _ in range(2):
        with pytest.raises(CertificateError, match=r"is not for c\.example"):
            world.check()
    with pytest.raises(CertificateError, match="has no names"):
        World(MaintainerSettings(OwnSource(tmp_path / "certs", OWN), (foreign_site(tmp_path, "a"),)))


def test_a_bad_site_does_not_hold_up_the_others(tmp_path: Path, ec_key: Any, other_key: Any) -> None:
    write(tmp_path, "a", ec_key, "a.example", not_after=NOW + 90 * DAY)
    write(tmp_path, "b", ec_key, "b.example", not_after=NOW + 90 * DAY)
    sites = tuple(foreign_site(tmp_path, stem, f"{stem}.example") for stem in ("a", "b"))
    world = World(MaintainerSettings(OwnSource(tmp_path / "certs", OWN), sites))
    world.check()
    (tmp_path / "a.crt").unlink()
    write(tmp_path, "b", other_key, "b.example", not_after=NOW + 90 * DAY)
    outcome = world.check()
    assert kinds(outcome) == ["loaded"]
    assert outcome.certificates is not None
    assert outcome.certificates.sites[2].pairs[0].pin != outcome.certificates.sites[1].pairs[0].pin


# --- certificates of clients


def revocations(key: Any, until: datetime | None = NOW + 90 * DAY, serial: int = 7) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clients")])
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(NOW - DAY)
    builder = builder.next_update(until or NOW + DAY).add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def client_world(folder: Path, key: Any, crl: bytes | None) -> World:
    write(folder, "site", key, "a.example", not_after=NOW + 90 * DAY)
    (folder / "ca.pem").write_bytes(
        pem(build(key, subject="clients", not_after=NOW + 400 * DAY))
        + pem(build(key, subject="clients of old", not_after=NOW + 50 * DAY))
    )
    if crl is not None:
        (folder / "crl.pem").write_bytes(crl)
    trust = ClientTrust(folder / "ca.pem", None if crl is None else folder / "crl.pem")
    return World(MaintainerSettings(foreign_site(folder, "site"), clients=trust))


def test_a_change_of_the_authorities_for_clients_is_told(tmp_path: Path, ec_key: Any) -> None:
    world = client_world(tmp_path, ec_key, None)
    outcome = world.check()
    assert (kinds(outcome), outcome.client_trust_changed) == (["loaded"], False)
    assert not world.check().client_trust_changed
    (tmp_path / "ca.pem").write_bytes(pem(build(ec_key, not_after=NOW + 400 * DAY)))
    outcome = world.check()
    assert (kinds(outcome), outcome.client_trust_changed) == (["client_trust_loaded"], True)
    assert outcome.certificates is None


def test_a_new_list_of_revoked_certificates_is_told(tmp_path: Path, ec_key: Any) -> None:
    world = client_world(tmp_path, ec_key, revocations(ec_key))
    world.check()
    (tmp_path / "crl.pem").write_bytes(revocations(ec_key, serial=8) + revocations(ec_key))
    outcome = world.check()
    assert outcome.client_trust_changed
    assert messages(outcome) == f"Loaded {tmp_path}/ca.pem and {tmp_path}/crl.pem for clients' certificates."


@pytest.mark.parametrize("name", ["ca.pem", "crl.pem"])
@pytest.mark.parametrize("data", [b"", b"junk", "cut", "bad", None])
def test_bad_files_for_clients_change_nothing_and_stop_a_start(
    tmp_path: Path, ec_key: Any, name: str, data: Any
) -> None:
    world = client_world(tmp_path, ec_key, revocations(ec_key))
    world.check()
    good = (tmp_path / name).read_bytes()
    if data is None:
        (tmp_path / name).unlink()
    elif data == "bad":
        lines = good.splitlines(keepends=True)
        (tmp_path / name).write_bytes(lines[0] + lines[1] + lines[-1])
    else:
        (tmp_path / name).write_bytes(good[:200] if data == "cut" else data)
    outcomes = world.checks(200)
    assert kinds(*outcomes) == ["files_bad"]
    assert not any(outcome.client_trust_changed for outcome in outcomes)
    assert f"{tmp_path / name}: " in messages(*outcomes)
    world.restart()
    with pytest.raises(CertificateError):
        world.check()


def test_a_name_in_an_authority_that_cannot_be_read_is_an_error(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = client_world(tmp_path, ec_key, None)

    def fail(name: x509.Name) -> str:
        raise ValueError("bad")

    monkeypatch.setattr(maintainer, "_name_of", fail)
    with pytest.raises(CertificateError, match=r"ca\.pem: holds what cannot be read"):
        world.check()


def test_a_list_without_an_end_is_refused(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = client_world(tmp_path, ec_key, revocations(ec_key))

    class Endless:
        next_update_utc = None

    monkeypatch.setattr(x509, "load_pem_x509_crl", lambda data: Endless())
    with pytest.raises(CertificateError, match="without an end"):
        world.check()


def test_the_ends_of_authorities_and_lists_for_clients_are_told(tmp_path: Path, ec_key: Any) -> None:
    world = client_world(tmp_path, ec_key, revocations(ec_key, NOW + 40 * DAY))
    world.check()
    world.checks(9)
    outcome = world.check(15 * DAY)
    assert [(notice.what, notice.days) for notice in outcome.notices] == [(str(tmp_path / "crl.pem"), 30)]
    outcome = world.check(10 * DAY)
    assert [(notice.what, notice.days) for notice in outcome.notices] == [(str(tmp_path / "ca.pem"), 30)]
    ends = [one for one in world.maintainer.status(world.now) if one.source is Source.CLIENT_AUTHORITY]
    assert [one.names for one in ends] == [("CN=clients",), ("CN=clients of old",)]


def own_clients(folder: Path) -> World:
    directory = folder / "certs"
    trust = ClientTrust(directory / "client-ca.crt", directory / "client-ca.crl", directory)
    return World(MaintainerSettings(OwnSource(directory, OWN), clients=trust))


def test_the_own_authority_for_clients_is_made_and_a_revocation_is_seen(tmp_path: Path) -> None:
    world = own_clients(tmp_path)
    assert kinds(world.check()) == ["renewed"]
    assert (tmp_path / "certs" / "client-ca.crl").exists()
    world.checks(3)
    clients.issue_client(tmp_path / "certs", "ada", lifetime=30 * DAY, now=world.now)
    assert kinds(world.check()) == []
    clients.revoke_client(tmp_path / "certs", name="ada", now=world.now)
    outcome = world.check()
    assert (kinds(outcome), outcome.client_trust_changed) == (["client_trust_loaded"], True)


def test_the_own_list_is_signed_anew_before_it_ends(tmp_path: Path) -> None:
    world = own_clients(tmp_path)
    world.check()
    outcomes = world.checks(133, 3 * DAY)
    assert 12 <= kinds(*outcomes).count("client_trust_loaded") <= 15
    assert set(kinds(*outcomes)) == {"client_trust_loaded", "renewed"}
    assert kinds(world.check(sleeps=-500 * DAY)).count("client_trust_loaded") == 1


def test_an_own_list_that_cannot_be_signed_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_clients(tmp_path)
    world.checks(5)

    def fail(*arguments: Any, **named: Any) -> Any:
        raise CertificateError("no")

    with monkeypatch.context() as patch:
        patch.setattr(clients, "refresh_crl", fail)
        outcomes = world.checks(48, HOUR)
        assert kinds(*outcomes) == ["renewal_failed", "renewal_failed"]
        assert {notice.what for outcome in outcomes for notice in outcome.notices} == {
            str(tmp_path / "certs" / "client-ca.crl")
        }
    assert kinds(*world.checks(12, HOUR)) == ["renewal_recovered"]


def test_own_authorities_for_clients_that_are_gone_are_no_error_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_clients(tmp_path)
    world.checks(3)
    monkeypatch.setattr(clients, "refresh_crl", lambda *arguments, **named: None)
    assert kinds(*world.checks(5, HOUR)) == []


def test_a_start_goes_on_with_what_is_there_for_clients_if_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_clients(tmp_path)
    world.check()
    world.restart()
    with monkeypatch.context() as patch:

        def fail(*arguments: Any, **named: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(clients, "ensure_client_authority", fail)
        outcome = world.check()
    assert kinds(outcome) == ["loaded", "renewal_failed"]
    assert "renewal_recovered" in kinds(*world.checks(90))
    world.restart()

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise CertificateError("client-ca.crt: was not made here")

    monkeypatch.setattr(clients, "ensure_client_authority", refuse)
    with pytest.raises(CertificateError, match="was not made here"):
        world.check()


# --- what is told of all that


def test_the_status_tells_all_that_is_in_use(tmp_path: Path) -> None:
    world = own_world(tmp_path, key_types=("rsa-2048", "ecdsa-p256"))
    world.check()
    rsa, ecdsa, ca = world.maintainer.status(world.now + DAY)
    assert (rsa.key_type, ecdsa.key_type, ca.key_type) == ("rsa-2048", "ecdsa-p256", "")
    assert rsa.names == ("zcp.example.com", "localhost")
    assert (rsa.source, rsa.path) == (Source.OWN, tmp_path / "certs" / "server.crt")
    assert [one.pin for one in (rsa, ecdsa)] == list(world.maintainer.certificates.pins)
    assert rsa.sha256 == world.served.leaf_sha256
    assert rsa.seconds_left == pytest.approx(89 * 86_400, abs=1)
    assert rsa.not_after == world.served.not_after
    assert ca.names[0].startswith("CN=zcproto own CA ")
    assert world.maintainer.status(world.now.astimezone(UTC) + 100 * DAY)[0].seconds_left < 0


def test_a_time_without_a_zone_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    with pytest.raises(ValueError, match="aware"):
        world.maintainer.check(NOW.replace(tzinfo=None), 1.0)


def test_a_renewal_that_finds_nothing_to_do_is_not_asked_each_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own_world(tmp_path)
    world.check()
    world.settle()
    visits = []
    real = own.keep

    def keep(*arguments: Any) -> Any:
        visits.append(world.now)
        found = real(*arguments)
        return own.OwnCertificates(
            found.pairs, found.announced, found.used, found.left_out, found.problems, world.now
        )

    monkeypatch.setattr(own, "keep", keep)
    world.checks(3600)
    world.checks(600)
    assert 8 <= len(visits) <= 12


def test_an_authority_that_cannot_be_read_for_a_while_is_watched_on(tmp_path: Path) -> None:
    world = own_world(tmp_path)
    world.check()
    path = tmp_path / "certs" / "ca.crt"
    path.rename(tmp_path / "ca.crt")
    world.checks(3)
    assert world.maintainer.status(world.now)[-1].source is Source.AUTHORITY
    (tmp_path / "ca.crt").rename(path)
    world.settle()
