"""Valid bodies, in every form that msgpack allows."""

from __future__ import annotations

import math
from typing import Any

from makers import forms as f
from makers.forms import KINDS, LIMIT_BEFORE_SESSION, TOKEN, Frame, pack
from makers.frames import TRACEPARENT
from makers.shape import Json, accepted, request, typed, vector

SUBJECT = "Valid bodies, in every form that msgpack allows."
NOTES = {
    "boundary": "The largest or smallest value allowed; catches comparisons that are off by one.",
    "longer-form": "A valid form that is not the shortest; catches decoders that require the shortest.",
    "integer-width": "A value above 2^31 or 2^53; catches signed or floating-point integers.",
    "unicode": "Text outside ASCII; catches lengths counted in bytes or in UTF-16 units.",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_."


def vectors() -> list[Json]:
    return [*_numbers(), *_texts(), *_containers(), *_depths(), *_requests(), *_sizes()]


def _value(name: str, summary: str, form: bytes, value: Any, *flags: str) -> Json:
    frame = Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, body=form)
    return vector(name, summary, "client", frame, accepted(frame, {"value": typed(value)}), flags=flags)


def _numbers() -> list[Json]:
    longer, wide, edge = "longer-form", "integer-width", "boundary"
    return [
        _value("int-0", "Positive fixint.", b"\x00", 0),
        _value("int-127", "The largest positive fixint.", b"\x7f", 127, edge),
        _value("int-minus-1", "Negative fixint.", b"\xff", -1),
        _value("int-minus-32", "The smallest negative fixint.", b"\xe0", -32, edge),
        _value("int-uint8", "uint 8.", f.uint8(255), 255, edge),
        _value("int-uint8-of-5", "uint 8 where a fixint would do.", f.uint8(5), 5, longer),
        _value("int-uint16", "uint 16.", f.uint16(65535), 65535, edge),
        _value("int-uint16-of-5", "uint 16 where a fixint would do.", f.uint16(5), 5, longer),
        _value("int-uint32", "uint 32.", f.uint32(2**32 - 1), 2**32 - 1, edge, wide),
        _value("int-uint32-of-5", "uint 32 where a fixint would do.", f.uint32(5), 5, longer),
        _value("int-uint64", "uint 64.", f.uint64(2**64 - 1), 2**64 - 1, edge, wide),
        _value("int-uint64-of-5", "uint 64 where a fixint would do.", f.uint64(5), 5, longer),
        _value("int-2-53-plus-1", "No double holds it.", f.uint64(2**53 + 1), 2**53 + 1, wide),
        _value("int-int8", "int 8.", f.int8(-128), -128, edge),
        _value("int-int8-of-5", "int 8 with a positive value.", f.int8(5), 5, longer),
        _value("int-int16", "int 16.", f.int16(-(2**15)), -(2**15), edge),
        _value("int-int32", "int 32.", f.int32(-(2**31)), -(2**31), edge),
        _value("int-int64", "int 64.", f.int64(-(2**63)), -(2**63), edge, wide),
        _value("int-int64-of-minus-1", "int 64 where a fixint would do.", f.int64(-1), -1, longer),
        _value(
            "int-int64-positive", "int 64 with a positive value.", f.int64(2**63 - 1), 2**63 - 1, longer, wide
        ),
        _value("float-32", "float 32.", f.float32(1.5), 1.5),
        _value("float-64", "float 64.", f.float64(0.1), 0.1),
        _value("float-64-whole", "A float stays a float.", f.float64(1.0), 1.0),
        _value("float-minus-zero", "The sign of zero.", f.float64(-0.0), -0.0),
        _value("float-infinity", "Infinity.", f.float64(math.inf), math.inf),
        _value("float-nan", "NaN is accepted.", f.float64(math.nan), math.nan),
        _value("float-32-infinity", "Minus infinity in 32 bits.", f.float32(-math.inf), -math.inf),
        _value("nil", "nil.", b"\xc0", None),
        _value("false", "false.", b"\xc2", False),
        _value("true", "true.", b"\xc3", True),
    ]


def _texts() -> list[Json]:
    made = [
        _value("str-empty", "fixstr of 0 bytes.", b"\xa0", ""),
        _value("str-fixstr-31", "The longest fixstr.", f.fixstr(b"x" * 31), "x" * 31, "boundary"),
        _value("str-8", "str 8 of 32 bytes.", f.str8(b"x" * 32), "x" * 32, "boundary"),
        _value("str-8-short", "str 8 where a fixstr would do.", f.str8(b"hi"), "hi", "longer-form"),
        _value("str-16", "str 16 of 256 bytes.", f.str16(b"x" * 256), "x" * 256, "boundary"),
        _value("str-16-short", "str 16 where a fixstr would do.", f.str16(b"hi"), "hi", "longer-form"),
        _value("str-32-short", "str 32 where a fixstr would do.", f.str32(b"hi"), "hi", "longer-form"),
        _value("bin-empty", "bin 8 of 0 bytes.", f.bin8(b""), b""),
        _value("bin-8", "The longest bin 8.", f.bin8(bytes(255)), bytes(255), "boundary"),
        _value("bin-16", "bin 16 of 256 bytes.", f.bin16(bytes(256)), bytes(256), "boundary"),
        _value("bin-16-short", "bin 16 where bin 8 would do.", f.bin16(b"\xff"), b"\xff", "longer-form"),
        _value("bin-32-short", "bin 32 where bin 8 would do.", f.bin32(b"\xff"), b"\xff", "longer-form"),
    ]
    for name, text in (
        ("nul", "a\0b"),
        ("two-bytes", "\u00e9\u00df\u0416"),
        ("three-bytes", "\u20ac\u65e5\u672c"),
        ("four-bytes", "\U0001f980"),
        ("combining", "e\u0301"),
        ("byte-order-mark", "\ufeffx"),
        ("last-code-point", "\U0010ffff"),
        ("line-separators", "a\u2028b\u0085c"),
        ("right-to-left", "\u05e9\u05dc\u05d5\u05dd"),
    ):
        made.append(_value(f"str-unicode-{name}", "UTF-8, kept as it is.", pack(text), text, "unicode"))
    return made


def _containers() -> list[Json]:
    pairs = {f"k{n}": n for n in range(16)}
    flat = [pack(part) for pair in pairs.items() for part in pair]
    ones = [pack(1)] * 16
    a1 = [pack("a"), pack(1)]
    return [
        _value("array-empty", "fixarray of 0.", b"\x90", []),
        _value("array-fixarray-15", "The longest fixarray.", f.fixarray(*ones[:15]), [1] * 15, "boundary"),
        _value("array-16", "array 16 of 16.", f.array16(*ones), [1] * 16, "boundary"),
        _value(
            "array-16-short", "array 16 where a fixarray would do.", f.array16(pack(1)), [1], "longer-form"
        ),
        _value(
            "array-32-short", "array 32 where a fixarray would do.", f.array32(pack(1)), [1], "longer-form"
        ),
        _value("array-16-empty", "array 16 of 0.", f.array16(), [], "longer-form"),
        _value("map-empty", "fixmap of 0.", b"\x80", {}),
        _value(
            "map-fixmap-15",
            "The longest fixmap.",
            f.fixmap(*flat[:30]),
            dict(list(pairs.items())[:15]),
            "boundary",
        ),
        _value("map-16", "map 16 of 16.", f.map16(*flat), pairs, "boundary"),
        _value("map-16-short", "map 16 where a fixmap would do.", f.map16(*a1), {"a": 1}, "longer-form"),
        _value("map-32-short", "map 32 where a fixmap would do.", f.map32(*a1), {"a": 1}, "longer-form"),
        _value("map-empty-key", "The empty str is a key.", f.fixmap(pack(""), pack(1)), {"": 1}, "boundary"),
        _value(
            "map-long-form-key", "A key in str 32.", f.fixmap(f.str32(b"a"), pack(1)), {"a": 1}, "longer-form"
        ),
        _value("map-unicode-key", "A key outside ASCII.", pack({"\u00fc": 1}), {"\u00fc": 1}, "unicode"),
        _value(
            "mixed",
            "All types in one value.",
            pack([None, True, -5, 1.5, "s", b"b", [], {}]),
            [None, True, -5, 1.5, "s", b"b", [], {}],
        ),
    ]


def nested(depth: int, innermost: Any = None) -> Any:
    """Return `depth` nested arrays."""
    value = innermost
    for _ in range(depth):
        value = [value]
    return value


def _depths() -> list[Json]:
    maps: Any = None
    for _ in range(32):
        maps = {"k": maps}
    return [
        _value("depth-32-arrays", "32 arrays in one another.", pack(nested(32)), nested(32), "boundary"),
        _value("depth-32-maps", "32 maps in one another.", pack(maps), maps, "boundary"),
        _value("depth-32-empty", "The 32nd is empty.", pack(nested(31, [])), nested(31, []), "boundary"),
        _call(
            "depth-32-in-params",
            "The outer array and the params are 2 of the 32.",
            ["echo", {"x": nested(30)}],
            "boundary",
        ),
        _call("depth-32-in-meta", "Unknown keys of meta too.", ["echo", {}, {"x": nested(30)}], "boundary"),
    ]


def _call(
    name: str, summary: str, message: list[Any], *flags: str, body: bytes | None = None, **more: Any
) -> Json:
    frame = Frame(KINDS["REQUEST"], stream=1, token=TOKEN, body=pack(message) if body is None else body)
    known = ("deadline_ms", "idempotency_key", "traceparent")
    meta = {key: typed(message[2][key]) for key in known if key in message[2]} if len(message) == 3 else None
    return vector(
        name,
        summary,
        "server",
        frame,
        accepted(frame, request(message[0], message[1], meta)),
        flags=flags,
        **more,
    )


def _requests() -> list[Json]:
    longest = (LETTERS * 4)[:128]
    echo = pack("echo")
    meta = f.map32(f.str8(b"deadline_ms"), f.int64(1500))
    bad_trace = Frame(
        KINDS["REQUEST"], stream=1, token=TOKEN, body=pack(["echo", {}, {"traceparent": "00-zz"}])
    )
    int_trace = bad_trace.but(body=pack(["echo", {}, {"traceparent": 7}]))
    ignored = request("echo", {}, meta={})
    return [
        _call("method-1-character", "The shortest method.", ["a", {}], "boundary"),
        _call("method-128-characters", "The longest, of all characters allowed.", [longest, {}], "boundary"),
        _call("method-dots-and-digits", "No rule beyond the alphabet.", ["..9_.", {}]),
        _call(
            "request-in-longer-forms",
            "array 32, str 32, map 32.",
            ["echo", {}],
            "longer-form",
            body=f.array32(f.str32(b"echo"), f.map32()),
        ),
        _call(
            "request-meta-in-longer-forms",
            "map 32, str 8, int 64.",
            ["echo", None, {"deadline_ms": 1500}],
            "longer-form",
            body=f.array16(echo, b"\xc0", meta),
        ),
        _call(
            "request-all-types-in-params",
            "Params of every type.",
            ["echo", {"a": [None, True, -5, 1.5, "s", b"b"], "\u00fc": {}}],
        ),
        _call("deadline-1", "The shortest deadline.", ["echo", {}, {"deadline_ms": 1}], "boundary"),
        _call("deadline-2-32", "Beyond 32 bits.", ["echo", {}, {"deadline_ms": 2**32}], "integer-width"),
        _call(
            "deadline-largest",
            "2^64 - 1: in effect none.",
            ["echo", {}, {"deadline_ms": 2**64 - 1}],
            "integer-width",
        ),
        _call(
            "idempotency-key-1-character",
            "The shortest key.",
            ["echo", {}, {"idempotency_key": "k"}],
            "boundary",
        ),
        _call(
            "idempotency-key-64-characters",
            "The longest key.",
            ["echo", {}, {"idempotency_key": "k" * 64}],
            "boundary",
        ),
        _call(
            "idempotency-key-64-code-points",
            "64 characters in 256 bytes.",
            ["echo", {}, {"idempotency_key": "\U0001f980" * 64}],
            "boundary",
            "unicode",
        ),
        _call("traceparent-valid", "W3C Trace Context.", ["echo", {}, {"traceparent": TRACEPARENT}]),
        vector(
            "traceparent-bad-ignored",
            "A bad traceparent is ignored.",
            "server",
            bad_trace,
            accepted(bad_trace, ignored),
        ),
        vector(
            "traceparent-int-ignored",
            "Also one that is not a str.",
            "server",
            int_trace,
            accepted(int_trace, ignored),
        ),
    ]


def _sizes() -> list[Json]:
    room = LIMIT_BEFORE_SESSION - 64
    frame = Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, body=f.bin16(bytes(room - 3)))
    params = {"code": "x" * (room - 24)}
    public = Frame(KINDS["REQUEST"], stream=1, body=pack(["device.enroll", params]))
    assert frame.real_length == public.real_length == LIMIT_BEFORE_SESSION
    return [
        vector(
            "size-at-the-limit-of-the-client",
            "length is exactly the receiver's limit.",
            "client",
            frame,
            accepted(frame, {"value": typed(bytes(room - 3))}),
            flags=["boundary"],
            limit=LIMIT_BEFORE_SESSION,
        ),
        vector(
            "size-at-the-limit-before-a-session",
            "length is exactly 16384 on a connection without a session.",
            "server",
            public,
            accepted(public, request("device.enroll", params)),
            flags=["boundary"],
            limit=LIMIT_BEFORE_SESSION,
            tokens=[],
        ),
    ]
