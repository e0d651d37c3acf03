"""The steps with vectors, implemented by the Python client's decoder, encoder and connection."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto.client.credentials import Device
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import ClientEvent, ConnectionEnded, ErrorReceived
from zcproto.connection.state import State
from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import ERROR, TOKEN_SIZE, WITHOUT_BODY, Kind, RawFrame, Side, encode_frame, head_of
from zcproto.wire.message import (
    MessageError,
    attach_message,
    encode_request,
    open_message,
    parse_traceparent,
)
from zcproto_conformance.frames import fields_of, message_of
from zcproto_conformance.values import untyped

Outcome = dict[str, Any]


def tables(step: Mapping[str, Any]) -> Any:
    return {
        "kinds": {kind.name: kind.value for kind in Kind},
        "codes": {code.name: code.value for code in Code},
    }


def encode(step: Mapping[str, Any]) -> Any:
    frame = encode_frame(
        head_of(Kind[step["kind"]]),
        step["stream"],
        int(step["timestamp"]),
        bytes.fromhex(step["salt"]),
        int(step["counter"]),
        bytes.fromhex(step["token"]),
        bytes.fromhex(step["body"]),
    )
    return {"bytes": frame.hex()}


def encode_request_body(step: Mapping[str, Any]) -> Any:
    params, meta = untyped(step["params"]), untyped(step.get("meta"))
    return {"body": encode_request(step["method"], params, meta).hex()}


def text(step: Mapping[str, Any]) -> Any:
    encoded = step["text"]
    if step["type"] == "traceparent":
        return {"valid": parse_traceparent(encoded) is not None}
    try:
        token = base64.b64decode(encoded + "=", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return {"valid": False}
    if len(token) != TOKEN_SIZE or base64.urlsafe_b64encode(token).rstrip(b"=").decode() != encoded:
        return {"valid": False}
    return {"valid": True, "bytes": token.hex()}


def sign(step: Mapping[str, Any]) -> Any:
    device = Device(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(step["private_key"])))
    salt, leaf = bytes.fromhex(step["salt"]), bytes.fromhex(step["leaf"])
    if step["scheme"] == "attach":
        message = attach_message(salt, leaf, bytes.fromhex(step["token"]))
    else:
        message = open_message(salt, leaf, step["device"])
    return {"message": message.hex(), "signature": device.sign(message).hex()}


def decode(step: Mapping[str, Any]) -> Any:
    pieces = [bytes.fromhex(piece) for piece in step["pieces"]]
    if step["receiver"] == "client":
        context = step["context"]
        return _run_connection(pieces, context, step.get("times", [context["now"]] * len(pieces)))
    return _decode(pieces, step["context"])


STEPS: Final[dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "tables": tables,
    "encode": encode,
    "encode_request": encode_request_body,
    "text": text,
    "sign": sign,
    "decode": decode,
}


# --- receiver "server": the decoder -----------------------------------------------------------------


def _decode(pieces: list[bytes], context: Mapping[str, Any]) -> list[Outcome]:
    decoder = FrameDecoder(Side.SERVER, context["limit"])
    outcomes: list[Outcome] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            for frame in decoder.frames():
                if frame[7] and frame[1] in WITHOUT_BODY:
                    return [*outcomes, {"result": "error", "code": Code.PROTOCOL_ERROR, "fatal": True}]
                try:
                    outcomes.append(_frame(frame, context["max_depth"]))
                except MessageError:
                    outcomes.append({"result": "error", "code": Code.INVALID_ARGUMENT, "fatal": False})
    except ProtocolError as error:
        return [*outcomes, {"result": "error", "code": error.code, "fatal": True}]
    if decoder.buffered:
        outcomes.append({"result": "incomplete", "have": decoder.buffered})
    return outcomes


def _frame(frame: RawFrame, max_depth: int) -> Outcome:
    """Return a frame in the form of the vectors. Raises MessageError."""
    outcome, message = fields_of(frame), message_of(frame, max_depth)
    return outcome if message is None else {**outcome, "message": message}


# --- receiver "client": the connection --------------------------------------------------------------


class _RecordingDecoder(FrameDecoder):
    """Records each frame it returned with the number of frames dropped before it, and the error that ended it."""

    __slots__ = ("_connection", "fault", "returned")

    def __init__(self, limit: int, connection: ClientConnection) -> None:
        super().__init__(Side.CLIENT, limit)
        self._connection = connection
        self.returned: list[tuple[RawFrame, int]] = []
        self.fault: ProtocolError | None = None

    def next_frame(self) -> RawFrame | None:
        try:
            frame = super().next_frame()
        except ProtocolError as error:
            self.fault = error
            raise
        if frame is not None:
            self.returned.append((frame, _dropped(self._connection)))
        return frame


def _dropped(connection: ClientConnection) -> int:
    return connection.dropped_stale + connection.dropped_unknown


def _run_connection(pieces: list[bytes], context: Mapping[str, Any], times: Sequence[str]) -> list[Outcome]:
    connection = ClientConnection(
        max_frame=context["limit"], tolerance_ms=context["tolerance_ms"], max_depth=context["max_depth"]
    )
    decoder = connection._decoder = _RecordingDecoder(context["limit"], connection)
    token = bytes.fromhex(context["tokens"][0]) if context["tokens"] else bytes(TOKEN_SIZE)
    if context["salt"] is not None:
        connection.salt = bytes.fromhex(context["salt"])
        connection._last_counter = int(context["last_counter"])
        connection.state = State.OPEN
    connection._in_flight = dict.fromkeys(context["in_flight"], token)
    events: dict[int, ClientEvent] = {}  # by the number of their frame, from 1
    for piece, now in zip(pieces, times, strict=True):
        for event in connection.receive_data(piece, int(now), 0.0):
            events.setdefault(len(decoder.returned), event)  # one more for an error in the next header
    outcomes: list[Outcome] = []
    after = [*(dropped for _, dropped in decoder.returned[1:]), _dropped(connection)]
    for number, (frame, before) in enumerate(decoder.returned, 1):
        if after[number - 1] > before:
            outcomes.append({"result": "dropped"})
        else:
            outcomes.append(_outcome(frame, events.get(number), context["max_depth"]))
    if decoder.fault is not None:
        outcomes.append({"result": "error", "code": decoder.fault.code, "fatal": True})
    elif decoder.buffered and connection.state is not State.CLOSED:
        outcomes.append({"result": "incomplete", "have": decoder.buffered})
    return outcomes


def _outcome(frame: RawFrame, event: ClientEvent | None, max_depth: int) -> Outcome:
    if isinstance(event, ConnectionEnded) and not (frame[1] == ERROR and event.code != Code.PROTOCOL_ERROR):
        return {"result": "error", "code": event.code, "fatal": True}
    try:
        outcome = _frame(frame, max_depth)
    except MessageError:
        code = event.code if isinstance(event, ErrorReceived | ConnectionEnded) else None
        return {"result": "error", "code": code, "fatal": isinstance(event, ConnectionEnded)}
    if isinstance(event, ErrorReceived) and outcome["message"].get("code") != event.code:  # stale
        return {"result": "error", "code": event.code, "fatal": False}
    return outcome
