"""The steps with vectors, implemented by the Python client's decoder, encoder and connection."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zcproto.client.credentials import Device
from zcproto.connection.client import ClientConnection
from zcproto.connection.client_calls import ClientCalls
from zcproto.connection.client_streams import ClientStream, ClientStreams
from zcproto.connection.credit import SendCredit
from zcproto.connection.events import ClientEvent, ConnectionEnded, ErrorReceived, ItemReceived
from zcproto.connection.state import State
from zcproto.errors import Code, InternalError, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    ALLOWED,
    CALL,
    CREDIT,
    ERROR,
    FAILURE,
    TOKEN_SIZE,
    WITHOUT_BODY,
    Accepted,
    Kind,
    RawFrame,
    Side,
    accepted_with_calls,
    accepted_with_durable,
    accepted_with_streams,
    encode_frame,
    head_of,
)
from zcproto.wire.message import (
    MessageError,
    Resume,
    attach_message,
    decode_error,
    encode_request,
    open_message,
    parse_traceparent,
)
from zcproto_conformance.frames import fields_of, message_of
from zcproto_conformance.values import untyped

Outcome = dict[str, Any]

FIRST_TOKEN: Final = bytes(range(1, 33))
"""The token of streams in vectors that have no other."""

MAX_CALLS: Final = 32


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
    decoder.accepted = _accepted(Side.SERVER, context)
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
                    if frame[1] == CREDIT:
                        return [*outcomes, {"result": "error", "code": Code.PROTOCOL_ERROR, "fatal": True}]
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


def _accepted(side: Side, context: Mapping[str, Any]) -> Accepted:
    """Return what a side accepts once the server has announced what `context` says."""
    announced = context.get("announced") or {}
    streams, calls = announced.get("streams"), announced.get("calls")
    accepted = ALLOWED[side] if streams is None else accepted_with_streams(side, streams["max_item"])
    if side is Side.CLIENT and streams is not None and streams.get("durable"):
        accepted = accepted_with_durable(accepted)
    return accepted if calls is None else accepted_with_calls(side, accepted)


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
    connection.in_flight = dict.fromkeys(context["in_flight"], token)
    streams = _open_streams(connection, context)
    events: dict[int, ClientEvent] = {}  # by the number of their frame, from 1
    for piece, now in zip(pieces, times, strict=True):
        for event in connection.receive_data(piece, int(now), 0.0):
            taken = _take(connection, streams, event, int(now))
            events.setdefault(len(decoder.returned), taken)  # one more for an error in the next header
    refused = dict(_failures(connection.data_to_send()))
    outcomes: list[Outcome] = []
    after = [*(dropped for _, dropped in decoder.returned[1:]), _dropped(connection)]
    for number, (frame, before) in enumerate(decoder.returned, 1):
        if after[number - 1] > before:
            outcomes.append({"result": "dropped"})
        else:
            found = events.get(number)
            if found is None and frame[1] == CALL and frame[2] in refused:
                found = ErrorReceived(frame[2], refused[frame[2]], "", {})
            outcomes.append(_outcome(frame, found, context["max_depth"]))
    if decoder.fault is not None:
        outcomes.append({"result": "error", "code": decoder.fault.code, "fatal": True})
    elif decoder.buffered and connection.state is not State.CLOSED:
        outcomes.append({"result": "incomplete", "have": decoder.buffered})
    return outcomes


def _open_streams(connection: ClientConnection, context: Mapping[str, Any]) -> dict[int, ClientStream]:
    """Put a connection into the state of streams and calls that `context` describes. Return its streams."""
    if "announced" not in context or context["salt"] is None:
        return {}
    token = bytes.fromhex(context["tokens"][0]) if context["tokens"] else FIRST_TOKEN
    connection.welcome = {"max_frame": context["limit"]}
    connection._decoder.accepted = _accepted(Side.CLIENT, context)
    streams = ClientStreams()
    for opened in context["open"]:
        granted, received = (opened["granted"][0], opened["granted"][1]), opened["received"]
        about = opened.get("resume")
        resume = None if about is None else Resume(about["id"], about["from"], attaches=True)
        stream = streams[opened["stream"]] = ClientStream(opened["stream"], token, granted, resume)
        stream.is_accepted = opened.get("accepted", False)
        stream.credit = SendCredit((opened["credit"][0], opened["credit"][1]))
        stream.items._received = stream.items._taken = received[0], received[1]
        connection.in_flight[stream.number] = token
    connection._streams = streams
    if context.get("handles") is not None:
        calls = connection._calls = ClientCalls()
        calls.register(token, frozenset(context["handles"]), MAX_CALLS, None)
        for number in context["calls"]:
            body = encode_request(context["handles"][0], {}, {"deadline_ms": 1})
            calls.receive(number, token, body, is_fresh=True, max_depth=context["max_depth"])
    return dict(streams)


def _take(
    connection: ClientConnection, streams: Mapping[int, ClientStream], event: ClientEvent, now: int
) -> ClientEvent:
    """Take an item at once, without granting another. Return the failure of a stream instead of a bad item."""
    if isinstance(event, ItemReceived):
        try:
            streams[event.stream].read_item(connection.max_depth)
        except InternalError as error:
            connection.cancel(event.stream, now)
            return ErrorReceived(event.stream, error.code, error.message, {})
    return event


def _failures(sent: bytes) -> Iterator[tuple[int, int]]:
    """Yield number and code of each FAILURE."""
    decoder = FrameDecoder(Side.SERVER, len(sent))
    decoder.accepted = accepted_with_calls(Side.SERVER, accepted_with_streams(Side.SERVER, len(sent)))
    decoder.feed(sent)
    for frame in decoder.frames():
        if frame[1] == FAILURE:
            yield frame[2], decode_error(frame[7]).code


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
