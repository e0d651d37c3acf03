"""The kit itself: what it makes of programs that are wrong, its exceptions, its command."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.conformance.helpers import PYTHON_CLIENT, SCRIPTED, program, results_of
from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance.__main__ import CANNOT_RUN, choose, main
from zcproto_conformance.check import Check
from zcproto_conformance.errors import KitError
from zcproto_conformance.run import (
    EXCEPTED,
    FAILED,
    PASSED,
    Result,
    apply_exceptions,
    load_exceptions,
)
from zcproto_conformance.server import HOST, ScriptedServer
from zcproto_conformance.stage import Stage
from zcproto_conformance.values import typed, untyped


async def _asks_for_tables(stage: Stage) -> None:
    await stage.do("tables")


async def _is_given_a_key(stage: Stage) -> None:
    stage.program.secrets.add("open-sesame")
    await stage.do("tables")


TABLES = Check("scripted/x", "1", _asks_for_tables)


def result(name: str, outcome: str) -> Result:
    return Result(Check(name, "1", _asks_for_tables), outcome, 0.0, "" if outcome == PASSED else "because")


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 2**53, -(2**63), 2**64 - 1, 0.5, "x", b"\0", [1, [b""]], {"a": {"b": [None]}}],
)
def test_a_value_is_the_same_after_its_way_as_json(value: Any) -> None:
    again = untyped(json.loads(json.dumps(typed(value))))
    assert again == value
    assert type(again) is type(value)


def test_infinities_and_nan_travel() -> None:
    assert untyped(typed(math.inf)) == math.inf
    assert math.isnan(untyped(typed(math.nan)))


@pytest.mark.parametrize("said", [{"x": 1}, {"int": 1}, {"bin": 1}, 0.5, {"map": []}])
def test_what_is_no_typed_value_is_refused(said: Any) -> None:
    with pytest.raises(ValueError, match="no typed value"):
        untyped(said)


# --- programs that are wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("nonsense", "no JSON"),
        ("[]", "without an id"),
        ('{"ok": 1}', "without an id"),
        ('{"id": 99, "ok": 1}', "waits for no answer"),
        ('{"id": 2}', "neither ok nor error"),
        ('{"id": 2, "error": "x"}', "no object"),
        ('{"id": 2, "unsupported": "not yet"}', "unsupported: not yet"),
        ('{"id": 2, "error": {"kind": "call"}}', "a step failed"),
    ],
)
async def test_a_wrong_answer_fails_the_check(answer: str, why: str) -> None:
    (failed,) = await results_of([TABLES], program(answer))
    assert failed.result == FAILED
    assert why in failed.why


async def test_a_program_that_is_silent_fails_the_check_and_the_next_gets_a_new_one() -> None:
    command = program()
    command[-1] += "import time\ntime.sleep(600)\n"
    first, second = await results_of([TABLES, TABLES], command, patience=0.5)
    assert first.why.startswith("no answer to tables")
    assert second.result == FAILED


async def test_a_program_that_dies_fails_the_check_and_its_last_words_are_shown() -> None:
    command = program()
    command[-1] += "sys.stdin.readline()\nsys.stderr.write('last words')\nsys.exit(3)\n"
    (failed,) = await results_of([TABLES], command)
    assert "its standard output ended" in failed.why
    assert "last words" in failed.why


async def test_a_secret_in_an_answer_fails_the_check() -> None:
    answer = '{"id": 2, "ok": "open-sesame"}'
    (failed,) = await results_of([Check("scripted/x", "1", _is_given_a_key)], program(answer))
    assert failed.why == "a token or a key was put out"


@pytest.mark.parametrize(
    "hello", ["", '{"id": 1, "ok": {"kit": 2}}', '{"id": 1, "ok": 1}', '{"id": 1, "error": {}}', "x"]
)
async def test_a_program_for_another_kit_is_not_run(hello: str) -> None:
    command = program()
    command[-1] = f"input(); print({hello!r}, flush=True)"
    with pytest.raises(KitError, match=r"hello|another kit"):
        await results_of([TABLES], command)


async def test_a_command_that_is_not_there_is_told() -> None:
    with pytest.raises(KitError, match="no-such-command"):
        await results_of([TABLES], ["/no-such-command"])


# --- exceptions -----------------------------------------------------------------------------------------


def test_an_exception_excuses_a_failure_and_keeps_its_reason() -> None:
    results = [result("scripted/a", FAILED), result("scripted/b", PASSED)]
    judged, faults = apply_exceptions(results, {"scripted/a": "not yet"}, {"scripted/a", "scripted/b"})
    assert [one.result for one in judged] == [EXCEPTED, PASSED]
    assert judged[0].why == "not yet\nbecause"
    assert faults == []


def test_exceptions_can_only_shrink() -> None:
    results = [result("scripted/b", PASSED)]
    exceptions = {"scripted/b": "it did not pass once", "scripted/none": "who knows"}
    _, faults = apply_exceptions(results, exceptions, {"scripted/a", "scripted/b"})
    assert faults == [
        "scripted/none is an exception, and no check",
        "scripted/b passes: take it out of the exceptions",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("{}", "must be an array"),
        ('["scripted/a"]', "a check and a reason"),
        ('[{"check": "scripted/a"}]', "a check and a reason"),
        ('[{"check": "scripted/a", "reason": " "}]', "a check and a reason"),
        ('[{"check": "a", "reason": "x"}, {"check": "a", "reason": "y"}]', "twice"),
    ],
)
def test_a_file_of_exceptions_that_is_wrong_is_told(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "exceptions.json"
    file.write_text(text)
    with pytest.raises(KitError, match=why):
        load_exceptions(file)


def test_a_file_of_exceptions_is_read(tmp_path: Path) -> None:
    file = tmp_path / "exceptions.json"
    file.write_text('[{"check": "scripted/a", "reason": "not yet"}]')
    assert load_exceptions(file) == {"scripted/a": "not yet"}
    with pytest.raises(KitError, match="cannot be read"):
        load_exceptions(tmp_path / "none.json")


# --- the command ----------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


def test_the_list_says_what_each_check_proves() -> None:
    listed = invoke("--list", "--part", "scripted")
    assert listed.exit_code == 0
    assert len(listed.output.splitlines()) == len(SCRIPTED)
    assert "scripted/wrong-salt   7.2: a frame with another salt is fatal" in listed.output


def test_checks_are_chosen_by_part_and_pattern() -> None:
    checks = [Check("vectors/a/b", "", _asks_for_tables), *SCRIPTED.values()]
    assert [check.name for check in choose(checks, ["vectors"], [])] == ["vectors/a/b"]
    assert len(choose(checks, ["scripted"], ["scripted/goaway-*"])) > 3
    with pytest.raises(KitError, match="no such check"):
        choose(checks, ["vectors"], ["scripted/*"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "name the command"),
        (("--only", "nothing", "x"), "no such check"),
        (("--vectors", "/none", "x"), "cannot be read"),
        (("--exceptions", "/none", "x"), "cannot be read"),
        (("/no-such-command",), "no-such-command"),
    ],
)
def test_a_kit_that_cannot_be_run_says_why(arguments: tuple[str, ...], why: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == CANNOT_RUN
    assert why in refused.output


def test_a_run_that_passes(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    ran = invoke("--only", "scripted/answers-*", "--patience", "2", "--json", str(file), *PYTHON_CLIENT)
    assert ran.exit_code == 0, ran.output
    written = json.loads(file.read_text())
    assert written["passed"] is True
    assert {check["result"] for check in written["checks"]} == {PASSED}
    assert [check["name"] for check in written["checks"]] == [
        "scripted/answers-in-one-read",
        "scripted/answers-out-of-order",
    ]


def test_a_run_that_fails_and_one_with_an_exception(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ("--only", "vectors/tables", "--json", str(file))
    wrong = program('{"id": 2, "ok": {}}')
    ran = invoke(*arguments, *wrong)
    assert ran.exit_code == 1
    assert "failed   vectors/tables" in ran.output
    written = json.loads(file.read_text())
    assert written["passed"] is False
    assert "kinds" in written["checks"][0]["why"]
    exceptions = tmp_path / "exceptions.json"
    exceptions.write_text('[{"check": "vectors/tables", "reason": "being built"}]')
    excused = invoke(*arguments, "--exceptions", str(exceptions), *wrong)
    assert excused.exit_code == 0
    assert "being built" in excused.output
    exceptions.write_text('[{"check": "vectors/tables", "reason": "x"}, {"check": "y", "reason": "x"}]')
    assert invoke(*arguments, "--exceptions", str(exceptions), *wrong).exit_code == 1


async def test_a_client_that_comes_when_the_server_stops_is_dropped() -> None:
    server = ScriptedServer(system_clock, system_entropy, patience=1.0)
    await server.start()
    await server.stop()
    async with await asyncio.start_server(server._accepted, HOST, 0) as late:
        reader, writer = await asyncio.open_connection(*late.sockets[0].getsockname())
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert server.connections == 0
