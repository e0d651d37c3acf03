"""Frames judged by the state of the conversation: the greeting, streams in flight, sessions."""

from __future__ import annotations

from typing import Any

from makers.forms import (
    KINDS,
    LIMIT_BEFORE_SESSION,
    NO_TOKEN,
    OTHER_TOKEN,
    SALT,
    TOKEN,
    Frame,
    fixarray,
    fixmap,
    pack,
)
from makers.frames import WELCOME
from makers.shape import Json, accepted, dropped, refused, request, typed, vector

SUBJECT = "Frames judged by the state of the conversation: the greeting, streams in flight, sessions."
NOTES = {
    "boundary": "One past the largest value allowed; catches comparisons that are off by one.",
    "order": "Two faults in one frame; catches checks in another order than the specification's.",
    "before-session": "The zero token on a method that is not public.",
    "greeting": "Exactly one WELCOME, and it is the first frame; catches clients that trust a salt too early.",
}
ECHO = fixarray(pack("echo"), fixmap())
CALL = Frame(KINDS["REQUEST"], stream=5, token=TOKEN, body=ECHO)
UNKNOWN = b"?" * 32
REUSED = refused("PROTOCOL_ERROR", "stream")
NO_SESSION = refused("UNAUTHENTICATED", "token", 5)


def vectors() -> list[Json]:
    return [*_streams(), *_tokens(), *_cancels(), *_at_the_client(), *_greetings(), *_contents()]


def _server(name: str, summary: str, frame: Frame, outcome: Json, **more: Any) -> Json:
    return vector(name, summary, "server", frame, outcome, **more)


def _streams() -> list[Json]:
    taken = accepted(CALL, request("echo", {}))
    order: dict[str, Any] = {"flags": ["order"], "in_flight": [5]}
    return [
        _server("stream-in-flight", "A stream is used again before its answer.", CALL, REUSED, in_flight=[5]),
        _server(
            "stream-beside-another", "Other streams in flight do not matter.", CALL, taken, in_flight=[4, 6]
        ),
        _server(
            "order-stream-before-token",
            "In flight, with an unknown token.",
            CALL.but(token=UNKNOWN),
            REUSED,
            **order,
        ),
        _server(
            "order-stream-before-body",
            "In flight, with a body that is not msgpack.",
            CALL.but(body=b"\xc1"),
            REUSED,
            **order,
        ),
        _server(
            "order-counter-before-stream",
            "In flight, with an old counter.",
            CALL.but(counter=0),
            refused("REPLAYED", "freshness"),
            **order,
        ),
    ]


def _tokens() -> list[Json]:
    early: dict[str, Any] = {"tokens": [], "limit": LIMIT_BEFORE_SESSION, "flags": ["before-session"]}
    zero = CALL.but(token=NO_TOKEN)
    room = LIMIT_BEFORE_SESSION - 64
    large = zero.but(body=b"\xc1" * (room + 1))
    return [
        _server("token-zero-for-a-private-method", "echo needs a session.", zero, NO_SESSION, **early),
        _server(
            "token-zero-beside-a-session",
            "Another session of the connection does not help.",
            zero,
            NO_SESSION,
            flags=["before-session"],
        ),
        _server("token-unknown", "An unknown token.", CALL.but(token=UNKNOWN), NO_SESSION),
        _server(
            "token-one-bit-off",
            "The last bit of a valid token differs.",
            CALL.but(token=TOKEN[:31] + b"\x21"),
            NO_SESSION,
        ),
        _server(
            "token-unknown-for-a-public-method",
            "The token is checked on every REQUEST, even if none is needed.",
            CALL.but(token=UNKNOWN, body=fixarray(pack("server.info"), pack(None))),
            NO_SESSION,
        ),
        _server(
            "order-token-before-body",
            "Unknown token, and a body that is not msgpack.",
            CALL.but(token=UNKNOWN, body=b"\xc1"),
            NO_SESSION,
            flags=["order"],
        ),
        _server(
            "token-zero-above-the-limit-before-a-session",
            "On a connection whose limit is larger: refused on its stream, and the body is not decoded.",
            large,
            NO_SESSION,
            flags=["boundary", "before-session"],
        ),
    ]


def _cancels() -> list[Json]:
    cancel = Frame(KINDS["CANCEL"], stream=5, token=TOKEN)
    other = cancel.but(token=OTHER_TOKEN)
    both = [TOKEN.hex(), OTHER_TOKEN.hex()]
    return [
        _server("cancel-not-in-flight", "Nothing to cancel: ignored.", cancel, dropped("not in flight")),
        _server(
            "cancel-with-the-zero-token",
            "Not the token of its request: ignored.",
            cancel.but(token=NO_TOKEN),
            dropped("other token"),
            in_flight=[5],
        ),
        _server(
            "cancel-with-another-token",
            "Not the token of its request: ignored.",
            other,
            dropped("other token"),
            in_flight=[5],
            tokens=both,
        ),
        _server(
            "cancel-with-an-unknown-token",
            "Not the token of its request: ignored.",
            cancel.but(token=UNKNOWN),
            dropped("other token"),
            in_flight=[5],
        ),
    ]


def _at_the_client() -> list[Json]:
    answer = Frame(KINDS["RESPONSE"], stream=5, token=TOKEN, body=pack(None))
    error = Frame(KINDS["ERROR"], stream=5, token=TOKEN, body=pack([5, "no such thing"]))
    late = dropped("not in flight")
    first = answer.but(stream=6)
    second = answer.but(counter=2)
    return [
        vector(
            "response-to-nothing",
            "An answer without a request is dropped and counted.",
            "client",
            answer,
            late,
            in_flight=[],
        ),
        vector("error-to-nothing", "The same for ERROR.", "client", error, late, in_flight=[]),
        vector(
            "response-twice",
            "The second answer is dropped.",
            "client",
            answer.encode() + second.encode(),
            accepted(answer, {"value": None}),
            late,
            in_flight=[5],
        ),
        vector(
            "responses-out-of-order",
            "Answers are matched by stream, never by order.",
            "client",
            first.encode() + second.encode(),
            accepted(first, {"value": None}),
            accepted(second, {"value": None}),
            in_flight=[5, 6],
        ),
    ]


def _greetings() -> list[Json]:
    welcome = Frame(KINDS["WELCOME"], counter=0, body=pack(WELCOME))
    answer = Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, body=pack(None))
    ping = Frame(KINDS["PING"])
    greeted = accepted(welcome, {"map": typed(WELCOME)})
    first: dict[str, Any] = {"salt": None, "tokens": [], "flags": ["greeting"]}

    def bad(name: str, summary: str, frame: Frame, **context: Any) -> Json:
        outcome = refused("PROTOCOL_ERROR", "greeting")
        return vector(name, summary, "client", frame, outcome, **{**first, **context})

    return [
        bad("first-frame-response", "WELCOME comes first.", answer),
        bad("first-frame-ping", "WELCOME comes first, also before PING.", ping),
        bad("welcome-counter-1", "WELCOME has counter 0.", welcome.but(counter=1)),
        bad(
            "welcome-twice", "A second WELCOME, fresh by its nonce.", welcome.but(counter=1), salt=SALT.hex()
        ),
        vector(
            "welcome-and-a-frame",
            "What follows WELCOME in the same read is judged by its salt.",
            "client",
            welcome.encode() + ping.encode(),
            greeted,
            accepted(ping),
            **first,
        ),
        vector(
            "welcome-and-a-frame-with-another-salt",
            "The salt of WELCOME applies at once.",
            "client",
            welcome.encode() + ping.but(salt=bytes(8)).encode(),
            greeted,
            refused("REPLAYED", "freshness"),
            **first,
        ),
    ]


def _contents() -> list[Json]:
    wrong = refused("PROTOCOL_ERROR", "content")
    made = []
    changes: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("without-version-1", {"versions": [2, 3]}, "The server does not speak this version."),
        ("versions-empty", {"versions": []}, "The server speaks no version."),
        ("max-frame-str", {"max_frame": "1048576"}, "max_frame is an int."),
        ("max-frame-63", {"max_frame": 63}, "No frame would fit."),
        ("max-streams-0", {"max_streams": 0}, "No request could be made."),
        ("tolerance-negative", {"tolerance_ms": -1}, "A tolerance is not negative."),
        ("sts-nil", {"sts": None}, "sts is a map."),
    )
    for name, change, summary in changes:
        frame = Frame(KINDS["WELCOME"], counter=0, body=pack(WELCOME | change))
        made.append(vector(f"welcome-{name}", summary, "client", frame, wrong, salt=None, tokens=[]))
    for key in WELCOME:
        frame = Frame(KINDS["WELCOME"], counter=0, body=pack({k: v for k, v in WELCOME.items() if k != key}))
        name = f"welcome-without-{key.replace('_', '-')}"
        made.append(vector(name, f"{key} is missing.", "client", frame, wrong, salt=None, tokens=[]))
    for name, body, summary in (
        ("goaway-empty-map", {}, "reason and retry_after_ms are missing."),
        ("goaway-reason-int", {"reason": 1, "retry_after_ms": 0}, "reason is a str."),
        ("goaway-retry-negative", {"reason": "", "retry_after_ms": -1}, "A delay is not negative."),
    ):
        frame = Frame(KINDS["GOAWAY"], body=pack(body))
        made.append(vector(name, summary, "client", frame, wrong))
    return made
