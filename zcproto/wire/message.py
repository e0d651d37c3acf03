"""Encode and decode bodies: one bounded msgpack value each (zcp1.md, section 12). Build what a device signs
(section 9).

Rules:
- Exactly one value, map keys are str, no ext types, nested at most `max_depth` deep (the outermost array is 1).
- Memory stays in proportion to the bytes received, whatever lengths they declare.
- Every refused body raises MessageError with a fixed phrase, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgpack

from zcproto.accelerator import accelerated, compiled
from zcproto.errors import ZcprotoError
from zcproto.wire.values import find_unsendable, to_sendable

DEFAULT_MAX_DEPTH: Final = 32
METHOD_MAX_LENGTH: Final = 128
METHOD_ALPHABET: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.")
_DEEPEST: Final = 64
"""How deep a value that is sent may nest: peers accept less by default."""

IDEMPOTENCY_KEY_MAX_LENGTH: Final = 64

SIGNATURE_SIZE: Final = 64
PUBLIC_KEY_SIZE: Final = 32
_OPEN_CONTEXT: Final = b"zcp/1 open\0"
_ATTACH_CONTEXT: Final = b"zcp/1 attach\0"

# Up to this size the declared lengths are trusted: at worst 85 nested arrays declare 256 elements each, 170 KiB for
# the duration of one decode. A larger body is scanned first without building anything. The compiled scan costs less
# than the checks that it saves, for every size.
_TRUSTED_SIZE: Final = 256
_SCANNED_ABOVE: Final = _TRUSTED_SIZE if compiled is None else 0
_CONTAINERS: Final = frozenset({dict, list})
_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})


class MessageError(ZcprotoError):
    """An invalid body. `str()` is a fixed phrase, safe to send."""


class RequestMeta(NamedTuple):
    """Metadata of a request. `deadline_ms` is relative; None means no deadline."""

    deadline_ms: int | None = None
    idempotency_key: str | None = None
    traceparent: str | None = None


NO_META: Final = RequestMeta()

RUN_ID_MAX_LENGTH: Final = 64


class Resume(NamedTuple):
    """What makes a stream durable (zcp1.md, section 20): the id of its run, and the position of the first item.

    `attaches`: params were nil, so the run must exist.
    """

    id: str
    position: int
    attaches: bool


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError("ext type")


def _new_scanner() -> msgpack.Unpacker:
    # The buffer starts with `read_size` (1 MiB by default) and grows to twice the largest body.
    return msgpack.Unpacker(
        None, read_size=16_384, max_buffer_size=2**32 - 1, max_ext_len=0, ext_hook=_refuse_ext
    )


_idle_scanners = [_new_scanner()]
_pack = msgpack.Packer(autoreset=True, default=to_sendable).pack
unpack: Final = msgpack.unpackb


def encode_body(value: Any) -> bytes:
    """Return a value as msgpack. Raises MessageError with path and type of a part that cannot be sent."""
    global _pack  # noqa: PLW0603  a packer that failed keeps the first bytes of the failed value
    try:
        body: bytes = _pack(value)
    except Exception as error:  # a serializer of the application may raise anything
        _pack = msgpack.Packer(autoreset=True, default=to_sendable).pack
        raise MessageError(f"{find_unsendable(value)} and cannot be sent") from error
    if not (scan_body(body, _DEEPEST) or has_plain_keys(value, _DEEPEST)):
        try:
            decode_body(body, _DEEPEST)  # msgpack packs keys and types that peers refuse
        except MessageError as error:
            raise MessageError(f"{find_unsendable(value)} and cannot be sent") from error
    return body


def has_plain_keys(value: Any, depth: int) -> bool:
    """Return whether a packed value has only str as keys. False if that takes a look at its packed form."""
    parts: Iterable[Any]
    if value.__class__ is dict:
        parts = value.values()
        for name in value:
            if name.__class__ is not str:
                return False
    elif value.__class__ is list:
        parts = value
    else:
        return value.__class__ in _SCALARS
    for part in parts:
        if part.__class__ not in _SCALARS and (depth <= 1 or not has_plain_keys(part, depth - 1)):
            return False
    return depth > 0


def decode_body(body: bytes, max_depth: int = DEFAULT_MAX_DEPTH) -> Any:
    """Return the value of a body. Raises MessageError."""
    is_checked = len(body) > _SCANNED_ABOVE and scan_body(body, max_depth)
    try:
        value = unpack(body) if is_checked else unpack(body, max_ext_len=0, ext_hook=_refuse_ext)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError(_phrase(error, body)) from error
    if is_checked or value.__class__ not in _CONTAINERS:
        return value
    if value.__class__ is dict and max_depth > 0:
        for name, part in value.items():  # at less cost than `_check_nested`: most results are flat
            if name.__class__ is not str or part.__class__ in _CONTAINERS:
                break
        else:
            return value
    _check_nested([value], max_depth)
    return value


def decode_request(
    body: bytes, max_depth: int = DEFAULT_MAX_DEPTH, *, may_resume: bool = False
) -> tuple[str, dict[str, Any], RequestMeta]:
    """Return method, params and meta of `[method, params]` or `[method, params, meta]`. Raises MessageError."""
    is_checked = len(body) > _SCANNED_ABOVE and scan_body(body, max_depth)
    try:
        value = unpack(body) if is_checked else unpack(body, max_ext_len=0, ext_hook=_refuse_ext)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError(_phrase(error, body)) from error
    if value.__class__ is list and len(value) == 2:
        method, params = value
        meta = NO_META
    elif value.__class__ is list and len(value) == 3:
        method, params = value[0], value[1]
        meta = decode_meta(value[2], None if is_checked else max_depth, may_resume=may_resume)
    else:
        raise MessageError("request must be [method, params] or [method, params, meta]")
    if method.__class__ is not str or method not in well_formed_methods:
        _check_method(method)
    if params.__class__ is not dict:
        if params is not None:
            raise MessageError("params must be a map or nil")
        params = {}
    if is_checked:
        return method, params, meta
    for name, argument in params.items():
        if name.__class__ is not str:
            raise MessageError("map keys must be str")
        if argument.__class__ in _CONTAINERS:
            _check_nested([params], max_depth - 1)
            break
    return method, params, meta


well_formed_methods: Final[set[str]] = set()
_WELL_FORMED_METHODS_KEPT: Final = 1024


def _check_method(method: Any) -> None:
    if method.__class__ is not str:
        raise MessageError("method must be a str")
    if not 1 <= len(method) <= METHOD_MAX_LENGTH:
        raise MessageError("method must have 1 to 128 characters")
    if not METHOD_ALPHABET.issuperset(method):
        raise MessageError("method must be of a-z 0-9 _ .")
    if len(well_formed_methods) < _WELL_FORMED_METHODS_KEPT:
        well_formed_methods.add(method)


def decode_meta(meta: Any, max_depth: int | None = None, *, may_resume: bool = False) -> RequestMeta:
    """Return the metadata of a request. `max_depth` is that of its body; None if `scan_body` has checked it.

    Raises MessageError.
    """
    if meta.__class__ is not dict:
        raise MessageError("meta must be a map")
    deadline_ms = meta.get("deadline_ms")
    if deadline_ms.__class__ is int and len(meta) == 1 and (max_depth is None or max_depth > 1):  # most often
        return RequestMeta(deadline_ms)
    if max_depth is not None:
        _check_nested([meta], max_depth - 1)
    if deadline_ms is not None and deadline_ms.__class__ is not int:
        raise MessageError("meta.deadline_ms must be an int")
    key = meta.get("idempotency_key")
    if key is not None and (key.__class__ is not str or not 1 <= len(key) <= IDEMPOTENCY_KEY_MAX_LENGTH):
        raise MessageError("meta.idempotency_key must be a str of 1 to 64 characters")
    if not may_resume and meta.get("resume") is not None:
        raise MessageError("meta.resume needs OPEN: only streams can be durable")
    return RequestMeta(deadline_ms, key, parse_traceparent(meta.get("traceparent")))


PENDING_ID_MAX_LENGTH: Final = 64


def decode_call(
    body: bytes, max_depth: int = DEFAULT_MAX_DEPTH
) -> tuple[str, dict[str, Any], RequestMeta, str | None]:
    """Return method, params and meta of a CALL, and the id of its pending call. Raises MessageError."""
    method, params, meta = decode_request(body, max_depth)
    if meta is NO_META or b"pending" not in body:
        return method, params, meta, None
    # A second decode, so that requests do not pay for the key.
    pending = unpack(body, max_ext_len=0, ext_hook=_refuse_ext)[2].get("pending")
    if pending is not None and (
        pending.__class__ is not str or not 1 <= len(pending) <= PENDING_ID_MAX_LENGTH
    ):
        raise MessageError("meta.pending must be a str of 1 to 64 characters")
    return method, params, meta, pending


MAX_CREDIT: Final = 2**53 - 1
"""Largest number in a credit: every language represents it exactly."""

Credit = tuple[int, int]
"""Items and bytes that a peer may send on a stream, as totals since OPEN."""


def decode_open(
    body: bytes, max_depth: int = DEFAULT_MAX_DEPTH
) -> tuple[str, dict[str, Any], RequestMeta, Credit, Resume | None, bool]:
    """Return method, params, meta, first credit, what is resumed, and whether the client has items, of an OPEN.

    Raises MessageError.
    """
    method, params, meta = decode_request(body, max_depth, may_resume=True)
    if meta is NO_META:
        return method, params, meta, (0, 0), None, False
    if meta.idempotency_key is not None:
        raise MessageError("meta.idempotency_key cannot be used with a stream: its output is not kept")
    # A second decode, so that requests do not pay for the keys.
    _, sent_params, sent_meta = unpack(body, max_ext_len=0, ext_hook=_refuse_ext)
    credit = sent_meta.get("credit")
    resume = sent_meta.get("resume")
    if credit is None:
        credit = (0, 0)
    elif not (_are_positions(credit) and len(credit) == 2):
        raise MessageError("meta.credit must be two ints from 0 to 2^53 - 1")
    if meta == NO_META:
        meta = NO_META  # equal, but shared: an open stream keeps it
    resumed = None if resume is None else _read_resume(resume, attaches=sent_params is None)
    return method, params, meta, (credit[0], credit[1]), resumed, sent_meta.get("items") is True


def _read_resume(resume: Any, *, attaches: bool) -> Resume:
    if resume.__class__ is not dict:
        raise MessageError("meta.resume must be a map")
    run_id: Any = resume.get("id")
    position: Any = resume.get("from")
    if run_id.__class__ is not str or not _is_run_id(run_id):
        raise MessageError("meta.resume.id must be 1 to 64 characters of A-Z a-z 0-9 _ -")
    if not _are_positions([position]):
        raise MessageError("meta.resume.from must be an int from 0 to 2^53 - 1")
    return Resume(run_id, position, attaches)


_is_run_id = re.compile(f"[A-Za-z0-9_-]{{1,{RUN_ID_MAX_LENGTH}}}").fullmatch


def decode_credit(body: bytes) -> tuple[int, ...]:
    """Return the items and bytes of a CREDIT, and what was taken if that follows. Raises MessageError."""
    credit = decode_body(body)
    if not (_are_positions(credit) and 2 <= len(credit) <= 3):
        raise MessageError("credit must be two or three ints from 0 to 2^53 - 1")
    return tuple(credit)


def _are_positions(value: Any) -> bool:
    return value.__class__ is list and all(
        number.__class__ is int and 0 <= number <= MAX_CREDIT for number in value
    )


# Version ff and ids of zeros are invalid.
_is_traceparent = re.compile(
    "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
).fullmatch


def parse_traceparent(value: Any) -> str | None:
    """Return a valid W3C Trace Context `traceparent`, or None: an invalid one is ignored."""
    return value if value.__class__ is str and _is_traceparent(value) else None


def encode_request(
    method: str, params: Mapping[str, Any] | None, meta: Mapping[str, Any] | None = None
) -> bytes:
    """Return the body of a REQUEST. Raises MessageError if a value cannot be encoded."""
    return encode_body([method, params, meta] if meta else [method, params])


class ErrorMessage(NamedTuple):
    """The decoded body of an ERROR."""

    code: int
    message: str
    details: dict[str, Any]


def encode_error(code: int, message: str, details: Mapping[str, Any] | None = None) -> bytes:
    """Return the body of an ERROR."""
    return encode_body([int(code), message, details] if details else [int(code), message])


def code_in(body: bytes) -> int:
    """Return the code in a body made by `encode_error`: the second byte, because all codes are below 128."""
    return body[1]


def decode_error(body: bytes, max_depth: int = DEFAULT_MAX_DEPTH) -> ErrorMessage:
    """Decode the body of an ERROR: `[code, message]` or `[code, message, details]`. Raises MessageError."""
    value = decode_body(body, max_depth)
    if value.__class__ is not list or not 2 <= len(value) <= 3:
        raise MessageError("error must be [code, message] or [code, message, details]")
    code, message = value[0], value[1]
    details = value[2] if len(value) == 3 else None
    if code.__class__ is not int or message.__class__ is not str:
        raise MessageError("error must carry an int code and a str message")
    if details is None:
        details = {}
    if details.__class__ is not dict:
        raise MessageError("error details must be a map")
    return ErrorMessage(code, message, details)


def decode_event(body: bytes, max_depth: int = DEFAULT_MAX_DEPTH) -> tuple[str, Any]:
    """Return the name and data of an EVENT. Raises MessageError."""
    value = decode_body(body, max_depth)
    if value.__class__ is not list or len(value) != 2 or value[0].__class__ is not str:
        raise MessageError("event must be [name, data]")
    return value[0], value[1]


def decode_map(body: bytes, max_depth: int = DEFAULT_MAX_DEPTH) -> dict[str, Any]:
    """Return the map of a WELCOME or GOAWAY. Raises MessageError."""
    value = decode_body(body, max_depth)
    if value.__class__ is not dict:
        raise MessageError("body must be a map")
    return value


def decode_accepted(body: bytes, max_depth: int = DEFAULT_MAX_DEPTH) -> dict[str, Any]:
    """Return the map of an ACCEPTED, unknown keys included. Raises MessageError."""
    run = decode_map(body, max_depth)
    if any(run.get(key).__class__ is not str for key in ("id", "attachment", "state")):
        raise MessageError("id, attachment and state must be str")
    positions: list[Any] = [run.get(key) for key in ("first", "from", "next")]
    if not _are_positions(positions) or positions != sorted(positions):
        raise MessageError("first, from and next must be positions in this order")
    return run


@accelerated
def scan_body(body: bytes, max_depth: int) -> bool:
    """Walk the value of a large body without building it: it must be complete, with nothing after it.

    Return True if it has no ext types, and its keys and depth need no further check: only the compiled function
    does, for bodies of any size. Raises MessageError.
    """
    if len(body) <= _TRUSTED_SIZE:
        return False
    try:
        scanner = _idle_scanners.pop()  # owned by this thread until it is put back
    except IndexError:
        scanner = _new_scanner()
    start = scanner.tell()
    try:
        scanner.feed(body)
        scanner.skip()
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError(_phrase(error, body)) from error  # do not reuse a scanner that failed
    if scanner.tell() - start != len(body):
        raise MessageError("bytes after the value")
    _idle_scanners.append(scanner)
    return False


def _phrase(error: BaseException, body: bytes) -> str:
    if not body:
        return "body is empty"
    if isinstance(error, msgpack.ExtraData):
        return "bytes after the value"
    if isinstance(error, UnicodeDecodeError):
        return "str is not UTF-8"
    return "body is not one msgpack value of the allowed types"


def _check_nested(level: list[Any], max_depth: int) -> None:
    """Refuse values nested deeper than allowed and map keys other than str, level by level."""
    while level:
        if max_depth <= 0:
            raise MessageError("nested too deep")
        max_depth -= 1
        deeper: list[Any] = []
        for container in level:
            if container.__class__ is dict:
                for key in container:
                    if key.__class__ is not str:
                        raise MessageError("map keys must be str")
                deeper += [value for value in container.values() if value.__class__ in _CONTAINERS]
            else:
                deeper += [value for value in container if value.__class__ in _CONTAINERS]
        level = deeper


def open_message(salt: bytes, leaf: bytes, device: str) -> bytes:
    """Return what a device signs to open a session.

    `salt` is the salt of the connection and `leaf` the SHA-256 of its server certificate (DER), so a signature is
    not valid on another connection or relayed through another server.
    """
    return _OPEN_CONTEXT + salt + leaf + device.encode("utf-8", "surrogatepass")


def attach_message(salt: bytes, leaf: bytes, token: bytes) -> bytes:
    """Return what a device signs to attach a bound token to another connection."""
    return _ATTACH_CONTEXT + salt + leaf + token
