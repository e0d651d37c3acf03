"""TLS: what a client offers, which servers it believes, pins, and the policy of `sts`."""

from __future__ import annotations

import asyncio
import os
import ssl
import struct
import sys
from typing import Any, Final

from zcproto_conformance import other_suite
from zcproto_conformance.certificates import HOST, Leaf
from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.link import QUIET, Link
from zcproto_conformance.server import tls_context
from zcproto_conformance.stage import USER, Joined, Stage, use_leaf

scenario: Final = Scenarios(SCRIPTED)

SUITES: Final = {0x1302, 0x1303}
TLS_1_3: Final = 0x0304
_STS: Final = {"max_age": 86_400, "include_subdomains": True}


class Hello:
    """A ClientHello: suites and extensions. Raises CheckFailed if it cannot be read."""

    def __init__(self, data: bytes) -> None:
        try:
            self._read(data)
        except (struct.error, IndexError) as error:
            raise CheckFailed("the ClientHello cannot be read") from error

    def _read(self, data: bytes) -> None:
        message = b""
        while data[:1] == b"\x16" and len(data) >= 5:  # a large one comes in several records
            size = struct.unpack_from("!H", data, 3)[0]
            message += data[5 : 5 + size]
            data = data[5 + size :]
        expect(message[:1] == b"\x01", "the first message is no ClientHello")
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
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting()
    link = await stage.welcomed()
    await stage.answer(connected, "connect")
    hello = Hello(link.hello)
    expect(TLS_1_3 in hello.versions, f"the versions offered are {sorted(map(hex, hello.versions))}")
    expect(hello.suites & SUITES, f"the suites offered are {sorted(map(hex, hello.suites))}")
    expect(b"zcp/1" in hello.protocols, f"the protocols offered are {hello.protocols}")
    expect(hello.server_name == HOST.encode(), f"the server name is {hello.server_name!r}")
    expect(42 not in hello.extensions, "early data is offered")


async def _distrusted(stage: Stage, *causes: str, **options: Any) -> Link:
    """The client does not connect, says why, and sends nothing of its own."""
    options = {"user": USER, "key": stage.key, **options}
    _, connected = await stage.connecting(**options)
    link = await stage.server.connection()
    try:
        await link.handshake(stage.context)
    except CheckFailed:
        pass  # it refused within the handshake
    else:
        link.welcome()
        await _sends_nothing(link)
    error = await stage.refusal(connected, "connect", "tls", "closed", "connect")
    expect(
        error.get("kind") == "tls" and error.get("cause") in causes,
        f"connect ended with {error} instead of kind tls with cause {' or '.join(causes)}",
    )
    return link


async def _sends_nothing(link: Link) -> None:
    how = await link.end("whose server it must not trust")
    expect(link.frames_seen == 0, "a frame was sent to a server that is not trusted")
    del how  # an alert, close_notify or a reset: all are good


@scenario("wrong-ca", "4.1: a certificate of another CA is not trusted, and nothing is sent")
async def _(stage: Stage) -> None:
    use_leaf(stage, stage.fixtures.other_ca.leaf())
    await _distrusted(stage, "certificate")


@scenario("wrong-name", "4.1: a certificate for another name is not trusted")
async def _(stage: Stage) -> None:
    use_leaf(stage, stage.fixtures.ca.leaf("elsewhere.example"))
    await _distrusted(stage, "certificate")


@scenario("expired-certificate", "4.1: a certificate past its dates is not trusted")
async def _(stage: Stage) -> None:
    use_leaf(stage, stage.fixtures.ca.leaf(days_ago=20, days_left=-1))
    await _distrusted(stage, "certificate")


@scenario("tls-1.2", "4.1: TLS 1.3 and no other version")
async def _(stage: Stage) -> None:
    stage.context = tls_context(stage.leaf.file, version=ssl.TLSVersion.TLSv1_2)
    await _distrusted(stage, "protocol")


@scenario(
    "other-suite", "4.1: a suite that is none of the two is never agreed on, whatever the server prefers"
)
async def _(stage: Stage) -> None:
    configuration = stage.fixtures.folder / "openssl.cnf"
    configuration.write_text(other_suite.CONFIGURATION)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", other_suite.__name__, str(stage.leaf.file), str(stage.patience)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
    )
    assert process.stdout is not None
    try:
        address = f"{stage.server.address.partition(':')[0]}:{int(await process.stdout.readline())}"
        _, connected = await stage.connecting(address=address, user=USER, key=stage.key)
        error = await stage.refusal(connected, "connect", "tls")
        told = (await process.stdout.readline()).decode().split()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    known = told in (["refused"], [other_suite.SUITE, "0"])
    expect(known, f"the server has seen {told} instead of no handshake, or none of the client's frames")
    expect(error.get("cause") == "protocol", f"connect ended with {error} instead of cause protocol")


@scenario("no-alpn", "4.1: a server that does not choose zcp/1 is left")
async def _(stage: Stage) -> None:
    stage.context = tls_context(stage.leaf.file, alpn=None)
    await _distrusted(stage, "protocol")


@scenario("no-tls", "4.1: a server that does not speak TLS is not spoken to")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(user=USER, key=stage.key)
    link = await stage.server.connection()
    link.write_plain(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    await stage.refusal(connected, "connect", "tls")
    await stage.server.nobody("again, perhaps without TLS", QUIET)


# --- pins -------------------------------------------------------------------------------------------


def _wrong_pin(stage: Stage) -> str:
    return stage.fixtures.other_ca.leaf().pin


async def _trusted(stage: Stage, **options: Any) -> Joined:
    joined = await stage.joined(**options)
    await joined.exchange()
    return joined


@scenario("pin", "4.1: a pin stands for the CA")
async def _(stage: Stage) -> None:
    await _trusted(stage, ca_file=None, pins=[stage.leaf.pin])


@scenario("wrong-pin", "4.1: a server without the pin is not trusted, and nothing is sent")
async def _(stage: Stage) -> None:
    await _distrusted(stage, "pin", ca_file=None, pins=[_wrong_pin(stage)])


@scenario("backup-pin", "4.1: one of several pins is enough")
async def _(stage: Stage) -> None:
    pins = [_wrong_pin(stage), stage.fixtures.next_leaf.pin, _wrong_pin(stage)]
    use_leaf(stage, stage.fixtures.next_leaf)
    await _trusted(stage, ca_file=None, pins=pins)


@scenario("pin-on-top-of-a-ca", "4.1: with a CA and a pin the CA alone is not enough")
async def _(stage: Stage) -> None:
    await _distrusted(stage, "pin", pins=[_wrong_pin(stage)])


@scenario("pin-with-the-wrong-ca", "4.1: with a CA and a pin the pin alone is not enough")
async def _(stage: Stage) -> None:
    use_leaf(stage, stage.fixtures.other_ca.leaf())
    await _distrusted(stage, "certificate", pins=[stage.leaf.pin])


async def _changes(stage: Stage, joined: Joined, leaf: Leaf) -> None:
    """The server comes back with another key; the client must not believe it."""
    use_leaf(stage, leaf)
    await joined.link.lose()
    call = await joined.client.call("echo", {}, idempotency_key="again")
    link = await stage.server.connection()
    try:
        await link.handshake(stage.context)
    except CheckFailed:
        pass  # it refused within the handshake
    else:
        link.welcome()
        await _sends_nothing(link)
    error = await call.error("tls")
    expect(error.get("cause") == "pin", f"the call ended with {error} instead of cause pin")


@scenario("pin-that-changes", "4.1: pins are looked at on every connection")
async def _(stage: Stage) -> None:
    joined = await _trusted(stage, pins=[stage.leaf.pin])
    await _changes(stage, joined, stage.fixtures.next_leaf)


@scenario("pin-announced", "16: pins.next is told to the application, and changes nothing that is trusted")
async def _(stage: Stage) -> None:
    joined = await _trusted(stage, pins=[stage.leaf.pin])
    data = {"pins": [stage.fixtures.next_leaf.pin], "from": joined.link.wall}
    joined.link.event("pins.next", data)
    told = await joined.client.event()
    expect(told == ("pins.next", data), f"the application was told {told}")
    await _changes(stage, joined, stage.fixtures.next_leaf)


@scenario(
    "pin-changes-as-announced", "9.7: a client that has the next pin beside the present one sees both keys"
)
async def _(stage: Stage) -> None:
    following = stage.fixtures.next_leaf
    joined = await _trusted(stage, pins=[stage.leaf.pin, following.pin])
    use_leaf(stage, following)
    await joined.link.lose()
    call = await joined.client.call("echo", {}, idempotency_key="again")
    link = await stage.welcomed()
    link.answer(await link.request("echo"), "the next key")
    await call.gives("the next key")


# --- the policy -------------------------------------------------------------------------------------


@scenario("policy", "6.2: a host that was seen with an sts policy is not connected to without verification")
async def _(stage: Stage) -> None:
    home = str(stage.fixtures.folder / f"home-{next(stage.fixtures.numbers)}")
    await stage.joined(home=home, welcome={"sts": _STS})
    use_leaf(stage, stage.fixtures.other_ca.leaf())
    _, connected = await stage.connecting(home=home, ca_file=None, verify=False)
    error = await stage.refusal(connected, "connect", "tls")
    expect(error.get("cause") == "policy", f"connect ended with {error} instead of cause policy")
    await stage.server.nobody("without verification", QUIET)


@scenario("policy-for-subdomains", "6.2: a policy with include_subdomains holds below the host")
async def _(stage: Stage) -> None:
    home = str(stage.fixtures.folder / f"home-{next(stage.fixtures.numbers)}")
    await stage.joined(home=home, welcome={"sts": _STS})
    options: dict[str, Any] = {"home": home, "ca_file": None, "verify": False}
    _, connected = await stage.connecting(server_name=f"below.{HOST}", **options)
    error = await stage.refusal(connected, "connect", "tls")
    expect(error.get("cause") == "policy", f"connect ended with {error} instead of cause policy")


@scenario("policy-taken-back", "6.2: max_age 0 ends the policy")
async def _(stage: Stage) -> None:
    home = str(stage.fixtures.folder / f"home-{next(stage.fixtures.numbers)}")
    await stage.joined(home=home, welcome={"sts": _STS})
    await stage.joined(home=home, welcome={"sts": {**_STS, "max_age": 0}})
    use_leaf(stage, stage.fixtures.other_ca.leaf())
    await _trusted(stage, home=home, ca_file=None, verify=False)


@scenario("policy-by-strangers", "6.2: only a verified connection teaches a policy")
async def _(stage: Stage) -> None:
    home = str(stage.fixtures.folder / f"home-{next(stage.fixtures.numbers)}")
    options: dict[str, Any] = {"home": home, "ca_file": None, "verify": False}
    await stage.joined(welcome={"sts": _STS}, **options)
    await _trusted(stage, **options)
