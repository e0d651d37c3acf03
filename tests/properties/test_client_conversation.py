"""Test properties of a client for any bytes from a server."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.connection.helpers import WELCOME_MAP, ClientHarness
from tests.helpers import WALL
from zcproto.connection.events import ConnectionEnded
from zcproto.connection.state import State
from zcproto.wire.frame import CANCEL, ERROR, EVENT, GOAWAY, PING, PONG, REQUEST, RESPONSE, WELCOME
from zcproto.wire.message import encode_body, encode_error


@given(st.binary(max_size=400))
def test_any_bytes_after_welcome_give_events_or_one_end(data: bytes) -> None:
    harness = ClientHarness(WELCOME_MAP)
    events = harness.receive_data(data)
    ends = [event for event in events if isinstance(event, ConnectionEnded)]
    assert len(ends) == (harness.client.state is State.CLOSED)
    assert events[-1:] == ends or not ends


HEADS = [WELCOME, RESPONSE, ERROR, PING, PONG, GOAWAY, EVENT, REQUEST, CANCEL, 0, 0xFFFFFFFF]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(HEADS),
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from([WALL, 0, 2**64 - 1]),
            st.one_of(st.binary(max_size=8), st.sampled_from([encode_body(["a", 1]), encode_error(67, "x")])),
        ),
        max_size=12,
    )
)
def test_any_frames_in_any_order_give_events_or_one_end(
    frames: list[tuple[int, int, int, int, bytes]],
) -> None:
    harness = ClientHarness(WELCOME_MAP)
    harness.request()
    harness.request()
    counter = 0
    for head, stream, step, timestamp, body in frames:
        counter += step
        closed = harness.client.state is State.CLOSED
        events = harness.receive_frame(head, stream, body, counter=counter, timestamp=timestamp)
        assert not (closed and events)
        assert (
            isinstance(events[-1], ConnectionEnded)
            if harness.client.state is State.CLOSED and events
            else True
        )
