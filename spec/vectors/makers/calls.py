"""Calls from the server: CALL, RESULT, FAILURE and WITHDRAW (zcp1.md, section 19)."""

from __future__ import annotations

from typing import Any

from makers.forms import ALL_KINDS as KINDS
from makers.forms import NO_TOKEN, NOW, OTHER_TOKEN, TOKEN, TOLERANCE_MS, Frame, pack
from makers.items import streaming
from makers.shape import Json, accepted, dropped, refused, request, typed

SUBJECT = "Calls from the server: CALL, RESULT, FAILURE and WITHDRAW, against the state of the call."
NOTES = {
    "announced": "Without `calls` in WELCOME, or without a registration, no CALL can come.",
    "numbers": "The numbers of CALLs and of the client's requests are independent.",
}
STALE = NOW - TOLERANCE_MS - 1
CALL = Frame(
    KINDS["CALL"],
    stream=1,
    token=TOKEN,
    body=pack(["approve", {"tool": "shell"}, {"deadline_ms": 120_000}]),
)
RESULT = Frame(KINDS["RESULT"], stream=1, token=TOKEN, body=pack(True))
FAILURE = Frame(KINDS["FAILURE"], stream=1, token=TOKEN, body=pack([7, "refused"]))
WITHDRAW = Frame(KINDS["WITHDRAW"], stream=1, token=TOKEN)
CALLED = request("approve", {"tool": "shell"}, {"deadline_ms": 120_000})
HEADER = refused("PROTOCOL_ERROR", "header")
FATAL = refused("PROTOCOL_ERROR", "stream")
BODY = refused("PROTOCOL_ERROR", "body")
NOT_IN_FLIGHT = dropped("not in flight")


def vectors() -> list[Json]:
    return [*_at_the_client(), *_at_the_server(), *_headers()]


def _client(name: str, summary: str, sent: Frame | bytes, *expect: Json, **context: Any) -> Json:
    return streaming(
        name, summary, "client", sent, *expect, **{"handles": ["approve"], "calls": [], **context}
    )


def _server(name: str, summary: str, sent: Frame | bytes, *expect: Json, **context: Any) -> Json:
    return streaming(name, summary, "server", sent, *expect, **{"calls": [1], **context})


def _failed(code: str, stage: str) -> Json:
    return refused(code, stage, 1)


def _at_the_client() -> list[Json]:
    def called(body: Any) -> Frame:
        return CALL.but(body=body if isinstance(body, bytes) else pack(body))

    unknown, malformed = _failed("UNAUTHENTICATED", "token"), _failed("INVALID_ARGUMENT", "body")
    late = WITHDRAW.but(timestamp=STALE)
    meta = {"deadline_ms": 120_000, "pending": "9f86d081884c7d659a2feaa0c55ad015"}
    pending = called(["approve", {"tool": "shell"}, meta])
    return [
        _client("call", "A registered method.", CALL, accepted(CALL, CALLED)),
        _client(
            "call-with-the-number-of-a-request",
            "Both are in flight; the kind distinguishes them.",
            CALL,
            accepted(CALL, CALLED),
            in_flight=[1],
            flags=["numbers"],
        ),
        _client(
            "call-pending",
            "The id of a pending call. A client may ignore it.",
            pending,
            accepted(pending, CALLED),
        ),
        _client("call-in-flight", "Its number is in use until RESULT or FAILURE.", CALL, FATAL, calls=[1]),
        _client(
            "call-without-a-handler",
            "FAILURE UNIMPLEMENTED.",
            called(["other", None, {"deadline_ms": 1000}]),
            _failed("UNIMPLEMENTED", "method"),
        ),
        _client(
            "call-with-an-unknown-token",
            "FAILURE UNAUTHENTICATED.",
            CALL.but(token=OTHER_TOKEN),
            unknown,
        ),
        _client(
            "call-without-a-token",
            "FAILURE UNAUTHENTICATED.",
            CALL.but(token=NO_TOKEN),
            _failed("UNAUTHENTICATED", "token"),
        ),
        _client(
            "call-without-a-deadline",
            "A deadline is required.",
            called(["approve", {"tool": "shell"}]),
            malformed,
        ),
        _client(
            "call-undecodable",
            "FAILURE INVALID_ARGUMENT.",
            called(b"\xc1"),
            _failed("INVALID_ARGUMENT", "body"),
        ),
        _client(
            "call-stale",
            "FAILURE STALE_TIMESTAMP; it is not run.",
            CALL.but(timestamp=STALE),
            _failed("STALE_TIMESTAMP", "freshness"),
        ),
        _client(
            "call-never-registered",
            "The client has sent no session.handle here.",
            CALL,
            FATAL,
            handles=None,
            flags=["announced"],
        ),
        _client("withdraw", "The handler is cancelled.", WITHDRAW, accepted(WITHDRAW), calls=[1]),
        _client(
            "withdraw-stale",
            "Honoured.",
            late,
            accepted(late),
            calls=[1],
        ),
        _client("withdraw-of-nothing", "Ignored.", WITHDRAW, NOT_IN_FLIGHT),
        _client(
            "withdraw-with-another-token",
            "Ignored: it withdraws no call of this session.",
            WITHDRAW.but(token=OTHER_TOKEN),
            NOT_IN_FLIGHT,
            calls=[1],
        ),
        _client("withdraw-with-a-body", "WITHDRAW has no body.", WITHDRAW.but(body=b"\xc0"), BODY, calls=[1]),
        _client("result-from-the-server", "The wrong side.", RESULT, HEADER),
        _client("failure-from-the-server", "The wrong side.", FAILURE, HEADER),
    ]


def _at_the_server() -> list[Json]:
    replayed = refused("REPLAYED", "freshness")
    message = {"code": 7, "message": "refused", "details": typed({})}
    return [
        _server("result", "The answer.", RESULT, accepted(RESULT, {"value": True})),
        _server("failure", "The answer.", FAILURE, accepted(FAILURE, message)),
        _server(
            "result-with-the-number-of-a-request",
            "The request goes on.",
            RESULT,
            accepted(RESULT, {"value": True}),
            in_flight=[1],
            flags=["numbers"],
        ),
        _server(
            "result-twice",
            "The second is dropped.",
            RESULT.encode() + RESULT.but(counter=2).encode(),
            accepted(RESULT, {"value": True}),
            NOT_IN_FLIGHT,
        ),
        _server("result-of-nothing", "Dropped and counted.", RESULT, NOT_IN_FLIGHT, calls=[]),
        _server(
            "result-with-another-token",
            "Dropped and counted: it answers no call of this session.",
            RESULT.but(token=OTHER_TOKEN),
            NOT_IN_FLIGHT,
        ),
        _server("result-stale", "Dropped.", RESULT.but(timestamp=STALE), dropped("stale timestamp")),
        _server(
            "result-of-another-connection",
            "A replay.",
            RESULT.but(salt=bytes(8)),
            replayed,
        ),
        _server("call-from-the-client", "The wrong side.", CALL, HEADER),
        _server("withdraw-from-the-client", "The wrong side.", WITHDRAW, HEADER),
        _server(
            "result-without-calls",
            "The server has announced none.",
            RESULT,
            HEADER,
            calls=[],
            announced={"streams": None, "calls": None},
            flags=["announced"],
        ),
    ]


def _headers() -> list[Json]:
    made = []
    for frame, name in ((CALL, "call"), (WITHDRAW, "withdraw")):
        made.append(_client(f"{name}-on-stream-0", "Stream 0.", frame.but(stream=0), HEADER))
        made.append(_client(f"{name}-with-flags", "A flag is set.", frame.but(flags=1), HEADER))
    for frame, name in ((RESULT, "result"), (FAILURE, "failure")):
        made.append(_server(f"{name}-on-stream-0", "Stream 0.", frame.but(stream=0), HEADER))
        made.append(_server(f"{name}-with-flags", "A flag is set.", frame.but(flags=1), HEADER))
    return made
