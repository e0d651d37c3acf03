from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.certs.support import DAY, NOW, build, ensure, openssl, pem, pem_of_key, settings
from tests.certs.test_authority import fail_to_write, read
from zcproto.certs import (
    CertificatePair,
    NextPins,
    host,
    keys,
    load_pair,
    managed,
    rollover,
)
from zcproto.certs.managed import ManagedCertificates, ManagedSettings, cancel, renew, rotate
from zcproto.errors import CertificateError

LEAVES = ("server.crt", "server-ecdsa.crt")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pins(pairs: Iterable[CertificatePair]) -> list[str]:
    return [pair.pin for pair in pairs]


# --- the first run


@pytest.mark.requirement("first_run")
def test_a_first_run_makes_an_authority_and_one_certificate_of_each_type(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "certs"
    rsa, ecdsa = ensure(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("ca.crt", "ca.key", "server.crt", "server.key", "server-ecdsa.crt", "server-ecdsa.key", ".lock")
    }
    assert (rsa.certificate, rsa.key, rsa.key_type) == (
        folder / "server.crt",
        folder / "server.key",
        "rsa-2048",
    )
    assert (ecdsa.certificate, ecdsa.key) == (folder / "server-ecdsa.crt", folder / "server-ecdsa.key")
    assert ecdsa.key_type == "ecdsa-p256"
    for one in (rsa, ecdsa):
        assert one.names == ("zcp.example.com", "192.0.2.7", "localhost", "127.0.0.1")
        assert one.not_after == NOW.replace(microsecond=0) + 90 * DAY
        assert len(x509.load_pem_x509_certificates(one.certificate.read_bytes())) == 1
        read(one.certificate).verify_directly_issued_by(read(folder / "ca.crt"))
        assert one == load_pair(one.certificate, one.key, NOW)


@pytest.mark.requirement("first_run")
def test_everything_made_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "certs"
    old = os.umask(0)
    try:
        ensure(folder)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_what_is_done_is_reported_without_secrets(tmp_path: Path) -> None:
    sentences: list[str] = []
    folder = tmp_path / "certs"
    rsa, _ = ensure(folder, progress=sentences.append)
    assert sentences[0] == "Generating keys: rsa-2048, rsa-2048, ecdsa-p256. RSA takes some seconds."
    assert (
        sentences[1]
        == f"Created the certificate authority {folder}/ca.crt. Clients verify the server with this file."
    )
    assert sentences[2] == (
        f"Issued {folder}/server.crt (it is missing): rsa-2048 for zcp.example.com, 192.0.2.7, localhost,"
        f" 127.0.0.1; valid until 2026-08-30 12:30 UTC; SHA-256 {rsa.leaf_sha256.hex()}; pin {rsa.pin}."
    )
    assert len(sentences) == 4
    assert not any("PRIVATE" in sentence for sentence in sentences)


def test_the_names_of_the_host_are_found_unless_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.certs.managed.found_names", lambda: ("localhost", "box"))
    (one,) = ensure(tmp_path / "certs", key_types=["ecdsa-p256"], host_names=None, names=["A.example", "box"])
    assert one.names == ("a.example", "box", "localhost")
    assert host.found_names() != ("localhost", "box")


def test_too_many_names_of_the_host_are_cut_and_too_many_configured_ones_refused(tmp_path: Path) -> None:
    many = [f"n{number}.example" for number in range(100)]
    arguments: dict[str, Any] = {"key_types": ["ecdsa-p256"], "host_names": ["localhost", "a.example"]}
    (one,) = ensure(tmp_path / "certs", names=many[:99], **arguments)
    assert one.names == (*many[:99], "localhost")
    sentences: list[str] = []
    ensure(tmp_path / "certs", names=many[:99], **arguments, progress=sentences.append)
    assert sentences == []
    with pytest.raises(CertificateError, match="at most 100 names"):
        ensure(tmp_path / "certs", names=[*many, "b.example"], **arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"names": ["a_b.example"]}, "'a_b.example' is not a valid name"),
        ({"host_names": ["-"]}, "'-' is not a valid name"),
        ({"names": [], "host_names": []}, "a certificate needs a name"),
        ({"key_types": ["rsa-1024"]}, "'rsa-1024' is too weak"),
        ({"key_types": ["rsa-2048", "rsa-4096"]}, "of the same family"),
        ({"key_types": []}, "no key type"),
        ({"lifetime": 398 * DAY}, "cannot be valid for 398 days, 0:00:00; give 1 second to 397 days"),
        ({"lifetime": timedelta(0)}, "cannot be valid for 0:00:00"),
        ({"renew_before": -DAY}, "must be renewed before they expire, not 1 day, 0:00:00 after"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CertificateError, match=says):
        ensure(tmp_path / "home" / "certs", **changes)
    assert not (tmp_path / "home").exists()


def test_a_time_without_a_zone_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aware"):
        ensure(tmp_path / "certs", now=NOW.replace(tzinfo=None))


# --- later runs


def test_a_later_run_changes_nothing_and_reports_nothing(made: Path) -> None:
    before, sentences = bytes_of(made), list[str]()
    ensure(made, now=NOW + 59 * DAY, progress=sentences.append)
    assert bytes_of(made) == before
    assert sentences == []


@pytest.mark.requirement("renewal")
def test_certificates_are_renewed_thirty_days_before_they_expire_and_keep_their_keys(made: Path) -> None:
    before = ensure(made)
    moment = NOW.replace(microsecond=0) + 60 * DAY
    assert ensure(made, now=moment - timedelta(seconds=1)) == before
    after = ensure(made, now=moment)
    assert pins(after) == pins(before)
    for old, new in zip(before, after, strict=True):
        assert new.leaf_sha256 != old.leaf_sha256
        assert new.not_after == old.not_after + 60 * DAY


def test_a_new_key_is_made_where_that_is_wanted(made: Path) -> None:
    arguments: dict[str, Any] = {"renew_key": True, "announce_key": timedelta(0)}
    before = ensure(made, **arguments)
    assert ensure(made, **arguments, now=NOW + 59 * DAY) == before
    after = ensure(made, **arguments, now=NOW + 61 * DAY)
    assert not set(pins(before)) & set(pins(after))
    assert not list(made.glob("*.aside"))


@pytest.mark.parametrize("renew_before", [30 * DAY, 89 * DAY, 200 * DAY])
def test_the_time_before_expiry_is_at_most_a_third_of_the_lifetime(
    tmp_path: Path, renew_before: timedelta
) -> None:
    arguments: dict[str, Any] = {
        "lifetime": 30 * DAY,
        "renew_before": renew_before,
        "key_types": ["ecdsa-p256"],
    }
    folder = tmp_path / "certs"
    first = ensure(folder, **arguments)
    moment = NOW.replace(microsecond=0)
    assert ensure(folder, **arguments, now=moment + timedelta(days=19, hours=23)) == first
    second = ensure(folder, **arguments, now=moment + 20 * DAY)
    assert second != first
    assert ensure(folder, **arguments, now=moment + 20 * DAY) == second


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (NOW + 200 * DAY, "it expired on 2026-08-30 12:30 UTC"),
        (NOW - DAY, "it is not valid before 2026-06-01 11:30 UTC"),
    ],
)
def test_a_certificate_out_of_its_time_is_reissued_with_its_key(made: Path, now: datetime, why: str) -> None:
    before, sentences = pins(ensure(made)), list[str]()
    after = ensure(made, now=now, progress=sentences.append)
    assert pins(after) == before
    assert all(pair.not_before <= now <= pair.not_after for pair in after)
    assert sum(f"({why})" in sentence for sentence in sentences) == 2


def test_a_name_that_is_missing_is_added(made: Path) -> None:
    before, sentences = ensure(made), list[str]()
    after = ensure(made, names=["new.zcp.example.com", "zcp.example.com"], progress=sentences.append)
    assert pins(after) == pins(before)
    assert after[0].names == ("new.zcp.example.com", "zcp.example.com", "localhost", "127.0.0.1")
    assert "(it lacks the name new.zcp.example.com)" in sentences[0]
    with_host = ensure(
        made, names=["new.zcp.example.com"], host_names=["localhost", "10.1.2.3"], progress=sentences.append
    )
    assert "10.1.2.3" in with_host[1].names
    assert "(it lacks the name 10.1.2.3)" in sentences[-1]


def test_a_name_that_is_no_longer_wanted_is_no_reason_for_a_new_certificate(made: Path) -> None:
    before = bytes_of(made)
    ensure(made, names=["zcp.example.com"], host_names=["localhost"])
    assert bytes_of(made) == before


def test_another_key_type_gets_a_new_key_and_the_old_one_is_gone(made: Path) -> None:
    old_rsa, old_ecdsa = ensure(made)
    rsa, ecdsa = ensure(made, key_types=["rsa-3072", "ecdsa-p384"])
    assert (rsa.key_type, ecdsa.key_type) == ("rsa-3072", "ecdsa-p384")
    assert (rsa.certificate, ecdsa.certificate) == (old_rsa.certificate, old_ecdsa.certificate)
    assert len(list(made.glob("*.crt"))) == 3
    assert not list(made.glob("*.aside"))


def test_only_the_key_types_asked_for_are_returned_in_their_order(made: Path) -> None:
    before = bytes_of(made)
    assert [pair.key_type for pair in ensure(made, key_types=["ecdsa-p256"])] == ["ecdsa-p256"]
    assert [pair.key_type for pair in ensure(made, key_types=["ecdsa-p256", "rsa-2048"])] == [
        "ecdsa-p256",
        "rsa-2048",
    ]
    assert bytes_of(made) == before


# --- new keys, announced before they are used


KEEPS = settings(renew_key=True)
DUE = NOW.replace(microsecond=0) + 60 * DAY
"""When a certificate that was made at NOW is renewed."""

SECOND = timedelta(seconds=1)


def test_a_new_key_is_announced_a_week_before_the_renewal_and_used_at_it(made: Path) -> None:
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


def test_a_life_of_renewals_is_announced_key_by_key(made: Path) -> None:
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
def test_a_short_lived_certificate_announces_its_next_key_as_soon_as_it_is_made(
    tmp_path: Path, lifetime: timedelta
) -> None:
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


def test_a_renewal_that_is_late_keeps_the_key_and_the_new_one_follows(made: Path) -> None:
    """The server was off: nobody is locked out by a key that was not announced."""
    old = managed.ensure(made, KEEPS, NOW)
    late = DUE + 20 * DAY
    renewed = managed.ensure(made, KEEPS, late)
    assert pins(renewed.pairs) == pins(old.pairs)
    assert all(pair.not_before > NOW for pair in renewed.pairs)
    assert renewed.next_pins is not None
    assert renewed.next_pins.use_from == renewed.next_change == late + 7 * DAY
    used = managed.ensure(made, KEEPS, late + 7 * DAY)
    assert used.new_pins == renewed.next_pins.pins


def test_an_expired_certificate_is_renewed_at_once_and_its_key_follows(made: Path) -> None:
    old = managed.ensure(made, KEEPS, NOW)
    renewed = managed.ensure(made, KEEPS, NOW + 200 * DAY)
    assert pins(renewed.pairs) == pins(old.pairs)
    assert renewed.next_pins is not None
    assert renewed.next_pins.use_from == NOW.replace(microsecond=0) + 207 * DAY


def test_a_renewal_waits_a_little_for_a_key_that_was_announced_late(made: Path) -> None:
    managed.ensure(made, KEEPS, NOW)
    announced = managed.ensure(made, KEEPS, DUE - 2 * DAY)
    assert announced.next_pins is not None
    assert announced.next_pins.use_from == announced.next_change == DUE + 5 * DAY
    assert managed.ensure(made, KEEPS, DUE + 4 * DAY) == announced
    assert managed.ensure(made, KEEPS, DUE + 5 * DAY).new_pins == announced.next_pins.pins


def test_a_certificate_never_comes_to_its_end_because_it_waits_for_a_key(made: Path) -> None:
    rotate(made, settings(), NOW, use_from=DUE + 29 * DAY)
    before = managed.ensure(made, KEEPS, DUE - SECOND)
    assert before.next_change == DUE
    renewed = managed.ensure(made, KEEPS, DUE)
    assert pins(renewed.pairs) == pins(before.pairs)
    assert renewed.pairs != before.pairs
    assert renewed.next_pins == before.next_pins
    assert renewed.next_change == DUE + 29 * DAY
    assert before.next_pins is not None
    assert managed.ensure(made, KEEPS, DUE + 29 * DAY).new_pins == before.next_pins.pins


def test_an_announced_key_is_used_at_its_time_whatever_the_settings_say(made: Path) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    assert announced is not None
    sentences: list[str] = []
    used = managed.ensure(made, settings(), NOW + 7 * DAY, sentences.append)
    assert used.new_pins == announced.pins
    assert "(the time of its next key has come)" in sentences[0]
    assert not list(made.glob("*next*"))


@pytest.mark.parametrize("name", ["server.key", "server.crt"])
def test_a_lost_key_is_replaced_by_the_one_that_is_announced(made: Path, name: str) -> None:
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


def test_an_announced_key_of_the_type_that_is_wanted_next_is_used_when_the_type_changes(made: Path) -> None:
    managed.ensure(made, settings(), NOW)
    other = keys.generate("ecdsa-p384")
    next_key = rollover.announce(made, other, NOW + 7 * DAY, NOW, print)
    after = managed.ensure(made, settings(key_types=["rsa-2048", "ecdsa-p384"]), NOW + DAY)
    assert after.new_pins == (next_key.pin,)
    assert after.pairs[1].key_type == "ecdsa-p384"
    assert not list(made.glob("*next*"))


def test_a_damaged_next_key_stops_nothing(made: Path) -> None:
    announced = rotate(made, settings(), NOW)
    (made / "server.next.key").write_bytes(b"junk")
    sentences: list[str] = []
    after = managed.ensure(made, settings(), NOW + DAY, sentences.append)
    assert after.pairs == announced.pairs
    assert announced.next_pins is not None
    assert after.next_pins == NextPins(announced.next_pins.pins[1:], announced.next_pins.use_from)
    assert len(sentences) == 1
    assert (made / "server.next.key.aside").read_bytes() == b"junk"


def test_a_key_that_cannot_be_announced_is_a_problem_and_the_renewal_goes_on(
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


def test_a_next_key_that_was_used_and_cannot_be_deleted_is_used_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    assert announced is not None

    def refuse(next_key: rollover.NextKey) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(rollover, "delete", refuse)
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


def test_without_the_key_of_the_authority_nothing_is_announced_and_nothing_lost(made: Path) -> None:
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


def test_a_clock_that_was_ahead_is_caught_up(made: Path) -> None:
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


def test_a_clock_that_swings_leaves_valid_certificates_always(made: Path) -> None:
    rng = random.Random(5)
    for _ in range(25):
        now = NOW + rng.choice([1, 1, 1, 10, 500]) * rng.uniform(-50, 50) * DAY
        for pair in managed.ensure(made, KEEPS, now).pairs:
            assert pair.not_before <= now <= pair.not_after
            assert pair == load_pair(pair.certificate, pair.key, now)


def test_a_year_that_no_certificate_can_name_is_refused(tmp_path: Path) -> None:
    for year in (1, 1950, 9901, 9999):
        with pytest.raises(CertificateError, match=f"in the year {year}; correct the clock"):
            managed.ensure(tmp_path / "certs", settings(), NOW.replace(year=year))
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("announce_key", [-SECOND, 398 * DAY])
def test_an_announcement_that_is_too_long_or_negative_is_refused(
    tmp_path: Path, announce_key: timedelta
) -> None:
    with pytest.raises(CertificateError, match=r"a key cannot be announced for .*; give 0 to 397 days"):
        managed.ensure(tmp_path / "certs", settings(announce_key=announce_key), NOW)


# --- what is asked for


def test_a_renewal_that_is_asked_for_keeps_the_keys(made: Path) -> None:
    before = managed.ensure(made, settings(), NOW)
    sentences: list[str] = []
    after = renew(made, settings(), NOW + DAY, sentences.append)
    assert pins(after.pairs) == pins(before.pairs)
    assert all(pair.not_before > NOW for pair in after.pairs)
    assert (after.new_pins, after.next_pins) == ((), None)
    assert after.next_change == DUE + DAY
    assert all("(a renewal was requested)" in sentence for sentence in sentences)
    assert len(sentences) == 2


def test_a_renewal_can_be_asked_for_of_one_family(made: Path) -> None:
    announced = rotate(made, settings(), NOW)
    after = renew(made, settings(), NOW + DAY, families=["ecdsa"])
    assert after.pairs[0] == announced.pairs[0]
    assert after.pairs[1] != announced.pairs[1]
    assert after.next_pins == announced.next_pins


def test_a_renewal_that_is_asked_for_uses_an_announced_key_at_its_time_only(made: Path) -> None:
    announced = rotate(made, settings(), NOW).next_pins
    assert announced is not None
    assert renew(made, settings(), NOW + DAY).next_pins == announced
    renewed = renew(made, settings(), NOW + 7 * DAY)
    assert renewed.new_pins == announced.pins
    assert renewed.next_pins is None


def test_what_is_asked_for_in_an_empty_folder_is_a_first_run(tmp_path: Path) -> None:
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


def test_a_rotation_is_announced_for_a_week_or_for_the_time_that_is_given(made: Path) -> None:
    before = managed.ensure(made, settings(), NOW)
    one = rotate(made, settings(), NOW)
    assert one.pairs == before.pairs
    assert one.next_pins is not None
    assert one.next_pins.use_from == one.next_change == NOW.replace(microsecond=0) + 7 * DAY
    assert rotate(made, settings(announce_key=DAY), NOW + DAY).next_pins == one.next_pins
    zone = timezone(timedelta(hours=5))
    moved = rotate(made, settings(), NOW + DAY, use_from=(NOW + 30 * DAY).astimezone(zone)).next_pins
    assert moved == NextPins(one.next_pins.pins, NOW.replace(microsecond=0) + 30 * DAY)
    assert rollover.announced(made) == moved


def test_a_rotation_without_an_announcement_is_at_once(made: Path) -> None:
    before = managed.ensure(made, settings(), NOW)
    for one in (
        rotate(made, settings(announce_key=timedelta(0)), NOW),
        rotate(made, settings(), NOW, at_once=True),
    ):
        assert one.next_pins is None
        assert list(one.new_pins) == pins(one.pairs)
        assert not set(one.new_pins) & set(pins(before.pairs))
        before = one


def test_a_rotation_at_once_uses_the_keys_that_clients_may_know(made: Path) -> None:
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


@pytest.mark.parametrize("use_from", [NOW - DAY, NOW, NOW + 398 * DAY])
def test_a_key_cannot_be_announced_for_the_past_or_a_distant_future(made: Path, use_from: datetime) -> None:
    with pytest.raises(CertificateError, match="give a time in the future, at most 397 days away"):
        rotate(made, settings(), NOW, use_from=use_from)
    assert rollover.announced(made) is None


def test_mistakes_of_the_caller_are_no_errors_of_certificates(made: Path) -> None:
    with pytest.raises(ValueError, match="at once or from a later time on"):
        rotate(made, settings(), NOW, use_from=NOW + DAY, at_once=True)
    with pytest.raises(ValueError, match="aware"):
        rotate(made, settings(), NOW, use_from=NOW.replace(tzinfo=None) + DAY)


def test_what_is_asked_for_and_fails_is_an_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_is_announced_can_be_taken_back(made: Path) -> None:
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


def test_an_authority_that_could_not_be_renewed_is_a_problem(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_to_write(patch, "ca.crt")
        (problem,) = managed.ensure(made, settings(), NOW + 3600 * DAY).problems
    assert problem.startswith(f"{made}/ca.crt could not be renewed: ")
    assert managed.ensure(made, settings(), NOW + 3600 * DAY).problems == ()


def test_a_change_of_the_key_types_leaves_no_old_certificate_in_service(made: Path) -> None:
    old = managed.ensure(made, settings(), NOW)
    for key_types in (["ecdsa-p384"], ["rsa-3072"], ["ecdsa-p256"], ["rsa-2048", "ecdsa-p384"]):
        pairs = managed.ensure(made, settings(key_types=key_types), NOW).pairs
        assert [pair.key_type for pair in pairs] == key_types
        assert not {pair.leaf_sha256 for pair in pairs} & {pair.leaf_sha256 for pair in old.pairs}


# --- repairs


def test_a_missing_half_is_made_again(made: Path) -> None:
    before = pins(ensure(made))
    (made / "server.crt").unlink()
    (made / "server-ecdsa.key").unlink()
    sentences: list[str] = []
    after = pins(ensure(made, progress=sentences.append))
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert f"{made}/server.crt (it is missing)" in sentences[1]
    assert f"{made}/server-ecdsa.crt (its key is missing)" in sentences[2]


def test_a_pair_that_does_not_match_gets_a_certificate_for_the_key_that_is_there(
    made: Path, rsa_key: Any
) -> None:
    (made / "server.key").write_bytes(pem_of_key(rsa_key))
    sentences: list[str] = []
    rsa, _ = ensure(made, progress=sentences.append)
    assert rsa.pin == load_pair(made / "server.crt", made / "server.key", NOW).pin
    assert (made / "server.key").read_bytes() == pem_of_key(rsa_key)
    assert "(it does not match its key)" in sentences[0]


@pytest.mark.parametrize("name", ["server.crt", "server.key", "server-ecdsa.crt", "server-ecdsa.key"])
@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_damaged_half_is_set_aside_and_made_again(made: Path, name: str, junk: bytes) -> None:
    (made / name).write_bytes(junk)
    sentences: list[str] = []
    assert len(ensure(made, progress=sentences.append)) == 2
    assert (made / f"{name}.aside").read_bytes() == junk
    assert sentences[0].endswith(f"It was set aside as {made}/{name}.aside.")


def test_a_stray_key_of_another_type_is_set_aside_and_not_overwritten(made: Path, ec_key: Any) -> None:
    stray = pem_of_key(ec_key)
    (made / "server.crt").unlink()
    (made / "server.key").write_bytes(stray)
    sentences: list[str] = []
    rsa, _ = ensure(made, progress=sentences.append)
    assert rsa.key_type == "rsa-2048"
    assert (made / "server.key.aside").read_bytes() == stray
    assert (
        sentences[0]
        == f"{made}/server.key is a key of another type. It was set aside as {made}/server.key.aside."
    )


def test_an_encrypted_key_is_somebodys_and_stops_the_start(made: Path, rsa_key: Any) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, PrivateFormat

    data = pem_of_key(rsa_key, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass"))
    (made / "server.key").write_bytes(data)
    with pytest.raises(CertificateError, match=r"server\.key: the key is encrypted"):
        ensure(made)
    assert (made / "server.key").read_bytes() == data


def test_a_certificate_of_another_authority_is_never_overwritten(made: Path, rsa_key: Any) -> None:
    for foreign in (
        pem(build(rsa_key)),
        pem(build(rsa_key, issuer=read(made / "ca.crt").subject.rfc4514_string()[3:])),
    ):
        (made / "server.crt").write_bytes(foreign)
        (made / "server.key").write_bytes(pem_of_key(rsa_key))
        before = bytes_of(made)
        for now in (NOW, NOW + 500 * DAY):
            with pytest.raises(CertificateError) as caught:
                ensure(made, now=now)
            assert str(caught.value).startswith(
                f"{made}/server.crt: was not issued by the authority {made}/ca.crt and is never overwritten;"
            )
        assert bytes_of(made) == before


def test_keys_and_folders_that_others_can_reach_stop_the_start(made: Path) -> None:
    (made / "server.key").chmod(0o644)
    with pytest.raises(CertificateError, match=r"run: chmod 600 .*server\.key"):
        ensure(made)
    (made / "server.key").chmod(0o600)
    made.chmod(0o755)
    with pytest.raises(CertificateError, match=r"run: chmod 700 .*made"):
        ensure(made)


# --- failures


@pytest.mark.requirement("renewal")
def test_a_renewal_that_fails_leaves_the_old_certificate_in_service(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ensure(made)
    sentences: list[str] = []
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.crt")
        after = ensure(made, now=NOW + 61 * DAY, progress=sentences.append)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert sentences[0] == (
        f"{made}/server.crt could not be renewed (it expires on 2026-08-30 12:30 UTC): {made}/server.crt:"
        " cannot be written: No space left on device. The old one remains in use."
    )
    assert ensure(made, now=NOW + 61 * DAY)[0] != before[0]


def test_a_renewal_with_a_new_key_that_fails_leaves_the_old_pair_in_service(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ensure(made)
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.crt")
        changes: dict[str, Any] = {"renew_key": True, "announce_key": timedelta(0)}
        assert ensure(made, now=NOW + 61 * DAY, **changes)[0] == before[0]
    assert not list(made.glob(".*.new"))


@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "server.key", "server-ecdsa.crt"])
def test_a_first_run_that_fails_is_reported_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "certs"
    with monkeypatch.context() as patch:
        fail_to_write(patch, name)
        with pytest.raises(CertificateError, match="cannot be written: No space left on device"):
            ensure(folder)
    assert len(ensure(folder)) == 2


def test_an_error_of_the_disk_is_never_a_traceback(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made / "server.key").write_bytes(b"")

    def replace(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(CertificateError, match="made: cannot be used: Input/output error"):
        ensure(made)


# --- what a crash left


@pytest.mark.parametrize("authority_there", [True, False])
def test_what_was_staged_under_another_authority_is_not_put_in_place(
    made: Path, rsa_key: Any, authority_there: bool
) -> None:
    for path in made.glob("server.*"):
        path.unlink()
    if not authority_there:
        for path in made.iterdir():
            path.unlink()
    for name, data in ((".server.crt.new", pem(build(rsa_key))), (".server.key.new", pem_of_key(rsa_key))):
        (made / name).touch(0o600)
        (made / name).write_bytes(data)
    rsa, _ = ensure(made)
    assert rsa.names == ("zcp.example.com", "192.0.2.7", "localhost", "127.0.0.1")
    assert not list(made.glob(".*.new"))


# --- several processes


DEFAULTS = """
    import json, sys
    from datetime import UTC, datetime, timedelta
    from pathlib import Path
    from zcproto.certs import ManagedSettings, ensure

    sentences = []
    settings = ManagedSettings(
        names=["zcp.example.com"], key_types=["rsa-4096", "ecdsa-p256"],
        lifetime=timedelta(days=90), renew_before=timedelta(days=30), renew_key=False,
    )
    pairs = ensure(Path(sys.argv[1]), settings, datetime.now(UTC), sentences.append).pairs
    print(json.dumps({"sentences": sentences, "pairs": [[pair.key_type, pair.pin] for pair in pairs]}))
"""


@pytest.mark.requirement("key_size")
def test_two_processes_that_start_at_once_share_one_rsa_4096_and_one_ecdsa_certificate(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "home" / "certs"
    command = [sys.executable, "-c", textwrap.dedent(DEFAULTS), str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [json.loads(process.communicate(timeout=50)[0]) for process in processes]
    assert outputs[0]["pairs"] == outputs[1]["pairs"]
    assert [key_type for key_type, _ in outputs[0]["pairs"]] == ["rsa-4096", "ecdsa-p256"]
    makers = [
        one for one in outputs if any(sentence.startswith("Generating keys") for sentence in one["sentences"])
    ]
    assert len(makers) == 1
    assert read(folder / "ca.crt").public_key().key_size == 4096  # type: ignore[union-attr]
    strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "zcp.example.com")
    for name in LEAVES:
        openssl(*strict, "-CAfile", folder / "ca.crt", folder / name)


def test_who_has_to_wait_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sentences = fcntl.flock, list[str]()
    tries = iter([BlockingIOError(), None])

    def flock(descriptor: int, how: int) -> None:
        error = next(tries)
        if error is not None:
            raise error
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    ensure(made, progress=sentences.append)
    assert sentences == [f"Waiting for another process that is changing the certificates in {made}."]


def test_default_settings_use_the_host_names(tmp_path: Path) -> None:
    without_names = ManagedSettings([], ["ecdsa-p256"], 90 * DAY, 30 * DAY, renew_key=False)
    (one,) = managed.ensure(tmp_path / "certs", without_names, datetime.now(UTC)).pairs
    assert {"localhost", "127.0.0.1", "::1"} <= set(one.names)
