"""The JSON form of a vector: typed values, outcomes, contexts.

nil, bool, str    null, true or false, a string
int               a number if it is within +-(2**53 - 1), else {"int": "decimal digits"}
float             {"float64": "16 hex digits"}: its IEEE 754 bits, so that NaN and -0.0 are exact
bin               {"bin": "hex"}
array             an array
map               {"map": {"key": value}}
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from makers.forms import ALL_KINDS, CODES, LIMIT, NOW, SALT, TOKEN, TOLERANCE_MS, Frame

Json = dict[str, Any]
_KIND_NAMES = {code: name for name, code in ALL_KINDS.items()}
_SAFE_INT = 2**53 - 1


def typed(value: Any) -> Any:
    """Return a value as typed JSON."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if -_SAFE_INT <= value <= _SAFE_INT else {"int": str(value)}
        case float():
            return {"float64": struct.pack("!d", value).hex()}
        case bytes():
            return {"bin": value.hex()}
        case list():
            return [typed(item) for item in value]
        case dict():
            return {"map": {key: typed(item) for key, item in value.items()}}
    raise TypeError(type(value).__name__)


def accepted(frame: Frame, message: Json | None = None) -> Json:
    """Return the outcome of an accepted frame, with the meaning of each field."""
    outcome: Json = {
        "result": "frame",
        "length": frame.real_length,
        "version": frame.version,
        "kind": _KIND_NAMES[frame.kind],
        "flags": frame.flags,
        "stream": frame.stream,
        "timestamp": str(frame.timestamp),
        "salt": frame.salt.hex(),
        "counter": str(frame.counter),
        "token": frame.token.hex(),
        "body": frame.body.hex(),
    }
    if message is not None:
        outcome["message"] = message
    return outcome


def refused(name: str, stage: str, stream: int = 0, details: Json | None = None) -> Json:
    """Return the outcome of a refused frame."""
    fatal = name in {"PROTOCOL_ERROR", "FRAME_TOO_LARGE", "REPLAYED"} or (
        name == "STALE_TIMESTAMP" and not stream
    )
    outcome: Json = {
        "result": "error",
        "code": CODES[name],
        "name": name,
        "fatal": fatal,
        "stream": stream,
        "stage": stage,
    }
    return outcome if details is None else {**outcome, "details": typed(details)}


def dropped(why: str) -> Json:
    """Return the outcome of a frame that is dropped."""
    return {"result": "dropped", "why": why}


def incomplete(have: int) -> Json:
    """Return the outcome of an incomplete frame."""
    return {"result": "incomplete", "have": have}


def request(method: str, params: Any = None, meta: Json | None = None) -> Json:
    """Return the content of a REQUEST. `meta` has only the keys that ZCP/1 defines."""
    message: Json = {"method": method, "params": typed(params)}
    if meta is not None:
        message["meta"] = meta
    return message


def slow(
    name: str,
    summary: str,
    receiver: str,
    pieces: Iterable[tuple[int, bytes]],
    *expect: Json,
    flags: Iterable[str] = (),
    **context: Any,
) -> Json:
    """Return one vector whose bytes arrive in pieces, each at a time in milliseconds after NOW."""
    made = vector(name, summary, receiver, b"", *expect, flags=flags, **context)
    del made["bytes"], made["context"]["now"]
    arrivals = [{"now": str(NOW + after), "bytes": data.hex()} for after, data in pieces]
    return {key: made[key] for key in made if key != "expect"} | {"pieces": arrivals, "expect": list(expect)}


def vector(
    name: str,
    summary: str,
    receiver: str,
    sent: Frame | bytes,
    *expect: Json,
    flags: Iterable[str] = (),
    **context: Any,
) -> Json:
    """Return one vector. `context` overrides the defaults: one live session; a client waits for its answer."""
    data = sent.encode() if isinstance(sent, Frame) else sent
    awaited = [sent.stream] if receiver == "client" and isinstance(sent, Frame) and sent.stream else []
    counters = {key: str(context.pop(key)) for key in ("now", "last_counter") if key in context}
    return {
        "name": name,
        "summary": summary,
        "flags": sorted(flags),
        "receiver": receiver,
        "bytes": data.hex(),
        "context": {
            "limit": LIMIT,
            "max_depth": 32,
            "salt": SALT.hex(),
            "last_counter": "0",
            "now": str(NOW),
            "tolerance_ms": TOLERANCE_MS,
            "tokens": [TOKEN.hex()],
            "in_flight": awaited,
            **counters,
            **context,
        },
        "expect": list(expect),
    }
