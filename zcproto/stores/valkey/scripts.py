"""The Lua scripts, and how their arguments and results are encoded.

The layout of a session and the names of keys are described in sessions.lua.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha1, sha256
from importlib.resources import files
from typing import Any, Final, NamedTuple

import msgpack

from zcproto.errors import Code
from zcproto.sessions.record import (
    EndedRecord,
    SessionRecord,
    key_and_roles,
    pack_origin,
    stored_key,
    unpack_origin,
)
from zcproto.sessions.token import id_from_text
from zcproto.stores.base import DamagedRecord

TAG_SIZE: Final = 20
NODE_SIZE: Final = 8
ID_TEXT_SIZE: Final = 22
MEMBER_SIZE: Final = TAG_SIZE + ID_TEXT_SIZE
TOKEN_MEMBER_SIZE: Final = 33
PLACE_SIZE: Final = 16

DAY_MS: Final = 86_400_000
MAX_TTL_MS: Final = 3_650 * DAY_MS

_HEADING: Final = re.compile(r"^--@ (\w+)(?: ([\w,-]+))?\n", re.MULTILINE)


class Script(NamedTuple):
    """One script, which servers cache under its SHA-1."""

    source: bytes
    sha: str


def _load() -> dict[str, Script]:
    scripts, common = {}, ""
    for file in ("sessions.lua", "answers.lua"):  # the second uses functions of the first
        text = files("zcproto.stores.valkey").joinpath(file).read_text("utf-8")
        shared, *parts = _HEADING.split(text)
        common += shared
        for name, flags, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            # With this line a server that is full refuses the whole script, not its first write.
            source = f"#!lua flags={flags or ''}\n{common}{body}".encode()
            scripts[name] = Script(source, sha1(source, usedforsecurity=False).hexdigest())
    return scripts


SCRIPTS: Final = _load()


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogatepass")


@lru_cache(maxsize=1_024)
def tag_of(user: str) -> bytes:
    """Return the TAG of a user, which makes all of the user's keys share one slot of a cluster."""
    return urlsafe_b64encode(sha256(utf8(user)).digest()[:15])


def key_digest(key: str) -> bytes:
    """Return the DIGEST of an idempotency key."""
    return urlsafe_b64encode(sha256(utf8(key)).digest()[:16]).rstrip(b"=")


def time_text(value: int) -> bytes:
    """Encode a time for comparison in scripts. Times before 1970 become 0."""
    return b"%d" % max(value, 0)


def ttl_for(ms: int) -> int:
    """Return the time to live of a key that is needed for `ms`."""
    return min(max(ms, 0) + DAY_MS, MAX_TTL_MS)


def pack_session(record: SessionRecord) -> bytes:
    """Encode a session. The scripts append its place in the order of opening."""
    record = pack_origin(record)
    texts = map(utf8, (record.user, record.client, record.address, stored_key(record)))
    times = record.created_at, record.last_used_at, record.expires_at, record.refresh_expires_at
    fields = [0, record.token_digest, record.refresh_digest, *texts, record.flags, *map(time_text, times)]
    packed: bytes = msgpack.packb(fields, use_bin_type=False)
    return packed


def unpack_session(id: bytes, raw: bytes) -> SessionRecord | EndedRecord:
    """Decode a session or its tombstone. `id` is the text of its id. Raises DamagedRecord."""
    try:
        code, token, *rest = msgpack.unpackb(raw, raw=True)
        if code:
            return EndedRecord(raw_id(id), token, Code(code), int(rest[0]))
        refresh, user, client, address, key, flags, *times = rest[:10]
        texts = map(_text, (user, client, address))
        values: list[Any] = [
            token,
            refresh,
            *texts,
            flags,
            *map(int, times),
            *key_and_roles(_text(key), flags),
        ]
        return unpack_origin(SessionRecord(raw_id(id), *values))
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise DamagedRecord(f"the session {id.decode('latin-1')} cannot be decoded") from error


def order_of(raw: bytes) -> int:
    """Return the place of an encoded session in the order of opening."""
    order: int = msgpack.unpackb(raw, raw=True)[12]
    return order


def ended_record(pair: Sequence[bytes], code: Code, wall: int) -> EndedRecord:
    """Decode the id and the token digest of a session that a script has ended."""
    return EndedRecord(raw_id(pair[0]), pair[1], code, wall)


def raw_id(text: bytes) -> bytes:
    """Return the 16 bytes of an id from its text."""
    raw = id_from_text(text.decode("ascii"))
    assert raw is not None
    return raw
