"""The scenario `accelerator_fuzz` finds faults of memory and of results, and none in the accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.scenarios.accelerator_fuzz import SOURCE, fuzz
from tests.interop.support import needs
from tests.limits import TIMEOUT
from zcproto.errors import ZcprotoError

pytestmark = needs("gcc")

FAULTS = {
    "a byte beyond a frame is read": ("    if (left < BODY)\n        return 0;", "", "AddressSanitizer"),
    "a byte beyond a body is read": ("        if (p == end)\n            return 0;", "", "AddressSanitizer"),
    "a byte beyond a frame is written": (
        "memcpy(p + BODY, frame->body, (size_t)frame->size)",
        "memcpy(p + BODY, frame->body, (size_t)frame->size + 64)",
        "AddressSanitizer",
    ),
    "a shift that C does not define": (
        "return (uint32_t)p[0] << 24 |",
        "return p[0] << 24 |",
        "runtime error",
    ),
    "a counter may repeat": ("<= rules->counter", "< rules->counter", "AssertionError"),
    "an ext type is accepted": ("REFUSED, 0, 0, SIZED", "0, 0, 0, SIZED", "AssertionError"),
}


def test_accelerator_has_no_fault() -> None:
    report = fuzz(SOURCE, 2.0, 1)
    assert report.faults == []
    assert report.exit_code == 0


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=[pytest.mark.slow] if number else [])  # each needs a build
        for number, what in enumerate(FAULTS)
    ],
)
def test_fault_is_found(what: str, tmp_path: Path) -> None:
    right, wrong, found = FAULTS[what]
    text = SOURCE.read_text()
    assert text.count(right) == 1
    faulty = tmp_path / "_accelerator.c"
    faulty.write_text(text.replace(right, wrong))
    (fault,) = fuzz(faulty, TIMEOUT, 1).faults
    assert found in fault


def test_source_that_cannot_be_compiled_is_reported(tmp_path: Path) -> None:
    faulty = tmp_path / "_accelerator.c"
    faulty.write_text("int unused(void) { int x; return 0; }")
    with pytest.raises(ZcprotoError, match=r"(?s)_accelerator\.c cannot be compiled.*unused-variable"):
        fuzz(faulty, 1.0, 1)
