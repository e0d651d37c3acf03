"""Test encoding and decoding of bodies, refusals and their isolation."""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any

import msgpack
import pytest

from tests.wire.helpers import peak_of
from tests.wire.vectors import document
from zcproto.errors import Code
from zcproto.wire import message as wire
from zcproto.wire.message import (
    NO_META,
    ErrorMessage,
    MessageError,
    RequestMeta,
    Resume,
    attach_message,
    code_in,
    decode_accepted,
    decode_body,
    decode_call,
    decode_credit,
    decode_error,
    decode_event,
    decode_map,
    decode_open,
    decode_request,
    encode_body,
    encode_error,
    encode_request,
    has_plain_keys,
    open_message,
    parse_traceparent,
)

LARGE = b"x" * 2000
DECODERS: list[Callable[[bytes], Any]] = [decode_body, decode_request, decode_error, decode_event, decode_map]
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def nested(depth: int) -> bytes:
    return b"\x91" * (depth - 1) + b"\x90"


@pytest.mark.parametrize("params", [{}, {"pending": "a parameter"}])
@pytest.mark.parametrize(
    "meta", [{}, {"deadline_ms": 5}, {"deadline_ms": 5, "pending": "x" * 64}, {"pending": None}]
)
def test_pending_call_has_an_id(params: dict[str, Any], meta: dict[str, Any]) -> None:
    method, decoded, _, pending = decode_call(encode_request("m", params, meta))
    assert (method, decoded, pending) == ("m", params, meta.get("pending"))


@pytest.mark.parametrize("pending", ["", "x" * 65, 7, b"id", ["id"], True])
def test_id_of_a_pending_call_is_checked(pending: object) -> None:
    with pytest.raises(MessageError, match=r"meta\.pending"):
        decode_call(encode_request("m", {}, {"pending": pending}))


@pytest.mark.parametrize("meta", [{}, {"deadline_ms": 5}])
def test_streams_with_credit_alone_share_one_meta(meta: dict[str, Any]) -> None:
    decoded = decode_open(encode_request("m", {}, {"credit": [1, 2], **meta}))
    assert decoded[2:] == (RequestMeta(meta.get("deadline_ms")), (1, 2), None, False)
    assert (decoded[2] is NO_META) is (not meta)


@pytest.mark.parametrize(("items", "expected"), [(True, True), (False, False), (1, False), (None, False)])
def test_stream_announces_items_by_true_alone(items: object, expected: bool) -> None:
    assert decode_open(encode_request("m", {}, {"credit": [1, 2], "items": items}))[5] is expected


def test_stream_without_credit_has_none_yet() -> None:
    assert decode_open(encode_request("m", {}, {"deadline_ms": 5}))[3] == (0, 0)
    assert decode_open(encode_request("m", {}))[3] == (0, 0)
    assert decode_credit(encode_body([1, 2])) == (1, 2)
    assert decode_credit(encode_body([1, 2, 3])) == (1, 2, 3)
    with pytest.raises(MessageError, match="idempotency_key cannot be used with a stream"):
        decode_open(encode_request("m", {}, {"idempotency_key": "k"}))


LONGEST_ID = "Az09_-" + "x" * 58


@pytest.mark.parametrize(
    ("params", "sent", "expected"),
    [
        ({}, {"id": "r", "from": 0}, Resume("r", 0, attaches=False)),
        (
            None,
            {"id": LONGEST_ID, "from": 2**53 - 1, "more": 1},
            Resume(LONGEST_ID, 2**53 - 1, attaches=True),
        ),
        ({}, None, None),
    ],
)
def test_open_with_resume_names_a_run_and_a_position(
    params: dict[str, Any] | None, sent: Any, expected: Resume | None
) -> None:
    assert decode_open(encode_request("m", params, {"resume": sent}))[4] == expected


@pytest.mark.parametrize(
    "resume",
    [
        *([], "r", 0, False, {}, {"id": "r"}, {"from": 0}),
        *(
            {"id": given, "from": 0}
            for given in ("", LONGEST_ID + "x", "a b", "\u00e9", "a\n", b"r", 1, None)
        ),
        *({"id": "r", "from": given} for given in (-1, 2**53, 1.0, True, "0", None)),
    ],
)
def test_malformed_resume_is_refused(resume: Any) -> None:
    with pytest.raises(MessageError, match=r"meta\.resume"):
        decode_open(encode_request("m", {}, {"resume": resume}))


def test_resume_is_refused_in_a_request_and_with_an_idempotency_key() -> None:
    resume = {"resume": {"id": "r", "from": 0}}
    with pytest.raises(MessageError, match="resume needs OPEN"):
        decode_request(encode_request("m", {}, resume))
    with pytest.raises(MessageError, match="idempotency_key"):
        decode_open(encode_request("m", {}, resume | {"idempotency_key": "k"}))


RUN = {"id": "r", "attachment": "a", "state": "running", "first": 2, "from": 2, "next": 2}


def test_accepted_run_is_a_map_with_further_keys() -> None:
    assert decode_accepted(encode_body(RUN | {"more": 1})) == RUN | {"more": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"id": 1},
        {"attachment": None},
        {"state": b""},
        {"first": 3},
        {"next": 1},
        {"from": "2"},
        {"next": 2**53},
    ],
)
def test_malformed_accepted_run_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        decode_accepted(encode_body(RUN | change))


@pytest.mark.parametrize("credit", [1, [1], [1, -1], [1, 2**53], [1, True], ["1", 2], [1, 2, 3, 4]])
def test_malformed_credit_is_refused(credit: Any) -> None:
    with pytest.raises(MessageError, match="credit"):
        decode_open(encode_request("m", {}, {"credit": credit}))
    with pytest.raises(MessageError, match="credit"):
        decode_credit(encode_body(credit))


# --- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 2**64 - 1, 1.5, "", "\u00e9", b"", [], {}, {"a": [1, {"b": b"c"}]}]
)
def test_value_round_trips(value: Any) -> None:
    back = decode_body(encode_body(value))
    assert back == value
    assert type(back) is type(value)


def test_tuples_become_arrays_and_buffers_become_bin() -> None:
    assert decode_body(encode_body((1, (2,)))) == [1, [2]]
    assert decode_body(encode_body([bytearray(b"a"), memoryview(b"b")])) == [b"a", b"b"]


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


UNSENDABLE = {
    "object": ["before", object()],
    "int-too-large": [1, 2**64],
    "int-too-small": [1, -(2**63) - 1],
    "lone-surrogate": ["x", "\ud800"],
    "circular": circular(),
    "function": [len],
    "complex": [1j],
}


@pytest.mark.parametrize("value", UNSENDABLE.values(), ids=UNSENDABLE.keys())
def test_unencodable_value_is_refused_and_next_value_is_intact(value: Any) -> None:
    with pytest.raises(MessageError, match=r"^value.* and cannot be sent$"):
        encode_body(value)
    assert encode_body({"next": [1, "two"]}) == msgpack.packb({"next": [1, "two"]})


@dataclass
class Foreign:
    held: object | Unknown  # noqa: F821


@dataclass
class Holder:
    held: Any


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (object(), "value is of type builtins.object"),
        ({"orders": [{"when": 1}, {"when": object()}]}, "value.orders[1].when is of type builtins.object"),
        ({"a": (1, 2**64)}, "value.a[1] is an int of more than 64 bits"),
        ({"a": "\ud800"}, "value.a is a str with a lone surrogate"),
        ({"a secret": 1j}, "value[...] is of type builtins.complex"),
        ([Holder({"a": [object()]})], "value[0].held.a[0] is of type builtins.object"),
        ({"a": {1: object()}}, "value.a has a key of type int, not str,"),
        ({"a": {1: "x"}}, "value.a has a key of type int, not str,"),
        ({"a": ["x", {None: "x"}]}, "value.a[1] has a key of type NoneType, not str,"),
        ([msgpack.Timestamp(1)], "value has a part that is of no type of msgpack"),
        (circular(), "value" + 65 * "[0]" + " is nested too deep"),
        ([[1], {"a": 1}, Foreign(object())], "value[2] is of type tests.wire.test_message.Foreign"),
        ([Holder(Holder)], "value[0].held is of type builtins.type"),
    ],
)
def test_unencodable_value_is_named_by_path_and_type(value: Any, fault: str) -> None:
    with pytest.raises(MessageError) as caught:
        encode_body(value)
    assert str(caught.value) == f"{fault} and cannot be sent"


@pytest.mark.parametrize(
    ("value", "depth", "is_plain"),
    [
        (None, 9, True),
        ({"a": [1, {"b": b""}], "c": {}}, 9, True),
        ({"a": {1: 2}}, 9, False),
        ([["deep"]], 2, True),
        ([[["deeper"]]], 2, False),
        ([{"a": (1,)}], 9, False),  # a tuple is packed as a list: its packed form is checked
    ],
)
def test_keys_of_a_value_are_checked_without_its_packed_form(value: Any, depth: int, is_plain: bool) -> None:
    assert has_plain_keys(value, depth) is is_plain


def test_refused_value_does_not_appear_in_error() -> None:
    with pytest.raises(MessageError) as caught:
        encode_body(["secret", {"a": Holder(["secret", object()])}, {"my secret": object()}])
    assert "secret" not in str(caught.value)


def test_search_for_unencodable_part_is_bounded() -> None:
    with pytest.raises(MessageError, match="value has a part that is of no type of msgpack"):
        encode_body([[0] * 100_000, object()])


class Level(IntEnum):
    LOW = 1


class Color(Enum):
    RED = "red"


def test_types_without_a_form_in_msgpack_are_converted() -> None:
    noon = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
    assert decode_body(encode_body([Level.LOW, Color.RED, {Color.RED: {7}}, frozenset()])) == [
        *(1, "red", {"red": [7]}, [])
    ]
    assert decode_body(encode_body(Holder([noon, Holder(Decimal("1.5"))]))) == {
        "held": ["2026-01-02T12:00:00Z", {"held": "1.5"}]
    }


def test_error_of_a_serializer_is_an_unsendable_value() -> None:
    class Strange:
        __dataclass_fields__ = ()

    with pytest.raises(MessageError, match="Strange and cannot be sent"):
        encode_body(Strange())


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [b"", LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("tail", "phrase"),
    [
        (b"", "body is not one msgpack value of the allowed types"),
        (b"\xc0\xc0", "bytes after the value"),
        (b"\xc0\xc1", "bytes after the value"),
        (b"\xc1", "body is not one msgpack value of the allowed types"),
        (b"\xa1\xff", "str is not UTF-8"),
        (b"\xd6\xff\0\0\0\0", "body is not one msgpack value of the allowed types"),
        (b"\xc7\x00\xff", "body is not one msgpack value of the allowed types"),
        (b"\x81\x01\x01", "body is not one msgpack value of the allowed types"),
        (b"\x81\xc4\x01a\x01", "map keys must be str"),
        (nested(32), "nested too deep"),
    ],
)
def test_invalid_body_gives_fixed_phrase_at_any_size(padding: bytes, tail: bytes, phrase: str) -> None:
    body = b"\x92" + encode_body(padding) + tail
    with pytest.raises(MessageError) as caught:
        decode_body(body)
    assert str(caught.value) == phrase


@pytest.mark.parametrize("decode", DECODERS)
def test_empty_body_is_refused(decode: Callable[[bytes], Any]) -> None:
    with pytest.raises(MessageError, match=r"^body is empty$"):
        decode(b"")


@pytest.mark.parametrize("decode", DECODERS)
def test_invalid_msgpack_is_refused_by_every_decoder(decode: Callable[[bytes], Any]) -> None:
    for body in (b"\xc1", b"\x92", b"\xdd\xff\xff\xff\xff", LARGE):
        with pytest.raises(MessageError):
            decode(body)


@pytest.mark.parametrize("depth", [1, 2, 5, 32])
def test_nesting_beyond_max_depth_is_refused(depth: int) -> None:
    decode_body(nested(depth), depth)
    decode_body(b"\x81\xa0" * (depth - 1) + b"\x80", depth)
    with pytest.raises(MessageError, match=r"^nested too deep$"):
        decode_body(nested(depth + 1), depth)
    with pytest.raises(MessageError, match=r"^nested too deep$"):
        decode_body(b"\x81\xa0" * depth + b"\x80", depth)


@pytest.mark.parametrize("depth", [3, 5, 32])
def test_depth_of_params_and_meta_includes_outer_array(depth: int) -> None:
    fits, deeper = msgpack.unpackb(nested(depth - 2)), msgpack.unpackb(nested(depth - 1))
    decode_request(encode_request("m", {"x": fits}), depth)
    decode_request(encode_request("m", None, {"x": fits}), depth)
    for params, meta in (
        ({"x": deeper}, None),
        (None, {"x": deeper}),
        ({"a": 1, "x": deeper, "z": []}, None),
    ):
        with pytest.raises(MessageError, match=r"^nested too deep$"):
            decode_request(encode_request("m", params, meta), depth)


def test_depth_of_errors_events_and_maps_is_limited() -> None:
    deep = msgpack.unpackb(nested(31))
    for decode, value in (
        (decode_error, [5, "m", {"x": deep}]),
        (decode_event, ["e", [deep]]),
        (decode_map, {"x": [deep]}),
    ):
        decode(encode_body(value), 33)
        with pytest.raises(MessageError, match=r"^nested too deep$"):
            decode(encode_body(value))


# --- requests ----------------------------------------------------------------------------------------


def test_request_round_trips() -> None:
    meta = {"deadline_ms": 5, "idempotency_key": "k", "traceparent": TRACEPARENT, "more": [1]}
    assert decode_request(encode_request("a.b_c9", {"x": 1})) == ("a.b_c9", {"x": 1}, NO_META)
    assert decode_request(encode_request("m", None)) == ("m", {}, RequestMeta(None, None, None))
    assert decode_request(encode_request("m", {}, meta)) == ("m", {}, RequestMeta(5, "k", TRACEPARENT))


def test_empty_meta_is_omitted() -> None:
    assert encode_request("m", {}, {}) == encode_request("m", {}, None) == msgpack.packb(["m", {}])


def test_cached_method_check_gives_same_result() -> None:
    for _ in range(3):
        assert decode_request(encode_request("judged.once", None))[0] == "judged.once"
        with pytest.raises(MessageError):
            decode_request(encode_request("Judged", None))


def test_methods_beyond_cache_size_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "well_formed_methods", set())
    for number in range(wire._WELL_FORMED_METHODS_KEPT + 50):
        assert decode_request(encode_request(f"m{number}", None))[0] == f"m{number}"
    assert len(wire.well_formed_methods) == wire._WELL_FORMED_METHODS_KEPT
    with pytest.raises(MessageError):
        decode_request(encode_request("m-1", None))


@pytest.mark.parametrize("value", [None, 7, b"00", ["00"], {"a": 1}, True, 1.5])
def test_traceparent_of_wrong_type_is_ignored(value: Any) -> None:
    assert parse_traceparent(value) is None


# --- errors, events, maps --------------------------------------------------------------------------------


def test_error_round_trips() -> None:
    details = {"retry_after_ms": 5}
    assert decode_error(encode_error(Code.UNAVAILABLE, "later", details)) == ErrorMessage(
        14, "later", details
    )
    assert decode_error(encode_error(5, "no")) == ErrorMessage(5, "no", {})
    assert decode_error(encode_error(5, "no", {})) == ErrorMessage(5, "no", {})
    assert encode_error(Code.NOT_FOUND, "no") == msgpack.packb([5, "no"])


@pytest.mark.parametrize("code", Code)
def test_code_in_reads_code_without_decoding(code: Code) -> None:
    assert code_in(encode_error(code, "no")) == code_in(encode_error(code, "no", {"a": 1})) == code


def test_details_may_be_nil() -> None:
    assert decode_error(encode_body([5, "no", None])) == ErrorMessage(5, "no", {})


def test_event_and_map_round_trip() -> None:
    assert decode_event(encode_body(["name", None])) == ("name", None)
    assert decode_map(encode_body({"a": 1})) == {"a": 1}


# --- memory ------------------------------------------------------------------------------------------------


BOMBS = {
    vector["name"]: bytes.fromhex(vector["bytes"])[68:]
    for vector in document("bodies-invalid")["vectors"]
    if "bomb" in vector["flags"]
}
BOMBS["worst-trusted-arrays"] = b"\xdc\x01\x00" * 85
BOMBS["worst-trusted-maps"] = b"\x81\xa0\xdc\x00\xfa" * 51
BOMBS["wide-then-cut"] = b"\xdd\x00\x0f\xff\xf0" + b"\x90" * 300


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS.keys())
def test_declared_lengths_of_body_allocate_no_memory(body: bytes) -> None:
    for decode in DECODERS:
        assert peak_of(decode, body) < 200_000


# --- isolation of failures ---------------------------------------------------------------------------

BROKEN = {
    "cut": b"\x92" + encode_body(LARGE),
    "never-used-byte": b"\x92" + encode_body(LARGE) + b"\xc1",
    "too-deep-for-the-scanner": b"\x91" * 3000,
    "one-byte-more": encode_body([LARGE]) + b"\xc0",
    "a-second-value": encode_body([LARGE]) * 2,
    "array32-bomb": encode_body(LARGE)[:-1] + b"\xdd\xff\xff\xff\xff",
    "str32-bomb": b"\x92" + encode_body(LARGE) + b"\xdb\xff\xff\xff\xff",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_invalid_body_does_not_affect_the_next(broken: bytes) -> None:
    good = encode_body([LARGE, {"a": 1}])
    for _ in range(3):
        with pytest.raises(MessageError):
            decode_body(broken)
        assert decode_body(good) == [LARGE, {"a": 1}]
    with pytest.raises(MessageError, match="bytes after the value"):
        decode_body(good + b"\xc0")


def test_concurrent_decoding_in_threads_does_not_mix_bodies() -> None:
    body = encode_body([LARGE, {"numbers": list(range(200))}])
    value = decode_body(body)
    cut = body[:-1]
    wrong: list[object] = []

    def run() -> None:
        for _ in range(400):
            try:
                if decode_body(body) != value:
                    wrong.append("another value")
            except MessageError as error:
                wrong.append(error)
            with contextlib.suppress(MessageError):
                wrong.append(decode_body(cut))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=run) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


# --- what a device signs ----------------------------------------------------------------------------


def test_signed_messages_contain_purpose_connection_and_certificate() -> None:
    salt, leaf, token = b"s" * 8, b"l" * 32, b"t" * 32
    assert open_message(salt, leaf, "lap\udc00") == b"zcp/1 open\0" + salt + leaf + b"lap\xed\xb0\x80"
    assert attach_message(salt, leaf, token) == b"zcp/1 attach\0" + salt + leaf + token
