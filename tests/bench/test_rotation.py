"""Rotations under load: they are made, new connections check them, and faults are detected."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bench.report import Report, Row
from bench.samples import Sample, Span
from bench.scenarios import rotation as module
from bench.scenarios.rotation import (
    Newcomer,
    Rotated,
    RotationOutcome,
    RotationPlan,
    Rotator,
    connect,
    quantile,
    rotate_under_load,
    settings_of,
)
from bench.stage import Server
from tests.limits import TIMEOUT
from tests.load.helpers import plan as usual_load_plan
from tests.load.helpers import verified_result
from tests.server.conftest import Serve
from zcproto.certs.pair import load_pair
from zcproto.common.home import Home
from zcproto.config.model import CertificatesConfig
from zcproto.errors import ZcprotoError
from zcproto.load.record import RequestKind
from zcproto.load.result import Result
from zcproto.tls.context import client_context

QUICK = RotationPlan(
    rotations=4,
    interval_s=0.1,
    rest_s=0.2,
    new_key_every=2,
    connections=10,
    rate=200.0,
    newcomers=10.0,
    delay_s=0.2,
    key_types=("ecdsa-p256",),
)
PAUSES = {"longest_pause_ms", "longest_own_pause_ms"}
"""Bars that prove nothing on a machine that runs tests."""
SETTINGS = dataclasses.replace(settings_of(CertificatesConfig()), key_types=["ecdsa-p256"])


@pytest.fixture
def folder(tmp_path: Path, certs: Path) -> Path:
    """Own certificates of the key type ECDSA, to be rotated."""
    return Path(shutil.copytree(certs, tmp_path / "certs"))


# --- the rotations -----------------------------------------------------------------------------------------


def leaf_and_pin(folder: Path) -> tuple[str, str]:
    pair = load_pair(folder / "server-ecdsa.crt", folder / "server-ecdsa.key", datetime.now(UTC))
    return pair.leaf_sha256.hex(), pair.pin


def test_each_rotation_makes_new_certificate_and_every_second_new_key(folder: Path) -> None:
    rotator = Rotator(folder, SETTINGS, new_key_every=2)
    seen = [leaf_and_pin(folder)]
    rotator.note_first()
    assert leaf_and_pin(folder) == seen[0]
    rotated = []
    for number in range(1, 5):
        rotated.append(rotator.rotate(number))
        seen.append(leaf_and_pin(folder))
    leaves, pins = zip(*seen, strict=True)
    assert rotator.history[0].leaves == {"ecdsa": leaves[0]}
    assert [each.leaves for each in rotated] == [{"ecdsa": leaf} for leaf in leaves[1:]]
    assert len({*leaves}) == 5
    assert [pin != before for before, pin in itertools.pairwise(pins)] == [False, True, False, True]
    assert [each.new_key for each in rotated] == [False, True, False, True]
    assert all(each.began < each.done for each in rotated)


def test_failed_rotation_is_noted_and_next_one_succeeds(folder: Path) -> None:
    rotator = Rotator(folder, SETTINGS, 2)
    (folder / "ca.key").rename(folder / "away")
    failed = rotator.rotate(1)
    assert failed.leaves == {}
    assert "ca.key" in failed.problem
    (folder / "away").rename(folder / "ca.key")
    made = rotator.rotate(3)
    assert (made.problem, [*made.leaves]) == ("", ["ecdsa"])


def test_rsa_only_server_gets_no_new_keys(folder: Path) -> None:
    """An RSA key takes seconds to make."""
    rsa = dataclasses.replace(SETTINGS, key_types=["rsa-2048"])
    made = Rotator(folder, rsa, 2).rotate(2)
    assert (made.new_key, [*made.leaves], made.problem) == (False, ["rsa"], "")


# --- the new connections -----------------------------------------------------------------------------------


async def test_new_connection_sees_certificate_and_leaves(serve: Serve) -> None:
    server = serve()
    met = await connect(server.port, client_context(ca_file=server.home / "certs" / "ca.crt"))
    assert met.failure == ""
    assert met.leaf == leaf_and_pin(server.home / "certs")[0]
    assert met.begun < met.shaken
    server.until_left()
    assert server.stats["requests"] == 0


async def test_new_connection_refuses_other_authority_and_other_name(
    serve: Serve, ca_file: Path, folder: Path
) -> None:
    server = serve()
    other_authority = await connect(server.port, client_context(ca_file=ca_file))
    assert (other_authority.leaf, other_authority.shaken) == ("", 0.0)
    assert "unable to get local issuer certificate" in other_authority.failure
    other_name = await connect(server.port, client_context(ca_file=folder / "ca.crt"), "other.example")
    assert other_name.leaf == ""
    assert "Hostname mismatch" in other_name.failure


async def test_refused_connection_is_failure(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        met = await connect(unused.getsockname()[1], client_context(ca_file=folder / "ca.crt"))
    assert "Refused" in met.failure


async def other_server(folder: Path, greeting: bytes) -> asyncio.Server:
    """Start a server with the right certificate that sends something, or nothing, and closes."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-ecdsa.crt", folder / "server-ecdsa.key")
    return await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)


@pytest.mark.parametrize(
    ("greeting", "failure"), [(b"", "IncompleteReadError"), (b"\0" * 68, "the first frame was not WELCOME")]
)
async def test_connection_without_welcome_is_failure(folder: Path, greeting: bytes, failure: str) -> None:
    async with await other_server(folder, greeting) as server:
        port = server.sockets[0].getsockname()[1]
        met = await connect(port, client_context(ca_file=folder / "ca.crt"))
    assert failure in met.failure
    assert met.leaf == leaf_and_pin(folder)[0]


async def test_silent_server_times_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTION_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        met = await connect(silent.getsockname()[1], client_context(ca_file=folder / "ca.crt"))
    assert "TimeoutError" in met.failure


# --- what it proves ----------------------------------------------------------------------------------------


def rotated(number: int, done: float, **leaves: str) -> Rotated:
    return Rotated(number, "rsa" not in leaves and number > 0, done - 0.05, done, leaves)


HISTORY = [
    rotated(0, 0.0, rsa="r0", ecdsa="e0"),
    rotated(1, 10.0, rsa="r1", ecdsa="e1"),
    rotated(2, 11.0, ecdsa="e2"),
]


def newcomer(begun: float, leaf: str, failure: str = "") -> Newcomer:
    return Newcomer(begun, begun + 0.01 if leaf else 0.0, leaf, failure)


GOOD = [
    newcomer(9.5, "e0"),
    newcomer(10.5, "e0"),
    newcomer(10.75, "e1"),
    newcomer(11.5, "e1"),
    newcomer(12.0, "e2"),
]


def figures(at: float, longest_ms: float = 2.0, own_ms: float = 1.0, counts: int = 0) -> Sample:
    """The server's figures, with so many pauses of each length."""
    return Sample(at, at / 10, 1, 1, 1, longest_ms / 1000, own_ms / 1000, (counts,) * 11)


AT_REST = Span(figures(0.0), figures(20.0, 4.0, 3.0, counts=2))
ROTATING = Span(AT_REST.after, figures(50.0, 8.0, 7.0, counts=3))


def outcome(**changes: Any) -> RotationOutcome:
    """A good run of two rotations, but for the changes."""
    load = verified_result(plan=usual_load_plan(connections=10))
    plan = RotationPlan(rotations=2, connections=10)
    made = RotationOutcome(plan, load, [*HISTORY], [*GOOD], {}, AT_REST, ROTATING)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def row(report: Report, key: str, column: str = "rotating") -> Row:
    return report.row(key, column)


def failing(made: RotationOutcome) -> set[str]:
    return {each.key for each in made.report().columns["rotating"] if not each.holds}


def test_good_run_passes() -> None:
    made = outcome()
    report = made.report()
    assert report.reasons() == []
    assert made.ages() == [0.0, 0.5, 0.0, 0.5, 0.0]
    assert made.seen_after() == pytest.approx({1: 0.76, 2: 1.01})
    wanted = {
        "rotations": 2,
        "new_keys": 1,
        "rotation_rate": 1.0,
        "rotation_longest_ms": 50,
        "certificates_seen": 3,
        "requests_equal": 60,
        "longest_pause_ms": 8.0,
        "longest_own_pause_ms": 7.0,
        "measured_s": 30.0,
        "cpu_percent": 10.0,
        "over_5": 8 * 2,  # eight classes are longer, in 30 s
        "over_10": 7 * 2,
    }
    assert {key: row(report, key).value for key in wanted} == pytest.approx(wanted)
    assert row(report, "longest_pause_ms", "at rest").value == 4.0
    assert row(report, "longest_own_pause_ms", "at rest").value == 3.0
    assert row(report, "over_5", "at rest").value == pytest.approx(2 * 8 * 3)


def test_rsa_certificate_is_old_when_it_was_replaced_itself() -> None:
    """The second rotation made an ECDSA one alone."""
    assert outcome(newcomers=[newcomer(500.0, "r1")]).ages() == [0.0]
    assert outcome(newcomers=[newcomer(500.0, "r0")]).ages() == [490.0]


def test_two_rotations_picked_up_at_once_are_both_seen() -> None:
    made = outcome(newcomers=[newcomer(11.2, "e2")])
    assert made.seen_after() == pytest.approx({1: 1.21, 2: 0.21})
    assert row(made.report(), "last_seen").holds


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"history": HISTORY[:2]}, "rotations: 1, must be = 2"),
        (
            {"history": [*HISTORY[:2], Rotated(2, True, 11.0, 11.1, {}, "the disk is full")]},
            "rotation 2 failed: the disk is full",
        ),
        (
            {"newcomers": [*GOOD, newcomer(12.5, "e1")]},
            "certificate is shown after, longest: 1.50 s, must be <",
        ),
        ({"newcomers": GOOD[:4]}, "the last certificate is seen: 0, must be = 1"),
        ({"newcomers": []}, "an old certificate is shown after, longest: not measured s, must be < 1.25"),
        ({"newcomers": [*GOOD, newcomer(12.1, "x")]}, "shown an unknown certificate: 1, must be = 0"),
        ({"newcomers": [*GOOD, newcomer(12.1, "", "reset")]}, "a new connection failed: reset"),
        ({"newcomers": [*GOOD, newcomer(12.1, "", "reset")]}, "new connections that failed: 1, must be = 0"),
        ({"tls_failures": {"not_tls": 2}}, "handshakes failed at the server: not_tls 2"),
        ({"tls_failures": {"not_tls": 2}}, "handshakes that failed at the server: 2, must be = 0"),
        ({"tls_failures": None}, "handshakes that failed at the server: not measured, must be = 0"),
        ({"rotating": None}, "longest pause of the server's loop: not measured ms, must be < 10"),
        (
            {"rotating": Span(AT_REST.after, figures(50.0, 10.4, 9.0))},
            "longest pause of the server's loop: 10.40 ms, must be < 10",
        ),
        (
            {"rotating": Span(AT_REST.after, figures(50.0, 12.0, 10.4))},
            "longest, without other programs: 10.40 ms, must be < 10",
        ),
    ],
)
def test_fault_fails_and_is_named(changes: dict[str, Any], reason: str) -> None:
    reasons = outcome(**changes).report().reasons()
    assert [each for each in reasons if reason in each], reasons


def lose_a_request(load: Result) -> None:
    load.record.tallies[RequestKind.LOAD].equal -= 1
    load.record.tallies[RequestKind.LOAD].lost += 1


def lose_a_connection(load: Result) -> None:
    load.record.tallies[RequestKind.LAST].equal -= 1
    load.record.lost_connections["closed by the server"] = 1


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lose_a_request, "requests lost: 1, must be = 0"),
        (lose_a_request, "1 request of the load got no answer"),
        (lose_a_connection, "connections that answered to the end: 9, must be = 10"),
    ],
)
def test_fault_of_load_fails(harm: Callable[[Result], None], reason: str) -> None:
    made = outcome()
    harm(made.load)
    assert any(reason in each for each in made.report().reasons())


def test_pause_caused_by_other_programs_fails_and_is_noted() -> None:
    report = outcome(rotating=Span(AT_REST.after, figures(50.0, 10.4, 9.0))).report()
    assert report.exit_code == 1
    assert any("a processor that other programs had" in note for note in report.notes)


def test_incomplete_stats_are_error() -> None:
    with pytest.raises(ZcprotoError, match="'connections'"):
        Sample.of({"cpu_s": 1.0})


def test_interrupted_run_proves_nothing() -> None:
    made = outcome()
    made.load.interrupted = True
    assert made.report().exit_code == 130


def test_run_without_any_figure_fails() -> None:
    made = RotationOutcome(RotationPlan(rotations=2, connections=10), Result(usual_load_plan()))
    assert made.report().exit_code == 1
    assert json.loads(json.dumps(made.report().as_json()))["passed"] is False


def test_json_has_every_rotation_and_connection_and_no_key() -> None:
    written = json.loads(json.dumps(outcome().report().as_json()))
    assert [each["seen_after_s"] for each in written["rotations"]] == [
        None,
        pytest.approx(0.76),
        pytest.approx(1.01),
    ]
    assert [each["new_key"] for each in written["rotations"]] == [False, False, True]
    assert written["newcomers"][1]["begun"] == 10.5
    assert written["load"]["verified_connections"] == 10
    assert "the right key" not in json.dumps(written)


def test_quantile_of_empty_list_is_missing() -> None:
    assert quantile([], 0.5) is None
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0], 1.0) == 3.0


# --- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with certificates, so that no RSA key of 4096 bits is made; for short runs."""
    monkeypatch.setattr(module, "TAIL_S", 0.2)
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    folder.rename(path / "certs")
    return Home(path)


def test_server_that_ignores_new_certificates_fails_and_loses_nothing(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rotate_under_load(home.path, dataclasses.replace(QUICK, watch_interval_s=3600.0))
    assert len(made.rotated) == 4
    assert {each.leaf for each in made.newcomers} == {made.history[0].leaves["ecdsa"]}
    assert made.tls_failures == {}
    assert failing(made) - PAUSES == {"old_longest_s", "last_seen"}
    assert made.load.reasons() == []
    printed = capsys.readouterr()
    assert "loading: " in printed.out
    assert "rotation 4 of 4, " in printed.err


def test_server_that_picks_up_certificates_passes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has as much time for it as it needs."""
    monkeypatch.setattr(RotationPlan, "load_s", 2.0)
    made = rotate_under_load(home.path, dataclasses.replace(QUICK, watch_interval_s=0.1, delay_s=TIMEOUT))
    assert failing(made) - PAUSES == set()
    assert (row(made.report(), "certificates_seen").value or 0) > 1


def test_failed_handshake_is_counted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = started_servers(monkeypatch)

    def scan(rotated: Rotated) -> None:
        with socket.create_connection(("127.0.0.1", servers[0].port), timeout=TIMEOUT) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while plain.recv(4096):
                pass

    made = rotate_under_load(home.path, dataclasses.replace(QUICK, rotations=1), scan)
    assert made.tls_failures == {"plaintext_http": 1}


def started_servers(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """The servers that are started from now on."""
    servers: list[Server] = []
    inner = Server.__enter__

    def enter(server: Server) -> Server:
        servers.append(server)
        return inner(server)

    monkeypatch.setattr(Server, "__enter__", enter)
    return servers


def test_server_that_dies_fails_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = started_servers(monkeypatch)

    def kill_first(rotated: Rotated) -> None:
        if rotated.number == 1:  # while the load runs
            servers[0].kill()

    made = rotate_under_load(home.path, QUICK, kill_first)
    assert made.tls_failures is None
    assert {"connections_kept", "handshakes_failed"} <= failing(made)
    assert any(each.failure for each in made.newcomers)


def test_interrupt_ends_run_early_and_in_order(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, interrupted = list[Newcomer](), list[Rotated]()

    async def come(port: int, context: ssl.SSLContext) -> Newcomer:
        arrived.append(await connect(port, context))
        return arrived[-1]

    def interrupt(rotated: Rotated) -> None:
        if arrived and not interrupted:  # once: the second ends the program
            interrupted.append(rotated)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "connect", come)
    before = signal.getsignal(signal.SIGINT)
    made = rotate_under_load(home.path, dataclasses.replace(QUICK, rotations=1_000), interrupt)
    assert made.report().exit_code == 130
    assert len(made.rotated) < 1_000
    assert made.newcomers
    assert signal.getsignal(signal.SIGINT) is before


def test_error_beside_load_is_raised(home: Home) -> None:
    def fail(rotated: Rotated) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(ExceptionGroup) as caught:
        rotate_under_load(home.path, dataclasses.replace(QUICK, rotations=100), fail)
    assert caught.group_contains(RuntimeError, match="a fault")
