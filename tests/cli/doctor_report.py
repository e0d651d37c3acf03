"""Run `zcproto doctor` and parse its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from zcproto.cli import main
from zcproto.cli.doctor import MAX_TIMEOUT

Capture = pytest.CaptureFixture[str]
NOW = datetime.now(UTC)
Doctor = Callable[..., "Report"]


class Report:
    """The findings of one run."""

    def __init__(self, code: int, out: str) -> None:
        self.code = code
        self.findings: list[dict[str, Any]] = json.loads(out)

    def __repr__(self) -> str:
        return f"exit code {self.code}: {json.dumps(self.findings, indent=1)}"

    def of(self, check: str) -> list[dict[str, Any]]:
        return [each for each in self.findings if each["check"] == check]

    def state(self, check: str) -> str:
        """Return the worst state of a check."""
        states = [each["state"] for each in self.of(check)]
        assert states, f"no finding of {check}: {self}"
        return max(states, key=["ok", "skipped", "warning", "fault"].index)

    def one(self, check: str, state: str) -> str:
        """Return the text and the fix of the one finding with this state."""
        (finding,) = [each for each in self.of(check) if each["state"] == state]
        assert (finding["cure"] is not None) == (state in ("warning", "fault")), finding
        return f"{finding['found']} | {finding['cure']}"

    @property
    def faults(self) -> list[str]:
        return [each["check"] for each in self.findings if each["state"] == "fault"]


@pytest.fixture
def doctor(capsys: Capture) -> Doctor:
    """Run the doctor patiently, and assert that the exit code is 1 exactly if there are faults."""

    def doctor(*arguments: str) -> Report:
        capsys.readouterr()
        code = main(["doctor", "--json", "--timeout", str(MAX_TIMEOUT), *arguments])
        report = Report(code, capsys.readouterr().out)
        assert report.code == (1 if report.faults else 0)
        return report

    return doctor
