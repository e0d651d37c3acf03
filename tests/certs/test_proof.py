"""Test the handshake in memory that a new context must pass before it serves."""

from __future__ import annotations

import hashlib
import math
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.conftest import ServerPair, ServerPairs
from tests.helpers import FakeTimers
from tests.tls.identities import client_trust, locked, revocation_list
from tests.tls.support import TlsPair
from zcproto.certs import proof
from zcproto.certs.pair import CertificatePair, Site, load_pair
from zcproto.errors import CertificateError
from zcproto.tls.context import (
    ClientTrust,
    ServerContext,
    SiteContexts,
    client_context,
    server_context,
)


def checked(pair: ServerPair) -> CertificatePair:
    return load_pair(*pair, datetime.now(UTC))


def files_of(pair: CertificatePair) -> tuple[Path, Path]:
    return pair.certificate, pair.key


def prove(context: ssl.SSLContext, pairs: Sequence[CertificatePair]) -> None:
    proof.prove(context, pairs, "zcp/1")


def proven_context(
    pairs: Sequence[CertificatePair], *protocols: str, clients: ClientTrust | None = None
) -> ServerContext:
    return proof.proven_context(pairs, protocols or ("zcp/1",), clients, rest=lambda: None)


def proven_sites(
    sites: Sequence[Site], clients: ClientTrust | None = None, rest: Callable[[], None] = lambda: None
) -> SiteContexts:
    return proof.proven_sites(sites, ("zcp/1",), clients, proven={}, rest=rest)


@pytest.fixture
def pairs(server_pairs: ServerPairs, tmp_path: Path) -> list[CertificatePair]:
    """Return one pair per key type, in files that a test may change."""
    copies = [ServerPair(tmp_path / pair.certificate.name, tmp_path / pair.key.name) for pair in server_pairs]
    for pair, copy in zip(server_pairs, copies, strict=True):
        shutil.copy(pair.certificate, copy.certificate)
        shutil.copy(pair.key, copy.key)
        copy.key.chmod(0o600)
    return [checked(copy) for copy in copies]


@pytest.fixture
def client_tls(ca_file: Path) -> ssl.SSLContext:
    return client_context(ca_file=ca_file)


def put(
    ca: trustme.CA, pair: CertificatePair | ServerPair, kind: trustme.KeyType = trustme.KeyType.ECDSA
) -> None:
    """Replace the pair by another valid one."""
    other = ca.issue_cert("localhost", key_type=kind)
    other.cert_chain_pems[0].write_to_path(pair.certificate)
    pair.key.touch(0o600)
    other.private_key_pem.write_to_path(pair.key)


# --- valid contexts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [[0], [1], [0, 1], [1, 0]])
def test_tested_context_serves_for_any_key_types(
    kinds: list[int], pairs: list[CertificatePair], client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    context = proven_context([pairs[kind] for kind in kinds], "zcp/1", "http/1.1")
    pair = TlsPair(timers, context, client_tls).agree()
    assert pair.client.selected_alpn_protocol() == "zcp/1"
    shown = pair.client.getpeercert(binary_form=True)
    assert shown is not None
    assert hashlib.sha256(shown).digest() in context.leaves
    assert context.leaves == {pairs[kind].leaf_sha256 for kind in kinds}


def test_connection_keeps_leaves_of_replaced_context(
    pairs: list[CertificatePair], client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, proven_context([pairs[0]]), client_tls)
    assert pair.server.leaves() == frozenset()
    pair.agree()
    pair.acceptor.contexts = SiteContexts(proven_context([pairs[1]]))
    assert pair.server.leaves() == {pairs[0].leaf_sha256}
    pair.raw.lose()
    assert pair.server.leaves() == frozenset()


def test_untested_context_has_no_leaves(
    pairs: list[CertificatePair], client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, server_context([files_of(pairs[0])], ["zcp/1"]), client_tls).agree()
    assert pair.server.leaves() == frozenset()


@pytest.mark.parametrize("client_auth", ["optional", "required"])
def test_context_with_client_auth_is_tested_without_client_certificate(
    client_auth: str, pairs: list[CertificatePair], ca: trustme.CA, tmp_path: Path
) -> None:
    context = proven_context(
        pairs,
        clients=client_trust(
            tmp_path, ca.cert_pem.bytes(), revocation_list(ca), is_required=client_auth == "required"
        ),
    )
    assert context.verify_mode is (ssl.CERT_REQUIRED if client_auth == "required" else ssl.CERT_OPTIONAL)


def test_encrypted_key_is_tested_with_passphrase(pairs: list[CertificatePair]) -> None:
    shut = replace(pairs[0], key=locked(pairs[0].key, b"hunter2"), passphrase=b"hunter2")
    proven_context([shut, pairs[1]])
    with pytest.raises(CertificateError, match="encrypted"):
        proven_context([replace(shut, passphrase=None)])


def test_hello_retry_request_takes_one_more_flight(pairs: list[CertificatePair]) -> None:
    """HelloRetryRequest (RFC 8446 section 4.1.4)."""
    context = server_context([files_of(pairs[0])], ["zcp/1"])
    context.set_ecdh_curve("secp521r1")
    prove(context, [pairs[0]])


# --- invalid contexts
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 1])
def test_file_changed_since_check_is_detected(
    changed: int, pairs: list[CertificatePair], ca: trustme.CA
) -> None:
    put(ca, pairs[changed], [trustme.KeyType.ECDSA, trustme.KeyType.RSA][changed])
    with pytest.raises(CertificateError, match=r"the served certificate differs") as caught:
        proven_context(pairs)
    assert str(pairs[changed].certificate) in str(caught.value)


@pytest.mark.parametrize("when", range(3))
def test_file_changed_during_test_is_detected(
    when: int, pairs: list[CertificatePair], ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change the file right before each of the three contexts is built."""
    made: list[object] = []

    def changing(*args: Any, **options: Any) -> ssl.SSLContext:
        if len(made) == when:
            put(ca, pairs[0])
        made.append(args)
        return server_context(*args, **options)

    monkeypatch.setattr(proof, "server_context", changing)
    if when == 2:  # the first pair has been read completely
        proven_context(pairs)
        return
    with pytest.raises(CertificateError, match="the served certificate differs"):
        proven_context(pairs)


@pytest.mark.parametrize("half", ["certificate", "key"])
def test_pair_with_one_changed_file_is_refused(
    half: str, pairs: list[CertificatePair], ca: trustme.CA, tmp_path: Path
) -> None:
    original = getattr(pairs[0], half).read_bytes()
    put(ca, pairs[0])
    getattr(pairs[0], half).write_bytes(original)
    with pytest.raises(CertificateError, match="KEY_VALUES_MISMATCH"):
        proven_context(pairs)


@pytest.mark.parametrize("count", [1, 2])
def test_rest_is_called_before_each_slow_handshake(pairs: list[CertificatePair], count: int) -> None:
    rests: list[int] = []
    site = Site((), tuple(pairs[:count]))
    proven_sites([site], rest=lambda: rests.append(1))
    assert len(rests) == count + (count > 1)  # each pair alone, then all together


def test_context_without_certificate_is_refused(pairs: list[CertificatePair]) -> None:
    with pytest.raises(CertificateError, match="a handshake with the new certificate fails"):
        prove(server_context([], ["zcp/1"]), [pairs[0]])


def test_other_alpn_protocol_is_detected(pairs: list[CertificatePair]) -> None:
    context = server_context([files_of(pairs[0])], ["http/1.1"])
    with pytest.raises(CertificateError, match="does not negotiate the protocol zcp/1"):
        prove(context, [pairs[0]])


def test_disallowed_suite_is_detected(pairs: list[CertificatePair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "suites_are_allowed", lambda tls: False)
    with pytest.raises(CertificateError, match=r"negotiates TLSv1\.3 and .*TLS_AES_256_GCM_SHA384"):
        prove(server_context([files_of(pairs[0])], ["zcp/1"]), pairs[:1])


def test_context_that_never_answers_is_detected(pairs: list[CertificatePair]) -> None:
    class Silent:
        def do_handshake(self) -> None:
            raise ssl.SSLWantReadError

    class Context(ssl.SSLContext):
        def wrap_bio(self, *args: Any, **options: Any) -> Any:
            return Silent()

    with pytest.raises(CertificateError, match="does not complete"):
        prove(Context(ssl.PROTOCOL_TLS_SERVER), [pairs[0]])


# --- sites --------------------------------------------------------------------------------------------


def sites_of(pairs: Sequence[CertificatePair], other: CertificatePair) -> list[Site]:
    return [Site((), tuple(pairs)), Site(("a.example", "*.b.example"), (other,))]


@pytest.fixture
def other(ca: trustme.CA, tmp_path: Path) -> CertificatePair:
    pair = ServerPair(tmp_path / "other.pem", tmp_path / "other.key")
    put(ca, pair)
    return checked(pair)


def test_all_sites_are_tested_and_first_is_default(
    pairs: list[CertificatePair], other: CertificatePair
) -> None:
    contexts = proven_sites(sites_of(pairs, other))
    assert contexts.choose("c.example") is contexts.default
    assert contexts.choose("a.example") is contexts.choose("x.b.example") is not contexts.default
    prove(contexts.choose("a.example"), [other])
    prove(contexts.default, pairs)


def test_default_site_may_have_names(pairs: list[CertificatePair], other: CertificatePair) -> None:
    sites = [Site(("d.b.example",), tuple(pairs)), *sites_of(pairs, other)[1:]]
    contexts = proven_sites(sites)
    assert contexts.choose("d.b.example") is contexts.default


def test_one_invalid_site_refuses_all(
    pairs: list[CertificatePair], other: CertificatePair, ca: trustme.CA
) -> None:
    put(ca, other)
    with pytest.raises(CertificateError, match=r"other\.pem: the served certificate differs"):
        proven_sites(sites_of(pairs, other))


def test_every_site_requests_client_certificates(
    pairs: list[CertificatePair], other: CertificatePair, ca: trustme.CA, tmp_path: Path
) -> None:
    contexts = proven_sites(sites_of(pairs, other), client_trust(tmp_path, ca.cert_pem.bytes()))
    assert contexts.default.verify_mode is ssl.CERT_REQUIRED
    assert contexts.choose("a.example").verify_mode is ssl.CERT_REQUIRED


# --- in worker threads --------------------------------------------------------------------------


def test_contexts_can_be_tested_concurrently_in_threads(pairs: list[CertificatePair]) -> None:
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                proven_context(pairs)
        except BaseException as error:  # raised in the test's own thread
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_context_test_takes_little_cpu(pairs: list[CertificatePair]) -> None:
    """Typical: 4 ms, 8 ms with RSA-4096."""
    best = math.inf
    for _ in range(5):
        start = time.thread_time()  # CPU time, not wall time
        proven_context(pairs)
        best = min(best, time.thread_time() - start)
    assert best < 0.05
