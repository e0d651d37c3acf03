"""A site whose certificates are ordered from a fake CA, with its clocks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.certs.acme.fake_ca import DIRECTORY, FakeCa, check_files
from tests.certs.harness import MANAGED
from tests.certs.support import NOW
from tests.helpers import FakeClock
from zcproto.certs.acme.orders import Visit, VisitResult, Wanted, carry_out
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.settings import AcmeSettings, AcmeSite

NAMES = ("zcp.example.com", "www.example.com")


def acme_site(folder: Path, *, managed: dict[str, Any] | None = None, **changes: Any) -> AcmeSite:
    values = {name: getattr(MANAGED, name) for name in MANAGED.__slots__} | {"names": NAMES} | (managed or {})
    return AcmeSite(
        folder / "certs",
        ManagedSettings(**values),
        AcmeSettings(**({"directory": DIRECTORY, "names": NAMES} | changes)),
    )


class Sleeps:
    """Waiting that only advances a clock."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self._clock.advance(seconds)


class Desk:
    """Carries out visits to a fake CA without a network and without waiting."""

    def __init__(self, site: AcmeSite, now: Callable[[], datetime] = lambda: NOW) -> None:
        self.site = site
        self.clock = FakeClock()
        self.sleeps = Sleeps(self.clock)
        began = self.clock.now()
        self.ca = FakeCa(lambda: now() + timedelta(seconds=self.clock.now() - began))
        self.ca.check = check_files(site.directory / "challenges")
        self.sentences: list[str] = []

    async def visit(self, visit: Visit, now: datetime = NOW) -> VisitResult:
        return await carry_out(
            self.site,
            visit,
            now,
            progress=self.sentences.append,
            fetch_url=self.ca.fetch,
            sleep=self.sleeps,
            clock=self.clock,
        )


def wanted(site: AcmeSite, **changes: Any) -> Wanted:
    stem = "server-ecdsa"
    values = {"key_type": "ecdsa-p256", "key": site.managed_directory / f"{stem}.key", "why": "a test"}
    return Wanted(**(values | changes))
