"""Pump TLS records between a plain TCP transport and an asyncio protocol.

    TCP bytes -> shared receive buffer -> incoming MemoryBIO -> SSLObject -> protocol.data_received
    protocol's write -> SSLObject -> outgoing MemoryBIO -> one write to the TCP transport

Stock asyncio is not used because it keeps 256 KiB per connection, loses the alert of a failed handshake, hides the
failure from the application, and does not distinguish a truncation from a clean close.

Decides the flow of records, back-pressure and close_notify in both directions, truncation, and closing a connection
so that the peer can still read the last response. The handshakes are in `server.py` and `client.py`.

Memory rules:
- All connections of a loop share one receive buffer.
- A MemoryBIO never shrinks, so neither BIO gets more than about one record at a time.
- `connection_lost` clears every reference that could keep a closed connection alive.

It must not know: the meaning of the bytes.
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
"""Maximum plaintext of one TLS record (RFC 8446 section 5.1)."""

RECEIVE_BUFFER_SIZE: Final = 65_536
LINGER_TIME: Final = 2.0
"""Seconds during which a peer may still send after our close; then the connection is reset."""

LINGER_BYTES: Final = 4 * 1024 * 1024
MAX_BARREN_BYTES: Final = 65_536
"""Bytes of consecutive records without data (KeyUpdates, empty records) that end the connection."""


class TlsPhase(IntEnum):
    """Phases of a TLS connection."""

    HELLO = 0  # server only: the ClientHello is incomplete or queued
    HANDSHAKE = 1
    OPEN = 2
    CLOSING = 3  # close_notify was sent; input is discarded until the peer closes
    CLOSED = 4


# Module globals: members of an enumeration are slow to look up on the hot path.
_HELLO: Final = TlsPhase.HELLO
_HANDSHAKE: Final = TlsPhase.HANDSHAKE
_OPEN: Final = TlsPhase.OPEN
_CLOSING: Final = TlsPhase.CLOSING
_NO_BIO: Final = ssl.MemoryBIO()
# Typed as always present: the phases guard their use, without a check at each step.
_NO_TLS: Final = cast("ssl.SSLObject", None)
_NO_TRANSPORT: Final = cast("asyncio.Transport", None)
_NO_PROTOCOL: Final = cast("asyncio.Protocol", None)


def receive_buffer() -> memoryview:
    """Return a receive buffer to share between all connections of a loop.

    asyncio calls `get_buffer` right before each read and `buffer_updated` right after it, so connections never
    use it concurrently.
    """
    return memoryview(bytearray(RECEIVE_BUFFER_SIZE))


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """The part common to both ends: everything after the handshake, and closing.

    The protocol above is an ordinary `asyncio.Protocol`: eof_received means the peer's close_notify, and
    connection_lost gets None after a clean close and a `TlsError` otherwise.
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
        "_wheel",
        "_writing_paused",
        "deadline_tick",
        "peer",
    )

    # From the beginning of the handshake.
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO

    reads_while_writing_is_paused = True
    # uvloop looks for it in every protocol: an AttributeError for each connection costs 3,000 instructions.
    data_received = None

    def __init__(self, buffer: memoryview, wheel: DeadlineWheel, peer: str) -> None:
        self._buffer = buffer
        self._wheel = wheel
        self.peer = peer
        self.deadline_tick = 0
        self._raw = _NO_TRANSPORT
        self._tls: ssl.SSLObject = _NO_TLS
        self._protocol = _NO_PROTOCOL
        self._phase = TlsPhase.HELLO
        self._reading_paused = False
        self._writing_paused = False
        self._barren = 0
        self._error: TlsError | None = None

    # --- callbacks of the TCP transport ---------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = transport  # type: ignore[assignment]  # uvloop's transport is not a subclass

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes <= RECORD_SIZE:
            if self._phase is _OPEN:
                self._incoming.write(self._buffer[:nbytes])
                self._read_records(nbytes)
            else:
                self._received_outside_open(self._buffer[:nbytes])
        else:
            self._read_parts(nbytes)

    def _read_parts(self, nbytes: int) -> None:
        """Process more bytes than a MemoryBIO may get at a time."""
        for start in range(0, nbytes, RECORD_SIZE):
            size = min(RECORD_SIZE, nbytes - start)
            if self._phase is not _OPEN:
                self._received_outside_open(self._buffer[start : start + size])
                continue
            self._incoming.write(self._buffer[start : start + size])
            if not self._reading_paused:  # otherwise the BIO holds it, at most one receive buffer
                self._read_records(size)

    def eof_received(self) -> bool:
        """Handle the end of the TCP stream: a truncation unless close_notify preceded it (RFC 8446 section 6.1)."""
        if self._phase is _OPEN:
            self._end_for(TlsFailure.TRUNCATED)
        elif self._phase <= _HANDSHAKE:
            self._fail(TlsFailure.DISCONNECTED)
        return False  # the transport flushes its buffer and closes itself

    def pause_writing(self) -> None:
        self._writing_paused = True
        if not self.reads_while_writing_is_paused and self._raw is not None:
            # Output caused by a peer that does not read (answers, responses to KeyUpdates) would accumulate.
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
        self._phase = TlsPhase.CLOSED
        protocol = self._protocol
        self._protocol, self._raw, self._tls = _NO_PROTOCOL, _NO_TRANSPORT, _NO_TLS
        self._incoming = self._outgoing = _NO_BIO
        if protocol is not None:
            protocol.connection_lost(self._error)

    # --- records in -----------------------------------------------------------------------------

    def _received_outside_open(self, data: memoryview) -> None:
        if self._phase is _HANDSHAKE:
            self._incoming.write(data)
            self._handshake()
        elif self._phase is _HELLO:
            self._received_hello(data)
        elif self._phase is _CLOSING:
            self._discard(len(data))

    def _received_hello(self, data: memoryview) -> None:
        raise NotImplementedError

    def _handshake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._fail_for(error)
        else:
            self._handshake_completed()

    def _handshake_completed(self) -> None:
        raise NotImplementedError

    def _read_records(self, arrived: int) -> None:
        """Decrypt received records and pass the data on until nothing is left or reading is paused."""
        incoming = self._incoming
        # Reading `pending` costs a tenth of catching SSLWantReadError.
        while arrived or incoming.pending:
            try:
                data = self._tls.read(RECORD_SIZE)
            except ssl.SSLWantReadError:
                self._barren += arrived
                if self._barren > MAX_BARREN_BYTES:
                    self._end_for(TlsFailure.BARREN_RECORDS)
                break
            except ssl.SSLError as error:
                self._fail_for(error)
                return
            if not data:
                self._peer_closed()
                return
            self._barren = arrived = 0
            self._protocol.data_received(data)
            if not incoming.pending or self._reading_paused or self._phase is not _OPEN:
                break
        if self._outgoing.pending and self._phase is _OPEN:  # answers to KeyUpdates
            self._raw.write(self._outgoing.read())

    def _peer_closed(self) -> None:
        """Handle the peer's close_notify: it sends nothing more, so the end of the stream is clean."""
        self._protocol.eof_received()
        self.close()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > LINGER_BYTES:
            self.abort()

    # --- records out ----------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. The TCP transport buffers what the peer does not read and pauses us."""
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
        """Send close_notify after all pending output, stop sending, and discard input until the peer closes.

        Closing at once would answer input still in flight with a reset, which destroys data that the peer has not
        read yet. After LINGER_TIME or LINGER_BYTES the connection is reset; the time restarts while the peer keeps
        reading pending output.
        """
        if self._phase >= _CLOSING:
            return
        if self._phase is _OPEN:
            self._send_close_notify()
        self._linger()

    def _send_close_notify(self) -> None:
        # SSLWantReadError: the peer's close_notify has not arrived and is not required (RFC 8446 section 6.1).
        # Any other error: the connection had already failed; its alert, if any, is in the outgoing BIO.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()

    def _linger(self) -> None:
        self._phase = TlsPhase.CLOSING
        self._discarded = 0
        self._unsent = self.get_write_buffer_size()
        raw = self._raw
        if raw is None or raw.is_closing():
            return
        self._wheel.set(self, self._now() + LINGER_TIME)
        if raw.can_write_eof():
            try:
                raw.write_eof()
            except OSError:  # the peer's reset has arrived, but the loop has not reported it yet
                raw.abort()
                return
        if not raw.is_reading():
            raw.resume_reading()

    def _now(self) -> float:
        return self._wheel.now()

    def abort(self) -> None:
        """Reset the connection; unsent data is lost."""
        if self._raw is not None:
            self._phase = TlsPhase.CLOSED  # do not count it as a failure of the peer
            self._raw.abort()

    def _note(self, failure: TlsFailure) -> None:
        """Record the cause that ends the connection."""
        self._error = TlsError(failure.value)

    def _fail(self, failure: TlsFailure) -> None:
        """End the connection for a failure of the peer or the network, after sending OpenSSL's alert."""
        self._note(failure)
        if self._phase is not _HELLO:
            self._flush()
        self._linger()

    def _fail_for(self, error: ssl.SSLError) -> None:
        self._fail(failure_of(error))

    def _end_for(self, failure: TlsFailure) -> None:
        """End an established connection with close_notify, where OpenSSL has no alert (RFC 8446 section 6.1)."""
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
        """Pass no data to the protocol until `resume_reading`."""
        if not self._reading_paused:
            self._reading_paused = True
            if self._phase is _OPEN and self._raw is not None and self._raw.is_reading():
                self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Pass on data already received, then resume reading from the network."""
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
        """Return the information that asyncio's TLS transport has: `ssl_object`, `cipher`, `peercert`, and
        TCP's."""
        if name == "ssl_object":
            return self._tls if self._tls is not None else default
        if name == "cipher":
            return self._tls.cipher() if self._tls is not None else default
        if name == "peercert":
            return self._tls.getpeercert() if self._tls is not None else default
        return default if self._raw is None else self._raw.get_extra_info(name, default)

    def can_write_eof(self) -> bool:
        return False  # close with close(); half-closing is not supported (zcp1.md, section 4)
