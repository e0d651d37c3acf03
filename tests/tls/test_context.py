"""Test contexts: TLS 1.3 only, suites and their order, no tickets, trust, and refused files."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.conftest import ServerPair, ServerPairs
from tests.helpers import FakeTimers
from tests.tls.identities import Identity, for_clients, locked, write_identity
from tests.tls.support import TlsPair
from zcproto.errors import CertificateError, TlsError
from zcproto.tls.context import (
    SUITES,
    check_suite_order,
    client_context,
    server_context,
    suites_are_allowed,
)

ALLOWED = frozenset(SUITES)


@pytest.fixture(params=["server", "client"])
def context(
    request: pytest.FixtureRequest, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> ssl.SSLContext:
    return server_tls if request.param == "server" else client_tls


@pytest.mark.requirement("tls_version")
def test_only_tls_1_3_is_enabled(context: ssl.SSLContext) -> None:
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.maximum_version is ssl.TLSVersion.TLSv1_3


def test_compression_is_disabled(context: ssl.SSLContext) -> None:
    assert context.options & ssl.OP_NO_COMPRESSION


@pytest.mark.requirement("forward_secrecy")
def test_server_context_has_no_tickets_and_own_preference(server_tls: ssl.SSLContext) -> None:
    assert server_tls.num_tickets == 0
    assert server_tls.options & ssl.OP_CIPHER_SERVER_PREFERENCE


@pytest.mark.parametrize("kind", ["server", "client"])
def test_sslkeylogfile_is_ignored(
    kind: str, server_pairs: ServerPairs, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(key_log))
    assert ssl.create_default_context().keylog_filename == str(key_log), "stock contexts honour it"
    key_log.unlink()
    server = server_context(server_pairs, ["zcp/1"])
    client = client_context(ca_file=ca_file)
    assert (server if kind == "server" else client).keylog_filename is None
    TlsPair(FakeTimers(), server, client).agree()
    assert not key_log.exists()


def test_ecdsa_and_rsa_pairs_serve_both_kinds_of_client(
    server_pairs: ServerPairs, client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    for pairs in (server_pairs, server_pairs[:1], server_pairs[1:]):
        pair = TlsPair(timers, server_context(pairs, ["zcp/1"]), client_tls).agree()
        der = pair.client.getpeercert(binary_form=True)
        assert der in [ssl.PEM_cert_to_DER_cert(x.certificate.read_text()) for x in pairs]


# --- invalid pairs --------------------------------------------------------------------------


def test_mismatched_key_is_refused(server_pairs: ServerPairs, ca: trustme.CA, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    ca.issue_cert("localhost").private_key_pem.write_to_path(other)
    with pytest.raises(CertificateError, match=r"ECDSA\.pem: cannot be used with .*other\.key: \w*MISMATCH"):
        server_context([(server_pairs.ecdsa.certificate, other)], ["zcp/1"])
    with pytest.raises(CertificateError, match=r"other\.locked\.key: \w*MISMATCH"):
        server_context([(server_pairs.ecdsa.certificate, locked(other, PASSPHRASE), PASSPHRASE)], ["zcp/1"])


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_missing_certificate_file_is_named(missing: str, server_pairs: ServerPairs, tmp_path: Path) -> None:
    pair = server_pairs.ecdsa._replace(**{missing: tmp_path / "gone.pem"})
    with pytest.raises(CertificateError, match=r"gone\.pem.*No such file"):
        server_context([pair], ["zcp/1"])


@pytest.mark.parametrize("which", ["certificate", "key"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"]
)
def test_file_without_certificate_is_refused(
    which: str, content: bytes, server_pairs: ServerPairs, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_bytes(content)
    with pytest.raises(CertificateError, match=r"broken\.pem"):
        server_context([server_pairs.ecdsa._replace(**{which: broken})], ["zcp/1"])


def test_folder_instead_of_file_is_refused(server_pairs: ServerPairs, tmp_path: Path) -> None:
    with pytest.raises(CertificateError):
        server_context([server_pairs.ecdsa._replace(key=tmp_path)], ["zcp/1"])


PASSPHRASE = b"hunter2"


@pytest.fixture
def locked_pair(server_pairs: ServerPairs, tmp_path: Path) -> ServerPair:
    """Return a pair with an encrypted key."""
    key = tmp_path / "pair.key"
    shutil.copy(server_pairs.ecdsa.key, key)
    return server_pairs.ecdsa._replace(key=locked(key, PASSPHRASE))


@pytest.mark.parametrize(("given", "said"), [(None, "missing"), (b"hunter3", "wrong"), (b"", "wrong")])
def test_encrypted_key_is_refused_without_prompt(
    given: bytes | None, said: str, locked_pair: ServerPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise OpenSSL would prompt on the terminal, and a service would hang."""
    monkeypatch.setattr("getpass.getpass", lambda *args: pytest.fail("asked for a passphrase"))
    with pytest.raises(CertificateError, match=rf"locked\.key: the key is encrypted.*{said}") as caught:
        server_context([(*locked_pair, given)], ["zcp/1"])
    assert "PRIVATE KEY" not in str(caught.value)
    assert "hunter" not in str(caught.value)


def test_key_deleted_during_error_handling_is_an_error(
    locked_pair: ServerPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ssl.SSLContext.load_cert_chain

    def load_and_lose(self: ssl.SSLContext, certificate: Path, key: Path, password: Any) -> None:
        try:
            load(self, certificate, key, password)
        finally:
            key.unlink()

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_lose)
    with pytest.raises(CertificateError, match=r"locked\.key"):
        server_context([locked_pair], ["zcp/1"])


def test_passphrase_decrypts_key(
    locked_pair: ServerPair, server_pairs: ServerPairs, client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    for pair in ((*locked_pair, PASSPHRASE), (*server_pairs.rsa, None)):
        TlsPair(timers, server_context([pair], ["zcp/1"]), client_tls).agree()


def test_unneeded_passphrase_is_ignored(server_pairs: ServerPairs) -> None:
    server_context([(*server_pairs.ecdsa, PASSPHRASE)], ["zcp/1"])


@pytest.mark.requirement("tls_errors")
def test_error_contains_no_key_material(server_pairs: ServerPairs, tmp_path: Path) -> None:
    lines = server_pairs.ecdsa.key.read_text().splitlines()
    broken = tmp_path / "broken.key"
    broken.write_text("\n".join([lines[0], lines[1][:-4], *lines[2:]]))
    with pytest.raises(CertificateError) as caught:
        server_context([server_pairs.ecdsa._replace(key=broken)], ["zcp/1"])
    assert lines[1][:20] not in str(caught.value)


# --- the client's trust ---------------------------------------------------------------------------------


def test_client_trusts_only_the_ca_file(
    server_tls: ssl.SSLContext, ca_file: Path, timers: FakeTimers, tmp_path: Path
) -> None:
    TlsPair(timers, server_tls, client_context(ca_file=ca_file)).agree()
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    pair = TlsPair(timers, server_tls, client_context(ca_file=other))
    pair.raw.deliver(pair.step())
    pair.hear()
    with pytest.raises(ssl.SSLCertVerificationError):
        pair.step()


def test_client_without_ca_file_trusts_system_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    purposes: list[object] = []
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda self, purpose: purposes.append(purpose))
    context = client_context()
    assert purposes == [ssl.Purpose.SERVER_AUTH]
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_unverified_client_context_accepts_any_certificate(
    server_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    context = client_context(verify=False)
    assert context.verify_mode is ssl.CERT_NONE
    TlsPair(timers, server_tls, context, host="another.example").agree()


def test_missing_ca_file_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"ca\.pem: does not exist; copy the CA of the server"):
        client_context(ca_file=tmp_path / "ca.pem")


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_ca_file_without_certificate_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    with pytest.raises(CertificateError, match=r"ca\.pem: no CA certificate"):
        client_context(ca_file=path)


def test_client_offers_its_alpn_protocols(
    server_tls: ssl.SSLContext, ca_file: Path, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, server_tls, client_context(ca_file=ca_file, protocols=("http/1.1",))).agree()
    assert pair.client.selected_alpn_protocol() == "http/1.1"


# --- the client's own certificate -----------------------------------------------------------------------


@pytest.fixture
def identity(ca: trustme.CA, tmp_path: Path) -> Identity:
    return write_identity(tmp_path, for_clients(ca))


def test_client_certificate_and_key_in_one_file(identity: Identity, ca_file: Path) -> None:
    identity.key.write_bytes(identity.key.read_bytes() + identity.certificate.read_bytes())
    client_context(ca_file=ca_file, certificate=identity.key)


@pytest.mark.parametrize("form", ["bytes", "text", "function"])
def test_client_key_with_passphrase(form: str, identity: Identity) -> None:
    given: Any = {"bytes": b"hunter2", "text": "hunter2", "function": lambda: "hunter2"}[form]
    key = locked(identity.key, PASSPHRASE)
    client_context(verify=False, certificate=identity.certificate, key=key, passphrase=given)
    with pytest.raises(CertificateError, match="passphrase is wrong"):
        client_context(verify=False, certificate=identity.certificate, key=key, passphrase=lambda: b"x")


def test_passphrase_callable_is_called_only_for_encrypted_key(identity: Identity) -> None:
    def ask() -> str:
        raise AssertionError("asked for a passphrase")

    client_context(verify=False, certificate=identity.certificate, key=identity.key, passphrase=ask)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o610])
def test_client_key_readable_by_others_is_refused(mode: int, identity: Identity) -> None:
    identity.key.chmod(mode)
    with pytest.raises(CertificateError, match=rf"client\.key: .*mode {mode:04o}\); run: chmod 600 "):
        client_context(verify=False, certificate=identity.certificate, key=identity.key)


def test_client_key_of_another_user_is_refused(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.common.files.trusted_owners", frozenset)
    with pytest.raises(CertificateError, match=r"another user \(uid \d+\); run as that user"):
        client_context(verify=False, certificate=identity.certificate, key=identity.key)


@pytest.mark.parametrize("kind", ["gone", "folder", "fifo", "no path"])
def test_client_key_that_is_a_fifo_is_refused_without_blocking(
    kind: str, identity: Identity, tmp_path: Path
) -> None:
    key = tmp_path / kind
    match kind:
        case "folder":
            key.mkdir()
        case "fifo":
            os.mkfifo(key, 0o600)
        case "no path":
            key = tmp_path / "\0"
    with pytest.raises(CertificateError, match=r"cannot be read|is not a regular file"):
        client_context(verify=False, certificate=identity.certificate, key=key)


def test_mismatched_client_key_is_refused(identity: Identity, server_pairs: ServerPairs) -> None:
    with pytest.raises(CertificateError, match=r"cannot be used with .*client\.key: KEY_VALUES_MISMATCH"):
        client_context(verify=False, certificate=server_pairs.ecdsa.certificate, key=identity.key)


# --- suites ---------------------------------------------------------------------------------------------

FIRST, SECOND, AES_128 = *SUITES, "TLS_AES_128_GCM_SHA256"


@pytest.mark.requirement("cipher_suites")
@pytest.mark.parametrize(
    "names",
    [[FIRST], [SECOND], [FIRST, SECOND], [SECOND, FIRST], [FIRST, SECOND, AES_128, "TLS_AES_128_CCM_SHA256"]],
)
def test_allowed_suites_first_are_accepted(names: list[str]) -> None:
    check_suite_order(names)


@pytest.mark.requirement("cipher_suites")
@pytest.mark.parametrize(
    "names", [[], [AES_128], [AES_128, FIRST], [FIRST, AES_128, SECOND], [FIRST, SECOND, AES_128, FIRST]]
)
def test_other_suites_first_are_refused(names: list[str]) -> None:
    """AES_128 would be chosen for a client that also offers an allowed suite."""
    with pytest.raises(TlsError, match="prefers suites that are not allowed"):
        check_suite_order(names)


def test_suite_order_is_checked_for_each_context(
    monkeypatch: pytest.MonkeyPatch, server_pairs: ServerPairs
) -> None:
    ciphers: list[dict[str, Any]] = [{"name": AES_128}, {"name": FIRST}, {"name": "ECDHE-RSA-AES256"}]
    monkeypatch.setattr(ssl.SSLContext, "get_ciphers", lambda self: ciphers)
    with pytest.raises(TlsError):
        server_context(server_pairs, ["zcp/1"])
    with pytest.raises(TlsError):
        client_context(verify=False)


def test_suite_order_of_this_openssl_is_right(context: ssl.SSLContext) -> None:
    names = [cipher["name"] for cipher in context.get_ciphers() if cipher["name"].startswith("TLS_")]
    assert set(names[:2]) == ALLOWED


def test_suites_are_set_where_python_can(monkeypatch: pytest.MonkeyPatch, server_pairs: ServerPairs) -> None:
    """Python 3.15 and later."""
    chosen: list[str] = []
    monkeypatch.setattr(
        ssl.SSLContext, "set_ciphersuites", lambda self, names: chosen.append(names), raising=False
    )
    server_context(server_pairs, ["zcp/1"])
    client_context(verify=False)
    assert chosen == [":".join(SUITES)] * 2


class Agreed:
    """A stand-in for a completed handshake."""

    def __init__(self, version: str | None, suite: str | None) -> None:
        self._version, self._suite = version, suite

    def version(self) -> str | None:
        return self._version

    def cipher(self) -> tuple[str, str, int] | None:
        return None if self._suite is None else (self._suite, "TLSv1.3", 256)


@pytest.mark.parametrize(
    ("version", "suite", "allowed"),
    [
        ("TLSv1.3", FIRST, True),
        ("TLSv1.3", SECOND, True),
        ("TLSv1.3", AES_128, False),
        ("TLSv1.2", FIRST, False),
        ("TLSv1.3", None, False),
        (None, None, False),
    ],
)
def test_suites_are_allowed_checks_version_and_suite(
    version: str | None, suite: str | None, allowed: bool
) -> None:
    assert suites_are_allowed(Agreed(version, suite)) is allowed  # type: ignore[arg-type]


def test_suites_are_in_specified_order() -> None:
    assert SUITES == ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")


def test_pair_may_be_a_tuple_of_paths(server_pairs: ServerPairs) -> None:
    pair: ServerPair = server_pairs.rsa
    server_context([(pair.certificate, pair.key)], [])
