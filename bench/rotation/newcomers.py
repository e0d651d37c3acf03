"""Connections that arrive while certificates change: each checks the one that it is shown, and goes.

They use Python's own TLS and not this library's, trust the authority alone, and ask for the host's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
import struct
import time
from pathlib import Path
from typing import Final, NamedTuple

from zcproto.common.text import escape_text
from zcproto.tls.context import client_context
from zcproto.wire.frame import HEADER_SIZE, WELCOME

TIMEOUT: Final = 10.0
"""Seconds for all that a newcomer does."""

_START: Final = struct.Struct("!II")


class Newcomer(NamedTuple):
    """What one connection met with. Times are monotonic seconds."""

    due: float
    begun: float
    shaken: float
    """When the handshake was done; 0 if it never was."""
    leaf: str
    """The certificate that it was shown: SHA-256 in hex; empty if it was shown none that it trusts."""
    failure: str = ""
    """What went wrong, if anything did."""


class Newcomers:
    """New connections at a steady rate."""

    def __init__(self, host: str, address: str, port: int, ca_file: Path) -> None:
        self._host = host
        self._address = address
        self._port = port
        self._context = client_context(ca_file=ca_file)
        self.met: list[Newcomer] = []

    @property
    def failed(self) -> int:
        return sum(1 for each in self.met if each.failure)

    async def run(self, start: float, rate: float, seconds: float) -> None:
        """Let them come from `start` on, for so many seconds, and wait until all are gone."""
        async with asyncio.TaskGroup() as coming:
            for number in range(round(rate * seconds)):
                due = start + number / rate
                await asyncio.sleep(due - time.monotonic())
                coming.create_task(self._come(due))

    async def _come(self, due: float) -> None:
        self.met.append(await self.come(due))

    async def come(self, due: float) -> Newcomer:
        """One of them, from TCP to the server's first frame."""
        begun, shaken, leaf = time.monotonic(), 0.0, ""
        try:
            async with asyncio.timeout(TIMEOUT):
                reader, writer = await asyncio.open_connection(
                    self._address, self._port, ssl=self._context, server_hostname=self._host
                )
                try:
                    shaken = time.monotonic()
                    leaf = _leaf(writer.get_extra_info("ssl_object"))
                    header = await reader.readexactly(HEADER_SIZE)
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):  # it has what it wants, or has failed already
                        await writer.wait_closed()
        except (OSError, EOFError) as error:
            return Newcomer(due, begun, shaken, leaf, escape_text(f"{type(error).__name__}: {error}", 160))
        if _START.unpack_from(header)[1] != WELCOME:
            return Newcomer(due, begun, shaken, leaf, "the first frame was no WELCOME")
        return Newcomer(due, begun, shaken, leaf)


def _leaf(tls: ssl.SSLObject) -> str:
    certificate = tls.getpeercert(binary_form=True)
    assert certificate is not None, "the context demands one"
    return hashlib.sha256(certificate).hexdigest()
