"""Text forms: tokens outside frames, and W3C's traceparent."""

from __future__ import annotations

import base64
from typing import Any

from makers.frames import TRACEPARENT

SUBJECT = "Text forms: tokens outside frames, and traceparent."
NOTES = {
    "alphabet": "A character of another alphabet; catches decoders that skip unknown characters.",
    "boundary": "One character too many or too few.",
    "canonical": "Unused bits that are not zero; catches decoders that accept four texts for one token.",
}
ALL_ONES = b"\xff" * 32
MIXED = bytes(range(224, 256))


def text_of(token: bytes) -> str:
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def vectors() -> list[dict[str, Any]]:
    return [*_tokens(), *_traceparents()]


def _vector(
    kind: str, name: str, summary: str, text: str, expect: Any, flags: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {
        "name": name,
        "summary": summary,
        "flags": list(flags),
        "type": kind,
        "text": text,
        "expect": expect,
    }


def _tokens() -> list[dict[str, Any]]:
    made = []
    for name, token, summary in (
        ("ascending", bytes(range(1, 33)), "43 characters, no padding."),
        ("all-ones", ALL_ONES, "Underscores: the alphabet is base64url's."),
        ("mixed", MIXED, "Hyphens and underscores."),
        ("high-bit", b"\x80" + bytes(30) + b"\x01", "Mostly zeros."),
    ):
        made.append(
            _vector("token", f"token-{name}", summary, text_of(token), {"valid": True, "bytes": token.hex()})
        )
    good = text_of(bytes(range(1, 33)))
    mixed = text_of(MIXED)
    for name, text, summary, flag in (
        ("42-characters", good[:-1], "One character too few.", "boundary"),
        ("44-characters", good + "A", "One character too many.", "boundary"),
        ("empty", "", "Nothing.", "boundary"),
        ("padded", good + "=", "Padding is not used.", "boundary"),
        (
            "plain-base64",
            mixed.replace("-", "+").replace("_", "/"),
            "+ and / belong to the other alphabet.",
            "alphabet",
        ),
        ("space-before", " " + good[1:], "No white space.", "alphabet"),
        ("newline-after", good[:-1] + "\n", "No white space, also not at the end.", "alphabet"),
        ("newline-behind", good + "\n", "As read from a file without stripping.", "alphabet"),
        ("dot", good[:20] + "." + good[21:], "A character outside every base64 alphabet.", "alphabet"),
        ("non-ascii", good[:20] + "\u00e9" + good[21:], "A character outside ASCII.", "alphabet"),
        ("hex", bytes(range(1, 33)).hex(), "Hexadecimal is not the text form.", "boundary"),
        (
            "unused-bits",
            good[:-1] + chr(ord(good[-1]) + 1),
            "The last character carries 4 bits; the other 2 are zero.",
            "canonical",
        ),
    ):
        made.append(_vector("token", f"token-{name}", summary, text, {"valid": False}, (flag,)))
    return made


def _traceparents() -> list[dict[str, Any]]:
    version, trace, parent, flags = TRACEPARENT.split("-")
    made = []
    for name, text, summary in (
        ("sampled", TRACEPARENT, "The W3C's example."),
        ("not-sampled", f"{version}-{trace}-{parent}-00", "No flag set."),
        ("all-flags", f"{version}-{trace}-{parent}-ff", "Flags are not judged."),
        ("later-version", f"cc-{trace}-{parent}-01", "A later version in the form of the first."),
        ("smallest-ids", f"00-{'0' * 31}1-{'0' * 15}1-01", "Ids that are nearly zero."),
    ):
        made.append(_vector("traceparent", f"traceparent-{name}", summary, text, {"valid": True}))
    for name, text, summary, flag in (
        ("version-ff", f"ff-{trace}-{parent}-{flags}", "Version ff is forbidden.", "alphabet"),
        ("trace-zero", f"00-{'0' * 32}-{parent}-01", "The trace id is not all zeros.", "boundary"),
        ("parent-zero", f"00-{trace}-{'0' * 16}-01", "The parent id is not all zeros.", "boundary"),
        ("uppercase", TRACEPARENT.upper(), "Hexadecimal is lower case.", "alphabet"),
        ("not-hex", TRACEPARENT.replace("4bf9", "4bg9"), "g is not a hexadecimal digit.", "alphabet"),
        ("54-characters", TRACEPARENT[:-1], "One character too few.", "boundary"),
        ("56-characters", TRACEPARENT + "1", "One character too many.", "boundary"),
        ("with-more-fields", TRACEPARENT + "-00", "Version 00 has four fields.", "boundary"),
        ("underscores", TRACEPARENT.replace("-", "_"), "Hyphens separate the fields.", "alphabet"),
        ("hyphen-moved", f"00-{trace[:-1]}-{parent}0-01", "The right length, the wrong fields.", "boundary"),
        ("space", " " + TRACEPARENT[1:], "No white space.", "alphabet"),
        ("full-width", TRACEPARENT.replace("4bf9", "4bf\uff19"), "A digit, but not 0 to 9.", "alphabet"),
        ("empty", "", "Nothing.", "boundary"),
    ):
        made.append(_vector("traceparent", f"traceparent-{name}", summary, text, {"valid": False}, (flag,)))
    return made
