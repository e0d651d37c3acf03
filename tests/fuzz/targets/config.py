"""Fuzz configuration files: each loads, or raises a ConfigError that lists faults without secrets.

The first byte selects what the rest is: a whole file, or the text after a secret in a value.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.fuzz.target import FILE_LIMIT_S, Target
from zcproto.config import Config, load_config
from zcproto.config.types import MAX_FAULTS
from zcproto.errors import ConfigError

SECRET = "Hunter2Zebra9"
"""Occurs nowhere else, not even in part."""

MAX_FAULT = 2_000
SECRET_KEYS = (
    *("store.password", "alerts.webhook_secret", "server.api_key", "auth.token", "certificates.passphrase"),
    *("certificates.key_passphrase_file", "store.url", "alerts.webhook"),
)
_folder = tempfile.TemporaryDirectory(prefix="zcproto-fuzz-")
HOME = Path(_folder.name)


def load(file: bytes, environ: Mapping[str, str]) -> Config | ConfigError:
    (HOME / "config.toml").write_bytes(file)
    try:
        return load_config(None, home=HOME, environ=environ)
    except ConfigError as error:
        return error


def sources(data: bytes) -> tuple[bytes, dict[str, str]]:
    """Return the file and the environment that an input encodes."""
    first, rest = data[0] if data else 0, data[1:]
    if first % 4 < 2:
        return rest, {}
    text = rest.decode("utf-8", "replace").replace("\0", "")
    section, _, name = SECRET_KEYS[first // 4 % len(SECRET_KEYS)].partition(".")
    value = f"redis://ada:{SECRET}@{text}" if name in ("url", "webhook") else SECRET + text
    if first % 4 == 2:
        return f"[{section}]\n{name} = {json.dumps(value)}\n".encode(), {}
    return b"", {f"ZCPROTO_{section}__{name}".upper(): value}


def run(data: bytes) -> None:
    load(*sources(data))


def check(data: bytes) -> None:
    file, environ = sources(data)
    found = load(file, environ)
    if isinstance(found, Config):
        # Loading again gives the same configuration.
        assert load(file, environ) == found
        assert contains_secret(data) or SECRET not in repr(found)
        return
    assert 1 <= len(found.faults) <= MAX_FAULTS + 1
    for fault in found.faults:
        assert fault.isprintable()
        assert len(fault) <= MAX_FAULT
    assert contains_secret(data) or SECRET not in str(found)


def contains_secret(data: bytes) -> bool:
    """Return whether the input itself contains the secret, so that it may appear outside of secret values."""
    return SECRET.encode() in data


TARGET = Target("config", run, check, max_size=1_024, limit_s=FILE_LIMIT_S, repeats=False)
