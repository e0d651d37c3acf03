"""Replacing the certificates in a server's folder, as `zcproto cert renew` and `zcproto cert rotate` do it.

Everything goes by the files, under their folder's lock. The server is told of nothing: it has to see for itself.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from bench.rotation.plan import RotationPlan
from zcproto.certs import CertificatePair, own
from zcproto.config.model import CertificatesConfig
from zcproto.errors import CertificateError

ECDSA: Final = "ecdsa"
NICENESS: Final = 15


class Rotated(NamedTuple):
    """One rotation. Times are monotonic seconds."""

    number: int
    """From 1; 0 is what was there before the first."""
    new_key: bool
    began: float
    done: float
    """When the files were in place."""
    leaves: dict[str, str]
    """The new certificates: SHA-256 of each in hex, by its key family."""
    problem: str = ""
    """Why it failed, if it did."""


def _step_back() -> None:
    """Take the processor only when nobody else wants it: this is another program's work, not the server's."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Rotator:
    """Rotates at a steady rate and keeps account of it. `on_rotated` is called on the loop after each."""

    def __init__(
        self,
        plan: RotationPlan,
        directory: Path,
        settings: own.OwnSettings,
        on_rotated: Callable[[Rotated], None] = lambda rotated: None,
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._settings = settings
        self._on_rotated = on_rotated
        self.history: list[Rotated] = []

    def note_first(self) -> None:
        """Take down what is there. Raises CertificateError if that cannot be served."""
        began = time.monotonic()
        kept = own.keep(self._directory, self._settings, datetime.now(UTC))
        self.history = [Rotated(0, False, began, time.monotonic(), _leaves(kept.pairs))]

    async def run(self, start: float) -> None:
        """All rotations, the first an interval after `start`. One that is late is not left out."""
        for number in range(1, self._plan.rotations + 1):
            await asyncio.sleep(start + number * self._plan.interval_s - time.monotonic())
            rotated = await asyncio.to_thread(self.rotate, number)
            self.history.append(rotated)
            self._on_rotated(rotated)

    def rotate(self, number: int) -> Rotated:
        """One rotation, in the caller's thread."""
        _step_back()
        new_key = number % self._plan.new_key_every == 0 and self._ecdsa_settings is not None
        began = time.monotonic()
        try:
            made = self._rotate(new_key)
        except CertificateError as error:
            return Rotated(number, new_key, began, time.monotonic(), {}, str(error))
        return Rotated(number, new_key, began, time.monotonic(), _leaves(made.pairs))

    def _rotate(self, new_key: bool) -> own.OwnCertificates:
        now = datetime.now(UTC)
        if not new_key:
            return own.renew(self._directory, self._settings, now)
        # RSA keys take seconds to make, which would be measured here and not what the server does with them.
        assert self._ecdsa_settings is not None
        return own.rotate(self._directory, self._ecdsa_settings, now, at_once=True)

    @property
    def _ecdsa_settings(self) -> own.OwnSettings | None:
        wanted = [key_type for key_type in self._settings.key_types if _family(key_type) == ECDSA]
        return replace(self._settings, key_types=wanted) if wanted else None


def settings_of(section: CertificatesConfig) -> own.OwnSettings:
    """The settings by which the server of this configuration makes its certificates."""
    return own.OwnSettings(
        names=section.names,
        key_types=section.key_types,
        lifetime=timedelta(seconds=section.lifetime),
        renew_before=timedelta(seconds=section.renew_before),
        renew_key=section.renew_key,
        announce_key=timedelta(seconds=section.announce_key),
    )


def _leaves(pairs: tuple[CertificatePair, ...]) -> dict[str, str]:
    return {_family(pair.key_type): pair.leaf_sha256.hex() for pair in pairs}


def _family(key_type: str) -> str:
    return key_type.partition("-")[0]
