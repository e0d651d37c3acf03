"""Checks of a client's program against the vectors of the specification, one for each vector.

Each vector of frames is decoded whole, byte by byte, in two pieces cut at field boundaries, and followed by more
bytes if the receiver must ignore them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from zcproto_conformance.check import DURABLE, VECTORS, Check, Scenario
from zcproto_conformance.codes import INVALID_ARGUMENT, PROTOCOL_ERROR
from zcproto_conformance.connection import HEADER, KINDS, MAX_FRAME, MIN_LENGTH, TOLERANCE_MS
from zcproto_conformance.errors import CheckFailed, KitError, expect
from zcproto_conformance.harness import Harness
from zcproto_conformance.program import StepFailed
from zcproto_conformance.values import untyped

Vector = dict[str, Any]

FRAME_FILES: Final = ("frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments")
STREAMING: Final = ("streaming/items", "streaming/calls", "streaming/conversation", "streaming/tables")
DURABLE_FILE: Final = "streaming/durable"
FILES: Final = (
    *(*FRAME_FILES, "arrival", "text", "signatures", "conversation", "tables"),
    *(*STREAMING, DURABLE_FILE),
)
RESERVED: Final = frozenset({"ACCEPTED"})
"""Kinds of durable streams, which not every client has."""

_FIELD_ENDS: Final = (1, 3, 4, 5, 6, 8, 12, 20, 28, 36, 67, 68, 69)
"""Offsets of the ends of header fields, and some within fields."""

_CONCURRENT: Final = 200
"""Steps that wait for an answer at a time."""


def checks(folder: Path) -> list[Check]:
    """Return a check for each vector. Raises KitError if the vectors cannot be read."""
    return [check for name in FILES for check in _of_file(name, _load(folder, name))]


def _load(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KitError(f"{path}: cannot be read; give the folder of the vectors with --vectors") from error
    return document


def _of_file(name: str, document: dict[str, Any]) -> Iterator[Check]:
    if name.endswith("tables"):
        yield Check(f"{VECTORS}/{name}", "6.1, 10, 18.2: numbers of kinds and codes", _tables(document))
        return
    if name.endswith("conversation"):
        section = "18.1" if name in STREAMING else "3"
        for number, vector in enumerate(_as_frames(document["vectors"]), 1):
            yield Check(f"{VECTORS}/{name}/{number}", f"{section}: {vector['title']}", _frames(vector))
        return
    makers = {"arrival": _arrival, "text": _text, "signatures": _signature}
    make = makers.get(name, _frames)
    needs = DURABLE if name == DURABLE_FILE else ""
    for vector in document["vectors"]:
        yield Check(f"{VECTORS}/{name}/{vector['name']}", vector["summary"], make(vector), needs)


def _tables(document: dict[str, Any]) -> Scenario:
    async def scenario(harness: Harness) -> None:
        tables = await harness.step("tables")
        for table in ("kinds", "codes"):
            known = tables.get(table) if isinstance(tables, dict) else None
            # Each of the two files has a part of a client's kinds.
            expected = {name: number for name, number in document[table].items() if name not in RESERVED}
            actual = {name: known.get(name) for name in expected} if isinstance(known, dict) else known
            expect(actual == expected, f"{table}: {actual} instead of {expected}")

    return scenario


def _text(vector: Vector) -> Scenario:
    async def scenario(harness: Harness) -> None:
        result = await harness.step("text", type=vector["type"], text=vector["text"])
        expect(result == vector["expect"], f"{vector['text']!r} gave {result} instead of {vector['expect']}")

    return scenario


def _signature(vector: Vector) -> Scenario:
    """Compare the signed message; a vector whose signature is invalid must not be reproduced by the client."""
    names = ("private_key", "salt", "leaf", "scheme", "device", "token")
    fields = {name: vector[name] for name in names if name in vector}

    async def scenario(harness: Harness) -> None:
        result = await harness.step("sign", **fields)
        expect(isinstance(result, dict), f"sign returned {result}")
        expect(result.get("message") == vector["message"], f"the signed message is {result.get('message')}")
        matches = result.get("signature") == vector["signature"]
        expect(matches is vector["expect"]["valid"], f"the signature is {result.get('signature')}")

    return scenario


# --- frames -----------------------------------------------------------------------------------------


def _frames(vector: Vector) -> Scenario:
    async def scenario(harness: Harness) -> None:
        cuts = list(_cuts(bytes.fromhex(vector["bytes"]), _stops_reading(vector)))
        for begin in range(0, len(cuts), _CONCURRENT):
            steps = [
                await harness.begin_step(
                    "decode",
                    receiver=vector["receiver"],
                    context=vector["context"],
                    pieces=[piece.hex() for piece in pieces],
                )
                for pieces in cuts[begin : begin + _CONCURRENT]
            ]
            for step, pieces in zip(steps, cuts[begin:], strict=False):
                outcomes = await _decoded(harness, step)
                try:
                    judge(outcomes, vector)
                except CheckFailed as failure:
                    raise CheckFailed(f"{_describe_cut(pieces)}: {failure}") from failure
        for outcome in vector["expect"]:
            if outcome["result"] == "frame":
                await _check_encoding(harness, outcome, vector)

    return scenario


def _arrival(vector: Vector) -> Scenario:
    """Check frames that arrive slowly: the pieces are fixed, and each has its time."""
    pieces = vector["pieces"]
    times = [piece["now"] for piece in pieces]

    async def scenario(harness: Harness) -> None:
        step = await harness.begin_step(
            "decode",
            receiver=vector["receiver"],
            context={**vector["context"], "now": times[0]},
            pieces=[piece["bytes"] for piece in pieces],
            times=times,
        )
        judge(await _decoded(harness, step), vector)

    return scenario


async def _decoded(harness: Harness, step: Any) -> list[Any]:
    try:
        result = await harness.step_result(step, "decode")
    except StepFailed as failure:
        raise CheckFailed(f"decode failed with {failure}") from failure
    expect(isinstance(result, list), f"decode returned {str(result)[:200]}")
    outcomes: list[Any] = result
    return outcomes


def _stops_reading(vector: Vector) -> bool:
    """Return whether the receiver must ignore all bytes after these."""
    last = vector["expect"][-1] if vector["expect"] else {}
    return bool(last.get("fatal")) and (vector["receiver"] == "client" or last["stage"] == "header")


def _cuts(data: bytes, stops_reading: bool) -> Iterator[list[bytes]]:
    yield [data]
    if stops_reading:
        yield [data + b"\xff" * 100]
        yield [data, b"\xff" * 100]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in sorted({*_FIELD_ENDS, len(data) // 2, len(data) - 1}):
        if 0 < at < len(data):
            yield [data[:at], data[at:]]


def _describe_cut(pieces: list[bytes]) -> str:
    if len(pieces) == 1:
        return "whole"
    return "byte by byte" if len(pieces) > 2 else f"cut at {len(pieces[0])}"


def judge(outcomes: list[Any], vector: Vector) -> None:
    """Raise CheckFailed unless the outcomes match those of a vector that its receiver can detect."""
    expected = vector["expect"]
    for number, outcome in enumerate(expected):
        expect(number < len(outcomes), f"{len(outcomes)} outcomes instead of {len(expected)}: {outcomes}")
        _judge_outcome(outcomes[number], outcome, vector["receiver"])
    # A fault that only the connection detects does not stop a server's decoder.
    if _stops_reading(vector) or not any(outcome.get("fatal") for outcome in expected):
        expect(
            len(outcomes) == len(expected), f"{len(outcomes)} outcomes instead of {len(expected)}: {outcomes}"
        )


def _judge_outcome(actual: Any, outcome: Vector, receiver: str) -> None:
    expect(isinstance(actual, dict), f"an outcome is {actual!r}")
    result, stage = outcome["result"], outcome.get("stage")
    if result == "frame":
        _judge_frame(actual, outcome)
    elif result == "incomplete":
        expect(actual == {"result": "incomplete", "have": outcome["have"]}, f"{actual} instead of {outcome}")
    elif receiver == "client" or stage in ("header", "body"):
        expected = {key: outcome[key] for key in ("result", "code", "fatal") if key in outcome}
        expect({key: actual.get(key) for key in expected} == expected, f"{actual} instead of {expected}")
    elif stage == "deadline":
        expect(actual.get("result") == "frame", f"{actual} instead of a frame with its deadline")
        deadline = actual["message"]["meta"]["deadline_ms"]
        expect(int(deadline["int"] if isinstance(deadline, dict) else deadline) <= 0, f"{actual}")
    else:  # only a server detects it: the body may be anything
        is_known = actual.get("result") == "frame" or actual.get("code") in (INVALID_ARGUMENT, PROTOCOL_ERROR)
        expect(is_known, f"{actual} instead of a frame")


def _judge_frame(actual: Vector, outcome: Vector) -> None:
    for key, expected in outcome.items():
        if key != "message":
            value = actual.get(key)
            expect(value == expected, f"{key} is {value!r} instead of {expected!r}: {actual}")
    message, expected = _normalized(actual.get("message")), _normalized(outcome.get("message"))
    expect(message == expected, f"message is {message} instead of {expected}")


def _normalized(message: Any) -> Any:
    """Return a message in which absent meta is empty, and nil params are an empty map unless they attach."""
    if not isinstance(message, dict) or "method" not in message:
        return message
    meta = message.get("meta") or {}
    params = message.get("params") or (None if "resume" in meta else {"map": {}})
    return {"method": message["method"], "params": params, "meta": meta}


async def _check_encoding(harness: Harness, outcome: Vector, vector: Vector) -> None:
    """Raise CheckFailed unless the client's encoder reproduces a frame that its decoder accepted."""
    names = ("kind", "stream", "timestamp", "salt", "counter", "token", "body")
    frame = await harness.step("encode", **{name: outcome[name] for name in names})
    expect(
        isinstance(frame, dict) and frame.get("bytes") and str(frame["bytes"]) in vector["bytes"],
        f"encode returned {frame}",
    )
    message = outcome.get("message") or {}
    if "method" not in message:
        return
    fields = {key: message[key] for key in ("method", "params") if key in message}
    if meta := message.get("meta"):
        resume = {"resume": {"map": meta["resume"]}} if "resume" in meta else {}
        fields["meta"] = {"map": {**meta, **resume}}
    body = bytes.fromhex(str((await harness.step("encode_request", **fields))["body"]))
    kind = KINDS["OPEN" if outcome["kind"] == "OPEN" else "REQUEST"]
    again = HEADER.pack(MIN_LENGTH + len(body), 1, kind, 0, 1, 0, bytes(8), 1, bytes(32)) + body
    step = await harness.begin_step(
        "decode", receiver="server", context=vector["context"], pieces=[again.hex()]
    )
    outcomes = await _decoded(harness, step)
    decoded = outcomes[0].get("message") if outcomes and isinstance(outcomes[0], dict) else outcomes
    expect(
        _normalized(decoded) == _normalized(message),
        f"the encoded request decodes to {decoded} instead of {message}",
    )


class _Talk:
    """The state of an example conversation, from which each frame gets the context of its receiver."""

    def __init__(self) -> None:
        self.salt: str | None = None
        self.counters = {"client": -1, "server": -1}
        self.announced: dict[str, Any] = {"streams": None, "calls": None}
        self.in_flight: set[int] = set()
        self.handles: list[str] | None = None
        self.calls: set[int] = set()
        self.credit: dict[int, dict[str, list[int]]] = {}
        """What each end has granted on a stream, by its number."""
        self.sent: dict[int, dict[str, list[int]]] = {}

    def context(self, vector: Vector, token: str) -> dict[str, Any]:
        sender = vector["from"]
        receiver = "server" if sender == "client" else "client"
        return {
            "limit": MAX_FRAME,
            "max_depth": 32,
            "salt": self.salt,
            "last_counter": str(max(self.counters[sender], 0)),
            "now": vector["now"],
            "tolerance_ms": TOLERANCE_MS,
            "tokens": [token],
            "in_flight": sorted(self.in_flight),
            "announced": self.announced,
            "handles": self.handles,
            "calls": sorted(self.calls),
            "allowance": 0,
            "open": [
                {
                    "stream": number,
                    "takes_items": False,
                    "granted": granted[receiver],
                    "received": self.sent[number][sender],
                    "credit": granted[sender],
                    "ended": False,
                }
                for number, granted in sorted(self.credit.items())
            ],
        }

    def follow(self, vector: Vector, outcome: Vector) -> None:
        """Change the state by a frame."""
        self.salt = outcome["salt"]
        sender, kind, stream = vector["from"], vector["kind"], outcome["stream"]
        self.counters[sender] = int(outcome["counter"])
        message = outcome.get("message", {})
        match kind:
            case "WELCOME":
                found = vector["body"]["map"]
                self.announced = {
                    key: untyped(found[key]) if key in found else None for key in self.announced
                }
            case "REQUEST":
                self.in_flight.add(stream)
                if message["method"] == "session.handle":
                    self.handles = message["params"]["map"]["methods"]
            case "OPEN":
                self.credit[stream] = {"client": message["meta"]["credit"], "server": [0, 0]}
                self.sent[stream] = {"client": [0, 0], "server": [0, 0]}
            case "ITEM":
                items, size = self.sent[stream][sender]
                self.sent[stream][sender] = [items + 1, size + outcome["length"]]
            case "CREDIT":
                self.credit[stream][sender] = message["credit"]
            case "CALL":
                self.calls.add(stream)
            case "RESULT" | "FAILURE":
                self.calls.discard(stream)
            case "RESPONSE" | "ERROR":
                self.in_flight.discard(stream)
                self.credit.pop(stream, None)


def _as_frames(vectors: list[Vector]) -> Iterator[Vector]:
    """Yield the frames of an example conversation, each with the context of its receiver."""
    talk = _Talk()
    for vector in vectors:
        outcome = _as_outcome(vector)
        yield {
            "title": f"{vector['title']} is accepted",
            "receiver": "server" if vector["from"] == "client" else "client",
            "bytes": vector["bytes"],
            "context": talk.context(vector, outcome["token"]),
            "expect": [outcome],
        }
        talk.follow(vector, outcome)


def _as_outcome(vector: Vector) -> Vector:
    data = bytes.fromhex(vector["bytes"])
    length, version, _, flags, stream, timestamp, salt, counter, token = HEADER.unpack_from(data)
    outcome = {
        "result": "frame",
        "length": length,
        "version": version,
        "kind": vector["kind"],
        "flags": flags,
        "stream": stream,
        "timestamp": str(timestamp),
        "salt": salt.hex(),
        "counter": str(counter),
        "token": token.hex(),
        "body": data[HEADER.size :].hex(),
    }
    message = _as_message(vector["kind"], vector.get("body"))
    return outcome if message is None else {**outcome, "message": message}


def _as_message(kind: str, body: Any) -> Vector | None:
    match kind:
        case "REQUEST" | "OPEN" | "CALL":
            return dict(
                zip(("method", "params", "meta"), [*body[:2], *(m["map"] for m in body[2:])], strict=False)
            )
        case "RESPONSE" | "ITEM" | "RESULT":
            return {"value": body}
        case "CREDIT":
            return {"credit": body}
        case "ERROR" | "FAILURE":
            code, text, *details = body
            return {"code": code, "message": text, "details": details[0] if details else {"map": {}}}
        case "WELCOME":
            return {"map": body}
    return None
