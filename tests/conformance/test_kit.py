"""The kit itself: faulty programs, exceptions, and the command."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.conformance.helpers import PYTHON_CLIENT, SCRIPTED, program, results_of
from tests.limits import TIMEOUT
from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance import harness as harness_module
from zcproto_conformance.__main__ import CANNOT_RUN, choose, main
from zcproto_conformance.check import Check
from zcproto_conformance.errors import KitError
from zcproto_conformance.harness import Harness
from zcproto_conformance.run import (
    EXCEPTED,
    FAILED,
    PASSED,
    SKIPPED,
    Result,
    apply_exceptions,
    load_exceptions,
)
from zcproto_conformance.scripted_server import HOST, ScriptedServer
from zcproto_conformance.values import typed, untyped


async def _request_tables(harness: Harness) -> None:
    await harness.step("tables")


async def _leak_a_key(harness: Harness) -> None:
    harness.program.secrets.add("open-sesame")
    await harness.step("tables")


PATIENCE = f"{TIMEOUT / harness_module.PATIENCE:g}"
"""The factor that makes timeouts hangs."""

TABLES = Check("scripted/x", "1", _request_tables)


def result(name: str, outcome: str) -> Result:
    return Result(Check(name, "1", _request_tables), outcome, 0.0, "" if outcome == PASSED else "because")


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 2**53, -(2**63), 2**64 - 1, 0.5, "x", b"\0", [1, [b""]], {"a": {"b": [None]}}],
)
def test_value_round_trips_through_typed_json(value: Any) -> None:
    again = untyped(json.loads(json.dumps(typed(value))))
    assert again == value
    assert type(again) is type(value)


def test_infinity_and_nan_round_trip() -> None:
    assert untyped(typed(math.inf)) == math.inf
    assert math.isnan(untyped(typed(math.nan)))


@pytest.mark.parametrize("value", [{"x": 1}, {"int": 1}, {"bin": 1}, 0.5, {"map": []}])
def test_invalid_typed_json_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not a typed value"):
        untyped(value)


# --- faulty programs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("nonsense", "not JSON"),
        ("[]", "without an id"),
        ('{"ok": 1}', "without an id"),
        ('{"id": 99, "ok": 1}', "which is not pending"),
        ('{"id": 2}', "neither ok nor error"),
        ('{"id": 2, "error": "x"}', "not an object"),
        ('{"id": 2, "unsupported": "not yet"}', "unsupported: not yet"),
        ('{"id": 2, "error": {"kind": "call"}}', "a step failed"),
    ],
)
async def test_invalid_answer_fails_the_check(answer: str, why: str) -> None:
    (failed,) = await results_of([TABLES], program(answer))
    assert failed.result == FAILED
    assert why in failed.why


async def test_hanging_program_fails_the_check_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto_conformance.run.START_SECONDS", TIMEOUT)
    command = program()
    command[-1] += "import time\ntime.sleep(600)\n"
    first, second = await results_of([TABLES, TABLES], command, patience=0.5)
    assert first.why.startswith(("no answer to tables", "the check did not end"))
    assert second.result == FAILED


@pytest.mark.parametrize(
    "check", [TABLES, SCRIPTED["scripted/welcome-is-awaited"]], ids=lambda check: check.name
)
async def test_program_that_exits_fails_the_check_with_its_stderr(check: Check) -> None:
    command = program()
    command[-1] += "sys.stdin.readline()\nsys.stderr.write('its stderr')\nsys.exit(3)\n"
    (failed,) = await results_of([check], command)
    assert "its standard output ended" in failed.why
    assert "its stderr" in failed.why


async def test_secret_in_an_answer_fails_the_check() -> None:
    answer = '{"id": 2, "ok": "open-sesame"}'
    (failed,) = await results_of([Check("scripted/x", "1", _leak_a_key)], program(answer))
    assert failed.why == "the program printed a token or a key"


@pytest.mark.parametrize(
    "hello", ["", '{"id": 1, "ok": {"kit": 2}}', '{"id": 1, "ok": 1}', '{"id": 1, "error": {}}', "x"]
)
async def test_program_of_another_kit_version_is_refused(hello: str) -> None:
    command = program()
    command[-1] = f"input(); print({hello!r}, flush=True)"
    with pytest.raises(KitError, match=r"hello|another version"):
        await results_of([TABLES], command)


async def test_missing_command_is_reported() -> None:
    with pytest.raises(KitError, match="no-such-command"):
        await results_of([TABLES], ["/no-such-command"])


# --- exceptions -----------------------------------------------------------------------------------------


def test_excepted_failure_keeps_its_reason() -> None:
    results = [result("scripted/a", FAILED), result("scripted/b", PASSED)]
    judged, faults = apply_exceptions(results, {"scripted/a": "not yet"}, {"scripted/a", "scripted/b"})
    assert [one.result for one in judged] == [EXCEPTED, PASSED]
    assert judged[0].why == "not yet\nbecause"
    assert faults == []


def test_unknown_or_passing_exceptions_are_faults() -> None:
    results = [result("scripted/b", PASSED)]
    exceptions = {"scripted/b": "not supported yet", "scripted/none": "removed"}
    _, faults = apply_exceptions(results, exceptions, {"scripted/a", "scripted/b"})
    assert faults == [
        "scripted/none is listed as an exception but is not a check",
        "scripted/b passes: remove it from the exceptions",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("{}", "must hold an array"),
        ('["scripted/a"]', "a check and a reason"),
        ('[{"check": "scripted/a"}]', "a check and a reason"),
        ('[{"check": "scripted/a", "reason": " "}]', "a check and a reason"),
        ('[{"check": "a", "reason": "x"}, {"check": "a", "reason": "y"}]', "twice"),
    ],
)
def test_invalid_exceptions_file_is_reported(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "exceptions.json"
    file.write_text(text)
    with pytest.raises(KitError, match=why):
        load_exceptions(file)


def test_exceptions_file_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "exceptions.json"
    file.write_text('[{"check": "scripted/a", "reason": "not yet"}]')
    assert load_exceptions(file) == {"scripted/a": "not yet"}
    with pytest.raises(KitError, match="cannot be read"):
        load_exceptions(tmp_path / "none.json")


# --- the command ----------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


def test_list_shows_what_each_check_proves() -> None:
    listed = invoke("--list", "--part", "scripted")
    assert listed.exit_code == 0
    assert len(listed.output.splitlines()) == len(SCRIPTED)
    assert "scripted/wrong-salt   7.2: a frame with a wrong salt is fatal" in listed.output


def test_checks_are_selected_by_part_and_pattern() -> None:
    checks = [Check("vectors/a/b", "", _request_tables), *SCRIPTED.values()]
    assert [check.name for check in choose(checks, ["vectors"], [])] == ["vectors/a/b"]
    assert len(choose(checks, ["scripted"], ["scripted/goaway-*"])) > 3
    with pytest.raises(KitError, match="no check matches"):
        choose(checks, ["vectors"], ["scripted/*"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "no command"),
        (("--only", "nothing", "x"), "no check matches"),
        (("--vectors", "/none", "x"), "cannot be read"),
        (("--exceptions", "/none", "x"), "cannot be read"),
        (("/no-such-command",), "no-such-command"),
    ],
)
def test_kit_that_cannot_run_reports_why(arguments: tuple[str, ...], why: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == CANNOT_RUN
    assert why in refused.output


def test_passing_run_exits_with_0(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    ran = invoke(
        "--only", "scripted/responses-*", "--patience", PATIENCE, "--json", str(file), *PYTHON_CLIENT
    )
    assert ran.exit_code == 0, ran.output
    written = json.loads(file.read_text())
    assert written["passed"] is True
    assert {check["result"] for check in written["checks"]} == {PASSED}
    assert [check["name"] for check in written["checks"]] == [
        "scripted/responses-in-one-read",
        "scripted/responses-out-of-order",
    ]


def test_failing_run_exits_with_1_unless_excepted(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ("--only", "vectors/tables", "--patience", PATIENCE, "--json", str(file))
    faulty = program('{"id": 2, "ok": {}}')
    ran = invoke(*arguments, *faulty)
    assert ran.exit_code == 1
    assert "failed   vectors/tables" in ran.output
    written = json.loads(file.read_text())
    assert written["passed"] is False
    assert "kinds" in written["checks"][0]["why"]
    exceptions = tmp_path / "exceptions.json"
    exceptions.write_text('[{"check": "vectors/tables", "reason": "being built"}]')
    excepted = invoke(*arguments, "--exceptions", str(exceptions), *faulty)
    assert excepted.exit_code == 0
    assert "being built" in excepted.output
    exceptions.write_text('[{"check": "vectors/tables", "reason": "x"}, {"check": "y", "reason": "x"}]')
    assert invoke(*arguments, "--exceptions", str(exceptions), *faulty).exit_code == 1


def test_checks_of_a_feature_that_is_not_announced_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    ran = invoke("--only", "*/durable*", "--json", str(file), *program())
    assert ran.exit_code == 0, ran.output
    written = json.loads(file.read_text())
    assert {check["result"] for check in written["checks"]} == {SKIPPED}
    header, *rows = [line.split() for line in ran.output.splitlines()]
    assert [row[header.index("skipped")] for row in rows] == [row[1] for row in rows]


async def test_connection_to_a_stopping_server_is_aborted() -> None:
    server = ScriptedServer(system_clock, system_entropy, patience=1.0)
    await server.start()
    await server.stop()
    async with await asyncio.start_server(server._accept, HOST, 0) as late:
        reader, writer = await asyncio.open_connection(*late.sockets[0].getsockname())
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert server.connection_count == 0
