"""What a request costs step by step, beside the same steps of the bare server: the budget of the hot path.

    python -m bench.micro.hot_path [--requests 20000] [--json FILE]

Each step is timed alone with what the one before it gives, in rounds; the figure is the least of all rounds, for
what else the machine does can only add to it. `between them` is what is left of the whole: events, counting, the
pump. All is warm and in memory. What `bench.compare` shows beyond this is the kernel's, the event loop's, and what
is cold.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import uvloop

from bench.micro.metrics_cost import BODY, SALT, Peer, state_on
from bench.micro.token_check import NS_PER_US
from zcproto.certs import ensure_own_certificates
from zcproto.common.clock import system_clock
from zcproto.server.protocol import ServerProtocol
from zcproto.tls.context import client_context, server_context
from zcproto.wire.frame import HEADER_SIZE, REQUEST, encode_frame
from zcproto.wire.message import decode_request, encode_body

ROUND: Final = 500
RECORD: Final = 16_384
TOKEN: Final = b"k" * 32
MAX_DEPTH: Final = 32
CERTIFICATE_DAYS: Final = 1

BARE: Final = Path(__file__).parent.parent / "compare" / "bare_server.py"


class Step(NamedTuple):
    """Microseconds of one step; None where there is none."""

    name: str
    ours: float | None
    bare: float | None


class Tls:
    """A TLS connection between two objects in memory."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        self.to_server, self.to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(self.to_server, self.to_client, server_side=True)
        self.client = client.wrap_bio(self.to_client, self.to_server, server_hostname="localhost")
        for side in (self.client, self.server, self.client, self.server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue

    def record(self, data: bytes) -> bytes:
        """What the client sends for these bytes."""
        self.client.write(data)
        return self.to_server.read()


def least(requests: int, prepare: Callable[[], list[Any]], act: Callable[[list[Any]], object]) -> float:
    """Microseconds of one of what `prepare` makes ROUND of, and `act` takes."""
    best = float("inf")
    for _ in range(max(1, requests // ROUND)):
        prepared = prepare()
        begin = time.perf_counter_ns()
        act(prepared)
        best = min(best, (time.perf_counter_ns() - begin) / len(prepared) / NS_PER_US)
    return best


async def our_steps(requests: int, tls: Tls) -> dict[str, float]:
    """Of zcproto: the whole without TLS, and each step."""
    state = state_on(asyncio.get_running_loop())
    peer = Peer(state, ServerProtocol, "ada")
    connection, method = peer.protocol._connection, state.methods["echo"]
    assert connection is not None
    wall, now = system_clock.wall(), system_clock.now()
    peer.protocol.data_received(peer.request())  # the first looks its session up
    params = decode_request(BODY)[1]

    def frames() -> list[bytes]:
        return [peer.request() for _ in range(ROUND)]

    def whole(some: list[bytes]) -> None:
        for data in some:
            peer.protocol.data_received(data)

    def received(some: list[bytes]) -> None:
        for data in some:
            for _ in connection.receive_data(data, wall, now):
                pass

    def answered(some: list[bytes]) -> None:
        for body in some:
            connection.respond_at_once(1, peer.token, body, wall)
            connection.data_to_send()

    found = {"whole": least(requests, frames, whole)}
    assert peer.transport.last.endswith(encode_body(params)), "an echo is missing"
    body = least(
        requests, lambda: [BODY] * ROUND, lambda some: [decode_request(each, MAX_DEPTH) for each in some]
    )
    return found | {
        "frame": least(requests, frames, received) - body,
        "body": body,
        "method": least(
            requests, lambda: [params] * ROUND, lambda some: [method.function(**each) for each in some]
        ),
        "result": least(
            requests, lambda: [params] * ROUND, lambda some: [encode_body(each) for each in some]
        ),
        "answer": least(requests, lambda: [encode_body(params)] * ROUND, answered),
        **tls_steps(requests, tls, peer.request(), peer.transport.last),
    }


def tls_steps(requests: int, tls: Tls, request: bytes, answer: bytes) -> dict[str, float]:
    """Of both servers: a record in, and one out."""

    def opened(some: list[bytes]) -> None:
        for record in some:
            tls.to_server.write(record)
            tls.server.read(RECORD)

    def sealed(some: list[bytes]) -> None:
        for data in some:
            tls.server.write(data)
            tls.to_client.read()

    return {
        "tls_in": least(requests, lambda: [tls.record(request) for _ in range(ROUND)], opened),
        "tls_out": least(requests, lambda: [answer] * ROUND, sealed),
    }


def bare_steps(requests: int, module: Any) -> dict[str, float]:
    """Of the bare server, likewise."""
    bare = module.Bare()
    bare.salt, bare.last, bare.counter, bare.known, bare.rest = SALT, 0, 0, None, b""
    sent = 0
    wall = system_clock.wall()

    def frames() -> list[bytes]:
        nonlocal sent
        sent += ROUND
        first = sent - ROUND + 1
        return [
            encode_frame(REQUEST, 1, system_clock.wall(), SALT, first + n, TOKEN, BODY) for n in range(ROUND)
        ]

    def whole(some: list[bytes]) -> None:
        for data in some:
            bare.answer(data)

    def judged(some: list[bytes]) -> None:
        last = 0
        for data in some:
            length, version, kind, flags, stream, stamp, salt, counter, token = module.HEADER.unpack_from(
                data, 0
            )
            fresh = salt == bare.salt and counter > last and -30_000 < wall - stamp < 30_000
            if (
                version != 1
                or kind != module.REQUEST
                or flags
                or not fresh
                or token != bare.known
                or not stream
            ):
                raise AssertionError("a good frame is refused")
            if length + 4 > len(data):
                raise AssertionError("a whole frame is not whole")

    found = {"whole": least(requests, frames, whole)}
    packed = msgpack.packb(msgpack.unpackb(BODY)[1])
    params = msgpack.unpackb(packed)
    return found | {
        "frame": least(requests, frames, judged),
        "body": least(
            requests, frames, lambda some: [msgpack.unpackb(each[HEADER_SIZE:])[:2] for each in some]
        ),
        "result": least(
            requests, lambda: [params] * ROUND, lambda some: [msgpack.packb(each) for each in some]
        ),
        "answer": least(
            requests,
            lambda: [packed] * ROUND,
            lambda some: [bare.frame(3, 1, TOKEN, each, wall) for each in some],
        ),
    }


NAMES: Final = {
    "frame": "header, freshness, session",
    "body": "body decoded and checked",
    "method": "the method",
    "result": "result encoded",
    "answer": "frame of the answer",
}


def steps(ours: dict[str, float], bare: dict[str, float]) -> list[Step]:
    """The table: TLS is the same for both."""
    rows = [Step("TLS record in", ours["tls_in"], ours["tls_in"])]
    rows += [Step(name, ours.get(key), bare.get(key)) for key, name in NAMES.items()]
    rest = [side["whole"] - sum(side.get(key, 0.0) for key in NAMES) for side in (ours, bare)]
    rows.append(Step("between them", *rest))
    rows.append(Step("TLS record out", ours["tls_out"], ours["tls_out"]))
    around = ours["tls_in"] + ours["tls_out"]
    return [*rows, Step("in all", ours["whole"] + around, bare["whole"] + around)]


@contextmanager
def bare_server(pem: Path) -> Iterator[Any]:
    """The module of the bare server, which takes its certificate from the command line."""
    spec = importlib.util.spec_from_file_location("bare_server", BARE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.argv = sys.argv, [str(BARE), "0", str(pem)]
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.argv = before


def measure(folder: Path, requests: int) -> list[Step]:
    """All steps, in this folder."""
    day = timedelta(days=CERTIFICATE_DAYS)
    ensure_own_certificates(
        folder,
        names=(),
        key_types=("ecdsa-p256",),
        lifetime=day,
        renew_before=day / 3,
        renew_key=False,
        now=datetime.now(UTC),
    )
    pair = folder / "server-ecdsa.crt", folder / "server-ecdsa.key"
    tls = Tls(
        server_context([pair], ["zcp/1"]), client_context(ca_file=folder / "ca.crt", protocols=("zcp/1",))
    )
    pem = folder / "both.pem"
    with open(os.open(pem, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as both:
        both.writelines(each.read_bytes() for each in pair)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, bare_server(pem) as module:
        return steps(runner.run(our_steps(requests, tls)), bare_steps(requests, module))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.hot_path", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--requests", type=int, default=20_000, help="for each step")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.requests < 1:
        parser.error("at least one request is needed")
    with tempfile.TemporaryDirectory(prefix="zcproto-path-") as folder:
        rows = measure(Path(folder) / "certs", options.requests)
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'zcproto':>10}  {'bare':>10}")
    for row in rows:
        cells = ["" if each is None else f"{each:.2f} us" for each in (row.ours, row.bare)]
        print(f"{row.name:{width}}  {cells[0]:>10}  {cells[1]:>10}".rstrip())
    if options.json:
        options.json.write_text(
            json.dumps([row._asdict() for row in rows], indent=2) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
