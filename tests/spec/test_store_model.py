"""The rules of spec/store.pml hold its properties, and each of them is necessary."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "spec" / "store.pml"
RULES = ("WATCH_ROLE", "REPEAT", "DISTRUST", "CONFIRM", "PENDING", "GRACE_ENDS", "ONE_PAIR", "LIMIT")
ANY_FAULT = ("FAILOVER", "PAUSE", "CUT", "CRASH")

with_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed"
)


def test_each_rule_of_the_model_is_named_by_the_code_that_implements_it() -> None:
    source = MODEL.read_text()
    assert set(re.findall(r"#ifn?def (\w+)", source)) - {"SESSIONS", "FAULTS", *ANY_FAULT} == set(RULES)
    listed = re.findall(r"^ \*   ([A-Z_]+)  ([^(]+)\(([^)]+)\)", source, re.MULTILINE)
    modules = {(rule, f"zcproto/{module}") for rule, _, names in listed for module in names.split(", ")}
    assert {rule for rule, _ in modules} == set(RULES)
    references = {
        (rule, str(path.relative_to(ROOT)))
        for path in (ROOT / "zcproto").rglob("*.py")
        for rule in re.findall(r"\(([A-Z_]+)\s+in\s+spec/store\.pml\)", path.read_text())
    }
    assert references == modules


def search(folder: Path, *definitions: str, model: Path = MODEL) -> str:
    """Search all states of a model. Return spin's report, which must be of a complete search."""
    options = [f"-D{each}" for each in definitions]
    # To optimize the search takes longer than it saves.
    command = ["spin", *options, "-run", "-safety", "-DCOLLAPSE", "-O0", "-m200000", str(model)]
    report = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert "max search depth too small" not in report
    return report


@with_spin
@pytest.mark.parametrize(
    ("options", "least"),
    [(["FAULTS=1", *ANY_FAULT], 200_000), (["FAULTS=0", "SESSIONS=2"], 50_000)],
    ids=["one session and any fault", "limit of one session"],
)
def test_properties_hold_with_all_rules(tmp_path: Path, options: list[str], least: int) -> None:
    report = search(tmp_path, *RULES, *options)
    assert "errors: 0" in report
    assert (states := re.search(r"(\d+) states, stored", report))
    assert int(states[1]) > least
    assert "unreached in proctype" in report


@with_spin
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        pytest.param("WATCH_ROLE", ["FAILOVER"], id="writes to the old primary"),
        pytest.param("REPEAT", ["FAILOVER"], id="writes lost by a failover"),
        pytest.param("DISTRUST", ["PAUSE"], id="paused node"),
        pytest.param("CONFIRM", ["FAULTS=2", "FAILOVER", "PAUSE"], id="failover during a pause"),
        pytest.param("PENDING", ["FAULTS=2", "CUT", "CRASH"], id="revocation during an outage"),
        pytest.param("GRACE_ENDS", ["CUT"], id="isolated node"),
        pytest.param("ONE_PAIR", ["FAULTS=0"], id="refresh retried on the other node"),
        pytest.param("LIMIT", ["FAULTS=0", "SESSIONS=2"], id="two sessions opened at the same time"),
    ],
)
def test_properties_fail_without_each_rule(tmp_path: Path, rule: str, options: list[str]) -> None:
    report = search(tmp_path, *(each for each in RULES if each != rule), *options)
    assert "errors: 1" in report
    assert "assertion violated" in report
