"""Builds the session store from the configuration.

Decides: which store a URL selects, which settings it gets, and how its notices are reported.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from zcproto.bus.sealing import Opener, Sealer, load_keys
from zcproto.common.clock import Entropy
from zcproto.common.files import read_secret
from zcproto.common.home import Home
from zcproto.common.text import extra_cure
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger
from zcproto.runs.log import RunLimits
from zcproto.runs.shared import SharedRuns, new_process
from zcproto.server.idempotency import answer_limits
from zcproto.stores.base import SessionStore
from zcproto.stores.revoker import OnEvent
from zcproto.stores.sqlite.store import SqliteStore

if TYPE_CHECKING:
    from zcproto.bus.valkey import ValkeyTopics

MEMORY: Final = "memory"
SQLITE: Final = "sqlite"

NEAR_CACHE: Final = 200_000
"""Sessions of a shared store cached in this process, about 180 bytes each; others are looked up."""

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
            home.sessions,
            timeout=settings.timeout,
            answers=limits,
            on_notice=partial(report_notice, on_event),
        )
    try:
        from zcproto.stores.valkey.store import ValkeyStore  # noqa: PLC0415 - its package is an extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != _PACKAGE:
            raise
        raise ConfigError(
            [f"store.url: this needs the package {_PACKAGE}; {extra_cure('valkey')}"]
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
        on_notice=partial(report_notice, on_event),
    )


def build_carrier(
    store: SessionStore | None, config: Config, home: Home, entropy: Entropy
) -> ValkeyTopics | None:
    """Return what takes events to the other servers of the store; None if no other server has it.

    Creates the key that seals them if it is missing. Raises ConfigError.
    """
    if config.store.url in (MEMORY, SQLITE) or store is None:
        return None
    from zcproto.bus.valkey import ValkeyTopics  # noqa: PLC0415 - likewise
    from zcproto.stores.valkey.store import PREFIX, ValkeyStore  # noqa: PLC0415 - likewise

    assert isinstance(store, ValkeyStore)
    seals = _seals(home, entropy)
    return ValkeyTopics(store.make_servers, PREFIX.encode(), *seals, entropy, config.store.timeout)


def run_limit(config: Config, limit: float, *, is_replaced: bool = False) -> float:
    """Return how long runs may go on after a drain of `limit` seconds: not if no other process can read them."""
    is_shared = is_replaced or config.store.url not in (MEMORY, SQLITE)
    return config.streams.durable_drain if limit and is_shared else 0.0


def build_runs(
    store: SessionStore | None, config: Config, home: Home, entropy: Entropy, limits: RunLimits
) -> SharedRuns | None:
    """Return the durable runs that servers of the store share; None as `build_carrier`. Raises as it does."""
    if config.store.url in (MEMORY, SQLITE) or store is None:
        return None
    from zcproto.bus.runs import ValkeyRuns  # noqa: PLC0415 - likewise
    from zcproto.stores.valkey.store import PREFIX, ValkeyStore  # noqa: PLC0415 - likewise

    assert isinstance(store, ValkeyStore)
    process = new_process(entropy)
    carrier = ValkeyRuns(
        store.make_servers, PREFIX.encode(), *_seals(home, entropy), limits, process, config.store.timeout
    )
    return SharedRuns(carrier, limits, process)


def _seals(home: Home, entropy: Entropy) -> tuple[Sealer, Opener]:
    keys = load_keys(home.store_key, entropy)
    return Sealer(keys, entropy), Opener(keys)


def report_notice(on_event: OnEvent, name: str, **values: object) -> None:
    """Log a notice of a store; all of them are errors."""
    shown = {key: str(value) for key, value in values.items()}
    event = name.replace("_", ".", 1)
    log.error(event, **shown)
    on_event(event, shown)
