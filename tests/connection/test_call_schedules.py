"""Test both ends of calls joined in memory with random schedules, against a model of what the applications did.

Each schedule ends with the answers of all handlers and the delivery of all bytes. Then every call has had exactly
one outcome, which the model knows to be possible, and no place of a limit is taken any more.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import NOW, SALT, WALL, small_registry
from zcproto.connection import server_calls
from zcproto.connection.client import ClientConnection
from zcproto.connection.client_calls import ClientCall, ClientCallState
from zcproto.connection.events import (
    CallEnded,
    CallReceived,
    CallWithdrawn,
    ConnectionEnded,
    ResponseReceived,
)
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_calls import CallToClient, ServerCall, encode_call
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code, ResourceExhausted, Unavailable
from zcproto.sessions import OpenedSession
from zcproto.wire.frame import RESPONSE
from zcproto.wire.message import encode_body

METHODS = frozenset({"ask", "tell"})
USERS = ("ada", "bob")
LIMIT = 3
TIMEOUT = 10.0
WITHDRAWN = "withdrawn"


class Ends:
    """A server that calls and a client with two users, and the bytes in flight between them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.registry = registry = small_registry(idle_timeout_ms=None)
        self.server = ServerConnection(
            ConnectionSettings(max_calls=LIMIT), registry, salt=SALT, wall=WALL, now=NOW
        )
        self.client = ClientConnection()
        self.now = NOW
        self.opened: dict[str, OpenedSession] = {}
        self.to_client, self.to_server = bytearray(), bytearray()
        self.refreshing: dict[int, OpenedSession] = {}
        self.calls: dict[ServerCall, int] = {}
        self.outcomes: dict[int, Any] = {}
        self.running: list[ClientCall] = []
        self.stopping: list[ClientCall] = []
        self.said: dict[int, Any] = {}
        self.deliver(2**20)
        for user in USERS:
            opened = registry.open(user, client="", address="", wall=WALL)
            self.opened[user] = opened
            self.server.join(opened.session, opened.token, WALL, self.now)
            self.register(user, METHODS)
        self.deliver(2**20)

    def register(self, user: str, methods: frozenset[str]) -> None:
        """Send `session.handle`, which the server applies at once: the order of the bytes is what matters."""
        self.client.handle(methods, self.most, user, token=self.opened[user].token, wall=WALL)
        self.to_server += self.client.data_to_send()

    # --- bytes ------------------------------------------------------------------------------------

    def deliver(self, most: int) -> None:
        """Deliver up to `most` bytes in each direction."""
        self.to_client += self.server.data_to_send()
        self.to_server += self.client.data_to_send()
        data, self.to_server[:most] = bytes(self.to_server[:most]), b""
        for event in self.server.receive_data(data, WALL, self.now):
            assert not isinstance(event, ConnectionEnded), event
            if event.__class__ is tuple:
                self.answer_request(*event)  # the only bare tuple
            elif isinstance(event, CallEnded):
                self.ended(event)
        self.to_client += self.server.data_to_send()
        data, self.to_client[:most] = bytes(self.to_client[:most]), b""
        for seen in self.client.receive_data(data, WALL, self.now):
            assert not isinstance(seen, ConnectionEnded), seen
            if isinstance(seen, CallReceived):
                self.running.append(seen.call)
                assert self.opened_of(seen.call) is not None
            elif isinstance(seen, CallWithdrawn):
                self.stopping.append(seen.call)
            elif isinstance(seen, ResponseReceived) and seen.stream in self.refreshing:
                opened = self.refreshing.pop(seen.stream)
                self.opened[opened.session.user] = opened
        for user in USERS:
            assert sum(call.session.receiver == user for call in self.running) <= self.most
        assert len(self.server._calls._in_flight if self.server._calls else ()) <= LIMIT

    def opened_of(self, call: ClientCall) -> str:
        user: str = call.session.receiver
        assert call.params["user"] == user, "a call reaches the handlers of its own user"
        return user

    def answer_request(
        self, stream: int, token: bytes, session: Any, method: str, params: Any, _: Any
    ) -> None:
        if method == "session.handle":
            self.server.register(session.id, frozenset(params["methods"]), params["max"])
            self.server.outbox.send(RESPONSE, stream, token, encode_body({}), WALL)
        else:
            assert method == "session.refresh"
            opened = self.registry.refresh(params["refresh_token"], client="", address="", wall=WALL)
            assert isinstance(opened, OpenedSession)
            self.server.join(opened.session, opened.token, WALL, self.now)
            self.refreshing[stream] = opened
            self.server.outbox.send(RESPONSE, stream, token, encode_body({"token": opened.token}), WALL)

    # --- the server -------------------------------------------------------------------------------

    def call(self, user: str, method: str) -> None:
        number = len(self.outcomes) + len(self.calls)
        body = encode_call(CallToClient(method, {"user": user, "number": number}, TIMEOUT), 1_000)
        session_id = self.opened[user].session.id
        try:
            call = self.server.call(session_id, method, body, timeout_s=TIMEOUT, wall=WALL, now=self.now)
        except (Unavailable, ResourceExhausted) as error:
            self.outcomes[number] = type(error)
        else:
            self.calls[call] = number

    def ended(self, event: CallEnded) -> None:
        number = self.calls.pop(event.call)
        assert number not in self.outcomes
        if event.error is not None and event.error.code is Code.DEADLINE_EXCEEDED:
            self.outcomes[number] = Code.DEADLINE_EXCEEDED
        else:
            outcome = event.value if event.error is None else event.error.code
            assert outcome == self.said.get(number, outcome)
            if number not in self.said:  # refused by the client, not by a handler
                assert outcome in (Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED)
            self.outcomes[number] = outcome

    def cancel(self, index: int) -> None:
        if self.calls:
            call = [*self.calls][index % len(self.calls)]
            assert self.server.withdraw(call, WALL)
            self.outcomes[self.calls.pop(call)] = WITHDRAWN

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for event in self.server.handle_timeout(WALL, self.now):
            assert isinstance(event, CallEnded)
            self.ended(event)

    # --- the client -------------------------------------------------------------------------------

    def finish(self, index: int, *, fails: bool) -> None:
        """Let a handler return or raise; it may have been withdrawn meanwhile."""
        if not self.running:
            return
        call = self.running.pop(index % len(self.running))
        if call.state is ClientCallState.RUNNING:
            number = call.params["number"]
            self.said[number] = Code.NOT_FOUND if fails else number
        if fails:
            self.client.fail_call(call, Code.NOT_FOUND, "", WALL)
        else:
            self.client.answer_call(call, call.params["number"], WALL)
        self.client.release_call(call)

    def refresh(self, user: str) -> None:
        opened = self.opened[user]
        if any(each.session.user == user for each in self.refreshing.values()) or self.client.in_flight:
            return
        params = {"refresh_token": opened.refresh_token}
        self.client.request("session.refresh", params, token=opened.token, wall=WALL)


OPERATIONS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(USERS), st.sampled_from(["ask", "tell", "other"])),
    st.tuples(st.just("call"), st.sampled_from(USERS), st.just("ask")),
    st.tuples(st.just("call"), st.sampled_from(USERS), st.just("tell")),
    st.tuples(st.just("wait"), st.just(TIMEOUT)),
    st.tuples(st.just("deliver"), st.sampled_from([1, 30, 100, 500, 10_000])),
    st.tuples(st.just("cancel"), st.integers(0, 3)),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 4.0, TIMEOUT])),
    st.tuples(st.just("return"), st.integers(0, 7)),
    st.tuples(st.just("raise"), st.integers(0, 7)),
    st.tuples(st.just("refresh"), st.sampled_from(USERS)),
    st.tuples(st.just("handle"), st.sampled_from(USERS), st.sampled_from([METHODS, frozenset({"ask"})])),
)


@pytest.mark.no_cover  # a search, which coverage makes slow: the other tests of the room cover all lines
@settings(max_examples=300, deadline=None)
@given(most=st.integers(1, 5), schedule=st.lists(OPERATIONS, max_size=80))
def test_random_schedules_answer_each_call_once(most: int, schedule: list[tuple[Any, ...]]) -> None:
    with mock.patch.object(server_calls, "MAX_STREAM", LIMIT):  # numbers come back soon
        run(Ends(most), schedule)


def run(ends: Ends, schedule: list[tuple[Any, ...]]) -> None:
    for operation in schedule:
        match operation:
            case ("call", user, method):
                ends.call(user, method)
            case ("deliver", size):
                ends.deliver(size)
            case ("cancel", index):
                ends.cancel(index)
            case ("wait", seconds):
                ends.wait(seconds)
            case ("return", index):
                ends.finish(index, fails=False)
            case ("raise", index):
                ends.finish(index, fails=True)
            case ("refresh", user):
                ends.refresh(user)
            case ("handle", user, methods):
                if not ends.client.in_flight:
                    ends.register(user, methods)
    ends.deliver(2**20)
    while ends.running:
        ends.finish(0, fails=False)
        ends.deliver(2**20)
    ends.deliver(2**20)
    assert ends.calls == {}, "each call has had its outcome"
    calls = ends.server._calls
    if calls is not None:
        assert (calls._calls, calls._in_flight, calls._waiting) == (0, {}, set())
        assert [registered.calls for registered in calls._registered.values()] == [0] * len(calls._registered)
    assert ends.client.running_calls == 0
