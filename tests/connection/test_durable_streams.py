"""Test durable streams at both ends of a connection (zcp1.md, section 20)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness, ended, pair_in_session
from tests.helpers import NOW, WALL, ConnectionPair
from zcproto.connection.client import ClientConnection
from zcproto.connection.client_streams import ClientStream, ClientStreamState
from zcproto.connection.events import (
    Accepted,
    CreditReceived,
    DurableStream,
    ErrorReceived,
    ItemReceived,
    RequestEnded,
    StreamState,
)
from zcproto.connection.refusals import DENIED, RESUMED_ELSEWHERE, SLOW, SLOW_FRAME, TOO_MUCH_HELD
from zcproto.connection.settings import ConnectionSettings, StreamLimits, read_welcome
from zcproto.errors import Code, ProtocolError, Unimplemented
from zcproto.sessions.token import digest_of
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import ACCEPTED, CANCEL, CREDIT, END, ITEM, NO_TOKEN, OPEN, RESPONSE, Kind, Side
from zcproto.wire.message import Resume, decode_body, encode_body, encode_error, encode_request

SETTINGS = ConnectionSettings(streams=StreamLimits(durable=True, stall_timeout_s=60))
RUN = {"id": "r", "attachment": "a", "from": 5, "state": "running", "first": 0, "next": 5}
FATAL = Code.PROTOCOL_ERROR


# --- the server -----------------------------------------------------------------------------------


def attach(
    pair: ConnectionPair, *, accepted: bool = True, credit: tuple[int, int] = (9, 9_000), **meta: Any
) -> DurableStream:
    meta = {"credit": credit, "resume": {"id": "r", "from": 5}, **meta}
    *_, stream = pair.send(pair.frame(OPEN, 1, encode_request("chat", None, meta)))
    assert isinstance(stream, DurableStream)
    pair.server.hold(stream, pair.clock.now())
    if accepted:
        pair.server.accept(stream, RUN, WALL)
    return stream


@pytest.fixture
def pair() -> ConnectionPair:
    return pair_in_session(SETTINGS)


def credit(pair: ConnectionPair, *numbers: int) -> list[Any]:
    return pair.send(pair.frame(CREDIT, 1, encode_body(numbers)))


def cut(pair: ConnectionPair) -> tuple[Code, dict[str, Any]]:
    """Return code and details of the ERROR that was sent last."""
    answer = pair.answers()[-1]
    code, _, details = decode_body(answer.body)
    assert (answer.kind, answer.stream) == (Kind.ERROR, 1)
    return Code(code), details


def test_run_is_accepted_before_its_items(pair: ConnectionPair) -> None:
    stream = attach(pair)
    assert stream.resume == Resume("r", 5, attaches=True)
    pair.server.send_item(stream, encode_body("x"), WALL)
    accepted, item = pair.answers()
    assert (accepted.kind, accepted.stream, decode_body(accepted.body)) == (Kind.ACCEPTED, 1, RUN)
    assert item.kind is Kind.ITEM
    assert (stream.is_accepted, stream.state, stream.taken) == (True, StreamState.HALF, -1)


def test_answered_stream_is_not_accepted(pair: ConnectionPair) -> None:
    stream = attach(pair, accepted=False)
    pair.send(pair.frame(CANCEL, 1))
    pair.answers()
    pair.server.accept(stream, RUN, WALL)
    assert pair.answers() == []


@pytest.mark.parametrize("streams", [StreamLimits(), StreamLimits(durable=True)])
def test_resume_needs_an_announcement(streams: StreamLimits) -> None:
    pair = pair_in_session(ConnectionSettings(streams=streams))
    assert pair.welcome.value["streams"].get("durable", False) is streams.durable
    body = encode_request("chat", {}, {"resume": {"id": "r", "from": 0}})
    pair.send(pair.frame(OPEN, 1, body))
    assert [answer.code for answer in pair.answers()] == ([] if streams.durable else [Code.INVALID_ARGUMENT])


def test_taken_rises_up_to_the_items_sent(pair: ConnectionPair) -> None:
    stream = attach(pair)
    assert credit(pair, 9, 9_000, 0) == [CreditReceived(stream)]  # below `from`
    pair.server.send_item(stream, encode_body("x"), WALL)
    assert credit(pair, 9, 9_000, 6) == [CreditReceived(stream)]
    assert stream.taken == 6
    assert credit(pair, 9, 9_000, 6) == []
    assert pair.server.wasted == 1
    assert credit(pair, 10, 9_000) == []  # nothing waits for it
    assert (stream.taken, stream.credit.items) == (6, 10)


@pytest.mark.parametrize("numbers", [(9, 9_000, 7), (9, 9_000, 4), (8, 9_000, 6), (9, 9_000, 2**53)])
def test_taken_that_falls_or_exceeds_the_items_sent_is_fatal(
    pair: ConnectionPair, numbers: tuple[int, ...]
) -> None:
    stream = attach(pair)
    pair.server.send_item(stream, encode_body("x"), WALL)
    credit(pair, 9, 9_000, 5)
    assert ended(credit(pair, *numbers)).code is FATAL


def test_third_number_before_accepted_or_on_a_plain_stream_is_fatal() -> None:
    for is_durable in (True, False):
        pair = pair_in_session(SETTINGS)
        if is_durable:
            attach(pair, accepted=False)
        else:
            pair.open(credit=(9, 9_000))
        assert ended(credit(pair, 9, 9_000, 0)).code is FATAL


def test_taken_alone_does_not_end_the_wait_for_credit(pair: ConnectionPair) -> None:
    stream = attach(pair, credit=(1, 9_000))
    pair.server.send_item(stream, encode_body("x"), WALL)
    pair.server.streams(NOW).wait_for_credit(stream, NOW)
    assert credit(pair, 1, 9_000, 5) == [CreditReceived(stream)]
    assert stream.waits_until == NOW + 60
    assert credit(pair, 2, 9_000, 6) == [CreditReceived(stream)]
    assert stream.waits_until > NOW + 60
    pair.server.send_item(stream, encode_body("y"), WALL)
    pair.server.streams(NOW).wait_for_credit(stream, NOW)
    assert credit(pair, 3, 9_000) == [CreditReceived(stream)]


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize(
    ("send", "reason", "is_detached"),
    [
        (lambda pair: pair.frame(END, 1), "detached", True),
        (lambda pair: pair.frame(END, 1, token=NO_TOKEN), "wrong_token", True),
        (lambda pair: pair.frame(CREDIT, 1, encode_body([9, 9_000]), late_ms=30_001), "stale", True),
        (lambda pair: pair.frame(CANCEL, 1), "caller", False),
    ],
    ids=["end", "wrong token", "stale", "cancel"],
)
def test_frame_of_the_client_leaves_or_cancels_the_run(
    pair: ConnectionPair, send: Any, reason: str, is_detached: bool, accepted: bool
) -> None:
    stream = attach(pair, accepted=accepted)
    assert pair.send(send(pair)) == [RequestEnded(stream, Code.CANCELLED, reason)]
    code, details = cut(pair)
    assert (code, details["reason"]) == (Code.CANCELLED, reason)
    assert details.get("detached", False) is is_detached
    assert stream.state is StreamState.LINGER


def test_item_on_a_durable_stream_is_fatal(pair: ConnectionPair) -> None:
    attach(pair)
    assert ended(pair.send(pair.frame(ITEM, 1, encode_body(1)))).code is FATAL


@pytest.mark.parametrize("is_opener", [True, False])
@pytest.mark.parametrize(
    ("body", "ends_run"),
    [(SLOW, False), (TOO_MUCH_HELD, False), (RESUMED_ELSEWHERE, False), (SLOW_FRAME, False), (DENIED, True)],
    ids=["slow", "memory", "resumed elsewhere", "slow frame", "denied"],
)
def test_cut_says_whether_only_the_attachment_ends(
    pair: ConnectionPair, body: bytes, ends_run: bool, is_opener: bool
) -> None:
    stream = attach(pair, accepted=False)
    pair.server.accept(stream, RUN, WALL, is_opener=is_opener)
    reason = pair.server.cut(stream, body, WALL).reason
    assert cut(pair)[1] == {"reason": reason, **({} if ends_run and is_opener else {"detached": True})}


@pytest.mark.parametrize(
    ("code", "is_detached"),
    [(Code.TOKEN_REVOKED, False), (Code.TOKEN_EXPIRED, True), (Code.SESSION_REPLACED, True)],
)
def test_end_of_the_opening_session_ends_the_run_if_it_was_revoked(
    pair: ConnectionPair, code: Code, is_detached: bool
) -> None:
    attach(pair)
    pair.server.cut_streams(pair.opened.session.id, code, WALL)
    assert cut(pair)[1].get("detached", False) is is_detached


def test_deadline_ends_only_the_attachment(pair: ConnectionPair) -> None:
    stream = attach(pair, deadline_ms=1_000)
    pair.clock.now_s += 1
    assert pair.timeout() == [RequestEnded(stream, Code.DEADLINE_EXCEEDED, "deadline")]
    assert cut(pair) == (Code.DEADLINE_EXCEEDED, {"reason": "deadline", "detached": True})


def test_cancel_with_a_replaced_token_leaves_the_run(pair: ConnectionPair) -> None:
    stream = attach(pair)
    pair.server.suspend(pair.opened.session.id, digest_of(b"n" * 32), WALL, NOW)
    assert pair.send(pair.frame(CANCEL, 1)) == [RequestEnded(stream, Code.CANCELLED, "token_rotated")]
    assert cut(pair)[1] == {"reason": "token_rotated", "detached": True}


def test_draining_keeps_its_hint(pair: ConnectionPair) -> None:
    stream = attach(pair)
    body = encode_error(Code.CANCELLED, "gone", {"reason": "draining", "retry_after_ms": 7})
    pair.server.cut(stream, body, WALL)
    assert cut(pair)[1] == {"reason": "draining", "retry_after_ms": 7, "detached": True}


# --- the client -----------------------------------------------------------------------------------

STREAMS = {"streams": {"max_open": 2, "max_item": 1_000, "durable": True}}


class Reader:
    """A client with one durable stream."""

    def __init__(self, *, accepted: bool = True, attaches: bool = True) -> None:
        self.harness = ClientHarness(WELCOME_MAP | STREAMS)
        self.client: ClientConnection = self.harness.client
        self.stream: ClientStream = self.client.open_stream(
            "chat", None, token=TOKEN, window=(2, 10_000), wall=WALL, resume=Resume("r", 5, attaches)
        )
        self.opened = decode_body(self.sent()[0][1])
        if accepted:
            assert self.receive(ACCEPTED, RUN) == [Accepted(1, RUN)]

    def receive(self, head: int, value: Any, *, stale: bool = False) -> list[Any]:
        receive = self.harness.receive_stale if stale else self.harness.receive_frame
        return receive(head, 1, encode_body(value))

    def sent(self) -> list[tuple[int, bytes]]:
        decoder = FrameDecoder(Side.SERVER, 2**32 - 1)
        decoder.accepted = SETTINGS.accepted
        decoder.feed(self.client.data_to_send())
        return [(frame[1], frame[7]) for frame in decoder.frames()]


@pytest.mark.parametrize(("attaches", "params"), [(True, None), (False, {})])
def test_params_of_an_open_distinguish_a_start_from_an_attachment(attaches: bool, params: Any) -> None:
    opened = Reader(attaches=attaches, accepted=False).opened
    assert opened == ["chat", params, {"credit": [2, 10_000], "resume": {"id": "r", "from": 5}}]


@pytest.mark.parametrize("durable", [{}, {"durable": False}])
def test_client_opens_durably_only_if_the_server_announces_it(durable: dict[str, bool]) -> None:
    client = ClientHarness(WELCOME_MAP | {"streams": {"max_open": 2, "max_item": 1_000} | durable}).client
    with pytest.raises(Unimplemented, match="durable"):
        client.open_stream("m", {}, token=TOKEN, window=(1, 1), wall=WALL, resume=Resume("r", 0, False))


def test_announcement_of_another_type_is_refused() -> None:
    with pytest.raises(ProtocolError, match="durable"):
        read_welcome(encode_body(WELCOME_MAP | {"streams": STREAMS["streams"] | {"durable": 1}}), 8)


@pytest.mark.parametrize("change", [{"id": "s"}, {"from": 4}, {"first": 6}, {"attachment": 1}])
def test_accepted_that_does_not_fit_the_open_is_fatal(change: dict[str, Any]) -> None:
    assert ended(Reader(accepted=False).receive(ACCEPTED, RUN | change)).code is FATAL


@pytest.mark.parametrize(("head", "value"), [(ITEM, 1), (CREDIT, [1, 1])])
def test_frame_before_accepted_is_fatal(head: int, value: Any) -> None:
    assert ended(Reader(accepted=False).receive(head, value)).code is FATAL


def test_accepted_twice_or_unasked_is_fatal() -> None:
    assert ended(Reader().receive(ACCEPTED, RUN)).code is FATAL
    harness = ClientHarness(WELCOME_MAP | STREAMS)
    harness.client.open_stream("m", {}, token=TOKEN, window=(1, 1), wall=WALL)
    assert ended(harness.receive_frame(ACCEPTED, 1, encode_body(RUN))).code is FATAL
    harness = ClientHarness(WELCOME_MAP | {"streams": {"max_open": 2, "max_item": 1_000}})
    assert ended(harness.receive_frame(ACCEPTED, 1, encode_body(RUN))).code is FATAL


def test_credit_reports_what_was_taken() -> None:
    reader = Reader()
    for number in range(2):
        assert reader.receive(ITEM, number) == [ItemReceived(1)]
    reader.stream.taken = 5
    assert reader.client.take_item(reader.stream, WALL) == 0
    reader.stream.taken = 6
    reader.client.send_credit(reader.stream, WALL)
    assert [(head, decode_body(body)) for head, body in reader.sent()] == [
        (CREDIT, [3, 10_065, 5]),
        (CREDIT, [3, 10_065, 6]),
    ]


def test_credit_before_accepted_reports_nothing_taken() -> None:
    reader = Reader(accepted=False)
    reader.stream.taken = 5
    assert reader.stream.granted == (2, 10_000)


def test_detach_sends_end_and_awaits_the_answer() -> None:
    reader = Reader()
    reader.client.end_items(reader.stream, WALL)  # END would leave the run
    reader.client.detach(reader.stream, WALL)
    reader.client.detach(reader.stream, WALL)
    reader.client.send_credit(reader.stream, WALL)
    assert reader.sent() == [(END, b"")]
    assert reader.stream.state is ClientStreamState.LEAVING
    assert reader.receive(ITEM, 1) == reader.receive(ACCEPTED, RUN) == []
    reader.receive(RESPONSE, None)
    assert reader.stream.state is ClientStreamState.NONE


@pytest.mark.parametrize(("head", "value"), [(ITEM, 1), (ACCEPTED, RUN)])
def test_stale_frame_leaves_the_stream_and_not_the_run(head: int, value: Any) -> None:
    reader = Reader(accepted=head == ITEM)
    (failed,) = reader.receive(head, value, stale=True)
    assert isinstance(failed, ErrorReceived)
    assert failed.code == Code.DATA_LOSS
    assert reader.stream.was_lost
    assert [head for head, _ in reader.sent()] == [END]
