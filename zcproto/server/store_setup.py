"""The store of a server's sessions, by its configuration.

What this file decides: which settings go to which store, and what becomes of its notices.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from zcproto.clock import Clock, Entropy
from zcproto.config import Config
from zcproto.deadlines import DeadlineWheel
from zcproto.errors import ConfigError
from zcproto.home import Home
from zcproto.observe.log import get_logger
from zcproto.server.idempotency import answer_limits
from zcproto.server.store_keeper import StoreKeeper
from zcproto.sessions import SessionRegistry
from zcproto.stores.choose import MEMORY, SQLITE, make_store
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.store import SessionStore

NEAR_CACHE: Final = 200_000
"""Sessions of a shared store that are known here at once, about 170 bytes each; the others are looked up."""

MAX_PASSWORD: Final = 4_096
_RANDOM_SIZE: Final = 4
_OTHERS_ANY: Final = 0o077

log = get_logger("zcproto.store")


def store_of(config: Config, home: Home) -> SessionStore | None:
    """The store that is configured, not opened; None where sessions end with the server. Raises ConfigError."""
    settings = config.store
    options: dict[str, Any] = {}
    if settings.url == SQLITE:
        options["on_notice"] = _notice
    elif settings.url != MEMORY:
        options["ca_file"] = settings.ca_file
        options["certificate_file"] = settings.certificate_file
        options["key_file"] = settings.key_file
        if settings.password_file is not None:
            options["password"] = _password(settings.password_file)
    limits = answer_limits(config.idempotency.max_bytes, config.idempotency.per_user)
    return make_store(settings.url, home.sessions, timeout=settings.timeout, answers=limits, **options)


def keeper_of(
    store: SessionStore,
    config: Config,
    home: Home,
    registry: SessionRegistry,
    *,
    keep_ended_ms: int,
    is_used: Callable[[str], bool],
    wheel: DeadlineWheel,
    clock: Clock,
    entropy: Entropy,
) -> StoreKeeper:
    """What keeps a registry and this store together."""

    def random() -> float:
        return int.from_bytes(entropy(_RANDOM_SIZE), "big") / 2.0 ** (8 * _RANDOM_SIZE)

    settings = config.store
    return StoreKeeper(
        store,
        registry,
        PendingRevocations(home.revocations),
        is_used=is_used,
        wheel=wheel,
        clock=clock,
        random=random,
        timeout=settings.timeout,
        grace=settings.grace,
        cleanup_interval=settings.cleanup_interval,
        keep_ended_ms=keep_ended_ms,
    )


def _notice(name: str, **values: object) -> None:
    """What a store has to tell is never good news."""
    shown = {key: str(value) for key, value in values.items()}
    log.error(name.replace("_", ".", 1), **shown)


def _password(path: Path) -> str:
    """The password in a file, without the end of its line."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError([f"store.password_file: {path} is not a regular file"])
            data = os.read(descriptor, MAX_PASSWORD + 2)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError([f"store.password_file: {path} cannot be read: {error.strerror}"]) from error
    if status.st_mode & _OTHERS_ANY:
        raise ConfigError([f"store.password_file: others can read {path}; run: chmod 600 '{path}'"])
    text = data.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not 1 <= len(text) <= MAX_PASSWORD or not text.isprintable() or "\ufffd" in text:
        raise ConfigError(
            [f"store.password_file: {path} must hold one line of up to {MAX_PASSWORD} characters"]
        )
    return text
