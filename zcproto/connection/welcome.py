"""Parse and validate WELCOME for a client (zcp1.md, section 6)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from zcproto.errors import Code, ProtocolError
from zcproto.wire.frame import MIN_LENGTH, VERSION
from zcproto.wire.message import MessageError, decode_map

_TYPES: Final = {
    "server": str,
    "versions": list,
    "max_frame": int,
    "max_streams": int,
    "idle_timeout_ms": int,
    "tolerance_ms": int,
    "sts": dict,
}
_LEAST: Final = {"max_frame": MIN_LENGTH, "max_streams": 1, "idle_timeout_ms": 0, "tolerance_ms": 0}


@lru_cache(maxsize=16)  # all connections to one server share one map
def read_welcome(body: bytes, max_depth: int) -> dict[str, Any]:
    """Return the map of a WELCOME. Raises ProtocolError if a key is missing or invalid."""
    try:
        welcome = decode_map(body, max_depth)
    except MessageError as error:
        raise ProtocolError(Code.PROTOCOL_ERROR, f"WELCOME cannot be read: {error}") from error
    for key, wanted in _TYPES.items():
        if welcome.get(key).__class__ is not wanted:
            raise ProtocolError(Code.PROTOCOL_ERROR, f"WELCOME: {key} is missing or of the wrong type")
    for key, least in _LEAST.items():
        if welcome[key] < least:
            raise ProtocolError(Code.PROTOCOL_ERROR, f"WELCOME: {key} is too small")
    sts = welcome["sts"]
    if sts.get("max_age").__class__ is not int or sts["max_age"] < 0:
        raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME: sts.max_age is missing or of the wrong type")
    if sts.get("include_subdomains").__class__ is not bool:
        raise ProtocolError(
            Code.PROTOCOL_ERROR, "WELCOME: sts.include_subdomains is missing or of the wrong type"
        )
    if not any(version.__class__ is int and version == VERSION for version in welcome["versions"]):
        raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME: the server does not speak version 1")
    return welcome
