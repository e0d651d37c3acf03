"""Test that the compiled functions do what their Python references do, and how one of them is chosen."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.accelerators import (
    CLASSES,
    EDGES,
    NAMED,
    ODD_BYTES,
    ODD_NAMES,
    ODD_NUMBERS,
    ODD_PARAMS,
    REQUIRED,
    RULES,
    check_call,
    check_decoders,
    check_random,
    check_scan,
    compiled,
)
from tests.wire.fast_path import check_cut, check_requests, needs_compiled
from tests.wire.test_message import TRACEPARENT
from tests.wire.test_request_fast_path import OTHERS, REQUEST_RULES, SALT, TOKEN, WALL, frame
from zcproto import App, accelerator
from zcproto.common import clock
from zcproto.testing import connect_in_memory
from zcproto.wire import message
from zcproto.wire.frame import REQUEST
from zcproto.wire.message import encode_body
from zcproto.wire.request_fast_path import DECODING

many = settings(max_examples=200, deadline=None, database=None)

MSGPACK = {
    "every kind of number": [
        0,
        127,
        128,
        255,
        256,
        2**16,
        2**32,
        2**64 - 1,
        -1,
        -32,
        -33,
        -(2**15),
        -(2**63),
        1.5,
    ],
    "sizes of str": ["x" * size for size in (0, 31, 32, 255, 256, 65_535, 65_536)],
    "sizes of bin": [bytes(size) for size in (0, 255, 256, 65_535, 65_536)],
    "sizes of arrays": [[0] * size for size in (0, 15, 16, 65_535, 65_536)],
    "sizes of maps": [{str(key): None for key in range(size)} for size in (0, 15, 16, 65_536)],
    "simple": [None, True, False],
}
BROKEN = {
    "nothing": b"",
    "the byte that is never used": b"\xc1",
    "two values": b"\xc0\xc0",
    "an ext type": b"\xd4\x05\x00",
    "an ext 8": b"\xc7\x01\x05\x00",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "an int as key": b"\x81\x01\xc0",
    "bin as key": b"\x81\xc4\x01a\xc0",
    "an array as key": b"\x81\x90\xc0",
    "a str with invalid UTF-8": b"\xa1\xff",
    "a nested int as key": b"\x92\xa1m\x81\xa1a\x92\xc0\x81\x05\xc0",
    "2**32 - 1 values that are missing": b"\xdd\xff\xff\xff\xff",
    "2**32 - 1 pairs that are missing": b"\xdf\xff\xff\xff\xff\xa1a",
    "a str that is missing": b"\xdb\xff\xff\xff\xffx",
}


@needs_compiled
@pytest.mark.parametrize("kind", MSGPACK)
def test_valid_bodies_are_scanned_alike_whole_and_cut_off(kind: str) -> None:
    for value in MSGPACK[kind]:
        body = encode_body(value)
        check_scan(body, 32)
        assert compiled.scan_body(body, 32) is True
        check_scan(body[:-1], 32)
        check_decoders(encode_body(["m", {"x": value}]), 32)
        for end in range(min(len(body), 8)):
            check_scan(body[:end], 32)
            check_decoders(body[:end], 32)
        if (
            len(body) < 60_000
        ):  # the reference takes long, and what is cut off or added differs by its length alone
            for other in (body[: len(body) // 2], body[:-1], body + b"\xc0"):
                check_scan(other, 32)
                check_decoders(other, 32)


@needs_compiled
@pytest.mark.parametrize("what", BROKEN)
def test_broken_bodies_are_refused_alike(what: str) -> None:
    for body in (BROKEN[what], b"\x92\xa1m" + BROKEN[what], b"\x92\xa1m\x81\xa1a" + BROKEN[what]):
        for padded in (body, b"\xdc\x01\x2d" + b"\xc0" * 300 + body):  # above the size that is trusted
            check_scan(padded, 32)
            check_decoders(padded, 32)
            if not what.endswith("UTF-8"):
                found = "refused" if _refuses(padded) else compiled.scan_body(padded, 32)
                assert found in ("refused", False)


def _refuses(body: bytes) -> bool:
    try:
        compiled.scan_body(body, 32)
    except message.MessageError:
        return True
    return False


@needs_compiled
@pytest.mark.parametrize("depth", [0, 1, 2, 63, 64, 65, 66, 200, 2_000])
@pytest.mark.parametrize("container", [b"\x91", b"\x81\xa1a", b"\xdc\x00\x01", b"\xdf\x00\x00\x00\x01\xa1a"])
def test_depth_is_limited_alike(container: bytes, depth: int) -> None:
    body = container * depth + b"\xc0"
    for max_depth in {1, 32, 64, 65, depth - 1, depth, depth + 1} - {-1}:
        check_scan(body, max_depth)
        check_decoders(body, max_depth)
    for max_depth in ODD_NUMBERS:
        check_scan(body, max_depth)


@needs_compiled
@many
@given(
    st.recursive(
        st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.integers(0, 9),
)
def test_any_value_is_decoded_alike(value: Any, max_depth: int) -> None:
    body = encode_body(value)
    check_scan(body, max_depth)
    check_decoders(body, max_depth)
    check_decoders(encode_body(["m", {"value": value}]), max_depth)
    check_cut(frame(body=body), 2**32, *RULES[1:-1], max_depth)


@needs_compiled
@many
@given(st.binary(max_size=600), st.integers(0, 9))
def test_any_bytes_are_scanned_alike(body: bytes, max_depth: int) -> None:
    check_scan(body, max_depth)
    check_decoders(body, max_depth)


@needs_compiled
def test_frames_are_judged_as_by_the_decoder_at_the_edges() -> None:
    for data in (*OTHERS.values(), frame(), frame() + frame(counter=9), frame(counter=2**64 - 1)):
        check_cut(data, *RULES)
        check_requests(data, 0, REQUEST_RULES, 5, WALL)
        for number in (0, 3, 5, 6):
            for value in EDGES:
                check_cut(data, *RULES[:number], value, *RULES[number + 1 :])
    for timestamp in EDGES:
        for wall in EDGES:
            for tolerance in (0, 1, 2**63, 2**64 - 1):
                check_cut(frame(timestamp=timestamp), *RULES[:5], wall, tolerance, 2)


@needs_compiled
@pytest.mark.parametrize("name", ["cut_values", "read_requests"])
def test_odd_arguments_are_read_as_nothing_or_as_what_they_equal(name: str) -> None:
    function, args = getattr(compiled, name), CALLS[name]
    expected = function(*args)
    assert expected
    for number in range(len(args)):
        for value in (*ODD_NUMBERS, *ODD_BYTES):
            assert function(*args[:number], value, *args[number + 1 :]) in ([], expected)
    for count in range(len(args)):
        assert function(*args[:count]) == []


@needs_compiled
def test_nothing_is_read_by_odd_rules() -> None:
    data, _, rules, counter, wall = CALLS["read_requests"]
    expected = compiled.read_requests(data, 0, rules, counter, wall)
    for odd in ([*rules], rules[:-1], *((*rules[:-1], last) for last in (None, [*DECODING], DECODING[1:]))):
        assert compiled.read_requests(data, 0, odd, counter, wall) == []
    for number in range(6):
        for value in (*ODD_NUMBERS, *ODD_BYTES):
            odd = (*rules[:number], value, *rules[number + 1 :])
            assert compiled.read_requests(data, 0, odd, counter, wall) in ([], expected)


@needs_compiled
def test_requests_are_read_as_by_the_decoder() -> None:
    for body in MSGPACK.values():
        for value in (["m", {"x": body}], ["m", body], body, ["m", {}, {"deadline_ms": 5, "x": body}]):
            check_requests(frame(body=encode_body(value)), 0, (2**20, *REQUEST_RULES[1:]), 5, WALL)


METADATA: list[Any] = [
    {},
    {"more": [1]},
    *({"deadline_ms": deadline} for deadline in (1, 2**64 - 1)),
    {"idempotency_key": "k"},
    *({"traceparent": value} for value in (TRACEPARENT, TRACEPARENT.upper(), 5)),
    {"deadline_ms": 5, "idempotency_key": "k", "traceparent": TRACEPARENT, "more": [1]},
]
UNUSABLE_METADATA: list[Any] = [
    *(None, 5, "x", [], {"x": {"x": {}}}),
    *({"deadline_ms": deadline} for deadline in (0, -1, 1.5, True, "5")),
    *({"deadline_ms": deadline, "traceparent": TRACEPARENT} for deadline in (0, -1, 1.5, True, "5")),
    *({"idempotency_key": key} for key in ("", "k" * 65, 5)),
]


@needs_compiled
@pytest.mark.parametrize("meta", [*METADATA, *UNUSABLE_METADATA, {"deadline_ms": None}], ids=str)
def test_metadata_is_read_as_by_the_decoder(meta: Any) -> None:
    check_requests(frame(body=encode_body(["m", {}, meta])), 0, (2**20, *REQUEST_RULES[1:]), 5, WALL)


@needs_compiled
@pytest.mark.parametrize("kind", [*MSGPACK, *BROKEN])
def test_values_are_cut_alike(kind: str) -> None:
    bodies = [encode_body(value) for value in MSGPACK[kind]] if kind in MSGPACK else [BROKEN[kind]]
    for body in bodies:
        is_large = len(body) > 60_000  # its size and its depth need not be combined
        for around in (b"", b"\x91", b"\x81\xa1a", b"\x92\xc2")[: 1 if is_large else None]:
            data = frame(body=b"\xc3") + frame(counter=7, body=around + body) + frame(counter=8, body=b"\xc0")
            for max_depth in (2,) if is_large else (0, 1, 2, 64):
                check_cut(data, 2**32, *RULES[1:-1], max_depth)


@needs_compiled
def test_frames_are_encoded_alike_for_odd_arguments() -> None:
    usual = (REQUEST, 7, WALL, SALT, 6, TOKEN, b"body")
    for number in range(len(usual)):
        for value in (*EDGES, *ODD_NUMBERS, *ODD_BYTES):
            check_call("encode_frame", *usual[:number], value, *usual[number + 1 :])


@needs_compiled
def test_frames_of_a_write_are_encoded_alike_for_odd_arguments() -> None:
    usual = (REQUEST, 7, WALL, TOKEN, b"body")
    for number in range(len(usual)):
        for value in (*EDGES, *ODD_NUMBERS, *ODD_BYTES):
            odd = (*usual[:number], value, *usual[number + 1 :])
            check_call("encode_frames", [usual, odd], SALT, 6)
    for value in (*EDGES, *ODD_NUMBERS, *ODD_BYTES):
        check_call("encode_frames", [usual, usual], value, 6)
        check_call("encode_frames", [usual, usual], SALT, value)
    for frames in ([], (usual,), [usual[:4]], [[*usual]], [usual, None], None):
        check_call("encode_frames", frames, SALT, 6)


@needs_compiled
def test_params_fit_alike() -> None:
    fitting = {"user": "ada", "count": 1, "data": b"x"}
    cases = [fitting, {**fitting, "other": 1}, {**fitting, "context": 1}, {"user": "ada"}, {}, *ODD_PARAMS]
    for params in cases:
        for named in (None, NAMED, frozenset(), *ODD_NAMES):
            for required in (REQUIRED, frozenset(), *ODD_NAMES):
                check_call("fits", params, CLASSES, named, required)
    for classes in ({}, {"user": int}, {"user": "ada"}, {5: str}, None, []):
        check_call("fits", fitting, classes, None, REQUIRED)


@needs_compiled
@pytest.mark.parametrize("name", sorted(accelerator.references))
def test_wrong_number_of_arguments_is_refused_alike(name: str) -> None:
    for count in range(12):
        if (name, count) != ("wall_ms", 0):  # right, and later for the second
            check_call(name, *[5] * count)
    with pytest.raises(TypeError):
        getattr(compiled, name)(keyword=1)


@needs_compiled
@pytest.mark.parametrize("seed", range(4))
def test_random_calls_give_the_same(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(300):
        check_random(source)


CALLS: dict[str, tuple[Any, ...]] = {
    "read_requests": (
        *(frame(counter=2**40, body=encode_body(["m", {}, {"deadline_ms": 9}])), 0),
        *((99, *REQUEST_RULES[1:]), 5, WALL),
    ),
    "cut_values": (
        *(frame(counter=2**40, body=encode_body({"a": [1.5, "é", b"x", None]})), 99),
        *(*RULES[1:], message.unpack),
    ),
    "encode_frame": (REQUEST, 7, WALL, SALT, 6, TOKEN, b"body"),
    "encode_frames": ([(REQUEST, 7, WALL, TOKEN, b"body"), (REQUEST, 8, WALL, TOKEN, b"")], SALT, 6),
    "scan_body": (encode_body({"a": [1, 2]}), 32),
    "fits": ({"user": "ada", "count": 1000}, CLASSES, NAMED, REQUIRED),
    "wall_ms": (),
}
TRACED: dict[str, tuple[Any, ...]] = {
    "read_requests": (
        *(frame(body=encode_body(["m", {}, {"deadline_ms": 9, "traceparent": TRACEPARENT}])), 0),
        *(REQUEST_RULES, 5, WALL),
    )
}
REFUSED: dict[str, tuple[Any, ...]] = {
    "read_requests": (frame(body=encode_body(["m", {}, {"deadline_ms": 0}])), 0, REQUEST_RULES, 5, WALL),
    "cut_values": (frame(body=b"\xc1"), *RULES, message.unpack),
    "encode_frame": (REQUEST, 7, WALL, SALT[:-1], 6, TOKEN, b"body"),
    "encode_frames": ([(REQUEST, 7, WALL, TOKEN, b"body"), (REQUEST, 8, WALL)], SALT, 6),
    "scan_body": (b"\x92\xa1m", 0),
    "fits": ({"user": "ada", "unknown": 1}, CLASSES, NAMED, REQUIRED),
}
TRUNCATED: dict[str, tuple[Any, ...]] = {
    "read_requests": (frame() + frame(counter=7)[:-1], 0, REQUEST_RULES, 5, WALL),
    "cut_values": (frame() + frame(counter=7)[:-1], *RULES, message.unpack),
    "scan_body": (encode_body({"a": [1, 2]})[:-1], 32),
}
FOR_THE_REFERENCE: dict[str, tuple[Any, ...]] = {
    "encode_frame": (REQUEST, -1, WALL, SALT, 6, TOKEN, b"body"),
    "encode_frames": ([(REQUEST, 7, WALL, TOKEN, b"body"), (REQUEST, -1, WALL, TOKEN, b"")], SALT, 6),
    "scan_body": (b"\xc1" * 300, 32),
    "fits": ({"user": "ada"}, CLASSES, [*NAMED], REQUIRED),
    "wall_ms": (1,),
}


@needs_compiled
@pytest.mark.parametrize(
    ("name", "args"),
    [
        *(*CALLS.items(), *TRACED.items(), *FOR_THE_REFERENCE.items()),
        *(*REFUSED.items(), *TRUNCATED.items()),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_calls_leak_nothing(name: str, args: tuple[Any, ...]) -> None:

    def call(function: Any, times: int) -> int:
        for _ in range(times):
            try:
                function(*args)
            except Exception:
                continue
        gc.collect()
        return sys.getallocatedblocks()

    def growth(function: Any) -> int:
        call(function, 100)
        return -call(function, 100) + call(function, 10_000)

    counts = [sys.getrefcount(each) for each in args]
    reference = accelerator.references.get(name)
    assert growth(getattr(compiled, name)) < (0 if reference is None else max(0, growth(reference))) + 200
    leaked = [sys.getrefcount(each) - count for each, count in zip(args, counts, strict=True)]
    assert max(map(abs, leaked), default=0) < 1_000  # others use small ints, too


@needs_compiled
@pytest.mark.parametrize(
    ("name", "args"),
    [(name, calls[name]) for calls in (CALLS, FOR_THE_REFERENCE) for name in calls if name != "wall_ms"],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_lack_of_memory_is_raised(name: str, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    testcapi = pytest.importorskip(
        "_testcapi", reason="_testcapi makes allocations fail; this Python lacks it"
    )
    # A reference without frames: interpreters and msgpack do not survive a lack of memory everywhere.
    monkeypatch.setitem(accelerator.references, name, "".format)
    function = getattr(compiled, name)
    failed, expected = 0, function(*args)
    for number in range(40):
        result = None
        testcapi.set_nomemory(number, number + 1)
        try:
            result = function(*args)
        except MemoryError:
            failed += 1
        finally:
            testcapi.remove_mem_hooks()
        assert result in (None, expected)
    assert failed or expected is True


@needs_compiled
def test_wall_time_is_that_of_the_reference() -> None:
    reference = accelerator.references["wall_ms"]
    before = reference()
    assert before <= compiled.wall_ms() <= reference()
    with pytest.raises(TypeError):
        compiled.wall_ms(1)


@needs_compiled
async def test_usual_calls_need_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()

    @app.method
    async def echo(data: bytes, tags: list[str]) -> dict[str, Any]:
        return {"data": data, "tags": tags}

    async with connect_in_memory(app, user="ada") as client:
        for name in accelerator.references:
            monkeypatch.setitem(
                accelerator.references, name, lambda *_, name=name: pytest.fail(f"{name} was called")
            )
        calls = [client.call("echo", data=bytes(size), tags=["a"]) for size in range(40)]
        assert [len(answer["data"]) for answer in await asyncio.gather(*calls)] == [*range(40)]
        assert await client.call("echo", data=b"last", tags=[]) == {"data": b"last", "tags": []}


@needs_compiled
def test_module_is_loaded_in_an_interpreter_of_its_own() -> None:
    program = f"""
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
load = '''
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = ExtensionFileLoader("zcproto._accelerator", {compiled.__file__!r})
module = module_from_spec(spec_from_loader(loader.name, loader))
loader.exec_module(module)
assert module.encode_frame(1, 2, 3, bytes(8), 4, bytes(32), b"x")[-1:] == b"x"
'''
for _ in range(2):
    interpreter = interpreters.create()
    failed = interpreters.run_string(interpreter, load)
    interpreters.destroy(interpreter)
    assert failed is None, failed
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == "loaded\n", run.stderr


# --- with either of them -------------------------------------------------------------------------


def test_scanned_body_needs_no_further_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message, "_SCANNED_ABOVE", 0)
    monkeypatch.setattr(message, "scan_body", lambda body, max_depth: True)
    assert message.decode_body(b"\x91\x90", 1) == [[]]
    assert message.decode_request(encode_body(["m", {"x": [1]}]), 1)[1] == {"x": [1]}


def test_package_uses_the_chosen_functions() -> None:
    from zcproto.common import parameters
    from zcproto.wire import frame as frames

    chosen: dict[str, Any] = {"encode_frame": frames.encode_frame, "encode_frames": frames.encode_frames}
    chosen["scan_body"], chosen["fits"] = message.scan_body, parameters.fits
    chosen["wall_ms"] = clock.wall_ms
    assert chosen.keys() == accelerator.references.keys()
    for name, function in chosen.items():
        assert function is (accelerator.references[name] if compiled is None else getattr(compiled, name))
    assert bool(accelerator.missing) is (compiled is None)


def chosen_with(setting: str, prelude: str = "") -> str:
    """Return the module that a new process chooses and why."""
    program = f"{prelude}\nfrom zcproto import accelerator as a; print(a.compiled is not None, a.missing)"
    environment = {accelerator.VARIABLE: setting, "PYTHONPATH": ":".join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_variable_selects_python() -> None:
    assert chosen_with("off") == "False ZCPROTO_ACCELERATOR is off"


def test_module_that_cannot_be_loaded_is_replaced_by_python() -> None:
    prelude = "import sys; sys.modules['zcproto._accelerator'] = None"
    assert chosen_with("", prelude).startswith("False import of zcproto._accelerator halted")
