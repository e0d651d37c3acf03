"""What several processes of one server share."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

import zcproto
from tests.server.helpers import ROOT, TIMEOUT
from zcproto.auth import Throttle
from zcproto.certs import managed
from zcproto.certs.settings import managed_site
from zcproto.common.clock import system_clock, system_entropy
from zcproto.config.model import AlertsConfig
from zcproto.errors import CertificateError
from zcproto.runtime.build import WorkerRole
from zcproto.workers.alerts import WorkerAlerts
from zcproto.workers.limits import SharedCounts, SharedMemory, memory_size

CLIENTS = 200
LIMIT = 50


@pytest.fixture
def port(tmp_path: Path, certs: Path) -> Iterator[int]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(certs, home / "certs")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.workers.counting_workers", str(home), str(LIMIT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()  # its workers end with it


def connect(port: int) -> list[socket.socket]:
    """Connect clients at once. Return those that are left when as many are closed as exceed the limit."""
    selector, connections = selectors.DefaultSelector(), []
    for _ in range(CLIENTS):
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", port))
        connections.append(connection)
        selector.register(connection, selectors.EVENT_READ)
    while len(connections) > LIMIT and (found := selector.select(TIMEOUT)):
        for key, _ in found:
            assert isinstance(key.fileobj, socket.socket)
            selector.unregister(key.fileobj)
            connections.remove(key.fileobj)
            key.fileobj.close()
    selector.close()
    return connections


def is_served(connection: socket.socket) -> bool:
    """Return whether a connection was accepted: then the server answers that it speaks TLS."""
    with connection, contextlib.suppress(ConnectionError):
        connection.settimeout(TIMEOUT)
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return connection.recv(100).startswith(b"HTTP/1.1 400")
    return False


def test_clients_that_race_for_the_workers_get_as_many_connections_as_their_address_may_have(
    port: int,
) -> None:
    served = sum([is_served(connection) for connection in connect(port)])
    assert LIMIT - 3 <= served <= LIMIT  # two workers may refuse the last place to each other


def role(**parts: object) -> WorkerRole:
    return WorkerRole(**parts)  # type: ignore[arg-type]


def config() -> zcproto.Config:
    return zcproto.Config(
        store=zcproto.StoreConfig(url="memory"),
        server=zcproto.ServerConfig(port=0),
        certificates=zcproto.CertificatesConfig(key_types=("ecdsa-p256",)),
    )


def test_server_of_one_process_imports_nothing_of_workers() -> None:
    program = (
        "import sys, zcproto; print(*(name for name in sys.modules if name.startswith('zcproto.workers')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout == "\n"


async def test_server_uses_the_parts_of_its_role(home: Path) -> None:
    memory = SharedMemory(bytearray(memory_size(1, 10)), 1, 10, bytes(32))
    throttle = Throttle()
    alerts = WorkerAlerts(AlertsConfig(), lambda *notice: True, clock=system_clock, entropy=system_entropy)
    worker = role(counting=memory.worker(0), maintains=False, throttle=throttle, alerts=alerts, run="w1")
    async with zcproto.Server(None, config(), home=home, control=False, role=worker) as server:
        parts = server.parts
        assert parts.login.throttle is throttle
        assert parts.alerts is alerts
        assert server.state.run == "w1"
        assert isinstance(parts.listener._by_network, SharedCounts)


async def test_process_that_does_not_maintain_issues_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="has left none"):
        async with zcproto.Server(None, config(), home=tmp_path, control=False, role=role(maintains=False)):
            pass


async def test_process_that_does_not_maintain_leaves_gone_users_to_another(home: Path) -> None:
    async with zcproto.Server(None, config(), home=home, control=False, role=role(maintains=False)) as server:
        await server.users.add("ada")
        users, devices = server.parts.users, server.parts.devices
        assert users is not None
        assert devices is not None
        server.state.registry.open("ada", client="", address="192.0.2.1", wall=server.state.clock.wall())
        zcproto_users = type(users.file)(users.file.path)
        zcproto_users.disable("ada")
        await users._check(users._on_gone_elsewhere)
        assert len(server.state.registry) == 1
        zcproto_users.enable("ada")
        await users._check(users._on_gone_elsewhere)
        assert await server.users.disable("ada") == 1  # its own change ends them
        assert len(server.state.registry) == 0


async def test_server_reports_that_it_serves_new_certificates(home: Path) -> None:
    server = zcproto.Server(None, config(), home=home, control=False)
    server.on_certificates = served = Mock()
    async with server:
        site = managed_site(server.config)
        assert site is not None
        served.assert_not_called()
        managed.renew(home / "certs", site.settings, server.parts.certificates.now())
        await server.parts.certificates.check()
        served.assert_called_once_with()
        await server.parts.certificates.check()
        served.assert_called_once_with()
