"""Invalid bodies, one fault each."""

from __future__ import annotations

from typing import Any

from makers import forms as f
from makers.bodies import nested
from makers.forms import KINDS, TOKEN, Frame, fixarray, fixmap, pack
from makers.shape import Json, refused, vector

SUBJECT = "Invalid bodies, one fault each. The framing is intact: most fail only their request."
NOTES = {
    "bomb": "A few bytes that declare a large size; catches decoders that allocate before they check.",
    "boundary": "One past the largest or smallest value allowed; catches comparisons that are off by one.",
    "unicode": "Bytes that are not UTF-8; catches lenient decoders.",
    "must-be-empty": "A body on a kind that has none: fatal, and judged after freshness.",
}
ECHO = pack("echo")


def vectors() -> list[Json]:
    return [
        *_cut(),
        *_extensions(),
        *_bombs(),
        *_keys(),
        *_utf8(),
        *_forms(),
        *_methods(),
        *_params_and_meta(),
        *_deadlines(),
        *_at_the_client(),
        *_must_be_empty(),
    ]


def _bad(
    name: str, summary: str, body: bytes, *flags: str, code: str = "INVALID_ARGUMENT", stage: str = "body"
) -> Json:
    frame = Frame(KINDS["REQUEST"], stream=7, token=TOKEN, body=body)
    return vector(name, summary, "server", frame, refused(code, stage, 7), flags=flags)


def _param(name: str, summary: str, form: bytes, *flags: str) -> Json:
    """Return a vector with a fault in the value of a param."""
    return _bad(name, summary, fixarray(ECHO, fixmap(pack("x"), form)), *flags)


def _cut() -> list[Json]:
    whole = fixarray(ECHO, fixmap())
    return [
        _bad("body-empty", "A REQUEST has a body.", b"", "boundary"),
        _bad("body-cut-after-array-header", "Nothing after the array's first byte.", whole[:1]),
        _bad("body-cut-in-method", "The method ends early.", whole[:3]),
        _bad("body-cut-before-params", "The array declares two elements and has one.", whole[:-1]),
        _param("body-cut-before-map-value", "A key without its value.", b""),
        _param("body-cut-in-uint64", "7 of 8 bytes.", f.uint64(5)[:-1]),
        _param("body-cut-in-float64", "7 of 8 bytes.", f.float64(1.5)[:-1]),
        _param("body-cut-in-bin", "One byte missing.", f.bin8(b"abc")[:-1]),
        _param("body-cut-in-str16-length", "Half of the length.", b"\xda\x00"),
        _param("body-cut-in-array16", "One element missing.", f.array16(b"\x01", b"\x02")[:-1]),
        _param("body-cut-in-map32", "One value missing.", f.map32(pack("a"), b"\x01")[:-1]),
        _bad("body-one-byte-more", "A byte after the value.", whole + b"\xc0"),
        _bad("body-two-values", "The same value twice.", whole + whole),
        _bad("body-junk-after-value", "Bytes after the value that are not msgpack.", whole + b"\xc1\xc1"),
        _bad("body-never-used-byte", "0xC1 means nothing in msgpack.", b"\xc1"),
        _param("body-never-used-byte-inside", "0xC1 as a value.", b"\xc1"),
        _bad(
            "body-large-one-byte-more",
            "A byte after a value of 2 KiB.",
            fixarray(ECHO, fixmap(pack("x"), f.bin16(bytes(2048)))) + b"\xc0",
        ),
        _bad(
            "body-large-cut",
            "A value of 2 KiB without its last byte.",
            fixarray(ECHO, fixmap(pack("x"), f.bin16(bytes(2048))))[:-1],
        ),
    ]


def _extensions() -> list[Json]:
    made = [
        _param(f"ext-fixext-{size}", f"fixext {size}.", bytes([0xD4 + n, 1]) + bytes(size))
        for n, size in enumerate((1, 2, 4, 8, 16))
    ]
    for name, form in (
        ("8", b"\xc7\x03\x05abc"),
        ("16", b"\xc8\x00\x03\x05abc"),
        ("32", b"\xc9\x00\x00\x00\x03\x05abc"),
        ("8-empty", b"\xc7\x00\x05"),
        ("16-empty", b"\xc8\x00\x00\x05"),
        ("32-empty", b"\xc9\x00\x00\x00\x00\x05"),
        ("type-0", b"\xd4\x00\x00"),
        ("type-minus-128", b"\xd4\x80\x00"),
        ("timestamp-32", b"\xd6\xff" + bytes(4)),
        ("timestamp-64", b"\xd7\xff" + bytes(8)),
        ("timestamp-96", b"\xc7\x0c\xff" + bytes(12)),
        ("timestamp-empty", b"\xc7\x00\xff"),
    ):
        made.append(_param(f"ext-{name}", "Ext types are refused, also the standard timestamp.", form))
    return [
        *made,
        _bad("ext-as-map-key", "An ext type as a key.", fixarray(ECHO, fixmap(b"\xd4\x01\x00", pack(1)))),
        _bad("ext-as-params", "An ext type in place of params.", fixarray(ECHO, b"\xd4\x01\x00")),
        _bad("ext-as-body", "An ext type in place of the array.", b"\xc7\x00\x01"),
        _param(
            "ext-in-a-large-body",
            "After 2 KiB of valid data.",
            fixarray(f.bin16(bytes(2048)), b"\xd6\xff" + bytes(4)),
        ),
    ]


def _bombs() -> list[Json]:
    return [
        _param("depth-33-arrays", "One array too deep.", pack(nested(31)), "boundary"),
        _param("depth-33-empty", "The 33rd is empty.", pack(nested(30, [])), "boundary"),
        _param("depth-33-maps", "One map too deep.", b"\x81\xa1k" * 31 + b"\xc0", "boundary"),
        _bad(
            "depth-33-in-meta",
            "One array too deep, in meta.",
            pack(["echo", {}, {"x": nested(31)}]),
            "boundary",
        ),
        _param("depth-500", "Deeper than many parsers' own limit is high.", b"\x91" * 500 + b"\xc0", "bomb"),
        _param("depth-2000", "Deeper than many stacks.", b"\x91" * 2000 + b"\xc0", "bomb"),
        _bad("depth-16000-unfinished", "Arrays that never end.", b"\x91" * 16_000, "bomb"),
        _bad("depth-maps-unfinished", "Maps that never end.", b"\x81\xa0" * 8_000, "bomb"),
        _param("bomb-array16", "65,535 elements, none present.", b"\xdc\xff\xff", "bomb"),
        _param("bomb-array32", "2^32 - 1 elements, none present.", b"\xdd\xff\xff\xff\xff", "bomb"),
        _param("bomb-map16", "65,535 pairs, none present.", b"\xde\xff\xff", "bomb"),
        _param("bomb-map32", "2^32 - 1 pairs, none present.", b"\xdf\xff\xff\xff\xff", "bomb"),
        _param("bomb-str32", "2^32 - 1 bytes of str, none present.", b"\xdb\xff\xff\xff\xff", "bomb"),
        _param("bomb-bin32", "2^32 - 1 bytes of bin, none present.", b"\xc6\xff\xff\xff\xff", "bomb"),
        _param("bomb-ext32", "2^32 - 1 bytes of ext, none present.", b"\xc9\xff\xff\xff\xff\x05", "bomb"),
        _bad("bomb-outer-array32", "The outer array itself.", b"\xdd\xff\xff\xff\xff" + ECHO, "bomb"),
        _param(
            "bomb-nested-array16",
            "Each array declares as many elements as the body could contain.",
            b"\xdc\x00\xf0" * 80,
            "bomb",
        ),
        _param("bomb-nested-array16-large", "The same in 9 KiB.", b"\xdc\x20\x00" * 3000, "bomb"),
        _param("bomb-nested-map16-large", "Maps, in 12 KiB.", b"\xde\x10\x00\xa0" * 3000, "bomb"),
    ]


def _keys() -> list[Json]:
    made = []
    for name, key in (
        ("int", pack(1)),
        ("bin", f.bin8(b"x")),
        ("nil", pack(None)),
        ("bool", pack(True)),
        ("float", pack(1.5)),
        ("array", fixarray()),
        ("map", fixmap()),
    ):
        summary = f"Keys are str, not {name}."
        made.append(_bad(f"key-{name}", summary, fixarray(ECHO, fixmap(key, pack(1)))))
    return [
        *made,
        _param("key-int-nested", "Inner maps too.", fixmap(pack(1), pack(1))),
        _param("key-bin-nested-in-array", "Inner maps too.", fixarray(fixmap(f.bin8(b"x"), pack(1)))),
        _bad(
            "key-bin-after-str",
            "Every key, not only the first.",
            fixarray(ECHO, fixmap(pack("a"), pack(1), f.bin8(b"b"), pack(2))),
        ),
        _bad(
            "key-bin-after-container",
            "Also after a param that is a map.",
            fixarray(ECHO, fixmap(pack("a"), fixmap(), f.bin8(b"b"), pack(2))),
        ),
        _bad(
            "key-bin-in-meta", "meta too.", fixarray(ECHO, fixmap(), fixmap(f.bin8(b"deadline_ms"), pack(1)))
        ),
    ]


def _utf8() -> list[Json]:
    made = []
    for name, raw, what in (
        ("continuation", b"\x80", "A continuation byte alone."),
        ("cut", b"\xe2\x82", "A sequence that is cut."),
        ("overlong", b"\xc0\xaf", "An overlong slash."),
        ("overlong-nul", b"\xc0\x80", "An overlong NUL, as in 'modified UTF-8'."),
        ("surrogate", b"\xed\xa0\x80", "Half of a surrogate pair."),
        ("surrogate-pair", b"\xed\xa0\xbe\xed\xb6\x80", "A surrogate pair, as in CESU-8."),
        ("beyond-10ffff", b"\xf4\x90\x80\x80", "Beyond U+10FFFF."),
        ("latin-1", b"caf\xe9", "ISO 8859-1."),
        ("ff", b"\xff", "0xFF."),
    ):
        made.append(_param(f"utf8-{name}", what, f.fixstr(raw), "unicode"))
    return [
        *made,
        _bad("utf8-in-method", "The method.", fixarray(f.fixstr(b"ech\xff"), fixmap()), "unicode"),
        _bad("utf8-in-key", "A key.", fixarray(ECHO, fixmap(f.fixstr(b"\xff"), pack(1))), "unicode"),
        _param(
            "utf8-in-a-large-body",
            "After 2 KiB of valid data.",
            fixarray(f.bin16(bytes(2048)), f.fixstr(b"\xff")),
            "unicode",
        ),
    ]


def _forms() -> list[Json]:
    return [
        _bad("request-nil", "nil in place of the array.", pack(None)),
        _bad("request-int", "An int in place of the array.", pack(2)),
        _bad("request-str", "The method alone, without array.", ECHO),
        _bad("request-bin", "bin in place of the array.", f.bin8(fixarray(ECHO, fixmap()))),
        _bad("request-map", "A map in place of the array.", pack({"method": "echo", "params": {}})),
        _bad("request-of-0", "An empty array.", fixarray(), "boundary"),
        _bad("request-of-1", "Without params.", fixarray(ECHO), "boundary"),
        _bad(
            "request-of-4",
            "One element too many.",
            fixarray(ECHO, fixmap(), fixmap(), pack(None)),
            "boundary",
        ),
    ]


def _methods() -> list[Json]:
    made = []
    for name, method, what in (
        ("int", 7, "The method is a str."),
        ("nil", None, "The method is a str."),
        ("bin", b"echo", "The method is a str, not bin."),
        ("array", ["echo"], "The method is a str."),
        ("empty", "", "One character at least."),
        ("129-characters", "m" * 129, "128 characters at most."),
        ("uppercase", "Echo", "Lower case alone."),
        ("hyphen", "session-open", "No hyphen."),
        ("slash", "a/b", "No slash."),
        ("space", "echo ", "No space."),
        ("newline", "echo\n", "No newline, also not at the end."),
        ("nul", "echo\0", "No NUL."),
        ("cyrillic", "\u0435cho", "A letter that looks like an e."),
        ("full-width-digit", "v\uff11", "A digit, but not 0 to 9."),
    ):
        flags = ["boundary"] if name in {"empty", "129-characters"} else []
        made.append(_bad(f"method-{name}", what, pack([method, {}]), *flags))
    return made


def _params_and_meta() -> list[Json]:
    made = []
    for name, params in (("array", [1]), ("str", "x"), ("int", 1), ("false", False), ("bin", b"x")):
        made.append(_bad(f"params-{name}", "params is a map or nil.", pack(["echo", params])))
    for name, other in (("nil", None), ("array", []), ("str", "x"), ("int", 1500)):
        made.append(_bad(f"meta-{name}", "meta is a map.", pack(["echo", {}, other])))
    for key, value, what in (
        ("deadline_ms", "1500", "str"),
        ("deadline_ms", 1500.0, "float"),
        ("deadline_ms", True, "bool"),
        ("idempotency_key", 7, "int"),
        ("idempotency_key", b"k", "bin"),
        ("idempotency_key", ["k"], "array"),
        ("idempotency_key", "", "empty"),
        ("idempotency_key", "k" * 65, "65-characters"),
    ):
        flags = ["boundary"] if what in {"empty", "65-characters"} else []
        name = f"{key.replace('_ms', '').replace('_', '-')}-{what}"
        made.append(_bad(name, f"{key} does not fit.", pack(["echo", {}, {key: value}]), *flags))
    return made


def _deadlines() -> list[Json]:
    late: dict[str, Any] = {"code": "DEADLINE_EXCEEDED", "stage": "deadline"}
    return [
        _bad(
            f"deadline-{name}",
            "A deadline that has passed already.",
            pack(["echo", {}, {"deadline_ms": value}]),
            *flags,
            **late,
        )
        for name, value, flags in (
            ("0", 0, ["boundary"]),
            ("minus-1", -1, ["boundary"]),
            ("smallest", -(2**63), []),
        )
    ]


def _at_the_client() -> list[Json]:
    made = []
    error = "INTERNAL"
    for name, kind, body, summary in (
        ("response-empty", "RESPONSE", b"", "A RESPONSE has a body."),
        ("response-cut", "RESPONSE", b"\x92\x01", "A result that ends early."),
        ("response-two-values", "RESPONSE", b"\x01\x02", "One value, not two."),
        ("response-ext", "RESPONSE", b"\xd6\xff\0\0\0\0", "Ext types are refused."),
        ("response-int-key", "RESPONSE", b"\x81\x01\x01", "Keys are str."),
        ("response-depth-33", "RESPONSE", pack(nested(33)), "One array too deep."),
        ("response-bomb", "RESPONSE", b"\xdd\xff\xff\xff\xff", "2^32 - 1 elements, none present."),
        ("error-map", "ERROR", pack({"code": 5}), "A map in place of the array."),
        ("error-of-1", "ERROR", pack([5]), "Without message."),
        ("error-of-4", "ERROR", pack([5, "x", {}, 1]), "One element too many."),
        ("error-code-str", "ERROR", pack(["NOT_FOUND", "x"]), "The code is an int."),
        ("error-code-bool", "ERROR", pack([True, "x"]), "The code is an int."),
        ("error-message-nil", "ERROR", pack([5, None]), "The message is a str."),
        ("error-details-array", "ERROR", pack([5, "x", []]), "Details are a map."),
    ):
        frame = Frame(KINDS[kind], stream=7, token=TOKEN, body=body)
        made.append(vector(name, summary, "client", frame, refused(error, "body", 7)))
    for name, kind, body, summary in (
        (
            "error-on-stream-0-cut",
            "ERROR",
            b"\x92\x40",
            "It cannot be decoded, and still ends the connection.",
        ),
        ("welcome-array", "WELCOME", pack([1]), "WELCOME is a map."),
        ("welcome-empty", "WELCOME", b"", "WELCOME has a body."),
        ("goaway-array", "GOAWAY", pack(["bye"]), "GOAWAY is a map."),
        ("event-of-1", "EVENT", pack(["session.revoked"]), "An event is [name, data]."),
        ("event-of-3", "EVENT", pack(["a", 1, 2]), "An event is [name, data]."),
        ("event-name-int", "EVENT", pack([1, {}]), "The name is a str."),
        ("event-cut", "EVENT", b"\x92\xa1a", "Data missing."),
    ):
        frame = Frame(KINDS[kind], counter=0 if kind == "WELCOME" else 1, body=body)
        context: dict[str, Any] = {"salt": None} if kind == "WELCOME" else {}
        made.append(vector(name, summary, "client", frame, refused("PROTOCOL_ERROR", "body"), **context))
    return made


def _must_be_empty() -> list[Json]:
    made = []
    for kind, receiver, stream in (
        ("CANCEL", "server", 7),
        ("PING", "server", 0),
        ("PONG", "server", 0),
        ("PING", "client", 0),
        ("PONG", "client", 0),
    ):
        frame = Frame(KINDS[kind], stream=stream, token=TOKEN, body=b"\xc0")
        name = f"{kind.lower()}-with-a-body-to-the-{receiver}"
        outcome = refused("PROTOCOL_ERROR", "body")
        made.append(
            vector(
                name,
                f"{kind} is the header alone.",
                receiver,
                frame,
                outcome,
                flags=["must-be-empty"],
                in_flight=[7],
            )
        )
    return made
