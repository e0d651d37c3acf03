"""Durable streams: `resume`, ACCEPTED, the third number of CREDIT, and what ends an attachment (section 20)."""

from __future__ import annotations

from typing import Any

from makers.forms import ALL_KINDS as KINDS
from makers.forms import TOKEN, Frame, pack
from makers.frames import WELCOME
from makers.items import (
    CREDIT,
    END,
    EXT,
    FATAL,
    HEADER,
    ITEM,
    MAX_ITEM,
    MOST,
    NOT_IN_FLIGHT,
    OPEN,
    OVERRUN,
    RESPONSE,
    STALE,
    WRONG_FORM,
    stream,
    streaming,
)
from makers.shape import Json, accepted, refused, request, typed

SUBJECT = "Durable streams: resume, ACCEPTED, taken, and the end of an attachment."
NOTES = {
    "announced": "Without `streams.durable` in WELCOME, resume and ACCEPTED are refused.",
    "boundary": "The last value that is allowed, or one more.",
    "nil": "Params that are nil and params that are an empty map differ; catches peers that mix them up.",
}
BOUNDARY = ["boundary"]
LIMITS: Json = {"max_open": 64, "max_item": MAX_ITEM}
DURABLE: Json = {"streams": {**LIMITS, "durable": True}, "calls": {"max": 32}}
PLAIN: Json = {"streams": LIMITS, "calls": {"max": 32}}
ID = "kF3_9xQ0"
RUN: Json = {"id": ID, "attachment": "v81", "from": 17, "state": "running", "first": 9, "next": 20}
ACCEPTED = Frame(KINDS["ACCEPTED"], stream=1, token=TOKEN, body=pack(RUN))
LOST = refused("DATA_LOSS", "freshness", 1)


def vectors() -> list[Json]:
    return [*_resume(), *_refused_resume(), *_taken(), *_left(), *_accepted(), *_at_the_client(), *_welcome()]


def attachment(**more: Any) -> Json:
    """Return an attachment in flight that was accepted at position 17, on which five items were sent."""
    state: Json = {"takes_items": False, "resume": {"id": ID, "from": 17}, "accepted": True, "sent": 5}
    return stream(**{**state, **more})


def _vector(name: str, summary: str, to: str, sent: Frame | bytes, *expect: Json, **more: Any) -> Json:
    return streaming(name, summary, to, sent, *expect, **{"announced": DURABLE, **more})


def _attached(name: str, summary: str, to: str, sent: Frame | bytes, *expect: Json, **more: Any) -> Json:
    return _vector(name, summary, to, sent, *expect, **{"open": [attachment()], **more})


def _open(resume: Any, params: Any = None, **meta: Any) -> Frame:
    return OPEN.but(body=pack(["chat", params, {**meta, "resume": resume}]))


def _resume() -> list[Json]:
    good: tuple[tuple[str, Any, Any, list[str], str], ...] = (
        ("attach", {"id": ID, "from": 17}, None, ["nil"], "Params are nil: it attaches."),
        (
            "start",
            {"id": ID, "from": 0},
            {},
            ["nil"],
            "Params are a map: it starts the run unless the id is known.",
        ),
        ("id-1", {"id": "a", "from": 0}, {}, BOUNDARY, "The shortest id."),
        ("id-64", {"id": "aZ09_-" * 10 + "0123", "from": 0}, {}, BOUNDARY, "The longest id."),
        ("from-largest", {"id": ID, "from": MOST}, None, BOUNDARY, "The largest position."),
    )
    made = []
    for name, resume, params, flags, summary in good:
        frame = _open(resume, params)
        outcome = accepted(frame, request("chat", params, {"resume": resume}))
        made.append(_vector(f"resume-{name}", summary, "server", frame, outcome, flags=flags))
    more = _open({"id": ID, "from": 17, "more": [1]})
    known = accepted(more, request("chat", None, {"resume": {"id": ID, "from": 17}}))
    nothing = _open(None, {})
    return [
        *made,
        _vector("resume-with-more-keys", "Unknown keys are ignored.", "server", more, known),
        _vector("resume-nil", "The same as none.", "server", nothing, accepted(nothing, request("chat", {}))),
    ]


def _refused_resume() -> list[Json]:
    bad: dict[str, Any] = {
        "array": [ID, 0],
        "str": ID,
        "empty": {},
        "without-id": {"from": 0},
        "without-from": {"id": ID},
        "id-empty": {"id": "", "from": 0},
        "id-65": {"id": "a" * 65, "from": 0},
        "id-dot": {"id": "a.b", "from": 0},
        "id-space": {"id": "a ", "from": 0},
        "id-newline": {"id": "a\n", "from": 0},
        "id-not-ascii": {"id": "ä", "from": 0},
        "id-int": {"id": 1, "from": 0},
        "id-bin": {"id": b"a", "from": 0},
        "id-nil": {"id": None, "from": 0},
        "from-negative": {"id": ID, "from": -1},
        "from-2-53": {"id": ID, "from": 2**53},
        "from-float": {"id": ID, "from": 1.0},
        "from-str": {"id": ID, "from": "1"},
        "from-true": {"id": ID, "from": True},
        "from-nil": {"id": ID, "from": None},
    }
    resume = {"id": ID, "from": 0}
    flags = {"id-65": BOUNDARY, "from-2-53": BOUNDARY, "id-empty": BOUNDARY, "from-negative": BOUNDARY}
    made = [
        _vector(f"resume-{name}", "Refused.", "server", _open(value), WRONG_FORM, flags=flags.get(name, ()))
        for name, value in bad.items()
    ]
    in_request = _open(resume, {}).but(kind=KINDS["REQUEST"])
    return [
        *made,
        _vector(
            "resume-with-an-idempotency-key",
            "A stream has none.",
            "server",
            _open(resume, {}, idempotency_key="k"),
            WRONG_FORM,
        ),
        _vector("resume-in-a-request", "Only streams are durable.", "server", in_request, WRONG_FORM),
        _vector(
            "resume-not-announced",
            "The server has no durable streams.",
            "server",
            _open(resume, {}),
            refused("INVALID_ARGUMENT", "stream", 1),
            announced=PLAIN,
            flags=["announced"],
        ),
    ]


def _credit(*numbers: int) -> Frame:
    return CREDIT.but(body=pack([*numbers]))


def _taken() -> list[Json]:
    def good(name: str, summary: str, *numbers: int, **state: Any) -> Json:
        frame = _credit(*numbers)
        outcome = accepted(frame, {"credit": [*numbers]})
        return _attached(name, summary, "server", frame, outcome, open=[attachment(**state)], flags=BOUNDARY)

    def bad(name: str, summary: str, outcome: Json, *numbers: int, **state: Any) -> Json:
        frame, open_streams = _credit(*numbers), [attachment(**state)]
        return _attached(name, summary, "server", frame, outcome, open=open_streams, flags=BOUNDARY)

    body = refused("PROTOCOL_ERROR", "body")
    return [
        good("taken-none", "Two numbers stay allowed.", 8, 1000),
        good("taken-0", "A position before the attachment's first.", 8, 1000, 0),
        good("taken-all-that-was-sent", "17 and the five items.", 8, 1000, 22),
        good("taken-as-before", "It has not changed.", 8, 1000, 20, taken=20),
        bad("taken-beyond-what-was-sent", "One more.", OVERRUN, 8, 1000, 23),
        bad("taken-lower", "Positions do not go back.", OVERRUN, 8, 1000, 19, taken=20),
        bad("taken-before-accepted", "Nothing was sent.", OVERRUN, 8, 1000, 17, accepted=False, sent=0),
        bad("taken-negative", "A position is not negative.", body, 8, 1000, -1),
        bad("taken-2-53", "Above 2^53 - 1.", body, 8, 1000, 2**53),
        bad("credit-four-numbers", "There is no fourth.", body, 8, 1000, 17, 0),
    ]


def _left() -> list[Json]:
    end = refused("CANCELLED", "stream", 1, details={"reason": "detached", "detached": True})
    cancel = Frame(KINDS["CANCEL"], stream=1, token=TOKEN)
    cancelled = refused("CANCELLED", "stream", 1, details={"reason": "caller"})
    opening = [attachment(accepted=False, sent=0)]
    return [
        _attached("end-detaches", "The run goes on.", "server", END, end),
        _attached("end-before-accepted", "The client has not received it.", "server", END, end, open=opening),
        _attached("cancel-cancels-the-run", "Without `detached`.", "server", cancel, cancelled),
        _attached("item-on-an-attachment", "It takes no items.", "server", ITEM, FATAL),
    ]


def _accepted() -> list[Json]:
    opening = {"open": [attachment(accepted=False)]}

    def good(name: str, summary: str, flags: list[str], **changes: Any) -> Json:
        run = {**RUN, **changes}
        frame = ACCEPTED.but(body=pack(run))
        outcome = accepted(frame, {"map": typed(run)})
        return _attached(f"accepted-{name}", summary, "client", frame, outcome, flags=flags, **opening)

    def bad(name: str, summary: str, frame: Frame, outcome: Json = FATAL, **more: Any) -> Json:
        context = {**opening, **more}
        return _attached(f"accepted-{name}", summary, "client", frame, outcome, **context)

    def changed(name: str, summary: str, **changes: Any) -> Json:
        run = {key: value for key, value in {**RUN, **changes}.items() if value is not None}
        return bad(name, summary, ACCEPTED.but(body=pack(run)))

    return [
        good("running", "It fits the OPEN.", []),
        good("ended", "The run has ended.", [], state="ended"),
        good("at-the-end", "Nothing more is kept.", BOUNDARY, first=17, next=17),
        good("with-more-keys", "Unknown keys are ignored.", [], more=[1]),
        changed("of-another-run", "Another id.", id="other"),
        changed("from-elsewhere", "Another position.", **{"from": 16}),
        changed("first-above-from", "What was asked for is not kept.", first=18),
        changed("next-below-from", "It does not exist.", next=16),
        *(changed(f"without-{key}", f"{key} is missing.", **{key: None}) for key in RUN),
        changed("id-int", "id is a str.", id=1),
        changed("attachment-bin", "attachment is a str.", attachment=b"v81"),
        changed("state-true", "state is a str.", state=True),
        changed("first-negative", "A position is not negative.", first=-1),
        changed("next-2-53", "Above 2^53 - 1.", next=2**53),
        changed("next-float", "next is an int.", next=20.0),
        bad("array", "It is a map.", ACCEPTED.but(body=pack([*RUN.values()]))),
        bad("ext", "The map cannot be decoded.", ACCEPTED.but(body=EXT)),
        bad("twice", "Once for each OPEN.", ACCEPTED, open=[attachment()]),
        bad("on-a-plain-stream", "It was not asked for.", ACCEPTED, open=[stream()]),
        bad("on-a-request", "The stream began with REQUEST.", ACCEPTED, open=[], in_flight=[1]),
        bad("to-nothing", "Dropped and counted.", ACCEPTED, NOT_IN_FLIGHT, open=[]),
        bad("stale", "The client sends END.", ACCEPTED.but(timestamp=STALE), LOST),
        bad("on-stream-0", "Stream 0.", ACCEPTED.but(stream=0), HEADER),
        bad("with-flags", "A flag is set.", ACCEPTED.but(flags=1), HEADER),
        bad(
            "not-announced",
            "The server has no durable streams.",
            ACCEPTED,
            HEADER,
            open=[stream()],
            announced=PLAIN,
            flags=["announced"],
        ),
        _attached("accepted-from-the-client", "The wrong side.", "server", ACCEPTED, HEADER),
    ]


def _at_the_client() -> list[Json]:
    opening: Json = {"open": [attachment(accepted=False)]}
    error = Frame(KINDS["ERROR"], stream=1, token=TOKEN)
    details = {"reason": "slow", "detached": True}
    slow = error.but(body=pack([8, "too slow", details]))
    kept = accepted(slow, {"code": 8, "message": "too slow", "details": typed(details)})
    one = accepted(ITEM, {"value": "one"})
    both = ACCEPTED.encode() + ITEM.but(counter=2).encode()
    run = accepted(ACCEPTED, {"map": typed(RUN)})
    first = accepted(ITEM.but(counter=2), {"value": "one"})
    answer = accepted(RESPONSE, {"value": None})
    return [
        _attached("client-item-of-a-run", "Within the credit.", "client", ITEM, one),
        _attached("client-accepted-and-item", "In one read.", "client", both, run, first, **opening),
        _attached("client-item-before-accepted", "ACCEPTED comes first.", "client", ITEM, FATAL, **opening),
        _attached(
            "client-credit-before-accepted", "ACCEPTED comes first.", "client", CREDIT, FATAL, **opening
        ),
        _attached("client-answer-before-accepted", "Allowed.", "client", RESPONSE, answer, **opening),
        _attached("client-detached-error", "The client attaches again.", "client", slow, kept),
        _attached("client-detached-error-before-accepted", "The same.", "client", slow, kept, **opening),
        _attached(
            "client-item-of-a-run-stale", "The client sends END.", "client", ITEM.but(timestamp=STALE), LOST
        ),
        _attached(
            "client-item-of-a-run-undecodable",
            "The call fails, and the client sends END.",
            "client",
            ITEM.but(body=EXT),
            refused("INTERNAL", "body", 1),
        ),
        _attached(
            "client-answer-of-a-run-stale",
            "The client attaches.",
            "client",
            RESPONSE.but(timestamp=STALE),
            LOST,
        ),
    ]


def _welcome() -> list[Json]:
    wrong = refused("PROTOCOL_ERROR", "content")
    first: Json = {"salt": None, "tokens": [], "announced": {"streams": None, "calls": None}}
    made = []
    for value, name in ((True, "true"), (False, "false"), (1, "int"), ("yes", "str"), (None, "nil")):
        welcome = {**WELCOME, "streams": {**LIMITS, "durable": value}}
        frame = Frame(KINDS["WELCOME"], counter=0, body=pack(welcome))
        outcome = accepted(frame, {"map": typed(welcome)}) if isinstance(value, bool) else wrong
        summary = f"`durable` is {value}."
        made.append(_vector(f"welcome-durable-{name}", summary, "client", frame, outcome, **first))
    return made
