"""What happens to a server in a soak: certificates rotated, its configuration reloaded, its disk full."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import resource
import signal
import time
from typing import Any, Final, cast

from bench.rotation.plan import RotationPlan
from bench.rotation.rotator import Rotator, settings_of
from bench.soak.plan import SoakPlan
from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.tls.transport import TlsTransport

SEEN_S: Final = 15.0
"""Within which what was changed has to be seen by new connections."""

RECOVER_S: Final = 30.0
"""Within which a store is well again when the disk has room."""

LOOK_S: Final = 0.05
MOST_STREAMS: Final = (100, 128)
"""What `limits.max_streams` is set to, by turns: more than clients have in flight."""


class Harm:
    """To one server. `stats` is how to ask it for its own figures."""

    def __init__(self, plan: SoakPlan, home: Home, pid: int, place: Place, watcher: Caller) -> None:
        self._plan = plan
        self._home = home
        self._pid = pid
        self._place = place
        self._watcher = watcher
        self._rotations = 0
        config = load_config(None, home=home.path, environ={})
        self._rotator = Rotator(
            RotationPlan(new_key_every=3), config.certificates.directory, settings_of(config.certificates)
        )

    async def rotate(self) -> None:
        """Replace the certificate by the files, and wait until it is served. Raises ZcprotoError if it is not."""
        self._rotations += 1
        rotated = await asyncio.to_thread(self._rotator.rotate, self._rotations)
        if rotated.problem:
            raise ZcprotoError(rotated.problem)
        end = time.monotonic() + SEEN_S
        while await self._served() not in rotated.leaves.values():
            if time.monotonic() > end:
                raise ZcprotoError(f"the new certificate was not served within {SEEN_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def _served(self) -> str:
        caller = await self._place.caller()
        try:
            tls = cast("TlsTransport", caller.transport).get_extra_info("ssl_object")
            return hashlib.sha256(tls.getpeercert(binary_form=True)).hexdigest()
        finally:
            await caller.leave()

    async def reload(self, chance: random.Random) -> None:
        """Change a limit, and wait until new connections are told of it. Raises ZcprotoError if they are not."""
        streams = chance.randrange(*MOST_STREAMS)
        write_config(self._plan, self._home, streams)
        os.kill(self._pid, signal.SIGHUP)
        end = time.monotonic() + SEEN_S
        while await self._told_streams() != streams:
            if time.monotonic() > end:
                raise ZcprotoError(f"the new configuration was not in force within {SEEN_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def _told_streams(self) -> int:
        caller = await self._place.caller()
        try:
            return int(caller.conversation.welcome["max_streams"])
        finally:
            await caller.leave()

    async def fill_disk(self, seconds: float) -> None:
        """Let no file of the server grow for so long, then wait until its store is well. Raises ZcprotoError if it
        is not: as on a full disk, every write fails."""
        before = resource.prlimit(self._pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._pid, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            await asyncio.sleep(seconds)
        finally:
            resource.prlimit(self._pid, resource.RLIMIT_FSIZE, before)
        end = time.monotonic() + RECOVER_S
        while (await self.stats())["store"]["state"] != "healthy":
            if time.monotonic() > end:
                raise ZcprotoError(f"the store was not well within {RECOVER_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = await self._watcher.call("server.stats", {})
        return stats


def write_config(plan: SoakPlan, home: Home, max_streams: int) -> None:
    """The whole configuration; only the number of streams is ever another."""
    home.config.write_text(
        f'[sessions]\nlifetime = "{plan.lifetime_s:g}s"\nrefresh_lifetime = "{plan.refresh_lifetime_s:g}s"\n'
        'idle_timeout = "off"\nopen_timeout = "5m"\n'
        "per_user = 100000    # a session whose answer was lost is let go, and nobody ends it\n\n"
        f"[limits]\nconnections_per_address = 0\nmax_streams = {max_streams}\n\n"
        '[certificates]\nkey_types = ["ecdsa-p256"]\nwatch_interval = "500ms"\n\n'
        '[store]\ncleanup_interval = "2s"\n\n'
        f'[log]\nfile = "{home.path / "server.log"}"\nformat = "json"\n',
        encoding="utf-8",
    )
    home.config.chmod(0o600)
