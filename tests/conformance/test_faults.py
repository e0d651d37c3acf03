"""Each scripted scenario fails against its fault. Some of them run here; this runs all of them:

python -m tests.conformance.faults
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.faults import FAULTS, fault_of
from tests.conformance.faults.__main__ import run_against_faults
from tests.conformance.faults.mutation import Unmatched, fault
from tests.conformance.helpers import SCRIPTED
from tests.limits import TIMEOUT
from tests.wire.vectors import FOLDER
from zcproto.client.retry import Backoff
from zcproto.errors import CallError
from zcproto_conformance import vectors
from zcproto_conformance.errors import KitError
from zcproto_conformance.run import FAILED

FAILS_FAST = {
    "client-hello": "the protocols offered are []",
    "welcome-is-awaited": "with a salt other than",
    "max-streams": "beyond max_streams",
    "clean-end": "instead of clean True",
    "counter-jumps": "did not grow",
    "clock-ahead": "ms off",
    "responses-out-of-order": "{'n': 4} instead of {'n': 0}",
    "results-of-all-types": "instead of 9007199254740993",
    "cancel": "another token",
    "goaway-retry-after": "before retry_after_ms",
    "events-are-delivered": "('first', None) instead of",
    "secrets": "printed a token or a key",
    "refresh-rotation": "a refresh token other than the latest",
    "concurrent-calls-share-one-refresh": "during a refresh",
    "device-opens-session": "does not match the message",
    "reconnect-with-small-frame-first": "the limit is 16384",
    "stream": "meta is",
    "item-before-credit": "before any CREDIT",
    "credit-follows-the-application": "had taken one item of three",
    "stream-outlives-a-refresh": "another token than its OPEN",
    "handle": "'methods': ['choose']",
    "call": "another token than its CALL",
    "call-result-of-max-frame": "the limit is 1048576",
}
"""Scenarios that detect their fault without waiting for a timeout, and a part of the failure."""


def test_each_scenario_names_the_section_it_proves() -> None:
    for check in SCRIPTED.values():
        section = check.proves.split(":")[0].split(",")[0]
        assert section[0].isdigit(), check.name


def test_readme_of_the_kit_has_the_number_of_scenarios() -> None:
    readme = (Path(__file__).parents[2] / "clients" / "conformance" / "README.md").read_text(encoding="utf-8")
    assert f"{len(SCRIPTED)} scenarios with a scripted server" in readme


def test_each_scenario_has_a_fault() -> None:
    assert {name for name in FAULTS if name.startswith("scripted/")} == set(SCRIPTED)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_applied_and_removed(name: str) -> None:
    before = Backoff.next.__code__, CallError.from_wire.__func__.__code__  # type: ignore[attr-defined]
    with fault_of(name).applied():
        pass
    assert before == (Backoff.next.__code__, CallError.from_wire.__func__.__code__)  # type: ignore[attr-defined]


def test_applied_fault_changes_the_behaviour() -> None:
    backoff = Backoff(lambda: 0.5)
    with fault_of("scripted/reconnect-backoff").applied():
        assert backoff.next() == 0.0
    assert backoff.next() > 0.0


def test_fault_that_does_not_match_the_source_is_reported() -> None:
    missing = fault("x", ("Backoff.next", "no such text", ""))
    with pytest.raises(Unmatched, match="no such text"), missing.applied():
        pass
    ambiguous = fault("x", ("Backoff.next", "self", ""))
    with pytest.raises(Unmatched, match="times"), ambiguous.applied():
        pass


async def test_fault_that_cannot_be_applied_ends_the_run() -> None:
    without = [replace(check, name=f"{check.name}-of-tomorrow") for check in SCRIPTED.values()][:4]
    with pytest.raises(KitError, match=r"cannot apply its fault: .*unexpected.*KeyError"):
        await run_against_faults(without, patience=TIMEOUT, jobs=2)


async def test_scenarios_detect_their_faults() -> None:
    chosen = [SCRIPTED[f"scripted/{name}"] for name in FAILS_FAST]
    chosen += [check for check in vectors.checks(FOLDER) if check.name in FAULTS]
    results = await run_against_faults(chosen, patience=TIMEOUT, jobs=6)
    for result in results:
        assert result.result == FAILED, result.check.name
        assert FAILS_FAST.get(result.check.name.removeprefix("scripted/"), "instead of") in result.why, result
