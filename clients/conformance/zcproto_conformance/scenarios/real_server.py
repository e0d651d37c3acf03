"""Scenarios with the real server: `zcproto serve` as a process, with a home folder of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto_conformance.check import SERVER, Scenarios
from zcproto_conformance.codes import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    SESSION_REPLACED,
    TOKEN_REVOKED,
    UNAUTHENTICATED,
    UNIMPLEMENTED,
)
from zcproto_conformance.errors import CheckFailed, KitError, expect
from zcproto_conformance.harness import Client, Harness
from zcproto_conformance.program import StepFailed

scenario: Final = Scenarios(SERVER)

USER: Final = "ada"
POLL: Final = 0.1
_SETTINGS: Final = {
    "ZCPROTO_CERTIFICATES__KEY_TYPES": "ecdsa-p256",
    "ZCPROTO_SESSIONS__PER_USER": "100",
    "ZCPROTO_LIMITS__LOGIN_FAILURES": "100",
    "ZCPROTO_LOG__LEVEL": "error",
    # For a slow machine:
    "ZCPROTO_SESSIONS__OPEN_TIMEOUT": "5m",
    "ZCPROTO_STORE__TIMEOUT": "10s",
    "ZCPROTO_TLS__HANDSHAKE_TIMEOUT": "30s",
}


class RealServer:
    """One server. `settings` are environment variables that configure it."""

    def __init__(self, harness: Harness, settings: dict[str, str]) -> None:
        self.home = harness.fixtures.folder / f"server-{next(harness.fixtures.numbers)}"
        self.home.mkdir(mode=0o700)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ZCPROTO_")}
        self._environment = {**inherited, **_SETTINGS, **settings}
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.key = ""

    async def command(self, *arguments: str) -> str:
        """Run a command of `zcproto` and return its output."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "zcproto", *arguments, "--home", str(self.home)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        output, errors = await process.communicate()
        if process.returncode:
            raise KitError(f"zcproto {' '.join(arguments)}: {errors.decode(errors='replace').strip()}")
        return output.decode()

    async def start(self) -> None:
        """Start it, on the same port as before."""
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
        """Start a drain."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    async def wait(self) -> None:
        assert self._process is not None
        await self._process.wait()
        self._process = None

    async def stop(self) -> None:
        """Kill it if it runs."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self.wait()

    @property
    def options(self) -> dict[str, Any]:
        """The options of `connect` that lead to this server."""
        ca_file = str(self.home / "certs" / "ca.crt")
        return {"address": f"127.0.0.1:{self.port}", "server_name": "localhost", "ca_file": ca_file}

    async def connect(self, harness: Harness, **options: Any) -> Client:
        """Connect a client, with a session unless options override that."""
        harness.program.secrets.add(self.key)
        defaults = {**self.options, "user": USER, "key": self.key}
        client, connecting = await harness.begin_connect(**{**defaults, **options})
        await harness.step_result(connecting, "connect")
        return client


async def _start_server(harness: Harness, **settings: str) -> RealServer:
    """Start a server with these settings, or return the shared one without settings."""
    if not settings:
        shared = harness.fixtures.shared.get("server")
        if isinstance(shared, RealServer):
            return shared
    server = RealServer(harness, {f"ZCPROTO_{name}": value for name, value in settings.items()})
    harness.fixtures.cleanup.append(server.stop)
    await server.start()
    if not settings:
        harness.fixtures.shared["server"] = server
    return server


async def _expect_works(client: Client) -> None:
    call = await client.call("echo", {"alive": True})
    await call.expect_result({"alive": True})


@scenario("echo", "9.3: a session by API key; params of all types are echoed")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    params = {
        "int": 2**64 - 1,
        "least": -(2**63),
        "bin": bytes(256),
        "str": "\u00e4\0",
        "deep": [{"a": [None, 0.5]}],
    }
    await (await client.call("echo", params)).expect_result(params)


@scenario("concurrent-calls", "6.3: a hundred concurrent calls on one connection, answered in any order")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    slow = await client.call("sleep", {"ms": 300})
    calls = await client.calls("echo", 99)
    for number, call in enumerate(calls):
        await call.expect_result({"n": number})
    await slow.expect_result({})


@scenario("large-params", "5.3: frames of nearly a megabyte in both directions")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    params = {"blob": bytes(900_000)}
    await (await client.call("echo", params)).expect_result(params)


@scenario("public-methods", "9.2: without a session server.info is answered, and all else is UNAUTHENTICATED")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness, user=None, key=None)
    info = await (await client.call("server.info")).result()
    expect(isinstance(info, dict) and 1 in info.get("versions", ()), f"server.info returned {info}")
    await (await client.call("echo", {})).expect_code(UNAUTHENTICATED)


@scenario("errors", "10.1: error codes of the real server reach the application")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    await (await client.call("no.such.method")).expect_code(UNIMPLEMENTED)
    await (await client.call("sleep", {"ms": "long"})).expect_code(INVALID_ARGUMENT)
    await (await client.call("sleep", {"ms": 1, "more": 2})).expect_code(INVALID_ARGUMENT)
    await (await client.call("session.revoke", {"id": "s-unknown"})).expect_code(NOT_FOUND)
    await _expect_works(client)


@scenario("wrong-key", "9.4: a wrong key is UNAUTHENTICATED")
async def _(harness: Harness) -> None:
    server = await _start_server(harness)
    options = {**server.options, "user": USER, "key": "not-this-key"}
    _, connecting = await harness.begin_connect(**options)
    error = await harness.error_of(connecting, "connect", "call")
    expect(error.get("code") == UNAUTHENTICATED, f"connect ended with {error}")


@scenario("deadline", "6.3: a call past its deadline is DEADLINE_EXCEEDED, and other calls are unaffected")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    call = await client.call("sleep", {"ms": 600_000}, timeout_ms=300)
    await call.expect_code(DEADLINE_EXCEEDED)
    await _expect_works(client)


@scenario("cancel", "6.5: cancelling a call does not affect other calls")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    call, beside = await client.call("sleep", {"ms": 600_000}), await client.call("sleep", {"ms": 100})
    await call.cancel()
    await call.expect_code(CANCELLED)
    await beside.expect_result({})
    await _expect_works(client)


@scenario("idempotency", "16.1: a call repeated with its idempotency key has the same result")
async def _(harness: Harness) -> None:
    client = await (await _start_server(harness)).connect(harness)
    first = await (await client.call("time", idempotency_key="once")).result()
    await asyncio.sleep(POLL / 10)
    await (await client.call("time", idempotency_key="once")).expect_result(first)


@scenario(
    "revoked-by-another", "9.3, 9.7: a revoked session is reported by an event, and refused from then on"
)
async def _(harness: Harness) -> None:
    server = await _start_server(harness)
    client, other = await server.connect(harness), await server.connect(harness)
    session = await client.session()
    assert session is not None
    await (await other.call("session.revoke", {"id": session["id"]})).expect_result({"revoked": 1})
    name, _ = await client.event()
    expect(name == "session.revoked", f"the application received {name}")
    await (await client.call("echo", {})).expect_code(TOKEN_REVOKED)
    await harness.step_result(await client.begin_open_session(), "open_session")
    await _expect_works(client)


@scenario("refresh", "9.6: refreshes extend a session beyond the lifetime of its token")
async def _(harness: Harness) -> None:
    server = await _start_server(harness, SESSIONS__LIFETIME="2s")
    client = await server.connect(harness)
    current = await client.session()
    assert current is not None
    async with asyncio.timeout(harness.patience * 5):
        for _ in range(2):  # the second refresh uses the refresh token of the first
            session = await client.session()
            while session is None or session["expires_at"] <= current["expires_at"]:
                await _expect_works(client)
                await asyncio.sleep(POLL)
                session = await client.session()
            expect(session["id"] == current["id"], f"the session changed to {session}")
            current = session


@scenario("too-many-sessions", "9.8: exceeding the session limit is reported at once")
async def _(harness: Harness) -> None:
    server = await _start_server(harness, SESSIONS__PER_USER="1")
    await server.connect(harness)
    try:
        await server.connect(harness)
    except StepFailed as failure:
        expect(failure.error.get("code") == RESOURCE_EXHAUSTED, f"connect ended with {failure}")
        return
    raise CheckFailed("a second session was opened although the limit is 1")


@scenario(
    "replaced-session", "9.8: an evicted session is SESSION_REPLACED, and its client does not reconnect"
)
async def _(harness: Harness) -> None:
    server = await _start_server(harness, SESSIONS__PER_USER="1", SESSIONS__WHEN_FULL="evict_oldest")
    client = await server.connect(harness)
    other = await server.connect(harness)
    await (await client.call("echo", {})).expect_code(SESSION_REPLACED)
    await (await client.call("echo", {})).expect_code(SESSION_REPLACED)
    await _expect_works(other)


@scenario("device", "9.4, 9.5: a device is enrolled, opens a session, and attaches it to another connection")
async def _(harness: Harness) -> None:
    server = await _start_server(harness)
    code = (await server.command("pair", "--user", USER)).split()
    seed = harness.fixtures.entropy(32)
    harness.program.secrets.add(seed.hex())
    public_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    enrolling = await server.connect(harness, user=None, key=None)
    params = {"code": _code_in(code), "public_key": public_key, "name": "laptop"}
    await (await enrolling.call("device.enroll", params)).expect_result({"user": USER, "device": "laptop"})
    client = await server.connect(harness, user=None, key=None, device="laptop", device_key=seed.hex())
    await _expect_works(client)
    await client.cut()
    await _expect_works(client)


def _code_in(words: list[str]) -> str:
    for word in words:
        if len(word) == 9 and word[4] == "-":
            return word
    raise KitError("zcproto pair did not print a code")


@scenario(
    "drain-and-restart", "6.7, 9.1: running calls finish during a drain; the session survives a restart"
)
async def _(harness: Harness) -> None:
    server = await _start_server(harness, SERVER__DRAIN_TIMEOUT="20s")
    client = await server.connect(harness)
    before = await client.session()
    running = await client.call("sleep", {"ms": 500})
    await _expect_works(client)
    server.drain()
    await running.expect_result({})
    await server.wait()
    call = await client.call("echo", {"n": 1}, timeout_ms=round(harness.patience * 3000))
    await server.start()
    await call.expect_result({"n": 1})
    expect(await client.session() == before, "the session changed after the restart")
    await server.stop()


@scenario(
    "killed-and-restarted",
    "11.1, 11.2: a client reconnects with the same session after the server was killed and restarted",
)
async def _(harness: Harness) -> None:
    server = await _start_server(harness, SERVER__DRAIN_TIMEOUT="1s")
    client = await server.connect(harness)
    before = await client.session()
    running = await client.call("sleep", {"ms": 600_000})
    await _expect_works(client)
    await server.stop()
    await running.expect_lost(clean=False)
    await server.start()
    call = await client.call("echo", {"n": 1}, timeout_ms=round(harness.patience * 3000))
    await call.expect_result({"n": 1})
    expect(await client.session() == before, "the session changed after the server was killed")
    await server.stop()
