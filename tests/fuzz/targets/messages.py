"""Fuzz message decoders: any body is a message, or a MessageError with a fixed phrase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.target import Target
from zcproto.connection.settings import read_welcome
from zcproto.errors import ProtocolError
from zcproto.wire.message import (
    METHOD_ALPHABET,
    METHOD_MAX_LENGTH,
    MessageError,
    decode_body,
    decode_error,
    decode_event,
    decode_map,
    decode_request,
    encode_body,
)

DECODERS: tuple[Callable[[bytes, int], Any], ...] = (
    *(decode_body, decode_request, decode_error, decode_event, decode_map),
    read_welcome.__wrapped__,
)
DEPTHS = (32, 3)
MAX_PHRASE = 120


def values_of(body: bytes, depth: int) -> list[Any]:
    """Return the value or the error of each decoder."""
    found: list[Any] = []
    for decoder in DECODERS:
        try:
            found.append(decoder(body, depth))
        except (MessageError, ProtocolError) as error:
            found.append(error)
    assert not any(isinstance(value, ProtocolError) for value in found[:-1])
    assert not isinstance(found[-1], MessageError)
    return found


def depth_of(value: Any) -> int:
    """Return the nesting depth of a value; a flat array has depth 1."""
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def size_of(value: Any) -> int:
    """Return the number of elements of a value; each is at least a byte on the wire."""
    if isinstance(value, dict):
        return 1 + sum(1 + size_of(each) for each in value.values())
    return 1 + sum(map(size_of, value)) if isinstance(value, list) else 1


def run(data: bytes) -> None:
    for decoder in DECODERS[:2]:
        try:
            decoder(data[1:], 32)
        except MessageError:
            continue


def check(data: bytes) -> None:
    depth, body = DEPTHS[data[0] & 1 if data else 0], data[1:]
    found = values_of(body, depth)
    for value in found:
        if isinstance(value, MessageError | ProtocolError):
            phrase = str(value) if isinstance(value, MessageError) else value.reason
            assert phrase.isascii()
            assert phrase.isprintable()
            assert 0 < len(phrase) <= MAX_PHRASE
    plain, request, error, event, mapping, welcome = found
    if isinstance(plain, MessageError):
        assert all(isinstance(each, MessageError | ProtocolError) for each in found)
        return
    assert depth_of(plain) <= depth
    assert size_of(plain) <= len(body)
    again = encode_body(plain)
    assert encode_body(decode_body(again, depth)) == again
    if not isinstance(request, MessageError):
        method, params, meta = request
        assert 1 <= len(method) <= METHOD_MAX_LENGTH
        assert METHOD_ALPHABET.issuperset(method)
        assert equal_on_wire([method, params], [plain[0], plain[1] or {}])
        key = meta.idempotency_key
        assert key is None or 1 <= len(key) <= 64
    if not isinstance(error, MessageError):
        assert equal_on_wire([error.code, error.message], plain[:2])
    if not isinstance(event, MessageError):
        assert equal_on_wire(list(event), plain)
    if not isinstance(mapping, MessageError):
        assert equal_on_wire(mapping, plain)
    if not isinstance(welcome, ProtocolError):
        assert equal_on_wire(welcome, plain)


def equal_on_wire(one: Any, other: Any) -> bool:
    """Return whether both encode to the same bytes; unlike ==, NaN equals itself."""
    return encode_body(one) == encode_body(other)


TARGET = Target("messages", run, check)
