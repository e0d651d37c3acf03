"""The alert rules and the dashboard use metrics that exist, and Prometheus accepts the rules."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.interop.support import needs
from tests.limits import TIMEOUT
from zcproto.observe.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "zcproto" / "deploy"
RULES, DASHBOARD = DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "grafana" / "dashboard.json"
RULES_TEST = Path(__file__).parent / "alerts_test.yml"

LABELS = {metric.name: {*metric.labels, "job", "instance"} for metric in METRICS.values()}
LABELS |= {
    f"{metric.name}{suffix}": {*LABELS[metric.name], *(["le"] if suffix == "_bucket" else [])}
    for metric in METRICS.values()
    for suffix in ("_bucket", "_sum", "_count")
    if metric.kind == "histogram"
}
"""The labels of every name that an expression may use."""

_NAME = re.compile(r"\b(?:zcproto|process|python)_[a-z0-9_]+")
_SELECTOR = re.compile(r"\b((?:zcproto|process|python)_[a-z0-9_]+)\{([^}]*)\}")
_FIRST_LABEL = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Return every expression of the dashboard and of the rules, by title."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    rules = re.findall(r"- alert: (\w+)\n\s+expr: (>\n(?:\s{10,}.*\n)+|.*\n)", RULES.read_text())
    assert len(rules) == RULES.read_text().count("- alert:")
    return found | dict(rules)


def test_expressions_use_existing_metrics() -> None:
    found = expressions()
    assert len(found) > 50
    unknown = {
        title: names
        for title, expression in found.items()
        if (names := [name for name in _NAME.findall(expression) if name not in LABELS])
    }
    assert unknown == {}


def test_expressions_use_existing_labels() -> None:
    for title, expression in expressions().items():
        for name, selector in _SELECTOR.findall(expression):
            asked = set(_FIRST_LABEL.findall(selector))
            assert asked <= LABELS[name], title
        for grouping in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression):
            asked = {label.strip() for label in grouping.split(",") if label.strip()}
            known = set().union(*(LABELS[name] for name in _NAME.findall(expression)))
            assert asked <= known, title


def test_legends_use_existing_labels() -> None:
    for panel in panels():
        for target in panel["targets"]:
            known = set().union(*(LABELS[name] for name in _NAME.findall(target["expr"])))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_most_metrics_are_in_the_dashboard_or_the_rules() -> None:
    used = {name for expression in expressions().values() for name in _NAME.findall(expression)}
    used |= {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    unused = {name for name in METRICS.keys() - used if not name.startswith("python_")}
    assert len(unused) < len(METRICS) / 3, unused


def test_every_alert_rule_is_tested() -> None:
    tests = RULES_TEST.read_text()
    for name in re.findall(r"- alert: (\w+)", RULES.read_text()):
        assert f'alertname="{name}"' in tests


@needs("promtool")
@pytest.mark.parametrize(
    "command",
    [["check", "rules", "--lint-fatal", str(RULES)], ["test", "rules", str(RULES_TEST)]],
    ids=lambda command: command[0],
)
def test_promtool_accepts_the_rules(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout
