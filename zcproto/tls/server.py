"""Run the server side of TLS connections: ClientHello, handshake, pacing and checks.

The contexts decide whether client certificates are requested and which are trusted: OpenSSL checks chain, dates,
purpose and revocation, and sends the alert. A certificate without extended key usage, which OpenSSL accepts for
every purpose, and one that does not match the pins are refused here: after the handshake and before any application
data. OpenSSL cannot send an alert then: the client gets only close_notify.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from zcproto.common.deadlines import DeadlineWheel, Timers
from zcproto.common.network import network_of
from zcproto.tls.client_hello import (
    ACME_PROTOCOL,
    MAX_SIZE,
    NO_PROTOCOL,
    SUITE_IDS,
    TOO_LARGE,
    UNEXPECTED,
    Accepted,
    ChallengeHello,
    ClientHelloJudge,
    ClientHelloReader,
    Refusal,
    alert_record,
)
from zcproto.tls.context import SiteContexts, suites_are_allowed
from zcproto.tls.failure import TlsFailure
from zcproto.tls.groups import group_name, group_of
from zcproto.tls.pending import ENDED, READY, SLOT, Network, PendingHandshakes
from zcproto.tls.pins import pins_match
from zcproto.tls.transport import RECORD_SIZE, TlsPhase, TlsTransport, receive_buffer

PLAINTEXT_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 30\r\n"
    b"Connection: close\r\n\r\nThis port speaks TLS 1.3 only\n"
)
TURN_BUDGET: Final = 0.005
"""Seconds of handshake signing per turn of the loop, so that established connections are served in between."""

MAX_QUEUED: Final = MAX_SIZE + 32_768
"""Bytes of a connection that wait for its handshake: the ClientHello, then early data. OpenSSL skips up to 16,384
bytes of early data (RFC 8446 section 4.2.10)."""

LARGE_HELLO: Final = 16_384
MAX_LARGE_HELLOS: Final = 64
"""Connections whose ClientHello may exceed LARGE_HELLO at a time, so that incomplete ones cannot fill memory."""

NETWORK_BITS: Final = (24, 48)
"""The prefix lengths of networks that share handshakes: the smallest IPv4 network that is routed on the internet,
since an attacker who has one uses all its addresses, and what one site usually gets of IPv6."""

READ_BUDGET: Final = 0.001
"""Seconds that a full read may take before the connection waits for its next turn."""

BUDGET_WINDOW: Final = 2 * TURN_BUDGET
"""Seconds during which signing beyond TURN_BUDGET is deferred; a single handshake never waits."""

# Module globals, as in transport.py.
_HANDSHAKE: Final = TlsPhase.HANDSHAKE
_OPEN: Final = TlsPhase.OPEN


@dataclass(slots=True, eq=False)
class TlsAcceptor:
    """The state shared by all server-side TLS connections of one loop.

    Args:
        contexts: read by each connection when its handshake begins. To serve other certificates, assign a new
            SiteContexts; never load into a context in use.
        protocols: protocol factories by ALPN name (None: the client offers no ALPN).
        client_pins: pins, from `parse_pins`, that a presented client certificate must match; empty accepts every
            certificate that the context trusts.
        on_failure: called with the cause and the peer's address; `failures` counts the causes.
        on_room: called when a connection that waited for a slot has got it, or is closed.
        on_closed: called with the peer's address when a connection is gone.
        on_wasted: called with the network of a connection that ends before its handshake is complete, and whether
            the handshake had begun.
        on_forwarded: called with the addresses of a load balancer and its client; returns True to accept the
            connection as the client's.
        challenge_context: returns the context that answers a CA which checks a server name, or None to refuse it
            like any other protocol. Called when such a ClientHello is complete.
        on_challenge: called with the peer's address when a CA has got its answer.
        perf_counter: measures the time of handshakes.
    """

    contexts: SiteContexts
    protocols: Mapping[str | None, Callable[[], asyncio.Protocol]]
    wheel: DeadlineWheel
    timers: Timers
    _: KW_ONLY
    client_pins: frozenset[str] = frozenset()
    handshake_timeout: float = 5.0
    on_failure: Callable[[TlsFailure, str], None] = lambda failure, peer: None
    on_room: Callable[[], None] = lambda: None
    on_closed: Callable[[str], None] = lambda peer: None
    on_wasted: Callable[[Network[TlsServerTransport], bool], None] = lambda network, begun: None
    on_forwarded: Callable[[str, str], bool] = lambda balancer, client: True
    challenge_context: Callable[[str | None], ssl.SSLContext | None] = lambda name: None
    on_challenge: Callable[[str], None] = lambda peer: None
    perf_counter: Callable[[], float] = time.perf_counter
    judge: ClientHelloJudge = field(init=False)
    buffer: memoryview = field(init=False, default_factory=receive_buffer)
    failures: dict[TlsFailure, int] = field(init=False, default_factory=lambda: dict.fromkeys(TlsFailure, 0))
    pending: PendingHandshakes[TlsServerTransport] = field(init=False, default_factory=PendingHandshakes)
    handshakes_completed: int = field(init=False, default=0)
    groups: Counter[str] = field(init=False, default_factory=Counter)
    """Completed handshakes by the group of their key exchange."""
    large_hellos: set[TlsServerTransport] = field(init=False, default_factory=set)
    _turn_planned: bool = field(init=False, default=False)
    _window_ends: float = field(init=False, default=0.0)
    _spent: float = field(init=False, default=0.0)
    """Seconds of signing in this window."""

    def __post_init__(self) -> None:
        self.judge = ClientHelloJudge(frozenset(SUITE_IDS.values()), frozenset(self.protocols))

    @property
    def handshakes_in_progress(self) -> int:
        """Handshakes that hold a slot: begun with a complete ClientHello, and not ended."""
        return self.pending.slots

    def set_limits(self, handshakes: int, pending: int) -> None:
        """Limit handshakes and pending connections."""
        self.pending.max_slots = handshakes
        self.pending.max_places = pending
        self._plan_turn()

    def network_of(self, peer: str) -> Network[TlsServerTransport]:
        return self.pending.network(network_of(peer, *NETWORK_BITS))

    def schedule(self, transport: TlsServerTransport) -> None:
        """Begin a handshake now if budget and slots allow it, otherwise in a later turn."""
        now = self.perf_counter()
        if now >= self._window_ends:
            self._window_ends = now + BUDGET_WINDOW
            self._spent = 0.0
        if not self._turn_planned and self._spent < TURN_BUDGET and self.pending.take_slot(transport):
            transport.start_handshake()
            ended = self.perf_counter()
            self._spent += ended - now
            if self._spent >= TURN_BUDGET:  # a slow signature may have outlasted the window
                self._window_ends = max(self._window_ends, ended + TURN_BUDGET)
            return
        self.pending.become_ready(transport)
        self._plan_turn()

    def left(self, transport: TlsServerTransport) -> None:
        """Release the place or the slot of a connection whose handshake has ended, or never began."""
        self.large_hellos.discard(transport)
        if self.pending.leave(transport) == READY:
            self.on_room()
        elif self.pending.waiting:
            self._plan_turn()

    def _plan_turn(self) -> None:
        if not self._turn_planned and self.pending.next_ready() is not None:
            self._turn_planned = True
            self.timers.call_soon(self._turn)

    def _turn(self) -> None:
        """Begin handshakes of ready connections up to the budget of one turn."""
        turn_ends = self.perf_counter() + TURN_BUDGET
        try:
            while (transport := self.pending.next_ready()) is not None:
                self.pending.end_turn(transport.network)
                self.pending.take_slot(transport)
                self.on_room()
                transport.start_handshake()
                if self.perf_counter() >= turn_ends:
                    break
        finally:  # a handshake that raises must not stop the others
            self._turn_planned = False
            self._plan_turn()

    def admits_large_hello(self, transport: TlsServerTransport) -> bool:
        """Count a connection with a large hello until its handshake ends. Return False if there are too many."""
        large = self.large_hellos
        if transport not in large:
            if len(large) >= MAX_LARGE_HELLOS:
                return False
            large.add(transport)
        return True

    def report(self, failure: TlsFailure, peer: str) -> None:
        self.failures[failure] += 1
        self.on_failure(failure, peer)


class TlsServerTransport(TlsTransport):
    """One connection of a TlsAcceptor; failures are reported with the address `peer`.

    `network` is that of the peer, if the caller has it.
    """

    __slots__ = ("_acceptor", "_group", "_hello", "_queued", "_reader", "network", "stage")

    _hello: Accepted | ssl.SSLContext
    """The verdict on a complete ClientHello, or the context to use."""
    _queued: bytes
    """The ClientHello and what follows it, until the handshake is started."""

    network: Network[TlsServerTransport]
    stage: int

    reads_while_writing_is_paused = False

    def __init__(
        self, acceptor: TlsAcceptor, peer: str, network: Network[TlsServerTransport] | None = None
    ) -> None:
        super().__init__(acceptor.buffer, acceptor.wheel, peer)
        self._acceptor = acceptor
        self._reader: ClientHelloReader | None = None  # of a ClientHello in pieces
        self._group = 0
        acceptor.pending.join(self, network or acceptor.network_of(peer))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.stage == ENDED:  # dropped before the loop had the socket
            self.abort()
            return
        # Absolute, so that slow bytes do not extend it.
        self._wheel.set(self, self._wheel.now() + self._acceptor.handshake_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leave_handshake()
        self._reader, self._queued = None, b""
        self._acceptor.on_closed(self.peer)

    def _note(self, failure: TlsFailure) -> None:
        super()._note(failure)
        if self.stage != ENDED and not (failure is TlsFailure.HANDSHAKE_TIMEOUT and self.stage == READY):
            self._acceptor.on_wasted(self.network, self.stage == SLOT)
        self._acceptor.report(failure, self.peer)

    def _linger(self) -> None:
        self._leave_handshake()
        super()._linger()

    def _leave_handshake(self) -> None:
        if self.stage != ENDED:
            self._acceptor.left(self)

    def drop(self) -> None:
        """Reset a silent connection to make room for another."""
        self._note(TlsFailure.DISPLACED)
        self._leave_handshake()
        self._phase = TlsPhase.CLOSED
        self.abort()

    def _read_parts(self, nbytes: int) -> None:
        began = self._acceptor.perf_counter()
        super()._read_parts(nbytes)
        # libuv reads up to 32 times in a turn while the buffer is filled; others would wait for all the requests.
        if self._acceptor.perf_counter() - began > READ_BUDGET and self._phase is TlsPhase.OPEN:
            self._raw.pause_reading()
            self._acceptor.timers.call_soon(self._resume_raw_reading)

    # --- the ClientHello ------------------------------------------------------------------------

    def _received_hello(self, data: memoryview) -> None:
        if self.stage == READY:  # early data; OpenSSL skips it, or refuses it if it was not offered
            self._queued += data
            if len(self._queued) > MAX_QUEUED:
                self._refuse(UNEXPECTED)
            elif len(self._queued) > LARGE_HELLO and not self._acceptor.admits_large_hello(self):
                self._refuse(TOO_LARGE)
            return
        received, verdict = data.tobytes(), None
        if self._reader is None:
            verdict = self._acceptor.judge.judge_record(received)
        if verdict is None:
            reader = self._reader = self._reader or ClientHelloReader(self._acceptor.judge)
            verdict = reader.feed(received)
            if len(reader.raw) > LARGE_HELLO and not self._acceptor.admits_large_hello(self):
                verdict = TOO_LARGE
            if verdict is None:
                return
            self._reader, received = None, bytes(reader.raw)
        hello = verdict if isinstance(verdict, Accepted) else self._challenge(verdict)
        if hello is not None:
            self._hello, self._queued = hello, received
            self._acceptor.schedule(self)

    def _challenge(self, verdict: ChallengeHello | Refusal) -> ssl.SSLContext | None:
        """Return the context that answers a CA; None if the connection was refused."""
        if isinstance(verdict, ChallengeHello):
            context = self._acceptor.challenge_context(verdict.server_name)
            if context is not None:
                return context
            verdict = NO_PROTOCOL
        self._refuse(verdict)
        return None

    def _refuse(self, refusal: Refusal) -> None:
        self._reader, self._queued = None, b""
        if refusal.alert is not None:
            self._raw.write(alert_record(refusal.alert))
        elif refusal.failure is TlsFailure.PLAINTEXT_HTTP:
            self._raw.write(PLAINTEXT_ANSWER)
        self._fail(refusal.failure)

    # --- the handshake --------------------------------------------------------------------------

    def start_handshake(self) -> None:
        """Let OpenSSL answer the ClientHello. Called by the acceptor."""
        self._phase = _HANDSHAKE
        context, received = self._hello, self._queued
        del self._hello, self._queued  # no connection keeps its name
        if isinstance(context, Accepted):
            context = self._acceptor.contexts.choose(context.server_name)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, True)
        while received and self._phase is _HANDSHAKE:
            self._incoming.write(received[:RECORD_SIZE])
            received = received[RECORD_SIZE:]
            self._handshake()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what other TLS transports have, and the group of the key exchange as `tls_group`."""
        if name == "tls_group":
            return group_name(self._group) if self._group else default
        return super().get_extra_info(name, default)

    def _flush(self) -> None:
        if self._outgoing.pending:
            data = self._outgoing.read()
            self._group = group_of(data) or self._group
            self._raw.write(data)

    def _handshake_completed(self) -> None:
        acceptor = self._acceptor
        # Defence in depth: an error in the checks above must not go unnoticed.
        alpn = self._tls.selected_alpn_protocol()
        factory = acceptor.protocols.get(alpn)
        if factory is None or not suites_are_allowed(self._tls):
            if alpn == ACME_PROTOCOL:
                self._challenge_answered()
            else:
                self._end_for(TlsFailure.WRONG_PARAMETERS)
            return
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is not None:
            if not _is_for_clients(certificate):
                self._end_for(TlsFailure.CERTIFICATE_UNTRUSTED)
                return
            if acceptor.client_pins and not pins_match(certificate, acceptor.client_pins):
                self._end_for(TlsFailure.PIN_MISMATCH)
                return
        acceptor.left(self)  # the deadline of the handshake stays in the wheel: it does nothing any more
        acceptor.handshakes_completed += 1
        acceptor.groups[group_name(self._group)] += 1
        self._phase = _OPEN
        protocol = self._protocol = factory()
        protocol.connection_made(self)
        if self._incoming.pending and self._phase is _OPEN and not self._reading_paused:
            self._read_records(0)

    def _challenge_answered(self) -> None:
        """End the connection of a CA, which needs no more than the handshake (RFC 8737 section 3).

        It counts as wasted, because any peer can pose as a CA.
        """
        self._acceptor.on_wasted(self.network, True)
        self._acceptor.on_challenge(self.peer)
        self._send_close_notify()
        self._linger()

    def leaves(self) -> frozenset[bytes]:
        """Return the SHA-256 of the certificates (DER) of this connection's context; one of them was presented."""
        return frozenset() if self._tls is None else getattr(self._tls.context, "leaves", frozenset())

    def peer_certificate(self) -> bytes | None:
        """Return the verified client certificate (DER), or None. It is read from OpenSSL each time, not stored."""
        return None if self._tls is None else self._tls.getpeercert(binary_form=True)


def _is_for_clients(certificate_der: bytes) -> bool:
    """Return True if the extended key usage of a certificate includes clientAuth (RFC 5280 section 4.2.1.12)."""
    try:
        extensions = x509.load_der_x509_certificate(certificate_der).extensions
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in purposes
