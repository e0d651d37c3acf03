"""A file for its owner alone, whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from zcproto.common.text import escape_text
from zcproto.errors import ZcprotoError


@contextmanager
def private_file(path: Path, *, replace: bool) -> Iterator[TextIO]:
    """A new file of mode 0600 to write to. If the body raises, it is gone again.

    With `replace`, what stood at `path` is replaced at the end, in one step; without, it raises ZcprotoError.
    A link at `path` is never followed.
    """
    target = path.with_name(f".{path.name}.{secrets.token_hex(8)}") if replace else path
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ZcprotoError(f"{escape_text(str(path))}: is there already; --force replaces it") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            target.replace(path)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
