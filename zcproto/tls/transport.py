"""The TLS record pump: one plain TCP transport below, an ordinary asyncio transport to what is above.

    TCP bytes -> shared receive buffer -> incoming MemoryBIO -> SSLObject -> protocol.data_received
    protocol's write -> SSLObject -> outgoing MemoryBIO -> one write to the TCP transport

Why our own: stock asyncio keeps 256 KiB a connection, loses the alert of a failed handshake, hides the
failure from the application, and cannot tell a truncation from a clean close.

What it decides: how records move, back-pressure both ways, close_notify both ways, truncation, and how a
connection is closed so that the peer can still read the last answer. The two handshakes are in
`server.py` and `client.py`. It must not know what the bytes mean.

Memory rules. All connections of a loop share one receive buffer. A MemoryBIO keeps its largest size for
life, so neither BIO is ever given more than a record or so at a time. `connection_lost` clears every
reference that could keep a closed connection alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from enum import IntEnum
from typing import Any, Final, cast

from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import TlsError
from zcproto.tls.failure import TlsFailure, failure_of

RECORD_SIZE: Final = 16_384
"""Plaintext in one TLS record at most (RFC 8446 section 5.1)."""

RECEIVE_BUFFER_SIZE: Final = 65_536
LINGER_TIME: Final = 2.0
"""Seconds in which a peer may still send after we closed; then the connection is reset."""

LINGER_BYTES: Final = 4 * 1024 * 1024
MAX_BARREN_BYTES: Final = 65_536
"""Bytes of records in a row that bring no data (KeyUpdates, empty records) before the connection ends."""


class Phase(IntEnum):
    """Where a TLS connection is."""

    HELLO = 0  # server only: the ClientHello is not complete, or waits for its turn
    HANDSHAKE = 1
    OPEN = 2
    CLOSING = 3  # close_notify was sent; what arrives is discarded until the peer ends
    CLOSED = 4


# Looked up in each call: an enumeration's members are slow to reach.
_HANDSHAKE: Final = Phase.HANDSHAKE
_OPEN: Final = Phase.OPEN
_CLOSING: Final = Phase.CLOSING
_NO_BIO: Final = ssl.MemoryBIO()
# What is there while a connection lives is typed so: the phases guard its use, not a check at each step.
_NO_TLS: Final = cast("ssl.SSLObject", None)
_NO_TRANSPORT: Final = cast("asyncio.Transport", None)
_NO_PROTOCOL: Final = cast("asyncio.Protocol", None)


class ReceiveBuffer:
    """The one buffer that all connections of a loop receive into. asyncio calls `get_buffer` right before
    each read and `buffer_updated` right after it, so no two connections ever use it at once."""

    __slots__ = ("array", "view")

    def __init__(self, size: int = RECEIVE_BUFFER_SIZE) -> None:
        self.array = bytearray(size)
        self.view = memoryview(self.array)


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """What both ends share: everything after the handshake, and the way to close.

    Above it sits an ordinary `asyncio.Protocol`: connection_made, data_received, eof_received (the peer's
    close_notify), pause_writing, resume_writing, connection_lost. The last gets None after a clean close
    and a `TlsError` otherwise.
    """

    __slots__ = (
        "_barren",
        "_buffer",
        "_discarded",
        "_error",
        "_incoming",
        "_outgoing",
        "_phase",
        "_protocol",
        "_raw",
        "_reading_paused",
        "_tls",
        "_unsent",
        "_view",
        "_wheel",
        "_writing_paused",
        "deadline_tick",
        "peer",
    )

    reads_while_writing_is_paused = True

    def __init__(self, buffer: ReceiveBuffer, wheel: DeadlineWheel, peer: str) -> None:
        self._extra: dict[str, Any] = {}
        self._buffer = buffer
        self._wheel = wheel
        self.peer = peer
        self.deadline_tick = 0
        self._raw = _NO_TRANSPORT
        self._view = buffer.view
        self._tls: ssl.SSLObject = _NO_TLS
        self._incoming = self._outgoing = _NO_BIO
        self._protocol = _NO_PROTOCOL
        self._phase = Phase.HELLO
        self._reading_paused = False
        self._writing_paused = False
        self._barren = 0
        self._discarded = 0
        self._unsent = 0
        self._error: TlsError | None = None

    # --- what the TCP transport calls -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer.array

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes <= RECORD_SIZE:
            if self._phase is _OPEN:
                self._incoming.write(self._view[:nbytes])
                self._read_records(nbytes)
            else:
                self._received_outside_open(self._view[:nbytes])
            return
        for start in range(0, nbytes, RECORD_SIZE):
            size = min(RECORD_SIZE, nbytes - start)
            if self._phase is not _OPEN:
                self._received_outside_open(self._view[start : start + size])
                continue
            self._incoming.write(self._view[start : start + size])
            if not self._reading_paused:  # else it waits in the BIO, at most one receive buffer of it
                self._read_records(size)

    def eof_received(self) -> bool:
        """TCP's end of stream. Without a close_notify before it, it is a truncation (RFC 8446 section 6.1)."""
        if self._phase is _OPEN:
            self._end_for(TlsFailure.TRUNCATED)
        elif self._phase <= _HANDSHAKE:
            self._fail(TlsFailure.DISCONNECTED)
        return False  # the transport closes itself, after what it still has to write

    def pause_writing(self) -> None:
        self._writing_paused = True
        if not self.reads_while_writing_is_paused and self._raw is not None:
            # What a peer that does not read makes us write (answers, responses to KeyUpdates) would pile up.
            self._raw.pause_reading()
        if self._phase is _OPEN and self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._phase is _OPEN and self._protocol is not None:
            self._protocol.resume_writing()
        self._resume_raw_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wheel.discard(self)
        if self._phase <= _OPEN and self._error is None:
            self._note(TlsFailure.DISCONNECTED if self._phase <= _HANDSHAKE else TlsFailure.CONNECTION_RESET)
        self._phase = Phase.CLOSED
        protocol = self._protocol
        self._protocol, self._raw, self._tls = _NO_PROTOCOL, _NO_TRANSPORT, _NO_TLS
        self._incoming = self._outgoing = _NO_BIO
        self._extra = {}
        if protocol is not None:
            protocol.connection_lost(self._error)

    # --- records in -----------------------------------------------------------------------------

    def _received_outside_open(self, data: memoryview) -> None:
        if self._phase is _CLOSING:
            self._discard(len(data))
        elif self._phase is not Phase.CLOSED:
            self._received_in_handshake(data)

    def _received_in_handshake(self, data: memoryview) -> None:
        raise NotImplementedError

    def _read_records(self, arrived: int) -> None:
        """Decrypt what has arrived and hand it on, until nothing is left or reading is paused."""
        tls = self._tls
        incoming = self._incoming
        barren = True
        # Asking `pending` costs a tenth of the SSLWantReadError that tells the same.
        while arrived or incoming.pending:
            try:
                data = tls.read(RECORD_SIZE)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:
                self._fail_for(error)
                return
            if not data:
                self._peer_closed()
                return
            barren = False
            self._protocol.data_received(data)
            if not incoming.pending or self._reading_paused or self._phase is not _OPEN:
                break
        if barren:
            self._barren += arrived
            if self._barren > MAX_BARREN_BYTES:
                self._end_for(TlsFailure.BARREN_RECORDS)
                return
        else:
            self._barren = 0
        if self._outgoing.pending and self._phase is _OPEN:  # answers to KeyUpdates
            self._raw.write(self._outgoing.read())

    def _peer_closed(self) -> None:
        """close_notify arrived: the peer sends nothing more, and its silence is no truncation."""
        self._protocol.eof_received()
        self.close()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > LINGER_BYTES:
            self.abort()

    # --- records out ----------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. Bytes that the peer does not read gather in the TCP transport, which pauses us."""
        if self._phase is not _OPEN:
            return
        if len(data) <= RECORD_SIZE:
            self._tls.write(data)
            self._raw.write(self._outgoing.read())
            return
        view = memoryview(data)
        records: list[bytes] = []
        for start in range(0, len(view), RECORD_SIZE):
            self._tls.write(view[start : start + RECORD_SIZE])
            records.append(self._outgoing.read())
        self._raw.write(b"".join(records))

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._raw.write(self._outgoing.read())

    # --- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Send close_notify after all that was written, stop sending, and discard input until the peer ends.

        Closing at once would answer input that is still on its way with a reset, which destroys what the
        peer has not read yet. After LINGER_TIME or LINGER_BYTES it is reset all the same; the time begins anew
        while the peer still takes what was written before.
        """
        if self._phase >= _CLOSING:
            return
        if self._phase is _OPEN:
            self._send_close_notify()
        self._linger()

    def _send_close_notify(self) -> None:
        # SSLWantReadError: the peer's close_notify has not come, and need not (RFC 8446 section 6.1).
        # Any other: the connection had failed already; its alert, if any, is in the outgoing BIO.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()

    def _linger(self) -> None:
        self._phase = Phase.CLOSING
        raw = self._raw
        if raw is None or raw.is_closing():
            return
        self._unsent = raw.get_write_buffer_size()
        self._wheel.set(self, self._now() + LINGER_TIME)
        if raw.can_write_eof():
            try:
                raw.write_eof()
            except OSError:  # the peer's reset has arrived, and the loop has not told us yet
                raw.abort()
                return
        if not raw.is_reading():
            raw.resume_reading()

    def _now(self) -> float:
        return self._wheel.now()

    def abort(self) -> None:
        """Reset the connection; what was not sent is lost."""
        if self._raw is not None:
            self._phase = Phase.CLOSING  # it is no failure of the peer's
            self._raw.abort()

    def _note(self, failure: TlsFailure) -> None:
        """Keep the cause. There is only one: it ends the connection."""
        self._error = TlsError(failure.value)

    def _fail(self, failure: TlsFailure) -> None:
        """End the connection for a fault of the peer or the network. OpenSSL's alert goes out first."""
        self._note(failure)
        self._flush()
        self._linger()

    def _fail_for(self, error: ssl.SSLError) -> None:
        self._fail(failure_of(error))

    def _end_for(self, failure: TlsFailure) -> None:
        """End an agreed connection for what OpenSSL has no alert for: with close_notify (RFC 8446 section 6.1)."""
        self._note(failure)
        self._send_close_notify()
        self._linger()

    def handle_deadline(self, now: float) -> None:
        if self._phase is _CLOSING:
            unsent = self.get_write_buffer_size()
            if 0 < unsent < self._unsent:
                self._unsent = unsent
                self._wheel.set(self, now + LINGER_TIME)
            else:
                self.abort()
        elif self._phase <= _HANDSHAKE:
            self._fail(TlsFailure.HANDSHAKE_TIMEOUT)

    # --- asyncio.Transport ----------------------------------------------------------------------

    def is_closing(self) -> bool:
        return self._phase >= _CLOSING

    def is_reading(self) -> bool:
        return not self._reading_paused

    def pause_reading(self) -> None:
        """Hand nothing more to the protocol until `resume_reading`."""
        if not self._reading_paused:
            self._reading_paused = True
            if self._phase is _OPEN and self._raw is not None and self._raw.is_reading():
                self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Go on with what has arrived already, then with what the network brings."""
        if self._reading_paused:
            self._reading_paused = False
            if self._phase is _OPEN:
                self._read_records(0)
            self._resume_raw_reading()

    def _resume_raw_reading(self) -> None:
        if self._reading_paused or (self._writing_paused and not self.reads_while_writing_is_paused):
            return
        raw = self._raw
        if raw is not None and not raw.is_closing() and not raw.is_reading():
            raw.resume_reading()

    def get_write_buffer_size(self) -> int:
        return 0 if self._raw is None else self._raw.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high, low)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast("asyncio.Protocol", protocol)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As asyncio's own TLS transport: `ssl_object`, `cipher`, `peercert`, and what TCP knows."""
        if name == "ssl_object":
            return self._tls if self._tls is not None else default
        if name == "cipher":
            return self._tls.cipher() if self._tls is not None else default
        if name == "peercert":
            return self._tls.getpeercert() if self._tls is not None else default
        return default if self._raw is None else self._raw.get_extra_info(name, default)

    def can_write_eof(self) -> bool:
        return False  # a TLS connection ends by close(); half-closing is not part of the contract
