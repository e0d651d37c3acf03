"""Test a whole ServerConnection with every vector of streams that concerns a server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.test_server_vectors import Harness, pieces_of, server_in, visible_fields
from tests.helpers import NOW
from tests.wire.vectors import Vector, document, expected_message, typed
from zcproto.connection.credit import ItemQueue, SendCredit
from zcproto.connection.events import (
    ConnectionEnded,
    CreditReceived,
    DurableStream,
    ItemsReceived,
    Request,
    RequestEnded,
    ServerStream,
)
from zcproto.connection.server_streams import read_item
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.errors import InvalidArgument
from zcproto.sessions import Session
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import Kind, Side
from zcproto.wire.message import NO_META, Resume, decode_error, encode_error

VECTORS = {
    vector["name"]: vector
    for name in ("items", "durable")
    for vector in document(f"streaming/{name}")["vectors"]
    if vector["receiver"] == "server"
}
TOKEN = bytes(range(1, 33))
"""Of every OPEN that came before a vector."""


def opened(each: Vector, session: Session) -> ServerStream:
    """Return a stream in the state that a vector describes, without its credit."""
    about = each["stream"], TOKEN, session, "upload", {}, NO_META
    if "resume" not in each:
        return ServerStream(*about)
    resume = Resume(each["resume"]["id"], each["resume"]["from"], attaches=True)
    return DurableStream(*about, resume=resume, is_accepted=each["accepted"], taken=each.get("taken", -1))


class StreamHarness(Harness):
    """A server with the streams of a vector, and methods that take each item at once."""

    def __init__(self, vector: Vector) -> None:
        context = vector["context"]
        self.wall = int(context["now"])
        announced = context["announced"]["streams"]
        settings = ConnectionSettings(
            max_depth=context["max_depth"],
            tolerance_ms=context["tolerance_ms"],
            streams=None if announced is None else StreamLimits(**announced),
        )
        server, sessions = server_in(context, settings)
        self.server, session = server, sessions[0].session
        for each in context["open"]:
            stream = opened(each, session)
            stream.credit = SendCredit((each["credit"][0], each["credit"][1]))
            stream.credit.sent_items = each.get("sent", 0)
            if each["takes_items"]:
                stream.items = ItemQueue((0, 0), (each["granted"][0], each["granted"][1]))
                stream.items._received = stream.items._taken = (each["received"][0], each["received"][1])
                stream.items.has_ended = each["ended"]
            server.hold(stream, NOW)
        if announced is not None:
            server.streams(NOW).allowance = context["allowance"]
        server.data_to_send()
        self.credits = [stream.credit.items for stream in self.streams()]
        self.outcomes: list[Vector] = []
        self._decoder = FrameDecoder(Side.CLIENT, 2**32 - 1)

    def streams(self) -> list[ServerStream]:
        return [held for held in self.server._held.values() if isinstance(held, ServerStream)]

    def feed(self, data: bytes, wall: int | None = None) -> None:
        for event in self.server.receive_data(data, self.wall, NOW):
            self._collect_all()
            match event:
                case ServerStream():
                    if not isinstance(event, DurableStream):
                        self.server.streams(NOW).take_items(event)
                    self.server.hold(event, NOW)
                    self._seen("OPEN", event, event.meta._asdict())
                case ItemsReceived(stream):
                    self._take(stream)
                case ConnectionEnded():
                    assert self.outcomes[-1]["fatal"]
                case RequestEnded() | CreditReceived():
                    pass
                case _:
                    self._seen("REQUEST", Request(*event), {})  # the only other one
        self._collect_all()

    def _seen(self, kind: str, request: Request, meta: dict[str, Any]) -> None:
        meta = {key: value for key, value in meta.items() if value is not None}
        if isinstance(request, ServerStream) and request.credit.items:
            meta["credit"] = [request.credit.items, request.credit.bytes]
        message = {"method": request.method, "params": typed(request.params), "meta": meta}
        if isinstance(request, DurableStream):
            meta["resume"] = {"id": request.resume.id, "from": request.resume.position}
            message["params"] = None if request.resume.attaches else message["params"]
        seen = {"result": "frame", "kind": kind, "stream": request.stream, "token": request.token.hex()}
        self.outcomes.append({**seen, "message": message})

    def _take(self, stream: ServerStream) -> None:
        if not stream.items.held:
            self.outcomes.append({"result": "frame", "kind": "END", "stream": stream.stream})
            return
        try:
            value = read_item(stream, stream.items.take(), 32)
        except InvalidArgument as error:
            self.server.fail(stream, encode_error(error.code, error.message, error.details), self.wall)
        else:
            self.outcomes.append(
                {"result": "frame", "kind": "ITEM", "stream": stream.stream, "value": typed(value)}
            )

    def _collect_all(self) -> None:
        self._decoder.feed(self.server.data_to_send())
        for _, head, stream, *_, body in self._decoder.frames():
            if head >> 16 & 0xFF == Kind.ERROR:
                error = decode_error(body)
                outcome = {"result": "error", "code": error.code, "stream": stream, "fatal": stream == 0}
                self.outcomes.append({**outcome, "details": typed(error.details)})


def expected_fields(outcome: Vector) -> Vector | None:
    """Return what a peer or a method can see of an outcome."""
    if outcome["result"] in ("dropped", "incomplete") or outcome.get("kind") in ("CREDIT", "CANCEL"):
        return None
    if outcome["result"] == "error":
        return {**visible_fields(outcome), "details": outcome.get("details", {"map": {}})}
    if outcome["kind"] in ("OPEN", "REQUEST"):
        message = expected_message(outcome)
        if "resume" in message["meta"]:
            message["params"] = outcome["message"]["params"]  # nil and an empty map differ
        if message["meta"].get("credit") == [0, 0]:  # the same as none
            del message["meta"]["credit"]
        wanted = {key: outcome[key] for key in ("result", "kind", "stream", "token")}
        return {**wanted, "message": message}
    wanted = {key: outcome[key] for key in ("result", "kind", "stream")}
    return wanted | outcome.get("message", {})


def comparable(outcome: Vector, expected: Vector) -> Vector:
    """Leave out details that the vector does not state."""
    if outcome["result"] == "error" and expected.get("details") == {"map": {}}:
        return {**outcome, "details": {"map": {}}}
    return outcome


@pytest.mark.parametrize("name", VECTORS)
def test_server_produces_expected_outcome_of_stream_vector(name: str) -> None:
    """The frames arrive whole, byte by byte, and cut at field boundaries."""
    vector = VECTORS[name]
    data = bytes.fromhex(vector["bytes"])
    expected = [fields for outcome in vector["expect"] if (fields := expected_fields(outcome))]
    for division in ("whole", "bytes", "cut"):
        harness = StreamHarness(vector)
        for piece in pieces_of(data, division):
            harness.feed(piece)
        assert len(harness.outcomes) == len(expected), division
        for outcome, wanted in zip(harness.outcomes, expected, strict=True):
            assert comparable(outcome, wanted) == wanted, division
        for outcome in vector["expect"]:
            if outcome.get("kind") == "CREDIT":
                (stream,) = harness.streams()
                items, size, *taken = outcome["message"]["credit"]
                assert (stream.credit.items, stream.credit.bytes) == (items, size)
                assert not taken or taken == [stream.taken]  # type: ignore[attr-defined]  # of a DurableStream
