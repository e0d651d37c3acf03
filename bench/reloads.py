"""A server that reads its configuration again and again under load: no request fails, no connection is lost.

    python -m bench.reloads [--reloads 50] [--connections 500] [--rate 5000] [--json FILE]

- A server in a process of its own; a generator in another process, with connections that have a session each and
  whose every answer is checked (`zcproto.load`).
- This process changes the file and asks for a reload by the control socket, every half second: half of the reloads
  bring other values (limits, sessions, alerts, headers, certificates), one in ten a file with faults, the others
  the file that is in force already.
- What each reload must answer is known: the keys that changed and no others, or the faults. After one with faults
  the reload that follows must find nothing changed.

Exit code: 0 if all targets are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.micro.token_check import Figure, conclude
from bench.rotation.__main__ import positive, whole
from bench.rotation.run import LoadingView, one_processor
from zcproto.auth import UserFile
from zcproto.common.event_loop import new_event_loop
from zcproto.common.home import Home
from zcproto.common.local_socket import address_of
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load import report as load_report
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import PAYLOAD_BYTES, SERVER_SPARE, SPARE_CONNECTIONS, temporary_home
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential, Plan, check_plan, require_open_files
from zcproto.load.progress import new_console, view_for
from zcproto.load.result import Result, Verdict
from zcproto.load.run import Stop, run
from zcproto.load.tally import Kind

HOST: Final = "127.0.0.1"
INTERVAL_S: Final = 0.5
TAIL_S: Final = 1.0
ANSWER_S: Final = 30.0
BAD_EVERY: Final = 10
ARRIVAL_RATE: Final = 200.0
CANNOT: Final = 2
INTERRUPTED: Final = 130

CHANGES: Final[tuple[dict[str, tuple[str, str]], ...]] = (
    {"limits.max_streams": ("100", "120"), "freshness.tolerance": ('"20s"', '"25s"')},
    {"sessions.per_user": ("10", "20"), "sessions.idle_timeout": ('"40m"', '"50m"')},
    {"certificates.alert_days": ("[20]", "[21]")},
    {"alerts.replays": ("3", "4"), "alerts.quiet": ('"10m"', '"11m"')},
    {"http.hsts_max_age_seconds": ("100", "200"), "http.metrics": ('"off"', '"open"')},
    {"limits.login_failures": ("7", "8"), "limits.write_timeout": ('"15s"', '"16s"')},
)
"""Keys that are changed together, each from one value to the other and back."""

FAULTY: Final = "\n[limits]\nmax_streams = 0\n"
"""A value out of range in a section that is there twice: no TOML at all."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Report:
    """What has been seen so far."""

    reloads: int = 0
    changing: int = 0
    keys: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers that were other ones than they had to be."""
    seconds: list[float] = field(default_factory=list)
    load: Result | None = None

    def figures(self, plan: ReloadPlan) -> list[Figure]:
        took = sorted(self.seconds) or [0.0]
        load = self.load
        asked = [] if load is None else [load.record.tallies[kind] for kind in (Kind.LOAD, Kind.LAST)]
        verified = 0 if load is None else load.verified_connections
        lost = plan.connections if load is None else sum(load.record.lost_links.values())
        return [
            Figure("reloads", self.reloads, "", plan.reloads, at_least=True),
            Figure("of these with changed values", self.changing, "", plan.reloads // 2, at_least=True),
            Figure("keys that changed", self.keys, ""),
            Figure(
                "of these with faults, and refused",
                self.refused,
                "",
                plan.reloads // BAD_EVERY,
                at_least=True,
            ),
            Figure("reloads that did other than they must", len(self.wrong), "", 1),
            Figure("reload, p50", took[len(took) // 2] * 1e3, "ms"),
            Figure("reload, longest", took[-1] * 1e3, "ms"),
            Figure("requests answered with what was sent", sum(each.equal for each in asked), ""),
            Figure("requests a second asked for", plan.rate, ""),
            Figure("requests failed", sum(each.failed for each in asked), "", 1),
            Figure("connections lost", lost, "", 1),
            Figure("connections that answered to the end", verified, "", plan.connections, at_least=True),
        ]


@dataclass(frozen=True, slots=True)
class ReloadPlan:
    """One run."""

    reloads: int = 50
    connections: int = 500
    rate: float = 5_000.0
    interval_s: float = INTERVAL_S

    @property
    def load_s(self) -> float:
        return self.reloads * self.interval_s + TAIL_S


class Settings:
    """The file, and what a reload of it must answer."""

    def __init__(self, home: Home, connections: int) -> None:
        self._path = home.config
        self._fixed = {
            "limits.max_connections": str(connections + SPARE_CONNECTIONS),
            "limits.connections_per_address": "0",
            "certificates.key_types": '["ecdsa-p256"]',
            "log.file": f'"{home.path / "server.log"}"',
        }
        self._turns = [0] * len(CHANGES)
        self._next = 0
        self.write()

    def change(self) -> set[str]:
        """Bring other values into the file; the keys that have them."""
        index = self._next % len(CHANGES)
        self._next += 1
        self._turns[index] ^= 1
        self.write()
        return set(CHANGES[index])

    def write(self, more: str = "") -> None:
        values = dict(self._fixed)
        for turn, changes in zip(self._turns, CHANGES, strict=True):
            values |= {key: both[turn] for key, both in changes.items()}
        sections: dict[str, list[str]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, []).append(f"{name} = {value}")
        text = "\n".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in sections.items())
        self._path.write_text(text + more, encoding="utf-8")
        self._path.chmod(0o600)


def ask_reload(home: Home) -> tuple[int, Any]:
    """Ask the server of this home folder for a reload: the status, and what it answered. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected, address_of(home.control) as address:
        connected.settimeout(ANSWER_S)
        connected.connect(address)
        connection = http.client.HTTPConnection("localhost", timeout=ANSWER_S)
        connection.sock = connected
        connection.request("POST", "/v1/reload", "{}")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


class Reloads:
    """Reloads beside a load."""

    def __init__(self, plan: ReloadPlan, home: Home, settings: Settings, report: Report, say: Say) -> None:
        self._plan = plan
        self._home = home
        self._settings = settings
        self._report = report
        self._say = say

    async def run(self, loading: asyncio.Event) -> None:
        await loading.wait()
        start = time.monotonic()
        for number in range(1, self._plan.reloads + 1):
            await asyncio.sleep(start + (number - 1) * self._plan.interval_s - time.monotonic())
            try:
                await self._reload(number)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._report.wrong.append(f"reload {number}: {type(error).__name__}")
            if number % max(1, self._plan.reloads // 10) == 0:
                self._say(f"reload {number:,} of {self._plan.reloads:,}, {len(self._report.wrong)} wrong")

    async def _reload(self, number: int) -> None:
        is_bad = number % BAD_EVERY == 0
        keys: set[str] = set()
        if is_bad:
            self._settings.write(FAULTY)
        elif number % 2:
            keys = self._settings.change()
        began = time.monotonic()
        status, answer = await asyncio.to_thread(ask_reload, self._home)
        report = self._report
        report.seconds.append(time.monotonic() - began)
        report.reloads += 1
        if is_bad:
            self._settings.write()
            report.refused += status == 422
            if status != 422:
                report.wrong.append(f"reload {number}: a file with faults was answered with {status}")
            return
        changed = {each["key"] for each in answer["changed"]} if status == 200 else set()
        if status != 200 or changed != keys or answer["restart"]:
            report.wrong.append(f"reload {number}: {status}, {sorted(changed)} instead of {sorted(keys)}")
        report.changing += bool(keys)
        report.keys += len(changed)


def measure(home: Home, plan: ReloadPlan, console: Console, say: Say) -> tuple[Report, Result]:
    """All of it, in this home folder. Raises ConfigError for what cannot be measured."""
    users = UserFile(home.users)
    operator = Credential("operator", users.add("operator", operator=True))
    names = [f"load-{number}" for number in range(1, -(-plan.connections // SESSIONS_PER_USER) + 1)]
    credentials = tuple(Credential(*each) for each in users.add_many(names))
    report, settings = Report(), Settings(home, plan.connections)
    with DemoServer(home.path) as server:
        load = Plan(
            host=HOST,
            port=server.port,
            connections=plan.connections,
            sessions=plan.connections,
            rate=plan.rate,
            duration_s=plan.load_s,
            payload_bytes=PAYLOAD_BYTES,
            credentials=credentials,
            operator=operator,
            arrival_rate=ARRIVAL_RATE,
            ca_file=home.certs / "ca.crt",
        )
        check_plan(load)
        with (
            one_processor(),
            view_for(console) as view,
            asyncio.Runner(loop_factory=new_event_loop) as runner,
        ):
            reloads = Reloads(plan, home, settings, report, say)
            result = runner.run(_beside(reloads, load, LoadingView(view)))
    report.load = result
    return report, result


async def _beside(reloads: Reloads, load: Plan, view: LoadingView) -> Result:
    loop, stop = asyncio.get_running_loop(), Stop()
    loop.add_signal_handler(signal.SIGINT, stop.request)
    beside = asyncio.create_task(reloads.run(view.loading))
    try:
        result = await run(load, view, stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        beside.cancel()
        await asyncio.wait({beside})
    if not beside.cancelled():
        beside.result()  # a fault of its own is none to be silent about
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reloads", description=(__doc__ or "").split("\n")[0]
    )
    usual = ReloadPlan()
    parser.add_argument("--reloads", type=whole, default=usual.reloads, help="how many")
    parser.add_argument("--interval", type=positive, default=usual.interval_s, help="seconds between two")
    parser.add_argument("--connections", type=whole, default=usual.connections, help="each with a session")
    parser.add_argument("--rate", type=positive, default=usual.rate, help="requests a second, over all")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    plan = ReloadPlan(options.reloads, options.connections, options.rate, options.interval)
    console = new_console()
    try:
        check_outputs(Outputs(json=options.json))
        require_open_files(
            plan.connections + SERVER_SPARE, plan.connections, lambda limit: limit - SERVER_SPARE
        )
        with temporary_home() as home:
            report, result = measure(home, plan, console, lambda line: console.print(line, highlight=False))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except ZcprotoError as error:
        print(error, file=sys.stderr)
        return 1
    load_report.show(result, console, {})
    for wrong in report.wrong[:10]:
        print(wrong, file=sys.stderr)
    code = conclude(report.figures(plan), options.json)
    if result.verdict is Verdict.INTERRUPTED:
        print("interrupted: the figures are those of a part of the run, and nothing is proven")
        return INTERRUPTED
    passed = code == 0 and result.verdict is Verdict.VERIFIED
    if passed:
        print(
            f"passed: {plan.reloads:,} reloads under {plan.rate:,g} requests a second, none failed,"
            f" {plan.connections:,} connections undisturbed"
        )
    else:
        print("failed: " + "; ".join([*result.reasons(), *report.wrong[:3]] or ["see the table"]))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
