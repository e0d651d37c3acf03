"""Test the Wireshark dissector with tshark on the frames of the test vectors and on damaged frames."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgpack
import pytest

from tests.interop.capture import Capture, Item, items_in, readable_folder, tshark
from tests.interop.support import needs
from tests.interop.wireshark import KINDS, PORT, VECTORS, check_item, complete_items, first_welcome
from tests.server.helpers import (
    CANCEL,
    ERROR,
    HEADER,
    NO_TOKEN,
    PING,
    REQUEST,
    WELCOME,
    Frame,
)

pytestmark = needs("tshark")


def vectors() -> list[dict[str, Any]]:
    names = (
        *("frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments"),
        *("streaming/items", "streaming/calls"),
    )
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


def frames_before(context: dict[str, Any], receiver: str) -> list[tuple[str, bytes]]:
    """Return frames, each with its sender, that bring a connection into the state of a vector's context."""
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
    welcome |= {key: value for key, value in context.get("announced", {}).items() if value is not None}
    token = bytes.fromhex(context["tokens"][0]) if context["tokens"] else NO_TOKEN
    frames = [("server", pack(WELCOME, 0, now, salt, 0, NO_TOKEN, welcome))]
    for number, stream in enumerate(context["in_flight"], 1):
        # If the vector's frame has counter 1, these frames have counter 0.
        counter = number if receiver == "client" else max(last - len(context["in_flight"]) + number, 0)
        counter = counter if receiver == "client" else min(counter, last)
        frames.append(("client", pack(REQUEST, stream, now, salt, counter, token, ["echo", None])))
    for opened in context.get("open", ()):  # their counters are those of other frames: only they are marked
        meta = {"credit": opened["granted" if receiver == "client" else "credit"]}
        body = ["m", None, meta]
        frames.append(("client", pack(KINDS["OPEN"], opened["stream"], now, salt, 0, token, body)))
        if opened["ended"]:
            frames.append(("client", pack(KINDS["END"], opened["stream"], now, salt, 0, token)))
    for number in context.get("calls", ()):
        body = ["approve", None, {"deadline_ms": 1}]
        frames.append(("server", pack(KINDS["CALL"], number, now, salt, 0, token, body)))
    if last and (receiver == "client" or not context["in_flight"]):
        side = "client" if receiver == "server" else "server"
        frames.append((side, pack(PING, 0, now, salt, last, NO_TOKEN)))
    return frames


EXPERTS_BY_STAGE = {
    "header": {"length", "version", "kind", "sender", "flags", "stream"},
    "greeting": {"greeting"},
    "freshness": {"replayed", "stale"},
    "stream": {"in_flight", "ended", "unopened"},
    "body": {"msgpack", "trailing", "form", "body"},
    "content": {"form"},
}
"""Expert infos of a faulty frame, by the stage that detects the fault. The dissector does not check tokens."""

ALL_EXPERTS = set().union(*EXPERTS_BY_STAGE.values())

Dissected = list[tuple[dict[str, Any], list[Item]]]


@pytest.fixture(scope="module")
def dissected() -> Dissected:
    """Dissect the bytes of each vector within a connection, divided at random."""
    capture, rng, places, count = Capture(), random.Random(11), [], 0
    for vector in vectors():
        at = int(vector["context"]["now"]) * 1_000
        connection = capture.connection(PORT, at)
        for side, frame in frames_before(vector["context"], vector["receiver"]):
            connection.send(side, frame, at)
        data, side = bytes.fromhex(vector["bytes"]), "client" if vector["receiver"] == "server" else "server"
        first = len(capture.packets) + 1
        edges = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.randrange(3)))})
        for start, end in pairwise(edges):
            connection.send(side, data[start:end], at)
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
    for item in items_in(output):
        items.setdefault(item.packet, []).append(item)
    return [(vector, [item for n in packets for item in items.get(n, [])]) for vector, packets in places]


def frames_in(vector: dict[str, Any]) -> Iterator[tuple[int, Frame]]:
    """Yield the accepted frames of a vector with their positions."""
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


def test_all_fields_of_vector_frames_are_shown(
    dissected: Dissected,
) -> None:
    checked = 0
    for vector, items in dissected:
        heads = [item for item in items if item.get("zcp.length") is not None]
        for index, frame in frames_in(vector):
            check_item(heads[index], frame)
            # STALE_TIMESTAMP and CANCEL are processed even if the frame itself is stale.
            allowed = {"stale"} if frame.kind in (ERROR, CANCEL, KINDS["WITHDRAW"]) else set()
            assert heads[index].experts & ALL_EXPERTS <= allowed, vector["name"]
            checked += 1
    assert checked > 150


def test_faulty_vector_frame_has_expert_info(dissected: Dissected) -> None:
    checked = 0
    for vector, items in dissected:
        heads = [item for item in items if item.get("zcp.length") is not None]
        for index, outcome in enumerate(vector["expect"]):
            if (
                outcome["result"] != "error"
                or outcome["stage"] not in EXPERTS_BY_STAGE
                or is_undetectable(vector, outcome)
            ):
                continue
            assert heads[index].experts & EXPERTS_BY_STAGE[outcome["stage"]], (vector["name"], heads[index])
            checked += 1
    assert checked > 200


def is_undetectable(vector: dict[str, Any], outcome: dict[str, Any]) -> bool:
    """Return whether only the receiver can check the fault.

    It is a length above the limit without session or of an item, a late item too many, or a CALL of a method that
    was not registered.
    """
    if outcome["name"] == "FRAME_TOO_LARGE":
        return int(vector["bytes"][:8], 16) <= 2**20
    return "late" in vector["flags"] or vector["name"] == "call-never-registered"


def test_incomplete_vector_frame_is_shown_as_segment(dissected: Dissected) -> None:
    checked = 0
    for vector, items in dissected:
        if (
            vector["expect"]
            and vector["expect"][-1]["result"] == "incomplete"
            and vector["expect"][-1]["have"]
        ):
            assert items[-1].get("zcp.length") is None, vector["name"]
            assert items[-1].experts == set()
            checked += 1
    assert checked > 5


# --- damaged frames -------------------------------------------------------------------------------------


def test_durable_stream_is_shown_and_its_faults_are_marked() -> None:
    welcome = {
        "server": "s",
        "versions": [1],
        "max_frame": 1_048_576,
        "max_streams": 8,
        "idle_timeout_ms": 0,
        "tolerance_ms": 30_000,
        "sts": {"max_age": 0, "include_subdomains": False},
        "streams": {"max_open": 4, "max_item": 65_536, "durable": True},
    }
    salt, token = bytes(7) + b"s", b"t" * 32
    run = {"id": "r", "attachment": "a", "from": 3, "state": "running", "first": 0, "next": 9}
    opened = ["chat", None, {"credit": [8, 8_000], "resume": {"id": "r", "from": 3}}]
    plain = ["chat", {}, {"credit": [8, 8_000]}]
    frames = [
        ("server", pack(WELCOME, 0, 1, salt, 0, NO_TOKEN, welcome)),
        ("client", pack(KINDS["OPEN"], 1, 1, salt, 1, token, opened)),
        ("server", pack(KINDS["ACCEPTED"], 1, 1, salt, 1, token, run)),
        ("client", pack(KINDS["CREDIT"], 1, 1, salt, 2, token, [9, 8_000, 3])),
        ("client", pack(KINDS["OPEN"], 2, 1, salt, 3, token, plain)),
        ("client", pack(KINDS["CREDIT"], 2, 1, salt, 4, token, [9, 8_000, 3])),
    ]
    capture = Capture()
    connection = capture.connection(PORT, 0)
    for side, frame in frames:
        connection.send(side, frame, 0)
    with readable_folder() as folder:
        path = capture.write(folder / "durable.pcap")
        items = [*items_in(tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json"))]
    greeting, resumed, accepted, credit, _, refused = items
    assert greeting.get("zcp.welcome.streams.durable") is not None
    assert resumed.get("zcp.meta.resume") is not None
    assert accepted.get("zcp.accepted") is not None
    assert credit.get("zcp.credit.taken") == "3"
    assert [each.experts & ALL_EXPERTS for each in items] == [set()] * 5 + [{"form"}]
    assert refused.get("zcp.credit.taken") == "3"


def damaged(frame: bytes, random: random.Random) -> bytes:
    """Return a frame with some bytes changed, removed, inserted or repeated."""
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
    if len(data) >= HEADER.size and random.random() < 0.7:  # otherwise most only have a wrong length
        data[:4] = struct.pack("!I", len(data) - 4)
    return bytes(data) or b"\0"


def test_damaged_frames_do_not_break_the_dissector() -> None:
    rng, capture, sent = random.Random(14), Capture(), 0
    welcome = first_welcome()
    frames = [bytes.fromhex(vector["bytes"]) for vector in vectors() if 0 < len(vector["bytes"]) < 4_000]
    for number in range(300):
        connection = capture.connection(PORT, number * 1_000_000)
        if number % 2:
            connection.send("server", welcome, number * 1_000_000)
        for _ in range(rng.randrange(1, 5)):
            data, side = damaged(rng.choice(frames), rng), rng.choice(("client", "server"))
            for piece in (data[:40], data[40:]):
                connection.send(side, piece, number * 1_000_000)
            sent += 1
    assert sent > 600
    with readable_folder() as folder:
        path = capture.write(folder / "damaged.pcap")
        output = tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json")
    assert "_ws.malformed" not in output
    assert "_ws.lua.error" not in output
    items = items_in(output)
    reported = set().union(*(item.experts for item in items))
    assert reported >= ALL_EXPERTS - {"stale", "ended"}, "every kind of fault occurred"


def test_number_of_shown_values_is_limited() -> None:
    count = 2**17
    body = b"\x92\xa4echo\x81\xa1a\xdd" + struct.pack("!I", count) + b"\x01" * count
    frame = HEADER.pack(64 + len(body), 1, REQUEST, 0, 1, 0, bytes(8), 1, NO_TOKEN) + body
    capture = Capture()
    capture.connection(PORT, 0).send("client", frame, 0)
    with readable_folder() as folder:
        path = capture.write(folder / "large.pcap")
        (item,) = complete_items(tshark(folder, path, "-d", f"tcp.port=={PORT},zcp", "-T", "json"))
    assert item.experts & {"cut_short", "msgpack"} == {"cut_short"}
    assert 1_000 < len(item.values) < 10_000
