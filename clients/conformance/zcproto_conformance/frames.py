"""Frames of zcproto.wire in the form of the vectors."""

from __future__ import annotations

from typing import Any

from zcproto.wire.frame import WITHOUT_BODY, Kind, RawFrame
from zcproto.wire.message import (
    MessageError,
    RequestMeta,
    decode_accepted,
    decode_body,
    decode_credit,
    decode_error,
    decode_event,
    decode_map,
    decode_open,
    decode_request,
)
from zcproto_conformance.values import typed


def kind_of(frame: RawFrame) -> Kind:
    return Kind(frame[1] >> 16 & 0xFF)


def fields_of(frame: RawFrame) -> dict[str, Any]:
    """Return the header fields and the body of a frame."""
    length, head, stream, timestamp, salt, counter, token, body = frame
    return {
        "result": "frame",
        "length": length,
        "version": head >> 24,
        "kind": kind_of(frame).name,
        "flags": head & 0xFFFF,
        "stream": stream,
        "timestamp": str(timestamp),
        "salt": salt.hex(),
        "counter": str(counter),
        "token": token.hex(),
        "body": body.hex(),
    }


def _request(method: str, params: dict[str, Any], meta: RequestMeta) -> dict[str, Any]:
    fields = {key: typed(value) for key, value in meta._asdict().items() if value is not None}
    return {"method": method, "params": typed(params), "meta": fields}


def message_of(frame: RawFrame, max_depth: int) -> dict[str, Any] | None:
    """Return the decoded body, or None for a kind without a body. Raises MessageError."""
    kind, body = kind_of(frame), frame[7]
    if frame[1] in WITHOUT_BODY:
        if body:
            raise MessageError("this kind must not have a body")
        return None
    match kind:
        case Kind.REQUEST | Kind.CALL:
            return _request(*decode_request(body, max_depth))
        case Kind.OPEN:
            method, params, meta, credit, resume, has_items = decode_open(body, max_depth)
            given = decode_body(body, max_depth)[2:]
            message = _request(method, params, meta)
            if given and given[0].get("credit") is not None:
                message["meta"]["credit"] = list(credit)
            if has_items:
                message["meta"]["items"] = True
            if resume is not None:
                message["meta"]["resume"] = {"id": resume.id, "from": resume.position}
                message["params"] = None if resume.attaches else message["params"]
            return message
        case Kind.CREDIT:
            return {"credit": list(decode_credit(body))}
        case Kind.ERROR | Kind.FAILURE:
            error = decode_error(body, max_depth)
            return {"code": error.code, "message": error.message, "details": typed(error.details)}
        case Kind.EVENT:
            name, data = decode_event(body, max_depth)
            return {"name": name, "data": typed(data)}
        case Kind.WELCOME | Kind.GOAWAY:
            return {"map": typed(decode_map(body, max_depth))}
        case Kind.ACCEPTED:
            return {"map": typed(decode_accepted(body, max_depth))}
        case _:
            return {"value": typed(decode_body(body, max_depth))}
