"""Use UNIX sockets at paths of any length."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MAX_ADDRESS: Final = 107 if sys.platform == "linux" else 103
"""Bytes of a UNIX socket's path (unix(7))."""

_DESCRIPTORS: Final = Path("/proc/self/fd")


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """Yield the address to bind or connect to for the socket at a path. It is valid inside the body.

    A path that is too long is replaced by one through a descriptor of its folder, where the system has /proc.
    Otherwise the system reports the error. Raises OSError if the folder is missing.
    """
    if len(os.fsencode(path)) <= MAX_ADDRESS or not _DESCRIPTORS.is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)
