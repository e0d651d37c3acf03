"""Puts new certificates into service while a server runs.

What this file decides: which open connections a change of certificates concerns.

Rules:
- New certificates apply to future connections; existing ones are kept, unless the client's certificate was revoked.
- Keys to come are announced to every connection by the event `pins.next`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.certs import NextPins
from zcproto.certs.checker import ServingCertificates
from zcproto.certs.crl import CertificateId, certificate_id
from zcproto.certs.manager import unix_ms
from zcproto.server.state import log
from zcproto.wire.message import encode_body

CLOSED_PER_TURN: Final = 100


class CertificateRollout:
    """Subscribes to the certificates of one server. `spawn` starts background work."""

    def __init__(self, parts: Parts, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._parts = parts
        self._spawn = spawn
        self._revoked = parts.certificates.serving.revoked
        parts.certificates.on_serving = self._serve
        parts.certificates.on_next_pins = self._announce
        self._announce(parts.certificates.next_pins)

    def _serve(self, serving: ServingCertificates) -> None:
        self._parts.acceptor.contexts = serving.contexts
        self._announce(self._parts.certificates.next_pins)
        revoked, self._revoked = serving.revoked - self._revoked, serving.revoked
        if revoked:
            self._spawn(close_revoked(self._parts, revoked))

    def _announce(self, next_pins: NextPins | None) -> None:
        state = self._parts.state
        state.pins = tuple(pair.pin for pair in self._parts.certificate_pairs)
        state.pins_next, body = None, None
        if next_pins is not None:
            state.pins_next = {"pins": list(next_pins.pins), "from": unix_ms(next_pins.use_from)}
            body = encode_body(["pins.next", state.pins_next])
        self._spawn(state.announce(body))


async def close_revoked(parts: Parts, revoked: frozenset[CertificateId]) -> None:
    """Close the connections of clients whose certificates were revoked."""
    for number, connection in enumerate(list(parts.state.connections), 1):
        certificate = connection.peer_certificate()
        if certificate is not None and certificate_id(certificate) in revoked:
            log.warning("connection.certificate_revoked", peer=connection.peer, connection=connection.id)
            connection.close("certificate_revoked")
        if number % CLOSED_PER_TURN == 0:
            await asyncio.sleep(0)
    if parts.http is not None:
        parts.http.close_those(lambda certificate: certificate_id(certificate) in revoked)
