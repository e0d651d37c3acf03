"""Compute the fields that the Wireshark dissector must show for a frame, and check tshark's output."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack

from tests.interop.capture import Item, items_in
from tests.server.helpers import (
    ERROR,
    EVENT,
    GOAWAY,
    NO_TOKEN,
    REQUEST,
    RESPONSE,
    WELCOME,
    Frame,
)

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
KINDS: dict[str, int] = {
    name: kind
    for file in ("tables.json", "streaming/tables.json")
    for name, kind in json.loads((VECTORS / file).read_text(encoding="utf-8"))["kinds"].items()
}
PORT = 7443
OTHER_PORT = 9443
"""A port that is not configured; ALPN identifies the protocol."""

NAMED_FIELDS = {
    ("meta.deadline_ms", int): "zcp.meta.deadline_ms",
    ("meta.idempotency_key", str): "zcp.meta.idempotency_key",
    ("meta.traceparent", str): "zcp.meta.traceparent",
    ("meta.pending", str): "zcp.meta.pending",
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
    ("welcome.streams.max_open", int): "zcp.welcome.streams.max_open",
    ("welcome.streams.max_item", int): "zcp.welcome.streams.max_item",
    ("welcome.calls.max", int): "zcp.welcome.calls.max",
    ("items", int): "zcp.credit.items",
    ("bytes", int): "zcp.credit.bytes",
}
"""Fields of well-known values, by path and type."""

MAP_FIELDS = {
    REQUEST: ("zcp.params", "zcp.meta"),
    RESPONSE: ("zcp.result",),
    ERROR: ("zcp.error.details",),
    EVENT: ("zcp.event.data",),
    GOAWAY: ("zcp.goaway",),
    WELCOME: ("zcp.welcome",),
    KINDS["OPEN"]: ("zcp.params", "zcp.meta"),
    KINDS["ITEM"]: ("zcp.item",),
    KINDS["CALL"]: ("zcp.params", "zcp.meta"),
    KINDS["RESULT"]: ("zcp.result",),
    KINDS["FAILURE"]: ("zcp.error.details",),
}
"""Fields for maps, by kind of frame; each is present if the frame has the map."""


def leaves(value: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield path, field and text of each leaf of a value, as tshark prints them."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{escape_text(key)}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, f"{path}[{index}]")
    else:
        field, text = leaf(value)
        yield path, field if field == "zcp.value.uint" else NAMED_FIELDS.get((path, type(value)), field), text


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


ELEMENTS = {
    REQUEST: ["method", "params", "meta"],
    ERROR: ["code", "message", "details"],
    EVENT: ["name", "data"],
    KINDS["OPEN"]: ["method", "params", "meta"],
    KINDS["CALL"]: ["method", "params", "meta"],
    KINDS["FAILURE"]: ["code", "message", "details"],
    KINDS["CREDIT"]: ["items", "bytes"],
}
"""Names of the elements of a body that is an array, by kind."""

WHOLE = {
    WELCOME: "welcome",
    RESPONSE: "result",
    GOAWAY: "goaway",
    KINDS["ITEM"]: "item",
    KINDS["RESULT"]: "result",
}
"""Names of other bodies, by kind."""


def body_leaves(frame: Frame) -> Iterator[tuple[str, str, str]]:
    value = msgpack.unpackb(frame.body, max_array_len=10**6, strict_map_key=False)
    elements = ELEMENTS.get(frame.kind)
    if elements is None:
        yield from leaves(value, WHOLE[frame.kind])
        return
    for name, each in zip(elements, value, strict=False):
        yield from leaves(each, name)


def is_same_value(found: str, expected: str, field: str) -> bool:
    if field == "zcp.value.float":
        return math.isclose(float(found), float(expected), rel_tol=1e-12) or found == expected
    return found == expected.replace("\0", "\u2400")  # Wireshark ends text at a NUL


def check_item(item: Item, frame: Frame, *, masked: Mapping[str, str] | None = None) -> None:
    """Assert that all fields of a frame are shown. `masked` gives the end of the text of masked values, by path."""
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
        expected = time.gmtime(frame.timestamp // 1000)
        assert shown[:6] == expected[:6]
        assert moment.split(".")[1].startswith(f"{frame.timestamp % 1000:03}")
    assert item.get("zcp.salt") == frame.salt.hex(":")
    assert item.get("zcp.counter") == str(frame.counter)
    token = item.get("zcp.token")
    if frame.token == NO_TOKEN:
        assert token == "none"
    elif masked is None:
        assert token == frame.token.hex()
    else:
        assert token == f"#{item.get('zcp.token_number')}, 32 bytes, masked"
    if not frame.body:
        assert item.values == []
        return
    expected_values = list(body_leaves(frame))
    assert len(item.values) == len(expected_values), (item.values, expected_values)
    for (path, field, found), (expected_path, expected_field, expected_text) in zip(
        item.values, expected_values, strict=True
    ):
        assert path == expected_path
        if masked is not None and path in masked:
            assert field == "zcp.value.masked"
            assert found.endswith(masked[path])
            continue
        assert field == expected_field, path
        assert is_same_value(found, expected_text, field), path
    for name in MAP_FIELDS.get(frame.kind, ()):
        where = {"zcp.error.details": "details", "zcp.event.data": "data"}.get(
            name, name.removeprefix("zcp.")
        )
        deeper = [path for path, _, _ in expected_values if path.startswith((f"{where}.", f"{where}["))]
        assert item.get(name) is not None or not deeper


def complete_items(output: str) -> list[Item]:
    return [item for item in items_in(output) if item.get("zcp.length") is not None]


def first_welcome() -> bytes:
    document = json.loads((VECTORS / "conversation.json").read_text(encoding="utf-8"))
    return bytes.fromhex(document["vectors"][0]["bytes"])
