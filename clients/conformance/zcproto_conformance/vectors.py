"""The vectors of the specification, put to a client's program: nothing is skipped.

Each vector of frames is decoded whole, byte by byte, in two pieces at the places where frames are usually cut
wrongly, and with more bytes behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from zcproto_conformance.check import VECTORS, Check, Scenario
from zcproto_conformance.errors import CheckFailed, KitError, expect
from zcproto_conformance.link import HEADER, KINDS, MIN_LENGTH
from zcproto_conformance.program import Refused
from zcproto_conformance.stage import Stage

Vector = dict[str, Any]

FRAME_FILES: Final = ("frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments")
FILES: Final = (*FRAME_FILES, "text", "signatures", "conversation", "tables")
INVALID_ARGUMENT: Final = 3
PROTOCOL_ERROR: Final = 64
_FIELD_ENDS: Final = (1, 3, 4, 5, 6, 8, 12, 20, 28, 36, 67, 68, 69)
"""The ends of a header's fields, and some places within."""

_AT_ONCE: Final = 200
"""Steps on their way at a time."""


def checks(folder: Path) -> list[Check]:
    """A check for each vector. Raises KitError if the vectors are not there."""
    return [check for name in FILES for check in _of_file(name, _load(folder, name))]


def _load(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KitError(f"{path}: cannot be read; name the folder of the vectors with --vectors") from error
    return document


def _of_file(name: str, document: dict[str, Any]) -> Iterator[Check]:
    if name == "tables":
        yield Check(f"{VECTORS}/tables", "6.1, 10: numbers of kinds and codes", _tables(document))
        return
    if name == "conversation":
        for number, vector in enumerate(_as_frames(document["vectors"]), 1):
            yield Check(f"{VECTORS}/conversation/{number}", f"3: {vector['title']}", _frames(vector))
        return
    makers = {"text": _text, "signatures": _signature}
    make = makers.get(name, _frames)
    for vector in document["vectors"]:
        yield Check(f"{VECTORS}/{name}/{vector['name']}", vector["summary"], make(vector))


def _tables(document: dict[str, Any]) -> Scenario:
    async def scenario(stage: Stage) -> None:
        told = await stage.do("tables")
        for table in ("kinds", "codes"):
            got = told.get(table) if isinstance(told, dict) else None
            expect(got == document[table], f"{table}: {got} instead of {document[table]}")

    return scenario


def _text(vector: Vector) -> Scenario:
    async def scenario(stage: Stage) -> None:
        told = await stage.do("text", type=vector["type"], text=vector["text"])
        expect(told == vector["expect"], f"{vector['text']!r} is told to be {told}, not {vector['expect']}")

    return scenario


def _signature(vector: Vector) -> Scenario:
    """A client signs, so the message is compared always, and the signature where the vector's is right."""
    names = ("private_key", "salt", "leaf", "scheme", "device", "token")
    fields = {name: vector[name] for name in names if name in vector}

    async def scenario(stage: Stage) -> None:
        told = await stage.do("sign", **fields)
        expect(isinstance(told, dict), f"sign was answered with {told}")
        expect(told.get("message") == vector["message"], f"{told.get('message')} was signed instead")
        is_the_vectors = told.get("signature") == vector["signature"]
        expect(is_the_vectors is vector["expect"]["valid"], f"the signature is {told.get('signature')}")

    return scenario


# --- frames -----------------------------------------------------------------------------------------


def _frames(vector: Vector) -> Scenario:
    async def scenario(stage: Stage) -> None:
        ways = list(_ways(bytes.fromhex(vector["bytes"]), _ends_it(vector)))
        for begin in range(0, len(ways), _AT_ONCE):
            steps = [
                await stage.begin(
                    "decode",
                    receiver=vector["receiver"],
                    context=vector["context"],
                    pieces=[piece.hex() for piece in pieces],
                )
                for pieces in ways[begin : begin + _AT_ONCE]
            ]
            for step, pieces in zip(steps, ways[begin:], strict=False):
                told = await _told(stage, step)
                try:
                    judge(told, vector)
                except CheckFailed as broken:
                    raise CheckFailed(f"{_way(pieces)}: {broken}") from broken
        for outcome in vector["expect"]:
            if outcome["result"] == "frame":
                await _encoded(stage, outcome, vector)

    return scenario


async def _told(stage: Stage, step: Any) -> list[Any]:
    try:
        told = await stage.answer(step, "decode")
    except Refused as refused:
        raise CheckFailed(f"decode was answered with the error {refused}") from refused
    expect(isinstance(told, list), f"decode was answered with {str(told)[:200]}")
    outcomes: list[Any] = told
    return outcomes


def _ends_it(vector: Vector) -> bool:
    """Whether the receiver looks at no byte behind these."""
    last = vector["expect"][-1] if vector["expect"] else {}
    return bool(last.get("fatal")) and (vector["receiver"] == "client" or last["stage"] == "header")


def _ways(data: bytes, ends_it: bool) -> Iterator[list[bytes]]:
    yield [data]
    if ends_it:
        yield [data + b"\xff" * 100]
        yield [data, b"\xff" * 100]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in sorted({*_FIELD_ENDS, len(data) // 2, len(data) - 1}):
        if 0 < at < len(data):
            yield [data[:at], data[at:]]


def _way(pieces: list[bytes]) -> str:
    if len(pieces) == 1:
        return "whole"
    return "byte by byte" if len(pieces) > 2 else f"cut at {len(pieces[0])}"


def judge(told: list[Any], vector: Vector) -> None:
    """Raise CheckFailed unless outcomes are those of a vector, as far as its receiver can see them."""
    wanted = vector["expect"]
    for number, outcome in enumerate(wanted):
        expect(number < len(told), f"{len(told)} outcomes instead of {len(wanted)}: {told}")
        _judge_one(told[number], outcome, vector["receiver"])
    # A fault that only a conversation sees does not stop a server's decoder.
    if _ends_it(vector) or not any(outcome.get("fatal") for outcome in wanted):
        expect(len(told) == len(wanted), f"{len(told)} outcomes instead of {len(wanted)}: {told}")


def _judge_one(got: Any, outcome: Vector, receiver: str) -> None:
    expect(isinstance(got, dict), f"an outcome is {got!r}")
    result, stage = outcome["result"], outcome.get("stage")
    if result == "frame":
        _judge_frame(got, outcome)
    elif result == "incomplete":
        expect(got == {"result": "incomplete", "have": outcome["have"]}, f"{got} instead of {outcome}")
    elif receiver == "client" or stage == "header":
        wanted = {key: outcome[key] for key in ("result", "code", "fatal") if key in outcome}
        seen = {key: got.get(key) for key in wanted}
        expect(seen == wanted, f"{got} instead of {wanted}")
    elif stage == "body":
        wanted = {key: outcome[key] for key in ("result", "code", "fatal")}
        expect({key: got.get(key) for key in wanted} == wanted, f"{got} instead of {wanted}")
    elif stage == "deadline":
        expect(got.get("result") == "frame", f"{got} instead of a frame with its deadline")
        deadline = got["message"]["meta"]["deadline_ms"]
        expect(int(deadline["int"] if isinstance(deadline, dict) else deadline) <= 0, f"{got}")
    else:  # what only a server can see: its body may be anything
        known = got.get("result") == "frame" or got.get("code") in (INVALID_ARGUMENT, PROTOCOL_ERROR)
        expect(known, f"{got} instead of a frame")


def _judge_frame(got: Vector, outcome: Vector) -> None:
    for key, wanted in outcome.items():
        if key != "message":
            expect(got.get(key) == wanted, f"{key} is {got.get(key)!r} instead of {wanted!r}: {got}")
    seen, wanted = _plain(got.get("message")), _plain(outcome.get("message"))
    expect(seen == wanted, f"message is {seen} instead of {wanted}")


def _plain(message: Any) -> Any:
    """A message with what counts as the same written alike."""
    if not isinstance(message, dict) or "method" not in message:
        return message
    return {
        "method": message["method"],
        "params": message.get("params") or {"map": {}},
        "meta": message.get("meta") or {},
    }


async def _encoded(stage: Stage, outcome: Vector, vector: Vector) -> None:
    """The client's encoder makes the frame that its decoder has read."""
    names = ("kind", "stream", "timestamp", "salt", "counter", "token", "body")
    told = await stage.do("encode", **{name: outcome[name] for name in names})
    expect(
        isinstance(told, dict) and str(told.get("bytes")) in vector["bytes"] and told.get("bytes"),
        f"encoded it is {told}",
    )
    message = outcome.get("message") or {}
    if "method" not in message:
        return
    fields = {key: message[key] for key in ("method", "params") if key in message}
    if message.get("meta"):
        fields["meta"] = {"map": message["meta"]}
    told = await stage.do("encode_request", **fields)
    body = bytes.fromhex(str(told["body"]))
    again = HEADER.pack(MIN_LENGTH + len(body), 1, KINDS["REQUEST"], 0, 1, 0, bytes(8), 1, bytes(32)) + body
    step = await stage.begin("decode", receiver="server", context=vector["context"], pieces=[again.hex()])
    read = await _told(stage, step)
    seen = _plain(read[0].get("message")) if read and isinstance(read[0], dict) else read
    expect(seen == _plain(message), f"its request is read as {seen} instead of {message}")


def _as_frames(vectors: list[Vector]) -> Iterator[Vector]:
    """The example conversation, each frame with what its receiver knows when it comes."""
    salt: str | None = None
    counters = {"client": -1, "server": -1}
    in_flight: set[int] = set()
    for vector in vectors:
        outcome = _as_outcome(vector)
        stream, counter = outcome["stream"], int(outcome["counter"])
        sender = vector["from"]
        receiver = "server" if sender == "client" else "client"
        yield {
            "title": f"{vector['title']} is taken",
            "receiver": receiver,
            "bytes": vector["bytes"],
            "context": {
                "limit": 1_048_576,
                "max_depth": 32,
                "salt": salt,
                "last_counter": str(max(counters[sender], 0)),
                "now": vector["now"],
                "tolerance_ms": 30_000,
                "tokens": [outcome["token"]],
                "in_flight": sorted(in_flight),
            },
            "expect": [outcome],
        }
        salt = outcome["salt"]
        counters[sender] = counter
        if sender == "client" and vector["kind"] == "REQUEST":
            in_flight.add(stream)
        elif vector["kind"] in {"RESPONSE", "ERROR"}:
            in_flight.discard(stream)


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
        case "REQUEST":
            return dict(
                zip(("method", "params", "meta"), [*body[:2], *(m["map"] for m in body[2:])], strict=False)
            )
        case "RESPONSE":
            return {"value": body}
        case "ERROR":
            code, said, *details = body
            return {"code": code, "message": said, "details": details[0] if details else {"map": {}}}
        case "WELCOME":
            return {"map": body}
    return None
