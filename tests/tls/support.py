"""Join a server transport and an OpenSSL client in memory, and forge hostile records."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tests.helpers import FakeTimers, MockTransport
from tests.limits import TIMEOUT
from zcproto.common.deadlines import DeadlineWheel
from zcproto.tls.context import SiteContexts
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import TlsAcceptor, TlsServerTransport
from zcproto.tls.transport import TlsPhase

PEER = "192.0.2.7"
ALERT, HANDSHAKE, DATA = 21, 22, 23


class RecordingProtocol(asyncio.Protocol):
    """A protocol that records its callbacks and runs an action of the test on each."""

    def __init__(self, **actions: Callable[..., object]) -> None:
        self.calls: list[Any] = []
        self.received = bytearray()
        self.pieces: list[bytes] = []
        self.transport: Any = None
        self.actions = actions

    def _do(self, name: str, *args: Any) -> None:
        self.actions.get(name, lambda *args: None)(self, *args)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.calls.append("made")
        self._do("made")

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.pieces.append(data)
        self._do("data", data)

    def eof_received(self) -> None:
        self.calls.append("eof")
        self._do("eof")

    def pause_writing(self) -> None:
        self.calls.append("pause")
        self._do("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")
        self._do("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(exc)
        self.transport = None


async def all_gone(connections: Iterable[TlsServerTransport]) -> None:
    """Wait until all connections of a server are gone, before its loop ends."""
    async with asyncio.timeout(TIMEOUT):
        while any(each._phase is not TlsPhase.CLOSED for each in connections):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class TlsPair:
    """One connection: `server` over the mock TCP of `raw`, `client` an SSLObject over two BIOs."""

    def __init__(
        self,
        timers: FakeTimers,
        server_context: ssl.SSLContext | SiteContexts,
        client_context: ssl.SSLContext,
        *,
        protocol: RecordingProtocol | None = None,
        acceptor: TlsAcceptor | None = None,
        host: str = "localhost",
        kind: type[TlsServerTransport] = TlsServerTransport,
        **options: Any,
    ) -> None:
        self.timers = timers
        self.protocol = RecordingProtocol() if protocol is None else protocol
        self.log: list[Any] = []
        if acceptor is None:
            acceptor = new_acceptor(timers, server_context, lambda: self.protocol, self.log, **options)
        self.acceptor = acceptor
        self.server = kind(acceptor, PEER)
        self.raw = MockTransport(timers)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client_context.wrap_bio(self.incoming, self.outgoing, server_hostname=host)
        self.raw.connect(self.server)

    # the handshake

    def step(self) -> bytes:
        """Advance the client's handshake. Return the bytes it sends."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.client.do_handshake()
        return self.outgoing.read()

    def hear(self) -> bytes:
        """Pass the server's output to the client. Return the bytes."""
        data = self.raw.take()
        self.incoming.write(data)
        return data

    def exchange(self, data: bytes = b"") -> None:
        """Pass both flights of the client, and data with the second one, as far as both ends go."""
        self.raw.deliver(self.step())
        self.hear()
        last = self.step()
        self.raw.deliver(last + self.sealed(data) if data else last)

    def agree(self) -> TlsPair:
        """Complete the handshake."""
        self.exchange()
        assert self.phase is TlsPhase.OPEN
        return self

    @property
    def phase(self) -> TlsPhase:
        return self.server._phase

    @property
    def failures(self) -> dict[TlsFailure, int]:
        return {failure: count for failure, count in self.acceptor.failures.items() if count}

    # data

    def sealed(self, data: bytes) -> bytes:
        """Return the client's records for this data."""
        for start in range(0, len(data), 16_384):
            self.client.write(data[start : start + 16_384])
        return self.outgoing.read()

    def say(self, data: bytes, piece: int = 65_536) -> None:
        self.raw.deliver(self.sealed(data), piece)

    def client_reads(self) -> bytes:
        """Return all data received by the client, up to the server's close_notify."""
        self.hear()
        data = b""
        while True:
            try:
                part = self.client.read(65_536)
            except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                return data
            if not part:
                return data
            data += part

    def client_closes(self) -> bytes:
        """Return the client's close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.client.unwrap()
        return self.outgoing.read()

    def client_saw_close_notify(self) -> bool:
        """Return True if the client's stream ended with close_notify."""
        self.hear()
        try:
            while self.client.read(65_536):
                pass
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLWantReadError:
            return False
        return True

    def refusal(self) -> ssl.SSLError:
        """Return the error that the client raises for the server's output."""
        self.hear()
        try:
            self.client.do_handshake()
            self.client.read(1)
        except ssl.SSLWantReadError:
            raise AssertionError("the client got no alert") from None
        except ssl.SSLError as error:
            return error
        raise AssertionError("the client got no error")


def new_acceptor(
    timers: FakeTimers,
    context: ssl.SSLContext | SiteContexts,
    factory: Callable[[], asyncio.Protocol],
    log: list[Any],
    **options: Any,
) -> TlsAcceptor:
    options.setdefault("protocols", {"zcp/1": factory, "http/1.1": factory, None: factory})
    options.setdefault("perf_counter", lambda: 0.0)  # on a busy machine, no handshake uses up a turn
    return TlsAcceptor(
        context if isinstance(context, SiteContexts) else SiteContexts(context),
        wheel=DeadlineWheel(timers),
        timers=timers,
        on_failure=lambda failure, peer: log.append((failure, peer)),
        on_closed=lambda peer: log.append("closed"),
        **options,
    )


def records(data: bytes) -> list[tuple[int, bytes]]:
    """Yield type and content of the TLS records of a stream."""
    found: list[tuple[int, bytes]] = []
    while data:
        kind, _, length = struct.unpack("!BHH", data[:5])
        assert len(data) >= 5 + length
        found.append((kind, data[5 : 5 + length]))
        data = data[5 + length :]
    return found


def captured_hello(context: ssl.SSLContext, host: str | None = "localhost") -> bytes:
    """Return the first bytes of an OpenSSL client."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=host)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a peer")


class Forger:
    """Make records with a client's keys (RFC 8446 sections 5.2 and 7.3), valid or not.

    Supports TLS_AES_256_GCM_SHA384, the server's preference. `secret` is the client's application traffic secret
    from its key log.
    """

    def __init__(self, key_log: Path) -> None:
        secrets = dict(line.split()[::2] for line in key_log.read_text().splitlines() if line[0] != "#")
        self._secret = bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"])
        self._derive()

    def _expand(self, label: bytes, size: int) -> bytes:
        name = b"tls13 " + label
        info = struct.pack("!HB", size, len(name)) + name + b"\0"
        return HKDFExpand(hashes.SHA384(), size, info).derive(self._secret)

    def _derive(self) -> None:
        self._key = AESGCM(self._expand(b"key", 32))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")
        self.sequence = 0

    def record(self, content: bytes, kind: int = DATA, *, padding: int = 0) -> bytes:
        inner = content + bytes([kind]) + bytes(padding)
        header = struct.pack("!BHH", DATA, 0x0303, len(inner) + 16)
        nonce = (self._iv ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return header + self._key.encrypt(nonce, inner, header)

    def key_update(self, *, answer: bool = False) -> bytes:
        """Return a KeyUpdate (RFC 8446 section 4.6.3) and switch to the new keys."""
        data = self.record(b"\x18\0\0\x01" + bytes([answer]), HANDSHAKE)
        self._secret = self._expand(b"traffic upd", 48)
        self._derive()
        return data


def is_refused(pair: TlsPair, failure: TlsFailure) -> None:
    """Assert that the connection ended with this failure, counted once, and nothing reached the protocol."""
    assert pair.phase is TlsPhase.CLOSING
    assert pair.failures == {failure: 1}
    assert pair.log == [(failure, PEER)]
    assert pair.raw.eof_written
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.acceptor.handshakes_completed == 0
    assert pair.protocol.calls == []
    pair.raw.deliver_eof()
    pair.timers.run()
    assert pair.log == [(failure, PEER), "closed"]
    assert pair.failures == {failure: 1}
    assert pair.protocol.calls == []
    assert pair.phase is TlsPhase.CLOSED
    assert len(pair.acceptor.wheel) == 0
