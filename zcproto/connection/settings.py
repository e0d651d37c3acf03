"""Define the limits of a server connection, and WELCOME, which announces them (zcp1.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from zcproto.errors import Code, ProtocolError
from zcproto.wire.frame import (
    ALLOWED,
    MIN_LENGTH,
    VERSION,
    Accepted,
    Side,
    accepted_with_calls,
    accepted_with_streams,
)
from zcproto.wire.message import DEFAULT_MAX_DEPTH, MessageError, decode_map, encode_body


@dataclass(frozen=True, slots=True)
class TransportSecurityPolicy:
    """Strict transport security for native clients, after RFC 6797: how long to require verified TLS."""

    max_age_s: int = 31_536_000
    include_subdomains: bool = True


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Limits of streams (zcp1.md, section 18). Lengths are in bytes."""

    max_open: int = 64
    """Streams in flight on one connection."""
    max_item: int = 65_536
    """The largest `length` of an ITEM, in both directions."""
    window_items: int = 32
    window_bytes: int = 65_536
    """What the server grants beyond what a method has taken."""
    write_bytes: int = 65_536
    """ITEM bytes that may wait for one client."""
    stall_timeout_s: float = 300.0
    """Longest time that an item waits for credit."""
    memory_bytes: int = 67_108_864
    """What the items of all clients may take; one user's, as much as they leave free."""
    durable: bool = False
    """Whether streams may be durable (section 20)."""


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Limits of one server connection. Lengths are in bytes; names give the unit of times."""

    server: str = "zcproto"
    max_frame: int = 1_048_576
    max_frame_before_session: int = 16_384
    max_streams: int = 128
    max_depth: int = DEFAULT_MAX_DEPTH
    tolerance_ms: int = 30_000
    idle_timeout_s: float = 300.0
    frame_timeout_s: float = 300.0
    """Longest time from the header of a frame to its last byte."""
    open_timeout_s: float = 10.0
    max_stale_in_a_row: int = 10
    retry_busy_ms: int = 100
    retry_draining_ms: int = 1_000
    looks_up: bool = False
    """Unknown tokens may be valid in a shared store and must be looked up."""
    sts: TransportSecurityPolicy = TransportSecurityPolicy()
    streams: StreamLimits | None = None
    """None: no streams."""
    max_calls: int = 0
    """Calls to the client in flight; 0: no calls."""
    first_timeout_s: float = field(init=False, repr=False)
    """Time from the beginning of a connection to its first deadline."""
    welcome_body: bytes = field(init=False, repr=False)
    accepted: Accepted = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Encoded once, because it is the same on every connection.
        welcome: dict[str, Any] = {
            "server": self.server,
            "versions": [VERSION],
            "max_frame": self.max_frame,
            "max_streams": self.max_streams,
            "idle_timeout_ms": round(self.idle_timeout_s * 1000),
            "tolerance_ms": self.tolerance_ms,
            "sts": {"max_age": self.sts.max_age_s, "include_subdomains": self.sts.include_subdomains},
        }
        welcome |= self.features
        accepted = ALLOWED[Side.SERVER]
        if self.streams is not None:
            accepted = accepted_with_streams(Side.SERVER, self.streams.max_item)
        if self.max_calls:
            accepted = accepted_with_calls(Side.SERVER, accepted)
        object.__setattr__(self, "accepted", accepted)
        object.__setattr__(self, "first_timeout_s", min(self.open_timeout_s, self.idle_timeout_s))
        object.__setattr__(self, "welcome_body", encode_body(welcome))

    @property
    def features(self) -> dict[str, dict[str, int]]:
        """Return the keys of WELCOME that only servers with these features have."""
        streams, features = self.streams, {}
        if streams is not None:
            features["streams"] = {"max_open": streams.max_open, "max_item": streams.max_item}
            if streams.durable:
                features["streams"]["durable"] = True
        if self.max_calls:
            features["calls"] = {"max": self.max_calls}
        return features

    @property
    def max_body(self) -> int:
        """Return the maximum body of an answer, in bytes."""
        return self.max_frame - MIN_LENGTH


_TYPES: Final = {
    "server": str,
    "versions": list,
    "max_frame": int,
    "max_streams": int,
    "idle_timeout_ms": int,
    "tolerance_ms": int,
    "sts": dict,
}
_OPTIONAL: Final = {"streams": {"max_open": 0, "max_item": MIN_LENGTH}, "calls": {"max": 0}}
"""Maps that announce a feature, each key with its least value."""
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
    for feature, keys in _OPTIONAL.items():
        if feature in welcome:
            limits = welcome[feature]
            if limits.__class__ is not dict or not all(
                limits.get(key).__class__ is int and limits[key] >= least for key, least in keys.items()
            ):
                raise ProtocolError(Code.PROTOCOL_ERROR, f"WELCOME: {feature} cannot be read")
    if welcome.get("streams", {}).get("durable", False).__class__ is not bool:
        raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME: streams.durable is of the wrong type")
    if not any(version.__class__ is int and version == VERSION for version in welcome["versions"]):
        raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME: the server does not speak version 1")
    return welcome
