"""Test the certificate manager with a public CA: orders on request, other settings, the end."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.certs.acme.fake_ca import DIRECTORY
from tests.certs.acme.support import Desk
from tests.server.helpers import TIMEOUT, configuration
from zcproto.certs import checker as checker_module
from zcproto.certs.acme import source as source_module
from zcproto.certs.acme.orders import Visit, VisitResult
from zcproto.certs.acme.source import AcmeSource
from zcproto.certs.manager import CertificateManager
from zcproto.certs.settings import acme_site
from zcproto.common.clock import system_clock
from zcproto.errors import CertificateError


def settings(home: Path, **changes: Any) -> Any:
    return configuration(
        home,
        **{
            "certificates__mode": "acme",
            "certificates__names": ["a.example"],
            "acme__directory": DIRECTORY,
            "acme__terms_agreed": True,
            **changes,
        },
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(0o700)
    return folder


@pytest.fixture
def desk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    site = acme_site(settings(home))
    assert site is not None
    made = Desk(site, lambda: datetime.now(UTC))

    async def carry_out(site: object, visit: Visit, now: datetime, progress: object) -> VisitResult:
        return await made.visit(visit, now)

    monkeypatch.setattr(source_module, "carry_out", carry_out)
    return made


async def started(home: Path, **changes: Any) -> CertificateManager:
    manager = CertificateManager(settings(home, **changes), system_clock, ["zcp/1"])
    await manager.start()
    return manager


def source_of(manager: CertificateManager) -> AcmeSource:
    assert manager.checker.acme is not None
    return manager.checker.acme


async def test_order_is_served_when_it_returns(home: Path, desk: Desk) -> None:
    manager = await started(home)
    await manager.order({"ecdsa"})
    assert manager.serving.pairs[0].certificate.parent.name == "acme"
    first = manager.serving.pairs[0]
    await manager.order({"ecdsa"})
    assert manager.serving.pairs[0] != first


async def test_failed_order_raises(home: Path, desk: Desk) -> None:
    manager = await started(home)
    desk.ca.down = "no route"
    with pytest.raises(CertificateError, match="no route; check acme"):
        await manager.order({"ecdsa"})
    assert manager.serving.pairs[0].certificate.parent.name == "certs"


async def test_own_certificates_cannot_be_ordered(home: Path) -> None:
    manager = await started(home, certificates__mode="own")
    with pytest.raises(CertificateError, match='must be "acme"'):
        await manager.order({"ecdsa"})


async def test_other_settings_end_the_visit(home: Path, desk: Desk) -> None:
    begun, over = threading.Event(), threading.Event()

    async def endless(visit: Visit, now: datetime) -> VisitResult:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            over.set()
        raise AssertionError

    manager = await started(home)
    source_of(manager).visits.work = endless
    await manager.check()
    assert await asyncio.to_thread(begun.wait, TIMEOUT)
    await manager.reconfigure(settings(home, acme__challenge="http-01", http__redirect_port=80), lambda: None)
    assert await asyncio.to_thread(over.wait, TIMEOUT)


async def test_settings_that_fail_end_nothing(
    home: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await started(home)
    closed: list[bool] = []
    monkeypatch.setattr(AcmeSource, "close", lambda self: closed.append(self is source_of(manager)))
    monkeypatch.setattr(checker_module.CertificateChecker, "_prove", refuse)
    with pytest.raises(CertificateError, match="refused"):
        await manager.reconfigure(settings(home, certificates__names=["b.example"]), lambda: None)
    assert closed == [False]


def refuse(self: object) -> None:
    raise CertificateError("refused")


async def test_end_of_the_manager_ends_the_visit(home: Path, desk: Desk) -> None:
    manager = await started(home)
    running = asyncio.create_task(manager.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert source_of(manager).visits.is_stopped
