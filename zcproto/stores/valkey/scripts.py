"""The Lua scripts of sessions.lua and answers.lua."""

from __future__ import annotations

import re
from hashlib import sha1
from importlib.resources import files
from typing import Final, NamedTuple

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
