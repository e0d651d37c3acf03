"""The store of a server's sessions, by its configuration.

What this file decides: which settings go to which store, and what becomes of its notices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from zcproto.common.clock import Clock, Entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.files import read_secret
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.observe.log import get_logger
from zcproto.server.idempotency import answer_limits
from zcproto.sessions import SessionRegistry
from zcproto.stores.choose import MEMORY, SQLITE, make_store
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.store import SessionStore
from zcproto.stores.sync import OnEvent, StoreKeeper

NEAR_CACHE: Final = 200_000
"""Sessions of a shared store that are known here at once, about 170 bytes each; the others are looked up."""

_RANDOM_SIZE: Final = 4

log = get_logger("zcproto.store")


def store_of(
    config: Config, home: Home, on_event: OnEvent = lambda event, values: None
) -> SessionStore | None:
    """The store that is configured, not opened; None where sessions end with the server. Raises ConfigError.

    `on_event` hears of what was found damaged.
    """
    settings = config.store
    options: dict[str, Any] = {}
    if settings.url == SQLITE:
        options["on_notice"] = partial(_notice, on_event)
    elif settings.url != MEMORY:
        options["ca_file"] = settings.ca_file
        options["certificate_file"] = settings.certificate_file
        options["key_file"] = settings.key_file
        if settings.password_file is not None:
            options["password"] = read_secret(settings.password_file, "store.password_file")
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
    on_event: OnEvent = lambda event, values: None,
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
        on_event=on_event,
    )


def _notice(on_event: OnEvent, name: str, **values: object) -> None:
    """What a store has to tell is never good news."""
    shown = {key: str(value) for key, value in values.items()}
    event = name.replace("_", ".", 1)
    log.error(event, **shown)
    on_event(event, shown)
