"""Streams of items: OPEN, ITEM, END and CREDIT, against the state of a stream (zcp1.md, section 18)."""

from __future__ import annotations

from typing import Any

from makers.forms import ALL_KINDS as KINDS
from makers.forms import NO_TOKEN, NOW, OTHER_TOKEN, TOKEN, TOLERANCE_MS, Frame, pack
from makers.frames import WELCOME
from makers.shape import Json, accepted, dropped, incomplete, refused, request, typed, vector

SUBJECT = "Streams of items: OPEN, ITEM, END and CREDIT, against the state of the stream."
NOTES = {
    "announced": "Without `streams` in WELCOME these kinds are fatal, at a server and at a client.",
    "boundary": "The last item or byte that is allowed, or one more.",
    "late": "Items that were under way when the stream ended: exactly as many as were allowed are dropped.",
    "order": "Two faults in one frame; catches checks in another order than the specification's.",
    "totals": "Credit is a total since OPEN; catches peers that add it up.",
}
BOUNDARY, TOTALS = ["boundary"], ["totals"]
MAX_ITEM = 1_024
MOST = 2**53 - 1
STALE = NOW - TOLERANCE_MS - 1
OPEN = Frame(KINDS["OPEN"], stream=1, token=TOKEN, body=pack(["tokens", {"prompt": "hi"}]))
ITEM = Frame(KINDS["ITEM"], stream=1, token=TOKEN, body=pack("one"))
END = Frame(KINDS["END"], stream=1, token=TOKEN)
CREDIT = Frame(KINDS["CREDIT"], stream=1, token=TOKEN, body=pack([8, 1000]))
RESPONSE = Frame(KINDS["RESPONSE"], stream=1, token=TOKEN, body=pack(None))
FATAL = refused("PROTOCOL_ERROR", "stream")
OVERRUN = refused("PROTOCOL_ERROR", "credit")
HEADER = refused("PROTOCOL_ERROR", "header")
BODY = refused("PROTOCOL_ERROR", "body")
WRONG_FORM = refused("INVALID_ARGUMENT", "body", 1)
NOT_IN_FLIGHT = dropped("not in flight")
EXT = b"\xd4\x01\x00"
INT_KEY = b"\x81\x01\x02"
DEEP = b"\x91" * 32 + b"\x90"


def vectors() -> list[Json]:
    return [
        *_open(),
        *_credit_in_open(),
        *_credit(),
        *_items(),
        *_contents(),
        *_ends(),
        *_late(),
        *_tokens(),
        *_freshness(),
        *_headers(),
        *_not_announced(),
        *_at_the_client(),
        *_welcome(),
    ]


def stream(number: int = 1, **more: Any) -> Json:
    """Return a stream in flight on which the receiver has granted four items and received none."""
    state = {"takes_items": True, "granted": [4, 1000], "received": [0, 0], "ended": False}
    return {"stream": number, **state, "credit": [4, 1000], **more}


def streaming(
    name: str, summary: str, receiver: str, sent: Frame | bytes, *expect: Json, **context: Any
) -> Json:
    """Return one vector of a peer that has announced streams and calls, unless `context` differs."""
    context.setdefault("announced", {"streams": {"max_open": 64, "max_item": MAX_ITEM}, "calls": {"max": 32}})
    context.setdefault("open", [])
    context.setdefault("allowance", 0)
    context.setdefault("in_flight", [])
    return vector(name, summary, receiver, sent, *expect, **context)


def _server(name: str, summary: str, sent: Frame | bytes, *expect: Json, **context: Any) -> Json:
    return streaming(name, summary, "server", sent, *expect, **context)


def _client(name: str, summary: str, sent: Frame | bytes, *expect: Json, **context: Any) -> Json:
    return streaming(name, summary, "client", sent, *expect, **context)


def _running(
    name: str, summary: str, sent: Frame | bytes, *expect: Json, state: Json | None = None, **more: Any
) -> Json:
    """Return a vector of a peer with one stream in flight, in the usual state except for `state`."""
    receiver = more.pop("to", "server")
    return streaming(name, summary, receiver, sent, *expect, open=[stream(**state or {})], **more)


def _join(*frames: Frame) -> bytes:
    return b"".join(frame.but(counter=number).encode() for number, frame in enumerate(frames, 1))


def _opened(frame: Frame = OPEN, meta: Json | None = None) -> Json:
    return accepted(frame, request("tokens", {"prompt": "hi"}, meta))


def _taken(frame: Frame, value: Any = "one") -> Json:
    return accepted(frame, {"value": typed(value)})


def _with_meta(meta: Any) -> Frame:
    return OPEN.but(body=pack(["tokens", {"prompt": "hi"}, meta]))


def _open() -> list[Json]:
    dead = refused("DEADLINE_EXCEEDED", "deadline", 1)
    return [
        _server("open", "Without credit: it begins, and waits for CREDIT.", OPEN, _opened()),
        _server(
            "open-without-a-token",
            "Streams need a session, whatever the method.",
            OPEN.but(token=NO_TOKEN, body=pack(["server.info", None])),
            refused("UNAUTHENTICATED", "token", 1),
        ),
        _server("open-on-a-request", "The number of a REQUEST in flight.", OPEN, FATAL, in_flight=[1]),
        _running("open-on-a-stream", "The number of an OPEN in flight.", OPEN, FATAL),
        _running(
            "request-on-a-stream",
            "REQUEST with the number of an OPEN in flight.",
            OPEN.but(kind=KINDS["REQUEST"]),
            FATAL,
        ),
        _server("open-deadline-0", "Its deadline has passed.", _with_meta({"deadline_ms": 0}), dead),
        _server(
            "open-with-an-idempotency-key",
            "The output of a stream is not stored.",
            _with_meta({"idempotency_key": "order-7"}),
            WRONG_FORM,
        ),
        _server(
            "open-stale",
            "Refused and not run.",
            OPEN.but(timestamp=STALE),
            refused("STALE_TIMESTAMP", "freshness", 1),
        ),
        _server(
            "open-above-max-open",
            "Two streams are in flight and two are allowed.",
            OPEN.but(stream=3),
            refused("RESOURCE_EXHAUSTED", "limit", 3, details={"limit": 2}),
            open=[stream(1), stream(2)],
            announced={"streams": {"max_open": 2, "max_item": MAX_ITEM}, "calls": None},
            flags=BOUNDARY,
        ),
    ]


def _credit_in_open() -> list[Json]:
    good = ("smallest", [0, 0]), ("largest", [MOST, MOST]), ("nil", None)
    bad = (
        ("str", "64"),
        ("one-number", [1]),
        ("three-numbers", [1, 2, 3]),
        ("nil-number", [None, 64]),
        ("negative", [-1, 64]),
        ("float", [1.0, 64]),
        ("bool", [True, 64]),
        ("2-53", [MOST + 1, 64]),
        ("map", {"items": 1, "bytes": 64}),
    )
    made = []
    for name, credit in good:
        frame = _with_meta({"credit": credit})
        meta = {} if credit is None else {"credit": credit}
        made.append(_server(f"open-credit-{name}", "nil counts as absent.", frame, _opened(frame, meta)))
    for name, credit in bad:
        frame = _with_meta({"credit": credit})
        made.append(_server(f"open-credit-{name}", f"Credit {credit!r}.", frame, WRONG_FORM))
    return made


def _credit() -> list[Json]:
    def given(body: Any) -> Frame:
        return CREDIT.but(body=body if isinstance(body, bytes) else pack(body))

    def good(name: str, summary: str, body: list[int], **more: Any) -> Json:
        frame = given(body)
        return _running(name, summary, frame, accepted(frame, {"credit": body}), **more)

    bad = (
        ("undecodable", b"\xc1", "Not msgpack."),
        ("empty", b"", "No body."),
        ("one-number", [8], "One number."),
        ("nil", None, "Nil."),
        ("nil-number", [None, 1000], "Nil is not 0."),
        ("str", "8", "A str."),
        ("ext", EXT, "An ext type."),
        ("negative", [-1, 1000], "A negative number."),
        ("float", [8.0, 1000], "A float."),
        ("2-53", [MOST + 1, 1000], "Beyond 2^53 - 1."),
    )
    return [
        good("credit-more", "Both numbers are higher.", [8, 2000], flags=TOTALS),
        good("credit-equal", "Equal totals have no effect.", [4, 1000], flags=TOTALS),
        good("credit-largest", "2^53 - 1.", [MOST, MOST], flags=BOUNDARY),
        _running(
            "credit-fewer-items", "Lower in items, higher in bytes.", given([3, 5000]), OVERRUN, flags=TOTALS
        ),
        _running(
            "credit-fewer-bytes", "Higher in items, lower in bytes.", given([9, 999]), OVERRUN, flags=TOTALS
        ),
        _running(
            "credit-three-numbers", "The third needs ACCEPTED (section 20).", given([8, 1000, 0]), OVERRUN
        ),
        *(_running(f"credit-{name}", what, given(body), BODY) for name, body, what in bad),
        _server("credit-to-nothing", "Ignored.", CREDIT, NOT_IN_FLIGHT),
    ]


def _items() -> list[Json]:
    """Items against the credit that the receiver has granted."""
    large = ITEM.but(body=pack("x" * 200))
    longest = ITEM.but(body=pack("x" * (MAX_ITEM - 64 - 3)))
    longer = ITEM.but(length=MAX_ITEM + 1)
    wide = {"granted": [4, 10 * MAX_ITEM]}
    too_long = refused("FRAME_TOO_LARGE", "header")
    return [
        _running("item", "Within the credit.", ITEM, _taken(ITEM)),
        _running(
            "item-before-any-credit",
            "The server has granted nothing yet.",
            ITEM,
            OVERRUN,
            state={"granted": [0, 0]},
        ),
        _running(
            "item-last-allowed",
            "The fourth of four.",
            ITEM,
            _taken(ITEM),
            flags=BOUNDARY,
            state={"received": [3, 300]},
        ),
        _running(
            "item-one-too-many",
            "The fifth of four.",
            ITEM,
            OVERRUN,
            flags=BOUNDARY,
            state={"received": [4, 300]},
        ),
        _running(
            "item-overdraws-the-bytes",
            "One byte is left: an item of any length.",
            large,
            _taken(large, "x" * 200),
            flags=BOUNDARY,
            state={"received": [1, 999]},
        ),
        _running(
            "item-after-an-overdraft",
            "No byte is left.",
            ITEM,
            OVERRUN,
            flags=BOUNDARY,
            state={"received": [1, 1000]},
        ),
        _running(
            "item-credit-10-1",
            "Credit [10, 1]: one item, and no second.",
            _join(ITEM, ITEM),
            _taken(ITEM),
            OVERRUN,
            flags=BOUNDARY,
            state={"granted": [10, 1]},
        ),
        _running(
            "item-of-max-item",
            "The largest length.",
            longest,
            _taken(longest, "x" * (MAX_ITEM - 64 - 3)),
            flags=BOUNDARY,
            state=wide,
        ),
        _running(
            "item-longer-than-max-item",
            "Refused from its header alone.",
            longer,
            too_long,
            flags=BOUNDARY,
            state=wide,
        ),
        _running(
            "client-item-longer-than-max-item",
            "A client refuses it too.",
            longer,
            too_long,
            to="client",
            flags=BOUNDARY,
            state=wide,
        ),
        _running(
            "item-header-without-its-body", "The beginning of an item.", ITEM.encode()[:70], incomplete(70)
        ),
    ]


def _contents() -> list[Json]:
    made = []
    for name, body, summary in (
        ("empty", b"", "No body."),
        ("ext", EXT, "An ext type."),
        ("int-key", INT_KEY, "A key that is an int."),
        ("depth-33", DEEP, "33 arrays deep."),
        ("two-values", b"\xc0\xc0", "Bytes behind the value."),
    ):
        wrong = refused("INVALID_ARGUMENT", "body", 1, details={"item": 2})
        state = [stream(received=[2, 200])]
        made.append(
            _server(f"item-{name}", f"{summary} The third item.", ITEM.but(body=body), wrong, open=state)
        )
    return made


def _ends() -> list[Json]:
    ended = [stream(ended=True)]
    takes_none = [stream(takes_items=False, granted=[0, 0])]
    return [
        _running("end", "No more items.", END, accepted(END)),
        _server(
            "end-at-once",
            "Allowed before any CREDIT.",
            _join(OPEN, END),
            _opened(),
            accepted(END.but(counter=2)),
        ),
        _server("item-after-end", "Nothing follows END.", ITEM, FATAL, open=ended),
        _server("end-twice", "Nothing follows END.", END, FATAL, open=ended),
        _server("end-to-a-method-without-items", "Ignored.", END, dropped("takes no items"), open=takes_none),
        _server("item-to-a-method-without-items", "It has granted nothing.", ITEM, OVERRUN, open=takes_none),
        _server("end-to-nothing", "Ignored.", END, NOT_IN_FLIGHT),
        _running("end-with-a-body", "END has no body.", END.but(body=b"\xc0"), BODY),
    ]


def _late() -> list[Json]:
    late: Json = {"flags": ["late"]}
    undecodable = ITEM.but(body=b"\xc1")
    return [
        _server(
            "item-late",
            "Two were allowed when the stream ended.",
            undecodable,
            NOT_IN_FLIGHT,
            allowance=2,
            **late,
        ),
        _server(
            "item-late-once-too-often",
            "One more than was allowed.",
            _join(undecodable, undecodable, undecodable),
            NOT_IN_FLIGHT,
            NOT_IN_FLIGHT,
            FATAL,
            allowance=2,
            **late,
        ),
        _server("item-to-nothing", "No stream has ended early.", ITEM, FATAL, **late),
        _server(
            "open-on-the-number-of-late-items",
            "The new stream has no credit of the old one.",
            _join(OPEN, ITEM),
            _opened(),
            OVERRUN,
            allowance=2,
            **late,
        ),
    ]


def _tokens() -> list[Json]:
    wrong = refused("CANCELLED", "token", 1, details={"reason": "wrong_token"})
    both = {"tokens": [TOKEN.hex(), OTHER_TOKEN.hex()]}
    ignored = dropped("other token")
    return [
        _running("item-with-another-token", "Cuts it.", ITEM.but(token=OTHER_TOKEN), wrong, **both),
        _running("end-with-another-token", "Cuts it.", END.but(token=OTHER_TOKEN), wrong, **both),
        _running("credit-with-another-token", "Ignored.", CREDIT.but(token=OTHER_TOKEN), ignored, **both),
        _running(
            "order-token-before-credit",
            "Another token, and no credit.",
            ITEM.but(token=OTHER_TOKEN),
            wrong,
            flags=["order"],
            **both,
            state={"granted": [0, 0]},
        ),
        _running(
            "item-with-a-token-that-is-dead",
            "The token of the OPEN, though the session has a newer one.",
            ITEM,
            _taken(ITEM),
            tokens=[OTHER_TOKEN.hex()],
        ),
    ]


def _freshness() -> list[Json]:
    cut = refused("CANCELLED", "freshness", 1, details={"reason": "stale", "server_time": NOW})
    replayed = refused("REPLAYED", "freshness")
    stale = {"timestamp": STALE}
    return [
        _running("item-stale", "Cuts the stream.", ITEM.but(**stale), cut),
        _running("end-stale", "Cuts the stream.", END.but(**stale), cut),
        _running("credit-stale", "Cuts the stream.", CREDIT.but(**stale), cut),
        _running(
            "item-stale-uses-its-counter",
            "The counter is used, and the rest of the stream is late.",
            ITEM.but(**stale).encode() + ITEM.encode(),
            cut,
            replayed,
        ),
        _server(
            "item-stale-to-nothing", "Dropped.", ITEM.but(**stale), dropped("stale timestamp"), allowance=1
        ),
        _running("item-counter-equal", "A replay.", ITEM.but(counter=7), replayed, last_counter=7),
        _running("item-of-another-connection", "A replay.", ITEM.but(salt=bytes(8)), replayed),
    ]


def _headers() -> list[Json]:
    made = []
    for frame, name in ((OPEN, "open"), (ITEM, "item"), (END, "end"), (CREDIT, "credit")):
        state = [] if name == "open" else [stream()]
        made.append(_server(f"{name}-on-stream-0", "Stream 0.", frame.but(stream=0), HEADER, open=state))
        made.append(_server(f"{name}-with-flags", "A flag is set.", frame.but(flags=1), HEADER, open=state))
    for kind in (0x14, 0x15, 0x16, 0x17, 0x1C, 0x1D, 0x1E, 0x1F):
        for receiver in ("server", "client"):
            name = f"kind-{kind:02x}-to-the-{receiver}"
            frame = Frame(kind, stream=1, token=TOKEN)
            made.append(streaming(name, "Reserved.", receiver, frame, HEADER, open=[stream()]))
    for frame, name in ((OPEN, "open"), (END, "end")):
        made.append(_running(f"{name}-from-the-server", "The wrong side.", frame, HEADER, to="client"))
    return made


def _not_announced() -> list[Json]:
    none: Json = {"announced": {"streams": None, "calls": None}, "flags": ["announced"]}
    return [
        _server(f"{name}-without-streams", "The server has none.", frame, HEADER, **none)
        for frame, name in ((OPEN, "open"), (ITEM, "item"), (END, "end"), (CREDIT, "credit"))
    ] + [
        _client(
            "item-on-a-request",
            "The stream began with REQUEST.",
            ITEM,
            FATAL,
            in_flight=[1],
            flags=["announced"],
        ),
        _client(
            "credit-on-a-request",
            "The stream began with REQUEST.",
            CREDIT,
            FATAL,
            in_flight=[1],
            flags=["announced"],
        ),
    ]


def _at_the_client() -> list[Json]:
    lost = refused("DATA_LOSS", "freshness", 1)
    late = RESPONSE.but(timestamp=STALE)
    more = ITEM.but(body=pack("two"))
    return [
        _running("client-item", "Within the credit.", ITEM, _taken(ITEM), to="client"),
        _running(
            "client-items-and-response",
            "Two items and the end.",
            _join(ITEM, more, RESPONSE),
            _taken(ITEM),
            _taken(more.but(counter=2), "two"),
            _taken(RESPONSE.but(counter=3), None),
            to="client",
        ),
        _running(
            "client-item-credit-10-1",
            "Credit [10, 1]: one item, and no second.",
            _join(ITEM, ITEM),
            _taken(ITEM),
            OVERRUN,
            to="client",
            flags=BOUNDARY,
            state={"granted": [10, 1]},
        ),
        _running(
            "client-item-one-too-many",
            "The fifth of four.",
            ITEM,
            OVERRUN,
            to="client",
            flags=BOUNDARY,
            state={"received": [4, 300]},
        ),
        _running(
            "client-item-undecodable",
            "The call fails, and the client sends CANCEL.",
            ITEM.but(body=EXT),
            refused("INTERNAL", "body", 1),
            to="client",
        ),
        _client("client-item-to-nothing", "Dropped and counted.", ITEM, NOT_IN_FLIGHT),
        _client("client-credit-to-nothing", "Dropped and counted.", CREDIT, NOT_IN_FLIGHT),
        _running(
            "client-credit-fewer-items",
            "Lower in items, higher in bytes.",
            CREDIT.but(body=pack([3, 5000])),
            OVERRUN,
            to="client",
            flags=TOTALS,
        ),
        _running(
            "client-item-stale", "The client sends CANCEL.", ITEM.but(timestamp=STALE), lost, to="client"
        ),
        _running(
            "client-credit-stale", "The client sends CANCEL.", CREDIT.but(timestamp=STALE), lost, to="client"
        ),
        _running("client-stream-stale-response", "As for a request.", late, lost, to="client"),
    ]


def _welcome() -> list[Json]:
    limits, wrong = {"max_open": 64, "max_item": MAX_ITEM}, refused("PROTOCOL_ERROR", "content")
    first: Json = {"salt": None, "tokens": [], "announced": {"streams": None, "calls": None}}
    good = (
        ("streams-and-calls", {"streams": limits, "calls": {"max": 32}}, "Both."),
        ("streams-with-more-keys", {"streams": {**limits, "more": [1]}}, "Unknown keys are ignored."),
    )
    bad = (
        ("streams-nil", {"streams": None}),
        ("streams-true", {"streams": True}),
        ("streams-empty", {"streams": {}}),
        ("streams-without-max-item", {"streams": {"max_open": 64}}),
        ("streams-max-open-str", {"streams": {**limits, "max_open": "64"}}),
        ("streams-max-item-63", {"streams": {**limits, "max_item": 63}}),
        ("calls-array", {"calls": [32]}),
        ("calls-without-max", {"calls": {}}),
    )
    made = []
    for name, more, summary in good:
        frame = Frame(KINDS["WELCOME"], counter=0, body=pack({**WELCOME, **more}))
        message = {"map": typed({**WELCOME, **more})}
        made.append(_client(f"welcome-{name}", summary, frame, accepted(frame, message), **first))
    for name, more in bad:
        frame = Frame(KINDS["WELCOME"], counter=0, body=pack({**WELCOME, **more}))
        made.append(_client(f"welcome-{name}", f"{more}.", frame, wrong, **first))
    return made
