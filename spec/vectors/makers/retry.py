"""What a client does after an error (section 11.1), how long it waits (11.2), and the deadlines that it sends."""

from __future__ import annotations

from math import ceil
from typing import Any

from makers.forms import CODES

SUBJECT = (
    "What a client does after an error of a call, the delays before it, and the deadline of each attempt."
)
NOTES = {
    "capped": "The ceiling is 30 s, however often it was doubled.",
    "deadline": "What is left of the timeout; catches clients that send the whole one with each attempt.",
    "details": "The code alone does not decide, or a detail has another type than expected.",
    "earlier-token": "The token of the request is no longer the client's: another call has replaced it meanwhile.",
    "final": "The client never retries, whatever it holds.",
    "no-time": "The delay would reach the end of the call's timeout.",
    "once": "The call has taken this step before.",
    "without-token": "The request had no token, so nothing that concerns a session helps.",
}
FIRST_CEILING = 100
MAX_CEILING = 30_000
REQUEST = {
    "idempotent": False,
    "token": "present",
    "done": [],
    "delays": 0,
    "time_left_ms": 30_000,
    "draining": False,
}
CLIENT = {"credentials": "key", "refresh_token": True, "reopenings": 0}
REPORT = {"step": "report"}
SEND = {"step": "send"}
UNKNOWN = {"reason": "unknown_token"}


def vectors() -> list[dict[str, Any]]:
    return [*_after_refusal(), *_after_unknown_token(), *_delays(), *_lost(), *_others(), *_deadlines()]


def ceiling(delays: int) -> int:
    """Return the ceiling in milliseconds after so many delays."""
    return min(FIRST_CEILING << delays, MAX_CEILING)


def _error(name: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"error": {"code": CODES[name], "name": name, "details": details or {}}}


def _decision(
    name: str,
    summary: str,
    outcome: dict[str, Any],
    expect: dict[str, Any],
    *,
    flags: tuple[str, ...] = (),
    random: float = 0.5,
    shown: str = "present",
    **changes: Any,
) -> dict[str, Any]:
    client = {key: changes.pop(key) for key in CLIENT if key in changes}
    return {
        "name": f"retry-{name}",
        "summary": summary,
        "flags": list(flags),
        "type": "decision",
        "outcome": outcome,
        "request": {**REQUEST, "token": shown, **changes},
        "client": {**CLIENT, **client},
        "random": random,
        "expect": expect,
    }


def _wait(after_ms: int) -> dict[str, Any]:
    return {"step": "wait", "after_ms": after_ms}


def _reopen(after_ms: int) -> dict[str, Any]:
    return {"step": "reopen", "after_ms": after_ms}


def _after_refusal() -> list[dict[str, Any]]:
    expired, stale = _error("TOKEN_EXPIRED"), _error("STALE_TIMESTAMP", {"server_time": 1767225600000})
    attach = _error("UNAUTHENTICATED", {"attach": True})
    certificate = _error("UNAUTHENTICATED", {"certificate": True})
    revoked, replaced = _error("TOKEN_REVOKED"), _error("SESSION_REPLACED")
    return [
        _decision("stale", "Sent again at once.", stale, SEND),
        _decision("stale-twice", "Only once.", stale, REPORT, done=["send"], flags=("once",)),
        _decision("stale-without-token", "A session does not matter.", stale, SEND, shown="none"),
        _decision("expired", "Refresh.", expired, {"step": "refresh"}),
        _decision(
            "expired-no-refresh-token",
            "Open a session, without a delay.",
            expired,
            _reopen(0),
            refresh_token=False,
        ),
        _decision("expired-twice", "Only once.", expired, REPORT, done=["refresh"], flags=("once",)),
        _decision(
            "expired-without-token",
            "A server must not answer this.",
            expired,
            REPORT,
            shown="none",
            flags=("without-token",),
        ),
        _decision(
            "expired-earlier-token",
            "Another call has had the session refreshed: the request is sent again with its token.",
            expired,
            SEND,
            shown="earlier",
            flags=("earlier-token",),
        ),
        _decision(
            "attach",
            "Prove the key of the device on this connection.",
            attach,
            {"step": "attach"},
            credentials="device",
        ),
        _decision(
            "attach-twice",
            "Only once.",
            attach,
            REPORT,
            credentials="device",
            done=["attach"],
            flags=("once",),
        ),
        _decision(
            "attach-not-true",
            "A detail of another type means nothing.",
            _error("UNAUTHENTICATED", {"attach": 1}),
            REPORT,
            credentials="device",
            flags=("details",),
        ),
        _decision(
            "certificate",
            "Open a session with the certificate that is shown here, without a delay.",
            certificate,
            _reopen(0),
            credentials="certificate",
        ),
        _decision(
            "certificate-twice",
            "Only once.",
            certificate,
            REPORT,
            credentials="certificate",
            done=["reopen"],
            flags=("once",),
        ),
        _decision("revoked", "The session is over.", revoked, REPORT, flags=("final",)),
        _decision("replaced", "The session is over.", replaced, REPORT, flags=("final",)),
        _decision(
            "revoked-earlier-token",
            "The client has another session by now: the request is sent again with its token.",
            revoked,
            SEND,
            shown="earlier",
            flags=("earlier-token",),
        ),
        _decision(
            "revoked-with-reason",
            "Details do not make it an unknown token.",
            _error("TOKEN_REVOKED", UNKNOWN),
            REPORT,
            flags=("details", "final"),
        ),
    ]


def _after_unknown_token() -> list[dict[str, Any]]:
    unknown = _error("UNAUTHENTICATED", UNKNOWN)
    return [
        _decision("unknown", "Open another session; do not try the refresh token.", unknown, _reopen(50)),
        *(
            _decision(
                f"unknown-{credentials}",
                f"Opened by the client's {credentials}.",
                unknown,
                _reopen(25),
                credentials=credentials,
                refresh_token=False,
                random=0.25,
            )
            for credentials in ("device", "certificate", "scheme")
        ),
        _decision("unknown-random-0", "The delay may be 0.", unknown, _reopen(0), random=0.0),
        *(
            _decision(
                f"unknown-reopening-{reopenings + 1}",
                "The ceiling doubles with each session that is opened for this reason.",
                unknown,
                _reopen(ceiling(reopenings) // 2),
                reopenings=reopenings,
                flags=("capped",) if ceiling(reopenings) == MAX_CEILING else (),
            )
            for reopenings in (1, 2, 5, 9)
        ),
        _decision("unknown-twice", "Only once.", unknown, REPORT, done=["reopen"], flags=("once",)),
        _decision(
            "unknown-no-credentials",
            "Nothing opens a session, and the refresh token is unknown as well.",
            unknown,
            REPORT,
            credentials=None,
        ),
        _decision(
            "unknown-earlier-token",
            "Another call has had the session opened: no further one.",
            unknown,
            SEND,
            shown="earlier",
            flags=("earlier-token",),
        ),
        _decision(
            "unknown-without-token",
            "A server must not answer this.",
            unknown,
            REPORT,
            shown="none",
            flags=("without-token",),
        ),
        _decision(
            "unauthenticated",
            "Refused for another reason, such as a method's own.",
            _error("UNAUTHENTICATED"),
            REPORT,
            flags=("details",),
        ),
        _decision(
            "unauthenticated-other-reason",
            "An unknown reason means nothing.",
            _error("UNAUTHENTICATED", {"reason": "unknown_user"}),
            REPORT,
            flags=("details",),
        ),
        _decision(
            "permission-denied-unknown-token",
            "The detail belongs to UNAUTHENTICATED.",
            _error("PERMISSION_DENIED", UNKNOWN),
            REPORT,
            flags=("details",),
        ),
    ]


def _delays() -> list[dict[str, Any]]:
    busy = _error("UNAVAILABLE", {"retry_after_ms": 250})
    made = [
        _decision("unavailable", "What the server asks for, and jitter.", busy, _wait(300)),
        _decision(
            "exhausted", "The same.", _error("RESOURCE_EXHAUSTED", {"retry_after_ms": 1000}), _wait(1050)
        ),
        _decision(
            "unavailable-without-token",
            "A session does not matter.",
            busy,
            _wait(300),
            shown="none",
            credentials=None,
            refresh_token=False,
        ),
        _decision("unavailable-no-delay", "Jitter alone.", _error("UNAVAILABLE"), _wait(50)),
        _decision("unavailable-random-0", "Only what the server asks for.", busy, _wait(250), random=0.0),
        _decision(
            "unavailable-delay-of-another-type",
            "The detail means nothing.",
            _error("UNAVAILABLE", {"retry_after_ms": "250"}),
            _wait(50),
            flags=("details",),
        ),
        _decision(
            "unavailable-negative-delay",
            "The detail means nothing.",
            _error("UNAVAILABLE", {"retry_after_ms": -1}),
            _wait(50),
            flags=("details",),
        ),
        _decision(
            "unavailable-draining",
            "What a server asks for that goes away concerns that server alone.",
            busy,
            _wait(50),
            draining=True,
        ),
        _decision(
            "exhausted-limit",
            "Waiting does not help.",
            _error("RESOURCE_EXHAUSTED", {"limit": 5}),
            REPORT,
            flags=("details",),
        ),
        _decision(
            "unavailable-no-time", "300 ms of 300.", busy, REPORT, time_left_ms=300, flags=("no-time",)
        ),
        _decision("unavailable-just-in-time", "300 ms of 301.", busy, _wait(300), time_left_ms=301),
        _decision(
            "unavailable-no-timeout",
            "The call waits as long as it takes.",
            _error("UNAVAILABLE", {"retry_after_ms": 60_000}),
            _wait(60_050),
            time_left_ms=None,
        ),
    ]
    for delays in (1, 2, 3, 8, 9, 40):
        made.append(
            _decision(
                f"unavailable-delay-{delays + 1}",
                "The ceiling doubles with each delay of the call.",
                _error("UNAVAILABLE"),
                _wait(ceiling(delays) // 4),
                delays=delays,
                random=0.25,
                flags=("capped",) if ceiling(delays) == MAX_CEILING else (),
            )
        )
    return made


def _lost() -> list[dict[str, Any]]:
    lost, ended = {"connection": "lost"}, {"connection": "ended"}
    return [
        _decision("lost", "The request has perhaps run.", lost, REPORT),
        _decision("lost-idempotent", "The server runs it once.", lost, _wait(50), idempotent=True),
        _decision(
            "lost-idempotent-again",
            "The request itself may be what ends the connection.",
            lost,
            _wait(200),
            idempotent=True,
            delays=2,
        ),
        _decision(
            "lost-idempotent-no-time",
            "50 ms of 40.",
            lost,
            REPORT,
            idempotent=True,
            time_left_ms=40,
            flags=("no-time",),
        ),
        _decision("ended", "GOAWAY and a clean end without an answer: it was not run.", ended, _wait(50)),
    ]


def _others() -> list[dict[str, Any]]:
    names = [name for name, code in CODES.items() if code <= CODES["UNAUTHENTICATED"]]
    decided = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNAUTHENTICATED"}
    return [
        _decision(
            f"code-{name.lower().replace('_', '-')}",
            "Reported, even if the call is idempotent.",
            _error(name, {"retry_after_ms": 250} if name == "INTERNAL" else None),
            REPORT,
            idempotent=True,
        )
        for name in names
        if name not in decided
    ] + [
        _decision(
            "code-unknown-to-the-client",
            "A code that later versions add.",
            {"error": {"code": 99, "name": None, "details": {"retry_after_ms": 250}}},
            REPORT,
        )
    ]


def _deadlines() -> list[dict[str, Any]]:
    made = []
    for name, summary, timeout, sent_at in (
        ("first", "The whole timeout.", 2000, [0]),
        ("second", "What is left.", 2000, [0, 350]),
        ("many", "Each attempt has less.", 30_000, [0, 75, 1_200, 9_400, 29_999]),
        ("fraction", "Rounded up: 0 would be refused.", 1000, [0.5, 250.25, 999.5]),
        ("passed", "An attempt at the end of the timeout, or later, is not sent.", 500, [0, 500, 700]),
        ("unlimited", "A call without a timeout sends no deadline.", None, [0, 5000]),
    ):
        left = [None if timeout is None or at >= timeout else ceil(timeout - at) for at in sent_at]
        made.append(
            {
                "name": f"deadline-{name}",
                "summary": summary,
                "flags": ["deadline"],
                "type": "deadline",
                "timeout_ms": timeout,
                "attempts_at_ms": sent_at,
                "expect": {"deadline_ms": left},
            }
        )
    return made
