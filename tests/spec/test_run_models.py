"""The rules of the models in spec/model hold their properties, and each of them is necessary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.spec.test_store_model import ROOT, search, with_spin

FOLDER = ROOT / "spec" / "model"
OPTIONS = {"CUTS", "LOSSES", "FAILOVERS", "PAUSES", "KILLS", "TOTAL", "LIVES"}
RULES = {
    "opening": ("TOMBSTONE", "LIMITED", "ATTACHES"),
    "runs": (
        *("POSITION", "FENCE", "KEEP", "KEEP_END", "STORED", "REPLICATED", "CURRENT", "TAKEN_AGAIN"),
        *("ATTACH_AGAIN", "STATE", "GRACE", "DISOWN", "AHEAD"),
    ),
    "calls": ("ONE_STEP", "NEWEST", "DEADLINE", "WITH_OWNER", "AGAIN"),
}


def search_without(folder: Path, model: str, without: tuple[str, ...], *options: str) -> str:
    """Search the states of a model with all rules but some."""
    rules = [rule for rule in RULES[model] if rule not in without]
    return search(folder, *rules, *options, model=FOLDER / f"{model}.pml")


@pytest.mark.parametrize("model", RULES)
def test_each_rule_is_described_with_modules_that_exist(model: str) -> None:
    source = (FOLDER / f"{model}.pml").read_text()
    assert set(re.findall(r"#ifn?def (\w+)", source)) - OPTIONS == set(RULES[model])
    described = re.findall(r"^ \*   ([A-Z_]+) +[^(]+\(([^)]+)\)", source, re.MULTILINE)
    assert {rule for rule, _ in described} == set(RULES[model])
    modules = {name for _, names in described for name in names.split(", ")}
    assert [name for name in modules if not (ROOT / "zcproto" / name).is_file()] == []


@with_spin
@pytest.mark.parametrize(
    ("model", "without", "options", "least"),
    [
        pytest.param("opening", (), [], 800, id="opening"),
        pytest.param("runs", (), ["FAILOVERS=1", "PAUSES=1"], 100_000, id="failover and pause"),
        pytest.param("runs", (), ["FAILOVERS=1", "KILLS=1"], 50_000, id="failover and kill"),
        pytest.param("runs", (), ["CUTS=1", "LOSSES=1"], 50_000, id="cut and lost append"),
        pytest.param("runs", ("REPLICATED",), ["FAILOVERS=1", "CUTS=1"], 50_000, id="failover without WAIT"),
        pytest.param("calls", (), [], 5_000, id="pending call"),
        pytest.param("calls", (), ["LIVES"], 100, id="pending call is answered"),
    ],
)
def test_properties_hold_with_all_rules(
    tmp_path: Path, model: str, without: tuple[str, ...], options: list[str], least: int
) -> None:
    report = search_without(tmp_path, model, without, *options)
    assert "errors: 0" in report
    assert (states := re.search(r"(\d+) states, stored", report))
    assert int(states[1]) > least


@with_spin
@pytest.mark.parametrize(
    ("model", "rule", "options"),
    [
        pytest.param("opening", "TOMBSTONE", [], id="id of a run that has gone"),
        pytest.param("opening", "LIMITED", [], id="first OPEN repeated for hours"),
        pytest.param("opening", "ATTACHES", [], id="params repeated after ACCEPTED"),
        pytest.param("runs", "POSITION", ["LOSSES=1"], id="append repeated"),
        pytest.param("runs", "FENCE", ["PAUSES=1"], id="append after the end"),
        pytest.param("runs", "KEEP", ["FAILOVERS=1"], id="items that the failover lost"),
        pytest.param("runs", "KEEP_END", ["FAILOVERS=1"], id="end that the failover lost"),
        pytest.param("runs", "STORED", ["KILLS=1"], id="item read before it was stored"),
        pytest.param(
            "runs", "REPLICATED", ["FAILOVERS=1", "KILLS=1"], id="item read before it was replicated"
        ),
        pytest.param("runs", "CURRENT", ["CUTS=1"], id="taken by an earlier attachment"),
        pytest.param("runs", "TAKEN_AGAIN", ["CUTS=1"], id="taken lost with its connection"),
        pytest.param("runs", "ATTACH_AGAIN", ["FAILOVERS=1"], id="attachment that the failover lost"),
        pytest.param("runs", "STATE", [], id="message that is lost"),
        pytest.param("runs", "GRACE", ["FAILOVERS=1"], id="live owner"),
        pytest.param("runs", "DISOWN", ["FAILOVERS=1", "PAUSES=1"], id="run that no process runs"),
        pytest.param("calls", "ONE_STEP", [], id="token replaced after its check"),
        pytest.param("calls", "NEWEST", [], id="old token"),
        pytest.param("calls", "DEADLINE", [], id="late answer"),
        pytest.param("calls", "WITH_OWNER", [], id="answer without a method"),
        pytest.param("calls", "AGAIN", ["LIVES"], id="client that connects later"),
    ],
)
def test_properties_fail_without_each_rule(tmp_path: Path, model: str, rule: str, options: list[str]) -> None:
    report = search_without(tmp_path, model, (rule,), *options)
    assert "errors: 1" in report
    assert "assertion violated" in report or "invalid end state (" in report


@with_spin
def test_reader_ahead_of_the_log_waits(tmp_path: Path) -> None:
    report = search_without(tmp_path, "runs", ("REPLICATED", "AHEAD"), "FAILOVERS=1", "CUTS=1")
    assert "assertion violated" in report
