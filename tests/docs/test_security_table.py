"""docs/security.md names files and tests that exist, and omits no requirement of the standards."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.messages import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")

ASVS = [
    *("7.1.1", "7.1.2", "7.1.3", "7.2.1", "7.2.2", "7.2.3", "7.2.4", "7.3.1", "7.3.2"),
    *("7.4.1", "7.4.2", "7.4.3", "7.4.4", "7.4.5", "7.5.1", "7.5.2", "7.5.3", "7.6.1", "7.6.2"),
]
"""All requirements of chapter 7 of ASVS 5.0."""

NIST = [
    "5.1",
    "5.1 (1)",
    "5.1 (2)",
    "5.1 (3)",
    "5.1 (4)",
    "5.1 (5)",
    "5.1 (6)",
    "5.1.1",
    "5.1.2",
    "5.2",
    "5.3",
    "3.2.2",
]


def section(number: int) -> str:
    """Return one section of the page."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def rows(number: int) -> list[list[str]]:
    """Return the cells of a section's table, without its head."""
    lines = [line for line in section(number).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


ROWS = [row for number in (1, 2, 3) for row in rows(number)]


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_row_names_existing_files_and_tests(row: list[str]) -> None:
    assert len(row) == 4
    _, does, where, shown = row
    if does.startswith("does not apply") and not where:
        assert ": " in does, "the reason is missing"
        assert not shown
        return
    files, tests = re.findall(r"`([^`]+)`", where), re.findall(r"`([^`]+)`", shown)
    assert files
    assert tests
    for path in files:
        assert (ROOT / path).is_file(), path
    for test in tests:
        path, name = test.split("::")
        assert name in names_in(path), test
        assert name.startswith("test_")


@pytest.mark.parametrize(("number", "requirements"), [(1, ASVS), (3, NIST)])
def test_every_requirement_has_a_row(number: int, requirements: list[str]) -> None:
    listed = {match[0] for row in rows(number) if (match := re.match(r"[0-9.]+(?: \([0-9]\))?", row[0]))}
    assert listed == set(requirements)
    assert len(rows(number)) >= len(requirements)


def test_times_equal_the_defaults_of_the_configuration() -> None:
    from zcproto.config import Config

    sessions = Config().sessions
    hours, days = 3600.0, 86_400.0
    times = {row[0]: row[1] for row in rows(4)}
    assert times["overall, without a refresh token"] == f"{sessions.lifetime / hours:g} h"
    assert times["overall, with refresh tokens (the default)"] == f"{sessions.refresh_lifetime / days:g} d"
    assert sessions.idle_timeout is not None
    assert times["inactivity"] == f"{sessions.idle_timeout / hours:g} h"
