"""The decoder: what it keeps, how its limit changes, and that its work is linear."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import HEADER_SIZE, NO_TOKEN, PING, REQUEST, RESPONSE, Side, encode_frame

SALT = b"a salt.."
MIB = 1 << 20


def request(size: int, stream: int = 1) -> bytes:
    """A REQUEST with a body of so many bytes, which is no message."""
    return encode_frame(REQUEST, stream, 5, SALT, stream, NO_TOKEN, b"x" * size)


def take_all(decoder: FrameDecoder) -> list[int]:
    """The streams of all frames that are there."""
    streams = []
    while (frame := decoder.next_frame()) is not None:
        streams.append(frame[2])
    return streams


def refused_as(decoder: FrameDecoder) -> Code:
    with pytest.raises(ProtocolError) as caught:
        decoder.next_frame()
    return caught.value.code


def test_a_frame_comes_out_as_it_was_written() -> None:
    decoder = FrameDecoder(Side.CLIENT, 1000)
    decoder.feed(encode_frame(RESPONSE, 7, 2**64 - 1, SALT, 2**63, bytes(range(32)), b"\xc0"))
    assert decoder.next_frame() == (65, RESPONSE, 7, 2**64 - 1, SALT, 2**63, bytes(range(32)), b"\xc0")
    assert decoder.next_frame() is None


def test_no_bytes_are_no_frame() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    assert decoder.next_frame() is None
    decoder.feed(b"")
    assert decoder.next_frame() is None
    assert decoder.buffered == 0


def test_empty_pieces_in_the_middle_do_not_matter() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(10)
    for piece in (b"", data[:2], b"", data[2:70], b"", data[70:], b""):
        decoder.feed(piece)
        if piece == data[70:]:
            assert take_all(decoder) == [1]
        else:
            assert take_all(decoder) == []
    assert decoder.buffered == 0


def test_asking_again_for_more_changes_nothing() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(10)
    decoder.feed(data[:30])
    assert [decoder.next_frame(), decoder.next_frame(), decoder.buffered] == [None, None, 30]
    decoder.feed(data[30:])
    assert take_all(decoder) == [1]


def test_buffered_counts_the_bytes_of_the_frame_that_is_not_complete() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(10)
    for have in range(1, len(data)):
        decoder.feed(data[have - 1 : have])
        assert decoder.next_frame() is None
        assert decoder.buffered == have
    decoder.feed(data[-1:] + data[:3])
    assert take_all(decoder) == [1]
    assert decoder.buffered == 3


@pytest.mark.parametrize("receiver", Side)
def test_each_receiver_takes_pings(receiver: Side) -> None:
    decoder = FrameDecoder(receiver, 1000)
    decoder.feed(encode_frame(PING, 0, 5, SALT, 1, NO_TOKEN))
    frame = decoder.next_frame()
    assert frame is not None
    assert frame[1] == PING


def test_a_length_of_exactly_the_limit_is_accepted_and_one_more_is_not() -> None:
    decoder = FrameDecoder(Side.SERVER, 100)
    decoder.feed(request(36) + request(37, stream=2))
    frame = decoder.next_frame()
    assert frame is not None
    assert frame[0] == 100
    assert refused_as(decoder) is Code.FRAME_TOO_LARGE


def test_a_refused_length_is_judged_before_its_header_is_complete() -> None:
    for have in range(4, HEADER_SIZE + 1):
        decoder = FrameDecoder(Side.SERVER, 100)
        decoder.feed(request(37)[:have])
        assert refused_as(decoder) is Code.FRAME_TOO_LARGE


def test_a_larger_limit_holds_for_the_next_frame_of_the_same_read() -> None:
    decoder = FrameDecoder(Side.SERVER, 100)
    decoder.feed(request(10) + request(500, stream=2))
    assert decoder.next_frame() is not None
    decoder.limit = 1000
    assert take_all(decoder) == [2]


def test_a_smaller_limit_holds_for_the_next_frame_of_the_same_read() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    decoder.feed(request(10) + request(500, stream=2))
    assert decoder.next_frame() is not None
    decoder.limit = 100
    assert refused_as(decoder) is Code.FRAME_TOO_LARGE


@pytest.mark.parametrize("have", [4, 30, HEADER_SIZE, HEADER_SIZE + 1, HEADER_SIZE + 499])
def test_a_smaller_limit_spares_a_frame_whose_length_was_accepted(have: int) -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:have])
    assert decoder.next_frame() is None
    decoder.limit = 100
    for at in range(have, len(data)):
        decoder.feed(data[at : at + 1])
        assert take_all(decoder) == ([1] if at == len(data) - 1 else [])
    decoder.feed(data)
    assert refused_as(decoder) is Code.FRAME_TOO_LARGE


def test_only_the_frame_that_was_accepted_is_spared() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:200])
    assert decoder.next_frame() is None
    decoder.limit = 100
    decoder.feed(data[200:] + request(500, stream=2))
    assert decoder.next_frame() is not None
    assert refused_as(decoder) is Code.FRAME_TOO_LARGE


def test_a_frame_whose_length_was_not_complete_is_not_spared() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:3])
    assert decoder.next_frame() is None
    decoder.limit = 100
    decoder.feed(data[3:])
    assert refused_as(decoder) is Code.FRAME_TOO_LARGE


def test_a_frame_spared_and_then_allowed_leaves_nothing_behind() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:200])
    assert decoder.next_frame() is None
    decoder.limit = 100
    decoder.feed(data[200:])
    decoder.limit = 1000
    assert take_all(decoder) == [1]
    decoder.limit = 100
    decoder.feed(data)
    assert refused_as(decoder) is Code.FRAME_TOO_LARGE


def test_a_declared_length_reserves_nothing() -> None:
    header = request(MIB - 64)[:HEADER_SIZE]
    tracemalloc.start()
    decoder = FrameDecoder(Side.SERVER, MIB)
    decoder.feed(header)
    assert decoder.next_frame() is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4096


def drip(data: bytes, step: int) -> bytes:
    """The body of a frame that comes in pieces of `step` bytes."""
    decoder = FrameDecoder(Side.SERVER, MIB)
    feed, next_frame = decoder.feed, decoder.next_frame
    last = (len(data) - 1) // step * step
    for at in range(0, last, step):
        feed(data[at : at + step])
        if next_frame() is not None:
            pytest.fail("a frame before its last byte")
    feed(data[last:])
    frame = next_frame()
    assert frame is not None
    return frame[7]


def test_a_frame_of_1_mib_byte_by_byte_costs_linear_time() -> None:
    data = request(MIB - 64)
    began = time.process_time()
    body = drip(data, 1)
    assert time.process_time() - began < 10  # copying what is there at each byte would move half a terabyte
    assert body == data[HEADER_SIZE:]


def test_a_frame_of_1_mib_in_small_pieces_costs_its_own_memory() -> None:
    data = request(MIB - 64)
    tracemalloc.start()
    body = drip(data, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert body == data[HEADER_SIZE:]
    assert peak < 3 * MIB


@pytest.mark.parametrize("step", [100, MIB + 4])
def test_nothing_is_held_of_a_large_frame_that_was_taken(step: int) -> None:
    decoder = FrameDecoder(Side.SERVER, MIB)
    tracemalloc.start()
    data = request(MIB - 64)
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        take_all(decoder)
    del data
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert decoder.buffered == 0
    assert held < 4096


def test_the_rest_of_a_read_can_be_taken_later() -> None:
    decoder = FrameDecoder(Side.SERVER, MIB)
    decoder.feed(request(5, stream=1) + request(5, stream=2) + request(5, stream=3)[:20])
    assert next(decoder.frames())[2] == 1
    assert [frame[2] for frame in decoder.frames()] == [2]
    assert decoder.buffered == 20
    decoder.feed(request(5, stream=3)[20:])
    assert [frame[2] for frame in decoder.frames()] == [3]


def test_the_limit_is_asked_anew_for_each_frame_of_an_iteration() -> None:
    decoder = FrameDecoder(Side.SERVER, 100)
    decoder.feed(request(10) + request(500, stream=2) + request(500, stream=3))
    frames = decoder.frames()
    assert next(frames)[2] == 1
    decoder.limit = 1000
    assert next(frames)[2] == 2
    decoder.limit = 100
    with pytest.raises(ProtocolError):
        next(frames)


def test_many_small_frames_in_one_read_cost_what_they_cost_apart() -> None:
    one = encode_frame(PING, 0, 5, SALT, 1, NO_TOKEN)
    decoder = FrameDecoder(Side.SERVER, MIB)
    data = one * 5000
    tracemalloc.start()
    decoder.feed(data)
    count = 0
    while decoder.next_frame() is not None:
        count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 4096
