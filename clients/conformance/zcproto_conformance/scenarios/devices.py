"""Sessions bound to a device: what the device signs, and when."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import UNAUTHENTICATED
from zcproto_conformance.connection import MAX_FRAME, NO_TOKEN, Connection, Frame
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.harness import ConnectedClient, Harness, Session

scenario: Final = Scenarios(SCRIPTED)

NAME: Final = "d-\u00fc"


class Device:
    """A device of the client. The kit verifies its signatures without code of zcproto."""

    def __init__(self, harness: Harness) -> None:
        seed = harness.fixtures.entropy(32)
        self.seed = seed.hex()
        harness.program.secrets.add(self.seed)
        self._public = Ed25519PrivateKey.from_private_bytes(seed).public_key()

    def verify(self, signature: object, *parts: bytes) -> None:
        """Raise CheckFailed unless it is this device's signature over the parts."""
        expect(isinstance(signature, bytes), f"the signature is {signature!r}")
        assert isinstance(signature, bytes)
        try:
            self._public.verify(signature, b"".join(parts))
        except InvalidSignature:
            raise CheckFailed("the signature does not match the message that must be signed") from None

    async def answer_open(self, harness: Harness, connection: Connection) -> Session:
        """Answer the `session.open` that must come next."""
        request = await connection.expect_request("session.open")
        expect(request.token == NO_TOKEN, "session.open was sent with a token")
        params = request.params
        expect(
            params.get("scheme") == "ed25519" and params.get("device") == NAME,
            f"session.open was sent with {params}",
        )
        parts = (b"zcp/1 open\0", connection.salt, harness.leaf.sha256, NAME.encode())
        self.verify(params.get("signature"), *parts)
        session = harness.new_session(bound=True)
        harness.grant_session(connection, request, session)
        return session

    async def answer_attach(self, harness: Harness, connection: Connection, session: Session) -> None:
        """Answer the `session.attach` that must come next."""
        request = await connection.expect_request("session.attach")
        self.accept(harness, connection, session, request)

    def accept(self, harness: Harness, connection: Connection, session: Session, request: Frame) -> None:
        """Answer a `session.attach`."""
        expect(
            request.token == session.token, "session.attach was sent with a token other than the session's"
        )
        parts = (b"zcp/1 attach\0", connection.salt, harness.leaf.sha256, session.token)
        self.verify(request.params.get("signature"), *parts)
        connection.frame_limit = MAX_FRAME
        connection.respond(request, {})


async def _connect_with_device(harness: Harness) -> tuple[ConnectedClient, Device]:
    device = Device(harness)
    client, connecting = await harness.begin_connect(device=NAME, device_key=device.seed)
    connection = await harness.next_welcomed()
    session = await device.answer_open(harness, connection)
    await harness.step_result(connecting, "connect")
    return ConnectedClient(client, connection, session), device


@scenario(
    "device-opens-session", "9.4: the signature covers purpose, salt, server certificate and device name"
)
async def _(harness: Harness) -> None:
    peer, _ = await _connect_with_device(harness)
    await peer.exchange()


@scenario(
    "device-attaches-session",
    "9.5: each further connection is attached with a signature over its own salt and certificate",
)
async def _(harness: Harness) -> None:
    peer, device = await _connect_with_device(harness)
    await peer.exchange()
    await peer.connection.truncate_and_wait()
    harness.use_leaf(harness.fixtures.next_leaf)
    connection = await _next_attached(harness, peer, device)
    call = await peer.client.call("echo", {}, idempotency_key="again")
    request = await connection.expect_request("echo")
    expect(request.token == peer.session.token, "the call was sent with a token other than the session's")
    connection.respond(request, "attached")
    await call.expect_result("attached")


async def _next_attached(harness: Harness, peer: ConnectedClient, device: Device) -> Connection:
    """Accept the next connection, which must be attached. Requests before `session.attach` are refused."""
    connection = await harness.next_welcomed()
    connection.auto_responses.clear()
    while True:
        request = await connection.next_frame("session.attach")
        if request.kind == "REQUEST" and request.method == "session.attach":
            device.accept(harness, connection, peer.session, request)
            return connection
        expect(request.kind == "REQUEST", f"received {request} before session.attach")
        connection.respond_error(request, UNAUTHENTICATED, {"attach": True})


@scenario(
    "attach-on-demand", "11.1: UNAUTHENTICATED with attach causes session.attach and one retry of the call"
)
async def _(harness: Harness) -> None:
    peer, device = await _connect_with_device(harness)
    call = await peer.client.call("echo", {"n": 1})
    peer.connection.respond_error(
        await peer.connection.expect_request("echo"), UNAUTHENTICATED, {"attach": True}
    )
    await device.answer_attach(harness, peer.connection, peer.session)
    again = await peer.connection.expect_request("echo")
    expect(again.params == {"n": 1}, f"the call was retried with params {again.params}")
    peer.connection.respond(again, "attached")
    await call.expect_result("attached")


@scenario("attach-refused-twice", "11.1: a second UNAUTHENTICATED with attach is reported to the application")
async def _(harness: Harness) -> None:
    peer, device = await _connect_with_device(harness)
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(
        await peer.connection.expect_request("echo"), UNAUTHENTICATED, {"attach": True}
    )
    await device.answer_attach(harness, peer.connection, peer.session)
    peer.connection.respond_error(
        await peer.connection.expect_request("echo"), UNAUTHENTICATED, {"attach": True}
    )
    await call.expect_code(UNAUTHENTICATED)
    await peer.connection.expect_silence("after a second refusal")


@scenario(
    "attach-without-device-key",
    "11.1: without a device key, UNAUTHENTICATED with attach is reported to the application",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(
        await peer.connection.expect_request("echo"), UNAUTHENTICATED, {"attach": True}
    )
    await call.expect_code(UNAUTHENTICATED)
    await peer.connection.expect_silence("after UNAUTHENTICATED")
