"""Test the Wireshark dissector with tshark on a captured conversation of real clients and a server."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

import zcproto
from tests.interop.capture import (
    Capture,
    Item,
    RecordingProxy,
    items_in,
    layers_in,
    readable_folder,
    tshark,
)
from tests.interop.support import needs
from tests.interop.wireshark import OTHER_PORT, PORT, check_item, complete_items
from tests.server import helpers
from tests.server.helpers import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    HEADER,
    KEY,
    NO_TOKEN,
    PATIENT_CLIENT,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    WELCOME,
    AnsweredError,
    Frame,
    ServerThread,
    eventually,
)
from zcproto.client.client import connect

pytestmark = needs("tshark")

LARGE = random.Random(7).randbytes(100 * 1024)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SIDES = {WELCOME: "server", REQUEST: "client", RESPONSE: "server", ERROR: "server", CANCEL: "client"}
SIDES |= {GOAWAY: "server", EVENT: "server"}


class RecordingClient(helpers.Client):
    """A client that records all frames of its connection."""

    def __init__(self, port: int, ca_file: Path, context: ssl.SSLContext) -> None:
        self.frames: list[Frame] = []
        super().__init__(port, ca_file, context=context)

    def frame(self, *arguments: Any, **fields: Any) -> bytes:
        data = super().frame(*arguments, **fields)
        _, _, kind, _, stream, timestamp, salt, counter, token = HEADER.unpack_from(data)
        self.frames.append(Frame(kind, stream, timestamp, salt, counter, token, data[HEADER.size :]))
        return data

    def receive(self) -> Frame:
        frame = super().receive()
        self.frames.append(frame)
        return frame


class Conversation(NamedTuple):
    """A captured conversation with its TLS keys, and the frames that were sent and received."""

    folder: Path
    capture: Path
    keys: Path
    frames: list[Frame]
    secrets: list[bytes]
    """Secrets in the frames, which must be masked."""


async def run_library_client(port: int, server: ServerThread, keys: Path) -> None:
    """Send calls with all options, a large body, a cancelled call, and a failing one with the library's client."""
    ca_file = server.home / "certs" / "ca.crt"
    options: dict[str, Any] = {"user": "ada", "key": KEY, "ca_file": ca_file, "key_log_file": keys}
    async with connect(f"127.0.0.1:{port}", **options, **PATIENT_CLIENT) as client:
        values = {"text": "hällo", "list": [1, -2, 2.5, None, True, b"\x01\x02"], "deep": {"n": 2**64 - 1}}
        assert await client.call("echo", values, idempotency_key="order-7", traceparent=TRACE) == values
        assert await client.call("echo", large=LARGE) == {"large": LARGE}
        with pytest.raises(zcproto.Unimplemented):
            await client.call("no.such.method")
        late = asyncio.create_task(client.call("sleep", ms=60_000))
        await asyncio.to_thread(server.until, lambda: server.server.state.tasks.running)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert await client.call("echo", after="it") == {"after": "it"}


@pytest.fixture(scope="module")
def conversation(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversation]:
    """Capture a conversation that contains every kind of frame."""
    home = tmp_path_factory.mktemp("wireshark") / "home"
    with (
        readable_folder() as folder,
        pytest.MonkeyPatch.context() as patch,
        ServerThread(home, certs, sessions__refresh=True) as server,
        RecordingProxy(server.port, OTHER_PORT) as proxy,
    ):
        patch.setenv("ZCPROTO_HOME", str(home / "client"))
        keys, ca_file = folder / "keys", home / "certs" / "ca.crt"
        asyncio.run(run_library_client(proxy.port, server, keys))
        context = helpers.client_context(ca_file)
        context.keylog_filename = str(keys)

        def open_client() -> RecordingClient:
            return RecordingClient(proxy.port, ca_file, context)

        first, second = open_client(), open_client()
        secrets = [KEY.encode(), *exchange_frames(first, second, proxy.capture)]
        first.frames += replayed_frames(open_client())
        server.begin_drain(0.2)  # GOAWAY
        for client in (first, second):
            client.rest_until_closed()
            client.close()
        server.join()
        frames = first.frames + second.frames
        assert {frame.kind for frame in frames} == set(range(1, 10))
        yield Conversation(folder, proxy.capture.write(folder / "capture.pcap"), keys, frames, secrets)


def exchange_frames(first: RecordingClient, second: RecordingClient, capture: Capture) -> list[bytes]:
    """Exchange frames that the library's client does not send, and return the secrets in them."""
    first.open_session("ada")
    second.open_session("ada")
    secrets = [first.token, second.token, second.opened["refresh_token"]]
    # Many frames in one record, answered in any order.
    first.send(*(first.request("echo", {"n": n}) for n in range(20)))
    first.answers(20)
    # One frame in many records and segments.
    large = first.request("echo", {"data": LARGE})
    for start in range(0, len(large), 30_000):
        first.send(large[start : start + 30_000])
    first.answer()
    small = first.request("echo", {"data": "in three pieces"})
    for piece in (small[:3], small[3:50], small[50:]):
        known = len(capture.packets)
        first.send(piece)
        eventually(lambda known=known: len(capture.packets) > known)  # or writes would be merged
    first.answer()
    assert first.is_open()  # PING, PONG
    first.send(first.request("sleep", {"ms": 60_000}))
    first.cancel(first.stream)
    assert first.answer().code == 1
    # Secrets other than tokens.
    for method, params in (
        ("device.enroll", {"code": "7D9K-X2MP", "public_key": bytes(range(32)), "name": "laptop"}),
        ("session.open", {"scheme": "ed25519", "device": "laptop", "signature": b"\xa7" * 64}),
        ("session.open", {"scheme": "magic", "user": "ada", "spell": "open sesame"}),
    ):
        with pytest.raises(AnsweredError):
            first.call(method, params, token=NO_TOKEN)
        secrets += [each for each in params.values() if isinstance(each, bytes) and len(each) == 64]
    secrets += [b"7D9K-X2MP", b"open sesame"]
    renewed = second.call(
        "session.refresh", {"refresh_token": secrets[2], "client": "test/1"}, token=NO_TOKEN
    )
    second.token = renewed["token"]
    secrets += [renewed["token"], renewed["refresh_token"]]
    first.call("session.revoke", {"id": second.opened["id"]})
    assert second.event().value[0] == "session.revoked"
    return secrets


def replayed_frames(client: RecordingClient) -> list[Frame]:
    """Send a frame twice, which closes the connection by an ERROR on stream 0. Return all frames of the client."""
    client.send(client.frame(PING, counter=5), client.frame(PING, counter=5))
    assert client.rest_until_closed()[0][-1].stream == 0
    client.close()
    return client.frames


@pytest.fixture(scope="module")
def outputs(conversation: Conversation) -> dict[str, str]:
    """Return what tshark prints of the conversation, by output format."""
    keys = ("-o", f"tls.keylog_file:{conversation.keys}")
    commands = {
        "json": ("-T", "json"),
        "pdml": ("-T", "pdml"),
        "text": ("-V", "-P"),
        "secrets": ("-T", "json", "-o", "zcp.show_secrets:TRUE"),
    }
    return {
        name: tshark(conversation.folder, conversation.capture, *keys, *options)
        for name, options in commands.items()
    }


def by_frame(items: Sequence[Item]) -> dict[tuple[str | None, ...], Item]:
    return {
        tuple(map(item.get, ("zcp.sender", "zcp.salt", "zcp.counter", "zcp.kind"))): item for item in items
    }


MASKED = {
    "params.key": ", masked",
    "params.code": "9 bytes, masked",
    "params.signature": "64 bytes, masked",
    "params.spell": "11 bytes, masked",
    "params.refresh_token": "32 bytes, masked",
    "result.token": "32 bytes, masked",
    "result.refresh_token": "32 bytes, masked",
}


@pytest.mark.parametrize("output", ["json", "secrets"])
def test_all_fields_of_captured_frames_are_shown(
    output: str, conversation: Conversation, outputs: dict[str, str]
) -> None:
    items = complete_items(outputs[output])
    found = by_frame(items)
    for frame in conversation.frames:
        sender = SIDES.get(frame.kind)
        for side in (sender,) if sender else ("client", "server"):
            item = found.get((side, frame.salt.hex(":"), str(frame.counter), str(frame.kind)))
            if item is not None:
                break
        assert item is not None, frame
        check_item(item, frame, masked=MASKED if output == "json" else None)
    assert len(items) > len(conversation.frames), "the library's client sent frames, too"


def encodings_of(secret: bytes) -> set[str]:
    """Return all encodings of a secret, and of the first half of a long one."""
    found = set()
    for part in {secret, secret[: len(secret) // 2] if len(secret) >= 32 else secret}:
        found |= {part.hex(), part.hex(":"), part.hex(" ")}
        text = base64.urlsafe_b64encode(part).decode().rstrip("=")
        found.add(text[:-1])  # the last character contains bits of the following byte
        found.add(base64.b64encode(part).decode().rstrip("=")[:-1])
        with suppress(UnicodeDecodeError):
            if (text := part.decode()).isprintable():
                found.add(text)
    return found


@pytest.mark.parametrize("output", ["json", "pdml", "text"])
def test_secrets_in_captured_frames_are_masked(
    output: str, conversation: Conversation, outputs: dict[str, str]
) -> None:
    printed = outputs[output].lower()
    for secret in conversation.secrets:
        assert not [form for form in encodings_of(secret) if form.lower() in printed]


def test_secrets_are_shown_when_preference_is_set(
    conversation: Conversation, outputs: dict[str, str]
) -> None:
    for secret in conversation.secrets:
        assert any(form in outputs["secrets"] for form in encodings_of(secret)), secret


def test_masked_tokens_are_numbered_per_session(outputs: dict[str, str]) -> None:
    items = complete_items(outputs["json"])
    opened = [item for item in items if item.get("zcp.kind") == str(RESPONSE) and masked_token(item)]
    numbers = [masked_token(item) for item in opened]
    assert len(set(numbers)) == len(numbers) == 4, "three sessions were opened, one was refreshed"
    used = {number for item in items for number in item.all("zcp.token_number")}
    assert used <= set(numbers)


def masked_token(item: Item) -> str | None:
    """Return the number of the token in a result."""
    for path, field, value in item.values:
        if path == "result.token" and field == "zcp.value.masked":
            return value.split(",")[0].removeprefix("#")
    return None


def test_secrets_in_malformed_frames_are_masked() -> None:
    secret = b"a secret of thirty-two bytes: 32"
    params = {"scheme": "api_key", "user": "ada", "key": secret.decode(), "client": "test/1"}
    right = msgpack.packb(["session.open", params])
    bodies = [
        right[:-4],
        right + b"\xc0",
        right.replace(b"\xa4user", b"\xc0\xc0\xc0\xc0\xc0"),  # a key that is not a str
        right.replace(b"\xa3ada", b"\xa3\xff\xff\xff"),  # invalid UTF-8
        right.replace(b"a secret", b"\xff secret"),
        msgpack.packb(["session.open", params, {}, 4]),
        msgpack.packb(["session.open", params, {}, 4, 5, 6])[:-1],
        msgpack.packb(["session.open", [secret]]),
        msgpack.packb(["session.open", secret]),
        msgpack.packb(["session.open", {"scheme": "other", "proof": {"of": [secret]}}]),
        msgpack.packb([5, params]),
        msgpack.packb([params, "session.open"]),
        msgpack.packb({"token": secret}),
    ]
    capture, header = Capture(), [0, 1, 0, bytes(8), 1, secret]
    connection = capture.connection(PORT, 0)
    for body in bodies:
        connection.send("client", HEADER.pack(64 + len(body), 1, REQUEST, *header) + body, 0)
    for version, kind in ((2, REQUEST), (1, PING), (1, 0x10), (1, RESPONSE)):
        body = msgpack.packb({"token": secret})
        connection.send("client", HEADER.pack(64 + len(body), version, kind, *header) + body, 0)
    connection.send("client", HEADER.pack(2**31, 1, REQUEST, *header) + right, 0)
    with readable_folder() as folder:
        path = capture.write(folder / "malformed.pcap")
        for options in (("-T", "pdml", "-J", "zcp"), ("-T", "json", "-J", "zcp"), ("-V", "-P")):
            output = tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", *options).lower()
            assert "session.open" in output
            for form in encodings_of(secret) | encodings_of(secret[1:]) | encodings_of(secret[2:]):
                assert form.lower() not in output


@pytest.mark.parametrize("output", ["json", "pdml", "text"])
def test_captured_frames_are_not_marked_as_malformed(output: str, outputs: dict[str, str]) -> None:
    assert "_ws.malformed" not in outputs[output]
    assert "Malformed" not in outputs[output]
    assert "_ws.lua.error" not in outputs[output]
    assert "Lua Error" not in outputs[output]


def test_expert_infos_mark_only_replayed_frame_and_errors(outputs: dict[str, str]) -> None:
    reported = {(item.get("zcp.kind"), name) for item in items_in(outputs["json"]) for name in item.experts}
    assert reported == {(str(PING), "replayed"), (str(ERROR), "failed"), (str(ERROR), "fatal")}


def test_info_column_lists_frames_of_packet(outputs: dict[str, str]) -> None:
    lines = [line for line in outputs["text"].splitlines() if " ZCP " in line]
    text = "\n".join(lines)
    for entry in ("WELCOME", "REQUEST 1 session.open", "ERROR 4 UNIMPLEMENTED", "CANCEL 5", "PING, PING"):
        assert f" {entry}" in text
    for entry in ("PONG, ERROR REPLAYED", "EVENT session.revoked", "GOAWAY draining", "RESPONSE 3 echo"):
        assert f" {entry}" in text
    assert any(line.endswith("REQUEST 8 echo, REQUEST 9 echo, …") for line in lines)


def test_requests_and_answers_are_linked(outputs: dict[str, str]) -> None:
    items = complete_items(outputs["json"])
    places = {
        (item.packet, item.get("zcp.salt"), item.get("zcp.stream"), item.get("zcp.kind")) for item in items
    }
    answers = {str(REQUEST): (RESPONSE, ERROR), str(PING): (PONG,)}
    for item in items:
        if item.get("zcp.answer_in") is not None:
            where = int(item.get("zcp.answer_in") or 0), item.get("zcp.salt"), item.get("zcp.stream")
            assert any((*where, str(kind)) in places for kind in answers[item.get("zcp.kind") or ""])
        if item.get("zcp.request_in") is not None:
            assert int(item.get("zcp.request_in") or 0) <= item.packet
            assert (item.get("zcp.time") is None) == (item.get("zcp.kind") == str(CANCEL))
    requests = [item for item in items if item.get("zcp.kind") == str(REQUEST)]
    assert all(item.get("zcp.answer_in") for item in requests)
    late = next(item for item in requests if item.get("zcp.method") == "sleep")
    (answer,) = [
        item for item in items if item.get("zcp.request_in") == str(late.packet) and item.get("zcp.time")
    ]
    at = {
        number: float(dict(dict(layers)["frame"])["frame.time_relative"])
        for number, layers in layers_in(outputs["json"])
    }
    waited = at[answer.packet] - at[late.packet]
    assert waited > 0
    assert float(answer.get("zcp.time") or 0) == pytest.approx(waited, abs=2e-6)


def test_segments_of_a_frame_are_linked(outputs: dict[str, str]) -> None:
    parts = [item for item in items_in(outputs["json"]) if item.get("zcp.length") is None]
    assert len(parts) > 20
    complete = {str(item.packet) for item in complete_items(outputs["json"])}
    for part in parts:
        assert part.get("zcp.complete_in") in complete
    assert sum(part.get("zcp.begins_in") is None for part in parts) == 5, "the large frames and the small one"


def test_capture_without_tls_keys_shows_no_frames(conversation: Conversation) -> None:
    output = tshark(conversation.folder, conversation.capture, "-T", "json")
    assert items_in(output) == []


def test_configured_port_names_protocol_without_alpn(conversation: Conversation) -> None:
    for port, named in ((PORT, False), (OTHER_PORT, True)):
        output = tshark(conversation.folder, conversation.capture, "-o", f"zcp.port:{port}", "-T", "json")
        assert ('"tls.app_data_proto": "ZCP/1"' in output) == named
