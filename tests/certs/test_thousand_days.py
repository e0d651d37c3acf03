"""A thousand days of a server's certificates, on a disk that fails, with a clock that jumps, and with restarts.

What must be true is in `Life.check`. ZCPROTO_THOUSAND_DAYS=N runs N lives of a thousand days instead of two.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.certs.support import DAY, NOW, build, pem, pem_of_key
from zcproto.certs import client_ca, keys, lifecycle, managed, rollover
from zcproto.certs.checker import CertificateChecker, CheckResult
from zcproto.certs.external import ExternalSite
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.notices import NoticeKind
from zcproto.certs.pair import CertificatePair
from zcproto.certs.settings import CertificateSettings, ManagedSite
from zcproto.errors import CertificateError
from zcproto.tls.context import ClientTrust

LIVES = int(os.environ.get("ZCPROTO_THOUSAND_DAYS", "2"))
DAYS = 1000

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE)
FUNCTIONS = ("open", "fsync", "fstat", "stat", "replace", "unlink", "mkdir", "fchmod")
NAMES = ("a.example", "b.a.example")


class Killed(BaseException):
    """The process ends here, in the middle of what it does."""


class Disk:
    """What the checker sees of the disk. Outside of `active` it is the real one."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.failure_rate = 0.0
        self.kill_after: int | None = None
        self.failed = False
        self._active = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in FUNCTIONS:
                patch.setattr(os, name, self._wrap(getattr(os, name)))
            yield

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._active, self.failed = True, False
        try:
            yield
        finally:
            self._active = False

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._active:
                self._maybe_fail()
            return real(*arguments, **named)

        return call

    def _maybe_fail(self) -> None:
        if self.kill_after is not None:
            self.kill_after -= 1
            if self.kill_after < 0:
                self.kill_after = None
                raise Killed
        if self.failure_rate and self.chance.random() < self.failure_rate:
            self.failed = True
            error = self.chance.choice(ERRORS)
            raise OSError(error, os.strerror(error))


class ExternalProgram:
    """A program that renews the certificate of a site: the certificate first, the key later."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key = folder / "site.crt", folder / "site.key"
        self._key: Any = None
        self.renew()
        self.finish()

    @property
    def is_half_done(self) -> bool:
        return self._key is not None

    def renew(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        san = x509.SubjectAlternativeName([x509.DNSName("site.example")])
        century = {
            "not_before": datetime(1990, 1, 1, tzinfo=UTC),
            "not_after": datetime(2090, 1, 1, tzinfo=UTC),
        }
        self._write(self.certificate, pem(build(self._key, extensions=[san], **century)))

    def finish(self) -> None:
        if self._key is not None:
            self._write(self.key, pem_of_key(self._key))
        self._key = None

    def _write(self, path: Path, data: bytes) -> None:
        path.touch(0o600)
        path.write_bytes(data)


@dataclass
class Life:
    """A machine with its clock and its disk, and the process that serves on it, again and again."""

    folder: Path
    chance: random.Random
    settings: ManagedSettings
    has_own_clients: bool
    wall: datetime = NOW
    monotonic: float = 1.0
    checker: CertificateChecker | None = None
    reported: set[tuple[str, datetime, int]] = field(default_factory=set)
    """Alerts of this process: what, its end, the threshold."""
    pins: dict[str, str] = field(default_factory=dict)
    """What is served, by key type, over restarts."""
    may_be_pins: set[str] | None = field(default_factory=set)
    """Pins that may come to be served instead; None if any may."""
    failed_at: float = -1000.0
    given: set[CertificatePair] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.disk = Disk(random.Random(self.chance.random()))
        self.external = ExternalProgram(self.folder)
        self.directory = self.folder / "certs"
        if self.has_own_clients:
            own_trust = (self.directory / name for name in ("client-ca.crt", "client-ca.crl"))
            self.trust = ClientTrust(*own_trust)
        else:
            self.trust = ClientTrust(write_authorities(self.folder / "clients.pem"))

    # --- what happens

    def step(self, name: str, amount: int) -> None:
        """Something happens, and then a check is made. `amount` is from 0 to 99."""
        self.count(name)
        getattr(self, f"do_{name}")(amount)
        self.check()
        if self.directory.exists():
            self.note_announced()

    def do_nothing(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1 + amount))

    def do_wait(self, amount: int) -> None:
        self.pass_time(timedelta(hours=1 + amount))

    def do_set_clock(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1))
        days = self.chance.choice([0.01, 1, 40, 1500]) * (amount - 50) / 50
        # Within what certificates of the other site are good for.
        year = (self.wall + timedelta(days=days)).year
        if 1995 < year < 2080:
            self.wall += timedelta(days=days)

    def do_disk_fails(self, amount: int) -> None:
        self.pass_time(timedelta(minutes=1))
        self.disk.failure_rate = self.chance.choice([0.01, 0.1, 1.0])

    def do_disk_works(self, amount: int) -> None:
        self.pass_time(timedelta(minutes=1))
        self.disk.failure_rate = 0.0

    def do_restart(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1 + amount))
        self.end()

    def do_kill(self, amount: int) -> None:
        """The process ends in the midst of the next visit to the disk that comes so far."""
        self.pass_time(timedelta(days=31))
        self.disk.kill_after = amount

    def do_renew(self, amount: int) -> None:
        self.by_hand(managed.renew)

    def do_rotate(self, amount: int) -> None:
        self.by_hand(managed.rotate)

    def do_rotate_at_once(self, amount: int) -> None:
        self.may_be_pins = None
        self.by_hand(lambda *arguments: managed.rotate(*arguments, at_once=True))

    def do_cancel(self, amount: int) -> None:
        self.by_hand(lambda directory, settings, now: rollover.cancel(directory))

    def do_damage(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1))
        for path in self.directory.glob("server*.crt"):
            path.write_bytes(b"junk" * amount)

    def do_lose_keys(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1))
        self.may_be_pins = None
        for path in self.directory.glob("server*.key"):
            path.unlink()

    def do_external_begins(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1))
        self.external.renew()

    def do_external_finishes(self, amount: int) -> None:
        self.pass_time(timedelta(seconds=1))
        self.external.finish()

    def by_hand(self, command: Callable[[Path, ManagedSettings, datetime], object]) -> None:
        """What the command line does, in a process of its own. It may fail."""
        self.pass_time(timedelta(seconds=1))
        if self.directory.exists():
            with contextlib.suppress(CertificateError):
                command(self.directory, self.settings, self.wall)
            self.note_announced()

    def note_announced(self) -> None:
        announced = rollover.announced(self.directory)
        if announced is not None and self.may_be_pins is not None:
            self.may_be_pins.update(announced.pins)

    def pass_time(self, time: timedelta) -> None:
        self.wall += time
        self.monotonic += time.total_seconds()

    def end(self) -> None:
        self.checker = None
        self.given = set()
        self.reported.clear()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # --- what must be true

    def check(self) -> None:
        is_start = self.checker is None
        checker = self.checker or self.new_checker()
        try:
            with self.disk.active():
                outcome = checker.check(self.wall, self.monotonic)
        except Killed:
            self.count("killed")
            return self.end()
        except CertificateError:
            # Only a start may fail, or a context for files that changed after they were loaded.
            assert is_start or not checker._is_proven
            assert self.disk.failed or self.external.is_half_done
            self.count("refused")
            return None
        self.checker = checker
        self.check_valid(checker)
        self.check_matches(checker, outcome)
        self.check_alerts(checker, outcome)
        self.check_pins(checker)
        self.check_bounds(checker)
        for notice in outcome.notices:
            self.count(notice.kind.value)
        return None

    def new_checker(self) -> CertificateChecker:
        site = ExternalSite(("site.example",), (self.external.certificate,), (self.external.key,))
        return CertificateChecker(
            CertificateSettings(
                ManagedSite(self.directory, self.settings),
                (site,),
                (30, 7, 1),
                self.trust,
                self.directory if self.has_own_clients else None,
            ),
            ("zcp/1",),
            random=self.disk.chance.random,
            environ={},
        )

    def check_valid(self, checker: CertificateChecker) -> None:
        """If the disk works, all that is served is valid now, whatever the clock has done.

        After a failure this may take the first delay, also if nothing is valid: making keys is costly.
        """
        if self.disk.failed:
            self.failed_at = self.monotonic
        if self.monotonic - self.failed_at < lifecycle.FIRST_DELAY_S:
            return
        served = checker.sites[0].pairs
        assert [one.key_type for one in served] == list(self.settings.key_types)
        for one in served:
            assert one.not_before <= self.wall <= one.not_after

    def check_matches(self, checker: CertificateChecker, outcome: CheckResult) -> None:
        """What is new in what is given is in its files as a pair; what was given before may be lost by now."""
        before = self.given
        if outcome.serving is not None:
            self.given = set(outcome.serving.pairs)
        assert self.given == {pair for site in checker.sites for pair in site.pairs}
        for one in self.given - before:
            if one.certificate == self.external.certificate and self.external.is_half_done:
                assert one.leaf_sha256 != fingerprint(one.certificate)
            elif not self.disk.failed:
                assert is_in_its_files(one)

    def check_alerts(self, checker: CertificateChecker, outcome: CheckResult) -> None:
        """Each threshold of each certificate is reported once in the life of a process."""
        for notice in outcome.notices:
            if notice.kind is NoticeKind.EXPIRY:
                assert notice.not_after is not None
                assert notice.days is not None
                alert = (notice.path, notice.not_after, notice.days)
                assert alert not in self.reported
                self.reported.add(alert)
        reported = {(what, not_after) for what, not_after, _ in self.reported}
        overdue = min(29 * DAY, self.settings.lifetime / 4)
        for one in checker.sites[0].pairs:
            if one.not_after - self.wall <= overdue:
                assert (str(one.certificate), one.not_after) in reported

    def check_pins(self, checker: CertificateChecker) -> None:
        """A renewal keeps the key, unless another one was announced or asked for, or the key was lost."""
        for one in checker.sites[0].pairs:
            before = self.pins.get(one.key_type)
            if before not in {None, one.pin}:
                assert self.may_be_pins is None or one.pin in self.may_be_pins
                self.count("rotated")
            self.pins[one.key_type] = one.pin
        if not self.disk.failed and all(map(is_in_its_files, checker.sites[0].pairs)):
            self.may_be_pins = self.may_be_pins or set()  # what was lost or asked for has been made

    def check_bounds(self, checker: CertificateChecker) -> None:
        """Neither files nor memory grow."""
        assert len(list(self.directory.iterdir())) <= 24
        assert len(self.may_be_pins or ()) < 200
        assert len(checker._alerts._reported) <= 12
        assert len(checker.status(self.wall)) <= 12


def write_authorities(path: Path) -> Path:
    """Authorities that end one after the other."""
    key = ec.generate_private_key(ec.SECP256R1())
    ends = [NOW + number * 150 * DAY for number in range(1, 8)]
    path.write_bytes(b"".join(pem(build(key, subject=f"of {end:%Y-%m-%d}", not_after=end)) for end in ends))
    return path


def fingerprint(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).fingerprint(hashes.SHA256())


def is_in_its_files(one: CertificatePair) -> bool:
    """Whether its files are a pair, and this one."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(one.certificate, one.key)
        return fingerprint(one.certificate) == one.leaf_sha256
    except (OSError, ValueError):
        return False


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch, rsa_key: Any, other_rsa_key: Any) -> None:
    """RSA keys that are there already, one after the other; ECDSA keys are made as quickly."""
    ready = [rsa_key, other_rsa_key]
    real = keys.generate

    def generate(kind: str) -> keys.PrivateKey:
        if keys.family(kind) == "ecdsa":
            return real(kind)
        ready.append(ready.pop(0))
        return ready[0]

    monkeypatch.setattr(keys, "generate", generate)
    monkeypatch.setattr(client_ca, "KEY_TYPE", "ecdsa-p256")


def own_settings(**changes: Any) -> ManagedSettings:
    return ManagedSettings(
        **{
            "names": NAMES,
            "key_types": ("ecdsa-p256",),
            "lifetime": 90 * DAY,
            "renew_before": 30 * DAY,
            "renew_key": False,
            "host_names": ("localhost",),
            **changes,
        }
    )


STEPS = {
    "nothing": 40,
    "wait": 40,
    "set_clock": 6,
    "disk_fails": 6,
    "disk_works": 10,
    "restart": 4,
    "kill": 3,
    "renew": 2,
    "rotate": 2,
    "rotate_at_once": 1,
    "cancel": 1,
    "damage": 2,
    "lose_keys": 1,
    "external_begins": 2,
    "external_finishes": 10,
}
"""What happens, and how often."""


@pytest.mark.no_cover  # a search, which coverage makes slow: the other tests of the room cover all lines
@pytest.mark.timeout(60 * LIVES + 60)
@pytest.mark.parametrize("seed", range(LIVES))
def test_a_thousand_days(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    life = Life(tmp_path, chance, own_settings(renew_key=seed % 2 == 1), has_own_clients=seed % 2 == 0)
    with life.disk.installed():
        while life.monotonic < DAYS * 86_400:
            (name,) = chance.choices(list(STEPS), list(STEPS.values()))
            life.step(name, chance.randrange(100))
    # It was a life in which everything happened.
    assert {*STEPS, "killed", "refused"} - life.counts.keys() == set()
    assert {
        "renewed",
        "rotated",
        "renewal_failed",
        "renewal_recovered",
        "files_bad",
    } - life.counts.keys() == set()
    assert life.has_own_clients or "expiry" in life.counts


@pytest.mark.no_cover  # a search, which coverage makes slow: the other tests of the room cover all lines
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 32),
    has_own_clients=st.booleans(),
    renew_key=st.booleans(),
    short=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 99)), max_size=25),
)
def test_any_order_of_events(
    tmp_path: Path,
    seed: int,
    has_own_clients: bool,
    renew_key: bool,
    short: bool,
    steps: list[tuple[str, int]],
) -> None:
    """The same, small enough that a fault is shown in its shortest form."""
    folder = tmp_path / "life"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(0o700)
    lifetime = timedelta(days=2) if short else 90 * DAY
    kept = own_settings(renew_key=renew_key, lifetime=lifetime)
    life = Life(folder, random.Random(seed), kept, has_own_clients)
    with life.disk.installed():
        for name, amount in steps:
            life.step(name, amount)
