"""Conversations with the real server: `zcproto serve` as a process, with a home folder of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto_conformance.check import SERVER, Scenarios
from zcproto_conformance.errors import CheckFailed, KitError, expect
from zcproto_conformance.program import Refused
from zcproto_conformance.stage import Client, Stage

scenario: Final = Scenarios(SERVER)

USER: Final = "ada"
CANCELLED: Final = 1
INVALID_ARGUMENT: Final = 3
DEADLINE_EXCEEDED: Final = 4
NOT_FOUND: Final = 5
RESOURCE_EXHAUSTED: Final = 8
UNIMPLEMENTED: Final = 12
UNAUTHENTICATED: Final = 16
TOKEN_REVOKED: Final = 69
SESSION_REPLACED: Final = 70
POLL: Final = 0.1
_USUAL: Final = {
    "ZCPROTO_CERTIFICATES__KEY_TYPES": "ecdsa-p256",
    "ZCPROTO_SESSIONS__PER_USER": "100",
    "ZCPROTO_LIMITS__LOGIN_FAILURES": "100",
    "ZCPROTO_LOG__LEVEL": "error",
}


class RealServer:
    """One server. `settings` are those of the configuration, as environment variables."""

    def __init__(self, stage: Stage, settings: dict[str, str]) -> None:
        self.home = stage.fixtures.folder / f"server-{next(stage.fixtures.numbers)}"
        self.home.mkdir(mode=0o700)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ZCPROTO_")}
        self._environment = {**inherited, **_USUAL, **settings}
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.key = ""

    async def command(self, *arguments: str) -> str:
        """What a command of `zcproto` prints."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "zcproto", *arguments, "--home", str(self.home)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        said, complaint = await process.communicate()
        if process.returncode:
            raise KitError(f"zcproto {' '.join(arguments)}: {complaint.decode(errors='replace').strip()}")
        return said.decode()

    async def start(self) -> None:
        """Start it, or start it again on the same port."""
        if not self.key:
            self.key = (await self.command("user", "add", USER)).strip()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "zcproto", "--home", str(self.home), "serve"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=self._environment,
        )
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode()
        if not line.startswith("zcproto: listening on "):
            await self.stop()
            raise KitError(f"zcproto serve did not start: {line.strip()!r}")
        self.port = int(line.rpartition(":")[2])

    def drain(self) -> None:
        """Begin to end it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    async def wait(self) -> None:
        assert self._process is not None
        await self._process.wait()
        self._process = None

    async def stop(self) -> None:
        """End it at once, if it runs."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self.wait()

    @property
    def options(self) -> dict[str, Any]:
        """How a client gets there."""
        ca_file = str(self.home / "certs" / "ca.crt")
        return {"address": f"127.0.0.1:{self.port}", "server_name": "localhost", "ca_file": ca_file}

    async def connect(self, stage: Stage, **options: Any) -> Client:
        """A client that is connected, with a session unless options say otherwise."""
        stage.program.secrets.add(self.key)
        usual = {**self.options, "user": USER, "key": self.key}
        client, connected = await stage.connecting(**{**usual, **options})
        await stage.answer(connected, "connect")
        return client


async def _server(stage: Stage, **settings: str) -> RealServer:
    """A server with its own settings, or the one that all share that have none."""
    if not settings:
        shared = stage.fixtures.shared.get("server")
        if isinstance(shared, RealServer):
            return shared
    server = RealServer(stage, {f"ZCPROTO_{name}": value for name, value in settings.items()})
    stage.fixtures.at_end.append(server.stop)
    await server.start()
    if not settings:
        stage.fixtures.shared["server"] = server
    return server


async def _works(client: Client) -> None:
    call = await client.call("echo", {"alive": True})
    await call.gives({"alive": True})


@scenario("echo", "9.3: a session by a key, and params of all types there and back")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    params = {
        "int": 2**64 - 1,
        "least": -(2**63),
        "bin": bytes(256),
        "str": "\u00e4\0",
        "deep": [{"a": [None, 0.5]}],
    }
    await (await client.call("echo", params)).gives(params)


@scenario("many-at-once", "6.3: a hundred calls on one connection, answered in any order")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    slow = await client.call("sleep", {"ms": 300})
    calls = await client.calls("echo", 99)
    for number, call in enumerate(calls):
        await call.gives({"n": number})
    await slow.gives({})


@scenario("large-params", "5.3: frames of nearly a megabyte both ways")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    params = {"blob": bytes(900_000)}
    await (await client.call("echo", params)).gives(params)


@scenario("public-methods", "9.2: without a session server.info is answered, and all else is UNAUTHENTICATED")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage, user=None, key=None)
    info = await (await client.call("server.info")).result()
    expect(isinstance(info, dict) and 1 in info.get("versions", ()), f"server.info gave {info}")
    await (await client.call("echo", {})).refused(UNAUTHENTICATED)


@scenario("errors", "10.1: codes of the real server reach the application")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    await (await client.call("no.such.method")).refused(UNIMPLEMENTED)
    await (await client.call("sleep", {"ms": "long"})).refused(INVALID_ARGUMENT)
    await (await client.call("sleep", {"ms": 1, "more": 2})).refused(INVALID_ARGUMENT)
    await (await client.call("session.revoke", {"id": "s-unknown"})).refused(NOT_FOUND)
    await _works(client)


@scenario("wrong-key", "9.4: a wrong key is UNAUTHENTICATED")
async def _(stage: Stage) -> None:
    server = await _server(stage)
    options = {**server.options, "user": USER, "key": "not-this-key"}
    _, connected = await stage.connecting(**options)
    error = await stage.refusal(connected, "connect", "call")
    expect(error.get("code") == UNAUTHENTICATED, f"connect ended with {error}")


@scenario("deadline", "6.3: a call whose time is over is DEADLINE_EXCEEDED, and disturbs no other")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    call = await client.call("sleep", {"ms": 600_000}, timeout_ms=300)
    await call.refused(DEADLINE_EXCEEDED)
    await _works(client)


@scenario("cancel", "6.5: a call that is given up disturbs no other")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    call, beside = await client.call("sleep", {"ms": 600_000}), await client.call("sleep", {"ms": 100})
    await call.cancel()
    await call.refused(CANCELLED)
    await beside.gives({})
    await _works(client)


@scenario("idempotency", "16.1: a call that is repeated with its key has the same answer")
async def _(stage: Stage) -> None:
    client = await (await _server(stage)).connect(stage)
    first = await (await client.call("time", idempotency_key="once")).result()
    await stage.pause(POLL / 10)
    await (await client.call("time", idempotency_key="once")).gives(first)


@scenario("revoked-by-another", "9.3, 9.7: a revoked session is told by an event, and refused from then on")
async def _(stage: Stage) -> None:
    server = await _server(stage)
    client, other = await server.connect(stage), await server.connect(stage)
    session = await client.session()
    assert session is not None
    await (await other.call("session.revoke", {"id": session["id"]})).gives({"revoked": 1})
    name, _ = await client.event()
    expect(name == "session.revoked", f"the application was told {name}")
    await (await client.call("echo", {})).refused(TOKEN_REVOKED)
    await stage.answer(await client.open_session(), "open_session")
    await _works(client)


@scenario("refresh", "9.6: a session outlives its token by refreshes")
async def _(stage: Stage) -> None:
    server = await _server(stage, SESSIONS__LIFETIME="2s")
    client = await server.connect(stage)
    begun = await client.session()
    assert begun is not None
    async with asyncio.timeout(stage.patience * 5):
        for _ in range(2):  # the refresh token that came with a refresh works, too
            session = await client.session()
            while session is None or session["expires_at"] <= begun["expires_at"]:
                await _works(client)
                await stage.pause(POLL)
                session = await client.session()
            expect(session["id"] == begun["id"], f"the session is another one: {session}")
            begun = session


@scenario("too-many-sessions", "9.8: the cap on sessions is told at once")
async def _(stage: Stage) -> None:
    server = await _server(stage, SESSIONS__PER_USER="1")
    await server.connect(stage)
    try:
        await server.connect(stage)
    except Refused as refused:
        expect(refused.error.get("code") == RESOURCE_EXHAUSTED, f"connect ended with {refused}")
        return
    raise CheckFailed("a second session was opened, and the cap is 1")


@scenario(
    "replaced-session", "9.8: the session that made room is SESSION_REPLACED, and its client stays away"
)
async def _(stage: Stage) -> None:
    server = await _server(stage, SESSIONS__PER_USER="1", SESSIONS__WHEN_FULL="evict_oldest")
    client = await server.connect(stage)
    other = await server.connect(stage)
    await (await client.call("echo", {})).refused(SESSION_REPLACED)
    await (await client.call("echo", {})).refused(SESSION_REPLACED)
    await _works(other)


@scenario("device", "9.4, 9.5: a device is enrolled, opens a session, and attaches it to another connection")
async def _(stage: Stage) -> None:
    server = await _server(stage)
    code = (await server.command("pair", "--user", USER)).split()
    seed = stage.fixtures.entropy(32)
    stage.program.secrets.add(seed.hex())
    public_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    stranger = await server.connect(stage, user=None, key=None)
    params = {"code": _code_in(code), "public_key": public_key, "name": "laptop"}
    await (await stranger.call("device.enroll", params)).gives({"user": USER, "device": "laptop"})
    client = await server.connect(stage, user=None, key=None, device="laptop", device_key=seed.hex())
    await _works(client)
    await client.cut()
    await _works(client)


def _code_in(words: list[str]) -> str:
    for word in words:
        if len(word) == 9 and word[4] == "-":
            return word
    raise KitError("zcproto pair printed no code")


@scenario("drain-and-restart", "6.7, 9.1: what runs is finished; after a restart the same session goes on")
async def _(stage: Stage) -> None:
    server = await _server(stage, SERVER__DRAIN_TIMEOUT="20s")
    client = await server.connect(stage)
    before = await client.session()
    running = await client.call("sleep", {"ms": 500})
    await _works(client)
    server.drain()
    await running.gives({})
    await server.wait()
    call = await client.call("echo", {"n": 1}, timeout_ms=round(stage.patience * 3000))
    await server.start()
    await call.gives({"n": 1})
    expect(await client.session() == before, "the session is another one after the restart")
    await server.stop()


@scenario(
    "killed", "11.1, 11.2: a server that is killed and started again is found again, with the same session"
)
async def _(stage: Stage) -> None:
    server = await _server(stage, SERVER__DRAIN_TIMEOUT="1s")
    client = await server.connect(stage)
    before = await client.session()
    running = await client.call("sleep", {"ms": 600_000})
    await _works(client)
    await server.stop()
    await running.lost(clean=False)
    await server.start()
    call = await client.call("echo", {"n": 1}, timeout_ms=round(stage.patience * 3000))
    await call.gives({"n": 1})
    expect(await client.session() == before, "the session is another one after the server was killed")
    await server.stop()
