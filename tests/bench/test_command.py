"""`python -m bench`: options, files and exit codes that all measurements share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from bench.__main__ import COMMANDS, MICRO, SCENARIOS, main
from bench.command import measurement
from bench.machine import machine, sentence
from bench.report import Report, Row
from zcproto.errors import ConfigError, ConnectionClosed

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A scenario `kills` that returns or raises what the test puts into this list."""
    found: list[Any] = []

    @measurement
    @click.option("--kills", type=click.IntRange(1), default=200)
    def command(kills: int) -> Report:
        if isinstance(found[0], BaseException):
            raise found[0]
        report: Report = found[0]
        return report

    monkeypatch.setattr("bench.scenarios.kills.command", command)
    return found


ALL = [
    *([name] for name in COMMANDS),
    *(["scenario", name] for name in SCENARIOS),
    *(["micro", name] for name in MICRO),
]


@pytest.mark.parametrize("words", ALL, ids="_".join)
def test_every_command_has_help(words: list[str], capsys: Capture) -> None:
    assert main([*words, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (Report({"figure": [Row("n", "kills", 1)]}), 0),
        (Report({"figure": [Row("n", "lost", 1, equals=0)]}), 1),
        (Report({"figure": []}, interrupted=True), 130),
        (ConfigError(["too few open files"]), 2),
        (ConnectionClosed("the server is gone"), 1),
        (OSError("no process"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_code_is_verdict(outcome: list[Any], found: Any, code: int, capsys: Capture) -> None:
    outcome.append(found)
    assert main(["scenario", "kills"]) == code
    if isinstance(found, Exception):
        assert str(found) in capsys.readouterr().err


def test_json_has_options_machine_and_figures(outcome: list[Any], tmp_path: Path) -> None:
    outcome.append(Report({"figure": [Row("n", "kills", 7)]}))
    file = tmp_path / "kills.json"
    assert main(["scenario", "kills", "--kills", "7", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["options"] == {"kills": 7}
    assert written["machine"]["cpus"] >= 1
    assert written["figures"]["figure"]["n"]["value"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (words.split(), words.split()[-1])
            for words in (
                "scenario kills --kills 0",
                "scenario rotation --rate 0",
                "scenario rotation --connections x",
                "scenario outages --only eaten",
                "scenario storms --only weather",
                "scenario soak --minutes 0",
                "peers --payload 16001",
                "micro token_check --tokens 0",
                "micro session_opening_valkey --fsync x",
                "scenario weather",
            )
        ),
        (["scenario", "kills", "--json", "/nowhere/run.json"], "cannot be written"),
        (["requirements", "--markdown", "/nowhere/at/all.md"], "cannot be written"),
        (["requirements", "--step", "nonsense"], "no such step: nonsense; there are tokens, parts"),
        (["curves", "--step", "nonsense"], "no such curve: nonsense"),
        (["micro", "session_opening_valkey", "--program", "no-such-program"], "is not installed"),
        (["guard", "--accept", " "], "give a reason"),
    ],
)
def test_unusable_option_fails_before_the_run(words: list[str], message: str, capsys: Capture) -> None:
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_machine_is_described() -> None:
    described = machine()
    assert described["memory_gib"] > 0
    assert f"Python {described['python']}" in sentence(described)
