"""Hold what is read in C against the decoder: it is a part of what the general path reads, and all that is common.

check_requests(data, 0, rules, counter, wall)
check_cut(data, limit, head, salt, counter, token, wall, tolerance, max_depth)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from zcproto import accelerator
from zcproto.errors import ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import LENGTH_SIZE, REQUEST, Side
from zcproto.wire.message import MessageError, decode_body, decode_request, unpack
from zcproto.wire.request_fast_path import RequestRules

compiled: Any = accelerator.compiled
needs_compiled = pytest.mark.skipif(
    compiled is None,
    reason=f"only the accelerator reads: {accelerator.missing}; python setup.py build_ext --inplace",
)
MOST_REQUESTS = 16
MOST_BYTES = 4_096


def matching_frames(
    data: bytes, limit: int, head: int, salt: bytes, counter: int, token: bytes, wall: int, tolerance: int
) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield stream, counter, body and end of the frames that bytes begin with, up to the first other one."""
    decoder, end = FrameDecoder(Side.SERVER if head == REQUEST else Side.CLIENT, limit), 0
    decoder.feed(data)
    try:
        for length, its_head, stream, timestamp, its_salt, its_counter, its_token, body in decoder.frames():
            if (
                (its_head, its_salt, its_token) != (head, salt, token)
                or its_counter <= counter
                or abs(wall - timestamp) > tolerance
            ):
                return
            counter, end = its_counter, end + LENGTH_SIZE + length
            yield stream, counter, body, end
    except ProtocolError:
        return


def requests_of(
    data: bytes, at: int, rules: RequestRules, counter: int, wall: int
) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Yield the requests from a position on, each with whether it must be read in C."""
    limit, head, salt, token, tolerance, max_depth, session, _ = rules
    start = at
    frames = matching_frames(data[at:], limit, head, salt, counter, token, wall, tolerance)
    for number, (stream, its_counter, body, end) in enumerate(frames):
        try:
            message = decode_request(body, max_depth)
        except MessageError:
            return
        if message[2].deadline_ms is not None and message[2].deadline_ms <= 0:
            return
        is_common = number < MOST_REQUESTS and at - start < MOST_BYTES
        at = start + end
        event = stream, token, session, *message
        yield (event, its_counter, at % len(data)), is_common


def check_requests(data: bytes, at: int, rules: RequestRules, counter: int, wall: int) -> None:
    """Assert that requests are read as by the general path, and all of them that are common."""
    requests = [*requests_of(data, at, rules, counter, wall)]  # first, so that their methods are known
    found = compiled.read_requests(data, at, rules, counter, wall)
    common = next((n for n, (_, is_common) in enumerate(requests) if not is_common), len(requests))
    assert len(found) == common, f"{data!r} at {at} by {rules}"
    for one, (other, _) in zip(found, requests, strict=False):
        assert with_types(one) == with_types(other)


def check_cut(data: bytes, *rules: Any) -> None:
    """Assert that values are cut as by the general path."""
    expected = []
    for stream, counter, body, end in matching_frames(data, *rules[:-1]):
        try:
            expected.append((stream, counter, decode_body(body, rules[-1]), end))
        except MessageError:
            break
    found = compiled.cut_values(data, *rules, unpack)
    assert with_types(found) == with_types(expected), f"{data!r} by {rules}"


def with_types(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value), [with_types(part) for part in value]
    if isinstance(value, dict):
        return type(value), [with_types(pair) for pair in value.items()]
    return type(value), repr(value) if isinstance(value, float) else value  # NaN differs from itself
