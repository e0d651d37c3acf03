"""Test a whole ClientConnection with every vector of streams that concerns a client.

A vector of spec/vectors/streaming/items.json or durable.json is a conversation that has already begun, the bytes
that the client receives next, and what must come of each frame in them:

    {"name": "client-item-longer-than-max-item",
     "context": {"announced": {"streams": {...}}, "open": [{"stream": 1, "credit": [4, 1000], ...}], ...},
     "bytes": "0000040101110000...",
     "expect": [{"result": "error", "code": 65, "fatal": true, ...}]}

`context.open` lists the streams that the client has opened: what the server has granted it (`credit`), what it has
granted the server (`granted`), and the items and bytes that it has received. `context.in_flight` lists requests.
A result is `frame` (delivered to the application), `error` (with its code; fatal ends the connection), `dropped`
or `incomplete`. spec/vectors/README.md describes all fields.
"""

from __future__ import annotations

import pytest

from tests.connection.test_server_vectors import pieces_of
from tests.helpers import NOW
from tests.wire.vectors import Vector, document, typed
from zcproto.connection.client import ClientConnection
from zcproto.connection.client_streams import ClientStream
from zcproto.connection.credit import SendCredit
from zcproto.connection.events import (
    Accepted,
    ConnectionEnded,
    ErrorReceived,
    ItemReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.errors import Code, InternalError
from zcproto.wire.frame import CANCEL, END, HEADER, NO_TOKEN, WELCOME, encode_frame
from zcproto.wire.message import Resume, encode_body

TOKEN = bytes(range(1, 33))
WELCOME_MAP = {
    "server": "zcproto",
    "versions": [1],
    "max_frame": 1_048_576,
    "max_streams": 128,
    "idle_timeout_ms": 300_000,
    "tolerance_ms": 30_000,
    "sts": {"max_age": 60, "include_subdomains": False},
}
VECTORS = {
    vector["name"]: vector
    for name in ("items", "durable")
    for vector in document(f"streaming/{name}")["vectors"]
    if vector["receiver"] == "client"
}


class ClientStreamHarness:
    """A client with the streams of a vector, whose application takes each item at once and grants no more."""

    def __init__(self, vector: Vector) -> None:
        context = vector["context"]
        self.wall = int(context["now"])
        self.client = client = ClientConnection(max_depth=context["max_depth"])
        self.streams: dict[int, ClientStream] = {}
        self.outcomes: list[Vector] = []
        if vector["name"].startswith("welcome-"):
            return
        announced = {key: value for key, value in context["announced"].items() if value is not None}
        welcome = encode_body(WELCOME_MAP | announced)
        salt = bytes.fromhex(context["salt"])
        data = encode_frame(WELCOME, 0, self.wall, salt, 0, NO_TOKEN, welcome)
        assert isinstance(next(client.receive_data(data, self.wall, NOW)), Welcomed)
        for number in context["in_flight"]:
            assert client.request("sleep", {}, token=TOKEN, wall=self.wall) == number
        for each in context["open"]:
            window = each["granted"][0], each["granted"][1]
            resume = each.get("resume")
            stream = client.open_stream(
                "m",
                {},
                token=TOKEN,
                window=window,
                wall=self.wall,
                resume=None if resume is None else Resume(resume["id"], resume["from"], attaches=True),
            )
            stream.is_accepted = each.get("accepted", False)
            assert stream.number == each["stream"]
            stream.credit = SendCredit((each["credit"][0], each["credit"][1]))
            # No sequence of frames leads to totals like these in the time of a test.
            stream.items._received = stream.items._taken = each["received"][0], each["received"][1]
            self.streams[stream.number] = stream
        client.data_to_send()

    def feed(self, data: bytes) -> None:
        for event in self.client.receive_data(data, self.wall, NOW):
            match event:
                case Welcomed():
                    self.outcomes.append({"result": "frame", "kind": "WELCOME"})
                case ItemReceived(number):
                    self._take(self.streams[number])
                case ResponseReceived(number, value):
                    self.outcomes.append({"result": "frame", "kind": "RESPONSE", "value": typed(value)})
                case Accepted(_, run):
                    self.outcomes.append({"result": "frame", "kind": "ACCEPTED", "map": typed(run)})
                case ErrorReceived(_, code, message, details) if details:
                    error = {"code": code, "message": message, "details": typed(details)}
                    self.outcomes.append({"result": "frame", "kind": "ERROR", **error})
                case ErrorReceived(number, code):
                    self.outcomes.append({"result": "error", "code": code, "fatal": False})
                case ConnectionEnded(code):
                    self.outcomes.append({"result": "error", "code": code, "fatal": True})

    def _take(self, stream: ClientStream) -> None:
        try:
            value = stream.read_item(32)
        except InternalError as error:
            if stream.resume is None:
                self.client.cancel(stream.number, self.wall)
            else:
                self.client.detach(stream, self.wall)
            self.outcomes.append({"result": "error", "code": error.code, "fatal": False})
        else:
            self.outcomes.append({"result": "frame", "kind": "ITEM", "value": typed(value)})


def expected_fields(outcome: Vector) -> Vector | None:
    if outcome["result"] in ("dropped", "incomplete"):
        return None
    if outcome["result"] == "error":
        return {key: outcome[key] for key in ("result", "code", "fatal")}
    wanted = {key: outcome[key] for key in ("result", "kind")}
    return wanted if outcome["kind"] == "WELCOME" else wanted | outcome["message"]


@pytest.mark.parametrize("name", VECTORS)
def test_client_produces_expected_outcome_of_stream_vector(name: str) -> None:
    """The frames arrive whole, byte by byte, and cut at field boundaries."""
    vector = VECTORS[name]
    data = bytes.fromhex(vector["bytes"])
    for division in ("whole", "bytes", "cut"):
        harness = ClientStreamHarness(vector)
        for piece in pieces_of(data, division):
            harness.feed(piece)
        expected = [fields for outcome in vector["expect"] if (fields := expected_fields(outcome))]
        assert harness.outcomes == expected, division
        dropped = sum(outcome["result"] == "dropped" for outcome in vector["expect"])
        assert harness.client.dropped_unknown == dropped
        if any(outcome.get("code") in (Code.DATA_LOSS, Code.INTERNAL) for outcome in expected):
            sent = harness.client.data_to_send()
            leaves = END if any("resume" in each for each in vector["context"]["open"]) else CANCEL
            is_answered = name in ("client-stream-stale-response", "client-answer-of-a-run-stale")
            assert [HEADER.unpack_from(sent)[1]] == [leaves] if not is_answered else sent == b""
