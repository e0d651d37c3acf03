"""Key rollover of managed certificates: next keys are announced before they are used; requested renewals."""

from __future__ import annotations

import errno
import random
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.certs.support import DAY, NOW, bytes_of, pins, settings
from tests.certs.test_authority import fail_to_write
from tests.helpers import raising
from zcproto.certs import keys, managed, rollover
from zcproto.certs.managed import ManagedCertificates, renew, rotate
from zcproto.certs.pair import load_pair
from zcproto.certs.rollover import NextPins, cancel
from zcproto.errors import CertificateError

# --- new keys, announced before they are used


KEEPS = settings(renew_key=True)
DUE = NOW.replace(microsecond=0) + 60 * DAY
"""When a certificate that was made at NOW is renewed."""

SECOND = timedelta(seconds=1)


def test_new_key_is_announced_a_week_before_the_renewal_and_used_at_it(made: Path) -> None:
    first = managed.ensure(made, KEEPS, NOW)
    assert (first.next_pins, first.new_pins, first.problems) == (None, (), ())
    assert first.next_change == DUE - 7 * DAY
    assert managed.ensure(made, KEEPS, DUE - 7 * DAY - SECOND) == first
    announced = managed.ensure(made, KEEPS, DUE - 7 * DAY)
    assert announced.pairs == first.pairs
    assert announced.new_pins == ()
    assert announced.next_pins is not None
    assert announced.next_pins == rollover.announced(made)
    assert announced.next_pins.use_from == announced.next_change == DUE
    assert managed.ensure(made, KEEPS, DUE - SECOND) == announced
    used = managed.ensure(made, KEEPS, DUE)
    assert tuple(pins(used.pairs)) == used.new_pins == announced.next_pins.pins
    assert used.next_pins is None
    assert not list(made.glob("*next*"))
    assert used.next_change == DUE + 53 * DAY
    assert managed.ensure(made, KEEPS, DUE) == ManagedCertificates(
        used.pairs, None, (), used.problems, used.next_change
    )


def test_every_key_of_many_renewals_is_announced(made: Path) -> None:
    """As a server asks that is sentences when something changes: every key was announced for a week."""
    seen: dict[str, datetime] = {}
    now, keys_used = NOW, 0
    for _ in range(20):
        one = managed.ensure(made, KEEPS, now)
        assert one.problems == ()
        for pin in one.next_pins.pins if one.next_pins is not None else ():
            seen.setdefault(pin, now)
        for pin in one.new_pins:
            assert now - seen[pin] >= 7 * DAY - SECOND
            keys_used += 1
        assert one.next_change > now
        now = one.next_change
    assert keys_used == 9 * 2
    assert now - NOW > 590 * DAY


@pytest.mark.parametrize("lifetime", [timedelta(minutes=1), timedelta(hours=2), 9 * DAY])
def test_short_lived_certificate_announces_its_next_key_at_issue(tmp_path: Path, lifetime: timedelta) -> None:
    short = settings(renew_key=True, lifetime=lifetime, key_types=["ecdsa-p256"])
    now, folder = NOW.replace(microsecond=0), tmp_path / "certs"
    first = managed.ensure(folder, short, now)
    for _ in range(3):
        assert first.next_change == now
        announced = managed.ensure(folder, short, now)
        assert announced.next_pins is not None
        assert announced.next_change == announced.next_pins.use_from == now + lifetime * 2 / 3
        now = announced.next_change
        first = managed.ensure(folder, short, now)
        assert first.new_pins == announced.next_pins.pins


def test_late_renewal_keeps_the_key_and_the_new_key_follows(made: Path) -> None:
    """The server was off: no client is locked out by a key that was not announced."""
    old = managed.ensure(made, KEEPS, NOW)
    late = DUE + 20 * DAY
    renewed = managed.ensure(made, KEEPS, late)
    assert pins(renewed.pairs) == pins(old.pairs)
    assert all(pair.not_before > NOW for pair in renewed.pairs)
    assert renewed.next_pins is not None
    assert renewed.next_pins.use_from == renewed.next_change == late + 7 * DAY
    used = managed.ensure(made, KEEPS, late + 7 * DAY)
    assert used.new_pins == renewed.next_pins.pins


def test_expired_certificate_is_renewed_at_once_and_the_new_key_follows(made: Path) -> None:
    old = managed.ensure(made, KEEPS, NOW)
    renewed = managed.ensure(made, KEEPS, NOW + 200 * DAY)
    assert pins(renewed.pairs) == pins(old.pairs)
    assert renewed.next_pins is not None
    assert renewed.next_pins.use_from == NOW.replace(microsecond=0) + 207 * DAY


@pytest.mark.parametrize("late", [-2 * DAY, DAY / 2])
def test_renewal_waits_briefly_for_a_key_announced_late(made: Path, late: timedelta) -> None:
    """It waits for up to a quarter of the 30 days that the certificate is still valid."""
    first = managed.ensure(made, KEEPS, NOW)
    announced = managed.ensure(made, KEEPS, DUE + late)
    assert announced.pairs == first.pairs
    assert announced.next_pins is not None
    assert announced.next_pins.use_from == announced.next_change == DUE + late + 7 * DAY
    assert managed.ensure(made, KEEPS, DUE + late + 6 * DAY) == announced
    assert managed.ensure(made, KEEPS, DUE + late + 7 * DAY).new_pins == announced.next_pins.pins


def test_certificate_never_expires_while_waiting_for_a_key(made: Path) -> None:
    rotate(made, settings(announce_key=DUE + 29 * DAY - NOW), NOW)
    before = managed.ensure(made, KEEPS, DUE - SECOND)
    assert before.next_change == DUE
    renewed = managed.ensure(made, KEEPS, DUE)
    assert pins(renewed.pairs) == pins(before.pairs)
    assert renewed.pairs != before.pairs
    assert renewed.next_pins == before.next_pins
    assert renewed.next_change == DUE + 29 * DAY
    assert before.next_pins is not None
    assert managed.ensure(made, KEEPS, DUE + 29 * DAY).new_pins == before.next_pins.pins


def test_announced_key_is_used_at_its_time_regardless_of_settings(made: Path) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    assert announced is not None
    sentences: list[str] = []
    used = managed.ensure(made, settings(), NOW + 7 * DAY, sentences.append)
    assert used.new_pins == announced.pins
    assert "(the time of its next key has come)" in sentences[0]
    assert not list(made.glob("*next*"))


@pytest.mark.parametrize("name", ["server.key", "server.crt"])
def test_lost_key_is_replaced_by_the_announced_one(made: Path, name: str) -> None:
    """Clients may know it; a lost certificate is made again for the key that all of them know."""
    before = rotate(made, settings(), NOW)
    (made / name).unlink()
    after = managed.ensure(made, settings(), NOW + DAY)
    assert before.next_pins is not None
    assert after.next_pins is not None
    if name == "server.key":
        assert after.pairs[0].pin == before.next_pins.pins[0]
        assert after.new_pins == before.next_pins.pins[:1]
        assert after.next_pins.pins == before.next_pins.pins[1:]
    else:
        assert pins(after.pairs) == pins(before.pairs)
        assert after.next_pins == before.next_pins


def test_announced_key_of_the_new_type_is_used_when_the_key_type_changes(made: Path) -> None:
    managed.ensure(made, settings(), NOW)
    other = keys.generate("ecdsa-p384")
    next_key = rollover.announce(made, other, NOW + 7 * DAY, NOW, print)
    after = managed.ensure(made, settings(key_types=["rsa-2048", "ecdsa-p384"]), NOW + DAY)
    assert after.new_pins == (next_key.pin,)
    assert after.pairs[1].key_type == "ecdsa-p384"
    assert not list(made.glob("*next*"))


def test_damaged_next_key_stops_nothing(made: Path) -> None:
    announced = rotate(made, settings(), NOW)
    (made / "server.next.key").write_bytes(b"junk")
    sentences: list[str] = []
    after = managed.ensure(made, settings(), NOW + DAY, sentences.append)
    assert after.pairs == announced.pairs
    assert announced.next_pins is not None
    assert after.next_pins == NextPins(announced.next_pins.pins[1:], announced.next_pins.use_from)
    assert len(sentences) == 1
    assert (made / "server.next.key.aside").read_bytes() == b"junk"


def test_failed_announcement_is_a_problem_and_the_renewal_continues(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = managed.ensure(made, KEEPS, NOW)
    sentences: list[str] = []
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.next.key")
        (problem,) = managed.ensure(made, KEEPS, DUE - 7 * DAY, sentences.append).problems
        assert problem in sentences
        assert problem == (
            f"The next key of {made}/server.crt could not be announced: {made}/server.next.key: cannot be"
            " written: No space left on device."
        )
        renewed = managed.ensure(made, KEEPS, DUE)
    assert renewed.pairs[0].pin == old.pairs[0].pin
    assert renewed.pairs[0] != old.pairs[0]
    assert renewed.new_pins == (renewed.pairs[1].pin,)
    later = managed.ensure(made, KEEPS, renewed.next_change)
    assert later.problems == ()
    assert later.next_pins is not None


def test_used_next_key_that_cannot_be_deleted_is_used_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    assert announced is not None
    with monkeypatch.context() as patch:
        patch.setattr(rollover, "delete", raising(OSError(errno.EROFS, "Read-only file system")))
        used = managed.ensure(made, settings(), NOW + 7 * DAY)
        assert used.new_pins == announced.pins
        assert used.next_pins is None
        assert used.problems[0] == (
            f"{made}/server.next.key is in use and could not be deleted: Read-only file system."
        )
        again = managed.ensure(made, settings(), NOW + 8 * DAY)
        assert again.pairs == used.pairs
        assert (again.new_pins, again.next_pins) == ((), None)
        assert len(again.problems) == 2
    assert managed.ensure(made, settings(), NOW + 8 * DAY).problems == ()
    assert not list(made.glob("*next*"))


def test_lost_authority_key_stops_announcements_and_loses_nothing(made: Path) -> None:
    announced = rotate(made, settings(), NOW)
    (made / "ca.key").rename(made / "ca.key.away")
    one = managed.ensure(made, KEEPS, NOW + 8 * DAY)
    assert one.pairs == announced.pairs
    assert one.next_pins == announced.next_pins
    assert len(one.problems) == 2
    for path in made.glob("*next*"):
        path.unlink()
    assert managed.ensure(made, KEEPS, DUE - DAY).next_change == DUE
    assert rollover.announced(made) is None


def test_certificates_of_a_clock_that_was_ahead_are_replaced(made: Path) -> None:
    """Announced, used and announced again by a clock that is ten years ahead; then the clock is set right."""
    ahead = NOW + 3650 * DAY
    managed.ensure(made, KEEPS, ahead)
    managed.ensure(made, KEEPS, ahead + 7 * DAY)
    wrong = managed.ensure(made, KEEPS, ahead + 60 * DAY)
    assert wrong.next_pins is not None
    assert wrong.next_pins.use_from > ahead
    right = managed.ensure(made, KEEPS, NOW + DAY)
    assert all(pair.not_before <= NOW + DAY <= pair.not_after for pair in right.pairs)
    assert right.next_pins is not None
    assert right.next_pins.pins == wrong.next_pins.pins
    assert NOW < right.next_pins.use_from <= NOW + 10 * DAY
    assert managed.ensure(made, KEEPS, right.next_pins.use_from).new_pins == wrong.next_pins.pins


def test_swinging_clock_always_leaves_valid_certificates(made: Path) -> None:
    rng = random.Random(5)
    for _ in range(25):
        now = NOW + rng.choice([1, 1, 1, 10, 500]) * rng.uniform(-50, 50) * DAY
        for pair in managed.ensure(made, KEEPS, now).pairs:
            assert pair.not_before <= now <= pair.not_after
            assert pair == load_pair(pair.certificate, pair.key, now)


def test_year_that_x509_cannot_express_is_refused(tmp_path: Path) -> None:
    for year in (1, 1950, 9901, 9999):
        with pytest.raises(CertificateError, match=f"in the year {year}; correct the clock"):
            managed.ensure(tmp_path / "certs", settings(), NOW.replace(year=year))
    assert not (tmp_path / "certs").exists()


# --- what is asked for


def test_requested_renewal_keeps_the_keys(made: Path) -> None:
    before = managed.ensure(made, settings(), NOW)
    sentences: list[str] = []
    after = renew(made, settings(), NOW + DAY, sentences.append)
    assert pins(after.pairs) == pins(before.pairs)
    assert all(pair.not_before > NOW for pair in after.pairs)
    assert (after.new_pins, after.next_pins) == ((), None)
    assert after.next_change == DUE + DAY
    assert all("(a renewal was requested)" in sentence for sentence in sentences)
    assert len(sentences) == 2


def test_renewal_can_be_requested_for_one_family(made: Path) -> None:
    announced = rotate(made, settings(), NOW)
    after = renew(made, settings(), NOW + DAY, families=["ecdsa"])
    assert after.pairs[0] == announced.pairs[0]
    assert after.pairs[1] != announced.pairs[1]
    assert after.next_pins == announced.next_pins


def test_requested_renewal_uses_an_announced_key_only_at_its_time(made: Path) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    assert announced is not None
    assert renew(made, settings(), NOW + DAY).next_pins == announced
    renewed = renew(made, settings(), NOW + 7 * DAY)
    assert renewed.new_pins == announced.pins
    assert renewed.next_pins is None


def test_request_in_an_empty_folder_is_a_first_run(tmp_path: Path) -> None:
    for number, act in enumerate((renew, rotate)):
        folder = tmp_path / str(number)
        one = act(folder, settings(), NOW)
        assert len(one.pairs) == 2
        assert set(one.new_pins) == set(pins(one.pairs))
        assert (one.next_pins is None) is (act is renew)
        if one.next_pins is not None:
            assert not set(one.next_pins.pins) & set(one.new_pins)
    at_once = rotate(tmp_path / "third", settings(), NOW, at_once=True)
    assert (len(at_once.pairs), at_once.next_pins) == (2, None)


def test_rotation_is_announced_for_a_week_or_until_the_given_time(made: Path) -> None:
    before = managed.ensure(made, settings(), NOW)
    one = rotate(made, settings(), NOW)
    assert one.pairs == before.pairs
    assert one.next_pins is not None
    assert one.next_pins.use_from == one.next_change == NOW.replace(microsecond=0) + 7 * DAY
    assert rotate(made, settings(announce_key=DAY), NOW + DAY).next_pins == one.next_pins
    assert rollover.announced(made) == one.next_pins


def test_rotation_without_announcement_is_immediate(made: Path) -> None:
    before = managed.ensure(made, settings(), NOW)
    for one in (
        rotate(made, settings(announce_key=timedelta(0)), NOW),
        rotate(made, settings(), NOW, at_once=True),
    ):
        assert one.next_pins is None
        assert list(one.new_pins) == pins(one.pairs)
        assert not set(one.new_pins) & set(pins(before.pairs))
        before = one


def test_immediate_rotation_prefers_announced_keys(made: Path) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    (made / "server-ecdsa.next.key").unlink()
    sentences: list[str] = []
    one = rotate(made, settings(), NOW + DAY, sentences.append, at_once=True)
    assert announced is not None
    assert one.new_pins[0] == announced.pins[0]
    assert one.new_pins[1] != announced.pins[1]
    assert list(one.new_pins) == pins(one.pairs)
    assert one.next_pins is None
    assert sentences[0] == "Generating keys: ecdsa-p256."
    assert "(a new key was requested)" in sentences[1]


def test_failed_request_is_an_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bytes_of(made)
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.crt")
        for act in (renew, partial(rotate, at_once=True)):
            with pytest.raises(
                CertificateError, match=r"server\.crt must be issued \(a .* requested\): .*No space"
            ):
                act(made, settings(), NOW)
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.next.key")
        with pytest.raises(CertificateError, match=r"server\.next\.key: cannot be written: No space"):
            rotate(made, settings(), NOW)
    (made / "ca.key").unlink()
    before.pop("ca.key")
    for act in (renew, rotate, partial(rotate, at_once=True)):
        with pytest.raises(
            CertificateError, match=r"ca\.key: does not exist, so no certificate can be issued"
        ):
            act(made, settings(), NOW)
    assert bytes_of(made) == before


def test_announcement_can_be_cancelled(made: Path) -> None:
    rotate(made, settings(), NOW)
    sentences: list[str] = []
    assert cancel(made, sentences.append) == (made / "server.next.key", made / "server-ecdsa.next.key")
    assert len(sentences) == 2
    assert rollover.announced(made) is None
    assert cancel(made) == ()
    before = managed.ensure(made, settings(), NOW)
    assert managed.ensure(made, settings(), NOW + 8 * DAY).pairs == before.pairs
    made.chmod(0o755)
    with pytest.raises(CertificateError, match="chmod 700"):
        cancel(made)


def test_failed_authority_renewal_is_a_problem(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_to_write(patch, "ca.crt")
        (problem,) = managed.ensure(made, settings(), NOW + 3600 * DAY).problems
    assert problem.startswith(f"{made}/ca.crt could not be renewed: ")
    assert managed.ensure(made, settings(), NOW + 3600 * DAY).problems == ()


def test_changed_key_types_leave_no_old_certificate_in_service(made: Path) -> None:
    old = managed.ensure(made, settings(), NOW)
    for key_types in (["ecdsa-p384"], ["rsa-3072"], ["ecdsa-p256"], ["rsa-2048", "ecdsa-p384"]):
        pairs = managed.ensure(made, settings(key_types=key_types), NOW).pairs
        assert [pair.key_type for pair in pairs] == key_types
        assert not {pair.leaf_sha256 for pair in pairs} & {pair.leaf_sha256 for pair in old.pairs}
