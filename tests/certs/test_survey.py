"""What a survey finds in the files of a configuration, without changing them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.certs.acme.fake_ca import DIRECTORY
from tests.certs.acme.support import Desk, wanted
from tests.certs.client_folder import CertificateFolder, folder
from tests.certs.support import DAY, NOW, build, constrain, pem
from tests.conftest import ServerPairs
from zcproto.certs import managed
from zcproto.certs.acme.orders import Visit
from zcproto.certs.acme.schedule import OrderRecord, write_record
from zcproto.certs.examine import Survey, SurveyedCertificate, survey
from zcproto.certs.settings import AcmeSite, acme_site
from zcproto.config import Config, load_config

__all__ = ["folder"]

SECOND = timedelta(seconds=1)
TYPES = 'key_types = ["ecdsa-p256"]\n'


def config_of(certs: Path, text: str = "", name: str = "zcp.example.com") -> Config:
    """Return a configuration whose managed certificates are in this folder."""
    home = certs.parent / "home"
    home.mkdir(0o700, exist_ok=True)
    (home / "config.toml").write_text(
        f'[certificates]\ndirectory = "{certs}"\nnames = ["{name}"]\n{TYPES}{text}'
    )
    return load_config(None, home=home, environ={})


def survey_of(
    certs: Path, text: str = "", now: datetime = NOW, environ: Mapping[str, str] | None = None
) -> Survey:
    return survey(config_of(certs, text), now, environ or {})


def states(found: Survey) -> list[tuple[str, str]]:
    return [(one.use, one.state.value) for one in found.certificates]


def test_folder_before_the_first_start_has_nothing_and_gets_nothing(tmp_path: Path) -> None:
    found = survey_of(tmp_path / "certs")
    assert states(found) == [("server", "not made yet")]
    assert found.is_good
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize(
    ("days", "state"), [(59, "ok"), (61, "renewal due"), (91, "expired"), (-2, "problem")]
)
def test_state_follows_from_the_time(made: Path, days: int, state: str) -> None:
    found = survey_of(made, now=NOW + days * DAY)
    assert found.certificates[0].state.value == state
    assert found.is_good is (state in ("ok", "renewal due"))


def test_renewal_is_due_from_its_time_on_and_expiry_counts_after_it(made: Path) -> None:
    found = survey_of(made).certificates[0]
    assert found.leaf is not None
    assert found.renewal_due is not None
    end = found.leaf.not_valid_after_utc
    assert found.renewal_due == end - 30 * DAY
    for now, state in (
        (found.renewal_due - SECOND, "ok"),
        (found.renewal_due, "renewal due"),
        (end, "renewal due"),
        (end + SECOND, "expired"),
    ):
        assert survey_of(made, now=now).certificates[0].state.value == state


def test_authority_is_due_when_a_leaf_would_outlive_it(made: Path) -> None:
    assert states(survey_of(made))[1] == ("ca", "ok")
    assert states(survey_of(made, now=NOW + 3600 * DAY))[1] == ("ca", "renewal due")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("others", "chmod 600"),
        ("garbage", "contains no PEM certificate"),
        ("other key", "server-ecdsa.key: does not belong to"),
        ("other CA", "was not issued by"),
        ("no CA key", "ca.key: does not exist, so no certificate can be issued; restore the key"),
        ("other CA key", "ca.key: does not belong to"),
        ("readable CA key", "chmod 600"),
    ],
)
def test_problem_has_the_words_of_the_server(
    made: Path, server_pairs: ServerPairs, what: str, words: str
) -> None:
    if what == "others":
        (made / "server-ecdsa.key").chmod(0o644)
    elif what == "garbage":
        (made / "server-ecdsa.crt").write_bytes(b"x")
    elif what == "other key":
        shutil.copyfile(server_pairs.ecdsa.key, made / "server-ecdsa.key")
    elif what == "other CA":
        key = serialization.load_pem_private_key((made / "server-ecdsa.key").read_bytes(), None)
        (made / "server-ecdsa.crt").write_bytes(pem(build(key)))
    elif what == "no CA key":
        (made / "ca.key").unlink()
    elif what == "other CA key":
        shutil.copyfile(made / "server-ecdsa.key", made / "ca.key")
    else:
        (made / "ca.key").chmod(0o644)
    (found,) = [one for one in survey_of(made).certificates if one.state.is_bad]
    assert words in found.problem
    assert found.problem.endswith("until then nothing can be issued") is (what == "readable CA key")


def test_unreadable_authority_is_reported_separately(made: Path) -> None:
    (made / "ca.crt").write_bytes(b"x")
    assert states(survey_of(made)) == [("server", "ok"), ("ca", "problem")]


def test_constrained_authority_has_a_note(made: Path) -> None:
    constrain(made, "localhost", "zcp.example.com")
    note = survey_of(made).certificates[1].note
    assert note.startswith(f"{made / 'ca.crt'}: has name constraints, which clients with BoringSSL")


def test_unreadable_constraints_are_no_note(made: Path) -> None:
    key = serialization.load_pem_private_key((made / "ca.key").read_bytes(), None)
    bad = x509.UnrecognizedExtension(x509.ExtensionOID.NAME_CONSTRAINTS, b"\x30\x03\x82\x05a")
    (made / "ca.crt").write_bytes(pem(build(key, extensions=[bad])))
    assert survey_of(made).certificates[1].note == ""


def test_ecdsa_authority_for_rsa_keys_has_a_note(made: Path) -> None:
    key = serialization.load_pem_private_key((made / "server-ecdsa.key").read_bytes(), None)
    (made / "ca.crt").write_bytes(pem(build(key)))
    shutil.copyfile(made / "server-ecdsa.key", made / "ca.key")
    assert survey_of(made).certificates[1].note == ""
    home = made.parent / "home"
    text = (home / "config.toml").read_text().replace('["ecdsa-p256"]', '["ecdsa-p256", "rsa-4096"]')
    (home / "config.toml").write_text(text)
    note = survey(load_config(None, home=home, environ={}), NOW, {}).certificates[-1].note
    assert "has an ECDSA key, so clients that support only RSA cannot verify it" in note


def test_authority_with_an_unreadable_key_is_a_problem(made: Path) -> None:
    der = (
        serialization.load_pem_private_key((made / "server-ecdsa.key").read_bytes(), None)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    certificate = x509.load_pem_x509_certificate((made / "server-ecdsa.crt").read_bytes())
    data = certificate.public_bytes(serialization.Encoding.DER)
    broken = x509.load_der_x509_certificate(data.replace(der, der[:-65] + b"\x05" + der[-64:]))
    (made / "ca.crt").write_bytes(pem(broken))
    found = survey_of(made).certificates[1]
    assert (found.key_type, found.state.value) == ("unreadable", "problem")


# --- other programs ----------------------------------------------------------------------------------------


SITE = '[[certificates.site]]\nnames = ["localhost"]\ncertificate = ["{path}"]\n'


def test_sites_of_other_programs_are_checked_as_a_whole(made: Path, server_pairs: ServerPairs) -> None:
    path = made.parent / "site.pem"
    path.touch(0o600)
    path.write_bytes(server_pairs.ecdsa.certificate.read_bytes() + server_pairs.ecdsa.key.read_bytes())
    text, now = SITE.format(path=path), datetime.now(NOW.tzinfo)
    found = survey_of(made, text + 'key_passphrase_variable = "PHRASE"\n', now).certificates[1]
    assert "PHRASE is not set" in found.problem
    found = survey_of(made, text, now).certificates[1]
    assert (found.site, found.state.value, found.problem) == (("localhost",), "ok", "")
    found = survey_of(made, text.replace('"localhost"', '"x.example"'), now).certificates[1]
    assert "is not valid for x.example" in found.problem


def test_certificates_that_a_client_gets_are_found_by_name(made: Path, server_pairs: ServerPairs) -> None:
    text = "".join(
        f'[[certificates.site]]\nnames = ["{name}"]\ncertificate = ["/{number}.pem"]\n'
        for number, name in enumerate(("a.example.org", "*.example.org"))
    )
    found = survey_of(made, text)

    def names(requested: str | None) -> list[tuple[str, ...]]:
        return [one.site for one in found.of_site(requested)]

    assert names("A.example.org") == [("a.example.org",)]
    assert names("b.example.org") == [("*.example.org",)]
    assert names("elsewhere.example") == names(None) == [()]


def test_default_files_of_other_programs(tmp_path: Path, server_pairs: ServerPairs) -> None:
    path = tmp_path / "site.pem"
    path.touch(0o600)
    path.write_bytes(server_pairs.ecdsa.certificate.read_bytes() + server_pairs.ecdsa.key.read_bytes())
    text = f'mode = "files"\ncertificate = ["{path}"]\n'
    found = survey(config_of(tmp_path / "certs", text, "localhost"), datetime.now(NOW.tzinfo), {})
    assert states(found) == [("server", "ok")]
    assert (found.mode, found.next_pins) == ("files", None)


# --- clients -----------------------------------------------------------------------------------------------


def test_clients_and_their_revocations_are_listed(folder: CertificateFolder) -> None:
    folder.issue("ada")
    folder.revoke(serial=folder.issue("bob").serial)
    found = survey_of(folder.directory)
    assert [(one.name, one.reason) for one in found.clients] == [("ada", ""), ("bob", "unspecified")]
    assert [(path, len(crl)) for path, crl in found.crls] == [(folder.path("client-ca.crl"), 1)]
    assert states(found)[1:] == [("client-ca", "ok")]


def test_expired_revocation_list_is_a_problem(folder: CertificateFolder) -> None:
    folder.issue()
    (problem,) = survey_of(folder.directory, now=NOW + 400 * DAY).problems
    assert problem.endswith("so every client is refused; get a new list")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("client-ca.crl", "x"),
        ("client-ca.crl", "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"),
        ("client-ca.issued", "x"),
    ],
)
def test_damaged_list_is_a_problem(folder: CertificateFolder, name: str, content: str) -> None:
    folder.issue()
    folder.path(name).write_text(content)
    found = survey_of(folder.directory)
    assert name in found.problems[0]
    assert not found.is_good


def test_configured_authorities_and_lists_of_clients(folder: CertificateFolder, ca_file: Path) -> None:
    folder.issue()
    theirs = folder.directory.parent / "theirs.crt"
    shutil.copyfile(ca_file, theirs)
    tls = '[tls]\nclient_auth = "required"\n'
    found = survey_of(folder.directory, f'{tls}client_ca_file = "{theirs}"\n')
    assert (found.certificates[-1].certificate, found.crls) == (theirs, ())
    lists = folder.directory.parent / "theirs.crl"
    lists.write_bytes(folder.path("client-ca.crl").read_bytes() * 2)
    found = survey_of(folder.directory, f'{tls}client_crl_file = "{lists}"\n')
    assert [path for path, _ in found.crls] == [lists, lists]


# --- a public CA -------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> AcmeSite:
    """A folder with managed certificates, and the settings of a CA."""
    found = acme_site(config_of(tmp_path / "certs", ACME))
    assert found is not None
    managed.ensure(found.managed_directory, found.managed, NOW)
    return found


ACME = f'mode = "acme"\n[acme]\ndirectory = "{DIRECTORY}"\nterms_agreed = true\n'


def served(site: AcmeSite) -> SurveyedCertificate:
    return survey_of(site.managed_directory, ACME).certificates[0]


def order(site: AcmeSite) -> None:
    result = asyncio.run(Desk(site).visit(Visit((wanted(site),)), NOW))
    assert result.problem == ""


def test_managed_certificate_is_noted_until_the_ca_has_issued_one(site: AcmeSite) -> None:
    found = served(site)
    assert found.certificate == site.managed_directory / "server-ecdsa.crt"
    assert "is served until the CA has issued another" in found.note
    order(site)
    found = served(site)
    assert (found.certificate, found.note) == (site.directory / "server-ecdsa.crt", "")


@pytest.mark.parametrize(
    ("retry_at", "words"), [(NOW + timedelta(hours=1), " (next attempt at "), (None, "")]
)
def test_failure_of_the_last_order_is_a_note(site: AcmeSite, retry_at: datetime | None, words: str) -> None:
    order(site)
    write_record(site.directory, OrderRecord("", "the CA is down; wait", NOW, retry_at))
    note = served(site).note
    assert f"the last order has failed{words}" in note
    assert note.endswith(": the CA is down; wait")


def test_managed_certificate_takes_the_place_of_one_that_cannot_be_served(site: AcmeSite) -> None:
    order(site)
    (site.directory / "server-ecdsa.crt").write_bytes(b"junk")
    assert served(site).certificate == site.managed_directory / "server-ecdsa.crt"
    (site.managed_directory / "server-ecdsa.crt").write_bytes(b"junk")
    assert served(site).certificate == site.directory / "server-ecdsa.crt"
