"""Fixtures for all tests: external and managed certificates, and servers."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from tests import limits, loop_reports, secrets_watch  # first: modules use its entropy as a default
from tests.helpers import ConnectionPair, FakeClock, FakeTimers, small_registry
from zcproto.observe import log as log_module
from zcproto.sessions import SessionRegistry
from zcproto.testing import plugin as testing_plugin

if TYPE_CHECKING:
    import trustme

    from tests.server.helpers import ServerThread
    from zcproto.app.app import App


# A busy machine may slow down a single example; the limit of the test ends what hangs.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "long",
    deadline=None,
    max_examples=5_000,
    stateful_step_count=100,
    suppress_health_check=[HealthCheck.too_slow],
)
"""For state machines that are let run for minutes: `pytest --hypothesis-profile=long tests/properties/...`."""

settings.load_profile("patient")


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.register(limits)
    pluginmanager.register(loop_reports)
    pluginmanager.register(secrets_watch)  # here: it adds an option
    if not pluginmanager.has_plugin(
        testing_plugin.__name__
    ):  # this clone was not installed with its entry points
        pluginmanager.register(testing_plugin, testing_plugin.__name__)


def pytest_configure() -> None:
    """Let tests interrupt their processes, which would inherit that a job in the background ignores SIGINT.

    Their files are not writable by others, whatever the umask of the caller: such a configuration is refused.
    """
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude imported objects from collections, so that tests that collect are fast."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def long_login_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay logins after failures for longer than a test takes on a busy machine."""
    monkeypatch.setattr("zcproto.auth.throttle.FIRST_DELAY_S", 900.0)


@pytest.fixture(autouse=True, scope="session")
def loops_end_with_nothing_open() -> Iterator[None]:
    """Fail a test that ends an asyncio loop with an open connection.

    The garbage collector would fail an unrelated test later. uvloop closes its connections.
    """
    close = BaseSelectorEventLoop.close

    def close_and_look(loop: BaseSelectorEventLoop) -> None:
        left: list[asyncio.Transport] = [] if loop.is_closed() else list(loop._transports.values())  # type: ignore[attr-defined]
        close(loop)
        still_open = [transport for transport in left if transport._sock is not None]  # type: ignore[attr-defined]
        said = [f"{transport._protocol!r} {transport._sock}" for transport in still_open]  # type: ignore[attr-defined]
        for transport in still_open:
            transport._sock.close()  # type: ignore[attr-defined]
            transport._sock = None  # type: ignore[attr-defined]
        assert not said, f"a loop ended with connections still open: {said}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseSelectorEventLoop, "close", close_and_look)
        yield


class ServerPair(NamedTuple):
    """The files of a server's certificate and key."""

    certificate: Path
    key: Path


class ServerPairs(NamedTuple):
    ecdsa: ServerPair
    rsa: ServerPair


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """Create an authority that the tests' clients trust."""
    import trustme  # here, so that tests without certificates do not load it

    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="session")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="session")
def server_pairs(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> ServerPairs:
    """Return a server's certificates for localhost, one per key type."""
    import trustme

    folder = tmp_path_factory.mktemp("pairs")
    pairs: list[ServerPair] = []
    for kind in (trustme.KeyType.ECDSA, trustme.KeyType.RSA):
        issued = ca.issue_cert("localhost", "127.0.0.1", key_type=kind)
        pair = ServerPair(folder / f"{kind.name}.pem", folder / f"{kind.name}.key")
        issued.cert_chain_pems[0].write_to_path(pair.certificate)
        issued.private_key_pem.write_to_path(pair.key)
        pairs.append(pair)
    return ServerPairs(*pairs)


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of managed certificates, which servers copy."""
    from zcproto.certs import managed
    from zcproto.certs.managed import ManagedSettings

    folder = tmp_path_factory.mktemp("own") / "certs"
    settings = ManagedSettings(
        names=(),
        key_types=("ecdsa-p256",),
        lifetime=timedelta(days=90),
        renew_before=timedelta(days=30),
        renew_key=False,
    )
    managed.ensure(folder, settings, datetime.now(UTC))
    return folder


@pytest.fixture
def serve(tmp_path: Path, certs: Path) -> Iterator[Callable[..., ServerThread]]:
    """Return a function that starts a server, which is drained at the end of the test."""
    from tests.server.helpers import ServerThread

    with ExitStack() as stack:

        def start(app: App | None = None, **options: Any) -> ServerThread:
            return stack.enter_context(ServerThread(tmp_path / "home", certs, app, **options))

        yield start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[ServerThread]:
    """Start one server for all tests of a module that do not change it."""
    from tests.server.helpers import ServerThread

    with ServerThread(tmp_path_factory.mktemp("shared") / "home", certs) as server:
        yield server


@pytest.fixture(autouse=True)
def log_of_a_fresh_process() -> Iterator[None]:
    """Restore the log after tests that configure it, as `serve` does."""
    with pytest.MonkeyPatch.context() as patch:
        state = log_module._LogState()
        patch.setattr(log_module, "_state", state)
        yield
    state.output.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def timers() -> FakeTimers:
    return FakeTimers()


@pytest.fixture
def registry() -> SessionRegistry:
    return small_registry()


@pytest.fixture
def pair() -> ConnectionPair:
    """Return a connection on which only WELCOME was sent."""
    return ConnectionPair()
