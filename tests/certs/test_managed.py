from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.certs.support import DAY, NOW, build, bytes_of, ensure, openssl, pem, pem_of_key, pins, settings
from tests.certs.test_authority import fail_to_write, read
from tests.helpers import raising
from tests.limits import TIMEOUT
from zcproto.certs import managed, names
from zcproto.certs.managed import ManagedSettings, ReplacedKey
from zcproto.certs.pair import load_pair
from zcproto.common.files import staging_path
from zcproto.errors import CertificateError

# --- the first run


def test_result_can_be_reported_as_json(tmp_path: Path) -> None:
    result = managed.ensure(tmp_path / "certs", settings(), NOW)
    report = json.loads(json.dumps(result.report()))
    assert [each["pin"] for each in report["certificates"]] == pins(result.pairs)
    assert {each["not_after"][-1] for each in report["certificates"]} == {"Z"}
    assert (report["next_pins"] is None) == (result.next_pins is None)


@pytest.mark.requirement("first_run")
def test_first_run_creates_an_authority_and_one_certificate_of_each_type(tmp_path: Path) -> None:
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
def test_created_files_are_readable_only_by_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "certs"
    old = os.umask(0)
    try:
        ensure(folder)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_progress_is_reported_without_secrets(tmp_path: Path) -> None:
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


def test_host_names_are_detected_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.certs.managed.found_names", lambda: ("localhost", "box"))
    (one,) = ensure(tmp_path / "certs", key_types=["ecdsa-p256"], host_names=None, names=["A.example", "box"])
    assert one.names == ("a.example", "box", "localhost")
    assert names.found_names() != ("localhost", "box")


def test_excess_host_names_are_dropped_and_excess_configured_names_refused(tmp_path: Path) -> None:
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
    ],
)
def test_invalid_settings_are_refused_before_anything_is_created(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CertificateError, match=says):
        ensure(tmp_path / "home" / "certs", **changes)
    assert not (tmp_path / "home").exists()


def test_naive_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aware"):
        ensure(tmp_path / "certs", now=NOW.replace(tzinfo=None))


@pytest.mark.parametrize("year", [1951, 9900])
def test_certificates_are_issued_in_every_year_that_x509_can_express(tmp_path: Path, year: int) -> None:
    rsa, _ = ensure(tmp_path / str(year), now=NOW.replace(year=year))
    assert rsa.not_after > NOW.replace(year=year)
    for beyond in (1950, 9901):
        with pytest.raises(CertificateError, match=f"in the year {beyond}"):
            ensure(tmp_path / str(beyond), now=NOW.replace(year=beyond))


# --- later runs


def test_second_run_changes_and_reports_nothing(made: Path) -> None:
    before, sentences = bytes_of(made), list[str]()
    ensure(made, now=NOW + 59 * DAY, progress=sentences.append)
    assert bytes_of(made) == before
    assert sentences == []


@pytest.mark.requirement("renewal")
def test_certificates_are_renewed_thirty_days_before_expiry_with_their_keys(made: Path) -> None:
    before = ensure(made)
    moment = NOW.replace(microsecond=0) + 60 * DAY
    assert ensure(made, now=moment - timedelta(seconds=1)) == before
    after = ensure(made, now=moment)
    assert pins(after) == pins(before)
    for old, new in zip(before, after, strict=True):
        assert new.leaf_sha256 != old.leaf_sha256
        assert new.not_after == old.not_after + 60 * DAY


def test_new_key_is_generated_with_renew_key(made: Path) -> None:
    arguments: dict[str, Any] = {"renew_key": True, "announce_key": timedelta(0)}
    before = ensure(made, **arguments)
    assert ensure(made, **arguments, now=NOW + 59 * DAY) == before
    after = ensure(made, **arguments, now=NOW + 61 * DAY)
    assert not set(pins(before)) & set(pins(after))
    assert not list(made.glob("*.aside"))


@pytest.mark.parametrize("renew_before", [30 * DAY, 89 * DAY, 200 * DAY])
def test_renew_before_is_limited_to_a_third_of_the_lifetime(tmp_path: Path, renew_before: timedelta) -> None:
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
def test_expired_or_not_yet_valid_certificate_is_reissued_with_its_key(
    made: Path, now: datetime, why: str
) -> None:
    before, sentences = pins(ensure(made)), list[str]()
    after = ensure(made, now=now, progress=sentences.append)
    assert pins(after) == before
    assert all(pair.not_before <= now <= pair.not_after for pair in after)
    assert sum(f"({why})" in sentence for sentence in sentences) == 2


def test_missing_name_is_added(made: Path) -> None:
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


def test_surplus_name_does_not_reissue_the_certificate(made: Path) -> None:
    before = bytes_of(made)
    ensure(made, names=["zcp.example.com"], host_names=["localhost"])
    assert bytes_of(made) == before


def test_changed_key_type_gets_a_new_key_and_replaces_the_old_one(made: Path) -> None:
    old_rsa, old_ecdsa = ensure(made)
    rsa, ecdsa = ensure(made, key_types=["rsa-3072", "ecdsa-p384"])
    assert (rsa.key_type, ecdsa.key_type) == ("rsa-3072", "ecdsa-p384")
    assert (rsa.certificate, ecdsa.certificate) == (old_rsa.certificate, old_ecdsa.certificate)
    assert len(list(made.glob("*.crt"))) == 3
    assert not list(made.glob("*.aside"))


def test_only_configured_key_types_are_returned_in_order(made: Path) -> None:
    before = bytes_of(made)
    assert [pair.key_type for pair in ensure(made, key_types=["ecdsa-p256"])] == ["ecdsa-p256"]
    assert [pair.key_type for pair in ensure(made, key_types=["ecdsa-p256", "rsa-2048"])] == [
        "ecdsa-p256",
        "rsa-2048",
    ]
    assert bytes_of(made) == before


# --- repairs


def test_missing_half_of_a_pair_is_replaced(made: Path) -> None:
    before = pins(ensure(made))
    (made / "server.crt").unlink()
    (made / "server-ecdsa.key").unlink()
    sentences: list[str] = []
    after = pins(ensure(made, progress=sentences.append))
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert f"{made}/server.crt (it is missing)" in sentences[1]
    assert f"{made}/server-ecdsa.crt (its key is missing)" in sentences[2]


def test_mismatched_pair_gets_a_certificate_for_the_existing_key(made: Path, rsa_key: Any) -> None:
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
def test_damaged_half_of_a_pair_is_set_aside_and_replaced(made: Path, name: str, junk: bytes) -> None:
    (made / name).write_bytes(junk)
    sentences: list[str] = []
    assert len(ensure(made, progress=sentences.append)) == 2
    assert (made / f"{name}.aside").read_bytes() == junk
    assert sentences[0].endswith(f"It was set aside as {made}/{name}.aside.")


@pytest.mark.parametrize("junk", [b"junk", None])
def test_replaced_key_is_reported_with_both_pins(made: Path, junk: bytes | None) -> None:
    old = load_pair(made / "server.crt", made / "server.key", NOW).pin
    spoil(made / "server.key", junk)
    found = managed.ensure(made, settings(), NOW)
    (replaced,) = found.replaced_keys
    assert replaced == ReplacedKey(made / "server.key", old, found.pairs[0].pin)
    assert old != found.pairs[0].pin
    assert managed.ensure(made, settings(), NOW).replaced_keys == ()


def test_replaced_key_of_a_lost_certificate_has_no_old_pin(made: Path) -> None:
    for name in ("server.crt", "server.key"):
        (made / name).write_bytes(b"junk")
    (replaced,) = managed.ensure(made, settings(), NOW).replaced_keys
    assert replaced.old_pin == ""


def test_damaged_certificate_keeps_its_key_without_a_report(made: Path) -> None:
    (made / "server.crt").write_bytes(b"junk")
    assert managed.ensure(made, settings(repair=False), NOW).replaced_keys == ()


@pytest.mark.parametrize("junk", [b"junk", None, "the other"])
def test_without_repair_a_damaged_or_lost_key_is_refused_and_kept(
    made: Path, junk: bytes | str | None
) -> None:
    spoil(made / "server.key", (made / "server-ecdsa.key").read_bytes() if isinstance(junk, str) else junk)
    before = bytes_of(made)
    with pytest.raises(CertificateError, match=r"server\.key.*restore the key.*certificates\.repair = true"):
        managed.ensure(made, settings(repair=False), NOW)
    assert bytes_of(made) == before


def test_first_run_without_repair_creates_everything(tmp_path: Path) -> None:
    found = managed.ensure(tmp_path / "certs", settings(repair=False), NOW)
    assert (len(found.pairs), found.replaced_keys) == (2, ())


def spoil(path: Path, junk: bytes | None) -> None:
    path.unlink() if junk is None else path.write_bytes(junk)


def test_stray_key_of_another_type_is_set_aside(made: Path, ec_key: Any) -> None:
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


def test_encrypted_key_prevents_a_start(made: Path, rsa_key: Any) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, PrivateFormat

    data = pem_of_key(rsa_key, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass"))
    (made / "server.key").write_bytes(data)
    with pytest.raises(CertificateError, match=r"server\.key: the key is encrypted"):
        ensure(made)
    assert (made / "server.key").read_bytes() == data


def test_certificate_of_another_issuer_is_never_overwritten(made: Path, rsa_key: Any) -> None:
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
                f"{made}/server.crt: was not issued by {made}/ca.crt and is never replaced;"
            )
        assert bytes_of(made) == before


def test_keys_and_folders_accessible_by_others_prevent_a_start(made: Path) -> None:
    (made / "server.key").chmod(0o644)
    with pytest.raises(CertificateError, match=r"run: chmod 600 .*server\.key"):
        ensure(made)
    (made / "server.key").chmod(0o600)
    made.chmod(0o755)
    with pytest.raises(CertificateError, match=r"run: chmod 700 .*made"):
        ensure(made)


# --- failures


@pytest.mark.requirement("renewal")
def test_failed_renewal_keeps_the_old_certificate_in_service(
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


def test_failed_renewal_with_a_new_key_keeps_the_old_pair_in_service(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ensure(made)
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.crt")
        changes: dict[str, Any] = {"renew_key": True, "announce_key": timedelta(0)}
        assert ensure(made, now=NOW + 61 * DAY, **changes)[0] == before[0]
    assert not list(made.glob(".*.new"))


@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "server.key", "server-ecdsa.crt"])
def test_failed_first_run_is_reported_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "certs"
    with monkeypatch.context() as patch:
        fail_to_write(patch, name)
        with pytest.raises(CertificateError, match="cannot be written: No space left on device"):
            ensure(folder)
    assert len(ensure(folder)) == 2


def test_disk_error_is_always_a_certificate_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made / "server.key").write_bytes(b"")
    monkeypatch.setattr(Path, "replace", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CertificateError, match="made: cannot be used: Input/output error"):
        ensure(made)


# --- what a crash left


@pytest.mark.parametrize("authority_there", [True, False])
def test_pair_staged_under_another_authority_is_not_installed(
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
    from zcproto.certs import files
    from zcproto.certs.managed import ManagedSettings, ensure

    files.LOCK_WAIT_S = float(sys.argv[2])  # a busy machine makes the keys in minutes
    sentences = []
    settings = ManagedSettings(
        names=["zcp.example.com"], key_types=["rsa-4096", "ecdsa-p256"],
        lifetime=timedelta(days=90), renew_before=timedelta(days=30), renew_key=False,
    )
    pairs = ensure(Path(sys.argv[1]), settings, datetime.now(UTC), sentences.append).pairs
    print(json.dumps({"sentences": sentences, "pairs": [[pair.key_type, pair.pin] for pair in pairs]}))
"""


@pytest.mark.requirement("key_size")
def test_two_concurrent_processes_share_one_rsa_4096_and_one_ecdsa_certificate(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "home" / "certs"
    command = [sys.executable, "-c", textwrap.dedent(DEFAULTS), str(folder), str(TIMEOUT)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [json.loads(process.communicate(timeout=TIMEOUT)[0]) for process in processes]
    assert outputs[0]["pairs"] == outputs[1]["pairs"]
    assert [key_type for key_type, _ in outputs[0]["pairs"]] == ["rsa-4096", "ecdsa-p256"]
    makers = [
        one for one in outputs if any(sentence.startswith("Generating keys") for sentence in one["sentences"])
    ]
    assert len(makers) == 1
    assert read(folder / "ca.crt").public_key().key_size == 4096  # type: ignore[union-attr]
    strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "zcp.example.com")
    for name in ("server.crt", "server-ecdsa.crt"):
        openssl(*strict, "-CAfile", folder / "ca.crt", folder / name)


def test_wait_for_another_process_is_reported(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- what would happen at a start -----------------------------------------------------------------------------


def _write(made: Path, name: str, data: bytes) -> None:
    (made / name).write_bytes(data)


def _stage(made: Path, key: Any) -> None:
    """Leave what an installation leaves that is interrupted between its two renames."""
    certificate, new_key = made / "server-ecdsa.crt", made / "server-ecdsa.key"
    for path in (certificate, new_key):
        path.rename(staging_path(path))
    _remove(made, "server.crt", "server.key")
    staging_path(new_key).rename(new_key)


def _remove(made: Path, *names: str) -> None:
    for name in names or [path.name for path in made.iterdir()]:
        (made / name).unlink()


DAMAGES: dict[str, Callable[[Path, Any], object]] = {
    "nothing": lambda made, key: None,
    "no folder": lambda made, key: shutil.rmtree(made),
    "empty folder": lambda made, key: _remove(made),
    "damaged certificate": lambda made, key: _write(made, "server.crt", b"?"),
    "damaged key": lambda made, key: _write(made, "server-ecdsa.key", b"?"),
    "lost key": lambda made, key: _remove(made, "server.key"),
    "key of another certificate": lambda made, key: _write(made, "server-ecdsa.key", pem_of_key(key)),
    "key of another type": lambda made, key: _write(made, "server.key", pem_of_key(key)),
    "lost authority": lambda made, key: _remove(made, "ca.crt"),
    "damaged authority": lambda made, key: _write(made, "ca.crt", b"?"),
    "lost authority and key": lambda made, key: _remove(made, "ca.crt", "ca.key"),
    "lost key of the authority": lambda made, key: _remove(made, "ca.key"),
    "lost key of the authority and certificate": lambda made, key: _remove(made, "ca.key", "server.crt"),
    "authority of another program": lambda made, key: _write(made, "ca.crt", pem(build(key))),
    "certificate of another program": lambda made, key: _write(made, "server.crt", pem(build(key))),
    "interrupted installation": _stage,
    "mode of a key": lambda made, key: (made / "server.key").chmod(0o644),
    "mode of the authority's key": lambda made, key: (made / "ca.key").chmod(0o644),
    "mode of a certificate": lambda made, key: (made / "server.crt").chmod(0o666),
    "mode of the folder": lambda made, key: made.chmod(0o755),
}


@pytest.mark.usefixtures("quick_keys")
@pytest.mark.parametrize("later", [0 * DAY, 70 * DAY, 200 * DAY, 4000 * DAY])
@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_check_finds_what_prevents_a_start_and_changes_nothing(
    made: Path, ec_key: Any, damage: str, repair: bool, later: timedelta
) -> None:
    DAMAGES[damage](made, ec_key)
    before = bytes_of(made) if made.exists() else None
    found = refused = ""
    try:
        managed.check(made, settings(repair=repair), NOW + later)
    except CertificateError as error:
        found = str(error)
    assert (bytes_of(made) if made.exists() else None) == before
    try:
        ensure(made, NOW + later, repair=repair)
    except CertificateError as error:
        refused = str(error)
    assert found == refused


@pytest.mark.parametrize("damage", ["no folder", "empty folder", "lost authority", "lost key"])
@pytest.mark.parametrize("reason", [errno.EACCES, errno.ENOSPC])
def test_check_finds_a_folder_that_cannot_be_written(
    made: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch, damage: str, reason: int
) -> None:
    DAMAGES[damage](made, ec_key)
    if reason == errno.EACCES:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        full = os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(CertificateError, match=f"cannot be written: {os.strerror(reason)}"):
        managed.check(made, settings(), NOW)
    monkeypatch.undo()
    managed.check(made, settings(), NOW)
