"""The clients of all languages under faults: a short run, and wrong answers and lost calls are detected."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.scenarios import soak_clients as module
from bench.scenarios.soak_clients import (
    FAULTS,
    SoakClientsOutcome,
    Tally,
    is_uncertain,
    programs,
)
from tests.limits import TIMEOUT
from zcproto.errors import Code

PYTHON = ("asyncio", "blocking")

SWAPPED = """
import asyncio
from zcproto_conformance import python_client

class Swapped(python_client.Conform):
    async def expect(self, step):
        answer = await super().expect(step)
        return answer + 2 if isinstance(answer, int) else answer

asyncio.run(Swapped().run())
"""
"""A client whose ints are wrong."""


def outcome(**changes: Any) -> SoakClientsOutcome:
    """Return the outcome of a good run, with changes of its only tally."""
    tally = replace(
        Tally(calls=10, compared=9, reconnects=3, uncertain=Counter({"run: closed": 1})), **changes
    )
    return SoakClientsOutcome({"Go": tally}, Counter(FAULTS))


def test_good_run_passes_and_names_what_is_uncertain() -> None:
    report = outcome().report()
    assert report.reasons() == []
    assert "Go, uncertain: run: closed 1" in report.notes


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"wrong": Counter({"echo: a different answer": 1})}, "wrong"),
        ({"lost": Counter({"echo: UNAVAILABLE": 1})}, "lost"),
        ({"twice": 1}, "twice"),
        ({"compared": 0}, "compared"),
    ],
)
def test_unmet_bar_fails(changes: dict[str, Any], key: str) -> None:
    assert [row.key for row in outcome(**changes).report().columns["Go"] if not row.holds] == [key]


def test_fault_that_was_never_injected_fails() -> None:
    found = outcome()
    found.done = Counter(FAULTS[1:])
    assert [row.key for row in found.report().columns["server"] if not row.holds] == [FAULTS[0]]


@pytest.mark.parametrize(
    ("what", "error", "has_key", "has_begun", "is_so"),
    [
        ("run", {"kind": "closed", "clean": False}, False, False, True),
        ("run", {"kind": "closed", "clean": False}, True, False, False),
        ("run", {"kind": "connect"}, False, False, False),
        ("run", {"kind": "call", "code": Code.UNAVAILABLE}, False, False, False),
        ("run", {"kind": "call", "code": Code.DEADLINE_EXCEEDED}, False, False, False),
        ("run", {"kind": "call", "code": Code.DATA_LOSS}, False, False, True),
        ("run", {"kind": "call", "code": Code.CANCELLED}, True, False, True),
        ("run", {"kind": "call", "code": Code.TOKEN_REVOKED}, True, False, True),
        ("run", {"kind": "call", "code": Code.UNKNOWN}, True, False, True),
        ("run", {"kind": "call", "code": Code.UNKNOWN}, False, False, False),
        ("ask", {"kind": "call", "code": Code.ABORTED}, False, False, True),
        ("stream", {"kind": "call", "code": Code.UNAVAILABLE}, False, True, True),
    ],
)
def test_call_is_uncertain_only_if_its_client_must_not_send_it_again(
    what: str, error: dict[str, Any], has_key: bool, has_begun: bool, is_so: bool
) -> None:
    assert is_uncertain(what, error, has_key, has_begun) is is_so


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_python_clients_lose_no_call_and_wrong_answers_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {name: command for name, command in programs().items() if name in PYTHON}
    found["swapped"] = [found["asyncio"][0], "-c", SWAPPED]
    monkeypatch.setattr(module, "programs", lambda: found)
    monkeypatch.setattr(module, "TIMEOUT_MS", round(TIMEOUT * 1000))
    monkeypatch.setattr(module, "NO_ANSWER_S", 2 * TIMEOUT)
    monkeypatch.setenv("ZCPROTO_SERVER__UPGRADE_TIMEOUT", "1h")
    seen: list[SoakClientsOutcome] = []
    soak_clients = module.soak_clients

    def watched(*arguments: Any) -> SoakClientsOutcome:
        seen.append(soak_clients(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "soak_clients", watched)
    assert main(["scenario", "soak_clients", "--minutes", "0.1"]) == 1
    [run] = seen
    assert run.tallies.pop("swapped").wrong["run: a different answer"] > 0, capsys.readouterr()
    assert run.report().reasons() == [], capsys.readouterr()


def test_program_of_each_client_that_is_built_is_used() -> None:
    found = programs()
    assert set(PYTHON) <= set(found)
    assert all(Path(command[-1]).exists() for name, command in found.items() if name not in PYTHON)
