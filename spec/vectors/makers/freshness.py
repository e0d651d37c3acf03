"""Salt, counter and timestamp, checked against the receiver's state."""

from __future__ import annotations

from typing import Any

from makers.forms import KINDS, NOW, SALT, TOKEN, TOLERANCE_MS, Frame, fixarray, fixmap, pack
from makers.shape import Json, accepted, dropped, refused, request, typed, vector

SUBJECT = "Salt, counter and timestamp, checked against the receiver's state."
NOTES = {
    "boundary": "Exactly at, or one past, the edge; both edges are inclusive.",
    "integer-width": "Values whose difference overflows 64 bits, or is lost in a float.",
    "order": "Two faults in one frame; catches checks in another order than the specification's.",
    "replay": "A frame that was accepted once; it must not be accepted twice.",
    "row": "Stale frames in a row: the tenth ends the connection, a fresh one resets the count.",
}
ECHO = fixarray(pack("echo"), fixmap())
GOOD = Frame(KINDS["REQUEST"], stream=1, token=TOKEN, body=ECHO, counter=8)
STALE = GOOD.but(timestamp=NOW - TOLERANCE_MS - 1)
STALE_ERROR = refused("STALE_TIMESTAMP", "freshness", 1)
LOST = refused("DATA_LOSS", "freshness", 1)
REPLAYED = refused("REPLAYED", "freshness")


def taken(frame: Frame) -> Json:
    return accepted(frame, request("echo", {}))


def join(*frames: Frame) -> bytes:
    return b"".join(frame.encode() for frame in frames)


def vectors() -> list[Json]:
    return [*_nonces(), *_timestamps(), *_rows(), *_other_kinds(), *_order(), *_at_the_client()]


def _fault(name: str, summary: str, frame: Frame, outcome: Json, **more: Any) -> Json:
    more.setdefault("last_counter", 7)
    return vector(name, summary, "server", frame, outcome, **more)


def _fresh(name: str, summary: str, frame: Frame, **more: Any) -> Json:
    return _fault(name, summary, frame, taken(frame), **more)


def _nonces() -> list[Json]:
    return [
        _fault(
            "salt-of-another-connection",
            "A valid frame, captured on another connection.",
            GOOD.but(salt=b"other123"),
            REPLAYED,
            flags=["replay"],
        ),
        _fault("salt-one-bit-off", "The last bit differs.", GOOD.but(salt=SALT[:7] + b"\x19"), REPLAYED),
        _fault("salt-first-byte-off", "The first byte differs.", GOOD.but(salt=b"\x00" + SALT[1:]), REPLAYED),
        _fault("salt-zero", "Eight zero bytes.", GOOD.but(salt=bytes(8)), REPLAYED),
        _fault("salt-little-endian", "The salt's bytes reversed.", GOOD.but(salt=SALT[::-1]), REPLAYED),
        _fault(
            "counter-equal",
            "The counter that was used last.",
            GOOD.but(counter=7),
            REPLAYED,
            flags=["boundary"],
        ),
        _fault("counter-lower", "A counter used before.", GOOD.but(counter=3), REPLAYED),
        _fault(
            "counter-zero-first",
            "A client's first frame has 1 or more.",
            GOOD.but(counter=0),
            REPLAYED,
            last_counter=0,
            flags=["boundary"],
        ),
        _fault(
            "counter-wrapped",
            "After 2^64 - 1 there is no next one.",
            GOOD.but(counter=0),
            REPLAYED,
            last_counter=2**64 - 1,
            flags=["integer-width"],
        ),
        _fault(
            "counter-equal-beyond-a-double",
            "2^53 + 1 after 2^53 + 1; as doubles, 2^53 + 1 and 2^53 are the same.",
            GOOD.but(counter=2**53 + 1),
            REPLAYED,
            last_counter=2**53 + 1,
            flags=["integer-width"],
        ),
        vector(
            "counter-same-frame-twice",
            "The same bytes again on the same connection.",
            "server",
            join(GOOD, GOOD),
            taken(GOOD),
            REPLAYED,
            flags=["replay"],
        ),
        _fresh("counter-next", "One more than the last.", GOOD, flags=["boundary"]),
        _fresh(
            "counter-beyond-signed",
            "2^63 after 2^63 - 1.",
            GOOD.but(counter=2**63),
            last_counter=2**63 - 1,
            flags=["integer-width"],
        ),
    ]


def _timestamps() -> list[Json]:
    at = GOOD.but
    wide: dict[str, Any] = {"flags": ["integer-width"]}
    edge: dict[str, Any] = {"flags": ["boundary"]}
    return [
        _fresh("timestamp-now", "Exactly the receiver's time.", GOOD),
        _fresh("timestamp-oldest", "Exactly the tolerance behind.", at(timestamp=NOW - TOLERANCE_MS), **edge),
        _fresh("timestamp-newest", "Exactly the tolerance ahead.", at(timestamp=NOW + TOLERANCE_MS), **edge),
        _fault(
            "timestamp-too-old",
            "1 ms more than the tolerance behind.",
            at(timestamp=NOW - TOLERANCE_MS - 1),
            STALE_ERROR,
            **edge,
        ),
        _fault(
            "timestamp-too-new",
            "1 ms more than the tolerance ahead.",
            at(timestamp=NOW + TOLERANCE_MS + 1),
            STALE_ERROR,
            **edge,
        ),
        _fault("timestamp-zero", "1970.", at(timestamp=0), STALE_ERROR, **wide),
        _fault(
            "timestamp-2-63", "2^63: negative if read as signed.", at(timestamp=2**63), STALE_ERROR, **wide
        ),
        _fault("timestamp-largest", "2^64 - 1.", at(timestamp=2**64 - 1), STALE_ERROR, **wide),
        _fault(
            "timestamp-wraps-to-now",
            "2^64 - 1 lies 1 ms before 0, if the difference wraps.",
            at(timestamp=2**64 - 1),
            STALE_ERROR,
            now=0,
            **wide,
        ),
        _fault(
            "timestamp-in-seconds",
            "The time in seconds, a common mistake.",
            at(timestamp=NOW // 1000),
            STALE_ERROR,
        ),
        _fresh(
            "timestamp-zero-early", "A clock that has just begun.", at(timestamp=0), now=TOLERANCE_MS, **edge
        ),
        _fresh("timestamp-early-future", "now - tolerance is below zero.", at(timestamp=5), now=4, **wide),
        _fault(
            "timestamp-narrow-too-old",
            "Another tolerance.",
            at(timestamp=NOW - 5001),
            STALE_ERROR,
            tolerance_ms=5000,
            **edge,
        ),
        _fresh(
            "timestamp-narrow-oldest",
            "Another tolerance, at its edge.",
            at(timestamp=NOW - 5000),
            tolerance_ms=5000,
            **edge,
        ),
    ]


def _rows() -> list[Json]:
    nine = [STALE.but(counter=n) for n in range(1, 10)]
    fresh = GOOD.but(counter=10)
    again = [STALE.but(counter=n) for n in range(11, 20)]
    ping = [Frame(KINDS["PING"], counter=n, timestamp=STALE.timestamp) for n in range(1, 10)]
    last = refused("STALE_TIMESTAMP", "freshness")
    row: dict[str, Any] = {"flags": ["row"]}
    return [
        vector(
            "stale-uses-its-counter",
            "The counter of a stale frame counts as used.",
            "server",
            join(STALE, GOOD),
            STALE_ERROR,
            REPLAYED,
            flags=["replay"],
        ),
        vector(
            "stale-then-fresh",
            "The next request is taken.",
            "server",
            join(STALE, GOOD.but(counter=9)),
            STALE_ERROR,
            taken(GOOD.but(counter=9)),
            **row,
        ),
        vector(
            "stale-nine",
            "Nine in a row: nine requests are refused.",
            "server",
            join(*nine),
            *[STALE_ERROR] * 9,
            **row,
        ),
        vector(
            "stale-ten",
            "The tenth in a row ends the connection.",
            "server",
            join(*nine, STALE.but(counter=10)),
            *[STALE_ERROR] * 9,
            last,
            **row,
        ),
        vector(
            "stale-nine-fresh-nine",
            "A fresh frame resets the count.",
            "server",
            join(*nine, fresh, *again),
            *[STALE_ERROR] * 9,
            taken(fresh),
            *[STALE_ERROR] * 9,
            **row,
        ),
        vector(
            "stale-nine-pings-and-a-request",
            "Dropped frames count, too.",
            "server",
            join(*ping, STALE.but(counter=10)),
            *[dropped("stale timestamp")] * 9,
            last,
            **row,
        ),
    ]


def _other_kinds() -> list[Json]:
    made = [
        _fault(
            f"stale-{kind.lower()}",
            f"A stale {kind} is dropped.",
            Frame(KINDS[kind], stream=stream, token=TOKEN, counter=8, timestamp=STALE.timestamp),
            dropped("stale timestamp"),
            in_flight=[1],
        )
        for kind, stream in (("PING", 0), ("PONG", 0))
    ]
    cancel = Frame(KINDS["CANCEL"], stream=1, token=TOKEN, counter=8, timestamp=STALE.timestamp)
    ping = Frame(KINDS["PING"], counter=8)
    return [
        *made,
        _fault("stale-cancel", "A stale CANCEL is honoured.", cancel, accepted(cancel), in_flight=[1]),
        _fault("ping-counter-equal", "PING is judged like any frame.", ping.but(counter=7), REPLAYED),
        _fault(
            "ping-salt-of-another-connection",
            "PING is judged like any frame.",
            ping.but(salt=bytes(8)),
            REPLAYED,
        ),
        vector(
            "ping-uses-its-counter",
            "PING and REQUEST count together.",
            "server",
            join(ping, GOOD),
            accepted(ping),
            REPLAYED,
            last_counter=7,
        ),
    ]


def _order() -> list[Json]:
    order: dict[str, Any] = {"flags": ["order"]}
    cancel = Frame(KINDS["CANCEL"], stream=1, token=TOKEN, counter=8, body=b"\xc0")
    return [
        _fault(
            "order-salt-before-timestamp",
            "Wrong salt and stale.",
            STALE.but(salt=bytes(8)),
            REPLAYED,
            **order,
        ),
        _fault(
            "order-counter-before-timestamp",
            "Old counter and stale.",
            STALE.but(counter=7),
            REPLAYED,
            **order,
        ),
        _fault(
            "order-timestamp-before-token",
            "Stale, with an unknown token.",
            STALE.but(token=b"?" * 32),
            STALE_ERROR,
            **order,
        ),
        _fault(
            "order-timestamp-before-body",
            "Stale, with a body that is not msgpack.",
            STALE.but(body=b"\xc1"),
            STALE_ERROR,
            **order,
        ),
        _fault(
            "order-salt-before-empty-body",
            "CANCEL with a body, of another connection.",
            cancel.but(salt=bytes(8)),
            REPLAYED,
            in_flight=[1],
            **order,
        ),
        _fault(
            "order-timestamp-before-empty-body",
            "PING with a body, and stale.",
            Frame(KINDS["PING"], counter=8, timestamp=0, body=b"\xc0"),
            dropped("stale timestamp"),
            **order,
        ),
    ]


def _at_the_client() -> list[Json]:
    answer = Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, body=pack(None), counter=8)
    error = answer.but(kind=KINDS["ERROR"], body=pack([5, "no such thing"]))
    details = {"server_time": NOW + 3_600_000}
    correction = Frame(
        KINDS["ERROR"],
        stream=1,
        token=TOKEN,
        counter=8,
        timestamp=NOW + 3_600_000,
        body=pack([67, "correct the clock", details]),
    )
    said = {"code": 67, "message": "correct the clock", "details": typed(details)}
    known: dict[str, Any] = {"last_counter": 7}
    return [
        vector(
            "client-salt-of-another-connection",
            "A client checks the salt too.",
            "client",
            answer.but(salt=bytes(8)),
            REPLAYED,
            **known,
        ),
        vector(
            "client-counter-equal",
            "A client checks the counter too.",
            "client",
            answer.but(counter=7),
            REPLAYED,
            **known,
        ),
        vector(
            "client-counter-zero",
            "WELCOME has used counter 0.",
            "client",
            answer.but(counter=0),
            REPLAYED,
            flags=["boundary"],
        ),
        vector(
            "client-stale-response",
            "A client checks the timestamp too: the call fails.",
            "client",
            answer.but(timestamp=STALE.timestamp),
            LOST,
            **known,
        ),
        vector(
            "client-stale-error",
            "A stale ERROR fails the call as well.",
            "client",
            error.but(timestamp=STALE.timestamp),
            LOST,
            **known,
        ),
        vector(
            "client-stale-response-to-nothing",
            "A stale answer to nothing is dropped.",
            "client",
            answer.but(timestamp=STALE.timestamp),
            dropped("stale timestamp"),
            in_flight=[],
            **known,
        ),
        vector(
            "client-response-oldest",
            "At the edge.",
            "client",
            answer.but(timestamp=NOW - TOLERANCE_MS),
            accepted(answer.but(timestamp=NOW - TOLERANCE_MS), {"value": None}),
            flags=["boundary"],
            **known,
        ),
        vector(
            "client-stale-error-stale-timestamp",
            "STALE_TIMESTAMP is processed whatever its own timestamp is, because it corrects the clock.",
            "client",
            correction,
            accepted(correction, said),
            **known,
        ),
    ]
