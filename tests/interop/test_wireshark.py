"""The dissector for Wireshark, as tshark runs it: on a real conversation, and on the frames of the test vectors."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import random
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

import zcproto
from tests.interop.capture import Capture, Item, RecordingProxy, items_of, layers_of, readable_folder, tshark
from tests.interop.support import needs
from tests.server import helpers
from tests.server.conftest import certs
from tests.server.helpers import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    HEADER,
    KEY,
    NO_TOKEN,
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
from zcproto.client.connect import connect

__all__ = ["certs"]

pytestmark = needs("tshark")

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
KINDS = json.loads((VECTORS / "tables.json").read_text(encoding="utf-8"))["kinds"]
PORT = 7443
OTHER_PORT = 9443
"""One that only the ALPN says something of."""
LARGE = random.Random(7).randbytes(100 * 1024)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SIDES = {WELCOME: "server", REQUEST: "client", RESPONSE: "server", ERROR: "server", CANCEL: "client"}
SIDES |= {GOAWAY: "server", EVENT: "server"}

NAMED = {
    ("meta.deadline_ms", int): "zcp.meta.deadline_ms",
    ("meta.idempotency_key", str): "zcp.meta.idempotency_key",
    ("meta.traceparent", str): "zcp.meta.traceparent",
    ("method", str): "zcp.method",
    ("code", int): "zcp.error.code",
    ("message", str): "zcp.error.message",
    ("name", str): "zcp.event.name",
    ("goaway.reason", str): "zcp.goaway.reason",
    ("goaway.retry_after_ms", int): "zcp.goaway.retry_after_ms",
    ("welcome.server", str): "zcp.welcome.server",
    ("welcome.max_frame", int): "zcp.welcome.max_frame",
    ("welcome.max_streams", int): "zcp.welcome.max_streams",
    ("welcome.idle_timeout_ms", int): "zcp.welcome.idle_timeout_ms",
    ("welcome.tolerance_ms", int): "zcp.welcome.tolerance_ms",
    ("welcome.sts.max_age", int): "zcp.welcome.sts.max_age",
    ("welcome.sts.include_subdomains", bool): "zcp.welcome.sts.include_subdomains",
}
"""Values that have fields of their own, by where and what they are."""

CONTAINERS = {
    REQUEST: ("zcp.params", "zcp.meta"),
    RESPONSE: ("zcp.result",),
    ERROR: ("zcp.error.details",),
    EVENT: ("zcp.event.data",),
    GOAWAY: ("zcp.goaway",),
    WELCOME: ("zcp.welcome",),
}
"""Fields that hold maps; each is there if the frame has such a map."""


# --- what must be shown of a frame ----------------------------------------------------------------------


def leaves(value: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Path, field and value of all that is in a value, as tshark prints them."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{escape_text(key)}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, f"{path}[{index}]")
    else:
        field, text = leaf(value)
        yield path, field if field == "zcp.value.uint" else NAMED.get((path, type(value)), field), text


def escape_text(text: str) -> str:
    return "".join("." if ord(each) < 32 or ord(each) == 127 else each for each in text)


def leaf(value: Any) -> tuple[str, str]:
    match value:
        case None:
            return "zcp.value.nil", ""
        case bool():
            return "zcp.value.bool", str(int(value))
        case int():
            return "zcp.value.uint" if value >= 2**63 else "zcp.value.int", str(value)
        case float():
            return "zcp.value.float", repr(value)
        case str():
            return "zcp.value.str", value
    return "zcp.value.bin", value.hex(":")


def body_of(frame: Frame) -> Iterator[tuple[str, str, str]]:
    value = msgpack.unpackb(frame.body, max_array_len=10**6, strict_map_key=False)
    match frame.kind:
        case 2:
            names = ["method", "params", "meta"]
        case 4:
            names = ["code", "message", "details"]
        case 9:
            names = ["name", "data"]
        case kind:
            yield from leaves(value, {WELCOME: "welcome", RESPONSE: "result", GOAWAY: "goaway"}[kind])
            return
    for name, each in zip(names, value, strict=False):
        yield from leaves(each, name)


def same(found: str, wanted: str, field: str) -> bool:
    if field == "zcp.value.float":
        return math.isclose(float(found), float(wanted), rel_tol=1e-12) or found == wanted
    return found == wanted.replace("\0", "\u2400")  # Wireshark would end a text there


def check(item: Item, frame: Frame, *, secret: Mapping[str, str] | None = None) -> None:
    """Whether all fields of a frame are shown with their values. `secret` has what is masked, by path."""
    assert item.get("zcp.length") == str(64 + len(frame.body))
    assert item.get("zcp.version") == "1"
    assert item.get("zcp.kind") == str(frame.kind)
    assert item.get("zcp.flags") == "0x0000"
    assert item.get("zcp.stream") == str(frame.stream)
    assert item.get("zcp.timestamp_ms") == str(frame.timestamp)
    if frame.timestamp < 2**40 * 4:
        moment = item.get("zcp.timestamp")
        assert moment is not None
        shown = time.strptime(moment.split(".")[0], "%b %d, %Y %H:%M:%S")
        wanted = time.gmtime(frame.timestamp // 1000)
        assert shown[:6] == wanted[:6]
        assert moment.split(".")[1].startswith(f"{frame.timestamp % 1000:03}")
    assert item.get("zcp.salt") == frame.salt.hex(":")
    assert item.get("zcp.counter") == str(frame.counter)
    token = item.get("zcp.token")
    if frame.token == NO_TOKEN:
        assert token == "none"
    elif secret is None:
        assert token == frame.token.hex()
    else:
        assert token == f"#{item.get('zcp.token_number')}, 32 bytes, masked"
    if not frame.body:
        assert item.values == []
        return
    wanted_values = list(body_of(frame))
    assert len(item.values) == len(wanted_values), (item.values, wanted_values)
    for (path, field, found), (wanted_path, wanted_field, wanted_text) in zip(
        item.values, wanted_values, strict=True
    ):
        assert path == wanted_path
        if secret is not None and path in secret:
            assert field == "zcp.value.masked"
            assert found.endswith(secret[path])
            continue
        assert field == wanted_field, path
        assert same(found, wanted_text, field), path
    for name in CONTAINERS.get(frame.kind, ()):
        where = {"zcp.error.details": "details", "zcp.event.data": "data"}.get(
            name, name.removeprefix("zcp.")
        )
        deeper = [path for path, _, _ in wanted_values if path.startswith((f"{where}.", f"{where}["))]
        assert item.get(name) is not None or not deeper


# --- a real conversation --------------------------------------------------------------------------------


class Noted(helpers.Client):
    """A client that notes each frame of its connection: who sent it, and what it was."""

    def __init__(self, port: int, ca_file: Path) -> None:
        self.frames: list[Frame] = []
        super().__init__(port, ca_file)

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
    """What was said, as the ones who said it know it."""

    folder: Path
    packets: Path
    keys: Path
    noted: list[Frame]
    secrets: list[bytes]
    """All that must not be readable."""


async def library(port: int, ca_file: Path, keys: Path) -> None:
    """What the library's client says: all options of a call, a large body, a call that is given up, an error."""
    options: dict[str, Any] = {"user": "ada", "key": KEY, "ca_file": ca_file, "key_log_file": keys}
    async with connect(f"127.0.0.1:{port}", **options) as client:
        values = {"text": "hällo", "list": [1, -2, 2.5, None, True, b"\x01\x02"], "deep": {"n": 2**64 - 1}}
        assert await client.call("echo", values, idempotency_key="order-7", traceparent=TRACE) == values
        assert await client.call("echo", large=LARGE) == {"large": LARGE}
        with pytest.raises(zcproto.Unimplemented):
            await client.call("no.such.method")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.call("sleep", ms=60_000)
        assert await client.call("echo", after="it") == {"after": "it"}


@pytest.fixture(scope="module")
def conversation(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversation]:
    """A conversation that has each kind of frame, captured by a proxy."""
    home = tmp_path_factory.mktemp("wireshark") / "home"
    with (
        readable_folder() as folder,
        pytest.MonkeyPatch.context() as patch,
        ServerThread(home, certs, sessions__refresh=True) as server,
        RecordingProxy(server.port, OTHER_PORT) as proxy,
    ):
        patch.setenv("ZCPROTO_HOME", str(home / "client"))
        keys, ca_file = folder / "keys", home / "certs" / "ca.crt"
        asyncio.run(library(proxy.port, ca_file, keys))
        context = helpers.client_context(ca_file)
        context.keylog_filename = str(keys)
        patch.setitem(helpers._contexts, ca_file, context)
        first, second = Noted(proxy.port, ca_file), Noted(proxy.port, ca_file)
        secrets = [KEY.encode(), *talk(first, second)]
        server.begin_drain(0.2)  # GOAWAY
        for client in (first, second):
            client.rest_until_closed()
            client.close()
        server.join()
        noted = first.frames + second.frames
        assert {frame.kind for frame in noted} == set(range(1, 10))
        yield Conversation(folder, proxy.capture.write(folder / "capture.pcap"), keys, noted, secrets)


def talk(first: Noted, second: Noted) -> list[bytes]:
    """What only a client that writes its frames by hand says; the secrets that were in it."""
    first.open_session("ada")
    second.open_session("ada")
    secrets = [first.token, second.token, second.opened["refresh_token"]]
    # Many frames in one record, answered in any order.
    first.send(*(first.request("echo", {"n": n}) for n in range(20)))
    first.answers(20)
    # One frame in many records, and in many segments.
    large = first.request("echo", {"data": LARGE})
    for start in range(0, len(large), 30_000):
        first.send(large[start : start + 30_000])
    first.answer()
    small = first.request("echo", {"data": "in three pieces"})
    for piece in (small[:3], small[3:50], small[50:]):
        first.send(piece)
        time.sleep(0.005)  # else one write could be read with the next
    first.answer()
    assert first.is_open()  # PING, PONG
    first.send(first.request("sleep", {"ms": 60_000}))
    first.cancel(first.stream)
    assert first.answer().code == 1
    # Secrets beside the tokens.
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
    # A frame that comes twice is the end: ERROR on stream 0.
    third = Noted(first.tls.getpeername()[1], _ca_file(first))
    third.send(third.frame(PING, counter=5), third.frame(PING, counter=5))
    assert third.rest_until_closed()[0][-1].stream == 0
    third.close()
    first.frames += third.frames
    return secrets


def _ca_file(client: Noted) -> Path:
    return next(path for path, context in helpers._contexts.items() if context is client.tls.context)


@pytest.fixture(scope="module")
def shown(conversation: Conversation) -> dict[str, str]:
    """All that tshark prints of the conversation, by the way in which it prints it."""
    keys = ("-o", f"tls.keylog_file:{conversation.keys}")
    outputs = {
        "json": ("-T", "json"),
        "pdml": ("-T", "pdml"),
        "text": ("-V", "-P"),
        "secrets": ("-T", "json", "-o", "zcp.show_secrets:TRUE"),
    }
    return {
        name: tshark(conversation.folder, conversation.packets, *keys, *options)
        for name, options in outputs.items()
    }


def whole(output: str) -> list[Item]:
    return [item for item in items_of(output) if item.get("zcp.length") is not None]


def by_frame(items: Sequence[Item]) -> dict[tuple[str | None, ...], Item]:
    return {
        tuple(map(item.get, ("zcp.sender", "zcp.salt", "zcp.counter", "zcp.kind"))): item for item in items
    }


SECRET = {
    "params.key": ", masked",
    "params.code": "9 bytes, masked",
    "params.signature": "64 bytes, masked",
    "params.spell": "11 bytes, masked",
    "params.refresh_token": "32 bytes, masked",
    "result.token": "32 bytes, masked",
    "result.refresh_token": "32 bytes, masked",
}


@pytest.mark.parametrize("output", ["json", "secrets"])
def test_each_field_of_each_frame_is_shown_with_its_value(
    output: str, conversation: Conversation, shown: dict[str, str]
) -> None:
    items = whole(shown[output])
    found = by_frame(items)
    for frame in conversation.noted:
        sender = SIDES.get(frame.kind)
        for side in (sender,) if sender else ("client", "server"):
            item = found.get((side, frame.salt.hex(":"), str(frame.counter), str(frame.kind)))
            if item is not None:
                break
        assert item is not None, frame
        check(item, frame, secret=SECRET if output == "json" else None)
    assert len(items) > len(conversation.noted), "those of the library's client, too"


def forms(secret: bytes) -> set[str]:
    """How a secret, or the first half of a long one, can be written."""
    found = set()
    for part in {secret, secret[: len(secret) // 2] if len(secret) >= 32 else secret}:
        found |= {part.hex(), part.hex(":"), part.hex(" ")}
        text = base64.urlsafe_b64encode(part).decode().rstrip("=")
        found.add(text[:-1])  # the last character has bits of what follows
        found.add(base64.b64encode(part).decode().rstrip("=")[:-1])
        with suppress(UnicodeDecodeError):
            if (text := part.decode()).isprintable():
                found.add(text)
    return found


@pytest.mark.parametrize("output", ["json", "pdml", "text"])
def test_secrets_are_masked(output: str, conversation: Conversation, shown: dict[str, str]) -> None:
    printed = shown[output].lower()
    for secret in conversation.secrets:
        assert not [form for form in forms(secret) if form.lower() in printed]


def test_secrets_are_shown_to_those_that_say_so(conversation: Conversation, shown: dict[str, str]) -> None:
    for secret in conversation.secrets:
        assert any(form in shown["secrets"] for form in forms(secret)), secret


def test_sessions_are_told_apart_by_the_numbers_of_their_tokens(shown: dict[str, str]) -> None:
    items = whole(shown["json"])
    opened = [item for item in items if item.get("zcp.kind") == str(RESPONSE) and masked_token(item)]
    numbers = [masked_token(item) for item in opened]
    assert len(set(numbers)) == len(numbers) == 4, "three were opened, one was refreshed"
    used = {number for item in items for number in item.all("zcp.token_number")}
    assert used <= set(numbers)


def masked_token(item: Item) -> str | None:
    """The number of the token in a result."""
    for path, field, value in item.values:
        if path == "result.token" and field == "zcp.value.masked":
            return value.split(",")[0].removeprefix("#")
    return None


def test_secrets_are_masked_in_frames_that_are_wrong() -> None:
    secret = b"a secret of thirty-two bytes: 32"
    params = {"scheme": "api_key", "user": "ada", "key": secret.decode(), "client": "test/1"}
    right = msgpack.packb(["session.open", params])
    bodies = [
        right[:-4],
        right + b"\xc0",
        right.replace(b"\xa4user", b"\xc0\xc0\xc0\xc0\xc0"),  # a key that is no str
        right.replace(b"\xa3ada", b"\xa3\xff\xff\xff"),  # no UTF-8
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
        connection.says("client", HEADER.pack(64 + len(body), 1, REQUEST, *header) + body, 0)
    for version, kind in ((2, REQUEST), (1, PING), (1, 0x10), (1, RESPONSE)):
        body = msgpack.packb({"token": secret})
        connection.says("client", HEADER.pack(64 + len(body), version, kind, *header) + body, 0)
    connection.says("client", HEADER.pack(2**31, 1, REQUEST, *header) + right, 0)
    with readable_folder() as folder:
        path = capture.write(folder / "wrong.pcap")
        for options in (("-T", "pdml", "-J", "zcp"), ("-T", "json", "-J", "zcp"), ("-V", "-P")):
            output = tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", *options).lower()
            assert "session.open" in output
            for form in forms(secret) | forms(secret[1:]) | forms(secret[2:]):
                assert form.lower() not in output


@pytest.mark.parametrize("output", ["json", "pdml", "text"])
def test_nothing_is_marked_as_malformed(output: str, shown: dict[str, str]) -> None:
    assert "_ws.malformed" not in shown[output]
    assert "Malformed" not in shown[output]
    assert "_ws.lua.error" not in shown[output]
    assert "Lua Error" not in shown[output]


def test_nothing_is_told_of_what_is_right(shown: dict[str, str]) -> None:
    told = {(item.get("zcp.kind"), name) for item in items_of(shown["json"]) for name in item.experts}
    # The frame that was sent twice, and answers that are errors.
    assert told == {(str(PING), "replayed"), (str(ERROR), "failed"), (str(ERROR), "fatal")}


def test_each_packet_says_what_is_in_it(shown: dict[str, str]) -> None:
    lines = [line for line in shown["text"].splitlines() if " ZCP " in line]
    text = "\n".join(lines)
    for told in ("WELCOME", "REQUEST 1 session.open", "ERROR 4 UNIMPLEMENTED", "CANCEL 5", "PING, PING"):
        assert f" {told}" in text
    for told in ("PONG, ERROR REPLAYED", "EVENT session.revoked", "GOAWAY draining", "RESPONSE 3 echo"):
        assert f" {told}" in text
    assert any(line.endswith("REQUEST 8 echo, REQUEST 9 echo, …") for line in lines)


def test_requests_and_answers_lead_to_each_other(shown: dict[str, str]) -> None:
    items = whole(shown["json"])
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
    assert 0.04 < float(answer.get("zcp.time") or 0) < 10


def test_parts_of_a_frame_lead_to_where_it_begins_and_ends(shown: dict[str, str]) -> None:
    parts = [item for item in items_of(shown["json"]) if item.get("zcp.length") is None]
    assert len(parts) > 20
    complete = {str(item.packet) for item in whole(shown["json"])}
    for part in parts:
        assert part.get("zcp.complete_in") in complete
    assert sum(part.get("zcp.begins_in") is None for part in parts) == 5, (
        "the large frames, and the small one"
    )


def test_a_capture_without_the_keys_shows_no_frames(conversation: Conversation) -> None:
    output = tshark(conversation.folder, conversation.packets, "-T", "json")
    assert items_of(output) == []


# --- the frames of the vectors --------------------------------------------------------------------------


def vectors() -> list[dict[str, Any]]:
    names = ("frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments")
    found = []
    for name in names:
        document = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
        found += [each for each in document["vectors"] if "bytes" in each]
    return found


def pack(
    kind: int, stream: int, now: int, salt: bytes, counter: int, token: bytes, body: Any = None
) -> bytes:
    encoded = b"" if body is None else msgpack.packb(body)
    return HEADER.pack(64 + len(encoded), 1, kind, 0, stream, now, salt, counter, token) + encoded


def before(context: dict[str, Any], receiver: str) -> list[tuple[str, bytes]]:
    """Frames after which a connection is in the state of a vector's context; the side that sends each."""
    if context["salt"] is None:
        return []
    now, salt, last = int(context["now"]), bytes.fromhex(context["salt"]), int(context["last_counter"])
    welcome = {
        "server": "zcproto",
        "versions": [1],
        "max_frame": 2**20,
        "max_streams": 128,
        "idle_timeout_ms": 0,
        "tolerance_ms": context["tolerance_ms"],
        "sts": {"max_age": 0, "include_subdomains": False},
    }
    token = bytes.fromhex(context["tokens"][0]) if context["tokens"] else NO_TOKEN
    frames = [("server", pack(WELCOME, 0, now, salt, 0, NO_TOKEN, welcome))]
    for number, stream in enumerate(context["in_flight"], 1):
        # Where the vector's own frame has counter 1, there is none left but 0, which uses up nothing.
        counter = number if receiver == "client" else max(last - len(context["in_flight"]) + number, 0)
        counter = counter if receiver == "client" else min(counter, last)
        frames.append(("client", pack(REQUEST, stream, now, salt, counter, token, ["echo", None])))
    if last and (receiver == "client" or not context["in_flight"]):
        side = "client" if receiver == "server" else "server"
        frames.append((side, pack(PING, 0, now, salt, last, NO_TOKEN)))
    return frames


EXPERTS = {
    "header": {"length", "version", "kind", "sender", "flags", "stream"},
    "greeting": {"greeting"},
    "freshness": {"replayed", "stale"},
    "stream": {"in_flight"},
    "body": {"msgpack", "trailing", "form", "body"},
    "content": {"form"},
}
"""What may be told of a frame with a fault, by the check that finds it. It knows no tokens."""

ANY = set().union(*EXPERTS.values())

Judged = list[tuple[dict[str, Any], list[Item]]]


@pytest.fixture(scope="module")
def judged() -> Judged:
    """Each vector, and what the dissector makes of its bytes in their place in a connection, cut anywhere."""
    capture, cut, places, count = Capture(), random.Random(11), [], 0
    for vector in vectors():
        at = int(vector["context"]["now"]) * 1_000
        connection = capture.connection(PORT, at)
        for side, frame in before(vector["context"], vector["receiver"]):
            connection.says(side, frame, at)
        data, side = bytes.fromhex(vector["bytes"]), "client" if vector["receiver"] == "server" else "server"
        first = len(capture.packets) + 1
        edges = sorted({0, len(data), *(cut.randrange(len(data) + 1) for _ in range(cut.randrange(3)))})
        for start, end in pairwise(edges):
            connection.says(side, data[start:end], at)
        places.append((vector, range(first, len(capture.packets) + 1)))
        count += 1
    assert count > 400
    with readable_folder() as folder:
        path = capture.write(folder / "vectors.pcap")
        output = tshark(
            folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json", "-o", "zcp.show_secrets:TRUE"
        )
    assert "_ws.malformed" not in output
    assert "_ws.lua.error" not in output
    items: dict[int, list[Item]] = {}
    for item in items_of(output):
        items.setdefault(item.packet, []).append(item)
    return [(vector, [item for n in packets for item in items.get(n, [])]) for vector, packets in places]


def frames_in(vector: dict[str, Any]) -> Iterator[tuple[int, Frame]]:
    """The frames of a vector that are taken, with their places among all of it."""
    for index, outcome in enumerate(vector["expect"]):
        if outcome["result"] == "frame":
            yield (
                index,
                Frame(
                    KINDS[outcome["kind"]],
                    outcome["stream"],
                    int(outcome["timestamp"]),
                    bytes.fromhex(outcome["salt"]),
                    int(outcome["counter"]),
                    bytes.fromhex(outcome["token"]),
                    bytes.fromhex(outcome["body"]),
                ),
            )


def test_frames_of_the_vectors_are_shown_with_their_values(
    judged: Judged,
) -> None:
    checked = 0
    for vector, items in judged:
        heads = [item for item in items if item.get("zcp.length") is not None]
        for index, frame in frames_in(vector):
            check(heads[index], frame)
            # STALE_TIMESTAMP is heard by a client even if it is stale itself.
            heard = {"stale"} if frame.kind == ERROR else set()
            assert heads[index].experts & ANY <= heard, vector["name"]
            checked += 1
    assert checked > 150


def test_what_is_wrong_with_a_frame_is_told(judged: Judged) -> None:
    checked = 0
    for vector, items in judged:
        heads = [item for item in items if item.get("zcp.length") is not None]
        for index, outcome in enumerate(vector["expect"]):
            if (
                outcome["result"] != "error"
                or outcome["stage"] not in EXPERTS
                or beyond_sight(vector, outcome)
            ):
                continue
            assert heads[index].experts & EXPERTS[outcome["stage"]], (vector["name"], heads[index])
            checked += 1
    assert checked > 200


def beyond_sight(vector: dict[str, Any], outcome: dict[str, Any]) -> bool:
    """Whether the fault is a length above a limit that only the receiver knows: that of no session."""
    return outcome["name"] == "FRAME_TOO_LARGE" and int(vector["bytes"][:8], 16) <= 2**20


def test_the_beginning_of_a_frame_is_told_as_one(judged: Judged) -> None:
    checked = 0
    for vector, items in judged:
        if (
            vector["expect"]
            and vector["expect"][-1]["result"] == "incomplete"
            and vector["expect"][-1]["have"]
        ):
            assert items[-1].get("zcp.length") is None, vector["name"]
            assert items[-1].experts == set()
            checked += 1
    assert checked > 5


# --- bytes of anybody -----------------------------------------------------------------------------------


def harmed(frame: bytes, random: random.Random) -> bytes:
    """A frame with some bytes changed, cut off, put in or doubled."""
    data = bytearray(frame)
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(data))
        match random.randrange(5):
            case 0:
                data[at] = random.randrange(256)
            case 1:
                data[at] ^= 1 << random.randrange(8)
            case 2:
                data[at:at] = random.randbytes(random.randrange(1, 9))
            case 3:
                del data[at : at + random.randrange(1, 9)]
            case _:
                data += data[at:]
    if len(data) >= HEADER.size and random.random() < 0.7:  # else most have a wrong length, and that is all
        data[:4] = struct.pack("!I", len(data) - 4)
    return bytes(data) or b"\0"


def first_welcome() -> bytes:
    document = json.loads((VECTORS / "conversation.json").read_text(encoding="utf-8"))
    return bytes.fromhex(document["vectors"][0]["bytes"])


def test_no_bytes_make_it_fail() -> None:
    chance, capture, sent = random.Random(13), Capture(), 0
    welcome = first_welcome()
    frames = [bytes.fromhex(vector["bytes"]) for vector in vectors() if 0 < len(vector["bytes"]) < 4_000]
    for number in range(300):
        connection = capture.connection(PORT, number * 1_000_000)
        if number % 2:
            connection.says("server", welcome, number * 1_000_000)
        for _ in range(chance.randrange(1, 5)):
            data, side = harmed(chance.choice(frames), chance), chance.choice(("client", "server"))
            for piece in (data[:40], data[40:]):
                connection.says(side, piece, number * 1_000_000)
            sent += 1
    assert sent > 600
    with readable_folder() as folder:
        path = capture.write(folder / "harmed.pcap")
        output = tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json")
    assert "_ws.malformed" not in output
    assert "_ws.lua.error" not in output
    items = items_of(output)
    told = set().union(*(item.experts for item in items))
    assert told >= ANY - {"stale"}, "all kinds of faults were among them"


def test_a_large_body_of_small_values_is_looked_at_in_bounds() -> None:
    count = 2**17
    body = b"\x92\xa4echo\x81\xa1a\xdd" + struct.pack("!I", count) + b"\x01" * count
    frame = HEADER.pack(64 + len(body), 1, REQUEST, 0, 1, 0, bytes(8), 1, NO_TOKEN) + body
    capture = Capture()
    capture.connection(PORT, 0).says("client", frame, 0)
    with readable_folder() as folder:
        path = capture.write(folder / "large.pcap")
        (item,) = whole(tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json"))
    assert item.experts & {"cut_short", "msgpack"} == {"cut_short"}
    assert 1_000 < len(item.values) < 10_000


# --- where it is found ----------------------------------------------------------------------------------


def test_where_the_alpn_is_not_known_the_port_names_it(conversation: Conversation) -> None:
    for port, named in ((PORT, False), (OTHER_PORT, True)):
        output = tshark(conversation.folder, conversation.packets, "-o", f"zcp.port:{port}", "-T", "json")
        assert ('"tls.app_data_proto": "ZCP/1"' in output) == named


def test_a_port_used_again_is_another_conversation() -> None:
    capture, first = Capture(), first_welcome()
    second = first[:20] + bytes(8) + first[28:]
    for at, data in ((0, first), (1_000_000, second)):
        connection = capture.connection(PORT, at, client_port=50_000)
        connection.says("server", data, at)
        connection.says("server", data[:30], at)  # cut off
    with readable_folder() as folder:
        path = capture.write(folder / "again.pcap")
        items = whole(tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json"))
    assert [item.experts for item in items] == [set(), set()]


@pytest.mark.parametrize("alpn", ["http/1.1", None])
def test_https_on_the_same_port_is_left_to_wireshark(alpn: str | None, certs: Path, tmp_path: Path) -> None:
    with (
        readable_folder() as folder,
        ServerThread(tmp_path / "home", certs) as server,
        RecordingProxy(server.port) as proxy,
    ):
        context = helpers.client_context(server.home / "certs" / "ca.crt", [alpn] if alpn else [])
        context.keylog_filename = str(folder / "keys")
        raw = socket.create_connection(("127.0.0.1", proxy.port), timeout=30)
        with context.wrap_socket(raw, server_hostname="localhost") as tls:
            tls.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while tls.recv(65_536):
                pass
        path = proxy.capture.write(folder / "https.pcap")
        output = tshark(folder, path, "-o", f"tls.keylog_file:{folder / 'keys'}", "-T", "json")
    names = [name for _, layers in layers_of(output) for name, _ in layers]
    assert names.count("http") == 2
    assert "zcp" not in names


def test_a_live_capture_is_shown(certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path / "client"))
    with readable_folder() as folder, ServerThread(tmp_path / "home", certs) as server:
        path, keys = tmp_path / "live.pcap", folder / "keys"
        command = ["dumpcap", "-q", "-P", "-i", "lo", "-f", f"tcp port {server.port}", "-w", str(path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as dumpcap:
            try:
                wait_for_capture(dumpcap)
                ca_file = server.home / "certs" / "ca.crt"
                options: dict[str, Any] = {
                    "user": "ada",
                    "key": KEY,
                    "ca_file": ca_file,
                    "key_log_file": keys,
                }
                with zcproto.connect_blocking(f"127.0.0.1:{server.port}", **options) as client:
                    assert client.call("echo", live=True) == {"live": True}
                eventually(lambda: quiet(path))
            finally:
                dumpcap.send_signal(signal.SIGINT)
        shutil.copy(path, folder / "live.pcap")
        output = tshark(folder, folder / "live.pcap", "-o", f"tls.keylog_file:{keys}", "-T", "json")
    methods = [item.get("zcp.method") for item in whole(output) if item.get("zcp.method")]
    assert methods == ["session.open", "echo", "session.close"]


def wait_for_capture(dumpcap: subprocess.Popen[str]) -> None:
    """Wait until dumpcap captures; skip the test where it may not."""
    assert dumpcap.stderr is not None
    said = []
    for line in dumpcap.stderr:
        said.append(line)
        if line.startswith("File:"):
            return
    dumpcap.wait()
    pytest.skip(f"capturing is not permitted here: {' '.join(said).strip()}")


def quiet(path: Path) -> bool:
    """Whether nothing more was captured for a while."""
    before = path.stat().st_size
    time.sleep(0.3)
    return 1_000 < path.stat().st_size == before
