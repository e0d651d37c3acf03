"""Tests of topics at the server's edge: subscribers by OPEN, slow ones, and those that go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.protocol_harness import LIMITS, Harness, Peer, cut, items, kinds, nothing_left
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.app.topics import Topic
from zcproto.connection.events import GoAwayReason
from zcproto.errors import Code
from zcproto.sessions import EndReason
from zcproto.wire.frame import CANCEL, PING, Kind

KEEP = 4


class Topics:
    """Topics of the harness's server."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        app = App()
        self.news = app.topic("news", keep=KEEP, allow=lambda context: context.user != "eve")
        self.jobs = jobs = app.topic("jobs", keep=KEEP, slow="end")

        @app.method("jobs.of")
        async def jobs_of(context: Context, queue: str) -> AsyncIterator[Any]:
            with jobs.subscribe(until=context.stopping) as events:
                yield {"queue": queue, "snapshot": True}
                async for event in events:
                    if event.value["queue"] == queue:
                        yield event

        harness.state.add_methods(app)

    def publish(self, topic: Topic, *values: Any) -> None:
        for value in values:
            self.harness.in_loop(lambda value=value: topic.publish(value))
        self.harness.turn()
        self.harness.turn()


@pytest.fixture
def topics(harness: Harness) -> Topics:
    return Topics(harness)


@pytest.fixture
def client(harness: Harness, topics: Topics) -> Peer:
    harness.allow_streams()
    return harness.connect("ada")


def test_event_is_encoded_once_and_sent_to_every_stream(
    client: Peer, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.send(*(client.open("news", stream=number) for number in (1, 2, 3)))
    client.turn()
    encoded: list[Any] = []
    monkeypatch.setattr("zcproto.app.topics.encode_body", lambda value: encoded.append(value) or b"\x07")
    topics.publish(topics.news, {"id": 7})
    answers = client.answers()
    assert {answer.stream for answer in answers} == {1, 2, 3}
    assert items(answers) == [7] * 3
    assert encoded == [{"id": 7}]


def test_client_without_credit_gets_the_newest_events_later(client: Peer, topics: Topics) -> None:
    client.send(client.open("news", stream=1, credit=(1, 1_000)), client.open("news", stream=2))
    client.turn()
    topics.publish(topics.news, *range(10))
    answers = client.answers()
    assert items([answer for answer in answers if answer.stream == 1]) == [0]
    assert items([answer for answer in answers if answer.stream == 2]) == [*range(10)]
    client.send(client.credit(100))
    # One event has been taken by the stream, which waited with it for credit.
    assert items(client.turn()) == [1, *range(10 - KEEP, 10)]
    assert topics.news.dropped == 10 - KEEP - 2


def test_client_too_slow_for_the_topic_is_cancelled(client: Peer, topics: Topics) -> None:
    client.send(client.open("jobs", stream=1, credit=(1, 1_000)), client.open("jobs", stream=2))
    client.turn()
    topics.publish(topics.jobs, *range(KEEP + 3))
    answers = client.answers()
    assert items([answer for answer in answers if answer.stream == 2]) == [*range(KEEP + 3)]
    client.send(client.credit(100))
    answers = client.turn()
    assert items(answers) == [1]
    assert cut(answers, "slow")
    assert topics.jobs.subscribers == 1


def test_client_that_never_reads_is_cancelled_after_the_stall_timeout(client: Peer, topics: Topics) -> None:
    client.send(client.open("jobs", credit=(1, 1_000)))
    client.turn()
    topics.publish(topics.jobs, *range(10))
    client.harness.advance(LIMITS.stall_timeout_s / 2)
    client.send(client.frame(PING))
    client.harness.advance(LIMITS.stall_timeout_s / 2)
    assert cut(client.turn(), "slow")
    client.turn()
    assert topics.jobs.subscribers == 0


def test_method_filters_events_and_sends_what_was_before(client: Peer, topics: Topics) -> None:
    client.send(client.open("jobs.of", {"queue": "a"}))
    assert items(client.turn()) == [{"queue": "a", "snapshot": True}]
    topics.publish(topics.jobs, {"queue": "b"}, {"queue": "a", "id": 1})
    assert items(client.answers()) == [{"queue": "a", "id": 1}]


def test_caller_that_is_not_allowed_gets_no_subscription(client: Peer, topics: Topics) -> None:
    client.login("eve")
    client.send(client.open("news"))
    assert [answer.code for answer in client.turn()] == [Code.PERMISSION_DENIED]
    assert topics.news.subscribers == 0


@pytest.mark.parametrize("end", ["cancel", "session", "connection"])
def test_subscription_ends_with_its_stream(client: Peer, topics: Topics, end: str) -> None:
    client.login()
    client.send(client.open("news", stream=1), client.open("news", stream=2, credit=(0, 0)))
    client.turn()
    topics.publish(topics.news, 1)
    assert topics.news.subscribers == 2
    if end == "cancel":
        client.send(client.frame(CANCEL, 1), client.frame(CANCEL, 2))
    elif end == "session":
        client.end_session(Code.TOKEN_REVOKED, EndReason.BY_OPERATOR)
    else:
        client.harness.in_loop(client.lose)
    client.harness.turn()
    assert topics.news.subscribers == 0
    topics.publish(topics.news, 2)
    if end == "connection":
        nothing_left(client.harness)


def test_subscribers_end_in_order_when_the_server_stops(client: Peer, topics: Topics) -> None:
    client.send(client.open("news"), client.open("jobs.of", {"queue": "a"}, stream=2))
    client.turn()
    client.harness.in_loop(client.harness.state.stopping.set)
    client.harness.in_loop(lambda: client.protocol.go_away(GoAwayReason.DRAINING))
    answers = client.turn()
    assert sorted(kinds(answers)) == [Kind.RESPONSE, Kind.RESPONSE, Kind.GOAWAY]
    client.harness.turn()
    nothing_left(client.harness)


def test_connection_that_does_not_read_holds_up_no_other_subscriber(client: Peer, topics: Topics) -> None:
    stuck = client.harness.connect("bob")
    for peer in (client, stuck):
        peer.send(peer.open("news", credit=(2**53 - 1, 2**53 - 1)))
        peer.turn()
    stuck.transport.stuck = True
    for number in range(100):
        topics.publish(topics.news, [number, bytes(900)])
    assert [value[0] for value in items(client.answers())] == [*range(100)]
    assert stuck.transport.unsent <= 2 * LIMITS.write_bytes
    stuck.read_all()
    topics.publish(topics.news, [100, b""])
    numbers = [value[0] for value in items(stuck.answers())]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 100
    assert topics.news.dropped == 101 - len(numbers) > 0
