"""Rows that are figures: what is measured, by the rooms beside this one, and what of it a row shows."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from typing import Final, NamedTuple

from rich.console import Console

from bench.compare.__main__ import CLIENT_CPU, SERVER_CPU, cpu_seconds
from bench.curves.echoes import Cost, echo_cost, sessions_on
from bench.curves.watch import Watched, watched_run
from bench.micro import certificate_loading, hsts_header
from bench.requirements.finding import Finding
from bench.requirements.homes import HOST, NAME, TIMEOUT, House, Workshop
from bench.requirements.sizes import FULL, Sizes
from bench.rotation.outcome import Outcome
from bench.rotation.plan import RotationPlan
from bench.rotation.run import run_in
from bench.row import Row
from zcproto.config.model import KEY_TYPES
from zcproto.errors import ZcprotoError
from zcproto.load.demo.run import SERVER_SPARE, SPARE_CONNECTIONS
from zcproto.load.figures import generator_saturated
from zcproto.load.hdr import percentiles_ms
from zcproto.load.latency import Latencies
from zcproto.load.plan import Plan, require_open_files
from zcproto.load.processes import module_command, module_environment, on_processor
from zcproto.load.progress import view_for
from zcproto.load.result import Verdict

PAYLOAD_BYTES: Final = 64
PAYLOADS: Final = (16, 256, 4_096, 65_536, 1_048_576)
ECHO_CONNECTIONS: Final = 20
LEAST_REQUESTS: Final = 20
BIG_FRAMES: Final = "[limits]\nmax_frame_bytes = 4194304\nconnections_per_address = 0\n"
MICRO_TIMEOUT: Final = 300.0

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


def handshakes_at_rest(workshop: Workshop, sizes: Sizes) -> dict[str, Handshakes]:
    """With each key type: one connection after the other, from TCP connect to the end of the handshake."""
    found = {}
    for key_type in KEY_TYPES:
        config = f"[certificates]\nkey_types = ['{key_type}']\n[log]\nlevel = 'warning'\n"
        house = workshop.house(f"handshakes-{key_type}", config)
        with house.serve(processor=SERVER_CPU) as served, on_processor(CLIENT_CPU):
            context, latencies = served.context(), Latencies()
            served.leaf()  # a server's first handshake loads what all later ones find there
            before = cpu_seconds(served.pid)
            for _ in range(sizes.handshakes):
                begin = time.perf_counter()
                with (
                    socket.create_connection((HOST, served.port), TIMEOUT) as raw,
                    context.wrap_socket(raw, server_hostname=NAME),
                ):
                    latencies.add(time.perf_counter() - begin)
            spent = cpu_seconds(served.pid) - before
            found[key_type] = Handshakes(latencies, spent / sizes.handshakes * 1000)
    return found


def at_rest_row(found: dict[str, Handshakes], sizes: Sizes) -> Finding:
    p99 = {key_type: percentiles_ms(each.latencies)["p99"] for key_type, each in found.items()}
    return Finding(
        "p99 " + ", ".join(f"{value:.1f} ms with {key_type}" for key_type, value in p99.items()),
        max(p99.values()) < MAX_HANDSHAKE_MS,
        aim=p99["ecdsa-p256"] < AIM_HANDSHAKE_MS,
        small=sizes.handshakes < FULL.handshakes,
        values={f"p99_ms_{key_type}": value for key_type, value in p99.items()}
        | {f"cpu_ms_{key_type}": each.cpu_ms for key_type, each in found.items()},
    )


# --- many connections -------------------------------------------------------------------------------------


def many_connections(workshop: Workshop, sizes: Sizes, console: Console) -> Watched:
    """Raises ConfigError if the system does not allow so many."""
    return load_on(workshop, "many", sizes.connections, sizes.rate, sizes.load_s, sizes.arrival_rate, console)


def load_on(
    workshop: Workshop,
    name: str,
    connections: int,
    rate: float,
    load_s: float,
    arrival_rate: float,
    console: Console,
) -> Watched:
    """A load of so many connections, each with its session, on a new server in a house of this name."""
    require_open_files(connections + SERVER_SPARE, connections, lambda limit: limit - SERVER_SPARE)
    config = (
        f"[limits]\nmax_connections = {connections + SPARE_CONNECTIONS}\nconnections_per_address = 0\n"
        f'[log]\nfile = "{workshop.folder / f"{name}.log"}"\n'
    )
    house = workshop.house(name, config, sessions=connections)
    with house.serve() as served, view_for(console) as view:
        plan = Plan(
            host=HOST,
            port=served.port,
            connections=connections,
            sessions=connections,
            rate=rate,
            duration_s=load_s,
            payload_bytes=PAYLOAD_BYTES,
            credentials=house.users,
            operator=house.operator,
            arrival_rate=arrival_rate,
            ca_file=served.ca_file,
        )
        return watched_run(plan, view)


def arriving_row(watched: Watched, sizes: Sizes) -> Finding | None:
    found = percentiles_ms(watched.result.record.latencies["handshake"])
    if not found:
        return None
    arrived = watched.result.connected
    late = "; the generator was late itself: a busy machine" if generator_saturated(watched.result) else ""
    return Finding(
        f"p99 {found['p99']:.1f} ms of {arrived:,} at {sizes.arrival_rate:,.0f} a second{late}",
        found["p99"] < MAX_HANDSHAKE_MS,
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


def token_figures(workshop: Workshop, sizes: Sizes) -> dict[str, float]:
    """bench.micro.token_check in a process of its own: memory is measured from a fresh one."""
    out = workshop.folder / "tokens.json"
    words = ["--tokens", str(sizes.tokens), "--checks", str(sizes.checks), "--json", str(out)]
    done = subprocess.run(
        module_command("bench.micro.token_check", *words),
        capture_output=True, text=True, timeout=MICRO_TIMEOUT, env=module_environment(), check=False,
    )  # fmt: skip
    if not out.exists():  # else it has measured, and its exit code is about its own bars
        raise ZcprotoError(f"bench.micro.token_check did not measure: {done.stderr[-200:]}")
    return {row["name"]: float(row["value"]) for row in json.loads(out.read_text())}


def check_row(figures: dict[str, float], sizes: Sizes) -> Finding:
    p999 = figures["check, p99.9"]
    return Finding(
        f"p99.9 {p999:.1f} us, p50 {figures['check, p50']:.1f} us",
        p999 < MAX_CHECK_US,
        aim=p999 < AIM_CHECK_US,
        small=sizes.checks < FULL.checks,
        values={
            "p99_9_us": p999,
            "p50_us": figures["check, p50"],
            "single_p99_9_us": figures["single times, p99.9"],
        },
    )


def memory_row(figures: dict[str, float], sizes: Sizes) -> Finding:
    megabytes = figures["memory above the empty registry"]
    return Finding(
        f"{megabytes:.1f} MB, {figures['memory a token']:.0f} bytes a token",
        megabytes < MAX_TOKENS_MB,
        aim=megabytes < AIM_TOKENS_MB,
        small=sizes.tokens < FULL.tokens,
        values={"mb": megabytes, "bytes_a_token": figures["memory a token"]},
    )


def cleanup_row(figures: dict[str, float], sizes: Sizes) -> Finding:
    rate = min(figures["tokens lapsed a second"], figures["sessions ended a second"])
    longest = max(figures["longest slice, lapsing"], figures["longest slice, ending"])
    return Finding(
        f"{rate:,.0f} a second, longest slice {longest:.2f} ms",
        rate >= MIN_CLEANED and longest < MAX_SLICE_MS,
        aim=rate >= AIM_CLEANED and longest < MAX_SLICE_MS,
        small=sizes.tokens < FULL.tokens,
        values={"a_second": rate, "longest_slice_ms": longest},
    )


# --- certificates and HSTS ----------------------------------------------------------------------------------


def loading_row(house: House, sizes: Sizes) -> Finding:
    """Both key types from the disk, checked, into a new context."""
    folder = house.home.certs
    files = [
        certificate_loading.Files(key_type, folder / f"{name}.crt", folder / f"{name}.key")
        for key_type, name in zip(KEY_TYPES, ("server", "server-ecdsa"), strict=True)
    ]
    times = certificate_loading.timed(lambda: certificate_loading.load(files), sizes.loads)
    median, p99 = (certificate_loading.quantile(times, share) for share in (0.5, 0.99))
    return Finding(
        f"p50 {median:.1f} ms, p99 {p99:.1f} ms",
        p99 < MAX_LOADING_MS,
        aim=median < AIM_LOADING_MS,
        small=sizes.loads < FULL.loads,
        values={"p50_ms": median, "p99_ms": p99},
    )


def hsts_row(sizes: Sizes) -> Finding:
    figures = {each.name: each.value for each in hsts_header.measure(sizes.responses)}
    added, alone = figures["added by the header"], figures["its own part alone"]
    whole = figures["a response without it, p50"]
    return Finding(
        f"{added:,.0f} ns, of {whole:.0f} us a response; its own part {alone:,.0f} ns",
        max(added, alone) < MAX_HSTS_NS,
        aim=max(added, alone) < AIM_HSTS_NS,
        small=sizes.responses < FULL.responses,
        values={"added_ns": added, "its_own_part_ns": alone},
    )


# --- rotation ---------------------------------------------------------------------------------------------


def rotations(workshop: Workshop, sizes: Sizes, console: Console) -> Outcome:
    plan = RotationPlan(
        rotations=sizes.rotations,
        interval_s=sizes.rotation_interval_s,
        rest_s=sizes.rotation_rest_s,
        connections=sizes.rotation_connections,
        rate=sizes.rotation_rate,
    )
    house = workshop.house("rotation")
    house.home.users.unlink()  # the run makes its own users
    outcome = run_in(house.home, plan, console)
    if outcome.load.interrupted:
        raise KeyboardInterrupt  # it takes the first one for itself, and gives what there is
    return outcome


def rotation_row(outcome: Outcome, sizes: Sizes) -> Finding:
    rows = {row.key: row for row in outcome.count_rows()}
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
    return "not measured" if row.value is None else f"{row.value:,.3g} {row.unit}".rstrip()


def stall_row(outcome: Outcome, sizes: Sizes) -> Finding | None:
    span = outcome.rotating
    if span is None:
        return None
    rest = "" if outcome.at_rest is None else f", {outcome.at_rest.longest_own_ms:.1f} ms before the first"
    return Finding(
        f"{span.longest_own_ms:.1f} ms of its own{rest}; {span.longest_ms:.1f} ms with other programs' time",
        span.longest_own_ms < MAX_PAUSE_MS,
        small=sizes.rotations < FULL.rotations,
        values={"longest_own_ms": span.longest_own_ms, "longest_ms": span.longest_ms},
    )


# --- what has no row of its own, but a plot ------------------------------------------------------------------


def cost_by_payload(workshop: Workshop, sizes: Sizes) -> dict[int, Cost]:
    """Server CPU for one request, by its payload in bytes."""
    house = workshop.house("payload", BIG_FRAMES, sessions=ECHO_CONNECTIONS)
    with house.serve(processor=SERVER_CPU) as served, on_processor(CLIENT_CPU):
        connections = sessions_on(served, house.users, ECHO_CONNECTIONS)
        costs = {
            payload: echo_cost(
                served.pid, connections, payload, 1, requests_of(payload, sizes.payload_requests)
            )
            for payload in PAYLOADS
        }
        for connection in connections:
            connection.close()
    return costs


def requests_of(payload: int, most: int) -> int:
    """So many requests of this size that they take about as long as those of other sizes."""
    return max(LEAST_REQUESTS, most * 4_096 // max(4_096, payload))
