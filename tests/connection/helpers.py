"""Run a client connection in memory against frames made by the test; count what a server looks up."""

from __future__ import annotations

from typing import Any

from tests.helpers import NOW, SALT, WALL, ConnectionPair, small_registry
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import ClientEvent, ConnectionEnded, Welcomed
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import Session, SessionRegistry
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import NO_TOKEN, PONG, WELCOME, RawFrame, Side, encode_frame
from zcproto.wire.message import encode_body

TOKEN = b"k" * 32
WELCOME_MAP: dict[str, Any] = {
    "server": "zcproto",
    "versions": [1],
    "max_frame": 1_048_576,
    "max_streams": 4,
    "idle_timeout_ms": 300_000,
    "tolerance_ms": 30_000,
    "sts": {"max_age": 60, "include_subdomains": False},
}


class ClientHarness:
    """A client connection that receives frames made by the test."""

    def __init__(
        self, welcome: dict[str, Any] | None = None, *, server_ahead_ms: int = 0, **limits: Any
    ) -> None:
        self.client = ClientConnection(**limits)
        self.wall = WALL
        self.now = NOW
        self.server_ahead_ms = server_ahead_ms
        self.counter = 0
        self._decoder = FrameDecoder(Side.SERVER, 2**32 - 1)
        if welcome is not None:
            (event,) = self.receive_frame(WELCOME, 0, encode_body(welcome), counter=0)
            assert isinstance(event, Welcomed)

    def frame(
        self,
        head: int,
        stream: int = 0,
        body: bytes = b"",
        *,
        counter: int | None = None,
        timestamp: int | None = None,
        salt: bytes = SALT,
        token: bytes = NO_TOKEN,
    ) -> bytes:
        if counter is None:
            self.counter += 1
            counter = self.counter
        if timestamp is None:
            timestamp = self.wall + self.server_ahead_ms
        return encode_frame(head, stream, timestamp, salt, counter, token, body)

    def receive_data(self, data: bytes) -> list[ClientEvent]:
        return list(self.client.receive_data(data, self.wall, self.now))

    def receive_frame(
        self, head: int, stream: int = 0, body: bytes = b"", **fields: Any
    ) -> list[ClientEvent]:
        return self.receive_data(self.frame(head, stream, body, **fields))

    def request(self, method: str = "echo", params: dict[str, Any] | None = None, **more: Any) -> int:
        return self.client.request(method, params, wall=self.wall, **more)

    def sent(self) -> list[RawFrame]:
        """Return the frames that the client has sent since the last call."""
        self._decoder.feed(self.client.data_to_send())
        frames: list[RawFrame] = []
        while (frame := self._decoder.next_frame()) is not None:
            frames.append(frame)
        return frames

    def receive_stale(
        self, head: int = PONG, stream: int = 0, body: bytes = b"", **fields: Any
    ) -> list[ClientEvent]:
        return self.receive_frame(
            head, stream, body, timestamp=self.wall + self.server_ahead_ms + 30_001, **fields
        )


def pair_in_session(settings: ConnectionSettings) -> ConnectionPair:
    """Return a connection with one session, which never becomes idle."""
    pair = ConnectionPair(small_registry(idle_timeout_ms=None), settings)
    pair.login()
    return pair


def ended(events: list[ClientEvent]) -> ConnectionEnded:
    """Return the last event, which must be the end of the connection."""
    event = events[-1]
    assert isinstance(event, ConnectionEnded)
    return event


def count_checks(registry: SessionRegistry) -> tuple[list[bytes], list[str]]:
    """Record the tokens that are looked up from now on, and the users whose sessions are checked again."""
    looked_up: list[bytes] = []
    again: list[str] = []
    check, check_again = registry.check, registry.check_again

    def recorded(token: bytes, wall: int) -> Session | Code:
        looked_up.append(token)
        return check(token, wall)

    def recorded_again(session: Session, wall: int) -> bool:
        again.append(session.user)
        return check_again(session, wall)

    # The tests make connections with the registry before they know when to count, so it cannot be a subclass.
    registry.check, registry.check_again = recorded, recorded_again
    return looked_up, again
