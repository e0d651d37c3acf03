"""Rotations under load: that they are made, that new connections look, and that what is wrong is found."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import runpy
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.rotation import __main__ as program
from bench.rotation import newcomers as newcomers_module
from bench.rotation import plan as plan_module
from bench.rotation import run as module
from bench.rotation.newcomers import Newcomer, Newcomers
from bench.rotation.outcome import Outcome, quantile
from bench.rotation.pauses import Figures, Span
from bench.rotation.plan import RotationPlan
from bench.rotation.rotator import Rotated, Rotator, settings_of
from bench.rotation.run import as_json, load_plan, prepare, run_in, run_rotations, sentence, show
from bench.row import Row
from tests.load.conftest import Serve
from tests.load.helpers import plan as usual_load_plan
from tests.load.helpers import verified_result
from zcproto.certs import load_pair
from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.config.model import CertificatesConfig
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.demo.server import DemoServer
from zcproto.load.result import Result, Verdict
from zcproto.load.tally import Kind

QUICK = RotationPlan(
    rotations=4,
    interval_s=0.1,
    rest_s=0.2,
    new_key_every=2,
    connections=10,
    rate=200.0,
    newcomers=30.0,
    delay_s=0.2,
    key_types=("ecdsa-p256",),
)
PAUSES = {"longest_pause_ms", "longest_own_pause_ms"}
"""Not to be promised on a machine that runs tests."""
LATE = {"old_longest_s", "last_seen"}
"""On a busy one a certificate may be made, or taken up, when no new connections come any more."""

SETTINGS = dataclasses.replace(settings_of(CertificatesConfig()), key_types=["ecdsa-p256"])


def console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=110, highlight=False), out


@pytest.fixture
def folder(tmp_path: Path, certs: Path) -> Path:
    """Own certificates of the key type ECDSA, to be rotated."""
    return Path(shutil.copytree(certs, tmp_path / "certs"))


# --- the rotations -----------------------------------------------------------------------------------------


def leaf_and_pin(folder: Path) -> tuple[str, str]:
    pair = load_pair(folder / "server-ecdsa.crt", folder / "server-ecdsa.key", datetime.now(UTC))
    return pair.leaf_sha256.hex(), pair.pin


async def test_each_rotation_leaves_a_new_certificate_and_every_other_a_new_key(folder: Path) -> None:
    told: list[tuple[int, tuple[str, str]]] = []
    plan = dataclasses.replace(QUICK, interval_s=0.01)
    rotator = Rotator(plan, folder, SETTINGS, lambda each: told.append((each.number, leaf_and_pin(folder))))
    first = leaf_and_pin(folder)
    rotator.note_first()
    assert leaf_and_pin(folder) == first
    start = time.monotonic()
    await rotator.run(start)
    assert [number for number, _ in told] == [1, 2, 3, 4]
    leaves = [first[0], *(leaf for _, (leaf, _) in told)]
    assert [each.leaves for each in rotator.history] == [{"ecdsa": leaf} for leaf in leaves]
    assert len({*leaves}) == 5
    pins = [first[1], *(pin for _, (_, pin) in told)]
    assert [pin != before for before, pin in itertools.pairwise(pins)] == [False, True, False, True]
    assert [each.new_key for each in rotator.history] == [False, False, True, False, True]
    for each in rotator.history[1:]:
        assert start + each.number * plan.interval_s <= each.began < each.done


def test_a_rotation_that_fails_is_told_and_the_next_is_made(folder: Path) -> None:
    rotator = Rotator(QUICK, folder, SETTINGS)
    (folder / "ca.key").rename(folder / "away")
    failed = rotator.rotate(1)
    assert failed.leaves == {}
    assert "ca.key" in failed.problem
    (folder / "away").rename(folder / "ca.key")
    made = rotator.rotate(3)
    assert (made.problem, [*made.leaves]) == ("", ["ecdsa"])


def test_without_an_ecdsa_certificate_there_are_no_new_keys(folder: Path) -> None:
    """An RSA key takes seconds to make."""
    rsa = dataclasses.replace(SETTINGS, key_types=["rsa-2048"])
    made = Rotator(QUICK, folder, rsa).rotate(2)
    assert (made.new_key, [*made.leaves], made.problem) == (False, ["rsa"], "")


# --- the new connections -----------------------------------------------------------------------------------


async def test_a_newcomer_sees_the_certificate_and_goes(serve: Serve) -> None:
    server = serve()
    came = Newcomers("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")
    start = time.monotonic()
    await came.run(start, rate=100.0, seconds=0.1)
    assert len(came.met) == 10
    assert came.failed == 0
    (leaf,) = {each.leaf for each in came.met}
    assert leaf == leaf_and_pin(server.home / "certs")[0]
    assert sorted(each.due for each in came.met) == [start + number / 100.0 for number in range(10)]
    assert all(each.due <= each.begun < each.shaken for each in came.met)
    server.until_left()
    assert server.stats["requests"] == 0


async def test_a_newcomer_refuses_another_authority_and_another_name(
    serve: Serve, ca_file: Path, folder: Path
) -> None:
    server = serve()
    stranger = await Newcomers("127.0.0.1", "127.0.0.1", server.port, ca_file).come(0.0)
    assert (stranger.leaf, stranger.shaken) == ("", 0.0)
    assert "unable to get local issuer certificate" in stranger.failure
    misled = await Newcomers("other.example", "127.0.0.1", server.port, folder / "ca.crt").come(0.0)
    assert misled.leaf == ""
    assert "Hostname mismatch" in misled.failure


async def test_a_newcomer_that_is_not_let_in_is_a_failure(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        came = Newcomers("127.0.0.1", "127.0.0.1", unused.getsockname()[1], folder / "ca.crt")
        await came.run(time.monotonic(), rate=100.0, seconds=0.02)
    assert came.failed == len(came.met) == 2
    assert "Refused" in came.met[0].failure


async def other_server(folder: Path, greeting: bytes) -> asyncio.Server:
    """A server with the right certificate that says something, or nothing, and closes."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-ecdsa.crt", folder / "server-ecdsa.key")
    return await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)


@pytest.mark.parametrize(
    ("greeting", "failure"), [(b"", "IncompleteReadError"), (b"\0" * 68, "the first frame was no WELCOME")]
)
async def test_a_newcomer_that_is_not_welcomed_is_a_failure(
    folder: Path, greeting: bytes, failure: str
) -> None:
    async with await other_server(folder, greeting) as server:
        port = server.sockets[0].getsockname()[1]
        met = await Newcomers("127.0.0.1", "127.0.0.1", port, folder / "ca.crt").come(0.0)
    assert failure in met.failure
    assert met.leaf == leaf_and_pin(folder)[0]


async def test_a_newcomer_does_not_wait_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newcomers_module, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        came = Newcomers("127.0.0.1", "127.0.0.1", silent.getsockname()[1], folder / "ca.crt")
        assert "TimeoutError" in (await came.come(0.0)).failure


# --- what it proves ----------------------------------------------------------------------------------------


def rotated(number: int, done: float, **leaves: str) -> Rotated:
    return Rotated(number, "rsa" not in leaves and number > 0, done - 0.05, done, leaves)


HISTORY = [
    rotated(0, 0.0, rsa="r0", ecdsa="e0"),
    rotated(1, 10.0, rsa="r1", ecdsa="e1"),
    rotated(2, 11.0, ecdsa="e2"),
]


def newcomer(begun: float, leaf: str, failure: str = "") -> Newcomer:
    return Newcomer(begun, begun, begun + 0.01 if leaf else 0.0, leaf, failure)


GOOD = [
    newcomer(9.5, "e0"),
    newcomer(10.5, "e0"),
    newcomer(10.75, "e1"),
    newcomer(11.5, "e1"),
    newcomer(12.0, "e2"),
]


def figures(at: float, longest_ms: float = 2.0, own_ms: float = 1.0, counts: int = 0) -> Figures:
    """What the server tells: so many pauses of each length."""
    return Figures(at, at / 10, longest_ms / 1000, own_ms / 1000, (counts,) * 11)


AT_REST = Span(figures(0.0), figures(20.0, 4.0, 3.0, counts=2))
ROTATING = Span(AT_REST.after, figures(50.0, 8.0, 7.0, counts=3))


def outcome(**changes: Any) -> Outcome:
    """A run of two rotations in which all went well."""
    load = verified_result(plan=usual_load_plan(connections=10))
    plan = RotationPlan(rotations=2, connections=10)
    made = Outcome(plan, load, [*HISTORY], [*GOOD], {}, AT_REST, ROTATING)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def row(made: Outcome, key: str) -> Row:
    (found,) = (each for each in made.rows() if each.key == key)
    return found


def test_a_good_run_is_verified() -> None:
    made = outcome()
    assert made.reasons() == []
    assert made.verdict is Verdict.VERIFIED
    assert made.ages() == [0.0, 0.5, 0.0, 0.5, 0.0]
    assert made.seen_after() == pytest.approx({1: 0.76, 2: 1.01})
    assert row(made, "rotations").value == 2
    assert row(made, "new_keys").value == 1
    assert row(made, "rotation_rate").value == 1.0
    assert row(made, "rotation_longest_ms").value == pytest.approx(50)
    assert row(made, "certificates_seen").value == 3
    assert row(made, "requests_equal").value == 60
    assert row(made, "longest_pause_ms").value == 8.0
    assert row(made, "longest_pause_ms").at_rest == 4.0
    assert row(made, "longest_own_pause_ms").value == 7.0
    assert row(made, "longest_own_pause_ms").at_rest == 3.0
    assert row(made, "measured_s").value == 30.0
    assert row(made, "server_cpu_percent").value == pytest.approx(10.0)
    assert row(made, "pauses_over_5").at_rest == pytest.approx(2 * 8 * 3)  # eight classes are longer; 20 s
    assert row(made, "pauses_over_5").value == pytest.approx(8 * 2)
    assert row(made, "pauses_over_10").value == pytest.approx(7 * 2)
    assert not made.machine_was_busy
    assert sentence(made).startswith("passed: 2 rotations under load, no request lost")


def test_an_rsa_certificate_is_old_only_when_it_was_replaced_itself() -> None:
    """The second rotation made an ECDSA one alone."""
    assert outcome(newcomers=[newcomer(500.0, "r1")]).ages() == [0.0]
    assert outcome(newcomers=[newcomer(500.0, "r0")]).ages() == [490.0]


def test_two_rotations_that_are_taken_at_once_are_seen_at_once() -> None:
    made = outcome(newcomers=[newcomer(11.2, "e2")])
    assert made.seen_after() == pytest.approx({1: 1.21, 2: 0.21})
    assert row(made, "last_seen").holds


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"history": HISTORY[:2]}, "rotations: 1, must be 2"),
        (
            {"history": [*HISTORY[:2], Rotated(2, True, 11.0, 11.1, {}, "the disk is full")]},
            "rotation 2 failed: the disk is full",
        ),
        ({"newcomers": [*GOOD, newcomer(12.5, "e1")]}, "an old one is shown after, longest: 1.5 s, must be"),
        ({"newcomers": GOOD[:4]}, "the last one is seen: 0, must be 1"),
        ({"newcomers": []}, "an old one is shown after, longest: not measured, must be below 1.25"),
        ({"newcomers": [*GOOD, newcomer(12.1, "x")]}, "shown an unknown certificate: 1, must be 0"),
        ({"newcomers": [*GOOD, newcomer(12.1, "", "reset")]}, "a new connection failed: reset"),
        ({"newcomers": [*GOOD, newcomer(12.1, "", "reset")]}, "new connections that failed: 1, must be 0"),
        ({"server_failures": {"not_tls": 2}}, "handshakes failed at the server: 2 not_tls"),
        ({"server_failures": {"not_tls": 2}}, "handshakes that failed at the server: 2, must be 0"),
        ({"server_failures": None}, "handshakes that failed at the server: not measured, must be 0"),
        ({"rotating": None}, "longest pause of the server's loop: not measured, must be below 10"),
        (
            {"rotating": Span(AT_REST.after, figures(50.0, 10.4, 9.0))},
            "longest pause of the server's loop: 10.4 ms, must be below 10",
        ),
        (
            {"rotating": Span(AT_REST.after, figures(50.0, 12.0, 10.4))},
            "longest, other programs left out: 10.4 ms, must be below 10",
        ),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], reason: str) -> None:
    made = outcome(**changes)
    assert made.verdict is Verdict.FAILED
    assert [each for each in made.reasons() if reason in each], made.reasons()
    assert sentence(made).startswith("failed: ")


def lose_a_request(load: Result) -> None:
    load.record.tallies[Kind.LOAD].equal -= 1
    load.record.tallies[Kind.LOAD].lost += 1


def lose_a_connection(load: Result) -> None:
    load.record.tallies[Kind.LAST].equal -= 1
    load.record.lost_links["closed by the server"] = 1


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lose_a_request, "requests lost: 1, must be 0"),
        (lose_a_request, "1 requests of the load got no answer"),
        (lose_a_connection, "old connections that answered to the end: 9, must be 10"),
    ],
)
def test_what_the_load_met_with_counts(harm: Callable[[Result], None], reason: str) -> None:
    made = outcome()
    harm(made.load)
    assert made.verdict is Verdict.FAILED
    assert reason in made.reasons()


def test_a_pause_that_other_programs_made_fails_and_is_told_as_theirs() -> None:
    view, out = console()
    made = outcome(rotating=Span(AT_REST.after, figures(50.0, 10.4, 9.0)))
    show(made, view)
    assert made.verdict is Verdict.FAILED
    assert made.machine_was_busy
    assert "a processor that other programs had" in out.getvalue()


def test_a_server_that_tells_nothing_of_pauses_is_an_error() -> None:
    with pytest.raises(ZcprotoError, match="does not tell of pauses"):
        Figures.of({"cpu_s": 1.0}, 0.0)


def test_a_run_that_was_broken_off_proves_nothing() -> None:
    made = outcome()
    made.load.interrupted = True
    assert made.verdict is Verdict.INTERRUPTED
    assert sentence(made).startswith("interrupted")


def test_a_run_of_which_nothing_is_known_can_be_shown() -> None:
    plan = RotationPlan(rotations=2, connections=10)
    made = Outcome(plan, Result(usual_load_plan()))
    view, out = console()
    show(made, view)
    assert made.verdict is Verdict.FAILED
    assert "FAIL" in out.getvalue()
    assert json.loads(json.dumps(as_json(made, 0.0)))["verdict"] == "failed"


def test_the_table_has_figures_units_targets_and_verdicts() -> None:
    view, out = console()
    show(outcome(newcomers=[*GOOD, newcomer(12.5, "e1")]), view)
    lines = {line.split("  ")[0].strip(): line.split() for line in out.getvalue().splitlines()}
    assert lines["rotations"][-4:] == ["2", "=", "2", "pass"]
    assert lines["an old one is shown after, longest"][-5:] == ["1.50", "s", "<", "1.25", "FAIL"]
    assert lines["longest pause of the server's loop"][-6:] == ["4.00", "8.00", "ms", "<", "10", "pass"]
    assert lines["new connections"][-1] == "6"


def test_the_table_is_whole_on_a_terminal_of_80_columns() -> None:
    out = io.StringIO()
    show(outcome(newcomers=[*GOOD, newcomer(12.5, "e1")]), Console(file=out, width=80))
    table = out.getvalue().partition("Certificates rotated under load")[2]
    assert "\N{HORIZONTAL ELLIPSIS}" not in table
    assert "FAIL" in table


def test_all_is_written_and_no_key() -> None:
    written = json.loads(json.dumps(as_json(outcome(), 1_700_000_000.0)))
    assert written["schema"] == "zcproto-rotation/2"
    assert written["started"] == "2023-11-14T22:13:20+00:00"
    assert written["verdict"] == "verified"
    assert written["plan"]["rotations"] == 2
    assert written["figures"]["old_longest_s"] == {
        "value": 0.5,
        "unit": "s",
        "bar": 1.25,
        "exact": False,
        "holds": True,
        "at_rest": None,
    }
    assert written["figures"]["longest_pause_ms"]["at_rest"] == 4.0
    assert [each["seen_after_s"] for each in written["rotations"]] == [None, 0.76, 1.01]
    assert [each["new_key"] for each in written["rotations"]] == [False, False, True]
    assert written["newcomers"][1] == {"at_s": 10.5, "handshake_s": 0.01, "leaf": "e0", "failure": ""}
    assert written["load"]["verified_connections"] == 10
    assert "the right key" not in json.dumps(written)


def test_a_quantile_of_nothing_is_nothing() -> None:
    assert quantile([], 0.5) is None
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0], 1.0) == 3.0


# --- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose certificates are there already, so that no RSA key of 4096 bits is made; for short runs."""
    monkeypatch.setattr(plan_module, "TAIL", 0.2)
    monkeypatch.setattr(plan_module, "LOAD_TAIL", 0.3)
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    folder.rename(path / "certs")
    return Home(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's processor affinity")
@pytest.mark.parametrize("allowed", [{0, 2, 5}, {3}])
def test_the_load_keeps_to_one_processor_if_there_are_two(
    allowed: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_to = [allowed]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(kept_to[-1]))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, processors: kept_to.append(processors))
    with module.one_processor():
        assert kept_to[-1] == {max(allowed)}
    assert kept_to[-1] == allowed


def test_a_home_is_made_ready(home: Home) -> None:
    plan = dataclasses.replace(QUICK, connections=12, watch_interval_s=0.5)
    operator, credentials = prepare(home, plan)
    config = load_config(None, home=home.path, environ={})
    assert config.certificates.key_types == ("ecdsa-p256",)
    assert config.certificates.watch_interval == 0.5
    assert config.certificates.directory == home.certs
    assert config.limits.max_connections > 12
    assert config.limits.connections_per_address == 0
    assert [each.user for each in credentials] == ["load-1", "load-2", "load-3"]  # five sessions each
    load = load_plan(plan, home, 4711, operator, credentials)
    assert (load.port, load.sessions, load.duration_s) == (4711, 12, plan.load_s)
    assert plan.load_s > plan.newcomers_s > plan.rotations * plan.interval_s + plan.delay_s


def test_a_server_that_takes_no_new_certificate_fails_and_loses_nothing(home: Home) -> None:
    view, out = console()
    made = run_in(home, dataclasses.replace(QUICK, watch_interval_s=3600.0), view)
    assert made.verdict is Verdict.FAILED
    assert len(made.rotated) == 4
    assert {each.leaf for each in made.newcomers} == {made.history[0].leaves["ecdsa"]}
    assert made.server_failures == {}
    failed = {each.key for each in made.rows() if not each.holds} - PAUSES
    assert failed == LATE
    assert made.load.reasons() == []
    said = out.getvalue()
    assert "loading: " in said
    assert "rotation 4 of 4: " in said
    assert "0 failed" in said


@pytest.mark.skipif(
    importlib.util.find_spec("zcproto.certs.keeper") is None,
    reason="this server keeps its first certificate",
)
def test_a_server_that_takes_new_certificates_passes(home: Home) -> None:
    made = run_in(home, dataclasses.replace(QUICK, watch_interval_s=0.1, delay_s=1.0), console()[0])
    assert {each.key for each in made.rows() if not each.holds} - PAUSES - LATE == set()
    assert row(made, "certificates_seen").value > 1


def test_a_handshake_that_fails_meanwhile_is_counted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(run: module.Run, each: Rotated) -> None:
        with socket.create_connection(("127.0.0.1", run._load.port), timeout=5) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while plain.recv(4096):
                pass

    monkeypatch.setattr(module.Run, "_tell", scan)
    made = run_in(home, dataclasses.replace(QUICK, rotations=1), console()[0])
    assert made.server_failures == {"plaintext_http": 1}


def test_a_server_that_dies_meanwhile_fails_the_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[DemoServer] = []

    class KnownServer(DemoServer):
        def __init__(self, home: Path) -> None:
            super().__init__(home)
            servers.append(self)

    def kill(run: module.Run, each: Rotated) -> None:
        process = servers[0]._process
        assert process is not None
        process.kill()

    monkeypatch.setattr(module, "DemoServer", KnownServer)
    monkeypatch.setattr(module.Run, "_tell", kill)
    made = run_in(home, dataclasses.replace(QUICK, rotations=1), console()[0])
    assert made.verdict is Verdict.FAILED
    assert made.server_failures is None
    assert "old connections that answered to the end: 0, must be 10" in made.reasons()
    assert "handshakes that failed at the server: not measured, must be 0" in made.reasons()
    assert any(each.failure for each in made.newcomers)


def test_ctrl_c_ends_it_early_and_in_order(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(run: module.Run, each: Rotated) -> None:
        if (
            each.number == 1
        ):  # once: the second ends the program, and a slow machine goes on rotating meanwhile
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module.Run, "_tell", interrupt)
    before = signal.getsignal(signal.SIGINT)
    began = time.monotonic()
    made = run_in(home, dataclasses.replace(QUICK, rotations=1_000), console()[0])
    assert time.monotonic() - began < 20
    assert made.verdict is Verdict.INTERRUPTED
    assert len(made.rotated) < 100, "of a thousand; a busy machine goes on for a while"
    assert made.newcomers
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fault_of_the_tool_itself_is_not_hidden(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: module.Run, each: Rotated) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(module.Run, "_tell", fail)
    with pytest.raises(ExceptionGroup) as caught:
        run_in(home, dataclasses.replace(QUICK, rotations=100), console()[0])
    assert caught.group_contains(RuntimeError, match="a fault")


def test_the_report_is_shown_and_written_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes: list[Home] = []

    def pretend(home: Home, plan: RotationPlan, view: Console) -> Outcome:
        assert home.path.is_dir()
        homes.append(home)
        return outcome()

    monkeypatch.setattr(module, "run_in", pretend)
    view, out = console()
    run_rotations(QUICK, view, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["verdict"] == "verified"
    assert out.getvalue().rstrip().endswith("10 connections undisturbed")
    assert not homes[0].path.exists()


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    view, out = console()
    with pytest.raises(ConfigError, match="cannot be written"):
        run_rotations(QUICK, view, tmp_path / "no" / "run.json")
    assert out.getvalue() == ""


# --- the command -------------------------------------------------------------------------------------------


def test_the_options_are_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[RotationPlan, Path | None]] = []

    def pretend(plan: RotationPlan, view: Console, json_file: Path | None) -> Outcome:
        asked.append((plan, json_file))
        return outcome()

    monkeypatch.setattr(program, "run_rotations", pretend)
    assert program.main([]) == 0
    assert program.main(["--rotations", "7", "--connections", "20", "--rate", "50", "--json", "x.json"]) == 0
    assert program.main(["--interval", "0.5", "--newcomers", "3", "--delay", "2"]) == 0
    usual = RotationPlan()
    assert asked == [
        (usual, None),
        (dataclasses.replace(usual, rotations=7, connections=20, rate=50.0), Path("x.json")),
        (dataclasses.replace(usual, interval_s=0.5, newcomers=3.0, delay_s=2.0), None),
    ]
    assert (usual.rotations, usual.interval_s, usual.connections, usual.rate) == (100, 1.0, 1_000, 2_000.0)
    assert usual.key_types == ("rsa-4096", "ecdsa-p256")


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (outcome(server_failures=None), 1),
        (ConfigError(["too few files"]), 2),
        (ZcprotoError("the server did not start"), 1),
    ],
)
def test_the_exit_code_tells_how_it_went(
    result: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(*arguments: Any) -> Outcome:
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    monkeypatch.setattr(program, "run_rotations", pretend)
    assert program.main([]) == code
    if isinstance(result, Exception):
        assert str(result) in capsys.readouterr().err


def test_a_run_that_was_broken_off_exits_as_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    made = outcome()
    made.load.interrupted = True
    monkeypatch.setattr(program, "run_rotations", lambda *_: made)
    assert program.main([]) == 130


@pytest.mark.parametrize(
    "options",
    [["--rotations", "0"], ["--rate", "0"], ["--connections", "x"], ["--interval", "nan"], ["more"]],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_module_is_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_rotations", lambda *_: outcome())
    monkeypatch.setattr(sys, "argv", ["bench.rotation", "--rotations", "1"])
    monkeypatch.delitem(sys.modules, "bench.rotation.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("bench.rotation", run_name="__main__", alter_sys=False)
    assert caught.value.code == 0
