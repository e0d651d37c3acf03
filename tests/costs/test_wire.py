"""Test the cost of bytes from a peer: proportional work, and memory that is returned."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from tests.wire.helpers import MIB, SALT, peak_of, read_streams, request
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import HEADER_SIZE, NO_TOKEN, PING, Side, encode_frame
from zcproto.wire.message import decode_body

pytestmark = pytest.mark.no_cover  # coverage would distort the measurement


def decode_in_pieces(data: bytes, step: int) -> bytes:
    """Return the body of a frame received in pieces of `step` bytes."""
    decoder = FrameDecoder(Side.SERVER, MIB)
    feed, next_frame = decoder.feed, decoder.next_frame
    last = (len(data) - 1) // step * step
    for at in range(0, last, step):
        feed(data[at : at + step])
        if next_frame() is not None:
            pytest.fail("a frame before its last byte")
    feed(data[last:])
    frame = next_frame()
    return frame[7]


def test_large_frame_byte_by_byte_costs_linear_time() -> None:
    def seconds(size: int) -> float:
        data = request(size)
        began = time.thread_time()
        body = decode_in_pieces(data, 1)
        took = time.thread_time() - began
        assert body == data[HEADER_SIZE:]
        return took

    small, large = (min(seconds(size) for _ in range(3)) for size in (MIB // 16, MIB // 2))
    # Quadratic copying would take at least 40 times as long.
    assert large < 24 * small


def test_1_mib_frame_in_small_pieces_uses_its_own_size() -> None:
    data = request(MIB - 64)
    tracemalloc.start()
    body = decode_in_pieces(data, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert body == data[HEADER_SIZE:]
    assert peak < 3 * MIB


@pytest.mark.parametrize("step", [100, MIB + 4])
def test_decoder_holds_nothing_of_a_decoded_large_frame(step: int) -> None:
    decoder = FrameDecoder(Side.SERVER, MIB)
    tracemalloc.start()
    data = request(MIB - 64)
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        read_streams(decoder)
    del data
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert decoder.buffered == 0
    assert held < 4096


def test_many_small_frames_in_one_read_use_no_extra_memory() -> None:
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


def test_decoded_value_is_proportional_to_body() -> None:
    count = 5_000
    for element in (b"\x90", b"\x80", b"\xc0", b"\xa0"):
        body = b"\xdd" + count.to_bytes(4, "big") + element * count
        assert peak_of(decode_body, body) < 100 * len(body)
