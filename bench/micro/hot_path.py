"""The steps of a request, beside the same steps of the bare server: the budget of the hot path.

Each step is timed alone with the output of the one before it, in rounds; the figure is the least of all rounds,
as disturbances of the machine can only add to it. `between them` is the rest of the whole: events, counting,
the pump. All is warm and in memory. What `python -m bench compare` shows beyond this is the kernel's, the event
loop's, and what is cold.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import msgpack
import uvloop

from bench.command import COUNT, measurement
from bench.micro.metrics_cost import BODY, SALT, Peer, state_on
from bench.micro.timing import NS_PER
from bench.report import Report, Row
from bench.stage import ECDSA_ONLY, Stage
from zcproto.common.clock import system_clock
from zcproto.load.demo import temporary_home
from zcproto.server.protocol import ServerProtocol
from zcproto.tls.context import client_context, server_context
from zcproto.wire.frame import HEADER_SIZE, REQUEST, RESPONSE, encode_frame
from zcproto.wire.message import decode_request, encode_body

ROUND: Final = 500
RECORD: Final = 16_384
TOKEN: Final = b"k" * 32
MAX_DEPTH: Final = 32

MAX_RATIO: Final = 1.4
"""What a request may cost in memory, beside the bare server's."""

BARE: Final = Path(__file__).parent.parent / "compare" / "bare_server.py"


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
        """Return what the client sends for these bytes."""
        self.client.write(data)
        return self.to_server.read()


def least(requests: int, prepare: Callable[[], list[Any]], act: Callable[[list[Any]], object]) -> float:
    """Return the microseconds of one item: `prepare` makes ROUND of them, `act` handles all."""
    best = float("inf")
    for _ in range(max(1, requests // ROUND)):
        prepared = prepare()
        begin = time.perf_counter_ns()
        act(prepared)
        best = min(best, (time.perf_counter_ns() - begin) / len(prepared) / NS_PER["us"])
    return best


async def zcproto_steps(requests: int, tls: Tls) -> dict[str, float]:
    """Time zcproto: the whole without TLS, and each step."""
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
            connection.outbox.send(RESPONSE, 1, peer.token, body, wall)
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
    """Time TLS, which is the same for both servers: a record in, and one out."""

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
    """Time the bare server, likewise."""
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


def report(own: dict[str, float], bare: dict[str, float]) -> Report:
    """Return both budgets, in microseconds. TLS is the same for both."""
    tls = {name: own[name] for name in ("tls_in", "tls_out")}
    columns = {"zcproto": budget(own), "bare": budget({**bare, **tls})}
    whole, least = (rows[-1].value or 0.0 for rows in columns.values())
    columns["zcproto"].append(Row("ratio", "beside the bare server", whole / least, below=MAX_RATIO))
    return Report(columns)


def budget(side: dict[str, float]) -> list[Row]:
    between = side["whole"] - sum(side.get(key, 0.0) for key in NAMES)
    return [
        Row("tls_in", "TLS record in", side["tls_in"], "us"),
        *(Row(key, name, side.get(key), "us") for key, name in NAMES.items()),
        Row("between", "between them", between, "us"),
        Row("tls_out", "TLS record out", side["tls_out"], "us"),
        Row("whole", "in all", side["whole"] + side["tls_in"] + side["tls_out"], "us"),
    ]


@contextmanager
def bare_server(pem: Path) -> Iterator[Any]:
    """Import the bare server, which reads its certificate from the command line."""
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


def measure(folder: Path, requests: int) -> Report:
    """Time all steps, with certificates in this folder."""
    stage = Stage(folder, ECDSA_ONLY)
    stage.make_certificates()
    certs = stage.home.certs
    pair = certs / "server-ecdsa.crt", certs / "server-ecdsa.key"
    client = client_context(ca_file=stage.ca_file, protocols=("zcp/1",))
    tls = Tls(server_context([pair], ["zcp/1"]), client)
    pem = folder / "both.pem"
    with open(os.open(pem, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as both:
        both.writelines(each.read_bytes() for each in pair)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, bare_server(pem) as module:
        return report(runner.run(zcproto_steps(requests, tls)), bare_steps(requests, module))


@measurement
@click.option("--requests", type=COUNT, default=20_000, show_default=True, help="For each step.")
def command(requests: int) -> Report:
    with temporary_home() as home:
        return measure(home.path, requests)
