"""A certificate checker with its clocks, and the files that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.certs.support import DAY, NOW, build, pem, pem_of_key
from tests.helpers import raising
from zcproto.certs.checker import CertificateChecker, CheckResult
from zcproto.certs.external import ExternalSite
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.pair import CertificatePair
from zcproto.certs.settings import CertificateSettings, ManagedSite

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
MANAGED = ManagedSettings(
    names=("zcp.example.com",),
    key_types=("ecdsa-p256",),
    lifetime=90 * DAY,
    renew_before=30 * DAY,
    renew_key=False,
    host_names=("localhost",),
)


class Harness:
    """A checker with its clocks and its progress sentences."""

    maintains = True

    def __init__(
        self, settings: CertificateSettings, environ: Mapping[str, str] | None = None, now: datetime = NOW
    ) -> None:
        self.settings = settings
        self.environ = environ or {}
        self.now = now
        self.monotonic = 5000.0
        self.sentences: list[str] = []
        self.restart()

    def restart(self, rest: Callable[[], None] = lambda: None) -> None:
        self.checker = CertificateChecker(
            self.settings,
            ("zcp/1",),
            random=lambda: 0.5,
            environ=self.environ,
            progress=self.sentences.append,
            rest=rest,
            maintains=self.maintains,
        )

    def check(self, after: timedelta = SECOND, *, sleeps: timedelta = timedelta(0)) -> CheckResult:
        """A check after so much time; `sleeps` moves the wall clock alone, either way."""
        self.now += after + sleeps
        self.monotonic += after.total_seconds()
        return self.checker.check(self.now, self.monotonic)

    def checks(self, count: int, after: timedelta = SECOND) -> list[CheckResult]:
        return [self.check(after) for _ in range(count)]

    def settle(self) -> None:
        """Lets it see what it has just written itself."""
        for _ in range(3):
            assert self.check().notices == ()

    @property
    def served(self) -> CertificatePair:
        return self.checker.sites[0].pairs[0]


def kinds(*outcomes: CheckResult) -> list[str]:
    return [notice.kind.value for outcome in outcomes for notice in outcome.notices]


def messages(*outcomes: CheckResult) -> str:
    return "\n".join(notice.message for outcome in outcomes for notice in outcome.notices)


def managed_harness(folder: Path, **changes: Any) -> Harness:
    settings = ManagedSettings(**{**{name: getattr(MANAGED, name) for name in MANAGED.__slots__}, **changes})
    return Harness(CertificateSettings(ManagedSite(folder / "certs", settings)))


def disk_fails(monkeypatch: pytest.MonkeyPatch, error: int, *functions: str) -> None:
    for function in functions:
        monkeypatch.setattr(os, function, raising(OSError(error, os.strerror(error))))


def write(folder: Path, stem: str, key: Any, *names: str, **changes: Any) -> tuple[Path, Path]:
    san = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    certificate, key_path = folder / f"{stem}.crt", folder / f"{stem}.key"
    certificate.write_bytes(pem(build(key, extensions=[san], **changes)))
    key_path.touch(0o600)
    key_path.write_bytes(pem_of_key(key))
    return certificate, key_path


def external_site(folder: Path, stem: str, *names: str) -> ExternalSite:
    return ExternalSite(names, (folder / f"{stem}.crt",), (folder / f"{stem}.key",))
