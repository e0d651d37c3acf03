"""TLS: what a client offers, which servers it trusts, pins, and `sts` policies."""

from __future__ import annotations

import asyncio
import os
import ssl
import struct
import sys
from typing import Any, Final

from zcproto_conformance import single_suite_server
from zcproto_conformance.certificates import HOST, Leaf
from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.connection import QUIET
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.harness import USER, ConnectedClient, Harness
from zcproto_conformance.scripted_server import tls_context

scenario: Final = Scenarios(SCRIPTED)

SUITES: Final = {0x1302, 0x1303}
TLS_1_3: Final = 0x0304
_STS: Final = {"max_age": 86_400, "include_subdomains": True}


class ClientHello:
    """The suites and extensions of a ClientHello. Raises CheckFailed if it cannot be parsed."""

    def __init__(self, data: bytes) -> None:
        try:
            self._parse(data)
        except (struct.error, IndexError) as error:
            raise CheckFailed("the ClientHello cannot be parsed") from error

    def _parse(self, data: bytes) -> None:
        message = b""
        while data[:1] == b"\x16" and len(data) >= 5:  # a large one spans several records
            size = struct.unpack_from("!H", data, 3)[0]
            message += data[5 : 5 + size]
            data = data[5 + size :]
        expect(message[:1] == b"\x01", "the first message is not a ClientHello")
        at = 4 + 2 + 32
        at += 1 + message[at]
        count = struct.unpack_from("!H", message, at)[0] // 2
        self.suites: set[int] = set(struct.unpack_from(f"!{count}H", message, at + 2))
        at += 2 + 2 * count
        at += 1 + message[at]
        end = at + 2 + struct.unpack_from("!H", message, at)[0]
        at += 2
        self.extensions: dict[int, bytes] = {}
        while at < end:
            kind, size = struct.unpack_from("!HH", message, at)
            self.extensions[kind] = message[at + 4 : at + 4 + size]
            at += 4 + size

    @property
    def versions(self) -> set[int]:
        data = self.extensions.get(43, b"\0")
        return set(struct.unpack_from(f"!{data[0] // 2}H", data, 1))

    @property
    def protocols(self) -> list[bytes]:
        data, found, at = self.extensions.get(16, b"\0\0"), [], 2
        while at < len(data):
            found.append(data[at + 1 : at + 1 + data[at]])
            at += 1 + data[at]
        return found

    @property
    def server_name(self) -> bytes:
        return self.extensions.get(0, b"\0" * 5)[5:]


@scenario(
    "client-hello", "4.1: TLS 1.3, one of the two suites, ALPN zcp/1, the server's name, and no early data"
)
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect()
    connection = await harness.next_welcomed()
    await harness.step_result(connecting, "connect")
    hello = ClientHello(connection.client_hello)
    expect(TLS_1_3 in hello.versions, f"the versions offered are {sorted(map(hex, hello.versions))}")
    expect(hello.suites & SUITES, f"the suites offered are {sorted(map(hex, hello.suites))}")
    expect(b"zcp/1" in hello.protocols, f"the protocols offered are {hello.protocols}")
    expect(hello.server_name == HOST.encode(), f"the server name is {hello.server_name!r}")
    expect(42 not in hello.extensions, "early data is offered")


async def _expect_distrusted(harness: Harness, *causes: str, **options: Any) -> None:
    """Let a client connect, which must fail for one of these causes without sending a frame."""
    options = {"user": USER, "key": harness.key, **options}
    _, connecting = await harness.begin_connect(**options)
    await _accept_untrusted(harness)
    error = await harness.error_of(connecting, "connect", "tls", "closed", "connect")
    expect(
        error.get("kind") == "tls" and error.get("cause") in causes,
        f"connect ended with {error} instead of kind tls with cause {' or '.join(causes)}",
    )


async def _accept_untrusted(harness: Harness) -> None:
    """Accept the next connection, which the client must end without sending a frame, in whatever way."""
    connection = await harness.next_unsecured()
    try:
        await connection.handshake(harness.context)
    except CheckFailed:
        return  # refused during the handshake
    connection.welcome()
    await connection.wait_for_end("to a server that is not trusted")
    expect(connection.frames_received == 0, "a frame was sent to a server that is not trusted")


@scenario("wrong-ca", "4.1: a certificate of another CA is not trusted, and nothing is sent")
async def _(harness: Harness) -> None:
    harness.use_leaf(harness.fixtures.other_ca.leaf())
    await _expect_distrusted(harness, "certificate")


@scenario("wrong-name", "4.1: a certificate for another name is not trusted")
async def _(harness: Harness) -> None:
    harness.use_leaf(harness.fixtures.ca.leaf("elsewhere.example"))
    await _expect_distrusted(harness, "certificate")


@scenario("expired-certificate", "4.1: an expired certificate is not trusted")
async def _(harness: Harness) -> None:
    harness.use_leaf(harness.fixtures.ca.leaf(days_ago=20, days_left=-1))
    await _expect_distrusted(harness, "certificate")


@scenario("tls-1.2", "4.1: no version of TLS but 1.3 is accepted")
async def _(harness: Harness) -> None:
    harness.context = tls_context(harness.leaf.file, version=ssl.TLSVersion.TLSv1_2)
    await _expect_distrusted(harness, "protocol")


@scenario("other-suite", "4.1: no suite but the two is accepted, whatever the server prefers")
async def _(harness: Harness) -> None:
    configuration = harness.fixtures.folder / "openssl.cnf"
    configuration.write_text(single_suite_server.CONFIGURATION)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", single_suite_server.__name__, str(harness.leaf.file), str(harness.patience)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
    )
    assert process.stdout is not None
    try:
        address = f"{harness.server.address.partition(':')[0]}:{int(await process.stdout.readline())}"
        _, connecting = await harness.begin_connect(address=address, user=USER, key=harness.key)
        error = await harness.error_of(connecting, "connect", "tls")
        outcome = (await process.stdout.readline()).decode().split()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    no_frame = outcome in (["refused"], [single_suite_server.SUITE, "0"])
    expect(no_frame, f"the server reported {outcome} instead of a refused handshake, or no frame after it")
    expect(error.get("cause") == "protocol", f"connect ended with {error} instead of cause protocol")


@scenario("other-group", "4.2: a server that supports no key-exchange group of the client is refused")
async def _(harness: Harness) -> None:
    harness.context.set_ecdh_curve("secp256k1")  # not a group of TLS 1.3
    await _expect_distrusted(harness, "protocol")


@scenario("no-alpn", "4.1: a server that does not select zcp/1 is refused")
async def _(harness: Harness) -> None:
    harness.context = tls_context(harness.leaf.file, alpn=None)
    await _expect_distrusted(harness, "protocol")


@scenario("no-tls", "4.1: a server that does not use TLS is refused, without a fallback")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(user=USER, key=harness.key)
    connection = await harness.next_unsecured()
    connection.write_plain(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    await harness.error_of(connecting, "connect", "tls")
    await harness.server.expect_no_connection("again, perhaps without TLS", QUIET)


# --- pins -------------------------------------------------------------------------------------------


def _wrong_pin(harness: Harness) -> str:
    return harness.fixtures.other_ca.leaf().pin


async def _expect_trusted(harness: Harness, **options: Any) -> ConnectedClient:
    peer = await harness.connect(**options)
    await peer.exchange()
    return peer


@scenario("pin", "4.1: a pin replaces a CA")
async def _(harness: Harness) -> None:
    await _expect_trusted(harness, ca_file=None, pins=[harness.leaf.pin])


@scenario("wrong-pin", "4.1: a server that does not match the pin is not trusted, and nothing is sent")
async def _(harness: Harness) -> None:
    await _expect_distrusted(harness, "pin", ca_file=None, pins=[_wrong_pin(harness)])


@scenario("backup-pin", "4.1: one matching pin of several is enough")
async def _(harness: Harness) -> None:
    pins = [_wrong_pin(harness), harness.fixtures.next_leaf.pin, _wrong_pin(harness)]
    harness.use_leaf(harness.fixtures.next_leaf)
    await _expect_trusted(harness, ca_file=None, pins=pins)


@scenario("wrong-pin-with-ca", "4.1: with a CA and a pin, the CA alone is not enough")
async def _(harness: Harness) -> None:
    await _expect_distrusted(harness, "pin", pins=[_wrong_pin(harness)])


@scenario("pin-with-wrong-ca", "4.1: with a CA and a pin, the pin alone is not enough")
async def _(harness: Harness) -> None:
    harness.use_leaf(harness.fixtures.other_ca.leaf())
    await _expect_distrusted(harness, "certificate", pins=[harness.leaf.pin])


async def _expect_key_refused(harness: Harness, peer: ConnectedClient, leaf: Leaf) -> None:
    """Let the client reconnect to a server with another key, which it must not trust."""
    harness.use_leaf(leaf)
    await peer.connection.truncate_and_wait()
    call = await peer.client.call("echo", {}, idempotency_key="again")
    await _accept_untrusted(harness)
    error = await call.error("tls")
    expect(error.get("cause") == "pin", f"the call ended with {error} instead of cause pin")


@scenario("pin-checked-on-reconnect", "4.1: pins are checked on every connection")
async def _(harness: Harness) -> None:
    peer = await _expect_trusted(harness, pins=[harness.leaf.pin])
    await _expect_key_refused(harness, peer, harness.fixtures.next_leaf)


@scenario(
    "pins-next-event", "16: pins.next is delivered to the application and does not change the trusted pins"
)
async def _(harness: Harness) -> None:
    peer = await _expect_trusted(harness, pins=[harness.leaf.pin])
    data = {"pins": [harness.fixtures.next_leaf.pin], "from": peer.connection.wall}
    peer.connection.event("pins.next", data)
    event = await peer.client.event()
    expect(event == ("pins.next", data), f"the application received {event}")
    await _expect_key_refused(harness, peer, harness.fixtures.next_leaf)


@scenario("key-rollover-with-next-pin", "9.7: a client with the current and the next pin accepts both keys")
async def _(harness: Harness) -> None:
    following = harness.fixtures.next_leaf
    peer = await _expect_trusted(harness, pins=[harness.leaf.pin, following.pin])
    harness.use_leaf(following)
    await peer.connection.truncate_and_wait()
    call = await peer.client.call("echo", {}, idempotency_key="again")
    connection = await harness.next_welcomed()
    connection.respond(await connection.expect_request("echo"), "the next key")
    await call.expect_result("the next key")


# --- sts policies -----------------------------------------------------------------------------------


@scenario("sts-policy", "6.2: a host with an sts policy is not connected to without verification")
async def _(harness: Harness) -> None:
    home = harness.new_home()
    await harness.connect(home=home, welcome={"sts": _STS})
    harness.use_leaf(harness.fixtures.other_ca.leaf())
    _, connecting = await harness.begin_connect(home=home, ca_file=None, verify=False)
    error = await harness.error_of(connecting, "connect", "tls")
    expect(error.get("cause") == "policy", f"connect ended with {error} instead of cause policy")
    await harness.server.expect_no_connection("without verification", QUIET)


@scenario(
    "sts-policy-for-subdomains", "6.2: a policy with include_subdomains applies to subdomains of the host"
)
async def _(harness: Harness) -> None:
    home = harness.new_home()
    await harness.connect(home=home, welcome={"sts": _STS})
    options: dict[str, Any] = {"home": home, "ca_file": None, "verify": False}
    _, connecting = await harness.begin_connect(server_name=f"below.{HOST}", **options)
    error = await harness.error_of(connecting, "connect", "tls")
    expect(error.get("cause") == "policy", f"connect ended with {error} instead of cause policy")


@scenario(
    "sts-policy-with-another-name",
    "6.2: verifying another name does not lift the policy of the host that is connected to",
)
async def _(harness: Harness) -> None:
    home = harness.new_home()
    await harness.connect(home=home, welcome={"sts": _STS})
    harness.use_leaf(harness.fixtures.other_ca.leaf())
    _, port = harness.server.address.rsplit(":", 1)
    _, connecting = await harness.begin_connect(
        home=home, ca_file=None, verify=False, address=f"{HOST}:{port}", server_name="other.example"
    )
    error = await harness.error_of(connecting, "connect", "tls")
    expect(error.get("cause") == "policy", f"connect ended with {error} instead of cause policy")


@scenario("sts-policy-removed", "6.2: max_age 0 removes the policy")
async def _(harness: Harness) -> None:
    home = harness.new_home()
    await harness.connect(home=home, welcome={"sts": _STS})
    await harness.connect(home=home, welcome={"sts": {**_STS, "max_age": 0}})
    harness.use_leaf(harness.fixtures.other_ca.leaf())
    await _expect_trusted(harness, home=home, ca_file=None, verify=False)


@scenario("sts-policy-from-unverified-server", "6.2: only a verified connection can set a policy")
async def _(harness: Harness) -> None:
    home = harness.new_home()
    options: dict[str, Any] = {"home": home, "ca_file": None, "verify": False}
    await harness.connect(welcome={"sts": _STS}, **options)
    await _expect_trusted(harness, **options)
