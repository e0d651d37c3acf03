"""Frames with an invalid header."""

from __future__ import annotations

from typing import Any

from makers.forms import KINDS, LIMIT, LIMIT_BEFORE_SESSION, TOKEN, Frame, fixarray, fixmap, pack
from makers.shape import Json, refused, vector

SUBJECT = "Frames with an invalid header. All are fatal, and refused before the body arrives."
NOTES = {
    "boundary": "One past the largest or smallest value allowed; catches comparisons that are off by one.",
    "integer-width": "A length with the top bit set; catches signed integers and sums that overflow.",
    "reserved": "Kinds of streams and calls that were not announced; catches receivers that skip unknown kinds.",
    "order": "Two faults in one frame; catches checks in another order than the specification's.",
}
ECHO = fixarray(pack("echo"), fixmap())


def vectors() -> list[Json]:
    return [*_lengths(), *_versions(), *_kinds(), *_flags(), *_streams(), *_order()]


def _fault(
    name: str, summary: str, frame: Frame, receiver: str = "server", code: str = "PROTOCOL_ERROR", **more: Any
) -> Json:
    return vector(name, summary, receiver, frame, refused(code, "header"), **more)


def _lengths() -> list[Json]:
    head = Frame(KINDS["REQUEST"], stream=1, token=TOKEN)
    early: dict[str, Any] = {"limit": LIMIT_BEFORE_SESSION, "tokens": [], "flags": ["boundary"]}
    large = "FRAME_TOO_LARGE"
    return [
        _fault("length-0", "Length 0.", head.but(length=0)),
        _fault("length-1", "Length 1.", head.but(length=1)),
        _fault("length-63", "One byte less than the header needs.", head.but(length=63), flags=["boundary"]),
        _fault(
            "length-one-above-the-limit",
            "One byte above max_frame; only the header has arrived.",
            head.but(length=LIMIT + 1),
            code=large,
            flags=["boundary"],
        ),
        _fault(
            "length-one-above-the-limit-before-a-session",
            "One byte above what a connection without a session may send.",
            head.but(length=LIMIT_BEFORE_SESSION + 1),
            code=large,
            **early,
        ),
        _fault("length-2-31", "Length 2^31.", head.but(length=2**31), code=large, flags=["integer-width"]),
        _fault(
            "length-2-32-less-1",
            "Length 2^32 - 1.",
            head.but(length=2**32 - 1),
            code=large,
            flags=["integer-width"],
        ),
        _fault(
            "length-of-an-http-request", "'GET ', read as a length.", head.but(length=0x47455420), code=large
        ),
        _fault(
            "length-above-the-limit-to-the-client",
            "A client has a limit too.",
            Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, length=LIMIT + 1),
            receiver="client",
            code=large,
            flags=["boundary"],
            in_flight=[1],
        ),
    ]


def _versions() -> list[Json]:
    frame = Frame(KINDS["REQUEST"], stream=1, token=TOKEN, body=ECHO)
    return [
        _fault(f"version-{version}", f"Version {version}.", frame.but(version=version))
        for version in (0, 2, 255)
    ] + [
        _fault(
            "version-2-to-the-client",
            "Version 2 in a WELCOME.",
            Frame(KINDS["WELCOME"], version=2, counter=0),
            "client",
        )
    ]


def _kinds() -> list[Json]:
    made = []
    for kind in (0x00, *range(0x0A, 0x10), 0x20, 0x42, 0x82, 0xFF):
        name = f"kind-{kind:02x}-unknown"
        made.append(
            _fault(name, f"Kind 0x{kind:02X} means nothing.", Frame(kind, stream=1, token=TOKEN, body=ECHO))
        )
    for kind in range(0x10, 0x20):
        frame = Frame(kind, stream=1, token=TOKEN, body=ECHO)
        name = f"kind-{kind:02x}-reserved"
        made.append(_fault(name, f"Kind 0x{kind:02X} was not announced.", frame, flags=["reserved"]))
    made.append(
        _fault(
            "kind-10-reserved-to-the-client",
            "Kind 0x10, to a client.",
            Frame(0x10, stream=1),
            "client",
            flags=["reserved"],
        )
    )
    for kind, receiver in (
        ("WELCOME", "server"),
        ("RESPONSE", "server"),
        ("ERROR", "server"),
        ("GOAWAY", "server"),
        ("EVENT", "server"),
        ("REQUEST", "client"),
        ("CANCEL", "client"),
    ):
        stream = 1 if kind in {"RESPONSE", "ERROR", "REQUEST", "CANCEL"} else 0
        frame = Frame(KINDS[kind], stream=stream, token=TOKEN, body=b"" if kind == "CANCEL" else ECHO)
        name = f"kind-{kind.lower()}-to-the-{receiver}"
        made.append(_fault(name, f"A {receiver} never receives {kind}.", frame, receiver))
    return made


def _flags() -> list[Json]:
    frame = Frame(KINDS["REQUEST"], stream=1, token=TOKEN, body=ECHO)
    return [
        _fault(
            f"flag-bit-{bit}", f"Flag 0x{1 << bit:04X} is set; ZCP/1 has no flags.", frame.but(flags=1 << bit)
        )
        for bit in range(16)
    ] + [
        _fault("flags-all", "All flags are set.", frame.but(flags=0xFFFF)),
        _fault("flag-on-ping", "A flag on PING.", Frame(KINDS["PING"], flags=1)),
        _fault(
            "flag-to-the-client", "A flag on RESPONSE.", Frame(KINDS["RESPONSE"], stream=1, flags=1), "client"
        ),
    ]


def _streams() -> list[Json]:
    made = []
    for kind, receiver, stream in (
        ("REQUEST", "server", 0),
        ("CANCEL", "server", 0),
        ("PING", "server", 1),
        ("PONG", "server", 1),
        ("PING", "client", 1),
        ("PONG", "client", 1),
        ("WELCOME", "client", 1),
        ("RESPONSE", "client", 0),
        ("GOAWAY", "client", 1),
        ("EVENT", "client", 1),
    ):
        name = f"{kind.lower()}-on-stream-{stream}-to-the-{receiver}"
        rule = f"{kind} belongs to a request." if stream == 0 else f"{kind} has stream 0."
        made.append(_fault(name, rule, Frame(KINDS[kind], stream=stream, token=TOKEN), receiver))
    large = Frame(KINDS["PING"], stream=2**32 - 1)
    made.append(_fault("ping-on-the-largest-stream", "PING has stream 0.", large, flags=["integer-width"]))
    return made


def _order() -> list[Json]:
    frame = Frame(KINDS["REQUEST"], stream=1, token=TOKEN, body=ECHO)
    order: dict[str, Any] = {"flags": ["order"]}
    return [
        _fault(
            "order-length-before-version",
            "Too long and of an unknown version: the length is checked first.",
            frame.but(length=LIMIT + 1, version=2),
            code="FRAME_TOO_LARGE",
            **order,
        ),
        _fault(
            "order-kind-before-salt",
            "Unknown kind, and the salt of another connection: the header is checked first.",
            frame.but(kind=0x0A, salt=bytes(8)),
            **order,
        ),
        _fault(
            "order-flags-before-counter",
            "A flag, and a counter used before.",
            frame.but(flags=1, counter=0),
            **order,
        ),
        _fault(
            "order-stream-before-timestamp",
            "REQUEST on stream 0, and a timestamp of 1970.",
            frame.but(stream=0, timestamp=0),
            **order,
        ),
        _fault(
            "order-version-before-body",
            "Unknown version, and a body that is not msgpack.",
            frame.but(version=2, body=b"\xc1"),
            **order,
        ),
    ]
