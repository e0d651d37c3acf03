"""A server reloads its configuration again and again under load: no request fails, no connection is lost.

While a load runs whose every answer is checked, this process changes the file and asks for a reload by the
control socket, every half second. Every second reload brings other values (limits, sessions, certificates,
alerts, the HTTPS side), every tenth a faulty file, the others the file that is active already.

What each reload must answer is known: the keys that changed and no others, or the faults. The reload after a
faulty one must find nothing changed.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from dataclasses import dataclass, field
from typing import Any, Final

import click

from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.report import Report, Row
from bench.scenarios.harness import ask_control, load_faults, load_rows, run_load_beside
from bench.stage import ECDSA_ONLY, Stage, check_open_files, room_for
from zcproto.common.home import Home
from zcproto.load import report as load_report
from zcproto.load.caller import Operator
from zcproto.load.demo import temporary_home
from zcproto.load.result import Result

TAIL_S: Final = 1.0
FAULTY_EVERY: Final = 10
ARRIVAL_RATE: Final = 200.0

CHANGES: Final[tuple[dict[str, tuple[Any, Any]], ...]] = (
    {"limits.max_streams": (100, 120), "freshness.tolerance": ("20s", "25s")},
    {"sessions.per_user": (10, 20), "sessions.idle_timeout": ("40m", "50m")},
    {"certificates.alert_days": ([20], [21])},
    {"alerts.stale_frames": (3, 4), "alerts.repeat": ("10m", "11m")},
    {"http.metrics": ("off", "open")},
    {"limits.login_failures": (7, 8), "limits.write_timeout": ("15s", "16s")},
)
"""Keys that are changed together, each from one value to the other and back."""

FAULTY: Final = "\n[limits]\nmax_streams = 0\n"
"""A value out of range, in a section that is there twice, which is not valid TOML."""


@dataclass(frozen=True, slots=True)
class ReloadPlan:
    """One run."""

    reloads: int = 50
    connections: int = 500
    rate: float = 5_000.0
    interval_s: float = 0.5


class Settings:
    """The configuration file, and what a reload of it must answer."""

    def __init__(self, stage: Stage, connections: int) -> None:
        self._stage = stage
        self._fixed = {**room_for(connections), **ECDSA_ONLY}
        self._turns = [0] * len(CHANGES)
        self._next = 0
        self.write()

    def change(self) -> set[str]:
        """Write other values; return their keys."""
        index = self._next % len(CHANGES)
        self._next += 1
        self._turns[index] ^= 1
        self.write()
        return set(CHANGES[index])

    def write(self, more: str = "") -> None:
        pairs = zip(self._turns, CHANGES, strict=True)
        values = {key: both[turn] for turn, changes in pairs for key, both in changes.items()}
        self._stage.configure({**self._fixed, **values}, more)


def ask_reload(home: Home) -> tuple[int, Any]:
    """Ask the server of a home folder for a reload, as `ask_control`."""
    return ask_control(home, "POST", "reload", "{}")


@dataclass(slots=True)
class Reloads:
    """Reloads beside a load, and what came of them."""

    plan: ReloadPlan
    home: Home
    settings: Settings
    reloads: int = 0
    changing: int = 0
    keys: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers that were not as they had to be."""
    seconds: list[float] = field(default_factory=list)

    async def run(self, operator: Operator) -> None:
        start, reloads = time.monotonic(), self.plan.reloads
        for number in range(1, reloads + 1):
            await asyncio.sleep(start + (number - 1) * self.plan.interval_s - time.monotonic())
            try:
                await self._reload(number)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(f"reload {number}: {type(error).__name__}")
            if number % max(1, reloads // 10) == 0:
                progress(f"reload {number:,} of {reloads:,}, {len(self.wrong)} wrong")

    async def _reload(self, number: int) -> None:
        is_faulty, keys = number % FAULTY_EVERY == 0, set[str]()
        if is_faulty:
            self.settings.write(FAULTY)
        elif number % 2:
            keys = self.settings.change()
        began = time.monotonic()
        status, answer = await asyncio.to_thread(ask_reload, self.home)
        self.seconds.append(time.monotonic() - began)
        self.reloads += 1
        if is_faulty:
            self.settings.write()
            self.refused += status == 422
            if status != 422:
                self.wrong.append(f"reload {number}: a faulty file was answered with {status}")
            return
        changed = {each["key"] for each in answer["changed"]} if status == 200 else set()
        if status != 200 or changed != keys or answer["restart"]:
            self.wrong.append(f"reload {number}: {status}, {sorted(changed)} instead of {sorted(keys)}")
        self.changing += bool(keys)
        self.keys += len(changed)

    def report(self, load: Result) -> Report:
        plan, took = self.plan, sorted(self.seconds) or [0.0]
        rows = [
            Row("reloads", "reloads", self.reloads, at_least=plan.reloads),
            Row("changing", "of these with changed values", self.changing, at_least=plan.reloads // 2),
            Row("keys", "keys that changed", self.keys),
            Row("refused", "faulty files refused", self.refused, at_least=plan.reloads // FAULTY_EVERY),
            Row("wrong", "reloads with a wrong answer", len(self.wrong), equals=0),
            Row("p50_ms", "reload, p50", took[len(took) // 2] * 1e3, "ms"),
            Row("longest_ms", "reload, longest", took[-1] * 1e3, "ms"),
            *load_rows(load),
        ]
        faults = [*load_faults(load), *self.wrong[:10]]
        details = {"load": load_report.as_json(load, {}, time.time())}
        return Report({"figure": rows}, faults, details=details, interrupted=load.interrupted)


def reload_under_load(home: Home, plan: ReloadPlan) -> Report:
    """Carry out a plan in a home folder. Raises ConfigError for what cannot be measured."""
    stage = Stage(home.path)
    users = stage.add_users_for("load", plan.connections)
    reloads = Reloads(plan, home, Settings(stage, plan.connections))
    with stage.serve(cpu=None) as server:
        seconds = plan.reloads * plan.interval_s + TAIL_S
        load = server.load(users, plan.connections, plan.rate, seconds, arrival_rate=ARRIVAL_RATE)
        return reloads.report(run_load_beside(load, reloads.run))


@measurement
@click.option("--reloads", type=COUNT, default=50, show_default=True, help="How many.")
@click.option("--interval", type=SECONDS, default=0.5, show_default=True, help="Seconds between two.")
@click.option("--connections", type=COUNT, default=500, show_default=True, help="Each with a session.")
@click.option("--rate", type=RATE, default=5_000.0, show_default=True, help="Requests a second, over all.")
def command(reloads: int, interval: float, connections: int, rate: float) -> Report:
    check_open_files(connections)
    with temporary_home() as home:
        return reload_under_load(home, ReloadPlan(reloads, connections, rate, interval))
