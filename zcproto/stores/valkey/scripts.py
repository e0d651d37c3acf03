"""The Lua scripts of sessions.lua and answers.lua."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Final

_HEADING: Final = re.compile(r"^--@ (\w+)(?: ([\w,-]+))?\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """One script, which servers cache under its SHA-1."""

    name: str
    source: bytes
    sha: str


def _load() -> dict[str, Script]:
    folder = files("zcproto.stores.valkey")
    common, *parts = _HEADING.split(folder.joinpath("sessions.lua").read_text("utf-8"))
    scripts = _scripts(common, parts)
    more, *parts = _HEADING.split(folder.joinpath("answers.lua").read_text("utf-8"))
    return scripts | _scripts(common + more, parts)


def _scripts(common: str, parts: list[str]) -> dict[str, Script]:
    scripts = {}
    for name, flags, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        # With this line a server that is full refuses the whole script, not its first write.
        source = f"#!lua flags={flags or ''}\n{common}{body}".encode()
        scripts[name] = Script(name, source, sha1(source, usedforsecurity=False).hexdigest())
    return scripts


SCRIPTS: Final = _load()
