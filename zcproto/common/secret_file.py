"""A secret in a file of its own: one line, which nobody but its owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from zcproto.errors import ConfigError

MAX_SECRET: Final = 4_096
_OTHERS_ANY: Final = 0o077


def secret_line(path: Path, key: str, *, least: int = 1) -> str:
    """The text in a file, without the end of its line. `key` is the setting that names it.

    Raises ConfigError: not there, not private, not one line of `least` to MAX_SECRET characters.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError([f"{key}: {path} is not a regular file"])
            data = os.read(descriptor, MAX_SECRET + 2)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError([f"{key}: {path} cannot be read: {error.strerror}"]) from error
    if status.st_mode & _OTHERS_ANY:
        raise ConfigError([f"{key}: others can read {path}; run: chmod 600 '{path}'"])
    text = data.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not least <= len(text) <= MAX_SECRET or not text.isprintable() or "\ufffd" in text:
        count = f"up to {MAX_SECRET}" if least == 1 else f"{least} to {MAX_SECRET}"
        raise ConfigError([f"{key}: {path} must hold one line of {count} characters"])
    return text
