"""Test a server on a real socket with the `openssl` command and asyncio's TLS as clients."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.tls.support import TIMEOUT, RecordingProtocol, all_gone
from zcproto.common.deadlines import DeadlineWheel
from zcproto.tls.context import SUITES, SiteContexts
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import PLAINTEXT_ANSWER, TlsAcceptor, TlsServerTransport

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command")


class Listening:
    """A server that echoes in upper case and closes at `bye`."""

    def __init__(self, runner: asyncio.Runner, acceptor: TlsAcceptor, port: int, ca_file: Path) -> None:
        self.run = runner.run
        self.acceptor = acceptor
        self.port = port
        self.ca_file = ca_file
        self._changed = asyncio.Event()
        acceptor.on_room = self._changed.set
        acceptor.on_failure = lambda failure, peer: self._changed.set()

    @property
    def failures(self) -> dict[TlsFailure, int]:
        return {failure: count for failure, count in self.acceptor.failures.items() if count}

    def s_client(self, *options: str, text: bytes = b"hello\n", until: bytes = b"HELLO") -> str:
        """Return the output of `openssl s_client`; send it the text, and `bye` once it has printed `until`."""
        return self.run(self._s_client(options, text, until))

    async def _s_client(self, options: tuple[str, ...], text: bytes, until: bytes) -> str:
        arguments = ["s_client", "-connect", f"127.0.0.1:{self.port}", "-CAfile", str(self.ca_file)]
        process = await asyncio.create_subprocess_exec(
            "openssl",
            *arguments,
            *options,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        shown = b""
        try:
            async with asyncio.timeout(TIMEOUT):
                process.stdin.write(text)
                while until not in shown and (part := await process.stdout.read(65_536)):
                    shown += part
                with contextlib.suppress(ConnectionError, RuntimeError):  # already ended
                    process.stdin.write(b"bye\n")
                    await process.stdin.drain()
                shown += await process.stdout.read()
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            process.stdin.close()
        return shown.decode("latin-1")

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Wait until a condition holds after a callback of the acceptor."""
        self.run(self._wait(is_so))

    async def _wait(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture(params=["asyncio", "uvloop"])
def listening(
    request: pytest.FixtureRequest, server_tls: ssl.SSLContext, ca_file: Path
) -> Iterator[Listening]:
    """Run with both event loops: they differ in when they write, pause and report the end."""
    if request.param == "uvloop":
        factory: Callable[[], asyncio.AbstractEventLoop] = pytest.importorskip("uvloop").new_event_loop
    else:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        loop = runner.get_loop()
        wheel = DeadlineWheel(loop)
        protocols = dict.fromkeys(("zcp/1", "http/1.1", None), lambda: RecordingProtocol(data=answer))
        acceptor = TlsAcceptor(SiteContexts(server_tls), protocols, wheel, loop)
        connections: list[TlsServerTransport] = []
        server = runner.run(_listen(acceptor, connections))
        yield Listening(runner, acceptor, server.sockets[0].getsockname()[1], ca_file)
        server.close()
        runner.run(all_gone(connections))
        wheel.close()


async def _listen(acceptor: TlsAcceptor, connections: list[TlsServerTransport]) -> asyncio.Server:
    def accepted() -> TlsServerTransport:
        connections.append(TlsServerTransport(acceptor, "127.0.0.1"))
        return connections[-1]

    return await asyncio.get_running_loop().create_server(accepted, "127.0.0.1", 0)


def answer(protocol: RecordingProtocol, data: bytes) -> None:
    protocol.transport.write(data.upper())
    if data.endswith(b"bye\n"):
        protocol.transport.close()


@pytest.mark.requirement("cipher_suites")
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("algorithms", "key"),
    [("ecdsa_secp256r1_sha256", "ecdsa"), ("rsa_pss_rsae_sha256:rsa_pkcs1_sha256", "rsa_pss")],
)
def test_both_suites_with_both_key_types(listening: Listening, suite: str, algorithms: str, key: str) -> None:
    shown = listening.s_client("-ciphersuites", suite, "-sigalgs", algorithms, "-alpn", "zcp/1")
    assert f"Cipher is {suite}" in shown
    assert f"Peer signature type: {key}" in shown
    assert "ALPN protocol: zcp/1" in shown
    assert "HELLO" in shown
    assert listening.failures == {}


@pytest.mark.requirement("tls_version", "cipher_suites")
@pytest.mark.parametrize(
    ("options", "failure", "words"),
    [
        (["-tls1_2"], TlsFailure.UNSUPPORTED_VERSION, "alert protocol version"),
        (["-ciphersuites", "TLS_AES_128_GCM_SHA256"], TlsFailure.NO_SHARED_SUITE, "alert handshake failure"),
        (
            ["-ciphersuites", "TLS_AES_128_CCM_SHA256:TLS_AES_128_CCM_8_SHA256:TLS_AES_128_GCM_SHA256"],
            TlsFailure.NO_SHARED_SUITE,
            "alert handshake failure",
        ),
        (["-alpn", "h2"], TlsFailure.NO_APPLICATION_PROTOCOL, "alert no application protocol"),
        (
            ["-ciphersuites", "TLS_AES_128_GCM_SHA256", "-alpn", "h2"],
            TlsFailure.NO_SHARED_SUITE,
            "alert handshake failure",
        ),
        (["-sigalgs", "ed25519"], TlsFailure.NO_SHARED_SIGNATURE_ALGORITHM, "alert handshake failure"),
    ],
)
def test_unsupported_client_gets_the_right_alert(
    listening: Listening, options: list[str], failure: TlsFailure, words: str
) -> None:
    shown = listening.s_client(*options)
    listening.wait(lambda: not listening.acceptor.handshakes_in_progress)
    assert words in shown
    assert "HELLO" not in shown
    assert listening.failures == {failure: 1}


def test_hello_retry_request_completes(listening: Listening) -> None:
    shown = listening.s_client("-groups", "brainpoolP256r1tls13:P-256", "-msg")
    assert shown.count(", ClientHello") == 2
    assert "HELLO" in shown


@pytest.mark.requirement("forward_secrecy")
def test_no_tickets_and_no_early_data(listening: Listening) -> None:
    shown = listening.s_client("-msg")
    assert "NewSessionTicket" not in shown
    assert "Early data was not sent" in shown
    assert "HELLO" in shown


def test_close_is_clean_for_openssl_command(listening: Listening) -> None:
    shown = listening.s_client("-msg")
    assert "close_notify" in shown
    assert "unexpected eof" not in shown


@pytest.mark.parametrize(("command", "answers"), [(b"k\n", 0), (b"K\n", 1)])
def test_key_update_by_openssl_command_works(listening: Listening, command: bytes, answers: int) -> None:
    """`k` updates the client's keys, `K` requests an update of the server's too."""
    shown = listening.s_client("-msg", text=command, until=b"KeyUpdate")
    assert shown.count(">>> TLS 1.3, Handshake [length 0005], KeyUpdate") == 1
    assert shown.count("<<< TLS 1.3, Handshake [length 0005], KeyUpdate") == answers
    assert "BYE" in shown
    assert listening.failures == {}


async def raw(port: int, pieces: Iterable[bytes], *, half_close: bool = False) -> bytes:
    """Return the server's answer to these bytes, up to the end of its stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(TIMEOUT):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if half_close:
            writer.write_eof()
        answer = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    ("data", "answer", "failure"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", PLAINTEXT_ANSWER, TlsFailure.PLAINTEXT_HTTP),
        (b"GET / HTTP/1.1\r\n" + b"x" * 500_000, PLAINTEXT_ANSWER, TlsFailure.PLAINTEXT_HTTP),
        (b"\0" * 200_000, b"", TlsFailure.NOT_TLS),
        (b"\x16\3\1\0\5\1\0\0\1\0", b"\x15\3\3\0\2\2\x32", TlsFailure.MALFORMED_CLIENT_HELLO),
    ],
)
def test_response_survives_input_in_flight(
    listening: Listening, data: bytes, answer: bytes, failure: TlsFailure
) -> None:
    """With an immediate close the kernel would reset the connection, and the answer would be lost."""
    assert listening.run(raw(listening.port, [data])) == answer
    assert listening.failures == {failure: 1}


def test_truncated_hello_ends_with_peer_eof(listening: Listening) -> None:
    assert listening.run(raw(listening.port, [b"\x16\3\1\2\0\1"], half_close=True)) == b""
    assert listening.failures == {TlsFailure.DISCONNECTED: 1}


def capitals(port: int, client_tls: ssl.SSLContext, data: bytes) -> bytes:
    """Return the server's answer to a blocking client that writes everything before it reads."""
    step = 262_144
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as tcp,
        client_tls.wrap_socket(tcp, server_hostname="localhost", suppress_ragged_eofs=False) as tls,
    ):
        for at in range(0, len(data), step):
            tls.sendall(data[at : at + step])
            while len(answer) < min(at + step, len(data)):
                answer += tls.recv(65_536)
        while part := tls.recv(65_536):
            answer += part
    return answer


def test_megabyte_each_way_with_blocking_client(listening: Listening, client_tls: ssl.SSLContext) -> None:
    data = b"abcdefgh" * 131_072 + b"bye\n"
    answer = listening.run(asyncio.to_thread(capitals, listening.port, client_tls, data))
    assert answer == data.upper()
    assert listening.failures == {}


async def reset(port: int, client_tls: ssl.SSLContext) -> None:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=client_tls, server_hostname="localhost"
    )
    writer.write(b"hello")
    assert await reader.read(5) == b"HELLO"
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def test_reset_is_counted_as_connection_reset(listening: Listening, client_tls: ssl.SSLContext) -> None:
    listening.run(reset(listening.port, client_tls))
    listening.wait(lambda: bool(listening.failures))
    assert listening.failures == {TlsFailure.CONNECTION_RESET: 1}
