"""A fresh context proves itself before it serves anybody: by a handshake in memory, without a socket.

What it decides: whether a context, agreed with, gives the certificate that is expected and can sign for it, by TLS
1.3, the right protocol and an allowed suite. What was read from the files when they were checked and what OpenSSL
read from them a moment later may be two things, and a key that does not sign breaks every handshake from there on.

A client cannot ask OpenSSL for one kind of certificate by any public function before Python 3.15, so each pair
shows itself in a context of its own, made by the same function; then all of them together in the one that will
serve. The pairs' own contexts are made *after* that one: files that changed since they were checked have changed
by then, whichever of the two read them first.

The handshake ends for the client with the server's flight: it needs no certificate of a client, also where the
context demands one. Nothing here is shared between calls, and OpenSSL signs without the interpreter's lock, so all
of it may run in a thread beside a loop that serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

from zcproto.errors import CertificateError
from zcproto.tls.context import (
    ClientAuth,
    PairOfFiles,
    ServerContext,
    client_context,
    server_context,
    suites_are_allowed,
)
from zcproto.tls.sites import SiteContexts
from zcproto.tls.suites import SUITES

Site = TypeVar("Site", bound="SiteOfPairs")

ROUNDS: Final = 4
"""Flights of a client at most: its hello, again after a HelloRetryRequest, and its end."""


class CheckedPair(PairOfFiles, Protocol):
    """Files whose content was checked."""

    @property
    def leaf_sha256(self) -> bytes:
        """SHA-256 of the DER of the certificate that was checked."""

    @property
    def passphrase(self) -> bytes | None: ...


class SiteOfPairs(Protocol):
    """What is served for some names; no names for the default."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def pairs(self) -> Sequence[CheckedPair]: ...


def prove(
    context: ssl.SSLContext,
    leaves: Collection[bytes],
    *,
    protocol: str,
    suites: Collection[str] = SUITES,
) -> None:
    """Agree with a context, and raise CertificateError unless it serves one of these leaves (SHA-256 of DER)."""
    client_in, client_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(verify=False, protocols=(protocol,)).wrap_bio(client_in, client_out)
    server = context.wrap_bio(server_in, server_out, server_side=True)
    try:
        for _ in range(ROUNDS):
            if _advance(client):
                break
            server_in.write(client_out.read())
            _advance(server)
            client_in.write(server_out.read())
        else:
            raise CertificateError("a handshake with the new certificate does not come to its end")
    except ssl.SSLError as error:
        raise CertificateError(
            f"a handshake with the new certificate fails: {error.reason or type(error).__name__}"
        ) from error
    seen = client.getpeercert(binary_form=True)
    assert seen is not None
    if hashlib.sha256(seen).digest() not in leaves:
        raise CertificateError(
            "another certificate is served than the one that was checked: its file has changed meanwhile; try again"
        )
    if not suites_are_allowed(client, frozenset(suites)):
        raise CertificateError(f"a handshake agrees on {client.version()} and {client.cipher()}")
    if client.selected_alpn_protocol() != protocol:
        raise CertificateError(f"a handshake does not agree on the protocol {protocol}")


def _advance(end: ssl.SSLObject) -> bool:
    """Take one step of a handshake; whether it was the last."""
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()
        return True
    return False


def proven_context(
    pairs: Sequence[CheckedPair],
    protocols: Sequence[str],
    suites: Sequence[str] = SUITES,
    *,
    client_auth: ClientAuth = "off",
    client_ca: Path | bytes | None = None,
    client_crl: Path | bytes | None = None,
    rest: Callable[[], None] = lambda: None,
) -> ServerContext:
    """A server's context for these pairs, as `server_context`, that has proved that it serves their `leaves`.

    Takes some milliseconds, most of them for an RSA signature. `rest` is called between what takes that long: a
    thread that stops for a moment there leaves the processor to others. Raises CertificateError.
    """
    if not pairs:
        raise CertificateError("a site has no certificate; give it one")
    context = server_context(
        pairs, protocols, suites, client_auth=client_auth, client_ca=client_ca, client_crl=client_crl
    )
    for pair in pairs:
        rest()
        alone = context if len(pairs) == 1 else server_context([pair], protocols, suites)
        with _named(pair):
            prove(alone, {pair.leaf_sha256}, protocol=protocols[0], suites=suites)
    leaves = frozenset(pair.leaf_sha256 for pair in pairs)
    if len(pairs) > 1:
        rest()
        with _named(pairs[0]):
            prove(context, leaves, protocol=protocols[0], suites=suites)
    context.leaves = leaves
    return context


@contextlib.contextmanager
def _named(pair: CheckedPair) -> Iterator[None]:
    try:
        yield
    except CertificateError as error:
        raise CertificateError(f"{pair.certificate}: {error}") from error


def proven_sites(
    sites: Sequence[Site],
    protocols: Sequence[str],
    suites: Sequence[str] = SUITES,
    *,
    client_auth: ClientAuth = "off",
    client_ca: Path | bytes | None = None,
    client_crl: Path | bytes | None = None,
    proven: dict[Site, ServerContext] | None = None,
    rest: Callable[[], None] = lambda: None,
) -> SiteContexts:
    """The contexts of all sites, each proven; the first site is the default. All of them or none.

    `proven` are the contexts of sites that have proved themselves before, made the same way; they are used again,
    for the files of one site may be damaged while another's are renewed. It is brought up to date. `rest` is for
    `proven_context`.

    Raises CertificateError, also for a name of two sites.
    """
    known = {} if proven is None else proven
    by_name: dict[str, ssl.SSLContext] = {}
    contexts: dict[Site, ServerContext] = {}
    for site in sites:
        context = known.get(site)
        if context is None:
            context = proven_context(
                site.pairs,
                protocols,
                suites,
                client_auth=client_auth,
                client_ca=client_ca,
                client_crl=client_crl,
                rest=rest,
            )
        contexts[site] = context
        for name in site.names:
            if name in by_name:
                raise CertificateError(f"{name!r} is a name of two sites; leave it to one of them")
            by_name[name] = context
    known.clear()
    known.update(contexts)
    return SiteContexts(contexts[sites[0]], by_name)
