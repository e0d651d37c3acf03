"""Faults in `_accelerator.c` that proofs must find: each is a change of a few words in a function."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from tests.proofs.proofs import SOURCE, Proof, prove


class Fault(NamedTuple):
    """A change in a function, and the proof that fails with it."""

    proof: str
    function: str
    old: str
    new: str


FAULTS: Final = (
    Fault("numbers", "put64", "value >> 32", "value >> 31"),
    Fault("is_uint", "is_uint", "*out <= most", "*out < most"),
    Fault("is_uint", "is_uint", "PyErr_Clear();", ";"),
    Fault("is_bytes", "is_bytes", "size >= 0 &&", "size > 0 &&"),
    Fault("is_bytes", "is_bytes", "!PyBytes_Check(value)", "0"),
    Fault("tuple_of", "tuple_of", "Py_XDECREF(parts[i])", "(void)parts[i]"),
    Fault("tuple_of", "tuple_of", "i < count; i++", "i <= count; i++"),
    Fault("call_reference", "call_reference", "Py_XDECREF(references)", "(void)references"),
    Fault("call_reference", "call_reference", "Py_INCREF(args[i])", "(void)args[i]"),
    Fault("read_rules", "read_rules", "PLAIN, SALT_SIZE", "PLAIN, SALT_SIZE - 1"),
    Fault("read_rules", "read_rules", "PLAIN, -1", "COMPARED_AS_PLAIN, -1"),
    Fault("fitting_size", "fitting_size", "left < BODY", "left < HEAD"),
    Fault("fitting_size", "fitting_size", "left - LENGTH_SIZE", "left"),
    Fault("fitting_size", "fitting_size", "<= rules->counter", "< rules->counter"),
    Fault("fitting_size", "fitting_size", "age > rules->tolerance", "age >= rules->tolerance"),
    Fault("fitting_size", "fitting_size", "rules->token, TOKEN_SIZE", "rules->token, TOKEN_SIZE - 1"),
    Fault("read_body", "read_body", "UINT32_MAX - MIN_LENGTH", "UINT32_MAX"),
    Fault("read_frame", "read_frame", "value, 5, parts", "value, 4, parts"),
    Fault("read_frame", "read_frame", "parts[1], UINT32_MAX", "parts[1], UINT64_MAX"),
    Fault("write_frame", "write_frame", "(size_t)frame->size", "(size_t)frame->size + 1"),
    Fault("write_frame", "write_frame", "p + TIMESTAMP", "p + SALT"),
    Fault("encode_frame", "encode_frame", "BODY + frame.size", "frame.size"),
    Fault("encode_frame", "encode_frame", "nargs != 7 ||", ""),
    Fault("encode_frames", "encode_frames", "size += BODY", "size += HEAD"),
    Fault("encode_frames", "encode_frames", "Py_DECREF(frames);", ";"),
    Fault("is_plain", "is_plain", "depth > DEEPEST", "depth > DEEPEST + 1"),
    Fault("is_plain", "is_plain", "(size_t)(end - p) < follows", "(size_t)(end - p) + 1 < follows"),
    Fault("is_plain", "is_plain", "(uint64_t)(end - p) < size", "(uint32_t)(end - p) < size - 1"),
    Fault("is_plain", "is_plain", "if (p == end)", "if (p > end)"),
    Fault("scan_body", "scan_body", "body + PyBytes_Size(args[0])", "body + PyBytes_Size(args[0]) + 1"),
    Fault("scan_body", "scan_body", "nargs == 2 &&", "nargs <= 2 &&"),
    Fault("decode", "decode", "end - body", "end - body + 1"),
    Fault("decode", "decode", "Py_XDECREF(copy)", "(void)copy"),
    Fault("cut_values", "cut_values", "end - at", "end"),
    Fault("cut_values", "cut_values", "at += size", "at += size + 1"),
    Fault("cut_values", "cut_values", "Py_XDECREF(frame)", "(void)frame"),
    Fault("cut_values", "cut_values", "&& !is_out_of_memory()", ""),
    Fault("fits", "fits", "is_named < 0 || is_required < 0", "is_named < 0"),
    Fault("fits", "fits", "!PyDict_CheckExact(args[0]) ||", ""),
    Fault("read_meta", "read_meta", "PyDict_CheckExact(map) &&", ""),
    Fault("read_meta", "read_meta", "Py_XDECREF(fields)", "(void)fields"),
    Fault("request_message", "request_message", "(size == 2 || size == 3)", "(size == 1 || size == 2)"),
    Fault("request_message", "request_message", "Py_INCREF(*meta)", "(void)*meta"),
    Fault("request_in", "request_in", "i < 4 || params", "i < 3 || params"),
    Fault("request_in", "request_in", "is_out_of_memory();", ";"),
    Fault("request_in", "request_in", "Py_DECREF(value);", ";"),
    Fault("read_requests", "read_requests", "total - here", "total"),
    Fault("read_requests", "read_requests", "(uint64_t)PyBytes_Size(args[0]), &at", "UINT64_MAX, &at"),
)


def planted(fault: Fault) -> str:
    """Return the source with this fault."""
    source = SOURCE.read_text(encoding="utf-8")
    begin = source.index(f"\n{fault.function}(")
    end = source.index("\n}\n", begin)
    function = source[begin:end]
    assert function.count(fault.old) == 1, f"{fault.function} must have this once: {fault.old}"
    return source[:begin] + function.replace(fault.old, fault.new) + source[end:]


def find_fault(proof: Proof, fault: Fault) -> list[str]:
    """Return the checks of a proof that fail with this fault."""
    with tempfile.TemporaryDirectory() as folder:
        faulty = Path(folder) / SOURCE.name
        faulty.write_text(planted(fault), encoding="utf-8")
        return prove(proof, Path(folder), faulty).failures
