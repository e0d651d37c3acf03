"""Clients of hostile servers: what can a server cost a client that does nothing?

For each kind of attack a server and two clients, those for Python and for Node, each in a process of its own. A
client opens a session and then waits. The server sends as much as the client reads:

\b
pings          PINGs, and reads nothing
events         small events, which the application does not read
large events   events of half a MiB
notices        session.expiring and session.revoked, of the session
answers        answers to no request
sessions       every session has expired when it is opened or refreshed
reconnects     GOAWAY as soon as the client has a session, and an end

Growth is of the client's memory, from the warm-up to the end; the processor's time is a share of one core.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import shutil
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import click

from bench.command import SECONDS, measurement, progress
from bench.report import Report, Row
from bench.scenarios.storms import MIB
from bench.stage import ECDSA_ONLY, Stage, cpu_seconds, memory_bytes
from zcproto.common.clock import system_clock
from zcproto.common.process import new_event_loop
from zcproto.errors import ConfigError
from zcproto.load.demo import temporary_home
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    EVENT,
    GOAWAY,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    WELCOME,
    Side,
    encode_frame,
)
from zcproto.wire.message import decode_request, encode_body

MAX_GROWTH_MIB: Final = 8.0
MAX_CPU_PERCENT: Final = 20.0
WARM_UP: Final = 0.25
"""Share of the time after which growth counts: a runtime's heap has its size by then."""

CHUNK: Final = 600
"""Frames that are written at once."""

DAY_MS: Final = 86_400_000
KINDS: Final = ("pings", "events", "large events", "notices", "answers", "sessions", "reconnects")
PACKAGE: Final = Path(__file__).parents[2] / "clients" / "typescript" / "dist" / "src" / "index.js"

PYTHON: Final = """
import asyncio, sys, zcproto
async def main():
    address, ca_file, home = sys.argv[1:]
    await zcproto.connect(address, ca_file=ca_file, home=home, user="ada", key="key", timeout=None)
    await asyncio.Event().wait()
asyncio.run(main())
"""
NODE_OPTIONS: Final = ("--input-type=module", "--max-semi-space-size=1")
"""V8 lets the heap of young objects grow to 48 MiB, used or not; with 1 MiB, growth is of what stays in use."""

NODE: Final = """
const [index, address, caFile, home] = process.argv.slice(1);
const { connect } = await import(index);
await connect(address, { caFile, home, user: "ada", key: "key", timeoutMs: Infinity });
setInterval(() => undefined, 1e6);
"""


class HostileConnection(asyncio.Protocol):
    """One connection of a client to a server that makes one kind of attack."""

    def __init__(self, kind: str, counts: Counter[str]) -> None:
        self._kind = kind
        self._counts = counts
        self._counter = itertools.count()
        self._salt = secrets.token_bytes(8)
        self._decoder = FrameDecoder(Side.SERVER, 2**32 - 1)
        self._token = NO_TOKEN
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._flood: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._counts["connections"] += 1
        welcome = {
            "server": "hostile", "versions": [1], "max_frame": 1_048_576, "max_streams": 128,
            "idle_timeout_ms": 300_000, "tolerance_ms": 30_000,
            "sts": {"max_age": 0, "include_subdomains": False},
        }  # fmt: skip
        self._transport.write(self._frame(WELCOME, 0, encode_body(welcome)))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._flood is not None:
            self._flood.cancel()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        self._decoder.feed(data)
        while (frame := self._decoder.next_frame()) is not None:
            if frame[1] == REQUEST:
                self._counts["requests"] += 1
                self._respond(frame[2], decode_request(frame[7])[0])
            elif frame[1] == PONG and self._flood is None:
                self._flood = asyncio.create_task(self._send_flood())

    def _respond(self, stream: int, method: str) -> None:
        result: Any = {}
        if method in ("session.open", "session.refresh"):
            self._token = secrets.token_bytes(32)
            result = {
                "token": self._token, "id": "s-1", "user": "ada",
                "expires_at": system_clock.wall() + (-DAY_MS if self._kind == "sessions" else DAY_MS),
                "idle_timeout_ms": 0, "refresh_token": secrets.token_bytes(32),
                "refresh_expires_at": None, "bound": False,
            }  # fmt: skip
        self._transport.write(self._frame(RESPONSE, stream, encode_body(result)))
        if self._kind == "reconnects":
            goaway = encode_body({"reason": "draining", "retry_after_ms": 0})
            self._transport.write(self._frame(GOAWAY, 0, goaway))
            self._transport.close()
        elif self._kind != "sessions" and self._flood is None:
            # A session that is revoked together with the answer that opens it would end the client's `connect`.
            self._transport.write(self._frame(PING))

    async def _send_flood(self) -> None:
        if self._kind == "pings":
            self._transport.pause_reading()
        while True:
            frames = [frame for frame, _ in zip(self._frames(), range(CHUNK), strict=False)]
            self._counts["frames"] += len(frames)
            self._transport.write(b"".join(frames))
            await self._may_write.wait()
            await asyncio.sleep(0)

    def _frames(self) -> Iterator[bytes]:
        """Yield one chunk of the attack."""
        if self._kind == "large events":
            yield self._frame(EVENT, 0, encode_body(["large", bytes(MIB // 2)]))
            return
        while True:
            if self._kind == "pings":
                yield self._frame(PING)
            elif self._kind == "answers":
                yield self._frame(RESPONSE, 2**31, b"\xc0")
            elif self._kind == "events":
                yield self._frame(EVENT, 0, encode_body(["small", {"n": 1}]))
            else:
                for name in ("session.expiring", "session.revoked"):
                    yield self._frame(EVENT, 0, encode_body([name, {}]), self._token)

    def _frame(self, head: int, stream: int = 0, body: bytes = b"", token: bytes = NO_TOKEN) -> bytes:
        return encode_frame(head, stream, system_clock.wall(), self._salt, next(self._counter), token, body)


class Usage(NamedTuple):
    """The memory and the processor time of a process at one moment."""

    at: float
    rss_mib: float
    cpu_s: float

    @classmethod
    def of(cls, pid: int) -> Usage:
        return cls(time.monotonic(), memory_bytes(pid)[0] / MIB, cpu_seconds(pid))


@dataclass(slots=True)
class Outcome:
    """What one kind of attack did to one client."""

    before: Usage
    after: Usage
    counts: Counter[str] = field(default_factory=Counter)
    ended: bool = False
    """Whether the client's process ended."""

    def rows(self) -> list[Row]:
        seconds = self.after.at - self.before.at
        growth = self.after.rss_mib - self.before.rss_mib
        cpu = 0.0 if self.ended else (self.after.cpu_s - self.before.cpu_s) / seconds * 100
        return [
            Row("growth_mib", "growth of memory", growth, "MiB", below=MAX_GROWTH_MIB),
            Row("cpu_percent", "processor", cpu, "%", below=MAX_CPU_PERCENT),
            Row("memory_mib", "memory at the end", self.after.rss_mib, "MiB"),
            Row("frames", "frames sent by the server", self.counts["frames"]),
            Row("requests", "requests of the client", self.counts["requests"]),
            Row("connections", "connections of the client", self.counts["connections"]),
            Row("ended", "clients that ended", int(self.ended), equals=0),
        ]  # fmt: skip


@contextlib.asynccontextmanager
async def _process(command: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def attack(stage: Stage, kind: str, client: str, seconds: float) -> Outcome:
    """Let a server attack a client for so long."""
    counts = Counter[str]()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.set_alpn_protocols(["zcp/1"])
    certs = stage.home.certs
    context.load_cert_chain(certs / "server-ecdsa.crt", certs / "server-ecdsa.key")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HostileConnection(kind, counts), "127.0.0.1", 0, ssl=context)
    home = stage.home.path / f"{client}-{kind}".replace(" ", "-")
    where = f"localhost:{server.sockets[0].getsockname()[1]}", str(stage.ca_file), str(home)
    commands = {
        "python": [sys.executable, "-c", PYTHON, *where],
        "node": [shutil.which("node") or "node", *NODE_OPTIONS, "-e", NODE, PACKAGE.as_uri(), *where],
    }
    try:
        async with _process(commands[client]) as process:
            await asyncio.sleep(seconds * WARM_UP)
            before = Usage.of(process.pid)
            outcome = Outcome(before, before, counts)
            await asyncio.sleep(seconds * (1 - WARM_UP))
            outcome.ended = process.returncode is not None
            if not outcome.ended:
                outcome.after = Usage.of(process.pid)
    finally:
        server.close()
    return outcome


def report(found: Mapping[str, Outcome]) -> Report:
    return Report({name: outcome.rows() for name, outcome in found.items()})


@measurement
@click.option("--seconds", type=SECONDS, default=60.0, show_default=True, help="Of each kind of attack.")
@click.option("--only", type=click.Choice(KINDS), help="One of them alone.")
@click.option("--client", type=click.Choice(["python", "node"]), help="One client alone.")
def command(seconds: float, only: str | None, client: str | None) -> Report:
    clients = [client] if client else ["python", "node"]
    if "node" in clients and not (PACKAGE.exists() and shutil.which("node")):
        raise ConfigError(["the client for Node is not built; run npm ci --prefix clients/typescript"])
    if not os.path.exists("/proc/self/status"):
        raise ConfigError(["hostile servers need Linux: memory is read from /proc"])
    found = dict[str, Outcome]()
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        stage = Stage(home.path, ECDSA_ONLY)
        stage.make_certificates()
        for kind in KINDS if only is None else (only,):
            for name in clients:
                progress(f"{kind}, against the client for {name} ...")
                found[f"{kind}, {name}"] = runner.run(attack(stage, kind, name, seconds))
    return report(found)
