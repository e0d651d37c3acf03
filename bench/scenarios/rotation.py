"""Certificates replaced once a second under load: no request lost, no handshake failed, no long pause of the
server.

A server on certificates of both key types; a load whose every answer is checked. This process replaces the
certificates by their files alone, as `zcproto cert` does: every rotation renews all with their keys, and every
tenth gives the ECDSA certificate a new key.

Meanwhile new connections come, a few a second, use Python's own TLS, and check that the certificate they are
shown is trusted and is the newest, or was until a moment ago.

In the first half minute nothing is rotated: pauses of the server's loop then stand beside those while
certificates change, in full and without the time for which other programs had the processor. The load and this
process keep to one processor, the server to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import click

from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.report import Report, Row, counted
from bench.samples import Sample, Span
from bench.scenarios.harness import load_faults, load_rows, run_load_beside, until
from bench.stage import HOST, Server, Stage, check_open_files, room_for
from zcproto.certs import managed
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.pair import CertificatePair
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.config import load_config
from zcproto.config.model import CertificatesConfig
from zcproto.errors import CertificateError, ConnectionClosed, ZcprotoError
from zcproto.load import report as load_report
from zcproto.load.caller import Operator
from zcproto.load.demo import temporary_home
from zcproto.load.result import Moment, Result
from zcproto.tls.context import client_context
from zcproto.wire.frame import HEADER_SIZE, WELCOME

MAX_PAUSE_MS: Final = 10.0
PICKED_UP_S: Final = 1.0
"""Seconds within which a running server picks up new files: it checks its folder once in that time."""

GRACE_S: Final = 0.25
"""Seconds to read the files, to prove the new context by a handshake, and to get the processor."""

TAIL_S: Final = 0.5
"""Seconds for which new connections still come when the last certificate is served, or should be."""

LOAD_TAIL_S: Final = 1.0
"""Seconds of load after that."""

GONE_S: Final = 30.0
"""Seconds for the server to close its ends of the new connections."""

CONNECTION_S: Final = 10.0
"""Seconds for all that a new connection does."""

ECDSA: Final = "ecdsa"
NICENESS: Final = 15
PROGRESS_LINES: Final = 10

_START: Final = struct.Struct("!II")


@dataclass(frozen=True, slots=True)
class RotationPlan:
    """One run. Rates are per second."""

    rotations: int = 100
    interval_s: float = 1.0
    rest_s: float = 30.0
    """For how long the load runs without rotations, to know the pauses that machine and load cause."""
    new_key_every: int = 10
    connections: int = 1_000
    """Connections that stay from before the first rotation to after the last, each with a session."""
    rate: float = 2_000.0
    newcomers: float = 5.0
    """New connections."""
    delay_s: float = PICKED_UP_S + GRACE_S
    """For how long a new connection may still be shown the old certificate."""
    key_types: tuple[str, ...] = CertificatesConfig().key_types
    watch_interval_s: float = PICKED_UP_S

    @property
    def load_s(self) -> float:
        """For how long the load runs; new connections come until the rotations have ended."""
        return self.rest_s + self.rotations * self.interval_s + self.delay_s + TAIL_S + LOAD_TAIL_S


# --- replacing certificates --------------------------------------------------------------------------------


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


class Rotator:
    """Replaces the certificates in a server's folder. The server is not notified: it has to see the files
    change.
    """

    def __init__(self, directory: Path, settings: ManagedSettings, new_key_every: int) -> None:
        self._directory = directory
        self._settings = settings
        self._new_key_every = new_key_every
        ecdsa = [key_type for key_type in settings.key_types if _family(key_type) == ECDSA]
        self._ecdsa = replace(settings, key_types=ecdsa) if ecdsa else None
        self.history: list[Rotated] = []

    @classmethod
    def of(cls, home: Home, new_key_every: int) -> Self:
        """For the certificates of a home folder, as its configuration describes them."""
        section = load_config(None, home=home.path, environ={}).certificates
        return cls(section.directory, settings_of(section), new_key_every)

    def note_first(self) -> None:
        """Note the certificates before the first rotation. Raises CertificateError if they cannot be served."""
        began = time.monotonic()
        ensured = managed.ensure(self._directory, self._settings, datetime.now(UTC))
        self.history = [Rotated(0, False, began, time.monotonic(), _leaves(ensured.pairs))]

    async def rotate_beside(self, number: int) -> Rotated:
        """Carry out one rotation in a thread of low priority: it is another program's work, not the server's."""

        def rotate() -> Rotated:
            if sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            return self.rotate(number)

        return await asyncio.to_thread(rotate)

    def rotate(self, number: int) -> Rotated:
        """Carry out one rotation, in the caller's thread."""
        began, now = time.monotonic(), datetime.now(UTC)
        # An RSA key takes seconds to make, which would be measured here and not what the server does with it.
        ecdsa = self._ecdsa if number % self._new_key_every == 0 else None
        try:
            if ecdsa is None:
                made = managed.renew(self._directory, self._settings, now)
            else:
                made = managed.rotate(self._directory, ecdsa, now, at_once=True)
        except CertificateError as error:
            return Rotated(number, ecdsa is not None, began, time.monotonic(), {}, str(error))
        return Rotated(number, ecdsa is not None, began, time.monotonic(), _leaves(made.pairs))


def settings_of(section: CertificatesConfig) -> ManagedSettings:
    """Return the settings with which the server of this configuration makes its certificates."""
    return ManagedSettings(
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


# --- new connections ---------------------------------------------------------------------------------------


class Newcomer(NamedTuple):
    """One new connection. Times are monotonic seconds."""

    begun: float
    shaken: float
    """When the handshake was done; 0 if it failed."""
    leaf: str
    """SHA-256 in hex of the certificate that it was shown; empty if it trusts none."""
    failure: str = ""


async def connect(port: int, context: ssl.SSLContext, host: str = HOST) -> Newcomer:
    """Connect, from TCP to the server's first frame, and leave."""
    begun, shaken, leaf = time.monotonic(), 0.0, ""
    try:
        async with asyncio.timeout(CONNECTION_S):
            reader, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname=host)
            try:
                shaken = time.monotonic()
                leaf = leaf_of(writer.get_extra_info("ssl_object"))
                header = await reader.readexactly(HEADER_SIZE)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, EOFError) as error:
        return Newcomer(begun, shaken, leaf, escape_text(f"{type(error).__name__}: {error}", 160))
    is_welcome = _START.unpack_from(header)[1] == WELCOME
    return Newcomer(begun, shaken, leaf, "" if is_welcome else "the first frame was not WELCOME")


def leaf_of(tls: ssl.SSLObject) -> str:
    """Return the SHA-256 in hex of the peer's certificate."""
    certificate = tls.getpeercert(binary_form=True)
    assert certificate is not None, "the context demands one"
    return hashlib.sha256(certificate).hexdigest()


# --- the server's pauses -----------------------------------------------------------------------------------


def pause_rows(span: Span | None, bar_ms: float | None) -> list[Row]:
    """Return the figures of the server's loop over a time; without a value if it could not be read."""

    def row(
        key: str, label: str, value: Callable[[Span], float], unit: str, below: float | None = None
    ) -> Row:
        return Row(key, label, None if span is None else value(span), unit, below=below)

    pause, own = "longest pause of the server's loop", "longest, without other programs"
    return [
        row("measured_s", "measured for", lambda span: span.seconds, "s"),
        row("cpu_percent", "CPU of the server", lambda span: span.cpu_percent, "%"),
        row("over_5", "pauses over 5 ms", lambda span: span.longer_per_minute(5), "/min"),
        row("over_10", "pauses over 10 ms", lambda span: span.longer_per_minute(10), "/min"),
        row("longest_pause_ms", pause, lambda span: span.longest_ms, "ms", bar_ms),
        row("longest_own_pause_ms", own, lambda span: span.longest_own_ms, "ms", bar_ms),
    ]


# --- what it proves ----------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A certificate's place in the order in which they were made."""

    number: int
    """Of the rotation that made it; 0 is from before."""
    replaced: float | None
    """When the files of the next one of its key family were in place; None for the last."""


@dataclass(slots=True)
class RotationOutcome:
    """What a run has seen."""

    plan: RotationPlan
    load: Result
    history: list[Rotated] = field(default_factory=list)
    """The certificates before, then the rotations."""
    newcomers: list[Newcomer] = field(default_factory=list)
    tls_failures: dict[str, int] | None = None
    """Handshakes that failed at the server meanwhile, by cause; None if it could not be asked."""
    at_rest: Span | None = None
    rotating: Span | None = None

    @property
    def rotated(self) -> list[Rotated]:
        """The rotations that succeeded."""
        return [each for each in self.history[1:] if not each.problem]

    def made(self) -> dict[str, Made]:
        """Return every certificate that there was, by its SHA-256."""
        orders: dict[str, list[tuple[str, Rotated]]] = {}
        for each in self.history:
            for family, leaf in each.leaves.items():
                orders.setdefault(family, []).append((leaf, each))
        found = {}
        for order in orders.values():
            ends: list[float | None] = [later.done for _, later in order[1:]]
            for (leaf, each), replaced in zip(order, [*ends, None], strict=True):
                found[leaf] = Made(each.number, replaced)
        return found

    def ages(self) -> list[float]:
        """Return for each newcomer how long its certificate had been replaced when it came."""
        made = self.made()
        known = [(each.begun, made[each.leaf].replaced) for each in self.newcomers if each.leaf in made]
        return [0.0 if replaced is None else max(0.0, begun - replaced) for begun, replaced in known]

    def seen_after(self) -> dict[int, float]:
        """Return, by rotation, the seconds until a newcomer was shown its certificate or a later one."""
        made = self.made()
        sights = sorted((each.shaken, made[each.leaf].number) for each in self.newcomers if each.leaf in made)
        first: dict[int, float] = {}
        waiting = sorted(self.rotated, key=lambda each: each.number)
        for shaken, number in sights:
            while waiting and waiting[0].number <= number:
                each = waiting.pop(0)
                first[each.number] = max(0.0, shaken - each.done)
        return first

    def rows(self) -> list[Row]:
        plan, rotated, seen, made = self.plan, self.rotated, self.seen_after(), self.made()
        handshakes = sorted((each.shaken - each.begun) * 1000 for each in self.newcomers if each.shaken)
        failed = sum(bool(each.failure) for each in self.newcomers)
        unknown = sum(bool(each.leaf) and each.leaf not in made for each in self.newcomers)
        failures = None if self.tls_failures is None else sum(self.tls_failures.values())
        span = rotated[-1].done - rotated[0].done if len(rotated) > 1 else 0.0
        seen_numbers = {made[each.leaf].number for each in self.newcomers if each.leaf in made}
        slowest_ms = max(((each.done - each.began) * 1000 for each in rotated), default=None)
        last_seen = bool(rotated) and rotated[-1].number in seen
        waits, oldest = sorted(seen.values()), max(self.ages(), default=None)
        return [
            Row("rotations", "rotations", len(rotated), equals=plan.rotations),
            Row("new_keys", "rotations with a new key", sum(each.new_key for each in rotated)),
            Row("rotation_rate", "rotations a second", (len(rotated) - 1) / span if span else None),
            Row("rotation_longest_ms", "longest rotation, of the files alone", slowest_ms, "ms"),
            *load_rows(self.load),
            Row("newcomers", "new connections", len(self.newcomers)),
            Row("newcomers_failed", "new connections that failed", failed, equals=0),
            Row("newcomers_unknown", "new connections shown an unknown certificate", unknown, equals=0),
            Row("handshakes_failed", "handshakes that failed at the server", failures, equals=0),
            Row("handshake_p50_ms", "handshake of a new connection, p50", quantile(handshakes, 0.5), "ms"),
            Row("handshake_p99_ms", "handshake of a new connection, p99", quantile(handshakes, 0.99), "ms"),
            Row("certificates_seen", "certificates that new connections saw", len(seen_numbers)),
            Row("seen_after_p50_s", "a new certificate is seen after, p50", quantile(waits, 0.5), "s"),
            Row("seen_after_longest_s", "a new certificate is seen after, longest", max(waits, default=None), "s"),
            Row("old_longest_s", "an old certificate is shown after, longest", oldest, "s", below=plan.delay_s),
            Row("last_seen", "the last certificate is seen", int(last_seen), equals=1),
        ]  # fmt: skip

    def report(self) -> Report:
        columns = {
            "rotating": [*self.rows(), *pause_rows(self.rotating, MAX_PAUSE_MS)],
            "at rest": pause_rows(self.at_rest, None),
        }
        problems = [f"rotation {each.number} failed: {each.problem}" for each in self.history if each.problem]
        problems += [f"a new connection failed: {each.failure}" for each in self.newcomers if each.failure]
        problems += counted("handshakes failed at the server", self.tls_failures or {})
        notes = []
        longest, own_longest = columns["rotating"][-2:]
        if own_longest.holds and not longest.holds:
            notes.append(
                "the loop waited for a processor that other programs had, the load among them: this machine is too "
                "small or too busy to show the pauses of the server alone"
            )
        return Report(
            columns,
            [*load_faults(self.load), *dict.fromkeys(problems)],
            notes,
            details=self.details(),
            interrupted=self.load.interrupted,
        )

    def details(self) -> dict[str, Any]:
        origin, seen = self.history[0].done if self.history else 0.0, self.seen_after()
        return {
            "tls_failures": self.tls_failures,
            "rotations": [
                {**each._asdict(), "done": each.done - origin, "seen_after_s": seen.get(each.number)}
                for each in self.history
            ],
            "newcomers": [{**each._asdict(), "begun": each.begun - origin} for each in self.newcomers],
            "load": load_report.as_json(self.load, {}, time.time()),
        }  # fmt: skip


def quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


# --- the run -----------------------------------------------------------------------------------------------


class Rotations:
    """Rotations and new connections beside a load. `on_rotated` is called after each rotation."""

    def __init__(self, plan: RotationPlan, server: Server, on_rotated: Callable[[Rotated], None]) -> None:
        self._plan = plan
        self._port = server.port
        self._context = client_context(ca_file=server.stage.ca_file)
        self._on_rotated = on_rotated
        self._rotator = Rotator.of(server.stage.home, plan.new_key_every)
        self._rotator.note_first()
        self.history = self._rotator.history
        self.newcomers: list[Newcomer] = []
        self.at_rest: Span | None = None
        self.rotating: Span | None = None

    async def run(self, operator: Operator) -> None:
        start, is_over = time.monotonic(), asyncio.Event()
        connected = await _sample(operator)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._let_newcomers_come(start, is_over))
            rested = await self._rest_and_rotate(start, operator, connected)
            await until(self._last_is_seen, self._plan.delay_s)
            await asyncio.sleep(TAIL_S)
            self.rotating = _span(rested, await _sample(operator))
            is_over.set()

        async def are_gone() -> bool:
            now = await _sample(operator)
            return connected is None or now is None or now.connections <= connected.connections

        await until(are_gone, GONE_S)

    async def _last_is_seen(self) -> bool:
        return any(each.leaf in self.history[-1].leaves.values() for each in self.newcomers)

    async def _rest_and_rotate(
        self, start: float, operator: Operator, connected: Sample | None
    ) -> Sample | None:
        """Return the server's figures from before the first rotation."""
        plan = self._plan
        await asyncio.sleep(start + plan.rest_s - time.monotonic())
        rested = await _sample(operator)
        self.at_rest = _span(connected, rested)
        for number in range(1, plan.rotations + 1):  # one that is late is not left out
            await asyncio.sleep(start + plan.rest_s + number * plan.interval_s - time.monotonic())
            rotated = await self._rotator.rotate_beside(number)
            self.history.append(rotated)
            self._on_rotated(rotated)
            if number % max(1, plan.rotations // PROGRESS_LINES) == 0:
                progress(
                    f"rotation {number:,} of {plan.rotations:,}, {len(self.newcomers):,} new connections"
                )
        return rested

    async def _let_newcomers_come(self, start: float, is_over: asyncio.Event) -> None:
        async def come() -> None:
            self.newcomers.append(await connect(self._port, self._context))

        async with asyncio.TaskGroup() as coming:
            for number in itertools.count():
                await asyncio.sleep(start + number / self._plan.newcomers - time.monotonic())
                if is_over.is_set():
                    return
                coming.create_task(come())


async def _sample(operator: Operator) -> Sample | None:
    try:
        return Sample.of(await operator.call("server.stats", {}))
    except ConnectionClosed:  # the server is gone, which the load's result shows, too
        return None


def _span(before: Sample | None, after: Sample | None) -> Span | None:
    return None if before is None or after is None else Span(before, after)


def rotate_under_load(
    folder: Path,
    plan: RotationPlan,
    on_rotated: Callable[[Rotated], None] = lambda rotated: None,
    certificates: Path | None = None,
) -> RotationOutcome:
    """Carry out a plan on a server of this home folder. Raises ConfigError for what cannot be measured."""
    settings = {
        **room_for(plan.connections),
        "certificates.key_types": [*plan.key_types],
        "certificates.watch_interval": f"{round(plan.watch_interval_s * 1000)}ms",
    }
    stage = Stage(folder, settings, certificates=certificates)
    users = stage.add_users_for("load", plan.connections)
    with stage.serve() as server:
        load = server.load(users, plan.connections, plan.rate, plan.load_s)
        before = asyncio.run(server.stats())["tls_failures"]
        rotations = Rotations(plan, server, on_rotated)
        result = run_load_beside(load, rotations.run)
        _count_all_pauses(result, rotations)
        outcome = RotationOutcome(plan, result, rotations.history, rotations.newcomers)
        outcome.at_rest, outcome.rotating = rotations.at_rest, rotations.rotating
        with contextlib.suppress(ZcprotoError):  # the server is gone, which the load's result shows, too
            after = asyncio.run(server.stats())["tls_failures"]
            grown = {cause: count - before.get(cause, 0) for cause, count in after.items()}
            outcome.tls_failures = {cause: count for cause, count in grown.items() if count}
    return outcome


def _count_all_pauses(result: Result, rotations: Rotations) -> None:
    """Give the load's last reading the longest pause of all the load: the readings in between have reset it."""
    reading = result.readings.get(Moment.LOADED)
    if reading is not None:
        spans = [span.after.longest_s for span in (rotations.at_rest, rotations.rotating) if span is not None]
        stats = reading.stats._replace(longest_pause_s=max([reading.stats.longest_pause_s, *spans]))
        result.readings[Moment.LOADED] = reading._replace(stats=stats)


@measurement
@click.option("--rotations", type=COUNT, default=100, show_default=True, help="How many.")
@click.option("--interval", type=SECONDS, default=1.0, show_default=True, help="Seconds between two.")
@click.option("--rest", type=SECONDS, default=30.0, show_default=True, help="Seconds before the first.")
@click.option("--connections", type=COUNT, default=1_000, show_default=True, help="That stay.")
@click.option("--rate", type=RATE, default=2_000.0, show_default=True, help="Requests a second, over all.")
@click.option("--newcomers", type=RATE, default=5.0, show_default=True, help="New connections a second.")
@click.option("--delay", type=SECONDS, default=PICKED_UP_S + GRACE_S, show_default=True,
              help="Seconds in which an old certificate may be shown.")  # fmt: skip
def command(
    rotations: int,
    interval: float,
    rest: float,
    connections: int,
    rate: float,
    newcomers: float,
    delay: float,
) -> Report:
    check_open_files(connections)
    plan = RotationPlan(rotations, interval, rest, 10, connections, rate, newcomers, delay)
    progress("making users, keys and certificates (RSA-4096 takes some seconds) ...")
    with temporary_home() as home:
        return rotate_under_load(home.path, plan).report()
