from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.certs.support import DAY, NOW, build, pem, pem_of_key
from tests.helpers import raising
from zcproto.certs import external, pair
from zcproto.certs.external import SETTLE_S, ExternalSite, PassphraseSource, WatchedFiles, load_site
from zcproto.certs.names import covers
from zcproto.certs.notices import NoticeKind
from zcproto.certs.pair import Site
from zcproto.errors import CertificateError


class Found(NamedTuple):
    """What one check of the files found."""

    changed: bool = False
    bad: str = ""
    recovered: bool = False


NOTHING = Found()


def san(*names: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.DNSName(name) for name in names])


class Files:
    """A certificate and its key as others write them, one after the other."""

    def __init__(self, folder: Path, stem: str = "site", *names: str) -> None:
        self.names = names or ("a.example",)
        self.certificate, self.key = folder / f"{stem}.crt", folder / f"{stem}.key"

    def write_certificate(self, key: Any, **changes: Any) -> x509.Certificate:
        certificate = build(key, extensions=[san(*self.names)], **changes)
        put(self.certificate, pem(certificate))
        return certificate

    def write_key(self, key: Any, passphrase: bytes | None = None) -> None:
        encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else None
        put(self.key, pem_of_key(key, encryption=encryption))

    def write(self, key: Any, **changes: Any) -> Files:
        self.write_certificate(key, **changes)
        self.write_key(key)
        return self

    def site(self, *names: str, passphrase: PassphraseSource | None = None) -> ExternalSite:
        return ExternalSite(names, (self.certificate,), (self.key,), passphrase or PassphraseSource())


def put(path: Path, data: bytes) -> Path:
    staged = path.with_name(path.name + ".tmp")
    staged.touch(0o600)
    staged.write_bytes(data)
    staged.replace(path)
    return path


def load(spec: ExternalSite, environ: Mapping[str, str] | None = None) -> Site:
    return load_site(spec, NOW, environ or {})


def refusal(spec: ExternalSite, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(CertificateError) as caught:
        load(spec, environ)
    return str(caught.value)


@pytest.fixture
def other_ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def files(tmp_path: Path, ec_key: Any) -> Files:
    return Files(tmp_path).write(ec_key)


@pytest.fixture
def watched(files: Files) -> Watched:
    return Watched(files.site())


# --- loading


def test_site_is_loaded_with_a_pair_of_each_key_family(tmp_path: Path, rsa_key: Any, ec_key: Any) -> None:
    first = Files(tmp_path, "rsa").write(rsa_key)
    second = Files(tmp_path, "ecdsa").write(ec_key)
    spec = ExternalSite(("a.example",), (first.certificate, second.certificate), (first.key, second.key))
    site = load(spec)
    assert site.names == ("a.example",)
    assert [each.key_type for each in site.pairs] == ["rsa-2048", "ecdsa-p256"]
    assert spec.paths == (first.certificate, second.certificate, first.key, second.key)


def test_default_site_needs_no_names(tmp_path: Path, ec_key: Any) -> None:
    assert load(Files(tmp_path).write(ec_key).site()).names == ()


def test_certificate_and_key_can_be_in_one_file(tmp_path: Path, ec_key: Any) -> None:
    both = put(tmp_path / "both.pem", pem_of_key(ec_key) + pem(build(ec_key, extensions=[san("a.example")])))
    for spec in (ExternalSite(("a.example",), (both,)), ExternalSite(("a.example",), (both,), (both,))):
        assert load(spec).pairs[0].key == both
        assert spec.paths == (both,)


def test_links_of_certbot_are_followed(tmp_path: Path, ec_key: Any) -> None:
    archive, live = tmp_path / "archive", tmp_path / "live"
    archive.mkdir(0o700)
    live.mkdir(0o755)
    files = Files(archive).write(ec_key)
    links = live / "fullchain.pem", live / "privkey.pem"
    links[0].symlink_to(files.certificate)
    links[1].symlink_to(files.key)
    assert load(ExternalSite(("a.example",), links[:1], links[1:])).pairs[0].certificate == links[0]


def test_two_certificates_of_one_key_family_are_refused(files: Files) -> None:
    spec = ExternalSite((), (files.certificate,) * 2, (files.key,) * 2)
    assert "are both ecdsa; configure one of each key family" in refusal(spec)


# --- names


@pytest.mark.parametrize(
    ("entry", "name", "covered"),
    [
        ("a.example", "a.example", True),
        ("A.Example", "a.example", True),
        ("a.example", "b.example", False),
        ("*.example.com", "a.example.com", True),
        ("*.EXAMPLE.com", "a.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "b.a.example.com", False),
        ("*.example.com", "*.example.com", True),
        ("*.example.com", "*.a.example.com", False),
        ("*.com", "*.com.example", False),
        ("a.example.com", "*.example.com", False),
        ("*", "a", False),
        ("*.", "a.", True),
        ("192.0.2.7", "192.0.2.7", True),
    ],
)
def test_names_covered_by_an_entry(entry: str, name: str, covered: bool) -> None:
    assert covers(entry, name) is covered


def test_each_name_must_be_in_each_certificate(tmp_path: Path, rsa_key: Any, ec_key: Any) -> None:
    first = Files(tmp_path, "rsa", "a.example", "*.b.example").write(rsa_key)
    second = Files(tmp_path, "ecdsa", "a.example").write(ec_key)
    assert load(first.site("a.example", "x.b.example", "*.b.example"))
    assert load(second.site("a.example"))
    spec = ExternalSite(
        ("a.example", "x.b.example", "*.b.example"),
        (first.certificate, second.certificate),
        (first.key, second.key),
    )
    says = refusal(spec)
    assert says.startswith(
        f"{second.certificate}: is not valid for x.b.example, *.b.example; use one with all"
    )


# --- passphrases


@pytest.mark.parametrize("line", [b"secret", b"secret\n", b"secret\r\n", b"secret\nmore\n"])
def test_passphrase_is_the_first_line_of_its_file(tmp_path: Path, ec_key: Any, line: bytes) -> None:
    files = Files(tmp_path)
    files.write_certificate(ec_key)
    files.write_key(ec_key, b"secret")
    path = put(tmp_path / "passphrase", line)
    spec = files.site(passphrase=PassphraseSource(file=path))
    assert load(spec).pairs[0].passphrase == b"secret"
    assert spec.paths == (files.certificate, files.key, path)


def test_passphrase_is_read_from_a_variable(tmp_path: Path, ec_key: Any) -> None:
    files = Files(tmp_path)
    files.write_certificate(ec_key)
    files.write_key(ec_key, "sécret\udcff".encode("utf-8", "surrogateescape"))
    spec = files.site(passphrase=PassphraseSource(variable="KEY_PASS"))
    assert load(spec, {"KEY_PASS": "sécret\udcff"}).pairs[0].passphrase is not None
    says = refusal(spec, {"OTHER": "x"})
    assert says == "the environment variable KEY_PASS is not set; set it to the key's passphrase"
    says = refusal(spec, {"KEY_PASS": ""})
    assert says == "the environment variable KEY_PASS must be a passphrase of 1 to 1024 bytes"
    assert "wrong!" not in refusal(spec, {"KEY_PASS": "wrong!"})


@pytest.mark.parametrize("line", [b"", b"\n", b"\r\nsecret", b"x" * 1025])
def test_missing_or_oversized_passphrase_is_refused(tmp_path: Path, line: bytes) -> None:
    path = put(tmp_path / "passphrase", line)
    with pytest.raises(CertificateError) as caught:
        PassphraseSource(file=path).read({})
    assert str(caught.value) == f"{path}: its first line must be a passphrase of 1 to 1024 bytes"


def test_passphrase_file_readable_by_others_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "passphrase", b"secret")
    path.chmod(0o640)
    with pytest.raises(CertificateError, match="others can read"):
        PassphraseSource(file=path).read({})


# --- watching


class Watched:
    """A watched site and its clock; each found is a second after the one before."""

    def __init__(self, spec: ExternalSite, environ: Mapping[str, str] | None = None) -> None:
        self.now, self.monotonic = NOW, 1000.0
        self.site = WatchedFiles(
            spec.paths, lambda now, before: external.load_site(spec, now, environ or {}, before)
        )
        self.site.start(self.now, self.monotonic)

    def check(self, *, force: bool = False) -> Found:
        self.monotonic += 1
        before = self.site.value
        messages = {
            notice.kind: notice.message for notice in self.site.check(self.now, self.monotonic, force=force)
        }
        bad = messages.get(NoticeKind.FILES_BAD, "").removesuffix(". The last valid files remain in use.")
        return Found(self.site.value != before, bad, NoticeKind.FILES_RECOVERED in messages)

    def checks(self, count: int) -> list[Found]:
        return [self.check() for _ in range(count)]

    @property
    def pin(self) -> str:
        return self.site.value.pairs[0].pin


@pytest.mark.requirement("fallback")
def test_invalid_site_does_not_start(files: Files, other_ec_key: Any) -> None:
    files.write_key(other_ec_key)
    with pytest.raises(CertificateError, match="does not belong to"):
        Watched(files.site())


def test_unchanged_files_are_not_loaded_again(
    tmp_path: Path, ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(Files(tmp_path).write(ec_key).site())
    monkeypatch.setattr(external, "load_site", lambda *arguments: pytest.fail("it was loaded"))
    assert watched.checks(200) == [NOTHING] * 200


@pytest.mark.requirement("renewal")
def test_new_pair_is_loaded_at_once(files: Files, other_ec_key: Any) -> None:
    watched = Watched(files.site("a.example"))
    before = watched.pin
    files.write(other_ec_key)
    assert watched.check() == Found(changed=True)
    assert watched.pin != before
    assert watched.checks(70) == [NOTHING] * 70
    files.write_certificate(other_ec_key)  # a renewal with its key
    assert watched.check() == Found(changed=True)


@pytest.mark.parametrize(
    ("names", "is_accepted"),
    [
        (["a.example", "new.example"], True),
        (["*.example"], True),
        (["b.example"], False),
        (["*.a.example"], False),
    ],
)
def test_certificate_of_other_names_does_not_replace_the_last_good_one(
    names: list[str], is_accepted: bool, files: Files, watched: Watched, ec_key: Any
) -> None:
    before = watched.pin
    files.names = tuple(names)
    files.write(ec_key)
    found = [watched.check() for _ in range(int(SETTLE_S) + 2)]
    assert any(each.changed for each in found) is is_accepted
    bad = [each.bad for each in found if each.bad]
    if is_accepted:
        assert bad == []
        return
    assert bad == [
        f"{files.certificate}: is valid for {names[0]}, and not for a.example, which it replaces; put the right"
        " file there, or set certificates.names to its names and reload"
    ]
    assert watched.pin == before
    files.names = ("a.example",)
    files.write(ec_key)
    assert watched.check().recovered


def test_default_site_must_have_the_required_names(files: Files, ec_key: Any) -> None:
    spec = dataclasses.replace(files.site(), required=("a.example", "c.example"))
    assert refusal(spec).startswith(
        f"{files.certificate}: is not valid for c.example; use one with all names"
    )
    files.names = ("a.example", "c.example")
    files.write(ec_key)
    load(spec)


def test_rewritten_identical_certificate_is_not_a_change(files: Files, watched: Watched) -> None:
    put(files.certificate, files.certificate.read_bytes() + b"\n")
    assert watched.check() == NOTHING


def test_key_with_another_passphrase_is_a_change(tmp_path: Path, ec_key: Any) -> None:
    files = Files(tmp_path)
    files.write_certificate(ec_key)
    files.write_key(ec_key, b"one")
    source = put(tmp_path / "passphrase", b"one")
    watched = Watched(files.site(passphrase=PassphraseSource(source)))
    files.write_key(ec_key, b"two")
    assert watched.check() == NOTHING
    put(source, b"two")
    assert watched.check() == Found(changed=True)


@pytest.mark.parametrize("order", ["certificate first", "key first"])
def test_half_written_pair_is_given_time_and_never_served(
    files: Files, watched: Watched, other_ec_key: Any, order: str
) -> None:
    before = watched.pin
    steps = [files.write_certificate, files.write_key]
    if order == "key first":
        steps.reverse()
    steps[0](other_ec_key)
    assert watched.check() == NOTHING
    assert watched.site.is_incomplete
    assert watched.checks(29) == [NOTHING] * 29
    assert not watched.site.is_incomplete  # it may take long, so that checks are as rare as usual
    assert watched.pin == before
    steps[1](other_ec_key)
    assert watched.check() == Found(changed=True)
    assert watched.pin != before
    assert watched.site.problem == ""


@pytest.mark.requirement("renewal")
def test_bad_files_are_reported_once_and_their_recovery_too(
    files: Files, watched: Watched, ec_key: Any, other_ec_key: Any
) -> None:
    files.write_key(other_ec_key)
    checks = watched.checks(500)
    assert [at for at, found in enumerate(checks) if found != NOTHING] == [30]  # seen at 0, quiet for 30
    assert checks[30].bad.startswith(f"{files.key}: does not belong to")
    assert watched.site.problem == checks[30].bad
    files.write_key(ec_key)
    assert watched.check() == Found(recovered=True)
    assert watched.site.problem == ""
    assert watched.checks(100) == [NOTHING] * 100


def test_each_change_of_bad_files_is_reported_once_it_has_settled(
    files: Files, watched: Watched, other_ec_key: Any
) -> None:
    for data in (b"junk", b"other junk", b"junk"):
        put(files.key, data)
        checks = watched.checks(100)
        assert [at for at, found in enumerate(checks) if found != NOTHING] == [30]
        assert "contains no PEM key" in checks[30].bad
    files.write(other_ec_key)
    assert watched.check() == Found(changed=True, recovered=True)


def test_bad_files_that_keep_changing_are_reported_eventually(
    files: Files, watched: Watched, ec_key: Any
) -> None:
    reported = []
    for turn in range(1000):
        put(files.key, b"junk %d" % turn)
        if watched.check() != NOTHING:
            reported.append(turn)
    assert reported == [300, 601, 902]
    files.write_key(ec_key)
    assert watched.check() == Found(recovered=True)


def test_deleted_file_changes_nothing(files: Files, watched: Watched) -> None:
    good = files.certificate.read_bytes()
    files.certificate.unlink()
    checks = watched.checks(100)
    assert [found.bad for found in checks if found != NOTHING] == [
        f"{files.certificate}: cannot be read: No such file or directory;"
        " check the path, and that this user may read it"
    ]
    put(files.certificate, good)
    assert watched.check() == Found(recovered=True)


def test_certificate_not_yet_valid_is_served_when_its_time_has_come(
    files: Files, watched: Watched, other_ec_key: Any
) -> None:
    before = watched.pin
    files.write(other_ec_key, not_before=NOW + DAY, not_after=NOW + 9 * DAY)
    checks = watched.checks(60)
    assert [found.bad[-50:] for found in checks if found != NOTHING] == [
        "; wait until then, or correct this machine's clock"[-50:]
    ]
    watched.now += 2 * DAY
    assert watched.check() == NOTHING  # it is tried each minute
    assert watched.check(force=True) == Found(changed=True, recovered=True)
    assert watched.pin != before


def test_bad_files_are_retried_every_minute(
    files: Files, watched: Watched, tmp_path: Path, other_ec_key: Any
) -> None:
    files.write(other_ec_key)
    tmp_path.chmod(0o755)  # of the folder, which is not watched
    checks = watched.checks(31)
    assert "run: chmod 700 " in checks[30].bad
    tmp_path.chmod(0o700)
    checks = watched.checks(60)
    assert checks == [NOTHING] * 59 + [Found(changed=True, recovered=True)]


def test_different_problem_is_reported_again(files: Files, watched: Watched, other_ec_key: Any) -> None:
    files.write(other_ec_key, not_before=NOW + DAY, not_after=NOW + 2 * DAY)
    assert "is not valid before" in watched.checks(31)[30].bad
    watched.now += 9 * DAY
    assert "expired on" in watched.checks(60)[59].bad
    assert watched.checks(200) == [NOTHING] * 200


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ENFILE, errno.ESTALE])
def test_disk_failure_changes_nothing(
    files: Files, watched: Watched, other_ec_key: Any, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = watched.pin
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raising(OSError(error, os.strerror(error))))
        files.certificate.touch()
        files.key.touch()
        checks = watched.checks(100)
        assert len([found for found in checks if found.bad]) == 1
    assert watched.pin == before
    files.write(other_ec_key)
    assert watched.check() == Found(changed=True, recovered=True)


def test_file_that_changes_while_it_is_loaded_is_detected_by_the_next_check(
    files: Files, watched: Watched, ec_key: Any, other_ec_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_certificate(ec_key)
    real = pair.load_pair

    def change_after_it(*arguments: Any) -> pair.CertificatePair:
        loaded = real(*arguments)
        monkeypatch.setattr(external, "load_pair", real)
        files.write(other_ec_key)
        return loaded

    monkeypatch.setattr(external, "load_pair", change_after_it)
    assert watched.check() == Found(changed=True)
    before = watched.pin
    assert watched.check() == Found(changed=True)
    assert watched.pin != before


def test_two_pairs_are_loaded_together_or_not_at_all(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_key: Any, other_ec_key: Any
) -> None:
    first = Files(tmp_path, "rsa").write(rsa_key)
    second = Files(tmp_path, "ecdsa").write(ec_key)
    spec = ExternalSite((), (first.certificate, second.certificate), (first.key, second.key))
    watched = Watched(spec)
    before = watched.site.value
    first.write(rsa_key)
    second.write_certificate(other_ec_key)
    assert watched.checks(10) == [NOTHING] * 10
    assert watched.site.value is before
    second.write_key(other_ec_key)
    assert watched.check() == Found(changed=True)


def test_external_files_are_never_written(
    files: Files, watched: Watched, tmp_path: Path, other_ec_key: Any
) -> None:
    files.write_key(other_ec_key)
    put(files.certificate, b"junk")

    def state() -> dict[Path, tuple[bytes, int, int]]:
        found = {path: path.stat() for path in tmp_path.iterdir()}
        return {
            path: (path.read_bytes(), status.st_ino, status.st_ctime_ns) for path, status in found.items()
        }

    before = state()
    watched.checks(100)
    assert state() == before
