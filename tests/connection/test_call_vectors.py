"""Test both ends of a connection with every vector of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.connection.test_server_vectors import pieces_of, server_in
from tests.helpers import NOW
from tests.wire.vectors import Vector, document, typed
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import CallEnded, CallReceived, CallWithdrawn, ConnectionEnded
from zcproto.connection.server_calls import CallToClient, encode_call
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.errors import Code
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    CALL,
    ERROR,
    FAILURE,
    NO_TOKEN,
    WELCOME,
    Side,
    accepted_with_calls,
    encode_frame,
)
from zcproto.wire.message import decode_error, encode_request

VECTORS = {vector["name"]: vector for vector in document("streaming/calls")["vectors"]}
Outcome = dict[str, Any]


class Receiver:
    """One end in the state of a vector, and what its application and its peer see."""

    dropped: Callable[[], int]

    def __init__(self, vector: Vector) -> None:
        self.context = context = vector["context"]
        self.wall = int(context["now"])
        self.salt = bytes.fromhex(context["salt"])
        self.tokens = tuple(bytes.fromhex(token) for token in context["tokens"])
        self.announced = context["announced"]
        self.outcomes: list[Outcome] = []

    def add_error(self, number: int, body: bytes) -> None:
        self.outcomes.append({"result": "error", "code": decode_error(body).code, "stream": number})


class ServerReceiver(Receiver):
    def __init__(self, vector: Vector) -> None:
        super().__init__(vector)
        calls, streams = self.announced["calls"], self.announced["streams"]
        settings = ConnectionSettings(
            streams=None if streams is None else StreamLimits(**streams),
            max_calls=0 if calls is None else calls["max"],
        )
        server, sessions = server_in(self.context, settings)
        self.server, session = server, sessions[0].session
        if calls is not None:
            server.register(session.id, frozenset({"approve"}), 32)
        body = encode_call(CallToClient("approve", {}, 30.0), 1_000)
        for number in self.context["calls"]:
            call = server.call(session.id, "approve", body, timeout_s=30.0, wall=self.wall, now=NOW)
            assert call.number == number
        server.data_to_send()
        self._decoder = FrameDecoder(Side.CLIENT, 2**32 - 1)
        self.dropped = lambda: server.totals.dropped_answers

    def feed(self, data: bytes) -> None:
        for event in self.server.receive_data(data, self.wall, NOW):
            match event:
                case CallEnded(call, value, None):
                    self._answered("RESULT", call.number, {"value": typed(value)})
                case CallEnded(call, _, error):
                    message = {"code": error.code, "message": error.message, "details": typed(error.details)}
                    self._answered("FAILURE", call.number, message)
                case ConnectionEnded():
                    pass
        self._decoder.feed(self.server.data_to_send())
        for _, head, stream, *_, body in self._decoder.frames():
            assert head == ERROR
            self.add_error(stream, body)

    def _answered(self, kind: str, number: int, message: Outcome) -> None:
        self.outcomes.append({"result": "frame", "kind": kind, "stream": number, "message": message})


class ClientReceiver(Receiver):
    def __init__(self, vector: Vector) -> None:
        super().__init__(vector)
        self.client = client = ClientConnection()
        welcome = ConnectionSettings(
            streams=StreamLimits(**self.announced["streams"]), max_calls=self.announced["calls"]["max"]
        ).welcome_body
        self._counter = -len(self.context["calls"])  # the frames of the vector begin with 1
        list(client.receive_data(self._frame(WELCOME, 0, NO_TOKEN, welcome, 0), self.wall, NOW))
        for number in self.context["in_flight"]:
            assert client.request("sleep", {}, token=self.tokens[0], wall=self.wall) == number
        if self.context["handles"] is not None:
            client.handle(frozenset(self.context["handles"]), 4, None, token=self.tokens[0], wall=self.wall)
        for number in self.context["calls"]:
            body = encode_request("approve", {}, {"deadline_ms": 1_000})
            client._last_counter = -1
            list(client.receive_data(self._frame(CALL, number, self.tokens[0], body, 0), self.wall, NOW))
        client.data_to_send()
        self._decoder = FrameDecoder(Side.SERVER, 2**32 - 1)
        self._decoder.accepted = accepted_with_calls(Side.SERVER, self._decoder.accepted)
        self.dropped = lambda: client.dropped_unknown

    def _frame(self, head: int, stream: int, token: bytes, body: bytes, counter: int) -> bytes:
        return encode_frame(head, stream, self.wall, self.salt, counter, token, body)

    def feed(self, data: bytes) -> None:
        for event in self.client.receive_data(data, self.wall, NOW):
            match event:
                case CallReceived(call):
                    meta = {"deadline_ms": call.deadline_ms}
                    message = {"method": call.method, "params": typed(call.params), "meta": meta}
                    seen = {"result": "frame", "kind": "CALL", "stream": call.number}
                    self.outcomes.append({**seen, "message": message})
                case CallWithdrawn(call):
                    self.outcomes.append({"result": "frame", "kind": "WITHDRAW", "stream": call.number})
                case ConnectionEnded(code):
                    self.outcomes.append({"result": "error", "code": code, "stream": 0})
        self._decoder.feed(self.client.data_to_send())
        for _, head, number, *_, body in self._decoder.frames():
            assert head == FAILURE
            if decode_error(body).code != Code.CANCELLED:  # the answer to WITHDRAW
                self.add_error(number, body)


def expected(outcome: Vector) -> Outcome | None:
    """Return what an application or a peer can see of an outcome."""
    if outcome["result"] == "dropped":
        return None
    if outcome["result"] == "error":
        return {key: outcome[key] for key in ("result", "code", "stream")}
    return {key: outcome[key] for key in ("result", "kind", "stream", "message") if key in outcome}


@pytest.mark.parametrize("name", VECTORS)
def test_receiver_produces_expected_outcome_of_call_vector(name: str) -> None:
    """The frames arrive whole, byte by byte, and cut at field boundaries."""
    vector = VECTORS[name]
    data = bytes.fromhex(vector["bytes"])
    for division in ("whole", "bytes", "cut"):
        end = ServerReceiver(vector) if vector["receiver"] == "server" else ClientReceiver(vector)
        for piece in pieces_of(data, division):
            end.feed(piece)
        visible = [fields for outcome in vector["expect"] if (fields := expected(outcome))]
        assert end.outcomes == visible, division
        dropped = sum(outcome["result"] == "dropped" for outcome in vector["expect"])
        assert end.dropped() == dropped, division
