"""Bound sessions: what a device signs, and when."""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.link import NO_TOKEN, Frame, Link
from zcproto_conformance.stage import Joined, Session, Stage, use_leaf

scenario: Final = Scenarios(SCRIPTED)

UNAUTHENTICATED: Final = 16
NAME: Final = "d-\u00fc"


class Device:
    """A device of the client's, whose signatures the kit verifies by itself."""

    def __init__(self, stage: Stage) -> None:
        seed = stage.fixtures.entropy(32)
        self.seed = seed.hex()
        stage.program.secrets.add(self.seed)
        self._public = Ed25519PrivateKey.from_private_bytes(seed).public_key()

    def verify(self, signature: object, *parts: bytes) -> None:
        """Raise CheckFailed unless it is this device's signature over the parts."""
        expect(isinstance(signature, bytes), f"the signature is {signature!r}")
        assert isinstance(signature, bytes)
        try:
            self._public.verify(signature, b"".join(parts))
        except InvalidSignature:
            raise CheckFailed("the signature is not over what must be signed") from None

    async def opened(self, stage: Stage, link: Link) -> Session:
        """Answer `session.open` by this device."""
        request = await link.request("session.open")
        expect(request.token == NO_TOKEN, "session.open came with a token")
        params = request.params
        expect(params.get("scheme") == "ed25519" and params.get("device") == NAME, f"it came with {params}")
        leaf = hashlib.sha256(stage.leaf.der).digest()
        self.verify(params.get("signature"), b"zcp/1 open\0", link.salt, leaf, NAME.encode())
        session = stage.new_session(bound=True)
        stage.give(link, request, session)
        return session

    async def attached(self, stage: Stage, link: Link, session: Session) -> None:
        """Answer the `session.attach` that must come next."""
        request = await link.request("session.attach")
        self.attach(stage, link, session, request)

    def attach(self, stage: Stage, link: Link, session: Session, request: Frame) -> None:
        """Answer a `session.attach`."""
        expect(request.token == session.token, "session.attach came with another token than the session's")
        leaf = hashlib.sha256(stage.leaf.der).digest()
        parts = (b"zcp/1 attach\0", link.salt, leaf, session.token)
        self.verify(request.params.get("signature"), *parts)
        link.limit = 1_048_576
        link.answer(request, {})


async def _with_device(stage: Stage) -> tuple[Joined, Device]:
    device = Device(stage)
    client, connected = await stage.connecting(device=NAME, device_key=device.seed)
    link = await stage.welcomed()
    session = await device.opened(stage, link)
    await stage.answer(connected, "connect")
    return Joined(client, link, session), device


@scenario(
    "device-opens", "9.4: the signature covers purpose, salt, the server's certificate and the device's name"
)
async def _(stage: Stage) -> None:
    joined, _ = await _with_device(stage)
    await joined.exchange()


@scenario(
    "device-attaches", "9.5: on each further connection the key is proved, over its own salt and certificate"
)
async def _(stage: Stage) -> None:
    joined, device = await _with_device(stage)
    await joined.exchange()
    await joined.link.lose()
    use_leaf(stage, stage.fixtures.next_leaf)
    link = await _attached_link(stage, joined, device)
    call = await joined.client.call("echo", {}, idempotency_key="again")
    request = await link.request("echo")
    expect(request.token == joined.session.token, "the call came with another token than the session's")
    link.answer(request, "attached")
    await call.gives("attached")


async def _attached_link(stage: Stage, joined: Joined, device: Device) -> Link:
    """The next connection. What comes there before the key is proved is refused, whatever it is."""
    link = await stage.welcomed()
    link.auto.clear()
    while True:
        request = await link.frame("session.attach")
        if request.kind == "REQUEST" and request.method == "session.attach":
            device.attach(stage, link, joined.session, request)
            return link
        expect(request.kind == "REQUEST", f"{request} came before session.attach")
        link.refuse(request, UNAUTHENTICATED, {"attach": True})


@scenario(
    "attach-when-asked",
    "11.1: UNAUTHENTICATED with attach leads to session.attach, and to the call again, once",
)
async def _(stage: Stage) -> None:
    joined, device = await _with_device(stage)
    call = await joined.client.call("echo", {"n": 1})
    joined.link.refuse(await joined.link.request("echo"), UNAUTHENTICATED, {"attach": True})
    await device.attached(stage, joined.link, joined.session)
    again = await joined.link.request("echo")
    expect(again.params == {"n": 1}, f"the call came again with {again.params}")
    joined.link.answer(again, "proved")
    await call.gives("proved")


@scenario("attach-in-vain", "11.1: once: after a second refusal the application is told")
async def _(stage: Stage) -> None:
    joined, device = await _with_device(stage)
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), UNAUTHENTICATED, {"attach": True})
    await device.attached(stage, joined.link, joined.session)
    joined.link.refuse(await joined.link.request("echo"), UNAUTHENTICATED, {"attach": True})
    await call.refused(UNAUTHENTICATED)
    await joined.link.quiet("after a second refusal")


@scenario("attach-without-a-key", "11.1: UNAUTHENTICATED with attach is told where there is no key to prove")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), UNAUTHENTICATED, {"attach": True})
    await call.refused(UNAUTHENTICATED)
    await joined.link.quiet("after UNAUTHENTICATED")
