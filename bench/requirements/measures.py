"""Rows that are figures: measured by the other modules of bench, and what of them a row shows."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from bench.curves.echoes import BIG_FRAMES, ECHO_CONNECTIONS, Cost, echo_cost, requests_of, sessions_on
from bench.curves.watch import Watched, load_new_server
from bench.micro import certificate_loading, hsts_header
from bench.micro.timing import NS_PER, quantile, timed
from bench.report import Row
from bench.requirements.finding import Finding, Scale
from bench.requirements.sizes import FULL, Sizes
from bench.scenarios.rotation import RotationOutcome, RotationPlan, rotate_under_load
from bench.stage import CLIENT_CPU, HOST, NAME, Stages, bench_environment, cpu_seconds
from zcproto.config.model import KEY_TYPES
from zcproto.errors import ZcprotoError
from zcproto.load.hdr import percentiles_ms
from zcproto.load.processes import module_command, on_processor
from zcproto.load.record import Latencies
from zcproto.load.report import generator_saturated
from zcproto.load.result import Verdict

PAYLOADS: Final = (16, 256, 4_096, 65_536, 1_048_576)
TIMEOUT_S: Final = 30.0
MICRO_TIMEOUT_S: Final = 300.0

MAX_HANDSHAKE_MS: Final = 100.0
AIM_HANDSHAKE_MS: Final = 20.0
MAX_CHECK_US: Final = 1_000.0
AIM_CHECK_US: Final = 5.0
MAX_LOADING_MS: Final = 50.0
AIM_LOADING_MS: Final = 10.0
MAX_HSTS_NS: Final = 1_000_000.0
AIM_HSTS_NS: Final = 1_000.0
MAX_TOKENS_MB: Final = 100.0
AIM_TOKENS_MB: Final = 30.0
MIN_CLEANED: Final = 1_000.0
AIM_CLEANED: Final = 100_000.0
MAX_SLICE_MS: Final = 5.0
MAX_PAUSE_MS: Final = 10.0


# --- handshakes -------------------------------------------------------------------------------------------


class Handshakes(NamedTuple):
    """Handshakes with a server that does nothing else."""

    latencies: Latencies
    cpu_ms: float
    """CPU of the server for one."""


def handshakes_at_rest(stages: Stages, sizes: Sizes) -> dict[str, Handshakes]:
    """Connect again and again with each key type, and time from TCP connect to the end of the handshake."""
    found = {}
    for key_type in KEY_TYPES:
        settings = {
            "certificates.key_types": [key_type],
            "log.level": "warning",
            "tls.handshake_timeout": "30s",  # on a busy machine
        }
        with stages.new(f"handshakes-{key_type}", settings).serve() as server, on_processor(CLIENT_CPU):
            context, latencies = server.context(), Latencies()
            _connect(server.port, context)  # a server's first handshake loads what all later ones reuse
            before = cpu_seconds(server.pid)
            for _ in range(sizes.handshakes):
                latencies.add(_connect(server.port, context))
            spent = cpu_seconds(server.pid) - before
            found[key_type] = Handshakes(latencies, spent / sizes.handshakes * 1000)
    return found


def _connect(port: int, context: ssl.SSLContext) -> float:
    begin = time.perf_counter()
    with (
        socket.create_connection((HOST, port), TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname=NAME),
    ):
        return time.perf_counter() - begin


def at_rest_row(found: Mapping[str, Handshakes], sizes: Sizes, scale: Scale) -> Finding:
    p99 = {key_type: percentiles_ms(each.latencies)["p99"] for key_type, each in found.items()}
    worst = scale.time(max(p99.values()))
    return Finding(
        "p99 "
        + ", ".join(f"{value:.1f} ms with {key_type}" for key_type, value in p99.items())
        + scale.note(f"{worst:.1f} ms"),
        worst < MAX_HANDSHAKE_MS,
        aim=scale.time(p99["ecdsa-p256"]) < AIM_HANDSHAKE_MS,
        small=sizes.handshakes < FULL.handshakes,
        values={f"p99_ms_{key_type}": value for key_type, value in p99.items()}
        | {f"cpu_ms_{key_type}": each.cpu_ms for key_type, each in found.items()},
    )


# --- many connections -------------------------------------------------------------------------------------


def many_connections(stages: Stages, sizes: Sizes, scale: Scale) -> Watched:
    """Raises ConfigError if the system does not allow so many.

    Connections arrive as much slower as the machine is: at a rate that it cannot serve, their waits would be
    the length of a queue.
    """
    rates = (sizes.rate, sizes.load_s, scale.offered(sizes.arrival_rate))
    return load_new_server(stages.folder / "many", sizes.connections, *rates, stages.certificates)


def arriving_row(watched: Watched, sizes: Sizes, scale: Scale) -> Finding | None:
    found = percentiles_ms(watched.result.record.latencies["handshake"])
    if not found:
        return None
    arrived, p99 = watched.result.connected, scale.time(found["p99"])
    late = "; the generator was late itself: a busy machine" if generator_saturated(watched.result) else ""
    return Finding(
        f"p99 {found['p99']:.1f} ms of {arrived:,} at {scale.offered(sizes.arrival_rate):,.0f} a second{late}"
        + scale.note(f"{p99:.1f} ms"),
        p99 < MAX_HANDSHAKE_MS,
        small=arrived < FULL.connections,
        values={f"{name}_ms": value for name, value in found.items()},
    )


def connections_row(watched: Watched, sizes: Sizes) -> Finding:
    result = watched.result
    kib, verified = result.kib_per_connection, result.verified_connections
    holds = result.verdict is Verdict.VERIFIED
    memory = "" if kib is None else f", {kib:.1f} KiB each"
    figure = f"{verified:,} verified, counted by both sides{memory}"
    return Finding(
        figure if holds else f"{verified:,} verified; " + "; ".join(result.reasons()[:3]),
        holds,
        small=sizes.connections < FULL.connections,
        values={"verified": verified} | ({} if kib is None else {"kib_per_connection": kib}),
    )


# --- tokens -----------------------------------------------------------------------------------------------


def token_figures(stages: Stages, sizes: Sizes) -> dict[str, float]:
    """Measure tokens in a process of their own: memory is measured from a fresh one."""
    out = stages.folder / "tokens.json"
    words = ["--tokens", str(sizes.tokens), "--checks", str(sizes.checks), "--json", str(out)]
    done = subprocess.run(
        module_command("bench", "micro", "token_check", *words),
        capture_output=True,
        text=True,
        timeout=MICRO_TIMEOUT_S,
        env=bench_environment(),
        check=False,
    )
    if not out.exists():  # otherwise it has measured, and its exit code is about its own bars
        raise ZcprotoError(f"token_check did not measure: {done.stderr[-200:]}")
    rows = json.loads(out.read_text())["figures"]["figure"]
    return {key: float(row["value"]) for key, row in rows.items()}


def check_row(figures: Mapping[str, float], sizes: Sizes, scale: Scale) -> Finding:
    p999, p50 = figures["check_p99_9_us"], figures["check_p50_us"]
    counted = scale.time(p999)
    return Finding(
        f"p99.9 {p999:.1f} us, p50 {p50:.1f} us" + scale.note(f"{counted:.1f} us"),
        counted < MAX_CHECK_US,
        aim=counted < AIM_CHECK_US,
        small=sizes.checks < FULL.checks,
        values={"p99_9_us": p999, "p50_us": p50, "single_p99_9_us": figures["single_p99_9_us"]},
    )


def memory_row(figures: Mapping[str, float], sizes: Sizes) -> Finding:
    megabytes, each = figures["memory_mb"], figures["memory_a_token"]
    return Finding(
        f"{megabytes:.1f} MB, {each:.0f} bytes a token",
        megabytes < MAX_TOKENS_MB,
        aim=megabytes < AIM_TOKENS_MB,
        small=sizes.tokens < FULL.tokens,
        values={"mb": megabytes, "bytes_a_token": each},
    )


def cleanup_row(figures: Mapping[str, float], sizes: Sizes, scale: Scale) -> Finding:
    rate = min(figures["lapsing_rate"], figures["ending_rate"])
    longest = max(figures["lapsing_slice_longest_ms"], figures["ending_slice_longest_ms"])
    counted, rate_counted = scale.time(longest), scale.rate(rate)
    return Finding(
        f"{rate:,.0f} a second, longest slice {longest:.2f} ms"
        + scale.note(f"{rate_counted:,.0f} a second and {counted:.2f} ms"),
        rate_counted >= MIN_CLEANED and counted < MAX_SLICE_MS,
        aim=rate_counted >= AIM_CLEANED and counted < MAX_SLICE_MS,
        small=sizes.tokens < FULL.tokens,
        values={"a_second": rate, "longest_slice_ms": longest},
    )


# --- certificates and HSTS ----------------------------------------------------------------------------------


def loading_row(stages: Stages, sizes: Sizes, scale: Scale) -> Finding:
    """Load both key types from the disk, checked, into a new context."""
    files = certificate_loading.files_in(stages.new("loading").home.certs)
    times = timed(lambda: certificate_loading.load(files), sizes.loads)
    median, p99 = (quantile(times, share) / NS_PER["ms"] for share in (0.5, 0.99))
    counted = scale.time(p99)
    return Finding(
        f"p50 {median:.1f} ms, p99 {p99:.1f} ms" + scale.note(f"p99 {counted:.1f} ms"),
        counted < MAX_LOADING_MS,
        aim=scale.time(median) < AIM_LOADING_MS,
        small=sizes.loads < FULL.loads,
        values={"p50_ms": median, "p99_ms": p99},
    )


def hsts_row(sizes: Sizes, scale: Scale) -> Finding:
    figures = {row.key: row.value or 0.0 for row in hsts_header.measure(sizes.responses)}
    added, alone, whole = figures["added_ns"], figures["alone_ns"], figures["without_p50_us"]
    counted = scale.time(max(added, alone))
    return Finding(
        f"{added:,.0f} ns, of {whole:.0f} us a response; its own part {alone:,.0f} ns"
        + scale.note(f"{counted:,.0f} ns"),
        counted < MAX_HSTS_NS,
        aim=counted < AIM_HSTS_NS,
        small=sizes.responses < FULL.responses,
        values={"added_ns": added, "its_own_part_ns": alone},
    )


# --- rotation ---------------------------------------------------------------------------------------------


def rotations(stages: Stages, sizes: Sizes) -> RotationOutcome:
    plan = RotationPlan(
        rotations=sizes.rotations,
        interval_s=sizes.rotation_interval_s,
        rest_s=sizes.rotation_rest_s,
        connections=sizes.rotation_connections,
        rate=sizes.rotation_rate,
    )
    outcome = rotate_under_load(stages.folder / "rotation", plan, certificates=stages.certificates)
    if outcome.load.interrupted:
        raise KeyboardInterrupt  # the run handles the first one, and returns what there is
    return outcome


def rotation_row(outcome: RotationOutcome, sizes: Sizes) -> Finding:
    rows = {row.key: row for row in outcome.rows()}
    done, lost = rows["rotations"].value or 0.0, rows["requests_lost"].value or 0.0
    failed = rows["newcomers_failed"].value or 0.0
    causes = [
        *outcome.load.reasons(),
        *(f"{row.label}: {_value(row)}" for row in rows.values() if not row.holds),
    ]
    good = f"{done:,.0f} rotations, {lost:,.0f} requests lost, {failed:,.0f} new connections failed"
    rate = rows["rotation_rate"].value
    return Finding(
        f"{good}; {'; '.join(causes[:3])}" if causes else good,
        not causes,
        aim=not causes and done >= FULL.rotations,
        small=sizes.rotations < FULL.rotations,
        values={"rotations": done, "requests_lost": lost, "newcomers": rows["newcomers"].value or 0.0}
        | ({} if rate is None else {"rotations_a_second": rate}),
    )


def _value(row: Row) -> str:
    return "not measured" if row.value is None else f"{row.figure} {row.unit}".rstrip()


def stall_row(outcome: RotationOutcome, sizes: Sizes, scale: Scale) -> Finding | None:
    span = outcome.rotating
    if span is None:
        return None
    rest = "" if outcome.at_rest is None else f", {outcome.at_rest.longest_own_ms:.1f} ms before the first"
    counted = scale.time(span.longest_own_ms)
    return Finding(
        f"{span.longest_own_ms:.1f} ms of its own{rest}; {span.longest_ms:.1f} ms with other programs' time"
        + scale.note(f"{counted:.1f} ms"),
        counted < MAX_PAUSE_MS,
        small=sizes.rotations < FULL.rotations,
        values={"longest_own_ms": span.longest_own_ms, "longest_ms": span.longest_ms},
    )


# --- figures that have a plot and no row ---------------------------------------------------------------------


def cost_by_payload(stages: Stages, sizes: Sizes) -> dict[int, Cost]:
    """Return the server CPU for one request, by its payload in bytes."""
    stage = stages.new("payload", BIG_FRAMES)
    users = stage.add_users_for("echo", ECHO_CONNECTIONS)
    with stage.serve() as server, on_processor(CLIENT_CPU):
        connections = sessions_on(server, users)
        costs = {
            payload: echo_cost(
                server.pid, connections, payload, 1, requests_of(payload, sizes.payload_requests)
            )
            for payload in PAYLOADS
        }
        for connection in connections:
            connection.close()
    return costs
