"""The store of sessions fails under a running server: its file can grow no more, as on a full disk."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from bench.requirements.certificate_checks import alert_command, alerts
from bench.requirements.finding import Facts, Finding
from bench.requirements.homes import HOST, NAME, TIMEOUT, House, Served, Workshop, get, https
from bench.requirements.session_checks import code_of, opened
from zcproto.errors import CallError, Code
from zcproto.load.caller import Caller, Place
from zcproto.load.stats import Operator

FULL_AT: Final = 4096
"""Bytes of any file that can be written then: less than a page of the store, more than a revocation takes."""

LOOK_S: Final = 0.05


def recovery(workshop: Workshop) -> Finding:
    """What sessions, openings and revocations meet with before, meanwhile and after; a restart at the end."""
    folder = workshop.folder / "alerts-store"
    folder.mkdir()
    house = workshop.house("outage", alert_command(folder), sessions=20)
    facts, seconds = Facts(), {"degraded_s": 0.0, "recovered_s": 0.0}
    with house.serve("sqlite") as served:
        tokens = served.talk(lambda place: _outage(place, served, house, folder, facts, seconds))
    with house.serve("sqlite") as served:
        good, revoked = served.talk(lambda place: _codes(place, tokens))
        facts.equal("after a restart, who was good is", good, None)
        facts.note("after a restart, who was revoked is refused", revoked is not None, revoked)
    return facts.finding(
        f"known ones go on, new ones wait; degraded after {seconds['degraded_s']:.1f} s, back after"
        f" {seconds['recovered_s']:.1f} s; nothing lost",
        values=seconds,
    )


async def _outage(
    place: Place, served: Served, house: House, folder: Path, facts: Facts, seconds: dict[str, float]
) -> tuple[bytes, bytes]:
    """The tokens of a session that must be good at the end, and of one that must not."""
    operator = await Operator.connect(NAME, HOST, served.port, served.ca_file, house.operator)

    async def state() -> str:
        stats = await operator.call("server.stats", {})
        return str(stats["store"]["state"])

    async def until(wanted: str) -> float | None:
        started = time.monotonic()
        while await state() != wanted:
            if time.monotonic() > started + TIMEOUT:
                return None
            await asyncio.sleep(LOOK_S)
        return time.monotonic() - started

    caller = await place.caller()
    known, doomed = [await opened(caller, who) for who in house.users[:2]]
    facts.equal("healthy before", await state(), "healthy")
    usual = resource.prlimit(served.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (FULL_AT, usual[1]))
    try:
        began = time.monotonic()
        refusals = await _refused_until(state, caller, house, began + TIMEOUT)
        facts.equal("openings are refused", {error.code for error in refusals}, {Code.UNAVAILABLE})
        delays = [error.details.get("retry_after_ms", 0) for error in refusals]
        facts.note("each with a delay", bool(delays) and min(delays) > 0, delays)
        facts.equal("then it is", await state(), "degraded")
        seconds["degraded_s"] = time.monotonic() - began
        answers = [await code_of(caller, "echo", {}, known["token"]) for _ in range(100)]
        facts.equal("100 calls of a known session", set(answers), {None})
        ready = await asyncio.to_thread(https, served, get("/readyz"))
        facts.equal("/readyz", ready.status, 503)
        facts.note("and it says why", b"store" in ready.body, ready.body[:120])
        facts.note(
            "/healthz is good", (await asyncio.to_thread(https, served, get("/healthz"))).status == 200
        )
        revoked = await caller.call("session.revoke", {"id": doomed["id"]}, doomed["token"])
        facts.equal("a revocation is taken", revoked, {"revoked": 1})
        facts.note("and holds at once", await code_of(caller, "echo", {}, doomed["token"]) is not None)
        facts.note(
            "an alert was sent",
            await _arrives(folder, "store.degraded"),
            [each["kind"] for each in alerts(folder)],
        )
    finally:
        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, usual)
    ended = time.monotonic()
    facts.note("it is healthy again by itself", await until("healthy") is not None)
    seconds["recovered_s"] = time.monotonic() - ended
    facts.note("openings are taken again", bool(await opened(caller, house.users[3])))
    facts.equal("the known session", await code_of(caller, "echo", {}, known["token"]), None)
    facts.note("the end was told", await _arrives(folder, "store.degraded", over=True))
    await caller.leave()
    await operator.leave()
    return known["token"], doomed["token"]


async def _refused_until(
    state: Callable[[], Awaitable[str]], caller: Caller, house: House, deadline: float
) -> list[CallError]:
    """Try to open sessions until the store is given up; what was answered. One failure is no outage yet."""
    refusals = []
    while await state() != "degraded" and time.monotonic() < deadline:
        try:
            await opened(caller, house.users[2])
        except CallError as error:
            refusals.append(error)
    return refusals


async def _codes(place: Place, tokens: tuple[bytes, bytes]) -> tuple[Code | None, Code | None]:
    caller = await place.caller()
    good, revoked = [await code_of(caller, "echo", {}, token) for token in tokens]
    await caller.leave()
    return good, revoked


async def _arrives(folder: Path, kind: str, *, over: bool = False) -> bool:
    started = time.monotonic()
    while time.monotonic() < started + TIMEOUT:
        if any(each["kind"] == kind and (each["ended_at"] is not None) == over for each in alerts(folder)):
            return True
        await asyncio.sleep(LOOK_S)
    return False
