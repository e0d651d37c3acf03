"""Each conversation is there for a fault. A part of them is run here; all of them are

python -m tests.conformance.faults
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.faults import FAULTS, fault_of
from tests.conformance.faults.__main__ import seen_to_fail
from tests.conformance.faults.mutation import Unmatched, fault
from tests.conformance.helpers import SCRIPTED
from zcproto.client.backoff import Backoff
from zcproto.errors import CallError
from zcproto_conformance.run import FAILED

QUICKLY_FOUND = {
    "client-hello": "the protocols offered are []",
    "greeting-is-awaited": "another salt",
    "max-streams-is-kept": "beyond max_streams",
    "clean-end": "instead of clean True",
    "counter-jumps": "did not grow",
    "clock-ahead": "ms off",
    "answers-out-of-order": "{'n': 4} instead of {'n': 0}",
    "results-of-all-types": "instead of 9007199254740993",
    "cancel": "another token",
    "goaway-retry-after": "before retry_after_ms",
    "secrets": "a token or a key was put out",
    "refresh-rotation": "another refresh token",
    "one-refresh-at-a-time": "while a refresh is on its way",
    "device-opens": "not over what must be signed",
    "small-frame-first": "the limit is 16384",
}
"""Conversations that find their fault without waiting for something that never comes, and what they say."""


def test_there_are_enough_conversations_and_each_says_what_it_proves() -> None:
    assert len(SCRIPTED) >= 60
    for check in SCRIPTED.values():
        section = check.proves.split(":")[0].split(",")[0]
        assert section[0].isdigit() or section.startswith("0"), check.name


def test_readme_of_the_kit_has_the_number_of_scenarios() -> None:
    readme = (Path(__file__).parents[2] / "clients" / "conformance" / "README.md").read_text(encoding="utf-8")
    assert f"{len(SCRIPTED)} scenarios with a scripted server" in readme


def test_each_conversation_has_its_fault() -> None:
    assert set(FAULTS) == set(SCRIPTED)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_can_be_put_in_and_leaves_nothing_behind(name: str) -> None:
    before = Backoff.next.__code__, CallError.from_wire.__func__.__code__  # type: ignore[attr-defined]
    with fault_of(name).applied():
        pass
    assert before == (Backoff.next.__code__, CallError.from_wire.__func__.__code__)  # type: ignore[attr-defined]


def test_a_fault_changes_the_code_while_it_lasts() -> None:
    backoff = Backoff(lambda: 0.5)
    with fault_of("scripted/no-storm").applied():
        assert backoff.next() == 0.0
    assert backoff.next() > 0.0


def test_a_fault_whose_place_is_gone_is_told() -> None:
    lost = fault("x", ("zcproto.client.backoff:Backoff.next", "no such text", ""))
    with pytest.raises(Unmatched, match="no such text"), lost.applied():
        pass
    twice = fault("x", ("zcproto.client.backoff:Backoff.next", "self", ""))
    with pytest.raises(Unmatched, match="times"), twice.applied():
        pass


async def test_conversations_find_their_faults() -> None:
    chosen = [SCRIPTED[f"scripted/{name}"] for name in QUICKLY_FOUND]
    results = await seen_to_fail(chosen, patience=20.0, jobs=6)
    for result in results:
        assert result.result == FAILED, result.check.name
        assert QUICKLY_FOUND[result.check.name.removeprefix("scripted/")] in result.why, result
