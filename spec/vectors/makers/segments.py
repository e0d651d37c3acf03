"""Bytes in pieces: several frames in one read, one frame in many, the end in the middle."""

from __future__ import annotations

from makers.forms import KINDS, TOKEN, Frame, fixarray, fixmap, pack
from makers.shape import Json, accepted, incomplete, refused, request, vector

SUBJECT = "Bytes in pieces. However they are divided, the outcomes are the same."
NOTES = {
    "truncation": "The beginning of a frame: the receiver waits for more. A stream that ends here is truncated.",
    "no-resync": "After a fatal fault all further bytes are ignored.",
}
FIRST = Frame(
    KINDS["REQUEST"],
    stream=1,
    token=TOKEN,
    counter=1,
    body=fixarray(pack("echo"), fixmap(pack("n"), pack(1))),
)
SECOND = FIRST.but(stream=2, counter=2, body=fixarray(pack("time"), pack(None)))
PING = Frame(KINDS["PING"], counter=3)
ONE = accepted(FIRST, request("echo", {"n": 1}))
TWO = accepted(SECOND, request("time", None))
FIELDS = (
    ("length", 0, 4),
    ("version", 4, 1),
    ("kind", 5, 1),
    ("flags", 6, 2),
    ("stream", 8, 4),
    ("timestamp", 12, 8),
    ("salt", 20, 8),
    ("counter", 28, 8),
    ("token", 36, 32),
    ("body", 68, len(FIRST.body)),
)


def vectors() -> list[Json]:
    return [*_several(), *_cut(), *_after_a_fault()]


def _several() -> list[Json]:
    one, two, ping = FIRST.encode(), SECOND.encode(), PING.encode()
    return [
        vector("two-frames-in-one-read", "Two requests.", "server", one + two, ONE, TWO),
        vector(
            "three-frames-in-one-read",
            "Two requests and a PING.",
            "server",
            one + two + ping,
            ONE,
            TWO,
            accepted(PING),
        ),
        vector(
            "frame-and-half-a-length",
            "2 bytes of the next frame.",
            "server",
            one + two[:2],
            ONE,
            incomplete(2),
            flags=["truncation"],
        ),
        vector(
            "frame-and-half-a-header",
            "40 bytes of the next frame.",
            "server",
            one + two[:40],
            ONE,
            incomplete(40),
            flags=["truncation"],
        ),
        vector(
            "frame-and-a-header",
            "The next frame without its body.",
            "server",
            one + two[:68],
            ONE,
            incomplete(68),
            flags=["truncation"],
        ),
        vector("nothing", "No bytes, no frames.", "server", b"", flags=["truncation"]),
        vector(
            "pings-without-body",
            "Frames that are headers alone, back to back.",
            "server",
            ping + PING.but(counter=4).encode(),
            accepted(PING),
            accepted(PING.but(counter=4)),
        ),
    ]


def _cut() -> list[Json]:
    whole = FIRST.encode()
    made = []
    for name, offset, size in FIELDS:
        cuts = {f"cut-after-{name}": offset + size} if name != "body" else {}
        if size > 1:
            cuts = {f"cut-in-{name}": offset + size // 2} | cuts
        for cut_name, have in cuts.items():
            summary = f"{have} of {len(whole)} bytes have arrived."
            made.append(
                vector(cut_name, summary, "server", whole[:have], incomplete(have), flags=["truncation"])
            )
    made.append(
        vector(
            "cut-before-the-last-byte",
            "One byte is missing.",
            "server",
            whole[:-1],
            incomplete(len(whole) - 1),
            flags=["truncation"],
        )
    )
    return made


def _after_a_fault() -> list[Json]:
    header = refused("PROTOCOL_ERROR", "header")
    bad = SECOND.but(version=9)
    return [
        vector(
            "fault-after-a-frame",
            "The frame before the fault is accepted.",
            "server",
            FIRST.encode() + bad.encode(),
            ONE,
            header,
            flags=["no-resync"],
        ),
        vector(
            "frame-after-a-fault",
            "The frame after the fault is not.",
            "server",
            bad.encode() + FIRST.encode(),
            header,
            flags=["no-resync"],
        ),
        vector(
            "length-fault-after-a-frame",
            "Length 0 behind a frame.",
            "server",
            FIRST.encode() + bytes(68),
            ONE,
            header,
            flags=["no-resync"],
        ),
        vector(
            "replay-after-a-frame",
            "A replay ends the connection; the valid frame after it is ignored.",
            "server",
            FIRST.encode() + FIRST.encode() + SECOND.encode(),
            ONE,
            refused("REPLAYED", "freshness"),
            flags=["no-resync"],
        ),
        vector(
            "bad-body-between-frames",
            "A body that cannot be decoded fails only its request.",
            "server",
            FIRST.encode() + SECOND.but(body=b"\xc1").encode() + PING.encode(),
            ONE,
            refused("INVALID_ARGUMENT", "body", 2),
            accepted(PING),
        ),
    ]
