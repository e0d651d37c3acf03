"""Collectors that answer with what no collector should: endless bodies, redirects, compressed bombs."""

from __future__ import annotations

import gzip
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.limits import TIMEOUT
from tests.telemetry.helpers import patient_config
from zcproto.common.clock import system_clock, system_entropy
from zcproto.telemetry.export import MAX_ANSWER, CollectorSession, Telemetry

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server_with(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Run a server that answers every POST so; yield its address, and the paths and connections it gets."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            seen.append("connection")
            super().handle()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.path)
            answer(self)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer_with(status: int, body: bytes, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def answer_without_end(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
    except OSError:
        handler.close_connection = True


async def counts_of(address: str) -> tuple[int, int]:
    """Send a span; return how many were sent, and how many failed."""
    telemetry = Telemetry(patient_config(address), system_clock, system_entropy)
    assert telemetry.tracer_provider is not None
    telemetry.tracer_provider.get_tracer("test").start_span("one").end()
    await telemetry.stop()
    counts = {result: count for _, result, count in telemetry.counts()}
    return counts["sent"], counts["failed"]


async def test_answer_without_end_fails_the_batch() -> None:
    with server_with(answer_without_end) as (address, _):
        assert await counts_of(address) == (0, 1)


async def test_answer_above_the_limit_fails_the_batch() -> None:
    with server_with(answer_with(200, bytes(MAX_ANSWER + 1))) as (address, _):
        assert await counts_of(address) == (0, 1)


async def test_redirect_fails_the_batch_and_is_not_followed() -> None:
    with server_with(answer_with(200, b"")) as (other, at_other):
        for status in (301, 302, 307, 308):
            with server_with(answer_with(status, b"", Location=f"{other}/v1/traces")) as (address, _):
                assert await counts_of(address) == (0, 1)
        assert not at_other


async def test_compressed_answer_is_not_decompressed() -> None:
    bomb = gzip.compress(bytes(1 << 24))
    assert len(bomb) < MAX_ANSWER
    with server_with(answer_with(200, bomb, Content_Encoding="gzip")) as (address, _):
        assert await counts_of(address) == (1, 0)


def test_connection_is_used_again() -> None:
    with server_with(answer_with(200, b"x" * 1000)) as (address, seen), CollectorSession() as session:
        for _ in range(3):
            assert session.post(address, b"data", timeout=TIMEOUT).status_code == 200
        assert seen == ["connection", "/", "/", "/"]


def test_answer_that_takes_longer_than_a_request_may_is_an_error() -> None:
    moments = itertools.count(step=2 * TIMEOUT)
    with (
        server_with(answer_with(200, b"x" * 20_000)) as (address, _),
        CollectorSession(lambda: next(moments)) as session,
        pytest.raises(OSError, match="takes too long"),
    ):
        session.post(address, b"data", timeout=TIMEOUT)
