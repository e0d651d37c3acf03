"""Frames that arrive slowly: each is judged by the receiver's clock at the arrival of its header."""

from __future__ import annotations

from typing import Any

from makers.forms import KINDS, NOW, TOKEN, TOLERANCE_MS, Frame, fixarray, fixmap, pack
from makers.freshness import STALE_ERROR
from makers.shape import Json, accepted, refused, request, slow, typed

SUBJECT = "Frames that arrive slowly: each is judged by the receiver's clock at the arrival of its header."
NOTES = {
    "behind": "A frame behind a slow one: it has a header of its own, and a time of its own.",
    "boundary": "The last byte of the header decides.",
    "complete": "Another result when judged at the last byte of the frame, a common mistake.",
}
HEADER = 68
MINUTE = 60_000
LATE = TOLERANCE_MS + 1
PARAMS = {"text": "on a slow link"}
CALL = Frame(KINDS["REQUEST"], stream=1, token=TOKEN, body=fixarray(pack("echo"), pack(PARAMS)))
SECOND = CALL.but(stream=2, counter=2, body=fixarray(pack("echo"), fixmap()))
ANSWER = Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, body=pack("on a slow link"))
NOT_FOUND = Frame(KINDS["ERROR"], stream=1, token=TOKEN, body=pack([5, "no such thing"]))
FAILED = {"code": 5, "message": "no such thing", "details": typed({})}
LOST = refused("DATA_LOSS", "freshness", 1)


def vectors() -> list[Json]:
    return [*_at_the_server(), *_at_the_client()]


def _cut(frame: Frame, at: int, after: int) -> list[tuple[int, bytes]]:
    """The first `at` bytes at once, and the rest after some milliseconds."""
    data = frame.encode()
    return [(0, data[:at]), (after, data[at:])]


def _taken(frame: Frame, params: Any) -> Json:
    return accepted(frame, request("echo", params))


def _at_the_server() -> list[Json]:
    data = CALL.encode()
    one_by_one = [(n if n < HEADER else n * 1000, data[n : n + 1]) for n in range(len(data))]
    fresh = SECOND.but(timestamp=NOW + MINUTE)
    future = CALL.but(timestamp=NOW + LATE)
    complete: dict[str, Any] = {"flags": ["complete"]}

    def server(name: str, summary: str, pieces: list[tuple[int, bytes]], *expect: Json, **more: Any) -> Json:
        return slow(name, summary, "server", pieces, *expect, **more)

    return [
        server(
            "request-with-a-slow-body",
            "The header is in time, the body takes a minute.",
            _cut(CALL, HEADER, MINUTE),
            _taken(CALL, PARAMS),
            **complete,
        ),
        server(
            "request-without-its-last-byte",
            "All but one byte are in time.",
            _cut(CALL, len(data) - 1, MINUTE),
            _taken(CALL, PARAMS),
            **complete,
        ),
        server(
            "request-byte-by-byte",
            "The header at once, then a byte each second.",
            one_by_one,
            _taken(CALL, PARAMS),
            **complete,
        ),
        server(
            "request-without-the-last-byte-of-its-header",
            "67 bytes are in time, the 68th is not.",
            _cut(CALL, HEADER - 1, LATE),
            refused("STALE_TIMESTAMP", "freshness", 1),
            flags=["boundary"],
        ),
        server(
            "request-oldest-at-its-header",
            "Exactly the tolerance behind when the header arrives.",
            _cut(CALL.but(timestamp=NOW - TOLERANCE_MS), HEADER, MINUTE),
            _taken(CALL.but(timestamp=NOW - TOLERANCE_MS), PARAMS),
            flags=["boundary", "complete"],
        ),
        server(
            "request-from-the-future-at-its-header",
            "Too new when the header arrives, and within the tolerance when the frame is complete.",
            _cut(future, HEADER, MINUTE),
            STALE_ERROR,
            **complete,
        ),
        server(
            "request-behind-a-slow-one",
            "Made with the slow one, and arrives a minute later.",
            [(0, data[:HEADER]), (MINUTE, data[HEADER:] + SECOND.encode())],
            _taken(CALL, PARAMS),
            refused("STALE_TIMESTAMP", "freshness", 2),
            flags=["behind"],
        ),
        server(
            "fresh-request-behind-a-slow-one",
            "Made a minute later, and arrives in the same read as the end of the slow one.",
            [(0, data[:HEADER]), (MINUTE, data[HEADER:] + fresh.encode())],
            _taken(CALL, PARAMS),
            _taken(fresh, {}),
            flags=["behind"],
        ),
        server(
            "fresh-request-behind-a-stale-slow-one",
            "The time of a stale frame's header concerns that frame alone.",
            [(0, future.encode()[:HEADER]), (MINUTE, future.encode()[HEADER:] + fresh.encode())],
            STALE_ERROR,
            _taken(fresh, {}),
            flags=["behind", "complete"],
        ),
    ]


def _at_the_client() -> list[Json]:
    value, complete = {"value": "on a slow link"}, {"flags": ["complete"]}
    data, future = ANSWER.encode(), ANSWER.but(timestamp=NOW + LATE)
    waits: dict[str, Any] = {"in_flight": [1]}

    def client(name: str, summary: str, pieces: list[tuple[int, bytes]], *expect: Json, **more: Any) -> Json:
        return slow(name, summary, "client", pieces, *expect, **waits, **more)

    return [
        client(
            "response-with-a-slow-body",
            "The header is in time, the body takes a minute.",
            _cut(ANSWER, HEADER, MINUTE),
            accepted(ANSWER, value),
            **complete,
        ),
        client(
            "error-with-a-slow-body",
            "The same for ERROR.",
            _cut(NOT_FOUND, HEADER, MINUTE),
            accepted(NOT_FOUND, FAILED),
            **complete,
        ),
        client(
            "response-without-the-last-byte-of-its-header",
            "67 bytes are in time, the 68th is not.",
            _cut(ANSWER, HEADER - 1, LATE),
            LOST,
            flags=["boundary"],
        ),
        client(
            "response-from-the-future-at-its-header",
            "Too new when the header arrives, and within the tolerance when the frame is complete.",
            _cut(future, HEADER, MINUTE),
            LOST,
            **complete,
        ),
        slow(
            "response-behind-a-slow-one",
            "Made with the slow one, and arrives a minute later.",
            "client",
            [(0, data[:HEADER]), (MINUTE, data[HEADER:] + ANSWER.but(stream=2, counter=2).encode())],
            accepted(ANSWER, value),
            refused("DATA_LOSS", "freshness", 2),
            in_flight=[1, 2],
            flags=["behind"],
        ),
    ]
