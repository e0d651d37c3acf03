"""Which store an address means.

What this file decides: the words and addresses of `store.url`, and which packages they need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from zcproto.errors import ConfigError
from zcproto.stores.answers import AnswerLimits
from zcproto.stores.sqlite import SqliteStore
from zcproto.stores.store import SessionStore

MEMORY: Final = "memory"
SQLITE: Final = "sqlite"
_PACKAGE: Final = "redis"


def make_store(
    url: str, sessions_file: Path, *, timeout: float, answers: AnswerLimits | None = None, **options: Any
) -> SessionStore | None:
    """The store at `url`, not opened; None for "memory", where sessions are the server's alone.

    `sessions_file` is that of "sqlite". `options` are those of the store's class. Raises ConfigError.
    """
    if url == MEMORY:
        return None
    if url == SQLITE:
        return SqliteStore(sessions_file, timeout=timeout, answers=answers, **options)
    try:
        from zcproto.stores.valkey import ValkeyStore  # noqa: PLC0415 - its package comes with an extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != _PACKAGE:
            raise
        raise ConfigError(
            [f'store.url: this needs the package {_PACKAGE}; run: pip install "zcproto[valkey]"']
        ) from error
    return ValkeyStore(url, timeout=timeout, answers=answers, **options)
