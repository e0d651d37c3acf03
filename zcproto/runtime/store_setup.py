"""Builds the session store and its sync from the configuration.

What this file decides: which store a URL selects, which settings it gets, and how its notices are reported.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from zcproto.common.clock import Clock, Entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.files import read_secret
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger
from zcproto.server.idempotency import answer_limits
from zcproto.sessions import SessionRegistry
from zcproto.stores.base import SessionStore
from zcproto.stores.changes import IsUsed
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.revoker import OnEvent
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.sync import StoreSync

MEMORY: Final = "memory"
SQLITE: Final = "sqlite"

NEAR_CACHE: Final = 200_000
"""Sessions of a shared store cached in this process, about 170 bytes each; others are looked up."""

_RANDOM_SIZE: Final = 4
_PACKAGE: Final = "redis"

log = get_logger("zcproto.store")


def build_store(
    config: Config, home: Home, on_event: OnEvent = lambda event, values: None
) -> SessionStore | None:
    """Return the configured store, not opened; None if sessions end with the server. Raises ConfigError.

    `on_event` is called when a damaged file was found.
    """
    settings = config.store
    limits = answer_limits(config.idempotency.max_bytes, config.idempotency.per_user)
    if settings.url == MEMORY:
        return None
    if settings.url == SQLITE:
        return SqliteStore(
            home.sessions, timeout=settings.timeout, answers=limits, on_notice=partial(_report, on_event)
        )
    try:
        from zcproto.stores.valkey.store import ValkeyStore  # noqa: PLC0415 - its package is an extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != _PACKAGE:
            raise
        raise ConfigError(
            [f'store.url: this needs the package {_PACKAGE}; run: pip install "zcproto[valkey]"']
        ) from error
    password = None
    if settings.password_file is not None:
        password = read_secret(settings.password_file, "store.password_file")
    return ValkeyStore(
        settings.url,
        password=password,
        ca_file=settings.ca_file,
        certificate_file=settings.certificate_file,
        key_file=settings.key_file,
        timeout=settings.timeout,
        answers=limits,
    )


def build_sync(
    store: SessionStore,
    config: Config,
    home: Home,
    registry: SessionRegistry,
    *,
    keep_ended_ms: int,
    is_used: IsUsed,
    wheel: DeadlineWheel,
    clock: Clock,
    entropy: Entropy,
    on_event: OnEvent = lambda event, values: None,
) -> StoreSync:
    """Return the object that keeps a registry and this store consistent, not started."""

    def random() -> float:
        return int.from_bytes(entropy(_RANDOM_SIZE), "big") / 2.0 ** (8 * _RANDOM_SIZE)

    settings = config.store
    return StoreSync(
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
        on_event=on_event,
    )


def _report(on_event: OnEvent, name: str, **values: object) -> None:
    """Log a notice of a store; all of them are errors."""
    shown = {key: str(value) for key, value in values.items()}
    event = name.replace("_", ".", 1)
    log.error(event, **shown)
    on_event(event, shown)
