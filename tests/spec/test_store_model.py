"""The rules of spec/store.pml hold its property, and each of them is necessary."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "spec" / "store.pml"
RULES = ("WATCH_ROLE", "REPEAT", "DISTRUST")

with_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed"
)


def test_each_rule_of_the_model_is_named_by_the_code_that_implements_it() -> None:
    source = MODEL.read_text()
    assert set(re.findall(r"#ifdef (\w+)", source)) == set(RULES)
    listed = re.findall(r"^ \*   ([A-Z_]+)  ([^(]+)\(([^)]+)\)", source, re.MULTILINE)
    modules = {
        (rule, f"zcproto/stores/{module}") for rule, _, names in listed for module in names.split(", ")
    }
    assert {rule for rule, _ in modules} == set(RULES)
    references = {
        (rule, str(path.relative_to(ROOT)))
        for path in (ROOT / "zcproto").rglob("*.py")
        for rule in re.findall(r"\(([A-Z_]+)\s+in\s+spec/store\.pml\)", path.read_text())
    }
    assert references == modules


def search(folder: Path, *rules: str) -> str:
    """Search all states of the model. Return spin's report, which must be of a complete search."""
    command = ["spin", *(f"-D{rule}" for rule in rules), "-run", "-safety", str(MODEL)]
    report = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert "max search depth too small" not in report
    return report


@with_spin
def test_superseded_token_is_refused_within_the_bound(tmp_path: Path) -> None:
    report = search(tmp_path, *RULES)
    assert "errors: 0" in report
    assert (states := re.search(r"(\d+) states, stored", report))
    assert int(states[1]) > 10_000
    assert "unreached in proctype" in report


@with_spin
@pytest.mark.parametrize("rule", RULES)
def test_superseded_token_is_accepted_later_without_each_rule(tmp_path: Path, rule: str) -> None:
    report = search(tmp_path, *(each for each in RULES if each != rule))
    assert "errors: 1" in report
    assert "assertion violated" in report
