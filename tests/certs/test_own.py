from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from zcproto.certs import CertificatePair, authority, ensure_own_certificates, files, host, keys, load_pair
from zcproto.errors import CertificateError

from .support import DAY, NOW, build, der, ensure, openssl, pem, pem_of_key
from .test_authority import fail_to_write, read

LEAVES = ("server.crt", "server-ecdsa.crt")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pins(pairs: list[CertificatePair]) -> list[str]:
    return [pair.pin for pair in pairs]


# --- the first run


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


def test_everything_made_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "certs"
    old = os.umask(0)
    try:
        ensure(folder)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_what_is_done_is_told_without_secrets(tmp_path: Path) -> None:
    told: list[str] = []
    folder = tmp_path / "certs"
    rsa, _ = ensure(folder, progress=told.append)
    assert told[0] == "Making keys: rsa-2048, rsa-2048, ecdsa-p256. RSA takes some seconds."
    assert (
        told[1] == f"Made the certificate authority {folder}/ca.crt. Clients trust the server by this file."
    )
    assert told[2] == (
        f"Made {folder}/server.crt (it is missing): rsa-2048 for zcp.example.com, 192.0.2.7, localhost, 127.0.0.1;"
        f" valid until 2026-08-30 12:30 UTC; SHA-256 {rsa.leaf_sha256.hex()}; pin {rsa.pin}."
    )
    assert len(told) == 4
    assert not any("PRIVATE" in sentence for sentence in told)


def test_the_names_of_the_host_are_found_unless_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.certs.own.found_names", lambda: ("localhost", "box"))
    (one,) = ensure(tmp_path / "certs", key_types=["ecdsa-p256"], host_names=None, names=["A.example", "box"])
    assert one.names == ("a.example", "box", "localhost")
    assert host.found_names() != ("localhost", "box")


def test_too_many_names_of_the_host_are_cut_and_too_many_configured_ones_refused(tmp_path: Path) -> None:
    many = [f"n{number}.example" for number in range(100)]
    arguments: dict[str, Any] = {"key_types": ["ecdsa-p256"], "host_names": ["localhost", "a.example"]}
    (one,) = ensure(tmp_path / "certs", names=many[:99], **arguments)
    assert one.names == (*many[:99], "localhost")
    told: list[str] = []
    ensure(tmp_path / "certs", names=many[:99], **arguments, progress=told.append)
    assert told == []
    with pytest.raises(CertificateError, match="at most 100 names"):
        ensure(tmp_path / "certs", names=[*many, "b.example"], **arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"names": ["a_b.example"]}, "'a_b.example' cannot be a name"),
        ({"host_names": ["-"]}, "'-' cannot be a name"),
        ({"names": [], "host_names": []}, "a certificate needs a name"),
        ({"key_types": ["rsa-1024"]}, "'rsa-1024' is too weak"),
        ({"key_types": ["rsa-2048", "rsa-4096"]}, "of one family"),
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


def test_a_later_run_changes_nothing_and_tells_nothing(made: Path) -> None:
    before, told = bytes_of(made), list[str]()
    ensure(made, now=NOW + 59 * DAY, progress=told.append)
    assert bytes_of(made) == before
    assert told == []


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
def test_a_certificate_out_of_its_time_is_made_anew_with_its_key(made: Path, now: datetime, why: str) -> None:
    before, told = pins(ensure(made)), list[str]()
    after = ensure(made, now=now, progress=told.append)
    assert pins(after) == before
    assert all(pair.not_before <= now <= pair.not_after for pair in after)
    assert sum(f"({why})" in sentence for sentence in told) == 2


def test_a_name_that_is_missing_is_added(made: Path) -> None:
    before, told = ensure(made), list[str]()
    after = ensure(made, names=["new.zcp.example.com", "zcp.example.com"], progress=told.append)
    assert pins(after) == pins(before)
    assert after[0].names == ("new.zcp.example.com", "zcp.example.com", "localhost", "127.0.0.1")
    assert "(it lacks the name new.zcp.example.com)" in told[0]
    with_host = ensure(
        made, names=["new.zcp.example.com"], host_names=["localhost", "10.1.2.3"], progress=told.append
    )
    assert "10.1.2.3" in with_host[1].names
    assert "(it lacks the name 10.1.2.3)" in told[-1]


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


# --- repairs


def test_a_missing_half_is_made_again(made: Path) -> None:
    before = pins(ensure(made))
    (made / "server.crt").unlink()
    (made / "server-ecdsa.key").unlink()
    told: list[str] = []
    after = pins(ensure(made, progress=told.append))
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert f"{made}/server.crt (it is missing)" in told[1]
    assert f"{made}/server-ecdsa.crt (its key is missing)" in told[2]


def test_a_pair_that_does_not_match_gets_a_certificate_for_the_key_that_is_there(
    made: Path, rsa_key: Any
) -> None:
    (made / "server.key").write_bytes(pem_of_key(rsa_key))
    told: list[str] = []
    rsa, _ = ensure(made, progress=told.append)
    assert rsa.pin == load_pair(made / "server.crt", made / "server.key", NOW).pin
    assert (made / "server.key").read_bytes() == pem_of_key(rsa_key)
    assert "(its key is another one's)" in told[0]


@pytest.mark.parametrize("name", ["server.crt", "server.key", "server-ecdsa.crt", "server-ecdsa.key"])
@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_damaged_half_is_put_aside_and_made_again(made: Path, name: str, junk: bytes) -> None:
    (made / name).write_bytes(junk)
    told: list[str] = []
    assert len(ensure(made, progress=told.append)) == 2
    assert (made / f"{name}.aside").read_bytes() == junk
    assert told[0].endswith(f"It is put aside as {made}/{name}.aside.")


def test_a_stray_key_of_another_type_is_put_aside_and_not_overwritten(made: Path, ec_key: Any) -> None:
    stray = pem_of_key(ec_key)
    (made / "server.crt").unlink()
    (made / "server.key").write_bytes(stray)
    told: list[str] = []
    rsa, _ = ensure(made, progress=told.append)
    assert rsa.key_type == "rsa-2048"
    assert (made / "server.key.aside").read_bytes() == stray
    assert (
        told[0] == f"{made}/server.key is a key of another type. It is put aside as {made}/server.key.aside."
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
                f"{made}/server.crt: was not issued by the own authority ({made}/ca.crt) and is never overwritten;"
            )
        assert bytes_of(made) == before


def test_keys_and_folders_that_others_can_reach_stop_the_start(made: Path) -> None:
    (made / "server.key").chmod(0o644)
    with pytest.raises(CertificateError, match=r"run `chmod 600 .*server\.key`"):
        ensure(made)
    (made / "server.key").chmod(0o600)
    made.chmod(0o755)
    with pytest.raises(CertificateError, match=r"run `chmod 700 .*made`"):
        ensure(made)


# --- failures


def test_a_renewal_that_fails_leaves_the_old_certificate_in_service(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ensure(made)
    told: list[str] = []
    with monkeypatch.context() as patch:
        fail_to_write(patch, "server.crt")
        after = ensure(made, now=NOW + 61 * DAY, progress=told.append)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert told[0] == (
        f"{made}/server.crt could not be renewed (it expires on 2026-08-30 12:30 UTC): {made}/server.crt:"
        " cannot be written: No space left on device. The old one is served on."
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
def test_a_first_run_that_fails_is_told_and_the_next_one_succeeds(
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


# --- crashes


class PowerCut(BaseException):
    """The machine stops: no handler and no clean-up runs after it."""


@pytest.fixture
def pooled_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys come from a pool, as a crash is tried at each of many steps."""
    pool = {kind: [keys.generate(kind) for _ in range(6)] for kind in ("rsa-2048", "ecdsa-p256")}

    def generate(key_type: str) -> keys.PrivateKey:
        pool[key_type].append(pool[key_type].pop(0))
        return pool[key_type][-1]

    monkeypatch.setattr(keys, "generate", generate)


def crash_at(step: int, action: Callable[[], object]) -> bool:
    """Runs `action` on a machine that stops before its `step`-th change to the disk."""
    done = 0

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= step:
                raise PowerCut
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fchmod", "fsync"):
            patch.setattr(os, name, stopping(getattr(os, name)))
        for name in ("replace", "unlink", "mkdir", "chmod"):
            patch.setattr(Path, name, stopping(getattr(Path, name)))
        try:
            action()
        except PowerCut:
            return True
    return False


def steps(limit: int = 500) -> Iterator[int]:
    yield from range(1, limit)
    pytest.fail("it never came to its end")


@pytest.mark.usefixtures("pooled_keys")
def test_a_crash_at_any_step_of_the_first_run_is_repaired_by_the_next(tmp_path: Path) -> None:
    for step in steps():
        folder = tmp_path / str(step) / "certs"
        crashed = crash_at(step, lambda folder=folder: ensure(folder))
        authority_before = (folder / "ca.crt").read_bytes() if (folder / "ca.crt").exists() else None
        assert len(ensure(folder)) == 2
        assert not list(folder.glob(".*.new"))
        assert not list(folder.glob("*.aside"))
        # An authority that was in place may be trusted by clients already.
        assert authority_before in (None, (folder / "ca.crt").read_bytes())
        if not crashed:
            break
    assert step > 30


@pytest.mark.usefixtures("pooled_keys")
@pytest.mark.parametrize("renew_key", [False, True])
def test_a_crash_at_any_step_of_a_renewal_leaves_the_old_pair_or_the_new_one(
    made: Path, tmp_path: Path, renew_key: bool
) -> None:
    """Also without the authority's key: whatever a repair needs is in the folder."""
    for step in steps():
        folder = tmp_path / str(step)
        shutil.copytree(made, folder)
        old = pins(ensure(folder))
        changes: dict[str, Any] = {"renew_key": renew_key, "announce_key": timedelta(0)}
        crashed = crash_at(
            step, lambda folder=folder, changes=changes: ensure(folder, now=NOW + 61 * DAY, **changes)
        )
        (folder / "ca.key").unlink()
        after = ensure(folder, now=NOW + 61 * DAY)
        for before, pair in zip(old, after, strict=True):
            renewed = pair.not_before > NOW
            assert (pair.pin != before) is (renewed and renew_key)
        assert not list(folder.glob(".*.new"))
        if not crashed:
            break
    assert step > 10
    assert all(pair.not_before > NOW for pair in after)


ROTATE = """
    import sys
    from datetime import UTC, datetime, timedelta
    from pathlib import Path
    from zcproto.certs import ensure_own_certificates

    now = datetime(2026, 6, 1, tzinfo=UTC)
    while True:
        now += timedelta(days=61)
        (pair,) = ensure_own_certificates(
            Path(sys.argv[1]), names=["zcp.example.com"], host_names=["localhost"], key_types=["ecdsa-p256"],
            lifetime=timedelta(days=90), renew_before=timedelta(days=30), renew_key=True,
            announce_key=timedelta(0), now=now,
        )
        print(now.isoformat(), pair.pin, flush=True)
"""


def test_a_process_that_is_killed_while_it_renews_leaves_a_pair_that_loads(made: Path) -> None:
    for lines in (1, 4, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ROTATE), str(made)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            for _ in range(lines):
                last = process.stdout.readline().split()
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        assert process.wait() == -signal.SIGKILL
        moment = datetime.fromisoformat(rest[-2] if len(rest) > 1 else last[0])
        (pair,) = ensure(made, key_types=["ecdsa-p256"], now=moment)
        assert pair.not_before <= moment <= pair.not_after
        assert not list(made.glob(".*.new"))


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
    from zcproto.certs import ensure_own_certificates

    told = []
    pairs = ensure_own_certificates(
        Path(sys.argv[1]), names=["zcp.example.com"], key_types=["rsa-4096", "ecdsa-p256"],
        lifetime=timedelta(days=90), renew_before=timedelta(days=30), renew_key=False,
        now=datetime.now(UTC), progress=told.append,
    )
    print(json.dumps({"told": told, "pairs": [[pair.key_type, pair.pin] for pair in pairs]}))
"""


def test_two_processes_that_start_at_once_share_one_rsa_4096_and_one_ecdsa_certificate(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "home" / "certs"
    command = [sys.executable, "-c", textwrap.dedent(DEFAULTS), str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [json.loads(process.communicate(timeout=50)[0]) for process in processes]
    assert outputs[0]["pairs"] == outputs[1]["pairs"]
    assert [key_type for key_type, _ in outputs[0]["pairs"]] == ["rsa-4096", "ecdsa-p256"]
    makers = [one for one in outputs if any(sentence.startswith("Making keys") for sentence in one["told"])]
    assert len(makers) == 1
    assert read(folder / "ca.crt").public_key().key_size == 4096  # type: ignore[union-attr]
    strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "zcp.example.com")
    for name in LEAVES:
        openssl(*strict, "-CAfile", folder / "ca.crt", folder / name)


def test_who_has_to_wait_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, told = fcntl.flock, list[str]()
    tries = iter([BlockingIOError(), None])

    def flock(descriptor: int, how: int) -> None:
        error = next(tries)
        if error is not None:
            raise error
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    ensure(made, progress=told.append)
    assert told == [f"Waiting for another process that is making the certificates in {made}."]


def test_defaults_need_no_progress_and_find_the_host(tmp_path: Path) -> None:
    (one,) = ensure_own_certificates(
        tmp_path / "certs",
        names=[],
        key_types=["ecdsa-p256"],
        lifetime=90 * DAY,
        renew_before=30 * DAY,
        renew_key=False,
        now=datetime.now(UTC),
    )
    assert {"localhost", "127.0.0.1", "::1"} <= set(one.names)
    assert der(read(one.certificate))
    assert authority.KEY_TYPE == "rsa-2048"
    assert files.LOCK_WAIT_S == 30.0
