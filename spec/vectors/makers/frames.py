"""Valid frames: each kind, with the meaning of each field."""

from __future__ import annotations

from typing import Any

from makers.forms import (
    KINDS,
    LIMIT_BEFORE_SESSION,
    NO_TOKEN,
    NOW,
    OTHER_TOKEN,
    TOKEN,
    Frame,
    pack,
)
from makers.shape import Json, accepted, request, typed, vector

SUBJECT = "Valid frames: each kind, with the meaning of each field."
NOTES = {
    "boundary": "The largest or smallest value allowed; catches comparisons that are off by one.",
    "extension": "An extension that ZCP/1 allows; catches receivers that refuse unknown content.",
    "integer-width": "A value above 2^31 or 2^53; catches signed or floating-point integers.",
    "before-session": "Sent with the zero token; catches receivers that require a session for public methods.",
}

WELCOME: dict[str, Any] = {
    "server": "zcproto",
    "versions": [1],
    "max_frame": 1_048_576,
    "max_streams": 128,
    "idle_timeout_ms": 300_000,
    "tolerance_ms": 30_000,
    "sts": {"max_age": 31_536_000, "include_subdomains": True},
}
DEVICE_SIGNATURE = bytes(range(64))
REFRESH_TOKEN = bytes(range(201, 233))
OPENED: dict[str, Any] = {
    "token": TOKEN,
    "id": "s-5fd2a1c07b3e",
    "user": "ada",
    "expires_at": NOW + 86_400_000,
    "idle_timeout_ms": 3_600_000,
    "refresh_token": None,
    "refresh_expires_at": None,
    "bound": False,
}
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def vectors() -> list[Json]:
    return [*_to_the_server(), *_answers(), *_errors(), *_of_the_connection(), *_events()]


def _request(name: str, summary: str, message: list[Any], frame: Frame | None = None, **more: Any) -> Json:
    frame = (frame or Frame(KINDS["REQUEST"], stream=1, token=TOKEN)).but(body=pack(message))
    known = ("deadline_ms", "idempotency_key", "traceparent")
    meta = (
        {key: message[2][key] for key in known if message[2].get(key) is not None}
        if len(message) == 3
        else None
    )
    return vector(
        name, summary, "server", frame, accepted(frame, request(message[0], message[1], meta)), **more
    )


def _to_the_server() -> list[Json]:
    public = Frame(KINDS["REQUEST"], stream=1)
    before = {"tokens": [], "limit": LIMIT_BEFORE_SESSION, "flags": ["before-session"]}
    private = Frame(KINDS["REQUEST"], stream=1, token=TOKEN)
    echo = ["echo", {"text": "hi"}]
    cancel = Frame(KINDS["CANCEL"], stream=9, token=TOKEN)
    attach: Any = ["session.attach", {"signature": DEVICE_SIGNATURE}]
    key = {
        "scheme": "api_key",
        "client": "example/1.0",
        "user": "ada",
        "key": "an example key, not a real one",
    }
    device = {"scheme": "ed25519", "client": "example/1.0", "device": "d-1", "signature": DEVICE_SIGNATURE}
    enroll = {"code": "1234-5678", "public_key": TOKEN, "name": "phone"}
    return [
        _request("request-without-params", "params is nil.", ["server.info", None], public, **before),
        _request(
            "request-session-open-api-key",
            "session.open by API key.",
            ["session.open", key],
            public,
            **before,
        ),
        _request(
            "request-session-open-ed25519",
            "session.open by device.",
            ["session.open", device],
            public,
            **before,
        ),
        _request(
            "request-session-refresh",
            "session.refresh is sent with the zero token: the old one may be dead.",
            ["session.refresh", {"refresh_token": REFRESH_TOKEN}],
            public,
            **before,
        ),
        _request(
            "request-device-enroll", "device.enroll is public.", ["device.enroll", enroll], public, **before
        ),
        _request("request-session-attach", "session.attach carries the bound token.", attach, private),
        _request("request-named-params", "A call within a session.", echo, private),
        _request("request-params-empty-map", "An empty map of params.", ["session.info", {}], private),
        _request(
            "request-with-meta",
            "All three keys of meta.",
            ["echo", {}, {"deadline_ms": 1500, "idempotency_key": "order-7", "traceparent": TRACEPARENT}],
            private,
        ),
        _request("request-meta-empty", "An empty meta.", ["echo", {}, {}], private),
        _request(
            "request-meta-unknown-key",
            "Unknown keys of meta are ignored.",
            ["echo", {}, {"priority": 3, "deadline_ms": 10}],
            private,
            flags=["extension"],
        ),
        _request(
            "request-meta-nil-values",
            "A key of meta whose value is nil counts as absent.",
            ["echo", {}, {"deadline_ms": None, "idempotency_key": None, "traceparent": None}],
            private,
        ),
        _request(
            "request-stream-largest",
            "Stream 2^32 - 1.",
            echo,
            private.but(stream=2**32 - 1),
            flags=["boundary", "integer-width"],
        ),
        _request(
            "request-counter-largest",
            "Counter 2^64 - 1, the last that a connection can use.",
            echo,
            private.but(counter=2**64 - 1),
            flags=["boundary", "integer-width"],
            last_counter=2**64 - 2,
        ),
        _request(
            "request-counter-with-gap",
            "Counters grow; they need not grow by one.",
            echo,
            private.but(counter=2**53 + 1),
            flags=["integer-width"],
            last_counter=2**53,
        ),
        _request(
            "request-counter-first",
            "The first frame of a client has counter 1 or more.",
            echo,
            private.but(counter=1),
            flags=["boundary"],
            last_counter=0,
        ),
        _request(
            "request-of-another-session",
            "One connection carries frames of several sessions: the token of each frame decides.",
            echo,
            private.but(token=OTHER_TOKEN),
            tokens=[TOKEN.hex(), OTHER_TOKEN.hex()],
        ),
        vector(
            "cancel",
            "CANCEL with the token of its request.",
            "server",
            cancel,
            accepted(cancel),
            in_flight=[9],
        ),
    ]


def _answer(name: str, summary: str, result: Any, **more: Any) -> Json:
    frame = Frame(KINDS["RESPONSE"], stream=1, token=more.pop("token", TOKEN), body=pack(result))
    return vector(name, summary, "client", frame, accepted(frame, {"value": typed(result)}), **more)


def _answers() -> list[Json]:
    refresh = {"refresh_token": REFRESH_TOKEN, "refresh_expires_at": NOW + 30 * 86_400_000}
    return [
        _answer("response-nil", "A result may be nil.", None),
        _answer("response-empty-map", "As session.attach and session.close answer.", {}),
        _answer("response-map", "As echo answers.", {"text": "hi"}),
        _answer(
            "response-int", "As time answers: milliseconds, beyond 32 bits.", NOW, flags=["integer-width"]
        ),
        _answer(
            "response-array", "As session.list answers.", [{"id": "s-1", "current": True}, {"id": "s-2"}]
        ),
        _answer("response-bin", "A result of bytes.", b"\x00\xff"),
        _answer("response-session-open", "A new session without refresh token.", OPENED, token=NO_TOKEN),
        _answer(
            "response-session-open-refresh", "One with a refresh token.", OPENED | refresh, token=NO_TOKEN
        ),
    ]


def _error(name: str, summary: str, code: int, text: str, details: Any = None, **more: Any) -> Json:
    body = [code, text] if details is None else [code, text, details]
    frame = Frame(
        KINDS["ERROR"], stream=more.pop("stream", 1), token=more.pop("token", TOKEN), body=pack(body)
    )
    message = {"code": code, "message": text, "details": typed(details or {})}
    return vector(name, summary, "client", frame, accepted(frame, message), **more)


def _errors() -> list[Json]:
    return [
        _error("error-on-a-stream", "An ERROR that answers a request.", 5, "no such session"),
        _error("error-with-empty-details", "Details may be an empty map.", 5, "no such session", {}),
        _error(
            "error-retry-after",
            "UNAVAILABLE contains the time to wait.",
            14,
            "try again",
            {"retry_after_ms": 250},
        ),
        _error(
            "error-session-limit",
            "The limit on sessions carries only limit.",
            8,
            "too many sessions of this user: close one",
            {"limit": 5},
            token=NO_TOKEN,
        ),
        _error(
            "error-attach", "A bound token on a new connection.", 16, "attach this session", {"attach": True}
        ),
        _error(
            "error-token-expired", "A token past its limit.", 68, "the session has expired: open a new one"
        ),
        _error(
            "error-token-revoked", "A token that was revoked.", 69, "the session was revoked: open a new one"
        ),
        _error(
            "error-session-replaced", "A session that was evicted.", 70, "another session has taken the place"
        ),
        _error(
            "error-stale-timestamp", "With the server's time.", 67, "correct the clock", {"server_time": NOW}
        ),
        _error(
            "error-unknown-code",
            "An unknown code is an error of the call, too.",
            999,
            "from the future",
            flags=["extension"],
        ),
        _error(
            "error-on-stream-0",
            "A fatal ERROR concerns the connection and carries the zero token.",
            66,
            "counter was used before",
            stream=0,
            token=NO_TOKEN,
        ),
    ]


def _of_the_connection() -> list[Json]:
    welcome = Frame(KINDS["WELCOME"], counter=0, body=pack(WELCOME))
    extended = Frame(KINDS["WELCOME"], counter=0, body=pack(WELCOME | {"motd": "hello"}))
    first: dict[str, Any] = {"salt": None, "last_counter": 0, "tokens": []}
    goaway = {"reason": "shutting down", "retry_after_ms": 1000}
    made = [
        vector(
            "welcome",
            "The first frame of a connection: it carries the salt, counter 0 and the server's clock.",
            "client",
            welcome,
            accepted(welcome, {"map": typed(WELCOME)}),
            **first,
        ),
        vector(
            "welcome-unknown-key",
            "Unknown keys of WELCOME are ignored.",
            "client",
            extended,
            accepted(extended, {"map": typed(WELCOME | {"motd": "hello"})}),
            flags=["extension"],
            **first,
        ),
    ]
    for receiver in ("server", "client"):
        for kind in ("PING", "PONG"):
            frame = Frame(KINDS[kind])
            name = f"{kind.lower()}-to-the-{receiver}"
            made.append(vector(name, f"{kind} is the header alone.", receiver, frame, accepted(frame)))
    ping = Frame(KINDS["PING"], token=OTHER_TOKEN)
    leave = Frame(KINDS["GOAWAY"], body=pack(goaway))
    more = Frame(KINDS["GOAWAY"], body=pack(goaway | {"elsewhere": ["b.example:7443"]}))
    said = {"map": typed(goaway | {"elsewhere": ["b.example:7443"]})}
    return [
        *made,
        vector("ping-with-any-token", "The token of PING is ignored.", "server", ping, accepted(ping)),
        vector(
            "goaway", "No new requests are taken.", "client", leave, accepted(leave, {"map": typed(goaway)})
        ),
        vector(
            "goaway-unknown-key",
            "Unknown keys of GOAWAY are ignored.",
            "client",
            more,
            accepted(more, said),
            flags=["extension"],
        ),
    ]


def _event(name: str, summary: str, event: str, data: Any, **more: Any) -> Json:
    frame = Frame(KINDS["EVENT"], token=TOKEN, body=pack([event, data]))
    return vector(
        name, summary, "client", frame, accepted(frame, {"name": event, "data": typed(data)}), **more
    )


def _events() -> list[Json]:
    pins = {"pins": ["sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="], "from": NOW + 86_400_000}
    return [
        _event(
            "event-session-expiring",
            "A tenth of the lifetime is left.",
            "session.expiring",
            {"expires_at": NOW + 1},
        ),
        _event(
            "event-session-revoked",
            "The token in the header is dead.",
            "session.revoked",
            {"reason": "operator"},
        ),
        _event("event-pins-next", "The pin of the next certificate.", "pins.next", pins),
        _event(
            "event-unknown", "Unknown events are ignored.", "weather.changed", [1, 2], flags=["extension"]
        ),
    ]
