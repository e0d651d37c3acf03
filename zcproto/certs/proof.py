"""Test a new server context by a handshake in memory before it serves connections.

Decides whether a context presents the expected certificate and can sign for it, with TLS 1.3, the right protocol
and an allowed suite. The files may change between our check and OpenSSL's read, and a key that does not match
breaks every later handshake.

Before Python 3.15 no public function lets a client request one type of certificate, so each pair is tested in
its own context, and then all together in the one that will serve. The separate contexts are made *after* that
one, so a file changed since its check is noticed whichever read it first.

The client's handshake ends with the server's flight, so no client certificate is needed even if the context
requires one. Nothing is shared between calls, and OpenSSL signs without the interpreter lock, so this may run in
a worker thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import Callable, Sequence
from typing import Final

from zcproto.certs.pair import CertificatePair, Site
from zcproto.errors import CertificateError
from zcproto.tls.context import (
    ClientTrust,
    ServerContext,
    SiteContexts,
    client_context,
    server_context,
    suites_are_allowed,
)

ROUNDS: Final = 4
"""Maximum flights of the client: its hello, another one after a HelloRetryRequest, and its Finished."""


def prove(context: ssl.SSLContext, pairs: Sequence[CertificatePair], protocol: str) -> None:
    """Raise CertificateError unless a handshake with the context presents the certificate of one of these pairs."""
    try:
        client = _shake_hands(context, protocol)
        seen = client.getpeercert(binary_form=True)
        assert seen is not None
        if hashlib.sha256(seen).digest() not in {pair.leaf_sha256 for pair in pairs}:
            raise CertificateError(
                "the served certificate differs from the checked one: its file has changed meanwhile; try again"
            )
        if not suites_are_allowed(client):
            raise CertificateError(f"a handshake negotiates {client.version()} and {client.cipher()}")
        if client.selected_alpn_protocol() != protocol:
            raise CertificateError(f"a handshake does not negotiate the protocol {protocol}")
    except CertificateError as error:
        raise CertificateError(f"{pairs[0].certificate}: {error}") from error


def _shake_hands(context: ssl.SSLContext, protocol: str) -> ssl.SSLObject:
    """Return the client's end of a handshake that is complete for it."""
    client_in, client_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(verify=False, protocols=(protocol,)).wrap_bio(client_in, client_out)
    server = context.wrap_bio(server_in, server_out, server_side=True)
    try:
        for _ in range(ROUNDS):
            if _advance(client):
                return client
            server_in.write(client_out.read())
            _advance(server)
            client_in.write(server_out.read())
    except ssl.SSLError as error:
        raise CertificateError(
            f"a handshake with the new certificate fails: {error.reason or type(error).__name__}"
        ) from error
    raise CertificateError("a handshake with the new certificate does not complete")


def _advance(end: ssl.SSLObject) -> bool:
    """Advance a handshake by one step. Return True if it is complete."""
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()
        return True
    return False


def proven_context(
    pairs: Sequence[CertificatePair],
    protocols: Sequence[str],
    clients: ClientTrust | None,
    *,
    rest: Callable[[], None],
) -> ServerContext:
    """Return a tested `server_context` for these pairs, with their `leaves`.

    Takes some milliseconds, most of them for an RSA signature. `rest` is called between the steps, so that a worker
    thread can yield the processor. Raises CertificateError.
    """
    files = [(pair.certificate, pair.key, pair.passphrase) for pair in pairs]
    context = server_context(files, protocols, clients)
    for pair, its_files in zip(pairs, files, strict=True):
        rest()
        alone = context if len(pairs) == 1 else server_context([its_files], protocols)
        prove(alone, [pair], protocols[0])
    if len(pairs) > 1:
        rest()
        prove(context, pairs, protocols[0])
    context.leaves = frozenset(pair.leaf_sha256 for pair in pairs)
    return context


def proven_sites(
    sites: Sequence[Site],
    protocols: Sequence[str],
    clients: ClientTrust | None,
    *,
    proven: dict[Site, ServerContext],
    rest: Callable[[], None],
) -> SiteContexts:
    """Return the tested contexts of all sites; the first site is the default.

    `proven` holds contexts tested earlier with the same arguments; they are reused, because the files of one
    site may be damaged while those of another are renewed. It is updated. Raises CertificateError if a site fails.
    """
    contexts: dict[Site, ServerContext] = {}
    for site in sites:
        context = proven.get(site)
        if context is None:
            context = proven_context(site.pairs, protocols, clients, rest=rest)
        contexts[site] = context
    proven.clear()
    proven.update(contexts)
    return SiteContexts(
        contexts[sites[0]], {name: context for site, context in contexts.items() for name in site.names}
    )
