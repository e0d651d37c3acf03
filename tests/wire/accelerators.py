"""Compare the compiled functions of the request path with the Python functions that are their reference."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, Final

from tests.wire.fast_path import check_cut, check_requests, with_types
from tests.wire.test_message import TRACEPARENT
from tests.wire.test_request_fast_path import LIMIT, REQUEST_RULES, SALT, TOKEN, TOLERANCE, WALL, frame
from zcproto import accelerator
from zcproto.common.parameters import Signature
from zcproto.common.secret import SecretBytes
from zcproto.wire import message
from zcproto.wire.frame import HEADER_SIZE, REQUEST
from zcproto.wire.message import MessageError

compiled: Final[Any] = accelerator.compiled
RULES: Final = (LIMIT, REQUEST, SALT, 5, TOKEN, WALL, TOLERANCE, 2)


class Odd(bytes):
    """Bytes that behave unlike bytes."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = bytes.__hash__

    def __radd__(self, other: bytes) -> bytes:
        return b"odd"

    def __getitem__(self, key: Any) -> Any:
        return b"odd"


class OddInt(int):
    """An int that is smaller than every other, and has another index."""

    def __lt__(self, other: int) -> bool:
        return True

    def __index__(self) -> int:
        return 3


class Index:
    def __index__(self) -> int:
        return 3


TYPES: Final = bytes(range(0xC0, 0xE0))
"""First bytes of values of msgpack, and of those that are refused."""

EDGES: Final = (0, 1, 63, 64, 255, 256, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
ODD_NUMBERS: Final = (
    -1,
    2**64,
    2**200,
    -(2**63) - 1,
    0.0,
    5.5,
    float("nan"),
    True,
    None,
    "1",
    OddInt(5),
    Index(),
)
ODD_BYTES: Final = (
    *(b"", bytes(7), bytes(9), bytes(31), bytes(33), bytearray(SALT), memoryview(TOKEN), bytearray(TOKEN)),
    *(SecretBytes(SALT), SecretBytes(TOKEN), SecretBytes(bytes(32)), SecretBytes(frame())),
    *(Odd(SALT), Odd(TOKEN), Odd(frame()), None, "text", 5, [1]),
)


def _method(user: str, count: int, context: Odd, data: bytes = b"", **others: Any) -> None: ...


_SIGNATURE: Final = Signature(_method, injected=Odd)
CLASSES: Final = _SIGNATURE._classes
REQUIRED: Final = _SIGNATURE._required
NAMED: Final = _SIGNATURE._named or frozenset()


class OddStr(str):
    """A str with the length of a token."""

    __slots__ = ()

    def __len__(self) -> int:
        return 43


class OddDict(dict[Any, Any]):
    """A dict without keys."""

    def keys(self) -> Any:
        return set()


ODD_PARAMS: Final = (
    *({5: 1}, {OddStr("user"): "ada", "count": 1}, {b"user": "ada"}, OddDict(user="ada", count=1)),
    *({"user": OddStr("ada"), "count": 1}, {"user": "ada", "count": True}, {"user": None}, None, [], "user"),
)
ODD_NAMES: Final = ({"user"}, ["user"], {"user": 1}.keys(), frozenset({5, "user"}), "user", 5, None)


ODD_CALLS: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("read_requests", (frame(), 0, REQUEST_RULES, 5, WALL)),
    ("cut_values", (frame(), *RULES, message.unpack)),
)
"""Calls of the functions that are not checked against a Python function; any argument of them may be odd."""


def outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return the result with the types of its parts, or the type and the text of the exception."""
    try:
        return with_types(function(*args))
    except (
        struct.error,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        MessageError,
    ) as error:
        return type(error), str(error)


def check_call(name: str, *args: Any) -> None:
    """Assert that a call gives the same with either function."""
    found = outcome(getattr(compiled, name), args)
    expected = outcome(accelerator.references[name], args)
    assert found == expected, f"{name}{args}: {found}, not {expected}"


def check_scan(body: Any, max_depth: Any) -> None:
    """Assert that the compiled scan refuses what its reference refuses, and vouches only for valid bodies."""
    found = outcome(compiled.scan_body, (body, max_depth))
    if found == (bool, True):
        assert outcome(accelerator.references["scan_body"], (body, max_depth)) == (bool, False)
        found = outcome(decode_by_python, (body, max_depth))
        assert found[0] is not MessageError or found[1] == "str is not UTF-8", (body, max_depth, found)
    else:
        check_call("scan_body", body, max_depth)


def decode_by_python(body: bytes, max_depth: int) -> Any:
    """Return what decode_body returns without the compiled module."""
    saved = message.scan_body, message._SCANNED_ABOVE
    message.scan_body = accelerator.references["scan_body"]
    message._SCANNED_ABOVE = message._TRUSTED_SIZE
    try:
        return message.decode_body(body, max_depth), outcome(message.decode_request, (body, max_depth))
    finally:
        message.scan_body, message._SCANNED_ABOVE = saved


def check_decoders(body: bytes, max_depth: int) -> None:
    """Assert that bodies are decoded and refused alike with and without the compiled scan."""

    def decode(body: bytes, max_depth: int) -> Any:
        return message.decode_body(body, max_depth), outcome(message.decode_request, (body, max_depth))

    assert repr(outcome(decode, (body, max_depth))) == repr(outcome(decode_by_python, (body, max_depth)))


def check_random(source: random.Random) -> None:
    """Make one random call of each function."""

    def number(usual: int) -> Any:
        return source.choice((usual, usual, usual, source.choice(EDGES), source.choice(ODD_NUMBERS)))

    def some_bytes(usual: bytes) -> Any:
        return source.choice((usual, usual, usual, source.randbytes(len(usual)), source.choice(ODD_BYTES)))

    check_call(
        "encode_frame",
        *(number(REQUEST), number(7), number(WALL), some_bytes(SALT), number(6), some_bytes(TOKEN)),
        some_bytes(source.randbytes(source.randrange(80))),
    )
    check_call(
        "encode_frames",
        [
            (number(REQUEST), 7, WALL, some_bytes(TOKEN), source.randbytes(source.randrange(80)))
            for _ in range(source.randrange(4))
        ],
        *(some_bytes(SALT), number(6)),
    )
    data = b"".join(
        frame(
            counter=source.randrange(4, 12), size=source.randrange(12), timestamp=WALL + source.randrange(9)
        )
        for _ in range(source.randrange(5))
    )
    changed = bytearray(data)
    for _ in range(source.randrange(3) if changed else 0):
        changed[source.randrange(len(changed))] = source.randrange(256)
    data = bytes(changed)[: source.choice((None, source.randrange(2 * HEADER_SIZE + 1)))]
    check_cut(data, *RULES)
    params = {
        name: source.choice(("ada", 1, b"x", True, None))
        for name in source.sample([*NAMED, "other", "key"], source.randrange(5))
    }
    named, required = source.choice((None, NAMED, *ODD_NAMES)), source.choice((REQUIRED, *ODD_NAMES))
    check_call("fits", source.choice((params, params, *ODD_PARAMS)), CLASSES, named, required)
    body = random_body(source)
    data = data[: source.randrange(100)] + frame(counter=source.randrange(4, 12), body=body) + data
    for rules in (REQUEST_RULES, (10_000, *REQUEST_RULES[1:])):
        for at in (0, max(0, data.find(body) - HEADER_SIZE)):
            check_requests(data, at, rules, source.randrange(10), WALL)
    for name, args in ODD_CALLS:
        at = source.randrange(len(args))
        getattr(compiled, name)(*args[:at], source.choice((*ODD_NUMBERS, *ODD_BYTES)), *args[at + 1 :])
    for max_depth in (0, 2, 32, 64):
        check_cut(frame(body=body) + data, 10_000, *RULES[1:-1], max_depth)
    check_scan(body, source.choice((0, 1, 2, 3, 32, 64, 65, 1000)))
    check_decoders(body, source.choice((1, 2, 3, 32)))


def random_body(source: random.Random) -> bytes:
    """Return a body that is often nearly valid: a request with random parts, and a changed byte in some."""

    def value(depth: int) -> Any:
        kind = source.randrange(12 if depth else 8)
        if kind < 8:
            return source.choice(
                (
                    None,
                    True,
                    -1,
                    2**63,
                    1.5,
                    "é" * source.randrange(40),
                    source.randbytes(source.randrange(300)),
                    7,
                )
            )
        size = source.choice((0, 1, 2, 3, 20))
        if kind < 10:
            return [value(depth - 1) for _ in range(size)]
        return {source.choice(("a", f"k{i}", "é" * 33)): value(depth - 1) for i in range(size)}

    field = source.choice(("deadline_ms", "idempotency_key", "traceparent", "more"))
    meta = {field: source.choice((value(1), TRACEPARENT)), source.choice((field, "deadline_ms")): value(0)}
    body = bytearray(
        message.encode_body(source.choice((value(4), ["echo", value(4)], ["m", {"x": value(3)}, meta])))
    )
    if source.randrange(3) == 0:
        return bytes(body)
    for _ in range(source.randrange(3)):
        at = source.randrange(len(body) + 1)
        body[at : at + source.randrange(2)] = source.choice(
            (b"", source.randbytes(2), TYPES[source.randrange(32) :][:1])
        )
    return bytes(body)
