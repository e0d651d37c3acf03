"""Test the default site with certificates of a public CA: what is served and announced, and when it is ordered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.certs.acme.fake_ca import Problem, at
from tests.certs.acme.support import Desk, acme_site
from tests.certs.harness import Harness, kinds, messages
from tests.certs.support import DAY, NOW
from tests.helpers import raising
from tests.server.helpers import TIMEOUT
from zcproto.certs import managed
from zcproto.certs.acme import source as source_module
from zcproto.certs.acme.orders import Visit, VisitResult
from zcproto.certs.acme.schedule import read_record, write_record
from zcproto.certs.acme.source import BUSY_RETRY_S, AcmeSource
from zcproto.certs.checker import CheckResult
from zcproto.certs.settings import CertificateSettings
from zcproto.certs.sources import Origin
from zcproto.errors import CertificateError

SECOND = timedelta(seconds=1)


class AcmeHarness(Harness):
    """A checker whose visits go to a fake CA."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.visits: list[Visit] = []
        self.folder = folder
        self.desk = Desk(acme_site(folder, **changes), lambda: self.now)
        super().__init__(CertificateSettings(self.desk.site))

    def restart(self, rest: Any = lambda: None) -> None:
        super().restart(rest)
        assert self.source is not None
        self.source.visits.work = self.visit

    @property
    def source(self) -> AcmeSource:
        assert self.checker.acme is not None
        return self.checker.acme

    async def visit(self, visit: Visit, now: datetime) -> VisitResult:
        self.visits.append(visit)
        self.desk.site = self.checker._settings.default  # type: ignore[assignment]
        return await self.desk.visit(visit, now)

    def visited(self, after: timedelta = SECOND) -> list[CheckResult]:
        """Return what the checks find that begin a visit and take its result."""
        begun = self.check(after)
        self.source.wait(TIMEOUT)
        return [begun, self.check(), self.check()]

    @property
    def ca(self) -> Any:
        return self.desk.ca


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[AcmeHarness]:
    made = AcmeHarness(tmp_path)
    yield made
    made.checker.close()


@pytest.fixture
def ordered(harness: AcmeHarness) -> AcmeHarness:
    """A server with a certificate of the CA."""
    harness.check()
    harness.visited()
    harness.visited()  # asks when to renew
    assert harness.source.origin is Origin.ACME
    harness.visits.clear()
    return harness


def wanted(harness: AcmeHarness) -> list[str]:
    return [each.why for visit in harness.visits for each in visit.wanted]


# --- what is served ----------------------------------------------------------------------------------------


def test_managed_certificate_serves_until_the_first_one_is_there(harness: AcmeHarness) -> None:
    outcome = harness.check()
    assert outcome.serving is not None
    assert outcome.serving.sites[0].pairs[0].certificate.parent.name == "certs"
    assert [one.source for one in harness.checker.status(harness.now)] == [Origin.OWN, Origin.AUTHORITY]
    pin = harness.served.pin
    outcomes = harness.visited()
    assert wanted(harness) == ["the first one"]
    assert kinds(*outcomes) == ["renewed"]
    assert any(each.serving is not None for each in outcomes)
    assert harness.served.certificate == harness.folder / "certs" / "acme" / "server-ecdsa.crt"
    assert harness.served.pin == pin  # clients that pin notice nothing
    assert harness.checker.status(harness.now)[0].source is Origin.ACME
    assert outcomes[-1].last_renewal is not None
    assert outcomes[-1].last_renewal.ok
    assert read_record(harness.desk.site.directory).directory == harness.desk.site.acme.directory


def test_certificate_is_loaded_at_the_next_start(ordered: AcmeHarness) -> None:
    before = ordered.served
    ordered.restart()
    assert kinds(ordered.check()) == ["loaded", "loaded"]
    assert ordered.served == before
    ordered.visited()
    assert wanted(ordered) == []


def test_nothing_is_ordered_without_a_reason(ordered: AcmeHarness) -> None:
    ordered.checks(50, timedelta(minutes=5))
    assert ordered.visits == []


def test_other_processes_serve_what_one_has_ordered(ordered: AcmeHarness, tmp_path: Path) -> None:
    other = Harness(ordered.settings)
    other.maintains = False
    other.restart()
    other.check()
    assert other.served == ordered.served
    ordered.source.order_now({"ecdsa"})
    ordered.visited()
    assert kinds(*other.checks(2)) == ["loaded"]
    assert other.served == ordered.served
    assert not other.checker.acme.visits.is_running  # type: ignore[union-attr]


@pytest.mark.parametrize("unchanged", ["rsa", "ecdsa"])
def test_certificate_of_each_key_is_loaded_by_itself(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, quick_keys: None, unchanged: str
) -> None:
    harness = AcmeHarness(tmp_path, managed={"key_types": ("rsa-2048", "ecdsa-p256")})
    harness.check()
    harness.visited()
    harness.visited()  # asks when to renew: an order would wait for its end
    before = harness.checker.sites[0].pairs
    harness.source.order_now({"rsa", "ecdsa"} - {unchanged})
    harness.visited()
    is_same = [one == old for one, old in zip(harness.checker.sites[0].pairs, before, strict=True)]
    assert is_same == [unchanged == "rsa", unchanged == "ecdsa"]
    harness.checker.close()


def test_twenty_renewals_in_a_row(ordered: AcmeHarness) -> None:
    pins, serials = set(), set()
    for _ in range(20):
        ordered.now += 61 * DAY
        ordered.monotonic += 61 * 86_400
        ordered.visited()
        ordered.visited()
        pins.add(ordered.served.pin)
        serials.add(ordered.served.leaf_sha256)
        assert ordered.served.not_after > ordered.now + 80 * DAY
    assert len(pins) == 1
    assert len(serials) == 20
    assert len(set(wanted(ordered))) == 20
    assert [each["replaces"] is not None for each in ordered.ca.orders] == [False] + 20 * [True]


def test_renewal_keeps_the_pin_and_is_announced_as_renewed(ordered: AcmeHarness) -> None:
    before = ordered.served
    outcomes = ordered.visited(61 * DAY)
    assert wanted(ordered)[0].startswith("it expires on 2026-08-30")
    assert "renewed" in kinds(*outcomes)
    assert ordered.served.pin == before.pin
    assert ordered.served.leaf_sha256 != before.leaf_sha256


# --- keys --------------------------------------------------------------------------------------------------


def test_new_key_is_announced_until_the_ca_has_certified_it(ordered: AcmeHarness) -> None:
    site = ordered.desk.site
    ordered.ca.down = "the CA is down"
    old = ordered.served.pin
    managed.rotate(site.managed_directory, site.managed, ordered.now)
    outcome = ordered.check()
    assert outcome.next_pins is not None
    (new,) = outcome.next_pins.pins
    outcomes = ordered.visited(8 * DAY)  # the managed certificate has the new key
    assert wanted(ordered) == ["its key was replaced"]
    assert ordered.served.pin == old
    assert outcomes[-1].next_pins is not None
    assert outcomes[-1].next_pins.pins == (new,)
    ordered.ca.down = ""
    outcomes = ordered.visited(DAY)
    assert ordered.served.pin == new
    assert outcomes[-1].next_pins is None
    assert "key_rotated" in kinds(*outcomes)


def test_announced_key_and_uncertified_one_are_both_announced(ordered: AcmeHarness) -> None:
    site = ordered.desk.site
    ordered.ca.down = "the CA is down"
    managed.rotate(site.managed_directory, site.managed, ordered.now, at_once=True)
    managed.rotate(site.managed_directory, site.managed, ordered.now)
    outcomes = ordered.visited()
    assert outcomes[-1].next_pins is not None
    assert len(outcomes[-1].next_pins.pins) == 2
    assert outcomes[-1].next_pins.use_from < ordered.now


# --- reasons -----------------------------------------------------------------------------------------------


def change(harness: AcmeHarness, **changes: Any) -> None:
    """Restart with another configuration."""
    harness.checker.close()
    harness.settings = CertificateSettings(acme_site(harness.folder, **changes))
    harness.restart()
    harness.check()


def test_missing_name_is_ordered(ordered: AcmeHarness) -> None:
    names = ("zcp.example.com", "www.example.com", "new.example.com")
    change(ordered, names=names, managed={"names": names})
    ordered.visited()
    assert wanted(ordered) == ["it lacks the name new.example.com"]
    assert ordered.served.names == names


def test_another_directory_issues_another_certificate(ordered: AcmeHarness) -> None:
    change(ordered, directory="https://ca.example/dir?production")
    ordered.ca.down = "no route"
    ordered.visited()
    assert wanted(ordered) == ["another directory is configured"]
    assert ordered.visits[0].wanted[0].replaced is None  # the new CA does not have it
    assert ordered.served.certificate.parent.name == "acme"  # the last good one is kept


def test_certificate_that_has_expired_is_served_until_there_is_another(ordered: AcmeHarness) -> None:
    ordered.ca.down = "no route"
    before = ordered.served
    outcomes = ordered.visited(100 * DAY)
    assert ordered.served == before
    assert "renewal_failed" in kinds(*outcomes)
    assert "expiry" in kinds(*outcomes)


def test_certificate_that_cannot_be_read_is_replaced(ordered: AcmeHarness) -> None:
    (ordered.desk.site.directory / "server-ecdsa.crt").write_bytes(b"junk")
    ordered.restart()
    ordered.check()
    assert ordered.served.certificate.parent.name == "certs"
    ordered.visited()
    assert wanted(ordered) == ["the first one"]
    assert ordered.served.certificate.parent.name == "acme"


def test_deleted_certificate_is_replaced(ordered: AcmeHarness) -> None:
    (ordered.desk.site.directory / "server-ecdsa.crt").unlink()
    ordered.check()
    ordered.source.wait(TIMEOUT)
    ordered.check()
    assert wanted(ordered) == ["the first one"]


def test_half_of_a_new_pair_is_checked_again_soon(ordered: AcmeHarness) -> None:
    path = ordered.desk.site.directory / "server-ecdsa.crt"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    before = ordered.served
    ordered.check()
    assert ordered.checker.is_incomplete
    assert ordered.served == before
    path.write_bytes(whole)
    ordered.checks(2)
    assert not ordered.checker.is_incomplete
    assert wanted(ordered) == []


def test_request_orders_at_once(ordered: AcmeHarness) -> None:
    ordered.source.order_now({"rsa"})
    ordered.check()
    assert ordered.visits == []
    ordered.source.order_now({"ecdsa"})
    assert ordered.source.is_ordering
    ordered.visited()
    assert wanted(ordered) == ["a renewal was requested"]
    assert not ordered.source.is_ordering
    assert ordered.source.problem == ""


# --- when the CA wants it ----------------------------------------------------------------------------------


def test_renewal_at_the_time_that_the_ca_suggests(harness: AcmeHarness) -> None:
    harness.ca.window = {"start": at(NOW + 10 * DAY), "end": at(NOW + 20 * DAY)}
    harness.check()
    harness.visited()
    harness.visited()
    harness.visits.clear()
    harness.visited(14 * DAY)
    assert wanted(harness) == []
    assert harness.visits  # asked again
    harness.visits.clear()
    harness.visited(1 * DAY + timedelta(hours=1))  # the middle of the window, as 0.5 is the random number
    assert len(wanted(harness)) == 1


def test_ca_that_wants_a_renewal_now_gets_it(ordered: AcmeHarness) -> None:
    """RFC 9773 section 4.2: as after a revocation."""
    ordered.ca.window = {"start": at(NOW - 2 * DAY), "end": at(NOW - DAY)}
    ordered.visited(timedelta(hours=7))  # asks
    ordered.visited()
    assert wanted(ordered)[0].startswith("it expires on ")


@pytest.mark.parametrize("restarts", [False, True])
def test_ca_that_wants_each_new_certificate_renewed_gets_an_order_an_hour(
    ordered: AcmeHarness, restarts: bool
) -> None:
    ordered.ca.window = {"start": at(NOW - 2 * DAY), "end": at(NOW - DAY)}
    ordered.visited(timedelta(hours=7))
    for _ in range(5 * 12):
        ordered.source.wait(TIMEOUT)
        if restarts:
            ordered.restart()
            ordered.check()
        ordered.visited(timedelta(minutes=5))
    assert 5 <= len(wanted(ordered)) <= 6
    assert kinds(ordered.check()) == []


def test_hour_between_orders_defers_neither_a_request_nor_a_new_key(ordered: AcmeHarness) -> None:
    ordered.ca.window = {"start": at(NOW - 2 * DAY), "end": at(NOW - DAY)}
    ordered.visited(timedelta(hours=7))
    for _ in range(3):
        ordered.visited()
    ordered.source.order_now({"ecdsa"})
    for _ in range(3):
        ordered.visited()
    managed.rotate(ordered.desk.site.managed_directory, ordered.desk.site.managed, ordered.now, at_once=True)
    for _ in range(3):
        ordered.visited()
    assert wanted(ordered)[1:] == ["a renewal was requested", "its key was replaced"]


def test_clock_that_was_ahead_at_an_order_does_not_defer_renewals(ordered: AcmeHarness) -> None:
    ordered.ca.window = {"start": at(NOW - 2 * DAY), "end": at(NOW - DAY)}
    record = read_record(ordered.desk.site.directory)
    write_record(ordered.desk.site.directory, replace(record, ordered_at=NOW + 900 * DAY))
    ordered.restart()
    ordered.check()
    for _ in range(3):
        ordered.visited()
    assert len(wanted(ordered)) == 1


def test_failed_order_keeps_the_time_of_the_last_certificate(ordered: AcmeHarness) -> None:
    before = read_record(ordered.desk.site.directory).ordered_at
    assert before is not None
    ordered.ca.down = "no route"
    ordered.source.order_now({"ecdsa"})
    ordered.visited(timedelta(hours=7))
    record = read_record(ordered.desk.site.directory)
    assert record.problem
    assert record.ordered_at == before


def test_ca_cannot_defer_a_renewal_until_it_is_too_late(harness: AcmeHarness) -> None:
    harness.ca.window = {"start": at(NOW + 200 * DAY), "end": at(NOW + 300 * DAY)}
    harness.check()
    harness.visited()
    harness.visited()
    harness.visits.clear()
    harness.visited(70 * DAY)
    assert wanted(harness) == []
    harness.visited(6 * DAY)
    assert len(wanted(harness)) == 1


def test_ca_is_asked_again_when_it_says_but_not_more_often_than_each_minute(ordered: AcmeHarness) -> None:
    ordered.ca.window = {"start": at(NOW + 40 * DAY), "end": at(NOW + 50 * DAY)}
    ordered.ca.retry_after = {"retry-after": "1"}
    ordered.visited(timedelta(hours=7))
    count = len(ordered.visits)
    for _ in range(10):
        ordered.visited(timedelta(seconds=2))
    assert len(ordered.visits) == count
    ordered.visited(timedelta(minutes=1))
    assert len(ordered.visits) == count + 1


# --- failures ----------------------------------------------------------------------------------------------


def failures(harness: AcmeHarness, count: int) -> list[float]:
    """Return the seconds between failed visits."""
    delays = []
    for _ in range(count):
        waited = 0.0
        while not harness.source.is_ordering:
            harness.check(SECOND * 10)
            waited += 10
        harness.source.wait(TIMEOUT)
        harness.check(timedelta(0))
        harness.visits.clear()
        delays.append(waited)
    return delays


def test_failure_is_reported_once_and_retried_with_growing_delays(harness: AcmeHarness) -> None:
    harness.ca.down = "no route"
    harness.check()
    outcomes = harness.visited()
    assert kinds(*outcomes) == ["renewal_failed"]
    assert "no route; check acme.directory" in messages(*outcomes)
    assert outcomes[-1].last_renewal is not None
    assert not outcomes[-1].last_renewal.ok
    harness.visits.clear()
    delays = failures(harness, 12)
    assert 30 <= delays[0] <= 70
    assert delays == sorted(delays)
    assert 3 * 3600 <= delays[-1] <= 6 * 3600 + 10
    harness.ca.down = ""
    harness.visited(timedelta(hours=7))
    outcomes = harness.visited()
    assert harness.source.origin is Origin.ACME
    assert harness.source.problem == ""


def test_recovery_is_reported(harness: AcmeHarness) -> None:
    harness.ca.down = "no route"
    harness.check()
    harness.visited()
    harness.ca.down = ""
    outcomes = harness.visited(timedelta(minutes=2))
    assert kinds(*outcomes) == ["renewed", "renewal_recovered"]


@pytest.fixture
def limited(harness: AcmeHarness) -> AcmeHarness:
    """A server whose first order was refused for ten hours."""
    harness.ca.problem_at["/order"] = Problem("rateLimited", 429, retry_after="36000")
    harness.check()
    harness.visited()
    harness.visits.clear()
    return harness


def test_time_that_the_ca_wants_to_wait_is_waited(limited: AcmeHarness) -> None:
    assert 36_000 <= failures(limited, 1)[0] <= 36_010


def test_changed_clock_does_not_shorten_the_wait(limited: AcmeHarness) -> None:
    limited.check(sleeps=timedelta(days=2))
    assert limited.visits == []


def test_restart_does_not_shorten_the_wait(limited: AcmeHarness) -> None:
    record = read_record(limited.desk.site.directory)
    assert "rateLimited" in record.problem
    limited.restart()
    limited.check()
    limited.visited(timedelta(hours=1))
    assert limited.visits == []
    limited.visited(timedelta(hours=9))
    assert len(limited.visits) == 1


def test_other_settings_end_the_wait(limited: AcmeHarness) -> None:
    change(limited, challenge="http-01")
    limited.visited()
    assert len(limited.visits) == 1


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"problem": "x", "retry_at": "soon"}', b"[" * 9_999, b'{"retry_at": 7}']
)
def test_damaged_record_is_ignored(harness: AcmeHarness, data: bytes) -> None:
    harness.check()
    path = harness.desk.site.directory / "orders.json"
    path.touch(0o600)
    path.write_bytes(data)
    harness.restart()
    harness.check()
    harness.visited()
    assert harness.source.origin is Origin.ACME


def test_record_that_cannot_be_written_fails_nothing(
    harness: AcmeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module.schedule, "write_record", raising(CertificateError("no space")))
    harness.check()
    assert "renewed" in kinds(*harness.visited())


def test_certificate_that_is_issued_and_not_used_is_a_failure(harness: AcmeHarness) -> None:
    """Otherwise it would be ordered again and again."""
    harness.ca.lifetime = timedelta(seconds=1)
    harness.check()
    outcomes = harness.visited()
    assert "was issued and is not used: " in messages(*outcomes)
    assert "renewal_failed" in kinds(*outcomes)
    harness.visits.clear()
    harness.checks(5)
    assert harness.visits == []


def test_visit_of_another_process_is_waited_for(harness: AcmeHarness) -> None:
    async def busy(visit: Visit, now: datetime) -> VisitResult:
        harness.visits.append(visit)
        return VisitResult(is_busy=True)

    harness.check()
    harness.source.visits.work = busy
    assert kinds(*harness.visited()) == []
    assert harness.source.problem.startswith("another process of this server")
    harness.visits.clear()
    assert BUSY_RETRY_S <= failures(harness, 1)[0] <= BUSY_RETRY_S + 10


def test_missing_thread_is_retried(harness: AcmeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.check()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
        harness.check()
    harness.visited(timedelta(minutes=1))
    assert harness.source.origin is Origin.ACME


def test_missing_package_prevents_a_start(harness: AcmeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CertificateError, match=r"in a clone of zcproto: pip install \"\.\[acme\]\""):
        harness.check()


def test_close_ends_a_visit(harness: AcmeHarness) -> None:
    begun = threading.Event()

    async def endless(visit: Visit, now: datetime) -> VisitResult:
        begun.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    harness.check()
    harness.source.visits.work = endless
    harness.check()
    assert begun.wait(TIMEOUT)
    assert harness.source.is_ordering
    harness.checker.close()
    harness.source.wait(TIMEOUT)
    assert kinds(*harness.checks(2)) == []


def test_renewal_requested_during_an_order_fails_nothing(harness: AcmeHarness) -> None:
    harness.check()
    begun = harness.check(SECOND)
    assert harness.source.is_ordering
    harness.source.order_now({"ecdsa"})
    harness.source.wait(TIMEOUT)
    outcomes = [begun, harness.check()]
    assert "renewed" in kinds(*outcomes)
    assert "renewal_failed" not in kinds(*outcomes)


def test_fault_of_the_folder_is_found_before_the_start(harness: AcmeHarness) -> None:
    assert harness.checker.faults(harness.now) == []
    harness.check()
    assert harness.checker.faults(harness.now) == []
    harness.desk.site.directory.chmod(0o755)
    (found,) = harness.checker.faults(harness.now)
    assert "others can list or change this folder (mode 0755); run: chmod 700" in found
    harness.checker.close()
    harness.restart()
    with pytest.raises(CertificateError) as refused:
        harness.check()
    assert str(refused.value) == found
