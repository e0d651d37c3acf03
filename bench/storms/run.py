"""Carrying out storms and mixes, each on a server of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from bench.storms.lines import Helper
from bench.storms.outcome import Felt, Mix, Storm
from bench.storms.stage import Stage, memory_bytes
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.errors import Code, ZcprotoError
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor

CROWD: Final = "bench.storms.crowd"
HONEST: Final = "bench.storms.honest"
HOSTILE: Final = "bench.storms.hostile"

NO_ADMISSION: Final = 65_536
"""Handshakes at once: the most that can be configured, and more than there are."""

FOR_EVER_S: Final = 3_600.0
AFTER_S: Final = 0.5
"""Seconds of load after the last of a crowd was served."""

KINDS: Final = ("slow", "garbage", "replay", "deaf")
ALONE: Final[tuple[str, tuple[str, ...]]] = ("the honest alone", ())
MIXES: Final = (ALONE, *((f"{kind} ones", (kind,)) for kind in KINDS), ("all kinds", KINDS))
"""Names, and who is hostile."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StormPlan:
    """What is asked for. Rates are of all honest ones together."""

    clients: int = 10_000
    """Of a crowd; and in a mix, the honest and the hostile together."""
    honest: int = 50
    """That are in when a crowd comes."""
    rate: float = 500.0
    rest_s: float = 5.0
    seconds: float = 10.0
    """Of each mix."""
    hostile_share: float = 0.2
    comes_back_s: float = 5.0
    """Before who was thrown out connects again."""
    within_s: float = 60.0
    """Seconds after which a crowd gives up."""

    @property
    def hostile(self) -> int:
        return round(self.clients * self.hostile_share)


async def storms(plan: StormPlan, home: Home, say: Say) -> list[Storm]:
    """A crowd that loses its server, with the default of handshake admission and then without any."""
    stage = Stage(home, plan.clients + plan.honest, "sqlite")  # sessions have to be there after the kill
    crowd_users, honest_users = stage.users("crowd", plan.clients), stage.users("honest", 2 * plan.honest)
    default = Config().tls.max_handshakes
    found: list[Storm] = []
    with stage.server():
        pass  # it makes its certificates
    async with Helper(CROWD, stage.share(crowd_users)) as crowd:
        with stage.server() as server:
            say(f"{plan.clients:,} clients open a session each ...")
            await crowd.ask("open", port=server.port)
            server.kill()
        for title, admission in (("with admission", default), ("without admission", NO_ADMISSION)):
            credentials = honest_users[len(found) * plan.honest :][: plan.honest]
            with stage.server(admission) as server:
                storm = await _storm(plan, stage, server, crowd, credentials, say, title, admission)
                found.append(dataclasses.replace(storm, has_bars=admission == default))
                server.kill()
    return found


async def _storm(
    plan: StormPlan,
    stage: Stage,
    server: DemoServer,
    crowd: Helper,
    credentials: list[Credential],
    say: Say,
    title: str,
    admission: int,
) -> Storm:
    share = stage.share(credentials, port=server.port, rate=plan.rate)
    async with Helper(HONEST, share) as honest:
        await honest.ask("open")
        at_rest = Felt.of(await honest.ask("load", seconds=plan.rest_s))
        before, _ = memory_bytes(server.pid)
        say(f"{title}: all come back at once ...")
        async with _loading(honest) as loaded:
            told = await crowd.ask("come_back", port=server.port, within_s=plan.within_s)
            await asyncio.sleep(AFTER_S)
        checked = await crowd.ask("check")
        after, peak = memory_bytes(server.pid)
        stats = await stage.stats(server.port)
    return Storm(
        title=title,
        admission=admission,
        clients=plan.clients,
        honest=plan.honest,
        at_rest=at_rest,
        meanwhile=Felt.of(loaded),
        served_s=sorted(told["served_s"]),
        answered=checked["answered"],
        tries=told["tries"],
        wrong=told["wrong"],
        begun_s=told["begun_s"],
        cpu_share=told["cpu_share"],
        causes=told["causes"],
        memory_before=before,
        memory_after=after,
        memory_peak=peak,
        tls_failures=stats["tls_failures"],
        longest_pause_s=stats["longest_pause_s"],
    )


@asynccontextmanager
async def _loading(honest: Helper) -> AsyncIterator[dict[str, Any]]:
    """The honest ones ask as long as the body runs; then the map has what they tell."""
    told: dict[str, Any] = {}
    load = asyncio.create_task(honest.ask("load", seconds=FOR_EVER_S))
    try:
        yield told
        await honest.ask("stop")
        told.update(await load)
    finally:
        load.cancel()
        await asyncio.wait({load})


async def mixes(plan: StormPlan, home: Home, say: Say) -> list[Mix]:
    """The honest alone, then among hostile ones of each kind, then among all kinds."""
    pattern = Stage(home, plan.clients, "memory")
    honest_users = pattern.users("honest", plan.clients - plan.hostile)
    hostile_users = pattern.users("hostile", plan.hostile)
    with pattern.server():
        pass  # it makes its certificates
    found = []
    for title, kinds in MIXES:
        say(f"a mix: {title} ...")
        with pattern.server() as server:
            found.append(await _mix(plan, pattern, server, title, kinds, honest_users, hostile_users))
    return found


async def _mix(
    plan: StormPlan,
    stage: Stage,
    server: DemoServer,
    title: str,
    kinds: tuple[str, ...],
    honest_users: list[Credential],
    hostile_users: list[Credential],
) -> Mix:
    counts: dict[str, Any] = {}
    share = stage.share(honest_users, port=server.port, rate=plan.rate)
    async with Helper(HONEST, share) as honest:
        await honest.ask("open")
        if not kinds:
            felt = Felt.of(await honest.ask("load", seconds=plan.seconds))
        else:
            share = stage.share(hostile_users, port=server.port, kinds=kinds, comes_back_s=plan.comes_back_s)
            async with Helper(HOSTILE, share) as hostile, _loading(honest) as loaded:
                # A fifth of the time for them to come: as a storm they would be another measurement.
                await hostile.ask("begin", over_s=plan.seconds / 5)
                await asyncio.sleep(plan.seconds * 4 / 5)
                counts = await hostile.ask("end")
            felt = Felt.of(loaded)
        _, peak = memory_bytes(server.pid)
        stats = await stage.stats(server.port)
    causes = counts.pop("causes", {})
    return Mix(
        title=title,
        kinds=kinds,
        hostile=len(hostile_users) if kinds else 0,
        honest=len(honest_users),
        felt=felt,
        memory_peak=peak,
        counts=counts,
        causes=causes,
        longest_pause_s=stats["longest_pause_s"],
        replays_refused=stats["errors"].get(str(int(Code.REPLAYED)), 0),
    )


def run_all(plan: StormPlan, home: Home, only: str | None, say: Say) -> list[Storm | Mix]:
    """What is asked for: storms, mixes, or both. Raises ZcprotoError for what cannot be gone on with."""
    found: list[Storm | Mix] = []
    for name, conduct in (("storm", storms), ("mix", mixes)):
        if only in (None, name):
            folder = Home(home.path / name)
            folder.path.mkdir(mode=0o700)
            with on_processor(1):
                found += asyncio.run(conduct(plan, folder, say))
            shutil.rmtree(folder.path)
    if not found:
        raise ZcprotoError(f"there is no such measurement: {only}")
    return found
