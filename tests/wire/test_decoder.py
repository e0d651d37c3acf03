"""Test buffering and limits of the frame decoder."""

from __future__ import annotations

import mmap
import tracemalloc

import pytest

from tests.wire.helpers import MIB, SALT, read_streams, request
from zcproto.errors import Code, ProtocolError
from zcproto.wire import decoder as module
from zcproto.wire.decoder import LARGE, MAX_SPARE, FrameDecoder
from zcproto.wire.frame import HEADER_SIZE, NO_TOKEN, PING, REQUEST, RESPONSE, Side, encode_frame


def refusal_code(decoder: FrameDecoder) -> Code:
    with pytest.raises(ProtocolError) as caught:
        decoder.next_frame()
    return caught.value.code


def test_frame_round_trips() -> None:
    decoder = FrameDecoder(Side.CLIENT, 1000)
    decoder.feed(encode_frame(RESPONSE, 7, 2**64 - 1, SALT, 2**63, bytes(range(32)), b"\xc0"))
    assert decoder.next_frame() == (65, RESPONSE, 7, 2**64 - 1, SALT, 2**63, bytes(range(32)), b"\xc0")
    assert decoder.next_frame() is None


def test_no_input_gives_no_frame() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    assert decoder.next_frame() is None
    decoder.feed(b"")
    assert decoder.next_frame() is None
    assert decoder.buffered == 0


def test_empty_reads_are_ignored() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(10)
    for piece in (b"", data[:2], b"", data[2:70], b"", data[70:], b""):
        decoder.feed(piece)
        if piece == data[70:]:
            assert read_streams(decoder) == [1]
        else:
            assert read_streams(decoder) == []
    assert decoder.buffered == 0


def test_next_frame_on_incomplete_input_is_repeatable() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(10)
    decoder.feed(data[:30])
    assert [decoder.next_frame(), decoder.next_frame(), decoder.buffered] == [None, None, 30]
    decoder.feed(data[30:])
    assert read_streams(decoder) == [1]


def test_buffered_counts_bytes_of_incomplete_frame() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(10)
    for have in range(1, len(data)):
        decoder.feed(data[have - 1 : have])
        assert decoder.next_frame() is None
        assert decoder.buffered == have
    decoder.feed(data[-1:] + data[:3])
    assert read_streams(decoder) == [1]
    assert decoder.buffered == 3


@pytest.mark.parametrize("receiver", Side)
def test_both_sides_accept_ping(receiver: Side) -> None:
    decoder = FrameDecoder(receiver, 1000)
    decoder.feed(encode_frame(PING, 0, 5, SALT, 1, NO_TOKEN))
    frame = decoder.next_frame()
    assert frame[1] == PING


def test_length_at_limit_is_accepted_and_above_is_refused() -> None:
    decoder = FrameDecoder(Side.SERVER, 100)
    decoder.feed(request(36) + request(37, stream=2))
    frame = decoder.next_frame()
    assert frame[0] == 100
    assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


def test_length_above_limit_is_refused_before_header_is_complete() -> None:
    for have in range(4, HEADER_SIZE + 1):
        decoder = FrameDecoder(Side.SERVER, 100)
        decoder.feed(request(37)[:have])
        assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


def test_raised_limit_applies_to_next_frame_of_same_read() -> None:
    decoder = FrameDecoder(Side.SERVER, 100)
    decoder.feed(request(10) + request(500, stream=2))
    assert decoder.next_frame() is not None
    decoder.limit = 1000
    assert read_streams(decoder) == [2]


def test_lowered_limit_applies_to_next_frame_of_same_read() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    decoder.feed(request(10) + request(500, stream=2))
    assert decoder.next_frame() is not None
    decoder.limit = 100
    assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


@pytest.mark.parametrize("have", [4, 30, HEADER_SIZE, HEADER_SIZE + 1, HEADER_SIZE + 499])
def test_lowered_limit_keeps_frame_whose_length_was_accepted(have: int) -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:have])
    assert decoder.next_frame() is None
    decoder.limit = 100
    for at in range(have, len(data)):
        decoder.feed(data[at : at + 1])
        assert read_streams(decoder) == ([1] if at == len(data) - 1 else [])
    decoder.feed(data)
    assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


def test_lowered_limit_refuses_frame_after_the_accepted_one() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:200])
    assert decoder.next_frame() is None
    decoder.limit = 100
    decoder.feed(data[200:] + request(500, stream=2))
    assert decoder.next_frame() is not None
    assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


def test_lowered_limit_refuses_frame_with_truncated_length() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:3])
    assert decoder.next_frame() is None
    decoder.limit = 100
    decoder.feed(data[3:])
    assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


def test_accepted_frame_leaves_no_exemption_after_limit_is_raised() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:200])
    assert decoder.next_frame() is None
    decoder.limit = 100
    decoder.feed(data[200:])
    decoder.limit = 1000
    assert read_streams(decoder) == [1]
    decoder.limit = 100
    decoder.feed(data)
    assert refusal_code(decoder) is Code.FRAME_TOO_LARGE


def test_declared_length_allocates_no_memory() -> None:
    header = request(MIB - 64)[:HEADER_SIZE]
    tracemalloc.start()
    decoder = FrameDecoder(Side.SERVER, MIB)
    decoder.feed(header)
    assert decoder.next_frame() is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4096


@pytest.mark.parametrize(("size", "is_on_heap"), [(131_071, True), (131_072, False)])
def test_incomplete_frame_of_128_kib_is_kept_outside_the_heap(size: int, is_on_heap: bool) -> None:
    frame = request(size - HEADER_SIZE)
    assert len(frame) == size
    decoder = FrameDecoder(Side.SERVER, MIB)
    first, last = frame[:-1], frame[-1:]
    tracemalloc.start()
    decoder.feed(first)
    assert decoder.next_frame() is None
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (kept > 100_000) is is_on_heap
    decoder.feed(last)
    assert decoder.next_frame() is not None


def test_mapping_of_large_frame_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_spare", [])
    made: list[int] = []

    class Counted(mmap.mmap):
        def __new__(cls, fileno: int, length: int, **options: int) -> Counted:
            made.append(length)
            return super().__new__(cls, fileno, length, **options)

    monkeypatch.setattr(mmap, "mmap", Counted)
    sizes = (2 * LARGE, LARGE, 2 * LARGE, 3 * LARGE, MAX_SPARE + 1, LARGE)
    decoder = FrameDecoder(Side.SERVER, 2 * MAX_SPARE)
    for number, size in enumerate(sizes):
        data = encode_frame(REQUEST, 1, 0, SALT, 1, NO_TOKEN, bytes([number]) * (size - HEADER_SIZE))
        decoder.feed(data[:100])
        assert decoder.next_frame() is None
        decoder.feed(data[100:])
        frame = decoder.next_frame()
        assert frame[7] == data[HEADER_SIZE:]
    assert made == [2 * LARGE, 3 * LARGE, MAX_SPARE + 1, LARGE]


def test_two_large_frames_at_once_have_separate_memory() -> None:
    pieces = [(FrameDecoder(Side.SERVER, MIB), request(LARGE, stream)) for stream in (1, 2)]
    for start, end in ((0, 200), (200, LARGE), (LARGE, None)):
        for decoder, data in pieces:
            decoder.feed(data[start:end])
            if end is not None:
                assert decoder.next_frame() is None
    for decoder, data in pieces:
        frame = decoder.next_frame()
        assert frame[7] == data[HEADER_SIZE:]


def test_header_is_validated_once_while_its_body_arrives() -> None:
    decoder = FrameDecoder(Side.SERVER, 1000)
    data = request(500)
    decoder.feed(data[:200])
    assert decoder.next_frame() is None
    decoder.accepted = FrameDecoder(Side.CLIENT, 1000).accepted  # applies to frames that begin later
    decoder.feed(data[200:] + data)
    assert decoder.next_frame() is not None
    assert read_streams(decoder) == [1]


def test_remaining_frames_of_a_read_can_be_read_later() -> None:
    decoder = FrameDecoder(Side.SERVER, MIB)
    decoder.feed(request(5, stream=1) + request(5, stream=2) + request(5, stream=3)[:20])
    assert next(decoder.frames())[2] == 1
    assert [frame[2] for frame in decoder.frames()] == [2]
    assert decoder.buffered == 20
    decoder.feed(request(5, stream=3)[20:])
    assert [frame[2] for frame in decoder.frames()] == [3]


def test_limit_is_read_again_for_each_frame() -> None:
    decoder = FrameDecoder(Side.SERVER, 100)
    decoder.feed(request(10) + request(500, stream=2) + request(500, stream=3))
    frames = decoder.frames()
    assert next(frames)[2] == 1
    decoder.limit = 1000
    assert next(frames)[2] == 2
    decoder.limit = 100
    with pytest.raises(ProtocolError):
        next(frames)


@pytest.mark.parametrize("missing", [(), ("MADV_NOHUGEPAGE",), ("MAP_PRIVATE",)])
def test_large_frames_in_pieces_are_decoded_on_each_system(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    monkeypatch.setattr(module, "_spare", [])
    for name in missing:
        monkeypatch.delattr(mmap, name)
    frames = [
        request(size, stream) for stream, size in enumerate((LARGE - HEADER_SIZE, LARGE, 5, LARGE - 99), 1)
    ]
    data = b"".join(frames)
    for step in (LARGE // 2 - 1, LARGE, LARGE + 7):
        decoder = FrameDecoder(Side.SERVER, MIB)
        streams = []
        for at in range(0, len(data), step):
            decoder.feed(data[at : at + step])
            for _, _, stream, *_, body in decoder.frames():
                assert body == frames[stream - 1][HEADER_SIZE:]
                streams.append(stream)
        assert streams == [1, 2, 3, 4]
        assert (decoder.buffered, decoder.expected) == (0, 0)


def test_incomplete_frame_has_its_expected_size() -> None:
    decoder = FrameDecoder(Side.SERVER, MIB)
    data = request(LARGE)
    at = 0
    for end, expected in ((3, 4), (10, HEADER_SIZE), (100, len(data)), (len(data) - 1, len(data))):
        decoder.feed(data[at:end])
        assert decoder.next_frame() is None
        assert (decoder.buffered, decoder.expected) == (end, expected)
        at = end
