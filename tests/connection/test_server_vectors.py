"""Test a whole ServerConnection with every vector of the specification that concerns a server."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from tests.helpers import NOW, Answer, with_requests
from tests.wire.vectors import Vector, document, expected_message, frame_vectors, typed
from zcproto.connection.events import ConnectionEnded, Request, RequestEnded, SessionJoined
from zcproto.connection.refusals import NEEDS_SESSION
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, SessionRegistry, SessionSettings
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import NO_TOKEN, PING, Kind, Side, encode_frame
from zcproto.wire.message import NO_META, encode_body

PUBLIC = ("session.open", "session.refresh", "device.enroll", "server.info")
VECTORS = {name: vector for name, vector in frame_vectors().items() if vector["receiver"] == "server"}


@cache
def registry_of(tokens: tuple[bytes, ...], wall: int) -> tuple[SessionRegistry, list[OpenedSession]]:
    """Return a registry in which these tokens are valid. Vectors end no sessions, so they can share it."""
    numbers = itertools.count(1)
    queue = [part for token in tokens for part in (token, next(numbers).to_bytes(32, "little"))]
    settings = SessionSettings(max_sessions=8, dead_limit=8, grace_limit=8)
    registry = SessionRegistry(settings, lambda size: queue.pop(0)[:size])
    return registry, [registry.open(f"user{n}", client="", address="", wall=wall) for n in range(len(tokens))]


def server_in(
    context: Vector, settings: ConnectionSettings, *, joins: bool = True
) -> tuple[ServerConnection, list[OpenedSession]]:
    """Return a server in the state that a vector requires, and its sessions."""
    wall, salt = int(context["now"]), bytes.fromhex(context["salt"])
    tokens = tuple(bytes.fromhex(token) for token in context["tokens"])
    registry, sessions = registry_of(tokens, wall)
    server = ServerConnection(settings, registry, salt=salt, wall=wall, now=NOW)
    for opened in sessions if joins else ():
        server.join(opened.session, opened.token, wall, NOW)
    if last := int(context.get("last_counter", 0)):
        ping = encode_frame(PING, 0, wall, salt, last, NO_TOKEN)
        assert list(server.receive_data(ping, wall, NOW)) == []
    for stream in context["in_flight"]:
        server.hold(Request(stream, tokens[0], sessions[0].session, "sleep", {}, NO_META), NOW)
    return server, sessions


class Harness:
    """A server in the state that a vector requires, with an edge that answers each request immediately."""

    def __init__(self, vector: Vector) -> None:
        context = vector["context"]
        self.wall = int(context["now"])
        settings = ConnectionSettings(
            max_depth=context["max_depth"], tolerance_ms=context["tolerance_ms"], max_frame=1_048_576
        )
        has_session = context["limit"] > settings.max_frame_before_session
        assert not has_session or context["limit"] == settings.max_frame
        self.server, _ = server_in(context, settings, joins=has_session)
        self.server.data_to_send()
        self.outcomes: list[Vector] = []
        self._decoder = FrameDecoder(Side.CLIENT, 2**32 - 1)

    def feed(self, data: bytes, wall: int | None = None) -> None:
        self.wall = self.wall if wall is None else wall
        for event in with_requests(self.server.receive_data(data, self.wall, NOW)):
            self._collect()
            match event:
                case Request():
                    self._run(event)
                case RequestEnded():
                    self.outcomes.append(
                        {"result": "frame", "kind": "CANCEL", "stream": event.request.stream}
                    )
                case ConnectionEnded():
                    assert self.outcomes[-1]["fatal"]
                    assert self.outcomes[-1]["code"] == event.code
                case SessionJoined():
                    pass
        self._collect()

    def _run(self, request: Request) -> None:
        if request.session is None and request.method not in PUBLIC:
            self.server.fail(request, NEEDS_SESSION, self.wall)
            return
        meta = {key: typed(value) for key, value in request.meta._asdict().items() if value is not None}
        message = {"method": request.method, "params": typed(request.params), "meta": meta}
        self.outcomes.append(
            {
                "result": "frame",
                "kind": "REQUEST",
                "stream": request.stream,
                "token": request.token.hex(),
                "message": message,
            }
        )
        assert self.server.respond(request, encode_body({}), self.wall)

    def _collect(self) -> None:
        if not (sent := self.server.data_to_send()):
            return
        self._decoder.feed(sent)
        while (frame := self._decoder.next_frame()) is not None:
            answer = Answer(frame)
            if answer.kind is Kind.PONG:
                self.outcomes.append({"result": "frame", "kind": "PING", "stream": 0})
            elif answer.kind is Kind.ERROR and answer.code != Code.CANCELLED:
                code = answer.code
                fatal = answer.stream == 0
                self.outcomes.append(
                    {"result": "error", "code": code, "stream": answer.stream, "fatal": fatal}
                )


def visible_fields(outcome: Vector) -> Vector:
    """Return the fields of an expected outcome that a peer can see."""
    if outcome["result"] == "error":
        return {key: outcome[key] for key in ("result", "code", "stream", "fatal")}
    if outcome["kind"] != "REQUEST":
        return {key: outcome[key] for key in ("result", "kind", "stream")}
    wanted = {key: outcome[key] for key in ("result", "kind", "stream", "token")}
    return {**wanted, "message": expected_message(outcome)}


def is_seen(outcome: Vector) -> bool:
    """Return whether a peer can see the outcome; PONGs and dropped frames are invisible."""
    return outcome["result"] == "error" or (outcome["result"] == "frame" and outcome["kind"] != "PONG")


def pieces_of(data: bytes, division: str) -> list[bytes]:
    if division == "whole":
        return [data]
    if division == "bytes":
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted({0, 3, 4, 40, 67, 68, 69, len(data) - 1, len(data)} & set(range(len(data) + 1)))
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize("name", VECTORS)
def test_server_produces_expected_outcome_of_vector(name: str) -> None:
    """The frames arrive whole, byte by byte, and cut at field boundaries."""
    vector = VECTORS[name]
    data = bytes.fromhex(vector["bytes"])
    expected = vector["expect"]
    seen = [visible_fields(outcome) for outcome in expected if is_seen(outcome)]
    left = expected[-1].get("have", 0) if expected else 0
    dropped = sum(outcome.get("why") == "stale timestamp" for outcome in expected)
    for division in ("whole", "bytes", "cut"):
        harness = Harness(vector)
        for piece in pieces_of(data, division):
            harness.feed(piece)
        assert harness.outcomes == seen, division
        assert harness.server.buffered == left or harness.outcomes[-1]["fatal"]
        assert harness.server.totals.dropped_stale == dropped


SLOW_VECTORS = {
    vector["name"]: vector for vector in document("arrival")["vectors"] if vector["receiver"] == "server"
}


@pytest.mark.parametrize("name", SLOW_VECTORS)
def test_server_judges_slow_frames_of_vector_at_their_headers(name: str) -> None:
    vector = SLOW_VECTORS[name]
    pieces = vector["pieces"]
    harness = Harness({**vector, "context": {**vector["context"], "now": pieces[0]["now"]}})
    for piece in pieces:
        harness.feed(bytes.fromhex(piece["bytes"]), int(piece["now"]))
    assert harness.outcomes == [visible_fields(outcome) for outcome in vector["expect"]]


def test_frames_after_fatal_vector_are_ignored() -> None:
    fatal = [vector for vector in VECTORS.values() if any(x.get("fatal") for x in vector["expect"])]
    assert len(fatal) > 50
    for vector in fatal:
        harness = Harness(vector)
        harness.feed(bytes.fromhex(vector["bytes"]))
        seen = list(harness.outcomes)
        harness.feed(encode_frame(PING, 0, harness.wall, harness.server.salt, 2**64 - 1, NO_TOKEN))
        assert harness.outcomes == seen
        assert harness.server.data_to_send() == b""


def test_server_reproduces_example_conversation() -> None:
    """Bodies of answers come from handlers; all other bytes must equal the specification."""
    frames = document("conversation")["vectors"]
    token = bytes(range(1, 33))
    welcome = bytes.fromhex(frames[0]["bytes"])
    start = int(frames[0]["now"])
    registry, sessions = registry_of((token,), start)
    server = ServerConnection(
        ConnectionSettings(), registry, salt=welcome[20:28], wall=timestamp_of(welcome), now=NOW
    )
    assert server.data_to_send() == welcome
    held: dict[int, Request] = {}
    for frame in frames[1:]:
        data = bytes.fromhex(frame["bytes"])
        if frame["from"] == "client":
            wall = int(frame["now"])
            for event in with_requests(server.receive_data(data, wall, NOW)):
                if isinstance(event, Request):
                    held[event.stream] = event
                    server.hold(event, NOW)
            if frame["kind"] in ("CANCEL", "PING"):  # answered in the same turn, with its own timestamp
                answer = server.data_to_send()
        elif frame["kind"] == "RESPONSE":
            request = held.pop(int.from_bytes(data[8:12], "big"))
            if request.method == "session.open":
                server.join(sessions[0].session, token, timestamp_of(data), NOW)
            assert server.respond(request, data[68:], timestamp_of(data))
            assert server.data_to_send() == data
        else:
            assert answer[:12] + answer[20:] == data[:12] + data[20:]


def timestamp_of(frame: bytes) -> int:
    return int.from_bytes(frame[12:20], "big")


def test_vectors_cover_all_stages() -> None:
    assert len(VECTORS) >= 300
    stages = {x.get("stage") for vector in VECTORS.values() for x in vector["expect"]}
    assert stages >= {"header", "freshness", "stream", "token", "body", "deadline"}
